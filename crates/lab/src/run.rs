//! A scenario from its first process to its verdict.

use std::convert::Infallible;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::judge::{self, Verdict};
use crate::record::{Record, Recorder};
use crate::{Lab, Result, step};

/// How far a scenario has come.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Progress {
    /// Its programs are being started.
    Starting,
    /// A step begins.
    Step {
        /// Its name.
        name: String,
        /// From 1.
        number: usize,
        /// How many there are.
        of: usize,
    },
    /// While steps run, where it is wanted: what each link carries, both directions together, in bits per second.
    Rates(Vec<(String, f64)>),
    /// All steps are done; the last events may still come.
    Judging,
}

/// How long the path manager may take to tell of what the steps have done.
const SETTLE: Duration = Duration::from_secs(10);

/// Runs the scenario of `lab` in it, from a fresh start of all its processes. `rates`: tell [`Progress::Rates`] too.
pub async fn run(lab: &mut Lab, rates: bool, progress: &dyn Fn(Progress)) -> Result<(Verdict, Record)> {
    progress(Progress::Starting);
    lab.stop_processes().await;
    lab.reset_links()?;
    let recorder = Recorder::start(lab)?;
    lab.start_processes().await?;
    let mut outcome = tokio::select! {
        outcome = step::play(lab, &recorder, progress) => outcome,
        never = tell_rates(&recorder, progress), if rates => match never {},
    };
    progress(Progress::Judging);
    if outcome.failure.is_none() {
        let settled = recorder.wait_for(|record| judge::has_settled(lab.scenario(), record));
        // What has not come by then is missing, and the verdict says so.
        let _ = tokio::time::timeout(SETTLE, settled).await;
    }
    outcome.answers = step::ask(lab).await?;
    let record = recorder.record().clone();
    let mut verdict = judge::judge(lab.scenario(), &record, &outcome, &lab.work());
    if !verdict.pass {
        verdict.last_lines =
            lab.processes().map(|process| (process.name().into(), process.last_lines())).collect();
    }
    lab.stop_processes().await;
    Ok((verdict, record))
}

async fn tell_rates(recorder: &Recorder, progress: &dyn Fn(Progress)) -> Infallible {
    let mut tick = tokio::time::interval(Duration::from_millis(500));
    loop {
        tick.tick().await;
        let rates = recorder.record().rates(Duration::from_secs(1));
        progress(Progress::Rates(rates));
    }
}
