//! Clients: each asks for one thing after the other, at some member, and waits for the answer.

use api::auth::ROOT_USER;
use api::codec::{Action, MemberAttributes, MemberAttributesRequest, MemberUpdate, encode_operation};
use api::kv::{
    AlarmAction, AlarmMember, AlarmRequest, AlarmType, CompactionRequest, Compare, DeleteRangeRequest,
    LeaseGrantRequest, LeaseRevokeRequest, PutRequest, RangeRequest, RequestOp, RequestOpKind, TargetUnion, TxnRequest,
};
use api::{Error, RequestId};
use bytes::Bytes;
use fastrand::Rng;
use mvcc::{Failure, Reader};
use replica::{Input, Proposal};

use crate::SECOND;
use crate::auth::{self, Who};
use crate::bugs::Bug;
use crate::engine::SimEngine;
use crate::history::{Request, violation};
use crate::scenario::Theme;
use crate::trace::Trace;
use crate::world::{Event, World};

/// How long a client waits.
const PATIENCE: u64 = 12 * SECOND;

/// A client.
pub struct Client {
    /// The member that it talks to.
    pub node: usize,
    /// What it waits for.
    pub waits: Option<RequestId>,
}

impl Client {
    /// A client that talks to a member.
    pub fn at(node: usize) -> Self {
        Client { node, waits: None }
    }
}

impl World {
    fn key(&mut self) -> Bytes {
        let rng = &mut self.rng_clients;
        let text = if rng.f64() < 0.7 {
            format!("hot{}", rng.usize(..self.scenario.hot_keys))
        } else {
            format!("cold{:03}", rng.usize(..self.scenario.cold_keys))
        };
        text.into()
    }

    /// A client asks for something.
    pub(crate) fn client(&mut self, client: usize) {
        if self.clients[client].waits.is_some() || self.clients_are_done() {
            return;
        }
        // It talks to whoever answers.
        let node = self.clients[client].node;
        if self.nodes[node].process.is_none() || self.rng_clients.u8(..20) == 0 {
            self.clients[client].node = self.rng_clients.usize(..self.nodes.len());
            return self.client_later(client);
        }
        if self.nodes[node].paused_until > self.now {
            let later = self.nodes[node].paused_until;
            return self.at(later, Event::Client(client));
        }
        let request = self.request();
        // Leases are known to the leader alone; members hand such requests on.
        let leader = self.nodes[node]
            .process
            .as_ref()
            .map_or(0, |process| process.standing.leader);
        let who = self.somebody(node, &request);
        if let Request::ReadHere(range) = &request {
            self.read_here(node, range, &who);
            return self.client_later(client);
        }
        let node = match (&request, usize::try_from(leader)) {
            (Request::KeepAlive(_), Ok(leader)) if leader > 0 && self.answers(leader - 1) => leader - 1,
            _ => node,
        };
        self.clients[client].node = node;
        let id = self.history.requests() as RequestId + 1;
        self.clients[client].waits = Some(id);
        assert_eq!(self.ask(node, request, who), id);
        self.at(self.now + PATIENCE, Event::GiveUp(client, id));
    }

    /// Someone reads from a member, and does not wait for the answer.
    pub(crate) fn someone_reads(&mut self, node: usize) {
        if self.calm_since.is_some() || !self.answers(node) {
            return;
        }
        let key = self.key();
        let request = Request::Read(RangeRequest {
            revision: 0,
            ..self.range(key)
        });
        let who = self.somebody(node, &request);
        self.ask(node, request, who);
    }

    /// On whose behalf a client asks: somebody, as far as the member that it asks knows that auth is on, and of which
    /// revision its users and roles are.
    fn somebody(&mut self, node: usize, request: &Request) -> Who {
        let machine = &self.nodes[node].process.as_ref().expect("it runs").machine;
        if !machine.reader().is_auth_enabled() {
            return Who::default();
        }
        let revision = machine.reader().auth().revision();
        // Mostly those who may: else users and roles would hardly change once auth is on.
        let is_for_root = matches!(request, Request::Write(action) if auth::is_about_users(action));
        let name = match self.rng_clients.u8(..8) {
            1.. if is_for_root => ROOT_USER.to_owned(),
            _ => auth::some_name(&mut self.rng_clients),
        };
        self.trace.mark("asked with auth on");
        let revision = if name.is_empty() { 0 } else { revision };
        Who { name, revision }
    }

