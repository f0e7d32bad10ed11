//! Sockets that systemd passes: `receive systemd` and `serve --listen systemd`, with a shell in its place.

mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    net::TcpListener,
    os::{
        fd::OwnedFd,
        unix::net::{UnixDatagram, UnixListener, UnixStream},
    },
    process::{Child, ChildStderr, Command, Stdio},
};

use common::{LIMIT, captures::recorded, exit_code, json, run};
use rustix::{
    fs::{OFlags, fcntl_getfl},
    process::{Pid, Signal, kill_process},
};
use test_support::{TempDir, skip, time_limit};

/// A process that is killed with the test.
struct Service {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Service {
    /// The command with `args`, and with `socket` as descriptor 3 and the variables that a service manager sets.
    fn start(socket: OwnedFd, variables: &str, args: &str) -> Service {
        let script = format!("{variables} exec {} {args} 3<&0 </dev/null", env!("CARGO_BIN_EXE_multifd"));
        let mut command = Command::new("sh");
        command.args(["-c", &script]).stdin(socket).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Service { child, stderr }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stderr.read_line(&mut line).unwrap();
        line
    }

    /// Whether children of this process would have descriptor `number` as well.
    fn is_inherited(&self, number: u32) -> bool {
        let info = fs::read_to_string(format!("/proc/{}/fdinfo/{number}", self.child.id())).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        u32::from_str_radix(flags.trim(), 8).unwrap() & 0o2_000_000 == 0
    }

    /// Its exit status, what it printed, and what else it said.
    fn end(mut self) -> (i32, String, String) {
        let (mut stdout, mut stderr) = (String::new(), String::new());
        self.child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
        self.stderr.read_to_string(&mut stderr).unwrap();
        (self.child.wait().unwrap().code().unwrap_or(-1), stdout, stderr)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It has usually ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const OURS: &str = "LISTEN_PID=$$ LISTEN_FDS=1";
const GUEST: &str = "guest --guest process --memory 4MiB --after 1ms --run-for 1ms --json --migrate-to";

#[test]
fn receive_takes_a_guest_that_connects_to_a_socket_of_the_service_manager() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let args = format!("receive systemd --allow 127.0.0.0/8 --json -o {}", dir.join("vm").display());
        let mut service = Service::start(listener.into(), OURS, &args);
        assert_eq!(service.line(), "listening on fd:3\n");
        assert!(!service.is_inherited(3));
        let sent = run(&format!("{GUEST} tcp:{address}"));
        assert_eq!(exit_code(&sent), 0, "{sent:?}");
        let (exit, report, stderr) = service.end();
        assert_eq!((exit, &json(report.as_bytes())["status"]), (0, &"completed".into()), "{stderr}");
    });
}

/// Another process that accepts from the same socket got `EAGAIN` as long as `receive` had it.
#[test]
fn receive_leaves_the_mode_of_a_socket_of_the_service_manager_alone() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let is_blocking = || !fcntl_getfl(&listener).unwrap().contains(OFlags::NONBLOCK);
        let args = format!("receive systemd --allow 127.0.0.0/8 -vv -o {}", dir.join("vm").display());
        let mut service = Service::start(listener.try_clone().unwrap().into(), OURS, &args);
        loop {
            let line = service.line();
            if line.contains("no io_uring here") {
                return skip(&line);
            }
            if line.contains("listening on fd:3") {
                break;
            }
            assert_ne!(line, "", "it has ended");
        }
        assert!(is_blocking());
        let sent = run(&format!("{GUEST} tcp:{address}"));
        assert_eq!(exit_code(&sent), 0, "{sent:?}");
        let (exit, _, stderr) = service.end();
        assert_eq!(exit, 0, "{stderr}");
        assert!(is_blocking());
    });
}

