//! TLS between two ends: what is refused before anything is written, and what breaks later.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::Path,
    thread,
    time::Duration,
};

use rustls::{ContentType, crypto::ring, version::TLS12};
use test_support::{TempDir, time_limit};

use super::{
    records::{EXPANSION, HEADER_LEN, KEY_UPDATE_LEN, Session},
    *,
};
use crate::{
    ram::Ram,
    testing::certificates::{Authority, INTERMEDIATE, Valid, directory},
    transport::{Established, RecvHalf, SendHalf, socket::SocketStream},
};

mod sends;

type Outcome = io::Result<Box<dyn Stream>>;

/// A TCP connection: the source's end, and what the destination has accepted.
fn connected() -> (TcpStream, SocketStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (ours, SocketStream::new(listener.accept().unwrap().0.into()).unwrap())
}

fn credentials(dir: &Path) -> (ClientCredentials, ServerCredentials) {
    let client = ClientCredentials::from_dir(dir).unwrap();
    (client, ServerCredentials::from_dir(dir, ClientCertificates::Required).unwrap())
}

fn client_side(credentials: ClientCredentials) -> Side {
    Side::Client(credentials, ServerName::try_from(HOST).unwrap())
}

fn establish(stream: SocketStream, side: Side, limit: Duration) -> Outcome {
    TlsPending::over(Box::new(Established::new(stream)), side).unwrap().establish(Some(limit))
}

/// A handshake: what the source makes of it, then the destination. The destination greets a source that it takes, because in TLS
/// 1.3 the source is established before the destination has looked at its certificate.
fn meet(client: ClientCredentials, server: ServerCredentials) -> (Outcome, Outcome) {
    time_limit(LIMIT, || {
        let (ours, theirs) = connected();
        let accepting = thread::spawn(move || {
            let mut stream = establish(theirs, Side::Server(server), SOON)?;
            stream.write(b"!", &[])?;
            Ok(stream)
        });
        let ours = SocketStream::new(ours.into()).unwrap();
        let ours = establish(ours, client_side(client), SOON).and_then(|mut stream| {
            stream.read_exact(&mut [0])?;
            Ok(stream)
        });
        (ours, accepting.join().unwrap())
    })
}

/// Both ends of a connection.
fn pair() -> (Box<dyn Stream>, Box<dyn Stream>) {
    let dir = directory(HOST);
    let (client, server) = credentials(dir.path());
    let (ours, theirs) = meet(client, server);
    (ours.unwrap(), theirs.unwrap())
}

/// What both say of a handshake that is refused.
fn refusal(client: ClientCredentials, server: ServerCredentials) -> [String; 2] {
    let (ours, theirs) = meet(client, server);
    [ours, theirs].map(|end| end.err().expect("it is refused").to_string())
}

/// The same with certificates of one authority.
fn refused_for(server: (&[&str], Valid), client: Valid) -> [String; 2] {
    let (dir, authority) = (TempDir::new().unwrap(), Authority::new());
    authority.write(dir.path());
    authority.issue(dir.path(), "server", server.0, server.1);
    authority.issue(dir.path(), "client", &["source"], client);
    let (client, server) = credentials(dir.path());
    refusal(client, server)
}

#[track_caller]
fn assert_says(message: &str, expected: &str) {
    assert!(message.contains(expected), "{message:?} does not say {expected:?}");
}

#[test]
fn a_certificate_that_is_expired_early_or_of_another_host_is_refused_and_both_ends_say_why() {
    let [ours, theirs] = refused_for((&[HOST], Valid::Past), Valid::Now);
    assert_says(&ours, "the certificate of the destination has expired");
    assert_says(&theirs, "the source ends it: the certificate of this end has expired");
    let [ours, _] = refused_for((&[HOST], Valid::Future), Valid::Now);
    assert_says(&ours, "the certificate of the destination is not valid yet");
    let [ours, theirs] = refused_for((&["elsewhere.example", "10.0.0.1"], Valid::Now), Valid::Now);
    assert_says(&ours, "the certificate of the destination is not for localhost, but for");
    assert_says(&ours, "elsewhere.example");
    assert_says(&theirs, "it does not accept the certificate of this end");
    let [ours, theirs] = refused_for((&[HOST], Valid::Now), Valid::Past);
    assert_says(&theirs, "the certificate of the source has expired");
    assert_says(&ours, "the certificate of this end has expired");
}

