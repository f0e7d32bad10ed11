//! TLS on the migration of a QEMU that is driven by its monitor.
//!
//! A QEMU takes certificates from an object. One is made for the migration, of the directory that this end uses, and removed with the settings
//! that are put back; or one that is there is used.

use serde_json::json;

use super::{Monitor, Refusal, Wanted};
use crate::args::TlsArgs;

/// Which end of the migration the QEMU is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum QemuIs {
    /// It connects.
    Source,
    /// It listens.
    Destination,
}

/// The certificates of the QEMU.
#[derive(Default)]
pub struct QemuTls {
    object: Made,
}

/// Whether an object was made.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Made {
    #[default]
    No,
    /// QEMU's answer did not come.
    Perhaps,
    Yes,
}

impl QemuTls {
    /// Has what is `wanted` use TLS, if `tls` says so: with the object `id`, or one that is made.
    ///
    /// # Errors
    /// QEMU refuses the object: it cannot read the files, or was built without TLS.
    pub fn prepare(
        &mut self,
        monitor: &mut Monitor,
        wanted: &mut Wanted,
        (tls, id): (&TlsArgs, Option<&str>),
        qemu: QemuIs,
    ) -> Result<(), Refusal> {
        let Some(dir) = &tls.tls_dir else { return Ok(()) };
        let dir = std::path::absolute(dir)?;
        if id.is_none() {
            let endpoint = if qemu == QemuIs::Source { "client" } else { "server" };
            let object = json!({
                "qom-type": "tls-creds-x509", "id": OBJECT, "endpoint": endpoint, "verify-peer": true, "dir": dir
            });
            let added = monitor.execute_once("object-add", object);
            self.object = match &added {
                Ok(_) => Made::Yes,
                Err(refusal) if refusal.refused => Made::No,
                Err(_) => Made::Perhaps,
            };
            added.map_err(|refusal| {
                let message = format!(
                    "QEMU cannot use the certificates in {}: {refusal}; --qemu-tls-creds names an object that it has",
                    dir.display()
                );
                Refusal { message, ..refusal }
            })?;
        }
        wanted.set_parameter("tls-creds", json!(id.unwrap_or(OBJECT)));
        wanted.set_parameter("tls-hostname", json!(tls.tls_hostname.as_deref().unwrap_or_default()));
        Ok(())
    }

    /// Removes the object that was made. It is no longer used.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn remove(&mut self, monitor: &mut Monitor) -> Result<(), Refusal> {
        let made = std::mem::take(&mut self.object);
        if made == Made::No {
            return Ok(());
        }
        match monitor.execute_once("object-del", json!({ "id": OBJECT })) {
            // There is none.
            Err(refusal) if refusal.refused && made == Made::Perhaps => Ok(()),
            removed => removed.map(drop),
        }
    }
}

/// What the object is called.
const OBJECT: &str = "multifd-tls";
