//! The commit of a migration: which side has the guest in the end, whatever breaks and whenever.
//!
//! One source and one destination over one connection, with everything but the commit left out. The source writes the
//! device state and the end of the stream; then both decide by [`multifd_proto::commit`], the code that ships. In every
//! state the adversary may stop delivering in either direction, and deliver again later or never; let either side see a
//! reset or an end of its connection, with what was under way to it lost; have any write fail, with its message sent or
//! not; let a limit pass; cancel on either side; freeze either process (SIGSTOP, a disk that hangs) and let it go on later or
//! never; and kill it, alone or with its host. Each direction keeps its order, and takes as long as it likes.
//!
//! An operator may resume a source that is in doubt, if the destination is dead or has given up (and, of a checkpoint, if
//! the file does not have its name; and, where the destination has the source's own memory, if it has not written there). He is
//! an oracle: the model lets him know.

mod event;
pub mod variants;

pub use event::{Cause, CommitEvent, CommitHarm, Death, Message, Write};

use multifd_proto::commit::{
    DestinationAction, DestinationCommit, DestinationEvent, DestinationPhase, SourceAction, SourceCommit, SourceEvent,
    SourcePhase,
};

use crate::{protocol::Side, search::Model};

/// The commit, as it is or with something done wrong.
#[derive(Clone, Debug, Default)]
pub struct CommitModel {
    /// The destination starts when it has loaded, and GO does not exist: QEMU's protocol.
    pub one_step: bool,
    /// The destination keeps the guest as a checkpoint, and starting it means publishing that.
    pub checkpoint: bool,
    /// The destination has mapped the source's memory instead of a copy: what it writes there is written at the source.
    pub shared_memory: bool,
    /// What makes the source resume although the destination may have started.
    pub resumes_on: Vec<Cause>,
    /// What makes the source report success.
    pub succeeds_on: Vec<Cause>,
    /// Other parts done wrong.
    pub defects: Vec<CommitDefect>,
}

/// A part of the commit that is done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitDefect {
    /// The destination starts with its READY.
    StartsAtReady,
    /// The destination starts when GO arrives after it gave up.
    StartsOnLateGo,
    /// The destination answers a cancel, a limit or a lost connection by a refusal, although it has begun to start.
    RefusesAfterGo,
    /// The destination writes READY before everything has arrived, and starts with what it has when GO arrives.
    ReadyTooEarly,
    /// The destination writes READY before it has loaded, and loads when GO has arrived.
    LoadsAfterGo,
    /// The destination writes RUNNING before it starts, and does not start if that write fails.
    RunningBeforeStart,
    /// The destination writes no RUNNING, and leaves the connection open.
    NoAnswer,
    /// The destination writes no refusal when it gives up.
    NoRefusal,
    /// The destination waits for GO without a limit.
    NoLimitForGo,
    /// The source waits without a limit.
    NoSourceLimit,
    /// The operator resumes a source that is in doubt without knowing what the destination does.
    BlindOperator,
    /// The operator resumes a source that is in doubt when the destination has died, although that had the source's memory.
    ForgetfulOperator,
    /// The destination writes to memory while it loads.
    WritesInLoad,
    /// The destination writes to memory when it starts, and may fail after that.
    WritesBeforeFailure,
}

/// A state of the commit model.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CommitState {
    source: Source,
    destination: Destination,
    /// What the source writes.
    forward: Link,
    /// What the destination writes.
    backward: Link,
}

/// What the destination is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Whereabouts {
    /// The stream is still arriving.
    Receiving,
    /// It loads, and makes durable what it has loaded.
    Loading,
    /// It waits for GO.
    AwaitsGo,
    /// It starts the guest.
    Starting,
    /// It runs the guest.
    Running,
    /// It has given up.
    Abandoned,
    /// Its process is gone.
    Dead,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Source {
    alive: bool,
    frozen: bool,
    commit: SourceCommit,
    /// The phase, where a defect has led.
    wrong: Option<SourcePhase>,
    /// Decided to be written.
    pending: Option<Message>,
    connection: Connection,
    /// The message that lets the destination start was decided to be written.
    asked: bool,
    answered: bool,
    resumed: Option<By>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Destination {
    alive: bool,
    frozen: bool,
    commit: DestinationCommit,
    /// The phase, where a defect has led.
    wrong: Option<DestinationPhase>,
    pending: Option<Message>,
    connection: Connection,
    /// The last part of the stream that has arrived.
    received: Option<Message>,
    loaded: bool,
    /// The guest has run here, or the checkpoint has its name.
    started: bool,
    /// It has written to memory.
    wrote: bool,
    /// It was refused, although it had begun to start.
    refused: bool,
    /// The operator let the guest run at the source, and it was started here after that.
    started_late: bool,
}

/// One direction of the connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Link {
    under_way: Vec<Message>,
    cut: bool,
}

