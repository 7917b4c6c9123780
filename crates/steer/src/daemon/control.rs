//! The control socket: one line asks, one line answers. Root and the daemon's own user may ask.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use crate::Result;

/// What came of a request: what was asked for, or why not.
pub type Answer = Result<String, String>;

/// A request.
#[derive(Clone, Copy, Debug)]
pub(super) enum What {
    Status,
    Reload,
}

/// The socket, removed when dropped.
pub(super) struct Socket {
    path: PathBuf,
    /// The directory, locked: two daemons would undo what the other does.
    _directory: File,
    requests: mpsc::Receiver<Request>,
    task: tokio::task::JoinHandle<()>,
}

pub(super) struct Request {
    what: What,
    stream: UnixStream,
}

impl Socket {
    /// Listens in `directory`, which is made. An error where another daemon does.
    pub(super) async fn bind(directory: &Path) -> Result<Self> {
        let path = directory.join("control");
        let failed = |e: io::Error| mptcp::Error::io(format!("listen on {}", path.display()), e);
        std::fs::create_dir_all(directory)
            .map_err(|e| mptcp::Error::io(format!("make {}", directory.display()), e))?;
        let locked = File::open(directory).map_err(failed)?;
        locked.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => {
                failed(io::Error::other("a path manager runs in this namespace already"))
            }
            TryLockError::Error(error) => failed(error),
        })?;
        // Left by one that was killed.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).map_err(failed)?;
        let (sender, requests) = mpsc::channel(8);
        let task = tokio::spawn(serve(listener, sender));
        Ok(Socket { path, _directory: locked, requests, task })
    }

    pub(super) async fn next(&mut self) -> Request {
        match self.requests.recv().await {
            Some(request) => request,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
        // What the next daemon has to know keeps it.
        let _ = self.path.parent().map(std::fs::remove_dir);
    }
}

impl Request {
    pub(super) fn what(&self) -> What {
        self.what
    }

    /// Nobody waits for a client that does not read.
    pub(super) fn answer(mut self, answer: Answer) {
        tokio::spawn(async move { reply(&mut self.stream, answer).await });
    }
}

async fn serve(listener: UnixListener, requests: mpsc::Sender<Request>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let requests = requests.clone();
        tokio::spawn(async move {
            let read = tokio::time::timeout(PATIENCE, read(stream)).await;
            if let Ok(Some(request)) = read {
                let _ = requests.send(request).await;
            }
        });
    }
}

/// How long a client may take to say what it wants.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

async fn read(mut stream: UnixStream) -> Option<Request> {
    let peer = stream.peer_cred().ok()?;
    if peer.uid() != 0 && peer.uid() != geteuid().as_raw() {
        reply(&mut stream, Err(format!("user {} may not control this path manager", peer.uid()))).await;
        return None;
    }
    let mut line = String::new();
    BufReader::new((&mut stream).take(64)).read_line(&mut line).await.ok()?;
    let what = match line.trim_end() {
        "status" => What::Status,
        "reload" => What::Reload,
        other => {
            reply(&mut stream, Err(format!("no request \"{other}\""))).await;
            return None;
        }
    };
    Some(Request { what, stream })
}

async fn reply(stream: &mut UnixStream, answer: Answer) {
    let line = match answer {
        Ok(text) => format!("ok {text}\n"),
        Err(text) => format!("error {text}\n"),
    };
    // Whoever has left does not want it.
    let _ = stream.write_all(line.as_bytes()).await;
}

/// Asks the daemon whose directory is `directory`.
pub async fn ask(directory: &Path, request: &str) -> Result<Answer> {
    let path = directory.join("control");
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            mptcp::Error::io("ask the path manager", io::Error::other("none runs in this namespace"))
        }
        _ => mptcp::Error::io(format!("ask the path manager at {}", path.display()), e),
    };
    let mut stream = UnixStream::connect(&path).await.map_err(failed)?;
    stream.write_all(format!("{request}\n").as_bytes()).await.map_err(failed)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.map_err(failed)?;
    Ok(match answer.trim_end().split_once(' ') {
        Some(("ok", text)) => Ok(text.into()),
        Some((_, text)) => Err(text.into()),
        None => Err("the path manager ended before it answered".into()),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn in_use(directory: &Path, error: crate::Error) {
        let control = directory.join("control");
        let line = format!("listen on {}: a path manager runs in this namespace already", control.display());
        assert_eq!(error.to_string(), line);
    }

    #[tokio::test]
    async fn there_is_one_daemon_for_a_directory_whatever_becomes_of_its_socket() {
        let run = tempfile::tempdir().unwrap();
        let directory = run.path().join("a/pm-1");
        let first = Socket::bind(&directory).await.unwrap();
        in_use(&directory, Socket::bind(&directory).await.err().unwrap());
        std::fs::remove_file(directory.join("control")).unwrap();
        in_use(&directory, Socket::bind(&directory).await.err().unwrap());
        drop(first);
        assert!(!directory.exists());
        // One that was killed leaves its socket.
        std::fs::create_dir(&directory).unwrap();
        drop(std::os::unix::net::UnixListener::bind(directory.join("control")).unwrap());
        assert!(directory.join("control").exists());
        Socket::bind(&directory).await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_holds_nobody_up() {
        let run = tempfile::tempdir().unwrap();
        let mut socket = Socket::bind(run.path()).await.unwrap();
        let mut silent = UnixStream::connect(run.path().join("control")).await.unwrap();
        silent.write_all(b"status\n").await.unwrap();
        // More than a socket holds.
        let long = "x".repeat(8 << 20);
        let asks = ask(run.path(), "reload");
        let answers = async {
            for _ in 0..2 {
                let request = socket.next().await;
                let answer = match request.what() {
                    What::Status => long.clone(),
                    What::Reload => "reloaded".into(),
                };
                request.answer(Ok(answer));
            }
        };
        let both = tokio::time::timeout(Duration::from_secs(30), async { tokio::join!(asks, answers) }).await;
        assert_eq!(both.expect("an answer").0.unwrap(), Ok("reloaded".into()));
        let mut all = String::new();
        silent.read_to_string(&mut all).await.unwrap();
        assert_eq!(all, format!("ok {long}\n"));
    }
}
