//! TLS on the connections of clients: they have opened them, and their QEMUs are the servers all the same.

use std::{io, path::PathBuf};

use multifd::transport::{
    Connect,
    tls::{ClientCredentials, TlsConnector},
    uri::Uri,
};

use crate::{args::TlsArgs, shell};

/// How the connections of all clients are encrypted.
pub struct Tls {
    dir: PathBuf,
    credentials: ClientCredentials,
    /// Which name their certificates have to be for, where it is not that of the host that connects.
    hostname: Option<String>,
}

impl Tls {
    /// What `args` ask for; nothing where the connections are plain.
    ///
    /// # Errors
    /// A file that cannot be used.
    pub fn of(args: &TlsArgs) -> io::Result<Option<Tls>> {
        let Some(dir) = &args.tls_dir else { return Ok(None) };
        let (credentials, hostname) = (ClientCredentials::from_dir(dir)?, args.tls_hostname.clone());
        Ok(Some(Tls { dir: dir.clone(), credentials, hostname }))
    }

    /// Encrypts the connection that `single` gives out, to a client at `peer`.
    ///
    /// # Errors
    /// It is not known which name its certificate has to be for.
    pub fn over(
        &self,
        single: Box<dyn Connect + Send + Sync>,
        peer: &str,
    ) -> io::Result<Box<dyn Connect + Send + Sync>> {
        let host = match (&self.hostname, peer.parse()) {
            (Some(name), _) => name.clone(),
            (None, Ok(Uri::Tcp { host, .. })) => host,
            (None, _) => {
                let message =
                    format!("{peer} names no host: --tls-hostname says for which one the client has a certificate");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
        };
        Ok(Box::new(TlsConnector::new(single, self.credentials.clone(), &host)?))
    }

    /// The same as options of a command line, with which another process goes on.
    pub fn options(&self) -> String {
        let name = self.hostname.as_deref().unwrap_or("NAME");
        format!(" --tls-dir {} --tls-hostname {}", shell::word(&self.dir), shell::word(name))
    }
}
