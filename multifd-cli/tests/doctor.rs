//! `multifd doctor` on the host that the tests run on, whatever it is like.

mod common;

use common::{LIMIT, exit_code, run, schema::errors};
use serde_json::Value;
use test_support::time_limit;

#[test]
fn it_says_the_same_in_text_and_as_json_and_fails_only_where_it_is_to_be_strict() {
    time_limit(LIMIT, || {
        let [text, json, strict] = ["doctor", "doctor --json", "doctor --json --strict"].map(run);
        assert_eq!((exit_code(&text), exit_code(&json)), (0, 0), "{text:?} {json:?}");
        let report: Value = serde_json::from_slice(&json.stdout).unwrap();
        let checks = report["checks"].as_array().unwrap();
        let is = |state: &str| checks.iter().filter(|check| check["state"] == state).count();
        assert!(checks.len() >= 10 && is("ok") + is("warning") + is("not-known") == checks.len(), "{report}");
        assert_eq!((&report["warnings"], &report["not-known"]), (&is("warning").into(), &is("not-known").into()));
        assert_eq!(errors("doctor", &report), Vec::<String>::new());
        let lines = String::from_utf8(text.stdout).unwrap();
        assert_eq!(lines.lines().count(), checks.len(), "{lines}");
        for (line, check) in lines.lines().zip(checks) {
            let name = check["name"].as_str().unwrap();
            assert!(line.contains(name), "{name} in {line}");
            assert_eq!(check["advice"].is_string(), check["state"] != "ok", "{check}");
        }
        let all_ok = is("ok") == checks.len();
        assert_eq!(exit_code(&strict), i32::from(!all_ok), "{strict:?}");
        let report: Value = serde_json::from_slice(&strict.stdout).unwrap();
        assert_eq!(errors("doctor", &report), Vec::<String>::new());
        assert_eq!(report["status"], if all_ok { "completed" } else { "failed" });
        assert_eq!(report["checks"].as_array().unwrap().len(), checks.len());
    });
}
