//! Labs are built, work, and leave nothing behind.

use lab::run::Progress;
use lab::{Lab, Scenario};

const TWO: &str = r#"
title = "two hosts"
[nodes]
client = {}
server = {}
[links.wire]
a = { node = "client", dev = "eth0", addresses = ["10.0.0.2/24", "2001:db8::2/64"] }
b = { node = "server", dev = "eth0", addresses = ["10.0.0.1/24", "2001:db8::1/64"] }
"#;

fn two() -> Scenario {
    Scenario::parse("two", "two.toml", TWO, None).unwrap()
}

#[tokio::test]
async fn a_link_carries_both_families_and_comes_back_with_its_addresses() {
    let lab = Lab::build(&two()).await.unwrap();
    for address in ["10.0.0.1", "2001:db8::1"] {
        let ping = lab.spawn("client", &["ping", "-c1", "-W2", address]).await.unwrap();
        let status = ping.exit().await;
        assert!(status.success(), "{address}: {}", ping.describe(status));
    }
    lab.set_link("wire", lab::scenario::LinkState::Down).unwrap();
    let ping = lab.spawn("client", &["ping", "-c1", "-W1", "10.0.0.1"]).await.unwrap();
    assert!(!ping.exit().await.success());
    lab.set_link("wire", lab::scenario::LinkState::Up).unwrap();
    for address in ["10.0.0.1", "2001:db8::1"] {
        let ping = lab.spawn("client", &["ping", "-c1", "-W2", address]).await.unwrap();
        let status = ping.exit().await;
        assert!(status.success(), "{address}: {}", ping.describe(status));
    }
}

