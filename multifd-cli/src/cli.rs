//! The command line: verbs, options, and the values that each takes.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    num::NonZeroU8,
    ops::RangeInclusive,
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand, ValueEnum, error::ErrorKind};
use multifd::{
    destination, source,
    transport::uri::{Uri, UriError},
};
use multifd_guest::{
    guest::{GuestConfig, Kind},
    log::DirtyLogChoice,
    pace::Rate,
};
use multifd_proto::{
    convergence::Limits,
    machine::{self, Dialect},
    packet,
};

use crate::units::{self, Limit};

/// Moves running virtual machines between processes and hosts, in QEMU's multifd format.
#[derive(Debug, Parser)]
#[command(name = "multifd", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Live-migrate a running, self-checking guest between two processes on this machine.
    Demo(DemoArgs),
    /// Run the built-in guest; it can be migrated away, or wait for an incoming migration.
    Guest(GuestArgs),
    /// Receive a VM from QEMU, or from multifd, into a checkpoint file.
    Receive(ReceiveArgs),
    /// Send the VM in a checkpoint file to QEMU, or to multifd.
    Send(SendArgs),
    /// Show what is in a checkpoint, a migration stream, or a recorded set of channels.
    Inspect(InspectArgs),
}

impl Verb {
    /// What to print.
    pub fn output(&self) -> &OutputArgs {
        match self {
            Verb::Demo(args) => &args.output,
            Verb::Guest(args) => &args.output,
            Verb::Receive(args) => &args.output,
            Verb::Send(args) => &args.output,
            Verb::Inspect(args) => &args.output,
        }
    }
}

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
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Options of `multifd guest`.
#[derive(Debug, Args)]
pub struct GuestArgs {
    /// Wait for a guest at this address, and run it.
    #[arg(long, value_name = "URI", conflicts_with_all = ["migrate_to", "after"], help_heading = MIGRATION)]
    pub incoming: Option<Uri>,
    /// Migrate the guest there; given several times, the next is tried when one fails.
    #[arg(long, value_name = "URI", value_parser = destination_uri, help_heading = MIGRATION)]
    pub migrate_to: Vec<Uri>,
    /// How long the guest runs before it is migrated.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = units::time, help_heading = MIGRATION)]
    pub after: Duration,
    /// How long the guest runs here after it has arrived, or could not be migrated [default: until interrupted after it
    /// has arrived, 1s when it could not be migrated].
    #[arg(long, value_name = "TIME", value_parser = units::time, help_heading = MIGRATION)]
    pub run_for: Option<Duration>,
    /// Take commands there, one JSON value a line: "status", {"migrate": URI}, "cancel", "resume", "quit".
    #[arg(long, value_name = "unix:PATH", value_parser = unix_uri, help_heading = MIGRATION)]
    pub control: Option<Uri>,
    /// Check while the guest arrives that no page is written from an older round than it already holds; if one is, exit with
    /// status 6.
    #[arg(long, help_heading = MIGRATION)]
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

/// Options of `multifd receive`.
#[derive(Debug, Args)]
pub struct ReceiveArgs {
    /// Where to wait for the source: tcp:HOST:PORT, unix:PATH, or fd:N for an inherited socket. Port 0 picks a free one. A
    /// listening socket takes all connections; a connected one is one connection, so it takes only a migration without
    /// multifd.
    #[arg(value_name = "URI")]
    pub uri: Uri,
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
    /// UUID of the VM that is expected; a source with another one is refused [default: any].
    #[arg(long, value_name = "UUID", value_parser = uuid)]
    pub uuid: Option<[u8; 16]>,
    /// The connections.
    #[command(flatten)]
    pub link: LinkArgs,
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Options of `multifd send`.
#[derive(Debug, Args)]
pub struct SendArgs {
    /// The checkpoint: of multifd receive, or a mapped-ram migration file of QEMU.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Where the destination waits: tcp:HOST:PORT or unix:PATH.
    #[arg(value_name = "URI", value_parser = destination_uri)]
    pub uri: Uri,
    /// How to send it. Pages of zeros go to the main connection by default, whatever the machine type, because a
    /// QEMU does not write those that it finds in packets.
    #[command(flatten)]
    pub transfer: TransferArgs,
    /// UUID of the VM, which a QEMU started with -uuid compares with its own. QEMU does not write it into its files
    /// [default: the one in FILE, or none].
    #[arg(long, value_name = "UUID", value_parser = uuid, help_heading = MIGRATION)]
    pub uuid: Option<[u8; 16]>,
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
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

/// What the built-in guest is like.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Guest")]
pub struct MachineArgs {
    /// What writes the memory: a vCPU under KVM, or a thread of the process; auto is kvm where it works.
    #[arg(long, value_enum, default_value_t = GuestKind::Auto)]
    pub guest: GuestKind,
    /// Memory; the same on both sides.
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = memory_size)]
    pub memory: u64,
    /// Memory that the guest rewrites again and again [default: 64MiB, or half of --memory if that is less].
    #[arg(long, value_name = "SIZE", value_parser = memory_size)]
    pub working_set: Option<u64>,
    /// Percentage of the rest that is filled; the other pages are never touched.
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(..=100))]
    pub filled: u8,
    /// How fast the guest writes, e.g. 100MB/s, 128M (MiB/s), 0, or max.
    #[arg(long, value_name = "RATE|max", default_value = "100MB/s", value_parser = write_rate)]
    pub write_rate: WriteRate,
    /// What tracks the guest's writes; auto is the best that works here.
    #[arg(long, value_enum, default_value_t = DirtyLog::Auto)]
    pub dirty_log: DirtyLog,
    /// CPUs that share the working set; the same on both sides.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub cpus: u8,
}

