//! Calls to a peer: requests that wait for a connection, and those that wait for an answer.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::limits::ETCD_CLUSTER_VERSION;
use bytes::{Buf as _, Bytes};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use super::MemberId;
use super::accept::{Ended, bounds};
use super::address::PeerUrl;
use super::dial::{Bounds, Connection, DialError, dial, dial_peer};
use super::frame::take_u64;
use super::handler::{Purpose, Refusal};
use super::settings::{Settings, Tls};
use super::shared::{Backoff, PeerState, Shared, random};
use super::stream::{Reader, Writer};
use super::wire::{Hello, decode_close, kind};

/// Bytes around a request or an answer in its frame.
pub(super) const OVERHEAD: usize = 10;
/// The answer is there.
pub(super) const STATUS_OK: u8 = 0;
/// The answer is longer than a frame.
pub(super) const STATUS_TOO_LONG: u8 = 1;
/// The request's handler ended without an answer.
pub(super) const STATUS_FAILED: u8 = 2;
/// Bytes of requests that go into one write.
const WRITE_BYTES: usize = 4 << 20;
/// Longest pause after a failed attempt in which calls fail at once.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallError {
    /// It was certainly not delivered.
    #[error("not sent: {0}")]
    NotSent(String),
    /// It was not sent, as too many calls to this peer have no answer yet.
    #[error("not sent: too many calls to this peer have no answer yet")]
    Busy,
    /// It was not delivered, as the peer does not take us.
    #[error(transparent)]
    Refused(Refusal),
    /// It was sent, and may have been carried out or not.
    #[error("sent, and no answer: {0}")]
    Unknown(String),
}

impl CallError {
    /// Whether the peer may have carried it out.
    pub(crate) fn is_delivery_possible(&self) -> bool {
        matches!(self, CallError::Unknown(_))
    }
}

impl From<DialError> for CallError {
    fn from(error: DialError) -> Self {
        match error {
            DialError::Unreachable(reason) => CallError::NotSent(reason),
            DialError::Refused(refusal) => CallError::Refused(refusal),
        }
    }
}

type Reply = oneshot::Sender<Result<Bytes, CallError>>;

/// All calls to one peer.
pub(super) struct CallDesk {
    state: Mutex<State>,
    changed: Notify,
    calls_max: usize,
    bytes_max: usize,
}

#[derive(Default)]
struct State {
    next_id: u64,
    /// In the order of their ids.
    waiting: VecDeque<Waiting>,
    /// Written, or being written.
    sent: HashMap<u64, Reply>,
    /// Sent, and not wanted any more; the peer is to be told.
    cancelled: Vec<u64>,
    /// Calls whose future is alive, and the bytes of their requests.
    outstanding: usize,
    outstanding_bytes: usize,
    /// The peer could not be reached: calls fail like that until then.
    closed_until: Option<(Instant, CallError)>,
    /// Nobody serves the desk any more.
    abandoned: bool,
}

struct Waiting {
    id: u64,
    request: Bytes,
    reply: Reply,
}

/// A call that was put on the desk. Dropping it takes it back.
struct Ticket<'a> {
    desk: &'a CallDesk,
    id: u64,
    bytes: usize,
}

impl CallDesk {
    pub(super) fn new(calls_max: usize, bytes_max: usize) -> Self {
        CallDesk {
            state: Mutex::default(),
            changed: Notify::new(),
            calls_max,
            bytes_max,
        }
    }

    /// Calls, and waits for the answer.
    pub(super) async fn call(&self, request: Bytes, timeout: Duration) -> Result<Bytes, CallError> {
        let (ticket, answer) = self.enter(request)?;
        match tokio::time::timeout(timeout, answer).await {
            Ok(Ok(answer)) => answer,
            // Each reply is answered before it is dropped.
            Ok(Err(_)) => Err(CallError::Unknown("the transport stopped".to_owned())),
            Err(_) if ticket.withdraw() => Err(CallError::NotSent(format!("no connection within {timeout:?}"))),
            Err(_) => Err(CallError::Unknown(format!("no answer within {timeout:?}"))),
        }
    }

    fn enter(&self, request: Bytes) -> Result<(Ticket<'_>, oneshot::Receiver<Result<Bytes, CallError>>), CallError> {
        let bytes = request.len();
        let (reply, answer) = oneshot::channel();
        let mut state = self.state.lock();
        if state.abandoned {
            return Err(CallError::NotSent("not a peer any more".to_owned()));
        }
        if let Some((until, error)) = &state.closed_until {
            if Instant::now() < *until {
                return Err(error.clone());
            }
            state.closed_until = None;
        }
        if state.outstanding >= self.calls_max || state.outstanding_bytes + bytes > self.bytes_max {
            return Err(CallError::Busy);
        }
        state.outstanding += 1;
        state.outstanding_bytes += bytes;
        let id = state.next_id;
        state.next_id += 1;
        state.waiting.push_back(Waiting { id, request, reply });
        drop(state);
        self.changed.notify_one();
        let desk = self;
        Ok((Ticket { desk, id, bytes }, answer))
    }

