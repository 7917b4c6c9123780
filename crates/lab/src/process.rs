//! Programs in a lab: started, watched, stopped.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::scenario::FileSpec;
use crate::{Error, Result};

/// What to do with a program's input and output.
#[derive(Debug, Default)]
pub struct Watch {
    /// Written to its standard input, which then stays open. Without it, standard input is empty.
    pub input: Option<String>,
    /// Its standard output is a payload: it goes to this file and is measured.
    pub save: Option<PathBuf>,
    /// Wait for a line with this, see [`Process::line`].
    pub line: Option<String>,
}

/// How a saved payload has arrived so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delivery {
    /// Bytes so far.
    pub bytes: u64,
    /// When the first byte came.
    pub first: Option<Instant>,
    /// When the last byte came.
    pub last: Option<Instant>,
    /// The longest time between two reads that brought something.
    pub stall: Duration,
    /// All such times of [`GAP`] and longer: from when to when.
    pub gaps: Vec<(Instant, Instant)>,
}

/// What is shorter happens on any path now and then: a loss, BBR's look at the shortest round trip, a busy machine.
pub const GAP: Duration = Duration::from_millis(300);

/// A running program and its children: they are a process group. Dropping it kills them.
#[derive(Debug)]
pub struct Process {
    name: String,
    group: Pid,
    /// Kept open for as long as the program may read.
    input: Option<ChildStdin>,
    exit: watch::Receiver<Option<ExitStatus>>,
    line: watch::Receiver<bool>,
    delivery: watch::Receiver<Delivery>,
    tail: Arc<Tail>,
    waiter: JoinHandle<()>,
}

impl Process {
    /// Starts `command`; messages call it `name`.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn spawn(name: &str, mut command: Command, watch: Watch) -> Result<Self> {
        let save = match &watch.save {
            Some(path) => Some(
                File::create(path).map_err(|error| Error::io(format!("create {}", path.display()), error))?,
            ),
            None => None,
        };
        let program = command.get_program().to_string_lossy().into_owned();
        command.stdin(if watch.input.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = tokio::process::Command::from(command).spawn();
        let mut child = started.map_err(|error| Error::io(format!("start {name} ({program})"), error))?;

        let mut input = child.stdin.take();
        if let (Some(pipe), Some(text)) = (&mut input, &watch.input) {
            let written = pipe.write_all(text.as_bytes()).await;
            written.map_err(|error| Error::io(format!("write to {name}"), error))?;
        }
        let tail = Arc::new(Tail::default());
        let (line_seen, line) = watch::channel(false);
        let (deliveries, delivery) = watch::channel(Delivery::default());
        let lines = Lines { wanted: watch.line, seen: Arc::new(line_seen), tail: Arc::clone(&tail) };
        let errors = child.stderr.take().map(|pipe| tokio::spawn(lines.clone().read(pipe)));
        let output = child.stdout.take().map(|pipe| match save {
            Some(file) => tokio::spawn(save_payload(pipe, file, deliveries)),
            None => tokio::spawn(lines.read(pipe)),
        });
        let group = Pid::from_raw(child.id().unwrap_or_default() as i32);
        let (exited, exit) = watch::channel(None);
        let waiter = tokio::spawn(wait(child, [output, errors], exited));
        Ok(Process { name: name.into(), group, input, exit, line, delivery, tail, waiter })
    }

    /// The name that messages use.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id, also that of the group.
    pub fn pid(&self) -> u32 {
        self.group.as_raw() as u32
    }

