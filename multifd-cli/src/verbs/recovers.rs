//! What QMP clients do with a source that has switched to postcopy while `receive` takes its VM: `migrate-pause` gives its connections
//! up, `migrate-recover` has it come back to another address.

use multifd::destination::Handle;
use serde_json::{Value, json};

use super::receive::Opener;
use crate::{args::Origin, movable_listener::ListenerHandle};

/// Does what clients want.
pub struct Recovers {
    /// The destination that takes the VM.
    pub(super) destination: Handle,
    /// How connections are taken.
    pub(super) opener: Opener,
    /// Where they come to.
    pub(super) listening_at: ListenerHandle,
}

impl Recovers {
    /// Gives the connections up.
    ///
    /// # Errors
    /// The source could not go on.
    pub fn pause(&self) -> Result<Value, String> {
        match self.destination.pause() {
            true => Ok(json!({})),
            false => Err(NOT_AWAITED.to_owned()),
        }
    }

    /// Takes connections at `at` from now on, and nowhere else. Returns the address.
    ///
    /// # Errors
    /// It cannot be listened at; then connections are taken where they were before.
    pub fn listen_at(&self, at: &Origin) -> Result<Value, String> {
        let current = self.listening_at.uri();
        if let Some(current) = current.filter(|current| at.address() == Some(current)) {
            return Ok(current.to_string().into());
        }
        self.opener.allow.check(at.address())?;
        let place = self.opener.open(at).map_err(|error| format!("{at}: {error}"))?;
        let uri = place.uri.clone();
        self.listening_at.replace(place.listener, place.uri).map_err(|error| error.to_string())?;
        Ok(uri.map_or(Value::Null, |uri| uri.to_string().into()))
    }
}

/// Where there is nothing to be paused.
const NOT_AWAITED: &str = "the source could not go on: this process waits for it only with --recover-timeout, without --token, and \
                           while pages are missing";
