//! Every flag, once: what it is called, what it holds, its default, and whether it does anything yet.
//!
//! Names and defaults are those of etcd 3.7, so that a command line written for it means the same here. The help, the
//! environment variables and the configuration file are all derived from this table.

use super::value::Kind;

/// What becomes of a flag that the user sets to something other than its default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It does what its help says.
    Works,
    /// It is taken, for this reason has nothing to do, and the log says so.
    NoEffect(&'static str),
    /// The node refuses to start, for this reason: ignoring it would weaken security or correctness.
    Refused(&'static str),
}

/// The headings of the help, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// This member: its name, directory, addresses and limits.
    Member,
    /// The engine below.
    Engine,
    /// How writes are batched and cached.
    WritePath,
    /// The cluster around this member.
    Clustering,
    /// History and its removal.
    Compaction,
    /// TLS.
    Security,
    /// Users and tokens.
    Auth,
    /// Logs.
    Logging,
    /// Metrics, warnings, tracing.
    Monitoring,
    /// Flags that etcd marks as unsafe.
    Unsafe,
    /// Flags of etcd's own storage and checks.
    Etcd,
    /// Not flags of the node itself.
    General,
}

impl Group {
    /// Every group, in the order of the help.
    pub const ALL: &[Group] = &[
        Group::General,
        Group::Member,
        Group::Engine,
        Group::WritePath,
        Group::Clustering,
        Group::Compaction,
        Group::Security,
        Group::Auth,
        Group::Logging,
        Group::Monitoring,
        Group::Unsafe,
        Group::Etcd,
    ];

    /// The heading.
    pub fn title(self) -> &'static str {
        match self {
            Group::Member => "Member",
            Group::Engine => "Storage engine",
            Group::WritePath => "Write path",
            Group::Clustering => "Clustering",
            Group::Compaction => "History and compaction",
            Group::Security => "Security",
            Group::Auth => "Auth",
            Group::Logging => "Logging",
            Group::Monitoring => "Monitoring",
            Group::Unsafe => "Unsafe",
            Group::Etcd => "Taken for etcd's sake",
            Group::General => "General",
        }
    }
}

/// One flag.
#[derive(Debug, Clone, Copy)]
pub struct Flag {
    /// Its heading in the help.
    pub group: Group,
    /// Its name, without dashes in front.
    pub name: &'static str,
    /// What it holds.
    pub kind: Kind,
    /// Its default, in the form in which it is written on a command line.
    pub default: &'static str,
    /// The unit of a bare number, or nothing.
    pub unit: &'static str,
    /// What it does.
    pub help: &'static str,
    /// Whether it does it yet.
    pub status: Status,
}

const BBOLT: Status = Status::NoEffect("it tunes a storage file that MetaStore does not have");
const CHECKS: Status = Status::NoEffect("members compare their states all the time");

const NUMBER: Kind = Kind::Number(u64::MAX);
const U32: Kind = Kind::Number(u32::MAX as u64);

const fn flag(
    group: Group,
    name: &'static str,
    kind: Kind,
    default: &'static str,
    unit: &'static str,
    status: Status,
    help: &'static str,
) -> Flag {
    Flag {
        group,
        name,
        kind,
        default,
        unit,
        help,
        status,
    }
}

use Group::{
    Auth, Clustering, Compaction, Engine, Etcd, General, Logging, Member, Monitoring, Security, Unsafe, WritePath,
};
use Kind::{Bool, Bytes, Choice, Duration, Gates, List, Text, Urls};
use Status::{NoEffect, Refused, Works};

