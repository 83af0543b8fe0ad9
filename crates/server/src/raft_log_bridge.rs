//! Brings what raft-rs logs (through `slog`) into our own log.

use slog::{Drain, KV, Level, Never, OwnedKVList, Record};

struct Bridge;

/// Collects a record's fields as text.
struct Fields(String);

impl slog::Serializer for Fields {
    fn emit_arguments(&mut self, key: slog::Key, value: &std::fmt::Arguments<'_>) -> slog::Result {
        use std::fmt::Write as _;
        let space = if self.0.is_empty() { "" } else { " " };
        write!(self.0, "{space}{key}={value}").map_err(|_| slog::Error::Other)
    }
}

impl Drain for Bridge {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
        let mut fields = Fields(String::new());
        // A field that cannot be written is left out; the message is what counts.
        let _ = record.kv().serialize(record, &mut fields);
        let _ = values.serialize(record, &mut fields);
        let (message, fields) = (record.msg(), fields.0);
        match record.level() {
            Level::Critical | Level::Error => tracing::error!(target: "raft", fields, "{message}"),
            Level::Warning => tracing::warn!(target: "raft", fields, "{message}"),
            // raft-rs says at this level what only its own developers want to know.
            Level::Info | Level::Debug | Level::Trace => tracing::debug!(target: "raft", fields, "{message}"),
        }
        Ok(())
    }
}

/// A logger for raft-rs.
pub(crate) fn logger() -> slog::Logger {
    slog::Logger::root(Bridge, slog::o!())
}
