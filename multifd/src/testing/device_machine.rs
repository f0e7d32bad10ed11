//! Checks recorded steps against the machine of device state: each has to be one that `proof/device_state_law.py` allows.
//!
//! The guards have the sentences that they have there, and a test compares them. A trace shows packets, and not what main brings itself; what
//! else it cannot show is in [`UNSEEN`]. Without READY in it there is one step less to the commit, and the proof is not of that.

use std::collections::{BTreeSet, VecDeque};

use multifd_proto::{ChannelId, rounds::Party};

use super::trace::Refused;
use crate::{
    destination::STATE_WINDOW as WINDOW,
    round::{
        device_trace::{DeviceStep, Takes},
        trace::Step,
    },
};

/// Checks that each of `steps` is allowed, with this many channels.
pub(super) fn check(steps: &[Step], channels: usize) -> Result<(), Refused> {
    let two_step = steps.contains(&Step::Device(DeviceStep::Ready)) || steps.contains(&Step::Device(DeviceStep::Go));
    let channel = Channel { synced: 0, arrived: 0, holds: None, flying: VecDeque::new(), arriving: None, over: false };
    let mut machine = Machine { channels: vec![channel; channels], two_step, ..Machine::default() };
    for (index, step) in steps.iter().enumerate() {
        machine.take(step).map_err(|guard| Refused { prefix: steps[..=index].to_vec(), guard })?;
    }
    Ok(())
}

/// The state, as far as a trace shows it.
#[derive(Default)]
struct Machine {
    channels: Vec<Channel>,
    two_step: bool,
    /// Sections of RAM that were opened behind the set-up.
    opened: u64,
    main_arrived: u64,
    /// Packets that were numbered, and those of them that main has spoken of.
    next: u64,
    told: u64,
    queue: VecDeque<u64>,
    closed: bool,
    ended: bool,
    /// Whose rest has come.
    here: BTreeSet<u64>,
    wanted: u64,
    ready: bool,
    go: bool,
}

#[derive(Clone)]
struct Channel {
    synced: u64,
    arrived: u64,
    holds: Option<u64>,
    flying: VecDeque<u64>,
    arriving: Option<u64>,
    over: bool,
}

const NOT_LAST: &str = "the last round is not open";
const LAST_SYNC: &str = "it has written its last SYNC";
const NOT_OVER: &str = "it has not ended";
const HOLDS_NONE: &str = "it holds none";
const QUEUED: &str = "it is in the queue";
const FIRST: &str = "it is the first there";
const HOLDS: &str = "a channel holds it";
const NO_MORE: &str = "no packet follows, or it takes none";
const EMPTY: &str = "the queue is empty, or it takes none";
const NOT_BEFORE: &str = "main has not";
const ALL_TOLD: &str = "all is told";
const NEXT: &str = "the packet is the next on its connection";
const ARRIVED: &str = "the channel has read its last SYNC";
const PASSED: &str = "all have passed the barrier";
const DONE: &str = "the channel is done with the one before";
const ROOM: &str = "there is room for it";
const ONCE: &str = "its number did not come before";
const HEAD_READ: &str = "its head was read";
const WORD: &str = "main has written the next word";
const HERE: &str = "the packet is there";
const WANTED: &str = "it has the number that comes next";
const WRITTEN: &str = "it is written";
const ALL_DONE: &str = "main is done with all words";
const LAST_BARRIER: &str = "main has passed the last barrier";
const NONE_LEFT: &str = "no packet is left in the window";
const READY_CAME: &str = "READY has come";
const ALL_OVER: &str = "every channel has ended";
const IS_READY: &str = "it is ready";
const GO_CAME: &str = "GO has come";
/// Not ones of the machine's: a trace names packets and channels by number.
const IN_ORDER: &str = "packets are numbered without gaps";
const KNOWN: &str = "there is such a channel";

fn guard(holds: bool, sentence: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(sentence) }
}

