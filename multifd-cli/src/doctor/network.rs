//! What connections get.

use multifd::host::LOCAL_SOCKET_BUFFER;

use super::{Asked, Check, settings::Settings};

/// How far buffers of TCP connections to other hosts grow: what one connection carries in a round trip.
pub fn tcp_buffers(settings: &Settings<'_>) -> Check {
    const NAME: &str = "tcp-buffers";
    let read = |file: &str| settings.numbers::<3>(&format!("proc/sys/net/ipv4/{file}"));
    let (send, receive) = match (read("tcp_wmem"), read("tcp_rmem")) {
        (Ok([.., send]), Ok([.., receive])) => (send, receive),
        (Err(error), _) | (_, Err(error)) => return error.check(NAME),
    };
    // Half of a buffer is the kernel's own account.
    let in_flight = send.min(receive) / 2;
    let milliseconds = CHANNELS * in_flight * 1000 / LINK;
    let found = format!(
        "up to {send} bytes to send and {receive} to receive: {CHANNELS} channels fill 10 Gbit/s up to a round trip of \
         {milliseconds} ms"
    );
    if milliseconds >= ROUND_TRIP {
        return Check::ok(NAME, found);
    }
    let enough = (ROUND_TRIP * LINK / 1000 / CHANNELS * 2).next_power_of_two();
    let sysctl = |name: &str, most: u64| {
        (most < enough).then(|| format!("raise the third number of net.ipv4.{name} to {enough}"))
    };
    let advice: Vec<String> = [sysctl("tcp_wmem", send), sysctl("tcp_rmem", receive)].into_iter().flatten().collect();
    Check::warning(NAME, found, format!("{}, or use more channels", advice.join(" and ")))
}

/// What connections within one host get, which have buffers of a fixed size.
pub fn local_buffers(settings: &Settings<'_>) -> Check {
    const NAME: &str = "local-buffers";
    let read = |file: &str| settings.number(&format!("proc/sys/net/core/{file}"));
    let least = match (read("wmem_max"), read("rmem_max")) {
        (Ok(send), Ok(receive)) => send.min(receive),
        (Err(error), _) | (_, Err(error)) => return error.check(NAME),
    };
    let found = format!("{} of {} KiB for connections within this host", least.min(WANTED) >> 10, WANTED >> 10);
    if least >= WANTED / 2 {
        return Check::ok(NAME, found);
    }
    Check::warning(NAME, found, format!("sysctl net.core.wmem_max={WANTED} net.core.rmem_max={WANTED}"))
}

/// How many connections may wait to be accepted: all channels connect at once.
pub fn listen_queue(settings: &Settings<'_>) -> Check {
    const NAME: &str = "listen-queue";
    match settings.number("proc/sys/net/core/somaxconn") {
        Ok(most) if most >= CONNECTIONS => {
            Check::ok(NAME, format!("{most} connections: enough for 255 channels at once"))
        }
        Ok(most) => Check::warning(
            NAME,
            format!("{most} connections: of more channels than that some are dialed again"),
            format!("sysctl net.core.somaxconn={SOMAXCONN}"),
        ),
        Err(error) => error.check(NAME),
    }
}

/// Sockets between a VM and its host.
pub fn vsock(asked: &Asked) -> Check {
    const NAME: &str = "vsock";
    match &asked.vsock {
        Ok(()) => Check::ok(NAME, "there are sockets for vsock: addresses"),
        Err(why) => Check::warning(
            NAME,
            format!("no sockets for vsock: addresses: {why}"),
            "modprobe vhost_vsock at a host, vmw_vsock_virtio_transport in a VM; nothing else needs it",
        ),
    }
}

/// 10 Gbit/s, in bytes per second.
const LINK: u64 = 1_250_000_000;

/// What a source uses by itself.
const CHANNELS: u64 = 4;

/// Between two hosts of one site, in milliseconds; generous.
const ROUND_TRIP: u64 = 5;

const WANTED: u64 = LOCAL_SOCKET_BUFFER as u64;

/// Main and 255 channels.
const CONNECTIONS: u64 = 256;

/// What Linux has by itself.
const SOMAXCONN: u64 = 4096;
