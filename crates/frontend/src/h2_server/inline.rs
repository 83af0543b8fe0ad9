//! Answers KV's unary calls on the connection's own task: no task, no channel and no wake-up of their own. It hosts guests
//! as well, which answer by themselves: see [`Inline::host`].
//!
//! A call whose request is here and whose answer needs nobody else, as a read of a lone member, is done when
//! [`Inline::begin`] returns. Others wait in a slot. Whoever completes their answer marks the slot and wakes the
//! connection, once for all answers of a commit (see [`api::wake`]), which then goes on with all marked slots.
//!
//! What may take long is read, and its answer encoded, in a task of its own: everything else on the connection would wait
//! for it. That is every range of more than one key, since all its keys are counted whatever its limit.
//!
//! Handlers, rules and counting are those of every call: see `service.rs` and `etcd/kv.rs`. What is not kept here is a
//! deadline, `grpc-timeout`, which etcd's Go client sends with every call whose context has one: that would be a timer for
//! each call on the hottest path. The store ends what waits here by itself after its request timeout, nothing of such a
//! call is left to undo, and a client whose time is over sooner gives the call up, which ends it at once.

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use api::kv::{
    Compare, DeleteRangeResponse, PutResponse, RangeRequest, RangeResponse, RequestOp, RequestOpKind, TxnRequest,
    TxnResponse,
};
use api::store::EncodedRange;
use api::{Span, Store};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::task::AtomicWaker;
use h2::RecvStream;
use h2::server::SendResponse;
use http::header::CONTENT_TYPE;
use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method as HttpMethod, Request, Response};
use prost::Message;
use tokio::task::JoinHandle;
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};

use crate::Frontend;
use crate::etcd::methods::{self, Method};
use crate::etcd::{Call, status};
use crate::proto::etcdserverpb::kv_server::Kv as _;
use crate::service::is_grpc;

/// The bytes before each gRPC message: a flag for compression, then the message's length.
const PREFIX_BYTES: usize = 5;

/// What replies are encoded into, many into one piece of memory.
const ARENA_BYTES: usize = 16 << 10;

/// How many guests get on before the connection is read and written again.
const GUESTS_MAX: usize = 16;

/// A call that is answered here.
#[derive(Clone, Copy)]
pub(super) enum InlineMethod {
    Range,
    Put,
    DeleteRange,
    Txn,
}

/// Which call a request is for, if it is one that is answered here. Compaction is not: it may take as long as it likes.
pub(super) fn method_of<B>(request: &Request<B>) -> Option<InlineMethod> {
    let method = match request.uri().path().strip_prefix("/etcdserverpb.KV/")? {
        "Range" => InlineMethod::Range,
        "Put" => InlineMethod::Put,
        "DeleteRange" => InlineMethod::DeleteRange,
        "Txn" => InlineMethod::Txn,
        _ => return None,
    };
    let plain = is_grpc(request)
        && request.method() == HttpMethod::POST
        && request
            .headers()
            .get("grpc-encoding")
            .is_none_or(|encoding| encoding == "identity");
    plain.then_some(method)
}

/// What a call comes to.
enum Reply {
    Range(RangeResponse),
    Put(PutResponse),
    DeleteRange(DeleteRangeResponse),
    Txn(TxnResponse),
    /// A message with its prefix, in pieces.
    Encoded(Vec<Bytes>),
}

type Answer = Pin<Box<dyn Future<Output = Result<Reply, Status>> + Send>>;

/// The calls of one connection that are answered on its task.
pub(super) struct Inline<S: Store> {
    frontend: Frontend<S>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    marked: Arc<Marked>,
    /// Memory for taking marked slots out.
    taken: Vec<usize>,
    arena: BytesMut,
    headers: HeaderMap,
    trailers: HeaderMap,
}

struct Slot {
    waker: Waker,
    mark: Arc<Mark>,
    waiting: Option<Waiting>,
}

enum Waiting {
    Call {
        answer: Answer,
        reply: SendResponse<Bytes>,
        call: Call,
    },
    /// Something that answers by itself.
    Guest(Guest),
}

/// Something that is answered by itself, on the connection's task.
pub(super) type Guest = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Slots whose call can get on.
#[derive(Default)]
struct Marked {
    slots: Mutex<Vec<usize>>,
    connection: AtomicWaker,
}

impl Marked {
    fn slots(&self) -> MutexGuard<'_, Vec<usize>> {
        // A list of numbers is whole whoever panicked.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Marks one slot. The slot may have another call by the time it does: that one is then looked at in vain.
struct Mark {
    slot: usize,
    is_marked: AtomicBool,
    all: Arc<Marked>,
}

impl Wake for Mark {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.is_marked.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut slots = self.all.slots();
        let is_first = slots.is_empty();
        slots.push(self.slot);
        drop(slots);
        // Whoever marked the first one has woken the connection, or is about to.
        if is_first && let Some(connection) = self.all.connection.take() {
            api::wake::wake(connection);
        }
    }
}

