//! Users and roles: what operators change of them, what they should come to, and who may do what while auth is on.
//!
//! The model knows nothing of unions of ranges: whether somebody may touch a range is found out point by point.

use std::collections::{BTreeMap, BTreeSet};

use api::auth::*;
use api::codec::{Action, OperationHeader};
use api::kv::{DeleteRangeRequest, PutRequest, RequestOpKind, ResponseHeader, TxnRequest};
use api::{Error, LeaseId, RaftIndex, Span};
use bytes::Bytes;
use fastrand::Rng;
use mvcc::{Caller, Outcome};

/// On whose behalf something is asked, as the member that is asked knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Who {
    /// The user; empty for nobody.
    pub name: String,
    /// The auth revision at which the user showed who it is; 0 for nobody.
    pub revision: u64,
}

impl Who {
    /// A member that does something by itself.
    pub fn member() -> Self {
        Who {
            name: Caller::MEMBER.name.to_owned(),
            revision: Caller::MEMBER.revision,
        }
    }

    /// As `mvcc` has it.
    pub fn caller(&self) -> Caller<'_> {
        Caller {
            name: &self.name,
            revision: self.revision,
        }
    }
}

/// A user as the log says.
#[derive(Clone, Default)]
struct Known {
    roles: BTreeSet<String>,
    has_password: bool,
}

/// Users and roles as the log says.
#[derive(Clone)]
pub struct Auth {
    enabled: bool,
    revision: u64,
    users: BTreeMap<String, Known>,
    roles: BTreeMap<String, Vec<Permission>>,
}

impl Default for Auth {
    fn default() -> Self {
        Auth {
            enabled: false,
            revision: FIRST_AUTH_REVISION,
            users: BTreeMap::new(),
            roles: BTreeMap::new(),
        }
    }
}

/// Whether an operation may change users, roles, or whether they matter.
pub fn is_about_users(action: &Action) -> bool {
    matches!(
        action,
        Action::AuthEnable(_)
            | Action::AuthDisable(_)
            | Action::AuthUserAdd(_)
            | Action::AuthUserDelete(_)
            | Action::AuthUserChangePassword(_)
            | Action::AuthUserGrantRole(_)
            | Action::AuthUserRevokeRole(_)
            | Action::AuthRoleAdd(_)
            | Action::AuthRoleDelete(_)
            | Action::AuthRoleGrantPermission(_)
            | Action::AuthRoleRevokePermission(_)
    )
}

impl Auth {
    /// Whether auth is on.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Counts the changes.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// How many users and roles there are.
    pub fn len(&self) -> (usize, usize) {
        (self.users.len(), self.roles.len())
    }

    fn has_root(&self, name: &str) -> bool {
        self.users.get(name).is_some_and(|user| user.roles.contains(ROOT_ROLE))
    }

    fn permit_admin(&self, name: &str) -> Result<(), Error> {
        match self.users.get(name) {
            _ if !self.enabled => Ok(()),
            _ if name.is_empty() => Err(Error::UserEmpty),
            None => Err(Error::UserNotFound),
            Some(user) if user.roles.contains(ROOT_ROLE) => Ok(()),
            Some(_) => Err(Error::PermissionDenied),
        }
    }

    /// Whether somebody may do something of a kind with all keys of a range.
    fn permit(&self, caller: Caller<'_>, kind: PermissionType, key: &[u8], end: &[u8]) -> Result<(), Error> {
        if !self.enabled {
            return Ok(());
        }
        if caller.revision == 0 {
            return Err(Error::UserEmpty);
        }
        if caller.revision < self.revision {
            return Err(Error::AuthOldRevision);
        }
        let user = self.users.get(caller.name).ok_or(Error::PermissionDenied)?;
        if user.roles.contains(ROOT_ROLE) {
            return Ok(());
        }
        let permissions = user.roles.iter().filter_map(|role| self.roles.get(role)).flatten();
        let counts = |of: i32| of == kind as i32 || of == PermissionType::Readwrite as i32;
        let permissions: Vec<&Permission> = permissions.filter(|permission| counts(permission.perm_type)).collect();
        // What is permitted changes only where a range begins or ends, and right behind a single key.
        let wanted = Span::new(key, end);
        let bounds = permissions.iter().flat_map(|permission| {
            let behind = [&permission.key[..], &[0]].concat();
            [permission.key.to_vec(), permission.range_end.to_vec(), behind]
        });
        let mut points: Vec<Vec<u8>> = bounds.filter(|point| wanted.contains(point)).collect();
        points.push(wanted.start().max(&[0]).to_vec());
        let permitted = |point: &[u8]| {
            permissions
                .iter()
                .any(|permission| Span::new(&permission.key, &permission.range_end).contains(point))
        };
        if points.iter().all(|point| permitted(point)) {
            Ok(())
        } else {
            Err(Error::PermissionDenied)
        }
    }

