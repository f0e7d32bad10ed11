//! The verbs, one file each.

mod checkpoint;
mod convert;
mod deferred;
mod demo;
mod doctor;
mod give_back;
mod guest;
mod inspect;
mod interrupted;
mod pages;
mod postcopy;
mod receive;
mod recovers;
mod restore;
mod schema;
mod send;
mod serve;
mod tls_init;

use std::path::{Path, PathBuf};

pub use self::{
    demo::Verified,
    guest::{Account, Compared},
    postcopy::PostcopyReport,
};
use crate::{args::Verb, exit::Exit, observe, report::Outcome};

/// Does what `verb` says, and prints its report. `for_parent`: another process reports what went wrong.
pub fn run(verb: &Verb, for_parent: bool) -> Exit {
    // It has a report for each client.
    if let Verb::Serve(args) = verb {
        return serve::run(args);
    }
    observe::observed(verb, || outcome(verb)).print(verb.output(), for_parent)
}

/// Where it is noted by default that the VM in `checkpoint` was handed over.
pub fn note_of(checkpoint: &Path) -> PathBuf {
    postcopy::record::Record::place(checkpoint, false)
}

/// Whether a verb that writes `file` may, with `force`, replace what is there.
///
/// # Errors
/// A VM that was handed over may need it.
fn check_replaceable(file: &Path, force: bool) -> Result<(), postcopy::record::RecordError> {
    if force { postcopy::record::Record::check_replaceable(file) } else { Ok(()) }
}

fn outcome(verb: &Verb) -> Outcome {
    match verb {
        Verb::Serve(_) => unreachable!("it was run above"),
        Verb::Demo(args) => demo::run(args),
        Verb::Guest(args) => guest::run(args),
        Verb::Checkpoint(args) => checkpoint::run(args),
        Verb::Restore(args) => restore::run(args),
        Verb::Convert(args) => convert::run(args),
        Verb::Doctor(args) => doctor::run(args),
        Verb::GiveBack(args) => give_back::run(args),
        Verb::Inspect(args) => inspect::run(args),
        Verb::Pages(args) => pages::run(args),
        Verb::Receive(args) => receive::run(args),
        Verb::Schema(args) => schema::run(args),
        Verb::Send(args) => send::run(args),
        Verb::TlsInit(args) => tls_init::run(args),
    }
}