    fn answers(&self, node: usize) -> bool {
        self.nodes[node].process.is_some() && self.nodes[node].paused_until <= self.now
    }

    pub(crate) fn clients_are_done(&self) -> bool {
        self.calm_since.is_some_and(|since| self.now > since + 10 * SECOND)
    }

    fn request(&mut self) -> Request {
        if !self.history.model.alarms.is_empty() && self.rng_clients.u8(..10) == 0 {
            return Request::Write(Box::new(self.about_alarms()));
        }
        if self.scenario.auth && self.rng_clients.u8(..12) == 0 {
            let known = self.history.model.auth.clone();
            let action = auth::request_with_auth(&mut self.rng_clients, &known);
            return Request::Write(Box::new(action));
        }
        let key = self.key();
        let some_lease = self.some_lease();
        let seen = self.history.model.seen;
        let rng = &mut self.rng_clients;
        let number = self.history.requests() as i64 + 1;
        let what = if rng.f64() < self.scenario.leases {
            rng.u8(25..34)
        } else {
            rng.u8(..100)
        };
        let action = match (what, some_lease) {
            (0..5, _) => return Request::ReadHere(self.range(key)),
            (5..25, _) => return Request::Read(self.range(key)),
            (25..30, Some(lease)) => return Request::KeepAlive(lease),
            (30..33, _) => Action::LeaseGrant(LeaseGrantRequest {
                ttl: rng.i64(self.scenario.lease_ttl.clone()),
                id: number,
            }),
            (33, Some(id)) => Action::LeaseRevoke(LeaseRevokeRequest { id }),
            (34..37, _) => Action::Compact(CompactionRequest {
                revision: rng.i64(seen.compacted.max(0)..=seen.revision),
                physical: false,
            }),
            (37..40, _) => Action::DeleteRange(DeleteRangeRequest {
                key,
                range_end: "cold050".into(),
                prev_kv: rng.bool(),
            }),
            (40..47, _) => Action::DeleteRange(DeleteRangeRequest {
                key,
                prev_kv: rng.bool(),
                ..Default::default()
            }),
            (47..65, _) => Action::Txn(self.txn(2)),
            (93..95, _) => auth::some_request(rng),
            (95, _) => self.about_members(number),
            (96, _) => self.about_alarms(),
            (97, Some(id)) => Action::Put(PutRequest {
                ignore_value: number % 2 == 0,
                ignore_lease: number % 2 == 1,
                ..put(rng, key, number, Some(id).filter(|_| number % 2 == 0))
            }),
            (_, lease) => Action::Put(put(rng, key, number, lease.filter(|_| number % 3 == 0))),
        };
        Request::Write(Box::new(action))
    }

    /// What members, or operators for them, say about them: no change of Raft's configuration.
    fn about_members(&mut self, number: i64) -> Action {
        let rng = &mut self.rng_clients;
        let id = rng.u64(1..=self.nodes.len() as u64 + 1);
        if rng.bool() {
            return Action::MemberAttributes(MemberAttributesRequest {
                member_id: id,
                attributes: Some(MemberAttributes {
                    name: format!("name {number}"),
                    client_urls: vec![format!("http://client-{number}:2379")],
                }),
            });
        }
        // Now and then one that another member has.
        let peer_url = if rng.u8(..3) == 0 {
            format!("http://member-{}:2380", rng.usize(1..=self.nodes.len()))
        } else {
            format!("http://member-{id}-{number}:2380")
        };
        Action::MemberUpdate(MemberUpdate {
            id,
            peer_urls: vec![peer_url],
        })
    }

    /// A member says that its disk is full, or that its state is not that of others, and an operator that it is not so.
    fn about_alarms(&mut self) -> Action {
        let on: Vec<AlarmMember> = self.history.model.alarms.iter().copied().collect();
        let rng = &mut self.rng_clients;
        let action = match rng.u8(..6) {
            0 => AlarmAction::Get,
            1 if self.calm_since.is_none() => AlarmAction::Activate,
            _ => AlarmAction::Deactivate,
        };
        let one_that_is_on = rng.choice(&on).copied().filter(|_| rng.u8(..4) > 0);
        let AlarmMember { member_id, alarm } = one_that_is_on.unwrap_or_else(|| {
            let member_id = rng.u64(..=self.nodes.len() as u64);
            match rng.u8(..6) {
                0 => AlarmMember {
                    member_id,
                    alarm: AlarmType::Corrupt as i32,
                },
                // Whoever cannot tell which member is odd accuses them all.
                1 => AlarmMember {
                    member_id: 0,
                    alarm: AlarmType::Corrupt as i32,
                },
                _ => AlarmMember {
                    member_id,
                    alarm: AlarmType::Nospace as i32,
                },
            }
        });
        Action::Alarm(AlarmRequest {
            action: action as i32,
            member_id,
            alarm,
        })
    }

