//! What packet numbers prove about the number of channels: on every recorded stream of a real QEMU, and on made-up streams
//! that number like QEMU 7.2 and like QEMU 10.0.

#[allow(dead_code, missing_docs, reason = "the account of a recording is for the tests of the decoders")]
#[path = "../../tests/common/mod.rs"]
mod common;

use crate::membership::{Evidence, Membership, Verdict};
use crate::packet::{HELLO_LEN, Hello, RamPacket, header_len};
use crate::rounds::Sync;
use common::Capture;
use proptest::prelude::*;

const PAGE: usize = 4096;

/// The SYNC packets of one channel.
type Syncs = Vec<Sync>;

/// The channels of `capture`.
fn recorded(capture: &Capture) -> Vec<Syncs> {
    (0..capture.channels)
        .map(|id| {
            let bytes = capture.channel(u8::try_from(id).unwrap());
            let hello = Hello::decode(bytes.first_chunk().unwrap()).unwrap();
            assert_eq!((hello.channel.index(), hello.channels), (id, None), "{}: QEMU tells no number", capture.name);
            let (mut at, mut packets, mut syncs) = (HELLO_LEN, 0, Vec::new());
            while at < bytes.len() {
                let packet = RamPacket::decode(&bytes[at..], PAGE).unwrap();
                at += header_len(PAGE) + packet.payload_len;
                packets += u64::from(!packet.is_empty());
                if packet.sync {
                    syncs.push(Sync { number: packet.packet_num, packets: std::mem::take(&mut packets) });
                }
            }
            syncs
        })
        .collect()
}

/// A receiver that sees those of `channels` whose bit is set in `seen`, at sync point `round`.
fn at_the_end_of(round: usize, channels: &[Syncs], seen: usize) -> Membership {
    let mut members = Membership::open(None);
    let seen: Vec<&Syncs> = (0..channels.len()).filter(|id| seen >> id & 1 == 1).map(|id| &channels[id]).collect();
    for _ in &seen {
        members.join(None);
    }
    for round in 0..=round {
        members.next_round();
        seen.iter().for_each(|syncs| members.count(syncs[round].number, syncs[round].packets));
    }
    members
}

/// The verdict is right for every set of channels at every sync point of `channels`.
fn check(name: &str, channels: &[Syncs]) {
    let all = (1 << channels.len()) - 1;
    for round in 1..channels[0].len() {
        for seen in 1..=all {
            let mut members = at_the_end_of(round, channels, seen);
            let expected = if seen == all { Verdict::Complete } else { Verdict::Missing };
            assert_eq!(members.verdict(round as u64), Ok(expected), "{name}: channels {seen:#b} at sync point {round}");
            if seen == all {
                assert_eq!(members.evidence(), Some(Evidence::Numbers));
                assert!(members.is_complete());
            }
        }
    }
}

#[test]
fn every_recorded_stream_proves_its_channels_at_the_second_sync_point_and_later() {
    let captures: Vec<_> = Capture::all().into_iter().filter(|capture| capture.channels > 0).collect();
    assert!(captures.iter().any(|capture| capture.qemu == "7.2" && capture.channels == 4));
    for capture in captures {
        let channels = recorded(&capture);
        assert!(channels.iter().all(|syncs| syncs.len() == channels[0].len() && syncs.len() > 1), "{}", capture.name);
        check(&capture.name, &channels);
    }
}

/// What one channel does in one round: how many packets with pages it has. In round 0 they do not count.
type Work = u8;

/// Numbers in the order in which packets are sent, as QEMU 10.0: pages of all channels in any order, each SYNC after the
/// pages of its own channel.
fn numbered_when_sent(rounds: &[Vec<Work>], mut random: impl FnMut(usize) -> usize) -> Vec<Syncs> {
    let mut channels = vec![Syncs::new(); rounds[0].len()];
    let mut next = 0;
    for (index, round) in rounds.iter().enumerate() {
        let mut left: Vec<(usize, u64)> =
            round.iter().enumerate().map(|(id, pages)| (id, if index == 0 { 0 } else { u64::from(*pages) })).collect();
        let work = left.clone();
        while !left.is_empty() {
            let pick = random(left.len());
            if left[pick].1 == 0 {
                let (id, _) = left.swap_remove(pick);
                channels[id].push(Sync { number: next, packets: work[id].1 });
            } else {
                left[pick].1 -= 1;
            }
            next += 1;
        }
    }
    channels
}

/// Numbers in the order in which packets are asked for, as QEMU 7.2: the SYNCs of a round have its last numbers, and a packet
/// that is still to be sent then takes the number of the SYNC.
fn numbered_when_asked_for(rounds: &[Vec<Work>]) -> Vec<Syncs> {
    let mut channels = vec![Syncs::new(); rounds[0].len()];
    let mut next = 0;
    for (index, round) in rounds.iter().enumerate() {
        let pages = |id: usize| if index == 0 { 0 } else { u64::from(round[id]) };
        next += (0..round.len()).map(pages).sum::<u64>();
        for (id, syncs) in channels.iter_mut().enumerate() {
            syncs.push(Sync { number: next, packets: pages(id) });
            next += 1;
        }
    }
    channels
}

fn rounds() -> impl Strategy<Value = Vec<Vec<Work>>> {
    (1..6usize).prop_flat_map(|channels| prop::collection::vec(prop::collection::vec(0..5u8, channels), 2..6))
}

proptest! {
    #[test]
    fn no_part_of_the_channels_passes_for_all_of_them(rounds in rounds(), seed: u64) {
        let mut state = seed | 1;
        let random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        check("numbered when sent", &numbered_when_sent(&rounds, random));
        check("numbered when asked for", &numbered_when_asked_for(&rounds));
    }

    #[test]
    fn any_numbers_lead_to_a_verdict(numbers in prop::collection::vec((any::<u64>(), any::<u64>()), 1..20), round: u64) {
        let mut members = Membership::open(None);
        for (number, packets) in numbers {
            members.join(None);
            members.count(number, packets);
        }
        let _ = members.verdict(round);
    }
}
