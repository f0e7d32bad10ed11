//! The records of an established connection: one [`Sealer`] and one [`Opener`], which share nothing but the next keys.
//!
//! Nonces and additional data are rustls's, ciphers ring's. Each record is opened by rustls's [`MessageDecrypter`], and in TLS 1.2 sealed by its
//! [`MessageEncrypter`]; that copies a record twice, so in TLS 1.3 a record is sealed by ring where it lies. What is here counts records, and
//! changes the keys when a key has protected as many records as it may, or the peer says so.

use std::{
    io,
    // Not from `crate::sync`: model checkers open no connections.
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use ring::aead::{self, Aad, LessSafeKey, UnboundKey};
use rustls::{
    ConnectionTrafficSecrets, ContentType, Error, ExtractedSecrets, ProtocolVersion, SupportedCipherSuite,
    crypto::cipher::{
        AeadKey, InboundOpaqueMessage, Iv, MessageDecrypter, MessageEncrypter, Nonce, OutboundPlainMessage,
        make_tls13_aad,
    },
    kernel::KernelConnection,
};

use super::reasons;

/// An established connection's two directions.
pub(super) struct Session {
    pub(super) sealer: Sealer,
    pub(super) opener: Opener,
}

impl Session {
    /// Goes on where the handshake has ended.
    pub(super) fn new<D: Send + 'static>(
        secrets: ExtractedSecrets,
        connection: KernelConnection<D>,
    ) -> Result<Session, Error> {
        let suite = connection.negotiated_cipher_suite();
        let is_tls13 = connection.protocol_version() == ProtocolVersion::TLSv1_3;
        let next = Arc::new(NextKeys { keys: Mutex::new(Box::new(connection)), update_wanted: AtomicBool::new(false) });
        let ((sent, tx), (received, rx)) = (secrets.tx, secrets.rx);
        let limit = match suite {
            SupportedCipherSuite::Tls12(suite) => suite.common.confidentiality_limit,
            SupportedCipherSuite::Tls13(suite) => suite.common.confidentiality_limit,
        };
        let sealer =
            Sealer { cipher: encrypter(suite, tx)?, suite, is_tls13, sequence: sent, limit, next: next.clone() };
        let opener = Opener { cipher: decrypter(suite, rx)?, suite, is_tls13, sequence: received, next };
        Ok(Session { sealer, opener })
    }
}

/// The keys that follow the present ones, in TLS 1.3.
struct NextKeys {
    keys: Mutex<Box<dyn Rekey>>,
    /// The peer wants us to change the key that we send with.
    update_wanted: AtomicBool,
}