    /// Clients have gone: the operator takes back what forbids that leases end.
    pub(crate) fn end_doubts(&mut self) {
        let leader = (0..self.nodes.len()).find(|&n| self.leads(n) && self.belongs(n));
        let mut alarms = self.history.model.alarms.iter();
        let doubt = alarms.find(|alarm| alarm.alarm() == AlarmType::Corrupt).copied();
        if let (true, Some(leader), Some(doubt)) = (self.history.model.is_corrupt(), leader, doubt) {
            let request = AlarmRequest {
                action: AlarmAction::Deactivate as i32,
                member_id: doubt.member_id,
                alarm: doubt.alarm,
            };
            self.ask(leader, Request::Write(Box::new(Action::Alarm(request))), Who::member());
        }
    }

    fn some_lease(&mut self) -> Option<i64> {
        // Often the one that was left alone for longest: the log says by then what it has left.
        if self.scenario.theme == Theme::Leases && self.rng_clients.bool() {
            let oldest = self.leases.iter().min_by_key(|(_, promise)| promise.since);
            return oldest.map(|(id, _)| *id);
        }
        let leases: Vec<i64> = self.leases.keys().copied().collect();
        self.rng_clients.choice(&leases).copied()
    }

    fn range(&mut self, key: Bytes) -> RangeRequest {
        let seen = self.history.model.seen;
        let rng = &mut self.rng_clients;
        let mut range = RangeRequest {
            key,
            limit: rng.i64(0..4),
            keys_only: rng.u8(..8) == 0,
            count_only: rng.u8(..8) == 0,
            ..Default::default()
        };
        if rng.bool() {
            (range.key, range.range_end) = match rng.u8(..3) {
                0 => ("cold".into(), "cole".into()),
                1 => ("hot".into(), "hou".into()),
                _ => (Bytes::from_static(&[0]), Bytes::from_static(&[0])),
            };
        }
        if rng.u8(..3) == 0 {
            range.revision = rng.i64(seen.compacted.max(1) - 1..=seen.revision);
        }
        range
    }

    /// A transaction: every key is written once at most, as front ends see to.
    fn txn(&mut self, depth: usize) -> TxnRequest {
        let key = self.key();
        let number = self.history.requests() as i64 + 1;
        let lease = self.some_lease();
        let range = RangeRequest {
            revision: 0,
            ..self.range(key.clone())
        };
        let rng = &mut self.rng_clients;
        let targets = [
            TargetUnion::Version(rng.i64(0..3)),
            TargetUnion::CreateRevision(0),
            TargetUnion::ModRevision(self.history.model.seen.revision - rng.i64(0..3)),
            TargetUnion::Value(format!("value {}", number - rng.i64(0..20)).into()),
        ];
        let target = rng.usize(..targets.len());
        let compare = Compare {
            result: rng.i32(0..4),
            target: target as i32,
            key: key.clone(),
            target_union: Some(targets[target].clone()),
            range_end: if rng.u8(..5) == 0 {
                "cold050".into()
            } else {
                Bytes::new()
            },
        };
        let mut branches = [Vec::new(), Vec::new()];
        for branch in &mut branches {
            if rng.bool() {
                branch.push(RequestOpKind::Range(range.clone()));
            }
            match rng.u8(..4) {
                0 => branch.push(RequestOpKind::DeleteRange(DeleteRangeRequest {
                    key: key.clone(),
                    prev_kv: rng.bool(),
                    ..Default::default()
                })),
                1 => branch.push(RequestOpKind::DeleteRange(DeleteRangeRequest {
                    key: "cold".into(),
                    range_end: "cold020".into(),
                    prev_kv: false,
                })),
                _ => {
                    branch.push(RequestOpKind::Put(put(rng, key.clone(), number, lease)));
                    let other = format!("other {}", rng.u8(..4)).into();
                    branch.push(RequestOpKind::Put(put(rng, other, number, None)));
                }
            }
            if rng.bool() {
                branch.push(RequestOpKind::Range(range.clone()));
            }
        }
        let [success, failure] = branches.map(|branch| {
            let wrap = |request| RequestOp { request: Some(request) };
            branch.into_iter().map(wrap).collect::<Vec<_>>()
        });
        let mut txn = TxnRequest {
            compare: vec![compare],
            success,
            failure,
        };
        if depth > 0 && self.rng_clients.u8(..4) == 0 {
            // In a branch that writes nothing else, so that no key is written twice; reads may go before it and after.
            let nested = RequestOpKind::Txn(self.txn(depth - 1));
            let branch = if self.rng_clients.bool() {
                &mut txn.success
            } else {
                &mut txn.failure
            };
            branch.retain(|op| matches!(op.request, Some(RequestOpKind::Range(_))));
            let at = self.rng_clients.usize(..=branch.len());
            branch.insert(at, RequestOp { request: Some(nested) });
        }
        txn
    }

