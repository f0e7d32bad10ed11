//! Two QEMUs that migrate one to the other, with what the engine's side is compared by.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use qemu_peer::{BootGuest, Installed, Memory, Qemu, QemuBuilder, Status};
use serde_json::{Value, json};

use super::Bench;

/// A source, for any number of migrations of a stopped guest.
pub struct Source {
    qemu: Qemu,
    memory: Memory,
    mib: u32,
    builder: QemuBuilder,
    /// It is migrated while its guest runs.
    runs: bool,
}

/// How to migrate.
#[derive(Clone, Copy)]
pub struct Parameters<'a> {
    pub channels: u8,
    pub compression: &'a str,
    /// Bytes per second.
    pub max_bandwidth: u64,
    /// Milliseconds.
    pub downtime_limit: u64,
    /// Certificates, for TLS.
    pub tls: Option<&'a Path>,
}

/// One migration.
#[derive(Clone, Debug)]
pub struct Moved {
    /// What `query-migrate` said at the end.
    pub answer: Value,
    /// Of both processes, during the migration.
    pub cpu_seconds: f64,
    /// Peak resident size of source and destination, in MiB.
    pub peak_mib: [u64; 2],
    /// When it was begun and found to have ended, in milliseconds of the system's time.
    pub began_and_ended: [f64; 2],
    /// How many times its dirty bitmap had been read, and since when that was seen.
    pub syncs: Vec<(u64, f64)>,
}

impl Moved {
    pub fn seconds(&self) -> f64 {
        self.answer["total-time"].as_f64().unwrap_or(f64::NAN) / 1e3
    }

    pub fn setup_ms(&self) -> f64 {
        self.answer["setup-time"].as_f64().unwrap_or(f64::NAN)
    }

    pub fn downtime_ms(&self) -> f64 {
        self.answer["downtime"].as_f64().unwrap_or(f64::NAN)
    }

    /// A figure about memory.
    pub fn ram(&self, name: &str) -> f64 {
        self.answer["ram"][name].as_f64().unwrap_or(f64::NAN)
    }
}

impl Default for Parameters<'_> {
    fn default() -> Self {
        Parameters { channels: 4, compression: "none", max_bandwidth: 100 << 30, downtime_limit: 300, tls: None }
    }
}

impl Source {
    /// A guest that never ran, with `used` of `mib` MiB of its memory filled with `content`, spread in pieces of 2 MiB as
    /// the mover does it.
    pub fn stopped(bench: &Bench, mib: u32, memory: Memory, content: &Path, used: u32) -> Result<Source, String> {
        Source::stopped_of(&bench.qemu, mib, memory, content, used)
    }

    /// The same of another QEMU. Its machine is the same one, so it speaks as the other does.
    pub fn stopped_of(qemu: &Installed, mib: u32, memory: Memory, content: &Path, used: u32) -> Result<Source, String> {
        let builder = builder(qemu, mib, memory).arguments(&["-S"]);
        Source::stopped_with(builder, mib, memory, content, used)
    }

    /// A guest that never ran, with all of its memory allocated before it starts, on both sides, and filled with `content`.
    pub fn stopped_present(qemu: &Installed, mib: u32, memory: Memory, content: &Path) -> Result<Source, String> {
        let backend = match memory {
            Memory::Anonymous => format!("memory-backend-ram,id=ram,size={mib}M,prealloc=on"),
            Memory::SharedFile => format!("memory-backend-memfd,id=ram,size={mib}M,share=on,prealloc=on"),
        };
        let present = ["-S", "-object", &backend, "-machine", "memory-backend=ram"];
        // The backend says where the memory is.
        let builder = builder(qemu, mib, Memory::Anonymous).arguments(&present);
        Source::stopped_with(builder, mib, Memory::Anonymous, content, mib)
    }

    /// The same with more anonymous memory than the host has: QEMU does not reserve it.
    pub fn stopped_unreserved(bench: &Bench, mib: u32, content: &Path, used: u32) -> Result<Source, String> {
        let backend = format!("memory-backend-ram,id=ram,size={mib}M,reserve=off");
        let unreserved = ["-S", "-object", &backend, "-machine", "memory-backend=ram"];
        let builder = builder(&bench.qemu, mib, Memory::Anonymous).arguments(&unreserved);
        Source::stopped_with(builder, mib, Memory::Anonymous, content, used)
    }

