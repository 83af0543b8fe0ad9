//! The transport over loopback, through a proxy that misbehaves.

mod call;
mod frames;
mod handshake;
mod harness;
mod proxy;
mod raft;
mod snapshot;
mod tls;
