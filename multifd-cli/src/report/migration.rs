//! The figures of one migration, with the names and types of QMP's `query-migrate`.
//!
//! QMP's names have QMP's types: integers, in milliseconds and bytes. What is finer than that has a name of ours.

use std::time::Duration;

use multifd::{
    destination,
    progress::{Progress, RoundStats},
    source,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Audit, ChannelCompression, FreshMemory, ZeroCopy, compression_name, dialect_name, micros, millis, whole_millis,
};
use crate::{role::Role, rounds::Rounds};

/// The figures of one migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationReport {
    /// From the first connect to the confirmation, at a destination from the first byte until the VM ran, in milliseconds.
    pub total_time: u64,
    /// The same in microseconds.
    pub total_time_us: u64,
    /// How long the guest was paused, without `verify-time`, in milliseconds. At a destination from the source's word that it
    /// is paused until the VM ran. Not of a background snapshot, nor of a migration that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// The same in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_us: Option<u64>,
    /// Its parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_parts: Option<DowntimeParts>,
    /// How long comparing all pages took, in which the guest was paused as well, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify_time: Option<f64>,
    /// From the beginning of `total-time` until the destination knew all RAM blocks, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub setup_time: Option<u64>,
    /// The same in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub setup_time_us: Option<u64>,
    /// Memory.
    pub ram: RamReport,
    /// How many there are.
    pub channels: usize,
    /// How page contents were compressed, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<String>,
    /// What each channel made of the choice to compress, where it had one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub auto_compression: Vec<ChannelCompression>,
    /// How sending without copies went, where it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zero_copy: Option<ZeroCopy>,
    /// Where rounds end on main.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dialect: Option<String>,
    /// By how many percent the guest was slowed down in the end.
    #[serde(default)]
    pub cpu_throttle_percentage: u8,
    /// How memory that was never touched got its content, by block, where there was a choice.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fresh_memory: Vec<FreshMemory>,
    /// What the audit found, where one was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<Audit>,
    /// The rounds that are over: the first and the last 500. `dirty-sync-count` and the totals are of all.
    pub rounds: Vec<Round>,
    /// Bytes on each channel.
    pub channel_bytes: Vec<u64>,
}

/// The parts of the downtime, in the order in which they follow each other, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DowntimeParts {
    /// Pausing vCPUs and devices.
    pub pause: f64,
    /// Fetching the pages written until then.
    pub drain: f64,
    /// Sending them.
    pub last_round: f64,
    /// Saving and sending device state.
    pub devices: f64,
    /// Until the destination has loaded it and said so.
    pub confirm: f64,
}

/// What happened to the memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct RamReport {
    /// Bytes on all connections.
    pub transferred: u64,
    /// Bytes of RAM.
    pub total: u64,
    /// Bytes of pages still to be sent.
    pub remaining: u64,
    /// Pages sent as zeros.
    pub duplicate: u64,
    /// Pages not sent because they were never touched.
    pub skipped: u64,
    /// Pages sent with content.
    pub normal: u64,
    /// Their bytes.
    pub normal_bytes: u64,
    /// Rounds: how often the dirty log was fetched.
    pub dirty_sync_count: u64,
    /// Bytes in a page.
    pub page_size: usize,
    /// Megabits per second while memory was sent.
    pub mbps: f64,
    /// Bytes on the channels.
    pub multifd_bytes: u64,
    /// Pages per second while memory was sent.
    pub pages_per_second: u64,
    /// Pages written per second, in the latest round with the guest running; 0 where that is not known.
    pub dirty_pages_rate: u64,
    /// Bytes sent while the guest was running at the source.
    pub precopy_bytes: u64,
    /// Bytes of the round in which it was paused.
    pub downtime_bytes: u64,
    /// Bytes sent while the guest was running at the destination.
    pub postcopy_bytes: u64,
    /// Pages that such a guest asked for.
    pub postcopy_requests: u64,
    /// SYNCs on a channel before which pages were copied that were to be sent without a copy.
    pub dirty_sync_missed_zero_copy: u64,
}

/// One round that is over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Round {
    /// Counted from 0, which sends every page.
    pub round: u64,
    /// Pages that it had to send; at a destination, pages that came.
    pub dirty_pages: u64,
    /// Pages sent with content.
    pub normal: u64,
    /// Pages sent as zeros.
    pub duplicate: u64,
    /// Pages that were not sent because the guest had written them again, which the source knows: the next round has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postponed: Option<u64>,
    /// Bytes on all connections.
    pub bytes: u64,
    /// In milliseconds.
    pub time: f64,
    /// The part of it for which the first channel that was done waited for the last, in milliseconds.
    pub barrier_time: f64,
    /// Not in the last.
    pub guest_running: bool,
    /// Pages written meanwhile, which the source knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_after: Option<u64>,
    /// What a pause would take that sends those, in milliseconds; none where no speed was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_downtime: Option<u64>,
    /// The same in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_downtime_us: Option<u64>,
    /// By how many percent the guest was slowed down, which the source knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle: Option<u8>,
}

