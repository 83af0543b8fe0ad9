//! A CALL connection from a peer or a joiner.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet};

use super::accept::Ended;
use super::call_out::{OVERHEAD, STATUS_FAILED, STATUS_OK, STATUS_TOO_LONG};
use super::counters::Counters;
use super::frame::{ReadError, take_u64};
use super::handler::{Caller, Introduction};
use super::shared::Shared;
use super::stream::{Reader, Writer};
use super::wire::{decode_close, kind};

/// Bytes of answers from which on a write is not made bigger.
const WRITE_BYTES: usize = 4 << 20;

/// An answer that is to be written, or the lack of one. Its permit is free once it is written.
struct Answer {
    id: u64,
    status: u8,
    body: Bytes,
    _permit: OwnedSemaphorePermit,
}

/// Sees to it that a request is answered even if its handler ends without an answer.
struct Pending {
    id: u64,
    permit: Option<OwnedSemaphorePermit>,
    answers: mpsc::Sender<Answer>,
}

impl Pending {
    fn answer(&mut self, status: u8, body: Bytes) {
        if let Some(permit) = self.permit.take() {
            let answer = Answer {
                id: self.id,
                status,
                body,
                _permit: permit,
            };
            // There is room for as many as there are permits. No receiver is left if the connection is over.
            let _ = self.answers.try_send(answer);
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.answer(STATUS_FAILED, Bytes::new());
    }
}

/// Answers requests until the connection ends. Those under way are dropped then.
pub(super) async fn serve(shared: &Shared, who: &Introduction, reader: &mut Reader, writer: &mut Writer) -> Ended {
    let counters = shared.counters(who.from);
    let calls_max = shared.settings.calls_max.max(1);
    let (answers, mut answered) = mpsc::channel(calls_max);
    let permits = Arc::new(Semaphore::new(calls_max));
    tokio::select! {
        ended = take_requests(shared, who, &counters, reader, answers, permits) => ended,
        error = write_answers(shared, &counters, writer, &mut answered) => Ended::Write(error),
    }
}

async fn take_requests(
    shared: &Shared,
    who: &Introduction,
    counters: &Counters,
    reader: &mut Reader,
    answers: mpsc::Sender<Answer>,
    permits: Arc<Semaphore>,
) -> Ended {
    let caller = Caller {
        member: who.from,
        cluster_checked: who.cluster_id != 0,
    };
    let calls_max = shared.settings.calls_max.max(1);
    let silence = shared.settings.raft_read_timeout;
    // Dropping the set cuts what is under way.
    let mut tasks = JoinSet::new();
    let mut under_way: HashMap<u64, AbortHandle> = HashMap::new();
    loop {
        let frame = match reader.next(silence).await {
            Ok(frame) => frame,
            // A caller without an id sends one request and nothing else.
            Err(ReadError::Silent(_)) if who.from == 0 && permits.available_permits() < calls_max => continue,
            Err(error) => return error.into(),
        };
        counters.received_bytes.add(reader.take_read_bytes());
        while tasks.try_join_next().is_some() {}
        match frame.split() {
            (kind::REQUEST, mut body) => {
                let Some(id) = take_u64(&mut body) else {
                    return Ended::Protocol("a request is cut off");
                };
                // Nothing more is read until there is room. The semaphore is never closed.
                let Ok(permit) = permits.clone().acquire_owned().await else {
                    return Ended::Done;
                };
                let mut pending = Pending {
                    id,
                    permit: Some(permit),
                    answers: answers.clone(),
                };
                let handler = shared.handler.clone();
                let payload_max = shared.settings.frame_bytes_max;
                let task = tasks.spawn(async move {
                    let answer = handler.call(caller, body).await;
                    if answer.len() + OVERHEAD > payload_max {
                        tracing::warn!(bytes = answer.len(), "an answer to a peer is too long");
                        pending.answer(STATUS_TOO_LONG, Bytes::new());
                    } else {
                        pending.answer(STATUS_OK, answer);
                    }
                });
                if under_way.len() >= 2 * calls_max {
                    under_way.retain(|_, task| !task.is_finished());
                }
                under_way.insert(id, task);
            }
            (kind::CANCEL, mut body) => {
                if let Some(task) = take_u64(&mut body).and_then(|id| under_way.remove(&id)) {
                    task.abort();
                }
            }
            (kind::ALIVE, _) => {}
            (kind::CLOSE, body) => return Ended::Closed(decode_close(body)),
            _ => return Ended::Protocol("an unexpected frame on a CALL connection"),
        }
    }
}

async fn write_answers(
    shared: &Shared,
    counters: &Counters,
    writer: &mut Writer,
    answered: &mut mpsc::Receiver<Answer>,
) -> std::io::Error {
    let mut next_alive = Instant::now() + shared.keepalive_interval();
    let mut in_write = Vec::new();
    loop {
        tokio::select! {
            biased;
            answer = answered.recv() => match answer {
                Some(answer) => in_write.push(answer),
                // The reader keeps a sender, and ends this with itself.
                None => std::future::pending().await,
            },
            () = tokio::time::sleep_until(next_alive.into()) => writer.batch.frame(kind::ALIVE, &[]),
        }
        // All that waits goes out with it.
        let mut bytes = 0;
        while bytes < WRITE_BYTES
            && let Ok(answer) = answered.try_recv()
        {
            bytes += answer.body.len();
            in_write.push(answer);
        }
        for answer in &in_write {
            writer.batch.begin(kind::RESPONSE);
            writer.batch.put_u64(answer.id);
            writer.batch.put_u8(answer.status);
            writer.batch.put(&answer.body);
            writer.batch.end();
        }
        match writer.flush().await {
            Ok(bytes) => counters.sent_bytes.add(bytes),
            Err(error) => return error,
        }
        in_write.clear();
        next_alive = Instant::now() + shared.keepalive_interval();
    }
}
