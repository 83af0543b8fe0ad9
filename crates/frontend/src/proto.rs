//! The generated half of etcd's API: messages, servers and clients, from the files under `proto/`.
//!
//! Messages that [`api::kv`] or [`api::auth`] have are not generated again: the generated code uses those.

#![allow(missing_docs, clippy::all, reason = "generated; etcd documents its own API")]

pub mod etcdserverpb {
    tonic::include_proto!("etcdserverpb");
}

pub mod v3lockpb {
    tonic::include_proto!("v3lockpb");
}

pub mod v3electionpb {
    tonic::include_proto!("v3electionpb");
}

pub mod health {
    tonic::include_proto!("grpc.health.v1");
}

/// All of the above as an encoded `google.protobuf.FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
