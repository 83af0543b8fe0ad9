//! JSON requests of the gateway: whatever comes, it is refused, or means the same when it is written out and read again.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| frontend::fuzzing::gateway_request(data));
