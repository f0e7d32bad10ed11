//! A QEMU with a guest, and the `multifd` command as a child with a time limit.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Child, ChildStderr, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use qemu_peer::{BootGuest, Installed, Memory, Qemu, QemuBuilder, Status, guest::Output};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Guest memory in MiB.
pub const MIB: u32 = 48;
/// What a single step may take on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(90);
/// What a whole test may take.
pub const TEST_LIMIT: Duration = Duration::from_secs(600);
pub const UUID: &str = "12345678-1234-5678-9abc-def012345678";

/// Slow enough for a migration to converge, fast enough for many passes a second.
pub fn guest() -> BootGuest {
    BootGuest::filling(MIB).slowed(2000)
}

/// A VM with the guest, whose memory can be read from outside.
pub fn vm(installed: &Installed, machine: &str) -> QemuBuilder {
    let builder = Qemu::builder(installed).machine(machine).memory_mib(MIB).memory(Memory::SharedFile);
    builder.guest(guest()).limit(TEST_LIMIT)
}

/// How a QEMU migrates.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub channels: u8,
    pub compression: &'static str,
    pub return_path: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { channels: 4, compression: "none", return_path: true }
    }
}

impl Settings {
    /// Prepares `qemu` as a source or a destination.
    pub fn apply(&self, qemu: &mut Qemu) {
        qemu.qmp().set_capabilities(&[("return-path", self.return_path)]).unwrap();
        qemu.qmp().set_multifd(self.channels, self.compression).unwrap();
        qemu.qmp().set_parameters(&[("max-bandwidth", json!(10u64 << 30))]).unwrap();
    }

    /// The same as options of `multifd send`.
    pub fn args(&self) -> [String; 2] {
        [format!("--channels={}", self.channels), format!("--compression={}", self.compression)]
    }
}

/// Where `qemu` listens, once `migrate-incoming` was given a TCP port of 0.
pub fn listening_at(qemu: &mut Qemu) -> String {
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = qemu.qmp().query_migrate().unwrap();
        if let Some(address) = answer["socket-address"].as_array().and_then(|all| all.first()) {
            return format!("tcp:{}:{}", address["host"].as_str().unwrap(), address["port"].as_str().unwrap());
        }
        assert!(Instant::now() < deadline, "no address in {answer}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Has `qemu` listen, on TCP or a unix socket.
pub fn listen(qemu: &mut Qemu, tcp: bool) -> String {
    if tcp {
        qemu.qmp().migrate_incoming("tcp:127.0.0.1:0").unwrap();
        return listening_at(qemu);
    }
    let uri = format!("unix:{}", qemu.path("migration").display());
    qemu.qmp().migrate_incoming(&uri).unwrap();
    uri
}

/// Lets a QEMU of this shape load the mapped-ram file by itself.
pub fn load_file(shape: QemuBuilder, file: &Path, capabilities: &[(&str, bool)]) -> Qemu {
    let mut destination = shape.incoming().start().unwrap();
    destination.qmp().set_capabilities(&[("mapped-ram", true)]).unwrap();
    destination.qmp().set_capabilities(capabilities).unwrap();
    destination.qmp().migrate_incoming(&format!("file:{}", file.display())).unwrap();
    destination
}

/// A URI for `multifd receive`.
pub fn receive_uri(directory: &Path, tcp: bool) -> String {
    if tcp { "tcp:127.0.0.1:0".to_owned() } else { format!("unix:{}", directory.join("socket").display()) }
}

/// The `multifd` command. It is killed by its id when this is dropped.
pub struct Multifd {
    child: Child,
    lines: Receiver<String>,
    log: Vec<String>,
    stdout: Option<thread::JoinHandle<String>>,
}

/// What was left of a `multifd` command.
pub struct Ended {
    pub status: ExitStatus,
    pub report: Value,
    pub log: String,
}

impl Multifd {
    pub fn start<S: AsRef<str>>(args: impl IntoIterator<Item = S>) -> Multifd {
        Multifd::start_with(Stdio::null(), args)
    }

    /// The same with a standard input.
    pub fn start_with<S: AsRef<str>>(stdin: Stdio, args: impl IntoIterator<Item = S>) -> Multifd {
        let mut command = Command::new(env!("CARGO_BIN_EXE_multifd"));
        command.args(args.into_iter().map(|arg| arg.as_ref().to_owned())).arg("--json");
        let mut child = command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let lines = follow(child.stderr.take().unwrap());
        let stdout = thread::spawn(move || {
            let mut text = String::new();
            stdout.read_to_string(&mut text).unwrap();
            text
        });
        Multifd { child, lines, log: Vec::new(), stdout: Some(stdout) }
    }

    /// Starts `multifd receive` and waits until it listens; returns where. It ends badly if its audit finds anything.
    pub fn receive(uri: &str, file: &Path, more: &[&str]) -> (Multifd, String) {
        let file = file.display().to_string();
        let mut receive = Multifd::start(["receive", uri, "--output", &file, "--audit"].iter().chain(more));
        let uri = receive.wait_line("listening on ");
        (receive, uri)
    }

    /// The rest of the first line on stderr that begins with `begin`.
    pub fn wait_line(&mut self, begin: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|_| panic!("no {begin:?} in {:?}", self.log));
            self.log.push(line.clone());
            if let Some(rest) = line.strip_prefix(begin) {
                return rest.to_owned();
            }
        }
    }

    /// The first line on stderr that has `part` in it.
    pub fn wait_line_with(&mut self, part: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|_| panic!("no {part:?} in {:?}", self.log));
            self.log.push(line.clone());
            if line.contains(part) {
                return line;
            }
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id().try_into().unwrap()).unwrap(), signal).unwrap();
    }

    /// Waits for the end.
    pub fn end(self) -> Ended {
        let (status, text, log) = self.end_as_text();
        let killed = status.signal().is_some();
        let report =
            if killed { Value::Null } else { serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}")) };
        Ended { status, report, log }
    }

    /// Waits for the end: exit status, stdout, stderr.
    pub fn end_as_text(self) -> (ExitStatus, String, String) {
        self.end_within(LIMIT)
    }

    fn end_within(mut self, limit: Duration) -> (ExitStatus, String, String) {
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                self.log.extend(self.lines.try_iter());
                panic!("multifd does not end: {:?}", self.log);
            }
            thread::sleep(Duration::from_millis(10));
        };
        self.log.extend(self.lines.iter());
        let text = self.stdout.take().unwrap().join().unwrap();
        (status, text, self.log.join("\n"))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end, which has to be a good one and may take `limit`.
    pub fn done_within(self, limit: Duration) -> Value {
        let (status, text, log) = self.end_within(limit);
        assert!(status.success(), "{status}: {text}\n{log}");
        serde_json::from_str(&text).unwrap()
    }

    /// Waits for the end, which has to be a good one.
    pub fn done(self) -> Value {
        let ended = self.end();
        assert!(ended.status.success(), "{}: {}\n{}", ended.status, ended.report, ended.log);
        assert_eq!(ended.report["status"], "completed");
        ended.report
    }
}

