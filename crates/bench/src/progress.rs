//! What a person at a terminal sees while a run goes on.

use std::io::IsTerminal;
use std::sync::atomic::Ordering;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::clock::{SECOND, now};
use crate::window::Window;

/// A line at the bottom of the terminal; nothing if stderr is none.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Shows something only if it is wanted and stderr is a terminal.
    pub(crate) fn new(wanted: bool) -> Self {
        Progress {
            bar: (wanted && std::io::stderr().is_terminal()).then(ProgressBar::new_spinner),
        }
    }

    /// Begins something that has `length` steps, or an unknown number.
    pub(crate) fn begin(&self, what: &str, length: Option<u64>) {
        if let Some(bar) = &self.bar {
            let template = if length.is_some() {
                "{prefix} {wide_bar} {msg}"
            } else {
                "{spinner} {prefix} {msg}"
            };
            bar.set_style(ProgressStyle::with_template(template).expect("the template is valid"));
            bar.set_prefix(what.to_owned());
            bar.set_message("");
            bar.set_position(0);
            match length {
                Some(length) => bar.set_length(length),
                None => bar.unset_length(),
            }
            bar.enable_steady_tick(Duration::from_millis(250));
        }
    }

    /// Tells how far it is.
    pub(crate) fn position(&self, position: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(position);
        }
    }

    /// Tells how far a run is.
    pub(crate) fn show(&self, window: &Window, total: Option<u64>) {
        let Some(bar) = &self.bar else { return };
        let (now, from) = (now(), window.from());
        let done = window.done.load(Ordering::Relaxed);
        let failed = window.failed.load(Ordering::Relaxed);
        let position = match total {
            Some(_) => done + failed,
            None => now.saturating_sub(window.start()) / (SECOND / 1000),
        };
        bar.set_position(position);
        if now < from {
            bar.set_message("warming up");
        } else {
            let rate = done as f64 * SECOND as f64 / (now - from).max(1) as f64;
            let errors = if failed > 0 {
                format!(", {failed} failed")
            } else {
                String::new()
            };
            bar.set_message(format!("{rate:.0}/s{errors}"));
        }
    }

    /// Takes the line away.
    pub(crate) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.disable_steady_tick();
            bar.finish_and_clear();
            bar.reset();
        }
    }
}
