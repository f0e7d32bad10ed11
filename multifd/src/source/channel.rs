//! One sending channel: pulls batches from the page scan and sends each as one packet.

use std::{io, num::NonZeroU8, time::Duration};

use multifd_proto::{
    ChannelId,
    channel_end::{Meaning, Reached, meaning},
    machine::ZeroPages,
    packet::{self, Compression, Hello, PacketHeader},
    rounds::Party,
};

use super::{
    Shared,
    auto_compression::{AutoCompression, ChannelCompression, Sent},
    openings::Attempt,
    room::Room,
};
use crate::{
    channel_end::end_by,
    compress::Compressor,
    error::{Connection, Error, Place},
    ram::GuestRange,
    round::{scan::Batch, trace::Step},
    stop::PanicGuard,
    sync::{Arc, atomic::Ordering, lock},
    transport::{Pending, Stream, Transit, end_if_untaken},
};

/// A channel's thread and all that it owns.
pub(super) struct SendChannel {
    id: ChannelId,
    attempt: Attempt,
    /// The destination's host has the hello: from now on no other connection takes its place.
    is_open: bool,
    /// Set once it is established.
    stream: Option<Box<dyn Stream>>,
    shared: Arc<Shared>,
    /// The encoded header of the current packet, and behind it the payload if it is compressed: one write sends both.
    packet: Vec<u8>,
    compressor: Option<Compressor>,
    /// Whether to use it, if that is not settled.
    auto: Option<AutoCompression>,
    /// Bytes sent.
    sent: u64,
}

impl SendChannel {
    pub(super) fn new(attempt: Attempt, shared: &Arc<Shared>) -> Result<SendChannel, Error> {
        let id = attempt.id;
        let page_size = shared.ram.layout().page_size();
        let options = &shared.options;
        let compressor = match options.format.compression {
            Compression::None => None,
            method => {
                let at = Place { connection: Connection::Channel(id), offset: 0 };
                Some(Compressor::new(method, options.plan.compression_level).map_err(Error::io(at))?)
            }
        };
        Ok(SendChannel {
            id,
            attempt,
            is_open: false,
            stream: None,
            shared: shared.clone(),
            packet: vec![0; packet::header_len(page_size)],
            auto: (options.format.auto_compression && compressor.is_some()).then(AutoCompression::default),
            compressor,
            sent: 0,
        })
    }

    /// Establishes the connection and says which channel this is. The connection is kept also where that fails, until the error
    /// is known.
    fn open(&mut self, pending: Box<dyn Pending>) -> Result<(), Error> {
        let at = self.place();
        let shared = self.shared.clone();
        if let Some(wait) = self.attempt.wait_before() {
            shared.backlog.rest(wait)?;
        }
        let stream = self.stream.insert(pending.establish(None).map_err(Error::io(at))?);
        shared.stop.register(stream.stopper().map_err(Error::io(at))?);
        shared.backlog.add(at.connection, &**stream).map_err(Error::io(at))?;
        end_if_untaken(&mut **stream, shared.live.get().stall_limit);
        if let Some(counters) = &shared.zero_copy {
            shared.copies(&stream.peer(), stream.send_without_copy(counters));
        }
        let options = &shared.options;
        let uuid = options.format.token.unwrap_or(options.qemu.uuid);
        // QEMU ignores the number of channels; a destination of ours waits for all of them.
        let hello = Hello { uuid, channel: self.id, channels: NonZeroU8::new(options.plan.channels) }.encode();
        stream.write(&hello, &[]).map_err(Error::io(at))?;
        self.count(hello.len() as u64);
        self.wait_until_heard()?;
        self.is_open = true;
        shared.openings.open();
        Ok(())
    }

    /// Waits until the destination's host has the hello, where the transport can tell.
    ///
    /// A listener whose queue is full leaves connections unanswered that look established from here. Their first bytes are taken when
    /// there is room; whatever follows before that has them reset. One that is left so for long is given up: the kernel tries it less and
    /// less often.
    fn wait_until_heard(&mut self) -> Result<(), Error> {
        let (at, shared) = (self.place(), self.shared.clone());
        let Some(meter) = self.stream().meter().map_err(Error::io(at))? else { return Ok(()) };
        let begun = shared.options.clock.now();
        let mut wait = FIRST_LOOK;
        loop {
            let Transit { unacknowledged, round_trip, .. } = meter.transit().map_err(Error::io(at))?;
            if unacknowledged == 0 {
                return Ok(());
            }
            if shared.options.clock.now() - begun > UNHEARD.max(round_trip.saturating_mul(20)) {
                // Nothing of it may come later, when another connection has taken its place.
                self.stream().discard().map_err(Error::io(at))?;
                return Err(Error::Io { at, source: io::Error::new(io::ErrorKind::ConnectionReset, NOT_TAKEN) });
            }
            shared.backlog.rest(wait)?;
            wait = (wait * 5 / 4).min(LONGEST_LOOK);
        }
    }

