//! One file for each kind of command, each of which asks berthd and shows what it says.

pub mod console;
pub mod copy;
pub mod exec;
pub mod guests;
pub mod images;
pub mod run;
pub mod show;
pub mod stats;
