//! The devices: a serial port, one that writes guest memory, and one with much state.

use std::{
    io::Write,
    sync::{
        Arc, Mutex, PoisonError,
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

/// Much state: a picture that is not in guest memory.
pub struct Display {
    pub picture: Vec<u8>,
}

impl Display {
    /// A picture of `bytes` bytes.
    pub fn new(bytes: usize) -> Display {
        Display { picture: (0..bytes).map(Display::dot).collect() }
    }

    /// Takes a picture over.
    pub fn load(&mut self, picture: Vec<u8>) -> Result<(), Failure> {
        if picture.len() != self.picture.len() {
            let (theirs, ours) = (picture.len(), self.picture.len());
            return Err(format!("the source's display has {theirs} bytes, this one {ours}").into());
        }
        // The guest waits: each display has the same picture, so this compares memory and paints nothing.
        if picture != self.picture {
            let at = picture.iter().zip(&self.picture).position(|(theirs, ours)| theirs != ours);
            return Err(format!("byte {} of the picture is wrong", at.unwrap_or_default()).into());
        }
        self.picture = picture;
        Ok(())
    }

    fn dot(at: usize) -> u8 {
        (at * 31 + at / 4093) as u8
    }
}
