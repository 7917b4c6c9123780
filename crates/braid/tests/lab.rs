//! `braid lab` as people use it: every scenario, scenarios that must fail, and every way out.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A user of labs, who sees no labs of others.
struct User {
    home: tempfile::TempDir,
}

impl User {
    fn new() -> Self {
        User { home: tempfile::tempdir().unwrap() }
    }

    fn lab(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_braid"));
        command
            .arg("lab")
            .args(arguments)
            .env("BRAID_LABS", self.home.path())
            .env("BRAID_SCENARIOS", scenarios())
            .env("BRAID_LOG", "warn")
            .stdin(Stdio::null());
        command
    }

    /// Exit code, standard output and standard error.
    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        outcome(&self.lab(arguments).output().unwrap())
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.home.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    /// The directories of labs.
    fn labs(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.home.path()).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.is_dir()).collect()
    }
}

fn outcome(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

fn scenarios() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios")
}

fn text_of(scenario: &str) -> String {
    fs::read_to_string(scenarios().join(format!("{scenario}.toml"))).unwrap()
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn namespaces_with(part: &str) -> Vec<String> {
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.contains(part)).collect()
}

/// Living processes with `word` among their arguments.
fn processes_with(word: &str) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        // Empty for a process that has ended and that its parent has not looked at yet.
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|argument| argument == word.as_bytes())
    })
    .collect()
}

