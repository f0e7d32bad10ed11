//! A long wire: a network namespace whose two addresses see each other at a distance, over a link of limited rate.
//!
//! Both addresses are this namespace's own, but what one sends to the other is routed into a TUN device, from which a thread of
//! this process takes each packet and puts it back when its time has come. So connections are the kernel's own TCP at every
//! point; nothing but the wire is made up. (The kernel's `netem` does the same where it is built in; not every one has it.)

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::samples::Samples;

/// Where sources are.
const NEAR: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
/// Where destinations listen.
pub const FAR: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// What the wire is like.
#[derive(Clone, Copy, Debug)]
pub struct Wire {
    /// There and back.
    pub round_trip: Duration,
    /// Bits per second, headers of IP and TCP with them.
    pub rate: f64,
}

impl Wire {
    /// Lays it in this namespace, for as long as this process lives.
    ///
    /// # Errors
    /// This is not a namespace of its own, or it has no TUN devices.
    pub fn lay(self) -> Result<(), String> {
        let devices = fs::read_to_string("/proc/net/dev").map_err(|error| error.to_string())?;
        if devices.lines().skip(2).any(|line| !line.trim_start().starts_with("lo:")) {
            return Err("not inside a network namespace of its own".to_owned());
        }
        let device = open().map_err(|error| format!("/dev/net/tun: {error}"))?;
        configure()?;
        let device = Arc::new(device);
        let directions = [NEAR, FAR].map(|to| {
            let (queue, packets) = mpsc::channel::<(Instant, Vec<u8>)>();
            let device = device.clone();
            thread::spawn(move || deliver(&device, &packets));
            Direction { to, queue, free: Instant::now() }
        });
        thread::spawn(move || self.carry(&device, directions));
        Ok(())
    }

    /// Takes packets from the device and gives each its time of arrival.
    fn carry(self, device: &File, mut directions: [Direction; 2]) {
        let mut packet = vec![0; 1 << 16];
        loop {
            let mut device = device;
            // The device goes when the process does.
            let Ok(len) = device.read(&mut packet) else { return };
            let packet = &packet[..len];
            let Some(&[a, b, c, d]) = packet.get(16..20).and_then(|to| to.first_chunk::<4>()) else { continue };
            if packet[0] >> 4 != 4 {
                continue;
            }
            let to = Ipv4Addr::new(a, b, c, d);
            let Some(direction) = directions.iter_mut().find(|direction| direction.to == to) else { continue };
            let now = Instant::now();
            let begins = direction.free.max(now);
            if begins - now > QUEUE {
                // The queue before the link is full, as that of a router.
                continue;
            }
            direction.free = begins + Duration::from_secs_f64(len as f64 * 8.0 / self.rate);
            let arrives = direction.free + self.round_trip / 2;
            // The other thread lives as long as this one.
            let _ = direction.queue.send((arrives, packet.to_vec()));
        }
    }
}

/// How long a connection over the wire takes to be made, in milliseconds: a round trip.
pub fn round_trip_ms() -> Result<f64, String> {
    let connect = || -> std::io::Result<f64> {
        let listener = TcpListener::bind((FAR, 0))?;
        let at = listener.local_addr()?;
        let begun = Instant::now();
        TcpStream::connect_timeout(&at, Duration::from_secs(5))?;
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    };
    let mut samples = Samples::default();
    for _ in 0..5 {
        samples.push(connect().map_err(|error| format!("over the wire: {error}"))?);
    }
    Ok(samples.median())
}

/// One of the two directions.
struct Direction {
    to: Ipv4Addr,
    queue: mpsc::Sender<(Instant, Vec<u8>)>,
    /// When the link has sent all that is queued.
    free: Instant,
}

/// Puts each packet back when its time has come; they are in order.
fn deliver(device: &File, packets: &mpsc::Receiver<(Instant, Vec<u8>)>) {
    for (arrives, packet) in packets {
        thread::sleep(arrives.saturating_duration_since(Instant::now()));
        let mut device = device;
        // A packet that the kernel does not take is lost, as on any wire.
        let _ = device.write(&packet);
    }
}

/// Opens a new TUN device, of packets without a header.
#[allow(unsafe_code)]
fn open() -> std::io::Result<File> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // struct ifreq: 16 bytes of name, then the flags.
    let mut request = [0u8; 40];
    request[..DEVICE.len()].copy_from_slice(DEVICE.as_bytes());
    request[16..18].copy_from_slice(&(IFF_TUN | IFF_NO_PI).to_ne_bytes());
    // SAFETY: the opcode takes a `struct ifreq`, which has 40 bytes, and is answered with one.
    let set = unsafe { rustix::ioctl::Updater::<TUNSETIFF, _>::new(&mut request) };
    // SAFETY: as above; the request lives until the call returns, which is all the time that the kernel has it.
    unsafe { rustix::ioctl::ioctl(&device, set) }?;
    Ok(device)
}

/// Has the two addresses see each other through the device only.
fn configure() -> Result<(), String> {
    let near = NEAR.to_string();
    let far = FAR.to_string();
    for setting in ["all/accept_local", "wire/accept_local", "all/rp_filter", "wire/rp_filter"] {
        let value = if setting.ends_with("accept_local") { "1" } else { "0" };
        let path = format!("/proc/sys/net/ipv4/conf/{setting}");
        fs::write(&path, value).map_err(|error| format!("{path}: {error}"))?;
    }
    for arguments in [
        "link set dev lo up".to_owned(),
        format!("link set dev {DEVICE} mtu 1500 txqueuelen 20000 up"),
        format!("addr add {near}/32 dev {DEVICE}"),
        format!("addr add {far}/32 dev {DEVICE}"),
        format!("route add {far} dev {DEVICE} src {near} table 100"),
        format!("route add {near} dev {DEVICE} src {far} table 100"),
        // What this host sends itself is not looked up among its own addresses first; what arrives is.
        "rule add pref 10 iif lo to 10.9.0.0/24 lookup 100".to_owned(),
        "rule add pref 100 lookup local".to_owned(),
        "rule del pref 0".to_owned(),
    ] {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let output = Command::new("ip").args(&arguments).output().map_err(|error| format!("ip: {error}"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("ip {}: {}", arguments.join(" "), said.trim()));
        }
    }
    Ok(())
}

const DEVICE: &str = "wire";
/// `_IOW('T', 202, int)`
const TUNSETIFF: rustix::ioctl::Opcode = 0x4004_54ca;
const IFF_TUN: u16 = 0x0001;
const IFF_NO_PI: u16 = 0x1000;
/// What waits longer for the link is lost.
const QUEUE: Duration = Duration::from_millis(50);
