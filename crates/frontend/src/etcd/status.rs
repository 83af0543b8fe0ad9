//! From [`api::Error`] to a gRPC status.

use tonic::{Code, Status};

/// The status that an error goes over the wire as.
pub fn status(error: api::Error) -> Status {
    Status::new(Code::from_i32(error.code() as i32), error.message())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_texts_survive() {
        for &error in api::Error::ALL {
            let status = status(error);
            assert_eq!(status.code() as i32, error.code() as i32);
            assert_eq!(status.message(), error.message());
        }
    }
}
