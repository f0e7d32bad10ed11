//! Migration capabilities and parameters, with QEMU's names, units and defaults.
//!
//! What this engine does not have is refused, and not ignored: a client that asks for encryption must not get a migration
//! without.

use std::time::Duration;

use multifd::source;
use multifd_proto::{machine::ZeroPages, packet::Compression};
use multifd_qmp::server::{Arguments, CommandError};
use serde_json::{Value, json};

use crate::args::TransferArgs;

/// Migration capabilities and parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Clients are told of the states of a migration. On, other than in QEMU.
    pub(super) events: bool,
    auto_converge: bool,
    zero_copy: bool,
    /// Bytes per second; 0 for no limit.
    max_bandwidth: u64,
    /// Bytes per second in the background of a postcopy; 0 for no other limit.
    max_postcopy_bandwidth: u64,
    /// Milliseconds.
    downtime_limit: u64,
    /// Bytes per second; 0 for as much as was seen.
    switchover_bandwidth: u64,
    channels: u8,
    compression: Compression,
    zlib_level: u8,
    zstd_level: u8,
    zero_pages: ZeroPages,
    /// The VM runs at the destination before its memory is there; pages that are asked for have a connection of their own.
    postcopy: Option<Preempt>,
}

/// Whether a postcopy has a connection for pages that are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preempt(pub bool);

impl Default for Settings {
    /// Those of a QEMU; but `auto-converge`, `events`, `multifd` and `return-path` are on.
    fn default() -> Settings {
        Settings {
            events: true,
            auto_converge: true,
            zero_copy: false,
            max_bandwidth: 128 << 20,
            max_postcopy_bandwidth: 0,
            downtime_limit: 300,
            switchover_bandwidth: 0,
            channels: 2,
            compression: Compression::None,
            zlib_level: 1,
            zstd_level: 1,
            zero_pages: ZeroPages::Multifd,
            postcopy: None,
        }
    }
}

impl Settings {
    /// Those of a postcopy that sends at most `max_bandwidth` bytes per second in the background; 0 for no limit.
    pub fn of_postcopy(preempt: Preempt, max_bandwidth: u64) -> Settings {
        Settings { auto_converge: false, max_bandwidth, postcopy: Some(preempt), ..Settings::default() }
    }

    /// What the command line says, and for the rest the defaults of QEMU.
    pub fn of(args: &TransferArgs) -> Settings {
        let options = args.source_options("multifd");
        let defaults = Settings::default();
        let level = args.compression_level.and_then(|level| u8::try_from(level).ok());
        Settings {
            auto_converge: !args.no_throttle,
            zero_copy: args.zero_copy,
            max_bandwidth: args.max_bandwidth.map_or(defaults.max_bandwidth, |rate| rate.0.unwrap_or(0)),
            downtime_limit: milliseconds(args.downtime_limit),
            switchover_bandwidth: options.parameters.limits.switchover_bandwidth.unwrap_or(0),
            channels: args.channels.unwrap_or(defaults.channels),
            compression: options.format.compression,
            zlib_level: level.unwrap_or(1).min(9),
            zstd_level: level.unwrap_or(1).clamp(1, 20),
            zero_pages: options.qemu.zero_pages,
            ..defaults
        }
    }

    /// Those of a migration that is set up by `options`.
    pub fn in_force(options: &source::Options) -> Settings {
        let level = u8::try_from(options.plan.compression_level).unwrap_or(1);
        let mut settings = Settings {
            auto_converge: options.parameters.limits.throttle,
            zero_copy: options.plan.zero_copy,
            channels: options.plan.channels,
            compression: options.format.compression,
            zlib_level: level.min(9),
            zstd_level: level.clamp(1, 20),
            zero_pages: options.qemu.zero_pages,
            ..Settings::default()
        };
        settings.take_from(&options.parameters);
        settings
    }

    /// Has `options` say the same.
    pub fn apply_to(&self, options: &mut source::Options) {
        options.plan.channels = self.channels;
        options.plan.zero_copy = self.zero_copy;
        // Auto is more than QMP can say.
        if !options.format.auto_compression || self.compression != options.format.compression {
            options.format.auto_compression = false;
            options.format.compression = self.compression;
            options.plan.compression_level = match self.compression {
                Compression::Zlib => self.zlib_level.into(),
                Compression::None | Compression::Zstd => self.zstd_level.into(),
            };
        }
        options.qemu.zero_pages = self.zero_pages;
        options.parameters.limits.throttle = self.auto_converge;
        self.give_to(&mut options.parameters);
    }

