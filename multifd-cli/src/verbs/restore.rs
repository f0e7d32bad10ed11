//! `multifd restore`: restores a checkpoint into a QEMU that waits for one, which it drives by the monitor.
//!
//! QEMU is asked what it is before a byte moves: another machine, memory or UUID is a sentence. Its settings are put back in
//! every case. What a lost connection leaves in doubt, QEMU's monitor answers.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use multifd::{
    checkpoint::Checkpoint,
    error::{Error, Mismatch},
    source::Compression,
    transport::uri::Uri,
};
use multifd_qmp::Status;
use serde_json::{Value, json};

use super::{
    postcopy::{self, Broken, There, record::Record},
    send,
};
use crate::{
    args::{MonitorArgs, RestoreArgs, SendArgs},
    describe,
    exit::Exit,
    image::Stop,
    monitor::{
        self, Backend, Changed, Interrupts, Look, Meeting, Monitor, POLL_INTERVAL, QemuIs, QemuTls, Refusal, Wanted,
    },
    printable,
    report::Outcome,
    shell, units,
};

/// Restores a checkpoint.
pub fn run(args: &RestoreArgs) -> Outcome {
    restore(args).unwrap_or_else(|refusal| Outcome::failed(refusal.exit, refusal))
}

/// # Errors
/// What went wrong before anything was changed.
fn restore(args: &RestoreArgs) -> Result<Outcome, Refusal> {
    let Uri::Unix(path) = &args.qmp else { unreachable!("the command line takes nothing else") };
    let interrupts = Interrupts::listen()?;
    let checkpoint = send::open(&args.file, args.postcopy.is_asked_for(), &Stop::default(), &args.output)
        .map_err(|error| Refusal::new(Exit::from(&error), error.to_string()))?;
    if args.postcopy.recover {
        let monitor = Monitor::connect(path, args.monitor.qmp_timeout, &interrupts)?;
        return Ok(recover(args, &checkpoint, monitor, Meeting::at(args.monitor.listen.as_ref())?));
    }
    send::check_memory(&args.file, args.ignore_shared, &checkpoint)
        .map_err(|(exit, message)| Refusal::new(exit, message))?;
    let mut monitor = Monitor::connect(path, args.monitor.qmp_timeout, &interrupts)?;
    let look = monitor.look()?;
    check(&look, &checkpoint)?;
    let mut meeting = Meeting::at(args.monitor.listen.as_ref())?;
    let (mut changed, mut qemu_tls, mut wanted) = (Changed::default(), QemuTls::default(), wanted(args));
    let tls = (&args.transfer.link.tls, args.monitor.qemu_tls_creds.as_deref());
    let prepared = qemu_tls
        .prepare(&mut monitor, &mut wanted, tls, QemuIs::Destination)
        .and_then(|()| changed.apply(&mut monitor, &look, &wanted));
    let is_begun = prepared.is_ok();
    let mut outcome = match prepared {
        Ok(()) => migrate(args, &checkpoint, &look, &mut monitor, &mut meeting, &interrupts)
            .unwrap_or_else(|refusal| Outcome::failed(refusal.exit, refusal)),
        Err(refusal) => Outcome::failed(refusal.exit, refusal),
    };
    monitor.put_in_order();
    outcome.report.insert("qemu".to_owned(), look.json());
    if outcome.report.contains_key("state") {
        // The migration goes on, or may, and with these settings.
        return Ok(outcome);
    }
    let put_back = match outcome.exit {
        _ if !is_begun => changed.put_back(&mut monitor).map(|()| true),
        Exit::Done => changed.put_back_once_cleared_up(&mut monitor, END_LIMIT).map(|()| true),
        // One that still waits for a VM, or has failed to load one, has to be started again, and takes no notice of settings.
        _ => changed.put_back_if_cleared_up(&mut monitor, NOTICE_LIMIT),
    };
    let removed = put_back.and_then(|is_done| if is_done { qemu_tls.remove(&mut monitor) } else { Ok(()) });
    if let Err(refusal) = removed {
        // A QEMU that ended has no settings.
        if outcome.exit == Exit::Done || !refusal.lost {
            outcome.worsen_beside(&refusal.message);
        }
    }
    Ok(outcome)
}

