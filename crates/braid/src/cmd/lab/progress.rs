//! How far a scenario has come: a line that changes on a terminal, lines one after the other elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use lab::run::Progress;

use crate::output;

/// Shows progress on standard error, until it is dropped.
pub struct Display {
    scenario: String,
    bar: Option<ProgressBar>,
}

impl Display {
    pub fn new(scenario: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner().with_prefix(scenario.to_string());
            let style = ProgressStyle::with_template("{spinner} {prefix} {elapsed} {wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        let display = Display { scenario: scenario.into(), bar };
        display.say("building the network".into());
        display
    }

    pub fn show(&self, progress: Progress) {
        self.say(match progress {
            Progress::Starting => "starting programs".into(),
            Progress::Step { name, number, of } => format!("step {number}/{of}: {name}"),
            Progress::Judging => "judging".into(),
        });
    }

    fn say(&self, message: String) {
        match &self.bar {
            Some(bar) => bar.set_message(message),
            None => output::note(format_args!("{}: {message}", self.scenario)),
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
