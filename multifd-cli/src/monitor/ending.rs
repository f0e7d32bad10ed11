//! How the migration of a QEMU is ended without harm to the QEMU.
//!
//! A QEMU 7.2 or 10.0 that is cancelled while its migration thread waits for a channel may keep that thread waiting for good:
//! the state says `failed`, or stays `cancelling`, and the guest runs on. No command ends the thread, and another `migrate` is
//! refused or ends the QEMU. So a migration is brought to rest before it is cancelled, and what QEMU has not cleared up is
//! looked for before the next one. All of it was found by experiment; `docs/qemu.md` has the figures.

use std::{
    thread,
    time::{Duration, Instant},
};

use multifd_qmp::Status;
use serde_json::{Value, json};

use super::{Monitor, POLL_INTERVAL, Refusal};
use crate::exit::Exit;

impl Monitor {
    /// Has the migration rest: its thread sleeps until it may send again, and its channels have sent what they had. It takes
    /// some tenths of a second, and [`REST_LIMIT`] at most.
    ///
    /// It has to have sent all memory once. [`REST_PARAMETERS`] stay changed. A QEMU that refuses or does not rest is cancelled where it is.
    pub fn bring_to_rest(&mut self) {
        let begun = Instant::now();
        // In its first round a migration is better cancelled at once: one that was slowed down there stayed in `cancelling`.
        let goes_round = |answer: &Value| answer["ram"]["dirty-sync-count"].as_u64() >= Some(2);
        if !matches!(self.migration(), Ok((Status::Active, answer)) if goes_round(&answer)) {
            return;
        }
        // The downtime, or it might take what is left for little enough to switch over.
        let rest = json!({ "max-bandwidth": REST_RATE, "downtime-limit": 0 });
        if self.execute("migrate-set-parameters", rest).is_err() {
            return;
        }
        let mut sent = Value::Null;
        let mut changed = Instant::now();
        while begun.elapsed() < REST_LIMIT {
            let Ok((Status::Active, answer)) = self.migration() else { return };
            if answer["ram"]["transferred"] != sent {
                sent = answer["ram"]["transferred"].clone();
                changed = Instant::now();
            }
            // A 7.2 still sends a packet in each window, so it rests soon after one, and not for long.
            let rested = changed.elapsed();
            let knows_its_rate = begun.elapsed() >= 2 * RATE_WINDOW;
            if knows_its_rate && rested >= A_PACKET && (rested < 2 * A_PACKET || rested > 2 * RATE_WINDOW) {
                return;
            }
            thread::sleep(A_PACKET / 6);
        }
    }

    /// Waits until QEMU has cleared up its last migration, at most for `limit`.
    ///
    /// # Errors
    /// It has not; or those of [`Monitor::execute`].
    pub fn wait_cleared_up(&mut self, limit: Duration) -> Result<(), Refusal> {
        let deadline = Instant::now() + limit;
        while self.holds_migration()? {
            if Instant::now() >= deadline {
                return Err(Refusal::new(
                    Exit::Failed,
                    "QEMU's last migration is over, but its thread does not end (QEMU 7.2 and 10.0 may do so where a connection is \
                     cut). The guest runs on. Do not migrate or checkpoint this QEMU again, it may end; restart the guest in \
                     another QEMU when that suits",
                ));
            }
            thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// Whether QEMU lists a migration among what can be yanked, which it does from the start of one until that is cleared up.
    fn holds_migration(&mut self) -> Result<bool, Refusal> {
        let answer = self.execute_if_known("query-yank", json!({}))?.unwrap_or_default();
        Ok(answer.as_array().into_iter().flatten().any(|instance| instance["type"] == "migration"))
    }
}

/// What [`Monitor::bring_to_rest`] changes.
pub const REST_PARAMETERS: &[&str] = &["max-bandwidth", "downtime-limit"];
/// Bytes per second of a migration that rests. Zero would be no limit.
const REST_RATE: u64 = 64 << 10;
/// QEMU counts what it has sent in windows of this length.
const RATE_WINDOW: Duration = Duration::from_millis(100);
/// In which a packet has left for good.
const A_PACKET: Duration = Duration::from_millis(30);
/// After that a migration counts as one that does not rest.
const REST_LIMIT: Duration = Duration::from_secs(2);
