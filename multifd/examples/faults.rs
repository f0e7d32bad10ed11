//! Measures how long a page is waited for while the rest of the memory streams in the background at full speed.
//!
//! ```text
//! faults URI MIB [preempt] [max-bandwidth=RATE]
//! ```
//! A checkpoint of MIB MiB, all of it content, is handed over to a destination in this process that plays a guest with one vCPU: it asks
//! for a random page that it does not have, waits for it, and asks for the next one. Prints one JSON line: what the destination saw, from
//! before the request is written until the last byte of the page was read, and what the source reports, from the arrival of the request
//! until the page was written to the socket. Times are in microseconds. Both ends share this machine's CPUs.

use multifd_proto::Codec;
use std::{
    fs::{self, File},
    io::{Seek, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use multifd::{
    checkpoint::Checkpoint,
    multifd_proto::{
        BlockName, Step,
        encoder::MainEncoder,
        mapped_ram::BlockHeader,
        postcopy::{PreemptDecoder, PreemptItem},
        ram::BlockEntry,
        return_path::Message,
        stream::{MAPPED_RAM, Section, SectionKind},
    },
    postcopy::{Latency, Options, Source},
    transport::{Listen, RecvHalf, SendHalf, uri::Uri},
};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

const PAGE: usize = 4096;
const BLOCK: &str = "pc.ram";

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [uri, mib, more @ ..] = &arguments[..] else {
        return Err("usage: faults URI MIB [preempt] [max-bandwidth=RATE]".into());
    };
    let mut options = Options::default();
    for option in more {
        match option.split_once('=') {
            None if option == "preempt" => options.preempt = true,
            Some(("max-bandwidth", rate)) => options.max_bandwidth = Some(rate.parse()?),
            _ => return Err(format!("not an option: {option}").into()),
        }
    }
    let mut listener = uri.parse::<Uri>()?.listener()?;
    let at = listener.uri().clone();
    let directory = std::env::temp_dir().join(format!("faults-{}", std::process::id()));
    fs::create_dir(&directory)?;
    let measured = checkpoint(&directory.join("checkpoint"), mib.parse()?).and_then(|checkpoint| {
        let pages = checkpoint.layout().pages();
        let preempt = options.preempt;
        let destination = thread::spawn(move || destination(&mut listener, preempt, pages));
        let mut source = Source::new(&checkpoint, options)?;
        let begun = Instant::now();
        source.hand_over(&*at.connector()?, &mut || Ok(()))?;
        let seconds = begun.elapsed().as_secs_f64();
        let waited = destination.join().map_err(|_| "the destination panicked")??;
        Ok((waited, source.report(), seconds))
    });
    fs::remove_dir_all(&directory)?;
    let (mut waited, report, seconds) = measured?;
    waited.sort_unstable();
    let quantile = |percent: usize| {
        waited.get((waited.len() * percent).div_ceil(100).saturating_sub(1)).map_or(0, Duration::as_micros)
    };
    let Latency { p50, p99, max, .. } = report.latency;
    println!(
        r#"{{"seconds":{seconds:.3},"requests":{},"urgent-pages":{},"seen":{{"p50":{},"p99":{},"max":{}}},"reported":{{"p50":{},"p99":{},"max":{}}}}}"#,
        waited.len(),
        report.urgent_pages,
        quantile(50),
        quantile(99),
        quantile(100),
        p50.as_micros(),
        p99.as_micros(),
        max.as_micros(),
    );
    Ok(())
}

/// Writes a checkpoint of one block with `mib` MiB of content.
fn checkpoint(path: &Path, mib: u64) -> Outcome<Checkpoint> {
    let bytes = mib << 20;
    let entry = BlockEntry::new(BlockName::new(BLOCK)?, bytes);
    let mut encoder = MainEncoder::default();
    encoder.header().configuration("pc-i440fx-10.0").config_capabilities(&[MAPPED_RAM]).ram_start(2, bytes);
    let head = |header| {
        let entry = BlockEntry { mapped_ram: Some(header), ..entry.clone() };
        MainEncoder::default().block(&entry).bytes.clone()
    };
    let begin = encoder.bytes.len() as u64 + head(BlockHeader::place(0, bytes, PAGE as u64)).len() as u64;
    let header = BlockHeader::place(begin, bytes, PAGE as u64);
    encoder.raw(&head(header));
    let mut file = File::create(path)?;
    file.write_all(&encoder.bytes)?;
    file.seek(std::io::SeekFrom::Start(header.bitmap_offset))?;
    file.write_all(&vec![0xff; (bytes / PAGE as u64 / 8) as usize])?;
    file.seek(std::io::SeekFrom::Start(header.pages_offset))?;
    for piece in 0..mib {
        file.write_all(&vec![1 + piece as u8 % 250; 1 << 20])?;
    }
    let section = Section { kind: SectionKind::Full, id: 7, name: "cpu".to_owned(), instance: 0, version: 1 };
    let mut encoder = MainEncoder::default();
    encoder.eos().footer(2).ram_part(2, true).eos().footer(2).section(&section).raw(b"registers").footer(7).eof();
    encoder.vm_description(
        br#"{"page_size":4096,"devices":[{"name":"cpu","instance_id":0,"version":1,"fields":[{"name":"data","type":"buffer","size":9}]}]}"#,
    );
    file.write_all(&encoder.bytes)?;
    drop(file);
    Ok(Checkpoint::open(path)?)
}

/// The pages that have come, and who waits for which.
struct Arrived {
    pages: Vec<AtomicBool>,
    awaited: AtomicU64,
    came: mpsc::SyncSender<Instant>,
}

impl Arrived {
    fn add(&self, page: u64) {
        self.pages[page as usize].store(true, SeqCst);
        if self.awaited.compare_exchange(page, u64::MAX, SeqCst, SeqCst).is_ok() {
            let _ = self.came.send(Instant::now());
        }
    }
}

/// Takes the VM, and asks for pages until all have come. Returns how long each was waited for.
fn destination(listener: &mut dyn Listen, preempt: bool, pages: u64) -> Outcome<Vec<Duration>> {
    let (mut answers, main) = listener.accept(None)?.establish(None)?.split()?;
    let urgent = if preempt { Some(listener.accept(None)?.establish(None)?.split()?) } else { None };
    let (came, is_there) = mpsc::sync_channel(1);
    let arrived = Arc::new(Arrived {
        pages: (0..pages).map(|_| AtomicBool::new(false)).collect(),
        awaited: AtomicU64::new(u64::MAX),
        came,
    });
    let urgent = urgent.map(|(writer, reader)| {
        let arrived = arrived.clone();
        thread::spawn(move || Pages::new(reader, arrived).take_all().map(|_| drop(writer)))
    });
    answers.write(&pongs(), &[])?;
    let main = {
        let arrived = arrived.clone();
        thread::spawn(move || {
            let mut main = Pages::new(main, arrived);
            main.skip_opening()?;
            main.take_all()
        })
    };
    let waited = ask(&mut *answers, &arrived, &is_there)?;
    let panicked = |_| "a thread that reads panicked";
    let mut main = main.join().map_err(panicked)??;
    if let Some(urgent) = urgent {
        urgent.join().map_err(panicked)??;
    }
    main.read(b"\x7e\0\0\0\x02\x03\0\0\0\x02\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\0".len())?;
    let mut shut = Vec::new();
    Message::Shut(0).encode(&mut shut);
    answers.write(&shut, &[])?;
    Ok(waited)
}

/// What a destination says by and by, at once: it has taken the block list. (A request says that the devices are loaded.)
fn pongs() -> Vec<u8> {
    let mut bytes = Vec::new();
    Message::Pong(2).encode(&mut bytes);
    bytes
}

/// Asks for random pages, one at a time, until there are none.
fn ask(answers: &mut dyn SendHalf, arrived: &Arrived, is_there: &mpsc::Receiver<Instant>) -> Outcome<Vec<Duration>> {
    // RUN comes within some milliseconds of the first answer.
    thread::sleep(Duration::from_millis(50));
    let (mut waited, mut random, pages) = (Vec::new(), 0x9e37_79b9_7f4a_7c15u64, arrived.pages.len() as u64);
    loop {
        // xorshift64, and on to the next page that is not there.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let from = random % pages;
        let free = (from..pages).chain(0..from).find(|&page| !arrived.pages[page as usize].load(SeqCst));
        let Some(page) = free else { return Ok(waited) };
        arrived.awaited.store(page, SeqCst);
        if arrived.pages[page as usize].load(SeqCst) {
            // It came meanwhile, and whether that was noticed is up to the thread that took it.
            if arrived.awaited.swap(u64::MAX, SeqCst) == u64::MAX {
                is_there.recv()?;
            }
            continue;
        }
        let mut request = Vec::new();
        Message::ReqPagesId { start: page * PAGE as u64, len: PAGE as u32, block: BlockName::new(BLOCK)? }
            .encode(&mut request);
        let asked = Instant::now();
        answers.write(&request, &[])?;
        waited.push(is_there.recv()?.duration_since(asked));
    }
}

/// A connection with pages.
struct Pages {
    stream: Box<dyn RecvHalf>,
    arrived: Arc<Arrived>,
    buf: Vec<u8>,
    /// How much of `buf` was used.
    used: usize,
}

impl Pages {
    fn new(stream: Box<dyn RecvHalf>, arrived: Arc<Arrived>) -> Pages {
        Pages { stream, arrived, buf: Vec::new(), used: 0 }
    }

    /// Has at least `len` bytes that were not used.
    fn need(&mut self, len: usize) -> Outcome {
        self.buf.drain(..self.used);
        self.used = 0;
        while self.buf.len() < len {
            let have = self.buf.len();
            self.buf.resize(have + (256 << 10), 0);
            let read = self.stream.read(&mut self.buf[have..])?;
            self.buf.truncate(have + read);
            if read == 0 {
                return Err("the source ended the connection".into());
            }
        }
        Ok(())
    }

    fn read(&mut self, len: usize) -> Outcome {
        if self.buf.len() - self.used < len {
            self.need(len)?;
        }
        self.used += len;
        Ok(())
    }

    /// Passes over all up to the head of the section that the pages are in.
    fn skip_opening(&mut self) -> Outcome {
        let end = b"\x08\0\x02\0\x04\0\0\0\x04\x02\0\0\0\x02";
        loop {
            let at = self.buf.windows(end.len()).position(|bytes| bytes == end);
            if let Some(at) = at {
                self.used = at + end.len();
                return Ok(());
            }
            let have = self.buf.len();
            self.need(have + 1)?;
        }
    }

    /// Takes pages up to the end of the section.
    fn take_all(mut self) -> Outcome<Pages> {
        let entry = BlockEntry::new(BlockName::new(BLOCK)?, self.arrived.pages.len() as u64 * PAGE as u64);
        let (blocks, mut words) = ([entry], PreemptDecoder::default());
        loop {
            match words.step(&self.buf[self.used..], &blocks, PAGE)? {
                Step::Need(total) => self.need(total)?,
                Step::Item { item, used } => {
                    self.used += used;
                    match item {
                        PreemptItem::End => return Ok(self),
                        PreemptItem::Zero { offset, .. } => self.arrived.add(offset / PAGE as u64),
                        PreemptItem::Page { offset, .. } => {
                            self.read(PAGE)?;
                            self.arrived.add(offset / PAGE as u64);
                        }
                    }
                }
            }
        }
    }
}
