//! What follows RAM on main: kept as it is, without understanding any device.
//!
//! Device state has no length on the wire. Its end is where the stream ends: at an end of state, followed by a description
//! of all devices. With the return path open the source keeps main open there and waits for our answer, so the end of the
//! connection must not be waited for.
//!
//! Device state holds bytes that the guest chose, and they can look like an end. So an end counts only if
//!
//! 1. all sections are exactly those described ([`vmdesc::cut_all`]): names, instances, lengths, footers, nothing between
//!    them and nothing left. What a guest puts somewhere in its memory does not do that by accident;
//! 2. no byte follows it for [`QUIET`]. A guest that knows the devices before its own can write a description that fits up
//!    to its own bytes. Behind those, the source has more to send; behind the true end it has nothing;
//! 3. no byte follows it until the source closes main. Until then the decision can be wrong, namely where the connection
//!    stalled for longer than [`QUIET`] at a byte that the guest chose. Then what follows is put behind the rest, and 1.
//!    holds for the whole ([`Tail::extend`]).
//!
//! A source of ours puts the token of the migration behind the end, which no guest knows
//! ([`EndToken`](multifd_proto::extension::Extension::EndToken)). There 1. holds, and the token takes the place of 2.: nothing is waited
//! for, and no stall is long enough to be taken for the end ([`Tail::up_to_token`]).
//!
//! Where the description is suppressed, the end of state is the last byte: behind the footer of the last of several sections
//! that follow one another without a gap. The same rules hold, with this shape instead of 1. and [`QUIET_UNDESCRIBED`] in 2.
//!
//! A background snapshot has no END of `ram`, so it is not known before its end whether a section behind the pages is the first of
//! all devices or one that is needed early ([`Tail::ahead`]). Such a source closes main at the end and waits for no answer.
//!
//! Every byte is looked at a bounded number of times: beginnings of an end are found once, a description is parsed when it
//! is complete, and no byte belongs to more than three.

use std::{io, time::Duration};

use multifd_proto::{
    bodies::BodyScanner,
    encoder::MainEncoder,
    stream::{EOF, FOOTER, Section},
    vmdesc::{self, CutError, TailEnd, TailScanner, VmDescription, WholeScanner},
};

use super::{CheckpointError, MAX_DEVICE_STATE, MAX_EARLY_STATE};
use crate::{
    destination::{MainReader, more_bytes},
    error::{Error, Place},
};

/// Device state of a whole VM, with what describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tail {
    /// All sections as they stand on the wire, up to the end of state.
    pub(crate) sections: Vec<u8>,
    /// The description; empty where the source sent none.
    pub(crate) vmdescription: Vec<u8>,
}

impl Tail {
    /// Takes all of `main`, of which the head of the first device's section was read, and before the pages the sections
    /// `early`.
    pub(crate) fn receive(first: &Section, early: &[u8], main: &mut MainReader) -> Result<Tail, Error> {
        if let Some(token) = main.end_token() {
            return Tail::up_to_token(first, early, main, &token);
        }
        let mut search = Search::new(first, early);
        search.take(main)?;
        loop {
            let received = match search.patience() {
                // A recording ends where its file does.
                Some(patience) if !main.is_recorded() => main.receive_within(patience)?,
                _ => Some(main.receive()?),
            };
            match received {
                Some(1..) => search.take(main)?,
                Some(0) => return search.ended(main),
                None => {
                    if let Some(tail) = search.quiet(main)? {
                        return Ok(tail);
                    }
                }
            }
        }
    }

    /// Takes all of `main` up to `token`, which the source sends behind the end and nothing after it.
    fn up_to_token(first: &Section, early: &[u8], main: &mut MainReader, token: &[u8]) -> Result<Tail, Error> {
        let mut bytes = MainEncoder::default().section(first).bytes.clone();
        let mut looked = 0;
        loop {
            let received = main.unread().len();
            if bytes.len() + received > MAX_DEVICE_STATE + token.len() {
                return Err(CheckpointError::TooMuchDeviceState { limit: MAX_DEVICE_STATE }.into());
            }
            bytes.extend_from_slice(main.unread());
            main.consume(received);
            main.body_taken(received as u64);
            // It may have begun to come before.
            if let Some(found) = bytes[looked..].windows(token.len()).position(|window| window == token) {
                let (end, behind) = (looked + found, looked + found + token.len());
                if bytes.len() > behind {
                    return Err(self::behind(&bytes, behind, main));
                }
                return Tail::whole(&bytes[..end], early, main);
            }
            looked = (bytes.len() + 1).saturating_sub(token.len());
            if main.receive()? == 0 {
                return Err(Error::Io { at: main.place(), source: io::ErrorKind::UnexpectedEof.into() });
            }
        }
    }

