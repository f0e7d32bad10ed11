//! What a verb hands back: text for a person, or one JSON object with the names of QMP's `query-migrate`.

mod migration;
mod outcome;
mod parts;

use std::time::Duration;

use multifd_proto::{machine::Dialect, packet::Compression};
use serde::Serialize;
use serde_json::{Map, Value};

pub use self::{
    migration::{MigrationReport, Round},
    outcome::Outcome,
    parts::{Audit, ChannelCompression, FreshMemory, ZeroCopy},
};

/// The fields of `value`, which is a struct, as part of a JSON object.
pub fn fields(value: &impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(value) {
        Ok(Value::Object(fields)) => fields,
        other => unreachable!("reports are structs with text keys: {other:?}"),
    }
}

/// `time` in milliseconds, to the microsecond.
pub fn millis(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}

/// `time` in whole milliseconds, rounded.
pub fn whole_millis(time: Duration) -> u64 {
    micros(time).saturating_add(500) / 1000
}

/// `time` in whole microseconds.
pub fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
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
