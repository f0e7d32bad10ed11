//! `multifd demo`: a running guest moves from one process to another, and verifies that nothing was lost.
//!
//! Both processes are `multifd guest`, as a person would start them on two hosts. The source has ended before the verdict:
//! the guest's last report does not depend on it.

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use multifd_guest::pace::Rate;
use multifd_qmp::Client;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::{
    args::{DemoArgs, Token, Transport},
    child::{Ending, GuestProcess, Said},
    describe,
    exit::Exit,
    metrics::{self, TwoEnds},
    monitor, progress,
    report::{Audit, FreshMemory, MigrationReport, Outcome, fields},
    role::Role,
    signals::{self, Hangup},
    table::{self, Columns},
    units,
};

/// Migrates a guest between two processes.
pub fn run(args: &DemoArgs) -> Outcome {
    let demo = Demo::new(args).map_err(|error| failed(Exit::Failed, error));
    demo.and_then(Demo::run).unwrap_or_else(|outcome| *outcome)
}

fn failed(exit: Exit, error: impl ToString) -> Box<Outcome> {
    Box::new(Outcome::failed(exit, error))
}

/// Which process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
}

/// Something happened.
enum Event {
    /// Ctrl-C or SIGTERM.
    Interrupt,
    /// A process said something.
    Said(Side, Said),
}

struct Demo<'a> {
    args: &'a DemoArgs,
    events: mpsc::Sender<Event>,
    arrivals: mpsc::Receiver<Event>,
    source: Option<GuestProcess>,
    destination: Option<GuestProcess>,
    /// What the processes printed.
    outputs: [Option<String>; 2],
    interrupted: bool,
    /// Once interrupted: when the processes have to have ended.
    patience: Option<Instant>,
    uri: String,
    /// So that nothing else on this machine can take part.
    token: Token,
    /// The metrics of both processes, where they are asked for.
    metrics: Option<Arc<TwoEnds>>,
    /// For sockets; only this user gets in. Removed last.
    dir: TempDir,
}

/// The verdict.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Verified {
    /// Pages of which both sides took digests while the guest was paused.
    pages_compared: u64,
    /// Pages with wrong contents, then or at the end.
    pages_different: u64,
    /// What the guest found wrong itself.
    guest_errors: u64,
    /// Passes over its working set when it had arrived.
    guest_passes_before: u64,
    /// And at the end.
    guest_passes_after: u64,
    /// The pause as the guest saw it, in milliseconds: until each of its CPUs had written a page at the destination. Without the
    /// time for digests; of a guest that writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_pause: Option<f64>,
    /// The longest that one of its CPUs took for a few pages in the second after the pause, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_longest_wait: Option<f64>,
}

/// What the destination reports beside the migration.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct DestinationReport {
    verify_time: f64,
    pages_compared: u64,
    pages_different: u64,
    pages_checked: u64,
    pages_wrong: u64,
    guest_errors: u64,
    guest_passes_before: u64,
    guest_passes_after: u64,
    guest_pause: Option<f64>,
    guest_longest_wait: Option<f64>,
    fresh_memory: Vec<FreshMemory>,
    audit: Option<Audit>,
}

