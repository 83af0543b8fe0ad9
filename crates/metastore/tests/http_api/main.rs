//! The HTTP API of the real binary: beside etcd's clients on the same data, by itself, and against those who misuse it.

mod bad_input;
mod client;
mod cluster;
mod document;
mod examples;
mod features;
mod nodes;
mod scenarios;
mod streams;
#[path = "../support/mod.rs"]
mod support;
