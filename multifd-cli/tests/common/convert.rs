//! Runs `convert` and `inspect`, and checks what they report.

use std::{path::Path, process::Output};

use serde_json::Value;

use super::{exit_code, json, multifd};

/// Exit status, report.
pub fn ended(output: &Output) -> (i32, Value) {
    (exit_code(output), json(&output.stdout))
}

pub fn convert(from: &Path, to: &Path, more: &[&str]) -> (i32, Value) {
    ended(&multifd("convert --json").args([from, to]).args(more).output().unwrap())
}

/// The same with digests; it has to succeed.
#[track_caller]
pub fn converted(from: &Path, to: &Path, more: &[&str]) -> Value {
    let (status, report) = convert(from, to, &[more, &["--digest"]].concat());
    assert_eq!(status, 0, "{report}");
    assert!(report["machine"].is_string());
    report
}

pub fn inspect(path: &Path) -> (i32, Value) {
    ended(&multifd("inspect --digest --json").arg(path).output().unwrap())
}

/// It has to have failed with status `expected` and an error that says `what`.
#[track_caller]
pub fn failed((status, report): (i32, Value), expected: i32, what: &str) {
    let error = report["error"].as_str().unwrap_or_default();
    assert_eq!(status, expected, "{report}");
    assert!(error.contains(what), "{what:?} is not in {error:?}");
}
