//! How to migrate, as a source or as a destination.

use std::{ops::RangeInclusive, time::Duration};

use clap::{Args, ValueEnum};
use multifd::{
    destination,
    source::{self, Limits},
};
use multifd_proto::{
    machine::{self, Dialect, MachineDefaults},
    packet,
};

use super::{
    MIGRATION,
    link::LinkArgs,
    values::{channels_or_none, show_limit, value_name},
};
use crate::units::{self, Limit};

/// How to migrate.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = MIGRATION)]
pub struct TransferArgs {
    /// Connections for pages, at most 255; 0: the main connection carries them, which is all there is then, without compression, and
    /// what a QEMU takes without multifd [default: 4 when sending, as many as the source opens when receiving].
    #[arg(long, value_name = "N", value_parser = channels_or_none)]
    pub channels: Option<u8>,
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
    /// they are sent like all others [default: multifd; legacy for a VM of a QEMU].
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
    /// Switch over when the rest fits into the downtime limit at this rate, in bytes or bits per second. --max-bandwidth does not hold
    /// in the pause. 0 for the rate that was measured, or, where --max-bandwidth held it back, half of what TCP saw the path carry if
    /// that is more [default: 0].
    #[arg(long, value_name = "RATE", value_parser = units::rate_limit)]
    pub switchover_bandwidth: Option<Limit<u64>>,
    /// Give up after so many rounds with the guest running.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    pub max_rounds: u64,
    /// Give up after this time with the guest running, at the end of the round that goes on then, unless the rest fits into the downtime
    /// limit; 0 for no limit [default: 0].
    #[arg(long, value_name = "TIME", value_parser = units::time_limit)]
    pub max_time: Option<Limit<Duration>>,
    /// How long to try to connect while the destination refuses or does not answer, because it does not listen yet; 0 for no limit.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::time_limit)]
    pub connect_timeout: Limit<Duration>,
    /// Longest pause of the guest, until the destination has confirmed that it has it. Then the guest runs on here; where
    /// the destination may have it already, it stays paused, in doubt (exit status 7). 0 for no limit [default: 2min].
    #[arg(long, value_name = "TIME", value_parser = units::time_limit)]
    pub pause_timeout: Option<Limit<Duration>>,
    /// Never slow the guest down, even if it writes faster than its memory can be sent.
    #[arg(long)]
    pub no_throttle: bool,
    /// What both sides have.
    #[command(flatten)]
    pub link: LinkArgs,
}

impl TransferArgs {
    /// What a source of machine type `machine` is told.
    pub fn source_options(&self, machine: &str) -> source::Options {
        let defaults = MachineDefaults::of(machine);
        let dialect = self.sync.map(Dialect::from).or(defaults.map(|defaults| defaults.dialect));
        let zero_pages = self.zero_pages.map(machine::ZeroPages::from);
        let zero_pages = zero_pages.or(defaults.map(|defaults| defaults.zero_pages));
        let mut options = source::Options::default();
        let (format, qemu) = (&mut options.format, &mut options.qemu);
        qemu.machine = machine.to_owned();
        format.token = self.link.token.map(|token| token.0);
        qemu.dialect = dialect.unwrap_or(Dialect::PerRound);
        qemu.zero_pages = zero_pages.unwrap_or(machine::ZeroPages::Multifd);
        format.compression = self.compression.map_or(packet::Compression::None, Compression::method);
        format.auto_compression = self.compression == Some(Compression::Auto);
        let plan = &mut options.plan;
        plan.channels = self.channels();
        plan.compression_level = self.compression_level.unwrap_or(DEFAULT_LEVEL);
        plan.zero_copy = self.zero_copy;
        let parameters = &mut options.parameters;
        parameters.max_bandwidth = self.max_bandwidth.and_then(|rate| rate.0);
        parameters.pause_limit = self.pause_timeout.map_or(parameters.pause_limit, |time| time.0);
        parameters.stall_limit = self.link.stall_timeout.0;
        parameters.limits = Limits {
            downtime: self.downtime_limit,
            rounds: Some(self.max_rounds),
            time: self.max_time.and_then(|time| time.0),
            throttle: !self.no_throttle,
            switchover_bandwidth: self.switchover_bandwidth.and_then(|rate| rate.0),
            ..Limits::default()
        };
        options
    }

    /// How many channels a source opens.
    pub fn channels(&self) -> u8 {
        self.channels.unwrap_or(DEFAULT_CHANNELS)
    }

    /// What a destination is told.
    pub fn destination_options(&self) -> destination::Options {
        let mut options = destination::Options::default();
        options.channels = self.channels;
        options.compression = self.compression.and_then(Compression::required);
        options.stall_limit = self.link.stall_timeout.0;
        options.token = self.link.token.map(|token| token.0);
        options
    }

    /// # Errors
    /// What was expected, for clap.
    pub(super) fn check(&self) -> Result<(), String> {
        let compression = self.compression.unwrap_or(Compression::None);
        if self.zero_copy && compression != Compression::None {
            return Err(format!(
                "the option '--zero-copy' cannot be used with '--compression {}': compressed pages are a copy; expected one of \
                 the two",
                value_name(&compression)
            ));
        }
        if self.channels == Some(0) && compression != Compression::None {
            return Err(format!(
                "the option '--compression {}' needs channels: the main connection carries pages as they are; expected \
                 '--channels 1' or more with it",
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
            switchover_bandwidth,
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
        args.extend(switchover_bandwidth.map(|rate| format!("--switchover-bandwidth={}", bandwidth(rate))));
        args.extend(max_time.map(|time| format!("--max-time={}", show_limit(time))));
        args.extend(pause_timeout.map(|time| format!("--pause-timeout={}", show_limit(time))));
        args.extend(no_throttle.then(|| "--no-throttle".to_owned()));
        args.extend(link.to_args());
        args
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

pub(super) const DEFAULT_CHANNELS: u8 = 4;
const DEFAULT_LEVEL: i32 = 1;
