//! Policies in virtual time: a small kernel that does what it is told, paths that die and come back, and what must
//! hold whatever happens.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::config::{Interface, Kind, Rule};
use super::*;

const TOKEN: Token = Token(7);
const FIRST: u8 = 1;

fn local_ip(n: u8) -> IpAddr {
    format!("10.0.{n}.1").parse().unwrap()
}

/// The peer's address on network `n`; the connection was opened to the one on network 1.
fn remote(n: u8) -> SocketAddr {
    format!("10.0.{n}.2:80").parse().unwrap()
}

fn local(n: u8) -> Local {
    Local { ip: local_ip(n), prefix: 24, ifindex: u32::from(n), interface: format!("eth{n}") }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn config(policy: Kind) -> Config {
    Config { default: Rule { policy, ..Rule::default() }, ..Config::default() }
}

/// A host with one connection. Its programs send all the time, over all active subflows.
struct Host {
    now: Time,
    policy: Policy,
    addresses: Vec<u8>,
    /// Local networks over which nothing comes through.
    dead: BTreeSet<u8>,
    /// Every attempt is refused.
    refuses: bool,
    subflows: Vec<Subflow>,
    next_port: u16,
    actions: Vec<(Time, Action)>,
    /// The peer alone sends.
    receives: bool,
    /// Questions on paths that work.
    answers: Vec<(IpAddr, SocketAddr)>,
    /// Nobody answers a question.
    mute: bool,
    /// Events of the path manager are lost.
    deaf: bool,
    /// Segments under way on an active subflow.
    in_flight: u32,
    /// TCP has sent again what a dead network did not let through.
    times_out: bool,
    /// The peer's networks that the policy knows of.
    known: BTreeSet<u8>,
}

fn network(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(ip) => ip.octets()[2],
        IpAddr::V6(_) => unreachable!(),
    }
}

impl Host {
    /// A connection from network 1; `networks` have an address each.
    fn new(config: Config, networks: &[u8]) -> Self {
        let mut host = Host {
            now: ms(1000),
            policy: Policy::new(config),
            addresses: networks.to_vec(),
            dead: BTreeSet::new(),
            refuses: false,
            subflows: Vec::new(),
            next_port: 1000,
            actions: Vec::new(),
            receives: false,
            answers: Vec::new(),
            mute: false,
            deaf: false,
            in_flight: 5,
            times_out: true,
            known: [1].into(),
        };
        host.add(FIRST, remote(1), AddrId(0), false);
        host.subflows[0].state = State::Open;
        host.tell_addresses();
        host
    }

    fn add(&mut self, from: u8, to: SocketAddr, id: AddrId, backup: bool) {
        self.next_port += 1;
        self.subflows.push(Subflow {
            local: SocketAddr::new(local_ip(from), self.next_port),
            remote: to,
            local_id: id,
            remote_id: AddrId(if to == remote(1) { 0 } else { network(to.ip()) }),
            state: State::Opening,
            ours: true,
            backup,
            rtt: ms(20) * u32::from(from),
            acked: 0,
            last_ack: Duration::ZERO,
            received: 0,
            in_flight: 0,
            timeouts: 0,
        });
    }

    fn tell_addresses(&mut self) {
        let addresses = self.addresses.iter().map(|n| local(*n)).collect();
        self.tell(Event::Addresses(addresses));
    }

    /// Tells the policy, and does what it says. As the daemon does, looks after all but a look.
    fn tell(&mut self, event: Event) {
        let look = !matches!(event, Event::Connections(_) | Event::Refused(_));
        if self.deaf
            && matches!(event, Event::Announced { .. } | Event::Removed { .. } | Event::Answered { .. })
        {
            return;
        }
        match event {
            Event::Announced { id, .. } => drop(self.known.insert(id.0)),
            Event::Removed { id, .. } if id != AddrId(1) => drop(self.known.remove(&id.0)),
            _ => {}
        }
        let actions = self.policy.on_event(self.now, event);
        for action in actions {
            self.act(action);
        }
        if look {
            self.look();
        }
    }

    fn look(&mut self) {
        let seen = Seen {
            token: TOKEN,
            ours: true,
            local: SocketAddr::new(local_ip(FIRST), 1001),
            remote: remote(1),
            identity: Identity::default(),
            subflows: self.subflows.clone(),
        };
        self.tell(Event::Connections(vec![seen]));
    }

    /// The subflows that are open and have their address.
    fn usable(&self) -> usize {
        let has_address = |s: &&Subflow| self.addresses.contains(&network(s.local.ip()));
        self.subflows.iter().filter(|s| s.state == State::Open).filter(has_address).count()
    }

