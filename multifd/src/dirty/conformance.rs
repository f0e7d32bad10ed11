//! The suite that every [`DirtyLog`] passes: no write is missed, whatever the order of writes, drains and reads.
//!
//! A reader keeps a copy of the first word of every page, as a migration's destination does: it copies all pages once,
//! later only those that a drain reported, and only after that drain returned. When the writers are done and one more
//! drain was read, the copies must equal memory. Pages that were not written may be reported; how many is measured.
//!
//! VMM authors run it against their own logs: implement [`Subject`], call [`conformance`] (feature `conformance`).

use std::{
    collections::BTreeSet,
    fmt, io,
    sync::atomic::{AtomicUsize, Ordering::Acquire, Ordering::Release},
    thread,
};

use crate::{dirty::DirtyLog, dirty_bitmap::DirtyBitmap, ram::Ram};

/// A dirty log, the memory that it watches, and who writes there.
pub trait Subject {
    /// The memory. Several blocks, and some whose number of pages is not a multiple of 64, make the suite sharper.
    fn ram(&self) -> &Ram;

    /// The log, not started.
    fn log(&mut self) -> &mut dyn DirtyLog;

    /// Somebody who writes in the way that the log watches: a vCPU, a device that marks, any thread. Called
    /// [`Effort::writers`] times; each writer then works in a thread of its own, while the log is drained.
    fn writer(&mut self) -> Box<dyn Writer>;
}

/// Somebody who writes guest memory.
pub trait Writer: Send {
    /// Stores `value` to the first 8 bytes of page number `page`, in native byte order. Done, marks included, when this
    /// returns.
    fn write(&mut self, page: u64, value: u64);
}

/// How long the suite tries.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Writers at a time.
    pub writers: usize,
    /// How often the writers start and end. The end is where most trackers lose a write.
    pub bursts: usize,
    /// Writes of each writer in the longest bursts.
    pub writes: usize,
}

impl Effort {
    /// For writers that cost less than a microsecond a write: about a second.
    pub const FULL: Effort = Effort { writers: 2, bursts: 200, writes: 2000 };
    /// For writers that cost 100 µs a write, such as a vCPU that exits after each.
    pub const SLOW_WRITER: Effort = Effort { writers: 2, bursts: 20, writes: 300 };
}

/// What a log that passed reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Different pages written while nobody drained, each followed by one drain.
    pub quiet_written: u64,
    /// Pages reported by these drains; never fewer than written.
    pub quiet_reported: u64,
    /// Pages reported by drains before which nobody wrote.
    pub clean_reported: u64,
    /// Writes that ran concurrently with drains.
    pub concurrent_writes: u64,
    /// Drains that ran concurrently with writes.
    pub concurrent_drains: u64,
    /// Pages that these drains reported.
    pub concurrent_reported: u64,
    /// Pages written while nobody drained, each followed by two peeks and a drain.
    pub peeked_written: u64,
    /// Those of them that both peeks reported; 0 for a log that does not look.
    pub peeked_reported: u64,
}

impl Report {
    /// Pages reported for each page written, 1.0 if exact; measured while nobody wrote during a drain.
    pub fn reported_per_written(&self) -> f64 {
        self.quiet_reported as f64 / self.quiet_written as f64
    }
}

