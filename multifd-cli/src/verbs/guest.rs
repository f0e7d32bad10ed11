//! `multifd guest`: runs the built-in guest, migrates it away, or waits for one to come.
//!
//! One loop decides everything: it waits for events, and whatever blocks runs in a thread of its own that sends one.
//! While a migration is under way its thread has the guest; status comes from a monitor that works meanwhile.

mod answers;
mod ending;

use std::{
    io,
    sync::mpsc::{self, RecvTimeoutError},
    time::{Duration, Instant},
};

use multifd::{
    destination::Destination,
    error::Error,
    source::{self, Source},
    stop::StopHandle,
    threads,
    transport::uri::Uri,
};
use multifd_guest::guest::{Guest, Monitor};
use serde::Serialize;
use serde_json::{Map, Value};

pub use self::ending::{Account, Compared};
use crate::{
    advice,
    args::{GuestArgs, Incoming},
    connect::PatientConnector,
    exit::Exit,
    files,
    lend::lend,
    listening,
    progress::Display,
    qmp::{Command, Commands, End, Listening, Qmp, Role, RunState, Settings, Watched},
    report::{Audit, ChannelCompression, MigrationReport, Outcome, fields},
    signals::{self, Hangup},
    terminal,
};

/// Runs the guest until it has left, failed to come, or is told to end.
pub fn run(args: &GuestArgs) -> Outcome {
    if let Some(parent) = args.child_of
        && let Err(error) = end_with(parent)
    {
        return Outcome::failed(Exit::Failed, error);
    }
    let (events, arrivals) = mpsc::channel();
    match Session::new(args, events) {
        Ok(session) => session.run(&arrivals),
        Err(outcome) => *outcome,
    }
}

/// Something happened.
enum Event {
    /// Ctrl-C or SIGTERM.
    Interrupt,
    /// SIGUSR1.
    Resume,
    /// A command of a QMP client.
    Request(Request),
    /// The migration is over.
    Migrated(Box<Migrated>),
    /// The guest has made its first pass, or the time for it is over: it may be migrated at this moment.
    FirstPass(Instant),
    /// The guest has made the passes that it was to make before the end, or the time for it is over.
    Finish,
}

/// A command that waits for its answer.
struct Request {
    command: Command,
    answer: mpsc::Sender<Result<Value, String>>,
}

/// Has the main loop run the commands of QMP clients.
struct ByTheLoop(mpsc::Sender<Event>);

impl Commands for ByTheLoop {
    fn run(&self, command: Command) -> Result<Value, String> {
        let (answer, answered) = mpsc::channel();
        let gone = |_| "the guest has ended".to_owned();
        self.0.send(Event::Request(Request { command, answer })).map_err(|_| gone(mpsc::RecvError))?;
        answered.recv().map_err(gone)?
    }
}

/// How a migration ended.
struct Migrated {
    guest: Guest,
    result: Result<MigrationReport, Failed>,
}

/// A migration that did not come to its end.
struct Failed {
    exit: Exit,
    message: String,
    report: Map<String, Value>,
    /// The guest was not resumed: it may run on the destination, or it could not.
    stands_still: bool,
}

/// What this process has of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    /// It runs here.
    Running,
    /// It is here, and paused by a QMP client.
    Stopped,
    /// It is on its way to us.
    Incoming,
    /// It runs here and is on its way to another process.
    Outgoing,
    /// Paused here, in doubt: only an operator who knows that it runs nowhere else may resume it.
    Paused,
    /// It is gone.
    Migrated,
}

struct Session<'a> {
    args: &'a GuestArgs,
    events: mpsc::Sender<Event>,
    /// Not here while a migration has it.
    guest: Option<Guest>,
    monitor: Monitor,
    state: State,
    /// What cancels the migration under way.
    stop: Option<StopHandle>,
    /// When the next thing happens by itself: the migration begins, or the time of the guest is over.
    deadline: Option<Instant>,
    targets: std::vec::IntoIter<Uri>,
    /// When the last migration ended.
    passes_before: u64,
    /// The report of the last migration.
    report: Map<String, Value>,
    failure: Option<(Exit, String)>,
    compared: Option<Compared>,
    /// What the audit of the migration found that brought the guest.
    audit: Option<Audit>,
    /// What is worth telling of the last migration, in lines.
    details: Vec<String>,
    /// Passes and time after which to end, once the guest has come.
    finish_when_here: Option<(u64, Duration)>,
    /// A guest that cannot come does not end the process before its clients have seen why.
    stays_after_failure: bool,
    qmp: Qmp,
    _listening: Listening,
}

