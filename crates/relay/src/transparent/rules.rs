//! What the kernel is to do for a transparent service: an nft table and policy routing, as text.

use std::fmt::{self, Write};

use ipnet::IpNet;
use mptcp::socket::Protocol;

use super::{Capture, PortRange, Traffic};
use crate::config::{Listen, Net, Service};

/// `SO_MARK` of what transparent services dial: the rules leave it alone, so that nothing goes round in circles.
/// It is the same for all of them on a host: they don't take each other's connections either.
pub const OWN_MARK: u32 = MARKS;

/// Marks of this program: these 16 bits ("BR"), then the port of the transparent service, or 0.
const MARKS: u32 = 0x4252_0000;

/// The rules of one transparent service. `Display` writes them as a file for nft(8), the commands for ip(8) in
/// comments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    port: u16,
    ipv6: bool,
    /// The listener speaks MPTCP.
    mptcp: bool,
    /// Local connections have been redirected. Their chain must stay then, with a redirect in it: with the last
    /// rule that needs it (`nft_redir_destroy`) connection tracking goes, and live connections break.
    redirects: bool,
    capture: Capture,
}

impl Rules {
    /// The rules of `service`, if it is transparent.
    pub fn of(service: &Service) -> Option<Self> {
        let capture = service.transparent.clone()?;
        let Listen { protocol, addr } = service.listen;
        Some(Rules {
            port: addr.port(),
            ipv6: addr.is_ipv6(),
            mptcp: protocol == Protocol::Mptcp,
            redirects: capture.takes(Traffic::Local),
            capture,
        })
    }

    /// The same for a host without IPv6.
    pub fn without_ipv6(self) -> Self {
        Rules { ipv6: false, ..self }
    }

    /// The same listener's rules for another `capture`.
    pub fn with(self, capture: &Capture) -> Self {
        let redirects = self.redirects || capture.takes(Traffic::Local);
        Rules { capture: capture.clone(), redirects, ..self }
    }

    /// Name of the nft table.
    pub fn table(&self) -> String {
        table(self.port)
    }

    /// The listener's port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Mark of packets to deliver here although they are for others; also the number of the routing table
    /// that says so.
    pub fn mark(&self) -> u32 {
        mark(self.port)
    }

    /// The commands that set up policy routing, each the arguments of ip(8).
    pub fn routing(&self) -> Vec<String> {
        // A dead process may have left the route (its rule not, see `Diversion::install`).
        self.routing_commands("replace", "add")
    }

    /// The commands that remove what [`Rules::routing`] makes.
    pub fn undo_routing(&self) -> Vec<String> {
        self.routing_commands("del", "del")
    }

    fn routing_commands(&self, route: &str, rule: &str) -> Vec<String> {
        let mark = self.mark();
        let families = FAMILIES.iter().filter(|family| self.ipv6 || family.digit == 4);
        let commands = families.flat_map(|Family { ip_flag, .. }| {
            [
                format!("{ip_flag} route {route} local default dev lo table {mark}"),
                format!("{ip_flag} rule {rule} fwmark {mark:#x} lookup {mark}"),
            ]
        });
        commands.collect()
    }

    /// The table, replacing an older one of the same name in the same transaction. `owner`: it belongs to the
    /// process that makes it and ends with it. Without `divert` it only keeps connections that are diverted
    /// already.
    pub fn nft(&self, owner: bool, divert: bool) -> String {
        self.write_nft(owner, divert).expect("writing to a String does not fail")
    }

    fn write_nft(&self, owner: bool, divert: bool) -> Result<String, fmt::Error> {
        let Rules { port, capture, .. } = self;
        let (name, mark) = (self.table(), self.mark());
        let mut text = String::new();
        let t = &mut text;
        let (block, flags) = if owner { (" { flags owner; }", "    flags owner\n") } else { ("", "") };
        // The first line is there so that the second has something to delete.
        write!(t, "table inet {name}{block}\ndelete table inet {name}\ntable inet {name} {{\n{flags}")?;
        self.write_sets(t)?;
        writeln!(t, "    chain forwarded {{")?;
        writeln!(t, "        type filter hook prerouting priority mangle")?;
        writeln!(t, "        meta l4proto != tcp return")?;
        writeln!(t, "        tcp dport {port} return # the listener's own")?;
        let going_on = "tcp flags & (fin | syn | rst | ack) != syn";
        writeln!(
            t,
            "        {going_on} socket transparent 1 meta mark set {mark:#x} accept # diverted already"
        )?;
        if divert && capture.takes(Traffic::Forwarded) {
            writeln!(t, "        {going_on} return # began without us")?;
            if !capture.interfaces.is_empty() {
                let names: Vec<_> = capture.interfaces.iter().map(|name| format!("\"{name}\"")).collect();
                writeln!(t, "        iifname != {{ {} }} return", names.join(", "))?;
            }
            self.write_nets(t, "saddr", "from", &capture.from_cidr)?;
            self.write_filters(t)?;
            // Where nobody listens, tproxy ends the rule and the packet goes its way, unmarked.
            writeln!(t, "        meta l4proto tcp tproxy to :{port} meta mark set {mark:#x} accept")?;
        }
        writeln!(t, "    }}")?;
        if self.redirects {
            writeln!(t, "    chain local {{")?;
            writeln!(t, "        type nat hook output priority -100")?;
            if !(divert && capture.takes(Traffic::Local)) {
                writeln!(t, "        return # nothing new")?;
            }
            writeln!(t, "        meta l4proto != tcp return")?;
            writeln!(t, "        meta mark {OWN_MARK:#x} return # what transparent services dial")?;
            writeln!(t, "        tcp dport {port} return # the listener's own")?;
            writeln!(t, "        {going_on} return # began without us")?;
            self.write_filters(t)?;
            writeln!(t, "        meta l4proto tcp redirect to :{port}")?;
            writeln!(t, "    }}")?;
        }
        writeln!(t, "}}")?;
        Ok(text)
    }

