//! Sources that switch to postcopy while `multifd receive` takes their VM.

use std::{env, thread, time::Duration};

use qemu_peer::{Installed, Qemu, Version};
use rustix::process::Signal;
use serde_json::{Value, json};
use test_support::{TempDir, report, skip, time_limit};

use crate::{
    cutter::Cutter,
    harness::{
        LIMIT, Multifd, Settings, TEST_LIMIT, assert_goes_on, assert_runs_on, assert_same_memory,
        assert_same_memory_in, block, entries, listen, load_file, receive_uri, vm,
    },
};

const TABLE: &str = "switches to postcopy";

/// A source that can switch to postcopy.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    pub version: Version,
    machine: &'static str,
    /// Channels; 0 for none.
    channels: u8,
    preempt: bool,
}

const fn source(version: Version, machine: &'static str, channels: u8, preempt: bool) -> Source {
    Source { version, machine, channels, preempt }
}

pub const SOURCES: [Source; 9] = [
    source(Version::V7_2, "pc-i440fx-7.2", 0, false),
    source(Version::V7_2, "pc-i440fx-7.2", 0, true),
    source(Version::V10_0, "pc-q35-10.0", 0, false),
    source(Version::V10_0, "pc-i440fx-7.2", 0, true),
    source(Version::V11_1, "pc-i440fx-11.1", 0, false),
    source(Version::V11_1, "pc-q35-11.1", 0, true),
    source(Version::V11_1, "pc-i440fx-11.1", 3, false),
    source(Version::V11_1, "pc-q35-10.0", 4, true),
    source(Version::V11_1, "pc-i440fx-7.2", 2, true),
];

impl Source {
    /// Starts it, ready to migrate, slowly.
    pub fn start(self, installed: &Installed) -> Qemu {
        let mut source = vm(installed, self.machine).start().unwrap();
        if self.channels > 0 {
            Settings { channels: self.channels, ..Settings::default() }.apply(&mut source);
        }
        source.qmp().set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", self.preempt)]).unwrap();
        source.qmp().set_parameters(&[("max-bandwidth", json!(60 << 20)), ("downtime-limit", json!(1))]).unwrap();
        source.wait_passes(3, LIMIT).unwrap();
        source
    }

    fn name(self) -> String {
        let channels = if self.channels > 0 { format!(", {} channels", self.channels) } else { String::new() };
        let preempt = if self.preempt { ", preempt" } else { "" };
        format!("{:4} {}{channels}{preempt}", self.version.name(), self.machine)
    }
}

/// Migrates `source` to `uri` and has it switch once it has sent `bytes`.
fn switch_after(source: &mut Qemu, uri: &str, bytes: u64) {
    source.qmp().migrate(uri).unwrap();
    loop {
        let answer = source.qmp().query_migrate().unwrap();
        assert!(matches!(answer["status"].as_str(), Some("setup" | "active")), "{answer}");
        if answer["ram"]["transferred"].as_u64().unwrap_or_default() >= bytes && answer["status"] == "active" {
            break;
        }
        thread::sleep(Duration::from_millis(5));
    }
    source.qmp().execute("migrate-start-postcopy", json!({})).unwrap();
}

