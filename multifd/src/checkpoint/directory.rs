//! The directory that a checkpoint is written to: names in it, and whether they are on disk.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags},
    io::Errno,
};

use super::CheckpointError;

/// A directory in which a file gets its name.
pub(super) struct Directory {
    file: File,
    calls: Box<dyn Calls>,
    /// Whether the file system can write a directory to disk on request.
    syncs: bool,
}

/// The system calls that can fail while a file gets its name. Tests bring some that do.
pub(super) trait Calls: Send {
    /// Writes the names in `directory` to disk.
    fn sync(&self, directory: &File) -> Result<(), Errno> {
        rustix::fs::fsync(directory)
    }

    /// Gives `file`, which may have no name, the name `name`.
    fn link_file(&self, directory: &File, file: &File, name: &OsStr) -> Result<(), Errno> {
        // Linking a descriptor itself takes a privilege; its link in /proc does not.
        rustix::fs::linkat(CWD, link_of(file), directory, name, AtFlags::SYMLINK_FOLLOW)
    }

    /// Gives the file `from` a second name.
    fn link(&self, directory: &File, from: &OsStr, to: &OsStr) -> Result<(), Errno> {
        rustix::fs::linkat(directory, from, directory, to, AtFlags::empty())
    }

    /// Renames `from` to `to`.
    fn rename(&self, directory: &File, from: &OsStr, to: &OsStr, flags: RenameFlags) -> Result<(), Errno> {
        match flags.is_empty() {
            true => rustix::fs::renameat(directory, from, directory, to),
            false => rustix::fs::renameat_with(directory, from, directory, to, flags),
        }
    }

    /// Removes the name `name`.
    fn unlink(&self, directory: &File, name: &OsStr) -> Result<(), Errno> {
        rustix::fs::unlinkat(directory, name, AtFlags::empty())
    }
}

/// The kernel's calls.
struct Kernel;

impl Calls for Kernel {}

/// How a file got its name, which says how that is undone.
pub(super) enum Placed {
    /// There was no file of this name.
    New,
    /// The file that had the name has this temporary one.
    Exchanged(OsString),
    /// The file that had the name has this temporary one as well; the name is the new file's.
    Kept(OsString),
    /// The file that had the name is gone.
    Overwritten,
}

impl Directory {
    /// Opens the directory `path` and finds out whether it can be written to disk.
    ///
    /// # Errors
    /// It is not there, or it could be written to disk and was not.
    pub(super) fn open(path: &Path) -> Result<Directory, CheckpointError> {
        Directory::with_calls(path, Box::new(Kernel))
    }

    pub(super) fn with_calls(path: &Path, calls: Box<dyn Calls>) -> Result<Directory, CheckpointError> {
        let file = open_directory(path)?;
        let syncs = match calls.sync(&file) {
            Ok(()) => true,
            // What file systems answer that never write a directory to disk on request. Better known now than when the
            // checkpoint is complete.
            Err(error @ (Errno::INVAL | Errno::OPNOTSUPP | Errno::BADF | Errno::NOSYS)) => {
                tracing::warn!(
                    directory = ?path, %error,
                    "this file system does not write directories to disk on request: after a power failure soon after the \
                     end, the checkpoint may not be found under its name"
                );
                false
            }
            Err(error) => {
                let (path, doing) = (path.to_owned(), "writing the directory to disk");
                return Err(CheckpointError::Io { path, doing, source: error.into() });
            }
        };
        Ok(Directory { file, calls, syncs })
    }

    /// A file without a name, or one with a temporary name where the file system has no others.
    pub(super) fn new_file(&self) -> Result<(File, Option<OsString>), Errno> {
        match unnamed(&self.file) {
            Ok(file) => Ok((file, None)),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => {
                temporarily_named(&self.file).map(|(file, name)| (file, Some(name)))
            }
            Err(error) => Err(error),
        }
    }

    /// Writes all names to disk, where the file system does that.
    pub(super) fn sync(&self) -> Result<(), Errno> {
        if self.syncs { self.calls.sync(&self.file) } else { Ok(()) }
    }

    /// Gives `file`, which has the name `temporary` or none, the free name `name`.
    ///
    /// # Errors
    /// The kernel's, [`Errno::EXIST`] where the name is not free. The file has no name then.
    pub(super) fn place(&self, file: &File, temporary: Option<OsString>, name: &OsStr) -> Result<Placed, Errno> {
        let placed = match &temporary {
            None => self.calls.link_file(&self.file, file, name),
            Some(temporary) => self.rename_to_free(temporary, name),
        };
        self.removed_unless(placed, temporary.as_deref())?;
        Ok(Placed::New)
    }

    /// The same for a name that the file `old` may have, which is kept, so that [`take_back`](Self::take_back) can put it back.
    ///
    /// # Errors
    /// The kernel's; [`Errno::EXIST`] where another file has the name, [`Errno::ISDIR`] where something that is no file has it. It
    /// keeps it then. Without exchanges of names and hard links, a file that takes the name in the same moment is replaced.
    pub(super) fn replace(
        &self,
        file: &File,
        temporary: Option<OsString>,
        name: &OsStr,
        old: &File,
    ) -> Result<Placed, Errno> {
        let temporary = match temporary {
            Some(temporary) => temporary,
            None => free_name(|free| self.calls.link_file(&self.file, file, free))?,
        };
        let placed = self.exchange_or_rename(&temporary, name, old);
        self.removed_unless(placed, Some(&temporary))
    }

