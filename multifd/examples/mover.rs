//! Moves static memory between two processes through the engine, to measure it without a guest.
//!
//! ```text
//! mover send MIB MEMORY CONTENT [USED [BLOCKS]]   MEMORY: anonymous, memory-file, huge-pages
//! mover receive URI MIB MEMORY FIRST_TOUCH [audit|tls=DIR|blocks=BLOCKS]   MEMORY: also one touched before:
//!                                              present (anonymous), present-file, present-huge
//! mover receive-raw URI MIB CHANNELS MEMORY    the same bytes over plain sockets: the limit
//! mover checkpoint URI FILE DIRECT             into a checkpoint; DIRECT: auto, on, off
//! mover restore FILE URI CHANNELS              from a checkpoint
//! mover write FILE MIB THREADS                 a new file of that size by direct writes, put on disk: the limit of a checkpoint
//! mover touch MIB MEMORY FIRST_TOUCH THREADS   content from the same few pages into fresh memory, without a connection
//! mover warm MIB                               touches and frees memory
//! ```
//! CONTENT is a file that the memory is filled with, over and over, or `random`; USED says how many MiB of it, spread
//! over all of it in pieces of 2 MiB; BLOCKS how many RAM blocks it is, 1 unless said, all of them filled where there are more.
//! `send` prints `ready`, then migrates once for each line `URI CHANNELS [OPTION…]` on
//! its standard input; options are `per-section`, `zlib`, `zstd`, `auto` (zstd while it pays), `max-bandwidth=RATE` in bytes
//! per second, `zero-copy`, `rounds=ROUNDS` (as many before the pause, each after the first with the same 16 MiB), `tls=DIR`, and
//! `raw` towards `receive-raw`. Each migration prints one JSON line: seconds, CPU seconds and peak
//! resident size of the process, and what it moved.

mod figures;

use std::{
    fs::OpenOptions,
    io::{BufRead, Read, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use multifd::{
    checkpoint::{Checkpoint, CheckpointSource, DirectWrites, Writer},
    destination::{self, Destination, FirstTouch},
    dirty::{DirtyLog, untouched::untouched},
    dirty_bitmap::DirtyBitmap,
    multifd_proto::{BlockName, machine::Dialect, packet::Compression},
    ram::{Ram, RamBlock},
    sections::Sections,
    source::{self, Source},
    transport::{Connect, Listen, uri::Uri},
    vm::{DestinationVm, SectionId, SourceVm, VmError},
};

use figures::{cpu_seconds, peak_mib};
use rustix::fs::OFlags;

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["send", mib, memory, content] => send(mib.parse()?, memory, content, mib.parse()?, 1),
        ["send", mib, memory, content, used] => send(mib.parse()?, memory, content, used.parse()?, 1),
        ["send", mib, memory, content, used, blocks] => {
            send(mib.parse()?, memory, content, used.parse()?, blocks.parse()?)
        }
        ["receive", uri, mib, memory, first_touch] => receive(&uri.parse()?, mib.parse()?, memory, first_touch, ""),
        ["receive", uri, mib, memory, first_touch, option] => {
            receive(&uri.parse()?, mib.parse()?, memory, first_touch, option)
        }
        ["write", file, mib, threads] => write(Path::new(file), mib.parse()?, threads.parse()?),
        ["receive-raw", uri, mib, channels, memory] => {
            receive_raw(&uri.parse()?, mib.parse()?, channels.parse()?, memory)
        }
        ["checkpoint", uri, file, direct] => checkpoint(&uri.parse()?, file.as_ref(), direct),
        ["restore", file, uri, channels] => restore(file.as_ref(), &uri.parse()?, channels.parse()?),
        ["touch", mib, memory, first_touch, threads] => touch(mib.parse()?, memory, first_touch, threads.parse()?),
        ["warm", mib] => {
            std::hint::black_box(vec![1u8; mib.parse::<usize>()? << 20]);
            Ok(())
        }
        _ => Err("usage: mover send|receive|receive-raw|touch|warm …".into()),
    }
}

