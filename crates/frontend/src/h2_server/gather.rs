//! Gathers what is written in small pieces into few writes to the socket.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How many bytes are gathered before they are written whatever the gate says.
const GATHERED_BYTES_MAX: usize = 64 << 10;

/// How many bytes of memory an idle connection may keep for gathering.
const KEPT_BYTES_MAX: usize = 16 << 10;

/// A stream that holds back what is written to it while its [`Gate`] is closed.
///
/// HTTP/2's frames for one reply come in three pieces, and larger payloads in pieces of their own, each with a request
/// to flush. The one who owns the gate knows when there is nothing more to add.
pub(super) struct Gather<I> {
    io: I,
    gathered: Vec<u8>,
    /// How many of them are written.
    written: usize,
    closed: Arc<AtomicBool>,
}

/// Says whether a flush of the [`Gather`] that it belongs to does anything. Whoever closes it opens it again, and has
/// the stream flushed then.
pub(super) struct Gate(Arc<AtomicBool>);

impl Gate {
    pub(super) fn close(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(super) fn open(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

impl<I> Gather<I> {
    pub(super) fn new(io: I) -> (Self, Gate) {
        let closed = Arc::new(AtomicBool::new(false));
        let gather = Gather {
            io,
            gathered: Vec::new(),
            written: 0,
            closed: closed.clone(),
        };
        (gather, Gate(closed))
    }
}

impl<I: AsyncWrite + Unpin> Gather<I> {
    /// Writes what was gathered.
    fn poll_empty(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.gathered.len() {
            let rest = &self.gathered[self.written..];
            let written = ready!(Pin::new(&mut self.io).poll_write(context, rest))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += written;
        }
        self.written = 0;
        self.gathered.clear();
        self.gathered.shrink_to(KEPT_BYTES_MAX);
        Poll::Ready(Ok(()))
    }

    /// Makes room for at least one more byte.
    fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.gathered.len() >= GATHERED_BYTES_MAX {
            ready!(self.poll_empty(context))?;
        }
        Poll::Ready(Ok(GATHERED_BYTES_MAX - self.gathered.len()))
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Gather<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Gather<I> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let room = ready!(self.poll_room(context))?;
        let taken = bytes.len().min(room);
        self.gathered.extend_from_slice(&bytes[..taken]);
        Poll::Ready(Ok(taken))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut room = ready!(self.poll_room(context))?;
        let mut taken = 0;
        for piece in pieces {
            let some = piece.len().min(room);
            self.gathered.extend_from_slice(&piece[..some]);
            taken += some;
            room -= some;
        }
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.closed.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_empty(context))?;
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_empty(context))?;
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn nothing_is_written_before_the_gate_opens_unless_it_is_much() {
        let (io, mut peer) = tokio::io::duplex(4 * GATHERED_BYTES_MAX);
        let (mut gather, gate) = Gather::new(io);
        gate.close();
        gather.write_all(b"one").await.expect("taken");
        gather.flush().await.expect("withheld");
        let pieces = [IoSlice::new(b" two"), IoSlice::new(b" three")];
        assert_eq!(gather.write_vectored(&pieces).await.expect("taken"), 10);
        gather.flush().await.expect("withheld");
        let mut byte = [0];
        let read = tokio::time::timeout(std::time::Duration::from_millis(10), peer.read(&mut byte)).await;
        assert!(read.is_err(), "nothing came: {read:?}");
        gate.open();
        gather.flush().await.expect("written");
        let mut all = [0; 13];
        peer.read_exact(&mut all).await.expect("all of it");
        assert_eq!(&all, b"one two three");

        gate.close();
        let much = vec![7; 3 * GATHERED_BYTES_MAX / 2];
        gather.write_all(&much).await.expect("taken");
        let mut part = vec![0; GATHERED_BYTES_MAX];
        peer.read_exact(&mut part)
            .await
            .expect("a part of it, though the gate is closed");
        gather.shutdown().await.expect("ends");
        let mut rest = Vec::new();
        peer.read_to_end(&mut rest).await.expect("the rest, before the end");
        assert_eq!(rest.len(), GATHERED_BYTES_MAX / 2);
    }

    #[tokio::test]
    async fn a_slow_reader_holds_the_writer_up() {
        let (io, mut peer) = tokio::io::duplex(1024);
        let (mut gather, _gate) = Gather::new(io);
        let sent: Vec<u8> = (0..10 * GATHERED_BYTES_MAX).map(|at| (at % 251) as u8).collect();
        let expected = sent.clone();
        let writer = tokio::spawn(async move {
            gather.write_all(&sent).await.expect("taken");
            gather.flush().await.expect("written");
        });
        tokio::task::yield_now().await;
        assert!(!writer.is_finished(), "most of it has no room anywhere");
        let mut received = vec![0; expected.len()];
        peer.read_exact(&mut received).await.expect("all of it");
        assert!(received == expected, "in order");
        writer.await.expect("ends");
    }
}
