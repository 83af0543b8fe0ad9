//! Who a client is: passwords, tokens, certificates.
//!
//! What a user may do is the state machine's to say (`mvcc::auth`); here is what a client can show to be that user.
//! Tokens are of one of two kinds. Simple ones go through the log, so that every member knows them, and are remembered
//! for a while (`tokens`). Signed ones say everything themselves (`jwt`).

pub mod jwt;
mod passwords;
mod tokens;

use std::sync::Arc;
use std::time::Duration;

use api::{Error, RaftIndex};
use mvcc::{AuthChange, Caller};

pub use jwt::{Jwt, JwtError, JwtOptions};
pub(crate) use passwords::Passwords;
pub(crate) use tokens::Tokens;

/// The lowest cost of hashing a password (`--bcrypt-cost`).
pub const BCRYPT_COST_MIN: u32 = 4;
/// The highest one; each is twice that of the one before.
pub const BCRYPT_COST_MAX: u32 = 31;
/// The default one: about 50 ms.
pub const BCRYPT_COST_DEFAULT: u32 = 10;

/// What the fuzz target for tokens does: see [`jwt`].
///
/// # Panics
/// If a token counts that should not.
#[doc(hidden)]
pub fn fuzz_token(data: &[u8]) {
    jwt::fuzz(data);
    if let Ok(token) = std::str::from_utf8(data) {
        let _ = tokens::entry_of(token);
        let tokens = Tokens::new(Duration::from_secs(300), 0);
        assert_eq!(tokens.user(token), None);
    }
}

/// How users log in.
#[derive(Debug, Clone)]
pub struct AuthConfig {
    /// `--auth-token`.
    pub tokens: TokenKind,
    /// `--bcrypt-cost`: from [`BCRYPT_COST_MIN`] to [`BCRYPT_COST_MAX`].
    pub bcrypt_cost: u32,
}

impl Default for AuthConfig {
    fn default() -> Self {
        AuthConfig {
            tokens: TokenKind::Simple {
                ttl: Duration::from_secs(300),
            },
            bcrypt_cost: BCRYPT_COST_DEFAULT,
        }
    }
}

/// What tokens are.
#[derive(Debug, Clone)]
pub enum TokenKind {
    /// Random, remembered by all members until they were not used for a while.
    Simple {
        /// How long (`--auth-token-ttl`).
        ttl: Duration,
    },
    /// Signed.
    Jwt(Arc<Jwt>),
    /// There are none; users log in by certificate.
    None,
}

/// Who a client turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Who {
    /// Empty for nobody.
    pub(crate) name: Arc<str>,
    /// The auth revision at which that was so; 0 for nobody.
    pub(crate) revision: u64,
}

impl Who {
    pub(crate) fn nobody() -> Self {
        Who {
            name: "".into(),
            revision: 0,
        }
    }

    pub(crate) fn is_nobody(&self) -> bool {
        self.name.is_empty() && self.revision == 0
    }

    pub(crate) fn caller(&self) -> Caller<'_> {
        Caller {
            name: &self.name,
            revision: self.revision,
        }
    }
}

/// What a node needs to find out who its clients are.
pub(crate) struct Gate {
    pub(crate) passwords: Passwords,
    kind: Kind,
}

enum Kind {
    Simple(Tokens),
    Jwt(Arc<Jwt>),
    None,
}

impl Gate {
    /// Tokens of log entries up to `replayed` were given out before this start, and are not taken up again.
    pub(crate) fn new(config: &AuthConfig, replayed: RaftIndex) -> Self {
        Gate {
            passwords: Passwords::new(config.bcrypt_cost),
            kind: match &config.tokens {
                TokenKind::Simple { ttl } => Kind::Simple(Tokens::new(*ttl, replayed)),
                TokenKind::Jwt(jwt) => Kind::Jwt(jwt.clone()),
                TokenKind::None => Kind::None,
            },
        }
    }

    /// The user that a token stands for. `revision` is the store's, as of before the call.
    pub(crate) fn who(&self, token: &str, revision: u64) -> Result<Who, Error> {
        match &self.kind {
            Kind::Simple(tokens) => {
                let name = tokens.user(token).ok_or(Error::InvalidAuthToken)?;
                Ok(Who { name, revision })
            }
            Kind::Jwt(jwt) => {
                let claims = jwt.verify(token).map_err(|error| {
                    tracing::debug!(%error, "a token is refused");
                    Error::InvalidAuthToken
                })?;
                Ok(Who {
                    name: claims.username,
                    revision: claims.revision,
                })
            }
            Kind::None => Err(Error::InvalidAuthToken),
        }
    }

    /// The log entry without which this member cannot know the token, if it is of that kind.
    pub(crate) fn entry_of(&self, token: &str) -> Option<RaftIndex> {
        match &self.kind {
            Kind::Simple(_) => tokens::entry_of(token),
            Kind::Jwt(_) | Kind::None => None,
        }
    }

    /// How to give a token to a user whose password was checked.
    pub(crate) fn issuer(&self) -> Issuer<'_> {
        match &self.kind {
            Kind::Simple(_) => Issuer::Log(tokens::random_prefix()),
            Kind::Jwt(jwt) => Issuer::Sign(jwt),
            Kind::None => Issuer::Nobody,
        }
    }

    /// Follows what was applied. To be called before whoever asked for it hears of it.
    pub(crate) fn follow(&self, changes: &[AuthChange]) {
        if let Kind::Simple(tokens) = &self.kind {
            tokens.follow(changes);
        }
    }

    /// The state was replaced by another member's: what became of users meanwhile is not known.
    pub(crate) fn forget(&self) {
        if let Kind::Simple(tokens) = &self.kind {
            tokens.clear();
        }
    }
}

/// Who gives tokens.
pub(crate) enum Issuer<'a> {
    /// The log, of this prefix.
    Log(String),
    /// This member, by its signature.
    Sign(&'a Jwt),
    /// Nobody.
    Nobody,
}
