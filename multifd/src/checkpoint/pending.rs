//! A file that gets its name when it is complete and on disk.
//!
//! Until then it has none, so that nothing is left behind even when the process is killed. Where the file system has no
//! files without names, it has one that begins with a dot.
//!
//! A name that cannot be put on disk is taken back, so that a checkpoint that was reported as failed is not there.

use std::{
    ffi::OsString,
    fs::File,
    io,
    path::{Path, PathBuf},
};

use rustix::io::Errno;

use super::{
    CheckpointError,
    directory::{self, Directory, Placed},
};
use crate::sync::Arc;

/// A file on its way to its name.
pub(crate) struct PendingFile {
    file: Arc<File>,
    path: PathBuf,
    directory: Directory,
    name: OsString,
    /// Whether a file of this name may be replaced: the one that was there when this was made, and no other.
    replace: bool,
    /// That file. As long as it is open, no other one has its number.
    old: Option<File>,
    /// The name it has for now, if it could not do without.
    temporary: Option<OsString>,
    published: bool,
}

impl PendingFile {
    /// A file that is going to be `path`.
    ///
    /// # Errors
    /// Something of this name is there and is not to be replaced, or is no regular file; the directory does not take
    /// files, or cannot be written to disk.
    pub(crate) fn create(path: &Path, replace: bool) -> Result<PendingFile, CheckpointError> {
        PendingFile::create_in(path, replace, Directory::open)
    }

    fn create_in(
        path: &Path,
        replace: bool,
        open: impl FnOnce(&Path) -> Result<Directory, CheckpointError>,
    ) -> Result<PendingFile, CheckpointError> {
        let path = path.to_owned();
        let old = match directory::look(&path) {
            Ok((_, false)) => return Err(CheckpointError::NotAFile { path }),
            Ok(_) if !replace => return Err(CheckpointError::Exists { path }),
            Ok((file, true)) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(CheckpointError::Io { path, doing: "looking for it", source }),
        };
        let Some(name) = path.file_name().map(OsString::from) else {
            return Err(CheckpointError::NoName { path });
        };
        let parent = directory::parent(&path);
        let directory = open(&parent)?;
        let (file, temporary) = directory.new_file().map_err(|error| CheckpointError::Io {
            path: parent,
            doing: "creating a file in it",
            source: error.into(),
        })?;
        Ok(PendingFile { file: Arc::new(file), path, directory, name, replace, old, temporary, published: false })
    }

    /// The file.
    pub(crate) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The name it is going to have.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the file has its name.
    pub(crate) fn is_published(&self) -> bool {
        self.published
    }

    /// Puts the contents on disk.
    pub(crate) fn sync(&self) -> Result<(), CheckpointError> {
        self.file.sync_all().map_err(self.error("writing it to disk"))
    }

    /// Gives the file its name and puts that on disk, too.
    ///
    /// # Errors
    /// [`CheckpointError::Exists`] or, if a file was to be replaced, [`CheckpointError::Taken`], where another process took the name
    /// meanwhile; the kernel's. The file does not have its name then, and a file that was to be replaced has it still. The one
    /// exception is [`CheckpointError::Published`].
    pub(crate) fn publish(&mut self) -> Result<(), CheckpointError> {
        let placed = match (self.temporary.take(), &self.old) {
            (temporary, None) => self.directory.place(&self.file, temporary, &self.name),
            (temporary, Some(old)) => self.directory.replace(&self.file, temporary, &self.name, old),
        };
        let placed = placed.map_err(|error| match error {
            Errno::EXIST if self.replace => CheckpointError::Taken { path: self.path.clone() },
            Errno::EXIST => CheckpointError::Exists { path: self.path.clone() },
            Errno::ISDIR => CheckpointError::NotAFile { path: self.path.clone() },
            error => self.error("giving it its name")(error.into()),
        })?;
        match self.directory.sync() {
            Ok(()) => {
                self.published = true;
                self.directory.settle(placed);
                Ok(())
            }
            Err(error) => Err(self.taken_back(placed, error.into())),
        }
    }