fn receive(uri: &Uri, mib: usize, memory: &str, first_touch: &str, option: &str) -> Outcome {
    let first_touch = strategy(first_touch)?;
    let blocks = option.strip_prefix(BLOCKS).map_or(Ok(1), str::parse)?;
    let ram = match PRESENT.iter().any(|(name, _)| *name == memory) {
        true => present(mib, memory, blocks)?,
        false => allocate(mib, memory, blocks)?,
    };
    let listener = uri.listener()?;
    let at = listener.uri().clone();
    let mut listener: Box<dyn Listen> = Box::new(listener);
    if let Some(dir) = option.strip_prefix(TLS) {
        listener = tls_listener(listener, dir)?;
    }
    say(&format!("listening on {at}"));
    let cpu = cpu_seconds();
    let mut vm = Static { ram, writes: 0 };
    let mut options = destination::Options::default();
    options.first_touch = first_touch;
    options.audit = option == "audit";
    let report = Destination::new(options).run(&mut vm, listener, &mut ())?;
    let (seconds, cpu) = (report.total.as_secs_f64(), cpu_seconds() - cpu);
    say(&format!(
        "{{\"seconds\":{seconds:.4},\"cpu-seconds\":{cpu:.3},\"peak-mib\":{},\"normal\":{},\"zero\":{}}}",
        peak_mib(),
        report.normal,
        report.zero
    ));
    Ok(())
}

fn checkpoint(uri: &Uri, file: &Path, direct: &str) -> Outcome {
    let direct = match direct {
        "auto" => DirectWrites::Auto,
        "on" => DirectWrites::On,
        "off" => DirectWrites::Off,
        other => return Err(format!("direct {other}").into()),
    };
    let mut writer = Writer::create(file, true)?.direct_writes(direct);
    let listener = uri.listener()?;
    say(&format!("listening on {}", listener.uri()));
    let cpu = cpu_seconds();
    let destination = Destination::new(destination::Options::default());
    let report = writer.receive(destination, Box::new(listener), &mut ())?;
    let (seconds, cpu) = (report.total.as_secs_f64(), cpu_seconds() - cpu);
    let downtime = report.downtime.unwrap_or_default().as_secs_f64() * 1e3;
    say(&format!("{{\"seconds\":{seconds:.4},\"cpu-seconds\":{cpu:.3},\"downtime-ms\":{downtime:.1}}}"));
    Ok(())
}

fn write(path: &Path, mib: u64, threads: u64) -> Outcome {
    let direct = i32::try_from(OFlags::DIRECT.bits())?;
    let file = OpenOptions::new().write(true).create_new(true).custom_flags(direct).open(path)?;
    let (begun, cpu) = (Instant::now(), cpu_seconds());
    file.set_len(mib << 20)?;
    let next = AtomicU64::new(0);
    // Pieces of the size that a packet of 128 pages has, in memory that begins as a page does.
    let piece = PACKET_BYTES;
    let one = || -> std::io::Result<()> {
        let memory: Vec<u8> = (0..piece + PAGE_BYTES).map(|at| (at * 7 / 3) as u8).collect();
        let begin = memory.as_ptr().align_offset(PAGE_BYTES);
        loop {
            let at = next.fetch_add(piece as u64, Relaxed);
            if at >= mib << 20 {
                return Ok(());
            }
            file.write_all_at(&memory[begin..begin + piece], at)?;
        }
    };
    thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        all.into_iter().try_for_each(|thread| thread.join().expect("a thread that does not panic"))
    })?;
    file.sync_all()?;
    let (seconds, cpu) = (begun.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    say(&format!("{{\"seconds\":{seconds:.4},\"cpu-seconds\":{cpu:.3}}}"));
    Ok(())
}

const PACKET_BYTES: usize = 128 * PAGE_BYTES;
const PAGE_BYTES: usize = 4096;

fn restore(file: &Path, uri: &Uri, channels: u8) -> Outcome {
    let cpu = cpu_seconds();
    let mut vm = CheckpointSource::new(&Checkpoint::open(file)?)?;
    let mut options = source::Options::default();
    options.plan.channels = channels;
    let report = Source::new(options).run(&mut vm, &*uri.connector()?, &mut ())?;
    let (seconds, cpu) = (report.total.as_secs_f64(), cpu_seconds() - cpu);
    say(&format!("{{\"seconds\":{seconds:.4},\"cpu-seconds\":{cpu:.3}}}"));
    Ok(())
}

fn strategy(first_touch: &str) -> Outcome<FirstTouch> {
    Ok(match first_touch {
        "auto" => FirstTouch::Auto,
        "direct" => FirstTouch::Direct,
        "copy" => FirstTouch::Copy,
        "populate" => FirstTouch::Populate,
        "huge" => FirstTouch::Huge,
        other => return Err(format!("first touch {other}").into()),
    })
}

