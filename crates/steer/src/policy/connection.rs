//! One connection: what is known of it, and what to do next.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mptcp::AddrId;

use super::asks::Asks;
use super::config::{Config, Rule};
use super::health::{Health, patience};
use super::wanted::Wanted;
use super::{Action, Local, Seen, State, Subflow, Time};

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) seen: Seen,
    /// The peer's announced addresses.
    pub(super) remotes: BTreeMap<AddrId, SocketAddr>,
    /// The local address that is primary, or the only one in use.
    pub(super) primary: Option<IpAddr>,
    /// When that last changed.
    pub(super) switched: Time,
    health: BTreeMap<Ends, Health>,
    paths: BTreeMap<(IpAddr, SocketAddr), Path>,
    /// The ids that local addresses have had on this connection: the kernel holds on to them.
    ids: BTreeMap<IpAddr, AddrId>,
    announced: BTreeMap<IpAddr, AddrId>,
    /// Subflows that were asked for since the last look.
    asked: Vec<(IpAddr, SocketAddr)>,
    /// Something that is wanted is not there.
    lacks: bool,
}

type Ends = (SocketAddr, SocketAddr);

/// What has come of attempts to open subflows between two addresses.
#[derive(Debug, Default)]
struct Path {
    /// Attempts since one went well.
    failures: u32,
    /// Subflows in a row that did not live long.
    flaps: u32,
    /// When the last attempt failed.
    failed: Option<Time>,
    not_before: Time,
    /// Since when there is none, though one is wanted.
    down: Option<Time>,
    /// A further subflow is being opened to see whether the path works.
    probe: Option<Time>,
    /// Since when nothing comes through, as far as is known.
    silent: Option<Time>,
}

/// IPv4 as IPv4, on IPv6 sockets too.
pub(super) fn ip(addr: SocketAddr) -> IpAddr {
    addr.ip().to_canonical()
}

impl Connection {
    pub(super) fn new(now: Time, seen: Seen) -> Self {
        let mut connection = Connection {
            seen: Seen { subflows: Vec::new(), ..seen.clone() },
            remotes: BTreeMap::new(),
            primary: None,
            switched: now,
            health: BTreeMap::new(),
            paths: BTreeMap::new(),
            ids: BTreeMap::new(),
            announced: BTreeMap::new(),
            asked: Vec::new(),
            lacks: false,
        };
        connection.look(now, seen);
        // What is there was announced, or made primary, before anybody looked.
        let subflows = connection.seen.subflows.iter();
        let announced = subflows.clone().filter(|s| s.remote_id != AddrId(0) && s.ours);
        connection.remotes = announced.map(|s| (s.remote_id, s.remote)).collect();
        connection.primary =
            subflows.filter(|s| s.state == State::Open && !s.backup).map(|s| ip(s.local)).next();
        connection
    }

    /// Takes in a look at the connection.
    pub(super) fn look(&mut self, now: Time, seen: Seen) {
        let before = std::mem::replace(&mut self.seen, seen);
        for subflow in &self.seen.subflows {
            let ends = (subflow.local, subflow.remote);
            if !self.health.contains_key(&ends)
                && let Some(at) = self.asked.iter().position(|asked| *asked == path_of(subflow))
            {
                self.asked.swap_remove(at);
            }
            let health = self.health.entry(ends).or_insert_with(|| Health::new(now, subflow));
            health.look(now, subflow);
            let path = self.paths.entry(path_of(subflow)).or_default();
            // One that was there before the last attempt failed says nothing of the next.
            if subflow.state == State::Open && path.failed.is_none_or(|failed| health.since > failed) {
                (path.down, path.silent) = (None, None);
                if now.saturating_sub(health.since) >= LIVED {
                    path.failures = 0;
                    path.flaps = 0;
                }
            }
            if subflow.local_id != AddrId(0) {
                self.ids.insert(ip(subflow.local), subflow.local_id);
            }
        }
        let gone = |s: &Subflow| self.find(s.local, s.remote).is_none();
        let gone: Vec<Subflow> = before.subflows.into_iter().filter(gone).collect();
        for gone in gone {
            let health = self.health.remove(&(gone.local, gone.remote));
            let lived = health.is_some_and(|health| now.saturating_sub(health.since) >= LIVED);
            let path = self.paths.entry(path_of(&gone)).or_default();
            match gone.state {
                State::Opening => path.fail(now),
                State::Open if !lived => path.flap(now),
                State::Open | State::Closing => {}
            }
        }
        // Refused by the peer between two looks.
        for path in std::mem::take(&mut self.asked) {
            self.paths.entry(path).or_default().fail(now);
        }
        // A probe that is alone is no probe any more.
        for (key, path) in &mut self.paths {
            if self.seen.subflows.iter().filter(|s| path_of(s) == *key).count() < 2 {
                path.probe = None;
            }
        }
    }

