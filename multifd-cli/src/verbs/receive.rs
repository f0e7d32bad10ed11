//! `multifd receive`: takes a VM over the network into a checkpoint file.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use multifd::{
    checkpoint::{self, Checkpoint, CheckpointError},
    destination::{self, Destination, Mode, SwitchoverAck},
    error::Error,
    transport::{Listen, record::Recording, uri::Uri},
};
use multifd_proto::BlockName;
use serde_json::{Map, Value, json};

use super::{deferred::Deferred, interrupted::Interrupted, recovers::Recovers};
use crate::{
    advice,
    args::{AllowArgs, Compression, Incoming, Origin, Ready, ReceiveArgs, ReturnPathAck, TlsArgs},
    describe,
    exit::Exit,
    listening,
    movable_listener::ListenerHandle,
    printable,
    progress::Display,
    qmp::{Qmp, Role, RunState, Settings, Watched},
    report::{MigrationReport, Outcome, fields},
    shell, signals, table,
};

/// Waits for a source and takes its VM.
pub fn run(args: &ReceiveArgs) -> Outcome {
    match receive(args) {
        Ok(outcome) => outcome,
        Err(error) => Outcome::failed(Exit::Failed, error),
    }
}

/// # Errors
/// What went wrong before any connection was made.
fn receive(args: &ReceiveArgs) -> Result<Outcome, Box<dyn std::error::Error>> {
    super::check_replaceable(&args.file, args.force)?;
    let mut writer = checkpoint::Writer::create(&args.file, args.force).map_err(|error| match error {
        CheckpointError::Exists { path } => format!("{path:?} exists; --force replaces it").into(),
        error => Box::<dyn std::error::Error>::from(error),
    })?;
    writer = writer.direct_writes(args.direct.into());
    let destination = Destination::new(options(args));
    let stop = destination.stop_handle();
    let recording = args.record.as_deref().map(Recording::new).transpose()?;
    let opener = Opener { tls: args.link.tls.clone(), allow: args.listen.allow.clone(), recording: recording.clone() };
    let listening_at = ListenerHandle::default();
    let recovers =
        Recovers { destination: destination.handle(), opener: opener.clone(), listening_at: listening_at.clone() };
    let (deferred, commands) = Deferred::new(args.from == Incoming::Defer, stop.clone(), recovers);
    let (interrupted, desk) = (Arc::new(AtomicBool::new(false)), deferred.desk());
    let seen = interrupted.clone();
    signals::on_interrupt(signals::Hangup::Interrupts, move || {
        seen.store(true, Ordering::Relaxed);
        stop.cancel();
        desk.end();
    })?;
    let opened = args.from.address().map(|from| opener.open(from)).transpose()?;
    let progress = destination.progress();
    let (qmp, _listening) = Qmp::listen(args.qmp.as_ref(), RunState::InMigrate, Settings::default(), false, commands)?;
    let begin = |place: &Place| qmp.begin(Role::Destination, progress.clone(), None, place.uri.clone());
    let place = match opened {
        Some(place) => {
            begin(&place);
            Some(place)
        }
        None => {
            let open = |from: &Origin| {
                args.check_origin(from)?;
                opener.open(from).map_err(|error| error.to_string())
            };
            listening::announce("waiting for migrate-incoming");
            deferred.wait(open, begin)
        }
    };
    let Some(Place { listener, uri, is_one_way }) = place else {
        return Ok(Outcome::failed(Exit::Cancelled, Error::Cancelled));
    };
    let listener = listening_at.open(listener, uri)?;
    let mut display = Display::new(Role::Destination, &args.output, &progress);
    let begun = Instant::now();
    let watched = &mut Watched::new(&mut display, qmp.clone(), Role::Destination);
    let received = writer.receive(destination, listener, &mut Interrupted::new(watched, listening_at));
    let rounds = display.rounds();
    drop(display);
    match received {
        Ok(report) => {
            qmp.finish(&MigrationReport::received(&report, checkpoint::PAGE_SIZE, std::time::Duration::ZERO), None);
            Ok(described(args, &report, is_one_way, &|| interrupted.load(Ordering::Relaxed)))
        }
        Err(error) => {
            let partial =
                MigrationReport::partial(Role::Destination, &progress, &rounds, checkpoint::PAGE_SIZE, begun.elapsed());
            qmp.finish(&partial, Some(&error));
            deferred.stay(&qmp);
            let mut outcome = failed(args, &error, &partial, writer.is_published(), is_one_way);
            if let Some(failure) = recording.as_ref().and_then(Recording::failure) {
                mention(&mut outcome, &failure);
            }
            Ok(outcome)
        }
    }
}

