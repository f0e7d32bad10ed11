//! The states of a migration and the steps between them.
//!
//! A page's content is its version: the section in which the guest last wrote it before it was read. Section 0 is the set-up,
//! which has a sync point and no pages; each later one is a round. Steps that no other thread can observe are joined with
//! the next one that can be observed, which leaves out interleavings and no outcome.

mod config;
mod event;
mod key;

use std::num::NonZeroU8;

pub use self::{
    config::{Config, Defect, Dialect, Flush, Membership, Order, Wait},
    event::{Event, Fault, Harm, Meeting, Side, Who, Why},
    key::Key,
};

use multifd_proto::{
    ChannelId, ProtocolError,
    rounds::{Arrival, Party, Rounds, Sync},
};

use crate::search::{Fingerprint, Model};

/// A state of the model.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// Position in the program of source main.
    pc: u8,
    main_waits: Waiting,
    /// The section that is open, or was last.
    section: u8,
    /// Pages not handed out.
    scan: u8,
    /// Pages that were taken out of the round, for the next one.
    postponed: u8,
    /// The number of the next packet, where they are numbered.
    number: u8,
    finished: bool,
    /// The version of each page on the source.
    versions: [u8; MAX_PAGES],
    /// Zero pages that channels found, with their versions; 0 for none.
    zeros: [u8; MAX_PAGES],
    senders: [Sender; MAX_CHANNELS],
    source_meeting: Account,
    /// Packets under way, by channel; main is the last.
    links: [Queue; MAX_CHANNELS + 1],
    /// Connections that are gone, one bit each; main is bit [`MAX_CHANNELS`].
    gone: u8,
    /// The confirmation is under way or there.
    shut: bool,
    receivers: [Receiver; MAX_CHANNELS],
    destination_main_waits: Waiting,
    sync_points: u8,
    started: bool,
    destination_meeting: Account,
    memory: [u8; MAX_PAGES],
    source_end: End,
    destination_end: End,
    fault_used: bool,
    defect_used: bool,
    /// Set by the step that does harm.
    pub harm: Option<Harm>,
}

impl State {
    /// Nothing of it is looked at any more, so such states need not be told apart.
    fn forget_source(&mut self) {
        self.pc = 0;
        self.number = 0;
        self.main_waits = Waiting::default();
        self.scan = 0;
        self.postponed = 0;
        self.zeros = [0; MAX_PAGES];
        self.senders = [Sender::default(); MAX_CHANNELS];
        self.source_meeting = Account::Loose([0; MAX_CHANNELS + 1]);
    }