/// One side's end of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Connection {
    Open,
    /// A reset, an end or a failed write was seen, or the side has closed it itself.
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum By {
    Itself,
    Operator,
}

impl CommitModel {
    fn has(&self, defect: CommitDefect) -> bool {
        self.defects.contains(&defect)
    }

    fn source_steps(&self, state: &CommitState, out: &mut Vec<(CommitEvent, CommitState)>) {
        let source = &state.source;
        if !source.alive || source.frozen {
            return;
        }
        let open = source.connection == Connection::Open;
        if let Some(message) = source.pending {
            self.writes(state, Side::Source, message, out);
        } else if source.phase() == SourcePhase::Unsent {
            let mut next = state.clone();
            next.source.pending = Some(Message::End);
            self.source_on(&mut next, SourceEvent::EndBegins, None);
            out.push((CommitEvent::EndsStream, next));
        } else if source.is_over() && open {
            let mut next = state.clone();
            next.close(Side::Source);
            out.push((CommitEvent::Closes(Side::Source), next));
        }
        if open
            && !state.backward.cut
            && let Some(&message) = state.backward.under_way.first()
        {
            let mut next = state.clone();
            next.backward.under_way.remove(0);
            match message {
                Message::Ready => self.source_on(&mut next, SourceEvent::Ready, None),
                Message::Running => self.source_on(&mut next, SourceEvent::Running, None),
                Message::Refusal => self.source_on(&mut next, SourceEvent::Refused, None),
                Message::Fin => {
                    next.loses(Side::Source);
                    self.source_on(&mut next, SourceEvent::Stopped, Some(Cause::End));
                }
                other => unreachable!("{other} from the destination"),
            }
            out.push((CommitEvent::Receives(Side::Source, message), next));
        }
        for cause in [Cause::Reset, Cause::End, Cause::Limit, Cause::Cancel] {
            let possible = match cause {
                Cause::Reset | Cause::End => open,
                Cause::Limit => !source.is_over() && !self.has(CommitDefect::NoSourceLimit),
                _ => !source.is_over(),
            };
            if possible {
                let mut next = state.clone();
                if matches!(cause, Cause::Reset | Cause::End) {
                    next.loses(Side::Source);
                }
                self.source_on(&mut next, SourceEvent::Stopped, Some(cause));
                out.push((CommitEvent::Stops(Side::Source, cause), next));
            }
        }
    }

    fn destination_steps(&self, state: &CommitState, out: &mut Vec<(CommitEvent, CommitState)>) {
        let destination = &state.destination;
        if !destination.alive || destination.frozen {
            return;
        }
        let open = destination.connection == Connection::Open;
        let is_over = destination.is_over();
        let stays = self.has(CommitDefect::NoAnswer) && destination.phase() == DestinationPhase::Running;
        if let Some(message) = destination.pending {
            self.writes(state, Side::Destination, message, out);
        } else if is_over && open && !stays {
            let mut next = state.clone();
            next.close(Side::Destination);
            out.push((CommitEvent::Closes(Side::Destination), next));
        }
        self.loads_and_starts(state, out);
        if open
            && !state.forward.cut
            && let Some(&message) = state.forward.under_way.first()
        {
            let mut next = state.clone();
            next.forward.under_way.remove(0);
            match message {
                Message::Devices | Message::End => next.destination.received = Some(message),
                Message::Go => self.destination_on(&mut next, DestinationEvent::Go),
                Message::Fin => {
                    next.loses(Side::Destination);
                    self.destination_on(&mut next, DestinationEvent::Stopped);
                }
                other => unreachable!("{other} from the source"),
            }
            out.push((CommitEvent::Receives(Side::Destination, message), next));
        }
        for cause in [Cause::Reset, Cause::End, Cause::Limit, Cause::Cancel] {
            let waits = matches!(destination.phase(), DestinationPhase::Loading | DestinationPhase::AwaitsGo);
            let possible = match cause {
                Cause::Reset | Cause::End => open,
                Cause::Limit => {
                    let for_go = destination.phase() == DestinationPhase::AwaitsGo;
                    waits && !(for_go && self.has(CommitDefect::NoLimitForGo))
                }
                _ => true,
            };
            if possible {
                let mut next = state.clone();
                if matches!(cause, Cause::Reset | Cause::End) {
                    next.loses(Side::Destination);
                }
                self.destination_on(&mut next, DestinationEvent::Stopped);
                out.push((CommitEvent::Stops(Side::Destination, cause), next));
            }
        }
    }

