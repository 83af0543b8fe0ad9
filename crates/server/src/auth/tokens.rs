//! Simple tokens: 16 random letters, a dot, and the index of the log entry that gave the token, as in etcd.
//!
//! A token lives as long as it is used within its time to live on the member in question. It is lost when the member
//! restarts, when auth is turned off, and when its user is deleted or gets another password.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use api::RaftIndex;
use hashbrown::HashMap;
use mvcc::AuthChange;
use parking_lot::RwLock;

/// Letters of a token's prefix (etcd's `defaultSimpleTokenLength`).
const PREFIX_LETTERS: usize = 16;
/// Most tokens that are remembered; beyond, those that would end soonest go first.
const TOKENS_MAX: usize = 1_000_000;
/// So many tokens may be there before those that have ended are looked for.
const SWEEP_MIN: usize = 1024;

/// The tokens that this member knows.
pub(crate) struct Tokens {
    ttl_ms: u64,
    replayed: RaftIndex,
    started: Instant,
    state: RwLock<State>,
}

struct State {
    tokens: HashMap<Box<str>, Token>,
    /// Tokens that have ended are looked for when there are so many.
    sweep_at: usize,
}

struct Token {
    user: Arc<str>,
    /// Milliseconds since [`Tokens::started`].
    ends_ms: AtomicU64,
}

