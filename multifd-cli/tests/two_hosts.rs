//! A guest that moves between two hosts and back: two network namespaces with a cable between them, and nothing else.

mod common;

use std::{
    fs,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use common::{Guest, LIMIT, number};
use serde_json::json;
use test_support::{TempDir, skip, time_limit};

const SMALL: &str = "--guest process --memory 32MiB --working-set 8MiB --channels 3";

/// A network namespace, for as long as this lives.
struct Host {
    /// Does nothing but keep the namespace. It ends by itself should nobody end it.
    keeper: Child,
}

impl Host {
    /// A new namespace; the error says why there is none.
    fn new() -> Result<Host, String> {
        let mut command = Command::new("unshare");
        command.args(["--net", "--", "sleep", "600"]).stdin(Stdio::null()).stderr(Stdio::piped());
        let keeper = command.spawn().map_err(|error| format!("unshare: {error}"))?;
        let mut host = Host { keeper };
        let ours = fs::read_link("/proc/self/ns/net").map_err(|error| error.to_string())?;
        let deadline = Instant::now() + LIMIT;
        loop {
            if host.keeper.try_wait().is_ok_and(|ended| ended.is_some()) {
                return Err("unshare --net is not permitted".to_owned());
            }
            if fs::read_link(host.namespace()).is_ok_and(|theirs| theirs != ours) {
                return Ok(host);
            }
            assert!(Instant::now() < deadline, "unshare does nothing");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn namespace(&self) -> String {
        format!("/proc/{}/ns/net", self.keeper.id())
    }

    /// `program` on this host.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.namespace())).arg("--").arg(program).stdin(Stdio::null());
        command
    }

    /// Runs `ip` with `args`, separated by spaces.
    fn ip(&self, args: &str) -> Result<(), String> {
        let output = self.command("ip").args(args.split(' ')).output().map_err(|error| format!("nsenter: {error}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() { Ok(()) } else { Err(format!("ip {args}: {}", said.trim())) }
    }

    fn guest(&self, dir: &TempDir, name: &str, args: &str) -> Guest {
        let mut command = self.command(env!("CARGO_BIN_EXE_multifd"));
        command.args(["guest", "--json"]);
        Guest::start_by(command, dir.path(), name, args)
    }

    /// Bytes that went out through network device `device`.
    fn sent(&self, device: &str) -> u64 {
        let devices = fs::read_to_string(format!("/proc/{}/net/dev", self.keeper.id())).unwrap();
        let line = devices.lines().find_map(|line| line.trim().strip_prefix(&format!("{device}:")));
        line.unwrap().split_whitespace().nth(8).unwrap().parse().unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

/// Two hosts, 192.0.2.1 and 192.0.2.2, with a cable between them; the error says why there are none.
fn two_hosts() -> Result<(Host, Host), String> {
    let (left, right) = (Host::new()?, Host::new()?);
    left.ip(&format!("link add cable type veth peer name cable netns {}", right.keeper.id()))?;
    for (host, address) in [(&left, "192.0.2.1"), (&right, "192.0.2.2")] {
        host.ip(&format!("address add {address}/24 dev cable"))?;
        host.ip("link set dev cable up")?;
    }
    Ok((left, right))
}

#[test]
fn a_guest_moves_to_another_host_and_back() {
    time_limit(LIMIT, || {
        let (left, right) = match two_hosts() {
            Ok(hosts) => hosts,
            Err(reason) => return skip(&reason),
        };
        let dir = TempDir::new().unwrap();
        let mut source = left.guest(&dir, "first", SMALL);
        source.wait_for(|status| status["state"] == "running");
        let way = [("there", &left, &right, "192.0.2.2"), ("back", &right, &left, "192.0.2.1")];
        for (name, from, to, address) in way {
            let destination = to.guest(&dir, name, &format!("{SMALL} --incoming tcp:{address}:0"));
            let uri = destination.listening();
            assert!(uri.starts_with(&format!("tcp:{address}:")), "{uri}");
            let before = from.sent("cable");
            source.ask(&json!({ "migrate": uri })).unwrap();
            let (exit, report) = source.end();
            assert_eq!((exit, &report["status"]), (0, &json!("completed")), "{name}: {report}");
            let (sent, transferred) = (from.sent("cable") - before, number(&report, "/ram/transferred"));
            assert!(transferred > 8e6 && sent as f64 >= transferred, "{name}: {sent} of {transferred} bytes by cable");
            destination.runs_on();
            source = destination;
        }
        assert!(source.ask(&json!("quit")).unwrap().get("return").is_some());
        let (exit, report) = source.end();
        assert_eq!(exit, 0, "{report}");
        assert_eq!(number(&report, "/guest-errors") + number(&report, "/pages-wrong"), 0.0);
    });
}
