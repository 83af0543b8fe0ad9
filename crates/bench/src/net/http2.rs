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
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use loona_hpack::Decoder;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::io::poll_read_buf;

use super::failure::{Failure, Kind};
use super::grpc::{Method, outcome};
use super::headers::{Encoder, read};

/// What a call, and what a connection, may have on the way to us, in bytes: enough never to hold a server back.
const STREAM_WINDOW: u32 = 16 << 20;
const CONNECTION_WINDOW: u32 = 256 << 20;
/// Largest HTTP/2 frame we take, in bytes.
const FRAME_BYTES_MAX: usize = 1 << 20;
/// Largest block of headers we take, in bytes.
const HEADERS_BYTES_MAX: usize = 256 << 10;
/// What is read at once, in bytes.
const READ_BYTES: usize = 128 << 10;
/// What both sides' windows are before they say otherwise, and their largest frames, in bytes.
const WINDOW_AT_FIRST: u32 = 65_535;
const FRAME_BYTES_AT_FIRST: usize = 16_384;
/// Windows that grow beyond this are an error.
const WINDOW_MAX: i64 = (1 << 31) - 1;
/// The last number that a call can have.
const CALL_NUMBER_MAX: u32 = (1 << 31) - 1;
/// How exactly a call's time is kept.
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
    /// Told when another call may begin.
    room: Notify,
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
    /// What was taken since its window was last opened again.
    taken: u32,
    http_status: u16,
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
}

impl Connection {
    /// Begins to speak HTTP/2 over a socket. Returns the connection and the task that moves its bytes, which ends when
    /// the connection does. Must be called within a `LocalSet`.
    pub(crate) fn start<T>(socket: T, tls: bool, authority: String) -> (Rc<Self>, tokio::task::JoinHandle<()>)
    where
        T: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let mut out = PREFACE.to_vec();
        let settings = [
            (ENABLE_PUSH, 0),
            (INITIAL_WINDOW_SIZE, STREAM_WINDOW),
            (MAX_FRAME_SIZE, FRAME_BYTES_MAX as u32),
        ];
        frame_head(&mut out, 6 * settings.len(), SETTINGS, 0, 0);
        for (name, value) in settings {
            out.extend_from_slice(&name.to_be_bytes());
            out.extend_from_slice(&u32::to_be_bytes(value));
        }
        window_update(&mut out, 0, CONNECTION_WINDOW - WINDOW_AT_FIRST);
        let connection = Rc::new(Connection {
            state: RefCell::new(State {
                out,
                driver: None,
                calls: HashMap::default(),
                spare: Vec::new(),
                next_number: 1,
                encoder: Encoder::new(tls, authority),
                decoder: Decoder::new(),
                headers: None,
                send_window: i64::from(WINDOW_AT_FIRST),
                send_window_at_first: i64::from(WINDOW_AT_FIRST),
                frame_bytes_max: FRAME_BYTES_AT_FIRST,
                calls_max: u32::MAX,
                blocked: VecDeque::new(),
                received: 0,
                closed: None,
            }),
            room: Notify::new(),
        });
        let driver = tokio::task::spawn_local(Rc::clone(&connection).drive(socket));
        (connection, driver)
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
        self.room.notify_waiters();
    }

    /// Begins a call, as soon as the server lets us. It fails when it has taken longer than `timeout` from then on.
    pub(crate) async fn call(self: &Rc<Self>, method: Method, timeout: Option<Duration>) -> Result<Call, Failure> {
        loop {
            let room = self.room.notified();
            if let Some(number) = self.state.borrow_mut().begin(method, timeout)? {
                return Ok(Call {
                    connection: Rc::clone(self),
                    number,
                });
            }
            room.await;
        }
    }

    async fn drive<T: AsyncRead + AsyncWrite + Unpin>(self: Rc<Self>, mut socket: T) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut input, mut written) = (BytesMut::new(), 0);
        let failure = poll_fn(|context| {
            let state = &mut *self.state.borrow_mut();
            if !state
                .driver
                .as_ref()
                .is_some_and(|waker| waker.will_wake(context.waker()))
            {
                state.driver = Some(context.waker().clone());
            }
            if ticks.poll_tick(context).is_ready() {
                state.end_late_calls();
                // It is registered again.
                while ticks.poll_tick(context).is_ready() {}
            }
            loop {
                if let Poll::Ready(Err(error)) = send(&mut socket, state, &mut written, context) {
                    return Poll::Ready(Failure::new(Kind::Connection, error));
                }
                match receive(&mut socket, &mut input, context) {
                    Poll::Pending => break,
                    Poll::Ready(Err(error)) => return Poll::Ready(Failure::new(Kind::Connection, error)),
                    Poll::Ready(Ok(0)) => {
                        return Poll::Ready(Failure::new(Kind::Connection, "the server closed the connection"));
                    }
                    Poll::Ready(Ok(_)) => {
                        let calls_max = state.calls_max;
                        if let Err(what) = state.take_frames(&mut input) {
                            return Poll::Ready(Failure::new(Kind::Connection, what));
                        }
                        if state.calls_max > calls_max || state.closed.is_some() {
                            self.room.notify_waiters();
                        }
                    }
                }
            }
            match &state.closed {
                Some(why) if state.calls.is_empty() && state.out.is_empty() => Poll::Ready(why.clone()),
                _ => Poll::Pending,
            }
        })
        .await;
        let state = &mut *self.state.borrow_mut();
        state.close(failure.clone());
        self.room.notify_waiters();
        for call in state.calls.values_mut() {
            call.finish(Err(failure.clone()));
        }
    }
}