    /// Whether somebody may read a range.
    pub fn permit_read(&self, caller: Caller<'_>, key: &[u8], end: &[u8]) -> Result<(), Error> {
        self.permit(caller, PermissionType::Read, key, end)
    }

    fn permit_write(&self, caller: Caller<'_>, key: &[u8], end: &[u8]) -> Result<(), Error> {
        self.permit(caller, PermissionType::Write, key, end)
    }

    /// Whether somebody may change all keys that are attached to a lease.
    fn permit_attached(
        &self,
        caller: Caller<'_>,
        lease: LeaseId,
        attached: &impl Fn(LeaseId) -> Vec<Bytes>,
    ) -> Result<(), Error> {
        if self.has_root(caller.name) {
            return Ok(());
        }
        let keys = attached(lease);
        keys.iter().try_for_each(|key| self.permit_write(caller, key, &[]))
    }

    /// Whether whoever asked for an operation may have it carried out; `attached` knows the keys of leases.
    pub fn authorize(
        &self,
        header: &OperationHeader,
        action: &Action,
        attached: &impl Fn(LeaseId) -> Vec<Bytes>,
    ) -> Result<(), Error> {
        if !self.enabled {
            return Ok(());
        }
        let caller = Caller {
            name: &header.username,
            revision: header.auth_revision,
        };
        match action {
            Action::Put(put) => self.permit_put(caller, put, attached),
            Action::DeleteRange(delete) => {
                self.permit_write(caller, &delete.key, &delete.range_end)?;
                self.permit_deleted(caller, delete)
            }
            Action::Txn(txn) => self.permit_txn(caller, txn, attached),
            Action::LeaseRevoke(revoke) => self.permit_attached(caller, revoke.id, attached),
            Action::Compact(_) | Action::Alarm(_) | Action::MemberUpdate(_) if !header.username.is_empty() => {
                self.permit_admin(&header.username)
            }
            Action::AuthUserList(_) | Action::AuthRoleList(_) => self.permit_admin(&header.username),
            _ if is_about_users(action) => self.permit_admin(&header.username),
            Action::AuthUserGet(get) if get.name != header.username => self.permit_admin(&header.username),
            Action::AuthRoleGet(get) => match self.users.get(&header.username) {
                Some(user) if user.roles.contains(&get.role) => Ok(()),
                _ => self.permit_admin(&header.username),
            },
            _ => Ok(()),
        }
    }

    fn permit_put(
        &self,
        caller: Caller<'_>,
        put: &PutRequest,
        attached: &impl Fn(LeaseId) -> Vec<Bytes>,
    ) -> Result<(), Error> {
        self.permit_write(caller, &put.key, &[])?;
        if put.lease != 0 {
            self.permit_attached(caller, put.lease, attached)?;
        }
        if put.prev_kv {
            self.permit_read(caller, &put.key, &[])?;
        }
        Ok(())
    }

    /// Whether somebody may know what is deleted, if that was asked for.
    fn permit_deleted(&self, caller: Caller<'_>, delete: &DeleteRangeRequest) -> Result<(), Error> {
        if delete.prev_kv {
            self.permit_read(caller, &delete.key, &delete.range_end)?;
        }
        Ok(())
    }

