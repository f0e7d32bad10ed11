//! VMs that run at a real QEMU and have not got all of their memory when the connection breaks or the sender dies: none is lost.

use std::{
    env, fs,
    io::{self, Read},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use fastrand::Rng;
use multifd_qmp::{Client, qapi_qmp};
use qemu_peer::{Installed, Qemu, Status, Version};
use rustix::process::Signal;
use serde_json::{Value, json};
use test_support::{TempDir, report, time_limit};

use crate::{
    harness::{LIMIT, Multifd, TEST_LIMIT, assert_goes_on, listen, vm},
    postcopy::{TABLE, checkpoint, destination, figure, send, wait_handed_over},
};

/// A QEMU as above, and a monitor that answers also while its main thread waits for a page.
pub struct Recoverable {
    pub qemu: Qemu,
    monitor: Client,
    times: usize,
    /// Where it was last told to listen again.
    listens: Option<String>,
}

impl Recoverable {
    pub fn start(installed: &Installed, machine: &str, preempt: bool, dir: &TempDir) -> (Recoverable, String) {
        let mut waiting = Recoverable::waiting(installed, machine, preempt, dir);
        let uri = listen(&mut waiting.qemu, false);
        (waiting, uri)
    }

    /// One that was not told yet where its VM comes from.
    pub fn waiting(installed: &Installed, machine: &str, preempt: bool, dir: &TempDir) -> Recoverable {
        let socket = dir.join("monitor");
        let _ = fs::remove_file(&socket);
        let monitor = format!("unix:{},server=on,wait=off", socket.display());
        let second = format!("unix:{},server=on,wait=off", dir.join("second-monitor").display());
        let shape = vm(installed, machine).incoming().arguments(&["-qmp", &monitor, "-qmp", &second]);
        let mut qemu = shape.start().unwrap();
        let capabilities = [("postcopy-ram", true), ("postcopy-preempt", preempt)];
        qemu.qmp().set_capabilities(&capabilities).unwrap();
        let monitor = Client::builder().out_of_band().limit(LIMIT).connect(&socket).unwrap();
        Recoverable { qemu, monitor, times: 0, listens: None }
    }

    /// Has the QEMU, whose connections broke, listen again, unless it needs nothing more.
    pub fn listens_again(&mut self) -> Broken {
        self.times += 1;
        let uri = format!("unix:{}", self.qemu.path(&format!("again{}", self.times)).display());
        let (begun, deadline) = (Instant::now(), Instant::now() + LIMIT);
        loop {
            if self.qemu.try_wait().unwrap().is_some() {
                return Broken::NeverRan;
            }
            let refused = match self.monitor.execute_out_of_band("migrate-recover", json!({ "uri": uri })) {
                Ok(_) => {
                    self.listens = Some(uri.clone());
                    return Broken::Listens(uri);
                }
                // Not before it has noticed that the connection broke.
                Err(error) => error,
            };
            // Not at once: its main thread may wait for a page, and answers nothing until it gets it.
            if begun.elapsed() > Duration::from_secs(2) {
                let status = self.qemu.qmp().migration_status();
                match (&status, &self.listens) {
                    (Ok(Status::Completed), _) => return Broken::Complete,
                    // The sender died before it came.
                    (Ok(Status::PostcopyPaused), Some(uri)) => return Broken::Listens(uri.clone()),
                    (Ok(Status::None | Status::Setup), _) => return Broken::NeverRan,
                    (Ok(_), _) if Instant::now() < deadline => {}
                    // QEMU 7.2 and 11.1 hang when the connection ends while their main thread, which loads the devices, waits for
                    // a page: they do not run the guest yet.
                    (Err(_), _) if self.qemu.log().contains("loadvm failed") => {
                        assert!(self.qemu.output().unwrap().letters.is_empty(), "the guest has run");
                        return Broken::NeverRan;
                    }
                    _ => panic!("{status:?}; {refused}; {}; {}", threads(self.qemu.pid()), self.qemu.log()),
                }
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Recoverable {
    /// Gets what it lacks, if it lacks anything, from the command that `before` and `after` its URI say. Its guest has run.
    pub fn gets_the_rest(&mut self, before: &[&str], after: &[&str]) {
        match self.listens_again() {
            Broken::Listens(uri) => _ = Multifd::start([before, &[&uri], after].concat()).done(),
            Broken::Complete => {}
            Broken::NeverRan => panic!("it ran"),
        }
    }
}

/// What the threads of a process wait for.
fn threads(pid: u32) -> String {
    let read = |path: &Path, name: &str| fs::read_to_string(path.join(name)).unwrap_or_default().trim().to_owned();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten().map(|task| task.path());
    tasks.map(|task| format!("{} in {}", read(&task, "comm"), read(&task, "wchan"))).collect::<Vec<_>>().join(", ")
}

/// What a QEMU whose connections broke needs.
pub enum Broken {
    /// The rest of the memory, there.
    Listens(String),
    /// Nothing: it had everything when the sender died.
    Complete,
    /// Nothing: it never ran the guest, and the file has all of it.
    NeverRan,
}

impl Broken {
    pub fn listens(self) -> String {
        match self {
            Broken::Listens(uri) => uri,
            _ => panic!("the VM runs there, and has not got everything"),
        }
    }
}

/// Senders that are killed at random moments, each while it sends or goes on: no VM is lost.
///
/// `MULTIFD_POSTCOPY_KILLS` says how many for each QEMU, `MULTIFD_SEED` repeats a run.
fn senders_die_at_random(version: Version, machine: &str, preempt: bool) {
    let Some(installed) = Installed::require(version) else { return };
    let wanted: usize = env::var("MULTIFD_POSTCOPY_KILLS").map_or(3, |text| text.parse().expect("a number"));
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = env::var("MULTIFD_SEED").map_or_else(|_| clock(), |text| text.parse().expect("a number"));
    println!("seed {seed}");
    let mut random = Rng::with_seed(seed);
    let limit = TEST_LIMIT + wanted as u32 * Duration::from_secs(20);
    time_limit(limit, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let source = checkpoint(&installed, machine, &file, &dir);
        let (mut kills, mut early, mut vms, mut recoveries) = (0, 0, 0, 0);
        while kills < wanted {
            let (mut destination, uri) = Recoverable::start(&installed, machine, preempt, &dir);
            // Slow enough for several deaths of one VM.
            let mut sender = send(&file, &uri, preempt, &["--max-bandwidth=40MB/s"]);
            let mut last = false;
            let arrived = loop {
                if last {
                    let ended = sender.end();
                    if !ended.status.success() {
                        let qemu = &mut destination.qemu;
                        let (left, status) = (qemu.try_wait(), qemu.qmp().migration_status());
                        panic!("{}; {left:?}, {status:?}; {}; {}", ended.log, threads(qemu.pid()), qemu.log());
                    }
                    break ended.report;
                }
                // Most within what the sending takes, some in its very beginning.
                let most = if random.bool() { 1200 } else { 60 };
                thread::sleep(Duration::from_millis(random.u64(0..most)));
                sender.signal(Signal::KILL);
                let ended = sender.end();
                if ended.status.success() {
                    break ended.report;
                }
                kills += 1;
                let note = fs::read_to_string(dir.join("checkpoint.postcopy")).unwrap_or_default();
                let uri = match destination.listens_again() {
                    Broken::Listens(uri) => uri,
                    // Whether the sender knew it or not.
                    Broken::Complete => {
                        let _ = fs::remove_file(dir.join("checkpoint.postcopy"));
                        break json!({});
                    }
                    // It died before RUN, or just after it.
                    Broken::NeverRan => {
                        early += 1;
                        let _ = fs::remove_file(dir.join("checkpoint.postcopy"));
                        break Value::Null;
                    }
                };
                assert!(note.contains("\"handed-over\": 1"), "a VM without a note: {note:?}");
                recoveries += 1;
                last = kills >= wanted || random.u8(0..5) == 0;
                let slow: &[&str] = if last { &[] } else { &["--max-bandwidth=40MB/s"] };
                let preempt: &[&str] = if preempt { &["--preempt"] } else { &[] };
                let file = file.display().to_string();
                sender = Multifd::start(["send", &file, &uri, "--recover"].iter().chain(preempt).chain(slow));
            };
            if !arrived.is_null() {
                vms += 1;
                assert_goes_on(&source, &mut destination.qemu);
            }
        }
        report(
            TABLE,
            &format!(
                "{} {machine}, preempt {preempt}: {kills} senders killed (seed {seed}), {early} before the guest ran, {recoveries} recoveries, \
                 {vms} VMs arrived, 0 lost",
                version.name()
            ),
        );
    });
}

#[test]
fn senders_to_7_2_die_and_no_vm_is_lost() {
    senders_die_at_random(Version::V7_2, "pc-i440fx-7.2", false);
}

#[test]
fn senders_to_7_2_with_preempt_die_and_no_vm_is_lost() {
    senders_die_at_random(Version::V7_2, "pc-q35-7.2", true);
}

#[test]
fn senders_to_10_0_die_and_no_vm_is_lost() {
    senders_die_at_random(Version::V10_0, "pc-i440fx-10.0", false);
}

#[test]
fn senders_to_10_0_with_preempt_die_and_no_vm_is_lost() {
    senders_die_at_random(Version::V10_0, "pc-q35-10.0", true);
}

#[test]
fn senders_to_11_1_die_and_no_vm_is_lost() {
    senders_die_at_random(Version::V11_1, "pc-i440fx-11.1", false);
}

#[test]
fn senders_to_11_1_with_preempt_die_and_no_vm_is_lost() {
    senders_die_at_random(Version::V11_1, "pc-q35-11.1", true);
}

/// `multifd restore --postcopy` is killed: what it leaves behind is enough for `multifd send --recover`.
#[test]
fn a_vm_whose_restore_died_gets_the_rest_from_another_process() {
    let Some(installed) = Installed::require(Version::V7_2) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (file, machine) = (dir.join("checkpoint"), "pc-i440fx-7.2");
        let source = checkpoint(&installed, machine, &file, &dir);
        let mut destination = Recoverable::waiting(&installed, machine, true, &dir);
        let (path, monitor) = (file.display().to_string(), format!("unix:{}", dir.join("second-monitor").display()));
        let restore = ["restore", &path, &monitor, "--postcopy", "--preempt", "--max-bandwidth=2MB/s"];
        let restoring = Multifd::start(restore);
        destination.qemu.qmp().wait_run_state("running", LIMIT).unwrap();
        restoring.signal(Signal::KILL);
        drop(restoring);
        assert!(dir.join("checkpoint.postcopy").exists());
        destination.gets_the_rest(&["send", &path], &["--recover", "--preempt"]);
        assert_goes_on(&source, &mut destination.qemu);
    });
}

/// `multifd restore --postcopy` is killed, and `restore --recover` goes on at the same monitor: nothing is typed at the QEMU.
fn a_restore_goes_on_where_another_died(version: Version, machine: &str, preempt: bool) {
    let Some(installed) = Installed::require(version) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let source = checkpoint(&installed, machine, &file, &dir);
        let mut destination = Recoverable::waiting(&installed, machine, preempt, &dir);
        let restore = |more: &[&str]| restore_at_second_monitor(&dir, preempt, more);
        restore(&["--recover"]).end().failed(1, "there is no");
        let restoring = restore(&["--postcopy", "--max-bandwidth=2MB/s"]);
        destination.qemu.qmp().wait_run_state("running", LIMIT).unwrap();
        restoring.signal(Signal::KILL);
        drop(restoring);
        restore(&["--postcopy"]).end().failed(1, "--recover goes on with it");
        let report = restore(&["--recover"]).done();
        assert_eq!((figure(&report, "recoveries"), &report["guest-state"]), (1, &json!("running")), "{report}");
        assert_goes_on(&source, &mut destination.qemu);
        assert!(!dir.join("checkpoint.postcopy").exists());
        restore(&["--recover"]).end().failed(1, "there is no");
    });
}

