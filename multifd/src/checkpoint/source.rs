//! The VM in a checkpoint as a source: it is paused, and its memory is the file.

use std::{fs::File, io, path::PathBuf};

use super::{Checkpoint, CheckpointBlock, CheckpointError, read::Stamp};
use crate::{
    dirty::DirtyLog,
    dirty_bitmap::DirtyBitmap,
    ram::Ram,
    sections::Sections,
    source::{self, Flush, Replay, Untouched},
    sys::file_block::{FilePart, file_block},
    vm::{SourceVm, VmError},
};

/// The VM in a checkpoint, to be passed to [`Source::run`](source::Source::run) any number of times.
///
/// The contents of a page are in the file until it is sent. A file that is changed meanwhile ends the migration with
/// [`CheckpointError::Changed`], as far as its length or its time of modification tell.
pub struct CheckpointSource {
    ram: Ram,
    file: File,
    path: PathBuf,
    stamp: Stamp,
    /// Pages that are zeros whatever the file has in their place.
    zeros: DirtyBitmap,
    sections: Vec<u8>,
    vmdescription: Vec<u8>,
    log: NoWrites,
}

impl CheckpointSource {
    /// Makes room for the memory of `checkpoint`. Of one whose memory is [elsewhere](Checkpoint::memory_elsewhere) only the rest
    /// is sent: the destination has to map the same memory, and nothing on the wire tells whether it does.
    ///
    /// # Errors
    /// The kernel's, and blocks that cannot be handled.
    pub fn new(checkpoint: &Checkpoint) -> Result<CheckpointSource, CheckpointError> {
        let path = checkpoint.path();
        let mut blocks = Vec::new();
        for block in checkpoint.blocks().iter().filter(|block| !block.elsewhere) {
            let io =
                |source| CheckpointError::Io { path: path.to_owned(), doing: "making room for its memory", source };
            let len = usize::try_from(block.bytes).map_err(|_| io(io::ErrorKind::OutOfMemory.into()))?;
            let file = checkpoint.file().try_clone().map_err(io)?;
            let part = FilePart { file, path: path.to_owned(), offset: block.pages_offset };
            blocks.push(file_block(block.name.clone(), part, len).map_err(io)?);
        }
        let io = |source| CheckpointError::Io { path: path.to_owned(), doing: "opening it once more", source };
        let file = checkpoint.file().try_clone().map_err(io)?;
        let page_size = checkpoint.layout().page_size();
        let ram =
            Ram::new(page_size, blocks).map_err(|source| CheckpointError::Ram { path: path.to_owned(), source })?;
        let zeros = zeros_of(checkpoint, &ram);
        Ok(CheckpointSource {
            ram,
            file,
            path: path.to_owned(),
            stamp: checkpoint.stamp(),
            zeros,
            sections: checkpoint.sections().to_vec(),
            vmdescription: checkpoint.vmdescription().to_vec(),
            log: NoWrites,
        })
    }
}

/// The pages of `ram` that are zeros in `checkpoint`. Both have the same blocks, but for those whose memory is elsewhere.
fn zeros_of(checkpoint: &Checkpoint, ram: &Ram) -> DirtyBitmap {
    let mut zeros = DirtyBitmap::full(ram.layout());
    if checkpoint.check_whole().is_ok() {
        // The pages have the same numbers.
        zeros.subtract(checkpoint.present());
        return zeros;
    }
    let kept = checkpoint.blocks().iter().zip(checkpoint.layout().blocks()).filter(|(block, _)| !block.elsewhere);
    for ((_, from), to) in kept.zip(ram.layout().blocks()) {
        let pages = from.page_range();
        let mut next = checkpoint.present().next(pages.start);
        while let Some(page) = next.filter(|page| pages.contains(page)) {
            let page = to.page_at(from.offset_of(page));
            zeros.clear_range(page..page + 1);
            next = checkpoint.present().next(from.page_at(to.offset_of(page)) + 1);
        }
    }
    zeros
}

impl Checkpoint {
    /// Sets what a source has to know to send this checkpoint: machine type, UUID, the `ram` section's id and
    /// early sections, and that pages of zeros have to be named. A destination that is a QEMU answers its monitor
    /// while it waits, so FLUSH is sent late.
    pub fn apply_to(&self, options: &mut source::Options) {
        options.qemu.machine = self.machine().to_owned();
        options.qemu.uuid = self.uuid().unwrap_or_default();
        options.qemu.validate_uuid = self.uuid().is_some();
        let listed = match self.memory_elsewhere().next() {
            None => Vec::new(),
            Some(_) => self.blocks().iter().map(CheckpointBlock::listed).collect(),
        };
        options.qemu.replay = Replay {
            ram_section: self.ram_section(),
            beside_ram: self.beside_ram().clone(),
            listed,
            packets: self.packets().cloned(),
        };
        options.format.untouched = Untouched::Name;
        options.qemu.flush = Flush::Late;
    }
}

impl SourceVm for CheckpointSource {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn dirty_log(&mut self) -> &mut dyn DirtyLog {
        &mut self.log
    }

    fn untouched(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        into.merge(&self.zeros);
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn save(&mut self, out: &mut Sections) -> Result<(), VmError> {
        // The last moment at which the migration can still fail.
        if Stamp::of(&self.file)? != self.stamp {
            return Err(CheckpointError::Changed { path: self.path.clone() }.into());
        }
        out.replay(self.sections.clone(), self.vmdescription.clone());
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

/// The log of memory that is not written.
struct NoWrites;

impl DirtyLog for NoWrites {
    fn name(&self) -> &'static str {
        "none"
    }

    fn start(&mut self, _ram: &Ram) -> io::Result<()> {
        Ok(())
    }

    fn drain(&mut self, _into: &mut DirtyBitmap) -> io::Result<()> {
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}
