//! What of a state decides about what can happen next; states that agree in it are visited once.
//!
//! Four things that differ without any consequence are left out:
//! - which channel is which, and which page: no step asks for a number, so states that differ only by a permutation of
//!   either have the same future up to that permutation;
//! - versions, except for their order: of one page, older and newer is all that is ever asked, and the next is newer than
//!   every one there is;
//! - rounds that are over: somebody waits or does not, and it no longer matters for which round it was;
//! - what belongs to a side that has ended.
//!
//! A test takes every state of the small sizes and demands that those with equal keys have successors with equal keys.

use super::{
    Account, End, MAIN, MAX_CHANNELS, MAX_PAGES, PAGE, Protocol, Queue, SYNC_WITH_PAGE, State, Waiting, ZERO, packet,
    unpack,
};

/// The part of a state that matters, the same for all states that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    shared: [u64; 2],
    main: u128,
    /// In ascending order, so that it does not matter whose is which.
    channels: [(u128, u64); MAX_CHANNELS],
}

impl Protocol {
    /// The key of `state`: the least of those that a renaming of the pages gives it.
    pub fn key(&self, state: &State) -> Key {
        let ranks = Ranks::of(state);
        let renamings = match self.config.pages {
            0 | 1 => &RENAMINGS[..1],
            2 => &RENAMINGS[..2],
            _ => &RENAMINGS[..],
        };
        let keys = renamings.iter().map(|pages| self.key_with(state, &Renaming { ranks: &ranks, pages }));
        keys.min().expect("there is the renaming that leaves all as it is")
    }

    fn key_with(&self, state: &State, rename: &Renaming<'_>) -> Key {
        let source_runs = state.source_end == End::Running;
        let destination_runs = state.destination_end == End::Running;
        let mut channels = [(0, 0); MAX_CHANNELS];
        for (channel, key) in channels.iter_mut().enumerate().take(self.config.channels) {
            let (sender, receiver) = (state.senders[channel], state.receivers[channel]);
            let mut rest = Bits::default();
            rest.put(sender.at as u64, 2);
            rest.put(u64::from(sender.section), 5);
            rest.put(u64::from(rename.packet(sender.held)), 8);
            rest.put(u64::from(rename.packet(receiver.pending)), 8);
            rest.put(u64::from(receiver.left), 1);
            rest.put(u64::from(state.gone >> channel & 1), 1);
            self.put_wait(&mut rest, &state.source_meeting, sender.waits, channel);
            self.put_wait(&mut rest, &state.destination_meeting, receiver.waits, channel);
            *key = (rename.queue(state.links[channel]), rest.bits);
        }
        channels.sort_unstable();
        let mut first = Bits::default();
        first.put(u64::from(state.pc), 6);
        first.put(u64::from(state.finished && source_runs), 1);
        first.put(if source_runs { u64::from(state.section) } else { 0 }, 3);
        first.put(u64::from(state.gone >> MAIN & 1), 1);
        first.put(u64::from(state.shut), 1);
        first.put(u64::from(state.started), 1);
        first.put(u64::from(state.fault_used), 1);
        first.put(u64::from(state.defect_used), 1);
        first.put(state.source_end as u64, 2);
        first.put(state.destination_end as u64, 2);
        first.put(state.harm.map_or(0, |harm| harm as u64 + 1), 3);
        let sync_points = match state.destination_meeting {
            // The first one makes the number of channels known; the rest is in the account.
            Account::Real(_) => state.sync_points.min(1),
            Account::Loose(_) => state.sync_points,
        };
        first.put(if destination_runs { u64::from(sync_points) } else { 0 }, 5);
        self.put_wait(&mut first, &state.source_meeting, state.main_waits, MAIN);
        self.put_wait(&mut first, &state.destination_meeting, state.destination_main_waits, MAIN);
        let mut pages = Bits::default();
        for page in rename.pages.map(usize::from) {
            pages.put(u64::from(state.scan >> page & 1), 1);
            pages.put(u64::from(state.postponed >> page & 1), 1);
            pages.put(rename.ranks.rank(page, state.versions[page]), 3);
            pages.put(rename.ranks.rank(page, state.zeros[page]), 3);
            pages.put(rename.ranks.rank(page, state.memory[page]), 3);
        }
        Key { shared: [first.bits, pages.bits], main: rename.queue(state.links[MAIN]), channels }
    }

