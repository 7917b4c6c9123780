//! `braid proxy` as a process: signals, limits of the system, the service manager, and the long way of a
//! gigabyte. Each test has a network namespace of its own.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use mptcp::Netns;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Long enough for a slow machine; what is waited for comes at once.
const PATIENCE: Duration = Duration::from_secs(60);

const SERVER: &str = "127.0.0.1:5201";
const PROXY: &str = "127.0.0.1:5555";

#[test]
fn the_short_form_makes_the_published_chain() {
    in_network(|| {
        let server = TcpListener::bind(SERVER).unwrap();
        let mut far = braid(&["--mode", "server", "--port", "4444", "--remote", "localhost:5201"]);
        let mut near = braid(&["--mode", "client", "--port", "5555", "--remote", "127.0.0.1:4444"]);
        far.says("listening");
        near.says("listening");
        let (mut client, mut served) = joined(&server, PROXY);
        client.write_all(b"there").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&mut served).unwrap(), b"there");
        served.write_all(b"and back").unwrap();
        drop(served);
        assert_eq!(read_to_end(&mut client).unwrap(), b"and back");
        let line = near.says("closed by both sides");
        for part in
            ["to_server=6", "to_client=8", "client_leg=tcp", "server_leg=mptcp/1", "fault=none", "ms="]
        {
            assert!(line.contains(part), "{part} is not in {line}");
        }
        let line = far.says("closed by both sides");
        for part in ["to_server=6", "to_client=8", "client_leg=mptcp/1", "server_leg=tcp", "fault=none"] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    });
}

#[test]
fn bad_input_gets_one_clear_line_and_exit_code_2() {
    in_network(|| {
        let _busy = TcpListener::bind("127.0.0.1:1234").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.into_os_string().into_string().unwrap()
        };
        let unknown_key = file("unknown.toml", "[[service]]\nlisten = \"tcp://:1\"\n\nlissten = 5\n");
        let port_0 = file("port0.toml", "[[service]]\nlisten = \"tcp://:0\"\n");
        for (arguments, line) in [
            (
                format!("--config {unknown_key}"),
                format!("{unknown_key}:4: service[0].lissten: unknown field `lissten`"),
            ),
            (
                format!("--config {port_0}"),
                format!("{port_0}:2: service[0].listen: tcp://:0: port 0 cannot be used"),
            ),
            ("--config /nonexistent".into(), "read /nonexistent: No such file or directory".into()),
            (
                "--mode client --port 0 --remote a:1".into(),
                "--port 0: tcp://:0: port 0 cannot be used".into(),
            ),
            ("--mode client --port 1 --remote a".into(), "--remote a: mptcp://a has no port".into()),
            ("--mode client --port 1".into(), "the following required arguments were not provided".into()),
            (
                "--listen tcp://x:1 --to tcp://a:1".into(),
                "invalid value 'tcp://x:1' for '--listen <URL>': x is not an IP address".into(),
            ),
            (
                "--listen tcp://:1 --to udp://a:1".into(),
                "invalid value 'udp://a:1' for '--to <URL>': udp:// is neither".into(),
            ),
            (
                "--listen tcp://:1 --to tcp://a:1 --allow 10/8".into(),
                "invalid value '10/8' for '--allow <CIDR>': 10/8 is neither".into(),
            ),
            ("--listen tcp://:1".into(), "--to URL is missing (or --transparent)".into()),
            (
                "--listen tcp://:1 --to tcp://nowhere.invalid:1".into(),
                "service tcp://[::]:1: resolve nowhere.invalid: failed to lookup address".into(),
            ),
            (
                "--listen tcp://127.0.0.1:1234 --to tcp://127.0.0.1:1".into(),
                "service tcp://127.0.0.1:1234: listen on 127.0.0.1:1234: Address already in use".into(),
            ),
            (
                "--listen tcp://127.0.0.1:1235 --to tcp://127.0.0.1:1 --metrics 127.0.0.1:1234".into(),
                "serve metrics on 127.0.0.1:1234: Address already in use".into(),
            ),
            (
                "--listen tcp://:80 --to tcp://127.0.0.1:1".into(),
                "service tcp://[::]:80: listen on [::]:80: needs CAP_NET_BIND_SERVICE".into(),
            ),
        ] {
            let output = Command::new("setpriv")
                .arg("--bounding-set=-net_bind_service")
                .arg(env!("CARGO_BIN_EXE_braid"))
                .arg("proxy")
                .args(arguments.split(' '))
                .output()
                .unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            assert!(
                said.starts_with(&format!("braid: {line}")),
                "{arguments}\nsays     {said}expected {line}"
            );
            assert!(!said.contains("(os error"), "{said}");
            assert_eq!(said.matches('\n').count(), 1, "{said}");
            assert_eq!(output.status.code(), Some(2), "{arguments}");
            assert!(output.stdout.is_empty());
        }
    });
}

