//! Whole postcopies between both of the engine's ends, whose steps are held to the machine of the proof.
//!
//! A destination of the engine takes every page before it runs the guest, so it asks for none. The network of these tests asks in its
//! place, on the return path that the source reads: so pages come on main and on the preempt connection at the same time. It also
//! loses connections wherever it is told to, and the source goes on over new ones.
//!
//! Ordinary threads run some of them here; `shuttle_postcopy` has the schedules.

use std::{
    collections::{BTreeSet, VecDeque},
    fs, io,
    path::PathBuf,
    time::Duration,
};

use multifd_proto::{
    BlockName, Codec, Step,
    encoder::MainEncoder,
    mapped_ram::{self, BlockHeader, bitmap_len},
    postcopy::Package,
    ram::BlockEntry,
    return_path::Message,
    stream::{MAPPED_RAM, Section, SectionKind},
};
use test_support::TempDir;

use super::{broken::Broken, hand_over, memory, trace::Trace, vm::TestDestination};
use crate::{
    checkpoint::Checkpoint,
    destination::{self, Destination},
    error::Error,
    postcopy::{Options, PageAddress, Prefetch, Source, Whereabouts},
    ram::{GuestRange, Ram},
    sync::{Arc, Mutex, lock, thread},
    transport::{Connect, Pending, RecvHalf, SendHalf, Stopper, Stream, wrapped},
};

const PAGE: usize = 4096;
const BLOCKS: [(&str, usize); 2] = [("a", 3), ("b", 2)];
/// Pages with content: the others are zeros.
const CONTENT: [(usize, u64, u8); 3] = [(0, 0, 0x10), (0, 2, 0x12), (1, 1, 0x21)];
/// Less than two pages fit into each direction of a connection.
const ROOM: usize = 6000;
/// Bytes that a source writes in all, or a little less.
pub(super) const BYTES: usize = 14_000;

/// A VM on disk, which any number of postcopies begin from.
pub(super) struct Original {
    checkpoint: Checkpoint,
    _dir: TempDir,
}

impl Original {
    pub(super) fn new() -> Original {
        let dir = TempDir::new().unwrap();
        let checkpoint = Checkpoint::open(&write_checkpoint(&dir)).unwrap();
        Original { checkpoint, _dir: dir }
    }
}

/// What happens in one postcopy.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan {
    pub(super) preempt: bool,
    /// The first page is sent before RUN.
    pub(super) prefetch: bool,
    /// Page numbers that the guest waits for, in each attempt.
    pub(super) asks: Vec<u64>,
    /// After so many bytes connections are lost, by attempt.
    pub(super) cuts: Vec<usize>,
    /// Only the connection that has come so far is lost, and not all together.
    pub(super) one: bool,
    pub(super) broken: Option<Broken>,
}

/// What came of it.
pub(super) struct Outcome {
    trace: Trace,
    sent: Result<(), Error>,
    received: Result<destination::Report, Error>,
    to: TestDestination,
}

/// Hands the VM over, and goes on until the destination has everything or is gone.
pub(super) fn hand_over(original: &Original, plan: Plan) -> Outcome {
    let trace = Trace::recording();
    let mut source = Source::new(&original.checkpoint, options(&plan, &trace)).unwrap();
    attempt(&mut source, plan, trace)
}

/// Hands the VM of `source` over to a destination of its own.
fn attempt(source: &mut Source, plan: Plan, trace: Trace) -> Outcome {
    let (listener, connector) = memory::listener(ROOM);
    let receiving = destination::Options {
        channels: Some(0),
        recover_limit: Duration::from_secs(600),
        trace: trace.clone(),
        broken: plan.broken,
        ..destination::Options::default()
    };
    let destination = Destination::new(receiving);
    let stop = destination.stop_handle();
    let destination = thread::spawn(move || {
        let mut to = TestDestination::new(Ram::for_test_with_pages(PAGE, &BLOCKS));
        let received = destination.run(&mut to, Box::new(listener), &mut ());
        (to, received)
    });
    let network = Network { connector, plan: plan.clone(), attempt: Arc::default() };
    let mut cuts = plan.cuts.into_iter();
    network.begin(cuts.next());
    let mut sent = source.hand_over(&network, &mut || Ok(()));
    let mut tries = 0;
    while sent.is_err() && source.vm() != Whereabouts::Here && !network.is_gone() && tries < TRIES {
        // The destination may still have to notice that the old connections are lost.
        thread::yield_now();
        network.begin(cuts.next());
        sent = source.recover(&network);
        tries += 1;
    }
    if sent.is_err() {
        stop.cancel();
    }
    let (to, received) = destination.join().unwrap();
    Outcome { trace, sent, received, to }
}

