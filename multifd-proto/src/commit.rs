//! Which side the guest belongs to: the decisions of source and destination at the end of a migration.
//!
//! The commit law: the guest never runs on both sides. A destination starts it only when it was told so, and from the
//! moment at which the source may have told it so, only an answer of the destination says where the guest is. A connection that
//! ends, a limit that passes and a cancel say nothing about the destination, so all of them are one event here.
//!
//! Between two ends that know this protocol the commit has two steps:
//!
//! ```text
//!  source                                            destination
//!  AwaitsReady    ── end of the stream ──▶           Loading     loads, makes it durable
//!  AwaitsReady    ◀──────── READY ────────           AwaitsGo    nothing runs; gives up after its limit
//!  AwaitsAnswer   ────────── GO ─────────▶           Starting    never goes back
//!  Done           ◀─ RUNNING (SHUT 0) ────           Running
//!    or Resumable ◀─ refusal (SHUT ≠ 0) ──           Abandoned   the start failed: no vCPU ran
//! ```
//!
//! The source may resume its guest in every phase before `AwaitsAnswer`. There, without an answer, it is *in doubt*: the
//! guest stays paused until an operator decides who knows that the destination does not run. A destination that speaks
//! QEMU's protocol has one step only: it starts when it has loaded, and the source is in doubt from the end of the stream on.
//!
//! Neither machine waits, writes or locks. The engine holds each behind a lock, so that of two events at the same moment
//! (READY and a cancel, say) one is first and decides. The exhaustive model drives the same lines.

/// The source's half of the commit.
///
/// ```
/// use multifd_proto::commit::{SourceAction, SourceCommit, SourceEvent};
///
/// let mut commit = SourceCommit::two_step();
/// assert_eq!(commit.on(SourceEvent::EndBegins), SourceAction::Nothing);
/// assert_eq!(commit.on(SourceEvent::Ready), SourceAction::WriteGo);
/// // The connection is reset: the destination may have received GO.
/// assert_eq!(commit.on(SourceEvent::Stopped), SourceAction::StayPaused);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceCommit {
    steps: Steps,
    phase: SourcePhase,
}

/// Where the source stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SourcePhase {
    /// The end of the stream is still to be written: no destination can have the guest.
    Unsent,
    /// The end of the stream is written, or being written. The destination does not start without GO.
    AwaitsReady,
    /// The message that lets the destination start is written, or being written. Only the answer says what it did.
    AwaitsAnswer,
    /// The destination runs the guest. It must never run here again.
    Done,
    /// The destination does not run the guest, and never will: it may run here.
    Resumable,
    /// No answer came. The guest stays paused here until an operator decides.
    InDoubt,
}

/// What happens to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SourceEvent {
    /// The guest is paused, and the next write is the one that completes the stream.
    EndBegins,
    /// READY: the destination has loaded everything, has made it durable, and waits for GO.
    Ready,
    /// RUNNING, which is SHUT with status 0: the destination runs the guest.
    Running,
    /// SHUT with another status: the destination does not run the guest, and never will.
    Refused,
    /// Anything else that ends the wait: the connection was reset or has ended, a write failed (also that of GO: its bytes may
    /// have left), a limit has passed, the caller cancels, the peer broke a rule.
    Stopped,
}

/// What the source has to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[must_use]
pub enum SourceAction {
    /// The event changes nothing: go on with what was begun. After the end every event is answered by this.
    Nothing,
    /// Write GO. From now on it counts as written.
    WriteGo,
    /// Report success: the guest belongs to the destination.
    Finish,
    /// Close the connection and let the guest run here.
    Resume,
    /// Leave the guest paused, and report that the outcome is in doubt.
    StayPaused,
}

impl SourceCommit {
    /// For a destination that waits for GO.
    pub const fn two_step() -> SourceCommit {
        SourceCommit { steps: Steps::Two, phase: SourcePhase::Unsent }
    }

