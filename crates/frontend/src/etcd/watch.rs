//! The Watch service: one state machine for each stream, polled when there is room to send.

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use api::kv::{Event, ResponseHeader};
use api::store::{Events, WatchCreate, WatchCreated, WatchOutput, WatchStream};
use api::{Revision, Store};
use bytes::{BufMut, Bytes};
use futures::Stream;
use prost::Message;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tonic::body::Body;
use tonic::codec::{BufferSettings, EncodeBuf, Encoder};
use tonic::codegen::BoxFuture;
use tonic::server::{Grpc, StreamingService};
use tonic::{Request, Response, Status, Streaming};

use super::codec::{Codec, Decoder};
use super::for_client;
use crate::BoxError;
use crate::proto::etcdserverpb::watch_create_request::FilterType;
use crate::proto::etcdserverpb::watch_request::RequestUnion;
use crate::proto::etcdserverpb::{WatchCreateRequest, WatchRequest, WatchResponse};

/// The id in replies that are about no watcher, or about all of the stream's.
const NO_WATCHER: i64 = -1;

/// How much a stream may do before other tasks of its thread get a turn: requests read and replies sent.
const STEPS_PER_TURN: u32 = 64;

/// How many outputs are sent between two looks at what the client asks: a look costs as much as an output.
const OUTPUTS_PER_REQUEST: u32 = 8;

/// The shortest time between progress notifications (etcd's `minWatchProgressInterval`).
const PROGRESS_INTERVAL_MIN: Duration = Duration::from_millis(100);

/// How many watchers that compaction ended a stream remembers, so as to answer when their client cancels them, too.
const COMPACTED_REMEMBERED_MAX: usize = 1024;

/// Answers Watch calls from a store.
#[derive(Clone)]
pub(super) struct Watch<S>(pub(super) S);

impl<S: Store> Watch<S> {
    /// Answers a call of the service's only method. The generated server would want events in its own message, where no
    /// two watchers can share them.
    pub(super) async fn serve<B>(self, request: http::Request<B>, receive_max: usize) -> http::Response<Body>
    where
        B: hyper::body::Body + Send + 'static,
        B::Error: Into<BoxError> + Send,
    {
        Grpc::new(ReplyCodec::default())
            .max_decoding_message_size(receive_max)
            .max_encoding_message_size(usize::MAX)
            .streaming(self, request)
            .await
    }
}

impl<S: Store> StreamingService<WatchRequest> for Watch<S> {
    type Response = Reply;
    type ResponseStream = Session<S, Streaming<WatchRequest>>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<Streaming<WatchRequest>>) -> Self::Future {
        let store = for_client(&self.0, &request).into_owned();
        Box::pin(async move {
            let watchers = store.watch().await;
            Ok(Response::new(Session::new(store, watchers, request.into_inner())))
        })
    }
}

/// A `WatchResponse` on its way out.
#[derive(Debug)]
pub(super) struct Reply {
    /// All of it, but for `events`.
    head: WatchResponse,
    /// What comes after, encoded once for all watchers that get the same.
    events: Option<Arc<Events>>,
}

impl From<WatchResponse> for Reply {
    fn from(head: WatchResponse) -> Self {
        Reply { head, events: None }
    }
}

/// Encodes replies, decodes requests as every other call does.
#[derive(Debug, Default)]
struct ReplyCodec {
    requests: Codec<WatchResponse, WatchRequest>,
}

impl tonic::codec::Codec for ReplyCodec {
    type Encode = Reply;
    type Decode = WatchRequest;
    type Encoder = ReplyEncoder;
    type Decoder = Decoder<WatchRequest>;

    fn encoder(&mut self) -> ReplyEncoder {
        ReplyEncoder {
            settings: self.requests.encoder().buffer_settings(),
        }
    }

    fn decoder(&mut self) -> Decoder<WatchRequest> {
        self.requests.decoder()
    }
}

struct ReplyEncoder {
    settings: BufferSettings,
}

impl Encoder for ReplyEncoder {
    type Item = Reply;
    type Error = Status;

    fn encode(&mut self, Reply { head, events }: Reply, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let events = events.as_ref().map(|events| events.encoded());
        buffer.reserve(head.encoded_len() + events.map_or(0, Bytes::len));
        head.encode_raw(buffer);
        if let Some(events) = events {
            buffer.put_slice(events);
        }
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.settings
    }
}

/// One client's stream of watchers.
///
/// It is polled only while the connection has room for what it returns, and takes the next request or output only when
/// `replies` is empty: it holds one request's reply or one output at a time, however slow the client reads. What the
/// client does not take stays in the store.
pub(super) struct Session<S: Store, R> {
    store: S,
    watchers: S::Watch,
    /// `None` once the client has said that it will ask nothing more; its watchers live on.
    requests: Option<R>,
    /// Ready to be sent, in this order.
    replies: VecDeque<Reply>,
    /// Watchers whose large replies may be split.
    fragmented: HashSet<i64>,
    /// Watchers that compaction ended and the client has not cancelled yet.
    compacted: HashSet<i64>,
    /// Runs from the first watcher on that asked for progress notifications.
    progress: Option<Interval>,
    steps: u32,
    /// How many outputs to take before the client is asked again; 0 for now.
    outputs_before_request: u32,
}

