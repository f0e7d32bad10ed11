//! `multifd send --postcopy` and `--recover`: a checkpoint whose VM runs at once, and gets its memory while it runs.

pub mod lists;
pub mod record;
mod report;
mod resume;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use multifd::{
    checkpoint::{self, Checkpoint},
    error::{Connection, Error},
    postcopy::{Options, Source, Whereabouts},
    stop::StopHandle,
    transport::uri::Uri,
};
use serde_json::{Map, Value, json};

pub use self::report::PostcopyReport;
use self::{
    record::{Identity, Record},
    resume::{AtTheDesk, Desk, Steers},
};
use crate::{
    args::{SEVERAL, SendArgs},
    connect::PatientConnector,
    exit::Exit,
    printable,
    progress::Display,
    qmp::{End, Preempt, Qmp, RunState, Settings, WatchedPostcopy},
    replace,
    report::{MigrationReport, Outcome, fields},
    role::Role,
    rounds::Rounds,
    shell, signals,
    units::Limit,
};

/// What is known of a destination beside its connections.
pub struct There<'a> {
    /// What an operator types to go on with the VM once this process has ended; options follow.
    pub to_go_on: String,
    /// Asked when a connection broke, and before a recovery begins.
    pub after_break: &'a mut dyn FnMut() -> Broken,
}

/// What a destination does whose connection broke.
pub enum Broken {
    /// It listens again if the operator has it do so.
    NotAsked,
    /// It listens again, there.
    Listens(Uri),
    /// It takes no other connection: how to end then, and why.
    Ended(Exit, String),
}

/// Hands the VM in `checkpoint` over, or goes on with one that was.
pub fn run<'a>(args: &'a SendArgs, checkpoint: &'a Checkpoint, there: There<'a>) -> Outcome {
    if let Some(refused) = refused(args, checkpoint) {
        return Outcome::failed(Exit::Usage, refused);
    }
    let list = args.postcopy.record_faults.as_deref();
    if let Some(list) = list
        && let Err(error) = replace::check(list)
    {
        return Outcome::failed(Exit::Failed, format!("--record-faults {list:?}: {error}"));
    }
    let options = match options(args, checkpoint) {
        Ok(options) => options,
        Err(message) => return Outcome::failed(Exit::Failed, message),
    };
    let mut source = match Source::new(checkpoint, options) {
        Ok(source) => source,
        Err(error) => return Outcome::failed(Exit::from(&error), error),
    };
    let desk = Desk::new(source.handle());
    let commands = Steers::new(desk.clone(), source.stop_handle());
    let settings = Settings::of_postcopy(
        Preempt(args.postcopy.preempt),
        args.transfer.max_bandwidth.and_then(|rate| rate.0).unwrap_or(0),
    );
    let begun = end_on_interrupt(source.stop_handle(), desk.clone())
        .and_then(|()| Qmp::listen(args.qmp.as_ref(), RunState::Paused, settings, false, commands));
    let (qmp, _listening) = match begun {
        Ok(monitor) => monitor,
        Err(error) => return Outcome::failed(Exit::Failed, error),
    };
    let watched = WatchedPostcopy::begin(qmp.clone(), &source, args.postcopy.recover);
    source.observe(AtTheDesk { inner: watched, desk: desk.clone() });
    let postcopy = &args.postcopy;
    let path: PathBuf =
        postcopy.state.clone().unwrap_or_else(|| Record::place(&args.file, postcopy.clone && !postcopy.recover));
    let destination = args.uri.to_string();
    let begin = || Record::begin(&path, checkpoint, &destination);
    let record = match postcopy.recover {
        true => Record::resume(&path, checkpoint, postcopy.state.is_some()),
        false if postcopy.clone => Record::begin_clone(&path, || Identity::of(checkpoint), &destination),
        false if postcopy.state.is_some() => begin(),
        false => Record::check_names(&args.file).and_then(|()| begin()),
    };
    match record {
        Ok(record) => {
            let mut to = args.uri.clone();
            if postcopy.recover {
                source.set_vm(record.vm());
                match (there.after_break)() {
                    Broken::NotAsked => {}
                    Broken::Listens(place) => to = place,
                    Broken::Ended(exit, why) => {
                        record.leave_as_found();
                        qmp.finish_as(End::Failed(why.clone()), RunState::Paused);
                        return Outcome::failed(exit, why);
                    }
                }
            }
            let (qmp, begun) = (qmp.clone(), Instant::now());
            Sending { args, checkpoint, source, record, qmp, desk, to, there, reached: false, is_reached: false, begun }
                .run()
        }
        Err(error) => {
            qmp.finish_as(End::Failed(error.to_string()), RunState::Paused);
            Outcome::failed(Exit::Failed, error)
        }
    }
}