    /// Hands a request to a member that runs.
    pub fn ask(&mut self, node: usize, request: Request, who: Who) -> RequestId {
        self.trace.line(self.now, || {
            let id = self.history.requests() + 1;
            format!("{} is asked for {id} by {:?}: {request:?}", node + 1, who.name)
        });
        // What comes of leases is the leader's own doing.
        let who = if matches!(request, Request::KeepAlive(_)) {
            Who::member()
        } else {
            who
        };
        let id = self.history.invoke(request.clone(), who, node, self.now);
        let operation = self.history.operation(id);
        self.trace.mix(&[30, node as u64, id]);
        let process = self.nodes[node].process.as_mut().expect("it runs");
        process.pending.insert(id, process.ticks);
        match request {
            Request::Write(action) => {
                let change = match &*action {
                    Action::MemberChange(change) => Some(change.clone()),
                    _ => None,
                };
                let proposal = Proposal {
                    id,
                    operation: encode_operation(&operation.expect("it writes")),
                    leader_term: 0,
                };
                self.input(
                    node,
                    match change {
                        Some(change) => Input::ProposeMemberChange(proposal, change),
                        None => Input::Propose(proposal),
                    },
                );
            }
            Request::Read(_) if process.standing.reads_locally || self.bug == Some(Bug::ReadWithoutIndex) => {
                let (applied, _) = process.machine.applied();
                process.reads_ready.insert(id, applied);
                self.serve_reads(node);
            }
            Request::Read(_) if self.bug == Some(Bug::ReadIndexReused) && process.last_read_index.is_some() => {
                let index = process.last_read_index.take().expect("it was just looked at");
                process.reads_ready.insert(id, index);
                self.serve_reads(node);
            }
            Request::Read(_) => self.input(node, Input::ReadIndex(id)),
            Request::KeepAlive(lease) => self.keep_alive(node, id, lease),
            Request::ReadHere(_) | Request::Expire(..) | Request::Checkpoint(..) => {
                unreachable!("nobody asks for it so")
            }
        }
        id
    }

