//! One HTTP/2 connection, as little of it as gRPC calls need (RFC 9113).
//!
//! A load generator shares its machine with the server that it measures, or at least has to be far faster than it, so
//! here a call is a few bytes put into one buffer and a few taken out of another. The h2 crate, which this replaced,
//! took most of the generator's time. What a call writes is sent, and what the server sent is handed out, by one task
//! for all calls: many calls, one write, one read.
//!
//! All of a connection lives on one thread.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::hash::{BuildHasherDefault, Hasher};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use loona_hpack::Decoder;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_util::io::poll_read_buf;

use super::failure::{Failure, Kind};
use super::grpc::{Method, outcome};
use super::headers::{Encoder, TABLE_BYTES, read};

/// What a call, and what a connection, may have on the way to us, in bytes: enough never to hold a server back.
const STREAM_WINDOW: u32 = 16 << 20;
const CONNECTION_WINDOW: u32 = 256 << 20;
/// Largest block of headers we take, in bytes.
const HEADERS_BYTES_MAX: usize = 256 << 10;
/// What is read at once, in bytes: into memory of this size, as long as this much of it is left.
const READ_BYTES: usize = 128 << 10;
const READ_BYTES_LEFT: usize = 16 << 10;
/// What may be sent already and still lie before what is not, in bytes.
const SENT_BYTES_MAX: usize = 1 << 20;
/// What both sides' windows are before they say otherwise, and their largest frames, in bytes. We leave frames at that,
/// as gRPC's own clients do.
const WINDOW_AT_FIRST: u32 = 65_535;
const FRAME_BYTES_AT_FIRST: usize = 16_384;
/// Windows that grow beyond this are an error.
const WINDOW_MAX: i64 = (1 << 31) - 1;
/// The last number that a call can have.
const CALL_NUMBER_MAX: u32 = (1 << 31) - 1;
/// How exactly a call's time is kept: it ends so much later at most. A timer for each call would cost more than the call.
const TICK: Duration = Duration::from_millis(50);

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes before every frame.
const FRAME_HEAD_BYTES: usize = 9;

/// Kinds of frames.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
/// Their flags.
const END_STREAM: u8 = 0x1;
const ACK: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const HAS_PRIORITY: u8 = 0x20;
/// Settings.
const HEADER_TABLE_SIZE: u16 = 1;
const ENABLE_PUSH: u16 = 2;
const MAX_CONCURRENT_STREAMS: u16 = 3;
const INITIAL_WINDOW_SIZE: u16 = 4;
const MAX_FRAME_SIZE: u16 = 5;
/// Errors.
const CANCEL: u32 = 8;

/// Finds a call by its number, which needs no mixing but for the map's sake.
#[derive(Debug, Default)]
struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only numbers of calls are hashed");
    }

    fn write_u32(&mut self, number: u32) {
        self.0 = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }
}

/// A connection. Its calls can be many at once.
#[derive(Debug)]
pub(crate) struct Connection {
    state: RefCell<State>,
}

struct State {
    /// What is to be sent.
    out: Vec<u8>,
    /// Who sends it.
    driver: Option<Waker>,
    calls: HashMap<u32, CallState, BuildHasherDefault<NumberHasher>>,
    /// States of calls that are over, used again for the sake of their memory.
    spare: Vec<CallState>,
    next_number: u32,
    /// Who wants to begin a call, and may not while there are as many as the server takes; first come, first served.
    waiting: VecDeque<(u64, Waker)>,
    next_ticket: u64,
    /// Whether the server has sent its settings, which come first.
    greeted: bool,
    /// Who waits for that.
    greeting: Option<Waker>,
    encoder: Encoder,
    decoder: Decoder<'static>,
    /// Number of the call whose headers are not whole yet, whether it ends with them, and what has come of them.
    headers: Option<(u32, bool, Vec<u8>)>,
    /// What the server takes: bytes on the connection, bytes of a new call, bytes in a frame, calls.
    send_window: i64,
    send_window_at_first: i64,
    frame_bytes_max: usize,
    calls_max: u32,
    /// Calls with bytes that wait for a window.
    blocked: VecDeque<u32>,
    /// What came on the connection since its window was last opened again.
    received: u32,
    /// No more calls may begin, for this reason.
    closed: Option<Failure>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("calls", &self.calls.len())
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

/// What is known of a call.
#[derive(Debug, Default)]
struct CallState {
    waker: Option<Waker>,
    /// What came and was not taken yet.
    chunks: VecDeque<Bytes>,
    /// What came, and what of it was taken, since its window was last opened again.
    received: u32,
    taken: u32,
    http_status: u16,
    grpc_status: Option<Vec<u8>>,
    grpc_message: Vec<u8>,
    /// How it ended, once it has.
    end: Option<Result<(), Failure>>,
    /// When it has taken too long, and how long that is.
    deadline: Option<(Instant, Duration)>,
    send_window: i64,
    unsent: VecDeque<Bytes>,
    /// Whether nothing comes after what is unsent.
    last: bool,
    /// Whether the server knows that nothing more comes.
    said_last: bool,
    /// Whether the server will say nothing more.
    heard_last: bool,
}

impl CallState {
    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn finish(&mut self, end: Result<(), Failure>) {
        if self.end.is_none() {
            self.end = Some(end);
        }
        self.wake();
    }

    /// The server has said its last.
    fn complete(&mut self) {
        self.heard_last = true;
        self.finish(if self.http_status == 0 {
            Err(Failure::new(Kind::Protocol, "the answer ended without headers"))
        } else {
            outcome(self.grpc_status.as_deref(), &self.grpc_message)
        });
    }

