//! Logs: JSON lines with etcd's keys in etcd's order, or text for people.
//!
//! A log that nobody reads must not stop the node (a full pipe stops etcd). So lines go through a bounded queue to a
//! thread of their own, one for each output; when a queue is full its lines are dropped, and a later line says how many.
//! Spans are not printed: every line carries all of its own fields.

mod rotate;

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::{Layer, Registry};

use self::rotate::RotatingFile;
use crate::flags::Failure;

pub use self::rotate::Rotation;

/// The target of events that end the process: `error!(target: FATAL, ...)` is printed with level `fatal`.
pub const FATAL: &str = "fatal";

/// Most lines that wait for one output; at 300 bytes a line about 5 MiB.
const WAITING_LINES_MAX: usize = 16_384;

/// The lowest level that is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// Everything, for developers.
    Debug,
    /// What an operator may want to know.
    Info,
    /// What an operator should look at.
    Warn,
    /// What went wrong.
    Error,
    /// Only why the process ended.
    Fatal,
}

/// The form of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object.
    Json,
    /// Text, with tabs between its parts.
    Console,
    /// Text on terminals, which are known by the variable TERM, and JSON elsewhere.
    ConsoleOnTerminals,
}

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogOutput {
    /// Standard error.
    Stderr,
    /// Standard output.
    Stdout,
    /// The end of this file.
    File(PathBuf),
}

/// What is logged, in which form, and where to. No outputs: nothing is logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// The lowest level that is logged.
    pub level: LogLevel,
    /// The form of a line.
    pub format: LogFormat,
    /// Where lines go.
    pub outputs: Vec<LogOutput>,
    /// How the file among the outputs is rotated, if it is.
    pub rotation: Option<Rotation>,
}

/// Keeps the writing threads. Dropped at the end of the process, it waits for the last lines, up to a second each.
#[must_use = "lines that still wait are lost unless this is dropped at the end"]
#[derive(Debug)]
pub struct LogGuard {
    _workers: Vec<WorkerGuard>,
}

/// Sets up the log of this process. To be called once.
pub fn init(config: &LogConfig) -> Result<LogGuard, Failure> {
    let mut outputs = Vec::new();
    let mut workers = Vec::new();
    // A program that reads through a terminal of its own, as etcd's tests do, says nothing of what the terminal can.
    let has_reader = std::env::var("TERM").is_ok_and(|kind| !kind.is_empty() && kind != "dumb");
    for output in &config.outputs {
        let (writer, terminal): (Box<dyn Write + Send>, bool) = match output {
            LogOutput::Stderr => (Box::new(io::stderr()), has_reader && io::stderr().is_terminal()),
            LogOutput::Stdout => (Box::new(io::stdout()), has_reader && io::stdout().is_terminal()),
            LogOutput::File(path) => {
                let opened = match config.rotation {
                    Some(rotation) => {
                        RotatingFile::open(path, rotation).map(|file| Box::new(file) as Box<dyn Write + Send>)
                    }
                    None => {
                        let file = OpenOptions::new().append(true).create(true).open(path);
                        file.map(|file| Box::new(file) as Box<dyn Write + Send>)
                    }
                };
                let file = opened.map_err(|error| {
                    Failure::config(format!("--log-outputs: cannot open {}: {error}", path.display()))
                })?;
                (file, false)
            }
        };
        let console = match config.format {
            LogFormat::Json => false,
            LogFormat::Console => true,
            LogFormat::ConsoleOnTerminals => terminal,
        };
        let (output, worker) = Output::new(writer, WAITING_LINES_MAX, console, terminal);
        outputs.push(output);
        workers.push(worker);
    }
    tracing::subscriber::set_global_default(subscriber(config.level, outputs))
        .map_err(|error| Failure::config(format!("the log is set up already: {error}")))?;
    // What Rust itself would do writes to standard error and waits: a panic would hang where nobody reads it, and the
    // node would neither work nor end.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let text = panic.payload_as_str().unwrap_or("a panic");
        let backtrace = std::backtrace::Backtrace::capture();
        tracing::error!(place, %backtrace, "a thread panicked: {text}");
    }));
    Ok(LogGuard { _workers: workers })
}

