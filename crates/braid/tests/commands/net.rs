//! A network namespace for a test, and programs in it.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use mptcp::Netns;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub const BRAID: &str = env!("CARGO_BIN_EXE_braid");

/// How long something may take that takes milliseconds: only a failing test waits this long.
const DEADLINE: Duration = Duration::from_secs(30);

/// Variables that are set for `braid` where the tests were started, and are not for them.
pub fn braid_variables() -> impl Iterator<Item = OsString> {
    std::env::vars_os().map(|(name, _)| name).filter(|name| name.as_encoded_bytes().starts_with(b"BRAID_"))
}

/// A network namespace with 10.0.0.1, 10.0.0.2 and fd00::1 on its loopback interface.
pub struct Net(pub Netns);

impl Net {
    pub fn new() -> Self {
        let net = Net::bare();
        for address in ["10.0.0.1/24", "10.0.0.2/24", "fd00::1/64"] {
            net.ok(&format!("ip address add {address} dev lo nodad"));
        }
        net
    }

    fn bare() -> Self {
        let net = Net(Netns::anonymous().unwrap());
        net.ok("ip link set lo up");
        // Kernels without it have no memory of paths where MPTCP failed.
        if mptcp::sysctl::get(&net.0, "net.mptcp.blackhole_timeout").is_ok() {
            mptcp::sysctl::set(&net.0, "net.mptcp.blackhole_timeout", "0").unwrap();
        }
        net
    }

    /// `line`, split at blanks, as a command in the namespace; `braid` is the program under test.
    pub fn command(&self, line: &str) -> Command {
        let mut words = line.split_whitespace();
        let program = words.next().unwrap();
        let mut command = Command::new(if program == "braid" { BRAID } else { program });
        command.args(words);
        for name in braid_variables() {
            command.env_remove(name);
        }
        self.0.enter_on_exec(&mut command);
        command
    }

    pub fn output(&self, line: &str) -> Output {
        self.command(line).stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{line}: {e}"))
    }

    /// The standard output of a command that succeeds.
    pub fn ok(&self, line: &str) -> String {
        let output = self.output(line);
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn start(&self, line: &str) -> Running {
        Running::start(&mut self.command(line))
    }

    /// An echo server that listens already.
    pub fn echo_server(&self, addr: &str) -> Running {
        let server = self.start(&format!("braid echo server --addr {addr}"));
        server.wait_for("listening on");
        server
    }
}

/// Hosts on `paths` networks. Network N has 10.0.N.1 and fd00:N::1 at the first host, …2 at the second, on devices
/// `ethN`. Beside those a host has no address that others know.
pub fn pair(paths: u8) -> (Net, Net) {
    let (a, b) = (Net::bare(), Net::bare());
    let peer = format!("/proc/{}/fd/{}", std::process::id(), b.0.as_fd().as_raw_fd());
    for n in 0..paths {
        a.ok(&format!("ip link add eth{n} type veth peer name eth{n} netns {peer}"));
        for (net, host) in [(&a, 1), (&b, 2)] {
            net.ok(&format!("ip address add 10.0.{n}.{host}/24 dev eth{n}"));
            net.ok(&format!("ip address add fd00:{n}::{host}/64 dev eth{n} nodad"));
            net.ok(&format!("ip link set eth{n} up"));
        }
    }
    (a, b)
}

/// A program that runs until the test ends it.
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
}

impl Running {
    pub fn start(command: &mut Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (stdout, stderr) = (lines(child.stdout.take().unwrap()), lines(child.stderr.take().unwrap()));
        Running { stdin: child.stdin.take(), child, stdout, stderr }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn write(&mut self, text: &str) {
        self.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Reads standard output up to a line that contains `text`, and returns the lines, that one included.
    pub fn wait_for(&self, text: &str) -> Vec<String> {
        wait_for(&self.stdout, text)
    }

    /// As [`Running::wait_for`], of standard error.
    pub fn wait_for_note(&self, text: &str) -> Vec<String> {
        wait_for(&self.stderr, text)
    }

    /// Is there a line of standard output that nobody has read? Takes it away.
    pub fn has_printed(&self) -> bool {
        self.stdout.try_recv().is_ok()
    }

    /// The lines of standard output that nobody has read.
    pub fn unread(&self) -> Vec<String> {
        self.stdout.try_iter().collect()
    }

    /// The lines of standard output and standard error that nobody has read, once nobody can write more.
    pub fn rest(&self) -> [Vec<String>; 2] {
        [&self.stdout, &self.stderr].map(|lines| {
            let mut rest = Vec::new();
            loop {
                match lines.recv_timeout(DEADLINE) {
                    Ok(line) => rest.push(line),
                    Err(RecvTimeoutError::Disconnected) => return rest,
                    Err(RecvTimeoutError::Timeout) => panic!("somebody keeps an end of the program's open"),
                }
            }
        })
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    pub fn wait(&mut self) -> ExitStatus {
        poll("the program's end", || match self.child.try_wait().unwrap() {
            Some(status) => ControlFlow::Break(status),
            None => ControlFlow::Continue(()),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines(pipe: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

fn wait_for(lines: &Receiver<String>, text: &str) -> Vec<String> {
    let deadline = Instant::now() + DEADLINE;
    let mut seen: Vec<String> = Vec::new();
    while !seen.last().is_some_and(|line| line.contains(text)) {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => seen.push(line),
            Err(error) => panic!("waiting for '{text}': {error}; so far {seen:#?}"),
        }
    }
    seen
}

/// Asks until there is an answer.
pub fn poll<T>(what: &str, mut ask: impl FnMut() -> ControlFlow<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let ControlFlow::Break(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}
