//! Device state on its way: in packets on the channels, on main while the guest runs, and up to the end of the stream.
//!
//! The rounds are there as far as state depends on them: each channel has a page and a SYNC in each, and main ends it. After each round but
//! the last main sends state that the destination has to load before the next one (`save_live`): a PING follows it, and the source waits for
//! the PONG. After the last one the devices are saved, section after section, on main or in packets. Main numbers the packets and puts
//! them into a queue; any channel takes the next. At the destination they wait in a window until main comes to them. Then come the end,
//! READY and GO.
//!
//! Who has arrived at the end of a round is decided by [`multifd_proto::rounds`], and what the end of a channel means by
//! [`multifd_proto::channel_end`]: the code that ships. The queue and the window are written again here, as the engine's wait.

mod destination;
mod event;
mod source;
pub mod variants;

use std::collections::VecDeque;

use multifd_proto::{ChannelId, rounds::Rounds};

pub use self::event::{DeviceEvent, DeviceHarm};
use crate::{
    protocol::{Fault, Side, Who},
    search::Model,
};

/// What is asked about.
#[derive(Clone, Debug)]
pub struct DeviceModel {
    /// Channels beside main.
    pub channels: usize,
    /// Rounds before the last, each with state that is sent while the guest runs.
    pub live: u8,
    /// By section of the devices: how many packets it has; one of 0 is on main.
    pub sections: Vec<u8>,
    /// Packets for which the destination has room.
    pub window: u8,
    /// Buffers of the source.
    pub buffers: usize,
    /// What fits into a connection.
    pub capacity: usize,
    /// So many channels take packets; the others end when the rounds are over.
    pub taking: usize,
    /// So many packets are queued until main speaks of them; of fewer at the end.
    pub untold: u8,
    /// All packets are queued before main speaks of the first: their state was kept until the last round was over.
    pub kept: bool,
    /// The destination cannot read device state, which on main looks like the end of the stream: a checkpoint. Without packets.
    pub opaque: bool,
    /// Whether one thing goes wrong, at any moment.
    pub faults: bool,
    /// What is done wrong.
    pub defect: Option<DeviceDefect>,
}

/// A part that is left out or done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceDefect {
    /// Main goes on without a packet that is on its way, and forgets it.
    MainDoesNotWait,
    /// Main takes packets in the order in which they come.
    InOrderOfArrival,
    /// A packet has its number from the channel that writes it.
    NumberedWhenWritten,
    /// The numbers of packets begin again with each section.
    NumbersBeginAgain,
    /// Channels take the packet that was queued last.
    LastFirst,
    /// Channels do not wait for room.
    NoRoom,
    /// A channel ends when the queue is empty.
    EmptyIsTheEnd,
    /// Main does not say that no packet follows.
    NotClosed,
    /// The window is not told that a channel has ended.
    EndUntold,
    /// The end of a channel within a packet counts as one between two.
    CutIsAnEnd,
    /// The source does not wait for its channels before GO.
    NoJoin,
    /// Channels take state without having waited behind their last SYNC.
    StateBeforeBarrier,
    /// The source writes no SYNC and no FLUSH in the last round.
    NoLastBarrier,
    /// The source goes on without PONG.
    NoPong,
    /// The destination takes what looks like the end for the end.
    FirstEnd,
}

