//! The options of the verbs that drive a QEMU by its monitor.

use std::{num::NonZeroU8, path::PathBuf, time::Duration};

use clap::{Args, ValueEnum};
use multifd::transport::uri::Uri;

use super::{
    MIGRATION,
    link::LinkArgs,
    listen::ListenArgs,
    observe::ObserveArgs,
    origin::{Incoming, Origin},
    output::OutputArgs,
    postcopy::PostcopyArgs,
    tls::TlsArgs,
    transfer::{Compression, DEFAULT_CHANNELS, TransferArgs},
    values::{channels, meeting_uri, unix_uri},
    verbs::{Direct, ReceiveArgs, ReturnPathAck},
};
use crate::units::{self, Limit};

/// Options of `multifd checkpoint`.
#[derive(Debug, Args)]
pub struct CheckpointArgs {
    /// The monitor of the QEMU: the socket of its option -qmp unix:PATH,server=on,wait=off.
    #[arg(value_name = "unix:QMP", value_parser = unix_uri)]
    pub qmp: Uri,
    /// The checkpoint, a mapped-ram migration file; it gets its name when it is complete and on disk.
    #[arg(short = 'o', short_alias = 'f', long = "output", value_name = "FILE")]
    pub file: PathBuf,
    /// Replace FILE if it exists, when the new one is complete.
    #[arg(long)]
    pub force: bool,
    /// Report the SHA-256 of each RAM block.
    #[arg(long)]
    pub digest: bool,
    /// live: the state at the end, as a live migration has it; snapshot: the state at the beginning, with the guest running
    /// on meanwhile, however fast it writes.
    #[arg(long, value_enum, default_value_t = CheckpointMode::Live, value_name = "MODE", help_heading = MIGRATION)]
    pub mode: CheckpointMode,
    /// Let the guest run on in QEMU when the checkpoint is complete [default for snapshot].
    #[arg(long, overrides_with = "no_resume", help_heading = MIGRATION)]
    pub resume: bool,
    /// Leave it paused there [default for live].
    #[arg(long, overrides_with = "resume", help_heading = MIGRATION)]
    pub no_resume: bool,
    /// Connections for pages, 1 to 255; with --mode live [default: 4].
    #[arg(long, value_name = "N", value_parser = channels, help_heading = MIGRATION)]
    pub channels: Option<NonZeroU8>,
    /// Compression of pages on the way; with --mode live.
    #[arg(long, value_enum, default_value_t = QemuCompression::None, help_heading = MIGRATION)]
    pub compression: QemuCompression,
    /// Bytes or bits per second, e.g. 200MB/s, 10Gbit/s, 128M (MiB/s); 0 for no limit; with --mode live [default: 0].
    #[arg(long, value_name = "RATE", value_parser = units::rate_limit, help_heading = MIGRATION)]
    pub max_bandwidth: Option<Limit<u64>>,
    /// How long the guest may be paused; with --mode live [default: what QEMU is set to].
    #[arg(long, value_name = "TIME", value_parser = units::time, help_heading = MIGRATION)]
    pub downtime_limit: Option<Duration>,
    /// Give up after so many rounds with the guest running.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..),
        help_heading = MIGRATION)]
    pub max_rounds: u64,
    /// Give up after this time; 0 for no limit [default: 0].
    #[arg(long, value_name = "TIME", value_parser = units::time_limit, help_heading = MIGRATION)]
    pub max_time: Option<Limit<Duration>>,
    /// How long nothing may arrive before QEMU is given up; 0 for no limit.
    #[arg(long, value_name = "TIME", default_value = "2min", value_parser = units::time_limit, help_heading = MIGRATION)]
    pub stall_timeout: Limit<Duration>,
    /// The connection to QEMU.
    #[command(flatten)]
    pub monitor: MonitorArgs,
    /// Who may connect.
    #[command(flatten)]
    pub incoming: ListenArgs,
    /// What looks on.
    #[command(flatten)]
    pub observe: ObserveArgs,
    /// Whether the migration is encrypted.
    #[command(flatten)]
    pub tls: TlsArgs,
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Options of `multifd restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The checkpoint: of multifd checkpoint or multifd receive, or a mapped-ram migration file of QEMU.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The monitor of the QEMU, which was started with -incoming defer: the socket of its option -qmp
    /// unix:PATH,server=on,wait=off.
    #[arg(value_name = "unix:QMP", value_parser = unix_uri)]
    pub qmp: Uri,
    /// FILE lacks memory that its QEMU shared (x-ignore-shared), and this QEMU maps the same file, unchanged since: restore the
    /// rest. QEMU is asked whether it shares such memory; nothing here can tell what is in it, and with other content the guest is lost.
    #[arg(long, conflicts_with_all = ["postcopy", "recover"], help_heading = MIGRATION)]
    pub ignore_shared: bool,
    /// Running at once.
    #[command(flatten)]
    pub postcopy: PostcopyArgs,
    /// The connection to QEMU.
    #[command(flatten)]
    pub monitor: MonitorArgs,
    /// How to send it.
    #[command(flatten)]
    pub transfer: TransferArgs,
    /// What looks on.
    #[command(flatten)]
    pub observe: ObserveArgs,
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// How to reach the QEMU.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = MIGRATION)]
pub struct MonitorArgs {
    /// Where the migration connects: an address that both ends can reach, tcp:HOST:PORT, unix:PATH or vsock:CID:PORT, where QEMU runs on
    /// another host or as another user [default: a socket in a private directory].
    #[arg(long, value_name = "URI", value_parser = meeting_uri)]
    pub listen: Option<Uri>,
    /// How long QEMU may take for an answer on its monitor.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::time)]
    pub qmp_timeout: Duration,
    /// The tls-creds object of QEMU to use with --tls-dir [default: one made for this migration, of the same DIR there].
    #[arg(long, value_name = "ID", requires = "tls_dir")]
    pub qemu_tls_creds: Option<String>,
}

impl MonitorArgs {
    /// # Errors
    /// What was expected, for clap.
    fn check(&self, tls: &TlsArgs) -> Result<(), String> {
        match (&tls.tls_dir, &self.listen) {
            (Some(_), None) => {
                Err("the option '--tls-dir <DIR>' is for connections between hosts; expected '--listen \
                                    tcp:HOST:PORT' with it"
                    .to_owned())
            }
            _ => Ok(()),
        }
    }
}

/// What a checkpoint is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CheckpointMode {
    /// The state at the end.
    Live,
    /// The state at the beginning.
    Snapshot,
}

impl CheckpointMode {
    /// The word for it in reports.
    pub fn name(self) -> &'static str {
        match self {
            CheckpointMode::Live => "live",
            CheckpointMode::Snapshot => "snapshot",
        }
    }
}

/// Compression that a QEMU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum QemuCompression {
    /// Pages as they are.
    None,
    /// zlib, the better known.
    Zlib,
    /// zstd, the faster one.
    Zstd,
}

impl QemuCompression {
    /// QEMU's word for it.
    pub fn name(self) -> &'static str {
        match self {
            QemuCompression::None => "none",
            QemuCompression::Zlib => "zlib",
            QemuCompression::Zstd => "zstd",
        }
    }
}

impl CheckpointArgs {
    /// # Errors
    /// What was expected, for clap.
    pub(super) fn check(&self) -> Result<(), String> {
        self.monitor.check(&self.tls)?;
        self.incoming.allow.check(self.monitor.listen.as_ref())?;
        let snapshot = self.mode == CheckpointMode::Snapshot;
        if snapshot && (self.channels.is_some() || self.compression != QemuCompression::None) {
            return Err(
                "a snapshot goes over one connection, as it is; expected '--mode live' with '--channels <N>' and \
                        '--compression <COMPRESSION>'"
                    .to_owned(),
            );
        }
        // It sends at any speed where it is set to 4 MiB/s, also of a guest that writes nothing (7.2, 10.0, 11.1).
        if snapshot && self.max_bandwidth.is_some_and(|rate| rate.0.is_some()) {
            return Err(
                "QEMU does not keep to a bandwidth in a snapshot; expected '--mode live' with '--max-bandwidth <RATE>'"
                    .to_owned(),
            );
        }
        if snapshot && self.downtime_limit.is_some() {
            return Err(
                "a snapshot pauses the guest as long as it takes to save its devices; expected '--mode live' with \
                        '--downtime-limit <TIME>'"
                    .to_owned(),
            );
        }
        Ok(())
    }

    /// How many channels QEMU opens.
    pub fn channels(&self) -> u8 {
        self.channels.map_or(DEFAULT_CHANNELS, NonZeroU8::get)
    }

    /// The same for the end that receives.
    pub fn as_receive(&self) -> ReceiveArgs {
        let live = self.mode == CheckpointMode::Live;
        let compression = match self.compression {
            QemuCompression::None => Compression::None,
            QemuCompression::Zlib => Compression::Zlib,
            QemuCompression::Zstd => Compression::Zstd,
        };
        ReceiveArgs {
            from: Incoming::At(Origin::Uri(self.qmp.clone())),
            file: self.file.clone(),
            force: self.force,
            digest: self.digest,
            audit: false,
            record: None,
            direct: Direct::Auto,
            return_path_ack: ReturnPathAck::Auto,
            channels: NonZeroU8::new(self.channels()).filter(|_| live),
            compression: live.then_some(compression),
            qmp: None,
            uuid: None,
            recover_timeout: Duration::ZERO,
            observe: self.observe.clone(),
            link: LinkArgs { stall_timeout: self.stall_timeout, token: None, tls: self.tls.clone() },
            listen: self.incoming.clone(),
            output: self.output.clone(),
        }
    }

    /// Whether the guest is to run on: what was said, or the default.
    pub fn resumes(&self) -> bool {
        match (self.resume, self.no_resume) {
            (true, _) => true,
            (_, true) => false,
            _ => self.mode == CheckpointMode::Snapshot,
        }
    }
}

impl RestoreArgs {
    /// # Errors
    /// What was expected, for clap.
    pub(super) fn check(&self) -> Result<(), String> {
        self.transfer.check()?;
        self.postcopy.check(&self.transfer)?;
        self.monitor.check(&self.transfer.link.tls)?;
        if self.transfer.channels == Some(0) {
            return Err("a restore sets QEMU up for channels; expected '--channels 1' or more".to_owned());
        }
        if self.transfer.compression == Some(Compression::Auto) {
            return Err("a QEMU takes packets of one kind; expected '--compression none', 'zlib' or 'zstd'".to_owned());
        }
        if self.transfer.zero_copy && self.monitor.listen.is_none() {
            return Err(
                "the option '--zero-copy' has no effect on unix sockets; expected '--listen tcp:HOST:PORT' with it"
                    .to_owned(),
            );
        }
        Ok(())
    }
}
