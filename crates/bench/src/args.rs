//! The command line, and what it comes to when every default is filled in.

use std::path::PathBuf;
use std::time::Duration;

use crate::keys::KeyOrder;
use crate::load::{KUBERNETES, Keys, Load, MIXED, Workload};
use crate::measure::System;
use crate::net::endpoint::Endpoint;
use crate::net::security::{Security, TlsFiles, tls};
use crate::plan::Plan;
use crate::shares::Shares;
use crate::units::{parse_bytes, parse_count, parse_duration};
use crate::values::ValueKind;

const MIXED_SHARES: &str = "put=20,get=70,delete=10";
const KUBERNETES_SHARES: &str = "create=5,update=30,get=19,list=1,lease=40,delete=5";
/// From so many processors on the generator takes a second thread, and one more for every so many further.
const PROCESSORS_PER_THREAD: usize = 4;

const EXAMPLES: &str = "\
Examples:
  Puts of 256 bytes from 64 clients for 10 s, with the server's CPU per operation:
    metastore bench put --pids $(pidof metastore)
  Reads of a million keys in random order, then listings of 10,000 keys in pages of 500:
    metastore bench get --keys 1M --key-order random
    metastore bench list --keys 10k --page 500 --clients 4
  An open loop: 5,000 puts a second, latency counted from the moment each was due:
    metastore bench put --rate 5000 --clients 256 --plot put.svg
  Two systems compared, A B A B A B A B A B, medians and ratios with their spread:
    metastore bench put get list --endpoints localhost:2379 --pids 4711 \\
        --vs localhost:22379 --vs-pids 4712 --rounds 5 --json result.json --html result.html
  A cluster of three, connections spread over its members:
    metastore bench put --clients 256 --endpoints host1:2379,host2:2379,host3:2379
  A thousand watchers of one prefix; Kubernetes-like traffic over TLS, as a user:
    metastore bench watch-fanout --watchers 1000
    metastore bench kubernetes --endpoints https://host:2379 --cacert ca.pem --user root:secret

Reading the result:
  Latency is measured by HDR histograms, to three digits, over operations that were due within the window (after the
  warm-up); throughput counts those that succeeded within it. Failed operations are counted by gRPC code, or as timeout,
  connection, reset or protocol, and are in no latency. In a closed loop (no --rate) a client starts its next operation
  when the last is answered, so a slow server also slows the load; only an open loop shows what a stall costs those who
  would have come meanwhile. The line \"generator\" says what the measuring itself costs; a warning says when that, not
  the server, was the limit.

All keys are written under --prefix, and everything under it is deleted in the end (see --keep).";

/// Puts a load on an etcd or MetaStore and measures what it makes of it.
#[derive(Debug, clap::Parser)]
#[command(name = "metastore bench", bin_name = "metastore bench", after_long_help = EXAMPLES, max_term_width = 120)]
pub struct Args {
    /// What to do; several are done one after the other.
    #[arg(required = true, value_name = "WORKLOAD")]
    workloads: Vec<Workload>,

