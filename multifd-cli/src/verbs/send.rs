//! `multifd send`: streams a checkpoint to a destination.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use multifd::{
    checkpoint::{self, Checkpoint, CheckpointError, CheckpointSource},
    error::Error,
    source::{self, Source},
};
use multifd_proto::machine::{MachineDefaults, ZeroPages};

use super::postcopy::{self, Broken, There};
use crate::{
    advice,
    args::{OutputArgs, SendArgs},
    connect::PatientConnector,
    describe,
    exit::Exit,
    image::{Content, Image, Stop},
    printable,
    progress::Display,
    qmp::{Qmp, Role, RunState, Settings, Steered, Watched},
    report::{MigrationReport, Outcome, fields},
    shell, signals, table,
};

/// Sends the checkpoint.
pub fn run(args: &SendArgs) -> Outcome {
    let stop = Stop::default();
    let checkpoint = match open(&args.file, args.postcopy.is_asked_for(), &stop, &args.output) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return Outcome::failed(Exit::from(&error), error),
    };
    if args.postcopy.is_asked_for() {
        let (at_qemu, file) = (postcopy::what_to_type(&args.uri), shell::word(&args.file));
        let to_go_on = format!("{at_qemu}, then: multifd send {file} URI --recover");
        let there = There { to_go_on, after_break: &mut || Broken::NotAsked };
        return postcopy::run(args, &checkpoint, there);
    }
    if let Err(refused) = check_memory(&args.file, args.ignore_shared, &checkpoint) {
        return Outcome::failed(refused.0, refused.1);
    }
    let Some(options) = options(args, &checkpoint) else {
        let machine = checkpoint.machine();
        let message = format!(
            "the version of machine type {machine:?} is not known; expected --sync per-round for machine types of QEMU 8.1 \
             and newer, or per-section for older ones (with the wrong one, a QEMU waits forever)"
        );
        return Outcome::failed(Exit::Usage, message);
    };
    match send(args, &checkpoint, options) {
        Ok(outcome) => outcome,
        Err(error) => Outcome::failed(Exit::Failed, error),
    }
}

/// Whether the checkpoint in `file` has all of the VM's memory, or the operator has said that the rest is where it is to go.
///
/// # Errors
/// The exit status, and why it is not sent.
pub(super) fn check_memory(file: &Path, ignore_shared: bool, checkpoint: &Checkpoint) -> Result<(), (Exit, String)> {
    match (checkpoint.check_whole().map_err(Error::from), ignore_shared) {
        (Ok(()), false) | (Err(_), true) => Ok(()),
        (Ok(()), true) => {
            let message = format!(
                "all of the VM's memory is in {file:?}, which a QEMU with x-ignore-shared on refuses; expected no '--ignore-shared'"
            );
            Err((Exit::Usage, message))
        }
        (Err(error), false) => {
            let message = format!("{error}; --ignore-shared sends the rest to such a QEMU");
            Err((Exit::from(&error), message))
        }
    }
}

/// The VM in `file`. A plain stream, which QEMU and libvirt write front to back, is first read into a file without a name
/// in the directory for temporary files.
///
/// # Errors
/// It is something else; a plain stream, `for_postcopy`; [`Error::Cancelled`].
pub(super) fn open(
    file: &Path,
    for_postcopy: bool,
    stop: &Stop,
    output: &OutputArgs,
) -> Result<Box<Checkpoint>, Error> {
    let image = Image::open(file)?;
    if matches!(image.content, Content::Stream(_)) {
        if for_postcopy {
            // What is unpacked goes away with this process, and with it the guest's only memory.
            let path = file.to_owned();
            return Err(CheckpointError::OtherKind { path, kind: NO_PLACES.to_owned() }.into());
        }
        let interrupted = stop.clone();
        let listened = signals::on_interrupt(signals::Hangup::Interrupts, move || interrupted.cancel());
        if let Err(error) = listened {
            tracing::warn!(%error, "an interrupt ends the process at once");
        }
    }
    let checkpoint = image.into_checkpoint(&std::env::temp_dir(), stop, output)?;
    if stop.is_cancelled() { Err(Error::Cancelled) } else { Ok(checkpoint) }
}

/// Of a file that cannot be sent to a guest which runs already.
const NO_PLACES: &str = "read front to back, and a postcopy (--postcopy, serve) needs a place for each page, for another process \
                         to go on from after this one died: `multifd convert FILE CHECKPOINT` makes one";