#[test]
fn check_reads_the_file_and_opens_nothing() {
    in_network(|| {
        let _busy = TcpListener::bind(PROXY).unwrap();
        let check = |to: &str| {
            let output = Command::new(env!("CARGO_BIN_EXE_braid"))
                .args(["proxy", "--check", "--listen", "tcp://127.0.0.1:5555", "--to", to])
                .output()
                .unwrap();
            output.status.code()
        };
        assert_eq!(check("tcp://127.0.0.1:1"), Some(0));
        assert_eq!(check("tcp://127.0.0.1:0"), Some(2));
    });
}

#[test]
fn a_reload_under_load_loses_no_connection_and_a_broken_file_changes_nothing() {
    in_network(|| {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("proxy.toml");
        let write = |extra: &str| {
            let service = format!(
                "[[service]]\nname = \"s\"\nlisten = \"tcp://{PROXY}\"\nto = \"tcp://{SERVER}\"\n{extra}"
            );
            // As editors do: the file is whole at every moment.
            let new = dir.path().join("new");
            std::fs::write(&new, service).unwrap();
            std::fs::rename(&new, &file).unwrap();
        };
        write("");
        let server = TcpListener::bind(SERVER).unwrap();
        thread::spawn(move || {
            for stream in server.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || {
                    let bytes = read_to_end(&mut stream).unwrap();
                    stream.write_all(&bytes).unwrap();
                });
            }
        });
        let mut proxy = braid(&["--config", file.to_str().unwrap()]);
        proxy.says("listening");

        let (mut long, stop, transfers) =
            (TcpStream::connect(PROXY).unwrap(), AtomicBool::new(false), AtomicUsize::new(0));
        long.write_all(b"begun before ").unwrap();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let bytes = vec![7; 200_000];
                    while !stop.load(Ordering::Relaxed) {
                        let mut stream = TcpStream::connect(PROXY).unwrap();
                        stream.write_all(&bytes).unwrap();
                        stream.shutdown(Shutdown::Write).unwrap();
                        assert!(read_to_end(&mut stream).unwrap() == bytes);
                        transfers.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let mut reload = |extra: &str, answer: &str| {
                let before = transfers.load(Ordering::Relaxed);
                write(extra);
                proxy.signal(Signal::SIGHUP);
                proxy.says(answer);
                until("a transfer goes on", || transfers.load(Ordering::Relaxed) > before + 1);
            };
            for _ in 0..10 {
                reload(
                    "[[service]]\nlisten = \"tcp://127.0.0.1:5556\"\nto = \"tcp://127.0.0.1:1\"\n",
                    "configuration reloaded",
                );
                reload("nodelay = ", "proxy.toml:5: ");
                assert!(TcpStream::connect("127.0.0.1:5556").is_ok(), "the broken file stopped a service");
                reload("max_connections = 1000\n", "configuration reloaded");
                assert!(TcpStream::connect("127.0.0.1:5556").is_err(), "the service is gone from the file");
            }
            stop.store(true, Ordering::Relaxed);
        });
        long.write_all(b"and alive after").unwrap();
        long.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&mut long).unwrap(), b"begun before and alive after");
    });
}

