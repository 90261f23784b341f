//! What is made of the definitions for those who package: completion and man pages.

use std::io;
use std::path::Path;

use clap_complete::Shell;

use crate::args;
use crate::error::{During, Result};

/// The script that makes a shell complete berth's commands.
pub fn completion(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut args::definition(), "berth", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// A man page for berth and one for each command, in a directory that exists.
///
/// # Errors
/// A page cannot be written.
pub fn man_pages(directory: &Path) -> Result<()> {
    let written: io::Result<()> = clap_mangen::generate_to(args::definition(), directory);
    written.during(|| format!("man pages in {}", directory.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Command;

    /// Commands that are shown, with the names of their pages.
    fn shown(command: &Command, page: &str) -> Vec<(String, Command)> {
        let mut all = vec![(page.to_string(), command.clone())];
        for inner in
            command.get_subcommands().filter(|inner| !inner.is_hide_set() && inner.get_name() != "help")
        {
            all.extend(shown(inner, &format!("{page}-{}", inner.get_name())));
        }
        all
    }

    #[test]
    fn each_command_has_a_man_page_that_tells_each_flag_and_has_examples() {
        let directory = tempfile::tempdir().unwrap();
        man_pages(directory.path()).unwrap();
        let pages = shown(&args::definition(), "berth");
        assert!(pages.len() > 25, "{}", pages.len());
        for (page, command) in &pages {
            let path = directory.path().join(format!("{page}.1"));
            let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{page}: {error}"));
            let text = text.replace("\\-", "-");
            for flag in command.get_arguments().filter_map(|flag| flag.get_long()) {
                assert!(text.contains(&format!("--{flag}")), "{page}: --{flag}");
            }
            assert_eq!(text.contains("Examples"), command.get_after_help().is_some(), "{page}");
        }
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), pages.len());
    }

    #[test]
    fn a_shell_completes_each_command() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = completion(shell);
            for (_, command) in shown(&args::definition(), "berth") {
                assert!(script.contains(command.get_name()), "{shell}: {}", command.get_name());
            }
        }
    }

    #[test]
    fn a_directory_that_is_not_there_is_told() {
        let error = man_pages(Path::new("/nowhere/at/all")).unwrap_err().to_string();
        assert!(error.starts_with("man pages in /nowhere/at/all: "), "{error}");
    }
}