/// Waits until `source` says `status`.
pub fn wait_status(source: &mut Qemu, status: &str) -> Value {
    let deadline = std::time::Instant::now() + LIMIT;
    loop {
        // One that has ended has no monitor, and may have said why.
        let answer = source.qmp().query_migrate();
        let answer = answer.unwrap_or_else(|error| panic!("{error}; {:?}\n{}", source.wait_exit(LIMIT), source.log()));
        if answer["status"] == status {
            return answer;
        }
        assert!(std::time::Instant::now() < deadline, "{status} awaited: {answer}\n{}", source.log());
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_source_that_switches_to_postcopy_is_taken_whole() {
    for source in SOURCES {
        let Some(installed) = Installed::require(source.version) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let (file, record) = (dir.join("checkpoint"), dir.join("recorded").display().to_string());
            let mut qemu = source.start(&installed);
            let more = ["--digest", "--record", &record];
            let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), true), &file, &more);
            switch_after(&mut qemu, &uri, 20 << 20);
            let received = receive.done();
            wait_status(&mut qemu, "completed");
            assert_eq!((&received["mode"], &received["instant"]), (&"postcopy".into(), &"switchover".into()));
            assert_eq!(received["channels"], source.channels);
            assert_same_memory(&mut qemu, &received);

            let inspected = Multifd::start(["inspect", &record, "--digest"]).done();
            assert_eq!((&inspected["mode"], &inspected["broken-rule"]), (&"postcopy".into(), &Value::Null));
            let switch = &inspected["postcopy"];
            // QEMU from 10.0 on may end it without a word if no page was asked for.
            let ended = (source.preempt, source.version == Version::V7_2, switch["preempt-ended"].as_bool());
            assert!(matches!(ended, (false, _, None) | (true, true, Some(true)) | (true, false, _)), "{switch}");
            let pushed = switch["main-pages"].as_u64().unwrap() + switch["preempt-pages"].as_u64().unwrap();
            assert_eq!(pushed, switch["discarded-pages"].as_u64().unwrap(), "{switch}");
            assert!(pushed > 0, "{switch}");
            for known in received["ram-blocks"].as_array().unwrap() {
                assert_eq!(block(&inspected, known["name"].as_str().unwrap())["digest"], known["digest"], "{known}");
            }

            let mut destination = match source.version {
                Version::V7_2 => {
                    let mut destination = vm(&installed, source.machine).incoming().start().unwrap();
                    Settings::default().apply(&mut destination);
                    let uri = listen(&mut destination, false);
                    Multifd::start(["send", &file.display().to_string(), &uri]).done();
                    destination
                }
                _ => load_file(vm(&installed, source.machine), &file, &[]),
            };
            assert_goes_on(&qemu, &mut destination);
        });
        report(TABLE, &format!("{}: ok", source.name()));
    }
}

/// A source whose pages come so slowly that it can be caught among them, after `receive` has seen its switch.
fn among_the_pages(source: Source, installed: &Installed, dir: &TempDir) -> (Qemu, Multifd) {
    let mut qemu = source.start(installed);
    let more = ["--recover-timeout=0"];
    let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &dir.join("checkpoint"), &more);
    send_pages_slowly(&mut qemu, &uri);
    (qemu, receive)
}

/// Has `qemu` switch and send its pages slowly to `uri`, and waits until the package has been taken.
pub fn send_pages_slowly(qemu: &mut Qemu, uri: &str) {
    qemu.qmp().set_parameters(&[("max-postcopy-bandwidth", json!(4 << 20))]).unwrap();
    switch_after(qemu, uri, 20 << 20);
    let switched = transferred(&wait_status(qemu, "postcopy-active"));
    // More than sockets and a reader hold.
    while transferred(&wait_status(qemu, "postcopy-active")) < switched + (3 << 20) {
        thread::sleep(Duration::from_millis(10));
    }
}

fn transferred(answer: &Value) -> u64 {
    answer["ram"]["transferred"].as_u64().unwrap()
}

/// What the network does to a source among its pages.
#[derive(Clone, Copy, Debug)]
enum Breaks {
    /// All connections end.
    Cut,
    /// The source gives them up, as an operator has it do where the network says nothing (`migrate-pause`).
    Paused,
}

/// Breaks the connections of `qemu`, and has it go on over new ones.
fn interrupt(qemu: &mut Qemu, cutter: &Cutter, breaks: Breaks) {
    let taken = cutter.taken();
    match breaks {
        Breaks::Cut => cutter.cut(),
        Breaks::Paused => drop(qemu.qmp().execute("migrate-pause", json!({})).unwrap()),
    }
    wait_status(qemu, "postcopy-paused");
    qemu.qmp().execute("migrate", json!({ "uri": cutter.uri(), "resume": true })).unwrap();
    wait_status(qemu, "postcopy-active");
    assert!(cutter.taken() > taken);
}

