//! The history of the whole cluster, and whether everybody agrees with it.
//!
//! The committed log is put together from what each member hands to its state machine: the first to hand out an index
//! defines it, and all others must hand out the same. It is the witness for linearizability: an operation takes effect
//! at its place in the log, a read after the revision that it reports.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use api::codec::{Action, LeaseCheckpoint, LeaseCheckpointRequest, Operation, decode_entry};
use api::kv::{LeaseRevokeRequest, RangeRequest, RangeResponse};
use api::{Error, MemberId, RaftIndex, RequestId, Revision};
use mvcc::machine::{Command, Digest};
use mvcc::{Committed, Outcome};

use crate::Micros;
use crate::auth::{Auth, Who};
use crate::model::{Model, Seen};
use crate::visible::Visible;

/// Stops the run: something is wrong with the cluster.
macro_rules! violation {
    ($($text:tt)*) => { panic!("VIOLATION: {}", format!($($text)*)) };
}
pub(crate) use violation;

/// What a client, or a member for itself, asked for.
#[derive(Debug, Clone)]
pub enum Request {
    /// An operation of the state machine.
    Write(Box<Action>),
    /// A linearizable read.
    Read(RangeRequest),
    /// A serializable read.
    ReadHere(RangeRequest),
    /// The end of a lease whose time is over, as a leader sees it in a term.
    Expire(i64, u64),
    /// More time for a lease.
    KeepAlive(i64),
    /// What a lease has left, in seconds, as a leader sees it in a term.
    Checkpoint(i64, i64, u64),
}

impl Request {
    /// What goes into the log for it.
    pub fn action(&self) -> Option<Action> {
        match self {
            Request::Write(action) => Some((**action).clone()),
            Request::Expire(id, _) => Some(Action::LeaseRevoke(LeaseRevokeRequest { id: *id })),
            // Before more time counts, what the log says is left is taken back.
            Request::KeepAlive(id) => Some(checkpoint(*id, 0)),
            Request::Checkpoint(id, left, _) => Some(checkpoint(*id, *left)),
            Request::Read(_) | Request::ReadHere(_) => None,
        }
    }
}

fn checkpoint(id: i64, remaining_ttl: i64) -> Action {
    let checkpoints = vec![LeaseCheckpoint { id, remaining_ttl }];
    Action::LeaseCheckpoint(LeaseCheckpointRequest { checkpoints })
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Nobody knows yet.
    Waiting,
    /// It was answered.
    Answered,
    /// It was refused, for certain without effect.
    Refused(Error),
    /// Whoever knew crashed, or says that it does not know.
    Unknown,
}

/// A request and what became of it.
#[derive(Debug)]
pub struct Op {
    /// What was asked.
    pub request: Request,
    /// On whose behalf.
    pub who: Who,
    /// When.
    pub invoked: Micros,
    /// Where.
    pub node: usize,
    /// What was committed (for reads: acknowledged) before: it takes effect after that index.
    pub floor_index: RaftIndex,
    /// Likewise for reads.
    pub floor_revision: Revision,
    /// How it ended.
    pub end: End,
    /// Where it is in the log.
    pub committed: Option<(RaftIndex, usize)>,
}

/// What is known of a committed entry.
struct Entry {
    fingerprint: u64,
    term: u64,
    /// The results of its operations, as the model has them.
    results: Results,
    /// What may be seen once it is applied.
    seen: Seen,
    /// Users and roles once it is applied.
    auth: Arc<Auth>,
    digest: Option<(Revision, u64)>,
}

/// What the operations of an entry came to.
pub type Results = Vec<(RequestId, Result<Outcome, Error>)>;

