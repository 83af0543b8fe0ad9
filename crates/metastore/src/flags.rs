//! Flags, environment variables and the configuration file, with the syntax and the precedence of etcd.
//!
//! [`FLAGS`] says what there is; [`load`] reads a command line into [`Settings`], where every flag has a value and the
//! place it came from. [`crate::config`] makes the typed configuration of it.

pub(crate) mod file;
mod help;
mod parse;
mod table;
mod value;

use std::collections::HashMap;
use std::fmt;

use crate::url::Url;

pub use help::{help, version};
pub use parse::load;
pub use table::{FLAGS, Flag, Group, Status};
pub use value::{GATES, Gate, Kind, Value, parse_duration};

/// Why the program ends before the node starts: one line for the user, and the exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What is wrong, and what to do about it.
    pub message: String,
    /// 2 for a command line that does not parse (as with etcd, whose flags are Go's), 1 for everything else.
    pub exit_code: u8,
}

impl Failure {
    /// A command line that does not parse.
    pub fn syntax(message: impl Into<String>) -> Failure {
        Failure {
            message: message.into(),
            exit_code: 2,
        }
    }

    /// Settings that parse but cannot be used.
    pub fn config(message: impl Into<String>) -> Failure {
        Failure {
            message: message.into(),
            exit_code: 1,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// What the command line asks for.
#[derive(Debug)]
pub enum Command {
    /// Print this to standard output and exit with 0.
    Print(String),
    /// Start the node.
    Start(Settings),
}

/// Where a setting came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Nobody set it.
    Default,
    /// A flag on the command line.
    CommandLine,
    /// This environment variable.
    Environment(String),
    /// This key of the configuration file.
    File(String),
}

/// Something to log once there is a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Whether the user should act on it.
    pub warning: bool,
    /// The message.
    pub message: String,
}

/// A value for every flag, and where each came from.
#[derive(Debug, Clone)]
pub struct Settings {
    values: HashMap<&'static str, (Value, Source)>,
    /// Common names that clients' certificates may carry. The file has a key for them, and there is no flag.
    pub client_allowed_cn: Vec<String>,
    /// What to log once there is a log.
    pub notes: Vec<Note>,
}

impl Default for Settings {
    fn default() -> Settings {
        let default_of = |flag: &Flag| {
            let value = flag.kind.parse(flag.default);
            value.unwrap_or_else(|error| panic!("the default of --{} {error}", flag.name))
        };
        let values = FLAGS
            .iter()
            .map(|flag| (flag.name, (default_of(flag), Source::Default)))
            .collect();
        Settings {
            values,
            client_allowed_cn: Vec::new(),
            notes: Vec::new(),
        }
    }
}

impl Settings {
    fn set(&mut self, flag: &'static Flag, value: Value, source: Source) {
        // As in etcd, an empty list of URLs leaves the default in place.
        if value != Value::Urls(Vec::new()) {
            self.values.insert(flag.name, (value, source));
        }
    }

    fn warn(&mut self, message: impl Into<String>) {
        self.notes.push(Note {
            warning: true,
            message: message.into(),
        });
    }

    fn inform(&mut self, message: impl Into<String>) {
        self.notes.push(Note {
            warning: false,
            message: message.into(),
        });
    }

    fn entry(&self, name: &str) -> &(Value, Source) {
        self.values
            .get(name)
            .unwrap_or_else(|| panic!("there is no flag --{name}"))
    }

    /// Where the value of a flag came from.
    pub fn source(&self, name: &str) -> &Source {
        &self.entry(name).1
    }

    /// Whether anybody set the flag.
    pub fn is_set(&self, name: &str) -> bool {
        self.source(name) != &Source::Default
    }

    /// Whether the flag holds something other than its default.
    pub fn differs(&self, flag: &Flag) -> bool {
        flag.kind.parse(flag.default).as_ref() != Ok(&self.entry(flag.name).0)
    }

    /// A flag of [`Kind::Bool`].
    pub fn boolean(&self, name: &str) -> bool {
        match &self.entry(name).0 {
            Value::Bool(value) => *value,
            other => wrong_kind(name, other),
        }
    }

    /// A flag of [`Kind::Number`] or [`Kind::Bytes`].
    pub fn number(&self, name: &str) -> i128 {
        match &self.entry(name).0 {
            Value::Number(value) => *value,
            other => wrong_kind(name, other),
        }
    }

    /// A flag of [`Kind::Duration`], in nanoseconds.
    pub fn duration_ns(&self, name: &str) -> i64 {
        match &self.entry(name).0 {
            Value::Duration(value) => *value,
            other => wrong_kind(name, other),
        }
    }

    /// A flag of [`Kind::Text`] or [`Kind::Choice`].
    pub fn text(&self, name: &str) -> &str {
        match &self.entry(name).0 {
            Value::Text(value) => value,
            other => wrong_kind(name, other),
        }
    }

    /// A flag of [`Kind::List`].
    pub fn list(&self, name: &str) -> &[String] {
        match &self.entry(name).0 {
            Value::List(value) => value,
            other => wrong_kind(name, other),
        }
    }

    /// A flag of [`Kind::Urls`].
    pub fn urls(&self, name: &str) -> &[Url] {
        match &self.entry(name).0 {
            Value::Urls(value) => value,
            other => wrong_kind(name, other),
        }
    }

    /// A flag of [`Kind::Gates`].
    pub fn gates(&self, name: &str) -> &[(String, bool)] {
        match &self.entry(name).0 {
            Value::Gates(value) => value,
            other => wrong_kind(name, other),
        }
    }
}

/// The code asks for a flag as what it is not; no input leads here.
fn wrong_kind(name: &str, value: &Value) -> ! {
    panic!("--{name} holds {value:?}, which is of another kind")
}
