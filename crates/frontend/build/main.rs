//! Compiles the .proto files without protoc, and writes the table of methods that dispatch and metrics go by.

#![allow(clippy::print_stdout, reason = "this is how a build script talks to cargo")]

mod gateway;

use std::fmt::Write;
use std::path::Path;

use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{FieldDescriptorProto, FileDescriptorSet};

const FILES: [&str; 6] = [
    "kv.proto",
    "auth.proto",
    "rpc.proto",
    "v3lock.proto",
    "v3election.proto",
    "health.proto",
];

/// Messages, and an enumeration, that crate `api` has: what the store takes and returns goes over the wire as it is.
const IN_API: [&str; 29] = [
    "mvccpb.KeyValue",
    "mvccpb.Event",
    "etcdserverpb.ResponseHeader",
    "etcdserverpb.RangeRequest",
    "etcdserverpb.RangeResponse",
    "etcdserverpb.PutRequest",
    "etcdserverpb.PutResponse",
    "etcdserverpb.DeleteRangeRequest",
    "etcdserverpb.DeleteRangeResponse",
    "etcdserverpb.RequestOp",
    "etcdserverpb.ResponseOp",
    "etcdserverpb.Compare",
    "etcdserverpb.TxnRequest",
    "etcdserverpb.TxnResponse",
    "etcdserverpb.CompactionRequest",
    "etcdserverpb.CompactionResponse",
    "etcdserverpb.LeaseGrantRequest",
    "etcdserverpb.LeaseGrantResponse",
    "etcdserverpb.LeaseRevokeRequest",
    "etcdserverpb.LeaseRevokeResponse",
    "etcdserverpb.LeaseKeepAliveResponse",
    "etcdserverpb.LeaseTimeToLiveResponse",
    "etcdserverpb.LeaseStatus",
    "etcdserverpb.LeaseLeasesResponse",
    "etcdserverpb.Member",
    "etcdserverpb.AlarmType",
    "etcdserverpb.AlarmRequest",
    "etcdserverpb.AlarmMember",
    "etcdserverpb.AlarmResponse",
];

/// Services that come generated, with the crate that offers them.
const REFLECTION: [&str; 2] = [
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

/// Likewise, in `api::auth`.
const IN_API_AUTH: [&str; 39] = [
    "etcdserverpb.AuthEnableRequest",
    "etcdserverpb.AuthEnableResponse",
    "etcdserverpb.AuthDisableRequest",
    "etcdserverpb.AuthDisableResponse",
    "etcdserverpb.AuthStatusRequest",
    "etcdserverpb.AuthStatusResponse",
    "etcdserverpb.AuthenticateRequest",
    "etcdserverpb.AuthenticateResponse",
    "etcdserverpb.AuthUserAddRequest",
    "etcdserverpb.AuthUserAddResponse",
    "etcdserverpb.AuthUserGetRequest",
    "etcdserverpb.AuthUserGetResponse",
    "etcdserverpb.AuthUserListRequest",
    "etcdserverpb.AuthUserListResponse",
    "etcdserverpb.AuthUserDeleteRequest",
    "etcdserverpb.AuthUserDeleteResponse",
    "etcdserverpb.AuthUserChangePasswordRequest",
    "etcdserverpb.AuthUserChangePasswordResponse",
    "etcdserverpb.AuthUserGrantRoleRequest",
    "etcdserverpb.AuthUserGrantRoleResponse",
    "etcdserverpb.AuthUserRevokeRoleRequest",
    "etcdserverpb.AuthUserRevokeRoleResponse",
    "etcdserverpb.AuthRoleAddRequest",
    "etcdserverpb.AuthRoleAddResponse",
    "etcdserverpb.AuthRoleGetRequest",
    "etcdserverpb.AuthRoleGetResponse",
    "etcdserverpb.AuthRoleListRequest",
    "etcdserverpb.AuthRoleListResponse",
    "etcdserverpb.AuthRoleDeleteRequest",
    "etcdserverpb.AuthRoleDeleteResponse",
    "etcdserverpb.AuthRoleGrantPermissionRequest",
    "etcdserverpb.AuthRoleGrantPermissionResponse",
    "etcdserverpb.AuthRoleRevokePermissionRequest",
    "etcdserverpb.AuthRoleRevokePermissionResponse",
    "authpb.User",
    "authpb.UserAddOptions",
    "authpb.Permission",
    "authpb.Permission.Type",
    "authpb.Role",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed=build");
    let out = std::env::var("OUT_DIR")?;
    let out = Path::new(&out);
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).open_files(FILES)?;
    // In this encoding the methods keep their HTTP paths.
    std::fs::write(out.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    std::fs::write(out.join("gateway.rs"), gateway::tables(&compiler.descriptor_pool()))?;
    let mut descriptors = compiler.file_descriptor_set();
    std::fs::write(out.join("methods.rs"), methods(&descriptors))?;

    let mut builder = tonic_prost_build::configure()
        .bytes(".")
        .build_transport(false)
        .generate_default_stubs(true)
        .codec_path("crate::etcd::codec::Codec");
    for message in IN_API {
        let name = message.rsplit('.').next().unwrap_or(message);
        builder = builder.extern_path(format!(".{message}"), format!("::api::kv::{name}"));
    }
    for message in IN_API_AUTH {
        let name = match message {
            "authpb.Permission.Type" => "PermissionType",
            _ => message.rsplit('.').next().unwrap_or(message),
        };
        builder = builder.extern_path(format!(".{message}"), format!("::api::auth::{name}"));
    }
    withhold_derives(&mut descriptors);
    builder.compile_fds(descriptors)?;
    Ok(())
}

/// prost derives Copy, Eq and Hash for each message whose fields look as if they had them, which those in `api` need
/// not. A field that has none of these, in messages that are not generated, keeps it from that.
fn withhold_derives(descriptors: &mut FileDescriptorSet) {
    for file in &mut descriptors.file {
        let package = file.package().to_owned();
        for message in &mut file.message_type {
            let name = format!("{package}.{}", message.name());
            if IN_API.contains(&name.as_str()) || IN_API_AUTH.contains(&name.as_str()) {
                let mut field = FieldDescriptorProto {
                    name: Some("withhold_derives".to_owned()),
                    number: Some(1000),
                    ..Default::default()
                };
                field.set_type(Type::Double);
                field.set_label(Label::Repeated);
                message.field.push(field);
            }
        }
    }
}

fn methods(descriptors: &FileDescriptorSet) -> String {
    let mut code = String::from("&[\n");
    let mut index = 0;
    for file in &descriptors.file {
        for service in &file.service {
            let name = format!("{}.{}", file.package(), service.name());
            writeln!(code, "Service {{ name: {name:?}, methods: &[").expect("a String grows");
            for method in &service.method {
                let kind = match (method.client_streaming(), method.server_streaming()) {
                    (false, false) => "Unary",
                    (true, false) => "ClientStream",
                    (false, true) => "ServerStream",
                    (true, true) => "BidiStream",
                };
                writeln!(
                    code,
                    "Method {{ index: {index}, service: {name:?}, name: {:?}, kind: CallKind::{kind} }},",
                    method.name()
                )
                .expect("a String grows");
                index += 1;
            }
            code.push_str("] },\n");
        }
    }
    for name in REFLECTION {
        writeln!(
            code,
            "Service {{ name: {name:?}, methods: &[Method {{ index: {index}, service: {name:?}, \
             name: \"ServerReflectionInfo\", kind: CallKind::BidiStream }}] }},"
        )
        .expect("a String grows");
        index += 1;
    }
    code.push(']');
    code
}
