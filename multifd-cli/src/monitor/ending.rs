//! How the migration of a QEMU is ended without harm to the QEMU.
//!
//! A QEMU 7.2 or 10.0 that is cancelled while its migration thread waits for a channel may keep that thread waiting forever. No
//! command ends it, and another `migrate` is refused or ends the QEMU. So a migration is brought to rest before it is cancelled,
//! and what QEMU has not cleared up is looked for before the next one. `docs/qemu.md` has the experiments.

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
    /// some tenths of a second; a QEMU that does not rest is given up after [`REST_LIMIT`], and is cancelled where it is.
    ///
    /// [`REST_PARAMETERS`] stay changed.
    pub fn bring_to_rest(&mut self) {
        let deadline = Instant::now() + REST_LIMIT;
        if self.wait_first_page(deadline) && self.slow_down() {
            self.wait_between_packets(deadline);
        }
    }

    /// Waits until the set-up is over, in which the thread waits for one channel after the other. Returns whether there is a
    /// migration that goes on.
    fn wait_first_page(&mut self, deadline: Instant) -> bool {
        while Instant::now() < deadline {
            let Ok((status, answer)) = self.migration() else { return false };
            let sent = |pages: &str| answer["ram"][pages].as_u64().unwrap_or_default();
            match status {
                Status::Active if sent("normal") + sent("duplicate") > 0 => return true,
                Status::Active | Status::Setup => thread::sleep(POLL_INTERVAL),
                _ => return false,
            }
        }
        false
    }

    fn slow_down(&mut self) -> bool {
        // The downtime, too, or it might take what is left for little enough to switch over.
        let rest = json!({ "max-bandwidth": REST_RATE, "downtime-limit": 0 });
        self.execute("migrate-set-parameters", rest).is_ok()
    }

    fn wait_between_packets(&mut self, deadline: Instant) {
        let begun = Instant::now();
        let mut sent = Value::Null;
        let mut changed = Instant::now();
        while Instant::now() < deadline {
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
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Waits until QEMU has cleared up its last migration, at most for `limit`.
    ///
    /// # Errors
    /// It has not; or those of [`Monitor::execute`].
    pub fn wait_cleared_up(&mut self, limit: Duration) -> Result<(), Refusal> {
        if self.clears_up(limit)? {
            return Ok(());
        }
        Err(Refusal::new(
            Exit::Failed,
            "QEMU's last migration is over, but its thread does not end, as may happen to a QEMU 7.2 or 10.0 whose connection \
             breaks. The guest runs on. Another migration may end this QEMU: shut the guest down and start it again when that suits",
        ))
    }

    /// Whether QEMU clears up its last migration within `limit`.
    ///
    /// # Errors
    /// Those of [`Monitor::execute`].
    pub fn clears_up(&mut self, limit: Duration) -> Result<bool, Refusal> {
        let deadline = Instant::now() + limit;
        while self.holds_migration()? {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            thread::sleep(POLL_INTERVAL);
        }
        Ok(true)
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
const REST_LIMIT: Duration = Duration::from_secs(5);