#[test]
fn a_restore_into_7_2_goes_on_where_another_died() {
    a_restore_goes_on_where_another_died(Version::V7_2, "pc-i440fx-7.2", false);
}

#[test]
fn a_restore_into_10_0_goes_on_where_another_died() {
    a_restore_goes_on_where_another_died(Version::V10_0, "pc-i440fx-10.0", true);
}

#[test]
fn a_restore_into_11_1_goes_on_where_another_died() {
    a_restore_goes_on_where_another_died(Version::V11_1, "pc-q35-11.1", true);
}

/// The connection is given up at the QEMU, three times: a restore goes on by itself each time, at a socket that was not there before.
fn a_restore_goes_on_by_itself(version: Version, machine: &str, preempt: bool) {
    let Some(installed) = Installed::require(version) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let source = checkpoint(&installed, machine, &file, &dir);
        let mut destination = Recoverable::waiting(&installed, machine, preempt, &dir);
        let mut restoring = restore_at_second_monitor(&dir, preempt, &["--postcopy", "--max-bandwidth=4MB/s"]);
        destination.qemu.qmp().wait_run_state("running", LIMIT).unwrap();
        for _ in 0..3 {
            // A QEMU 7.2 has ended where it was told so while it recovered.
            thread::sleep(Duration::from_millis(500));
            let deadline = Instant::now() + LIMIT;
            // Refused while it is being recovered.
            while let Err(error) = destination.monitor.execute_out_of_band("migrate-pause", json!({})) {
                assert!(Instant::now() < deadline, "{error}");
                thread::sleep(Duration::from_millis(10));
            }
            restoring.wait_line_with("the QEMU listens again");
        }
        let report = restoring.done();
        assert_eq!((figure(&report, "recoveries"), &report["guest-state"]), (3, &json!("running")), "{report}");
        assert_goes_on(&source, &mut destination.qemu);
        assert!(!dir.join("checkpoint.postcopy").exists());
    });
}

