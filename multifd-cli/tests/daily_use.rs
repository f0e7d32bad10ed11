//! What operators meet: terminals that go away, outputs that are full, names that a peer chose.

mod common;

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
};

use common::{Guest, LIMIT, exit_code, json, multifd, run};
use multifd::{
    source::{self, Source},
    transport::uri::Uri,
};
use multifd_guest::guest::{Guest as InProcess, GuestConfig, Kind};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use test_support::{TempDir, time_limit};

const SMALL: &str = "--guest process --memory 16MiB --working-set 4MiB";
const SHORT: &str = "guest --guest process --memory 1MiB --run-for 50ms";

/// A process that is killed with its test.
struct Process(Child);

impl Process {
    /// Starts `command` and waits until it listens; returns where.
    fn listening(mut command: Command) -> (Process, String) {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Process(command.spawn().unwrap());
        let (said, lines) = mpsc::channel();
        let stderr = BufReader::new(process.0.stderr.take().unwrap());
        thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| said.send(line)));
        let line = lines.recv_timeout(LIMIT).unwrap();
        let uri = line.strip_prefix("listening on ").unwrap_or_else(|| panic!("{line}")).to_owned();
        (process, uri)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    /// Exit status and stdout.
    fn end(mut self) -> (i32, String) {
        let mut text = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        (self.0.wait().unwrap().code().unwrap_or(-1), text)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has usually ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends a guest of machine type `machine` to `uri`.
fn send_guest(machine: &str, uri: &str) -> Result<source::Report, multifd::error::Error> {
    let config = GuestConfig { kind: Kind::Process, memory: 1 << 20, working_set: 64 << 10, ..GuestConfig::default() };
    let mut guest = InProcess::create(&config).unwrap();
    let mut options = source::Options::default();
    options.qemu.machine = machine.to_owned();
    let connector = uri.parse::<Uri>().unwrap().connector().unwrap();
    Source::new(options).run(&mut guest, &*connector, &mut ())
}

fn checkpoint(dir: &TempDir, name: &str, machine: &str) -> (i32, String) {
    let uri = format!("unix:{}", dir.join("receive").display());
    let (receive, uri) = Process::listening(multifd(&format!("receive {uri} -o {}", dir.join(name).display())));
    send_guest(machine, &uri).unwrap();
    receive.end()
}

/// `/dev/null` for reading and writing is what many programs give their children, and was taken for a stdout that was closed.
#[test]
fn a_stdout_that_is_not_wanted_is_no_failure() {
    time_limit(LIMIT, || {
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let output = multifd(SHORT).stdout(null).output().unwrap();
        assert_eq!(exit_code(&output), 0, "{output:?}");
    });
}

/// `head` has enough after some lines.
#[test]
fn a_reader_of_the_result_that_is_gone_ends_each_verb_without_a_word() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let at = dir.path().display();
        for args in [
            "schema".to_owned(),
            "schema demo --json".to_owned(),
            format!("tls-init {at}/tls --host a"),
            format!("pages {at}/pages"),
            format!("inspect {at}/nonesuch --json"),
            format!("{SHORT} --json"),
            "--help".to_owned(),
        ] {
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            let output = multifd(&args).stdout(writer).output().unwrap();
            assert_eq!(exit_code(&output), 1, "{args}: {output:?}");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(!said.contains("roken pipe") && !said.contains("panicked"), "{args}: {said}");
        }
    });
}

