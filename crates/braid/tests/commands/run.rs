//! `braid run`.

use std::collections::HashSet;
use std::io::ErrorKind::WouldBlock;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

use mptcp::Netns;
use mptcp::diag::{self, Connection};
use mptcp::socket::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use socket2::{Domain, Protocol, Type};

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
        Server { listener }
    }

    fn accept(&self, count: usize) -> Vec<TcpStream> {
        let accept = || match self.listener.accept() {
            Ok((stream, _)) => ControlFlow::Break(stream),
            Err(error) if error.kind() == WouldBlock => ControlFlow::Continue(()),
            Err(error) => panic!("{error}"),
        };
        (0..count).map(|n| poll(&format!("connection {n}"), accept)).collect()
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

/// How many processes of `program` hold `connections`. The supervisor may still hold one, too.
fn processes(connections: &[Connection], program: &str) -> usize {
    let owners = connections.iter().flat_map(|c| &c.owners).filter(|owner| owner.program == program);
    owners.map(|owner| owner.pid).collect::<HashSet<u32>>().len()
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
    assert_eq!(processes(&found, "static-client"), 100);
}

#[test]
fn sixty_four_threads_at_once_use_mptcp() {
    let dir = tempfile::tempdir().unwrap();
    let client = static_client(&dir);
    let found = client_uses_mptcp(&format!("{client} 10.0.0.1 80 64 threads"), "static-client", 64, "x");
    assert_eq!(processes(&found, "static-client"), 1);
}

#[test]
fn a_static_go_program_uses_mptcp() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("go-client");
    let built = Command::new("go")
        .args(["build", "-o"])
        .arg(&program)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/commands/run/client.go"))
        .envs([("CGO_ENABLED", "0"), ("GO111MODULE", "off"), ("GOFLAGS", "")])
        .envs([("GOCACHE", dir.path().join("cache")), ("GOPATH", dir.path().join("path"))])
        .status();
    assert!(built.unwrap().success());
    client_uses_mptcp(&format!("{} 10.0.0.1:80", program.display()), "go-client", 1, "seven..");
}

/// Runs `server`, which ends at `end`, alone and under `braid run`. An MPTCP client asks it for a page while the kernel is
/// asked about the connection; page and exit code have to be the same.
fn server_uses_mptcp(server: &str, program: &str, end: Signal) {
    let mut results = Vec::new();
    for (prefix, expected) in [("", 0), ("braid run ", 1)] {
        let net = Net::new();
        let mut server = net.start(&format!("{prefix}{server}"));
        let mut client = poll("the server", || match dial(&net, "10.0.0.1:80") {
            Ok(client) => ControlFlow::Break(client),
            Err(_) => ControlFlow::Continue(()),
        });
        wait_for_connections(&net, program, expected);
        let mut page = String::new();
        client.write_all(b"GET /page HTTP/1.0\r\n\r\n").unwrap();
        client.read_to_string(&mut page).unwrap();
        assert!(page.ends_with("\r\n\r\na page\n"), "{page}");
        let page: Vec<_> = page.lines().filter(|line| !line.starts_with("Date:")).map(String::from).collect();
        server.signal(end);
        let status = server.wait();
        results.push((page, status.code(), status.signal()));
    }
    assert_eq!(results[0], results[1]);
}

/// An MPTCP client's connection.
fn dial(net: &Net, addr: &str) -> std::io::Result<TcpStream> {
    let client =
        net.0.run(|| socket2::Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP))).unwrap()?;
    client.connect(&addr.parse::<SocketAddr>().unwrap().into())?;
    Ok(client.into())
}

fn page() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("page"), "a page\n").unwrap();
    dir
}

#[test]
fn pythons_http_server_uses_mptcp() {
    let dir = page();
    let server = format!("python3 -m http.server 80 --bind 10.0.0.1 --directory {}", dir.path().display());
    server_uses_mptcp(&server, "python3", Signal::SIGTERM);
}

#[test]
fn nginx_and_its_workers_use_mptcp() {
    let dir = page();
    let place = dir.path().display();
    let paths: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("{name}_temp_path {place}/{name};"))
        .concat();
    let config = format!(
        "user root; daemon off; worker_processes 2; pid {place}/pid; error_log stderr; events {{}}
        http {{ access_log off; {paths} server {{ listen 80; root {place}; }} }}"
    );
    let file = dir.path().join("nginx.conf");
    std::fs::write(&file, config).unwrap();
    server_uses_mptcp(&format!("nginx -e stderr -c {}", file.display()), "nginx", Signal::SIGQUIT);
}

