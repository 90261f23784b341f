//! The pages of the repository, held to each other: docs/README.md has all of docs/, and every link between files leads somewhere.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const CONTENTS: &str = "docs/README.md";
/// Where cargo puts what it makes, and others' pages with it.
const MADE: &str = "target";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every page of the repository.
fn pages(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let (path, name) = (entry.path(), entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            if name != MADE && !name.to_string_lossy().starts_with('.') {
                found.extend(pages(&path));
            }
        } else if path.extension().is_some_and(|ending| ending == "md") {
            found.push(path);
        }
    }
    found
}

/// A page without what is shown as it is written: blocks between fences, and words between backquotes.
fn prose(page: &str) -> String {
    let blocks = page.split("\n```").step_by(2).collect::<Vec<_>>().join("\n");
    blocks.split('`').step_by(2).collect()
}

/// Where the links of a page lead.
fn links(page: &str) -> Vec<String> {
    let page = prose(page);
    page.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0.to_owned())).collect()
}

/// The names that the headings of a page have in links.
fn anchors(page: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    for heading in page.split("\n```").step_by(2).flat_map(str::lines).filter(|line| line.starts_with('#')) {
        let text = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = text.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        let name: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
        // A heading that is there again has a number.
        let again = (1..).map(|number| format!("{name}-{number}")).find(|name| !anchors.contains(name));
        anchors.insert(if anchors.contains(&name) { again.unwrap() } else { name });
    }
    anchors
}

#[test]
fn every_page_of_the_documentation_is_in_its_contents() {
    let contents = fs::read_to_string(root().join(CONTENTS)).unwrap();
    let linked: BTreeSet<_> = links(&contents).into_iter().filter(|link| !link.contains('/')).collect();
    let pages = pages(&root().join("docs"));
    let there: BTreeSet<_> = pages
        .iter()
        .filter(|page| **page != root().join(CONTENTS))
        .map(|page| page.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    assert!(there.len() > 10);
    assert_eq!(there.difference(&linked).collect::<Vec<_>>(), [""; 0], "are not in {CONTENTS}");
}

#[test]
fn every_link_between_files_leads_somewhere() {
    let (mut broken, mut count) = (Vec::new(), 0);
    for page in pages(&root()) {
        let text = fs::read_to_string(&page).unwrap();
        for link in links(&text).into_iter().filter(|link| !link.contains("://")) {
            count += 1;
            let (path, anchor) =
                link.split_once('#').map_or((&*link, None), |(path, anchor)| (path, Some(anchor)));
            let target = if path.is_empty() { page.clone() } else { page.parent().unwrap().join(path) };
            let leads = target.exists()
                && anchor.is_none_or(|anchor| {
                    fs::read_to_string(&target).is_ok_and(|text| anchors(&text).contains(anchor))
                });
            if !leads {
                broken.push(format!("{}: {link}", page.strip_prefix(root()).unwrap().display()));
            }
        }
    }
    assert!(count > 50);
    assert_eq!(broken, [""; 0]);
}

#[test]
fn links_and_anchors_are_found_as_they_are_shown() {
    let page = "# One & two: `three`\n\nSee [a\nb](docs/x.md#y) and `[no](code)`.\n\n```sh\n# no heading\n[no](block)\n```\n\n\
                ## Again\n## Again\n[c](#again)\n";
    assert_eq!(links(page), ["docs/x.md#y", "#again"]);
    let expected = ["again", "again-1", "one--two-three"].map(str::to_owned);
    assert_eq!(anchors(page), BTreeSet::from(expected));
}
