//! Every method that etcd's API has, whether or not this release offers it.

use tonic::Status;

/// How many messages a call carries each way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallKind {
    /// One request, one reply.
    Unary,
    /// Many requests, one reply.
    ClientStream,
    /// One request, many replies.
    ServerStream,
    /// Many of both.
    BidiStream,
}

impl CallKind {
    /// The value of the metrics' label `grpc_type`.
    pub fn label(self) -> &'static str {
        match self {
            CallKind::Unary => "unary",
            CallKind::ClientStream => "client_stream",
            CallKind::ServerStream => "server_stream",
            CallKind::BidiStream => "bidi_stream",
        }
    }
}

/// A gRPC method.
#[derive(Debug)]
pub struct Method {
    /// Its place among all of them, from 0: for tables.
    pub index: usize,
    /// Its service's full name, such as `etcdserverpb.KV`.
    pub service: &'static str,
    /// Its name, such as `Range`.
    pub name: &'static str,
    /// How many messages it carries.
    pub kind: CallKind,
}

impl Method {
    /// Whether a call may take ever so long although it has one reply: it waits for other clients.
    pub(crate) fn waits(&self) -> bool {
        matches!(
            (self.service, self.name),
            ("v3lockpb.Lock", "Lock") | ("v3electionpb.Election", "Campaign")
        )
    }
}

/// A gRPC service.
#[derive(Debug)]
pub struct Service {
    /// Its full name.
    pub name: &'static str,
    /// What it offers.
    pub methods: &'static [Method],
}

static SERVICES: &[Service] = include!(concat!(env!("OUT_DIR"), "/methods.rs"));

/// All methods, in order of [`Method::index`].
pub fn methods() -> impl Iterator<Item = &'static Method> {
    SERVICES.iter().flat_map(|service| service.methods)
}

/// Finds the method that a request's path names, or says what is wrong with it as grpc-go does.
pub(crate) fn find(path: &str) -> Result<&'static Method, Status> {
    let Some((service_name, name)) = path.strip_prefix('/').unwrap_or(path).rsplit_once('/') else {
        return Err(Status::unimplemented(format!("malformed method name: {path:?}")));
    };
    let Some(service) = SERVICES.iter().find(|service| service.name == service_name) else {
        return Err(Status::unimplemented(format!("unknown service {service_name}")));
    };
    service
        .methods
        .iter()
        .find(|method| method.name == name)
        .ok_or_else(|| Status::unimplemented(format!("unknown method {name} for service {service_name}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes_count_up() {
        for (index, method) in methods().enumerate() {
            assert_eq!(method.index, index);
            let path = format!("/{}/{}", method.service, method.name);
            assert_eq!(find(&path).expect("known").index, index);
        }
    }

    #[test]
    fn unknown_paths_are_refused_in_grpc_go_words() {
        let text = |path| find(path).expect_err(path).message().to_owned();
        assert_eq!(text("/foo.Bar/Baz"), "unknown service foo.Bar");
        assert_eq!(
            text("/etcdserverpb.KV/Nope"),
            "unknown method Nope for service etcdserverpb.KV"
        );
        assert_eq!(text("/lonely"), "malformed method name: \"/lonely\"");
    }
}
