//! Two hosts with a cable between them: network namespaces, for tests of what crosses a network. Needs root.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use super::{Guest, LIMIT};

/// A network namespace, for as long as this lives.
pub struct Host {
    /// Does nothing but keep the namespace. It ends with the pipe to it, and so with the test however that ends.
    keeper: Child,
}

impl Host {
    /// A new namespace; the error says why there is none.
    pub fn new() -> Result<Host, String> {
        let mut command = Command::new("unshare");
        command.args(["--net", "--", "cat"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
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
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.namespace())).arg("--").arg(program).stdin(Stdio::null());
        command
    }

    /// Runs `ip` with `args`, separated by spaces.
    pub fn ip(&self, args: &str) -> Result<(), String> {
        let output = self.command("ip").args(args.split(' ')).output().map_err(|error| format!("nsenter: {error}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() { Ok(()) } else { Err(format!("ip {args}: {}", said.trim())) }
    }

    pub fn guest(&self, dir: &Path, name: &str, args: &str) -> Guest {
        let mut command = self.command(env!("CARGO_BIN_EXE_multifd"));
        command.args(["guest", "--json"]);
        Guest::start_by(command, dir, name, args)
    }

    /// What this host sends to the other arrives, or is lost on the way without a word, which is `cut`.
    pub fn reaches(&self, address: &str, mac: &str, cut: bool) {
        let mac = if cut { "02:00:00:00:00:99" } else { mac };
        self.ip(&format!("neigh replace {address} lladdr {mac} dev cable nud permanent")).unwrap();
    }

    /// Bytes that went out through network device `device`.
    pub fn sent(&self, device: &str) -> u64 {
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
pub fn two_hosts() -> Result<(Host, Host), String> {
    let (left, right) = (Host::new()?, Host::new()?);
    left.ip(&format!("link add cable type veth peer name cable netns {}", right.keeper.id()))?;
    for (host, address) in [(&left, "192.0.2.1"), (&right, "192.0.2.2")] {
        host.ip(&format!("address add {address}/24 dev cable"))?;
        host.ip("link set dev cable up")?;
    }
    Ok((left, right))
}