#[test]
fn a_restore_into_7_2_goes_on_by_itself() {
    a_restore_goes_on_by_itself(Version::V7_2, "pc-i440fx-7.2", true);
}

#[test]
fn a_restore_into_10_0_goes_on_by_itself() {
    a_restore_goes_on_by_itself(Version::V10_0, "pc-i440fx-10.0", false);
}

#[test]
fn a_restore_into_11_1_goes_on_by_itself() {
    a_restore_goes_on_by_itself(Version::V11_1, "pc-i440fx-11.1", false);
}

/// A sender that is at work, perhaps with another VM, is not cut off by a recovery at the wrong monitor.
#[test]
fn a_recovery_leaves_a_qemu_alone_that_another_process_sends_to() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let (dir, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let file = dir.join("checkpoint");
        let source = checkpoint(&installed, "pc-i440fx-10.0", &file, &dir);
        // What a sender to another QEMU has left.
        fs::copy(&file, other.join("checkpoint")).unwrap();
        let lost = Recoverable::waiting(&installed, "pc-i440fx-10.0", false, &other);
        let begun = restore_at_second_monitor(&other, false, &["--postcopy", "--max-bandwidth=2MB/s"]);
        wait_handed_over(&other.join("checkpoint"));
        begun.signal(Signal::KILL);
        drop((begun, lost));
        let mut destination = Recoverable::waiting(&installed, "pc-i440fx-10.0", false, &dir);
        let sending = restore_at_second_monitor(&dir, false, &["--postcopy", "--max-bandwidth=4MB/s"]);
        destination.qemu.qmp().wait_run_state("running", LIMIT).unwrap();
        drop(destination.monitor);
        let (file, monitor) = (other.join("checkpoint"), dir.join("monitor"));
        let wrong = ["restore", &file.display().to_string(), &format!("unix:{}", monitor.display()), "--recover"];
        Multifd::start(wrong).end().failed(1, "another process may be sending");
        assert_eq!(figure(&sending.done(), "recoveries"), 0);
        assert_goes_on(&source, &mut destination.qemu);
        assert!(other.join("checkpoint.postcopy").exists());
    });
}

