//! Users and roles: what operators change of them, and what they should come to.
//!
//! Auth itself stays off: there never is a user root. Who may do what when it is on is tested in `mvcc` and by
//! comparison with etcd; here it is that users and roles are replicated state like any other.

use std::collections::{BTreeMap, BTreeSet};

use api::Error;
use api::auth::*;
use api::codec::Action;
use api::kv::ResponseHeader;
use bytes::Bytes;
use fastrand::Rng;
use mvcc::Outcome;

/// Users and roles as the log says.
pub struct Auth {
    revision: u64,
    users: BTreeMap<String, BTreeSet<String>>,
    roles: BTreeMap<String, BTreeMap<Bytes, i32>>,
}

impl Default for Auth {
    fn default() -> Self {
        Auth {
            revision: FIRST_AUTH_REVISION,
            users: BTreeMap::new(),
            roles: BTreeMap::new(),
        }
    }
}

impl Auth {
    fn user(&mut self, name: &str) -> Result<&mut BTreeSet<String>, Error> {
        self.users.get_mut(name).ok_or(Error::UserNotFound)
    }

    fn role(&mut self, name: &str) -> Result<&mut BTreeMap<Bytes, i32>, Error> {
        self.roles.get_mut(name).ok_or(Error::RoleNotFound)
    }

    /// Carries an operation out.
    pub fn apply(&mut self, action: &Action, revision: i64) -> Result<Outcome, Error> {
        let header = ResponseHeader::at(revision);
        let mut changes = true;
        let answer = match action {
            Action::AuthUserAdd(add) => {
                if self.users.contains_key(&add.name) {
                    return Err(Error::UserExists);
                }
                self.users.insert(add.name.clone(), BTreeSet::new());
                Answer::AuthUserAdd(AuthUserAddResponse { header })
            }
            Action::AuthUserDelete(delete) => {
                self.users.remove(&delete.name).ok_or(Error::UserNotFound)?;
                Answer::AuthUserDelete(AuthUserDeleteResponse { header })
            }
            Action::AuthUserChangePassword(change) => {
                self.user(&change.name)?;
                Answer::AuthUserChangePassword(AuthUserChangePasswordResponse { header })
            }
            Action::AuthUserGrantRole(grant) => {
                self.user(&grant.user)?;
                self.role(&grant.role)?;
                changes = self.user(&grant.user)?.insert(grant.role.clone());
                Answer::AuthUserGrantRole(AuthUserGrantRoleResponse { header })
            }
            Action::AuthUserRevokeRole(revoke) => {
                if !self.user(&revoke.name)?.remove(&revoke.role) {
                    return Err(Error::RoleNotGranted);
                }
                Answer::AuthUserRevokeRole(AuthUserRevokeRoleResponse { header })
            }
            Action::AuthRoleAdd(add) => {
                if self.roles.contains_key(&add.name) {
                    return Err(Error::RoleExists);
                }
                self.roles.insert(add.name.clone(), BTreeMap::new());
                Answer::AuthRoleAdd(AuthRoleAddResponse { header })
            }
            Action::AuthRoleDelete(delete) => {
                self.roles.remove(&delete.role).ok_or(Error::RoleNotFound)?;
                self.users.values_mut().for_each(|roles| {
                    roles.remove(&delete.role);
                });
                Answer::AuthRoleDelete(AuthRoleDeleteResponse { header })
            }
            Action::AuthRoleGrantPermission(grant) => {
                let permission = grant.perm.clone().expect("operators send whole requests");
                self.role(&grant.name)?.insert(permission.key, permission.perm_type);
                Answer::AuthRoleGrantPermission(AuthRoleGrantPermissionResponse { header })
            }
            Action::AuthRoleRevokePermission(revoke) => {
                let taken = self.role(&revoke.role)?.remove(&revoke.key);
                taken.ok_or(Error::PermissionNotGranted)?;
                Answer::AuthRoleRevokePermission(AuthRoleRevokePermissionResponse { header })
            }
            Action::AuthEnable(_) => return Err(Error::RootUserNotExist),
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
                enabled: false,
                auth_revision: self.revision,
            }),
            Action::AuthUserGet(get) => Answer::AuthUserGet(AuthUserGetResponse {
                header,
                roles: self.user(&get.name)?.iter().cloned().collect(),
            }),
            Action::AuthUserList(_) => Answer::AuthUserList(AuthUserListResponse {
                header,
                users: self.users.keys().cloned().collect(),
            }),
            Action::AuthRoleGet(get) => {
                let permissions = self.role(&get.role)?.iter();
                let perm = permissions.map(|(key, perm_type)| permission(key.clone(), *perm_type));
                Answer::AuthRoleGet(AuthRoleGetResponse {
                    header,
                    perm: perm.collect(),
                })
            }
            Action::AuthRoleList(_) => Answer::AuthRoleList(AuthRoleListResponse {
                header,
                roles: self.roles.keys().cloned().collect(),
            }),
            other => unreachable!("nobody asks for {other:?}"),
        })
    }
}

fn permission(key: Bytes, perm_type: i32) -> Permission {
    Permission {
        perm_type,
        key,
        range_end: Bytes::new(),
    }
}

/// What an operator asks for.
pub fn some_request(rng: &mut Rng) -> Action {
    let name = format!("user{}", rng.u8(..4));
    let role = format!("role{}", rng.u8(..4));
    let key = Bytes::from(format!("hot{}", rng.u8(..4)));
    // What a password comes to is nobody's concern here.
    let hashed_password = "aGFzaA==".to_owned();
    match rng.u8(..16) {
        0 | 1 => Action::AuthUserAdd(AuthUserAddRequest {
            name,
            hashed_password,
            ..Default::default()
        }),
        2 => Action::AuthUserDelete(AuthUserDeleteRequest { name }),
        3 => Action::AuthUserChangePassword(AuthUserChangePasswordRequest {
            name,
            hashed_password,
            ..Default::default()
        }),
        4 | 5 => Action::AuthUserGrantRole(AuthUserGrantRoleRequest { user: name, role }),
        6 => Action::AuthUserRevokeRole(AuthUserRevokeRoleRequest { name, role }),
        7 | 8 => Action::AuthRoleAdd(AuthRoleAddRequest { name: role }),
        9 => Action::AuthRoleDelete(AuthRoleDeleteRequest { role }),
        10 | 11 => Action::AuthRoleGrantPermission(AuthRoleGrantPermissionRequest {
            name: role,
            perm: Some(permission(key, rng.i32(0..3))),
        }),
        12 => Action::AuthRoleRevokePermission(AuthRoleRevokePermissionRequest {
            role,
            key,
            range_end: Bytes::new(),
        }),
        13 => Action::AuthEnable(AuthEnableRequest {}),
        14 => match rng.u8(..4) {
            0 => Action::AuthUserGet(AuthUserGetRequest { name }),
            1 => Action::AuthUserList(AuthUserListRequest {}),
            2 => Action::AuthRoleGet(AuthRoleGetRequest { role }),
            _ => Action::AuthRoleList(AuthRoleListRequest {}),
        },
        _ => Action::AuthStatus(AuthStatusRequest {}),
    }
}
