//! How a subflow fares, from one look to the next.

use super::{State, Subflow, Time};
use std::time::Duration;

/// What the looks at a subflow have shown.
#[derive(Debug)]
pub(super) struct Health {
    /// When it was first seen in its present state.
    pub(super) since: Time,
    state: State,
    acked: u64,
    /// When something was last acknowledged, or nothing was under way.
    moved: Time,
    /// When something was last acknowledged or arrived.
    pub(super) progressed: Option<Time>,
    /// The shortest round-trip time that it has had.
    shortest: Duration,
    received: u64,
    /// When something last arrived; `None`: nothing ever did.
    pub(super) heard: Option<Time>,
    /// Something arrived between the last two looks.
    pub(super) hears: bool,
    /// When it may be doubted again that something still arrives, and how often it was doubted for nothing.
    pub(super) doubt: (Time, u32),
    /// When the peer was last told that it is a backup.
    pub(super) told: Time,
}

impl Health {
    pub(super) fn new(now: Time, subflow: &Subflow) -> Self {
        Health {
            since: now,
            state: subflow.state,
            acked: subflow.acked,
            moved: now,
            progressed: None,
            shortest: subflow.rtt,
            received: subflow.received,
            heard: None,
            hears: false,
            doubt: (now, 0),
            told: now,
        }
    }

    /// Takes in another look.
    pub(super) fn look(&mut self, now: Time, subflow: &Subflow) {
        if subflow.state != self.state {
            self.since = now;
            self.state = subflow.state;
            self.shortest = subflow.rtt;
        }
        self.hears = subflow.received != self.received;
        if self.hears || subflow.acked != self.acked {
            self.progressed = Some(now);
        }
        self.shortest = self.shortest.min(subflow.rtt);
        if subflow.in_flight == 0 {
            self.moved = now;
        } else if subflow.acked != self.acked {
            self.moved = now.saturating_sub(subflow.last_ack).max(self.moved);
        }
        self.acked = subflow.acked;
        if self.hears {
            self.heard = Some(now);
            self.received = subflow.received;
            self.doubt = (now, 0);
        }
    }

    /// For how long nothing has been acknowledged of the data that are under way.
    pub(super) fn silence(&self, now: Time) -> Duration {
        now.saturating_sub(self.moved)
    }

    /// Is data under way of which nothing is acknowledged any more? `others` says when another subflow of the connection
    /// last got something through.
    pub(super) fn is_stuck(
        &self,
        now: Time,
        subflow: &Subflow,
        dead_after: Duration,
        others: Option<Time>,
    ) -> bool {
        if subflow.in_flight == 0 {
            return false;
        }
        let silence = self.silence(now);
        let timed_out = subflow.timeouts > 0;
        // It is not the peer, nor this host, that pauses.
        let alone = others.is_some_and(|others| others >= self.moved + dead_after / 2);
        // A timeout comes after more than a round-trip time by itself.
        timed_out && silence >= dead_after.max(subflow.rtt)
            // TCP probes after two round trips (RFC 8985 section 7.2), and the answer takes a third. A single segment is
            // acknowledged when the peer likes to.
            || alone && subflow.in_flight >= BULK && silence >= patience(subflow, dead_after)
            // What still comes through takes ever longer.
            || others.is_some_and(|others| now.saturating_sub(others) < dead_after)
                && timed_out
                && subflow.rtt >= GROWN * self.shortest.max(dead_after / GROWN)
    }
}

/// Segments under way that make a peer acknowledge at once (RFC 5681 section 4.2: every second one).
const BULK: u32 = 3;
/// A round-trip time that has grown so many times.
const GROWN: u32 = 4;

/// How long a subflow may be silent before its path is asked.
pub(super) fn patience(subflow: &Subflow, dead_after: Duration) -> Duration {
    dead_after.max(subflow.rtt * 3)
}