/// Goes on with the VM that a process which has ended handed over to this QEMU. QEMU is asked for nothing before it listens: its main loop
/// may be waiting for a page.
fn recover(args: &RestoreArgs, checkpoint: &Checkpoint, mut monitor: Monitor, mut meeting: Meeting) -> Outcome {
    let sends = as_send(args, meeting.uri.clone(), None);
    run_at_once(args, &sends, checkpoint, &mut monitor, &mut meeting)
}

/// Sends a checkpoint, or the rest of it, to a QEMU that runs the VM meanwhile, and asks QEMU what has become of it.
fn run_at_once(
    args: &RestoreArgs,
    sends: &SendArgs,
    checkpoint: &Checkpoint,
    monitor: &mut Monitor,
    meeting: &mut Meeting,
) -> Outcome {
    let to_go_on = to_go_on(args);
    // Of a VM that another process sent, it is not known that this process is the only one.
    let mut is_ours = !sends.postcopy.recover;
    let mut after_break = || {
        let broken = after_break(monitor, meeting, is_ours);
        is_ours |= matches!(broken, Broken::Listens(_));
        broken
    };
    let sent = postcopy::run(sends, checkpoint, There { to_go_on, after_break: &mut after_break });
    monitor.put_in_order();
    // Where nothing was tried, QEMU has nothing to say.
    if sent.report.is_empty() { sent } else { settle(sent, monitor, meeting, &args.file) }
}

/// What an operator types to go on with the VM: the QEMU is where it was, and what connects to it is what did. Options of all postcopies
/// follow.
fn to_go_on(args: &RestoreArgs) -> String {
    let MonitorArgs { listen, qemu_tls_creds, .. } = &args.monitor;
    let listen = listen.as_ref().map(|uri| format!(" --listen {}", shell::word(&uri.to_string())));
    let object = qemu_tls_creds.as_ref().map(|id| format!(" --qemu-tls-creds {}", shell::word(id)));
    format!(
        "multifd restore {} {} --recover{}{}",
        shell::word(&args.file),
        shell::word(&args.qmp.to_string()),
        listen.unwrap_or_default(),
        object.unwrap_or_default()
    )
}

/// Whether the checkpoint fits into the QEMU.
fn check(look: &Look, checkpoint: &Checkpoint) -> Result<(), Refusal> {
    if look.migration == Status::PostcopyPaused {
        let message =
            "QEMU has a VM already, which lacks a part of its memory (postcopy-paused); --recover goes on with it";
        return Err(Refusal::new(Exit::Failed, message));
    }
    if look.state != "inmigrate" {
        let message = format!(
            "the QEMU's guest is {}; expected one that waits for a VM, started with the options of the checkpoint's QEMU and \
             -incoming defer",
            look.state
        );
        return Err(Refusal::new(Exit::Failed, message));
    }
    if look.is_listening || look.migration != Status::None {
        let message = "QEMU has begun to wait for a VM already, or has failed to load one; expected one that was started \
                       with -incoming defer and was not told anything yet";
        return Err(Refusal::new(Exit::Failed, message));
    }
    let mismatch = |message: String| Err(Refusal::new(Exit::Peer, message));
    if look.machine != checkpoint.machine() {
        return mismatch(format!(
            "the checkpoint is of machine {}, QEMU {} runs {}; start it with -machine {}",
            checkpoint.machine(),
            look.version,
            look.machine,
            checkpoint.machine()
        ));
    }
    check_memory(look, checkpoint)?;
    check_shared(look, checkpoint)?;
    let uuid = checkpoint.uuid().map(|uuid| describe::uuid(&uuid));
    match uuid.filter(|uuid| is_uuid(uuid) && is_uuid(&look.uuid) && !uuid.eq_ignore_ascii_case(&look.uuid)) {
        Some(uuid) => mismatch(format!("the checkpoint is of the VM {uuid}, QEMU runs {} (-uuid)", look.uuid)),
        None => Ok(()),
    }
}

