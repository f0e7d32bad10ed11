//! Where a checkpoint is written to: a file that gets a name, or one that stays without.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use super::{CheckpointError, DirectWrites, directory::unnamed_file, page_file::PageFile, pending::PendingFile};
use crate::sync::Arc;

/// A file that is written.
pub(super) enum Output {
    /// It is to be kept.
    Named(PendingFile),
    /// It goes away with its last user.
    Unnamed {
        file: Arc<File>,
        /// The directory that it is in.
        directory: PathBuf,
    },
}

impl Output {
    /// A file without a name in `directory`.
    ///
    /// # Errors
    /// The directory is not there or takes no files.
    pub(super) fn unnamed(directory: &Path) -> Result<Output, CheckpointError> {
        Ok(Output::Unnamed { file: Arc::new(unnamed_file(directory)?), directory: directory.to_owned() })
    }

    pub(super) fn file(&self) -> &Arc<File> {
        match self {
            Output::Named(file) => file.file(),
            Output::Unnamed { file, .. } => file,
        }
    }

    /// The file, for pages.
    ///
    /// # Errors
    /// Direct writes are required and refused.
    pub(super) fn page_file(&self, direct: DirectWrites) -> Result<PageFile, CheckpointError> {
        match self {
            Output::Named(file) => {
                PageFile::kept(file.file().clone(), direct).map_err(self.error("opening it for direct writes"))
            }
            Output::Unnamed { file, .. } => Ok(PageFile::temporary(file.clone())),
        }
    }

    /// What it is called in messages.
    pub(super) fn path(&self) -> &Path {
        match self {
            Output::Named(file) => file.path(),
            Output::Unnamed { directory, .. } => directory,
        }
    }

    pub(super) fn is_published(&self) -> bool {
        matches!(self, Output::Named(file) if file.is_published())
    }

    /// Puts the contents on disk, where they are to be kept.
    pub(super) fn sync(&self) -> Result<(), CheckpointError> {
        match self {
            Output::Named(file) => file.sync(),
            Output::Unnamed { .. } => Ok(()),
        }
    }

    /// Gives the file its name, if it is to have one.
    pub(super) fn publish(&mut self) -> Result<(), CheckpointError> {
        match self {
            Output::Named(file) => file.publish(),
            Output::Unnamed { .. } => Ok(()),
        }
    }

    /// An error about this file.
    pub(super) fn error(&self, doing: &'static str) -> impl FnOnce(io::Error) -> CheckpointError + use<> {
        let path = self.path().to_owned();
        move |source| CheckpointError::Io { path, doing, source }
    }
}
