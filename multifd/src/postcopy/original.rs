//! What all clones of one VM share: the open file, which of its pages have content, and what is said before RUN.

use multifd_proto::ram::BlockEntry;

use super::{Claims, Figures, FilePages, Handle, Job, NO_FAULT, Opening, Options, Source, Whereabouts};
use crate::{
    checkpoint::Checkpoint,
    error::Error,
    progress::Progress,
    stop::StopHandle,
    sync::{Arc, atomic::AtomicU64},
};

/// The VM in a checkpoint, of which any number of clones can be handed over at the same time.
///
/// The file is read through one descriptor for all of them, and not mapped. Each [`Source`] adds a bit for each page, and while it
/// runs three threads and some hundred KiB of buffers.
pub struct Original {
    pub(super) pages: Arc<FilePages>,
    blocks: Arc<[BlockEntry]>,
    opening: Arc<Opening>,
    ram_section: u32,
    options: Arc<Options>,
}

impl Original {
    /// The VM in `checkpoint`, and how each clone of it is handed over.
    ///
    /// # Errors
    /// The kernel's; [`CheckpointError::MemoryElsewhere`](crate::checkpoint::CheckpointError::MemoryElsewhere);
    /// [`CheckpointError::NeedsChannels`](crate::checkpoint::CheckpointError::NeedsChannels); and
    /// [`CheckpointError::BeingWritten`](crate::checkpoint::CheckpointError::BeingWritten) where a process has the file open for
    /// writing, as far as the kernel tells.
    pub fn new(checkpoint: &Checkpoint, options: Options) -> Result<Original, Error> {
        checkpoint.check_whole()?;
        checkpoint.check_needs_no_channels()?;
        let pages = FilePages::new(checkpoint)?;
        let blocks = pages.layout().blocks();
        let blocks = blocks.iter().map(|block| BlockEntry::new(block.name().clone(), block.bytes())).collect();
        let opening = Opening::of(checkpoint, &options, &pages);
        Ok(Original {
            pages: Arc::new(pages),
            blocks,
            opening: Arc::new(opening),
            ram_section: checkpoint.ram_section(),
            options: Arc::new(options),
        })
    }

    /// A source of one more clone, of which nothing was sent.
    ///
    /// # Errors
    /// [`CheckpointError::Changed`](crate::checkpoint::CheckpointError::Changed) where the file is not what it was when the checkpoint
    /// was opened; there is no memory for the account of the clone's pages.
    pub fn source(&self) -> Result<Source, Error> {
        self.pages.check_unchanged()?;
        let layout = self.pages.layout();
        let claims = Claims::new(layout).map_err(|source| self.pages.failed("keeping account of its pages", source))?;
        let progress = Progress::new();
        progress.set_pages_total(layout.pages());
        let job = Job {
            pages: self.pages.clone(),
            blocks: self.blocks.clone(),
            claims,
            figures: Figures::default(),
            progress,
            options: self.options.clone(),
            handle: Handle::new(self.options.max_bandwidth),
            after_fault: AtomicU64::new(NO_FAULT),
        };
        let (opening, ram_section) = (self.opening.clone(), self.ram_section);
        Ok(Source {
            job: Arc::new(job),
            opening,
            ram_section,
            stop: StopHandle::new(),
            vm: Whereabouts::Here,
            all_sent: false,
            observer: Box::new(()),
        })
    }
}
