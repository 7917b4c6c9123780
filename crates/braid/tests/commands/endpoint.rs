//! `braid endpoint` and `braid limits` beside `ip mptcp`, in twin namespaces.

use crate::net::Net;

/// Commands as both programs take them, good and bad, one after the other in the same namespace.
const INVOCATIONS: &[&str] = &[
    "limits",
    "limits show",
    "limits sh",
    "limits set subflows 2 add_addr_accepted 3",
    "limits set add_addr_accepted 1",
    "limits s sub 0x4",
    "limits set subflows 9",
    "limits set add_addr_accepted 9",
    "limits set subflows",
    "limits set subflows x",
    "limits set nonsense 1",
    "endpoint",
    "endpoint show",
    "endpoint add 10.0.0.1 dev lo",
    "endpoint add 10.0.0.2 subflow",
    "endpoint add subflow backup 10.0.0.3",
    "endpoint a id 9 10.0.0.4 signal",
    "endpoint add 10.0.0.5 fullmesh subflow backup dev lo",
    "endpoint add fd00::1 signal port 8080",
    "endpoint add fd00::2 i 0x20 d lo signal p 0x50",
    "endpoint add 2001:db8:0:0:1:0:0:1 subflow id 200",
    "endpoint add ::ffff:10.0.0.6 subflow",
    "endpoint show",
    "endpoint sh",
    "endpoint show id 9",
    "endpoint show id 32",
    "endpoint show id 77",
    "endpoint show id 0",
    "endpoint show id 256",
    "endpoint add 10.0.0.1",
    "endpoint add 10.0.0.7 id 9",
    "endpoint add",
    "endpoint add id 3",
    "endpoint add nonsense",
    "endpoint add 10.0.0.256",
    "endpoint add 10.0.0.7 id 0",
    "endpoint add 10.0.0.7 id 256",
    "endpoint add 10.0.0.7 id -1",
    "endpoint add 10.0.0.7 id",
    "endpoint add 10.0.0.7 dev nosuch",
    "endpoint add 10.0.0.7 dev",
    "endpoint add 10.0.0.7 port 80",
    "endpoint add 10.0.0.7 port 65536 signal",
    "endpoint add 10.0.0.7 signal fullmesh",
    "endpoint add 10.0.0.7 implicit",
    "endpoint add 10.0.0.7 sig",
    "endpoint change id 2 backup",
    "endpoint change id 5 nobackup",
    "endpoint change 10.0.0.3 nobackup fullmesh",
    "endpoint change 10.0.0.2 nobackup",
    "endpoint change fd00::1 port 8080 backup",
    "endpoint change fd00::1 backup",
    "endpoint change id 1 10.0.0.5 fullmesh",
    "endpoint ch id 77 backup",
    "endpoint change id 9 port 3 backup",
    "endpoint change id 9 signal",
    "endpoint change id 0 backup",
    "endpoint change 10.9.9.9 backup",
    "endpoint change backup",
    "endpoint delete id 2",
    "endpoint del id 77",
    "endpoint delete",
    "endpoint delete id 0",
    "endpoint delete id 9 10.0.0.4",
    "endpoint delete 10.0.0.4",
    "endpoint delete id 0 10.0.0.1",
    "endpoint d id 9",
    "endpoint nonsense",
    "endpoint fl",
    "endpoint flush",
    "endpoint show",
];

#[test]
fn braid_and_iproute2_do_and_print_the_same() {
    let (iproute2, braid) = (Net::new(), Net::new());
    let version = iproute2.ok("ip -V");
    for line in INVOCATIONS {
        let theirs = iproute2.output(&format!("ip mptcp {line}"));
        let ours = braid.output(&format!("braid {line}"));
        assert_eq!(ours.status.success(), theirs.status.success(), "{line} ({version}): {ours:?} {theirs:?}");
        assert_eq!(text(&ours.stdout), text(&theirs.stdout), "{line} ({version})");
        if !ours.status.success() {
            assert_eq!(ours.status.code(), Some(2), "{line} ({version})");
            let error = text(&ours.stderr);
            assert!(error.starts_with("braid: ") && error.lines().count() == 1, "{line}: {error}");
        }
        // The kernel's state, as the one program and the other see it, in text and JSON.
        for show in ["mptcp endpoint", "mptcp limits", "-j mptcp endpoint"] {
            assert_eq!(
                braid.ok(&format!("ip {show}")),
                iproute2.ok(&format!("ip {show}")),
                "{line} ({version})"
            );
        }
        assert_eq!(braid.ok("braid endpoint"), iproute2.ok("ip mptcp endpoint"), "{line} ({version})");
        assert_eq!(
            braid.ok("braid endpoint --json"),
            iproute2.ok("ip -j mptcp endpoint"),
            "{line} ({version})"
        );
        assert_eq!(braid.ok("braid limits"), iproute2.ok("ip mptcp limits"), "{line} ({version})");
    }
}

#[test]
fn limits_are_printed_as_json() {
    let net = Net::new();
    net.ok("braid limits set subflows 3 add_addr_accepted 1");
    assert_eq!(net.ok("braid limits --json"), "[{\"add_addr_accepted\":1,\"subflows\":3}]\n");
}

/// Older iproute2 knows the flag only by its number.
#[test]
fn a_laminar_endpoint_is_laminar_in_the_kernel() {
    let net = Net::new();
    let added = net.output("braid endpoint add 10.0.0.1 laminar backup");
    if text(&added.stderr).contains("this kernel lacks") {
        assert_eq!(net.ok("ip mptcp endpoint"), "");
        return;
    }
    assert_eq!(net.ok("braid endpoint"), "10.0.0.1 id 1 laminar backup \n");
    let theirs = net.ok("ip mptcp endpoint");
    let known = ["10.0.0.1 id 1 laminar backup \n", "10.0.0.1 id 1 backup rawflags 20 \n"];
    assert!(known.contains(&theirs.as_str()), "{theirs}");
}

#[test]
fn an_endpoint_is_added_in_the_namespace_of_a_process() {
    let (here, there) = (Net::new(), Net::new());
    let process = there.echo_server(":80");
    here.ok(&format!("braid endpoint add 10.0.0.1 dev lo subflow --pid {}", process.pid()));
    assert_eq!(here.ok("ip mptcp endpoint"), "");
    assert_eq!(there.ok("ip mptcp endpoint"), "10.0.0.1 id 1 subflow dev lo \n");
    let path = format!("/proc/{}/ns/net", process.pid());
    assert_eq!(here.ok(&format!("braid endpoint -n {path}")), "10.0.0.1 id 1 subflow dev lo \n");
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