/// Whether the memory of the QEMU is that of the checkpoint. ROMs and other small blocks are QEMU's business.
fn check_memory(look: &Look, checkpoint: &Checkpoint) -> Result<(), Refusal> {
    let size = |name: &str| checkpoint.blocks().iter().find(|block| block.name == *name).map(|block| block.bytes);
    let mut matched = 0u64;
    for Backend { name, bytes, .. } in &look.memory {
        match size(name) {
            Some(kept) if kept != *bytes => {
                let [kept, bytes] = [kept, *bytes].map(units::show_size);
                let message = format!("the checkpoint has {kept} of memory in {name}, QEMU has {bytes} (-m)");
                return Err(Refusal::new(Exit::Peer, message));
            }
            Some(kept) => matched = matched.saturating_add(kept),
            None => {}
        }
    }
    // A backend may be there for something else, or for nothing; the memory as a whole has to be in the checkpoint.
    let whole = look.memory_size.filter(|&whole| !look.memory.is_empty() && matched < whole);
    let Some(whole) = whole else { return Ok(()) };
    let list = |blocks: Vec<(String, u64)>| {
        let blocks: Vec<String> =
            blocks.iter().map(|(name, bytes)| format!("{name} {}", units::show_size(*bytes))).collect();
        blocks.join(", ")
    };
    let kept = checkpoint.blocks().iter().map(|block| (block.name.to_string(), block.bytes)).collect();
    let message = format!(
        "QEMU has {} of memory as {}, the checkpoint has the RAM blocks {}; the names and sizes of memory backends have to be \
         the same",
        units::show_size(whole),
        list(look.memory.iter().map(|backend| (backend.name.clone(), backend.bytes)).collect()),
        list(kept)
    );
    Err(Refusal::new(Exit::Peer, message))
}

/// Whether QEMU shares the memory that the checkpoint does not have. What is in it, only the operator knows.
fn check_shared(look: &Look, checkpoint: &Checkpoint) -> Result<(), Refusal> {
    for block in checkpoint.memory_elsewhere() {
        let name = printable::line(block.name.as_str());
        let message = match look.memory.iter().find(|backend| backend.name == block.name.as_str()) {
            Some(backend) if backend.is_shared => continue,
            Some(_) => format!(
                "{name} is not in the checkpoint, and the QEMU does not share its own: its guest would find other memory"
            ),
            None => format!("{name} is not in the checkpoint, and the QEMU has no memory backend of that name"),
        };
        let message = format!(
            "{message}; expected one that maps the file of the checkpoint's QEMU (-object memory-backend-file,id={name},share=on,\
             mem-path=FILE)"
        );
        return Err(Refusal::new(Exit::Peer, message));
    }
    Ok(())
}

fn wanted(args: &RestoreArgs) -> Wanted {
    if args.postcopy.postcopy {
        return Wanted::postcopy(args.postcopy.preempt);
    }
    let compression = args.transfer.compression.map_or("none", |compression| match compression.required() {
        Some(method) => crate::report::compression_name(method),
        None => unreachable!("the command line refuses auto"),
    });
    let wanted = Wanted::multifd(args.transfer.channels(), compression);
    if args.ignore_shared { wanted.ignoring_shared() } else { wanted }
}

/// Whether device-state packets in the checkpoint can be sent so: before QEMU listens, which it does once.
fn check_packets(args: &RestoreArgs, checkpoint: &Checkpoint) -> Result<(), Refusal> {
    if args.postcopy.postcopy {
        return checkpoint.check_needs_no_channels().map_err(|error| Refusal::new(Exit::Failed, error.to_string()));
    }
    let compresses = args.transfer.compression.is_some_and(|chosen| chosen.required() != Some(Compression::None));
    match checkpoint.packeted_devices().first() {
        Some(device) if compresses || args.transfer.channels() == 0 => {
            let error = Mismatch::PacketsNeedChannels { name: device.name.clone(), instance: device.instance };
            Err(Refusal::new(Exit::Failed, error.to_string()))
        }
        _ => Ok(()),
    }
}