/// Why a log does not pass.
#[derive(Debug)]
#[non_exhaustive]
pub enum Failure {
    /// A write was not reported: the reader's copy of a page is not what the page holds.
    Missed {
        /// What the suite was doing.
        phase: &'static str,
        /// The page number.
        page: u64,
        /// The value in memory.
        written: u64,
        /// The value in the reader's copy.
        read: u64,
    },
    /// A number was reported that belongs to no page.
    NoSuchPage {
        /// What the suite was doing.
        phase: &'static str,
        /// The number.
        page: u64,
    },
    /// A drain removed a page from the set that it was to add to.
    Removed {
        /// The page number.
        page: u64,
    },
    /// The log returned an error.
    Log {
        /// What the suite was doing.
        phase: &'static str,
        /// The log's error.
        source: io::Error,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Missed { phase, page, written, read } => {
                write!(f, "{phase}: page {page} holds {written:#x}, the reader has {read:#x} and was not told")
            }
            Failure::NoSuchPage { phase, page } => write!(f, "{phase}: {page} was reported and is no page"),
            Failure::Removed { page } => write!(f, "a drain removed page {page} from the set it adds to"),
            Failure::Log { phase, source } => write!(f, "{phase}: {source}"),
        }
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Failure::Log { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// Runs the whole suite.
///
/// # Errors
/// The first rule that the log broke.
pub fn conformance(subject: &mut dyn Subject, effort: Effort) -> Result<Report, Failure> {
    let writers = (0..effort.writers.max(1)).map(|_| subject.writer()).collect();
    let ram = subject.ram().clone();
    let pages: Vec<u64> = ram.layout().blocks().iter().flat_map(|block| block.page_range()).collect();
    let reader = Reader { copies: vec![0; pages.len()], pages, dirty: DirtyBitmap::new(ram.layout()), ram };
    let mut suite = Suite { log: subject.log(), writers, reader, value: 0, random: 1, report: Report::default() };

    suite.call("stop without start", |log| log.stop())?;
    suite.start("first start")?;
    suite.drains_without_writes()?;
    suite.every_page_alone()?;
    suite.one_page_again_and_again()?;
    suite.write_between_drain_and_read()?;
    suite.all_pages()?;
    suite.bursts("several writers during drains", effort, false)?;
    suite.bursts("several writers of few pages during drains", effort, true)?;
    suite.drain_only_adds()?;
    suite.stop_and_start_again()?;
    suite.peeks_take_nothing_out()?;
    suite.call("last stop", |log| log.stop())?;
    suite.call("second stop", |log| log.stop())?;
    Ok(suite.report)
}

struct Suite<'a> {
    log: &'a mut dyn DirtyLog,
    writers: Vec<Box<dyn Writer>>,
    reader: Reader,
    /// The latest value written; each write has its own.
    value: u64,
    random: u64,
    report: Report,
}

/// What a migration's destination knows.
struct Reader {
    ram: Ram,
    /// The numbers of all pages, ascending.
    pages: Vec<u64>,
    /// One for each of `pages`.
    copies: Vec<u64>,
    dirty: DirtyBitmap,
}

impl Suite<'_> {
    fn drains_without_writes(&mut self) -> Result<(), Failure> {
        for _ in 0..3 {
            self.report.clean_reported += self.round("drain without writes")?;
        }
        self.check("drain without writes")
    }

    fn every_page_alone(&mut self) -> Result<(), Failure> {
        let phase = "one page, one drain";
        // All pages of small memory; of large memory the ends of the blocks and of the bitmap's words, which is where
        // an index is off by one.
        let step = self.reader.pages.len() / 1024 + 1;
        let mut chosen: BTreeSet<u64> = self.reader.pages.iter().copied().step_by(step).collect();
        for block in self.reader.ram.layout().blocks() {
            let range = block.page_range();
            let ends = [range.start, range.start + 63, range.start + 64, range.end - 1];
            chosen.extend(ends.into_iter().filter(|page| range.contains(page)));
        }
        for page in chosen {
            self.write(page);
            self.report.quiet_written += 1;
            self.report.quiet_reported += self.round(phase)?;
            self.check(phase)?;
        }
        Ok(())
    }

    fn one_page_again_and_again(&mut self) -> Result<(), Failure> {
        let phase = "the same page before every drain";
        let page = self.reader.pages[self.reader.pages.len() / 2];
        for _ in 0..10 {
            self.write(page);
            self.write(page);
            self.report.quiet_written += 1;
            self.report.quiet_reported += self.round(phase)?;
            self.check(phase)?;
        }
        Ok(())
    }

