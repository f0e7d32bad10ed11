//! Compares what the end of a round costs: one barrier on each side, or main waiting for each channel in turn.
//!
//! ```text
//! rounds tcp|unix CHANNELS ROUNDS
//! ```
//! Both schemes send the same bytes over the same kind of sockets: in each round one page and a SYNC packet on every
//! channel, FLUSH on main, and an acknowledgement back. In the other scheme main hands each channel its page through a
//! mutex and a condvar of the channel's own, then asks each for its SYNC, waits for each, and only then writes FLUSH; the
//! receiving main thread waits for each channel, then releases each. A third scheme shows what is left without any
//! barrier: main wakes all channels at once, and the last receiver acknowledges; pages of two rounds could overtake each other
//! in it. All take turns of 50 rounds. Prints one JSON line with the medians, in microseconds, counted from the last page
//! queued: until the acknowledgement, and until the sender could go on; and from the first page queued.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use multifd::{multifd_proto::packet, testing::bench::Barrier};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [transport, channels, rounds] = &arguments[..] else {
        return Err("usage: rounds tcp|unix CHANNELS ROUNDS".into());
    };
    let (channels, rounds): (u8, usize) = (channels.parse()?, rounds.parse()?);
    let mut barrier = OneBarrier::start(transport, channels)?;
    let mut in_turn = InTurn::start(transport, channels)?;
    let mut nothing = NoBarrier::start(transport, channels)?;
    let (mut ours, mut theirs, mut least) = (Times::default(), Times::default(), Times::default());
    for turn in 0..rounds.div_ceil(TURN) {
        for _ in 0..TURN {
            ours.add(turn, barrier.round()?);
        }
        for _ in 0..TURN {
            theirs.add(turn, in_turn.round()?);
        }
        for _ in 0..TURN {
            least.add(turn, nothing.round()?);
        }
    }
    println!(
        "{{\"transport\":\"{transport}\",\"channels\":{channels},\"rounds\":{rounds},\"barrier\":{},\"in-turn\":{},\"no-barrier\":{}}}",
        ours.json(),
        theirs.json(),
        least.json()
    );
    Ok(())
}

/// One round: until the acknowledgement, from the first page and from the last page queued; until the sender could go on,
/// from the last page queued.
struct Took {
    round: Duration,
    acknowledged: Duration,
    stalled: Duration,
}

#[derive(Default)]
struct Times {
    round: Vec<f64>,
    acknowledged: Vec<f64>,
    stalled: Vec<f64>,
}

impl Times {
    fn add(&mut self, turn: usize, took: Took) {
        // The first turn starts threads and fills caches.
        if turn > 0 {
            self.round.push(took.round.as_secs_f64() * 1e6);
            self.acknowledged.push(took.acknowledged.as_secs_f64() * 1e6);
            self.stalled.push(took.stalled.as_secs_f64() * 1e6);
        }
    }

    fn json(&mut self) -> String {
        let quantile = |times: &mut Vec<f64>, share: f64| {
            times.sort_by(f64::total_cmp);
            times.get((times.len() as f64 * share) as usize).copied().unwrap_or(f64::NAN)
        };
        format!(
            "{{\"round-us\":{:.1},\"acknowledged-us\":{:.1},\"acknowledged-p90-us\":{:.1},\"stalled-us\":{:.1}}}",
            quantile(&mut self.round, 0.5),
            quantile(&mut self.acknowledged, 0.5),
            quantile(&mut self.acknowledged, 0.9),
            quantile(&mut self.stalled, 0.5)
        )
    }
}

/// The scheme of the engine: FLUSH is written when the round opens; all threads of a side meet at one barrier.
struct OneBarrier {
    barrier: Barrier,
    main: Socket,
}

impl OneBarrier {
    fn start(transport: &str, channels: u8) -> Outcome<OneBarrier> {
        let (source, destination) = (Barrier::new(channels), Barrier::new(channels));
        for id in 0..channels {
            let (mut here, mut there) = pair(transport)?;
            let barrier = source.clone();
            spawn(move || {
                loop {
                    barrier.channel(id);
                    here.send(&page())?;
                    here.send(&sync())?;
                }
            });
            let barrier = destination.clone();
            spawn(move || {
                let mut arrived = None;
                loop {
                    there.receive(packet::header_len(PAGE))?;
                    if let Some(round) = arrived {
                        barrier.pass(round);
                    }
                    there.receive(PAGE)?;
                    there.receive(sync().len())?;
                    arrived = Some(barrier.arrive(id));
                }
            });
        }
        let (main, mut there) = pair(transport)?;
        spawn(move || {
            loop {
                there.receive(FLUSH.len())?;
                destination.main();
                there.send(&ACKNOWLEDGEMENT)?;
            }
        });
        source.gather();
        Ok(OneBarrier { barrier: source, main })
    }

    fn round(&mut self) -> std::io::Result<Took> {
        // The pages are in the scan before the round opens: nothing is handed to a channel.
        let begun = Instant::now();
        self.barrier.main();
        self.main.send(&FLUSH)?;
        self.barrier.gather();
        let stalled = begun.elapsed();
        self.main.receive(ACKNOWLEDGEMENT.len())?;
        let acknowledged = begun.elapsed();
        Ok(Took { round: acknowledged, acknowledged, stalled })
    }
}

/// A counter that one thread raises and another waits for.
#[derive(Default)]
struct Semaphore {
    count: Mutex<u32>,
    raised: Condvar,
}

impl Semaphore {
    fn post(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.raised.notify_one();
    }

    fn wait(&self) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        while *count == 0 {
            count = self.raised.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
        *count -= 1;
    }
}