#[test]
fn a_result_that_cannot_be_written_is_a_failure_and_says_so() {
    time_limit(LIMIT, || {
        for args in [SHORT, &format!("{SHORT} --json"), "--help", "guest --help", "schema", "schema demo", "--version"]
        {
            let full = File::options().write(true).open("/dev/full").unwrap();
            let output = multifd(args).stdout(full).output().unwrap();
            let message = String::from_utf8_lossy(&output.stderr);
            assert_eq!(exit_code(&output), 1, "{args}: {message}");
            if args.starts_with(SHORT) {
                assert!(
                    message.contains("could not be written to stdout") && message.contains("No space"),
                    "{message}"
                );
            }
        }
        for args in [SHORT, &format!("{SHORT} --json")] {
            let command = format!("exec {} {args} >&-", env!("CARGO_BIN_EXE_multifd"));
            let output = Command::new("sh").args(["-c", &command]).stdin(Stdio::null()).output().unwrap();
            let message = String::from_utf8_lossy(&output.stderr);
            assert_eq!(exit_code(&output), 1, "{message}");
            assert!(message.contains("could not be written to stdout: it is closed"), "{message}");

            let (reader, writer) = io::pipe().unwrap();
            drop(reader);
            let output = multifd(args).stdout(writer).output().unwrap();
            assert_eq!(exit_code(&output), 1, "{output:?}");
            // Output that is not wanted is no failure.
            let output = multifd(args).stdout(Stdio::null()).output().unwrap();
            assert_eq!(exit_code(&output), 0, "{output:?}");
        }
        // A failure keeps its own status.
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = multifd("demo --json --channels=256").stdout(full).output().unwrap();
        assert_eq!(exit_code(&output), 2, "{output:?}");
    });
}

/// The checkpoint is on disk and the source was told so; only the report is missing.
#[test]
fn a_checkpoint_stays_when_its_report_cannot_be_written() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("ckpt");
        let uri = format!("unix:{}", dir.join("receive").display());
        let mut command = multifd(&format!("receive {uri} -o {}", file.display()));
        command.stdout(File::options().write(true).open("/dev/full").unwrap()).stderr(Stdio::piped());
        let mut receive = Process(command.spawn().unwrap());
        let mut stderr = BufReader::new(receive.0.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        send_guest("multifd", &uri).unwrap();
        stderr.read_to_string(&mut line).unwrap();
        assert_eq!(receive.0.wait().unwrap().code(), Some(1), "{line}");
        assert!(line.contains("all is done, but the result could not be written"), "{line}");
        let full = File::options().write(true).open("/dev/full").unwrap();
        let inspect = format!("inspect {}", file.display());
        assert_eq!(exit_code(&common::run(&inspect)), 0);
        assert_eq!(exit_code(&multifd(&inspect).stdout(full).output().unwrap()), 1);
    });
}

#[test]
fn a_guest_outlives_its_terminal_also_while_it_migrates() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let source = Guest::start(dir.path(), "source", &format!("{SMALL} --max-bandwidth 20MB/s"));
        source.wait_for(|status| status["state"] == "running");
        source.signal(Signal::HUP);
        source.runs_on();
        let (destination, uri) = Guest::incoming(dir.path(), "destination", SMALL);
        destination.signal(Signal::HUP);
        source.ask("migrate", json!({ "uri": uri })).unwrap();
        source.wait_for(|status| status["state"] == "outgoing");
        source.signal(Signal::HUP);
        destination.signal(Signal::HUP);
        let (exit, report) = source.end();
        assert_eq!((exit, &report["status"]), (0, &json!("completed")), "{report}");
        destination.runs_on();
    });
}

#[test]
fn a_terminal_that_goes_away_cancels_a_receive_unless_it_is_to_go_on() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("ckpt");
        let args = format!("receive tcp:127.0.0.1:0 --json -o {}", file.display());
        // Whatever started the tests may ignore it, as nohup does.
        let mut command = Command::new("env");
        command.args(["--default-signal=HUP", env!("CARGO_BIN_EXE_multifd")]);
        command.args(args.split_whitespace()).stdin(Stdio::null());
        let (receive, _) = Process::listening(command);
        receive.signal(Signal::HUP);
        let (exit, report) = receive.end();
        assert_eq!((exit, json(report.as_bytes())["status"].clone()), (3, json!("cancelled")), "{report}");
        assert_eq!(files(dir.path()), 0, "nothing is left behind");

        // As nohup starts it.
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' HUP; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_multifd")]);
        command.args(args.split_whitespace()).stdin(Stdio::null());
        let (receive, uri) = Process::listening(command);
        receive.signal(Signal::HUP);
        send_guest("multifd", &uri).unwrap();
        let (exit, report) = receive.end();
        assert_eq!(exit, 0, "{report}");
        assert!(file.exists());
    });
}