    /// Finds a log that re-arms a page when it is read, or even later, instead of before `drain` returns.
    fn write_between_drain_and_read(&mut self) -> Result<(), Failure> {
        let phase = "writes between a drain, the reading and the next drain";
        let page = self.reader.pages[0];
        for _ in 0..5 {
            self.write(page);
            self.drain(phase)?;
            self.write(page);
            self.reader.read_dirty(phase)?;
            self.write(page);
            self.round(phase)?;
            self.check(phase)?;
        }
        Ok(())
    }

    fn all_pages(&mut self) -> Result<(), Failure> {
        let phase = "all pages";
        for _ in 0..2 {
            for index in 0..self.reader.pages.len() {
                self.write(self.reader.pages[index]);
            }
            self.report.quiet_written += self.reader.pages.len() as u64;
            self.report.quiet_reported += self.round(phase)?;
            self.check(phase)?;
        }
        Ok(())
    }

    fn bursts(&mut self, phase: &'static str, effort: Effort, hot: bool) -> Result<(), Failure> {
        for _ in 0..effort.bursts {
            let targets = if hot { 1 + self.below(8) } else { self.reader.pages.len() };
            let first = self.below(self.reader.pages.len() + 1 - targets.min(self.reader.pages.len()));
            let targets = &self.reader.pages[first..][..targets.min(self.reader.pages.len())].to_vec();
            // Long bursts overlap with many drains; in short ones most pages are written once, so that a lost write is
            // not covered up by the next write to its page.
            let writes = (effort.writes >> self.below(10)).max(1);
            let mut writers = std::mem::take(&mut self.writers);
            let running = AtomicUsize::new(writers.len());
            let drained = thread::scope(|scope| {
                for writer in &mut writers {
                    let (mut value, mut random) = (self.value, self.random);
                    self.value += writes as u64;
                    self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    let running = &running;
                    scope.spawn(move || {
                        // Also on a panic, or the drains below would wait forever.
                        let _done = Done(running);
                        for _ in 0..writes {
                            value += 1;
                            writer.write(targets[below(&mut random, targets.len())], value);
                        }
                    });
                }
                // Acquire: pairs with `Done`, so the check below sees what the writers wrote.
                while running.load(Acquire) > 0 {
                    if self.report.concurrent_drains.is_multiple_of(3) {
                        self.peek(phase)?;
                    }
                    self.report.concurrent_reported += self.round(phase)?;
                    self.report.concurrent_drains += 1;
                }
                Ok(())
            });
            self.report.concurrent_writes += (writers.len() * writes) as u64;
            self.writers = writers;
            drained?;
            self.round(phase)?;
            self.check(phase)?;
        }
        Ok(())
    }

    fn drain_only_adds(&mut self) -> Result<(), Failure> {
        let phase = "a drain into a set that is not empty";
        self.reader.dirty = DirtyBitmap::full(self.reader.ram.layout());
        self.write(self.reader.pages[0]);
        self.call(phase, |_| Ok(()))?;
        self.log.drain(&mut self.reader.dirty).map_err(|source| Failure::Log { phase, source })?;
        let gone = self.reader.pages.iter().find(|&&page| !self.reader.dirty.contains(page));
        if let Some(&page) = gone {
            return Err(Failure::Removed { page });
        }
        self.reader.read_dirty(phase)?;
        self.check(phase)
    }

    fn stop_and_start_again(&mut self) -> Result<(), Failure> {
        let phase = "after stop and start";
        for _ in 0..3 {
            // Marks from before the stop, and of writes that nobody tracks, do no harm to what comes after.
            self.write(self.reader.pages[0]);
            self.call(phase, |log| log.stop())?;
            self.write(*self.reader.pages.last().expect("a RAM block has pages"));
            self.start(phase)?;
            self.report.clean_reported += self.round(phase)?;
            for index in (0..self.reader.pages.len()).step_by(3) {
                self.write(self.reader.pages[index]);
                self.report.quiet_written += 1;
            }
            self.report.quiet_reported += self.round(phase)?;
            self.check(phase)?;
        }
        Ok(())
    }

