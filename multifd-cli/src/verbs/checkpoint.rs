//! `multifd checkpoint`: takes a checkpoint of the VM of a running QEMU, which it drives by the monitor.
//!
//! The QEMU migrates to a receiver in this process, over a socket in a private directory. Its settings are put back in every
//! case, and its guest runs on unless the checkpoint is complete and the guest was to stay paused.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use multifd::{
    checkpoint::{self, CheckpointError, Writer},
    destination::{self, Destination},
    error::Error,
    progress::{Phase, Progress},
    stop::StopHandle,
    transport::{Listen, uri::Uri},
};
use multifd_qmp::Status;
use serde_json::{Map, Value, json};

use super::receive;
use crate::{
    args::{CheckpointArgs, CheckpointMode},
    exit::Exit,
    lend::lend,
    monitor::{self, Changed, Interrupts, Look, Meeting, Monitor, POLL_INTERVAL, QemuIs, QemuTls, Refusal, Wanted},
    progress::Display,
    report::{MigrationReport, Outcome, fields},
    role::Role,
    rounds::Rounds,
    table, terminal,
};

/// Takes a checkpoint.
pub fn run(args: &CheckpointArgs) -> Outcome {
    checkpoint(args).unwrap_or_else(|refusal| Outcome::failed(refusal.exit, refusal))
}

/// # Errors
/// What went wrong before anything was changed.
fn checkpoint(args: &CheckpointArgs) -> Result<Outcome, Refusal> {
    let Uri::Unix(path) = &args.qmp else { unreachable!("the command line takes nothing else") };
    let interrupts = Interrupts::listen()?;
    super::check_replaceable(&args.file, args.force).map_err(|error| Refusal::new(Exit::Failed, error.to_string()))?;
    let writer = Writer::create(&args.file, args.force).map_err(|error| match error {
        CheckpointError::Exists { path } => Refusal::new(Exit::Failed, format!("{path:?} exists; --force replaces it")),
        error => Refusal::new(Exit::Failed, error.to_string()),
    })?;
    let mut monitor = Monitor::connect(path, args.monitor.qmp_timeout, &interrupts)?;
    let look = monitor.look()?;
    check(&look, args)?;
    monitor.wait_cleared_up(SHORT)?;
    let meeting = Meeting::at(args.monitor.listen.as_ref())?;
    let listener = meeting.uri.listener()?;
    if !meeting.is_private() {
        terminal::say(&format!("listening on {}", listener.uri()));
    }
    let uri = listener.uri().to_string();
    let listener = args.tls.listener(args.incoming.allow.listener(Box::new(listener)))?;
    let (mut changed, mut qemu_tls, mut wanted) = (Changed::default(), QemuTls::default(), wanted(args));
    let tls = (&args.tls, args.monitor.qemu_tls_creds.as_deref());
    let prepared = qemu_tls
        .prepare(&mut monitor, &mut wanted, tls, QemuIs::Source)
        .and_then(|()| changed.apply(&mut monitor, &look, &wanted));
    changed.keep(&look, monitor::REST_PARAMETERS);
    let is_begun = prepared.is_ok();
    let mut outcome = match prepared {
        Ok(()) => {
            let (monitor, interrupts) = (&mut monitor, &interrupts);
            Migration { args, interrupts, monitor, look: &look, meeting: &meeting, uri: &uri }.run(writer, listener)
        }
        Err(refusal) => Outcome::failed(refusal.exit, refusal),
    };
    monitor.put_in_order();
    let put_back =
        if is_begun { changed.put_back_once_cleared_up(&mut monitor, SHORT) } else { changed.put_back(&mut monitor) };
    if let Err(refusal) = put_back.and_then(|()| qemu_tls.remove(&mut monitor)) {
        outcome.worsen_beside(&refusal.message);
    }
    outcome.report.insert("qemu".to_owned(), look.json());
    outcome.report.entry("mode").or_insert(args.mode.name().into());
    Ok(outcome)
}

