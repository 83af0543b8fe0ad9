//! Many keys: `/api/v1/kv`. A list is read page by page at one revision and sent as it is read.

use std::collections::VecDeque;

use api::kv::{DeleteRangeRequest, KeyValue, RangeRequest};
use api::store::ScanRequest;
use api::{Error, Revision, Store};
use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::stream;
use http::HeaderValue;
use http::header::LINK;

use super::json::{CountBody, DeletedBody, Encoding, KeyValueBody};
use super::parameters::{Parameters, Selection, encode};
use super::problem::{INVALID_PARAMETER, Problem};
use super::txn::Sort;
use super::{BASE, Call, body, compact_revision, json_bytes, json_response};

/// How many keys are read at once. The store reads up to 500 without giving its thread up.
const PAGE_KEYS: usize = 500;

/// How many bytes of keys and values are read at once; one key may exceed it.
const PAGE_BYTES: usize = 1 << 20;

/// The longest `next`, in bytes: a longer one, behind a key of tens of kilobytes, could not be asked for.
const NEXT_BYTES_MAX: usize = 32 << 10;

/// The longest one that the header has as well: many clients refuse an answer that has more in it.
const LINK_BYTES_MAX: usize = 4 << 10;

/// How large a piece of the body gets before it is sent, in bytes, one key exceeding it.
const PIECE_BYTES: usize = 64 << 10;

pub(super) async fn list<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let parameters = &call.parameters;
    let selection = Selection::of_parameters(parameters)?;
    let sort = parameters.choice("sort").and_then(Sort::of);
    let range = RangeRequest {
        key: selection.key,
        range_end: selection.range_end,
        limit: parameters.integer("limit").unwrap_or(0),
        revision: parameters.revision(),
        serializable: parameters.flag("serializable"),
        keys_only: parameters.flag("keys_only"),
        count_only: parameters.flag("count_only"),
        ..Default::default()
    };
    range.validate()?;
    let revision = range.revision;
    let listed = match sort {
        _ if range.count_only => return count(&call.store, range).await,
        None | Some(Sort::Key) => in_key_order(call.store.clone(), range, parameters.clone(), call.encoding()).await,
        Some(sort) => sorted(&call.store, range, sort, parameters.clone(), call.encoding()).await,
    };
    match listed {
        Err(problem) if problem.error() == Some(Error::Compacted) => {
            Err(Problem::compacted(compact_revision(&call.store, revision).await))
        }
        listed => listed,
    }
}

async fn count<S: Store>(store: &S, range: RangeRequest) -> Result<Response, Problem> {
    let pinned = range.revision;
    let counted = match store.range(range).await {
        Err(Error::Compacted) => return Err(Problem::compacted(compact_revision(store, pinned).await)),
        counted => counted?,
    };
    let current = counted.header.unwrap_or_default().revision;
    Ok(json_response(&CountBody {
        revision: if pinned > 0 { pinned } else { current },
        count: counted.count,
    }))
}

/// Where the following page is; `None` if that is longer than it may be.
fn next_link(parameters: &Parameters, revision: Revision, begin: Begin<'_>) -> Option<String> {
    let mut link = format!("{BASE}/kv?revision={revision}");
    let mut add = |name: &str, value: &str| {
        link.push('&');
        link.push_str(name);
        link.push('=');
        link.push_str(value);
    };
    let (start, end) = match begin {
        Begin::After(key) => (Some([key, &[0]].concat()), parameters.bytes("end")),
        Begin::Below(key) => (
            parameters.bytes("start").map(Vec::from),
            Some(Bytes::copy_from_slice(key)),
        ),
    };
    let prefix = parameters.bytes("prefix").map(Vec::from);
    for (name, bytes) in [("prefix", prefix), ("start", start), ("end", end.map(Vec::from))] {
        if let Some(bytes) = bytes {
            add(name, &encode(&bytes));
        }
    }
    if let Some(limit) = parameters.integer("limit") {
        add("limit", &limit.to_string());
    }
    for name in ["keys_only", "serializable"] {
        if parameters.flag(name) {
            add(name, "true");
        }
    }
    for name in ["sort", "encoding"] {
        if let Some(choice) = parameters.choice(name) {
            add(name, choice);
        }
    }
    Some(link).filter(|link| link.len() <= NEXT_BYTES_MAX)
}