trait Rekey: Send {
    fn to_send(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error>;
    fn to_receive(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error>;
}

impl<D: Send> Rekey for KernelConnection<D> {
    fn to_send(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        self.update_tx_secret()
    }

    fn to_receive(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        self.update_rx_secret()
    }
}

/// Protects what is sent.
pub(super) struct Sealer {
    cipher: Cipher,
    suite: SupportedCipherSuite,
    is_tls13: bool,
    /// Of the next record, under the present key.
    sequence: u64,
    /// How many records a key may protect.
    limit: u64,
    next: Arc<NextKeys>,
}

impl Sealer {
    /// Makes a record of type `kind` of the `len` bytes of content, at most [`MAX_PLAIN`], that lie in `record` behind the room for a header. Returns the
    /// length of the record, which begins where `record` begins and is at most [`EXPANSION`] longer than header and content.
    ///
    /// # Errors
    /// There is no room for it; the cipher's. No part of the record is to be used then.
    pub(super) fn seal(&mut self, kind: ContentType, record: &mut [u8], len: usize) -> io::Result<usize> {
        let sealed = match &mut self.cipher {
            Cipher::InPlace(cipher) => cipher.seal(kind, record, len, self.sequence)?,
            Cipher::Copying(cipher) => {
                let payload = record[HEADER_LEN..][..len].into();
                let message = OutboundPlainMessage { typ: kind, version: ProtocolVersion::TLSv1_2, payload };
                let sealed = cipher.encrypt(message, self.sequence).map_err(io::Error::other)?.encode();
                record.get_mut(..sealed.len()).ok_or_else(no_room)?.copy_from_slice(&sealed);
                sealed.len()
            }
        };
        self.sequence += 1;
        Ok(sealed)
    }

    /// Where the key has to be changed before more is sent: changes it, and puts the record that says so at the beginning of `record`, which has
    /// at least [`KEY_UPDATE_LEN`] bytes. Returns its length, or 0.
    ///
    /// # Errors
    /// TLS 1.2 has no way to go on.
    pub(super) fn renew(&mut self, record: &mut [u8]) -> io::Result<usize> {
        let wanted = self.next.update_wanted.swap(false, Relaxed);
        // One is left for the record that says so, and one for close_notify.
        let is_used_up = self.sequence >= self.limit.saturating_sub(2);
        if !wanted && !is_used_up {
            return Ok(0);
        }
        if !self.is_tls13 {
            let message =
                "TLS 1.2 cannot protect more data on one connection with this cipher: use TLS 1.3, or more channels";
            return Err(io::Error::other(message));
        }
        record[HEADER_LEN..][..KEY_UPDATE.len()].copy_from_slice(&KEY_UPDATE);
        let len = self.seal(ContentType::Handshake, record, KEY_UPDATE.len())?;
        let mut keys = self.next.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let (sequence, secrets) = keys.to_send().map_err(io::Error::other)?;
        self.cipher = encrypter(self.suite, secrets).map_err(io::Error::other)?;
        self.sequence = sequence;
        Ok(len)
    }

    /// Allows only `limit` records for each key, for tests.
    #[cfg(all(test, not(any(loom, shuttle))))]
    pub(super) fn limit_records(&mut self, limit: u64) {
        self.limit = limit;
    }
}

/// What seals the records of one key.
enum Cipher {
    /// Of TLS 1.3.
    InPlace(Box<Tls13Cipher>),
    /// Of TLS 1.2.
    Copying(Box<dyn MessageEncrypter>),
}

/// Seals records of TLS 1.3 where they lie: RFC 8446, 5.2.
struct Tls13Cipher {
    key: LessSafeKey,
    iv: Iv,
}

impl Tls13Cipher {
    fn new(secrets: ConnectionTrafficSecrets) -> Result<Tls13Cipher, Error> {
        let algorithm = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { .. } => &aead::AES_128_GCM,
            ConnectionTrafficSecrets::Aes256Gcm { .. } => &aead::AES_256_GCM,
            ConnectionTrafficSecrets::Chacha20Poly1305 { .. } => &aead::CHACHA20_POLY1305,
            _ => return Err(unknown_cipher()),
        };
        let (key, iv) = parts(secrets)?;
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| unknown_cipher())?;
        Ok(Tls13Cipher { key: LessSafeKey::new(key), iv })
    }

    /// As [`Sealer::seal`]; `sequence` is the record's, and no other record of this key has it.
    fn seal(&self, kind: ContentType, record: &mut [u8], len: usize, sequence: u64) -> io::Result<usize> {
        // The type follows the content, and both are encrypted. There is no padding.
        let (inner, tag_len) = (len + 1, self.key.algorithm().tag_len());
        let (header, body) = record.split_first_chunk_mut::<HEADER_LEN>().ok_or_else(no_room)?;
        let (content, tag) = body.get_mut(..inner + tag_len).ok_or_else(no_room)?.split_at_mut(inner);
        content[len] = kind.into();
        // The additional data is the header.
        *header = make_tls13_aad(inner + tag_len);
        let nonce = aead::Nonce::assume_unique_for_key(Nonce::new(&self.iv, sequence).0);
        let sealed = self.key.seal_in_place_separate_tag(nonce, Aad::from(*header), content);
        tag.copy_from_slice(sealed.map_err(|_| io::Error::other(Error::EncryptError))?.as_ref());
        Ok(HEADER_LEN + inner + tag_len)
    }
}

fn no_room() -> io::Error {
    io::Error::other("no room for a TLS record")
}

/// Takes the protection off what is received.
pub(super) struct Opener {
    cipher: Box<dyn MessageDecrypter>,
    suite: SupportedCipherSuite,
    is_tls13: bool,
    /// Of the next record, under the present key.
    sequence: u64,
    next: Arc<NextKeys>,
}