    fn stream(&mut self) -> &mut dyn Stream {
        &mut **self.stream.as_mut().expect(OPEN)
    }

    /// What it made of the choice to compress, where it had one.
    pub(super) fn compression(&self) -> Option<ChannelCompression> {
        self.auto.as_ref().map(|auto| auto.report(self.id))
    }

    /// Ends the connection in order: there is no more to be sent.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        self.stream.as_mut().map_or(Ok(()), |stream| stream.finish())
    }

    /// Establishes the connection, then sends section after section until there are no more.
    ///
    /// # Errors
    /// [`Error::Stopped`]: the migration has ended, with this channel's error if it came first.
    pub(super) fn run(mut self, pending: Box<dyn Pending>) -> Result<SendChannel, Error> {
        let stop = self.shared.stop.clone();
        let guard = PanicGuard::new(&stop, Connection::Channel(self.id));
        let outcome = self.open(pending).and_then(|()| self.sections());
        guard.disarm();
        if let Err(error) = outcome {
            self.ends(error);
            return Err(Error::Stopped);
        }
        Ok(self)
    }

    /// Does what it means that the channel ended by `error`. The main thread may be waiting for anything: to stop the migration
    /// is to wake it.
    fn ends(&self, error: Error) {
        let reached = match self.is_open {
            false => Reached::Nothing { in_time: self.attempt.may_be_repeated() },
            true => Reached::Rounds,
        };
        match meaning(reached, end_by(&error, false)) {
            // Before the connection closes: the destination sees that, ends main, and main's thread would take that for
            // the reason.
            Meaning::Fatal => drop(self.shared.stop.stop(error)),
            Meaning::Replace => self.shared.openings.lost(self.attempt, error),
            Meaning::Finished => tracing::debug!(channel = %self.id, %error, "a channel ends"),
        }
    }

    fn sections(&mut self) -> Result<(), Error> {
        let shared = self.shared.clone();
        let mut batch = Batch::default();
        let room = Room::new(&shared.ram).map_err(Error::io(self.place()))?;
        let mut ranges = Vec::new();
        let mut section = 0;
        loop {
            shared.barrier.meet(Party::Channel(self.id), self.place())?;
            // Pairs with the store before main arrives; the barrier orders the two.
            if shared.finished.load(Ordering::Acquire) {
                return self.device_state(&shared);
            }
            if shared.spread.takes(self.id, section)? {
                while shared.scan.next(&mut batch) {
                    self.trace(Step::Take, &batch.pages, &batch.zeros, batch.block);
                    self.send(&shared, &mut batch, &room, &mut ranges)?;
                    self.spread(&shared);
                }
                shared.spread.handed_out(section);
            }
            // Pairs with the store before main arrives, as above.
            if shared.last_section.load(Ordering::Acquire) {
                self.kept_packets(&shared)?;
            }
            self.sync()?;
            shared.progress.channel_ends_round();
            section += 1;
        }
    }

    /// Finds out whether more channels would be faster.
    fn spread(&self, shared: &Shared) {
        if self.id.0 > 0 {
            return;
        }
        let taken = || {
            let sent: u64 = shared.progress.channel_bytes(shared.options.plan.channels.into()).iter().sum();
            sent.saturating_sub(shared.backlog.unacknowledged())
        };
        let left = || {
            let counted = shared.progress.snapshot();
            let pages = counted.round_pages.saturating_sub(counted.round_done);
            pages * shared.ram.layout().page_size() as u64
        };
        if let Some(channels) = shared.spread.look(shared.options.clock.now(), taken, left) {
            shared.scan.share_among(channels);
        }
    }

    /// Sends the device-state packets of an earlier stream that go on this channel. Its destination has taken all sections that came
    /// before the rounds, which the barrier of the first of them is behind; that of the last one is the proof that it has these.
    fn kept_packets(&mut self, shared: &Shared) -> Result<(), Error> {
        let Some(packets) = &shared.options.qemu.replay.packets else { return Ok(()) };
        packets.send(self.id, shared.options.plan.channels, |piece| {
            let place = self.place();
            shared.live.limiter.take(piece.len() as u64);
            self.stream().write(piece, &[]).map_err(Error::io(place))?;
            self.count(piece.len() as u64);
            Ok(())
        })
    }

    /// Sends device state until there is no more. A channel that has no pages has not found the speed of the path.
    fn device_state(&mut self, shared: &Shared) -> Result<(), Error> {
        if self.id.index() >= shared.spread.used() {
            shared.state.takes_none(self.id);
            return Ok(());
        }
        while let Some(packet) = shared.state.next(self.id)? {
            let place = self.place();
            shared.live.limiter.take(packet.len() as u64);
            shared.state.writes(self.id, &packet);
            self.stream().write(&packet, &[]).map_err(Error::io(place))?;
            self.count(packet.len() as u64);
            shared.state.give_back(packet);
        }
        Ok(())
    }

    /// Sends `batch`: pages with content as payload, zero pages by name only.
    fn send<'a>(
        &mut self,
        shared: &'a Shared,
        batch: &mut Batch,
        room: &'a Room,
        ranges: &mut Vec<GuestRange<'a>>,
    ) -> Result<(), Error> {
        let block = &shared.ram.blocks()[batch.block];
        room.load(block, &batch.pages)?;
        shared.look_for_zeros(batch, room, ranges);
        shared.progress.add_pages(batch.pages.len() as u64, batch.zeros.len() as u64);
        if shared.options.qemu.zero_pages == ZeroPages::Legacy && !batch.zeros.is_empty() {
            self.trace(Step::Find, &[], &batch.zeros, batch.block);
            shared.leave_zeros_to_main(batch);
        }
        if !batch.pages.is_empty() || !batch.zeros.is_empty() {
            self.packet(shared, batch, ranges)?;
        }
        if shared.zero_copy.is_some() && room.leave_to_kernel().is_err() {
            let place = self.place();
            self.stream().flush().map_err(Error::io(place))?;
        }
        Ok(())
    }

    /// Sends `batch` as one packet. `ranges` are its pages with content.
    fn packet<'a>(&mut self, shared: &'a Shared, batch: &Batch, ranges: &mut Vec<GuestRange<'a>>) -> Result<(), Error> {
        self.trace(Step::Send, &batch.pages, &batch.zeros, batch.block);
        let (place, clock) = (self.place(), &shared.options.clock);
        let page_size = shared.ram.layout().page_size();
        let header_len = packet::header_len(page_size);
        self.packet.truncate(header_len);
        let guest_bytes: usize = ranges.iter().map(GuestRange::len).sum();
        let compression = self.compression_of(guest_bytes);
        let begun = clock.now();
        let mut payload_len = guest_bytes;
        if let Some(compressor) = self.compressor.as_mut().filter(|_| compression != Compression::None) {
            compressor.compress(ranges, &mut self.packet).map_err(Error::io(place))?;
            payload_len = self.packet.len() - header_len;
            ranges.clear();
        }
        let compressed = clock.now();
        let header = PacketHeader {
            sync: false,
            compression: if guest_bytes > 0 { compression } else { shared.options.format.compression },
            packet_num: shared.scan.packet_number(),
            block: shared.ram.blocks()[batch.block].name().as_str(),
            normal: &batch.pages,
            zero: &batch.zeros,
            payload_len: u32::try_from(payload_len).expect("a packet's payload is bounded"),
        };
        header.encode_into(&mut self.packet, page_size);
        let total = (header_len + payload_len) as u64;
        let is_limited = shared.live.limiter.take(total);
        let taken = clock.now();
        self.stream.as_mut().expect(OPEN).write(&self.packet, ranges).map_err(Error::io(place))?;
        if let Some(auto) = self.auto.as_mut().filter(|_| guest_bytes > 0) {
            let mut link = clock.now() - taken;
            if is_limited {
                // Less what was refilled while the compressor worked.
                link = link.saturating_add(shared.part_of_the_limit(total).saturating_sub(compressed - begun));
            }
            let compressed = (compression != Compression::None).then(|| (compressed - begun, payload_len));
            auto.sent(Sent { guest_bytes, compressed, link });
        }
        self.count(total);
        Ok(())
    }

    /// How the next `guest_bytes` of pages with content are sent.
    fn compression_of(&mut self, guest_bytes: usize) -> Compression {
        let compresses = guest_bytes > 0 && self.auto.as_mut().is_none_or(|auto| auto.compresses(guest_bytes));
        if compresses { self.shared.options.format.compression } else { Compression::None }
    }

    /// Ends the section on this channel, when the kernel has let go of all its pages.
    fn sync(&mut self) -> Result<(), Error> {
        let page_size = self.shared.ram.layout().page_size();
        self.packet.truncate(packet::header_len(page_size));
        PacketHeader::sync_packet(self.shared.scan.packet_number()).encode_into(&mut self.packet, page_size);
        let place = self.place();
        self.shared.options.trace.step(|| Step::Sync(Party::Channel(self.id)));
        self.stream.as_mut().expect(OPEN).write(&self.packet, &[]).map_err(Error::io(place))?;
        self.stream().flush().map_err(Error::io(place))?;
        self.count(self.packet.len() as u64);
        Ok(())
    }

    /// Tells of a step with pages of `block`.
    fn trace(&self, step: impl FnOnce(Party, Vec<u64>) -> Step, pages: &[u64], zeros: &[u64], block: usize) {
        let block = &self.shared.ram.layout().blocks()[block];
        let numbers = || pages.iter().chain(zeros).map(|&offset| block.page_at(offset)).collect();
        self.shared.options.trace.step(|| step(Party::Channel(self.id), numbers()));
    }

    fn place(&self) -> Place {
        Place { connection: Connection::Channel(self.id), offset: self.sent }
    }

    fn count(&mut self, bytes: u64) {
        self.sent += bytes;
        self.shared.pulse.add(usize::try_from(bytes).unwrap_or(usize::MAX));
        self.shared.progress.add_channel_bytes(self.id, bytes);
    }
}

