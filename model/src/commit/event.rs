//! The steps of the commit model and the harm they can do, with the words for both.

use std::fmt;

use crate::protocol::Side;

/// One step, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitEvent {
    /// The source decides to write the end of the stream.
    EndsStream,
    /// A side writes a message; the write succeeds or not, and the message is on its way or not.
    Writes(Side, Message, Write),
    /// A message reaches the process at the other end of its connection.
    Receives(Side, Message),
    /// The destination loads what it has and makes it durable, or cannot.
    Loads(bool),
    /// The destination starts the guest (or publishes the checkpoint), or cannot.
    Starts(bool),
    /// A side closes its connection, since its outcome is fixed.
    Closes(Side),
    /// A side stops waiting.
    Stops(Side, Cause),
    /// An operator who knows that the destination does not run lets the guest run at the source.
    Resumes,
    /// Nothing that this side writes is delivered from now on.
    Cut(Side),
    /// What this side writes, or has written, is delivered again.
    Heals(Side),
    /// A process makes no step from now on: SIGSTOP, swapping, a disk that does not answer.
    Freezes(Side),
    /// It goes on where it was.
    Thaws(Side),
    /// A process ends without a word: its kernel delivers what it wrote and closes its connection, or its host dies too.
    Dies(Side, Death),
}

/// What the two sides say to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    /// All of the stream but its end.
    Devices,
    /// The end of the stream.
    End,
    /// Everything is loaded and durable.
    Ready,
    /// Permission to start.
    Go,
    /// The guest runs at the destination: SHUT(0).
    Running,
    /// The guest does not run at the destination and never will: SHUT with another status.
    Refusal,
    /// The end of the connection.
    Fin,
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// It succeeded, and the message is on its way.
    Sent,
    /// It failed, and the message is on its way nevertheless.
    FailedAndSent,
    /// It failed, and the message is lost.
    Failed,
}

/// Why a side stops waiting without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It sees a reset, which something between the two may have sent.
    Reset,
    /// It sees the end of the connection, which something between the two may have closed.
    End,
    /// Its limit has passed.
    Limit,
    /// Its user cancels.
    Cancel,
    /// Its write failed.
    WriteFailed,
    /// The state cannot be loaded.
    LoadFailed,
}

/// How a process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// Alone: its kernel delivers what it wrote, and the end of its connection.
    Process,
    /// With its host: nothing more is delivered, not even an end.
    Host,
}

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CommitHarm {
    /// The guest runs, or ran, on both sides.
    TwoGuests,
    /// The destination publishes a checkpoint of a guest that runs on at the source.
    KeptTwice,
    /// The guest runs nowhere, and the operator cannot resume it.
    GuestLost,
    /// The source runs its guest on in memory that the destination has written to.
    MemoryDamaged,
    /// The destination runs a guest that is not completely loaded.
    StartedHalf,
    /// A live process waits, and nothing but luck or a user ends the wait.
    WaitsForever,
    /// A side reports success without the evidence.
    UnprovenSuccess,
    /// The source is in doubt although it never let the destination start.
    NeedlessDoubt,
}

impl CommitEvent {
    /// Whether a process or a limit makes this step, so that it will be made in time. All other steps are luck, bad luck, or
    /// a user's.
    pub fn is_certain(&self) -> bool {
        match self {
            Self::EndsStream
            | Self::Writes(..)
            | Self::Receives(..)
            | Self::Loads(_)
            | Self::Starts(_)
            | Self::Closes(_)
            | Self::Stops(_, Cause::Limit) => true,
            Self::Stops(..)
            | Self::Resumes
            | Self::Cut(_)
            | Self::Heals(_)
            | Self::Freezes(_)
            | Self::Thaws(_)
            | Self::Dies(..) => false,
        }
    }
}

impl fmt::Display for CommitEvent {
    /// Who, then what it does.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |who: &dyn fmt::Display, what: String| write!(f, "{:<23} {what}", who.to_string());
        let source = &Side::Source;
        match self {
            Self::EndsStream => line(source, "is about to end the stream".into()),
            Self::Writes(side, message, write) => line(side, format!("writes {message}{write}")),
            Self::Receives(side, message) => line(side, format!("receives {message}")),
            Self::Loads(true) => line(&Side::Destination, "has loaded everything and made it durable".into()),
            Self::Loads(false) => line(&Side::Destination, "cannot load".into()),
            Self::Starts(true) => line(&Side::Destination, "starts the guest".into()),
            Self::Starts(false) => line(&Side::Destination, "cannot start the guest".into()),
            Self::Closes(side) => line(side, "closes its connection".into()),
            Self::Stops(side, cause) => line(side, cause.to_string()),
            Self::Resumes => line(&"operator", "resumes the guest at the source".into()),
            Self::Cut(side) => line(&"network", format!("delivers nothing from the {side} any more")),
            Self::Heals(side) => line(&"network", format!("delivers again from the {side}")),
            Self::Freezes(side) => line(side, "is frozen".into()),
            Self::Thaws(side) => line(side, "goes on".into()),
            Self::Dies(side, Death::Process) => line(side, "is killed".into()),
            Self::Dies(side, Death::Host) => line(side, "dies with its host".into()),
        }
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Message::Devices => "the device state",
            Message::End => "the end of the stream",
            Message::Ready => "READY",
            Message::Go => "GO",
            Message::Running => "RUNNING",
            Message::Refusal => "a refusal",
            Message::Fin => "the end of the connection",
        })
    }
}

impl fmt::Display for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Write::Sent => "",
            Write::FailedAndSent => "; the write fails, the message is on its way nevertheless",
            Write::Failed => "; the write fails, the message is lost",
        })
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Cause::Reset => "sees a reset of its connection",
            Cause::End => "sees an end of its connection",
            Cause::Limit => "has waited up to its limit",
            Cause::Cancel => "is cancelled",
            Cause::WriteFailed => "cannot write",
            Cause::LoadFailed => "cannot load",
        })
    }
}

impl fmt::Display for CommitHarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CommitHarm::TwoGuests => "the guest runs on both sides",
            CommitHarm::KeptTwice => "a checkpoint is kept of a guest that runs on",
            CommitHarm::GuestLost => "the guest runs nowhere and cannot be resumed",
            CommitHarm::MemoryDamaged => "the guest goes on in memory that the other side has written to",
            CommitHarm::StartedHalf => "the destination runs half a guest",
            CommitHarm::WaitsForever => "waits forever",
            CommitHarm::UnprovenSuccess => "reports success without evidence",
            CommitHarm::NeedlessDoubt => "in doubt without need",
        })
    }
}
