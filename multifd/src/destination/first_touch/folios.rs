//! Whether the kernel gives fresh memory in pages of several sizes (multi-size huge pages), as the host is set.
//!
//! One page fault then brings 16 to 128 pages, which costs a fraction of what `UFFDIO_COPY` does. Whether it does depends on the
//! host, and not on what it is set to alone, so the setting only says whether trying is worthwhile.

use std::{fs, ops::RangeInclusive, path::Path};

/// Whose memory it is, to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    /// Private memory without a file.
    Private,
    /// A memfd, or a file in a tmpfs.
    Shared,
}

/// Pages of several sizes that a page fault may bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Folios {
    /// The kernel gives them only where it was asked to, by MADV_HUGEPAGE.
    pub(super) advised: bool,
    /// The largest that come unasked, in bytes: as much may be taken by one small page.
    pub(super) largest_unasked: usize,
}

/// What the host gives.
///
/// # Errors
/// Why it gives none, and what would have to be set.
pub(super) fn of_host(memory: Memory) -> Result<Folios, String> {
    below(Path::new("/sys/kernel/mm/transparent_hugepage"), memory)
}

fn below(root: &Path, memory: Memory) -> Result<Folios, String> {
    let name = match memory {
        Memory::Private => "enabled",
        Memory::Shared => "shmem_enabled",
    };
    let global = read(&root.join(name));
    let (mut found, mut largest_unasked, mut any) = (None, 0, false);
    // Powers of two, from two pages to the largest huge page: a list of the directory would take system calls of its own.
    for kib in (3..=20).map(|exponent| 1 << exponent) {
        let size = kib << 10;
        let Some(own) = read(&root.join(format!("hugepages-{kib}kB")).join(name)) else { continue };
        any = true;
        let setting = if own == Setting::Inherit { global } else { Some(own) };
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
        Some(unasked) => Ok(Folios { advised: !unasked, largest_unasked }),
        None if any => Err(format!(
            "the host gives no huge pages of 64 to 512 KiB; it does with \"{}\" in {}/hugepages-64kB/{name}",
            if memory == Memory::Private { "madvise" } else { "advise" },
            root.display()
        )),
        None => Err("the kernel has no multi-size huge pages (Linux 6.8 has them, 6.14 for memory files)".to_owned()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Setting {
    Always,
    Advised,
    Inherit,
    Never,
}

/// The choice in square brackets.
fn read(path: &Path) -> Option<Setting> {
    let text = fs::read_to_string(path).ok()?;
    Some(match text.split_once('[')?.1.split_once(']')?.0 {
        "always" | "within_size" | "force" => Setting::Always,
        "madvise" | "advise" => Setting::Advised,
        "inherit" => Setting::Inherit,
        _ => Setting::Never,
    })
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
            let path = dir.join(path);
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
        let folios = Folios { advised: true, largest_unasked: 16 << 10 };
        assert_eq!(below(dir.path(), Memory::Private), Ok(folios));
        let why = below(dir.path(), Memory::Shared).unwrap_err();
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
        assert_eq!(below(dir.path(), Memory::Private), Ok(Folios { advised: false, largest_unasked: 2 << 20 }));
    }

    #[test]
    fn a_kernel_without_them_is_no_host_that_is_set_wrongly() {
        let dir = host(&[("enabled", "always [madvise] never")]);
        let why = below(dir.path(), Memory::Private).unwrap_err();
        assert!(why.starts_with("the kernel has no multi-size huge pages"), "{why}");
        assert_eq!(below(&dir.join("no"), Memory::Shared).unwrap_err(), why);
    }
}