impl<S: Store> Inline<S> {
    pub(super) fn new(frontend: Frontend<S>) -> Self {
        let header = |name, value| HeaderMap::from_iter([(name, HeaderValue::from_static(value))]);
        Inline {
            frontend,
            slots: Vec::new(),
            free: Vec::new(),
            marked: Arc::default(),
            taken: Vec::new(),
            arena: BytesMut::new(),
            headers: header(CONTENT_TYPE, "application/grpc"),
            trailers: header(HeaderName::from_static("grpc-status"), "0"),
        }
    }

    /// Has the connection woken when a call can get on. To be called before [`Inline::go_on`], each time.
    pub(super) fn woken_by(&self, connection: &Waker) {
        self.marked.connection.register(connection);
    }

    /// Begins a call, and ends it at once if it can be.
    pub(super) fn begin(
        &mut self,
        method: InlineMethod,
        mut request: Request<RecvStream>,
        mut reply: SendResponse<Bytes>,
    ) {
        let known = methods::find(request.uri().path()).expect("a path that method_of knows");
        let mut call = Call::start(known, Arc::clone(self.frontend.observer()));
        self.frontend.introduce(&mut request);
        self.frontend.show(&request);
        self.frontend.trace(&mut call, &request);
        if let Err(status) = self.frontend.admit(known, &mut request) {
            return refuse(status, &mut reply, &mut call);
        }
        let extensions = std::mem::take(request.extensions_mut());
        let answer = Box::pin(answer(
            self.frontend.clone(),
            method,
            known,
            request.into_body(),
            extensions,
        ));
        let slot = self.settle(Waiting::Call { answer, reply, call });
        self.poll(slot);
    }

    /// Has the connection's task do this, from the next [`Inline::go_on`] on until it is done.
    pub(super) fn host(&mut self, guest: Guest) {
        let slot = self.settle(Waiting::Guest(guest));
        self.slots[slot].mark.wake_by_ref();
    }

    fn settle(&mut self, waiting: Waiting) -> usize {
        let slot = self.free.pop().unwrap_or_else(|| self.add_slot());
        self.slots[slot].waiting = Some(waiting);
        slot
    }

    /// Goes on with all calls that can get on, and with some of the guests: each of those may have much to do.
    pub(super) fn go_on(&mut self) {
        let mut taken = std::mem::take(&mut self.taken);
        std::mem::swap(&mut taken, &mut *self.marked.slots());
        let mut guests = 0;
        // Those that come too late stay marked.
        taken.retain(|&slot| {
            if matches!(self.slots[slot].waiting, Some(Waiting::Guest(_))) {
                guests += 1;
                if guests > GUESTS_MAX {
                    return true;
                }
            }
            self.poll(slot);
            false
        });
        if !taken.is_empty() {
            let mut slots = self.marked.slots();
            taken.append(&mut slots);
            std::mem::swap(&mut taken, &mut *slots);
            drop(slots);
            // Who marks another one finds the list not empty, and leaves this to whoever was first.
            if let Some(connection) = self.marked.connection.take() {
                connection.wake();
            }
        }
        self.taken = taken;
    }

    fn add_slot(&mut self) -> usize {
        let slot = self.slots.len();
        let mark = Arc::new(Mark {
            slot,
            is_marked: AtomicBool::new(false),
            all: self.marked.clone(),
        });
        self.slots.push(Slot {
            waker: mark.clone().into(),
            mark,
            waiting: None,
        });
        slot
    }

    fn poll(&mut self, at: usize) {
        let slot = &mut self.slots[at];
        // Before the call is looked at: what happens from now on marks it again.
        // A store could be put off until the call has been looked at.
        slot.mark.is_marked.swap(false, Ordering::AcqRel);
        let context = &mut Context::from_waker(&slot.waker);
        let result = match &mut slot.waiting {
            None => return,
            Some(Waiting::Call { answer, reply, call }) => {
                match catch_unwind(AssertUnwindSafe(|| poll_unbudgeted(answer, context))) {
                    // Registers for the client's giving up as well: the call then ends as cancelled.
                    Ok(Poll::Pending) => match reply.poll_reset(context) {
                        Poll::Pending => return,
                        Poll::Ready(_) => None,
                    },
                    Ok(Poll::Ready(result)) => Some(result),
                    Err(panic) => Some(Err(call.panicked(&*panic))),
                }
            }
            Some(Waiting::Guest(guest)) => match catch_unwind(AssertUnwindSafe(|| poll_unbudgeted(guest, context))) {
                Ok(Poll::Pending) => return,
                // A panic costs no more than this guest, as if it had a task of its own.
                Ok(Poll::Ready(())) | Err(_) => None,
            },
        };
        let waiting = slot.waiting.take();
        self.free.push(at);
        let Some(Waiting::Call {
            mut reply, mut call, ..
        }) = waiting
        else {
            return;
        };
        match result {
            Some(Ok(message)) => self.send(message, &mut reply, &mut call),
            Some(Err(status)) => refuse(status, &mut reply, &mut call),
            None => {}
        }
    }

