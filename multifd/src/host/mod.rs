//! What the host permits and how it is set, as the engine finds it: for programs that say so before a migration does.

pub(crate) mod large_pages;

pub use self::large_pages::{FreshKind, LargePages, NoLargePages};
use crate::{
    dirty::uffd_wp::{self, UffdUnavailable},
    sys::pagemap::Pagemap,
};

/// Finds out whether this process may use userfaultfd with asynchronous write protection: the
/// [`UffdWpLog`](crate::dirty::uffd_wp::UffdWpLog) needs it, and so does
/// [`FirstTouch::Copy`](crate::destination::FirstTouch::Copy).
///
/// # Errors
/// What is missing.
pub fn userfaultfd() -> Result<(), UffdUnavailable> {
    uffd_wp::open().map(drop)
}

/// Finds out whether the kernel tells this process which pages were written (PAGEMAP_SCAN), which the
/// [`UffdWpLog`](crate::dirty::uffd_wp::UffdWpLog) reads.
///
/// # Errors
/// What is missing.
pub fn pagemap_scan() -> Result<(), UffdUnavailable> {
    scanner().map(drop)
}

/// The same, with what was opened.
pub(crate) fn scanner() -> Result<Pagemap, UffdUnavailable> {
    let mut pagemap = Pagemap::open().map_err(|source| UffdUnavailable::NoPagemap { source })?;
    pagemap.can_scan().map_err(|source| UffdUnavailable::NoPagemapScan { source })?;
    Ok(pagemap)
}

/// What TCP connections within one host ask for in each direction, in bytes: `net.core.rmem_max` and `net.core.wmem_max` bound what
/// they get.
pub const LOCAL_SOCKET_BUFFER: usize = 256 << 10;
