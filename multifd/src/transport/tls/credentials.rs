//! Certificates and keys, in the files that QEMU's `tls-creds-x509` reads from its `dir`.
//!
//! A key that other users can read is refused, as ssh does it. Everything is read once, before any connection is made.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, Error, RootCertStore, ServerConfig, SupportedProtocolVersion,
    client::{Resumption, VerifierBuilderError, WebPkiServerVerifier},
    pki_types::{
        CertificateDer, CertificateRevocationListDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
    server::WebPkiClientVerifier,
    version::{TLS12, TLS13},
};

use super::{ciphers, reasons};
use crate::transport::socket::context;

/// What a source proves itself with, and whom it trusts.
#[derive(Clone)]
pub struct ClientCredentials {
    pub(super) config: Arc<ClientConfig>,
}

/// What a destination proves itself with, and whom it trusts.
#[derive(Clone)]
pub struct ServerCredentials {
    pub(super) config: Arc<ServerConfig>,
    pub(super) clients: ClientCertificates,
}

/// Whether a source has to prove who it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClientCertificates {
    /// It needs a certificate of the CA.
    #[default]
    Required,
    /// It is not asked: whoever reaches the port may send a VM, as with QEMU's `verify-peer=off`.
    NotAsked,
}

impl ClientCredentials {
    /// Reads `ca-cert.pem`, and `client-cert.pem` with `client-key.pem` where there are such files; destinations that require a
    /// certificate refuse a source without them. `ca-crl.pem`, where there is one, names certificates that are revoked.
    ///
    /// # Errors
    /// A file that is missing, cannot be read or used, with its path; a key that other users can read.
    pub fn from_dir(dir: &Path) -> io::Result<ClientCredentials> {
        let files = Files { dir };
        let provider = Arc::new(ciphers::provider());
        let (roots, lists) = files.authority()?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .with_crls(lists)
            .enforce_revocation_expiration()
            .allow_unknown_revocation_status()
            .build()
            .map_err(|error| files.no_verifier(&error))?;
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(VERSIONS)
            .map_err(io::Error::other)?
            .with_webpki_verifier(verifier);
        let own = [CLIENT_CERTIFICATE, CLIENT_KEY].map(|name| files.path(name).exists());
        let mut config = if own == [false, false] {
            builder.with_no_client_auth()
        } else {
            let (chain, key) = files.identity(CLIENT_CERTIFICATE, CLIENT_KEY)?;
            let config = builder.with_client_auth_cert(chain, key);
            config.map_err(|error| files.no_identity(CLIENT_CERTIFICATE, CLIENT_KEY, &error))?
        };
        config.resumption = Resumption::disabled();
        config.enable_secret_extraction = true;
        Ok(ClientCredentials { config: Arc::new(config) })
    }
}

impl ServerCredentials {
    /// Reads `ca-cert.pem`, `server-cert.pem` and `server-key.pem`. `ca-crl.pem`, where there is one, names certificates that are
    /// revoked.
    ///
    /// # Errors
    /// As [`ClientCredentials::from_dir`].
    pub fn from_dir(dir: &Path, clients: ClientCertificates) -> io::Result<ServerCredentials> {
        let files = Files { dir };
        let provider = Arc::new(ciphers::provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(VERSIONS)
            .map_err(io::Error::other)?;
        let builder = match clients {
            ClientCertificates::NotAsked => builder.with_no_client_auth(),
            ClientCertificates::Required => {
                let (roots, lists) = files.authority()?;
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    .with_crls(lists)
                    .enforce_revocation_expiration()
                    .allow_unknown_revocation_status()
                    .build()
                    .map_err(|error| files.no_verifier(&error))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let (chain, key) = files.identity(SERVER_CERTIFICATE, SERVER_KEY)?;
        let config = builder.with_single_cert(chain, key);
        let mut config = config.map_err(|error| files.no_identity(SERVER_CERTIFICATE, SERVER_KEY, &error))?;
        // A QEMU source never reads from a channel: when it closes one with tickets unread, what it sent last is lost.
        config.send_tls13_tickets = 0;
        config.enable_secret_extraction = true;
        Ok(ServerCredentials { config: Arc::new(config), clients })
    }
}

/// The files of one directory.
struct Files<'a> {
    dir: &'a Path,
}

impl Files<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Whom to trust, and the lists of what is revoked.
    fn authority(&self) -> io::Result<(RootCertStore, Vec<CertificateRevocationListDer<'static>>)> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates(CA)? {
            roots.add(certificate).map_err(|error| unusable(self.path(CA), error))?;
        }
        let path = self.path(REVOKED);
        let lists = match read(&path, Secrecy::Public) {
            Ok(bytes) => {
                let lists: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(&bytes).collect();
                let lists = lists.map_err(|error| unusable(&path, pem_reason(&error)))?;
                if lists.is_empty() {
                    // To go on would be to take what was to be refused.
                    return Err(unusable(&path, "it has no list of revoked certificates in PEM form"));
                }
                lists
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        Ok((roots, lists))
    }

    /// A chain of certificates, and the key of its first.
    fn identity(
        &self,
        certificate: &str,
        key: &str,
    ) -> io::Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let chain = self.certificates(certificate)?;
        let path = self.path(key);
        let bytes = read(&path, Secrecy::Secret)?;
        // The old form has the passphrase's parameters where base64 is expected.
        let has_passphrase = bytes.windows(ENCRYPTED.len()).any(|window| window == ENCRYPTED);
        let key = PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| match error {
            pem::Error::NoItemsFound => unusable(&path, "it has no private key in PEM form without a passphrase"),
            _ if has_passphrase => unusable(&path, "its private key has a passphrase; expected one without"),
            error => unusable(&path, pem_reason(&error)),
        })?;
        Ok((chain, key))
    }

