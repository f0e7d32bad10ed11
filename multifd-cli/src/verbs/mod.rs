//! The verbs, one file each.

mod guest;

use crate::{cli::Verb, report::Outcome};

/// Does what `verb` says.
pub fn run(verb: &Verb) -> Outcome {
    match verb {
        Verb::Guest(args) => guest::run(args),
    }
}