impl MachineArgs {
    /// The guest's configuration.
    pub fn config(&self, verify: bool) -> GuestConfig {
        GuestConfig {
            kind: self.guest.into(),
            memory: self.memory,
            working_set: self.working_set(),
            filled_percent: self.filled,
            write_rate: self.write_rate.0,
            cpus: usize::from(self.cpus),
            dirty_log: self.dirty_log.into(),
            verify,
            ..GuestConfig::default()
        }
    }

    /// Bytes that the guest rewrites.
    pub fn working_set(&self) -> u64 {
        let default = DEFAULT_WORKING_SET.min(self.memory / 2).next_multiple_of(PAGE).max(self.least());
        self.working_set.unwrap_or(default)
    }

    /// How long to wait for `passes` over the working set: three times what they take, and a minute for a slow machine.
    pub fn time_for_passes(&self, passes: u64) -> Duration {
        let pass = match self.write_rate.0 {
            Rate::BytesPerSecond(rate) if rate > 0 => self.working_set() as f64 / rate as f64,
            _ => 0.0,
        };
        Duration::from_secs_f64((60.0 + 3.0 * pass * passes as f64).min(f64::from(u32::MAX)))
    }

    /// The same as options of a command line.
    pub fn to_args(&self) -> Vec<String> {
        let MachineArgs { guest, memory, working_set: _, filled, write_rate, dirty_log, cpus } = self;
        vec![
            format!("--guest={}", value_name(guest)),
            format!("--memory={memory}"),
            format!("--working-set={}", self.working_set()),
            format!("--filled={filled}"),
            format!("--write-rate={write_rate}"),
            format!("--dirty-log={}", value_name(dirty_log)),
            format!("--cpus={cpus}"),
        ]
    }

    /// A CPU needs two pages.
    fn least(&self) -> u64 {
        2 * PAGE * u64::from(self.cpus)
    }

    fn check(&self) -> Result<(), String> {
        let (least, most, working_set) = (self.least(), self.memory, self.working_set());
        if (least..=most).contains(&working_set) {
            return Ok(());
        }
        let [working_set, least, most] = [working_set, least, most].map(units::show_size);
        Err(format!(
            "invalid value '{working_set}' for '--working-set <SIZE>': expected {least} (two pages for each CPU) to {most} \
             (--memory)"
        ))
    }
}

