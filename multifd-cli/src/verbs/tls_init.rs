//! `multifd tls-init`: makes a working set of certificates and keys for hosts that migrate among each other.
//!
//! One authority, one certificate for destinations with the names of all hosts, one for sources. The directory gets its name when it is
//! complete. The key of the authority is not kept: what is trusted is what is there, and a new set is a new authority.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use serde_json::{Map, json};
use time::{Duration, OffsetDateTime};

use crate::{args::TlsInitArgs, exit::Exit, report::Outcome, shell};

/// Makes the directory.
pub fn run(args: &TlsInitArgs) -> Outcome {
    let files = match Set::generate(&args.hosts, args.days) {
        Ok(files) => files,
        Err(error) => return Outcome::failed(Exit::Usage, error),
    };
    if let Err(error) = files.publish(&args.dir) {
        return Outcome::failed(Exit::Failed, format!("{}: {error}", args.dir.display()));
    }
    let mut report = Map::new();
    report.insert("dir".to_owned(), args.dir.display().to_string().into());
    report.insert("hosts".to_owned(), json!(args.hosts));
    report.insert("valid-until".to_owned(), files.valid_until.clone().into());
    let (dir, word) = (args.dir.display(), shell::word(&args.dir));
    let text = format!(
        "made {dir} for {}, valid until {}\n  copy it to each of them as it is, over a connection that you trust (scp -rp {word} \
         HOST:)\n  multifd: --tls-dir DIR on both sides; QEMU: -object tls-creds-x509,id=tls0,dir=DIR,endpoint=server, or \
         client, and the migration parameter tls-creds=tls0\n",
        args.hosts.join(", "),
        files.valid_until
    );
    Outcome::done(report, text)
}

/// The contents of all files.
struct Set {
    files: Vec<(&'static str, String)>,
    valid_until: String,
}

impl Set {
    /// # Errors
    /// A host that no certificate can be for; no random numbers.
    fn generate(hosts: &[String], days: u32) -> Result<Set, String> {
        if let Some(host) = hosts.iter().find(|host| !is_host(host)) {
            return Err(format!("invalid value '{host}' for '--host <NAME>': expected a host name or an address"));
        }
        let now = OffsetDateTime::now_utc();
        let validity = (now - Duration::hours(1), now + Duration::days(days.into()));
        let made = || -> Result<Vec<(&'static str, String)>, rcgen::Error> {
            let authority = authority(validity)?;
            let mut files = vec![("ca-cert.pem", authority.pem())];
            for (certificate, key_file, usage, names) in [
                ("server-cert.pem", "server-key.pem", ExtendedKeyUsagePurpose::ServerAuth, hosts),
                ("client-cert.pem", "client-key.pem", ExtendedKeyUsagePurpose::ClientAuth, &[]),
            ] {
                let mut params = CertificateParams::new(names)?;
                (params.not_before, params.not_after) = validity;
                params
                    .distinguished_name
                    .push(DnType::CommonName, names.first().map_or("multifd source", String::as_str));
                // QEMU 10.0 asks for the second one, too, though it is of no use with keys like these.
                params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
                params.extended_key_usages = vec![usage];
                params.use_authority_key_identifier_extension = true;
                let key = KeyPair::generate()?;
                files.push((certificate, params.signed_by(&key, &authority)?.pem()));
                files.push((key_file, key.serialize_pem()));
            }
            Ok(files)
        };
        let files = made().map_err(|error| error.to_string())?;
        Ok(Set { files, valid_until: validity.1.date().to_string() })
    }

    /// Makes the directory `dir` with all files, or nothing.
    ///
    /// # Errors
    /// There is something; the kernel's.
    fn publish(&self, dir: &Path) -> io::Result<()> {
        let parent = match dir.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let made = tempfile::Builder::new()
            .prefix(".tls-init-")
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(parent)?;
        for (name, content) in &self.files {
            let mode = if name.ends_with("key.pem") { 0o600 } else { 0o644 };
            let mut file = File::options().write(true).create_new(true).mode(mode).open(made.path().join(name))?;
            file.write_all(content.as_bytes())?;
            // Whatever the umask is: QEMU may run as another user, and needs the directory made readable for it anyway.
            file.set_permissions(Permissions::from_mode(mode))?;
            file.sync_all()?;
        }
        File::open(made.path())?.sync_all()?;
        // Of directories, this replaces empty ones only.
        fs::rename(made.path(), dir).map_err(|error| match error.kind() {
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
                io::Error::new(
                    error.kind(),
                    "it exists, and nothing in it is replaced; expected a directory that is new or empty",
                )
            }
            _ => error,
        })?;
        // It has another name now.
        let _ = made.keep();
        File::open(parent)?.sync_all()
    }
}

fn authority(validity: (OffsetDateTime, OffsetDateTime)) -> Result<CertifiedIssuer<'static, KeyPair>, rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    (params.not_before, params.not_after) = validity;
    // Two authorities of one name could not be told apart in messages.
    let number = u64::from_be_bytes(*key.public_key_raw().last_chunk().unwrap_or(&[0; 8]));
    params.distinguished_name.push(DnType::CommonName, format!("multifd CA {number:016x}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    CertifiedIssuer::self_signed(params, key)
}

/// Whether a certificate can be for it.
fn is_host(text: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    text.parse::<std::net::IpAddr>().is_ok() || (text.len() <= 253 && text.split('.').all(label))
}

#[cfg(test)]
mod tests {
    use test_support::TempDir;

    use super::*;

    fn made(dir: &Path) -> Outcome {
        let hosts = vec!["host.example".to_owned(), "127.0.0.1".to_owned()];
        run(&TlsInitArgs { dir: dir.to_owned(), hosts, days: 30, output: Default::default() })
    }

    #[test]
    fn what_exists_is_not_touched_and_keys_are_the_owners_alone() {
        let parent = TempDir::new().unwrap();
        let dir = parent.path().join("tls");
        assert_eq!(made(&dir).exit, Exit::Done);
        let mode = |name: &str| fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
        for name in ["server", "client"] {
            assert_eq!((mode(&format!("{name}-cert.pem")), mode(&format!("{name}-key.pem"))), (0o644, 0o600));
        }
        let before = fs::read(dir.join("server-key.pem")).unwrap();
        let again = made(&dir);
        assert_eq!(again.exit, Exit::Failed);
        assert!(again.error.unwrap().contains("nothing in it is replaced"));
        assert_eq!(fs::read(dir.join("server-key.pem")).unwrap(), before);
        let file = parent.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert_eq!(made(&file).exit, Exit::Failed);
        assert_eq!(fs::read(&file).unwrap(), b"precious");
        let empty = parent.path().join("empty");
        fs::create_dir(&empty).unwrap();
        assert_eq!(made(&empty).exit, Exit::Done);
        // Nothing is left of the attempts.
        let left = fs::read_dir(parent.path()).unwrap().count();
        assert_eq!(left, 3);
    }

    #[test]
    fn a_name_that_no_host_has_is_refused() {
        let parent = TempDir::new().unwrap();
        for wrong in ["", "a b", "-a", "a..b", "host:1", "*.example"] {
            let args = TlsInitArgs {
                dir: parent.path().join("tls"),
                hosts: vec![wrong.to_owned()],
                days: 1,
                output: Default::default(),
            };
            let outcome = run(&args);
            assert_eq!(outcome.exit, Exit::Usage);
            assert!(outcome.error.unwrap().contains("expected a host name or an address"), "{wrong}");
        }
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