#[test]
fn iperf3_uses_mptcp_on_both_sides() {
    let mut ends = Vec::new();
    for (prefix, expected) in [("", 0), ("braid run ", 4)] {
        let net = Net::new();
        let mut server = net.start(&format!("{prefix}iperf3 -s -1 --forceflush"));
        server.wait_for("Server listening");
        let mut client = net.start(&format!("{prefix}iperf3 -c 10.0.0.1 -b 1M -t 600 --forceflush"));
        client.wait_for("connected to");
        // A connection for control and one for data, seen from both ends.
        wait_for_connections(&net, "iperf3", expected);
        client.signal(Signal::SIGINT);
        ends.push((client.wait().code(), server.wait().code()));

        let mut server = net.start(&format!("{prefix}iperf3 -s -1 --forceflush"));
        server.wait_for("Server listening");
        let client = net.output(&format!("{prefix}iperf3 -c 10.0.0.1 -n 100K"));
        ends.push((client.status.code(), server.wait().code()));
    }
    assert_eq!(ends[..2], ends[2..]);
}

#[test]
fn openvpn_uses_mptcp_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("key").display().to_string();
    let mut ends = Vec::new();
    for (prefix, expected) in [("", 0), ("braid run ", 2)] {
        let net = Net::new();
        net.ok(&format!("openvpn --genkey secret {key}"));
        let options = format!("--dev null --secret {key} --cipher AES-256-CBC --ping 1");
        let start = |side: &str| net.start(&format!("{prefix}openvpn {options} {side}"));
        let mut server = start("--proto tcp-server --local 10.0.0.1 --port 1194");
        server.wait_for("Listening for incoming TCP connection");
        let mut client = start("--proto tcp-client --remote 10.0.0.1 1194 --nobind");
        client.wait_for("Initialization Sequence Completed");
        server.wait_for("Initialization Sequence Completed");
        wait_for_connections(&net, "openvpn", expected);
        client.signal(Signal::SIGTERM);
        server.signal(Signal::SIGTERM);
        ends.push((client.wait().code(), server.wait().code()));
    }
    assert_eq!(ends[0], ends[1]);
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
fn the_drop_in_of_a_service_has_braid_itself_with_its_options() {
    let (net, dir) = (Net::new(), tempfile::tempdir().unwrap());
    let files = [
        ("web.service", "[Service]\nExecStart=-/usr/bin/web 'a b'\n"),
        ("web.socket", "[Socket]\nListenStream=/run/web\n"),
    ];
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let run = |line: &str| {
        net.command(&format!("braid run {line}")).env("SYSTEMD_UNIT_PATH", dir.path()).output().unwrap()
    };
    let options = "--only server --port 80,443 --exclude git --compat web --report=/run/web --json";
    let output = run(&format!("--service web {options}"));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("# /etc/systemd/system/web.service.d/zz-braid.conf\n"), "{text}");
    let expected =
        format!("\n[Service]\nExecStart=\nExecStart=-{BRAID} run {options} -- /usr/bin/web 'a b'\n");
    assert!(text.ends_with(&expected), "{text}");
    let relative = run("--service web --require --report=here");
    let here = std::env::current_dir().unwrap();
    let expected = format!(" run --require --report={}/here -- /usr/bin/web", here.display());
    assert!(String::from_utf8(relative.stdout).unwrap().contains(&expected));

    for (unit, refusal) in [
        ("wob", format!("no unit wob.service in {}", dir.path().display())),
        ("web.socket", "web.socket has no ListenStream= with a TCP port".into()),
    ] {
        let output = run(&format!("--service {unit}"));
        let says = String::from_utf8(output.stderr).unwrap();
        assert_eq!((says, output.stdout.len()), (format!("braid: {refusal}\n"), 0));
        assert_eq!(output.status.code(), Some(2));
    }
}

#[test]
fn a_program_may_be_told_another_name_than_its_own() {
    let net = Net::new();
    let output = net.command("braid run --argv0 other sh -c").arg("echo $0").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "other\n");
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