    /// What the destination does by itself with what has arrived.
    fn loads_and_starts(&self, state: &CommitState, out: &mut Vec<(CommitEvent, CommitState)>) {
        let destination = &state.destination;
        let phase = destination.phase();
        let complete = destination.received == Some(Message::End);
        let too_early = match destination.received {
            Some(Message::Devices) => self.has(CommitDefect::ReadyTooEarly),
            Some(Message::End) => self.has(CommitDefect::LoadsAfterGo),
            _ => false,
        };
        if phase == DestinationPhase::Loading && too_early {
            let mut next = state.clone();
            self.destination_on(&mut next, DestinationEvent::Loaded);
            // READY, of which nothing is true yet, is written by the step that follows.
            if let Some(written) = Self::written_by(&next, Side::Destination) {
                out.push(written);
            }
        }
        let loads = match phase {
            DestinationPhase::Loading => true,
            DestinationPhase::Starting => self.has(CommitDefect::LoadsAfterGo),
            _ => false,
        };
        if loads && complete && !destination.loaded {
            let mut next = state.clone();
            next.destination.loaded = true;
            next.destination.wrote |= self.has(CommitDefect::WritesInLoad);
            self.destination_on(&mut next, DestinationEvent::Loaded);
            out.push((CommitEvent::Loads(true), next));
            let mut next = state.clone();
            next.destination.wrote |= self.has(CommitDefect::WritesInLoad);
            match phase {
                DestinationPhase::Loading => self.destination_on(&mut next, DestinationEvent::Stopped),
                _ => self.destination_on(&mut next, DestinationEvent::StartFailed),
            }
            out.push((CommitEvent::Loads(false), next));
        } else if phase == DestinationPhase::Starting && destination.pending != Some(Message::Running) {
            let mut next = state.clone();
            (next.destination.started, next.destination.wrote) = (true, true);
            next.destination.started_late |= state.source.resumed == Some(By::Operator);
            self.destination_on(&mut next, DestinationEvent::Started);
            out.push((CommitEvent::Starts(true), next));
            let mut next = state.clone();
            next.destination.wrote |= self.has(CommitDefect::WritesBeforeFailure);
            self.destination_on(&mut next, DestinationEvent::StartFailed);
            out.push((CommitEvent::Starts(false), next));
        }
    }

    /// What `side` has decided to write, written and on its way.
    fn written_by(state: &CommitState, side: Side) -> Option<(CommitEvent, CommitState)> {
        let mut next = state.clone();
        let message = next.take_pending(side)?;
        next.send(side, message);
        Some((CommitEvent::Writes(side, message, Write::Sent), next))
    }

    fn writes(&self, state: &CommitState, side: Side, message: Message, out: &mut Vec<(CommitEvent, CommitState)>) {
        let writes: &[Write] = match state.connection(side) {
            Connection::Open => &[Write::Sent, Write::FailedAndSent, Write::Failed],
            Connection::Gone => &[Write::Failed],
        };
        for &write in writes {
            let mut next = state.clone();
            next.take_pending(side);
            if write != Write::Failed {
                next.send(side, message);
            }
            if write != Write::Sent {
                next.loses(side);
                match side {
                    Side::Source => self.source_on(&mut next, SourceEvent::Stopped, Some(Cause::WriteFailed)),
                    Side::Destination => {
                        self.destination_on(&mut next, DestinationEvent::Stopped);
                        if next.destination.phase() == DestinationPhase::Starting && message == Message::Running {
                            next.destination.wrong = Some(DestinationPhase::Abandoned);
                        }
                    }
                }
            }
            out.push((CommitEvent::Writes(side, message, write), next));
        }
    }