    fn permit_txn(
        &self,
        caller: Caller<'_>,
        txn: &TxnRequest,
        attached: &impl Fn(LeaseId) -> Vec<Bytes>,
    ) -> Result<(), Error> {
        for compare in &txn.compare {
            self.permit_read(caller, &compare.key, &compare.range_end)?;
        }
        for op in txn.success.iter().chain(&txn.failure) {
            match op.request.as_ref().expect("clients send whole requests") {
                RequestOpKind::Range(range) => self.permit_read(caller, &range.key, &range.range_end)?,
                RequestOpKind::Put(put) => self.permit_put(caller, put, attached)?,
                RequestOpKind::DeleteRange(delete) => {
                    self.permit_deleted(caller, delete)?;
                    self.permit_write(caller, &delete.key, &delete.range_end)?;
                }
                RequestOpKind::Txn(nested) => self.permit_txn(caller, nested, attached)?,
            }
        }
        Ok(())
    }

    fn user(&mut self, name: &str) -> Result<&mut Known, Error> {
        self.users.get_mut(name).ok_or(Error::UserNotFound)
    }

    fn role(&mut self, name: &str) -> Result<&mut Vec<Permission>, Error> {
        self.roles.get_mut(name).ok_or(Error::RoleNotFound)
    }

    /// Carries an operation out that its user may ask for.
    pub fn apply(&mut self, index: RaftIndex, action: &Action, revision: i64) -> Result<Outcome, Error> {
        let header = ResponseHeader::at(revision);
        let mut changes = true;
        let answer = match action {
            Action::AuthEnable(_) => {
                changes = false;
                if !self.enabled {
                    let root = self.users.get(ROOT_USER).ok_or(Error::RootUserNotExist)?;
                    if !root.roles.contains(ROOT_ROLE) {
                        return Err(Error::RootRoleNotExist);
                    }
                    self.enabled = true;
                }
                Answer::AuthEnable(AuthEnableResponse { header })
            }
            Action::AuthDisable(_) => {
                changes = std::mem::take(&mut self.enabled);
                Answer::AuthDisable(AuthDisableResponse { header })
            }
            Action::AuthUserAdd(add) => {
                if self.users.contains_key(&add.name) {
                    return Err(Error::UserExists);
                }
                let known = Known {
                    has_password: !add.options.as_ref().is_some_and(|options| options.no_password),
                    ..Default::default()
                };
                self.users.insert(add.name.clone(), known);
                Answer::AuthUserAdd(AuthUserAddResponse { header })
            }
            Action::AuthUserDelete(delete) => {
                if self.enabled && delete.name == ROOT_USER {
                    return Err(Error::InvalidAuthManagement);
                }
                self.users.remove(&delete.name).ok_or(Error::UserNotFound)?;
                Answer::AuthUserDelete(AuthUserDeleteResponse { header })
            }
            Action::AuthUserChangePassword(change) => {
                self.user(&change.name)?;
                Answer::AuthUserChangePassword(AuthUserChangePasswordResponse { header })
            }
            Action::AuthUserGrantRole(grant) => {
                self.user(&grant.user)?;
                // The role root need not be there.
                if grant.role != ROOT_ROLE {
                    self.role(&grant.role)?;
                }
                changes = self.user(&grant.user)?.roles.insert(grant.role.clone());
                Answer::AuthUserGrantRole(AuthUserGrantRoleResponse { header })
            }
            Action::AuthUserRevokeRole(revoke) => {
                if self.enabled && (&revoke.name[..], &revoke.role[..]) == (ROOT_USER, ROOT_ROLE) {
                    return Err(Error::InvalidAuthManagement);
                }
                if !self.user(&revoke.name)?.roles.remove(&revoke.role) {
                    return Err(Error::RoleNotGranted);
                }
                Answer::AuthUserRevokeRole(AuthUserRevokeRoleResponse { header })
            }
            Action::AuthRoleAdd(add) => {
                if self.roles.contains_key(&add.name) {
                    return Err(Error::RoleExists);
                }
                self.roles.insert(add.name.clone(), Vec::new());
                Answer::AuthRoleAdd(AuthRoleAddResponse { header })
            }
            Action::AuthRoleDelete(delete) => {
                if self.enabled && delete.role == ROOT_ROLE {
                    return Err(Error::InvalidAuthManagement);
                }
                self.roles.remove(&delete.role).ok_or(Error::RoleNotFound)?;
                self.users.values_mut().for_each(|user| {
                    user.roles.remove(&delete.role);
                });
                Answer::AuthRoleDelete(AuthRoleDeleteResponse { header })
            }
            Action::AuthRoleGrantPermission(grant) => {
                let granted = grant.perm.clone().expect("operators send whole requests");
                let permissions = self.role(&grant.name)?;
                let is_same =
                    |known: &&mut Permission| known.key == granted.key && known.range_end == granted.range_end;
                match permissions.iter_mut().find(is_same) {
                    Some(known) => known.perm_type = granted.perm_type,
                    None => permissions.push(granted),
                }
                permissions.sort_by(|a, b| a.key.cmp(&b.key));
                Answer::AuthRoleGrantPermission(AuthRoleGrantPermissionResponse { header })
            }
            Action::AuthRoleRevokePermission(revoke) => {
                let permissions = self.role(&revoke.role)?;
                let is_meant = |known: &Permission| known.key == revoke.key && known.range_end == revoke.range_end;
                let at = permissions.iter().position(is_meant);
                permissions.remove(at.ok_or(Error::PermissionNotGranted)?);
                Answer::AuthRoleRevokePermission(AuthRoleRevokePermissionResponse { header })
            }
            Action::Authenticate(request) => {
                if !self.enabled {
                    return Err(Error::AuthNotEnabled);
                }
                let known = self.users.get(&request.name);
                known.filter(|user| user.has_password).ok_or(Error::AuthFailed)?;
                return Ok(Outcome::Authenticate(AuthenticateResponse {
                    header,
                    token: format!("{}.{index}", request.simple_token),
                }));
            }
            other => {
                changes = false;
                self.read(other, header)?
            }
        };
        self.revision += u64::from(changes);
        Ok(Outcome::Auth(answer))
    }

