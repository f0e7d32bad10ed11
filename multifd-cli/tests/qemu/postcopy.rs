//! Checkpoints whose VM runs at once: real QEMUs as destinations of `multifd send --postcopy`.

use std::{
    env, fs,
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use fastrand::Rng;
use multifd_qmp::{Client, qapi_qmp};
use qemu_peer::{BootGuest, Installed, Qemu, Status, Version};
use rustix::process::Signal;
use serde_json::{Value, json};
use test_support::{HugePages, TempDir, report, time_limit};

use crate::harness::{
    LIMIT, MIB, Multifd, Settings, TEST_LIMIT, assert_goes_on, entries, guest, listen, migrate_away, receive_uri, vm,
};

const TABLE: &str = "postcopy";

/// A checkpoint of a guest on `installed` that has made some passes, and the QEMU that it ran on.
pub fn checkpoint(installed: &Installed, machine: &str, file: &Path, dir: &TempDir) -> Qemu {
    let mut source = vm(installed, machine).start().unwrap();
    Settings::default().apply(&mut source);
    source.wait_passes(3, LIMIT).unwrap();
    let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), file, &[]);
    migrate_away(&mut source, &uri);
    receive.done();
    source
}

/// A QEMU that waits for a VM to run before its memory is there, and where.
fn destination(installed: &Installed, machine: &str, preempt: bool, tcp: bool) -> (Qemu, String) {
    let mut destination = vm(installed, machine).incoming().start().unwrap();
    destination.qmp().set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", preempt)]).unwrap();
    let uri = listen(&mut destination, tcp);
    (destination, uri)
}

/// `multifd send --postcopy`, with what `more` says.
pub fn send(file: &Path, uri: &str, preempt: bool, more: &[&str]) -> Multifd {
    let file = file.display().to_string();
    let preempt: &[&str] = if preempt { &["--preempt"] } else { &[] };
    Multifd::start(["send", &file, uri, "--postcopy"].iter().chain(preempt).chain(more))
}

/// A number of the report about the postcopy.
pub fn figure(report: &Value, name: &str) -> u64 {
    report["postcopy"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {report}"))
}

/// A VM of a checkpoint runs at once and gets all of its memory; the guest finds nothing wrong with it.
fn a_checkpoint_runs_at_once(version: Version, machine: &str, preempt: bool, tcp: bool) {
    let Some(installed) = Installed::require(version) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let source = checkpoint(&installed, machine, &file, &dir);
        let (mut destination, uri) = destination(&installed, machine, preempt, tcp);
        let sent = send(&file, &uri, preempt, &[]).done();
        assert_goes_on(&source, &mut destination);
        let pages = |name| figure(&sent, name);
        // Each page was sent once.
        let inspected = Multifd::start(["inspect", &file.display().to_string()]).done();
        let blocks = inspected["ram-blocks"].as_array().unwrap();
        let with_content: u64 = blocks.iter().map(|block| block["normal"].as_u64().unwrap()).sum();
        let total: u64 = blocks.iter().map(|block| block["pages"].as_u64().unwrap()).sum();
        assert_eq!(sent["ram"]["normal"].as_u64().unwrap(), with_content);
        assert_eq!(sent["ram"]["duplicate"].as_u64().unwrap(), total - with_content);
        assert_eq!(pages("zero-pages"), total - with_content);
        assert!(pages("urgent-pages") + pages("background-pages") >= with_content);
        assert!(pages("requests") >= pages("urgent-pages"));
        assert_eq!(pages("preempt-bytes") > 0, preempt);
        assert_eq!(entries(dir.path()), ["checkpoint"], "no note is left behind");
        report(
            TABLE,
            &format!(
                "{} {machine}, preempt {preempt}, tcp {tcp}: told to run after {} ms, {} requests, {} asked for, {} in the background, \
                 latency {}",
                version.name(),
                sent["postcopy"]["resume-time"],
                pages("requests"),
                pages("urgent-pages"),
                pages("background-pages"),
                sent["postcopy"]["request-latency-us"],
            ),
        );
    });
}

