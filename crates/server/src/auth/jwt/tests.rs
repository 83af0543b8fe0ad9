use aws_lc_rs::encoding::{AsDer, EcPrivateKeyRfc5915Der, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, ECDSA_P521_SHA512_FIXED_SIGNING,
};
use base64::prelude::BASE64_STANDARD;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

fn pem(label: &str, der: &[u8]) -> String {
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in BASE64_STANDARD.encode(der).as_bytes().chunks(64) {
        text.push_str(std::str::from_utf8(line).unwrap());
        text.push('\n');
    }
    text + &format!("-----END {label}-----\n")
}

/// A pair of keys in each of the forms that etcd reads: public, and the private ones.
fn keys(sign_method: &str) -> (String, Vec<String>) {
    let pkcs8 = |der: &[u8]| pem("PRIVATE KEY", der);
    let public = |der: &[u8]| pem("PUBLIC KEY", der);
    match &sign_method[..2] {
        "RS" | "PS" => {
            let pair = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
            let private = AsDer::<Pkcs8V1Der<'_>>::as_der(&pair).unwrap();
            let spki = AsDer::<PublicKeyX509Der<'_>>::as_der(pair.public_key()).unwrap();
            (public(spki.as_ref()), vec![pkcs8(private.as_ref())])
        }
        "ES" => {
            let algorithm = match sign_method {
                "ES256" => &ECDSA_P256_SHA256_FIXED_SIGNING,
                "ES384" => &ECDSA_P384_SHA384_FIXED_SIGNING,
                _ => &ECDSA_P521_SHA512_FIXED_SIGNING,
            };
            let pair = EcdsaKeyPair::generate(algorithm).unwrap();
            let sec1 = AsDer::<EcPrivateKeyRfc5915Der<'_>>::as_der(&pair.private_key()).unwrap();
            let spki = AsDer::<PublicKeyX509Der<'_>>::as_der(pair.public_key()).unwrap();
            let private = vec![
                pem("EC PRIVATE KEY", sec1.as_ref()),
                pkcs8(pair.to_pkcs8v1().unwrap().as_ref()),
            ];
            (public(spki.as_ref()), private)
        }
        _ => {
            let pair = Ed25519KeyPair::generate().unwrap();
            let spki = AsDer::<PublicKeyX509Der<'_>>::as_der(pair.public_key()).unwrap();
            (public(spki.as_ref()), vec![pkcs8(pair.to_pkcs8v1().unwrap().as_ref())])
        }
    }
}

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Files(TempDir::new().unwrap())
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> Option<PathBuf> {
        let path = self.0.path().join(name);
        std::fs::write(&path, content).unwrap();
        Some(path)
    }
}

fn jwt(sign_method: &str, public_key: Option<PathBuf>, private_key: Option<PathBuf>) -> Result<Jwt, JwtError> {
    Jwt::new(&JwtOptions {
        sign_method: sign_method.to_owned(),
        public_key,
        private_key,
        ttl: Duration::from_secs(300),
    })
}

fn hmac_jwt(secret: &str) -> Jwt {
    let files = Files::new();
    jwt("HS256", None, files.write("secret", secret)).unwrap()
}

/// Signs claims of our own making.
fn signed(jwt: &Jwt, header: &str, claims: &str) -> String {
    let encode = |text: &str| BASE64_URL_SAFE_NO_PAD.encode(text);
    let signed = format!("{}.{}", encode(header), encode(claims));
    let Key::Hmac(key) = &jwt.key else { panic!("no secret") };
    let signature = BASE64_URL_SAFE_NO_PAD.encode(hmac::sign(key, signed.as_bytes()));
    format!("{signed}.{signature}")
}

const HEADER: &str = r#"{"alg":"HS256","typ":"JWT"}"#;

