//! Signed tokens (`--auth-token=jwt,...`): JSON Web Signatures in their compact form, with etcd's claims.
//!
//! Own code over aws-lc-rs, since no well-kept crate has both ES512 and the key files that OpenSSL writes for it, which
//! etcd takes. The form is small (RFC 7515, section 7.1): three parts in base64, of which the first names the algorithm.
//! It must be the one that was configured; what a token says decides nothing.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::hmac;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    self, EcdsaKeyPair, EcdsaSigningAlgorithm, Ed25519KeyPair, KeyPair, ParsedPublicKey, RsaEncoding, RsaKeyPair,
    VerificationAlgorithm,
};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use quick_cache::sync::Cache;
use serde::{Deserialize, Serialize};

/// Most tokens that are remembered to have been verified.
const REMEMBERED_MAX: usize = 4096;
/// Longer tokens are verified each time, in bytes.
const REMEMBERED_BYTES_MAX: usize = 2048;

/// What to sign tokens with, and how long they count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtOptions {
    /// The algorithm's name, such as RS256.
    pub sign_method: String,
    /// The file with the public key. Without a private key, tokens are verified and not given out.
    pub public_key: Option<PathBuf>,
    /// The file with the private key; for HMAC, with the secret.
    pub private_key: Option<PathBuf>,
    /// How long a token counts.
    pub ttl: Duration,
}

/// Why there can be no tokens. The texts are etcd's where it has one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JwtError {
    /// An algorithm that does not exist, or a file that cannot be read.
    #[error("auth: invalid auth options: {0}")]
    Options(String),
    /// No key.
    #[error("auth: missing key data")]
    MissingKey,
    /// Two keys that do not belong together.
    #[error("auth: public and private keys don't match")]
    KeyMismatch,
    /// A file that holds no key for the algorithm.
    #[error("{file}: {cause}")]
    BadKey {
        /// Which file.
        file: String,
        /// Why.
        cause: String,
    },
}

/// Why a token does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TokenError {
    #[error("it is no JSON Web Token")]
    Form,
    #[error("it is signed by another algorithm")]
    Algorithm,
    #[error("the signature is wrong")]
    Signature,
    #[error("a claim is missing or makes no sense")]
    Claims,
    #[error("it has expired")]
    Expired,
    #[error("it does not count yet")]
    TooEarly,
}

/// What a token says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Claims {
    pub(crate) username: Arc<str>,
    /// The auth revision at which the user logged in.
    pub(crate) revision: u64,
    /// When it ends, in seconds since 1970; never if there is none.
    expires_s: Option<f64>,
    /// When it begins, likewise.
    begins_s: Option<f64>,
}

/// How tokens are signed.
enum Method {
    Hmac(hmac::Algorithm),
    Rsa(&'static dyn RsaEncoding, &'static signature::RsaParameters),
    Ecdsa(&'static EcdsaSigningAlgorithm, &'static dyn VerificationAlgorithm),
    Ed25519,
}

impl Method {
    /// The algorithms of RFC 7518 and RFC 8037 that etcd knows, by their names.
    fn named(name: &str) -> Option<Self> {
        use signature::{
            ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED,
            ECDSA_P384_SHA384_FIXED_SIGNING, ECDSA_P521_SHA512_FIXED, ECDSA_P521_SHA512_FIXED_SIGNING,
            RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RSA_PKCS1_SHA256,
            RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384,
            RSA_PSS_2048_8192_SHA512, RSA_PSS_SHA256, RSA_PSS_SHA384, RSA_PSS_SHA512,
        };
        Some(match name {
            "HS256" => Method::Hmac(hmac::HMAC_SHA256),
            "HS384" => Method::Hmac(hmac::HMAC_SHA384),
            "HS512" => Method::Hmac(hmac::HMAC_SHA512),
            "RS256" => Method::Rsa(&RSA_PKCS1_SHA256, &RSA_PKCS1_2048_8192_SHA256),
            "RS384" => Method::Rsa(&RSA_PKCS1_SHA384, &RSA_PKCS1_2048_8192_SHA384),
            "RS512" => Method::Rsa(&RSA_PKCS1_SHA512, &RSA_PKCS1_2048_8192_SHA512),
            "PS256" => Method::Rsa(&RSA_PSS_SHA256, &RSA_PSS_2048_8192_SHA256),
            "PS384" => Method::Rsa(&RSA_PSS_SHA384, &RSA_PSS_2048_8192_SHA384),
            "PS512" => Method::Rsa(&RSA_PSS_SHA512, &RSA_PSS_2048_8192_SHA512),
            "ES256" => Method::Ecdsa(&ECDSA_P256_SHA256_FIXED_SIGNING, &ECDSA_P256_SHA256_FIXED),
            "ES384" => Method::Ecdsa(&ECDSA_P384_SHA384_FIXED_SIGNING, &ECDSA_P384_SHA384_FIXED),
            "ES512" => Method::Ecdsa(&ECDSA_P521_SHA512_FIXED_SIGNING, &ECDSA_P521_SHA512_FIXED),
            "EdDSA" => Method::Ed25519,
            _ => return None,
        })
    }
}

