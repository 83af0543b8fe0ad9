//! A small HTTP client: one connection that is kept alive, and what one may want to know of an answer.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::sync::OnceCell;

use crate::document::Document;

/// Far longer than any answer takes; a test must end all the same.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(90);

/// A connection to a server.
pub(crate) struct Http {
    address: String,
    sender: SendRequest<Full<Bytes>>,
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    /// Waits for all of it.
    async fn whole(response: http::Response<Incoming>) -> Answer {
        let (head, body) = response.into_parts();
        let body = tokio::time::timeout(TIMEOUT, body.collect()).await;
        Answer {
            status: head.status.as_u16(),
            headers: head.headers,
            body: body
                .expect("the body ends in time")
                .expect("the body is whole")
                .to_bytes(),
        }
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("the body is text")
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        let value = serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("no JSON ({error}): {self:?}"));
        check_bytes(&value);
        value
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("text"))
    }

    /// The answer's JSON, which must have come with success.
    #[track_caller]
    pub(crate) fn ok(&self) -> Value {
        assert!((200..300).contains(&self.status), "{self:?}");
        self.json()
    }

    /// Checks that it is a problem of this kind; returns it.
    #[track_caller]
    pub(crate) fn problem(&self, status: u16, slug: &str) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.header("content-type"), "application/problem+json", "{self:?}");
        let problem = self.json();
        assert_eq!(problem["type"], format!("urn:metastore:problem:{slug}"), "{problem}");
        assert_eq!(problem["status"], status, "{problem}");
        for member in ["title", "detail", "code", "code_name", "action", "next"] {
            assert!(!problem[member].is_null(), "{member} is missing: {problem}");
        }
        problem
    }
}

impl Http {
    /// Connects to `http://host:port`.
    pub(crate) async fn connect(url: &str) -> Http {
        let address = url.strip_prefix("http://").expect("the URL is http").to_owned();
        let stream = TcpStream::connect(&address).await.expect("it connects");
        stream.set_nodelay(true).expect("it is a socket");
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .expect("HTTP/1.1 begins");
        // Its error shows where the connection is used.
        tokio::spawn(async move { drop(connection.await) });
        Http { address, sender }
    }

    async fn begin(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> http::Response<Incoming> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.address);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body)).expect("the request is well formed");
        self.sender.ready().await.expect("the connection lives");
        let answer = tokio::time::timeout(TIMEOUT, self.sender.send_request(request)).await;
        answer.expect("an answer comes in time").expect("an answer comes")
    }

    /// Sends a request and takes the whole answer.
    pub(crate) async fn send(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        let answer = Answer::whole(self.begin(method, path, headers, body.into()).await).await;
        self.document()
            .await
            .check(method, path, answer.status, &answer.headers, Some(&answer.body));
        answer
    }

    /// The document that the answers are held against, which is the same for every server.
    pub(crate) async fn document(&self) -> &'static Document {
        static DOCUMENT: OnceCell<Document> = OnceCell::const_new();
        let fetch = async || {
            let mut http = Http::connect(&format!("http://{}", self.address)).await;
            let response = http.begin("GET", "/api/v1/openapi.json", &[], Bytes::new()).await;
            Document::new(Answer::whole(response).await.ok())
        };
        DOCUMENT.get_or_init(fetch).await
    }

    pub(crate) async fn get(&mut self, path: &str) -> Answer {
        self.send("GET", path, &[], "").await
    }

    /// Asks for history that is gone, on connections of its own. The server says so, and up to where it is gone, if it finds
    /// that out soon enough; otherwise the client is to ask again.
    pub(crate) async fn compacted(&self, path: &str, headers: &[(&str, &str)]) -> Value {
        let begun = Instant::now();
        loop {
            let mut http = Http::connect(&format!("http://{}", self.address)).await;
            let response = http.begin("GET", path, headers, Bytes::new()).await;
            let problem = match response.status() {
                // A stream that has begun says so in its last event.
                StatusCode::OK => {
                    let mut events = Events::new(response.into_body(), http.sender);
                    loop {
                        let event = events.next_any().await.expect("it says why it ends");
                        if event.name == "error" {
                            assert_eq!(events.next_any().await, None, "it ends");
                            break event.data;
                        }
                        assert_eq!(event.name, "progress", "{event:?}");
                    }
                }
                _ => Answer::whole(response).await.problem(410, "revision-compacted"),
            };
            assert_eq!(problem["status"], 410, "{problem}");
            if !problem["compact_revision"].is_null() {
                return problem;
            }
            assert!(begun.elapsed() < TIMEOUT, "{path} is not known to be gone");
        }
    }

    pub(crate) async fn put(&mut self, path: &str, body: impl Into<Bytes>) -> Answer {
        self.send("PUT", path, &[], body).await
    }

    pub(crate) async fn delete(&mut self, path: &str) -> Answer {
        self.send("DELETE", path, &[], "").await
    }

    pub(crate) async fn post_json(&mut self, path: &str, body: &Value) -> Answer {
        let json = [("content-type", "application/json")];
        self.send("POST", path, &json, body.to_string()).await
    }

    /// Writes a key and returns the revision.
    #[track_caller]
    pub(crate) fn put_key(&mut self, key: &str, value: &str) -> impl Future<Output = i64> {
        let (path, value) = (format!("/api/v1/kv/{key}"), value.to_owned());
        async move {
            let answer = self.put(&path, value).await;
            answer.ok()["revision"].as_i64().expect("a revision")
        }
    }

    /// Opens an event stream; the connection is its own from now on.
    pub(crate) async fn events(mut self, path: &str, headers: &[(&str, &str)]) -> Events {
        let answer = self.begin("GET", path, headers, Bytes::new()).await;
        assert_eq!(answer.status(), StatusCode::OK, "{answer:?}");
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        self.document().await.check("GET", path, 200, answer.headers(), None);
        Events::new(answer.into_body(), self.sender)
    }
}

