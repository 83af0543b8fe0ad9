//! Starts the real binary, watches it, and stops it again whatever becomes of the test.

#![allow(dead_code, reason = "every test binary uses a part of this")]

pub(crate) mod authority;

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{Client, ConnectOptions, Error};
use rustix::process::{Pid, Resource, Signal, getrlimit, kill_process, setrlimit};
use tempfile::TempDir;

/// How long a node may take to become ready. Far more than it needs; a test must end all the same.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a node may take to end after SIGTERM, or when it was asked for something impossible.
pub(crate) const END_TIMEOUT: Duration = Duration::from_secs(60);
/// Flags for the members of a cluster whose leader is to stay the leader: on a busy machine a process may get no processor
/// for seconds, and the others must not take that for its end. The price is that the first election takes longer.
pub(crate) const PATIENT: [&str; 2] = ["--heartbeat-interval=100", "--election-timeout=4000"];
/// What the log says once clients are served.
const READY: &str = "serving client traffic";
const POLL: Duration = Duration::from_millis(2);

/// Lets this process have as many file descriptors as it may. Returns how many.
pub(crate) fn raise_limit() -> u64 {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("it may be raised that far");
    limit.current.unwrap_or(u64::MAX)
}

/// What holds the data of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Storage {
    RocksDb,
    Memory,
}

impl Storage {
    /// The value of `--storage`, and the name of the engine's directory.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Storage::RocksDb => "rocksdb",
            Storage::Memory => "memory",
        }
    }
}

/// Makes each of these `async fn(Storage)` one test per engine, none of which runs for longer than `$seconds`.
#[allow(unused_macros, reason = "every test binary uses a part of this")]
macro_rules! on_both_engines {
    ($seconds:expr; $($name:ident),* $(,)?) => {
        on_both_engines!(@engine $seconds, rocksdb, RocksDb, $($name),*);
        on_both_engines!(@engine $seconds, memory, Memory, $($name),*);
    };
    (@engine $seconds:expr, $engine:ident, $storage:ident, $($name:ident),*) => {
        mod $engine {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    let limit = std::time::Duration::from_secs($seconds);
                    let ended = tokio::time::timeout(limit, super::$name(crate::support::Storage::$storage)).await;
                    assert!(ended.is_ok(), "the test did not end within {limit:?}");
                }
            )*
        }
    };
}
#[allow(unused_imports, reason = "every test binary uses a part of this")]
pub(crate) use on_both_engines;

/// How to start a node, any number of times.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) data_dir: PathBuf,
    pub(crate) storage: Storage,
    pub(crate) port: u16,
    /// Where the output goes; one file for all starts.
    pub(crate) log: PathBuf,
    args: Vec<String>,
    env: Vec<(String, std::ffi::OsString)>,
    /// Most file descriptors that it may have, if not as many as this process.
    descriptors_max: Option<u32>,
}

impl Setup {
    /// A node with its data in `<base>/data` and its output in `<base>/log`, on a port that is free now.
    pub(crate) fn new(base: &Path, storage: Storage) -> Setup {
        Setup {
            data_dir: base.join("data"),
            storage,
            port: free_port(),
            log: base.join("log"),
            args: Vec::new(),
            env: Vec::new(),
            descriptors_max: None,
        }
    }

    /// Adds a flag.
    pub(crate) fn arg(mut self, arg: impl Into<String>) -> Setup {
        self.args.push(arg.into());
        self
    }