impl<'a> Demo<'a> {
    fn new(args: &'a DemoArgs) -> io::Result<Demo<'a>> {
        let (events, arrivals) = mpsc::channel();
        let interrupts = events.clone();
        signals::on_interrupt(Hangup::Interrupts, move || drop(interrupts.send(Event::Interrupt)))?;
        let dir = monitor::private_directory()?;
        let metrics = args.observe.metrics.is_some().then(|| Arc::new(TwoEnds::new(dir.path())));
        if let Some(ends) = metrics.clone() {
            metrics::render_by(move || ends.render());
        }
        Ok(Demo {
            args,
            events,
            arrivals,
            source: None,
            destination: None,
            outputs: [None, None],
            interrupted: false,
            patience: None,
            uri: String::new(),
            token: args.transfer.link.token.map_or_else(Token::random, Ok)?,
            metrics,
            dir,
        })
    }

    fn run(mut self) -> Result<Outcome, Box<Outcome>> {
        let outcome = self.phases();
        if let Some(ends) = &self.metrics {
            // The last word of both stays, also without their files.
            ends.render();
        }
        // Each step that an interrupt ends has an error of its own to tell.
        if self.interrupted { Err(self.cancelled(outcome.err())) } else { outcome }
    }

    fn phases(&mut self) -> Result<Outcome, Box<Outcome>> {
        self.start_destination().map_err(|error| failed(Exit::Failed, error))?;
        self.wait_until_it_listens()?;
        self.start_source().map_err(|error| failed(Exit::Failed, error))?;
        let source = self.wait_for_source()?;
        self.source = None;
        progress::remark(
            &self.args.output,
            "        the source has ended; the guest checks its memory in the other process",
        );
        self.finish_destination()?;
        let destination = self.wait_for_destination(None)?;
        self.verdict(&source, &destination)
    }

    fn start_destination(&mut self) -> io::Result<()> {
        let args = self.args;
        let incoming = match args.transport {
            Transport::Unix => format!("unix:{}", self.dir.path().join("migration").display()),
            Transport::Tcp if args.ipv6 => "tcp:[::1]:0".to_owned(),
            Transport::Tcp => format!("tcp:{}:0", args.address.as_deref().unwrap_or("127.0.0.1")),
        };
        let mut options = vec![format!("--incoming={incoming}"), format!("--qmp=unix:{}", self.monitor().display())];
        options.extend(args.machine.to_args());
        options.extend(args.transfer.to_args());
        options.extend(args.audit.then(|| "--audit".to_owned()));
        options.extend((0..args.output.verbose).map(|_| "--verbose".to_owned()));
        options.extend(args.output.quiet.then(|| "--quiet".to_owned()));
        options.push("--progress=never".to_owned());
        options.push(args.output.log_format_to_arg());
        options.extend(self.metrics.as_ref().map(|ends| ends.option(1)));
        self.destination = Some(GuestProcess::start(options, self.token, false, self.listener(Side::Destination))?);
        Ok(())
    }

    fn start_source(&mut self) -> io::Result<()> {
        let args = self.args;
        let mut options = vec![format!("--migrate-to={}", self.uri)];
        options.push(format!("--after={}us", args.after.as_micros()));
        // Until then the guest writes into memory that was never touched: round 0 would send less than there is to move.
        options.extend((args.machine.write_rate.0 != Rate::Idle).then(|| "--after-first-pass".to_owned()));
        options.extend((!args.no_verify).then(|| "--verify".to_owned()));
        options.extend(args.machine.to_args());
        options.extend(args.transfer.to_args());
        options.extend(args.output.to_args());
        options.extend(self.metrics.as_ref().map(|ends| ends.option(0)));
        self.source = Some(GuestProcess::start(options, self.token, true, self.listener(Side::Source))?);
        Ok(())
    }

    fn listener(&self, side: Side) -> impl Fn(Said) + Clone + Send + 'static {
        let events = self.events.clone();
        // The main loop is only gone when the process is about to end.
        move |said| drop(events.send(Event::Said(side, said)))
    }

