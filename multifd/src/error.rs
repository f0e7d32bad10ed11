//! What can end a migration: whose fault it was, and where in which connection.

use std::{fmt, io, time::Duration};

use multifd_proto::{BlockName, ChannelId};
pub use multifd_proto::{DecodeError, ProtocolError, Violation};

use crate::{
    checkpoint::CheckpointError,
    threads::ThreadRole,
    vm::{SectionId, VmError},
};

/// The reason why a migration ended. One variant for each party that can be at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The peer sent bytes that do not parse, broke a rule of the protocol, or is configured differently.
    #[error("{at}: {source}")]
    Protocol {
        /// Where the offending bytes begin.
        at: Place,
        /// The rule.
        source: ProtocolError,
    },
    /// A connection or file did not take or give bytes.
    #[error("{at}: {}", io_message(source))]
    Io {
        /// The first byte that was not moved.
        at: Place,
        /// The kernel's error.
        source: io::Error,
    },
    /// Both sides are fine and do not fit together.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// The VMM could not do what it was asked.
    #[error("the VM could not {call}: {source}")]
    Vm {
        /// What it was asked: `pause`, `save`, ….
        call: &'static str,
        /// Its answer.
        source: VmError,
    },
    /// The VMM could not take the state of a device.
    #[error("the VM could not load section {:?} instance {}: {source}", section.name, section.instance)]
    Load {
        /// The device.
        section: SectionId,
        /// Its answer.
        source: VmError,
    },
    /// Dirty tracking failed, so it is not known which pages were written.
    #[error("dirty log: {source}")]
    DirtyLog {
        /// The kernel's error.
        source: io::Error,
    },
    /// The guest writes faster than pages can be sent.
    #[error(
        "does not converge: after {rounds} rounds and {seconds:.1} s, {remaining} bytes remain dirty at {bytes_per_second} B/s, \
         which is {expected_downtime_ms:.0} ms of downtime; {downtime_limit_ms:.0} ms are allowed"
    )]
    DoesNotConverge {
        /// Rounds sent.
        rounds: u64,
        /// Time since the first round began.
        seconds: f64,
        /// Bytes of pages that were dirty after the last round.
        remaining: u64,
        /// The speed that the pause would have, in bytes of pages.
        bytes_per_second: u64,
        /// What the last round would take.
        expected_downtime_ms: f64,
        /// What the caller allows.
        downtime_limit_ms: f64,
    },
    /// The destination said that it could not take the VM over.
    #[error("the destination ended the migration with status {status}{}", because(reason))]
    Refused {
        /// The status in its SHUT message.
        status: u32,
        /// Why, in its own words; a QEMU says nothing.
        reason: Option<String>,
    },
    /// The destination closed main before it confirmed that it has the VM.
    #[error("the destination closed the connection before it confirmed")]
    Unconfirmed,
    /// The other side may run the VM, and the VM is paused here.
    ///
    /// On the source: the destination was told that it may start, and its answer did not arrive. On a destination whose source
    /// knows no GO: everything is here, and the source could not be told. An operator who knows that the VM does not run there
    /// can resume it here.
    #[error("it is not known whether the other side runs the VM, so it stays paused here: {reason}")]
    InDoubt {
        /// What came in place of the answer.
        reason: Box<Error>,
    },
    /// The VM runs at the destination, which lacks a part of its memory: the guest waits at the next page it does not have.
    ///
    /// Nothing is lost as long as the file and the destination are there:
    /// [`postcopy::Source::recover`](crate::postcopy::Source::recover) goes on.
    #[error("the VM is at the destination, which lacks {}: {reason}", lacking(left))]
    Incomplete {
        /// Pages with content that were not sent, as far as it is known.
        left: Option<u64>,
        /// What ended the connections.
        reason: Box<Error>,
    },
    /// The VM runs at the destination, which was sent all of its memory and has not said that it has it: the last word of one side was
    /// lost with the connections.
    ///
    /// The destination knows: one that has everything says so to those who ask it (QEMU: `completed`) and takes no other connection.
    /// Of one that does not, nothing is lost: [`postcopy::Source::recover`](crate::postcopy::Source::recover) goes on.
    #[error(
        "the VM is at the destination and was sent all of its memory, and it is not known whether the destination has it: {reason}"
    )]
    Unacknowledged {
        /// What came in place of the confirmation.
        reason: Box<Error>,
    },
    /// A channel broke that may have had more device state, or was not closed, after the source was told that its VM is safe. The source still has
    /// the VM, paused; what was kept of it may not be all.
    #[error(
        "{reason}: a part of the device state on channels may be missing, and the source was told before that all is here; its VM is still there, paused"
    )]
    StateOnChannels {
        /// How it broke.
        reason: Box<Error>,
    },
    /// It failed after the source had begun to switch to postcopy, where it gives its VM away before all memory has moved.
    ///
    /// The VM does not run here. The source still has all of it. Some sources let it run again by themselves: a QEMU from 10.0 on that has
    /// sent everything, 11.1 also one that has not heard of its package. Others keep it paused:
    /// [`give_back`](crate::destination::give_back).
    #[error("{reason}; {AFTER_RUN}")]
    AfterRun {
        /// Why it ended.
        reason: Box<Error>,
        /// The source's RAM blocks with their lengths in bytes: what it takes to
        /// [give the VM back](crate::destination::give_back).
        blocks: Vec<(BlockName, u64)>,
    },
    /// A source that has switched to postcopy lost its connections and did not go on over new ones in time.
    #[error("{reason}; the source did not go on over new connections within {} s", limit.as_secs_f64())]
    NotContinued {
        /// What ended the connections.
        reason: Box<Error>,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The guest was paused for longer than the options allow, and the destination had not been told to start it.
    #[error("the guest was paused for {:.1} s, which is the limit of the pause", limit.as_secs_f64())]
    PauseLimit {
        /// The limit.
        limit: Duration,
    },
    /// The peer did not send or take enough bytes.
    #[error("the peer moved fewer than 4096 bytes within {:.1} s", limit.as_secs_f64())]
    Stalled {
        /// How long it was waited for.
        limit: Duration,
    },
    /// A connection or a channel did not come, or said nothing, within the limit of the set-up.
    #[error("{what} within {seconds} s")]
    SetupTimeout {
        /// What did not happen.
        what: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// Main ended while channels were still to come: the source has died or given up.
    #[error("{at}: {} before all channels were here: {channels}", io_message(source))]
    SourceGone {
        /// The first byte that did not come.
        at: Place,
        /// Which channels had come.
        channels: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// A checkpoint cannot be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An operator had this side give up its connections; the source goes on over new ones. Only within
    /// [`Incomplete`](Error::Incomplete) and errors like it.
    #[error("an operator has paused the migration")]
    Paused,
    /// The migration was cancelled on this side.
    #[error("cancelled")]
    Cancelled,
    /// A thread was told to leave because of an error that another one reports. Never returned by `run`.
    #[error("stopped")]
    Stopped,
    /// A thread could not be created: a limit on processes, on address space or of a cgroup; or [`Threads`](crate::threads::Threads) of the
    /// VMM did not make it.
    #[error("cannot create the thread that {role}: {source}{}", threads_advice(source))]
    Thread {
        /// The thread.
        role: ThreadRole,
        /// The reason.
        source: io::Error,
    },
    /// A thread of the engine panicked, or a callback of the VMM in the thread that called `run`: a defect of the engine, of a transport or
    /// of the VMM. The panic hook has said where.
    ///
    /// Only where panics unwind: see [`threads`](crate::threads).
    #[error("a thread panicked: {message}")]
    Panicked {
        /// What it said.
        message: String,
    },
    /// The migration failed, and so did letting the source's VM run on.
    #[error("{first}; after that the VM could not resume: {resume}")]
    NotResumed {
        /// Why the migration ended.
        first: Box<Error>,
        /// Why the VM stays paused.
        resume: VmError,
    },
}

impl Error {
    /// The peer broke the protocol or does not match, as opposed to bad luck on the way.
    pub fn is_peers_fault(&self) -> bool {
        match self {
            // An end of a connection, which the network or a kill may have brought about, as in the middle of a packet.
            Error::Protocol { source: ProtocolError::Violation(Violation::SyncMissing { .. }), .. } => false,
            Error::Protocol { .. } | Error::Mismatch(_) => true,
            Error::Checkpoint(error) => error.is_peers_fault(),
            Error::NotResumed { first, .. } => first.is_peers_fault(),
            Error::AfterRun { reason, .. } => reason.is_peers_fault(),
            _ => false,
        }
    }

    pub(crate) fn io(at: Place) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { at, source }
    }

    /// For decompressors: a damaged payload is the peer's fault, all else is ours.
    pub(crate) fn payload(at: Place) -> impl FnOnce(io::Error) -> Error {
        move |source| match source.kind() {
            io::ErrorKind::InvalidData => Error::protocol(at)(DecodeError::PayloadDamaged { what: source.to_string() }),
            _ => Error::Io { at, source },
        }
    }

    pub(crate) fn protocol<E: Into<ProtocolError>>(at: Place) -> impl FnOnce(E) -> Error {
        move |source| Error::Protocol { at, source: source.into() }
    }

    pub(crate) fn vm(call: &'static str) -> impl FnOnce(VmError) -> Error {
        move |source| Error::Vm { call, source }
    }

    pub(crate) fn panicked(panic: &(dyn std::any::Any + Send)) -> Error {
        let message = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let message = message.or_else(|| panic.downcast_ref::<String>().cloned());
        Error::Panicked { message: message.unwrap_or_else(|| "no message".to_owned()) }
    }

    pub(crate) fn dirty_log(source: io::Error) -> Error {
        Error::DirtyLog { source }
    }
}

/// What to do where the kernel makes no more threads.
fn threads_advice(reason: &io::Error) -> &'static str {
    match reason.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::OutOfMemory => {
            "; raise the limit on threads (ulimit -u, pids.max) or on memory (ulimit -v)"
        }
        _ => "",
    }
}

