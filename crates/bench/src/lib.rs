//! `metastore bench`: a load generator over the etcd v3 API, the same against MetaStore and any etcd.
//!
//! It costs as little as it can, so that what it measures is the server: HTTP/2 without a gRPC library, one thread for
//! many connections and clients, nothing shared between threads while a run goes on but a few counters. It says what
//! it costs, and warns when that is too much. [`main_with_args`] is the whole of it for its callers.
//!
//! A run goes this way: `args` become a `plan`, which takes the systems in turn; `prepare` writes the keys; `measure`
//! starts a `thread` or more, each with its connections (`net`) and clients (`workload`), which `pace` lets begin
//! operations and which `record` what they see; `report` shows it.

mod args;
mod client;
mod clock;
mod interrupt;
mod keys;
mod load;
mod measure;
mod net;
mod pace;
mod plan;
mod prepare;
mod progress;
mod proto;
mod record;
mod report;
mod result;
mod scan;
mod shares;
mod stats;
mod thread;
mod units;
mod usage;
mod values;
mod window;
mod workload;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

pub use args::Args;

/// The exit code of wrong usage.
const EXIT_USAGE: u8 = 2;

/// Does what the command line says; `args` is what follows `metastore bench`.
///
/// The exit code is 0 if there is a result, 1 if there is none or nothing but errors, 2 if the command line is wrong.
pub fn main_with_args(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let name = OsString::from("metastore bench");
    match Args::try_parse_from(std::iter::once(name).chain(args)) {
        Ok(args) => run(args),
        Err(error) => {
            // There may be no reader; the exit code says it too.
            let _ = error.print();
            ExitCode::from(if error.use_stderr() { EXIT_USAGE } else { 0 })
        }
    }
}

/// Does what parsed arguments say, with exit codes as [`main_with_args`] has them.
pub fn run(args: Args) -> ExitCode {
    let complain = |message: &str| {
        let _ = writeln!(std::io::stderr(), "metastore bench: {message}");
    };
    let plan = match args.into_plan() {
        Ok(plan) => plan,
        Err(message) => {
            complain(&message);
            return ExitCode::from(EXIT_USAGE);
        }
    };
    match plan::run(plan) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            complain("no operation succeeded");
            ExitCode::FAILURE
        }
        Err(message) => {
            complain(&message);
            ExitCode::FAILURE
        }
    }
}