#[test]
fn a_checkpoint_of_7_2_runs_at_once() {
    a_checkpoint_runs_at_once(Version::V7_2, "pc-i440fx-7.2", false, false);
}

#[test]
fn a_checkpoint_of_7_2_runs_at_once_with_preempt() {
    a_checkpoint_runs_at_once(Version::V7_2, "pc-q35-7.2", true, true);
}

#[test]
fn a_checkpoint_of_10_0_runs_at_once() {
    a_checkpoint_runs_at_once(Version::V10_0, "pc-q35-10.0", false, true);
}

#[test]
fn a_checkpoint_of_10_0_runs_at_once_with_preempt() {
    a_checkpoint_runs_at_once(Version::V10_0, "pc-i440fx-10.0", true, false);
}

#[test]
fn a_checkpoint_of_11_1_runs_at_once() {
    a_checkpoint_runs_at_once(Version::V11_1, "pc-i440fx-11.1", false, false);
}

#[test]
fn a_checkpoint_of_11_1_runs_at_once_with_preempt() {
    a_checkpoint_runs_at_once(Version::V11_1, "pc-q35-11.1", true, true);
}

/// How much memory of the process is resident, in bytes.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// A guest of 2 GiB that uses 16 MiB: a restore costs these, on the host and on the wire, whichever way its memory comes.
#[test]
fn a_restore_costs_the_memory_in_use() {
    const BIG_MIB: u32 = 2048;
    const USED_MIB: u32 = 16;
    for (version, machine) in
        [(Version::V7_2, "pc-i440fx-7.2"), (Version::V10_0, "pc-q35-10.0"), (Version::V11_1, "pc-i440fx-11.1")]
    {
        let Some(installed) = Installed::require(version) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let file = dir.join("checkpoint");
            let sparse = || {
                let builder = Qemu::builder(&installed).machine(machine).memory_mib(BIG_MIB).limit(TEST_LIMIT);
                builder.guest(BootGuest::filling(USED_MIB).slowed(2000))
            };
            let mut source = sparse().start().unwrap();
            Settings::default().apply(&mut source);
            source.wait_passes(3, LIMIT).unwrap();
            let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &file, &[]);
            migrate_away(&mut source, &uri);
            let blocks = receive.done()["ram-blocks"].clone();
            let count = |name: &str| blocks.as_array().unwrap().iter().map(|block| block[name].as_u64().unwrap()).sum();
            let (used, zeros): (u64, u64) = (count("normal"), count("zero"));
            assert!(used * 4096 < u64::from(2 * USED_MIB) << 20, "{blocks}");

            for postcopy in [false, true] {
                let mut destination = sparse().incoming().start().unwrap();
                let before = resident(destination.pid());
                let sent = if postcopy {
                    destination.qmp().set_capabilities(&[("postcopy-ram", true)]).unwrap();
                    let uri = listen(&mut destination, false);
                    send(&file, &uri, false, &["--clone"]).done()
                } else {
                    Settings::default().apply(&mut destination);
                    let uri = listen(&mut destination, false);
                    Multifd::start(["send", &file.display().to_string(), &uri]).done()
                };
                destination.qmp().wait_migration(&[Status::Completed], LIMIT).unwrap();
                destination.qmp().wait_run_state("running", LIMIT).unwrap();
                let output = destination.wait_passes(3, LIMIT).unwrap();
                assert!(!output.is_corrupted(), "{output:?}");
                let (added, wire) =
                    (resident(destination.pid()).saturating_sub(before), sent["ram"]["transferred"].as_u64().unwrap());
                // Of a page of zeros the name, of nine bytes; with the heads of pages, the devices and the rest.
                assert!(wire < used * 4200 + zeros * 10 + (1 << 20), "{wire} bytes for {used} pages and {zeros} zeros");
                // What QEMU itself takes for a guest that runs (code of TCG, threads) is in it.
                assert!(added < used * 4096 + (96 << 20), "{added} bytes more for {used} pages");
                let row = format!(
                    "{:4} {machine}, 2 GiB, {used} pages in use, {}: {} MiB more resident, {} KiB on the wire",
                    version.name(),
                    if postcopy { "--postcopy" } else { "send" },
                    added >> 20,
                    wire >> 10
                );
                report(TABLE, &row);
            }
        });
    }
}