/// The flags, in the order of the help.
#[rustfmt::skip]
pub const FLAGS: &[Flag] = &[
    // General.
    flag(General, "config-file", Text, "", "", Works,
        "Read all settings from this YAML file. As with etcd, the other flags and all environment variables are then ignored."),
    flag(General, "version", Bool, "false", "", Works, "Print the version and exit."),

    // Member.
    flag(Member, "name", Text, "default", "", Works, "Human-readable name of this member."),
    flag(Member, "data-dir", Text, "", "", Works,
        "Directory of everything this member stores. When empty: <name>.metastore in the working directory."),
    flag(Member, "wal-dir", Text, "", "", Works,
        "Directory of the Raft log, for those who keep it on a disk of its own. When empty: inside the data directory."),
    flag(Member, "listen-client-urls", Urls, "http://localhost:2379", "", Works,
        "Where to listen for clients: gRPC and HTTP on one port. Setting it requires --advertise-client-urls too."),
    flag(Member, "advertise-client-urls", Urls, "http://localhost:2379", "", Works,
        "The client URLs that other members and clients are told."),
    flag(Member, "listen-client-http-urls", Urls, "", "", Works,
        "Where to listen for HTTP alone; --listen-client-urls then serves gRPC alone."),
    flag(Member, "listen-http-urls", Urls, "", "", Works,
        "Where to listen for the HTTP API alone, which --listen-client-urls serves too. https URLs take the client port's certificates."),
    flag(Member, "listen-peer-urls", Urls, "http://localhost:2380", "", Works,
        "Where to listen for the other members."),
    flag(Member, "heartbeat-interval", NUMBER, "100", "milliseconds", Works, "Time between two heartbeats of a leader."),
    flag(Member, "election-timeout", NUMBER, "1000", "milliseconds", Works,
        "Time without a leader after which an election starts. At least 5 heartbeats, at most 50000."),
    flag(Member, "initial-election-tick-advance", Bool, "true", "", NoEffect("a member that is alone elects itself at once, and others wait one election timeout"), "Shorten the first election after a start."),
    flag(Member, "quota-backend-bytes", Bytes, "0", "bytes", Works,
        "Size of the data, with its history, at which writes are refused and an alarm is raised. 0 means as much as the disk has room for above --disk-reserve-bytes."),
    flag(Member, "max-txn-ops", NUMBER, "128", "operations", Works, "Most operations, and most compares, in one transaction."),
    flag(Member, "max-request-bytes", Bytes, "1572864", "bytes", Works, "Largest request that a client may send."),
    flag(Member, "max-concurrent-streams", U32, "4294967295", "streams", Works, "Most calls at a time on one client connection."),
    flag(Member, "grpc-keepalive-min-time", Duration, "5s", "", NoEffect("clients may ping as often as they like"),
        "Shortest time between two pings of a client before it is disconnected."),
    flag(Member, "grpc-keepalive-interval", Duration, "2h0m0s", "", Works,
        "Time without traffic after which the server pings a client. If this or the timeout is 0, the defaults hold for both."),
    flag(Member, "grpc-keepalive-timeout", Duration, "20s", "", Works, "How long that ping may stay unanswered."),
    flag(Member, "socket-reuse-port", Bool, "false", "", Works, "Set SO_REUSEPORT on listeners."),
    flag(Member, "socket-reuse-address", Bool, "false", "", Works, "Set SO_REUSEADDR on listeners."),
    flag(Member, "watch-progress-notify-interval", Duration, "0s", "", Works,
        "Time between two progress notices to a watcher that asked for them and has no events. 0 means 10m."),
    flag(Member, "enable-grpc-gateway", Bool, "true", "", Works, "Serve the gRPC calls as JSON over HTTP too."),
    flag(Member, "feature-gates", Gates, "", "", Works, "Switch etcd's optional features on or off; the log says of each but SetMemberLocalAddr why it changes nothing here."),

    // Storage engine: ours.
    flag(Engine, "storage", Choice(&["rocksdb", "memory"]), "rocksdb", "", Works,
        "What holds the data: rocksdb, or memory with snapshots on disk. Both are durable: the Raft log is on disk either way."),
    flag(Engine, "rocksdb-background-jobs", U32, "4", "threads", Works, "Most flushes and compactions of RocksDB at a time."),
    flag(Engine, "rocksdb-write-buffer-bytes", Bytes, "64MiB", "bytes", Works, "Size of one write buffer. A put fills two, so they are flushed when all together have twice as much."),
    flag(Engine, "rocksdb-max-write-buffers", U32, "3", "buffers", Works, "Most write buffers, full ones included, per column family."),
    flag(Engine, "rocksdb-target-file-bytes", Bytes, "64MiB", "bytes", Works, "Size of a table file at the lowest level."),
    flag(Engine, "rocksdb-block-cache-bytes", Bytes, "128MiB", "bytes", Works, "Memory for uncompressed blocks, index and filter blocks included."),
    flag(Engine, "rocksdb-bloom-bits", U32, "10", "bits a key", Works, "Size of the bloom filters. 0 means none."),
    flag(Engine, "rocksdb-compression", Choice(&["lz4", "zstd", "none"]), "lz4", "", Works, "How table files are compressed."),
    flag(Engine, "rocksdb-wal", Bool, "false", "", Works,
        "Write RocksDB's own write-ahead log too. Nothing is less durable without it: a restart replays the Raft log."),
    flag(Engine, "memory-snapshot-interval", Duration, "5m0s", "", Works,
        "Time between two snapshots of the memory engine. A restart replays the Raft log since the last one."),
    flag(Engine, "disk-reserve-bytes", Bytes, "256MiB", "bytes", Works,
        "Free disk space below which writes are refused with NOSPACE while reads go on. 0 turns the check off."),

    // Write path: ours.
    flag(WritePath, "batch-ops-max", NUMBER, "1024", "operations", Works,
        "Most operations in one Raft entry. 1 turns batching off. A batch is whatever waits; nothing waits for a batch."),
    flag(WritePath, "batch-bytes-max", Bytes, "4MiB", "bytes", Works, "Most bytes of operations in one Raft entry."),
    flag(WritePath, "record-cache-bytes", Bytes, "32MiB", "bytes", Works,
        "Memory for the newest records of hot keys, so that writing one reads nothing from the engine."),
    flag(WritePath, "list-cache-bytes", Bytes, "64MiB", "bytes", Works,
        "Memory for ranges that are listed again and again, kept up to date and encoded as they go out. 0 turns it off."),

    // Clustering.
    flag(Clustering, "initial-advertise-peer-urls", Urls, "http://localhost:2380", "", Works,
        "The peer URLs that the other members are told."),
    flag(Clustering, "initial-cluster", Text, "default=http://localhost:2380", "", Works,
        "The members at the first start, as name=url,name=url, this one included."),
    flag(Clustering, "initial-cluster-state", Choice(&["new", "existing"]), "new", "", Works,
        "Whether the cluster is new or exists already. Ignored once the data directory exists."),
    flag(Clustering, "initial-cluster-token", Text, "etcd-cluster", "", Works,
        "A name that keeps clusters apart; it goes into the ids of the cluster and its members."),
    flag(Clustering, "strict-reconfig-check", Bool, "true", "", Works, "Refuse changes of members that would lose the quorum."),
    flag(Clustering, "pre-vote", Bool, "true", "", Works, "Ask whether an election could be won before disturbing the leader."),
    flag(Clustering, "max-learners", NUMBER, "1", "members", Works, "Most members that do not vote."),
    flag(Clustering, "raft-read-timeout", Duration, "5s", "", Works, "Read timeout of connections between members."),
    flag(Clustering, "raft-write-timeout", Duration, "5s", "", Works, "Write timeout of connections between members."),
    flag(Clustering, "snapshot-send-bytes-per-second", Bytes, "64MiB", "bytes a second", Works,
        "Speed at which a snapshot is sent to a member, so that clients do not notice; 0 for no limit."),
    flag(Clustering, "raft-message-bytes-max", Bytes, "1MiB", "bytes", Works, "Most bytes of entries in one message to a follower; a larger entry goes alone."),
    flag(Clustering, "raft-messages-inflight-max", NUMBER, "128", "messages", Works, "Most messages with entries under way to one follower."),
    flag(Clustering, "raft-uncommitted-bytes-max", Bytes, "256MiB", "bytes", Works, "Most bytes of entries that are proposed and not committed; beyond, proposals wait."),
    flag(Clustering, "raft-unapplied-bytes-max", Bytes, "64MiB", "bytes", Works,
        "Bytes of entries that are committed and not applied beyond which a leader takes no proposals and a follower no entries."),
    flag(Clustering, "raft-unpersisted-bytes-max", Bytes, "64MiB", "bytes", Works,
        "Bytes of entries that are not on disk yet beyond which a follower takes no more."),
    flag(Clustering, "raft-appends-inflight-max", NUMBER, "2", "writes", Works, "Most writes of the Raft log under way at once; while they are, proposals gather."),
    flag(Clustering, "raft-forwards-inflight-max", NUMBER, "8", "batches", Works, "Most batches under way from a follower to the leader."),
    flag(Clustering, "downgrade-check-time", Duration, "5s", "", NoEffect("there is no older release to go back to yet"), "Time between two checks of a downgrade."),
    flag(Clustering, "discovery-srv", Text, "", "", Works,
        "DNS domain whose SRV records name the members at the first start: _etcd-server-ssl._tcp for https, _etcd-server._tcp for http."),
    flag(Clustering, "discovery-srv-name", Text, "", "", Works,
        "What follows those services' names after a dash, where a domain has several clusters."),
    flag(Clustering, "discovery-token", Text, "", "", Works,
        "The new cluster's name at the discovery service, and its token."),
    flag(Clustering, "discovery-endpoints", List, "", "", Works,
        "Another cluster, etcd's or MetaStore's, in which the members of this new one find each other."),
    flag(Clustering, "discovery-dial-timeout", Duration, "2s", "", Works, "How long connecting to the discovery service may take."),
    flag(Clustering, "discovery-request-timeout", Duration, "5s", "", Works, "How long a request to it may take."),
    flag(Clustering, "discovery-keepalive-time", Duration, "2s", "", Works,
        "Time without traffic after which it is pinged; less than 10s counts as 10s, as with etcd's client. 0 means never."),
    flag(Clustering, "discovery-keepalive-timeout", Duration, "6s", "", Works, "How long that ping may stay unanswered."),
    flag(Clustering, "discovery-insecure-transport", Bool, "true", "", Works,
        "Plaintext to endpoints without http:// or https://, unless one of the following four is set."),
    flag(Clustering, "discovery-insecure-skip-tls-verify", Bool, "false", "", Works,
        "Take any certificate of the discovery service. For tests alone."),
    flag(Clustering, "discovery-cert", Text, "", "", Works, "Certificate that is shown to the discovery service."),
    flag(Clustering, "discovery-key", Text, "", "", Works, "Key of that certificate."),
    flag(Clustering, "discovery-cacert", Text, "", "", Works,
        "Authorities that its certificate is verified with. When empty: the system's."),
    flag(Clustering, "discovery-user", Text, "", "", Works, "Who logs in at the discovery service: name, or name:password."),
    flag(Clustering, "discovery-password", Text, "", "", Works, "With which password."),
    flag(Clustering, "discovery-fallback", Choice(&["exit", "proxy"]), "exit", "", Refused("the v2 proxy is gone from etcd too; only exit is left"),
        "What to do when discovery fails: exit."),

    // History and compaction.
    flag(Compaction, "auto-compaction-mode", Choice(&["periodic", "revision"]), "periodic", "", Works,
        "How --auto-compaction-retention is read: as a time, or as a number of revisions."),
    flag(Compaction, "auto-compaction-retention", Text, "0", "", Works,
        "History to keep: a duration (a bare number means hours) or a number of revisions. 0 keeps everything."),
    flag(Compaction, "compaction-batch-limit", NUMBER, "0", "revisions", Works,
        "Most revisions that one step of a compaction looks at. 0 means 1000."),
    flag(Compaction, "compaction-sleep-interval", Duration, "0s", "", Works,
        "Pause between two steps of a compaction. 0 means none: writes go before steps in any case."),
    flag(Compaction, "compact-hash-check-time", Duration, "1m0s", "", CHECKS, "Time between two comparisons of the members' hashes after a compaction."),
    flag(Compaction, "corrupt-check-time", Duration, "0s", "", CHECKS, "Time between two comparisons of the members' data. 0 means never."),

    // Security.
    flag(Security, "cert-file", Text, "", "", Works, "Server certificate for clients."),
    flag(Security, "key-file", Text, "", "", Works, "Key of --cert-file."),
    flag(Security, "trusted-ca-file", Text, "", "", Works, "CA bundle that client certificates are verified against."),
    flag(Security, "client-cert-auth", Bool, "false", "", Works, "Demand a valid client certificate."),
    flag(Security, "client-cert-file", Text, "", "", Works, "Certificate that this member shows when it is the client."),
    flag(Security, "client-key-file", Text, "", "", Works, "Key of --client-cert-file."),
    flag(Security, "client-crl-file", Text, "", "", Works, "Revocation list for client certificates."),
    flag(Security, "client-cert-allowed-hostname", List, "", "", Works, "Host names allowed in client certificates."),
    flag(Security, "auto-tls", Bool, "false", "", Works, "Serve clients with a generated certificate."),
    flag(Security, "peer-cert-file", Text, "", "", Works, "Server certificate for the other members."),
    flag(Security, "peer-key-file", Text, "", "", Works, "Key of --peer-cert-file."),
    flag(Security, "peer-trusted-ca-file", Text, "", "", Works, "CA bundle that the members' certificates are verified against."),
    flag(Security, "peer-client-cert-auth", Bool, "false", "", Works, "Demand a valid certificate of the other members."),
    flag(Security, "peer-client-cert-file", Text, "", "", Works, "Certificate that this member shows to the others."),
    flag(Security, "peer-client-key-file", Text, "", "", Works, "Key of --peer-client-cert-file."),
    flag(Security, "peer-crl-file", Text, "", "", Works, "Revocation list for the members' certificates."),
    flag(Security, "peer-cert-allowed-cn", List, "", "", Works, "Common names allowed in the members' certificates."),
    flag(Security, "peer-cert-allowed-hostname", List, "", "", Works, "Host names allowed in the members' certificates."),
    flag(Security, "peer-auto-tls", Bool, "false", "", Works, "Serve the other members with a generated certificate."),
    flag(Security, "peer-skip-client-san-verification", Bool, "false", "", Works, "Do not verify the SAN of the members' certificates."),
    flag(Security, "self-signed-cert-validity", NUMBER, "1", "years", Works, "How long generated certificates are valid."),
    flag(Security, "cipher-suites", List, "", "", Works, "TLS cipher suites to allow."),
    flag(Security, "tls-min-version", Text, "TLS1.2", "", Works, "Lowest TLS version to allow: TLS1.2 or TLS1.3."),
    flag(Security, "tls-max-version", Text, "", "", Works, "Highest TLS version to allow; empty means the highest there is."),
    flag(Security, "cors", List, "*", "", Works, "Origins of web pages that browsers let call. * or nothing for all."),
    flag(Security, "host-whitelist", List, "*", "", Works,
        "Host names that HTTP requests may carry. Empty or * means any."),

    // Auth.
    flag(Auth, "auth-token", Text, "simple", "", Works,
        "Kind of token: simple; or jwt,sign-method=...,pub-key=file,priv-key=file,ttl=5m, which without priv-key is verified and not given out."),
    flag(Auth, "bcrypt-cost", NUMBER, "10", "", Works, "Cost of hashing a password, 4 to 31; each is twice the one before."),
    flag(Auth, "auth-token-ttl", NUMBER, "300", "seconds", Works, "How long a simple token is valid without being used."),

    // Logging.
    flag(Logging, "logger", Choice(&["zap"]), "zap", "", Works, "Only zap, etcd's name for structured logs."),
    flag(Logging, "log-level", Choice(&["debug", "info", "warn", "error", "dpanic", "panic", "fatal"]), "info", "", Works,
        "Lowest level to log: debug, info, warn, error, dpanic, panic or fatal."),
    flag(Logging, "log-format", Choice(&["json", "console"]), "json", "", Works,
        "json: one object a line. console: text. Unless it is set, a terminal (with TERM set) gets text."),
    flag(Logging, "log-outputs", List, "default", "", Works,
        "Where to: default (stderr), stderr, stdout, systemd/journal (stderr, which systemd collects), or files. A reader that blocks never blocks the node: lines are dropped and counted."),
    flag(Logging, "enable-log-rotation", Bool, "false", "", Works,
        "Put the log file aside when it has grown, by --log-rotation-config-json. --log-outputs must hold one file."),
    flag(Logging, "log-rotation-config-json", Text, "{\"maxsize\": 100, \"maxage\": 0, \"maxbackups\": 0, \"localtime\": false, \"compress\": false}", "",
        Works, "How to rotate: megabytes a file, days to keep files, files to keep, names in local time, gzip. 0 days or files: for ever."),

    // Monitoring.
    flag(Monitoring, "listen-metrics-urls", Urls, "", "", Works,
        "Where to serve /metrics and /health besides the client URLs."),
    flag(Monitoring, "metrics", Choice(&["basic", "extensive"]), "basic", "", Works, "extensive adds a histogram of the time that each gRPC method takes."),
    flag(Monitoring, "warning-apply-duration", Duration, "100ms", "", Works, "Applying for longer than this is logged."),
    flag(Monitoring, "warning-unary-request-duration", Duration, "300ms", "", Works, "Answering a single request for longer than this is logged: request stats."),
    flag(Monitoring, "enable-pprof", Bool, "false", "", NoEffect("pprof is a profile of Go programs"), "Serve profiles over HTTP."),
    flag(Monitoring, "enable-distributed-tracing", Bool, "false", "", Works, "Send traces of calls to a collector, by OTLP over gRPC."),
    flag(Monitoring, "distributed-tracing-address", Text, "localhost:4317", "", Works, "Address of the collector."),
    flag(Monitoring, "distributed-tracing-service-name", Text, "etcd", "", Works, "Service name in the traces."),
    flag(Monitoring, "distributed-tracing-instance-id", Text, "", "", Works, "Instance id in the traces."),
    flag(Monitoring, "distributed-tracing-sampling-rate", NUMBER, "0", "calls in a million", Works,
        "How many calls are traced. Where the caller decided it (traceparent), that holds."),

    // Unsafe.
    flag(Unsafe, "force-new-cluster", Bool, "false", "", Works,
        "Start a new cluster of one member from this member's data."),
    flag(Unsafe, "unsafe-no-fsync", Bool, "false", "", NoEffect("what is acknowledged is always synced to disk"), "Do not sync to disk."),

    // Taken for etcd's sake.
    flag(Etcd, "snapshot-count", NUMBER, "10000", "entries", Works,
        "Entries after which the state is flushed, so that the log can be trimmed. Unless it is set, even to the default, bytes and time decide."),
    flag(Etcd, "snapshot-catchup-entries", NUMBER, "5000", "entries", Works,
        "Entries that the log keeps for followers that lag, of those that are durable in the state."),
    flag(Etcd, "max-snapshots", NUMBER, "5", "files", NoEffect("--max-snapshots is deprecated in 3.6 and will be decommissioned in 3.8, and there are no such files here"), "Snapshot files to keep."),
    flag(Etcd, "max-wals", NUMBER, "5", "files", NoEffect("log files are recycled, not kept"), "Log files to keep."),
    flag(Etcd, "backend-bbolt-freelist-type", Text, "map", "", BBOLT, "Free list of etcd's storage file."),
    flag(Etcd, "backend-batch-interval", Duration, "0s", "", BBOLT, "Longest time before etcd commits its storage file."),
    flag(Etcd, "backend-batch-limit", NUMBER, "0", "operations", BBOLT, "Most operations before etcd commits its storage file."),
    flag(Etcd, "bootstrap-defrag-threshold-megabytes", NUMBER, "0", "megabytes", NoEffect("Skipping defragmentation, which nothing here ever needs"),
        "Reclaimable space above which etcd defragments when it starts."),
    flag(Etcd, "memory-mlock", Bool, "false", "", NoEffect("the data is not mapped into memory"), "Keep etcd's pages in memory."),
    flag(Etcd, "v2-deprecation", Choice(&["write-only", "write-only-skip-check", "write-only-drop-data", "gone"]), "write-only", "",
        NoEffect("--v2-deprecation is deprecated and scheduled for removal in v3.8. The default value is enforced, ignoring user input"), "Phase of removing the v2 store."),
];

