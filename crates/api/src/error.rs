//! What a client can be told when its request is not carried out.
//!
//! The texts and codes are etcd's (`api/v3rpc/rpctypes`), since clients compare them word for word.

use std::fmt;

/// What the client should do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The same request can succeed later or elsewhere.
    Retry,
    /// The request must be changed first.
    Fix,
    /// Neither helps: the store itself is damaged or does not offer it.
    GiveUp,
}

/// The canonical status codes, as gRPC numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
#[allow(missing_docs, reason = "the names are gRPC's own")]
pub enum Code {
    Canceled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
    Unauthenticated = 16,
}

macro_rules! errors {
    ($($(#[$doc:meta])* $name:ident, $code:ident, $kind:ident, $text:literal;)*) => {
        /// Everything that a client's request can be refused with.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Error {
            $($(#[$doc])* $name,)*
        }

        impl Error {
            /// Every error there is, for tables and tests.
            pub const ALL: &[Error] = &[$(Error::$name,)*];

            /// The status code that goes over the wire.
            pub fn code(self) -> Code {
                match self { $(Error::$name => Code::$code,)* }
            }

            /// Whether to retry, to fix the request or to give up.
            pub fn kind(self) -> ErrorKind {
                match self { $(Error::$name => ErrorKind::$kind,)* }
            }

            /// etcd's text for it.
            pub fn message(self) -> &'static str {
                match self { $(Error::$name => $text,)* }
            }
        }
    };
}

errors! {
    /// A request without a key.
    EmptyKey, InvalidArgument, Fix, "etcdserver: key is not provided";
    /// `ignore_value` or `ignore_lease` on a missing key, or an operation without content in a transaction.
    KeyNotFound, InvalidArgument, Fix, "etcdserver: key not found";
    /// `ignore_value` together with a value.
    ValueProvided, InvalidArgument, Fix, "etcdserver: value is provided";
    /// `ignore_lease` together with a lease.
    LeaseProvided, InvalidArgument, Fix, "etcdserver: lease is provided";
    /// More than `--max-txn-ops` compares or operations.
    TooManyOps, InvalidArgument, Fix, "etcdserver: too many operations in txn request";
    /// One key written twice on a path through a transaction.
    DuplicateKey, InvalidArgument, Fix, "etcdserver: duplicate key given in txn request";
    /// The `client-api-version` metadata is not UTF-8.
    InvalidClientApiVersion, InvalidArgument, Fix, "etcdserver: invalid client api version";
    /// A sort order or target that does not exist.
    InvalidSortOption, InvalidArgument, Fix, "etcdserver: invalid sort option";
    /// Larger than `--max-request-bytes`.
    RequestTooLarge, InvalidArgument, Fix, "etcdserver: request is too large";
    /// Peer URLs that do not parse.
    BadMemberUrls, InvalidArgument, Fix, "etcdserver: given member URLs are invalid";
    /// A user request without a name.
    UserEmpty, InvalidArgument, Fix, "etcdserver: user name is empty";
    /// A role request without a name.
    RoleEmpty, InvalidArgument, Fix, "etcdserver: role name is empty";
    /// Wrong user or password.
    AuthFailed, InvalidArgument, Fix, "etcdserver: authentication failed, invalid user ID or password";
    /// A permission request without a permission.
    PermissionNotGiven, InvalidArgument, Fix, "etcdserver: permission not given";
    /// What would lock everyone out while auth is on, or a permission on a range that is none.
    InvalidAuthManagement, InvalidArgument, Fix, "etcdserver: invalid auth management";
    /// Users or roles changed since the user was checked.
    AuthOldRevision, InvalidArgument, Retry, "etcdserver: revision of auth store is old";
    /// The revision was compacted away.
    Compacted, OutOfRange, Fix, "etcdserver: mvcc: required revision has been compacted";
    /// The revision has not happened yet.
    FutureRevision, OutOfRange, Fix, "etcdserver: mvcc: required revision is a future revision";
    /// A lease longer than [`crate::limits::LEASE_TTL_MAX_S`].
    LeaseTtlTooLarge, OutOfRange, Fix, "etcdserver: too large lease TTL";
    /// The disk (or the quota) is full.
    NoSpace, ResourceExhausted, Retry, "etcdserver: mvcc: database space exceeded";
    /// Too many proposals wait for consensus. etcd has a ResourceExhausted error for it, but what reaches the wire is
    /// Unknown, and clients were built against that.
    TooManyRequests, Unknown, Retry, "etcdserver: too many requests";
    /// No lease of that id.
    LeaseNotFound, NotFound, Fix, "etcdserver: requested lease not found";
    /// No member of that id.
    MemberNotFound, NotFound, Fix, "etcdserver: member not found";
    /// The lease id is taken.
    LeaseExists, FailedPrecondition, Fix, "etcdserver: lease already exists";
    /// The member id is taken.
    MemberExists, FailedPrecondition, Fix, "etcdserver: member ID already exist";
    /// A peer URL is taken.
    PeerUrlExists, FailedPrecondition, Fix, "etcdserver: Peer URLs already exists";
    /// Promoting what is no learner.
    MemberNotLearner, FailedPrecondition, Fix, "etcdserver: can only promote a learner member";
    /// Auth is off.
    AuthNotEnabled, FailedPrecondition, Fix, "etcdserver: authentication is not enabled";
    /// Enabling auth without a root user.
    RootUserNotExist, FailedPrecondition, Fix, "etcdserver: root user does not exist";
    /// Enabling auth while user root does not have role root.
    RootRoleNotExist, FailedPrecondition, Fix, "etcdserver: root user does not have root role";
    /// The user name is taken.
    UserExists, FailedPrecondition, Fix, "etcdserver: user name already exists";
    /// The role name is taken.
    RoleExists, FailedPrecondition, Fix, "etcdserver: role name already exists";
    /// Taking a role that the user does not have.
    RoleNotGranted, FailedPrecondition, Fix, "etcdserver: role is not granted to the user";
    /// Taking a permission that the role does not have.
    PermissionNotGranted, FailedPrecondition, Fix, "etcdserver: permission is not granted to the role";
    /// No user of that name.
    UserNotFound, FailedPrecondition, Fix, "etcdserver: user name not found";
    /// No role of that name.
    RoleNotFound, FailedPrecondition, Fix, "etcdserver: role name not found";
    /// Leader-only request at another member.
    NotLeader, FailedPrecondition, Retry, "etcdserver: not leader";
    /// A transferee that is unknown or a learner.
    BadLeaderTransferee, FailedPrecondition, Fix, "etcdserver: bad leader transferee";
    /// The feature is not available in this cluster.
    NotCapable, FailedPrecondition, GiveUp, "etcdserver: not capable";
    /// Learners serve reads only.
    NotSupportedForLearner, FailedPrecondition, Retry, "etcdserver: rpc not supported for learner";
    /// A downgrade to something that is no version.
    WrongDowngradeVersionFormat, InvalidArgument, Fix, "etcdserver: wrong downgrade target version format";
    /// A downgrade to any version but the one before the cluster's.
    InvalidDowngradeTargetVersion, InvalidArgument, Fix, "etcdserver: invalid downgrade target version";
    /// A downgrade while another one is under way.
    DowngradeInProcess, FailedPrecondition, Retry, "etcdserver: cluster has a downgrade job in progress";
    /// Cancelling a downgrade that was never begun.
    NoInflightDowngrade, FailedPrecondition, Fix, "etcdserver: no inflight downgrade job";
    /// Not allowed.
    PermissionDenied, PermissionDenied, Fix, "etcdserver: permission denied";
    /// The auth token is unknown or expired.
    InvalidAuthToken, Unauthenticated, Fix, "etcdserver: invalid auth token";
    /// The data of this cluster is damaged.
    Corrupt, DataLoss, GiveUp, "etcdserver: corrupt cluster";
    /// No leader is known.
    NoLeader, Unavailable, Retry, "etcdserver: no leader";
    /// The leader changed before the request was committed.
    LeaderChanged, Unavailable, Retry, "etcdserver: leader changed";
    /// The node is stopping.
    Stopped, Unavailable, Retry, "etcdserver: server stopped";
    /// Consensus took too long.
    Timeout, Unavailable, Retry, "etcdserver: request timed out";
    /// Consensus took too long, and the leader was lost meanwhile.
    TimeoutLeaderFail, Unavailable, Retry,
        "etcdserver: request timed out, possibly due to previous leader failure";
    /// Consensus took too long, and a quorum was out of reach.
    TimeoutConnectionLost, Unavailable, Retry,
        "etcdserver: request timed out, possibly due to connection lost";
    /// The node lags behind the index that the read needs.
    TimeoutWaitAppliedIndex, Unavailable, Retry,
        "etcdserver: request timed out, waiting for the applied index took too long";
    /// A learner that lags too far behind the leader to become a voter.
    LearnerNotReady, FailedPrecondition, Retry,
        "etcdserver: can only promote a learner member which is in sync with leader";
    /// As many learners as `--max-learners` allows are there already.
    TooManyLearners, FailedPrecondition, Fix, "etcdserver: too many learner members in cluster";
    /// A membership change after which the members that were ever started would be no quorum. What reaches the wire from
    /// etcd is Unknown.
    NotEnoughStarted, Unknown, Fix,
        "etcdserver: re-configuration failed due to not enough started members";
    /// The new leader did not take over in time. etcd has no code for it.
    TimeoutLeaderTransfer, Unknown, Retry, "etcdserver: request timed out, leader transfer took too long";
    /// A password for a user that logs in with a certificate. etcd has no code for it.
    NoPasswordUser, Unknown, Fix, "auth: authentication failed, password was given for no password user";
    /// A password of more than 72 bytes, which bcrypt would cut off. The text is that of Go's bcrypt.
    PasswordTooLong, Unknown, Fix, "bcrypt: password length exceeds 72 bytes";
    /// This member has only the public key of `--auth-token=jwt`. etcd has no code for it.
    VerifyOnly, Unknown, GiveUp, "auth: token signing attempted with verify-only key";
    /// Too few members are up for a membership change.
    Unhealthy, Unavailable, Retry, "etcdserver: unhealthy cluster";
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Clients map text back to an error (etcd's `rpctypes.Error`), so no two may share one.
    #[test]
    fn texts_are_unique_and_prefixed() {
        let mut seen = std::collections::HashSet::new();
        // Those that etcd has no code for reach the wire in the words of where they come from.
        let others = [Error::NoPasswordUser, Error::PasswordTooLong, Error::VerifyOnly];
        for error in Error::ALL {
            let prefixed = error.message().starts_with("etcdserver: ");
            assert!(prefixed || others.contains(error), "{error:?}");
            assert!(seen.insert(error.message()), "{error:?} repeats a text");
        }
    }
}