    /// Finds a log whose peeks do what only a drain may do.
    fn peeks_take_nothing_out(&mut self) -> Result<(), Failure> {
        let phase = "peeks between a write and the next drain";
        let pages = self.reader.pages.len();
        for index in (0..10).map(|tenth| tenth * (pages - 1) / 9) {
            let page = self.reader.pages[index];
            self.write(page);
            let seen = self.peek(phase)?.contains(page);
            let seen_again = self.peek(phase)?.contains(page);
            self.report.peeked_written += 1;
            self.report.peeked_reported += u64::from(seen && seen_again);
            self.round(phase)?;
            self.check(phase)?;
            // A second write after a peek, and one of another page.
            self.write(page);
            self.peek(phase)?;
            self.write(page);
            self.write(self.reader.pages[pages - 1 - index]);
            self.round(phase)?;
            self.check(phase)?;
        }
        Ok(())
    }

    /// What the log shows, of which each number has to belong to a page.
    fn peek(&mut self, phase: &'static str) -> Result<DirtyBitmap, Failure> {
        let mut shown = DirtyBitmap::new(self.reader.ram.layout());
        self.call(phase, |log| log.peek(&mut shown))?;
        let stray = shown.iter().find(|page| self.reader.pages.binary_search(page).is_err());
        stray.map_or(Ok(shown), |page| Err(Failure::NoSuchPage { phase, page }))
    }

    /// Starts the log and copies all pages, as round 0 does.
    fn start(&mut self, phase: &'static str) -> Result<(), Failure> {
        let ram = self.reader.ram.clone();
        self.call(phase, |log| log.start(&ram))?;
        for (copy, &page) in self.reader.copies.iter_mut().zip(&self.reader.pages) {
            *copy = first_word(&self.reader.ram, page);
        }
        Ok(())
    }

    /// Drains, and copies the pages reported. Returns how many.
    fn round(&mut self, phase: &'static str) -> Result<u64, Failure> {
        self.drain(phase)?;
        self.reader.read_dirty(phase)
    }

    fn drain(&mut self, phase: &'static str) -> Result<(), Failure> {
        self.reader.dirty.clear();
        self.log.drain(&mut self.reader.dirty).map_err(|source| Failure::Log { phase, source })
    }

    fn call(
        &mut self,
        phase: &'static str,
        call: impl FnOnce(&mut dyn DirtyLog) -> io::Result<()>,
    ) -> Result<(), Failure> {
        call(self.log).map_err(|source| Failure::Log { phase, source })
    }

    fn write(&mut self, page: u64) {
        self.value += 1;
        let writer = self.value as usize % self.writers.len();
        self.writers[writer].write(page, self.value);
    }

    fn below(&mut self, bound: usize) -> usize {
        below(&mut self.random, bound)
    }

    /// Nobody writes now and all that was reported was read: the copies must equal memory.
    fn check(&self, phase: &'static str) -> Result<(), Failure> {
        for (&read, &page) in self.reader.copies.iter().zip(&self.reader.pages) {
            let written = first_word(&self.reader.ram, page);
            if written != read {
                return Err(Failure::Missed { phase, page, written, read });
            }
        }
        Ok(())
    }
}

impl Reader {
    fn read_dirty(&mut self, phase: &'static str) -> Result<u64, Failure> {
        let mut count = 0;
        for page in self.dirty.iter() {
            let index = self.pages.binary_search(&page).map_err(|_| Failure::NoSuchPage { phase, page })?;
            self.copies[index] = first_word(&self.ram, page);
            count += 1;
        }
        Ok(count)
    }
}

/// One writer fewer, also when it panics.
struct Done<'a>(&'a AtomicUsize);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Release);
    }
}

fn first_word(ram: &Ram, page: u64) -> u64 {
    let mut word = [0; 8];
    let range = ram.page(page).and_then(|page| page.slice(0, 8)).expect("a page of the layout has 8 bytes");
    range.read(&mut word);
    u64::from_ne_bytes(word)
}