    fn write_sets(&self, t: &mut String) -> fmt::Result {
        let mut set = |name: &str, kind: &str, elements: Vec<String>| match elements.is_empty() {
            true => Ok(()),
            false => writeln!(
                t,
                "    set {name} {{\n        type {kind}\n        flags interval\n        auto-merge\n        elements = {{ {} }}\n    }}",
                elements.join(", ")
            ),
        };
        let ports = self.capture.ports.iter().map(PortRange::to_string);
        set("ports", "inet_service", ports.collect())?;
        for family in &FAMILIES {
            for (name, nets) in [("to", &self.capture.to_cidr), ("from", &self.capture.from_cidr)] {
                let elements =
                    nets.iter().filter(|net| family.holds(net)).map(|Net(net)| net.trunc().to_string());
                set(&format!("{name}{}", family.digit), family.set_type, elements.collect())?;
            }
        }
        Ok(())
    }

    /// What both kinds of traffic are left alone for.
    fn write_filters(&self, t: &mut String) -> fmt::Result {
        if !self.ipv6 {
            writeln!(t, "        meta nfproto != ipv4 return")?;
        }
        writeln!(t, "        fib daddr type local return # for this host itself")?;
        self.write_nets(t, "daddr", "to", &self.capture.to_cidr)?;
        if !self.capture.ports.is_empty() {
            writeln!(t, "        tcp dport != @ports return")?;
        }
        if !self.mptcp {
            // A TCP listener never has a connection that subflows could join.
            writeln!(t, "        tcp option mptcp subtype 1 return # joins somebody else's connection")?;
        }
        Ok(())
    }

    fn write_nets(&self, t: &mut String, field: &str, set: &str, nets: &[Net]) -> fmt::Result {
        if nets.is_empty() {
            return Ok(());
        }
        for family in &FAMILIES {
            match nets.iter().any(|net| family.holds(net)) {
                true => writeln!(t, "        {} {field} != @{set}{} return", family.nft, family.digit)?,
                false => writeln!(t, "        meta nfproto {} return", family.nfproto)?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for command in self.routing() {
            writeln!(f, "# ip {command}")?;
        }
        f.write_str(&self.nft(false, true))
    }
}

/// The port of the transparent service whose policy routing rule this line of `ip rule` shows.
pub(super) fn port_of_rule(line: &str) -> Option<u16> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let after = |key: &str| words.iter().position(|word| *word == key).and_then(|at| words.get(at + 1));
    let mark = u32::from_str_radix(after("fwmark")?.strip_prefix("0x")?, 16).ok()?;
    // Ours are the rules whose mark and table are the same number out of our range.
    let ours = mark & 0xffff_0000 == MARKS && *after("lookup")? == mark.to_string();
    ours.then_some(mark as u16)
}

pub(super) fn mark(port: u16) -> u32 {
    MARKS | u32::from(port)
}

pub(super) fn table(port: u16) -> String {
    format!("braid_{port}")
}

/// How the tools name an address family.
pub(super) struct Family {
    digit: u8,
    pub(super) ip_flag: &'static str,
    nft: &'static str,
    nfproto: &'static str,
    set_type: &'static str,
}

pub(super) static FAMILIES: [Family; 2] = [
    Family { digit: 4, ip_flag: "-4", nft: "ip", nfproto: "ipv4", set_type: "ipv4_addr" },
    Family { digit: 6, ip_flag: "-6", nft: "ip6", nfproto: "ipv6", set_type: "ipv6_addr" },
];

impl Family {
    fn holds(&self, net: &Net) -> bool {
        match net.0 {
            IpNet::V4(_) => self.digit == 4,
            IpNet::V6(_) => self.digit == 6,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_of_ours_is_told_from_others() {
        for (line, port) in [
            ("32765:\tfrom all fwmark 0x425215b3 lookup 1112675763", Some(5555)),
            ("32765:\tfrom all fwmark 0x425215b3 lookup 1112675764", None),
            ("32765:\tfrom all fwmark 0x425215b3 lookup main", None),
            ("32765:\tfrom all fwmark 0x425215b3/0xffff lookup 1112675763", None),
            ("32765:\tfrom all fwmark 0x15b3 lookup 5555", None),
            ("32766:\tfrom all lookup main", None),
            ("", None),
        ] {
            assert_eq!(port_of_rule(line), port, "{line}");
        }
    }
}
