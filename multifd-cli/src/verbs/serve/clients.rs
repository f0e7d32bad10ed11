//! Who is being served: how many, whose VM runs, and what the end of the server means for each.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use multifd::{progress::Progress, stop::StopHandle};

use crate::{
    describe::counted,
    exit::Exit,
    metrics::{Sent, Served},
    progress::lock,
};

/// The clients of one server. Clones are the same.
#[derive(Clone)]
pub struct Clients {
    limit: usize,
    shared: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    ending: bool,
    next: u64,
    now: BTreeMap<u64, Client>,
    complete: u32,
    failed: u32,
    incomplete: u32,
    /// To those that have gone.
    sent: Sent,
}

/// One that is being served.
#[derive(Default)]
struct Client {
    /// What ends it, once there is something to end.
    stop: Option<StopHandle>,
    /// What counts for it, from then on.
    progress: Option<Progress>,
    /// Its VM may run.
    runs: bool,
}

impl Client {
    fn sent(&self) -> Sent {
        let Some(snapshot) = self.progress.as_ref().map(Progress::snapshot) else { return Sent::default() };
        Sent { bytes: snapshot.bytes(), normal: snapshot.normal, zero: snapshot.zero, requests: snapshot.requests }
    }
}

/// A client's place, which is free again when this is dropped.
pub struct Place {
    clients: Clients,
    id: u64,
}

/// Why a client is not served.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// There are too many.
    Full {
        /// How many are served at a time.
        limit: usize,
    },
    /// The server ends.
    Ending,
}

impl Clients {
    /// None yet, and at most `limit` at a time.
    pub fn new(limit: usize) -> Clients {
        Clients { limit, shared: Arc::default() }
    }

    /// Takes a place for one more.
    ///
    /// # Errors
    /// There is none.
    pub fn enter(&self) -> Result<Place, Refused> {
        let mut state = lock(&self.shared.0);
        if state.ending {
            return Err(Refused::Ending);
        }
        if state.now.len() >= self.limit {
            return Err(Refused::Full { limit: self.limit });
        }
        let id = state.next;
        state.next += 1;
        state.now.insert(id, Client::default());
        Ok(Place { clients: self.clone(), id })
    }

    /// Refuses all that come from now on, and ends those whose VM does not run.
    pub fn end(&self) {
        let mut state = lock(&self.shared.0);
        state.ending = true;
        let waiting = state.now.values().filter(|client| !client.runs);
        let stops: Vec<StopHandle> = waiting.filter_map(|client| client.stop.clone()).collect();
        drop(state);
        self.shared.1.notify_all();
        stops.iter().for_each(StopHandle::cancel);
    }

    /// Ends all, also those whose guest needs the rest of its memory.
    pub fn end_all(&self) {
        let mut state = lock(&self.shared.0);
        state.ending = true;
        let stops: Vec<StopHandle> = state.now.values().filter_map(|client| client.stop.clone()).collect();
        drop(state);
        stops.iter().for_each(StopHandle::cancel);
    }

    /// Whether all that come are refused.
    pub fn is_ending(&self) -> bool {
        lock(&self.shared.0).ending
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        lock(&self.shared.0).now.len()
    }

