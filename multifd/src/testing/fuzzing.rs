//! What fuzzers need of the inside of the engine. Not an interface: it changes with the engine.

use std::io;

use multifd_proto::{BlockName, packet::Compression};

use super::trace;
use crate::{compress, destination, ram::Ram, sys::guarded};

/// Fresh memory with the given blocks (name and pages of 4 KiB), each between pages that end the process when touched.
///
/// # Errors
/// The kernel's; a name or length that no block can have.
pub fn guarded_ram(blocks: &[(&str, usize)]) -> io::Result<Ram> {
    let block = |&(name, pages): &(&str, usize)| {
        let name = BlockName::new(name).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        guarded::block(name, pages * 4096)
    };
    let blocks = blocks.iter().map(block).collect::<io::Result<_>>()?;
    Ram::new(4096, blocks).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

/// The steps of a destination, to be checked against the round law.
#[derive(Debug)]
pub struct Steps(trace::Trace);

impl Steps {
    /// Records what a destination with these options does.
    pub fn of(options: &mut destination::Options) -> Steps {
        options.trace = trace::Trace::recording();
        Steps(options.trace.clone())
    }

    /// Asserts that nothing of a round was applied before all connections had passed the one before. Returns how many steps there were.
    ///
    /// # Panics
    /// With the steps that led to one that the law does not allow.
    pub fn assert_allowed(&self) -> usize {
        let steps = self.0.steps();
        if let Err(refused) = trace::check_destination(&steps) {
            panic!("{refused}");
        }
        steps.len()
    }
}

/// Decompresses the packets of one channel one after the other, each into `len` bytes. Returns the last.
///
/// # Errors
/// The first packet that is damaged.
pub fn decompress<'a>(
    method: Compression,
    packets: impl IntoIterator<Item = &'a [u8]>,
    len: usize,
) -> io::Result<Vec<u8>> {
    let mut decompressor = compress::Decompressor::new(method, &Default::default())?;
    let mut out = vec![0; len];
    for packet in packets {
        decompressor.decompress(packet, &mut out)?;
    }
    Ok(out)
}

/// Decompresses a page of main.
///
/// # Errors
/// It is damaged, or not as long as `len`.
pub fn inflate_page(payload: &[u8], len: usize) -> io::Result<Vec<u8>> {
    let mut page = vec![0; len];
    compress::inflate_page(payload, &mut page)?;
    Ok(page)
}

/// Compresses zeros and content, as a channel does it: a payload to begin with.
///
/// # Errors
/// The method was left out of this build.
pub fn compress(method: Compression, pages: usize) -> io::Result<Vec<u8>> {
    let ram = guarded_ram(&[("ram", pages)])?;
    let ranges: Vec<_> = (0..pages as u64).filter_map(|page| ram.page(page)).collect();
    for range in ranges.iter().step_by(2) {
        range.write(&(0..4096u32).map(|i| (i * i / 7) as u8).collect::<Vec<u8>>());
    }
    let mut out = Vec::new();
    compress::Compressor::new(method, 1)?.compress(&ranges, &mut out)?;
    Ok(out)
}