    fn send(&mut self, message: Reply, reply: &mut SendResponse<Bytes>, call: &mut Call) {
        let arena = &mut self.arena;
        let data = match message {
            Reply::Range(message) => encode(&message, arena),
            Reply::Put(message) => encode(&message, arena),
            Reply::DeleteRange(message) => encode(&message, arena),
            Reply::Txn(message) => encode(&message, arena),
            Reply::Encoded(pieces) => return self.send_pieces(pieces, reply, call),
        };
        match data {
            Ok(data) => self.send_pieces([data], reply, call),
            Err(status) => refuse(status, reply, call),
        }
    }

    fn send_pieces(&self, pieces: impl IntoIterator<Item = Bytes>, reply: &mut SendResponse<Bytes>, call: &mut Call) {
        let mut bytes = 0;
        let mut response = Response::new(());
        *response.headers_mut() = self.headers.clone();
        let sent = reply.send_response(response, false).and_then(|mut stream| {
            // As much as the client's window has room for; the rest waits for it in the connection.
            for piece in pieces {
                bytes += piece.len();
                stream.send_data(piece, false)?;
            }
            stream.send_trailers(self.trailers.clone())
        });
        match sent {
            Ok(()) => {
                call.sent((bytes - PREFIX_BYTES) as u64);
                call.end(Code::Ok);
            }
            // The client has given the call up, and it ends as cancelled.
            Err(error) => tracing::debug!(%error, "a reply was not sent"),
        }
    }
}

/// Polls without taking from the budget of events that tokio gives a task before it has to let others run: the
/// connection's task needs its own for its socket, which could not be written otherwise while calls keep coming.
fn poll_unbudgeted<T>(future: &mut Pin<Box<dyn Future<Output = T> + Send>>, context: &mut Context<'_>) -> Poll<T> {
    pin!(tokio::task::unconstrained(future)).poll(context)
}

/// A reply that consists of a status.
fn refuse(status: Status, reply: &mut SendResponse<Bytes>, call: &mut Call) {
    let code = status.code();
    match reply.send_response(status.into_http(), true) {
        Ok(_) => call.end(code),
        Err(error) => tracing::debug!(%error, "a refusal was not sent"),
    }
}

/// A message with its prefix; fails if it is longer than the prefix can say.
fn encode(message: &impl Message, arena: &mut BytesMut) -> Result<Bytes, Status> {
    let length = message.encoded_len();
    if arena.capacity() < PREFIX_BYTES + length {
        // A new piece of memory rather than one that the last replies are copied into.
        *arena = BytesMut::with_capacity((PREFIX_BYTES + length).max(ARENA_BYTES));
    }
    put_prefix(length, arena)?;
    message.encode_raw(arena);
    Ok(arena.split().freeze())
}

fn put_prefix(length: usize, out: &mut BytesMut) -> Result<(), Status> {
    let length = u32::try_from(length)
        .map_err(|_| Status::resource_exhausted(format!("a reply of {length} bytes is more than gRPC can carry")))?;
    out.put_u8(0);
    out.put_u32(length);
    Ok(())
}

/// Reads a call's request and carries it out.
async fn answer<S: Store>(
    frontend: Frontend<S>,
    method: InlineMethod,
    known: &'static Method,
    body: RecvStream,
    extensions: Extensions,
) -> Result<Reply, Status> {
    let message = read(body, frontend.message_bytes_max()).await?;
    frontend.observer().received(known, 1, message.len() as u64);
    let kv = frontend.kv();
    Ok(match method {
        InlineMethod::Range => {
            let request = decode::<RangeRequest>(message, extensions)?;
            if is_long(request.get_ref()) {
                let kv = kv.clone();
                return apart(async move { in_pieces(kv.range_encoded(request).await?) }).await;
            }
            Reply::Range(kv.range(request).await?.into_inner())
        }
        InlineMethod::Put => Reply::Put(kv.put(decode(message, extensions)?).await?.into_inner()),
        InlineMethod::DeleteRange => {
            let reply = kv.delete_range(decode(message, extensions)?).await?;
            Reply::DeleteRange(reply.into_inner())
        }
        InlineMethod::Txn => {
            let request = decode::<TxnRequest>(message, extensions)?;
            if reads_long(request.get_ref()) {
                let kv = kv.clone();
                return apart(async move {
                    let reply = kv.txn(request).await?.into_inner();
                    encode(&reply, &mut BytesMut::new()).map(|reply| vec![reply])
                })
                .await;
            }
            Reply::Txn(kv.txn(request).await?.into_inner())
        }
    })
}

