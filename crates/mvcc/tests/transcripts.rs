//! Stories of the state machine, to be read: commands and what they answer, in `transcripts/*.txt`.
//!
//! A file is a list of blocks: commands, a line `----`, the expected output, an empty line. Lines that begin with `#`
//! are comments. Every file runs on every engine. With `UPDATE_TRANSCRIPTS=1` the output is rewritten instead of
//! compared: read the difference before it is committed. The commands:
//!
//! ```text
//! put KEY VALUE [lease=N] [prev] [ignore-value] [ignore-lease]      write operations wait for `apply`
//! del KEY [END] [prev]
//! txn [if COMPARE..] [then { OP ; .. }] [else { OP ; .. }]          COMPARE is TARGET(KEY[,END])(=|!=|<|>)VALUE
//! compact REV | grant LEASE TTL | revoke LEASE | checkpoint LEASE TTL
//! alarm (activate|deactivate|get) MEMBER (none|nospace|corrupt)     attributes MEMBER NAME URL | urls MEMBER URL
//! member (add|learner|promote|remove) ID                            an entry of its own
//! as USER[@REV] OPERATION                                           on behalf of a user; REV is the newest auth revision
//! auth (enable|disable|status) | login USER PREFIX
//! user (add|password) NAME HASH [no-password] | user (del|get) NAME | user list | user (grant|revoke) NAME ROLE
//! role (add|del|get) NAME | role list | role grant NAME (read|write|readwrite) KEY [END] | role revoke NAME KEY [END]
//! may USER[@REV] (read|write) KEY [END] | may USER[@REV] (read|write) lease N
//! entry                                                             the next operation begins another log entry
//! apply                                                             applies all that waits as one batch
//! range KEY [END] [rev=N] [limit=N] [count-only] [keys-only] [sort=TARGET:ORDER] [min-mod=N] ..
//! read-txn ..                                                       as txn, answered from a view
//! watch STREAM KEY [END] [id=N] [from=N] [prev] [no-put] [no-delete] [progress]
//! cancel STREAM ID | progress STREAM | notify STREAM
//! poll STREAM [OUTPUTS]                                             all that there is to say, or so many outputs
//! compact-step KEYS | compact-all                                   physical compaction
//! restart | state | stored | leases | users | options buffer=EVENTS
//! ```
//!
//! `\0` in a key is a zero byte; `""` is nothing.

mod support;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use api::Span;
use api::auth::*;
use api::codec::{
    Action, LeaseCheckpoint, LeaseCheckpointRequest, MemberAttributes, MemberAttributesRequest, MemberChange,
    MemberChangeKind, MemberUpdate, Operation, encode_operation,
};
use api::kv::*;
use api::store::{WatchCreate, WatchOutput, WatchStream};
use bytes::Bytes;
use metastore_mvcc::auth::Right;
use metastore_mvcc::keys::{self, RecordRef};
use metastore_mvcc::machine::Command;
use metastore_mvcc::{
    AuthChange, Caller, Committed, CompactionProgress, LeaseChange, Machine, Membership, Options, Outcome, Stream,
};
use prost::Message;
use storage::{Cursor, KeyRange, View};

use support::{Flag, MapEngine, TestEngine, entry_of, next_output};

struct Stage<E: TestEngine> {
    engine: Arc<E>,
    _guard: E::Guard,
    options: Options,
    machine: Option<Machine<E>>,
    streams: BTreeMap<String, Stream<E>>,
    operations: Vec<Operation>,
    entries: Vec<Committed>,
    index: u64,
    /// The commands of the operations that wait.
    said: Vec<String>,
}

fn bytes(word: &str) -> Bytes {
    match word {
        "\"\"" => Bytes::new(),
        word => Bytes::from(word.replace("\\0", "\0").into_bytes()),
    }
}

fn text(bytes: &[u8]) -> String {
    match bytes {
        [] => "\"\"".to_owned(),
        bytes => String::from_utf8_lossy(bytes).replace('\0', "\\0"),
    }
}

fn number(word: &str) -> i64 {
    word.parse().unwrap_or_else(|_| panic!("{word} is no number"))
}

/// The words after a command: those that stand alone, flags, and settings.
struct Words<'a> {
    plain: Vec<&'a str>,
    rest: Vec<&'a str>,
}

