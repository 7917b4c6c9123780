//! Which subflows a connection should have.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::config::{Config, Kind, Rule};
use super::connection::{Connection, ip};
use super::{Local, Time};

/// Subflows from one address.
#[derive(Debug)]
pub(super) struct Wanted<'a> {
    pub(super) local: &'a Local,
    /// To one of these, the first ones rather.
    pub(super) remotes: Vec<SocketAddr>,
    /// So many.
    pub(super) count: usize,
    pub(super) backup: bool,
}

impl Wanted<'_> {
    pub(super) fn is_served_by(&self, local: SocketAddr, remote: SocketAddr) -> bool {
        ip(local) == self.local.ip && self.remotes.iter().any(|wanted| same(*wanted, remote))
    }
}

/// Are these the same end, whether or not IPv4 is mapped to IPv6?
fn same(a: SocketAddr, b: SocketAddr) -> bool {
    (ip(a), a.port()) == (ip(b), b.port())
}

impl Connection {
    /// What there should be, the most important first, within the rule's bounds.
    pub(super) fn wanted<'a>(
        &mut self,
        now: Time,
        config: &Config,
        rule: &Rule,
        addresses: &'a [Local],
    ) -> Vec<Wanted<'a>> {
        let remotes = self.remotes();
        let of_family = |local: &&Local| remotes.iter().any(|to| to.is_ipv4() == local.ip.is_ipv4());
        let locals: Vec<&Local> = addresses.iter().filter(of_family).collect();
        let one = |local: &'a Local| Wanted {
            local,
            remotes: nearest_first(local, &remotes),
            count: 1,
            backup: config.is_metered(&local.interface),
        };
        let mut wanted: Vec<Wanted<'a>> = match rule.policy {
            Kind::Aggregate => locals.iter().map(|local| one(local)).collect(),
            Kind::Fullmesh => locals
                .iter()
                .flat_map(|local| {
                    let Wanted { remotes, backup, .. } = one(local);
                    remotes.into_iter().map(move |to| Wanted { local, remotes: vec![to], count: 1, backup })
                })
                .collect(),
            Kind::Ndiffports => {
                let first = ip(self.seen.local);
                let local = locals.iter().find(|local| local.ip == first).or(locals.first());
                local.map(|local| Wanted { count: rule.ports.into(), ..one(local) }).into_iter().collect()
            }
            Kind::PrimaryBackup => {
                let primary = self.choose_primary(now, config, rule, &locals);
                locals
                    .iter()
                    .map(|local| Wanted { backup: Some(local.ip) != primary, ..one(local) })
                    .collect()
            }
            Kind::Single => {
                let chosen = self.choose_single(now, config, &locals);
                locals.iter().filter(|local| Some(local.ip) == chosen).map(|local| one(local)).collect()
            }
        };
        // What works stays, what failed least comes next.
        wanted.sort_by_key(|wanted| {
            let works = self.sound(now, config, addresses).any(|s| wanted.is_served_by(s.local, s.remote));
            (!works, wanted.remotes.iter().map(|to| self.failures(wanted.local.ip, *to)).min())
        });
        let mut room = usize::from(rule.max_subflows);
        for wanted in &mut wanted {
            wanted.count = wanted.count.min(room);
            room -= wanted.count;
        }
        wanted.retain(|wanted| wanted.count > 0);
        wanted
    }

    /// Where subflows can go to: the first address, then the announced ones.
    fn remotes(&self) -> Vec<SocketAddr> {
        let first = self.seen.remote;
        let of = |addr: SocketAddr| {
            SocketAddr::new(ip(addr), if addr.port() == 0 { first.port() } else { addr.port() })
        };
        let mut remotes = vec![of(first)];
        for remote in self.remotes.values().map(|remote| of(*remote)) {
            if !remotes.contains(&remote) {
                remotes.push(remote);
            }
        }
        remotes
    }

    /// The address that should be primary: the best one that works. One that has come back waits until it has proved
    /// itself.
    fn choose_primary(
        &mut self,
        now: Time,
        config: &Config,
        rule: &Rule,
        locals: &[&Local],
    ) -> Option<IpAddr> {
        let addresses: Vec<Local> = locals.iter().map(|local| (*local).clone()).collect();
        let rtt = |ip_: IpAddr| {
            self.sound(now, config, &addresses).filter(|s| ip(s.local) == ip_).map(|s| s.rtt).min()
        };
        let works = |ip_: IpAddr| rtt(ip_).is_some();
        let proved = |ip_: IpAddr| {
            self.sound(now, config, &addresses).any(|s| ip(s.local) == ip_ && self.has_lived(now, s, PROOF))
        };
        let rank = |local: &Local| (rule.rank(&local.interface), config.is_metered(&local.interface));
        let current = locals.iter().find(|local| Some(local.ip) == self.primary && works(local.ip));
        let candidates = locals.iter().filter(|local| works(local.ip));
        let chosen = match current {
            None => candidates.min_by_key(|local| (rank(local), rule.measured.then(|| rtt(local.ip)))),
            Some(current) => {
                let better = |local: &&&Local| {
                    let quicker = || {
                        let [theirs, ours] = [local.ip, current.ip].map(|ip| rtt(ip).unwrap_or_default());
                        rule.measured && theirs * 4 < ours * 3 && now.saturating_sub(self.switched) >= SETTLE
                    };
                    proved(local.ip)
                        && (rank(local) < rank(current) || rank(local) == rank(current) && quicker())
                };
                candidates.filter(better).min_by_key(|local| (rank(local), rtt(local.ip))).or(Some(current))
            }
        };
        let chosen = chosen.map(|local| local.ip).or(self.primary).or(locals.first().map(|local| local.ip));
        if chosen != self.primary {
            self.switched = now;
            self.primary = chosen;
        }
        chosen
    }

    /// The address that the one subflow should have: where it works, else where failures are fewest.
    fn choose_single(&mut self, now: Time, config: &Config, locals: &[&Local]) -> Option<IpAddr> {
        let addresses: Vec<Local> = locals.iter().map(|local| (*local).clone()).collect();
        let working = self.sound(now, config, &addresses).map(|s| ip(s.local)).collect::<Vec<_>>();
        let still = self.primary.filter(|primary| working.contains(primary));
        let fewest = |local: &&&Local| {
            let failures = self.remotes().into_iter().map(|to| self.failures(local.ip, to)).min();
            // A subflow that is stuck is one failure more than none.
            let stuck =
                self.seen.subflows.iter().any(|s| ip(s.local) == local.ip && !working.contains(&local.ip));
            (config.is_metered(&local.interface), failures, stuck)
        };
        let chosen = still.or(working.first().copied());
        self.primary = chosen.or_else(|| locals.iter().min_by_key(fewest).map(|local| local.ip));
        self.primary
    }
}

/// How long a better path must work before it is primary again.
const PROOF: Duration = Duration::from_secs(2);
/// How long a primary stays where only round-trip times speak against it.
const SETTLE: Duration = Duration::from_secs(5);

/// An address on the same network is likelier to be reached from here than another.
fn nearest_first(local: &Local, remotes: &[SocketAddr]) -> Vec<SocketAddr> {
    let network = ipnet::IpNet::new(local.ip, local.prefix).ok();
    let mut remotes: Vec<_> =
        remotes.iter().filter(|to| to.is_ipv4() == local.ip.is_ipv4()).copied().collect();
    remotes.sort_by_key(|to| !network.is_some_and(|network| network.contains(&to.ip())));
    remotes
}