/// Has an interrupt end what is under way, and the wait for a client.
///
/// # Errors
/// The kernel's.
fn end_on_interrupt(stop: StopHandle, desk: Arc<Desk>) -> io::Result<()> {
    signals::on_interrupt(signals::Hangup::Interrupts, move || {
        stop.cancel();
        desk.end();
    })
}

/// Why it cannot be a postcopy at all.
fn refused(args: &SendArgs, checkpoint: &Checkpoint) -> Option<String> {
    if checkpoint.machine().starts_with("multifd") {
        return Some("the built-in guest takes no postcopy; expected the checkpoint of a QEMU".to_owned());
    }
    match &args.uri {
        Uri::File(_) => Some(format!("{}: a file runs no VM; expected {SEVERAL}", args.uri)),
        _ => None,
    }
}

/// # Errors
/// What is wrong with the list of pages.
fn options(args: &SendArgs, checkpoint: &Checkpoint) -> Result<Options, String> {
    let mut options = Options::default();
    options.preempt = args.postcopy.preempt;
    options.uuid = args.uuid.or(checkpoint.uuid()).filter(|uuid| *uuid != [0; 16]);
    options.max_bandwidth = args.transfer.max_bandwidth.and_then(|rate| rate.0);
    options.stall_limit = args.transfer.link.stall_timeout.0;
    options.prefetch_when = args.postcopy.prefetch_when.into();
    options.record_faults = args.postcopy.record_faults.is_some();
    if let Some(list) = &args.postcopy.prefetch {
        options.prefetch = lists::read(list)?;
    }
    Ok(options)
}

/// How long a destination is waited for.
enum Patience {
    /// Until it listens.
    AtFirst(Limit<Duration>),
    /// Until it listens again, and the network is back.
    AfterBreak(Limit<Duration>),
}

/// A VM that is being sent.
struct Sending<'a> {
    args: &'a SendArgs,
    checkpoint: &'a Checkpoint,
    source: Source,
    record: Record,
    qmp: Qmp,
    desk: Arc<Desk>,
    /// Where the destination is.
    to: Uri,
    there: There<'a>,
    /// A destination has taken a connection.
    reached: bool,
    /// The same, in the last attempt.
    is_reached: bool,
    begun: Instant,
}