/// Sends what there is to send, as far as the socket takes it.
fn send<T: AsyncWrite + Unpin>(
    socket: &mut T,
    state: &mut State,
    written: &mut usize,
    context: &mut Context<'_>,
) -> Poll<std::io::Result<()>> {
    if state.out.is_empty() {
        return Poll::Ready(Ok(()));
    }
    while *written < state.out.len() {
        match Pin::new(&mut *socket).poll_write(context, &state.out[*written..]) {
            Poll::Ready(Ok(0)) => return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into())),
            Poll::Ready(Ok(count)) => *written += count,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => return Poll::Pending,
        }
    }
    state.out.clear();
    *written = 0;
    Pin::new(socket).poll_flush(context)
}

/// Takes what has come, behind what is not whole yet.
fn receive<T: AsyncRead + Unpin>(
    socket: &mut T,
    input: &mut BytesMut,
    context: &mut Context<'_>,
) -> Poll<std::io::Result<usize>> {
    input.reserve(READ_BYTES);
    poll_read_buf(Pin::new(socket), context, input)
}

impl State {
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
    }

    /// Begins a call and returns its number; none if the server takes no more at once.
    fn begin(&mut self, method: Method, timeout: Option<Duration>) -> Result<Option<u32>, Failure> {
        if let Some(why) = &self.closed {
            return Err(why.clone());
        }
        if self.calls.len() >= self.calls_max as usize {
            return Ok(None);
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
        call.deadline = timeout.map(|timeout| (Instant::now() + timeout, timeout));
        self.calls.insert(number, call);
        Ok(Some(number))
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
        call.last = last;
        let length = message.len();
        let fits = i64::try_from(length).is_ok_and(|length| length <= call.send_window.min(self.send_window));
        if call.unsent.is_empty() && fits && length <= self.frame_bytes_max {
            data(&mut self.out, number, &message, last);
            call.said_last = last;
            call.send_window -= length as i64;
            self.send_window -= length as i64;
        } else {
            call.unsent.push_back(message);
            self.blocked.push_back(number);
            self.write_blocked();
        }
        self.poke();
    }

    /// Sends what has waited for a window, as far as it is open now.
    fn write_blocked(&mut self) {
        for _ in 0..self.blocked.len() {
            let Some(number) = self.blocked.pop_front() else { break };
            // One that is over has nothing more to send; one that was there twice had its turn.
            let Some(call) = self.calls.get_mut(&number) else {
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
            if length > FRAME_BYTES_MAX {
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
        self.received += payload.len() as u32;
        if self.received >= CONNECTION_WINDOW / 2 {
            window_update(&mut self.out, 0, self.received);
            self.received = 0;
        }
        // One that nobody waits for any more.
        let Some(call) = self.calls.get_mut(&number) else {
            return Ok(());
        };
        let length = payload.len() as u32;
        if flags & PADDED != 0 {
            let padding = payload.first().map(|padding| usize::from(*padding) + 1);
            let padding = padding.filter(|padding| *padding <= payload.len());
            let padding = padding.ok_or("more padding than frame")?;
            payload.advance(1);
            payload.truncate(payload.len() + 1 - padding);
        }
        // What is not handed out counts for the window at once.
        call.taken += length - payload.len() as u32;
        if !payload.is_empty() {
            call.chunks.push_back(payload);
        }
        if flags & END_STREAM != 0 {
            call.heard_last = true;
            call.finish(outcome(None, &[]));
        } else {
            call.wake();
        }
        Ok(())
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
        let short = || format!("a frame of kind {kind} that is too short");
        match kind {
            HEADERS => {
                let mut padding = 0;
                if flags & PADDED != 0 {
                    padding = usize::from(*payload.first().ok_or_else(short)?);
                    payload = &payload[1..];
                }
                if flags & HAS_PRIORITY != 0 {
                    payload = payload.get(5..).ok_or_else(short)?;
                }
                let length = payload.len().checked_sub(padding).ok_or_else(short)?;
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
                let code = word(payload).ok_or_else(short)?;
                if let Some(call) = self.calls.get_mut(&number) {
                    (call.said_last, call.heard_last) = (true, true);
                    call.finish(Err(Failure::new(
                        Kind::Reset,
                        format_args!("the server reset the stream (code {code})"),
                    )));
                }
            }
            SETTINGS if flags & ACK == 0 => {
                for setting in payload.chunks_exact(6) {
                    let name = u16::from_be_bytes([setting[0], setting[1]]);
                    let value = word(&setting[2..]).ok_or_else(short)?;
                    self.take_setting(name, value)?;
                }
                frame_head(&mut self.out, 0, SETTINGS, ACK, 0);
                self.write_blocked();
            }
            PING if flags & ACK == 0 => {
                frame_head(&mut self.out, payload.len(), PING, ACK, 0);
                self.out.extend_from_slice(payload);
            }
            GOAWAY => {
                let (last, code) = (word(payload), payload.get(4..).and_then(word));
                let (last, code) = last.zip(code).ok_or_else(short)?;
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
                let more = i64::from(word(payload).ok_or_else(short)? & CALL_NUMBER_MAX);
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
            MAX_CONCURRENT_STREAMS => self.calls_max = value,
            INITIAL_WINDOW_SIZE => {
                let value = i64::from(value);
                if value > WINDOW_MAX {
                    return Err("a window that is too large".to_owned());
                }
                let more = value - self.send_window_at_first;
                self.send_window_at_first = value;
                for call in self.calls.values_mut() {
                    call.send_window += more;
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
        call.heard_last |= ends;
        match heard.http_status {
            100..=199 => return Ok(()),
            0 => {}
            status => call.http_status = status,
        }
        if call.http_status != 200 {
            let what = format_args!("HTTP status {}", call.http_status);
            call.finish(Err(Failure::new(Kind::Protocol, what)));
        } else if ends {
            call.finish(outcome(heard.grpc_status.as_deref(), &heard.grpc_message));
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
                if call.taken >= STREAM_WINDOW / 2 && call.end.is_none() {
                    window_update(&mut state.out, self.number, std::mem::take(&mut call.taken));
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
        self.connection.room.notify_one();
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

    fn run<F: Future>(test: F) -> F::Output {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
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
            let sent = Bytes::from(vec![7; CONNECTION_WINDOW as usize / 20]);
            // More in the end than the connection's window, and in one call more than half a call's.
            for _ in 0..22 {
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
                let unanswered = server.accept().await.unwrap().unwrap();
                // It serves on, until it is told to go.
                tokio::select! {
                    _ = server.accept() => panic!("there is one call"),
                    _ = gone => drop(unanswered),
                }
            });
            let timeout = Duration::from_millis(100);
            let mut call = connection.call(Method::Put, Some(timeout)).await.unwrap();
            call.send(Bytes::from_static(b"x"), true);
            assert_eq!(whole(call).await.unwrap_err().kind, Kind::Timeout);
            go.send(()).unwrap();
            silent.await.unwrap();
            let waiting = connection.call(Method::Put, Some(timeout)).await;
            let failure = match waiting {
                Ok(call) => whole(call).await.unwrap_err(),
                Err(failure) => failure,
            };
            assert_eq!(failure.kind, Kind::Connection, "{failure}");
            driver.await.unwrap();
            assert!(connection.call(Method::Put, None).await.is_err());
        });
    }

    /// What a server may send, each time cut into pieces of one byte, and what becomes of the connection.
    #[test]
    fn a_server_that_breaks_the_rules_ends_the_connection() {
        let frame = |kind, flags, number, payload: &[u8]| {
            let mut bytes = Vec::new();
            frame_head(&mut bytes, payload.len(), kind, flags, number);
            bytes.extend_from_slice(payload);
            bytes
        };
        let wrong = [
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            frame(HEADERS, END_HEADERS, 1, &[0xff, 0xff]),
            frame(HEADERS, END_HEADERS | PADDED, 1, &[9, 0x88]),
            frame(HEADERS, END_HEADERS | HAS_PRIORITY, 1, &[0x88]),
            [frame(HEADERS, 0, 1, &[0x88]), frame(PING, 0, 0, &[0; 8])].concat(),
            [frame(HEADERS, 0, 1, &[0x88]), frame(DATA, 0, 1, b"x")].concat(),
            frame(CONTINUATION, END_HEADERS, 1, &[0x88]),
            frame(DATA, PADDED, 1, &[2, 0]),
            frame(DATA, PADDED, 1, &[]),
            frame(RST_STREAM, 0, 1, &[0]),
            frame(GOAWAY, 0, 0, &[0; 4]),
            frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 2, 0x88]),
            frame(SETTINGS, 0, 0, &[0, INITIAL_WINDOW_SIZE as u8, 0x80, 0, 0, 0]),
            frame(SETTINGS, 0, 0, &[0, MAX_FRAME_SIZE as u8, 0, 0, 0, 1]),
            frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]),
        ];
        let fine = [
            frame(HEADERS, 0, 1, &[]),
            frame(CONTINUATION, END_HEADERS, 1, &[0x88]),
            frame(DATA, PADDED, 1, &[2, b'x', 0, 0]),
            frame(DATA, 0, 99, b"of another call"),
            frame(77, 0xff, 5, b"of later times"),
            frame(PING, 0, 0, b"are you?"),
            frame(SETTINGS, ACK, 0, &[]),
        ];
        for (number, wrong) in wrong.iter().enumerate() {
            run(async {
                let (ours, mut theirs) = tokio::io::duplex(1 << 20);
                let (connection, driver) = Connection::start(ours, false, "host:1".to_owned());
                let mut call = connection.call(Method::Put, None).await.unwrap();
                let pieces = fine.concat();
                for byte in &pieces {
                    tokio::io::AsyncWriteExt::write_all(&mut theirs, &[*byte])
                        .await
                        .unwrap();
                    tokio::task::yield_now().await;
                }
                assert_eq!(call.next().await, Ok(Some(Bytes::from_static(b"x"))));
                for byte in wrong {
                    // It may have ended by then.
                    let _ = tokio::io::AsyncWriteExt::write_all(&mut theirs, &[*byte]).await;
                    tokio::task::yield_now().await;
                }
                let ended = tokio::time::timeout(Duration::from_secs(5), driver).await;
                ended.unwrap_or_else(|_| panic!("number {number} is taken")).unwrap();
                assert_eq!(call.next().await.unwrap_err().kind, Kind::Connection);
            });
        }
    }
}
