//! `cargo xtask fuzz`: runs the fuzzers for a while each, from corpora made of recorded streams.
//!
//! Needs a nightly compiler, a C++ compiler and cargo-fuzz; where one is missing it says which. What the fuzzers run is
//! also run by plain tests, over the same corpora and mutations of them, which need none of these.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;
use std::{env, fs};

use crate::step::{self, Outcome, Steps};

/// Runs all targets, or those that are named.
pub fn run(arguments: &[String]) -> Result<ExitCode, String> {
    const USAGE: &str = "usage: cargo xtask fuzz [--seconds N] [TARGET…]";
    let (mut seconds, mut named) = (60, Vec::new());
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if argument == "--seconds" {
            seconds = arguments.next().and_then(|text| text.parse().ok()).ok_or(USAGE)?;
        } else {
            named.push(argument.clone());
        }
    }
    let all = targets()?;
    if let Some(unknown) = named.iter().find(|name| !all.contains(name)) {
        return Err(format!("{unknown}: no such target; there are {}\n{USAGE}", all.join(", ")));
    }
    let mut steps = Steps::default();
    let results = check(&mut steps, if named.is_empty() { &all } else { &named }, seconds);
    println!("\n=== fuzzers\n{}\n\n=== summary\n{}", results.join("\n"), steps.table());
    Ok(if steps.all_passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs `targets` as `steps`, for `seconds` each; returns a row with the executions of each.
pub fn check(steps: &mut Steps, targets: &[String], seconds: u64) -> Vec<String> {
    let mut results = Vec::new();
    if let Some(missing) = missing() {
        steps.run("fuzzers", || Outcome::Skipped(missing.to_owned()));
        return results;
    }
    steps.run("corpora", || {
        let mut generate = cargo(None);
        generate.args(["run", "--quiet", "--package", "fuzz-bodies", "--"]).arg(directory().join("corpus"));
        step::command(&mut generate, BUILD)
    });
    for target in targets {
        steps.run(target, || fuzz(target, seconds, &mut results));
    }
    results
}

/// Builds and runs one target; adds a row with its executions to `results`.
fn fuzz(target: &str, seconds: u64, results: &mut Vec<String>) -> Outcome {
    let build = step::command(cargo(Some("nightly")).args(["fuzz", "build", target]), BUILD);
    if build != Outcome::Passed {
        return build;
    }
    let log = directory().join("target").join(format!("{target}.log"));
    let mut run = cargo(Some("nightly"));
    run.args(["fuzz", "run", target, "--"]);
    // An input may take long on a busy machine, but not forever; and nothing that a peer says asks for more memory.
    run.arg(format!("-max_total_time={seconds}"));
    run.args(["-timeout=60", "-malloc_limit_mb=192", "-rss_limit_mb=4096", "-max_len=65536", "-print_final_stats=1"]);
    match fs::File::create(&log) {
        Ok(file) => run.stderr(file),
        Err(error) => return Outcome::Failed(format!("{}: {error}", log.display())),
    };
    let outcome = step::command(&mut run, Duration::from_secs(seconds) + BUILD);
    let text = fs::read_to_string(&log).unwrap_or_default();
    let figure = |name: &str| {
        let line = text.lines().rev().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_whitespace().last()).unwrap_or("?").to_owned()
    };
    let executions = figure("stat::number_of_executed_units:");
    let found = if outcome == Outcome::Passed { "no finding" } else { "A FINDING" };
    results.push(format!("{target}: {executions} executions in {seconds} s, {found}"));
    if outcome != Outcome::Passed {
        let lines: Vec<&str> = text.lines().collect();
        println!("{}", lines[lines.len().saturating_sub(60)..].join("\n"));
    }
    outcome
}

/// What the fuzzers need and is not here.
fn missing() -> Option<&'static str> {
    let works = |command: &mut Command| {
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        quiet.status().is_ok_and(|status| status.success())
    };
    if !works(cargo(Some("nightly")).arg("--version")) {
        return Some("there is no nightly compiler (rustup toolchain install nightly)");
    }
    if !works(cargo(Some("nightly")).args(["fuzz", "--version"])) {
        return Some("there is no cargo-fuzz (cargo install cargo-fuzz)");
    }
    if !works(Command::new("c++").arg("--version")) {
        return Some("there is no C++ compiler");
    }
    None
}

/// The names of all targets.
pub fn targets() -> Result<Vec<String>, String> {
    let sources = directory().join("fuzz_targets");
    let entries = fs::read_dir(&sources).map_err(|error| format!("{}: {error}", sources.display()))?;
    let mut names: Vec<String> =
        entries.flatten().filter_map(|entry| Some(entry.path().file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    Ok(names)
}

/// cargo, of another toolchain than this one's if that is named.
fn cargo(toolchain: Option<&str>) -> Command {
    let mut cargo = match toolchain {
        None => Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into())),
        Some(toolchain) => {
            let mut cargo = Command::new("rustup");
            cargo.args(["run", toolchain, "cargo"]);
            // Set by the cargo that runs us; the other one has its own.
            for name in ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN"] {
                cargo.env_remove(name);
            }
            cargo
        }
    };
    cargo.current_dir(directory().with_file_name(""));
    cargo
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("fuzz")
}

/// Building everything with instruments, on a busy machine.
const BUILD: Duration = Duration::from_secs(1800);
