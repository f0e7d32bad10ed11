//! Whether the kernel gives fresh memory in pages of several sizes (multi-size huge pages), as the host is set.
//!
//! One page fault then brings 16 to 128 pages, which costs a fraction of what `UFFDIO_COPY` does. Whether it does depends on the
//! host, and not on what it is set to alone, so the setting only says whether trying is worthwhile.

use std::{
    fs, io,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

/// What memory is made of, to the settings of huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FreshKind {
    /// Private memory without a file.
    Private,
    /// A memfd, or a file in a tmpfs.
    Shared,
}

/// Pages of several sizes that a page fault may bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LargePages {
    /// The kernel gives them only where it was asked to, by MADV_HUGEPAGE.
    pub advised: bool,
    /// The largest that come unasked, in bytes: as much may be taken by one small page.
    pub largest_unasked: usize,
}

/// Why the host gives none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoLargePages {
    /// The kernel has them, and they are switched off.
    #[error("the host gives no huge pages of 64 to 512 KiB; it does with \"{word}\" in {}", file.display())]
    Off {
        /// What to write.
        word: &'static str,
        /// Where to.
        file: PathBuf,
    },
    /// The kernel is older, or was built without.
    #[error("the kernel has no multi-size huge pages (Linux 6.8 has them, 6.14 for memory files)")]
    Missing,
    /// A setting cannot be read.
    #[error("whether the host gives huge pages of 64 to 512 KiB is not known: {}: {reason}", file.display())]
    NotKnown {
        /// Which one.
        file: PathBuf,
        /// Why.
        reason: String,
    },
}

impl LargePages {
    /// What this host gives to memory of a `kind`.
    ///
    /// # Errors
    /// Why it gives none, and what would have to be set.
    pub fn of_host(kind: FreshKind) -> Result<LargePages, NoLargePages> {
        LargePages::below(Path::new("/"), kind)
    }

    /// The same, by the settings of a host whose files are below `root`.
    ///
    /// # Errors
    /// As [`of_host`](Self::of_host).
    pub fn below(root: &Path, kind: FreshKind) -> Result<LargePages, NoLargePages> {
        let directory = root.join("sys/kernel/mm/transparent_hugepage");
        let (name, word) = match kind {
            FreshKind::Private => ("enabled", "madvise"),
            FreshKind::Shared => ("shmem_enabled", "advise"),
        };
        let (mut found, mut largest_unasked, mut any) = (None, 0, false);
        // Powers of two, from two pages to the largest huge page: a list of the directory would take system calls of its own.
        for kib in (3..=20).map(|exponent| 1 << exponent) {
            let size = kib << 10;
            let Some(own) = read(&directory.join(format!("hugepages-{kib}kB")).join(name))? else { continue };
            any = true;
            let setting = if own == Setting::Inherit { read(&directory.join(name))? } else { Some(own) };
            match setting {
                Some(Setting::Always) => largest_unasked = largest_unasked.max(size),
                Some(Setting::Advised) => {}
                _ => continue,
            }
            if SIZES.contains(&size) {
                let unasked = setting == Some(Setting::Always);
                found = Some(found.unwrap_or(false) || unasked);
            }
        }
        match found {
            Some(unasked) => Ok(LargePages { advised: !unasked, largest_unasked }),
            None if any => {
                let file = directory.join("hugepages-64kB").join(name);
                Err(NoLargePages::Off { word, file })
            }
            None => Err(NoLargePages::Missing),
        }
    }
}

/// Whether the host whose files are below `root` gives private memory pages of 2 MiB where it was asked to, by MADV_HUGEPAGE.
/// What cannot be read gives none.
pub(crate) fn huge_on_advice(root: &Path) -> bool {
    let directory = root.join("sys/kernel/mm/transparent_hugepage");
    let size = fs::read_to_string(directory.join("hpage_pmd_size")).unwrap_or_default();
    // Other processors have others, up to 512 MiB.
    if size.trim() != "2097152" {
        return false;
    }
    let setting = |path: &str| read(&directory.join(path)).ok().flatten();
    match setting("hugepages-2048kB/enabled") {
        // Kernels without pages of other sizes have one setting for all.
        None | Some(Setting::Inherit) => setting("enabled") == Some(Setting::Advised),
        own => own == Some(Setting::Advised),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Setting {
    Always,
    Advised,
    Inherit,
    Never,
}

/// The choice in square brackets; `None` where there is no such file.
fn read(path: &Path) -> Result<Option<Setting>, NoLargePages> {
    let not_known = |reason: String| NoLargePages::NotKnown { file: path.to_owned(), reason };
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(not_known(error.to_string())),
    };
    let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(word, _)| word);
    match chosen {
        Some("always" | "within_size" | "force") => Ok(Some(Setting::Always)),
        Some("madvise" | "advise") => Ok(Some(Setting::Advised)),
        Some("inherit") => Ok(Some(Setting::Inherit)),
        Some("never" | "deny") => Ok(Some(Setting::Never)),
        _ => Err(not_known(format!("{:?} chooses nothing that is known", text.trim_end()))),
    }
}