impl Ended {
    /// Checks the exit status and that the error says `what`.
    pub fn failed(&self, status: i32, what: &str) {
        let error = self.report["error"].as_str().unwrap_or_default();
        assert_eq!(self.status.code(), Some(status), "{error}\n{}", self.log);
        assert!(error.contains(what), "{what:?} is not in {error:?}");
        assert!(self.log.contains(error), "{}", self.log);
    }
}

impl Drop for Multifd {
    fn drop(&mut self) {
        // Fails only if it was reaped before.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("multifd said: {:?} {:?}", self.log, self.lines.try_iter().collect::<Vec<_>>());
            let stdout = self.stdout.take().and_then(|stdout| stdout.join().ok());
            eprintln!("and reported: {}", stdout.unwrap_or_default());
        }
    }
}

fn follow(stderr: ChildStderr) -> Receiver<String> {
    let (lines, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// SHA-256 of everything in the file.
pub fn digest(path: &Path) -> String {
    let mut hash = Sha256::new();
    let (mut file, mut buf) = (File::open(path).unwrap(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buf).unwrap() {
            0 => return hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
            n => hash.update(&buf[..n]),
        }
    }
}

/// The report's entry for RAM block `name`.
pub fn block<'a>(report: &'a Value, name: &str) -> &'a Value {
    let blocks = report["ram-blocks"].as_array().unwrap();
    blocks.iter().find(|block| block["name"] == name).unwrap_or_else(|| panic!("no {name} in {report}"))
}

/// Checks the blocks in `report` that can be read from outside of `source`, which has stopped.
pub fn assert_same_memory(source: &mut Qemu, report: &Value) {
    assert_eq!(block(report, "pc.ram")["digest"], digest(&source.ram_file().unwrap()));
    // The firmware, which ends at 4 GiB.
    let size = block(report, "pc.bios")["size"].as_u64().unwrap();
    let dump = source.path("bios");
    let file = dump.display().to_string();
    source.qmp().execute("pmemsave", json!({ "val": (1u64 << 32) - size, "size": size, "filename": file })).unwrap();
    assert_eq!(block(report, "pc.bios")["digest"], digest(&dump));
}

