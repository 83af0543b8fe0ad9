//! Users and roles as the log says, and who may do what.
//!
//! The one authorizer: whatever the protocol, a request is flattened into the [`Need`]s of its operations, nested
//! transactions included, and each is held against what its user may do. Writes are checked when they are applied,
//! against the state that they are applied to; reads are checked by whoever serves them, see [`crate::Reader::auth`].
//!
//! An [`Auth`] never changes once it is published: readers take it as it is, and a look-up in it is a look-up in sorted,
//! disjoint ranges.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use api::auth::{
    Answer, AuthRoleGetResponse, AuthRoleListResponse, AuthStatusResponse, AuthUserGetResponse, AuthUserListResponse,
    FIRST_AUTH_REVISION, Permission, PermissionType, ROOT_ROLE, ROOT_USER, Role, User,
};
use api::codec::Action;
use api::kv::{PutRequest, RequestOp, RequestOpKind, TxnRequest};
use api::{Error, LeaseId, Span};
use bytes::Bytes;
use prost::Message;
use storage::{Cursor, Engine, EngineError, Family, KeyRange, View};

use crate::keys;

mod change;

pub use change::AuthChange;
pub(crate) use change::Changing;

/// Who asks for something while auth is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Caller<'a> {
    /// The user; empty for nobody.
    pub name: &'a str,
    /// The auth revision at which the user showed who it is; 0 for nobody.
    pub revision: u64,
}

