//! MetaStore's protocol front ends: etcd's gRPC API, the same as JSON over HTTP, and etcd's HTTP endpoints, on one port
//! or on several, over any [`api::Store`].
//!
//! Nothing here knows how a request is carried out. A front end reads it, holds it against what can be checked without
//! the store, hands it on, and says the answer, or the refusal, in the words that etcd's clients expect.
//!
//! [`Frontend`] is the whole of it as one service: gRPC requests go to [`etcd`], those under `/api/v1` to [`rest`],
//! everything else to [`http`].
//! [`serve_connection`] runs it on a connection, HTTP/1.1 or HTTP/2, whichever the client speaks.

mod access;
pub mod connection;
pub mod credentials;
mod deadline;
pub mod etcd;
#[doc(hidden)]
pub mod fuzzing;
mod gateway;
mod h2_server;
pub mod http;
mod line;
pub mod observer;
pub mod proto;
pub mod rest;
mod service;

pub use access::Access;
pub use connection::{ConnectionSettings, serve_connection};
pub use credentials::ClientCertificate;
pub use etcd::methods::{CallKind, Method, Service, methods};
pub use observer::{CallSpan, CallTracer, Observer};
pub use service::{Frontend, Listener, Options, ResponseBody, ResponseFuture, Traffic, router};

type BoxError = Box<dyn std::error::Error + Send + Sync>;