impl<'a> Words<'a> {
    /// Plain is what is neither a flag nor a setting of the command.
    fn new(words: &[&'a str], flags: &[&str]) -> Self {
        let is_rest = |word: &&str| {
            let name = word.split_once('=').map_or(*word, |(name, _)| name);
            flags.contains(&name)
        };
        let (rest, plain) = words.iter().copied().partition(is_rest);
        Words { plain, rest }
    }

    fn flag(&self, name: &str) -> bool {
        self.rest.contains(&name)
    }

    fn setting(&self, name: &str) -> Option<&'a str> {
        self.rest
            .iter()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    fn number(&self, name: &str) -> i64 {
        self.setting(name).map_or(0, number)
    }

    fn at(&self, index: usize) -> Bytes {
        self.plain.get(index).map_or(Bytes::new(), |word| bytes(word))
    }
}

fn parse_put(words: &[&str]) -> PutRequest {
    let words = Words::new(words, &["lease", "prev", "ignore-value", "ignore-lease"]);
    PutRequest {
        key: words.at(0),
        value: words.at(1),
        lease: words.number("lease"),
        prev_kv: words.flag("prev"),
        ignore_value: words.flag("ignore-value"),
        ignore_lease: words.flag("ignore-lease"),
    }
}

fn parse_delete(words: &[&str]) -> DeleteRangeRequest {
    let words = Words::new(words, &["prev"]);
    DeleteRangeRequest {
        key: words.at(0),
        range_end: words.at(1),
        prev_kv: words.flag("prev"),
    }
}

fn parse_range(words: &[&str]) -> RangeRequest {
    let flags = [
        "rev",
        "limit",
        "sort",
        "count-only",
        "keys-only",
        "min-mod",
        "max-mod",
        "min-create",
        "max-create",
    ];
    let words = Words::new(words, &flags);
    let (target, order) = words
        .setting("sort")
        .map_or(("key", "none"), |sort| sort.split_once(':').unwrap());
    let target = ["key", "version", "create", "mod", "value"]
        .iter()
        .position(|name| *name == target);
    let order = ["none", "ascend", "descend"].iter().position(|name| *name == order);
    RangeRequest {
        key: words.at(0),
        range_end: words.at(1),
        limit: words.number("limit"),
        revision: words.number("rev"),
        sort_order: order.expect("an order") as i32,
        sort_target: target.expect("a target") as i32,
        serializable: false,
        keys_only: words.flag("keys-only"),
        count_only: words.flag("count-only"),
        min_mod_revision: words.number("min-mod"),
        max_mod_revision: words.number("max-mod"),
        min_create_revision: words.number("min-create"),
        max_create_revision: words.number("max-create"),
    }
}

fn parse_compare(word: &str) -> Compare {
    let (target, rest) = word.split_once('(').expect("TARGET(");
    let (range, rest) = rest.split_once(')').expect(")");
    let (key, end) = range.split_once(',').unwrap_or((range, "\"\""));
    let results = [("!=", 3), ("=", 0), (">", 1), ("<", 2)];
    let (value, result) = results
        .iter()
        .find_map(|(sign, result)| Some((rest.strip_prefix(sign)?, *result)))
        .expect("one of = != < >");
    let (target, union) = match target {
        "version" => (0, TargetUnion::Version(number(value))),
        "create" => (1, TargetUnion::CreateRevision(number(value))),
        "mod" => (2, TargetUnion::ModRevision(number(value))),
        "value" => (3, TargetUnion::Value(bytes(value))),
        "lease" => (4, TargetUnion::Lease(number(value))),
        other => panic!("{other} is no target"),
    };
    Compare {
        result,
        target,
        key: bytes(key),
        target_union: Some(union),
        range_end: bytes(end),
    }
}

/// The words of a transaction, taken one by one.
struct Tokens<'a>(std::collections::VecDeque<&'a str>);