    pub(super) fn announced(&mut self, id: AddrId, remote: SocketAddr) {
        self.remotes.insert(id, remote);
    }

    /// The local address `local` is there (again): what failed from it may work now.
    pub(super) fn appeared(&mut self, now: Time, local: IpAddr) {
        for (_, path) in self.paths.iter_mut().filter(|((from, _), _)| *from == local) {
            path.failures = 0;
            path.not_before = now;
            path.silent = None;
            path.down = path.down.map(|_| now);
        }
    }

    pub(super) fn refused(&mut self, now: Time, action: &Action) {
        match *action {
            Action::Create { local, remote, .. } => {
                self.asked.retain(|asked| *asked != (local, remote));
                self.paths.entry((local, remote)).or_default().fail(now);
            }
            Action::Announce { ip, .. } => {
                self.announced.remove(&ip);
            }
            // The next look shows what is.
            Action::Destroy { .. } | Action::Withdraw { .. } | Action::SetBackup { .. } => {}
            // Of no connection.
            Action::Ask { .. } => {}
        }
    }

    pub(super) fn failures(&self, local: IpAddr, remote: SocketAddr) -> u32 {
        self.paths.get(&(local, remote)).map_or(0, |path| path.failures)
    }

    /// Will it show soon whether a subflow is dead, where another can take over?
    pub(super) fn is_in_doubt(&self, now: Time, config: &Config) -> bool {
        let doubtful = |s: &Subflow| {
            let patience = patience(s, config.dead_after);
            let silence = self.health_of(s).map_or(Duration::ZERO, |health| health.silence(now));
            s.in_flight > 0 && (patience / 2..patience * 2).contains(&silence)
        };
        self.seen.subflows.len() > 1 && self.seen.subflows.iter().any(doubtful)
    }

    pub(super) fn is_busy(&self) -> bool {
        let moves = |s: &Subflow| {
            s.in_flight > 0
                || s.state == State::Opening
                || self.health_of(s).is_some_and(|health| health.hears)
        };
        !self.asked.is_empty() || self.seen.subflows.iter().any(moves)
    }

    pub(super) fn lacks(&self) -> bool {
        self.lacks
    }

