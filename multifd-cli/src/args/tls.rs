//! TLS on the connections of a migration, on either side.

use std::{io, path::PathBuf};

use clap::{Args, ValueEnum};
use multifd::transport::{
    Connect, Listen,
    tls::{ClientCertificates, ClientCredentials, ServerCredentials, TlsConnector, TlsListener},
    uri::Uri,
};

use super::values::value_name;
use crate::shell;

/// TLS on the connections of a migration.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "TLS")]
pub struct TlsArgs {
    /// Encrypt all connections, with the files that QEMU's tls-creds-x509 has in DIR: ca-cert.pem, and server-cert.pem with
    /// server-key.pem where a migration arrives, client-cert.pem with client-key.pem where it begins. Both ends need it;
    /// multifd tls-init makes the files.
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// The name that the destination's certificate has to be for [default: the host that is connected to].
    #[arg(long, value_name = "NAME", requires = "tls_dir")]
    pub tls_hostname: Option<String>,
    /// Whether a source has to have a certificate of the CA to migrate to here. A source always looks at that of its
    /// destination [default: yes].
    #[arg(long, value_enum, value_name = "WHETHER", requires = "tls_dir")]
    pub tls_verify_peer: Option<VerifyPeer>,
}

/// Whether a source needs a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum VerifyPeer {
    /// One of the CA.
    Yes,
    /// None: every host that reaches the port may send a VM.
    No,
}

impl TlsArgs {
    /// What connects to `uri`.
    ///
    /// # Errors
    /// A file that cannot be used; no name to look for in the destination's certificate; as [`Uri::connector`].
    pub fn connector(&self, uri: &Uri) -> io::Result<Box<dyn Connect + Send + Sync>> {
        let connector = uri.connector()?;
        let Some(dir) = &self.tls_dir else { return Ok(connector) };
        let host = match (&self.tls_hostname, uri) {
            (Some(name), _) => name,
            (None, Uri::Tcp { host, .. }) if host.is_empty() => "localhost",
            (None, Uri::Tcp { host, .. }) => host,
            (None, uri) => {
                let message =
                    format!("{uri} names no host: --tls-hostname says for which one the destination has a certificate");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
        };
        Ok(Box::new(TlsConnector::new(connector, ClientCredentials::from_dir(dir)?, host)?))
    }

    /// What accepts the connections of `listener`.
    ///
    /// # Errors
    /// A file that cannot be used.
    pub fn listener(&self, listener: Box<dyn Listen>) -> io::Result<Box<dyn Listen>> {
        let Some(dir) = &self.tls_dir else { return Ok(listener) };
        let clients = match self.tls_verify_peer {
            Some(VerifyPeer::No) => ClientCertificates::NotAsked,
            Some(VerifyPeer::Yes) | None => ClientCertificates::Required,
        };
        Ok(Box::new(TlsListener::new(listener, ServerCredentials::from_dir(dir, clients)?)))
    }

    /// What another command needs at this end of the same TLS, for a shell, with a space before it; empty without TLS.
    pub fn words(&self) -> String {
        let Some(dir) = &self.tls_dir else { return String::new() };
        let name = self.tls_hostname.as_ref().map(|name| format!(" --tls-hostname {}", shell::word(name)));
        let whether = self.tls_verify_peer.map(|whether| format!(" --tls-verify-peer {}", value_name(&whether)));
        format!(" --tls-dir {}{}{}", shell::word(dir), name.unwrap_or_default(), whether.unwrap_or_default())
    }

    /// The same as options of a command line.
    pub(super) fn to_args(&self) -> Vec<String> {
        let TlsArgs { tls_dir, tls_hostname, tls_verify_peer } = self;
        let mut args = Vec::new();
        args.extend(tls_dir.as_ref().map(|dir| format!("--tls-dir={}", dir.display())));
        args.extend(tls_hostname.as_ref().map(|name| format!("--tls-hostname={name}")));
        args.extend(tls_verify_peer.map(|whether| format!("--tls-verify-peer={}", value_name(&whether))));
        args
    }
}
