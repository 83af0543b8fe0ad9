//! What a load writes: random bytes, which nothing compresses, or objects like those of Kubernetes, which compress well.

use bytes::{Bytes, BytesMut};

/// What values are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ValueKind {
    /// Bytes drawn evenly.
    Random,
    /// A pod as JSON, with names, addresses and hashes of its own.
    Kubernetes,
}

/// Length of a stamp: a moment of [`crate::clock::now`] in hexadecimal.
pub(crate) const STAMP_BYTES: usize = 16;

/// What stands before the stamp of a Kubernetes-like value.
const HEAD: &str = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"annotations":{"bench/sent":""#;
/// What follows it; each `~` becomes a random hexadecimal digit.
const BODY: &str = concat!(
    r#""},"creationTimestamp":"2026-01-01T00:00:00Z","generateName":"web-~~~~~~~~~~-","labels":{"app":"web","#,
    r#""pod-template-hash":"~~~~~~~~~~"},"name":"web-~~~~~~~~~~-~~~~~","namespace":"default","#,
    r#""uid":"~~~~~~~~-~~~~-~~~~-~~~~-~~~~~~~~~~~~"},"spec":{"nodeName":"node-~~~","restartPolicy":"Always","#,
    r#""containers":[{"name":"web","image":"registry.example/web@sha256:~~~~~~~~~~~~~~~~~~~~~~~~","env":["#,
);
/// Repeated until the value is long enough.
const ENV: &str = r#"{"name":"SERVICE_~~~~_HOST","value":"0x~~~~~~~~"},"#;
const TAIL: &str = r#"{"name":"LAST","value":""}]}]},"status":{"phase":"Running","hostIP":"0x~~~~~~~~"}}"#;

impl ValueKind {
    /// Where a stamp stands in a value.
    fn stamp_at(self) -> usize {
        match self {
            ValueKind::Random => 0,
            ValueKind::Kubernetes => HEAD.len(),
        }
    }

    /// The least size of a value that can hold a stamp.
    pub(crate) fn stamped_bytes_min(self) -> usize {
        self.stamp_at() + STAMP_BYTES
    }

    /// Reads the moment that [`ValueMaker::stamped`] wrote; none if the value holds no stamp.
    pub(crate) fn stamp_of(self, value: &[u8]) -> Option<u64> {
        let digits = value.get(self.stamp_at()..self.stamped_bytes_min())?;
        u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    }
}

/// Makes values of one kind and size.
#[derive(Debug)]
pub(crate) struct ValueMaker {
    kind: ValueKind,
    /// What a Kubernetes-like value starts from, exactly as long as values are.
    template: Bytes,
    /// Where the template has a `~`.
    blanks: Vec<usize>,
    size: usize,
    arena: BytesMut,
}

impl ValueMaker {
    /// Values of `size` bytes. Kubernetes-like ones of less than about 700 bytes are cut short.
    pub(crate) fn new(kind: ValueKind, size: usize) -> Self {
        let template = match kind {
            ValueKind::Random => String::new(),
            ValueKind::Kubernetes => kubernetes_template(size),
        };
        let blanks = template
            .bytes()
            .enumerate()
            .filter_map(|(index, byte)| (byte == b'~').then_some(index))
            .collect();
        ValueMaker {
            kind,
            template: template.into(),
            blanks,
            size,
            arena: BytesMut::new(),
        }
    }

    /// A new value.
    pub(crate) fn value(&mut self, rng: &mut fastrand::Rng) -> Bytes {
        self.fill(rng);
        self.arena.split().freeze()
    }

    /// A new value that says the moment `stamp`. The size must be at least [`ValueKind::stamped_bytes_min`].
    pub(crate) fn stamped(&mut self, rng: &mut fastrand::Rng, stamp: u64) -> Bytes {
        self.fill(rng);
        let at = self.kind.stamp_at();
        for (index, byte) in self.arena[at..at + STAMP_BYTES].iter_mut().enumerate() {
            *byte = hex(stamp >> (4 * (STAMP_BYTES - 1 - index)));
        }
        self.arena.split().freeze()
    }

    fn fill(&mut self, rng: &mut fastrand::Rng) {
        self.arena.reserve(self.size);
        match self.kind {
            ValueKind::Random => {
                self.arena.resize(self.size, 0);
                rng.fill(&mut self.arena);
            }
            ValueKind::Kubernetes => {
                self.arena.extend_from_slice(&self.template);
                let mut bits = 0;
                for (index, blank) in self.blanks.iter().enumerate() {
                    if index % 16 == 0 {
                        bits = rng.u64(..);
                    }
                    self.arena[*blank] = hex(bits);
                    bits >>= 4;
                }
            }
        }
    }
}

fn hex(bits: u64) -> u8 {
    b"0123456789abcdef"[(bits & 15) as usize]
}

fn kubernetes_template(size: usize) -> String {
    let mut text = format!("{HEAD}{}{BODY}", "0".repeat(STAMP_BYTES));
    while text.len() + ENV.len() + TAIL.len() <= size {
        text.push_str(ENV);
    }
    text.push_str(TAIL);
    // JSON ends at the last brace: blanks after it change nothing.
    text.extend(std::iter::repeat_n(' ', size.saturating_sub(text.len())));
    text.truncate(size);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_read_back() {
        let mut rng = fastrand::Rng::with_seed(3);
        for kind in [ValueKind::Random, ValueKind::Kubernetes] {
            let mut maker = ValueMaker::new(kind, 1024);
            let value = maker.stamped(&mut rng, 0x0123_4567_89ab_cdef);
            assert_eq!(value.len(), 1024);
            assert_eq!(kind.stamp_of(&value), Some(0x0123_4567_89ab_cdef));
            assert_eq!(kind.stamp_of(&value[..10]), None);
        }
    }

    #[test]
    fn values_differ_and_have_their_size() {
        let mut rng = fastrand::Rng::with_seed(3);
        for kind in [ValueKind::Random, ValueKind::Kubernetes] {
            for size in [0, 1, 300, 4096] {
                let mut maker = ValueMaker::new(kind, size);
                let (one, other) = (maker.value(&mut rng), maker.value(&mut rng));
                assert_eq!((one.len(), other.len()), (size, size));
                assert!(size < 300 || one != other);
            }
        }
    }

    #[test]
    fn kubernetes_values_are_json() {
        let mut maker = ValueMaker::new(ValueKind::Kubernetes, 1000);
        let value = maker.stamped(&mut fastrand::Rng::with_seed(9), 5);
        let json: serde_json::Value = serde_json::from_slice(&value).unwrap();
        assert_eq!(json["metadata"]["annotations"]["bench/sent"], "0000000000000005");
    }
}