impl Tokens {
    pub(crate) fn new(ttl: Duration, replayed: RaftIndex) -> Self {
        Tokens {
            ttl_ms: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX),
            replayed,
            started: Instant::now(),
            state: RwLock::new(State {
                tokens: HashMap::new(),
                sweep_at: SWEEP_MIN,
            }),
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The user that a token stands for. The token lives on for its whole time again.
    pub(crate) fn user(&self, token: &str) -> Option<Arc<str>> {
        self.user_at(token, self.now_ms())
    }

    fn user_at(&self, token: &str, now_ms: u64) -> Option<Arc<str>> {
        let state = self.state.read();
        let token = state.tokens.get(token)?;
        if token.ends_ms.load(Ordering::Relaxed) <= now_ms {
            return None;
        }
        token
            .ends_ms
            .store(now_ms.saturating_add(self.ttl_ms), Ordering::Relaxed);
        Some(token.user.clone())
    }

    pub(crate) fn follow(&self, changes: &[AuthChange]) {
        for change in changes {
            match change {
                AuthChange::TokenGiven { user, token, index } if *index > self.replayed => {
                    self.add(token, user, self.now_ms());
                }
                AuthChange::TokenGiven { .. } | AuthChange::Enabled => {}
                AuthChange::TokensTaken { user } => {
                    self.state.write().tokens.retain(|_, token| *token.user != **user);
                }
                AuthChange::Disabled => self.clear(),
            }
        }
    }

    pub(crate) fn clear(&self) {
        let mut state = self.state.write();
        state.tokens = HashMap::new();
        state.sweep_at = SWEEP_MIN;
    }

    fn add(&self, token: &str, user: &str, now_ms: u64) {
        let mut state = self.state.write();
        if state.tokens.len() >= state.sweep_at {
            state.sweep(now_ms);
        }
        let token_of_user = Token {
            user: user.into(),
            ends_ms: AtomicU64::new(now_ms.saturating_add(self.ttl_ms)),
        };
        state.tokens.insert(token.into(), token_of_user);
    }
}

impl State {
    fn sweep(&mut self, now_ms: u64) {
        let ends = |token: &Token| token.ends_ms.load(Ordering::Relaxed);
        self.tokens.retain(|_, token| ends(token) > now_ms);
        if self.tokens.len() >= TOKENS_MAX {
            let mut all: Vec<u64> = self.tokens.values().map(ends).collect();
            let quarter = all.len() / 4;
            let (_, last_to_go, _) = all.select_nth_unstable(quarter);
            let last_to_go = *last_to_go;
            // Many may end at the same time as that one: no more than a quarter goes.
            let mut left = quarter;
            self.tokens.retain(|_, token| {
                let goes = left > 0 && ends(token) <= last_to_go;
                left -= usize::from(goes);
                !goes
            });
        }
        self.sweep_at = (self.tokens.len() * 2).clamp(SWEEP_MIN, TOKENS_MAX);
    }
}

/// The log entry that a token's second part names; `None` if it is no simple token.
pub(crate) fn entry_of(token: &str) -> Option<RaftIndex> {
    let (_, index) = token.split_once('.')?;
    index.parse().ok()
}

/// The first part of a token.
pub(crate) fn random_prefix() -> String {
    const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    // The largest multiple of the number of letters that a byte holds: bytes beyond would make some letters likelier.
    let fair = u8::try_from(256 / LETTERS.len() * LETTERS.len()).expect("it is below 256");
    let mut prefix = String::with_capacity(PREFIX_LETTERS);
    while prefix.len() < PREFIX_LETTERS {
        let mut random = [0; 2 * PREFIX_LETTERS];
        aws_lc_rs::rand::fill(&mut random).expect("the system has random numbers");
        let letters = random.iter().filter(|byte| **byte < fair);
        prefix.extend(
            letters
                .map(|byte| char::from(LETTERS[usize::from(*byte) % LETTERS.len()]))
                .take(PREFIX_LETTERS - prefix.len()),
        );
    }
    prefix
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(user: &str, token: &str, index: u64) -> AuthChange {
        AuthChange::TokenGiven {
            user: user.to_owned(),
            token: token.to_owned(),
            index,
        }
    }

    #[test]
    fn tokens_live_while_they_are_used() {
        let tokens = Tokens::new(Duration::from_millis(100), 0);
        tokens.add("t.1", "ann", 0);
        assert_eq!(tokens.user_at("t.1", 99).as_deref(), Some("ann"));
        assert_eq!(tokens.user_at("t.1", 198).as_deref(), Some("ann"));
        assert_eq!(tokens.user_at("t.1", 298), None);
        assert_eq!(tokens.user_at("t.2", 0), None);
    }

    #[test]
    fn what_is_applied_gives_and_takes_them() {
        let tokens = Tokens::new(Duration::from_secs(300), 7);
        tokens.follow(&[given("ann", "old.7", 7), given("ann", "a.8", 8), given("bob", "b.9", 9)]);
        assert_eq!(tokens.user("old.7"), None, "given out before this start");
        assert_eq!(tokens.user("a.8").as_deref(), Some("ann"));
        tokens.follow(&[AuthChange::TokensTaken { user: "ann".to_owned() }]);
        assert_eq!(tokens.user("a.8"), None);
        assert_eq!(tokens.user("b.9").as_deref(), Some("bob"));
        tokens.follow(&[AuthChange::Disabled, AuthChange::Enabled]);
        assert_eq!(tokens.user("b.9"), None);
    }

    #[test]
    fn tokens_that_ended_are_forgotten_and_never_too_many_kept() {
        let tokens = Tokens::new(Duration::from_millis(10), 0);
        for n in 0..10 * SWEEP_MIN as u64 {
            tokens.add(&format!("t.{n}"), "ann", n);
        }
        let kept = tokens.state.read().tokens.len();
        assert!(kept <= 2 * SWEEP_MIN, "{kept}");

        let tokens = Tokens::new(Duration::from_secs(300), 0);
        for n in 0..TOKENS_MAX as u64 + 10 {
            tokens.add(&format!("t.{n}"), "ann", n / 1000);
        }
        let kept = tokens.state.read().tokens.len();
        assert!(kept <= TOKENS_MAX, "{kept}");
        assert!(kept >= TOKENS_MAX / 2, "{kept}");
        assert_eq!(tokens.user(&format!("t.{}", TOKENS_MAX + 9)).as_deref(), Some("ann"));
    }

    #[test]
    fn prefixes_are_etcds() {
        let (one, other) = (random_prefix(), random_prefix());
        assert_ne!(one, other);
        assert!(one.len() == PREFIX_LETTERS && one.bytes().all(|byte| byte.is_ascii_alphabetic()));
        assert_eq!(entry_of(&format!("{one}.42")), Some(42));
        for wrong in ["", one.as_str(), "a.b", "a.1.2", "a.-1", "a.99999999999999999999"] {
            assert_eq!(entry_of(wrong), None, "{wrong}");
        }
    }
}