/// What the first touch costs by itself: the content is in the processor's caches before.
#[cfg(feature = "__bench")]
fn touch(mib: usize, memory: &str, first_touch: &str, threads: u8) -> Outcome {
    let ram = allocate(mib, memory, 1)?;
    let (cpu, begun) = (cpu_seconds(), Instant::now());
    let content = std::sync::Arc::new(multifd::testing::bench::FirstContent::new(strategy(first_touch)?, &ram));
    let workers = (0..threads).map(|thread| {
        let (ram, content) = (ram.clone(), content.clone());
        thread::spawn(move || -> Outcome {
            let from = vec![1; RAW_PIECE];
            for offset in share(&ram, thread, threads) {
                content.fill(ram.blocks()[0].range(offset, RAW_PIECE).ok_or("out of bounds")?, &from, 4096)?;
            }
            Ok(())
        })
    });
    join(workers.collect())?;
    let seconds = begun.elapsed().as_secs_f64();
    say(&format!("{{\"seconds\":{seconds:.5},\"cpu-seconds\":{:.3}}}", cpu_seconds() - cpu));
    Ok(())
}

#[cfg(not(feature = "__bench"))]
fn touch(_mib: usize, _memory: &str, _first_touch: &str, _threads: u8) -> Outcome {
    Err("built without the feature `__bench`".into())
}

fn send(mib: usize, memory: &str, content: &str, used: usize, blocks: usize) -> Outcome {
    let ram = allocate(mib, memory, blocks)?;
    let content = match content {
        "random" => random(64 << 20),
        path => std::fs::read(path)?,
    };
    fill(&ram, &content, used);
    drop(content);
    say("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let mut words = line.split_whitespace();
        let uri: Uri = words.next().ok_or("a URI is missing")?.parse()?;
        let channels = words.next().ok_or("the number of channels is missing")?.parse()?;
        let mut options = source::Options::default();
        options.plan.channels = channels;
        let (mut raw, mut tls, mut writes) = (false, None, 0);
        for word in words {
            match word {
                "per-section" => options.qemu.dialect = Dialect::PerSection,
                "zlib" => options.format.compression = Compression::Zlib,
                "zstd" => options.format.compression = Compression::Zstd,
                "auto" => (options.format.compression, options.format.auto_compression) = (Compression::Zstd, true),
                "zero-copy" => options.plan.zero_copy = true,
                "raw" => raw = true,
                other if other.starts_with(TLS) => tls = other.strip_prefix(TLS),
                other if other.starts_with(ROUNDS) => {
                    writes = other[ROUNDS.len()..].parse::<u32>()?.saturating_sub(1);
                    let limits = &mut options.parameters.limits;
                    // Less than any round takes that has something to send.
                    (limits.downtime, limits.rounds, limits.throttle) = (Duration::from_millis(1), None, false);
                }
                other if other.starts_with(BANDWIDTH) => {
                    options.parameters.max_bandwidth = Some(other[BANDWIDTH.len()..].parse()?);
                }
                other => return Err(format!("option {other}").into()),
            }
        }
        let mut connector = uri.connector()?;
        if let Some(dir) = tls {
            connector = tls_connector(connector, dir)?;
        }
        if raw { send_raw(&ram, &*connector, channels)? } else { migrate(&ram, &*connector, options, writes)? }
    }
    Ok(())
}

#[cfg(feature = "tls")]
fn tls_connector(connector: Box<dyn Connect + Send + Sync>, dir: &str) -> Outcome<Box<dyn Connect + Send + Sync>> {
    use multifd::transport::tls::{ClientCredentials, TlsConnector};
    let credentials = ClientCredentials::from_dir(dir.as_ref())?;
    Ok(Box::new(TlsConnector::new(connector, credentials, "127.0.0.1")?))
}

#[cfg(feature = "tls")]
fn tls_listener(listener: Box<dyn Listen>, dir: &str) -> Outcome<Box<dyn Listen>> {
    use multifd::transport::tls::{ClientCertificates, ServerCredentials, TlsListener};
    let credentials = ServerCredentials::from_dir(dir.as_ref(), ClientCertificates::Required)?;
    Ok(Box::new(TlsListener::new(listener, credentials)))
}

#[cfg(not(feature = "tls"))]
fn tls_connector(_connector: Box<dyn Connect + Send + Sync>, _dir: &str) -> Outcome<Box<dyn Connect + Send + Sync>> {
    Err("built without TLS".into())
}

#[cfg(not(feature = "tls"))]
fn tls_listener(_listener: Box<dyn Listen>, _dir: &str) -> Outcome<Box<dyn Listen>> {
    Err("built without TLS".into())
}

