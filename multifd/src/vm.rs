//! All that a VMM implements: [`SourceVm`] where the VM runs, [`DestinationVm`] where it is going.
//!
//! The engine calls these from the thread that called `run`, one at a time, in the order in which they are listed.

use std::io::Read;

use crate::{dirty::DirtyLog, dirty_bitmap::DirtyBitmap, ram::Ram, sections::Sections};

/// A running VM that can be migrated away.
pub trait SourceVm {
    /// The memory of the VM; the same at every call.
    fn ram(&self) -> &Ram;

    /// The log of all writes to [`ram`](Self::ram), by vCPUs and by devices.
    fn dirty_log(&mut self) -> &mut dyn DirtyLog;

    /// Adds the pages that are known to be zeros without being read, e.g. because they were never touched.
    ///
    /// Called once, after tracking was switched on, so a page that is written afterwards is reported by the log. A page
    /// named here must have been zero at some moment during the call. Adding nothing is always correct.
    ///
    /// # Errors
    /// The migration ends.
    fn untouched(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        let _ = into;
        Ok(())
    }

    /// Slows the vCPUs down, because the guest writes faster than the link sends; 0 is full speed, 99 nearly stopped.
    fn throttle(&mut self, percent: u8) -> Throttled {
        let _ = percent;
        Throttled::Unsupported
    }

    /// Stops vCPUs and devices; memory does not change after this returned `Ok`.
    ///
    /// # Errors
    /// The migration ends and [`resume`](Self::resume) is called, so a half-stopped VM runs again.
    fn pause(&mut self) -> Result<(), VmError>;

    /// Writes the state of vCPUs and devices. The VM is paused and its last pages are sent.
    ///
    /// # Errors
    /// The migration ends and [`resume`](Self::resume) is called.
    fn save(&mut self, out: &mut Sections) -> Result<(), VmError>;

    /// Lets the VM run again, after a failure or a cancel that came after [`pause`](Self::pause) was called.
    ///
    /// # Errors
    /// Reported beside the first error ([`Error::NotResumed`](crate::error::Error::NotResumed)). The VM is then paused on both sides, unharmed.
    fn resume(&mut self) -> Result<(), VmError>;
}

/// A VM that was set up like the source's and waits for its memory and state.
pub trait DestinationVm {
    /// The memory of the VM: blocks of the same names and lengths as on the source. The same at every call.
    ///
    /// From the first call until [`start`](Self::start), only [`load`](Self::load) and the engine write to it. What it held
    /// before is lost then, also where the migration fails.
    fn ram(&self) -> &Ram;

    /// Reads the state of one device. `input` has to be read exactly to the end of what [`SourceVm::save`] wrote, no
    /// further: the stream does not tell the length.
    ///
    /// All memory is in place by then, unless the section came early (before the last page).
    ///
    /// # Errors
    /// The migration ends; the source's VM runs on.
    fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError>;

    /// Lets the VM run.
    ///
    /// A source of ours is told afterwards. One that knows no GO, such as a QEMU, was told before that the VM is ours.
    ///
    /// # Errors
    /// No vCPU has run here, and none will: a source of ours is told so, and resumes the VM. With one that knows no GO the VM
    /// is then paused on both sides. An implementation that has started some of its vCPUs must not return an error.
    fn start(&mut self) -> Result<(), VmError>;
}

/// Which device a section of state belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SectionId {
    /// The name that the source gave it, e.g. `cpu`.
    pub name: String,
    /// Which of several of one name.
    pub instance: u32,
    /// Version of the format of the body.
    pub version: u32,
}

/// The answer to [`SourceVm::throttle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Throttled {
    /// The vCPUs now run that much slower.
    Applied,
    /// This VM cannot be slowed down.
    Unsupported,
}

/// What a VMM says when it cannot do what it was asked.
pub type VmError = Box<dyn std::error::Error + Send + Sync>;