/// Says in a list's header where the following page is.
fn set_link(response: &mut Response, next: Option<&str>) {
    let next = next.filter(|next| next.len() <= LINK_BYTES_MAX);
    if let Some(value) = next.and_then(|next| HeaderValue::from_str(&format!("<{next}>; rel=\"next\"")).ok()) {
        response.headers_mut().insert(LINK, value);
    }
}

enum Begin<'a> {
    After(&'a [u8]),
    Below(&'a [u8]),
}

/// A list's JSON, written in pieces.
struct Writer {
    encoding: Encoding,
    with_values: bool,
    is_first: bool,
    piece: Vec<u8>,
}

impl Writer {
    fn new(revision: Revision, encoding: Encoding, with_values: bool) -> Self {
        Writer {
            encoding,
            with_values,
            is_first: true,
            piece: format!("{{\"revision\":{revision},\"kvs\":[").into_bytes(),
        }
    }

    fn add(&mut self, kv: &KeyValue) {
        if !std::mem::take(&mut self.is_first) {
            self.piece.push(b',');
        }
        let kv = KeyValueBody::new(kv, self.encoding, self.with_values);
        self.piece.extend_from_slice(&json_bytes(&kv));
    }

    fn end(&mut self, more: bool, next: Option<&str>) {
        self.piece.extend_from_slice(b"],\"more\":");
        self.piece.extend_from_slice(&json_bytes(&more));
        if let Some(next) = next {
            self.piece.extend_from_slice(b",\"next\":");
            self.piece.extend_from_slice(&json_bytes(&next));
        }
        self.piece.push(b'}');
    }

    fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.piece).into()
    }
}

/// A list on its way to the client; the next page is read once there is room to send it.
struct Listing<S> {
    store: S,
    /// What is left to read.
    scan: ScanRequest,
    /// Keys that may still be sent.
    left: u64,
    /// Whether the store has more beyond what `waiting` holds.
    more: bool,
    /// Read, and not written yet.
    waiting: VecDeque<KeyValue>,
    writer: Writer,
    parameters: Parameters,
    last_key: Bytes,
    done: bool,
}

async fn in_key_order<S: Store>(
    store: S,
    range: RangeRequest,
    parameters: Parameters,
    encoding: Encoding,
) -> Result<Response, Problem> {
    let mut listing = Listing {
        left: u64::try_from(range.limit)
            .ok()
            .filter(|limit| *limit > 0)
            .unwrap_or(u64::MAX),
        scan: ScanRequest {
            key: range.key,
            range_end: range.range_end,
            revision: range.revision,
            serializable: range.serializable,
            keys_only: range.keys_only,
            keys_max: PAGE_KEYS,
            bytes_max: PAGE_BYTES,
        },
        store,
        more: false,
        waiting: VecDeque::new(),
        writer: Writer::new(0, encoding, !range.keys_only),
        parameters,
        last_key: Bytes::new(),
        done: false,
    };
    // The first page before the answer begins: what is wrong shows there, if anything is.
    listing.read().await?;
    listing.writer = Writer::new(listing.scan.revision, encoding, !range.keys_only);
    let mut pieces = Vec::new();
    while let Some(piece) = listing.piece_of_waiting() {
        pieces.push(piece);
    }
    let link = match listing.done {
        true if listing.more => listing.next(),
        _ => None,
    };
    let mut response = json_response(&());
    let body = match listing.done {
        // The whole list is there: its length is known.
        true => Body::from(pieces.concat()),
        false => {
            let ready = stream::iter(pieces.into_iter().map(Ok));
            let rest = stream::try_unfold(listing, Listing::step);
            Body::from_stream(futures::StreamExt::chain(ready, rest))
        }
    };
    *response.body_mut() = body;
    set_link(&mut response, link.as_deref());
    Ok(response)
}

