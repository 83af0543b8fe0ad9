//! Frames: how bytes are cut from a connection, and how many frames go into one write.

use std::io::{self, IoSlice};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::wire::kind;

/// Bytes before the payload: its length and its checksum.
pub(super) const HEADER_BYTES: usize = 8;
/// Parts of a frame from this size on are written from where they lie; smaller ones are cheaper to copy.
const WHOLE_BYTES_MIN: usize = 8 << 10;
/// Room to read into.
const READ_BYTES: usize = 64 << 10;
/// With less room than this left, new room is taken. Frames are pieces of it, and what lives on of one, such as an entry
/// of the log, keeps all of it in memory: so it has to be shared by as many as fit.
const READ_BYTES_MIN: usize = 4 << 10;
/// Most parts in one write.
const SLICES_MAX: usize = 64;

/// Why bytes are no frame. The connection cannot be used any more: where the next frame begins is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    /// The length is above the limit. Nothing was allocated for it.
    #[error("a frame of {length} bytes, where {max} are allowed")]
    TooLong { length: usize, max: usize },
    /// A frame without a payload.
    #[error("an empty frame")]
    Empty,
    /// The payload is not what was sent.
    #[error("a frame of {length} bytes has a wrong checksum")]
    Checksum { length: usize },
}

/// Why nothing can be read from a connection any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    /// The other side closed it.
    #[error("closed by the other side")]
    Closed,
    /// It broke.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It carries something that is not our protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Nothing arrived.
    #[error("silent for {0:?}")]
    Silent(Duration),
}

/// A frame's payload, and its checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) payload: Bytes,
    pub(super) checksum: u32,
}

impl Frame {
    /// The kind, and what comes after it.
    pub(super) fn split(mut self) -> (u8, Bytes) {
        // A frame is never empty.
        let kind = self.payload.get_u8();
        (kind, self.payload)
    }
}

/// Cuts a frame from the front of a buffer; `None` if it is not all there. Never allocates.
pub(super) fn cut_frame(buffer: &mut BytesMut, payload_max: usize) -> Result<Option<Frame>, FrameError> {
    let Some((length, checksum)) = peek_header(buffer) else {
        return Ok(None);
    };
    if length > payload_max {
        return Err(FrameError::TooLong {
            length,
            max: payload_max,
        });
    }
    if length == 0 {
        return Err(FrameError::Empty);
    }
    if buffer.len() < HEADER_BYTES + length {
        return Ok(None);
    }
    buffer.advance(HEADER_BYTES);
    let payload = buffer.split_to(length).freeze();
    if crc32c::crc32c(&payload) != checksum {
        return Err(FrameError::Checksum { length });
    }
    Ok(Some(Frame { payload, checksum }))
}

fn peek_header(buffer: &[u8]) -> Option<(usize, u32)> {
    let (header, _) = buffer.split_first_chunk::<HEADER_BYTES>()?;
    let (mut length, mut checksum) = header.split_at(4);
    Some((length.get_u32_le() as usize, checksum.get_u32_le()))
}

/// A number at the front of a body.
pub(super) fn take_u64(body: &mut Bytes) -> Option<u64> {
    (body.len() >= 8).then(|| body.get_u64_le())
}

/// Reads frames. All methods may be cancelled without a loss.
pub(super) struct FrameReader<R> {
    reader: R,
    buffer: BytesMut,
    payload_max: usize,
    /// Bytes read since this was last taken.
    read_bytes: u64,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(super) fn new(reader: R, payload_max: usize) -> Self {
        FrameReader {
            reader,
            buffer: BytesMut::new(),
            payload_max,
            read_bytes: 0,
        }
    }

    /// The same connection with another limit.
    pub(super) fn set_payload_max(&mut self, payload_max: usize) {
        self.payload_max = payload_max;
    }

    /// A frame that is there already.
    pub(super) fn buffered(&mut self) -> Result<Option<Frame>, FrameError> {
        cut_frame(&mut self.buffer, self.payload_max)
    }

