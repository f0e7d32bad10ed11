//! `multifd guest`: runs the built-in guest, migrates it away, or waits for one to come.
//!
//! One loop decides everything: it waits for events, and whatever blocks runs in a thread of its own that sends one.
//! While a migration is under way its thread has the guest; status comes from a monitor that works meanwhile.

use std::{
    io,
    sync::mpsc::{self, RecvTimeoutError},
    time::{Duration, Instant},
};

use multifd::{
    destination::Destination, error::Error, source::Source, stop::StopHandle, threads, transport::uri::Uri,
    vm::SourceVm,
};
use multifd_guest::{
    guest::{Guest, Monitor, Status},
    pattern::CheckReport,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    args::{GuestArgs, destination_uri},
    connect::PatientConnector,
    control::{Command, Control, Request},
    exit::Exit,
    lend::lend,
    progress::Display,
    report::{Audit, ChannelCompression, MigrationReport, Outcome, fields},
    signals::{self, Hangup},
    table, terminal,
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
    /// A command on the control socket.
    Request(Request),
    /// The migration is over.
    Migrated(Box<Migrated>),
    /// The guest has made its first pass, or the time for it is over: it may be migrated at this moment.
    FirstPass(Instant),
    /// The guest has made the passes that it was to make before the end, or the time for it is over.
    Finish,
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
    /// It is on its way to us.
    Incoming,
    /// It runs here and is on its way to another process.
    Outgoing,
    /// Paused here, in doubt: only an operator who knows that it runs nowhere else may resume it.
    Paused,
    /// It is gone.
    Migrated,
}

/// What the guest found out about itself while it was here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Account {
    /// Passes over its memory when it came, or when the last attempt to migrate it ended.
    pub guest_passes_before: u64,
    /// The same at the end.
    pub guest_passes_after: u64,
    /// What the guest found wrong itself.
    pub guest_errors: u64,
    /// Pages compared with what they have to be, at the end.
    pub pages_checked: u64,
    /// How many of them were different.
    pub pages_wrong: u64,
}