impl<S: Store> Listing<S> {
    /// Reads a page.
    async fn read(&mut self) -> Result<(), Error> {
        self.scan.keys_max = usize::try_from(self.left).unwrap_or(usize::MAX).min(PAGE_KEYS);
        let page = self.store.scan(self.scan.clone()).await?;
        if self.scan.revision == 0 || !self.scan.serializable {
            self.scan.revision = page.revision;
            // What was read from holds the pinned revision: no further page needs to ask the leader.
            self.scan.serializable = true;
        }
        self.left -= page.kvs.len() as u64;
        self.more = page.more;
        if let Some(last) = page.kvs.last() {
            self.last_key = last.key.clone();
            self.scan.key = [&last.key[..], &[0]].concat().into();
        }
        self.waiting = page.kvs.into();
        Ok(())
    }

    /// A piece of what was read; `None` once that is written, after which the next page must be read unless the list
    /// is done.
    fn piece_of_waiting(&mut self) -> Option<Bytes> {
        if self.done {
            return None;
        }
        while let Some(kv) = self.waiting.pop_front() {
            self.writer.add(&kv);
            if self.writer.piece.len() >= PIECE_BYTES {
                return Some(self.writer.take());
            }
        }
        if !self.more || self.left == 0 {
            self.done = true;
            let next = self.more.then(|| self.next()).flatten();
            self.writer.end(self.more, next.as_deref());
            return Some(self.writer.take());
        }
        None
    }

    fn next(&self) -> Option<String> {
        next_link(&self.parameters, self.scan.revision, Begin::After(&self.last_key))
    }

    /// The next piece. An error cuts the body off: a client sees that its list is not whole.
    async fn step(mut self) -> Result<Option<(Bytes, Self)>, Error> {
        loop {
            if let Some(piece) = self.piece_of_waiting() {
                return Ok(Some((piece, self)));
            }
            if self.done {
                return Ok(None);
            }
            self.read().await?;
        }
    }
}

/// A list in another order than that of the keys. Such a list cannot be read page by page: the store sorts it whole.
async fn sorted<S: Store>(
    store: &S,
    mut range: RangeRequest,
    sort: Sort,
    parameters: Parameters,
    encoding: Encoding,
) -> Result<Response, Problem> {
    sort.apply(&mut range);
    let with_values = !range.keys_only;
    let pinned = range.revision;
    let sorted = store.range(range).await?;
    let revision = match pinned {
        0 => sorted.header.unwrap_or_default().revision,
        pinned => pinned,
    };
    let next = match (sort, sorted.kvs.last()) {
        (Sort::KeyDown, Some(last)) if sorted.more => next_link(&parameters, revision, Begin::Below(&last.key)),
        _ => None,
    };
    let mut response = json_response(&());
    set_link(&mut response, next.as_deref());
    let mut writer = Writer::new(revision, encoding, with_values);
    let mut kvs = sorted.kvs.into_iter();
    let mut done = false;
    let pieces = std::iter::from_fn(move || {
        if done {
            return None;
        }
        for kv in kvs.by_ref() {
            writer.add(&kv);
            if writer.piece.len() >= PIECE_BYTES {
                return Some(writer.take());
            }
        }
        done = true;
        writer.end(sorted.more, next.as_deref());
        Some(writer.take())
    });
    *response.body_mut() = Body::from_stream(stream::iter(pieces.map(Ok::<_, Error>)));
    Ok(response)
}

pub(super) async fn delete<S: Store>(call: Call<S>) -> Result<Response, Problem> {
    let encoding = call.encoding();
    let selection = Selection::of_parameters(&call.parameters)?;
    body::none(&call.headers, call.body).await?;
    if selection.is_all && !call.parameters.flag("all") {
        // A script whose variable is empty must not empty the store.
        let detail = "a delete that nothing narrows down would delete every key: if that is meant, say all=true";
        return Err(Problem::parameter(INVALID_PARAMETER, "all", detail));
    }
    let with_prev = call.parameters.flag("prev");
    let delete = DeleteRangeRequest {
        key: selection.key,
        range_end: selection.range_end,
        prev_kv: with_prev,
    };
    delete.validate()?;
    let done = call.store.delete_range(delete).await?;
    Ok(json_response(&DeletedBody {
        revision: done.header.unwrap_or_default().revision,
        deleted: done.deleted,
        prevs: with_prev.then(|| KeyValueBody::all(&done.prev_kvs, encoding, true)),
    }))
}
