//! Changes of users and roles, with etcd's checks in etcd's order.

use std::sync::{Arc, OnceLock};

use api::auth::{
    Answer, AuthDisableResponse, AuthEnableResponse, AuthRoleAddRequest, AuthRoleAddResponse, AuthRoleDeleteRequest,
    AuthRoleDeleteResponse, AuthRoleGrantPermissionRequest, AuthRoleGrantPermissionResponse,
    AuthRoleRevokePermissionRequest, AuthRoleRevokePermissionResponse, AuthUserAddRequest, AuthUserAddResponse,
    AuthUserChangePasswordRequest, AuthUserChangePasswordResponse, AuthUserDeleteRequest, AuthUserDeleteResponse,
    AuthUserGrantRoleRequest, AuthUserGrantRoleResponse, AuthUserRevokeRoleRequest, AuthUserRevokeRoleResponse,
    Permission, ROOT_ROLE, ROOT_USER, Role, User,
};
use api::codec::Action;
use api::{Error, RaftIndex};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use prost::Message;
use storage::Batch;

use super::{Auth, RoleEntry, UserEntry};
use crate::keys;

/// What a change means for whoever keeps tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AuthChange {
    /// Auth is on.
    Enabled,
    /// Auth is off: no token counts any more.
    Disabled,
    /// A user got a token.
    TokenGiven {
        /// The user.
        user: String,
        /// The token.
        token: String,
        /// The log entry that gave it.
        index: RaftIndex,
    },
    /// No token of the user counts any more.
    TokensTaken {
        /// The user.
        user: String,
    },
}

/// Where a change writes to.
pub(crate) struct Changing<'a, B> {
    pub(crate) auth: &'a mut Auth,
    pub(crate) batch: &'a mut B,
    /// See [`keys::StateRecord::digest`].
    pub(crate) digest: &'a mut u64,
    pub(crate) changes: &'a mut Vec<AuthChange>,
}

