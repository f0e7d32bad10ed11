//! Why a guest cannot be made, checked, saved or loaded.

use std::io;

use multifd::vm::SectionId;

use crate::{body::BodyError, guest::CONFIG_SECTION};

/// Why a guest cannot be made, checked, saved or loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// The configuration makes no sense.
    #[error("{why}")]
    Config {
        /// What is wrong.
        why: String,
    },
    /// KVM is not there, or does not do what it should.
    #[error("{why}")]
    NoKvm {
        /// What is wrong.
        why: String,
    },
    /// The dirty log that was asked for does not work here.
    #[error("{why}")]
    NoDirtyLog {
        /// What is missing.
        why: String,
    },
    /// A CPU ended by itself.
    #[error("a CPU of the guest has ended: {why}")]
    CpuEnded {
        /// Why.
        why: String,
    },
    /// The guest would have to stand still for this.
    #[error("the guest runs")]
    Runs,
    /// The source has another kind of guest.
    #[error("the source runs {theirs}, this is {ours}")]
    OtherGuest {
        /// What the source has.
        theirs: String,
        /// What this is.
        ours: String,
    },
    /// The source's memory has another shape.
    #[error("the source's guest has {theirs} pages with a working set of {working_set}, this one has {ours} pages")]
    OtherMemory {
        /// The source's pages.
        theirs: u64,
        /// Its working set.
        working_set: u64,
        /// Our pages.
        ours: u64,
    },
    /// A section for a device that is not there, or for the second time.
    #[error("section {:?} instance {} version {} does not belong to {ours}", id.name, id.instance, id.version)]
    UnexpectedSection {
        /// The section.
        id: SectionId,
        /// What this is.
        ours: String,
    },
    /// The state of a device never came.
    #[error("section {:?} instance {} never came", id.name, id.instance)]
    MissingSection {
        /// The section.
        id: SectionId,
    },
    /// State came before the configuration that says how to read it.
    #[error("the state of a CPU came before the section {CONFIG_SECTION:?}")]
    ConfigNotFirst,
    /// A section's body is wrong.
    #[error("section {name:?}: {source}")]
    Section {
        /// The section.
        name: String,
        /// What is wrong with it.
        source: BodyError,
    },
    /// A body is wrong.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// The state of a vCPU.
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    #[error(transparent)]
    State(#[from] crate::kvm::StateError),
    /// The kernel refused.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl GuestError {
    pub(crate) fn no_log(why: impl std::fmt::Display) -> GuestError {
        GuestError::NoDirtyLog { why: why.to_string() }
    }

    pub(crate) fn in_section(self, id: &SectionId) -> GuestError {
        match self {
            GuestError::Body(source) => GuestError::Section { name: id.name.clone(), source },
            other => other,
        }
    }
}