    /// Sets a variable of its environment, which is empty otherwise.
    pub(crate) fn env(mut self, name: &str, value: impl Into<std::ffi::OsString>) -> Setup {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// Lets it have no more file descriptors than these.
    pub(crate) fn descriptors_max(mut self, count: u32) -> Setup {
        self.descriptors_max = Some(count);
        self
    }

    /// Replaces all flags that [`Setup::arg`] added.
    pub(crate) fn set_args(&mut self, args: Vec<String>) {
        self.args = args;
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Starts the process and does not wait for anything.
    pub(crate) fn spawn(&self) -> Node {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .expect("the log can be written");
        let log_start = log.metadata().expect("the log is there").len();
        let mut command = match self.descriptors_max {
            None => Command::new(binary()),
            Some(count) => {
                // The shell becomes the binary, so that the process is the same one.
                let mut command = Command::new("/bin/sh");
                command
                    .arg("-c")
                    .arg(format!("ulimit -n {count} && exec \"$0\" \"$@\""));
                command.arg(binary());
                command
            }
        };
        let child = command
            .env_clear()
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .arg("--data-dir")
            .arg(&self.data_dir)
            .arg(format!("--listen-client-urls={}", self.url()))
            .arg(format!("--advertise-client-urls={}", self.url()))
            // Nobody connects there; the port that is free is as good as any other.
            .arg("--listen-peer-urls=http://127.0.0.1:0")
            .arg(format!("--storage={}", self.storage.name()))
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log can be shared"))
            .stderr(log)
            .spawn()
            .expect("the binary starts");
        Node {
            child,
            url: self.url(),
            log: self.log.clone(),
            log_start,
            started: Instant::now(),
        }
    }

    /// Starts a node and waits until it serves.
    pub(crate) fn start(&self) -> Node {
        let mut node = self.spawn();
        node.wait_ready();
        node
    }

    /// Checks that a member that lost its data does not begin anew under its old id. It asks the others, once and not for
    /// long, and begins if nobody answers: a machine that is too busy for that proves nothing.
    pub(crate) fn refuses_to_begin_anew(&self) {
        for _ in 0..3 {
            std::fs::remove_dir_all(&self.data_dir).expect("the data can be removed");
            let mut node = self.spawn();
            if node.ready_or_ended() {
                continue;
            }
            let (status, log) = (node.wait_end(END_TIMEOUT), node.log());
            assert_eq!(status.code(), Some(1), "{log}");
            assert!(log.contains("has already been bootstrapped"), "{log}");
            return;
        }
        panic!("it begins anew");
    }

    /// Starts a node that is expected to refuse, and waits for its end. Returns its exit code and its output.
    pub(crate) fn run_to_end(&self) -> (Option<i32>, String) {
        let mut node = self.spawn();
        let status = node.wait_end(END_TIMEOUT);
        (status.code(), node.log())
    }
}

/// A running process. Dropped, it is killed.
pub(crate) struct Node {
    child: Child,
    url: String,
    log: PathBuf,
    /// Where in the file the output of this start begins.
    log_start: u64,
    started: Instant,
}

impl Node {
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the node serves. Returns how long that took since its start.
    pub(crate) fn wait_ready(&mut self) -> Duration {
        while !self.log().contains(READY) {
            if let Some(status) = self.child.try_wait().expect("the process can be waited for") {
                panic!("the node ended before it was ready ({status}): {}", self.log());
            }
            let waited = self.started.elapsed();
            assert!(
                waited < READY_TIMEOUT,
                "the node is not ready after {waited:?}: {}",
                self.log()
            );
            std::thread::sleep(POLL);
        }
        self.started.elapsed()
    }

    /// Waits until the node serves or ends, and says whether it serves.
    pub(crate) fn ready_or_ended(&mut self) -> bool {
        while !self.log().contains(READY) {
            if self.child.try_wait().expect("the process can be waited for").is_some() {
                return false;
            }
            assert!(
                self.started.elapsed() < READY_TIMEOUT,
                "the node is not ready: {}",
                self.log()
            );
            std::thread::sleep(POLL);
        }
        true
    }

    /// Everything that this process has written so far.
    pub(crate) fn log(&self) -> String {
        let read = || {
            let mut file = File::open(&self.log)?;
            file.seek(SeekFrom::Start(self.log_start))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            std::io::Result::Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        read().expect("the log can be read")
    }

    /// Waits until the log says this. A thread of its own writes the log, so that what is seen of the node by other means
    /// may come before its line.
    #[track_caller]
    pub(crate) fn wait_log(&self, text: &str) {
        let begun = Instant::now();
        while !self.log().contains(text) {
            assert!(begun.elapsed() < READY_TIMEOUT, "{text} is missing: {}", self.log());
            std::thread::sleep(POLL);
        }
    }

    /// Kills the process as kill -9 does, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        // Fails only for a process that was waited for already.
        let _ = self.child.kill();
        self.child.wait().expect("the process can be waited for");
    }

    /// Sends SIGTERM and returns at once.
    pub(crate) fn send_sigterm(&self) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::TERM).expect("SIGTERM can be sent to a child that nobody waited for");
    }