#[test]
#[cfg(target_arch = "x86_64")]
fn a_32_bit_program_keeps_its_sockets_and_one_line_says_so() {
    // socket(AF_INET, SOCK_STREAM, 0) by the 32-bit system call 359; ends with its descriptor as exit code.
    const SOURCE: &str = "void _start(void) { int fd; \
        asm volatile(\"int $0x80\" : \"=a\"(fd) : \"a\"(359), \"b\"(2), \"c\"(1), \"d\"(0)); \
        asm volatile(\"int $0x80\" : : \"a\"(1), \"b\"(fd)); }";
    let (net, dir) = (Net::new(), tempfile::tempdir().unwrap());
    let (source, program) = (dir.path().join("old.c"), dir.path().join("old"));
    std::fs::write(&source, SOURCE).unwrap();
    let built =
        Command::new("cc").args(["-m32", "-nostdlib", "-static", "-o"]).args([&program, &source]).status();
    assert!(built.unwrap().success());
    let program = program.display();
    let alone = net.output(&program.to_string());
    assert_eq!(alone.status.code(), Some(3));
    let under = net.output(&format!("braid run {program}"));
    let line = format!("braid: {program} is a 32-bit program: its sockets stay TCP\n");
    assert_eq!((under.status.code(), String::from_utf8_lossy(&under.stderr)), (Some(3), line.into()));
    let required = net.output(&format!("braid run --require {program}"));
    assert_eq!(required.status.code(), Some(2));
}

/// The C library of 32-bit programs makes sockets by a system call that has its arguments in memory.
#[test]
#[cfg(target_arch = "x86_64")]
fn sockets_of_32_bit_children_are_in_the_report() {
    const SOURCE: &str = "int inet[3] = {2, 1, 0}, local[3] = {1, 1, 0}; \
        static int call(int number, int b, int *c) { int fd; \
            asm volatile(\"int $0x80\" : \"=a\"(fd) : \"a\"(number), \"b\"(b), \"c\"(c), \"d\"(0) : \"memory\"); return fd; } \
        void _start(void) { call(102, 1, local); call(102, 1, inet); \
            call(1, call(359, 2, (int *)1), 0); }";
    let (net, dir) = (Net::new(), tempfile::tempdir().unwrap());
    let (source, program) = (dir.path().join("old.c"), dir.path().join("old"));
    std::fs::write(&source, SOURCE).unwrap();
    let built =
        Command::new("cc").args(["-m32", "-nostdlib", "-static", "-o"]).args([&program, &source]).status();
    assert!(built.unwrap().success());
    let file = dir.path().join("report");
    let command = format!("braid run --json --report={} -- sh -c", file.display());
    let output = net.command(&command).arg(format!("{}; exit $?", program.display())).output().unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(5), 0), "{output:?}");
    let told: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!(told["tcp_sockets"], serde_json::json!({"made by a 32-bit program": 2}));
}

#[test]
fn no_capability_is_needed() {
    let net = Net::new();
    let output = net
        .command("setpriv --bounding-set=-all --inh-caps=-all")
        .args([BRAID, "run", "python3", "-c", SOCKETS])
        .output()
        .unwrap();
    assert_eq!(
        (String::from_utf8_lossy(&output.stdout), output.stderr),
        (MPTCP.into(), vec![]),
        "{}",
        output.status
    );
}

/// Does this user namespace know more users than one?
fn other_users_exist() -> bool {
    std::fs::read_to_string("/proc/self/uid_map").unwrap().split_whitespace().last() == Some("4294967295")
}

#[test]
fn an_ordinary_user_in_a_fresh_login_needs_no_privilege() {
    if !other_users_exist() {
        let _ = writeln!(std::io::stderr(), "skipped: nobody can log in where there is one user only");
        return;
    }
    let net = Net::new();
    // Where that user may go.
    let dir = tempfile::Builder::new().permissions(PermissionsExt::from_mode(0o755)).tempdir().unwrap();
    let braid = dir.path().join("braid");
    std::fs::copy(BRAID, &braid).unwrap();
    let script = dir.path().join("both.py");
    std::fs::write(&script, BOTH_ROLES).unwrap();
    let (braid, script) = (braid.display(), script.display());
    for (options, protocols) in
        [("", "262 262 262"), ("--port 8080", "262 262 262"), ("--only server --report=/dev/null", "262 6 6")]
    {
        let command =
            format!("id -un; grep CapEff /proc/self/status; {braid} run {options} python3 {script}");
        let login = net.command("su -l -s /bin/sh nobody -c").arg(command).output().unwrap();
        let expected = format!("nobody\nCapEff:\t0000000000000000\n{protocols} 1 True\n");
        assert_eq!(String::from_utf8_lossy(&login.stdout), expected, "{login:?}");
    }
}

