//! gRPC reflection.

use api::Limits;
use metastore_frontend::Options;
use tonic_reflection::pb::v1;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1alpha;

use crate::connect;
use crate::fake::Fake;

async fn ask(question: MessageRequest) -> MessageResponse {
    let channel = connect(Fake::new(Limits::default()), Options::default()).await;
    let request = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(question),
    };
    let replies = ServerReflectionClient::new(channel)
        .server_reflection_info(tokio_stream::once(request))
        .await;
    let reply = replies.expect("opens").into_inner().message().await.expect("replies");
    reply.expect("one reply").message_response.expect("it is one")
}

#[tokio::test]
async fn services_are_listed() {
    let MessageResponse::ListServicesResponse(list) = ask(MessageRequest::ListServices(String::new())).await else {
        panic!("no list");
    };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    for service in ["KV", "Watch", "Lease", "Cluster", "Maintenance", "Auth"] {
        assert!(names.contains(&format!("etcdserverpb.{service}").as_str()), "{names:?}");
    }
    for service in [
        "v3lockpb.Lock",
        "v3electionpb.Election",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
    ] {
        assert!(names.contains(&service), "{names:?}");
    }
}

#[tokio::test]
async fn messages_are_described() {
    let symbol = MessageRequest::FileContainingSymbol("etcdserverpb.RangeRequest".to_owned());
    assert!(matches!(ask(symbol).await, MessageResponse::FileDescriptorResponse(_)));
    let file = MessageRequest::FileByFilename("google/api/annotations.proto".to_owned());
    assert!(matches!(ask(file).await, MessageResponse::FileDescriptorResponse(_)));
}

#[tokio::test]
async fn the_older_version_answers_too() {
    use v1alpha::server_reflection_request::MessageRequest;
    let channel = connect(Fake::new(Limits::default()), Options::default()).await;
    let request = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
    let replies = client.server_reflection_info(tokio_stream::once(request)).await;
    let reply = replies.expect("opens").into_inner().message().await.expect("replies");
    assert!(reply.expect("one reply").message_response.is_some());
}