fn files(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

/// The subscriber of the log prints its own errors to stderr, and panics when that fails: in a thread of the migration.
#[test]
fn a_migration_does_not_need_its_stderr() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (destination, uri) = Guest::incoming(dir.path(), "destination", SMALL);
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let args = format!("guest {SMALL} -vvv --progress always --json --after 0 --migrate-to {uri}");
        let output = multifd(&args).stderr(writer).output().unwrap();
        assert_eq!(exit_code(&output), 0, "{}", json(&output.stdout));
        destination.runs_on();
    });
}

/// A reader that does not read must not keep a guest paused.
#[test]
fn a_migration_does_not_wait_for_the_reader_of_its_stderr() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (destination, uri) = Guest::incoming(dir.path(), "destination", SMALL);
        let (_reader, mut writer) = io::pipe().unwrap();
        rustix::fs::fcntl_setfl(&writer, rustix::fs::OFlags::NONBLOCK).unwrap();
        while io::Write::write(&mut writer, &[b'x'; 4096]).is_ok() {}
        while io::Write::write(&mut writer, b"x").is_ok() {}
        rustix::fs::fcntl_setfl(&writer, rustix::fs::OFlags::empty()).unwrap();
        let args = format!("guest {SMALL} -vvv --progress always --json --after 0 --migrate-to {uri}");
        let output = multifd(&args).stderr(writer).output().unwrap();
        assert_eq!(exit_code(&output), 0, "{}", json(&output.stdout));
        destination.runs_on();
    });
}

#[test]
fn names_of_a_peer_reach_the_terminal_as_text_and_json_exactly() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let hostile = "multifd\u{1b}[2J\u{9b}31m\u{202e}\nlistening on tcp:evil:1\u{7}";
        let (exit, text) = checkpoint(&dir, "ckpt", hostile);
        assert_eq!(exit, 0, "{text}");
        let fit = |text: &str| !text.contains(|c: char| c != '\n' && (c.is_control() || c == '\u{202e}'));
        assert!(
            fit(&text) && text.contains(r"multifd\u{1b}[2J\u{9b}31m\u{202e}\nlistening on tcp:evil:1\u{7}"),
            "{text:?}"
        );

        let output = common::run(&format!("inspect {} --json", dir.join("ckpt").display()));
        let report: Value = json(&output.stdout);
        assert_eq!(report["machine"], hostile);
        assert!(fit(std::str::from_utf8(&output.stdout).unwrap()), "{output:?}");
        let output = common::run(&format!("inspect {}", dir.join("ckpt").display()));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(fit(&text) && !text.contains("\nlistening"), "{text:?}");

        // In a message, too.
        let other = dir.join("other").display().to_string();
        let send =
            format!("send {} unix:{other} --sync per-round --connect-timeout 1ms -v", dir.join("ckpt").display());
        let listener = std::os::unix::net::UnixListener::bind(&other).unwrap();
        let peer = thread::spawn(move || drop(listener.accept()));
        let output = multifd(&send).output().unwrap();
        peer.join().unwrap();
        assert_eq!(exit_code(&output), 1, "{output:?}");
        assert!(fit(std::str::from_utf8(&output.stderr).unwrap()), "{output:?}");
    });
}

#[test]
fn a_uuid_is_sent_on_each_channel_and_compared_by_the_receiver() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        assert_eq!(checkpoint(&dir, "ckpt", "multifd").0, 0);
        let (uuid, other) = ("00112233-4455-6677-8899-aabbccddeeff", "ffffffff-4455-6677-8899-aabbccddeeff");
        for (sent, expected, fits) in [
            (Some(uuid), Some(uuid), true),
            (Some(uuid), None, true),
            (Some(other), Some(uuid), false),
            (None, Some(uuid), false),
        ] {
            let option = |uuid: Option<&str>| uuid.map_or(String::new(), |uuid| format!("--uuid {uuid}"));
            let copy = dir.join("copy").display().to_string();
            let receive = format!("receive tcp:127.0.0.1:0 -o {copy} --force {}", option(expected));
            let (receive, uri) = Process::listening(multifd(&receive));
            let send = common::run(&format!("send {} {uri} {}", dir.join("ckpt").display(), option(sent)));
            let (received, text) = receive.end();
            let exits = [exit_code(&send), received];
            assert_eq!(exits.map(|exit| exit == 0), [fits; 2], "{exits:?}, {sent:?} for {expected:?}: {send:?} {text}");
        }
    });
}

