//! What a source is told before it begins.

use std::time::Duration;

use multifd_proto::{
    extension::{Extension, Extensions, Offer},
    machine::{Dialect, ZeroPages},
    packet::Compression,
    ram::BlockEntry,
};

use super::{parameters::Parameters, postponed::PEEK_EVERY};
use crate::{
    beside_ram::BesideRam,
    checkpoint::KeptPackets,
    clock::Clock,
    round::trace::Trace,
    sections::RAM_SECTION,
    sync::Arc,
    threads::{StdThreads, Threads},
};

/// How to migrate.
///
/// Made by [`Options::default`] and changed field by field.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// What is at the other end.
    pub peer: Peer,
    /// What both ends must agree on.
    pub format: StreamFormat,
    /// What only a QEMU as the peer is particular about.
    pub qemu: QemuFormat,
    /// How this end sends.
    pub plan: Plan,
    /// Limits to begin with; [`Handle`](super::Handle) changes them while the migration runs.
    pub parameters: Parameters,
    /// Where time comes from.
    pub clock: Clock,
    /// How threads are made.
    pub threads: Arc<dyn Threads>,
    /// How often main looks into the dirty log while a round is sent.
    pub(crate) peek_every: Duration,
    /// Who is told of each step.
    pub(crate) trace: Trace,
    /// A defect to be caught.
    #[cfg(any(test, feature = "__broken-variants"))]
    pub(crate) broken: Option<crate::testing::broken::Broken>,
}

impl Default for Options {
    /// A destination of ours, and the defaults of the parts.
    fn default() -> Options {
        Options {
            peer: Peer::Multifd,
            format: StreamFormat::default(),
            qemu: QemuFormat::default(),
            plan: Plan::default(),
            parameters: Parameters::default(),
            clock: Clock::monotonic(),
            threads: Arc::new(StdThreads),
            peek_every: PEEK_EVERY,
            trace: Trace::default(),
            #[cfg(any(test, feature = "__broken-variants"))]
            broken: None,
        }
    }
}

impl Options {
    /// What this side offers to a destination of ours.
    pub(super) fn offer(&self) -> Option<Offer> {
        match self.peer {
            Peer::Multifd => {
                let mut extensions = Extensions::known();
                if !self.plan.hand_over {
                    extensions = extensions.without(Extension::SharedMemory);
                }
                if self.is_main_alone() {
                    extensions = extensions.without(Extension::StatePackets);
                }
                Some(Offer { channels: self.plan.channels, token: self.format.token, extensions })
            }
            Peer::Qemu => None,
        }
    }
}

/// What the stream is like. Fixed once the migration begins.
///
/// A QEMU destination has to be configured for the same compression; ours finds it out.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StreamFormat {
    /// A secret of this migration that main offers, and the channels name in place of the UUID. The destination is given the
    /// same one, and takes no connection without it. Not for a QEMU destination, which compares these bytes with its UUID.
    ///
    /// With `None` and [`Peer::Multifd`] each migration makes one of its own: the destination learns it from main, and so
    /// takes no channel of an earlier attempt.
    pub token: Option<[u8; 16]>,
    /// What happens with pages that were never touched.
    pub untouched: Untouched,
    /// Compression of page contents, on all channels.
    pub compression: Compression,
    /// Each channel compresses only while that takes less time than it saves, by what the channel observes. Its packets
    /// differ then, each says what it is; a QEMU destination takes only those of the method that it is configured for.
    pub auto_compression: bool,
}

impl Default for StreamFormat {
    /// A token of its own, pages that were never touched left out, no compression.
    fn default() -> StreamFormat {
        StreamFormat {
            token: None,
            untouched: Untouched::Skip,
            compression: Compression::None,
            auto_compression: false,
        }
    }
}

/// What a QEMU as the peer is particular about, and streams that it wrote. Between two ends of this crate the defaults are right.
/// Fixed once the migration begins.
///
/// A QEMU destination has to be configured for the same machine and dialect; ours finds them out.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct QemuFormat {
    /// Machine type in the configuration section; a QEMU destination refuses another than its own.
    pub machine: String,
    /// UUID of the VM, in the first packet of every channel; all zero where it has none.
    pub uuid: [u8; 16],
    /// Put the UUID into the configuration section too, for the destination to compare.
    pub validate_uuid: bool,
    /// Where rounds end on main.
    pub dialect: Dialect,
    /// Where zero pages go.
    pub zero_pages: ZeroPages,
    /// When main names the end of a round.
    pub flush: Flush,
    /// How long a section of the per-section dialect is to take; of no effect in the other.
    pub section_time: Duration,
    /// What the stream keeps of an earlier one, if it is sent again from a checkpoint.
    pub replay: Replay,
}

