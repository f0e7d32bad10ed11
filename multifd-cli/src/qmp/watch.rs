//! Tells the clients what the engine tells an observer.

use multifd::progress::{Event, Observer, Phase};

use super::{Qmp, Role, RunState};

/// An observer that passes events on, and tells the clients of them.
pub struct Watched<'a> {
    inner: &'a mut dyn Observer,
    qmp: Qmp,
    role: Role,
    /// The source has switched to postcopy.
    is_postcopy: bool,
}

impl<'a> Watched<'a> {
    /// Passes on to `inner`.
    pub fn new(inner: &'a mut dyn Observer, qmp: Qmp, role: Role) -> Watched<'a> {
        Watched { inner, qmp, role, is_postcopy: false }
    }
}

impl Observer for Watched<'_> {
    fn event(&mut self, event: &Event) {
        self.inner.event(event);
        match (event, self.role) {
            (Event::Phase(Phase::Rounds), _) => self.qmp.set_status("active"),
            (Event::Phase(Phase::Switchover | Phase::Devices | Phase::Confirm), Role::Source) => {
                self.qmp.set_run_state(RunState::FinishMigrate);
                self.qmp.set_status("device");
            }
            (Event::Phase(Phase::Postcopy), Role::Destination) => {
                self.is_postcopy = true;
                self.qmp.set_status("postcopy-active");
            }
            // The last state of a postcopy is the one before completed.
            (Event::Phase(Phase::Switchover | Phase::Devices | Phase::Confirm), Role::Destination)
                if !self.is_postcopy =>
            {
                self.qmp.set_status("active");
            }
            (Event::Interrupted { .. }, Role::Destination) => self.qmp.set_status("postcopy-paused"),
            (Event::Continued { .. }, Role::Destination) => {
                self.qmp.set_status("postcopy-recover");
                self.qmp.set_status("postcopy-active");
            }
            (Event::Round(_), _) => self.qmp.pass(),
            _ => {}
        }
    }
}