/// It was said to wait for its memory, with nothing lost.
#[test]
fn a_vm_whose_qemu_ends_during_a_restore_is_not_said_to_wait() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let source = checkpoint(&installed, "pc-i440fx-10.0", &file, &dir);
        let mut destination = Recoverable::waiting(&installed, "pc-i440fx-10.0", false, &dir);
        let restoring = restore_at_second_monitor(&dir, false, &["--postcopy", "--max-bandwidth=2MB/s"]);
        destination.qemu.qmp().wait_run_state("running", LIMIT).unwrap();
        destination.qemu.kill().unwrap();
        let ended = restoring.end();
        ended.failed(1, "QEMU has ended, and with it the VM");
        assert!(ended.report["incomplete"].is_null(), "{}", ended.report);
        // It is started again as it was, once that is meant.
        let _ = fs::remove_file(dir.join("second-monitor"));
        let mut destination = Recoverable::waiting(&installed, "pc-i440fx-10.0", false, &dir);
        fs::remove_file(dir.join("checkpoint.postcopy")).unwrap();
        restore_at_second_monitor(&dir, false, &["--postcopy"]).done();
        assert_goes_on(&source, &mut destination.qemu);
    });
}

/// A restore of the checkpoint in `dir` into the QEMU of a [`Recoverable`].
fn restore_at_second_monitor(dir: &TempDir, preempt: bool, more: &[&str]) -> Multifd {
    let (file, monitor) = (dir.join("checkpoint"), dir.join("second-monitor"));
    let arguments = ["restore", &file.display().to_string(), &format!("unix:{}", monitor.display())];
    let preempt: &[&str] = if preempt { &["--preempt"] } else { &[] };
    Multifd::start(arguments.iter().chain(more).chain(preempt))
}

