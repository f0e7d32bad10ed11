//! Files that are written over when a migration is over, or while it goes on, and must be none of those that it is about.
//!
//! A report that took the name of the checkpoint was the end of a VM that existed nowhere else by then.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{Incoming, ObserveArgs, Origin, Verb, postcopy::PostcopyArgs};
use crate::{metrics::Target, replace::directory_of, verbs};

/// A file, and what names it.
type Named = (&'static str, PathBuf);

/// Checks that no file which is written over is one of the others.
///
/// # Errors
/// Which two are the same, for clap.
pub(super) fn check(verb: &Verb) -> Result<(), String> {
    let (written, others) = files(verb);
    for (index, (option, path)) in written.iter().enumerate() {
        let at = place(path);
        if let Some((other, _)) = written[..index].iter().chain(&others).find(|(_, other)| place(other) == at) {
            return Err(format!(
                "the option '{option}' writes over {path:?}, which is the file of '{other}' as well; expected a file of its own"
            ));
        }
    }
    Ok(())
}

/// What `verb` writes over, and what other files it has.
fn files(verb: &Verb) -> (Vec<Named>, Vec<Named>) {
    let mut written = Vec::new();
    let mut others: Vec<Named> = Vec::new();
    let observe = match verb {
        Verb::Serve(args) => Some(&args.observe),
        verb => verb.observe(),
    };
    if let Some(ObserveArgs { metrics, report }) = observe {
        written.extend(report.clone().map(|path| ("--report <FILE>", path)));
        if let Some(Target::File(path)) = metrics {
            written.push(("--metrics <TARGET>", path.clone()));
        }
    }
    match verb {
        Verb::Receive(args) => {
            others.push(("--output <FILE>", args.file.clone()));
            if let Incoming::At(Origin::File { path, .. }) = &args.from {
                others.push(("<URI>", path.clone()));
            }
        }
        Verb::Checkpoint(args) => others.push(("--output <FILE>", args.file.clone())),
        Verb::Send(args) => {
            others.push(("<FILE>", args.file.clone()));
            of_postcopy(&args.postcopy, &args.file, &mut written, &mut others);
        }
        Verb::Restore(args) => {
            others.push(("<FILE>", args.file.clone()));
            of_postcopy(&args.postcopy, &args.file, &mut written, &mut others);
        }
        Verb::Serve(args) => others.push(("<FILE>", args.file.clone())),
        _ => {}
    }
    (written, others)
}

/// Adds the files of a postcopy of `file`.
fn of_postcopy(postcopy: &PostcopyArgs, file: &Path, written: &mut Vec<Named>, others: &mut Vec<Named>) {
    written.extend(postcopy.record_faults.clone().map(|path| ("--record-faults <LIST>", path)));
    if postcopy.is_asked_for() {
        let note = postcopy.state.clone().unwrap_or_else(|| verbs::note_of(file));
        others.push(("--state <PATH>", note));
    }
}

/// Where a file at `path` is or would be, by whatever name: two paths of one place are equal.
fn place(path: &Path) -> PathBuf {
    let mut path = path.to_owned();
    // A link may lead to what is not there yet.
    for _ in 0..MOST_LINKS {
        let Ok(target) = fs::read_link(&path) else { break };
        path = directory_of(&path).join(target);
    }
    let Some(name) = path.file_name() else { return path };
    fs::canonicalize(directory_of(&path)).map_or_else(|_| path.clone(), |directory| directory.join(name))
}

/// As the kernel's.
const MOST_LINKS: usize = 40;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use test_support::TempDir;

    use super::*;

    #[test]
    fn a_place_is_one_by_all_of_its_names() {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.join("sub")).unwrap();
        symlink("new", dir.join("link")).unwrap();
        symlink("../link", dir.join("sub/far")).unwrap();
        symlink("loop", dir.join("loop")).unwrap();
        let new = place(&dir.join("new"));
        for name in ["link", "sub/far", "sub/../new", "./new"] {
            assert_eq!(place(&dir.join(name)), new, "{name}");
        }
        for name in ["other", "sub/new", "loop", "none/new"] {
            assert_ne!(place(&dir.join(name)), new, "{name}");
        }
    }
}
