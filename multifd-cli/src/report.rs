//! What a verb hands back: text for a person, or one JSON object with the names of QMP's `query-migrate`.

use std::{
    io::{self, Write},
    os::fd::AsFd,
    time::Duration,
};

use multifd::{
    destination,
    error::Error,
    progress::{Progress, RoundStats},
    source,
};
use multifd_proto::{machine::Dialect, packet::Compression};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, makedev};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{args::OutputArgs, exit::Exit, printable, rounds::Rounds, table, terminal};

/// The end of a verb.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The exit status.
    pub exit: Exit,
    /// Why it is not [`Exit::Done`].
    pub error: Option<String>,
    /// The JSON report, but for `status` and `error`.
    pub report: Map<String, Value>,
    /// The same for a person; may be empty.
    pub text: String,
}

impl Outcome {
    /// A good end, described by `report`.
    pub fn done(report: Map<String, Value>, text: String) -> Outcome {
        Outcome { exit: Exit::Done, error: None, report, text }
    }

    /// An end without a report.
    pub fn failed(exit: Exit, error: impl ToString) -> Outcome {
        Outcome { exit, error: Some(error.to_string()), report: Map::new(), text: String::new() }
    }

    /// The end of a migration that did not come to its end.
    pub fn migration_failed(error: &Error, report: Map<String, Value>) -> Outcome {
        Outcome { exit: Exit::from(error), error: Some(error.to_string()), report, text: String::new() }
    }

    /// Adds `message`. The exit status becomes `exit` where all was well so far, and where it says more than the one before.
    pub fn worsen(&mut self, exit: Exit, message: &str) {
        if self.exit == Exit::Done || exit == Exit::InDoubt {
            self.exit = exit;
        }
        self.error = Some(match self.error.take() {
            Some(error) => format!("{error}; {message}"),
            None => message.to_owned(),
        });
    }

    /// The JSON object.
    pub fn json(&self) -> Value {
        let mut object = Map::new();
        object.insert("status".to_owned(), self.exit.status().into());
        if let Some(error) = &self.error {
            object.insert("error".to_owned(), error.clone().into());
        }
        if self.exit == Exit::InDoubt {
            object.insert("in-doubt".to_owned(), true.into());
        }
        if self.exit == Exit::Incomplete {
            object.insert("incomplete".to_owned(), true.into());
        }
        object.extend(self.report.clone());
        Value::Object(object)
    }

    /// Prints it: the result to stdout, what went wrong to stderr. `for_parent`: another process reports the error.
    ///
    /// Returns the exit status. It is not [`Exit::Done`] where the result could not be written.
    pub fn print(&self, output: &OutputArgs, for_parent: bool) -> Exit {
        let printed = if output.json { self.print_json() } else { print(&printable::lines(&self.text)) };
        if let Some(error) = self.error.as_ref().filter(|_| !for_parent) {
            terminal::say(&format!("multifd: {error}"));
        }
        match printed {
            Err(error) => {
                let done = if self.exit == Exit::Done { "all is done, but " } else { "" };
                terminal::say(&format!("multifd: {done}the result could not be written to stdout: {error}"));
                if self.exit == Exit::Done { Exit::Failed } else { self.exit }
            }
            Ok(()) => self.exit,
        }
    }

    /// Prints the JSON object to stdout.
    ///
    /// # Errors
    /// The kernel's.
    pub fn print_json(&self) -> io::Result<()> {
        print(&format!("{}\n", printable::json(&self.json().to_string())))
    }
}

/// Writes `text` to stdout.
///
/// # Errors
/// The kernel's; [`io::ErrorKind::NotConnected`] where the process was started without a stdout.
fn print(text: &str) -> io::Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    if stdout_was_closed() {
        return Err(io::Error::new(io::ErrorKind::NotConnected, "it is closed"));
    }
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Whether stdout was closed when the process began: Rust has put `/dev/null` in its place, for reading and writing. A
/// daemon has that as well, but as all three streams.
fn stdout_was_closed() -> bool {
    fn is_null(stream: impl AsFd) -> bool {
        let null = fstat(&stream).is_ok_and(|stat| {
            stat.st_rdev == makedev(1, 3) && FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        });
        null && fcntl_getfl(&stream).is_ok_and(|flags| flags.contains(OFlags::RDWR))
    }
    is_null(io::stdout()) && !(is_null(io::stdin()) && is_null(io::stderr()))
}

