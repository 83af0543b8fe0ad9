//! Changes: `GET /api/v1/watch`, as server-sent events, or one long poll at a time.
//!
//! An event stream's event is everything that changed at one revision, and its id is that revision: a client that comes
//! back with `Last-Event-ID` goes on with the next one, and neither misses nor repeats anything. From time to time there
//! is an event `progress`, whose id says up to where everything was told although nothing matched.
//!
//! Nothing is buffered for a client but the piece that waits for room on its connection. What it does not take stays in
//! the store and is read from there; a client that takes nothing for [`STALL_MAX`] is let go.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use api::kv::{Event, KeyValue};
use api::store::{Events, WatchCreate, WatchOutput, WatchStream};
use api::{Error, Revision, Store};
use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::stream;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderName, HeaderValue};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, timeout, timeout_at};

use super::headers::negotiate;
use super::json::{ChangesBody, Encoding, EventBody};
use super::parameters::{Parameters, Selection, encode, number};
use super::problem::{INVALID_PARAMETER, Problem};
use super::{BASE, Call, JSON, Shared, json_bytes, json_response};

/// The media type of server-sent events.
pub(super) const EVENT_STREAM: &str = "text/event-stream";

/// How long a client may take nothing of what is there for it before its stream ends. It loses nothing by that, but the
/// time to come back.
pub(super) const STALL_MAX: Duration = Duration::from_secs(30);

/// How often a stream without changes says that it lives, unless `heartbeat` says otherwise.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// How long an answer waits to learn that the history that it is to begin with is gone. Usually that shows at once.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a long poll looks through history that has nothing for it.
const LOOK_TIMEOUT: Duration = Duration::from_secs(20);

/// How long to wait, the first time, before progress is asked for again.
const PROGRESS_PAUSE_MIN: Duration = Duration::from_millis(2);

/// Pieces of an event stream are about this large, in bytes; one change of one key exceeds it.
const PIECE_BYTES: usize = 64 << 10;

/// They are sent in parts of this size, in bytes: a client must take one each [`STALL_MAX`].
const PART_BYTES: usize = 16 << 10;

/// A long poll returns once it has this many changes, whole revisions only.
const POLL_EVENTS_MAX: usize = 1000;

/// Or this many bytes of keys and values.
const POLL_BYTES_MAX: usize = 1 << 20;

/// How long a long poll waits for word of how far everything was told, when it has waited in vain.
const PROGRESS_TIMEOUT: Duration = Duration::from_millis(100);

/// How many encoded events are remembered for other streams that send the same.
const ENCODED_MAX: usize = 16;

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

pub(super) async fn watch<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let selection = Selection::of_parameters(&call.parameters)?;
    if selection.is_empty {
        let detail = "no key can be both at or after start and before end";
        return Err(Problem::parameter(INVALID_PARAMETER, "end", detail));
    }
    let start_revision = start_revision(&call)?;
    let only = call.parameters.choice("only");
    let mut watcher = call.store.watch().await;
    let created = watcher.create(WatchCreate {
        id: None,
        key: selection.key,
        range_end: selection.range_end,
        start_revision: start_revision.unwrap_or(0),
        no_put: only == Some("delete"),
        no_delete: only == Some("put"),
        prev_kv: call.parameters.flag("prev"),
        progress_notify: false,
    });
    let created = created.map_err(Problem::from)?;
    // A watcher without a start sees what comes after this revision; it may as well have asked for it.
    let told = start_revision.map_or(created.revision, |start| start - 1);
    match call.parameters.time("wait") {
        Some(wait) => {
            negotiate(&call.headers, &[JSON])?;
            let changes = poll(&call.shared, watcher, told, created.revision, wait).await?;
            let (revision, encoding) = (changes.revision, call.encoding());
            let events = changes.found.iter().flat_map(|events| events.iter());
            Ok(json_response(&ChangesBody {
                revision,
                events: events.filter_map(|event| EventBody::new(event, encoding)).collect(),
                next: next_poll(&call.parameters, revision),
            }))
        }
        None => {
            negotiate(&call.headers, &[EVENT_STREAM])?;
            let heartbeat = call.parameters.time("heartbeat").unwrap_or(HEARTBEAT);
            stream(
                &call.shared,
                watcher,
                told,
                created.revision,
                heartbeat,
                call.encoding(),
            )
            .await
        }
    }
}