    /// Waits until there are none, or all that come are refused.
    pub fn wait_for_end(&self) {
        let (state, changed) = &*self.shared;
        let mut state = lock(state);
        while !state.now.is_empty() && !state.ending {
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until there are none, for at most `limit`. `false`: some are left.
    pub fn wait(&self, limit: Option<Duration>) -> bool {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let (state, changed) = &*self.shared;
        let mut state = lock(state);
        while !state.now.is_empty() {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return false;
            }
            let left = left.unwrap_or(LONG);
            state = changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Counts how a client has ended.
    pub fn report(&self, exit: Exit) {
        let mut state = lock(&self.shared.0);
        match exit {
            Exit::Done => state.complete += 1,
            Exit::Incomplete | Exit::InDoubt => state.incomplete += 1,
            _ => state.failed += 1,
        }
    }

    /// What the metrics say of them.
    pub fn served(&self) -> Served {
        let state = lock(&self.shared.0);
        let mut sent = state.sent;
        state.now.values().for_each(|client| sent += client.sent());
        let running = state.now.values().filter(|client| client.runs).count();
        Served {
            waiting: (state.now.len() - running) as u64,
            running: running as u64,
            completed: state.complete.into(),
            failed: state.failed.into(),
            incomplete: state.incomplete.into(),
            sent,
        }
    }

    /// The exit status, and the end in a sentence. A client that got no VM is no failure of the server.
    pub fn summary(&self) -> (Exit, String) {
        let State { complete, failed, incomplete, .. } = &*lock(&self.shared.0);
        let exit = if *incomplete > 0 { Exit::Incomplete } else { Exit::Done };
        let vms = counted(*complete as usize, "VM");
        let others = [
            (*incomplete, counted(*incomplete as usize, "VM"), "at a client that lacks a part, or may"),
            (*failed, counted(*failed as usize, "client"), "without a VM"),
        ];
        let others = others.into_iter().filter(|(count, ..)| *count > 0);
        let others: String = others.map(|(_, who, what)| format!(", {who} {what}")).collect();
        (exit, format!("served {vms}{others}"))
    }
}

impl Place {
    /// Has `stop` end this client, for which `progress` counts.
    pub fn begin(&self, stop: &StopHandle, progress: Progress) {
        let mut state = lock(&self.clients.shared.0);
        if state.ending {
            stop.cancel();
        }
        if let Some(client) = state.now.get_mut(&self.id) {
            client.stop = Some(stop.clone());
            client.progress = Some(progress);
        }
    }

    /// The VM may run from now on, and is not ended with those that do not. `false`: the server ends, and it must not run.
    pub fn may_run(&self) -> bool {
        let mut state = lock(&self.clients.shared.0);
        if state.ending {
            return false;
        }
        if let Some(client) = state.now.get_mut(&self.id) {
            client.runs = true;
        }
        true
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = lock(&self.clients.shared.0);
        if let Some(client) = state.now.remove(&self.id) {
            state.sent += client.sent();
        }
        drop(state);
        self.clients.shared.1.notify_all();
    }
}

/// A wait without a limit looks again after so long.
const LONG: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use multifd::source::{self, Source};

    use super::*;

    #[test]
    fn there_are_as_many_places_as_the_limit_says_and_they_come_back() {
        let clients = Clients::new(2);
        let first = clients.enter().ok().unwrap();
        let _second = clients.enter().ok().unwrap();
        assert_eq!(clients.enter().err(), Some(Refused::Full { limit: 2 }));
        drop(first);
        assert!(clients.enter().is_ok());
        assert_eq!(clients.count(), 1);
    }

    #[test]
    fn the_end_of_the_server_ends_those_whose_vm_does_not_run() {
        let clients = Clients::new(9);
        let (runs, waits, late) =
            (clients.enter().ok().unwrap(), clients.enter().ok().unwrap(), clients.enter().ok().unwrap());
        let stops = [StopHandle::new(), StopHandle::new(), StopHandle::new()];
        let progress = || Source::new(source::Options::default()).progress();
        runs.begin(&stops[0], progress());
        waits.begin(&stops[1], progress());
        assert!(runs.may_run());
        clients.end();
        late.begin(&stops[2], progress());
        assert_eq!(stops.each_ref().map(StopHandle::is_stopped), [false, true, true]);
        assert!(!waits.may_run(), "it is too late");
        assert_eq!((clients.served().waiting, clients.served().running), (2, 1));
        assert_eq!(clients.enter().err(), Some(Refused::Ending));
        assert!(!clients.wait(Some(Duration::from_millis(1))));
        clients.end_all();
        assert!(stops[0].is_stopped());
        drop((runs, waits, late));
        assert!(clients.wait(None));
    }

    #[test]
    fn only_a_vm_that_lacks_memory_is_a_failure_of_the_server() {
        let clients = Clients::new(1);
        clients.report(Exit::Done);
        clients.report(Exit::Peer);
        assert_eq!(clients.summary(), (Exit::Done, "served 1 VM, 1 client without a VM".to_owned()));
        clients.report(Exit::InDoubt);
        let (exit, text) = clients.summary();
        assert_eq!(exit, Exit::Incomplete);
        assert_eq!(text, "served 1 VM, 1 VM at a client that lacks a part, or may, 1 client without a VM");
    }
}
