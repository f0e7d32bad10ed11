//! The verbs, one file each.

mod checkpoint;
mod convert;
mod demo;
mod give_back;
mod guest;
mod inspect;
mod postcopy;
mod receive;
mod restore;
mod send;

use crate::{args::Verb, report::Outcome};

/// Does what `verb` says.
pub fn run(verb: &Verb) -> Outcome {
    match verb {
        Verb::Demo(args) => demo::run(args),
        Verb::Guest(args) => guest::run(args),
        Verb::Checkpoint(args) => checkpoint::run(args),
        Verb::Restore(args) => restore::run(args),
        Verb::Convert(args) => convert::run(args),
        Verb::GiveBack(args) => give_back::run(args),
        Verb::Inspect(args) => inspect::run(args),
        Verb::Receive(args) => receive::run(args),
        Verb::Send(args) => send::run(args),
    }
}
