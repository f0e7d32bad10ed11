//! Why a checkpoint cannot be written or read.

use std::{fmt, io, path::PathBuf};

use multifd_proto::{BlockName, ProtocolError, vmdesc::CutError};

use crate::error::Mismatch;

/// What is wrong with a checkpoint, or with the place where it is to be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file system did not do what it was asked.
    #[error("{path:?}: {doing}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was to be done with it.
        doing: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// There is something under the name that the checkpoint is to get.
    #[error("{path:?} exists")]
    Exists {
        /// The name.
        path: PathBuf,
    },
    /// The name was to be that of another file, or free, when the checkpoint was begun. What has it now may be another checkpoint, and is
    /// not replaced.
    #[error("{path:?} was taken by another process meanwhile, and its file is not replaced")]
    Taken {
        /// The name.
        path: PathBuf,
    },
    /// What is there is no regular file, and is not replaced.
    #[error("{path:?} is not a regular file")]
    NotAFile {
        /// The name.
        path: PathBuf,
    },
    /// A path that ends without a name.
    #[error("{path:?} names no file")]
    NoName {
        /// The path.
        path: PathBuf,
    },
    /// The checkpoint is complete and has its name, and it is not certain that the name is on disk: writing the directory
    /// failed, and so did taking the name back.
    #[error(
        "{path:?} is complete and has its name, but its directory could not be written to disk: {source}; the name could \
         not be taken back: {taking_back}"
    )]
    Published {
        /// The file.
        path: PathBuf,
        /// Why the directory could not be written to disk.
        source: io::Error,
        /// Why the name could not be taken back.
        taking_back: String,
    },
    /// The file is no migration stream, or one that breaks a rule.
    #[error("{path:?}, at byte {offset}: {source}")]
    Stream {
        /// The file.
        path: PathBuf,
        /// Where the offending bytes begin.
        offset: u64,
        /// The rule.
        source: ProtocolError,
    },
    /// A migration stream, and not one with a place for every page.
    #[error("{path:?} is a migration stream without the capability mapped-ram")]
    NotMappedRam {
        /// The file.
        path: PathBuf,
    },
    /// What is there is no regular file, and cannot be read as a checkpoint.
    #[error("{path:?} is {kind}")]
    Special {
        /// The name.
        path: PathBuf,
        /// What it is, and what would work.
        kind: &'static str,
    },
    /// The file is something else.
    #[error("{path:?} is {kind}")]
    OtherKind {
        /// The file.
        path: PathBuf,
        /// What it is, and what can be done with it.
        kind: String,
    },
    /// The stream ends before the file does.
    #[error(
        "{path:?} holds a stream that ends at byte {end}, and {more} more bytes: if they are padding, `truncate -s {end}` \
         removes them"
    )]
    Padded {
        /// The file.
        path: PathBuf,
        /// Where the stream ends.
        end: u64,
        /// How many bytes follow.
        more: u64,
    },
    /// The file ends too early.
    #[error("{path:?} ends in the middle, at byte {len}")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// A process has the file open for writing.
    #[error("{path:?} is open for writing: a process may be changing it, and a guest would run with parts of both")]
    BeingWritten {
        /// The file.
        path: PathBuf,
    },
    /// The file is not what it was when it was opened.
    #[error("{path:?} was changed while it was read")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A part of the VM's memory is not in the file, and what was asked for needs it.
    #[error(
        "{path:?} has the devices of a VM and not its memory: {blocks} was in a file that its QEMU shared (x-ignore-shared). \
         Only a QEMU that maps that file, unchanged since (memory-backend-file, share=on, x-ignore-shared on), can run it"
    )]
    MemoryElsewhere {
        /// The file.
        path: PathBuf,
        /// The blocks whose memory is elsewhere.
        blocks: BlockNames,
    },
    /// A part of the state of a device came in packets on the channels, and what was asked for has no channels.
    #[error(
        "{path:?} has state of device {name:?} instance {instance} that came in packets on channels, and this way has none to send it on: \
         multifd send with channels, or multifd restore, carry it to a QEMU"
    )]
    NeedsChannels {
        /// The file.
        path: PathBuf,
        /// The section of the device.
        name: String,
        /// Its instance.
        instance: u32,
    },
    /// RAM blocks that cannot be handled.
    #[error("{path:?}: {source}")]
    Ram {
        /// The file.
        path: PathBuf,
        /// What is wrong with them.
        source: Mismatch,
    },
    /// More guest memory than fits a checkpoint.
    #[error("{bytes:#x} bytes of guest memory, more than the {limit:#x} that a checkpoint may have")]
    TooMuchRam {
        /// What the stream announces.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// Device state that does not end.
    #[error("more than {limit} bytes of device state")]
    TooMuchDeviceState {
        /// The limit.
        limit: usize,
    },
    /// The stream ends with a description of other device state than it has.
    #[error(
        "the description at the end of the stream does not fit the device state, so it cannot be told whether that is \
         complete: {source}"
    )]
    NotDescribed {
        /// Where they differ.
        source: CutError,
    },
    /// The source has sent something behind the end of the stream, after it was told that all is well.
    #[error("the source sent {bytes} bytes after the end of the stream, and the whole is no complete device state")]
    BytesBehindTheEnd {
        /// How many.
        bytes: usize,
    },
    /// Device state before the pages that does not end.
    #[error("more than {limit} bytes of device state before the pages")]
    TooMuchEarlyState {
        /// The limit.
        limit: usize,
    },
}

/// Names of RAM blocks, in a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockNames(Vec<BlockName>);

impl From<Vec<BlockName>> for BlockNames {
    fn from(names: Vec<BlockName>) -> BlockNames {
        BlockNames(names)
    }
}

impl fmt::Display for BlockNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().take(SHOWN).map(BlockName::to_string).collect();
        write!(f, "{}", names.join(", "))?;
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// Names that are shown.
const SHOWN: usize = 8;

impl CheckpointError {
    /// The peer or the file is at fault, as opposed to the place.
    pub(crate) fn is_peers_fault(&self) -> bool {
        matches!(
            self,
            CheckpointError::Stream { .. }
                | CheckpointError::NotMappedRam { .. }
                | CheckpointError::OtherKind { .. }
                | CheckpointError::Padded { .. }
                | CheckpointError::Truncated { .. }
                | CheckpointError::Ram { .. }
                | CheckpointError::MemoryElsewhere { .. }
                | CheckpointError::TooMuchRam { .. }
                | CheckpointError::TooMuchDeviceState { .. }
                | CheckpointError::TooMuchEarlyState { .. }
                | CheckpointError::NotDescribed { .. }
                | CheckpointError::BytesBehindTheEnd { .. }
        )
    }
}
