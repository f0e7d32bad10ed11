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

mod event;
pub mod variants;

use std::collections::VecDeque;

use multifd_proto::{
    ChannelId,
    channel_end::{End, Meaning, Reached, meaning},
    rounds::{Party, Rounds},
};

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

    /// What source main does.
    fn program(&self) -> Vec<Op> {
        let mut program = Vec::new();
        for round in 0..=self.live {
            program.push(Op::Open);
            let last = round == self.live;
            program.extend(last.then_some(Op::Write(Item::Last)));
            program.push(Op::Gather);
            program.extend((!(last && self.is(DeviceDefect::NoLastBarrier))).then_some(Op::Write(Item::Flush)));
            if !last {
                program.extend([Op::Write(Item::Live(round)), Op::Write(Item::Ping(round))]);
                program.extend((!self.is(DeviceDefect::NoPong)).then_some(Op::Await(Answer::Pong(round))));
            }
        }
        let mut puts = Vec::new();
        let mut written = Vec::new();
        let (mut queued, mut told) = (0, Vec::new());
        for (section, &packets) in (0..).zip(&self.sections) {
            if packets == 0 {
                told.push(Op::Write(Item::Body(section)));
                continue;
            }
            told.push(Op::Write(Item::Head(section)));
            for part in 0..packets {
                match self.kept {
                    true => puts.push(Op::Put(section, part)),
                    false => written.push(Op::Put(section, part)),
                }
                queued += 1;
                told.push(Op::Write(Item::Len));
                if queued == self.untold {
                    queued = 0;
                    written.append(&mut told);
                }
            }
            told.push(Op::Write(Item::SectionEnd));
        }
        program.extend(puts.into_iter().chain(written).chain(told));
        program.extend([Op::Write(Item::End), Op::Write(Item::Token)]);
        program.extend((!self.is(DeviceDefect::NotClosed)).then_some(Op::Close));
        program.extend((!self.is(DeviceDefect::NoJoin)).then_some(Op::Join));
        program.extend([Op::Await(Answer::Ready), Op::Write(Item::Go), Op::Await(Answer::Shut)]);
        program
    }

    fn main_bit(&self) -> u8 {
        1 << self.channels
    }

    fn all(&self) -> u8 {
        (1 << (self.channels + 1)) - 1
    }

    fn source_steps(&self, state: &DeviceState, out: &mut Steps) {
        // The thread of the return path sees it at any time, behind the last answer.
        if state.gone & self.main_bit() > 0 && !state.back.contains(&Answer::Shut) {
            out.push(self.source_ends(state, Who::Main));
        }
        let program = self.program();
        let mut next = state.clone();
        next.pc += 1;
        match program[state.pc] {
            Op::Open => {
                next.round += 1;
                out.push((DeviceEvent::Opens { round: next.round }, next));
            }
            Op::Gather => {
                if state.senders.iter().all(|sender| sender.rounds == state.round) {
                    out.push((DeviceEvent::Gathers { round: state.round }, next));
                }
            }
            Op::Write(item) => self.write_main(state, next, item, out),
            // Answers before that one are passed over: the source does not wait for them.
            Op::Await(answer) if state.back.contains(&answer) => {
                while next.back.pop_front() != Some(answer) {}
                if answer == Answer::Shut {
                    next.source = Ending::Done;
                    next.gone = self.all();
                }
                out.push((DeviceEvent::Hears { answer: answer.name() }, next));
            }
            Op::Await(_) => {}
            Op::Put(section, part) => {
                let held = state.senders.iter().filter(|sender| sender.held.is_some()).count();
                if state.queue.len() + held < self.buffers || self.kept {
                    let number = if self.is(DeviceDefect::NumbersBeginAgain) { part } else { state.next_number };
                    next.queue.push_back(Packet { number, section, part });
                    next.next_number += 1;
                    out.push((DeviceEvent::Queues { section, part }, next));
                }
            }
            Op::Close => {
                next.closed = true;
                out.push((DeviceEvent::Closes, next));
            }
            Op::Join => {
                if state.senders.iter().all(|sender| sender.over) {
                    out.push((DeviceEvent::Joins, next));
                }
            }
        }
        for channel in 0..self.channels {
            self.sender(state, channel, out);
        }
    }

    fn write_main(&self, state: &DeviceState, mut next: DeviceState, item: Item, out: &mut Steps) {
        if state.gone & self.main_bit() > 0 {
            // As the thread of the return path.
            return;
        }
        if state.main.len() < self.capacity {
            next.main.push_back(item);
            out.push((DeviceEvent::Writes { item: item.name() }, next));
        }
    }

    fn sender(&self, state: &DeviceState, channel: usize, out: &mut Steps) {
        let sender = &state.senders[channel];
        if sender.over {
            return;
        }
        let mut next = state.clone();
        let last = state.round == self.live + 1;
        if sender.rounds < state.round {
            if !sender.paged {
                next.senders[channel].paged = true;
                return self.write(state, next, channel, Item::Page, out);
            }
            (next.senders[channel].paged, next.senders[channel].rounds) = (false, state.round);
            if last && self.is(DeviceDefect::NoLastBarrier) {
                return out.push((DeviceEvent::Writes { item: "no SYNC" }, next));
            }
            return self.write(state, next, channel, Item::Sync, out);
        }
        if !last {
            return;
        }
        if let Some(mut packet) = sender.held {
            if self.is(DeviceDefect::NumberedWhenWritten) {
                // Counted by what channels have written.
                packet.number = state.written();
            }
            next.senders[channel].held = None;
            return self.write(state, next, channel, Item::State(packet), out);
        }
        let taken = match self.is(DeviceDefect::LastFirst) {
            _ if channel >= self.taking => None,
            true => next.queue.pop_back(),
            false => next.queue.pop_front(),
        };
        match taken {
            Some(packet) => {
                next.senders[channel].held = Some(packet);
                out.push((DeviceEvent::TakesPacket { channel, section: packet.section, part: packet.part }, next));
            }
            None if state.closed || channel >= self.taking || self.is(DeviceDefect::EmptyIsTheEnd) => {
                next.senders[channel].over = true;
                out.push((DeviceEvent::HasNoMore { channel }, next));
            }
            None => {}
        }
    }

    fn write(&self, state: &DeviceState, mut next: DeviceState, channel: usize, item: Item, out: &mut Steps) {
        if state.gone >> channel & 1 == 1 {
            out.push(self.source_ends(state, Who::Channel(channel)));
        } else if state.links[channel].len() < self.capacity {
            next.links[channel].push_back(item);
            out.push((DeviceEvent::SendsOn { channel, item: item.name(), packet: item.packet() }, next));
        }
    }

    /// All threads of the source return. From GO on only the answer tells where the guest is.
    fn source_ends(&self, state: &DeviceState, why: Who) -> (DeviceEvent, DeviceState) {
        let mut next = state.clone();
        let go = self.program().iter().position(|&op| op == Op::Write(Item::Go)).expect("it is in every program");
        next.source = if state.pc > go { Ending::InDoubt } else { Ending::Failed };
        next.gone = self.all();
        next.forget_source();
        (DeviceEvent::Ends { side: Side::Source, who: why }, next)
    }

    fn destination_ends(&self, state: &DeviceState, why: Who) -> (DeviceEvent, DeviceState) {
        let mut next = state.clone();
        next.destination = Ending::Failed;
        next.gone = self.all();
        next.forget_destination();
        (DeviceEvent::Ends { side: Side::Destination, who: why }, next)
    }

    fn destination_steps(&self, state: &DeviceState, out: &mut Steps) {
        self.destination_main(state, out);
        for channel in 0..self.channels {
            self.receiver(state, channel, out);
        }
    }

    fn destination_main(&self, state: &DeviceState, out: &mut Steps) {
        if state.main_waits.is_some_and(|round| state.rounds.round() == round) {
            return;
        }
        let mut next = state.clone();
        next.main_waits = None;
        let is_gone = state.gone & self.main_bit() > 0;
        if state.started {
            if is_gone {
                next.destination = Ending::Done;
                next.gone = self.all();
                next.forget_destination();
                out.push((DeviceEvent::Ends { side: Side::Destination, who: Who::Main }, next));
            }
            return;
        }
        let Some(item) = next.main.pop_front() else {
            if is_gone {
                out.push(self.destination_ends(state, Who::Main));
            }
            return;
        };
        if state.ready && item != Item::Go {
            return out.push(self.destination_ends(state, Who::Main));
        }
        match item {
            Item::Flush => match next.rounds.arrive(Party::Main) {
                Ok(_) => next.main_waits = Some(state.rounds.round()),
                Err(_) => return out.push(self.destination_ends(state, Who::Main)),
            },
            Item::Last => next.rounds.is_last(),
            Item::Live(round) => next.live = round + 1,
            Item::Ping(round) => {
                if is_gone {
                    return out.push(self.destination_ends(state, Who::Main));
                }
                next.back.push_back(Answer::Pong(round));
            }
            Item::Head(section) => next.section = section,
            Item::SectionEnd => {}
            Item::Len => return self.take_packet(state, next, out),
            Item::Body(section) => match self.opaque && self.is(DeviceDefect::FirstEnd) && !is_gone {
                true => {
                    next.ready = true;
                    next.back.push_back(Answer::Ready);
                }
                false => next.give(self, section, 0),
            },
            Item::End => {
                let is_empty = next.window.here.is_empty() && next.window.arriving.is_empty();
                if !is_empty && !self.is(DeviceDefect::MainDoesNotWait) {
                    return out.push(self.destination_ends(state, Who::Main));
                }
                next.ended = true;
            }
            Item::Token => {
                if is_gone {
                    return out.push(self.destination_ends(state, Who::Main));
                }
                next.ready = true;
                next.back.push_back(Answer::Ready);
            }
            Item::Go => {
                next.started = true;
                if !is_gone {
                    next.back.push_back(Answer::Shut);
                }
                let all = self.sections.iter().map(|&packets| packets.max(1));
                let complete = next.given.iter().copied().eq(all) && next.live == self.live;
                if !complete {
                    next.harm = Some(DeviceHarm::StartedWithoutState);
                }
            }
            other => unreachable!("{other:?} on main"),
        }
        out.push((DeviceEvent::Reads { item: item.name() }, next));
    }

    /// Main has read that a packet follows.
    fn take_packet(&self, state: &DeviceState, mut next: DeviceState, out: &mut Steps) {
        let wanted = next.window.next;
        let by_number = |packet: &Packet| packet.number == wanted;
        let found = match self.is(DeviceDefect::InOrderOfArrival) {
            true => (!next.window.here.is_empty()).then_some(0),
            false => next.window.here.iter().position(by_number),
        };
        if let Some(index) = found {
            let packet = next.window.here.remove(index);
            next.window.next += 1;
            if packet.section != state.section {
                // It says of which it is.
                return out.push(self.destination_ends(state, Who::Main));
            }
            next.give(self, packet.section, packet.part);
            return out.push((DeviceEvent::Gives { section: packet.section, part: packet.part }, next));
        }
        if self.is(DeviceDefect::MainDoesNotWait) {
            next.window.next += 1;
            return out.push((DeviceEvent::Reads { item: "the head of a packet, and goes on without it" }, next));
        }
        if state.window.arriving.contains(&wanted) {
            return;
        }
        let joined = state.receivers.iter().filter(|receiver| !receiver.left).count();
        let wait = (0..self.channels).filter(|&channel| {
            state.receivers[channel].waits
                && state.next_packet(channel).is_some_and(|packet| self.is_beyond(state, packet))
        });
        if state.window.ended || joined > 0 && wait.count() == joined {
            out.push(self.destination_ends(state, Who::Main));
        }
    }

    fn is_beyond(&self, state: &DeviceState, packet: Packet) -> bool {
        !state.ended && packet.number >= state.window.next + self.window && !self.is(DeviceDefect::NoRoom)
    }

    fn receiver(&self, state: &DeviceState, channel: usize, out: &mut Steps) {
        let receiver = &state.receivers[channel];
        if receiver.left {
            return;
        }
        let mut next = state.clone();
        if let Some(packet) = receiver.receives
            && !receiver.cut
        {
            next.receivers[channel].receives = None;
            next.window.arriving.retain(|&number| number != packet.number);
            next.window.here.push(packet);
            return out.push((DeviceEvent::Receives { channel, packet: (packet.section, packet.part) }, next));
        }
        let Some(item) = next.links[channel].pop_front() else {
            if state.gone >> channel & 1 == 1 {
                self.channel_ends(state, channel, out);
            }
            return;
        };
        let waits = receiver.arrived.is_some_and(|round| state.rounds.round() == round);
        let is_early = self.is(DeviceDefect::StateBeforeBarrier) && matches!(item, Item::State(_));
        if waits && !is_early {
            return;
        }
        if !waits {
            next.receivers[channel].arrived = None;
        }
        match item {
            Item::Page => next.pages += 1,
            Item::Sync => match next.rounds.arrive(Party::Channel(id(channel))) {
                Ok(_) => next.receivers[channel].arrived = Some(state.rounds.round()),
                Err(_) => return out.push(self.destination_ends(state, Who::Channel(channel))),
            },
            Item::State(packet) => {
                let is_over = state.rounds.are_over() || is_early;
                let twice = packet.number < state.window.next
                    || state.window.arriving.contains(&packet.number)
                    || state.window.here.iter().any(|here| here.number == packet.number);
                let skipped = (twice || state.ended) && self.is(DeviceDefect::MainDoesNotWait);
                if skipped {
                    return out.push((DeviceEvent::Reads { item: "a packet that comes too late" }, next));
                }
                if self.is_beyond(state, packet) && is_over {
                    if !receiver.waits {
                        next.links[channel].push_front(item);
                        next.receivers[channel].waits = true;
                        out.push((DeviceEvent::WaitsForRoom { channel }, next));
                    }
                    return;
                }
                if !is_over || twice || state.ended {
                    return out.push(self.destination_ends(state, Who::Channel(channel)));
                }
                next.receivers[channel].waits = false;
                next.receivers[channel].receives = Some(packet);
                next.window.arriving.push(packet.number);
                next.window.arriving.sort_unstable();
                if next.window.arriving.len() + next.window.here.len() > self.window.into()
                    && !self.is(DeviceDefect::MainDoesNotWait)
                {
                    next.harm = Some(DeviceHarm::MoreThanRoom);
                }
            }
            other => unreachable!("{other:?} on a channel"),
        }
        out.push((DeviceEvent::TakesFrom { channel, item: item.name() }, next));
    }

    fn channel_ends(&self, state: &DeviceState, channel: usize, out: &mut Steps) {
        let receiver = &state.receivers[channel];
        if receiver.arrived.is_some_and(|round| state.rounds.round() == round) {
            return;
        }
        let end = match () {
            () if receiver.cut && !self.is(DeviceDefect::CutIsAnEnd) => End::Cut,
            () if state.reset >> channel & 1 == 1 => End::Reset,
            () => End::Clean,
        };
        let reached = match () {
            () if state.started => Reached::Decided,
            () if state.rounds.are_over() => Reached::LastSync,
            () => Reached::Rounds,
        };
        let mut next = state.clone();
        next.receivers[channel].left = true;
        next.window.ended |= !self.is(DeviceDefect::EndUntold);
        let goes_on = meaning(reached, end) == Meaning::Finished && next.rounds.leave(id(channel)).is_ok();
        match goes_on {
            true => out.push((DeviceEvent::Leaves { channel }, next)),
            false => out.push(self.destination_ends(state, Who::Channel(channel))),
        }
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