/// What an operation needs its user to be allowed to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need<'a> {
    /// Read all these keys.
    Read(Span<'a>),
    /// Write all these keys.
    Write(Span<'a>),
    /// Write all keys that are attached to a lease.
    WriteAttached(LeaseId),
}

/// Flattens an operation into what it needs, in order. Those that only an administrator may ask for need nothing else.
pub fn needs<E>(action: &Action, visit: &mut impl FnMut(Need<'_>) -> Result<(), E>) -> Result<(), E> {
    match action {
        Action::Put(put) => put_needs(put, visit),
        Action::DeleteRange(delete) => {
            visit(Need::Write(delete.span()))?;
            if delete.prev_kv {
                visit(Need::Read(delete.span()))?;
            }
            Ok(())
        }
        Action::Txn(txn) => txn_needs(txn, visit),
        Action::LeaseRevoke(revoke) => visit(Need::WriteAttached(revoke.id)),
        _ => Ok(()),
    }
}

fn put_needs<E>(put: &PutRequest, visit: &mut impl FnMut(Need<'_>) -> Result<(), E>) -> Result<(), E> {
    visit(Need::Write(Span::Key(&put.key)))?;
    // Whoever cannot end the lease must not make its end delete more.
    if put.lease != 0 {
        visit(Need::WriteAttached(put.lease))?;
    }
    if put.prev_kv {
        visit(Need::Read(Span::Key(&put.key)))?;
    }
    Ok(())
}

/// Flattens a transaction, both branches and everything nested in them.
pub fn txn_needs<E>(txn: &TxnRequest, visit: &mut impl FnMut(Need<'_>) -> Result<(), E>) -> Result<(), E> {
    for compare in &txn.compare {
        visit(Need::Read(Span::new(&compare.key, &compare.range_end)))?;
    }
    for RequestOp { request } in txn.success.iter().chain(&txn.failure) {
        match request {
            Some(RequestOpKind::Range(range)) => visit(Need::Read(range.span()))?,
            Some(RequestOpKind::Put(put)) => put_needs(put, visit)?,
            Some(RequestOpKind::DeleteRange(delete)) => {
                if delete.prev_kv {
                    visit(Need::Read(delete.span()))?;
                }
                visit(Need::Write(delete.span()))?;
            }
            Some(RequestOpKind::Txn(nested)) => txn_needs(nested, visit)?,
            None => {}
        }
    }
    Ok(())
}

/// Whether an operation is for administrators. UserGet and RoleGet are so too, but for what is the user's own.
pub(crate) fn is_administrative(action: &Action) -> bool {
    matches!(
        action,
        Action::AuthEnable(_)
            | Action::AuthDisable(_)
            | Action::AuthUserAdd(_)
            | Action::AuthUserDelete(_)
            | Action::AuthUserChangePassword(_)
            | Action::AuthUserGrantRole(_)
            | Action::AuthUserRevokeRole(_)
            | Action::AuthUserList(_)
            | Action::AuthRoleAdd(_)
            | Action::AuthRoleDelete(_)
            | Action::AuthRoleGrantPermission(_)
            | Action::AuthRoleRevokePermission(_)
            | Action::AuthRoleList(_)
    )
}

/// Whether an operation is for administrators, and was checked to be asked for by one before it got into the log: that
/// is checked again only for those that name one, since members ask for some of them by themselves.
pub(crate) fn was_administrative(action: &Action) -> bool {
    matches!(
        action,
        Action::Compact(_) | Action::Alarm(_) | Action::MemberUpdate(_) | Action::Downgrade(_)
    )
}

/// A set of keys: ranges in order, disjoint, with gaps between them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Keys(Vec<KeysRange>);

/// From a key (inclusive) to another one (exclusive), or without an end.
#[derive(Debug, Clone, PartialEq, Eq)]
struct KeysRange {
    start: Bytes,
    end: Option<Bytes>,
}

/// The smallest key: none is empty.
const FIRST_KEY: &[u8] = &[0];

impl Keys {
    /// The union of ranges in etcd's notation.
    pub fn union<'a>(ranges: impl IntoIterator<Item = Span<'a>>) -> Self {
        let mut ranges: Vec<KeysRange> = ranges
            .into_iter()
            .filter_map(|span| {
                let (start, end) = match span {
                    Span::Key(key) => (key, Some([key, &[0]].concat())),
                    Span::Range(start, end) => (start, Some(end.to_vec())),
                    Span::From(start) => (start, None),
                };
                let start = Bytes::copy_from_slice(start.max(FIRST_KEY));
                let range = KeysRange {
                    end: end.map(Bytes::from),
                    start,
                };
                let holds_any = range.end.as_ref().is_none_or(|end| range.start < *end);
                holds_any.then_some(range)
            })
            .collect();
        ranges.sort_by(|a, b| a.start.cmp(&b.start));
        let mut union: Vec<KeysRange> = Vec::with_capacity(ranges.len());
        for range in ranges {
            let last_touches = |last: &KeysRange| last.end.as_ref().is_none_or(|end| *end >= range.start);
            match union.last_mut().filter(|last| last_touches(last)) {
                Some(last) => {
                    last.end = match (last.end.take(), range.end) {
                        (Some(end), Some(other)) => Some(end.max(other)),
                        _ => None,
                    }
                }
                None => union.push(range),
            }
        }
        Keys(union)
    }

    /// The range that holds a key.
    fn range_with(&self, key: &[u8]) -> Option<&KeysRange> {
        let after = self.0.partition_point(|range| range.start <= key);
        let range = self.0.get(after.checked_sub(1)?)?;
        range.end.as_ref().is_none_or(|end| key < &end[..]).then_some(range)
    }

    /// Whether all keys of a span are in the set. Of a span that holds no key, its start must be.
    pub fn cover(&self, span: Span<'_>) -> bool {
        let Some(range) = self.range_with(span.start().max(FIRST_KEY)) else {
            return false;
        };
        match (span, &range.end) {
            (Span::Key(_), _) | (_, None) => true,
            (Span::Range(_, end), Some(last)) => end <= &last[..],
            (Span::From(_), Some(_)) => false,
        }
    }

    fn cover_all(&self) -> bool {
        self.cover(Span::From(&[]))
    }
}

/// What a user may do with keys.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Access {
    is_root: bool,
    read: Keys,
    write: Keys,
}

/// What someone wants to do with keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// Know them.
    Read,
    /// Change them.
    Write,
}

/// A user, and what its roles come to.
#[derive(Debug)]
struct UserEntry {
    user: User,
    /// See [`keys::auth_digest`], of the bytes as stored.
    digest: u64,
    /// Made when it is first asked for; whoever changes a role makes the entries of its users anew.
    access: OnceLock<Access>,
}

#[derive(Debug)]
struct RoleEntry {
    role: Role,
    digest: u64,
}

/// All users and roles, and whether auth is on.
#[derive(Debug, Clone)]
pub struct Auth {
    enabled: bool,
    revision: u64,
    users: BTreeMap<Bytes, Arc<UserEntry>>,
    roles: BTreeMap<Bytes, Arc<RoleEntry>>,
    /// The digests of the two numbers as stored; 0 for one that is not.
    enabled_digest: u64,
    revision_digest: u64,
}

impl Default for Auth {
    /// A store where nobody ever asked for auth.
    fn default() -> Self {
        Auth {
            enabled: false,
            revision: FIRST_AUTH_REVISION,
            users: BTreeMap::new(),
            roles: BTreeMap::new(),
            enabled_digest: 0,
            revision_digest: 0,
        }
    }
}

impl Caller<'_> {
    /// What members do by themselves, such as ending leases, they do as root.
    pub const MEMBER: Caller<'static> = Caller {
        name: ROOT_USER,
        revision: FIRST_AUTH_REVISION,
    };
}