impl<'a> Tokens<'a> {
    fn next_if(&mut self, wanted: impl Fn(&str) -> bool) -> Option<&'a str> {
        self.0.front().copied().filter(|word| wanted(word))?;
        self.0.pop_front()
    }

    fn txn(&mut self) -> TxnRequest {
        let mut txn = TxnRequest::default();
        while let Some(word) = self.next_if(|word| ["if", "then", "else"].contains(&word)) {
            if word == "if" {
                while let Some(word) = self.next_if(|word| word.contains('(')) {
                    txn.compare.push(parse_compare(word));
                }
                continue;
            }
            assert_eq!(self.0.pop_front(), Some("{"), "after {word}");
            let ops = self.ops();
            match word {
                "then" => txn.success = ops,
                _ => txn.failure = ops,
            }
        }
        txn
    }

    fn ops(&mut self) -> Vec<RequestOp> {
        let mut ops = Vec::new();
        loop {
            let name = self.0.pop_front().expect("}");
            let kind = match name {
                "}" => return ops,
                "txn" => RequestOpKind::Txn(self.txn()),
                _ => {
                    let mut rest = Vec::new();
                    while let Some(word) = self.next_if(|word| ![";", "}"].contains(&word)) {
                        rest.push(word);
                    }
                    match name {
                        "put" => RequestOpKind::Put(parse_put(&rest)),
                        "del" => RequestOpKind::DeleteRange(parse_delete(&rest)),
                        "range" => RequestOpKind::Range(parse_range(&rest)),
                        other => panic!("{other} is no operation"),
                    }
                }
            };
            self.next_if(|word| word == ";");
            ops.push(RequestOp { request: Some(kind) });
        }
    }
}

fn parse_action(name: &str, words: &[&str]) -> Option<Action> {
    let at = |index: usize| number(words[index]);
    Some(match name {
        "put" => Action::Put(parse_put(words)),
        "del" => Action::DeleteRange(parse_delete(words)),
        "txn" => Action::Txn(Tokens(words.iter().copied().collect()).txn()),
        "compact" => Action::Compact(CompactionRequest {
            revision: at(0),
            physical: false,
        }),
        "grant" => Action::LeaseGrant(LeaseGrantRequest { id: at(0), ttl: at(1) }),
        "revoke" => Action::LeaseRevoke(LeaseRevokeRequest { id: at(0) }),
        "checkpoint" => Action::LeaseCheckpoint(LeaseCheckpointRequest {
            checkpoints: vec![LeaseCheckpoint {
                id: at(0),
                remaining_ttl: at(1),
            }],
        }),
        "alarm" => Action::Alarm(AlarmRequest {
            action: match words[0] {
                "activate" => AlarmAction::Activate,
                "deactivate" => AlarmAction::Deactivate,
                _ => AlarmAction::Get,
            }
            .into(),
            member_id: at(1) as u64,
            alarm: match words[2] {
                "nospace" => AlarmType::Nospace,
                "corrupt" => AlarmType::Corrupt,
                _ => AlarmType::None,
            }
            .into(),
        }),
        "attributes" => Action::MemberAttributes(MemberAttributesRequest {
            member_id: at(0) as u64,
            attributes: Some(MemberAttributes {
                name: words[1].to_owned(),
                client_urls: vec![words[2].to_owned()],
            }),
        }),
        "urls" => Action::MemberUpdate(MemberUpdate {
            id: at(0) as u64,
            peer_urls: vec![words[1].to_owned()],
        }),
        _ => return None,
    })
}

/// An operation about users and roles.
fn parse_auth(name: &str, words: &[&str]) -> Option<Action> {
    let word = |index: usize| {
        words
            .get(index)
            .map_or(String::new(), |word| (*word).replace("\"\"", ""))
    };
    let (what, name) = match name {
        "login" => {
            return Some(Action::Authenticate(InternalAuthenticateRequest {
                name: word(0),
                password: String::new(),
                simple_token: word(1),
            }));
        }
        "auth" | "user" | "role" => (format!("{name} {}", words[0]), word(1)),
        _ => return None,
    };
    Some(match what.as_str() {
        "auth enable" => Action::AuthEnable(AuthEnableRequest {}),
        "auth disable" => Action::AuthDisable(AuthDisableRequest {}),
        "auth status" => Action::AuthStatus(AuthStatusRequest {}),
        "user add" => Action::AuthUserAdd(AuthUserAddRequest {
            name,
            password: String::new(),
            options: words
                .contains(&"no-password")
                .then_some(UserAddOptions { no_password: true }),
            hashed_password: word(2),
        }),
        "user password" => Action::AuthUserChangePassword(AuthUserChangePasswordRequest {
            name,
            password: String::new(),
            hashed_password: word(2),
        }),
        "user del" => Action::AuthUserDelete(AuthUserDeleteRequest { name }),
        "user get" => Action::AuthUserGet(AuthUserGetRequest { name }),
        "user list" => Action::AuthUserList(AuthUserListRequest {}),
        "user grant" => Action::AuthUserGrantRole(AuthUserGrantRoleRequest {
            user: name,
            role: word(2),
        }),
        "user revoke" => Action::AuthUserRevokeRole(AuthUserRevokeRoleRequest { name, role: word(2) }),
        "role add" => Action::AuthRoleAdd(AuthRoleAddRequest { name }),
        "role del" => Action::AuthRoleDelete(AuthRoleDeleteRequest { role: name }),
        "role get" => Action::AuthRoleGet(AuthRoleGetRequest { role: name }),
        "role list" => Action::AuthRoleList(AuthRoleListRequest {}),
        "role grant" => Action::AuthRoleGrantPermission(AuthRoleGrantPermissionRequest {
            name,
            perm: words.get(2).map(|kind| Permission {
                perm_type: ["read", "write", "readwrite"]
                    .iter()
                    .position(|known| known == kind)
                    .expect("a kind of permission") as i32,
                key: bytes(words[3]),
                range_end: words.get(4).map_or(Bytes::new(), |end| bytes(end)),
            }),
        }),
        "role revoke" => Action::AuthRoleRevokePermission(AuthRoleRevokePermissionRequest {
            role: name,
            key: bytes(words[2]),
            range_end: words.get(3).map_or(Bytes::new(), |end| bytes(end)),
        }),
        other => panic!("{other} is no command"),
    })
}

