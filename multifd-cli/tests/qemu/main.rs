//! Real QEMUs on both ends of `multifd receive` and `multifd send`, with a live guest that proves its memory.
//!
//! `matrix` moves the guest through a checkpoint in combinations that cover each pair of values; `files` lets QEMU read our
//! checkpoints and us read QEMU's; `plain` has streams without a way back, in files and pipes; `streams` has sources with
//! other capabilities; `snapshot` has background snapshots; `failures` breaks things in the middle; `hello` looks at
//! bytes that QEMU does not use.

mod failures;
mod files;
mod harness;
mod hello;
mod matrix;
mod plain;
mod snapshot;
mod streams;
