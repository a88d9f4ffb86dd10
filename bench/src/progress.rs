//! How far a long step is: a bar on a terminal, a plain line now and then elsewhere.

use std::io::IsTerminal as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// A step under way.
pub struct Progress {
    what: &'static str,
    total: u64,
    started: Instant,
    shown: Shown,
}

enum Shown {
    Bar(ProgressBar),
    Lines(Mutex<(u64, Instant)>),
}

impl Progress {
    /// Starts to show a step of `total` parts.
    pub fn start(what: &'static str, total: u64) -> Self {
        let started = Instant::now();
        let shown = if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{msg} {wide_bar} {human_pos}/{human_len} {eta} left");
            let bar = ProgressBar::new(total).with_message(what);
            Shown::Bar(match style {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            })
        } else {
            Shown::Lines(Mutex::new((0, started)))
        };
        Self { what, total, started, shown }
    }

    /// `parts` more are done.
    pub fn advance(&self, parts: u64) {
        match &self.shown {
            Shown::Bar(bar) => bar.inc(parts),
            Shown::Lines(state) => {
                let mut state = state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                state.0 += parts;
                if state.1.elapsed() >= LINE_EVERY {
                    state.1 = Instant::now();
                    let seconds = self.started.elapsed().as_secs();
                    eprintln!("{}: {} of {} after {seconds} s", self.what, state.0, self.total);
                }
            }
        }
    }

    /// Ends the display. Returns how long the step took.
    pub fn finish(self) -> Duration {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
        self.started.elapsed()
    }
}
