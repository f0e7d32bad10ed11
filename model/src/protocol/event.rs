//! The steps of the model as people read them, and what may go wrong.

use std::fmt;

use super::MAX_PAGES;

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Harm {
    /// An older copy of a page was put over a newer one.
    Overtaken,
    /// The destination's VM started without the last version of a page.
    StartedStale,
    /// A thread waits and nothing can happen any more.
    WaitsForEver,
    /// A side gave up although nothing failed.
    GaveUp,
    /// The VM runs nowhere.
    GuestLost,
    /// The VM runs on both sides.
    GuestTwice,
}

impl fmt::Display for Harm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Harm::Overtaken => "an old copy of a page replaces a newer one",
            Harm::StartedStale => "the VM starts without the last version of a page",
            Harm::WaitsForEver => "waits forever",
            Harm::GaveUp => "the migration fails",
            Harm::GuestLost => "the VM runs nowhere",
            Harm::GuestTwice => "the VM runs on both sides",
        })
    }
}

/// Who makes a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The sending side.
    Source,
    /// The receiving side.
    Destination,
}

impl Side {
    /// The side at the other end of the connections.
    pub fn other(self) -> Side {
        match self {
            Side::Source => Side::Destination,
            Side::Destination => Side::Source,
        }
    }
}

/// One step, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields are sections, channels, pages and versions, as they are called")]
pub enum Event {
    /// Source main opens a section with these dirty pages.
    Opens { section: u8, dirty: u8 },
    /// A party reaches a meeting point.
    Meets { side: Side, party: Who, at: Meeting },
    /// Source main takes a page out of the round.
    Postpones { page: u8 },
    /// A sender takes a page and writes it.
    SendsPage { channel: usize, page: u8, version: u8, held: bool },
    /// A sender finds a zero page, which main will name.
    FindsZero { channel: usize, page: u8, version: u8 },
    /// A sender writes SYNC and meets the others.
    SendsSync { channel: usize, section: u8, page: Option<(u8, u8)> },
    /// A sender leaves its SYNC out.
    OmitsSync { channel: usize, section: u8 },
    /// Source main writes FLUSH.
    SendsFlush { section: u8 },
    /// Source main leaves it out.
    OmitsFlush { section: u8 },
    /// Source main ends a section.
    SendsEos { section: u8 },
    /// Source main names zero pages.
    NamesZeros { pages: u8 },
    /// All channels of the source end.
    SendersEnd,
    /// Source main sends the device state.
    SendsDevices,
    /// Source main has the confirmation.
    Confirmed,
    /// A receiver applies a page; `over` is what it replaces.
    Applies { by: Who, page: u8, version: u8, over: u8 },
    /// A receiver takes a SYNC.
    TakesSync { channel: usize, page: Option<(u8, u8)> },
    /// A receiver takes the first SYNC of a channel that is taken for a stranger's, and nothing more.
    IsIgnored { channel: usize },
    /// Destination main takes its sync point.
    TakesSyncPoint { eos: bool },
    /// Destination main passes over the end of a section, which means nothing in its dialect.
    IgnoresEos,
    /// The destination starts the VM.
    Starts,
    /// Something goes wrong on purpose.
    Fault(Fault),
    /// A side ends because of what it saw.
    Ends { side: Side, why: Why },
}

/// A thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Who {
    /// Main.
    Main,
    /// A channel.
    Channel(usize),
}

/// A meeting point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// Source: the round opens.
    Open,
    /// Destination: end of the round.
    SyncPoint,
}

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "a connection, and whether what is under way is lost")]
pub enum Fault {
    /// The side fails or is cancelled.
    Stops(Side),
    /// The connection dies; what is under way arrives first, or is lost.
    Cut { connection: Who, lost: bool },
}

/// Why a side ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// A write to a connection that is gone.
    WriteFailed(Who),
    /// End of a connection in the middle of the migration.
    Eof(Who),
    /// It is not known whether all channels are there.
    Incomplete,
    /// Everything is done.
    Done,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::Main => f.write_str("main"),
            Who::Channel(channel) => write!(f, "channel {channel}"),
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Source => "source",
            Side::Destination => "destination",
        })
    }
}

