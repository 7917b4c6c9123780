//! What happens in a lab while a scenario runs: path-manager events, bytes over each link and subflow, steps.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use indexmap::IndexMap;
use mptcp::pm::{Event, EventKind, Events, Notice};
use mptcp::socket::canonical;
use mptcp::{Netns, Token};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::link::Link;
use crate::{Lab, Result};

/// All that was seen. Times are since the recording began.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// When the recording began: since 1970, on the clock that captures have.
    pub began: Duration,
    /// Events, in the order in which they came.
    pub events: Vec<Seen>,
    /// Events were lost: their numbers mean nothing.
    pub overrun: bool,
    /// The links' names.
    pub links: Vec<String>,
    /// What the links have carried, about ten times a second.
    pub samples: Vec<Sample>,
    /// The steps that began, in that order.
    pub steps: Vec<StepTimes>,
    /// What each subflow had carried at each look, seen from the node that opened the connection.
    pub subflows: IndexMap<SubflowKey, Vec<SubflowLook>>,
}

/// An event, where and when.
#[derive(Clone, Debug)]
pub struct Seen {
    /// When it was read.
    pub at: Duration,
    /// In whose network namespace.
    pub node: String,
    /// The event.
    pub event: Event,
}

/// What the links have carried since the recording began.
#[derive(Clone, Debug)]
pub struct Sample {
    /// When.
    pub at: Duration,
    /// Bytes from a to b and from b to a for each link, in the order of [`Record::links`].
    pub bytes: Vec<[u64; 2]>,
}

/// A step and its place in the record.
#[derive(Clone, Debug)]
pub struct StepTimes {
    /// Its name.
    pub name: String,
    /// When it began.
    pub began: Duration,
    /// When it ended; a step in the background ends with its program.
    pub ended: Option<Duration>,
    /// How many events there were when it began, and when it ended.
    pub events: (usize, Option<usize>),
    /// What the links had carried when it began, and when it ended.
    pub bytes: (Vec<[u64; 2]>, Option<Vec<[u64; 2]>>),
}

/// A subflow, in the eyes of a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SubflowKey {
    /// The node.
    pub node: String,
    /// Of which connection.
    pub token: Token,
    /// The node's own end.
    pub local: SocketAddr,
    /// The peer's end.
    pub remote: SocketAddr,
}

/// What a subflow had carried, payload and retransmissions: twenty looks a second, and one where a step begins or ends.
#[derive(Clone, Copy, Debug)]
pub struct SubflowLook {
    /// When.
    pub at: Duration,
    /// Bytes that the node had sent and received.
    pub bytes: [u64; 2],
}

/// The connection that a record speaks of: a token in one namespace.
#[derive(Clone, Debug, Default)]
pub(crate) struct Connection {
    pub(crate) token: Option<Token>,
    pub(crate) subflows: Vec<(SocketAddr, SocketAddr)>,
}

impl Record {
    /// The part of the step `name`.
    pub fn step(&self, name: &str) -> Option<&StepTimes> {
        self.steps.iter().find(|step| step.name == name)
    }

    /// The connections that began in `node`, during the step `during` if one is given.
    pub(crate) fn connections(&self, node: &str, during: Option<&str>) -> Vec<Connection> {
        let range = match during {
            None => 0..self.events.len(),
            Some(name) => {
                self.step(name).map_or(0..0, |step| step.events.0..step.events.1.unwrap_or(self.events.len()))
            }
        };
        let began = self.events[range].iter().filter(|seen| seen.node == node);
        let created = began.filter(|seen| seen.event.kind == EventKind::Created);
        created
            .map(|seen| {
                let token = seen.event.token;
                let opened = [EventKind::Established, EventKind::SubflowEstablished];
                let of_it = self.events_of(node, token).filter(|event| opened.contains(&event.kind));
                Connection { token, subflows: of_it.filter_map(ends).collect() }
            })
            .collect()
    }

    /// The events in `node` that speak of the connection `token`.
    pub(crate) fn events_of(&self, node: &str, token: Option<Token>) -> impl Iterator<Item = &Event> {
        self.events
            .iter()
            .filter(move |seen| seen.node == node && seen.event.token == token)
            .map(|seen| &seen.event)
    }

    /// The events that began connections of whose end their node has not been told.
    pub(crate) fn open(&self) -> Vec<&Seen> {
        let mut open = HashMap::new();
        for seen in &self.events {
            let connection = (&seen.node, seen.event.token);
            match seen.event.kind {
                EventKind::Created => drop(open.insert(connection, seen)),
                EventKind::Closed => drop(open.remove(&connection)),
                _ => {}
            }
        }
        open.into_values().collect()
    }

