//! The note beside a checkpoint that its VM was handed over: a file, locked by the process that sends.
//!
//! It is written and on disk before the first connection, and says "handed over" before the byte is sent that makes the
//! destination run the VM. It is removed when the destination has everything, or certainly does not run the VM. So what a
//! process that died leaves behind says whether there may be a VM that needs the file.

use std::{
    fs::{self, File},
    hash::{BuildHasher, RandomState},
    io::{self, Read},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use multifd::{checkpoint::Checkpoint, error::Error, postcopy::Whereabouts};
use rustix::fs::{AtFlags, FlockOperation, StatxAttributes, StatxFlags, flock};
use serde::{Deserialize, Serialize};

use crate::{describe, replace::directory_of};

/// The note, locked by this process.
#[derive(Debug)]
pub struct Record {
    path: PathBuf,
    file: File,
    note: Note,
    /// Where the VM was before, as far as the note said.
    found: Whereabouts,
    /// The checkpoint, locked by this process.
    locked: Option<File>,
}

/// What the file says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Note {
    /// For people.
    about: String,
    /// 1 once the destination may run the VM. A digit, so that the length stays.
    handed_over: u8,
    /// 1 where the destination is known to have loaded the VM and to lack memory, and no process goes on with it. Notes of an older
    /// version do not say.
    #[serde(default)]
    lacks_memory: u8,
    destination: String,
    process: u32,
    /// Of this boot of the host: what was not on disk when it ended is not known. Empty where there is no /proc to tell.
    boot: String,
    checkpoint: Identity,
}

/// What the checkpoint was like when its VM was handed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Identity {
    bytes: u64,
    /// Seconds and nanoseconds: a file that is written to gets another.
    modified: String,
    /// SHA-256 of everything in it but the contents of pages.
    digest: String,
    /// Where it was found, with its device and its number on it.
    #[serde(skip)]
    found: Option<(PathBuf, u64, u64)>,
}

/// Why a VM cannot be handed over, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Another process sends this VM.
    #[error(
        "process {process} is sending this VM to {destination} (it holds {path:?}): wait for it; to start one more VM from \
         the checkpoint, use --clone"
    )]
    InUse { path: PathBuf, process: u32, destination: String },
    /// The VM is somewhere else.
    #[error(
        "this VM was handed over to {destination}, and its sender (process {process}) has ended: --recover goes on with it; \
         --clone starts one more VM from the checkpoint; if the VM runs nowhere any more, remove {path:?}"
    )]
    HandedOver { path: PathBuf, process: u32, destination: String },
    /// Another process has locked the file, whose note has another name.
    #[error(
        "another process is handing the VM in {checkpoint:?} over, by another name of the file or with another --state; --clone starts \
         one more VM from the checkpoint"
    )]
    Locked { checkpoint: PathBuf },
    /// The note may be beside another name.
    #[error(
        "{checkpoint:?} has {names} names (hard links), and the note of a hand-over may be beside another one: --state names the note \
         for all of them; --clone starts one more VM from the checkpoint"
    )]
    SeveralNames { checkpoint: PathBuf, names: u64 },
    /// The same of a file that is mounted by itself.
    #[error(
        "{checkpoint:?} is a mount of a single file, which has another name elsewhere, and the note of a hand-over may be beside that one: \
         --state names the note for all of them; --clone starts one more VM from the checkpoint"
    )]
    MountedFile { checkpoint: PathBuf },
    /// There is nothing to recover.
    #[error(
        "there is no {path:?}, which --postcopy writes when it hands a VM over and removes when the destination has \
         everything: was it another checkpoint, or is the note elsewhere (--state)?"
    )]
    Nothing { path: PathBuf },
    /// The sender died too early.
    #[error("this VM was not handed over: its sender ended before (says {path:?}); --postcopy starts it")]
    NotHandedOver { path: PathBuf },
    /// The file is not the one that the destination has a part of.
    #[error(
        "{checkpoint:?} is not the file whose VM was handed over: {what} (says {path:?}). The guest would get memory of two \
         states; find the file as it was, or copy it with its times (cp -p)"
    )]
    Changed { path: PathBuf, checkpoint: PathBuf, what: &'static str },
    /// It is not replaced: it may have the only memory of a VM.
    #[error(
        "the VM in {path:?} was handed over to {destination} and has not got all of its memory (says {note:?}): `multifd send --recover` \
         gives it the rest; if that VM runs nowhere any more, remove the note, or write to another file"
    )]
    Needed { path: PathBuf, note: PathBuf, destination: String },
    /// What is there is something else.
    #[error("{path:?} is not a note of a hand-over: {source}; --state names another place")]
    Unreadable { path: PathBuf, source: serde_json::Error },
    /// The file system did not do what it was asked.
    #[error("{path:?}: {doing}: {source}; --state names another place for the note of the hand-over")]
    Io { path: PathBuf, doing: &'static str, source: io::Error },
}

