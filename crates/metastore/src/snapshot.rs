//! `metastore snapshot`: data directories from backups, and what is in a backup.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use server::restore::{self, RestoreConfig};
use server::{EngineConfig, RocksOptions};

use crate::config::initial_cluster;
use crate::url::Url;

const EXAMPLES: &str = "\
Examples:
  A backup of a running cluster, this one or etcd, and what is in it:
    etcdctl --endpoints host:2379 snapshot save backup.db
    metastore snapshot status backup.db
  A new node with its data:
    metastore snapshot restore backup.db --data-dir /var/lib/metastore
    metastore --data-dir /var/lib/metastore
  A new cluster: each member restores the same backup for itself, and is then started with the same flags.
    metastore snapshot restore backup.db --data-dir m1 --name m1 --initial-advertise-peer-urls http://host1:2380 \\
        --initial-cluster m1=http://host1:2380,m2=http://host2:2380,m3=http://host3:2380
  From etcd, without a snapshot: the database file of a member that does not run any more.
    metastore snapshot restore default.etcd/member/snap/db --skip-hash-check --data-dir /var/lib/metastore
  Back to etcd:
    etcdctl --endpoints host:2379 snapshot save backup.db
    etcdutl snapshot restore backup.db --data-dir default.etcd";

/// Makes data directories from backups. Backups are database files of etcd.
#[derive(Debug, Parser)]
#[command(name = "metastore snapshot", bin_name = "metastore snapshot", after_long_help = EXAMPLES, max_term_width = 120)]
enum Args {
    /// Make a data directory from a backup, keeping keys with their revisions, leases, users and roles.
    #[command(after_long_help = EXAMPLES)]
    Restore(Restore),
    /// Say what is in a backup.
    Status(Status),
}

#[derive(Debug, clap::Args)]
struct Restore {
    /// What `etcdctl snapshot save` saved; or, with --skip-hash-check, a copy of etcd's member/snap/db.
    file: PathBuf,
    /// Where the data is to lie; missing or empty. Default: <name>.metastore.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where the Raft log is to lie, if elsewhere; missing or empty.
    #[arg(long, value_name = "DIR")]
    wal_dir: Option<PathBuf>,
    /// This member's name.
    #[arg(long, default_value = "default")]
    name: String,
    /// All members of the new cluster: name=URL,... Default: this member alone, at --initial-advertise-peer-urls.
    #[arg(long, value_name = "LIST")]
    initial_cluster: Option<String>,
    /// Part of the new cluster's identity.
    #[arg(long, value_name = "TEXT", default_value = "etcd-cluster")]
    initial_cluster_token: String,
    /// Where the others reach this member.
    #[arg(long, value_name = "URLS", default_value = "http://localhost:2380")]
    initial_advertise_peer_urls: String,
    /// Believe a file without a hash, or with a wrong one.
    #[arg(long)]
    skip_hash_check: bool,
    /// How much to add to the newest revision, so that clients of the old cluster see none come back. Needs
    /// --mark-compacted.
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    bump_revision: u64,
    /// Mark everything as compacted, so that watchers begin anew. Goes with --bump-revision.
    #[arg(long)]
    mark_compacted: bool,
    /// What is to hold the data, as when the node is started.
    #[arg(long, default_value = "rocksdb", value_parser = ["rocksdb", "memory"])]
    storage: String,
}

#[derive(Debug, clap::Args)]
struct Status {
    /// A backup, or a database file of etcd.
    file: PathBuf,
    /// How to say it.
    #[arg(long, short, default_value = "simple", value_parser = ["simple", "json", "table"])]
    write_out: String,
}

/// Runs `metastore snapshot` with the arguments after these words.
pub fn main_with_args(args: impl Iterator<Item = std::ffi::OsString>) -> ExitCode {
    let name = std::ffi::OsString::from("metastore snapshot");
    let done = match Args::try_parse_from(std::iter::once(name).chain(args)) {
        Ok(Args::Restore(args)) => args.run(),
        Ok(Args::Status(args)) => args.run(),
        Err(error) => {
            // There may be no reader; the exit code says it too.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match done {
        Ok(text) => {
            let _ = writeln!(std::io::stdout(), "{text}");
            ExitCode::SUCCESS
        }
        Err(Failure { message, exit_code }) => {
            let _ = writeln!(std::io::stderr(), "metastore snapshot: {message}");
            ExitCode::from(exit_code)
        }
    }
}

struct Failure {
    message: String,
    exit_code: u8,
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure {
            message: error.to_string(),
            exit_code: 1,
        }
    }
}

/// What is wrong with the arguments.
fn usage(message: impl Into<String>) -> Failure {
    Failure {
        message: message.into(),
        exit_code: 2,
    }
}