    /// The peer may be reachable again.
    pub(super) fn try_again(&self) {
        self.state.lock().closed_until = None;
    }

    /// Waits until a call waits.
    async fn wanted(&self) {
        while self.state.lock().waiting.is_empty() {
            self.changed.notified().await;
        }
    }

    /// Takes requests to be written until they are `bytes` or more, and the ids of those to be cancelled. From now on
    /// the requests count as sent.
    fn take(&self, bytes: usize, requests: &mut Vec<(u64, Bytes)>, cancelled: &mut Vec<u64>) {
        let mut state = self.state.lock();
        cancelled.append(&mut state.cancelled);
        let mut taken = 0;
        while taken < bytes
            && let Some(Waiting { id, request, reply }) = state.waiting.pop_front()
        {
            taken += request.len();
            state.sent.insert(id, reply);
            requests.push((id, request));
        }
    }

    fn answer(&self, id: u64, answer: Result<Bytes, CallError>) {
        let reply = self.state.lock().sent.remove(&id);
        if let Some(reply) = reply {
            // Nobody may be waiting any more.
            let _ = reply.send(answer);
        }
    }

    /// The connection is over: what was sent may never be answered.
    fn broke(&self, reason: &str) {
        let sent = {
            let mut state = self.state.lock();
            state.cancelled.clear();
            std::mem::take(&mut state.sent)
        };
        for reply in sent.into_values() {
            let _ = reply.send(Err(CallError::Unknown(reason.to_owned())));
        }
    }

    /// There is no connection: what waits fails, and what comes until `pause` has passed.
    fn unreachable(&self, error: &CallError, pause: Duration) {
        let waiting = {
            let mut state = self.state.lock();
            state.closed_until = Some((Instant::now() + pause, error.clone()));
            std::mem::take(&mut state.waiting)
        };
        for call in waiting {
            let _ = call.reply.send(Err(error.clone()));
        }
    }

    fn abandon(&self) {
        self.state.lock().abandoned = true;
        self.broke("the transport stopped");
        self.unreachable(&CallError::NotSent("the transport stopped".to_owned()), Duration::ZERO);
    }
}

impl Ticket<'_> {
    /// Takes the call back; whether it was not sent.
    fn withdraw(&self) -> bool {
        let mut state = self.desk.state.lock();
        if let Ok(place) = state.waiting.binary_search_by_key(&self.id, |call| call.id) {
            state.waiting.remove(place);
            return true;
        }
        if state.sent.remove(&self.id).is_some() {
            state.cancelled.push(self.id);
            drop(state);
            self.desk.changed.notify_one();
        }
        false
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.withdraw();
        let mut state = self.desk.state.lock();
        state.outstanding -= 1;
        state.outstanding_bytes -= self.bytes;
    }
}

/// Fails all calls when nobody serves the desk any more, however that came.
struct Abandon<'a>(&'a CallDesk);

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// Connects to a peer when there is something to ask, and stays connected.
pub(super) async fn run(shared: Arc<Shared>, peer: Arc<PeerState>) {
    let desk = &peer.calls;
    let _abandon = Abandon(desk);
    let mut backoff = Backoff::new(shared.settings.backoff_min, PAUSE_MAX.min(shared.settings.backoff_max));
    let mut stop = shared.tasks.stop_signal();
    let bounds = bounds(&shared, Purpose::Call);
    loop {
        let dialled = tokio::select! {
            dialled = async {
                desk.wanted().await;
                dial_peer(&shared, &peer, Purpose::Call, bounds).await
            } => dialled,
            () = stop.wait() => return,
            () = peer.gone() => return,
        };
        let ended = match dialled {
            Ok(connection) => {
                backoff.reset();
                let Connection {
                    mut reader,
                    mut writer,
                    url,
                } = connection;
                tokio::select! {
                    ended = listen(&shared, &peer, &mut reader) => ended,
                    error = write(&shared, &peer, &mut writer) => Ended::Write(error),
                    () = peer.moved_from(&url) => Ended::Protocol("its address was changed"),
                    () = stop.wait() => return,
                }
            }
            Err(error) => {
                desk.unreachable(&error.into(), backoff.next());
                continue;
            }
        };
        if let Ended::Closed(refusal) = &ended {
            shared.refused(peer.id, refusal);
        }
        tracing::debug!(peer = format!("{:x}", peer.id), reason = %ended, "a CALL connection ended");
        desk.broke(&ended.to_string());
    }
}

async fn listen(shared: &Shared, peer: &PeerState, reader: &mut Reader) -> Ended {
    loop {
        let frame = match reader.next(shared.settings.raft_read_timeout).await {
            Ok(frame) => frame,
            Err(error) => return error.into(),
        };
        peer.counters.received_bytes.add(reader.take_read_bytes());
        match frame.split() {
            (kind::RESPONSE, body) => match parse_response(body) {
                Some((id, answer)) => peer.calls.answer(id, answer),
                None => return Ended::Protocol("an answer is cut off"),
            },
            (kind::ALIVE, _) => {}
            (kind::CLOSE, body) => return Ended::Closed(decode_close(body)),
            _ => return Ended::Protocol("an unexpected frame on a CALL connection's way back"),
        }
    }
}

