//! The kernel command line, as words with values: what is said about the root, and what is said to us (`berth.*`).

/// Words of the kernel command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine(Vec<String>);

impl CommandLine {
    /// Words are between blanks; a quoted part may have blanks in it, and its quotes do not count. What is behind `--` is
    /// for init.
    pub fn parse(text: &str) -> CommandLine {
        let (mut words, mut word, mut quoted) = (Vec::new(), String::new(), false);
        for letter in text.chars() {
            match letter {
                '"' => quoted = !quoted,
                letter if letter.is_ascii_whitespace() && !quoted => words.push(std::mem::take(&mut word)),
                letter => word.push(letter),
            }
        }
        words.push(word);
        words.retain(|word| !word.is_empty());
        let end = words.iter().position(|word| word == "--").unwrap_or(words.len());
        words.truncate(end);
        CommandLine(words)
    }

    /// What comes after `name=`; of several the last.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.0.iter().rev().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    pub fn has(&self, word: &str) -> bool {
        self.0.iter().any(|other| other == word)
    }

    /// The root is to be mounted so that it can be written. Of `ro` and `rw` the last counts.
    pub fn is_writable(&self) -> bool {
        self.0.iter().rev().find(|word| *word == "ro" || *word == "rw").is_some_and(|word| word == "rw")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_values_the_last_counts() {
        let line = CommandLine::parse("root=/dev/vda ro rootwait  root=LABEL=x rw\n");
        assert_eq!(line.value("root"), Some("LABEL=x"));
        assert_eq!(line.value("roo"), None);
        assert!(line.is_writable() && line.has("rootwait") && !line.has("root"));
        assert!(!CommandLine::parse("rw ro").is_writable());
        assert!(!CommandLine::parse("").is_writable());
    }

    #[test]
    fn quotes_keep_blanks_and_two_dashes_end_it() {
        let line = CommandLine::parse("a=\"b c\" \"d=e f\" -- root=x");
        assert_eq!((line.value("a"), line.value("d"), line.value("root")), (Some("b c"), Some("e f"), None));
    }
}
