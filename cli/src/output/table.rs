//! Aligned columns for people. Programs take JSON.

use super::plain;

/// Between two columns.
const GAP: usize = 3;

/// Rows under a heading.
#[derive(Clone, Debug)]
pub struct Table {
    heading: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(heading: &[&'static str]) -> Table {
        Table { heading: heading.to_vec(), rows: Vec::new() }
    }

    /// A row; its cells are shown on one line whatever is in them.
    pub fn add<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.iter().map(|cell| plain(cell)).collect());
    }

    pub fn render(&self) -> String {
        let heading: Vec<_> = self.heading.iter().map(|name| name.to_string()).collect();
        let lines: Vec<_> = std::iter::once(&heading).chain(&self.rows).collect();
        let width = |column: usize| {
            lines
                .iter()
                .filter_map(|line| line.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<_> = (0..heading.len()).map(width).collect();
        let mut text = String::new();
        for line in lines {
            let mut row = String::new();
            for (cell, width) in line.iter().zip(&widths) {
                row.push_str(&format!("{cell:<width$}", width = width + GAP));
            }
            text.push_str(row.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_where_their_text_does() {
        let mut table = Table::new(&["NAME", "STATE", "MEMORY"]);
        table.add(["web".into(), "running".into(), "512 MiB".into()]);
        table.add(["a-long-name".into(), "stopped".into(), "".into()]);
        assert_eq!(
            table.render(),
            "NAME          STATE     MEMORY\n\
             web           running   512 MiB\n\
             a-long-name   stopped\n"
        );
    }

    #[test]
    fn a_table_of_nothing_is_its_heading() {
        assert_eq!(Table::new(&["NAME", "STATE"]).render(), "NAME   STATE\n");
    }

    #[test]
    fn a_cell_stays_in_its_line() {
        let mut table = Table::new(&["A", "B"]);
        table.add(["two\nlines".into(), "ü".into()]);
        assert_eq!(table.render(), "A            B\ntwo\\nlines   ü\n");
    }
}