    /// Waits for more bytes, at most `silence` long.
    pub(super) async fn fill(&mut self, silence: Duration) -> Result<(), ReadError> {
        // `buffered` has checked the length of the frame that is not all there.
        let missing = match peek_header(&self.buffer) {
            Some((length, _)) if length <= self.payload_max => {
                (HEADER_BYTES + length).saturating_sub(self.buffer.len())
            }
            _ => 0,
        };
        if self.buffer.capacity() - self.buffer.len() < missing.max(READ_BYTES_MIN.min(self.payload_max)) {
            self.buffer.reserve(missing.max(READ_BYTES.min(self.payload_max)));
        }
        match tokio::time::timeout(silence, self.reader.read_buf(&mut self.buffer)).await {
            Err(_) => Err(ReadError::Silent(silence)),
            Ok(Ok(0)) => Err(ReadError::Closed),
            Ok(Ok(read)) => {
                self.read_bytes += read as u64;
                Ok(())
            }
            Ok(Err(error)) => Err(error.into()),
        }
    }

    /// The next frame. `silence` bounds the wait for each piece of it.
    pub(super) async fn next(&mut self, silence: Duration) -> Result<Frame, ReadError> {
        loop {
            if let Some(frame) = self.buffered()? {
                return Ok(frame);
            }
            self.fill(silence).await?;
        }
    }

    /// The first `N` bytes of the connection, before any frame.
    pub(super) async fn preface<const N: usize>(&mut self, silence: Duration) -> Result<[u8; N], ReadError> {
        loop {
            if let Some((preface, _)) = self.buffer.split_first_chunk::<N>() {
                let preface = *preface;
                self.buffer.advance(N);
                return Ok(preface);
            }
            self.fill(silence).await?;
        }
    }

    /// What was read and is no frame yet.
    pub(super) fn rest(&self) -> &[u8] {
        &self.buffer
    }

    /// Reads and forgets, until the other side closes or `limit` has passed. Closing a socket with unread bytes resets
    /// the connection, and the other side may then not see what was sent to it last.
    pub(super) async fn drain(&mut self, limit: Duration) {
        let read = async {
            let mut forgotten = BytesMut::with_capacity(READ_BYTES);
            while matches!(self.reader.read_buf(&mut forgotten).await, Ok(read) if read > 0) {
                forgotten.clear();
            }
        };
        // Out of time is as good as closed.
        let _ = tokio::time::timeout(limit, read).await;
    }

    /// Bytes read since the last time.
    pub(super) fn take_read_bytes(&mut self) -> u64 {
        std::mem::take(&mut self.read_bytes)
    }
}

/// Frames that are to go out in one write. Small parts are copied together; large ones stay where they are.
#[derive(Debug, Default)]
pub(super) struct FrameBatch {
    copied: BytesMut,
    /// Parts that were not copied, each with its place in `copied`.
    whole: Vec<(usize, Bytes)>,
    bytes: usize,
    /// Where the frame that is being put together begins, in `copied`, in `whole` and in `bytes`.
    frame: (usize, usize, usize),
}

impl FrameBatch {
    /// Begins a frame.
    pub(super) fn begin(&mut self, kind: u8) {
        self.frame = (self.copied.len(), self.whole.len(), self.bytes);
        self.copied.put_bytes(0, HEADER_BYTES);
        self.bytes += HEADER_BYTES;
        self.put_u8(kind);
    }

    /// Adds a byte.
    pub(super) fn put_u8(&mut self, byte: u8) {
        self.copied.put_u8(byte);
        self.bytes += 1;
    }

    /// Adds a number.
    pub(super) fn put_u32(&mut self, number: u32) {
        self.copied.put_u32_le(number);
        self.bytes += 4;
    }

    /// Adds a number.
    pub(super) fn put_u64(&mut self, number: u64) {
        self.copied.put_u64_le(number);
        self.bytes += 8;
    }

    /// Adds bytes.
    pub(super) fn put(&mut self, part: &Bytes) {
        self.bytes += part.len();
        if part.len() < WHOLE_BYTES_MIN {
            self.copied.put_slice(part);
        } else {
            self.whole.push((self.copied.len(), part.clone()));
        }
    }

    /// Bytes of the payload of the frame that was begun.
    pub(super) fn frame_bytes(&self) -> usize {
        self.bytes - self.frame.2 - HEADER_BYTES
    }

    /// Ends the frame; its checksum.
    pub(super) fn end(&mut self) -> u32 {
        let (start, first_whole, _) = self.frame;
        let length = u32::try_from(self.frame_bytes()).expect("callers keep frames below 4 GiB");
        let mut from = start + HEADER_BYTES;
        let mut checksum = 0;
        for (at, part) in &self.whole[first_whole..] {
            checksum = crc32c::crc32c_append(checksum, &self.copied[from..*at]);
            checksum = crc32c::crc32c_append(checksum, part);
            from = *at;
        }
        checksum = crc32c::crc32c_append(checksum, &self.copied[from..]);
        let mut header = &mut self.copied[start..start + HEADER_BYTES];
        header.put_u32_le(length);
        header.put_u32_le(checksum);
        checksum
    }