    /// What `bytes`, everything from the first section to the end of the stream, consists of.
    fn whole(bytes: &[u8], early: &[u8], main: &MainReader) -> Result<Tail, Error> {
        match TailScanner::default().scan(bytes) {
            Some(end) => match fits(early, bytes, &end) {
                Ok(()) => Ok(Tail::new(bytes, &end)),
                Err(source) => Err(CheckpointError::NotDescribed { source }.into()),
            },
            None => Tail::without_description(bytes)
                .ok_or_else(|| Error::Io { at: main.place(), source: io::ErrorKind::UnexpectedEof.into() }),
        }
    }

    /// Takes all of `main`, as [`receive`](Self::receive) does, if that is the state of all devices. Takes nothing of it where
    /// another section of `ram` follows: then `first` is state that is needed early.
    ///
    /// # Errors
    /// Neither of the two: main ended in the middle, or the sections are not those described. The connection's.
    pub(crate) fn ahead(first: &Section, early: &[u8], main: &mut MainReader) -> Result<Option<Tail>, Error> {
        let mut bytes = MainEncoder::default().section(first).bytes.clone();
        // More than that are pages.
        while bytes.len() + main.unread().len() <= MAX_DEVICE_STATE {
            if main.receive()? > 0 {
                continue;
            }
            let received = main.unread().len();
            bytes.extend_from_slice(main.unread());
            let tail = match TailScanner::default().scan(&bytes) {
                Some(end) => match fits(early, &bytes, &end) {
                    Ok(()) => Ok(Tail::new(&bytes, &end)),
                    Err(_) if ram_goes_on(&bytes, main) => return Ok(None),
                    // The end of a recording is certain; its reader is told that the description is wrong.
                    Err(_) if main.is_recorded() => Ok(Tail::new(&bytes, &end)),
                    Err(source) => Err(CheckpointError::NotDescribed { source }.into()),
                },
                None if ram_goes_on(&bytes, main) => return Ok(None),
                None => Tail::without_description(&bytes).ok_or_else(|| {
                    let at = main.place();
                    let at = Place { offset: at.offset + received as u64, ..at };
                    Error::Io { at, source: io::ErrorKind::UnexpectedEof.into() }
                }),
            };
            main.consume(received);
            main.body_taken(received as u64);
            return tail.map(Some);
        }
        Ok(None)
    }

    /// What `bytes`, everything behind RAM in a file, consists of. `early` are the sections before the pages.
    ///
    /// # Errors
    /// Where an end lies that fits and has more behind it, if there is one.
    pub(super) fn in_file(bytes: &[u8], early: &[u8]) -> Result<Tail, Option<usize>> {
        let mut scanner = TailScanner::default();
        if let Some(end) = scanner.scan(bytes) {
            return Ok(Tail::new(bytes, &end));
        }
        let passed = scanner.passed(bytes).find(|end| fits(early, bytes, end).is_ok());
        match passed {
            Some(end) => Err(Some(end.json.end)),
            None => Tail::without_description(bytes).ok_or(None),
        }
    }

    /// Puts `more` behind it, which the source sent behind what was taken for the end.
    ///
    /// # Errors
    /// That is no whole state: the source has sent something behind the end, or not all.
    pub(super) fn extend(&self, early: &[u8], more: &[u8]) -> Result<Tail, Error> {
        let mut bytes = self.to_bytes();
        bytes.extend_from_slice(more);
        let whole = match TailScanner::default().scan(&bytes) {
            Some(end) if fits(early, &bytes, &end).is_ok() => Some(Tail::new(&bytes, &end)),
            Some(_) => None,
            None => Tail::without_description(&bytes),
        };
        whole.ok_or_else(|| CheckpointError::BytesBehindTheEnd { bytes: more.len() }.into())
    }

