//! Why a call failed, in the words under which failures are counted.

use std::fmt;

/// Longest message that is kept of a server's error, in bytes.
const MESSAGE_BYTES_MAX: usize = 200;

/// What failures are counted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// The server answered with this gRPC code, not 0.
    Status(u8),
    /// No answer within `--timeout`.
    Timeout,
    /// No connection, or it was lost or closed (GOAWAY) during the call.
    Connection,
    /// The server ended the call's stream (RST_STREAM).
    Reset,
    /// The answer was none that gRPC allows.
    Protocol,
}

const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// The code that says that a token is missing or has ended.
pub(crate) const UNAUTHENTICATED: u8 = 16;

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Status(code) => match CODES.get(usize::from(*code)) {
                Some(name) => f.write_str(name),
                None => write!(f, "code {code}"),
            },
            Kind::Timeout => f.write_str("timeout"),
            Kind::Connection => f.write_str("connection"),
            Kind::Reset => f.write_str("reset"),
            Kind::Protocol => f.write_str("protocol"),
        }
    }
}

/// A call that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind}: {message}")]
pub(crate) struct Failure {
    pub(crate) kind: Kind,
    /// What the server or the library said; at most 200 bytes or so.
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(kind: Kind, message: impl fmt::Display) -> Self {
        let mut message = message.to_string();
        message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
        Failure { kind, message }
    }
}