    /// For a destination that starts when it has loaded, as QEMU does.
    pub const fn one_step() -> SourceCommit {
        SourceCommit { steps: Steps::One, phase: SourcePhase::Unsent }
    }

    /// Decides what `event` means. The first event that ends the commit decides its outcome.
    ///
    /// A message that is not in its place in the phase is a rule broken by the peer. It counts as
    /// [`SourceEvent::Stopped`], but for RUNNING after the end of the stream: a peer that has everything and says that
    /// it runs is believed as far as to leave the guest paused.
    pub fn on(&mut self, event: SourceEvent) -> SourceAction {
        use {SourceAction as Action, SourceEvent as Event, SourcePhase as Phase};
        let (phase, action) = match (self.phase, event) {
            (Phase::Done | Phase::Resumable | Phase::InDoubt, _) => return Action::Nothing,
            (Phase::Unsent, Event::EndBegins) => match self.steps {
                Steps::Two => (Phase::AwaitsReady, Action::Nothing),
                Steps::One => (Phase::AwaitsAnswer, Action::Nothing),
            },
            (_, Event::EndBegins) => return Action::Nothing,
            (Phase::AwaitsReady, Event::Ready) => (Phase::AwaitsAnswer, Action::WriteGo),
            (Phase::AwaitsReady, Event::Running) => (Phase::InDoubt, Action::StayPaused),
            (Phase::Unsent | Phase::AwaitsReady, _) => (Phase::Resumable, Action::Resume),
            (Phase::AwaitsAnswer, Event::Running) => (Phase::Done, Action::Finish),
            (Phase::AwaitsAnswer, Event::Refused) => (Phase::Resumable, Action::Resume),
            (Phase::AwaitsAnswer, Event::Ready | Event::Stopped) => (Phase::InDoubt, Action::StayPaused),
        };
        self.phase = phase;
        action
    }

    /// Where the source stands.
    pub const fn phase(&self) -> SourcePhase {
        self.phase
    }

    /// Whether `event` is in its place now. A message for which this is false is to be reported as a rule broken by the
    /// peer.
    #[cfg(test)]
    const fn expects(&self, event: SourceEvent) -> bool {
        match event {
            SourceEvent::EndBegins => matches!(self.phase, SourcePhase::Unsent),
            SourceEvent::Ready => matches!(self.phase, SourcePhase::AwaitsReady),
            SourceEvent::Running => matches!(self.phase, SourcePhase::AwaitsAnswer),
            SourceEvent::Refused | SourceEvent::Stopped => true,
        }
    }

    /// Whether a cancel, a limit or a lost connection would let the guest run on here.
    pub const fn may_resume(&self) -> bool {
        matches!(self.phase, SourcePhase::Unsent | SourcePhase::AwaitsReady | SourcePhase::Resumable)
    }

    /// Whether the outcome is fixed.
    #[cfg(test)]
    pub(crate) const fn is_over(&self) -> bool {
        matches!(self.phase, SourcePhase::Done | SourcePhase::Resumable | SourcePhase::InDoubt)
    }
}

/// The destination's half of the commit. For a checkpoint, "to start" is to publish it under its name.
///
/// ```
/// use multifd_proto::commit::{DestinationAction, DestinationCommit, DestinationEvent};
///
/// let mut commit = DestinationCommit::two_step();
/// assert_eq!(commit.on(DestinationEvent::Loaded), DestinationAction::WriteReady);
/// // The limit passes; GO comes too late.
/// assert_eq!(commit.on(DestinationEvent::Stopped), DestinationAction::Refuse);
/// assert_eq!(commit.on(DestinationEvent::Go), DestinationAction::Nothing);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DestinationCommit {
    steps: Steps,
    phase: DestinationPhase,
}

