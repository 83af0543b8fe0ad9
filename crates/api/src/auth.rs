//! Users, roles and permissions: records, requests and replies.
//!
//! Hand-derived protobuf messages with etcd's field numbers (`auth.proto`, `rpc.proto`, `raft_internal.proto`), as in
//! [`crate::kv`]; a test of the front end holds them against the .proto files. Whatever holds a secret keeps it out of
//! its `Debug`.

use std::fmt;

use bytes::Bytes;

use crate::codec::Action;
use crate::kv::ResponseHeader;

/// The user that cannot be deleted while auth is on.
pub const ROOT_USER: &str = "root";
/// The role that may do everything. It need not exist to be granted.
pub const ROOT_ROLE: &str = "root";
/// The auth revision of a store whose users and roles were never changed.
pub const FIRST_AUTH_REVISION: u64 = 1;
/// The longest password that bcrypt hashes whole, in bytes.
pub const PASSWORD_BYTES_MAX: usize = 72;

/// What is special about a user.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct UserAddOptions {
    /// Such a user logs in with a client certificate only.
    #[prost(bool, tag = "1")]
    pub no_password: bool,
}

/// A user, as it is stored.
#[derive(Clone, PartialEq, Eq, prost::Message)]
#[prost(skip_debug)]
pub struct User {
    /// Its name.
    #[prost(bytes = "bytes", tag = "1")]
    pub name: Bytes,
    /// The bcrypt hash of its password; empty when it has none.
    #[prost(bytes = "bytes", tag = "2")]
    pub password: Bytes,
    /// The names of its roles, in order.
    #[prost(string, repeated, tag = "3")]
    pub roles: Vec<String>,
    /// What is special about it.
    #[prost(message, optional, tag = "4")]
    pub options: Option<UserAddOptions>,
}

impl User {
    /// Whether the user logs in with a client certificate only.
    pub fn has_no_password(&self) -> bool {
        self.options.as_ref().is_some_and(|options| options.no_password)
    }

    /// Whether the user has a role.
    pub fn has_role(&self, role: &str) -> bool {
        self.roles.iter().any(|of_user| of_user == role)
    }
}

impl fmt::Debug for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("User")
            .field("name", &self.name)
            .field("roles", &self.roles)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// What a permission lets one do with its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
#[allow(missing_docs, reason = "the names say it")]
pub enum PermissionType {
    Read = 0,
    Write = 1,
    Readwrite = 2,
}

/// What one may do with a range of keys.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Permission {
    /// A [`PermissionType`]; an unknown one permits nothing.
    #[prost(int32, tag = "1")]
    pub perm_type: i32,
    /// The first key.
    #[prost(bytes = "bytes", tag = "2")]
    pub key: Bytes,
    /// The end of the range, in etcd's notation (see [`crate::Span::new`]).
    #[prost(bytes = "bytes", tag = "3")]
    pub range_end: Bytes,
}

/// A role, as it is stored.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Role {
    /// Its name.
    #[prost(bytes = "bytes", tag = "1")]
    pub name: Bytes,
    /// What it permits, in order of the keys.
    #[prost(message, repeated, tag = "2")]
    pub key_permission: Vec<Permission>,
}

/// Turns auth on.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct AuthEnableRequest {}

/// Turns auth off.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct AuthDisableRequest {}

/// Asks whether auth is on.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct AuthStatusRequest {}

/// Asks for a token.
#[derive(Clone, PartialEq, Eq, prost::Message)]
#[prost(skip_debug)]
pub struct AuthenticateRequest {
    /// The user.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its password.
    #[prost(string, tag = "2")]
    pub password: String,
}

/// Gives a user, whose password was checked already, a simple token: this goes through the log, so that every member
/// knows the token.
#[derive(Clone, PartialEq, Eq, prost::Message)]
#[prost(skip_debug)]
pub struct InternalAuthenticateRequest {
    /// The user.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Unused, and empty; etcd has it.
    #[prost(string, tag = "2")]
    pub password: String,
    /// The first part of the token. The second one is a dot and the index of the log entry.
    #[prost(string, tag = "3")]
    pub simple_token: String,
}

/// Adds a user.
#[derive(Clone, PartialEq, Eq, prost::Message)]
#[prost(skip_debug)]
pub struct AuthUserAddRequest {
    /// Its name; not empty.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its password, from the client. It never gets into the log.
    #[prost(string, tag = "2")]
    pub password: String,
    /// What is special about it.
    #[prost(message, optional, tag = "3")]
    pub options: Option<UserAddOptions>,
    /// The bcrypt hash of its password in base64: what the log holds.
    #[prost(string, tag = "4")]
    pub hashed_password: String,
}