enum Key {
    Hmac(hmac::Key),
    Pair {
        /// `None` if this member only verifies.
        private: Option<Private>,
        public: ParsedPublicKey,
    },
}

enum Private {
    Rsa(RsaKeyPair, &'static dyn RsaEncoding),
    Ecdsa(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

impl Private {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, aws_lc_rs::error::Unspecified> {
        let random = SystemRandom::new();
        match self {
            Private::Rsa(pair, encoding) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(*encoding, &random, message, &mut signature)?;
                Ok(signature)
            }
            Private::Ecdsa(pair) => Ok(pair.sign(&random, message)?.as_ref().to_vec()),
            Private::Ed25519(pair) => Ok(pair.sign(message).as_ref().to_vec()),
        }
    }

    /// The public half, in a form that [`ParsedPublicKey::new`] reads.
    fn public(&self) -> &[u8] {
        match self {
            Private::Rsa(pair, _) => pair.public_key().as_ref(),
            Private::Ecdsa(pair) => pair.public_key().as_ref(),
            Private::Ed25519(pair) => pair.public_key().as_ref(),
        }
    }
}

/// Signs and verifies tokens.
pub struct Jwt {
    sign_method: String,
    key: Key,
    ttl: Duration,
    /// Tokens whose signature was found right.
    verified: Cache<Box<str>, Claims>,
}

impl fmt::Debug for Jwt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jwt")
            .field("sign_method", &self.sign_method)
            .field("ttl", &self.ttl)
            .finish_non_exhaustive()
    }
}

#[derive(Serialize, Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    typ: serde_json::Value,
}

impl Jwt {
    /// Reads the keys.
    ///
    /// # Errors
    /// No such algorithm, no such files, or keys that do not fit.
    pub fn new(options: &JwtOptions) -> Result<Self, JwtError> {
        let method = Method::named(&options.sign_method)
            .ok_or_else(|| JwtError::Options(format!("unknown sign-method {:?}", options.sign_method)))?;
        let read = |file: &Option<PathBuf>| -> Result<Option<KeyFile>, JwtError> {
            let Some(path) = file else { return Ok(None) };
            let file = path.display().to_string();
            match std::fs::read(path) {
                Ok(content) => Ok(Some(KeyFile { file, content })),
                Err(error) => Err(JwtError::Options(format!("{file}: {error}"))),
            }
        };
        let (public, private) = (read(&options.public_key)?, read(&options.private_key)?);
        // An empty file is no key, as in etcd.
        let filled = |key: Option<KeyFile>| key.filter(|key| !key.content.is_empty());
        let key = load_key(&method, filled(public), filled(private))?;
        Ok(Jwt {
            sign_method: options.sign_method.clone(),
            key,
            ttl: options.ttl,
            verified: Cache::new(REMEMBERED_MAX),
        })
    }

    /// A token for a user; `None` if this member only verifies.
    pub(crate) fn sign(&self, username: &str, revision: u64) -> Option<String> {
        let expires_s = (now_s() + self.ttl.as_secs_f64()) as u64;
        let header = serde_json::json!({ "alg": self.sign_method, "typ": "JWT" });
        let claims = serde_json::json!({ "exp": expires_s, "revision": revision, "username": username });
        let mut token = BASE64_URL_SAFE_NO_PAD.encode(header.to_string());
        token.push('.');
        BASE64_URL_SAFE_NO_PAD.encode_string(claims.to_string(), &mut token);
        let signature = match &self.key {
            Key::Hmac(key) => hmac::sign(key, token.as_bytes()).as_ref().to_vec(),
            Key::Pair { private, .. } => private
                .as_ref()?
                .sign(token.as_bytes())
                .expect("a key that was read can sign, and there is randomness"),
        };
        token.push('.');
        BASE64_URL_SAFE_NO_PAD.encode_string(signature, &mut token);
        Some(token)
    }

