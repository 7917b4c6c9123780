//! The examples do what their first lines say.

mod net;

use std::io::{BufRead, BufReader};
use std::process::{ChildStdout, Command, Stdio};

use mptcp::Netns;
use net::pair;

struct Example {
    process: net::Process,
    output: BufReader<ChildStdout>,
}

impl Example {
    fn start(netns: &Netns, name: &str, args: &[&str]) -> Self {
        Self::start_with(netns, "1", name, args)
    }

    /// With `BRAID_MPTCP` in its environment.
    fn start_with(netns: &Netns, braid_mptcp: &str, name: &str, args: &[&str]) -> Self {
        // `cargo test` builds the examples beside the tests.
        let mut path = std::env::current_exe().unwrap();
        path.pop();
        path.set_file_name("examples");
        let mut command = Command::new(path.join(name));
        netns.enter_on_exec(command.args(args).env("BRAID_MPTCP", braid_mptcp).stdout(Stdio::piped()));
        let mut child =
            command.spawn().unwrap_or_else(|e| panic!("{}: {e}", command.get_program().display()));
        let output = BufReader::new(child.stdout.take().unwrap());
        Example { process: net::Process(child), output }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_string()
    }
}

/// What the dialer says that the kernel counted.
fn six_bytes() -> &'static str {
    if net::counts_bytes() { "mptcp, 6 bytes sent" } else { "mptcp, 0 bytes sent" }
}

#[test]
fn listener_dialer_and_watch_work_together() {
    let (a, b) = pair(1);
    let mut listener = Example::start(&b, "listener", &["10.0.0.2:7000"]);
    assert_eq!(listener.line(), "listening on 10.0.0.2:7000");
    let mut watch = Example::start(&a, "watch", &[]);
    assert_eq!(watch.line(), "0 connections");

    let mut dialer = Example::start(&a, "dialer", &["10.0.0.2:7000", "hello"]);
    assert_eq!(dialer.line(), "hello");
    assert_eq!(dialer.line(), six_bytes());
    let path = dialer.line();
    assert!(path.starts_with("10.0.0.1:") && path.contains(" to 10.0.0.2:7000: rtt "), "{path}");
    assert_eq!(dialer.line(), "");
    assert!(dialer.process.0.wait().unwrap().success());

    let served = listener.line();
    assert!(served.starts_with("10.0.0.1:") && served.ends_with(" with mptcp: true, 6 bytes"), "{served}");
    let event = watch.line();
    assert!(event.starts_with("CREATED ") && event.ends_with(" 10.0.0.1"), "{event}");
}

#[test]
fn the_environment_turns_mptcp_off() {
    let (a, b) = pair(1);
    for (at_listener, at_dialer, expected) in
        [("1", "1", six_bytes()), ("1", "0", "tcp"), ("0", "1", "fell back to tcp"), ("0", "0", "tcp")]
    {
        let mut listener = Example::start_with(&b, at_listener, "listener", &["10.0.0.2:7000"]);
        assert_eq!(listener.line(), "listening on 10.0.0.2:7000");
        let mut dialer = Example::start_with(&a, at_dialer, "dialer", &["10.0.0.2:7000", "hello"]);
        assert_eq!(dialer.line(), "hello");
        assert_eq!(dialer.line(), expected, "listener {at_listener}, dialer {at_dialer}");
        // The dialer's end is the listener's line.
        let mptcp = expected.starts_with("mptcp");
        assert!(listener.line().ends_with(&format!(" with mptcp: {mptcp}, 6 bytes")));
    }
}
