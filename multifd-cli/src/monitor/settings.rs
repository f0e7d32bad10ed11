//! The settings of a QEMU that a migration needs, and how they are put back.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::{Look, Monitor, Refusal};
use crate::exit::Exit;

/// What a migration needs. What a QEMU does not have is left out, unless it is to be switched on.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Capabilities, on or off.
    pub capabilities: Vec<(&'static str, bool)>,
    /// Parameters.
    pub parameters: Vec<(&'static str, Value)>,
}

impl Wanted {
    /// A migration over multifd with `channels` channels, in which nothing else changes the stream or makes it wait.
    pub fn multifd(channels: u8, compression: &str) -> Wanted {
        let mut wanted = Wanted::plain();
        for (name, on) in &mut wanted.capabilities {
            *on |= matches!(*name, "multifd" | "return-path");
        }
        wanted.parameters.push(("multifd-channels", json!(channels)));
        wanted.parameters.push(("multifd-compression", json!(compression)));
        wanted
    }

    /// A destination that runs the guest before its memory is there.
    pub fn postcopy(preempt: bool) -> Wanted {
        let mut wanted = Wanted::plain();
        for (name, on) in &mut wanted.capabilities {
            *on |= *name == "postcopy-ram" || (preempt && *name == "postcopy-preempt");
        }
        wanted
    }

    /// The same, and memory that QEMU shares stays where it is.
    #[must_use]
    pub fn ignoring_shared(mut self) -> Wanted {
        for (name, on) in &mut self.capabilities {
            *on |= *name == "x-ignore-shared";
        }
        self
    }

    /// A snapshot of the state at the beginning: a plain stream without an answer, while the guest runs on.
    pub fn snapshot() -> Wanted {
        let mut wanted = Wanted::plain();
        for (name, on) in &mut wanted.capabilities {
            *on |= *name == "background-snapshot";
        }
        wanted.capabilities.extend(OFF_IN_A_SNAPSHOT.iter().map(|&name| (name, false)));
        wanted
    }

    /// Nothing but a plain stream.
    pub fn plain() -> Wanted {
        let capabilities = OFF.iter().map(|&name| (name, false)).collect();
        // The connection is a private socket, or the operator's business.
        let parameters = vec![("tls-creds", json!("")), ("mode", json!("normal"))];
        Wanted { capabilities, parameters }
    }

    /// Has parameter `name` be `value`.
    pub fn set_parameter(&mut self, name: &'static str, value: Value) {
        self.parameters.retain(|(other, _)| *other != name);
        self.parameters.push((name, value));
    }
}

/// What has to be put back.
#[derive(Debug, Clone, Default)]
pub struct Changed {
    capabilities: Vec<(String, bool)>,
    parameters: Vec<(String, Value)>,
}

impl Changed {
    /// Sets what is `wanted` and different, and remembers in `self` how it was.
    ///
    /// # Errors
    /// QEMU refuses it, lacks a capability that is wanted, or is gone. `self` then has what may be changed already.
    pub fn apply(&mut self, monitor: &mut Monitor, look: &Look, wanted: &Wanted) -> Result<(), Refusal> {
        let mut capabilities = Vec::new();
        for &(name, on) in &wanted.capabilities {
            match look.capabilities.get(name) {
                Some(&is_on) if is_on != on => {
                    self.capabilities.push((name.to_owned(), is_on));
                    capabilities.push((name.to_owned(), on));
                }
                None if on => {
                    let message = format!("QEMU {} has no migration capability {name}", look.version);
                    return Err(Refusal::new(Exit::Failed, message));
                }
                _ => {}
            }
        }
        set_capabilities(monitor, &capabilities)?;
        let mut parameters = Vec::new();
        for (name, value) in &wanted.parameters {
            if let Some(is) = look.parameters.get(*name).filter(|is| *is != value) {
                self.parameters.push(((*name).to_owned(), is.clone()));
                parameters.push(((*name).to_owned(), value.clone()));
            }
        }
        set_parameters(monitor, &parameters)
    }

    /// Remembers how the parameters `names` are, which may be changed later, too.
    pub fn keep(&mut self, look: &Look, names: &[&str]) {
        for name in names {
            let is_kept = self.parameters.iter().any(|(kept, _)| kept == name);
            if let Some(value) = look.parameters.get(*name).filter(|_| !is_kept) {
                self.parameters.push(((*name).to_owned(), value.clone()));
            }
        }
    }

    /// Puts everything back as it was once QEMU has cleared up its migration, for which it is given `limit`. Nothing is sent to a
    /// QEMU that has not, or does not answer: it would run the commands whenever it goes on, and one whose number of channels or
    /// capabilities change while it ends a migration looks for channels it never had, and ends with its guest. `docs/qemu.md`
    /// has the experiments.
    ///
    /// # Errors
    /// It has not cleared up, refuses it or is gone; the message says how the settings were.
    pub fn put_back_once_cleared_up(&self, monitor: &mut Monitor, limit: Duration) -> Result<(), Refusal> {
        match monitor.clears_up(limit) {
            Ok(true) => self.put_back(monitor),
            Ok(false) => Err(self.not_put_back(Refusal::new(
                Exit::Failed,
                "it still holds the migration (query-yank), as may happen to a QEMU 7.2 or 10.0 whose connection breaks, and \
                 another setting or migration may end it meanwhile; a guest that runs there runs on",
            ))),
            Err(refusal) => Err(self.not_put_back(refusal)),
        }
    }

    /// The same, of a QEMU whose settings are of no importance if it does not clear up. Returns whether it has.
    ///
    /// # Errors
    /// Those of [`Changed::put_back_once_cleared_up`], but for a migration that is not cleared up.
    pub fn put_back_if_cleared_up(&self, monitor: &mut Monitor, limit: Duration) -> Result<bool, Refusal> {
        match monitor.clears_up(limit) {
            Ok(true) => self.put_back(monitor).map(|()| true),
            Ok(false) => Ok(false),
            Err(refusal) => Err(self.not_put_back(refusal)),
        }
    }

    /// Puts everything back as it was. It changes nothing to do that twice. No migration may be under way.
    ///
    /// # Errors
    /// QEMU refuses it or is gone; the message says how the settings were.
    pub fn put_back(&self, monitor: &mut Monitor) -> Result<(), Refusal> {
        // A parameter may only go with a capability, or only without.
        let first = set_parameters(monitor, &self.parameters);
        let then = set_capabilities(monitor, &self.capabilities);
        let last = first.or_else(|_| set_parameters(monitor, &self.parameters));
        last.and(then).map_err(|refusal| self.not_put_back(refusal))
    }

    fn not_put_back(&self, refusal: Refusal) -> Refusal {
        let message = format!("QEMU's settings are not put back: {refusal}; they were: {}", self.text());
        Refusal { message, ..refusal }
    }

    fn text(&self) -> String {
        let capabilities =
            self.capabilities.iter().map(|(name, on)| format!("{name} {}", if *on { "on" } else { "off" }));
        let parameters = self.parameters.iter().map(|(name, value)| format!("{name} {value}"));
        let all: Vec<String> = capabilities.chain(parameters).collect();
        if all.is_empty() { "as they are".to_owned() } else { all.join(", ") }
    }
}

fn set_capabilities(monitor: &mut Monitor, capabilities: &[(String, bool)]) -> Result<(), Refusal> {
    if capabilities.is_empty() {
        return Ok(());
    }
    let list: Vec<Value> = capabilities.iter().map(|(name, on)| json!({ "capability": name, "state": on })).collect();
    monitor.execute("migrate-set-capabilities", json!({ "capabilities": list })).map(drop)
}

fn set_parameters(monitor: &mut Monitor, parameters: &[(String, Value)]) -> Result<(), Refusal> {
    if parameters.is_empty() {
        return Ok(());
    }
    let map: Map<String, Value> = parameters.iter().cloned().collect();
    monitor.execute("migrate-set-parameters", Value::Object(map)).map(drop)
}

/// Capabilities that change the stream, that make a migration wait for a command (`pause-before-switchover`) or for an
/// answer (`switchover-ack`), that a unix socket cannot have (`zero-copy-send`), or that give the memory of the source away,
/// which is to run on (`release-ram`).
const OFF: &[&str] = &[
    "multifd",
    "return-path",
    "background-snapshot",
    "block",
    "compress",
    "dirty-bitmaps",
    "mapped-ram",
    "pause-before-switchover",
    "postcopy-preempt",
    "postcopy-ram",
    "rdma-pin-all",
    "release-ram",
    "switchover-ack",
    "x-colo",
    "x-ignore-shared",
    "xbzrle",
    "zero-copy-send",
];

/// Capabilities that mean nothing in a snapshot, and with which QEMU refuses `background-snapshot`.
const OFF_IN_A_SNAPSHOT: &[&str] =
    &["auto-converge", "dirty-limit", "late-block-activate", "postcopy-blocktime", "validate-uuid"];