/// What a QEMU without the capability multifd sends to `fd:N`, as a management process hands it over.
#[test]
fn a_connected_socket_takes_a_plain_migration() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let captures = concat!(env!("CARGO_MANIFEST_DIR"), "/../multifd-proto/tests/captures/streams.tar.xz");
        let name = "q10.0-xbzrle-0ch";
        let unpacked = Command::new("tar").args(["-xJf", captures, "-C"]).arg(dir.path()).status().unwrap();
        assert!(unpacked.success());
        let stream = fs::read(dir.join(name).join("main.bin")).unwrap();
        let file = dir.join("ckpt");
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let receive =
            format!("exec {} receive fd:3 -o {} --json 3<&0 </dev/null", env!("CARGO_BIN_EXE_multifd"), file.display());
        let mut command = Command::new("sh");
        command.args(["-c", &receive]).stdin(std::os::fd::OwnedFd::from(theirs));
        let (receive, uri) = Process::listening(command);
        assert_eq!(uri, "fd:3");
        // It closes main when it was told that the VM is ours, as a QEMU does.
        let mut answers = ours.try_clone().unwrap();
        let reader = thread::spawn(move || answers.read_to_end(&mut Vec::new()));
        io::Write::write_all(&mut &ours, &stream).unwrap();
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        let (exit, report) = receive.end();
        assert_eq!(exit, 0, "{report}");
        let report = json(report.as_bytes());
        assert_eq!(
            (&report["channels"], report["machine"].as_str().unwrap().starts_with("pc")),
            (&json!(0), true),
            "{report}"
        );
        // The receiver has ended, whatever it said last.
        let _ = reader.join().unwrap();
        assert_eq!(exit_code(&common::run(&format!("inspect {}", file.display()))), 0);
    });
}

/// It ended in the middle, after main had been sent.
#[test]
fn sending_to_a_descriptor_is_refused_with_what_works() {
    for args in ["send no-file fd:3", "guest --migrate-to fd:3"] {
        let output = time_limit(LIMIT, || common::run(args));
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(exit_code(&output), 2, "{message}");
        assert!(
            message.contains("fd:3") && message.contains("expected tcp:HOST:PORT, unix:PATH or vsock:CID:PORT"),
            "{message}"
        );
    }
}

/// It was waited for without an end.
#[test]
fn a_destination_that_never_answers_is_given_up_and_the_guest_runs_on() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                thread::spawn(move || io::copy(&mut &connection, &mut io::sink()));
            }
        });
        let source = Guest::start(dir.path(), "source", &format!("{SMALL} --stall-timeout 300ms"));
        source.wait_for(|status| status["state"] == "running");
        source.ask("migrate", json!({ "uri": uri })).unwrap();
        let status = source.wait_for(|status| status["state"] != "outgoing");
        assert_eq!((&status["state"], &status["status"]), (&json!("running"), &json!("failed")), "{status}");
        assert!(status["error"].as_str().unwrap().contains("within 0.3 s"), "{status}");
        source.runs_on();
    });
}

/// It was in the way of the next guest.
#[test]
fn the_monitor_of_a_killed_guest_is_replaced() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let first = Guest::start(dir.path(), "monitor", SMALL);
        first.wait_for(|_| true);
        first.kill();
        assert!(dir.join("monitor").exists());
        let second = Guest::start(dir.path(), "monitor", SMALL);
        second.runs_on();
        // One that lives keeps it.
        let third = Guest::start(dir.path(), "monitor", SMALL);
        let (exit, report) = third.end();
        assert_eq!(exit, 1, "{report}");
        assert!(report["error"].as_str().unwrap().contains("another process listens there"), "{report}");
        second.runs_on();
        assert!(second.ask("quit", json!({})).unwrap().get("return").is_some());
        assert_eq!(second.end().0, 0);
        assert!(!dir.join("monitor").exists());
    });
}

