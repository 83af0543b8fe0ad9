//! Who may have how many of the process's file descriptors.
//!
//! A file that cannot be opened for want of a descriptor stops the node, so clients' connections get what the data, the
//! log and the other members leave. Further ones wait to be accepted, as in etcd.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What all else takes: the log, of which up to 16 GiB are kept for members that are behind, in files of 32 MiB that stay
/// open, and half as much again for what is not trimmed yet; the other members with their few connections each; the
/// listeners and the runtimes. etcd keeps 150 back.
const OTHERS: u64 = 1024;
/// Engines that may be open at a time: a snapshot from another member makes a second one beside the first.
const ENGINES: u64 = 2;
/// The fewest files that an engine gets along with, however few there are (RocksDB's own bound is 20).
const ENGINE_FILES_MIN: u32 = 32;

/// How descriptors are shared out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shares {
    /// Clients' connections.
    pub(crate) connections: u64,
    /// Files of one engine; at most what was asked for.
    pub(crate) engine_files: u32,
    /// Whether anybody got less than it may need.
    pub(crate) are_short: bool,
}

/// Has the process have as many descriptors as it may, which Go's programs do as well. Returns how many those are.
pub(crate) fn raise_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return limit.current.unwrap_or(u64::MAX);
    }
    let mut raised = limit;
    raised.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, ?limit, "the limit of open files was not raised");
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Shares out so many descriptors. An engine with files wants so many of them. Where there are few, half are for
/// connections, a quarter for the engines, and a quarter for all else.
pub(crate) fn share(limit: u64, engine_files: Option<u32>) -> Shares {
    let others = OTHERS.min(limit / 4);
    let wanted = engine_files.unwrap_or(0);
    let each = (u64::from(wanted) * ENGINES).min(limit / 4) / ENGINES;
    let each = u32::try_from(each).unwrap_or(u32::MAX);
    Shares {
        connections: limit - others - u64::from(each) * ENGINES,
        engine_files: each.max(ENGINE_FILES_MIN.min(wanted)),
        are_short: others < OTHERS || each < wanted,
    }
}

/// One permit for each connection of a client, at whatever listener.
pub(crate) fn permits(shares: Shares) -> Arc<Semaphore> {
    let connections = usize::try_from(shares.connections).unwrap_or(usize::MAX);
    Arc::new(Semaphore::new(connections.clamp(1, Semaphore::MAX_PERMITS)))
}

/// A connection with its permit: whoever owns it last, as after an upgrade, gives that back.
pub(crate) struct Permitted<I> {
    io: I,
    _permit: OwnedSemaphorePermit,
}

impl<I> Permitted<I> {
    pub(crate) fn new(io: I, permit: OwnedSemaphorePermit) -> Self {
        Permitted { io, _permit: permit }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Permitted<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Permitted<I> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_get_what_the_rest_leaves() {
        const OF_LARGE: u64 = u64::MAX - 1024 - 2 * (u32::MAX as u64);
        for (limit, engine_files, connections, of_engine, are_short) in [
            (1 << 20, Some(1024), (1 << 20) - 1024 - 2048, 1024, false),
            (20_000, Some(1024), 16_928, 1024, false),
            (20_000, None, 18_976, 0, false),
            (4096, Some(1024), 2048, 512, true),
            (1024, Some(1024), 512, 128, true),
            (1024, Some(16), 736, 16, true),
            (256, Some(1024), 128, 32, true),
            (64, Some(1024), 32, 32, true),
            (0, Some(1024), 0, 32, true),
            (u64::MAX, Some(u32::MAX), OF_LARGE, u32::MAX, false),
        ] {
            let expected = Shares {
                connections,
                engine_files: of_engine,
                are_short,
            };
            assert_eq!(share(limit, engine_files), expected, "{limit} {engine_files:?}");
        }
        let permitted = |limit| permits(share(limit, None)).available_permits();
        assert_eq!((permitted(0), permitted(u64::MAX)), (1, Semaphore::MAX_PERMITS));
    }

    #[test]
    fn the_limit_is_the_highest() {
        let limit = raise_limit();
        assert_eq!(limit, getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX));
    }
}
