//! All that a VMM implements: [`SourceVm`] where the VM runs, [`DestinationVm`] where it is going.
//!
//! The engine calls these from the thread that called `run`, one at a time, in the order in which they are listed; but
//! [`SourceVm::excluded`], [`throttle`](SourceVm::throttle) and [`save_live`](SourceVm::save_live) again in each round, and
//! [`SourceVm::save_writes_memory`], which only says what [`save`](SourceVm::save) does, at any moment.

use std::{
    hash::{Hash, Hasher},
    io::Read,
};

pub use multifd_proto::extension::MAX_DESCRIPTION;

use crate::{
    dirty::{DirtyLog, untouched::untouched},
    dirty_bitmap::DirtyBitmap,
    error::Error,
    ram::{Ram, SharedBlock},
    sections::Sections,
};

/// A running VM that can be migrated away.
pub trait SourceVm {
    /// What the destination needs to make its VM, in a format of the VMM's own: configuration, CPU model, versions. At most
    /// [`MAX_DESCRIPTION`] bytes.
    ///
    /// Called once, before any memory is sent, where the destination is one of ours that takes descriptions: not with a
    /// QEMU, not with a checkpoint, and not with a version of this crate that has none. Their VM is made in another way. What it takes
    /// counts towards the [`stall_limit`](crate::source::Parameters::stall_limit), with what `prepare` and `agreed` take.
    ///
    /// # Errors
    /// The migration ends; the VM runs on.
    fn describe(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(Vec::new())
    }

    /// Takes what [`DestinationVm::prepare`] answered to the description, e.g. what of it is accepted. Called once, and only
    /// after [`describe`](Self::describe) was.
    ///
    /// # Errors
    /// The migration ends; the VM runs on.
    fn agreed(&mut self, answer: &[u8]) -> Result<(), VmError> {
        let _ = answer;
        Ok(())
    }

    /// The memory of the VM; the same at every call. A VM that has other blocks once it is paused, because memory was added
    /// meanwhile for example, is not handed over: the migration ends, and the VM runs on.
    fn ram(&self) -> &Ram;

    /// The log of all writes to [`ram`](Self::ram), by vCPUs and by devices.
    fn dirty_log(&mut self) -> &mut dyn DirtyLog;

    /// Adds the pages that are known to be zeros without being read, e.g. because they were never touched. By default these are
    /// the ones that [the kernel knows](crate::dirty::untouched::untouched).
    ///
    /// Called once, after tracking was switched on, so a page that is written afterwards is reported by the log. A page
    /// named here must have been zero at some moment during the call. Adding nothing is always correct.
    ///
    /// # Errors
    /// It is logged, and all pages are sent: the kernel may be too old, or `/proc` not mounted.
    fn untouched(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        Ok(untouched(self.ram(), into)?)
    }

    /// Adds the pages that must not be read in the round that is about to begin: memory that is unplugged, as that of virtio-mem, or
    /// that the kernel lets no process read (`PROT_NONE`). [`Ram::pages_at`] turns guest addresses into pages. By default there are none.
    ///
    /// Such a page is neither read nor sent, whatever the log says of it. At the destination it is zero, and takes no memory unless
    /// an earlier round has sent it; it has to stay readable and writable there until [`start`](DestinationVm::start) is called. One that is not added any more is in use again: it is sent as a dirty page, so the log need not
    /// report what was written to it meanwhile.
    ///
    /// Called once before each round, also before the last one, when the VM is paused. What is not added has to stay readable until the
    /// next call, or until `run` has returned: a VMM that unplugs memory meanwhile discards its contents, if it likes, and protects
    /// it in the next call.
    ///
    /// # Errors
    /// The migration ends; the VM runs on.
    fn excluded(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        let _ = into;
        Ok(())
    }

    /// Slows the vCPUs down, because the guest writes faster than the link sends; 0 is full speed, 99 nearly stopped.
    fn throttle(&mut self, percent: u8) -> Throttled {
        let _ = percent;
        Throttled::Unsupported
    }

