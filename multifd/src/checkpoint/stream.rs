//! Writes a checkpoint as the plain stream that its QEMU would have sent to a file or pipe: without channels, front to back.
//!
//! Every page of every block is named, so a reader can tell that none is missing.

use std::{
    io::{self, Read, Write},
    path::Path,
};

use multifd_proto::{
    command::Command, encoder::MainEncoder, machine::MachineDefaults, ram::BlockEntry, stream::X_IGNORE_SHARED,
};

#[cfg(doc)]
use super::CheckpointError;
use super::{Checkpoint, PAGE_SIZE, pending::PendingFile};
use crate::{error::Error, stop::StopHandle};

impl Checkpoint {
    /// Writes all of it to `out` as a plain migration stream, which a QEMU loads from `exec:`, `fd:` or `file:`. A stream whose
    /// memory is [elsewhere](Self::memory_elsewhere) says so, and QEMU takes it with `x-ignore-shared` on.
    ///
    /// # Errors
    /// Those of `out`, and of the file, which say so. [`CheckpointError::NeedsChannels`], as the source of the error.
    pub fn write_stream(&self, out: &mut dyn Write) -> io::Result<()> {
        self.check_needs_no_channels().map_err(io::Error::other)?;
        let mut encoder = MainEncoder::default();
        self.beginning(&mut encoder);
        let mut part = Vec::with_capacity(READ_SIZE);
        for (index, _) in self.blocks().iter().enumerate().filter(|(_, block)| !block.elsewhere) {
            self.pages(index, &mut encoder, &mut part, out)?;
        }
        self.end(&mut encoder);
        flush(&mut encoder, out)?;
        self.check_unchanged()?;
        out.flush()
    }

    /// Writes all of it to the new file `path` as a plain migration stream, behind `preamble`. The file has its name when it is
    /// complete and on disk; one that has the name is replaced only if `replace` says so. Returns its length.
    ///
    /// # Errors
    /// [`Error::Cancelled`] when `stop` was told to; [`Error::Checkpoint`]. The file is not there then, and one that was to be
    /// replaced still is, unless the error is [`Published`](super::CheckpointError::Published).
    pub fn save_stream(&self, path: &Path, replace: bool, preamble: &[u8], stop: &StopHandle) -> Result<u64, Error> {
        self.check_needs_no_channels()?;
        let mut pending = PendingFile::create(path, replace)?;
        let mut out = UntilStopped { out: &**pending.file(), stop, written: 0 };
        let written = out.write_all(preamble).and_then(|()| self.write_stream(&mut out)).map(|()| out.written);
        if stop.is_stopped() {
            return Err(stop.take_first().unwrap_or(Error::Stopped));
        }
        let written = written.map_err(pending.error("writing to it"))?;
        pending.sync()?;
        // A cancel that came before wins.
        if stop.decide().is_err() {
            return Err(stop.take_first().unwrap_or(Error::Stopped));
        }
        pending.publish()?;
        Ok(written)
    }

    /// Everything up to the first page.
    fn beginning(&self, encoder: &mut MainEncoder) {
        let beside = self.beside_ram();
        encoder.header().configuration(self.machine());
        let is_whole = self.memory_elsewhere().next().is_none();
        if !is_whole {
            encoder.config_capabilities(&[X_IGNORE_SHARED]);
        }
        if let Some(uuid) = self.uuid() {
            encoder.config_uuid(&uuid);
        }
        encoder.raw(beside.before_ram()).ram_start(self.ram_section(), self.layout().bytes());
        for block in self.blocks() {
            encoder.block(&match is_whole {
                true => BlockEntry::new(block.name.clone(), block.bytes),
                false => block.listed(),
            });
        }
        encoder.eos().footer(self.ram_section()).raw(beside.behind_ram_start()).raw(beside.in_parts());
    }

    /// The pages of block number `index`, in sections of about a mebibyte.
    fn pages(&self, index: usize, encoder: &mut MainEncoder, buf: &mut Vec<u8>, out: &mut dyn Write) -> io::Result<()> {
        let (block, section) = (&self.blocks()[index], self.ram_section());
        let mut reader = self.block_reader(index);
        let mut offset = 0;
        while offset < block.bytes {
            encoder.ram_part(section, false);
            let (run, zeros) = reader.run();
            let len = run.min(if zeros { ZEROS_AT_ONCE } else { READ_SIZE as u64 });
            let offsets = (offset..offset + len).step_by(PAGE_SIZE);
            if zeros {
                reader.skip(len);
                for offset in offsets {
                    encoder.zero_page(&block.name, offset);
                }
            } else {
                buf.resize(len as usize, 0);
                let named = |error: io::Error| io::Error::new(error.kind(), format!("{:?}: {error}", self.path()));
                reader.read_exact(buf).map_err(named)?;
                for (offset, page) in offsets.zip(buf.chunks_exact(PAGE_SIZE)) {
                    encoder.page(&block.name, offset).raw(page);
                }
            }
            encoder.eos().footer(section);
            flush(encoder, out)?;
            offset += len;
        }
        Ok(())
    }

    /// Everything after the last page.
    fn end(&self, encoder: &mut MainEncoder) {
        let section = self.ram_section();
        if MachineDefaults::of(self.machine()).is_some_and(|defaults| defaults.switchover_start) {
            encoder.command(&Command::SwitchoverStart);
        }
        encoder.ram_part(section, true).eos().footer(section).raw(self.sections()).eof();
        if !self.vmdescription().is_empty() {
            encoder.vm_description(self.vmdescription());
        }
    }
}

/// Writes until it is told to stop.
struct UntilStopped<'a, W> {
    out: W,
    stop: &'a StopHandle,
    written: u64,
}

impl<W: Write> Write for UntilStopped<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.stop.is_stopped() {
            return Err(io::Error::other("it was stopped"));
        }
        let n = self.out.write(bytes)?;
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn flush(encoder: &mut MainEncoder, out: &mut dyn Write) -> io::Result<()> {
    out.write_all(&encoder.bytes)?;
    encoder.bytes.clear();
    Ok(())
}

/// Bytes of pages with content in one section.
const READ_SIZE: usize = 1 << 20;
/// Bytes of pages of zeros in one section, which take nine bytes each there.
const ZEROS_AT_ONCE: u64 = 256 << 20;
