//! The metrics of `serve`: of all of its clients together, as a client's own would be without an end.

use super::text::{Text, build};

/// What all clients of a server got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Clients whose VM does not run yet.
    pub waiting: u64,
    /// Clients whose VM runs and gets its memory.
    pub running: u64,
    /// Clients that have all of their VM.
    pub completed: u64,
    /// Clients that got no VM.
    pub failed: u64,
    /// Clients whose VM lacks a part, or may.
    pub incomplete: u64,
    /// What was sent to all of them.
    pub sent: Sent,
}

/// What was sent to clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes.
    pub bytes: u64,
    /// Pages with content.
    pub normal: u64,
    /// Pages of zeros.
    pub zero: u64,
    /// Pages that guests asked for.
    pub requests: u64,
}

impl std::ops::AddAssign for Sent {
    fn add_assign(&mut self, other: Sent) {
        self.bytes += other.bytes;
        self.normal += other.normal;
        self.zero += other.zero;
        self.requests += other.requests;
    }
}

/// All metrics of a server.
pub fn render(served: &Served) -> String {
    let mut out = Text::default();
    build(&mut out);
    out.family("multifd_clients", "gauge", "Clients that are being served, by what their VM does.");
    for (state, count) in [("waiting", served.waiting), ("running", served.running)] {
        out.sample("multifd_clients", &[("state", state)], count as f64);
    }
    out.family("multifd_migrations_total", "counter", "Migrations of this process that are over.");
    for (status, count) in
        [("completed", served.completed), ("failed", served.failed), ("incomplete", served.incomplete)]
    {
        out.sample("multifd_migrations_total", &[("status", status)], count as f64);
    }
    let of = [("role", "source")];
    out.family("multifd_main_bytes_total", "counter", "Bytes to all clients.");
    out.sample("multifd_main_bytes_total", &of, served.sent.bytes as f64);
    out.family("multifd_pages_total", "counter", "Pages sent to all clients, by what they are.");
    for (kind, pages) in [("normal", served.sent.normal), ("zero", served.sent.zero)] {
        out.sample("multifd_pages_total", &[("role", "source"), ("kind", kind)], pages as f64);
    }
    out.family("multifd_postcopy_requests_total", "counter", "Pages that the guests of clients asked for.");
    out.sample("multifd_postcopy_requests_total", &of, served.sent.requests as f64);
    out.into()
}