    /// Sends device state while the VM runs: what a device can write before the pause, and what has changed since the call before.
    /// Returns how many bytes of state are still to come, as far as it can be told; they count in the decision when to pause as
    /// bytes of dirty pages do.
    ///
    /// Called once in each round, the VM running, and only where the destination is one of ours that takes state early: not with a
    /// QEMU, not with a checkpoint. [`Sections::live_rounds`] tells how often that was in this migration. In
    /// [`save`](Self::save), 0 there means that all state is still to be written. Sections reach
    /// [`DestinationVm::load`] at once and in this order, each of them whole; a device may send any number of them under its name.
    /// There is [room](Sections::room) for [`LIVE_ROOM`](crate::sections::LIVE_ROOM) bytes in each call.
    ///
    /// No page is sent during the call, so it should be short. Writes to guest memory that a device makes in it have to be in the
    /// dirty log as any other. A device of which more and more is to come keeps the VM from being paused, as a guest does that
    /// writes too fast: the [limits](crate::source::Limits) decide what follows.
    ///
    /// # Errors
    /// The migration ends; the VM runs on.
    fn save_live(&mut self, out: &mut Sections) -> Result<u64, VmError> {
        let _ = out;
        Ok(0)
    }

    /// Stops vCPUs and devices; memory does not change after this returned `Ok`.
    ///
    /// # Errors
    /// The migration ends and [`resume`](Self::resume) is called, so a half-stopped VM runs again.
    fn pause(&mut self) -> Result<(), VmError>;

    /// Whether [`save`](Self::save) may write memory, as devices of vhost-user do when they are asked for their state.
    ///
    /// The VM is then asked *before* the last [`drain`](DirtyLog::drain), so that its log can report these writes, and its
    /// state waits in memory until the last pages were sent. Otherwise a write during `save` is lost, as the tracking law
    /// ends with `pause`.
    fn save_writes_memory(&self) -> bool {
        false
    }

    /// Writes the state of vCPUs and devices. The VM is paused, and its last pages were sent, unless the state
    /// [writes memory](Self::save_writes_memory).
    ///
    /// # Errors
    /// The migration ends and [`resume`](Self::resume) is called.
    fn save(&mut self, out: &mut Sections) -> Result<(), VmError>;

    /// Lets the VM run again, after a failure or a cancel that came after [`pause`](Self::pause) was called.
    ///
    /// # Errors
    /// Reported beside the first error ([`Error::NotResumed`]). The VM is then paused on both sides, unharmed.
    fn resume(&mut self) -> Result<(), VmError>;
}

/// A VM that is set up like the source's and waits for its memory and state.
pub trait DestinationVm {
    /// The size of the pages that the stream names, in bytes: that of [`ram`](Self::ram) later, and the same on the source.
    ///
    /// Asked for once, before there is any connection. It need not be the page size of this machine.
    fn page_size(&self) -> usize {
        4096
    }

    /// Takes the memory that the source hands over ([`Plan::hand_over`](crate::source::Plan::hand_over)): all blocks that
    /// [`ram`](Self::ram) is not to make, but to map ([`RamBlock::shared`](crate::ram::RamBlock::shared) does). Those of `ram`
    /// that are made of it are told by their file, so they have to be [backed by](crate::ram::RamBlock::backed_by) a
    /// [`MemoryFile`](crate::ram::MemoryFile) of it. Called once, before [`prepare`](Self::prepare), and only where a source hands
    /// memory over.
    ///
    /// Until [`start`](Self::start) is called, the memory is the source's: its guest may go on, also when all is
    /// [loaded](Self::load). So nothing here may write to it before. The engine makes sure of it for the mappings of the
    /// blocks, when `prepare` has returned: a write is SIGSEGV, and `EFAULT` where the kernel does it. Nothing makes sure of it for
    /// other mappings of the files, as those of device processes. A device that has to write memory to take its state over does
    /// that in `start`, and fails no more from there on.
    ///
    /// After an error the memory stays the source's. Unmap it: another migration into blocks that are still made of it is
    /// refused, and what became of it is the source's affair.
    ///
    /// # Errors
    /// The migration ends; the source's VM runs on. By default, memory is not taken.
    fn take_memory(&mut self, memory: Vec<SharedBlock>) -> Result<(), VmError> {
        drop(memory);
        Err("this VM does not take memory that is handed over".into())
    }

