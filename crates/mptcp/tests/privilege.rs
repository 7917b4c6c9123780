//! What a process without capabilities may do, and how it is told what it lacks.

mod net;

use std::process::Command;

use mptcp::pm::{Client, Endpoint, EndpointFlags, Events, Limits};
use mptcp::socket::{self, Options};
use mptcp::{Netns, diag, sysctl};

/// Runs the test below again in a namespace, without the capabilities that it looks for.
#[test]
fn a_missing_capability_is_named() {
    let mut command = Command::new("setpriv");
    command
        .arg("--bounding-set=-net_admin,-net_raw,-sys_admin,-net_bind_service")
        .arg(std::env::current_exe().unwrap());
    command.args(["--exact", "without_capabilities", "--ignored"]);
    net::host().enter_on_exec(&mut command);
    let output = command.output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && stdout.contains("1 passed"),
        "{stdout}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test]
#[ignore = "run by a_missing_capability_is_named"]
async fn without_capabilities() {
    let here = Netns::current().unwrap();
    let pm = Client::connect(&here).await.unwrap();
    assert_eq!(pm.endpoints().await.unwrap(), []);
    pm.limits().await.unwrap();

    let listener = socket::listen("127.0.0.1:0".parse().unwrap(), &Options::default()).unwrap();
    let client = socket::connect(listener.local_addr().unwrap(), &Options::default()).await.unwrap();
    let seen = diag::connections(&here).await.unwrap();
    let ours = seen.iter().find(|c| c.local == client.local_addr().unwrap()).unwrap();
    assert_eq!(ours.owners[0].pid, std::process::id());

    let endpoint = Endpoint::new("10.0.0.2".parse().unwrap(), EndpointFlags::SUBFLOW);
    let marked = Options { mark: Some(1), ..Options::default() };
    let errors = [
        pm.add_endpoint(&endpoint).await.unwrap_err(),
        pm.set_limits(Limits::default()).await.unwrap_err(),
        Events::subscribe(&here).unwrap_err(),
        socket::listen("127.0.0.1:0".parse().unwrap(), &marked).unwrap_err(),
        socket::listen("127.0.0.1:80".parse().unwrap(), &Options::default()).unwrap_err(),
        Netns::anonymous().unwrap_err(),
    ];
    let expected = [
        "add endpoint 10.0.0.2: needs CAP_NET_ADMIN (",
        "set limits add_addr_accepted 0 subflows 0: needs CAP_NET_ADMIN (",
        "subscribe to the events of network namespace current: needs CAP_NET_ADMIN (",
        "listen on 127.0.0.1:0: needs CAP_NET_ADMIN (",
        "listen on 127.0.0.1:80: needs CAP_NET_BIND_SERVICE (",
        "create a network namespace: needs CAP_SYS_ADMIN (",
    ];
    for (error, expected) in errors.iter().zip(expected) {
        assert!(error.to_string().starts_with(expected), "{error}");
    }
    assert_eq!(sysctl::get(&here, "net.mptcp.enabled").unwrap(), "1");
}
