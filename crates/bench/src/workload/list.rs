//! Whole listings, page by page at one revision, as Kubernetes' API server makes them.

use api::kv::RangeRequest;
use bytes::{BufMut, Bytes, BytesMut};

use crate::client::Client;
use crate::clock::now;
use crate::net::failure::Failure;

/// The rows of the result.
const LIST: usize = 0;
const PAGE: usize = 1;

/// A client that lists all keys.
pub(crate) struct ListActor {
    pub(crate) client: Client,
}

impl ListActor {
    pub(crate) async fn operate(&mut self, at: u64) {
        let client = &mut self.client;
        let (key, range_end) = client.load.keys.space(0, &mut client.arena);
        let result = list(client, key, range_end, Some(PAGE)).await;
        client.record(LIST, at, result.as_ref().copied());
    }
}

/// Lists a range and returns how many keys came. Every page is recorded under `page_label`, if there is one.
pub(crate) async fn list(
    client: &mut Client,
    key: Bytes,
    range_end: Bytes,
    page_label: Option<usize>,
) -> Result<u64, Failure> {
    let mut request = RangeRequest {
        key,
        range_end,
        limit: client.load.page,
        serializable: client.load.serializable,
        ..Default::default()
    };
    let mut keys = 0;
    loop {
        let sent = now();
        let page = client.range(&request).await?;
        if let Some(label) = page_label {
            client.record(label, sent, Ok(page.keys));
        }
        keys += page.keys;
        if !page.more || page.keys == 0 {
            return Ok(keys);
        }
        if request.revision == 0 {
            request.revision = page.revision;
        }
        request.key = after(&page.last_key);
    }
}

/// The least key that is greater.
fn after(key: &[u8]) -> Bytes {
    let mut next = BytesMut::with_capacity(key.len() + 1);
    next.put_slice(key);
    next.put_u8(0);
    next.freeze()
}
