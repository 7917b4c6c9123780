//! Bad input and missing privilege: one clear line, exit code 2, nothing changed.

use std::os::unix::fs::PermissionsExt as _;

use crate::net::{BRAID, Net};

/// Arguments, and what the one line has to say.
const REFUSED: &[(&str, &str)] = &[
    ("nonsense", "unrecognized subcommand 'nonsense'"),
    ("show --nonsense", "unexpected argument '--nonsense'"),
    ("run --nonsense true", "unexpected argument '--nonsense'"),
    ("run --port 0 true", "'0' for '--port <PORT>': 0 is not in 1..=65535"),
    ("run --service nginx curl", "cannot be used with"),
    ("show --token xyz", "'xyz' for '--token <HEX>'"),
    ("show --peer 10.0.0", "'10.0.0' for '--peer <ADDRESS>'"),
    ("show --port 65536", "'65536' for '--port <PORT>'"),
    ("show --pid 4194305", "network namespace pid 4194305 (/proc/4194305/ns/net): No such file or directory"),
    ("show -n no-such-namespace", "/run/netns/no-such-namespace"),
    ("show -n x --pid 1", "cannot be used with"),
    ("show --watch 0", "'0' for '--watch [<SECONDS>]': expected seconds above zero"),
    ("monitor -n /dev/null", "/dev/null"),
    ("monitor --token xyz", "'xyz' for '--token <HEX>'"),
    (
        "monitor --type CLOSED,nonsense",
        "'nonsense' for '--type <TYPE,…>': no such event; there are CREATED, ",
    ),
    ("monitor -t --tshort", "cannot be used with"),
    ("help endpoint nonsense", "no help on 'endpoint nonsense': it is no command and none of paths, "),
    ("endpoint -n no-such-namespace", "/run/netns/no-such-namespace"),
    ("endpoint add 10.0.0.1 dev nosuch", "dev nosuch: No such device"),
    ("endpoint add 10.0.0.300", "'10.0.0.300'"),
    ("endpoint show id 7", "(kernel: address not found)"),
    ("limits set subflows 9", "(kernel: limit greater than maximum (8))"),
    ("limits set subflows 99999999999", "subflows: 99999999999 is too large"),
    ("subflow create --token xyz local 10.0.0.1", "'xyz' for '--token <HEX>'"),
    ("subflow create local 10.0.0.1", "--token <HEX>"),
    ("subflow create --token 1", "<WORD>"),
    ("subflow create --token 1 10.0.0.1", "'10.0.0.1' is neither local nor remote"),
    ("subflow create --token 1 local 10.0.0.300", "local: an address is needed"),
    ("subflow create --token 1 local 10.0.0.1 id 2 local 10.0.0.2", "local: stands there twice"),
    ("subflow create --token 1 local 10.0.0.1 id 2 remote 10.0.0.2", "remote: a port is needed"),
    ("subflow create --token 1 remote 10.0.0.2 port 80", "local: an address is needed"),
    ("subflow create --token 1 local 10.0.0.1 id 2 remote port 80", "remote: an address is needed"),
    (
        "subflow create --token 1 local 10.0.0.1 id 2 remote 10.0.0.2 port 80 signal",
        "only backup has a meaning",
    ),
    (
        "subflow create --token 1 local 10.0.0.1 id 2 dev nosuch remote 10.0.0.2 port 80",
        "dev nosuch: No such",
    ),
    (
        "subflow create --token 1 local 10.0.0.1 id 2 remote 10.0.0.2 port 80",
        "token 00000001: there is no such",
    ),
    ("subflow destroy --token 1 local 10.0.0.1", "token 00000001: there is no such connection"),
    ("subflow backup --token 1 local 10.0.0.1 dev lo", "found by address, id and port"),
    ("subflow nobackup --token 1 remote 10.0.0.1 id 256", "id: 256 is too large"),
    ("address announce --token 1 10.0.0.1", "an id from 1 to 255 is needed"),
    ("address announce --token 1 10.0.0.1 id 0", "an id from 1 to 255 is needed"),
    ("address announce --token 1 id 3", "an address is needed"),
    ("address announce --token 1 10.0.0.1 id 3 backup", "takes no flags"),
    ("address announce --token 1 10.0.0.1 id 3", "token 00000001: there is no such connection"),
    ("address remove --token 1 10.0.0.1", "an id is needed"),
    ("address remove --token 1 id 3 10.0.0.1", "takes only id ID"),
    ("address remove --token 1 id 3 -n no-such-namespace", "/run/netns/no-such-namespace"),
    ("listen 10.0.0.1", "'10.0.0.1' for '<ADDRESS:PORT>': expected an address and a port: 192.0.2.1:80"),
    ("listen ::1:80", "'::1:80' for '<ADDRESS:PORT>': expected an address and a port"),
    (
        "lb agent --address 10.0.0.1 --interface lo --join-port 0",
        "'--join-port <PORT>': 0 is not in 1..=65535",
    ),
    ("proxy", "--listen URL is missing (or --mode, --port and --remote; or --config FILE)"),
    ("proxy --listen tcp://:80", "--to URL is missing (or --transparent)"),
    ("listen 192.0.2.9:80", "listen on 192.0.2.9:80: Cannot assign requested address"),
    ("stats --watch 0", "expected seconds above zero"),
    ("stats --watch soon", "expected seconds above zero"),
    ("stats -n no-such-namespace", "/run/netns/no-such-namespace"),
    ("echo client --addr 10.0.0.1:0", "port '0' is not a number from 1 to 65535"),
    ("echo client --addr 10.0.0.1", "expected HOST:PORT"),
    ("echo client --addr ::1:80", "an IPv6 address needs brackets"),
    ("echo client --addr 10.0.0.1:80", "connect to 10.0.0.1:80: Connection refused"),
    ("echo client --addr no.such.invalid:80", "resolve no.such.invalid:80"),
    ("echo client --timeout 5", "\"5\" is not a time (5s, 500ms, 1h 30m)"),
    ("echo client --timeout 0s", "\"0s\" is not above zero"),
    ("echo server --addr 192.0.2.9:80", "listen on 192.0.2.9:80: Cannot assign requested address"),
    ("echo server --addr no.such.invalid:80", "resolve no.such.invalid"),
    ("completion tcsh", "'tcsh'"),
    ("man /proc/nonsense", "write man pages into /proc/nonsense"),
];

