//! Prints the engine's events to stderr, as many of them as `-v` and `-q` say.
//!
//! Each says where it belongs: which process, which side and phase of the migration, round, and channel. As text it is one line,
//! as JSON one object on a line.

use std::{fmt, io};

use multifd::progress::Phase;
use serde_json::{Map, Value};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    filter::LevelFilter,
    fmt::{
        FmtContext, FormatEvent, FormatFields, MakeWriter,
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    registry::LookupSpan,
};

use crate::{
    args::{LogFormat, OutputArgs},
    current, printable, terminal,
};

/// Sends the events of this process to stderr from now on.
pub fn start(output: &OutputArgs) {
    let level = match (output.quiet, output.verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => LevelFilter::WARN,
        (false, 1) => LevelFilter::INFO,
        (false, 2) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    };
    // Fails only where a subscriber is set already, and this is the only place that sets one.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .event_format(Format(output.log_format))
        .with_writer(AboveTheBar)
        .try_init();
}

/// Formats events.
struct Format(LogFormat);

impl<S, N> FormatEvent<S, N> for Format
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let mut fields = Fields::default();
        event.record(&mut fields);
        let line = Line { time, level: event.metadata().level().as_str(), place: Place::now(), fields };
        match self.0 {
            LogFormat::Text => writeln!(writer, "{}", line.text()),
            LogFormat::Json => writeln!(writer, "{}", printable::json(&line.json().to_string())),
        }
    }
}

/// What an event says, in the order of its fields.
#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn add(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            (name, value) => drop(self.others.insert(name.to_owned(), value)),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value.into());
    }
}

/// Where an event belongs.
struct Place {
    pid: u32,
    role: Option<&'static str>,
    phase: Option<&'static str>,
    round: Option<u64>,
    channel: Option<u8>,
    thread: Option<String>,
}

impl Place {
    fn now() -> Place {
        let name = rustix::thread::name().ok().map(|name| name.to_string_lossy().into_owned());
        let channel = name.as_deref().and_then(|name| name.strip_prefix("multifd-ch")).and_then(|id| id.parse().ok());
        let current = current::get().0.filter(|current| !current.is_over);
        let snapshot = current.as_ref().map(|current| current.progress.snapshot());
        let phase = snapshot.as_ref().and_then(|snapshot| snapshot.phase);
        let in_rounds = matches!(phase, Some(Phase::Rounds | Phase::Switchover));
        Place {
            pid: std::process::id(),
            role: current.map(|current| current.role.name()),
            phase: phase.map(Phase::name),
            round: snapshot.filter(|_| in_rounds).map(|snapshot| snapshot.round),
            channel,
            thread: name,
        }
    }
}

/// One event.
struct Line {
    time: String,
    level: &'static str,
    place: Place,
    fields: Fields,
}

impl Line {
    fn text(&self) -> String {
        let Line { time, level, place, fields } = self;
        let Place { pid, role, phase, round, channel, thread: _ } = place;
        let mut line = format!("{time} {level:>5} {}[{pid}]", role.unwrap_or("multifd"));
        line.extend(phase.map(|phase| format!(" {phase}")));
        line.extend(round.map(|round| format!(" round {round}")));
        line.extend(channel.map(|channel| format!(" channel {channel}")));
        line.push_str(": ");
        // Values may be the peer's text.
        line.push_str(&printable::line(&fields.message));
        for (name, value) in &fields.others {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            line.push_str(&format!(" {name}={}", printable::line(&value)));
        }
        line
    }

    fn json(self) -> Value {
        let Line { time, level, place, fields } = self;
        let mut object = Map::new();
        let mut insert = |name: &str, value: Option<Value>| object.extend(value.map(|value| (name.to_owned(), value)));
        insert("timestamp", Some(time.into()));
        insert("level", Some(level.to_lowercase().into()));
        insert("pid", Some(place.pid.into()));
        insert("thread", place.thread.map(Value::from));
        insert("role", place.role.map(Value::from));
        insert("phase", place.phase.map(Value::from));
        insert("round", place.round.map(Value::from));
        insert("channel", place.channel.map(Value::from));
        insert("message", Some(fields.message.into()));
        insert("fields", Some(fields.others).filter(|others| !others.is_empty()).map(Value::Object));
        Value::Object(object)
    }
}

/// Passes events on to the thread that prints. It never fails: the subscriber would print that itself, and panic where
/// stderr is gone, in a thread of the migration.
struct AboveTheBar;

impl<'a> MakeWriter<'a> for AboveTheBar {
    type Writer = Lines;

    fn make_writer(&'a self) -> Lines {
        Lines
    }
}

/// One event.
struct Lines;

impl io::Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        terminal::write(String::from_utf8_lossy(line).into_owned());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn line() -> Line {
        let place = Place {
            pid: 7,
            role: Some("source"),
            phase: Some("rounds"),
            round: Some(2),
            channel: Some(3),
            thread: Some("multifd-ch3".to_owned()),
        };
        let others = json!({ "bytes": 4096, "peer": "a\u{1b}[2Jb\nc" }).as_object().unwrap().clone();
        let fields = Fields { message: "sent\n".to_owned(), others };
        Line { time: "T".to_owned(), level: "INFO", place, fields }
    }

    #[test]
    fn a_line_says_where_it_belongs_and_stays_one_line() {
        let text = line().text();
        assert!(text.starts_with("T  INFO source[7] rounds round 2 channel 3: sent"), "{text}");
        assert!(text.contains(" bytes=4096 peer=a"), "{text}");
        assert!(!text.contains('\n') && !text.contains('\u{1b}'), "{text:?}");
    }

    #[test]
    fn an_object_has_the_same() {
        let object = line().json();
        assert_eq!((&object["role"], &object["round"], &object["channel"]), (&"source".into(), &2.into(), &3.into()));
        assert_eq!(object["fields"]["bytes"], 4096);
        assert_eq!(object["level"], "info");
    }
}
