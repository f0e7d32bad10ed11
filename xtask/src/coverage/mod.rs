//! `cargo xtask coverage`: which regions of the libraries their own tests run, and which they do not.
//!
//! Needs the compiler's `llvm-tools`, which it says if they are missing. Code of tests does not count, and a generic
//! function counts once, as run if any of its instances was. Tests of the command, with processes and QEMUs, are not run: what only
//! they reach is listed as not run.

mod regions;

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;
use std::{env, fs};

use self::regions::Regions;
use crate::step::{self, Outcome, Steps};
use crate::test::root;
use crate::tool;

/// Runs the libraries' tests and prints a row for each folder; `target/coverage/not-run.txt` gets every place that no test ran.
pub fn run(arguments: &[String]) -> Result<ExitCode, String> {
    if !arguments.is_empty() {
        return Err("usage: cargo xtask coverage".to_owned());
    }
    let directory = root().join("target/coverage");
    fs::create_dir_all(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    let report = directory.join("regions.json");
    let mut steps = Steps::default();
    match missing() {
        Some(reason) => steps.run("tests", || Outcome::Skipped(reason.to_owned())),
        None => {
            let mut measure = tool::cargo_with("cargo-llvm-cov", VERSION)?;
            measure.arg("llvm-cov");
            for package in LIBRARIES {
                measure.args(["--package", package]);
            }
            measure.args(["--all-features", "--lib", "--tests", "--no-fail-fast"]);
            measure.args(["--json", "--output-path"]).arg(&report);
            steps.run("tests", || step::command(&mut measure, LIMIT));
        }
    }
    if steps.all_passed() && report.exists() {
        let counted = count(&report)?;
        let list = directory.join("not-run.txt");
        fs::write(&list, counted.not_run()).map_err(|error| format!("{}: {error}", list.display()))?;
        println!("\n=== regions\n{}\nnot run: {}", counted.table(), list.display());
    }
    println!("\n=== summary\n{}", steps.table());
    Ok(if steps.all_passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The regions of all source files of the libraries, without those of tests.
fn count(report: &Path) -> Result<Regions, String> {
    let text = fs::read(report).map_err(|error| format!("{}: {error}", report.display()))?;
    let parsed = serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", report.display()))?;
    Regions::of(&parsed, &root(), |path| fs::read_to_string(path).unwrap_or_default())
        .ok_or_else(|| format!("{}: not what cargo-llvm-cov writes", report.display()))
}

/// What has to be installed first.
fn missing() -> Option<&'static str> {
    let sysroot =
        Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())).args(["--print", "sysroot"]).output();
    let sysroot = sysroot.ok().and_then(|output| String::from_utf8(output.stdout).ok()).unwrap_or_default();
    let tools = Path::new(sysroot.trim()).join("lib/rustlib/x86_64-unknown-linux-gnu/bin/llvm-cov");
    (!tools.exists()).then_some("the compiler's llvm-tools are not here (rustup component add llvm-tools)")
}

/// The packages whose regions are counted, and whose tests are run.
const LIBRARIES: &[&str] = &["multifd-proto", "multifd", "multifd-qmp"];
/// The one whose report was read when this was written.
const VERSION: &str = "0.9.1";
/// Building everything anew, and running it at half of its speed.
const LIMIT: Duration = Duration::from_secs(3600);
