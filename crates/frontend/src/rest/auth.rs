//! Who asks: `Authorization: Basic` and `Authorization: Bearer`, by the same users and roles as everywhere.

use std::sync::Arc;

use api::auth::AuthenticateRequest;
use api::{Credentials, Error, Store};
use axum::response::Response;
use http::HeaderMap;
use http::header::AUTHORIZATION;

use super::json::TokenBody;
use super::problem::{Problem, UNAUTHENTICATED};
use super::{Call, body, json_response};

/// What a request says of who makes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Authorization {
    None,
    /// A token that the store gave out.
    Bearer(Arc<str>),
    /// A user and its password.
    Basic {
        user: String,
        password: String,
    },
}

impl Authorization {
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        use base64::Engine as _;
        let wrong = |detail: &str| Problem::header("authorization", detail);
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let Some(value) = values.next() else {
            return Ok(Authorization::None);
        };
        if values.next().is_some() {
            return Err(wrong("Authorization is given more than once"));
        }
        let value = value.to_str().map_err(|_| wrong("it is not text"))?;
        let (scheme, rest) = value.split_once(' ').unwrap_or((value, ""));
        let rest = rest.trim();
        if scheme.eq_ignore_ascii_case("bearer") && !rest.is_empty() {
            return Ok(Authorization::Bearer(rest.into()));
        }
        if scheme.eq_ignore_ascii_case("basic") {
            let decoded = base64::engine::general_purpose::STANDARD
                .decode(rest)
                .map_err(|_| wrong("what follows Basic is not base64"))?;
            let decoded = String::from_utf8(decoded).map_err(|_| wrong("user and password are not UTF-8 text"))?;
            let (user, password) = decoded
                .split_once(':')
                .ok_or_else(|| wrong("there is no colon between user and password"))?;
            return Ok(Authorization::Basic {
                user: user.to_owned(),
                password: password.to_owned(),
            });
        }
        Err(wrong("it is Basic with user and password, or Bearer with a token"))
    }

    /// The store, acting for whoever it is.
    ///
    /// # Errors
    /// Those of a password that is wrong; what a token is worth shows when it is used.
    pub(super) async fn act<S: Store>(self, store: &S, certificate: Option<Arc<str>>) -> Result<S, Error> {
        let token = match self {
            Authorization::Basic { user, password } => {
                return store.on_behalf_of_user(request(user, password)).await;
            }
            Authorization::Bearer(token) => Some(token),
            Authorization::None => None,
        };
        Ok(store.on_behalf_of(Credentials {
            token,
            common_name: certificate,
        }))
    }
}

fn request(user: String, password: String) -> AuthenticateRequest {
    AuthenticateRequest { name: user, password }
}

pub(super) async fn token<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    body::none(&call.headers, call.body).await?;
    let Authorization::Basic { user, password } = Authorization::of(&call.headers)? else {
        return Err(Problem::new(
            UNAUTHENTICATED,
            "a token is given for a user and its password (Basic)",
        ));
    };
    let given = call.store.authenticate(request(user, password)).await?;
    Ok(json_response(&TokenBody { token: given.token }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn of(value: &str) -> Result<Authorization, Problem> {
        let value = HeaderValue::from_str(value).expect("it fits");
        Authorization::of(&HeaderMap::from_iter([(AUTHORIZATION, value)]))
    }

    #[test]
    fn both_schemes_are_read() {
        assert_eq!(of("Bearer abc.1").ok(), Some(Authorization::Bearer("abc.1".into())));
        assert_eq!(of("bearer  abc.1").ok(), Some(Authorization::Bearer("abc.1".into())));
        let basic = |user: &str, password: &str| Authorization::Basic {
            user: user.to_owned(),
            password: password.to_owned(),
        };
        // RFC 7617's own examples.
        assert_eq!(
            of("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==").ok(),
            Some(basic("Aladdin", "open sesame"))
        );
        assert_eq!(of("Basic dGVzdDoxMjPCow==").ok(), Some(basic("test", "123£")));
        assert_eq!(Authorization::of(&HeaderMap::new()).ok(), Some(Authorization::None));
        for wrong in [
            "Basic",
            "Basic !",
            "Basic QWxhZGRpbg==",
            "Basic /w==",
            "Bearer",
            "Digest x",
            "abc.1",
        ] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}
