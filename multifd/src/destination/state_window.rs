//! Device-state packets that have arrived, until the section that they belong to is loaded.
//!
//! Packets are taken in the order of their numbers. A channel reads the state of a packet only when its number is less than [`WINDOW`]
//! above the next one to be taken, and waits until then: so at most that many are in memory, however far the channels are ahead of the VM.
//! The one that is taken next is always within the window, and on its channel nothing of a higher number stands before it, so the wait
//! of a channel never keeps the VM waiting. Where a source breaks this order, and all channels wait for room while the VM waits for a packet,
//! that is an error.

use std::collections::BTreeMap;

use multifd_proto::{Violation, device_state::MAX_STATE};

use crate::{
    error::{Connection, Error, Place},
    round::{
        device_trace::DeviceStep,
        trace::{Step, Trace},
    },
    sync::Deadline,
    transport::Stopper,
    watched::Watched,
};

/// The window. Clones are the same one.
#[derive(Clone, Default)]
pub(crate) struct StateWindow {
    watched: Watched<Window>,
    trace: Trace,
}

#[derive(Default)]
struct Window {
    /// Both ends agreed on it.
    agreed: bool,
    /// The number of the packet that is taken next.
    next: u64,
    /// By number, `next <= number < next + WINDOW`.
    slots: BTreeMap<u64, Slot>,
    free: Vec<Box<[u8]>>,
    /// Channels that have joined and have not ended.
    channels: usize,
    /// The packets at which some of them wait for room, or have just got it.
    waiting: Vec<u64>,
    /// The first channel that has ended, and where.
    ended: Option<Place>,
    /// All sections were loaded.
    over: bool,
}

enum Slot {
    /// A channel receives it.
    Arriving,
    Here(Part),
}

/// What one packet brought.
pub(super) struct Part {
    pub(super) number: u64,
    /// The section it belongs to, as it says.
    pub(super) name: String,
    pub(super) instance: u32,
    /// Where it began.
    pub(super) place: Place,
    bytes: Box<[u8]>,
    len: usize,
}

