//! Nothing is left behind: a process of its own makes the network namespaces of a lab, and removes them and what runs in
//! them when the lab's process is gone, however that came about.
//!
//! It is a shell at the other end of a pipe. The lab drops its end on the ordinary ways out; a panic and SIGKILL close
//! it too. So there is one way to clean up, and each run takes it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::{Error, Result};

/// Makes namespaces, and removes them when it is dropped.
#[derive(Debug)]
pub(crate) struct Janitor {
    shell: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

/// Signals for the whole terminal must not end it before its work is done. A process that ends while it is
/// looked at makes `ip netns pids` print an error, which does not matter.
const SCRIPT: &str = r#"
trap '' HUP INT TERM PIPE
made=
while read -r name; do
    if says=$(ip netns add "$name" 2>&1); then
        made="$made $name"
        echo ok
    else
        echo "$says" | head -n 1
    fi
done
for name in $made; do
    for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        pids=$(ip netns pids "$name" 2>/dev/null)
        [ -n "$pids" ] || break
        kill -KILL $pids 2>/dev/null
        sleep 0.05
    done
    ip netns del "$name"
done
rm -rf -- "$1"
"#;

impl Janitor {
    /// Starts the janitor; it removes `directory` too, and keeps `lock` as long as it lives.
    pub(crate) fn start(directory: &Path, lock: File) -> Result<Self> {
        let mut shell = Command::new("sh")
            .args(["-c", SCRIPT, "janitor"])
            .arg(directory)
            .process_group(0)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // The one place where a child can be given an open file; complaints end up in it, too.
            .stderr(lock)
            .spawn()
            .map_err(|error| Error::io("start sh", error))?;
        let orders = shell.stdin.take();
        let answers = shell.stdout.take().ok_or_else(|| Error::program("start sh", "no standard output"))?;
        Ok(Janitor { shell, orders, answers: BufReader::new(answers) })
    }

    /// Makes the network namespace `name`, as `ip netns add` does.
    pub(crate) fn add(&mut self, name: &str) -> Result<()> {
        let what = || format!("make network namespace {name}");
        if let Some(orders) = &mut self.orders {
            writeln!(orders, "{name}").map_err(|error| Error::io(what(), error))?;
        }
        let mut answer = String::new();
        self.answers.read_line(&mut answer).map_err(|error| Error::io(what(), error))?;
        match answer.trim() {
            "ok" => Ok(()),
            says => Err(Error::program(what(), says)),
        }
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        drop(self.orders.take());
        if let Err(error) = self.shell.wait() {
            tracing::warn!(%error, "the lab may not be removed completely");
        }
    }
}