    /// Opens the call's window again by what was taken, if that is worth a frame.
    fn open_window(&mut self, number: u32, out: &mut Vec<u8>) -> bool {
        let opens = self.taken >= STREAM_WINDOW / 2 && !self.heard_last;
        if opens {
            window_update(out, number, self.taken);
            self.received = self.received.saturating_sub(self.taken);
            self.taken = 0;
        }
        opens
    }
}

impl Connection {
    /// Begins to speak HTTP/2 over a socket. Returns the connection and the task that moves its bytes, which ends when
    /// the connection does. Must be called within a `LocalSet`.
    pub(crate) fn start<T>(socket: T, tls: bool, authority: String) -> (Rc<Self>, tokio::task::JoinHandle<()>)
    where
        T: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let mut out = PREFACE.to_vec();
        let settings = [(ENABLE_PUSH, 0), (INITIAL_WINDOW_SIZE, STREAM_WINDOW)];
        frame_head(&mut out, 6 * settings.len(), SETTINGS, 0, 0);
        for (name, value) in settings {
            out.extend_from_slice(&name.to_be_bytes());
            out.extend_from_slice(&u32::to_be_bytes(value));
        }
        window_update(&mut out, 0, CONNECTION_WINDOW - WINDOW_AT_FIRST);
        let connection = Rc::new(Connection {
            state: RefCell::new(State::new(out, Encoder::new(tls, authority))),
        });
        let driver = tokio::task::spawn_local(Rc::clone(&connection).drive(socket));
        (connection, driver)
    }

    /// Waits until the server has sent its settings, by which it shows that it speaks HTTP/2 and takes us. One waits at
    /// most.
    pub(crate) async fn greeted(&self) -> Result<(), Failure> {
        poll_fn(|context| {
            let state = &mut *self.state.borrow_mut();
            match &state.closed {
                _ if state.greeted => Poll::Ready(Ok(())),
                Some(why) => Poll::Ready(Err(why.clone())),
                None => {
                    state.greeting = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// From now on calls have this token.
    pub(crate) fn set_token(&self, token: String) {
        self.state.borrow_mut().encoder.set_token(token);
    }

    /// No more calls begin; those under way go on, and then the connection ends.
    pub(crate) fn close(&self, why: &Failure) {
        let state = &mut *self.state.borrow_mut();
        state.close(why.clone());
        state.poke();
    }

    /// Begins a call, as soon as the server lets us. It fails at the deadline, of which the other part says how long
    /// that was.
    pub(crate) async fn call(
        self: &Rc<Self>,
        method: Method,
        deadline: Option<(Instant, Duration)>,
    ) -> Result<Call, Failure> {
        let mut turn = Turn {
            connection: self,
            ticket: None,
        };
        let number = poll_fn(|context| {
            let state = &mut *self.state.borrow_mut();
            state.begin(method, deadline, &mut turn.ticket, context)
        })
        .await?;
        Ok(Call {
            connection: Rc::clone(self),
            number,
        })
    }

    async fn drive<T: AsyncRead + AsyncWrite + Unpin>(self: Rc<Self>, mut socket: T) {
        let mut end = End {
            connection: &self,
            why: Failure::new(Kind::Connection, "the connection's task has ended"),
        };
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut input = BytesMut::new();
        let mut output = Output::default();
        end.why = poll_fn(|context| {
            let state = &mut *self.state.borrow_mut();
            if !state
                .driver
                .as_ref()
                .is_some_and(|waker| waker.will_wake(context.waker()))
            {
                state.driver = Some(context.waker().clone());
            }
            let mut unused = false;
            while ticks.poll_tick(context).is_ready() {
                state.end_late_calls();
                // Nobody can begin a call any more.
                unused = Rc::strong_count(&self) == 1;
            }
            loop {
                if let Poll::Ready(Err(error)) = output.send(&mut socket, state, context) {
                    output.failure = Some(Failure::new(Kind::Connection, error));
                }
                match receive(&mut socket, &mut input, context) {
                    Poll::Pending => break,
                    Poll::Ready(Err(error)) => return Poll::Ready(Failure::new(Kind::Connection, error)),
                    Poll::Ready(Ok(0)) => {
                        return Poll::Ready(Failure::new(Kind::Connection, "the server closed the connection"));
                    }
                    Poll::Ready(Ok(_)) => {
                        if let Err(what) = state.take_frames(&mut input) {
                            return Poll::Ready(Failure::new(Kind::Connection, what));
                        }
                    }
                }
            }
            // Only now: what had come before nothing could be sent any more are answers.
            if let Some(failure) = output.failure.take() {
                return Poll::Ready(failure);
            }
            let sent = state.out.is_empty() && !output.flushing;
            match &state.closed {
                Some(why) if state.calls.is_empty() && sent => Poll::Ready(why.clone()),
                None if unused => Poll::Ready(Failure::new(Kind::Connection, "nobody uses the connection")),
                _ => Poll::Pending,
            }
        })
        .await;
    }
}

/// Ends a connection's calls with its task, however that ends.
struct End<'a> {
    connection: &'a Connection,
    why: Failure,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        // Borrowed only if the task has panicked right there, and then there is nothing to save.
        if let Ok(mut state) = self.connection.state.try_borrow_mut() {
            state.close(self.why.clone());
            for call in state.calls.values_mut() {
                call.finish(Err(self.why.clone()));
            }
        }
    }
}

/// A place among those who wait to begin a call.
struct Turn<'a> {
    connection: &'a Connection,
    ticket: Option<u64>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            let state = &mut *self.connection.state.borrow_mut();
            state.waiting.retain(|(waiting, _)| *waiting != ticket);
            state.call_next();
        }
    }
}

/// How far what is to be sent is sent.
#[derive(Debug, Default)]
struct Output {
    written: usize,
    /// Whether the socket may hold back what was written.
    flushing: bool,
    /// Why nothing can be sent any more.
    failure: Option<Failure>,
}

impl Output {
    /// Sends what there is to send, as far as the socket takes it.
    fn send<T: AsyncWrite + Unpin>(
        &mut self,
        socket: &mut T,
        state: &mut State,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.failure.is_some() {
            return Poll::Pending;
        }
        while self.written < state.out.len() {
            match Pin::new(&mut *socket).poll_write(context, &state.out[self.written..]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(count)) => {
                    self.written += count;
                    self.flushing = true;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    if self.written > SENT_BYTES_MAX {
                        state.out.drain(..std::mem::take(&mut self.written));
                    }
                    return Poll::Pending;
                }
            }
        }
        state.out.clear();
        self.written = 0;
        if self.flushing {
            ready!(Pin::new(socket).poll_flush(context))?;
            self.flushing = false;
        }
        Poll::Ready(Ok(()))
    }
}

/// Takes what has come, behind what is not whole yet.
fn receive<T: AsyncRead + Unpin>(
    socket: &mut T,
    input: &mut BytesMut,
    context: &mut Context<'_>,
) -> Poll<std::io::Result<usize>> {
    if input.capacity() - input.len() < READ_BYTES_LEFT {
        input.reserve(READ_BYTES);
    }
    poll_read_buf(Pin::new(socket), context, input)
}

