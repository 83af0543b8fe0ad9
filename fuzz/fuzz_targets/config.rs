//! The configuration file: whatever it holds, settings or one line that says what is wrong.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| metastore::config::fuzz_file(data));
