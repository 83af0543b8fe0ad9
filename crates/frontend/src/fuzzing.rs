//! Entry points for the fuzz targets in `fuzz/`, which check what lies inside of the front ends.

pub use crate::gateway::fuzz_request as gateway_request;
