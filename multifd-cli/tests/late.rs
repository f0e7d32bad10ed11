//! Migrations whose connections come late, in any order, through proxies, and past accept queues of one connection.
//!
//! A destination that reports success has the source's memory: the guest verifies its own at the end, a checkpoint has the
//! digests of the one that was sent, and a recorded stream of a QEMU, which does not say how many channels it has, has the
//! digests that an independent decoder found. A channel that never comes is an error.
//!
//! `MULTIFD_LATE` sets how many migrations are tried, `MULTIFD_SEED` repeats a run.

mod common;

use std::{
    collections::BTreeMap,
    env, fmt,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use common::{
    Guest, json, multifd, number,
    proxy::{Holds, Proxy, short_queue},
};
use fastrand::Rng;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use test_support::{TempDir, report, skip, time_limit};

/// A guest that is small, and writes all the time.
const GUEST: &str = "--guest process --dirty-log bitmap --memory 16MiB --working-set 2MiB --write-rate 20MB/s";

#[test]
fn no_migration_is_complete_without_a_channel_that_comes_late() {
    let wanted: usize = env::var("MULTIFD_LATE").map_or(24, |text| text.parse().expect("a number"));
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed: u64 = env::var("MULTIFD_SEED").map_or_else(|_| now(), |text| text.parse().expect("a number"));
    println!("seed {seed}");
    time_limit(LIMIT * 2 + Duration::from_secs(10) * u32::try_from(wanted).unwrap(), || {
        let given = Given::new();
        let (next, counts) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
        let work = || loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= wanted {
                return;
            }
            let case = Case::random(index, seed);
            println!("{case:?}");
            case.run(&given);
            *counts.lock().unwrap().entry(case.kind.to_string()).or_insert(0) += 1;
        };
        // Most of the time of a migration is waiting for connections that are held.
        thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(work))));
        let counts = counts.into_inner().unwrap();
        assert_eq!(counts.values().sum::<usize>(), wanted);
        report(
            "late channels",
            &format!("migrations {wanted} (seed {seed}), complete {wanted}, with a page missing 0; {counts:?}"),
        );
    });
}

/// The checkpoint has an end in time, though what it waits for never comes: by the limit of the set-up, which is 30 seconds.
#[test]
fn a_channel_that_never_comes_fails_the_migration_in_time() {
    time_limit(LIMIT, || {
        let given = Given::new();
        let never = |channels: usize, id: usize| {
            let mut holds = Holds::none(channels);
            holds.channels[id] = None;
            holds
        };
        thread::scope(|scope| {
            for id in 0..2 {
                let given = &given;
                scope.spawn(move || {
                    let (receive, destination) = Process::receive(&given.dir.join(format!("told{id}")));
                    let proxy = Proxy::start(destination, never(3, id), None);
                    let send = Process::start(multifd(&format!(
                        "send {} {} --channels 3 --peer qemu --json",
                        given.checkpoint.display(),
                        proxy.uri()
                    )));
                    let ends = [receive.end(), send.end()];
                    assert_eq!(proxy.connected(), 3, "main and two channels");
                    assert!(ends.iter().all(|(exit, _)| *exit != 0), "{ends:?}");
                    let error = ends[0].1["error"].to_string();
                    assert!(error.contains("2 of 3 channels") && error.contains("30 s"), "{error}");
                });
            }
            for recording in &given.recordings {
                let given = &given;
                scope.spawn(move || {
                    let file = given.dir.join(format!("untold-{}", recording.name));
                    let (receive, destination) = Process::receive(&file);
                    let proxy = Proxy::start(destination, never(recording.channels.len(), 1), None);
                    let to = proxy.address();
                    let (exit, report) = thread::scope(|scope| {
                        scope.spawn(move || recording.replay(to));
                        let end = receive.end();
                        // Ends the connection that is held.
                        drop(proxy);
                        end
                    });
                    assert!(exit != 0 && !file.exists(), "{}: {report}", recording.name);
                    assert!(report["error"].to_string().contains("30 s"), "{report}");
                });
            }
        });
    });
}

