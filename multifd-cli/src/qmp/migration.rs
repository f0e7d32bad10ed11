//! The migration of this process as `query-migrate` tells it.

use std::time::{Duration, Instant};

use multifd::{postcopy, progress::Progress, source, transport::uri::Uri};
use serde_json::{Map, Value, json};

use crate::{report::MigrationReport, role::Role};

/// How a migration ended.
#[derive(Clone, Debug)]
pub enum End {
    /// Well.
    Completed(Box<MigrationReport>),
    /// It was cancelled.
    Cancelled,
    /// It failed, for this reason.
    Failed(String),
    /// The VM runs at the destination, or may, and lacks memory: another process can go on.
    PostcopyPaused(String),
}

impl End {
    /// QEMU's word for it.
    pub fn status(&self) -> &'static str {
        match self {
            End::Completed(_) => "completed",
            End::Cancelled => "cancelled",
            End::Failed(_) => "failed",
            End::PostcopyPaused(_) => "postcopy-paused",
        }
    }
}

/// The last migration, under way or over.
#[derive(Default)]
pub(super) struct Migration {
    /// None before the first.
    now: Option<Now>,
}

struct Now {
    role: Role,
    status: &'static str,
    progress: Progress,
    handle: Option<source::Handle>,
    address: Option<Uri>,
    begun: Instant,
    /// How long the connections and the set-up took, once they are there.
    setup: Option<Duration>,
    passes: u64,
    /// Steers a source all of whose pages are sent after the guest has resumed at the destination.
    postcopy: Option<postcopy::Handle>,
    end: Option<(End, Duration)>,
}

impl Migration {
    pub(super) fn new(
        role: Role,
        progress: Progress,
        handle: Option<source::Handle>,
        address: Option<Uri>,
    ) -> Migration {
        let (begun, status) = (Instant::now(), "setup");
        let now =
            Now { role, status, progress, handle, address, begun, setup: None, passes: 0, postcopy: None, end: None };
        Migration { now: Some(now) }
    }

    /// All of its pages are sent after the guest has resumed; `handle` steers it.
    pub(super) fn set_postcopy(&mut self, handle: postcopy::Handle) {
        if let Some(now) = &mut self.now {
            now.postcopy = Some(handle);
        }
    }

    /// What steers it, where it is a postcopy under way and this is the source.
    pub(super) fn postcopy(&self) -> Option<&postcopy::Handle> {
        self.now.as_ref().filter(|now| now.end.is_none())?.postcopy.as_ref()
    }

    /// The source connects to `address` from now on.
    pub(super) fn set_address(&mut self, address: Uri) {
        if let Some(now) = &mut self.now {
            now.address = Some(address);
        }
    }

    /// Whether it is under way, in the `role` if that is said, in one of the states `states`.
    pub(super) fn is_in(&self, role: Option<Role>, states: &[&str]) -> bool {
        let now = self.now.as_ref().filter(|now| now.end.is_none());
        now.is_some_and(|now| role.is_none_or(|role| role == now.role) && states.contains(&now.status))
    }

    /// Returns whether it is another one than before. A migration that is over stays as it is.
    pub(super) fn set_status(&mut self, status: &'static str) -> bool {
        let Some(now) = self.now.as_mut().filter(|now| now.end.is_none()) else { return false };
        if now.status == "setup" && status != "setup" {
            now.setup = Some(now.begun.elapsed());
        }
        std::mem::replace(&mut now.status, status) != status
    }

    /// Counts a pass over the dirty pages, from 1.
    pub(super) fn pass(&mut self) -> u64 {
        let Some(now) = &mut self.now else { return 0 };
        now.passes += 1;
        now.passes
    }

    pub(super) fn end(&mut self, end: End) {
        if let Some(now) = &mut self.now {
            now.status = end.status();
            now.handle = None;
            now.end = Some((end, now.begun.elapsed()));
        }
    }