fn is_long(request: &RangeRequest) -> bool {
    !matches!(request.span(), Span::Key(_))
}

/// Whether a transaction reads what may take long here: one that writes is carried out elsewhere.
fn reads_long(request: &TxnRequest) -> bool {
    let long = |op: &RequestOp| matches!(&op.request, Some(RequestOpKind::Range(range)) if is_long(range));
    let long_compare = |compare: &Compare| !compare.range_end.is_empty();
    request.is_read_only()
        && (request.success.iter().chain(&request.failure).any(long) || request.compare.iter().any(long_compare))
}

/// The message that a range is answered with, and its prefix.
fn in_pieces(range: EncodedRange) -> Result<Vec<Bytes>, Status> {
    let (before, after) = range.frame();
    let kvs: usize = range.kvs.iter().map(Bytes::len).sum();
    let length = before.encoded_len() + kvs + after.encoded_len();
    let mut first = BytesMut::with_capacity(PREFIX_BYTES + before.encoded_len());
    put_prefix(length, &mut first)?;
    before.encode_raw(&mut first);
    let mut pieces = Vec::with_capacity(range.kvs.len() + 2);
    pieces.push(first.freeze());
    pieces.extend(range.kvs);
    pieces.push(after.encode_to_vec().into());
    Ok(pieces)
}

/// Carries a call out, and encodes its answer, in a task of its own.
async fn apart(call: impl Future<Output = Result<Vec<Bytes>, Status>> + Send + 'static) -> Result<Reply, Status> {
    struct Apart<T>(JoinHandle<T>);
    impl<T> Drop for Apart<T> {
        fn drop(&mut self) {
            // A call that was given up does not go on. It does nothing to one that is done.
            self.0.abort();
        }
    }
    let mut task = Apart(tokio::spawn(call));
    match (&mut task.0).await {
        Ok(reply) => reply.map(Reply::Encoded),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(status(api::Error::Stopped)),
        },
    }
}

fn decode<M: Message + Default>(message: Bytes, extensions: Extensions) -> Result<tonic::Request<M>, Status> {
    let message =
        M::decode(message).map_err(|error| Status::internal(format!("grpc: error unmarshalling request: {error}")))?;
    Ok(tonic::Request::from_parts(MetadataMap::new(), extensions, message))
}

/// Reads the one message that a request's body holds. Takes no more of it than that, in tonic's and etcd's words.
async fn read(mut body: RecvStream, bytes_max: usize) -> Result<Bytes, Status> {
    let mut first = Bytes::new();
    let mut joined = BytesMut::new();
    while let Some(piece) = poll_fn(|context| body.poll_data(context)).await {
        let piece = piece.map_err(|error| Status::cancelled(error.to_string()))?;
        // Only a stream that is done with may refuse this, and then nobody waits for the capacity.
        let _ = body.flow_control().release_capacity(piece.len());
        if first.is_empty() && joined.is_empty() {
            first = piece;
        } else {
            if joined.is_empty() {
                joined.extend_from_slice(&std::mem::take(&mut first));
            }
            joined.extend_from_slice(&piece);
        }
        let so_far: &[u8] = if joined.is_empty() { &first } else { &joined };
        if let Some((prefix, rest)) = so_far.split_first_chunk() {
            let length = length_of(*prefix, bytes_max)?;
            if rest.len() > length {
                return Err(Status::internal("more than one message in a unary call"));
            }
        }
    }
    let mut whole = if joined.is_empty() { first } else { joined.freeze() };
    let Some((prefix, rest)) = whole.split_first_chunk() else {
        return Err(Status::internal("Missing request message."));
    };
    if rest.len() < length_of(*prefix, bytes_max)? {
        return Err(Status::internal("Unexpected EOF decoding stream."));
    }
    whole.advance(PREFIX_BYTES);
    Ok(whole)
}

/// The length of a message, from its prefix.
fn length_of([flag, length @ ..]: [u8; PREFIX_BYTES], bytes_max: usize) -> Result<usize, Status> {
    let length = u32::from_be_bytes(length) as usize;
    if length > bytes_max {
        return Err(Status::resource_exhausted(format!(
            "grpc: received message larger than max ({length} vs. {bytes_max})"
        )));
    }
    match flag {
        0 => Ok(length),
        1 => Err(Status::internal(
            "protocol error: received message with compressed-flag but no grpc-encoding was specified",
        )),
        flag => Err(Status::internal(format!(
            "protocol error: received message with invalid compression flag: {flag} (valid flags are 0 and 1), while sending request"
        ))),
    }
}
