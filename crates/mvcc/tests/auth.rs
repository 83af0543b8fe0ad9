//! Users, roles and permissions at random, against a model that knows nothing of intervals.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use api::auth::*;
use api::codec::{Action, Operation};
use api::kv::*;
use api::{Error, Span};
use bytes::Bytes;
use metastore_mvcc::auth::Keys;
use metastore_mvcc::keys::{self, RecordRef};
use metastore_mvcc::{Caller, Machine, Options, Outcome};
use proptest::prelude::*;
use storage::{Cursor, Engine, KeyRange, View};

use support::{MapEngine, TestEngine, entry_of};

/// Few, so that ranges touch, overlap and meet each other's ends.
const NAMES: [&str; 6] = ["a", "ab", "b", "ba", "c", "\0"];
const ENDS: [&str; 8] = ["", "\0", "a", "ab", "b", "ba", "c", "d"];

/// All places where a range of the above can begin or end: between two of them nothing changes.
fn points() -> BTreeSet<Vec<u8>> {
    let all = NAMES.iter().chain(&ENDS).filter(|name| !name.is_empty());
    all.flat_map(|name| [name.as_bytes().to_vec(), [name.as_bytes(), &[0]].concat()])
        .collect()
}

/// Whether ranges cover another one: point by point.
fn naive_cover(ranges: &[Span<'_>], wanted: Span<'_>) -> bool {
    let covered = |point: &[u8]| ranges.iter().any(|range| range.contains(point));
    let start = wanted.start().max(&[0]);
    covered(start)
        && points()
            .iter()
            .filter(|point| wanted.contains(point))
            .all(|point| covered(point))
}

fn range() -> impl Strategy<Value = (&'static str, &'static str)> {
    (prop::sample::select(&NAMES[..]), prop::sample::select(&ENDS[..]))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_union_of_ranges_covers_what_it_should(
        ranges in prop::collection::vec(range(), 0..6),
        wanted in range(),
    ) {
        let spans: Vec<_> = ranges.iter().map(|(key, end)| Span::new(key.as_bytes(), end.as_bytes())).collect();
        let wanted = Span::new(wanted.0.as_bytes(), wanted.1.as_bytes());
        let union = Keys::union(spans.iter().copied());
        prop_assert_eq!(union.cover(wanted), naive_cover(&spans, wanted));
    }
}

/// What is known of a user.
#[derive(Clone, Default, PartialEq, Debug)]
struct ModelUser {
    roles: BTreeSet<String>,
    hash: Vec<u8>,
    no_password: bool,
}

/// Permissions of a role, by range.
type ModelRole = BTreeMap<(&'static str, &'static str), i32>;

#[derive(Default)]
struct Model {
    enabled: bool,
    revision: u64,
    users: BTreeMap<String, ModelUser>,
    roles: BTreeMap<String, ModelRole>,
}

/// Something to do.
#[derive(Debug, Clone)]
enum Step {
    Enable,
    Disable,
    UserAdd(&'static str, bool),
    UserDelete(&'static str),
    Password(&'static str),
    GrantRole(&'static str, &'static str),
    RevokeRole(&'static str, &'static str),
    RoleAdd(&'static str),
    RoleDelete(&'static str),
    Grant(&'static str, i32, (&'static str, &'static str)),
    Revoke(&'static str, (&'static str, &'static str)),
    UserGet(&'static str),
    UserList,
    RoleGet(&'static str),
    RoleList,
    Put(&'static str, bool),
    Delete((&'static str, &'static str), bool),
    Nested((&'static str, &'static str), &'static str),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let user = || prop::sample::select(&["root", "ann", "bob", ""][..]);
    let role = || prop::sample::select(&["root", "r", "s", ""][..]);
    let key = || prop::sample::select(&NAMES[..]);
    prop_oneof![
        3 => Just(Step::Enable),
        1 => Just(Step::Disable),
        3 => (user(), any::<bool>()).prop_map(|(user, no_password)| Step::UserAdd(user, no_password)),
        1 => user().prop_map(Step::UserDelete),
        1 => user().prop_map(Step::Password),
        6 => (user(), role()).prop_map(|(user, role)| Step::GrantRole(user, role)),
        1 => (user(), role()).prop_map(|(user, role)| Step::RevokeRole(user, role)),
        3 => role().prop_map(Step::RoleAdd),
        1 => role().prop_map(Step::RoleDelete),
        8 => (role(), 0..4, range()).prop_map(|(role, kind, range)| Step::Grant(role, kind, range)),
        2 => (role(), range()).prop_map(|(role, range)| Step::Revoke(role, range)),
        1 => user().prop_map(Step::UserGet),
        1 => Just(Step::UserList),
        1 => role().prop_map(Step::RoleGet),
        1 => Just(Step::RoleList),
        6 => (key(), any::<bool>()).prop_map(|(key, prev)| Step::Put(key, prev)),
        4 => (range(), any::<bool>()).prop_map(|(range, prev)| Step::Delete(range, prev)),
        4 => (range(), key()).prop_map(|(range, key)| Step::Nested(range, key)),
        1 => Just(Step::Restart),
    ]
}

/// Who asks: mostly those who may, at mostly the newest revision.
fn who() -> impl Strategy<Value = (&'static str, u64)> {
    let name = prop_oneof![4 => Just("root"), 4 => Just("ann"), 2 => Just("bob"), 1 => Just("")];
    (name, prop_oneof![8 => Just(0), 1 => Just(1), 1 => Just(u64::MAX)])
}

impl Model {
    fn admin(&self, name: &str) -> Result<(), Error> {
        match self.users.get(name) {
            _ if !self.enabled => Ok(()),
            _ if name.is_empty() => Err(Error::UserEmpty),
            None => Err(Error::UserNotFound),
            Some(user) if user.roles.contains("root") => Ok(()),
            Some(_) => Err(Error::PermissionDenied),
        }
    }

    /// Whether someone may read (0) or write (1) a range.
    fn may(&self, (name, revision): (&str, u64), kind: i32, range: (&str, &str)) -> Result<(), Error> {
        if !self.enabled {
            return Ok(());
        }
        if revision == 0 {
            return Err(Error::UserEmpty);
        }
        if revision < self.revision {
            return Err(Error::AuthOldRevision);
        }
        let user = self.users.get(name).ok_or(Error::PermissionDenied)?;
        let roles = user.roles.iter().filter_map(|role| self.roles.get(role));
        let permissions = roles
            .flatten()
            .filter(|(_, of_kind)| **of_kind == kind || **of_kind == 2);
        let spans: Vec<_> = permissions
            .map(|((key, end), _)| Span::new(key.as_bytes(), end.as_bytes()))
            .collect();
        if user.roles.contains("root") || naive_cover(&spans, Span::new(range.0.as_bytes(), range.1.as_bytes())) {
            Ok(())
        } else {
            Err(Error::PermissionDenied)
        }
    }

    fn apply(&mut self, who: (&str, u64), step: &Step) -> Result<(), Error> {
        let changes = !matches!(
            step,
            Step::UserGet(_) | Step::RoleGet(_) | Step::Put(..) | Step::Delete(..) | Step::Nested(..) | Step::Restart
        );
        if changes {
            self.admin(who.0)?;
        }
        let changed = match *step {
            Step::Enable => {
                if !self.enabled {
                    let root = self.users.get("root").ok_or(Error::RootUserNotExist)?;
                    if !root.roles.contains("root") {
                        return Err(Error::RootRoleNotExist);
                    }
                    self.enabled = true;
                }
                false
            }
            Step::Disable => std::mem::take(&mut self.enabled),
            Step::UserAdd(name, no_password) => {
                if name.is_empty() {
                    return Err(Error::UserEmpty);
                }
                if self.users.contains_key(name) {
                    return Err(Error::UserExists);
                }
                let hash = if no_password { Vec::new() } else { b"hash".to_vec() };
                let user = ModelUser {
                    hash,
                    no_password,
                    ..Default::default()
                };
                self.users.insert(name.to_owned(), user);
                true
            }
            Step::UserDelete(name) => {
                if self.enabled && name == "root" {
                    return Err(Error::InvalidAuthManagement);
                }
                self.users.remove(name).ok_or(Error::UserNotFound)?;
                true
            }
            Step::Password(name) => {
                let user = self.users.get_mut(name).ok_or(Error::UserNotFound)?;
                if !user.no_password {
                    user.hash = b"other".to_vec();
                }
                true
            }
            Step::GrantRole(name, role) => {
                let known = role == "root" || self.roles.contains_key(role);
                let user = self.users.get_mut(name).ok_or(Error::UserNotFound)?;
                if !known {
                    return Err(Error::RoleNotFound);
                }
                user.roles.insert(role.to_owned())
            }
            Step::RevokeRole(name, role) => {
                if self.enabled && (name, role) == ("root", "root") {
                    return Err(Error::InvalidAuthManagement);
                }
                let user = self.users.get_mut(name).ok_or(Error::UserNotFound)?;
                if !user.roles.remove(role) {
                    return Err(Error::RoleNotGranted);
                }
                true
            }
            Step::RoleAdd(role) => {
                if role.is_empty() {
                    return Err(Error::RoleEmpty);
                }
                if self.roles.contains_key(role) {
                    return Err(Error::RoleExists);
                }
                self.roles.insert(role.to_owned(), ModelRole::new());
                true
            }
            Step::RoleDelete(role) => {
                if self.enabled && role == "root" {
                    return Err(Error::InvalidAuthManagement);
                }
                self.roles.remove(role).ok_or(Error::RoleNotFound)?;
                for user in self.users.values_mut() {
                    user.roles.remove(role);
                }
                true
            }
            Step::Grant(role, kind, (key, end)) => {
                if !(end.is_empty() || end == "\0" || key < end) {
                    return Err(Error::InvalidAuthManagement);
                }
                let role = self.roles.get_mut(role).ok_or(Error::RoleNotFound)?;
                role.insert((key, end), kind);
                true
            }
            Step::Revoke(role, range) => {
                let role = self.roles.get_mut(role).ok_or(Error::RoleNotFound)?;
                role.remove(&range).ok_or(Error::PermissionNotGranted)?;
                true
            }
            Step::UserGet(name) => {
                if name != who.0 {
                    self.admin(who.0)?;
                }
                self.users.get(name).ok_or(Error::UserNotFound)?;
                false
            }
            Step::RoleGet(role) => {
                if !self.users.get(who.0).is_some_and(|user| user.roles.contains(role)) {
                    self.admin(who.0)?;
                }
                self.roles.get(role).ok_or(Error::RoleNotFound)?;
                false
            }
            Step::UserList | Step::RoleList | Step::Restart => false,
            Step::Put(key, prev) => {
                self.may(who, 1, (key, ""))?;
                if prev {
                    self.may(who, 0, (key, ""))?;
                }
                false
            }
            Step::Delete(range, prev) => {
                self.may(who, 1, range)?;
                if prev {
                    self.may(who, 0, range)?;
                }
                false
            }
            Step::Nested(range, key) => {
                self.may(who, 0, ("a", ""))?;
                self.may(who, 0, range)?;
                self.may(who, 1, (key, ""))?;
                false
            }
        };
        self.revision += u64::from(changed);
        Ok(())
    }
}

fn action(step: &Step) -> Action {
    let permission = |kind, (key, end): (&'static str, &'static str)| Permission {
        perm_type: kind,
        key: key.into(),
        range_end: end.into(),
    };
    let op = |kind| RequestOp { request: Some(kind) };
    match *step {
        Step::Enable => Action::AuthEnable(AuthEnableRequest {}),
        Step::Disable => Action::AuthDisable(AuthDisableRequest {}),
        Step::UserAdd(name, no_password) => Action::AuthUserAdd(AuthUserAddRequest {
            name: name.to_owned(),
            hashed_password: "aGFzaA==".to_owned(),
            options: Some(UserAddOptions { no_password }),
            ..Default::default()
        }),
        Step::UserDelete(name) => Action::AuthUserDelete(AuthUserDeleteRequest { name: name.to_owned() }),
        Step::Password(name) => Action::AuthUserChangePassword(AuthUserChangePasswordRequest {
            name: name.to_owned(),
            hashed_password: "b3RoZXI=".to_owned(),
            ..Default::default()
        }),
        Step::GrantRole(user, role) => Action::AuthUserGrantRole(AuthUserGrantRoleRequest {
            user: user.to_owned(),
            role: role.to_owned(),
        }),
        Step::RevokeRole(name, role) => Action::AuthUserRevokeRole(AuthUserRevokeRoleRequest {
            name: name.to_owned(),
            role: role.to_owned(),
        }),
        Step::RoleAdd(role) => Action::AuthRoleAdd(AuthRoleAddRequest { name: role.to_owned() }),
        Step::RoleDelete(role) => Action::AuthRoleDelete(AuthRoleDeleteRequest { role: role.to_owned() }),
        Step::Grant(role, kind, range) => Action::AuthRoleGrantPermission(AuthRoleGrantPermissionRequest {
            name: role.to_owned(),
            perm: Some(permission(kind, range)),
        }),
        Step::Revoke(role, (key, end)) => Action::AuthRoleRevokePermission(AuthRoleRevokePermissionRequest {
            role: role.to_owned(),
            key: key.into(),
            range_end: end.into(),
        }),
        Step::UserGet(name) => Action::AuthUserGet(AuthUserGetRequest { name: name.to_owned() }),
        Step::UserList => Action::AuthUserList(AuthUserListRequest {}),
        Step::RoleGet(role) => Action::AuthRoleGet(AuthRoleGetRequest { role: role.to_owned() }),
        Step::RoleList | Step::Restart => Action::AuthRoleList(AuthRoleListRequest {}),
        Step::Put(key, prev_kv) => Action::Put(PutRequest {
            key: key.into(),
            prev_kv,
            ..Default::default()
        }),
        Step::Delete((key, end), prev_kv) => Action::DeleteRange(DeleteRangeRequest {
            key: key.into(),
            range_end: end.into(),
            prev_kv,
        }),
        Step::Nested((key, end), put) => {
            let inner = TxnRequest {
                failure: vec![
                    op(RequestOpKind::Range(RangeRequest {
                        key: key.into(),
                        range_end: end.into(),
                        ..Default::default()
                    })),
                    op(RequestOpKind::Put(PutRequest {
                        key: put.into(),
                        ..Default::default()
                    })),
                ],
                ..Default::default()
            };
            Action::Txn(TxnRequest {
                compare: vec![Compare {
                    key: "a".into(),
                    ..Default::default()
                }],
                failure: vec![op(RequestOpKind::Txn(TxnRequest {
                    success: vec![op(RequestOpKind::Txn(inner))],
                    ..Default::default()
                }))],
                ..Default::default()
            })
        }
    }
}

/// The sum of the digests of all that lies in the engine.
fn stored_digest(engine: &impl Engine) -> u64 {
    let view = engine.view();
    let mut sum = 0_u64;
    for family in [keys::CUR, keys::AUTH] {
        let mut cursor = view.cursor(family, KeyRange { start: &[], end: None }).unwrap();
        cursor.seek_first().unwrap();
        while let Some((key, data)) = cursor.entry() {
            sum = sum.wrapping_add(match family {
                keys::AUTH => keys::auth_digest(key, data),
                _ => RecordRef::decode(data).unwrap().digest,
            });
            cursor.next().unwrap();
        }
    }
    sum
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn the_machine_does_what_the_model_does(steps in prop::collection::vec((who(), step()), 1..80), batch in 1..6_usize) {
        let (engine, _guard) = MapEngine::fresh();
        let mut machine = Machine::open(engine.clone(), &Options::default()).unwrap();
        let mut model = Model { revision: 1, ..Default::default() };
        let mut index = 0;
        for steps in steps.chunks(batch) {
            let mut operations = Vec::new();
            let mut expected = Vec::new();
            for ((name, older), step) in steps {
                // The first two are the newest revision and the one before; the last is none.
                let revision = match older {
                    &u64::MAX => 0,
                    older => model.revision - older.min(&model.revision),
                };
                operations.push(Operation::of_user(1, (*name).to_owned(), revision, action(step)));
                expected.push(match step {
                    Step::Restart => model.admin(name),
                    step => model.apply((name, revision), step),
                });
            }
            index += 1;
            let applied = machine.apply(&[entry_of(index, 1, &operations)]).unwrap();
            for ((reply, expected), (who, step)) in applied.replies.iter().zip(&expected).zip(steps) {
                let refusal = reply.result.as_ref().err();
                prop_assert_eq!(refusal, expected.as_ref().err(), "{:?} by {:?}", step, who);
                // Lists of things that later operations of the batch change are looked at below.
                if let (Ok(Outcome::Auth(Answer::AuthUserGet(user))), Step::UserGet(_)) = (&reply.result, step) {
                    prop_assert!(user.roles.is_sorted());
                }
            }
            if steps.iter().any(|(_, step)| matches!(step, Step::Restart)) {
                machine = Machine::open(engine.clone(), &Options::default()).unwrap();
            }
            if index % 8 == 0 {
                check(&machine, &model)?;
            }
            prop_assert_eq!(machine.reader().digest(), stored_digest(&*engine));
        }
        check(&machine, &model)?;
    }
}

/// Compares users, roles, and what everybody may read and write.
fn check(machine: &Machine<MapEngine>, model: &Model) -> Result<(), TestCaseError> {
    let reader = machine.reader();
    prop_assert_eq!(reader.is_auth_enabled(), model.enabled);
    let auth = Arc::clone(&reader.auth());
    prop_assert_eq!((auth.is_enabled(), auth.revision()), (model.enabled, model.revision));
    let caller = if model.enabled { "root" } else { "" };
    let answer = |action| auth.answer(&action, caller);
    match answer(Action::AuthUserList(AuthUserListRequest {})) {
        Ok(Answer::AuthUserList(list)) => {
            prop_assert_eq!(list.users, model.users.keys().cloned().collect::<Vec<_>>());
        }
        other => prop_assert!(false, "{:?}", other),
    }
    match answer(Action::AuthRoleList(AuthRoleListRequest {})) {
        Ok(Answer::AuthRoleList(list)) => {
            prop_assert_eq!(list.roles, model.roles.keys().cloned().collect::<Vec<_>>());
        }
        other => prop_assert!(false, "{:?}", other),
    }
    for (name, of_model) in &model.users {
        let user = auth.user(name).expect("the model has it");
        let roles: Vec<_> = of_model.roles.iter().cloned().collect();
        prop_assert_eq!(&user.roles, &roles);
        prop_assert_eq!(
            (&user.password[..], user.has_no_password()),
            (&of_model.hash[..], of_model.no_password)
        );
    }
    for (name, of_model) in model.roles.iter().filter(|(name, _)| *name != "root") {
        match answer(Action::AuthRoleGet(AuthRoleGetRequest { role: name.clone() })) {
            Ok(Answer::AuthRoleGet(role)) => {
                prop_assert!(role.perm.is_sorted_by_key(|permission| permission.key.clone()));
                let of_machine: BTreeMap<_, _> = role
                    .perm
                    .iter()
                    .map(|permission| {
                        (
                            (permission.key.clone(), permission.range_end.clone()),
                            permission.perm_type,
                        )
                    })
                    .collect();
                prop_assert_eq!(of_machine.len(), role.perm.len(), "each range once");
                let of_model: BTreeMap<_, _> = of_model
                    .iter()
                    .map(|((key, end), kind)| ((Bytes::from(*key), Bytes::from(*end)), *kind))
                    .collect();
                prop_assert_eq!(of_machine, of_model);
            }
            other => prop_assert!(false, "{:?}", other),
        }
    }
    for name in ["root", "ann", "bob", ""] {
        for revision in [0, model.revision - 1, model.revision, model.revision + 1] {
            let caller = Caller { name, revision };
            for range in NAMES.iter().flat_map(|key| ENDS.iter().map(move |end| (*key, *end))) {
                let span = Span::new(range.0.as_bytes(), range.1.as_bytes());
                prop_assert_eq!(auth.permit_read(caller, span), model.may((name, revision), 0, range));
                prop_assert_eq!(auth.permit_write(caller, span), model.may((name, revision), 1, range));
            }
        }
    }
    Ok(())
}
