//! Writes a file that a reader finds complete: it takes the name of the one before.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// Replaces the file at `path`, or the one that a symbolic link there leads to, by one with `bytes` that everyone may read.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`] for a device, a FIFO and all else that is no file: a name of those is not to be taken away. The
/// kernel's.
pub fn file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let path = destination(path)?;
    let directory = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
    let mode = fs::Permissions::from_mode(0o644);
    let mut file = tempfile::Builder::new().permissions(mode.clone()).tempfile_in(directory)?;
    // Whatever the umask is.
    file.as_file().set_permissions(mode)?;
    file.write_all(bytes)?;
    file.persist(path)?;
    Ok(())
}

/// Where the file is to be.
fn destination(path: &Path) -> io::Result<PathBuf> {
    match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "it exists and is not a file; expected one, or a new name"))
        }
        Ok(_) => fs::canonicalize(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(path.to_owned()),
        Err(error) => Err(error),
    }
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
            let error = file(&path, b"new").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{}: {error}", path.display());
        }
        assert!(fs::symlink_metadata(dir.join("link")).unwrap().is_symlink());
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
