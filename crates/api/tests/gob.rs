//! Log entries in their oldest form, a Go gob of `struct{ Key, Val string }`. The golden files were written by Go
//! (`compat/cmd/gobgolden`); `index.json` says what Go's own decoder reads from each.

use std::path::Path;

use bytes::Bytes;
use metastore_api::codec::{Action, DecodeError, decode_entry};
use proptest::prelude::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    name: String,
    file: String,
    values: Option<Vec<Value>>,
}

#[derive(Deserialize)]
struct Value {
    key: Text,
    val: Text,
}

#[derive(Deserialize)]
struct Text {
    len: usize,
    /// Left out of long texts, whose length and ends say enough.
    base64: Option<String>,
}

impl Text {
    fn check(&self, what: &str, found: &[u8]) {
        assert_eq!(found.len(), self.len, "{what}");
        if let Some(base64) = &self.base64 {
            assert_eq!(found, decode_base64(base64), "{what}");
        }
    }
}

fn decode_base64(text: &str) -> Vec<u8> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bits, mut count, mut out) = (0u32, 0, Vec::new());
    for byte in text.bytes().filter(|byte| *byte != b'=') {
        let value = ALPHABET.iter().position(|letter| *letter == byte).expect("base64");
        bits = bits << 6 | value as u32;
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    out
}

fn golden_files() -> Vec<(Golden, Bytes)> {
    // From the package's folder, in which cargo runs tests.
    let dir = Path::new("tests/golden/gob");
    let index = std::fs::read(dir.join("index.json")).unwrap();
    let index: Vec<Golden> = serde_json::from_slice(&index).unwrap();
    let read = |golden: Golden| {
        let data = std::fs::read(dir.join(&golden.file)).unwrap();
        (golden, data.into())
    };
    index.into_iter().map(read).collect()
}

/// What Go reads but the old system never wrote: other layouts of the struct, and more than one value in an entry. To
/// guess at those could swap a key with its value, so they stop the node like any other unknown bytes.
const STRICTER_THAN_GO: &[&str] = &["kv_swapped_fields", "kv_extra_field", "kv_two_values", "kv_two_streams"];

#[test]
fn entries_that_go_wrote_are_read_as_puts() {
    let (mut read, mut refused) = (0, 0);
    for (golden, data) in golden_files() {
        let name = &golden.name;
        match (decode_entry(&data), golden.values.as_deref()) {
            (Ok(operations), Some([value])) if !STRICTER_THAN_GO.contains(&name.as_str()) => {
                let [operation] = &operations[..] else {
                    panic!("{name}: {operations:?}")
                };
                let Some(Action::Put(put)) = &operation.action else {
                    panic!("{name}: {operation:?}")
                };
                assert_eq!(operation.id(), 0, "{name}: nobody waits for it");
                value.key.check(name, &put.key);
                value.val.check(name, &put.value);
                read += 1;
            }
            (Err(DecodeError::Unknown { .. }), values) => {
                let expected = values.is_none_or(<[Value]>::is_empty) || STRICTER_THAN_GO.contains(&name.as_str());
                assert!(expected, "{name} is refused");
                refused += 1;
            }
            (other, _) => panic!("{name}: {other:?}"),
        }
    }
    assert!(
        read >= 25 && refused >= 9,
        "{read} read, {refused} refused: files are missing"
    );
}

#[test]
fn no_prefix_of_a_gob_is_an_entry() {
    for (golden, data) in golden_files().into_iter().filter(|(_, data)| data.len() < 400) {
        for length in 1..data.len() {
            // The first of two values is whole; all other prefixes are not.
            let whole = decode_entry(&data.slice(..length)).is_ok();
            let first_of_two = golden.name.starts_with("kv_two_");
            assert!(
                !whole || first_of_two,
                "{}: {length} bytes are taken for an entry",
                golden.name
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever stands in the log, the decoder answers; it never panics or runs away.
    #[test]
    fn random_bytes_are_an_answer(data in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode_entry(&data.into());
    }

    /// The same for entries with some bytes changed, which get much further.
    #[test]
    fn damaged_entries_are_an_answer(
        file in 0..30usize,
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let files = golden_files();
        let mut data = files[file % files.len()].1.to_vec();
        data.truncate(300);
        for (at, byte) in damage {
            let at = at.index(data.len());
            data[at] = byte;
        }
        let _ = decode_entry(&data.into());
    }
}