/// A QEMU closes the connection without a reason when it is set up otherwise.
#[test]
fn a_qemu_that_hangs_up_leads_to_what_was_sent_and_where_it_says_why() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        assert_eq!(checkpoint(&dir, "ckpt", "pc-q35-10.0").0, 0);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let peer = thread::spawn(move || listener.accept().unwrap().0.read_exact(&mut [0; 64]));
        let send = format!("send {} {uri} --compression zlib --channels 3 --json", dir.join("ckpt").display());
        let output = common::run(&send);
        peer.join().unwrap().unwrap();
        assert_eq!(exit_code(&output), 1, "{output:?}");
        let report = json(&output.stdout);
        let error = report["error"].as_str().unwrap();
        for part in [
            "machine pc-q35-10.0",
            "3 channels",
            "compression zlib",
            "\"ram\" 1MiB",
            "multifd-channels",
            "multifd-compression",
            "query-migrate",
            "error-desc",
            "/var/log/libvirt/qemu",
        ] {
            assert!(error.contains(part), "{part}: {error}");
        }
        // One that was never there is not a matter of set-up.
        let output = common::run(&format!("send {} {uri} --connect-timeout 1ms --json", dir.join("ckpt").display()));
        let report = json(&output.stdout);
        assert!(!report["error"].as_str().unwrap().contains("multifd-channels"), "{report}");
    });
}

/// A stranger that knew the protocol could write guest memory, and take main's place.
#[test]
fn a_token_keeps_a_source_without_it_away_and_lets_the_right_one_in() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let token = "00112233445566778899aabbccddeeff";
        let with = format!("{SMALL} --token {token}");
        let (destination, uri) = Guest::incoming(dir.path(), "destination", &with);
        for (name, other) in [("none", ""), ("wrong", "--token ffeeddccbbaa99887766554433221100")] {
            let source = Guest::start(dir.path(), name, &format!("{SMALL} {other}"));
            source.wait_for(|status| status["state"] == "running");
            source.ask("migrate", serde_json::json!({ "uri": uri })).unwrap();
            source.wait_for(|status| status["state"] == "running" && status["error"].is_string());
            source.runs_on();
            source.kill();
            destination.wait_for(|status| status["state"] == "incoming");
        }
        let source = Guest::start(dir.path(), "right", &with);
        source.wait_for(|status| status["state"] == "running");
        source.ask("migrate", serde_json::json!({ "uri": uri })).unwrap();
        assert_eq!(source.end().0, 0);
        destination.runs_on();
        destination.kill();
        let refused = run(&format!("send nowhere unix:nowhere --peer qemu --token {token}"));
        assert_eq!(exit_code(&refused), 2, "{}", String::from_utf8_lossy(&refused.stderr));
    });
}

/// Runs the command with `args` where no file may be longer than 512 bytes.
fn without_long_files(args: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -f 1; exec {} {args}", env!("CARGO_BIN_EXE_multifd"))]).stdin(Stdio::null());
    command
}

/// The signal of that limit ended the verbs that do not wait for interrupts.
#[test]
fn a_limit_on_the_length_of_files_is_an_error_in_each_verb() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        assert_eq!(checkpoint(&dir, "ckpt", "multifd").0, 0);
        let (at, out) = (dir.path().display(), dir.join("stdout"));
        for (args, reason) in [
            (format!("inspect {at}/ckpt --extract ram -o {at}/ram"), "/ram: File too large"),
            (format!("convert {at}/ckpt {at}/new"), "/new\": File too large"),
            (format!("convert {at}/ckpt {at}/new --format stream"), "File too large"),
            (format!("pages {at}/pages"), "File too large"),
            (format!("tls-init {at}/tls --host a"), "File too large"),
            ("schema".to_owned(), "File too large"),
            ("doctor --json".to_owned(), "File too large"),
            ("help demo".to_owned(), ""),
        ] {
            let output = without_long_files(&args).stdout(File::create(&out).unwrap()).output().unwrap();
            let message = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{args}: {:?} {message}", output.status);
            assert!(message.contains(reason) && !message.contains(".multifd-"), "{args}: {message}");
        }
        for name in ["ram", "new"] {
            assert!(!dir.join(name).exists(), "{name}");
        }
        let hidden = |name: &std::ffi::OsStr| name.as_encoded_bytes().starts_with(b".");
        assert!(!fs::read_dir(dir.path()).unwrap().any(|entry| hidden(&entry.unwrap().file_name())));
    });
}

