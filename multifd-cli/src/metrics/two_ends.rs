//! The metrics of two processes as one: each writes a file, and what is in both is told together.
//!
//! What the first has said of a sample holds for both: they count the same migration. The role tells all others apart.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
};

use crate::progress::lock;

/// The metrics of two processes.
pub struct TwoEnds {
    paths: [PathBuf; 2],
    /// What they said last; it stays when the files are gone.
    last: Mutex<[String; 2]>,
}

impl TwoEnds {
    /// Those of two processes that write into `dir`.
    pub fn new(dir: &Path) -> TwoEnds {
        let paths = ["first.prom", "second.prom"].map(|name| dir.join(name));
        TwoEnds { paths, last: Mutex::default() }
    }

    /// The option that has a process write its part: 0 is the one whose word holds for both.
    pub fn option(&self, end: usize) -> String {
        format!("--metrics=file:{}", self.paths[end].display())
    }

    /// Both, as they are now.
    pub fn render(&self) -> String {
        let mut last = lock(&self.last);
        for (text, path) in last.iter_mut().zip(&self.paths) {
            if let Ok(now) = fs::read_to_string(path) {
                *text = now;
            }
        }
        merged(&last[0], &last[1])
    }
}

/// The lines of one family: two that describe it, then its samples.
struct Family<'a> {
    head: Vec<&'a str>,
    samples: Vec<&'a str>,
}

/// The families of both, each with the samples of both.
fn merged(first: &str, second: &str) -> String {
    let mut all = families(first);
    for other in families(second) {
        match all.iter_mut().find(|family| family.head == other.head) {
            Some(family) => {
                let new = |sample: &&str| !family.samples.iter().any(|known| key(known) == key(sample));
                let new: Vec<&str> = other.samples.into_iter().filter(new).collect();
                family.samples.extend(new);
            }
            None => all.push(other),
        }
    }
    all.iter().flat_map(|family| family.head.iter().chain(&family.samples)).map(|line| format!("{line}\n")).collect()
}

fn families(text: &str) -> Vec<Family<'_>> {
    let mut families: Vec<Family<'_>> = Vec::new();
    for line in text.lines() {
        match families.last_mut() {
            Some(family) if !line.starts_with('#') => family.samples.push(line),
            Some(family) if family.samples.is_empty() => family.head.push(line),
            _ => families.push(Family { head: vec![line], samples: Vec::new() }),
        }
    }
    families
}

/// Name and labels of a sample.
fn key(sample: &str) -> &str {
    sample.rsplit_once(' ').map_or(sample, |(key, _)| key)
}

#[cfg(test)]
mod tests {
    use test_support::TempDir;

    use super::*;

    #[test]
    fn each_family_comes_once_and_has_the_samples_of_both() {
        let first = "# HELP a x\n# TYPE a counter\na{s=\"c\"} 1\n# HELP b y\n# TYPE b gauge\nb{role=\"s\"} 2\n";
        let second =
            "# HELP a x\n# TYPE a counter\na{s=\"c\"} 7\n# HELP b y\n# TYPE b gauge\nb{role=\"d\"} 3\n# HELP c z\n";
        let both = merged(first, second);
        assert_eq!(
            both,
            "# HELP a x\n# TYPE a counter\na{s=\"c\"} 1\n# HELP b y\n# TYPE b gauge\nb{role=\"s\"} 2\nb{role=\"d\"} 3\n# HELP c z\n"
        );
        assert_eq!(merged("", first), first);
        assert_eq!(merged(first, ""), first);
    }

    #[test]
    fn what_was_said_last_stays() {
        let dir = TempDir::new().unwrap();
        let ends = TwoEnds::new(dir.path());
        assert_eq!(ends.render(), "");
        let path = dir.join("second.prom");
        assert_eq!(ends.option(1), format!("--metrics=file:{}", path.display()));
        fs::write(&path, "# HELP a x\n# TYPE a gauge\na{} 1\n").unwrap();
        let text = ends.render();
        assert!(text.ends_with("a{} 1\n"), "{text}");
        fs::remove_file(path).unwrap();
        assert_eq!(ends.render(), text);
    }
}
