//! `cargo xtask mutants`: changes the code that the guarantee rests on, one place at a time, and runs the unit tests on each.
//!
//! A mutant that no test notices survives. Each that does is killed by a new test, or is in `xtask/mutants.toml`, which has the reason
//! and keeps it from being tried again. What a mutant costs is the build of one test program, about 3.5 s of CPU time in the engine, and the tests up to
//! the first that fails: many minutes for a group. So this is not a part of `cargo xtask test`.
//!
//! A copy of the sources below `target/mutants` is what is changed. It stays, as does what is built there, so that one can go on working meanwhile, and the
//! next run builds only what is new. Tests run by `cargo xtask first-failure`.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use crate::first_failure::THEN;
use crate::step::{self, Steps};
use crate::test::root;
use crate::tool;

/// Runs all groups, or those that are named; `--list` prints their mutants only. What is behind `--` goes to cargo-mutants, such as `--shard 1/4`,
/// `--re 'pass|arrive'`, and `--iterate`, which leaves those out that the run before caught.
pub fn run(arguments: &[String]) -> Result<ExitCode, String> {
    let (own, others) = match arguments.iter().position(|argument| argument == "--") {
        Some(end) => (&arguments[..end], &arguments[end + 1..]),
        None => (arguments, &[][..]),
    };
    let list = own.iter().any(|argument| argument == "--list");
    let named: Vec<&str> = own.iter().map(String::as_str).filter(|&argument| argument != "--list").collect();
    let groups = chosen(&named)?;
    let place = root().join("target/mutants");
    let tree = place.join("tree");
    copy(&tree)?;
    let mut steps = Steps::default();
    let mut rows = Vec::new();
    for group in groups {
        let output = place.join(group.name);
        fs::create_dir_all(&output).map_err(|error| format!("{}: {error}", output.display()))?;
        let mut command = tool::cargo_with("cargo-mutants", VERSION)?;
        command.current_dir(&tree).env("CARGO_TARGET_DIR", place.join("build"));
        group.arguments(&mut command, &output, list, others)?;
        steps.run(group.name, || step::command(&mut command, LIMIT));
        rows.push(group.row(&output.join("mutants.out")));
    }
    if !list {
        println!("\n=== mutants\n{}\n\n=== summary\n{}", rows.join("\n"), steps.table());
    }
    Ok(if steps.all_passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Puts what git knows of the sources, and what it does not ignore, into `tree`, without touching the time of a file that is the same. One that is deleted
/// here stays there, where nothing names it.
fn copy(tree: &Path) -> Result<(), String> {
    let mut names = Command::new("git");
    names.current_dir(root()).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let known = names.output().map_err(|error| format!("git: {error}"))?;
    if !known.status.success() {
        return Err(format!("git: {}", String::from_utf8_lossy(&known.stderr).trim_end()));
    }
    for name in String::from_utf8_lossy(&known.stdout).split('\0').filter(|name| !name.is_empty()) {
        let to = tree.join(name);
        // One that is deleted and that git still knows.
        let Ok(mut content) = fs::read(root().join(name)) else { continue };
        if name == "multifd/Cargo.toml" {
            content = without_itself(&content);
        }
        if fs::read(&to).is_ok_and(|there| there == content) {
            continue;
        }
        let written = to.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&to, content));
        written.map_err(|error| format!("{}: {error}", to.display()))?;
    }
    Ok(())
}

/// The manifest of the engine without the dependency on itself, by which its tests in `tests/` have all features. For them the engine is built twice; its
/// unit tests do not need that.
fn without_itself(manifest: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(manifest);
    let lines = text.lines().filter(|line| !line.starts_with("multifd = { path = "));
    lines.flat_map(|line| [line, "\n"]).collect::<String>().into_bytes()
}

/// The groups of these names, all of them if there are none.
fn chosen(names: &[&str]) -> Result<Vec<&'static Group>, String> {
    let all: Vec<&str> = GROUPS.iter().map(|group| group.name).collect();
    if let Some(unknown) = names.iter().find(|name| !all.contains(name)) {
        let usage = "usage: cargo xtask mutants [--list] [GROUP…] [-- ARGUMENT OF CARGO-MUTANTS…]";
        return Err(format!("{unknown}: no such group; there are {}\n{usage}", all.join(", ")));
    }
    Ok(GROUPS.iter().filter(|group| names.is_empty() || names.contains(&group.name)).collect())
}

