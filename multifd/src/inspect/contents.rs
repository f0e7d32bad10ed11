//! Guest memory after a recorded migration, in a file without a name.

use std::{
    fs::File,
    io::{self, Read},
    ops::Range,
    path::{Path, PathBuf},
};

use crate::{
    checkpoint::{CheckpointError, FilePages, MAX_RAM, PageFile, unnamed_file},
    destination::PageSink,
    layout::Layout,
    sync::Arc,
};

/// A file for guest memory.
pub(super) struct Scratch {
    file: File,
    directory: PathBuf,
}

/// A file in `directory` that goes away with its last user.
pub(super) fn scratch(directory: &Path) -> Result<Scratch, CheckpointError> {
    Ok(Scratch { file: unnamed_file(directory)?, directory: directory.to_owned() })
}

/// Refuses guest memory for which there could be no bitmaps.
pub(super) fn check_size(layout: &Layout) -> Result<(), CheckpointError> {
    match layout.bytes() {
        bytes if bytes > MAX_RAM => Err(CheckpointError::TooMuchRam { bytes, limit: MAX_RAM }),
        _ => Ok(()),
    }
}

/// The contents of all RAM blocks.
pub struct Contents {
    layout: Layout,
    pages: FilePages,
}

impl Contents {
    pub(super) fn new(scratch: Scratch, layout: Layout) -> Result<Contents, CheckpointError> {
        let first = layout.blocks().iter().map(|block| block.first_page() * layout.page_size() as u64).collect();
        let pages =
            FilePages::new(PageFile::temporary(Arc::new(scratch.file)), scratch.directory, layout.clone(), first)?;
        Ok(Contents { layout, pages })
    }

    pub(super) fn store(&self, block: usize, offsets: &[u64], bytes: &[u8]) -> io::Result<()> {
        self.pages.store(block, offsets, bytes)
    }

    pub(super) fn zero(&self, block: usize, offsets: &[u64]) -> io::Result<()> {
        self.pages.zero(block, offsets)
    }

    pub(super) fn discard(&self, block: usize, range: Range<u64>) -> io::Result<()> {
        self.pages.discard(block, range)
    }

    pub(super) fn load(&self, block: usize, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.pages.load(block, offset, into)
    }

    /// The contents of block number `block`.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn block_reader(&self, block: usize) -> BlockContents<'_> {
        assert!(block < self.layout.blocks().len(), "no block {block}");
        BlockContents { contents: self, block, offset: 0 }
    }
}

/// Reads the contents of one block, front to back.
pub struct BlockContents<'a> {
    contents: &'a Contents,
    block: usize,
    /// A multiple of the page size.
    offset: u64,
}

impl Read for BlockContents<'_> {
    /// Reads whole pages; `into` has room for one at least.
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Contents { layout, pages } = self.contents;
        let end = layout.blocks()[self.block].bytes();
        let mut filled = 0;
        for page in into.chunks_exact_mut(layout.page_size()) {
            if self.offset == end {
                break;
            }
            pages.load(self.block, self.offset, page)?;
            self.offset += page.len() as u64;
            filled += page.len();
        }
        Ok(filled)
    }
}