    /// What a token says, if it counts.
    pub(crate) fn verify(&self, token: &str) -> Result<Claims, TokenError> {
        self.verify_at(token, now_s())
    }

    fn verify_at(&self, token: &str, now_s: f64) -> Result<Claims, TokenError> {
        let claims = match self.verified.get(token) {
            Some(claims) => claims,
            None => {
                let claims = self.verify_anew(token)?;
                if token.len() <= REMEMBERED_BYTES_MAX {
                    self.verified.insert(token.into(), claims.clone());
                }
                claims
            }
        };
        if claims.expires_s.is_some_and(|expires_s| now_s >= expires_s) {
            return Err(TokenError::Expired);
        }
        if claims.begins_s.is_some_and(|begins_s| now_s < begins_s) {
            return Err(TokenError::TooEarly);
        }
        Ok(claims)
    }

    fn verify_anew(&self, token: &str) -> Result<Claims, TokenError> {
        let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::Form)?;
        let (header, claims) = signed.split_once('.').ok_or(TokenError::Form)?;
        let decode = |part: &str| BASE64_URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Form);
        let header: Header = serde_json::from_slice(&decode(header)?).map_err(|_| TokenError::Form)?;
        if header.alg != self.sign_method {
            return Err(TokenError::Algorithm);
        }
        let signature = decode(signature)?;
        let is_right = match &self.key {
            Key::Hmac(key) => hmac::verify(key, signed.as_bytes(), &signature).is_ok(),
            Key::Pair { public, .. } => public.verify_sig(signed.as_bytes(), &signature).is_ok(),
        };
        if !is_right {
            return Err(TokenError::Signature);
        }
        let claims: serde_json::Value = serde_json::from_slice(&decode(claims)?).map_err(|_| TokenError::Form)?;
        // A time that is there and is none is not passed over.
        let time = |name| match claims.get(name) {
            None => Ok(None),
            Some(time) => time.as_f64().map(Some).ok_or(TokenError::Claims),
        };
        let username = claims.get("username").and_then(|name| name.as_str());
        let revision = claims.get("revision").and_then(|revision| match revision.as_u64() {
            Some(revision) => Some(revision),
            // JSON has one kind of number.
            None => revision
                .as_f64()
                .filter(|revision| *revision >= 0.0)
                .map(|revision| revision as u64),
        });
        Ok(Claims {
            username: username.ok_or(TokenError::Claims)?.into(),
            revision: revision.ok_or(TokenError::Claims)?,
            expires_s: time("exp")?,
            begins_s: time("nbf")?,
        })
    }
}

/// Takes bytes for a token, and, signed rightly, for the two parts of one.
///
/// # Panics
/// If a token counts whose signature is not ours, or says another thing the second time, when it is remembered.
pub(super) fn fuzz(data: &[u8]) {
    static JWT: std::sync::OnceLock<Jwt> = std::sync::OnceLock::new();
    let jwt = JWT.get_or_init(|| Jwt {
        sign_method: "HS256".to_owned(),
        key: Key::Hmac(hmac::Key::new(hmac::HMAC_SHA256, b"secret")),
        ttl: Duration::from_secs(300),
        verified: Cache::new(REMEMBERED_MAX),
    });
    let Key::Hmac(key) = &jwt.key else { return };
    let signature_of = |signed: &str| BASE64_URL_SAFE_NO_PAD.encode(hmac::sign(key, signed.as_bytes()));
    let check = |token: &str| {
        let said = jwt.verify_at(token, 1e9);
        assert_eq!(jwt.verify_at(token, 1e9), said, "{token}");
        if said.is_ok() {
            let (signed, signature) = token.rsplit_once('.').expect("it has parts");
            assert_eq!(signature, signature_of(signed), "{token}");
        }
        said
    };
    if let Ok(token) = std::str::from_utf8(data) {
        // Nobody finds a signature by chance.
        assert!(check(token).is_err(), "{token}");
    }
    let (header, claims) = match data.iter().position(|byte| *byte == 0) {
        Some(end) => (&data[..end], &data[end + 1..]),
        None => (&br#"{"alg":"HS256"}"#[..], data),
    };
    let mut token = BASE64_URL_SAFE_NO_PAD.encode(header);
    token.push('.');
    BASE64_URL_SAFE_NO_PAD.encode_string(claims, &mut token);
    token = format!("{token}.{}", signature_of(&token));
    match check(&token) {
        Ok(_) => assert!(serde_json::from_slice::<serde_json::Value>(claims).is_ok()),
        Err(error) => assert_ne!(error, TokenError::Signature, "{token}"),
    }
}

fn now_s() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |time| time.as_secs_f64())
}