    /// Whether `who` waits, and with an account that is not that of the engine all that decides for how long.
    fn put_wait(&self, bits: &mut Bits, account: &Account, waiting: Waiting, who: usize) {
        let waits = !self.released(account, waiting);
        match account {
            Account::Real(_) => bits.put(u64::from(waits), 1),
            Account::Loose(counts) => {
                bits.put(if waits { u64::from(waiting.token) } else { 0 }, 5);
                // Nobody, everybody, or everybody but main.
                bits.put(if waits { 1 + u64::from(waiting.parties >> MAIN & 1) } else { 0 }, 2);
                bits.put(u64::from(counts[who]), 5);
            }
        }
    }
}

/// Page `n` under another name is the `n`th of these.
const RENAMINGS: [[u8; MAX_PAGES]; 6] = [[0, 1, 2], [1, 0, 2], [0, 2, 1], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

struct Renaming<'a> {
    ranks: &'a Ranks,
    pages: &'a [u8; MAX_PAGES],
}

impl Renaming<'_> {
    fn packet(&self, bytes: u8) -> u8 {
        let (kind, page, version) = unpack(bytes);
        if !matches!(kind, PAGE | SYNC_WITH_PAGE | ZERO) {
            return bytes;
        }
        let name = self.pages.iter().position(|&other| other == page).expect("each page has a name");
        packet(kind, name as u8, self.ranks.rank(usize::from(page), version) as u8)
    }

    fn queue(&self, queue: Queue) -> u128 {
        let (mut rest, mut renamed, mut at) = (queue.0, 0, 0);
        while rest != 0 {
            renamed |= u128::from(self.packet((rest & 0xff) as u8)) << at;
            rest >>= 8;
            at += 8;
        }
        renamed
    }
}

/// The versions of each page that are anywhere, one bit each.
struct Ranks([u8; MAX_PAGES]);

impl Ranks {
    fn of(state: &State) -> Ranks {
        let mut ranks = Ranks([0; MAX_PAGES]);
        for page in 0..MAX_PAGES {
            for version in [state.versions[page], state.zeros[page], state.memory[page]] {
                ranks.0[page] |= 1 << version;
            }
            // 0 is no version.
            ranks.0[page] &= !1;
        }
        let mut see = |bytes: u8| {
            let (kind, page, version) = unpack(bytes);
            if matches!(kind, PAGE | SYNC_WITH_PAGE | ZERO) {
                ranks.0[usize::from(page)] |= 1 << version;
            }
        };
        for queue in state.links {
            let mut rest = queue.0;
            while rest != 0 {
                see((rest & 0xff) as u8);
                rest >>= 8;
            }
        }
        state.senders.iter().for_each(|sender| see(sender.held));
        state.receivers.iter().for_each(|receiver| see(receiver.pending));
        ranks
    }

    /// 1 for the oldest version of `page` that is anywhere; 0 stays 0.
    fn rank(&self, page: usize, version: u8) -> u64 {
        let not_newer = self.0[page] & (u8::MAX >> (7 - version));
        if version == 0 { 0 } else { u64::from(not_newer.count_ones()) }
    }
}

/// Numbers side by side.
#[derive(Default)]
struct Bits {
    bits: u64,
    used: u32,
}

impl Bits {
    fn put(&mut self, value: u64, bits: u32) {
        assert!(value >> bits == 0 && self.used + bits <= 64, "{value} does not fit");
        self.bits |= value << self.used;
        self.used += bits;
    }
}
