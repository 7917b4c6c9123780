//! How far a scenario has come: a line that changes on a terminal, lines one after the other elsewhere.

use std::cell::RefCell;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use lab::run::Progress;

use crate::output;

/// Shows progress on standard error, until it is dropped.
pub struct Display {
    scenario: String,
    bar: Option<ProgressBar>,
    step: RefCell<String>,
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
        let display = Display { scenario: scenario.into(), bar, step: RefCell::default() };
        display.say("building the network".into());
        display
    }

    /// Has it room for the rates of links?
    pub fn shows_rates(&self) -> bool {
        self.bar.is_some()
    }

    pub fn show(&self, progress: Progress) {
        let step = match progress {
            Progress::Starting => "starting programs".into(),
            Progress::Step { name, number, of } => format!("step {number}/{of}: {name}"),
            Progress::Judging => "judging".into(),
            Progress::Rates(rates) => return self.show_rates(&rates),
        };
        self.step.replace(step.clone());
        self.say(step);
    }

    /// Behind the step, on a terminal only.
    fn show_rates(&self, rates: &[(String, f64)]) {
        if let Some(bar) = &self.bar
            && !rates.is_empty()
        {
            let links: Vec<_> =
                rates.iter().map(|(link, rate)| format!("{link} {:.1}", rate / 1e6)).collect();
            bar.set_message(format!("{}   {} Mbit/s", self.step.borrow(), links.join(", ")));
        }
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
