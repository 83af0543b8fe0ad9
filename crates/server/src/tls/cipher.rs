//! Cipher suites by the names that Go, and so etcd's `--cipher-suites`, gives them.

use rustls::crypto::aws_lc_rs::cipher_suite as suite;
use rustls::{ProtocolVersion, SupportedCipherSuite};

use super::error::TlsError;

/// The suites there are. Two have an older name without the hash, which etcd still takes.
static SUITES: [(&str, SupportedCipherSuite); 11] = [
    ("TLS_AES_128_GCM_SHA256", suite::TLS13_AES_128_GCM_SHA256),
    ("TLS_AES_256_GCM_SHA384", suite::TLS13_AES_256_GCM_SHA384),
    ("TLS_CHACHA20_POLY1305_SHA256", suite::TLS13_CHACHA20_POLY1305_SHA256),
    (
        "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
        suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    ),
    (
        "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
        suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    ),
    (
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305",
        suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
    (
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
        suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
    (
        "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
        suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    ),
    (
        "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
        suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    ),
    (
        "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305",
        suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
    (
        "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
        suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
];

/// What Go's `crypto/tls` knows and rustls leaves out: no forward secrecy, CBC, RC4 or 3DES.
const WEAK: [&str; 16] = [
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_RC4_128_SHA",
    "TLS_ECDHE_RSA_WITH_3DES_EDE_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_RC4_128_SHA",
    "TLS_RSA_WITH_3DES_EDE_CBC_SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA256",
    "TLS_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_RSA_WITH_AES_256_CBC_SHA",
    "TLS_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_RSA_WITH_RC4_128_SHA",
];

/// The suites of TLS 1.3, which cannot be chosen, then those of TLS 1.2: the named ones in the order of `names`, or all
/// if there are no names.
///
/// # Errors
/// [`TlsError::Options`] for a name that nobody knows (etcd's message), and for one that only Go has.
pub(super) fn suites(names: &[String]) -> Result<Vec<SupportedCipherSuite>, TlsError> {
    let mut chosen = rustls::crypto::aws_lc_rs::DEFAULT_CIPHER_SUITES.to_vec();
    if names.is_empty() {
        return Ok(chosen);
    }
    chosen.retain(|suite| suite.version().version == ProtocolVersion::TLSv1_3);
    for name in names {
        match SUITES.iter().find(|(known, _)| known == name) {
            // A name of TLS 1.3 is taken and changes nothing, as with Go.
            Some((_, suite)) if !chosen.contains(suite) => chosen.push(*suite),
            Some(_) => {}
            None if WEAK.contains(&name.as_str()) => {
                return Err(TlsError::Options(format!(
                    "TLS cipher suite {name:?} is not supported: it lacks forward secrecy or authenticated encryption; \
                     leave it out of --cipher-suites"
                )));
            }
            None => return Err(TlsError::Options(format!("unexpected TLS cipher suite {name:?}"))),
        }
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Result<Vec<SupportedCipherSuite>, TlsError> {
        suites(&names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn choosing_limits_tls_12_only_and_keeps_the_order() {
        assert_eq!(names(&[]).unwrap().len(), 9);
        let chosen = names(&[
            "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305",
            "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
            "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
            "TLS_AES_128_GCM_SHA256",
        ])
        .unwrap();
        assert_eq!(chosen.len(), 5);
        assert_eq!(
            chosen[3..],
            [
                suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
                suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
            ]
        );
    }

    #[test]
    fn names_that_cannot_be_had_are_refused() {
        for (name, text) in [
            ("nonsense", "unexpected TLS cipher suite \"nonsense\""),
            ("tls_aes_128_gcm_sha256", "unexpected TLS cipher suite"),
            ("TLS_RSA_WITH_AES_128_GCM_SHA256", "leave it out"),
        ] {
            let error = names(&[name]).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }
}
