//! Real QEMUs on both ends of `multifd receive` and `multifd send`, with a live guest that proves its memory.
//!
//! `matrix` moves the guest through a checkpoint in combinations that cover each pair of values; `files` lets QEMU read our
//! checkpoints and us read QEMU's; `plain` has streams without a way back, in files and pipes; `streams` has sources with
//! other capabilities; `switched` has sources that switch to postcopy, and go on when the network breaks (`cutter`); `snapshot` has background snapshots; `elsewhere` has memory that stays in a shared file; `failures` breaks
//! things in the middle; `impatience` has a QEMU that says nothing; `hello` looks at bytes that QEMU does not use;
//! `restore_time` measures how soon guests run; `recovery` has VMs that lack memory when a connection breaks or a sender dies; `serve` starts many VMs from one checkpoint; `qmp_verbs` drives a QEMU by its monitor, also one that fails (`monitor_proxy`); `libvirt` has images that libvirt saves
//! and restores; `tls` has encrypted connections.

mod cutter;
mod elsewhere;
mod failures;
mod files;
mod harness;
mod hello;
mod impatience;
mod libvirt;
mod main_alone;
mod matrix;
mod monitor_proxy;
mod paused;
mod plain;
mod postcopy;
mod qmp_verbs;
mod recovery;
mod restore_time;
mod serve;
mod snapshot;
mod streams;
mod switched;
mod tls;
