//! The load generator against a server made for it: what it counts, and what it makes of errors, stalls and lost
//! connections. The server speaks HTTP/2 through the h2 crate and answers puts.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use api::kv::{PutRequest, PutResponse, ResponseHeader};
use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use serde_json::Value;

/// How the server behaves.
#[derive(Debug, Default, Clone, Copy)]
struct Behaviour {
    /// Every so many puts are refused with ResourceExhausted; 0 for none.
    refuse_every: u64,
    /// Every so many puts have their stream reset; 0 for none.
    reset_every: u64,
    /// The first connection that has had so many puts says GOAWAY; 0 for never.
    go_away_after: u64,
    /// Once, this long after the first put, all puts wait for `stall_for`.
    stall_after: Duration,
    stall_for: Duration,
}

#[derive(Debug, Default)]
struct Counts {
    puts: AtomicU64,
    refused: AtomicU64,
    reset: AtomicU64,
    gone_away: AtomicBool,
    wrong: AtomicBool,
}

struct Server {
    address: SocketAddr,
    counts: Arc<Counts>,
}

/// Starts a server that lives as long as the process.
fn serve(behaviour: Behaviour) -> Server {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let counts = Arc::new(Counts::default());
    let shared = Arc::clone(&counts);
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let first = Arc::new(std::sync::OnceLock::new());
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                tokio::spawn(connection(socket, behaviour, Arc::clone(&shared), Arc::clone(&first)));
            }
        });
    });
    Server { address, counts }
}

async fn connection(
    socket: tokio::net::TcpStream,
    behaviour: Behaviour,
    counts: Arc<Counts>,
    first: Arc<std::sync::OnceLock<Instant>>,
) {
    let Ok(mut connection) = h2::server::handshake(socket).await else {
        return;
    };
    let mut puts = 0;
    while let Some(Ok((request, respond))) = connection.accept().await {
        puts += 1;
        if puts == behaviour.go_away_after && !counts.gone_away.swap(true, Ordering::Relaxed) {
            connection.graceful_shutdown();
        }
        tokio::spawn(answer(
            request,
            respond,
            behaviour,
            Arc::clone(&counts),
            Arc::clone(&first),
        ));
    }
}

async fn answer(
    request: http::Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
    behaviour: Behaviour,
    counts: Arc<Counts>,
    first: Arc<std::sync::OnceLock<Instant>>,
) {
    let is_put = request.uri().path() == "/etcdserverpb.KV/Put";
    let mut body = request.into_body();
    let mut received = BytesMut::new();
    while let Some(Ok(chunk)) = body.data().await {
        let _ = body.flow_control().release_capacity(chunk.len());
        received.extend_from_slice(&chunk);
    }
    let put = if is_put {
        let put = PutRequest::decode(&received[5..]).unwrap_or_default();
        if put.key.len() != 32 || put.value.len() != 256 || received[0] != 0 {
            counts.wrong.store(true, Ordering::Relaxed);
        }
        counts.puts.fetch_add(1, Ordering::Relaxed) + 1
    } else {
        0 // The deletion in the end.
    };
    let every = |n: u64| is_put && n > 0 && put.is_multiple_of(n);
    if behaviour.stall_for > Duration::ZERO && is_put {
        let elapsed = first.get_or_init(Instant::now).elapsed();
        let end = behaviour.stall_after + behaviour.stall_for;
        if elapsed >= behaviour.stall_after && elapsed < end {
            tokio::time::sleep(end - elapsed).await;
        }
    }
    let response = |status: Option<&str>| {
        let response = http::Response::builder().header("content-type", "application/grpc");
        match status {
            Some(status) => response
                .header("grpc-status", status)
                .header("grpc-message", "no%20room"),
            None => response,
        }
        .body(())
        .unwrap()
    };
    if every(behaviour.reset_every) {
        counts.reset.fetch_add(1, Ordering::Relaxed);
        respond.send_reset(h2::Reason::INTERNAL_ERROR);
    } else if every(behaviour.refuse_every) {
        counts.refused.fetch_add(1, Ordering::Relaxed);
        let _ = respond.send_response(response(Some("8")), true);
    } else if let Ok(mut stream) = respond.send_response(response(None), false) {
        let reply = PutResponse {
            header: ResponseHeader::at(put as i64),
            prev_kv: None,
        };
        let mut frame = BytesMut::new();
        frame.put_u8(0);
        frame.put_u32(reply.encoded_len() as u32);
        reply.encode(&mut frame).unwrap();
        let _ = stream.send_data(frame.freeze(), false);
        let mut trailers = http::HeaderMap::new();
        trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
        let _ = stream.send_trailers(trailers);
    }
}

