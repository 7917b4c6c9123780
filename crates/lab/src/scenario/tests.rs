use super::*;

const SMALL: &str = r#"title = "small"
[nodes]
left = {}
right = {}
[links.wire]
a = { node = "left", dev = "eth0", addresses = ["10.0.0.2/24"] }
b = { node = "right", dev = "eth0", addresses = ["10.0.0.1/24"] }
[processes.echo]
node = "right"
command = ["cat"]
[steps.get.run]
node = "left"
command = ["true"]
[variants.slow]
links.wire.shape = { rate = "1mbit", delay = "20ms" }
"#;

fn small(with: &str) -> Result<Scenario> {
    // Before the variants, so that tables may be added.
    let text = SMALL.replace("[variants.slow]", &format!("{with}\n[variants.slow]"));
    Scenario::parse("small", "small.toml", &text, None)
}

#[test]
fn every_scenario_of_the_shelf_and_every_variant_is_sound() {
    let shelf = Shelf::Directory(concat!(env!("CARGO_MANIFEST_DIR"), "/../../scenarios").into());
    let names = shelf.names().unwrap();
    assert_eq!(names, Shelf::BuiltIn.names().unwrap());
    assert!(!names.is_empty());
    for name in names {
        let scenario = shelf.load(&name).unwrap();
        for variant in &scenario.variants {
            let name = format!("{name}:{variant}");
            assert_eq!(Shelf::BuiltIn.load(&name).unwrap().name, name);
        }
    }
}

#[test]
fn a_variant_overrides_only_the_lines_that_it_gives() {
    let slow = Scenario::parse("small", "small.toml", SMALL, Some("slow")).unwrap();
    assert_eq!(slow.name, "small:slow");
    assert_eq!(slow.links["wire"].shape.rate, Some(1_000_000));
    assert_eq!(slow.links["wire"].a.dev, "eth0");
    let plain = Scenario::parse("small", "small.toml", SMALL, None).unwrap();
    assert_eq!(plain.links["wire"].shape, Shape::default());
    assert_eq!(plain.variants, ["slow"]);
}

#[test]
fn steps_keep_the_order_of_the_file() {
    let scenario = small("[steps.zebra.wait]\ntime = '1s'\n[steps.ant.start]\nprocess = 'echo'").unwrap();
    assert_eq!(scenario.steps.keys().collect::<Vec<_>>(), ["get", "zebra", "ant"]);
}