    /// Makes the VM by what [`SourceVm::describe`] wrote, and returns what [`SourceVm::agreed`] is to take: at most
    /// [`MAX_DESCRIPTION`] bytes each way.
    ///
    /// Called once for every source, before any other call but [`page_size`](Self::page_size). The description is empty, and
    /// the answer is not sent, where the source has none to give: a QEMU, a version of this crate without descriptions, or a
    /// source whose offer the [options](crate::destination::Options::extensions) do not take. The source waits meanwhile; its
    /// [`stall_limit`](crate::source::Parameters::stall_limit) bounds that, and the guest runs on.
    ///
    /// The description is what the peer says: a VMM checks it as any input. Only a
    /// [token](crate::destination::Options::token) or TLS tells whose it is.
    ///
    /// # Errors
    /// The migration ends; the source's VM runs on. A source of ours reports the text of the error:
    /// [`Error::Refused`].
    fn prepare(&mut self, description: &[u8]) -> Result<Vec<u8>, VmError> {
        let _ = description;
        Ok(Vec::new())
    }

    /// The memory of the VM: blocks of the same names and lengths as on the source. The same at every call. Asked for once
    /// [`prepare`](Self::prepare) has returned, and not before.
    ///
    /// From the first call until [`start`](Self::start), only [`load`](Self::load) and the engine write to it. What it held
    /// before is lost then, also where the migration fails. Blocks that were [handed over](Self::take_memory) are written by
    /// none, and keep what they hold.
    fn ram(&self) -> &Ram;

    /// Reads the state of one device, exactly to the end of what [`SourceVm::save`] or [`SourceVm::save_live`] wrote.
    ///
    /// Where the section [is bounded](SectionId::is_bounded), `input` ends there, so that a format without an end of its own can
    /// be read to the end, and what is left unread is an error. Where it is not, a read goes on into what follows.
    ///
    /// All memory is in place by then, unless the section came early, as what [`SourceVm::save_live`] wrote does. The VM at
    /// the source may still change what such a section says, in later sections.
    ///
    /// # Errors
    /// The migration ends; the source's VM runs on.
    fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError>;

    /// Lets the VM run. Memory that was [handed over](Self::take_memory) is this VM's from here on.
    ///
    /// A source of ours is told afterwards. One that knows no GO, such as a QEMU, was told before that the VM is ours. A connection that
    /// breaks meanwhile leaves the source in doubt, and its guest stays paused: what takes long and can be done before belongs into
    /// [`load`](Self::load), after which the source still resumes its guest.
    ///
    /// # Errors
    /// No vCPU has run here, and none will: a source of ours is told so, and resumes the VM. With one that knows no GO the VM
    /// is then paused on both sides. An implementation that has started some of its vCPUs must not return an error, nor one
    /// that has written to memory that was handed over: the source's guest goes on with it.
    ///
    /// # Panics
    /// A panic does not say that no vCPU has run. The source is told nothing, as if this process had died, and its VM stays
    /// paused: [`Error::InDoubt`] there. [`abandon`](Self::abandon) is not called.
    fn start(&mut self) -> Result<(), VmError>;

    /// Frees what [`take_memory`](Self::take_memory), [`prepare`](Self::prepare) and [`load`](Self::load) have made: the VM will not run here.
    ///
    /// Called at most once, as the last call, when [`Destination::run`](crate::destination::Destination::run) returns an
    /// error after `prepare` or `take_memory` was called, whether that succeeded or not; all threads of the engine have ended then, and none
    /// touches the memory. It is not called after [`start`](Self::start) has succeeded. Nor is it where the VM is complete here
    /// and an operator may still let it run: with [`Error::InDoubt`], where `start` failed
    /// after a source that knows no GO was told that the VM is here, and where `start` panicked.
    fn abandon(&mut self) {}
}