/// Files of one package whose mutants the same tests have to notice.
struct Group {
    name: &'static str,
    package: &'static str,
    files: &'static [&'static str],
    /// The unit tests that are run, by parts of their names, those behind `--then` if all before have passed; none: all of the package.
    tests: &'static [&'static str],
}

impl Group {
    fn arguments(&self, command: &mut Command, output: &Path, list: bool, others: &[String]) -> Result<(), String> {
        command.args(["mutants", "--in-place", "--package", self.package, "--no-shuffle", "--profile", "mutants"]);
        command.arg("--config").arg(root().join("xtask/mutants.toml"));
        command.arg("--output").arg(output).args(["--timeout", TEST_SECONDS, "--build-timeout", BUILD_SECONDS]);
        for file in self.files {
            command.args(["--file", file]);
        }
        if list {
            command.arg("--list");
        }
        command.args(others);
        // As arguments of cargo: what is behind `--` is not for the build, which would make all examples and tests in `tests/` as well.
        let this = std::env::current_exe().map_err(|error| format!("this program: {error}"))?;
        command.args(["--cargo-arg=--lib", &format!("--cargo-arg=--config={}", runner(&this))]);
        command.arg("--").arg("--").args(self.tests);
        Ok(())
    }

    /// What became of the mutants, by the lists that cargo-mutants leaves in `directory`.
    fn row(&self, directory: &Path) -> String {
        let count = |name: &str| {
            let list = fs::read_to_string(directory.join(format!("{name}.txt"))).unwrap_or_default();
            list.lines().count()
        };
        let [caught, without_end, survived, unviable] = ["caught", "timeout", "missed", "unviable"].map(count);
        let caught = caught + without_end;
        format!("{}: {caught} caught, {survived} survived, {unviable} do not compile", self.name)
    }
}

/// The configuration by which cargo runs tests with `program`.
fn runner(program: &Path) -> String {
    format!("target.'cfg(all())'.runner=['{}', 'first-failure']", program.display())
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
        tests: &["round::", THEN, "testing::migrations", "testing::faults::set_up", THEN, "testing::faults::late"],
    },
    Group {
        name: "channels",
        package: "multifd",
        files: &["multifd/src/source/channel.rs", "multifd/src/destination/channel.rs"],
        tests: &[
            "testing::migrations",
            "source::channel",
            THEN,
            "hostile_channels",
            "close_order",
            "main_alone",
            "state_packets",
            "hostile_state",
            "testing::spread",
            "testing::written",
            "faults::waiting_source",
            THEN,
            "faults::late",
            "faults::silence",
            "faults::source_gone",
            "testing::openings",
            "faults::strangers",
            "checkpoint::tests",
        ],
    },
    Group {
        name: "publish",
        package: "multifd",
        files: &["multifd/src/checkpoint/pending.rs", "multifd/src/checkpoint/directory.rs"],
        tests: &["checkpoint::pending", THEN, "checkpoint::tests"],
    },
];
/// For the tests of one mutant: far more than they take, so that a busy machine ends none that would pass. One that hangs is ended earlier, by
/// `first-failure`.
const TEST_SECONDS: &str = "1200";
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

    #[test]
    fn the_engine_is_built_without_itself_and_with_all_else() {
        let manifest = fs::read(root().join("multifd/Cargo.toml")).unwrap();
        let (before, after) = (manifest.len(), without_itself(&manifest));
        let text = String::from_utf8(after).unwrap();
        assert!(!text.contains("\nmultifd = ") && text.contains("\nmultifd-proto"));
        assert_eq!(
            before,
            text.len() + "multifd = { path = \".\", features = [\"conformance\", \"tls\", \"vm-memory\"] }\n".len()
        );
    }

    #[test]
    fn a_copy_has_what_is_new_and_keeps_the_time_of_the_rest() {
        let tree = test_support::TempDir::new().unwrap();
        copy(tree.path()).unwrap();
        let manifest = tree.join("Cargo.toml");
        let time = fs::metadata(&manifest).unwrap().modified().unwrap();
        // A mutant that was left.
        fs::write(tree.join("rustfmt.toml"), "changed").unwrap();
        copy(tree.path()).unwrap();
        assert_eq!(fs::metadata(&manifest).unwrap().modified().unwrap(), time);
        assert_eq!(fs::read(tree.join("rustfmt.toml")).unwrap(), fs::read(root().join("rustfmt.toml")).unwrap());
        assert!(!tree.join("target").exists());
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