impl fmt::Display for Event {
    /// Thread, then what it does.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |side: Side, who: Who, what: String| write!(f, "{:<23} {what}", format!("{side} {who}"));
        let (source, destination) = (Side::Source, Side::Destination);
        let with = |page: Option<(u8, u8)>| match page {
            Some((page, version)) => format!(", with page {page} as written in round {version}"),
            None => String::new(),
        };
        match *self {
            Event::Opens { section: 0, .. } => line(source, Who::Main, "begins the set-up, which has no pages".into()),
            Event::Opens { section, dirty } => {
                line(source, Who::Main, format!("opens round {section}, dirty: {}", Pages(dirty)))
            }
            Event::Meets { side, party, at } => line(
                side,
                party,
                match at {
                    Meeting::Open => "is ready for the next round",
                    Meeting::SyncPoint => "is at the sync point",
                }
                .into(),
            ),
            Event::Postpones { page } => line(source, Who::Main, format!("leaves page {page} to the next round")),
            Event::SendsPage { channel, page, version, held } => {
                let verb = if held { "takes" } else { "sends" };
                line(source, Who::Channel(channel), format!("{verb} page {page} as written in round {version}"))
            }
            Event::FindsZero { channel, page, version } => line(
                source,
                Who::Channel(channel),
                format!("finds page {page}, as written in round {version}, zero: main will name it"),
            ),
            Event::SendsSync { channel, section, page } => {
                line(source, Who::Channel(channel), format!("sends SYNC of round {section}{}", with(page)))
            }
            Event::OmitsSync { channel, section } => {
                line(source, Who::Channel(channel), format!("leaves out SYNC of round {section}"))
            }
            Event::SendsFlush { section } => line(source, Who::Main, format!("sends FLUSH of round {section}")),
            Event::OmitsFlush { section } => {
                line(source, Who::Main, format!("leaves out the sync point of round {section}"))
            }
            Event::SendsEos { section } => line(source, Who::Main, format!("sends end of section {section}")),
            Event::NamesZeros { pages } => line(source, Who::Main, format!("names as zero: {}", Pages(pages))),
            Event::SendersEnd => line(source, Who::Main, "joins the channels".into()),
            Event::SendsDevices => line(source, Who::Main, "sends the state of the devices".into()),
            Event::Confirmed => line(source, Who::Main, "has the confirmation, ends".into()),
            Event::Applies { by, page, version, over } => line(
                destination,
                by,
                match over {
                    0 => format!("puts page {page} of round {version} into place"),
                    _ => format!("puts page {page} of round {version} over that of round {over}"),
                },
            ),
            Event::TakesSync { channel, page } => {
                line(destination, Who::Channel(channel), format!("takes SYNC{}", with(page)))
            }
            Event::IsIgnored { channel } => {
                line(destination, Who::Channel(channel), "is taken for a stranger's connection".into())
            }
            Event::TakesSyncPoint { eos } => {
                line(destination, Who::Main, format!("takes {}", if eos { "the end of a section" } else { "FLUSH" }))
            }
            Event::IgnoresEos => line(destination, Who::Main, "passes over the end of a section".into()),
            Event::Starts => line(destination, Who::Main, "starts the VM".into()),
            Event::Fault(Fault::Stops(side)) => {
                line(side, Who::Main, "fails or is cancelled: all its threads return".into())
            }
            Event::Fault(Fault::Cut { connection, lost }) => {
                let what = if lost { "dies, what was under way is lost" } else { "dies behind what was under way" };
                write!(f, "{:<23} {what}", format!("connection of {connection}"))
            }
            Event::Ends { side, why } => match why {
                Why::WriteFailed(who) => line(side, who, "cannot write: all threads of this side return".into()),
                Why::Eof(who) => line(side, who, "sees the end of its connection".into()),
                Why::Incomplete => line(side, Who::Main, "does not know whether all channels have come".into()),
                Why::Done => line(side, Who::Main, "ends".into()),
            },
        }
    }
}

/// Names of the pages in a set.
struct Pages(u8);

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> =
            (0..MAX_PAGES).filter(|page| self.0 >> page & 1 == 1).map(|page| format!("page {page}")).collect();
        f.write_str(if names.is_empty() { "nothing" } else { "" })?;
        f.write_str(&names.join(", "))
    }
}
