//! `threads::system_calls` is true: whole migrations of each kind run with every thread of the engine, and both callers of
//! `run`, under a filter of exactly those calls.
//!
//! A call that is not in the list ends the process with SIGSYS, so each kind has a process of its own. To see which call it was:
//! `MULTIFD_SYSTEM_CALLS='KIND unfiltered' strace -f -Y TEST_BINARY --nocapture`.

use std::{
    env,
    io::{self, Read},
    net::TcpListener,
    os::fd::AsRawFd,
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use multifd::{
    checkpoint::Writer,
    destination::{self, Destination},
    dirty::{DirtyLog, bitmap::AtomicDirtyBitmap, merged::MergedLog, uffd_wp::UffdWpLog, untouched::untouched},
    dirty_bitmap::DirtyBitmap,
    multifd_proto::BlockName,
    progress::{Event, Observer},
    ram::{Ram, RamBlock, SharedBlock},
    sections::Sections,
    source::{self, Compression, Handle, Source},
    threads::{Body, Joinable, StdThreads, ThreadRole, Threads, system_calls, system_calls_of_run},
    transport::{Connect, Listen, socket::SocketListener, tls, uri::Uri},
    vm::{DestinationVm, SectionId, SourceVm, VmError},
};
use seccompiler::{BpfProgram, apply_filter, compile_from_json};
use test_support::{TempDir, time_limit};

/// Which kind the child is to run.
const KIND: &str = "MULTIFD_SYSTEM_CALLS";
const KINDS: [&str; 13] = [
    "tcp",
    "main-alone",
    "unix",
    "handed-over",
    "tls",
    "zlib",
    "zstd",
    "zero-copy",
    "write-protection",
    "cancelled",
    "checkpoint",
    "taken-over",
    "taken-over-without-io_uring",
];
const PAGES: u64 = 2048;

#[test]
fn each_kind_of_migration_makes_only_the_calls_that_are_listed() {
    if let Ok(kind) = env::var(KIND) {
        return time_limit(Duration::from_secs(60), move || migrate(&kind));
    }
    for kind in KINDS {
        let mut child = Command::new(env::current_exe().unwrap());
        let output =
            child.args(["--exact", "each_kind_of_migration_makes_only_the_calls_that_are_listed", "--nocapture"]);
        let output = output.env(KIND, kind).output().unwrap();
        assert!(output.status.success(), "{kind}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
}

/// A thread may not make the very next call after those that are listed: the filters of the other test are in force.
#[test]
fn a_call_that_is_not_listed_ends_the_process() {
    if env::var_os(KIND).is_some() {
        return;
    }
    if let Ok(call) = env::var("MULTIFD_UNLISTED") {
        apply_filter(&filter(&["write", "exit_group"])).unwrap();
        return drop(std::fs::File::open(call));
    }
    let mut child = Command::new(env::current_exe().unwrap());
    child.args(["--exact", "a_call_that_is_not_listed_ends_the_process"]).env("MULTIFD_UNLISTED", "/");
    let status = child.output().unwrap().status;
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGSYS), "{status}");
}

/// Permits everything but `call`, which is refused as containers do.
fn refusal(call: &str) -> BpfProgram {
    let json = format!(
        r#"{{"calls":{{"mismatch_action":"allow","match_action":{{"errno":{}}},"filter":[{{"syscall":"{call}"}}]}}}}"#,
        libc::EPERM
    );
    let arch = env::consts::ARCH.try_into().unwrap();
    compile_from_json(json.as_bytes(), arch).unwrap().remove("calls").unwrap()
}

/// Whether this system lets processes have rings of io_uring, whatever becomes of them.
fn has_io_uring() -> bool {
    // SAFETY: it refuses 0 entries before it looks at the structure.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_setup, 0, std::ptr::null_mut::<u8>()) };
    let error = io::Error::last_os_error().raw_os_error();
    result >= 0 || !matches!(error, Some(libc::ENOSYS | libc::EPERM | libc::EACCES))
}

/// The mode of a listener that others use, too.
struct Mode {
    /// A duplicate of it.
    listener: TcpListener,
    stays: bool,
}

impl Mode {
    /// Opens a listener in blocking mode, and takes it over as a VMM does before its filters are in force.
    fn of_one_taken_over(stays: bool) -> (Mode, Box<dyn Listen>, Box<dyn Connect + Send + Sync>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = Uri::from(listener.local_addr().unwrap());
        let over = SocketListener::new(listener.try_clone().unwrap().into(), uri.clone()).unwrap();
        let mode = Mode { listener, stays };
        assert_eq!(mode.is_blocking(), stays);
        (mode, Box::new(over), uri.connector().unwrap())
    }

    fn is_blocking(&self) -> bool {
        // SAFETY: the descriptor is open, and the call has no pointers.
        let flags = unsafe { libc::fcntl(self.listener.as_raw_fd(), libc::F_GETFL) };
        flags & libc::O_NONBLOCK == 0
    }
}

/// Looks at the mode of the listener at each event of the destination, if it is to stay.
struct Looks<'a>(Option<&'a Mode>);

