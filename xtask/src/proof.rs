//! `cargo xtask proof`: the checks of the round guarantee, each on the code that ships, and one table of what they saw.
//!
//! `--quick` is the part that fits into every test run; without it the same checks go further. Layers can be named, to run
//! only these. Each check writes its own rows
//! by `test_support::report`, so a number in the table was counted by the check that it is about.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;
use std::{env, fs};

use test_support::{REPORTS, TempDir, in_ci};

use crate::fuzz;
use crate::step::{self, Outcome, Steps};
use crate::test::{cargo, python_with, root};

/// Runs all checks.
pub fn run(arguments: &[String]) -> Result<ExitCode, String> {
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let named: Vec<&str> = arguments.iter().map(String::as_str).filter(|&argument| argument != "--quick").collect();
    let possible = if quick { QUICK_LAYERS } else { LAYERS };
    if let Some(unknown) = named.iter().find(|name| !possible.contains(name)) {
        return Err(format!(
            "{unknown}: no such layer; there are {}\nusage: cargo xtask proof [--quick] [LAYER…]",
            possible.join(", ")
        ));
    }
    let layers = if named.is_empty() { possible } else { &named };
    let reports = TempDir::new().map_err(|error| format!("a temporary directory: {error}"))?;
    let mut steps = Steps::default();
    let effort = if quick { QUICK } else { FULL };
    check_layers(&mut steps, reports.path(), layers, &effort, &mut |_| ());
    println!("\n{}\n{}", table(reports.path()), steps.table());
    Ok(if steps.all_passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the part that fits into every test run, as `steps`; its rows go below `reports`, and `observe` sees each line that
/// is printed. The other layers are among the tests of the crates, or take longer than a test run may.
pub fn check_quick(steps: &mut Steps, reports: &Path, observe: &mut dyn FnMut(&str)) {
    check_layers(steps, reports, QUICK_LAYERS, &QUICK, observe);
}

fn check_layers(steps: &mut Steps, reports: &Path, layers: &[&str], effort: &Effort, observe: &mut dyn FnMut(&str)) {
    let mut run = |command: &mut Command| {
        step::command_with_lines(command.env(REPORTS, reports), effort.limit, |line| observe(line))
    };
    for &layer in layers {
        if layer == FUZZ {
            let rows = fuzz::check(steps, &fuzz::targets().unwrap_or_default(), FUZZ_SECONDS);
            let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
            // Without it only the table is the poorer.
            let _ = fs::write(reports.join(FUZZ), text);
            continue;
        }
        if layer == ANY_N {
            steps.run(layer, || any_n(&mut run));
            continue;
        }
        steps.run(layer, || {
            for mut command in commands(layer, effort) {
                let outcome = run(&mut command);
                if outcome != Outcome::Passed {
                    return outcome;
                }
            }
            Outcome::Passed
        });
    }
}

/// Proves the laws for any number of channels, with Z3 from PyPI.
fn any_n(run: &mut dyn FnMut(&mut Command) -> Outcome) -> Outcome {
    match python_with("z3", "z3-solver") {
        Ok(python) => run(Command::new(python).arg(root().join("proof"))),
        Err(reason) if in_ci() => Outcome::Failed(reason),
        Err(reason) => Outcome::Skipped(reason),
    }
}

/// What runs `layer`.
fn commands(layer: &str, effort: &Effort) -> Vec<Command> {
    let test = |arguments: &[&str]| {
        let mut test = cargo();
        test.arg("test").args(arguments);
        test
    };
    match layer {
        "model" => {
            let mut model = cargo();
            model.args(["run", "--release", "--package", "multifd-model"]).args(effort.model);
            vec![model]
        }
        "loom" => vec![under("loom")],
        "shuttle" => {
            let mut shuttle = under("shuttle");
            shuttle.env("MULTIFD_SCHEDULES", effort.schedules);
            vec![shuttle]
        }
        "audit" => vec![
            test(&["--package", "multifd", "--all-features", "--lib", "audit"]),
            test(&["--package", "multifd-guest", "--test", "overtaking"]),
        ],
        "faults" => vec![test(&["--package", "multifd", "--all-features", "--lib", "faults"])],
        "kills" => {
            let mut kills = test(&["--package", "multifd-cli", "--test", "kills"]);
            kills.env("MULTIFD_KILLS", "300");
            vec![kills]
        }
        _ => unreachable!("layers are checked by their names"),
    }
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
    // Every module with such tests has the scheduler's name.
    test.args(["test", "--package", "multifd", "--lib", scheduler]);
    test
}

/// How far the layers go.
struct Effort {
    /// Arguments of the model.
    model: &'static [&'static str],
    /// Schedules, as a multiple of what each test of shuttle's tries by itself.
    schedules: &'static str,
    /// For one command, its build included.
    limit: Duration,
}

const QUICK: Effort = Effort { model: &["--", "--quick"], schedules: "0.3", limit: Duration::from_secs(900) };
const FULL: Effort = Effort { model: &[], schedules: "10", limit: Duration::from_secs(7200) };
const QUICK_LAYERS: &[&str] = &[ANY_N, "model", "loom", "shuttle"];
const LAYERS: &[&str] = &[ANY_N, "model", "loom", "shuttle", "audit", "faults", "kills", FUZZ];
/// The layer of the proofs in `proof/`.
const ANY_N: &str = "any-n";
/// The layer of the fuzzers, and the file with their rows.
const FUZZ: &str = "fuzz";
/// For each target.
const FUZZ_SECONDS: u64 = 30;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layer_has_its_command() {
        for &layer in LAYERS.iter().filter(|&&layer| layer != FUZZ && layer != ANY_N) {
            assert!(!commands(layer, &FULL).is_empty(), "{layer}");
        }
        assert!(QUICK_LAYERS.iter().all(|layer| LAYERS.contains(layer)));
        assert!(run(&["no-such-layer".to_owned()]).unwrap_err().contains("any-n, model, loom"));
    }

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