/// Whether the QEMU can be checkpointed now.
fn check(look: &Look, args: &CheckpointArgs) -> Result<(), Refusal> {
    look.check_idle()?;
    let refused = |why: String| Err(Refusal::new(Exit::Failed, why));
    match look.state.as_str() {
        "running" => Ok(()),
        "paused" | "prelaunch" if args.mode == CheckpointMode::Live => Ok(()),
        "paused" | "prelaunch" => refused(format!(
            "the guest is {}, so a snapshot has nothing to run on from; expected --mode live, which keeps the state as it is",
            look.state
        )),
        "inmigrate" => {
            refused("QEMU waits for a VM itself (inmigrate); a checkpoint can be taken once the guest runs".to_owned())
        }
        "postmigrate" => refused(
            "the guest has left this QEMU, or was checkpointed and not resumed (postmigrate); if it runs nowhere else, \
             cont resumes it"
                .to_owned(),
        ),
        other => refused(format!("the guest is {other}; expected one that runs or is paused")),
    }
}

fn wanted(args: &CheckpointArgs) -> Wanted {
    let mut wanted = match args.mode {
        CheckpointMode::Live => Wanted::multifd(args.channels(), args.compression.name()),
        CheckpointMode::Snapshot => Wanted::snapshot(),
    };
    let rate = args.max_bandwidth.and_then(|rate| rate.0).unwrap_or(NO_LIMIT);
    wanted.parameters.push(("max-bandwidth", json!(rate)));
    if let Some(time) = args.downtime_limit {
        wanted.parameters.push(("downtime-limit", json!(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))));
    }
    wanted
}

/// One migration into a file.
struct Migration<'a> {
    args: &'a CheckpointArgs,
    interrupts: &'a Interrupts,
    monitor: &'a mut Monitor,
    look: &'a Look,
    meeting: &'a Meeting,
    /// Where the receiver listens.
    uri: &'a str,
}

/// How the receiver ended.
struct Received {
    writer: Writer,
    result: Result<destination::Report, Error>,
    rounds: Rounds,
}

/// What is known when both ends have ended.
struct Ends {
    received: Received,
    /// The last state of the migration in QEMU, and its whole answer; none where it is not known.
    qemu: Option<(Status, Value)>,
    /// Why the migration was ended from here.
    cause: Option<Refusal>,
}

/// What that makes of the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// The file is complete, and the guest is paused in QEMU or, if it is a snapshot, runs there.
    Done,
    /// The file is complete, and QEMU holds the migration for a failed one: its guest runs on.
    RunsOn,
    /// There is no file, and the guest runs on, or can be told to.
    Failed,
    /// The file is complete, and it is not known what QEMU does.
    InDoubt,
}

/// Whether a file that has its name may not be complete, or not be on disk, where its receiver ended by `error`.
fn may_lack_something(error: &Error) -> bool {
    matches!(error, Error::Checkpoint(_) | Error::StateOnChannels { .. })
}

impl Verdict {
    fn of(qemu: Option<Status>, is_published: bool) -> Verdict {
        match (qemu, is_published) {
            (_, false) => Verdict::Failed,
            (Some(Status::Completed), true) => Verdict::Done,
            (Some(Status::Failed | Status::Cancelled), true) => Verdict::RunsOn,
            (_, true) => Verdict::InDoubt,
        }
    }
}

