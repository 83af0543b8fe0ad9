//! Three members behind one API: what is begun at one of them goes on at another, what becomes of requests without a
//! quorum, who wins where both protocols want the same, and what a server that stops leaves behind.
//!
//! A busy machine may take a leader's pause for its end, so what may be done twice is done again where the cluster had no
//! answer.

use std::os::unix::process::ExitStatusExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{Client, Compare, CompareOp, LockOptions, Txn, TxnOp, TxnOpResponse};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::client::{Answer, Events, Http, TIMEOUT};
use crate::nodes::{Nodes, enable_auth};
use crate::support::{END_TIMEOUT, Node, Storage, code, on_both_engines, status};

on_both_engines! { 600;
    a_stream_goes_on_at_other_members,
    a_stream_goes_on_where_its_past_has_not_come_yet,
    a_line_through_all_members,
    a_lease_at_all_members,
    members_and_their_status,
    users_at_all_members,
    without_a_quorum,
    counting_by_both_protocols,
    creating_by_both_protocols,
    a_server_that_stops,
    a_member_that_stops,
}

/// How long a lease lives that is not to end by itself while a test runs.
const LONG_S: u64 = 3600;

/// Whether the cluster had no answer. The request may have been carried out.
fn is_unanswered(answer: &Answer) -> bool {
    matches!(answer.status, 503 | 504)
}