    /// As [`forget_source`](Self::forget_source).
    fn forget_destination(&mut self) {
        self.links = [Queue::default(); MAX_CHANNELS + 1];
        self.destination_main_waits = Waiting::default();
        self.receivers = [Receiver::default(); MAX_CHANNELS];
        self.destination_meeting = Account::Loose([0; MAX_CHANNELS + 1]);
        self.memory = [0; MAX_PAGES];
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
struct Sender {
    at: Stage,
    waits: Waiting,
    /// The section it works on.
    section: u8,
    /// A page taken and not yet written: it may go with SYNC.
    held: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
enum Stage {
    #[default]
    Opening,
    Sending,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
struct Receiver {
    waits: Waiting,
    /// Applied when the wait is over.
    pending: u8,
    left: bool,
    /// Its first SYNC was read, where that makes it a member.
    joined: bool,
    /// Packets with pages since the last SYNC, where packets are numbered.
    packets: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum End {
    Running,
    Ok,
    Failed,
    /// Of the source only.
    InDoubt,
}

/// What a thread waits for: its count, and whose counts have to reach it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
struct Waiting {
    token: u8,
    /// 0: for nobody.
    parties: u8,
}

/// Who has arrived how often.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Account {
    /// The code that ships.
    Real(Rounds),
    /// Counts, where somebody does not wait; main is the last.
    Loose([u8; MAX_CHANNELS + 1]),
}

/// At most 16 packets, the first in the lowest byte; a packet is never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
struct Queue(u128);

impl Queue {
    fn len(self) -> usize {
        (128 - self.0.leading_zeros() as usize).div_ceil(8)
    }

    fn push(&mut self, packet: u8) {
        let len = self.len();
        assert!(len < 16, "the model is small enough for its queues");
        self.0 |= u128::from(packet) << (8 * len);
    }

    fn pop(&mut self) -> Option<u8> {
        let first = (self.0 & 0xff) as u8;
        self.0 >>= 8;
        (first != 0).then_some(first)
    }
}

/// `kind` in 3 bits, page in 2, version in 3.
fn packet(kind: u8, page: u8, version: u8) -> u8 {
    kind << 5 | page << 3 | version
}

const PAGE: u8 = 1;
const SYNC: u8 = 2;
const SYNC_WITH_PAGE: u8 = 3;
const FLUSH: u8 = 4;
const EOS: u8 = 5;
const ZERO: u8 = 6;
const DEVICES: u8 = 7;

fn unpack(packet: u8) -> (u8, u8, u8) {
    (packet >> 5, packet >> 3 & 3, packet & 7)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Open,
    MeetOpen,
    Flush,
    Gather,
    Zeros,
    Eos,
    Finish,
    Devices,
    AwaitShut,
}

/// The model: a configuration and the program of source main that follows from it.
#[derive(Clone, Debug)]
pub struct Protocol {
    config: Config,
    program: Vec<Op>,
}

impl Protocol {
    /// Whether the interleavings that `config` leaves out may be left out.
    pub fn is_possible(config: &Config) -> bool {
        // On a connection: pages and SYNCs; or zero pages, FLUSHes or ends of sections or both, and the devices.
        let both = config.source == Dialect::PerRound && config.destination == Dialect::PerSection;
        let sections = usize::from(config.rounds) + 1;
        let most = usize::from(config.rounds) * config.pages + sections * (1 + usize::from(both)) + 1;
        config.order != Order::SourceFirst || !config.faults && config.capacity >= most && most <= 16
    }

    /// The model of `config`.
    pub fn new(config: Config) -> Protocol {
        assert!(config.channels <= MAX_CHANNELS && config.pages <= MAX_PAGES && config.rounds <= 4);
        assert!(config.membership == Membership::Known || !config.sync_carries_pages, "SYNC has room for one of both");
        let mut section = vec![Op::Open, Op::MeetOpen];
        let per_round = config.source == Dialect::PerRound;
        let early = config.flush == Flush::Early;
        section.extend((per_round && early).then_some(Op::Flush));
        section.push(Op::Gather);
        section.extend(config.zeros_on_main.then_some(Op::Zeros));
        section.extend((per_round && !early).then_some(Op::Flush));
        // What means nothing to the destination is not modelled.
        section.extend((!per_round || config.destination == Dialect::PerSection).then_some(Op::Eos));
        let mut program = section.repeat(usize::from(config.rounds) + 1);
        program.extend([Op::Finish, Op::Devices, Op::AwaitShut]);
        assert!(Protocol::is_possible(&config), "the source looks at the destination");
        Protocol { config, program }
    }

    /// Where it begins.
    pub fn initial(&self) -> State {
        let channels = self.config.channels;
        let loose = |waits: &[Wait]| self.config.without.iter().any(|wait| waits.contains(wait));
        let source_meeting = if self.config.rounds_overlap
            || loose(&[Wait::SourceChannelsAtOpen, Wait::SourceMainAtOpen, Wait::SourceMainAtClose])
        {
            Account::Loose([0; MAX_CHANNELS + 1])
        } else {
            Account::Real(Rounds::new(channels))
        };
        let destination_meeting = if loose(&[
            Wait::DestinationMain,
            Wait::DestinationMainButLast,
            Wait::DestinationChannels,
            Wait::DestinationChannelsForMain,
        ]) {
            Account::Loose([0; MAX_CHANNELS + 1])
        } else {
            Account::Real(match self.config.membership {
                Membership::Known => Rounds::new(channels),
                Membership::Told | Membership::Numbers => Rounds::open(None),
            })
        };
        State {
            pc: 0,
            main_waits: Waiting::default(),
            section: 0,
            scan: 0,
            postponed: 0,
            number: 0,
            finished: false,
            versions: [0; MAX_PAGES],
            zeros: [0; MAX_PAGES],
            senders: [Sender::default(); MAX_CHANNELS],
            source_meeting,
            links: [Queue::default(); MAX_CHANNELS + 1],
            gone: 0,
            shut: false,
            receivers: [Receiver::default(); MAX_CHANNELS],
            destination_main_waits: Waiting::default(),
            sync_points: 0,
            started: false,
            destination_meeting,
            memory: [0; MAX_PAGES],
            source_end: End::Running,
            destination_end: End::Running,
            fault_used: false,
            defect_used: false,
            harm: None,
        }
    }

    /// Whether states that are alike are visited once.
    pub fn is_symmetric(&self) -> bool {
        self.config.symmetric && self.config.membership == Membership::Known
    }

    /// Whether both sides have ended.
    pub fn is_over(&self, state: &State) -> bool {
        state.source_end != End::Running && state.destination_end != End::Running
    }

    /// What is wrong with `state`, which has no successor if `stuck`.
    pub fn harm(&self, state: &State, stuck: bool) -> Option<Harm> {
        if state.harm.is_some() {
            return state.harm;
        }
        if !self.is_over(state) {
            return stuck.then_some(Harm::WaitsForEver);
        }
        match state.source_end {
            End::Ok if !state.started => Some(Harm::GuestLost),
            End::Failed if state.started => Some(Harm::GuestTwice),
            End::Failed | End::InDoubt if !state.fault_used => Some(Harm::GaveUp),
            _ => None,
        }
    }

    /// Whether the source ended without an answer after the end of its stream: its VM stays paused.
    pub fn is_in_doubt(&self, state: &State) -> bool {
        state.source_end == End::InDoubt
    }

    /// Every step that can be made from `state`.
    pub fn successors(&self, state: &State, out: &mut Vec<(Event, State)>) {
        if state.harm.is_some() {
            return;
        }
        if self.config.order != Order::Any {
            self.arrival(state, out);
            if !out.is_empty() {
                return;
            }
        }
        if state.source_end == End::Running {
            self.source_main(state, out);
            for channel in 0..self.config.channels {
                self.sender(state, channel, out);
            }
        }
        // Without faults nothing that the destination does before it confirms is seen by the source, and a step of the
        // source does no more to the destination than to put something behind all that is in a connection. So the steps
        // of the one commute with those of the other and disable none of them, and all harm that is not a wait forever
        // shows at the destination: whatever can happen can also happen with the source's steps first.
        if self.config.order == Order::SourceFirst && !out.is_empty() {
            return;
        }
        if state.destination_end == End::Running {
            self.destination_main(state, out);
            for channel in 0..self.config.channels {
                self.receiver(state, channel, out);
            }
        }
        if self.config.faults && !state.fault_used && !self.is_over(state) {
            self.faults(state, out);
        }
    }

    /// A thread whose next step is nothing but an arrival: that step alone, if there is one.
    ///
    /// An arrival is its thread's only step, commutes with every step of every other thread, disables none and does no
    /// harm; and no path of the model returns to a state. So whatever can happen can also happen with this step first.
    /// (The destination's arrivals are taken from a connection, which a fault may empty; without faults they qualify.)
    fn arrival(&self, state: &State, out: &mut Vec<(Event, State)>) {
        if state.source_end == End::Running {
            let op = self.program[usize::from(state.pc)];
            if op == Op::MeetOpen && !self.config.rounds_overlap {
                self.source_main(state, out);
            }
            for channel in 0..self.config.channels {
                if out.is_empty() && state.senders[channel].at == Stage::Opening && !self.config.rounds_overlap {
                    self.sender(state, channel, out);
                }
            }
        }
        // An arrival with which a channel joins does not commute with main's.
        if state.destination_end == End::Running && !self.config.faults && self.config.membership == Membership::Known {
            let waits = |kind: u8, link: usize| unpack((state.links[link].0 & 0xff) as u8).0 == kind;
            if out.is_empty() && (waits(FLUSH, MAIN) || waits(EOS, MAIN)) {
                self.destination_main(state, out);
            }
            for channel in 0..self.config.channels {
                if out.is_empty() && waits(SYNC, channel) && state.receivers[channel].pending == 0 {
                    self.receiver(state, channel, out);
                }
            }
        }
    }

    fn source_main(&self, state: &State, out: &mut Vec<(Event, State)>) {
        if !self.released(&state.source_meeting, state.main_waits) {
            return;
        }
        let op = self.program[usize::from(state.pc)];
        let mut next = state.clone();
        next.main_waits = Waiting::default();
        next.pc += 1;
        match op {
            Op::Open => self.open(state, &next, out),
            Op::MeetOpen if self.config.rounds_overlap => self.source_main(&next, out),
            Op::MeetOpen => out.push(self.source_main_meets(next)),
            Op::Gather => {
                self.postpone(state, out);
                let goes_on = if self.config.rounds_overlap {
                    // All pages are handed out: nobody waits for the SYNCs.
                    state.scan == 0
                } else {
                    self.is_missing(Wait::SourceMainAtClose) || self.gathered(&state.source_meeting)
                };
                if goes_on {
                    self.source_main(&next, out);
                }
            }
            Op::Flush | Op::Eos => {
                let section = state.section;
                let (kind, sent, omitted) = if op == Op::Flush {
                    (FLUSH, Event::SendsFlush { section }, Event::OmitsFlush { section })
                } else {
                    (EOS, Event::SendsEos { section }, Event::OmitsFlush { section })
                };
                let last = section == self.config.rounds;
                if self.config.defect == Some(Defect::NoLastBarrier) && last {
                    return out.push((omitted, next));
                }
                if self.config.defect == Some(Defect::NoFlush) && !state.defect_used {
                    let mut without = next.clone();
                    without.defect_used = true;
                    out.push((omitted, without));
                }
                self.write(state, next, Who::Main, packet(kind, 0, 0), sent, out);
            }
            Op::Zeros => {
                let pages: Vec<u8> = (0..MAX_PAGES as u8).filter(|&page| state.zeros[usize::from(page)] != 0).collect();
                if pages.is_empty() {
                    return self.source_main(&next, out);
                }
                if state.gone >> MAIN & 1 == 1 {
                    return out.push(self.source_ends(state, Why::WriteFailed(Who::Main)));
                }
                next.zeros = [0; MAX_PAGES];
                let event = Event::NamesZeros { pages: pages.iter().fold(0, |set, page| set | 1 << page) };
                orders(&pages, &mut |order| {
                    let mut named = next.clone();
                    for &page in order {
                        named.links[MAIN].push(packet(ZERO, page, state.zeros[usize::from(page)]));
                    }
                    out.push((event, named));
                });
            }
            Op::Finish => {
                next.finished = true;
                if self.config.rounds_overlap {
                    // Joins them.
                    if state.senders[..self.config.channels].iter().all(|sender| sender.section > self.config.rounds) {
                        out.push((Event::SendersEnd, next));
                    }
                    return;
                }
                out.push(self.source_main_meets(next));
            }
            Op::Devices => {
                self.write(state, next, Who::Main, packet(DEVICES, 0, 0), Event::SendsDevices, out);
            }
            Op::AwaitShut => {
                if state.shut {
                    next.source_end = End::Ok;
                    next.gone = ALL_GONE;
                    next.forget_source();
                    out.push((Event::Confirmed, next));
                } else if state.gone >> MAIN & 1 == 1 {
                    out.push(self.source_ends(state, Why::Eof(Who::Main)));
                }
            }
        }
    }

    /// Opens a section, with any pages written since the one before; the first with pages has all of them.
    fn open(&self, state: &State, next: &State, out: &mut Vec<(Event, State)>) {
        let mut next = next.clone();
        next.section = if state.pc == 0 { 0 } else { state.section + 1 };
        let all = (1u8 << self.config.pages) - 1;
        let choices = match next.section {
            0 => 0..=0,
            1 => all..=all,
            _ => 0..=all,
        };
        for dirty in choices {
            let mut opened = next.clone();
            for page in (0..self.config.pages).filter(|page| dirty >> page & 1 == 1) {
                opened.versions[page] = opened.section;
            }
            // Whatever was not handed out is still dirty.
            let postponed = std::mem::take(&mut opened.postponed);
            opened.scan |= dirty;
            if self.config.defect != Some(Defect::PostponedIsForgotten) {
                opened.scan |= postponed;
            }
            out.push((Event::Opens { section: opened.section, dirty }, opened));
        }
    }

    /// While main waits for the channels, it takes any page out of the round that no channel has taken.
    fn postpone(&self, state: &State, out: &mut Vec<(Event, State)>) {
        let last = state.section == self.config.rounds && self.config.defect != Some(Defect::PostponedInTheLast);
        if !self.config.postpones || last {
            return;
        }
        for page in (0..self.config.pages as u8).filter(|page| state.scan >> page & 1 == 1) {
            let mut next = state.clone();
            next.scan &= !(1 << page);
            next.postponed |= 1 << page;
            out.push((Event::Postpones { page }, next));
        }
    }

    fn source_main_meets(&self, mut state: State) -> (Event, State) {
        let parties = if self.is_missing(Wait::SourceMainAtOpen) { 0 } else { self.everybody() };
        let token = self.arrive(&mut state.source_meeting, Who::Main).expect("nobody leaves a source's barrier");
        state.main_waits = Waiting { token, parties };
        (Event::Meets { side: Side::Source, party: Who::Main, at: Meeting::Open }, state)
    }

    fn sender(&self, state: &State, channel: usize, out: &mut Vec<(Event, State)>) {
        let sender = state.senders[channel];
        if !self.released(&state.source_meeting, sender.waits) {
            return;
        }
        let mut next = state.clone();
        next.senders[channel].waits = Waiting::default();
        match sender.at {
            Stage::Opening if self.config.rounds_overlap => {
                if sender.section <= self.config.rounds && state.pc > 0 && sender.section <= state.section {
                    next.senders[channel].at = Stage::Sending;
                    self.sender(&next, channel, out);
                }
            }
            Stage::Opening => out.push(self.sender_meets(next, channel)),
            Stage::Sending => {
                if state.finished && sender.section > self.config.rounds {
                    return;
                }
                let own = !self.config.rounds_overlap || sender.section == state.section;
                if state.scan != 0 && own {
                    self.send(state, &next, channel, out);
                } else {
                    self.sync(state, &next, channel, out);
                }
            }
        }
    }

    /// Waits for the next round to be opened.
    fn sender_meets(&self, mut state: State, channel: usize) -> (Event, State) {
        let parties = if self.is_missing(Wait::SourceChannelsAtOpen) { 0 } else { self.everybody() };
        let who = Who::Channel(channel);
        let token = self.arrive(&mut state.source_meeting, who).expect("nobody leaves a source's barrier");
        state.senders[channel].waits = Waiting { token, parties };
        state.senders[channel].at = Stage::Sending;
        (Event::Meets { side: Side::Source, party: who, at: Meeting::Open }, state)
    }

    /// Takes any page.
    fn send(&self, state: &State, next: &State, channel: usize, out: &mut Vec<(Event, State)>) {
        for page in (0..self.config.pages).filter(|page| state.scan >> page & 1 == 1) {
            let version = state.versions[page];
            let mut taken = next.clone();
            taken.scan &= !(1 << page);
            let page = page as u8;
            if self.config.zeros_on_main {
                let mut zero = taken.clone();
                zero.zeros[usize::from(page)] = version;
                out.push((Event::FindsZero { channel, page, version }, zero));
            }
            let held = std::mem::take(&mut taken.senders[channel].held);
            if held != 0 {
                if state.gone >> channel & 1 == 1 {
                    out.push(self.source_ends(state, Why::WriteFailed(Who::Channel(channel))));
                    continue;
                }
                taken.links[channel].push(held);
            }
            if self.config.sync_carries_pages {
                let mut holding = taken.clone();
                holding.senders[channel].held = packet(PAGE, page, version);
                out.push((Event::SendsPage { channel, page, version, held: true }, holding));
            }
            taken.number += u8::from(self.config.membership != Membership::Known);
            let event = Event::SendsPage { channel, page, version, held: false };
            self.write(state, taken, Who::Channel(channel), packet(PAGE, page, version), event, out);
        }
    }

    /// The scan is empty: writes SYNC, and arrives where the next round opens in the same step.
    fn sync(&self, state: &State, next: &State, channel: usize, out: &mut Vec<(Event, State)>) {
        let mut next = next.clone();
        let sender = &mut next.senders[channel];
        let section = sender.section;
        let held = std::mem::take(&mut sender.held);
        sender.section += 1;
        sender.at = Stage::Opening;
        let closes = |next: State| if self.config.rounds_overlap { next } else { self.sender_meets(next, channel).1 };
        let last = section == self.config.rounds;
        let omits = self.config.defect == Some(Defect::NoLastBarrier) && last;
        let may_omit = self.config.defect == Some(Defect::NoSync) && !state.defect_used;
        if omits || may_omit {
            let mut without = next.clone();
            if held != 0 {
                without.links[channel].push(held);
            }
            without.defect_used |= may_omit;
            out.push((Event::OmitsSync { channel, section }, closes(without)));
            if omits {
                return;
            }
        }
        let (_, page, version) = unpack(held);
        let (bytes, with) = match held {
            0 => (packet(SYNC, state.number >> 3, state.number & 7), None),
            _ => (packet(SYNC_WITH_PAGE, page, version), Some((page, version))),
        };
        next.number += u8::from(self.config.membership != Membership::Known);
        let event = Event::SendsSync { channel, section, page: with };
        self.write(state, closes(next), Who::Channel(channel), bytes, event, out);
    }

    /// Writes `packet` to a connection: waits for room, and ends the source where it is gone.
    fn write(&self, state: &State, mut next: State, to: Who, packet: u8, event: Event, out: &mut Vec<(Event, State)>) {
        let link = link(to);
        if state.gone >> link & 1 == 1 {
            out.push(self.source_ends(state, Why::WriteFailed(to)));
        } else if next.links[link].len() < self.config.capacity {
            next.links[link].push(packet);
            out.push((event, next));
        }
    }

    /// All threads of the source return, and its connections close.
    fn source_ends(&self, state: &State, why: Why) -> (Event, State) {
        let mut next = state.clone();
        // The commit in one step, see `commit`: only the confirmation ends the doubt.
        let asked = self.program.get(usize::from(state.pc)).is_some_and(|&op| op == Op::AwaitShut);
        next.source_end = if asked { End::InDoubt } else { End::Failed };
        next.gone = ALL_GONE;
        next.forget_source();
        (Event::Ends { side: Side::Source, why }, next)
    }

    fn destination_main(&self, state: &State, out: &mut Vec<(Event, State)>) {
        if !self.released(&state.destination_meeting, state.destination_main_waits) {
            return;
        }
        let mut next = state.clone();
        next.destination_main_waits = Waiting::default();
        if state.started {
            if state.gone >> MAIN & 1 == 1 {
                next.destination_end = End::Ok;
                next.gone = ALL_GONE;
                next.forget_destination();
                out.push((Event::Ends { side: Side::Destination, why: Why::Done }, next));
            }
            return;
        }
        let Some(packet) = next.links[MAIN].pop() else {
            if state.gone >> MAIN & 1 == 1 {
                out.push(self.destination_ends(state, Why::Eof(Who::Main)));
            }
            return;
        };
        match unpack(packet) {
            (kind @ (FLUSH | EOS), ..) => {
                let eos = kind == EOS;
                // FLUSH is a sync point in either dialect.
                if eos && self.config.destination == Dialect::PerRound {
                    return out.push((Event::IgnoresEos, next));
                }
                if let Account::Real(rounds) = &mut next.destination_meeting {
                    let joined = rounds.members.joined();
                    if self.config.defect == Some(Defect::GuessedAtSyncPoint(next.sync_points)) {
                        if rounds.members.channels().is_none() {
                            rounds.members = Rounds::new(joined).members;
                        }
                    } else if !eos {
                        rounds.members.expect_channels();
                    }
                }
                next.sync_points += 1;
                let missing = self.is_missing(Wait::DestinationMain)
                    || self.is_missing(Wait::DestinationMainButLast) && next.sync_points <= self.config.rounds;
                match self.arrive(&mut next.destination_meeting, Who::Main) {
                    Ok(token) => {
                        next.destination_main_waits =
                            Waiting { token, parties: if missing { 0 } else { self.everybody() } };
                        out.push((Event::TakesSyncPoint { eos }, next));
                    }
                    Err(_) => out.push(self.destination_ends(state, Why::Eof(Who::Main))),
                }
            }
            (ZERO, page, version) => out.push(self.apply(next, Who::Main, page, version)),
            (DEVICES, ..)
                if self.config.membership != Membership::Known && !is_complete(&mut next.destination_meeting) =>
            {
                out.push(self.destination_ends(state, Why::Incomplete));
            }
            (DEVICES, ..) => {
                next.started = true;
                next.shut = state.gone >> MAIN & 1 == 0;
                if next.memory != next.versions {
                    next.harm = Some(Harm::StartedStale);
                }
                out.push((Event::Starts, next));
            }
            other => unreachable!("{other:?} on main"),
        }
    }

    fn receiver(&self, state: &State, channel: usize, out: &mut Vec<(Event, State)>) {
        let receiver = state.receivers[channel];
        if receiver.left || !self.released(&state.destination_meeting, receiver.waits) {
            return;
        }
        let mut next = state.clone();
        next.receivers[channel].waits = Waiting::default();
        if receiver.pending != 0 {
            let (_, page, version) = unpack(receiver.pending);
            next.receivers[channel].pending = 0;
            return out.push(self.apply(next, Who::Channel(channel), page, version));
        }
        let Some(packet) = next.links[channel].pop() else {
            if state.gone >> channel & 1 == 1 {
                next.receivers[channel].left = true;
                let Account::Real(rounds) = &mut next.destination_meeting else { return };
                match rounds.leave(id(channel)) {
                    Ok(()) => {
                        out.push((Event::Ends { side: Side::Destination, why: Why::Eof(Who::Channel(channel)) }, next))
                    }
                    Err(_) => out.push(self.destination_ends(state, Why::Eof(Who::Channel(channel)))),
                }
            }
            return;
        };
        match unpack(packet) {
            (PAGE, page, version) => {
                next.receivers[channel].packets += u8::from(self.config.membership != Membership::Known);
                out.push(self.apply(next, Who::Channel(channel), page, version));
            }
            (SYNC, high, low) if self.config.membership != Membership::Known => {
                self.take_member_sync(state, next, channel, high << 3 | low, out);
            }
            (SYNC, ..) => self.take_sync(state, next, channel, None, out),
            (SYNC_WITH_PAGE, page, version) => {
                match self.config.defect {
                    Some(Defect::SyncPagesDropped) => {}
                    Some(Defect::SyncBeforeItsPages) => next.receivers[channel].pending = packet,
                    _ => next = self.apply(next, Who::Channel(channel), page, version).1,
                }
                self.take_sync(state, next, channel, Some((page, version)), out);
            }
            other => unreachable!("{other:?} on a channel"),
        }
    }

    fn take_sync(
        &self,
        state: &State,
        mut next: State,
        channel: usize,
        page: Option<(u8, u8)>,
        out: &mut Vec<(Event, State)>,
    ) {
        let parties = if self.is_missing(Wait::DestinationChannels) {
            0
        } else if self.is_missing(Wait::DestinationChannelsForMain) {
            self.everybody() & !(1 << MAIN)
        } else {
            self.everybody()
        };
        match self.arrive(&mut next.destination_meeting, Who::Channel(channel)) {
            Ok(token) => {
                next.receivers[channel].waits = Waiting { token, parties };
                out.push((Event::TakesSync { channel, page }, next));
            }
            Err(_) => out.push(self.destination_ends(state, Why::Eof(Who::Channel(channel)))),
        }
    }

    /// As [`take_sync`](Self::take_sync) where a channel joins with its first SYNC.
    fn take_member_sync(
        &self,
        state: &State,
        mut next: State,
        channel: usize,
        number: u8,
        out: &mut Vec<(Event, State)>,
    ) {
        let Account::Real(rounds) = &mut next.destination_meeting else { unreachable!("all waits are there") };
        let receiver = &mut next.receivers[channel];
        let sync = Sync { number: number.into(), packets: std::mem::take(&mut receiver.packets).into() };
        let round = rounds.round();
        let arrival = if std::mem::replace(&mut receiver.joined, true) {
            rounds.sync(id(channel), sync)
        } else {
            let channels = u8::try_from(self.config.channels).expect("few channels");
            let told = NonZeroU8::new(channels).filter(|_| self.config.membership == Membership::Told);
            if rounds.admit(id(channel), told).is_err() {
                // Ignored from here on, as a stranger.
                receiver.left = true;
                return out.push((Event::IsIgnored { channel }, next));
            }
            match rounds.join(id(channel), told, sync) {
                Ok(Arrival::Joins) if self.config.defect == Some(Defect::FirstSyncCounts) => {
                    rounds.sync(id(channel), sync)
                }
                arrival => arrival,
            }
        };
        match arrival {
            Ok(arrival) => {
                let parties = if arrival == Arrival::Joins { 0 } else { self.everybody() };
                receiver.waits = Waiting { token: u8::try_from(round).expect("few rounds"), parties };
                out.push((Event::TakesSync { channel, page: None }, next));
            }
            Err(_) => out.push(self.destination_ends(state, Why::Eof(Who::Channel(channel)))),
        }
    }

    fn apply(&self, mut state: State, by: Who, page: u8, version: u8) -> (Event, State) {
        let over = std::mem::replace(&mut state.memory[usize::from(page)], version);
        if over > version {
            state.harm = Some(Harm::Overtaken);
        } else if state.started {
            state.harm = Some(Harm::StartedStale);
        }
        (Event::Applies { by, page, version, over }, state)
    }

    /// All threads of the destination return, and its connections close.
    fn destination_ends(&self, state: &State, why: Why) -> (Event, State) {
        let mut next = state.clone();
        next.destination_end = End::Failed;
        next.gone = ALL_GONE;
        next.forget_destination();
        (Event::Ends { side: Side::Destination, why }, next)
    }

    fn faults(&self, state: &State, out: &mut Vec<(Event, State)>) {
        // A destination that has started the VM cannot be cancelled.
        for (side, possible) in [
            (Side::Source, state.source_end == End::Running),
            (Side::Destination, state.destination_end == End::Running && !state.started),
        ] {
            if possible {
                let (_, mut next) = match side {
                    Side::Source => self.source_ends(state, Why::Done),
                    Side::Destination => self.destination_ends(state, Why::Done),
                };
                next.fault_used = true;
                out.push((Event::Fault(Fault::Stops(side)), next));
            }
        }
        let channels = (0..self.config.channels).map(Who::Channel);
        for connection in channels.chain([Who::Main]).filter(|&who| state.gone >> link(who) & 1 == 0) {
            for lost in [false, true] {
                let mut next = state.clone();
                next.fault_used = true;
                next.gone |= 1 << link(connection);
                if lost {
                    if next.links[link(connection)] == Queue::default() && !(next.shut && connection == Who::Main) {
                        continue;
                    }
                    next.links[link(connection)] = Queue::default();
                    next.shut &= connection != Who::Main;
                }
                out.push((Event::Fault(Fault::Cut { connection, lost }), next));
            }
        }
    }

    fn arrive(&self, account: &mut Account, who: Who) -> Result<u8, ProtocolError> {
        match account {
            Account::Real(rounds) => {
                let round = rounds.round();
                let party = match who {
                    Who::Main => Party::Main,
                    Who::Channel(channel) => Party::Channel(id(channel)),
                };
                let _: Arrival = rounds.arrive(party)?;
                Ok(u8::try_from(round).expect("few rounds"))
            }
            Account::Loose(counts) => {
                counts[link(who)] += 1;
                Ok(counts[link(who)])
            }
        }
    }

    /// Whether all channels have arrived once more than source main has.
    fn gathered(&self, account: &Account) -> bool {
        match account {
            Account::Real(rounds) => rounds.awaits_main_only(),
            Account::Loose(counts) => counts[..self.config.channels].iter().all(|&count| count > counts[MAIN]),
        }
    }

    fn released(&self, account: &Account, waiting: Waiting) -> bool {
        waiting.parties == 0
            || match account {
                Account::Real(rounds) => rounds.round() != u64::from(waiting.token),
                Account::Loose(counts) => (0..=MAX_CHANNELS)
                    .filter(|link| waiting.parties >> link & 1 == 1)
                    .all(|link| counts[link] >= waiting.token),
            }
    }

    fn is_missing(&self, wait: Wait) -> bool {
        self.config.without.contains(&wait)
    }

    fn everybody(&self) -> u8 {
        ((1 << self.config.channels) - 1) | (1 << MAIN)
    }
}

/// Whether the destination knows that all channels are there, and none goes on.
fn is_complete(account: &mut Account) -> bool {
    match account {
        Account::Real(rounds) => rounds.members.is_complete() && rounds.close().is_ok(),
        Account::Loose(_) => true,
    }
}

/// Shows `use_it` the elements of `all` in every order.
fn orders(all: &[u8], use_it: &mut dyn FnMut(&[u8])) {
    fn extend(order: &mut Vec<u8>, all: &[u8], use_it: &mut dyn FnMut(&[u8])) {
        if order.len() == all.len() {
            return use_it(order);
        }
        for element in all {
            if !order.contains(element) {
                order.push(*element);
                extend(order, all, use_it);
                order.pop();
            }
        }
    }
    extend(&mut Vec::new(), all, use_it);
}

fn link(who: Who) -> usize {
    match who {
        Who::Main => MAIN,
        Who::Channel(channel) => channel,
    }
}

fn id(channel: usize) -> ChannelId {
    ChannelId(u8::try_from(channel).expect("few channels"))
}

/// Most channels in a model.
pub const MAX_CHANNELS: usize = 3;
/// Most pages in a model.
pub const MAX_PAGES: usize = 3;
const MAIN: usize = MAX_CHANNELS;
const ALL_GONE: u8 = u8::MAX;

impl Model for Protocol {
    type State = State;
    type Event = Event;
    type Harm = Harm;

    fn initial(&self) -> State {
        self.initial()
    }

    fn successors(&self, state: &State, out: &mut Vec<(Event, State)>) {
        self.successors(state, out);
    }

    fn harm(&self, state: &State, successors: &[(Event, State)]) -> Option<Harm> {
        self.harm(state, successors.is_empty())
    }

    fn is_over(&self, state: &State) -> bool {
        self.is_over(state)
    }

    fn is_in_doubt(&self, state: &State) -> bool {
        self.is_in_doubt(state)
    }

    fn fingerprint(&self, state: &State, fingerprint: &Fingerprint) -> u128 {
        if self.is_symmetric() { fingerprint.of(&self.key(state)) } else { fingerprint.of(state) }
    }
}