    /// The subflows that work: open, not stuck, and from an address that is still there.
    pub(super) fn sound<'s>(
        &'s self,
        now: Time,
        config: &'s Config,
        addresses: &'s [Local],
    ) -> impl Iterator<Item = &'s Subflow> {
        self.seen.subflows.iter().filter(move |s| {
            s.state == State::Open
                && addresses.iter().any(|local| local.ip == ip(s.local))
                && !self.is_stuck(now, s, config)
        })
    }

    /// Has the subflow been open for at least so long?
    pub(super) fn has_lived(&self, now: Time, subflow: &Subflow, time: Duration) -> bool {
        self.health_of(subflow).is_some_and(|health| now.saturating_sub(health.since) >= time)
    }

    /// Says what to do now, and takes it for done.
    pub(super) fn steer(
        &mut self,
        now: Time,
        config: &Config,
        addresses: &[Local],
        asks: &mut Asks,
        actions: &mut Vec<Action>,
    ) {
        let rule = config.rule(&self.seen.identity, self.seen.local, self.seen.remote);
        let wanted = self.wanted(now, config, rule, addresses);
        self.close(now, config, &wanted, addresses, actions);
        if self.seen.ours {
            self.open(now, rule, &wanted, asks, actions);
            self.probe(now, config, rule, addresses, actions);
        } else if rule.announce {
            self.announce(addresses, actions);
        }
        self.set_flags(now, &wanted, actions);
    }

    /// Closes what is dead, what has lost its address, what did not come up and what is too much, as long as a subflow
    /// that works is left.
    fn close(
        &mut self,
        now: Time,
        config: &Config,
        wanted: &[Wanted<'_>],
        addresses: &[Local],
        actions: &mut Vec<Action>,
    ) {
        let token = self.seen.token;
        let rule = config.rule(&self.seen.identity, self.seen.local, self.seen.remote);
        for index in 0..self.seen.subflows.len() {
            let subflow = self.seen.subflows[index].clone();
            let (local, remote) = (subflow.local, subflow.remote);
            match subflow.state {
                State::Closing => continue,
                State::Opening => {
                    let path = self.paths.entry(path_of(&subflow)).or_default();
                    if path.probe.is_none() && self.has_lived(now, &subflow, ATTEMPT) {
                        let path = self.paths.entry(path_of(&subflow)).or_default();
                        path.failures += 1;
                        (path.failed, path.silent) = (Some(now), Some(now));
                        self.seen.subflows[index].state = State::Closing;
                        actions.push(Action::Destroy { token, local, remote });
                    }
                    continue;
                }
                State::Open => {}
            }
            let sound: Vec<Subflow> = self.sound(now, config, addresses).cloned().collect();
            let others = |s: &&Subflow| (s.local, s.remote) != (local, remote);
            let lost = addresses.iter().all(|address| address.ip != ip(local));
            let dead = self.is_stuck(now, &subflow, config) || self.is_unheard(now, &subflow, config);
            if lost || dead {
                let of_id = |s: &&Subflow| s.local_id == subflow.local_id;
                if sound.iter().any(|s| !of_id(&s)) {
                    tracing::info!(%token, %local, %remote, lost, dead, "subflow given up");
                    // Everything from the address goes with it, here and there: the kernel tells the peer, and closes
                    // nothing here by itself. The peer does, but it may not be heard any more.
                    actions.push(Action::Withdraw { token, id: subflow.local_id });
                    for s in self.seen.subflows.iter_mut().filter(|s| of_id(&&**s)) {
                        if s.state != State::Closing {
                            actions.push(Action::Destroy { token, local: s.local, remote: s.remote });
                        }
                        s.state = State::Closing;
                        self.paths.entry(path_of(s)).or_default().went(now, dead);
                    }
                } else if dead && sound.iter().any(|s| others(&s)) {
                    self.seen.subflows[index].state = State::Closing;
                    self.paths.entry(path_of(&subflow)).or_default().went(now, dead);
                    actions.push(Action::Destroy { token, local, remote });
                }
                continue;
            }
            // What the peer opened is the peer's to close.
            let place = wanted.iter().find(|wanted| wanted.is_served_by(local, remote));
            let older = |s: &&Subflow| {
                place.is_some_and(|place| place.is_served_by(s.local, s.remote))
                    && (self.health_of(s).map(|h| h.since), s.local, s.remote)
                        < (self.health_of(&subflow).map(|h| h.since), local, remote)
            };
            let surplus = place.is_none_or(|place| sound.iter().filter(older).count() >= place.count);
            let wanted_works =
                sound.iter().filter(others).any(|s| wanted.iter().any(|w| w.is_served_by(s.local, s.remote)));
            // One in the way of what is wanted makes room for it.
            let in_the_way = place.is_none()
                && self.total() >= usize::from(rule.max_subflows)
                && sound.iter().any(|s| others(&s));
            if self.seen.ours && subflow.ours && surplus && (wanted_works || in_the_way) {
                self.seen.subflows[index].state = State::Closing;
                self.paths.entry(path_of(&subflow)).or_default().probe = None;
                actions.push(Action::Destroy { token, local, remote });
            }
        }
    }

    /// Opens what is wanted and not there.
    fn open(
        &mut self,
        now: Time,
        rule: &Rule,
        wanted: &[Wanted<'_>],
        asks: &mut Asks,
        actions: &mut Vec<Action>,
    ) {
        self.lacks = false;
        for wanted in wanted {
            let there = self.seen.subflows.iter().filter(|s| s.state != State::Closing);
            let there = there.filter(|s| wanted.is_served_by(s.local, s.remote)).count();
            // What is wanted is no probe any more.
            if there <= wanted.count {
                let paths = wanted.remotes.iter().map(|to| (wanted.local.ip, *to));
                for path in paths {
                    self.paths.entry(path).or_default().probe = None;
                }
            }
            for _ in there..wanted.count {
                self.lacks = true;
                let mut to = wanted.remotes.clone();
                to.retain(|to| self.may_work(now, wanted.local, *to, asks, actions));
                let to = to.into_iter().min_by_key(|to| self.failures(wanted.local.ip, *to));
                let Some(to) = to else { break };
                let path = self.paths.entry((wanted.local.ip, to)).or_default();
                path.down.get_or_insert(now);
                if now < path.not_before || self.total() >= usize::from(rule.max_subflows) {
                    break;
                }
                self.create(wanted.local, to, wanted.backup, actions);
            }
        }
    }

    /// May an attempt between these addresses go well? A path that has fallen silent is asked first, from time to time:
    /// the longer it has been down, the more rarely, so that its return is noticed after a sixteenth of that time.
    fn may_work(
        &mut self,
        now: Time,
        local: &Local,
        remote: SocketAddr,
        asks: &mut Asks,
        actions: &mut Vec<Action>,
    ) -> bool {
        // Where one path from an address is silent, others may be.
        let of_local = self.paths.iter().filter(|((from, _), _)| *from == local.ip);
        let Some(silent) = of_local.filter_map(|(_, path)| path.silent).max() else { return true };
        let path = self.paths.entry((local.ip, remote)).or_default();
        let down = now.saturating_sub(*path.down.get_or_insert(now));
        // Somebody on the way may let no question through.
        if asks.works(local.ip, remote, silent) || now.saturating_sub(silent) >= ANYWAY {
            return true;
        }
        if asks.is_due(now, local.ip, remote, (down / 16).clamp(ASK, LONGEST_ASK)) {
            actions.push(Action::Ask { local: local.ip, ifindex: local.ifindex, remote });
        }
        false
    }

    /// Where others hear from the peer and a subflow that did no longer does, another handshake on its path tells
    /// whether the path is dead. (The peer, who has the data that is stuck, may be unable to tell us.)
    fn probe(
        &mut self,
        now: Time,
        config: &Config,
        rule: &Rule,
        addresses: &[Local],
        actions: &mut Vec<Action>,
    ) {
        let doubted: Vec<Subflow> = self
            .sound(now, config, addresses)
            .filter(|s| self.is_doubtful(now, s, config, addresses))
            .cloned()
            .collect();
        for subflow in doubted {
            if self.total() >= usize::from(rule.max_subflows) {
                return;
            }
            let Some(local) = addresses.iter().find(|local| local.ip == ip(subflow.local)) else { continue };
            if let Some(health) = self.health.get_mut(&(subflow.local, subflow.remote)) {
                let wait = DOUBT * 2u32.pow(health.doubt.1.min(5));
                health.doubt = (now + wait, health.doubt.1 + 1);
            }
            let (from, to) = path_of(&subflow);
            self.paths.entry((from, to)).or_default().probe = Some(now);
            // A backup, so that nothing is sent on it before it is known to be needed.
            self.create(local, to, true, actions);
        }
    }

    fn announce(&mut self, addresses: &[Local], actions: &mut Vec<Action>) {
        let token = self.seen.token;
        let first = ip(self.seen.local);
        for local in
            addresses.iter().filter(|local| local.ip != first && local.ip.is_ipv4() == first.is_ipv4())
        {
            if !self.announced.contains_key(&local.ip) {
                let id = self.id_for(local.ip);
                self.announced.insert(local.ip, id);
                actions.push(Action::Announce { token, ip: local.ip, id });
            }
        }
        self.announced.retain(|ip, id| {
            let stays = addresses.iter().any(|local| local.ip == *ip);
            if !stays {
                actions.push(Action::Withdraw { token, id: *id });
            }
            stays
        });
    }

    /// Active ones first, so that there is no moment without.
    fn set_flags(&mut self, now: Time, wanted: &[Wanted<'_>], actions: &mut Vec<Action>) {
        let token = self.seen.token;
        for backup in [false, true] {
            for index in 0..self.seen.subflows.len() {
                let s = &self.seen.subflows[index];
                let place = wanted.iter().find(|wanted| wanted.is_served_by(s.local, s.remote));
                let probing = self.paths.get(&path_of(s)).is_some_and(|path| path.probe.is_some());
                if s.state != State::Open || place.is_none_or(|place| place.backup != backup) || probing {
                    continue;
                }
                // MP_PRIO is not acknowledged: the peer that goes on sending may not have got it.
                let ends = (s.local, s.remote);
                let Some(health) = self.health.get_mut(&ends) else { continue };
                let unheeded = backup && health.hears && now.saturating_sub(health.told) >= REPEAT;
                if s.backup != backup || unheeded && self.seen.subflows.iter().any(|s| !s.backup) {
                    health.told = now;
                    self.seen.subflows[index].backup = backup;
                    actions.push(Action::SetBackup { token, local: ends.0, remote: ends.1, backup });
                }
            }
        }
    }

    fn create(&mut self, local: &Local, remote: SocketAddr, backup: bool, actions: &mut Vec<Action>) {
        let id = self.id_for(local.ip);
        self.asked.push((local.ip, remote));
        let (token, ifindex) = (self.seen.token, local.ifindex);
        actions.push(Action::Create { token, local: local.ip, id, ifindex, remote, backup });
    }

    /// All subflows that count, those included that were asked for.
    fn total(&self) -> usize {
        self.seen.subflows.iter().filter(|s| s.state != State::Closing).count() + self.asked.len()
    }

    fn id_for(&mut self, ip: IpAddr) -> AddrId {
        let taken: Vec<AddrId> = self.ids.values().chain(self.announced.values()).copied().collect();
        let free = || (1..=u8::MAX).map(AddrId).find(|id| !taken.contains(id)).unwrap_or(AddrId(u8::MAX));
        *self.ids.entry(ip).or_insert_with(free)
    }

    fn find(&self, local: SocketAddr, remote: SocketAddr) -> Option<&Subflow> {
        self.seen.subflows.iter().find(|s| (s.local, s.remote) == (local, remote))
    }

    fn health_of(&self, subflow: &Subflow) -> Option<&Health> {
        self.health.get(&(subflow.local, subflow.remote))
    }

    fn is_stuck(&self, now: Time, subflow: &Subflow, config: &Config) -> bool {
        let others = self.seen.subflows.iter().filter(|s| path_of(s) != path_of(subflow));
        let others = others.filter_map(|s| self.health_of(s)?.progressed).max();
        self.health_of(subflow).is_some_and(|health| health.is_stuck(now, subflow, config.dead_after, others))
    }

    /// Has another subflow heard from the peer for a while, and this one not?
    fn is_doubtful(&self, now: Time, subflow: &Subflow, config: &Config, addresses: &[Local]) -> bool {
        let Some(Health { heard: Some(heard), doubt, .. }) = self.health_of(subflow) else { return false };
        let patience = patience(subflow, config.dead_after);
        let silent = now.saturating_sub(*heard) >= patience && now >= doubt.0 && !subflow.backup;
        let probing = self.paths.get(&path_of(subflow)).is_some_and(|path| path.probe.is_some());
        let later = |s: &Subflow| {
            path_of(s) != path_of(subflow)
                && self
                    .health_of(s)
                    .and_then(|health| health.heard)
                    .is_some_and(|other| other >= *heard + patience)
        };
        silent && !probing && self.sound(now, config, addresses).any(later)
    }

    /// Was the subflow doubted, and has the handshake on its path not come to an end?
    fn is_unheard(&self, now: Time, subflow: &Subflow, config: &Config) -> bool {
        let Some(Path { probe: Some(probe), .. }) = self.paths.get(&path_of(subflow)) else { return false };
        let silent =
            self.health_of(subflow).is_some_and(|health| health.heard.is_none_or(|heard| heard < *probe));
        let of_path = |s: &&Subflow| path_of(s) == path_of(subflow) && s.state == State::Opening;
        silent
            && self.seen.subflows.iter().any(|s| of_path(&s))
            && now.saturating_sub(*probe) >= patience(subflow, config.dead_after) + HANDSHAKE
    }
}

/// A subflow that was open for so long has worked: its end is no sign against its path.
const LIVED: Duration = Duration::from_secs(5);
/// How long an attempt may take. The kernel sends a second SYN after one second.
const ATTEMPT: Duration = Duration::from_millis(2500);
/// Least time between two questions on a path.
const ASK: Duration = Duration::from_secs(1);
const LONGEST_ASK: Duration = Duration::from_secs(30);
/// After so long an attempt is made without an answer.
const ANYWAY: Duration = Duration::from_secs(60);
/// Least time between an attempt that failed and the next one.
const BACKOFF: Duration = Duration::from_millis(500);
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
/// How long a subflow that was doubted for nothing is left in peace, doubled each time.
const DOUBT: Duration = Duration::from_secs(10);
/// What a handshake may take beside round-trip times.
const HANDSHAKE: Duration = Duration::from_millis(300);
/// After how long MP_PRIO is sent again to a peer that does not heed it.
const REPEAT: Duration = Duration::from_secs(1);

impl Path {
    /// The kernel or the peer refused an attempt. The next one waits the longer, the longer the path has been down.
    fn fail(&mut self, now: Time) {
        self.failures += 1;
        self.failed = Some(now);
        self.probe = None;
        let down = *self.down.get_or_insert(now);
        self.not_before = now + (now.saturating_sub(down) / 16).clamp(BACKOFF, LONGEST_BACKOFF);
    }

    /// A subflow came up and was gone soon: each time the next attempt waits twice as long.
    fn flap(&mut self, now: Time) {
        self.fail(now);
        self.not_before = now + (BACKOFF * 2u32.pow(self.flaps.min(8))).min(LONGEST_BACKOFF);
        self.flaps += 1;
    }

    /// Its subflow was given up, because it was dead or for another reason.
    fn went(&mut self, now: Time, dead: bool) {
        self.probe = None;
        self.silent = dead.then_some(now);
        self.down.get_or_insert(now);
        self.not_before = now;
    }
}

/// The addresses that a subflow is between, whatever its local port.
fn path_of(subflow: &Subflow) -> (IpAddr, SocketAddr) {
    (ip(subflow.local), SocketAddr::new(ip(subflow.remote), subflow.remote.port()))
}