#[tokio::test]
async fn a_dropped_lab_leaves_neither_namespace_nor_process_nor_directory() {
    let lab = Lab::build(&two()).await.unwrap();
    let namespace = lab.card().namespace("client").unwrap().to_string();
    let directory = lab.card().directory.clone();
    // A grandchild in a session of its own, so that neither the parent's death nor the group's reaches it.
    let sleeper = lab
        .spawn("client", &["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!; sleep 1000"])
        .await
        .unwrap();
    while sleeper.last_words().is_empty() {
        tokio::task::yield_now().await;
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let grandchild: u32 = sleeper.last_words().parse().unwrap();
    assert!(is_running(grandchild));
    assert!(std::path::Path::new("/run/netns").join(&namespace).exists());
    drop(sleeper);
    drop(lab);
    assert!(!std::path::Path::new("/run/netns").join(&namespace).exists());
    assert!(!directory.exists());
    assert!(!is_running(grandchild));
}

/// A killed process whose parent has not looked at it yet does not run.
fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

#[tokio::test]
async fn a_panic_leaves_nothing_behind() {
    let lab = Lab::build(&two()).await.unwrap();
    let namespace = lab.card().namespace("client").unwrap().to_string();
    let directory = lab.card().directory.clone();
    let panicked = tokio::spawn(async move {
        let _sleeper = lab.spawn("client", &["sleep", "1000"]).await.unwrap();
        panic!("on purpose, with {}", lab.card().name);
    });
    assert!(panicked.await.unwrap_err().is_panic());
    assert!(!std::path::Path::new("/run/netns").join(&namespace).exists());
    assert!(!directory.exists());
}

#[tokio::test]
async fn a_program_that_is_not_there_is_named() {
    let lab = Lab::build(&two()).await.unwrap();
    let error = lab.spawn("client", &["no-such-program", "-x"]).await.unwrap_err();
    assert_eq!(error.to_string(), "no program named no-such-program");
}

#[tokio::test]
async fn a_process_is_ready_when_it_says_so_or_listens() {
    let text = format!(
        "{TWO}
[processes.says]
node = 'client'
command = ['sh', '-c', 'echo nearly there; sleep 0.2; echo here we are; exec sleep 1000']
ready = {{ line = 'here we are' }}
[processes.listens]
node = 'server'
command = ['socat', 'TCP-LISTEN:7000,fork', 'EXEC:cat']
ready = {{ port = 7000 }}
[processes.ends]
node = 'server'
command = ['sh', '-c', 'exit 3']
ready = {{ exit = 3 }}
[processes.never]
node = 'server'
command = ['sh', '-c', 'echo I will not; exec sleep 1000']
ready = {{ port = 7001 }}
timeout = '300ms'
manual = true
[processes.wrong]
node = 'server'
command = ['sh', '-c', 'echo cannot >&2; exit 4']
ready = {{ port = 7002 }}
manual = true
"
    );
    let scenario = Scenario::parse("ready", "ready.toml", &text, None).unwrap();
    let mut lab = Lab::build(&scenario).await.unwrap();
    lab.start_processes().await.unwrap();
    let talk = lab.spawn("client", &["sh", "-c", "echo hello | socat - TCP:10.0.0.1:7000"]).await.unwrap();
    assert!(talk.exit().await.success());
    assert_eq!(talk.last_words(), "hello");
    let error = lab.start("never").await.unwrap_err().to_string();
    assert_eq!(error, "wait for never: not ready after 300ms; last words: I will not");
    let error = lab.start("wrong").await.unwrap_err().to_string();
    assert_eq!(error, "wait for wrong: ended before it was ready, exit code 4: cannot");
}

#[tokio::test]
async fn a_bridge_joins_two_links_and_has_an_address_of_its_own() {
    let text = r#"
title = "a switch between two hosts"
[nodes]
left = {}
switch.devices.br0 = { kind = "bridge", ports = ["eth0", "eth1"], addresses = ["10.0.0.9/24"] }
right = {}
[links.one]
a = { node = "left", dev = "eth0", addresses = ["10.0.0.1/24"] }
b = { node = "switch", dev = "eth0" }
[links.two]
a = { node = "switch", dev = "eth1" }
b = { node = "right", dev = "eth0", addresses = ["10.0.0.2/24"] }
"#;
    let lab = Lab::build(&Scenario::parse("switch", "switch.toml", text, None).unwrap()).await.unwrap();
    for address in ["10.0.0.2", "10.0.0.9"] {
        let ping = lab.spawn("left", &["ping", "-c1", "-W2", address]).await.unwrap();
        let status = ping.exit().await;
        assert!(status.success(), "{address}: {}", ping.describe(status));
    }
}

#[tokio::test]
async fn private_directories_are_one_nodes_own_and_hide_nothing_of_the_lab() {
    let private =
        r#"{ private = ["/run/no-such-a", "/run/no-such-b", "/run/no-such-a/deeper", "/usr/share"] }"#;
    let text = TWO.replace("client = {}", &format!("client = {private}"));
    let text =
        text.replace("server = {}", &format!("server = {private}\n[files.note]\ntext = 'from the lab'"));
    let lab = Lab::build(&Scenario::parse("own", "own.toml", &text, None).unwrap()).await.unwrap();
    let says = async |node, script| {
        let sh = lab.spawn(node, &["sh", "-c", script]).await.unwrap();
        sh.exit().await;
        sh.last_words()
    };
    let write = "cat note > /run/no-such-a/file; cat $PWD/note; ls -d /run/no-such-*; ls /usr/share | wc -l";
    assert_eq!(says("client", write).await, "from the lab/run/no-such-a; /run/no-such-b; 0");
    // Of the node, not of the process.
    assert_eq!(
        says("client", "cat /run/no-such-a/file; ls /run/no-such-a").await,
        "from the labdeeper; file"
    );
    assert_eq!(says("server", "ls /run/no-such-a").await, "deeper");
    assert!(!std::path::Path::new("/run/no-such-a").exists());
}

#[tokio::test]
async fn a_step_waits_until_a_command_succeeds() {
    let text = format!(
        "{TWO}
[steps.third.wait]
node = 'client'
command = ['sh', '-c', 'echo x >> tries; test $(wc -l < tries) -ge 3']
[steps.never.wait]
node = 'client'
command = ['sh', '-c', 'echo nobody there; exit 1']
timeout = '300ms'
"
    );
    let scenario = Scenario::parse("tries", "tries.toml", &text, None).unwrap();
    let mut lab = Lab::build(&scenario).await.unwrap();
    let (verdict, _) = lab::run::run(&mut lab, false, &|_| {}).await.unwrap();
    assert_eq!(std::fs::read_to_string(lab.work().join("tries")).unwrap().lines().count(), 3);
    let rows: Vec<_> = verdict.rows.iter().map(|row| (row.name.as_str(), row.seen.as_str())).collect();
    assert_eq!(rows, [("never", "wait: nothing after 300ms; last try: exit code 1: nobody there")]);
}

#[tokio::test]
async fn rates_of_links_are_told_to_whoever_wants_them() {
    let text = format!("{TWO}[steps.done.run]\nnode = 'client'\ncommand = ['true']");
    let scenario = Scenario::parse("rates", "rates.toml", &text, None).unwrap();
    let mut lab = Lab::build(&scenario).await.unwrap();
    for rates in [true, false] {
        let told = std::cell::Cell::new(false);
        let progress = |progress| told.set(told.get() || matches!(progress, Progress::Rates(_)));
        lab::run::run(&mut lab, rates, &progress).await.unwrap();
        assert_eq!(told.get(), rates);
    }
}

#[tokio::test]
async fn gaps_of_a_saved_payload_are_measured() {
    let text = format!(
        "{TWO}
[files.five]
size = '5B'
[steps.trickle.run]
node = 'client'
command = ['sh', '-c', 'head -c 2 five; sleep 0.4; tail -c 3 five']
save = 'copy'
[steps.after.run]
node = 'client'
command = ['true']
[expect.same.same]
files = ['five', 'copy']
[expect.short.stall]
step = 'trickle'
at_most = '200ms'
[expect.any.stall]
step = 'trickle'
[expect.during.stall]
step = 'trickle'
during = 'trickle'
at_most_of = {{ step = 'trickle', share = '100%' }}
[expect.later.stall]
step = 'trickle'
during = 'after'
"
    );
    let scenario = Scenario::parse("gap", "gap.toml", &text, None).unwrap();
    let mut lab = Lab::build(&scenario).await.unwrap();
    let (verdict, _) = lab::run::run(&mut lab, false, &|_| {}).await.unwrap();
    let seen: Vec<_> = verdict.rows.iter().map(|row| (row.name.as_str(), row.pass)).collect();
    assert_eq!(
        seen,
        [
            ("trickle", true),
            ("after", true),
            ("same", true),
            ("short", false),
            ("any", true),
            ("during", true),
            ("later", true)
        ],
        "{:?}",
        verdict.rows
    );
    let ms = |row: usize| verdict.rows[row].seen.split(' ').next().unwrap().parse::<u64>().unwrap();
    assert!(ms(3) >= 400 && ms(5) >= 400 && ms(6) == 0, "{:?}", verdict.rows);
}