/// It read as if the VM had not been sent.
#[test]
fn a_page_that_cannot_be_written_after_the_migration_does_not_call_it_failed() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        assert_eq!(checkpoint(&dir, "ckpt", "multifd").0, 0);
        let uri = format!("unix:{}", dir.join("receive").display());
        let (receive, uri) = Process::listening(multifd(&format!("receive {uri} -o {}", dir.join("new").display())));
        let page = dir.join("page");
        let args = format!("send {} {uri} --report {}", dir.join("ckpt").display(), page.display());
        let output = without_long_files(&args).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(exit_code(&output), 1, "{message}");
        let expected = format!("multifd: all is done, but --report {}: File too large (os error 27)\n", page.display());
        assert_eq!(message, expected);
        assert_eq!(receive.end().0, 0);
    });
}

/// Its channels were taken for those of strangers, and that was all that the error said.
#[test]
fn a_recording_that_cannot_be_written_is_a_part_of_the_error() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let at = dir.path().display();
        let receive = without_long_files(&format!("receive unix:{at}/s -o {at}/ckpt --record {at}/recorded --json"));
        let (receive, uri) = Process::listening(receive);
        send_guest("multifd", &uri).unwrap_err();
        let (exit, text) = receive.end();
        let report = json(text.as_bytes());
        assert_eq!(exit, 1, "{report}");
        let error = report["error"].as_str().unwrap();
        assert!(error.contains("/recorded") && error.contains("File too large"), "{error}");
        assert!(!dir.join("ckpt").exists());
    });
}

/// The error was about options that the demo gives its processes, and was printed twice; or had a name in it that says nothing.
#[test]
fn a_directory_for_sockets_that_cannot_be_used_is_named_with_what_to_do() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let long = dir.join("x".repeat(120));
        fs::create_dir(&long).unwrap();
        for (place, reason) in [(long, "too long"), (dir.join("nonesuch"), "entity not found")] {
            let output = multifd(&format!("demo {SMALL}")).env("TMPDIR", &place).output().unwrap();
            let message = String::from_utf8_lossy(&output.stderr);
            assert_eq!(exit_code(&output), 1, "{message}");
            assert_eq!(message.lines().count(), 1, "{message}");
            assert!(message.contains(&format!("{place:?}: ")) && message.contains(reason), "{message}");
            assert!(message.contains("TMPDIR names another place") && !message.contains("--qmp"), "{message}");
        }
        for args in ["guest --qmp", "receive tcp:127.0.0.1:0 -o y --metrics", "checkpoint -o y"] {
            let output = multifd(&format!("{args} unix:/{}", "x".repeat(120))).output().unwrap();
            let message = String::from_utf8_lossy(&output.stderr);
            assert!(exit_code(&output) == 2 && message.contains("at most 107 bytes"), "{message}");
        }
    });
}

/// `--force` was recommended, which does not replace them either.
#[test]
fn a_stream_that_would_take_the_place_of_no_file_is_refused_with_or_without_force() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        assert_eq!(checkpoint(&dir, "ckpt", "multifd").0, 0);
        for force in ["", "--force"] {
            for place in [dir.path(), Path::new("/dev/null")] {
                let at = dir.join("ckpt");
                let output = run(&format!("convert {} {} --format stream {force}", at.display(), place.display()));
                let message = String::from_utf8_lossy(&output.stderr);
                assert_eq!(exit_code(&output), 1, "{message}");
                assert!(message.contains("is not a regular file") && !message.contains("--force"), "{message}");
            }
        }
    });
}

/// "Resource temporarily unavailable" was all that it said.
#[test]
fn a_command_that_gets_no_thread_says_what_raises_the_limit() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let Some(user) = common::user::User::new(&dir) else { return };
        let receive = format!("ulimit -u 1; exec '{}' receive unix:s -o ckpt", env!("CARGO_BIN_EXE_multifd"));
        let output = user.command("bash").args(["-c", &receive]).current_dir(dir.path()).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(exit_code(&output), 1, "{message}");
        assert!(message.contains("cannot create the thread \"signals\"") && message.contains("ulimit -u"), "{message}");
    });
}