/// Asks for a user's roles.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AuthUserGetRequest {
    /// The user.
    #[prost(string, tag = "1")]
    pub name: String,
}

/// Lists the users.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct AuthUserListRequest {}

/// Deletes a user.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AuthUserDeleteRequest {
    /// The user.
    #[prost(string, tag = "1")]
    pub name: String,
}

/// Gives a user another password.
#[derive(Clone, PartialEq, Eq, prost::Message)]
#[prost(skip_debug)]
pub struct AuthUserChangePasswordRequest {
    /// The user.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its new password, from the client. It never gets into the log.
    #[prost(string, tag = "2")]
    pub password: String,
    /// The bcrypt hash of the new password in base64: what the log holds.
    #[prost(string, tag = "3")]
    pub hashed_password: String,
}

/// Gives a user a role.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AuthUserGrantRoleRequest {
    /// The user.
    #[prost(string, tag = "1")]
    pub user: String,
    /// The role.
    #[prost(string, tag = "2")]
    pub role: String,
}

/// Takes a role from a user.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AuthUserRevokeRoleRequest {
    /// The user.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The role.
    #[prost(string, tag = "2")]
    pub role: String,
}

/// Adds a role.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AuthRoleAddRequest {
    /// Its name; not empty.
    #[prost(string, tag = "1")]
    pub name: String,
}

/// Asks what a role permits.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AuthRoleGetRequest {
    /// The role.
    #[prost(string, tag = "1")]
    pub role: String,
}

/// Lists the roles.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct AuthRoleListRequest {}

/// Deletes a role, and takes it from all users.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AuthRoleDeleteRequest {
    /// The role.
    #[prost(string, tag = "1")]
    pub role: String,
}

/// Adds a permission to a role, or changes the type of the one with the same range.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AuthRoleGrantPermissionRequest {
    /// The role.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The permission.
    #[prost(message, optional, tag = "2")]
    pub perm: Option<Permission>,
}

/// Takes the permission on a range from a role.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AuthRoleRevokePermissionRequest {
    /// The role.
    #[prost(string, tag = "1")]
    pub role: String,
    /// The first key.
    #[prost(bytes = "bytes", tag = "2")]
    pub key: Bytes,
    /// The end of the range, as it was granted.
    #[prost(bytes = "bytes", tag = "3")]
    pub range_end: Bytes,
}

macro_rules! bare_responses {
    ($($name:ident $request:ident;)*) => {
        $(
            #[doc = concat!("Answers an [`", stringify!($request), "`].")]
            #[derive(Clone, PartialEq, Eq, prost::Message)]
            pub struct $name {
                /// Who answered.
                #[prost(message, optional, tag = "1")]
                pub header: Option<ResponseHeader>,
            }
        )*
    };
}

bare_responses! {
    AuthEnableResponse AuthEnableRequest;
    AuthDisableResponse AuthDisableRequest;
    AuthUserAddResponse AuthUserAddRequest;
    AuthUserDeleteResponse AuthUserDeleteRequest;
    AuthUserChangePasswordResponse AuthUserChangePasswordRequest;
    AuthUserGrantRoleResponse AuthUserGrantRoleRequest;
    AuthUserRevokeRoleResponse AuthUserRevokeRoleRequest;
    AuthRoleAddResponse AuthRoleAddRequest;
    AuthRoleDeleteResponse AuthRoleDeleteRequest;
    AuthRoleGrantPermissionResponse AuthRoleGrantPermissionRequest;
    AuthRoleRevokePermissionResponse AuthRoleRevokePermissionRequest;
}

/// Answers an [`AuthStatusRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AuthStatusResponse {
    /// Who answered.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// Whether auth is on.
    #[prost(bool, tag = "2")]
    pub enabled: bool,
    /// Counts the changes of users and roles.
    #[prost(uint64, tag = "3")]
    pub auth_revision: u64,
}

/// Answers an [`AuthenticateRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
#[prost(skip_debug)]
pub struct AuthenticateResponse {
    /// Who answered.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// Shows who one is from now on.
    #[prost(string, tag = "2")]
    pub token: String,
}

/// Answers an [`AuthUserGetRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AuthUserGetResponse {
    /// Who answered.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// The user's roles, in order.
    #[prost(string, repeated, tag = "2")]
    pub roles: Vec<String>,
}

/// Answers an [`AuthUserListRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AuthUserListResponse {
    /// Who answered.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// The users' names, in order.
    #[prost(string, repeated, tag = "2")]
    pub users: Vec<String>,
}

