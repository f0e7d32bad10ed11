//! The steps of the destination: what main and the channels take, and the end of a channel.

use multifd_proto::{
    channel_end::{End, Meaning, Reached, meaning},
    rounds::Party,
};

use super::{Answer, DeviceDefect, DeviceEvent, DeviceHarm, DeviceModel, DeviceState, Ending, Item, Packet, Steps, id};
use crate::protocol::{Side, Who};

impl DeviceModel {
    pub(super) fn destination_ends(&self, state: &DeviceState, why: Who) -> (DeviceEvent, DeviceState) {
        let mut next = state.clone();
        next.destination = Ending::Failed;
        next.gone = self.all();
        next.forget_destination();
        (DeviceEvent::Ends { side: Side::Destination, who: why }, next)
    }

    pub(super) fn destination_steps(&self, state: &DeviceState, out: &mut Steps) {
        self.destination_main(state, out);
        for channel in 0..self.channels {
            self.receiver(state, channel, out);
        }
    }

    pub(super) fn destination_main(&self, state: &DeviceState, out: &mut Steps) {
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
    pub(super) fn take_packet(&self, state: &DeviceState, mut next: DeviceState, out: &mut Steps) {
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

    pub(super) fn is_beyond(&self, state: &DeviceState, packet: Packet) -> bool {
        !state.ended && packet.number >= state.window.next + self.window && !self.is(DeviceDefect::NoRoom)
    }

    pub(super) fn receiver(&self, state: &DeviceState, channel: usize, out: &mut Steps) {
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

    pub(super) fn channel_ends(&self, state: &DeviceState, channel: usize, out: &mut Steps) {
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
}
