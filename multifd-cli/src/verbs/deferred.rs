//! `receive defer`: waits until a QMP client says by `migrate-incoming` where the source is.
//!
//! The main thread opens the place and answers, so that an address that cannot be used is the client's error and the next one can
//! be tried. Every other client that says it is answered as well, also when the migration has begun.

use std::{
    cell::Cell,
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use multifd::{stop::StopHandle, threads};
use serde_json::{Value, json};

use crate::{
    args::Origin,
    progress::lock,
    qmp::{Command, Commands, INCOMING_HAS_BEGUN, Incoming, Qmp, Steered},
    verbs::recovers::Recovers,
};

/// Waits for what clients and interrupts say.
pub struct Deferred {
    arrivals: mpsc::Receiver<Event>,
    desk: Arc<Desk>,
    /// After a failure the process stays until its clients have gone.
    stays: Cell<bool>,
}

/// What clients can do with a `receive`, whether it was deferred or not.
pub struct Receives {
    desk: Arc<Desk>,
    steered: Steered,
    recovers: Recovers,
}

/// Takes the requests of clients.
pub struct Desk {
    state: Mutex<State>,
}

struct State {
    /// The migration has begun, or there will be none: nothing is asked of the main thread but to end.
    is_closed: bool,
    events: mpsc::Sender<Event>,
}

enum Event {
    Incoming { incoming: Incoming, answer: mpsc::Sender<Result<Value, String>> },
    End,
}

impl Deferred {
    /// Waits, if `is_deferred`. Then [`wait`](Deferred::wait) is to be called. `stop` ends the migration once it has begun.
    /// `recovers` does what clients want of a postcopy.
    pub fn new(is_deferred: bool, stop: StopHandle, recovers: Recovers) -> (Deferred, Receives) {
        let (events, arrivals) = mpsc::channel();
        let state = Mutex::new(State { is_closed: !is_deferred, events });
        let desk = Arc::new(Desk { state });
        let deferred = Deferred { arrivals, desk: desk.clone(), stays: Cell::new(false) };
        (deferred, Receives { desk, steered: Steered { verb: "receives", stop }, recovers })
    }

    /// What ends the waiting.
    pub fn desk(&self) -> Arc<Desk> {
        self.desk.clone()
    }

    /// Waits until `open` has opened what a client says, and returns it; `None` where the waiting was ended. The client is answered when
    /// `begin` has run.
    pub fn wait<P>(&self, open: impl Fn(&Origin) -> Result<P, String>, begin: impl Fn(&P)) -> Option<P> {
        let place = loop {
            match self.arrivals.recv() {
                Err(_) | Ok(Event::End) => break None,
                Ok(Event::Incoming { incoming, answer }) => match open(&incoming.from) {
                    Ok(place) => {
                        begin(&place);
                        self.stays.set(incoming.stays);
                        lock(&self.desk.state).is_closed = true;
                        // The client may be gone.
                        let _ = answer.send(Ok(json!({})));
                        break Some(place);
                    }
                    Err(message) => drop(answer.send(Err(message))),
                },
            }
        };
        lock(&self.desk.state).is_closed = true;
        // No other comes any more.
        for event in self.arrivals.try_iter() {
            if let Event::Incoming { answer, .. } = event {
                let _ = answer.send(Err(INCOMING_HAS_BEGUN.to_owned()));
            }
        }
        place
    }

    /// Where the client asked for it (`exit-on-error` off), stays after a failure until no client is connected, one says `quit`,
    /// or an interrupt comes.
    pub fn stay(&self, qmp: &Qmp) {
        if !self.stays.get() {
            return;
        }
        let (desk, clients) = (self.desk.clone(), qmp.clone());
        let gone = move || {
            while !clients.wait_clients(A_LONG_TIME) {}
            desk.end();
        };
        if threads::spawn("qmp clients", gone).is_ok() {
            while !matches!(self.arrivals.recv(), Err(_) | Ok(Event::End)) {}
        }
    }
}

impl Desk {
    /// Ends the waiting.
    pub fn end(&self) {
        // The main thread does not wait any more, then.
        let _ = lock(&self.state).events.send(Event::End);
    }

    fn incoming(&self, incoming: Incoming) -> Result<Value, String> {
        let (answer, answered) = mpsc::channel();
        {
            let state = lock(&self.state);
            if state.is_closed {
                return Err(INCOMING_HAS_BEGUN.to_owned());
            }
            state.events.send(Event::Incoming { incoming, answer }).map_err(|_| ENDS.to_owned())?;
        }
        answered.recv().map_err(|_| ENDS.to_owned())?
    }
}

impl Commands for Receives {
    fn run(&self, command: Command) -> Result<Value, String> {
        let waits = !lock(&self.desk.state).is_closed;
        match command {
            Command::Incoming(incoming) => self.desk.incoming(incoming),
            Command::Migrate(_) => Err("Guest is waiting for an incoming migration".to_owned()),
            // There is none, which is no error in QEMU either.
            Command::Cancel if waits => Ok(json!({})),
            Command::Pause => self.recovers.pause(),
            Command::Recover(at) => self.recovers.listen_at(&at),
            Command::Quit => {
                self.desk.end();
                self.steered.run(command)
            }
            command => self.steered.run(command),
        }
    }
}

const ENDS: &str = "this process is about to end";
/// Between two looks whether the clients have gone, which is noticed at once.
const A_LONG_TIME: Duration = Duration::from_secs(3600);