#[test]
fn a_setuid_program_is_named_where_it_loses_its_rights() {
    let net = Net::new();
    let run = |prefix: &str| {
        let output = net.command(&format!("{prefix}{BRAID} run passwd --help")).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(run(""), "");
    assert_eq!(
        run("setpriv --bounding-set=-all --inh-caps=-all "),
        "braid: passwd runs without the rights of its file's owner (setuid needs CAP_SYS_ADMIN here)\n"
    );
}

#[test]
fn a_child_in_another_network_namespace_has_its_sockets_there() {
    let net = Net::new();
    // A connection within that namespace: a socket of the outer one could not reach its server.
    let script = "import socket as s
server = s.create_server(('127.0.0.1', 80))
client = s.create_connection(server.getsockname())
print(server.getsockopt(1, 38), client.getsockopt(1, 38), s.if_nameindex())";
    let up = "ip link set lo up; exec python3 -c \"$0\"";
    let output = net.command("braid run unshare -n sh -c").args([up, script]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "262 262 [(1, 'lo')]\n", "{output:?}");
    // Without the right to go there, they are TCP.
    let output = net
        .command("setpriv --bounding-set=-all --inh-caps=-all")
        .args([BRAID, "run", "unshare", "-Un", "python3", "-c", SOCKETS])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), TCP, "{output:?}");
}

#[test]
fn a_socket_belongs_to_the_user_of_its_program() {
    if !other_users_exist() {
        let _ = writeln!(std::io::stderr(), "skipped: this user namespace knows one user only");
        return;
    }
    let net = Net::new();
    let script = "import os, socket as s
server = s.create_server(('127.0.0.1', 8080))
print(os.geteuid(), os.fstat(server.fileno()).st_uid)";
    let output =
        net.command("braid run setpriv --reuid 65534 /usr/bin/python3 -c").arg(script).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "65534 65534\n", "{output:?}");
}