#[test]
fn sigterm_in_mid_transfer_lets_it_finish() {
    in_network(|| {
        let server = TcpListener::bind(SERVER).unwrap();
        let mut proxy = braid(&["--listen", "tcp://127.0.0.1:5555", "--to", "tcp://127.0.0.1:5201"]);
        proxy.says("listening");
        let (mut client, mut served) = joined(&server, PROXY);
        let half = vec![1; 5_000_000];
        let reader = thread::spawn(move || read_to_end(&mut served).unwrap().len());
        client.write_all(&half).unwrap();
        proxy.signal(Signal::SIGTERM);
        assert!(proxy.says("stopped listening").contains("connections=1"));
        assert_eq!(TcpStream::connect(PROXY).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        client.write_all(&half).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(reader.join().unwrap(), 10_000_000);
        assert_eq!(proxy.exits().code(), Some(0));
    });
}

#[test]
fn what_outlives_the_deadline_or_a_second_sigterm_is_reset_and_not_ended() {
    in_network(|| {
        let server = TcpListener::bind(SERVER).unwrap();
        for (drain, signals, why) in [("300ms", 1, "deadline passed"), ("1h", 2, "told to hurry")] {
            let mut proxy = braid(&[
                "--listen",
                "tcp://127.0.0.1:5555",
                "--to",
                "tcp://127.0.0.1:5201",
                "--drain",
                drain,
            ]);
            proxy.says("listening");
            let (mut client, mut served) = joined(&server, PROXY);
            for _ in 0..signals {
                proxy.signal(Signal::SIGTERM);
                proxy.says_any(&["stopped listening", why]);
            }
            for side in [&mut client, &mut served] {
                assert_eq!(read_to_end(side).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
            }
            assert!(proxy.says("relay shut down").contains("fault=relay"));
            assert_eq!(proxy.exits().code(), Some(0));
        }
    });
}

#[test]
fn running_out_of_descriptors_ends_nothing_and_is_survived() {
    in_network(|| {
        let server = TcpListener::bind(SERVER).unwrap();
        thread::spawn(move || {
            for stream in server.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || io::copy(&mut stream.try_clone().unwrap(), &mut stream));
            }
        });
        // A connection takes two descriptors: with one of these limits accept runs out of them, with the other
        // dial.
        let mut log = Vec::new();
        for limit in ["40", "41"] {
            let mut command = Command::new("prlimit");
            command.arg(format!("--nofile={limit}")).arg(env!("CARGO_BIN_EXE_braid"));
            let mut proxy = spawn(command.args([
                "proxy",
                "--listen",
                "tcp://127.0.0.1:5555",
                "--to",
                "tcp://127.0.0.1:5201",
            ]));
            proxy.says("listening");
            let mut living = Vec::new();
            let unserved = loop {
                let mut stream = TcpStream::connect(PROXY).unwrap();
                if echoes_until(&mut stream, || {
                    log.extend(proxy.log.try_iter());
                    log.last().is_some_and(|line| line.contains("Too many open files"))
                }) {
                    living.push(stream);
                } else {
                    break stream;
                }
            };
            assert!(living.len() > 5);
            for stream in &mut living {
                assert!(echoes(stream), "a connection from before is dead");
            }
            drop((living, unserved));
            // The backoff ends by itself, and new connections are served.
            until("a new connection is served", || echoes(&mut TcpStream::connect(PROXY).unwrap()));
            proxy.signal(Signal::SIGTERM);
            assert_eq!(proxy.exits().code(), Some(0));
            log.extend(proxy.log.iter());
        }
        let said = |part: &str| log.iter().any(|line| line.contains(part));
        assert!(said("cannot accept"), "{log:#?}");
        assert!(said("connect to 127.0.0.1:5201: Too many open files"), "{log:#?}");
    });
}

