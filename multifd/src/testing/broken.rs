//! Defects to be switched on, so that the checks of the round guarantee can be seen to catch them.
//!
//! Only in test builds and with the feature `__broken-variants`. Each variant breaks one promise and keeps all others, so
//! that a check which misses it does not look at that promise.

use multifd_proto::rounds::Party;

use crate::{
    destination,
    error::Error,
    source,
    sync::{Arc, Condvar, Mutex, lock, wait},
    transport::Stopper,
};

/// One promise broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// Destination: channels go on after their SYNC without waiting for the others. Main still waits for all of them, so that
    /// nothing is missing in the end: pages only overtake each other.
    NoBarrier,
    /// Destination: a round is over when all but one have arrived, whichever that is.
    BarrierShort,
    /// Destination: the pages in a packet with SYNC are read and dropped.
    SyncPagesDropped,
    /// Source: dirty tracking starts when round 0 has been read, not before.
    TrackingStartsLate,
    /// Source of a postcopy: a page that is asked for is sent, whether another thread has sent it or not.
    SourceIgnoresItsBits,
    /// Source of a postcopy: it goes on with what it has sent, and not with what the destination has.
    SourceKeepsItsBits,
    /// Destination: it says what it has before the threads of the connections that were lost have ended.
    TellsTooEarly,
}

impl Broken {
    /// Breaks the promise at a source with these options.
    pub fn at_source(self, options: &mut source::Options) {
        options.broken = Some(self);
    }

    /// Breaks the promise at a destination with these options.
    pub fn at_destination(self, options: &mut destination::Options) {
        options.broken = Some(self);
    }
}

/// What the destination's broken variants meet at, from the second sync point on. Clones are the same.
#[derive(Clone)]
pub(crate) struct LooseBarrier {
    broken: Option<Broken>,
    shared: Arc<(Mutex<State>, Condvar)>,
}

struct State {
    /// How often each party arrived here; main is the first. Long enough for every channel there can be.
    arrived: Vec<u64>,
    /// Parties, once known.
    parties: usize,
    stopped: bool,
}

impl LooseBarrier {
    pub(crate) fn new(broken: Option<Broken>) -> LooseBarrier {
        let broken = broken.filter(|broken| matches!(broken, Broken::NoBarrier | Broken::BarrierShort));
        let state = State { arrived: vec![0; 257], parties: 0, stopped: false };
        LooseBarrier { broken, shared: Arc::new((Mutex::new(state), Condvar::new())) }
    }

    pub(crate) fn fix_channels(&self, channels: usize) {
        lock(&self.shared.0).parties = channels + 1;
        self.shared.1.notify_all();
    }

    /// Whether it is used at all.
    pub(crate) fn is_active(&self) -> bool {
        self.broken.is_some()
    }

    /// `None` where the real barrier is to be used: always if nothing is broken, and at the first sync point, where
    /// channels learn where pages go.
    pub(crate) fn arrive(&self, party: Party) -> Option<Result<(), Error>> {
        let broken = self.broken?;
        let (state, changed) = &*self.shared;
        let mut state = lock(state);
        let index = match party {
            Party::Main => 0,
            Party::Channel(id) => id.index() + 1,
        };
        state.arrived[index] += 1;
        let ours = state.arrived[index];
        if ours == 1 {
            return None;
        }
        changed.notify_all();
        loop {
            if state.stopped {
                return Some(Err(Error::Stopped));
            }
            let here = state.arrived[..state.parties].iter().filter(|&&arrived| arrived >= ours).count();
            let goes_on = match broken {
                Broken::NoBarrier => party != Party::Main || here == state.parties,
                // Their number may be on its way: the first to arrive waits for it.
                _ => state.parties > 0 && here + 1 >= state.parties,
            };
            if goes_on {
                return Some(Ok(()));
            }
            state = wait(changed, state);
        }
    }
}

impl Stopper for LooseBarrier {
    fn stop(&self) {
        lock(&self.shared.0).stopped = true;
        self.shared.1.notify_all();
    }
}