/// A plain proxy hands connections on in the order in which its children get to it.
#[test]
fn a_guest_moves_through_a_proxy_that_forks() {
    time_limit(LIMIT, || {
        if Command::new("socat").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            return skip("no socat here");
        }
        for (index, sync) in ["per-round", "per-section"].into_iter().cycle().take(6).enumerate() {
            let dir = TempDir::new().unwrap();
            let destination = Guest::start(dir.path(), "there", &format!("{GUEST} --incoming tcp:127.0.0.1:0"));
            let to = address(&destination.listening());
            // Free until socat takes it, as far as this host is concerned.
            let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
            let mut socat = Command::new("socat");
            socat.arg(format!("TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr")).arg(format!("TCP:{to}"));
            let _socat = Process::start(socat);
            let options = format!("{GUEST} --channels {} --sync {sync} --after 100ms", 1 + index);
            let source = Guest::start(dir.path(), "here", &format!("{options} --migrate-to tcp:127.0.0.1:{port}"));
            arrives(source, destination, &format!("socat, {options}"));
        }
    });
}

/// What is migrated, and what is expected of it.
struct Given {
    dir: TempDir,
    /// Of the built-in guest.
    checkpoint: PathBuf,
    digests: BTreeMap<String, String>,
    recordings: Vec<Recording>,
}

impl Given {
    fn new() -> Given {
        let dir = TempDir::in_memory().unwrap();
        let checkpoint = dir.join("guest.ckpt");
        let (receive, address) = Process::receive(&checkpoint);
        let args = format!("guest {GUEST} --json --after 100ms --migrate-to tcp:{address}");
        let left = Process::start(multifd(&args)).end();
        assert_eq!(left.0, 0, "{left:?}");
        let (exit, received) = receive.end();
        assert_eq!(exit, 0, "{received}");
        let inspected = json(&common::run(&format!("inspect {} --digest --json", checkpoint.display())).stdout);
        let digests = digests(&inspected);
        assert_eq!(digests, self::digests(&received));
        Given { dir, checkpoint, digests, recordings: Recording::some() }
    }
}

/// A migration of a QEMU, which does not say how many channels it has.
struct Recording {
    name: &'static str,
    main: Vec<u8>,
    channels: Vec<Vec<u8>>,
    digests: BTreeMap<String, String>,
}

impl Recording {
    /// One with four channels and a return path, and one in each dialect with two.
    fn some() -> Vec<Recording> {
        let captures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../multifd-proto/tests/captures");
        let archive = File::open(captures.join("streams.tar.xz")).unwrap();
        let mut files: BTreeMap<_, _> =
            test_support::untar(liblzma::read::XzDecoder::new(archive)).into_iter().collect();
        let manifest: Value =
            serde_json::from_str(&fs::read_to_string(captures.join("manifest.json")).unwrap()).unwrap();
        let mut recording = |name: &'static str| {
            let expected = manifest.as_array().unwrap().iter().find(|capture| capture["name"] == name).unwrap();
            let digests = expected["expect"]["ram_sha256"].as_object().unwrap().iter();
            Recording {
                name,
                main: files.remove(&format!("{name}/main.bin")).unwrap(),
                channels: (0..).map_while(|id| files.remove(&format!("{name}/ch{id}.bin"))).collect(),
                digests: digests.map(|(block, digest)| (block.clone(), text(digest))).collect(),
            }
        };
        ["q7.2-returnpath-uuid-4ch", "q10.0-none-2ch", "q7.2-none-2ch"].map(&mut recording).into()
    }

    /// Sends it to `to` as the QEMU did, main first, to the end of the destination's answers.
    fn replay(&self, to: SocketAddr) {
        thread::scope(|scope| {
            for bytes in [&self.main].into_iter().chain(&self.channels) {
                // The order in which a source connects.
                let stream = TcpStream::connect(to);
                let waits = std::ptr::eq(bytes, &raw const self.main) && self.name.contains("returnpath");
                // What is broken off is the destination's to report.
                scope.spawn(move || stream.and_then(|stream| play(stream, bytes, waits)));
            }
        });
    }
}