fn show_permission(permission: &Permission) -> String {
    let kind = ["read", "write", "readwrite"][permission.perm_type as usize];
    let end = match &permission.range_end[..] {
        [] => String::new(),
        end => format!(" to {}", text(end)),
    };
    format!("  {kind} {}{end}", text(&permission.key))
}

fn show_answer(mut answer: Answer) -> Vec<String> {
    let mut lines = vec![format!("rev {}", rev_of(answer.header_mut()))];
    match answer {
        Answer::AuthStatus(status) => {
            let on = if status.enabled { "on" } else { "off" };
            lines[0] = format!("{on}, auth rev {}", status.auth_revision);
        }
        Answer::AuthUserGet(user) => lines[0] = format!("roles {:?}", user.roles),
        Answer::AuthUserList(list) => lines[0] = format!("users {:?}", list.users),
        Answer::AuthRoleList(list) => lines[0] = format!("roles {:?}", list.roles),
        Answer::AuthRoleGet(role) => lines.extend(role.perm.iter().map(show_permission)),
        _ => {}
    }
    lines
}

/// An entry that changes the members.
fn member_change(index: u64, words: &[&str]) -> Committed {
    let id: u64 = words[1].parse().expect("a member");
    let kind = match words[0] {
        "promote" => MemberChangeKind::Promote,
        "remove" => MemberChangeKind::Remove,
        _ => MemberChangeKind::Add,
    };
    let change = MemberChange {
        kind: kind.into(),
        member: Some(Member {
            id,
            peer_urls: vec![format!("http://{id}")],
            is_learner: words[0] == "learner",
            ..Default::default()
        }),
    };
    Committed {
        index,
        term: 1,
        command: Command::MemberChange(encode_operation(&Operation::new(0, Action::MemberChange(change)))),
    }
}

fn show_members(membership: &Membership) -> Vec<String> {
    let mut lines = vec![format!("removed {:?}", membership.removed)];
    for member in &membership.members {
        let Member {
            id,
            name,
            peer_urls,
            client_urls,
            is_learner,
        } = member;
        let learner = if *is_learner { ", learner" } else { "" };
        lines.push(format!("  {id} {name:?} at {peer_urls:?} for {client_urls:?}{learner}"));
    }
    lines
}

fn show_alarms(alarms: &[AlarmMember]) -> Vec<String> {
    let shown: Vec<_> = alarms
        .iter()
        .map(|alarm| format!("{:?} of {}", alarm.alarm(), alarm.member_id))
        .collect();
    vec![format!("alarms [{}]", shown.join(", "))]
}

/// A key with its value, and in brackets the numbers that say where it comes from.
fn show(kv: &KeyValue) -> String {
    let mut out = format!("{} = {}", text(&kv.key), text(&kv.value));
    write!(
        out,
        " (created {}, modified {}, version {}",
        kv.create_revision, kv.mod_revision, kv.version
    )
    .unwrap();
    if kv.lease != 0 {
        write!(out, ", lease {}", kv.lease).unwrap();
    }
    out + ")"
}