impl Outcome {
    /// Asserts that each step was one of the machine that is proved.
    pub(super) fn assert_allowed(&self) -> hand_over::Machine {
        let layout = self.to.ram.layout();
        let pages: BTreeSet<u64> = layout.blocks().iter().flat_map(|block| block.page_range()).collect();
        match hand_over::check(&self.trace.steps(), &pages) {
            Ok(machine) => machine,
            Err(refused) => panic!("{refused}"),
        }
    }

    /// Asserts that the VM is in one place, and whole there.
    pub(super) fn assert_right(&self) -> hand_over::Machine {
        let machine = self.assert_allowed();
        let runs = self.to.calls().contains(&"start");
        match (&self.sent, &self.received) {
            (Ok(()), Ok(report)) => {
                assert!(machine.done && runs);
                // Some may have got no further than to ask what is here.
                assert!(report.recoveries <= machine.recoveries as u64);
                self.assert_same();
            }
            (Err(_), Err(_)) => assert!(!machine.done && !runs, "a guest without all of its memory runs"),
            (sent, received) => panic!("{sent:?} and {:?}", received.as_ref().map(|_| "received")),
        }
        machine
    }

    pub(super) fn arrived(&self) -> bool {
        self.sent.is_ok()
    }

    fn assert_same(&self) {
        let ram = &self.to.ram;
        for (index, block) in ram.layout().blocks().iter().enumerate() {
            for (number, page) in block.page_range().enumerate() {
                let content = CONTENT.iter().find(|(block, page, _)| (*block, *page) == (index, number as u64));
                let expected = content.map_or(0, |(.., byte)| *byte);
                assert!(ram.page_bytes(page) == [expected; PAGE], "page {number} of block {index} differs");
            }
        }
    }
}

fn options(plan: &Plan, trace: &Trace) -> Options {
    let first = PageAddress { block: BlockName::new(BLOCKS[0].0).unwrap(), offset: 0 };
    let mut options = Options::default();
    options.preempt = plan.preempt;
    options.prefetch = if plan.prefetch { vec![first] } else { Vec::new() };
    options.prefetch_when = Prefetch::BeforeRun;
    // A sign that the destination gives.
    options.set_up_limit = None;
    options.trace = trace.clone();
    options.broken = plan.broken;
    options
}

/// Connections that ask for pages in place of the destination, and are lost where it is planned.
struct Network {
    connector: memory::MemoryConnector,
    plan: Plan,
    attempt: Arc<Mutex<Attempt>>,
}

/// The connections of one attempt of the source.
#[derive(Default)]
struct Attempt {
    opened: usize,
    /// Bytes that are still taken, on all connections together.
    left: Option<usize>,
    all: Vec<Box<dyn Stopper>>,
    gone: bool,
}

impl Network {
    /// A new attempt begins, whose connections are lost after so many bytes.
    fn begin(&self, cut: Option<usize>) {
        *lock(&self.attempt) = Attempt { left: cut, ..Attempt::default() };
    }

    /// Whether nothing listens any more.
    fn is_gone(&self) -> bool {
        lock(&self.attempt).gone
    }
}

impl Connect for Network {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        let (attempt, plan) = (self.attempt.clone(), self.plan.clone());
        let gone = self.attempt.clone();
        let pending = Watched { inner: self.connector.dial()?, gone };
        Ok(wrapped(Box::new(pending), move |inner| {
            let stopper = std::sync::Arc::from(inner.stopper()?);
            let mut state = lock(&attempt);
            state.all.push(inner.stopper()?);
            state.opened += 1;
            let asks = (state.opened == 1).then(|| Asks::of(&plan.asks));
            drop(state);
            Ok(Box::new(Line { attempt, one: plan.one, stopper, asks, inner }))
        }))
    }
}

/// Notices that nothing listens any more.
struct Watched {
    inner: Box<dyn Pending>,
    gone: Arc<Mutex<Attempt>>,
}

