//! Entry points for the fuzz targets in `fuzz/`, which check what lies inside of the front ends.

pub use crate::gateway::fuzz_request as gateway_request;
pub use crate::rest::fuzz_request as rest_request;

/// Calls `check` with what becomes of these seeds by chance: a few random bytes, then a seed in which bytes are changed,
/// left out, cut off, or others put between, `pieces` among them. `METASTORE_FUZZ_ITERATIONS` has it go on for longer,
/// where there is no fuzzer.
#[cfg(test)]
pub(crate) fn damage(seeds: &[&[u8]], pieces: &[&str], random_bytes: usize, check: impl Fn(&[u8])) {
    let iterations =
        std::env::var("METASTORE_FUZZ_ITERATIONS").map_or(20_000_u64, |text| text.parse().expect("a number"));
    // xorshift64: any seed but 0 will do, and the same one makes the same requests.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % below
    };
    for _ in 0..iterations {
        let mut data: Vec<u8> = (0..random_bytes).map(|_| random(256) as u8).collect();
        data.extend_from_slice(seeds[random(seeds.len())]);
        for _ in 0..=random(4) {
            if data.len() <= random_bytes {
                break;
            }
            let at = random_bytes + random(data.len() - random_bytes);
            match random(5) {
                0 => data[at] = random(256) as u8,
                1 => drop(data.remove(at)),
                2 => drop(data.splice(at..at, pieces[random(pieces.len())].bytes())),
                3 => data.truncate(at),
                _ => {
                    let other = seeds[random(seeds.len())];
                    drop(data.splice(at..at, other[random(other.len())..].iter().copied()));
                }
            }
        }
        check(&data);
    }
}
