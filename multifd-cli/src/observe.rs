//! Runs a verb with what looks on: metrics while it runs, and a page about it afterwards.

use std::path::Path;

use crate::{args::Verb, exit::Exit, html, metrics::Metrics, replace, report::Outcome};

/// Runs `body`, which does what `verb` says, with metrics where they are asked for, and writes the page about the outcome.
pub fn observed(verb: &Verb, body: impl FnOnce() -> Outcome) -> Outcome {
    let Some(observe) = verb.observe() else { return body() };
    if let Err(message) = check_report(observe.report.as_deref()) {
        return Outcome::failed(Exit::Failed, message);
    }
    let mut outcome = match observe.metrics.as_ref().map(Metrics::start).transpose() {
        Ok(_metrics) => body(),
        Err(error) => return Outcome::failed(Exit::Failed, error),
    };
    if let Some(path) = &observe.report
        && let Err(error) = html::write(path, verb.name(), &outcome)
    {
        outcome.worsen_beside(&format!("--report {}: {error}", path.display()));
    }
    outcome
}

/// Says before anything moves that a page at `report` could not be written when all is over.
///
/// # Errors
/// Why.
pub fn check_report(report: Option<&Path>) -> Result<(), String> {
    let Some(path) = report else { return Ok(()) };
    replace::check(path).map_err(|error| format!("--report {}: {error}", path.display()))
}
