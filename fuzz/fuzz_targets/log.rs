//! Entries of the Raft log, in all forms that there ever were: whatever the bytes, operations or an error, and operations
//! that are written anew are read as the same.

#![no_main]

use api::codec::{decode_entry, encode_entry, encode_operation};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(operations) = decode_entry(&Bytes::copy_from_slice(data)) else {
        return;
    };
    if operations.is_empty() {
        return;
    }
    let encoded: Vec<Bytes> = operations.iter().map(encode_operation).collect();
    let entry = encode_entry(encoded.iter().map(|operation| &operation[..]));
    assert_eq!(decode_entry(&Bytes::from(entry)).as_ref(), Ok(&operations));
});