fn subscriber(level: LogLevel, outputs: Vec<Output>) -> impl Subscriber + Send + Sync {
    // The libraries' debug and info lines would bury ours.
    let (ours, libraries) = match level {
        LogLevel::Debug => (LevelFilter::DEBUG, LevelFilter::WARN),
        LogLevel::Info => (LevelFilter::INFO, LevelFilter::WARN),
        LogLevel::Warn => (LevelFilter::WARN, LevelFilter::WARN),
        LogLevel::Error => (LevelFilter::ERROR, LevelFilter::ERROR),
        LogLevel::Fatal => (LevelFilter::OFF, LevelFilter::OFF),
    };
    // The packages of this workspace are called metastore and metastore-*.
    let targets = Targets::new()
        .with_default(libraries)
        .with_target("metastore", ours)
        .with_target(FATAL, LevelFilter::ERROR);
    Registry::default().with(targets).with(LogLayer { outputs })
}

struct Output {
    writer: NonBlocking,
    dropped: ErrorCounter,
    dropped_said: AtomicUsize,
    console: bool,
    coloured: bool,
}

impl Output {
    fn new(
        writer: impl Write + Send + 'static,
        waiting_max: usize,
        console: bool,
        coloured: bool,
    ) -> (Output, WorkerGuard) {
        let (writer, worker) = NonBlockingBuilder::default()
            .lossy(true)
            .buffered_lines_limit(waiting_max)
            .thread_name("log")
            .finish(writer);
        let dropped = writer.error_counter();
        (
            Output {
                writer,
                dropped,
                dropped_said: AtomicUsize::new(0),
                console,
                coloured,
            },
            worker,
        )
    }

    fn write(&self, line: &Line) {
        let mut bytes = Vec::with_capacity(256);
        let dropped = self.dropped.dropped_lines();
        if dropped != self.dropped_said.load(Ordering::Relaxed) {
            let notice = Line {
                level: "warn",
                time: line.time.clone(),
                caller: Caller {
                    file: Some(file!()),
                    line: Some(line!()),
                },
                message: "log lines were dropped because their reader was too slow".to_owned(),
                fields: format!(",\"dropped-in-all\":{dropped}").into_bytes(),
            };
            self.encode(&notice, &mut bytes);
        }
        self.encode(line, &mut bytes);
        // In one piece, so that the notice is counted as dropped no more than it is said.
        let written = self.writer.clone().write_all(&bytes);
        debug_assert!(written.is_ok(), "a lossy writer never fails");
        if self.dropped.dropped_lines() == dropped {
            self.dropped_said.store(dropped, Ordering::Relaxed);
        }
    }

    fn encode(&self, line: &Line, out: &mut Vec<u8>) {
        if self.console {
            line.console(self.coloured, out)
        } else {
            line.json(out)
        }
    }
}

struct LogLayer {
    outputs: Vec<Output>,
}

impl<S: Subscriber> Layer<S> for LogLayer {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if self.outputs.is_empty() {
            return;
        }
        let line = Line::of(event);
        for output in &self.outputs {
            output.write(&line);
        }
    }
}

struct Line {
    level: &'static str,
    time: String,
    caller: Caller,
    message: String,
    /// `,"name":value` for each field.
    fields: Vec<u8>,
}

impl Line {
    fn of(event: &Event<'_>) -> Line {
        let metadata = event.metadata();
        let mut time = String::with_capacity(27);
        // Into a string it cannot fail; a line without its time is better than none.
        let _ = SystemTime.format_time(&mut Writer::new(&mut time));
        let mut line = Line {
            level: level(metadata),
            time,
            caller: Caller {
                file: metadata.file(),
                line: metadata.line(),
            },
            message: String::new(),
            fields: Vec::new(),
        };
        event.record(&mut line);
        line
    }

