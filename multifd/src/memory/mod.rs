//! Guest memory: its blocks, how its pages are numbered, sets of pages.

mod backing;
pub mod dirty_bitmap;
pub mod layout;
pub mod ram;
pub(crate) mod shared;
