//! `braid run`.

use std::collections::HashSet;
use std::io::Write;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

use mptcp::Netns;
use mptcp::diag::{self, Connection};
use mptcp::socket::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::net::{BRAID, Net, Running, poll};

/// Prints the protocols of two sockets, made in the two usual ways, with their flags.
const SOCKETS: &str = "import socket as s
for socket in s.socket(), s.socket(s.AF_INET6, s.SOCK_STREAM | s.SOCK_NONBLOCK, s.IPPROTO_TCP):
    print(socket.getsockopt(s.SOL_SOCKET, s.SO_PROTOCOL), socket.fileno(), socket.getblocking(), socket.get_inheritable())";

const MPTCP: &str = "262 3 True False\n262 4 False False\n";
const TCP: &str = "6 3 True False\n6 4 False False\n";

/// A server whose connections last until the test ends them.
struct Server {
    listener: TcpListener,
}

impl Server {
    fn new(net: &Net, addr: &str) -> Self {
        let runtime = runtime();
        let _inside = runtime.enter();
        let options = Options { backlog: 128, ..Default::default() };
        let listener = net.0.run(|| socket::listen(addr.parse().unwrap(), &options)).unwrap().unwrap();
        let listener = listener.into_std().unwrap();
        listener.set_nonblocking(false).unwrap();
        Server { listener }
    }

    fn accept(&self, count: usize) -> Vec<TcpStream> {
        (0..count).map(|_| self.listener.accept().unwrap().0).collect()
    }
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    poll(what, || if is_so() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// The namespace's MPTCP connections that have not fallen back and that `program` holds, as the kernel tells them.
fn connections(net: &Net, program: &str) -> Vec<Connection> {
    let mut found = runtime().block_on(diag::connections(&net.0)).unwrap();
    found.retain(|c| !c.info.is_fallback() && c.owners.iter().any(|owner| owner.program == program));
    found
}

/// Waits until there are `count` of them.
fn wait_for_connections(net: &Net, program: &str, count: usize) -> Vec<Connection> {
    poll(&format!("{count} MPTCP connections of {program}"), || {
        let found = connections(net, program);
        if found.len() == count { ControlFlow::Break(found) } else { ControlFlow::Continue(()) }
    })
}

/// A client of [`Server`] in C, statically linked.
fn static_client(dir: &tempfile::TempDir) -> String {
    let program = dir.path().join("static-client");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/commands/run/client.c");
    let built = Command::new("cc").args(["-static", "-pthread", "-o"]).arg(&program).arg(source).status();
    assert!(built.unwrap().success());
    program.into_os_string().into_string().unwrap()
}

/// Runs `client` alone and under `braid run` against connections that last while the kernel is asked about them.
/// Both times it has to end the same way.
fn client_uses_mptcp(client: &str, program: &str, count: usize, answer: &str) -> Vec<Connection> {
    let net = Net::new();
    let server = Server::new(&net, "10.0.0.1:80");
    let mut ends = Vec::new();
    let mut found = Vec::new();
    for (prefix, expected) in [("", 0), ("braid run ", count)] {
        let mut client = net.start(&format!("{prefix}{client}"));
        let mut accepted = server.accept(count);
        // The server's ends are this test's; what is counted are the client's.
        found = wait_for_connections(&net, program, expected);
        for stream in &mut accepted {
            stream.write_all(answer.as_bytes()).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        }
        let status = client.wait();
        ends.push((status.code(), status.signal(), client.rest()));
    }
    assert_eq!(ends[0], ends[1]);
    found
}

#[test]
fn curl_uses_mptcp() {
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n";
    client_uses_mptcp("curl -sS -i http://10.0.0.1/", "curl", 1, answer);
    let broken = "HTTP/1.1 200 OK\r\nContent-Length: 60\r\nConnection: close\r\n\r\nhello\n";
    client_uses_mptcp("curl -sS http://10.0.0.1/", "curl", 1, broken);
}

#[test]
fn a_static_program_uses_mptcp_and_its_exit_code_comes_through() {
    let dir = tempfile::tempdir().unwrap();
    let client = static_client(&dir);
    client_uses_mptcp(&format!("{client} 10.0.0.1 80 1"), "static-client", 1, "seven..");
}

#[test]
fn each_of_a_hundred_children_uses_mptcp() {
    let dir = tempfile::tempdir().unwrap();
    let client = static_client(&dir);
    let found = client_uses_mptcp(&format!("{client} 10.0.0.1 80 100 children"), "static-client", 100, "x");
    let pids: HashSet<u32> = found.iter().flat_map(|c| &c.owners).map(|owner| owner.pid).collect();
    assert_eq!(pids.len(), 100);
}

#[test]
fn sixty_four_threads_at_once_use_mptcp() {
    let dir = tempfile::tempdir().unwrap();
    let client = static_client(&dir);
    let found = client_uses_mptcp(&format!("{client} 10.0.0.1 80 64 threads"), "static-client", 64, "x");
    let pids: HashSet<u32> = found.iter().flat_map(|c| &c.owners).map(|owner| owner.pid).collect();
    assert_eq!(pids.len(), 1);
}

#[test]
fn sockets_keep_their_flags_and_descriptor_numbers() {
    let net = Net::new();
    let python = |options: &[&str]| {
        let output =
            net.command("braid run").args(options).args(["python3", "-c", SOCKETS]).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(python(&[]), MPTCP);
    assert_eq!(python(&["--require", "--"]), MPTCP);
    assert_eq!(python(&["--exclude", "curl,python3"]), TCP);
    assert_eq!(python(&["env", BRAID, "run"]), MPTCP, "under another braid run");
    assert_eq!(python(&["setpriv", "--no-new-privs"]), MPTCP);
}

#[test]
fn an_exit_code_or_signal_is_the_programs_own() {
    let net = Net::new();
    assert_eq!(net.output("braid run true").status.code(), Some(0));
    let end = |script: &str| net.command("braid run sh -c").arg(script).output().unwrap().status;
    assert_eq!(end("exit 2").code(), Some(2));
    assert_eq!(end("exit 127").code(), Some(127));
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("script");
    std::fs::write(&script, "exit $1").unwrap();
    net.ok(&format!("chmod +x {}", script.display()));
    assert_eq!(net.output(&format!("braid run {} 9", script.display())).status.code(), Some(9));
    assert_eq!(end("kill -TERM $$").signal(), Some(Signal::SIGTERM as i32));
    // The process that was started is the program, so that signals to it need nobody to pass them on.
    let mut sleeping = net.start("braid run sleep 1000");
    wait_until("the program", || comm(sleeping.pid()) == "sleep");
    sleeping.signal(Signal::SIGHUP);
    assert_eq!(sleeping.wait().signal(), Some(Signal::SIGHUP as i32));
}

fn comm(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().into()
}

#[test]
fn a_program_that_cannot_start_gets_one_line_and_the_shells_exit_code() {
    let net = Net::new();
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("script");
    std::fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    let foreign = dir.path().join("foreign");
    std::fs::write(&foreign, "\x7fELF\x02\x01\x01 of another processor").unwrap();
    for file in [&script, &foreign] {
        net.ok(&format!("chmod +x {}", file.display()));
    }
    let (script, foreign) = (script.display().to_string(), foreign.display().to_string());
    for (program, code, line) in [
        ("no-such-program", 127, "no-such-program: No such file or directory".into()),
        ("/no/such/program", 127, "/no/such/program: No such file or directory".into()),
        (&script, 127, format!("{script}: No such file or directory")),
        ("/etc/passwd", 126, "/etc/passwd: Permission denied".into()),
        ("/etc", 126, "/etc: Is a directory".into()),
        (&foreign, 126, format!("{foreign}: Exec format error")),
    ] {
        let output = net.output(&format!("braid run {program}"));
        assert_eq!(String::from_utf8_lossy(&output.stderr), format!("braid: {line}\n"));
        assert_eq!(output.status.code(), Some(code), "{program}");
    }
}

#[test]
fn where_mptcp_is_off_the_program_runs_over_tcp_unless_mptcp_is_required() {
    let net = Net::new();
    mptcp::sysctl::set(&net.0, "net.mptcp.enabled", "0").unwrap();
    let run = |options: &str| -> Output {
        net.command(&format!("braid run {options}")).args(["python3", "-c", SOCKETS]).output().unwrap()
    };
    let output = run("");
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "braid: MPTCP is switched off here (net.mptcp.enabled=0): python3 runs over TCP\n"
    );
    assert_eq!((String::from_utf8_lossy(&output.stdout).as_ref(), output.status.code()), (TCP, Some(0)));
    let output = run("--require");
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "braid: --require: MPTCP is switched off here (net.mptcp.enabled=0)\n"
    );
    assert_eq!((output.stdout.len(), output.status.code()), (0, Some(2)));
}

/// Opens a socket for each line that comes, and prints what became of it.
const ON_DEMAND: &str = "import os, socket, sys
print(os.getpid(), flush=True)
for line in sys.stdin:
    try:
        print(socket.socket().getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL), flush=True)
    except OSError as error:
        print(error.strerror, flush=True)";

