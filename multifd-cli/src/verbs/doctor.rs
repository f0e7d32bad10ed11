//! `multifd doctor`: what this host permits and how it is set, as far as migrations need it.

use std::path::Path;

use serde_json::{Map, json};

use crate::{
    args::DoctorArgs,
    doctor::{self, Asked, Check, State},
    exit::Exit,
    report::Outcome,
};

/// Looks at this host.
pub fn run(args: &DoctorArgs) -> Outcome {
    outcome(&doctor::checks(Path::new("/"), &Asked::this_host()), args.strict)
}

fn outcome(checks: &[Check], strict: bool) -> Outcome {
    let count = |state: State| checks.iter().filter(|check| check.state == state).count();
    let (warnings, not_known) = (count(State::Warning), count(State::NotKnown));
    let mut report = Map::new();
    report.insert("checks".to_owned(), json!(checks));
    report.insert("warnings".to_owned(), warnings.into());
    report.insert("not-known".to_owned(), not_known.into());
    let text = checks.iter().map(Check::line).collect();
    let mut outcome = Outcome::done(report, text);
    if strict && warnings + not_known > 0 {
        outcome.worsen(Exit::Failed, &format!("{warnings} warnings, {not_known} not known"));
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_strict_look_fails_by_what_it_finds() {
        let [good, bad, unknown] = [
            Check::ok("kvm", "usable"),
            Check::warning("open-files", "64 at most", "ulimit -n 1024"),
            Check::not_known("vsock", "no file", "mount /proc"),
        ];
        for (checks, exit) in [
            (vec![good.clone()], Exit::Done),
            (vec![good.clone(), bad], Exit::Failed),
            (vec![good, unknown], Exit::Failed),
        ] {
            assert_eq!(outcome(&checks, false).exit, Exit::Done);
            let strict = outcome(&checks, true);
            assert_eq!(strict.exit, exit, "{checks:?}");
            assert_eq!(strict.report["checks"].as_array().unwrap().len(), checks.len());
            assert_eq!(strict.text.lines().count(), checks.len(), "a line each");
        }
    }
}
