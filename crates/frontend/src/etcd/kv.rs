//! The KV service.

use api::Store;
use api::kv::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, KeyValue, PutRequest, PutResponse,
    RangeRequest, RangeResponse, SortOrder, SortTarget, TxnRequest, TxnResponse,
};
use api::store::{EncodedRange, ScanRequest};
use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream};
use prost::Message;
use tonic::{Request, Response, Status};

use super::call::ByLearner;
use super::for_client;
use super::slow::Slow;
use super::status::status;
use crate::proto::etcdserverpb::{RangeStreamResponse, kv_server};

/// How many keys the first part of a streamed range holds (etcd's `initialStreamChunkLimit`).
const FIRST_PART_KEYS: usize = 10;

/// Answers KV calls from a store.
pub(crate) struct Kv<S>(pub(super) S);

impl<S: Store> Kv<S> {
    /// As `range`, for whoever sends the answer on as it is.
    pub(crate) async fn range_encoded(&self, request: Request<RangeRequest>) -> Result<EncodedRange, Status> {
        let store = for_client(&self.0, &request);
        let request = check_range(request)?;
        let _slow = Slow::range(self.0.limits().slow_request, &request);
        store.range_encoded(request).await.map_err(status)
    }
}

/// Refuses ranges that cannot be read, or not here.
fn check_range(request: Request<RangeRequest>) -> Result<RangeRequest, Status> {
    let by_learner = request.extensions().get::<ByLearner>().is_some();
    let request = request.into_inner();
    if by_learner && !request.serializable {
        return Err(status(api::Error::NotSupportedForLearner));
    }
    request.validate().map_err(status)?;
    Ok(request)
}

#[tonic::async_trait]
impl<S: Store> kv_server::Kv for Kv<S> {
    async fn range(&self, request: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
        let store = for_client(&self.0, &request);
        let request = check_range(request)?;
        let _slow = Slow::range(self.0.limits().slow_request, &request);
        store.range(request).await.map(Response::new).map_err(status)
    }

    async fn range_stream(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<BoxStream<'static, Result<RangeStreamResponse, Status>>>, Status> {
        let store = for_client(&self.0, &request);
        let request = request.into_inner();
        request.validate().map_err(status)?;
        check_streamable(&request)?;
        let parts = Parts::new(store.into_owned(), request);
        Ok(Response::new(Box::pin(stream::try_unfold(parts, Parts::next))))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let store = for_client(&self.0, &request);
        let request = request.into_inner();
        request.validate().map_err(status)?;
        let _slow = Slow::put(self.0.limits().slow_request, &request);
        store.put(request).await.map(Response::new).map_err(status)
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        let store = for_client(&self.0, &request);
        let request = request.into_inner();
        request.validate().map_err(status)?;
        let _slow = Slow::delete_range(self.0.limits().slow_request, &request);
        store.delete_range(request).await.map(Response::new).map_err(status)
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let store = for_client(&self.0, &request);
        let request = request.into_inner();
        request.validate(self.0.limits().txn_ops_max).map_err(status)?;
        let _slow = Slow::txn(self.0.limits().slow_request, &request);
        store.txn(request).await.map(Response::new).map_err(status)
    }

    async fn compact(&self, request: Request<CompactionRequest>) -> Result<Response<CompactionResponse>, Status> {
        let store = for_client(&self.0, &request);
        let request = request.into_inner();
        request.validate().map_err(status)?;
        store.compact(request).await.map(Response::new).map_err(status)
    }
}

/// A stream is read in key order and cannot skip: etcd refuses what would need more.
fn check_streamable(request: &RangeRequest) -> Result<(), Status> {
    let unsorted = request.sort_order == SortOrder::None as i32;
    let by_ascending_key =
        request.sort_target == SortTarget::Key as i32 && request.sort_order == SortOrder::Ascend as i32;
    if !(unsorted || by_ascending_key) {
        return Err(Status::unimplemented("RangeStream does not support custom sort orders"));
    }
    let filters = [
        request.min_mod_revision,
        request.max_mod_revision,
        request.min_create_revision,
        request.max_create_revision,
    ];
    if filters.iter().any(|&revision| revision != 0) {
        return Err(Status::unimplemented("RangeStream does not support revision filters"));
    }
    Ok(())
}

/// A range on its way to the client, part by part; the next one is read once there is room to send it.
struct Parts<S> {
    store: S,
    /// What is left to read: `key`, `limit`, `revision` and `serializable` move along.
    request: RangeRequest,
    /// How many keys the next part may hold.
    part_keys: usize,
    /// How many keys were sent.
    sent: i64,
    /// The header of the last part, known from the first on.
    header: Option<api::kv::ResponseHeader>,
    done: bool,
}

