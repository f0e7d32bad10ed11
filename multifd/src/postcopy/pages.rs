//! The pages in the file, which is read and not mapped: a file that became shorter is an error, not a signal.

use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf};

use crate::{
    checkpoint::{Checkpoint, CheckpointError, Stamp},
    dirty_bitmap::DirtyBitmap,
    error::Error,
    layout::Layout,
    sys::lease,
};

/// The memory of a VM in its checkpoint.
pub(super) struct FilePages {
    file: File,
    path: PathBuf,
    /// What the file was like when it was opened.
    stamp: Stamp,
    layout: Layout,
    /// Pages with content; all others are zeros.
    present: DirtyBitmap,
    /// Where each block's first page is.
    offsets: Vec<u64>,
}

impl FilePages {
    /// The memory in `checkpoint`.
    ///
    /// # Errors
    /// [`CheckpointError::BeingWritten`] where a process has the file open for writing, as far as the kernel tells;
    /// [`CheckpointError::Changed`] where one had.
    pub(super) fn new(checkpoint: &Checkpoint) -> Result<FilePages, Error> {
        let path = checkpoint.path().to_owned();
        let pages = FilePages {
            file: checkpoint.file().try_clone().map_err(|source| CheckpointError::Io {
                path: path.clone(),
                doing: "opening it once more",
                source,
            })?,
            path,
            stamp: checkpoint.stamp(),
            layout: checkpoint.layout().clone(),
            present: checkpoint.present().clone(),
            offsets: checkpoint.blocks().iter().map(|block| block.pages_offset).collect(),
        };
        if lease::is_open_for_writing(&pages.file) == Some(true) {
            return Err(CheckpointError::BeingWritten { path: pages.path }.into());
        }
        pages.check_unchanged()?;
        Ok(pages)
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(super) fn present(&self) -> &DirtyBitmap {
        &self.present
    }

    /// Puts the contents of `count` pages of block number `block`, from page number `page` on, into `into`.
    ///
    /// # Errors
    /// The kernel's; [`CheckpointError::Changed`] where the file is not what it was.
    pub(super) fn read(&self, block: usize, page: u64, count: usize, into: &mut Vec<u8>) -> Result<(), Error> {
        let offset = self.layout.blocks()[block].offset_of(page);
        into.resize(count * self.layout.page_size(), 0);
        match self.file.read_exact_at(into, self.offsets[block] + offset) {
            Ok(()) => self.check_unchanged(),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(CheckpointError::Changed { path: self.path.clone() }.into())
            }
            Err(source) => Err(self.failed("reading it", source)),
        }
    }

    /// # Errors
    /// [`CheckpointError::Changed`] where the file is not what it was when it was opened.
    pub(super) fn check_unchanged(&self) -> Result<(), Error> {
        match Stamp::of(&self.file) {
            Ok(stamp) if stamp == self.stamp => Ok(()),
            Ok(_) => Err(CheckpointError::Changed { path: self.path.clone() }.into()),
            Err(source) => Err(self.failed("asking for its length", source)),
        }
    }

    /// Reads from `file` in place of the checkpoint, whose blocks begin there at `offsets`.
    #[cfg(all(test, not(any(loom, shuttle))))]
    pub(super) fn read_instead(&mut self, file: File, offsets: Vec<u64>) {
        self.stamp = Stamp::of(&file).unwrap();
        (self.file, self.offsets) = (file, offsets);
    }

    pub(super) fn failed(&self, doing: &'static str, source: io::Error) -> Error {
        CheckpointError::Io { path: self.path.clone(), doing, source }.into()
    }
}
