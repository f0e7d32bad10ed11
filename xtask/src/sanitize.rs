//! `cargo xtask sanitize`: the engine's tests under the address and the thread sanitizer.
//!
//! Needs a nightly compiler. The thread sanitizer has to see the standard library's locks, so that one is built with it
//! too, from its sources (`rust-src`); where they are missing it says so.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use crate::step::{self, Outcome, Steps};

/// Runs both, or the one that is named, with the rest of the arguments for the test program.
pub fn run(arguments: &[String]) -> Result<ExitCode, String> {
    const USAGE: &str = "usage: cargo xtask sanitize [address|thread] [-- TEST…]";
    let (names, rest) = match arguments.iter().position(|argument| argument == "--") {
        Some(at) => (&arguments[..at], &arguments[at + 1..]),
        None => (arguments, &[][..]),
    };
    let names: Vec<&str> = match names {
        [] => vec!["address", "thread"],
        [only] if only == "address" || only == "thread" => vec![only],
        _ => return Err(USAGE.to_owned()),
    };
    let mut steps = Steps::default();
    for name in names {
        steps.run(&format!("{name} sanitizer"), || sanitize(name, rest));
    }
    println!("\n=== summary\n{}", steps.table());
    Ok(if steps.all_passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn sanitize(name: &str, tests: &[String]) -> Outcome {
    let Some(sysroot) = nightly_sysroot() else {
        return Outcome::Skipped("there is no nightly compiler (rustup toolchain install nightly)".to_owned());
    };
    let mut test = Command::new("rustup");
    test.args(["run", "nightly", "cargo", "test", "--package", "multifd", "--lib", "--target", TARGET]);
    if name == "thread" {
        if !sysroot.join("lib/rustlib/src/rust/library/Cargo.lock").exists() {
            let reason = "the sources of the standard library are not here (rustup component add rust-src)";
            return Outcome::Skipped(reason.to_owned());
        }
        test.arg("-Zbuild-std");
    }
    test.arg("--target-dir").arg(root().join(format!("target/sanitize-{name}")));
    test.arg("--").args(tests);
    // Set by the cargo that runs us; the other one has its own.
    for variable in ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN"] {
        test.env_remove(variable);
    }
    // More memory than there is is refused, as it is without: a test asks for it.
    for variable in ["ASAN_OPTIONS", "TSAN_OPTIONS"] {
        test.env(variable, "allocator_may_return_null=1");
    }
    test.env("RUSTFLAGS", format!("-Zsanitizer={name}")).current_dir(root());
    step::command(&mut test, LIMIT)
}

/// Where the nightly compiler is.
fn nightly_sysroot() -> Option<PathBuf> {
    let mut ask = Command::new("rustup");
    ask.args(["run", "nightly", "rustc", "--print", "sysroot"]).env_remove("RUSTUP_TOOLCHAIN");
    let output = ask.output().ok().filter(|output| output.status.success())?;
    Some(PathBuf::from(String::from_utf8(output.stdout).ok()?.trim()))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("")
}

/// Sanitizers need the target to be named, so that build scripts are built without.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Building everything again, and running it at a fraction of its speed.
const LIMIT: Duration = Duration::from_secs(3600);