    fn stopped_with(
        builder: QemuBuilder,
        mib: u32,
        memory: Memory,
        content: &Path,
        used: u32,
    ) -> Result<Source, String> {
        let mut source = Source::start(builder, mib, memory)?;
        source.runs = false;
        let (file, base) = source.memory_file()?;
        let content = fs::read(content).map_err(|error| format!("{}: {error}", content.display()))?;
        let (all, used) = (u64::from(mib) / 2, u64::from(used) / 2);
        for (piece, content) in (0..used).zip(content.chunks_exact(PIECE).cycle()) {
            let offset = base + piece * all / used * PIECE as u64;
            file.write_all_at(content, offset).map_err(|error| format!("the memory of QEMU: {error}"))?;
        }
        Ok(source)
    }

    /// A running guest; without `guest` the firmware finds nothing to boot and stays idle.
    pub fn running(bench: &Bench, mib: u32, memory: Memory, guest: Option<BootGuest>) -> Result<Source, String> {
        let mut builder = builder(&bench.qemu, mib, memory);
        if let Some(guest) = guest {
            builder = builder.guest(guest);
        }
        Source::start(builder, mib, memory)
    }

    /// A running guest in anonymous memory that was filled with `content` before: `guest`, or firmware that finds nothing to
    /// boot and comes to rest.
    pub fn filled(
        qemu: &Installed,
        mib: u32,
        content: &Path,
        guest: Option<BootGuest>,
        accelerator: &str,
    ) -> Result<Source, String> {
        let mut builder = builder(qemu, mib, Memory::Anonymous);
        builder = builder.arguments(&["-machine", &format!("accel={accelerator}")]);
        if let Some(guest) = guest {
            builder = builder.guest(guest);
        }
        let waiting = builder.clone().arguments(&["-S"]);
        let mut source = Source::stopped_with(waiting, mib, Memory::Anonymous, content, mib)?;
        // The destination starts its guest by itself.
        (source.builder, source.runs) = (builder, true);
        source.qemu.qmp().cont().map_err(|error| error.to_string())?;
        Ok(source)
    }

    fn start(builder: QemuBuilder, mib: u32, memory: Memory) -> Result<Source, String> {
        let qemu = builder.clone().start().map_err(|error| error.to_string())?;
        Ok(Source { qemu, memory, mib, builder, runs: true })
    }