/// Passes a connection on to `to`, from source to destination in pieces that are `late` each.
fn pass_on(from: TcpStream, to: &str, late: Duration) {
    let to = TcpStream::connect(to).unwrap();
    let (mut back_from, mut back_to) = (to.try_clone().unwrap(), from.try_clone().unwrap());
    thread::spawn(move || {
        let _ = io::copy(&mut back_from, &mut back_to);
        let _ = back_to.shutdown(Shutdown::Both);
    });
    let (mut from, mut to) = (from, to);
    thread::spawn(move || {
        let mut piece = vec![0; 64 << 10];
        while let Ok(len @ 1..) = from.read(&mut piece) {
            thread::sleep(late);
            if to.write_all(&piece[..len]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
}

/// Where the second of two connections is slow: the one for pages that the guest waits for.
fn with_a_slow_preempt_connection(uri: &str, late: Duration) -> String {
    let to = uri.strip_prefix("tcp:").unwrap().to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for late in [Duration::ZERO, late] {
            let Ok((stream, _)) = listener.accept() else { return };
            pass_on(stream, &to, late);
        }
    });
    format!("tcp:{address}")
}

/// The end of main overtakes the last pages that the guest waits for, on the other connection.
fn a_page_that_is_later_than_the_end_is_not_lost(version: Version, machine: &str) {
    let Some(installed) = Installed::require(version) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let source = checkpoint(&installed, machine, &file, &dir);
        let (mut destination, uri) = destination(&installed, machine, true, true);
        let uri = with_a_slow_preempt_connection(&uri, Duration::from_millis(1500));
        let sent = send(&file, &uri, true, &[]).done();
        assert!(figure(&sent, "urgent-pages") > 0);
        assert_goes_on(&source, &mut destination);
    });
    report(
        TABLE,
        &format!("{} {machine}: main ends before the last page that was asked for arrives: ok", version.name()),
    );
}

#[test]
fn a_page_that_is_later_than_the_end_is_not_lost_in_7_2() {
    a_page_that_is_later_than_the_end_is_not_lost(Version::V7_2, "pc-i440fx-7.2");
}

#[test]
fn a_page_that_is_later_than_the_end_is_not_lost_in_10_0() {
    a_page_that_is_later_than_the_end_is_not_lost(Version::V10_0, "pc-i440fx-10.0");
}

#[test]
fn a_page_that_is_later_than_the_end_is_not_lost_in_11_1() {
    a_page_that_is_later_than_the_end_is_not_lost(Version::V11_1, "pc-i440fx-11.1");
}

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

/// Waits until the VM in the checkpoint `file` is noted as handed over.
fn wait_handed_over(file: &Path) {
    let note = format!("{}.postcopy", file.display());
    let deadline = Instant::now() + LIMIT;
    while !fs::read_to_string(&note).unwrap_or_default().contains("\"handed-over\": 1") {
        assert!(Instant::now() < deadline, "it is not handed over");
        thread::sleep(Duration::from_millis(10));
    }
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

#[test]
fn a_destination_that_is_set_up_otherwise_or_dies_is_told_apart() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let machine = "pc-i440fx-10.0";
        drop(checkpoint(&installed, machine, &file, &dir));
        // Another machine, and one without the capability.
        let (_other, uri) = destination(&installed, "pc-q35-10.0", false, true);
        send(&file, &uri, false, &[]).end().failed(1, "The VM does not run there");
        let mut plain = vm(&installed, machine).incoming().start().unwrap();
        let uri = listen(&mut plain, true);
        send(&file, &uri, false, &[]).end().failed(1, "postcopy-ram");
        assert_eq!(entries(dir.path()), ["checkpoint"]);
        // One that dies with a part of the memory: the file has it still, and the note says so.
        let (mut dies, uri) = destination(&installed, machine, true, true);
        let sending = send(&file, &uri, true, &["--max-bandwidth=8MB/s", "--recover-timeout=0s"]);
        wait_handed_over(&file);
        dies.wait_passes(1, LIMIT).unwrap();
        dies.kill().unwrap();
        let ended = sending.end();
        ended.failed(8, "the VM is at the destination, which lacks at least");
        assert_eq!(ended.report["incomplete"], true);
        assert_eq!(entries(dir.path()), ["checkpoint", "checkpoint.postcopy"]);
    });
}

