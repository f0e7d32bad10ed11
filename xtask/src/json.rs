//! `cargo xtask json`: writes the page about the reports as JSON, from the types that the command prints.

use std::fs;
use std::process::{ExitCode, Stdio};

use crate::test::{cargo, root};

/// Writes `docs/json.md`. A test of the command checks that it is current.
pub fn run(arguments: &[String]) -> Result<ExitCode, String> {
    if !arguments.is_empty() {
        return Err("usage: cargo xtask json".to_owned());
    }
    let mut command = cargo();
    command.args(["run", "--quiet", "--package", "multifd-cli", "--", "schema", "--markdown"]);
    let output = command.stderr(Stdio::inherit()).output().map_err(|error| format!("cargo: {error}"))?;
    if !output.status.success() {
        return Err("the command could not print the page".to_owned());
    }
    let path = root().join("docs/json.md");
    fs::write(&path, output.stdout).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(ExitCode::SUCCESS)
}