/// Nothing in it is ever pinned.
impl<S: Store, R> Unpin for Session<S, R> {}

impl<S: Store, R> Session<S, R> {
    fn new(store: S, watchers: S::Watch, requests: R) -> Self {
        Session {
            watchers,
            store,
            requests: Some(requests),
            replies: VecDeque::new(),
            fragmented: HashSet::new(),
            compacted: HashSet::new(),
            progress: None,
            steps: 0,
            outputs_before_request: 0,
        }
    }

    fn handle(&mut self, request: WatchRequest) {
        match request.request_union {
            Some(RequestUnion::CreateRequest(create)) => self.create(create),
            Some(RequestUnion::CancelRequest(cancel)) => self.cancel(cancel.watch_id),
            Some(RequestUnion::ProgressRequest(_)) => self.watchers.request_progress(),
            None => tracing::debug!("a watch stream got a request of unknown kind"),
        }
    }

    fn create(&mut self, request: WatchCreateRequest) {
        let filtered = |filter: FilterType| request.filters.contains(&(filter as i32));
        let created = self.watchers.create(WatchCreate {
            id: (request.watch_id != 0).then_some(request.watch_id),
            no_put: filtered(FilterType::Noput),
            no_delete: filtered(FilterType::Nodelete),
            key: if request.key.is_empty() {
                Bytes::from_static(&[0])
            } else {
                request.key
            },
            range_end: request.range_end,
            start_revision: request.start_revision,
            prev_kv: request.prev_kv,
            progress_notify: request.progress_notify,
        });
        let reply = match created {
            Ok(WatchCreated { watch_id, revision }) => {
                self.compacted.remove(&watch_id);
                if request.fragment {
                    self.fragmented.insert(watch_id);
                }
                if request.progress_notify && self.progress.is_none() {
                    self.progress = Some(progress_timer(self.store.limits().watch_progress_interval));
                }
                WatchResponse {
                    created: true,
                    ..self.reply(watch_id, revision)
                }
            }
            Err(error) => WatchResponse {
                header: Some(self.store.header()),
                watch_id: NO_WATCHER,
                created: true,
                canceled: true,
                cancel_reason: error.to_string(),
                ..Default::default()
            },
        };
        self.replies.push_back(reply.into());
    }

    fn cancel(&mut self, watch_id: i64) {
        // etcd keeps a watcher that compaction ended until its client cancels it, and then answers.
        if !self.watchers.cancel(watch_id) && !self.compacted.remove(&watch_id) {
            return;
        }
        self.fragmented.remove(&watch_id);
        let reply = WatchResponse {
            header: Some(self.store.header()),
            watch_id,
            canceled: true,
            ..Default::default()
        };
        self.replies.push_back(reply.into());
    }

    fn take(&mut self, output: WatchOutput) {
        match output {
            WatchOutput::Events {
                watch_id,
                revision,
                events,
            } => self.send_events(watch_id, revision, events),
            WatchOutput::Progress { watch_id, revision } => {
                let reply = self.reply(watch_id, revision);
                self.replies.push_back(reply.into());
            }
            WatchOutput::Compacted {
                watch_id,
                compact_revision,
            } => {
                self.fragmented.remove(&watch_id);
                if self.compacted.len() < COMPACTED_REMEMBERED_MAX {
                    self.compacted.insert(watch_id);
                }
                let reply = WatchResponse {
                    canceled: true,
                    compact_revision,
                    ..self.reply(watch_id, 0)
                };
                self.replies.push_back(reply.into());
            }
        }
    }

    fn reply(&self, watch_id: i64, revision: Revision) -> WatchResponse {
        WatchResponse {
            header: Some(ResponseHeader {
                revision,
                ..self.store.header()
            }),
            watch_id,
            ..Default::default()
        }
    }

    fn send_events(&mut self, watch_id: i64, revision: Revision, events: Arc<Events>) {
        let reply = self.reply(watch_id, revision);
        let ends = if self.fragmented.contains(&watch_id) {
            fragment_ends(&reply, &events, self.store.limits().grpc_receive_bytes_max())
        } else {
            Vec::new()
        };
        if ends.len() < 2 {
            let events = Some(events);
            return self.replies.push_back(Reply { head: reply, events });
        }
        let mut start = 0;
        for end in ends {
            let fragment = WatchResponse {
                fragment: end < events.len(),
                events: events[start..end].to_vec(),
                ..reply.clone()
            };
            self.replies.push_back(fragment.into());
            start = end;
        }
    }
}

