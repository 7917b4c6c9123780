//! The relay between real sockets, each test in a network namespace of its own.

use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use mptcp::Netns;
use mptcp::socket::{self, Options, Protocol};
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};
use relay::config::{Process, Settings};
use relay::listener::Inherited;
use relay::{Config, Relay};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};

/// Long enough for a slow machine; what is waited for comes at once.
const PATIENCE: Duration = Duration::from_secs(30);

const CHAIN: &str = r#"
    [[service]]
    name = "client"
    listen = "tcp://127.0.0.1:5555"
    to = "mptcp://127.0.0.1:4444"

    [[service]]
    name = "server"
    listen = "mptcp://127.0.0.1:4444"
    to = "tcp://127.0.0.1:5201"
"#;

#[test]
fn a_closed_half_travels_through_the_chain_and_the_other_half_stays_open() {
    in_network(async {
        let relay = start(CHAIN).await;
        let listener = listen("127.0.0.1:5201").await;
        for client_first in [true, false] {
            let (mut client, mut server) = through(&listener, "127.0.0.1:5555").await;
            let (first, second) =
                if client_first { (&mut client, &mut server) } else { (&mut server, &mut client) };
            first.write_all(b"request").await.unwrap();
            first.shutdown().await.unwrap();
            assert_eq!(read_to_end(second).await.unwrap(), b"request");
            // This half lives on although the other one has ended at both ends.
            second.write_all(b"answer, part 1. ").await.unwrap();
            let mut part = [0; 16];
            timeout(PATIENCE, first.read_exact(&mut part)).await.unwrap().unwrap();
            second.write_all(b"part 2").await.unwrap();
            second.shutdown().await.unwrap();
            assert_eq!(read_to_end(first).await.unwrap(), b"part 2");
        }
        for service in ["client", "server"] {
            shows(&relay, &format!(r#"ended_total{{service="{service}",reason="closed",fault="none"}} 2"#))
                .await;
            shows(&relay, &format!(r#"relayed_bytes_total{{service="{service}",direction="to_server"}} 31"#))
                .await;
            shows(&relay, &format!(r#"fallbacks_total{{service="{service}",leg="client"}} 0"#)).await;
            shows(&relay, &format!(r#"fallbacks_total{{service="{service}",leg="server"}} 0"#)).await;
        }
    });
}

#[test]
fn a_reset_of_one_side_is_a_reset_for_the_other_and_no_end_of_file() {
    in_network(async {
        let relay = start(CHAIN).await;
        let listener = listen("127.0.0.1:5201").await;
        for (culprit, count) in [("client", 1), ("server", 2)] {
            let (mut client, mut server) = through(&listener, "127.0.0.1:5555").await;
            let mut byte = [0];
            client.write_all(b"x").await.unwrap();
            timeout(PATIENCE, server.read_exact(&mut byte)).await.unwrap().unwrap();
            let (culprit_end, mut other_end) =
                if culprit == "client" { (client, server) } else { (server, client) };
            reset(culprit_end);
            let error = read_to_end(&mut other_end).await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{culprit}");
            shows(&relay, &format!(r#"ended_total{{service="client",reason="broken",fault="{culprit}"}} 1"#))
                .await;
            shows(&relay, &format!(r#"connections_total{{service="client"}} {count}"#)).await;
        }
    });
}

#[test]
fn the_next_address_of_a_name_is_tried() {
    in_network(async {
        let mut hosts = tempfile::NamedTempFile::new().unwrap();
        hosts.write_all(b"127.0.0.1 two.test\n127.0.0.2 two.test\n").unwrap();
        nix::mount::mount(Some(hosts.path()), "/etc/hosts", None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .unwrap();
        let addrs: Vec<_> = tokio::net::lookup_host("two.test:5201").await.unwrap().collect();
        assert_eq!(addrs.len(), 2);
        let _relay = start(&service("tcp://:5555", "tcp://two.test:5201", "")).await;
        let listener = TcpListener::bind(addrs[1]).await.unwrap();
        through(&listener, "127.0.0.1:5555").await;
    });
}

#[test]
fn with_lazy_dns_a_name_need_not_resolve_before_somebody_connects() {
    in_network(async {
        let text = |options| service("tcp://127.0.0.1:5555", "tcp://nowhere.invalid:1", options);
        let strict = Relay::start(config(&text("")).unwrap(), Inherited::default()).await;
        let error = strict.err().expect("the name does not resolve").to_string();
        assert!(error.starts_with("service s: resolve nowhere.invalid: "), "{error}");
        let relay = start(&text("lazy_dns = true")).await;
        refused("127.0.0.1:0", "127.0.0.1:5555", b"").await;
        shows(&relay, r#"ended_total{service="s",reason="unreachable",fault="server"} 1"#).await;
    });
}

#[test]
fn a_silent_peer_is_probed_on_both_legs() {
    in_network(async {
        let listener = listen("127.0.0.1:5201").await;
        let options = Options::default();
        let far = socket::listen(addr("127.0.0.1:4444"), &options).unwrap();
        let _relays = [
            start(&service("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5201", "keepalive = \"1h\"")).await,
            start(&service("tcp://127.0.0.1:5556", "mptcp://127.0.0.1:4444", "keepalive = \"1h\"")).await,
            start(&service("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5201", "keepalive = \"0s\"")).await,
        ];
        let _open = [
            through(&listener, "127.0.0.1:5555").await,
            through(&far, "127.0.0.1:5556").await,
            through(&listener, "127.0.0.1:5557").await,
        ];
        let timers = |filter: &str| {
            let output = Command::new("ss").args(["-tonH", filter]).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        for (filter, probed) in [("sport = :5555", true), ("dport = :4444", true), ("sport = :5557", false)] {
            // A timer for data that is not acknowledged yet comes first.
            let deadline = Instant::now() + PATIENCE;
            while timers(filter).contains("timer:(on") && Instant::now() < deadline {
                sleep(Duration::from_millis(5)).await;
            }
            let seen = timers(filter);
            assert_eq!(seen.lines().count(), 1, "{filter}: {seen}");
            assert_eq!(seen.contains("timer:(keepalive,"), probed, "{filter}: {seen}");
        }
    });
}

#[test]
fn one_listener_serves_both_families() {
    in_network(async {
        let _relay = start(&service("tcp://:5555", "tcp://127.0.0.1:5201", "")).await;
        let listener = listen("127.0.0.1:5201").await;
        through(&listener, "127.0.0.1:5555").await;
        through(&listener, "[::1]:5555").await;
    });
}

#[test]
fn an_unreachable_server_is_the_servers_fault_and_the_client_learns_it() {
    in_network(async {
        // Nobody listens on 5201. On 5202 the queue of connections is full, so that SYNs get no answer.
        let full = socket::listen(
            addr("127.0.0.1:5202"),
            &Options { protocol: Protocol::Tcp, backlog: 1, ..Options::default() },
        )
        .unwrap();
        let mut filling = Vec::new();
        while let Ok(stream) = timeout(Duration::from_millis(200), TcpStream::connect("127.0.0.1:5202")).await
        {
            filling.push(stream.unwrap());
        }
        for (port, server) in [(5555, "tcp://127.0.0.1:5201"), (5556, "mptcp://127.0.0.1:5202")] {
            let listen = format!("tcp://127.0.0.1:{port}");
            let relay = start(&service(&listen, server, r#"connect_timeout = "200ms""#)).await;
            refused("127.0.0.1:0", &format!("127.0.0.1:{port}"), b"").await;
            shows(&relay, r#"ended_total{service="s",reason="unreachable",fault="server"} 1"#).await;
        }
        drop(full);
    });
}

#[test]
fn a_server_that_speaks_only_tcp_is_counted_and_with_require_mptcp_refused() {
    in_network(async {
        let listener = listen("127.0.0.1:5201").await;
        let relay = start(&service("tcp://127.0.0.1:5555", "mptcp://127.0.0.1:5201", "")).await;
        through(&listener, "127.0.0.1:5555").await;
        shows(&relay, r#"fallbacks_total{service="s",leg="server"} 1"#).await;
        shows(&relay, r#"fallbacks_total{service="s",leg="client"} 0"#).await;

        let strict = "require_mptcp = true";
        let relay = start(&service("tcp://127.0.0.1:5556", "mptcp://127.0.0.1:5201", strict)).await;
        refused("127.0.0.1:0", "127.0.0.1:5556", b"").await;
        shows(&relay, r#"fallbacks_total{service="s",leg="server"} 1"#).await;
        shows(&relay, r#"ended_total{service="s",reason="not_mptcp",fault="server"} 1"#).await;
    });
}

#[test]
fn a_client_that_speaks_only_tcp_is_counted_and_with_require_mptcp_refused() {
    in_network(async {
        let listener = listen("127.0.0.1:5201").await;
        let strict = "require_mptcp = true";
        let relay = start(&service("mptcp://127.0.0.1:4444", "tcp://127.0.0.1:5201", strict)).await;
        refused("127.0.0.1:0", "127.0.0.1:4444", b"").await;
        shows(&relay, r#"fallbacks_total{service="s",leg="client"} 1"#).await;
        shows(&relay, r#"ended_total{service="s",reason="not_mptcp",fault="client"} 1"#).await;

        let options = Options { protocol: Protocol::Mptcp, ..Options::default() };
        let (client, server) =
            tokio::join!(socket::connect(addr("127.0.0.1:4444"), &options), listener.accept());
        talk(client.unwrap(), server.unwrap().0).await;
        shows(&relay, r#"fallbacks_total{service="s",leg="client"} 1"#).await;
    });
}

#[test]
fn the_server_learns_the_client_from_a_proxy_header() {
    in_network(async {
        let listener = listen("127.0.0.1:5201").await;
        let v2 = |family: u8, rest: &[u8]| {
            let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec();
            header.extend([family, 0, rest.len() as u8]);
            header.extend(rest);
            header
        };
        let sixteen = |last: u8| [[0; 15].as_slice(), &[last]].concat();
        for (version, port, to, check) in [
            (
                "v1",
                5551,
                "127.0.0.1",
                &(|p: u16| format!("PROXY TCP4 127.0.0.1 127.0.0.1 {p} 5551\r\n").into_bytes())
                    as &(dyn Fn(u16) -> Vec<u8> + Sync),
            ),
            ("v1", 5552, "::1", &|p| format!("PROXY TCP6 ::1 ::1 {p} 5552\r\n").into_bytes()),
            ("v2", 5553, "127.0.0.1", &|p| {
                v2(
                    0x11,
                    &[&[127, 0, 0, 1, 127, 0, 0, 1], p.to_be_bytes().as_slice(), &5553u16.to_be_bytes()]
                        .concat(),
                )
            }),
            ("v2", 5554, "::1", &|p| {
                v2(
                    0x21,
                    &[sixteen(1), sixteen(1), p.to_be_bytes().into(), 5554u16.to_be_bytes().into()].concat(),
                )
            }),
        ] {
            let options = format!(r#"send_proxy = "{version}""#);
            let _relay = start(&service(&format!("tcp://:{port}"), "tcp://127.0.0.1:5201", &options)).await;
            let (client, server) = tokio::join!(TcpStream::connect((to, port)), listener.accept());
            let (mut client, mut server) = (client.unwrap(), server.unwrap().0);
            client.write_all(b"hello").await.unwrap();
            client.shutdown().await.unwrap();
            let mut expected = check(client.local_addr().unwrap().port());
            expected.extend(b"hello");
            assert_eq!(read_to_end(&mut server).await.unwrap(), expected, "{version} {to}");
        }
    });
}

#[test]
fn an_accepted_proxy_header_names_the_client_and_the_bytes_after_it_reach_the_server() {
    in_network(async {
        let listener = listen("127.0.0.1:5201").await;
        let options = "accept_proxy = true\nsend_proxy = \"v1\"";
        let _relay = start(&service("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5201", options)).await;
        let v2_signature = b"\r\n\r\n\0\r\nQUIT\n".as_slice();
        let v2_ipv4 = [10, 1, 2, 3, 10, 9, 8, 7, 0x30, 0x39, 0, 80];
        for (header, named) in [
            (b"PROXY TCP4 10.1.2.3 10.9.8.7 12345 80\r\n".to_vec(), true),
            ([v2_signature, &[0x21, 0x11, 0, 12], &v2_ipv4].concat(), true),
            // With a TLV (type 4, NOOP) behind the addresses.
            ([v2_signature, &[0x21, 0x11, 0, 16], &v2_ipv4, &[4, 0, 1, 0]].concat(), true),
            (b"PROXY UNKNOWN\r\n".to_vec(), false),
            ([v2_signature, &[0x20, 0, 0, 0]].concat(), false),
        ] {
            // Whole with the first data; and byte by byte.
            for piecemeal in [false, true] {
                let mut client = TcpStream::connect("127.0.0.1:5555").await.unwrap();
                client.set_nodelay(true).unwrap();
                let bytes = [&header, b"early".as_slice()].concat();
                for piece in bytes.chunks(if piecemeal { 1 } else { bytes.len() }) {
                    client.write_all(piece).await.unwrap();
                }
                client.shutdown().await.unwrap();
                let (mut server, _) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
                let expected = match named {
                    true => "PROXY TCP4 10.1.2.3 10.9.8.7 12345 80\r\nearly".into(),
                    false => {
                        let port = client.local_addr().unwrap().port();
                        format!("PROXY TCP4 127.0.0.1 127.0.0.1 {port} 5555\r\nearly")
                    }
                };
                let seen = read_to_end(&mut server).await.unwrap();
                assert_eq!(String::from_utf8_lossy(&seen), expected);
            }
        }
    });
}

#[test]
fn a_bad_missing_or_slow_proxy_header_ends_the_connection_before_the_server_sees_it() {
    in_network(async {
        let listener = listen("127.0.0.1:5201").await;
        let options = "accept_proxy = true\nconnect_timeout = \"300ms\"";
        let relay = start(&service("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5201", options)).await;
        let v2 = b"\r\n\r\n\0\r\nQUIT\n".as_slice();
        let bad: [Vec<u8>; 9] = [
            b"GET / HTTP/1.1\r\n\r\n".into(),
            b"PROXY TCP4 10.1.2.3\r\n".into(),
            b"PROXY TCP4 10.1.2.3 10.9.8.7 99999 80\r\n".into(),
            b"PROXY TCP4 10.1.2.300 10.9.8.7 1 80\r\n".into(),
            [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 200]].concat(),
            // Version 3; an IPv4 header too short for its addresses; one longer than we take.
            [v2, &[0x31, 0x11, 0, 12], &[0; 12]].concat(),
            [v2, &[0x21, 0x11, 0, 4], &[0; 4]].concat(),
            [v2, &[0x21, 0x11, 0xff, 0xff]].concat(),
            // Begins well and then stays silent.
            b"PROXY TCP4 10.1.".into(),
        ];
        for (index, bytes) in bad.iter().enumerate() {
            refused("127.0.0.1:0", "127.0.0.1:5555", bytes).await;
            let count = index + 1;
            shows(
                &relay,
                &format!(r#"ended_total{{service="s",reason="bad_header",fault="client"}} {count}"#),
            )
            .await;
        }
        assert!(timeout(Duration::ZERO, listener.accept()).await.is_err(), "the server saw a connection");
    });
}

#[test]
fn proxy_headers_of_strangers_are_refused() {
    in_network(async {
        let listener = listen("127.0.0.1:5201").await;
        let options = "accept_proxy = true\nproxy_from = [\"127.0.0.2\"]";
        let relay = start(&service("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5201", options)).await;
        let mut friend = connect_from("127.0.0.2:0", "127.0.0.1:5555").await;
        friend.write_all(b"PROXY UNKNOWN\r\n").await.unwrap();
        timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
        refused("127.0.0.3:0", "127.0.0.1:5555", b"PROXY UNKNOWN\r\n").await;
        shows(&relay, r#"reason="bad_header",fault="client"} 1"#).await;
    });
}

#[test]
fn allow_and_deny_judge_the_client_by_network() {
    in_network(async {
        let listener = listen("127.0.0.1:5201").await;
        let options = "allow = [\"127.0.0.0/29\"]\ndeny = [\"127.0.0.4/31\"]";
        let relay = start(&service("tcp://:5555", "tcp://127.0.0.1:5201", options)).await;
        let mut denied = 0;
        for (from, served) in [(1, true), (3, true), (4, false), (5, false), (6, true), (8, false)] {
            let source = format!("127.0.0.{from}:0");
            if served {
                let _client = connect_from(&source, "127.0.0.1:5555").await;
                timeout(PATIENCE, listener.accept()).await.expect("served").unwrap();
            } else {
                denied += 1;
                refused(&source, "127.0.0.1:5555", b"").await;
                shows(&relay, &format!(r#"reason="denied",fault="client"}} {denied}"#)).await;
            }
        }
    });
}

#[test]
fn a_connection_over_the_limit_is_refused_and_places_become_free_again() {
    in_network(async {
        let listener = listen("127.0.0.1:5201").await;
        let options = "max_connections = 3\nmax_connections_per_source = 2";
        let relay = start(&service("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5201", options)).await;
        let from = async |source: &str| connect_from(source, "127.0.0.1:5555").await;
        let served = async || timeout(PATIENCE, listener.accept()).await.unwrap().unwrap().0;

        let (one, _server_one) = (from("127.0.0.1:0").await, served().await);
        let (_two, _server_two) = (from("127.0.0.1:0").await, served().await);
        refused("127.0.0.1:0", "127.0.0.1:5555", b"").await;
        shows(&relay, r#"reason="source_full",fault="client"} 1"#).await;
        let (_three, _server_three) = (from("127.0.0.2:0").await, served().await);
        refused("127.0.0.3:0", "127.0.0.1:5555", b"").await;
        shows(&relay, r#"reason="service_full",fault="relay"} 1"#).await;

        reset(one);
        shows(&relay, r#"connections_active{service="s"} 2"#).await;
        let (_four, _server_four) = (from("127.0.0.1:0").await, served().await);
    });
}

#[test]
fn a_silent_connection_ends_after_the_idle_timeout_and_a_talking_one_does_not() {
    in_network(async {
        let listener = listen("127.0.0.1:5201").await;
        let relay =
            start(&service("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5201", r#"idle_timeout = "3s""#)).await;
        let (mut talking, mut server) = through(&listener, "127.0.0.1:5555").await;
        let (mut silent, _server) = through(&listener, "127.0.0.1:5555").await;
        let mut byte = [0];
        let mut talk = async || {
            talking.write_all(b"x").await.unwrap();
            server.read_exact(&mut byte).await.unwrap();
            sleep(Duration::from_millis(50)).await;
        };
        let error = tokio::select! {
            end = read_to_end(&mut silent) => end.unwrap_err(),
            () = async { loop { talk().await } } => unreachable!(),
        };
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        talk().await;
        shows(&relay, r#"reason="idle",fault="client"} 1"#).await;
        shows(&relay, r#"connections_active{service="s"} 1"#).await;
    });
}

#[test]
fn a_server_that_acknowledges_nothing_is_given_up_after_the_user_timeout() {
    in_network(async {
        let far = far_network();
        for (protocol, port, reason) in [(Protocol::Mptcp, 5201, "stalled"), (Protocol::Tcp, 5202, "broken")]
        {
            ip(&far, "link set far up");
            let (scheme, number) = match protocol {
                Protocol::Mptcp => ("mptcp", socket2::Protocol::MPTCP),
                Protocol::Tcp => ("tcp", socket2::Protocol::TCP),
            };
            let listener = far.run(|| {
                let socket =
                    socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, Some(number))?;
                socket.bind(&addr(&format!("10.0.0.2:{port}")).into())?;
                socket.listen(1)?;
                socket.set_nonblocking(true)?;
                std::io::Result::Ok(socket.into())
            });
            let listener = TcpListener::from_std(listener.unwrap().unwrap()).unwrap();
            let to = format!("{scheme}://10.0.0.2:{port}");
            let relay =
                start(&service(&format!("tcp://127.0.0.1:{port}"), &to, r#"user_timeout = "500ms""#)).await;
            let (mut client, _server) = through(&listener, &format!("127.0.0.1:{port}")).await;
            ip(&far, "link set far down");
            client.write_all(b"into the void").await.unwrap();
            assert!(read_to_end(&mut client).await.is_err(), "{scheme}");
            shows(&relay, &format!(r#"reason="{reason}",fault="server"}} 1"#)).await;
        }
    });
}

#[test]
fn a_reload_begins_stops_and_changes_services_and_live_connections_stay() {
    in_network(async {
        let listener = listen("127.0.0.1:5201").await;
        let two = |first: &str, second: &str| {
            config(&format!(
                "{}{}",
                service("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5201", first),
                service(second, "tcp://127.0.0.1:5201", "name = \"t\"").replace("name = \"s\"\n", ""),
            ))
        };
        let mut relay =
            Relay::start(two("", "tcp://127.0.0.1:5556").unwrap(), Inherited::default()).await.unwrap();
        let (kept_client, kept_server) = through(&listener, "127.0.0.1:5555").await;
        let (gone_client, gone_server) = through(&listener, "127.0.0.1:5556").await;

        relay.reload(two("deny = [\"127.0.0.0/8\"]", "tcp://127.0.0.1:5557").unwrap()).await.unwrap();
        // Changed: refuses new connections now. Gone: does not listen. New: serves.
        refused("127.0.0.1:0", "127.0.0.1:5555", b"").await;
        shows(&relay, r#"ended_total{service="s",reason="denied",fault="client"} 1"#).await;
        let error = TcpStream::connect("127.0.0.1:5556").await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        through(&listener, "127.0.0.1:5557").await;
        talk(kept_client, kept_server).await;
        talk(gone_client, gone_server).await;

        // A port that is taken, a name that does not resolve: nothing changes, not even the service before.
        let _taken = listen("127.0.0.1:5558").await;
        for bad in [two("", "tcp://127.0.0.1:5558").unwrap(), {
            let mut config = two("", "tcp://127.0.0.1:5559").unwrap();
            config.services[1].upstream =
                relay::config::Upstream::Fixed("tcp://nowhere.invalid:1".parse().unwrap());
            config
        }] {
            relay.reload(bad).await.unwrap_err();
            refused("127.0.0.1:0", "127.0.0.1:5555", b"").await;
            through(&listener, "127.0.0.1:5557").await;
        }
        shows(&relay, r#"reloads_total{result="ok"} 1"#).await;
        shows(&relay, r#"reloads_total{result="failed"} 2"#).await;
    });
}

#[test]
fn metrics_are_served_over_http() {
    in_network(async {
        let listener = listen("127.0.0.1:5201").await;
        let text = format!(
            "metrics = \"127.0.0.1:9100\"\n{}",
            service("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5201", "")
        );
        let relay = start(&text).await;
        let (mut client, mut server) = through(&listener, "127.0.0.1:5555").await;
        client.write_all(b"12345").await.unwrap();
        let mut five = [0; 5];
        server.read_exact(&mut five).await.unwrap();
        shows(&relay, r#"relayed_bytes_total{service="s",direction="to_server"} 6"#).await;
        let mut http = TcpStream::connect("127.0.0.1:9100").await.unwrap();
        http.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let page = String::from_utf8(read_to_end(&mut http).await.unwrap()).unwrap();
        assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
        assert!(page.contains("content-type: application/openmetrics-text; version=1.0.0"), "{page}");
        for line in [
            "# TYPE braid_proxy_connections counter",
            r#"braid_proxy_connections_total{service="s"} 1"#,
            r#"braid_proxy_connections_active{service="s"} 1"#,
            r#"braid_proxy_relayed_bytes_total{service="s",direction="to_server"} 6"#,
            r#"braid_proxy_relayed_bytes_total{service="s",direction="to_client"} 0"#,
            r#"braid_proxy_accept_errors_total{service="s"} 0"#,
            "# EOF",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} is not in {page}");
        }
    });
}

/// Runs `test` on a runtime whose threads live in a new network namespace, and in a mount namespace where a
/// test may put a file over another.
fn in_network(test: impl Future<Output = ()> + Send) {
    let netns = Netns::anonymous().unwrap();
    ip(&netns, "link set lo up");
    // Else the kernel would remember for an hour that MPTCP failed here.
    mptcp::sysctl::set(&netns, "net.mptcp.blackhole_timeout", "0").unwrap();
    netns
        .run(|| {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
            nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap()
                .block_on(test)
        })
        .unwrap();
}

/// A second namespace, reached through a veth pair: 10.0.0.1 here, 10.0.0.2 on `far` there.
fn far_network() -> Netns {
    let far = Netns::anonymous().unwrap();
    let near = Netns::current().unwrap();
    ip(&near, "link add near type veth peer name far");
    // iproute2 takes a namespace by pid or path: this process holds the far one open.
    let path = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(&far))
    );
    ip(&near, &format!("link set far netns {path}"));
    ip(&near, "addr add 10.0.0.1/24 dev near");
    ip(&near, "link set near up");
    ip(&far, "addr add 10.0.0.2/24 dev far");
    ip(&far, "link set far up");
    far
}

fn ip(netns: &Netns, arguments: &str) {
    let mut command = Command::new("ip");
    command.args(arguments.split(' '));
    netns.enter_on_exec(&mut command);
    assert!(command.status().unwrap().success(), "ip {arguments}");
}

fn addr(s: &str) -> SocketAddr {
    s.parse().unwrap()
}

fn service(listen: &str, to: &str, options: &str) -> String {
    format!("[[service]]\nname = \"s\"\nlisten = \"{listen}\"\nto = \"{to}\"\n{options}\n")
}

fn config(toml: &str) -> relay::Result<Config> {
    Config::from_toml(toml, Path::new("test.toml"), &Settings::default(), &Process::default())
}

async fn start(toml: &str) -> Relay {
    Relay::start(config(toml).unwrap(), Inherited::default()).await.unwrap()
}

async fn listen(at: &str) -> TcpListener {
    TcpListener::bind(at).await.unwrap()
}

async fn connect_from(from: &str, to: &str) -> TcpStream {
    let options = Options { protocol: Protocol::Tcp, bind: Some(addr(from)), ..Options::default() };
    socket::connect(addr(to), &options).await.unwrap()
}

/// Connects to `to`, sends `bytes`, and sees the connection reset: while it connects, writes or reads.
async fn refused(from: &str, to: &str, bytes: &[u8]) {
    let options = Options { protocol: Protocol::Tcp, bind: Some(addr(from)), ..Options::default() };
    let number = match socket::connect(addr(to), &options).await {
        Ok(mut client) => {
            let _ = client.write_all(bytes).await;
            read_to_end(&mut client).await.unwrap_err().raw_os_error()
        }
        Err(error) => error.raw_os_error(),
    };
    assert_eq!(number, Some(libc::ECONNRESET), "{to} {}", String::from_utf8_lossy(bytes));
}

/// A connection through the relay at `at` to `listener`: both ends of it, proven to be joined.
async fn through(listener: &TcpListener, at: &str) -> (TcpStream, TcpStream) {
    let pair = async { tokio::try_join!(TcpStream::connect(at), listener.accept()) };
    let (client, (server, _)) = timeout(PATIENCE, pair).await.expect("joined in time").unwrap();
    talk(client, server).await
}

/// Sends a byte from `client` to `server`.
async fn talk(mut client: TcpStream, mut server: TcpStream) -> (TcpStream, TcpStream) {
    let mut byte = [0];
    client.write_all(b"?").await.unwrap();
    timeout(PATIENCE, server.read_exact(&mut byte)).await.unwrap().unwrap();
    (client, server)
}

async fn read_to_end(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("the connection ends")?;
    Ok(bytes)
}

/// Ends a connection by RST.
fn reset(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

/// Waits until the metrics contain `line`.
async fn shows(relay: &Relay, line: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !relay.metrics().encode().contains(&format!("{line}\n")) {
        assert!(Instant::now() < deadline, "{line} is not in\n{}", relay.metrics().encode());
        sleep(Duration::from_millis(5)).await;
    }
}
