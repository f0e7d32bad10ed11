//! A file that gets its name when it is complete and on disk.
//!
//! Until then it has none, so that nothing is left behind even when the process is killed. Where the file system has no
//! files without names, it has one that begins with a dot.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, RenameFlags},
    io::Errno,
};

use super::CheckpointError;
use crate::sync::Arc;

/// A file on its way to its name.
pub(crate) struct PendingFile {
    file: Arc<File>,
    path: PathBuf,
    directory: File,
    name: OsString,
    /// Whether a file of this name may be replaced.
    replace: bool,
    /// The name it has for now, if it could not do without.
    temporary: Option<OsString>,
}

impl PendingFile {
    /// A file that is going to be `path`.
    ///
    /// # Errors
    /// Something of this name is there and is not to be replaced, or is no regular file; the directory does not take
    /// files.
    pub(crate) fn create(path: &Path, replace: bool) -> Result<PendingFile, CheckpointError> {
        let path = path.to_owned();
        match path.symlink_metadata() {
            Ok(found) if !found.is_file() => return Err(CheckpointError::NotAFile { path }),
            Ok(_) if !replace => return Err(CheckpointError::Exists { path }),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(CheckpointError::Io { path, doing: "looking for it", source }),
        }
        let Some(name) = path.file_name().map(OsString::from) else {
            return Err(CheckpointError::NoName { path });
        };
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let directory = open_directory(parent)?;
        let created = match unnamed(&directory) {
            Ok(file) => Ok((file, None)),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => {
                temporarily_named(&directory).map(|(file, name)| (file, Some(name)))
            }
            Err(error) => Err(error),
        };
        let (file, temporary) = created.map_err(|error| CheckpointError::Io {
            path: parent.to_owned(),
            doing: "creating a file in it",
            source: error.into(),
        })?;
        Ok(PendingFile { file: Arc::new(file), path, directory, name, replace, temporary })
    }

    /// The file.
    pub(crate) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The name it is going to have.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Puts the contents on disk.
    pub(crate) fn sync(&self) -> Result<(), CheckpointError> {
        self.file.sync_all().map_err(self.error("writing it to disk"))
    }

    /// Gives the file its name and puts that on disk, too.
    ///
    /// # Errors
    /// [`CheckpointError::Exists`] where somebody else took the name meanwhile; the kernel's.
    pub(crate) fn publish(&mut self) -> Result<(), CheckpointError> {
        let named = match (self.temporary.take(), self.replace) {
            (None, false) => self.link(&self.name),
            (None, true) => free_name(|name| self.link(name)).and_then(|name| self.rename(&name)),
            (Some(name), true) => self.rename(&name),
            (Some(name), false) => self.rename_to_free(&name),
        };
        match named {
            Ok(()) => self.directory.sync_all().map_err(self.error("writing its name to disk")),
            Err(Errno::EXIST) => Err(CheckpointError::Exists { path: self.path.clone() }),
            Err(error) => Err(self.error("giving it its name")(error.into())),
        }
    }

    /// An error about this file.
    pub(crate) fn error(&self, doing: &'static str) -> impl FnOnce(io::Error) -> CheckpointError + use<> {
        let path = self.path.clone();
        move |source| CheckpointError::Io { path, doing, source }
    }

    /// Gives the file without a name one.
    fn link(&self, name: &OsString) -> Result<(), Errno> {
        // Linking a descriptor itself takes a privilege; its link in /proc does not.
        rustix::fs::linkat(CWD, link_of(&self.file), &self.directory, name, AtFlags::SYMLINK_FOLLOW)
    }

    fn rename(&self, from: &OsString) -> Result<(), Errno> {
        let renamed = rustix::fs::renameat(&self.directory, from, &self.directory, &self.name);
        self.removed_unless(renamed, from)
    }

    fn rename_to_free(&self, from: &OsString) -> Result<(), Errno> {
        let directory = &self.directory;
        let renamed = rustix::fs::renameat_with(directory, from, directory, &self.name, RenameFlags::NOREPLACE);
        let renamed = match renamed {
            // A file system without this flag.
            Err(Errno::INVAL | Errno::NOSYS) => {
                rustix::fs::linkat(directory, from, directory, &self.name, AtFlags::empty())
                    .and_then(|()| rustix::fs::unlinkat(directory, from, AtFlags::empty()))
            }
            renamed => renamed,
        };
        self.removed_unless(renamed, from)
    }