struct KeyFile {
    file: String,
    content: Vec<u8>,
}

impl KeyFile {
    fn bad(&self, cause: impl fmt::Display) -> JwtError {
        JwtError::BadKey {
            file: self.file.clone(),
            cause: cause.to_string(),
        }
    }

    /// The first block of a PEM file, whatever it is called.
    fn der(&self) -> Result<Vec<u8>, JwtError> {
        let (_, pem) = x509_parser::pem::parse_x509_pem(&self.content)
            .map_err(|_| self.bad("invalid key: Key must be a PEM encoded PKCS1 or PKCS8 key"))?;
        Ok(pem.contents)
    }

    /// A public key, or that of a certificate.
    fn public(&self) -> Result<Vec<u8>, JwtError> {
        let der = self.der()?;
        Ok(match x509_parser::parse_x509_certificate(&der) {
            Ok((_, certificate)) => certificate.tbs_certificate.subject_pki.raw.to_vec(),
            Err(_) => der,
        })
    }
}

fn load_key(method: &Method, public: Option<KeyFile>, private: Option<KeyFile>) -> Result<Key, JwtError> {
    let verification: &'static dyn VerificationAlgorithm = match method {
        Method::Hmac(algorithm) => {
            let secret = private.ok_or(JwtError::MissingKey)?;
            return Ok(Key::Hmac(hmac::Key::new(*algorithm, &secret.content)));
        }
        Method::Rsa(_, verification) => *verification,
        Method::Ecdsa(_, verification) => *verification,
        Method::Ed25519 => &signature::ED25519,
    };
    let private = match private {
        None => None,
        Some(file) => {
            let der = file.der()?;
            let bad = |error| file.bad(error);
            Some(match method {
                Method::Rsa(encoding, _) => {
                    let pair = RsaKeyPair::from_der(&der).or_else(|_| RsaKeyPair::from_pkcs8(&der));
                    Private::Rsa(pair.map_err(bad)?, *encoding)
                }
                Method::Ecdsa(algorithm, _) => {
                    let pair = EcdsaKeyPair::from_private_key_der(algorithm, &der)
                        .or_else(|_| EcdsaKeyPair::from_pkcs8(algorithm, &der));
                    Private::Ecdsa(pair.map_err(bad)?)
                }
                Method::Ed25519 => Private::Ed25519(Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der).map_err(bad)?),
                Method::Hmac(_) => unreachable!("it has no pair"),
            })
        }
    };
    let public = match &public {
        None => None,
        Some(file) => {
            let public = ParsedPublicKey::new(verification, file.public()?);
            Some(public.map_err(|error| file.bad(error))?)
        }
    };
    let public = match (public, &private) {
        (None, None) => return Err(JwtError::MissingKey),
        (Some(public), None) => public,
        (given, Some(private)) => {
            let own = ParsedPublicKey::new(verification, private.public())
                .map_err(|error| JwtError::Options(format!("the private key has no public one: {error}")))?;
            // Whether the two belong together shows in use.
            let message = b"metastore";
            let signature = private
                .sign(message)
                .map_err(|error| JwtError::Options(format!("the private key does not sign: {error}")))?;
            let public = given.unwrap_or(own);
            public
                .verify_sig(message, &signature)
                .map_err(|_| JwtError::KeyMismatch)?;
            public
        }
    };
    Ok(Key::Pair { private, public })
}

#[cfg(test)]
mod tests;