/// A packet: its number, and what it truly holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Packet {
    number: u8,
    section: u8,
    part: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Item {
    // On main.
    Flush,
    Last,
    Live(u8),
    Ping(u8),
    Head(u8),
    Len,
    SectionEnd,
    Body(u8),
    End,
    Token,
    Go,
    // On channels.
    Page,
    Sync,
    State(Packet),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Answer {
    Pong(u8),
    Ready,
    Shut,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Open,
    Gather,
    Write(Item),
    Await(Answer),
    Put(u8, u8),
    Close,
    Join,
}

/// A state of the model.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DeviceState {
    pc: usize,
    /// Rounds opened.
    round: u8,
    senders: Vec<Sender>,
    queue: VecDeque<Packet>,
    next_number: u8,
    closed: bool,
    main: VecDeque<Item>,
    links: Vec<VecDeque<Item>>,
    back: VecDeque<Answer>,
    /// Connections that are gone, and those of them that were reset; main is the last bit.
    gone: u8,
    reset: u8,
    rounds: Rounds,
    main_waits: Option<u64>,
    receivers: Vec<Receiver>,
    window: Window,
    /// By section, how much its device was given.
    given: Vec<u8>,
    /// The section in packets that main is in.
    section: u8,
    /// Rounds whose live state was loaded.
    live: u8,
    /// Pages that are in place.
    pages: u8,
    /// The end of the sections was read.
    ended: bool,
    ready: bool,
    started: bool,
    source: Ending,
    destination: Ending,
    fault_used: bool,
    harm: Option<DeviceHarm>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Sender {
    rounds: u8,
    paged: bool,
    held: Option<Packet>,
    over: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Receiver {
    arrived: Option<u64>,
    /// It waits for room.
    waits: bool,
    /// It receives this one.
    receives: Option<Packet>,
    /// The rest of that is lost.
    cut: bool,
    left: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Window {
    next: u8,
    arriving: Vec<u8>,
    here: Vec<Packet>,
    ended: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Ending {
    Runs,
    Done,
    Failed,
    InDoubt,
}

type Steps = Vec<(DeviceEvent, DeviceState)>;

impl DeviceModel {
    fn is(&self, defect: DeviceDefect) -> bool {
        self.defect == Some(defect)
    }

    fn main_bit(&self) -> u8 {
        1 << self.channels
    }

    fn all(&self) -> u8 {
        (1 << (self.channels + 1)) - 1
    }

    fn faults(&self, state: &DeviceState, out: &mut Steps) {
        for (side, possible) in [
            (Side::Source, state.source == Ending::Runs),
            (Side::Destination, state.destination == Ending::Runs && !state.started),
        ] {
            if possible {
                let (_, mut next) = match side {
                    Side::Source => self.source_ends(state, Who::Main),
                    Side::Destination => self.destination_ends(state, Who::Main),
                };
                next.fault_used = true;
                out.push((DeviceEvent::Fault(Fault::Stops(side)), next));
            }
        }
        for link in (0..=self.channels).filter(|link| state.gone >> link & 1 == 0) {
            let connection = if link == self.channels { Who::Main } else { Who::Channel(link) };
            for lost in [false, true] {
                let mut next = state.clone();
                next.fault_used = true;
                next.gone |= 1 << link;
                next.reset |= 1 << link;
                if lost && connection == Who::Main {
                    next.main.clear();
                    next.back.clear();
                } else if lost {
                    next.links[link].clear();
                    let receiver = &mut next.receivers[link];
                    // It has read the head of a packet, the rest of which is lost.
                    receiver.cut = receiver.receives.is_some() || receiver.waits;
                    receiver.waits = false;
                }
                out.push((DeviceEvent::Fault(Fault::Cut { connection, lost }), next));
            }
        }
    }
}

impl Model for DeviceModel {
    type State = DeviceState;
    type Event = DeviceEvent;
    type Harm = DeviceHarm;

    fn initial(&self) -> DeviceState {
        assert!(self.channels <= 3 && (!self.opaque || self.sections.iter().all(|&packets| packets == 0)));
        DeviceState {
            pc: 0,
            round: 0,
            senders: vec![Sender::default(); self.channels],
            queue: VecDeque::new(),
            next_number: 0,
            closed: false,
            main: VecDeque::new(),
            links: vec![VecDeque::new(); self.channels],
            back: VecDeque::new(),
            gone: 0,
            reset: 0,
            rounds: Rounds::new(self.channels),
            main_waits: None,
            receivers: vec![Receiver::default(); self.channels],
            window: Window::default(),
            given: vec![0; self.sections.len()],
            section: 0,
            live: 0,
            pages: 0,
            ended: false,
            ready: false,
            started: false,
            source: Ending::Runs,
            destination: Ending::Runs,
            fault_used: false,
            harm: None,
        }
    }

    fn successors(&self, state: &DeviceState, out: &mut Steps) {
        if state.harm.is_some() {
            return;
        }
        if state.source == Ending::Runs {
            self.source_steps(state, out);
        }
        if state.destination == Ending::Runs {
            self.destination_steps(state, out);
        }
        if self.faults && !state.fault_used && !self.is_over(state) {
            self.faults(state, out);
        }
    }

    fn harm(&self, state: &DeviceState, successors: &[(DeviceEvent, DeviceState)]) -> Option<DeviceHarm> {
        if state.harm.is_some() {
            return state.harm;
        }
        if !self.is_over(state) {
            return successors.is_empty().then_some(DeviceHarm::WaitsForever);
        }
        match state.source {
            Ending::Done if !state.started => Some(DeviceHarm::GuestNowhere),
            Ending::Failed if state.started => Some(DeviceHarm::GuestTwice),
            Ending::Failed | Ending::InDoubt if !state.fault_used => Some(DeviceHarm::GaveUp),
            _ => None,
        }
    }

    fn is_over(&self, state: &DeviceState) -> bool {
        state.source != Ending::Runs && state.destination != Ending::Runs
    }

    fn is_in_doubt(&self, state: &DeviceState) -> bool {
        state.source == Ending::InDoubt
    }
}

impl DeviceState {
    /// A device is given a part of its state, or all of it where it came on main.
    fn give(&mut self, model: &DeviceModel, section: u8, part: u8) {
        let index = usize::from(section);
        let sections_before = self.given[..index].iter().zip(&model.sections).all(|(&given, &all)| given == all.max(1));
        if self.given[index] != part || !sections_before {
            self.harm = Some(DeviceHarm::OutOfOrder);
        }
        if usize::from(self.pages) < model.channels * (usize::from(model.live) + 1) {
            self.harm = Some(DeviceHarm::LoadedEarly);
        }
        self.given[index] += 1;
    }

    fn next_packet(&self, channel: usize) -> Option<Packet> {
        self.links[channel].front().and_then(|item| item.packet_itself())
    }

    /// Packets that channels have written.
    fn written(&self) -> u8 {
        let held = self.senders.iter().filter(|sender| sender.held.is_some()).count();
        self.next_number - u8::try_from(held + self.queue.len()).expect("few packets")
    }

    /// Nothing of it is looked at any more, so such states need not be told apart.
    fn forget_source(&mut self) {
        self.pc = 0;
        self.senders.iter_mut().for_each(|sender| *sender = Sender::default());
        self.queue.clear();
        self.back.clear();
        (self.next_number, self.closed, self.round) = (0, false, 0);
    }

    /// As [`forget_source`](Self::forget_source).
    fn forget_destination(&mut self) {
        self.main.clear();
        self.links.iter_mut().for_each(VecDeque::clear);
        self.receivers.iter_mut().for_each(|receiver| *receiver = Receiver::default());
        self.window = Window::default();
        self.given.iter_mut().for_each(|given| *given = 0);
        self.rounds = Rounds::new(self.receivers.len());
        (self.main_waits, self.section, self.live, self.pages) = (None, 0, 0, 0);
        (self.ended, self.ready) = (false, false);
    }
}

impl Item {
    fn name(self) -> &'static str {
        match self {
            Item::Flush => "what ends the round",
            Item::Last => "that the round is the last",
            Item::Live(_) => "state of the running guest",
            Item::Ping(_) => "PING",
            Item::Head(_) => "the head of a section in packets",
            Item::Len => "that a packet follows",
            Item::SectionEnd => "the end of the section",
            Item::Body(_) => "a section",
            Item::End => "the end of the sections",
            Item::Token => "the token at the end",
            Item::Go => "GO",
            Item::Page => "a page",
            Item::Sync => "SYNC",
            Item::State(_) => "a packet of state",
        }
    }

    fn packet(self) -> Option<(u8, u8)> {
        self.packet_itself().map(|packet| (packet.section, packet.part))
    }

    fn packet_itself(self) -> Option<Packet> {
        match self {
            Item::State(packet) => Some(packet),
            _ => None,
        }
    }
}

impl Answer {
    const fn name(self) -> &'static str {
        match self {
            Answer::Pong(_) => "PONG",
            Answer::Ready => "READY",
            Answer::Shut => "RUNNING",
        }
    }
}

fn id(channel: usize) -> ChannelId {
    ChannelId(u8::try_from(channel).expect("few channels"))
}