/// Has QEMU listen, sends the checkpoint, and asks QEMU what has become of it.
fn migrate(
    args: &RestoreArgs,
    checkpoint: &Checkpoint,
    look: &Look,
    monitor: &mut Monitor,
    meeting: &mut Meeting,
    interrupts: &Interrupts,
) -> Result<Outcome, Refusal> {
    check_packets(args, checkpoint)?;
    let uri = listen(monitor, meeting)?;
    if interrupts.seen() {
        return Err(Refusal::new(Exit::Cancelled, format!("{}. {START_AGAIN}", Error::Cancelled)));
    }
    let uuid = is_uuid(&look.uuid).then(|| crate::args::uuid(&look.uuid).ok()).flatten();
    let sends = as_send(args, uri, uuid);
    if args.postcopy.postcopy {
        let mut sent = run_at_once(args, &sends, checkpoint, monitor, meeting);
        if sent.report.is_empty() {
            sent.error = sent.error.map(|error| postcopy::sentences(&error, START_AGAIN));
        }
        return Ok(sent);
    }
    let Some(options) = send::options(&sends, checkpoint) else {
        let message = format!("the version of machine type {:?} is not known; --sync says how", checkpoint.machine());
        return Err(Refusal::new(Exit::Usage, message));
    };
    let sent = send::send(&sends, checkpoint, options);
    monitor.put_in_order();
    let sent = sent.map_err(|error| Refusal::new(Exit::Failed, error.to_string()))?;
    Ok(settle(sent, monitor, meeting, &args.file))
}

/// Has QEMU wait for the migration, and stay when it fails, so that it can say why. Returns where it listens.
fn listen(monitor: &mut Monitor, meeting: &Meeting) -> Result<Uri, Refusal> {
    let uri = meeting.uri.to_string();
    let listening = monitor.execute_once("migrate-incoming", json!({ "uri": uri, "exit-on-error": false }));
    let listening = match listening {
        // Before 9.1 it has to be without.
        Err(refusal) if refusal.message.contains("exit-on-error") => {
            monitor.execute_once("migrate-incoming", json!({ "uri": uri }))
        }
        listening => listening,
    };
    listening.map_err(|refusal| {
        let mut message = monitor::with_advice(&refusal.message, meeting);
        if !refusal.refused && !refusal.gone {
            // It may have begun to wait for a VM.
            message = format!("{message}. {START_AGAIN}");
        }
        Refusal { message, ..refusal }
    })?;
    place(monitor, meeting)
}

/// Has QEMU, whose connection broke while its guest ran, wait for the source once more.
///
/// # Errors
/// It has not noticed, has ended, or refuses it for another reason.
fn listen_again(monitor: &mut Monitor, meeting: &Meeting) -> Result<Uri, Refusal> {
    let arguments = json!({ "uri": meeting.uri.to_string() });
    let listening = monitor.execute_beside("migrate-recover", arguments);
    listening.map_err(|refusal| {
        let message = monitor::with_advice(&refusal.message, meeting);
        Refusal { message, ..refusal }
    })?;
    place(monitor, meeting)
}

/// Where QEMU listens that was told to.
fn place(monitor: &mut Monitor, meeting: &Meeting) -> Result<Uri, Refusal> {
    let Uri::Tcp { host, port: 0 } = &meeting.uri else { return Ok(meeting.uri.clone()) };
    let (_, answer) = monitor.migration()?;
    let port = answer["socket-address"][0]["port"].as_str().and_then(|port| port.parse().ok());
    let Some(port) = port else {
        return Err(Refusal::new(Exit::Failed, "QEMU does not say on which port it listens; --listen can name one"));
    };
    Ok(Uri::Tcp { host: host.clone(), port })
}

/// The same as `multifd send`.
fn as_send(args: &RestoreArgs, uri: Uri, uuid: Option<[u8; 16]>) -> SendArgs {
    SendArgs {
        file: args.file.clone(),
        uri,
        transfer: args.transfer.clone(),
        qmp: None,
        peer: Some(crate::args::Peer::Qemu),
        uuid,
        ignore_shared: args.ignore_shared,
        postcopy: args.postcopy.clone(),
        observe: args.observe.clone(),
        output: args.output.clone(),
    }
}