impl Sending<'_> {
    fn run(mut self) -> Outcome {
        let display = Display::new(Role::Source, &self.args.output, &self.source.progress());
        let sent = match self.args.postcopy.recover {
            true => self.recover(self.at_first()),
            false => self.hand_over(),
        };
        let sent = sent.or_else(|error| self.go_on(error));
        drop(display);
        let end = self.end(sent.as_ref().err());
        let qmp = self.qmp.clone();
        let outcome = self.conclude(sent.err());
        // The note is gone, or says how to go on, before clients hear of the end.
        let run_state = if matches!(end, End::Completed(_)) { RunState::PostMigrate } else { RunState::Paused };
        qmp.finish_as(end, run_state);
        outcome
    }

    /// How the clients are told that it ended.
    fn end(&self, error: Option<&Error>) -> End {
        match (error, self.source.vm()) {
            (None, _) => {
                let (progress, rounds) = (self.source.progress(), Rounds::default());
                let page_size = checkpoint::PAGE_SIZE;
                let report =
                    MigrationReport::partial(Role::Source, &progress, &rounds, page_size, self.begun.elapsed());
                End::Completed(Box::new(report))
            }
            (Some(error), Whereabouts::There | Whereabouts::InDoubt) => End::PostcopyPaused(error.to_string()),
            (Some(Error::Cancelled), _) => End::Cancelled,
            (Some(error), _) => End::Failed(error.to_string()),
        }
    }

    fn hand_over(&mut self) -> Result<(), Error> {
        let connector = self.connector(self.at_first())?;
        let (record, qmp) = (&mut self.record, &self.qmp);
        let sent = self.source.hand_over(&connector, &mut || {
            qmp.hands_over();
            Ok(record.hand_over()?)
        });
        self.reached |= connector.is_connected();
        sent
    }

    /// How long the destination is waited for at first.
    fn at_first(&self) -> Patience {
        Patience::AtFirst(self.args.transfer.connect_timeout)
    }

    fn recover(&mut self, patience: Patience) -> Result<(), Error> {
        let connector = self.connector(patience)?;
        let recovered = self.source.recover(&connector);
        self.is_reached = connector.is_connected();
        self.reached |= self.is_reached;
        recovered
    }

    /// Tries again while the destination listens again and takes pages. Once a client has paused it, or said where to go on, clients
    /// say each time what is next.
    fn go_on(&mut self, mut error: Error) -> Result<(), Error> {
        let mut led = false;
        let mut gain = Gain::default();
        let limit = self.args.postcopy.recovery_limit();
        while self.may_go_on(&error) {
            led |= is_paused(&error);
            self.qmp.postcopy_pauses();
            let patience = match (self.next_place(&error, led), limit) {
                (Some(to), _) => {
                    (self.to, led) = (to, true);
                    self.at_first()
                }
                (None, Limit(Some(Duration::ZERO))) => break,
                // It was waited for already (--connect-timeout).
                (None, _) if !self.reached && !led => break,
                (None, _) if led => break,
                (None, limit) => {
                    match (self.there.after_break)() {
                        Broken::Ended(..) => break,
                        Broken::Listens(to) => {
                            tracing::warn!("{error}; the QEMU listens again, goes on there");
                            self.to = to;
                        }
                        Broken::NotAsked => tracing::warn!(
                            "{error}; tries for {} s to go on: have the QEMU listen again, {}",
                            limit.0.unwrap_or_default().as_secs_f64(),
                            what_to_type(&self.to)
                        ),
                    }
                    Patience::AfterBreak(limit)
                }
            };
            let before = self.pages_sent();
            match self.recover(patience) {
                Ok(()) => return Ok(()),
                // It was waited for.
                Err(again) if !self.is_reached && !led && !is_paused(&again) => return Err(again),
                Err(again) => {
                    let sent = self.pages_sent() > before;
                    let pause = gain.pause_after(self.source.report().lacking, sent, limit, Instant::now());
                    match pause {
                        // A client that names the next place ends the pause, as an interrupt does.
                        Some(pause) if !led => self.desk.rest(pause),
                        None if !led => return Err(again),
                        _ => {}
                    }
                    error = again;
                }
            }
        }
        Err(error)
    }

    /// The place that a client has named since `error`; waits for one if it is `led` by clients, until an interrupt or `quit`.
    fn next_place(&self, error: &Error, led: bool) -> Option<Uri> {
        self.desk.take().or_else(|| {
            led.then(|| {
                tracing::warn!("{error}; waits for a QMP client to say where to go on: migrate with resume, or quit");
                self.desk.wait()
            })?
        })
    }

    fn may_go_on(&self, error: &Error) -> bool {
        let reason = match error {
            Error::Incomplete { reason, .. } | Error::InDoubt { reason } | Error::Unacknowledged { reason } => reason,
            _ => return false,
        };
        let is_final = reason.is_peers_fault()
            || matches!(
                **reason,
                Error::Cancelled | Error::Checkpoint(_) | Error::Panicked { .. } | Error::Thread { .. }
            );
        !is_final && matches!(self.source.vm(), Whereabouts::There | Whereabouts::InDoubt)
    }

    fn pages_sent(&self) -> u64 {
        let report = self.source.report();
        report.urgent_pages + report.background_pages + report.prefetched_pages
    }

    fn connector(&self, patience: Patience) -> Result<PatientConnector, Error> {
        let (Patience::AtFirst(limit) | Patience::AfterBreak(limit)) = patience;
        let connector = PatientConnector::new(&self.to, &self.args.transfer.link.tls, limit);
        let connector = connector.map(|connector| match patience {
            Patience::AtFirst(_) => connector,
            Patience::AfterBreak(_) => connector.after_break("--recover-timeout"),
        });
        connector.map_err(|source| Error::Io {
            at: multifd::error::Place { connection: Connection::Main, offset: 0 },
            source,
        })
    }

    fn conclude(self, error: Option<Error>) -> Outcome {
        let mut report = report_of(&self.source, self.checkpoint, self.begun.elapsed());
        let list = self.args.postcopy.record_faults.as_deref();
        let unwritten = list.and_then(|list| {
            let written = lists::write(list, &self.source.faults(), self.checkpoint.machine());
            written.err().map(|error| format!("{list:?}: {error}"))
        });
        let Sending { args, source, record, checkpoint, there, to, .. } = self;
        let note = record.path().to_owned();
        if let Whereabouts::InDoubt | Whereabouts::There = source.vm() {
            report.insert("state".to_owned(), note.display().to_string().into());
        }
        record.leave(source.vm(), error.as_ref());
        let text = PostcopyReport::from(&source.report()).text();
        match (error, unwritten) {
            (None, None) => Outcome::done(report, summary(args, checkpoint, &to, &text)),
            (None, Some(message)) => {
                let message =
                    format!("the destination has everything, but the list of pages could not be written: {message}");
                Outcome { exit: Exit::Failed, error: Some(message), report, text: String::new() }
            }
            (Some(error), unwritten) => {
                let unwritten = unwritten.map(|message| format!("; the list of pages could not be written: {message}"));
                let message = match advice(&error, args, &there.to_go_on, &note) {
                    Some(advice) => sentences(&error.to_string(), &advice),
                    None => error.to_string(),
                };
                let message = message + &unwritten.unwrap_or_default();
                Outcome { error: Some(message), ..Outcome::migration_failed(&error, report) }
            }
        }
    }
}

