//! A Python with one package from PyPI, so that a program reads what we write that was not written here.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

/// A Python that can import `module` from `package`, in a directory that is kept.
///
/// # Errors
/// Why there is none.
pub fn with(package: &str, module: &str) -> Result<PathBuf, String> {
    // Two tests at once would each clear what the other installs.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("python-{module}"));
    let python = venv.join("bin/python3");
    let works = || {
        let output = Command::new(&python).args(["-c", &format!("import {module}")]).output();
        output.is_ok_and(|output| output.status.success())
    };
    let run = |command: &mut Command| {
        let output = command.output().map_err(|error| error.to_string())?;
        let error = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if output.status.success() { Ok(()) } else { Err(error.lines().last().unwrap_or_default().to_owned()) }
    };
    if !works() {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv))?;
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--timeout", "20", package]))?;
    }
    if works() { Ok(python) } else { Err("it is installed, and cannot be imported".to_owned()) }
}