impl Machine {
    fn channel(&mut self, id: ChannelId) -> Result<&mut Channel, &'static str> {
        self.channels.get_mut(id.index()).ok_or(KNOWN)
    }

    /// What a sync point behind the last section is counted as: one of the set-up comes before the first.
    fn last(&self) -> u64 {
        self.opened + 1
    }

    fn is_past_last_barrier(&self) -> bool {
        self.main_arrived == self.last() && self.channels.iter().all(|channel| channel.arrived == self.last())
    }

    fn take(&mut self, step: &Step) -> Result<(), &'static str> {
        match *step {
            Step::Drain(_) | Step::Section => {
                guard(self.next == 0, NOT_LAST)?;
                self.opened += 1;
            }
            Step::Sync(Party::Channel(id)) => self.channel(id)?.synced += 1,
            Step::Arrive(Party::Channel(id)) => self.channel(id)?.arrived += 1,
            Step::Arrive(Party::Main) => self.main_arrived += 1,
            Step::End => {
                guard(self.told == self.next, ALL_TOLD)?;
                self.ended = true;
            }
            Step::Start if self.two_step => {
                guard(self.ready, IS_READY)?;
                guard(self.go, GO_CAME)?;
            }
            Step::Device(step) => self.device(step)?,
            _ => {}
        }
        Ok(())
    }

    fn device(&mut self, step: DeviceStep) -> Result<(), &'static str> {
        let last = self.last();
        match step {
            DeviceStep::Put(number) => {
                guard(number == self.next, IN_ORDER)?;
                self.next += 1;
                self.queue.push_back(number);
            }
            DeviceStep::Tell => self.told = self.next,
            DeviceStep::Close => {
                guard(!self.closed, NOT_BEFORE)?;
                self.closed = true;
            }
            DeviceStep::Take(id, number) => {
                let channel = self.channel(id)?;
                guard(channel.synced == last, LAST_SYNC)?;
                guard(!channel.over, NOT_OVER)?;
                guard(channel.holds.is_none(), HOLDS_NONE)?;
                channel.holds = Some(number);
                guard(self.queue.contains(&number), QUEUED)?;
                guard(self.queue.pop_front() == Some(number), FIRST)?;
            }
            DeviceStep::Write(id, number) => {
                let channel = self.channel(id)?;
                guard(channel.holds.take() == Some(number), HOLDS)?;
                channel.flying.push_back(number);
            }
            DeviceStep::Over(id, takes) => {
                let (closed, is_empty) = (self.closed, self.queue.is_empty());
                let channel = self.channel(id)?;
                guard(!channel.over, NOT_OVER)?;
                guard(channel.synced == last, LAST_SYNC)?;
                guard(closed || takes == Takes::None, NO_MORE)?;
                guard(is_empty || takes == Takes::None, EMPTY)?;
                guard(channel.holds.is_none(), HOLDS_NONE)?;
                channel.over = true;
            }
            DeviceStep::Head(id, number) => {
                let (passed, wanted) = (self.is_past_last_barrier(), self.wanted);
                let came =
                    self.here.contains(&number) || self.channels.iter().any(|channel| channel.arriving == Some(number));
                let channel = self.channel(id)?;
                guard(channel.arriving.is_none(), DONE)?;
                guard(channel.flying.pop_front() == Some(number), NEXT)?;
                guard(channel.arrived == last, ARRIVED)?;
                guard(passed, PASSED)?;
                guard(number < wanted + WINDOW, ROOM)?;
                guard(number >= wanted && !came, ONCE)?;
                channel.arriving = Some(number);
            }
            DeviceStep::Come(number) => {
                let channel = self.channels.iter_mut().find(|channel| channel.arriving == Some(number));
                channel.ok_or(HEAD_READ)?.arriving = None;
                self.here.insert(number);
            }
            DeviceStep::Unpack(number) => {
                guard(number < self.told, WORD)?;
                guard(self.here.remove(&number), HERE)?;
                guard(number == self.wanted, WANTED)?;
                self.wanted += 1;
            }
            DeviceStep::Ready => {
                guard(self.ended, WRITTEN)?;
                guard(self.wanted == self.told, ALL_DONE)?;
                guard(self.is_past_last_barrier(), LAST_BARRIER)?;
                let is_empty = self.here.is_empty() && self.channels.iter().all(|channel| channel.arriving.is_none());
                guard(is_empty, NONE_LEFT)?;
                self.ready = true;
            }
            DeviceStep::Go => {
                guard(self.ready, READY_CAME)?;
                guard(self.channels.iter().all(|channel| channel.over), ALL_OVER)?;
                guard(!self.go, NOT_BEFORE)?;
                self.go = true;
            }
        }
        Ok(())
    }
}