/// Follows whether recoveries bring the destination anything.
#[derive(Default)]
struct Gain {
    /// The fewest pages that it lacked when it was asked.
    least: Option<u64>,
    /// Since when they bring it nothing, and how long the last pause was.
    in_vain: Option<(Instant, Duration)>,
}

impl Gain {
    /// Takes note of a recovery that failed at `now`, before which the destination lacked `lacking` pages, if it said so, and in which
    /// pages were `sent` or none. Returns how long to wait before the next one: longer each time that they bring it nothing, and nothing
    /// once that was so for the `limit`. A connection may break before a page arrives, but not each time; what forwards connections may take
    /// them where no QEMU listens yet.
    fn pause_after(
        &mut self,
        lacking: Option<u64>,
        sent: bool,
        limit: Limit<Duration>,
        now: Instant,
    ) -> Option<Duration> {
        let lacks_fewer = match (self.least, lacking) {
            (Some(least), Some(lacking)) => lacking < least,
            (None, Some(_)) => true,
            // It did not get as far as to say so.
            (_, None) => false,
        };
        self.least = self.least.into_iter().chain(lacking).min();
        if sent && lacks_fewer {
            self.in_vain = None;
            return Some(Duration::ZERO);
        }
        let (since, pause) = self.in_vain.map_or((now, SHORTEST_PAUSE), |(since, pause)| (since, pause * 2));
        let pause = pause.min(LONGEST_PAUSE);
        self.in_vain = Some((since, pause));
        let is_over = limit.0.is_some_and(|limit| now.saturating_duration_since(since) >= limit);
        (!is_over).then_some(pause)
    }
}

/// Between two recoveries of which the first has brought nothing.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// The JSON report of what `source` has sent of `checkpoint`, which took `elapsed`.
pub fn report_of(source: &Source, checkpoint: &Checkpoint, elapsed: Duration) -> Map<String, Value> {
    let (figures, progress) = (source.report(), source.progress());
    let migration =
        MigrationReport::partial(Role::Source, &progress, &Rounds::default(), checkpoint::PAGE_SIZE, elapsed);
    let mut report = fields(&migration);
    if let Some(Value::Object(ram)) = report.get_mut("ram") {
        ram.insert("remaining".to_owned(), (figures.left * figures.page_size as u64).into());
        ram.insert("postcopy-requests".to_owned(), figures.requests.into());
        let transferred = ram.get("transferred").cloned().unwrap_or_default();
        ram.insert("postcopy-bytes".to_owned(), transferred);
        ram.insert("precopy-bytes".to_owned(), 0.into());
    }
    report.insert("machine".to_owned(), checkpoint.machine().into());
    report.insert("postcopy".to_owned(), fields(&PostcopyReport::from(&figures)).into());
    report
}

fn summary(args: &SendArgs, checkpoint: &Checkpoint, to: &Uri, text: &str) -> String {
    format!(
        "sent {} from {} to {}; the destination has everything\n{text}",
        printable::line(checkpoint.machine()),
        args.file.display(),
        to,
    )
}

/// Whether a client has paused what ended with `error`.
fn is_paused(error: &Error) -> bool {
    match error {
        Error::Incomplete { reason, .. } | Error::InDoubt { reason } | Error::Unacknowledged { reason } => {
            matches!(**reason, Error::Paused)
        }
        _ => false,
    }
}