    /// A whole frame.
    pub(super) fn frame(&mut self, kind: u8, body: &[u8]) {
        self.begin(kind);
        self.copied.put_slice(body);
        self.bytes += body.len();
        self.end();
    }

    /// Bytes of all frames.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    fn take(&mut self) -> Vec<Bytes> {
        self.bytes = 0;
        let mut copied = self.copied.split().freeze();
        let mut pieces = Vec::with_capacity(2 * self.whole.len() + 1);
        let mut taken = 0;
        for (at, part) in self.whole.drain(..) {
            if at > taken {
                pieces.push(copied.split_to(at - taken));
                taken = at;
            }
            pieces.push(part);
        }
        if !copied.is_empty() {
            pieces.push(copied);
        }
        pieces
    }
}

/// Writes frames. Nothing here may be cancelled, unless the connection ends with it.
pub(super) struct FrameWriter<W> {
    writer: W,
    /// What goes out with the next flush.
    pub(super) batch: FrameBatch,
    stall: Duration,
    /// A write was begun and not ended: the other side has seen half a frame, and nothing may follow it.
    torn: bool,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// `stall` bounds how long the other side may accept nothing.
    pub(super) fn new(writer: W, stall: Duration) -> Self {
        FrameWriter {
            writer,
            batch: FrameBatch::default(),
            stall,
            torn: false,
        }
    }

    /// The same connection with another limit.
    pub(super) fn with_stall(mut self, stall: Duration) -> Self {
        self.stall = stall;
        self
    }

    /// Writes what is in the batch; how many bytes that were.
    pub(super) async fn flush(&mut self) -> io::Result<u64> {
        let pieces = self.batch.take();
        let written = self.write_all(pieces).await?;
        within(self.stall, self.writer.flush()).await?;
        Ok(written)
    }

    /// Writes bytes that are no frame.
    pub(super) async fn write_raw(&mut self, bytes: Bytes) -> io::Result<()> {
        self.write_all(vec![bytes]).await?;
        within(self.stall, self.writer.flush()).await
    }

    /// Writes one frame; how many bytes that were.
    pub(super) async fn send(&mut self, kind: u8, body: &[u8]) -> io::Result<u64> {
        self.batch.frame(kind, body);
        self.flush().await
    }

    /// Waits for something else, and shows meanwhile that we live: slow is not dead.
    pub(super) async fn alive_while<T>(&mut self, interval: Duration, work: impl Future<Output = T>) -> io::Result<T> {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                biased;
                result = &mut work => return Ok(result),
                () = tokio::time::sleep(interval) => {
                    self.send(kind::ALIVE, &[]).await?;
                }
            }
        }
    }

    /// Whether another frame can be written.
    pub(super) fn is_whole(&self) -> bool {
        !self.torn
    }

    /// Tells the other side that nothing more comes.
    pub(super) async fn shutdown(&mut self) -> io::Result<()> {
        within(self.stall, self.writer.shutdown()).await
    }

    async fn write_all(&mut self, mut pieces: Vec<Bytes>) -> io::Result<u64> {
        let mut total = 0;
        let mut first = 0;
        self.torn = true;
        while first < pieces.len() {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let count = SLICES_MAX.min(pieces.len() - first);
            for (slice, piece) in slices.iter_mut().zip(&pieces[first..]) {
                *slice = IoSlice::new(piece);
            }
            let mut written = within(self.stall, self.writer.write_vectored(&slices[..count])).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            total += written as u64;
            while written > 0 {
                let step = written.min(pieces[first].len());
                pieces[first].advance(step);
                written -= step;
                if pieces[first].is_empty() {
                    first += 1;
                }
            }
        }
        self.torn = false;
        Ok(total)
    }
}

async fn within<T>(stall: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(stall, work).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the other side accepted nothing for {stall:?}"),
        )),
    }
}

/// One frame around a message, for handshakes.
pub(super) fn message_frame(message: &impl prost::Message) -> Bytes {
    let payload = message.encode_to_vec();
    let mut frame = BytesMut::with_capacity(HEADER_BYTES + payload.len());
    frame.put_u32_le(payload.len() as u32);
    frame.put_u32_le(crc32c::crc32c(&payload));
    frame.put_slice(&payload);
    frame.freeze()
}