    fn act(&mut self, action: Action) {
        self.actions.push((self.now, action.clone()));
        let before = self.usable();
        match action {
            Action::Create { local, id, remote, backup, ref ifindex, .. } => {
                assert_eq!(*ifindex, u32::from(network(local)));
                let cap = self.rule().max_subflows;
                if self.refuses || !self.addresses.contains(&network(local)) {
                    self.tell(Event::Refused(action));
                    return;
                }
                let same_id =
                    |s: &Subflow| (s.local.ip() == local) != (s.local_id == id) && s.local_id != AddrId(0);
                assert!(!self.subflows.iter().any(same_id), "an id of two addresses: {id} {local}");
                self.add(network(local), remote, id, backup);
                assert!(
                    self.subflows.len() <= usize::from(cap),
                    "more than {cap} subflows: {:#?}",
                    self.subflows
                );
            }
            Action::Destroy { local, remote, .. } => {
                self.subflows.retain(|s| (s.local, s.remote) != (local, remote));
            }
            // As the kernel: the peer is told, and what it closes ends here where it can be heard.
            Action::Withdraw { id, .. } => {
                let (dead, addresses) = (&self.dead, &self.addresses);
                let alive = |n| !dead.contains(&n) && addresses.contains(&n);
                self.subflows.retain(|s| s.local_id != id || !alive(network(s.local.ip())));
            }
            Action::SetBackup { local, remote, backup, .. } => {
                let subflow = self.subflows.iter_mut().find(|s| (s.local, s.remote) == (local, remote));
                if let Some(subflow) = subflow {
                    subflow.backup = backup;
                }
            }
            Action::Announce { .. } => {}
            Action::Ask { local, remote, ifindex } => {
                assert_eq!(ifindex, u32::from(network(local)));
                if self.is_alive(network(local)) && !self.mute {
                    self.answers.push((local, remote));
                }
            }
        }
        assert!(before == 0 || self.usable() > 0, "nothing usable is left: {:#?}", self.actions.last());
    }

    fn is_alive(&self, n: u8) -> bool {
        !self.dead.contains(&n) && self.addresses.contains(&n)
    }

    fn rule(&self) -> &Rule {
        &self.policy.config().default
    }

    /// Lets `time` pass, with a look every 100 ms.
    fn pass(&mut self, time: Duration) {
        self.pass_by(time, ms(100));
    }

    fn pass_by(&mut self, time: Duration, step: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += step;
            let any_active = self.subflows.iter().any(|s| s.state == State::Open && !s.backup);
            let (dead, addresses) = (&self.dead, &self.addresses);
            let (in_flight, timeouts) = (self.in_flight, u8::from(self.times_out));
            for s in &mut self.subflows {
                let n = network(s.local.ip());
                let alive = !dead.contains(&n) && addresses.contains(&n);
                if s.state == State::Opening {
                    s.state = if alive { State::Open } else { State::Opening };
                    continue;
                }
                if s.backup && any_active {
                    // What was under way arrives.
                    if alive && s.in_flight > 0 {
                        (s.acked, s.in_flight, s.timeouts) = (s.acked + 1000, 0, 0);
                    }
                    continue;
                }
                match (self.receives, alive) {
                    (true, true) => s.received += 1000,
                    (true, false) => {}
                    (false, true) => {
                        s.acked += 1000;
                        (s.in_flight, s.timeouts) = (in_flight, 0);
                    }
                    (false, false) => {
                        (s.in_flight, s.timeouts) = (in_flight, s.timeouts.saturating_add(timeouts));
                    }
                }
            }
            for (local, remote) in std::mem::take(&mut self.answers) {
                self.tell(Event::Answered { local, remote });
            }
            self.look();
        }
    }

    /// Lets so much time pass that the longest wait is over.
    fn rest(&mut self) {
        self.pass_by(Duration::from_secs(200), ms(1000));
    }

    /// The networks of local and remote address, and the flag, of each subflow.
    fn shape(&self) -> Vec<(u8, u8, bool)> {
        let mut shape: Vec<_> =
            self.subflows.iter().map(|s| (network(s.local.ip()), network(s.remote.ip()), s.backup)).collect();
        shape.sort_unstable();
        shape
    }

    fn announce(&mut self, n: u8) {
        self.tell(Event::Announced { token: TOKEN, id: AddrId(n), ip: remote(n).ip(), port: None });
    }

    fn since(&self, at: Time) -> Vec<&Action> {
        self.actions.iter().filter(|(when, _)| *when > at).map(|(_, action)| action).collect()
    }
}

#[test]
fn a_full_mesh_is_between_all_addresses() {
    let mut host = Host::new(config(Kind::Fullmesh), &[1, 2]);
    host.announce(2);
    host.pass(ms(500));
    assert_eq!(host.shape(), [(1, 1, false), (1, 2, false), (2, 1, false), (2, 2, false)]);
}

#[test]
fn an_announcement_that_comes_before_its_connection_is_seen_counts() {
    let mut host = Host::new(config(Kind::Fullmesh), &[1]);
    host.policy = Policy::new(config(Kind::Fullmesh));
    let announced = Event::Announced { token: TOKEN, id: AddrId(2), ip: remote(2).ip(), port: None };
    assert_eq!(host.policy.on_event(host.now, announced), []);
    host.tell_addresses();
    host.pass(ms(500));
    assert_eq!(host.shape(), [(1, 1, false), (1, 2, false)]);
}

#[test]
fn a_withdrawn_address_is_not_gone_to_again() {
    let mut host = Host::new(config(Kind::Fullmesh), &[1, 2]);
    host.announce(2);
    host.pass(ms(500));
    host.tell(Event::Removed { token: TOKEN, id: AddrId(2) });
    host.subflows.retain(|s| network(s.remote.ip()) != 2); // the kernel closes them
    host.rest();
    assert_eq!(host.shape(), [(1, 1, false), (2, 1, false)]);
}

#[test]
fn an_aggregate_takes_the_nearest_address_of_the_peer() {
    let mut host = Host::new(config(Kind::Aggregate), &[1, 2]);
    host.look();
    host.announce(2);
    host.pass(ms(500));
    assert_eq!(host.shape(), [(1, 1, false), (2, 1, false)]);
    let mut host = Host::new(config(Kind::Aggregate), &[1]);
    host.pass(ms(300));
    host.announce(2);
    host.addresses.push(2);
    host.tell_addresses();
    host.pass(ms(500));
    assert_eq!(host.shape(), [(1, 1, false), (2, 2, false)]);
}

