//! Whether a report is as `multifd schema` says: every report that a test reads is checked.

use std::sync::OnceLock;

use jsonschema::Validator;
use serde_json::Value;

use super::run;

fn validators() -> &'static [(String, Validator)] {
    static VALIDATORS: OnceLock<Vec<(String, Validator)>> = OnceLock::new();
    VALIDATORS.get_or_init(|| {
        let output = run("schema");
        let schemas: Value = serde_json::from_slice(&output.stdout).unwrap();
        let compile = |(verb, schema): (&String, &Value)| (verb.clone(), jsonschema::validator_for(schema).unwrap());
        schemas.as_object().unwrap().iter().map(compile).collect()
    })
}

/// What is wrong with `report` as one of `verb`; empty where nothing is.
pub fn errors(verb: &str, report: &Value) -> Vec<String> {
    let (_, validator) = validators().iter().find(|(name, _)| name == verb).expect("a verb with a report");
    validator.iter_errors(report).map(|error| format!("{}: {error}", error.instance_path)).collect()
}

/// Checks that `report` is one of some verb.
#[track_caller]
pub fn check(report: &Value) {
    let validators = validators();
    if !validators.iter().any(|(_, validator)| validator.is_valid(report)) {
        let all: Vec<_> = validators.iter().map(|(verb, _)| (verb, errors(verb, report))).collect();
        let (verb, least) = all.iter().min_by_key(|(_, errors)| errors.len()).unwrap();
        panic!("no report of any verb; as one of {verb}: {least:?}: {report}");
    }
}
