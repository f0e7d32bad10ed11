//! The steps of device state as people read them, and what may go wrong.

use std::fmt;

use crate::protocol::{Fault, Side, Who};

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceHarm {
    /// The destination's guest started, and a part of its state was not given to its device.
    StartedWithoutState,
    /// A device was given a part that was not the next.
    OutOfOrder,
    /// A device was given state before the last page was in place.
    LoadedEarly,
    /// The destination holds more packets than it has room for.
    MoreThanRoom,
    /// A thread waits and nothing can happen any more.
    WaitsForever,
    /// A side gave up although nothing failed.
    GaveUp,
    /// The VM runs nowhere.
    GuestNowhere,
    /// The VM runs on both sides.
    GuestTwice,
}

impl fmt::Display for DeviceHarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeviceHarm::StartedWithoutState => "the VM starts without a part of its state",
            DeviceHarm::OutOfOrder => "a device is given a part that is not the next",
            DeviceHarm::LoadedEarly => "a device is loaded before the last page is in place",
            DeviceHarm::MoreThanRoom => "more packets in memory than there is room for",
            DeviceHarm::WaitsForever => "waits forever",
            DeviceHarm::GaveUp => "the migration fails",
            DeviceHarm::GuestNowhere => "the VM runs nowhere",
            DeviceHarm::GuestTwice => "the VM runs on both sides",
        })
    }
}

/// One step, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields are channels, sections and their parts, as they are called")]
pub enum DeviceEvent {
    /// Source main opens a round.
    Opens { round: u8 },
    /// Every channel has written its SYNC.
    Gathers { round: u8 },
    /// Source main writes something.
    Writes { item: &'static str },
    /// Source main has an answer.
    Hears { answer: &'static str },
    /// Source main puts a packet into the queue.
    Queues { section: u8, part: u8 },
    /// Source main says that no packet follows.
    Closes,
    /// Source main joins its channels.
    Joins,
    /// A channel takes a packet from the queue.
    TakesPacket { channel: usize, section: u8, part: u8 },
    /// A channel writes something.
    SendsOn { channel: usize, item: &'static str, packet: Option<(u8, u8)> },
    /// A channel ends, as no packet is left.
    HasNoMore { channel: usize },
    /// Destination main reads something.
    Reads { item: &'static str },
    /// Destination main gives a part to its device.
    Gives { section: u8, part: u8 },
    /// A channel of the destination takes something.
    TakesFrom { channel: usize, item: &'static str },
    /// It has all of a packet.
    Receives { channel: usize, packet: (u8, u8) },
    /// It waits for room.
    WaitsForRoom { channel: usize },
    /// It ends, and the migration goes on.
    Leaves { channel: usize },
    /// Something goes wrong on purpose.
    Fault(Fault),
    /// A side ends because of what it saw on a connection.
    Ends { side: Side, who: Who },
}

impl fmt::Display for DeviceEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |side: Side, who: Who, what: String| write!(f, "{:<23} {what}", format!("{side} {who}"));
        let (source, destination) = (Side::Source, Side::Destination);
        let part = |(section, part): (u8, u8)| format!("part {part} of section {section}");
        match *self {
            DeviceEvent::Opens { round } => line(source, Who::Main, format!("opens round {round}")),
            DeviceEvent::Gathers { round } => line(source, Who::Main, format!("has all SYNCs of round {round}")),
            DeviceEvent::Writes { item } => line(source, Who::Main, format!("writes {item}")),
            DeviceEvent::Hears { answer } => line(source, Who::Main, format!("has {answer}")),
            DeviceEvent::Queues { section, part: index } => {
                line(source, Who::Main, format!("queues {}", part((section, index))))
            }
            DeviceEvent::Closes => line(source, Who::Main, "says that no packet follows".into()),
            DeviceEvent::Joins => line(source, Who::Main, "joins the channels".into()),
            DeviceEvent::TakesPacket { channel, section, part: index } => {
                line(source, Who::Channel(channel), format!("takes {}", part((section, index))))
            }
            DeviceEvent::SendsOn { channel, item, packet } => {
                let what = packet.map_or(item.to_owned(), part);
                line(source, Who::Channel(channel), format!("sends {what}"))
            }
            DeviceEvent::HasNoMore { channel } => line(source, Who::Channel(channel), "has no more to send".into()),
            DeviceEvent::Reads { item } => line(destination, Who::Main, format!("reads {item}")),
            DeviceEvent::Gives { section, part: index } => {
                line(destination, Who::Main, format!("gives {} to its device", part((section, index))))
            }
            DeviceEvent::TakesFrom { channel, item } => {
                line(destination, Who::Channel(channel), format!("takes {item}"))
            }
            DeviceEvent::Receives { channel, packet } => {
                line(destination, Who::Channel(channel), format!("has all of {}", part(packet)))
            }
            DeviceEvent::WaitsForRoom { channel } => {
                line(destination, Who::Channel(channel), "waits for room for its packet".into())
            }
            DeviceEvent::Leaves { channel } => {
                line(destination, Who::Channel(channel), "sees the end of its connection, and the rest goes on".into())
            }
            DeviceEvent::Fault(fault) => crate::protocol::Event::Fault(fault).fmt(f),
            DeviceEvent::Ends { side, who } => line(side, who, "all threads of this side return".into()),
        }
    }
}