#[test]
fn every_algorithm_signs_and_verifies() {
    let files = Files::new();
    for method in [
        "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
    ] {
        let (public, privates) = keys(method);
        let public = files.write("public", public);
        let (other_public, other_privates) = keys(method);
        let other_public = files.write("other-public", other_public);
        let verifier = jwt(method, public.clone(), None).unwrap();
        assert_eq!(verifier.sign("ann", 7), None, "{method}");
        for private in privates {
            let private = files.write("private", private);
            let signer = jwt(method, None, private.clone()).unwrap();
            let token = signer.sign("ann", 7).unwrap();
            for jwt in [
                &signer,
                &verifier,
                &jwt(method, public.clone(), private.clone()).unwrap(),
            ] {
                for _ in 0..2 {
                    let claims = jwt.verify(&token).unwrap();
                    assert_eq!((&*claims.username, claims.revision), ("ann", 7), "{method}");
                }
            }
            let other = jwt(method, None, files.write("other", &other_privates[0])).unwrap();
            assert_eq!(other.verify(&token), Err(TokenError::Signature), "{method}");
            let mismatch = jwt(method, other_public.clone(), private).err();
            assert_eq!(mismatch, Some(JwtError::KeyMismatch), "{method}");
        }
    }
    for method in ["HS256", "HS384", "HS512"] {
        let jwt = jwt(method, None, files.write("secret", "secret")).unwrap();
        assert_eq!(jwt.verify(&jwt.sign("ann", 7).unwrap()).unwrap().revision, 7);
    }
}

