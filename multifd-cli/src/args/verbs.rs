//! The options of each verb.

use std::{num::NonZeroU8, path::PathBuf, time::Duration};

use clap::{Args, ValueEnum};
use multifd::{checkpoint::DirectWrites, source, transport::uri::Uri};

use super::{
    MIGRATION,
    link::LinkArgs,
    listen::ListenArgs,
    machine::MachineArgs,
    observe::ObserveArgs,
    origin::{Incoming, Origin, incoming_origin, incoming_uri},
    output::OutputArgs,
    postcopy::PostcopyArgs,
    transfer::{Compression, TransferArgs},
    values::{channels, destination_uri, host, unix_uri, uuid},
};
use crate::units;

/// Options of `multifd demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// The guest that moves.
    #[command(flatten)]
    pub machine: MachineArgs,
    /// What connects the two processes.
    #[arg(long, value_enum, default_value_t = Transport::Tcp, help_heading = MIGRATION)]
    pub transport: Transport,
    /// Address for tcp, IPv6 in brackets [default: 127.0.0.1].
    #[arg(long, value_name = "HOST", value_parser = host, help_heading = MIGRATION)]
    pub address: Option<String>,
    /// Use IPv6: the same as `--address '[::1]'`.
    #[arg(long, conflicts_with = "address", help_heading = MIGRATION)]
    pub ipv6: bool,
    /// How long the guest runs before it is migrated.
    #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = units::time, help_heading = MIGRATION)]
    pub after: Duration,
    /// Do not compare every page of both sides while the guest is paused.
    #[arg(long, help_heading = MIGRATION)]
    pub no_verify: bool,
    /// Check at the destination that no page is written from an older round than it already holds; if one is, exit with
    /// status 6.
    #[arg(long, help_heading = MIGRATION)]
    pub audit: bool,
    /// How to migrate.
    #[command(flatten)]
    pub transfer: TransferArgs,
    /// What looks on.
    #[command(flatten)]
    pub observe: ObserveArgs,
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

impl DemoArgs {
    /// # Errors
    /// What was expected, for clap.
    pub(super) fn check(&self) -> Result<(), String> {
        self.machine.check()?;
        self.transfer.check()?;
        match (self.transport, &self.address, self.ipv6) {
            (Transport::Unix, Some(_), _) => Err(no_address("--address <HOST>")),
            (Transport::Unix, None, true) => Err(no_address("--ipv6")),
            _ => Ok(()),
        }
    }
}

fn no_address(option: &str) -> String {
    format!("the option '{option}' has no effect on unix sockets; expected '--transport tcp' with it")
}

/// Options of `multifd guest`.
#[derive(Debug, Args)]
pub struct GuestArgs {
    /// Wait for a guest at this address, and run it; defer: at the one that QMP's migrate-incoming names.
    #[arg(long, value_name = "URI", value_parser = incoming_uri, conflicts_with_all = ["migrate_to", "after"],
        help_heading = MIGRATION)]
    pub incoming: Option<Incoming<Uri>>,
    /// Migrate the guest there; given several times, the next is tried when one fails.
    #[arg(long, value_name = "URI", value_parser = destination_uri, help_heading = MIGRATION)]
    pub migrate_to: Vec<Uri>,
    /// How long the guest runs before it is migrated.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = units::time, requires = "migrate_to",
        help_heading = MIGRATION)]
    pub after: Duration,
    /// How long the guest runs here after it has arrived, or could not be migrated [default: until interrupted after it
    /// has arrived, 1s when it could not be migrated].
    #[arg(long, value_name = "TIME", value_parser = units::time, help_heading = MIGRATION)]
    pub run_for: Option<Duration>,
    /// Be driven there as a QEMU by its monitor (QMP).
    #[arg(long, value_name = "unix:PATH", value_parser = unix_uri, help_heading = MIGRATION)]
    pub qmp: Option<Uri>,
    /// Check while the guest arrives that no page is written from an older round than it already holds; if one is, exit with
    /// status 6.
    #[arg(long, requires = "incoming", help_heading = MIGRATION)]
    pub audit: bool,
    /// Send digests of all pages while the guest is paused, for the destination to compare.
    #[arg(long, help_heading = MIGRATION)]
    pub verify: bool,
    /// The guest.
    #[command(flatten)]
    pub machine: MachineArgs,
    /// How to migrate.
    #[command(flatten)]
    pub transfer: TransferArgs,
    /// Who may bring a guest.
    #[command(flatten)]
    pub listen: ListenArgs,
    /// What looks on.
    #[command(flatten)]
    pub observe: ObserveArgs,
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
    /// Migrates the guest only after its first pass over its working set, and not before --after.
    #[arg(long, hide = true)]
    pub after_first_pass: bool,
    /// Ends with the process of this id, which reports errors in its place.
    #[arg(long, value_name = "PID", hide = true)]
    pub child_of: Option<i32>,
}

