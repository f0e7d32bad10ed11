//! The log of vhost: a bitmap in shared memory, in which a back end marks what it has written.
//!
//! A back end is a part of the kernel (vhost-net), or another process that has the guest's memory mapped (vhost-user). It sets bit `n % 8`
//! of byte `n / 8` for each 4 KiB page of guest address `4096 * n`, by an atomic *or*, once it has written there and before the guest is
//! told. That is the order that [`bitmap`](crate::dirty::bitmap) shows to be sufficient. The guest's vCPUs, and devices of this
//! process, have logs of their own: [merge](crate::dirty::merged) them.

use std::{
    fmt, io,
    os::fd::BorrowedFd,
    sync::atomic::Ordering::{Acquire, Relaxed},
};

use crate::{dirty::DirtyLog, dirty_bitmap::DirtyBitmap, ram::Ram, sys::shared_words::SharedWords};

/// A log in memory that back ends share.
pub struct VhostLog {
    words: SharedWords,
    /// Has the back ends log, or not.
    switch: Switch,
    /// While tracking.
    ram: Option<Ram>,
}

/// Has the back ends begin to log, or end.
type Switch = Box<dyn FnMut(bool) -> io::Result<()> + Send>;

impl VhostLog {
    /// A log for the guest addresses below `end`.
    ///
    /// `switch` has all back ends log to it (`VHOST_F_LOG_ALL`, and the used rings), or no longer: [`start`](DirtyLog::start) calls it
    /// with `true`, [`stop`](DirtyLog::stop) with `false`. When it returns after `true`, every write of theirs that follows is marked. Where
    /// it fails, it has to leave them as they were. A log whose back ends log all the time has nothing to do there.
    ///
    /// # Errors
    /// The kernel's, when there is no memory for it.
    pub fn new(end: u64, switch: impl FnMut(bool) -> io::Result<()> + Send + 'static) -> io::Result<VhostLog> {
        let words = usize::try_from(end.div_ceil(LOG_PAGE * 64).max(1)).map_err(io::Error::other)?;
        Ok(VhostLog { words: SharedWords::new(words)?, switch: Box::new(switch), ram: None })
    }

    /// The file of the log, all of it, for `VHOST_USER_SET_LOG_BASE`. Its length is [`bytes`](Self::bytes), and cannot be changed.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.words.file()
    }

    /// How long the log is.
    pub fn bytes(&self) -> u64 {
        size_of_val(self.words.words()) as u64
    }

    /// Where it is mapped in this process, for `VHOST_SET_LOG_BASE`: as long as this lives.
    pub fn address(&self) -> u64 {
        self.words.address()
    }

    /// Calls `each` with the range of guest addresses of each run of pages that `take` finds marked in a word of the log.
    fn marked(&self, take: impl Fn(&std::sync::atomic::AtomicU64) -> u64, mut each: impl FnMut(std::ops::Range<u64>)) {
        for (index, word) in self.words.words().iter().enumerate() {
            // The bits are in bytes, the first in the lowest.
            let mut bits = u64::from_le(take(word));
            while bits != 0 {
                let first = bits.trailing_zeros();
                let run = (bits >> first).trailing_ones();
                let page = index as u64 * 64 + u64::from(first);
                each(page * LOG_PAGE..(page + u64::from(run)) * LOG_PAGE);
                bits &= u64::MAX.checked_shl(first + run).unwrap_or(0);
            }
        }
    }

    fn add(&self, take: impl Fn(&std::sync::atomic::AtomicU64) -> u64, into: &mut DirtyBitmap) {
        let Some(ram) = &self.ram else { return };
        // A mark of no page is of no account: only the guest's memory moves.
        self.marked(take, |guest| ram.pages_at(guest).for_each(|pages| into.set_range(pages)));
    }
}

impl fmt::Debug for VhostLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostLog").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

impl DirtyLog for VhostLog {
    fn name(&self) -> &'static str {
        "vhost"
    }

    /// Forgets the marks of earlier writes, then has the back ends log.
    ///
    /// # Errors
    /// A block whose guest address is not known ([`RamBlock::at`](crate::ram::RamBlock::at)) or which ends beyond the log; what `switch` says.
    fn start(&mut self, ram: &Ram) -> io::Result<()> {
        let end = self.bytes() * 8 * LOG_PAGE;
        for block in ram.blocks() {
            let why = match block.guest_address() {
                None => "has no guest address, by which vhost marks it (RamBlock::at)".to_owned(),
                Some(address) if address.checked_add(block.bytes() as u64).is_none_or(|at| at > end) => {
                    format!(
                        "ends beyond {end:#x}, the end that vhost's log was made for: VhostLog::new takes the highest one"
                    )
                }
                Some(_) => continue,
            };
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("RAM block {:?} {why}", block.name())));
        }
        for word in self.words.words() {
            word.store(0, Relaxed);
        }
        (self.switch)(true)?;
        self.ram = Some(ram.clone());
        Ok(())
    }

    fn drain(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        // Relaxed: a mark that this load misses is one that this drain does not take; a later one does. Acquire pairs with the back end's
        // atomic *or*: a thread that sees the mark sees what was written before it.
        self.add(|word| if word.load(Relaxed) == 0 { 0 } else { word.swap(0, Acquire) }, into);
        Ok(())
    }

    fn peek(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        self.add(|word| word.load(Relaxed), into);
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        match self.ram.take() {
            Some(_) => (self.switch)(false),
            None => Ok(()),
        }
    }
}