impl Restore {
    fn run(self) -> Result<String, Failure> {
        if (self.bump_revision > 0) != self.mark_compacted {
            return Err(usage(
                "--bump-revision and --mark-compacted go together: give both, or neither",
            ));
        }
        let mut own = self
            .initial_advertise_peer_urls
            .split(',')
            .map(Url::parse)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| usage(format!("--initial-advertise-peer-urls: {error}")))?;
        own.sort();
        own.dedup();
        let members = match &self.initial_cluster {
            Some(text) => initial_cluster(text).map_err(|error| usage(format!("--initial-cluster: {error}")))?,
            None => [(self.name.clone(), own.clone())].into(),
        };
        match members.get(&self.name) {
            None => {
                return Err(usage(format!(
                    "--initial-cluster does not include this member, {:?} (--name)",
                    self.name
                )));
            }
            Some(urls) if *urls != own => {
                return Err(usage(format!(
                    "--initial-cluster gives {:?} other URLs than --initial-advertise-peer-urls does",
                    self.name
                )));
            }
            Some(_) => {}
        }
        let mut urls: Vec<&Url> = members.values().flatten().collect();
        urls.sort();
        if let Some(twice) = urls.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(usage(format!(
                "--initial-cluster gives the URL {} to more than one member",
                twice[0]
            )));
        }
        let data_dir = self
            .data_dir
            .unwrap_or_else(|| format!("{}.metastore", self.name).into());
        let config = RestoreConfig {
            file: self.file,
            data_dir: data_dir.clone(),
            wal_dir: self.wal_dir,
            engine: match self.storage.as_str() {
                "memory" => EngineConfig::Memory,
                _ => EngineConfig::Rocks(RocksOptions::default()),
            },
            name: self.name,
            initial_members: members
                .iter()
                .map(|(name, urls)| (name.clone(), urls.iter().map(Url::to_string).collect()))
                .collect(),
            cluster_token: self.initial_cluster_token,
            skip_hash_check: self.skip_hash_check,
            bump_revision: self.bump_revision,
        };
        let bar = Bar::new();
        let restored = restore::restore(&config, &mut |what, done, all| bar.show(what, done, all))?;
        bar.clear();
        let imported = &restored.imported;
        Ok(format!(
            "restored {} keys ({} changes), {} leases, {} users and roles, revision {}, from {} into {} for member {:x} of cluster {:x}",
            imported.keys,
            imported.changes,
            imported.leases,
            imported.auth,
            imported.revision,
            config.file.display(),
            data_dir.display(),
            restored.member_id,
            restored.cluster_id,
        ))
    }
}

impl Status {
    fn run(self) -> Result<String, Failure> {
        let bar = Bar::new();
        let status = restore::status(&self.file, &mut |what, done, all| bar.show(what, done, all))?;
        bar.clear();
        let server::FileStatus {
            hash,
            revision,
            keys,
            bytes,
            version,
        } = status;
        Ok(match self.write_out.as_str() {
            // As etcdutl has it.
            "json" => format!(
                r#"{{"hash":{hash},"revision":{revision},"totalKey":{keys},"totalSize":{bytes},"version":{version:?}}}"#
            ),
            "table" => {
                let cells = [
                    ("HASH", format!("{hash:x}")),
                    ("REVISION", revision.to_string()),
                    ("TOTAL KEYS", keys.to_string()),
                    ("TOTAL SIZE", format!("{bytes} B")),
                    ("STORAGE VERSION", version),
                ];
                let widths = cells.each_ref().map(|(head, value)| head.len().max(value.len()));
                let line = |text: [&str; 5]| {
                    let cells: Vec<_> = text
                        .iter()
                        .zip(widths)
                        .map(|(text, width)| format!("{text:width$}"))
                        .collect();
                    cells.join("  ").trim_end().to_owned()
                };
                let heads = line(cells.each_ref().map(|(head, _)| *head));
                let values = line(cells.each_ref().map(|(_, value)| &value[..]));
                format!("{heads}\n{values}")
            }
            _ => format!("{hash:x}, {revision}, {keys}, {bytes}, {version}"),
        })
    }
}

/// A bar at the bottom of the terminal; nothing if stderr is none.
struct Bar(Option<ProgressBar>);

impl Bar {
    fn new() -> Bar {
        let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(0));
        if let Some(bar) = &bar {
            let template =
                "{prefix} {wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec}, {eta} left";
            bar.set_style(ProgressStyle::with_template(template).expect("the template is valid"));
        }
        Bar(bar)
    }

    fn show(&self, what: &'static str, done: u64, all: u64) {
        if let Some(bar) = &self.0 {
            if bar.prefix() != what {
                bar.set_prefix(what);
                bar.reset_eta();
            }
            bar.set_length(all);
            bar.set_position(done);
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.clear();
    }
}