    /// What steers it, while it is under way and this is the source.
    pub(super) fn handle(&self) -> Option<&source::Handle> {
        self.now.as_ref()?.handle.as_ref()
    }

    pub(super) fn is_under_way(&self) -> bool {
        self.now.as_ref().is_some_and(|now| now.end.is_none())
    }

    /// The answer to `query-migrate`.
    pub(super) fn json(&self) -> Value {
        let Some(now) = &self.now else { return json!({}) };
        let mut answer = Map::new();
        let mut insert = |name: &str, value: Value| drop(answer.insert(name.to_owned(), value));
        insert("status", now.status.into());
        let took = now.end.as_ref().map_or_else(|| now.begun.elapsed(), |(_, took)| *took);
        insert("total-time", milliseconds(took));
        if let Some(setup) = now.setup {
            insert("setup-time", milliseconds(setup));
        }
        if now.setup.is_some() || now.end.is_some() {
            insert("ram", now.ram(took));
        }
        if let (Role::Destination, Some(address)) = (now.role, now.address.as_ref().and_then(socket_address)) {
            insert("socket-address", json!([address]));
        }
        match &now.end {
            None => {
                if let (Role::Source, Some(handle)) = (now.role, &now.handle) {
                    insert("expected-downtime", milliseconds(handle.parameters().limits.downtime));
                }
            }
            Some((End::Completed(report), _)) => {
                if let Some(time) = report.downtime {
                    insert("downtime", time.into());
                }
                if report.cpu_throttle_percentage > 0 {
                    insert("cpu-throttle-percentage", report.cpu_throttle_percentage.into());
                }
            }
            Some((End::Failed(reason) | End::PostcopyPaused(reason), _)) => insert("error-desc", reason.clone().into()),
            Some((End::Cancelled, _)) => {}
        }
        Value::Object(answer)
    }
}

impl Now {
    fn ram(&self, took: Duration) -> Value {
        let snapshot = self.progress.snapshot();
        let page_size = multifd::checkpoint::PAGE_SIZE as u64;
        let seconds = took.as_secs_f64();
        let per_second = |amount: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
        let left = snapshot.round_pages.saturating_sub(snapshot.round_done);
        let is_complete = self.end.as_ref().is_some_and(|(end, _)| !matches!(end, End::PostcopyPaused(_)));
        let remaining = if is_complete { 0 } else { left * page_size };
        let (before, after) = if self.postcopy.is_some() { (0, snapshot.bytes()) } else { (snapshot.bytes(), 0) };
        json!({
            "transferred": snapshot.bytes(),
            "remaining": remaining,
            "total": snapshot.pages_total * page_size,
            "duplicate": snapshot.zero,
            "normal": snapshot.normal,
            "normal-bytes": snapshot.normal * page_size,
            "page-size": page_size,
            "dirty-sync-count": self.passes,
            "dirty-pages-rate": 0,
            "mbps": per_second(snapshot.bytes() as f64 * 8.0) / 1e6,
            "pages-per-second": per_second((snapshot.normal + snapshot.zero) as f64) as u64,
            "multifd-bytes": snapshot.channel_bytes,
            "precopy-bytes": before,
            "downtime-bytes": 0,
            "postcopy-bytes": after,
            "postcopy-requests": snapshot.requests,
            "dirty-sync-missed-zero-copy": 0,
        })
    }
}

/// `address` as QMP names it.
fn socket_address(address: &Uri) -> Option<Value> {
    match address {
        Uri::Tcp { host, port } => Some(json!({ "type": "inet", "host": host, "port": port.to_string() })),
        Uri::Unix(path) => Some(json!({ "type": "unix", "path": path.display().to_string() })),
        Uri::Vsock { cid, port } => Some(json!({ "type": "vsock", "cid": cid.to_string(), "port": port.to_string() })),
        Uri::Fd(_) | Uri::File(_) => None,
    }
}

fn milliseconds(time: Duration) -> Value {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).into()
}