fn on_demand(net: &Net, options: &str) -> Running {
    let program =
        Running::start(net.command(&format!("braid run {options}")).args(["python3", "-c", ON_DEMAND]));
    program.wait_for(&program.pid().to_string());
    program
}

/// The watcher and the supervisor of the program that `braid run` has become in `net`: processes that are still braid.
fn companions(net: &Net) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|process| process.file_name().to_str()?.parse().ok());
    let is_braid = |pid: &u32| {
        std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.as_os_str() == BRAID)
            && Netns::of_pid(*pid).is_ok_and(|netns| netns == net.0)
    };
    pids.filter(is_braid).collect()
}

/// The one of them that is the other's child.
fn supervisor(net: &Net) -> Pid {
    let both = companions(net);
    assert_eq!(both.len(), 2, "{both:?}");
    let parent = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok())
    };
    let child = both.iter().find(|&&pid| parent(pid).is_some_and(|parent| both.contains(&parent)));
    Pid::from_raw(*child.unwrap() as i32)
}

#[test]
fn a_killed_supervisor_is_told_of_and_sockets_fail_cleanly() {
    let net = Net::new();
    let mut program = on_demand(&net, "");
    program.write("\n");
    program.wait_for("262");
    let supervisor = supervisor(&net);
    kill(supervisor, Signal::SIGTERM).unwrap(); // which a service manager sends to all
    program.write("\n");
    program.wait_for("262");
    kill(supervisor, Signal::SIGKILL).unwrap();
    program.wait_for_note(
        "braid: the supervisor of python3 was killed (SIGKILL): new TCP sockets fail with ENOSYS, connections go on",
    );
    program.write("\n");
    program.wait_for("Function not implemented");
    program.close_stdin();
    assert_eq!(program.wait().code(), Some(0));
    assert_eq!(companions(&net), [0; 0]);
}

#[test]
fn the_supervisor_ends_with_the_last_process_and_leaves_nothing_behind() {
    let net = Net::new();
    let mut program = on_demand(&net, "");
    program.write("\n");
    program.wait_for("262");
    assert_eq!(companions(&net).len(), 2);
    program.close_stdin();
    assert_eq!(program.wait().code(), Some(0));
    wait_until("the end of the supervisor", || companions(&net).is_empty());
}