/// A small generator: the same writes in every run, in an order that the scheduler varies.
fn below(random: &mut u64, bound: usize) -> usize {
    *random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*random >> 33) as usize % bound
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::dirty::bitmap::AtomicDirtyBitmap;

    /// A log with a fault, over a bitmap without one.
    struct Faulty {
        ram: Ram,
        bitmap: AtomicDirtyBitmap,
        fault: Fault,
        drains: u64,
        reported: DirtyBitmap,
    }

    #[derive(Clone, Copy, PartialEq)]
    enum Fault {
        None,
        /// One page of the drain with this number is left out.
        LosesOneWrite(u64),
        /// One page of each hundredth drain is left out, from the bursts on.
        LosesOneInAHundred,
        /// Pages are re-armed by the drain after the one that reported them.
        RearmsAfterReading,
        /// Writes by the second writer are not seen at the end of a burst.
        LosesTheLastBit,
        ReportsNoPage,
        ReplacesTheSet,
        /// Tracking is not switched on again.
        StartsOnce,
        /// A peek re-arms what it shows, as a drain does.
        PeekTakesOut,
    }

    impl DirtyLog for Faulty {
        fn name(&self) -> &'static str {
            "faulty"
        }

        fn start(&mut self, ram: &Ram) -> io::Result<()> {
            if self.fault == Fault::StartsOnce && self.drains > 0 {
                self.bitmap = AtomicDirtyBitmap::new(ram.layout());
            }
            self.bitmap.start(ram)
        }

        fn drain(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
            self.drains += 1;
            let mut fresh = DirtyBitmap::new(self.ram.layout());
            self.bitmap.drain(&mut fresh)?;
            match self.fault {
                Fault::None | Fault::StartsOnce | Fault::PeekTakesOut => {}
                Fault::LosesOneWrite(_) | Fault::LosesOneInAHundred => {
                    let loses = match self.fault {
                        Fault::LosesOneWrite(drain) => self.drains == drain,
                        _ => self.drains > QUIET_DRAINS && self.drains.is_multiple_of(100),
                    };
                    if let Some(page) = fresh.next(0).filter(|_| loses) {
                        fresh.clear_range(page..page + 1);
                    }
                }
                Fault::RearmsAfterReading => {
                    // A page that was reported by the previous drain is armed only now, so writes to it since then
                    // left no trace.
                    let armed_late = std::mem::replace(&mut self.reported, fresh.clone());
                    fresh.subtract(&armed_late);
                }
                Fault::LosesTheLastBit => {
                    let last = self.ram.layout().blocks().last().unwrap().page_range().end - 1;
                    fresh.clear_range(last..last + 1);
                }
                Fault::ReportsNoPage => fresh.set(self.ram.layout().blocks()[0].page_range().end),
                Fault::ReplacesTheSet => into.clear(),
            }
            into.merge(&fresh);
            Ok(())
        }

        fn peek(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
            match self.fault {
                Fault::PeekTakesOut => self.bitmap.drain(into),
                _ => self.bitmap.peek(into),
            }
        }

        fn stop(&mut self) -> io::Result<()> {
            self.bitmap.stop()
        }
    }

    struct FaultySubject(Faulty);

    impl Subject for FaultySubject {
        fn ram(&self) -> &Ram {
            &self.0.ram
        }

        fn log(&mut self) -> &mut dyn DirtyLog {
            &mut self.0
        }

        fn writer(&mut self) -> Box<dyn Writer> {
            struct W(Ram, AtomicDirtyBitmap);
            impl Writer for W {
                fn write(&mut self, page: u64, value: u64) {
                    self.0.page(page).unwrap().slice(0, 8).unwrap().write(&value.to_ne_bytes());
                    self.1.mark_page(page);
                }
            }
            Box::new(W(self.0.ram.clone(), self.0.bitmap.clone()))
        }
    }

    /// Drains before the bursts, for the blocks below: clean, one for each page, one page again, between, all.
    const QUIET_DRAINS: u64 = 3 + 231 + 10 + 10 + 2;

    fn outcome(fault: Fault) -> Result<Report, Failure> {
        let ram = Ram::for_test(&[("a", 100), ("b", 1), ("c", 130)]);
        let bitmap = AtomicDirtyBitmap::new(ram.layout());
        let reported = DirtyBitmap::new(ram.layout());
        let mut subject = FaultySubject(Faulty { ram, bitmap, fault, drains: 0, reported });
        conformance(&mut subject, Effort { writers: 2, bursts: 300, writes: 500 })
    }

    #[test]
    fn the_same_log_without_a_fault_passes() {
        let report = outcome(Fault::None).unwrap();
        assert!(report.concurrent_drains > 0);
        assert_eq!(report.reported_per_written(), 1.0);
        assert_eq!((report.peeked_written, report.peeked_reported), (10, 10));
    }

    #[test]
    fn a_log_that_loses_one_write_fails() {
        // While nobody else writes, each single loss is found, whichever it is.
        for drain in [4, 100, 234, 240, QUIET_DRAINS] {
            assert!(matches!(outcome(Fault::LosesOneWrite(drain)), Err(Failure::Missed { .. })), "drain {drain}");
        }
    }

    #[test]
    fn a_log_that_loses_writes_during_bursts_fails() {
        let failure = outcome(Fault::LosesOneInAHundred).unwrap_err();
        let Failure::Missed { phase, .. } = failure else { panic!("{failure}") };
        assert!(phase.starts_with("several writers"), "{phase}");
    }

    #[test]
    fn a_log_that_rearms_after_reading_fails() {
        assert!(matches!(outcome(Fault::RearmsAfterReading), Err(Failure::Missed { .. })));
    }

    #[test]
    fn a_log_that_forgets_the_last_page_fails() {
        assert!(matches!(outcome(Fault::LosesTheLastBit), Err(Failure::Missed { page: 321, .. })));
    }

    #[test]
    fn a_log_that_tracks_only_the_first_time_fails() {
        let failure = outcome(Fault::StartsOnce).unwrap_err();
        assert!(matches!(failure, Failure::Missed { phase: "after stop and start", .. }), "{failure}");
    }

    /// The destination would have an old copy of each page that was written between a drain and a look.
    #[test]
    fn a_log_whose_peeks_take_writes_out_fails() {
        assert!(matches!(outcome(Fault::PeekTakesOut), Err(Failure::Missed { .. })));
    }

    #[test]
    fn a_log_that_reports_numbers_between_blocks_fails() {
        assert!(matches!(outcome(Fault::ReportsNoPage), Err(Failure::NoSuchPage { page: 100, .. })));
    }

    #[test]
    fn a_log_that_replaces_the_set_fails() {
        assert!(matches!(outcome(Fault::ReplacesTheSet), Err(Failure::Removed { .. })));
    }

    #[test]
    fn a_writer_that_panics_ends_the_suite() {
        struct Panics(Arc<AtomicUsize>);
        impl Writer for Panics {
            fn write(&mut self, _: u64, _: u64) {
                assert!(self.0.fetch_add(1, Release) < 2000, "the writer is broken");
            }
        }
        struct Broken(FaultySubject, Arc<AtomicUsize>);
        impl Subject for Broken {
            fn ram(&self) -> &Ram {
                self.0.ram()
            }
            fn log(&mut self) -> &mut dyn DirtyLog {
                self.0.log()
            }
            fn writer(&mut self) -> Box<dyn Writer> {
                Box::new(Panics(Arc::clone(&self.1)))
            }
        }
        let ram = Ram::for_test(&[("a", 10)]);
        let bitmap = AtomicDirtyBitmap::new(ram.layout());
        let reported = DirtyBitmap::new(ram.layout());
        let inner = FaultySubject(Faulty { ram, bitmap, fault: Fault::None, drains: 0, reported });
        let mut subject = Broken(inner, Arc::default());
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| conformance(&mut subject, Effort::FULL)));
        assert!(caught.is_err());
    }
}