fn parse_response(mut body: Bytes) -> Option<(u64, Result<Bytes, CallError>)> {
    let id = take_u64(&mut body)?;
    if body.is_empty() {
        return None;
    }
    let answer = match body.get_u8() {
        STATUS_OK => Ok(body),
        STATUS_TOO_LONG => Err(CallError::Unknown("the answer is too long".to_owned())),
        _ => Err(CallError::Unknown("the peer failed at it".to_owned())),
    };
    Some((id, answer))
}

async fn write(shared: &Shared, peer: &PeerState, writer: &mut Writer) -> std::io::Error {
    let (mut requests, mut cancelled) = (Vec::new(), Vec::new());
    let mut next_alive = Instant::now() + shared.keepalive_interval();
    loop {
        peer.calls.take(WRITE_BYTES, &mut requests, &mut cancelled);
        // First what frees places: with none, the peer reads no further than the next request. What is cancelled was
        // sent before.
        for id in cancelled.drain(..) {
            writer.batch.frame(kind::CANCEL, &id.to_le_bytes());
        }
        for (id, request) in requests.drain(..) {
            put_request(writer, id, &request);
        }
        if Instant::now() >= next_alive {
            writer.batch.frame(kind::ALIVE, &[]);
        }
        if writer.batch.bytes() > 0 {
            next_alive = Instant::now() + shared.keepalive_interval();
            match writer.flush().await {
                Ok(bytes) => peer.counters.sent_bytes.add(bytes),
                Err(error) => return error,
            }
            continue;
        }
        tokio::select! {
            () = peer.calls.changed.notified() => {}
            () = tokio::time::sleep_until(next_alive.into()) => {}
        }
    }
}

fn put_request(writer: &mut Writer, id: u64, request: &Bytes) {
    writer.batch.begin(kind::REQUEST);
    writer.batch.put_u64(id);
    writer.batch.put(request);
    writer.batch.end();
}

/// Calls whoever is at a URL, over a connection for this one call, as nobody in particular.
pub(super) async fn call_url(
    settings: &Settings,
    tls: &Tls,
    url: &PeerUrl,
    cluster_id: u64,
    version: &str,
    request: Bytes,
    timeout: Duration,
) -> Result<Bytes, CallError> {
    check_length(settings, &request)?;
    let hello = Hello {
        purpose: Purpose::Call.code(),
        cluster_id,
        from: MemberId::default(),
        to: MemberId::default(),
        version: version.to_owned(),
        peer_urls: Vec::new(),
        incarnation: random(),
        sequence: 0,
        cluster_version: ETCD_CLUSTER_VERSION.to_owned(),
    };
    let bounds = Bounds {
        payload_max: settings.frame_bytes_max,
        stall: settings.raft_write_timeout,
    };
    let mut sent = false;
    let call = async {
        let mut connection = dial(url, tls, settings, &hello, bounds).await?;
        sent = true;
        talk_once(&mut connection, &request, settings.raft_read_timeout)
            .await
            .map_err(|ended| match ended {
                Ended::Closed(refusal) => CallError::Unknown(refusal.to_string()),
                ended => CallError::Unknown(ended.to_string()),
            })?
    };
    match tokio::time::timeout(timeout, call).await {
        Ok(answer) => answer,
        Err(_) if sent => Err(CallError::Unknown(format!("no answer within {timeout:?}"))),
        Err(_) => Err(CallError::NotSent(format!("no connection within {timeout:?}"))),
    }
}

/// Refuses a request that is too long for a frame.
pub(super) fn check_length(settings: &Settings, request: &Bytes) -> Result<(), CallError> {
    if request.len() + OVERHEAD > settings.frame_bytes_max {
        return Err(CallError::NotSent(format!("{} bytes are too many", request.len())));
    }
    Ok(())
}

async fn talk_once(
    connection: &mut Connection,
    request: &Bytes,
    silence: Duration,
) -> Result<Result<Bytes, CallError>, Ended> {
    put_request(&mut connection.writer, 0, request);
    connection.writer.flush().await?;
    // The peer shows that it lives more often than that, however long the answer takes; we need not, as it gives up on
    // silence only where nothing is being carried out.
    loop {
        match connection.reader.next(silence).await?.split() {
            (kind::RESPONSE, body) => {
                let (_, answer) = parse_response(body).ok_or(Ended::Protocol("an answer is cut off"))?;
                return Ok(answer);
            }
            (kind::ALIVE, _) => {}
            (kind::CLOSE, body) => return Err(Ended::Closed(decode_close(body))),
            _ => return Err(Ended::Protocol("an unexpected frame on a CALL connection's way back")),
        }
    }
}
