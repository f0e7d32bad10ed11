//! What is reported of a postcopy.

use multifd::postcopy::Report;
use schemars::JsonSchema;
use serde::Serialize;

use crate::{report::millis, table};

/// `postcopy` of the report.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PostcopyReport {
    /// From the first connect until RUN was written, in milliseconds; not of a process that only recovers.
    pub resume_time: Option<f64>,
    /// Requests that came.
    pub requests: u64,
    /// From a request's arrival until its page was written to the socket, in microseconds.
    pub request_latency_us: LatencyReport,
    /// Pages sent because they were asked for, zeros included.
    pub urgent_pages: u64,
    /// Pages with content sent by themselves.
    pub background_pages: u64,
    /// Pages sent because a list names them.
    pub prefetched_pages: u64,
    /// Pages of zeros, asked for or at the end.
    pub zero_pages: u64,
    /// Pages with content that the destination lacks, as far as it is known.
    pub remaining_pages: u64,
    /// Bytes on the connection for pages that are asked for.
    pub preempt_bytes: u64,
    /// Recoveries that were begun.
    pub recoveries: u64,
}

/// How long requests waited, in microseconds, to a sixteenth.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct LatencyReport {
    /// Half of them no longer.
    pub p50: u64,
    /// 99 % no longer.
    pub p99: u64,
    /// The longest.
    pub max: u64,
}

impl From<&Report> for PostcopyReport {
    fn from(report: &Report) -> PostcopyReport {
        let micros = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let latency = report.latency;
        PostcopyReport {
            resume_time: report.resume.map(millis),
            requests: report.requests,
            request_latency_us: LatencyReport {
                p50: micros(latency.p50),
                p99: micros(latency.p99),
                max: micros(latency.max),
            },
            urgent_pages: report.urgent_pages,
            background_pages: report.background_pages,
            prefetched_pages: report.prefetched_pages,
            zero_pages: report.zero_pages,
            remaining_pages: report.left,
            preempt_bytes: report.preempt_bytes,
            recoveries: report.recoveries,
        }
    }
}

impl PostcopyReport {
    /// The same in lines for a person.
    pub fn text(&self) -> String {
        let resumed = self.resume_time.map_or_else(String::new, |time| {
            format!("  the destination was told to run the VM after {}\n", table::milliseconds(time))
        });
        let LatencyReport { p50, p99, max } = self.request_latency_us;
        let recoveries = match self.recoveries {
            0 => String::new(),
            1 => "  1 recovery\n".to_owned(),
            more => format!("  {more} recoveries\n"),
        };
        format!(
            "{resumed}  {} requests, answered within {p50} us (p50), {p99} us (p99), {max} us (max)\n  pages: {} asked for, {} in \
             the background, {} listed, {} zeros\n{recoveries}",
            table::grouped(self.requests),
            table::grouped(self.urgent_pages),
            table::grouped(self.background_pages),
            table::grouped(self.prefetched_pages),
            table::grouped(self.zero_pages),
        )
    }
}