#[test]
fn a_certificate_of_another_authority_is_refused_and_both_ends_say_why() {
    let (dir, other) = (directory(HOST), directory(HOST));
    let (client, server) = credentials(dir.path());
    let (_, other_server) = credentials(other.path());
    let [ours, theirs] = refusal(client, other_server);
    assert_says(&ours, "the certificate of the destination is not of the CA in ca-cert.pem here");
    assert_says(&theirs, "the certificate of this end is not of a CA that it trusts");
    // A source that trusts the destination, and is not trusted by it.
    fs::copy(dir.path().join("ca-cert.pem"), other.path().join("ca-cert.pem")).unwrap();
    let client = ClientCredentials::from_dir(other.path()).unwrap();
    let [ours, theirs] = refusal(client, server);
    assert_says(&ours, "the certificate of this end is not of a CA that it trusts");
    assert_says(&theirs, "the certificate of the source is not of the CA in ca-cert.pem here");
}

#[test]
fn a_source_without_certificate_is_taken_only_where_none_is_asked_for() {
    let dir = directory(HOST);
    let (_, server) = credentials(dir.path());
    for name in ["client-cert.pem", "client-key.pem"] {
        fs::remove_file(dir.path().join(name)).unwrap();
    }
    let client = ClientCredentials::from_dir(dir.path()).unwrap();
    let [ours, theirs] = refusal(client.clone(), server);
    assert_says(&ours, "it requires a certificate of this end");
    assert_says(&theirs, "the source shows no certificate of the CA in ca-cert.pem here");
    let server = ServerCredentials::from_dir(dir.path(), ClientCertificates::NotAsked).unwrap();
    let (ours, theirs) = meet(client, server);
    assert_eq!((ours.map(drop).err().is_none(), theirs.map(drop).err().is_none()), (true, true));
}

/// Each version and cipher has its own records.
#[test]
fn every_cipher_of_both_versions_carries_pages() {
    let dir = directory(HOST);
    let (client, server) = credentials(dir.path());
    let suites = ring::default_provider().cipher_suites;
    assert!(suites.len() >= 6, "{suites:?}");
    for suite in suites {
        let mut provider = ring::default_provider();
        provider.cipher_suites = vec![suite];
        let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[suite.version()])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer))
            .with_client_cert_resolver(client.config.client_auth_cert_resolver.clone());
        config.enable_secret_extraction = true;
        // The certificates here have ECDSA keys: ciphers for RSA find no key.
        let suite_name = format!("{:?}", suite.suite());
        if suite_name.contains("_RSA_") {
            continue;
        }
        let (ours, theirs) = meet(ClientCredentials { config: Arc::new(config) }, server.clone());
        let (mut ours, mut theirs) = (ours.unwrap(), theirs.unwrap());
        let (from, to) = (Ram::for_test(&[("a", 20)]), Ram::for_test(&[("a", 20)]));
        (0..20).for_each(|page| from.page(page).unwrap().write(&[page as u8 + 1; 4096]));
        let send = thread::spawn(move || {
            let pages: Vec<_> = (0..20).map(|page| from.page(page).unwrap()).collect();
            ours.write(b"odd", &pages).unwrap();
            ours.finish().unwrap();
            ours
        });
        theirs.read_exact(&mut [0; 3]).unwrap();
        let pages: Vec<_> = (0..20).map(|page| to.page(page).unwrap()).collect();
        theirs.read_pages(&pages).unwrap();
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "{suite_name}");
        (0..20).for_each(|page| assert_eq!(to.page_bytes(page), [page as u8 + 1; 4096], "{suite_name}, page {page}"));
        send.join().unwrap();
    }
}

/// Accepts every destination: for what is not about certificates.
#[derive(Debug)]
struct AnyServer;