/// Guest memory that a bit stands for.
const LOG_PAGE: u64 = 4096;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use multifd_proto::BlockName;

    use super::*;
    use crate::sys::heap;

    fn log(end: u64) -> VhostLog {
        VhostLog::new(end, |_| Ok(())).unwrap()
    }

    /// Sets bits as a back end does: by bytes.
    fn mark(log: &VhostLog, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            let bit = 1u64 << (page % 64);
            log.words.words()[(page / 64) as usize].fetch_or(bit.to_le(), std::sync::atomic::Ordering::Release);
        }
    }

    /// Blocks of 10 pages at page 3, and of 70 pages at page 64 of guest addresses.
    fn ram(page_size: usize) -> Ram {
        let block =
            |name, pages: usize, at: u64| heap::zeroed_block(BlockName::new(name).unwrap(), pages * 4096).at(at * 4096);
        Ram::new(page_size, vec![block("low", 10, 3), block("high", 70, 64)]).unwrap()
    }

    fn drained(log: &mut VhostLog, ram: &Ram) -> Vec<u64> {
        let mut dirty = DirtyBitmap::new(ram.layout());
        log.drain(&mut dirty).unwrap();
        dirty.iter().collect()
    }

    #[test]
    fn a_bit_is_a_page_of_guest_address_and_marks_of_no_page_are_of_no_account() {
        let ram = ram(4096);
        let mut log = log(134 * 4096);
        assert_eq!(log.bytes(), 3 * 8);
        mark(&log, [3]);
        log.start(&ram).unwrap();
        assert_eq!(drained(&mut log, &ram), [0u64; 0], "earlier marks are forgotten");
        let (low, high) = (ram.layout().blocks()[0].first_page(), ram.layout().blocks()[1].first_page());
        mark(&log, [0, 2, 3, 4, 12, 13, 63, 64, 127, 128, 133, 134, 191]);
        let expected = [low, low + 1, low + 9, high, high + 63, high + 64, high + 69];
        let mut peeked = DirtyBitmap::new(ram.layout());
        log.peek(&mut peeked).unwrap();
        assert!(peeked.iter().eq(expected));
        assert_eq!(drained(&mut log, &ram), expected);
        assert_eq!(drained(&mut log, &ram), [0u64; 0]);
        log.stop().unwrap();
        mark(&log, [3]);
        assert_eq!(drained(&mut log, &ram), [0u64; 0], "it was stopped");
    }

    #[test]
    fn pages_of_other_sizes_are_dirty_where_any_part_is() {
        for (page_size, marked, expected) in [
            (1024, 4, 4..8), // Of four pages of 1 KiB each.
            (1024, 3, 0..4),
        ] {
            let ram = ram(page_size);
            let mut log = log(134 * 4096);
            log.start(&ram).unwrap();
            mark(&log, [marked]);
            assert!(drained(&mut log, &ram).into_iter().eq(expected), "{page_size} {marked}");
        }
    }

    #[test]
    fn memory_that_the_log_does_not_cover_is_refused_and_nothing_is_switched() {
        let refusal = |end: u64, ram: &Ram| {
            let mut log = VhostLog::new(end, |_| panic!("switched")).unwrap();
            let error = log.start(ram).unwrap_err().to_string();
            log.stop().unwrap();
            error
        };
        assert_eq!(
            refusal(128 * 4096, &ram(4096)),
            "RAM block \"high\" ends beyond 0x80000, the end that vhost's log was made for: VhostLog::new takes the highest one"
        );
        let lost = Ram::for_test(&[("lost", 1)]);
        assert_eq!(
            refusal(1 << 40, &lost),
            "RAM block \"lost\" has no guest address, by which vhost marks it (RamBlock::at)"
        );
    }

    #[test]
    fn the_back_ends_log_from_start_to_stop() {
        let (sends, calls) = std::sync::mpsc::channel();
        let mut log = VhostLog::new(134 * 4096, move |on| {
            sends.send(on).unwrap();
            if on { Ok(()) } else { Err(io::Error::other("gone")) }
        })
        .unwrap();
        log.stop().unwrap();
        log.start(&ram(4096)).unwrap();
        assert_eq!(log.stop().unwrap_err().to_string(), "gone");
        log.stop().unwrap();
        assert_eq!(calls.try_iter().collect::<Vec<_>>(), [true, false]);
        let mut log = VhostLog::new(134 * 4096, |_| Err(io::Error::other("busy"))).unwrap();
        assert_eq!(log.start(&ram(4096)).unwrap_err().to_string(), "busy");
        log.stop().unwrap();
    }

    #[test]
    fn a_back_end_cannot_make_the_log_shorter() {
        let log = log(1 << 30);
        assert!(rustix::fs::ftruncate(log.file(), 0).is_err());
        assert_eq!(rustix::fs::fstat(log.file()).unwrap().st_size as u64, log.bytes());
        assert_eq!(log.bytes(), (1 << 30) / 4096 / 8);
    }
}