#[test]
fn bad_input_gets_one_line_and_exit_code_2() {
    let net = Net::new();
    for (arguments, wanted) in REFUSED {
        let output = net.output(&format!("braid {arguments}"));
        refused(arguments, &output, wanted);
    }
    assert_eq!(net.ok("ip mptcp endpoint"), "");
}

#[test]
fn a_busy_port_is_named() {
    let net = Net::new();
    let _server = net.echo_server(":80");
    let output = net.output("braid echo server --addr 10.0.0.1:80");
    refused("echo server", &output, "listen on 10.0.0.1:80: Address already in use");
}

#[test]
fn a_bad_log_filter_is_named() {
    let net = Net::new();
    let output = net.command("braid limits").env("BRAID_LOG", "a=b=c").output().unwrap();
    refused("BRAID_LOG", &output, "BRAID_LOG: ");
}

#[test]
fn a_check_of_the_balancers_file_reads_the_secret_that_it_names() {
    let net = Net::new();
    let dir = tempfile::tempdir().unwrap();
    let [file, secret] = ["lb.toml", "secret"].map(|name| dir.path().join(name));
    let text = format!(
        "interfaces = [\"eth0\"]\n[agents]\nsecret = {secret:?}\n[[service]]\nname = \"web\"\naddresses = \
         [\"10.83.0.1\"]\nport = 80\n[[service.backend]]\nname = \"app-1\"\naddress = \"10.90.0.11\"\n"
    );
    std::fs::write(&file, text).unwrap();
    let line = format!("braid lb --check --config {}", file.display());
    let named = |what: &str| format!("{}{what}", secret.display());
    refused("lb --check", &net.output(&line), &named(": No such file"));
    for (secret_text, mode, wanted) in
        [("too short", 0o600, ": the secret has 9 bytes"), ("a secret of enough bytes", 0o604, ": everybody")]
    {
        std::fs::write(&secret, secret_text).unwrap();
        std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(mode)).unwrap();
        refused("lb --check", &net.output(&line), &named(wanted));
    }
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(net.ok(&line), "");
}

#[test]
fn a_missing_capability_is_named() {
    let net = Net::new();
    for arguments in ["endpoint add 10.0.0.1", "endpoint flush", "limits set subflows 1", "monitor"] {
        let output = net.output(&format!("setpriv --bounding-set -net_admin {BRAID} {arguments}"));
        refused(arguments, &output, "needs CAP_NET_ADMIN");
    }
    let elsewhere = Net::new().echo_server(":80");
    let line = format!("setpriv --bounding-set -sys_admin {BRAID} limits --pid {}", elsewhere.pid());
    refused("limits --pid", &net.output(&line), "needs CAP_SYS_ADMIN");
    let line = line.replace("-sys_admin", "-sys_ptrace");
    refused("limits --pid", &net.output(&line), "needs CAP_SYS_PTRACE");
    // Looking needs none.
    for arguments in ["endpoint", "limits", "show"] {
        net.ok(&format!("setpriv --bounding-set -net_admin {BRAID} {arguments}"));
    }
}

#[test]
fn mptcp_that_is_off_or_has_another_path_manager_is_told_and_nothing_set() {
    let net = Net::new();
    mptcp::sysctl::set(&net.0, "net.mptcp.enabled", "0").unwrap();
    let setting = ["endpoint add 10.0.0.1", "endpoint change id 1 backup", "limits set subflows 1"];
    for arguments in ["show", "show --json", "monitor"].iter().chain(&setting) {
        refused(arguments, &net.output(&format!("braid {arguments}")), "(net.mptcp.enabled=0)");
    }
    mptcp::sysctl::set(&net.0, "net.mptcp.enabled", "1").unwrap();
    mptcp::sysctl::set(&net.0, "net.mptcp.pm_type", "1").unwrap();
    for arguments in setting {
        refused(arguments, &net.output(&format!("braid {arguments}")), "(net.mptcp.pm_type=1)");
    }
    assert_eq!(net.ok("braid endpoint"), "");
    net.ok("braid endpoint flush");
}

#[test]
fn a_kernel_without_mptcp_is_told() {
    let net = Net::new();
    for arguments in ["show", "monitor"] {
        // Such a kernel has no such directory.
        let script = format!("mount -t tmpfs none /proc/sys/net/mptcp && exec {BRAID} {arguments}");
        let output = net.command("unshare --mount sh -c").arg(script).output().unwrap();
        refused(arguments, &output, "this kernel has no MPTCP (CONFIG_MPTCP");
    }
}

pub fn refused(arguments: &str, output: &std::process::Output, wanted: &str) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments}: {error}");
    assert!(error.starts_with("braid: ") && error.contains(wanted), "{arguments}: {error}");
    assert_eq!(error.lines().count(), 1, "{arguments}: {error}");
    assert_eq!(error.matches(wanted).count(), 1, "{arguments}: {error}");
    assert_eq!(output.stdout, b"", "{arguments}");
}
