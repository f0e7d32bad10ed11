//! Two processes of the example VMM: the guest moves from one to the other, and finds nothing wrong with its memory.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::Duration,
};

use test_support::{HugePages, TempDir, skip, time_limit};

const LIMIT: Duration = Duration::from_secs(120);

/// A process of the VMM. It is ended when this is dropped.
struct Vmm {
    child: Child,
    stdin: ChildStdin,
    stderr: BufReader<ChildStderr>,
    /// How many passes the guest has finished here.
    passes: Arc<AtomicU64>,
    /// Whether it has found anything wrong.
    wrong: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl Vmm {
    fn start(mut command: Command) -> Vmm {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        let (passes, wrong) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let stdout = child.stdout.take().unwrap();
        let reader = std::thread::spawn({
            let (passes, wrong) = (passes.clone(), wrong.clone());
            move || read_serial(stdout, &passes, &wrong)
        });
        Vmm {
            stdin: child.stdin.take().unwrap(),
            stderr: BufReader::new(child.stderr.take().unwrap()),
            child,
            passes,
            wrong,
            reader: Some(reader),
        }
    }

    /// The rest of the first line that begins with `start`.
    fn await_line(&mut self, start: &str) -> String {
        let mut all = String::new();
        loop {
            let at = all.len();
            assert_ne!(self.stderr.read_line(&mut all).unwrap(), 0, "it ended without {start:?}:\n{all}");
            if let Some(rest) = all[at..].strip_prefix(start) {
                return rest.trim().to_owned();
            }
        }
    }

    /// Waits until the guest has finished `more` passes.
    fn await_passes(&self, more: u64) {
        let enough = self.passes.load(SeqCst) + more;
        while self.passes.load(SeqCst) < enough {
            assert!(!self.wrong.load(SeqCst), "the guest found wrong contents in its memory");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn say(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").unwrap();
    }

    /// Waits for its end, which is a success; nothing was wrong until then.
    fn ends(mut self) {
        assert!(self.child.wait().unwrap().success());
        self.reader.take().unwrap().join().unwrap();
        assert!(!self.wrong.load(SeqCst), "the guest found wrong contents in its memory");
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_serial(mut stdout: ChildStdout, passes: &AtomicU64, wrong: &AtomicBool) {
    let mut bytes = [0; 512];
    while let Ok(n @ 1..) = stdout.read(&mut bytes) {
        passes.fetch_add(bytes[..n].iter().filter(|byte| **byte == b'.').count() as u64, SeqCst);
        wrong.fetch_or(bytes[..n].contains(&b'X'), SeqCst);
    }
}

fn vmm(arguments: &[&str], options: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.args(arguments).args(options.split_whitespace());
    command
}

/// Says why there is no KVM here; tests return then.
fn no_kvm() -> bool {
    match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => false,
        Err(error) => {
            skip(&format!("/dev/kvm: {error}"));
            true
        }
    }
}

/// Moves a guest from a VMM with the options `from` to one that `receiver` starts, and lets it go on there.
fn moves(from: Command, receiver: impl FnOnce(&str) -> Command) {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let address = format!("unix:{}", dir.join("socket").display());
        let mut destination = Vmm::start(receiver(&address));
        assert_eq!(destination.await_line("listening at "), address);
        let mut source = Vmm::start(from);
        source.await_line("running");
        source.await_passes(4);
        source.say(&format!("migrate {address}"));
        source.await_line("moved to ");
        source.ends();
        destination.await_line("running");
        // Each vCPU has verified each page of its share.
        destination.await_passes(6);
        destination.say("quit");
        destination.ends();
    });
}

#[test]
fn a_guest_in_anonymous_memory_moves() {
    if !no_kvm() {
        moves(vmm(&["run"], ""), |at| vmm(&["receive", at], ""));
    }
}

#[test]
fn a_guest_moves_from_a_memory_file_to_anonymous_memory() {
    if !no_kvm() {
        moves(vmm(&["run"], "--backing memfd --cpus 4"), |at| vmm(&["receive", at], "--cpus 4"));
    }
}

#[test]
fn a_guest_in_huge_pages_moves() {
    if no_kvm() {
        return;
    }
    let Some(_pages) = HugePages::reserve(2 * 33) else { return skip("no huge pages can be reserved here (as root)") };
    let options = "--backing huge --memory 64 --busy 8";
    moves(vmm(&["run"], options), |at| vmm(&["receive", at], options));
}

/// Every page that the guest does not use is zero at both ends, and costs nothing at either.
#[test]
fn a_guest_that_uses_little_of_its_memory_moves() {
    if !no_kvm() {
        moves(vmm(&["run"], "--memory 65536 --busy 4"), |at| vmm(&["receive", at], "--memory 65536 --busy 4"));
    }
}

/// The same in huge pages: both ends together have as many as the guest uses, and a few.
#[test]
fn a_guest_that_uses_little_of_its_memory_moves_in_huge_pages() {
    if no_kvm() {
        return;
    }
    let Some(_pages) = HugePages::reserve(2 * 20) else { return skip("no huge pages can be reserved here (as root)") };
    let options = "--backing huge-unreserved --memory 65536 --busy 4";
    moves(vmm(&["run"], options), |at| vmm(&["receive", at], options));
}

/// In a jail there is no `/proc`: nothing can be read about mappings.
#[test]
fn a_guest_moves_to_and_from_a_jail_without_proc() {
    if no_kvm() {
        return;
    }
    let jail = |arguments: &[&str], options: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", r#"umount -l /proc && test ! -e /proc/self && exec "$@""#, "sh"]);
        command.arg(env!("CARGO_BIN_EXE_vmm")).args(arguments).args(options.split_whitespace());
        command
    };
    let probe = Command::new("unshare").args(["--mount", "umount", "-l", "/proc"]).stderr(Stdio::null()).status();
    if !probe.is_ok_and(|status| status.success()) {
        return skip("no mount namespace can be made here (as root)");
    }
    for backing in ["anonymous", "memfd"] {
        let options = format!("--backing {backing}");
        moves(jail(&["run"], &options), |at| jail(&["receive", at], &options));
    }
    let Some(_pages) = HugePages::reserve(2 * 33) else { return skip("no huge pages can be reserved here (as root)") };
    let options = "--backing huge --memory 64 --busy 8";
    moves(jail(&["run"], options), |at| jail(&["receive", at], options));
}

/// Each process may make the calls that the crate lists, and those that the VMM itself makes.
#[test]
fn a_guest_moves_under_the_list_of_system_calls() {
    if no_kvm() {
        return;
    }
    for backing in ["anonymous", "memfd"] {
        let options = format!("--backing {backing} --seccomp on");
        moves(vmm(&["run"], &options), |at| vmm(&["receive", at], &options));
    }
    time_limit(LIMIT, || {
        let (dir, options) = (TempDir::new().unwrap(), "--backing memfd --seccomp on");
        let unix = format!("unix:{}", dir.join("s").display());
        let mut new = Vmm::start(vmm(&["receive", &unix], options));
        new.await_line("listening at ");
        let mut old = Vmm::start(vmm(&["run"], options));
        old.await_line("running");
        for vmm in [&old, &new] {
            let status = std::fs::read_to_string(format!("/proc/{}/status", vmm.child.id())).unwrap();
            assert!(status.contains("Seccomp:\t2"), "it has no filter:\n{status}");
        }
        old.say(&format!("upgrade {unix}"));
        old.await_line("moved to ");
        old.ends();
        new.await_line("running");
        new.await_passes(4);
        new.say("quit");
        new.ends();
    });
}

#[test]
fn a_guest_of_an_ordinary_user_moves() {
    if no_kvm() {
        return;
    }
    const NOBODY: u32 = 65534;
    let may = {
        let mut probe = Command::new("sh");
        probe.args(["-c", "exec 3<>/dev/kvm"]).stderr(Stdio::null()).uid(NOBODY).gid(NOBODY);
        probe.status().is_ok_and(|status| status.success())
    };
    if !may {
        return skip("an ordinary user may not use /dev/kvm here, or no other user can be taken");
    }
    let as_nobody = |mut command: Command| {
        command.uid(NOBODY).gid(NOBODY);
        command
    };
    time_limit(LIMIT, || {
        let mut destination = Vmm::start(as_nobody(vmm(&["receive", "tcp:127.0.0.1:0"], "")));
        let address = destination.await_line("listening at ");
        moves_to(as_nobody(vmm(&["run"], "")), &address);
        destination.await_line("running");
        destination.await_passes(6);
        destination.say("quit");
        destination.ends();
    });
}

/// The new VMM has the memory of the old one. Where that cannot be, the guest runs on.
#[test]
fn the_vmm_is_replaced_and_the_guest_keeps_its_memory() {
    if no_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let unix = format!("unix:{}", dir.join("s").display());
    let mut kinds = vec!["--backing memfd --cpus 2".to_owned()];
    let pages = HugePages::reserve(33);
    if pages.is_some() {
        kinds.push("--backing huge --memory 64 --busy 8".to_owned());
    }
    time_limit(LIMIT, || {
        for options in &kinds {
            let mut old = Vmm::start(vmm(&["run"], options));
            old.await_line("running");
            old.await_passes(2);
            let mut tcp = Vmm::start(vmm(&["receive", "tcp:127.0.0.1:0"], options));
            let address = tcp.await_line("listening at ");
            old.say(&format!("upgrade {address}"));
            let why = old.await_line("not moved: ");
            assert!(why.contains("descriptors travel over a unix socket only"), "{why}");
            drop(tcp);
            for _ in 0..2 {
                let mut new = Vmm::start(vmm(&["receive", &unix], options));
                new.await_line("listening at ");
                old.say(&format!("upgrade {unix}"));
                old.await_line("moved to ");
                old.ends();
                new.await_line("running");
                new.await_passes(4);
                old = new;
            }
            old.say("quit");
            old.ends();
        }
        let mut private = Vmm::start(vmm(&["run"], ""));
        private.await_line("running");
        private.say(&format!("upgrade {unix}"));
        let why = private.await_line("not moved: ");
        assert!(why.contains("no RAM block is made of a memory file"), "{why}");
        private.await_passes(2);
    });
    if pages.is_none() {
        skip("no huge pages can be reserved here (as root): only memory of small pages was handed over");
    }
}

fn moves_to(from: Command, address: &str) {
    let mut source = Vmm::start(from);
    source.await_line("running");
    source.await_passes(4);
    source.say(&format!("migrate {address}"));
    source.await_line("moved to ");
    source.ends();
}

/// A receiver that gives less than the VM has refuses it, and one that is not there is an error: the guest runs on.
#[test]
fn a_guest_that_is_refused_runs_on_and_moves_later() {
    if no_kvm() {
        return;
    }
    time_limit(LIMIT, || {
        let mut source = Vmm::start(vmm(&["run"], ""));
        source.await_line("running");
        source.say("migrate tcp:127.0.0.1:1");
        source.await_line("not moved: ");
        source.await_passes(2);
        for (options, what) in
            [("--memory 128", "bytes of RAM"), ("--display 4", "bytes of display"), ("--cpus 1", "vCPUs")]
        {
            let mut other = Vmm::start(vmm(&["receive", "tcp:127.0.0.1:0"], options));
            let address = other.await_line("listening at ");
            source.say(&format!("migrate {address}"));
            // The receiver's sentence, in the source's words.
            let why = source.await_line("not moved: ");
            assert!(why.contains(&format!(" {what}, and at most ")), "{why}");
            other.await_line("vmm: ");
            source.await_passes(2);
        }
        let mut destination = Vmm::start(vmm(&["receive", "tcp:127.0.0.1:0"], ""));
        let address = destination.await_line("listening at ");
        source.say(&format!("migrate {address}"));
        source.await_line("moved to ");
        source.ends();
        destination.await_line("running");
        destination.await_passes(4);
    });
}

/// What a VMM has to write is what the book shows; it stays small.
#[test]
fn the_glue_has_at_most_150_lines() {
    let glue = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/migration.rs");
    let lines = std::fs::read_to_string(&glue).unwrap().lines().count();
    assert!(lines <= 150, "{} has {lines} lines", glue.display());
    // And it is all of the glue: the VM itself knows nothing of migration.
    for file in std::fs::read_dir(glue.parent().unwrap()).unwrap() {
        let file = file.unwrap().path();
        let text = std::fs::read_to_string(&file).unwrap();
        let knows = text.lines().any(|line| line.contains("multifd::") && !line.trim_start().starts_with("//"));
        let may = ["migration.rs", "main.rs", "conformance.rs"].iter().any(|name| file.ends_with(name));
        assert!(may || !knows, "{} uses multifd", file.display());
    }
}