/// On a terminal of its own: what a shell with job control sees of its job.
#[test]
fn a_job_is_stopped_continued_and_interrupted_at_a_terminal_as_without() {
    let net = Net::new();
    let dir = tempfile::tempdir().unwrap();
    let job = dir.path().join("job.py");
    std::fs::write(
        &job,
        "import os, signal
signal.signal(signal.SIGCONT, lambda *_: print('continued', flush=True))
signal.signal(signal.SIGINT, lambda *_: (print('interrupted', flush=True), os._exit(5)))
print('in front:', os.getpgrp() == os.getpid() == os.tcgetpgrp(0), flush=True)
while True: signal.pause()",
    )
    .unwrap();
    let ends = ["env", &format!("{BRAID} run")].map(|braid| {
        let job = format!("{braid} python3 {}", job.display());
        // script(1) makes the terminal; on it, bash is interactive.
        let shell = "stty -echo; exec bash --norc --noprofile --noediting -i";
        let mut terminal = Running::start(net.command("script -qec").args([shell, "/dev/null"]));
        terminal.write(&format!("{job}; echo first $?\n"));
        terminal.wait_for("in front: True");
        terminal.write("\u{1a}"); // Ctrl-Z
        terminal.wait_for("Stopped");
        terminal.wait_for("first 148");
        terminal.write("fg; echo then $?\n");
        // The shell hands over the terminal first, and continues the job then.
        terminal.wait_for("continued");
        terminal.write("\u{3}"); // Ctrl-C
        terminal.wait_for("interrupted");
        terminal.wait_for("then 5");
        terminal.write("exit 7\n");
        terminal.wait().code()
    });
    assert_eq!(ends, [Some(7), Some(7)]);
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
fn a_hundred_thousand_sockets_leave_no_descriptor_behind() {
    let net = Net::new();
    let mut program = Running::start(net.command("braid run").args([
        "python3",
        "-c",
        "import os, socket, sys
for line in sys.stdin:
    for _ in range(int(line)):
        socket.socket().close()
    print('open:', len(os.listdir('/proc/self/fd')), flush=True)",
    ]));
    let mut open_after = |sockets: &str| {
        program.write(sockets);
        program.wait_for("open: ").pop().unwrap()
    };
    let before = open_after("1\n");
    for _ in 0..10 {
        assert_eq!(open_after("10000\n"), before);
    }
    // The supervisor closes its copy of the last socket when the program has it.
    let held = |pid: u32| std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    wait_until("the supervisor without sockets", || {
        companions(&net).into_iter().map(held).max().is_some_and(|count| count < 8)
    });
}

#[test]
fn a_program_out_of_descriptors_gets_what_it_gets_alone() {
    let net = Net::new();
    let script = "ulimit -n 30; exec python3 -c \"import socket
held = []
try:
    while True: held.append(socket.socket())
except OSError as error: print(error.strerror, len(held))\"";
    let [alone, under] = ["sh -c", "braid run sh -c"]
        .map(|line| String::from_utf8(net.command(line).arg(script).output().unwrap().stdout).unwrap());
    assert!(alone.starts_with("Too many open files "), "{alone}");
    assert_eq!(alone, under);
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

#[test]
fn a_child_that_outlives_the_program_is_served_to_its_own_end() {
    let net = Net::new();
    let script = "exec 3<&0; python3 -c \"$0\" <&3 & exit 4";
    let mut program = Running::start(net.command("braid run sh -c").args([script, ON_DEMAND]));
    assert_eq!(program.wait().code(), Some(4));
    program.write("\n");
    program.wait_for("262");
    program.write("\n");
    program.wait_for("262");
    assert_eq!(companions(&net).len(), 2);
    program.close_stdin();
    wait_until("the end of the supervisor", || companions(&net).is_empty());
}

/// Prints the protocols of a listener, of a client of it, and of what it accepts.
const BOTH_ROLES: &str = "import socket as s
listener = s.create_server(('127.0.0.1', 8080), reuse_port=True)
client = s.create_connection(listener.getsockname())
accepted = listener.accept()[0]
print(*[socket.getsockopt(s.SOL_SOCKET, s.SO_PROTOCOL) for socket in (listener, client, accepted)],
      listener.getsockopt(s.SOL_SOCKET, s.SO_REUSEPORT), listener.getsockname() == client.getpeername())";

fn both_roles(net: &Net, options: &str) -> String {
    let output =
        net.command(&format!("braid run {options}")).args(["python3", "-c", BOTH_ROLES]).output().unwrap();
    assert!(output.status.success(), "{options}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn only_and_port_choose_which_sockets_are_mptcp() {
    let net = Net::new();
    for (options, protocols) in [
        ("", "262 262 262"),
        ("--only server", "262 6 6"),
        ("--only client", "6 262 6"),
        ("--port 80,8080", "262 262 262"),
        ("--port 80", "6 6 6"),
        ("--port 8080 --only server", "262 6 6"),
        ("--port 8080 --only client", "6 262 6"),
        ("--port 8080 --exclude python3", "6 6 6"),
    ] {
        assert_eq!(both_roles(&net, options), format!("{protocols} 1 True\n"), "{options}");
    }
}

#[test]
fn a_socket_that_is_polled_before_it_connects_is_left_alone() {
    let net = Net::new();
    let script = "import select, socket as s
listener = s.create_server(('127.0.0.1', 8080))
client = s.socket()
poll = select.epoll()
poll.register(client, select.EPOLLOUT | select.EPOLLET)
poll.poll()
client.setblocking(False)
client.connect_ex(('127.0.0.1', 8080))
print(poll.poll(20), client.getsockopt(s.SOL_SOCKET, s.SO_PROTOCOL))";
    let output = net.command("braid run --port 8080 python3 -c").arg(script).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "[(4, 4)] 6\n", "{output:?}");
}

#[test]
fn the_report_tells_what_became_of_the_sockets() {
    let net = Net::new();
    let dir = tempfile::tempdir().unwrap();
    let report = |command: &mut Command| -> serde_json::Value {
        let file = dir.path().join("report");
        let report = format!("--report={}", file.display());
        // What counts is that the report is there when the program has ended.
        let status = net
            .command("braid run --json")
            .arg(&report)
            .arg(command.get_program())
            .args(command.get_args())
            .status();
        assert!(status.unwrap().success());
        serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
    };
    let told = report(Command::new("python3").args(["-c", BOTH_ROLES]));
    assert_eq!(told["mptcp_sockets"], 2);
    let mptcp = serde_json::json!({"mptcp": 2, "multipath": 0, "fallback": 0, "tcp": 0});
    assert_eq!(told["connections"], mptcp);
    let path = serde_json::json!([{"local": "127.0.0.1", "remote": "127.0.0.1", "connections": 2}]);
    assert_eq!(told["paths"], path);

    // A TCP server, and children that end before the program does.
    let server = net.0.run(|| TcpListener::bind("10.0.0.1:81")).unwrap().unwrap();
    let script = "for n in 1 2 3; do python3 -c 'import socket; socket.create_connection((\"10.0.0.1\", 81))'; done; exit 0";
    let told = report(Command::new("sh").args(["-c", script]));
    drop(server);
    let fallen_back = serde_json::json!({"mptcp": 0, "multipath": 0, "fallback": 3, "tcp": 0});
    assert_eq!((&told["mptcp_sockets"], &told["connections"]), (&3.into(), &fallen_back));
    assert_eq!(told["fallbacks"][0]["name"], "MPTcpExtMPCapableFallbackSYNACK", "{told}");
}

#[test]
fn a_report_on_the_way_comes_on_sigusr1() {
    let net = Net::new();
    let mut program = on_demand(&net, "--report");
    program.write("\n");
    program.wait_for("262");
    kill(supervisor(&net), Signal::SIGUSR1).unwrap();
    program.wait_for_note("braid: python3: 1 sockets made MPTCP");
    program.write("\n");
    program.wait_for("262");
    program.close_stdin();
    program.wait_for_note("braid: python3: 2 sockets made MPTCP");
    assert_eq!(program.wait().code(), Some(0));
}

#[test]
fn an_option_that_mptcp_refuses_is_reported_and_compat_takes_the_socket_back_to_tcp() {
    let net = Net::new();
    let script = "import socket as s
socket = s.socket()
socket.setsockopt(s.IPPROTO_TCP, s.TCP_NODELAY, 1)
socket.bind(('127.0.0.1', 0))
before = socket.getsockname()
TCP_REPAIR = 19
try: socket.setsockopt(s.IPPROTO_TCP, TCP_REPAIR, 0)
except OSError as error: print(error.strerror)
print(socket.getsockopt(s.SOL_SOCKET, s.SO_PROTOCOL), socket.getsockopt(s.IPPROTO_TCP, s.TCP_NODELAY))
print(socket.getsockname() == before, socket.get_inheritable())";
    for (options, printed, told) in [
        ("", "Protocol not available\n262 1\nTrue False\n", "0 became TCP"),
        ("--compat curl", "Protocol not available\n262 1\nTrue False\n", "0 became TCP"),
        ("--compat python3", "6 1\nTrue False\n", "1 became TCP"),
    ] {
        let run = format!("braid run --report {options} -- setpriv --inh-caps=-all python3 -c");
        let output = net.command(&run).arg(script).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), printed, "{options}: {output:?}");
        let line = format!("braid:   python3 set TCP_REPAIR 1 times, which MPTCP refuses; {told}\n");
        assert!(String::from_utf8_lossy(&output.stderr).contains(&line), "{output:?}");
    }
}