/// Sends `bytes`, and ends the connection: if it `waits`, only when the destination has said on it that it has the guest.
fn play(mut stream: TcpStream, bytes: &[u8], waits: bool) -> io::Result<()> {
    stream.write_all(bytes)?;
    let mut answer = [0; 8];
    // Type, length and value of each answer; PONG and SHUT have the same length.
    while waits && answer[..2] != SHUT {
        stream.read_exact(&mut answer)?;
    }
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new()).map(drop)
}

/// One migration.
#[derive(Debug)]
struct Case {
    #[expect(dead_code, reason = "says in the output which one it is")]
    index: usize,
    kind: Kind,
    way: Way,
    channels: usize,
    per_section: bool,
    /// Whether the destination is told the number of channels, which our sources say anyway.
    required: bool,
    holds: Holds,
}

/// What moves.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// The built-in guest, to where it runs on.
    Guest,
    /// A checkpoint, in the form that a QEMU takes.
    Send,
    /// The recording of this index.
    Replay(usize),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Guest => "guest",
            Kind::Send => "checkpoint",
            Kind::Replay(_) => "recorded QEMU",
        })
    }
}

/// How the connections come.
#[derive(Clone, Debug)]
enum Way {
    /// The proxy accepts at once.
    Proxy,
    /// The proxy has an accept queue of one, and waits that long before each connection it accepts.
    SlowProxy(Vec<Duration>),
    /// The destination, after the proxy, has an accept queue of one, and is stopped that long.
    ShortQueue(Duration),
}

impl Case {
    fn random(index: usize, seed: u64) -> Case {
        let mut random = Rng::with_seed(seed.wrapping_add(index as u64));
        let kind = [Kind::Guest, Kind::Send, Kind::Replay(0), Kind::Guest, Kind::Replay(1), Kind::Replay(2)][index % 6];
        let channels = match kind {
            Kind::Replay(0) => 4,
            Kind::Replay(_) => 2,
            _ => random.usize(1..=8),
        };
        let way = match random.u8(..4) {
            0 => Way::SlowProxy((0..=channels).map(|_| time(&mut random, 300)).collect()),
            1 => Way::ShortQueue(time(&mut random, 700)),
            _ => Way::Proxy,
        };
        let (per_section, required) = (random.bool(), random.u8(..3) == 0);
        Case { index, kind, way, channels, per_section, required, holds: holds(&mut random, channels) }
    }

    fn run(&self, given: &Given) {
        let dir = TempDir::in_memory().unwrap();
        match self.kind {
            Kind::Guest => self.guest(&dir),
            Kind::Send => self.receive(&dir, &given.digests, |proxy| {
                let command = format!("send {} {} --peer qemu --json", given.checkpoint.display(), proxy.uri());
                let (exit, sent) = Process::start(multifd(&format!("{command} {}", self.source()))).end();
                assert_eq!(exit, 0, "{self:?}: {sent}");
            }),
            Kind::Replay(index) => {
                let recording = &given.recordings[index];
                self.receive(&dir, &recording.digests, |proxy| recording.replay(proxy.address()));
            }
        }
    }

    fn guest(&self, dir: &TempDir) {
        let (command, uri, address) = self.listener("guest");
        let options = format!("--json {GUEST} --incoming {uri} {}", self.destination());
        let destination = Guest::start_by(command, dir.path(), "there", &options);
        let listens = destination.listening();
        let proxy = self.proxy(address.unwrap_or_else(|| self::address(&listens)));
        let options = format!("{GUEST} {} --after 50ms --migrate-to {}", self.source(), proxy.uri());
        let pause = self.stop(destination.pid());
        let source = Guest::start(dir.path(), "here", &options);
        pause.end();
        arrives(source, destination, &format!("{self:?}"));
        assert_eq!(proxy.connected(), self.channels + 1, "{self:?}");
    }

