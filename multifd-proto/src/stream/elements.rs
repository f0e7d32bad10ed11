//! Elements of main that are read without regard to what came before.

use super::{
    COMMAND, CONFIGURATION, END, EOF, FOOTER, FULL, Item, MAGIC, MAPPED_RAM, MAX_CAPABILITIES, MAX_MACHINE, MAX_VMDESC,
    PART, START, SUBSECTION, VERSION, VMDESCRIPTION, X_IGNORE_SHARED,
};
use crate::command::Command;
use crate::ids::escape;
use crate::violation::{DecodeError, Mismatch, Violation};
use crate::wire::{Reader, Stop};

pub(super) fn header(reader: &mut Reader<'_>) -> Result<Item, Stop> {
    let magic = reader.u32()?;
    if magic != MAGIC {
        return Err(DecodeError::BadMagic { expected: MAGIC, found: magic }.into());
    }
    let version = reader.u32()?;
    if version != VERSION {
        return Err(DecodeError::BadVersion { what: "stream", expected: VERSION, found: version }.into());
    }
    Ok(Item::Header)
}

pub(super) fn configuration(reader: &mut Reader<'_>) -> Result<Item, Stop> {
    let byte = reader.u8()?;
    if matches!(byte, START | FULL | COMMAND) {
        // Their sections have no footers either.
        return Err(Mismatch::NoConfiguration.into());
    }
    if byte != CONFIGURATION {
        return Err(unexpected(element_name(byte)?, "instead of the configuration"));
    }
    let len = reader.u32()?;
    if len > MAX_MACHINE {
        let what = "length of the machine type";
        return Err(Violation::ConfigurationTooLong { what, len: len.into(), limit: MAX_MACHINE.into() }.into());
    }
    let machine = text("machine type", reader.bytes(len as usize)?)?.to_owned();
    Ok(Item::Configuration { machine })
}

pub(super) fn capabilities(reader: &mut Reader<'_>) -> Result<Vec<String>, Stop> {
    let count = reader.u32()?;
    if count > MAX_CAPABILITIES {
        let (len, limit) = (count.into(), MAX_CAPABILITIES.into());
        return Err(Violation::ConfigurationTooLong { what: "number of capabilities", len, limit }.into());
    }
    let mut names = Vec::new();
    for _ in 0..count {
        let name = text("capability", reader.pstr()?)?;
        if name != X_IGNORE_SHARED && name != MAPPED_RAM {
            return Err(Mismatch::Capability { name: escape(name.as_bytes()) }.into());
        }
        names.push(name.to_owned());
    }
    Ok(names)
}

pub(super) fn footer(reader: &mut Reader<'_>, section: u32) -> Result<Item, Stop> {
    let byte = reader.u8()?;
    if byte != FOOTER {
        return Err(Violation::FooterMissing { section, found: byte }.into());
    }
    let found = reader.u32()?;
    if found != section {
        return Err(Violation::BadFooter { expected: section, found }.into());
    }
    Ok(Item::Footer { section_id: section })
}

/// The answer to READY, behind the end of the stream.
pub(super) fn go(reader: &mut Reader<'_>) -> Result<Item, Stop> {
    reader.u8()?;
    match Command::read(reader)? {
        Command::Go => Ok(Item::Command(Command::Go)),
        other => Err(unexpected(other.name(), "after the end of the stream")),
    }
}

pub(super) fn tail(reader: &mut Reader<'_>) -> Result<Item, Stop> {
    let byte = reader.u8()?;
    if byte != VMDESCRIPTION {
        return Err(unexpected(element_name(byte)?, "after EOF"));
    }
    let len = reader.u32()?;
    if len > MAX_VMDESC {
        return Err(Violation::VmDescriptionTooLong { len: len.into(), limit: MAX_VMDESC.into() }.into());
    }
    Ok(Item::VmDescription { len: len as usize })
}

/// A name other than a block's: UTF-8, not empty.
pub(super) fn text<'a>(what: &'static str, bytes: &'a [u8]) -> Result<&'a str, DecodeError> {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.is_empty() => Ok(text),
        _ => Err(DecodeError::NameInvalid { what, name: escape(bytes) }),
    }
}

pub(super) fn unexpected(element: &'static str, place: &'static str) -> Stop {
    Violation::UnexpectedElement { element, place }.into()
}

pub(super) fn element_name(byte: u8) -> Result<&'static str, DecodeError> {
    Ok(match byte {
        EOF => "EOF",
        START => "SECTION_START",
        PART => "SECTION_PART",
        END => "SECTION_END",
        FULL => "SECTION_FULL",
        SUBSECTION => "subsection",
        VMDESCRIPTION => "VMDESCRIPTION",
        CONFIGURATION => "configuration",
        COMMAND => "COMMAND",
        FOOTER => "footer",
        _ => return Err(DecodeError::UnknownElement { byte }),
    })
}
