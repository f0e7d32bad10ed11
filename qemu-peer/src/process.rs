//! Starts a QEMU and ends it by its pid, whatever happens to the test.
//!
//! Three things end it: dropping [`Qemu`], its deadline (kept by a thread of this process, so also while the
//! test is stuck in a read), and the kernel, when this process dies in any way. Everything it leaves behind, sockets
//! and logs, is in one temporary directory.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use std::{env, fs, io, thread};

use test_support::TempDir;

use crate::guest::{BootGuest, Output};
use crate::install::last_lines;
use crate::{Error, Installed, Qmp};

/// A running QEMU.
#[derive(Debug)]
pub struct Qemu {
    qmp: Qmp,
    process: Process,
    files: Files,
}

/// Where the VM's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Memory {
    /// QEMU's default.
    #[default]
    Anonymous,
    /// A shared memory file, so that the test can read the memory of a stopped VM, and write into it.
    SharedFile,
}

/// What to start.
#[derive(Debug, Clone)]
pub struct QemuBuilder {
    installed: Installed,
    machine: String,
    memory_mib: u32,
    memory: Memory,
    uuid: Option<String>,
    guest: Option<BootGuest>,
    incoming: bool,
    arguments: Vec<String>,
    limit: Duration,
}

impl QemuBuilder {
    /// The machine type, by its full name such as `pc-i440fx-7.2`. Both ends of a migration need the same one.
    #[must_use]
    pub fn machine(mut self, name: &str) -> Self {
        name.clone_into(&mut self.machine);
        self
    }

    /// The size of the memory.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Where the memory is. The RAM block is `pc.ram` in every case, so two kinds can migrate into each other.
    #[must_use]
    pub fn memory(mut self, memory: Memory) -> Self {
        self.memory = memory;
        self
    }

    /// The uuid, in the form with hyphens.
    #[must_use]
    pub fn uuid(mut self, uuid: &str) -> Self {
        self.uuid = Some(uuid.to_owned());
        self
    }

    /// Boots `guest` from a disk. A destination needs the same disk.
    #[must_use]
    pub fn guest(mut self, guest: BootGuest) -> Self {
        self.guest = Some(guest);
        self
    }

    /// Waits for an incoming migration; the address comes with [`Qmp::migrate_incoming`].
    #[must_use]
    pub fn incoming(mut self) -> Self {
        self.incoming = true;
        self
    }

    /// Adds arguments of QEMU's command line.
    #[must_use]
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// Changes after how long the QEMU is killed. Two minutes unless changed.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Starts it and waits until QMP answers.
    ///
    /// # Errors
    ///
    /// [`Error::Ended`] with QEMU's own words if it ends at once.
    pub fn start(self) -> Result<Qemu, Error> {
        let files = Files::create(self.memory)?;
        if let Some(guest) = &self.guest {
            fs::write(files.disk(), guest.sector()).map_err(|source| Error::File { path: files.disk(), source })?;
        }
        let process = Process::start(self.command(&files)?, self.limit)?;
        match files.connect(&process) {
            Ok(qmp) => Ok(Qemu { qmp, process, files }),
            // Dropping the process ends it.
            Err(error) => Err(error),
        }
    }

