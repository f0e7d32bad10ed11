//! Real QEMUs on both ends of `multifd receive` and `multifd send`, with a live guest that proves its memory.
//!
//! `matrix` moves the guest through a checkpoint in combinations that cover each pair of values.

#[allow(dead_code, reason = "the next tests use the rest")]
mod harness;
mod matrix;
