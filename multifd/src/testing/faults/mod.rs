//! What happens when the peer is hostile, a connection breaks or the VMM fails: each rule and each operation in turn.

mod script;

mod cancelled;
mod careless;
mod handshakes;
mod hostile_channels;
mod hostile_main;
mod hostile_state;
mod injected;
mod late;
mod lost_channel;
mod panics;
mod pause;
mod postcopy;
mod postcopy_recovery;
mod prepare;
mod random;
mod refusals;
mod reused_memory;
mod set_up;
mod shared_memory;
mod silence;
mod source_gone;
mod strangers;
mod threads;
mod waiting_source;