/// What is wrong, and what the error must say, always with file, line and key.
const BROKEN: &[(&str, &str)] = &[
    ("[nodes.third]\nsysctl = {}", "small.toml:15: nodes.third.sysctl: unknown field `sysctl`"),
    ("[links.other]\na = { node = 'left', dev = 'eth1' }", "small.toml:14: links.other: missing field `b`"),
    (
        "[processes.x]\nnode = 'nowhere'\ncommand = ['true']",
        "small.toml:15: processes.x.node: no node named nowhere (there is: left, right)",
    ),
    ("[processes.x]\nnode = 'left'\ncommand = []", "small.toml:16: processes.x.command: names no program"),
    (
        "[processes.x]\nnode = 'left'\ncommand = ['true']\nready = { port = 0 }",
        "small.toml:17: processes.x.ready.port: invalid value: integer `0`",
    ),
    ("[steps.s.jump]\nnode = 'left'", "small.toml:14: steps.s.jump: unknown variant `jump`"),
    ("[steps.s.link]\nlink = 'wire'", "small.toml:14: steps.s.link: changes nothing: give state or shape"),
    (
        "[steps.s.link]\nlink = 'cable'\nstate = 'down'",
        "small.toml:15: steps.s.link.link: no link named cable (there is: wire)",
    ),
    (
        "[steps.s.wait]\nstep = 'get'",
        "small.toml:15: steps.s.wait.step: get is no earlier step that runs in the background",
    ),
    ("[steps.s.wait]", "small.toml:14: steps.s.wait: waits for nothing"),
    (
        "[steps.s.wait]\nnode = 'left'\nevents = { JOINED = 1 }",
        "small.toml:16: steps.s.wait.events.JOINED: no event named JOINED (there is: CREATED, ",
    ),
    (
        "[expect.e.stall]\nstep = 'get'\nduring = 'got'",
        "small.toml:16: expect.e.stall.during: no step named got (there is: get)",
    ),
    ("[expect.e.stall]\nstep = 'get'", "small.toml:15: expect.e.stall.step: get has no save"),
    (
        "[expect.e.subflows]\nnode = 'left'\npairs = ['10.0.0.2 10.0.0.1']",
        "small.toml:16: expect.e.subflows.pairs: \"10.0.0.2 10.0.0.1\" names no subflow",
    ),
    (
        "[expect.e.share]\nduring = 'get'\nat_least = { wire = '200%' }",
        "small.toml:16: expect.e.share.at_least.wire: more than 100%",
    ),
    (
        "[expect.e.same]\nfiles = ['a', '../b']",
        "small.toml:15: expect.e.same.files: \"../b\" is no plain file name",
    ),
    (
        "[files]\nbig = { size = '10' }",
        "small.toml:15: files.big.size: \"10\" is no size: write it like \"8MiB\"",
    ),
    ("[nodes.left]", "small.toml:14: duplicate key"),
    (
        "[files]\nboth = { size = '10B', text = 'ten' }",
        "small.toml:15: files.both: needs either size or text",
    ),
    (
        "[nodes.third.devices]\nt0 = { kind = 'tap', ports = ['t1'] }",
        "small.toml:15: nodes.third.devices.t0: a tap has no ports",
    ),
    (
        "[nodes.third.devices]\nbr0 = { kind = 'bridge', ports = ['t0'] }\nt0 = { kind = 'tap' }",
        "small.toml:15: nodes.third.devices.br0.ports: third has no interface t0 before br0",
    ),
    (
        "[nodes.third.devices]\nt0 = { kind = 'tun' }\nbr0 = { kind = 'bridge', ports = ['t0', 't0'] }",
        "small.toml:16: nodes.third.devices.br0.ports: t0 cannot be in two bridges, or in itself",
    ),
    (
        "[nodes.third]\nprivate = ['run']",
        "small.toml:15: nodes.third.private: run is no absolute path below /",
    ),
    ("[steps.s.wait]\ncommand = ['true']", "small.toml:14: steps.s.wait: node and events or command belong"),
    (
        "[steps.s.wait]\nnode = 'left'\ncommand = ['true']\nevents = { CREATED = 1 }",
        "small.toml:14: steps.s.wait: waits for two things: events and a command",
    ),
    (
        "[nodes.third]\nendpoints = [{ ip = '10.0.0.300' }]",
        "small.toml:15: nodes.third.endpoints.0.ip: invalid IP address syntax",
    ),
    (
        "[nodes.third]\nendpoints = [\n  { ip = '10.0.0.2' },\n]",
        "small.toml:16: nodes.third.endpoints.0: 10.0.0.2 is no address of third",
    ),
    (
        "[nodes.third]\nroutes = [{ to = '10.0.0.0/24' }]",
        "small.toml:15: nodes.third.routes.0: needs either via or dev, or else nexthops",
    ),
    (
        "[nodes.third]\nroutes = [{ to = '10.0.0.0/24', via = '::1' }]",
        "small.toml:15: nodes.third.routes.0: ::1 and 10.0.0.0 are not of one address family",
    ),
    (
        "[nodes.third]\nlimits = { subflows = 9 }",
        "small.toml:15: nodes.third.limits.subflows: 9 is more than 8",
    ),
    (
        "[links.twice]\na = { node = 'left', dev = 'eth0' }\nb = { node = 'right', dev = 'eth1' }",
        "small.toml:15: links.twice.a.dev: left has an interface eth0 already",
    ),
    (
        "[links.long]\na = { node = 'left', dev = 'abcdefghijklmnop' }\nb = { node = 'right', dev = 'eth1' }",
        "small.toml:15: links.long.a.dev: \"abcdefghijklmnop\" is no name for an interface",
    ),
    (
        "[links.odd]\na = { node = 'left', dev = 'eth1' }\nb = { node = 'right', dev = 'eth1' }\nshape = { jitter = '5ms' }",
        "small.toml:17: links.odd.shape: jitter 5ms exceeds delay",
    ),
    ("[nodes.'a b']", "small.toml:14: nodes.a b: a node's name is letters, digits, - and _"),
    ("[files]\n'' = { size = '10B' }", "small.toml:15: files.: \"\" is no plain file name"),
    ("[files]\n'.a' = { size = '10B' }", "small.toml:15: files..a: \".a\" is no plain file name"),
    ("[processes.x]\nnode = 'left'\ncommand = ['']", "small.toml:16: processes.x.command: names no program"),
    ("[steps.s.stop]\nprocess = 'ecco'", "small.toml:15: steps.s.stop.process: no process named ecco"),
    (
        "[nodes.third]\nroutes = [{ to = '10.0.0.0/24', dev = 'eth9' }]",
        "small.toml:15: nodes.third.routes.0: no interface of third named eth9",
    ),
    ("[expect.e.flows]\nnode = 'left'\nsame = true", "small.toml:14: expect.e.flows: expects nothing"),
    (
        "[expect.e.flows]\nnode = 'left'\nevery = true\nfrom = ['10.0.0.2']",
        "small.toml:14: expect.e.flows: exp",
    ),
    (
        "[variants.fast]\nlinks.wire.shape = { rate = '1' }",
        "small.toml:15: links.wire.shape.rate: \"1\" is no rate",
    ),
];

#[test]
fn what_is_wrong_is_told_with_file_line_and_key() {
    for (text, expected) in BROKEN {
        let error = small(text).map(drop).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{text}\n  gives    {error}\n  expected {expected}");
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn a_name_that_is_nowhere_is_answered_with_those_that_are() {
    let error = Scenario::parse("small", "small.toml", SMALL, Some("fast")).unwrap_err();
    assert_eq!(error.to_string(), "no variant named small:fast (there is: slow)");
    let error = Shelf::BuiltIn.load("nothing").unwrap_err().to_string();
    assert!(error.starts_with("no scenario named nothing (there is: "), "{error}");
}

#[test]
fn a_pair_without_a_port_matches_any_port() {
    let pair: Pair = "10.0.0.2 -> [2001:db8::1]:80".parse().unwrap();
    assert_eq!(pair.to_string(), "10.0.0.2 -> [2001:db8::1]:80");
    let addr = |text: &str| text.parse().unwrap();
    assert!(pair.matches(addr("10.0.0.2:4711"), addr("[2001:db8::1]:80")));
    assert!(!pair.matches(addr("10.0.0.2:4711"), addr("[2001:db8::1]:81")));
    assert!(!pair.matches(addr("10.0.0.3:4711"), addr("[2001:db8::1]:80")));
}