/// Everything that happened, seen from outside.
#[derive(Default)]
pub struct History {
    ops: Vec<Op>,
    entries: Vec<Entry>,
    leaders: BTreeMap<u64, MemberId>,
    /// The state after the newest committed entry.
    pub model: Model,
    /// The newest index and revision that anybody was told of.
    acknowledged_index: RaftIndex,
    acknowledged_revision: Revision,
    /// Operations answered.
    pub answered: u64,
    /// What clients saw, and when.
    pub seen_by_clients: Visible,
}

impl History {
    /// Notes a request; returns its name.
    pub fn invoke(&mut self, request: Request, who: Who, node: usize, now: Micros) -> RequestId {
        let floor_index = match request {
            // What is proposed after an index was committed anywhere comes after it, acknowledged or not.
            Request::Write(_) | Request::Expire(..) | Request::Checkpoint(..) => self.last_index(),
            Request::Read(_) | Request::ReadHere(_) | Request::KeepAlive(_) => self.acknowledged_index,
        };
        self.ops.push(Op {
            request,
            who,
            invoked: now,
            node,
            floor_index,
            floor_revision: self.acknowledged_revision,
            end: End::Waiting,
            committed: None,
        });
        self.ops.len() as RequestId
    }

    /// A request.
    pub fn op(&self, id: RequestId) -> &Op {
        &self.ops[id as usize - 1]
    }

    fn op_mut(&mut self, id: RequestId) -> &mut Op {
        &mut self.ops[id as usize - 1]
    }

    /// How many requests there were.
    pub fn requests(&self) -> usize {
        self.ops.len()
    }

    /// The newest index that any member knew to be committed.
    pub fn last_index(&self) -> RaftIndex {
        self.entries.len() as RaftIndex
    }

    /// The term of a committed entry.
    pub fn term(&self, index: RaftIndex) -> u64 {
        if index == 0 {
            0
        } else {
            self.entries[index as usize - 1].term
        }
    }

    /// A member hands a committed entry to its state machine.
    ///
    /// Returns whether it is news.
    pub fn committed(&mut self, node: MemberId, entry: &Committed) -> bool {
        let mut hasher = DefaultHasher::new();
        let (kind, data) = match &entry.command {
            Command::Operations(data) => (0, data),
            Command::MemberChange(data) => (1, data),
        };
        (entry.index, entry.term, kind, &data[..]).hash(&mut hasher);
        let fingerprint = hasher.finish();
        let (index, last) = (entry.index, self.last_index());
        if index <= last {
            let known = &self.entries[index as usize - 1];
            if known.fingerprint != fingerprint {
                violation!(
                    "member {node} commits another entry at index {index}: of term {}, while the one known is of term {}",
                    entry.term,
                    known.term
                );
            }
            return false;
        }
        if index != last + 1 {
            violation!(
                "member {node} commits index {index} while nobody committed {}",
                last + 1
            );
        }
        if entry.term < self.term(last) {
            violation!(
                "member {node} commits index {index} of term {} after one of term {}",
                entry.term,
                self.term(last)
            );
        }
        let operations = decode_entry(data).expect("a committed entry decodes");
        let mut results = Vec::with_capacity(operations.len());
        for (at, operation) in operations.iter().enumerate() {
            self.committed_operation(index, at, operation);
            let action = operation
                .action
                .as_ref()
                .expect("the decoder refuses operations without one");
            let header = operation.header.clone().unwrap_or_default();
            results.push((operation.id(), self.model.apply(index, &header, action)));
        }
        self.entries.push(Entry {
            fingerprint,
            term: entry.term,
            results,
            seen: self.model.seen,
            auth: self.model.auth.clone(),
            digest: None,
        });
        true
    }

    /// What goes into the log for a request, on behalf of whoever made it.
    pub fn operation(&self, id: RequestId) -> Option<Operation> {
        let Op { request, who, .. } = self.op(id);
        let action = request.action()?;
        Some(Operation::of_user(id, who.name.clone(), who.revision, action))
    }