    /// What each link carried lately, over `window`: both directions together, in bits per second.
    pub(crate) fn rates(&self, window: Duration) -> Vec<(String, f64)> {
        let Some(last) = self.samples.last() else { return Vec::new() };
        let begins = |sample: &&Sample| last.at.saturating_sub(sample.at) >= window;
        let first = self.samples.iter().rev().find(begins).unwrap_or(&self.samples[0]);
        let seconds = (last.at - first.at).as_secs_f64().max(0.001);
        let sum = |sample: &Sample, link: usize| sample.bytes[link].iter().sum::<u64>();
        let rate = |link| sum(last, link).saturating_sub(sum(first, link)) as f64 * 8.0 / seconds;
        self.links.iter().cloned().enumerate().map(|(link, name)| (name, rate(link))).collect()
    }

    /// The connections that nodes have opened and that are not closed yet.
    fn dialed(&self) -> HashMap<String, HashSet<Token>> {
        let mut dialed = HashMap::<_, HashSet<_>>::new();
        for seen in self.open().into_iter().filter(|seen| seen.event.server_side != Some(true)) {
            dialed.entry(seen.node.clone()).or_default().extend(seen.event.token);
        }
        dialed
    }
}

/// Both ends of the subflow that `event` speaks of.
fn ends(event: &Event) -> Option<(SocketAddr, SocketAddr)> {
    let end = |ip: Option<IpAddr>, port: Option<u16>| Some(canonical(SocketAddr::new(ip?, port?)));
    Some((end(event.local_ip, event.local_port)?, end(event.remote_ip, event.remote_port)?))
}

/// Fills a [`Record`] until it is dropped.
pub(crate) struct Recorder {
    started: Instant,
    links: Vec<(Weak<Link>, [u64; 2])>,
    nodes: IndexMap<String, Netns>,
    record: Arc<Mutex<Record>>,
    changed: watch::Receiver<()>,
    readers: Vec<mpsc::Sender<oneshot::Sender<()>>>,
    _tasks: JoinSet<()>,
}

impl Recorder {
    /// Subscribes to the events of all nodes of `lab`.
    pub(crate) fn start(lab: &Lab) -> Result<Self> {
        let started = Instant::now();
        let record = Record {
            began: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default(),
            links: lab.links().keys().cloned().collect(),
            ..Record::default()
        };
        let record = Arc::new(Mutex::new(record));
        let (changes, changed) = watch::channel(());
        let changes = Arc::new(changes);
        let mut tasks = JoinSet::new();
        let mut readers = Vec::new();
        for (node, netns) in lab.nodes() {
            let events = Events::subscribe(netns)?;
            let (flush, flushes) = mpsc::channel(1);
            readers.push(flush);
            let reader = Reader {
                node: node.clone(),
                started,
                record: Arc::clone(&record),
                changes: Arc::clone(&changes),
            };
            tasks.spawn(reader.run(events, flushes));
        }
        let mut links = Vec::new();
        for link in lab.links().values() {
            links.push((Arc::downgrade(link), counters(link)));
        }
        tasks.spawn(sample_links(started, links.clone(), Arc::clone(&record)));
        tasks.spawn(sample_subflows(started, lab.nodes().clone(), Arc::clone(&record)));
        let nodes = lab.nodes().clone();
        Ok(Recorder { started, links, nodes, record, changed, readers, _tasks: tasks })
    }

    /// The record up to now.
    pub(crate) fn record(&self) -> MutexGuard<'_, Record> {
        lock(&self.record)
    }

    /// The place of `moment` in the record.
    pub(crate) fn at(&self, moment: Instant) -> Duration {
        moment.saturating_duration_since(self.started)
    }

    /// Waits until `enough` says so of the record; tried anew with each event.
    pub(crate) async fn wait_for(&self, mut enough: impl FnMut(&Record) -> bool) {
        let mut changed = self.changed.clone();
        loop {
            changed.mark_unchanged();
            if enough(&self.record()) {
                return;
            }
            if changed.changed().await.is_err() {
                // The readers have ended with an error, which the record shows as an overrun.
                return;
            }
        }
    }

    /// Notes that a step begins.
    pub(crate) async fn begin(&self, name: &str) {
        self.flush().await;
        look_at_subflows(self.started, &self.nodes, &self.record).await;
        let (began, bytes) = (self.started.elapsed(), link_bytes(&self.links));
        let mut record = self.record();
        let events = (record.events.len(), None);
        record.steps.push(StepTimes { name: name.into(), began, ended: None, events, bytes: (bytes, None) });
    }

    /// Notes that a step ends.
    pub(crate) async fn end(&self, name: &str) {
        self.flush().await;
        look_at_subflows(self.started, &self.nodes, &self.record).await;
        let (ended, bytes) = (self.started.elapsed(), link_bytes(&self.links));
        let mut record = self.record();
        let events = record.events.len();
        if let Some(step) = record.steps.iter_mut().find(|step| step.name == name) {
            step.ended = Some(ended);
            step.events.1 = Some(events);
            step.bytes.1 = Some(bytes);
        }
    }

    /// Waits until all events that the kernel has sent so far are in the record.
    async fn flush(&self) {
        // The runtime learns from the kernel that a socket has something to read when it has nothing else to do.
        tokio::time::sleep(Duration::from_millis(1)).await;
        for reader in &self.readers {
            let (done, is_done) = oneshot::channel();
            if reader.send(done).await.is_ok() {
                let _ = is_done.await;
            }
        }
    }
}

