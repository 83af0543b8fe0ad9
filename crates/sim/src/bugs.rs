//! Deliberate bugs, to prove that the checkers can fail. Each is a switch of the simulator's own drivers: what a server
//! around the replica, an engine or a log could get wrong. `metastore-sim --mutants` plants one after the other.

/// A deliberate bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// Writes are reported as persisted without a sync.
    NoSync,
    /// Writes are reported as persisted before they are synced.
    ReportBeforeSync,
    /// What a write reports includes the write after it.
    ReportTooMuch,
    /// The hard state is not synced when no entries come with it.
    VoteNotSynced,
    /// Of the hard states of merged writes the oldest wins.
    OldHardStateWins,
    /// Writes are merged even if one replaces entries of another.
    MergeOverlapping,
    /// The log is trimmed up to what is applied, not what is durable.
    TrimApplied,
    /// The log is trimmed beyond what the replica was told to be applied.
    TrimUnknown,
    /// The log is trimmed one entry too far.
    TrimOneTooMany,
    /// A flush makes everything durable but the family with the applied index: entries are applied twice.
    FlushForgetsIndex,
    /// A flush makes the applied index durable before the data.
    FlushIndexFirst,
    /// Raft follows refused changes of members as well.
    FollowRefusedChanges,
    /// Raft does not follow changes of members.
    IgnoreChanges,
    /// Reads are served without a read index.
    ReadWithoutIndex,
    /// Reads do not wait until their index is applied.
    ReadBeforeApplied,
    /// The last key of a snapshot is lost on the way.
    SnapshotLosesKey,
    /// The keys' history is missing in a snapshot.
    SnapshotLosesHistory,
    /// A snapshot's leases are missing.
    SnapshotLosesLeases,
    /// A crash after an install finds the old engine.
    InstallNotDurable,
    /// An install keeps the old log.
    InstallKeepsLog,
    /// An install forgets the hard state.
    InstallLosesVote,
    /// The sender of a snapshot is never told how it ended.
    SnapshotNotReported,
    /// Operations whose entries an install drops are never answered.
    DroppedNotAnswered,
    /// Every start has the same incarnation.
    SameIncarnation,
    /// A restart begins with an empty log and engine under the same id.
    ForgetOnRestart,
    /// Revocations are proposed whoever leads when they get to the log.
    RevokeInAnyTerm,
    /// A new leader goes on with the times that it knew, instead of giving every lease its full time.
    LeaseTimeNotReset,
    /// Leases are kept alive by whoever thinks that it leads, without asking the others.
    KeepAliveUnconfirmed,
    /// The lessor is not told of revocations that were refused or had no effect.
    RevocationsStayUnderWay,
    /// Leases that come with a snapshot are not watched.
    InstallForgetsLessor,
    /// A watcher that resumes skips a revision.
    ResumeSkips,
    /// A watcher that resumes repeats a revision.
    ResumeRepeats,
    /// A follower's apply thread skips an entry's operations now and then.
    ApplySkips,
    /// Ticks stop for good some time.
    TicksStop,
    /// A flush loses a write.
    FlushLosesWrite,
    /// Messages lose their first entry.
    MessageLosesEntry,
    /// A read uses the index that the read before it got.
    ReadIndexReused,
    /// A restart finds no hard state.
    HardStateLost,
    /// A member ends leases as soon as it leads, before the first entry of its term is applied.
    LeadTooEarly,
    /// Keep-alives do not take back what the log says is left of a lease.
    CheckpointStays,
    /// A watcher loses an answer now and then.
    WatchLosesEvents,
    /// Two pieces of work of the apply thread change places.
    ApplyReordered,
    /// The engine has no checksums: a flipped bit is not found out.
    NoChecksums,
    /// Refusals get lost on the way to the client.
    RejectLost,
    /// Whoever reads is not asked who it is.
    ReadWhateverIsPermitted,
}

impl Bug {
    /// All of them.
    pub const ALL: &[Bug] = &[
        Bug::NoSync,
        Bug::ReportBeforeSync,
        Bug::ReportTooMuch,
        Bug::VoteNotSynced,
        Bug::OldHardStateWins,
        Bug::MergeOverlapping,
        Bug::TrimApplied,
        Bug::TrimUnknown,
        Bug::TrimOneTooMany,
        Bug::FlushForgetsIndex,
        Bug::FlushIndexFirst,
        Bug::FollowRefusedChanges,
        Bug::IgnoreChanges,
        Bug::ReadWithoutIndex,
        Bug::ReadBeforeApplied,
        Bug::SnapshotLosesKey,
        Bug::SnapshotLosesHistory,
        Bug::SnapshotLosesLeases,
        Bug::InstallNotDurable,
        Bug::InstallKeepsLog,
        Bug::InstallLosesVote,
        Bug::SnapshotNotReported,
        Bug::DroppedNotAnswered,
        Bug::SameIncarnation,
        Bug::ForgetOnRestart,
        Bug::RevokeInAnyTerm,
        Bug::LeaseTimeNotReset,
        Bug::KeepAliveUnconfirmed,
        Bug::RevocationsStayUnderWay,
        Bug::InstallForgetsLessor,
        Bug::ResumeSkips,
        Bug::ResumeRepeats,
        Bug::ApplySkips,
        Bug::TicksStop,
        Bug::FlushLosesWrite,
        Bug::MessageLosesEntry,
        Bug::ReadIndexReused,
        Bug::HardStateLost,
        Bug::LeadTooEarly,
        Bug::CheckpointStays,
        Bug::WatchLosesEvents,
        Bug::ApplyReordered,
        Bug::NoChecksums,
        Bug::RejectLost,
        Bug::ReadWhateverIsPermitted,
    ];

    /// The bug of that name.
    pub fn of_name(name: &str) -> Option<Bug> {
        Bug::ALL.iter().copied().find(|bug| format!("{bug:?}") == name)
    }
}