/// Runs `metastore bench put` with more arguments and returns its exit code and the one round of its JSON.
fn bench(server: &Server, line: &str) -> (ExitCode, Value) {
    let directory = tempfile::tempdir().unwrap();
    let json = directory.path().join("result.json");
    let endpoint = server.address.to_string();
    let mut args: Vec<OsString> = ["put", "--endpoints", &endpoint, "--warmup", "0s", "--json"]
        .map(OsString::from)
        .to_vec();
    args.push(json.clone().into());
    args.extend(line.split_whitespace().map(OsString::from));
    let code = bench::main_with_args(args);
    let text = std::fs::read_to_string(&json).unwrap();
    let document: Value = serde_json::from_str(&text).unwrap();
    (code, document["workloads"][0]["systems"][0]["rounds"][0].clone())
}

fn milliseconds(row: &Value, quantile: &str) -> f64 {
    row["latency"][quantile].as_f64().unwrap() / 1e6
}

#[test]
fn counts_every_put() {
    let server = serve(Behaviour::default());
    let (code, round) = bench(&server, "--total 3000 --clients 16 --connections 4 --threads 2");
    assert_eq!(code, ExitCode::SUCCESS);
    let row = &round["rows"][0];
    assert_eq!(
        (row["done"].as_u64(), row["latency"]["count"].as_u64()),
        (Some(3000), Some(3000))
    );
    assert_eq!(server.counts.puts.load(Ordering::Relaxed), 3000);
    assert!(
        !server.counts.wrong.load(Ordering::Relaxed),
        "a put had another shape than asked for"
    );
    assert!(row["per_second"].as_f64().unwrap() > 100.0);
    assert_eq!(row["errors"], serde_json::json!({}));
    assert!(round["generator"]["cpu_per_op"].as_f64().unwrap() > 0.0);
}

#[test]
fn counts_errors_by_kind() {
    let server = serve(Behaviour {
        refuse_every: 10,
        reset_every: 25,
        ..Default::default()
    });
    let (code, round) = bench(&server, "--total 1000 --clients 8");
    assert_eq!(code, ExitCode::SUCCESS);
    let row = &round["rows"][0];
    let (refused, reset) = (
        server.counts.refused.load(Ordering::Relaxed),
        server.counts.reset.load(Ordering::Relaxed),
    );
    assert_eq!((refused, reset), (80, 40)); // Every 50th is both, and is reset.
    assert_eq!(row["errors"]["ResourceExhausted"]["count"].as_u64(), Some(refused));
    assert_eq!(row["errors"]["ResourceExhausted"]["example"], "no room");
    assert_eq!(row["errors"]["reset"]["count"].as_u64(), Some(reset));
    assert_eq!(row["done"].as_u64(), Some(1000 - refused - reset));
    assert_eq!(round["reconnects"], 0);
}

#[test]
fn connects_again_after_goaway() {
    let server = serve(Behaviour {
        go_away_after: 200,
        ..Default::default()
    });
    let (code, round) = bench(&server, "--total 1000 --clients 8 --connections 1");
    assert_eq!(code, ExitCode::SUCCESS);
    let row = &round["rows"][0];
    let failed: u64 = row["errors"]
        .as_object()
        .unwrap()
        .values()
        .map(|error| error["count"].as_u64().unwrap())
        .sum();
    assert_eq!(row["done"].as_u64().unwrap() + failed, 1000);
    // At most what was on its way when the word came.
    assert!(failed <= 8, "{failed} failed: {}", row["errors"]);
    assert_eq!(round["reconnects"], 1);
}

