//! `cargo xtask mutants`: changes the code that the guarantee rests on, one place at a time, and runs the unit tests on each.
//!
//! A mutant that no test notices survives. Each that does is killed by a new test, or is in `xtask/mutants.toml`, which has the reason
//! and keeps it from being tried again. The crate is built once for each mutant: minutes for a group of the protocol, an hour for
//! one of the engine. So this is not a part of `cargo xtask test`.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use crate::step::{self, Steps};
use crate::test::root;
use crate::tool;

/// Runs all groups, or those that are named; `--list` prints their mutants only.
pub fn run(arguments: &[String]) -> Result<ExitCode, String> {
    let list = arguments.iter().any(|argument| argument == "--list");
    let named: Vec<&str> = arguments.iter().map(String::as_str).filter(|&argument| argument != "--list").collect();
    let groups = chosen(&named)?;
    let mut steps = Steps::default();
    let mut rows = Vec::new();
    for group in groups {
        let output = root().join("target/mutants").join(group.name);
        fs::create_dir_all(&output).map_err(|error| format!("{}: {error}", output.display()))?;
        let mut command = tool::cargo_with("cargo-mutants", VERSION)?;
        group.arguments(&mut command, &output, list);
        steps.run(group.name, || step::command(&mut command, LIMIT));
        rows.push(group.row(&output.join("mutants.out")));
    }
    if !list {
        println!("\n=== mutants\n{}\n\n=== summary\n{}", rows.join("\n"), steps.table());
    }
    Ok(if steps.all_passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The groups of these names, all of them if there are none.
fn chosen(names: &[&str]) -> Result<Vec<&'static Group>, String> {
    let all: Vec<&str> = GROUPS.iter().map(|group| group.name).collect();
    if let Some(unknown) = names.iter().find(|name| !all.contains(name)) {
        let usage = "usage: cargo xtask mutants [--list] [GROUP…]";
        return Err(format!("{unknown}: no such group; there are {}\n{usage}", all.join(", ")));
    }
    Ok(GROUPS.iter().filter(|group| names.is_empty() || names.contains(&group.name)).collect())
}

/// Files of one package whose mutants the same tests have to notice.
struct Group {
    name: &'static str,
    package: &'static str,
    files: &'static [&'static str],
    /// The unit tests that are run, by parts of their names; none: all of the package.
    tests: &'static [&'static str],
}

impl Group {
    fn arguments(&self, command: &mut Command, output: &Path, list: bool) {
        command.args([
            "mutants",
            "--config",
            "xtask/mutants.toml",
            "--package",
            self.package,
            "--no-shuffle",
            "--jobs",
            "1",
        ]);
        command.arg("--output").arg(output).args(["--timeout", TEST_SECONDS, "--build-timeout", BUILD_SECONDS]);
        for file in self.files {
            command.args(["--file", file]);
        }
        if list {
            command.arg("--list");
        }
        command.args(["--", "--lib"]);
        if !self.tests.is_empty() {
            command.arg("--").args(self.tests);
        }
        // What is run is short, and each mutant is built anew.
        command.env("CARGO_PROFILE_DEV_OPT_LEVEL", "0").env("CARGO_PROFILE_DEV_DEBUG", "none");
    }

    /// What became of the mutants, by the lists that cargo-mutants leaves in `directory`.
    fn row(&self, directory: &Path) -> String {
        let count = |name: &str| {
            let list = fs::read_to_string(directory.join(format!("{name}.txt"))).unwrap_or_default();
            list.lines().count()
        };
        let [caught, without_end, survived, unviable] = ["caught", "timeout", "missed", "unviable"].map(count);
        format!(
            "{}: {caught} caught, {without_end} without end, {survived} survived, {unviable} do not compile",
            self.name
        )
    }
}

/// The one with which the survivors in `mutants.toml` were found.
const VERSION: &str = "27.1.0";
/// The engine has hundreds of unit tests beside those of a file; where a file's own do not suffice, its group names more.
const GROUPS: &[Group] = &[
    Group {
        name: "rounds",
        package: "multifd-proto",
        files: &["multifd-proto/src/rounds.rs", "multifd-proto/src/membership.rs"],
        tests: &[],
    },
    Group {
        name: "convergence",
        package: "multifd",
        files: &["multifd/src/source/convergence.rs"],
        tests: &["source::convergence"],
    },
    Group { name: "mapped-ram", package: "multifd-proto", files: &["multifd-proto/src/mapped_ram.rs"], tests: &[] },
    Group {
        name: "claims",
        package: "multifd",
        files: &["multifd/src/postcopy/claims.rs", "multifd/src/round/discarded.rs"],
        tests: &["postcopy::claims", "round::discarded"],
    },
    Group {
        name: "dirty-bitmap",
        package: "multifd",
        files: &["multifd/src/memory/dirty_bitmap.rs"],
        tests: &["memory::dirty_bitmap"],
    },
    Group { name: "limiter", package: "multifd", files: &["multifd/src/limiter.rs"], tests: &["limiter"] },
    Group {
        name: "barrier",
        package: "multifd",
        files: &["multifd/src/round/barrier.rs", "multifd/src/round/scan.rs"],
        tests: &["round::", "testing::migrations", "faults::late"],
    },
    Group {
        name: "channels",
        package: "multifd",
        files: &["multifd/src/source/channel.rs", "multifd/src/destination/channel.rs"],
        tests: &["channel", "testing::migrations", "faults::hostile", "faults::late", "transports"],
    },
    Group {
        name: "publish",
        package: "multifd",
        files: &["multifd/src/checkpoint/pending.rs", "multifd/src/checkpoint/directory.rs"],
        tests: &["checkpoint"],
    },
];
/// For the tests of one mutant: many times what they take, so that a busy machine ends none that would pass.
const TEST_SECONDS: &str = "120";
/// For building one mutant.
const BUILD_SECONDS: &str = "600";
/// For all mutants of a group.
const LIMIT: Duration = Duration::from_secs(6 * 3600);

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_group_has_files_that_are_there_and_its_own_name() {
        let names: BTreeSet<&str> = GROUPS.iter().map(|group| group.name).collect();
        assert_eq!(names.len(), GROUPS.len());
        for group in GROUPS {
            assert!(!group.files.is_empty());
            for file in group.files {
                assert!(root().join(file).exists() && file.starts_with(&format!("{}/src/", group.package)), "{file}");
            }
        }
    }

    #[test]
    fn an_unknown_group_is_refused_with_the_names_of_those_there_are() {
        assert!(chosen(&["claims", "nonsense"]).err().unwrap().contains("nonsense: no such group; there are rounds"));
        assert_eq!(chosen(&["claims"]).unwrap().len(), 1);
        assert_eq!(chosen(&[]).unwrap().len(), GROUPS.len());
    }

    /// Each exclusion is a pattern with a comment of its own, so that none is without its reason.
    #[test]
    fn each_explained_survivor_has_its_reason() {
        let text = fs::read_to_string(root().join("xtask/mutants.toml")).unwrap();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for pair in lines.windows(2).filter(|pair| pair[1].starts_with(['\'', '"'])) {
            assert!(pair[0].starts_with("# "), "{}: no reason", pair[1]);
        }
    }
}
