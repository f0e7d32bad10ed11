//! The settings of a host, as files below a root.

use std::{
    fs,
    path::{Path, PathBuf},
    str::FromStr,
};

use super::Check;

/// Where the files are.
pub struct Settings<'a> {
    root: &'a Path,
}

/// A setting that cannot be read, or says something unexpected.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", file.display())]
pub struct NotRead {
    file: PathBuf,
    reason: String,
}

impl NotRead {
    /// The check of that `name`, which needs it.
    pub fn check(&self, name: &'static str) -> Check {
        Check::not_known(name, self.to_string(), READABLE)
    }
}

impl Settings<'_> {
    /// The files below `root`.
    pub fn below(root: &Path) -> Settings<'_> {
        Settings { root }
    }

    /// Where they are.
    pub fn root(&self) -> &Path {
        self.root
    }

    /// The numbers in a file, as many as are asked for and nothing else.
    ///
    /// # Errors
    /// It cannot be read, or holds something else.
    pub fn numbers<const COUNT: usize>(&self, path: &str) -> Result<[u64; COUNT], NotRead> {
        let file = self.root.join(path);
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) => return Err(NotRead { file, reason: error.to_string() }),
        };
        // FromStr takes a sign, which the kernel does not write.
        let number = |word: &str| word.bytes().all(|byte| byte.is_ascii_digit()).then(|| u64::from_str(word).ok())?;
        let numbers: Option<Vec<u64>> = text.split_ascii_whitespace().map(number).collect();
        let Some(Ok(numbers)) = numbers.map(<[u64; COUNT]>::try_from) else {
            let (expected, s) = if COUNT == 1 { ("a number".to_owned(), "") } else { (COUNT.to_string(), " numbers") };
            let reason = format!("{:?} is not {expected}{s}", text.chars().take(SHOWN).collect::<String>().trim_end());
            return Err(NotRead { file, reason });
        };
        Ok(numbers)
    }

    /// The number in a file.
    ///
    /// # Errors
    /// As for [`numbers`](Self::numbers).
    pub fn number(&self, path: &str) -> Result<u64, NotRead> {
        self.numbers::<1>(path).map(|[number]| number)
    }
}

/// What helps where a setting cannot be read.
pub const READABLE: &str = "/proc and /sys have to be mounted and readable here";

/// How much of a file that is not understood is shown, in characters.
const SHOWN: usize = 60;