    /// Has `multifd receive` take what `send` sends to the proxy.
    fn receive(&self, dir: &TempDir, expected: &BTreeMap<String, String>, send: impl FnOnce(&Proxy) + Send) {
        let (mut command, uri, address) = self.listener("receive");
        let file = dir.join("ckpt");
        command.args([&uri, "--digest", "--json", "-o"]).arg(&file).args(self.destination().split_whitespace());
        let (receive, listens) = Process::listening(command);
        let proxy = self.proxy(address.unwrap_or_else(|| self::address(&listens)));
        let pause = self.stop(receive.pid());
        let (exit, report) = thread::scope(|scope| {
            scope.spawn(|| send(&proxy));
            pause.end();
            receive.end()
        });
        // All channels come long before the limit of the set-up: none of these has a reason to fail.
        assert_eq!(exit, 0, "{self:?}: {report}");
        assert_eq!(digests(&report), *expected, "{self:?}: another guest arrived");
        assert_eq!(number(&report, "/channels"), self.channels as f64, "{self:?}");
        assert_eq!(proxy.connected(), self.channels + 1, "{self:?}");
        let inspected = json(&common::run(&format!("inspect {} --digest --json", file.display())).stdout);
        assert_eq!(digests(&inspected), *expected, "{self:?}: the file has another guest");
    }

    /// `verb` and the address for it; where it listens, if that is known already.
    fn listener(&self, verb: &str) -> (Command, String, Option<SocketAddr>) {
        let Way::ShortQueue(_) = self.way else { return (multifd(verb), "tcp:127.0.0.1:0".to_owned(), None) };
        let queue = short_queue();
        let address = queue.local_addr().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", r#"exec "$0" "$@" 3<&0 </dev/null"#, env!("CARGO_BIN_EXE_multifd"), verb]);
        command.stdin(OwnedFd::from(queue));
        (command, "fd:3".to_owned(), Some(address))
    }

    fn proxy(&self, onward: SocketAddr) -> Proxy {
        let pauses = if let Way::SlowProxy(pauses) = &self.way { Some(pauses.clone()) } else { None };
        Proxy::start(onward, self.holds.clone(), pauses)
    }

    /// Stops the destination, if it is one that is stopped.
    fn stop(&self, destination: Pid) -> Pause {
        let Way::ShortQueue(time) = self.way else { return Pause(None) };
        kill_process(destination, Signal::STOP).unwrap();
        Pause(Some((destination, time)))
    }

    fn source(&self) -> String {
        let sync = if self.per_section { "per-section" } else { "per-round" };
        format!("--channels {} --sync {sync}", self.channels)
    }

    fn destination(&self) -> String {
        if self.required { format!("--channels {}", self.channels) } else { String::new() }
    }
}

/// A process that is stopped.
#[must_use]
struct Pause(Option<(Pid, Duration)>);

impl Pause {
    /// Waits until it is over, and lets the process continue.
    fn end(self) {
        if let Some((process, time)) = self.0 {
            thread::sleep(time);
            // It has not been waited for.
            kill_process(process, Signal::CONT).unwrap();
        }
    }
}

/// The guest arrives, whole, and all its memory is right in the end.
#[track_caller]
fn arrives(source: Guest, destination: Guest, context: &str) {
    let (exit, left) = source.end();
    assert_eq!(exit, 0, "{context}: {left}, {}", destination.stderr());
    destination.ask("x-guest-finish", json!({ "passes": 2, "within": 60.0 })).expect("the guest is there");
    let (exit, report) = destination.end();
    assert_eq!(exit, 0, "{context}: {report}");
    assert_eq!(number(&report, "/guest-errors") + number(&report, "/pages-wrong"), 0.0, "{context}: {report}");
    assert!(number(&report, "/pages-checked") >= 4096.0, "{context}: {report}");
    let [before, after] = ["/guest-passes-before", "/guest-passes-after"].map(|path| number(&report, path));
    assert!(after > before, "{context}: {report}");
}

