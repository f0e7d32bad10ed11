//! A libvirt daemon of one's own, that starts QEMU 7.2.
//!
//! libvirt 9.0 is Debian 12's. Its packages are unpacked beside those of QEMU; nothing is installed. The daemon has to find its
//! helpers at their places below `/usr`, so it runs in a mount namespace in which these packages are laid over the machine's
//! `/usr`, and in a process namespace, with which all QEMUs end that it has started. It runs as an ordinary user: one that is
//! root would take the machine's own configuration, networks and cgroups. Making the namespaces needs root.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use test_support::{TempDir, skip};

use crate::{
    Error, Installed, Version,
    install::{last_lines, packages_beside},
};

/// A libvirt that can be started.
pub struct Libvirt {
    /// What is laid over `/usr`, the uppermost first.
    layers: Vec<PathBuf>,
}

impl Libvirt {
    /// The libvirt for a test, or `None` after declaring the test as skipped.
    pub fn require() -> Option<Libvirt> {
        let qemu = Installed::require(Version::V7_2)?;
        match Libvirt::find(&qemu) {
            Ok(libvirt) => Some(libvirt),
            Err(reason) => {
                skip(&format!("libvirt is not available here: {reason}"));
                None
            }
        }
    }

    fn find(qemu: &Installed) -> Result<Libvirt, String> {
        let qemu = qemu.prefix().ok_or("QEMU 7.2 is not one that was unpacked here")?;
        if !rustix::process::geteuid().is_root() {
            return Err("making namespaces needs root".to_owned());
        }
        let packages = ["libvirt-daemon", "libvirt-daemon-driver-qemu", "libvirt-clients"];
        let prefix = packages_beside("libvirt-9.0", &packages)?;
        let libvirt = Libvirt { layers: vec![prefix.join("usr"), qemu.join("usr")] };
        let mut version = libvirt.command(&["libvirtd", "--version"]);
        let output = output(&mut version, Duration::from_secs(60)).map_err(|error| error.to_string())?;
        match String::from_utf8_lossy(&output.stdout) {
            text if text.contains("(libvirt) 9.") => Ok(libvirt),
            text => Err(format!("libvirtd does not run: {text}{}", String::from_utf8_lossy(&output.stderr))),
        }
    }

    /// Starts a daemon whose `virsh save` writes images in `format`.
    ///
    /// # Errors
    ///
    /// It does not answer; its log says why.
    pub fn start(&self, format: &str) -> Result<Daemon, Error> {
        let directory = TempDir::new()?;
        for name in ["run", "config/libvirt", "cache", "data"] {
            fs::create_dir_all(directory.join(name))?;
        }
        let settings = format!(
            "stdio_handler = \"file\"\nnamespaces = []\nsecurity_driver = \"none\"\ncgroup_controllers = []\n\
             save_image_format = \"{format}\"\n"
        );
        fs::write(directory.join("config/libvirt/qemu.conf"), settings)?;
        for name in ["", "run", "config", "config/libvirt", "config/libvirt/qemu.conf", "cache", "data"] {
            chown(directory.join(name), Some(USER), Some(USER))?;
        }
        fs::set_permissions(directory.join("run"), fs::Permissions::from_mode(0o700))?;
        let log = fs::File::create(directory.join("log"))?;
        let mut command = self.command(&["libvirtd"]);
        environment(&mut command, directory.path());
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        let daemon = Daemon { libvirt: Libvirt { layers: self.layers.clone() }, child, directory };
        let deadline = Instant::now() + LIMIT;
        while !daemon.virsh(&["version"]).is_ok_and(|text| text.contains("Running hypervisor")) {
            if Instant::now() > deadline {
                let log = last_lines(&daemon.directory.join("log"));
                return Err(Error::Ended { status: "without an answer of libvirtd".to_owned(), log });
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(daemon)
    }

    /// A command in namespaces of its own, as an ordinary user. All that it starts ends with it.
    fn command(&self, words: &[&str]) -> Command {
        let layers: Vec<String> = self.layers.iter().map(|layer| layer.display().to_string()).collect();
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--propagation", "private"]);
        command.args(["sh", "-c", IN_NAMESPACES, "sh", &layers.join(":"), &USER.to_string()]).args(words);
        command
    }
}

/// A daemon. It ends, with all of its domains, when this is dropped.
pub struct Daemon {
    libvirt: Libvirt,
    child: Child,
    directory: TempDir,
}

impl Daemon {
    /// Runs `virsh` with `args`, and returns what it says.
    ///
    /// # Errors
    ///
    /// [`Error::Ended`] with its words where it fails or takes too long.
    pub fn virsh(&self, args: &[&str]) -> Result<String, Error> {
        let words = [&["virsh", "--connect", "qemu:///session"], args].concat();
        let mut command = self.libvirt.command(&words);
        environment(&mut command, self.directory.path());
        let output = output(&mut command, LIMIT)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(Error::Ended { status: output.status.to_string(), log: text(&output.stderr) }),
        }
    }

    /// A file in the daemon's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Gives the file `path` to the user that the daemon runs as.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn own(&self, path: &Path) -> Result<(), Error> {
        Ok(chown(path, Some(USER), Some(USER))?)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // With the shell, the first process of its namespace, the kernel ends all others; then `unshare` ends, too.
        let id = self.child.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        let shells: Vec<_> =
            children.split_whitespace().filter_map(|child| Pid::from_raw(child.parse().ok()?)).collect();
        for shell in &shells {
            let _ = kill_process(*shell, Signal::KILL);
        }
        if shells.is_empty() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

fn environment(command: &mut Command, directory: &Path) {
    for (variable, name) in
        [("RUNTIME_DIR", "run"), ("CONFIG_HOME", "config"), ("CACHE_HOME", "cache"), ("DATA_HOME", "data")]
    {
        command.env(format!("XDG_{variable}"), directory.join(name));
    }
    command.env("HOME", directory).env("LC_ALL", "C").env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
}

/// Runs `command`, or ends it when `limit` is over.
fn output(command: &mut Command, limit: Duration) -> Result<Output, Error> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let deadline = Instant::now() + limit;
    // What it says fits into a pipe.
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            let awaited = format!("the end of {command:?}");
            return Err(Error::TooLate { awaited, limit, seen: "running".to_owned() });
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(child.wait_with_output()?)
}

/// `nobody`.
const USER: u32 = 65534;
/// What a single step may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(90);
/// `$1`: layers, `$2`: user, then the command. The shell stays, as the first process of the namespace: it reaps what has lost its
/// parent, for the end of which the daemon would wait half a minute each time.
const IN_NAMESPACES: &str = "mount -t overlay overlay -o \"lowerdir=$1:/usr\" /usr || exit 1; user=$2; shift 2; \
    setpriv --reuid=$user --regid=$user --clear-groups \"$@\" & wait $!";