fn migrate(ram: &Ram, to: &dyn Connect, options: source::Options, writes: u32) -> Outcome {
    let cpu = cpu_seconds();
    let mut vm = Static { ram: ram.clone(), writes };
    let report = Source::new(options).run(&mut vm, to, &mut ())?;
    let (seconds, cpu) = (report.total.as_secs_f64(), cpu_seconds() - cpu);
    for channel in &report.auto_compression {
        let packets = channel.packets_plain + channel.packets_compressed;
        eprintln!("{:?}: {} of {packets} compressed, {}", channel.channel, channel.packets_compressed, channel.reason);
    }
    let wire: u64 = report.main_bytes + report.channel_bytes.iter().sum::<u64>();
    say(&format!(
        "{{\"seconds\":{seconds:.5},\"cpu-seconds\":{cpu:.3},\"peak-mib\":{},\"normal\":{},\"zero\":{},\"skipped\":{},\
         \"wire-bytes\":{wire},\"rounds\":{},\"setup-ms\":{:.3},\"downtime-ms\":{:.3}}}",
        peak_mib(),
        report.normal,
        report.zero,
        report.skipped,
        report.rounds_total,
        report.setup.as_secs_f64() * 1e3,
        report.downtime.total.as_secs_f64() * 1e3
    ));
    Ok(())
}

/// Sends all memory over `channels` plain connections, an equal part on each, and waits for a byte of each.
fn send_raw(ram: &Ram, to: &dyn Connect, channels: u8) -> Outcome {
    let (cpu, begun) = (cpu_seconds(), Instant::now());
    let threads = (0..channels).map(|channel| {
        let (ram, stream) = (ram.clone(), to.connect());
        thread::spawn(move || -> Outcome {
            let mut stream = stream?;
            for offset in share(&ram, channel, channels) {
                stream.write(&[], &[ram.blocks()[0].range(offset, RAW_PIECE).ok_or("out of bounds")?])?;
            }
            Ok(stream.read_exact(&mut [0])?)
        })
    });
    join(threads.collect())?;
    let seconds = begun.elapsed().as_secs_f64();
    say(&format!(
        "{{\"seconds\":{seconds:.5},\"cpu-seconds\":{:.3},\"peak-mib\":{}}}",
        cpu_seconds() - cpu,
        peak_mib()
    ));
    Ok(())
}

/// Receives what [`send_raw`] sends into memory that is present.
fn receive_raw(uri: &Uri, mib: usize, channels: u8, memory: &str) -> Outcome {
    let ram = present(mib, memory, 1)?;
    let mut listener = uri.listener()?;
    say(&format!("listening on {}", listener.uri()));
    let cpu = cpu_seconds();
    let threads = (0..channels).map(|channel| {
        let stream = listener.accept(Some(Duration::from_secs(60))).and_then(|pending| pending.establish(None));
        let ram = ram.clone();
        thread::spawn(move || -> Outcome {
            let mut stream = stream?;
            for offset in share(&ram, channel, channels) {
                stream.read_pages(&[ram.blocks()[0].range(offset, RAW_PIECE).ok_or("out of bounds")?])?;
            }
            Ok(stream.write(&[0], &[])?)
        })
    });
    join(threads.collect())?;
    say(&format!("{{\"cpu-seconds\":{:.3},\"peak-mib\":{}}}", cpu_seconds() - cpu, peak_mib()));
    Ok(())
}

/// The offsets of the pieces that `channel` of `channels` moves.
fn share(ram: &Ram, channel: u8, channels: u8) -> impl Iterator<Item = u64> + use<> {
    let pieces = ram.blocks()[0].bytes() / RAW_PIECE;
    (usize::from(channel)..pieces).step_by(usize::from(channels)).map(|piece| (piece * RAW_PIECE) as u64)
}

fn join(threads: Vec<thread::JoinHandle<Outcome>>) -> Outcome {
    threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
}

/// As many blocks of the same size, which is a multiple of a page.
fn allocate(mib: usize, memory: &str, blocks: usize) -> Outcome<Ram> {
    let bytes = (mib << 20) / blocks / 4096 * 4096;
    let block = |index: usize| -> Outcome<RamBlock> {
        let name = BlockName::new(&if blocks == 1 { "ram".to_owned() } else { format!("ram{index}") })?;
        Ok(match memory {
            "anonymous" | "huge-pages" => RamBlock::anonymous(name, bytes)?,
            "memory-file" => RamBlock::memory_file(name, bytes)?,
            other => return Err(format!("memory {other}").into()),
        })
    };
    let ram = Ram::new(4096, (0..blocks).map(block).collect::<Outcome<_>>()?)?;
    if memory == "huge-pages" { huge_pages(ram) } else { Ok(ram) }
}