    /// Undoes what [`place`](Self::place) or [`replace`](Self::replace) did. `file` has the name `name`.
    ///
    /// # Errors
    /// The kernel's: `file` still has the name.
    pub(super) fn take_back(&self, file: &File, placed: &Placed, name: &OsStr) -> Result<(), Errno> {
        if !self.is_called(file, name) {
            // Another process has replaced or removed it: nothing of ours is there, nor would the old file be.
            if let Placed::Exchanged(old) | Placed::Kept(old) = placed {
                self.remove(old);
            }
            return Ok(());
        }
        match placed {
            Placed::New => self.calls.unlink(&self.file, name)?,
            Placed::Exchanged(old) => {
                self.calls.rename(&self.file, old, name, RenameFlags::EXCHANGE)?;
                self.remove(old);
            }
            Placed::Kept(old) => self.calls.rename(&self.file, old, name, RenameFlags::empty())?,
            Placed::Overwritten => return Err(Errno::NOENT),
        }
        if let Err(error) = self.sync() {
            tracing::warn!(%error, "the checkpoint's name was removed, but a power failure may bring it back");
        }
        Ok(())
    }

    /// The name stays: the file that had it before is removed.
    pub(super) fn settle(&self, placed: Placed) {
        match placed {
            Placed::New | Placed::Overwritten => {}
            Placed::Exchanged(old) | Placed::Kept(old) => self.remove(&old),
        }
    }

    /// Removes the temporary name `name`; what fails there leaves a file behind and harms nothing.
    pub(super) fn remove(&self, name: &OsStr) {
        if let Err(error) = self.calls.unlink(&self.file, name) {
            tracing::warn!(?name, %error, "a temporary file could not be removed");
        }
    }

    fn exchange_or_rename(&self, temporary: &OsStr, name: &OsStr, old: &File) -> Result<Placed, Errno> {
        // Another process may create and remove files of this name meanwhile, but not without end.
        for _ in 0..ATTEMPTS {
            match self.calls.rename(&self.file, temporary, name, RenameFlags::EXCHANGE) {
                Ok(()) if self.is_called(old, temporary) => return Ok(Placed::Exchanged(temporary.to_owned())),
                Ok(()) => {
                    let error = if self.is_file(temporary) { Errno::EXIST } else { Errno::ISDIR };
                    self.calls.rename(&self.file, temporary, name, RenameFlags::EXCHANGE)?;
                    return Err(error);
                }
                Err(Errno::NOENT) => match self.rename_to_free(temporary, name) {
                    Ok(()) => return Ok(Placed::New),
                    Err(Errno::EXIST) => {}
                    Err(error) => return Err(error),
                },
                // A file system without this flag.
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => return self.rename_over(temporary, name, old),
                Err(error) => return Err(error),
            }
        }
        Err(Errno::EXIST)
    }

    /// Renames over the file `name`, which is kept under another name where the file system can do that.
    fn rename_over(&self, temporary: &OsStr, name: &OsStr, old: &File) -> Result<Placed, Errno> {
        match free_name(|free| self.calls.link(&self.file, name, free)) {
            Ok(kept) if !self.is_called(old, &kept) => {
                self.remove(&kept);
                Err(Errno::EXIST)
            }
            Ok(kept) => {
                if let Err(error) = self.calls.rename(&self.file, temporary, name, RenameFlags::empty()) {
                    self.remove(&kept);
                    return Err(error);
                }
                Ok(Placed::Kept(kept))
            }
            Err(Errno::NOENT) => self.rename_to_free(temporary, name).map(|()| Placed::New),
            // Gone, or another one.
            Err(_no_hard_links) if !self.is_called(old, name) => {
                self.rename_to_free(temporary, name).map(|()| Placed::New)
            }
            Err(_no_hard_links) => {
                self.calls.rename(&self.file, temporary, name, RenameFlags::empty())?;
                Ok(Placed::Overwritten)
            }
        }
    }

