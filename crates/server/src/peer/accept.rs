//! Connections that others open: who they are, whether they may, and who serves them.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use api::limits::ETCD_CLUSTER_VERSION;
use bytes::Bytes;
use prost::Message as _;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::OwnedSemaphorePermit;

use super::address::Socket;
use super::dial::Bounds;
use super::frame::{FrameReader, FrameWriter, ReadError, message_frame};
use super::handler::{Introduction, Purpose, Refusal, RefuseReason};
use super::incoming::Registered;
use super::shared::Shared;
use super::stream::{Reader, Stream, Writer, accept_tls};
use super::version::check_peer;
use super::wire::{Answer, HANDSHAKE_BYTES_MAX, Hello, MAGIC, PEER_URLS_MAX, Refused, VERSION, kind};
use super::{call_in, raft_in, snapshot_in};

/// How long to pause after a connection could not be accepted, most likely for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long a connection that we end may take to be read to its end by the other side.
pub(super) const LINGER: Duration = Duration::from_millis(250);
/// Most bytes around a chunk in its frame.
const CHUNK_OVERHEAD: usize = 16;

/// Bounds of a connection for a purpose.
pub(super) fn bounds(shared: &Shared, purpose: Purpose) -> Bounds {
    let settings = &shared.settings;
    match purpose {
        Purpose::Raft | Purpose::Call => Bounds {
            payload_max: settings.frame_bytes_max,
            stall: settings.raft_write_timeout,
        },
        // A receiver may take its time; whether a snapshot gets on is decided by acknowledged chunks.
        Purpose::Snapshot => Bounds {
            payload_max: settings.frame_bytes_max + CHUNK_OVERHEAD,
            stall: settings.snapshot_stall_timeout,
        },
    }
}

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It cannot be written.
    #[error(transparent)]
    Write(#[from] std::io::Error),
    /// The frames are right, and what is in them is not.
    #[error("protocol violated: {0}")]
    Protocol(&'static str),
    /// The other side said so.
    #[error("closed by the other side: {0}")]
    Closed(Refusal),
    /// We said so.
    #[error("closed: {0}")]
    Refused(Refusal),
    /// All is done.
    #[error("done")]
    Done,
}

impl From<super::frame::FrameError> for Ended {
    fn from(error: super::frame::FrameError) -> Self {
        Ended::Read(ReadError::Frame(error))
    }
}

impl Ended {
    /// Whether somebody should look into it.
    fn is_strange(&self) -> bool {
        matches!(self, Ended::Read(ReadError::Frame(_)) | Ended::Protocol(_))
    }
}

/// Accepts connections on one socket until the transport stops.
pub(super) async fn listen(shared: Arc<Shared>, socket: Socket, tls: bool) {
    let socket = Bound(socket);
    let mut stop = shared.tasks.stop_signal();
    loop {
        let accepted = async {
            let permit = shared.handshakes.clone().acquire_owned().await;
            // The semaphore is never closed.
            let permit = permit.map_err(std::io::Error::other)?;
            Ok::<_, std::io::Error>((permit, socket.accept().await?))
        };
        let accepted = tokio::select! {
            accepted = accepted => accepted,
            () = stop.wait() => return,
        };
        match accepted {
            Ok((permit, (stream, origin))) => {
                let shared_by_task = shared.clone();
                shared
                    .tasks
                    .spawn(async move { take_in(shared_by_task, stream, tls, origin, permit).await });
            }
            Err(error) => {
                tracing::warn!(%error, "a peer connection was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A socket whose file, if it has one, goes with it.
struct Bound(Socket);

impl Bound {
    async fn accept(&self) -> std::io::Result<(Stream, String)> {
        match &self.0 {
            Socket::Tcp(listener) => accept_tcp(listener).await,
            Socket::Unix(listener, path) => accept_unix(listener, path).await,
        }
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Socket::Unix(_, path) = &self.0 {
            // Best effort: a file that stays behind is noticed at the next start.
            let _ = std::fs::remove_file(path);
        }
    }
}

async fn accept_tcp(listener: &TcpListener) -> std::io::Result<(Stream, String)> {
    let (stream, address) = listener.accept().await?;
    // Answers to pings and calls must not wait for more to send.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY was not set");
    }
    Ok((Box::new(stream), address.to_string()))
}

async fn accept_unix(listener: &UnixListener, path: &Path) -> std::io::Result<(Stream, String)> {
    let (stream, _) = listener.accept().await?;
    Ok((Box::new(stream), format!("unix://{}", path.display())))
}

/// Hears who it is and, if they may, serves them.
async fn take_in(shared: Arc<Shared>, stream: Stream, tls: bool, origin: String, permit: OwnedSemaphorePermit) {
    let limit = shared.settings.handshake_timeout;
    let mut stop = shared.tasks.stop_signal();
    let introduced = tokio::select! {
        introduced = tokio::time::timeout(limit, introduce(&shared, stream, tls, &origin)) => introduced,
        () = stop.wait() => return,
    };
    drop(permit);
    match introduced {
        Ok(Ok(admitted)) => serve(shared, admitted, origin).await,
        Ok(Err(NotAdmitted::Refused(refusal, from))) => {
            tracing::info!(%origin, from = format!("{from:x}"), %refusal, "refused a peer connection");
        }
        Ok(Err(NotAdmitted::Stranger(reason))) => {
            tracing::warn!("remote-addr" = origin, reason, "rejected connection on peer endpoint");
        }
        Err(_) => tracing::debug!(%origin, "a peer connection did not introduce itself within {limit:?}"),
    }
}

/// An accepted connection.
struct Admitted {
    who: Introduction,
    registered: Registered,
    reader: Reader,
    writer: Writer,
}

enum NotAdmitted {
    Refused(Refusal, super::MemberId),
    Stranger(String),
}

async fn introduce(shared: &Shared, stream: Stream, tls: bool, origin: &str) -> Result<Admitted, NotAdmitted> {
    let stranger = |error: &dyn std::error::Error| NotAdmitted::Stranger(error.to_string());
    let limit = shared.settings.handshake_timeout;
    let stream = if tls {
        accept_tls(stream, &shared.tls, origin)
            .await
            .map_err(|error| stranger(&error))?
    } else {
        stream
    };
    let (read, write) = tokio::io::split(stream);
    let mut reader = FrameReader::new(read, HANDSHAKE_BYTES_MAX);
    let mut writer = FrameWriter::new(write, limit);

    let preface: [u8; MAGIC.len() + 1] = reader.preface(limit).await.map_err(|error| stranger(&error))?;
    let (version, magic) = preface.split_last().expect("the preface has eight bytes");
    if magic != MAGIC {
        if preface.starts_with(b"GET ") || preface.starts_with(b"HEAD ") || preface.starts_with(b"POST ") {
            answer_http(&preface, &mut reader, &mut writer).await;
        }
        return Err(NotAdmitted::Stranger(format!(
            "it begins with {:?}",
            preface.escape_ascii().to_string()
        )));
    }
    let frame = reader.next(limit).await.map_err(|error| stranger(&error))?;
    let hello = Hello::decode(frame.payload).map_err(|error| stranger(&error))?;
    let (from, sequence) = (hello.from, hello.sequence);
    let decision = check(shared, *version, hello, origin).and_then(|who| {
        shared.handler.admit(&who)?;
        let registered = shared.incoming.register(&who, sequence)?;
        // It may have been removed in between, when the connection was not among those that are reviewed.
        shared.handler.admit(&who)?;
        Ok((registered, who))
    });
    let answer = Answer {
        refused: decision.as_ref().err().map(Refused::from),
        cluster_id: shared.identity.cluster_id,
        member_id: shared.identity.member_id,
        version: shared.identity.version.clone(),
        cluster_version: ETCD_CLUSTER_VERSION.to_owned(),
    };
    let sent = writer.write_raw(message_frame(&answer)).await;
    match decision {
        Ok((registered, who)) => {
            sent.map_err(|error| stranger(&error))?;
            let bounds = bounds(shared, who.purpose);
            reader.set_payload_max(bounds.payload_max);
            Ok(Admitted {
                who,
                registered,
                reader,
                writer: writer.with_stall(bounds.stall),
            })
        }
        Err(refusal) => {
            // It is told as well as can be.
            let _ = writer.shutdown().await;
            reader.drain(LINGER).await;
            Err(NotAdmitted::Refused(refusal, from))
        }
    }
}

/// What the transport itself can decide.
fn check(shared: &Shared, version: u8, hello: Hello, origin: &str) -> Result<Introduction, Refusal> {
    let refuse = |reason, text: String| Err(Refusal::new(reason, text));
    let (our_cluster, our_id) = (shared.identity.cluster_id, shared.identity.member_id);
    if version != VERSION {
        let text = format!("peer protocol version {version}, where {VERSION} is spoken");
        return refuse(RefuseReason::Incompatible, text);
    }
    let Some(purpose) = Purpose::from_code(hello.purpose) else {
        let text = format!("nothing is known of purpose {}", hello.purpose);
        return refuse(RefuseReason::Incompatible, text);
    };
    let may_be_unknown = purpose == Purpose::Call;
    if hello.cluster_id != our_cluster && !(hello.cluster_id == 0 && may_be_unknown) {
        let text = format!("cluster {:x}, where {our_cluster:x} is", hello.cluster_id);
        return refuse(RefuseReason::WrongCluster, text);
    }
    if hello.to != our_id && !(hello.to == 0 && may_be_unknown) {
        let text = format!("for member {:x}, where {our_id:x} is", hello.to);
        return refuse(RefuseReason::WrongMember, text);
    }
    if hello.from == our_id && our_id != 0 {
        tracing::warn!(origin, "a peer has our own member id: is this member started twice?");
        return refuse(RefuseReason::WrongMember, format!("{our_id:x} is my own id"));
    }
    if hello.from == 0 && !may_be_unknown {
        return refuse(RefuseReason::Stranger, "a member must say who it is".to_owned());
    }
    if hello.peer_urls.len() > PEER_URLS_MAX {
        return refuse(RefuseReason::Stranger, format!("more than {PEER_URLS_MAX} URLs"));
    }
    // Last: what is wrong otherwise is wrong with any release.
    if let Err(text) = check_peer(&hello.cluster_version) {
        return refuse(RefuseReason::Incompatible, text);
    }
    Ok(Introduction {
        from: hello.from,
        cluster_id: hello.cluster_id,
        purpose,
        peer_urls: hello.peer_urls,
        version: hello.version,
        incarnation: hello.incarnation,
    })
}

/// Tells a browser, or a health check that took the wrong port, where it is.
async fn answer_http(preface: &[u8], reader: &mut Reader, writer: &mut Writer) {
    let (status, text) = if preface.starts_with(b"POST ") {
        ("400 Bad Request", "")
    } else {
        (
            "404 Not Found",
            "This port is for the members of a MetaStore cluster.\n",
        )
    };
    // Where the body would be for a HEAD, the length alone is right.
    let body = if preface.starts_with(b"HEAD ") { "" } else { text };
    let head_ended = |head: &[u8]| head.windows(4).any(|end| end == b"\r\n\r\n");
    while !head_ended(reader.rest()) && reader.rest().len() < HANDSHAKE_BYTES_MAX {
        if reader.fill(LINGER).await.is_err() {
            break;
        }
    }
    let length = text.len();
    let reply = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    // Nobody is waiting for it but a person.
    if writer.write_raw(Bytes::from(reply)).await.is_ok() && writer.shutdown().await.is_ok() {
        reader.drain(LINGER).await;
    }
}

/// Serves an accepted connection until it ends.
async fn serve(shared: Arc<Shared>, admitted: Admitted, origin: String) {
    let Admitted {
        who,
        mut registered,
        mut reader,
        mut writer,
    } = admitted;
    let (from, purpose) = (who.from, who.purpose);
    tracing::debug!(%origin, from = format!("{from:x}"), ?purpose, "accepted a peer connection");
    if from != 0 {
        shared.reached_by(&who);
    }
    let turn = registered.turn.clone();
    let mut stop = shared.tasks.stop_signal();
    let ended = tokio::select! {
        biased;
        refusal = registered.closed() => Ended::Refused(refusal),
        () = stop.wait() => Ended::Refused(Refusal::new(RefuseReason::Stopping, "shutting down")),
        ended = async {
            let _turn = turn.lock().await;
            match purpose {
                Purpose::Raft => raft_in::serve(&shared, &who, &mut reader, &mut writer).await,
                Purpose::Call => call_in::serve(&shared, &who, &mut reader, &mut writer).await,
                Purpose::Snapshot => snapshot_in::serve(&shared, &who, &mut reader, &mut writer).await,
            }
        } => ended,
    };
    // What is said at the end must not hold up a connection that takes this one's place.
    drop(registered);
    if let Ended::Refused(refusal) = &ended
        && writer.is_whole()
    {
        let refused = Refused::from(refusal).encode_to_vec();
        // It is told as well as can be.
        let _ = writer.send(kind::CLOSE, &refused).await;
    }
    if matches!(ended, Ended::Refused(_) | Ended::Done) && writer.shutdown().await.is_ok() {
        reader.drain(LINGER).await;
    }
    let from = format!("{from:x}");
    if ended.is_strange() {
        tracing::warn!(%origin, from, ?purpose, reason = %ended, "closed a peer connection");
    } else {
        tracing::debug!(%origin, from, ?purpose, reason = %ended, "a peer connection ended");
    }
}