impl<S: Store, R> Stream for Session<S, R>
where
    R: Stream<Item = Result<WatchRequest, Status>> + Unpin,
{
    type Item = Result<Reply, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        // Whether the client was asked since this was called, so that its next request wakes us.
        let mut asked = false;
        loop {
            if this.steps >= STEPS_PER_TURN {
                this.steps = 0;
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            this.steps += 1;
            if let Some(reply) = this.replies.pop_front() {
                return Poll::Ready(Some(Ok(reply)));
            }
            // Requests before outputs: a cancelled watcher should send little more.
            if this.outputs_before_request == 0
                && let Some(requests) = &mut this.requests
            {
                match Pin::new(requests).poll_next(context) {
                    Poll::Ready(Some(Ok(request))) => {
                        this.handle(request);
                        continue;
                    }
                    Poll::Ready(Some(Err(status))) => return Poll::Ready(Some(Err(status))),
                    Poll::Ready(None) => this.requests = None,
                    Poll::Pending => {}
                }
                asked = true;
                this.outputs_before_request = OUTPUTS_PER_REQUEST;
            }
            if let Some(progress) = &mut this.progress {
                while progress.poll_tick(context).is_ready() {
                    this.watchers.notify_progress();
                }
            }
            match this.watchers.poll_next(context) {
                Poll::Ready(output) => {
                    this.outputs_before_request = this.outputs_before_request.saturating_sub(1);
                    this.take(output);
                }
                Poll::Pending if asked || this.requests.is_none() => {
                    this.steps = 0;
                    return Poll::Pending;
                }
                Poll::Pending => this.outputs_before_request = 0,
            }
        }
    }
}

/// The jitter, up to a tenth, keeps streams that began together (a client's restart, ours) from staying together.
fn progress_timer(interval: Duration) -> Interval {
    let interval = interval.max(PROGRESS_INTERVAL_MIN);
    let random = RandomState::new().hash_one(()) >> 32;
    let jitter = interval.mul_f64(random as f64 / f64::from(u32::MAX) / 10.0);
    let interval = interval + jitter;
    let mut timer = tokio::time::interval_at(Instant::now() + interval, interval);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    timer
}

/// Where to split events, so that each reply stays below `bytes_max` (unless one event alone does not).
fn fragment_ends(reply: &WatchResponse, events: &[Event], bytes_max: usize) -> Vec<usize> {
    let event_len = |event: &Event| {
        let len = event.encoded_len();
        // The field's tag takes one byte, as all tags below 16 do.
        1 + prost::length_delimiter_len(len) + len
    };
    let whole = reply.encoded_len() + events.iter().map(event_len).sum::<usize>();
    if whole < bytes_max || events.len() < 2 {
        return vec![events.len()];
    }
    let empty = WatchResponse {
        fragment: true,
        ..reply.clone()
    };
    let empty_len = empty.encoded_len();
    let mut ends = Vec::new();
    let mut start = 0;
    let mut len = empty_len;
    for (index, event) in events.iter().enumerate() {
        let event_len = event_len(event);
        if index > start && len + event_len >= bytes_max {
            ends.push(index);
            start = index;
            len = empty_len;
        }
        len += event_len;
    }
    ends.push(events.len());
    ends
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::kv::KeyValue;

    fn events(sizes: &[usize]) -> Vec<Event> {
        let event = |&size: &usize| Event {
            kv: Some(KeyValue {
                key: Bytes::from_static(b"k"),
                value: vec![0; size].into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        sizes.iter().map(event).collect()
    }

    #[test]
    fn fragments_stay_below_the_limit_and_lose_nothing() {
        let reply = WatchResponse {
            header: ResponseHeader::at(7),
            watch_id: 3,
            ..Default::default()
        };
        for sizes in [
            vec![10; 50],
            vec![500, 10, 10, 500, 500],
            vec![2000, 2000],
            vec![0; 300],
        ] {
            let events = events(&sizes);
            let ends = fragment_ends(&reply, &events, 1000);
            assert_eq!(ends.last(), Some(&events.len()));
            let mut start = 0;
            for end in ends {
                assert!(start < end, "{sizes:?}: an empty fragment at {start}");
                let fragment = WatchResponse {
                    fragment: true,
                    events: events[start..end].to_vec(),
                    ..reply.clone()
                };
                assert!(
                    fragment.encoded_len() < 1000 || end == start + 1,
                    "{sizes:?}: {start}..{end}"
                );
                start = end;
            }
        }
        assert_eq!(fragment_ends(&reply, &events(&[5000]), 1000), [1]);
        assert_eq!(fragment_ends(&reply, &events(&[10, 10]), 1000), [2]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_progress_timer_jitters_within_a_tenth() {
        for _ in 0..100 {
            let mut timer = progress_timer(Duration::from_secs(600));
            let period = timer.period();
            assert!(
                period >= Duration::from_secs(600) && period <= Duration::from_secs(660),
                "{period:?}"
            );
            let before = Instant::now();
            timer.tick().await;
            assert!(before.elapsed() >= period);
        }
        assert!(progress_timer(Duration::ZERO).period() >= PROGRESS_INTERVAL_MIN);
    }
}
