//! QEMU's guest at a given write rate: a boot sector that counts after each page, and how long its counting takes.

use std::time::Duration;

use qemu_peer::{BootGuest, Memory};

use super::{Bench, qemu};

/// How long the guest takes for a page, in seconds: a part that is always the same, and one for each count.
pub struct Pace {
    page: f64,
    count: f64,
}

impl Pace {
    /// Measures it under TCG on this machine.
    pub fn measure(bench: &Bench) -> Result<Pace, String> {
        let [few, many] = [5_000u32, 100_000].map(|delay| -> Result<f64, String> {
            let guest = rewriting(64).slowed(delay);
            let mut source = qemu::Source::running(bench, 512, Memory::Anonymous, Some(guest))?;
            written_once(&mut source)?;
            Ok(4096.0 / source.write_rate(guest, Duration::from_secs(2))?)
        });
        let (few, many) = (few?, many?);
        let count = (many - few) / 95_000.0;
        eprintln!("QEMU's guest: {few:.3e} s a page counting to 5,000, {many:.3e} s counting to 100,000");
        Ok(Pace { page: few - 5_000.0 * count, count })
    }

    /// A guest that rewrites `mib` MiB at about `rate` bytes per second.
    pub fn guest(&self, mib: u32, rate: f64) -> BootGuest {
        let delay = (((4096.0 / rate) - self.page) / self.count).max(0.0) as u32;
        rewriting(mib).slowed(delay)
    }
}

/// Waits until the guest has written its memory once.
pub fn written_once(source: &mut qemu::Source) -> Result<(), String> {
    source.qemu().wait_passes(1, Duration::from_secs(120)).map(drop).map_err(|error| error.to_string())
}

/// The guest that rewrites `mib` MiB from its second on.
fn rewriting(mib: u32) -> BootGuest {
    BootGuest::new(1 << 20..(1 + mib) << 20)
}