impl Migration<'_> {
    fn run(mut self, writer: Writer, listener: Box<dyn Listen>) -> Outcome {
        let begun = Instant::now();
        let destination = Destination::new(receive::options(&self.args.as_receive()));
        let (stop, progress) = (destination.stop_handle(), destination.progress());
        let mut display = Display::new(Role::Destination, &self.args.output, &progress);
        let (ended, end) = mpsc::channel();
        let body = move |writer: &mut Writer| {
            let result = writer.receive(destination, listener, &mut display);
            (result, display.rounds())
        };
        let done = move |writer, result: Result<_, String>| {
            let panicked = |message: String| {
                let error = std::io::Error::other(format!("the receiver panicked: {message}"));
                (Err(Error::Vm { call: "be received", source: error.into() }), Rounds::default())
            };
            let (result, rounds) = result.unwrap_or_else(panicked);
            // The other end waits for it.
            let _ = ended.send(Received { writer, result, rounds });
        };
        if let Err((_, error)) = lend("receive", writer, body, done) {
            return Outcome::failed(Exit::Failed, format!("cannot create the thread that receives: {error}"));
        }
        let started = self.monitor.execute_once("migrate", json!({ "uri": self.uri }));
        let started = started
            .map_err(|refusal| Refusal { message: monitor::with_advice(&refusal.message, self.meeting), ..refusal });
        let ends = self.follow(&end, &stop, &progress, started.map(drop));
        self.monitor.put_in_order();
        self.settle(ends, &progress, begun)
    }

    /// Waits until both ends have ended.
    fn follow(
        &mut self,
        end: &mpsc::Receiver<Received>,
        stop: &StopHandle,
        progress: &Progress,
        started: Result<(), Refusal>,
    ) -> Ends {
        let begun = Instant::now();
        let mut received = None;
        let mut cause = None;
        let mut qemu = None;
        let is_started = started.is_ok();
        if let Err(refusal) = started {
            // One whose answer did not come may have begun.
            qemu = refusal.refused.then(|| (Status::Failed, Value::Null));
            cause = Some(refusal);
        }
        // When the QEMU has to have ended the migration: after the receiver, or when it was told to.
        let mut deadline: Option<Instant> = None;
        while cause.is_none() {
            match self.look_on(begun) {
                Ok((status, answer)) if status.is_final() => {
                    qemu = Some((status, answer));
                    break;
                }
                Ok(_) if received.is_none() && self.nothing_came(progress, begun, self.args.stall_timeout.0) => {
                    cause = Some(self.no_connection("does not say that its migration has failed"));
                    break;
                }
                Ok(_) => {}
                Err(refusal) => {
                    cause = Some(refusal);
                    break;
                }
            }
            match end.recv_timeout(POLL_INTERVAL) {
                Ok(ended) => {
                    // A QEMU whose receiver has gone in the set-up may wait for it forever, until it is told to cancel.
                    let patience = if ended.result.is_ok() { END_LIMIT } else { SHORT };
                    received = Some(ended);
                    deadline.get_or_insert_with(|| Instant::now() + patience);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => thread::sleep(POLL_INTERVAL),
            }
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                break;
            }
        }
        if qemu.is_none() {
            qemu = self.end_migration(cause.as_ref());
        }
        // Where it is not known to have begun, the state may be that of an earlier migration.
        let comes = is_started && qemu.as_ref().is_some_and(|(status, _)| *status == Status::Completed);
        if !comes {
            // Without effect once the file has its name.
            stop.cancel();
        }
        let received = received.unwrap_or_else(|| self.receive_rest(end, stop, progress, &mut cause));
        Ends { received, qemu, cause }
    }

    /// Waits for the end of the receiver, which has been cancelled or gets the rest from a QEMU that is done. An interrupt cancels it, and so does
    /// a QEMU that says so without having sent anything; why is in `cause`, unless something else was before.
    fn receive_rest(
        &self,
        end: &mpsc::Receiver<Received>,
        stop: &StopHandle,
        progress: &Progress,
        cause: &mut Option<Refusal>,
    ) -> Received {
        let begun = Instant::now();
        let limit = self.args.stall_timeout.0.map_or(END_LIMIT, |limit| limit.min(END_LIMIT));
        loop {
            match end.recv_timeout(POLL_INTERVAL) {
                Ok(received) => return received,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("the thread sends before it ends"),
            }
            let reason = if self.interrupts.seen() {
                Refusal::new(Exit::Cancelled, Error::Cancelled.to_string())
            } else if self.nothing_came(progress, begun, Some(limit)) {
                self.no_connection("says that its migration is completed")
            } else {
                continue;
            };
            cause.get_or_insert(reason);
            // Without effect once the file has its name, and the second time.
            stop.cancel();
        }
    }

    /// Whether no migration has come for longer than `limit` since `begun`. One that has come has limits of its own.
    fn nothing_came(&self, progress: &Progress, begun: Instant, limit: Option<Duration>) -> bool {
        let has_come = progress.snapshot().phase.is_some_and(|phase| phase > Phase::Connect);
        !has_come && limit.is_some_and(|limit| begun.elapsed() > limit)
    }

    fn no_connection(&self, says: &str) -> Refusal {
        let message = format!(
            "no migration has come to {} in time (--stall-timeout), and QEMU {says}; another process may listen at that address where \
             QEMU is, or a firewall may keep it away",
            self.uri
        );
        Refusal::new(Exit::Failed, message)
    }

    /// The state of the migration, as long as it may go on.
    ///
    /// # Errors
    /// Why it may not.
    fn look_on(&mut self, begun: Instant) -> Result<(Status, Value), Refusal> {
        let (status, answer) = self.monitor.migration()?;
        if status.is_final() {
            return Ok((status, answer));
        }
        if self.interrupts.seen() {
            return Err(Refusal::new(Exit::Cancelled, Error::Cancelled.to_string()));
        }
        let rounds = answer["ram"]["dirty-sync-count"].as_u64().unwrap_or_default();
        let is_over = self.args.max_time.and_then(|time| time.0).is_some_and(|time| begun.elapsed() > time);
        // It looks how fast it is ten times a second, and may begin a hundred short rounds before it knows.
        let knows_its_speed = begun.elapsed() > FIRST_ROUNDS;
        if status == Status::Active && (is_over || (rounds > self.args.max_rounds && knows_its_speed)) {
            let limit = if is_over { "--max-time" } else { "--max-rounds" };
            let message = format!(
                "the guest writes faster than its memory can be sent: {rounds} rounds in {:.1} s ({limit}); --mode snapshot \
                 does not depend on how fast it writes",
                begun.elapsed().as_secs_f64()
            );
            return Err(Refusal::new(Exit::DoesNotConverge, message));
        }
        Ok((status, answer))
    }

    /// Has QEMU end its migration, and waits until it has. `None` where that cannot be known.
    fn end_migration(&mut self, cause: Option<&Refusal>) -> Option<(Status, Value)> {
        self.monitor.put_in_order();
        // One that is gone is not asked for long.
        let deadline = Instant::now() + if cause.is_some_and(|cause| cause.lost) { SHORT } else { END_LIMIT };
        let mut is_told = false;
        loop {
            match self.monitor.migration() {
                // It never began.
                Ok((Status::None, answer)) => return Some((Status::Failed, answer)),
                Ok((status, answer)) if status.is_final() => return Some((status, answer)),
                Ok(_) if !is_told => {
                    is_told = true;
                    if self.args.mode == CheckpointMode::Live {
                        self.monitor.bring_to_rest();
                    }
                    // A refusal shows in the state.
                    let _ = self.monitor.execute_once("migrate_cancel", json!({}));
                }
                Ok(_) => {}
                Err(_) => return None,
            }
            if Instant::now() > deadline {
                return None;
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Brings the guest into the state that it is to have, and reports.
    fn settle(&mut self, ends: Ends, progress: &Progress, begun: Instant) -> Outcome {
        let is_published = ends.received.writer.is_published();
        let verdict = Verdict::of(ends.qemu.as_ref().map(|(status, _)| *status), is_published);
        let file = &self.args.file;
        let runs_before = self.look.state == "running";
        let mut outcome = match verdict {
            Verdict::Failed => self.failure(&ends, progress, begun),
            _ => self.success(&ends, progress, begun),
        };
        let guest = match verdict {
            Verdict::Done if self.args.mode == CheckpointMode::Snapshot && !self.args.resumes() => self.pause_guest(),
            Verdict::Done if self.args.resumes() => self.resume_guest(Duration::ZERO),
            Verdict::Done => self.monitor.run_state(),
            // A QEMU resumes its guest by itself after a migration that failed.
            Verdict::RunsOn | Verdict::Failed if runs_before && !ends.is_lost() => self.resume_guest(SHORT),
            Verdict::RunsOn | Verdict::Failed => self.monitor.run_state(),
            Verdict::InDoubt => {
                let why = ends.cause.as_ref().map_or("QEMU does not end the migration", |cause| cause.message.as_str());
                let message = format!(
                    "{file:?} is complete, but it is not known whether the guest runs on in QEMU: {why}. Look at it before \
                     the checkpoint is restored anywhere"
                );
                outcome.worsen(Exit::InDoubt, &message);
                self.monitor.run_state()
            }
        };
        if verdict == Verdict::RunsOn && !self.args.resumes() {
            let why = ends.qemu.as_ref().map_or_else(String::new, |(_, answer)| monitor::reason(answer, self.meeting));
            let message =
                format!("{file:?} is complete, but QEMU calls the migration failed and runs its guest on: {why}");
            outcome.worsen(Exit::Failed, &message);
        }
        match guest {
            Ok(state) => {
                outcome.text.push_str(&self.closing_line(&state, ends.qemu.as_ref()));
                outcome.report.insert("guest-state".to_owned(), state.into());
            }
            Err(refusal) => {
                let complete =
                    if verdict == Verdict::Done { format!("{file:?} is complete, but ") } else { String::new() };
                outcome.worsen(Exit::Failed, &format!("{complete}the guest's state is not known: {refusal}"));
            }
        }
        outcome
    }

    /// The report on a file that is complete.
    fn success(&self, ends: &Ends, progress: &Progress, begun: Instant) -> Outcome {
        let interrupted = || self.interrupts.seen();
        let mut outcome = match &ends.received.result {
            Ok(report) => receive::described(&self.args.as_receive(), report, false, &interrupted),
            Err(error) => {
                let mut report = self.partial(ends, progress, begun);
                report.insert("checkpoint".to_owned(), receive::file_report(&self.args.file));
                let mut outcome = Outcome::done(report, format!("received {}\n", self.args.file.display()));
                if may_lack_something(error) {
                    outcome.worsen(Exit::from(error), &error.to_string());
                }
                // Else QEMU was told nothing in the end; the file is complete all the same.
                outcome
            }
        };
        if let Some((_, answer)) = &ends.qemu {
            // The source knows them, the destination does not.
            for name in ["downtime", "setup-time"] {
                if let Some(value) = answer.get(name) {
                    outcome.report.insert(name.to_owned(), value.clone());
                    outcome.report.remove(&format!("{name}-us"));
                }
            }
        }
        outcome
    }

    /// The report on a checkpoint that does not exist.
    fn failure(&self, ends: &Ends, progress: &Progress, begun: Instant) -> Outcome {
        let report = self.partial(ends, progress, begun);
        let of_qemu = ends.qemu.as_ref().and_then(|(_, answer)| answer["error-desc"].as_str());
        let of_qemu = of_qemu.map(|reason| format!("QEMU: {}", monitor::with_advice(reason, self.meeting)));
        let (exit, message) = match (&ends.cause, &ends.received.result) {
            (Some(cause), _) => (cause.exit, cause.message.clone()),
            // It was cancelled because QEMU had failed.
            (None, Err(Error::Cancelled)) => {
                (Exit::Failed, of_qemu.unwrap_or_else(|| "QEMU: the migration failed; it does not say why".to_owned()))
            }
            (None, Err(error)) => {
                let of_qemu = of_qemu.map_or_else(String::new, |reason| format!(" ({reason})"));
                (Exit::from(error), format!("{error}{of_qemu}"))
            }
            (None, Ok(_)) => (Exit::Failed, "the checkpoint was not published".to_owned()),
        };
        Outcome { exit, error: Some(message), report, text: String::new() }
    }

    fn partial(&self, ends: &Ends, progress: &Progress, begun: Instant) -> Map<String, Value> {
        let rounds = &ends.received.rounds;
        fields(&MigrationReport::partial(Role::Destination, progress, rounds, checkpoint::PAGE_SIZE, begun.elapsed()))
    }

    /// Waits up to `patience` until the guest runs by itself, then has QEMU resume it.
    fn resume_guest(&mut self, patience: Duration) -> Result<String, Refusal> {
        if !patience.is_zero() && self.monitor.wait_run_state(patience, is_running)? == "running" {
            return Ok("running".to_owned());
        }
        // A QEMU may still be busy with the end of a migration that it has called over, and refuses until then.
        let begun = Instant::now();
        while let Err(refusal) = self.monitor.execute("cont", json!({})) {
            if refusal.lost || begun.elapsed() > SHORT {
                return Err(refusal);
            }
            if is_running(&self.monitor.wait_run_state(BETWEEN_TRIES, is_running)?) {
                return Ok("running".to_owned());
            }
        }
        let state = self.monitor.wait_run_state(END_LIMIT, is_running)?;
        if is_running(&state) {
            return Ok(state);
        }
        Err(Refusal::new(Exit::Failed, format!("QEMU was told to resume it, and it is {state}")))
    }

    fn pause_guest(&mut self) -> Result<String, Refusal> {
        self.monitor.execute("stop", json!({}))?;
        self.monitor.run_state()
    }

    /// What is left to be said.
    fn closing_line(&mut self, state: &str, qemu: Option<&(Status, Value)>) -> String {
        let Look { version, accelerator, .. } = self.look;
        let state = if state == "postmigrate" { "paused (postmigrate)" } else { state };
        let downtime = qemu.and_then(|(_, answer)| answer["downtime"].as_f64());
        let downtime = downtime.map_or_else(String::new, |time| format!(", paused for {}", table::milliseconds(time)));
        format!("  from QEMU {version} ({accelerator}){downtime}; the guest is {state} there\n")
    }
}

impl Ends {
    /// The monitor does not answer any more.
    fn is_lost(&self) -> bool {
        self.qemu.is_none() && self.cause.as_ref().is_some_and(|cause| cause.lost)
    }
}

fn is_running(state: &str) -> bool {
    state == "running"
}

/// A QEMU without a limit is one with a limit that no link reaches, in bytes per second.
const NO_LIMIT: u64 = 1 << 40;
/// How long a QEMU may take to end a migration that is over, or to resume its guest.
const END_LIMIT: Duration = Duration::from_secs(30);
/// How long a QEMU may need to find out that it can switch over.
const FIRST_ROUNDS: Duration = Duration::from_secs(2);
/// The same for what usually takes no time.
const SHORT: Duration = Duration::from_secs(5);
/// Before a QEMU is asked again to resume its guest.
const BETWEEN_TRIES: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_there_and_a_qemu_that_is_not_are_a_doubt() {
        for (qemu, is_published, verdict) in [
            (Some(Status::Completed), true, Verdict::Done),
            (Some(Status::Failed), true, Verdict::RunsOn),
            (Some(Status::Cancelled), true, Verdict::RunsOn),
            (Some(Status::Active), true, Verdict::InDoubt),
            (None, true, Verdict::InDoubt),
            (Some(Status::Completed), false, Verdict::Failed),
            (Some(Status::Failed), false, Verdict::Failed),
            (None, false, Verdict::Failed),
        ] {
            assert_eq!(Verdict::of(qemu, is_published), verdict, "{qemu:?} {is_published}");
        }
    }

    /// Each error behind a file that had its name counted as one of the answer: device state that had not come was no failure.
    #[test]
    fn a_file_that_may_lack_something_is_no_success() {
        let lost = || Box::new(Error::Unconfirmed);
        assert!(may_lack_something(&Error::StateOnChannels { reason: lost() }));
        assert!(!may_lack_something(&Error::Unacknowledged { reason: lost() }));
    }
}
