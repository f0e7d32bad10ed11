//! Device state that is sent while the guest runs: [`SourceVm::save_live`].
//!
//! It is asked for once a round, after the last page of the round and before the log is drained. What the VM says is still to come counts
//! in the decision like dirty pages, so a device with much to send keeps the rounds going, within their limits. The round goes on when the
//! destination has loaded what was sent.

use std::time::Duration;

use multifd_proto::{extension::Extension, packet};

use super::{
    Run,
    steering::{EMPTY_SECTION, rest_between_rounds},
};
use crate::{
    error::Error,
    sections::{LIVE_ROOM, Terms},
    vm::SourceVm,
};

/// What the VM has sent of it, and what it says is left.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LiveState {
    /// Calls so far.
    rounds: u64,
    /// Bytes sent by the last one.
    sent: u64,
    /// Bytes that are still to come, as of the last one.
    left: u64,
}

impl LiveState {
    /// Bytes sent in the last round.
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }
}

impl Run {
    /// Asks the VM for state that it can send while it runs, where the destination takes it, and sends that.
    pub(super) fn save_live(&mut self, vm: &mut dyn SourceVm) -> Result<(), Error> {
        if !self.terms().says_lengths {
            return Ok(());
        }
        let asked = "send its state while it runs";
        let ((left, room), (rest, _)) = self.send_sections(asked, LIVE_ROOM, None, |out| {
            let left = vm.save_live(out)?;
            if out.is_replay() {
                return Err("state of another source is not sent while the guest runs".into());
            }
            Ok((left, out.room()))
        })?;
        self.shared.live.limiter.take(rest.len() as u64);
        self.main().raw(&rest)?;
        let sent = LIVE_ROOM - room;
        if sent > 0 {
            self.await_loaded()?;
        }
        self.live_state = LiveState { rounds: self.live_state.rounds + 1, sent, left };
        self.report.live_state += sent;
        if sent > 0 || left > 0 {
            tracing::debug!(sent, left, "device state while the guest runs");
        }
        Ok(())
    }

    /// Waits until the destination has loaded what was sent: else its loading would be a part of the pause, and no part of what the pause
    /// is expected to take.
    fn await_loaded(&mut self) -> Result<(), Error> {
        let value = FIRST_PING.wrapping_add(self.live_state.rounds as u32);
        self.main().ping(value)?;
        self.return_path().wait_for_pong(value)
    }

    /// What sections are written by.
    pub(super) fn terms(&self) -> Terms {
        let says_lengths = self.extensions.contains(Extension::SectionLength);
        Terms { says_lengths, live_rounds: self.live_state.rounds }
    }

    /// Whether large state travels on the channels.
    pub(super) fn sends_state_packets(&self) -> bool {
        self.extensions.contains(Extension::StatePackets)
    }

    /// Bytes of device state that a pause would have to wait for, as the VM says. Before anything was sent there is no speed to judge
    /// them by.
    pub(super) fn state_left(&self) -> u64 {
        let has_speed = self.report.live_state > 0 || self.shared.progress.snapshot().normal > 0;
        if has_speed { self.live_state.left } else { 0 }
    }

    /// How long to rest between two rounds while something is waited for.
    pub(super) fn rest(&self) -> Duration {
        let least = match self.shared.options.is_main_alone() {
            true => EMPTY_SECTION,
            false => packet::header_len(self.shared.ram.layout().page_size()) as u64,
        };
        rest_between_rounds(least, self.shared.live.get().stall_limit)
    }

    /// Waits a moment where the last round had nothing to send: a device has more to come, and not yet.
    pub(super) fn rest_where_nothing_was_sent(&self) -> Result<(), Error> {
        let nothing = self.report.rounds.last().is_some_and(|round| round.normal + round.zero == 0);
        match nothing && self.live_state.sent == 0 && self.live_state.left > 0 {
            true => self.shared.backlog.rest(self.rest()),
            false => Ok(()),
        }
    }
}

/// The PING after the first state; the one that follows the offer has 1.
const FIRST_PING: u32 = 2;