fn show_range(range: &RangeResponse) -> Vec<String> {
    let more = if range.more { ", more" } else { "" };
    let mut lines = vec![format!("rev {}, count {}{more}", rev_of(&range.header), range.count)];
    lines.extend(range.kvs.iter().map(|kv| format!("  {}", show(kv))));
    lines
}

fn rev_of(header: &Option<ResponseHeader>) -> i64 {
    header.as_ref().expect("every response has a header").revision
}

fn show_put(put: &PutResponse) -> Vec<String> {
    let before = put.prev_kv.as_ref().map(|kv| format!("  before: {}", show(kv)));
    std::iter::once(format!("rev {}", rev_of(&put.header)))
        .chain(before)
        .collect()
}

fn show_delete(delete: &DeleteRangeResponse) -> Vec<String> {
    let before = delete.prev_kvs.iter().map(|kv| format!("  before: {}", show(kv)));
    std::iter::once(format!("rev {}, deleted {}", rev_of(&delete.header), delete.deleted))
        .chain(before)
        .collect()
}

fn show_txn(txn: &TxnResponse) -> Vec<String> {
    let mut lines = vec![format!(
        "rev {}, {}",
        rev_of(&txn.header),
        if txn.succeeded { "then" } else { "else" }
    )];
    for response in &txn.responses {
        let (name, of_it) = match response.response.as_ref().expect("every operation has a response") {
            ResponseOpKind::Range(range) => ("range", show_range(range)),
            ResponseOpKind::Put(put) => ("put", show_put(put)),
            ResponseOpKind::DeleteRange(delete) => ("del", show_delete(delete)),
            ResponseOpKind::Txn(txn) => ("txn", show_txn(txn)),
        };
        lines.push(format!("  {name}: {}", of_it[0]));
        lines.extend(of_it[1..].iter().map(|line| format!("  {line}")));
    }
    lines
}

fn show_event(event: &Event) -> String {
    let kv = event.kv.as_ref().expect("every event has its key");
    let mut out = match EventType::try_from(event.r#type) {
        Ok(EventType::Put) => format!("put {}", show(kv)),
        _ => format!("delete {} (modified {})", text(&kv.key), kv.mod_revision),
    };
    if let Some(before) = &event.prev_kv {
        write!(out, ", before: {}", show(before)).unwrap();
    }
    out
}

impl<E: TestEngine> Stage<E> {
    fn new() -> Self {
        let (engine, guard) = E::fresh();
        Stage {
            engine,
            _guard: guard,
            options: Options::default(),
            machine: None,
            streams: BTreeMap::new(),
            operations: Vec::new(),
            entries: Vec::new(),
            index: 0,
            said: Vec::new(),
        }
    }

    fn machine(&mut self) -> &mut Machine<E> {
        let (engine, options) = (&self.engine, &self.options);
        self.machine
            .get_or_insert_with(|| Machine::open(engine.clone(), options).expect("it opens"))
    }

    fn stream(&mut self, name: &str) -> &mut Stream<E> {
        if !self.streams.contains_key(name) {
            let stream = self.machine().hub().stream();
            self.streams.insert(name.to_owned(), stream);
        }
        self.streams.get_mut(name).expect("it is there")
    }

    fn end_entry(&mut self) {
        if !self.operations.is_empty() {
            self.index += 1;
            self.entries
                .push(entry_of(self.index, 1, &std::mem::take(&mut self.operations)));
        }
    }