#[test]
fn an_open_loop_shows_what_a_stall_costs_those_who_come_meanwhile() {
    let stall = Behaviour {
        stall_after: Duration::from_millis(500),
        stall_for: Duration::from_millis(500),
        ..Default::default()
    };
    // 200 puts a second for 2 s, at most 4 at once: a stall of 500 ms holds up some 100, of which 4 are in flight.
    let (code, round) = bench(&serve(stall), "--rate 200 --clients 4 --duration 2s");
    assert_eq!(code, ExitCode::SUCCESS);
    let open = &round["rows"][0];
    let count = open["latency"]["count"].as_u64().unwrap();
    let unsent = round["unsent"].as_u64().unwrap();
    assert_eq!(count + unsent, 400, "{unsent} never sent");
    assert!(milliseconds(open, "max") >= 490.0, "{open}");
    // A quarter of all came during the stall and waited 250 ms on average.
    assert!(milliseconds(open, "p90") >= 150.0, "{open}");

    // The closed loop, by its nature, has but 4 slow ones among many: this is the omission.
    let (_, round) = bench(&serve(stall), "--clients 4 --duration 2s");
    let closed = &round["rows"][0];
    assert!(milliseconds(closed, "max") >= 400.0, "{closed}");
    assert!(
        milliseconds(closed, "p90") < milliseconds(open, "p90"),
        "{closed}, {open}"
    );
}

#[test]
fn what_is_never_sent_is_told() {
    let server = serve(Behaviour {
        stall_after: Duration::ZERO,
        stall_for: Duration::from_secs(1),
        ..Default::default()
    });
    let (_, round) = bench(&server, "--rate 1000 --clients 2 --duration 500ms");
    let unsent = round["unsent"].as_u64().unwrap();
    // Each of the two clients sent one, if it came to it in time.
    assert!((498..=500).contains(&unsent), "{unsent}");
    assert!(
        round["warnings"].to_string().contains("never sent"),
        "{}",
        round["warnings"]
    );
}

#[test]
fn slow_answers_time_out_and_no_success_is_a_failure() {
    let server = serve(Behaviour {
        stall_after: Duration::ZERO,
        stall_for: Duration::from_secs(5),
        ..Default::default()
    });
    let (code, round) = bench(&server, "--total 4 --clients 2 --timeout 500ms");
    assert_eq!(code, ExitCode::FAILURE);
    assert_eq!(round["rows"][0]["errors"]["timeout"]["count"], 4);
    // And with nobody there at all:
    let args = ["put", "--endpoints", "127.0.0.1:1"];
    assert_eq!(bench::main_with_args(args.map(OsString::from)), ExitCode::FAILURE);
}

#[test]
fn two_systems_are_compared_and_drawn() {
    let (a, b) = (serve(Behaviour::default()), serve(Behaviour::default()));
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    let line = format!(
        "put --endpoints {} --vs {} --rounds 2 --pause 0s --warmup 0s --total 200 --clients 4 --pids {}",
        a.address,
        b.address,
        std::process::id()
    );
    let mut args: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
    for (flag, name) in [("--json", "r.json"), ("--plot", "r.svg"), ("--html", "r.html")] {
        args.extend([flag.into(), file(name).into()]);
    }
    assert_eq!(bench::main_with_args(args), ExitCode::SUCCESS);
    let read = |name: &str| std::fs::read_to_string(file(name)).unwrap();
    let document: Value = serde_json::from_str(&read("r.json")).unwrap();
    let outcome = &document["workloads"][0];
    assert_eq!(outcome["systems"][1]["rounds"].as_array().unwrap().len(), 2);
    let compared = outcome["compared"].as_array().unwrap();
    let throughput = compared.iter().find(|line| line["figure"] == "ops/s").unwrap();
    let figure = |name: &str| throughput[name].as_f64().unwrap();
    assert!(figure("lowest") <= figure("highest"));
    assert!((figure("ratio") - figure("a") / figure("b")).abs() < 1e-9);
    assert!(outcome["systems"][0]["rounds"][0]["server"]["source"] == "/proc");
    assert!(read("r.svg").contains("<polyline") && read("r.html").contains("<svg"));
}