/// The first revision that is wanted; `None` for whatever comes next.
fn start_revision<S: Store>(call: &Call<S>) -> Result<Option<Revision>, Problem> {
    let (from, after) = (
        call.parameters.integer("from_revision"),
        call.parameters.integer("after_revision"),
    );
    if from.is_some() && after.is_some() {
        let detail = "from_revision and after_revision exclude each other";
        return Err(Problem::parameter(INVALID_PARAMETER, "after_revision", detail));
    }
    // A browser that comes back repeats its URL: what it saw last counts before where it once began.
    if let Some(last) = call.headers.get(LAST_EVENT_ID).filter(|last| !last.is_empty()) {
        let last = last.to_str().ok().and_then(|last| number(last.trim()));
        return match last.filter(|last| (0..i64::MAX).contains(last)) {
            Some(last) => Ok(Some(last + 1)),
            None => Err(Problem::header(
                "last-event-id",
                "it is no revision, as the ids of this stream are",
            )),
        };
    }
    Ok(from.or_else(|| after.map(|after| after + 1)))
}

/// The next output of a watcher.
async fn next(watcher: &mut impl WatchStream) -> WatchOutput {
    poll_fn(|context| watcher.poll_next(context)).await
}

/// The next output of a watcher that may still be caught up: changes, or word that there were none, or that history is
/// gone. `None` if it takes longer than this.
async fn begin(watcher: &mut impl WatchStream, patience: Duration) -> Option<WatchOutput> {
    let deadline = Instant::now() + patience;
    let mut pause = PROGRESS_PAUSE_MIN;
    while Instant::now() < deadline {
        // Dropped while the watcher is still being caught up, so it is asked for again.
        watcher.request_progress();
        if let Ok(output) = timeout(pause, next(watcher)).await {
            return Some(output);
        }
        pause = (pause * 2).min(PROGRESS_TIMEOUT);
    }
    None
}

/// Splits changes into revisions.
fn by_revision(events: &[Event]) -> impl Iterator<Item = (Revision, &[Event])> {
    let revision = |event: &Event| event.kv.as_ref().map_or(0, |kv| kv.mod_revision);
    let parts = events.chunk_by(move |left, right| revision(left) == revision(right));
    parts.map(move |part| (part.first().map_or(0, revision), part))
}

