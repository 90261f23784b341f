//! Compiles the system call filters of `resources/seccomp` to the kernel's form, so that the VMM holds them as plain data and
//! a filter that does not compile is a build that fails.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::Path;

/// A file `NAME.json` for each, which holds a filter of this name and no other.
const FILTERS: [&str; 4] = ["api", "control", "io", "vcpu"];

fn main() -> Result<(), Box<dyn Error>> {
    let architecture = std::env::var("CARGO_CFG_TARGET_ARCH")?;
    let directory = Path::new("../resources/seccomp").join(&architecture);
    println!("cargo::rerun-if-changed={}", directory.display());
    let mut code = String::new();
    for name in FILTERS {
        let path = directory.join(name).with_extension("json");
        let program =
            compile(&path, name, &architecture).map_err(|error| format!("{}: {error}", path.display()))?;
        writeln!(code, "pub static {}: [sock_filter; {}] = [", name.to_uppercase(), program.len())?;
        for seccompiler::sock_filter { code: operation, jt, jf, k } in program {
            writeln!(code, "    sock_filter {{ code: {operation}, jt: {jt}, jf: {jf}, k: {k} }},")?;
        }
        writeln!(code, "];")?;
    }
    let output = std::env::var("OUT_DIR")?;
    fs::write(Path::new(&output).join("filters.rs"), code)?;
    Ok(())
}

fn compile(path: &Path, name: &str, architecture: &str) -> Result<seccompiler::BpfProgram, Box<dyn Error>> {
    let mut filters = seccompiler::compile_from_json(File::open(path)?, architecture.try_into()?)?;
    let names: BTreeSet<_> = filters.keys().cloned().collect();
    match filters.remove(name) {
        Some(program) if names.len() == 1 => Ok(program),
        _ => Err(format!("the file must hold the filter {name:?} alone, and holds {names:?}").into()),
    }
}