/// The fields of `value`, which is a struct, as part of a JSON object.
pub fn fields(value: &impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(value) {
        Ok(Value::Object(fields)) => fields,
        other => unreachable!("reports are structs with text keys: {other:?}"),
    }
}

/// The figures of one migration. Times are in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationReport {
    /// From the first connect to the confirmation.
    pub total_time: f64,
    /// How long the guest was paused, without `verify-time`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<f64>,
    /// Its parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_parts: Option<DowntimeParts>,
    /// How long comparing all pages took, in which the guest was paused as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify_time: Option<f64>,
    /// Until the destination knew all RAM blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub setup_time: Option<f64>,
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
    /// What the audit found, where one was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<Audit>,
    /// The rounds that are over: the first and the last 500.
    pub rounds: Vec<Round>,
    /// Bytes on each channel.
    pub channel_bytes: Vec<u64>,
}

/// The parts of the downtime, in the order in which they follow each other, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    pub pages_per_second: f64,
    /// SYNCs on a channel before which pages were copied that were to be sent without a copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_sync_missed_zero_copy: Option<u64>,
}

/// What a channel made of the choice to compress.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChannelCompression {
    /// Which channel.
    pub channel: u8,
    /// Packets whose pages were sent as they are.
    pub packets_plain: u64,
    /// Packets whose pages were compressed.
    pub packets_compressed: u64,
    /// How often it changed from one way to the other, without trials.
    pub switches: u64,
    /// Bytes of guest memory for a byte that came out of the compressor.
    pub ratio: Option<f64>,
    /// Bytes of guest memory that the compressor took per second.
    pub compressor_bytes_per_second: Option<f64>,
    /// Bytes per second that the connection took when pages were last sent as they are.
    pub plain_bytes_per_second: Option<f64>,
    /// Whether it compressed in the end.
    pub compresses: bool,
    /// Why.
    pub reason: String,
}

impl ChannelCompression {
    /// The same in a sentence.
    pub fn text(&self) -> String {
        let packets = self.packets_plain + self.packets_compressed;
        format!(
            "channel {}: {} of {} packets compressed; {}",
            self.channel,
            table::grouped(self.packets_compressed),
            table::grouped(packets),
            self.reason
        )
    }
}

impl From<&source::ChannelCompression> for ChannelCompression {
    fn from(channel: &source::ChannelCompression) -> ChannelCompression {
        ChannelCompression {
            channel: channel.channel.0,
            packets_plain: channel.packets_plain,
            packets_compressed: channel.packets_compressed,
            switches: channel.switches,
            ratio: channel.ratio,
            compressor_bytes_per_second: channel.compressor_speed,
            plain_bytes_per_second: channel.plain_speed,
            compresses: channel.compresses,
            reason: channel.reason.clone(),
        }
    }
}

/// How sending without copies went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ZeroCopy {
    /// System calls that were to send pages without a copy.
    pub sends: u64,
    /// Those of them whose pages were copied after all.
    pub copied: u64,
    /// Those of the copied ones for which the kernel had no room.
    pub no_room: u64,
    /// Why it was not possible at all, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

impl ZeroCopy {
    /// The same in a few words.
    pub fn text(&self) -> String {
        let ZeroCopy { sends, copied, no_room, refused } = self;
        let [sends_text, copied_text, no_room_text] = [sends, copied, no_room].map(|count| table::grouped(*count));
        match refused {
            Some(why) => format!("not possible here, pages were copied: {why}"),
            None if *no_room > 0 => format!(
                "{copied_text} of {sends_text} sends were copied, {no_room_text} of them for lack of room (ulimit -l, \
                 net.core.optmem_max)"
            ),
            None if *copied > 0 => format!(
                "{copied_text} of {sends_text} sends were copied by the kernel, as it does where the connection does not \
                 leave this machine"
            ),
            None => format!("{sends_text} sends, none of them copied"),
        }
    }
}