    fn json(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"level\":\"");
        out.extend_from_slice(self.level.as_bytes());
        out.extend_from_slice(b"\",\"ts\":\"");
        out.extend_from_slice(self.time.as_bytes());
        out.extend_from_slice(b"\",\"caller\":");
        json(out, &self.caller.to_string());
        out.extend_from_slice(b",\"msg\":");
        json(out, &self.message);
        out.extend_from_slice(&self.fields);
        out.extend_from_slice(b"}\n");
    }

    fn console(&self, coloured: bool, out: &mut Vec<u8>) {
        let colour = match self.level {
            "debug" => 35,
            "info" => 34,
            "warn" => 33,
            _ => 31,
        };
        let level = if coloured {
            format!("\x1b[{colour}m{}\x1b[0m", self.level)
        } else {
            self.level.to_owned()
        };
        let head = format!("{}\t{level}\t{}\t{}", self.time, self.caller, self.message);
        out.extend_from_slice(head.as_bytes());
        if let Some((_, fields)) = self.fields.split_first() {
            out.extend_from_slice(b"\t{");
            out.extend_from_slice(fields);
            out.push(b'}');
        }
        out.push(b'\n');
    }

    fn field(&mut self, field: &Field, value: &(impl serde::Serialize + ?Sized)) {
        self.fields.push(b',');
        json(&mut self.fields, field.name());
        self.fields.push(b':');
        json(&mut self.fields, value);
    }
}

fn json(out: &mut Vec<u8>, value: &(impl serde::Serialize + ?Sized)) {
    let written = serde_json::to_writer(out, value);
    debug_assert!(written.is_ok(), "texts and numbers always encode");
}