impl<B: Batch> Changing<'_, B> {
    /// Carries an operation out that changes users, roles, or whether auth is on. Whether its user may was checked.
    ///
    /// # Errors
    /// etcd's; nothing is changed then.
    ///
    /// # Panics
    /// For any other operation.
    pub(crate) fn apply(&mut self, action: Action) -> Result<Answer, Error> {
        let header = None;
        Ok(match action {
            Action::AuthEnable(_) => {
                self.enable()?;
                Answer::AuthEnable(AuthEnableResponse { header })
            }
            Action::AuthDisable(_) => {
                self.disable();
                Answer::AuthDisable(AuthDisableResponse { header })
            }
            Action::AuthUserAdd(request) => {
                self.user_add(request)?;
                Answer::AuthUserAdd(AuthUserAddResponse { header })
            }
            Action::AuthUserDelete(request) => {
                self.user_delete(request)?;
                Answer::AuthUserDelete(AuthUserDeleteResponse { header })
            }
            Action::AuthUserChangePassword(request) => {
                self.user_change_password(request)?;
                Answer::AuthUserChangePassword(AuthUserChangePasswordResponse { header })
            }
            Action::AuthUserGrantRole(request) => {
                self.user_grant_role(request)?;
                Answer::AuthUserGrantRole(AuthUserGrantRoleResponse { header })
            }
            Action::AuthUserRevokeRole(request) => {
                self.user_revoke_role(&request)?;
                Answer::AuthUserRevokeRole(AuthUserRevokeRoleResponse { header })
            }
            Action::AuthRoleAdd(request) => {
                self.role_add(request)?;
                Answer::AuthRoleAdd(AuthRoleAddResponse { header })
            }
            Action::AuthRoleDelete(request) => {
                self.role_delete(&request)?;
                Answer::AuthRoleDelete(AuthRoleDeleteResponse { header })
            }
            Action::AuthRoleGrantPermission(request) => {
                self.role_grant_permission(request)?;
                Answer::AuthRoleGrantPermission(AuthRoleGrantPermissionResponse { header })
            }
            Action::AuthRoleRevokePermission(request) => {
                self.role_revoke_permission(&request)?;
                Answer::AuthRoleRevokePermission(AuthRoleRevokePermissionResponse { header })
            }
            other => unreachable!("{other:?} changes no users or roles"),
        })
    }

    fn enable(&mut self) -> Result<(), Error> {
        if self.auth.enabled {
            return Ok(());
        }
        let root = self.auth.user(ROOT_USER).ok_or(Error::RootUserNotExist)?;
        if !root.has_role(ROOT_ROLE) {
            return Err(Error::RootRoleNotExist);
        }
        self.set_enabled(true);
        self.changes.push(AuthChange::Enabled);
        Ok(())
    }

    fn disable(&mut self) {
        if self.auth.enabled {
            self.set_enabled(false);
            self.close();
            self.changes.push(AuthChange::Disabled);
        }
    }

    fn user_add(&mut self, request: AuthUserAddRequest) -> Result<(), Error> {
        if request.name.is_empty() {
            return Err(Error::UserEmpty);
        }
        if self.auth.user(&request.name).is_some() {
            return Err(Error::UserExists);
        }
        let options = request.options.unwrap_or_default();
        let password = if options.no_password {
            Bytes::new()
        } else {
            decode_hash(&request.password, &request.hashed_password)?
        };
        self.put_user(User {
            name: request.name.into(),
            password,
            roles: Vec::new(),
            options: Some(options),
        });
        self.close();
        Ok(())
    }

    fn user_delete(&mut self, request: AuthUserDeleteRequest) -> Result<(), Error> {
        if self.auth.enabled && request.name == ROOT_USER {
            return Err(Error::InvalidAuthManagement);
        }
        let key = keys::user_key(request.name.as_bytes());
        let entry = self.auth.users.remove(request.name.as_bytes());
        let entry = entry.ok_or(Error::UserNotFound)?;
        self.count(entry.digest, 0);
        self.batch.delete(keys::AUTH, &key);
        self.close();
        self.changes.push(AuthChange::TokensTaken { user: request.name });
        Ok(())
    }

    fn user_change_password(&mut self, request: AuthUserChangePasswordRequest) -> Result<(), Error> {
        let mut user = self.auth.user(&request.name).ok_or(Error::UserNotFound)?.clone();
        user.password = if user.has_no_password() {
            Bytes::new()
        } else {
            decode_hash(&request.password, &request.hashed_password)?
        };
        self.put_user(user);
        self.close();
        self.changes.push(AuthChange::TokensTaken { user: request.name });
        Ok(())
    }

    fn user_grant_role(&mut self, request: AuthUserGrantRoleRequest) -> Result<(), Error> {
        let mut user = self.auth.user(&request.user).ok_or(Error::UserNotFound)?.clone();
        if request.role != ROOT_ROLE && self.auth.role(&request.role).is_none() {
            return Err(Error::RoleNotFound);
        }
        let Err(at) = user.roles.binary_search(&request.role) else {
            return Ok(());
        };
        user.roles.insert(at, request.role);
        self.put_user(user);
        self.close();
        Ok(())
    }

    fn user_revoke_role(&mut self, request: &AuthUserRevokeRoleRequest) -> Result<(), Error> {
        if self.auth.enabled && request.name == ROOT_USER && request.role == ROOT_ROLE {
            return Err(Error::InvalidAuthManagement);
        }
        let mut user = self.auth.user(&request.name).ok_or(Error::UserNotFound)?.clone();
        if !user.has_role(&request.role) {
            return Err(Error::RoleNotGranted);
        }
        user.roles.retain(|role| *role != request.role);
        self.put_user(user);
        self.close();
        Ok(())
    }

    fn role_add(&mut self, request: AuthRoleAddRequest) -> Result<(), Error> {
        if request.name.is_empty() {
            return Err(Error::RoleEmpty);
        }
        if self.auth.role(&request.name).is_some() {
            return Err(Error::RoleExists);
        }
        self.put_role(Role {
            name: request.name.into(),
            key_permission: Vec::new(),
        });
        self.close();
        Ok(())
    }

    fn role_delete(&mut self, request: &AuthRoleDeleteRequest) -> Result<(), Error> {
        if self.auth.enabled && request.role == ROOT_ROLE {
            return Err(Error::InvalidAuthManagement);
        }
        let entry = self.auth.roles.remove(request.role.as_bytes());
        let entry = entry.ok_or(Error::RoleNotFound)?;
        self.count(entry.digest, 0);
        self.batch.delete(keys::AUTH, &keys::role_key(request.role.as_bytes()));
        for mut user in self.users_with(&request.role) {
            user.roles.retain(|role| *role != request.role);
            self.put_user(user);
        }
        self.close();
        Ok(())
    }

    fn role_grant_permission(&mut self, request: AuthRoleGrantPermissionRequest) -> Result<(), Error> {
        let granted = request.perm.ok_or(Error::PermissionNotGiven)?;
        let Permission {
            perm_type,
            key,
            range_end,
        } = granted;
        let is_range = key < range_end || range_end.is_empty() || range_end[..] == [0];
        if key.is_empty() || !is_range {
            return Err(Error::InvalidAuthManagement);
        }
        let mut role = self.auth.role(&request.name).ok_or(Error::RoleNotFound)?.clone();
        let permissions = &mut role.key_permission;
        let same = permissions
            .iter_mut()
            .find(|permission| (&permission.key, &permission.range_end) == (&key, &range_end));
        match same {
            Some(permission) => permission.perm_type = perm_type,
            None => {
                let at = permissions.partition_point(|permission| permission.key <= key);
                // Copies: the originals are slices of a log entry, which must not stay in memory for them.
                let permission = Permission {
                    perm_type,
                    key: Bytes::copy_from_slice(&key),
                    range_end: Bytes::copy_from_slice(&range_end),
                };
                permissions.insert(at, permission);
            }
        }
        self.put_role(role);
        self.close();
        Ok(())
    }

    fn role_revoke_permission(&mut self, request: &AuthRoleRevokePermissionRequest) -> Result<(), Error> {
        let mut role = self.auth.role(&request.role).ok_or(Error::RoleNotFound)?.clone();
        let before = role.key_permission.len();
        role.key_permission
            .retain(|permission| permission.key != request.key || permission.range_end != request.range_end);
        if role.key_permission.len() == before {
            return Err(Error::PermissionNotGranted);
        }
        self.put_role(role);
        self.close();
        Ok(())
    }

    /// Copies of the users that have a role.
    fn users_with(&self, role: &str) -> Vec<User> {
        let users = self.auth.users.values().map(|entry| &entry.user);
        users.filter(|user| user.has_role(role)).cloned().collect()
    }

    fn put_user(&mut self, user: User) {
        let (key, value) = (keys::user_key(&user.name), user.encode_to_vec());
        let digest = keys::auth_digest(&key, &value);
        self.batch.put(keys::AUTH, &key, &value);
        let entry = UserEntry {
            digest,
            access: OnceLock::new(),
            user,
        };
        let old = self.auth.users.insert(entry.user.name.clone(), Arc::new(entry));
        self.count(old.map_or(0, |old| old.digest), digest);
    }

    fn put_role(&mut self, role: Role) {
        let (key, value) = (keys::role_key(&role.name), role.encode_to_vec());
        let digest = keys::auth_digest(&key, &value);
        self.batch.put(keys::AUTH, &key, &value);
        let name = role.name.clone();
        let old = self
            .auth
            .roles
            .insert(name.clone(), Arc::new(RoleEntry { role, digest }));
        self.count(old.map_or(0, |old| old.digest), digest);
        // What its users may do is to be found out anew.
        for entry in self.auth.users.values_mut() {
            if entry.user.roles.iter().any(|of_user| of_user.as_bytes() == name) {
                *entry = Arc::new(UserEntry {
                    user: entry.user.clone(),
                    digest: entry.digest,
                    access: OnceLock::new(),
                });
            }
        }
    }

    fn set_enabled(&mut self, enabled: bool) {
        let value = keys::encode_auth_enabled(enabled);
        self.batch.put(keys::AUTH, keys::AUTH_ENABLED, &value);
        let digest = keys::auth_digest(keys::AUTH_ENABLED, &value);
        self.count(self.auth.enabled_digest, digest);
        self.auth.enabled = enabled;
        self.auth.enabled_digest = digest;
    }

    /// Ends a change: the next auth revision.
    fn close(&mut self) {
        self.auth.revision += 1;
        let value = keys::encode_auth_revision(self.auth.revision);
        self.batch.put(keys::AUTH, keys::AUTH_REVISION, &value);
        let digest = keys::auth_digest(keys::AUTH_REVISION, &value);
        self.count(self.auth.revision_digest, digest);
        self.auth.revision_digest = digest;
    }

    fn count(&mut self, old: u64, new: u64) {
        *self.digest = self.digest.wrapping_sub(old).wrapping_add(new);
    }
}

/// The hash of a password as the log has it.
fn decode_hash(password: &str, hashed: &str) -> Result<Bytes, Error> {
    // Only members older than etcd 3.5 put plain passwords into the log, and hashed them when they were applied, each
    // with a salt of its own.
    if !password.is_empty() && hashed.is_empty() {
        return Err(Error::NoPasswordUser);
    }
    let hash = BASE64_STANDARD.decode(hashed).map_err(|_| Error::NoPasswordUser)?;
    Ok(hash.into())
}