#[test]
fn a_service_manager_passes_the_socket_and_is_told_the_state() {
    in_network(|| {
        let dir = tempfile::tempdir().unwrap();
        let notified = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        notified.set_read_timeout(Some(PATIENCE)).unwrap();
        let state = || {
            let mut buffer = [0; 256];
            let n = notified.recv(&mut buffer).unwrap();
            String::from_utf8_lossy(&buffer[..n]).into_owned()
        };
        let server = TcpListener::bind(SERVER).unwrap();
        // Both addresses are taken by us: the proxy can only serve on them by taking the sockets over.
        let passed = TcpListener::bind(PROXY).unwrap();
        let surplus = TcpListener::bind("127.0.0.1:5556").unwrap();
        let mut command = Command::new("sh");
        command
            .args(["-c", r#"LISTEN_PID=$$ LISTEN_FDS=2 exec "$0" "$@" 3<&0 4<&1 0</dev/null 1>/dev/null"#])
            .arg(env!("CARGO_BIN_EXE_braid"))
            .args(["proxy", "--listen", "tcp://127.0.0.1:5555", "--to", "tcp://127.0.0.1:5201"])
            .env("NOTIFY_SOCKET", dir.path().join("notify"))
            .stdin(OwnedFd::from(passed.try_clone().unwrap()))
            .stdout(OwnedFd::from(surplus.try_clone().unwrap()));
        let mut proxy = spawn(&mut command);
        assert_eq!(state(), "READY=1\n");
        assert!(proxy.says("no service listens on this passed socket").contains("127.0.0.1:5556"));
        joined(&server, PROXY);
        proxy.signal(Signal::SIGHUP);
        let reloading = state();
        assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
        assert_eq!(state(), "READY=1\n");
        joined(&server, PROXY);
        proxy.signal(Signal::SIGTERM);
        assert_eq!(state(), "STOPPING=1\n");
        assert_eq!(proxy.exits().code(), Some(0));
    });
}

#[test]
fn five_thousand_idle_connections_hold_no_buffers() {
    const CONNECTIONS: usize = 5000;
    in_network(|| {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
        assert!(hard as usize > 2 * CONNECTIONS + 500, "needs 10,500 descriptors, the limit is {hard}");
        let server = TcpListener::bind(SERVER).unwrap();
        let mut proxy = braid(&["--listen", "tcp://127.0.0.1:5555", "--to", "mptcp://127.0.0.1:5201"]);
        proxy.says("listening");
        let mut pairs = vec![joined(&server, PROXY)];
        let before = proxy.memory();
        for _ in 1..CONNECTIONS {
            pairs.push(joined(&server, PROXY));
        }
        let each = (proxy.memory() - before) / CONNECTIONS;
        // Address space, so that untouched pages of a buffer count too; the smallest useful buffer is 64 KiB.
        assert!(each < 16 << 10, "{each} bytes per idle connection");
        for (client, served) in &mut pairs {
            talk(client, served);
            talk(served, client);
        }
    });
}

#[test]
fn a_gigabyte_over_two_paths_arrives_whole_while_one_goes_down_and_up_five_times() {
    const BLOCK: usize = 1 << 20;
    const BLOCKS: usize = 1024;
    in_network(|| {
        let near = Netns::current().unwrap();
        let far = Netns::anonymous().unwrap();
        ip(&far, "link set lo up");
        let far_path = format!("/proc/{}/fd/{}", std::process::id(), far.as_fd().as_raw_fd());
        for path in ["0", "1"] {
            ip(&near, &format!("link add a{path} type veth peer name b{path}"));
            ip(&near, &format!("link set b{path} netns {far_path}"));
            ip(&near, &format!("addr add 10.0.{path}.1/24 dev a{path}"));
            ip(&near, &format!("link set a{path} up"));
            ip(&far, &format!("addr add 10.0.{path}.2/24 dev b{path}"));
            ip(&far, &format!("link set b{path} up"));
        }
        ip(&near, "mptcp limits set subflows 1 add_addr_accepted 1");
        ip(&far, "mptcp limits set subflows 1");
        ip(&far, "mptcp endpoint add 10.0.1.2 dev b1 signal");

        let (server, mut server_proxy) = far
            .run(|| {
                let server = TcpListener::bind(SERVER).unwrap();
                (server, braid(&["--mode", "server", "--port", "4444", "--remote", SERVER]))
            })
            .unwrap();
        let mut client_proxy = braid(&["--mode", "client", "--port", "5555", "--remote", "10.0.0.2:4444"]);
        server_proxy.says("listening");
        client_proxy.says("listening");
        let (mut client, mut served) = joined(&server, PROXY);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        until("the second subflow is there", || {
            let seen = runtime.block_on(mptcp::diag::connections(&near)).unwrap();
            seen.iter().any(|connection| connection.subflows.len() == 2)
        });

        // Noise (xorshift), in which each block is told from the others by its number.
        let mut noise = Vec::with_capacity(BLOCK);
        let mut x = 88_172_645_463_325_252_u64;
        while noise.len() < BLOCK {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            noise.extend(x.to_ne_bytes());
        }
        let block = |number: usize| [&number.to_ne_bytes(), &noise[8..]].concat();
        let arrived = AtomicUsize::new(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..BLOCKS {
                    client.write_all(&block(number)).unwrap();
                }
                client.shutdown(Shutdown::Write).unwrap();
            });
            scope.spawn(|| {
                // The path of the first subflow, at which the connection began, goes down and up.
                for change in 1..=10 {
                    until("the transfer goes on", || arrived.load(Ordering::Relaxed) >= change * BLOCKS / 11);
                    ip(&near, if change % 2 == 1 { "link set a0 down" } else { "link set a0 up" });
                }
            });
            let mut buffer = vec![0; BLOCK];
            served.set_read_timeout(Some(PATIENCE)).unwrap();
            for number in 0..BLOCKS {
                served.read_exact(&mut buffer).unwrap();
                assert!(buffer == block(number), "block {number} differs");
                arrived.fetch_add(1, Ordering::Relaxed);
            }
            assert_eq!(served.read(&mut buffer).unwrap(), 0);
        });
        drop((client, served));
        let line = client_proxy.says("closed by both sides");
        for part in ["to_server=1073741825", "server_leg=mptcp/2"] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    });
}

