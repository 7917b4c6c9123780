//! The kernel's counters about MPTCP, and those about TCP that tell something about subflows
//! (`/proc/net/netstat` and `/proc/net/snmp`), each with what a rising value means.

use std::fs;

use serde::Serialize;

use crate::{Error, Netns, Result};

/// What a counter is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    /// Connections opened and accepted as MPTCP.
    Established,
    /// Connections that went on as TCP, and why.
    Fallback,
    /// Subflows that joined a connection.
    Joined,
    /// Joins that were refused or failed, and why.
    Refused,
    /// Addresses announced and withdrawn, subflows reprioritised and removed.
    Address,
    /// Resets and aborts.
    Reset,
    /// Subflows that stopped working, and those that came back.
    Stale,
    /// How data was put together from the subflows.
    Data,
    /// TCP; subflows are counted with other connections.
    Tcp,
    /// Counters of newer kernels.
    Other,
}

/// A counter and its value. All but [`MPTcpExtMPCurrEstab`](TABLE) only rise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Counter {
    /// As nstat(8) names it: the line's name in the file, and the column's.
    pub name: String,
    /// What it is about.
    pub group: Group,
    /// Its value since the namespace began.
    pub value: u64,
    /// What a rising value means, one sentence; empty for [`Group::Other`].
    pub meaning: &'static str,
}

/// Reads the counters of `netns`: those of [`TABLE`] that the kernel has, in its order, then those of MPTCP that
/// the table lacks. Needs no privilege beyond entering the namespace.
///
/// [`Error::Unsupported`] where the kernel has no MPTCP, or none that counts.
pub fn read(netns: &Netns) -> Result<Vec<Counter>> {
    let what = || format!("read the counters of network namespace {}", netns.name());
    // /proc/net would be that of the main thread, which may be in another namespace.
    let texts =
        netns.run(|| FILES.map(|name| fs::read_to_string(format!("/proc/thread-self/net/{name}"))))?;
    let mut values = Vec::new();
    for text in texts {
        let text = text.map_err(|e| Error::io(what(), e))?;
        let read = parse(&text).map_err(|detail| Error::Malformed { what: what(), detail })?;
        values.extend(read);
    }
    if !values.iter().any(|(name, _)| name.starts_with(MPTCP)) {
        return Err(Error::Unsupported { what: what(), feature: "counters of MPTCP", since: "5.7" });
    }
    Ok(explain(values))
}

const FILES: [&str; 2] = ["netstat", "snmp"];
const MPTCP: &str = "MPTcpExt";