    /// Serves the reads whose index is applied.
    pub(crate) fn serve_reads(&mut self, n: usize) {
        let process = self.nodes[n].process.as_mut().expect("it runs");
        let (applied, _) = process.machine.applied();
        let due: Vec<RequestId> = process
            .reads_ready
            .iter()
            .filter(|(_, index)| **index <= applied || self.bug == Some(Bug::ReadBeforeApplied))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            process.reads_ready.remove(&id);
            if let Request::KeepAlive(lease) = self.history.op(id).request {
                self.kept_alive(n, id, lease);
                return self.serve_reads(n);
            }
            process.pending.remove(&id);
            let Request::Read(range) = &self.history.op(id).request else {
                unreachable!("only reads wait for an index")
            };
            let name = &self.history.op(id).who.name;
            let (who, permitted) = permit_read(&process.machine.reader(), name, range);
            let permitted = if self.bug == Some(Bug::ReadWhateverIsPermitted) {
                Ok(())
            } else {
                permitted
            };
            let read = permitted.map_err(Failure::Refused);
            let result = match read.and_then(|()| process.machine.reader().range(range)) {
                Ok(response) => Ok(response),
                Err(Failure::Refused(error)) => Err(error),
                // As the server does: whoever reads hears of it, and whoever writes stops the node.
                Err(Failure::Engine(_)) if self.engine_failed(n) => {
                    self.trace.mark("read answered with a disk error");
                    self.history.refuse(id, Error::Corrupt);
                    self.client_done(id);
                    return self.serve_reads(n);
                }
                Err(Failure::Engine(error)) => violation!("read {id} fails: {error}"),
            };
            let count = result.as_ref().map_or(-1, |response| response.count);
            self.trace.mix(&[31, id, applied, count as u64]);
            mark_refusal(&mut self.trace, result.as_ref().err());
            self.history.answer_read(id, &who, &result, applied, self.now);
            self.trace
                .line(self.now, || format!("{} answers read {id} at index {applied}", n + 1));
            if let Some(client) = self.clients.iter().position(|client| client.waits == Some(id)) {
                self.clients[client].waits = None;
                let think = self.rng_clients.u64(self.scenario.think.clone());
                self.at(self.now + think, Event::Client(client));
                return self.serve_reads(n);
            }
        }
    }

    /// A client reads what a member has, however old that is.
    fn read_here(&mut self, n: usize, range: &RangeRequest, who: &Who) {
        let process = self.nodes[n].process.as_ref().expect("it runs");
        let (applied, _) = process.machine.applied();
        let (who, permitted) = permit_read(&process.machine.reader(), &who.name, range);
        let read = permitted.map_err(Failure::Refused);
        let result = match read.and_then(|()| process.machine.reader().range(range)) {
            Ok(response) => Ok(response),
            Err(Failure::Refused(error)) => Err(error),
            Err(Failure::Engine(_)) if self.engine_failed(n) => return,
            Err(Failure::Engine(error)) => violation!("a serializable read at {} fails: {error}", n + 1),
        };
        if applied < self.history.last_index() {
            self.trace.mark("serializable read of the past");
        }
        self.trace.mix(&[32, n as u64, applied]);
        mark_refusal(&mut self.trace, result.as_ref().err());
        self.history.answer_serializable(&who, range, &result, applied);
    }

    /// A request has ended.
    pub(crate) fn client_done(&mut self, id: RequestId) {
        self.trace
            .line(self.now, || format!("request {id} ends: {:?}", self.history.op(id).end));
        if let Some(client) = self.clients.iter().position(|client| client.waits == Some(id)) {
            self.clients[client].waits = None;
            self.client_later(client);
        }
    }

    fn client_later(&mut self, client: usize) {
        let think = self.rng_clients.u64(self.scenario.think.clone());
        self.at(self.now + think, Event::Client(client));
    }

    /// A node crashed: its clients find out.
    pub(crate) fn clients_lost(&mut self, n: usize) {
        for client in 0..self.clients.len() {
            if self.clients[client].node == n && self.clients[client].waits.take().is_some() {
                self.client_later(client);
            }
        }
    }

    /// A client has waited long enough. Its node still owes an end.
    pub(crate) fn give_up(&mut self, client: usize, id: RequestId) {
        if self.clients[client].waits == Some(id) {
            self.trace.mark("client gave up");
            self.clients[client].waits = None;
            self.client_later(client);
        }
    }
}

/// What users may not do is refused.
pub(crate) fn mark_refusal(trace: &mut Trace, error: Option<&Error>) {
    match error {
        Some(Error::Corrupt) => trace.mark("refused while the state is in doubt"),
        Some(Error::PermissionDenied) => trace.mark("permission denied"),
        Some(Error::AuthOldRevision) => trace.mark("users changed while a request was under way"),
        _ => {}
    }
}

/// Whether somebody may read, as the server finds it out: who asks has shown it by the member's users and roles of now.
fn permit_read(reader: &Reader<SimEngine>, name: &str, range: &RangeRequest) -> (Who, Result<(), Error>) {
    if !reader.is_auth_enabled() {
        return (Who::default(), Ok(()));
    }
    let auth = reader.auth();
    let who = Who {
        name: name.to_owned(),
        revision: if name.is_empty() { 0 } else { auth.revision() },
    };
    let permitted = auth.permit_read(who.caller(), range.span());
    (who, permitted)
}

fn put(rng: &mut Rng, key: Bytes, number: i64, lease: Option<i64>) -> PutRequest {
    PutRequest {
        key,
        value: format!("value {number}").into(),
        lease: lease.unwrap_or(0),
        prev_kv: rng.bool(),
        ..Default::default()
    }
}