impl MigrationReport {
    /// A migration that the source finished. `verify_time` is the part of the pause in which it digested its pages.
    pub fn sent(report: &source::Report, verify_time: Duration) -> MigrationReport {
        let downtime = report.downtime;
        let parts = DowntimeParts {
            pause: millis(downtime.pause),
            drain: millis(downtime.drain),
            last_round: millis(downtime.last_round),
            devices: millis(downtime.devices.saturating_sub(verify_time)),
            confirm: millis(downtime.confirm),
        };
        MigrationReport {
            total_time: whole_millis(report.total),
            total_time_us: micros(report.total),
            downtime: Some(whole_millis(downtime.total.saturating_sub(verify_time))),
            downtime_us: Some(micros(downtime.total.saturating_sub(verify_time))),
            downtime_parts: Some(parts),
            verify_time: (!verify_time.is_zero()).then(|| millis(verify_time)),
            setup_time: Some(whole_millis(report.setup)),
            setup_time_us: Some(micros(report.setup)),
            ram: RamReport::new(Totals {
                page_size: report.page_size,
                total: report.ram_bytes,
                remaining: 0,
                normal: report.normal,
                zero: report.zero,
                skipped: report.skipped,
                main_bytes: report.main_bytes,
                multifd_bytes: report.channel_bytes.iter().sum(),
                rounds: report.rounds_total,
                seconds: report.rounds_took.as_secs_f64(),
                by_round: &report.rounds,
                missed_zero_copy: report.zero_copy.as_ref().map(|zero_copy| zero_copy.syncs_with_copies),
            }),
            channels: report.channel_bytes.len(),
            compression: Some(match report.auto_compression.is_empty() {
                true => compression_name(report.compression).to_owned(),
                false => "auto".to_owned(),
            }),
            auto_compression: report.auto_compression.iter().map(ChannelCompression::from).collect(),
            zero_copy: report.zero_copy.as_ref().map(ZeroCopy::from),
            dialect: Some(dialect_name(report.dialect).to_owned()),
            cpu_throttle_percentage: report.throttle,
            fresh_memory: Vec::new(),
            audit: None,
            rounds: report.rounds.iter().map(Round::sent).collect(),
            channel_bytes: report.channel_bytes.clone(),
        }
    }

    /// Takes the time out of the downtime for which the destination compared digests, in milliseconds.
    pub fn exclude_verify_time(&mut self, destination: f64) {
        if let Some(downtime) = &mut self.downtime_us {
            *downtime = downtime.saturating_sub((destination * 1e3) as u64);
            self.downtime = Some(whole_millis(Duration::from_micros(*downtime)));
        }
        if let Some(parts) = &mut self.downtime_parts {
            // The destination compares while the source waits, mostly for the confirmation; it may begin before.
            let before = (destination - parts.confirm).max(0.0);
            parts.confirm = (parts.confirm - destination).max(0.0);
            parts.devices = (parts.devices - before).max(0.0);
        }
        if destination > 0.0 {
            self.verify_time = Some(self.verify_time.unwrap_or_default() + destination);
        }
    }

    /// A migration that the destination finished, in pages of `page_size`.
    pub fn received(report: &destination::Report, page_size: usize, verify_time: Duration) -> MigrationReport {
        let downtime = report.downtime.map(|time| time.saturating_sub(verify_time));
        MigrationReport {
            total_time: whole_millis(report.total),
            total_time_us: micros(report.total),
            downtime: downtime.map(whole_millis),
            downtime_us: downtime.map(micros),
            downtime_parts: None,
            verify_time: (!verify_time.is_zero()).then(|| millis(verify_time)),
            setup_time: Some(whole_millis(report.setup)),
            setup_time_us: Some(micros(report.setup)),
            ram: RamReport::new(Totals {
                page_size,
                total: report.blocks.iter().map(|(_, bytes)| bytes).sum(),
                remaining: 0,
                normal: report.normal,
                zero: report.zero,
                skipped: 0,
                main_bytes: report.main_bytes,
                multifd_bytes: report.channel_bytes.iter().sum(),
                rounds: report.rounds_total,
                // A plain stream has no sync points.
                seconds: match report.rounds_total {
                    0 => report.total.saturating_sub(verify_time).as_secs_f64(),
                    _ => report.rounds_took.as_secs_f64(),
                },
                by_round: &report.rounds,
                missed_zero_copy: None,
            }),
            channels: report.channels,
            compression: report.compression.map(|compression| compression_name(compression).to_owned()),
            auto_compression: Vec::new(),
            zero_copy: None,
            dialect: report.dialect.map(|dialect| dialect_name(dialect).to_owned()),
            cpu_throttle_percentage: 0,
            fresh_memory: report.fresh_memory.iter().map(FreshMemory::from).collect(),
            audit: report.audit.as_ref().map(Audit::from),
            rounds: report.rounds.iter().map(Round::received).collect(),
            channel_bytes: report.channel_bytes.clone(),
        }
    }