impl Record {
    /// The default place for the note beside `checkpoint`, or beside the file that a symbolic link leads to, which has one note by
    /// all of its names: one of its own for a clone, see [`for_clones`](Record::for_clones).
    pub fn place(checkpoint: &Path, clone: bool) -> PathBuf {
        let leads_to = if checkpoint.is_symlink() { fs::canonicalize(checkpoint).ok() } else { None };
        let mut name = leads_to.unwrap_or_else(|| checkpoint.to_owned()).into_os_string();
        name.push(".postcopy");
        if clone {
            name.push(Record::for_clones());
        }
        name.into()
    }

    /// What the name of a note of this process has that no other has, `-PID-XXXXXXXX`: in a container each process may have the same
    /// number, and notes outlive it.
    pub fn for_clones() -> String {
        let random = RandomState::new().hash_one(SystemTime::now());
        format!("-{}-{:08x}", std::process::id(), random as u32)
    }

    /// That a note beside `checkpoint` is the only one.
    ///
    /// # Errors
    /// [`RecordError::SeveralNames`], [`RecordError::MountedFile`]; the kernel's.
    pub fn check_names(checkpoint: &Path) -> Result<(), RecordError> {
        if is_mounted(checkpoint) {
            return Err(RecordError::MountedFile { checkpoint: checkpoint.to_owned() });
        }
        match fs::metadata(checkpoint).map_err(io(checkpoint, "looking at it"))?.nlink() {
            0 | 1 => Ok(()),
            names => Err(RecordError::SeveralNames { checkpoint: checkpoint.to_owned(), names }),
        }
    }

    /// Notes, on disk, that the VM in `checkpoint` is about to be handed over to `destination`.
    ///
    /// # Errors
    /// [`RecordError::InUse`], [`RecordError::HandedOver`]: it was handed over before, and has not got everything;
    /// [`RecordError::Locked`].
    pub fn begin(path: &Path, checkpoint: &Checkpoint, destination: &str) -> Result<Record, RecordError> {
        let mut record = Record::begin_clone(path, || Identity::of(checkpoint), destination)?;
        match lock_checkpoint(checkpoint.path()) {
            Ok(locked) => {
                record.locked = locked;
                Ok(record)
            }
            Err(error) => {
                record.remove();
                Err(error)
            }
        }
    }

    /// Notes the same for one of several VMs from a checkpoint of this `identity`.
    ///
    /// # Errors
    /// [`RecordError::InUse`], [`RecordError::HandedOver`].
    pub fn begin_clone(
        path: &Path,
        identity: impl FnOnce() -> io::Result<Identity>,
        destination: &str,
    ) -> Result<Record, RecordError> {
        let file = locked(path, true)?;
        if let Some(note) = read(path, &file)?
            && note.may_be_handed_over()
        {
            let Note { process, destination, .. } = note;
            return Err(RecordError::HandedOver { path: path.to_owned(), process, destination });
        }
        let identity = identity().map_err(io(path, "asking for the checkpoint's times"))?;
        let note = Note::new(identity, destination);
        let record = Record { path: path.to_owned(), file, note, found: Whereabouts::Here, locked: None };
        if let Err(error) = record.write().and_then(|()| record.sync()) {
            record.remove();
            return Err(io(path, "writing it")(error));
        }
        Ok(record)
    }