impl<'a> Session<'a> {
    fn new(args: &'a GuestArgs, events: mpsc::Sender<Event>) -> Result<Session<'a>, Box<Outcome>> {
        let failed = |error: &dyn ToString| Box::new(Outcome::failed(Exit::Failed, error.to_string()));
        let interrupts = events.clone();
        signals::on_interrupt(Hangup::IsIgnored, move || drop(interrupts.send(Event::Interrupt)))
            .map_err(|error| failed(&error))?;
        let resumes = events.clone();
        signals::on_resume(move || drop(resumes.send(Event::Resume))).map_err(|error| failed(&error))?;
        let config = args.machine.config(args.verify);
        let guest = if args.incoming.is_some() { Guest::create_incoming(&config) } else { Guest::create(&config) };
        let guest = guest.map_err(|error| failed(&error))?;
        tracing::info!("{}", guest.kind_reason());
        let run_state = if args.incoming.is_some() { RunState::InMigrate } else { RunState::Running };
        let settings = Settings::of(&args.transfer);
        let commands = ByTheLoop(events.clone());
        let (qmp, _listening) =
            Qmp::listen(args.qmp.as_ref(), run_state, settings, true, commands).map_err(|error| failed(&error))?;
        let mut report = Map::new();
        report.insert("guest".to_owned(), guest.kind().name().into());
        report.insert("guest-reason".to_owned(), guest.kind_reason().into());
        report.insert("dirty-log".to_owned(), guest.dirty_log_choice().name().into());
        if let Some(reason) = guest.dirty_log_reason() {
            report.insert("dirty-log-reason".to_owned(), reason.into());
        }
        Ok(Session {
            args,
            monitor: guest.monitor(),
            guest: Some(guest),
            state: State::Running,
            stop: None,
            deadline: None,
            targets: args.migrate_to.clone().into_iter(),
            passes_before: 0,
            report,
            failure: None,
            compared: None,
            audit: None,
            details: Vec::new(),
            finish_when_here: None,
            stays_after_failure: false,
            events,
            qmp,
            _listening,
        })
    }

    fn run(mut self, arrivals: &mpsc::Receiver<Event>) -> Outcome {
        if let Some(incoming) = &self.args.incoming {
            self.set_state(State::Incoming);
            if let Incoming::At(uri) = incoming
                && let Err(error) = self.receive(uri)
            {
                return Outcome::failed(Exit::Failed, error);
            }
        } else {
            self.guest_mut().run();
            let begin = Instant::now() + self.args.after;
            match self.targets.len() {
                0 => self.deadline = self.args.run_for.map(|time| Instant::now() + time),
                _ if self.args.after_first_pass => {
                    let within = self.args.machine.time_for_passes(1);
                    if let Err(error) = self.after_passes(1, within, Event::FirstPass(begin)) {
                        return Outcome::failed(Exit::Failed, error);
                    }
                }
                _ => self.deadline = Some(begin),
            }
        }
        while let Some(event) = self.next(arrivals) {
            match event {
                Event::Interrupt => match &self.stop {
                    Some(stop) => stop.cancel(),
                    None => {
                        if self.targets.len() > 0 || self.state == State::Incoming {
                            // It was to leave, or to come, and has not even begun.
                            self.failure = Some((Exit::Cancelled, Error::Cancelled.to_string()));
                        }
                        break;
                    }
                },
                Event::Resume => match self.answer_resume() {
                    Ok(_) => self.say("the guest runs on here"),
                    Err(error) => self.say(&format!("SIGUSR1: {error}")),
                },
                Event::Request(request) => {
                    let (answer, end) = self.answer(&request.command);
                    // Who asked may be gone.
                    let _ = request.answer.send(answer);
                    if end {
                        break;
                    }
                }
                Event::Migrated(migrated) => {
                    if self.migrated(*migrated) {
                        break;
                    }
                }
                // Unless a command has sent it already.
                Event::FirstPass(begin) if self.state == State::Running => self.deadline = Some(begin),
                Event::FirstPass(_) => {}
                Event::Finish => break,
            }
        }
        let qmp = self.qmp.clone();
        let outcome = self.finish();
        // Whose command ended it gets the answer.
        qmp.wait_clients(LAST_ANSWER);
        outcome
    }

    /// The next event; `None` when the time of the guest is over.
    fn next(&mut self, arrivals: &mpsc::Receiver<Event>) -> Option<Event> {
        loop {
            let event = match self.deadline {
                Some(deadline) => arrivals.recv_timeout(deadline.saturating_duration_since(Instant::now())),
                None => arrivals.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match event {
                Ok(event) => return Some(event),
                Err(RecvTimeoutError::Disconnected) => unreachable!("`self` holds a sender"),
                Err(RecvTimeoutError::Timeout) => {
                    self.deadline = None;
                    let uri = self.targets.next()?;
                    self.send(uri, self.args.transfer.source_options(MACHINE));
                }
            }
        }
    }

    /// Begins to wait for a guest.
    fn receive(&mut self, uri: &Uri) -> io::Result<()> {
        let listener = uri.listener()?;
        let at = listener.uri().clone();
        let listener = self.args.listen.allow.listener(Box::new(listener));
        let listener = self.args.transfer.link.tls.listener(listener)?;
        listening::announce(&format!("listening on {at}"));
        let mut options = self.args.transfer.destination_options();
        options.audit = self.args.audit;
        options.max_unidentified = self.args.listen.max_unidentified.into();
        let destination = Destination::new(options);
        self.stop = Some(destination.stop_handle());
        self.qmp.begin(Role::Destination, destination.progress(), None, Some(at));
        let qmp = self.qmp.clone();
        let mut display = Display::new(Role::Destination, &self.args.output, &destination.progress());
        self.spawn(move |guest| {
            let (progress, begun) = (destination.progress(), Instant::now());
            let watched = &mut Watched::new(&mut display, qmp, Role::Destination);
            let result = destination.run(guest, listener, watched);
            let page_size = multifd_guest::pattern::PAGE_SIZE;
            match result {
                Ok(report) => Ok(MigrationReport::received(&report, page_size, guest.verify_time())),
                Err(error) => {
                    let partial = MigrationReport::partial(
                        Role::Destination,
                        &progress,
                        &display.rounds(),
                        page_size,
                        begun.elapsed(),
                    );
                    Err(Failed { message: advice::for_receiver(&error), ..Failed::new(&error, &partial) })
                }
            }
        });
        Ok(())
    }

    /// Begins to migrate the guest to `uri`.
    fn send(&mut self, uri: Uri, options: source::Options) {
        let source = Source::new(options.clone());
        self.stop = Some(source.stop_handle());
        self.state = State::Outgoing;
        self.qmp.begin(Role::Source, source.progress(), Some(source.handle()), None);
        let qmp = self.qmp.clone();
        let mut display = Display::of_source(&self.args.output, source.handle(), &options);
        let limit = self.args.transfer.connect_timeout;
        let tls = self.args.transfer.link.tls.clone();
        self.spawn(move |guest| {
            let (progress, begun) = (source.progress(), Instant::now());
            let connector = PatientConnector::new(&uri, &tls, limit);
            let connector = connector.map_err(|error| Failed::by_io(&error))?;
            let watched = &mut Watched::new(&mut display, qmp, Role::Source);
            let result = source.run(guest, &connector, watched);
            let page_size = multifd_guest::pattern::PAGE_SIZE;
            match result {
                Ok(report) => Ok(MigrationReport::sent(&report, guest.verify_time())),
                Err(error) => {
                    let rounds = display.rounds();
                    let partial =
                        MigrationReport::partial(Role::Source, &progress, &rounds, page_size, begun.elapsed());
                    let mut failed = Failed::new(&error, &partial);
                    if let (Error::DoesNotConverge { .. }, Some(lack)) = (&error, display.lack()) {
                        failed.message = format!("{}; at this write rate it {lack}", failed.message);
                    }
                    Err(failed)
                }
            }
        });
    }

    /// Runs `migrate` in a thread, which has the guest meanwhile.
    fn spawn(&mut self, migrate: impl FnOnce(&mut Guest) -> Result<MigrationReport, Failed> + Send + 'static) {
        let guest = self.guest.take().expect("no other migration is under way");
        let events = self.events.clone();
        let done = move |guest: Guest, result: Result<_, String>| {
            let result = result.unwrap_or_else(|message| Err(Failed::by_panic(&message, &guest)));
            // The main loop is only gone when the process is about to end.
            let _ = events.send(Event::Migrated(Box::new(Migrated { guest, result })));
        };
        if let Err((guest, error)) = lend("migration", guest, migrate, done) {
            let result = Err(Failed::by_io(&no_thread("runs the migration", &error)));
            let _ = self.events.send(Event::Migrated(Box::new(Migrated { guest, result })));
        }
    }

    /// A migration is over. Returns whether that was all.
    fn migrated(&mut self, migrated: Migrated) -> bool {
        let was = self.state;
        self.stop = None;
        let guest = self.guest.insert(migrated.guest);
        // A guest that came brought its own idea of how much memory a pass is.
        self.monitor = guest.monitor();
        self.passes_before = self.monitor.status().passes;
        self.report.insert("dirty-log".to_owned(), guest.dirty_log_choice().name().into());
        match migrated.result {
            Ok(report) => {
                self.failure = None;
                let left = was == State::Outgoing;
                let run_state = if left { RunState::PostMigrate } else { RunState::Running };
                self.qmp.end(End::Completed(Box::new(report.clone())), run_state);
                self.report.extend(fields(&report));
                self.details = report.auto_compression.iter().map(ChannelCompression::text).collect();
                self.details.extend(report.zero_copy.map(|zero_copy| format!("zero-copy: {}", zero_copy.text())));
                self.audit = report.audit.or(self.audit.take());
                if was == State::Outgoing {
                    self.set_state(State::Migrated);
                    return !self.stays_for_clients();
                }
                self.compared = guest.verified().map(|verified| Compared {
                    pages_compared: verified.pages_compared,
                    pages_different: verified.pages_different,
                    differences: verified.differences.clone(),
                });
                self.set_state(State::Running);
                self.say("the guest runs here");
                self.deadline = self.args.run_for.map(|time| Instant::now() + time);
                if let Some((passes, within)) = self.finish_when_here.take()
                    && let Err(error) = self.after_passes(passes, within, Event::Finish)
                {
                    self.say(&format!("the guest does not end by itself: {error}"));
                }
                false
            }
            Err(failed) => {
                self.report.extend(failed.report);
                let end = match failed.exit {
                    Exit::Cancelled => End::Cancelled,
                    _ => End::Failed(failed.message.clone()),
                };
                let run_state = match (was, failed.stands_still) {
                    (State::Incoming, _) => RunState::InMigrate,
                    (_, true) => RunState::FinishMigrate,
                    (_, false) => RunState::Running,
                };
                self.qmp.end(end, run_state);
                if was == State::Incoming {
                    self.failure = Some((failed.exit, failed.message));
                    return !(self.stays_after_failure && self.stays_for_clients());
                }
                if failed.stands_still {
                    // Another target would get a guest that may run already.
                    self.set_state(State::Paused);
                    if self.args.child_of.is_none() {
                        // Not even --quiet hides it: this process has what may be the only copy.
                        terminal::say(&format!("{}\n{}", failed.message, what_now()));
                    }
                    self.failure = Some((failed.exit, failed.message));
                    // The demo gives no commands; it ends.
                    return self.args.qmp.is_none() && self.args.child_of.is_some();
                }
                self.set_state(State::Running);
                self.say(&format!("{}; the guest runs on here", failed.message));
                let cancelled = failed.exit == Exit::Cancelled;
                self.failure = Some((failed.exit, failed.message));
                if cancelled {
                    // A cancel of one attempt is meant for the following ones, too.
                    self.targets = Vec::new().into_iter();
                }
                let lasting = match (&self.args.run_for, &self.args.qmp) {
                    (Some(time), _) => Some(*time),
                    (None, Some(_)) => None,
                    (None, None) => Some(AFTER_FAILURE),
                };
                self.deadline = match self.targets.len() {
                    0 => lasting.map(|time| Instant::now() + time),
                    _ => Some(Instant::now()),
                };
                false
            }
        }
    }

    /// Whether clients are connected, who may want to see how the migration went. Then the process ends when they have gone,
    /// or one says quit.
    fn stays_for_clients(&self) -> bool {
        if !self.qmp.has_clients() {
            return false;
        }
        let (qmp, events) = (self.qmp.clone(), self.events.clone());
        let waits = move || {
            while !qmp.wait_clients(Duration::from_secs(3600)) {}
            // The main loop is only gone when the process is about to end.
            let _ = events.send(Event::Finish);
        };
        threads::spawn("qmp clients", waits).is_ok()
    }

    fn set_state(&mut self, state: State) {
        self.state = state;
        self.qmp.set_run_state(match state {
            State::Running | State::Outgoing => RunState::Running,
            State::Stopped => RunState::Paused,
            State::Incoming => RunState::InMigrate,
            State::Paused => RunState::FinishMigrate,
            State::Migrated => RunState::PostMigrate,
        });
    }

    /// Has `event` sent when the guest has made `passes`, or the time is over.
    ///
    /// # Errors
    /// The kernel's, where there is no thread for it.
    fn after_passes(&self, passes: u64, within: Duration, event: Event) -> io::Result<()> {
        let (monitor, events) = (self.monitor.clone(), self.events.clone());
        let within = within.min(Duration::from_secs(u32::MAX.into()));
        let wait = move || {
            monitor.wait_passes(passes, within);
            // The main loop is only gone when the process is about to end.
            let _ = events.send(event);
        };
        threads::spawn("passes", wait).map(drop)
    }

    fn say(&self, line: &str) {
        if !self.args.output.quiet && self.args.child_of.is_none() {
            terminal::say(line);
        }
    }

    fn guest_mut(&mut self) -> &mut Guest {
        self.guest.as_mut().expect("no migration is under way")
    }
}

impl Failed {
    fn new(error: &Error, report: &MigrationReport) -> Failed {
        Failed {
            exit: Exit::from(error),
            message: files::message(error),
            report: fields(report),
            stands_still: matches!(error, Error::InDoubt { .. } | Error::NotResumed { .. }),
        }
    }

    /// The thread of the migration panicked, and `guest` is as it left it.
    fn by_panic(message: &str, guest: &Guest) -> Failed {
        let stands_still = guest.is_paused();
        let state = if stands_still { "; the guest is paused here" } else { "" };
        let message = format!("the migration panicked: {message}{state}");
        Failed { exit: Exit::Failed, message, report: Map::new(), stands_still }
    }

    fn by_io(error: &io::Error) -> Failed {
        Failed { exit: Exit::Failed, message: error.to_string(), report: Map::new(), stands_still: false }
    }
}

/// What an operator can do with a guest that is paused in doubt.
fn what_now() -> String {
    let pid = std::process::id();
    format!(
        "Look whether the guest runs at the destination. If it does not: x-guest-resume on the QMP socket, or kill -USR1 \
         {pid}, resumes it here. If it does: quit, or kill {pid}, ends this process and its paused copy. Until then it waits."
    )
}

/// The message about a thread that `what`s and cannot be created.
fn no_thread(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot create the thread that {what}: {error}"))
}

/// Has the kernel end this process together with its parent, which has to be `parent`.
fn end_with(parent: i32) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    // It may have ended before.
    if rustix::process::getppid().map(rustix::process::Pid::as_raw_nonzero).is_none_or(|pid| pid.get() != parent) {
        return Err(io::Error::other("the process that started this one has ended"));
    }
    Ok(())
}

/// What our guests are called in the stream.
const MACHINE: &str = "multifd";
/// How long a process that is done stays until its clients have gone.
const LAST_ANSWER: Duration = Duration::from_millis(200);
/// How long a guest that could not leave runs on, to show that it does.
const AFTER_FAILURE: Duration = Duration::from_secs(1);