    /// A migration that failed on this side: as far as it got, in pages of `page_size`, with `rounds` over after `total_time`.
    pub fn partial(
        role: Role,
        progress: &Progress,
        rounds: &Rounds,
        page_size: usize,
        total_time: Duration,
    ) -> MigrationReport {
        let kept: Vec<RoundStats> = rounds.iter().cloned().collect();
        let snapshot = progress.snapshot();
        let mut channel_bytes = progress.channel_bytes(MAX_CHANNELS);
        let channels = channel_bytes.iter().rposition(|&bytes| bytes > 0).map_or(0, |last| last + 1);
        channel_bytes.truncate(channels);
        MigrationReport {
            total_time: whole_millis(total_time),
            total_time_us: micros(total_time),
            downtime: None,
            downtime_us: None,
            downtime_parts: None,
            verify_time: None,
            setup_time: None,
            setup_time_us: None,
            ram: RamReport::new(Totals {
                page_size,
                total: snapshot.pages_total * page_size as u64,
                remaining: snapshot.round_pages.saturating_sub(snapshot.round_done) * page_size as u64,
                normal: snapshot.normal,
                zero: snapshot.zero,
                skipped: snapshot.skipped,
                main_bytes: snapshot.main_bytes,
                multifd_bytes: snapshot.channel_bytes,
                rounds: rounds.count(),
                seconds: rounds.took().as_secs_f64(),
                by_round: &kept,
                missed_zero_copy: None,
            }),
            channels,
            compression: None,
            auto_compression: Vec::new(),
            zero_copy: None,
            dialect: None,
            cpu_throttle_percentage: rounds.latest().map_or(0, |round| round.throttle),
            fresh_memory: Vec::new(),
            audit: None,
            rounds: kept.iter().map(|stats| Round::new(role, stats)).collect(),
            channel_bytes,
        }
    }
}

/// What [`RamReport`] is computed from.
struct Totals<'a> {
    page_size: usize,
    total: u64,
    remaining: u64,
    normal: u64,
    zero: u64,
    skipped: u64,
    main_bytes: u64,
    multifd_bytes: u64,
    rounds: u64,
    /// How long memory was sent.
    seconds: f64,
    /// The rounds that were kept, of which the latest are some.
    by_round: &'a [RoundStats],
    /// SYNCs before which something was copied; nothing where that was not to be avoided.
    missed_zero_copy: Option<u64>,
}

impl RamReport {
    fn new(totals: Totals<'_>) -> RamReport {
        let per_second = |amount: u64| if totals.seconds > 0.0 { amount as f64 / totals.seconds } else { 0.0 };
        let transferred = totals.main_bytes + totals.multifd_bytes;
        let paused = totals.by_round.last().filter(|round| !round.guest_running);
        let downtime_bytes = paused.map_or(0, |round| round.bytes).min(transferred);
        RamReport {
            transferred,
            total: totals.total,
            remaining: totals.remaining,
            duplicate: totals.zero,
            skipped: totals.skipped,
            normal: totals.normal,
            normal_bytes: totals.normal * totals.page_size as u64,
            dirty_sync_count: totals.rounds,
            page_size: totals.page_size,
            mbps: per_second(transferred) * 8.0 / 1e6,
            multifd_bytes: totals.multifd_bytes,
            pages_per_second: per_second(totals.normal + totals.zero) as u64,
            dirty_pages_rate: totals.by_round.iter().rev().find(|round| round.guest_running).map_or(0, dirty_rate),
            precopy_bytes: transferred - downtime_bytes,
            downtime_bytes,
            postcopy_bytes: 0,
            postcopy_requests: 0,
            dirty_sync_missed_zero_copy: totals.missed_zero_copy.unwrap_or(0),
        }
    }
}

/// Pages written per second while `round` was sent.
fn dirty_rate(round: &RoundStats) -> u64 {
    let seconds = round.took.as_secs_f64();
    if seconds > 0.0 { (round.dirty_after as f64 / seconds) as u64 } else { 0 }
}

impl Round {
    /// A round as the side sees it that this process is.
    pub fn new(role: Role, stats: &RoundStats) -> Round {
        match role {
            Role::Source => Round::sent(stats),
            Role::Destination => Round::received(stats),
        }
    }