    /// Why `certificate` and `key` prove nothing.
    fn no_identity(&self, certificate: &str, key: &str, error: &Error) -> io::Error {
        match error {
            Error::InconsistentKeys(_) => {
                unusable(self.path(key), format_args!("it is not the key of the first certificate in {certificate}"))
            }
            Error::InvalidCertificate(reason) => unusable(self.path(certificate), reason),
            // There is one kind of it here, without a reason.
            _ => unusable(
                self.path(key),
                "its private key cannot be used; expected RSA of 2048 to 8192 bits, ECDSA with P-256 or P-384, or Ed25519",
            ),
        }
    }

    /// Why certificates cannot be verified.
    fn no_verifier(&self, error: &VerifierBuilderError) -> io::Error {
        match error {
            VerifierBuilderError::InvalidCrl(reason) => {
                let message = format!("a list of revoked certificates {}", reasons::list(reason));
                unusable(self.path(REVOKED), message)
            }
            error => unusable(self.path(CA), error),
        }
    }

    fn certificates(&self, name: &str) -> io::Result<Vec<CertificateDer<'static>>> {
        let path = self.path(name);
        let bytes = read(&path, Secrecy::Public)?;
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
        match certificates {
            Ok(certificates) if certificates.is_empty() => Err(unusable(&path, "it has no certificate in PEM form")),
            Ok(certificates) => Ok(certificates),
            Err(error) => Err(unusable(&path, pem_reason(&error))),
        }
    }
}

/// Whether a file may be read by others.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Secrecy {
    Public,
    Secret,
}

fn read(path: &Path, secrecy: Secrecy) -> io::Result<Vec<u8>> {
    let read = || {
        // A FIFO would have us wait here.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
        }
        if secrecy == Secrecy::Secret {
            require_secret(path, metadata.mode())?;
        }
        let mut bytes = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is longer than 1 MiB"));
        }
        Ok(bytes)
    };
    read().map_err(context(path.display()))
}

/// Checks that `mode` keeps other users away. Members of the file's group may read it: QEMUs run by libvirt share their keys so.
fn require_secret(path: &Path, mode: u32) -> io::Result<()> {
    if mode & 0o007 != 0 {
        let message =
            format!("other users may open this private key (mode {:04o}); chmod 600 keeps them out", mode & 0o7777);
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
    }
    if mode & 0o070 != 0 {
        let mode = format!("{:04o}", mode & 0o7777);
        tracing::warn!(path = %path.display(), mode, "the group of this private key may open it, too");
    }
    Ok(())
}

fn unusable(path: impl AsRef<Path>, error: impl std::fmt::Display) -> io::Error {
    context(path.as_ref().display())(io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))
}

/// What is wrong with a file in PEM form.
fn pem_reason(error: &pem::Error) -> String {
    match error {
        pem::Error::MissingSectionEnd { .. } => "it is cut off: a line -----END … is missing".to_owned(),
        pem::Error::IllegalSectionStart { .. } => "a line -----BEGIN … is damaged".to_owned(),
        error => error.to_string(),
    }
}

const CA: &str = "ca-cert.pem";
const REVOKED: &str = "ca-crl.pem";
const CLIENT_CERTIFICATE: &str = "client-cert.pem";
const CLIENT_KEY: &str = "client-key.pem";
const SERVER_CERTIFICATE: &str = "server-cert.pem";
const SERVER_KEY: &str = "server-key.pem";

const VERSIONS: &[&SupportedProtocolVersion] = &[&TLS13, &TLS12];

/// In the head of a private key with a passphrase.
const ENCRYPTED: &[u8] = b"ENCRYPTED";

/// Longer than any file of certificates that a handshake could carry.
const MAX_FILE: u64 = 1 << 20;