/// Sends a request until the cluster has an answer to it.
async fn answered(http: &mut Http, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
    let begun = Instant::now();
    loop {
        let answer = http.send(method, path, headers, body.to_owned()).await;
        if !is_unanswered(&answer) {
            return answer;
        }
        assert!(begun.elapsed() < TIMEOUT, "{method} {path}: {answer:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The answer of etcd's API; `None` if the cluster had none. The call may have been carried out.
fn known<T>(result: Result<T, etcd_client::Error>) -> Option<T> {
    match result {
        Ok(answer) => Some(answer),
        Err(error) => {
            let is_unavailable = status(&error).is_some_and(|(code, _)| code == code::UNAVAILABLE);
            assert!(is_unavailable, "{error:?}");
            None
        }
    }
}

/// The same for etcd's lock service, which says of every error that it is unknown.
fn known_of_lock<T>(result: Result<T, etcd_client::Error>) -> Option<T> {
    let error = match result {
        Ok(answer) => return Some(answer),
        Err(error) => error,
    };
    let is_unanswered = status(&error).is_some_and(|(code, message)| {
        let busy = ["no leader", "request timed out", "leader changed", "too many requests"];
        code == code::UNAVAILABLE || code == code::UNKNOWN && busy.iter().any(|busy| message.contains(busy))
    });
    assert!(is_unanswered, "{error:?}");
    None
}

/// Asks again and again until the answer is as it is wanted.
async fn get_until(http: &mut Http, path: &str, what: &str, is_wanted: impl Fn(&Value) -> bool) -> Value {
    let begun = Instant::now();
    loop {
        let answer = http.get(path).await;
        if answer.status == 200 && is_wanted(&answer.json()) {
            return answer.json();
        }
        assert!(begun.elapsed() < TIMEOUT, "{path}: never {what}: {answer:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Writes a key, perhaps more than once; returns the last revision.
async fn put(http: &mut Http, key: &str, value: &str) -> i64 {
    let answer = answered(http, "PUT", &format!("/api/v1/kv/{key}"), &[], value).await;
    answer.ok()["revision"].as_i64().expect("a revision")
}

async fn etcd_put(etcd: &mut Client, key: &str, value: &str) -> i64 {
    let begun = Instant::now();
    loop {
        if let Some(put) = known(etcd.put(key.to_owned(), value.to_owned(), None).await) {
            return put.header().expect("a header").revision();
        }
        assert!(begun.elapsed() < TIMEOUT, "{key} is never written");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn http_at(nodes: &Nodes, member: usize) -> Http {
    Http::connect(nodes.nodes[member].url()).await
}

/// Waits for what must come, whatever a stream sends meanwhile.
async fn in_time<T>(what: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(TIMEOUT, what).await;
    waited.expect("it comes in time")
}

/// A text in an answer.
fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

/// Which of them leads, once all of them say the same.
async fn leader(nodes: &Nodes) -> usize {
    let begun = Instant::now();
    loop {
        let mut statuses = Vec::new();
        for member in 0..nodes.nodes.len() {
            statuses.push(http_at(nodes, member).await.get("/api/v1/status").await.ok());
        }
        let agreed = statuses.iter().all(|one| one["leader_id"] == statuses[0]["leader_id"]);
        let leads = |one: &Value| one["leader_id"] == one["member_id"];
        if let Some(leader) = statuses.iter().position(leads).filter(|_| agreed) {
            return leader;
        }
        assert!(begun.elapsed() < TIMEOUT, "they never agree on a leader: {statuses:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A reader of everything that is written, which goes from member to member and must miss nothing.
struct Reader {
    events: Events,
    /// The id of the last event.
    last: i64,
    seen: Vec<Change>,
}

#[derive(Debug, Clone, PartialEq)]
struct Change {
    revision: i64,
    key: String,
    value: String,
}

impl Reader {
    const PATH: &str = "/api/v1/watch?heartbeat=100ms";

    /// Begins with whatever comes next.
    async fn begin(nodes: &Nodes, member: usize) -> Reader {
        let mut events = http_at(nodes, member).await.events(Reader::PATH, &[]).await;
        let hello = events.next_any().await.expect("a beginning");
        assert_eq!(hello.name, "progress");
        Reader {
            events,
            last: hello.id.parse().expect("a revision"),
            seen: Vec::new(),
        }
    }

    /// Cuts the stream and goes on at this member.
    async fn move_to(&mut self, nodes: &Nodes, member: usize) {
        let last = self.last.to_string();
        let http = http_at(nodes, member).await;
        self.events = http.events(Reader::PATH, &[("last-event-id", &last)]).await;
    }

    /// Takes the next event. Every revision writes one key and all keys are watched, so none may be left out.
    async fn step(&mut self) {
        let event = self.events.next_any().await.expect("the stream goes on");
        if event.name == "progress" {
            assert_eq!(event.id, self.last.to_string(), "what comes before it was told");
            return;
        }
        assert_eq!(event.id, (self.last + 1).to_string(), "{event:?}");
        self.last += 1;
        let changes = event.data["events"].as_array().expect("a list");
        assert_eq!(changes.len(), 1, "{event:?}");
        assert_eq!(changes[0]["mod_revision"], self.last, "{event:?}");
        self.seen.push(Change {
            revision: self.last,
            key: text(&changes[0]["key"]).to_owned(),
            value: text(&changes[0]["value"]).to_owned(),
        });
    }

    async fn step_to(&mut self, revision: i64) {
        in_time(async {
            while self.last < revision {
                self.step().await;
            }
        })
        .await;
    }
}

/// All members are written through, by both protocols, while one reads, is cut off again and again and goes on at another
/// member each time.
async fn a_stream_goes_on_at_other_members(storage: Storage) {
    const EACH: usize = 30;
    const ROUNDS: usize = 30;
    let nodes = Nodes::start(storage, 3);
    let mut reader = Reader::begin(&nodes, 0).await;
    let mut writers = JoinSet::new();
    for member in 0..3 {
        let (mut http, mut etcd) = (http_at(&nodes, member).await, nodes.nodes[member].client().await);
        writers.spawn(async move {
            let mut written = Vec::new();
            for at in 0..EACH {
                let (key, value) = (format!("http/{member}"), at.to_string());
                let revision = put(&mut http, &key, &value).await;
                written.push(Change { revision, key, value });
            }
            written
        });
        writers.spawn(async move {
            let mut written = Vec::new();
            for at in 0..EACH {
                let (key, value) = (format!("etcd/{member}"), at.to_string());
                let revision = etcd_put(&mut etcd, &key, &value).await;
                written.push(Change { revision, key, value });
            }
            written
        });
    }
    let mut to = [2, 1, 0].into_iter().cycle();
    while reader.seen.len() < 6 * EACH {
        for _ in 0..fastrand::usize(1..10) {
            if reader.seen.len() < 6 * EACH {
                in_time(reader.step()).await;
            }
        }
        reader.move_to(&nodes, to.next().expect("it goes round")).await;
    }
    let mut written: Vec<Change> = writers.join_all().await.concat();

    // Now what was seen last was written a moment ago, and where it goes on that may not have come yet.
    let mut at = 0;
    for round in 0..ROUNDS {
        let other = (at + 1) % 3;
        let (key, value) = (format!("round/{round}"), round.to_string());
        let revision = match round % 2 {
            0 => put(&mut http_at(&nodes, other).await, &key, &value).await,
            _ => etcd_put(&mut nodes.nodes[other].client().await, &key, &value).await,
        };
        written.push(Change { revision, key, value });
        reader.step_to(revision).await;
        at = to.next().expect("it goes round");
        reader.move_to(&nodes, at).await;
    }
    let end = put(&mut http_at(&nodes, 0).await, "end", "").await;
    reader.step_to(end).await;
    // That there is neither a gap nor a repetition was checked on the way. This is what was written, where it was written.
    let first = reader.seen[0].revision;
    for change in written {
        let at = usize::try_from(change.revision - first).expect("it was written after the first");
        assert_eq!(reader.seen[at], change);
    }
}

/// Stops a process in its tracks, or lets it go on.
fn send(node: &Node, signal: Signal) {
    let pid = i32::try_from(node.pid()).ok().and_then(Pid::from_raw);
    kill_process(pid.expect("a process"), signal).expect("a signal can be sent to a child");
}

/// A client may come to a member with an id that this member has not heard of: it waits for what comes after that.
async fn a_stream_goes_on_where_its_past_has_not_come_yet(storage: Storage) {
    const PATH: &str = "/api/v1/watch?prefix=mark/&heartbeat=100ms";
    let nodes = Nodes::start(storage, 3);
    let behind = (leader(&nodes).await + 1) % 3;
    let others = [(behind + 1) % 3, (behind + 2) % 3];
    let mut events = http_at(&nodes, others[0]).await.events(PATH, &[]).await;
    let mut http = http_at(&nodes, others[1]).await;
    put(&mut http, "mark/1", "1").await;

    // One member misses more than sockets and pipelines hold. The others stop before it goes on.
    send(&nodes.nodes[behind], Signal::STOP);
    let ballast = "v".repeat(1_000_000);
    for _ in 0..40 {
        put(&mut http, "ballast", &ballast).await;
    }
    let revision = put(&mut http, "mark/2", "2").await;
    let last = loop {
        let event = in_time(events.next()).await;
        if event.data["events"][0]["key"] == "mark/2" && event.id == revision.to_string() {
            break event.id;
        }
    };
    drop(events);
    for other in others {
        send(&nodes.nodes[other], Signal::STOP);
    }
    send(&nodes.nodes[behind], Signal::CONT);

    let resume = [("last-event-id", &*last)];
    let mut events = http_at(&nodes, behind).await.events(PATH, &resume).await;
    let mut http = http_at(&nodes, behind).await;
    let known = http.get("/api/v1/kv?count_only=true&serializable=true").await.ok();
    assert!(known["revision"].as_i64() < Some(revision), "it is not behind: {known}");
    events.heartbeat().await;
    let path = format!("/api/v1/watch?after_revision={revision}&prefix=mark/&wait=100ms");
    let polled = http.get(&path).await.ok();
    assert_eq!(polled, json!({"revision": revision, "events": [], "next": path}));

    for other in others {
        send(&nodes.nodes[other], Signal::CONT);
    }
    let next = put(&mut http_at(&nodes, others[1]).await, "mark/3", "3").await;
    loop {
        let event = in_time(events.next_any()).await.expect("the stream goes on");
        let id: i64 = event.id.parse().expect("a revision");
        // Whatever it says of its place is never less than what the client knows.
        if event.name == "progress" {
            assert!(id >= revision, "{event:?}");
            continue;
        }
        assert_eq!(
            event.data["events"][0]["key"], "mark/3",
            "it was told before: {event:?}"
        );
        if id == next {
            break;
        }
    }
}

/// Grants a lease of this id that does not end while a test runs.
async fn grant(http: &mut Http, id: &str) -> String {
    let headers = [("content-type", "application/json")];
    let lease = json!({"ttl": LONG_S, "id": id}).to_string();
    let granted = answered(http, "POST", "/api/v1/leases", &headers, &lease).await;
    // It is there already if the first answer was lost.
    assert!(matches!(granted.status, 201 | 409), "{granted:?}");
    id.to_owned()
}

async fn wait_for_line(http: &mut Http, name: &str, waiting: i64) -> Value {
    let path = format!("/api/v1/locks/{name}");
    get_until(http, &path, "so many in line", |lock| lock["waiting"] == waiting).await
}

/// One line, whichever protocol and member one stands in it by: first come, first served.
async fn a_line_through_all_members(storage: Storage) {
    let nodes = Nodes::start(storage, 3);
    let mut http = http_at(&nodes, 0).await;
    // With leases of their own they may ask twice.
    let mine = grant(&mut http, "a1").await;
    let held = answered(&mut http, "POST", &format!("/api/v1/locks/line?lease={mine}"), &[], "")
        .await
        .ok();
    let last = grant(&mut http, "a3").await;

    let mut etcd = Client::connect([nodes.nodes[2].url()], None).await.unwrap();
    let theirs = grant(&mut http, "a2").await;
    let options = LockOptions::new().with_lease(0xa2);
    let mut second = etcd.clone();
    let second = tokio::spawn(async move {
        loop {
            if let Some(locked) = known_of_lock(second.lock("line", Some(options.clone())).await) {
                return locked.key().to_vec();
            }
        }
    });
    wait_for_line(&mut http, "line", 1).await;
    let mut third = http_at(&nodes, 1).await;
    let path = format!("/api/v1/locks/line?lease={last}&wait=300s");
    let third = tokio::spawn(async move { answered(&mut third, "POST", &path, &[], "").await });
    let line = wait_for_line(&mut http, "line", 2).await;
    assert_eq!(line["holder"]["lease"], held["lease"]);
    assert_eq!(line["waiters"][0]["lease"], *theirs);
    assert!(!second.is_finished() && !third.is_finished());

    let mut other = http_at(&nodes, 1).await;
    let path = format!("/api/v1/locks/line?lease={}", text(&held["lease"]));
    let released = answered(&mut other, "DELETE", &path, &[], "").await;
    assert!(matches!(released.status, 200 | 404), "{released:?}");
    let key = in_time(second).await.unwrap();
    assert_eq!(key, format!("line/{theirs}").into_bytes());
    let line = wait_for_line(&mut http, "line", 1).await;
    assert_eq!(line["holder"]["lease"], *theirs);
    assert!(!third.is_finished());
    let begun = Instant::now();
    while known_of_lock(etcd.unlock(key.clone()).await).is_none() {
        assert!(begun.elapsed() < TIMEOUT, "it is never given back");
    }
    let last = third.await.unwrap().ok();
    let line = wait_for_line(&mut http, "line", 0).await;
    assert_eq!(line["holder"]["lease"], last["lease"]);
    assert_ne!(last["lease"], held["lease"]);
    assert!(last["revision"].as_i64() > held["revision"].as_i64());
}

/// What one member has answered holds at all others at once.
async fn a_lease_at_all_members(storage: Storage) {
    let nodes = Nodes::start(storage, 3);
    let mut http = Vec::new();
    for member in 0..3 {
        http.push(http_at(&nodes, member).await);
    }
    for round in 0..100 {
        let at = [round % 3, (round + 1) % 3, (round + 2) % 3];
        let ttl = json!({"ttl": LONG_S}).to_string();
        let headers = [("content-type", "application/json")];
        let granted = answered(&mut http[at[0]], "POST", "/api/v1/leases", &headers, &ttl)
            .await
            .ok();
        let path = format!("/api/v1/leases/{}", text(&granted["id"]));
        let keep_alive = format!("{path}/keep-alive");
        let kept = answered(&mut http[at[1]], "POST", &keep_alive, &[], "").await.ok();
        assert_eq!(kept, json!({"id": granted["id"], "ttl": LONG_S}));
        for key in ["a", "b"] {
            let put = format!("/api/v1/kv/leased/{key}?lease={}", text(&granted["id"]));
            answered(&mut http[at[0]], "PUT", &put, &[], "x").await.ok();
        }
        let seen = answered(&mut http[at[2]], "GET", &format!("{path}?keys=true"), &[], "")
            .await
            .ok();
        let mut keys: Vec<&str> = seen["keys"]
            .as_array()
            .unwrap()
            .iter()
            .map(|key| text(&key["key"]))
            .collect();
        keys.sort_unstable();
        assert_eq!(
            (keys, &seen["granted_ttl"]),
            (vec!["leased/a", "leased/b"], &LONG_S.into())
        );

        let revoked = answered(&mut http[at[1]], "DELETE", &path, &[], "").await;
        // Gone already, if the first answer to it was lost.
        assert!(matches!(revoked.status, 200 | 404), "{revoked:?}");
        for http in &mut http {
            let gone = answered(http, "GET", "/api/v1/kv/leased/a", &[], "").await;
            gone.problem(404, "key-not-found");
            answered(http, "GET", &path, &[], "")
                .await
                .problem(404, "lease-not-found");
            answered(http, "POST", &keep_alive, &[], "")
                .await
                .problem(404, "lease-not-found");
        }
    }
}

async fn members_and_their_status(storage: Storage) {
    let nodes = Nodes::start(storage, 3);
    let begun = Instant::now();
    // Of one term: there may be an election while they are asked.
    let (leader, members, statuses) = loop {
        let leader = leader(&nodes).await;
        let revision = put(&mut http_at(&nodes, 0).await, "k", "v").await;
        let mut members = Vec::new();
        let mut statuses = Vec::new();
        for member in 0..3 {
            let mut http = http_at(&nodes, member).await;
            members.push(answered(&mut http, "GET", "/api/v1/members", &[], "").await.ok());
            let what = "at the newest revision";
            let is_newest = |status: &Value| status["revision"] == revision;
            statuses.push(get_until(&mut http, "/api/v1/status", what, is_newest).await);
        }
        let leads = &statuses[leader]["member_id"];
        let is_settled = |one: &Value| one["raft_term"] == statuses[0]["raft_term"] && one["leader_id"] == *leads;
        if statuses.iter().all(is_settled) {
            break (leader, members, statuses);
        }
        assert!(begun.elapsed() < TIMEOUT, "they never agree: {statuses:?}");
    };
    assert!(members.iter().all(|list| *list == members[0]), "{members:?}");
    let list = members[0]["members"].as_array().unwrap();
    let mut names: Vec<&str> = list.iter().map(|member| text(&member["name"])).collect();
    names.sort_unstable();
    assert_eq!(names, ["m0", "m1", "m2"]);
    let id_of = |member: usize| {
        let name = format!("m{member}");
        let found = list.iter().find(|one| one["name"] == *name);
        let found = found.unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!(found["client_urls"], json!([nodes.nodes[member].url()]));
        assert_eq!(found["is_learner"], false);
        found["id"].clone()
    };
    for (member, status) in statuses.iter().enumerate() {
        assert_eq!(status["member_id"], id_of(member), "{status}");
        assert_eq!(status["leader_id"], id_of(leader), "{status}");
        assert_eq!(status["cluster_id"], members[0]["cluster_id"], "{status}");
        assert_eq!(status["raft_term"], statuses[0]["raft_term"], "{status}");
        assert_eq!((&status["is_learner"], &status["errors"]), (&false.into(), &json!([])));
    }
    // So that one of them is a follower's.
    let followers = statuses
        .iter()
        .filter(|status| status["leader_id"] != status["member_id"]);
    assert_eq!(followers.count(), 2, "{statuses:?}");
}

/// A token is good at every member at once, as is a password.
async fn users_at_all_members(storage: Storage) {
    // That of `root:secret` and `ann:secret`.
    const ROOT: &str = "Basic cm9vdDpzZWNyZXQ=";
    const ANN: &str = "Basic YW5uOnNlY3JldA==";
    let nodes = Nodes::start_with(storage, 3, &["--bcrypt-cost=4"]);
    let mut etcd = nodes.nodes[2].client().await;
    enable_auth(&mut etcd).await;

    for round in 0..20 {
        let [giver, taker, third] = [round % 3, (round + 2) % 3, (round + 1) % 3];
        let shown = [("authorization", ANN)];
        let mut http = http_at(&nodes, giver).await;
        let given = answered(&mut http, "POST", "/api/v1/auth/token", &shown, "").await.ok();
        let token = format!("Bearer {}", text(&given["token"]));
        let shown = [("authorization", &*token)];
        let mut http = http_at(&nodes, taker).await;
        let value = round.to_string();
        answered(&mut http, "PUT", "/api/v1/kv/app/a", &shown, &value)
            .await
            .ok();
        let denied = answered(&mut http, "GET", "/api/v1/kv/other", &shown, "").await;
        denied.problem(403, "permission-denied");
        let mut http = http_at(&nodes, third).await;
        for user in [ANN, ROOT] {
            let shown = [("authorization", user)];
            let answer = answered(&mut http, "GET", "/api/v1/kv/app/a", &shown, "").await;
            assert_eq!((answer.status, answer.text()), (200, &*value), "{answer:?}");
        }
        let nobody = answered(&mut http, "GET", "/api/v1/kv/app/a", &[], "").await;
        nobody.problem(401, "unauthenticated");
    }
}

/// One member of three alone tells what it has and that it lives, refuses the rest in a bounded time, and goes on once the
/// others are back.
async fn without_a_quorum(storage: Storage) {
    let mut nodes = Nodes::start(storage, 3);
    let mut http = http_at(&nodes, 2).await;
    let path = "/api/v1/watch?prefix=q/&heartbeat=200ms";
    let mut events = http_at(&nodes, 2).await.events(path, &[]).await;
    assert_eq!(events.next_any().await.expect("a beginning").name, "progress");
    let first = put(&mut http_at(&nodes, 0).await, "q/before", "1").await;
    let event = in_time(events.next()).await;
    assert_eq!(
        (&event.id, &event.data["events"][0]["key"]),
        (&first.to_string(), &"q/before".into())
    );

    nodes.nodes[0].kill();
    nodes.nodes[1].kill();
    // Whether there still seems to be a leader, or is known to be none.
    for round in 0..2 {
        let mut asked = JoinSet::new();
        for (method, path) in [
            ("PUT", "/api/v1/kv/other"),
            ("GET", "/api/v1/kv/q/before"),
            ("GET", "/api/v1/kv?prefix=q/"),
            ("DELETE", "/api/v1/kv/other"),
            ("POST", "/api/v1/locks/lock?wait=2s"),
            ("GET", "/api/v1/locks/lock"),
            ("GET", "/api/v1/members"),
        ] {
            let mut http = http_at(&nodes, 2).await;
            asked.spawn(async move { (method, path, http.send(method, path, &[], "").await) });
        }
        for (method, path, refused) in asked.join_all().await {
            assert!(is_unanswered(&refused), "{method} {path}: {refused:?}");
            let problem = match refused.status {
                503 => refused.problem(503, "unavailable"),
                _ => refused.problem(504, "timeout"),
            };
            assert_eq!(problem["action"], "retry");
            // When to come back is said where nothing can have been done yet.
            let retry_after = if refused.status == 503 { "1" } else { "" };
            assert_eq!(refused.header("retry-after"), retry_after, "{refused:?}");
        }
        // What it has itself.
        let own = http.get("/api/v1/kv/q/before?serializable=true").await;
        assert_eq!((own.status, own.text()), (200, "1"));
        let own = http.get("/api/v1/kv?prefix=q/&serializable=true").await.ok();
        assert_eq!(own["kvs"][0]["key"], "q/before");
        assert_eq!(
            http.get("/api/v1/members?serializable=true").await.ok()["members"]
                .as_array()
                .map(Vec::len),
            Some(3)
        );
        let free = http.get("/api/v1/locks/lock?serializable=true").await.ok();
        assert_eq!(free["held"], false);
        // Whoever watches waits for what comes, which is nothing.
        let path = format!("/api/v1/watch?prefix=q/&after_revision={first}&wait=1s");
        let polled = http.get(&path).await.ok();
        assert_eq!((&polled["events"], &polled["revision"]), (&json!([]), &first.into()));
        let polled = http.get("/api/v1/watch?prefix=q/&wait=1s").await.ok();
        assert_eq!(polled["events"], json!([]));
        let polled = http
            .get(&format!("/api/v1/watch?prefix=q/&from_revision={first}&wait=60s"))
            .await
            .ok();
        assert_eq!(polled["events"][0]["key"], "q/before");
        for _ in 0..3 {
            events.heartbeat().await;
        }
        if round == 0 {
            let what = "without a leader";
            get_until(&mut http, "/api/v1/status", what, |status| {
                status["leader_id"].is_null()
            })
            .await;
        }
    }

    nodes.start_again(&[0, 1]);
    let mut writer = http_at(&nodes, 0).await;
    let second = put(&mut writer, "q/after", "2").await;
    let own = answered(&mut http, "GET", "/api/v1/kv/q/after", &[], "").await;
    assert_eq!((own.status, own.text()), (200, "2"));
    let lease = grant(&mut http, "a5").await;
    let path = format!("/api/v1/locks/again?lease={lease}&wait=60s");
    answered(&mut http, "POST", &path, &[], "").await.ok();
    // The stream has lived through it, and one that comes back at another member misses nothing either.
    let resume = [("last-event-id", &*first.to_string())];
    let resumed = http_at(&nodes, 1)
        .await
        .events("/api/v1/watch?prefix=q/", &resume)
        .await;
    for mut events in [events, resumed] {
        loop {
            let event = in_time(events.next()).await;
            assert_eq!(event.data["events"][0]["key"], "q/after", "{event:?}");
            if event.id == second.to_string() {
                break;
            }
        }
    }
}

/// A counter of several writers: how much each of them has added.
const COUNTERS: usize = 10;

/// What a writer knows of its own part of a counter.
#[derive(Default)]
struct Part {
    writer: usize,
    added: u64,
    /// A write was not answered, and may have been carried out.
    is_unknown: bool,
    lost: usize,
}

impl Part {
    /// Holds what was read against what this writer has added: a write that was overwritten would be missing. Returns what
    /// to write next, or nothing if all is done.
    fn next(&mut self, read: &[u8]) -> Option<String> {
        let mut counts: Vec<u64> = serde_json::from_slice(read).expect("a list of numbers");
        if self.is_unknown && counts[self.writer] == self.added + 1 {
            self.has_won();
        }
        assert_eq!(
            counts[self.writer], self.added,
            "what was added is not there: {counts:?}"
        );
        counts[self.writer] += 1;
        (self.added < EACH_ADDS).then(|| serde_json::to_string(&counts).expect("numbers"))
    }

    fn has_won(&mut self) {
        self.added += 1;
        self.is_unknown = false;
    }
}

const EACH_ADDS: u64 = 20;

async fn count_by_http(mut http: Http, path: String, writer: usize) -> usize {
    let mut part = Part {
        writer,
        ..Part::default()
    };
    loop {
        let read = answered(&mut http, "GET", &path, &[], "").await;
        let Some(next) = part.next(&read.body) else {
            return part.lost;
        };
        let condition = [("if-match", read.header("etag"))];
        let written = http.send("PUT", &path, &condition, next).await;
        match written.status {
            200 => part.has_won(),
            412 => {
                written.problem(412, "precondition-failed");
                part.lost += 1;
            }
            _ => {
                assert!(is_unanswered(&written), "{written:?}");
                part.is_unknown = true;
            }
        }
    }
}

async fn count_by_etcd(mut etcd: Client, key: String, writer: usize) -> usize {
    let mut part = Part {
        writer,
        ..Part::default()
    };
    loop {
        let Some(read) = known(etcd.get(key.clone(), None).await) else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let kv = &read.kvs()[0];
        let Some(next) = part.next(kv.value()) else {
            return part.lost;
        };
        let txn = Txn::new()
            .when([Compare::mod_revision(key.clone(), CompareOp::Equal, kv.mod_revision())])
            .and_then([TxnOp::put(key.clone(), next, None)]);
        match known(etcd.txn(txn).await).map(|done| done.succeeded()) {
            Some(true) => part.has_won(),
            Some(false) => part.lost += 1,
            None => part.is_unknown = true,
        }
    }
}

/// Ten writers add to one counter, each protocol in its own way and through all members: nothing that was added is lost,
/// although both had to try again.
async fn counting_by_both_protocols(storage: Storage) {
    let nodes = Nodes::start(storage, 3);
    let (mut lost_by_http, mut lost_by_etcd) = (0, 0);
    let begun = Instant::now();
    for round in 0.. {
        let key = format!("count/{round}");
        let path = format!("/api/v1/kv/{key}");
        put(
            &mut http_at(&nodes, 0).await,
            &key,
            &json!(vec![0; COUNTERS]).to_string(),
        )
        .await;
        let (mut by_http, mut by_etcd) = (JoinSet::new(), JoinSet::new());
        for writer in 0..COUNTERS / 2 {
            let http = http_at(&nodes, writer % 3).await;
            by_http.spawn(count_by_http(http, path.clone(), writer));
            let etcd = nodes.nodes[(writer + 1) % 3].client().await;
            by_etcd.spawn(count_by_etcd(etcd, key.clone(), COUNTERS / 2 + writer));
        }
        lost_by_http += by_http.join_all().await.iter().sum::<usize>();
        lost_by_etcd += by_etcd.join_all().await.iter().sum::<usize>();
        for member in 0..3 {
            let read = answered(&mut http_at(&nodes, member).await, "GET", &path, &[], "").await;
            let counts: Vec<u64> = serde_json::from_slice(&read.body).expect("a list of numbers");
            assert_eq!(
                (counts.iter().sum::<u64>(), &*counts),
                (200, &[EACH_ADDS; COUNTERS][..])
            );
        }
        if lost_by_http > 0 && lost_by_etcd > 0 {
            break;
        }
        assert!(
            begun.elapsed() < TIMEOUT,
            "lost by HTTP: {lost_by_http}, by etcd: {lost_by_etcd}"
        );
    }
}

/// Both want to be the first to write a key: one of them is, and the other hears of it.
async fn creating_by_both_protocols(storage: Storage) {
    const KEYS: usize = 50;
    let nodes = Nodes::start(storage, 3);
    let begun = Instant::now();
    let (mut decided, mut won_by_http, mut won_by_etcd) = (0, 0, 0);
    let first = AtomicUsize::new(0);
    // Whoever begins later may win as well, in the long run.
    while decided < KEYS || won_by_http == 0 || won_by_etcd == 0 {
        assert!(
            begun.elapsed() < 4 * TIMEOUT,
            "{decided}: {won_by_http} by HTTP, {won_by_etcd} by etcd"
        );
        let number = first.fetch_add(1, Ordering::Relaxed);
        let key = format!("first/{number}");
        let path = format!("/api/v1/kv/{key}");
        let mut http = http_at(&nodes, number % 3).await;
        let mut etcd = nodes.nodes[(number + 1) % 3].client().await;
        // Both are connected when they start.
        etcd.get(&*key, None).await.map(drop).unwrap_or_default();
        let barrier = Arc::new(tokio::sync::Barrier::new(2));
        let by_http = {
            let (barrier, path) = (Arc::clone(&barrier), path.clone());
            tokio::spawn(async move {
                barrier.wait().await;
                http.send("PUT", &path, &[("if-none-match", "*")], "http").await
            })
        };
        let by_etcd = {
            let txn = Txn::new()
                .when([Compare::create_revision(&*key, CompareOp::Equal, 0)])
                .and_then([TxnOp::put(&*key, "etcd", None)])
                .or_else([TxnOp::get(&*key, None)]);
            tokio::spawn(async move {
                barrier.wait().await;
                etcd.txn(txn).await
            })
        };
        let (by_http, by_etcd) = (by_http.await.unwrap(), known(by_etcd.await.unwrap()));
        let Some(by_etcd) = by_etcd.filter(|_| !is_unanswered(&by_http)) else {
            // Who has won is not known; there are more keys.
            continue;
        };
        decided += 1;
        let read = answered(&mut http_at(&nodes, (number + 2) % 3).await, "GET", &path, &[], "").await;
        assert_eq!(read.header("metastore-version"), "1", "{read:?}");
        if by_etcd.succeeded() {
            won_by_etcd += 1;
            let problem = by_http.problem(412, "precondition-failed");
            assert_eq!(problem["mod_revision"], by_etcd.header().unwrap().revision());
            assert_eq!(read.text(), "etcd");
        } else {
            won_by_http += 1;
            assert_eq!(by_http.status, 201, "{by_http:?}");
            assert_eq!(by_http.header("etag"), read.header("etag"));
            assert_eq!(read.text(), "http");
            let [TxnOpResponse::Get(seen)] = &by_etcd.op_responses()[..] else {
                panic!("{by_etcd:?}");
            };
            assert_eq!(seen.kvs()[0].value(), b"http");
        }
    }
}

/// Sends a request and leaves the answer where it is.
async fn ask(node: &Node, path: &str) -> TcpStream {
    let address = node.url().strip_prefix("http://").expect("the URL is http");
    let mut stream = TcpStream::connect(address).await.expect("it connects");
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("it takes a request");
    stream
}

/// How many watchers a member says it has.
async fn watchers(node: &Node) -> u64 {
    let mut stream = ask(node, "/metrics").await;
    let mut metrics = Vec::new();
    let name = b"\netcd_debugging_mvcc_watcher_total ";
    loop {
        let found = metrics.windows(name.len()).position(|window| window == name);
        let rest = found.map(|at| &metrics[at + name.len()..]);
        if let Some(line) = rest.and_then(|rest| rest.split_inclusive(|byte| *byte == b'\n').next())
            && line.ends_with(b"\n")
        {
            let number = std::str::from_utf8(line).expect("text");
            return number.trim().parse().expect("a number");
        }
        let read = stream.read_buf(&mut metrics);
        let read = tokio::time::timeout(TIMEOUT, read).await.expect("it answers in time");
        assert_ne!(read.expect("it answers"), 0, "there is no such metric");
    }
}

/// What a server that stops owes to those who wait for it: a stream ends as a stream ends, a poll and whoever stands in
/// line hear of it, and the place in line is not left to bar others.
async fn stop_with_everything_open(nodes: &mut Nodes, stopping: usize) {
    let mut http = http_at(nodes, stopping).await;
    let node = &nodes.nodes[stopping];
    let before = watchers(node).await;
    let lease = grant(&mut http, "b1").await;
    let path = format!("/api/v1/locks/line?lease={lease}");
    let held = answered(&mut http, "POST", &path, &[], "").await.ok();
    let mut stream = ask(node, "/api/v1/watch?prefix=s/").await;
    let reading = tokio::spawn(async move {
        let mut answer = Vec::new();
        let ended = tokio::time::timeout(5 * END_TIMEOUT, stream.read_to_end(&mut answer)).await;
        ended.expect("the stream ends").expect("it ends without an error");
        String::from_utf8(answer).expect("text")
    });
    let mut poller = http_at(nodes, stopping).await;
    let poll = "/api/v1/watch?prefix=s/&wait=300s";
    let polling = tokio::spawn(async move { poller.get(poll).await });
    let mut waiter = http_at(nodes, stopping).await;
    let path = format!("/api/v1/locks/line?ttl={LONG_S}&wait=300s");
    let waiting = tokio::spawn(async move { waiter.send("POST", &path, &[], "").await });
    let line = wait_for_line(&mut http, "line", 1).await;
    let theirs = line["waiters"][0]["lease"].clone();
    let begun = Instant::now();
    // Whoever stands in line watches who is before it, and its own place.
    while watchers(node).await < before + 4 {
        assert!(begun.elapsed() < TIMEOUT, "they do not all wait");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!reading.is_finished() && !polling.is_finished() && !waiting.is_finished());

    let ended = nodes.nodes[stopping].terminate();
    assert_eq!(
        ended.signal(),
        Some(Signal::TERM.as_raw()),
        "{}",
        nodes.nodes[stopping].log()
    );
    let read = reading.await.unwrap();
    assert!(
        read.starts_with("HTTP/1.1 200 OK\r\n") && read.contains("\nevent: progress\n"),
        "{read}"
    );
    assert!(read.ends_with("\r\n0\r\n\r\n"), "the body is cut: {read}");
    for answer in [polling.await.unwrap(), waiting.await.unwrap()] {
        let problem = answer.problem(503, "unavailable");
        assert_eq!(problem["detail"], "etcdserver: server stopped");
        assert_eq!(answer.header("retry-after"), "1");
    }

    // With other members it is seen there, alone only by itself.
    let mut http = match nodes.nodes.len() {
        1 => {
            nodes.start_again(&[stopping]);
            http_at(nodes, stopping).await
        }
        count => http_at(nodes, (stopping + 1) % count).await,
    };
    let line = wait_for_line(&mut http, "line", 0).await;
    assert_eq!(line["holder"]["lease"], held["lease"]);
    let what = format!("without {theirs}");
    let is_alone = |leases: &Value| leases["leases"] == json!([held["lease"]]);
    get_until(&mut http, "/api/v1/leases", &what, is_alone).await;
    if nodes.nodes.len() > 1 {
        nodes.start_again(&[stopping]);
    }
    // Nobody is left who would bar the next.
    let path = format!("/api/v1/locks/line?lease={}", text(&held["lease"]));
    let released = answered(&mut http, "DELETE", &path, &[], "").await;
    assert!(matches!(released.status, 200 | 404), "{released:?}");
    let mut http = http_at(nodes, stopping).await;
    answered(&mut http, "POST", "/api/v1/locks/line", &[], "").await.ok();
}

async fn a_server_that_stops(storage: Storage) {
    let mut nodes = Nodes::start(storage, 1);
    stop_with_everything_open(&mut nodes, 0).await;
}

/// The leader, whose place in the cluster another has to take.
async fn a_member_that_stops(storage: Storage) {
    let mut nodes = Nodes::start(storage, 3);
    let leader = leader(&nodes).await;
    stop_with_everything_open(&mut nodes, leader).await;
}