#[test]
fn what_makes_no_keys_is_refused() {
    let files = Files::new();
    let error = |method, public, private| jwt(method, public, private).unwrap_err().to_string();
    for method in ["", "none", "XS256", "HS255"] {
        assert!(
            error(method, None, None).starts_with("auth: invalid auth options"),
            "{method}"
        );
    }
    for method in ["HS256", "RS256", "PS256", "ES512", "EdDSA"] {
        assert_eq!(error(method, None, None), "auth: missing key data", "{method}");
        let empty = files.write("empty", "");
        assert_eq!(error(method, None, empty), "auth: missing key data", "{method}");
        let absent = Some(files.0.path().join("absent"));
        assert!(
            error(method, None, absent).starts_with("auth: invalid auth options"),
            "{method}"
        );
    }
    let (public, private) = keys("ES256");
    let (public, private) = (files.write("public", public), files.write("private", &private[0]));
    for method in ["RS256", "ES384", "EdDSA"] {
        assert!(error(method, public.clone(), None).contains("public"), "{method}");
        assert!(error(method, None, private.clone()).contains("private"), "{method}");
    }
    let garbage = files.write(
        "garbage",
        "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    );
    assert!(error("ES256", None, garbage).contains("garbage"));
}

#[test]
fn tokens_that_do_not_count_are_refused() {
    let jwt = hmac_jwt("secret");
    let claims = |expires: &str| format!(r#"{{"username":"ann","revision":3{expires}}}"#);
    let at_100 = |token: &str| jwt.verify_at(token, 100.0).map(|claims| claims.revision);
    let ours = |claims: &str| signed(&jwt, HEADER, claims);

    assert_eq!(at_100(&ours(&claims(""))), Ok(3), "without an end");
    assert_eq!(at_100(&ours(&claims(r#","exp":101"#))), Ok(3));
    assert_eq!(at_100(&ours(&claims(r#","exp":100"#))), Err(TokenError::Expired));
    assert_eq!(at_100(&ours(&claims(r#","exp":100.5,"nbf":99.5"#))), Ok(3));
    assert_eq!(at_100(&ours(&claims(r#","nbf":101"#))), Err(TokenError::TooEarly));
    assert_eq!(at_100(&ours(&claims(r#","exp":"never""#))), Err(TokenError::Claims));
    assert_eq!(at_100(&ours(r#"{"username":"ann","revision":3.0}"#)), Ok(3));
    for wrong in [
        r#"{"username":"ann"}"#,
        r#"{"revision":3}"#,
        r#"{"username":7,"revision":3}"#,
        r#"{"username":"ann","revision":-3}"#,
        r#"{"username":"ann","revision":"3"}"#,
        "[]",
    ] {
        assert_eq!(at_100(&ours(wrong)), Err(TokenError::Claims), "{wrong}");
    }
    // The end counts for tokens that are remembered, too.
    let token = ours(&claims(r#","exp":200"#));
    assert_eq!(at_100(&token), Ok(3));
    assert_eq!(jwt.verify_at(&token, 200.0), Err(TokenError::Expired));

    let none = signed(&jwt, r#"{"alg":"none"}"#, &claims(""));
    assert_eq!(at_100(&none), Err(TokenError::Algorithm));
    let unsigned = format!("{}.", none.rsplit_once('.').unwrap().0);
    assert_eq!(at_100(&unsigned), Err(TokenError::Algorithm));
    let unsigned = format!("{}.", ours(&claims("")).rsplit_once('.').unwrap().0);
    assert_eq!(at_100(&unsigned), Err(TokenError::Signature));
    assert_eq!(
        at_100(&signed(&hmac_jwt("other"), HEADER, &claims(""))),
        Err(TokenError::Signature)
    );
    assert_eq!(at_100(&format!("{token}.")), Err(TokenError::Signature));
    for wrong in ["", ".", "..", "a.b.c", "aaaa.bbbb", &format!("x.{token}")] {
        assert_eq!(at_100(wrong), Err(TokenError::Form), "{wrong}");
    }
    let mut altered = token.clone().into_bytes();
    for at in 0..altered.len() {
        let byte = altered[at];
        altered[at] = if byte == b'A' { b'B' } else { b'A' };
        // The last letter of a part may hold bits that say nothing, which base64 then refuses.
        assert!(at_100(std::str::from_utf8(&altered).unwrap()).is_err(), "byte {at}");
        altered[at] = byte;
    }
}

/// The public key of one algorithm is no secret of another.
#[test]
fn algorithms_are_not_confused() {
    let files = Files::new();
    let (public, _) = keys("RS256");
    let verifier = jwt("RS256", files.write("public", &public), None).unwrap();
    let forged = signed(&hmac_jwt(&public), HEADER, r#"{"username":"root","revision":1}"#);
    assert_eq!(verifier.verify(&forged), Err(TokenError::Algorithm));
}

proptest! {
    #[test]
    fn garbage_is_refused(token in ".{0,200}", parts in prop::collection::vec("[A-Za-z0-9_-]{0,40}", 0..5)) {
        let jwt = hmac_jwt("secret");
        prop_assert!(jwt.verify(&token).is_err());
        prop_assert!(jwt.verify(&parts.join(".")).is_err());
    }

    #[test]
    fn garbage_in_its_place_is_refused(header in ".{0,60}", claims in ".{0,60}") {
        let jwt = hmac_jwt("secret");
        let _ = jwt.verify(&signed(&jwt, &header, &claims));
        let _ = jwt.verify(&signed(&jwt, HEADER, &claims));
    }

    /// What the fuzz target checks, on what becomes of a right one by chance.
    #[test]
    fn damaged_tokens_do_not_count(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        end in any::<prop::sample::Index>(),
    ) {
        let mut data = b"{\"alg\":\"HS256\",\"typ\":\"JWT\"}\0{\"exp\":2e9,\"nbf\":1,\"revision\":5,\"username\":\"ann\"}".to_vec();
        for (at, byte) in damage {
            let at = at.index(data.len());
            data[at] = byte;
        }
        fuzz(&data);
        fuzz(&data[..end.index(data.len())]);
    }
}

/// What the fuzz target checks.
#[test]
fn what_is_no_token_does_not_count() {
    for data in [
        &b""[..],
        b".",
        b"..",
        b"eyJhbGciOiJIUzI1NiJ9.e30.",
        b"{\"alg\":\"none\"}\0{\"username\":\"root\",\"revision\":1}",
        b"{\"alg\":\"HS256\",\"typ\":7}\0{\"username\":\"root\",\"revision\":1}",
        b"{\"username\":\"root\",\"revision\":1}",
        b"{\"username\":\"root\",\"revision\":-1}",
        b"{\"username\":\"root\",\"revision\":1e30,\"exp\":1e300,\"nbf\":-1e300}",
        b"{\"username\":\"\",\"revision\":1.5,\"exp\":\"soon\"}",
        b"[[[[",
        b"\xff\0\xff",
    ] {
        fuzz(data);
    }
}