impl Auth {
    /// Reads what the engine holds.
    pub(crate) fn load<E: Engine>(engine: &E) -> Result<Self, EngineError> {
        let view = engine.view();
        let number = |key| -> Result<(Option<Bytes>, u64), EngineError> {
            let value = view.get(keys::AUTH, key)?;
            let digest = value.as_ref().map_or(0, |value| keys::auth_digest(key, value));
            Ok((value, digest))
        };
        let (enabled, enabled_digest) = number(keys::AUTH_ENABLED)?;
        let (revision, revision_digest) = number(keys::AUTH_REVISION)?;
        let mut auth = Auth {
            enabled: keys::decode_auth_enabled(enabled.as_deref()),
            revision: keys::decode_auth_revision(revision.as_deref())?,
            enabled_digest,
            revision_digest,
            ..Auth::default()
        };
        let damaged = |error| keys::corrupt("auth", error);
        let (start, end) = keys::user_range();
        each(&view, keys::AUTH, &start, &end, |key, value| {
            let user = User::decode(Bytes::copy_from_slice(value)).map_err(damaged)?;
            let entry = UserEntry {
                user,
                digest: keys::auth_digest(key, value),
                access: OnceLock::new(),
            };
            auth.users
                .insert(Bytes::copy_from_slice(&key[start.len()..]), Arc::new(entry));
            Ok(())
        })?;
        let (start, end) = keys::role_range();
        each(&view, keys::AUTH, &start, &end, |key, value| {
            let role = Role::decode(Bytes::copy_from_slice(value)).map_err(damaged)?;
            let entry = RoleEntry {
                role,
                digest: keys::auth_digest(key, value),
            };
            auth.roles
                .insert(Bytes::copy_from_slice(&key[start.len()..]), Arc::new(entry));
            Ok(())
        })?;
        Ok(auth)
    }

    /// Whether auth is on.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Counts the changes of users and roles, from 1.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The user of this name.
    pub fn user(&self, name: &str) -> Option<&User> {
        self.users.get(name.as_bytes()).map(|entry| &entry.user)
    }

    /// How many users and roles there are.
    pub fn len(&self) -> (usize, usize) {
        (self.users.len(), self.roles.len())
    }

    fn role(&self, name: &str) -> Option<&Role> {
        self.roles.get(name.as_bytes()).map(|entry| &entry.role)
    }