    fn read(&mut self, action: &Action, header: Option<ResponseHeader>) -> Result<Answer, Error> {
        Ok(match action {
            Action::AuthStatus(_) => Answer::AuthStatus(AuthStatusResponse {
                header,
                enabled: self.enabled,
                auth_revision: self.revision,
            }),
            Action::AuthUserGet(get) => Answer::AuthUserGet(AuthUserGetResponse {
                header,
                roles: self.user(&get.name)?.roles.iter().cloned().collect(),
            }),
            Action::AuthUserList(_) => Answer::AuthUserList(AuthUserListResponse {
                header,
                users: self.users.keys().cloned().collect(),
            }),
            Action::AuthRoleGet(get) => {
                let mut perm = self.role(&get.role)?.clone();
                if get.role == ROOT_ROLE {
                    perm = vec![permission("", "\0", PermissionType::Readwrite as i32)];
                }
                Answer::AuthRoleGet(AuthRoleGetResponse { header, perm })
            }
            Action::AuthRoleList(_) => Answer::AuthRoleList(AuthRoleListResponse {
                header,
                roles: self.roles.keys().cloned().collect(),
            }),
            other => unreachable!("nobody asks for {other:?}"),
        })
    }
}

fn permission(key: &'static str, range_end: &'static str, perm_type: i32) -> Permission {
    Permission {
        perm_type,
        key: key.into(),
        range_end: range_end.into(),
    }
}

/// What permissions are about: they touch, overlap, hold each other, and leave gaps.
const RANGES: &[(&str, &str)] = &[
    ("hot0", ""),
    ("hot1", ""),
    ("hot2", ""),
    ("hot3", ""),
    ("hot", "hou"),
    ("hot1", "hot3"),
    ("cold", "cold050"),
    ("cold050", "cole"),
    ("cold", "cole"),
    ("d", "\0"),
    ("other", "othes"),
    ("\0", "\0"),
];