    fn apply(&mut self) -> Vec<String> {
        self.end_entry();
        let entries = std::mem::take(&mut self.entries);
        let applied = self.machine().apply(&entries).expect("the engine works");
        let said = std::mem::take(&mut self.said);
        assert_eq!(said.len(), applied.replies.len());
        let mut lines = Vec::new();
        for (said, reply) in said.iter().zip(applied.replies) {
            let of_it = match reply.result {
                Err(error) => vec![format!("error: {error}")],
                Ok(Outcome::Put(put)) => show_put(&put),
                Ok(Outcome::DeleteRange(delete)) => show_delete(&delete),
                Ok(Outcome::Txn(txn)) => show_txn(&txn),
                Ok(Outcome::Compact(compact)) => vec![format!("rev {}", rev_of(&compact.header))],
                Ok(Outcome::LeaseGrant(grant)) => vec![format!("lease {} for {} s", grant.id, grant.ttl)],
                Ok(Outcome::LeaseRevoke(revoke)) => vec![format!("rev {}", rev_of(&revoke.header))],
                Ok(Outcome::LeaseCheckpoint | Outcome::Downgrade) => vec!["done".to_owned()],
                Ok(Outcome::Alarm(alarm)) => show_alarms(&alarm.alarms),
                Ok(Outcome::Members(membership)) => show_members(&membership),
                Ok(Outcome::Authenticate(response)) => vec![format!("token {}", response.token)],
                Ok(Outcome::Auth(answer)) => show_answer(answer),
            };
            lines.push(format!("{said}: {}", of_it[0]));
            lines.extend_from_slice(&of_it[1..]);
        }
        lines.extend(applied.auth_changes.iter().map(|change| match change {
            AuthChange::Enabled => "auth is on".to_owned(),
            AuthChange::Disabled => "auth is off, and no token counts".to_owned(),
            AuthChange::TokenGiven { user, token, index } => format!("{user} has {token}, of entry {index}"),
            AuthChange::TokensTaken { user } => format!("no token of {user} counts"),
        }));
        if lines.is_empty() {
            vec!["nothing to apply".to_owned()]
        } else {
            lines
        }
    }

    fn poll(&mut self, name: &str, outputs_max: usize) -> Vec<String> {
        let flag = Arc::new(Flag::default());
        let stream = self.stream(name);
        let mut lines = Vec::new();
        for _ in 0..outputs_max {
            match next_output(stream, &flag) {
                None => {
                    lines.push(format!("{name} waits"));
                    break;
                }
                Some(WatchOutput::Events {
                    watch_id,
                    revision,
                    events,
                }) => {
                    lines.push(format!("watcher {watch_id}, rev {revision}"));
                    lines.extend(events.iter().map(|event| format!("  {}", show_event(event))));
                }
                Some(WatchOutput::Progress { watch_id, revision }) => {
                    lines.push(format!("watcher {watch_id}, progress, rev {revision}"));
                }
                Some(WatchOutput::Compacted {
                    watch_id,
                    compact_revision,
                }) => lines.push(format!("watcher {watch_id}, canceled, compacted {compact_revision}")),
            }
        }
        lines
    }

    /// What lies in the engine, but for values.
    fn stored(&self) -> Vec<String> {
        let view = self.engine.view();
        let mut lines = Vec::new();
        let record = |data: &[u8]| {
            let record = RecordRef::decode(data).expect("a record");
            let kind = if record.tombstone { "deleted" } else { "value" };
            let prev = record
                .prev
                .map_or(String::new(), |prev| format!(", before: {}.{}", prev.main, prev.sub));
            format!("{kind} at {}.{}{prev}", record.at.main, record.at.sub)
        };
        for family in [keys::CUR, keys::REV, keys::LEASE] {
            let mut cursor = view
                .cursor(family, KeyRange { start: &[], end: None })
                .expect("a cursor");
            cursor.seek_first().expect("it reads");
            while let Some((key, data)) = cursor.entry() {
                let line = if family == keys::CUR {
                    format!("cur {}: {}", text(key), record(data))
                } else if family == keys::REV {
                    let at = keys::position_of(key).expect("a position");
                    let at = format!("{}.{}", at.main, at.sub);
                    match key[0] {
                        b't' => format!("tombstone {at}: {}", text(data)),
                        kind => {
                            let (key, _) = keys::decode_change(data).expect("a change");
                            // The record is what is left of the data.
                            let record = record(&data[1 + key.len()..]);
                            let kind = if kind == b'l' { "log" } else { "kept for" };
                            format!("{kind} {at}: {} {record}", text(key))
                        }
                    }
                } else {
                    let lease = keys::lease_id_of(key).expect("a lease");
                    match key[0] {
                        b'l' => format!("lease {lease}"),
                        _ => format!("lease {lease} holds {}", text(&key[9..])),
                    }
                };
                lines.push(line);
                cursor.next().expect("it reads");
            }
        }
        lines
    }

    /// A user, and the auth revision at which it showed who it is.
    fn who(&mut self, word: &str) -> (String, u64) {
        let word = word.replace("\"\"", "");
        match word.split_once('@') {
            Some((user, revision)) => (user.to_owned(), number(revision) as u64),
            None => (word, self.machine().auth().revision()),
        }
    }