    /// What somebody reads who sees what there is once an index is applied.
    fn expected(&self, who: &Who, range: &RangeRequest, applied: RaftIndex) -> Result<RangeResponse, Error> {
        let auth = applied.checked_sub(1).map(|at| &self.entries[at as usize].auth);
        auth.map_or(Ok(()), |auth| {
            auth.permit_read(who.caller(), &range.key, &range.range_end)
        })?;
        self.model.range(range, self.seen(applied))
    }

    /// What the operations of a committed entry came to.
    pub fn results_of(&self, index: RaftIndex) -> &Results {
        &self.entries[index as usize - 1].results
    }

    /// How many operations a committed entry has.
    pub fn operations_of(&self, index: RaftIndex) -> usize {
        self.entries[index as usize - 1].results.len()
    }

    /// What whoever has applied an index sees.
    pub fn seen(&self, index: RaftIndex) -> Seen {
        index
            .checked_sub(1)
            .map_or(Model::default().seen, |at| self.entries[at as usize].seen)
    }

    fn committed_operation(&mut self, index: RaftIndex, at: usize, operation: &Operation) {
        let id = operation.id();
        if id == 0 {
            return;
        }
        if id > self.ops.len() as RequestId {
            violation!("index {index} holds operation {id}, which nobody proposed");
        }
        let proposed = self.operation(id);
        let op = self.op_mut(id);
        if operation.action.is_none() || Some(operation) != proposed.as_ref() {
            violation!("index {index} holds operation {id}, which is not what was proposed by that name");
        }
        if let Some((first, _)) = op.committed {
            violation!("operation {id} is in the log twice, at {first} and {index}");
        }
        op.committed = Some((index, at));
        if let End::Refused(error) = op.end {
            violation!("operation {id} is in the log at {index} after it was refused for certain ({error})");
        }
        if index <= op.floor_index {
            violation!(
                "operation {id} is in the log at {index}, though index {} was committed before it began",
                op.floor_index
            );
        }
    }

    /// A member applied an entry: everybody comes to the same state.
    pub fn digest(&mut self, node: MemberId, digest: &Digest) {
        let entry = &mut self.entries[digest.index as usize - 1];
        let found = (digest.revision, digest.digest);
        let known = *entry.digest.get_or_insert(found);
        if known != found {
            violation!(
                "member {node} has state {found:x?} at index {}, others have {known:x?}",
                digest.index
            );
        }
    }

    /// A member's state machine answers the operations of an entry: it does so as the model.
    pub fn results(&self, node: MemberId, index: RaftIndex, results: &Results) {
        let known = &self.entries[index as usize - 1].results;
        if known != results {
            violation!("member {node} answers index {index} with {results:?}, the model with {known:?}");
        }
        let revision = self.entries[index as usize - 1].digest.map(|(revision, _)| revision);
        if revision != Some(self.seen(index).revision) {
            violation!(
                "member {node} is at revision {revision:?} at index {index}, the model at {:?}",
                self.seen(index)
            );
        }
    }

    /// A client is told the result of its operation.
    pub fn answer_write(&mut self, id: RequestId, result: &Result<Outcome, Error>, now: Micros) {
        let asked = &self.ops[id as usize - 1];
        if let (Request::Write(action), Ok(outcome)) = (&asked.request, result) {
            self.seen_by_clients.wrote(id, (asked.invoked, now), action, outcome);
        }
        let op = self.op_mut(id);
        let Some((index, _)) = op.committed else {
            violation!("operation {id} is acknowledged and not in the log")
        };
        assert_eq!(op.end, End::Waiting, "operation {id} ends once");
        op.end = End::Answered;
        self.answered += 1;
        self.acknowledged_index = self.acknowledged_index.max(index);
        let revision = result.as_ref().map_or(0, revision_of);
        self.acknowledged_revision = self.acknowledged_revision.max(revision);
    }

