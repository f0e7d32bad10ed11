//! A user whom limits bind.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::Command,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use rustix::process::{Pid, getuid};
use test_support::{TempDir, skip};

/// A user of its own, whom the limit on threads binds: it counts all threads of the user.
pub struct User(u32);

impl User {
    /// `None` and a skip where the command cannot run as another user.
    pub fn new(dir: &TempDir) -> Option<User> {
        if !getuid().is_root() {
            skip("only root can run the command as another user");
            return None;
        }
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let user = User(200_000 + std::process::id() % 1_000_000 * 8 + NEXT.fetch_add(1, Relaxed));
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let problem = match user.command(env!("CARGO_BIN_EXE_multifd")).arg("--version").output() {
            Ok(output) if output.status.success() => return Some(user),
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        skip(&format!("the command does not run as another user: {problem}"));
        None
    }

    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.arg(format!("--reuid={}", self.0)).args(["--clear-groups", "--inh-caps=-all", program]);
        command
    }

    pub fn guest(&self) -> Command {
        let mut command = self.command(env!("CARGO_BIN_EXE_multifd"));
        command.args(["guest", "--json"]);
        command
    }

    /// Lets `pid` have `more` threads than it has.
    pub fn allow(&self, pid: Pid, more: usize) {
        let threads = fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())).unwrap().count();
        self.limit(pid, &format!("--nproc={}:", threads + more));
    }

    /// Changes a limit of `pid`, as `prlimit` takes it.
    pub fn limit(&self, pid: Pid, limit: &str) {
        // By the user itself: nobody else may without a privilege.
        let mut command = self.command("prlimit");
        let output = command.args([&format!("--pid={}", pid.as_raw_nonzero()), limit]).output().unwrap();
        assert!(output.status.success(), "prlimit: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Bytes of address space that `pid` uses.
pub fn address_space(pid: Pid) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    kib.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}