    fn access<'a>(&self, entry: &'a UserEntry) -> &'a Access {
        entry.access.get_or_init(|| {
            let permissions = || {
                let roles = entry.user.roles.iter().filter_map(|role| self.role(role));
                roles.flat_map(|role| &role.key_permission)
            };
            let with = |wanted: PermissionType| {
                Keys::union(permissions().filter_map(|permission| {
                    let kind = PermissionType::try_from(permission.perm_type).ok()?;
                    (kind == wanted || kind == PermissionType::Readwrite).then(|| span_of(permission))
                }))
            };
            Access {
                is_root: entry.user.has_role(ROOT_ROLE),
                read: with(PermissionType::Read),
                write: with(PermissionType::Write),
            }
        })
    }

    /// What a caller may do.
    ///
    /// # Errors
    /// Nobody; someone who was checked before users or roles changed; someone who does not exist.
    fn access_of(&self, caller: Caller<'_>) -> Result<&Access, Error> {
        if caller.revision == 0 {
            return Err(Error::UserEmpty);
        }
        if caller.revision < self.revision {
            return Err(Error::AuthOldRevision);
        }
        let entry = self.users.get(caller.name.as_bytes());
        entry.map(|entry| self.access(entry)).ok_or(Error::PermissionDenied)
    }

    /// Whether a caller may read or write all these keys.
    ///
    /// # Errors
    /// See [`Auth::access_of`]; and [`Error::PermissionDenied`].
    fn permit(&self, caller: Caller<'_>, right: Right, span: Span<'_>) -> Result<(), Error> {
        if !self.enabled {
            return Ok(());
        }
        let access = self.access_of(caller)?;
        let keys = match right {
            Right::Read => &access.read,
            Right::Write => &access.write,
        };
        if access.is_root || keys.cover(span) {
            Ok(())
        } else {
            Err(Error::PermissionDenied)
        }
    }

    /// Whether a user may have a token; its password was checked.
    pub(crate) fn authenticate(&self, user: &str) -> Result<(), Error> {
        if !self.enabled {
            return Err(Error::AuthNotEnabled);
        }
        match self.user(user) {
            Some(user) if !user.has_no_password() => Ok(()),
            _ => Err(Error::AuthFailed),
        }
    }

    /// Whether a caller may read all these keys.
    ///
    /// # Errors
    /// Nobody asks, someone whom a newer auth revision may not know, or someone who may not.
    pub fn permit_read(&self, caller: Caller<'_>, span: Span<'_>) -> Result<(), Error> {
        self.permit(caller, Right::Read, span)
    }

    /// Whether a caller may write all these keys.
    ///
    /// # Errors
    /// As [`Auth::permit_read`].
    pub fn permit_write(&self, caller: Caller<'_>, span: Span<'_>) -> Result<(), Error> {
        self.permit(caller, Right::Write, span)
    }

    /// Whether a user is an administrator.
    ///
    /// # Errors
    /// Nobody asks, or someone who does not exist or is none.
    pub fn permit_admin(&self, name: &str) -> Result<(), Error> {
        if !self.enabled {
            return Ok(());
        }
        if name.is_empty() {
            return Err(Error::UserEmpty);
        }
        let user = self.user(name).ok_or(Error::UserNotFound)?;
        if user.has_role(ROOT_ROLE) {
            Ok(())
        } else {
            Err(Error::PermissionDenied)
        }
    }

    /// Whether a client's permissions are for some keys only, so that the keys must be looked at to answer for it.
    pub fn has_limits(&self, caller: Caller<'_>, right: Right) -> bool {
        matches!(self.limits_of(caller, right), Limits::To(_))
    }

    /// The keys that a caller may read or write, for checking keys that are attached to a lease; `None` if it may all.
    pub(crate) fn limits_of(&self, caller: Caller<'_>, right: Right) -> Limits<'_> {
        if !self.enabled || self.permit_admin(caller.name).is_ok() {
            return Limits::None;
        }
        match self.access_of(caller) {
            Err(error) => Limits::Nothing(error),
            Ok(access) => {
                let keys = match right {
                    Right::Read => &access.read,
                    Right::Write => &access.write,
                };
                if keys.cover_all() {
                    Limits::None
                } else {
                    Limits::To(keys)
                }
            }
        }
    }

    /// Answers what only reads users and roles: AuthStatus, UserGet, UserList, RoleGet and RoleList.
    ///
    /// # Errors
    /// The caller may not, or there is no such user or role.
    ///
    /// # Panics
    /// For any other request.
    pub fn answer(&self, request: &Action, caller: &str) -> Result<Answer, Error> {
        let text = |name: &Bytes| String::from_utf8_lossy(name).into_owned();
        if is_administrative(request) {
            self.permit_admin(caller)?;
        }
        Ok(match request {
            Action::AuthStatus(_) => Answer::AuthStatus(AuthStatusResponse {
                header: None,
                enabled: self.enabled,
                auth_revision: self.revision,
            }),
            Action::AuthUserGet(request) => {
                if request.name != caller {
                    self.permit_admin(caller)?;
                }
                let user = self.user(&request.name).ok_or(Error::UserNotFound)?;
                Answer::AuthUserGet(AuthUserGetResponse {
                    header: None,
                    roles: user.roles.clone(),
                })
            }
            Action::AuthUserList(_) => Answer::AuthUserList(AuthUserListResponse {
                header: None,
                users: self.users.keys().map(text).collect(),
            }),
            Action::AuthRoleGet(request) => {
                if !self.user(caller).is_some_and(|user| user.has_role(&request.role)) {
                    self.permit_admin(caller)?;
                }
                let role = self.role(&request.role).ok_or(Error::RoleNotFound)?;
                let perm = if request.role == ROOT_ROLE {
                    vec![root_permission()]
                } else {
                    role.key_permission.clone()
                };
                Answer::AuthRoleGet(AuthRoleGetResponse { header: None, perm })
            }
            Action::AuthRoleList(_) => Answer::AuthRoleList(AuthRoleListResponse {
                header: None,
                roles: self.roles.keys().map(text).collect(),
            }),
            other => unreachable!("{other:?} does not only read users and roles"),
        })
    }
}

