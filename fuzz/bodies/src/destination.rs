//! A whole destination, fed by a script of bytes on several connections.
//!
//! The first byte says how many channels are required (0: as many as come). Then frames: a byte for the connection, a
//! 16-bit length, and so many bytes that this connection says next. With [`LATER`] in the byte for the connection they come
//! after all that was said before has been read, as GO does. All connections end after their last byte. The memory lies
//! between pages that end the process when touched.

use std::{
    collections::VecDeque,
    io::{self, Read},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::Duration,
};

use multifd::{
    destination::{Destination, Options, Report},
    error::Error,
    ram::{GuestRange, Ram},
    testing::{
        fuzzing::{Steps, guarded_ram},
        memory,
    },
    transport::{Established, Listen, Pending, RecvHalf, SendHalf, Stopper, Stream},
    vm::{DestinationVm, SectionId, VmError},
};

/// The blocks of the destination and their pages.
pub(crate) const BLOCKS: [(&str, usize); 2] = [("ram", 8), ("rom", 2)];

/// Runs the script.
pub(crate) fn destination(input: &[u8]) {
    // However it ends, it does. A script has nothing to wait for: all of it is there.
    drop(outcome(input, Duration::from_millis(5)));
}

/// Why the script is refused; nothing where there is none.
fn outcome(input: &[u8], setup_timeout: Duration) -> Option<Result<Report, Error>> {
    let (&first, rest) = input.split_first()?;
    let required = first % 4;
    let wires = wires(rest);
    if wires.is_empty() {
        return None;
    }
    let streams = wires.into_iter().map(|wire| {
        // All of it fits, and no reader of the answers is needed.
        let (mut ours, theirs) = memory::pair(wire.bytes.len().max(4096));
        ours.write(&wire.bytes, &[]).expect("the other end is there");
        (theirs, wire.pauses)
    });
    let script = Arc::new(Script::new(streams.collect()));
    let ram = guarded_ram(&BLOCKS).expect("memory");
    let mut vm = Vm { ram, started: false };
    let mut options = Options::default();
    options.channels = (required > 0).then_some(required);
    options.close_timeout = Duration::from_millis(1);
    options.setup_timeout = Some(setup_timeout);
    let steps = Steps::of(&mut options);
    let outcome = Destination::new(options).run(&mut vm, Box::new(Listener(script)), &mut ());
    assert_eq!(outcome.is_ok(), vm.started, "{outcome:?}");
    steps.assert_allowed();
    Some(outcome)
}

/// What one connection says.
#[derive(Clone, Default)]
pub(crate) struct Wire {
    pub(crate) bytes: Vec<u8>,
    /// How many bytes are read before more come, in order.
    pauses: VecDeque<usize>,
}

/// What each connection says.
pub(crate) fn wires(mut frames: &[u8]) -> Vec<Wire> {
    let mut wires: Vec<Wire> = Vec::new();
    while let [connection, high, low, rest @ ..] = frames {
        let index = usize::from(connection % 4);
        if wires.len() <= index {
            wires.resize(index + 1, Wire::default());
        }
        let len = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
        let Wire { bytes, pauses } = &mut wires[index];
        if connection & LATER != 0 {
            pauses.push_back(bytes.len());
        }
        bytes.extend_from_slice(&rest[..len]);
        frames = &rest[len..];
    }
    wires
}

/// In the byte for the connection of a frame.
pub(crate) const LATER: u8 = 0x80;

struct Vm {
    ram: Ram,
    started: bool,
}

impl DestinationVm for Vm {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
        match section.name.as_str() {
            "cpu" => input.read_exact(&mut [0; 14])?,
            "live" if section.is_bounded => drop(input.take(1 << 20).read_to_end(&mut Vec::new())?),
            "all" => drop(input.take(1 << 20).read_to_end(&mut Vec::new())?),
            _ => {}
        }
        Ok(())
    }

    fn start(&mut self) -> Result<(), VmError> {
        self.started = true;
        Ok(())
    }
}

