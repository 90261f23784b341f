//! Looking for the keys that leave a terminal among those that go to a guest. Pure.

use crate::args::value::DetachKeys;

/// What has been typed of the keys so far.
pub struct Keys<'a> {
    keys: &'a [u8],
    held: Vec<u8>,
}

/// What becomes of what was typed.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed {
    /// For the guest.
    On(Vec<u8>),
    /// The keys that leave. What was typed before them is for the guest, and what came behind them for nobody.
    Leave(Vec<u8>),
}

impl<'a> Keys<'a> {
    pub fn new(keys: &'a DetachKeys) -> Keys<'a> {
        Keys { keys: &keys.0, held: Vec::new() }
    }

    /// Takes what was typed. The beginning of the keys is held back until it is known what comes behind it.
    pub fn typed(&mut self, bytes: &[u8]) -> Typed {
        let mut on = Vec::with_capacity(bytes.len());
        for byte in bytes {
            self.held.push(*byte);
            while !self.keys.starts_with(&self.held) {
                on.push(self.held.remove(0));
            }
            if !self.keys.is_empty() && self.held.len() == self.keys.len() {
                self.held.clear();
                return Typed::Leave(on);
            }
        }
        Typed::On(on)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(keys: &str, typed: &[&[u8]]) -> (Vec<u8>, bool) {
        let keys = keys.parse().unwrap();
        let mut keys = Keys::new(&keys);
        let mut on = Vec::new();
        for bytes in typed {
            match keys.typed(bytes) {
                Typed::On(more) => on.extend(more),
                Typed::Leave(more) => {
                    on.extend(more);
                    return (on, true);
                }
            }
        }
        (on, false)
    }

    #[test]
    fn what_is_typed_before_the_keys_goes_on_and_what_comes_behind_them_does_not() {
        assert_eq!(all("ctrl-]", &[b"ls\x1dxx"]), (b"ls".into(), true));
        assert_eq!(all("ctrl-p,ctrl-q", &[b"a\x10\x11b"]), (b"a".into(), true));
        assert_eq!(all("ctrl-p,ctrl-q", &[b"a\x10", b"\x11"]), (b"a".into(), true));
    }

    #[test]
    fn a_beginning_of_the_keys_that_is_not_gone_on_with_is_for_the_guest() {
        assert_eq!(all("ctrl-p,ctrl-q", &[b"\x10x"]), (b"\x10x".into(), false));
        assert_eq!(all("ctrl-p,ctrl-q", &[b"\x10\x10\x11"]), (b"\x10".into(), true));
        assert_eq!(all("a,a,b", &[b"aaab"]), (b"a".into(), true));
        // It waits for what comes.
        assert_eq!(all("ctrl-p,ctrl-q", &[b"x\x10"]), (b"x".into(), false));
    }

    #[test]
    fn without_keys_everything_is_for_the_guest() {
        assert_eq!(all("none", &[b"\x1d\x10\x11"]), (b"\x1d\x10\x11".into(), false));
    }

    proptest! {
        #[test]
        fn nothing_is_lost_however_it_is_cut(text in "[ab]{0,40}", cut in 1usize..5) {
            let whole = all("a,b,a", &[text.as_bytes()]);
            let pieces: Vec<_> = text.as_bytes().chunks(cut).collect();
            prop_assert_eq!(&all("a,b,a", &pieces), &whole);
            let left = text.find("aba");
            prop_assert_eq!(whole.1, left.is_some());
            prop_assert!(text.as_bytes().starts_with(&whole.0));
            if let Some(at) = left {
                prop_assert_eq!(whole.0.len(), at);
            } else {
                prop_assert!(text.len() - whole.0.len() < 3);
            }
        }
    }
}