/// How to send it; nothing where that cannot be known. A token is for another multifd.
pub(super) fn options(args: &SendArgs, checkpoint: &Checkpoint) -> Option<source::Options> {
    let machine = checkpoint.machine();
    let ours = machine.starts_with("multifd");
    if args.transfer.sync.is_none() && MachineDefaults::of(machine).is_none() && !ours {
        return None;
    }
    let mut options = args.transfer.source_options(machine);
    if args.transfer.zero_pages.is_none() && !ours {
        // A QEMU believes the list of zero pages in a packet without looking: memory that is not new would keep what it
        // holds, and one before 9.0 does not read the list at all. It does what a ZERO word says in any case.
        options.qemu.zero_pages = ZeroPages::Legacy;
    }
    checkpoint.apply_to(&mut options);
    let peer = args.peer.map(source::Peer::from);
    // A QEMU knows no token.
    let ours = ours || options.format.token.is_some();
    options.peer = peer.unwrap_or(if ours { source::Peer::Multifd } else { source::Peer::Qemu });
    if let Some(uuid) = args.uuid {
        options.qemu.uuid = uuid;
        // All zero is a VM without one, which says nothing about it.
        options.qemu.validate_uuid &= uuid != [0; 16];
    }
    Some(options)
}

/// # Errors
/// What went wrong before any connection was made.
pub(super) fn send(
    args: &SendArgs,
    checkpoint: &Checkpoint,
    options: source::Options,
) -> Result<Outcome, Box<dyn std::error::Error>> {
    let mut vm = CheckpointSource::new(checkpoint)?;
    let zero_pages = options.qemu.zero_pages;
    let source = Source::new(options.clone());
    signals::cancel_on_interrupt(source.stop_handle())?;
    let commands = Steered { verb: "sends", stop: source.stop_handle() };
    let settings = Settings::in_force(&options);
    let (qmp, _listening) = Qmp::listen(args.qmp.as_ref(), RunState::Paused, settings, false, commands)?;
    qmp.begin(Role::Source, source.progress(), Some(source.handle()), None);
    let connector = PatientConnector::new(&args.uri, &args.transfer.link.tls, args.transfer.connect_timeout)?;
    let progress = source.progress();
    let mut display = Display::of_source(&args.output, source.handle(), &options);
    let begun = Instant::now();
    let impatience = advice::Impatience::watch(checkpoint, &options, &progress);
    let sent = source.run(&mut vm, &connector, &mut Watched::new(&mut display, qmp.clone(), Role::Source));
    drop(impatience);
    let rounds = display.rounds();
    drop(display);
    let (migration, error) = match &sent {
        Ok(report) => (MigrationReport::sent(report, Duration::ZERO), None),
        Err(error) => {
            let partial =
                MigrationReport::partial(Role::Source, &progress, &rounds, checkpoint::PAGE_SIZE, begun.elapsed());
            (partial, Some(error))
        }
    };
    qmp.finish(&migration, error);
    let mut report = fields(&migration);
    report.insert("machine".to_owned(), checkpoint.machine().into());
    report.insert("zero-pages".to_owned(), zero_pages.to_string().into());
    Ok(match error {
        Some(error) => {
            let message = advice::for_sender(error, checkpoint, &options, &progress);
            Outcome { error: Some(message), ..Outcome::migration_failed(error, report) }
        }
        None => {
            let text = summary(args, checkpoint, &migration) + &not_sent(checkpoint);
            Outcome::done(report, text)
        }
    })
}

/// What of the VM was not sent; empty where all was.
fn not_sent(checkpoint: &Checkpoint) -> String {
    let names: Vec<String> =
        checkpoint.memory_elsewhere().map(|block| printable::line(block.name.as_str()).to_string()).collect();
    match names.is_empty() {
        true => String::new(),
        false => format!("  the memory of {} was not sent: the destination has to map it\n", names.join(", ")),
    }
}

fn summary(args: &SendArgs, checkpoint: &Checkpoint, migration: &MigrationReport) -> String {
    let ram = &migration.ram;
    let rate = ram.transferred as f64 / (migration.total_time_us.max(1) as f64 / 1e6);
    let compression: Vec<String> =
        migration.auto_compression.iter().map(|channel| format!("  {}\n", channel.text())).collect();
    let zero_copy = migration.zero_copy.as_ref().map(|zero_copy| format!("  zero-copy: {}\n", zero_copy.text()));
    format!(
        "sent {} from {} to {}\n  {} of {} in {} ({}/s), {}, sync {}; the destination has the VM\n{}{}",
        printable::line(checkpoint.machine()),
        args.file.display(),
        args.uri,
        table::bytes(ram.transferred),
        table::bytes(ram.total),
        table::milliseconds(migration.total_time_us as f64 / 1e3),
        table::decimal_bytes(rate),
        describe::channels(migration.channels),
        migration.dialect.as_deref().unwrap_or("unknown"),
        compression.concat(),
        zero_copy.unwrap_or_default(),
    )
}