impl rustls::client::danger::ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _end_entity: &rustls::pki_types::CertificateDer<'_>,
        _intermediates: &[rustls::pki_types::CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &rustls::pki_types::CertificateDer<'_>,
        _dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &rustls::pki_types::CertificateDer<'_>,
        _dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

#[test]
fn a_peer_without_tls_is_refused_and_what_it_speaks_is_named() {
    let dir = directory(HOST);
    let (client, server) = credentials(dir.path());
    for (said, expected) in [
        (&b"QEVM\0\0\0\x03"[..], "the source migrates without TLS, and this destination requires it"),
        (&[0x11, 0x22, 0x33, 0x44], "the source migrates without TLS, and this destination requires it"),
        (b"GET / HTTP/1.1\r\n\r\n", "begins with \"GET /\""),
    ] {
        let (mut ours, theirs) = connected();
        ours.write_all(said).unwrap();
        let server = server.clone();
        let accepting = thread::spawn(move || establish(theirs, Side::Server(server), SOON).err().unwrap());
        let mut answer = Vec::new();
        time_limit(LIMIT, || ours.read_to_end(&mut answer)).unwrap();
        assert_eq!(answer, [0x15, 3, 3, 0, 2, 2, 10], "an alert, and no reset");
        drop(ours);
        assert_says(&accepting.join().unwrap().to_string(), expected);
    }
    for said in [&b"HTTP/1.1 400 Bad Request\r\n"[..], b""] {
        let (mut theirs, ours) = connected();
        theirs.write_all(said).unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        let error = time_limit(LIMIT, || establish(ours, client_side(client.clone()), SOON)).err().unwrap();
        assert_says(&error.to_string(), "does the destination have TLS on?");
    }
}

/// Its kernel resets the connection, as the hello was not read.
#[test]
fn a_destination_that_closes_at_once_is_asked_for_tls() {
    let dir = directory(HOST);
    let (client, _) = credentials(dir.path());
    let (theirs, ours) = std::os::unix::net::UnixStream::pair().unwrap();
    let ours = SocketStream::new(ours.into()).unwrap();
    let begun = thread::spawn(move || establish(ours, client_side(client), SOON).err().unwrap().to_string());
    let mut theirs = SocketStream::new(theirs.into()).unwrap();
    theirs.read_exact(&mut [0; 4]).unwrap();
    drop(theirs);
    let message = time_limit(LIMIT, || begun.join().unwrap());
    assert_says(&message, "has closed the connection within the handshake: does the destination have TLS on?");
}

/// Each byte came within the time for one read, so there was no limit at all.
#[test]
fn a_handshake_that_goes_byte_by_byte_or_not_at_all_ends_at_its_limit() {
    let dir = directory(HOST);
    let (_, server) = credentials(dir.path());
    for slowly in [true, false] {
        let (mut ours, theirs) = connected();
        let server = server.clone();
        let accepting = thread::spawn(move || {
            let outcome = establish(theirs, Side::Server(server), Duration::from_millis(300));
            outcome.map(drop).unwrap_err().kind()
        });
        time_limit(LIMIT, || {
            // The beginning of a handshake of 4 KiB.
            let mut bytes = [0x16, 3, 1, 16, 0].into_iter().chain(std::iter::repeat(1));
            while slowly && !accepting.is_finished() {
                // The other end may have closed it by now.
                let _ = ours.write_all(&[bytes.next().unwrap()]);
                thread::sleep(Duration::from_millis(5));
            }
            assert_eq!(accepting.join().unwrap(), io::ErrorKind::TimedOut);
        });
    }
}

/// A source whose records are made by hand, and the destination's end.
fn by_hand() -> (TcpStream, Session, Box<dyn Stream>) {
    let dir = directory(HOST);
    let (client, server) = credentials(dir.path());
    time_limit(LIMIT, || {
        let (ours, theirs) = connected();
        let accepting = thread::spawn(move || establish(theirs, Side::Server(server), SOON).unwrap());
        let mut stream = SocketStream::new(ours.try_clone().unwrap().into()).unwrap();
        let name = ServerName::try_from(HOST).unwrap();
        let session = handshake::client(&mut stream, &client, &name, Deadline::after(Some(SOON))).unwrap();
        stream.set_read_timeout(None).unwrap();
        (ours, session, accepting.join().unwrap())
    })
}

/// A record of `session` with this content.
fn sealed(session: &mut Session, kind: ContentType, content: &[u8]) -> Vec<u8> {
    let mut record = [&[0; HEADER_LEN], content, &[0; EXPANSION]].concat();
    let len = session.sealer.seal(kind, &mut record, content.len()).unwrap();
    record.truncate(len);
    record
}

/// The record with which `session` changes its key, where it has to.
fn renewed(session: &mut Session) -> io::Result<Vec<u8>> {
    let mut record = vec![0; KEY_UPDATE_LEN];
    let len = session.sealer.renew(&mut record)?;
    record.truncate(len);
    Ok(record)
}

/// What the destination says of `bytes` that a source sends in place of a record with a page.
fn broken(change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> (io::ErrorKind, String) {
    let (mut ours, mut session, mut theirs) = by_hand();
    let record = sealed(&mut session, ContentType::ApplicationData, &[7; 4096]);
    ours.write_all(&change(record)).unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    let ram = Ram::for_test(&[("a", 2)]);
    let pages = [ram.page(0).unwrap(), ram.page(1).unwrap()];
    let error = time_limit(LIMIT, || theirs.read_pages(&pages)).unwrap_err();
    assert!(ram.page_bytes(1) == [0; 4096], "nothing of a broken record is written");
    (error.kind(), error.to_string())
}

#[test]
fn a_record_that_is_cut_changed_repeated_or_too_long_is_an_error() {
    for at in [3, 5, 100] {
        let (kind, message) = broken(|record| record[..at].to_vec());
        assert_eq!((kind, &*message), (io::ErrorKind::UnexpectedEof, "the connection ends within a TLS record"));
    }
    let changed = broken(|mut record| {
        record[50] ^= 1;
        record
    });
    assert_eq!(changed, (io::ErrorKind::InvalidData, "a TLS record was changed on the way".to_owned()));
    let repeated = broken(|record| [record.clone(), record].concat());
    assert_eq!(repeated, (io::ErrorKind::InvalidData, "a TLS record was changed on the way".to_owned()));
    let (kind, message) = broken(|record| [&record[..3], &[0x41, 1]].concat());
    assert_eq!((kind, &*message), (io::ErrorKind::InvalidData, "a TLS record of 16641 bytes, more than there may be"));
    let (_, message) = broken(|_| b"QEVM\0\0\0\x03".to_vec());
    assert_says(&message, "no TLS record begins with \"QEVM");
}

#[test]
fn records_without_content_and_messages_of_other_kinds_come_to_an_end() {
    let endless = |kind: ContentType, content: &[u8]| {
        let (mut ours, mut session, mut theirs) = by_hand();
        for _ in 0..100 {
            let record = sealed(&mut session, kind, content);
            if ours.write_all(&record).is_err() {
                break;
            }
        }
        time_limit(LIMIT, || theirs.read(&mut [0; 10])).unwrap_err().to_string()
    };
    assert_says(&endless(ContentType::ApplicationData, b""), "without content");
    assert_says(&endless(ContentType::Handshake, &[4, 0, 0, 1, 9]), "without content");
    assert_says(&endless(ContentType::Handshake, &[4, 1, 0, 1]), "a TLS handshake message of 65537 bytes");
    assert_says(&endless(ContentType::Handshake, &[1, 0, 0, 0]), "a TLS handshake message of type 1");
    assert_says(&endless(ContentType::Alert, &[2]), "a TLS alert of a wrong length");
    assert_says(&endless(ContentType::Alert, &[2, 40]), "the peer ends the connection");
}

/// A QEMU source reads nothing from a channel: unread bytes at its close would have the kernel drop what it sent last.
#[test]
fn a_destination_says_nothing_after_the_handshake_by_itself() {
    let (ours, session, theirs) = by_hand();
    ours.set_nonblocking(true).unwrap();
    let error = (&ours).read(&mut [0; 100]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    drop((session, theirs));
}

#[test]
fn an_end_between_two_records_is_an_end_and_nothing_is_read_after_close_notify() {
    for told in [true, false] {
        let (mut ours, mut session, mut theirs) = by_hand();
        let mut bytes = sealed(&mut session, ContentType::ApplicationData, b"all");
        if told {
            bytes.extend(sealed(&mut session, ContentType::Alert, &[1, 0]));
            bytes.extend(sealed(&mut session, ContentType::ApplicationData, b"more"));
        }
        ours.write_all(&bytes).unwrap();
        if !told {
            ours.shutdown(Shutdown::Write).unwrap();
        }
        time_limit(LIMIT, || {
            theirs.read_exact(&mut [0; 3]).unwrap();
            assert_eq!(theirs.read(&mut [0; 10]).unwrap(), 0, "told: {told}");
            assert_eq!(theirs.read(&mut [0; 10]).unwrap(), 0, "and from now on");
        });
    }
}

/// A key protects 2^24 records, that is 256 GiB: beyond, a VM needs the next key on the same connection.
#[test]
fn keys_that_are_used_up_are_replaced_on_the_way() {
    let (mut ours, mut session, mut theirs) = by_hand();
    session.sealer.limit_records(5);
    let send = thread::spawn(move || {
        for number in 0..50u8 {
            ours.write_all(&renewed(&mut session).unwrap()).unwrap();
            ours.write_all(&sealed(&mut session, ContentType::ApplicationData, &[number])).unwrap();
        }
        ours
    });
    time_limit(LIMIT, || {
        for number in 0..50 {
            let mut byte = [0];
            theirs.read_exact(&mut byte).unwrap();
            assert_eq!(byte, [number]);
        }
    });
    drop(send.join().unwrap());
}

/// The peer is rustls with its own records.
#[test]
fn a_peer_that_asks_for_the_next_key_gets_it_before_more_is_sent() {
    let dir = directory(HOST);
    let (client, server) = credentials(dir.path());
    time_limit(LIMIT, || {
        let (mut ours, theirs) = connected();
        let accepting = thread::spawn(move || establish(theirs, Side::Server(server), SOON).unwrap());
        let mut connection =
            rustls::ClientConnection::new(client.config.clone(), ServerName::try_from(HOST).unwrap()).unwrap();
        while connection.is_handshaking() {
            connection.complete_io(&mut ours).unwrap();
        }
        let mut theirs = accepting.join().unwrap();
        for round in 0..3 {
            connection.refresh_traffic_keys().unwrap();
            rustls::Stream::new(&mut connection, &mut ours).write_all(b"x").unwrap();
            theirs.read_exact(&mut [0]).unwrap();
            theirs.write(&[round], &[]).unwrap();
            let mut answer = [0];
            rustls::Stream::new(&mut connection, &mut ours).read_exact(&mut answer).unwrap();
            assert_eq!(answer, [round]);
        }
    });
}

#[test]
fn tls_1_2_does_not_go_on_with_a_key_that_is_used_up() {
    let dir = directory(HOST);
    let (client, server) = credentials(dir.path());
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS12])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer))
        .with_client_cert_resolver(client.config.client_auth_cert_resolver.clone());
    config.enable_secret_extraction = true;
    let client = ClientCredentials { config: Arc::new(config) };
    let (ours, theirs) = connected();
    let accepting = thread::spawn(move || establish(theirs, Side::Server(server), SOON));
    let mut stream = SocketStream::new(ours.into()).unwrap();
    let name = ServerName::try_from(HOST).unwrap();
    let mut session = handshake::client(&mut stream, &client, &name, Deadline::after(Some(SOON))).unwrap();
    assert!(renewed(&mut session).unwrap().is_empty());
    session.sealer.limit_records(3);
    assert_says(&renewed(&mut session).unwrap_err().to_string(), "use TLS 1.3, or more channels");
    accepting.join().unwrap().unwrap();
}

