//! `cargo xtask first-failure PROGRAM NAME… [--then NAME…]`: runs the tests of a test program, and ends it with the first that fails.
//!
//! The runner of `cargo xtask mutants`. Names are those of libtest: parts of names of tests, none for all. Behind `--then` are those that run only if
//! all before have passed, so that what is quick and tells most runs alone for most mutants.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::step;

/// The verb. Ends with the status of libtest where a test failed.
pub fn run(arguments: &[String]) -> Result<ExitCode, String> {
    let usage = || "usage: cargo xtask first-failure PROGRAM NAME… [--then NAME…]".to_owned();
    let (program, names) = arguments.split_first().ok_or_else(usage)?;
    for (index, names) in names.split(|name| name == THEN).enumerate() {
        let silence = if index == 0 { SILENCE } else { LONG_SILENCE };
        if let Err(reason) = one(Command::new(program).args(names), silence) {
            println!("{reason}");
            return Ok(ExitCode::from(FAILED));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs one test program until a test fails, or none passes for `silence`.
fn one(command: &mut Command, silence: Duration) -> Result<(), String> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(|error| error.to_string())?;
    let output = child.stdout.take().expect("stdout is piped");
    let (lines, received) = mpsc::channel::<String>();
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if lines.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
        }
    });
    let mut deadline = Instant::now() + silence;
    loop {
        match received.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                println!("{line}");
                match verdict(&line) {
                    Some(true) => deadline = Instant::now() + silence,
                    Some(false) => {
                        step::end(&mut child);
                        return Err(format!("ended at the first failure: {line}"));
                    }
                    None => {}
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                step::end(&mut child);
                return Err(format!("ended, since no test did for {silence:?}"));
            }
            Err(RecvTimeoutError::Disconnected) => {
                let status = child.wait().map_err(|error| error.to_string())?;
                return if status.success() { Ok(()) } else { Err(status.to_string()) };
            }
        }
    }
}

/// Whether the test that `line` is about has passed, where it is about one that has ended.
fn verdict(line: &str) -> Option<bool> {
    let (_, end) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    match end.trim_end() {
        "ok" => Some(true),
        "FAILED" => Some(false),
        _ => None,
    }
}

/// Between the names that run first and those that run after them.
pub const THEN: &str = "--then";
/// How long the names that run first may go on without a test that ends: many times what any of them takes.
const SILENCE: Duration = Duration::from_secs(20);
/// The same for those that run after them.
const LONG_SILENCE: Duration = Duration::from_secs(120);
/// What libtest ends with where a test failed.
const FAILED: u8 = 101;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::tests::{LONG, shell};

    #[test]
    fn a_program_is_ended_at_the_first_test_that_fails() {
        let script = "echo 'test a ... ok'; echo 'test b ... FAILED'; sleep 1000";
        assert!(one(&mut shell(script), LONG).unwrap_err().ends_with("test b ... FAILED"));
    }

    #[test]
    fn a_program_in_which_no_test_ends_is_ended() {
        let script = "echo 'test a has been running for over 60 seconds'; sleep 1000";
        assert!(one(&mut shell(script), Duration::from_millis(50)).unwrap_err().contains("no test did"));
    }

    #[test]
    fn a_program_passes_by_its_status() {
        assert_eq!(one(&mut shell("echo 'test a ... ok'"), LONG), Ok(()));
        assert!(one(&mut shell("echo 'test a ... ok'; exit 3"), LONG).is_err());
    }

    #[test]
    fn what_runs_after_the_first_runs_only_if_they_passed() {
        // `test` is a program with a status, and `=` compares.
        let run = |words: &[&str]| run(&words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>()).unwrap();
        let passed = format!("{:?}", ExitCode::SUCCESS);
        assert_eq!(format!("{:?}", run(&["test", "a", "=", "a", THEN, "b", "=", "b"])), passed);
        assert_ne!(format!("{:?}", run(&["test", "a", "=", "a", THEN, "b", "=", "c"])), passed);
        assert_ne!(format!("{:?}", run(&["test", "a", "=", "b", THEN, "b", "=", "b"])), passed);
    }
}