/// A position in one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which connection.
    pub connection: Connection,
    /// Bytes before this place, in the direction from source to destination.
    pub offset: u64,
}

/// Which connection of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection {
    /// The one that carries everything but pages.
    Main,
    /// One that carries pages.
    Channel(ChannelId),
    /// One that has not said what it is; counted from 0 in the order of their arrival.
    Unknown(usize),
    /// The return path, from destination to source.
    ReturnPath,
    /// The one that carries the pages a guest waits for in postcopy, beside main.
    Preempt,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, at byte {}", self.connection, grouped(self.offset))
    }
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Connection::Main => f.write_str("main"),
            Connection::Channel(id) => write!(f, "channel {id}"),
            Connection::Unknown(index) => write!(f, "connection {index}"),
            Connection::ReturnPath => f.write_str("return path"),
            Connection::Preempt => f.write_str("preempt connection"),
        }
    }
}

/// Both sides are sane, and they do not fit together, or what the VMM describes cannot be migrated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mismatch {
    /// Pages of this size do not exist.
    #[error("a page of {page_size} bytes; 1024 bytes to 512 KiB, a power of two")]
    PageSize {
        /// In bytes.
        page_size: usize,
    },
    /// The VM's memory has pages of another size than the VM said before.
    #[error(
        "the VM said that its pages have {said} bytes, and its RAM has pages of {found}: DestinationVm::page_size has to tell the size of ram's pages"
    )]
    PageSizeChanged {
        /// By [`DestinationVm::page_size`](crate::vm::DestinationVm::page_size).
        said: usize,
        /// By its memory.
        found: usize,
    },
    /// A RAM block is empty or ends within a page.
    #[error("RAM block {name:?} has {len:#x} bytes, not a multiple of the page size {page_size:#x} above 0")]
    BlockLength {
        /// The block.
        name: BlockName,
        /// In bytes.
        len: u64,
        /// In bytes.
        page_size: usize,
    },
    /// A RAM block does not start at a multiple of 8.
    #[error("RAM block {name:?} is mapped at an address that is not a multiple of 8")]
    BlockAddress {
        /// The block.
        name: BlockName,
    },
    /// A RAM block is not mapped, or not for reading.
    #[error("RAM block {name:?} is not mapped for reading in this process")]
    BlockNotMapped {
        /// The block.
        name: BlockName,
    },
    /// A destination has a RAM block that can only be read.
    #[error("RAM block {name:?} is read-only, and a destination writes to its memory")]
    BlockReadOnly {
        /// The block.
        name: BlockName,
    },
    /// Two RAM blocks have bytes in common.
    #[error("RAM blocks {name:?} and {other:?} overlap in this process; memory belongs to one block")]
    BlocksOverlap {
        /// The one with the lower address.
        name: BlockName,
        /// The other one.
        other: BlockName,
    },
    /// The memory of a RAM block cannot be had.
    #[error(
        "RAM block {name:?} has no memory: the file system of its file is full, its huge pages are used up, or the file is too short"
    )]
    BlockWithoutMemory {
        /// The block.
        name: BlockName,
    },
    /// Another migration reads or writes the memory.
    #[error("another migration uses the memory of this VM; there can be one at a time")]
    MemoryInUse,
    /// Two RAM blocks have one name.
    #[error("RAM block {name:?} exists twice")]
    BlockTwice {
        /// The block.
        name: BlockName,
    },
    /// More memory than an address can reach.
    #[error("more than 2^63 bytes of RAM")]
    TooMuchRam,
    /// More memory than the audit has room for.
    #[error(
        "{bytes:#x} bytes of RAM cannot be audited here; at most {limit:#x} can, in four bytes of memory for each page"
    )]
    TooMuchToAudit {
        /// Bytes of RAM.
        bytes: u64,
        /// The most.
        limit: u64,
    },
    /// The source has a RAM block that this VM does not have.
    #[error("the source has RAM block {name:?} ({len:#x} bytes), which this VM does not have")]
    BlockUnknown {
        /// The block.
        name: BlockName,
        /// Its length on the source in bytes.
        len: u64,
    },
    /// This VM has a RAM block that the source does not have.
    #[error("this VM has RAM block {name:?}, which the source does not have")]
    BlockMissing {
        /// The block.
        name: BlockName,
    },
    /// A RAM block has different lengths.
    #[error("RAM block {name:?} has {theirs:#x} bytes on the source and {ours:#x} here")]
    BlockLengths {
        /// The block.
        name: BlockName,
        /// Bytes on the source.
        theirs: u64,
        /// Bytes here.
        ours: u64,
    },
    /// The source runs another machine type.
    #[error("the source runs machine {theirs:?}, this is {ours:?}")]
    Machine {
        /// The source's.
        theirs: String,
        /// Ours.
        ours: String,
    },
    /// A section that comes in parts, of something else than RAM.
    #[error(
        "section {name:?} comes in parts, which only ram may; detach the device that adds it, or switch its capability off"
    )]
    IterableSection {
        /// Its name.
        name: String,
    },
    /// A channel came when rounds were over without it.
    #[error(
        "channel {id} from {peer} comes too late: rounds were over without any channel; give the number of channels, or \
         more time for them to come"
    )]
    ChannelTooLate {
        /// The channel.
        id: ChannelId,
        /// The other end.
        peer: String,
    },
    /// The end of the stream was reached, and nothing shows that all pages have come.
    #[error(
        "no channel came, and main has not named every page: nothing shows that the memory is complete; give the number \
         of channels"
    )]
    ChannelsUnknown,
    /// A source wants its VM back, and has a block that is not among those that were given.
    #[error("the source has RAM block {name:?}, whose size was not given")]
    BlockSizeUnknown {
        /// The block.
        name: BlockName,
    },
    /// The stream ended in postcopy, and pages that were discarded have not come again.
    #[error(
        "the stream ended and {missing} of the {discarded} pages that were discarded at the switch to postcopy are missing"
    )]
    PagesMissing {
        /// Pages that have not come.
        missing: u64,
        /// Pages that were discarded.
        discarded: u64,
    },
    /// The stream ended as a background snapshot does, without an END section of `ram`, and its pages are not those of one
    /// instant.
    #[error(
        "the stream ended without an END section of ram, as a background snapshot does; in one of those every page comes once, \
         here {missing} of {pages} pages are missing and pages were sent again {again} times"
    )]
    SnapshotIncomplete {
        /// Pages that did not come.
        missing: u64,
        /// Pages of all RAM blocks.
        pages: u64,
        /// How often a page came that had come before.
        again: u64,
    },
    /// A background snapshot was sent to a destination that would run the VM.
    #[error(
        "the stream is a background snapshot, whose VM runs on at the source: it cannot be started here; take it into a checkpoint"
    )]
    SnapshotRunsOn,
    /// The stream has channels, and comes where there is one connection only.
    #[error(
        "{peer} is one connection, and the source has channels for its pages (capability multifd): they cannot come over it; \
         migrate with multifd off, or receive at tcp:HOST:PORT, unix:PATH or vsock:CID:PORT"
    )]
    NeedsChannels {
        /// The only connection.
        peer: String,
    },
    /// The only connection is no migration.
    #[error("{peer} {what}")]
    NoMigration {
        /// The only connection.
        peer: String,
        /// What it said instead.
        what: String,
    },
    /// The stream is a mapped-ram file, in which every page has its place: a checkpoint already.
    #[error(
        "{peer} is a mapped-ram migration file (a checkpoint), which is not a stream to be received: `multifd inspect` and \
         `multifd send` read it as it is, and `multifd convert` copies it"
    )]
    AlreadyCheckpoint {
        /// The only connection.
        peer: String,
    },
    /// Memory is to be handed over, and the connection does not carry descriptors.
    #[error("memory cannot be handed over to {peer}: descriptors travel over a unix socket only, without TLS")]
    NoDescriptors {
        /// The destination.
        peer: String,
    },
    /// Memory is to be handed over, and the destination does not take it: it is a QEMU or a checkpoint, does not know of it, or
    /// its connection does not carry descriptors.
    #[error("memory is to be handed over, and the destination takes none: let it be copied (source::Plan::hand_over)")]
    HandOverRefused,
    /// Memory is to be handed over, and none is made of a memory file.
    #[error("memory is to be handed over, and no RAM block is made of a memory file (Backing::MemoryFile)")]
    NothingToHandOver,
    /// Memory is to be handed over in more blocks than fit.
    #[error("memory is to be handed over in {blocks} blocks, and at most {limit} can be")]
    TooManyShared {
        /// RAM blocks that are made of memory files.
        blocks: usize,
        /// The most.
        limit: usize,
    },
    /// A RAM block that is to be handed over, or was, cannot be.
    #[error("RAM block {name:?} cannot be handed over: {why}")]
    NotShared {
        /// The block.
        name: BlockName,
        /// The reason.
        why: String,
    },
    /// The source has sent another number of descriptors than blocks.
    #[error("{came} descriptors came for {listed} blocks of memory that is handed over")]
    Descriptors {
        /// How many came.
        came: usize,
        /// How many blocks were listed.
        listed: usize,
    },
    /// A source that has no channels was told to compress.
    #[error("pages that main carries are not compressed; expected at least 1 channel, or no compression")]
    CompressionNeedsChannels,
    /// A stream carries device-state packets again, which QEMU sends on channels that do not compress.
    #[error(
        "the state of device {name:?} instance {instance} is in packets that are sent on channels without compression; expected at least 1 \
         channel, and no compression"
    )]
    PacketsNeedChannels {
        /// The section of the device.
        name: String,
        /// Its instance.
        instance: u32,
    },
    /// Another number of channels was expected.
    #[error("{opened} channels were opened, {expected} were expected")]
    Channels {
        /// By the source.
        opened: usize,
        /// By us.
        expected: usize,
    },
    /// A connection said that it is a channel which there cannot be with the number of channels that was required. It was
    /// dropped, and the source ended or went silent then: most likely it has more channels.
    #[error(
        "a connection said it is channel {id}, {expected} channels were expected; it was dropped, and then: {then}"
    )]
    ChannelBeyond {
        /// What it said.
        id: ChannelId,
        /// How many were required.
        expected: usize,
        /// What ended the migration.
        then: String,
    },
}