/// Answers an [`AuthRoleGetRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AuthRoleGetResponse {
    /// Who answered.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// What the role permits, in order of the keys.
    #[prost(message, repeated, tag = "2")]
    pub perm: Vec<Permission>,
}

/// Answers an [`AuthRoleListRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AuthRoleListResponse {
    /// Who answered.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// The roles' names, in order.
    #[prost(string, repeated, tag = "2")]
    pub roles: Vec<String>,
}

macro_rules! without_secrets {
    ($($name:ident: $($field:ident)*;)*) => {
        $(
            impl fmt::Debug for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.debug_struct(stringify!($name))
                        $(.field(stringify!($field), &self.$field))*
                        .finish_non_exhaustive()
                }
            }
        )*
    };
}

without_secrets! {
    AuthenticateRequest: name;
    InternalAuthenticateRequest: name;
    AuthUserAddRequest: name options;
    AuthUserChangePasswordRequest: name;
    AuthenticateResponse: header;
}

/// A request about users and roles, for [`crate::Store::auth`].
pub trait Request: Send + 'static {
    /// What it is answered with.
    type Response: Send + 'static;

    /// The operation that the log holds.
    fn into_action(self) -> Action;

    /// Takes this request's response from an answer; `None` if it is the answer to another request.
    fn response(answer: Answer) -> Option<Self::Response>;
}

macro_rules! requests {
    ($($variant:ident: $request:ident => $response:ident;)*) => {
        /// The answer to any [`Request`].
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs, reason = "each is the response of that name")]
        pub enum Answer {
            $($variant($response),)*
        }

        impl Answer {
            /// Who answers.
            pub fn header(&self) -> Option<&ResponseHeader> {
                match self {
                    $(Answer::$variant(response) => response.header.as_ref(),)*
                }
            }

            /// Says who answers.
            pub fn header_mut(&mut self) -> &mut Option<ResponseHeader> {
                match self {
                    $(Answer::$variant(response) => &mut response.header,)*
                }
            }
        }

        $(
            impl Request for $request {
                type Response = $response;

                fn into_action(self) -> Action {
                    Action::$variant(self)
                }

                fn response(answer: Answer) -> Option<$response> {
                    match answer {
                        Answer::$variant(response) => Some(response),
                        _ => None,
                    }
                }
            }
        )*
    };
}

requests! {
    AuthEnable: AuthEnableRequest => AuthEnableResponse;
    AuthDisable: AuthDisableRequest => AuthDisableResponse;
    AuthStatus: AuthStatusRequest => AuthStatusResponse;
    AuthUserAdd: AuthUserAddRequest => AuthUserAddResponse;
    AuthUserDelete: AuthUserDeleteRequest => AuthUserDeleteResponse;
    AuthUserGet: AuthUserGetRequest => AuthUserGetResponse;
    AuthUserChangePassword: AuthUserChangePasswordRequest => AuthUserChangePasswordResponse;
    AuthUserGrantRole: AuthUserGrantRoleRequest => AuthUserGrantRoleResponse;
    AuthUserRevokeRole: AuthUserRevokeRoleRequest => AuthUserRevokeRoleResponse;
    AuthUserList: AuthUserListRequest => AuthUserListResponse;
    AuthRoleList: AuthRoleListRequest => AuthRoleListResponse;
    AuthRoleAdd: AuthRoleAddRequest => AuthRoleAddResponse;
    AuthRoleDelete: AuthRoleDeleteRequest => AuthRoleDeleteResponse;
    AuthRoleGet: AuthRoleGetRequest => AuthRoleGetResponse;
    AuthRoleGrantPermission: AuthRoleGrantPermissionRequest => AuthRoleGrantPermissionResponse;
    AuthRoleRevokePermission: AuthRoleRevokePermissionRequest => AuthRoleRevokePermissionResponse;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_stay_out_of_debug() {
        let secret = || "s3cret".to_owned();
        let shown = [
            format!(
                "{:?}",
                AuthenticateRequest {
                    password: secret(),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                InternalAuthenticateRequest {
                    simple_token: secret(),
                    password: secret(),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                AuthUserAddRequest {
                    password: secret(),
                    hashed_password: secret(),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                AuthUserChangePasswordRequest {
                    password: secret(),
                    hashed_password: secret(),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                AuthenticateResponse {
                    token: secret(),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                User {
                    password: secret().into(),
                    ..Default::default()
                }
            ),
        ];
        for shown in shown {
            assert!(!shown.contains("s3cret"), "{shown}");
        }
    }
}