/// Connections that wait to be accepted.
struct Script {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The next one is the last.
    waiting: Vec<(memory::MemoryStream, VecDeque<usize>)>,
    /// Accepted and not dropped yet.
    open: usize,
    interrupted: bool,
}

impl Script {
    fn new(mut streams: Vec<(memory::MemoryStream, VecDeque<usize>)>) -> Script {
        streams.reverse();
        let state = State { waiting: streams, open: 0, interrupted: false };
        Script { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }
}

struct Listener(Arc<Script>);

impl Listener {
    fn next(&self, state: &mut State) -> Option<Box<dyn Pending>> {
        let (stream, pauses) = state.waiting.pop()?;
        state.open += 1;
        let pauses = Arc::new(Mutex::new(Pauses { position: 0, pauses }));
        let stream: Box<dyn Stream> = Box::new(stream);
        Some(Box::new(Established::new(Counted { pauses, open: Open(self.0.clone()), stream })))
    }
}

impl Listen for Listener {
    /// Waits forever only while something may still happen on another connection.
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        let mut state = self.0.lock();
        loop {
            if state.interrupted {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if let Some(stream) = self.next(&mut state) {
                return Ok(stream);
            }
            if timeout.is_some() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if state.open == 0 {
                return Err(io::Error::other("the script is over"));
            }
            state = self.0.changed.wait(state).expect("nobody panics with it");
        }
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        Ok(self.next(&mut self.0.lock()))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(Interrupt(self.0.clone())))
    }
}

struct Interrupt(Arc<Script>);

impl Stopper for Interrupt {
    fn stop(&self) {
        self.0.lock().interrupted = true;
        self.0.changed.notify_all();
    }
}

/// A connection, or one of its halves, that is missed when it is gone.
struct Counted<S: ?Sized = dyn Stream> {
    pauses: Arc<Mutex<Pauses>>,
    open: Open,
    stream: Box<S>,
}

/// Where a read ends although more is there.
struct Pauses {
    position: usize,
    pauses: VecDeque<usize>,
}

/// One of the connections, or halves, that are counted.
struct Open(Arc<Script>);

impl Open {
    fn another(&self) -> Open {
        self.0.lock().open += 1;
        Open(self.0.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.lock().open -= 1;
        self.0.changed.notify_all();
    }
}

impl<S: SendHalf + ?Sized> SendHalf for Counted<S> {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        // The peer is gone, and does not mind answers.
        match self.stream.write(header, pages) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other,
        }
    }

    fn finish(&mut self) -> io::Result<()> {
        self.stream.finish()
    }
}

impl<S: RecvHalf + ?Sized> RecvHalf for Counted<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut at = self.pauses.lock().expect("no thread panics with it");
        while at.pauses.front().is_some_and(|pause| *pause <= at.position) {
            at.pauses.pop_front();
        }
        let len = at.pauses.front().map_or(buf.len(), |pause| buf.len().min(pause - at.position));
        let n = self.stream.read(&mut buf[..len])?;
        at.position += n;
        Ok(n)
    }

    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()> {
        let len: usize = pages.iter().map(GuestRange::len).sum();
        self.pauses.lock().expect("no thread panics with it").position += len;
        self.stream.read_pages(pages)
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        self.stream.interrupter()
    }
}

impl Stream for Counted {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        let Counted { pauses, open, stream } = *self;
        let (sends, receives) = stream.split()?;
        let sends = Counted { pauses: pauses.clone(), open: open.another(), stream: sends };
        Ok((Box::new(sends), Box::new(Counted { pauses, open, stream: receives })))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.stream.stopper()
    }

    fn peer(&self) -> String {
        "script".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A corpus that is refused at its first byte would leave the rest to chance.
    #[test]
    fn every_seed_is_a_complete_migration() {
        for (index, seed) in crate::seeds::scripts().iter().enumerate() {
            let outcome = super::outcome(seed, Duration::from_secs(60)).expect("a script");
            assert!(outcome.is_ok(), "seed {index}: {outcome:?}");
        }
    }
}