async fn stream<S: Store>(
    shared: &Arc<Shared<S>>,
    mut watcher: S::Watch,
    told: Revision,
    now: Revision,
    heartbeat: Duration,
    encoding: Encoding,
) -> Result<Response, Problem> {
    // If history is gone the answer says so, and is no stream.
    let first = match told < now {
        true => begin(&mut watcher, BEGIN_TIMEOUT).await,
        false => None,
    };
    if let Some(WatchOutput::Compacted { compact_revision, .. }) = first {
        return Err(Problem::compacted(Some(compact_revision)));
    }
    let (sender, receiver) = mpsc::channel(1);
    let session = Session {
        encoded: Arc::clone(&shared.encoded),
        sender,
        encoding,
        told,
        begins_later: told > now,
    };
    tokio::spawn(session.run(watcher, first, heartbeat, shared.stopping.clone()));
    let pieces = stream::unfold(receiver, |mut receiver| async move {
        let piece = receiver.recv().await?;
        Some((Ok::<_, Error>(piece), receiver))
    });
    let mut response = Response::new(Body::from_stream(pieces));
    let fields = response.headers_mut();
    fields.insert(CONTENT_TYPE, HeaderValue::from_static(EVENT_STREAM));
    fields.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Proxies of the nginx family would hold events back.
    fields.insert(
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    Ok(response)
}

/// One event stream, in a task of its own so that it can end although its client takes nothing.
struct Session {
    encoded: Arc<Encoded>,
    /// Room for one piece.
    sender: mpsc::Sender<Bytes>,
    encoding: Encoding,
    /// Everything up to this revision was told.
    told: Revision,
    /// That revision has not happened yet.
    begins_later: bool,
}

/// The stream is to end: its client is gone or takes nothing.
struct Gone;

impl Session {
    async fn run(
        mut self,
        mut watcher: impl WatchStream,
        first: Option<WatchOutput>,
        heartbeat: Duration,
        stopping: Option<watch::Receiver<bool>>,
    ) {
        let mut stop = pin!(crate::service::stopped(stopping));
        let mut beat = tokio::time::interval_at(Instant::now() + heartbeat, heartbeat);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // At once, so that the client knows where it stands even if nothing happens for long.
        let hello = match self.begins_later {
            false => format!(
                "retry: 1000\nid: {}\nevent: progress\ndata: {{\"revision\":{}}}\n\n",
                self.told, self.told
            ),
            // Nothing can be said of revisions that do not exist yet.
            true => "retry: 1000\n\n".to_owned(),
        };
        if self.send(hello.into()).await.is_err() {
            return;
        }
        if let Some(output) = first
            && self.tell(output).await.is_err()
        {
            return;
        }
        loop {
            // What is taken from the watcher counts as sent: only when there is room.
            match timeout(STALL_MAX, self.sender.reserve()).await {
                Ok(Ok(room)) => drop(room),
                Ok(Err(_)) => return,
                Err(_) => return self.stalled(),
            }
            let closed = self.sender.clone();
            let told = tokio::select! {
                output = next(&mut watcher) => {
                    let told = self.tell(output).await;
                    // What took long to send was a sign of life all the while.
                    beat.reset();
                    told
                }
                _ = beat.tick() => {
                    watcher.request_progress();
                    self.send(Bytes::from_static(b": heartbeat\n\n")).await
                }
                () = closed.closed() => return,
                () = &mut stop => return,
            };
            if told.is_err() {
                return;
            }
        }
    }

    fn stalled(&self) {
        tracing::debug!(
            revision = self.told,
            "an event stream's client takes nothing; its stream ends"
        );
    }

    /// Sends it in small parts: that a slow client takes some of it all the time must show.
    async fn send(&self, mut piece: Bytes) -> Result<(), Gone> {
        while piece.len() > PART_BYTES {
            let part = piece.split_to(PART_BYTES);
            self.send_part(part).await?;
        }
        self.send_part(piece).await
    }

    async fn send_part(&self, piece: Bytes) -> Result<(), Gone> {
        match self.sender.send_timeout(piece, STALL_MAX).await {
            Ok(()) => Ok(()),
            Err(mpsc::error::SendTimeoutError::Closed(_)) => Err(Gone),
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => {
                self.stalled();
                Err(Gone)
            }
        }
    }

    async fn tell(&mut self, output: WatchOutput) -> Result<(), Gone> {
        match output {
            WatchOutput::Events { events, .. } => {
                if let Some(piece) = self.encoded.get(&events, self.encoding) {
                    self.send(piece).await?;
                } else {
                    self.tell_events(&events).await?;
                }
                if let Some((last, _)) = by_revision(&events).last() {
                    self.told = last;
                }
                Ok(())
            }
            WatchOutput::Progress { revision, .. } => {
                if revision < self.told {
                    return Ok(());
                }
                self.told = revision;
                let progress = format!("id: {revision}\nevent: progress\ndata: {{\"revision\":{revision}}}\n\n");
                self.send(progress.into()).await
            }
            WatchOutput::Compacted { compact_revision, .. } => {
                let problem = Problem::compacted(Some(compact_revision)).body();
                let piece = [b"event: error\ndata: ", &problem[..], b"\n\n"].concat();
                self.send(piece.into()).await?;
                Err(Gone)
            }
        }
    }

    async fn tell_events(&self, events: &Arc<Events>) -> Result<(), Gone> {
        let mut writer = Writer::new(self.encoding);
        let mut pieces = 0;
        for (revision, events) in by_revision(events) {
            writer.begin(revision);
            for event in events {
                writer.add(event);
                if writer.piece.len() >= PIECE_BYTES {
                    pieces += 1;
                    self.send(std::mem::take(&mut writer.piece).into()).await?;
                }
            }
            writer.end();
        }
        let piece = Bytes::from(writer.piece);
        if pieces == 0 {
            self.encoded.put(events, self.encoding, &piece);
        }
        self.send(piece).await
    }
}

/// Writes server-sent events.
struct Writer {
    encoding: Encoding,
    is_first: bool,
    piece: Vec<u8>,
}

impl Writer {
    fn new(encoding: Encoding) -> Self {
        Writer {
            encoding,
            is_first: true,
            piece: Vec::new(),
        }
    }

    fn begin(&mut self, revision: Revision) {
        self.is_first = true;
        let head = format!("id: {revision}\ndata: {{\"revision\":{revision},\"events\":[");
        self.piece.extend_from_slice(head.as_bytes());
    }

    fn add(&mut self, event: &Event) {
        let Some(event) = EventBody::new(event, self.encoding) else {
            return;
        };
        if !std::mem::take(&mut self.is_first) {
            // The parts of one event's data are lines, which its reader joins again.
            self.piece.extend_from_slice(b",\ndata: ");
        }
        self.piece.extend_from_slice(&json_bytes(&event));
    }

    fn end(&mut self) {
        self.piece.extend_from_slice(b"]}\n\n");
    }
}

/// The newest events in the form in which they are sent: of a thousand streams that watch the same, the first encodes.
#[derive(Default)]
pub(super) struct Encoded(Mutex<VecDeque<Known>>);

/// Events, and a form that they were sent in.
struct Known {
    /// Keeps the address from being used again.
    events: Weak<Events>,
    encoding: Encoding,
    piece: Bytes,
}

impl Encoded {
    fn get(&self, events: &Arc<Events>, encoding: Encoding) -> Option<Bytes> {
        let known = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let same = |known: &&Known| {
            std::ptr::addr_eq(known.events.as_ptr(), Arc::as_ptr(events)) && known.encoding == encoding
        };
        known.iter().find(same).map(|known| known.piece.clone())
    }

    fn put(&self, events: &Arc<Events>, encoding: Encoding, piece: &Bytes) {
        let mut known = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if known.len() >= ENCODED_MAX {
            known.pop_front();
        }
        known.push_back(Known {
            events: Arc::downgrade(events),
            encoding,
            piece: piece.clone(),
        });
    }
}

/// What a long poll found.
struct Changes {
    /// Everything up to this revision was found.
    revision: Revision,
    found: Vec<Arc<Events>>,
}

/// Everything that changed after `told`, once there is something, or nothing once the time is up.
async fn poll<S: Store>(
    shared: &Shared<S>,
    mut watcher: S::Watch,
    told: Revision,
    current: Revision,
    wait: Duration,
) -> Result<Changes, Problem> {
    let deadline = Instant::now() + wait;
    let mut stop = pin!(crate::service::stopped(shared.stopping.clone()));
    let mut found: Vec<Arc<Events>> = Vec::new();
    let (mut count, mut bytes, mut revision) = (0, 0, told);
    // What is there already is taken in one go; once there is something, what comes later is for the next poll.
    loop {
        let until = match found.is_empty() {
            true if told < current => deadline.max(Instant::now() + PROGRESS_TIMEOUT),
            true => deadline,
            false => Instant::now(),
        };
        let output = tokio::select! {
            biased;
            output = timeout_at(until, next(&mut watcher)) => output,
            () = &mut stop => return Err(Error::Stopped.into()),
        };
        match output {
            Ok(WatchOutput::Events { events, .. }) => {
                count += events.len();
                bytes += events.iter().map(event_bytes).sum::<usize>();
                if let Some((last, _)) = by_revision(&events).last() {
                    revision = last;
                }
                found.push(events);
                if count >= POLL_EVENTS_MAX || bytes >= POLL_BYTES_MAX {
                    break;
                }
            }
            Ok(WatchOutput::Progress { revision: at, .. }) => revision = revision.max(at),
            Ok(WatchOutput::Compacted { compact_revision, .. }) => {
                if found.is_empty() {
                    return Err(Problem::compacted(Some(compact_revision)));
                }
                // The next poll will say so.
                break;
            }
            Err(_) => break,
        }
    }
    if found.is_empty() {
        // With nothing to say of history that takes long to look through, the client would ask for the same for ever.
        let patience = match revision < current {
            true => LOOK_TIMEOUT,
            false => PROGRESS_TIMEOUT,
        };
        let output = tokio::select! {
            biased;
            output = begin(&mut watcher, patience) => output,
            () = &mut stop => return Err(Error::Stopped.into()),
        };
        match output {
            Some(WatchOutput::Progress { revision: at, .. }) => revision = revision.max(at),
            Some(WatchOutput::Events { events, .. }) => {
                if let Some((last, _)) = by_revision(&events).last() {
                    revision = last;
                }
                found.push(events);
            }
            Some(WatchOutput::Compacted { compact_revision, .. }) => {
                return Err(Problem::compacted(Some(compact_revision)));
            }
            // Not caught up yet, or nothing to say: the client asks again from where it was.
            None => {}
        }
    }
    Ok(Changes { revision, found })
}

fn event_bytes(event: &Event) -> usize {
    let kv_bytes = |kv: &KeyValue| kv.key.len() + kv.value.len();
    event.kv.as_ref().map_or(0, kv_bytes) + event.prev_kv.as_ref().map_or(0, kv_bytes)
}

/// Where to ask for what comes after `revision`.
fn next_poll(parameters: &Parameters, revision: Revision) -> String {
    let mut link = format!("{BASE}/watch?after_revision={revision}");
    let mut add = |name: &str, value: &str| {
        link.push('&');
        link.push_str(name);
        link.push('=');
        link.push_str(value);
    };
    for name in ["key", "prefix", "start", "end"] {
        if let Some(bytes) = parameters.bytes(name) {
            add(name, &encode(&bytes));
        }
    }
    if let Some(wait) = parameters.time("wait") {
        add("wait", &format!("{}ms", wait.as_millis()));
    }
    if parameters.flag("prev") {
        add("prev", "true");
    }
    for name in ["only", "encoding"] {
        if let Some(choice) = parameters.choice(name) {
            add(name, choice);
        }
    }
    link
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(key: &'static str, mod_revision: Revision) -> Event {
        Event {
            kv: Some(KeyValue {
                key: Bytes::from_static(key.as_bytes()),
                mod_revision,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_revision_is_one_event_whose_lines_are_json() {
        let events = [event("a", 5), event("b\n", 5), event("c", 7)];
        let mut writer = Writer::new(Encoding::Auto);
        for (revision, events) in by_revision(&events) {
            writer.begin(revision);
            events.iter().for_each(|event| writer.add(event));
            writer.end();
        }
        let text = String::from_utf8(writer.piece).expect("text");
        let sent: Vec<(String, serde_json::Value)> = text
            .split_terminator("\n\n")
            .map(|event| {
                let mut lines = event.lines();
                let id = lines.next().and_then(|line| line.strip_prefix("id: ")).expect("an id");
                let data: Vec<_> = lines.map(|line| line.strip_prefix("data: ").expect("data")).collect();
                (id.to_owned(), serde_json::from_str(&data.join("\n")).expect("JSON"))
            })
            .collect();
        assert_eq!(sent.len(), 2);
        assert_eq!(
            (sent[0].0.as_str(), sent[0].1["events"][1]["key"].as_str()),
            ("5", Some("b\n"))
        );
        assert_eq!(
            (sent[1].0.as_str(), sent[1].1["events"].as_array().map(Vec::len)),
            ("7", Some(1))
        );
    }

    #[test]
    fn what_was_encoded_is_found_again_and_forgotten_in_time() {
        let encoded = Encoded::default();
        let all: Vec<Arc<Events>> = (0..=ENCODED_MAX).map(|_| Events::new(vec![event("a", 5)])).collect();
        for (number, events) in all.iter().enumerate() {
            assert_eq!(encoded.get(events, Encoding::Auto), None);
            encoded.put(events, Encoding::Auto, &Bytes::from(number.to_string()));
        }
        assert_eq!(encoded.get(&all[0], Encoding::Auto), None);
        assert_eq!(encoded.get(&all[1], Encoding::Auto).as_deref(), Some(&b"1"[..]));
        assert_eq!(encoded.get(&all[1], Encoding::Base64), None);
    }
}
