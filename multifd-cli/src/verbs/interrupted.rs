//! Says what has a source go on that has switched to postcopy and lost its connections.

use multifd::{
    progress::{Event, Observer},
    transport::uri::Uri,
};
use serde_json::json;

use crate::{movable_listener::ListenerHandle, table};

/// An observer that passes events on, and tells the operator of connections that were lost.
pub struct Interrupted<'a> {
    inner: &'a mut dyn Observer,
    /// Where the source can connect to again.
    at: ListenerHandle,
}

impl<'a> Interrupted<'a> {
    /// Passes on to `inner`; the source can go on at `at`.
    pub fn new(inner: &'a mut dyn Observer, at: ListenerHandle) -> Interrupted<'a> {
        Interrupted { inner, at }
    }

    fn what_to_type(&self) -> String {
        let uri = self.at.uri().map_or_else(|| "URI".to_owned(), |uri: Uri| uri.to_string());
        let command = json!({ "execute": "migrate", "arguments": { "uri": uri, "resume": true } });
        format!("migrate -r {uri}, or QMP {command}")
    }
}

impl Observer for Interrupted<'_> {
    fn event(&mut self, event: &Event) {
        self.inner.event(event);
        match event {
            Event::Interrupted { reason, missing, limit } => tracing::warn!(
                "{reason}; keeps what has come, and waits for {} s until the source goes on with {} pages. In its monitor, once it says \
                 postcopy-paused: {}",
                limit.as_secs_f64(),
                table::grouped(*missing),
                self.what_to_type()
            ),
            Event::Continued { missing } => {
                tracing::warn!("the source goes on with {} pages", table::grouped(*missing));
            }
            _ => {}
        }
    }
}