/// Who may ask while auth is on.
pub fn some_name(rng: &mut Rng) -> String {
    match rng.u8(..10) {
        0 => String::new(),
        1..=3 => ROOT_USER.to_owned(),
        _ => format!("user{}", rng.u8(..4)),
    }
}

/// What an operator asks for on the way to auth being on, or while it is.
pub fn request_with_auth(rng: &mut Rng, known: &Auth) -> Action {
    let (user, role) = (ROOT_USER.to_owned(), ROOT_ROLE.to_owned());
    match rng.u8(..24) {
        0 if known.enabled => Action::AuthDisable(AuthDisableRequest {}),
        0..8 if !known.enabled => {
            if !known.users.contains_key(ROOT_USER) {
                user_add(user, false)
            } else if !known.has_root(ROOT_USER) {
                Action::AuthUserGrantRole(AuthUserGrantRoleRequest { user, role })
            } else {
                Action::AuthEnable(AuthEnableRequest {})
            }
        }
        1 => Action::AuthUserRevokeRole(AuthUserRevokeRoleRequest { name: user, role }),
        2 => Action::AuthUserDelete(AuthUserDeleteRequest { name: user }),
        3 => Action::AuthRoleAdd(AuthRoleAddRequest { name: role }),
        4 => Action::AuthRoleDelete(AuthRoleDeleteRequest { role }),
        5 => Action::AuthRoleGet(AuthRoleGetRequest { role }),
        6 => Action::AuthUserGrantRole(AuthUserGrantRoleRequest {
            user: format!("user{}", rng.u8(..4)),
            role,
        }),
        _ => some_request(rng),
    }
}

fn user_add(name: String, no_password: bool) -> Action {
    Action::AuthUserAdd(AuthUserAddRequest {
        name,
        // What a password comes to is nobody's concern here.
        hashed_password: if no_password { String::new() } else { HASH.to_owned() },
        options: Some(UserAddOptions { no_password }),
        ..Default::default()
    })
}

const HASH: &str = "aGFzaA==";

/// What an operator asks for.
pub fn some_request(rng: &mut Rng) -> Action {
    let name = format!("user{}", rng.u8(..4));
    let role = format!("role{}", rng.u8(..4));
    let (key, range_end) = RANGES[rng.usize(..RANGES.len())];
    match rng.u8(..20) {
        0 | 1 => user_add(name, rng.u8(..4) == 0),
        2 => Action::AuthUserDelete(AuthUserDeleteRequest { name }),
        3 => Action::AuthUserChangePassword(AuthUserChangePasswordRequest {
            name,
            hashed_password: HASH.to_owned(),
            ..Default::default()
        }),
        4..=6 => Action::AuthUserGrantRole(AuthUserGrantRoleRequest { user: name, role }),
        7 => Action::AuthUserRevokeRole(AuthUserRevokeRoleRequest { name, role }),
        8 | 9 => Action::AuthRoleAdd(AuthRoleAddRequest { name: role }),
        10 => Action::AuthRoleDelete(AuthRoleDeleteRequest { role }),
        11..=14 => Action::AuthRoleGrantPermission(AuthRoleGrantPermissionRequest {
            name: role,
            perm: Some(permission(key, range_end, rng.i32(0..3))),
        }),
        15 => Action::AuthRoleRevokePermission(AuthRoleRevokePermissionRequest {
            role,
            key: key.into(),
            range_end: range_end.into(),
        }),
        16 => Action::Authenticate(InternalAuthenticateRequest {
            name,
            simple_token: "token".to_owned(),
            ..Default::default()
        }),
        17 => Action::AuthEnable(AuthEnableRequest {}),
        18 => match rng.u8(..4) {
            0 => Action::AuthUserGet(AuthUserGetRequest { name }),
            1 => Action::AuthUserList(AuthUserListRequest {}),
            2 => Action::AuthRoleGet(AuthRoleGetRequest { role }),
            _ => Action::AuthRoleList(AuthRoleListRequest {}),
        },
        _ => Action::AuthStatus(AuthStatusRequest {}),
    }
}
