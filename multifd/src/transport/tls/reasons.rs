//! Why a connection with TLS is not established, in sentences for operators.

use rustls::{AlertDescription, CertRevocationListError, CertificateError, Error};

/// What the other end is in a handshake.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    /// The destination.
    Server,
    /// The source.
    Client,
    /// Either.
    Other,
}

/// The reason behind `error`, which `peer` has caused.
pub(super) fn of(error: &Error, peer: Peer) -> String {
    let who = match peer {
        Peer::Server => "the destination",
        Peer::Client => "the source",
        Peer::Other => "the peer",
    };
    match error {
        Error::InvalidCertificate(reason) => format!("the certificate of {who} {}", certificate(reason)),
        Error::InvalidCertRevocationList(reason) => {
            format!("the certificate of {who} cannot be checked: a list in ca-crl.pem here {}", list(reason))
        }
        Error::NoCertificatesPresented => {
            // One of another CA is not shown by GnuTLS, and so by a QEMU.
            format!(
                "{who} shows no certificate of the CA in ca-cert.pem here, and one is required: it needs client-cert.pem \
                 and client-key.pem of this CA"
            )
        }
        Error::AlertReceived(alert) => format!("{who} ends it: {}", self::alert(*alert)),
        Error::PeerIncompatible(reason) => {
            format!("{who} has no version, cipher or signature in common with this end ({reason:?})")
        }
        Error::InvalidMessage(_) => format!("{who} does not speak TLS, or breaks its rules ({error})"),
        error => format!("{who}: {error}"),
    }
}

fn certificate(reason: &CertificateError) -> String {
    use CertificateError as E;
    match reason {
        E::Expired | E::ExpiredContext { .. } => "has expired, by the clock of this host".to_owned(),
        E::NotValidYet | E::NotValidYetContext { .. } => {
            "is not valid yet, by the clock of this host: do the two clocks differ?".to_owned()
        }
        E::NotValidForName => "is for another host".to_owned(),
        E::NotValidForNameContext { expected, presented } => {
            let presented: Vec<&str> = presented.iter().map(|name| bare(name)).collect();
            let presented = if presented.is_empty() { "no host".to_owned() } else { presented.join(", ") };
            format!("is not for {}, but for {presented}", expected.to_str())
        }
        E::UnknownIssuer | E::BadSignature => "is not of the CA in ca-cert.pem here".to_owned(),
        E::Revoked => "is revoked (ca-crl.pem)".to_owned(),
        E::ExpiredRevocationList | E::ExpiredRevocationListContext { .. } => {
            "cannot be checked: the list of revoked certificates (ca-crl.pem) has expired".to_owned()
        }
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => {
            format!("is not for this use: {reason}")
        }
        E::UnsupportedSignatureAlgorithmContext { .. } | E::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "has a signature of a kind that this end cannot verify; expected RSA of at least 2048 bits with SHA-2, ECDSA with \
             P-256 or P-384, or Ed25519"
                .to_owned()
        }
        E::Other(reason) if reason.to_string().contains("CaUsedAsEndEntity") => {
            "is one of a CA: it needs one of its own, that its CA has signed".to_owned()
        }
        reason => format!("cannot be used: {reason}"),
    }
}

/// What is wrong with a list of revoked certificates.
pub(super) fn list(reason: &CertRevocationListError) -> String {
    use CertRevocationListError as E;
    match reason {
        E::BadSignature => "is not signed by the CA that it names".to_owned(),
        E::IssuerInvalidForCrl => "is of a CA that may not sign lists (key usage)".to_owned(),
        E::ParseError => "is damaged, or no list of version 2 with a number (RFC 5280, 5)".to_owned(),
        reason => format!("cannot be used: {reason:?}"),
    }
}

/// The name in `DnsName("name")` or `IpAddress(address)`.
fn bare(presented: &str) -> &str {
    let inner = presented.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
    inner.unwrap_or(presented).trim_matches('"')
}

/// What the peer means with `alert`.
pub(super) fn alert(alert: AlertDescription) -> String {
    use AlertDescription as A;
    let meaning = match alert {
        A::UnknownCA => "the certificate of this end is not of a CA that it trusts",
        A::CertificateExpired => "the certificate of this end has expired or is not valid yet, by its clock",
        A::CertificateRevoked => "the certificate of this end is revoked",
        A::BadCertificate | A::CertificateUnknown | A::UnsupportedCertificate | A::AccessDenied => {
            "it does not accept the certificate of this end; its log says why"
        }
        A::CertificateRequired => "it requires a certificate of this end: client-cert.pem and client-key.pem",
        A::HandshakeFailure | A::ProtocolVersion | A::InsufficientSecurity => {
            "it has no version or cipher in common with this end, or requires a certificate of this end"
        }
        A::DecryptError => {
            "a signature does not fit: the certificate of this end is of another CA with the same name, or was changed"
        }
        A::BadRecordMac => "what reached it was changed on the way",
        A::UnexpectedMessage | A::DecodeError | A::RecordOverflow | A::IllegalParameter => {
            "what reached it is not what it expects"
        }
        _ => return format!("TLS alert {alert:?}"),
    };
    format!("{meaning} (TLS alert {alert:?})")
}

/// What the first bytes of a peer say that does not speak TLS.
pub(super) fn no_tls(first: &[u8], peer: Peer) -> String {
    let hint = match (peer, first) {
        (Peer::Client, [b'Q', b'E', b'V', b'M', ..] | [0x11, 0x22, 0x33, 0x44, ..]) => {
            return "the source migrates without TLS, and this destination requires it: both ends need it, or neither"
                .to_owned();
        }
        (Peer::Server, _) => ": does the destination have TLS on?",
        _ => "",
    };
    format!("the peer does not speak TLS, but begins with {:?}{hint}", first.escape_ascii().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_names_who_and_what() {
        let of_another_kind = CertificateError::UnsupportedSignatureAlgorithmContext {
            signature_algorithm_id: Vec::new(),
            supported_algorithms: Vec::new(),
        };
        let certificate = |reason| of(&Error::InvalidCertificate(reason), Peer::Server);
        for (reason, expected) in [
            (CertificateError::Expired, "the certificate of the destination has expired"),
            (CertificateError::NotValidYet, "is not valid yet"),
            (CertificateError::UnknownIssuer, "is not of the CA in ca-cert.pem here"),
            (CertificateError::NotValidForName, "is for another host"),
            (CertificateError::Revoked, "is revoked"),
            (CertificateError::BadEncoding, "cannot be used"),
            (of_another_kind, "has a signature of a kind that this end cannot verify"),
        ] {
            let sentence = certificate(reason);
            assert!(sentence.contains(expected), "{sentence}");
        }
        let required = of(&Error::AlertReceived(AlertDescription::CertificateRequired), Peer::Server);
        assert!(required.starts_with("the destination ends it: it requires a certificate"), "{required}");
        assert!(
            of(&Error::NoCertificatesPresented, Peer::Client).contains("the source shows no certificate of the CA")
        );
        assert_eq!(["DnsName(\"a.example\")", "IpAddress(::1)", "x"].map(bare), ["a.example", "::1", "x"]);
        assert!(no_tls(b"QEVM", Peer::Client).contains("without TLS"));
        assert!(no_tls(b"HTTP", Peer::Server).contains("does the destination have TLS on?"));
    }
}