impl State {
    fn new(out: Vec<u8>, encoder: Encoder) -> Self {
        let mut decoder = Decoder::new();
        decoder.set_max_allowed_table_size(TABLE_BYTES);
        State {
            out,
            driver: None,
            calls: HashMap::default(),
            spare: Vec::new(),
            next_number: 1,
            waiting: VecDeque::new(),
            next_ticket: 0,
            greeted: false,
            greeting: None,
            encoder,
            decoder,
            headers: None,
            send_window: i64::from(WINDOW_AT_FIRST),
            send_window_at_first: i64::from(WINDOW_AT_FIRST),
            frame_bytes_max: FRAME_BYTES_AT_FIRST,
            calls_max: u32::MAX,
            blocked: VecDeque::new(),
            received: 0,
            closed: None,
        }
    }

    /// Has the driver send what there is to send.
    fn poke(&mut self) {
        if let Some(driver) = &self.driver {
            driver.wake_by_ref();
        }
    }

    fn close(&mut self, why: Failure) {
        if self.closed.is_none() {
            self.closed = Some(why);
        }
        self.call_all();
        if let Some(waker) = self.greeting.take() {
            waker.wake();
        }
    }

    /// Wakes the one whose turn it is to begin a call, if there is room for it.
    fn call_next(&mut self) {
        if self.calls.len() < self.calls_max as usize
            && let Some((_, waker)) = self.waiting.front()
        {
            waker.wake_by_ref();
        }
    }

    /// Wakes all who wait to begin a call.
    fn call_all(&mut self) {
        for (_, waker) in &self.waiting {
            waker.wake_by_ref();
        }
    }

    /// Begins a call and returns its number, as soon as it may and its turn has come.
    fn begin(
        &mut self,
        method: Method,
        deadline: Option<(Instant, Duration)>,
        ticket: &mut Option<u64>,
        context: &mut Context<'_>,
    ) -> Poll<Result<u32, Failure>> {
        if let Some(why) = &self.closed {
            return Poll::Ready(Err(why.clone()));
        }
        let is_next = match (*ticket, self.waiting.front()) {
            (None, first) => first.is_none(),
            (Some(ticket), first) => first.is_some_and(|(first, _)| *first == ticket),
        };
        if !is_next || self.calls.len() >= self.calls_max as usize {
            match ticket.and_then(|ticket| self.waiting.iter_mut().find(|(waiting, _)| *waiting == ticket)) {
                Some((_, waker)) => waker.clone_from(context.waker()),
                None => {
                    *ticket = Some(self.next_ticket);
                    self.waiting.push_back((self.next_ticket, context.waker().clone()));
                    self.next_ticket += 1;
                }
            }
            return Poll::Pending;
        }
        if ticket.take().is_some() {
            self.waiting.pop_front();
        }
        let number = self.next_number;
        self.next_number += 2;
        if self.next_number > CALL_NUMBER_MAX {
            self.close(Failure::new(Kind::Connection, "all numbers of calls are used up"));
        }
        let block = self.encoder.block(method);
        // A block of ours is far below a frame's smallest bound but for a very long token.
        let (first, rest) = block.split_at(block.len().min(self.frame_bytes_max));
        frame_head(
            &mut self.out,
            first.len(),
            HEADERS,
            if rest.is_empty() { END_HEADERS } else { 0 },
            number,
        );
        self.out.extend_from_slice(first);
        let mut pieces = rest.chunks(self.frame_bytes_max).peekable();
        while let Some(piece) = pieces.next() {
            let flags = if pieces.peek().is_none() { END_HEADERS } else { 0 };
            frame_head(&mut self.out, piece.len(), CONTINUATION, flags, number);
            self.out.extend_from_slice(piece);
        }
        let mut call = self.spare.pop().unwrap_or_default();
        call.send_window = self.send_window_at_first;
        call.deadline = deadline;
        self.calls.insert(number, call);
        self.call_next();
        Poll::Ready(Ok(number))
    }

    /// Forgets a call that nobody waits for any more.
    fn end(&mut self, number: u32) {
        let Some(mut call) = self.calls.remove(&number) else {
            return;
        };
        if !call.said_last || !call.heard_last {
            self.out.reserve(FRAME_HEAD_BYTES + 4);
            frame_head(&mut self.out, 4, RST_STREAM, 0, number);
            self.out.extend_from_slice(&CANCEL.to_be_bytes());
            self.poke();
        }
        let mut chunks = std::mem::take(&mut call.chunks);
        let mut unsent = std::mem::take(&mut call.unsent);
        chunks.clear();
        unsent.clear();
        self.spare.push(CallState {
            chunks,
            unsent,
            ..CallState::default()
        });
        self.call_next();
        if self.closed.is_some() {
            self.poke();
        }
    }

    fn end_late_calls(&mut self) {
        let now = Instant::now();
        for call in self.calls.values_mut() {
            if let Some((deadline, timeout)) = call.deadline
                && deadline <= now
            {
                call.finish(Err(Failure::new(
                    Kind::Timeout,
                    format_args!("no answer within {timeout:?}"),
                )));
            }
        }
    }

    fn write(&mut self, number: u32, message: Bytes, last: bool) {
        let call = self.calls.get_mut(&number).expect("a call that is not over");
        if call.end.is_some() {
            return; // The server wants no more of it, and whoever asks for the answer learns why.
        }
        call.last = last;
        let length = message.len();
        let fits = i64::try_from(length).is_ok_and(|length| length <= call.send_window.min(self.send_window));
        if call.unsent.is_empty() && fits && length <= self.frame_bytes_max {
            data(&mut self.out, number, &message, last);
            call.said_last = last;
            call.send_window -= length as i64;
            self.send_window -= length as i64;
        } else {
            if call.unsent.is_empty() {
                self.blocked.push_back(number);
            }
            call.unsent.push_back(message);
            self.write_blocked();
        }
        self.poke();
    }

