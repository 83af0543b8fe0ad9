//! Requests of the HTTP API: whatever comes is read or refused, and what is read means the same when it is written out.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| frontend::fuzzing::rest_request(data));
