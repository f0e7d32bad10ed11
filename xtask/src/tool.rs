//! Tools of cargo that are installed from crates.io when they are needed: in one version, below the build directory.

use std::env;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::step::{self, Outcome};
use crate::test::{cargo, root};

/// The cargo that runs this, with the subcommand of `tool` (`cargo-NAME`) in `version`, which is installed if it is not there.
///
/// # Errors
/// It cannot be installed, in words.
pub fn cargo_with(tool: &str, version: &str) -> Result<Command, String> {
    let place = root().join(format!("target/tools/{tool}-{version}"));
    let programs = place.join("bin");
    if !programs.join(tool).exists() {
        let mut install = cargo();
        install.args(["install", "--locked", tool, "--version", version, "--root"]).arg(&place);
        if let Outcome::Failed(reason) = step::command(&mut install, INSTALL) {
            return Err(format!("{tool} {version} cannot be installed: {reason}"));
        }
    }
    let mut with_tool = cargo();
    with_tool.env("PATH", first_in_path(programs)?);
    Ok(with_tool)
}

/// The search path, with `directory` as its first.
fn first_in_path(directory: PathBuf) -> Result<std::ffi::OsString, String> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::join_paths([directory].into_iter().chain(env::split_paths(&path))).map_err(|error| format!("PATH: {error}"))
}

/// Building a tool on a busy machine.
const INSTALL: Duration = Duration::from_secs(1800);