impl GuestArgs {
    /// # Errors
    /// What was expected, for clap.
    pub(super) fn check(&self) -> Result<(), String> {
        self.machine.check()?;
        self.transfer.check()?;
        match &self.incoming {
            // Where it will be is not known yet.
            Some(Incoming::Defer) => {}
            Some(Incoming::At(uri)) => self.listen.allow.check(Some(uri))?,
            None => self.listen.allow.check(None)?,
        }
        match (&self.incoming, &self.qmp) {
            (Some(Incoming::Defer), None) => Err(no_monitor("--incoming defer")),
            _ => Ok(()),
        }
    }
}

fn no_monitor(option: &str) -> String {
    format!("nothing can say where the guest comes from; expected '--qmp unix:PATH' with '{option}'")
}

/// Options of `multifd receive`.
#[derive(Debug, Args)]
pub struct ReceiveArgs {
    /// Where the source is: tcp:HOST:PORT, unix:PATH or vsock:CID:PORT to wait for it (TCP's port 0 picks a free one), fd:N for an inherited
    /// socket or pipe, systemd or systemd:NAME for a socket that systemd listens at, - for the standard input, file:PATH[,offset=N] for a file or FIFO.
    /// What is neither one of these three nor a listening socket is one connection, which takes only a migration without multifd; a pipe or file has no way back to the source.
    /// defer: the one that QMP's migrate-incoming names.
    #[arg(value_name = "URI", value_parser = incoming_origin, allow_hyphen_values = true)]
    pub from: Incoming<Origin>,
    /// The checkpoint, a mapped-ram migration file; it gets its name when it is complete and on disk.
    #[arg(short = 'o', short_alias = 'f', long = "output", value_name = "FILE")]
    pub file: PathBuf,
    /// Replace FILE if it exists, when the new one is complete.
    #[arg(long)]
    pub force: bool,
    /// Report the SHA-256 of each RAM block.
    #[arg(long)]
    pub digest: bool,
    /// Check that no page is written from an older round than it already holds; if one is, exit with
    /// status 6.
    #[arg(long)]
    pub audit: bool,
    /// Whether the file stays out of the page cache. It is written to disk as it comes either way, so that little is left for the pause.
    #[arg(long, value_enum, default_value_t = Direct::Auto, value_name = "WHEN")]
    pub direct: Direct,
    /// Also keep the bytes of each connection, as DIR/main.bin, DIR/ch0.bin, ...
    #[arg(long, value_name = "DIR")]
    pub record: Option<PathBuf>,
    /// Tell the source that it may switch over, as QEMU's capability switchover-ack needs it. Fails a QEMU before 8.1, and
    /// machine types from 11.1 on unless a device asked for it. auto fails no source that does not wait for it.
    #[arg(long, value_enum, default_value_t = ReturnPathAck::Auto, value_name = "WHEN")]
    pub return_path_ack: ReturnPathAck,
    /// Number of connections for pages, 1 to 255 [default: as many as the source opens].
    #[arg(long, value_name = "N", value_parser = channels)]
    pub channels: Option<NonZeroU8>,
    /// Compression that the source is expected to use [default: any].
    #[arg(long, value_enum)]
    pub compression: Option<Compression>,
    /// Be looked at and cancelled there as a QEMU by its monitor (QMP).
    #[arg(long, value_name = "unix:PATH", value_parser = unix_uri)]
    pub qmp: Option<Uri>,
    /// UUID of the VM that is expected; a source with another one is refused [default: any].
    #[arg(long, value_name = "UUID", value_parser = uuid)]
    pub uuid: Option<[u8; 16]>,
    /// When the connections of a source that has switched to postcopy break: how long to keep what came and to listen, so that the
    /// source can go on over new ones (migrate -r, in its monitor). 0 fails at once. Not with --token.
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = units::time)]
    pub recover_timeout: Duration,
    /// The connections.
    #[command(flatten)]
    pub link: LinkArgs,
    /// Who may connect.
    #[command(flatten)]
    pub listen: ListenArgs,
    /// What looks on.
    #[command(flatten)]
    pub observe: ObserveArgs,
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

impl ReceiveArgs {
    /// # Errors
    /// What was expected, for clap.
    pub(super) fn check(&self) -> Result<(), String> {
        match (&self.from, &self.qmp) {
            (Incoming::At(from), _) => self.check_origin(from),
            (Incoming::Defer, None) => Err(no_monitor("receive defer")),
            (Incoming::Defer, Some(_)) => Ok(()),
        }
    }

