//! What follows RAM on main: kept as it is, without understanding any device.
//!
//! Device state has no length on the wire. Its end is where the stream ends, and that is found by its shape: the end of
//! state, and a description of all devices that ends with the last byte received. With the return path open the source
//! waits for our answer then, so the end of the connection must not be waited for.
//!
//! Where the description is suppressed, the end of state is the last byte: behind the footer of the last of several sections
//! that follow one another without a gap. Without return path the connection ends there. With it, nothing more comes; the
//! silence only says when to look, and the shape decides. It takes a byte 00 behind the five bytes of the footer of the very
//! section that is under way, as the last thing that the network brings for a second, for device state to be taken for
//! its end.

use std::io;

use multifd_proto::{
    encoder::MainEncoder,
    stream::{EOF, EarlyScanner, Section},
    vmdesc::{self, TailEnd, TailScanner, VmDescription},
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
    /// Takes all of `main`, of which the head of the first device's section was read.
    pub(crate) fn receive(first: &Section, main: &mut MainReader) -> Result<Tail, Error> {
        let mut encoder = MainEncoder::new();
        let mut bytes = encoder.section(first).as_bytes().to_vec();
        let mut scanner = TailScanner::new();
        loop {
            let received = main.unread().len();
            bytes.extend_from_slice(main.unread());
            main.consume(received);
            main.body_taken(received as u64);
            if bytes.len() > MAX_DEVICE_STATE {
                return Err(CheckpointError::TooMuchDeviceState { limit: MAX_DEVICE_STATE }.into());
            }
            let end = scanner.scan(&bytes).map(|end| Tail::new(&bytes, &end));
            if let Some(tail) = &end
                && (tail.is_complete() || main.source_waits())
            {
                return Ok(tail.clone());
            }
            if let Some(end) = scanner.passed(&bytes).find(|end| Tail::new(&bytes, end).is_complete()) {
                let at = main.place();
                return Err(more_bytes(Place { offset: at.offset - (bytes.len() - end.json.end) as u64, ..at }));
            }
            // The shape is looked at once it matters: for each piece that ends so, all of the state would be searched again.
            let received = if bytes.ends_with(&[EOF]) { main.receive_end()? } else { Some(main.receive()?) };
            let at = main.place();
            let tail = match received {
                Some(1..) => continue,
                Some(0) if main.source_waits() => end,
                Some(0) => end.or_else(|| Tail::without_description(&bytes)),
                None => match Tail::without_description(&bytes) {
                    None => continue,
                    tail => tail,
                },
            };
            return tail.ok_or(Error::Io { at, source: io::ErrorKind::UnexpectedEof.into() });
        }
    }

    fn new(bytes: &[u8], end: &TailEnd) -> Tail {
        Tail { sections: bytes[..end.eof_at].to_vec(), vmdescription: bytes[end.json.clone()].to_vec() }
    }

    /// What `bytes`, everything behind RAM, consists of.
    pub(super) fn in_file(bytes: &[u8]) -> Option<Tail> {
        match vmdesc::find_end(bytes) {
            Some(end) => Some(Tail::new(bytes, &end)),
            None => Tail::without_description(bytes),
        }
    }

    /// Whether the sections are exactly those described: no end in the middle of a device's state looks like that.
    fn is_complete(&self) -> bool {
        VmDescription::parse(&self.vmdescription)
            .is_ok_and(|description| vmdesc::cut(&self.sections, &description).is_ok())
    }

    fn without_description(bytes: &[u8]) -> Option<Tail> {
        let sections = bytes.strip_suffix(&[EOF])?;
        vmdesc::look_whole(sections).then(|| Tail { sections: sections.to_vec(), vmdescription: Vec::new() })
    }
}

/// The section of a device that comes before the pages, whole: `main` goes on with its footer afterwards. All such sections
/// before it have `before` bytes.
pub(crate) fn early_section(section: &Section, main: &mut MainReader, before: usize) -> Result<Vec<u8>, Error> {
    let Some(ram_section) = main.decoder().ram_section() else {
        return Err(CheckpointError::SectionBeforeRam { name: section.name.clone() }.into());
    };
    let mut encoder = MainEncoder::new();
    let head = encoder.section(section).as_bytes().len();
    let mut scanner = EarlyScanner::new(section.id, ram_section);
    let len = loop {
        let found = scanner.scan(main.unread());
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
    Ok(encoder.as_bytes().to_vec())
}

/// Refuses early sections of `bytes` in all.
pub(super) fn check_early_state(bytes: usize) -> Result<(), CheckpointError> {
    if bytes > MAX_EARLY_STATE {
        return Err(CheckpointError::TooMuchEarlyState { limit: MAX_EARLY_STATE });
    }
    Ok(())
}
