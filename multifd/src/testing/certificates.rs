//! Certificates for tests of TLS, good ones and ones that are to be refused.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
    date_time_ymd,
};
use test_support::TempDir;

/// Who signs certificates.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// When a certificate is valid.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Valid {
    Now,
    Past,
    Future,
}

impl Authority {
    pub(crate) fn new() -> Authority {
        let params = Authority::params();
        Authority { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    /// One that `self` vouches for. What it issues is of use only with [its own certificate](Authority::append) behind it.
    pub(crate) fn intermediate(&self) -> Authority {
        let mut params = Authority::params();
        params.serial_number = Some(serial(INTERMEDIATE));
        let issuer = CertifiedIssuer::signed_by(params, KeyPair::generate().unwrap(), &self.issuer).unwrap();
        Authority { issuer }
    }

    fn params() -> CertificateParams {
        let mut params = CertificateParams::default();
        // Two authorities of one name cannot be told apart before their signatures are checked.
        static AUTHORITIES: AtomicU32 = AtomicU32::new(0);
        params.distinguished_name.push(DnType::CommonName, format!("CA {}", AUTHORITIES.fetch_add(1, Relaxed)));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    }

    /// Appends its certificate to that of `name`.
    pub(crate) fn append(&self, dir: &Path, name: &str) {
        let path = dir.join(format!("{name}-cert.pem"));
        let chain = fs::read_to_string(&path).unwrap() + &self.issuer.pem();
        fs::write(path, chain).unwrap();
    }

    /// Writes `ca-cert.pem`.
    pub(crate) fn write(&self, dir: &Path) {
        fs::write(dir.join("ca-cert.pem"), self.issuer.pem()).unwrap();
    }

    /// Writes certificate and key of `name`, `server` or `client`, for the `hosts`.
    pub(crate) fn issue(&self, dir: &Path, name: &str, hosts: &[&str], valid: Valid) {
        let hosts: Vec<String> = hosts.iter().map(|&host| host.to_owned()).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        let year = |year| date_time_ymd(year, 1, 1);
        (params.not_before, params.not_after) = match valid {
            Valid::Now => (year(2020), year(2200)),
            Valid::Past => (year(2020), year(2021)),
            Valid::Future => (year(2199), year(2200)),
        };
        params.extended_key_usages = vec![match name {
            "server" => ExtendedKeyUsagePurpose::ServerAuth,
            _ => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        params.serial_number = Some(serial(name));
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        fs::write(dir.join(format!("{name}-cert.pem")), certificate.pem()).unwrap();
        let path = dir.join(format!("{name}-key.pem"));
        fs::write(&path, key.serialize_pem()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// Writes `ca-crl.pem`, which revokes the certificate of `name` and holds until the year `until`.
    pub(crate) fn revoke(&self, dir: &Path, name: &str, until: i32) {
        let revoked = RevokedCertParams {
            serial_number: serial(name),
            revocation_time: date_time_ymd(2021, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2021, 1, 1),
            next_update: date_time_ymd(until, 1, 1),
            crl_number: SerialNumber::from_slice(&[1]),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        fs::write(dir.join("ca-crl.pem"), list.signed_by(&self.issuer).unwrap().pem().unwrap()).unwrap();
    }
}

/// As which an intermediate authority is revoked.
pub(crate) const INTERMEDIATE: &str = "intermediate";

/// The serial number of the certificate of `name`.
fn serial(name: &str) -> SerialNumber {
    SerialNumber::from_slice(name.as_bytes())
}

/// A directory as two hosts share it: both certificates, valid for `host`.
pub(crate) fn directory(host: &str) -> TempDir {
    let (dir, authority) = (TempDir::new().unwrap(), Authority::new());
    authority.write(dir.path());
    authority.issue(dir.path(), "server", &[host], Valid::Now);
    authority.issue(dir.path(), "client", &[host], Valid::Now);
    dir
}
