//! What a postcopy source is told before it begins.

use std::{str::FromStr, time::Duration};

use multifd_proto::BlockName;

use crate::{
    layout::Layout,
    round::trace::Trace,
    sync::Arc,
    threads::{StdThreads, Threads},
};

/// How to hand a VM over.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Send pages that are asked for over a connection of their own. The destination has to have it as well (QEMU: capability
    /// `postcopy-preempt`).
    pub preempt: bool,
    /// UUID of the VM, for the destination to compare; `None` to say nothing.
    pub uuid: Option<[u8; 16]>,
    /// Bytes per second in the background; pages that are asked for do not wait. `None` for no limit, 0
    /// counts as 1. A [`Handle`](super::Handle) changes it.
    pub max_bandwidth: Option<u64>,
    /// How long the destination may take fewer than 4 KiB; `None` for no limit.
    pub stall_limit: Option<Duration>,
    /// How long RUN is held back for the sign that the destination has taken the block list; `None` for as long as it takes.
    /// What a destination refuses before is known to be refused, and one that is not there yet is not told to run the VM.
    pub set_up_limit: Option<Duration>,
    /// Pages that the guest is expected to need first, in this order.
    pub prefetch: Vec<PageAddress>,
    /// When they are sent.
    pub prefetch_when: Prefetch,
    /// Keep the order in which pages are asked for, see [`Source::faults`](super::Source::faults).
    pub record_faults: bool,
    /// How long the background is held back for the sign that the devices were loaded.
    pub(super) loading_limit: Duration,
    /// How threads are made.
    pub threads: Arc<dyn Threads>,
    /// Who is told of each step.
    pub(crate) trace: Trace,
    /// A defect to be caught.
    #[cfg(any(test, feature = "__broken-variants"))]
    pub(crate) broken: Option<crate::testing::broken::Broken>,
}

impl Default for Options {
    /// One connection, no limit on bandwidth, 2 minutes of silence, RUN after at most 100 ms.
    fn default() -> Options {
        Options {
            preempt: false,
            uuid: None,
            max_bandwidth: None,
            stall_limit: Some(Duration::from_secs(120)),
            // QEMU gives the sign in a few milliseconds.
            set_up_limit: Some(Duration::from_millis(100)),
            prefetch: Vec::new(),
            prefetch_when: Prefetch::AfterRun,
            record_faults: false,
            // QEMU gives the sign in some ten milliseconds.
            loading_limit: Duration::from_millis(500),
            threads: Arc::new(StdThreads),
            trace: Trace::default(),
            #[cfg(any(test, feature = "__broken-variants"))]
            broken: None,
        }
    }
}

/// When the pages that the guest needs first are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefetch {
    /// While the guest is paused: it resumes later, and has them then.
    BeforeRun,
    /// Right after it resumes, before all others.
    AfterRun,
}

/// A page of guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageAddress {
    /// Its RAM block.
    pub block: BlockName,
    /// The offset in bytes inside it.
    pub offset: u64,
}

impl PageAddress {
    /// Page number `page` of `layout`.
    pub(super) fn of(layout: &Layout, page: u64) -> Option<PageAddress> {
        let block = &layout.blocks()[layout.block_of(page)?];
        Some(PageAddress { block: block.name().clone(), offset: block.offset_of(page) })
    }

    /// Its number in `layout`, if it has such a page.
    pub(super) fn number(&self, layout: &Layout) -> Option<u64> {
        let block = &layout.blocks()[layout.index_of(self.block.as_str())?];
        let is_page = self.offset < block.bytes() && self.offset.is_multiple_of(layout.page_size() as u64);
        is_page.then(|| block.page_at(self.offset))
    }
}

/// `OFFSET BLOCK`, the offset in hexadecimal: a block's name may have spaces.
impl std::fmt::Display for PageAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x} {}", self.offset, self.block.as_str())
    }
}

impl FromStr for PageAddress {
    type Err = String;

    fn from_str(line: &str) -> Result<PageAddress, String> {
        let expected = || format!("{line:?} is not `0xOFFSET BLOCK`");
        let (offset, block) = line.split_once(' ').ok_or_else(expected)?;
        let digits = offset.strip_prefix("0x").ok_or_else(expected)?;
        let offset = u64::from_str_radix(digits, 16).map_err(|_| expected())?;
        let block = BlockName::new(block).map_err(|_| expected())?;
        Ok(PageAddress { block, offset })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_it_is_written() {
        let page = PageAddress { block: BlockName::new("/rom@etc/acpi tables").unwrap(), offset: 0x1000 };
        assert_eq!(page.to_string(), "0x1000 /rom@etc/acpi tables");
        assert_eq!(page.to_string().parse(), Ok(page));
        for wrong in ["", "0x1000", "4096 pc.ram", "0x1000 ", "0xg pc.ram", "0x1ffffffffffffffff pc.ram"] {
            assert!(wrong.parse::<PageAddress>().unwrap_err().contains("0xOFFSET BLOCK"), "{wrong}");
        }
    }

    #[test]
    fn an_address_of_another_vm_has_no_number() {
        let layout = Layout::new(4096, [(BlockName::new("a").unwrap(), 0x2000)]).unwrap();
        let number = |text: &str| text.parse::<PageAddress>().unwrap().number(&layout);
        assert_eq!(number("0x1000 a"), Some(1));
        assert_eq!(["0x2000 a", "0x800 a", "0x0 b"].map(number), [None, None, None]);
        assert_eq!(PageAddress::of(&layout, 1).unwrap().to_string(), "0x1000 a");
        assert_eq!(PageAddress::of(&layout, 2), None);
    }
}