/// Adds why the recording failed, unless that is known to be the reason.
fn mention(outcome: &mut Outcome, failure: &str) {
    if let Some(error) = outcome.error.as_mut().filter(|error| !error.contains(failure)) {
        error.push_str(&format!("; --record: {failure}"));
    }
}

/// The report on a migration that ended with `error`.
fn failed(
    args: &ReceiveArgs,
    error: &Error,
    partial: &MigrationReport,
    is_published: bool,
    is_one_way: bool,
) -> Outcome {
    let mut outcome = Outcome::migration_failed(error, fields(partial));
    if !is_one_way {
        outcome.error = Some(advice::for_receiver(error));
    }
    if let Error::AfterRun { blocks, .. } = error {
        let remedy = remedy(blocks, &args.link.tls);
        outcome.error = Some(format!("{error}; {remedy}"));
    }
    if is_published {
        let path = &args.file;
        outcome.error = Some(format!("{path:?} is complete, but the source may not know it and run on: {error}"));
        outcome.report.insert("published".to_owned(), true.into());
        outcome.report.insert("checkpoint".to_owned(), file_report(path));
    }
    outcome
}

pub(super) fn options(args: &ReceiveArgs) -> destination::Options {
    let mut options = destination::Options::default();
    options.channels = args.channels.map(Into::into);
    options.compression = args.compression.and_then(Compression::required);
    options.uuid = args.uuid;
    options.stall_limit = args.link.stall_timeout.0;
    options.token = args.link.token.map(|token| token.0);
    options.audit = args.audit;
    options.max_unidentified = args.listen.max_unidentified.into();
    options.recover_limit = args.recover_timeout;
    options.switchover_ack = match args.return_path_ack {
        ReturnPathAck::Auto => SwitchoverAck::Auto,
        ReturnPathAck::Never => SwitchoverAck::Never,
        ReturnPathAck::Always => SwitchoverAck::Always,
    };
    options
}

/// What the source connects to, or what is read.
pub(super) struct Place {
    pub(super) listener: Box<dyn Listen>,
    /// Its address where it has one.
    pub(super) uri: Option<Uri>,
    /// There is a single connection, without a way back.
    is_one_way: bool,
}

/// How connections are taken, wherever they come to.
#[derive(Clone)]
pub(super) struct Opener {
    tls: TlsArgs,
    pub(super) allow: AllowArgs,
    recording: Option<Recording>,
}

impl Opener {
    /// Opens `from`, and says so.
    ///
    /// # Errors
    /// It cannot be opened or listened at.
    pub(super) fn open(&self, from: &Origin) -> io::Result<Place> {
        let Ready { listener, what, uri } = from.listener()?;
        let listener = self.tls.listener(self.allow.listener(listener))?;
        listening::announce(&what);
        let listener = match &self.recording {
            Some(recording) => Box::new(recording.listener(listener)),
            None => listener,
        };
        Ok(Place { listener, uri, is_one_way: from.is_one_way() })
    }
}

/// What an operator has to do to have a VM run again whose source has switched to postcopy, with `tls` or without.
fn remedy(blocks: &[(BlockName, u64)], tls: &TlsArgs) -> String {
    // Names come from the peer; a shell must not read anything into them.
    let blocks: Vec<String> =
        blocks.iter().map(|(name, bytes)| shell::word(&format!("{}={bytes}", name.as_str())).into_owned()).collect();
    format!(
        "to have it run there again where it is paused: multifd give-back URI {}{}, then in the monitor of the source migrate -r URI and cont",
        blocks.join(" "),
        tls.words()
    )
}