    /// Has `parameters` say the same, of which those of QMP may change while a migration runs.
    pub(super) fn give_to(&self, parameters: &mut source::Parameters) {
        parameters.max_bandwidth = Some(self.max_bandwidth).filter(|&rate| rate > 0);
        parameters.limits.downtime = Duration::from_millis(self.downtime_limit);
        parameters.limits.switchover_bandwidth = Some(self.switchover_bandwidth).filter(|&rate| rate > 0);
    }

    /// Bytes per second in the background of a postcopy: the lower of its two limits; `None` for none.
    pub(super) fn background(&self) -> Option<u64> {
        [self.max_bandwidth, self.max_postcopy_bandwidth].into_iter().filter(|&rate| rate > 0).min()
    }

    /// Takes over those in force.
    pub(super) fn take_from(&mut self, parameters: &source::Parameters) {
        self.max_bandwidth = parameters.max_bandwidth.unwrap_or(0);
        self.downtime_limit = milliseconds(parameters.limits.downtime);
        self.switchover_bandwidth = parameters.limits.switchover_bandwidth.unwrap_or(0);
    }

    /// The answer to `query-migrate-parameters`.
    pub(super) fn parameters(&self) -> Value {
        json!({
            "max-bandwidth": self.max_bandwidth,
            "max-postcopy-bandwidth": self.max_postcopy_bandwidth,
            "avail-switchover-bandwidth": self.switchover_bandwidth,
            "downtime-limit": self.downtime_limit,
            "multifd-channels": self.channels,
            "multifd-compression": crate::report::compression_name(self.compression),
            "multifd-zlib-level": self.zlib_level,
            "multifd-zstd-level": self.zstd_level,
            "zero-page-detection": self.zero_pages.to_string(),
        })
    }

    /// Sets those that are named.
    ///
    /// # Errors
    /// One is not known, not supported, or out of range; then the settings are not to be used.
    pub(super) fn set_parameters(&mut self, mut arguments: Arguments) -> Result<(), CommandError> {
        let out_of_range =
            |name: &str, expected: &str| CommandError::generic(format!("Parameter '{name}' expects {expected}"));
        let small = |name: &str, value: u64, range: std::ops::RangeInclusive<u8>| {
            let value = u8::try_from(value).ok().filter(|value| range.contains(value));
            let expected = format!("a value between {} and {}", range.start(), range.end());
            value.ok_or_else(|| out_of_range(name, &expected))
        };
        if let Some(rate) = arguments.number("max-bandwidth")? {
            self.max_bandwidth = rate;
        }
        if let Some(rate) = arguments.number("max-postcopy-bandwidth")? {
            // Without a postcopy it would bound nothing; 0 is the default, and means that it does not.
            if rate > 0 && self.postcopy.is_none() {
                return Err(not_here("max-postcopy-bandwidth"));
            }
            self.max_postcopy_bandwidth = rate;
        }
        if let Some(rate) = arguments.number("avail-switchover-bandwidth")? {
            self.switchover_bandwidth = rate;
        }
        if let Some(time) = arguments.number("downtime-limit")? {
            if time > LONGEST_DOWNTIME {
                return Err(out_of_range("downtime-limit", "an integer in the range of 0 to (2000 * 1000) ms"));
            }
            self.downtime_limit = time;
        }
        if let Some(channels) = arguments.number("multifd-channels")? {
            self.channels = small("multifd-channels", channels, 1..=255)?;
        }
        if let Some(level) = arguments.number("multifd-zlib-level")? {
            self.zlib_level = small("multifd-zlib-level", level, 0..=9)?;
        }
        if let Some(level) = arguments.number("multifd-zstd-level")? {
            self.zstd_level = small("multifd-zstd-level", level, 1..=20)?;
        }
        if let Some(name) = arguments.text("multifd-compression")? {
            self.compression = match name.as_str() {
                "none" => Compression::None,
                "zlib" => Compression::Zlib,
                "zstd" => Compression::Zstd,
                other => return Err(no_value("multifd-compression", other)),
            };
        }
        if let Some(name) = arguments.text("zero-page-detection")? {
            self.zero_pages = match name.as_str() {
                "none" => ZeroPages::None,
                "legacy" => ZeroPages::Legacy,
                "multifd" => ZeroPages::Multifd,
                other => return Err(no_value("zero-page-detection", other)),
            };
        }
        match arguments.rest().into_iter().next() {
            None => Ok(()),
            // It is the default, and means that there is none.
            Some((name, Value::String(text))) if name.starts_with("tls-") && text.is_empty() => Ok(()),
            Some((name, _)) if NOT_HERE.contains(&name.as_str()) => Err(not_here(&name)),
            Some((name, _)) => Err(CommandError::generic(format!("Parameter '{name}' is unexpected"))),
        }
    }