/// Passes connections on to what `next` says, one after the other. The first is cut after `most` bytes.
fn cut_after(most: u64, path: &Path, next: mpsc::Receiver<String>) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for (number, to) in next.iter().enumerate() {
            let Ok((from, _)) = listener.accept() else { return };
            let to = UnixStream::connect(to.strip_prefix("unix:").unwrap()).unwrap();
            let (back_from, back_to) = (to.try_clone().unwrap(), from.try_clone().unwrap());
            thread::spawn(move || {
                io::copy(&mut &back_from, &mut &back_to).and_then(|_| back_to.shutdown(Shutdown::Both))
            });
            let most = if number == 0 { most } else { u64::MAX };
            thread::spawn(move || {
                let _ = io::copy(&mut (&from).take(most), &mut &to);
                let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
            });
        }
    });
}

/// The connection breaks, and no one does anything but have the QEMU listen again.
#[test]
fn a_break_is_gone_over_by_the_sender_itself() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let source = checkpoint(&installed, "pc-i440fx-10.0", &file, &dir);
        let (mut destination, uri) = Recoverable::start(&installed, "pc-i440fx-10.0", false, &dir);
        let (next, targets) = mpsc::channel();
        cut_after(10 << 20, &dir.join("proxy"), targets);
        let qmp = format!("--qmp=unix:{}", dir.join("qmp").display());
        let mut sending =
            send(&file, &format!("unix:{}", dir.join("proxy").display()), false, &["--recover-timeout=60s", &qmp]);
        let mut monitor = monitor_of(&dir.join("qmp"));
        monitor.execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 1 << 30 })).unwrap();
        let parameters = monitor.run(qapi_qmp::query_migrate_parameters {}).unwrap();
        assert_eq!((parameters.max_bandwidth, parameters.max_postcopy_bandwidth), (Some(0), Some(1 << 30)));
        // Nothing breaks before.
        next.send(uri).unwrap();
        let said = sending.wait_line_with("tries for 60 s to go on");
        assert!(said.contains("migrate-recover"), "{said}");
        next.send(destination.listens_again().listens()).unwrap();
        let told = told_until(&mut monitor, "completed");
        let again = ["postcopy-paused", "postcopy-recover-setup", "postcopy-recover", "postcopy-active", "completed"];
        assert_eq!(told.last_chunk(), Some(&again.map(str::to_owned)));
        let answer = monitor.run(qapi_qmp::query_migrate {}).unwrap();
        let ram = answer.ram.unwrap();
        assert!(ram.postcopy_bytes > 10 << 20 && ram.precopy_bytes == 0 && ram.remaining == 0, "{ram:?}");
        drop(monitor);
        let sent = sending.done();
        assert_eq!(figure(&sent, "recoveries"), 1);
        assert_goes_on(&source, &mut destination.qemu);
        assert!(!dir.join("checkpoint.postcopy").exists());
    });
}