/// Flags that etcd once had and still swallows with a warning. Like a boolean, each takes a value only after `=`.
pub(super) const IGNORED: &[&str] = &[
    "cluster-active-size",
    "cluster-remove-delay",
    "cluster-sync-interval",
    "config",
    "force",
    "max-result-buffer",
    "max-retry-attempts",
    "peer-heartbeat-interval",
    "peer-election-timeout",
    "retry-interval",
    "snapshot",
    "v",
    "vv",
    "test.coverprofile",
    "test.outputdir",
];

/// The flag of that name.
pub(super) fn find(name: &str) -> Option<&'static Flag> {
    FLAGS.iter().find(|flag| flag.name == name)
}

/// The known name that looks most like `name`, if any is near enough to be what was meant.
pub(super) fn nearest(name: &str) -> Option<&'static str> {
    // etcd renamed many flags by dropping this prefix.
    let name = name.strip_prefix("experimental-").unwrap_or(name);
    FLAGS
        .iter()
        .map(|flag| (strsim::jaro_winkler(name, flag.name), flag.name))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_parses_and_every_name_is_unique() {
        let mut names = std::collections::BTreeSet::new();
        for flag in FLAGS {
            assert!(flag.kind.parse(flag.default).is_ok(), "{}", flag.name);
            assert!(names.insert(flag.name), "{} twice", flag.name);
            assert!(!IGNORED.contains(&flag.name), "{}", flag.name);
            assert!(Group::ALL.contains(&flag.group));
        }
    }

    #[test]
    fn suggestions_are_what_was_meant() {
        for (typed, meant) in [
            ("data-dri", "data-dir"),
            ("listen-client-url", "listen-client-urls"),
            ("experimental-corrupt-check-time", "corrupt-check-time"),
            ("rocksdb-block-cache", "rocksdb-block-cache-bytes"),
        ] {
            assert_eq!(nearest(typed), Some(meant));
        }
    }
}
