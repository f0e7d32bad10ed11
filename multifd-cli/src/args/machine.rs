//! What the built-in guest is like.

use std::{fmt, time::Duration};

use clap::{Args, ValueEnum};
use multifd_guest::{
    guest::{GuestConfig, Kind},
    log::DirtyLogChoice,
    pace::Rate,
};

use super::values::value_name;
use crate::units;

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

    /// # Errors
    /// What was expected, for clap.
    pub(super) fn check(&self) -> Result<(), String> {
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
    /// The best that works here; never the ring.
    Auto,
    /// KVM's dirty log, for a KVM guest.
    #[value(name = "kvm-dirty-log")]
    KvmLog,
    /// KVM's dirty ring, for a KVM guest: a full one stops its vCPU, so not for guests that write fast.
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

const PAGE: u64 = 4096;
const DEFAULT_WORKING_SET: u64 = 64 << 20;