/// How to migrate.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = MIGRATION)]
pub struct TransferArgs {
    /// Connections for pages, 1 to 255 [default: 4 when sending, as many as the source opens when receiving].
    #[arg(long, value_name = "N", value_parser = channels)]
    pub channels: Option<NonZeroU8>,
    /// Compression of pages; auto: zstd on each channel while it is faster there than without, as the report explains,
    /// for destinations that are not QEMU [default: none when sending, any when receiving].
    #[arg(long, value_enum)]
    pub compression: Option<Compression>,
    /// Level of the compression: 0 to 9 for zlib, 1 to 20 for zstd and auto [default: 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..=20))]
    pub compression_level: Option<i32>,
    /// Have the kernel read pages straight from guest memory instead of copying them first (MSG_ZEROCOPY), where the
    /// connections can; a message says where not. TCP to another host only: to this one the kernel copies all the same.
    /// Not together with compression.
    #[arg(long)]
    pub zero_copy: bool,
    /// Where pages of zeros are named: in packets, on the main connection as QEMU before 9.0 does it, or nowhere, so that
    /// they are sent like all others [default: multifd, or by the machine type].
    #[arg(long, value_enum)]
    pub zero_pages: Option<ZeroPages>,
    /// Where channels are synchronised: once a round, or in each section as QEMU before 8.1 does it
    /// [default: per-round, or by the machine type].
    #[arg(long, value_enum)]
    pub sync: Option<Sync>,
    /// Bytes or bits per second on all connections together, e.g. 200MB/s, 10Gbit/s, 128M (MiB/s); 0 for no limit
    /// [default: 0].
    #[arg(long, value_name = "RATE", value_parser = units::rate_limit)]
    pub max_bandwidth: Option<Limit<u64>>,
    /// How long the guest may be paused; 0 switches over only when nothing is left to send.
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = units::time)]
    pub downtime_limit: Duration,
    /// Give up after so many rounds with the guest running.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    pub max_rounds: u64,
    /// Give up after this time with the guest running; 0 for no limit [default: 0].
    #[arg(long, value_name = "TIME", value_parser = units::time_limit)]
    pub max_time: Option<Limit<Duration>>,
    /// How long to try to connect while the destination refuses, because it does not listen yet; 0 for no limit.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::time_limit)]
    pub connect_timeout: Limit<Duration>,
    /// Longest pause of the guest, until the destination has confirmed that it has it. Then the guest runs on here; where
    /// the destination may have it already, it stays paused, in doubt (exit status 7). 0 for no limit.
    #[arg(long, value_name = "TIME", value_parser = units::time_limit, hide = true)]
    pub pause_timeout: Option<Limit<Duration>>,
    /// Never slow the guest down, even if it writes faster than its memory can be sent.
    #[arg(long)]
    pub no_throttle: bool,
    /// What both sides have.
    #[command(flatten)]
    pub link: LinkArgs,
}

/// The connections, on either side.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = MIGRATION)]
pub struct LinkArgs {
    /// How long nothing may arrive before the peer is given up, while the guest runs; 0 for no limit.
    #[arg(long, value_name = "TIME", default_value = "2min", value_parser = units::time_limit, hide = true)]
    pub stall_timeout: Limit<Duration>,
    /// Secret of this migration, 32 hexadecimal digits, the same on both sides; connections without it are dropped. Not
    /// with QEMU. In the environment other users do not see it.
    #[arg(long, value_name = "HEX32", env = TOKEN_VARIABLE, hide_env_values = true, value_parser = Token::from_str, hide = true)]
    pub token: Option<Token>,
}

impl LinkArgs {
    /// The same as options of a command line, but for the token: every user can read those.
    fn to_args(&self) -> Vec<String> {
        let LinkArgs { stall_timeout, token: _ } = self;
        vec![format!("--stall-timeout={}", show_limit(*stall_timeout))]
    }
}

/// The secret of a migration.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token(pub [u8; 16]);

impl Token {
    /// One that was never used before.
    ///
    /// # Errors
    /// The kernel's.
    pub fn random() -> io::Result<Token> {
        let mut bytes = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Token(bytes))
    }

    /// The same as 32 digits.
    pub fn reveal(self) -> String {
        format!("{:032x}", u128::from_be_bytes(self.0))
    }
}

impl FromStr for Token {
    type Err = String;