/// A running `braid proxy`, killed when dropped.
struct Braid {
    child: Child,
    log: Receiver<String>,
}

impl Braid {
    /// Waits until it logs a line with `part` in it.
    fn says(&mut self, part: &str) -> String {
        self.says_any(&[part])
    }

    fn says_any(&mut self, parts: &[&str]) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut said = Vec::new();
        while let Ok(line) = self.log.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            if parts.iter().any(|part| line.contains(part)) {
                return line;
            }
            said.push(line);
        }
        panic!("it says not {parts:?} but {said:#?}");
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    fn exits(&mut self) -> ExitStatus {
        let mut status = None;
        until("the proxy exits", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Bytes of address space.
    fn memory(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmSize:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
    }
}

impl Drop for Braid {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn braid(arguments: &[&str]) -> Braid {
    spawn(Command::new(env!("CARGO_BIN_EXE_braid")).arg("proxy").args(arguments))
}

fn spawn(command: &mut Command) -> Braid {
    let mut child = command.env_remove("BRAID_LOG").stderr(Stdio::piped()).spawn().unwrap();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    let (sender, log) = channel();
    thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    Braid { child, log }
}

/// Runs `test` on a thread in a new network namespace; threads and processes that it starts live there too.
fn in_network(test: impl FnOnce() + Send) {
    let netns = Netns::anonymous().unwrap();
    ip(&netns, "link set lo up");
    // Else the kernel would remember for an hour that MPTCP failed here.
    mptcp::sysctl::set(&netns, "net.mptcp.blackhole_timeout", "0").unwrap();
    netns.run(test).unwrap();
}

fn ip(netns: &Netns, arguments: &str) {
    let mut command = Command::new("ip");
    command.args(arguments.split(' '));
    netns.enter_on_exec(&mut command);
    assert!(command.status().unwrap().success(), "ip {arguments}");
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A connection through the proxy at `at` to `server`: both ends of it, proven to be joined.
fn joined(server: &TcpListener, at: &str) -> (TcpStream, TcpStream) {
    let mut client = TcpStream::connect(at.parse::<SocketAddr>().unwrap()).unwrap();
    let (mut served, _) = server.accept().unwrap();
    talk(&mut client, &mut served);
    (client, served)
}

/// Sends a byte from one end to the other.
fn talk(from: &mut TcpStream, to: &mut TcpStream) {
    let mut byte = [0];
    from.write_all(b"?").unwrap();
    to.set_read_timeout(Some(PATIENCE)).unwrap();
    to.read_exact(&mut byte).unwrap();
}

fn read_to_end(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Does the server at the other end answer?
fn echoes(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"?").is_ok() && stream.read_exact(&mut byte).is_ok()
}

/// Like [`echoes`], without patience once `failed`.
fn echoes_until(stream: &mut TcpStream, mut failed: impl FnMut() -> bool) -> bool {
    let _ = stream.write_all(b"?");
    stream.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    let (mut byte, mut answered) = ([0], false);
    until("an answer comes or a failure", || {
        answered = stream.read_exact(&mut byte).is_ok();
        answered || failed()
    });
    answered
}
