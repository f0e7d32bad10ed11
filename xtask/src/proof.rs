//! `cargo xtask proof`: the checks of the round guarantee, each on the code that ships, and one table of what they saw.
//!
//! `--quick` is the part that fits into every test run; without it the same checks go further. Each check writes its own rows
//! by `test_support::report`, so a number in the table was counted by the check that it is about.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;
use std::{env, fs};

use test_support::{REPORTS, TempDir};

use crate::step::{self, Outcome, Steps};
use crate::test::{cargo, root};

/// Runs all checks.
pub fn run(arguments: &[String]) -> Result<ExitCode, String> {
    let quick = match arguments {
        [] => false,
        [only] if only == "--quick" => true,
        _ => return Err("usage: cargo xtask proof [--quick]".to_owned()),
    };
    let reports = TempDir::new().map_err(|error| format!("a temporary directory: {error}"))?;
    let mut steps = Steps::default();
    check(&mut steps, reports.path(), quick, &mut |_| ());
    println!("\n{}\n{}", table(reports.path()), steps.table());
    Ok(if steps.all_passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the checks as `steps`; their rows go below `reports`, and `observe` sees each line that they print.
pub fn check(steps: &mut Steps, reports: &Path, quick: bool, observe: &mut dyn FnMut(&str)) {
    let limit = if quick { QUICK } else { FULL };
    let mut run =
        |command: &mut Command| step::command_with_lines(command.env(REPORTS, reports), limit, |line| observe(line));
    steps.run("model", || {
        let mut model = cargo();
        model.args(["run", "--release", "--package", "multifd-model"]);
        run(model.args(quick.then_some("--").into_iter().chain(quick.then_some("--quick"))))
    });
    steps.run("loom", || run(&mut under("loom")));
    steps.run("shuttle", || {
        let mut shuttle = under("shuttle");
        shuttle.env("MULTIFD_SCHEDULES", if quick { "0.3" } else { "30" });
        run(&mut shuttle)
    });
    if quick {
        // The rest is among the tests of the crates, or takes longer than a test run may.
        return;
    }
    steps.run("audit", || run(cargo().args(["test", "--package", "multifd", "--all-features", "--lib", "audit"])));
    steps.run("faults", || {
        if !root().join("multifd/tests/faults.rs").exists() {
            return Outcome::Skipped("multifd/tests/faults.rs is not there".to_owned());
        }
        run(cargo().args(["test", "--package", "multifd", "--all-features", "--test", "faults"]))
    });
    steps.run("fuzz", || fuzz(reports));
}

/// The rows of the table that are below `reports`.
pub fn table(reports: &Path) -> String {
    let text = fs::read_to_string(reports.join("proof")).unwrap_or_default();
    let mut rows: Vec<Vec<&str>> = text.lines().map(|line| line.split(" | ").collect()).collect();
    rows.sort();
    rows.insert(0, vec!["layer", "what, and how large", "explored", "broken variants caught", "time"]);
    let columns = rows[0].len();
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut table = String::new();
    for (index, row) in rows.iter().enumerate() {
        let cells: Vec<String> = widths
            .iter()
            .enumerate()
            .map(|(column, &width)| format!("{:<width$}", row.get(column).copied().unwrap_or_default()))
            .collect();
        table.push_str(&format!("| {} |\n", cells.join(" | ")));
        if index == 0 {
            let lines: Vec<String> = widths.iter().map(|&width| "-".repeat(width)).collect();
            table.push_str(&format!("| {} |\n", lines.join(" | ")));
        }
    }
    table
}

/// The engine's tests under a scheduler, which replaces its locks, atomics and threads: another build of everything.
fn under(scheduler: &str) -> Command {
    let mut test = cargo();
    let flags = format!("{} --cfg {scheduler}", env::var("RUSTFLAGS").unwrap_or_default());
    test.env("RUSTFLAGS", flags.trim()).env("CARGO_TARGET_DIR", root().join("target").join(scheduler));
    test.args(["test", "--package", "multifd", "--lib", &format!("{scheduler}_tests")]);
    test
}

/// Each fuzz target for a short time, where fuzzing is installed.
fn fuzz(reports: &Path) -> Outcome {
    let directory = root().join("fuzz");
    if !directory.exists() {
        return Outcome::Skipped("fuzz is not there".to_owned());
    }
    let listed = Command::new("cargo").current_dir(root()).args(["+nightly", "fuzz", "list"]).output();
    let targets = match listed {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        _ => return Outcome::Skipped("needs a nightly toolchain and cargo-fuzz".to_owned()),
    };
    for target in targets.split_whitespace() {
        let mut fuzz = Command::new("cargo");
        fuzz.current_dir(root()).args(["+nightly", "fuzz", "run", target, "--", "-max_total_time=60"]);
        let mut executions = String::new();
        let outcome = step::command_with_lines(&mut fuzz, FULL, |line| {
            if let Some(rest) = line.strip_prefix("Done ") {
                executions = rest.split_whitespace().next().unwrap_or_default().to_owned();
            }
        });
        if outcome != Outcome::Passed {
            return outcome;
        }
        let row = format!("fuzz | {target} | {executions} executions | - | 60 s\n");
        let path = reports.join("proof");
        let mut text = fs::read_to_string(&path).unwrap_or_default();
        text.push_str(&row);
        if let Err(error) = fs::write(&path, text) {
            return Outcome::Failed(format!("{}: {error}", path.display()));
        }
    }
    Outcome::Passed
}

/// For one check, its build included.
const QUICK: Duration = Duration::from_secs(900);
const FULL: Duration = Duration::from_secs(7200);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_all_checks_become_one_table() {
        let reports = TempDir::new().unwrap();
        fs::write(reports.join("proof"), "shuttle | b | 7 schedules | caught | 1 s\nloom | a | 12 | - | 2 s\n")
            .unwrap();
        let table = table(reports.path());
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[0].starts_with("| layer "));
        assert!(lines[2].starts_with("| loom    | a "));
        assert!(lines.iter().all(|line| line.chars().count() == lines[0].chars().count()));
    }
}