    fn from_str(text: &str) -> Result<Token, String> {
        bytes16(text).map(Token).ok_or_else(|| "expected 32 hexadecimal digits".to_owned())
    }
}

/// Hides it.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

impl TransferArgs {
    /// What a source of machine type `machine` is told.
    pub fn source_options(&self, machine: &str) -> source::Options {
        let dialect = self.sync.map(Dialect::from).or_else(|| Dialect::of_machine(machine));
        let zero_pages = self.zero_pages.map(machine::ZeroPages::from);
        let zero_pages = zero_pages.or_else(|| machine::ZeroPages::of_machine(machine));
        source::Options {
            channels: self.channels.map_or(DEFAULT_CHANNELS, NonZeroU8::get),
            machine: machine.to_owned(),
            dialect: dialect.unwrap_or(Dialect::PerRound),
            zero_pages: zero_pages.unwrap_or(machine::ZeroPages::Multifd),
            compression: self.compression.map_or(packet::Compression::None, Compression::method),
            auto_compression: self.compression == Some(Compression::Auto),
            compression_level: self.compression_level.unwrap_or(DEFAULT_LEVEL),
            zero_copy: self.zero_copy,
            max_bandwidth: self.max_bandwidth.and_then(|rate| rate.0),
            limits: Limits {
                downtime: self.downtime_limit,
                rounds: Some(self.max_rounds),
                time: self.max_time.and_then(|time| time.0),
                throttle: !self.no_throttle,
            },
            ..source::Options::default()
        }
    }

    /// What a destination is told.
    pub fn destination_options(&self) -> destination::Options {
        destination::Options {
            channels: self.channels.map(NonZeroU8::get),
            compression: self.compression.and_then(Compression::required),
            ..destination::Options::default()
        }
    }

    fn check(&self) -> Result<(), String> {
        let compression = self.compression.unwrap_or(Compression::None);
        if self.zero_copy && compression != Compression::None {
            return Err(format!(
                "the option '--zero-copy' cannot be used with '--compression {}': compressed pages are a copy; expected one of \
                 the two",
                value_name(&compression)
            ));
        }
        match (self.compression_level, compression.levels()) {
            (Some(_), None) => Err("the option '--compression-level <N>' has no effect without compression; expected \
                                    '--compression zlib', 'zstd' or 'auto' with it"
                .to_owned()),
            (Some(level), Some(levels)) if !levels.contains(&level) => Err(format!(
                "invalid value '{level}' for '--compression-level <N>': expected {} to {} for {}",
                levels.start(),
                levels.end(),
                value_name(&compression)
            )),
            _ => Ok(()),
        }
    }

    /// The same as options of a command line.
    pub fn to_args(&self) -> Vec<String> {
        let TransferArgs {
            channels,
            compression,
            compression_level,
            zero_copy,
            zero_pages,
            sync,
            max_bandwidth,
            downtime_limit,
            max_rounds,
            max_time,
            connect_timeout,
            pause_timeout,
            no_throttle,
            link,
        } = self;
        let mut args = vec![
            format!("--connect-timeout={}", show_limit(*connect_timeout)),
            format!("--downtime-limit={}us", downtime_limit.as_micros()),
            format!("--max-rounds={max_rounds}"),
        ];
        args.extend(channels.map(|channels| format!("--channels={channels}")));
        args.extend(compression.map(|compression| format!("--compression={}", value_name(&compression))));
        args.extend(compression_level.map(|level| format!("--compression-level={level}")));
        args.extend(zero_copy.then(|| "--zero-copy".to_owned()));
        args.extend(zero_pages.map(|zero_pages| format!("--zero-pages={}", value_name(&zero_pages))));
        args.extend(sync.map(|sync| format!("--sync={}", value_name(&sync))));
        let bandwidth = |Limit(rate): Limit<u64>| rate.map_or("0".to_owned(), |rate| format!("{rate}B/s"));
        args.extend(max_bandwidth.map(|rate| format!("--max-bandwidth={}", bandwidth(rate))));
        args.extend(max_time.map(|time| format!("--max-time={}", show_limit(time))));
        args.extend(pause_timeout.map(|time| format!("--pause-timeout={}", show_limit(time))));
        args.extend(no_throttle.then(|| "--no-throttle".to_owned()));
        args.extend(link.to_args());
        args
    }
}