/// As [`assert_same_memory`], and says where `checkpoint` differs.
pub fn assert_same_memory_in(checkpoint: &Path, source: &mut Qemu, report: &Value) {
    let ram = source.ram_file().unwrap();
    let (ours, theirs) = (&block(report, "pc.ram")["digest"], digest(&ram));
    if *ours != theirs {
        let copy = source.path("extracted");
        let extract = ["inspect", &checkpoint.display().to_string(), "--extract=pc.ram", "-o"].map(str::to_owned);
        Multifd::start(extract.iter().map(String::as_str).chain([&*copy.display().to_string()])).done();
        let (again, extracted) = (digest(&ram), digest(&copy));
        let pages = pages_that_differ(&copy, &ram);
        panic!("the report says {ours}, the file has {extracted}; the source has {theirs}, then {again}:\n{pages}");
    }
    assert_same_memory(source, report);
}

/// The first pages that differ, with the first bytes that do.
fn pages_that_differ(ours: &Path, theirs: &Path) -> String {
    let (ours, theirs) = (fs::read(ours).unwrap(), fs::read(theirs).unwrap());
    let pages = ours.chunks(4096).zip(theirs.chunks(4096)).enumerate();
    let differ: Vec<_> = pages.filter(|(_, (a, b))| a != b).collect();
    let told = differ.iter().take(40).map(|(page, (a, b))| {
        let at: Vec<usize> = (0..a.len()).filter(|&at| a[at] != b[at]).collect();
        let first = at[0] & !7;
        let word = |bytes: &[u8]| bytes[first..bytes.len().min(first + 16)].to_vec();
        let zero = a.iter().all(|byte| *byte == 0);
        format!(
            "page {page}: {} bytes differ, from {first}: {:02x?} here ({}), {:02x?} there\n",
            at.len(),
            word(a),
            if zero { "all zero" } else { "content" },
            word(b)
        )
    });
    format!("{} pages differ\n{}", differ.len(), told.collect::<String>())
}

/// Lets `qemu`, a source, migrate to `uri`, and waits until it says that it has.
pub fn migrate_away(qemu: &mut Qemu, uri: &str) {
    qemu.qmp().migrate_live(uri, LIMIT).unwrap_or_else(|error| panic!("{error}\n{}", qemu.log()));
}

/// Waits until the source of a migration has sent some of its memory.
pub fn wait_until_under_way(source: &mut Qemu) {
    loop {
        let answer = source.qmp().query_migrate().unwrap();
        assert!(matches!(answer["status"].as_str(), Some("setup" | "active")), "{answer}");
        if answer["ram"]["transferred"].as_u64().unwrap_or_default() > 2 << 20 {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The guest of `source` goes on in `destination`, without a wrong byte.
pub fn assert_goes_on(source: &Qemu, destination: &mut Qemu) {
    let completed = destination.qmp().wait_migration(&[Status::Completed], LIMIT);
    completed.unwrap_or_else(|error| panic!("{error}\n{}", destination.log()));
    destination.qmp().wait_run_state("running", LIMIT).unwrap();
    let later = destination.wait_passes(4, LIMIT).unwrap();
    let earlier = source.output().unwrap();
    assert!(!earlier.is_corrupted() && !later.is_corrupted(), "{earlier:?} {later:?}");
    assert!(earlier.is_continued_by(&later), "{earlier:?} {later:?}");
    destination.qmp().stop().unwrap();
    guest().check_ram_file(&destination.ram_file().unwrap()).unwrap();
}

/// The guest of `qemu`, whose migration failed, runs on.
pub fn assert_runs_on(qemu: &mut Qemu) {
    assert_runs_on_after(qemu, 3);
    qemu.qmp().stop().unwrap();
    guest().check_ram_file(&qemu.ram_file().unwrap()).unwrap();
}

/// The guest of `qemu` runs, and ends `passes` more passes without a wrong byte. Returns its output.
pub fn assert_runs_on_after(qemu: &mut Qemu, passes: usize) -> Output {
    qemu.qmp().wait_run_state("running", LIMIT).unwrap();
    let before = qemu.output().unwrap().passes();
    let output = qemu.wait_passes(before + passes, LIMIT).unwrap();
    assert!(!output.is_corrupted(), "{output:?}");
    output
}

/// The names of everything in `directory`.
pub fn entries(directory: &Path) -> Vec<String> {
    let read = || -> io::Result<Vec<String>> {
        std::fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    let mut names = read().unwrap();
    names.sort();
    names
}
