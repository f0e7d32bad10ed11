//! What a QEMU is, and how it is set.

use std::collections::BTreeMap;

use multifd_qmp::{Status, Version};
use serde_json::{Map, Value, json};

use super::{Monitor, Refusal};
use crate::exit::Exit;

/// What a QEMU is, and how it is set.
#[derive(Debug, Clone)]
pub struct Look {
    /// Its version.
    pub version: Version,
    /// The machine type by its full name, as it is in the stream.
    pub machine: String,
    /// What runs the guest: `kvm`, or another accelerator where the QEMU says which, or `not kvm`.
    pub accelerator: String,
    /// The run state.
    pub state: String,
    /// All zero for none.
    pub uuid: String,
    /// Its memory backends that have a name.
    pub memory: Vec<Backend>,
    /// Bytes of memory, where it says so.
    pub memory_size: Option<u64>,
    /// Migration capabilities.
    pub capabilities: BTreeMap<String, bool>,
    /// Migration parameters.
    pub parameters: Map<String, Value>,
    /// The state of its last migration.
    pub migration: Status,
    /// It listens for a migration.
    pub is_listening: bool,
}

/// A memory backend.
#[derive(Debug, Clone)]
pub struct Backend {
    /// Its name, which is that of its RAM block.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Others may map the same memory (`share=on`): `x-ignore-shared` leaves it out. `false` where QEMU does not say so.
    pub is_shared: bool,
}

impl Look {
    pub(super) fn at(monitor: &mut Monitor) -> Result<Look, Refusal> {
        let state = monitor.run_state()?;
        let (migration, answer) = monitor.migration()?;
        let parameters = monitor.execute("query-migrate-parameters", json!({}))?;
        let capabilities = monitor.execute("query-migrate-capabilities", json!({}))?;
        let capability = |value: &Value| Some((value["capability"].as_str()?.to_owned(), value["state"].as_bool()?));
        let uuid = monitor.execute_if_known("query-uuid", json!({}))?.unwrap_or_default();
        let summary = monitor.execute_if_known("query-memory-size-summary", json!({}))?.unwrap_or_default();
        let base = summary["base-memory"].as_u64();
        let plugged = summary["plugged-memory"].as_u64().unwrap_or_default();
        Ok(Look {
            version: monitor.client.version(),
            machine: machine(monitor)?,
            accelerator: accelerator(monitor)?,
            state,
            uuid: uuid["UUID"].as_str().unwrap_or_default().to_owned(),
            memory: backends(monitor)?,
            memory_size: base.and_then(|base| base.checked_add(plugged)),
            capabilities: capabilities.as_array().into_iter().flatten().filter_map(capability).collect(),
            parameters: parameters.as_object().cloned().unwrap_or_default(),
            migration,
            // A 7.2 shows nothing else.
            is_listening: answer.get("socket-address").is_some(),
        })
    }

    /// Checks that no migration is under way.
    ///
    /// # Errors
    /// One is.
    pub fn check_idle(&self) -> Result<(), Refusal> {
        match self.migration {
            Status::None | Status::Completed | Status::Failed | Status::Cancelled => Ok(()),
            other => {
                let message = format!(
                    "QEMU is migrating already ({other:?}); wait for its end, or cancel it with migrate_cancel, and try again"
                );
                Err(Refusal::new(Exit::Failed, message))
            }
        }
    }

    /// The same as a part of the JSON report.
    pub fn json(&self) -> Value {
        json!({
            "version": self.version.to_string(),
            "machine": self.machine,
            "accelerator": self.accelerator,
            "memory": self.memory_size,
        })
    }
}

/// The machine type. It has no command of its own; the type of the object has its name.
fn machine(monitor: &mut Monitor) -> Result<String, Refusal> {
    let answer = monitor.execute("qom-get", json!({ "path": "/machine", "property": "type" }))?;
    let name = answer.as_str().unwrap_or_default();
    Ok(name.strip_suffix("-machine").unwrap_or(name).to_owned())
}

fn accelerator(monitor: &mut Monitor) -> Result<String, Refusal> {
    // Since 11.0.
    if let Some(answer) = monitor.execute_if_known("query-accelerators", json!({}))?
        && let Some(name) = answer["enabled"].as_str()
    {
        return Ok(name.to_owned());
    }
    let kvm = monitor.execute_if_known("query-kvm", json!({}))?.unwrap_or_default();
    Ok(if kvm["enabled"] == true { "kvm" } else { "not kvm" }.to_owned())
}

fn backends(monitor: &mut Monitor) -> Result<Vec<Backend>, Refusal> {
    let answer = monitor.execute_if_known("query-memdev", json!({}))?.unwrap_or_default();
    let backend = |value: &Value| {
        let (name, bytes) = (value["id"].as_str()?.to_owned(), value["size"].as_u64()?);
        Some(Backend { name, bytes, is_shared: value["share"] == true })
    };
    Ok(answer.as_array().into_iter().flatten().filter_map(backend).collect())
}