    /// Everything as it stands on the wire.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut encoder = MainEncoder::default();
        encoder.raw(&self.sections).eof();
        if !self.vmdescription.is_empty() {
            encoder.vm_description(&self.vmdescription);
        }
        encoder.bytes.clone()
    }

    fn new(bytes: &[u8], end: &TailEnd) -> Tail {
        Tail { sections: bytes[..end.eof_at].to_vec(), vmdescription: bytes[end.json.clone()].to_vec() }
    }

    fn without_description(bytes: &[u8]) -> Option<Tail> {
        let sections = bytes.strip_suffix(&[EOF])?;
        WholeScanner::default().scan(sections).then(|| Tail { sections: sections.to_vec(), vmdescription: Vec::new() })
    }
}

/// The search for the end of main.
struct Search<'a> {
    early: &'a [u8],
    /// From the head of the first section on.
    bytes: Vec<u8>,
    ends: TailScanner,
    whole: WholeScanner,
    ahead: Ahead,
    /// Where an end was that fits and has more behind it.
    passed: Option<usize>,
}

/// What the last bytes received look like.
enum Ahead {
    /// An end that fits.
    End(TailEnd),
    /// An end that does not fit what is before it.
    Unfit(TailEnd, CutError),
    /// Something that may be the end of state, without a description.
    EndOfState,
    Nothing,
}

impl Search<'_> {
    fn new<'a>(first: &Section, early: &'a [u8]) -> Search<'a> {
        let bytes = MainEncoder::default().section(first).bytes.clone();
        let (ends, whole) = (TailScanner::default(), WholeScanner::default());
        Search { early, bytes, ends, whole, ahead: Ahead::Nothing, passed: None }
    }

    /// Takes what `main` has received.
    fn take(&mut self, main: &mut MainReader) -> Result<(), Error> {
        let received = main.unread().len();
        if self.bytes.len() + received > MAX_DEVICE_STATE {
            return Err(CheckpointError::TooMuchDeviceState { limit: MAX_DEVICE_STATE }.into());
        }
        self.bytes.extend_from_slice(main.unread());
        main.consume(received);
        main.body_taken(received as u64);
        let end = self.ends.scan(&self.bytes);
        if self.passed.is_none() {
            let mut passed = self.ends.passed(&self.bytes).filter(|end| fits(self.early, &self.bytes, end).is_ok());
            self.passed = passed.next().map(|end| end.json.end);
        }
        self.ahead = match end {
            Some(end) => match fits(self.early, &self.bytes, &end) {
                Ok(()) => Ahead::End(end),
                Err(error) => Ahead::Unfit(end, error),
            },
            None if self.bytes.last() == Some(&EOF) => Ahead::EndOfState,
            None => Ahead::Nothing,
        };
        Ok(())
    }

    /// How long to wait for the next byte before it matters that there is none.
    fn patience(&self) -> Option<Duration> {
        match self.ahead {
            Ahead::End(_) => Some(QUIET),
            Ahead::EndOfState => Some(QUIET_UNDESCRIBED),
            Ahead::Unfit(..) => Some(PATIENCE),
            Ahead::Nothing => self.passed.map(|_| PATIENCE),
        }
    }

    /// The source has said nothing for as long as [`patience`](Self::patience).
    fn quiet(&mut self, main: &MainReader) -> Result<Option<Tail>, Error> {
        match std::mem::replace(&mut self.ahead, Ahead::Nothing) {
            Ahead::End(end) => Ok(Some(Tail::new(&self.bytes, &end))),
            Ahead::Unfit(_, source) => Err(CheckpointError::NotDescribed { source }.into()),
            Ahead::EndOfState => {
                let sections = &self.bytes[..self.bytes.len() - 1];
                // Behind an end that fits, nothing without a description is one.
                let whole = self.passed.is_none() && self.whole.scan(sections);
                Ok(whole.then(|| Tail { sections: sections.to_vec(), vmdescription: Vec::new() }))
            }
            Ahead::Nothing => self.passed.map_or(Ok(None), |passed| Err(self.behind(passed, main))),
        }
    }

    /// Main has ended.
    fn ended(self, main: &MainReader) -> Result<Tail, Error> {
        let unexpected = || Error::Io { at: main.place(), source: io::ErrorKind::UnexpectedEof.into() };
        match (self.ahead, self.passed) {
            // It would wait for our answer: it has died or given up, and in the latter case its VM runs on.
            (_, None) if main.source_listens() => Err(unexpected()),
            (Ahead::End(_), Some(_)) if main.source_listens() => Err(unexpected()),
            (Ahead::End(end), _) => Ok(Tail::new(&self.bytes, &end)),
            // The end of a recording is certain; its reader is told that the description is wrong.
            (Ahead::Unfit(end, _), None) if main.is_recorded() => Ok(Tail::new(&self.bytes, &end)),
            (_, Some(passed)) => Err(behind(&self.bytes, passed, main)),
            (Ahead::Unfit(_, source), None) => Err(CheckpointError::NotDescribed { source }.into()),
            (Ahead::EndOfState | Ahead::Nothing, None) => Tail::without_description(&self.bytes).ok_or_else(unexpected),
        }
    }

    fn behind(&self, end: usize, main: &MainReader) -> Error {
        behind(&self.bytes, end, main)
    }
}

