//! The verbs, one file each.

mod demo;
mod guest;

use crate::{cli::Verb, report::Outcome};

/// Does what `verb` says.
pub fn run(verb: &Verb) -> Outcome {
    match verb {
        Verb::Demo(args) => demo::run(args),
        Verb::Guest(args) => guest::run(args),
    }
}
