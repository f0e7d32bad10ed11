//! Plain streams of QEMU without a way back: recorded in a file, through a FIFO, the standard input or a connected socket.

use std::{
    fs::{self, File},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::Path,
    process::Stdio,
};

use qemu_peer::{Installed, Qemu, Version};
use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    io::{FdFlags, fcntl_setfd},
};
use serde_json::{Value, json};
use test_support::{TempDir, report, time_limit};

use crate::harness::{
    LIMIT, Multifd, Settings, TEST_LIMIT, assert_goes_on, assert_same_memory, listen, load_file, migrate_away, vm,
};

const TABLE: &str = "streams without a way back";
const SOURCES: [(Version, &str); 3] =
    [(Version::V7_2, "pc-i440fx-7.2"), (Version::V10_0, "pc-q35-10.0"), (Version::V11_1, "pc-q35-11.1")];

/// A source that has written for a while.
fn source(installed: &Installed, machine: &str) -> Qemu {
    let mut source = vm(installed, machine).start().unwrap();
    source.qmp().set_parameters(&[("max-bandwidth", json!(10u64 << 30))]).unwrap();
    source.wait_passes(3, LIMIT).unwrap();
    source
}

fn receive(from: &str, to: &Path) -> Multifd {
    Multifd::start(["receive", from, "--output", &to.display().to_string(), "--digest"])
}

/// What was received is the memory of `source`, and its guest goes on in a QEMU that gets it.
fn check(source: &mut Qemu, received: &Value, checkpoint: &Path, installed: &Installed, machine: &str) {
    assert_eq!(received["channels"], 0);
    assert_same_memory(source, received);
    let mut destination = vm(installed, machine).incoming().start().unwrap();
    Settings::default().apply(&mut destination);
    let uri = listen(&mut destination, false);
    Multifd::start(["send", &checkpoint.display().to_string(), &uri]).done();
    assert_goes_on(source, &mut destination);
}

#[test]
fn a_stream_that_qemu_wrote_to_a_file_becomes_a_checkpoint() {
    for (version, machine) in SOURCES {
        let Some(installed) = Installed::require(version) else { return };
        // QEMU 7.2 has no `file:`.
        let ways = if version == Version::V7_2 { vec!["exec"] } else { vec!["exec", "file", "offset"] };
        for way in ways {
            time_limit(TEST_LIMIT, || {
                let dir = TempDir::new().unwrap();
                let (file, to) = (dir.join("stream").display().to_string(), dir.join("checkpoint"));
                let mut source = source(&installed, machine);
                let from = match way {
                    "exec" => {
                        migrate_away(&mut source, &format!("exec:cat > {file}"));
                        format!("file:{file}")
                    }
                    "file" => {
                        migrate_away(&mut source, &format!("file:{file}"));
                        format!("file:{file}")
                    }
                    _ => {
                        migrate_away(&mut source, &format!("file:{file},offset=8192"));
                        format!("file:{file},offset=8K")
                    }
                };
                let received = receive(&from, &to).done();
                assert_eq!(received["mode"], "stream");
                if way == "exec" {
                    check(&mut source, &received, &to, &installed, machine);
                    let stdin = Stdio::from(File::open(&file).unwrap());
                    let args = ["receive", "-", "--force", "--output", &to.display().to_string(), "--digest"];
                    assert_same_memory(&mut source, &Multifd::start_with(stdin, args).done());
                } else {
                    assert_same_memory(&mut source, &received);
                }
                // Half of it is nothing.
                let half = fs::metadata(&file).unwrap().len() / 2;
                File::options().write(true).open(&file).unwrap().set_len(half).unwrap();
                let other = dir.join("other");
                receive(&from, &other).end().failed(1, "the connection ended in the middle");
                assert!(!other.exists());
            });
            report(TABLE, &format!("{:4} {way}, from the file: ok", version.name()));
        }
    }
}

/// A QEMU that opens the return path to a pipe waits for an answer that it cannot get.
#[test]
fn a_live_source_is_received_through_a_fifo_and_the_standard_input() {
    for (version, machine) in SOURCES {
        let Some(installed) = Installed::require(version) else { return };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let (fifo, to) = (dir.join("fifo"), dir.join("checkpoint"));
            mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
            let from = format!("file:{}", fifo.display());
            let mut receive = receive(&from, &to);
            receive.wait_line("reading from ");
            let mut source = source(&installed, machine);
            migrate_away(&mut source, &format!("exec:cat > {}", fifo.display()));
            check(&mut source, &receive.done(), &to, &installed, machine);
        });
        report(TABLE, &format!("{:4} live through a FIFO: ok", version.name()));
    }
}