    fn command(&self, files: &Files) -> Result<Command, Error> {
        // The kernel kills QEMU when the thread that started it ends; see `Launcher`.
        let wrapper: &[&str] = if has_setpriv() { &["setpriv", "--pdeathsig", "KILL"] } else { &[] };
        let mut command = self.installed.command(wrapper);
        let log = fs::File::create(files.log()).map_err(|source| Error::File { path: files.log(), source })?;
        command.stdout(Stdio::null()).stderr(log);
        // Where `snapshot=on` keeps what the guest writes to its disk.
        command.env("TMPDIR", files.directory.path());
        command.args(["-nodefaults", "-display", "none", "-m", &format!("{}M", self.memory_mib)]);
        let machine = format!("{},accel=tcg", self.machine);
        match files.ram() {
            None => command.args(["-machine", &machine]),
            Some(ram) => command.args([
                "-machine",
                &format!("{machine},memory-backend=pc.ram"),
                "-object",
                &format!("memory-backend-file,id=pc.ram,size={}M,mem-path={},share=on", self.memory_mib, ram.display()),
            ]),
        };
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", files.qmp().display())]);
        command.args(["-serial", &format!("file:{}", files.serial().display())]);
        if let Some(uuid) = &self.uuid {
            command.args(["-uuid", uuid]);
        }
        if self.guest.is_some() {
            let disk = format!("file={},format=raw,snapshot=on", files.disk().display());
            if self.machine.contains("q35") {
                // q35 has SATA only; a boot sector needs nothing but the firmware's disk, so any IDE card will do.
                command.args(["-device", "piix3-ide,id=ide0"]);
                command.args(["-drive", &format!("{disk},if=none,id=boot")]);
                command.args(["-device", "ide-hd,bus=ide0.0,drive=boot"]);
            } else {
                command.args(["-drive", &format!("{disk},if=ide")]);
            }
        }
        if self.incoming {
            command.args(["-incoming", "defer"]);
        }
        command.args(&self.arguments);
        Ok(command)
    }
}

impl Qemu {
    /// A VM of `installed` with 64 MiB of anonymous memory and machine type `pc-i440fx-7.2`, which all versions have.
    pub fn builder(installed: &Installed) -> QemuBuilder {
        QemuBuilder {
            installed: installed.clone(),
            machine: "pc-i440fx-7.2".to_owned(),
            memory_mib: 64,
            memory: Memory::default(),
            uuid: None,
            guest: None,
            incoming: false,
            arguments: Vec::new(),
            limit: Duration::from_secs(120),
        }
    }

    /// Its QMP session.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Waits until the guest ended `passes` passes on this QEMU, and returns its output.
    ///
    /// # Errors
    ///
    /// [`Error::TooLate`] when `limit` is over or the output is not the guest's; [`Error::Ended`] if QEMU ended.
    pub fn wait_passes(&mut self, passes: usize, limit: Duration) -> Result<Output, Error> {
        let deadline = Instant::now() + limit;
        loop {
            let parsed = self.output();
            match parsed {
                Ok(output) if output.passes() >= passes => return Ok(output),
                Ok(_) if Instant::now() < deadline => {}
                other => {
                    let awaited = format!("{passes} passes of the guest");
                    return Err(Error::TooLate { awaited, limit, seen: format!("{other:?}") });
                }
            }
            if let Some(status) = self.try_wait()? {
                return Err(ended(status, &self.files.log()));
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// What the guest printed on this QEMU so far, or what is wrong with it.
    pub fn output(&self) -> Result<Output, String> {
        let path = self.files.serial();
        let serial = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Output::parse(&serial)
    }

    /// The bytes of the serial port so far.
    pub fn serial(&self) -> Result<Vec<u8>, Error> {
        let path = self.files.serial();
        fs::read(&path).map_err(|source| Error::File { path, source })
    }

    /// The file that is the VM's memory, with [`Memory::SharedFile`].
    pub fn ram_file(&self) -> Option<PathBuf> {
        self.files.ram()
    }

    /// A path in this QEMU's directory, for a socket or a file that ends with it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.files.directory.join(name)
    }

    /// The end of what QEMU wrote to stderr.
    pub fn log(&self) -> String {
        last_lines(&self.files.log())
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.child().id()
    }

    /// Its exit status, if it ended.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>, Error> {
        Ok(self.process.child().try_wait()?)
    }

    /// Waits until it ended by itself.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus, Error> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                return Err(Error::TooLate { awaited: "the end of QEMU".into(), limit, seen: "it runs".into() });
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Kills it at once, as a crash of the host would, and reaps it. Its files stay until this is dropped.
    pub fn kill(&mut self) -> Result<(), Error> {
        Ok(self.process.kill()?)
    }
}

/// The files of one QEMU.
#[derive(Debug)]
struct Files {
    directory: TempDir,
    /// Holds the memory file; in memory itself, where that is possible.
    memory: Option<TempDir>,
}

impl Files {
    fn create(memory: Memory) -> Result<Self, Error> {
        let memory = match memory {
            Memory::Anonymous => None,
            Memory::SharedFile => Some(TempDir::in_memory()?),
        };
        Ok(Self { directory: TempDir::new()?, memory })
    }