fn level(metadata: &Metadata<'_>) -> &'static str {
    match *metadata.level() {
        Level::ERROR if metadata.target() == FATAL => "fatal",
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG | Level::TRACE => "debug",
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            self.field(field, &format!("{value:?}"));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = value.to_owned();
        } else {
            self.field(field, value);
        }
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.field(field, &value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.field(field, &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.field(field, &value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.field(field, &value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.field(field, &value.to_string());
    }
}

/// Where in the source a line comes from: the last folder that says something, the file and the line.
struct Caller {
    file: Option<&'static str>,
    line: Option<u32>,
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = Path::new(self.file.unwrap_or("unknown"));
        let name = |path: &Path| {
            path.file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default()
        };
        let mut folders = path.ancestors().skip(1).map(name);
        if let Some(folder) = folders.find(|folder| folder != "src")
            && !folder.is_empty()
        {
            write!(f, "{folder}/")?;
        }
        write!(f, "{}:{}", name(path), self.line.unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Sink {
        /// Everything that was written, once the writing thread has gone with its end of this. Its guard does not wait for
        /// as long as a busy machine may take for that.
        fn whole(&self) -> String {
            let begun = Instant::now();
            while Arc::strong_count(&self.0) > 1 {
                assert!(
                    begun.elapsed() < Duration::from_secs(60),
                    "the writing thread does not end"
                );
                std::thread::sleep(Duration::from_millis(1));
            }
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    fn logged(level: LogLevel, console: bool, body: impl FnOnce()) -> String {
        let sink = Sink::default();
        let (output, worker) = Output::new(sink.clone(), 100, console, false);
        tracing::subscriber::with_default(subscriber(level, vec![output]), body);
        drop(worker);
        sink.whole()
    }

    #[test]
    fn json_lines_have_the_keys_of_etcd_in_order() {
        let error = io::Error::other("a \"b\"\n");
        let text = logged(LogLevel::Info, false, || {
            tracing::info!(
                name = "x",
                count = 3_u64,
                below = -1_i64,
                ratio = 0.5,
                on = true,
                error = &error as &(dyn std::error::Error + 'static),
                shown = %"y",
                "ready to serve {}",
                "requests"
            );
        });
        assert_eq!(text.lines().count(), 1);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["msg"], "ready to serve requests");
        assert_eq!(
            (&value["count"], &value["below"], &value["on"]),
            (&3.into(), &(-1).into(), &true.into())
        );
        assert_eq!((&value["error"], &value["shown"]), (&"a \"b\"\n".into(), &"y".into()));
        assert!(text.starts_with("{\"level\":\"info\",\"ts\":\"2"), "{text}");
        let at = |key: &str| text.find(&format!("\"{key}\":")).unwrap();
        assert!(at("ts") < at("caller") && at("caller") < at("msg") && at("msg") < at("name"));
        // Microseconds and the offset, as etcd writes them where the clock runs in UTC.
        let ts = value["ts"].as_str().unwrap();
        assert_eq!(
            (ts.len(), &ts[10..11], &ts[19..20], &ts[26..]),
            (27, "T", ".", "Z"),
            "{ts}"
        );
        assert!(
            value["caller"].as_str().unwrap().starts_with("metastore/logging.rs:"),
            "{text}"
        );
    }

    #[test]
    fn console_lines_are_tabbed() {
        let text = logged(LogLevel::Info, true, || tracing::warn!(a = 1, "b"));
        let parts: Vec<_> = text.trim_end().split('\t').collect();
        assert_eq!((parts[1], parts[3], parts[4]), ("warn", "b", "{\"a\":1}"));
    }

    #[test]
    fn levels_filter_ours_and_the_libraries_apart() {
        let lines = |level| {
            logged(level, true, || {
                tracing::debug!("ours-debug");
                tracing::info!("ours-info");
                tracing::info!(target: "h2", "theirs-info");
                tracing::warn!(target: "h2", "theirs-warn");
                tracing::error!("ours-error");
                tracing::error!(target: FATAL, "the-end");
            })
        };
        let debug = lines(LogLevel::Debug);
        assert!(debug.contains("ours-debug") && debug.contains("theirs-warn") && !debug.contains("theirs-info"));
        let info = lines(LogLevel::Info);
        assert!(info.contains("ours-info") && !info.contains("ours-debug"));
        let error = lines(LogLevel::Error);
        assert!(error.contains("ours-error") && !error.contains("theirs-warn"));
        let fatal = lines(LogLevel::Fatal);
        assert!(fatal.contains("\tfatal\t") && fatal.contains("the-end") && !fatal.contains("ours-error"));
    }

    /// A reader that takes nothing until it is told to.
    struct Blocked {
        started: SyncSender<()>,
        release: Receiver<()>,
        released: bool,
        sink: Sink,
    }

    impl Write for Blocked {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if !self.released {
                let _ = self.started.send(());
                self.released = self.release.recv().is_ok();
            }
            self.sink.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_blocked_reader_costs_lines_and_not_the_node() {
        let (started, writing) = sync_channel(1);
        let (unblock, release) = sync_channel(1);
        let sink = Sink::default();
        let blocked = Blocked {
            started,
            release,
            released: false,
            sink: sink.clone(),
        };
        let (output, worker) = Output::new(blocked, 10, false, false);
        let dropped = output.dropped.clone();
        tracing::subscriber::with_default(subscriber(LogLevel::Info, vec![output]), || {
            tracing::info!("first");
            writing.recv().unwrap();
            // The thread holds one line and the queue ten; these return at once all the same.
            for number in 0..100 {
                tracing::info!(number, "line");
            }
            assert_eq!(dropped.dropped_lines(), 90);
            unblock.send(()).unwrap();
            while !String::from_utf8_lossy(&sink.0.lock().unwrap()).contains("\"number\":9}") {
                std::thread::yield_now();
            }
            tracing::info!("after");
            tracing::info!("later");
        });
        drop(worker);
        let text = sink.whole();
        assert_eq!(text.matches("\"dropped-in-all\":90}").count(), 1, "{text}");
        assert_eq!(text.lines().count(), 1 + 10 + 1 + 2);
        for line in text.lines() {
            assert!(serde_json::from_str::<serde_json::Value>(line).is_ok(), "{line}");
        }
    }

    #[test]
    fn callers_name_the_crate_rather_than_its_src() {
        let shown = |file| {
            Caller {
                file: Some(file),
                line: Some(7),
            }
            .to_string()
        };
        assert_eq!(shown("crates/server/src/node.rs"), "server/node.rs:7");
        assert_eq!(shown("crates/server/src/node/disk.rs"), "node/disk.rs:7");
        assert_eq!(shown("main.rs"), "main.rs:7");
    }
}