#[test]
fn a_connected_socket_carries_a_plain_migration_and_its_answer() {
    for (version, machine) in SOURCES {
        let Some(installed) = Installed::require(version) else { return };
        for return_path in [false, true] {
            time_limit(TEST_LIMIT, || {
                let dir = TempDir::new().unwrap();
                let (path, to) = (dir.join("socket"), dir.join("checkpoint"));
                let listener = UnixListener::bind(&path).unwrap();
                let mut source = source(&installed, machine);
                source.qmp().set_capabilities(&[("return-path", return_path)]).unwrap();
                source.qmp().migrate(&format!("unix:{}", path.display())).unwrap();
                let socket = OwnedFd::from(listener.accept().unwrap().0);
                fcntl_setfd(&socket, FdFlags::empty()).unwrap();
                let receive = receive(&format!("fd:{}", socket.as_raw_fd()), &to);
                drop(socket);
                let received = receive.done();
                source.qmp().wait_migration(&[qemu_peer::Status::Completed], LIMIT).unwrap();
                check(&mut source, &received, &to, &installed, machine);
            });
            report(TABLE, &format!("{:4} connected socket, return path {return_path}: ok", version.name()));
        }
    }
}

#[test]
fn a_mapped_ram_file_is_named_and_left_as_it_is() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (file, to) = (dir.join("mapped").display().to_string(), dir.join("checkpoint"));
        let mut source = source(&installed, "pc-q35-10.0");
        source.qmp().set_capabilities(&[("mapped-ram", true)]).unwrap();
        migrate_away(&mut source, &format!("file:{file}"));
        receive(&format!("file:{file}"), &to).end().failed(4, "is a mapped-ram migration file (a checkpoint)");
        assert!(!to.exists());
    });
}

/// A QEMU of this shape that has been told to load `uri` by itself.
fn load(installed: &Installed, machine: &str, uri: &str) -> Qemu {
    let mut destination = vm(installed, machine).incoming().start().unwrap();
    destination.qmp().migrate_incoming(uri).unwrap();
    destination
}

#[test]
fn a_stream_is_converted_to_a_checkpoint_and_back_and_its_guest_goes_on() {
    for (version, machine) in SOURCES {
        let Some(installed) = Installed::require(version) else { return };
        let Some(newest) = Installed::require(Version::V10_0) else { return };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let [stream, checkpoint, again] = ["stream", "checkpoint", "again"].map(|name| dir.join(name));
            let text = |path: &Path| path.display().to_string();
            let mut source = source(&installed, machine);
            migrate_away(&mut source, &format!("exec:cat > {}", stream.display()));
            let converted = Multifd::start(["convert", &text(&stream), &text(&checkpoint), "--digest"]).done();
            assert_same_memory(&mut source, &converted);
            Multifd::start(["convert", &text(&checkpoint), &text(&again), "--format", "stream"]).done();
            let mut destination = load(&installed, machine, &format!("exec:cat {}", again.display()));
            assert_goes_on(&source, &mut destination);
            drop(destination);
            if version != Version::V7_2 {
                let mut destination = load(&installed, machine, &format!("file:{}", again.display()));
                assert_goes_on(&source, &mut destination);
                drop(destination);
                assert_goes_on(&source, &mut load_file(vm(&installed, machine), &checkpoint, &[]));
            } else {
                assert_goes_on(&source, &mut load_file(vm(&newest, machine), &checkpoint, &[]));
            }
            // A stream is sent like a checkpoint.
            let mut destination = vm(&installed, machine).incoming().start().unwrap();
            Settings::default().apply(&mut destination);
            let uri = listen(&mut destination, false);
            Multifd::start(["send", &text(&stream), &uri]).done();
            assert_goes_on(&source, &mut destination);
        });
        report(TABLE, &format!("{:4} stream -> checkpoint -> stream -> QEMU: ok", version.name()));
    }
}