    /// Sends what has waited for a window, as far as it is open now.
    fn write_blocked(&mut self) {
        for _ in 0..self.blocked.len() {
            let Some(number) = self.blocked.pop_front() else { break };
            // One that is over has nothing more to send.
            let Some(call) = self.calls.get_mut(&number).filter(|call| call.end.is_none()) else {
                continue;
            };
            while let Some(message) = call.unsent.front_mut() {
                let window = usize::try_from(call.send_window.min(self.send_window)).unwrap_or(0);
                let length = message.len().min(window).min(self.frame_bytes_max);
                if length == 0 && !message.is_empty() {
                    break;
                }
                let piece = message.split_to(length);
                if message.is_empty() {
                    call.unsent.pop_front();
                }
                let last = call.last && call.unsent.is_empty();
                data(&mut self.out, number, &piece, last);
                call.said_last = last;
                call.send_window -= length as i64;
                self.send_window -= length as i64;
            }
            if !call.unsent.is_empty() {
                self.blocked.push_back(number);
            }
        }
    }

    /// Takes the whole frames out of what has come.
    fn take_frames(&mut self, input: &mut BytesMut) -> Result<(), String> {
        while let Some((head, rest)) = input.split_at_checked(FRAME_HEAD_BYTES) {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            if length > FRAME_BYTES_AT_FIRST || !(self.greeted || head[3] == SETTINGS) {
                return Err("the server does not speak HTTP/2".to_owned());
            }
            if rest.len() < length {
                input.reserve(FRAME_HEAD_BYTES + length - input.len());
                break;
            }
            let (kind, flags) = (head[3], head[4]);
            let number = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & CALL_NUMBER_MAX;
            if kind == DATA {
                input.advance(FRAME_HEAD_BYTES);
                let payload = input.split_to(length).freeze();
                self.take_data(number, flags, payload)?;
            } else {
                self.take_frame(kind, flags, number, &rest[..length])?;
                input.advance(FRAME_HEAD_BYTES + length);
            }
        }
        Ok(())
    }

    fn take_data(&mut self, number: u32, flags: u8, mut payload: Bytes) -> Result<(), String> {
        self.expect_headers(false)?;
        self.expect_begun(number)?;
        let length = payload.len() as u32;
        self.received += length;
        if self.received >= CONNECTION_WINDOW / 2 {
            window_update(&mut self.out, 0, self.received);
            self.received = 0;
        }
        // One that nobody waits for any more.
        let Some(call) = self.calls.get_mut(&number) else {
            return Ok(());
        };
        if call.heard_last {
            return Err("data after the end of an answer".to_owned());
        }
        call.received += length;
        if call.received > STREAM_WINDOW {
            return Err("more data than there is room for".to_owned());
        }
        if flags & PADDED != 0 {
            let padding = payload.first().map(|padding| usize::from(*padding) + 1);
            let padding = padding.filter(|padding| *padding <= payload.len());
            let padding = padding.ok_or("more padding than frame")?;
            payload.advance(1);
            payload.truncate(payload.len() + 1 - padding);
        }
        if call.http_status == 0 {
            call.finish(Err(Failure::new(Kind::Protocol, "data without headers")));
        }
        if call.end.is_none() && !payload.is_empty() {
            call.taken += length - payload.len() as u32;
            call.chunks.push_back(payload);
        } else {
            // Of no use to anybody.
            call.taken += length;
            call.open_window(number, &mut self.out);
        }
        if flags & END_STREAM != 0 {
            call.complete();
        } else {
            call.wake();
        }
        Ok(())
    }

    /// A server sends nothing of a call that was not begun, nor begins any.
    fn expect_begun(&self, number: u32) -> Result<(), String> {
        if number % 2 == 1 && number < self.next_number {
            Ok(())
        } else {
            Err(format!("a frame of stream {number}, which does not exist"))
        }
    }

    /// A block of headers that is not whole is followed by its rest and by nothing else.
    fn expect_headers(&self, expected: bool) -> Result<(), String> {
        if self.headers.is_some() == expected {
            Ok(())
        } else {
            Err("frames out of order".to_owned())
        }
    }

    fn take_frame(&mut self, kind: u8, flags: u8, number: u32, mut payload: &[u8]) -> Result<(), String> {
        self.expect_headers(kind == CONTINUATION)?;
        let word = |bytes: &[u8]| bytes.first_chunk().map(|bytes| u32::from_be_bytes(*bytes));
        let wrong = || format!("a frame of kind {kind} as there is none");
        if matches!(kind, HEADERS | CONTINUATION | RST_STREAM) {
            self.expect_begun(number)?;
        }
        match kind {
            HEADERS => {
                let mut padding = 0;
                if flags & PADDED != 0 {
                    padding = usize::from(*payload.first().ok_or_else(wrong)?);
                    payload = &payload[1..];
                }
                if flags & HAS_PRIORITY != 0 {
                    payload = payload.get(5..).ok_or_else(wrong)?;
                }
                let length = payload.len().checked_sub(padding).ok_or_else(wrong)?;
                let (block, ends) = (&payload[..length], flags & END_STREAM != 0);
                if flags & END_HEADERS != 0 {
                    self.take_headers(number, ends, block)?;
                } else {
                    self.headers = Some((number, ends, block.to_vec()));
                }
            }
            CONTINUATION => {
                let (of, ends, mut block) = self.headers.take().expect("asked for above");
                if of != number || block.len() + payload.len() > HEADERS_BYTES_MAX {
                    return Err("headers out of order or without end".to_owned());
                }
                block.extend_from_slice(payload);
                if flags & END_HEADERS != 0 {
                    self.take_headers(number, ends, &block)?;
                } else {
                    self.headers = Some((number, ends, block));
                }
            }
            RST_STREAM => {
                let code = word(payload).ok_or_else(wrong)?;
                if let Some(call) = self.calls.get_mut(&number) {
                    (call.said_last, call.heard_last) = (true, true);
                    call.finish(Err(Failure::new(
                        Kind::Reset,
                        format_args!("the server reset the stream (code {code})"),
                    )));
                }
            }
            SETTINGS if number != 0 || !payload.len().is_multiple_of(6) => return Err(wrong()),
            SETTINGS if flags & ACK == 0 => {
                self.greeted = true;
                if let Some(waker) = self.greeting.take() {
                    waker.wake();
                }
                for setting in payload.chunks_exact(6) {
                    let name = u16::from_be_bytes([setting[0], setting[1]]);
                    let value = word(&setting[2..]).ok_or_else(wrong)?;
                    self.take_setting(name, value)?;
                }
                frame_head(&mut self.out, 0, SETTINGS, ACK, 0);
                self.write_blocked();
            }
            PING if payload.len() != 8 => return Err(wrong()),
            PING if flags & ACK == 0 => {
                frame_head(&mut self.out, payload.len(), PING, ACK, 0);
                self.out.extend_from_slice(payload);
            }
            GOAWAY => {
                let (last, code) = (word(payload), payload.get(4..).and_then(word));
                let (last, code) = last.zip(code).ok_or_else(wrong)?;
                let failure = Failure::new(
                    Kind::Connection,
                    format_args!("the server ends the connection (code {code})"),
                );
                self.close(failure.clone());
                for (number, call) in &mut self.calls {
                    if *number > last & CALL_NUMBER_MAX {
                        (call.said_last, call.heard_last) = (true, true);
                        call.finish(Err(failure.clone()));
                    }
                }
            }
            WINDOW_UPDATE => {
                let more = i64::from(word(payload).ok_or_else(wrong)? & CALL_NUMBER_MAX);
                if more == 0 {
                    return Err(wrong());
                }
                let window = if number == 0 {
                    Some(&mut self.send_window)
                } else {
                    self.calls.get_mut(&number).map(|call| &mut call.send_window)
                };
                if let Some(window) = window {
                    *window += more;
                    if *window > WINDOW_MAX {
                        return Err("a window that is too large".to_owned());
                    }
                    self.write_blocked();
                }
            }
            PUSH_PROMISE => return Err("the server pushes, which it may not".to_owned()),
            // Priorities, acknowledgements, and kinds that come with later versions.
            _ => {}
        }
        Ok(())
    }

