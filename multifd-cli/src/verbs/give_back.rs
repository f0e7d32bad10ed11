//! `multifd give-back`: lets a QEMU that has switched to postcopy have its VM back, after `receive` has failed.

use multifd::{destination, error::Error, stop::StopHandle};
use serde_json::{Map, json};

use crate::{args::GiveBackArgs, listening, report::Outcome, signals};

/// Waits for the source and completes its migration.
pub fn run(args: &GiveBackArgs) -> Outcome {
    match give_back(args) {
        Ok(outcome) => outcome,
        Err(error) => Outcome::failed(crate::exit::Exit::Failed, error),
    }
}

/// # Errors
/// What went wrong before any connection was made.
fn give_back(args: &GiveBackArgs) -> Result<Outcome, Box<dyn std::error::Error>> {
    let stop = StopHandle::new();
    let cancel = stop.clone();
    signals::on_interrupt(signals::Hangup::Interrupts, move || cancel.cancel())?;
    let listener = args.uri.listener()?;
    let at = listener.uri().clone();
    let mut listener = args.tls.listener(args.allow.listener(Box::new(listener)))?;
    listening::announce(&format!("listening on {at}"));
    let given: Result<(), Error> = destination::give_back(&mut *listener, &args.blocks, &stop);
    Ok(match given {
        Ok(()) => {
            let mut report = Map::new();
            report.insert("blocks".to_owned(), json!(args.blocks.len()));
            Outcome::done(
                report,
                "the source has its VM back: its migration is completed, and cont lets the guest run\n".to_owned(),
            )
        }
        Err(error) => Outcome::migration_failed(&error, Map::new()),
    })
}