/// Asks QEMU what has become of the VM: it is the one that knows.
fn settle(mut sent: Outcome, monitor: &mut Monitor, meeting: &Meeting, file: &Path) -> Outcome {
    let end = wait_end(monitor);
    match (sent.exit, end) {
        (Exit::Done, Ok((Status::Completed, _))) => {
            note_guest(&mut sent, monitor, file);
        }
        // It has it, though its answer was lost.
        (Exit::InDoubt, Ok((Status::Completed, _))) => {
            let doubt = sent.error.take().unwrap_or_default();
            sent.exit = Exit::Done;
            sent.text = format!("restored {}; QEMU says so on its monitor ({doubt})\n", file.display());
            forget_hand_over(&mut sent);
            sent.report.insert("confirmed-by".to_owned(), "qmp".into());
            note_guest(&mut sent, monitor, file);
        }
        (exit, Ok((Status::Failed | Status::Cancelled, answer))) => {
            let reason = monitor::reason(&answer, meeting);
            let was = sent.error.take().map_or_else(String::new, |error| format!(" ({error})"));
            // Until it has loaded everything, its guest is one that waits for a VM.
            let state = sent.report.contains_key("state").then(|| monitor.run_state());
            let was = match state {
                None => was,
                Some(Ok(state)) if state == "inmigrate" => {
                    forget_hand_over(&mut sent);
                    String::new()
                }
                Some(state) => {
                    let guest = state.unwrap_or_else(|refusal| format!("not known ({refusal})"));
                    sent.error =
                        Some(format!("QEMU says that its migration has failed: {reason}; its guest is {guest}{was}"));
                    return sent;
                }
            };
            sent.error = Some(format!("QEMU could not load the VM: {reason}{was}. {START_AGAIN}"));
            sent.exit = if matches!(exit, Exit::Done | Exit::InDoubt | Exit::Incomplete) { Exit::Failed } else { exit };
        }
        (Exit::Done, Ok((status, _))) => {
            let message = format!("everything was sent, but QEMU does not end the migration ({status:?})");
            sent.worsen(Exit::InDoubt, &message);
        }
        (Exit::Done, Err(refusal)) => {
            let message = format!("everything was sent and confirmed, but QEMU is gone or does not answer: {refusal}");
            sent.worsen(Exit::InDoubt, &message);
        }
        // A QEMU before 9.1 ends when it cannot load a VM.
        (Exit::InDoubt, Err(refusal)) if refusal.gone => {
            let was = sent.error.take().unwrap_or_default();
            sent.exit = Exit::Failed;
            sent.error = Some(format!("QEMU has ended, so the guest does not run there ({was}); its stderr says why"));
        }
        // Its guest has run, and may have powered off.
        (Exit::Incomplete, Err(refusal)) if refusal.gone => {
            sent.exit = Exit::Failed;
            sent.report.remove("incomplete");
            let note =
                sent.report.get("state").and_then(Value::as_str).unwrap_or("the note of the hand-over").to_owned();
            sent.error = Some(format!(
                "QEMU has ended, and with it the VM, which ran there and lacked a part of its memory: the guest powered off, or QEMU's \
                 stderr says why. The VM is in {} as before; to start it again, remove {note}",
                file.display()
            ));
        }
        (_, Err(refusal)) if refusal.gone => {
            let was = sent.error.take().unwrap_or_default();
            sent.error = Some(format!("{was}; QEMU has ended, its stderr says why"));
        }
        _ => {}
    }
    sent
}

/// Notes what QEMU does with the guest that it has. One that it does not start, though the migration is completed, is no success.
fn note_guest(sent: &mut Outcome, monitor: &mut Monitor, file: &Path) {
    match monitor.wait_run_state(END_LIMIT, |state| state != "inmigrate") {
        Ok(state) => {
            if state == "inmigrate" {
                sent.worsen(
                    Exit::Failed,
                    &format!(
                        "QEMU has the VM, and has not started it: its guest is still inmigrate, and cont does not change that. Most \
                         likely it could not take a disk that another process has open; its stderr says why. The VM is in {file:?} as \
                         before. {START_AGAIN}"
                    ),
                );
            }
            let why = if state == "paused" { PAUSED } else { "" };
            sent.text.push_str(&format!("  the guest is {state} there{why}\n"));
            sent.report.insert("guest-state".to_owned(), state.into());
        }
        Err(refusal) => sent.worsen(Exit::Failed, &format!("QEMU has the VM, but: {refusal}")),
    }
}