/// Where the destination stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DestinationPhase {
    /// Not everything has arrived, or is loaded, or is durable.
    Loading,
    /// READY is written, or being written. Nothing runs without GO.
    AwaitsGo,
    /// The guest is being started. Only success or failure of the start ends this.
    Starting,
    /// The guest runs here, whatever becomes of the connection.
    Running,
    /// The guest does not run here, and never will.
    Abandoned,
}

/// What happens to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DestinationEvent {
    /// The stream is complete, all of it is loaded, and it is durable as far as that can still be taken back.
    Loaded,
    /// GO: the source will not resume the guest without an answer.
    Go,
    /// The guest runs.
    Started,
    /// The guest could not be started: no vCPU ran, and none will.
    StartFailed,
    /// Anything else: the connection was reset or has ended, a write failed, loading failed, a limit has passed, the caller
    /// cancels, the peer broke a rule.
    Stopped,
}

/// What the destination has to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[must_use]
pub enum DestinationAction {
    /// The event changes nothing: go on with what was begun. A cancel that is answered by this came too late.
    Nothing,
    /// Write READY and wait for GO, up to the limit. If the write fails, that is [`DestinationEvent::Stopped`].
    WriteReady,
    /// Start the guest. From now on neither a lost connection nor a cancel stops it.
    Start,
    /// Report success and answer RUNNING. That the answer could not be written changes nothing.
    WriteRunning,
    /// Report failure and answer with a refusal, if the connection still takes it.
    Refuse,
}

impl DestinationCommit {
    /// For a source that writes GO.
    pub const fn two_step() -> DestinationCommit {
        DestinationCommit { steps: Steps::Two, phase: DestinationPhase::Loading }
    }

    /// For a source that writes no GO, as QEMU: the end of the stream is its permission to start.
    pub const fn one_step() -> DestinationCommit {
        DestinationCommit { steps: Steps::One, phase: DestinationPhase::Loading }
    }

    /// Decides what `event` means. The first of GO and what ends the wait for it decides whether the guest runs here.
    pub fn on(&mut self, event: DestinationEvent) -> DestinationAction {
        use {DestinationAction as Action, DestinationEvent as Event, DestinationPhase as Phase};
        let (phase, action) = match (self.phase, event) {
            (Phase::Loading, Event::Loaded) => match self.steps {
                Steps::Two => (Phase::AwaitsGo, Action::WriteReady),
                Steps::One => (Phase::Starting, Action::Start),
            },
            (Phase::AwaitsGo, Event::Go) => (Phase::Starting, Action::Start),
            // GO before READY allows nothing: what would start is not complete.
            (Phase::Loading, Event::Go | Event::Stopped) => (Phase::Abandoned, Action::Refuse),
            (Phase::AwaitsGo, Event::Stopped) => (Phase::Abandoned, Action::Refuse),
            (Phase::Starting, Event::Started) => (Phase::Running, Action::WriteRunning),
            (Phase::Starting, Event::StartFailed) => (Phase::Abandoned, Action::Refuse),
            _ => return Action::Nothing,
        };
        self.phase = phase;
        action
    }

    /// Where the destination stands.
    pub const fn phase(&self) -> DestinationPhase {
        self.phase
    }

    /// Whether `event` is in its place now. GO for which this is false is a rule broken by the peer, unless the destination has
    /// given up meanwhile.
    #[cfg(test)]
    const fn expects(&self, event: DestinationEvent) -> bool {
        match event {
            DestinationEvent::Loaded => matches!(self.phase, DestinationPhase::Loading),
            DestinationEvent::Go => matches!(self.phase, DestinationPhase::AwaitsGo),
            DestinationEvent::Started | DestinationEvent::StartFailed => {
                matches!(self.phase, DestinationPhase::Starting)
            }
            DestinationEvent::Stopped => true,
        }
    }

    /// Whether a cancel, a limit or a lost connection would still keep the guest from starting here.
    #[cfg(test)]
    pub(crate) const fn may_abandon(&self) -> bool {
        matches!(self.phase, DestinationPhase::Loading | DestinationPhase::AwaitsGo | DestinationPhase::Abandoned)
    }