    /// The note of the VM in `checkpoint`, which was handed over by a process that ended; it may be one of several VMs if it
    /// `may_be_clone`.
    ///
    /// # Errors
    /// Another process is at it; it was not handed over; or the file is not the same any more.
    pub fn resume(path: &Path, checkpoint: &Checkpoint, may_be_clone: bool) -> Result<Record, RecordError> {
        let file = match locked(path, false) {
            Err(RecordError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(RecordError::Nothing { path: path.to_owned() });
            }
            other => other?,
        };
        let note = read(path, &file)?.filter(Note::may_be_handed_over);
        let Some(mut note) = note else { return Err(RecordError::NotHandedOver { path: path.to_owned() }) };
        let now = Identity::of(checkpoint).map_err(io(path, "asking for the checkpoint's times"))?;
        if let Some(what) = note.checkpoint.difference(&now) {
            let checkpoint = checkpoint.path().to_owned();
            return Err(RecordError::Changed { path: path.to_owned(), checkpoint, what });
        }
        note.process = std::process::id();
        // This process may give it the rest, and die before it notes that.
        let lacked = std::mem::take(&mut note.lacks_memory);
        let found = if lacked == 1 { Whereabouts::There } else { Whereabouts::InDoubt };
        let locked = if may_be_clone { None } else { lock_checkpoint(checkpoint.path())? };
        let record = Record { path: path.to_owned(), file, note, found, locked };
        record.write().map_err(io(path, "writing it"))?;
        Ok(record)
    }

    /// Notes that the destination may run the VM from now on.
    ///
    /// # Errors
    /// The kernel's; the note or the checkpoint has lost its name, and would not be found.
    pub fn hand_over(&mut self) -> io::Result<()> {
        if !self.has_its_name()? {
            return Err(io::Error::other(format!(
                "{:?}, the note of the hand-over, was removed or replaced",
                self.path
            )));
        }
        self.note.checkpoint.check_found()?;
        self.note.handed_over = 1;
        // Not to disk, which would keep the guest waiting: the kernel has it when this process dies. Should the host die as
        // well, the note is one of an earlier boot.
        self.write()
    }

    /// Notes where the VM is when a sender ends, with `error` if it does not have everything.
    pub fn leave(self, vm: Whereabouts, error: Option<&Error>) {
        if matches!(vm, Whereabouts::Here | Whereabouts::Complete) {
            return self.remove();
        }
        // It may not have the VM at all, or all of its memory (`Unacknowledged`).
        self.leave_lacking(matches!(error, Some(Error::Incomplete { .. })));
    }

    /// Leaves the note of a VM that was to be recovered, to which nothing was done.
    pub fn leave_as_found(self) {
        let lacked = self.found == Whereabouts::There;
        self.leave_lacking(lacked);
    }

    fn leave_lacking(mut self, lacks_memory: bool) {
        self.note.lacks_memory = lacks_memory.into();
        if let Err(error) = self.write() {
            tracing::warn!(path = ?self.path, %error, "the note of the hand-over says less than is known");
        }
    }

