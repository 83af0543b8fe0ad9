//! One client of a load: a place on a connection, its randomness, and where it writes down what it saw.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use api::kv::{KeyValue, PutRequest, RangeRequest, ResponseOpKind, TxnRequest, TxnResponse};
use bytes::{Bytes, BytesMut};
use prost::Message;

use crate::clock::now;
use crate::load::Load;
use crate::net::channel::Channel;
use crate::net::failure::{Failure, Kind};
use crate::net::grpc::{Method, frame};
use crate::record::Recorder;
use crate::scan::{RangeScan, RangeSummary};
use crate::values::ValueMaker;

/// What every client has, whatever it does.
pub(crate) struct Client {
    pub(crate) channel: Rc<Channel>,
    pub(crate) recorder: Rc<RefCell<Recorder>>,
    pub(crate) load: Arc<Load>,
    pub(crate) rng: fastrand::Rng,
    pub(crate) values: ValueMaker,
    /// Memory for keys and frames, used again and again.
    pub(crate) arena: BytesMut,
}

/// What became of a transaction on one key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Swap {
    /// It took effect, at this revision.
    Done(i64),
    /// The key had changed: to this mod revision, or it is gone (0).
    Conflict(i64),
}

impl Client {
    /// Client number `number` of all.
    pub(crate) fn new(channel: Rc<Channel>, recorder: Rc<RefCell<Recorder>>, load: Arc<Load>, number: usize) -> Self {
        Client {
            channel,
            recorder,
            rng: load.rng(number as u64),
            values: ValueMaker::new(load.values, load.value_bytes),
            load,
            arena: BytesMut::new(),
        }
    }

    /// Key number `number` of the load.
    pub(crate) fn key(&mut self, number: u64) -> Bytes {
        self.load.keys.key(number, &mut self.arena)
    }

    /// Makes a call and returns the message of the answer.
    pub(crate) async fn call(&mut self, method: Method, request: &impl Message) -> Result<Bytes, Failure> {
        let request = frame(request, &mut self.arena);
        self.channel.unary(method, request).await
    }

    pub(crate) async fn put(&mut self, key: Bytes, value: Bytes) -> Result<(), Failure> {
        let put = PutRequest {
            key,
            value,
            ..Default::default()
        };
        self.call(Method::Put, &put).await.map(drop)
    }

    pub(crate) async fn range(&mut self, request: &RangeRequest) -> Result<RangeSummary, Failure> {
        let frame = frame(request, &mut self.arena);
        let mut scan = RangeScan::default();
        self.channel.unary_into(Method::Range, frame, &mut scan).await?;
        let found = scan.finish()?;
        // What the server says it has found must have come: keys are counted here, and not looked at.
        if !found.more && !request.count_only && found.keys != found.count {
            let what = format_args!("{} keys came instead of {}", found.keys, found.count);
            return Err(Failure::new(Kind::Protocol, what));
        }
        Ok(found)
    }

    /// A transaction whose other branch reads the one key it is about.
    pub(crate) async fn swap(&mut self, txn: &TxnRequest) -> Result<Swap, Failure> {
        let reply = self.call(Method::Txn, txn).await?;
        let reply = TxnResponse::decode(reply).map_err(|error| Failure::new(Kind::Protocol, error))?;
        if reply.succeeded {
            return Ok(Swap::Done(reply.header.map_or(0, |header| header.revision)));
        }
        let found: Option<&KeyValue> = reply.responses.iter().find_map(|response| match &response.response {
            Some(ResponseOpKind::Range(range)) => range.kvs.first(),
            _ => None,
        });
        Ok(Swap::Conflict(found.map_or(0, |kv| kv.mod_revision)))
    }

    /// Writes down how an operation ended that was meant for `at`; the number is that of its items.
    pub(crate) fn record(&self, label: usize, at: u64, result: Result<u64, &Failure>) {
        let mut recorder = self.recorder.borrow_mut();
        match result {
            Ok(items) => recorder.succeed(label, at, now(), items),
            Err(failure) => recorder.fail(label, at, now(), failure),
        }
    }
}