/// What is known of the counters: name, group, meaning of a rising value. Source: `net/mptcp/mib.h`,
/// `net/ipv4/proc.c` and the places that count.
pub const TABLE: &[(&str, Group, &str)] = &[
    ("MPTcpExtMPCurrEstab", Group::Established, "MPTCP connections that are established now"),
    ("MPTcpExtMPCapableSYNTX", Group::Established, "this side opens connections as MPTCP"),
    ("MPTcpExtMPCapableSYNACKRX", Group::Established, "servers answer those as MPTCP"),
    ("MPTcpExtMPCapableSYNRX", Group::Established, "clients ask this side for MPTCP"),
    ("MPTcpExtMPCapableACKRX", Group::Established, "accepted connections are MPTCP"),
    (
        "MPTcpExtMPCapableFallbackSYNACK",
        Group::Fallback,
        "servers answer without MPTCP: they don't speak it, or a middlebox removes the option",
    ),
    (
        "MPTcpExtMPCapableFallbackACK",
        Group::Fallback,
        "clients ask for MPTCP and go on without: a middlebox removes the option from the third ACK",
    ),
    (
        "MPTcpExtMPCapableSYNTXDrop",
        Group::Fallback,
        "SYNs with MPTCP get no answer, and TCP is tried: the server is down, or a middlebox drops them",
    ),
    (
        "MPTcpExtBlackhole",
        Group::Fallback,
        "a path took TCP after it had dropped MPTCP, so MPTCP pauses (net.mptcp.blackhole_timeout)",
    ),
    ("MPTcpExtMPCapableSYNTXDisabled", Group::Fallback, "connections are opened as TCP during that pause"),
    (
        "MPTcpExtMPCapableDataFallback",
        Group::Fallback,
        "the first data comes without MPTCP: a middlebox removes the option after the handshake",
    ),
    (
        "MPTcpExtDssFallback",
        Group::Fallback,
        "data comes with a bad mapping or none: a middlebox alters the stream",
    ),
    (
        "MPTcpExtDSSCorruptionFallback",
        Group::Fallback,
        "mappings contradict one another, on a single subflow",
    ),
    ("MPTcpExtDataCsumErr", Group::Fallback, "checksums of data are wrong: a middlebox alters the payload"),
    ("MPTcpExtMPFailTx", Group::Fallback, "this side tells the peer of a wrong checksum (MP_FAIL)"),
    ("MPTcpExtMPFailRx", Group::Fallback, "the peer tells of a wrong checksum (MP_FAIL)"),
    ("MPTcpExtInfiniteMapTx", Group::Fallback, "this side goes on as TCP after a wrong checksum"),
    ("MPTcpExtInfiniteMapRx", Group::Fallback, "the peer goes on as TCP after a wrong checksum"),
    (
        "MPTcpExtMD5SigFallback",
        Group::Fallback,
        "sockets have TCP MD5 signatures, which leave no room for MPTCP",
    ),
    ("MPTcpExtSimultConnectFallback", Group::Fallback, "two hosts connect to one another at the same moment"),
    ("MPTcpExtMPFallbackTokenInit", Group::Fallback, "no free token is found for a new connection"),
    ("MPTcpExtFallbackFailed", Group::Fallback, "a fallback comes too late, and the subflow is reset"),
    ("MPTcpExtMPJoinSynTx", Group::Joined, "this side opens more subflows"),
    ("MPTcpExtMPJoinSynAckRx", Group::Joined, "the peer answers those"),
    ("MPTcpExtMPJoinSynAckBackupRx", Group::Joined, "the peer answers those as backups"),
    ("MPTcpExtMPJoinSynRx", Group::Joined, "the peer opens more subflows"),
    ("MPTcpExtMPJoinSynBackupRx", Group::Joined, "the peer opens subflows as backups"),
    ("MPTcpExtMPJoinAckRx", Group::Joined, "subflows that the peer opened are established"),
    ("MPTcpExtMPJoinPortSynRx", Group::Joined, "the peer opens subflows to an announced port"),
    ("MPTcpExtMPJoinPortSynAckRx", Group::Joined, "the peer answers from an announced port"),
    ("MPTcpExtMPJoinPortAckRx", Group::Joined, "subflows to an announced port are established"),
    (
        "MPTcpExtMPJoinNoTokenFound",
        Group::Refused,
        "joins name a connection that is not here: it has ended, or a load balancer chose the wrong host",
    ),
    (
        "MPTcpExtMPJoinRejected",
        Group::Refused,
        "the path manager here refuses joins: the limit of subflows is reached, or nobody listens to its events",
    ),
    (
        "MPTcpExtMPJoinSynAckHMacFailure",
        Group::Refused,
        "the peer of a join does not know the connection's key",
    ),
    (
        "MPTcpExtMPJoinAckHMacFailure",
        Group::Refused,
        "the opener of a join does not know the connection's key",
    ),
    ("MPTcpExtMPJoinSynTxCreatSkErr", Group::Refused, "no socket can be made for a join from here"),
    ("MPTcpExtMPJoinSynTxBindErr", Group::Refused, "an endpoint's address or port is not free on this host"),
    ("MPTcpExtMPJoinSynTxConnectErr", Group::Refused, "there is no route from an endpoint to the peer"),
    ("MPTcpExtMismatchPortSynRx", Group::Refused, "joins come to a port that was not announced (SYN)"),
    ("MPTcpExtMismatchPortAckRx", Group::Refused, "joins come to a port that was not announced (ACK)"),
    (
        "MPTcpExtMPCapableEndpAttempt",
        Group::Refused,
        "clients open connections on the port of an endpoint, which takes joins only",
    ),
    ("MPTcpExtAddAddrTx", Group::Address, "this side announces addresses"),
    ("MPTcpExtEchoAdd", Group::Address, "the peer confirms those"),
    ("MPTcpExtAddAddrTxDrop", Group::Address, "announcements don't go out, for lack of room or memory"),
    ("MPTcpExtAddAddr", Group::Address, "the peer announces addresses"),
    ("MPTcpExtPortAdd", Group::Address, "the peer announces addresses with a port"),
    ("MPTcpExtEchoAddTx", Group::Address, "this side confirms the peer's"),
    ("MPTcpExtEchoAddTxDrop", Group::Address, "confirmations don't go out, for lack of room or memory"),
    (
        "MPTcpExtAddAddrDrop",
        Group::Address,
        "the peer's announcements are ignored (limit add_addr_accepted, or too many)",
    ),
    ("MPTcpExtRmAddrTx", Group::Address, "this side withdraws addresses"),
    ("MPTcpExtRmAddrTxDrop", Group::Address, "withdrawals don't go out, for lack of room or memory"),
    ("MPTcpExtRmAddr", Group::Address, "the peer withdraws addresses"),
    ("MPTcpExtRmAddrDrop", Group::Address, "the peer's withdrawals are ignored, since too many came at once"),
    ("MPTcpExtRmSubflow", Group::Address, "subflows are closed by the path manager here"),
    ("MPTcpExtMPPrioTx", Group::Address, "this side makes subflows backups, or ends that"),
    ("MPTcpExtMPPrioRx", Group::Address, "the peer makes subflows backups, or ends that"),
    ("MPTcpExtMPRstTx", Group::Reset, "this side resets subflows"),
    ("MPTcpExtMPRstRx", Group::Reset, "the peer resets subflows"),
    ("MPTcpExtMPFastcloseTx", Group::Reset, "this side aborts whole connections"),
    ("MPTcpExtMPFastcloseRx", Group::Reset, "the peer aborts whole connections"),
    ("MPTcpExtDSSCorruptionReset", Group::Reset, "mappings contradict one another, and the subflow is reset"),
    (
        "MPTcpExtSubflowStale",
        Group::Stale,
        "subflows stop delivering and are passed over (net.mptcp.stale_loss_cnt)",
    ),
    ("MPTcpExtSubflowRecover", Group::Stale, "stale subflows deliver again"),
    (
        "MPTcpExtMPTCPRetrans",
        Group::Data,
        "data is sent again on another subflow, since its own does not deliver",
    ),
    (
        "MPTcpExtOFOQueueTail",
        Group::Data,
        "data overtakes on another subflow and waits, in order with what waits",
    ),
    ("MPTcpExtOFOQueue", Group::Data, "data overtakes on another subflow and waits"),
    ("MPTcpExtOFOMerge", Group::Data, "waiting data is merged"),
    ("MPTcpExtDuplicateData", Group::Data, "data comes twice, on two subflows"),
    ("MPTcpExtNoDSSInWindow", Group::Data, "data comes that is outside the connection's window"),
    ("MPTcpExtDSSNotMatching", Group::Data, "a mapping contradicts the one before"),
    ("MPTcpExtDSSNoMatchTCP", Group::Data, "a mapping does not fit TCP's sequence numbers"),
    (
        "MPTcpExtSndWndShared",
        Group::Data,
        "a subflow sends by the connection's window, which is larger than its own",
    ),
    ("MPTcpExtRcvWndShared", Group::Data, "a subflow announces the connection's window instead of its own"),
    (
        "MPTcpExtRcvWndConflictUpdate",
        Group::Data,
        "two subflows move the receive window at once, and one tries again",
    ),
    ("MPTcpExtRcvWndConflict", Group::Data, "two subflows move the receive window at once"),
    ("MPTcpExtWinProbe", Group::Data, "the peer's window is closed: it reads too slowly, and is probed"),
    ("MPTcpExtRcvPruned", Group::Data, "data is dropped for lack of receive memory"),
    ("TcpRetransSegs", Group::Tcp, "segments are sent again: loss, or delay that looks like it"),
    ("TcpExtTCPTimeouts", Group::Tcp, "acknowledgements stay away until the timer fires"),
    ("TcpExtTCPSynRetrans", Group::Tcp, "SYNs and SYN-ACKs get no answer at first"),
    (
        "TcpExtTCPAbortOnTimeout",
        Group::Tcp,
        "connections or subflows are given up after too many retransmissions",
    ),
    ("TcpAttemptFails", Group::Tcp, "connections or subflows fail before they are established"),
    ("TcpEstabResets", Group::Tcp, "established connections or subflows are reset"),
    ("TcpOutRsts", Group::Tcp, "this side sends resets"),
    ("TcpExtListenOverflows", Group::Tcp, "a server does not accept as fast as clients come"),
    ("TcpExtListenDrops", Group::Tcp, "a listener drops SYNs, for that or another reason"),
    ("TcpExtTCPRcvQDrop", Group::Tcp, "segments are dropped, since the receive queue is full"),
];