#[test]
fn pages_are_not_written_to_memory_that_is_read_only() {
    let (mut ours, mut theirs) = pair();
    ours.write(&[7; 4096], &[]).unwrap();
    let memory =
        crate::ram::RamBlock::anonymous(multifd_proto::BlockName::new("rom").unwrap(), 4096).unwrap().read_only();
    let ram = Ram::new(4096, vec![memory]).unwrap();
    let error = theirs.read_pages(&[ram.page(0).unwrap()]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn files_that_cannot_be_used_are_named_with_the_reason() {
    let message = |dir: &TempDir| match ServerCredentials::from_dir(dir.path(), ClientCertificates::Required) {
        Ok(_) => "used".to_owned(),
        Err(error) => error.to_string(),
    };
    let dir = directory(HOST);
    assert_eq!(message(&dir), "used");
    let key = dir.path().join("server-key.pem");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let refused = message(&dir);
    assert_says(&refused, "server-key.pem: other users may open this private key (mode 0644); chmod 600");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
    assert_eq!(message(&dir), "used", "a group may share a key");
    fs::copy(dir.path().join("client-key.pem"), &key).unwrap();
    assert_says(&message(&dir), "server-key.pem: it is not the key of the first certificate in server-cert.pem");
    fs::write(&key, "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n").unwrap();
    assert_says(&message(&dir), "server-key.pem: its private key cannot be used; expected RSA of 2048 to 8192 bits");
    let old = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\nAAAA\n";
    fs::write(&key, format!("{old}-----END RSA PRIVATE KEY-----\n")).unwrap();
    assert_says(&message(&dir), "server-key.pem: its private key has a passphrase; expected one without");
    fs::write(&key, "-----BEGIN PRIVATE KEY-----\nAAAA\n").unwrap();
    assert_says(&message(&dir), "server-key.pem: it is cut off");
    fs::write(&key, "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n").unwrap();
    assert_says(&message(&dir), "server-key.pem: it has no private key in PEM form without a passphrase");
    fs::remove_file(&key).unwrap();
    assert_says(&message(&dir), "server-key.pem: No such file");
    fs::create_dir(&key).unwrap();
    assert_says(&message(&dir), "server-key.pem: it is not a regular file");
    fs::write(dir.path().join("server-cert.pem"), "no certificate").unwrap();
    assert_says(&message(&dir), "server-cert.pem: it has no certificate in PEM form");
    fs::write(dir.path().join("ca-cert.pem"), vec![b'x'; (1 << 20) + 1]).unwrap();
    assert_says(&message(&dir), "ca-cert.pem: it is longer than 1 MiB");
    fs::remove_file(dir.path().join("ca-cert.pem")).unwrap();
    assert_says(&message(&dir), "ca-cert.pem: No such file");
}

#[test]
fn a_revoked_certificate_is_refused() {
    let (dir, authority) = (TempDir::new().unwrap(), Authority::new());
    authority.write(dir.path());
    authority.issue(dir.path(), "server", &[HOST], Valid::Now);
    authority.issue(dir.path(), "client", &["source"], Valid::Now);
    authority.revoke(dir.path(), "client", 2200);
    let (client, server) = credentials(dir.path());
    let [ours, theirs] = refusal(client, server);
    assert_says(&theirs, "the certificate of the source is revoked (ca-crl.pem)");
    assert_says(&ours, "the certificate of this end is revoked");
}

/// Only the last certificate of a chain was looked up, so a CA that was revoked could still vouch for anyone.
#[test]
fn a_certificate_of_a_revoked_intermediate_authority_is_refused() {
    let (dir, authority) = (TempDir::new().unwrap(), Authority::new());
    authority.write(dir.path());
    let intermediate = authority.intermediate();
    authority.issue(dir.path(), "server", &[HOST], Valid::Now);
    intermediate.issue(dir.path(), "client", &["source"], Valid::Now);
    intermediate.append(dir.path(), "client");
    let (client, server) = credentials(dir.path());
    let (ours, theirs) = meet(client, server);
    assert!(ours.is_ok() && theirs.is_ok(), "it is as good as any before it is revoked");
    authority.revoke(dir.path(), INTERMEDIATE, 2200);
    let (client, server) = credentials(dir.path());
    let [ours, theirs] = refusal(client, server);
    assert_says(&theirs, "the certificate of the source is revoked (ca-crl.pem)");
    assert_says(&ours, "the certificate of this end is revoked");
}

/// A list that has expired may lack what was revoked since, and was taken as if it had said all.
#[test]
fn no_one_passes_a_list_of_revoked_certificates_that_has_expired() {
    let (dir, authority) = (TempDir::new().unwrap(), Authority::new());
    authority.write(dir.path());
    authority.issue(dir.path(), "server", &[HOST], Valid::Now);
    authority.issue(dir.path(), "client", &["source"], Valid::Now);
    authority.revoke(dir.path(), "another", 2022);
    let (client, server) = credentials(dir.path());
    let [ours, _] = refusal(client, server);
    assert_says(&ours, "cannot be checked: the list of revoked certificates (ca-crl.pem) has expired");
}

/// A file without a list, as one in DER form is to a reader of PEM, was taken for a list that revokes nothing.
#[test]
fn a_file_without_a_usable_list_of_revoked_certificates_is_refused() {
    let dir = directory(HOST);
    let list = dir.path().join("ca-crl.pem");
    let pem = |content: &str| format!("-----BEGIN X509 CRL-----\n{content}-----END X509 CRL-----\n");
    for (content, expected) in [
        (String::new(), "ca-crl.pem: it has no list of revoked certificates in PEM form"),
        ("0\u{1}\u{1}".to_owned(), "ca-crl.pem: it has no list of revoked certificates in PEM form"),
        (pem("AAAA\n"), "ca-crl.pem: a list of revoked certificates "),
        ("-----BEGIN X509 CRL-----\nAAAA\n".to_owned(), "ca-crl.pem: it is cut off"),
    ] {
        fs::write(&list, &content).unwrap();
        let server = ServerCredentials::from_dir(dir.path(), ClientCertificates::Required);
        let client = ClientCredentials::from_dir(dir.path());
        for error in [server.err(), client.err()] {
            assert_says(&error.expect("it is refused").to_string(), expected);
        }
    }
}

#[test]
fn a_name_that_no_certificate_can_be_for_is_refused() {
    let dir = directory(HOST);
    let (client, _) = credentials(dir.path());
    let connector = |host| {
        let inner = crate::transport::tcp::TcpConnector::new("127.0.0.1", 1);
        TlsConnector::new(Box::new(inner), client.clone(), host)
    };
    for address in ["fe80::1%eth0", "10.0.0.1", "::1", "[::1]", "[fe80::1%eth0]"] {
        assert!(connector(address).is_ok(), "{address}");
    }
    assert_says(&connector("no host").err().unwrap().to_string(), "is no host name or address");
}

/// A peer may cut its hello anywhere.
#[test]
fn a_hello_in_many_records_is_taken() {
    let dir = directory(HOST);
    let (client, server) = credentials(dir.path());
    let hello = client_hello(&client);
    for piece in [1, 7, 100] {
        let records: Vec<u8> =
            hello[5..].chunks(piece).flat_map(|piece| [&[0x16, 3, 1, 0, piece.len() as u8], piece].concat()).collect();
        let (mut ours, theirs) = connected();
        ours.write_all(&records).unwrap();
        let accepting = thread::spawn({
            let server = server.clone();
            move || establish(theirs, Side::Server(server), SOON).err().unwrap()
        });
        let mut answer = [0; 6];
        time_limit(LIMIT, || ours.read_exact(&mut answer)).unwrap();
        assert_eq!((answer[0], answer[5]), (0x16, 2), "the hello of the server");
        drop(ours);
        accepting.join().unwrap();
    }
}

/// Whatever comes, it is an error: a panic of this thread would end the migration.
#[test]
fn hellos_that_were_changed_are_errors() {
    let dir = directory(HOST);
    let (client, server) = credentials(dir.path());
    let hello = client_hello(&client);
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..400 {
        let mut bytes = hello.clone();
        for _ in 0..random.usize(1..4) {
            let at = random.usize(..bytes.len());
            match random.u8(..4) {
                0 => bytes[at] = random.u8(..),
                1 => bytes.truncate(at),
                2 => bytes.splice(at..at, hello[..at.min(hello.len())].iter().copied()).for_each(drop),
                _ => bytes.extend_from_slice(&hello[at.min(hello.len())..]),
            }
            bytes.push(0);
        }
        let (mut ours, theirs) = crate::testing::memory::pair(1 << 20);
        ours.write(&bytes, &[]).unwrap();
        ours.finish().unwrap();
        let mut theirs: Box<dyn Stream> = Box::new(theirs);
        let outcome = handshake::server(&mut *theirs, &server, Deadline::after(Some(SOON)));
        assert!(outcome.is_err(), "it has said hello at most");
    }
}

/// The first record of a source.
fn client_hello(credentials: &ClientCredentials) -> Vec<u8> {
    let name = ServerName::try_from(HOST).unwrap();
    let mut connection = rustls::ClientConnection::new(credentials.config.clone(), name).unwrap();
    let mut hello = Vec::new();
    connection.write_tls(&mut hello).unwrap();
    hello
}

const HOST: &str = "localhost";

/// For what happens at once, with room for a busy machine.
const SOON: Duration = Duration::from_secs(30);

const LIMIT: Duration = Duration::from_secs(100);