impl From<&source::ZeroCopy> for ZeroCopy {
    fn from(zero_copy: &source::ZeroCopy) -> ZeroCopy {
        let &source::ZeroCopy { sends, copied, no_room, .. } = zero_copy;
        ZeroCopy { sends, copied, no_room, refused: zero_copy.refused.clone() }
    }
}

/// What watching the rounds of all writes found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Audit {
    /// Writes that came from an older round than the page already held.
    pub stale_writes: u64,
    /// The first of them, in words.
    pub first: Vec<String>,
}

impl Audit {
    /// The same in a sentence.
    pub fn text(&self) -> String {
        match self.first.first() {
            None => "audit: no page was written from an older round than it held".to_owned(),
            Some(first) => {
                format!(
                    "audit: {} pages were written from an older round than they held, first {first}",
                    self.stale_writes
                )
            }
        }
    }
}

impl From<&destination::Findings> for Audit {
    fn from(findings: &destination::Findings) -> Audit {
        let first = findings.first.iter().map(ToString::to_string).collect();
        Audit { stale_writes: findings.stale_writes, first }
    }
}

/// One round that is over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Round {
    /// Counted from 0, which sends every page.
    pub round: u64,
    /// Pages that it had to send.
    pub dirty_pages: u64,
    /// Pages sent with content.
    pub normal: u64,
    /// Pages sent as zeros.
    pub duplicate: u64,
    /// Bytes on all connections.
    pub bytes: u64,
    /// In milliseconds.
    pub time: f64,
    /// Not in the last.
    pub guest_running: bool,
    /// Pages written meanwhile.
    pub dirty_after: u64,
    /// What sending those would take, in milliseconds; none where no speed was measured.
    pub expected_downtime: Option<f64>,
    /// By how many percent the guest was slowed down.
    pub throttle: u8,
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
        let rounds: Rounds = report.rounds.iter().collect();
        MigrationReport {
            total_time: millis(report.total),
            downtime: Some(millis(downtime.total.saturating_sub(verify_time))),
            downtime_parts: Some(parts),
            verify_time: (!verify_time.is_zero()).then(|| millis(verify_time)),
            setup_time: Some(millis(report.setup)),
            ram: RamReport::new(Totals {
                page_size: report.page_size,
                total: report.ram_bytes,
                remaining: 0,
                normal: report.normal,
                zero: report.zero,
                skipped: report.skipped,
                main_bytes: report.main_bytes,
                multifd_bytes: report.channel_bytes.iter().sum(),
                rounds: rounds.count(),
                seconds: rounds.took().as_secs_f64(),
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
            audit: None,
            rounds: rounds.iter().map(Round::from).collect(),
            channel_bytes: report.channel_bytes.clone(),
        }
    }

    /// Takes the time out of the downtime for which the destination compared digests, in milliseconds.
    pub fn exclude_verify_time(&mut self, destination: f64) {
        if let Some(downtime) = &mut self.downtime {
            *downtime = (*downtime - destination).max(0.0);
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
        let rounds: Rounds = report.rounds.iter().collect();
        MigrationReport {
            total_time: millis(report.total),
            downtime: None,
            downtime_parts: None,
            verify_time: (!verify_time.is_zero()).then(|| millis(verify_time)),
            setup_time: None,
            ram: RamReport::new(Totals {
                page_size,
                total: report.blocks.iter().map(|(_, bytes)| bytes).sum(),
                remaining: 0,
                normal: report.normal,
                zero: report.zero,
                skipped: 0,
                main_bytes: report.main_bytes,
                multifd_bytes: report.channel_bytes.iter().sum(),
                rounds: rounds.count(),
                // The first of its rounds may have begun long before the first page came.
                seconds: report.total.saturating_sub(verify_time).as_secs_f64(),
                missed_zero_copy: None,
            }),
            channels: report.channels,
            compression: report.compression.map(|compression| compression_name(compression).to_owned()),
            auto_compression: Vec::new(),
            zero_copy: None,
            dialect: report.dialect.map(|dialect| dialect_name(dialect).to_owned()),
            cpu_throttle_percentage: 0,
            audit: report.audit.as_ref().map(Audit::from),
            rounds: rounds.iter().map(Round::from).collect(),
            channel_bytes: report.channel_bytes.clone(),
        }
    }

    /// A migration that failed: as far as it got, in pages of `page_size`, with `rounds` over after `total_time`.
    pub fn partial(progress: &Progress, rounds: &Rounds, page_size: usize, total_time: Duration) -> MigrationReport {
        let snapshot = progress.snapshot();
        let mut channel_bytes = progress.channel_bytes(MAX_CHANNELS);
        let channels = channel_bytes.iter().rposition(|&bytes| bytes > 0).map_or(0, |last| last + 1);
        channel_bytes.truncate(channels);
        MigrationReport {
            total_time: millis(total_time),
            downtime: None,
            downtime_parts: None,
            verify_time: None,
            setup_time: None,
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
                missed_zero_copy: None,
            }),
            channels,
            compression: None,
            auto_compression: Vec::new(),
            zero_copy: None,
            dialect: None,
            cpu_throttle_percentage: rounds.latest().map_or(0, |round| round.throttle),
            audit: None,
            rounds: rounds.iter().map(Round::from).collect(),
            channel_bytes,
        }
    }
}