    /// Where the VM is, as far as the note of the process before said.
    pub fn vm(&self) -> Whereabouts {
        self.found
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the note: no VM needs the file any more.
    pub fn remove(self) {
        let removed = match self.has_its_name() {
            Ok(true) => fs::remove_file(&self.path),
            // What has the name now is the note of another hand-over.
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            tracing::warn!(path = ?self.path, %error, "the note of the hand-over could not be removed");
        }
    }

    /// Removes the note at `path` that this process has left, once it is certain that no VM needs the file. Returns whether it is gone.
    pub fn settle(path: &Path) -> bool {
        let ours = locked(path, false).and_then(|file| Ok((read(path, &file)?, file)));
        match ours {
            Ok((Some(note), file)) if note.process == std::process::id() => {
                Record { path: path.to_owned(), file, note, found: Whereabouts::There, locked: None }.remove();
                !path.exists()
            }
            // Another process goes on with it already.
            Ok(_) | Err(_) => false,
        }
    }

    /// Whether the path still leads to the file that is locked.
    fn has_its_name(&self) -> io::Result<bool> {
        let ours = self.file.metadata()?;
        match fs::metadata(&self.path) {
            Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Why the file at `path` cannot be replaced: a VM that was handed over may need it.
    ///
    /// # Errors
    /// [`RecordError::Needed`].
    pub fn check_replaceable(path: &Path) -> Result<(), RecordError> {
        let note = Record::place(path, false);
        let Some(prefix) = note.file_name() else { return Ok(()) };
        // Those of clones have a longer name.
        for entry in fs::read_dir(directory_of(&note)).into_iter().flatten().flatten() {
            let is_note = entry.file_name().as_encoded_bytes().starts_with(prefix.as_encoded_bytes());
            let opened = (is_note && entry.path().is_file()).then(|| File::open(entry.path())).and_then(Result::ok);
            let Some(file) = opened else { continue };
            // What is no note says nothing of a VM.
            if let Ok(Some(found)) = read(&entry.path(), &file)
                && found.may_be_handed_over()
            {
                let Note { destination, .. } = found;
                return Err(RecordError::Needed { path: path.to_owned(), note: entry.path(), destination });
            }
        }
        Ok(())
    }

    fn write(&self) -> io::Result<()> {
        let mut text = serde_json::to_string_pretty(&self.note).expect("text and numbers");
        text.push('\n');
        self.file.write_all_at(text.as_bytes(), 0)?;
        self.file.set_len(text.len() as u64)
    }

    /// To disk, with its name.
    fn sync(&self) -> io::Result<()> {
        self.file.sync_all()?;
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl Note {
    fn new(checkpoint: Identity, destination: &str) -> Note {
        Note {
            about: "the VM in the checkpoint beside this was handed over by multifd send --postcopy; see --recover"
                .to_owned(),
            handed_over: 0,
            lacks_memory: 0,
            destination: destination.to_owned(),
            process: std::process::id(),
            boot: boot(),
            checkpoint,
        }
    }

    fn may_be_handed_over(&self) -> bool {
        self.handed_over != 0 || self.boot.is_empty() || self.boot != boot()
    }
}

impl Identity {
    /// What `checkpoint` is like now.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of(checkpoint: &Checkpoint) -> io::Result<Identity> {
        let metadata = fs::metadata(checkpoint.path())?;
        Ok(Identity {
            bytes: checkpoint.bytes(),
            modified: format!("{}.{:09}", metadata.mtime(), metadata.mtime_nsec()),
            digest: describe::digest_of_all_but_pages(checkpoint),
            found: Some((checkpoint.path().to_owned(), metadata.dev(), metadata.ino())),
        })
    }

    /// # Errors
    /// The file is not there any more, and a process that goes on would not find it.
    fn check_found(&self) -> io::Result<()> {
        let Some((path, device, number)) = &self.found else { return Ok(()) };
        match fs::metadata(path) {
            Ok(there) if (there.dev(), there.ino()) == (*device, *number) => Ok(()),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Err(io::Error::other(format!("{path:?} was moved, removed or replaced since it was opened"))),
        }
    }

    /// What differs in `now`.
    fn difference(&self, now: &Identity) -> Option<&'static str> {
        if self.bytes != now.bytes {
            return Some("its length differs");
        }
        if self.digest != now.digest {
            return Some("its device state, its RAM blocks or which pages it has differ");
        }
        (self.modified != now.modified).then_some("it was written to since")
    }
}

/// The file at `path`, opened and locked.
fn locked(path: &Path, create: bool) -> Result<File, RecordError> {
    loop {
        let opened = File::options().read(true).write(true).create(create).truncate(false).open(path);
        let file = opened.map_err(io(path, "opening it"))?;
        // Its name is removed in the end.
        if !file.metadata().map_err(io(path, "looking at it"))?.is_file() {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "it exists and is not a file");
            return Err(io(path, "opening it")(error));
        }
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let note = read(path, &file)?;
                let (process, destination) =
                    note.map_or((0, "a destination".to_owned()), |note| (note.process, note.destination));
                return Err(RecordError::InUse { path: path.to_owned(), process, destination });
            }
            Err(error) => return Err(io(path, "locking it")(error.into())),
        }
        // The process that had it may have removed it just now, and another one made a new one.
        let ours = file.metadata().map_err(io(path, "looking at it"))?;
        match fs::metadata(path) {
            Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => return Ok(file),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(path, "looking at it")(error)),
            _ => {}
        }
    }
}

