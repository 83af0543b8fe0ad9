//! How users log in: from flags to options, with etcd's checks.

use std::collections::BTreeMap;
use std::time::Duration;

use server::JwtOptions;
use server::auth::{BCRYPT_COST_DEFAULT, BCRYPT_COST_MAX, BCRYPT_COST_MIN};

use crate::flags::{Failure, Note, Settings, parse_duration};

/// How long a simple token counts without being used, unless something else is asked for (etcd).
const SIMPLE_TTL: Duration = Duration::from_secs(300);
/// How long a signed token counts, unless something else is asked for (etcd's `DefaultTTL`).
const JWT_TTL: Duration = Duration::from_secs(300);
/// The options of `--auth-token=jwt`.
const JWT_OPTIONS: [&str; 4] = ["sign-method", "pub-key", "priv-key", "ttl"];

/// How users log in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthConfig {
    /// What tokens are.
    pub tokens: TokenConfig,
    /// The cost of hashing a password.
    pub bcrypt_cost: u32,
}

/// What tokens are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenConfig {
    /// Random.
    Simple {
        /// How long one counts without being used.
        ttl: Duration,
    },
    /// Signed.
    Jwt(JwtOptions),
    /// There are none.
    None,
}

impl AuthConfig {
    /// Checks the settings; reads no key.
    pub(super) fn from_settings(settings: &Settings, notes: &mut Vec<Note>) -> Result<AuthConfig, Failure> {
        let cost = settings.number("bcrypt-cost");
        let valid = i128::from(BCRYPT_COST_MIN)..=i128::from(BCRYPT_COST_MAX);
        let bcrypt_cost = if valid.contains(&cost) {
            u32::try_from(cost).expect("it is small")
        } else {
            let message = format!(
                "use default bcrypt cost {BCRYPT_COST_DEFAULT} instead of the invalid given cost {cost}: it must be from {BCRYPT_COST_MIN} to {BCRYPT_COST_MAX}"
            );
            notes.push(Note { warning: true, message });
            BCRYPT_COST_DEFAULT
        };
        let simple_ttl = match settings.number("auth-token-ttl") {
            0 => SIMPLE_TTL,
            seconds => Duration::from_secs(u64::try_from(seconds).unwrap_or(u64::MAX)),
        };
        Ok(AuthConfig {
            tokens: tokens(settings.text("auth-token"), simple_ttl, notes)?,
            bcrypt_cost,
        })
    }
}

fn tokens(text: &str, simple_ttl: Duration, notes: &mut Vec<Note>) -> Result<TokenConfig, Failure> {
    let invalid = |cause: String| Failure::config(format!("auth: invalid auth options: --auth-token: {cause}"));
    let mut parts = text.split(',');
    let kind = parts.next().unwrap_or_default();
    let mut options = BTreeMap::new();
    for part in parts {
        let (name, value) = part
            .split_once('=')
            .filter(|(_, value)| !value.contains('='))
            .ok_or_else(|| invalid(format!("{part:?} is not name=value")))?;
        if options.insert(name, value).is_some() {
            return Err(invalid(format!("{name:?} comes twice")));
        }
    }
    match kind {
        "simple" => Ok(TokenConfig::Simple { ttl: simple_ttl }),
        "" => Ok(TokenConfig::None),
        "jwt" => {
            let unknown: Vec<_> = options.keys().filter(|name| !JWT_OPTIONS.contains(name)).collect();
            if !unknown.is_empty() {
                let message = format!("unknown JWT options {unknown:?} in --auth-token");
                notes.push(Note { warning: true, message });
            }
            let given = |name| options.get(name).copied().filter(|value| !value.is_empty());
            let ttl = match given("ttl") {
                None => JWT_TTL,
                Some(text) => {
                    let ttl = parse_duration(text).map_err(|error| invalid(format!("ttl {error}")))?;
                    let ttl = u64::try_from(ttl).map_err(|_| invalid("ttl must not be negative".to_owned()))?;
                    Duration::from_nanos(ttl)
                }
            };
            Ok(TokenConfig::Jwt(JwtOptions {
                sign_method: given("sign-method")
                    .ok_or_else(|| invalid("sign-method is missing".to_owned()))?
                    .to_owned(),
                public_key: given("pub-key").map(Into::into),
                private_key: given("priv-key").map(Into::into),
                ttl,
            }))
        }
        other => Err(invalid(format!("{other:?} is neither simple nor jwt"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(TokenConfig, usize), String> {
        let mut notes = Vec::new();
        let tokens = tokens(text, SIMPLE_TTL, &mut notes).map_err(|failure| failure.message)?;
        Ok((tokens, notes.len()))
    }

    #[test]
    fn token_options_are_read_as_etcd_reads_them() {
        assert_eq!(parse("simple"), Ok((TokenConfig::Simple { ttl: SIMPLE_TTL }, 0)));
        assert_eq!(parse(""), Ok((TokenConfig::None, 0)));
        let jwt = JwtOptions {
            sign_method: "RS256".to_owned(),
            public_key: Some("a.pub".into()),
            private_key: None,
            ttl: Duration::from_secs(600),
        };
        let text = "jwt,pub-key=a.pub,priv-key=,sign-method=RS256,ttl=10m";
        assert_eq!(parse(text), Ok((TokenConfig::Jwt(jwt.clone()), 0)));
        let text = "jwt,pub-key=a.pub,sign-method=RS256,ttl=10m,what=1";
        assert_eq!(parse(text), Ok((TokenConfig::Jwt(jwt), 1)));
        for wrong in [
            "other",
            "simple,x",
            "jwt,pub-key",
            "jwt,a=b=c",
            "jwt,ttl=1m,ttl=1m",
            "jwt,ttl=x,sign-method=RS256",
            "jwt,ttl=-1s,sign-method=RS256",
            "jwt,pub-key=a",
        ] {
            let error = parse(wrong).expect_err(wrong);
            assert!(error.starts_with("auth: invalid auth options"), "{wrong}: {error}");
        }
    }
}
