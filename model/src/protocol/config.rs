//! How large a model is, and what it leaves out.

/// How large the model is, which dialect it speaks and which of its parts are missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Channels, at most [`MAX_CHANNELS`](super::MAX_CHANNELS).
    pub channels: usize,
    /// Rounds with pages, at most 4.
    pub rounds: u8,
    /// Pages, at most [`MAX_PAGES`](super::MAX_PAGES).
    pub pages: usize,
    /// Where the source ends rounds on main.
    pub source: Dialect,
    /// Where the destination looks for the end of a round.
    pub destination: Dialect,
    /// When main writes FLUSH.
    pub flush: Flush,
    /// SYNC packets may carry a page, as those of QEMU before 9.0.
    pub sync_carries_pages: bool,
    /// Any page may be named by main as a zero page instead of being sent on a channel.
    pub zeros_on_main: bool,
    /// Packets that fit into a connection; the writer waits for room.
    pub capacity: usize,
    /// One thing goes wrong at any moment: either side fails or is cancelled, or a connection dies.
    pub faults: bool,
    /// Which interleavings are left out. Changes no verdict.
    pub order: Order,
    /// Visit only one of several states that differ in names; see [`Key`](super::Key). Changes no verdict.
    pub symmetric: bool,
    /// Main may take any page out of a round with the guest running before a channel takes it: the next round has it.
    pub postpones: bool,
    /// Main opens a round when all pages are handed out; each channel begins it after its own SYNC.
    pub rounds_overlap: bool,
    /// How the destination knows which channels there are.
    pub membership: Membership,
    /// Waits that are missing.
    pub without: Vec<Wait>,
    /// Something else that is missing.
    pub defect: Option<Defect>,
}

/// How the destination knows which channels there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    /// It has known from the beginning, and all are there.
    Known,
    /// Each says with its first SYNC how many there are. Before that SYNC is read, the channel has not come.
    Told,
    /// The numbers of SYNC packets prove it. Not where SYNC packets carry pages.
    Numbers,
}

/// Which interleavings are searched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// All.
    Any,
    /// Those in which who needs nothing but to arrive at a meeting point does it at once.
    Arrivals,
    /// Those in which the source goes first. Not with faults, nor with connections that can be full.
    SourceFirst,
}

/// Where a round ends on main.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// At FLUSH.
    PerRound,
    /// At the end of a section.
    PerSection,
}

/// When main writes FLUSH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// As soon as the round is open.
    Early,
    /// When every channel has written its SYNC.
    Late,
}

/// A wait at one of the meeting points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Source: channels, for the round to be opened.
    SourceChannelsAtOpen,
    /// Source: main, for all channels to be ready for the round.
    SourceMainAtOpen,
    /// Source: main, for every channel to have written SYNC.
    SourceMainAtClose,
    /// Destination: main, for every channel's SYNC.
    DestinationMain,
    /// The same at all sync points but the last.
    DestinationMainButLast,
    /// Destination: channels, behind SYNC, for everybody.
    DestinationChannels,
    /// Destination: channels, behind SYNC, for main; they wait for each other.
    DestinationChannelsForMain,
}

/// A part of the protocol that is left out or done wrong, other than a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// One FLUSH (or end of section) is not written, whichever.
    NoFlush,
    /// One SYNC is not written on one channel, whichever.
    NoSync,
    /// The last round has neither SYNC nor FLUSH.
    NoLastBarrier,
    /// The destination ignores the page in a SYNC packet (QEMU 9.2.0).
    SyncPagesDropped,
    /// The destination takes the page of a SYNC packet behind the barrier.
    SyncBeforeItsPages,
    /// The destination takes those channels for all that have come when main is at this sync point, and ignores the others.
    GuessedAtSyncPoint(u8),
    /// The first SYNC of a channel that comes late counts as its SYNC of the current round.
    FirstSyncCounts,
    /// A page that was taken out of a round is in the next one only if it was written again.
    PostponedIsForgotten,
    /// Pages are taken out of the last round, too.
    PostponedInTheLast,
}