    /// Removes the name `from` if it could not be replaced by the final one.
    fn removed_unless(&self, renamed: Result<(), Errno>, from: &OsString) -> Result<(), Errno> {
        if renamed.is_err() {
            // The first error is the one to report.
            let _ = rustix::fs::unlinkat(&self.directory, from, AtFlags::empty());
        }
        renamed
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if let Some(name) = &self.temporary {
            // Nobody is left to tell.
            let _ = rustix::fs::unlinkat(&self.directory, name, AtFlags::empty());
        }
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

fn open_directory(path: &Path) -> Result<File, CheckpointError> {
    let doing = "opening the directory";
    File::open(path).map_err(|source| CheckpointError::Io { path: path.to_owned(), doing, source })
}

/// A file without a name in `directory`, that can get one.
fn unnamed(directory: &File) -> Result<File, Errno> {
    let file: File = rustix::fs::openat(directory, ".", OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, MODE)?.into();
    // Without /proc it could never get one.
    rustix::fs::statat(CWD, link_of(&file), AtFlags::empty())?;
    Ok(file)
}

fn temporarily_named(directory: &File) -> Result<(File, OsString), Errno> {
    let mut file = None;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let name = free_name(|name| {
        file = Some(rustix::fs::openat(directory, name, flags, MODE)?);
        Ok(())
    })?;
    Ok((file.expect("a name was free").into(), name))
}

/// The first of a row of names for which `take` does not find that it exists.
fn free_name(mut take: impl FnMut(&OsString) -> Result<(), Errno>) -> Result<OsString, Errno> {
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

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::{fs, io::Write};

    use test_support::TempDir;

    use super::*;

    fn entries(dir: &TempDir) -> Vec<OsString> {
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    /// The same file with a temporary name, as on a file system that has no files without.
    fn named(mut pending: PendingFile) -> PendingFile {
        let (file, name) = temporarily_named(&pending.directory).unwrap();
        pending.file = Arc::new(file);
        pending.temporary = Some(name);
        pending
    }

    fn create(path: &Path, replace: bool, with_name: bool) -> Result<PendingFile, CheckpointError> {
        let pending = PendingFile::create(path, replace)?;
        (&**pending.file()).write_all(b"new").unwrap();
        if !with_name {
            return Ok(pending);
        }
        let pending = named(pending);
        (&**pending.file()).write_all(b"new").unwrap();
        Ok(pending)
    }

    #[test]
    fn a_file_has_its_name_only_when_it_is_published() {
        for with_name in [false, true] {
            let dir = TempDir::new().unwrap();
            let path = dir.join("x");
            let mut pending = create(&path, false, with_name).unwrap();
            assert!(!path.exists());
            pending.sync().unwrap();
            pending.publish().unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"new");
            drop(pending);
            assert_eq!(entries(&dir), ["x"]);
        }
    }

    #[test]
    fn a_file_that_is_dropped_leaves_nothing() {
        for with_name in [false, true] {
            let dir = TempDir::new().unwrap();
            drop(create(&dir.join("x"), false, with_name).unwrap());
            assert!(entries(&dir).is_empty());
        }
    }

    #[test]
    fn a_name_that_is_taken_meanwhile_is_not_overwritten() {
        for with_name in [false, true] {
            let dir = TempDir::new().unwrap();
            let path = dir.join("x");
            let mut pending = create(&path, false, with_name).unwrap();
            fs::write(&path, "theirs").unwrap();
            assert!(matches!(pending.publish(), Err(CheckpointError::Exists { .. })));
            drop(pending);
            assert_eq!(fs::read(&path).unwrap(), b"theirs");
            assert_eq!(entries(&dir), ["x"]);
        }
    }

    #[test]
    fn a_file_is_replaced_only_if_asked_for_and_as_a_whole() {
        for with_name in [false, true] {
            let dir = TempDir::new().unwrap();
            let path = dir.join("x");
            fs::write(&path, "old").unwrap();
            assert!(matches!(create(&path, false, with_name), Err(CheckpointError::Exists { .. })));
            let mut pending = create(&path, true, with_name).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"old");
            pending.publish().unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"new");
            drop(pending);
            assert_eq!(entries(&dir), ["x"]);
        }
    }

    #[test]
    fn what_is_no_file_is_never_replaced() {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.join("d")).unwrap();
        std::os::unix::fs::symlink("/dev/null", dir.join("l")).unwrap();
        for name in ["d", "l"] {
            assert!(matches!(PendingFile::create(&dir.join(name), true), Err(CheckpointError::NotAFile { .. })));
        }
        assert!(matches!(PendingFile::create(Path::new(".."), true), Err(CheckpointError::NotAFile { .. })));
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let error = PendingFile::create(Path::new("/no/such/directory/x"), false).err().unwrap().to_string();
        assert_eq!(error, "\"/no/such/directory\": opening the directory: No such file or directory (os error 2)");
    }
}