/// Sizes that pay: smaller ones save few faults, larger ones meet memory now and then that a virtual host has to fetch first.
const SIZES: RangeInclusive<usize> = 64 << 10..=512 << 10;

#[cfg(test)]
mod tests {
    use test_support::TempDir;

    use super::*;

    fn host(settings: &[(&str, &str)]) -> TempDir {
        let dir = TempDir::new().unwrap();
        for (path, text) in settings {
            let path = dir.join("sys/kernel/mm/transparent_hugepage").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
        dir
    }

    #[test]
    fn what_the_host_is_set_to_is_found() {
        let dir = host(&[
            ("enabled", "always [madvise] never"),
            ("shmem_enabled", "always within_size advise [never] deny force"),
            ("hugepages-16kB/enabled", "[always] inherit madvise never"),
            ("hugepages-64kB/enabled", "always inherit [madvise] never"),
            ("hugepages-64kB/shmem_enabled", "always [inherit] within_size advise never"),
            ("hugepages-2048kB/enabled", "always [inherit] madvise never"),
            ("hugepages-8kB/shmem_enabled", "[always] inherit within_size advise never"),
        ]);
        let large = LargePages { advised: true, largest_unasked: 16 << 10 };
        assert_eq!(LargePages::below(dir.path(), FreshKind::Private), Ok(large));
        let why = LargePages::below(dir.path(), FreshKind::Shared).unwrap_err().to_string();
        assert!(why.ends_with("/hugepages-64kB/shmem_enabled") && why.contains("\"advise\""), "{why}");
    }

    #[test]
    fn pages_that_come_unasked_need_no_advice_and_are_known_by_their_size() {
        let dir = host(&[
            ("enabled", "[always] madvise never"),
            ("hugepages-128kB/enabled", "always inherit [madvise] never"),
            ("hugepages-256kB/enabled", "always [inherit] madvise never"),
            ("hugepages-2048kB/enabled", "always [inherit] madvise never"),
        ]);
        assert_eq!(
            LargePages::below(dir.path(), FreshKind::Private),
            Ok(LargePages { advised: false, largest_unasked: 2 << 20 })
        );
    }

    #[test]
    fn a_kernel_without_them_is_no_host_that_is_set_wrongly() {
        let dir = host(&[("enabled", "always [madvise] never")]);
        let why = LargePages::below(dir.path(), FreshKind::Private).unwrap_err();
        assert_eq!(why, NoLargePages::Missing);
        assert_eq!(LargePages::below(&dir.join("no"), FreshKind::Shared).unwrap_err(), why);
    }

    #[test]
    fn huge_pages_are_given_on_advice_where_the_host_says_so_and_they_are_2_mib() {
        let size = ("hpage_pmd_size", "2097152");
        let (all, own) = ("enabled", "hugepages-2048kB/enabled");
        for (settings, expected) in [
            (&[size, (all, "always [madvise] never")][..], true),
            (&[size, (all, "always [madvise] never"), (own, "always [inherit] madvise never")], true),
            (&[size, (all, "always madvise [never]"), (own, "always inherit [madvise] never")], true),
            (&[size, (all, "always [madvise] never"), (own, "always inherit madvise [never]")], false),
            (&[size, (all, "always madvise [never]")], false),
            (&[size, (all, "[always] madvise never")], false),
            (&[("hpage_pmd_size", "536870912"), (all, "always [madvise] never")], false),
            (&[(all, "always [madvise] never")], false),
            (&[size], false),
        ] {
            assert_eq!(huge_on_advice(host(settings).path()), expected, "{settings:?}");
        }
    }

    #[test]
    fn a_setting_that_cannot_be_read_is_not_known() {
        for text in ["always madvise never", "[sometimes] never", ""] {
            let dir = host(&[("enabled", "[always] madvise never"), ("hugepages-64kB/enabled", text)]);
            let why = LargePages::below(dir.path(), FreshKind::Private).unwrap_err();
            assert!(matches!(why, NoLargePages::NotKnown { .. }), "{text:?}: {why}");
        }
        let dir = host(&[("enabled", "perhaps"), ("hugepages-64kB/enabled", "always [inherit] madvise never")]);
        let why = LargePages::below(dir.path(), FreshKind::Private).unwrap_err();
        assert!(matches!(why, NoLargePages::NotKnown { .. }), "{why}");
    }
}
