//! What a request says of who makes it, the same for every protocol.

use std::sync::Arc;

use api::credentials::Credentials;
use http::header::AUTHORIZATION;
use http::{HeaderMap, Request};

/// The common name of the certificate that a connection's client showed: an extension of every request on it.
#[derive(Debug, Clone)]
pub struct ClientCertificate {
    /// Verified, see [`Credentials::common_name`].
    pub common_name: Arc<str>,
}

/// What a request says of who makes it. The token is in the header `token`, or else in `authorization`, with or without
/// the scheme Bearer, as etcd reads it.
pub(crate) fn of<B>(request: &Request<B>) -> Credentials {
    let certificate = request.extensions().get::<ClientCertificate>();
    Credentials {
        token: token(request.headers()),
        common_name: certificate.map(|certificate| certificate.common_name.clone()),
    }
}

fn token(headers: &HeaderMap) -> Option<Arc<str>> {
    let value = headers.get("token").or_else(|| headers.get(AUTHORIZATION))?;
    let value = value.to_str().ok()?;
    let value = match value.split_at_checked("Bearer ".len()) {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("Bearer ") => rest,
        _ => value,
    };
    Some(value.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_in_three_forms() {
        for (name, value, token) in [
            ("token", "abc.1", "abc.1"),
            ("authorization", "abc.1", "abc.1"),
            ("authorization", "Bearer abc.1", "abc.1"),
            ("authorization", "bearer abc.1", "abc.1"),
        ] {
            let request = Request::builder()
                .header(name, value)
                .body(())
                .expect("it is well formed");
            assert_eq!(of(&request).token.as_deref(), Some(token));
        }
        assert!(of(&Request::new(())).is_empty());
    }
}