/// What [`RamReport`] is computed from.
struct Totals {
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
    /// SYNCs before which something was copied; nothing where that was not to be avoided.
    missed_zero_copy: Option<u64>,
}

impl RamReport {
    fn new(totals: Totals) -> RamReport {
        let per_second = |amount: u64| if totals.seconds > 0.0 { amount as f64 / totals.seconds } else { 0.0 };
        let transferred = totals.main_bytes + totals.multifd_bytes;
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
            pages_per_second: per_second(totals.normal + totals.zero),
            dirty_sync_missed_zero_copy: totals.missed_zero_copy,
        }
    }
}

impl From<&RoundStats> for Round {
    fn from(stats: &RoundStats) -> Round {
        Round {
            round: stats.round,
            dirty_pages: stats.dirty_pages,
            normal: stats.normal,
            duplicate: stats.zero,
            bytes: stats.bytes,
            time: millis(stats.took),
            guest_running: stats.guest_running,
            dirty_after: stats.dirty_after,
            expected_downtime: (stats.expected_downtime < Duration::MAX).then(|| millis(stats.expected_downtime)),
            throttle: stats.throttle,
        }
    }
}

/// `time` in milliseconds, to the microsecond.
pub fn millis(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}

/// The word for `dialect` in options and reports.
pub fn dialect_name(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::PerRound => "per-round",
        Dialect::PerSection => "per-section",
    }
}

/// The word for `compression` in options and reports.
pub fn compression_name(compression: Compression) -> &'static str {
    match compression {
        Compression::None => "none",
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    }
}

const MAX_CHANNELS: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_has_its_status_and_reason_in_front() {
        let mut outcome = Outcome::failed(Exit::Peer, "bad magic");
        outcome.report.insert("channels".to_owned(), 3.into());
        assert_eq!(outcome.json().to_string(), r#"{"status":"failed","error":"bad magic","channels":3}"#);
        assert_eq!(Outcome::failed(Exit::Cancelled, "x").json()["status"], "cancelled");
        let in_doubt = Outcome::failed(Exit::InDoubt, "x").json();
        assert_eq!((&in_doubt["status"], &in_doubt["in-doubt"]), (&"failed".into(), &true.into()));
    }

    #[test]
    fn the_time_for_digests_is_no_downtime() {
        let mut report = empty();
        report.downtime.total = Duration::from_millis(50);
        report.downtime.devices = Duration::from_millis(31);
        let report = MigrationReport::sent(&report, Duration::from_millis(30));
        assert_eq!(report.downtime, Some(20.0));
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

    fn empty() -> source::Report {
        let mut report = source::Report::default();
        report.total = Duration::from_secs(1);
        (report.ram_bytes, report.page_size) = (4096, 4096);
        report.channel_bytes = vec![0; 4];
        report.dirty_log = "test";
        report
    }
}
