//! Device-state packets on their way from the thread that asks the VM for its state to the channels.
//!
//! Main fills a buffer and puts it here; whichever channel is free takes it, writes it, and gives the buffer back. There is a bounded number
//! of buffers, so a VM that writes faster than the channels send waits. Packets leave in the order of their numbers, and so ascend on each
//! channel: what the destination waits for next is never stuck behind what it has no room for.

use std::{collections::VecDeque, io};

use multifd_proto::{
    ChannelId,
    device_state::{HEAD_LEN, StatePacket},
};

use crate::{
    error::Error,
    round::{
        device_trace::{DeviceStep, Takes},
        trace::{Step, Trace},
    },
    sections::{PACKET_STATE, StatePackets},
    sync::Deadline,
    transport::Stopper,
    watched::Watched,
};

/// The queue. Clones are the same one.
#[derive(Clone)]
pub(super) struct StateQueue {
    watched: Watched<Queue>,
    trace: Trace,
}

struct Queue {
    /// Not taken by a channel yet, with their heads.
    waiting: VecDeque<Vec<u8>>,
    free: Vec<Vec<u8>>,
    /// `made <= most`: buffers that there are, here, at main or with channels.
    made: usize,
    most: usize,
    /// The number of the next packet.
    next: u64,
    /// No packet follows.
    closed: bool,
}

impl StateQueue {
    /// For `channels` channels.
    pub(super) fn new(channels: u8, trace: &Trace) -> StateQueue {
        // One for each channel, one that main fills and one that waits.
        let most = usize::from(channels).min(MOST_AT_WORK) + 2;
        let (waiting, free) = (VecDeque::new(), Vec::new());
        let watched = Watched::new(Queue { waiting, free, made: 0, most, next: 0, closed: false });
        StateQueue { watched, trace: trace.clone() }
    }

    pub(super) fn stopper(&self) -> Box<dyn Stopper> {
        Box::new(self.watched.clone())
    }

    /// A buffer with room for a head, which is in it, and [`PACKET_STATE`] bytes of state. Waits until there is one.
    fn buffer(&self) -> Result<Vec<u8>, Error> {
        let found = self.watched.wait(Deadline::after(None), |queue| {
            queue.free.pop().or_else(|| {
                let more = queue.made < queue.most;
                queue.made += usize::from(more);
                more.then(|| Vec::with_capacity(HEAD_LEN + PACKET_STATE))
            })
        })?;
        let mut buffer = found.expect("it waits without a deadline");
        buffer.clear();
        buffer.resize(HEAD_LEN, 0);
        Ok(buffer)
    }

    /// Leaves to the channels what was kept, in its order.
    pub(super) fn add_all(&self, kept: KeptState) {
        for (name, instance, packet) in kept.packets {
            self.add(&name, instance, packet);
        }
    }

    /// Numbers `packet`, of the section `name` and `instance`, and leaves it to the channels.
    fn add(&self, name: &str, instance: u32, mut packet: Vec<u8>) {
        let len = u32::try_from(packet.len() - HEAD_LEN).expect("a packet has at most PACKET_STATE bytes of state");
        self.watched.update(|queue| {
            StatePacket { name, instance, number: queue.next, len }.encode_into(&mut packet[..HEAD_LEN]);
            self.step(|| DeviceStep::Put(queue.next));
            queue.next += 1;
            queue.waiting.push_back(packet);
        });
    }

    /// The next packet, for `channel` to write; `None` once there are no more.
    pub(super) fn next(&self, channel: ChannelId) -> Result<Option<Vec<u8>>, Error> {
        let next = self.watched.wait(Deadline::after(None), |queue| match queue.waiting.pop_front() {
            Some(packet) => {
                self.step(|| DeviceStep::Take(channel, number_of(&packet)));
                Some(Some(packet))
            }
            None if queue.closed => {
                self.step(|| DeviceStep::Over(channel, Takes::Packets));
                Some(None)
            }
            None => None,
        })?;
        Ok(next.expect("it waits without a deadline"))
    }

    /// The packet in `buffer` was written, or is not needed.
    pub(super) fn give_back(&self, buffer: Vec<u8>) {
        self.watched.update(|queue| {
            // Those that were kept are as many as the VM has made.
            if queue.free.len() < queue.made {
                queue.free.push(buffer);
            }
        });
    }

