//! Writes what a RAM block holds into a file of its own, with holes for zeros.
//!
//! Guest memory is its owner's: no other user may read the file. It has its name when it is complete, and nothing is left of one
//! that fails or is interrupted.

use std::{
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use multifd::error::Error;

use crate::{image::Stop, replace, table};

/// Writes everything that `from` has to the new file `to`, and says so in a sentence.
///
/// # Errors
/// The file and what is wrong: it exists, or the kernel's reason; also once `stop` is cancelled.
pub fn extract(from: &mut dyn Read, to: &Path, stop: &Stop) -> Result<String, String> {
    let total = write(from, to, stop).map_err(|error| format!("{}: {error}", to.display()))?;
    Ok(format!("\n  {} written to {}\n", table::bytes(total), to.display()))
}

fn write(from: &mut dyn Read, to: &Path, stop: &Stop) -> io::Result<u64> {
    let exists = || io::Error::new(io::ErrorKind::AlreadyExists, "it exists, and is not replaced; expected a new name");
    if to.symlink_metadata().is_ok() {
        return Err(exists());
    }
    let mut extracted = replace::temporary_in(replace::directory_of(to), PermissionsExt::from_mode(0o600))?;
    let file = extracted.as_file_mut();
    let mut buf = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        if stop.is_cancelled() {
            return Err(io::Error::other(Error::Cancelled));
        }
        let n = from.read(&mut buf)?;
        if n == 0 {
            break;
        }
        for part in buf[..n].chunks(PAGE_SIZE) {
            if part.iter().all(|byte| *byte == 0) {
                file.seek(SeekFrom::Current(part.len() as i64))?;
            } else {
                file.write_all(part)?;
            }
        }
        total += n as u64;
    }
    file.set_len(total)?;
    match extracted.persist_noclobber(to) {
        Ok(_) => Ok(total),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Err(exists()),
        Err(error) => Err(error.error),
    }
}

/// Zeros are looked for in pieces of that.
const PAGE_SIZE: usize = 4096;
