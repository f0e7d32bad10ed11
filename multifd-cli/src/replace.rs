//! Writes a file that a reader finds complete: it takes the name of the one before.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

/// Replaces the file at `path`, or the one that a symbolic link there leads to, by one with `bytes` that everyone may read.
///
/// # Errors
/// As [`with`].
pub fn file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    with(path, |file| file.write_all(bytes))
}

/// Replaces the file at `path`, or the one that a symbolic link there leads to, by one that everyone may read and that `write` has
/// written. Without effect where that fails.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`] for a device, a FIFO and all else that is no file: a name of those is not to be taken away. The
/// kernel's.
pub fn with(path: &Path, write: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>) -> io::Result<()> {
    let (path, file) = beside(path)?;
    // Its own errors have the name of the file beside it in them, which says nothing to people.
    let mut out = BufWriter::new(file.as_file());
    write(&mut out)?;
    out.flush()?;
    drop(out);
    // Whatever the umask is.
    file.as_file().set_permissions(mode())?;
    file.persist(path)?;
    Ok(())
}

/// Says now what [`with`] would say later: a migration that is over cannot be asked again.
///
/// # Errors
/// As [`with`].
pub fn check(path: &Path) -> io::Result<()> {
    beside(path).map(drop)
}

/// Where the file is to be, and one beside it that goes when it is dropped.
fn beside(path: &Path) -> io::Result<(PathBuf, NamedTempFile)> {
    let path = destination(path)?;
    if path.file_name().is_none() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it names no file"));
    }
    let file = temporary_in(directory_of(&path), mode())?;
    Ok((path, file))
}

/// A new file in `directory` that is removed unless it is given a name.
///
/// # Errors
/// The kernel's, without the name of that file, which says nothing to people.
pub fn temporary_in(directory: &Path, permissions: fs::Permissions) -> io::Result<NamedTempFile> {
    fs::metadata(directory)?;
    let file = tempfile::Builder::new().prefix(".multifd-").permissions(permissions).tempfile_in(directory);
    file.map_err(|error| io::Error::from(error.kind()))
}

/// The directory that the file at `path` is in or would be.
pub fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."))
}

fn mode() -> fs::Permissions {
    fs::Permissions::from_mode(0o644)
}

/// Where the file is to be.
fn destination(path: &Path) -> io::Result<PathBuf> {
    match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "it exists and is not a file; expected one, or a new name"))
        }
        Ok(_) => fs::canonicalize(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(end_of_links(path.to_owned())),
        Err(error) => Err(error),
    }
}

/// Where `path` leads to, over links to links: there is nothing yet. The kernel has followed them all, so they come to an end.
fn end_of_links(mut path: PathBuf) -> PathBuf {
    while let Ok(next) = fs::read_link(&path) {
        // A link that is not absolute is seen from where it is.
        path = directory_of(&path).join(next);
    }
    path
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::symlink, net::UnixListener};

    use test_support::TempDir;

    use super::*;

    /// A device was replaced by a file, for the whole system where the process was root's.
    #[test]
    fn what_is_no_file_keeps_its_name() {
        let dir = TempDir::new().unwrap();
        let _socket = UnixListener::bind(dir.join("socket")).unwrap();
        symlink("/dev/null", dir.join("link")).unwrap();
        for path in [dir.join("socket"), dir.join("link"), dir.path().to_owned()] {
            for error in [file(&path, b"new"), check(&path)].map(Result::unwrap_err) {
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{}: {error}", path.display());
            }
        }
        assert!(fs::symlink_metadata(dir.join("link")).unwrap().is_symlink());
    }

    #[test]
    fn what_cannot_be_written_later_is_said_now() {
        let dir = TempDir::new().unwrap();
        fs::write(dir.join("old"), "old").unwrap();
        for name in ["old", "new"] {
            check(&dir.join(name)).unwrap();
        }
        assert_eq!(check(&dir.join("none/new")).unwrap_err().to_string(), "No such file or directory (os error 2)");
        check(&dir.join("old/new")).unwrap_err();
        let half = with(&dir.join("old"), |out| {
            out.write_all(&[0; 1 << 20])?;
            Err(io::ErrorKind::StorageFull.into())
        });
        assert_eq!(half.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(fs::read(dir.join("old")).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");
    }

    /// The link was replaced by the file.
    #[test]
    fn a_link_to_a_file_that_is_not_there_yet_leads_to_it() {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.join("reports")).unwrap();
        symlink("reports/new", dir.join("link")).unwrap();
        symlink("link", dir.join("link to link")).unwrap();
        for bytes in [b"a", b"b"] {
            check(&dir.join("link to link")).unwrap();
            file(&dir.join("link to link"), bytes).unwrap();
            assert_eq!(fs::read(dir.join("reports/new")).unwrap(), bytes);
        }
        for link in ["link", "link to link"] {
            assert!(fs::symlink_metadata(dir.join(link)).unwrap().is_symlink(), "{link}");
        }
        symlink("none/new", dir.join("astray")).unwrap();
        assert_eq!(check(&dir.join("astray")).unwrap_err().kind(), io::ErrorKind::NotFound);
        symlink("loop", dir.join("loop")).unwrap();
        check(&dir.join("loop")).unwrap_err();
    }

    #[test]
    fn a_file_is_replaced_also_behind_a_link() {
        let dir = TempDir::new().unwrap();
        symlink(dir.join("file"), dir.join("link")).unwrap();
        for (name, bytes) in [("file", b"a"), ("link", b"b")] {
            file(&dir.join(name), bytes).unwrap();
            assert_eq!(fs::read(dir.join("file")).unwrap(), bytes);
        }
        assert!(fs::symlink_metadata(dir.join("link")).unwrap().is_symlink());
        assert_eq!(fs::metadata(dir.join("file")).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left behind");
    }
}