/// Keys and values are there as text or in base64, and never as both.
fn check_bytes(value: &Value) {
    match value {
        Value::Object(members) => {
            for name in ["key", "value"] {
                let has = |name: &str| members.get(name).is_some_and(Value::is_string);
                assert!(!(has(name) && has(&format!("{name}_base64"))), "{value}");
            }
            members.values().for_each(check_bytes);
        }
        Value::Array(items) => items.iter().for_each(check_bytes),
        _ => {}
    }
}

/// A server-sent event.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Event {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) data: Value,
}

/// An event stream.
pub(crate) struct Events {
    body: Incoming,
    text: String,
    events: VecDeque<Event>,
    /// How many comments have come.
    pub(crate) comments: usize,
    _sender: SendRequest<Full<Bytes>>,
}

impl Events {
    fn new(body: Incoming, sender: SendRequest<Full<Bytes>>) -> Events {
        Events {
            body,
            text: String::new(),
            events: VecDeque::new(),
            comments: 0,
            _sender: sender,
        }
    }

    /// The next event whatever it is; `None` at the end of the stream. Comments are passed over, and counted.
    pub(crate) async fn next_any(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            let frame = tokio::time::timeout(TIMEOUT, self.body.frame())
                .await
                .expect("something comes");
            let Some(Ok(frame)) = frame else {
                return None;
            };
            let Ok(data) = frame.into_data() else { continue };
            self.text
                .push_str(std::str::from_utf8(&data).expect("what is sent is ASCII in these tests"));
            while let Some(end) = self.text.find("\n\n") {
                let block: String = self.text.drain(..end + 2).collect();
                let mut event = Event {
                    id: String::new(),
                    name: String::new(),
                    data: Value::Null,
                };
                let mut data = Vec::new();
                for line in block.lines() {
                    match line.split_once(": ") {
                        Some(("id", id)) => event.id = id.to_owned(),
                        Some(("event", name)) => event.name = name.to_owned(),
                        Some(("data", line)) => data.push(line),
                        Some(("", _)) => self.comments += 1,
                        _ => {}
                    }
                }
                if !data.is_empty() {
                    event.data = serde_json::from_str(&data.join("\n")).expect("data is JSON");
                    self.events.push_back(event);
                }
            }
        }
    }

    /// Waits for the next comment that shows that the stream lives. Events that come before it are kept.
    pub(crate) async fn heartbeat(&mut self) {
        const HEARTBEAT: &str = ": heartbeat\n\n";
        loop {
            if let Some(at) = self.text.find(HEARTBEAT) {
                self.text.replace_range(at..at + HEARTBEAT.len(), "");
                return;
            }
            let frame = tokio::time::timeout(TIMEOUT, self.body.frame()).await;
            let frame = frame.expect("something comes").expect("the stream goes on");
            if let Ok(data) = frame.expect("the stream is whole").into_data() {
                let text = std::str::from_utf8(&data).expect("what is sent is ASCII in these tests");
                self.text.push_str(text);
            }
        }
    }

    /// The next change.
    pub(crate) async fn next(&mut self) -> Event {
        loop {
            let event = self.next_any().await.expect("the stream goes on");
            if event.name.is_empty() {
                return event;
            }
        }
    }

    /// The next changes of single keys: type, key, value, revision.
    pub(crate) async fn changes(&mut self, count: usize) -> Vec<(String, String, String, i64)> {
        let mut changes = Vec::new();
        while changes.len() < count {
            let event = self.next().await;
            for change in event.data["events"].as_array().expect("a list") {
                let text = |name: &str| change[name].as_str().unwrap_or_default().to_owned();
                let revision = change["mod_revision"].as_i64().expect("a number");
                assert_eq!(event.id, revision.to_string());
                changes.push((text("type"), text("key"), text("value"), revision));
            }
        }
        changes
    }
}
