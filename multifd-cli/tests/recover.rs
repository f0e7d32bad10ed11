//! `multifd send --recover` and destinations that are no QEMU: who may go on with a VM that was handed over, and with which file.

mod common;

use multifd_proto::{Codec, return_path::Message};
use std::{
    fs,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, SystemTime},
};

use common::{LIMIT, captures::recorded, exit_code, json, multifd, run};
use test_support::{TempDir, time_limit};

/// A process that is killed by its id when this is dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It has usually ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A checkpoint of a QEMU whose VM was handed over, by a sender that was killed. Its note is there.
struct HandedOver {
    dir: TempDir,
    file: PathBuf,
}

impl HandedOver {
    fn new() -> HandedOver {
        let dir = TempDir::new().unwrap();
        let (stream, file) = (dir.join("stream"), dir.join("checkpoint"));
        fs::write(&stream, recorded("q10.0-xbzrle-0ch")).unwrap();
        assert!(run(&format!("convert {} {}", stream.display(), file.display())).status.success());
        let handed_over = HandedOver { dir, file };
        let listener = UnixListener::bind(handed_over.dir.join("first")).unwrap();
        let sender = handed_over.sender("first", "--postcopy");
        let mut destination = accept(&listener);
        destination.write_all(&pong(2)).unwrap();
        read_until(&mut destination, RUN);
        drop(sender);
        assert!(handed_over.note().contains("\"handed-over\": 1"));
        handed_over
    }