/// What main and one channel tell each other.
#[derive(Default)]
struct Turn {
    go: Semaphore,
    done: Semaphore,
}

/// The other scheme: main deals with one channel after the other.
struct InTurn {
    channels: Vec<Arc<Turn>>,
    main: Socket,
}

impl InTurn {
    fn start(transport: &str, channels: u8) -> Outcome<InTurn> {
        let turns = || (0..channels).map(|_| Arc::<Turn>::default()).collect::<Vec<_>>();
        let (source, destination) = (turns(), turns());
        for (sender, receiver) in source.iter().zip(&destination) {
            let (mut here, mut there) = pair(transport)?;
            let turn = sender.clone();
            spawn(move || {
                loop {
                    turn.go.wait();
                    here.send(&page())?;
                    turn.go.wait();
                    here.send(&sync())?;
                    turn.done.post();
                }
            });
            let turn = receiver.clone();
            spawn(move || {
                loop {
                    there.receive(page().len())?;
                    there.receive(sync().len())?;
                    turn.done.post();
                    turn.go.wait();
                }
            });
        }
        let (main, mut there) = pair(transport)?;
        spawn(move || {
            loop {
                there.receive(FLUSH.len())?;
                destination.iter().for_each(|turn| turn.done.wait());
                destination.iter().for_each(|turn| turn.go.post());
                there.send(&ACKNOWLEDGEMENT)?;
            }
        });
        Ok(InTurn { channels: source, main })
    }

    fn round(&mut self) -> std::io::Result<Took> {
        let first = Instant::now();
        self.channels.iter().for_each(|turn| turn.go.post());
        let begun = Instant::now();
        self.channels.iter().for_each(|turn| turn.go.post());
        self.channels.iter().for_each(|turn| turn.done.wait());
        self.main.send(&FLUSH)?;
        let stalled = begun.elapsed();
        self.main.receive(ACKNOWLEDGEMENT.len())?;
        Ok(Took { round: first.elapsed(), acknowledged: begun.elapsed(), stalled })
    }
}

/// The least that threads and sockets take: the same bytes, and nobody waits for the others.
struct NoBarrier {
    opened: Arc<(Mutex<u64>, Condvar)>,
    main: Socket,
}

impl NoBarrier {
    fn start(transport: &str, channels: u8) -> Outcome<NoBarrier> {
        let opened = Arc::<(Mutex<u64>, Condvar)>::default();
        let (main, there) = pair(transport)?;
        let (there, received) = (Arc::new(Mutex::new(there)), Arc::<AtomicU64>::default());
        for _ in 0..channels {
            let (mut here, mut to) = pair(transport)?;
            let opened = opened.clone();
            spawn(move || {
                for round in 0.. {
                    let (count, changed) = &*opened;
                    let mut open = count.lock().unwrap_or_else(PoisonError::into_inner);
                    while *open == round {
                        open = changed.wait(open).unwrap_or_else(PoisonError::into_inner);
                    }
                    drop(open);
                    here.send(&page())?;
                    here.send(&sync())?;
                }
                Ok(())
            });
            let (there, received) = (there.clone(), received.clone());
            spawn(move || {
                loop {
                    to.receive(page().len())?;
                    to.receive(sync().len())?;
                    if (received.fetch_add(1, Ordering::AcqRel) + 1) % u64::from(channels) == 0 {
                        there.lock().unwrap_or_else(PoisonError::into_inner).send(&ACKNOWLEDGEMENT)?;
                    }
                }
            });
        }
        Ok(NoBarrier { opened, main })
    }

    fn round(&mut self) -> std::io::Result<Took> {
        let begun = Instant::now();
        *self.opened.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.opened.1.notify_all();
        let stalled = begun.elapsed();
        self.main.receive(ACKNOWLEDGEMENT.len())?;
        let acknowledged = begun.elapsed();
        Ok(Took { round: acknowledged, acknowledged, stalled })
    }
}

/// Runs `forever` until its connection ends with the process.
fn spawn(forever: impl FnOnce() -> std::io::Result<()> + Send + 'static) {
    thread::spawn(|| drop(forever()));
}

/// A packet with one page.
fn page() -> Vec<u8> {
    vec![1; packet::header_len(PAGE) + PAGE]
}

/// A packet without pages.
fn sync() -> Vec<u8> {
    vec![2; packet::header_len(PAGE)]
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Socket::Tcp(stream) => stream.write_all(bytes),
            Socket::Unix(stream) => stream.write_all(bytes),
        }
    }

    fn receive(&mut self, len: usize) -> std::io::Result<()> {
        let mut bytes = [0; 16 * 1024];
        match self {
            Socket::Tcp(stream) => stream.read_exact(&mut bytes[..len]),
            Socket::Unix(stream) => stream.read_exact(&mut bytes[..len]),
        }
    }
}

fn pair(transport: &str) -> Outcome<(Socket, Socket)> {
    match transport {
        "unix" => {
            let (here, there) = UnixStream::pair()?;
            Ok((Socket::Unix(here), Socket::Unix(there)))
        }
        "tcp" => {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let here = TcpStream::connect(listener.local_addr()?)?;
            let (there, _) = listener.accept()?;
            here.set_nodelay(true)?;
            there.set_nodelay(true)?;
            Ok((Socket::Tcp(here), Socket::Tcp(there)))
        }
        other => Err(format!("transport {other}").into()),
    }
}

const PAGE: usize = 4096;
/// A RAM word with no page.
const FLUSH: [u8; 8] = [0; 8];
const ACKNOWLEDGEMENT: [u8; 1] = [0];
/// Rounds of one scheme in a row.
const TURN: usize = 50;