impl Default for QemuFormat {
    /// One sync point per round, FLUSH when a round opens, zero pages in packets, sections of 50 ms.
    fn default() -> QemuFormat {
        QemuFormat {
            machine: "multifd".to_owned(),
            uuid: [0; 16],
            validate_uuid: false,
            dialect: Dialect::PerRound,
            zero_pages: ZeroPages::Multifd,
            flush: Flush::Early,
            section_time: Duration::from_millis(50),
            replay: Replay::default(),
        }
    }
}

/// How this end sends. Fixed once the migration begins; the destination finds it out or is not concerned.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Plan {
    /// Connections beside main, at most 255.
    ///
    /// 0: main alone carries the pages, for a path with a single connection. Towards a QEMU that is a migration without the capability
    /// multifd. One thread sends then, there is no compression, and [`QemuFormat::dialect`] is of no effect.
    pub channels: u8,
    /// Level of the compression; the compressor's range.
    pub compression_level: i32,
    /// Have the kernel read page contents straight from guest memory where the connections can (`MSG_ZEROCOPY`); where they
    /// cannot, pages are copied, with a warning. Of no effect on compressed pages, which are a copy.
    pub zero_copy: bool,
    /// Hand all RAM blocks over that are made of a [memory file](crate::ram::Backing::MemoryFile), instead of copying them: the
    /// destination, a new process of the VMM on this host, maps the same memory. Others are copied, as always. Dirty tracking
    /// is not switched on where there are no others.
    ///
    /// Takes a destination of ours that [takes memory](crate::vm::DestinationVm::take_memory), a connection that carries
    /// descriptors (a unix socket, without TLS), and files that can be sealed (`MFD_ALLOW_SEALING`): they are sealed against
    /// becoming shorter. Where one of these is missing the migration ends, and the VM runs on. Until the destination is allowed
    /// to start, it cannot write to the memory; from then on it is the destination's: after `Ok`, this process must not write
    /// there, and should unmap it.
    pub hand_over: bool,
}

impl Default for Plan {
    /// 4 channels, level 1, pages copied into the kernel, no memory handed over.
    fn default() -> Plan {
        Plan { channels: 4, compression_level: 1, zero_copy: false, hand_over: false }
    }
}

/// What is at the other end of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Peer {
    /// A destination of this implementation. The hand-over has two steps, so that a broken connection never leaves two VMs
    /// running, and the destination knows how many channels there are.
    Multifd,
    /// A QEMU, or something else that speaks nothing but its format. It takes the VM over by itself: when the connection
    /// breaks after the last byte and before its answer, the outcome is in doubt.
    Qemu,
}

/// What a stream keeps of an earlier one whose device state it carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// The id of the `ram` section. Other sections carry ids of the earlier stream, which this one must not collide with.
    pub ram_section: u32,
    /// Sections that the earlier stream had before the devices' state. They are sent in their places again.
    pub beside_ram: BesideRam,
    /// The block list of a VM of which a part of the memory is elsewhere, with the address of each block: it is listed in place
    /// of the blocks of `ram`, which has those whose memory is sent. Empty where all of it is sent.
    pub listed: Vec<BlockEntry>,
    /// Device-state packets of the earlier stream. They are sent as they came, on the channels, before the end of the last round.
    pub packets: Option<KeptPackets>,
}

impl Default for Replay {
    /// Nothing.
    fn default() -> Replay {
        Replay { ram_section: RAM_SECTION, beside_ram: BesideRam::default(), listed: Vec::new(), packets: None }
    }
}

/// When main sends the FLUSH of a round. The destination waits for all channels either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// When the round opens: one thread hand-over less at its end. Not in legacy zero-page mode, where main has pages of
    /// its own to send first.
    Early,
    /// When every channel has sent its SYNC. A QEMU destination does not answer its monitor between FLUSH and the last
    /// SYNC, so this is the better choice for one.
    Late,
}

/// What happens with pages that [`SourceVm::untouched`](crate::vm::SourceVm::untouched) names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untouched {
    /// They are not sent. The destination's memory has to be zeros where nothing was sent; ours sees to that.
    Skip,
    /// They are sent as zero pages.
    Name,
}

/// A token that no other migration has.
pub(super) fn fresh_token() -> std::io::Result<[u8; 16]> {
    let mut token = [0; 16];
    while token == [0; 16] {
        rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(token)
}