/// More follows behind the `end` of main in `bytes`, which are all that was received.
fn behind(bytes: &[u8], end: usize, main: &MainReader) -> Error {
    let at = main.place();
    more_bytes(Place { offset: at.offset - (bytes.len() - end) as u64, ..at })
}

/// Whether a PART or END section of `ram` may follow a section in `bytes`.
fn ram_goes_on(bytes: &[u8], main: &MainReader) -> bool {
    let Some(ram) = main.decoder().ram_section() else { return true };
    let [part, end] = [false, true].map(|end| MainEncoder::default().ram_part(ram, end).bytes.clone());
    // A footer, with an id of four bytes.
    let footers = bytes.windows(5 + part.len()).filter(|window| window[0] == FOOTER);
    footers.map(|window| &window[5..]).any(|next| next == part || next == end)
}

/// Whether all sections, `early` and those in `bytes`, are what the description at `end` says.
fn fits(early: &[u8], bytes: &[u8], end: &TailEnd) -> Result<(), CutError> {
    let Ok(description) = VmDescription::parse(&bytes[end.json.clone()]) else {
        return Err(CutError::Truncated { at: 0 });
    };
    vmdesc::cut_all(early, &bytes[..end.eof_at], &description).map(|_| ())
}

/// A section beside `ram`, whole: `main` goes on with its footer afterwards. All such sections before it have `before`
/// bytes.
pub(crate) fn section_beside_ram(section: &Section, main: &mut MainReader, before: usize) -> Result<Vec<u8>, Error> {
    let at = main.place();
    let mut scanner = BodyScanner::new(section, main.decoder().ram_section()).map_err(Error::protocol(at))?;
    let mut encoder = MainEncoder::default();
    let head = encoder.section(section).bytes.len();
    let len = loop {
        let found = scanner.scan(main.unread()).map_err(Error::protocol(at))?;
        check_early_state(before + head + found.unwrap_or(main.unread().len()))?;
        if let Some(len) = found {
            break len;
        }
        if main.receive()? == 0 {
            return Err(Error::Io { at: main.place(), source: io::ErrorKind::UnexpectedEof.into() });
        }
    };
    encoder.raw(&main.unread()[..len]).footer(section.id);
    main.consume(len);
    main.body_taken(len as u64);
    Ok(encoder.bytes.clone())
}

/// Refuses early sections of `bytes` in all.
pub(super) fn check_early_state(bytes: usize) -> Result<(), CheckpointError> {
    if bytes > MAX_EARLY_STATE {
        return Err(CheckpointError::TooMuchEarlyState { limit: MAX_EARLY_STATE });
    }
    Ok(())
}

/// How long the source must say nothing behind an end for it to count. Every migration of a QEMU with the return path waits this
/// long at its end, with its guest paused. A source that has more to send does so at once, so all that can come between is the
/// network and the scheduler: this is more than the 200 ms after which Linux sends a lost segment again at the earliest. What
/// stalls for longer, at a byte that the guest chose, is repaired by rule 3.
pub(crate) const QUIET: Duration = Duration::from_millis(250);
/// The same where the source has described nothing so far: most often its description is still to come, and else a guest can
/// write the shape of an end without knowing the other devices. This is enough for a lost segment to be sent again twice.
pub(crate) const QUIET_UNDESCRIBED: Duration = Duration::from_secs(1);
/// How long the source may say nothing where the stream looks ended and is not what it says.
const PATIENCE: Duration = Duration::from_secs(5);