    /// Whether the other options have a meaning for what comes from `from`.
    ///
    /// # Errors
    /// What was expected.
    pub fn check_origin(&self, from: &Origin) -> Result<(), String> {
        if !matches!(from, Origin::Systemd(_)) {
            self.listen.allow.check(from.address())?;
        }
        match self.channels {
            Some(_) if from.is_one_way() => {
                Err(format!("{from} is one connection, which has no channels; expected no '--channels' with it"))
            }
            _ if from.is_one_way() && self.link.tls.tls_dir.is_some() => {
                Err(format!("{from} has no way back, so no TLS; expected no '--tls-dir' with it"))
            }
            _ => Ok(()),
        }
    }
}

/// Options of `multifd send`.
#[derive(Debug, Args)]
pub struct SendArgs {
    /// The checkpoint: of multifd receive, or a mapped-ram migration file of QEMU.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Where the destination waits: tcp:HOST:PORT, unix:PATH or vsock:CID:PORT.
    #[arg(value_name = "URI", value_parser = destination_uri)]
    pub uri: Uri,
    /// How to send it. Pages of zeros go to the main connection by default, whatever the machine type, because a
    /// QEMU does not write those that it finds in packets.
    #[command(flatten)]
    pub transfer: TransferArgs,
    /// Be looked at and steered there as a QEMU by its monitor (QMP).
    #[arg(long, value_name = "unix:PATH", value_parser = unix_uri, help_heading = MIGRATION)]
    pub qmp: Option<Uri>,
    /// What waits there [default: multifd for the built-in guest or with --token, else qemu].
    #[arg(long, value_enum, help_heading = MIGRATION)]
    pub peer: Option<Peer>,
    /// UUID of the VM, which a QEMU started with -uuid compares with its own. QEMU does not write it into its files
    /// [default: the one in FILE, or none].
    #[arg(long, value_name = "UUID", value_parser = uuid, help_heading = MIGRATION)]
    pub uuid: Option<[u8; 16]>,
    /// FILE lacks memory that its QEMU shared (x-ignore-shared), and the destination maps the same file, unchanged since: send the
    /// rest. Nothing here can tell whether it does; with other memory the guest is lost.
    #[arg(long, conflicts_with_all = ["postcopy", "recover"], help_heading = MIGRATION)]
    pub ignore_shared: bool,
    /// Whether the VM runs before its memory is there.
    #[command(flatten)]
    pub postcopy: PostcopyArgs,
    /// What looks on.
    #[command(flatten)]
    pub observe: ObserveArgs,
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

impl SendArgs {
    /// # Errors
    /// What was expected, for clap.
    pub(super) fn check(&self) -> Result<(), String> {
        self.transfer.check()?;
        self.postcopy.check(&self.transfer)?;
        match (self.peer, self.transfer.link.token) {
            (Some(Peer::Qemu), Some(_)) => {
                Err("a QEMU knows no token; expected '--peer multifd' with '--token', or none".to_owned())
            }
            _ => Ok(()),
        }
    }
}

/// Options of `multifd inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A checkpoint, a mapped-ram or other migration file of QEMU, or a directory with main.bin, ch0.bin, ... (also .xz).
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
    /// Show the fields of each device, decoded by the stream's own description.
    #[arg(long)]
    pub devices: bool,
    /// Show the SHA-256 of each RAM block; of a stream: after everything in it was put into place.
    #[arg(long)]
    pub digest: bool,
    /// Write the contents of this RAM block to the file that --output names.
    #[arg(long, value_name = "BLOCK", requires = "file")]
    pub extract: Option<String>,
    /// The file to extract to; it must not exist.
    #[arg(short = 'o', short_alias = 'f', long = "output", value_name = "FILE", requires = "extract")]
    pub file: Option<PathBuf>,
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Whether a file stays out of the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Direct {
    /// Through the page cache, which forgets what is on disk.
    Auto,
    /// Past the page cache (O_DIRECT); fail where the file system refuses.
    On,
    /// Through the page cache, where it stays.
    Off,
}

impl From<Direct> for DirectWrites {
    fn from(direct: Direct) -> DirectWrites {
        match direct {
            Direct::Auto => DirectWrites::Auto,
            Direct::On => DirectWrites::On,
            Direct::Off => DirectWrites::Off,
        }
    }
}

/// Whether to tell the source that it may switch over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReturnPathAck {
    /// If the machine type takes it in any case, or the source shows that it waits.
    Auto,
    /// Never.
    Never,
    /// In any case.
    Always,
}

/// What is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// multifd: the hand-over has two steps, so that a broken connection does not leave it in doubt who has the VM.
    Multifd,
    /// QEMU, or something else that knows only its format; multifd as well.
    Qemu,
}

impl From<Peer> for source::Peer {
    fn from(peer: Peer) -> source::Peer {
        match peer {
            Peer::Multifd => source::Peer::Multifd,
            Peer::Qemu => source::Peer::Qemu,
        }
    }
}

/// What connects the processes of the demo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// TCP on this machine.
    Tcp,
    /// A unix socket in a private directory.
    Unix,
}
