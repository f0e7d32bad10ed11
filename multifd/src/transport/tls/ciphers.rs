//! Which ciphers are offered and taken, in which order.
//!
//! All are rustls's, and none is left out. A server takes the first of its client's that it knows, so a source of ours decides. AES-128 comes before
//! AES-256: it has fewer rounds, TLS 1.3 demands it of everyone, and no attack on it is known that a longer key would help
//! against. ChaCha20 comes first where the processor has no instructions for AES.

use rustls::{
    CipherSuite, SupportedCipherSuite,
    crypto::{CryptoProvider, ring},
};

/// The ciphers of rustls with ring, the fastest on this host first.
pub(super) fn provider() -> CryptoProvider {
    let mut provider = ring::default_provider();
    order(&mut provider.cipher_suites, has_aes());
    provider
}

/// Puts the fastest first, of each version.
fn order(suites: &mut [SupportedCipherSuite], has_aes: bool) {
    // Stable: between certificates of the two kinds rustls's order stays.
    suites.sort_by_key(|suite| {
        let cost = match suite.suite() {
            CipherSuite::TLS13_AES_128_GCM_SHA256
            | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
            | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => 1,
            CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
            | CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
            | CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256 => {
                if has_aes {
                    3
                } else {
                    0
                }
            }
            _ => 2,
        };
        (suite.tls13().is_none(), cost)
    });
}

/// Whether the processor has instructions for AES in Galois/Counter Mode.
fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes") && std::arch::is_aarch64_feature_detected!("pmull");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheapest_cipher_of_each_version_comes_first_and_none_is_left_out() {
        let all = ring::default_provider().cipher_suites;
        for (has_aes, first, first_of_12) in [
            (true, CipherSuite::TLS13_AES_128_GCM_SHA256, CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256),
            (
                false,
                CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
                CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
            ),
        ] {
            let mut suites = all.clone();
            order(&mut suites, has_aes);
            assert_eq!(suites.len(), all.len());
            assert!(all.iter().all(|suite| suites.contains(suite)));
            assert_eq!(suites[0].suite(), first);
            let versions: Vec<bool> = suites.iter().map(|suite| suite.tls13().is_some()).collect();
            assert!(versions.is_sorted_by(|a, b| a >= b), "TLS 1.3 comes first: {suites:?}");
            let of_12 = suites.iter().find(|suite| suite.tls13().is_none()).expect("there are some");
            assert_eq!(of_12.suite(), first_of_12);
        }
    }
}