    /// The source decides what `event` means; by its defects, where it has any.
    fn source_on(&self, state: &mut CommitState, event: SourceEvent, cause: Option<Cause>) {
        let source = &mut state.source;
        if source.is_over() {
            return;
        }
        let waits = source.phase() == SourcePhase::AwaitsAnswer;
        let is_in = |causes: &[Cause]| waits && cause.is_some_and(|cause| causes.contains(&cause));
        if is_in(&self.resumes_on) {
            source.wrong = Some(SourcePhase::Resumable);
            source.resumed = Some(By::Itself);
            return;
        }
        if is_in(&self.succeeds_on) {
            source.wrong = Some(SourcePhase::Done);
            return;
        }
        source.answered |= event == SourceEvent::Running;
        match source.commit.on(event) {
            SourceAction::WriteGo => source.pending = Some(Message::Go),
            SourceAction::Resume => source.resumed = Some(By::Itself),
            SourceAction::Nothing | SourceAction::Finish | SourceAction::StayPaused => {}
        }
        source.asked |= source.phase() == SourcePhase::AwaitsAnswer;
    }

    /// The destination decides what `event` means; by its defects, where it has any.
    fn destination_on(&self, state: &mut CommitState, event: DestinationEvent) {
        let destination = &mut state.destination;
        let phase = destination.phase();
        let refusal = (!self.has(CommitDefect::NoRefusal)).then_some(Message::Refusal);
        let began = matches!(phase, DestinationPhase::Starting | DestinationPhase::Running);
        if event == DestinationEvent::Stopped && began && self.has(CommitDefect::RefusesAfterGo) {
            if !std::mem::replace(&mut destination.refused, true) {
                destination.pending = refusal;
            }
            return;
        }
        let late = event == DestinationEvent::Go && phase == DestinationPhase::Abandoned && destination.loaded;
        if late && self.has(CommitDefect::StartsOnLateGo) {
            destination.wrong = Some(DestinationPhase::Starting);
            return;
        }
        if destination.wrong.is_some() {
            // The machine was left: only a start is still of interest.
            match event {
                DestinationEvent::Started => {
                    destination.wrong = Some(DestinationPhase::Running);
                    destination.pending = Some(Message::Running);
                }
                DestinationEvent::StartFailed => {
                    destination.wrong = Some(DestinationPhase::Abandoned);
                    destination.pending = refusal;
                }
                _ => {}
            }
            return;
        }
        match destination.commit.on(event) {
            DestinationAction::WriteReady => {
                destination.pending = Some(Message::Ready);
                if self.has(CommitDefect::StartsAtReady) {
                    destination.wrong = Some(DestinationPhase::Starting);
                }
            }
            DestinationAction::Start if self.has(CommitDefect::RunningBeforeStart) => {
                destination.pending = Some(Message::Running);
            }
            DestinationAction::WriteRunning => {
                let said = self.has(CommitDefect::NoAnswer) || self.has(CommitDefect::RunningBeforeStart);
                destination.pending = (!said).then_some(Message::Running);
            }
            DestinationAction::Refuse => destination.pending = refusal,
            DestinationAction::Start | DestinationAction::Nothing => {}
        }
    }

    /// Whether the source is in doubt and the operator, who knows all, sees that the destination does not have the guest and
    /// never will. A checkpoint outlives the process that published it, and so does what a guest has written to the source's memory; a
    /// guest does not.
    fn operator_may_resume(&self, state: &CommitState) -> bool {
        let (source, destination) = (&state.source, &state.destination);
        let never = !destination.alive || destination.phase() == DestinationPhase::Abandoned;
        let outlives = self.checkpoint || self.shared_memory && !self.has(CommitDefect::ForgetfulOperator);
        let knows = never && !(outlives && destination.started) || self.has(CommitDefect::BlindOperator);
        let in_doubt = source.phase() == SourcePhase::InDoubt && source.resumed.is_none();
        source.alive && !source.frozen && in_doubt && knows
    }

