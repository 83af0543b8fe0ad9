//! Compare-and-swap by mod revision.

use std::sync::Arc;

use api::kv::{
    Compare, CompareResult, CompareTarget, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, RequestOpKind,
    TargetUnion, TxnRequest,
};
use bytes::Bytes;

use crate::client::{Client, Swap};
use crate::clock::now;
use crate::window::Window;

/// The rows of the result.
const SWAP: usize = 0;
const ATTEMPT: usize = 1;

/// A client that swaps the value of one key, again and again.
pub(crate) struct SwapActor {
    pub(crate) client: Client,
    pub(crate) window: Arc<Window>,
    /// The key's number.
    pub(crate) number: u64,
    /// Its mod revision as last seen; 0 if it does not exist.
    pub(crate) revision: i64,
}

impl SwapActor {
    /// Tries until it succeeds, as a client does that must; gives up when the run ends.
    pub(crate) async fn operate(&mut self, at: u64) {
        let mut attempts = 0;
        loop {
            let sent = now();
            if attempts > 0 && sent >= self.window.until() {
                return;
            }
            let client = &mut self.client;
            let key = client.key(self.number);
            let value = client.values.value(&mut client.rng);
            let result = client.swap(&if_unchanged(key, self.revision, Write::Put(value))).await;
            attempts += 1;
            match result {
                Ok(Swap::Done(revision)) => {
                    self.revision = revision;
                    self.client.record(ATTEMPT, sent, Ok(1));
                    self.client.record(SWAP, at, Ok(attempts));
                    return;
                }
                Ok(Swap::Conflict(revision)) => {
                    self.revision = revision;
                    self.client.record(ATTEMPT, sent, Ok(0));
                }
                Err(failure) => {
                    self.client.record(SWAP, at, Err(&failure));
                    return;
                }
            }
        }
    }
}

/// What a transaction does to its key.
pub(crate) enum Write {
    Put(Bytes),
    Delete,
}

/// The transaction of Kubernetes' API server: write if the key's mod revision is still this one (0: if there is no such
/// key), else read it.
pub(crate) fn if_unchanged(key: Bytes, mod_revision: i64, write: Write) -> TxnRequest {
    let op = |request| RequestOp { request: Some(request) };
    let write = match write {
        Write::Put(value) => RequestOpKind::Put(PutRequest {
            key: key.clone(),
            value,
            ..Default::default()
        }),
        Write::Delete => RequestOpKind::DeleteRange(DeleteRangeRequest {
            key: key.clone(),
            ..Default::default()
        }),
    };
    TxnRequest {
        compare: vec![Compare {
            result: CompareResult::Equal as i32,
            target: CompareTarget::Mod as i32,
            key: key.clone(),
            target_union: Some(TargetUnion::ModRevision(mod_revision)),
            range_end: Bytes::new(),
        }],
        success: vec![op(write)],
        failure: vec![op(RequestOpKind::Range(RangeRequest {
            key,
            ..Default::default()
        }))],
    }
}
