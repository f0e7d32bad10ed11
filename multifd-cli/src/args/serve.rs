//! Options of `multifd serve`.

use std::{num::NonZeroU32, path::PathBuf, time::Duration};

use clap::Args;
use multifd::transport::uri::Uri;

use super::{
    MIGRATION,
    listen::AllowArgs,
    observe::ObserveArgs,
    origin::{Origin, meeting_place},
    output::OutputArgs,
    postcopy::PrefetchWhen,
    tls::TlsArgs,
    values::uuid,
};
use crate::units::{self, Limit};

/// Options of `multifd serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The checkpoint, which has to stay as it is: of multifd receive, or a mapped-ram migration file of QEMU.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Where clients connect: tcp:HOST:PORT, unix:PATH, vsock:CID:PORT, fd:N for an inherited socket that listens, systemd or systemd:NAME for one of systemd's. Each connection is one VM: the
    /// process that starts a QEMU opens it and passes it on (-incoming fd:N, capability postcopy-ram on). A process that can connect gets the
    /// memory: prefer a unix socket in a directory of your own.
    #[arg(long, value_name = "URI", value_parser = meeting_place, help_heading = MIGRATION)]
    pub listen: Origin,
    /// End when so many clients have come and gone [default: at an interrupt].
    #[arg(long, value_name = "N", help_heading = MIGRATION)]
    pub clients: Option<NonZeroU32>,
    /// How many clients are served at a time; more are refused.
    #[arg(long, value_name = "N", default_value = "64", value_parser = max_clients, help_heading = MIGRATION)]
    pub max_clients: usize,
    /// How long, after an interrupt, VMs that run already may take to get the rest of their memory. A second interrupt ends
    /// at once.
    #[arg(long, value_name = "TIME", default_value = "1min", value_parser = units::time, help_heading = MIGRATION)]
    pub finish_timeout: Duration,
    /// How long a client may take nothing before it is given up; 0 for no limit.
    #[arg(long, value_name = "TIME", default_value = "2min", value_parser = units::time_limit, help_heading = MIGRATION)]
    pub stall_timeout: Limit<Duration>,
    /// Bytes per second for each client in the background; pages that its guest waits for do not wait [default: no limit].
    #[arg(long, value_name = "RATE", value_parser = units::rate_limit, help_heading = MIGRATION)]
    pub max_bandwidth: Option<Limit<u64>>,
    /// UUID of the VM, which a QEMU started with -uuid compares with its own [default: the one in FILE, or none].
    #[arg(long, value_name = "UUID", value_parser = uuid, help_heading = MIGRATION)]
    pub uuid: Option<[u8; 16]>,
    /// Send the pages that this file lists first, in its order. multifd send --record-faults writes one.
    #[arg(long, value_name = "LIST", help_heading = MIGRATION)]
    pub prefetch: Option<PathBuf>,
    /// Whether they are sent before the guest resumes or right after it.
    #[arg(long, value_enum, requires = "prefetch", default_value_t = PrefetchWhen::default(), value_name = "WHEN",
        help_heading = MIGRATION)]
    pub prefetch_when: PrefetchWhen,
    /// The directory for the notes that a VM was handed over, one for each client, for multifd send --recover; removed when it
    /// has everything [default: where FILE is].
    #[arg(long, value_name = "DIR", help_heading = MIGRATION)]
    pub state: Option<PathBuf>,
    /// The connections. In each of them the QEMU is the server, and has to be there within 30 s.
    #[command(flatten)]
    pub tls: TlsArgs,
    /// Not possible: QEMU takes one connection through fd:N, and --preempt needs two.
    #[arg(long, hide = true)]
    pub preempt: bool,
    /// Who may connect.
    #[command(flatten)]
    pub allow: AllowArgs,
    /// What looks on. Metrics are of all clients together; so is the report, with a row for each.
    #[command(flatten)]
    pub observe: ObserveArgs,
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

impl ServeArgs {
    /// # Errors
    /// What was expected, for clap.
    pub(super) fn check(&self) -> Result<(), String> {
        if !matches!(self.listen, Origin::Systemd(_)) {
            self.allow.check(self.listen.address())?;
        }
        if self.preempt {
            return Err(
                "a QEMU takes one connection through '-incoming fd:N', and refuses postcopy-preempt there; expected \
                        'multifd send FILE URI --postcopy --preempt --clone' for a VM that needs it"
                    .to_owned(),
            );
        }
        if self.tls.tls_verify_peer.is_some() {
            return Err(
                "the option '--tls-verify-peer' is for the end where a migration arrives, which is the QEMU of each \
                        client; expected none here"
                    .to_owned(),
            );
        }
        match (&self.tls.tls_dir, &self.tls.tls_hostname, self.listen.address()) {
            (Some(_), None, Some(uri @ (Uri::Unix(_) | Uri::Vsock { .. }))) => Err(format!(
                "{uri} names no host of its clients; expected '--tls-hostname NAME', which their certificates are for"
            )),
            _ => Ok(()),
        }
    }
}

/// Each has three threads.
fn max_clients(text: &str) -> Result<usize, String> {
    let clients = text.parse().ok().filter(|clients| (1..=MAX_CLIENTS).contains(clients));
    clients.ok_or_else(|| format!("expected a number from 1 to {MAX_CLIENTS}"))
}

const MAX_CLIENTS: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_served_is_taken() {
        assert_eq!(max_clients("1"), Ok(1));
        assert_eq!(max_clients("4096"), Ok(4096));
        for wrong in ["0", "4097", "-1", "many", ""] {
            assert!(max_clients(wrong).unwrap_err().contains("1 to 4096"), "{wrong}");
        }
        for right in ["tcp:127.0.0.1:0", "unix:/tmp/s", "fd:3", "systemd", "systemd:vms"] {
            assert_eq!(meeting_place(right).unwrap().to_string(), right);
        }
        for wrong in ["file:/tmp/s", "nonsense"] {
            assert!(meeting_place(wrong).unwrap_err().contains("expected"), "{wrong}");
        }
    }
}