fn passes(scenario: &str) {
    let (code, stdout, stderr) = User::new().run(&["run", scenario]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(stdout.contains(&format!("{scenario}: pass")), "{stdout}");
}

#[test]
fn simple_passes() {
    passes("simple");
}

#[test]
fn routing_passes() {
    passes("routing");
}

#[test]
fn routing2_passes() {
    passes("routing2");
}

#[test]
fn playground_passes() {
    passes("playground");
}

#[test]
fn playground_fullmesh_passes() {
    passes("playground:fullmesh");
}

#[test]
fn handover_passes() {
    passes("handover");
}

#[test]
fn handover_blackhole_passes() {
    passes("handover:blackhole");
}

#[test]
fn sevpn_passes() {
    if can_make_tunnels("sevpn_passes") {
        passes("sevpn");
    }
}

#[test]
fn sevpn_path_loss_passes() {
    if can_make_tunnels("sevpn_path_loss_passes") {
        passes("sevpn:path-loss");
    }
}

#[test]
fn sevpn_run_passes() {
    if can_make_tunnels("sevpn_run_passes") {
        passes("sevpn:run");
    }
}

#[test]
fn openvpn_passes() {
    if can_make_tunnels("openvpn_passes") {
        passes("openvpn");
    }
}

#[test]
fn without_braid_run_at_its_client_openvpn_fails() {
    if can_make_tunnels("without_braid_run_at_its_client_openvpn_fails") {
        let client = r#""openvpn", "--dev", "tun0", "--proto", "tcp-client""#;
        let text = with("openvpn", &format!(r#""braid", "run", "--require", {client}"#), client);
        let text = text.replace(
            "SF_ESTABLISHED = 1 }\n\n# A line",
            "SF_ESTABLISHED = 1 }\ntimeout = \"2s\"\n\n# A line",
        );
        fails(
            &text,
            &["joined", "one-connection", "subflows", "both-carried", "on-lte-alone", "again-on-wifi"],
        );
    }
}

#[test]
fn without_the_servers_endpoint_sevpn_fails() {
    if can_make_tunnels("without_the_servers_endpoint_sevpn_fails") {
        let text = with("sevpn", "\nendpoints = [", "\n#").replace(
            "SF_ESTABLISHED = 2 }\n\n[steps.ping",
            "SF_ESTABLISHED = 2 }\ntimeout = \"2s\"\n\n[steps.ping",
        );
        fails(&text, &["both-connections", "published", "subflows"]);
    }
}

#[test]
fn handover_lb_solved_by_hand_passes() {
    passes("handover-lb:solved");
}

#[test]
fn handover_lb_with_braid_lb_passes_by_port_and_by_token() {
    if can_load_bpf("handover_lb_with_braid_lb_passes_by_port_and_by_token") {
        passes("handover-lb:braid-ports");
        passes("handover-lb:braid-token");
    }
}

#[test]
fn handover_lb_as_published_fails_with_every_fault_named() {
    let (code, stdout, stderr) = User::new().run(&["run", "--json", "handover-lb:broken"]);
    assert_eq!(code, 1, "{stdout}{stderr}");
    let verdict: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    let rows = verdict["rows"].as_array().unwrap();
    let failed: Vec<_> =
        rows.iter().filter(|row| row["pass"] == false).map(|row| row["name"].as_str().unwrap()).collect();
    for fault in [
        "first-flow",
        "added-flows",
        "both-apps",
        "LB-takes-answers",
        "client-limits",
        "client-endpoints",
        "app-1-announces",
        "app-2-announces",
        "app-1-first-port",
        "app-2-first-port",
        "app-1-ARP-care-50-points",
        "app-2-ARP-care-50-points",
    ] {
        assert!(failed.contains(&fault), "{fault} is not named: {stdout}");
    }
}

#[test]
fn handover_lb_without_a_way_for_answers_fails() {
    let text = with("handover-lb", "nodes.LB.sysctls.\"net.ipv4.conf.all.accept_local\" = 1", "")
        .replace("time = \"20s\"", "time = \"2s\"");
    let user = User::new();
    let file = user.file("handover-lb.toml", &text);
    let (code, stdout, stderr) = user.run(&["run", "--json", &format!("{file}:solved")]);
    assert_eq!(code, 1, "{stdout}{stderr}");
    assert!(stdout.contains("LB owns 10.0.83.1, accept_local: all 0, br0 0"), "{stdout}");
}

#[test]
fn primary_switch_passes() {
    if can_make_tunnels("primary_switch_passes") && can_capture("primary_switch_passes") {
        passes("primary-switch");
    }
}

#[test]
fn primary_switch_fast_passes() {
    if can_make_tunnels("primary_switch_fast_passes") && can_capture("primary_switch_fast_passes") {
        passes("primary-switch:fast");
    }
}

#[test]
fn without_the_switch_primary_switch_fails() {
    let test = "without_the_switch_primary_switch_fails";
    if can_make_tunnels(test) && can_capture(test) {
        // The command "switches" to where the connection is already.
        let text = with(
            "primary-switch",
            r#"192.168.200.2", "--via", "192.168.200.0/24"]"#,
            r#"192.168.200.2", "--via", "192.168.100.0/24"]"#,
        );
        fails(&text, &["switch", "after", "switch-back"]);
    }
}

#[test]
fn a_switch_of_all_clients_moves_the_other_one_too_and_primary_switch_fails() {
    let test = "a_switch_of_all_clients_moves_the_other_one_too_and_primary_switch_fails";
    if can_make_tunnels(test) && can_capture(test) {
        let text = with(
            "primary-switch",
            r#""--peer", "192.168.200.2", "--via", "192.168.200.0/24"]"#,
            r#""--via", "192.168.200.0/24"]"#,
        );
        fails(&text, &["other-stays"]);
    }
}

/// Only root of the machine loads BPF programs.
fn can_load_bpf(test: &str) -> bool {
    is_root_of_the_machine(test, "only root of the machine loads BPF programs")
}

/// tcpdump changes its user, and a user namespace may have only one.
fn can_capture(test: &str) -> bool {
    is_root_of_the_machine(test, "tcpdump changes its user, and this user namespace has only one")
}

/// Is this root of the machine, and not of a user namespace?
fn is_root_of_the_machine(test: &str, reason: &str) -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap();
    let is = nix::unistd::geteuid().is_root() && map.split_whitespace().eq(["0", "0", "4294967295"]);
    if !is {
        std::io::stderr().write_all(format!("skipped {test}: {reason}\n").as_bytes()).unwrap();
    }
    is
}

/// May this process open the TUN/TAP device? On most systems everybody may.
fn can_make_tunnels(test: &str) -> bool {
    let opened = fs::File::options().read(true).write(true).open("/dev/net/tun");
    if let Err(error) = &opened {
        // Past the test harness, which keeps what a passing test prints.
        std::io::stderr()
            .write_all(format!("skipped {test}: open /dev/net/tun: {error}\n").as_bytes())
            .unwrap();
    }
    opened.is_ok()
}

/// Runs `text` as a scenario: it must fail, and exactly in the rows `failing`.
fn fails(text: &str, failing: &[&str]) {
    let user = User::new();
    let file = user.file("broken.toml", text);
    let (code, stdout, stderr) = user.run(&["run", "--json", &file]);
    assert_eq!(code, 1, "{stdout}{stderr}");
    let verdict: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    let rows = verdict["rows"].as_array().unwrap();
    let failed: Vec<_> =
        rows.iter().filter(|row| row["pass"] == false).map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(failed, failing, "{stdout}");
    assert_eq!(user.labs(), Vec::<PathBuf>::new());
}

/// The scenario with `from` replaced by `to`, which must be in it.
fn with(scenario: &str, from: &str, to: &str) -> String {
    let text = text_of(scenario);
    assert!(text.contains(from), "{scenario} has no {from}");
    text.replace(from, to)
}

/// The scenario, with `link` down from the first step on.
fn cut(text: &str, link: &str) -> String {
    let step = format!("[steps.cut.link]\nlink = \"{link}\"\nstate = \"down\"\n\n[steps.");
    text.replacen("[steps.", &step, 1)
}

const PROXIED: &[&str] = &["published", "published-upload", "subflows", "upload-spread", "download-spread"];

#[test]
fn without_the_servers_endpoint_simple_fails() {
    fails(&with("simple", "endpoints = [", "#"), PROXIED);
}

#[test]
fn without_the_second_link_simple_fails() {
    fails(&cut(&text_of("simple"), "second"), PROXIED);
}

#[test]
fn without_the_servers_endpoint_routing_fails() {
    fails(
        &with("routing", "endpoints = [", "#"),
        &["published", "published-upload", "subflows", "upload-spread"],
    );
}

#[test]
fn without_the_access_link_routing_fails() {
    fails(
        &cut(&text_of("routing"), "access"),
        &["upload", "published", "published-upload", "subflows", "upload-spread", "checksum"],
    );
}

#[test]
fn without_the_clients_endpoint_routing2_fails() {
    fails(&with("routing2", "endpoints = [", "#"), PROXIED);
}

#[test]
fn without_the_second_link_routing2_fails() {
    fails(&cut(&text_of("routing2"), "second"), PROXIED);
}

#[test]
fn without_the_servers_second_endpoint_playground_fails() {
    let text = with("playground", r#"{ ip = "192.168.0.1", dev = "eth1", flags = ["signal"] },"#, "");
    let text = text.replace("[steps.joined.wait]", "[steps.joined.wait]\ntimeout = \"2s\"");
    fails(&text, &["joined", "events", "subflows"]);
}

#[test]
fn without_one_link_playground_fails() {
    let text = cut(&text_of("playground"), "wireless");
    let text = text.replace("[steps.joined.wait]", "[steps.joined.wait]\ntimeout = \"2s\"");
    fails(&text, &["joined", "events", "subflows"]);
}

#[test]
fn without_the_servers_endpoint_handover_fails() {
    let text = with("handover", "endpoints = [", "#")
        .replace("bytes = \"8MiB\"", "bytes = \"8MiB\"\ntimeout = \"2s\"");
    fails(&text, &["on-lte", "nothing-lost", "both-carried", "on-lte-alone", "again-on-wifi", "subflows"]);
}

#[test]
fn a_byte_that_differs_is_seen() {
    let text = with(
        "handover",
        "[steps.done.wait]",
        "[steps.flip.run]\nnode = \"phone\"\ncommand = [\"dd\", \"if=/dev/zero\", \"of=sent\", \"bs=1\", \"count=32\", \"seek=1000\", \"conv=notrunc\"]\n[steps.done.wait]",
    );
    fails(&text, &["nothing-lost"]);
}

#[test]
fn a_process_that_ends_by_itself_fails_the_run() {
    let text = format!(
        "{LONG}\n[processes.short]\nnode = \"only\"\ncommand = [\"sh\", \"-c\", \"sleep 0.5; echo no more of this; exit 3\"]\n"
    );
    let user = User::new();
    let file = user.file("short.toml", &text.replace("MARK", "8"));
    let (code, stdout, _) = user.run(&["run", &file]);
    assert_eq!(code, 1, "{stdout}");
    assert!(stdout.contains("keep short running: exit code 3: no more of this"), "{stdout}");
}

/// A node with a program and, in a session of its own, a child of it; a step that takes its time.
const LONG: &str = r#"
title = "takes long"
[nodes.only]
[steps.long.run]
node = "only"
command = ["sh", "-c", "setsid sleep MARK1 & echo started; sleep MARK2"]
"#;

/// Starts a scenario that takes long, ends it by `end`, and looks for what is left.
fn leaves_nothing(mark: u32, signal: Signal, code: Option<i32>) {
    let user = User::new();
    let file = user.file(&format!("long{mark}.toml"), &LONG.replace("MARK", &mark.to_string()));
    let mut braid = user.lab(&["run", &file]).stderr(Stdio::piped()).spawn().unwrap();
    let marks = [format!("{mark}1"), format!("{mark}2")];
    until("the step's programs run", || marks.iter().all(|mark| !processes_with(mark).is_empty()));
    let lab = format!("long{mark}-");
    assert_eq!(namespaces_with(&lab).len(), 1);

    kill(Pid::from_raw(braid.id() as i32), signal).unwrap();
    let status = braid.wait().unwrap();
    assert_eq!(status.code(), code);
    // After SIGKILL the janitor works on alone.
    until("the directory is gone", || user.labs().is_empty());
    assert_eq!(namespaces_with(&lab), Vec::<String>::new());
    assert_eq!(marks.map(|mark| processes_with(&mark)), [Vec::<u32>::new(), Vec::new()]);
}

#[test]
fn an_interrupt_leaves_nothing_behind() {
    leaves_nothing(47_110, Signal::SIGINT, Some(2));
}

#[test]
fn sigterm_leaves_nothing_behind() {
    leaves_nothing(47_120, Signal::SIGTERM, Some(2));
}

#[test]
fn a_kill_leaves_nothing_behind() {
    leaves_nothing(47_130, Signal::SIGKILL, None);
}

#[test]
fn a_failing_step_leaves_nothing_behind() {
    let text = LONG.replace("MARK", "47140").replace("sleep 471402", "exit 7");
    let user = User::new();
    let file = user.file("long47140.toml", &text);
    let (code, stdout, stderr) = user.run(&["run", &file]);
    assert_eq!(code, 1, "{stdout}{stderr}");
    assert!(stdout.contains("exit code 7: started"), "{stdout}");
    assert_eq!(user.labs(), Vec::<PathBuf>::new());
    assert_eq!(namespaces_with("long47140-"), Vec::<String>::new());
    assert_eq!(processes_with("471401"), Vec::<u32>::new());
}

#[test]
fn a_network_that_cannot_be_built_leaves_nothing_behind() {
    let text =
        LONG.replace("[nodes.only]", "[nodes.only]\nroutes = [{ to = \"10.0.0.0/8\", via = \"10.1.1.1\" }]");
    let user = User::new();
    let file = user.file("long47150.toml", &text);
    let (code, _, stderr) = user.run(&["run", &file]);
    assert_eq!(code, 2);
    let last = stderr.lines().last().unwrap();
    assert!(last.contains("ip route replace to 10.0.0.0/8 via 10.1.1.1"), "{last}");
    assert_eq!(user.labs(), Vec::<PathBuf>::new());
    assert_eq!(namespaces_with("long47150-"), Vec::<String>::new());
}

#[test]
fn a_report_and_a_graph_are_written() {
    let user = User::new();
    let directory = user.home.path().join("report");
    let (code, stdout, stderr) =
        user.run(&["run", "playground:fullmesh", "--report", &directory.display().to_string()]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    let picture = directory.join("playground-fullmesh.svg");
    assert!(stdout.contains(&format!("report: {}", picture.display())), "{stdout}");
    assert!(fs::read_to_string(&picture).unwrap().starts_with("<svg"));
    let events = fs::read(directory.join("playground-fullmesh.events.json")).unwrap();
    let events: serde_json::Value = serde_json::from_slice(&events).unwrap();
    let of_client =
        |event: &&serde_json::Value| event["node"] == "client" && event["event"] == "SF_ESTABLISHED";
    assert_eq!(events["events"].as_array().unwrap().iter().filter(of_client).count(), 3);

    let (code, svg, _) = user.run(&["graph", "routing"]);
    assert_eq!(code, 0);
    assert!(svg.contains("10.123.202.3") && svg.trim_end().ends_with("</svg>"));
    let file = user.home.path().join("routing.svg").display().to_string();
    assert_eq!(user.run(&["graph", "routing", "--output", &file]).0, 0);
    assert_eq!(fs::read_to_string(file).unwrap(), svg);
}

#[test]
fn two_labs_run_side_by_side() {
    let user = User::new();
    let start =
        || user.lab(&["run", "simple"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let both: [Child; 2] = [start(), start()];
    for braid in both {
        let (code, stdout, stderr) = outcome(&braid.wait_with_output().unwrap());
        assert_eq!(code, 0, "{stdout}{stderr}");
    }
}

#[test]
fn a_lab_that_is_up_is_found_entered_checked_and_taken_down() {
    let user = User::new();
    let (code, stdout, stderr) = user.run(&["up", "playground", "--name", "t4711"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert_eq!(stdout, "lab t4711 is up: client (t4711-client), server (t4711-server)\n");
    let (_, stdout, _) = user.run(&["list"]);
    assert!(stdout.contains("up: t4711 (playground, pid "), "{stdout}");

    let (code, stdout, _) =
        user.run(&["exec", "client", "ip", "-brief", "-4", "address", "show", "dev", "eth1"]);
    assert_eq!(code, 0);
    assert!(stdout.contains("192.168.0.2/24"), "{stdout}");
    let (code, ..) = user.run(&["exec", "client", "sh", "-c", "exit 42"]);
    assert_eq!(code, 42);
    let (code, stdout, _) = user.run(&["exec", "server", "sh", "-c", "command -v braid client server"]);
    assert_eq!(code, 0, "{stdout}");
    let (code, _, stderr) = user.run(&["exec", "router", "true"]);
    assert_eq!((code, stderr.as_str()), (2, "braid: no node named router (there is: client, server)\n"));

    // As often as one likes, also by the scenario's name.
    for check in [&["check"][..], &["check", "playground"], &["check", "t4711"]] {
        let (code, stdout, stderr) = user.run(check);
        assert_eq!(code, 0, "{stdout}{stderr}");
        assert!(stdout.contains("playground: pass"), "{stdout}");
    }
    // What somebody has broken by hand is seen.
    let (code, ..) = user.run(&["exec", "server", "ip", "mptcp", "endpoint", "flush"]);
    assert_eq!(code, 0);
    // It waits for a subflow that does not come; the lab is taken down meanwhile.
    let mut check = user.lab(&["check"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(check.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("joined")));

    let (code, stdout, stderr) = user.run(&["down"]);
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (0, "lab t4711 is gone\n", ""));
    assert_eq!(check.wait().unwrap().code(), Some(2));
    assert_eq!(user.labs(), Vec::<PathBuf>::new());
    assert_eq!(namespaces_with("t4711"), Vec::<String>::new());
    let (code, _, stderr) = user.run(&["down"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("there is none"), "{stderr}");
}

#[test]
fn a_name_that_is_taken_is_refused_and_stays_whose_it_is() {
    let user = User::new();
    let scenario = user.file(
        "taken.toml",
        &LONG.replace("nodes.only", "nodes.t4712-node").replace("\"only\"", "\"t4712-node\""),
    );
    assert_eq!(user.run(&["up", &scenario]).0, 0);
    let (code, _, stderr) = user.run(&["up", &scenario]);
    assert_eq!(code, 2);
    assert_eq!(stderr, "braid: make lab taken: there is one of that name; use --name\n");

    let other = User::new();
    let (code, _, stderr) = other.run(&["up", &scenario]);
    assert_eq!(code, 2);
    assert_eq!(
        stderr,
        "braid: make network namespace t4712-node: there is one already; with --name NAME this one becomes NAME-t4712-node\n"
    );
    assert_eq!(other.labs(), Vec::<PathBuf>::new());
    assert_eq!(user.run(&["exec", "t4712-node", "true"]).0, 0);
    assert_eq!(user.run(&["down", "--all"]).0, 0);
    assert_eq!(namespaces_with("t4712"), Vec::<String>::new());
}

#[test]
fn a_lab_whose_process_is_killed_leaves_nothing_behind() {
    let user = User::new();
    assert_eq!(user.run(&["up", "playground", "--name", "t4713"]).0, 0);
    let (_, stdout, _) = user.run(&["list", "--json"]);
    let list: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    let pid = list["running"][0]["pid"].as_i64().unwrap();
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
    until("the directory is gone", || user.labs().is_empty());
    assert_eq!(namespaces_with("t4713"), Vec::<String>::new());
}

/// Starts `command` without the capabilities that a lab needs. CAP_SETFCAP is needed to be root in a user namespace,
/// but only for somebody who is root already.
fn without_capabilities(command: &Command) -> Command {
    let mut setpriv = Command::new("setpriv");
    setpriv.args(["--bounding-set", "-all,+setfcap", "--inh-caps", "-all", "--"]);
    setpriv.arg(command.get_program()).args(command.get_args());
    setpriv.envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
    setpriv
}

#[test]
fn without_capabilities_labs_live_in_a_user_namespace_that_is_found_again() {
    let user = User::new();
    let run = |arguments: &[&str]| {
        outcome(&without_capabilities(&user.lab(arguments)).stdin(Stdio::null()).output().unwrap())
    };
    let (code, stdout, stderr) = run(&["run", "playground"]);
    assert_eq!(code, 0, "{stdout}{stderr}");

    // The plain names are free in there, whatever namespaces there are outside.
    let (code, stdout, stderr) = run(&["up", "playground"]);
    assert_eq!(
        (code, stdout.as_str()),
        (0, "lab playground is up: client (client), server (server)\n"),
        "{stderr}"
    );
    let (code, stdout, stderr) =
        run(&["exec", "client", "ip", "-brief", "-4", "address", "show", "dev", "eth1"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("192.168.0.2/24"), "{stdout}");
    let (code, stdout, stderr) = run(&["check"]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert_eq!(run(&["down"]).0, 0);
    assert_eq!(user.labs(), Vec::<PathBuf>::new());
}

#[test]
fn what_is_wrong_with_a_scenario_is_one_line_and_exit_code_2() {
    let user = User::new();
    let file = user.file("bad.toml", "title = \"bad\"\n[nodes.a]\nadress = 1\n");
    for (arguments, expected) in [
        (
            vec!["run", file.as_str()],
            format!("braid: {file}:3: nodes.a.adress: unknown field `adress`, expected one of "),
        ),
        (
            vec!["up", file.as_str()],
            format!("braid: {file}:3: nodes.a.adress: unknown field `adress`, expected one of "),
        ),
        (vec!["run", "nothing"], "braid: no scenario named nothing (there is: handover, ".into()),
        (vec!["run", "simple:nothing"], "braid: no variant named simple:nothing".into()),
        (vec!["run", "/nowhere.toml"], "braid: read /nowhere.toml: No such file or directory".into()),
    ] {
        let (code, stdout, stderr) = user.run(&arguments);
        assert_eq!((code, stdout.as_str()), (2, ""), "{arguments:?}: {stderr}");
        assert!(stderr.starts_with(&expected), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
    assert_eq!(user.labs(), Vec::<PathBuf>::new());
}