    /// Takes the name back because the directory could not be written to disk for the reason `why`.
    fn taken_back(&mut self, placed: Placed, why: io::Error) -> CheckpointError {
        match self.directory.take_back(&self.file, &placed, &self.name) {
            Ok(()) => self.error("writing its name to disk")(why),
            Err(error) => {
                self.published = true;
                let path = self.path.clone();
                let taking_back = match placed {
                    Placed::Overwritten => "this file system keeps no file that is replaced".to_owned(),
                    _ => io::Error::from(error).to_string(),
                };
                self.directory.settle(placed);
                CheckpointError::Published { path, source: why, taking_back }
            }
        }
    }

    /// An error about this file.
    pub(crate) fn error(&self, doing: &'static str) -> impl FnOnce(io::Error) -> CheckpointError + use<> {
        let path = self.path.clone();
        move |source| CheckpointError::Io { path, doing, source }
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if let Some(name) = &self.temporary {
            self.directory.remove(name);
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::{
        ffi::OsStr,
        fs,
        io::Write,
        ops::Range,
        sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    };

    use rustix::fs::RenameFlags;
    use test_support::TempDir;

    use super::{super::directory::Calls, *};

    fn entries(dir: &TempDir) -> Vec<OsString> {
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    /// The same file with a temporary name, as on a file system that has no files without.
    fn named(mut pending: PendingFile) -> PendingFile {
        let directory = File::open(directory::parent(&pending.path)).unwrap();
        let (file, name) = directory::temporarily_named(&directory).unwrap();
        pending.file = Arc::new(file);
        pending.temporary = Some(name);
        pending
    }

    fn create(path: &Path, replace: bool, with_name: bool) -> Result<PendingFile, CheckpointError> {
        create_with(path, replace, with_name, Directory::open)
    }

    fn create_with(
        path: &Path,
        replace: bool,
        with_name: bool,
        open: impl FnOnce(&Path) -> Result<Directory, CheckpointError>,
    ) -> Result<PendingFile, CheckpointError> {
        let pending = PendingFile::create_in(path, replace, open)?;
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

    /// The second of two receivers replaced what the first had just got, and both sources were told that all is well.
    #[test]
    fn no_other_file_is_replaced_than_the_one_that_was_there_at_the_start() {
        for (plain_renames, no_hard_links) in [(false, false), (true, false), (true, true)] {
            for (with_name, old) in [(false, None), (true, None), (false, Some("old")), (true, Some("old"))] {
                let dir = TempDir::new().unwrap();
                let path = dir.join("x");
                if let Some(old) = old {
                    fs::write(&path, old).unwrap();
                }
                let open = |path: &Path| {
                    let defects = Defects { plain_renames, no_hard_links, ..Defects::default() };
                    let (calls, unlink_failed) = Default::default();
                    Directory::with_calls(path, Box::new(Defective { defects, calls, unlink_failed }))
                };
                let mut late = create_with(&path, true, with_name, open).unwrap();
                let mut first = create(&path, true, with_name).unwrap();
                (&**first.file()).write_all(b"er").unwrap();
                first.publish().unwrap();
                let case = format!("{plain_renames} {no_hard_links} {with_name} {old:?}");
                assert!(matches!(late.publish(), Err(CheckpointError::Taken { .. })), "{case}");
                assert!(!late.is_published());
                drop((late, first));
                assert!(fs::read(&path).unwrap().ends_with(b"er"), "{case}");
                assert_eq!(entries(&dir), ["x"], "{case}");
                // One that has gone meanwhile leaves the name free.
                let mut next = create_with(&path, true, with_name, open).unwrap();
                fs::remove_file(&path).unwrap();
                next.publish().unwrap();
                assert_eq!(fs::read(&path).unwrap(), b"new");
            }
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
    fn a_name_that_becomes_a_directory_is_left_to_it() {
        for with_name in [false, true] {
            let dir = TempDir::new().unwrap();
            let path = dir.join("x");
            fs::write(&path, "old").unwrap();
            let mut pending = create(&path, true, with_name).unwrap();
            fs::remove_file(&path).unwrap();
            fs::create_dir(&path).unwrap();
            let error = pending.publish().unwrap_err();
            assert!(matches!(error, CheckpointError::NotAFile { .. }), "{error}");
            assert!(path.is_dir() && !pending.is_published());
            drop(pending);
            assert_eq!(entries(&dir), ["x"]);
        }
    }

    #[test]
    fn it_is_the_kernel_that_writes_a_directory_to_disk() {
        let dir = TempDir::new().unwrap();
        Kernel.sync(&File::open(dir.path()).unwrap()).unwrap();
        let (names_it, _) = directory::look(dir.path()).unwrap();
        assert_eq!(Kernel.sync(&names_it), Err(Errno::BADF), "a descriptor that only names it");
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let error = PendingFile::create(Path::new("/no/such/directory/x"), false).err().unwrap().to_string();
        assert_eq!(error, "\"/no/such/directory\": opening the directory: No such file or directory (os error 2)");
    }

    #[test]
    fn a_name_that_cannot_be_looked_for_is_not_taken_for_a_free_one() {
        let dir = TempDir::new().unwrap();
        fs::write(dir.join("file"), "").unwrap();
        let error = PendingFile::create(&dir.join("file/x"), false).err().unwrap().to_string();
        assert!(error.ends_with("/file/x\": looking for it: Not a directory (os error 20)"), "{error}");
    }

    #[test]
    fn contents_that_cannot_be_put_on_disk_are_an_error() {
        let dir = TempDir::new().unwrap();
        let mut pending = create(&dir.join("x"), false, false).unwrap();
        pending.sync().unwrap();
        pending.file = Arc::new(directory::look(dir.path()).unwrap().0);
        let error = pending.sync().unwrap_err().to_string();
        assert!(error.ends_with("/x\": writing it to disk: Bad file descriptor (os error 9)"), "{error}");
    }

    /// A file system with defects.
    #[derive(Clone, Default)]
    struct Defects {
        /// Calls, counted from 0 when the file is about to get its name, that fail.
        fail: Range<usize>,
        /// No exchange, and no rename that refuses to replace.
        plain_renames: bool,
        no_hard_links: bool,
    }

    struct Defective {
        defects: Defects,
        calls: Arc<AtomicUsize>,
        unlink_failed: Arc<AtomicBool>,
    }

    impl Defective {
        fn call(&self) -> Result<(), Errno> {
            let call = self.calls.fetch_add(1, Relaxed);
            // The first call is the one that `create` makes.
            let call = call.wrapping_sub(1);
            if self.defects.fail.contains(&call) { Err(Errno::IO) } else { Ok(()) }
        }
    }

    struct Kernel;

    impl Calls for Kernel {}

    impl Calls for Defective {
        fn sync(&self, directory: &File) -> Result<(), Errno> {
            self.call().and_then(|()| Kernel.sync(directory))
        }

        fn link_file(&self, directory: &File, file: &File, name: &OsStr) -> Result<(), Errno> {
            self.call().and_then(|()| Kernel.link_file(directory, file, name))
        }

        fn link(&self, directory: &File, from: &OsStr, to: &OsStr) -> Result<(), Errno> {
            self.call()?;
            if self.defects.no_hard_links { Err(Errno::PERM) } else { Kernel.link(directory, from, to) }
        }

        fn rename(&self, directory: &File, from: &OsStr, to: &OsStr, flags: RenameFlags) -> Result<(), Errno> {
            self.call()?;
            match self.defects.plain_renames && !flags.is_empty() {
                true => Err(Errno::INVAL),
                false => Kernel.rename(directory, from, to, flags),
            }
        }

        fn unlink(&self, directory: &File, name: &OsStr) -> Result<(), Errno> {
            let done = self.call().and_then(|()| Kernel.unlink(directory, name));
            self.unlink_failed.fetch_or(done.is_err(), Relaxed);
            done
        }
    }

    /// Publishes `new` on a file system with `defects`, over `old` if there is one. Checks that what is reported, what is
    /// there and [`PendingFile::is_published`] agree, and returns what was reported and how many calls were made.
    fn publish(defects: &Defects, old: Option<&str>, with_name: bool) -> (Result<(), CheckpointError>, usize) {
        let dir = TempDir::new().unwrap();
        let path = dir.join("x");
        if let Some(old) = old {
            fs::write(&path, old).unwrap();
        }
        let (calls, unlink_failed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let defective =
            Defective { defects: defects.clone(), calls: calls.clone(), unlink_failed: unlink_failed.clone() };
        let open = |path: &Path| Directory::with_calls(path, Box::new(defective));
        let mut pending = create_with(&path, old.is_some(), with_name, open).unwrap();
        let reported = pending.publish();
        let calls = calls.load(Relaxed) - 1;
        let there = fs::read_to_string(&path).ok();
        let case = format!("{:?}, plain {}: {reported:?}", defects.fail, defects.plain_renames);
        match &reported {
            Ok(()) | Err(CheckpointError::Published { .. }) => {
                assert!(pending.is_published(), "{case}");
                assert_eq!(there.as_deref(), Some("new"), "{case}");
            }
            Err(_) => {
                assert!(!pending.is_published(), "{case}");
                // Where it could not even remove the empty file with which it claimed the name.
                let claimed = unlink_failed.load(Relaxed) && there.as_deref() == Some("");
                assert!(there.as_deref() == old || claimed, "{case}: {there:?}");
            }
        }
        drop(pending);
        if !unlink_failed.load(Relaxed) {
            let names: Vec<OsString> = there.iter().map(|_| "x".into()).collect();
            assert_eq!(entries(&dir), names, "{case}");
        }
        (reported, calls)
    }

    /// A failing write of the directory left the checkpoint there under its name, while the source was told that there is
    /// none: its VM ran on, and a second one could be started from the file.
    #[test]
    fn a_checkpoint_is_there_exactly_if_that_is_reported() {
        let (mut failed, mut published) = (0, 0);
        for old in [None, Some("old")] {
            for (with_name, plain_renames, no_hard_links) in [
                (false, false, false),
                (true, false, false),
                (false, true, false),
                (true, true, false),
                (true, true, true),
            ] {
                for lasts in [1, 2, usize::MAX] {
                    for first in 0usize.. {
                        let fail = first..first.saturating_add(lasts);
                        let defects = Defects { fail, plain_renames, no_hard_links };
                        let (reported, calls) = publish(&defects, old, with_name);
                        failed += usize::from(reported.is_err());
                        published += usize::from(matches!(reported, Err(CheckpointError::Published { .. })));
                        if first >= calls {
                            reported.unwrap();
                            break;
                        }
                    }
                }
            }
        }
        assert!(failed > 60 && published > 5, "{failed} failed, {published} of them published");
    }

    #[test]
    fn a_name_that_cannot_be_put_on_disk_is_taken_back() {
        // The calls: exchange, write the directory; or link, write the directory.
        for (old, with_name, fail) in [(None, false, 1), (Some("old"), true, 1), (Some("old"), false, 2)] {
            let (reported, _) = publish(&Defects { fail: fail..fail + 1, ..Defects::default() }, old, with_name);
            let error = reported.unwrap_err().to_string();
            assert!(error.ends_with("/x\": writing its name to disk: Input/output error (os error 5)"), "{error}");
            let (reported, _) = publish(&Defects { fail: fail..usize::MAX, ..Defects::default() }, old, with_name);
            let error = reported.unwrap_err().to_string();
            assert!(error.contains("/x\" is complete and has its name, but"), "{error}");
        }
    }

    #[test]
    fn a_file_that_was_replaced_for_good_is_said_to_be() {
        let found = (0..20).find_map(|first| {
            let defects = Defects { fail: first..first + 1, plain_renames: true, no_hard_links: true };
            publish(&defects, Some("old"), true)
                .0
                .err()
                .filter(|error| matches!(error, CheckpointError::Published { .. }))
        });
        let error = found.unwrap().to_string();
        assert!(error.contains("this file system keeps no file that is replaced"), "{error}");
    }

    /// Some file systems never write a directory to disk on request. Every checkpoint on them was reported as failed.
    #[test]
    fn a_directory_that_is_never_written_on_request_is_no_failure() {
        struct NeverSyncs(Errno);

        impl Calls for NeverSyncs {
            fn sync(&self, _directory: &File) -> Result<(), Errno> {
                Err(self.0)
            }
        }

        for error in [Errno::INVAL, Errno::OPNOTSUPP, Errno::BADF, Errno::IO] {
            let dir = TempDir::new().unwrap();
            let path = dir.join("x");
            let open = |path: &Path| Directory::with_calls(path, Box::new(NeverSyncs(error)));
            let created = create_with(&path, false, false, open);
            if error == Errno::IO {
                assert!(created.is_err(), "a disk that fails is found before anything is received");
                assert!(entries(&dir).is_empty());
                continue;
            }
            let mut pending = created.unwrap();
            pending.publish().unwrap();
            assert!(pending.is_published());
            assert_eq!(fs::read(&path).unwrap(), b"new");
        }
    }
}