/// The report on a checkpoint that was received, from the file itself.
///
/// The VM is in the file by now and the source was told so: what cannot be read back of it is missing in the report, and
/// no failure.
pub(super) fn described(
    args: &ReceiveArgs,
    received: &destination::Report,
    is_one_way: bool,
    interrupted: &dyn Fn() -> bool,
) -> Outcome {
    let migration = MigrationReport::received(received, checkpoint::PAGE_SIZE, std::time::Duration::ZERO);
    let mut report = fields(&migration);
    report.insert("machine".to_owned(), received.machine.clone().into());
    let (mode, instant) = match (received.mode, is_one_way) {
        (Mode::Live, true) => ("stream", mode(Mode::Live).1),
        (received, _) => mode(received),
    };
    report.insert("mode".to_owned(), mode.into());
    report.insert("instant".to_owned(), instant.into());
    if received.mode == Mode::Postcopy {
        report.insert("recoveries".to_owned(), received.recoveries.into());
    }
    report.insert("checkpoint".to_owned(), file_report(&args.file));
    if !received.memory_elsewhere.is_empty() {
        let names: Vec<&str> = received.memory_elsewhere.iter().map(BlockName::as_str).collect();
        report.insert("memory-elsewhere".to_owned(), json!(names));
    }
    let mut text = summary(&migration, received, &args.file);
    if let Err(missing) = read_back(args, interrupted, &mut report, &mut text) {
        let note = format!("the checkpoint is complete, but a part of this report is missing: {missing}");
        text.push_str(&format!("\n  {note}\n"));
        report.insert("report-incomplete".to_owned(), note.into());
    }
    let mut outcome = Outcome::done(report, text);
    if let Some(audit) = &migration.audit {
        outcome.text.push_str(&format!("  {}\n", audit.text()));
        if audit.stale_writes > 0 {
            outcome.exit = Exit::Different;
            outcome.error = Some(audit.text());
        }
    }
    outcome
}

/// Adds what the file itself says.
///
/// # Errors
/// Why there is no more of it.
fn read_back(
    args: &ReceiveArgs,
    interrupted: &dyn Fn() -> bool,
    report: &mut Map<String, Value>,
    text: &mut String,
) -> Result<(), Box<dyn std::error::Error>> {
    let checkpoint = Checkpoint::open(&args.file)?;
    let mut blocks = describe::blocks_of(&checkpoint);
    let digested = match args.digest {
        true => describe::add_digests(&mut blocks, &checkpoint, interrupted),
        false => Ok(()),
    };
    let devices = describe::Devices::of_checkpoint(&checkpoint);
    report.insert("ram-blocks".to_owned(), describe::blocks_json(&blocks));
    report.insert("devices".to_owned(), devices.json(false));
    text.push_str(&describe::blocks_text(&blocks));
    text.push_str(&describe::elsewhere_text(&blocks));
    text.push_str(&devices.summary());
    Ok(digested?)
}

/// How the state came, and from when it is: the values of `mode` and `instant` in the report.
fn mode(mode: Mode) -> (&'static str, &'static str) {
    match mode {
        Mode::Snapshot => ("snapshot", "start"),
        Mode::Postcopy => ("postcopy", "switchover"),
        _ => ("live", "switchover"),
    }
}

fn summary(migration: &MigrationReport, received: &destination::Report, path: &Path) -> String {
    let ram = &migration.ram;
    let seconds = migration.total_time_us as f64 / 1e6;
    let rate = if seconds > 0.0 { ram.transferred as f64 / seconds } else { 0.0 };
    format!(
        "received {}{} into {}\n  {} of {} in {} ({}/s), {}\n",
        match received.mode {
            _ if !received.memory_elsewhere.is_empty() => "the devices, and not the whole memory, of ",
            Mode::Snapshot => "a background snapshot of ",
            _ => "",
        },
        printable::line(&received.machine),
        path.display(),
        table::bytes(ram.transferred),
        table::bytes(ram.total),
        table::milliseconds(migration.total_time_us as f64 / 1e3),
        table::decimal_bytes(rate),
        match migration.channels {
            0 => describe::channels(0),
            channels => format!(
                "{}, {}",
                describe::channels(channels),
                describe::counted(usize::try_from(ram.dirty_sync_count).unwrap_or(usize::MAX), "sync point")
            ),
        },
    )
}

pub(super) fn file_report(path: &PathBuf) -> Value {
    let metadata = std::fs::metadata(path);
    let mut report = Map::new();
    report.insert("path".to_owned(), path.display().to_string().into());
    if let Ok(metadata) = metadata {
        report.insert("bytes".to_owned(), json!(metadata.len()));
        report.insert("disk-bytes".to_owned(), json!(std::os::unix::fs::MetadataExt::blocks(&metadata) * 512));
    }
    Value::Object(report)
}
