//! What every device says about a saved state that it cannot take.

use std::fmt::Display;

/// A saved state that no release of this device has written: a damaged or hostile file. Nothing was changed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("saved state of {device}: {field} is {value}, must be {rule}")]
pub struct StateError {
    pub device: &'static str,
    pub field: &'static str,
    pub value: String,
    pub rule: String,
}

impl StateError {
    pub(crate) fn new(
        device: &'static str,
        field: &'static str,
        value: impl Display,
        rule: impl Display,
    ) -> Self {
        Self { device, field, value: value.to_string(), rule: rule.to_string() }
    }
}