/// What one guest asked for is sent first to the next one.
#[test]
fn pages_that_a_guest_asked_for_are_sent_first() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let machine = "pc-i440fx-10.0";
        let source = checkpoint(&installed, machine, &file, &dir);
        let list = dir.join("faults").display().to_string();
        let (mut qemu, uri) = destination(&installed, machine, false, true);
        let slow = "--max-bandwidth=20MB/s";
        let sent = send(&file, &uri, false, &["--record-faults", &list, slow]).done();
        assert_goes_on(&source, &mut qemu);
        let faults = fs::read_to_string(&list).unwrap();
        let faults: Vec<&str> = faults.lines().filter(|line| line.starts_with("0x")).collect();
        assert!(!faults.is_empty() && faults.len() as u64 <= figure(&sent, "requests"), "{faults:?}");
        for when in ["before-run", "after-run"] {
            let (mut qemu, uri) = destination(&installed, machine, false, true);
            let again = send(&file, &uri, false, &["--prefetch", &list, "--prefetch-when", when, slow]).done();
            assert_goes_on(&source, &mut qemu);
            assert!(figure(&again, "prefetched-pages") > 0, "{again}");
            report(
                TABLE,
                &format!(
                    "{machine} at 20 MB/s, {} pages listed, {when}: told to run after {} ms, {} requests instead of {}, {} asked \
                     for instead of {}",
                    faults.len(),
                    again["postcopy"]["resume-time"],
                    figure(&again, "requests"),
                    figure(&sent, "requests"),
                    figure(&again, "urgent-pages"),
                    figure(&sent, "urgent-pages"),
                ),
            );
        }
    });
}

/// QEMU compares the sizes of pages before it runs anything. It says nothing on the connection, so the error names it.
#[test]
fn a_destination_with_huge_pages_is_refused_before_it_runs() {
    let installed: Vec<_> = Version::ALL.into_iter().filter_map(Installed::require).collect();
    let Some(_pages) = HugePages::reserve(u64::from(MIB) / 2) else {
        return test_support::skip("no huge pages can be reserved here (as root)");
    };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let machine = "pc-i440fx-7.2";
        let source = checkpoint(&installed[0], machine, &file, &dir);
        drop(source);
        for installed in &installed {
            let memory = format!("memory-backend-memfd,id=pc.ram,size={MIB}M,hugetlb=on,hugetlbsize=2M");
            let shape = Qemu::builder(installed).machine(machine).memory_mib(MIB).guest(guest()).incoming();
            let shape = shape.arguments(&["-object", &memory, "-machine", "memory-backend=pc.ram"]);
            let mut destination = shape.limit(TEST_LIMIT).start().unwrap();
            destination.qmp().set_capabilities(&[("postcopy-ram", true)]).unwrap();
            let uri = listen(&mut destination, false);
            let ended = send(&file, &uri, false, &[]).end();
            ended.failed(1, "its memory must not be huge pages");
            assert_eq!(entries(dir.path()), ["checkpoint"], "the VM does not run there, so there is no note");
            assert!(destination.log().contains("page sizes"), "{}", destination.log());
        }
    });
}