    /// Servers of the system, divided by commas; connections are spread over them in turn.
    #[arg(
        long,
        value_name = "LIST",
        default_value = "localhost:2379",
        help_heading = "Systems"
    )]
    endpoints: String,
    /// Servers of a second system, to compare with: the two take turns.
    #[arg(long, value_name = "LIST", help_heading = "Systems")]
    vs: Option<String>,
    /// What to call the system.
    #[arg(long, default_value = "A", help_heading = "Systems")]
    name: String,
    /// What to call the second system.
    #[arg(long, default_value = "B", help_heading = "Systems")]
    vs_name: String,
    /// The system's processes on this machine, for CPU per operation and memory (sums); without them the servers'
    /// /metrics are asked.
    #[arg(long, value_name = "PIDS", value_delimiter = ',', help_heading = "Systems")]
    pids: Vec<u32>,
    /// The second system's processes.
    #[arg(
        long,
        value_name = "PIDS",
        value_delimiter = ',',
        help_heading = "Systems",
        requires = "vs"
    )]
    vs_pids: Vec<u32>,
    /// How often to run everything; figures are medians. Default: 1, with --vs 3.
    #[arg(long, help_heading = "Systems")]
    rounds: Option<usize>,
    /// Pause between two runs.
    #[arg(long, value_parser = parse_duration, default_value = "1s", help_heading = "Systems")]
    pause: Duration,

    /// Believe servers with certificates of this authority (PEM file). Default: the system's authorities.
    #[arg(long, value_name = "FILE", help_heading = "Security")]
    cacert: Option<PathBuf>,
    /// Our own certificate (PEM file).
    #[arg(long, value_name = "FILE", help_heading = "Security", requires = "key")]
    cert: Option<PathBuf>,
    /// The key of our certificate (PEM file).
    #[arg(long, value_name = "FILE", help_heading = "Security", requires = "cert")]
    key: Option<PathBuf>,
    /// Believe any server's certificate.
    #[arg(long, help_heading = "Security")]
    insecure_skip_tls_verify: bool,
    /// The user to be.
    #[arg(long, value_name = "NAME[:PASSWORD]", help_heading = "Security")]
    user: Option<String>,
    /// The user's password, if --user does not have it.
    #[arg(long, help_heading = "Security", requires = "user")]
    password: Option<String>,

    /// Operations in flight at most. Default: 64, with --rate 256, for list 4, for watch-latency 1.
    #[arg(long, value_name = "N", help_heading = "Load")]
    clients: Option<usize>,
    /// HTTP/2 connections that the clients share. Default: 8, or one per client if there are fewer.
    #[arg(long, value_name = "N", help_heading = "Load")]
    connections: Option<usize>,
    /// Threads of the generator. Default: one for every 4 processors.
    #[arg(long, value_name = "N", help_heading = "Load")]
    threads: Option<usize>,
    /// Open loop: begin this many operations a second, whatever the server does (10k = 10,000).
    #[arg(long, value_parser = parse_count, value_name = "OPS", help_heading = "Load")]
    rate: Option<u64>,
    /// How long to measure. Default: 10s, with --total until those are done.
    #[arg(long, value_parser = parse_duration, value_name = "TIME", help_heading = "Load")]
    duration: Option<Duration>,
    /// End after this many operations, warm-up not counted.
    #[arg(long, value_parser = parse_count, value_name = "OPS", help_heading = "Load")]
    total: Option<u64>,
    /// How long to run before measuring. A delete load has none: it ends with its keys.
    #[arg(long, value_parser = parse_duration, value_name = "TIME", default_value = "1s", help_heading = "Load")]
    warmup: Duration,
    /// How long one call may take before it counts as failed.
    #[arg(long, value_parser = parse_duration, value_name = "TIME", default_value = "10s", help_heading = "Load")]
    timeout: Duration,
    /// What a mixed or Kubernetes-like load is made of, as NAME=WEIGHT. mixed: put, get, range, delete (default
    /// put=20,get=70,delete=10). kubernetes: create, update, get, list, lease, delete (default
    /// create=5,update=30,get=19,list=1,lease=40,delete=5).
    #[arg(long, value_name = "SHARES", help_heading = "Load")]
    shares: Option<String>,
    /// Reads that any member may answer from its own state (get, range, list, mixed, kubernetes).
    #[arg(long, help_heading = "Load")]
    serializable: bool,

    /// Number of keys (1M = 1,000,000). Default: 10k, for delete 100k, for kubernetes 5k.
    #[arg(long, value_parser = parse_count, value_name = "N", help_heading = "Data")]
    keys: Option<u64>,
    /// Length of a key; Kubernetes-like keys have their own.
    #[arg(long, value_parser = parse_bytes, value_name = "BYTES", default_value = "32", help_heading = "Data")]
    key_size: usize,
    /// Length of a value. Default: 256, for kubernetes 1KiB.
    #[arg(long, value_parser = parse_bytes, value_name = "BYTES", help_heading = "Data")]
    value_size: Option<usize>,
    /// What values are made of. Default: random, for the workload kubernetes its own.
    #[arg(long, help_heading = "Data")]
    values: Option<ValueKind>,
    /// In which order keys are taken. Default: seq for put, else random.
    #[arg(long, help_heading = "Data")]
    key_order: Option<KeyOrder>,
    /// Keys in one range request.
    #[arg(long, value_parser = parse_count, value_name = "N", default_value = "100", help_heading = "Data")]
    range_size: u64,
    /// Keys in one page of a listing; 0 for all in one answer.
    #[arg(long, value_parser = parse_count, value_name = "N", default_value = "500", help_heading = "Data")]
    page: u64,
    /// Number of watchers. Default: 1 for watch-latency, 1000 for watch-fanout, 10 for kubernetes.
    #[arg(long, value_name = "N", help_heading = "Data")]
    watchers: Option<usize>,
    /// Streams that the watchers share. Default: one per connection, as etcd's client has it.
    #[arg(long, value_name = "N", help_heading = "Data")]
    watch_streams: Option<usize>,
    /// Node leases of a Kubernetes-like load.
    #[arg(long, value_name = "N", default_value = "100", help_heading = "Data")]
    nodes: u64,
    /// How long leases live.
    #[arg(long, value_parser = parse_duration, value_name = "TIME", default_value = "60s", help_heading = "Data")]
    lease_ttl: Duration,
    /// What all keys start with. Everything that does is deleted in the end.
    #[arg(long, default_value = "metastore-bench/", help_heading = "Data")]
    prefix: String,
    /// Do not write the keys that a workload reads: an earlier run with --keep has.
    #[arg(long, help_heading = "Data")]
    no_fill: bool,
    /// Leave the keys in the end.
    #[arg(long, help_heading = "Data")]
    keep: bool,
    /// Start of the random numbers: equal seeds make equal keys and values.
    #[arg(long, default_value = "1", help_heading = "Data")]
    seed: u64,

    /// Write all figures, as JSON.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    json: Option<PathBuf>,
    /// Draw latency percentiles, and throughput and latency over time, as SVG.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    plot: Option<PathBuf>,
    /// Write tables and plots as one HTML page.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    html: Option<PathBuf>,
    /// Show no progress bar (there is none anyway when stderr is no terminal).
    #[arg(long, help_heading = "Output")]
    no_progress: bool,
}