    /// What lies in the engine of users and roles.
    fn users(&self) -> Vec<String> {
        let view = self.engine.view();
        let range = KeyRange { start: &[], end: None };
        let mut cursor = view.cursor(keys::AUTH, range).expect("a cursor");
        cursor.seek_first().expect("it reads");
        let mut lines = Vec::new();
        while let Some((key, data)) = cursor.entry() {
            lines.push(match key {
                keys::AUTH_ENABLED => format!("enabled {}", keys::decode_auth_enabled(Some(data))),
                keys::AUTH_REVISION => {
                    format!("auth rev {}", keys::decode_auth_revision(Some(data)).expect("a number"))
                }
                _ if key[0] == b'u' => {
                    let user = keys::User::decode(data).expect("a user");
                    let (name, hash) = (text(&user.name), text(&user.password));
                    let no_password = if user.has_no_password() { ", no password" } else { "" };
                    format!("user {name}: {hash}, roles {:?}{no_password}", user.roles)
                }
                _ => {
                    let role = keys::Role::decode(data).expect("a role");
                    let permissions: Vec<_> = role.key_permission.iter().map(show_permission).collect();
                    format!("role {}:{}", text(&role.name), permissions.join(","))
                }
            });
            cursor.next().expect("it reads");
        }
        lines
    }

    fn command(&mut self, line: &str) -> Vec<String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (mut name, mut words) = (words[0], &words[1..]);
        let mut who = None;
        if name == "as" {
            who = Some(self.who(words[0]));
            (name, words) = (words[1], &words[2..]);
        }
        if let Some(action) = parse_action(name, words).or_else(|| parse_auth(name, words)) {
            let valid = match &action {
                Action::Put(put) => put.validate(),
                Action::DeleteRange(delete) => delete.validate(),
                Action::Txn(txn) => txn.validate(128),
                _ => Ok(()),
            };
            if let Err(error) = valid {
                return vec![format!("{line}: refused: {error}")];
            }
            self.operations.push(match who {
                Some((user, revision)) => Operation::of_user(1, user, revision, action),
                None => Operation::new(1, action),
            });
            self.said.push(line.to_owned());
            return Vec::new();
        }
        let answer = |result: Result<Vec<String>, metastore_mvcc::Failure>| {
            let mut lines = result.unwrap_or_else(|error| vec![format!("error: {error}")]);
            lines[0] = format!("{line}: {}", lines[0]);
            lines
        };
        match name {
            "options" => {
                assert!(self.machine.is_none(), "options come first");
                let words = Words::new(words, &["buffer"]);
                self.options.watch_buffer_events_max = words.number("buffer") as usize;
                Vec::new()
            }
            "entry" => {
                self.end_entry();
                Vec::new()
            }
            "member" => {
                self.end_entry();
                self.index += 1;
                self.entries.push(member_change(self.index, words));
                self.said.push(line.to_owned());
                Vec::new()
            }
            "apply" => self.apply(),
            "range" => answer(
                self.machine()
                    .reader()
                    .range(&parse_range(words))
                    .map(|range| show_range(&range)),
            ),
            "read-txn" => {
                let txn = Tokens(words.iter().copied().collect()).txn();
                answer(self.machine().reader().txn(&txn, &mut 0).map(|txn| show_txn(&txn)))
            }
            "watch" => {
                let parsed = Words::new(&words[1..], &["id", "from", "prev", "no-put", "no-delete", "progress"]);
                let create = WatchCreate {
                    id: parsed.setting("id").map(number),
                    key: parsed.at(0),
                    range_end: parsed.at(1),
                    start_revision: parsed.number("from"),
                    no_put: parsed.flag("no-put"),
                    no_delete: parsed.flag("no-delete"),
                    prev_kv: parsed.flag("prev"),
                    progress_notify: parsed.flag("progress"),
                };
                vec![match self.stream(words[0]).create(create) {
                    Ok(created) => format!("{line}: watcher {}, rev {}", created.watch_id, created.revision),
                    Err(error) => format!("{line}: error: {error}"),
                }]
            }
            "cancel" => {
                let there = self.stream(words[0]).cancel(number(words[1]));
                vec![format!("{line}: {}", if there { "canceled" } else { "there is none" })]
            }
            "progress" => {
                self.stream(words[0]).request_progress();
                Vec::new()
            }
            "notify" => {
                self.stream(words[0]).notify_progress();
                Vec::new()
            }
            "poll" => self.poll(words[0], words.get(1).map_or(usize::MAX, |word| number(word) as usize)),
            "compact-step" => {
                let progress = self
                    .machine()
                    .compact_step(number(words[0]) as usize)
                    .expect("the engine works");
                vec![format!("{line}: {progress:?}")]
            }
            "compact-all" => {
                while let CompactionProgress::Going { .. } = self.machine().compact_step(1).expect("the engine works") {
                }
                Vec::new()
            }
            "restart" => {
                self.streams.clear();
                self.machine = None;
                vec![format!("{line}: applied {}", self.machine().applied().0)]
            }
            "state" => {
                let reader = self.machine().reader();
                let (rev, compacted, done) = (reader.revision(), reader.compacted(), reader.compacted_physically());
                let (keys, bytes) = (reader.keys(), reader.key_bytes());
                vec![format!(
                    "rev {rev}, compacted {compacted} (in storage {done}), {keys} keys of {bytes} bytes"
                )]
            }
            "stored" => self.stored(),
            "users" => self.users(),
            "may" => {
                let (user, revision) = self.who(words[0]);
                let reader = self.machine().reader();
                let (auth, caller) = (reader.auth(), Caller { name: &user, revision });
                let right = if words[1] == "write" { Right::Write } else { Right::Read };
                let permitted = if words[2] == "lease" {
                    reader.permit_attached(&auth, caller, right, number(words[3]))
                } else {
                    let (key, end) = (bytes(words[2]), words.get(3).map_or(Bytes::new(), |end| bytes(end)));
                    let span = Span::new(&key, &end);
                    let permitted = match right {
                        Right::Read => auth.permit_read(caller, span),
                        Right::Write => auth.permit_write(caller, span),
                    };
                    permitted.map_err(Into::into)
                };
                answer(permitted.map(|()| vec!["yes".to_owned()]))
            }
            "leases" => {
                let mut leases: Vec<LeaseChange> = self.machine().leases().collect();
                leases.sort_by_key(|lease| format!("{lease:?}"));
                let reader = self.machine().reader();
                let show = |lease: &LeaseChange| {
                    let LeaseChange::Granted { id, ttl, remaining_ttl } = *lease else {
                        panic!("{lease:?}")
                    };
                    let keys = reader.attached_keys(id).expect("it reads");
                    let keys: Vec<String> = keys.iter().map(|key| text(key)).collect();
                    format!("lease {id}: {ttl} s, left at its checkpoint {remaining_ttl} s, keys {keys:?}")
                };
                leases.iter().map(show).collect()
            }
            other => panic!("{other} is no command"),
        }
    }
}