/// What to do now, where there is something to do. `to_go_on` is what an operator types.
fn advice(error: &Error, args: &SendArgs, to_go_on: &str, note: &Path) -> Option<String> {
    let state = shell::word(note);
    let recover = || {
        let preempt = if args.postcopy.preempt { " --preempt" } else { "" };
        let is_default = note == Record::place(&args.file, false);
        let state = if is_default { String::new() } else { format!(" --state {state}") };
        format!("{to_go_on}{}{preempt}{state}", args.transfer.link.tls.words())
    };
    let advice = match error {
        Error::Incomplete { .. } => format!(
            "The guest waits for the next page that it does not have, and nothing is lost while that QEMU (status \
             postcopy-paused) and the file are there. To go on: {}",
            recover()
        ),
        Error::InDoubt { .. } => format!(
            "It {} to run the VM and has not said that it did. If that QEMU is there (status postcopy-paused): {}. If \
             it has ended, remove {state} and start again",
            if args.postcopy.recover { "may have been told" } else { "was told" },
            recover()
        ),
        Error::Unacknowledged { .. } => {
            format!("{LOOK_THERE}, and {state} can be removed; if it says postcopy-paused: {}", recover())
        }
        Error::Unconfirmed | Error::Refused { .. } | Error::Io { .. } => NOT_SET_UP.to_owned(),
        _ => return None,
    };
    Some(advice)
}

/// `first` and `second`, one behind the other; the first may end with a question.
pub fn sentences(first: &str, second: &str) -> String {
    format!("{first}{} {second}", if first.ends_with('?') { "" } else { "." })
}

/// Of a VM that did not begin to run.
pub const NOT_SET_UP: &str = "The VM does not run there. A QEMU says nothing on the connection when it is set up otherwise: compare \
    its -machine, -m and devices, -uuid; its memory must not be huge pages (hugetlb); it needs capability postcopy-ram, and postcopy-preempt exactly with --preempt. It writes its \
    reason to its stderr and to error-desc of query-migrate";

/// Of a VM whose last page was sent, and not confirmed.
pub const LOOK_THERE: &str = "That QEMU knows: if its query-migrate says completed, the VM has everything";

/// What has a QEMU listen again.
pub fn what_to_type(uri: &Uri) -> String {
    format!("QMP {}", json!({ "execute": "migrate-recover", "arguments": { "uri": uri.to_string() } }))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Verb};

    /// The command had no `--tls-dir`, with which the first connected, and was another one to a shell where a name has a space.
    #[test]
    fn what_is_typed_to_go_on_fits_what_was_begun() {
        let advice = |options: &str, note: &str| {
            let line =
                ["multifd", "send", "my vm", "tcp:h:1", "--postcopy"].into_iter().chain(options.split_whitespace());
            let Verb::Send(args) = Cli::try_parse_from(line).unwrap().verb else { panic!("another verb") };
            let lost = Error::InDoubt { reason: Box::new(Error::Unconfirmed) };
            advice(&lost, &args, "multifd send 'my vm' URI --recover", Path::new(note)).unwrap()
        };
        let plain = advice("", "my vm.postcopy");
        assert!(plain.contains("multifd send 'my vm' URI --recover. If"), "{plain}");
        assert!(plain.contains("remove 'my vm.postcopy' and"), "{plain}");
        let tls = advice("--tls-dir /tls --tls-hostname h.example --preempt --state x", "it's");
        let expected = r"URI --recover --tls-dir /tls --tls-hostname h.example --preempt --state 'it'\''s'. If";
        assert!(tls.contains(expected), "{tls}");
    }

    /// A destination that said each time that it has got nothing was recovered without an end, 185 times in 10 s; and then ten times, which
    /// were over in 30 ms where something between takes connections and closes them, whatever `--recover-timeout` was.
    #[test]
    fn recoveries_that_bring_nothing_come_to_an_end_after_the_time_that_is_set() {
        let (limit, begun) = (Duration::from_secs(30), Instant::now());
        let mut gain = Gain::default();
        for lacking in (2..100).rev() {
            let pause = gain.pause_after(Some(lacking), true, Limit(Some(limit)), begun);
            assert_eq!(pause, Some(Duration::ZERO), "fewer each time");
        }
        for in_vain in [(Some(50), true), (Some(1), false), (None, false)] {
            let (mut now, mut tries) = (begun, 0);
            while let Some(pause) = gain.pause_after(in_vain.0, in_vain.1, Limit(Some(limit)), now) {
                (now, tries) = (now + pause, tries + 1);
            }
            let took = now - begun;
            assert!(took >= limit && took < limit + 2 * LONGEST_PAUSE && (15..30).contains(&tries), "{took:?} {tries}");
            gain = Gain { least: Some(50), in_vain: None };
        }
        // One that brings something is as a first one.
        gain.pause_after(None, false, Limit(Some(limit)), begun);
        let gained = gain.pause_after(Some(49), true, Limit(Some(limit)), begun + limit);
        assert_eq!(gained, Some(Duration::ZERO));
        assert_eq!(gain.pause_after(Some(49), true, Limit(Some(limit)), begun + 2 * limit), Some(SHORTEST_PAUSE));
    }
}