    /// Sends SIGTERM and waits for the end.
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        self.send_sigterm();
        self.wait_end(END_TIMEOUT)
    }

    /// Waits until the process ends by itself.
    pub(crate) fn wait_end(&mut self, timeout: Duration) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("the process can be waited for") {
                return status;
            }
            assert!(
                begun.elapsed() < timeout,
                "the node did not end within {timeout:?}: {}",
                self.log()
            );
            std::thread::sleep(POLL);
        }
    }

    /// A client with a connection of its own.
    pub(crate) async fn client(&self) -> Client {
        client(&self.url).await
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The binary under test: the one that cargo built beside the test, or any other, such as a release build.
fn binary() -> PathBuf {
    std::env::var_os("METASTORE_BIN").map_or_else(|| env!("CARGO_BIN_EXE_metastore").into(), PathBuf::from)
}

/// A client of whatever listens at `url`, or will.
pub(crate) async fn client(url: &str) -> Client {
    let options = ConnectOptions::new()
        .with_connect_timeout(Duration::from_secs(30))
        .with_timeout(Duration::from_secs(60));
    Client::connect([url], Some(options)).await.expect("the URL is one")
}

/// Repeats a call for as long as its cluster has no leader, as after a pause of the leader that the others took for its
/// end. Only for calls that may be done twice.
pub(crate) async fn retried<T>(mut call: impl AsyncFnMut() -> Result<T, Error>) -> T {
    let begun = Instant::now();
    loop {
        match call().await {
            Ok(answer) => return answer,
            Err(error) => {
                let is_unavailable = status(&error).is_some_and(|(code, _)| code == code::UNAVAILABLE);
                assert!(is_unavailable && begun.elapsed() < READY_TIMEOUT, "{error:?}");
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A directory for one test.
pub(crate) fn temp_dir() -> TempDir {
    tempfile::Builder::new()
        .prefix("metastore-test-")
        .tempdir()
        .expect("a temporary directory can be made")
}

/// A running node with an empty store, and its directory.
pub(crate) fn fresh(storage: Storage) -> (TempDir, Node) {
    let dir = temp_dir();
    let node = Setup::new(dir.path(), storage).start();
    (dir, node)
}

/// A port that nobody listens on. It lies below those that the system gives to outgoing connections: a client that tries
/// to reach a stopped node there could otherwise be given that very port, and connect to itself.
///
/// It is this process's as long as it runs: a UDP socket of the same number, which nobody else needs, keeps other tests
/// away while the port's node is not started yet, or is stopped.
pub(crate) fn free_port() -> u16 {
    const LOWEST: u16 = 10_000;
    const COUNT: u16 = 20_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    static RESERVED: Mutex<Vec<UdpSocket>> = Mutex::new(Vec::new());
    let start = (std::process::id() as u16).wrapping_mul(127) % COUNT;
    for _ in 0..COUNT {
        let offset = NEXT.fetch_add(1, Ordering::Relaxed) % COUNT;
        let port = LOWEST + (start + offset) % COUNT;
        let Ok(reserved) = UdpSocket::bind(("127.0.0.1", port)) else {
            continue;
        };
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            RESERVED.lock().expect("nothing panics in between").push(reserved);
            return port;
        }
    }
    panic!("no port is free");
}

/// The gRPC code and message of an error.
pub(crate) fn status(error: &Error) -> Option<(i32, String)> {
    match error {
        Error::GRpcStatus(status) => Some((status.code() as i32, status.message().to_owned())),
        _ => None,
    }
}

/// Checks that a call was refused with this code and message.
#[track_caller]
pub(crate) fn assert_refused<T>(result: Result<T, Error>, code: i32, message: &str) {
    let Err(error) = result else {
        panic!("the call succeeded and should have been refused with {message:?}");
    };
    assert_eq!(status(&error), Some((code, message.to_owned())), "{error:?}");
}

/// gRPC's codes, by number.
pub(crate) mod code {
    pub(crate) const UNKNOWN: i32 = 2;
    pub(crate) const INVALID_ARGUMENT: i32 = 3;
    pub(crate) const NOT_FOUND: i32 = 5;
    pub(crate) const RESOURCE_EXHAUSTED: i32 = 8;
    pub(crate) const FAILED_PRECONDITION: i32 = 9;
    pub(crate) const OUT_OF_RANGE: i32 = 11;
    pub(crate) const UNAVAILABLE: i32 = 14;
}