    fn monitor(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    fn wait_until_it_listens(&mut self) -> Result<(), Box<Outcome>> {
        while self.uri.is_empty() {
            self.step(None);
            if self.interrupted {
                return Err(failed(Exit::Cancelled, "cancelled"));
            }
            if self.outputs[Side::Destination as usize].is_some() {
                let ending = self.ending(Side::Destination)?;
                return Err(failed(ending.exit, ending.error.unwrap_or_default()));
            }
        }
        Ok(())
    }

    /// Waits until the source has ended. An error if it ended in another way than by handing the guest over.
    fn wait_for_source(&mut self) -> Result<Ending, Box<Outcome>> {
        while self.outputs[Side::Source as usize].is_none() {
            self.step(None);
        }
        let source = self.ending(Side::Source)?;
        if source.error.is_none() {
            return Ok(source);
        }
        // It has lost its source and will find out by itself; its reason may be the better one.
        let destination = self.wait_for_destination(Some(Instant::now() + AFTER_THE_SOURCE)).ok();
        Err(self.failure(source, destination))
    }

    /// Has the guest make its passes without the source, then end.
    fn finish_destination(&mut self) -> Result<(), Box<Outcome>> {
        let passes = if self.args.machine.write_rate.0 == Rate::Idle { 0 } else { PASSES };
        let within = self.args.machine.time_for_passes(passes).as_secs_f64();
        let finish = json!({ "passes": passes, "within": within });
        let answer = Client::connect(&self.monitor()).and_then(|mut client| client.execute("x-guest-finish", finish));
        answer.map(drop).map_err(|error| {
            let ending = self.wait_for_destination(Some(Instant::now() + AFTER_THE_SOURCE)).ok();
            let error = ending.and_then(|ending| ending.error).unwrap_or_else(|| error.to_string());
            failed(Exit::Failed, format!("the destination: {error}"))
        })
    }

    fn wait_for_destination(&mut self, deadline: Option<Instant>) -> Result<Ending, Box<Outcome>> {
        while self.outputs[Side::Destination as usize].is_none() {
            if !self.step(deadline) {
                return Err(failed(Exit::Failed, "the destination does not end"));
            }
        }
        self.ending(Side::Destination)
    }

    /// Takes note of the next event. `false`: `deadline` has passed.
    fn step(&mut self, deadline: Option<Instant>) -> bool {
        let next = [deadline, self.patience].into_iter().flatten().min();
        let event = match next {
            Some(next) => self.arrivals.recv_timeout(next.saturating_duration_since(Instant::now())),
            None => self.arrivals.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match event {
            Err(RecvTimeoutError::Timeout) if next == self.patience => self.kill(),
            Err(RecvTimeoutError::Timeout) => return false,
            Err(RecvTimeoutError::Disconnected) => unreachable!("`self` holds a sender"),
            Ok(Event::Interrupt) if self.interrupted => self.kill(),
            Ok(Event::Interrupt) => {
                self.interrupted = true;
                self.patience = Some(Instant::now() + AFTER_AN_INTERRUPT);
                // The source first: it runs the guest on, the destination just ends.
                for process in self.source.iter().chain(&self.destination) {
                    process.interrupt();
                }
            }
            Ok(Event::Said(_, Said::Listening(uri))) => self.uri = uri,
            Ok(Event::Said(side, Said::Output(output))) => self.outputs[side as usize] = Some(output),
        }
        true
    }

    /// Ends both processes at once: they were asked to end, and have not, as one that is stopped cannot.
    fn kill(&mut self) {
        self.patience = None;
        for process in self.source.iter_mut().chain(&mut self.destination) {
            process.kill();
        }
    }

    /// How the process of `side` ended, whose output is there.
    fn ending(&mut self, side: Side) -> Result<Ending, Box<Outcome>> {
        let process = match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
        };
        let process = process.as_mut().expect("started before it could say anything");
        let output = self.outputs[side as usize].as_deref().unwrap_or_default();
        process.ending(output).map_err(|error| failed(Exit::Failed, error))
    }

    /// Puts together why the guest did not move.
    fn failure(&self, source: Ending, destination: Option<Ending>) -> Box<Outcome> {
        let of_source = source.error.unwrap_or_default();
        let mut outcome = failed(source.exit, &of_source);
        if let Value::Object(report) = source.report {
            outcome.report = report;
            outcome.report.remove("status");
            outcome.report.remove("error");
        }
        let Some(destination) = destination else { return outcome };
        // "The connection ended" on one side is the consequence of a better reason on the other.
        if source.exit == Exit::Failed && destination.exit == Exit::Peer {
            outcome.exit = Exit::Peer;
        }
        if let Some(of_destination) = destination.error {
            outcome.error = Some(format!("{of_source}; the destination: {of_destination}"));
        }
        outcome
    }

    /// The end of a demo that was interrupted. Keeps what `outcome` reports of the guest.
    fn cancelled(&self, outcome: Option<Box<Outcome>>) -> Box<Outcome> {
        let mut cancelled = failed(Exit::Cancelled, multifd::error::Error::Cancelled);
        cancelled.report = outcome.map(|outcome| outcome.report).unwrap_or_default();
        cancelled
    }

    fn verdict(&self, source: &Ending, destination: &Ending) -> Result<Outcome, Box<Outcome>> {
        let unreadable = |error| failed(Exit::Failed, format!("the report of a process: {error}"));
        let mut migration = MigrationReport::deserialize(&source.report).map_err(unreadable)?;
        let there = match destination.exit {
            Exit::Done | Exit::Different => DestinationReport::deserialize(&destination.report).map_err(unreadable)?,
            exit => {
                let error = destination.error.clone().unwrap_or_default();
                return Err(failed(exit, format!("the destination: {error}")));
            }
        };
        migration.exclude_verify_time(there.verify_time);
        migration.audit = there.audit.clone();
        migration.fresh_memory = there.fresh_memory.clone();
        let verified = Verified {
            pages_compared: there.pages_compared,
            pages_different: there.pages_different + there.pages_wrong,
            guest_errors: there.guest_errors,
            guest_passes_before: there.guest_passes_before,
            guest_passes_after: there.guest_passes_after,
            guest_pause: there.guest_pause,
            guest_longest_wait: there.guest_longest_wait,
        };
        let mut report = Map::new();
        for name in ["guest", "guest-reason", "dirty-log", "dirty-log-reason"] {
            if let Some(value) = source.report.get(name) {
                report.insert(name.to_owned(), value.clone());
            }
        }
        report.extend(fields(&migration));
        report.insert("verified".to_owned(), Value::Object(fields(&verified)));
        let text = self.text(&source.report, &migration, &verified, &there);
        let mut outcome = Outcome::done(report, text);
        let too_few = self.args.machine.write_rate.0 != Rate::Idle
            && verified.guest_passes_after < verified.guest_passes_before + PASSES;
        if destination.exit == Exit::Different || verified.pages_different + verified.guest_errors > 0 {
            outcome.exit = Exit::Different;
            outcome.error = Some(destination.error.clone().unwrap_or_else(|| "memory is different".to_owned()));
        } else if too_few {
            outcome.exit = Exit::Failed;
            outcome.error = Some("the guest makes no progress at the destination".to_owned());
        }
        Ok(outcome)
    }

    /// The result for a person.
    fn text(
        &self,
        source: &Value,
        migration: &MigrationReport,
        verified: &Verified,
        there: &DestinationReport,
    ) -> String {
        let word = |name: &str| source.get(name).and_then(Value::as_str).unwrap_or("unknown").to_owned();
        let machine = &self.args.machine;
        let rate = match machine.write_rate.0 {
            Rate::Idle => "idle".to_owned(),
            Rate::BytesPerSecond(rate) => format!("rewritten at {}/s", table::decimal_bytes(rate as f64)),
            Rate::Max => "rewritten as fast as it can".to_owned(),
        };
        let compression = match migration.compression.as_deref() {
            None | Some("none") => "no compression",
            Some("auto") => "compression where it pays",
            Some(other) => other,
        };
        let ram = &migration.ram;
        let mut lines = vec![
            format!("guest       {}; writes tracked by {}", word("guest-reason"), word("dirty-log")),
            format!(
                "memory      {}, {} of it {rate}",
                units::show_size(machine.memory),
                units::show_size(machine.working_set())
            ),
            format!("path        {}, {}, {compression}", self.uri, describe::channels(migration.channels)),
            String::new(),
        ];
        if !progress::reader_saw_rounds(&self.args.output) {
            let columns = Columns::new(Role::Source, 80);
            lines.push(columns.header());
            lines.extend(migration.rounds.iter().map(|round| columns.row(round)));
            lines.push(String::new());
        }
        lines.push(format!(
            "total       {}, {} sent at {}/s; {} pages were never touched and not sent",
            table::milliseconds(migration.total_time_us as f64 / 1e3),
            table::bytes(ram.transferred),
            table::decimal_bytes(ram.mbps * 1e6 / 8.0),
            table::grouped(ram.skipped),
        ));
        lines.extend(migration.auto_compression.iter().map(|channel| format!("{:<12}{}", "", channel.text())));
        // The largest one; the others are small beside it.
        if let Some(memory) = migration.fresh_memory.iter().max_by_key(|memory| memory.copied + memory.in_place) {
            lines.push(format!("first touch {}", memory.reason));
        }
        lines.extend(migration.zero_copy.as_ref().map(|zero_copy| format!("zero-copy   {}", zero_copy.text())));
        if let (Some(downtime), Some(parts)) = (migration.downtime_us, migration.downtime_parts) {
            lines.push(format!(
                "downtime    {} = pause {:.1} + dirty log {:.1} + last round {:.1} + devices {:.1} + confirmation {:.1}",
                table::milliseconds(downtime as f64 / 1e3),
                parts.pause,
                parts.drain,
                parts.last_round,
                parts.devices,
                parts.confirm
            ));
        }
        if let (Some(pause), Some(wait)) = (verified.guest_pause, verified.guest_longest_wait) {
            lines.push(format!(
                "{:<12}the guest saw a pause of {}, and waited for {} at most in the second after it",
                "",
                table::milliseconds(pause),
                table::milliseconds(wait)
            ));
        }
        if !self.args.no_verify {
            lines.push(format!(
                "verified    {} of {} pages differ ({} for digests of both sides, not counted as downtime)",
                table::grouped(verified.pages_different),
                table::grouped(verified.pages_compared),
                table::milliseconds(migration.verify_time.unwrap_or_default()),
            ));
        }
        let label = if self.args.no_verify { "verified" } else { "" };
        lines.push(format!(
            "{label:<12}the guest checked its own memory there: passes {} to {}, {} errors",
            verified.guest_passes_before, verified.guest_passes_after, verified.guest_errors
        ));
        lines.push(format!(
            "{:<12}at the end {} of {} pages have wrong contents",
            "",
            table::grouped(there.pages_wrong),
            table::grouped(there.pages_checked)
        ));
        lines.extend(there.audit.as_ref().map(|audit| format!("{:<12}{}", "", audit.text())));
        lines.push(String::new());
        lines.join("\n")
    }
}

/// Over its whole working set, which the guest makes after the source has ended: in the first it checks what came from
/// the source, in the second what it wrote here itself.
const PASSES: u64 = 2;
/// How long the destination may take to end after the source has failed.
const AFTER_THE_SOURCE: Duration = Duration::from_secs(10);
/// How long both processes may take to end when they are asked to; the source looks at all of its memory until then.
const AFTER_AN_INTERRUPT: Duration = Duration::from_secs(60);