    /// Whether the outcome is fixed.
    #[cfg(test)]
    pub(crate) const fn is_over(&self) -> bool {
        matches!(self.phase, DestinationPhase::Running | DestinationPhase::Abandoned)
    }
}

/// How many steps the commit has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Steps {
    /// The end of the stream lets the destination start.
    One,
    /// GO does.
    Two,
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE_EVENTS: [SourceEvent; 5] =
        [SourceEvent::EndBegins, SourceEvent::Ready, SourceEvent::Running, SourceEvent::Refused, SourceEvent::Stopped];
    const DESTINATION_EVENTS: [DestinationEvent; 5] = [
        DestinationEvent::Loaded,
        DestinationEvent::Go,
        DestinationEvent::Started,
        DestinationEvent::StartFailed,
        DestinationEvent::Stopped,
    ];

    fn source(mut commit: SourceCommit, events: &[SourceEvent]) -> SourceCommit {
        for &event in events {
            assert!(commit.expects(event), "{event:?} in {commit:?}");
            let _ = commit.on(event);
        }
        commit
    }

    fn destination(mut commit: DestinationCommit, events: &[DestinationEvent]) -> DestinationCommit {
        for &event in events {
            assert!(commit.expects(event), "{event:?} in {commit:?}");
            let _ = commit.on(event);
        }
        commit
    }

    #[test]
    fn source_resumes_for_any_reason_until_go_is_written() {
        for before in [&[][..], &[SourceEvent::EndBegins]] {
            for event in [SourceEvent::Stopped, SourceEvent::Refused] {
                let mut commit = source(SourceCommit::two_step(), before);
                assert!(commit.may_resume());
                assert_eq!(commit.on(event), SourceAction::Resume);
                assert_eq!(commit.phase(), SourcePhase::Resumable);
            }
        }
    }

    #[test]
    fn after_go_only_an_answer_ends_the_doubt() {
        let asked = source(SourceCommit::two_step(), &[SourceEvent::EndBegins, SourceEvent::Ready]);
        assert!(!asked.may_resume());
        for (event, action, phase) in [
            (SourceEvent::Running, SourceAction::Finish, SourcePhase::Done),
            (SourceEvent::Refused, SourceAction::Resume, SourcePhase::Resumable),
            (SourceEvent::Stopped, SourceAction::StayPaused, SourcePhase::InDoubt),
            (SourceEvent::Ready, SourceAction::StayPaused, SourcePhase::InDoubt),
        ] {
            let mut commit = asked.clone();
            assert_eq!((commit.on(event), commit.phase()), (action, phase), "{event:?}");
            assert!(commit.is_over());
        }
    }

    #[test]
    fn in_one_step_the_end_of_the_stream_begins_the_doubt() {
        let sent = source(SourceCommit::one_step(), &[SourceEvent::EndBegins]);
        assert_eq!(sent.phase(), SourcePhase::AwaitsAnswer);
        assert!(!sent.expects(SourceEvent::Ready));
        assert_eq!(sent.clone().on(SourceEvent::Stopped), SourceAction::StayPaused);
        assert_eq!(sent.clone().on(SourceEvent::Refused), SourceAction::Resume);
        assert_eq!(sent.clone().on(SourceEvent::Running), SourceAction::Finish);
        assert_eq!(SourceCommit::one_step().on(SourceEvent::Stopped), SourceAction::Resume);
    }

    #[test]
    fn no_event_changes_an_outcome() {
        for steps in [SourceCommit::one_step(), SourceCommit::two_step()] {
            for events in sequences(SOURCE_EVENTS) {
                let mut commit = steps.clone();
                for event in events {
                    let before = commit.clone();
                    let action = commit.on(event);
                    if before.is_over() {
                        assert_eq!((action, &commit), (SourceAction::Nothing, &before));
                    }
                }
            }
        }
        for steps in [DestinationCommit::one_step(), DestinationCommit::two_step()] {
            for events in sequences(DESTINATION_EVENTS) {
                let mut commit = steps.clone();
                for event in events {
                    let before = commit.clone();
                    let action = commit.on(event);
                    if before.is_over() {
                        assert_eq!((action, &commit), (DestinationAction::Nothing, &before));
                    }
                }
            }
        }
    }

    /// A hostile peer may say anything at any time.
    #[test]
    fn no_order_of_messages_resumes_a_guest_that_the_peer_may_run() {
        for events in sequences(SOURCE_EVENTS) {
            let mut commit = SourceCommit::two_step();
            let (mut go, mut ran) = (false, false);
            for event in events {
                ran |= event == SourceEvent::Running && commit.phase() != SourcePhase::Unsent;
                let action = commit.on(event);
                go |= action == SourceAction::WriteGo;
                if action == SourceAction::Resume {
                    assert!(!ran, "{events:?}");
                    assert!(!go || event == SourceEvent::Refused, "{events:?}");
                }
                assert!(action != SourceAction::Finish || (go && ran), "{events:?}");
            }
        }
    }

    #[test]
    fn running_before_go_leaves_the_guest_paused_and_before_the_end_means_nothing() {
        assert_eq!(SourceCommit::two_step().on(SourceEvent::Running), SourceAction::Resume);
        let mut sent = source(SourceCommit::two_step(), &[SourceEvent::EndBegins]);
        assert!(!sent.expects(SourceEvent::Running));
        assert_eq!(sent.on(SourceEvent::Running), SourceAction::StayPaused);
    }

    #[test]
    fn destination_starts_only_on_go() {
        let mut commit = DestinationCommit::two_step();
        assert_eq!(commit.on(DestinationEvent::Loaded), DestinationAction::WriteReady);
        assert_eq!(commit.on(DestinationEvent::Go), DestinationAction::Start);
        assert_eq!(commit.on(DestinationEvent::Started), DestinationAction::WriteRunning);
        assert_eq!(commit.phase(), DestinationPhase::Running);
        assert_eq!(DestinationCommit::two_step().on(DestinationEvent::Go), DestinationAction::Refuse);
        assert_eq!(DestinationCommit::one_step().on(DestinationEvent::Loaded), DestinationAction::Start);
    }

    #[test]
    fn destination_that_gave_up_ignores_go() {
        for before in [&[][..], &[DestinationEvent::Loaded]] {
            let mut commit = destination(DestinationCommit::two_step(), before);
            assert!(commit.may_abandon());
            assert_eq!(commit.on(DestinationEvent::Stopped), DestinationAction::Refuse);
            assert_eq!(commit.on(DestinationEvent::Go), DestinationAction::Nothing);
            assert_eq!(commit.phase(), DestinationPhase::Abandoned);
        }
    }

    #[test]
    fn nothing_stops_a_destination_that_starts() {
        let asked = destination(DestinationCommit::two_step(), &[DestinationEvent::Loaded, DestinationEvent::Go]);
        assert!(!asked.may_abandon());
        let mut commit = asked.clone();
        assert_eq!(commit.on(DestinationEvent::Stopped), DestinationAction::Nothing);
        assert_eq!(commit.on(DestinationEvent::Started), DestinationAction::WriteRunning);
        assert_eq!(commit.on(DestinationEvent::Stopped), DestinationAction::Nothing);
        assert_eq!(commit.phase(), DestinationPhase::Running);
        assert_eq!(asked.clone().on(DestinationEvent::StartFailed), DestinationAction::Refuse);
    }

    fn sequences<T: Copy>(events: [T; 5]) -> impl Iterator<Item = [T; 5]> {
        // All sequences of five events, by their number in base five.
        (0..5usize.pow(5)).map(move |number| [1, 5, 25, 125, 625].map(|place| events[number / place % 5]))
    }
}
