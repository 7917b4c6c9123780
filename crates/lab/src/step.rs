//! Steps: what happens in a lab, one after the other, and what came of each.

use std::cell::RefCell;
use std::time::Duration;

use indexmap::IndexMap;

use crate::process::{Process, Watch};
use crate::record::Recorder;
use crate::run::Progress;
use crate::scenario::{Expectation, Run, Step, Wait};
use crate::{Error, Lab, Result};

/// What came of the steps.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Name of each program that was run, the exit code it had to have, and how it ended.
    pub(crate) exits: Vec<(String, i32, Result<i32, String>)>,
    /// How the payload of each saved step arrived.
    pub(crate) arrivals: IndexMap<String, Arrival>,
    /// What the programs of expectations said, and whether they ended with 0.
    pub(crate) answers: IndexMap<String, (String, bool)>,
    /// What went wrong apart from that, and in which step; no later step was taken.
    pub(crate) failure: Option<(String, String)>,
}

/// How a payload arrived.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arrival {
    pub(crate) bytes: u64,
    /// The longest time without a byte.
    pub(crate) stall: Duration,
    /// All times of [`crate::process::GAP`] and more without a byte: begin and end, since the recording began.
    pub(crate) gaps: Vec<(Duration, Duration)>,
}

/// Takes all steps of the lab's scenario, up to the first that fails.
pub(crate) async fn play(lab: &mut Lab, recorder: &Recorder, progress: &dyn Fn(Progress)) -> Outcome {
    let steps = lab.scenario().steps.clone();
    let mut play = Play { lab, recorder, background: IndexMap::new(), outcome: Outcome::default() };
    for (index, (name, step)) in steps.iter().enumerate() {
        progress(Progress::Step { name: name.clone(), number: index + 1, of: steps.len() });
        recorder.begin(name).await;
        let taken = play.take(name, step).await;
        let in_background = matches!(step, Step::Run(run) if run.background);
        if !in_background {
            recorder.end(name).await;
        }
        if let Err(error) = taken {
            play.outcome.failure = Some((name.clone(), error.to_string()));
        }
        if play.has_failed() {
            break;
        }
    }
    play.end_background().await;
    play.outcome
}

/// Runs the programs of expectations.
pub(crate) async fn ask(lab: &Lab) -> Result<IndexMap<String, (String, bool)>> {
    const PATIENCE: Duration = Duration::from_secs(10);
    let mut answers = IndexMap::new();
    for (name, expectation) in &lab.scenario().expect {
        let Expectation::Command(asked) = expectation else { continue };
        let process = lab.run(&asked.node, name, &asked.command, Watch::default()).await?;
        let answer = match tokio::time::timeout(PATIENCE, process.exit()).await {
            Ok(status) if status.success() => (process.last_words(), true),
            Ok(status) => match process.last_words() {
                words if words.is_empty() => (process.describe(status), false),
                words => (words, false),
            },
            Err(_) => (format!("no answer in {PATIENCE:?}"), false),
        };
        answers.insert(name.clone(), answer);
    }
    Ok(answers)
}

struct Play<'l> {
    lab: &'l mut Lab,
    recorder: &'l Recorder,
    background: IndexMap<String, (Run, Process)>,
    outcome: Outcome,
}