/// What is printed, and how much.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Print one JSON object instead of text for a person.
    #[arg(long)]
    pub json: bool,
    /// Log more; twice, still more.
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
    /// Print neither progress nor warnings.
    #[arg(short, long, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Show progress: on a terminal, always (a line per round elsewhere), or never.
    #[arg(long, value_enum, default_value_t = ProgressMode::Auto, value_name = "WHEN")]
    pub progress: ProgressMode,
}

impl OutputArgs {
    /// The same as options of a command line, but for `--json`.
    pub fn to_args(&self) -> Vec<String> {
        let mut args = vec![format!("--progress={}", value_name(&self.progress))];
        args.extend(self.quiet.then(|| "--quiet".to_owned()));
        args.extend((0..self.verbose).map(|_| "--verbose".to_owned()));
        args
    }
}

/// When to show progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ProgressMode {
    /// If stderr is a terminal.
    Auto,
    /// Anywhere; a line per round where stderr is no terminal.
    Always,
    /// Nowhere.
    Never,
}

/// What connects the processes of the demo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// TCP on this machine.
    Tcp,
    /// A unix socket in a private directory.
    Unix,
}

/// Who writes the memory of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GuestKind {
    /// kvm where it works, else process.
    Auto,
    /// vCPUs under KVM.
    Kvm,
    /// Threads of the process.
    Process,
}

impl From<GuestKind> for Kind {
    fn from(kind: GuestKind) -> Kind {
        match kind {
            GuestKind::Auto => Kind::Auto,
            GuestKind::Kvm => Kind::Kvm,
            GuestKind::Process => Kind::Process,
        }
    }
}

/// What tracks the guest's writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DirtyLog {
    /// The best that works here.
    Auto,
    /// KVM's dirty log, for a KVM guest.
    #[value(name = "kvm-dirty-log")]
    KvmLog,
    /// KVM's dirty ring, for a KVM guest.
    #[value(name = "kvm-dirty-ring")]
    KvmRing,
    /// Write protection through userfaultfd.
    UffdWp,
    /// A bitmap in which a process guest marks its own writes.
    Bitmap,
}

impl From<DirtyLog> for DirtyLogChoice {
    fn from(log: DirtyLog) -> DirtyLogChoice {
        match log {
            DirtyLog::Auto => DirtyLogChoice::Auto,
            DirtyLog::KvmLog => DirtyLogChoice::KvmDirtyLog,
            DirtyLog::KvmRing => DirtyLogChoice::KvmDirtyRing,
            DirtyLog::UffdWp => DirtyLogChoice::UffdWp,
            DirtyLog::Bitmap => DirtyLogChoice::Bitmap,
        }
    }
}

/// Compression of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compression {
    /// Pages as they are.
    None,
    /// zlib, the better known.
    Zlib,
    /// zstd, the faster one.
    Zstd,
    /// zstd on each channel while that is faster there; a destination has to take packets of both kinds, as multifd does
    /// and QEMU does not.
    Auto,
}

impl Compression {
    /// The method of packets that are compressed.
    fn method(self) -> packet::Compression {
        match self {
            Compression::None => packet::Compression::None,
            Compression::Zlib => packet::Compression::Zlib,
            Compression::Zstd | Compression::Auto => packet::Compression::Zstd,
        }
    }

    /// Its levels, where it has some. zstd has more: packets of a level above 20 need more memory than a QEMU gives them.
    fn levels(self) -> Option<RangeInclusive<i32>> {
        match self {
            Compression::None => None,
            Compression::Zlib => Some(0..=9),
            Compression::Zstd | Compression::Auto => Some(1..=20),
        }
    }

    /// What every packet has to be, for a destination.
    pub fn required(self) -> Option<packet::Compression> {
        (self != Compression::Auto).then(|| self.method())
    }
}

/// Where pages of zeros go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ZeroPages {
    /// Into the packets of the channels.
    Multifd,
    /// On the main connection.
    Legacy,
    /// Nowhere: as pages with content.
    None,
}