impl Args {
    /// Checks everything and fills in the defaults.
    pub(crate) fn into_plan(self) -> Result<Plan, String> {
        let loads = self
            .workloads
            .iter()
            .map(|workload| {
                self.load(*workload)
                    .map_err(|error| format!("{}: {error}", workload.name()))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let rounds = self.rounds.unwrap_or(if self.vs.is_some() { 3 } else { 1 });
        if rounds == 0 {
            return Err("--rounds must be at least 1".to_owned());
        }
        Ok(Plan {
            loads,
            systems: self.systems()?,
            rounds,
            pause: self.pause,
            fill: !self.no_fill,
            keep: self.keep,
            progress: !self.no_progress,
            json: self.json,
            plot: self.plot,
            html: self.html,
        })
    }

    fn systems(&self) -> Result<Vec<System>, String> {
        let secure = self.cacert.is_some() || self.cert.is_some() || self.insecure_skip_tls_verify;
        let mut systems = Vec::new();
        let lists = [
            (Some(&self.endpoints), &self.name, &self.pids),
            (self.vs.as_ref(), &self.vs_name, &self.vs_pids),
        ];
        for (list, name, pids) in lists {
            let Some(list) = list else { continue };
            let endpoints = Endpoint::parse_list(list, secure)?;
            let has_tls = endpoints.iter().any(|endpoint| endpoint.tls);
            systems.push(System {
                name: name.clone(),
                endpoints,
                security: Security {
                    tls: if has_tls { Some(self.tls()?) } else { None },
                    user: self.user()?,
                },
                pids: pids.clone(),
            });
        }
        Ok(systems)
    }

    fn tls(&self) -> Result<std::sync::Arc<rustls::ClientConfig>, String> {
        tls(&TlsFiles {
            cacert: self.cacert.as_deref(),
            cert: self.cert.as_deref(),
            key: self.key.as_deref(),
            skip_verify: self.insecure_skip_tls_verify,
        })
    }

    fn user(&self) -> Result<Option<(String, String)>, String> {
        let Some(user) = &self.user else { return Ok(None) };
        match (&self.password, user.split_once(':')) {
            (Some(password), _) => Ok(Some((user.clone(), password.clone()))),
            (None, Some((name, password))) => Ok(Some((name.to_owned(), password.to_owned()))),
            (None, None) => Err("--user NAME needs a password: --user NAME:PASSWORD or --password".to_owned()),
        }
    }

    fn load(&self, workload: Workload) -> Result<Load, String> {
        let at_least_one = |name: &str, number: usize| match number {
            0 => Err(format!("--{name} must be at least 1")),
            number => Ok(number),
        };
        let kubernetes = workload == Workload::Kubernetes;
        let clients = self.clients.unwrap_or(match workload {
            _ if self.rate.is_some() => 256,
            Workload::List => 4,
            Workload::WatchLatency => 1,
            _ => 64,
        });
        let clients = at_least_one("clients", clients)?;
        let connections = at_least_one("connections", self.connections.unwrap_or(8))?.min(clients);
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.threads.unwrap_or(processors.div_ceil(PROCESSORS_PER_THREAD));
        let threads = at_least_one("threads", threads)?.min(connections);
        let watchers = match workload {
            Workload::WatchLatency => at_least_one("watchers", self.watchers.unwrap_or(1))?,
            Workload::WatchFanout => at_least_one("watchers", self.watchers.unwrap_or(1000))?,
            Workload::Kubernetes => self.watchers.unwrap_or(10),
            _ => 0,
        };
        let watch_streams = at_least_one("watch-streams", self.watch_streams.unwrap_or(connections))?;

        let count = self.keys.unwrap_or(match workload {
            Workload::Delete => 100_000,
            Workload::Kubernetes => 5_000,
            _ => 10_000,
        });
        let count = match workload {
            // Every client has a key of its own.
            Workload::CasOwn => count.max(clients as u64),
            _ => count,
        };
        if self.prefix.is_empty() {
            return Err("--prefix must not be empty: everything under it is deleted in the end".to_owned());
        }
        let keys = if kubernetes {
            Keys::pods(&self.prefix, count)?
        } else {
            Keys::flat(&self.prefix, self.key_size, count)?
        };
        let values = self.values.unwrap_or(if kubernetes {
            ValueKind::Kubernetes
        } else {
            ValueKind::Random
        });
        let value_bytes = self.value_size.unwrap_or(if kubernetes { 1024 } else { 256 });
        if watchers > 0 && value_bytes < values.stamped_bytes_min() {
            return Err(format!(
                "events tell their latency by a stamp in the value: --value-size must be at least {}",
                values.stamped_bytes_min()
            ));
        }
        let (names, default) = if kubernetes {
            (KUBERNETES, KUBERNETES_SHARES)
        } else {
            (MIXED, MIXED_SHARES)
        };
        let shares = match workload {
            Workload::Mixed | Workload::Kubernetes => {
                let text = self.shares.as_deref().unwrap_or(default);
                Some(Shares::parse(text, names).map_err(|error| format!("--shares: {error}"))?)
            }
            _ => None,
        };
        if self.rate == Some(0) || self.total == Some(0) || self.range_size == 0 || self.nodes == 0 {
            return Err("--rate, --total, --range-size and --nodes must be at least 1".to_owned());
        }
        let duration = match (self.duration, self.total) {
            (None, None) => Some(Duration::from_secs(10)),
            (duration, _) => duration,
        };
        if duration.is_some_and(|duration| duration.is_zero()) || self.timeout.is_zero() {
            return Err("--duration and --timeout must be above 0".to_owned());
        }
        Ok(Load {
            workload,
            clients,
            connections,
            threads,
            rate: self.rate,
            duration,
            warmup: if workload.ends_with_keys() {
                Duration::ZERO
            } else {
                self.warmup
            },
            total: self.total,
            timeout: self.timeout,
            nodes: Keys::nodes(&self.prefix, self.nodes)?,
            prefix: self.prefix.clone(),
            keys,
            order: self.key_order.unwrap_or(if workload == Workload::Put {
                KeyOrder::Seq
            } else {
                KeyOrder::Random
            }),
            values,
            value_bytes,
            range_size: self.range_size.min(count),
            page: i64::try_from(self.page).map_err(|error| error.to_string())?,
            serializable: self.serializable,
            shares,
            watchers,
            watch_streams,
            lease_ttl_seconds: self.lease_ttl.as_secs().max(1) as i64,
            seed: self.seed,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    fn plan(line: &str) -> Result<Plan, String> {
        Args::try_parse_from(std::iter::once("bench").chain(line.split_whitespace()))
            .map_err(|error| error.to_string())
            .and_then(Args::into_plan)
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn defaults_depend_on_the_workload() {
        let plan = plan("put watch-fanout kubernetes --clients 3").unwrap();
        let [put, fanout, kubernetes] = &plan.loads[..] else {
            panic!("three loads")
        };
        assert_eq!((put.clients, put.connections, put.watchers), (3, 3, 0));
        assert_eq!((fanout.watchers, fanout.values), (1000, ValueKind::Random));
        assert_eq!((kubernetes.watchers, kubernetes.values), (10, ValueKind::Kubernetes));
        assert_eq!(put.duration, Some(Duration::from_secs(10)));
        assert_eq!((plan.rounds, plan.systems.len()), (1, 1));
    }

    #[test]
    fn two_systems_take_three_rounds() {
        let plan = plan("get --vs localhost:1,localhost:2 --vs-pids 7,8 --total 5k").unwrap();
        assert_eq!((plan.rounds, plan.systems.len()), (3, 2));
        assert_eq!(plan.systems[1].pids, [7, 8]);
        assert_eq!((plan.loads[0].duration, plan.loads[0].total), (None, Some(5_000)));
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "",
            "dance",
            "put --clients 0",
            "put --rounds 0",
            "put --rate 0",
            "put --duration 0s",
            "put --key-size 10",
            "put --keys 0",
            "put --user me",
            "put --vs-pids 1",
            "put --cert a.pem",
            "put --endpoints ftp://x",
            "put --prefix=",
            "mixed --shares put=0",
            "kubernetes --shares put=1",
            "watch-latency --value-size 8",
        ] {
            assert!(plan(line).is_err(), "{line:?}");
        }
    }

    #[test]
    fn users_have_passwords() {
        let user = |line| plan(line).unwrap().systems[0].security.user.clone().unwrap();
        assert_eq!(user("put --user a:b:c"), ("a".to_owned(), "b:c".to_owned()));
        assert_eq!(user("put --user a --password b"), ("a".to_owned(), "b".to_owned()));
    }
}
