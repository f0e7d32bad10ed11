//! Huge pages of the host, for as long as a test runs.

use std::fs;

/// Huge pages of 2 MiB that were added to the host's, and are taken away again when this is dropped.
pub struct HugePages {
    pages: u64,
}

impl HugePages {
    /// Adds `pages`. Nothing where this process may not, or where the host has no room.
    pub fn reserve(pages: u64) -> Option<HugePages> {
        let had = count(TOTAL)?;
        fs::write(TOTAL, (had + pages).to_string()).ok()?;
        let added = HugePages { pages };
        // Other tests may use some of what there was.
        (count(TOTAL)? >= had + pages && count(FREE)? >= pages).then_some(added)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(now) = count(TOTAL) {
            let _ = fs::write(TOTAL, now.saturating_sub(self.pages).to_string());
        }
    }
}

fn count(file: &str) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

const TOTAL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
