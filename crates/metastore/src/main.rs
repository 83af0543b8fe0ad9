//! `metastore`: one node of the store, an answer about it, `metastore bench`, or `metastore snapshot`.

use std::io::Write;
use std::process::ExitCode;

use metastore::config::Config;
use metastore::flags::{self, Command, Failure};
use metastore::logging;
use metastore::start::start;

/// Many small, short-lived allocations on every call: the system's allocator is slower at those and fragments.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long the reader of standard error may take to let the process say why it ends.
const LAST_WORDS_MAX: std::time::Duration = std::time::Duration::from_secs(5);

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    match args.next().as_ref().and_then(|first| first.to_str()) {
        Some("bench") => return bench::main_with_args(args),
        Some("snapshot") => return metastore::snapshot::main_with_args(args),
        _ => {}
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // There may be no reader, or one that reads nothing; the exit code says it too.
            let exit_code = failure.exit_code;
            let (written, waits) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                let _ = writeln!(std::io::stderr(), "metastore: {failure}");
                let _ = written.send(());
            });
            let _ = waits.recv_timeout(LAST_WORDS_MAX);
            ExitCode::from(exit_code)
        }
    }
}

fn run() -> Result<(), Failure> {
    metastore::memory::settle();
    let args = std::env::args_os()
        .skip(1)
        .map(|arg| {
            arg.into_string()
                .map_err(|arg| Failure::config(format!("argument {arg:?} is not UTF-8")))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let env: Vec<_> = std::env::vars_os()
        .map(|(name, value)| {
            (
                name.to_string_lossy().into_owned(),
                value.to_string_lossy().into_owned(),
            )
        })
        .collect();
    let settings = match flags::load(&args, &env)? {
        Command::Start(settings) => settings,
        Command::Print(text) => {
            // Whoever closed the pipe, as head does, has read enough.
            let _ = std::io::stdout().write_all(text.as_bytes());
            return Ok(());
        }
    };
    let (config, notes) = Config::from_settings(&settings)?;
    let log = logging::init(&config.log)?;
    for note in notes {
        if note.warning {
            tracing::warn!("{}", note.message);
        } else {
            tracing::info!("{}", note.message);
        }
    }
    let signal = start(&config)?;
    drop(log);
    // Whoever started us learns from our end that we obeyed a signal, as with etcd. The first process of a container
    // cannot end by a signal, so it ends well.
    if std::process::id() != 1 {
        let _ = signal_hook::low_level::emulate_default_handler(signal);
    }
    Ok(())
}
