//! Tokens, simple and signed: none counts that we did not sign.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| server::auth::fuzz_token(data));
