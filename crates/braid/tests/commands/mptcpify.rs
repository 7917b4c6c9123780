//! `braid mptcpify`: what it does where the kernel lets it, and what it says where not.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::net::{BRAID, Net, Running};

/// Prints the protocols of sockets that become MPTCP ones, and of those that don't.
const SOCKETS: &str = "import socket as s
for socket in (s.socket(), s.socket(s.AF_INET6, s.SOCK_STREAM | s.SOCK_NONBLOCK, s.IPPROTO_TCP),
               s.socket(type=s.SOCK_DGRAM), s.socket(s.AF_UNIX)):
    print(socket.getsockopt(s.SOL_SOCKET, s.SO_PROTOCOL), end=' ')";
const MPTCP: &str = "262 262 17 0 ";
const TCP: &str = "6 6 17 0 ";

/// A control group for one test, and its mount where there was none.
struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    fn new() -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let root =
            mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"))?.split(' ').nth(1)?;
        let path = Path::new(root).join(format!("braid-test-{}", std::process::id()));
        fs::create_dir(&path).ok()?;
        Some(Cgroup { path })
    }

    /// What the sockets of a program in it are.
    fn sockets(&self) -> String {
        let join = format!("echo $$ > {}/cgroup.procs && exec python3 -c \"$0\"", self.path.display());
        text(Command::new("sh").args(["-c", &join, SOCKETS]))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}

fn text(command: &mut Command) -> String {
    String::from_utf8(command.output().unwrap().stdout).unwrap()
}

fn skipped(test: &str, why: &str) {
    // Past the test harness, which keeps what a passing test prints.
    std::io::stderr().write_all(format!("skipped {test}: {why}\n").as_bytes()).unwrap();
}

#[test]
fn sockets_of_the_control_group_are_mptcp_as_long_as_it_runs_or_the_refusal_names_braid_run() {
    let Some(cgroup) = Cgroup::new() else {
        return skipped("mptcpify in a control group", "no control group (version 2) can be made");
    };
    let mut command = Command::new(BRAID);
    command.args(["mptcpify", "--cgroup"]).arg(&cgroup.path).stderr(Stdio::piped());
    let mut braid = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(braid.stderr.take().unwrap()).read_line(&mut line).unwrap();
    if line.starts_with("braid: ") {
        assert_eq!(braid.wait().unwrap().code(), Some(2), "{line}");
        assert!(line.contains("`braid run PROGRAM`"), "{line}");
        // For `make kernels`, too.
        let line = format!("lacking mptcpify: {line}");
        std::io::stderr().write_all(line.as_bytes()).unwrap();
        assert_eq!(cgroup.sockets(), TCP);
        return;
    }
    assert!(line.starts_with("new TCP sockets of "), "{line}");
    assert_eq!(cgroup.sockets(), MPTCP);
    assert_eq!(text(Command::new("python3").args(["-c", SOCKETS])), TCP, "outside the control group");
    kill(Pid::from_raw(braid.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(braid.wait().unwrap().code(), Some(0));
    assert_eq!(cgroup.sockets(), TCP);
}

/// Prints the protocol of a new socket for each line that comes.
const ON_DEMAND: &str = "import socket as s, sys
for line in sys.stdin:
    print(s.socket().getsockopt(s.SOL_SOCKET, s.SO_PROTOCOL), flush=True)";

#[test]
#[ignore = "changes the sockets of every program: `make kernels` runs it"]
fn new_sockets_of_the_whole_host_are_mptcp_until_it_is_killed() {
    // A program that runs before, and one in another network namespace.
    let net = Net::new();
    let mut before = Running::start(Command::new("python3").args(["-c", ON_DEMAND]));
    let mut elsewhere = Running::start(net.command("python3 -c").arg(ON_DEMAND));
    let mut protocols_are = |expected: &str| {
        for program in [&mut before, &mut elsewhere] {
            program.write("\n");
            assert!(program.wait_for("").concat() == expected);
        }
        assert_eq!(
            text(Command::new("python3").args(["-c", SOCKETS])),
            if expected == "6" { TCP } else { MPTCP }
        );
    };
    protocols_are("6");
    let mut braid = Command::new(BRAID).arg("mptcpify").stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(braid.stderr.take().unwrap()).read_line(&mut line).unwrap();
    if line.starts_with("braid: ") {
        assert_eq!(braid.wait().unwrap().code(), Some(2), "{line}");
        let line = format!("lacking mptcpify: {line}");
        std::io::stderr().write_all(line.as_bytes()).unwrap();
        return protocols_are("6");
    }
    assert_eq!(line, "new TCP sockets of the host are MPTCP ones until this ends\n");
    protocols_are("262");
    braid.kill().unwrap();
    braid.wait().unwrap();
    protocols_are("6");
}

#[test]
fn a_directory_that_is_no_control_group_is_refused() {
    let output = Command::new(BRAID).args(["mptcpify", "--cgroup", "/tmp"]).output().unwrap();
    let says = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), says.lines().count()), (Some(2), 1), "{says}");
    assert!(
        says == "braid: /tmp is no control group of version 2\n" || says.contains("needs CAP_BPF"),
        "{says}"
    );
}