/// The comparison with the source's digests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Compared {
    /// All pages of all blocks.
    pub pages_compared: u64,
    /// How many of them were different.
    pub pages_different: u64,
    /// The first of those.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub differences: Vec<(String, u64)>,
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
    _control: Option<Control>,
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
        let control = match &args.control {
            Some(Uri::Unix(path)) => {
                let events = events.clone();
                let listen = Control::listen(path, move |request| drop(events.send(Event::Request(request))));
                Some(listen.map_err(|error| failed(&format!("unix:{}: {error}", path.display())))?)
            }
            _ => None,
        };
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
            events,
            _control: control,
        })
    }

    fn run(mut self, arrivals: &mpsc::Receiver<Event>) -> Outcome {
        if let Some(uri) = &self.args.incoming {
            if let Err(error) = self.receive(uri) {
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
                        if self.targets.len() > 0 {
                            // It was to leave and has not even begun.
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
        self.finish()
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
                    self.send(uri);
                }
            }
        }
    }

    /// Begins to wait for a guest.
    fn receive(&mut self, uri: &Uri) -> io::Result<()> {
        let listener = uri.listener()?;
        terminal::say(&format!("listening on {}", listener.uri()));
        let mut options = self.args.transfer.destination_options();
        options.audit = self.args.audit;
        let destination = Destination::new(options);
        self.stop = Some(destination.stop_handle());
        self.state = State::Incoming;
        let mut display = Display::new(&self.args.output, &destination.progress());
        self.spawn(move |guest| {
            let (progress, begun) = (destination.progress(), Instant::now());
            let result = destination.run(guest, Box::new(listener), &mut display);
            let page_size = multifd_guest::pattern::PAGE_SIZE;
            match result {
                Ok(report) => Ok(MigrationReport::received(&report, page_size, guest.verify_time())),
                Err(error) => {
                    let partial = MigrationReport::partial(&progress, &display.rounds(), page_size, begun.elapsed());
                    Err(Failed::new(&error, &partial))
                }
            }
        });
        Ok(())
    }

    /// Begins to migrate the guest to `uri`.
    fn send(&mut self, uri: Uri) {
        let source = Source::new(self.args.transfer.source_options(MACHINE));
        self.stop = Some(source.stop_handle());
        self.state = State::Outgoing;
        let mut display = Display::new(&self.args.output, &source.progress());
        let limit = self.args.transfer.connect_timeout;
        self.spawn(move |guest| {
            let (progress, begun) = (source.progress(), Instant::now());
            let connector = PatientConnector::new(&uri, limit, source.stop_handle());
            let connector = connector.map_err(|error| Failed::by_io(&error))?;
            let result = source.run(guest, &connector, &mut display);
            let page_size = multifd_guest::pattern::PAGE_SIZE;
            match result {
                Ok(report) => Ok(MigrationReport::sent(&report, guest.verify_time())),
                Err(error) => {
                    let partial = MigrationReport::partial(&progress, &display.rounds(), page_size, begun.elapsed());
                    Err(Failed::new(&error, &partial))
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
                self.report.extend(fields(&report));
                self.details = report.auto_compression.iter().map(ChannelCompression::text).collect();
                self.details.extend(report.zero_copy.map(|zero_copy| format!("zero-copy: {}", zero_copy.text())));
                self.audit = report.audit.or(self.audit.take());
                if was == State::Outgoing {
                    self.state = State::Migrated;
                    return true;
                }
                self.state = State::Running;
                self.compared = guest.verified().map(|verified| Compared {
                    pages_compared: verified.pages_compared,
                    pages_different: verified.pages_different,
                    differences: verified.differences.clone(),
                });
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
                if was == State::Incoming {
                    self.failure = Some((failed.exit, failed.message));
                    return true;
                }
                if failed.stands_still {
                    // Another target would get a guest that may run already.
                    self.state = State::Paused;
                    if self.args.child_of.is_none() {
                        // Not even --quiet hides it: this process has what may be the only copy.
                        terminal::say(&format!("{}\n{}", failed.message, what_now()));
                    }
                    self.failure = Some((failed.exit, failed.message));
                    // The demo gives no commands; it ends.
                    return self.args.control.is_none() && self.args.child_of.is_some();
                }
                self.state = State::Running;
                self.say(&format!("{}; the guest runs on here", failed.message));
                let cancelled = failed.exit == Exit::Cancelled;
                self.failure = Some((failed.exit, failed.message));
                if cancelled {
                    // A cancel of one attempt is meant for the following ones, too.
                    self.targets = Vec::new().into_iter();
                }
                let lasting = match (&self.args.run_for, &self.args.control) {
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

    /// The answer to a command, and whether it was the last.
    fn answer(&mut self, command: &Command) -> (Result<Value, String>, bool) {
        match command {
            Command::Status => (Ok(self.status()), false),
            Command::Migrate(uri) => (self.answer_migrate(uri), false),
            Command::Cancel => match &self.stop {
                Some(stop) => {
                    stop.cancel();
                    (Ok(json!({})), false)
                }
                None => (Err("no migration is under way".to_owned()), false),
            },
            Command::Resume => (self.answer_resume(), false),
            Command::Finish { passes, within } => (self.answer_finish(*passes, *within), false),
            Command::Quit => match &self.stop {
                Some(_) => (Err("a migration is under way; cancel it first".to_owned()), false),
                None => (Ok(json!({})), true),
            },
        }
    }

    fn answer_migrate(&mut self, uri: &str) -> Result<Value, String> {
        let uri = destination_uri(uri)?;
        if self.state != State::Running {
            return Err("the guest does not run here, or is on its way already".to_owned());
        }
        self.deadline = None;
        self.send(uri);
        Ok(json!({}))
    }

    fn answer_finish(&mut self, passes: u64, within: f64) -> Result<Value, String> {
        let within = Duration::try_from_secs_f64(within).map_err(|error| error.to_string())?;
        match self.state {
            State::Running => {
                self.after_passes(passes, within, Event::Finish).map_err(|error| error.to_string())?;
            }
            // The source may know that we have the guest before this loop does.
            State::Incoming => self.finish_when_here = Some((passes, within)),
            State::Outgoing | State::Paused | State::Migrated => return Err("the guest does not stay here".to_owned()),
        }
        Ok(json!({}))
    }

    /// Resumes a guest that is paused in doubt.
    fn answer_resume(&mut self) -> Result<Value, String> {
        match (self.state, &mut self.guest) {
            (State::Paused, Some(guest)) => {
                guest.resume().map_err(|error| error.to_string())?;
                self.state = State::Running;
                self.failure = None;
                Ok(json!({}))
            }
            _ => Err("the guest is not paused in doubt here".to_owned()),
        }
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

    fn status(&mut self) -> Value {
        let status = self.monitor.status();
        let mut object = Map::new();
        object.insert("state".to_owned(), serde_json::to_value(self.state).unwrap_or_default());
        object.insert("passes".to_owned(), status.passes.into());
        object.insert("pages-written".to_owned(), status.pages_written.into());
        object.insert("guest-errors".to_owned(), status.guest_errors().into());
        if let Some((exit, error)) = &self.failure {
            object.insert("status".to_owned(), exit.status().into());
            object.insert("error".to_owned(), error.clone().into());
            if *exit == Exit::InDoubt {
                object.insert("in-doubt".to_owned(), true.into());
            }
        }
        Value::Object(object)
    }

    /// Stops the guest, where it is ours, looks at all of its memory, and reports.
    fn finish(mut self) -> Outcome {
        let mut text = String::new();
        if self.state == State::Migrated {
            text.push_str("The guest has left.\n");
            self.details.iter().for_each(|line| text.push_str(&format!("  {line}\n")));
        }
        let mut outcome = Outcome::done(std::mem::take(&mut self.report), text);
        if let Some((exit, message)) = self.failure.take() {
            outcome.exit = exit;
            outcome.error = Some(message);
        }
        if self.state == State::Running {
            match self.account() {
                Ok((account, check)) => {
                    outcome.report.extend(fields(&account));
                    self.judge(&account, &check, &mut outcome);
                }
                Err(message) => {
                    outcome.exit = Exit::Failed;
                    outcome.error = Some(message);
                }
            }
        }
        if let Some(compared) = &self.compared {
            outcome.report.extend(fields(compared));
        }
        outcome
    }

    /// What became of the guest.
    fn account(&mut self) -> Result<(Account, CheckReport), String> {
        let guest = self.guest.as_mut().ok_or("a migration has the guest")?;
        guest.stop().map_err(|error| error.to_string())?;
        let check = guest.check_all().map_err(|error| error.to_string())?;
        let registers = guest.registers_agree().map_err(|error| error.to_string())?;
        let status: Status = self.monitor.status();
        if let Some(failure) = status.failure {
            return Err(format!("a CPU of the guest has ended: {failure}"));
        }
        let account = Account {
            guest_passes_before: self.passes_before,
            guest_passes_after: status.passes,
            guest_errors: status.guest_errors() + u64::from(!registers),
            pages_checked: check.pages_compared,
            pages_wrong: check.pages_different,
        };
        Ok((account, check))
    }

    /// Says in words what the figures mean, and whether they are bad.
    fn judge(&self, account: &Account, check: &CheckReport, outcome: &mut Outcome) {
        let Account { guest_passes_before, guest_passes_after, guest_errors, .. } = account;
        outcome.text.push_str(&format!(
            "The guest went over its memory in passes {guest_passes_before} to {guest_passes_after} here and found {guest_errors} \
             errors; {} of {} pages have wrong contents.\n",
            table::grouped(account.pages_wrong),
            table::grouped(account.pages_checked),
        ));
        let mut wrong = Vec::new();
        if *guest_errors > 0 {
            wrong.push(format!("the guest found {guest_errors} errors in its memory or registers"));
        }
        if account.pages_wrong > 0 {
            wrong.push(check.to_string());
        }
        if let Some(compared) = self.compared.as_ref().filter(|compared| compared.pages_different > 0) {
            let Compared { pages_compared, pages_different, differences } = compared;
            wrong.push(format!(
                "{pages_different} of {pages_compared} pages differ from the source, the first of them {differences:?}"
            ));
        }
        if let Some(audit) = &self.audit {
            outcome.text.push_str(&format!("{}.\n", audit.text()));
            wrong.extend((audit.stale_writes > 0).then(|| audit.text()));
        }
        if !wrong.is_empty() {
            outcome.exit = Exit::Different;
            outcome.error = Some(wrong.join("; "));
        }
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
            message: error.to_string(),
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
        "Look whether the guest runs at the destination. If it does not: \"resume\" on the control socket, or kill -USR1 {pid}, \
         resumes it here. If it does: \"quit\", or kill {pid}, ends this process and its paused copy. Until then it waits."
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
/// How long a guest that could not leave runs on, to show that it does.
const AFTER_FAILURE: Duration = Duration::from_secs(1);
