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
        }
        if subflow.acked != self.acked || subflow.in_flight == 0 {
            self.moved = now;
            self.acked = subflow.acked;
        }
        self.hears = subflow.received != self.received;
        if self.hears {
            self.heard = Some(now);
            self.received = subflow.received;
            self.doubt = (now, 0);
        }
    }

    /// Is data under way that was sent again, and of which nothing was acknowledged for too long?
    pub(super) fn is_stuck(&self, now: Time, subflow: &Subflow, dead_after: Duration) -> bool {
        subflow.in_flight > 0
            && subflow.timeouts > 0
            // A timeout comes after more than a round-trip time by itself.
            && now.saturating_sub(self.moved) >= dead_after.max(subflow.rtt)
    }
}

/// How long a subflow may be silent before its path is asked.
pub(super) fn patience(subflow: &Subflow, dead_after: Duration) -> Duration {
    dead_after.max(subflow.rtt * 3)
}