/// Guards of the machine that a trace does not show.
#[cfg(not(any(loom, shuttle)))]
const UNSEEN: [&str; 37] = [
    "the source has neither given up nor ended",
    "the destination has neither started nor given up",
    "main waits for no buffer",
    "the last FLUSH is written",
    "the VM has not saved all",
    "main is alive",
    "its connection is alive",
    "the last round is over, but for state of the running guest",
    "the end was not read",
    "it is not open",
    "PONG has come for all of it",
    "the last round is open",
    "it has not",
    "every channel has written its last SYNC",
    "main has spoken of all packets but fewer than a batch",
    "the VM has one",
    "there is a buffer",
    "there is one",
    "the batch is complete, or all was saved",
    "the VM has saved all",
    "it takes packets",
    "its connection has room",
    "it is not in place",
    "its page is in place",
    "all before it was read",
    "every channel has read its last SYNC",
    "main has read its FLUSH",
    "they have not",
    "it is on main",
    "a packet follows",
    "the source does not know",
    "it does",
    "main is, or the destination has given up, or a channel has something to write",
    "it is",
    "it has not ended before",
    "it is not there",
    "a channel has ended",
];

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::testing::machine::guards;

    /// Read when the test runs: the package alone has no proof.
    const PROOF: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../proof/device_state_law.py");

    /// Two channels, no pages, two packets.
    fn migration() -> Vec<Step> {
        use DeviceStep::*;
        let [a, b] = [0, 1].map(ChannelId);
        let [sync, arrive] = [Step::Sync as fn(Party) -> Step, Step::Arrive];
        let both = |step: fn(Party) -> Step| [a, b].map(|id| step(Party::Channel(id)));
        let device = |steps: &[DeviceStep]| steps.iter().copied().map(Step::Device).collect::<Vec<_>>();
        [
            both(sync).to_vec(),
            vec![Step::Drain(vec![])],
            both(arrive).to_vec(),
            vec![Step::Arrive(Party::Main)],
            both(sync).to_vec(),
            device(&[Put(0), Take(a, 0), Put(1), Tell, Take(b, 1), Write(b, 1), Write(a, 0)]),
            vec![Step::End],
            device(&[Close, Over(a, Takes::Packets), Over(b, Takes::Packets)]),
            both(arrive).to_vec(),
            vec![Step::Arrive(Party::Main)],
            device(&[Head(b, 1), Come(1), Head(a, 0), Come(0), Unpack(0), Unpack(1), Ready, Go]),
            vec![Step::Start],
        ]
        .concat()
    }

    #[test]
    fn a_whole_migration_is_allowed() {
        check(&migration(), 2).unwrap();
    }

    /// By each step of the migration, what is refused when it is left out.
    #[test]
    fn a_step_too_few_is_refused_by_the_guard_that_needs_it() {
        let steps = migration();
        let refused = |left_out: usize| {
            let mut rest = steps.clone();
            rest.remove(left_out);
            check(&rest, 2).err().map(|refused| refused.guard)
        };
        let found: Vec<Option<&str>> = (0..steps.len()).map(refused).collect();
        let expected = [
            Some(LAST_SYNC),
            Some(LAST_SYNC),
            Some(LAST_SYNC),
            Some(PASSED),
            Some(ARRIVED),
            Some(PASSED),
            Some(LAST_SYNC),
            Some(LAST_SYNC),
            Some(QUEUED),
            Some(FIRST),
            Some(QUEUED),
            Some(ALL_TOLD),
            Some(HOLDS),
            Some(HOLDS_NONE),
            Some(HOLDS_NONE),
            Some(WRITTEN),
            Some(NO_MORE),
            Some(ALL_OVER),
            Some(ALL_OVER),
            Some(PASSED),
            Some(ARRIVED),
            Some(PASSED),
            Some(HEAD_READ),
            Some(HERE),
            Some(HEAD_READ),
            Some(HERE),
            Some(WANTED),
            Some(ALL_DONE),
            Some(READY_CAME),
            Some(GO_CAME),
            None,
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_packet_twice_too_far_ahead_or_of_another_order_is_refused() {
        use DeviceStep::*;
        let [a, b] = [0, 1].map(ChannelId);
        let steps = migration();
        let saved = steps.iter().position(|step| *step == Step::Device(Put(0))).unwrap();
        let received = steps.iter().position(|step| *step == Step::Device(Head(b, 1))).unwrap();
        for (at, more, guard) in [
            (saved, vec![Put(1)], IN_ORDER),
            (saved, vec![Put(0), Put(1), Take(a, 1)], FIRST),
            (saved, vec![Put(0), Put(1), Take(a, 0), Take(a, 1)], HOLDS_NONE),
            (saved, vec![Put(0), Take(a, 0), Write(b, 0)], HOLDS),
            (saved, vec![Close, Close], NOT_BEFORE),
            (saved, vec![Put(0), Close, Over(a, Takes::Packets)], EMPTY),
            (saved, vec![Over(a, Takes::None), Over(a, Takes::None)], NOT_OVER),
            (saved, vec![Take(ChannelId(2), 0)], KNOWN),
            (received, vec![Head(a, 1)], NEXT),
            (received, vec![Head(a, 0), Head(a, 0)], DONE),
            (received, vec![Head(b, 1), Come(1), Unpack(1)], WANTED),
            (received, vec![Head(a, 0), Come(0), Unpack(0), Ready], ALL_DONE),
            (received, vec![Go], READY_CAME),
        ] {
            let more: Vec<Step> = more.into_iter().map(Step::Device).collect();
            let refused = check(&[&steps[..at], &more].concat(), 2).err().map_or("", |refused| refused.guard);
            assert_eq!(refused, guard, "{more:?}");
        }
        let mut late = steps;
        late.push(Step::Section);
        assert_eq!(check(&late, 2).unwrap_err().guard, NOT_LAST);
    }

    #[test]
    fn the_guards_are_those_of_the_proof() {
        let proof = std::fs::read_to_string(PROOF).unwrap();
        let steps = &proof[proof.find("SOURCE_WORKS =").unwrap()..proof.find("def splits(").unwrap()];
        let checked = [
            NOT_LAST,
            LAST_SYNC,
            NOT_OVER,
            HOLDS_NONE,
            QUEUED,
            FIRST,
            HOLDS,
            NO_MORE,
            EMPTY,
            NOT_BEFORE,
            ALL_TOLD,
            NEXT,
            ARRIVED,
            PASSED,
            DONE,
            ROOM,
            ONCE,
            HEAD_READ,
            WORD,
            HERE,
            WANTED,
            WRITTEN,
            ALL_DONE,
            LAST_BARRIER,
            NONE_LEFT,
            READY_CAME,
            ALL_OVER,
            IS_READY,
            GO_CAME,
        ];
        assert_eq!(guards(steps), checked.into_iter().chain(UNSEEN).collect());
    }
}