impl From<ZeroPages> for machine::ZeroPages {
    fn from(zero_pages: ZeroPages) -> machine::ZeroPages {
        match zero_pages {
            ZeroPages::Multifd => machine::ZeroPages::Multifd,
            ZeroPages::Legacy => machine::ZeroPages::Legacy,
            ZeroPages::None => machine::ZeroPages::None,
        }
    }
}

/// Where channels are synchronised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sync {
    /// Once a round.
    PerRound,
    /// In each section.
    PerSection,
}

impl From<Sync> for Dialect {
    fn from(sync: Sync) -> Dialect {
        match sync {
            Sync::PerRound => Dialect::PerRound,
            Sync::PerSection => Dialect::PerSection,
        }
    }
}

/// How fast a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteRate(pub Rate);

impl fmt::Display for WriteRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Rate::Idle => f.write_str("0B/s"),
            Rate::BytesPerSecond(rate) => write!(f, "{rate}B/s"),
            Rate::Max => f.write_str("max"),
        }
    }
}

/// Reads the command line of this process.
///
/// # Errors
/// It makes no sense, or asks for help: clap's error prints the right thing.
pub fn parse() -> Result<Cli, clap::Error> {
    let cli = Cli::try_parse()?;
    let checked = match &cli.verb {
        Verb::Demo(args) => args.machine.check().and_then(|()| args.transfer.check()),
        Verb::Guest(args) => args.machine.check().and_then(|()| args.transfer.check()),
        Verb::Send(args) => args.transfer.check(),
        Verb::Receive(_) | Verb::Inspect(_) => Ok(()),
    };
    checked.map_err(|message| Cli::command().error(ErrorKind::ValueValidation, message))?;
    Ok(cli)
}

/// Whether one JSON object is wanted of a command line that could not be read.
pub fn asks_for_json() -> bool {
    std::env::args_os().take_while(|arg| arg != "--").any(|arg| arg == "--json")
}

fn value_name(value: &impl ValueEnum) -> String {
    value.to_possible_value().expect("no value is skipped").get_name().to_owned()
}

fn channels(text: &str) -> Result<NonZeroU8, String> {
    text.parse().map_err(|_| "expected a number from 1 to 255".to_owned())
}

fn memory_size(text: &str) -> Result<u64, String> {
    match units::size(text).map_err(|error| error.to_string())? {
        size if size > 0 && size.is_multiple_of(PAGE) => Ok(size),
        _ => Err("expected a multiple of 4KiB, e.g. 64MiB".to_owned()),
    }
}

fn write_rate(text: &str) -> Result<WriteRate, String> {
    match text {
        "max" => return Ok(WriteRate(Rate::Max)),
        "0" => return Ok(WriteRate(Rate::Idle)),
        _ => {}
    }
    match units::rate(text) {
        Ok(0) => Ok(WriteRate(Rate::Idle)),
        Ok(rate) => Ok(WriteRate(Rate::BytesPerSecond(rate))),
        Err(error) => Err(format!("{error}, or max")),
    }
}

fn host(text: &str) -> Result<String, String> {
    match format!("tcp:{text}:0").parse::<Uri>() {
        Ok(Uri::Tcp { .. }) => Ok(text.to_owned()),
        _ => Err("expected a name or an address, IPv6 in brackets, as in [::1]".to_owned()),
    }
}

/// Where a source can send to.
pub fn destination_uri(text: &str) -> Result<Uri, String> {
    match text.parse().map_err(|error: UriError| error.to_string())? {
        uri @ (Uri::Tcp { .. } | Uri::Unix(_) | Uri::File(_)) => Ok(uri),
        uri @ Uri::Fd(_) => {
            Err(format!("{uri} is one connection, and a source opens several; expected tcp:HOST:PORT or unix:PATH"))
        }
    }
}

fn unix_uri(text: &str) -> Result<Uri, String> {
    match text.parse() {
        Ok(uri @ Uri::Unix(_)) => Ok(uri),
        _ => Err("expected unix:PATH".to_owned()),
    }
}