    fn adversary_steps(&self, state: &CommitState, out: &mut Vec<(CommitEvent, CommitState)>) {
        for side in [Side::Source, Side::Destination] {
            let mut next = state.clone();
            let link = next.link(side);
            link.cut = !link.cut;
            let event = if link.cut { CommitEvent::Cut(side) } else { CommitEvent::Heals(side) };
            out.push((event, next));
            let mut next = state.clone();
            let (alive, frozen) = match side {
                Side::Source => (state.source.alive, &mut next.source.frozen),
                Side::Destination => (state.destination.alive, &mut next.destination.frozen),
            };
            if alive {
                *frozen = !*frozen;
                let event = if *frozen { CommitEvent::Freezes(side) } else { CommitEvent::Thaws(side) };
                out.push((event, next));
            }
            for death in [Death::Process, Death::Host].into_iter().filter(|_| alive) {
                let mut next = state.clone();
                match death {
                    Death::Process => next.close(side),
                    Death::Host => next.link(side).under_way.clear(),
                }
                next.loses(side);
                next.take_pending(side);
                match side {
                    Side::Source => (next.source.alive, next.source.frozen) = (false, false),
                    Side::Destination => (next.destination.alive, next.destination.frozen) = (false, false),
                }
                out.push((CommitEvent::Dies(side, death), next));
            }
        }
    }
}

impl Model for CommitModel {
    type State = CommitState;
    type Event = CommitEvent;
    type Harm = CommitHarm;

    fn initial(&self) -> CommitState {
        let (source, destination) = if self.one_step {
            (SourceCommit::one_step(), DestinationCommit::one_step())
        } else {
            (SourceCommit::two_step(), DestinationCommit::two_step())
        };
        CommitState {
            source: Source {
                alive: true,
                frozen: false,
                commit: source,
                wrong: None,
                pending: Some(Message::Devices),
                connection: Connection::Open,
                asked: false,
                answered: false,
                resumed: None,
            },
            destination: Destination {
                alive: true,
                frozen: false,
                commit: destination,
                wrong: None,
                pending: None,
                connection: Connection::Open,
                received: None,
                loaded: false,
                started: false,
                wrote: false,
                refused: false,
                started_late: false,
            },
            forward: Link::default(),
            backward: Link::default(),
        }
    }

    fn successors(&self, state: &CommitState, out: &mut Vec<(CommitEvent, CommitState)>) {
        self.source_steps(state, out);
        self.destination_steps(state, out);
        self.adversary_steps(state, out);
        if self.operator_may_resume(state) {
            let mut next = state.clone();
            next.source.resumed = Some(By::Operator);
            out.push((CommitEvent::Resumes, next));
        }
    }

    fn harm(&self, state: &CommitState, successors: &[(CommitEvent, CommitState)]) -> Option<CommitHarm> {
        let (source, destination) = (&state.source, &state.destination);
        if destination.started && !destination.loaded {
            return Some(CommitHarm::StartedHalf);
        }
        let twice = match source.resumed {
            None => false,
            // Also if the guest of one side was gone before the other's ran: one past, and two futures.
            Some(By::Itself) => destination.started,
            // He may go back to the source's copy when the destination has died with its own. A checkpoint does not die.
            Some(By::Operator) => {
                destination.started_late || destination.started && (destination.alive || self.checkpoint)
            }
        };
        if twice {
            return Some(if self.checkpoint { CommitHarm::KeptTwice } else { CommitHarm::TwoGuests });
        }
        if self.shared_memory && source.resumed.is_some() && destination.wrote {
            return Some(CommitHarm::MemoryDamaged);
        }
        let source_succeeds = source.phase() == SourcePhase::Done;
        let destination_succeeds = destination.phase() == DestinationPhase::Running;
        if source_succeeds && !source.answered || destination_succeeds && !destination.started {
            return Some(CommitHarm::UnprovenSuccess);
        }
        if source.phase() == SourcePhase::InDoubt && !source.asked {
            return Some(CommitHarm::NeedlessDoubt);
        }
        let waits = source.alive && !source.frozen && !source.is_over()
            || destination.alive && !destination.frozen && !destination.is_over();
        if waits && !successors.iter().any(|(event, next)| event.is_certain() && next != state) {
            return Some(CommitHarm::WaitsForever);
        }
        if !state.is_over() {
            return None;
        }
        let may_be_resumed = successors.iter().any(|(event, _)| *event == CommitEvent::Resumes);
        let is_somewhere = match source.phase() {
            _ if !source.alive || source.resumed.is_some() => true,
            SourcePhase::Done => destination.started,
            // A guest that has run in the source's memory and died there has died as any does whose process is killed.
            _ => {
                let outlives = destination.alive || self.checkpoint || self.shared_memory;
                outlives && destination.started || may_be_resumed || source.frozen
            }
        };
        (!is_somewhere).then_some(CommitHarm::GuestLost)
    }

