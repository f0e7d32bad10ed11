//! `cargo xtask test`: every check that a change has to pass, in one command on a fresh machine.
//!
//! Continuous integration runs exactly this. Its last line is `N passed, N failed, N skipped` over all tests; above it
//! are the tables that tests reported, the reasons of skipped tests, and one line per step.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, SystemTime};
use std::{env, fs};

use test_support::{REPORTS, SKIPPED_FILE, TempDir, in_ci};

use crate::dist;
use crate::proof;
use crate::step::{self, Outcome, Steps};
use crate::totals::Totals;

/// Runs all steps.
pub fn run(arguments: &[String]) -> Result<ExitCode, String> {
    let quick = match arguments {
        [] => false,
        [only] if only == "--quick" => true,
        _ => return Err("usage: cargo xtask test [--quick]".to_owned()),
    };
    let notes = TempDir::new().map_err(|error| format!("a temporary directory: {error}"))?;
    let skipped = notes.join("skipped");
    let reports = notes.join("reports");
    fs::create_dir(&reports).map_err(|error| format!("{}: {error}", reports.display()))?;

    let mut steps = Steps::default();
    let mut totals = Totals::default();
    steps.run("format", || step::command(cargo().args(["fmt", "--all", "--check"]), SHORT));
    steps.run("clippy", || {
        let arguments = ["clippy", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"];
        step::command(cargo().args(arguments), LONG)
    });
    steps.run("documentation", || {
        let mut doc = cargo();
        // Private items too: module docs link to private neighbours, and those links have to lead somewhere.
        doc.args(["doc", "--workspace", "--all-features", "--no-deps", "--document-private-items"]);
        // In the public pages such a link is plain text, which is right there.
        doc.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links");
        step::command(&mut doc, LONG)
    });
    steps.run("tests", || {
        let mut test = cargo();
        test.args(["test", "--workspace", "--all-features", "--no-fail-fast"]);
        test.env(SKIPPED_FILE, &skipped).env(REPORTS, &reports);
        if quick {
            test.env("MULTIFD_WITHOUT_QEMU", "1");
        }
        let outcome = step::command_with_lines(&mut test, TESTS, |line| totals.observe(line));
        totals.end(outcome == Outcome::Passed);
        outcome
    });
    // What the schedulers run are tests, too, in builds of their own.
    proof::check_quick(&mut steps, &reports, &mut |line| totals.observe(line));
    totals.end(true);
    steps.run("protocol text", check_protocol_text);
    if !quick {
        steps.run("packages", package);
        steps.run("static binary", dist::check);
    }

    let reasons = fs::read_to_string(&skipped).unwrap_or_default();
    totals.skip(reasons.lines().count());
    print_reports(&reports);
    if !reasons.is_empty() {
        println!("\n=== skipped tests\n{}", reasons.trim_end());
    }
    let failures = totals.failures();
    if !failures.is_empty() {
        println!("\n=== failed tests\n{failures}");
    }
    println!("\n=== summary\n{}\n{totals}", steps.table());
    let passed = steps.all_passed() && totals.all_passed();
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print_reports(directory: &Path) {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let mut rows: Vec<&str> = text.lines().collect();
        rows.sort_unstable();
        if path.ends_with("proof") {
            println!("\n=== proof\n{}", proof::table(directory));
            continue;
        }
        println!("\n=== {}\n{}", path.file_name().unwrap_or_default().to_string_lossy(), rows.join("\n"));
    }
}

/// The protocol description is written for another project's manual, so it must be flawless reStructuredText.
fn check_protocol_text() -> Outcome {
    let file = root().join("docs/migration/multifd.rst");
    if !file.exists() {
        return Outcome::Skipped("docs/migration/multifd.rst is not there".to_owned());
    }
    match docutils() {
        // Warnings count: docutils reports unknown roles and broken links as such.
        Ok(python) => step::command(
            Command::new(python)
                .args(["-m", "docutils", "--writer=null", "--report=info", "--halt=warning", "--syntax-highlight=none"])
                .arg(&file),
            SHORT,
        ),
        Err(reason) if in_ci() => Outcome::Failed(reason),
        Err(reason) => Outcome::Skipped(reason),
    }
}

/// A Python that has docutils.
fn docutils() -> Result<PathBuf, String> {
    python_with("docutils.__main__", "docutils")
}

/// A Python that has `module`: the system's own, or one in a virtual environment below the build directory, into which `package`
/// is installed from PyPI.
pub fn python_with(module: &str, package: &str) -> Result<PathBuf, String> {
    let has_module = |python: &Path| {
        let mut probe = Command::new(python);
        probe
            .args(["-c", &format!("import {module}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        probe.status().is_ok_and(|status| status.success())
    };
    let directory = root().join("target").join(package);
    let ours = directory.join("bin/python3");
    for python in [PathBuf::from("python3"), ours.clone()] {
        if has_module(&python) {
            return Ok(python);
        }
    }
    let steps = [
        step::command(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&directory), SHORT),
        step::command(Command::new(&ours).args(["-m", "pip", "install", "--quiet", package]), SHORT),
    ];
    for outcome in steps {
        if let Outcome::Failed(reason) = outcome {
            return Err(format!("{package} cannot be installed: {reason}"));
        }
    }
    if has_module(&ours) { Ok(ours) } else { Err(format!("{package} was installed and does not run")) }
}

/// Packs the public crates, builds them from their packages alone, and does all that publishing them does but the upload.
fn package() -> Outcome {
    let mut package = cargo();
    match publishes_several() {
        true => package.args(["publish", "--dry-run"]),
        false => package.arg("package"),
    };
    for name in PUBLIC {
        package.args(["--package", name]);
    }
    let status = Command::new("git").current_dir(root()).args(["status", "--porcelain"]).output();
    if status.is_ok_and(|output| !output.stdout.is_empty()) {
        println!("the working tree has changes, they are packed as they are");
        package.arg("--allow-dirty");
    }
    // cargo unpacks packages once per version and build directory: in one that was used before, a changed crate of the
    // same version would be built against the packages of that time.
    let age = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let directory = root().join(format!("target/package-{}", age.as_nanos()));
    package.arg("--target-dir").arg(&directory);
    let outcome = step::command(&mut package, LONG);
    let _ = fs::remove_dir_all(&directory);
    outcome
}

/// Whether this cargo publishes several packages that need each other, as 1.90 and later ones do.
fn publishes_several() -> bool {
    let version = cargo().arg("--version").output().map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    // "cargo 1.95.0 (f2d3ce0bd 2026-03-21)"
    let version = version.unwrap_or_default();
    let mut numbers = version.split_whitespace().nth(1).unwrap_or_default().split('.').map(str::parse::<u32>);
    matches!((numbers.next(), numbers.next()), (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (1, 90))
}

/// The cargo that runs this, in the workspace.
pub fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// The workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("")
}

/// Crates that are published, each after those it depends on.
const PUBLIC: &[&str] = &["multifd-proto", "multifd"];

const SHORT: Duration = Duration::from_secs(300);
const LONG: Duration = Duration::from_secs(1800);
/// Building and running all tests; the slowest machine this was meant for has two cores.
const TESTS: Duration = Duration::from_secs(3600);
