//! Reports as JSON: each verb's against its own schema, types of QMP's names, and the page made from the schemas.

mod common;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::Stdio,
};

use serde_json::{Value, json};
use test_support::{TempDir, time_limit};

use common::{LIMIT, exit_code, json, multifd, run, schema::errors};

const SMALL: &str = "--guest process --memory 8MiB --working-set 1MiB --write-rate 5MB/s --after 0 --json";

#[track_caller]
fn valid(verb: &str, report: &Value) {
    assert_eq!(errors(verb, report), Vec::<String>::new(), "{verb}: {report}");
}

#[test]
fn reports_of_a_migration_are_as_their_schema_says() {
    time_limit(LIMIT, || {
        let output = run(&format!("demo {SMALL}"));
        let report = json(&output.stdout);
        assert_eq!(exit_code(&output), 0, "{report}");
        valid("demo", &report);
        // All figures have to be there, and no others.
        for (change, what) in [(json!({ "downtime": 0.5 }), "a fraction"), (json!({ "nonesuch": 1 }), "a field")] {
            let mut changed = report.clone();
            changed.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            assert!(!errors("demo", &changed).is_empty(), "{what}");
        }
        let mut less = report.clone();
        less.as_object_mut().unwrap().remove("ram");
        assert!(!errors("demo", &less).is_empty());
        for name in ["total-time", "total-time-us", "downtime", "downtime-us", "setup-time", "setup-time-us"] {
            assert!(report[name].is_u64(), "{name}: {report}");
        }
        let us = |name: &str| report[format!("{name}-us")].as_u64().unwrap();
        assert_eq!(report["total-time"], (us("total-time") + 500) / 1000);
        assert!(report["ram"]["pages-per-second"].is_u64(), "{report}");
    });
}

/// `downtime` and `setup-time` were missing there.
#[test]
fn a_checkpoint_is_received_sent_inspected_and_converted_with_reports_as_their_schemas_say() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (file, copy) = (dir.join("c"), dir.join("copy"));
        let received = receive(dir.path(), &file, &format!("guest {SMALL} --migrate-to"));
        valid("receive", &received.0);
        valid("guest", &received.1);
        let (here, there) = (&received.0, &received.1);
        for name in ["downtime", "downtime-us", "setup-time", "setup-time-us"] {
            assert!(here[name].is_u64(), "{name}: {here}");
        }
        assert!(here["downtime-us"].as_u64() <= here["total-time-us"].as_u64(), "{here}");
        // Rounds have the same numbers and pages on both sides.
        let numbers = |report: &Value| {
            let round = |round: &Value| (round["round"].clone(), round["normal"].clone(), round["duplicate"].clone());
            report["rounds"].as_array().unwrap().iter().map(round).collect::<Vec<_>>()
        };
        assert_eq!(numbers(here), numbers(there));
        assert!(here["rounds"][0].get("dirty-after").is_none() && there["rounds"][0]["dirty-after"].is_u64());

        let (again, sent) = receive(dir.path(), &copy, &format!("send {} --json", file.display()));
        valid("receive", &again);
        valid("send", &sent);
        for args in ["inspect --json --devices --digest", "convert --json --digest --format stream"] {
            let (verb, rest) = args.split_once(' ').unwrap();
            let out = dir.join("out");
            let mut command = multifd(verb);
            command.args(rest.split(' ')).arg(&file);
            if verb == "convert" {
                command.arg(&out);
            }
            let output = command.output().unwrap();
            assert_eq!(exit_code(&output), 0, "{}", String::from_utf8_lossy(&output.stderr));
            valid(verb, &json(&output.stdout));
            if verb == "convert" {
                let inspected = multifd("inspect --json").arg(&out).output().unwrap();
                valid("inspect", &json(&inspected.stdout));
            }
        }
    });
}

/// Reports of a receiver that writes to `file`, and of the command `source`, which is told where that is at its end.
fn receive(dir: &Path, file: &Path, source: &str) -> (Value, Value) {
    let uri = format!("unix:{}", dir.join("socket").display());
    let mut receiver = multifd("receive --json");
    receiver.arg(&uri).arg("--output").arg(file).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut receiver = receiver.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(receiver.stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line.trim_end(), format!("listening on {uri}"));
    let (first, rest) = source.split_once(' ').unwrap();
    let source = multifd(first).args(rest.split(' ')).arg(&uri).output().unwrap();
    if !source.status.success() {
        receiver.kill().unwrap();
    }
    let received = receiver.wait_with_output().unwrap();
    assert_eq!(exit_code(&source), 0, "{}", String::from_utf8_lossy(&source.stderr));
    (json(&received.stdout), json(&source.stdout))
}

#[test]
fn failures_are_as_the_schema_says() {
    time_limit(LIMIT, || {
        for (args, verb, exit) in [
            ("inspect /nonesuch --json", "inspect", 1),
            ("send /nonesuch unix:/nonesuch --json", "send", 1),
            ("receive unix:/nonesuch/socket --output /nonesuch/file --json", "receive", 1),
            ("convert /nonesuch /nonesuch2 --json", "convert", 1),
            ("checkpoint unix:/nonesuch --output /nonesuch2 --json", "checkpoint", 1),
            ("demo --memory nonesuch --json", "other", 2),
            ("schema nonesuch --json", "other", 2),
        ] {
            let output = run(args);
            let report = json(&output.stdout);
            assert_eq!((exit_code(&output), &report["status"]), (exit, &json!("failed")), "{args}: {report}");
            assert!(report["error"].is_string(), "{report}");
            valid(verb, &report);
        }
    });
}

/// `cargo xtask json` writes it.
#[test]
fn the_page_of_documentation_is_current() {
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/json.md")).unwrap_or_default();
    let current = String::from_utf8(run("schema --markdown").stdout).unwrap();
    let differs = page.lines().zip(current.lines()).find(|(old, new)| old != new);
    assert!(page == current, "docs/json.md is out of date, `cargo xtask json` writes it anew: {differs:?}");
}

#[test]
fn each_schema_is_one() {
    for verb in
        ["demo", "guest", "receive", "send", "checkpoint", "restore", "convert", "give-back", "inspect", "doctor"]
    {
        let output = run(&format!("schema {verb}"));
        let schema: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(jsonschema::meta::is_valid(&schema), "{verb}");
        assert_eq!(schema["properties"]["status"]["$ref"], "#/$defs/Status", "{verb}");
    }
}