    /// No packet follows: channels end when those that wait were written.
    pub(super) fn close(&self) {
        self.watched.update(|queue| {
            queue.closed = true;
            self.step(|| DeviceStep::Close);
        });
    }

    /// `channel` is about to write `packet`.
    pub(super) fn writes(&self, channel: ChannelId, packet: &[u8]) {
        self.step(|| DeviceStep::Write(channel, number_of(packet)));
    }

    /// `channel` takes no packets, and ends.
    pub(super) fn takes_none(&self, channel: ChannelId) {
        self.step(|| DeviceStep::Over(channel, Takes::None));
    }

    /// Main is about to speak of all packets that there are.
    pub(super) fn told(&self) {
        self.step(|| DeviceStep::Tell);
    }

    fn step(&self, step: impl FnOnce() -> DeviceStep) {
        self.trace.step(|| Step::Device(step()));
    }
}

/// The number of an encoded packet.
fn number_of(packet: &[u8]) -> u64 {
    StatePacket::decode(packet).map_or(u64::MAX, |head| head.number)
}

/// What sections use of the queue. Where it ends, so does the migration: `failure` has the reason.
pub(super) struct QueuedState<'a> {
    pub(super) queue: &'a StateQueue,
    pub(super) failure: &'a std::cell::Cell<Option<Error>>,
}

impl StatePackets for QueuedState<'_> {
    fn buffer(&mut self) -> io::Result<Vec<u8>> {
        self.queue.buffer().map_err(|error| {
            let source = io::Error::other(error.to_string());
            self.failure.set(Some(error));
            source
        })
    }

    fn send(&mut self, name: &str, instance: u32, packet: Vec<u8>) {
        self.queue.add(name, instance, packet);
    }

    fn told(&mut self) {
        self.queue.told();
    }

    fn give_back(&mut self, buffer: Vec<u8>) {
        self.queue.give_back(buffer);
    }
}

/// Packets that wait for the last pages, with room for their heads.
#[derive(Default)]
pub(super) struct KeptState {
    packets: Vec<(String, u32, Vec<u8>)>,
}

impl StatePackets for KeptState {
    fn buffer(&mut self) -> io::Result<Vec<u8>> {
        Ok(vec![0; HEAD_LEN])
    }

    fn send(&mut self, name: &str, instance: u32, packet: Vec<u8>) {
        self.packets.push((name.to_owned(), instance, packet));
    }

    fn give_back(&mut self, _buffer: Vec<u8>) {}
}

/// More channels than these do not get a buffer each: with many, all of them are not busy at once.
const MOST_AT_WORK: usize = 16;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn packets_leave_in_order_with_their_heads_and_no_more_buffers_are_made_than_there_may_be() {
        let queue = StateQueue::new(1, &Trace::default());
        for _ in 0..3 {
            let mut packet = queue.buffer().unwrap();
            packet.extend_from_slice(b"state");
            queue.add("gpu", 2, packet);
        }
        // A fourth would wait.
        let other = queue.clone();
        let waiting = std::thread::spawn(move || other.buffer().unwrap().len());
        for number in 0..3 {
            let packet = queue.next(ChannelId(0)).unwrap().unwrap();
            let head = StatePacket::decode(&packet).unwrap();
            assert_eq!(head, StatePacket { name: "gpu", instance: 2, number, len: 5 });
            assert_eq!(packet[HEAD_LEN..], *b"state");
            queue.give_back(packet);
        }
        assert_eq!(waiting.join().unwrap(), HEAD_LEN);
        assert_eq!(queue.watched.look(|queue| queue.made), 3);
        queue.close();
        assert!(queue.next(ChannelId(0)).unwrap().is_none());
    }

    #[test]
    fn a_stop_ends_every_wait() {
        let queue = StateQueue::new(1, &Trace::default());
        let other = queue.clone();
        let channel = std::thread::spawn(move || other.next(ChannelId(0)));
        queue.stopper().stop();
        assert!(matches!(channel.join().unwrap(), Err(Error::Stopped)));
    }
}