    /// The answer to `query-migrate-capabilities`.
    pub(super) fn capabilities(&self) -> Value {
        CAPABILITIES.iter().map(|name| json!({ "capability": name, "state": self.is_on(name) })).collect()
    }

    fn is_on(&self, capability: &str) -> bool {
        match capability {
            "auto-converge" => self.auto_converge,
            "events" => self.events,
            "zero-copy-send" => self.zero_copy,
            // There is no migration without.
            "return-path" => true,
            // A postcopy has no channels.
            "multifd" => self.postcopy.is_none(),
            "postcopy-ram" => self.postcopy.is_some(),
            "postcopy-preempt" => self.postcopy == Some(Preempt(true)),
            _ => false,
        }
    }

    /// Switches one on or off.
    ///
    /// # Errors
    /// It is not known, or cannot be so here.
    pub(super) fn set_capability(&mut self, capability: Value) -> Result<(), CommandError> {
        let Value::Object(map) = capability else {
            return Err(CommandError::generic("Invalid parameter type for 'capabilities', expected: object"));
        };
        let mut arguments = Arguments::from(map);
        let name = arguments.text("capability")?.ok_or_else(|| Arguments::missing("capability"))?;
        let on = arguments.flag("state")?.ok_or_else(|| Arguments::missing("state"))?;
        arguments.end()?;
        if !CAPABILITIES.contains(&name.as_str()) {
            return Err(no_value("capability", &name));
        }
        match name.as_str() {
            "auto-converge" => self.auto_converge = on,
            "events" => self.events = on,
            "zero-copy-send" => self.zero_copy = on,
            other if self.is_on(other) == on => {}
            other => {
                let state = if on { "on" } else { "off" };
                return Err(CommandError::generic(format!("The capability {other} cannot be switched {state} here")));
            }
        }
        Ok(())
    }
}

fn not_here(parameter: &str) -> CommandError {
    CommandError::generic(format!("Parameter '{parameter}' is not supported here"))
}