    fn take_setting(&mut self, name: u16, value: u32) -> Result<(), String> {
        match name {
            HEADER_TABLE_SIZE => self.encoder.limit_table(value),
            MAX_CONCURRENT_STREAMS => {
                self.calls_max = value;
                self.call_all();
            }
            INITIAL_WINDOW_SIZE => {
                let value = i64::from(value);
                if value > WINDOW_MAX {
                    return Err("a window that is too large".to_owned());
                }
                let more = value - self.send_window_at_first;
                self.send_window_at_first = value;
                for call in self.calls.values_mut() {
                    call.send_window += more;
                    if call.send_window > WINDOW_MAX {
                        return Err("a window that is too large".to_owned());
                    }
                }
            }
            MAX_FRAME_SIZE => {
                if !(FRAME_BYTES_AT_FIRST..1 << 24).contains(&(value as usize)) {
                    return Err("frames of a size that is not allowed".to_owned());
                }
                self.frame_bytes_max = value as usize;
            }
            _ => {}
        }
        Ok(())
    }

    fn take_headers(&mut self, number: u32, ends: bool, block: &[u8]) -> Result<(), String> {
        // Read for a call that is over, too: they change what later ones mean.
        let heard = read(&mut self.decoder, block)?;
        let Some(call) = self.calls.get_mut(&number) else {
            return Ok(());
        };
        if call.heard_last {
            return Err("headers after the end of an answer".to_owned());
        }
        if call.http_status == 0 && matches!(heard.http_status, 100..=199) && !ends {
            return Ok(());
        }
        if call.http_status == 0 {
            call.http_status = heard.http_status;
        } else if !ends {
            return Err("headers in the middle of an answer".to_owned());
        }
        if heard.grpc_status.is_some() {
            call.grpc_status = heard.grpc_status;
            call.grpc_message = heard.grpc_message;
        }
        if call.http_status != 200 {
            let what = format_args!("HTTP status {}", call.http_status);
            call.finish(Err(Failure::new(Kind::Protocol, what)));
        }
        if ends {
            call.complete();
        }
        Ok(())
    }
}

fn frame_head(out: &mut Vec<u8>, length: usize, kind: u8, flags: u8, number: u32) {
    let length = u32::try_from(length).expect("a frame is far below 4 GiB").to_be_bytes();
    let number = number.to_be_bytes();
    out.extend_from_slice(&[
        length[1], length[2], length[3], kind, flags, number[0], number[1], number[2], number[3],
    ]);
}

fn window_update(out: &mut Vec<u8>, number: u32, more: u32) {
    frame_head(out, 4, WINDOW_UPDATE, 0, number);
    out.extend_from_slice(&more.to_be_bytes());
}

fn data(out: &mut Vec<u8>, number: u32, payload: &[u8], last: bool) {
    frame_head(out, payload.len(), DATA, if last { END_STREAM } else { 0 }, number);
    out.extend_from_slice(payload);
}

/// A call under way. Dropped, it is cancelled if it has not ended.
#[derive(Debug)]
pub(crate) struct Call {
    connection: Rc<Connection>,
    number: u32,
}

impl Call {
    /// Sends bytes; `last` says that no more come. They wait in memory until the server's windows take them.
    pub(crate) fn send(&mut self, message: Bytes, last: bool) {
        self.connection.state.borrow_mut().write(self.number, message, last);
    }