impl Play<'_> {
    async fn take(&mut self, name: &str, step: &Step) -> Result<()> {
        match step {
            Step::Run(run) => {
                let watch = Watch {
                    save: run.save.as_ref().map(|file| self.lab.work().join(file)),
                    ..Watch::default()
                };
                let process = self.lab.run(&run.node, name, &run.command, watch).await?;
                if run.background {
                    self.background.insert(name.into(), (run.clone(), process));
                    return Ok(());
                }
                self.finish(name, run, process).await
            }
            Step::Link(change) => {
                if let Some(shape) = &change.shape {
                    self.lab.shape_link(&change.link, shape)?;
                }
                change.state.map_or(Ok(()), |state| self.lab.set_link(&change.link, state))
            }
            Step::Wait(wait) => self.wait(wait).await,
            Step::Start(start) => self.lab.start(&start.process).await,
            Step::Stop(stop) => {
                self.lab.stop(&stop.process).await;
                Ok(())
            }
        }
    }

    /// Waits for the end of a program and notes how it ended.
    async fn finish(&mut self, name: &str, run: &Run, process: Process) -> Result<()> {
        let end = tokio::select! {
            status = process.exit() => match status.code() {
                Some(code) if code == run.exit => Ok(code),
                _ => Err(process.describe(status)),
            },
            () = tokio::time::sleep(run.timeout) => Err(format!("still running after {:?}", run.timeout)),
            error = self.lab.first_to_end() => return Err(error),
        };
        self.outcome.exits.push((name.into(), run.exit, end));
        if run.save.is_some() {
            self.arrived(name, &process);
        }
        Ok(())
    }

    fn arrived(&mut self, name: &str, process: &Process) {
        let delivery = process.delivery();
        let at = |moment| self.recorder.at(moment);
        let gaps = delivery.gaps.iter().map(|(from, to)| (at(*from), at(*to))).collect();
        let arrival = Arrival { bytes: delivery.bytes, stall: delivery.stall, gaps };
        self.outcome.arrivals.insert(name.into(), arrival);
    }

    async fn wait(&mut self, wait: &Wait) -> Result<()> {
        if let (Some(step), None) = (&wait.step, wait.bytes) {
            return self.end_of(step).await;
        }
        let last_try = RefCell::new(String::new());
        let enough = async {
            match (&wait.step, wait.bytes, &wait.node) {
                (Some(step), Some(bytes), _) => {
                    // One that has been waited for has delivered all it had.
                    if let Some((_, process)) = self.background.get(step) {
                        process.bytes(bytes).await;
                    }
                }
                (_, _, Some(node)) if !wait.command.is_empty() => {
                    return self.until_done(node, &wait.command, &last_try).await;
                }
                (_, _, Some(node)) => {
                    self.recorder
                        .wait_for(|record| {
                            let seen = |kind| {
                                record
                                    .events
                                    .iter()
                                    .filter(|seen| &seen.node == node && seen.event.kind == kind)
                                    .count()
                            };
                            wait.events.iter().all(|(kind, count)| seen(kind.0) as u64 >= *count)
                        })
                        .await;
                }
                _ => std::future::pending().await,
            }
            Ok(())
        };
        let go_on = async {
            match wait.time {
                Some(time) => tokio::time::sleep(time).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            done = enough => done,
            () = go_on => Ok(()),
            // A wait for nothing but time may be longer than a timeout that nobody has given.
            () = tokio::time::sleep(wait.timeout), if wait.time.is_none() => {
                Err(Error::program("wait", format!("nothing after {:?}{}", wait.timeout, last_try.take())))
            }
            error = self.lab.first_to_end() => Err(error),
        }
    }

    /// Runs a program again and again, until it ends with 0; notes how it ended the last time that it did not.
    async fn until_done(&self, node: &str, words: &[String], last_try: &RefCell<String>) -> Result<()> {
        loop {
            let process = self.lab.run(node, &words[0], words, Watch::default()).await?;
            let status = process.exit().await;
            if status.success() {
                return Ok(());
            }
            last_try.replace(format!("; last try: {}", process.describe(status)));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits for the end of a program in the background.
    async fn end_of(&mut self, name: &str) -> Result<()> {
        // It may have been waited for already.
        let Some((run, process)) = self.background.shift_remove(name) else { return Ok(()) };
        let finished = self.finish(name, &run, process).await;
        self.recorder.end(name).await;
        finished
    }

    async fn end_background(&mut self) {
        if self.has_failed() {
            for (name, (run, process)) in std::mem::take(&mut self.background) {
                if run.save.is_some() {
                    self.arrived(&name, &process);
                }
                process.stop().await;
                self.recorder.end(&name).await;
            }
            return;
        }
        while let Some(name) = self.background.keys().next().cloned() {
            if let Err(error) = self.end_of(&name).await {
                self.outcome.failure.get_or_insert((name, error.to_string()));
            }
        }
    }

    fn has_failed(&self) -> bool {
        self.outcome.failure.is_some() || self.outcome.exits.iter().any(|(.., end)| end.is_err())
    }
}