    fn rename_to_free(&self, from: &OsStr, to: &OsStr) -> Result<(), Errno> {
        match self.calls.rename(&self.file, from, to, RenameFlags::NOREPLACE) {
            // A file system without this flag.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => match self.calls.link(&self.file, from, to) {
                Ok(()) => {
                    // It has its name; that it also has another one is no reason to fail.
                    self.remove(from);
                    Ok(())
                }
                Err(Errno::PERM | Errno::NOSYS | Errno::OPNOTSUPP | Errno::MLINK) => self.rename_to_claimed(from, to),
                Err(error) => Err(error),
            },
            renamed => renamed,
        }
    }

    /// Renames over an empty file of our own, which takes the name only if it is free.
    fn rename_to_claimed(&self, from: &OsStr, to: &OsStr) -> Result<(), Errno> {
        rustix::fs::openat(&self.file, to, OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC, MODE)?;
        let renamed = self.calls.rename(&self.file, from, to, RenameFlags::empty());
        if renamed.is_err() {
            self.remove(to);
        }
        renamed
    }

    /// Removes the name `temporary` if it could not be replaced by the final one.
    fn removed_unless<T>(&self, done: Result<T, Errno>, temporary: Option<&OsStr>) -> Result<T, Errno> {
        if let (Err(_), Some(temporary)) = (&done, temporary) {
            self.remove(temporary);
        }
        done
    }

    fn is_file(&self, name: &OsStr) -> bool {
        let found = rustix::fs::statat(&self.file, name, AtFlags::SYMLINK_NOFOLLOW);
        found.is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::RegularFile)
    }

    /// Whether `name` is a name of `file`. If that cannot be told, it is.
    fn is_called(&self, file: &File, name: &OsStr) -> bool {
        let found = match rustix::fs::statat(&self.file, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => found,
            Err(error) => return error != Errno::NOENT,
        };
        file.metadata().map_or(true, |ours| (ours.dev(), ours.ino()) == (found.st_dev, found.st_ino))
    }
}

/// A file in `directory` that goes away with its last user.
///
/// # Errors
/// The directory takes no files.
pub(crate) fn unnamed_file(directory: &Path) -> Result<File, CheckpointError> {
    let opened = open_directory(directory)?;
    let file = unnamed(&opened).or_else(|_| {
        let (file, name) = temporarily_named(&opened)?;
        rustix::fs::unlinkat(&opened, name, AtFlags::empty())?;
        Ok(file)
    });
    file.map_err(|error: Errno| CheckpointError::Io {
        path: directory.to_owned(),
        doing: "creating a file in it",
        source: error.into(),
    })
}

/// The directory that `path` names a file in.
pub(super) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// What has the name `path`, and whether that is a regular file. It is not opened for anything but to know it again.
pub(super) fn look(path: &Path) -> io::Result<(File, bool)> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found: File = rustix::fs::openat(CWD, path, flags, Mode::empty())?.into();
    let is_file = found.metadata()?.is_file();
    Ok((found, is_file))
}

fn open_directory(path: &Path) -> Result<File, CheckpointError> {
    let doing = "opening the directory";
    File::open(path).map_err(|source: io::Error| CheckpointError::Io { path: path.to_owned(), doing, source })
}

/// A file without a name in `directory`, that can get one.
fn unnamed(directory: &File) -> Result<File, Errno> {
    let file: File = rustix::fs::openat(directory, ".", OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, MODE)?.into();
    // Without /proc it could never get one.
    rustix::fs::statat(CWD, link_of(&file), AtFlags::empty())?;
    Ok(file)
}

pub(super) fn temporarily_named(directory: &File) -> Result<(File, OsString), Errno> {
    let mut file = None;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let name = free_name(|name| {
        file = Some(rustix::fs::openat(directory, name, flags, MODE)?);
        Ok(())
    })?;
    Ok((file.expect("a name was free").into(), name))
}

/// The first of a row of names for which `take` does not find that it exists.
fn free_name(mut take: impl FnMut(&OsStr) -> Result<(), Errno>) -> Result<OsString, Errno> {
    for number in 0..1000 {
        let name = OsString::from(format!(".multifd-{}-{number}.part", std::process::id()));
        match take(&name) {
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
            Ok(()) => return Ok(name),
        }
    }
    Err(Errno::EXIST)
}

fn link_of(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// For its owner only: it holds whatever the guest has in memory.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);
/// How often a name that appears and disappears is tried.
const ATTEMPTS: usize = 16;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::fs;

    use test_support::TempDir;

    use super::*;

    #[test]
    fn a_name_without_a_directory_is_in_this_one() {
        assert_eq!(parent(Path::new("x")), Path::new("."));
        assert_eq!(parent(Path::new("d/x")), Path::new("d"));
        assert_eq!(parent(Path::new("/x")), Path::new("/"));
    }

    #[test]
    fn a_link_is_looked_at_and_not_followed() {
        let dir = TempDir::new().unwrap();
        fs::write(dir.join("file"), "x").unwrap();
        std::os::unix::fs::symlink("file", dir.join("link")).unwrap();
        let is_file = |name: &str| look(&dir.join(name)).unwrap().1;
        assert_eq!([is_file("file"), is_file("link")], [true, false]);
    }

    #[test]
    fn a_file_has_the_names_that_lead_to_it() {
        let dir = TempDir::new().unwrap();
        for name in ["a", "b"] {
            fs::write(dir.join(name), "x").unwrap();
        }
        let directory = Directory::open(dir.path()).unwrap();
        let file = File::open(dir.join("a")).unwrap();
        let called = |name: &str| directory.is_called(&file, OsStr::new(name));
        assert_eq!([called("a"), called("b"), called("none")], [true, false, false]);
        assert!(called(&"x".repeat(300)), "it cannot be told");
    }
}
