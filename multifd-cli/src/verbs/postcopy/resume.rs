//! What QMP clients do with a VM that is being sent: they pause it, have it go on elsewhere (`migrate` with `resume`), and end it.
//!
//! The main thread makes one attempt after the other. A client that names the next place ends the attempt under way, and never the one
//! that it has asked for: both are decided under the lock of the [`Desk`].

use std::{
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use multifd::{
    postcopy::Handle,
    progress::{Event, Observer, Phase},
    stop::StopHandle,
    transport::uri::Uri,
};
use serde_json::{Value, json};

use crate::{
    progress::lock,
    qmp::{Command, Commands, Steered},
};

/// Where the main thread hears of the next place.
pub struct Desk {
    handle: Handle,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Where to go on, until the main thread has taken it.
    next: Option<Uri>,
    /// No other place comes.
    is_closed: bool,
}

impl Desk {
    /// Of the postcopy that `handle` steers.
    pub fn new(handle: Handle) -> Arc<Desk> {
        Arc::new(Desk { handle, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Takes the place that a client has named since the last call.
    pub fn take(&self) -> Option<Uri> {
        lock(&self.state).next.take()
    }

    /// Waits until a client names a place, and takes it; `None` where the waiting was ended.
    pub fn wait(&self) -> Option<Uri> {
        let state = lock(&self.state);
        let waited = self.changed.wait_while(state, |state| state.next.is_none() && !state.is_closed);
        waited.unwrap_or_else(|poisoned| poisoned.into_inner()).next.take()
    }

    /// Waits for `pause`, less where a client names a place or the waiting is ended.
    pub fn rest(&self, pause: Duration) {
        let state = lock(&self.state);
        drop(self.changed.wait_timeout_while(state, pause, |state| state.next.is_none() && !state.is_closed));
    }

    /// Ends the waiting.
    pub fn end(&self) {
        lock(&self.state).is_closed = true;
        self.changed.notify_all();
    }

    /// Has the main thread go on at `uri`.
    fn go_on_at(&self, uri: Uri) {
        let mut state = lock(&self.state);
        state.next = Some(uri);
        // The main thread takes the place under this lock, so what ends here is an attempt at another one.
        self.handle.pause();
        self.changed.notify_all();
    }

    /// An attempt begins: ends it where a client has named another place meanwhile.
    fn attempt_begins(&self) {
        let state = lock(&self.state);
        if state.next.is_some() {
            self.handle.pause();
        }
    }
}

/// Does what clients want.
pub struct Steers {
    desk: Arc<Desk>,
    steered: Steered,
}

impl Steers {
    /// By way of `desk`; `stop` ends it all.
    pub fn new(desk: Arc<Desk>, stop: StopHandle) -> Steers {
        Steers { desk, steered: Steered { verb: "sends", stop } }
    }
}

impl Commands for Steers {
    fn run(&self, command: Command) -> Result<Value, String> {
        match command {
            Command::Pause => {
                self.desk.handle.pause();
                Ok(json!({}))
            }
            Command::Resume(uri) => {
                self.desk.go_on_at(uri);
                Ok(json!({}))
            }
            Command::Cancel | Command::Quit => {
                let answer = self.steered.run(command);
                self.desk.end();
                answer
            }
            command => self.steered.run(command),
        }
    }
}

/// An observer that looks at the desk when an attempt begins.
pub struct AtTheDesk<O> {
    /// Is told of all events.
    pub inner: O,
    /// Where clients name places.
    pub desk: Arc<Desk>,
}

impl<O: Observer> Observer for AtTheDesk<O> {
    fn event(&mut self, event: &Event) {
        if matches!(event, Event::Phase(Phase::Connect)) {
            self.desk.attempt_begins();
        }
        self.inner.event(event);
    }
}