fn no_value(name: &str, value: &str) -> CommandError {
    CommandError::generic(format!("Parameter '{name}' does not accept value '{value}'"))
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The most that QEMU takes, in milliseconds.
const LONGEST_DOWNTIME: u64 = 2_000_000;
/// Those of a QEMU 10.0.
const CAPABILITIES: &[&str] = &[
    "xbzrle",
    "rdma-pin-all",
    "auto-converge",
    "zero-blocks",
    "events",
    "postcopy-ram",
    "x-colo",
    "release-ram",
    "return-path",
    "pause-before-switchover",
    "multifd",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "x-ignore-shared",
    "validate-uuid",
    "background-snapshot",
    "zero-copy-send",
    "postcopy-preempt",
    "switchover-ack",
    "dirty-limit",
    "mapped-ram",
];
/// Parameters of a QEMU 10.0 that this engine does not have.
const NOT_HERE: &[&str] = &[
    "announce-initial",
    "announce-max",
    "announce-rounds",
    "announce-step",
    "avail-switchover-bandwidth",
    "block-bitmap-mapping",
    "cpu-throttle-increment",
    "cpu-throttle-initial",
    "cpu-throttle-tailslow",
    "direct-io",
    "max-cpu-throttle",
    "mode",
    "multifd-qatzip-level",
    "throttle-trigger-threshold",
    "tls-authz",
    "tls-creds",
    "tls-hostname",
    "vcpu-dirty-limit",
    "x-checkpoint-delay",
    "x-vcpu-dirty-limit-period",
    "xbzrle-cache-size",
];

#[cfg(test)]
mod tests {
    use multifd_qmp::{
        qapi_qmp,
        qapi_spec::{Enum, Error},
    };

    use super::*;

    fn set(settings: &mut Settings, parameters: Value) -> Result<(), CommandError> {
        settings.set_parameters(Arguments::from(parameters.as_object().unwrap().clone()))
    }

    /// A client that asked for encryption would have got a migration without.
    #[test]
    fn what_is_not_there_is_refused_and_not_ignored() {
        let mut settings = Settings::default();
        let tls = set(&mut settings, json!({ "tls-creds": "tls0" })).unwrap_err();
        assert_eq!(tls.description, "Parameter 'tls-creds' is not supported here");
        set(&mut settings, json!({ "tls-creds": "" })).unwrap();
        let bounds_nothing = set(&mut settings, json!({ "max-postcopy-bandwidth": 1 })).unwrap_err();
        assert_eq!(bounds_nothing.description, "Parameter 'max-postcopy-bandwidth' is not supported here");
        set(&mut settings, json!({ "max-postcopy-bandwidth": 0 })).unwrap();
        let unknown = set(&mut settings, json!({ "nonesuch": 1 })).unwrap_err();
        assert_eq!(unknown.description, "Parameter 'nonesuch' is unexpected");
        for (parameters, what) in [
            (json!({ "max-bandwidth": "abc" }), "Parameter 'max-bandwidth' expects uint64"),
            (json!({ "multifd-channels": 256 }), "between 1 and 255"),
            (json!({ "multifd-channels": 0 }), "between 1 and 255"),
            (json!({ "downtime-limit": 2_000_001 }), "(2000 * 1000) ms"),
            (json!({ "multifd-compression": "foo" }), "does not accept value 'foo'"),
            (json!({ "downtime-limit": 1.5 }), "expects uint64"),
        ] {
            let error = set(&mut settings, parameters).unwrap_err();
            assert!(error.description.contains(what), "{}", error.description);
        }
        for (capability, on) in [("postcopy-ram", true), ("multifd", false), ("nonesuch", true)] {
            let error = settings.set_capability(json!({ "capability": capability, "state": on }));
            assert!(error.is_err(), "{capability}");
        }
        settings.set_capability(json!({ "capability": "multifd", "state": true })).unwrap();
    }

    #[test]
    fn the_names_and_types_are_those_of_qmp() {
        let settings = Settings::default();
        let capabilities: Vec<qapi_qmp::MigrationCapabilityStatus> =
            serde_json::from_value(settings.capabilities()).unwrap();
        assert!(capabilities.iter().any(|status| status.capability.name() == "multifd" && status.state));
        let names: Vec<&str> = capabilities.iter().map(|status| status.capability.name()).collect();
        assert_eq!(names, qapi_qmp::MigrationCapability::NAMES);
        let parameters: qapi_qmp::MigrationParameters = serde_json::from_value(settings.parameters()).unwrap();
        assert_eq!((parameters.multifd_channels, parameters.downtime_limit), (Some(2), Some(300)));
        assert_eq!(parameters.max_bandwidth, Some(128 << 20));
        let error = json!({ "error": { "class": "GenericError", "desc": "x" } });
        serde_json::from_value::<Error>(error).unwrap();
    }

    #[test]
    fn the_background_of_a_postcopy_keeps_the_lower_of_its_two_limits() {
        let mut settings = Settings::of_postcopy(Preempt(false), 7);
        assert_eq!(settings.background(), Some(7));
        for (parameters, background) in [
            (json!({ "max-postcopy-bandwidth": 5 }), Some(5)),
            (json!({ "max-bandwidth": 3 }), Some(3)),
            (json!({ "max-bandwidth": 0 }), Some(5)),
            (json!({ "max-postcopy-bandwidth": 0 }), None),
        ] {
            set(&mut settings, parameters.clone()).unwrap();
            assert_eq!(settings.background(), background, "{parameters}");
        }
    }

    #[test]
    fn what_is_set_is_what_is_migrated_with() {
        let mut settings = Settings::default();
        let parameters = json!({ "max-bandwidth": 0, "downtime-limit": 20, "multifd-channels": 7,
            "avail-switchover-bandwidth": 125_000_000,
            "multifd-compression": "zstd", "multifd-zstd-level": 5, "zero-page-detection": "legacy" });
        set(&mut settings, parameters).unwrap();
        let mut options = source::Options::default();
        settings.apply_to(&mut options);
        assert_eq!((options.plan.channels, options.plan.compression_level), (7, 5));
        assert_eq!((options.format.compression, options.qemu.zero_pages), (Compression::Zstd, ZeroPages::Legacy));
        assert_eq!(options.parameters.max_bandwidth, None);
        assert_eq!(options.parameters.limits.downtime, Duration::from_millis(20));
        assert_eq!(options.parameters.limits.switchover_bandwidth, Some(125_000_000));
        assert_eq!(Settings::in_force(&options).parameters()["avail-switchover-bandwidth"], 125_000_000);
    }
}