struct Reader {
    node: String,
    started: Instant,
    record: Arc<Mutex<Record>>,
    changes: Arc<watch::Sender<()>>,
}

impl Reader {
    async fn run(self, mut events: Events, mut flushes: mpsc::Receiver<oneshot::Sender<()>>) {
        loop {
            tokio::select! {
                // A flush is answered only when there is nothing to read.
                biased;
                notice = events.next() => {
                    let at = self.started.elapsed();
                    let mut record = lock(&self.record);
                    match notice {
                        Ok(Notice::Event(event)) => record.events.push(Seen { at, node: self.node.clone(), event }),
                        Ok(Notice::Overrun) => record.overrun = true,
                        Err(error) => {
                            tracing::warn!(%error, node = self.node, "no more events");
                            record.overrun = true;
                            return;
                        }
                    }
                    drop(record);
                    self.changes.send_replace(());
                }
                Some(done) = flushes.recv() => {
                    let _ = done.send(());
                }
            }
        }
    }
}

async fn sample_links(started: Instant, links: Vec<(Weak<Link>, [u64; 2])>, record: Arc<Mutex<Record>>) {
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    loop {
        tick.tick().await;
        let sample = Sample { at: started.elapsed(), bytes: link_bytes(&links) };
        lock(&record).samples.push(sample);
    }
}

async fn sample_subflows(started: Instant, nodes: IndexMap<String, Netns>, record: Arc<Mutex<Record>>) {
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        look_at_subflows(started, &nodes, &record).await;
    }
}

async fn look_at_subflows(started: Instant, nodes: &IndexMap<String, Netns>, record: &Mutex<Record>) {
    let dialed = lock(record).dialed();
    for (node, tokens) in dialed {
        // A look that fails shows less, and decides nothing.
        let Ok(connections) = mptcp::diag::connections_without_owners(&nodes[&node]).await else { continue };
        let at = started.elapsed();
        let mut record = lock(record);
        for connection in connections.into_iter().filter(|connection| tokens.contains(&connection.token)) {
            // One that nobody has answered yet is none.
            for subflow in connection.subflows.into_iter().filter(|subflow| subflow.state != "SYN-SENT") {
                let [local, remote] = [subflow.local, subflow.remote].map(canonical);
                let key = SubflowKey { node: node.clone(), token: connection.token, local, remote };
                let bytes = [subflow.tcp.bytes_sent, subflow.tcp.bytes_received];
                record.subflows.entry(key).or_default().push(SubflowLook { at, bytes });
            }
        }
    }
}

/// What each link has carried since its counters were those given beside it.
fn link_bytes(links: &[(Weak<Link>, [u64; 2])]) -> Vec<[u64; 2]> {
    links
        .iter()
        .map(|(link, [a_to_b, b_to_a])| {
            let now = link.upgrade().map_or([0; 2], |link| counters(&link));
            [now[0].saturating_sub(*a_to_b), now[1].saturating_sub(*b_to_a)]
        })
        .collect()
}

fn counters(link: &Link) -> [u64; 2] {
    match link.counters() {
        Ok(counters) => [counters.a_to_b_bytes, counters.b_to_a_bytes],
        Err(error) => {
            tracing::warn!(%error, "a link's counters are missing");
            [0; 2]
        }
    }
}

fn lock(record: &Mutex<Record>) -> MutexGuard<'_, Record> {
    record.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_the_mean_over_the_window_and_over_less_at_the_beginning() {
        let samples = (0..=30).map(|n: u64| Sample {
            at: Duration::from_millis(100 * n),
            // 10 Mbit/s for two seconds, then a fifth of it, half of it each way.
            bytes: vec![[62_500 * n.min(20) + 12_500 * n.saturating_sub(20); 2]],
        });
        let mut record =
            Record { links: vec!["wifi".into()], samples: samples.collect(), ..Record::default() };
        let rates = |record: &Record| record.rates(Duration::from_secs(1));
        assert_eq!(rates(&record), [("wifi".into(), 2e6)]);
        record.samples.truncate(5);
        assert_eq!(rates(&record), [("wifi".into(), 10e6)]);
        record.samples.clear();
        assert!(rates(&record).is_empty());
    }
}
