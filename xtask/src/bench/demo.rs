//! Runs `multifd demo`: a guest of ours moves between two processes.

use std::process::Command;

use serde_json::Value;

use super::Bench;

/// `multifd demo` over TCP with these options; its report.
pub fn demo(bench: &Bench, options: &[&str]) -> Result<Value, String> {
    let program = bench.programs.join("multifd");
    let common = ["demo", "--json", "--progress=never", "--transport=tcp", "--no-verify"];
    let output = Command::new(&program).args(common).args(options).output();
    let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .map_err(|_| String::from_utf8_lossy(&output.stderr).trim().to_owned())?;
    if output.status.success() { Ok(report) } else { Err(report["error"].as_str().unwrap_or("failed").to_owned()) }
}
