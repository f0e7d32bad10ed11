//! The steps of the source: main's program, and what its channels write.

use super::{Answer, DeviceDefect, DeviceEvent, DeviceModel, DeviceState, Ending, Item, Op, Packet, Steps};
use crate::protocol::{Side, Who};

impl DeviceModel {
    /// What source main does.
    pub(super) fn program(&self) -> Vec<Op> {
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

    pub(super) fn source_steps(&self, state: &DeviceState, out: &mut Steps) {
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

    pub(super) fn write_main(&self, state: &DeviceState, mut next: DeviceState, item: Item, out: &mut Steps) {
        if state.gone & self.main_bit() > 0 {
            // As the thread of the return path.
            return;
        }
        if state.main.len() < self.capacity {
            next.main.push_back(item);
            out.push((DeviceEvent::Writes { item: item.name() }, next));
        }
    }

    pub(super) fn sender(&self, state: &DeviceState, channel: usize, out: &mut Steps) {
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

    pub(super) fn write(
        &self,
        state: &DeviceState,
        mut next: DeviceState,
        channel: usize,
        item: Item,
        out: &mut Steps,
    ) {
        if state.gone >> channel & 1 == 1 {
            out.push(self.source_ends(state, Who::Channel(channel)));
        } else if state.links[channel].len() < self.capacity {
            next.links[channel].push_back(item);
            out.push((DeviceEvent::SendsOn { channel, item: item.name(), packet: item.packet() }, next));
        }
    }

    /// All threads of the source return. From GO on only the answer tells where the guest is.
    pub(super) fn source_ends(&self, state: &DeviceState, why: Who) -> (DeviceEvent, DeviceState) {
        let mut next = state.clone();
        let go = self.program().iter().position(|&op| op == Op::Write(Item::Go)).expect("it is in every program");
        next.source = if state.pc > go { Ending::InDoubt } else { Ending::Failed };
        next.gone = self.all();
        next.forget_source();
        (DeviceEvent::Ends { side: Side::Source, who: why }, next)
    }
}