/// The pairs of name and value. The files have two lines for each kind: `Kind: NAME NAME…`, `Kind: VALUE VALUE…`.
fn parse(text: &str) -> Result<Vec<(String, u64)>, String> {
    let mut values = Vec::new();
    let mut lines = text.lines();
    while let (Some(names), Some(numbers)) = (lines.next(), lines.next()) {
        let (mut names, mut numbers) = (names.split_whitespace(), numbers.split_whitespace());
        let kind = names.next().and_then(|kind| kind.strip_suffix(':')).ok_or("a line without its kind")?;
        numbers.next();
        for name in names {
            let number = numbers.next().ok_or_else(|| format!("{kind}{name} has no value"))?;
            // TcpMaxConn may be -1; no counter is.
            if let Ok(number) = number.parse() {
                values.push((format!("{kind}{name}"), number));
            }
        }
    }
    Ok(values)
}

fn explain(values: Vec<(String, u64)>) -> Vec<Counter> {
    let value = |name: &str| values.iter().find(|(found, _)| found == name).map(|(_, value)| *value);
    let known = TABLE.iter().filter_map(|&(name, group, meaning)| {
        Some(Counter { name: name.into(), group, value: value(name)?, meaning })
    });
    let unknown = values
        .iter()
        .filter(|(name, _)| name.starts_with(MPTCP) && !TABLE.iter().any(|(known, ..)| known == name));
    let unknown = unknown.map(|(name, value)| Counter {
        name: name.clone(),
        group: Group::Other,
        value: *value,
        meaning: "",
    });
    known.chain(unknown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn counters_of_later_kernels_are_kept_by_their_name() {
        let text = "TcpExt: TCPTimeouts Other\nTcpExt: 3 4\nMPTcpExt: New MPCurrEstab\nMPTcpExt: 5 6\n";
        let found: Vec<_> =
            explain(parse(text).unwrap()).into_iter().map(|c| (c.name, c.group, c.value)).collect();
        assert_eq!(
            found,
            [
                ("MPTcpExtMPCurrEstab".into(), Group::Established, 6),
                ("TcpExtTCPTimeouts".into(), Group::Tcp, 3),
                ("MPTcpExtNew".into(), Group::Other, 5),
            ]
        );
    }

    #[test]
    fn a_name_without_its_value_is_an_error() {
        assert_eq!(parse("MPTcpExt: A B\nMPTcpExt: 1\n").unwrap_err(), "MPTcpExtB has no value");
    }

    #[test]
    fn every_name_stands_once_and_groups_stand_together() {
        let mut names: Vec<_> = TABLE.iter().map(|(name, ..)| name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), TABLE.len());
        assert!(TABLE.is_sorted_by_key(|(_, group, _)| group));
    }

    #[test]
    fn no_counter_of_the_kernel_is_left_out() {
        let counters = read(&Netns::current().unwrap()).unwrap();
        let file = fs::read_to_string("/proc/thread-self/net/netstat").unwrap();
        let names = file.lines().find_map(|line| line.strip_prefix("MPTcpExt: ")).unwrap();
        for name in names.split(' ') {
            assert!(counters.iter().any(|c| c.name == format!("MPTcpExt{name}")), "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "([A-Za-z: 0-9\n-]|\\PC){0,200}") {
            let _ = parse(&text);
        }
    }
}