/// What follows from a failure in postcopy, and what to do about it.
const AFTER_RUN: &str = "this was after the source had begun to switch to postcopy: its VM is whole there, and paused (QEMU: \
     postcopy-paused) unless the source has taken it back (QEMU: failed); no part of it runs or will run here";

fn because(reason: &Option<String>) -> String {
    reason.as_ref().map_or_else(String::new, |reason| format!(": {reason}"))
}

fn lacking(left: &Option<u64>) -> String {
    match left {
        Some(0) => "no page that was not sent, and has not confirmed that it has all".to_owned(),
        Some(pages) => format!("at least {} pages of its memory", grouped(*pages)),
        None => "a part of its memory".to_owned(),
    }
}

fn io_message(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the connection ended in the middle".to_owned(),
        _ => error.to_string(),
    }
}

/// `1234567` as `1,234,567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_on_threads_is_to_be_raised_where_the_kernel_makes_no_more() {
        let of = |source: io::Error| Error::Thread { role: ThreadRole::Accept, source }.to_string();
        assert!(of(io::Error::from_raw_os_error(libc::EAGAIN)).ends_with("or on memory (ulimit -v)"));
        assert!(of(io::Error::from_raw_os_error(libc::ENOMEM)).ends_with("or on memory (ulimit -v)"));
        let of_the_vmm = of(io::Error::other("no thread is left"));
        assert_eq!(of_the_vmm, "cannot create the thread that accepts connections: no thread is left");
    }

    #[test]
    fn a_message_says_where_and_which_value() {
        let source = Violation::PageOutsideBlock {
            block: BlockName::new("pc.ram").unwrap(),
            offset: 0x7fff_f000,
            len: 0x4000_0000,
        };
        let at = Place { connection: Connection::Channel(ChannelId(3)), offset: 524_640 };
        assert_eq!(
            Error::Protocol { at, source: source.into() }.to_string(),
            "channel 3, at byte 524,640: page at 0x7ffff000 lies outside \"pc.ram\" (0x40000000 bytes)"
        );
    }

    #[test]
    fn digits_are_grouped_by_three() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }
}