/// Runs a file; what it should say to be right.
fn run<E: TestEngine>(file: &str) -> String {
    let mut stage = Stage::<E>::new();
    let mut out = String::new();
    let mut said: Vec<String> = Vec::new();
    let mut in_output = false;
    for line in file.lines().chain([""]) {
        if in_output {
            in_output = !line.is_empty();
            continue;
        }
        if line == "----" {
            out.push_str("----\n");
            for line in said.drain(..) {
                writeln!(out, "{line}").expect("a String grows");
            }
            out.push('\n');
            in_output = true;
            continue;
        }
        writeln!(out, "{line}").expect("a String grows");
        if !line.is_empty() && !line.starts_with('#') {
            said.extend(stage.command(line));
        }
    }
    assert!(said.is_empty(), "the file ends with commands that have no output");
    out.truncate(out.trim_end().len());
    out + "\n"
}

fn run_all<E: TestEngine>(update: bool) {
    // From the package's folder, in which cargo runs tests.
    let dir = Path::new("tests/transcripts");
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty());
    for path in files {
        let expected = std::fs::read_to_string(&path).unwrap();
        let got = run::<E>(&expected);
        if update {
            std::fs::write(&path, got).unwrap();
        } else if let Some((at, (got, expected))) = got
            .lines()
            .chain([""])
            .zip(expected.lines().chain([""]))
            .enumerate()
            .find(|(_, (got, expected))| got != expected)
        {
            panic!(
                "{}:{}:\n  expected: {expected}\n  got:      {got}",
                path.display(),
                at + 1
            );
        }
    }
}

#[test]
fn on_plain_maps() {
    run_all::<MapEngine>(std::env::var_os("UPDATE_TRANSCRIPTS").is_some());
}

#[test]
fn in_memory() {
    run_all::<storage::MemoryEngine>(false);
}

#[test]
fn on_rocksdb() {
    run_all::<storage::RocksEngine>(false);
}
