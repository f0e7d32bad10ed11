//! A source that cannot know whether the destination has its guest: the guest is paused, and an operator
//! who knows may resume it.

mod common;

use std::{
    fs,
    io::{self, BufRead, Read, Write},
    net::{TcpListener, TcpStream},
    process::Stdio,
    thread,
    time::Duration,
};

use common::{Guest, LIMIT, number};
use multifd_proto::{Codec, return_path::Message, vmdesc::TailScanner};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde_json::json;
use test_support::{TempDir, skip, time_limit};

const SMALL: &str = "--guest process --memory 16MiB --working-set 4MiB";

/// Takes the whole stream of one source, and does not answer. Returns main, and all connections.
fn take_everything(listener: &TcpListener) -> (TcpStream, Vec<TcpStream>) {
    // A source connects main first.
    let (mut main, _) = listener.accept().unwrap();
    let mut connections = vec![main.try_clone().unwrap()];
    // This destination knows of no extensions: it answers the first PING without having accepted any.
    let mut answer = Vec::new();
    Message::Pong(1).encode(&mut answer);
    main.write_all(&answer).unwrap();
    for _ in 0..2 {
        let (mut channel, _) = listener.accept().unwrap();
        connections.push(channel.try_clone().unwrap());
        thread::spawn(move || io::copy(&mut channel, &mut io::sink()));
    }
    let (mut bytes, mut part, mut scanner) = (Vec::new(), vec![0; 1 << 16], TailScanner::default());
    while scanner.scan(&bytes).is_none() {
        let n = main.read(&mut part).unwrap();
        assert!(n > 0, "main ends after {} bytes", bytes.len());
        bytes.extend_from_slice(&part[..n]);
    }
    (main, connections)
}

/// The ends at `process` of connections to `port` of this host.
fn sockets_of(process: Pid, port: u16) -> io::Result<Vec<TcpStream>> {
    let handle = pidfd_open(process, PidfdFlags::empty())?;
    let mut sockets = Vec::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", process.as_raw_nonzero()))? {
        let entry = entry?;
        if !fs::read_link(entry.path())?.to_string_lossy().starts_with("socket:") {
            continue;
        }
        let number = entry.file_name().to_string_lossy().parse().expect("named by descriptors");
        let socket = TcpStream::from(pidfd_getfd(&handle, number, PidfdGetfdFlags::empty())?);
        if socket.peer_addr().is_ok_and(|peer| peer.port() == port) {
            sockets.push(socket);
        }
    }
    Ok(sockets)
}

/// A time limit on the connection passes when the stream is out and no answer has come: the destination may have the guest.
#[test]
fn a_guest_in_doubt_is_paused_until_it_is_told_to_resume() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let source = Guest::start(dir.path(), "source", &format!("{SMALL} --channels 2"));
        source.wait_for(|status| status["state"] == "running");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        source.ask("migrate", json!({ "uri": format!("tcp:{address}") })).unwrap();
        let (mut main, connections) = take_everything(&listener);

        let sockets = match sockets_of(source.pid(), address.port()) {
            Ok(sockets) => sockets,
            Err(error) => return skip(&format!("the sockets of a child cannot be reached: {error}")),
        };
        assert_eq!(sockets.len(), 3);
        for socket in &sockets {
            socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        }
        // The read that waits began without a limit; the one after this answer has it.
        let mut answer = Vec::new();
        Message::Pong(0).encode(&mut answer);
        main.write_all(&answer).unwrap();

        let status = source.wait_for(|status| status["state"] != "outgoing");
        assert_eq!((&status["state"], &status["status"]), (&json!("paused"), &json!("failed")), "{status}");
        let error = status["error"].as_str().unwrap();
        assert!(error.contains("it is not known whether the other side runs the VM"), "{error}");
        // Only the command of an operator who knows resumes it.
        for (refused, arguments) in [
            ("migrate", json!({ "uri": "unix:nowhere" })),
            ("x-guest-finish", json!({ "passes": 1, "within": 1.0 })),
            // Clients say it after a migration that failed, without a look at the destination.
            ("cont", json!({})),
        ] {
            let answer = source.ask(refused, arguments).unwrap();
            assert!(answer["error"].is_string(), "{refused}: {answer}");
        }
        thread::sleep(Duration::from_millis(300));
        let later = source.wait_for(|_| true);
        assert_eq!((&later["state"], &later["passes"]), (&json!("paused"), &status["passes"]));
        assert_eq!(later["pages-written"], status["pages-written"], "it is paused");

        drop((main, connections, sockets));
        assert_eq!(source.ask("x-guest-resume", json!({})).unwrap(), json!({ "return": {} }));
        source.runs_on();
        let again = source.ask("x-guest-resume", json!({})).unwrap();
        assert!(again["error"].as_str().unwrap().contains("is not paused in doubt"), "{again}");

        // It is whole, and can move.
        let (destination, uri) = Guest::incoming(dir.path(), "destination", SMALL);
        source.ask("migrate", json!({ "uri": uri })).unwrap();
        let (exit, report) = source.end();
        assert_eq!((exit, &report["status"]), (0, &json!("completed")), "{report}");
        destination.runs_on();
        assert!(destination.ask("quit", json!({})).unwrap().get("return").is_some());
        let (exit, report) = destination.end();
        assert_eq!(exit, 0, "{report}");
        assert_eq!(number(&report, "/guest-errors") + number(&report, "/pages-wrong"), 0.0);
    });
}

/// Without a QMP socket the process ended, and what may have been the only copy of the guest with it.
#[test]
fn a_guest_in_doubt_without_a_monitor_stays_until_a_signal_resumes_it() {
    time_limit(LIMIT, || {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut command = common::multifd(&format!("guest --json {SMALL} --channels 2 --run-for 1s --after 0"));
        command.args([format!("--migrate-to=tcp:{address}"), "--pause-timeout=300ms".to_owned()]);
        let mut guest = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (main, connections) = take_everything(&listener);
        let mut lines = io::BufReader::new(guest.stderr.take().unwrap()).lines();
        let asked = lines.by_ref().map_while(Result::ok).any(|line| line.contains("kill -USR1"));
        assert!(asked, "no line says what to do");
        thread::sleep(Duration::from_millis(500));
        assert!(guest.try_wait().unwrap().is_none(), "it has ended with the guest");
        drop((main, connections));
        rustix::process::kill_process(Pid::from_child(&guest), rustix::process::Signal::USR1).unwrap();
        let resumed = lines.map_while(Result::ok).any(|line| line.contains("the guest runs on here"));
        assert!(resumed);
        rustix::process::kill_process(Pid::from_child(&guest), rustix::process::Signal::TERM).unwrap();
        let mut report = String::new();
        guest.stdout.take().unwrap().read_to_string(&mut report).unwrap();
        guest.wait().unwrap();
        let report = common::json(report.as_bytes());
        assert_eq!(number(&report, "/guest-errors") + number(&report, "/pages-wrong"), 0.0, "{report}");
    });
}