impl Part {
    /// The state.
    pub(super) fn state(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Room for the state of one packet, which has to be [put](StateWindow::put) back with it.
pub(super) struct Room {
    number: u64,
    bytes: Box<[u8]>,
}

impl Room {
    /// At most [`MAX_STATE`] bytes.
    pub(super) fn bytes(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[..len]
    }
}

impl StateWindow {
    /// Tells its steps to `trace`.
    pub(super) fn new(trace: &Trace) -> StateWindow {
        StateWindow { trace: trace.clone(), ..StateWindow::default() }
    }

    fn step(&self, step: impl FnOnce() -> DeviceStep) {
        self.trace.step(|| Step::Device(step()));
    }

    pub(super) fn stopper(&self) -> Box<dyn Stopper> {
        Box::new(self.watched.clone())
    }

    /// Both ends agreed that device state may come on channels.
    pub(super) fn agree(&self) {
        self.watched.update(|window| window.agreed = true);
    }

    pub(super) fn is_agreed(&self) -> bool {
        self.watched.look(|window| window.agreed)
    }

    /// Waits until there is room for the packet `number`, which begins at `place`.
    ///
    /// # Errors
    /// There was such a packet before, or no section follows: a violation. [`Error::Stopped`].
    pub(super) fn room(&self, number: u64, place: Place) -> Result<Room, Error> {
        // Told to the one who waits for a packet.
        let waits = self.watched.update(|window| {
            let waits = window.is_beyond(number);
            if waits {
                window.waiting.push(number);
            }
            waits
        });
        let found = self.watched.wait(Deadline::after(None), |window| {
            if window.is_beyond(number) {
                return None;
            }
            if waits && let Some(index) = window.waiting.iter().position(|waiting| *waiting == number) {
                window.waiting.swap_remove(index);
            }
            let violation = match number.checked_sub(window.next) {
                _ if window.over => Violation::StatePacketLeft { number },
                Some(_) if !window.slots.contains_key(&number) => {
                    window.slots.insert(number, Slot::Arriving);
                    if let Connection::Channel(id) = place.connection {
                        self.step(|| DeviceStep::Head(id, number));
                    }
                    return Some(Ok(window.free.pop()));
                }
                _ => Violation::StatePacketTwice { number },
            };
            Some(Err(Error::protocol(place)(violation)))
        })?;
        let free = found.expect("it waits without a deadline")?;
        Ok(Room { number, bytes: free.unwrap_or_else(|| vec![0; MAX_STATE as usize].into()) })
    }

    /// The `len` bytes of state of a packet were received into `room`.
    pub(super) fn put(&self, room: Room, len: usize, name: String, instance: u32, place: Place) {
        let Room { number, bytes } = room;
        let part = Part { number, name, instance, place, bytes, len };
        self.watched.update(|window| {
            self.step(|| DeviceStep::Come(number));
            window.slots.insert(number, Slot::Here(part));
        });
    }

    /// Takes the next packet, of which main speaks at `place`. Waits until it is here.
    ///
    /// # Errors
    /// A channel has ended that may have had it; all of them are at packets for which there is no room before it. [`Error::Stopped`].
    pub(super) fn take(&self, place: Place) -> Result<Part, Error> {
        let found = self.watched.wait(Deadline::after(None), |window| match window.slots.remove(&window.next) {
            Some(Slot::Here(part)) => {
                self.step(|| DeviceStep::Unpack(part.number));
                window.next += 1;
                Some(Ok(part))
            }
            Some(Slot::Arriving) => {
                window.slots.insert(window.next, Slot::Arriving);
                None
            }
            None => window.missing(place).map(Err),
        })?;
        let part = found.expect("it waits without a deadline")?;
        // There is room for another.
        self.watched.update(|_| ());
        Ok(part)
    }

    /// `part` was loaded.
    pub(super) fn give_back(&self, part: Part) {
        self.watched.update(|window| window.free.push(part.bytes));
    }

    /// A channel has joined.
    pub(super) fn channel_joined(&self) {
        self.watched.update(|window| window.channels += 1);
    }

    /// A channel has ended at `place`: it brings no more packets.
    pub(super) fn channel_ended(&self, place: Place) {
        self.watched.update(|window| {
            window.channels -= 1;
            window.ended.get_or_insert(place);
        });
    }

    /// All sections were loaded: frees what is left. Main is at `place`.
    ///
    /// # Errors
    /// A packet belongs to none of them: a violation.
    pub(super) fn finish(&self, place: Place) -> Result<(), Error> {
        let left = self.watched.update(|window| {
            (window.over, window.free) = (true, Vec::new());
            std::mem::take(&mut window.slots).into_keys().next()
        });
        match left {
            None => Ok(()),
            Some(number) => Err(Error::protocol(place)(Violation::StatePacketLeft { number })),
        }
    }
}

impl Window {
    /// Whether the packet `number` has to wait for room.
    fn is_beyond(&self, number: u64) -> bool {
        !self.over && number.saturating_sub(self.next) >= WINDOW
    }

    /// Why the next packet, which is not here and not arriving, cannot come any more, if so. Main is at `place`.
    fn missing(&self, place: Place) -> Option<Error> {
        if let Some(at) = self.ended {
            return Some(Error::Io { at, source: std::io::ErrorKind::UnexpectedEof.into() });
        }
        // One that has just got room need not know it yet.
        let wait = self.waiting.iter().filter(|number| self.is_beyond(**number)).count();
        let all_wait = self.channels > 0 && wait == self.channels;
        all_wait.then(|| Error::protocol(place)(Violation::StatePacketMissing { number: self.next }))
    }
}

/// How many packets may be in memory: 32 MiB of state.
pub(crate) const WINDOW: u64 = if cfg!(any(loom, shuttle)) { 4 } else { 32 };

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    const PLACE: Place = Place { connection: Connection::Main, offset: 7 };

    fn arrives(window: &StateWindow, number: u64) -> Result<(), Error> {
        let mut room = window.room(number, PLACE)?;
        room.bytes(8).copy_from_slice(&number.to_be_bytes());
        window.put(room, 8, "gpu".to_owned(), 0, PLACE);
        Ok(())
    }

    #[test]
    fn packets_are_taken_in_order_whatever_the_order_in_which_they_come() {
        let window = StateWindow::default();
        for number in [2, 0, 3, 1] {
            arrives(&window, number).unwrap();
        }
        for number in 0..4u64 {
            let part = window.take(PLACE).unwrap();
            assert_eq!((part.number, part.state()), (number, &number.to_be_bytes()[..]));
            window.give_back(part);
        }
        window.finish(PLACE).unwrap();
    }

    #[test]
    fn a_packet_beyond_the_window_waits_until_there_is_room() {
        let window = StateWindow::default();
        let other = window.clone();
        let early = std::thread::spawn(move || arrives(&other, WINDOW));
        arrives(&window, 1).unwrap();
        assert!(window.watched.look(|window| window.slots.len() == 1), "the early one has no memory yet");
        arrives(&window, 0).unwrap();
        window.give_back(window.take(PLACE).unwrap());
        early.join().unwrap().unwrap();
        assert_eq!(window.watched.look(|window| window.slots.keys().copied().collect::<Vec<_>>()), [1, WINDOW]);
    }

    #[test]
    fn a_number_comes_once() {
        let window = StateWindow::default();
        arrives(&window, 0).unwrap();
        let _arriving = window.room(1, PLACE).unwrap();
        for number in [0, 1] {
            let error = arrives(&window, number).unwrap_err().to_string();
            assert_eq!(error, format!("{PLACE}: device-state packet {number} came before"));
        }
        window.take(PLACE).unwrap();
        assert!(arrives(&window, 0).is_err(), "it was taken");
    }

    #[test]
    fn what_is_left_belongs_to_no_section_and_nothing_comes_afterwards() {
        let window = StateWindow::default();
        arrives(&window, 1).unwrap();
        let error = window.finish(PLACE).unwrap_err().to_string();
        assert_eq!(error, format!("{PLACE}: device-state packet 1 is not a part of any section"));
        assert!(arrives(&window, 0).is_err());
    }

    #[test]
    fn a_wait_for_a_packet_ends_with_a_channel_or_a_stop() {
        let window = StateWindow::default();
        arrives(&window, 0).unwrap();
        window.channel_joined();
        window.channel_ended(PLACE);
        window.take(PLACE).unwrap();
        assert!(matches!(window.take(PLACE), Err(Error::Io { at: PLACE, .. })));
        let window = StateWindow::default();
        let other = window.clone();
        let waits = std::thread::spawn(move || other.take(PLACE).map(drop));
        window.stopper().stop();
        assert!(matches!(waits.join().unwrap(), Err(Error::Stopped)));
    }

    /// Else two would wait for each other.
    #[test]
    fn a_packet_that_no_channel_can_bring_is_not_waited_for() {
        let window = StateWindow::default();
        window.channel_joined();
        window.channel_joined();
        let far = [WINDOW, u64::MAX].map(|number| {
            let other = window.clone();
            std::thread::spawn(move || other.room(number, PLACE).map(drop))
        });
        let error = window.take(PLACE).map(drop).unwrap_err().to_string();
        assert_eq!(error, format!("{PLACE}: device-state packet 0 does not come, all channels are further on"));
        window.stopper().stop();
        for thread in far {
            assert!(matches!(thread.join().unwrap(), Err(Error::Stopped)));
        }
    }
}