    /// Waits for its end, and until all that it printed has been read. Cancel safe.
    pub async fn exit(&self) -> ExitStatus {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(status) => status.unwrap_or_default(),
            // The waiter cannot end without a status, except with the runtime.
            Err(_) => std::future::pending().await,
        }
    }

    /// How it ended, if it has.
    pub fn exited(&self) -> Option<ExitStatus> {
        *self.exit.borrow()
    }

    /// Waits for the line that [`Watch::line`] names.
    pub async fn line(&self) {
        if self.line.clone().wait_for(|seen| *seen).await.is_err() {
            std::future::pending().await
        }
    }

    /// Waits until `bytes` of the payload have come, or all of it.
    pub async fn bytes(&self, bytes: u64) {
        // An error means that it has ended.
        let _ = self.delivery.clone().wait_for(|delivery| delivery.bytes >= bytes).await;
    }

    /// How its payload has arrived so far.
    pub fn delivery(&self) -> Delivery {
        self.delivery.borrow().clone()
    }

    /// What it printed last, for messages: at most three lines, as one.
    pub fn last_words(&self) -> String {
        let lines = self.tail.lock();
        lines.iter().skip(lines.len().saturating_sub(3)).cloned().collect::<Vec<_>>().join("; ")
    }

    /// What it printed last: at most twenty lines.
    pub fn last_lines(&self) -> Vec<String> {
        self.tail.lock().iter().cloned().collect()
    }

    /// Its end in words: `exit code 1: connect: Connection refused`.
    pub fn describe(&self, status: ExitStatus) -> String {
        let end = match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (None, signal) => {
                let signal = signal.and_then(|number| Signal::try_from(number).ok());
                format!("killed by {}", signal.map_or("a signal", Signal::as_str))
            }
        };
        match self.last_words() {
            words if words.is_empty() => end,
            words => format!("{end}: {words}"),
        }
    }

    /// Ends it: closes its input and sends SIGTERM, and SIGKILL after five seconds.
    pub async fn stop(mut self) {
        drop(self.input.take());
        if self.exited().is_none() {
            let _ = killpg(self.group, Signal::SIGTERM);
            if tokio::time::timeout(GRACE, self.exit()).await.is_err() {
                let _ = killpg(self.group, Signal::SIGKILL);
                self.exit().await;
            }
        }
    }
}

const GRACE: Duration = Duration::from_secs(5);

impl Drop for Process {
    fn drop(&mut self) {
        if self.exited().is_none() {
            let _ = killpg(self.group, Signal::SIGKILL);
        }
        self.waiter.abort();
    }
}

/// The last lines that a program printed.
#[derive(Debug, Default)]
struct Tail(Mutex<VecDeque<String>>);

impl Tail {
    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: String) {
        let mut lines = self.lock();
        if lines.len() == 20 {
            lines.pop_front();
        }
        lines.push_back(line);
    }
}

#[derive(Clone)]
struct Lines {
    wanted: Option<String>,
    seen: Arc<watch::Sender<bool>>,
    tail: Arc<Tail>,
}

impl Lines {
    async fn read(self, from: impl AsyncRead + Unpin) {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        loop {
            line.clear();
            // A program may print forever without a line's end.
            let mut limited = (&mut from).take(LONGEST_LINE);
            match limited.read_until(b'\n', &mut line).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            let text = String::from_utf8_lossy(&line);
            if self.wanted.as_deref().is_some_and(|wanted| text.contains(wanted)) {
                self.seen.send_replace(true);
            }
            if !text.trim().is_empty() {
                self.tail.push(text.trim().into());
            }
        }
    }
}

const LONGEST_LINE: u64 = 64 * 1024;

async fn save_payload(mut from: impl AsyncRead + Unpin, mut file: File, deliveries: watch::Sender<Delivery>) {
    let mut buffer = vec![0; 256 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let now = Instant::now();
        // Blocks for a copy into the page cache, no longer.
        if file.write_all(&buffer[..length]).is_err() {
            return;
        }
        deliveries.send_modify(|delivery| {
            let last = *delivery.last.get_or_insert(now);
            delivery.stall = delivery.stall.max(now - last);
            if now - last >= GAP {
                delivery.gaps.push((last, now));
            }
            delivery.first.get_or_insert(now);
            delivery.last = Some(now);
            delivery.bytes += length as u64;
        });
    }
}

async fn wait(
    mut child: Child,
    outputs: [Option<JoinHandle<()>>; 2],
    exited: watch::Sender<Option<ExitStatus>>,
) {
    let status = child.wait().await.unwrap_or_else(|_| ExitStatus::from_raw(Signal::SIGKILL as i32));
    for reader in outputs.into_iter().flatten() {
        // A grandchild may hold the pipe open.
        let abort = reader.abort_handle();
        if tokio::time::timeout(Duration::from_secs(1), reader).await.is_err() {
            abort.abort();
        }
    }
    exited.send_replace(Some(status));
}

/// Makes the file `path`.
pub(crate) fn make_file(path: &Path, spec: &FileSpec) -> Result<()> {
    let random =
        |size| std::io::copy(&mut File::open("/dev/urandom")?.take(size), &mut File::create(path)?).map(drop);
    let made = match (spec.size, &spec.text) {
        (Some(size), _) => random(size),
        (None, text) => std::fs::write(path, text.as_deref().unwrap_or_default()),
    };
    made.map_err(|error| Error::io(format!("create {}", path.display()), error))
}