/// The migration failed with the connection, and the guest had to be given back.
///
/// A named long run: `MULTIFD_POSTCOPY_BREAKS` says how often. One of some 110 runs, of QEMU 11.1 on a machine that was busy, ended with
/// a checkpoint that had other memory than its source, and none of some 1,500 later ones. That is not explained: so `receive` goes on only
/// where it is told to, and a run that ends so again says which pages differ.
fn connections_break_among_the_pages(sources: &[Source]) {
    let Some(times) = env::var("MULTIFD_POSTCOPY_BREAKS").ok().map(|text| text.parse().expect("a number")) else {
        return skip("a named long run: MULTIFD_POSTCOPY_BREAKS=N");
    };
    for source in std::iter::repeat_n(sources, times).flatten() {
        let Some(installed) = Installed::require(source.version) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let file = dir.join("checkpoint");
            let mut qemu = source.start(&installed);
            let more = ["--digest", "--recover-timeout=5min"];
            let (mut receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &file, &more);
            let cutter = Cutter::start(&dir.join("network"), &uri);
            send_pages_slowly(&mut qemu, &cutter.uri());
            for breaks in [Breaks::Cut, Breaks::Paused] {
                interrupt(&mut qemu, &cutter, breaks);
                receive.wait_line_with("the source goes on with");
                let from = transferred(&wait_status(&mut qemu, "postcopy-active"));
                while transferred(&wait_status(&mut qemu, "postcopy-active")) < from + (1 << 20) {
                    thread::sleep(Duration::from_millis(5));
                }
            }
            qemu.qmp().set_parameters(&[("max-postcopy-bandwidth", json!(0))]).unwrap();
            let received = receive.done();
            wait_status(&mut qemu, "completed");
            assert_eq!((&received["mode"], &received["recoveries"]), (&"postcopy".into(), &2.into()));
            assert_same_memory_in(&file, &mut qemu, &received);
            let mut destination = vm(&installed, source.machine).incoming().start().unwrap();
            Settings::default().apply(&mut destination);
            let uri = listen(&mut destination, false);
            Multifd::start(["send", &file.display().to_string(), &uri]).done();
            assert_goes_on(&qemu, &mut destination);
        });
        report(TABLE, &format!("{}, went on twice over new connections: ok", source.name()));
    }
}

#[test]
fn a_source_of_7_2_whose_connections_break_among_its_pages_goes_on() {
    connections_break_among_the_pages(&[SOURCES[1]]);
}

#[test]
fn a_source_of_10_0_whose_connections_break_among_its_pages_goes_on() {
    connections_break_among_the_pages(&[SOURCES[2], SOURCES[3]]);
}

/// Channels are not opened again, and are not needed.
#[test]
fn a_source_of_11_1_whose_connections_break_among_its_pages_goes_on() {
    connections_break_among_the_pages(&[SOURCES[4], SOURCES[8]]);
}

/// Does what `error` says to have the guest of `qemu` run again.
fn give_back(qemu: &mut Qemu, dir: &TempDir, error: &str) {
    let (_, command) = error.split_once("multifd give-back URI ").unwrap();
    let (blocks, _) = command.split_once(", then in the monitor of the source migrate -r URI and cont").unwrap();
    let socket = format!("unix:{}", dir.join("back").display());
    let args = ["give-back", &socket].map(str::to_owned).into_iter();
    let mut back = Multifd::start(args.chain(blocks.split(' ').map(|block| block.replace('\'', ""))));
    back.wait_line("listening on ");
    qemu.qmp().execute("migrate", json!({ "uri": socket, "resume": true })).unwrap();
    back.done();
    wait_status(qemu, "completed");
    qemu.qmp().cont().unwrap();
}

#[test]
fn what_ends_among_the_pages_leaves_no_file_and_the_guest_can_run_on() {
    for source in [SOURCES[0], SOURCES[3], SOURCES[6]] {
        let Some(installed) = Installed::require(source.version) else { continue };
        time_limit(TEST_LIMIT, || {
            for killed in [true, false] {
                let dir = TempDir::new().unwrap();
                let (mut qemu, receive) = among_the_pages(source, &installed, &dir);
                match killed {
                    true => qemu.kill().unwrap(),
                    false => receive.signal(Signal::INT),
                }
                let ended = receive.end();
                ended.failed(if killed { 1 } else { 3 }, "its VM is whole there, and paused (QEMU: postcopy-paused)");
                assert_eq!(entries(dir.path()), [""; 0]);
                if !killed {
                    wait_status(&mut qemu, "postcopy-paused");
                    assert!(qemu.qmp().cont().is_err(), "its guest cannot be resumed by a word alone");
                    give_back(&mut qemu, &dir, ended.report["error"].as_str().unwrap());
                    assert_runs_on(&mut qemu);
                }
            }
        });
        report(TABLE, &format!("{}, ended among the pages, given back: ok", source.name()));
    }
}