/// Which keys of a lease are within a caller's rights.
pub(crate) enum Limits<'a> {
    /// All.
    None,
    /// These.
    To(&'a Keys),
    /// None, and why.
    Nothing(Error),
}

fn span_of(permission: &Permission) -> Span<'_> {
    Span::new(&permission.key, &permission.range_end)
}

/// What role root permits, as etcd shows it.
fn root_permission() -> Permission {
    Permission {
        perm_type: PermissionType::Readwrite.into(),
        key: Bytes::new(),
        range_end: Bytes::from_static(&[0]),
    }
}

fn each(
    view: &impl View,
    family: Family,
    start: &[u8],
    end: &[u8],
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<(), EngineError>,
) -> Result<(), EngineError> {
    let mut cursor = view.cursor(family, KeyRange { start, end: Some(end) })?;
    cursor.seek_first()?;
    while let Some((key, value)) = cursor.entry() {
        visit(key, value)?;
        cursor.next()?;
    }
    Ok(())
}

/// Finds out whether a lease holds a key that is not within limits, without looking at all of its keys: from what is
/// permitted it jumps to what is not.
pub(crate) fn permit_attached(
    limits: &Limits<'_>,
    view: &impl View,
    overlay: Option<&crate::overlay::Overlay>,
    lease: LeaseId,
) -> Result<Result<(), Error>, EngineError> {
    let (keys, refusal) = match limits {
        Limits::None => return Ok(Ok(())),
        Limits::To(keys) => (Some(*keys), Error::PermissionDenied),
        Limits::Nothing(error) => (None, *error),
    };
    let (start, end) = keys::attached_range(lease);
    let end_of_permitted = |key: &[u8]| match keys.and_then(|keys| keys.range_with(key)) {
        None => Permitted::No,
        Some(KeysRange { end: Some(end), .. }) => Permitted::Until(end.clone()),
        Some(KeysRange { end: None, .. }) => Permitted::All,
    };
    let mut cursor = view.cursor(
        keys::LEASE,
        KeyRange {
            start: &start,
            end: Some(&end),
        },
    )?;
    let undone = |key: &[u8]| {
        let at = (lease, Bytes::copy_from_slice(key));
        overlay.is_some_and(|overlay| overlay.attached.get(&at) == Some(&false))
    };
    cursor.seek_first()?;
    while let Some((key, _)) = cursor.entry() {
        let key = &key[start.len()..];
        match end_of_permitted(key) {
            Permitted::No if undone(key) => cursor.next()?,
            Permitted::No => return Ok(Err(refusal)),
            Permitted::Until(end) => cursor.seek(&keys::attached_key(lease, &end))?,
            Permitted::All => break,
        }
    }
    let Some(overlay) = overlay else {
        return Ok(Ok(()));
    };
    let mut from = Bytes::new();
    loop {
        let mut later = overlay.attached.range((lease, from)..);
        let Some(((_, key), attached)) = later.next().filter(|((id, _), _)| *id == lease) else {
            return Ok(Ok(()));
        };
        from = match end_of_permitted(key) {
            Permitted::No if *attached => return Ok(Err(refusal)),
            Permitted::No => [&key[..], &[0]].concat().into(),
            Permitted::Until(end) => end,
            Permitted::All => return Ok(Ok(())),
        };
    }
}

/// Up to where keys are permitted.
enum Permitted {
    No,
    Until(Bytes),
    All,
}