impl Pending for Watched {
    fn establish(self: Box<Self>, limit: Option<Duration>) -> io::Result<Box<dyn Stream>> {
        let Watched { inner, gone } = *self;
        inner.establish(limit).inspect_err(|_| lock(&gone).gone = true)
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}

struct Line<S: ?Sized = dyn Stream> {
    attempt: Arc<Mutex<Attempt>>,
    one: bool,
    stopper: std::sync::Arc<dyn Stopper>,
    asks: Option<Asks>,
    inner: Box<S>,
}

impl<S: SendHalf + ?Sized> SendHalf for Line<S> {
    fn write(&mut self, header: &[u8], _: &[GuestRange<'_>]) -> io::Result<()> {
        let now = {
            let mut attempt = lock(&self.attempt);
            let now = attempt.left.map_or(header.len(), |left| left.min(header.len()));
            attempt.left = attempt.left.map(|left| left - now);
            now
        };
        // What was taken arrives.
        self.inner.write(&header[..now], &[])?;
        if now == header.len() {
            return Ok(());
        }
        match self.one {
            true => self.stopper.stop(),
            false => lock(&self.attempt).all.iter().for_each(|connection| connection.stop()),
        }
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.inner.finish()
    }
}

impl<S: RecvHalf + ?Sized> RecvHalf for Line<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &mut self.asks {
            Some(asks) => asks.read(&mut *self.inner, buf),
            None => self.inner.read(buf),
        }
    }

    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.inner.read_pages(pages)
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        self.inner.interrupter()
    }
}

impl Stream for Line {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        let Line { attempt, one, stopper, asks, inner } = *self;
        let (sends, receives) = inner.split()?;
        let sends = Line { attempt: attempt.clone(), one, stopper: stopper.clone(), asks: None, inner: sends };
        Ok((Box::new(sends), Box::new(Line { attempt, one, stopper, asks, inner: receives })))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}

/// A return path with requests between the destination's own messages.
struct Asks {
    /// Not asked for yet.
    requests: VecDeque<Message>,
    /// The destination would ask now.
    may_ask: bool,
    /// Read, and not a whole message yet.
    raw: Vec<u8>,
    /// Bytes of a bitmap, which is outside of its message.
    bitmap: usize,
    ready: VecDeque<u8>,
}

impl Asks {
    fn of(pages: &[u64]) -> Asks {
        let request = |&page: &u64| {
            let (block, offset) = (page / 64, page % 64 * PAGE as u64);
            let block = BlockName::new(BLOCKS[block as usize].0).unwrap();
            Message::ReqPagesId { start: offset, len: PAGE as u32, block }
        };
        let requests = pages.iter().map(request).collect();
        Asks { requests, may_ask: false, raw: Vec::new(), bitmap: 0, ready: VecDeque::new() }
    }

    fn read(&mut self, inner: &mut (impl RecvHalf + ?Sized), buf: &mut [u8]) -> io::Result<usize> {
        while self.ready.is_empty() {
            if self.may_ask
                && let Some(request) = self.requests.pop_front()
            {
                let mut bytes = Vec::new();
                request.encode(&mut bytes);
                self.ready.extend(bytes);
            } else if !self.forward() {
                let mut more = [0; 64];
                let n = inner.read(&mut more)?;
                if n == 0 {
                    return Ok(0);
                }
                self.raw.extend_from_slice(&more[..n]);
            }
        }
        let n = buf.len().min(self.ready.len());
        buf.iter_mut().zip(self.ready.drain(..n)).for_each(|(to, from)| *to = from);
        Ok(n)
    }

    /// Passes on the next message, or a part of a bitmap. `false`: more has to be read.
    fn forward(&mut self) -> bool {
        if self.bitmap > 0 {
            let n = self.bitmap.min(self.raw.len());
            self.bitmap -= n;
            self.ready.extend(self.raw.drain(..n));
            return n > 0;
        }
        let Ok(Step::Item { item, used }) = Message::decode(&self.raw) else { return false };
        match &item {
            Message::RecvBitmap { block } => {
                let (_, pages) = BLOCKS.into_iter().find(|(name, _)| *name == block.as_str()).unwrap();
                self.bitmap = 8 + bitmap_len(pages as u64, 1) as usize + 8;
            }
            Message::Pong(Package::PING) | Message::ResumeAck(_) => self.may_ask = true,
            _ => {}
        }
        self.ready.extend(self.raw.drain(..used));
        true
    }
}