#[test]
fn further_ports_are_between_the_first_addresses() {
    let mut host = Host::new(config(Kind::Ndiffports), &[1, 2]);
    host.policy.config.default.ports = 4;
    host.pass(ms(500));
    assert_eq!(host.shape(), [(1, 1, false); 4]);
}

#[test]
fn one_path_is_primary_and_the_next_takes_over_until_it_is_back() {
    let mut rule = config(Kind::PrimaryBackup);
    rule.default.order = vec!["eth1".into(), "eth3".into()];
    let mut host = Host::new(rule, &[1, 2, 3]);
    host.pass(ms(1000));
    assert_eq!(host.shape(), [(1, 1, false), (2, 1, true), (3, 1, true)]);
    host.dead.insert(1);
    host.pass(ms(1000));
    let active: Vec<_> = host.shape().into_iter().filter(|(.., backup)| !backup).collect();
    assert_eq!(active, [(3, 1, false)]);
    host.pass(Duration::from_secs(30));
    host.dead.clear();
    let returned = host.now;
    host.pass(ms(2000));
    assert!(host.shape().contains(&(1, 1, true)), "back, not yet proved: {:?}", host.shape());
    host.pass(ms(4000));
    assert_eq!(host.shape(), [(1, 1, false), (2, 1, true), (3, 1, true)]);
    let flags = host.since(returned).into_iter().filter(|a| matches!(a, Action::SetBackup { .. })).count();
    assert_eq!(flags, 2, "{:#?}", host.since(returned));
}

#[test]
fn silence_begins_with_the_last_acknowledgement_however_late_it_is_looked_at() {
    let mut host = Host::new(config(Kind::Aggregate), &[1, 2]);
    host.pass(ms(500));
    host.subflows[0].last_ack = ms(90);
    host.pass(ms(100));
    host.dead.insert(1);
    host.pass_by(ms(100), ms(20));
    assert_eq!(host.shape(), [(1, 1, false), (2, 1, false)]);
    host.pass_by(ms(20), ms(20));
    assert_eq!(host.shape(), [(2, 1, false)]);
}

#[test]
fn looks_are_close_together_while_a_path_is_in_doubt_and_rare_when_nothing_moves() {
    let mut host = Host::new(config(Kind::Aggregate), &[1, 2]);
    host.pass(ms(500));
    assert_eq!(host.policy.pause(host.now, ms(6)), ms(24));
    host.dead.insert(1);
    host.pass_by(ms(120), ms(20));
    assert_eq!(host.policy.pause(host.now, ms(1)), DOUBTFUL);
    // Where all have been silent for long, nothing is decided any more.
    host.dead.insert(2);
    host.pass(ms(1000));
    assert_eq!(host.policy.pause(host.now, ms(1)), BUSY);
    host.dead.clear();
    host.pass(ms(5000));
    host.subflows.iter_mut().for_each(|s| s.in_flight = 0);
    host.look();
    assert_eq!(host.policy.pause(host.now, ms(1)), IDLE);
}

#[test]
fn the_quicker_path_becomes_primary_where_it_is_measured() {
    let mut rule = config(Kind::PrimaryBackup);
    rule.default.measured = true;
    let mut host = Host::new(rule, &[1, 2]);
    host.pass(ms(10_000));
    assert_eq!(host.shape(), [(1, 1, false), (2, 1, true)]);
    host.subflows.iter_mut().filter(|s| network(s.local.ip()) == 1).for_each(|s| s.rtt = ms(400));
    host.pass(ms(200));
    assert_eq!(host.shape(), [(1, 1, true), (2, 1, false)]);
}