impl Shared {
    /// Looks at the pages of `batch`, which are loaded into `room` if they have to be, and puts the contents of those that are sent with
    /// content into `ranges`.
    pub(super) fn look_for_zeros<'a>(&'a self, batch: &mut Batch, room: &'a Room, ranges: &mut Vec<GuestRange<'a>>) {
        let block = &self.ram.blocks()[batch.block];
        let Batch { pages, zeros, .. } = batch;
        ranges.clear();
        if self.options.qemu.zero_pages == ZeroPages::None {
            ranges.extend(pages.iter().enumerate().map(|(index, &offset)| room.page(block, offset, index)));
            // A page known as zero may hold anything in our memory: only its name tells.
            let zero = self.zero_page.page(0).expect("it has one page");
            ranges.extend(zeros.iter().map(|_| zero));
            pages.append(zeros);
            return;
        }
        let mut index = 0;
        pages.retain(|&offset| {
            let range = room.page(block, offset, index);
            index += 1;
            let zero = range.is_zero();
            if zero {
                zeros.push(offset);
            } else {
                ranges.push(range);
            }
            !zero
        });
    }

    /// Takes the zero pages out of `batch`: main names them.
    fn leave_zeros_to_main(&self, batch: &mut Batch) {
        let page_size = self.ram.layout().page_size() as u64;
        let first_page = self.ram.layout().blocks()[batch.block].first_page();
        let mut legacy = lock(&self.legacy_zeros);
        let legacy = legacy.as_mut().expect("made for legacy mode");
        for offset in batch.zeros.drain(..) {
            legacy.set(first_page + offset / page_size);
        }
    }

    /// What `bytes` on one channel cost of the bandwidth limit. Not how long their packet waited: it waits for those of other channels
    /// before it, and others for it.
    fn part_of_the_limit(&self, bytes: u64) -> Duration {
        let Some(limit) = self.live.get().max_bandwidth else { return Duration::ZERO };
        part_of(bytes, self.options.plan.channels, limit)
    }
}

/// How long `bytes` take one of `channels`, which have `limit` bytes per second together. A limit of 0 is one of 1, as the limiter has it.
fn part_of(bytes: u64, channels: u8, limit: u64) -> Duration {
    let seconds = bytes as f64 * f64::from(channels) / limit.max(1) as f64;
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

/// Between two looks at whether the hello has arrived.
const FIRST_LOOK: Duration = Duration::from_micros(250);
const LONGEST_LOOK: Duration = Duration::from_millis(20);
/// A hello that was lost has been sent again several times by then, and so has the answer of a listener.
const UNHEARD: Duration = Duration::from_secs(4);
const NOT_TAKEN: &str = "the destination's host answers, and does not take the first bytes";
const OPEN: &str = "open() has established it";

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// A limit of 0, set while a channel compressed by itself, was a panic of that channel.
    #[test]
    fn a_part_of_any_limit_is_a_time() {
        assert_eq!(part_of(1 << 20, 4, 1 << 20), Duration::from_secs(4));
        assert_eq!(part_of(1 << 10, 1, 0), Duration::from_secs(1 << 10));
        assert_eq!(part_of(u64::MAX, 255, 0), Duration::MAX);
        assert_eq!(part_of(0, 0, 0), Duration::ZERO);
    }
}