fn write_checkpoint(dir: &TempDir) -> PathBuf {
    let mut encoder = MainEncoder::default();
    let total = BLOCKS.iter().map(|(_, pages)| (pages * PAGE) as u64).sum();
    encoder.header().configuration("pc-i440fx-10.0").config_capabilities(&[MAPPED_RAM]).ram_start(2, total);
    let mut file = encoder.bytes.clone();
    for (index, (name, pages)) in BLOCKS.into_iter().enumerate() {
        let bytes = (pages * PAGE) as u64;
        let entry = BlockEntry::new(BlockName::new(name).unwrap(), bytes);
        let head = |header| {
            let entry = BlockEntry { mapped_ram: Some(header), ..entry.clone() };
            MainEncoder::default().block(&entry).bytes.clone()
        };
        let len = head(BlockHeader::place(0, bytes, PAGE as u64)).len() as u64;
        let header = BlockHeader::place(file.len() as u64 + len, bytes, PAGE as u64);
        file.extend(head(header));
        let mut bitmap = vec![0; 8];
        let content = || CONTENT.iter().filter(|(block, ..)| *block == index);
        content().for_each(|(_, page, _)| mapped_ram::set(&mut bitmap, *page as usize));
        file.resize(header.bitmap_offset as usize, 0);
        file.extend(bitmap);
        file.resize((header.pages_offset + bytes) as usize, 0);
        for (_, page, byte) in content() {
            let at = header.pages_offset as usize + *page as usize * PAGE;
            file[at..at + PAGE].fill(*byte);
        }
    }
    let cpu = Section { kind: SectionKind::Full, id: 7, name: "cpu".to_owned(), instance: 0, version: 1 };
    let mut encoder = MainEncoder::default();
    encoder.eos().footer(2).ram_part(2, true).eos().footer(2).section(&cpu).raw(b"state of cpu 0").footer(7).eof();
    encoder.vm_description(
        br#"{"page_size":4096,"devices":[{"name":"cpu","instance_id":0,"version":1,"fields":[{"name":"data","type":"buffer","size":14}]}]}"#,
    );
    file.extend_from_slice(&encoder.bytes);
    let path = dir.join("checkpoint");
    fs::write(&path, file).unwrap();
    path
}

/// For a destination that has not noticed yet that its connections are lost.
const TRIES: usize = 10_000;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(300);

    #[test]
    fn a_vm_that_is_handed_over_without_a_fault_takes_only_steps_of_the_machine() {
        test_support::time_limit(LIMIT, || {
            let original = Original::new();
            for (preempt, prefetch) in [(false, false), (true, false), (false, true), (true, true)] {
                let plan = Plan { preempt, prefetch, asks: vec![65, 2, 2, 64, 0], ..Plan::default() };
                let machine = hand_over(&original, plan).assert_right();
                assert_eq!((machine.done, machine.recoveries), (true, 0));
                assert_eq!(machine.on_main + machine.on_preempt, if prefetch { 4 } else { 5 });
            }
        });
    }

    /// Each of the connections, and all of them together, are lost at bytes of every kind, and once more among what comes again.
    #[test]
    fn connections_that_are_lost_anywhere_leave_one_vm_and_every_page_comes_once() {
        test_support::time_limit(LIMIT, || {
            let original = Original::new();
            let (mut arrived, mut recoveries) = (0, 0);
            for (index, cut) in (0..BYTES).step_by(317).enumerate() {
                let (preempt, one, prefetch) = (index % 2 == 0, index % 3 == 0, index % 5 == 0);
                let cuts = vec![cut, cut % 5000];
                let plan = Plan { preempt, prefetch, asks: vec![64, 2], cuts, one, broken: None };
                let outcome = hand_over(&original, plan);
                recoveries += outcome.assert_right().recoveries;
                arrived += usize::from(outcome.arrived());
            }
            assert!(arrived > 20 && recoveries > 20, "{arrived} arrived, with {recoveries} recoveries");
        });
    }

    /// What the first destination had got was not sent to the second one, where it was zeros.
    #[test]
    fn a_second_destination_gets_what_a_first_one_had_that_did_not_run_the_vm() {
        test_support::time_limit(LIMIT, || {
            let original = Original::new();
            // Among the pages that come before RUN.
            for cut in [600, 2000, 4000] {
                let plan = Plan { prefetch: true, ..Plan::default() };
                let mut source = Source::new(&original.checkpoint, options(&plan, &Trace::default())).unwrap();
                let first = attempt(&mut source, Plan { cuts: vec![cut], ..plan.clone() }, Trace::default());
                assert!(first.sent.is_err() && first.received.is_err(), "{cut}");
                assert_eq!(source.vm(), Whereabouts::Here, "{cut}");
                let second = attempt(&mut source, plan, Trace::default());
                second.sent.as_ref().unwrap();
                second.assert_same();
            }
        });
    }

    /// The destination would miss a page that was lost with its connection. (It gives up by the clock, which shuttle does not have.)
    #[test]
    fn a_source_that_goes_on_with_its_own_bits_is_caught() {
        test_support::time_limit(LIMIT, || {
            let original = Original::new();
            let refused = (2000..BYTES).step_by(97).find_map(|cut| {
                let broken = Some(Broken::SourceKeepsItsBits);
                let plan = Plan { cuts: vec![cut], broken, ..Plan::default() };
                let outcome = hand_over(&original, plan);
                let pages = (0..3).chain(64..66).collect();
                hand_over::check(&outcome.trace.steps(), &pages).err()
            });
            assert!(refused.unwrap().to_string().contains("goes on with what the destination says it has"));
        });
    }
}