/// Which device a section of state belongs to, and how long it is as far as that is known.
///
/// Two are equal if name, instance and version are: how long a section is tells no device from another.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SectionId {
    /// The name that the source gave it, e.g. `cpu`.
    pub name: String,
    /// Which of several of one name.
    pub instance: u32,
    /// Version of the format of the body.
    pub version: u32,
    /// How many bytes of state the source says that it has. `None` where it does not say it: a QEMU, a version of this crate that does
    /// not, and state that was [written piece by piece](Sections::section_from). It is the word of a peer: check it before memory is
    /// made by it.
    pub len: Option<u64>,
    /// Whether the stream tells where the state ends, also where `len` is not known. Always between two ends of this version;
    /// never with a QEMU.
    pub is_bounded: bool,
}

impl SectionId {
    /// A section whose end the stream does not tell.
    pub fn new(name: &str, instance: u32, version: u32) -> SectionId {
        SectionId { name: name.to_owned(), instance, version, len: None, is_bounded: false }
    }
}

impl SectionId {
    fn of_device(&self) -> (&str, u32, u32) {
        (&self.name, self.instance, self.version)
    }
}

impl PartialEq for SectionId {
    fn eq(&self, other: &SectionId) -> bool {
        self.of_device() == other.of_device()
    }
}

impl Eq for SectionId {}

impl Hash for SectionId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.of_device().hash(state);
    }
}

/// The answer to [`SourceVm::throttle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Throttled {
    /// The vCPUs now run that much slower.
    Applied,
    /// This VM cannot be slowed down.
    Unsupported,
}

/// Makes sure that a VM still has the memory that it had when it was asked first: what came since would be missing, and neither side
/// would say so.
///
/// # Errors
/// [`Error::Vm`].
pub(crate) fn check_memory(before: &Ram, now: &Ram) -> Result<(), Error> {
    let text = "it has other RAM blocks than before; memory must not be added, removed or moved while a VM migrates";
    if before.is_same_memory(now) { Ok(()) } else { Err(Error::vm("keep its memory")(text.into())) }
}

/// What a VMM says when it cannot do what it was asked. For an error that is not `Sync`: [`not_sync`].
pub type VmError = Box<dyn std::error::Error + Send + Sync>;

/// Makes a [`VmError`] of an error that is not `Sync`, as one with the payload of a panic is not.
///
/// The text and its sources are those of `error` at this moment. The error itself is kept:
/// `downcast::<NotSync>()` and [`NotSync::into_inner`] give it back.
pub fn not_sync(error: impl std::error::Error + Send + 'static) -> VmError {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    Box::new(NotSync { text, error: std::sync::Mutex::new(Box::new(error)) })
}

/// An error that is not `Sync`, with its text. Made by [`not_sync`].
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct NotSync {
    text: String,
    error: std::sync::Mutex<Box<dyn std::error::Error + Send>>,
}

impl NotSync {
    /// The error that it was made of.
    pub fn into_inner(self) -> Box<dyn std::error::Error + Send> {
        self.error.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the device has no state")]
    struct WithCell {
        count: std::cell::Cell<u32>,
        #[source]
        because: std::io::Error,
    }

    /// A VMM looks its devices up by them, with a source that tells lengths and with one that does not.
    #[test]
    fn a_section_is_known_by_its_device_and_not_by_its_length() {
        let expected = SectionId::new("cpu", 1, 2);
        let told = SectionId { len: Some(7), is_bounded: true, ..expected.clone() };
        assert_eq!(told, expected);
        assert!(std::collections::HashSet::from([expected.clone()]).contains(&told));
        for other in [SectionId::new("cpu", 0, 2), SectionId::new("cpu", 1, 3), SectionId::new("gpu", 1, 2)] {
            assert_ne!(other, expected);
        }
    }

    #[test]
    fn an_error_that_is_not_sync_is_told_with_its_sources_and_kept() {
        let because = std::io::Error::other("it is unplugged");
        let error = not_sync(WithCell { count: std::cell::Cell::new(7), because });
        assert_eq!(error.to_string(), "the device has no state: it is unplugged");
        let inner = error.downcast::<NotSync>().unwrap().into_inner();
        assert_eq!(inner.downcast::<WithCell>().unwrap().count.get(), 7);
    }
}
