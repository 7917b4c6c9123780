//! Labs that stay up: their process takes orders on a socket, and ends at SIGTERM.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::mpsc;

use crate::home::{Card, Home};
use crate::judge::Verdict;
use crate::run::{self, Progress};
use crate::{Error, Lab, Result};

/// What the lab's process answers, one line of JSON each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Progress(Progress),
    Verdict(Verdict),
    Error(String),
}

/// Starts the lab's processes and serves its control socket; ends only with an error.
pub async fn serve(lab: &mut Lab, ready: impl FnOnce()) -> Result<()> {
    let path = lab.card().control();
    let listener = UnixListener::bind(&path)
        .map_err(|error| Error::io(format!("listen on {}", path.display()), error))?;
    lab.start_processes().await?;
    ready();
    loop {
        // Whoever connects wants the scenario to be run and judged, and says by a byte whether to hear of rates.
        let accepted = listener.accept().await;
        let (mut stream, _) =
            accepted.map_err(|error| Error::io(format!("accept on {}", path.display()), error))?;
        let Ok(rates) = stream.read_u8().await else { continue };
        let (answers, mut queue) = mpsc::unbounded_channel();
        let send = async {
            while let Some(answer) = queue.recv().await {
                let line = serde_json::to_string(&answer).unwrap_or_default() + "\n";
                // Somebody who has gone away does not stop the check: the lab ends it in good order.
                let _ = stream.write_all(line.as_bytes()).await;
            }
        };
        let check = async {
            let progress = |progress| drop(answers.send(Answer::Progress(progress)));
            let answer = match run::run(lab, rates != 0, &progress).await {
                Ok((verdict, _)) => Answer::Verdict(verdict),
                Err(error) => Answer::Error(error.to_string()),
            };
            let _ = answers.send(answer);
            drop(answers);
            lab.reset_links()?;
            lab.start_processes().await
        };
        let ((), checked) = tokio::join!(send, check);
        if let Err(error) = checked {
            tracing::warn!(%error, "the lab's programs are not running");
        }
    }
}

/// Has the running lab `card` run and judge its scenario.
pub fn check(card: &Card, rates: bool, progress: impl Fn(Progress)) -> Result<Verdict> {
    let what = format!("ask lab {}", card.name);
    let path = card.control();
    let mut stream = UnixStream::connect(&path).map_err(|error| Error::io(what.as_str(), error))?;
    stream.write_all(&[rates.into()]).map_err(|error| Error::io(what.as_str(), error))?;
    for line in BufReader::new(stream).lines() {
        let line = line.map_err(|error| Error::io(what.as_str(), error))?;
        match serde_json::from_str(&line).map_err(|error| Error::io(what.as_str(), error))? {
            Answer::Progress(step) => progress(step),
            Answer::Verdict(verdict) => return Ok(verdict),
            Answer::Error(says) => return Err(Error::program(format!("check lab {}", card.name), says)),
        }
    }
    Err(Error::program(what, "it ended before it had a verdict"))
}

/// Ends the running lab `card`, and waits until it has cleaned up.
pub fn down(home: &Home, card: &Card) -> Result<()> {
    let what = format!("end lab {}", card.name);
    kill(Pid::from_raw(card.pid as i32), Signal::SIGTERM).map_err(|error| Error::io(what.as_str(), error))?;
    let deadline = Instant::now() + Duration::from_secs(30);
    // The janitor removes the directory last; by then somebody else may have made a lab of that name.
    let taken_over = |labs: Vec<Card>| labs.iter().any(|lab| lab.name == card.name && lab.pid != card.pid);
    while card.directory.exists() && !taken_over(home.running()?) {
        if Instant::now() > deadline {
            return Err(Error::program(what, format!("process {} is still there", card.pid)));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
