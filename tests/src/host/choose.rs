//! Decides where guests can run. An open /dev/kvm proves nothing: software variants of KVM without the processor's help
//! interpret most of a guest's kernel and fail at many of its instructions. So a small guest has to run.

use std::fs;

use super::error::{Error, Result};
use super::probe;

/// Overrides the decision: `direct` or `nested`.
pub const VARIABLE: &str = "BERTH_HOST";

/// Where guests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On this machine's own KVM.
    Direct,
    /// In an emulated machine.
    Nested,
}

/// A place, and why it was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    pub place: Place,
    pub reason: String,
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = match self.place {
            Place::Direct => "this machine's KVM",
            Place::Nested => "a nested host",
        };
        write!(f, "guests run in {place}: {}", self.reason)
    }
}

/// Looks at this machine and decides.
pub fn choose() -> Result<Choice> {
    let wish = std::env::var(VARIABLE).ok();
    let cpu_info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    decide(wish.as_deref(), &cpu_info, probe::run)
}

fn decide(wish: Option<&str>, cpu_info: &str, probe: impl FnOnce() -> Result<()>) -> Result<Choice> {
    let choice = |place, reason: String| Ok(Choice { place, reason });
    match wish {
        Some("direct") => return choice(Place::Direct, format!("{VARIABLE} says so")),
        Some("nested") => return choice(Place::Nested, format!("{VARIABLE} says so")),
        None | Some("") => {}
        Some(other) => return Err(Error(format!("{VARIABLE} is {other:?}: it must be direct or nested"))),
    }
    let Some(flag) = virtualization_flag(cpu_info) else {
        return choice(Place::Nested, "the processor here shows neither vmx nor svm".into());
    };
    match probe() {
        Ok(()) => choice(Place::Direct, format!("the processor has {flag} and a trial guest ran")),
        Err(error) => {
            choice(Place::Nested, format!("the processor has {flag}, but no trial guest ran: {error}"))
        }
    }
}

/// The flag for hardware virtualization in the text of /proc/cpuinfo.
fn virtualization_flag(cpu_info: &str) -> Option<&'static str> {
    let flags =
        cpu_info.lines().find_map(|line| line.strip_prefix("flags")?.trim_start().strip_prefix(':'))?;
    ["vmx", "svm"].into_iter().find(|wanted| flags.split_whitespace().any(|flag| flag == *wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITH_SVM: &str =
        "processor\t: 0\nflags\t\t: fpu de svm nx\n\nprocessor\t: 1\nflags\t\t: fpu de svm nx\n";
    const WITHOUT: &str = "processor\t: 0\nflags\t\t: fpu vme svm_lock de\nvmx flags\t: none\n";

    fn no_probe() -> Result<()> {
        panic!("the trial guest must not be needed")
    }

    #[test]
    fn the_variable_decides_before_anything_is_tried() {
        assert_eq!(decide(Some("direct"), WITHOUT, no_probe).unwrap().place, Place::Direct);
        assert_eq!(decide(Some("nested"), WITH_SVM, no_probe).unwrap().place, Place::Nested);
        let error = decide(Some("dirct"), WITH_SVM, no_probe).unwrap_err().to_string();
        assert_eq!(error, "BERTH_HOST is \"dirct\": it must be direct or nested");
    }

    #[test]
    fn without_the_flag_no_guest_is_tried() {
        let choice = decide(None, WITHOUT, no_probe).unwrap();
        assert_eq!(
            choice.to_string(),
            "guests run in a nested host: the processor here shows neither vmx nor svm"
        );
    }

    #[test]
    fn with_the_flag_the_trial_guest_decides() {
        assert_eq!(decide(None, WITH_SVM, || Ok(())).unwrap().place, Place::Direct);
        let failed = decide(Some(""), WITH_SVM, || Err(Error("no permission".into()))).unwrap();
        assert_eq!(failed.place, Place::Nested);
        assert!(failed.reason.ends_with("no permission"));
    }
}
