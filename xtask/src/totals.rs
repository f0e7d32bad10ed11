//! Adds up what Rust's test programs say about themselves.
//!
//! A program that is aborted (a test over its time limit, a segmentation fault) never prints its result, so its tests
//! that have not reported `ok` count as failed: a crash must not look like fewer tests.

use std::fmt;

/// Tests passed, failed and skipped, of any number of test programs.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Totals {
    passed: usize,
    failed: usize,
    ignored: usize,
    /// Tests that called `test_support::skip`. Their test programs count them as passed.
    skipped: usize,
    running: Option<Running>,
    /// What each failed test said, under its name.
    failures: Vec<Vec<String>>,
    in_failure: bool,
}

/// Lines kept of what a failed test said: its message, and where it was.
const FAILURE_LINES: usize = 12;

/// The program whose result has not come yet.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Running {
    tests: usize,
    ok: usize,
    ignored: usize,
    /// The last test that was told of.
    last: String,
}

impl Totals {
    /// Takes one line of a test program's output.
    pub fn observe(&mut self, line: &str) {
        self.observe_failure(line);
        if let Some(tests) = announced(line) {
            self.crashed();
            self.running = Some(Running { tests, ..Running::default() });
        } else if let Some(result) = line.strip_prefix("test result: ") {
            self.running = None;
            self.passed += count(result, "passed");
            self.failed += count(result, "failed");
            self.ignored += count(result, "ignored");
        } else if let Some(running) = &mut self.running
            && line.starts_with("test ")
        {
            running.ok += usize::from(line.ends_with("... ok"));
            running.ignored += usize::from(line.contains("... ignored"));
            line.clone_into(&mut running.last);
        }
    }

    /// Keeps the first lines of what a test program prints of each test that failed.
    fn observe_failure(&mut self, line: &str) {
        if line.starts_with("---- ") && line.ends_with(" stdout ----") {
            self.in_failure = true;
            self.failures.push(Vec::new());
        } else if line == "failures:" || line.starts_with("test result: ") {
            self.in_failure = false;
        }
        if self.in_failure
            && let Some(failure) = self.failures.last_mut()
            && failure.len() < FAILURE_LINES
        {
            failure.push(line.to_owned());
        }
    }

    /// What failed tests said, for the end of a long output.
    pub fn failures(&self) -> String {
        self.failures.concat().join("\n")
    }

    /// Declares that no more lines come; `succeeded` is what the command said that ran the programs.
    pub fn end(&mut self, succeeded: bool) {
        self.crashed();
        if !succeeded && self.failed == 0 {
            // It did not build, or something else went wrong that no test program told.
            self.failed = 1;
        }
    }

    /// Counts `tests` that passed as skipped instead.
    pub fn skip(&mut self, tests: usize) {
        self.skipped += tests;
    }

    /// No test failed.
    pub fn all_passed(&self) -> bool {
        self.failed == 0
    }

    fn crashed(&mut self) {
        if let Some(running) = self.running.take() {
            self.passed += running.ok;
            self.ignored += running.ignored;
            self.failed += running.tests.saturating_sub(running.ok + running.ignored);
            self.failures.push(vec![format!("---- a test program ended in the middle, after: {}", running.last)]);
        }
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let passed = self.passed.saturating_sub(self.skipped);
        write!(f, "{passed} passed, {} failed, {} skipped", self.failed, self.ignored + self.skipped)
    }
}

/// The number in `running 7 tests`.
fn announced(line: &str) -> Option<usize> {
    let (number, rest) = line.strip_prefix("running ")?.split_once(' ')?;
    if matches!(rest, "test" | "tests") { number.parse().ok() } else { None }
}

/// The number before `word` in `ok. 6 passed; 0 failed; 1 ignored; …`.
fn count(result: &str, word: &str) -> usize {
    let part = result.split([';', '.']).find_map(|part| part.trim().strip_suffix(word));
    part.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(output: &str, succeeded: bool, skipped: usize) -> String {
        let mut totals = Totals::default();
        output.lines().for_each(|line| totals.observe(line));
        totals.end(succeeded);
        totals.skip(skipped);
        totals.to_string()
    }

    #[test]
    fn results_of_several_programs_add_up() {
        let output = "running 3 tests\ntest a ... ok\n\
                      test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.09s\n\
                      running 2 tests\n\
                      test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 4 filtered out; finished in 1.5s\n";
        assert_eq!(totals(output, false, 0), "3 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn a_test_that_skipped_itself_is_not_passed() {
        let output = "test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(totals(output, true, 2), "3 passed, 0 failed, 2 skipped");
    }

    #[test]
    fn tests_of_a_crashed_program_count_as_failed_unless_they_were_ok() {
        let output = "running 4 tests\ntest a ... ok\ntest b ... ignored, why\n\
                      running 1 test\n\
                      test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(totals(output, false, 0), "2 passed, 2 failed, 1 skipped");
        assert_eq!(totals("running 1 test\n", false, 0), "0 passed, 1 failed, 0 skipped");
    }

    #[test]
    fn what_failed_tests_said_is_kept() {
        let mut totals = Totals::default();
        let output = "running 2 tests\ntest a ... FAILED\ntest b ... ok\n\nfailures:\n\n---- a stdout ----\n\n\
                      thread 'a' panicked at a.rs:1:2:\nwrong\n\n\nfailures:\n    a\n\n\
                      test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 4 filtered out\n\
                      running 2 tests\ntest c ... ok\n";
        output.lines().for_each(|line| totals.observe(line));
        totals.end(false);
        let failures = totals.failures();
        assert!(failures.starts_with("---- a stdout ----\n\nthread 'a' panicked at a.rs:1:2:\nwrong\n"), "{failures}");
        assert!(failures.ends_with("---- a test program ended in the middle, after: test c ... ok"), "{failures}");
    }

    #[test]
    fn a_failure_that_no_test_told_is_still_a_failure() {
        assert_eq!(totals("", false, 0), "0 passed, 1 failed, 0 skipped");
    }
}