#[test]
fn active_comes_before_backup_in_a_switch() {
    let mut rule = config(Kind::PrimaryBackup);
    rule.default.order = vec!["eth1".into()];
    let mut host = Host::new(rule, &[1, 2]);
    host.pass(ms(5000));
    let at = host.now;
    host.policy.config.default.order = vec!["eth2".into()];
    host.pass(ms(200));
    let flags: Vec<bool> = host
        .since(at)
        .into_iter()
        .map(|action| match action {
            Action::SetBackup { backup, .. } => *backup,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(flags, [false, true]);
}

#[test]
fn a_single_subflow_moves_when_its_path_dies_and_stays_there() {
    let mut host = Host::new(config(Kind::Single), &[1, 2]);
    host.pass(ms(2000));
    assert_eq!((host.shape(), host.actions.len()), (vec![(1, 1, false)], 0));
    host.dead.insert(1);
    host.pass(ms(2000));
    assert_eq!(host.shape(), [(2, 1, false)]);
    host.dead.clear();
    host.rest();
    assert_eq!(host.shape(), [(2, 1, false)]);
}

#[test]
fn a_single_subflow_leaves_an_address_that_is_going_only_when_the_next_one_works() {
    let mut host = Host::new(config(Kind::Single), &[1, 2]);
    host.pass(ms(500));
    host.dead.insert(2);
    host.addresses = vec![2];
    host.tell_addresses();
    host.pass(ms(1000));
    assert!(host.shape().contains(&(1, 1, false)));
    host.dead.clear();
    host.pass(ms(1000));
    assert_eq!(host.shape(), [(2, 1, false)]);
}

#[test]
fn a_silent_path_is_given_up_within_half_a_second_and_back_within_three() {
    let mut host = Host::new(config(Kind::Aggregate), &[1, 2]);
    host.pass(Duration::from_secs(10));
    host.dead.insert(2);
    let died = host.now;
    host.pass(ms(500));
    assert!(matches!(host.since(died)[0], Action::Withdraw { id: AddrId(1), .. }), "{:?}", host.since(died));
    host.pass(Duration::from_secs(30));
    let of = |kind: fn(&Action) -> bool| host.since(died).into_iter().filter(|action| kind(action)).count();
    let asked = of(|action| matches!(action, Action::Ask { .. }));
    assert!((20..=31).contains(&asked), "{asked}");
    // An attempt in vain makes the kernel send much again.
    assert_eq!(of(|action| matches!(action, Action::Create { .. })), 0);
    host.dead.clear();
    host.pass(ms(3000));
    assert_eq!(host.shape(), [(1, 1, false), (2, 1, false)]);
}

#[test]
fn questions_become_rarer_the_longer_a_path_is_down() {
    let mut host = Host::new(config(Kind::Aggregate), &[1, 2]);
    host.pass(Duration::from_secs(10));
    host.dead.insert(2);
    host.pass(Duration::from_secs(3600));
    let at = host.now;
    host.pass(Duration::from_secs(600));
    let asked = host.since(at).iter().filter(|a| matches!(a, Action::Ask { .. })).count();
    assert!((15..=21).contains(&asked), "{asked}");
}

#[test]
fn a_path_on_which_no_question_is_answered_is_tried_anyway() {
    let mut host = Host::new(config(Kind::Aggregate), &[1, 2]);
    host.pass(Duration::from_secs(10));
    host.dead.insert(2);
    host.mute = true;
    host.pass(Duration::from_secs(10));
    host.dead.clear();
    assert_eq!(host.shape(), [(1, 1, false)]);
    host.pass(Duration::from_secs(52));
    assert_eq!(host.shape(), [(1, 1, false), (2, 1, false)]);
}

/// No timeout yet, but the other path goes on.
#[test]
fn a_silent_path_is_given_up_before_a_timeout_where_another_goes_on() {
    let mut host = Host::new(config(Kind::Aggregate), &[1, 2]);
    host.pass(Duration::from_secs(10));
    host.times_out = false;
    // One network after the other, and then both: this host is held up. A peer may wait with its answer to two segments.
    for (dead, in_flight, time, given_up) in
        [(vec![1, 2], 5, 300, 0), (vec![2], 2, 300, 0), (vec![2], 5, 100, 0), (vec![2], 3, 200, 1)]
    {
        (host.dead, host.in_flight) = (dead.into_iter().collect(), in_flight);
        let at = host.now;
        host.pass(ms(time));
        let closed = host.since(at).into_iter().filter(|a| matches!(a, Action::Withdraw { .. })).count();
        assert_eq!(closed, given_up, "{:#?}", host.since(at));
        host.dead.clear();
        host.pass(ms(1000));
    }
}

#[test]
fn a_path_whose_round_trips_grow_while_data_time_out_is_given_up() {
    for (grown, timeouts, given_up) in [(2, 1, false), (30, 0, false), (30, 1, true)] {
        let mut host = Host::new(config(Kind::Aggregate), &[1, 2]);
        host.pass(Duration::from_secs(10));
        let at = host.now;
        // A little still comes through.
        for _ in 0..3 {
            host.pass(ms(100));
            for s in host.subflows.iter_mut().filter(|s| network(s.local.ip()) == 2) {
                (s.rtt, s.timeouts) = (ms(40) * grown, timeouts);
            }
            host.look();
        }
        let closed = host.since(at).into_iter().filter(|a| matches!(a, Action::Withdraw { .. })).count();
        assert_eq!(closed > 0, given_up, "{grown} {timeouts}: {:#?}", host.since(at));
    }
}

#[test]
fn the_only_path_is_never_given_up() {
    let mut host = Host::new(config(Kind::Fullmesh), &[1]);
    host.dead.insert(1);
    host.rest();
    assert_eq!(host.actions, []);
    assert_eq!(host.shape(), [(1, 1, false)]);
}

#[test]
fn when_all_paths_are_silent_none_is_given_up() {
    let mut host = Host::new(config(Kind::Aggregate), &[1, 2]);
    host.pass(Duration::from_secs(10));
    let at = host.now;
    host.dead = [1, 2].into();
    host.rest();
    assert_eq!(host.since(at), Vec::<&Action>::new());
}

/// The receiver of data sees no data that is stuck. It asks the path itself.
#[test]
fn a_receiver_finds_a_silent_path_by_a_handshake() {
    let mut host = Host::new(config(Kind::Aggregate), &[1, 2]);
    host.receives = true;
    host.pass(Duration::from_secs(10));
    host.dead.insert(1);
    let died = host.now;
    host.pass(ms(1500));
    let asked = matches!(
        host.since(died)[..],
        [Action::Create { backup: true, .. }, Action::Withdraw { id: AddrId(0), .. }, ..]
    );
    assert!(asked, "{:#?}", host.since(died));
    assert_eq!(host.subflows.iter().filter(|s| s.state == State::Open).count(), 1);
    host.pass(Duration::from_secs(30));
    host.dead.clear();
    host.pass(ms(3000));
    assert_eq!(host.shape(), [(1, 1, false), (2, 1, false)]);
}

#[test]
fn a_path_that_the_peer_does_not_use_is_asked_and_kept() {
    let mut host = Host::new(config(Kind::Aggregate), &[1, 2]);
    host.receives = true;
    host.pass(Duration::from_secs(10));
    let at = host.now;
    let ports: BTreeSet<u16> = host.subflows.iter().map(|s| s.local.port()).collect();
    for _ in 0..600 {
        let before: Vec<_> = host.subflows.iter().map(|s| s.received).collect();
        host.pass(ms(100));
        // The peer sends nothing over network 1.
        for (s, received) in host.subflows.iter_mut().zip(before) {
            if network(s.local.ip()) == 1 {
                s.received = received;
            }
        }
    }
    host.pass(ms(100));
    assert_eq!(host.subflows.iter().map(|s| s.local.port()).collect::<BTreeSet<_>>(), ports);
    let asked = host.since(at).iter().filter(|a| matches!(a, Action::Create { .. })).count();
    assert!((1..=3).contains(&asked), "{asked}");
}

#[test]
fn a_metered_interface_is_a_backup_and_one_that_is_not_to_be_used_is_not() {
    let mut rules = config(Kind::Fullmesh);
    let interface = |name: &str, r#use, metered| Interface { name: name.into(), r#use, metered };
    rules.interface = vec![interface("eth2", true, true), interface("eth3*", false, false)];
    let mut host = Host::new(rules, &[1, 2, 3]);
    host.pass(ms(500));
    assert_eq!(host.shape(), [(1, 1, false), (2, 1, true)]);
}

#[test]
fn a_subflow_that_is_reset_again_and_again_is_opened_ever_more_rarely() {
    let mut host = Host::new(config(Kind::Aggregate), &[1, 2]);
    for _ in 0..6000 {
        host.pass(ms(100));
        host.subflows.retain(|s| s.state == State::Opening || network(s.local.ip()) == 1);
    }
    let attempts = host.actions.iter().filter(|(_, a)| matches!(a, Action::Create { .. })).count();
    assert!((8..=20).contains(&attempts), "{attempts}");
}

#[test]
fn a_refused_attempt_is_repeated_ever_more_rarely_until_the_address_comes_anew() {
    let mut host = Host::new(config(Kind::Aggregate), &[1]);
    host.refuses = true;
    host.happens(Happening::Gains(2));
    host.pass(Duration::from_secs(3600));
    assert!((20..=160).contains(&host.actions.len()), "{}", host.actions.len());
    // Nothing moves either: it is for the next attempt alone that somebody has to look.
    host.subflows.iter_mut().for_each(|s| s.in_flight = 0);
    host.look();
    host.look();
    assert_eq!(host.policy.pause(host.now, ms(1)), LACKING);
    host.refuses = false;
    host.addresses = vec![1];
    host.tell_addresses();
    host.addresses = vec![1, 2];
    host.tell_addresses();
    host.pass(ms(300));
    assert_eq!(host.shape(), [(1, 1, false), (2, 1, false)]);
}

#[test]
fn a_restart_changes_nothing_that_is_as_it_should_be() {
    for kind in [Kind::Fullmesh, Kind::Ndiffports, Kind::PrimaryBackup, Kind::Single, Kind::Aggregate] {
        let mut host = Host::new(config(kind), &[1, 2, 3]);
        host.look();
        host.announce(2);
        host.pass(ms(5000));
        let (shape, at) = (host.shape(), host.now);
        host.policy = Policy::new(config(kind));
        host.tell_addresses();
        host.pass(ms(10_000));
        assert_eq!((host.shape(), host.since(at)), (shape, vec![]), "{kind:?}");
    }
}

#[test]
fn a_server_opens_nothing_and_announces_what_it_may() {
    let mut rules = config(Kind::Fullmesh);
    rules.default.announce = true;
    let mut policy = Policy::new(rules);
    let host = Host::new(config(Kind::Fullmesh), &[1]);
    let mut subflow = host.subflows[0].clone();
    subflow.ours = false;
    let seen = Seen {
        token: TOKEN,
        ours: false,
        local: subflow.local,
        remote: remote(1),
        identity: Identity::default(),
        subflows: vec![subflow],
    };
    assert_eq!(policy.on_event(ms(0), Event::Addresses(vec![local(1), local(2)])), []);
    let actions = policy.on_event(ms(0), Event::Connections(vec![seen.clone()]));
    assert_eq!(actions, [Action::Announce { token: TOKEN, ip: local_ip(2), id: AddrId(1) }]);
    assert_eq!(policy.on_event(ms(100), Event::Connections(vec![seen.clone()])), []);
    policy.on_event(ms(100), Event::Refused(actions[0].clone()));
    assert_eq!(policy.on_event(ms(150), Event::Connections(vec![seen.clone()])), actions);
    policy.on_event(ms(200), Event::Addresses(vec![local(1)]));
    let actions = policy.on_event(ms(200), Event::Connections(vec![seen]));
    assert_eq!(actions, [Action::Withdraw { token: TOKEN, id: AddrId(1) }]);
}

#[test]
fn the_first_rule_that_fits_decides() {
    let text = r#"
dead_after = "500ms"
[default]
policy = "single"
[[rule]]
match = { program = "curl", port = 80 }
policy = "aggregate"
[[rule]]
match = { cgroup = "/a/b" }
policy = "ndiffports"
ports = 3
[[rule]]
match = { peer = "10.0.1.0/24", uid = 5 }
policy = "primary-backup"
order = ["wlan*"]
[[rule]]
match = { peer = "10.0.1.2", uid = 6 }
policy = "aggregate"
[[interface]]
name = "wwan*"
metered = true
"#;
    let config = Config::from_toml(text, "pm.toml").unwrap();
    assert!(config.uses("wwan0") && config.is_metered("wwan0") && !config.is_metered("wlan0"));
    assert_eq!(config.dead_after, ms(500));
    let kind = |program: &str, cgroup: &str, uid, port| {
        let identity = Identity { programs: [program.into()].into(), cgroups: [cgroup.into()].into(), uid };
        config
            .rule(&identity, "[::ffff:10.0.1.1]:9".parse().unwrap(), SocketAddr::new(remote(1).ip(), port))
            .policy
    };
    assert_eq!(kind("curl", "/", 0, 80), Kind::Aggregate);
    assert_eq!(kind("curl", "/", 0, 81), Kind::Single);
    assert_eq!(kind("x", "/a/b/c", 0, 80), Kind::Ndiffports);
    assert_eq!(kind("x", "/a/bc", 0, 80), Kind::Single);
    assert_eq!(kind("x", "/", 5, 80), Kind::PrimaryBackup);
    assert_eq!(kind("x", "/", 6, 80), Kind::Aggregate);
}

#[test]
fn a_wrong_file_is_refused_with_line_and_key() {
    for (text, message) in [
        ("x = 1", "pm.toml:1: x: unknown field `x`"),
        ("[default]\npolicy = \"mesh\"", "pm.toml:2: default.policy: unknown variant `mesh`"),
        ("[[rule]]\n[[rule]]\nports = 9", "pm.toml:3: rule[1].ports: 9 is not 1 to 8"),
        ("[default]\nmax_subflows = 0", "pm.toml:2: default.max_subflows: 0 is not 1 to 8"),
        ("\ndead_after = \"soon\"", "pm.toml:2: dead_after: \"soon\" is not a time"),
        ("send_buffer = 100", "pm.toml:1: send_buffer: 100 is not 16384 or more"),
        ("[default]\nmatch = { port = 1 }", "pm.toml: default.match: "),
        (
            "[[rule]]\nmatch = { peer = \"192.0.2.0/33\" }",
            "pm.toml:2: rule[0].match.peer: \"192.0.2.0/33\" is no address and no subnet",
        ),
    ] {
        let error = Config::from_toml(text, "pm.toml").unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
    }
}

/// The peer's RST comes before anybody looks: there was never a subflow to be seen.
#[test]
fn a_further_port_that_the_peer_refuses_is_tried_ever_more_rarely() {
    let mut host = Host::new(config(Kind::Ndiffports), &[1]);
    for (looks, expected) in [(50, 5..=10), (36_000, 20..=160)] {
        for _ in 0..looks {
            host.pass(ms(100));
            host.subflows.truncate(1);
        }
        let attempts = host.actions.iter().filter(|(_, a)| matches!(a, Action::Create { .. })).count();
        assert!(expected.contains(&attempts), "{attempts}");
    }
    host.pass(Duration::from_secs(61));
    assert_eq!(host.shape(), [(1, 1, false); 2]);
}

/// A probe is under way when another policy wants just that subflow.
#[test]
fn a_probe_that_becomes_wanted_is_active() {
    let mut host = Host::new(config(Kind::Aggregate), &[1, 2]);
    host.receives = true;
    host.pass(Duration::from_secs(10));
    host.dead.insert(1);
    host.pass(ms(600));
    assert_eq!(host.shape(), [(1, 1, false), (1, 1, true), (2, 1, false)]);
    host.tell(Event::Configured(config(Kind::Ndiffports)));
    host.dead.clear();
    host.pass(ms(1000));
    assert_eq!(host.shape(), [(1, 1, false); 2]);
}

#[test]
fn an_early_announcement_waits_ten_seconds_for_its_connection_unless_it_is_withdrawn() {
    for (wait, withdrawn, to) in [(9, None, 2), (11, None, 1), (9, Some(2), 1), (9, Some(3), 2)] {
        let mut host = Host::new(config(Kind::Fullmesh), &[1]);
        host.policy = Policy::new(config(Kind::Fullmesh));
        let announced = Event::Announced { token: TOKEN, id: AddrId(2), ip: remote(2).ip(), port: None };
        host.policy.on_event(host.now, announced);
        if let Some(id) = withdrawn {
            host.policy.on_event(host.now, Event::Removed { token: TOKEN, id: AddrId(id) });
        }
        for _ in 0..wait {
            host.now += ms(1000);
            host.policy.on_event(host.now, Event::Connections(Vec::new()));
        }
        host.tell_addresses();
        host.pass(ms(500));
        assert_eq!(host.subflows.len(), to, "{wait} {withdrawn:?}");
    }
}

#[test]
fn a_token_may_be_given_to_another_connection() {
    let mut host = Host::new(config(Kind::Fullmesh), &[1]);
    host.announce(2);
    host.pass(ms(500));
    let mut subflow = host.subflows[0].clone();
    subflow.remote = "10.0.3.2:80".parse().unwrap();
    let seen = Seen {
        remote: subflow.remote,
        subflows: vec![subflow],
        ..host.policy.connections().next().unwrap().clone()
    };
    // The new peer has announced nothing.
    assert_eq!(host.policy.on_event(host.now, Event::Connections(vec![seen])), []);
}

#[test]
fn looks_are_due_while_something_can_change_without_an_event() {
    let mut host = Host::new(config(Kind::Aggregate), &[1]);
    host.look();
    assert_eq!(host.policy.pause(host.now, ms(1)), IDLE);
    type Change = fn(&mut Subflow);
    let changes: [(Change, Duration); 6] = [
        (|s| s.in_flight = 1, BUSY),
        (|s| s.in_flight = 0, IDLE),
        (|s| s.received += 1, BUSY),
        (|_| (), IDLE),
        (|s| s.state = State::Opening, BUSY),
        (|s| s.state = State::Open, IDLE),
    ];
    for (change, pause) in changes {
        change(&mut host.subflows[0]);
        host.look();
        assert_eq!(host.policy.pause(host.now, ms(1)), pause, "{:#?}", host.subflows);
    }
}

#[test]
fn a_restart_keeps_the_primary() {
    let mut host = Host::new(config(Kind::PrimaryBackup), &[1, 2]);
    host.pass(ms(1000));
    host.subflows.iter_mut().for_each(|s| s.backup = !s.backup);
    let at = host.now;
    host.policy = Policy::new(config(Kind::PrimaryBackup));
    host.tell_addresses();
    host.pass(ms(10_000));
    assert_eq!((host.shape(), host.since(at)), (vec![(1, 1, true), (2, 1, false)], vec![]));
}

#[test]
fn a_subflow_that_has_lived_is_opened_anew_at_once() {
    let mut host = Host::new(config(Kind::Aggregate), &[1, 2]);
    host.pass(ms(10_000));
    host.happens(Happening::Reset(1));
    host.pass(ms(200));
    assert_eq!(host.shape(), [(1, 1, false), (2, 1, false)]);
}

#[test]
fn where_there_is_not_room_for_all_what_failed_makes_room_for_what_did_not() {
    let mut rules = config(Kind::Aggregate);
    rules.default.max_subflows = 2;
    let mut host = Host::new(rules, &[1, 2, 3]);
    host.dead.insert(2);
    host.pass(ms(4000));
    assert_eq!(host.shape(), [(1, 1, false), (3, 1, false)]);
}

#[test]
fn what_is_wanted_no_more_makes_room_at_the_bound() {
    let mut rules = config(Kind::Fullmesh);
    rules.default.max_subflows = 2;
    let mut host = Host::new(rules, &[1, 2]);
    host.policy = Policy::new(host.policy.config().clone());
    host.subflows.clear();
    for (from, id) in [(1, 0), (2, 1)] {
        host.add(from, remote(2), AddrId(id), false);
    }
    host.tell_addresses();
    host.pass(ms(500));
    host.tell(Event::Removed { token: TOKEN, id: AddrId(2) });
    host.pass(ms(500));
    assert_eq!(host.shape(), [(1, 1, false), (2, 1, false)]);
}

#[test]
fn a_lost_address_is_withdrawn() {
    let mut host = Host::new(config(Kind::Aggregate), &[1, 2, 3]);
    host.pass(ms(500));
    let at = host.now - ms(1);
    host.happens(Happening::Loses(2));
    assert_eq!(host.since(at)[0], &Action::Withdraw { token: TOKEN, id: AddrId(1) });
    assert_eq!(host.shape(), [(1, 1, false), (3, 1, false)]);
}

#[test]
fn what_the_peer_opened_is_the_peers_to_close() {
    let mut host = Host::new(config(Kind::Single), &[1]);
    host.add(1, remote(2), AddrId(0), false);
    host.subflows[1].ours = false;
    host.pass(ms(5000));
    assert_eq!((host.subflows.len(), host.actions), (2, vec![]));
}

#[test]
fn at_the_bound_no_path_is_asked_by_a_further_subflow() {
    let mut rules = config(Kind::Aggregate);
    rules.default.max_subflows = 2;
    let mut host = Host::new(rules, &[1, 2]);
    host.receives = true;
    host.pass(Duration::from_secs(10));
    let at = host.now;
    host.dead.insert(1);
    host.pass(ms(5000));
    assert_eq!(host.since(at), Vec::<&Action>::new());
}

#[test]
fn where_no_path_brings_anything_the_peer_is_silent() {
    let mut host = Host::new(config(Kind::Aggregate), &[1, 2]);
    host.receives = true;
    host.pass(Duration::from_secs(10));
    let at = host.now;
    host.dead = [1, 2].into();
    host.pass(ms(5000));
    assert_eq!(host.since(at), Vec::<&Action>::new());
}

#[test]
fn a_path_in_doubt_has_time_for_a_handshake() {
    let mut host = Host::new(config(Kind::Aggregate), &[1, 2]);
    host.receives = true;
    host.pass(Duration::from_secs(10));
    host.dead.insert(1);
    let at = host.now;
    while host.since(at).is_empty() {
        host.pass(ms(100));
    }
    host.pass(ms(400));
    host.dead.clear();
    host.pass(ms(1000));
    let withdrawn = host.since(at).into_iter().filter(|a| matches!(a, Action::Withdraw { .. })).count();
    assert_eq!((withdrawn, host.shape()), (0, vec![(1, 1, false), (2, 1, false)]));
}

#[test]
fn a_peer_that_goes_on_sending_on_a_backup_is_told_again_each_second() {
    let mut host = Host::new(config(Kind::PrimaryBackup), &[1, 2]);
    host.receives = true;
    host.pass(ms(5000));
    let at = host.now;
    for _ in 0..30 {
        host.subflows[1].received += 1000;
        host.pass(ms(100));
    }
    assert_eq!(host.since(at).len(), 3, "{:#?}", host.since(at));
    host.pass(ms(5000));
    assert_eq!(host.since(at).len(), 3);
}

/// What may happen to a host.
#[derive(Clone, Debug)]
enum Happening {
    Pass(u64),
    Dies(u8),
    Returns(u8),
    Loses(u8),
    Gains(u8),
    Reset(usize),
    Announced(u8),
    Removed(u8),
    Refuses(bool),
    Receives(bool),
    Mute(bool),
    Deaf(bool),
    ClockJumps,
    Restarts,
    Changes(Kind, u8, bool),
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        Just(Kind::Fullmesh),
        Just(Kind::Ndiffports),
        Just(Kind::PrimaryBackup),
        Just(Kind::Single),
        Just(Kind::Aggregate),
    ]
}

fn happening() -> impl Strategy<Value = Happening> {
    let n = || 1u8..4;
    prop_oneof![
        4 => (1u64..4000).prop_map(Happening::Pass),
        2 => n().prop_map(Happening::Dies),
        2 => n().prop_map(Happening::Returns),
        1 => n().prop_map(Happening::Loses),
        1 => n().prop_map(Happening::Gains),
        1 => (0usize..8).prop_map(Happening::Reset),
        1 => n().prop_map(Happening::Announced),
        1 => n().prop_map(Happening::Removed),
        1 => any::<bool>().prop_map(Happening::Refuses),
        1 => any::<bool>().prop_map(Happening::Receives),
        1 => any::<bool>().prop_map(Happening::Mute),
        1 => any::<bool>().prop_map(Happening::Deaf),
        1 => Just(Happening::ClockJumps),
        1 => Just(Happening::Restarts),
        1 => (kind(), 1u8..9, any::<bool>()).prop_map(|(kind, cap, measured)| Happening::Changes(kind, cap, measured)),
    ]
}

impl Host {
    fn happens(&mut self, happening: Happening) {
        match happening {
            Happening::Pass(time) => self.pass(ms(time)),
            Happening::Dies(n) => drop(self.dead.insert(n)),
            Happening::Returns(n) => drop(self.dead.remove(&n)),
            Happening::Loses(n) => {
                self.addresses.retain(|have| *have != n);
                self.tell_addresses();
            }
            Happening::Gains(n) => {
                self.addresses.retain(|have| *have != n);
                self.addresses.push(n);
                self.tell_addresses();
            }
            Happening::Reset(at) => {
                // The last one goes with the connection.
                if self.subflows.len() > 1 && at < self.subflows.len() && self.usable() > 1 {
                    self.subflows.remove(at);
                    self.look();
                }
            }
            Happening::Announced(n) => self.announce(n),
            Happening::Removed(n) => self.tell(Event::Removed { token: TOKEN, id: AddrId(n) }),
            Happening::Refuses(refuses) => self.refuses = refuses,
            Happening::Receives(receives) => self.receives = receives,
            Happening::Mute(mute) => self.mute = mute,
            Happening::Deaf(deaf) => self.deaf = deaf,
            Happening::ClockJumps => self.now += Duration::from_secs(86_400),
            Happening::Restarts => {
                self.policy = Policy::new(self.policy.config().clone());
                // What it can see.
                self.known = self.subflows.iter().map(|s| network(s.remote.ip())).chain([1]).collect();
                self.tell_addresses();
            }
            Happening::Changes(policy, cap, measured) => {
                let rule = Rule { policy, measured, ..Rule::default() };
                // Fewer than there are cannot be had at once.
                let max_subflows = cap.max(self.subflows.len().min(8) as u8);
                let default = Rule { max_subflows, ..rule };
                self.tell(Event::Configured(Config { default, ..Config::default() }));
            }
        }
    }

    /// What the policy says there should be.
    fn is_as_wanted(&self) -> bool {
        let (shape, rule) = (self.shape(), self.rule());
        let count = self.addresses.len();
        let active = shape.iter().filter(|(.., backup)| !backup).count();
        let cap = usize::from(rule.max_subflows);
        match rule.policy {
            Kind::Single => shape.len() == 1 && active == 1,
            Kind::Ndiffports => shape.len() == cap.min(2) && active == shape.len(),
            Kind::PrimaryBackup => shape.len() == cap.min(count) && active == 1,
            Kind::Aggregate => shape.len() == cap.min(count) && active == shape.len(),
            Kind::Fullmesh => {
                let mut distinct = shape.clone();
                distinct.dedup();
                let of_mesh = |(_, to, _): &(u8, u8, bool)| self.known.contains(to);
                distinct.len() == cap.min(count * self.known.len())
                    && distinct == shape
                    && active == shape.len()
                    && shape.iter().all(of_mesh)
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// The asserts in `act` hold all the while: something usable is left, and the bound on subflows is kept.
    #[test]
    fn whatever_happens_something_works_and_all_comes_to_rest(
        first in kind(), happenings in proptest::collection::vec(happening(), 1..60),
    ) {
        let mut host = Host::new(config(first), &[1, 2]);
        host.look();
        for happening in happenings {
            host.happens(happening);
        }
        (host.refuses, host.receives) = (false, false);
        host.dead.clear();
        for n in 1..=3 {
            host.happens(Happening::Gains(n));
        }
        host.rest();
        let at = host.now;
        host.pass_by(Duration::from_secs(60), ms(500));
        prop_assert_eq!(host.since(at), Vec::<&Action>::new(), "no rest");
        prop_assert!(host.is_as_wanted(), "{:?}: {:#?}", host.rule(), host.shape());
    }
}