    fn is_over(&self, state: &CommitState) -> bool {
        state.is_over()
    }

    fn is_in_doubt(&self, state: &CommitState) -> bool {
        state.source.alive && state.source.phase() == SourcePhase::InDoubt && state.source.resumed.is_none()
    }
}

impl CommitState {
    /// The phase of the source; `None` if its process is gone.
    pub fn source(&self) -> Option<SourcePhase> {
        self.source.alive.then_some(self.source.phase())
    }

    /// What the destination is doing.
    pub fn destination(&self) -> Whereabouts {
        let destination = &self.destination;
        match destination.phase() {
            _ if !destination.alive => Whereabouts::Dead,
            DestinationPhase::Loading if destination.received == Some(Message::End) => Whereabouts::Loading,
            DestinationPhase::Loading => Whereabouts::Receiving,
            DestinationPhase::AwaitsGo => Whereabouts::AwaitsGo,
            DestinationPhase::Starting if !destination.loaded => Whereabouts::Loading,
            DestinationPhase::Starting => Whereabouts::Starting,
            DestinationPhase::Running => Whereabouts::Running,
            DestinationPhase::Abandoned => Whereabouts::Abandoned,
        }
    }

    /// Whether the source lives, may have let the destination start, and has no answer.
    pub fn is_doubtful(&self) -> bool {
        let doubtful = matches!(self.source.phase(), SourcePhase::AwaitsAnswer | SourcePhase::InDoubt);
        self.source.alive && doubtful && self.source.resumed.is_none()
    }

    /// Whether each side has its outcome or is dead.
    fn is_over(&self) -> bool {
        (!self.source.alive || self.source.is_over()) && (!self.destination.alive || self.destination.is_over())
    }

    fn connection(&self, side: Side) -> Connection {
        match side {
            Side::Source => self.source.connection,
            Side::Destination => self.destination.connection,
        }
    }

    /// What `side` writes to.
    fn link(&mut self, side: Side) -> &mut Link {
        match side {
            Side::Source => &mut self.forward,
            Side::Destination => &mut self.backward,
        }
    }

    fn take_pending(&mut self, side: Side) -> Option<Message> {
        match side {
            Side::Source => self.source.pending.take(),
            Side::Destination => self.destination.pending.take(),
        }
    }

    fn send(&mut self, from: Side, message: Message) {
        let receiver = self.connection(from.other());
        // What goes to an end that is gone is of no further interest.
        if receiver == Connection::Open {
            let under_way = &mut self.link(from).under_way;
            under_way.push(message);
            assert!(under_way.len() <= MOST_UNDER_WAY, "a side that goes on writing: {under_way:?}");
        }
    }

    /// `side` reads and writes no more; what is under way to it is lost.
    fn loses(&mut self, side: Side) {
        match side {
            Side::Source => self.source.connection = Connection::Gone,
            Side::Destination => self.destination.connection = Connection::Gone,
        }
        self.link(side.other()).under_way.clear();
    }

    /// `side` closes its connection; what it wrote is delivered first.
    fn close(&mut self, side: Side) {
        if self.connection(side) == Connection::Open {
            self.send(side, Message::Fin);
            self.loses(side);
        }
    }
}

/// More than either side has to say.
const MOST_UNDER_WAY: usize = 6;

impl Source {
    fn phase(&self) -> SourcePhase {
        self.wrong.unwrap_or(self.commit.phase())
    }

    fn is_over(&self) -> bool {
        matches!(self.phase(), SourcePhase::Done | SourcePhase::Resumable | SourcePhase::InDoubt)
    }
}

impl Destination {
    fn phase(&self) -> DestinationPhase {
        self.wrong.unwrap_or(self.commit.phase())
    }

    fn is_over(&self) -> bool {
        matches!(self.phase(), DestinationPhase::Running | DestinationPhase::Abandoned)
    }
}
