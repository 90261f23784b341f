//! What the pages of docs/ show of a terminal: blocks marked `console`, whose commands are run and held to what stands below
//! them.
//!
//! `$ ` begins a command of an ordinary user's and `# ` one of root's. The lines below it are all that it prints: `…` stands for
//! anything in its line, and alone on a line for any lines or none; of spaces it counts that there are some, so that columns
//! can be in line in both. A command succeeds, unless the last line of its output begins with `berth: `, which is how ours say that
//! they failed.

use std::fmt;

/// What stands for anything.
const ANYTHING: char = '…';
/// How a command of ours says that it failed.
const FAILED: &str = "berth: ";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Root,
    User,
}

/// A command and what it prints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where it stands in its page, from 1.
    pub line: usize,
    pub who: Who,
    pub command: String,
    pub printed: Vec<String>,
}

/// The commands of a page in their order.
///
/// # Errors
/// A block that does not begin with a command, or does not end: with its line.
pub fn steps(page: &str) -> Result<Vec<Step>, String> {
    let mut lines = (1..).zip(page.lines());
    let mut steps = Vec::new();
    while let Some((begin, line)) = lines.next() {
        if line != "```console" {
            continue;
        }
        let mut block: Vec<Step> = Vec::new();
        loop {
            let (number, line) =
                lines.next().ok_or_else(|| format!("line {begin}: the block does not end"))?;
            if line == "```" {
                break;
            }
            match (command(line), block.last_mut()) {
                (Some((who, command)), _) => {
                    block.push(Step { line: number, who, command: command.into(), printed: Vec::new() })
                }
                (None, Some(step)) => step.printed.push(line.into()),
                (None, None) => return Err(format!("line {number}: no command, which a block begins with")),
            }
        }
        steps.append(&mut block);
    }
    Ok(steps)
}

fn command(line: &str) -> Option<(Who, &str)> {
    let of_user = line.strip_prefix("$ ").map(|command| (Who::User, command));
    of_user.or_else(|| line.strip_prefix("# ").map(|command| (Who::Root, command)))
}

impl Step {
    pub fn should_fail(&self) -> bool {
        self.printed.last().is_some_and(|line| line.starts_with(FAILED))
    }

    /// Whether this is what the page says that it prints.
    pub fn is_told_by(&self, output: &str) -> bool {
        let said: Vec<_> = output.lines().map(spaced).collect();
        let told: Vec<_> = self.printed.iter().map(|line| spaced(line)).collect();
        are_lines(&told, &said)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prompt = match self.who {
            Who::Root => '#',
            Who::User => '$',
        };
        write!(f, "{prompt} {}", self.command)?;
        self.printed.iter().try_for_each(|line| write!(f, "\n{line}"))
    }
}

/// A line with one space where there are several, and none at its end.
fn spaced(line: &str) -> String {
    let mut spaced = String::new();
    for c in line.trim_end().chars() {
        if !(c.is_whitespace() && spaced.ends_with(' ')) {
            spaced.push(if c.is_whitespace() { ' ' } else { c });
        }
    }
    spaced
}

fn are_lines(told: &[String], said: &[String]) -> bool {
    match (told, said) {
        ([], said) => said.is_empty(),
        ([line, rest @ ..], said) if is_anything(line) => {
            (0..=said.len()).any(|skipped| are_lines(rest, said.get(skipped..).unwrap_or_default()))
        }
        ([line, told @ ..], [first, said @ ..]) => is_line(line, first) && are_lines(told, said),
        (_, []) => false,
    }
}

fn is_anything(line: &str) -> bool {
    line.chars().eq([ANYTHING])
}

fn is_line(told: &str, said: &str) -> bool {
    let Some((begin, rest)) = told.split_once(ANYTHING) else { return told == said };
    let Some(said) = said.strip_prefix(begin) else { return false };
    // What stands last is at the end, and what is between is where it is first found.
    let mut said = said;
    let mut parts = rest.split(ANYTHING).peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return said.ends_with(part);
        }
        match said.split_once(part) {
            Some((_, after)) => said = after,
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(line: usize, who: Who, command: &str, printed: &[&str]) -> Step {
        Step {
            line,
            who,
            command: command.into(),
            printed: printed.iter().map(|&line| line.into()).collect(),
        }
    }

    #[test]
    fn commands_are_read_from_blocks_of_a_console_and_from_nowhere_else() {
        let page = "# A heading\n\n    $ indented\n\n```console\n# apt install\nDone.\n$ berth ps\n```\n\
                    $ said\n\n```sh\n$ no\n```\n```console\n$ berth rm web\nweb\n\nmore\n```\n";
        let expected = [
            step(6, Who::Root, "apt install", &["Done."]),
            step(8, Who::User, "berth ps", &[]),
            step(16, Who::User, "berth rm web", &["web", "", "more"]),
        ];
        assert_eq!(steps(page).unwrap(), expected);
        assert_eq!(expected[2].to_string(), "$ berth rm web\nweb\n\nmore");
    }

    #[test]
    fn a_block_without_a_command_or_an_end_is_named() {
        let error = steps("```console\n$ true\n```\n```console\nfalse\n```").unwrap_err();
        assert!(error.starts_with("line 5:"), "{error}");
        assert!(steps("\n```console\n$ true").unwrap_err().starts_with("line 2:"));
    }

    #[test]
    fn what_is_printed_is_what_is_told() {
        let cases: [(&[&str], &str, bool); 20] = [
            (&[], "", true),
            (&[], "more\n", false),
            (&["web"], "web\n", true),
            (&["web"], "web", true),
            (&["web"], "", false),
            (&["web"], "web2\n", false),
            (&["web"], "web\nmore\n", false),
            (&["NAME   …   web"], "NAME   x   web\n", true),
            (&["up … seconds"], "up 12 seconds", true),
            (&["up … seconds"], "up 12 minutes", false),
            (&["a…b…c"], "a-b-b-c", true),
            (&["a…b…c"], "a-c-b", false),
            // Two things that stand for each other's place.
            (&["ab…bc"], "abc", false),
            (&["…"], "", true),
            (&["…"], "one\ntwo\n", true),
            (&["…", "last"], "one\ntwo\nlast\n", true),
            (&["…", "last"], "last\nbut one\n", false),
            (&["NAME      …   web"], "NAME   x  web", true),
            (&["a  b"], "ab", false),
            // What a terminal of a guest's ends its lines with.
            (&["one", "…", "two"], "one\r\ntwo  \n", true),
        ];
        for (told, output, is_told) in cases {
            let step = step(1, Who::User, "command", told);
            assert_eq!(step.is_told_by(output), is_told, "{told:?} {output:?}");
        }
    }

    #[test]
    fn a_command_fails_where_the_page_shows_how() {
        assert!(step(1, Who::User, "berth start x", &["berth: x: there is no such guest"]).should_fail());
        assert!(!step(1, Who::User, "berth ps", &["NAME"]).should_fail());
        assert!(!step(1, Who::Root, "apt remove", &["berth: stopping 1 guests", "…"]).should_fail());
    }
}