#[test]
fn of_several_sockets_one_is_named_and_all_are_kept_from_children() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("vm").display().to_string();
        let socket = |name: &str| OwnedFd::from(UnixListener::bind(dir.join(name)).unwrap());
        let two = "LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=vm:other";
        let mut service = Service::start(socket("a"), two, &format!("receive systemd:vm -o {file} 4<&0"));
        assert_eq!(service.line(), "listening on fd:3\n");
        assert!(!service.is_inherited(3) && !service.is_inherited(4));
        kill_process(Pid::from_child(&service.child), Signal::TERM).unwrap();
        assert_eq!(service.end().0, 3);
        for (name, args, expected) in
            [("b", "systemd", "expected systemd:NAME"), ("c", "systemd:no", "no socket called")]
        {
            let (exit, _, said) = Service::start(socket(name), two, &format!("receive {args} -o {file}")).end();
            assert!(exit == 1 && said.contains(expected) && said.contains("\"other\""), "{exit}: {said}");
        }
    });
}

/// The processes of the demo are children: the variables are not for them, and would name descriptors that they do not have.
#[test]
fn children_do_not_get_the_variables_of_the_service_manager() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let socket = OwnedFd::from(UnixListener::bind(dir.join("a")).unwrap());
        let variables = "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=vm OTHERS_STAY=1";
        // Long enough to be looked at, and ended then.
        let args = "demo --guest process --memory 4MiB --working-set 1MiB --after 1h --json -q";
        let service = Service::start(socket, variables, args);
        let id = service.child.id();
        let children = || fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        let environment = loop {
            // A child that was just forked has not been given its own yet.
            let of = |child: &str| fs::read(format!("/proc/{child}/environ")).unwrap_or_default();
            match children().split_whitespace().find(|child| is_guest(child)) {
                Some(child) => break of(child),
                None => std::thread::sleep(std::time::Duration::from_millis(5)),
            }
        };
        kill_process(Pid::from_child(&service.child), Signal::TERM).unwrap();
        let environment = String::from_utf8_lossy(&environment).into_owned();
        assert!(environment.contains("OTHERS_STAY=1"), "{environment}");
        assert!(!environment.contains("LISTEN_"), "{environment}");
        service.end();
    });
}

/// Whether process `id` runs `multifd guest` by now.
fn is_guest(id: &str) -> bool {
    let arguments = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
    arguments.split(|&byte| byte == 0).any(|argument| argument == b"guest")
}

#[test]
fn what_is_no_listening_socket_or_is_not_for_this_process_is_refused() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("vm").display().to_string();
        let connected = || OwnedFd::from(UnixStream::pair().unwrap().0);
        let datagram = OwnedFd::from(UnixDatagram::unbound().unwrap());
        let listener = OwnedFd::from(UnixListener::bind(dir.join("s")).unwrap());
        for (socket, variables, expected) in [
            (connected(), OURS, "does not listen; expected a stream socket"),
            (fs::File::open("/dev/null").unwrap().into(), OURS, "does not listen"),
            (datagram, OURS, "not a stream socket"),
            (connected(), "LISTEN_PID=$$ LISTEN_FDS=x", "expected a number from 1 to 1024"),
            (connected(), "LISTEN_FDS=1", "LISTEN_PID is not set"),
            (listener, "LISTEN_PID=1 LISTEN_FDS=1", "LISTEN_PID is \"1\""),
        ] {
            let (exit, _, said) = Service::start(socket, variables, &format!("receive systemd -o {file}")).end();
            assert!(exit == 1 && said.contains(expected), "{variables}: {exit}: {said}");
        }
        assert!(!dir.join("vm").exists());
    });
}

#[test]
fn serve_takes_clients_at_a_socket_of_the_service_manager() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (stream, file) = (dir.join("stream"), dir.join("checkpoint"));
        fs::write(&stream, recorded("q10.0-xbzrle-0ch")).unwrap();
        assert!(run(&format!("convert {} {}", stream.display(), file.display())).status.success());
        let listener = UnixListener::bind(dir.join("s")).unwrap();
        let args = format!("serve {} --listen systemd --clients 1 --json", file.display());
        let mut service = Service::start(listener.into(), OURS, &args);
        assert_eq!(service.line(), "listening on fd:3\n");
        let mut client = UnixStream::connect(dir.join("s")).unwrap();
        let mut magic = [0; 4];
        client.read_exact(&mut magic).unwrap();
        assert_eq!(&magic, b"QEVM");
        drop(client);
        let (_, report, stderr) = service.end();
        assert_eq!(json(report.as_bytes())["client"], 1, "{stderr}");
    });
}
