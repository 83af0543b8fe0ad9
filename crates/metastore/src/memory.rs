//! How the process takes memory from the system, and gives it back.

/// How long mimalloc keeps memory that is free before it gives it back, in milliseconds. Its own default is 1000, by
/// which a node that was written to at full speed held some 100 MiB for nothing; shorter ones wrote no slower down to 30.
const PURGE_DELAY_MS: i64 = 50;

/// mimalloc's `mi_option_purge_delay`, which its Rust bindings have no name for.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Settles that, once, before anything else runs.
///
/// Huge pages are turned off: whole ones for what is used in small pieces make a node a fifth larger and its latencies
/// uneven, and nothing was measured to be faster with them. Where the kernel can't be told, it is as it is elsewhere.
/// `MIMALLOC_PURGE_DELAY` in the environment wins over the delay that is set here.
pub fn settle() {
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    // SAFETY: it sets a number that the allocator reads; at worst a thread still sees the one before.
    #[allow(unsafe_code, reason = "the allocator is told by its C interface")]
    unsafe {
        libmimalloc_sys::mi_option_set_default(PURGE_DELAY, PURGE_DELAY_MS as std::ffi::c_long);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_is_the_one_that_is_meant() {
        // SAFETY: it reads a number.
        #[allow(unsafe_code, reason = "the allocator is asked by its C interface")]
        let get = || unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) };
        let is_set = |name| std::env::var_os(name).is_some();
        // The second is its name of old.
        if !is_set("MIMALLOC_PURGE_DELAY") && !is_set("MIMALLOC_RESET_DELAY") {
            // No other option of mimalloc 3 has this default: a version that numbers them anew is noticed.
            assert_eq!(get(), 1000);
            settle();
            assert_eq!(get(), PURGE_DELAY_MS as std::ffi::c_long);
        }
    }
}
