//! Hashing and checking passwords, which is made to be slow: on few threads of its own, and no more often than needed.
//!
//! A password that was found right is remembered, as a keyed hash that only this process can make, together with the
//! stored hash that it was held against; so whoever logs in again costs nothing, and a new password counts at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use api::Error;
use api::auth::PASSWORD_BYTES_MAX;
use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use quick_cache::sync::Cache;
use tokio::sync::Semaphore;

/// Most users whose password is remembered to have been right.
const REMEMBERED_MAX: usize = 10_000;
/// Most passwords that wait to be hashed or checked. Most of a crowd that comes at once shows the same few passwords,
/// and costs no more than those.
const WAITING_MAX: usize = 4096;
/// How long a password may wait for its turn.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// Hashes and checks passwords.
pub(crate) struct Passwords {
    cost: u32,
    /// One for each password that is worked on.
    slots: Arc<Semaphore>,
    waiting: AtomicUsize,
    remembered: Arc<Remembered>,
}

struct Remembered {
    key: hmac::Key,
    /// By user.
    right: Cache<Box<str>, [u8; 32]>,
}

impl Remembered {
    /// A hash of a password and the stored hash that it is held against. The key is random and never leaves the process.
    fn mac(&self, stored: &[u8], password: &str) -> [u8; 32] {
        let mut mac = hmac::Context::with_key(&self.key);
        mac.update(&(stored.len() as u64).to_le_bytes());
        mac.update(stored);
        mac.update(password.as_bytes());
        mac.sign().as_ref().try_into().expect("SHA-256 has 32 bytes")
    }

    fn is_right(&self, user: &str, mac: &[u8; 32]) -> bool {
        self.right
            .get(user)
            .is_some_and(|right| verify_slices_are_equal(&right, mac).is_ok())
    }
}

/// A place among those that wait.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Passwords {
    pub(crate) fn new(cost: u32) -> Self {
        // Never all processors: those are the store's.
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let mut secret = [0; 32];
        aws_lc_rs::rand::fill(&mut secret).expect("the system has random numbers");
        Passwords {
            cost,
            slots: Arc::new(Semaphore::new((processors / 2).clamp(1, 4))),
            waiting: AtomicUsize::new(0),
            remembered: Arc::new(Remembered {
                key: hmac::Key::new(hmac::HMAC_SHA256, &secret),
                right: Cache::new(REMEMBERED_MAX),
            }),
        }
    }

    /// Runs slow work on a thread where it is in nobody's way.
    async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
        let before = self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        if before >= WAITING_MAX {
            return Err(Error::TooManyRequests);
        }
        let slot = tokio::time::timeout(WAIT_MAX, self.slots.clone().acquire_owned()).await;
        let slot = slot.map_err(|_| Error::TooManyRequests)?.map_err(|_| Error::Stopped)?;
        // The slot goes with the work, which goes on if the client does not wait for it.
        let done = tokio::task::spawn_blocking(move || {
            let _slot = slot;
            work()
        });
        done.await.map_err(|_| Error::Stopped)
    }

    /// The bcrypt hash of a password in base64, as the log has it.
    pub(crate) async fn hash(&self, password: String) -> Result<String, Error> {
        if password.len() > PASSWORD_BYTES_MAX {
            return Err(Error::PasswordTooLong);
        }
        let cost = self.cost;
        self.run(move || {
            let hash = bcrypt::hash_with_result(password, cost).expect("the cost was checked, and there is randomness");
            // What Go's bcrypt writes.
            BASE64_STANDARD.encode(hash.format_for_version(bcrypt::Version::TwoA))
        })
        .await
    }

    /// Whether a password is that of a user with this stored hash.
    pub(crate) async fn is_right(&self, user: &str, stored: &Bytes, password: String) -> Result<bool, Error> {
        let mac = self.remembered.mac(stored, &password);
        if self.remembered.is_right(user, &mac) {
            return Ok(true);
        }
        let (remembered, user, stored) = (self.remembered.clone(), Box::<str>::from(user), stored.clone());
        self.run(move || {
            // Others may have waited with the same password.
            if remembered.is_right(&user, &mac) {
                return true;
            }
            let is_right =
                std::str::from_utf8(&stored).is_ok_and(|stored| bcrypt::verify(password, stored).unwrap_or(false));
            if is_right {
                remembered.right.insert(user, mac);
            }
            is_right
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn passwords_are_checked_and_remembered() {
        let passwords = Passwords::new(4);
        let stored = passwords.hash("secret".to_owned()).await.unwrap();
        let stored: Bytes = BASE64_STANDARD.decode(stored).unwrap().into();
        assert!(stored.starts_with(b"$2a$04$"), "{stored:?}");
        let right = |password: &str| passwords.is_right("ann", &stored, password.to_owned());
        assert_eq!(right("wrong").await, Ok(false));
        assert_eq!(passwords.remembered.right.len(), 0, "only what is right is remembered");
        assert_eq!(right("secret").await, Ok(true));
        assert_eq!(passwords.remembered.right.len(), 1);
        // Nobody is asked any more: there are no slots.
        let slots = passwords.slots.clone();
        slots.close();
        assert_eq!(right("secret").await, Ok(true));
        assert_eq!(right("wrong").await, Err(Error::Stopped));
        let other: Bytes = "$2a$04$".into();
        let asked = passwords.is_right("ann", &other, "secret".to_owned()).await;
        assert_eq!(asked, Err(Error::Stopped), "another stored hash is another password");
    }

    #[tokio::test]
    async fn hashes_of_go_are_understood() {
        // From the tests of golang.org/x/crypto/bcrypt.
        let stored = Bytes::from_static(b"$2a$10$XajjQvNhvvRt5GSeFk1xFeyqRrsxkhBkUiQeg0dt.wU1qD4aFDcga");
        let passwords = Passwords::new(4);
        assert_eq!(passwords.is_right("u", &stored, "allmine".to_owned()).await, Ok(true));
        assert_eq!(passwords.is_right("u", &stored, "allmine2".to_owned()).await, Ok(false));
        for damaged in [
            "",
            "x",
            "$2a$04$",
            "$9z$04$aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        ] {
            let stored = Bytes::from_static(damaged.as_bytes());
            assert_eq!(Passwords::new(4).is_right("u", &stored, String::new()).await, Ok(false));
        }
    }

    #[tokio::test]
    async fn long_passwords_are_refused() {
        let passwords = Passwords::new(4);
        assert!(passwords.hash("p".repeat(72)).await.is_ok());
        assert_eq!(passwords.hash("p".repeat(73)).await, Err(Error::PasswordTooLong));
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_is_refused() {
        let passwords = Arc::new(Passwords::new(4));
        let all = passwords.slots.available_permits() as u32;
        let _taken = passwords.slots.clone().acquire_many_owned(all).await.unwrap();
        let stored = Bytes::from_static(b"$2a$04$");
        let ask = |n: usize| {
            let (passwords, stored) = (passwords.clone(), stored.clone());
            async move { passwords.is_right("ann", &stored, n.to_string()).await }
        };
        let waiting: Vec<_> = (0..WAITING_MAX).map(|n| tokio::spawn(ask(n))).collect();
        while passwords.waiting.load(Ordering::Relaxed) < WAITING_MAX {
            tokio::task::yield_now().await;
        }
        assert_eq!(ask(0).await, Err(Error::TooManyRequests), "too many wait");
        for waiting in waiting {
            assert_eq!(
                waiting.await.unwrap(),
                Err(Error::TooManyRequests),
                "they waited too long"
            );
        }
        assert_eq!(passwords.waiting.load(Ordering::Relaxed), 0);
    }
}
