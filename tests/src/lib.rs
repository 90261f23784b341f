pub mod assets;
pub mod host;