    /// A client is told what it read.
    pub fn answer_read(
        &mut self,
        id: RequestId,
        who: &Who,
        result: &Result<RangeResponse, Error>,
        applied: RaftIndex,
        now: Micros,
    ) {
        let seen = self.seen(applied);
        let op = self.op_mut(id);
        assert_eq!(op.end, End::Waiting, "read {id} ends once");
        op.end = End::Answered;
        if seen.revision < op.floor_revision || applied < op.floor_index {
            violation!(
                "read {id} is stale: it reports revision {} at index {applied}, though revision {} and index {} were known before it began",
                seen.revision,
                op.floor_revision,
                op.floor_index
            );
        }
        let Request::Read(range) = self.op(id).request.clone() else {
            violation!("request {id} is answered like a read");
        };
        let range = &range;
        let known = self.expected(who, range, applied);
        if known != *result {
            violation!("read {id} of {range:?} at index {applied} finds {result:?}, the model {known:?}");
        }
        if let Ok(response) = result {
            let asked = self.op(id).invoked;
            self.seen_by_clients.read(id, Some((asked, now)), range, response);
        }
        self.answered += 1;
        self.acknowledged_revision = self.acknowledged_revision.max(seen.revision);
    }

    /// A client is told what a member had, whether or not that is the newest.
    pub fn answer_serializable(
        &mut self,
        who: &Who,
        range: &RangeRequest,
        result: &Result<RangeResponse, Error>,
        applied: RaftIndex,
    ) {
        let known = self.expected(who, range, applied);
        if known != *result {
            violation!("a read of {range:?} at index {applied} finds {result:?}, the model {known:?}");
        }
        if let Ok(response) = result {
            self.seen_by_clients.read(0, None, range, response);
        }
        self.answered += 1;
    }

    /// A client is told that its request was refused.
    pub fn refuse(&mut self, id: RequestId, error: Error) {
        // What it says after leaders were lost is that it does not know.
        let certain = error != Error::TimeoutLeaderFail;
        let op = self.op_mut(id);
        assert_eq!(op.end, End::Waiting, "request {id} ends once");
        op.end = if certain { End::Refused(error) } else { End::Unknown };
        if let (true, Some((index, _))) = (certain, op.committed) {
            violation!("operation {id} is refused for certain ({error}), but is in the log at {index}");
        }
    }

    /// The owner of a lease is told that it has its full time again.
    pub fn answer_keep_alive(&mut self, id: RequestId) {
        let op = self.op_mut(id);
        assert_eq!(op.end, End::Waiting, "keep-alive {id} ends once");
        op.end = End::Answered;
        self.answered += 1;
    }

    /// Nobody will ever tell the client.
    pub fn forget(&mut self, id: RequestId) {
        let op = self.op_mut(id);
        if op.end == End::Waiting {
            op.end = End::Unknown;
        }
    }

    /// A member leads in a term: nobody else ever does.
    pub fn leads(&mut self, node: MemberId, term: u64) {
        let leader = *self.leaders.entry(term).or_insert(node);
        if leader != node {
            violation!("members {leader} and {node} both lead in term {term}");
        }
    }

    /// Terms that had a leader.
    pub fn terms_led(&self) -> usize {
        self.leaders.len()
    }
}

/// The revision that an answer reports.
pub fn revision_of(outcome: &Outcome) -> Revision {
    let header = match outcome {
        Outcome::Put(response) => &response.header,
        Outcome::DeleteRange(response) => &response.header,
        Outcome::Txn(response) => &response.header,
        Outcome::Compact(response) => &response.header,
        Outcome::LeaseGrant(response) => &response.header,
        Outcome::LeaseRevoke(response) => &response.header,
        Outcome::Alarm(response) => &response.header,
        Outcome::Authenticate(response) => &response.header,
        Outcome::Auth(answer) => return answer.header().map_or(0, |header| header.revision),
        Outcome::LeaseCheckpoint | Outcome::Members(_) | Outcome::Downgrade => return 0,
    };
    header.as_ref().map_or(0, |header| header.revision)
}