/// A `multifd` that is killed when this is dropped, or takes too long.
struct Process {
    child: Child,
    /// Its lines, to the end.
    stderr: mpsc::Receiver<String>,
}

impl Process {
    fn start(mut command: Command) -> Process {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        Process { stderr: lines(&mut child), child }
    }

    /// Waits until it listens, and returns where. The caller has set its stdin.
    fn listening(mut command: Command) -> (Process, String) {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let process = Process { stderr: lines(&mut child), child };
        let line = process.stderr.recv_timeout(LIMIT).unwrap();
        let uri = line.strip_prefix("listening on ").unwrap_or_else(|| panic!("{line}")).to_owned();
        (process, uri)
    }

    /// A `multifd receive` that writes `file`, and where it listens.
    fn receive(file: &Path) -> (Process, SocketAddr) {
        let receive = format!("receive tcp:127.0.0.1:0 --digest --json -o {}", file.display());
        let (process, uri) = Process::listening(multifd(&receive));
        (process, address(&uri))
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Exit status and report.
    fn end(mut self) -> (i32, Value) {
        let (done, output) = mpsc::channel();
        let mut stdout = self.child.stdout.take().unwrap();
        thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = stdout.read_to_end(&mut bytes).map(|_| done.send(bytes));
        });
        let bytes = output.recv_timeout(LIMIT).unwrap_or_else(|_| {
            panic!("does not end: {:?}", self.stderr.try_iter().collect::<Vec<_>>());
        });
        (self.child.wait().unwrap().code().unwrap_or(-1), json(&bytes))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has usually ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines(child: &mut Child) -> mpsc::Receiver<String> {
    let (said, lines) = mpsc::channel();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| said.send(line)));
    lines
}

fn address(uri: &str) -> SocketAddr {
    uri.strip_prefix("tcp:").unwrap().parse().unwrap()
}

/// By block.
fn digests(report: &Value) -> BTreeMap<String, String> {
    let blocks = report["ram-blocks"].as_array().unwrap_or_else(|| panic!("{report}"));
    assert!(!blocks.is_empty(), "{report}");
    blocks.iter().map(|block| (text(&block["name"]), text(&block["digest"]))).collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// Up to `limit` milliseconds.
fn time(random: &mut Rng, limit: u64) -> Duration {
    Duration::from_millis(random.u64(..limit))
}

/// When each connection is let through.
fn holds(random: &mut Rng, channels: usize) -> Holds {
    let mut holds = Holds::none(channels);
    match random.u8(..6) {
        // Any order.
        0 | 1 => {
            holds.main = Some(time(random, 1500));
            holds.channels.iter_mut().for_each(|hold| *hold = Some(time(random, 1500)));
        }
        // Rounds are sent, and one channel is still to come.
        2 => holds.channels[random.usize(..channels)] = Some(Duration::from_secs(1) + time(random, 1500)),
        // Main comes first, and all channels long after it.
        3 => holds.channels.iter_mut().for_each(|hold| *hold = Some(Duration::from_secs(1) + time(random, 500))),
        // All channels wait for main.
        4 => holds.main = Some(Duration::from_secs(1) + time(random, 1000)),
        // The last first, one after the other.
        _ => {
            let each = 20 + random.u64(..200);
            for (id, hold) in holds.channels.iter_mut().rev().enumerate() {
                *hold = Some(Duration::from_millis(each * id as u64));
            }
        }
    }
    holds
}

/// The type of the answer that ends a return path.
const SHUT: [u8; 2] = [0, 1];
/// For one migration, on a machine with much else to do.
const LIMIT: Duration = Duration::from_secs(90);