/// Memory of this kind, with all of its pages touched.
fn present(mib: usize, kind: &str, blocks: usize) -> Outcome<Ram> {
    let memory = PRESENT.iter().find_map(|(name, memory)| (*name == kind).then_some(*memory));
    let ram = allocate(mib, memory.ok_or_else(|| format!("memory {kind}"))?, blocks)?;
    fill(&ram, &[1; PIECE], mib);
    Ok(ram)
}

/// Has the kernel give `ram` huge pages, as far as it has them.
#[cfg(feature = "__bench")]
fn huge_pages(ram: Ram) -> Outcome<Ram> {
    let content = multifd::testing::bench::FirstContent::new(FirstTouch::Huge, &ram);
    let from = vec![1; RAW_PIECE];
    for offset in share(&ram, 0, 1) {
        content.fill(ram.blocks()[0].range(offset, RAW_PIECE).ok_or("out of bounds")?, &from, 4096)?;
    }
    Ok(ram)
}

#[cfg(not(feature = "__bench"))]
fn huge_pages(_ram: Ram) -> Outcome<Ram> {
    Err("built without the feature `__bench`".into())
}

/// Fills `used` MiB of `ram` with `content`, a multiple of a piece long, in pieces spread evenly over all of it.
fn fill(ram: &Ram, content: &[u8], used: usize) {
    let [block] = ram.blocks() else {
        for block in ram.blocks() {
            for offset in (0..block.bytes()).step_by(PIECE) {
                let bytes = PIECE.min(block.bytes() - offset);
                block.range(offset as u64, bytes).expect("a piece of the block").write(&content[..bytes]);
            }
        }
        return;
    };
    let (all, used) = (block.bytes() / PIECE, (used << 20) / PIECE);
    for (piece, content) in (0..used).zip(content.chunks_exact(PIECE).cycle()) {
        let offset = (piece * all / used * PIECE) as u64;
        block.range(offset, PIECE).expect("a piece of the block").write(content);
    }
}

fn random(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_ne_bytes()
    };
    (0..bytes / 8).flat_map(|_| next()).collect()
}

/// Prints a line at once, for whoever waits for it.
fn say(line: &str) {
    println!("{line}");
    // If nobody listens any more, there is nobody to tell.
    let _ = std::io::stdout().flush();
}

/// Memory that nobody writes, whatever the log says.
struct Static {
    ram: Ram,
    /// How often the log is still going to say that the same pages were written.
    writes: u32,
}

impl SourceVm for Static {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn dirty_log(&mut self) -> &mut dyn DirtyLog {
        self
    }

    fn untouched(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        Ok(untouched(&self.ram, into)?)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn save(&mut self, _out: &mut Sections) -> Result<(), VmError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

impl DirtyLog for Static {
    fn name(&self) -> &'static str {
        "none"
    }

    fn start(&mut self, _ram: &Ram) -> std::io::Result<()> {
        Ok(())
    }

    fn drain(&mut self, into: &mut DirtyBitmap) -> std::io::Result<()> {
        if let Some(left) = self.writes.checked_sub(1) {
            self.writes = left;
            into.set_range(0..WRITTEN);
        }
        Ok(())
    }

    fn stop(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl DestinationVm for Static {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn load(&mut self, section: &SectionId, _input: &mut dyn Read) -> Result<(), VmError> {
        Err(format!("no device called {}", section.name).into())
    }

    fn start(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

/// Kinds of memory that is touched before, and what they are without that.
const PRESENT: &[(&str, &str)] =
    &[("present", "anonymous"), ("present-file", "memory-file"), ("present-huge", "huge-pages")];
const TLS: &str = "tls=";
const BLOCKS: &str = "blocks=";
const ROUNDS: &str = "rounds=";
/// Pages of a round after the first.
const WRITTEN: u64 = 4096;
const BANDWIDTH: &str = "max-bandwidth=";
/// What is filled at a time: a huge page, so that huge pages do not make a sparse source larger.
const PIECE: usize = 2 << 20;
/// What plain sockets send at a time: as much as a packet of the engine.
const RAW_PIECE: usize = 512 << 10;