    /// A process that sends to `socket`.
    fn sender(&self, socket: &str, how: &str) -> Killed {
        let uri = format!("unix:{}", self.dir.join(socket).display());
        let mut command = multifd(&format!("send --json {how} {} {uri}", self.file.display()));
        Killed(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    /// Checks that a sender is refused with `what` and a status of 1, before it connects to anything.
    #[track_caller]
    fn refused(&self, how: &str, what: &str) {
        let nowhere = self.dir.join("nowhere");
        let output = run(&format!("send --json {how} {} unix:{}", self.file.display(), nowhere.display()));
        let report = json(&output.stdout);
        let error = report["error"].as_str().unwrap_or_default();
        assert_eq!(exit_code(&output), 1, "{report}");
        assert!(error.contains(what), "{what:?} is not in {error:?}");
    }

    fn note(&self) -> String {
        fs::read_to_string(self.dir.join("checkpoint.postcopy")).unwrap()
    }

    fn modified(&self) -> SystemTime {
        fs::metadata(&self.file).unwrap().modified().unwrap()
    }
}

fn accept(listener: &UnixListener) -> UnixStream {
    let connection = listener.accept().unwrap().0;
    connection.set_read_timeout(Some(LIMIT)).unwrap();
    connection
}

fn read_until(from: &mut UnixStream, end: &[u8]) {
    let (mut bytes, mut seen) = (vec![0; 1 << 16], Vec::new());
    while !seen.windows(end.len()).any(|window| window == end) {
        let len = from.read(&mut bytes).unwrap();
        assert!(len > 0, "the sender has ended");
        seen.extend_from_slice(&bytes[..len]);
    }
}

fn pong(value: u32) -> Vec<u8> {
    [&[0, 2, 0, 4][..], &value.to_be_bytes()].concat()
}

fn set_modified(file: &Path, modified: SystemTime) {
    fs::File::options().append(true).open(file).unwrap().set_modified(modified).unwrap();
}

/// The last word of the package, and the PING behind it.
const RUN: &[u8] = b"\x08\0\x05\0\0\x08\0\x02\0\x04\0\0\0\x04";
/// How a recovery begins: RECV_BITMAP.
const RECOVERY: &[u8] = b"\x08\0\x0a";

/// Two at a time would send pages twice.
#[test]
fn a_second_recovery_during_the_first_is_refused_and_the_first_goes_on() {
    time_limit(LIMIT, || {
        let vm = HandedOver::new();
        let listener = UnixListener::bind(vm.dir.join("again")).unwrap();
        let _first = vm.sender("again", "--recover");
        let mut destination = accept(&listener);
        read_until(&mut destination, RECOVERY);
        // It waits for the answer, and has the note.
        vm.refused("--recover", "is sending this VM to unix:");
        vm.refused("--postcopy", "is sending this VM to unix:");
        // Its connection is as it was.
        destination.set_nonblocking(true).unwrap();
        while let Ok(len) = destination.read(&mut [0; 4096]) {
            assert!(len > 0, "the first recovery has ended");
        }
        assert!(vm.note().contains("\"handed-over\": 1"));
    });
}

/// A recovery that dies can be followed by another one: the note stays.
#[test]
fn a_recovery_that_dies_is_followed_by_another_one() {
    time_limit(LIMIT, || {
        let vm = HandedOver::new();
        for socket in ["second", "third"] {
            let listener = UnixListener::bind(vm.dir.join(socket)).unwrap();
            let sender = vm.sender(socket, "--recover");
            read_until(&mut accept(&listener), RECOVERY);
            drop(sender);
            vm.refused("--postcopy", "was handed over to unix:");
        }
    });
}

/// The guest would go on with parts of two states.
#[test]
fn a_file_that_changed_after_the_sender_died_is_refused_and_the_note_stays() {
    time_limit(LIMIT, || {
        let vm = HandedOver::new();
        let (modified, note) = (vm.modified(), vm.note());
        let original = fs::read(&vm.file).unwrap();
        set_modified(&vm.file, modified + Duration::from_millis(1));
        vm.refused("--recover", "was written to since");
        // A page more or less, at the same time and with the same length.
        let mut header = Vec::new();
        multifd_proto::mapped_ram::BlockHeader::elsewhere(4096).encode(&mut header);
        let at = original.windows(12).position(|window| window == &header[..12]).unwrap();
        let bitmap = u64::from_be_bytes(original[at + 12..][..8].try_into().unwrap()) as usize;
        let mut changed = original.clone();
        changed[bitmap] ^= 1;
        fs::write(&vm.file, &changed).unwrap();
        set_modified(&vm.file, modified);
        vm.refused("--recover", "which pages it has differ");
        // Another file in its place.
        fs::remove_file(&vm.file).unwrap();
        vm.refused("--recover", "opening it");
        // The same again: it goes on.
        fs::write(&vm.file, &original).unwrap();
        set_modified(&vm.file, modified);
        assert_eq!(vm.note(), note);
        let listener = UnixListener::bind(vm.dir.join("again")).unwrap();
        let _sender = vm.sender("again", "--recover");
        read_until(&mut accept(&listener), RECOVERY);
    });
}

/// Without a note nothing tells that a VM lacks memory, and a note that is none is no permission.
#[test]
fn a_vm_that_was_not_handed_over_does_not_go_on() {
    time_limit(LIMIT, || {
        let vm = HandedOver::new();
        let path = vm.dir.join("checkpoint.postcopy");
        let note = vm.note();
        fs::write(&path, note.replace("\"handed-over\": 1", "\"handed-over\": 0")).unwrap();
        vm.refused("--recover", "was not handed over");
        fs::write(&path, "nonsense").unwrap();
        vm.refused("--recover", "checkpoint.postcopy");
        vm.refused("--postcopy", "checkpoint.postcopy");
        fs::remove_file(&path).unwrap();
        vm.refused("--recover", "there is no");
        fs::write(&path, note).unwrap();
        vm.refused("--postcopy", "was handed over to unix:");
    });
}

/// It said that the VM is at the destination and nothing is lost, of a sender that had not heard that from anybody; and a recovery that
/// reaches no destination took `--recover-timeout` on top of `--connect-timeout`, which was not for that.
#[test]
fn a_recovery_that_reaches_no_destination_says_no_more_than_the_note_knows_and_ends() {
    time_limit(LIMIT, || {
        let vm = HandedOver::new();
        let recovers = |status: i64, what: &str| {
            let how = "send --json --recover --connect-timeout 100ms --recover-timeout 1000h";
            let output = run(&format!("{how} {} unix:{}", vm.file.display(), vm.dir.join("nowhere").display()));
            let report = json(&output.stdout);
            assert_eq!(i64::from(exit_code(&output)), status, "{report}");
            assert!(report["error"].as_str().unwrap().contains(what), "{report}");
            assert!(report["state"].as_str().unwrap().ends_with("checkpoint.postcopy"), "{report}");
        };
        // The sender was killed before it noted anything; and a note of another boot says nothing at all.
        recovers(7, "may have been told to run the VM");
        let note = vm.note();
        let before = note.replace("\"handed-over\": 1", "\"handed-over\": 0");
        let (begin, end) = before.split_once("\"boot\": \"").unwrap();
        let other_boot = format!("{begin}\"boot\": \"x{end}");
        fs::write(vm.dir.join("checkpoint.postcopy"), other_boot).unwrap();
        recovers(7, "may have been told to run the VM");
        // A recovery that the destination answers is certain, and notes it.
        let listener = UnixListener::bind(vm.dir.join("again")).unwrap();
        let uri = format!("unix:{}", vm.dir.join("again").display());
        let command = format!("send --json --recover --recover-timeout 0 {} {uri}", vm.file.display());
        let sender = multifd(&command).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut destination = accept(&listener);
        read_until(&mut destination, RECOVERY);
        destination.write_all(&lacks_everything(&vm.file)).unwrap();
        read_until(&mut destination, b"\x08\0\x09\0\0");
        drop((destination, listener));
        assert_eq!(exit_code(&sender.wait_with_output().unwrap()), 8);
        assert!(vm.note().contains("\"lacks-memory\": 1"));
        recovers(8, "the VM is at the destination");
        recovers(8, "the VM is at the destination");
        // While another process goes on with it nothing is certain, should it be killed.
        let listener = UnixListener::bind(vm.dir.join("third")).unwrap();
        let sender = vm.sender("third", "--recover");
        read_until(&mut accept(&listener), RECOVERY);
        drop(sender);
        recovers(7, "may have been told to run the VM");
    });
}

/// What a destination says that has no page of the VM in `file`.
fn lacks_everything(file: &Path) -> Vec<u8> {
    let checkpoint = multifd::checkpoint::Checkpoint::open(file).unwrap();
    let mut bytes = Vec::new();
    for block in checkpoint.blocks() {
        Message::RecvBitmap { block: block.name.clone() }.encode(&mut bytes);
        multifd_proto::postcopy::received::encode(block.bytes / 4096, std::iter::empty(), &mut bytes);
    }
    bytes
}