/// A client of the monitor at `path`, once there is one.
pub fn monitor_of(path: &Path) -> Client {
    let deadline = Instant::now() + LIMIT;
    loop {
        match Client::builder().out_of_band().connect(path) {
            Ok(client) => return client,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// The states that a client is told of from now on, up to `last`.
pub fn told_until(monitor: &mut Client, last: &str) -> Vec<String> {
    let mut told = Vec::new();
    while told.last().is_none_or(|told| told != last) {
        let event = monitor.next_event(LIMIT).unwrap_or_else(|error| panic!("{error} after {told:?}"));
        told.extend(event.data["status"].as_str().map(str::to_owned));
    }
    told
}

#[test]
fn a_vm_is_not_started_twice_and_goes_on_from_the_same_file_only() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let machine = "pc-i440fx-10.0";
        let source = checkpoint(&installed, machine, &file, &dir);
        let (mut first, first_uri) = Recoverable::start(&installed, machine, false, &dir);
        let sending = send(&file, &first_uri, false, &["--max-bandwidth=8MB/s"]);
        wait_handed_over(&file);
        // Another one only on purpose.
        let (mut second, second_uri) = destination(&installed, machine, false, false);
        send(&file, &second_uri, false, &[]).end().failed(1, "is sending this VM to unix:");
        let other = dir.join("other");
        fs::hard_link(&file, &other).unwrap();
        send(&other, &second_uri, false, &[]).end().failed(1, "has 2 names");
        fs::remove_file(&other).unwrap();
        send(&file, &second_uri, false, &["--clone"]).done();
        assert_goes_on(&source, &mut second);
        drop(second);
        // Nor is it forgotten when the sender dies.
        sending.signal(Signal::KILL);
        assert!(!sending.end().status.success());
        let (_third, third_uri) = destination(&installed, machine, false, false);
        send(&file, &third_uri, false, &[]).end().failed(1, "was handed over to unix:");
        // A file that was written to is another one.
        let recover = |uri: &str, more: &[&str]| {
            Multifd::start(["send", &file.display().to_string(), uri, "--recover"].iter().chain(more))
        };
        let again = first.listens_again().listens();
        let modified = fs::metadata(&file).unwrap().modified().unwrap();
        let touched = fs::File::options().append(true).open(&file).unwrap();
        touched.set_modified(modified).unwrap();
        recover(&again, &[]).end().failed(1, "is open for writing");
        touched.set_modified(modified + Duration::from_millis(1)).unwrap();
        drop(touched);
        recover(&again, &[]).end().failed(1, "was written to since");
        fs::File::options().append(true).open(&file).unwrap().set_modified(modified).unwrap();
        // Two at a time would send pages twice.
        let recovering = recover(&again, &["--max-bandwidth=8MB/s"]);
        let note = dir.join("checkpoint.postcopy");
        let deadline = Instant::now() + LIMIT;
        while first.qemu.path("again1").exists() && Instant::now() < deadline && fs::metadata(&note).is_ok() {
            thread::sleep(Duration::from_millis(100));
            let second = recover(&again, &[]).end();
            if second.status.code() == Some(1) {
                second.failed(1, "is sending this VM");
                break;
            }
        }
        recovering.done();
        assert_goes_on(&source, &mut first.qemu);
        recover(&again, &[]).end().failed(1, "there is no");
    });
}