/// Has QEMU, to which the connection broke, wait for the next one, unless its migration is over. A connection that QEMU still has is given up
/// where it `is_ours`: another sender may be at work on it, perhaps of another VM.
fn after_break(monitor: &mut Monitor, meeting: &mut Meeting, is_ours: bool) -> Broken {
    meeting.move_on();
    let (begun, mut paused) = (Instant::now(), false);
    loop {
        let refusal = match listen_again(monitor, meeting) {
            Ok(uri) => return Broken::Listens(uri),
            Err(refusal) => refusal,
        };
        if !refusal.refused {
            return Broken::Ended(refusal.exit, refusal.message);
        }
        match monitor.migration() {
            Ok((Status::Completed, _)) => return Broken::Ended(Exit::Failed, COMPLETED.to_owned()),
            Ok((status, _)) if !status.is_final() && begun.elapsed() < BREAK_LIMIT => {}
            _ => return Broken::Ended(Exit::Failed, format!("{refusal}; {PAUSED_EXPECTED}")),
        }
        // It learns that the connection is gone about when we do, but where the network is dead. Not before, and once: a 7.2 may end where
        // it is told so while it recovers.
        if is_ours && begun.elapsed() > NOTICE_LIMIT && !paused {
            paused = true;
            let _ = monitor.execute_beside("migrate-pause", json!({}));
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// QEMU knows where the VM is, so the note of a hand-over in doubt has served its purpose.
fn forget_hand_over(sent: &mut Outcome) {
    let note = sent.report.get("state").and_then(Value::as_str).map(Path::new);
    if note.is_some_and(Record::settle) {
        sent.report.remove("state");
    }
}

/// Waits until QEMU has ended its migration, or a time is over.
///
/// # Errors
/// It is gone, or does not answer.
fn wait_end(monitor: &mut Monitor) -> Result<(Status, Value), Refusal> {
    let deadline = Instant::now() + END_LIMIT;
    loop {
        let (status, answer) = monitor.migration()?;
        if status.is_final() || status == Status::PostcopyPaused || Instant::now() >= deadline {
            return Ok((status, answer));
        }
        thread::sleep(POLL_INTERVAL);
    }
}

fn is_uuid(text: &str) -> bool {
    text.bytes().any(|byte| !matches!(byte, b'0' | b'-'))
}

/// What to do with a QEMU that has been told to wait for a VM, and has not got it.
const START_AGAIN: &str = "This QEMU takes no second migration: end it with quit, and start it again";
/// Of a QEMU that goes on with no VM.
const PAUSED_EXPECTED: &str = "expected the QEMU that the VM was handed over to, whose query-migrate says postcopy-paused. If it says postcopy-active, another process may \
     be sending; if none is, QMP migrate-pause has it give up its connection";
/// Of a QEMU whose VM lacks nothing.
const COMPLETED: &str = "QEMU says that its migration is completed: if it is the QEMU that the VM was handed over to, the VM has \
                         everything, and the note of the hand-over can be removed";
/// Nothing on the monitor tells these apart. (Where it could not take a disk, QEMU 7.2 says `paused`, and 10.0 and 11.1 stay `inmigrate`.)
const PAUSED: &str = ": it was when it was checkpointed, or the QEMU was started with -S, or could not take a disk (its stderr says so); \
                      cont has it run";
/// How long a QEMU may take to notice by itself that the connection is gone.
const NOTICE_LIMIT: Duration = Duration::from_secs(1);
/// How long it may take until it listens again.
const BREAK_LIMIT: Duration = Duration::from_secs(3);
/// How long a QEMU may take to end a migration that is over.
const END_LIMIT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Verb};

    /// It was a restore on this host, whatever host the QEMU is on.
    #[test]
    fn what_is_typed_to_go_on_reaches_the_same_qemu() {
        let of = |options: &str| {
            let line = ["multifd", "restore", "my vm", "unix:q"].into_iter().chain(options.split_whitespace());
            let Verb::Restore(args) = Cli::try_parse_from(line).unwrap().verb else { panic!("another verb") };
            to_go_on(&args)
        };
        assert_eq!(of("--postcopy"), "multifd restore 'my vm' unix:q --recover");
        let far = of("--postcopy --listen tcp:h:1 --tls-dir d --qemu-tls-creds tls0");
        assert_eq!(far, "multifd restore 'my vm' unix:q --recover --listen tcp:h:1 --qemu-tls-creds tls0");
    }
}
