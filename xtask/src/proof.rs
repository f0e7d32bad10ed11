//! `cargo xtask proof`: the checks of the round guarantee, each on the code that ships, and one table of what they saw.
//!
//! `--quick` is the part that fits into every test run; without it the same checks go further. Each check writes its own rows
//! by `test_support::report`, so a number in the table was counted by the check that it is about.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;
use std::{env, fs};

use test_support::{REPORTS, TempDir};

use crate::fuzz;
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
    steps.run("audit", || {
        let outcome = run(cargo().args(["test", "--package", "multifd", "--all-features", "--lib", "audit"]));
        if outcome != Outcome::Passed {
            return outcome;
        }
        run(cargo().args(["test", "--package", "multifd-guest", "--test", "overtaking"]))
    });
    steps.run("faults", || run(cargo().args(["test", "--package", "multifd", "--all-features", "--lib", "faults"])));
    steps.run("kills", || {
        let mut kills = cargo();
        kills.env("MULTIFD_KILLS", "300").args(["test", "--package", "multifd-cli", "--test", "kills"]);
        run(&mut kills)
    });
    let rows = fuzz::check(steps, &fuzz::targets().unwrap_or_default(), FUZZ_SECONDS);
    let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
    // Without it only the table is the poorer.
    let _ = fs::write(reports.join(FUZZ), text);
}

/// The rows of the table that are below `reports`.
pub fn table(reports: &Path) -> String {
    let read = |name: &str| fs::read_to_string(reports.join(name)).unwrap_or_default();
    let text = read("proof");
    let mut rows: Vec<Vec<&str>> = text.lines().map(|line| line.split(" | ").collect()).collect();
    // Other checks tell what they did in a sentence behind the name of the case.
    let others = ["faults", "hostile bytes", FUZZ].map(|layer| (layer, read(layer)));
    for (layer, text) in &others {
        rows.extend(text.lines().map(|line| {
            let (case, rest) = line.split_once(": ").unwrap_or((line, ""));
            vec![*layer, case, rest.split_once(';').map_or(rest, |(first, _)| first)]
        }));
    }
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

/// The file with the rows of the fuzzers.
const FUZZ: &str = "fuzz";
/// For each target.
const FUZZ_SECONDS: u64 = 60;
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
        fs::write(reports.join("faults"), "at random: faults 7, guests lost 0; at the source 3\n").unwrap();
        let table = table(reports.path());
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 5);
        assert!(lines[0].starts_with("| layer "));
        assert!(lines[2].starts_with("| faults  | at random ") && lines[2].contains("| faults 7, guests lost 0 "));
        assert!(lines[3].starts_with("| loom    | a "));
        assert!(lines.iter().all(|line| line.chars().count() == lines[0].chars().count()));
    }
}