    /// What reaches the guest's memory from outside, and where it begins there.
    fn memory_file(&self) -> Result<(File, u64), String> {
        if let Some(path) = self.qemu.ram_file() {
            let file = OpenOptions::new().read(true).write(true).open(&path);
            return Ok((file.map_err(|error| format!("{}: {error}", path.display()))?, 0));
        }
        let pid = self.qemu.pid();
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|error| format!("QEMU's maps: {error}"))?;
        let base = maps.lines().find_map(|line| {
            let mut words = line.split(' ');
            let (start, end) = words.next()?.split_once('-')?;
            let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
            (matches!(words.next()?, "rw-p" | "rw-s") && end - start == u64::from(self.mib) << 20).then_some(start)
        });
        let base = base.ok_or("QEMU has no mapping of the size of its memory")?;
        let path = format!("/proc/{pid}/mem");
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(|error| format!("{path}: {error}"))?;
        Ok((file, base))
    }

    /// Which part of its memory is in huge pages, as the kernel has it at this moment.
    pub fn huge_share(&self) -> f64 {
        let path = format!("/proc/{}/smaps_rollup", self.qemu.pid());
        let text = fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0);
        // QEMU has a little more of its own.
        (kib / 1024.0 / f64::from(self.mib)).min(1.0)
    }

    pub fn qemu(&mut self) -> &mut Qemu {
        &mut self.qemu
    }

    /// How fast `guest`, which runs here, writes, in bytes per second over `time`.
    pub fn write_rate(&self, guest: BootGuest, time: Duration) -> Result<f64, String> {
        let cursor = self.cursor(guest)?;
        let (begun, before) = (Instant::now(), cursor.pages()?);
        std::thread::sleep(time);
        let pages = cursor.pages()? - before;
        Ok(pages * 4096.0 / begun.elapsed().as_secs_f64())
    }

    /// Looks at how far `guest` is, from outside.
    pub fn cursor(&self, guest: BootGuest) -> Result<Cursor, String> {
        let (file, base) = self.memory_file()?;
        Ok(Cursor { file, base, guest })
    }

    /// Migrates to a new QEMU; `warm` runs when both are prepared. `transport`: `unix`, `tcp`, or an address for TCP that is not
    /// this host's loopback.
    ///
    /// `None`: not finished within `limit`, and cancelled.
    pub fn migrate(
        &mut self,
        transport: &str,
        parameters: Parameters<'_>,
        limit: Duration,
        warm: impl FnOnce() -> Result<(), String>,
    ) -> Result<Option<Moved>, String> {
        let mut destination = self.incoming()?;
        self.migrate_to(&mut destination, transport, parameters, limit, warm)
    }

    /// A new QEMU that waits for this one's guest.
    pub fn incoming(&self) -> Result<Source, String> {
        Source::start(self.builder.clone().memory(self.memory).incoming(), self.mib, self.memory)
    }

    /// The same as [`migrate`](Self::migrate) to `destination`, which goes on after it.
    pub fn migrate_to(
        &mut self,
        destination: &mut Source,
        transport: &str,
        parameters: Parameters<'_>,
        limit: Duration,
        warm: impl FnOnce() -> Result<(), String>,
    ) -> Result<Option<Moved>, String> {
        let destination = &mut destination.qemu;
        let uri = match transport {
            "unix" => format!("unix:{}", destination.path("migration").display()),
            "tcp" => format!("tcp:127.0.0.1:{}", free_port()?),
            address => format!("tcp:{address}:{}", free_port()?),
        };
        let moved = self.drive(destination, &uri, parameters, limit, warm);
        moved.map_err(|error| error.to_string())
    }

    /// Migrates to `file`, a mapped-ram file, and puts that on disk. Returns the seconds until it is there, and the CPU seconds
    /// of QEMU.
    pub fn migrate_to_file(&mut self, file: &Path, channels: u8, direct: bool) -> Result<(f64, f64), String> {
        self.drive_to_file(file, channels, direct).map_err(|error| error.to_string())
    }

    fn drive_to_file(
        &mut self,
        file: &Path,
        channels: u8,
        direct: bool,
    ) -> Result<(f64, f64), Box<dyn std::error::Error>> {
        let source = &mut self.qemu;
        if source.qmp().run_state()? == "postmigrate" {
            source.qmp().cont()?;
            source.qmp().stop()?;
        }
        source.qmp().set_capabilities(&[("return-path", false), ("mapped-ram", true)])?;
        source.qmp().set_multifd(channels, "none")?;
        source.qmp().set_parameters(&[("max-bandwidth", json!(100u64 << 30)), ("direct-io", json!(direct))])?;
        let before = cpu_seconds(source.pid());
        let begun = Instant::now();
        source.qmp().migrate(&format!("file:{}", file.display()))?;
        source.qmp().wait_migration(&[Status::Completed], Duration::from_secs(120))?;
        File::open(file)?.sync_all()?;
        Ok((begun.elapsed().as_secs_f64(), cpu_seconds(source.pid()) - before))
    }

    fn drive(
        &mut self,
        destination: &mut Qemu,
        uri: &str,
        parameters: Parameters<'_>,
        limit: Duration,
        warm: impl FnOnce() -> Result<(), String>,
    ) -> Result<Option<Moved>, Box<dyn std::error::Error>> {
        let source = &mut self.qemu;
        if source.qmp().run_state()? == "postmigrate" {
            // It migrates again only after it has run; the firmware begins, which is nothing beside the content.
            source.qmp().cont()?;
            if !self.runs {
                source.qmp().stop()?;
            }
        }
        for side in [&mut *source, &mut *destination] {
            side.qmp().set_capabilities(&[("return-path", true)])?;
            side.qmp().set_multifd(parameters.channels, parameters.compression)?;
        }
        for (side, endpoint) in [(&mut *source, "client"), (&mut *destination, "server")] {
            // Of the migration before; there may be none.
            let _ = side.qmp().execute("object-del", json!({ "id": "tls0" }));
            if let Some(dir) = parameters.tls {
                let object = json!({ "qom-type": "tls-creds-x509", "id": "tls0", "endpoint": endpoint, "dir": dir });
                side.qmp().execute("object-add", object)?;
            }
            side.qmp().set_parameters(&[("tls-creds", json!(parameters.tls.map_or("", |_| "tls0")))])?;
        }
        source.qmp().set_parameters(&[
            ("max-bandwidth", json!(parameters.max_bandwidth)),
            ("downtime-limit", json!(parameters.downtime_limit)),
        ])?;
        destination.qmp().migrate_incoming(uri)?;
        warm()?;
        let before = cpu_seconds(source.pid()) + cpu_seconds(destination.pid());
        let (began, mut syncs) = (system_ms(), Vec::new());
        source.qmp().migrate(uri)?;
        let deadline = Instant::now() + limit;
        let answer = loop {
            let answer = source.qmp().query_migrate()?;
            let count = answer["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
            if syncs.last().is_none_or(|(last, _)| *last < count) {
                syncs.push((count, system_ms()));
            }
            match Status::parse(answer["status"].as_str().unwrap_or_default()) {
                Status::Completed => break answer,
                status if status.is_final() => return Err(format!("QEMU: {answer}").into()),
                _ if Instant::now() > deadline => {
                    source.qmp().migrate_cancel()?;
                    return Ok(None);
                }
                // QMP has nothing that blocks; its own clock tells the time.
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        destination.qmp().wait_migration(&[Status::Completed], Duration::from_secs(30))?;
        let began_and_ended = [began, system_ms()];
        let cpu_seconds = cpu_seconds(source.pid()) + cpu_seconds(destination.pid()) - before;
        let peak_mib = [peak_mib(source.pid()), peak_mib(destination.pid())];
        Ok(Some(Moved { answer, cpu_seconds, peak_mib, began_and_ended, syncs }))
    }
}

/// What a guest has written, by its memory.
pub struct Cursor {
    file: File,
    base: u64,
    guest: BootGuest,
}

impl Cursor {
    /// Pages written since the beginning of time; the guest goes on meanwhile, which is less than a page.
    pub fn pages(&self) -> Result<f64, String> {
        let pass = self.word(0)?.wrapping_mul(inverse(BootGuest::value(1, 0)));
        let (mut low, mut high) = (1, self.guest.pages());
        while low < high {
            let middle = low + (high - low) / 2;
            if self.word(middle)? == BootGuest::value(pass, middle) { low = middle + 1 } else { high = middle }
        }
        Ok(f64::from(pass) * f64::from(self.guest.pages()) + f64::from(low))
    }

    fn word(&self, page: u32) -> Result<u32, String> {
        let mut word = [0; 4];
        let read = self.file.read_exact_at(&mut word, self.base + self.guest.address(page));
        read.map(|()| u32::from_le_bytes(word)).map_err(|error| format!("the memory of QEMU: {error}"))
    }
}

/// Milliseconds of the system's time.
pub fn system_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64() * 1e3
}

fn builder(qemu: &Installed, mib: u32, memory: Memory) -> QemuBuilder {
    let builder = Qemu::builder(qemu).machine("pc-i440fx-10.0").memory_mib(mib).memory(memory);
    builder.limit(Duration::from_secs(3600))
}

/// User and system time of a process so far.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let ticks = stat.rsplit(')').next().unwrap_or("").split_whitespace().skip(11).take(2);
    ticks.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn peak_mib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

/// A port that was free just now.
pub fn free_port() -> Result<u16, String> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0");
    listener.and_then(|listener| listener.local_addr()).map(|at| at.port()).map_err(|error| error.to_string())
}

/// The inverse of an odd number modulo 2^32.
fn inverse(odd: u32) -> u32 {
    // Each step doubles the number of right bits, of which `odd` itself has three.
    (0..4).fold(odd, |inverse, _| inverse.wrapping_mul(2u32.wrapping_sub(odd.wrapping_mul(inverse))))
}

/// What is filled at a time, as in the mover.
const PIECE: usize = 2 << 20;

#[cfg(test)]
mod tests {
    #[test]
    fn an_inverse_undoes_a_multiplication() {
        for odd in [1u32, 3, 0x9e37_79b1, u32::MAX] {
            assert_eq!(odd.wrapping_mul(super::inverse(odd)), 1);
        }
    }
}
