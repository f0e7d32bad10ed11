//! The metrics of a migration in the text format of Prometheus.
//!
//! Base units: bytes, seconds, pages where it is pages. Counters end in `_total`; they begin anew with each migration of the
//! process, as those of a process that was restarted do.

use std::fmt::Write;

use multifd::progress::{Phase, Progress, Snapshot};

use crate::current::{Current, Ended};

/// The content type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics.
pub fn render(current: Option<&Current>, ended: Ended) -> String {
    let mut out = Text::default();
    build(&mut out);
    out.family("multifd_migrations_total", "counter", "Migrations of this process that are over.");
    out.sample("multifd_migrations_total", &[("status", "completed")], ended.completed as f64);
    out.sample("multifd_migrations_total", &[("status", "failed")], ended.failed as f64);
    if let Some(current) = current {
        let role = current.role.name();
        migration(&mut out, role, &current.progress, current.is_over);
    }
    out.0
}

/// Which program says it.
pub(super) fn build(out: &mut Text) {
    out.family("multifd_build_info", "gauge", "The version of the command; always 1.");
    out.sample("multifd_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
}

fn migration(out: &mut Text, role: &str, progress: &Progress, is_over: bool) {
    let snapshot = progress.snapshot();
    let of = [("role", role)];
    out.family("multifd_active", "gauge", "Whether a migration is under way.");
    out.sample("multifd_active", &of, f64::from(u8::from(!is_over)));
    phases(out, role, progress, &snapshot);
    out.family("multifd_main_bytes_total", "counter", "Bytes on the main connection.");
    out.sample("multifd_main_bytes_total", &of, snapshot.main_bytes as f64);
    out.family("multifd_channel_bytes_total", "counter", "Bytes on each channel.");
    let channels = progress.channel_bytes(MAX_CHANNELS);
    let used = channels.iter().rposition(|&bytes| bytes > 0).map_or(0, |last| last + 1);
    for (channel, bytes) in channels[..used].iter().enumerate() {
        let channel = channel.to_string();
        out.sample("multifd_channel_bytes_total", &[("role", role), ("channel", &channel)], *bytes as f64);
    }
    out.family("multifd_pages_total", "counter", "Pages sent or received, by what they are.");
    for (kind, pages) in [("normal", snapshot.normal), ("zero", snapshot.zero), ("skipped", snapshot.skipped)] {
        out.sample("multifd_pages_total", &[("role", role), ("kind", kind)], pages as f64);
    }
    out.family(
        "multifd_postponed_pages_total",
        "counter",
        "Pages left to the next round because the guest wrote them again.",
    );
    out.sample("multifd_postponed_pages_total", &of, snapshot.postponed as f64);
    out.family("multifd_postcopy_requests_total", "counter", "Pages that a guest at the destination asked for.");
    out.sample("multifd_postcopy_requests_total", &of, snapshot.requests as f64);
    for (name, help, value) in [
        ("multifd_memory_pages", "Pages of the VM.", snapshot.pages_total),
        ("multifd_round", "The round that is sent or received, counted from 0.", snapshot.round),
        ("multifd_round_pages", "Pages that this round began with; 0 where it is not known.", snapshot.round_pages),
        ("multifd_round_done_pages", "Pages of this round that are done.", snapshot.round_done),
    ] {
        out.family(name, "gauge", help);
        out.sample(name, &of, value as f64);
    }
}

fn phases(out: &mut Text, role: &str, progress: &Progress, snapshot: &Snapshot) {
    let times = progress.phase_times();
    out.family("multifd_phase", "gauge", "1 for the phase of the migration, 0 for the others.");
    for (phase, _) in &times {
        let is_now = snapshot.phase == Some(*phase);
        out.sample("multifd_phase", &[("role", role), ("phase", phase.name())], f64::from(u8::from(is_now)));
    }
    out.family("multifd_phase_seconds_total", "counter", "Time spent in each phase.");
    for (phase, time) in times.iter().filter(|(phase, _)| *phase != Phase::Done) {
        let labels = [("role", role), ("phase", phase.name())];
        out.sample("multifd_phase_seconds_total", &labels, time.as_secs_f64());
    }
}

/// Grows line by line.
#[derive(Default)]
pub(super) struct Text(String);

impl From<Text> for String {
    fn from(text: Text) -> String {
        text.0
    }
}

impl Text {
    pub(super) fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    /// Label values are words of ours: nothing in them has to be escaped.
    pub(super) fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> = labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
        self.line(format_args!("{name}{{{}}} {value}\n", labels.join(",")));
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        self.0.write_fmt(line).expect("a String takes everything");
    }
}

const MAX_CHANNELS: usize = 256;

#[cfg(test)]
mod tests {
    use multifd::source::{self, Source};

    use super::*;
    use crate::role::Role;

    #[test]
    fn each_sample_belongs_to_a_family_with_help_and_type() {
        let progress = Source::new(source::Options::default()).progress();
        let current = Current { role: Role::Source, progress, is_over: false };
        let text = render(Some(&current), Ended { completed: 2, failed: 1 });
        assert!(text.contains("multifd_migrations_total{status=\"completed\"} 2\n"), "{text}");
        assert!(text.contains("multifd_active{role=\"source\"} 1\n"), "{text}");
        let mut family = String::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                family = name.to_owned();
            } else if !line.starts_with('#') {
                assert_eq!(line.split('{').next(), Some(family.as_str()), "{line}");
            }
        }
    }
}
