//! Runs a verb with what looks on: metrics while it runs, and a page about it afterwards.

use crate::{args::Verb, exit::Exit, html, metrics::Metrics, report::Outcome};

/// Runs `body`, which does what `verb` says, with metrics where they are asked for, and writes the page about the outcome.
pub fn observed(verb: &Verb, body: impl FnOnce() -> Outcome) -> Outcome {
    let Some(observe) = verb.observe() else { return body() };
    let mut outcome = match observe.metrics.as_ref().map(Metrics::start).transpose() {
        Ok(_metrics) => body(),
        Err(error) => return Outcome::failed(Exit::Failed, error),
    };
    if let Some(path) = &observe.report
        && let Err(error) = html::write(path, verb.name(), &outcome)
    {
        outcome.worsen(Exit::Failed, &format!("--report {}: {error}", path.display()));
    }
    outcome
}