    /// What a destination knows of a round.
    fn received(stats: &RoundStats) -> Round {
        let sent = Round::sent(stats);
        Round {
            postponed: None,
            dirty_after: None,
            expected_downtime: None,
            expected_downtime_us: None,
            throttle: None,
            ..sent
        }
    }

    /// What a source knows of a round.
    fn sent(stats: &RoundStats) -> Round {
        let expected = Some(stats.expected_downtime).filter(|time| *time < Duration::MAX);
        Round {
            round: stats.round,
            dirty_pages: stats.dirty_pages,
            normal: stats.normal,
            duplicate: stats.zero,
            postponed: Some(stats.postponed),
            bytes: stats.bytes,
            time: millis(stats.took),
            barrier_time: millis(stats.barrier),
            guest_running: stats.guest_running,
            dirty_after: Some(stats.dirty_after),
            expected_downtime: expected.map(whole_millis),
            expected_downtime_us: expected.map(micros),
            throttle: Some(stats.throttle),
        }
    }
}

const MAX_CHANNELS: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::fields;

    #[test]
    fn the_time_for_digests_is_no_downtime() {
        let mut report = empty();
        report.downtime.total = Duration::from_millis(50);
        report.downtime.devices = Duration::from_millis(31);
        let report = MigrationReport::sent(&report, Duration::from_millis(30));
        assert_eq!((report.downtime, report.downtime_us), (Some(20), Some(20_000)));
        assert_eq!(report.downtime_parts.unwrap().devices, 1.0);
        assert_eq!(report.verify_time, Some(30.0));
    }

    #[test]
    fn names_are_those_of_qmp() {
        let fields = fields(&MigrationReport::sent(&empty(), Duration::ZERO));
        for name in ["total-time", "downtime", "setup-time", "ram", "channels", "compression", "dialect", "rounds"] {
            assert!(fields.contains_key(name), "{name}");
        }
        let ram = fields["ram"].as_object().unwrap();
        for name in ["transferred", "total", "remaining", "duplicate", "normal", "normal-bytes", "dirty-sync-count"] {
            assert!(ram.contains_key(name), "{name}");
        }
        for name in ["page-size", "mbps", "multifd-bytes", "pages-per-second"] {
            assert!(ram.contains_key(name), "{name}");
        }
    }

    /// 1000 of 2000 rounds were counted as all of them, and their time as the whole time.
    #[test]
    fn the_totals_are_those_of_all_rounds_and_not_of_those_that_are_kept() {
        let mut sent = empty();
        (sent.rounds_total, sent.rounds_took, sent.normal) = (2000, Duration::from_secs(4), 8000);
        let mut last = RoundStats::default();
        (last.round, last.bytes) = (1999, 30);
        (sent.rounds, sent.main_bytes) = (vec![last], 100);
        let report = MigrationReport::sent(&sent, Duration::ZERO);
        assert_eq!((report.ram.dirty_sync_count, report.ram.pages_per_second), (2000, 2000));
        assert_eq!((report.ram.precopy_bytes, report.ram.downtime_bytes), (70, 30));
        let mut received = destination::Report::default();
        (received.rounds_total, received.rounds_took, received.zero) = (2000, Duration::from_secs(4), 8000);
        let report = MigrationReport::received(&received, 4096, Duration::ZERO);
        assert_eq!((report.ram.dirty_sync_count, report.ram.pages_per_second), (2000, 2000));
    }

    #[test]
    fn typed_readers_of_qmp_take_the_figures_of_memory() {
        use multifd_qmp::qapi_qmp::MigrationStats;
        let fields = fields(&MigrationReport::sent(&empty(), Duration::ZERO));
        let stats: MigrationStats = serde_json::from_value(fields["ram"].clone()).unwrap();
        assert_eq!((stats.page_size, stats.pages_per_second), (4096, 0));
        for name in ["total-time", "downtime", "setup-time", "cpu-throttle-percentage"] {
            assert!(fields[name].is_u64(), "{name}: {}", fields[name]);
        }
    }

    #[test]
    fn a_destination_does_not_tell_what_it_cannot_know() {
        let stats = RoundStats::default();
        let known = |role| fields(&Round::new(role, &stats)).keys().cloned().collect::<Vec<_>>();
        let of_the_source = ["dirty-after", "expected-downtime", "expected-downtime-us", "throttle"];
        for name in of_the_source {
            assert!(known(Role::Source).iter().any(|key| key == name), "{name}");
            assert!(!known(Role::Destination).iter().any(|key| key == name), "{name}");
        }
    }

    fn empty() -> source::Report {
        let mut report = source::Report::default();
        report.total = Duration::from_secs(1);
        (report.ram_bytes, report.page_size) = (4096, 4096);
        report.channel_bytes = vec![0; 4];
        report.dirty_log = "test";
        report
    }
}