    /// The next bytes of the answer; none when it has ended well.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        poll_fn(|context| {
            let state = &mut *self.connection.state.borrow_mut();
            let call = state.calls.get_mut(&self.number).expect("forgotten with this");
            if let Some(chunk) = call.chunks.pop_front() {
                call.taken += chunk.len() as u32;
                if call.open_window(self.number, &mut state.out) {
                    state.poke();
                }
                return Poll::Ready(Ok(Some(chunk)));
            }
            match &call.end {
                Some(Ok(())) => Poll::Ready(Ok(None)),
                Some(Err(failure)) => Poll::Ready(Err(failure.clone())),
                None => {
                    call.waker = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.connection.state.borrow_mut().end(self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::task::{JoinSet, LocalSet, spawn_local};

    use super::*;

    /// A server that answers a call with what it was sent, and with trailers that say how many calls are under way.
    async fn echo(socket: tokio::io::DuplexStream, settings: h2::server::Builder, most: Rc<Cell<usize>>) {
        let mut connection = settings.handshake::<_, Bytes>(socket).await.unwrap();
        let now = Rc::new(Cell::new(0));
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            assert_eq!(request.method(), http::Method::POST);
            assert_eq!(request.uri().to_string(), "http://host:1/etcdserverpb.KV/Put");
            assert_eq!(request.headers()["te"], "trailers");
            now.set(now.get() + 1);
            most.set(most.get().max(now.get()));
            let now = Rc::clone(&now);
            spawn_local(async move {
                let mut body = request.into_body();
                let mut received = BytesMut::new();
                while let Some(Ok(chunk)) = body.data().await {
                    let _ = body.flow_control().release_capacity(chunk.len());
                    received.extend_from_slice(&chunk);
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
                let response = http::Response::builder().header("content-type", "application/grpc");
                let mut stream = respond.send_response(response.body(()).unwrap(), false).unwrap();
                stream.send_data(received.freeze(), false).unwrap();
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
                now.set(now.get() - 1);
                stream.send_trailers(trailers).unwrap();
            });
        }
    }

    /// Time passes only while all wait for it, so that nothing depends on how fast the machine is.
    fn run<F: Future>(test: F) -> F::Output {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        LocalSet::new().block_on(&runtime, test)
    }

    async fn whole(mut call: Call) -> Result<Vec<u8>, Failure> {
        let mut answer = Vec::new();
        while let Some(chunk) = call.next().await? {
            answer.extend_from_slice(&chunk);
        }
        Ok(answer)
    }

    #[test]
    fn answers_are_what_was_sent_whatever_the_server_takes_at_once() {
        let mut plain = h2::server::Builder::new();
        let mut narrow = h2::server::Builder::new();
        narrow.initial_window_size(100).initial_connection_window_size(70_000);
        let mut few = h2::server::Builder::new();
        few.max_concurrent_streams(3);
        let mut no_table = h2::server::Builder::new();
        no_table.header_table_size(0);
        for settings in [plain.max_frame_size(1 << 20), &narrow, &few, &no_table] {
            let settings = settings.clone();
            run(async move {
                // Little room, so that everything is cut anywhere.
                let (ours, theirs) = tokio::io::duplex(1000);
                // As with TLS, what is written is not yet on its way.
                let ours = tokio::io::BufWriter::with_capacity(3000, ours);
                let most = Rc::new(Cell::new(0));
                spawn_local(echo(theirs, settings.clone(), Rc::clone(&most)));
                let (connection, _driver) = Connection::start(ours, false, "host:1".to_owned());
                // The first call learns of the server's settings.
                let mut first = connection.call(Method::Put, None).await.unwrap();
                first.send(Bytes::from_static(b"first"), true);
                assert_eq!(whole(first).await.unwrap(), b"first");
                let mut calls = JoinSet::new();
                for length in [0, 1, 99, 100, 101, 5000, 16_384, 16_385, 70_000, 200_000] {
                    for copy in 0..3 {
                        let connection = Rc::clone(&connection);
                        calls.spawn_local(async move {
                            let sent: Vec<u8> = (0..length).map(|at| (at + copy) as u8).collect();
                            let mut call = connection.call(Method::Put, None).await.unwrap();
                            call.send(sent.clone().into(), true);
                            assert!(whole(call).await.unwrap() == sent, "{length} bytes");
                        });
                    }
                }
                calls.join_all().await;
                assert!(connection.state.borrow().calls.is_empty());
                assert!(most.get() >= 3, "{most:?} calls at once");
                assert!(connection.state.borrow().calls_max > 3 || most.get() == 3, "{most:?}");
            });
        }
    }

    #[test]
    fn more_than_all_windows_hold_comes_and_goes() {
        run(async {
            let (ours, theirs) = tokio::io::duplex(1 << 20);
            spawn_local(echo(theirs, h2::server::Builder::new(), Rc::default()));
            let (connection, _driver) = Connection::start(ours, false, "host:1".to_owned());
            let sent = Bytes::from(vec![7; 5 * STREAM_WINDOW as usize / 2]);
            // More in each call than a call's window, and in the end than the connection's.
            for _ in 0..CONNECTION_WINDOW / (2 * STREAM_WINDOW) {
                let mut call = connection.call(Method::Put, None).await.unwrap();
                call.send(sent.clone(), true);
                assert!(whole(call).await.unwrap() == sent);
            }
        });
    }

    #[test]
    fn a_call_ends_in_time_and_nothing_comes_after_the_connection() {
        run(async {
            let (ours, theirs) = tokio::io::duplex(1000);
            let server = h2::server::handshake(theirs);
            let (connection, driver) = Connection::start(ours, false, "host:1".to_owned());
            let (go, gone) = tokio::sync::oneshot::channel::<()>();
            let silent = spawn_local(async move {
                let mut server = server.await.unwrap();
                let (_request, mut unanswered) = server.accept().await.unwrap().unwrap();
                // It serves on, until it is told to go.
                tokio::select! {
                    _ = server.accept() => panic!("there is one call"),
                    () = async {
                        let reset = poll_fn(|context| unanswered.poll_reset(context)).await.unwrap();
                        assert_eq!(reset, h2::Reason::CANCEL);
                        gone.await.unwrap();
                    } => {}
                }
            });
            let timeout = Duration::from_millis(100);
            let deadline = Some((Instant::now() + timeout, timeout));
            let mut call = connection.call(Method::Put, deadline).await.unwrap();
            call.send(Bytes::from_static(b"x"), true);
            assert_eq!(whole(call).await.unwrap_err().kind, Kind::Timeout);
            go.send(()).unwrap();
            silent.await.unwrap();
            let waiting = connection.call(Method::Put, None).await;
            let failure = match waiting {
                Ok(call) => whole(call).await.unwrap_err(),
                Err(failure) => failure,
            };
            assert_eq!(failure.kind, Kind::Connection, "{failure}");
            driver.await.unwrap();
            assert!(connection.call(Method::Put, None).await.is_err());
        });
    }

    #[test]
    fn all_have_their_turn_where_the_server_takes_few_calls() {
        run(async {
            let (ours, theirs) = tokio::io::duplex(1 << 16);
            let mut settings = h2::server::Builder::new();
            settings.max_concurrent_streams(3);
            spawn_local(echo(theirs, settings, Rc::default()));
            let (connection, _driver) = Connection::start(ours, false, "host:1".to_owned());
            let counts: Rc<[Cell<u32>; 10]> = Rc::default();
            let lost = Rc::new(Cell::new(0));
            let mut clients = JoinSet::new();
            for client in 0..counts.len() {
                let (connection, counts) = (Rc::clone(&connection), Rc::clone(&counts));
                let lost = Rc::clone(&lost);
                clients.spawn_local(async move {
                    let mut tries = 0;
                    while counts.iter().map(Cell::get).sum::<u32>() < 200 {
                        // Some lose patience, and their turn with it.
                        let patience = Duration::from_millis(5 + (client as u64 + tries) % 5);
                        tries += 1;
                        let call = connection.call(Method::Put, None);
                        let Ok(call) = tokio::time::timeout(patience, call).await else {
                            lost.set(lost.get() + 1);
                            continue;
                        };
                        let mut call = call.unwrap();
                        call.send(Bytes::from_static(b"x"), true);
                        whole(call).await.unwrap();
                        counts[client].set(counts[client].get() + 1);
                    }
                });
            }
            let all = tokio::time::timeout(Duration::from_secs(60), clients.join_all());
            assert!(all.await.is_ok(), "stuck: {counts:?}, {lost:?} lost");
            let fewest = counts.iter().map(Cell::get).min();
            assert!(fewest >= Some(5) && lost.get() > 5, "{counts:?}, {lost:?} lost");
            assert!(connection.state.borrow().waiting.is_empty());
        });
    }

    #[test]
    fn a_server_greets_or_is_no_server() {
        run(async {
            let (ours, theirs) = tokio::io::duplex(1000);
            spawn_local(echo(theirs, h2::server::Builder::new(), Rc::default()));
            let (connection, _driver) = Connection::start(ours, false, "host:1".to_owned());
            connection.greeted().await.unwrap();
            connection.greeted().await.unwrap();

            let (ours, theirs) = tokio::io::duplex(1000);
            let (connection, _driver) = Connection::start(ours, false, "host:1".to_owned());
            let greeted = tokio::time::timeout(4 * TICK, connection.greeted()).await;
            assert!(greeted.is_err(), "it says nothing, but it is there");
            drop(theirs);
            assert_eq!(connection.greeted().await.unwrap_err().kind, Kind::Connection);
        });
    }

    #[test]
    fn a_connection_that_nobody_uses_ends() {
        run(async {
            let (ours, theirs) = tokio::io::duplex(1000);
            spawn_local(echo(theirs, h2::server::Builder::new(), Rc::default()));
            let (connection, driver) = Connection::start(ours, false, "host:1".to_owned());
            let mut call = connection.call(Method::Put, None).await.unwrap();
            drop(connection);
            tokio::time::sleep(2 * TICK).await;
            call.send(Bytes::from_static(b"x"), true);
            assert_eq!(whole(call).await.unwrap(), b"x");
            driver.await.unwrap();
        });
    }

    fn frame(kind: u8, flags: u8, number: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        frame_head(&mut bytes, payload.len(), kind, flags, number);
        bytes.extend_from_slice(payload);
        bytes
    }

    /// A block of headers that leaves the table alone.
    fn block(fields: &[(&str, &str)]) -> Vec<u8> {
        let mut block = Vec::new();
        for (name, value) in fields {
            block.push(0);
            for text in [name, value] {
                block.push(text.len() as u8);
                block.extend_from_slice(text.as_bytes());
            }
        }
        block
    }

    /// What becomes of the first call if the server sends this after its settings, byte by byte; what of the
    /// connection; and what the server got after the first call's headers.
    fn answered(frames: &[Vec<u8>]) -> (Result<Vec<u8>, Failure>, Option<Failure>, Vec<u8>) {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        run(async {
            let (ours, mut theirs) = tokio::io::duplex(1 << 20);
            let (connection, driver) = Connection::start(ours, false, "host:1".to_owned());
            let mut call = connection.call(Method::Put, None).await.unwrap();
            let mut head = [0; 200];
            let ours = theirs.read(&mut head).await.unwrap();
            assert!(ours > PREFACE.len() && head.starts_with(PREFACE));
            for byte in [frame(SETTINGS, 0, 0, &[])].iter().chain(frames).flatten() {
                // It may have ended by then.
                let _ = theirs.write_all(&[*byte]).await;
                tokio::task::yield_now().await;
            }
            let mut answer = Vec::new();
            let end = loop {
                match tokio::time::timeout(4 * TICK, call.next()).await {
                    Ok(Ok(Some(chunk))) => answer.extend_from_slice(&chunk),
                    Ok(Ok(None)) => break Ok(answer),
                    Ok(Err(failure)) => break Err(failure),
                    Err(_) => panic!("it goes on, with {answer:?}"),
                }
            };
            call.send(Bytes::from_static(b"late"), true);
            drop(call);
            connection.close(&Failure::new(Kind::Connection, "done"));
            driver.await.unwrap();
            let mut got = Vec::new();
            theirs.read_to_end(&mut got).await.unwrap();
            let closed = connection.state.borrow().closed.clone();
            (end, closed.filter(|why| why.message != "done"), got)
        })
    }

    #[test]
    fn answers_and_failures_are_told_apart() {
        let (heads, last) = (END_HEADERS, END_HEADERS | END_STREAM);
        let ok = block(&[(":status", "200")]);
        let fine = block(&[("grpc-status", "0")]);
        let head = frame(HEADERS, heads, 1, &ok);
        let settings_ack = frame(SETTINGS, ACK, 0, &[]);
        let cancel = frame(RST_STREAM, 0, 1, &CANCEL.to_be_bytes());
        let kind = |answer: &Result<Vec<u8>, Failure>| answer.as_ref().unwrap_err().kind;

        // In pieces, with padding, between frames of other things and of later times.
        let (answer, closed, got) = answered(&[
            frame(HEADERS, heads, 1, &block(&[(":status", "103")])),
            frame(HEADERS, 0, 1, &ok[..3]),
            frame(CONTINUATION, 0, 1, &ok[3..5]),
            frame(CONTINUATION, END_HEADERS, 1, &ok[5..]),
            frame(DATA, PADDED, 1, &[2, b'x', 0, 0]),
            frame(77, 0xff, 5, b"of later times"),
            frame(PING, 0, 0, b"are you?"),
            frame(SETTINGS, ACK, 0, &[]),
            frame(DATA, 0, 1, b"y"),
            frame(
                HEADERS,
                last | PADDED | HAS_PRIORITY,
                1,
                &[&[2, 0, 0, 0, 0, 9][..], &fine, &[0, 0]].concat(),
            ),
        ]);
        assert_eq!((answer, closed), (Ok(b"xy".to_vec()), None));
        // We had not said our last, and it is not wanted any more.
        assert_eq!(
            got,
            [settings_ack.clone(), frame(PING, ACK, 0, b"are you?"), cancel.clone()].concat()
        );

        // The outcome may come with the first headers, with or without more after them.
        let refused = block(&[(":status", "200"), ("grpc-status", "14"), ("grpc-message", "no leader")]);
        for frames in [
            vec![frame(HEADERS, last, 1, &refused)],
            vec![frame(HEADERS, heads, 1, &refused), frame(DATA, END_STREAM, 1, b"")],
        ] {
            let (answer, closed, _) = answered(&frames);
            assert_eq!(answer.unwrap_err().to_string(), "Unavailable: no leader");
            assert_eq!(closed, None);
        }

        let html = frame(DATA, END_STREAM, 1, b"<html>");
        for frames in [
            vec![frame(HEADERS, heads, 1, &block(&[(":status", "502")])), html.clone()],
            vec![frame(HEADERS, last, 1, &block(&[(":status", "100")]))],
            vec![frame(HEADERS, last, 1, &ok)],
            vec![head.clone(), html.clone()],
            vec![html],
        ] {
            let (answer, closed, _) = answered(&frames);
            assert!(!matches!(&answer, Err(failure) if failure.message.contains("compressed")));
            // What came without an outcome is handed out before it turns out to have none.
            assert_eq!((kind(&answer), closed), (Kind::Protocol, None), "{frames:?}");
        }

        let (answer, closed, got) = answered(&[head.clone(), frame(RST_STREAM, 0, 1, &2_u32.to_be_bytes())]);
        assert_eq!((kind(&answer), closed), (Kind::Reset, None));
        // Nothing is sent on what the server has reset.
        assert_eq!(got, settings_ack);

        let (answer, closed, got) = answered(&[frame(GOAWAY, 0, 0, &[0; 8])]);
        assert_eq!(
            (kind(&answer), closed.unwrap().kind),
            (Kind::Connection, Kind::Connection)
        );
        assert_eq!(got, settings_ack);
        let goaway = frame(GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 0]);
        let (answer, closed, _) = answered(&[goaway, head, frame(HEADERS, last, 1, &fine)]);
        assert_eq!((answer, closed.unwrap().kind), (Ok(Vec::new()), Kind::Connection));
    }

    #[test]
    fn a_server_that_breaks_the_rules_ends_the_connection() {
        let (heads, last) = (END_HEADERS, END_HEADERS | END_STREAM);
        let ok = block(&[(":status", "200")]);
        let head = frame(HEADERS, heads, 1, &ok);
        let setting = |name: u16, value: u32| [&name.to_be_bytes()[..], &value.to_be_bytes()].concat();
        let wrong: [(&str, Vec<u8>); 26] = [
            ("does not speak HTTP/2", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
            ("headers that can't be read", frame(HEADERS, heads, 1, &[0xff, 0xff])),
            (
                "headers that can't be read",
                frame(HEADERS, heads, 1, &[0x3f, 0xe2, 0x1f]),
            ),
            ("kind 1 as there is none", frame(HEADERS, heads | PADDED, 1, &[9, 0x88])),
            (
                "kind 1 as there is none",
                frame(HEADERS, heads | HAS_PRIORITY, 1, &[0x88]),
            ),
            (
                "out of order",
                [frame(HEADERS, 0, 1, &[0x88]), frame(PING, 0, 0, &[0; 8])].concat(),
            ),
            (
                "out of order",
                [frame(HEADERS, 0, 1, &[0x88]), frame(DATA, 0, 1, b"x")].concat(),
            ),
            ("out of order", frame(CONTINUATION, heads, 1, &[0x88])),
            ("does not exist", frame(HEADERS, heads, 2, &ok)),
            ("does not exist", frame(HEADERS, heads, 3, &ok)),
            ("does not exist", frame(DATA, 0, 0, b"x")),
            ("does not exist", frame(RST_STREAM, 0, 99, &[0; 4])),
            ("more padding", frame(DATA, PADDED, 1, &[2, 0])),
            ("more padding", frame(DATA, PADDED, 1, &[])),
            ("in the middle", [head.clone(), head.clone()].concat()),
            ("after the end", [frame(HEADERS, last, 1, &ok), head.clone()].concat()),
            (
                "after the end",
                [frame(HEADERS, last, 1, &ok), frame(DATA, 0, 1, b"x")].concat(),
            ),
            ("kind 3 as there is none", frame(RST_STREAM, 0, 1, &[0])),
            ("kind 7 as there is none", frame(GOAWAY, 0, 0, &[0; 4])),
            ("pushes", frame(PUSH_PROMISE, heads, 1, &[0, 0, 0, 2, 0x88])),
            (
                "too large",
                frame(SETTINGS, 0, 0, &setting(INITIAL_WINDOW_SIZE, 1 << 31)),
            ),
            ("not allowed", frame(SETTINGS, 0, 0, &setting(MAX_FRAME_SIZE, 1))),
            ("kind 4 as there is none", frame(SETTINGS, 0, 0, &[0; 5])),
            ("kind 6 as there is none", frame(PING, 0, 0, &[0; 5])),
            ("too large", frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff])),
            ("kind 8 as there is none", frame(WINDOW_UPDATE, 0, 1, &[0; 4])),
        ];
        for (message, wrong) in wrong {
            let (_, closed, _) = answered(std::slice::from_ref(&wrong));
            let closed = closed.unwrap_or_else(|| panic!("{wrong:?} is taken"));
            assert_eq!(closed.kind, Kind::Connection);
            assert!(closed.message.contains(message), "{}: {wrong:?}", closed.message);
        }
        let chunk = frame(DATA, 0, 1, &[7; FRAME_BYTES_AT_FIRST]);
        let mut state = State::new(Vec::new(), Encoder::new(false, String::new()));
        (state.greeted, state.next_number) = (true, 3);
        let call = CallState {
            http_status: 200,
            ..CallState::default()
        };
        state.calls.insert(1, call);
        let taken = (0..=STREAM_WINDOW as usize / FRAME_BYTES_AT_FIRST)
            .map(|_| state.take_frames(&mut BytesMut::from(&chunk[..])))
            .collect::<Vec<_>>();
        let (fits, last) = taken.split_at(taken.len() - 1);
        assert!(fits.iter().all(Result::is_ok), "{fits:?}");
        assert_eq!(last, [Err("more data than there is room for".to_owned())]);
    }
}