impl Observer for Looks<'_> {
    fn event(&mut self, _event: &Event) {
        assert!(self.0.is_none_or(|mode| !mode.stays || mode.is_blocking()));
    }
}

fn filter(calls: &[&str]) -> BpfProgram {
    let calls: Vec<String> = calls.iter().map(|call| format!(r#"{{"syscall":"{call}"}}"#)).collect();
    let json = format!(
        r#"{{"calls":{{"mismatch_action":"kill_process","match_action":"allow","filter":[{}]}}}}"#,
        calls.join(",")
    );
    let arch = env::consts::ARCH.try_into().unwrap();
    compile_from_json(json.as_bytes(), arch).unwrap().remove("calls").unwrap()
}

/// Threads that may make the calls of their role, and no other.
struct Filtered;

impl Threads for Filtered {
    fn spawn(&self, role: ThreadRole, body: Body) -> io::Result<Box<dyn Joinable>> {
        let mut calls = system_calls(role).to_vec();
        if role == ThreadRole::Accept {
            // The threads that it makes set filters of their own.
            calls.push("seccomp");
        }
        let filter = filter(&calls);
        StdThreads.spawn(
            role,
            Box::new(move || {
                apply_filter(&filter).unwrap();
                body();
            }),
        )
    }
}

struct Vm {
    ram: Ram,
    log: Box<dyn DirtyLog + Send>,
    /// Marks what it writes, as a device does.
    written: AtomicDirtyBitmap,
    rounds: u64,
    paused: bool,
}

impl Vm {
    /// One block of private memory and one of a file.
    fn new() -> Vm {
        Vm::of(PAGES)
    }

    fn of(pages: u64) -> Vm {
        let name = |name| BlockName::new(name).unwrap();
        let len = pages as usize * 4096;
        let blocks =
            vec![RamBlock::anonymous(name("private"), len).unwrap(), RamBlock::memory_file(name("file"), len).unwrap()];
        let ram = Ram::new(4096, blocks).unwrap();
        let written = AtomicDirtyBitmap::new(ram.layout());
        Vm { ram, log: Box::new(written.clone()), written, rounds: 0, paused: false }
    }

    /// Every other page has content.
    fn filled() -> Vm {
        let vm = Vm::new();
        for page in (0..2 * PAGES).step_by(2) {
            vm.ram.page(page).unwrap().write(&(page + 1).to_ne_bytes().repeat(512));
        }
        vm
    }
}

/// The caller of `Writer::receive`, which puts a file into place, has no filter.
fn keep_in_a_file(mut sending: source::Options, receiving: destination::Options, dir: &TempDir) {
    let (listener, connector) = transport("checkpoint", dir);
    // Long runs, and more than a channel writes before it has them synced.
    let mut from = Vm::of(16 << 10);
    for page in 0..32 << 10 {
        from.ram.page(page).unwrap().write(&(page + 1).to_ne_bytes().repeat(512));
    }
    sending.plan.channels = 2;
    let mut writer = Writer::create(&dir.join("checkpoint"), false).unwrap();
    thread::scope(|scope| {
        let receiver = scope.spawn(|| writer.receive(Destination::new(receiving), listener, &mut ()).map(drop));
        Source::new(sending).run(&mut from, &*connector, &mut ()).unwrap();
        receiver.join().unwrap().unwrap();
    });
    assert_eq!(writer.pages_with_content(), 32 << 10);
}

impl SourceVm for Vm {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn dirty_log(&mut self) -> &mut dyn DirtyLog {
        // A guest that writes a little in each round.
        self.rounds += 1;
        for page in (0..self.rounds.min(20)).filter(|_| !self.paused) {
            self.ram.page(page).unwrap().write(&[self.rounds as u8; 4096]);
            self.written.mark_page(page);
        }
        &mut *self.log
    }

    fn untouched(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        Ok(untouched(&self.ram, into)?)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.paused = true;
        Ok(())
    }

    fn save(&mut self, out: &mut Sections) -> Result<(), VmError> {
        Ok(out.section("cpu", 0, 1, &[7; 100_000])?)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

impl DestinationVm for Vm {
    fn take_memory(&mut self, memory: Vec<SharedBlock>) -> Result<(), VmError> {
        let mut blocks = vec![RamBlock::anonymous(BlockName::new("private")?, PAGES as usize * 4096)?];
        for block in memory {
            blocks.push(RamBlock::shared(block)?);
        }
        self.ram = Ram::new(4096, blocks)?;
        Ok(())
    }

    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn load(&mut self, _section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
        Ok(input.read_exact(&mut [0; 100_000])?)
    }

    fn start(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

/// Cancels after the second round, if it is to.
struct Cancels(Option<Handle>);

impl Observer for Cancels {
    fn event(&mut self, event: &Event) {
        if let (Some(handle), Event::Round(stats)) = (&self.0, event)
            && stats.round == 1
        {
            handle.cancel();
        }
    }
}

fn transport(kind: &str, dir: &TempDir) -> (Box<dyn Listen>, Box<dyn Connect + Send + Sync>) {
    let uri = match kind {
        "unix" | "handed-over" => Uri::Unix(dir.join("s")),
        _ => "tcp:127.0.0.1:0".parse().unwrap(),
    };
    let listener = uri.listener().unwrap();
    let connector = listener.uri().connector().unwrap();
    if kind != "tls" {
        return (Box::new(listener), connector);
    }
    certificates(dir);
    let server = tls::ServerCredentials::from_dir(dir.path(), tls::ClientCertificates::Required).unwrap();
    let client = tls::ClientCredentials::from_dir(dir.path()).unwrap();
    let listener = tls::TlsListener::new(Box::new(listener), server);
    (Box::new(listener), Box::new(tls::TlsConnector::new(connector, client, "127.0.0.1").unwrap()))
}

fn certificates(dir: &TempDir) {
    use rcgen::*;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    std::fs::write(dir.join("ca-cert.pem"), authority.pem()).unwrap();
    for (name, usage) in
        [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)]
    {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &authority).unwrap();
        std::fs::write(dir.join(format!("{name}-cert.pem")), certificate.pem()).unwrap();
        let path = dir.join(format!("{name}-key.pem"));
        std::fs::write(&path, key.serialize_pem()).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }
}

/// Migrates a VM within this process, all threads of the engine and both callers of `run` under their filters.
fn migrate(kind: &str) {
    let (kind, is_filtered) = match kind.strip_suffix(" unfiltered") {
        Some(kind) => (kind, false),
        None => (kind, true),
    };
    let dir = TempDir::new().unwrap();
    let (mode, listener, connector) = match kind {
        "taken-over" if !has_io_uring() => return test_support::skip("no io_uring here"),
        "taken-over" | "taken-over-without-io_uring" => {
            let stays = kind == "taken-over";
            if !stays {
                apply_filter(&refusal("io_uring_setup")).unwrap();
            }
            let (mode, listener, connector) = Mode::of_one_taken_over(stays);
            (Some(mode), listener, connector)
        }
        _ => {
            let (listener, connector) = transport(kind, &dir);
            (None, listener, connector)
        }
    };
    let mut looks = Looks(mode.as_ref());
    let (mut sending, mut receiving) = (source::Options::default(), destination::Options::default());
    if kind == "main-alone" {
        sending.plan.channels = 0;
    }
    sending.plan.zero_copy = kind == "zero-copy";
    sending.plan.hand_over = kind == "handed-over";
    sending.format.compression = match kind {
        "zlib" => Compression::Zlib,
        "zstd" => Compression::Zstd,
        _ => Compression::None,
    };
    // At least three rounds.
    sending.parameters.limits.downtime = Duration::ZERO;
    sending.parameters.limits.rounds = Some(4);
    sending.parameters.limits.at_limit = source::AtLimit::SwitchOver;
    receiving.close_timeout = Duration::from_millis(200);
    if is_filtered {
        sending.threads = Arc::new(Filtered);
        receiving.threads = Arc::new(Filtered);
    }
    if kind == "checkpoint" {
        return keep_in_a_file(sending, receiving, &dir);
    }
    let (mut from, mut to) = (Vm::filled(), Vm::new());
    if kind == "write-protection" {
        match UffdWpLog::new() {
            Ok(log) => from.log = Box::new(MergedLog::new(vec![Box::new(log), Box::new(from.written.clone())])),
            Err(error) => return test_support::skip(&format!("no write protection here: {error}")),
        }
    }
    let (source, destination) = (Source::new(sending), Destination::new(receiving));
    let cancels = kind == "cancelled";
    let mut observer = Cancels(cancels.then(|| source.handle()));
    let run_filter = filter(&[system_calls_of_run(), &["seccomp"]].concat());
    let enter = || {
        if is_filtered {
            apply_filter(&run_filter).unwrap();
        }
    };
    thread::scope(|scope| {
        let receiver = thread::Builder::new().name("run-destination".into());
        let receiver = receiver.spawn_scoped(scope, || {
            enter();
            destination.run(&mut to, listener, &mut looks).map(drop)
        });
        let sender = thread::Builder::new().name("run-source".into());
        let sender = sender.spawn_scoped(scope, || {
            enter();
            source.run(&mut from, &*connector, &mut observer).map(drop)
        });
        let (sent, received) = (sender.unwrap().join().unwrap(), receiver.unwrap().join().unwrap());
        assert_eq!((sent.is_err(), received.is_err()), (cancels, cancels), "{sent:?}, {received:?}");
    });
    if let Some(mode) = &mode {
        assert!(mode.is_blocking(), "as before");
    }
    for page in (0..2 * PAGES).filter(|_| !cancels) {
        let content = |vm: &Vm| {
            let mut content = [0; 4096];
            vm.ram.page(page).unwrap().read(&mut content);
            content
        };
        assert!(content(&from) == content(&to), "page {page} differs");
    }
}
