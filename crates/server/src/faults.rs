//! Faults on demand, for tests of a real cluster.
//!
//! Off unless the environment names a file (`METASTORE_FAULT_FILE`). The file is read now and then; each line is a fault:
//!
//! ```text
//! log-sync-delay-ms N     every write of the Raft log takes N milliseconds longer
//! corrupt-puts N          this member, and no other, applies the next N puts with a wrong value
//! ```
//!
//! A file that is missing or empty is no fault. A line that is none of these is ignored: a fault file is a test's own.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use api::codec::{Action, decode_entry, encode_entry, encode_operation};
use mvcc::Committed;
use mvcc::machine::Command;

/// How often the file is read.
const READ_INTERVAL: Duration = Duration::from_millis(50);

/// What one thread knows of the faults that it is to simulate.
pub(crate) struct Faults {
    file: Option<PathBuf>,
    read: Option<Instant>,
    text: String,
    log_delay: Duration,
    corrupt_puts: u64,
}

impl Faults {
    pub(crate) fn new(file: Option<PathBuf>) -> Self {
        Faults {
            file,
            read: None,
            text: String::new(),
            log_delay: Duration::ZERO,
            corrupt_puts: 0,
        }
    }

    fn refresh(&mut self) {
        let Some(file) = &self.file else { return };
        if self.read.is_some_and(|read| read.elapsed() < READ_INTERVAL) {
            return;
        }
        self.read = Some(Instant::now());
        let text = std::fs::read_to_string(file).unwrap_or_default();
        if text == self.text {
            return;
        }
        (self.log_delay, self.corrupt_puts) = (Duration::ZERO, 0);
        for line in text.lines() {
            match line.split_once(' ').map(|(name, value)| (name, value.trim().parse())) {
                Some(("log-sync-delay-ms", Ok(ms))) => self.log_delay = Duration::from_millis(ms),
                Some(("corrupt-puts", Ok(count))) => self.corrupt_puts = count,
                _ => {}
            }
        }
        self.text = text;
    }

    /// Waits as long as the log's disk is to be slower.
    pub(crate) fn delay_log(&mut self) {
        self.refresh();
        let begun = Instant::now();
        while begun.elapsed() < self.log_delay {
            std::thread::sleep(Duration::from_millis(5).min(self.log_delay));
            self.refresh();
        }
    }

    /// Changes the values of puts that are about to be applied.
    pub(crate) fn corrupt(&mut self, entries: &mut [Committed]) {
        if self.file.is_none() {
            return;
        }
        self.refresh();
        for entry in entries {
            let Command::Operations(data) = &mut entry.command else {
                continue;
            };
            if self.corrupt_puts == 0 {
                return;
            }
            let mut operations = decode_entry(data).unwrap_or_default();
            for operation in &mut operations {
                if let Some(Action::Put(put)) = &mut operation.action
                    && self.corrupt_puts > 0
                {
                    self.corrupt_puts -= 1;
                    put.value = [&put.value[..], b"?"].concat().into();
                    tracing::warn!(
                        index = entry.index,
                        "a put is applied with a wrong value, as the fault file asks"
                    );
                }
            }
            if !operations.is_empty() {
                let encoded: Vec<_> = operations.iter().map(encode_operation).collect();
                *data = encode_entry(encoded.iter().map(|bytes| &bytes[..])).into();
            }
        }
    }
}