#[test]
#[ignore = "sets kernel.yama.ptrace_scope for the whole host: `make kernels` runs it"]
fn sockets_are_made_without_ptrace_and_looked_at_as_far_as_yama_lets_it() {
    const SCOPE: &str = "/proc/sys/kernel/yama/ptrace_scope";
    let net = Net::new();
    if !std::path::Path::new(SCOPE).exists() {
        let _ = writeln!(std::io::stderr(), "lacking Yama: a kernel with CONFIG_SECURITY_YAMA");
        return;
    }
    let protocols = |rights: &str, options: &str, script: &str| {
        let output = net.command(&format!("{rights} {BRAID} run {options}")).arg(script).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    const ALL: &str = "262 262 262 1 True\n";
    const NONE: &str = "6 6 6 1 True\n";
    let root = "env";
    let nobody = "setpriv --bounding-set=-all --inh-caps=-all";
    // The last one cannot be taken back.
    for (scope, of_the_program, of_a_child, with_sys_ptrace) in
        [(0, ALL, ALL, ALL), (1, ALL, NONE, ALL), (2, NONE, NONE, ALL), (3, NONE, NONE, NONE)]
    {
        std::fs::write(SCOPE, scope.to_string()).unwrap();
        assert_eq!(protocols(nobody, "python3 -c", SOCKETS), MPTCP, "{scope}");
        assert_eq!(protocols(nobody, "--port 8080 python3 -c", BOTH_ROLES), of_the_program, "{scope}");
        let child = format!("python3 -c \"{BOTH_ROLES}\"; exit");
        assert_eq!(protocols(nobody, "--port 8080 sh -c", &child), of_a_child, "{scope}");
        assert_eq!(protocols(root, "--port 8080 sh -c", &child), with_sys_ptrace, "{scope}");
    }
}
