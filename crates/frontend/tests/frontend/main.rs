//! The front ends over a store in memory, as their clients see them.

mod call;
mod cluster;
mod connection;
mod fake;
mod gateway;
mod http;
mod kv;
mod learner;
mod lock;
mod maintenance;
mod reflection;
mod rest;
mod watch;
mod wire;

use std::convert::Infallible;

use hyper_util::rt::TokioIo;
use metastore_frontend::{ConnectionSettings, Frontend, Options, serve_connection};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use fake::Fake;

/// A client's channel to a server of its own, over a pipe in memory.
async fn connect(store: Fake, options: Options) -> Channel {
    let (client, server) = tokio::io::duplex(64 * 1024);
    tokio::spawn(async move {
        let settings = ConnectionSettings::default();
        let frontend = Frontend::new(store, options);
        // Its error says that the client is gone, which ends every test.
        drop(serve_connection(server, frontend, &settings, std::future::pending()).await);
    });
    let mut client = Some(client);
    let connector = tower::service_fn(move |_| {
        let client = client.take().expect("one connection is all there is");
        async move { Ok::<_, Infallible>(TokioIo::new(client)) }
    });
    let endpoint = Endpoint::from_static("http://fake");
    endpoint.connect_with_connector(connector).await.expect("connects")
}

#[track_caller]
fn assert_status<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, text: &str) {
    let status = result.expect_err(text);
    assert_eq!((status.code(), status.message()), (code, text));
}