impl Opener {
    /// The length of the record that begins with `header`, which is a part of it.
    ///
    /// # Errors
    /// There is no such record.
    pub(super) fn record_len(&self, header: &[u8; HEADER_LEN]) -> io::Result<usize> {
        let expansion = if self.is_tls13 { 256 } else { 2048 };
        let len = usize::from(u16::from_be_bytes([header[3], header[4]]));
        match header[1] {
            3 if len <= MAX_PLAIN + expansion => Ok(HEADER_LEN + len),
            3 => Err(invalid(format!("a TLS record of {len} bytes, more than there may be"))),
            _ => Err(invalid(format!("no TLS record begins with {:?}", header.escape_ascii().to_string()))),
        }
    }

    /// Takes the protection off `record` in place. Returns its type, and where in `record` its content is.
    ///
    /// # Errors
    /// It was changed on the way, or is out of order.
    pub(super) fn open(&mut self, record: &mut [u8]) -> io::Result<(ContentType, std::ops::Range<usize>)> {
        let begin = record.as_ptr().addr();
        let (header, body) = record.split_at_mut(HEADER_LEN);
        let message = InboundOpaqueMessage::new(ContentType::from(header[0]), ProtocolVersion::TLSv1_2, body);
        let plain = self.cipher.decrypt(message, self.sequence).map_err(|error| match error {
            Error::DecryptError => invalid("a TLS record was changed on the way".to_owned()),
            error => invalid(reasons::of(&error, reasons::Peer::Other)),
        })?;
        self.sequence += 1;
        let from = plain.payload.as_ptr().addr() - begin;
        Ok((plain.typ, from..from + plain.payload.len()))
    }

    /// The peer has changed the key that it sends with, and wants us to do the same if `both`.
    pub(super) fn renew(&mut self, both: bool) -> io::Result<()> {
        let mut keys = self.next.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let (sequence, secrets) = keys.to_receive().map_err(|error| invalid(error.to_string()))?;
        self.cipher = decrypter(self.suite, secrets).map_err(io::Error::other)?;
        self.sequence = sequence;
        if both {
            self.next.update_wanted.store(true, Relaxed);
        }
        Ok(())
    }

    /// Whether the version is 1.3.
    pub(super) fn is_tls13(&self) -> bool {
        self.is_tls13
    }
}

fn encrypter(suite: SupportedCipherSuite, secrets: ConnectionTrafficSecrets) -> Result<Cipher, Error> {
    Ok(match suite {
        SupportedCipherSuite::Tls13(_) => Cipher::InPlace(Box::new(Tls13Cipher::new(secrets)?)),
        SupportedCipherSuite::Tls12(suite) => {
            let (key, iv) = parts(secrets)?;
            let shape = suite.aead_alg.key_block_shape();
            let (fixed, explicit) = iv.as_ref().split_at(shape.fixed_iv_len);
            Cipher::Copying(suite.aead_alg.encrypter(key, fixed, &explicit[..shape.explicit_nonce_len]))
        }
    })
}

fn decrypter(
    suite: SupportedCipherSuite,
    secrets: ConnectionTrafficSecrets,
) -> Result<Box<dyn MessageDecrypter>, Error> {
    let (key, iv) = parts(secrets)?;
    Ok(match suite {
        SupportedCipherSuite::Tls13(suite) => suite.aead_alg.decrypter(key, iv),
        SupportedCipherSuite::Tls12(suite) => {
            let shape = suite.aead_alg.key_block_shape();
            suite.aead_alg.decrypter(key, &iv.as_ref()[..shape.fixed_iv_len])
        }
    })
}

fn parts(secrets: ConnectionTrafficSecrets) -> Result<(AeadKey, Iv), Error> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        _ => Err(unknown_cipher()),
    }
}

fn unknown_cipher() -> Error {
    Error::General("a cipher of an unknown kind".to_owned())
}

pub(super) fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// Type, version and length of a record.
pub(super) const HEADER_LEN: usize = 5;

/// The most content of one record.
pub(super) const MAX_PLAIN: usize = 16_384;

/// The most that a record made here is longer than its header and content: the type of its content, a nonce of TLS 1.2, a tag.
pub(super) const EXPANSION: usize = 32;

/// The longest record of any version.
pub(super) const MAX_RECORD: usize = HEADER_LEN + MAX_PLAIN + 2048;

/// The longest record that changes the key.
pub(super) const KEY_UPDATE_LEN: usize = HEADER_LEN + KEY_UPDATE.len() + EXPANSION;

/// The handshake message key_update, update_not_requested (RFC 8446, 4.6.3).
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];
