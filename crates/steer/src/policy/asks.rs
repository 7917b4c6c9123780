//! Paths that have fallen silent, and are asked whether they work again before a connection's subflow is opened there.
//!
//! An attempt to open a subflow in vain is dear: when it ends, the kernel sends all that the connection has not got
//! acknowledged once more (`__mptcp_retransmit_pending_data()`). A question costs two segments, for all connections.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::Time;

/// What was asked and answered, by path.
#[derive(Debug, Default)]
pub(super) struct Asks(BTreeMap<(IpAddr, SocketAddr), Ask>);

#[derive(Debug)]
struct Ask {
    asked: Time,
    answered: Option<Time>,
}

impl Asks {
    /// Is it time to ask, where it is done once in `pause`? Then it counts as asked.
    pub(super) fn is_due(&mut self, now: Time, local: IpAddr, remote: SocketAddr, pause: Duration) -> bool {
        let ask = self.0.entry((local, remote));
        let is_new = matches!(ask, std::collections::btree_map::Entry::Vacant(_));
        let ask = ask.or_insert(Ask { asked: now, answered: None });
        let due = is_new || now.saturating_sub(ask.asked) >= pause;
        if due {
            ask.asked = now;
        }
        due
    }

    pub(super) fn answered(&mut self, now: Time, local: IpAddr, remote: SocketAddr) {
        if let Some(ask) = self.0.get_mut(&(local, remote)) {
            ask.answered = Some(now);
        }
    }

    /// Has the path answered after `since`?
    pub(super) fn works(&self, local: IpAddr, remote: SocketAddr, since: Time) -> bool {
        self.0.get(&(local, remote)).and_then(|ask| ask.answered).is_some_and(|answered| answered > since)
    }

    /// Forgets paths that nobody asks for any more.
    pub(super) fn tidy(&mut self, now: Time) {
        self.0.retain(|_, ask| now.saturating_sub(ask.asked) < FORGET);
    }
}

/// Longer than between any two questions.
const FORGET: Duration = Duration::from_secs(120);
