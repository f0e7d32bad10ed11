//! The devices: a serial port, one that writes guest memory, and one with much state.

use std::{
    collections::BTreeSet,
    io::Write,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use vm_memory::{Bytes, GuestAddress};

use crate::{Failure, gate::Gate, guest, memory::Memory};

/// What the guest writes there goes to stdout.
#[derive(Default)]
pub struct Serial {
    /// Characters written in the VM's life, on whichever host.
    pub written: AtomicU64,
}

impl Serial {
    /// Its only register.
    pub const PORT: u16 = 0x3f8;

    /// The guest writes.
    pub fn write(&self, bytes: &[u8]) {
        self.written.fetch_add(bytes.len() as u64, Relaxed);
        if cfg!(test) {
            // The tests in this process would bury their own output.
            return;
        }
        let mut out = std::io::stdout().lock();
        // A console that is gone is no reason to stop the guest.
        let _ = out.write_all(bytes).and_then(|()| out.flush());
    }
}

/// Writes numbers into guest memory, as a disk or a network card writes what it has read. Its state is how many.
pub struct Dma {
    memory: Memory,
    written: Arc<Mutex<u64>>,
}

impl Dma {
    /// The device, whose thread waits at `gate`.
    pub fn new(memory: &Memory, gate: &Arc<Gate>) -> Result<Dma, Failure> {
        let written = Arc::new(Mutex::new(0));
        gate.add_thread();
        std::thread::Builder::new().name("dma".to_owned()).spawn({
            let (memory, written, gate) = (memory.clone(), written.clone(), gate.clone());
            move || {
                while gate.pass() {
                    while gate.is_open() {
                        let mut written = written.lock().unwrap_or_else(PoisonError::into_inner);
                        // `vm-memory` marks the page after it has written there.
                        if let Err(error) = memory.write_obj(*written + 1, page(*written)) {
                            eprintln!("dma: {error}");
                        }
                        *written += 1;
                        drop(written);
                        std::thread::sleep(Duration::from_micros(200));
                    }
                }
                gate.leave();
            }
        })?;
        Ok(Dma { memory: memory.clone(), written })
    }

    /// How many numbers were written. The VM is paused.
    pub fn state(&self) -> u64 {
        *self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the state over. The pages are there already; each has to hold the last number that was written to it.
    pub fn load(&self, state: u64) -> Result<(), Failure> {
        for number in state.saturating_sub(PAGES)..state {
            let found: u64 = self.memory.read_obj(page(number))?;
            if found != number + 1 {
                return Err(format!("the DMA device wrote {} to a page that holds {found}", number + 1).into());
            }
        }
        *self.written.lock().unwrap_or_else(PoisonError::into_inner) = state;
        Ok(())
    }
}

/// Where number `number` goes.
fn page(number: u64) -> GuestAddress {
    GuestAddress(guest::DMA + number % PAGES * 4096)
}

const PAGES: u64 = 16;

/// Much state: a picture that is not in guest memory, and that is painted while the guest runs.
pub struct Display {
    screen: Arc<Mutex<Screen>>,
}

struct Screen {
    picture: Vec<u8>,
    /// Dots painted in the VM's life, each beside the one before.
    painted: u64,
    /// The tiles that were painted since they were last asked for.
    changed: BTreeSet<usize>,
}

impl Display {
    /// A picture of `bytes` bytes, whose thread waits at `gate`.
    pub fn new(bytes: usize, gate: &Arc<Gate>) -> Result<Display, Failure> {
        let picture = (0..bytes).map(dots(bytes, 0)).collect();
        let screen = Arc::new(Mutex::new(Screen { picture, painted: 0, changed: BTreeSet::new() }));
        gate.add_thread();
        std::thread::Builder::new().name("display".to_owned()).spawn({
            let (screen, gate) = (screen.clone(), gate.clone());
            move || {
                while gate.pass() {
                    while gate.is_open() {
                        lock(&screen).paint();
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
                gate.leave();
            }
        })?;
        Ok(Display { screen })
    }

    /// The state: of `all` tiles, or of those that have changed since the last call.
    pub fn state(&self, all: bool) -> Vec<u8> {
        let mut screen = lock(&self.screen);
        let changed = std::mem::take(&mut screen.changed);
        let tiles: Vec<usize> = if all { (0..screen.tiles()).collect() } else { changed.into_iter().collect() };
        let mut state = Vec::with_capacity(16 + tiles.len() * (8 + TILE));
        state.extend(screen.painted.to_le_bytes());
        state.extend((screen.picture.len() as u64).to_le_bytes());
        for tile in tiles {
            state.extend((tile as u64).to_le_bytes());
            state.extend(&screen.picture[screen.tile(tile)]);
        }
        state
    }

    /// Takes the tiles over that have changed since the last call, and verifies each dot of them.
    pub fn load(&self, state: &[u8]) -> Result<(), Failure> {
        let screen = &mut *lock(&self.screen);
        let (painted, state) = number(state)?;
        let (bytes, mut state) = number(state)?;
        let ours = screen.picture.len();
        if bytes != ours as u64 {
            return Err(format!("the source's display has {bytes} bytes, this one {ours}").into());
        }
        let (mut came, expected) = (BTreeSet::new(), dots(ours, painted));
        while !state.is_empty() {
            let (tile, dots) = number(state)?;
            let tile =
                usize::try_from(tile).ok().filter(|tile| *tile < screen.tiles()).ok_or("there is no such tile")?;
            let range = screen.tile(tile);
            let (dots, rest) = dots.split_at_checked(range.len()).ok_or("a tile has fewer dots than it should")?;
            if let Some(at) = range.clone().zip(dots).position(|(at, &found)| found != expected(at)) {
                return Err(format!("dot {at} of tile {tile} is wrong").into());
            }
            screen.picture[range].copy_from_slice(dots);
            came.insert(tile);
            state = rest;
        }
        let since = screen.painted..painted;
        let missing = since.take(ours).map(|dot| (dot % ours as u64) as usize / TILE).find(|tile| !came.contains(tile));
        if let Some(tile) = missing {
            return Err(format!("tile {tile} was painted, and did not come").into());
        }
        screen.painted = painted;
        Ok(())
    }
}

impl Screen {
    fn paint(&mut self) {
        let Some(at) = self.painted.checked_rem(self.picture.len() as u64) else { return };
        self.picture[at as usize] = self.picture[at as usize].wrapping_add(1);
        self.changed.insert(at as usize / TILE);
        self.painted += 1;
    }

    fn tiles(&self) -> usize {
        self.picture.len().div_ceil(TILE)
    }

    /// Its dots.
    fn tile(&self, tile: usize) -> Range<usize> {
        tile * TILE..((tile + 1) * TILE).min(self.picture.len())
    }
}

/// What the dots of a picture of `bytes` bytes are when `painted` dots were painted.
fn dots(bytes: usize, painted: u64) -> impl Fn(usize) -> u8 {
    let (rounds, next) = if bytes == 0 { (0, 0) } else { (painted / bytes as u64, painted % bytes as u64) };
    move |at| {
        let times = (rounds as u8).wrapping_add(u8::from((at as u64) < next));
        ((at * 31 + at / 4093) as u8).wrapping_add(times)
    }
}

/// The number that `state` begins with, and the rest of it.
fn number(state: &[u8]) -> Result<(u64, &[u8]), Failure> {
    let (number, rest) = state.split_first_chunk().ok_or("the state ends within a number")?;
    Ok((u64::from_le_bytes(*number), rest))
}

fn lock(screen: &Mutex<Screen>) -> MutexGuard<'_, Screen> {
    screen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What of the picture is sent together, in bytes.
const TILE: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn display(bytes: usize) -> Display {
        Display::new(bytes, &Arc::default()).unwrap()
    }

    #[test]
    fn a_picture_arrives_in_parts_and_what_is_missing_or_wrong_is_found() {
        const BYTES: usize = 2 * TILE + 5;
        let (here, there) = (display(BYTES), display(BYTES));
        let paint = |dots| (0..dots).for_each(|_| lock(&here.screen).paint());
        paint(TILE);
        there.load(&here.state(true)).unwrap();
        paint(9);
        let changed = here.state(false);
        assert_eq!(changed.len(), 16 + 8 + TILE, "one tile");
        let untold = there.load(&changed[..16]).unwrap_err().to_string();
        assert_eq!(untold, "tile 1 was painted, and did not come");
        let mut wrong = changed.clone();
        wrong[16 + 8 + 9] ^= 1;
        assert_eq!(there.load(&wrong).unwrap_err().to_string(), "dot 9 of tile 1 is wrong");
        for cut in 0..24 {
            assert!(there.load(&changed[..cut]).is_err(), "{cut}");
        }
        there.load(&changed).unwrap();
        assert!(lock(&here.screen).picture == lock(&there.screen).picture);
        let mut far = changed;
        far[16..24].fill(0xff);
        assert_eq!(there.load(&far).unwrap_err().to_string(), "there is no such tile");
        assert!(display(BYTES + 1).load(&here.state(true)).is_err());
        display(0).load(&display(0).state(true)).unwrap();
    }
}