impl<S: Store> Parts<S> {
    fn new(store: S, mut request: RangeRequest) -> Self {
        if request.limit <= 0 {
            request.limit = i64::MAX;
        }
        Parts {
            store,
            request,
            part_keys: FIRST_PART_KEYS,
            sent: 0,
            header: None,
            done: false,
        }
    }

    async fn next(mut self) -> Result<Option<(RangeStreamResponse, Self)>, Status> {
        if self.done {
            return Ok(None);
        }
        let part = if self.request.count_only {
            self.count().await
        } else {
            self.read().await
        };
        let reply = RangeStreamResponse {
            range_response: Some(part.map_err(status)?),
        };
        Ok(Some((reply, self)))
    }

    async fn count(&mut self) -> api::Result<RangeResponse> {
        self.done = true;
        let counted = self.store.range(self.request.clone()).await?;
        Ok(RangeResponse {
            header: counted.header,
            count: counted.count,
            ..Default::default()
        })
    }

    async fn read(&mut self) -> api::Result<RangeResponse> {
        let left = self.request.limit - self.sent;
        let keys_max = self.part_keys.min(usize::try_from(left).unwrap_or(usize::MAX));
        let part_bytes = self.store.limits().request_bytes_max;
        let page = self
            .store
            .scan(ScanRequest {
                key: self.request.key.clone(),
                range_end: self.request.range_end.clone(),
                revision: self.request.revision,
                serializable: self.request.serializable,
                keys_only: self.request.keys_only && !self.sorts_by_value(),
                keys_max,
                // etcd has no such bound; without it one part could hold ever so many large values.
                bytes_max: part_bytes.saturating_mul(2),
            })
            .await?;
        if self.header.is_none() {
            self.header = Some(page.header);
            self.request.revision = page.revision;
            // What the first part was read from holds the pinned revision: no further part needs to ask the leader.
            self.request.serializable = true;
        }
        self.sent += i64::try_from(page.kvs.len()).unwrap_or(i64::MAX);
        if let Some(last) = page.kvs.last() {
            self.request.key = successor(&last.key);
        }
        let mut kvs = page.kvs;
        self.sort(&mut kvs);
        let mut part = RangeResponse {
            kvs,
            ..Default::default()
        };
        self.done = !page.more || self.sent >= self.request.limit;
        if self.done {
            part.header = self.header.take();
            part.more = page.more;
            part.count = self.sent;
            if page.more {
                part.count += self.count_rest().await?;
            }
        } else {
            self.part_keys = next_part_keys(keys_max, part.encoded_len(), part_bytes);
        }
        Ok(part)
    }

    /// As etcd does: a target without an order sorts each part by itself.
    fn sort(&self, kvs: &mut [KeyValue]) {
        match self.sort_target() {
            SortTarget::Key => {}
            SortTarget::Version => kvs.sort_by_key(|kv| kv.version),
            SortTarget::Create => kvs.sort_by_key(|kv| kv.create_revision),
            SortTarget::Mod => kvs.sort_by_key(|kv| kv.mod_revision),
            SortTarget::Value => kvs.sort_by(|a, b| a.value.cmp(&b.value)),
        }
        if self.request.keys_only {
            kvs.iter_mut().for_each(|kv| kv.value = Bytes::new());
        }
    }

    fn sorts_by_value(&self) -> bool {
        self.sort_target() == SortTarget::Value
    }

    fn sort_target(&self) -> SortTarget {
        // The request was validated.
        SortTarget::try_from(self.request.sort_target).unwrap_or(SortTarget::Key)
    }

    async fn count_rest(&self) -> api::Result<i64> {
        let rest = RangeRequest {
            key: self.request.key.clone(),
            range_end: self.request.range_end.clone(),
            revision: self.request.revision,
            serializable: true,
            count_only: true,
            ..Default::default()
        };
        Ok(self.store.range(rest).await?.count)
    }
}

/// The first key after `key`.
fn successor(key: &[u8]) -> Bytes {
    let mut next = BytesMut::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.extend_from_slice(&[0]);
    next.freeze()
}

/// Steers parts towards `target` bytes, and leaves them be within half and twice of it.
fn next_part_keys(keys: usize, bytes: usize, target: usize) -> usize {
    let next = if bytes < target / 2 {
        keys.saturating_mul(2)
    } else if bytes > target.saturating_mul(2) {
        keys / 2
    } else {
        keys
    };
    next.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_grow_and_shrink() {
        assert_eq!(next_part_keys(10, 0, 1000), 20);
        assert_eq!(next_part_keys(10, 499, 1000), 20);
        assert_eq!(next_part_keys(10, 500, 1000), 10);
        assert_eq!(next_part_keys(10, 2000, 1000), 10);
        assert_eq!(next_part_keys(10, 2001, 1000), 5);
        assert_eq!(next_part_keys(1, 2001, 1000), 1);
    }
}