    fn qmp(&self) -> PathBuf {
        self.directory.join("qmp")
    }

    fn serial(&self) -> PathBuf {
        self.directory.join("serial")
    }

    fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    fn disk(&self) -> PathBuf {
        self.directory.join("disk")
    }

    fn ram(&self) -> Option<PathBuf> {
        self.memory.as_ref().map(|directory| directory.join("ram"))
    }

    /// Connects as soon as QEMU listens, or tells why it ended.
    fn connect(&self, process: &Process) -> Result<Qmp, Error> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            match Qmp::connect(&self.qmp()) {
                Err(multifd_qmp::Error::Connect { source, .. })
                    if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
                connected => return Ok(connected?),
            }
            if let Some(status) = process.child().try_wait()? {
                return Err(ended(status, &self.log()));
            }
            if Instant::now() >= deadline {
                return Err(Error::TooLate {
                    awaited: "the QMP socket".into(),
                    limit: START_LIMIT,
                    seen: last_lines(&self.log()),
                });
            }
            thread::sleep(POLL_INTERVAL);
        }
    }
}

fn ended(status: ExitStatus, log: &Path) -> Error {
    Error::Ended { status: status.to_string(), log: last_lines(log) }
}

/// A child that is killed at its deadline or when this is dropped.
#[derive(Debug)]
struct Process {
    child: Arc<Mutex<Child>>,
    /// Dropped together with the process, which ends the watchdog.
    _watchdog: Sender<()>,
}

impl Process {
    fn start(command: Command, limit: Duration) -> io::Result<Self> {
        let child = Arc::new(Mutex::new(Launcher::spawn(command)?));
        let (_watchdog, ended) = mpsc::channel::<()>();
        let watched = Arc::clone(&child);
        thread::spawn(move || {
            if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                let mut child = lock(&watched);
                eprintln!("QEMU {} has run for {limit:?}, killing it", child.id());
                // It may have ended by itself just now.
                let _ = child.kill();
            }
        });
        Ok(Self { child, _watchdog })
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        lock(&self.child)
    }

    fn kill(&self) -> io::Result<()> {
        let mut child = self.child();
        child.kill()?;
        child.wait().map(drop)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only if it was reaped before.
        let _ = self.kill();
    }
}

/// A child stays valid when a thread that held the lock panicked.
fn lock(child: &Mutex<Child>) -> MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread that starts every QEMU and never ends before the process does.
///
/// The kernel's death signal is tied to the thread that created the child, not to the process. A test's own thread ends
/// with the test, which may hand its QEMU on.
struct Launcher;

type Job = (Command, Sender<io::Result<Child>>);

impl Launcher {
    fn spawn(command: Command) -> io::Result<Child> {
        static JOBS: OnceLock<Sender<Job>> = OnceLock::new();
        let jobs = JOBS.get_or_init(|| {
            let (jobs, queue) = mpsc::channel::<Job>();
            thread::spawn(move || {
                for (mut command, answer) in queue {
                    let _ = answer.send(command.spawn());
                }
            });
            jobs
        });
        let (answer, answered) = mpsc::channel();
        let gone = || io::Error::other("the launcher thread is gone");
        jobs.send((command, answer)).map_err(|_| gone())?;
        answered.recv().map_err(|_| gone())?
    }
}

/// util-linux has it; without it only a killed test process leaves a QEMU behind.
fn has_setpriv() -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|directory| directory.join("setpriv").is_file())
}

/// Starting QEMU takes 0.2 s here; a machine that runs other tests may need much longer.
const START_LIMIT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(10);
