//! Which keys a load touches, and in which order.

use bytes::{Bytes, BytesMut};

/// Keys of one length: a prefix and a number with leading zeros, so that the order of keys is that of numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeySpace {
    prefix: String,
    /// Digits after the prefix.
    digits: usize,
    /// How many keys there are; at least 1.
    pub(crate) count: u64,
}

impl KeySpace {
    /// Fails if `size` bytes hold no prefix with the number of the last key.
    pub(crate) fn new(prefix: &str, size: usize, count: u64) -> Result<Self, String> {
        if count == 0 {
            return Err("there must be at least one key".to_owned());
        }
        let needed = prefix.len() + (count - 1).max(1).ilog10() as usize + 1;
        if size < needed {
            return Err(format!(
                "keys of {size} bytes are too short: prefix {prefix:?} and {count} numbers need {needed}"
            ));
        }
        Ok(KeySpace {
            prefix: prefix.to_owned(),
            digits: size - prefix.len(),
            count,
        })
    }

    /// Appends key number `number` to `buffer`.
    fn write(&self, mut number: u64, buffer: &mut BytesMut) {
        buffer.extend_from_slice(self.prefix.as_bytes());
        let start = buffer.len();
        buffer.resize(start + self.digits, b'0');
        for digit in buffer[start..].iter_mut().rev() {
            if number == 0 {
                break;
            }
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
        }
    }

    /// Key number `number`; `arena` is scratch memory that is used again once earlier keys are dropped.
    pub(crate) fn key(&self, number: u64, arena: &mut BytesMut) -> Bytes {
        arena.reserve(self.prefix.len() + self.digits);
        self.write(number, arena);
        arena.split().freeze()
    }

    /// The key and range end that hold keys `from..to` (numbers), as an etcd request has them.
    pub(crate) fn range(&self, from: u64, to: u64, arena: &mut BytesMut) -> (Bytes, Bytes) {
        let start = self.key(from, arena);
        let end = if to >= self.count {
            prefix_end(self.prefix.as_bytes())
        } else {
            self.key(to, arena)
        };
        (start, end)
    }
}

/// The range end with which a request covers every key that starts with `prefix`.
pub(crate) fn prefix_end(prefix: &[u8]) -> Bytes {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end.into();
        }
    }
    Bytes::from_static(&[0])
}

/// In which order a load goes through its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum KeyOrder {
    /// One after the other, from the first again after the last.
    Seq,
    /// Each with the same chance.
    Random,
    /// Always the first.
    Same,
}

/// Deals out key numbers to one of `stride` threads; together the threads of a run miss none.
#[derive(Debug)]
pub(crate) struct KeyDealer {
    order: KeyOrder,
    count: u64,
    next: u64,
    stride: u64,
}

impl KeyDealer {
    /// The dealer of thread `thread` of `threads`.
    pub(crate) fn new(order: KeyOrder, count: u64, thread: usize, threads: usize) -> Self {
        KeyDealer {
            order,
            count,
            next: thread as u64,
            stride: threads as u64,
        }
    }

    /// The next key number, below the count of keys.
    pub(crate) fn deal(&mut self, rng: &mut fastrand::Rng) -> u64 {
        match self.order {
            KeyOrder::Same => 0,
            KeyOrder::Random => rng.u64(..self.count),
            KeyOrder::Seq => self.advance() % self.count,
        }
    }

    /// The next key number in sequence, or none after the last: every key once.
    pub(crate) fn deal_once(&mut self) -> Option<u64> {
        Some(self.advance()).filter(|number| *number < self.count)
    }

    fn advance(&mut self) -> u64 {
        let number = self.next;
        self.next += self.stride;
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_one_length_and_are_in_order() {
        let keys = KeySpace::new("p/", 8, 1_000).unwrap();
        let mut arena = BytesMut::new();
        assert_eq!(keys.key(0, &mut arena), "p/000000");
        assert_eq!(keys.key(999, &mut arena), "p/000999");
        assert!(keys.key(99, &mut arena) < keys.key(100, &mut arena));
    }

    #[test]
    fn keys_that_do_not_fit_are_refused() {
        assert!(KeySpace::new("p/", 4, 100).is_ok());
        assert!(KeySpace::new("p/", 4, 101).is_err());
        assert!(KeySpace::new("p/", 3, 1).is_ok());
        assert!(KeySpace::new("p/", 2, 1).is_err());
        assert!(KeySpace::new("p/", 8, 0).is_err());
    }

    #[test]
    fn ranges_end_at_the_prefix() {
        let keys = KeySpace::new("p/", 6, 100).unwrap();
        let mut arena = BytesMut::new();
        assert_eq!(keys.range(3, 7, &mut arena), ("p/0003".into(), "p/0007".into()));
        assert_eq!(keys.range(98, 108, &mut arena), ("p/0098".into(), "p0".into()));
        assert_eq!(prefix_end(b"a\xff"), Bytes::from_static(b"b"));
        assert_eq!(prefix_end(b"\xff"), Bytes::from_static(b"\0"));
    }

    #[test]
    fn threads_share_out_every_key_once() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut dealers: Vec<_> = (0..3).map(|t| KeyDealer::new(KeyOrder::Seq, 10, t, 3)).collect();
        let mut seen: Vec<u64> = dealers
            .iter_mut()
            .flat_map(|dealer| std::iter::from_fn(|| dealer.deal_once()).collect::<Vec<_>>())
            .collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..10).collect::<Vec<_>>());
        let mut same = KeyDealer::new(KeyOrder::Same, 10, 0, 1);
        assert_eq!((same.deal(&mut rng), same.deal(&mut rng)), (0, 0));
        let mut random = KeyDealer::new(KeyOrder::Random, 10, 0, 1);
        assert!((0..1_000).all(|_| random.deal(&mut rng) < 10));
    }
}