/// `text` as 16 bytes: 32 hexadecimal digits.
fn bytes16(text: &str) -> Option<[u8; 16]> {
    let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    digits.then(|| u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes))?
}

fn uuid(text: &str) -> Result<[u8; 16], String> {
    let hyphens = text.match_indices('-').map(|(at, _)| at).eq([8, 13, 18, 23]);
    let digits = if hyphens { text.replace('-', "") } else { text.to_owned() };
    bytes16(&digits).ok_or_else(|| "expected a UUID, as in 6f1d7c1e-4d4a-4b0e-9a3c-2f6f0f3a5b11".to_owned())
}

/// As [`units::time_limit`] reads it.
fn show_limit(Limit(time): Limit<Duration>) -> String {
    time.map_or("0".to_owned(), |time| format!("{}us", time.as_micros()))
}

/// Where `--token` is taken from when it is not given.
pub const TOKEN_VARIABLE: &str = "MULTIFD_TOKEN";
const MIGRATION: &str = "Migration";
const PAGE: u64 = 4096;
const DEFAULT_WORKING_SET: u64 = 64 << 20;
const DEFAULT_CHANNELS: u8 = 4;
const DEFAULT_LEVEL: i32 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_32_digits_with_hyphens_or_without() {
        let bytes = [0, 17, 34, 51, 68, 85, 102, 119, 136, 153, 170, 187, 204, 221, 238, 255];
        assert_eq!(uuid("00112233-4455-6677-8899-AABBCCDDEEFF"), Ok(bytes));
        assert_eq!(uuid("00112233445566778899aabbccddeeff"), Ok(bytes));
        for wrong in
            ["", "0011223344556677", "0011-22334455-6677-8899-AABBCCDDEEFF", "+0112233445566778899aabbccddeeff"]
        {
            assert!(uuid(wrong).unwrap_err().contains("expected a UUID"), "{wrong}");
        }
    }

    /// The demo passes its options on to its processes.
    #[test]
    fn the_processes_of_the_demo_get_its_options() {
        let read = |args: &[String]| {
            let Cli { verb } = Cli::try_parse_from(args).unwrap();
            let (Verb::Demo(DemoArgs { machine, transfer, .. }) | Verb::Guest(GuestArgs { machine, transfer, .. })) =
                verb
            else {
                panic!("another verb");
            };
            format!("{machine:?} {transfer:?}")
        };
        for options in [
            "",
            "--max-bandwidth 0 --max-time 0 --connect-timeout 0 --downtime-limit 0",
            "--max-bandwidth 10G --max-time 5m --connect-timeout 1.5s --compression zstd --compression-level 7",
            "--pause-timeout 5s --stall-timeout 0",
            "--channels 9 --zero-copy --zero-pages legacy --sync per-section --no-throttle --max-rounds 7 --write-rate 128M",
        ] {
            let demo: Vec<String> =
                ["multifd", "demo"].into_iter().chain(options.split_whitespace()).map(str::to_owned).collect();
            let Cli { verb: Verb::Demo(args) } = Cli::try_parse_from(&demo).unwrap() else { panic!("another verb") };
            let head = ["multifd".to_owned(), "guest".to_owned()].into_iter();
            // What is left to chance here is settled there.
            let machine = |text: String| text.replace("working_set: None", "working_set: Some(67108864)");
            let guest: Vec<String> = head.chain(args.machine.to_args()).chain(args.transfer.to_args()).collect();
            assert_eq!(machine(read(&demo)), machine(read(&guest)), "{options}");
        }
    }

    #[test]
    fn a_token_is_32_digits_and_not_shown() {
        let token = Token::random().unwrap();
        assert_eq!(token.reveal().parse(), Ok(token));
        assert_eq!("000102030405060708090a0b0c0D0E0F".parse(), Ok(Token(std::array::from_fn(|at| at as u8))));
        assert!(!format!("{token:?}").contains(&token.reveal()[..8]));
        for wrong in ["", "0", "zz0102030405060708090a0b0c0d0e0f", "00010203-0405-0607-0809-0a0b0c0d0e0f"] {
            assert!(wrong.parse::<Token>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_definition_of_the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