/// The checkpoint at `path`, locked, so that no other process hands its VM over as long as this one does: one that has the file by
/// another name looks for another note. `None` where the file system locks no file that is only read.
fn lock_checkpoint(path: &Path) -> Result<Option<File>, RecordError> {
    let file = File::open(path).map_err(io(path, "opening it once more"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(RecordError::Locked { checkpoint: path.to_owned() }),
        Err(error) => {
            tracing::debug!(?path, %error, "the checkpoint is not locked");
            Ok(None)
        }
    }
}

/// Whether `path` is where a file is mounted, as containers do it. `false` where the kernel does not tell (before 5.8).
fn is_mounted(path: &Path) -> bool {
    let found = rustix::fs::statx(rustix::fs::CWD, path, AtFlags::empty(), StatxFlags::TYPE);
    found.is_ok_and(|found| (found.stx_attributes & found.stx_attributes_mask).contains(StatxAttributes::MOUNT_ROOT))
}

/// What the file says; `None` where it is empty, as it is before the first word of a process that died.
fn read(path: &Path, file: &File) -> Result<Option<Note>, RecordError> {
    let mut bytes = Vec::new();
    let mut whole = file.take(MAX_LEN);
    io::Seek::rewind(&mut &*file).and_then(|()| whole.read_to_end(&mut bytes)).map_err(io(path, "reading it"))?;
    if bytes.is_empty() {
        return Ok(None);
    }
    let note = serde_json::from_slice(&bytes);
    note.map(Some).map_err(|source| RecordError::Unreadable { path: path.to_owned(), source })
}

fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

fn io(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> RecordError {
    move |source| RecordError::Io { path: path.to_owned(), doing, source }
}

/// A note has some hundred bytes.
const MAX_LEN: u64 = 64 << 10;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use test_support::TempDir;

    use super::*;

    fn identity() -> Identity {
        Identity { bytes: 1, modified: "2.000000003".to_owned(), digest: "4".to_owned(), found: None }
    }

    /// A VM ran whose file was replaced before, so that no process but the sender had its memory.
    #[test]
    fn a_file_that_was_replaced_before_run_is_not_handed_over() {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        fs::write(&file, "").unwrap();
        let there = fs::metadata(&file).unwrap();
        let identity = Identity { found: Some((file.clone(), there.dev(), there.ino())), ..identity() };
        let mut record = Record::begin_clone(&dir.join("note"), || Ok(identity), "x").unwrap();
        fs::rename(&file, dir.join("moved")).unwrap();
        assert!(record.hand_over().unwrap_err().to_string().contains("was moved"));
        fs::write(&file, "").unwrap();
        assert!(record.hand_over().unwrap_err().to_string().contains("was moved"));
        fs::rename(dir.join("moved"), &file).unwrap();
        record.hand_over().unwrap();
    }

    /// A VM ran twice, from a checkpoint and from a link to it.
    #[test]
    fn a_checkpoint_has_one_note_by_all_of_its_names() {
        let dir = TempDir::new().unwrap();
        let (file, link) = (dir.join("checkpoint"), dir.join("link"));
        fs::write(&file, "").unwrap();
        symlink("checkpoint", &link).unwrap();
        let same = |path: PathBuf| path.parent().unwrap().canonicalize().unwrap().join(path.file_name().unwrap());
        assert_eq!(same(Record::place(&file, false)), same(Record::place(&link, false)));
        assert_eq!(Record::place(Path::new("none"), false), Path::new("none.postcopy"));
        // A process in a container has the number of the one before, whose note may still be there.
        let clones = [(); 2].map(|()| Record::place(Path::new("none"), true));
        assert_ne!(clones[0], clones[1]);
        assert!(clones[0].to_str().unwrap().starts_with(&format!("none.postcopy-{}-", std::process::id())));
        Record::check_names(&link).unwrap();
        // A hard link is as good a name as the first, and nothing leads from one to the other.
        fs::hard_link(&file, dir.join("other")).unwrap();
        for name in [file, link, dir.join("other")] {
            let error = Record::check_names(&name).unwrap_err().to_string();
            assert!(error.contains("has 2 names") && error.contains("--state"), "{error}");
        }
    }

    /// A second VM was started from a file that was mounted elsewhere, once the first sender had died.
    #[test]
    fn a_file_that_is_mounted_by_itself_needs_a_place_for_its_note() {
        let dir = TempDir::new().unwrap();
        let (file, other) = (dir.join("checkpoint"), dir.join("other"));
        fs::write(&file, "").unwrap();
        fs::write(&other, "").unwrap();
        let mount = std::process::Command::new("mount").arg("--bind").args([&file, &other]).output();
        if !mount.is_ok_and(|mount| mount.status.success()) {
            return test_support::skip("this process cannot mount");
        }
        let refused = Record::check_names(&other);
        let unmounted = std::process::Command::new("umount").arg(&other).status();
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("a mount of a single file") && error.contains("--state"), "{error}");
        assert!(unmounted.unwrap().success());
        Record::check_names(&file).unwrap();
        Record::check_names(&other).unwrap();
    }

    /// A second VM was started from a file that had got another name, or was mounted at one, while the first got its memory.
    #[test]
    fn a_file_is_locked_by_all_of_its_names() {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        fs::write(&file, "").unwrap();
        let first = lock_checkpoint(&file).unwrap();
        fs::rename(&file, dir.join("moved")).unwrap();
        let error = lock_checkpoint(&dir.join("moved")).unwrap_err().to_string();
        assert!(error.contains("moved") && error.contains("--clone"), "{error}");
        drop(first);
        assert!(lock_checkpoint(&dir.join("moved")).unwrap().is_some());
    }

    /// A VM was told to run without a note, and started once more from the same file; and the note of that one was removed by the first.
    #[test]
    fn a_note_that_has_lost_its_name_hands_nothing_over_and_removes_no_other() {
        let dir = TempDir::new().unwrap();
        let path = dir.join("note");
        let mut first = Record::begin_clone(&path, || Ok(identity()), "x").unwrap();
        fs::remove_file(&path).unwrap();
        assert!(first.hand_over().unwrap_err().to_string().contains("was removed or replaced"));
        let mut second = Record::begin_clone(&path, || Ok(identity()), "y").unwrap();
        assert!(first.hand_over().is_err());
        first.remove();
        second.hand_over().unwrap();
        second.remove();
        assert!(!path.exists());
    }

    /// `--force` replaced the only memory of a guest that ran elsewhere.
    #[test]
    fn a_file_that_a_vm_may_need_is_not_replaced() {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        fs::write(&file, "").unwrap();
        symlink("checkpoint", dir.join("link")).unwrap();
        fs::write(dir.join("checkpoint.postcopy.txt"), "of the operator").unwrap();
        for note in ["checkpoint.postcopy", "checkpoint.postcopy-7-1", "checkpoint.postcopy-1-5f3a9c21-1"] {
            let mut record = Record::begin_clone(&dir.join(note), || Ok(identity()), "tcp:h:1").unwrap();
            Record::check_replaceable(&file).unwrap();
            record.hand_over().unwrap();
            for name in [&file, &dir.join("link")] {
                let error = Record::check_replaceable(name).unwrap_err().to_string();
                assert!(error.contains("handed over to tcp:h:1") && error.contains(note), "{error}");
            }
            record.remove();
            Record::check_replaceable(&file).unwrap();
        }
    }

    /// A note is removed, and a device, removed, is missed by the whole system.
    #[test]
    fn a_device_is_no_note() {
        let dir = TempDir::new().unwrap();
        let link = dir.join("note");
        symlink("/dev/null", &link).unwrap();
        for error in
            [Record::begin_clone(&link, || Ok(identity()), "x").unwrap_err(), locked(&link, false).unwrap_err()]
        {
            assert!(error.to_string().contains("is not a file"), "{error}");
        }
        assert!(link.is_symlink());
    }

    /// Where there is no /proc all boots looked like this one, and a VM that may have been handed over did not.
    #[test]
    fn a_note_of_an_unknown_boot_may_be_of_a_vm_that_runs() {
        let mut note = Note::new(identity(), "tcp:h:1");
        assert!(!note.may_be_handed_over());
        note.boot.clear();
        assert!(note.may_be_handed_over());
    }
}
