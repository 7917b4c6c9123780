//! Makes subflows of live connections primary, and looks whether their data follow.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use mptcp::diag::{self, Connection, Owner, Subflow};
use mptcp::pm::{Address, Client};
use mptcp::{Error, Netns, Result, Token};
use serde::Serialize;
use tokio::time::sleep;

use super::drain::Drain;
use super::{Path, Plan, Reason, Via, Wanted, plan};

/// What is to be done to connections.
#[derive(Clone, Debug)]
pub struct Switch {
    /// What they should become.
    pub wanted: Wanted,
    /// How long to look for the effect, and to repeat the command while there is none. Zero: not at all.
    pub wait: Duration,
    /// Bound the send buffers first, so that little is left to drain on the old path; sizes are restored.
    pub drain: bool,
}

/// What came of one connection.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct Report {
    pub token: Token,
    pub owners: Vec<Owner>,
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// Is a connection as it was wanted?
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Outcome {
    /// It is.
    Switched {
        /// The subflows that are primary.
        primary: Vec<Path>,
        /// Microseconds that the first commands took; nothing where all was as wanted before.
        set_us: Option<u64>,
        /// Milliseconds from the commands to the first data that was seen on the primary subflows, in either
        /// direction. Looks are a millisecond or more apart. Nothing where no data moved, or nobody looked.
        first_data_ms: Option<f64>,
        /// The same to the last data that got through on any other subflow.
        last_data_ms: Option<f64>,
        /// How often the commands were repeated because the peer did not follow.
        repeated: u32,
        /// Others still carried data when the time to look was over.
        draining: bool,
    },
    /// It is not.
    NotSteered {
        /// Why.
        reason: Reason,
    },
}

/// Does `switch` to `connections` of `netns`: flags are set at once, and then the kernel is asked again and again
/// what is in effect. Subflows that join meanwhile get their flag too. Needs CAP_NET_ADMIN, and with `drain` the
/// permission to trace the programs.
///
/// A connection that has data to move and moves none of it on the new primary subflow gets its old flags back.
/// What cannot be done to one connection is in its report; an error is what concerns all.
pub async fn switch(netns: &Netns, connections: Vec<Connection>, switch: &Switch) -> Result<Vec<Report>> {
    switch_until(netns, connections, switch, std::future::pending()).await
}

/// The same, but waits no longer when `end` has come. Then a connection on whose new primary subflow nothing has been
/// seen to get through has its old flags again.
pub async fn switch_until(
    netns: &Netns,
    connections: Vec<Connection>,
    switch: &Switch,
    end: impl Future<Output = ()>,
) -> Result<Vec<Report>> {
    let mut end = std::pin::pin!(end);
    let mut ended = false;
    let client = Client::connect(netns).await?;
    let mut drains = Vec::new();
    if switch.drain {
        tokio::select! {
            drained = drain(&client, &connections, switch, &mut drains) => drained?,
            () = &mut end => ended = true,
        }
    }
    let mut now = look(netns).await?;
    let mut all: Vec<Steered> = Vec::new();
    for Connection { token, owners, .. } in connections {
        let mut steered = Steered::new(token, owners, switch.wanted.clone());
        match ended {
            true => steered.outcome = Some(not(Reason::Interrupted)),
            false => steered.follow(&client, now.remove(&token), switch.wait, false).await?,
        }
        all.push(steered);
    }
    while all.iter().any(|steered| steered.outcome.is_none()) {
        let began = Instant::now();
        let mut now = look(netns).await?;
        for steered in all.iter_mut().filter(|steered| steered.outcome.is_none()) {
            steered.follow(&client, now.remove(&steered.token), switch.wait, ended).await?;
        }
        // On a machine with many sockets a look takes its time; most of that is left to others.
        tokio::select! {
            () = sleep((3 * began.elapsed()).max(Duration::from_millis(1))) => {}
            () = &mut end, if !ended => ended = true,
        }
    }
    drop(drains);
    let report = |steered: Steered| {
        let Steered { token, owners, outcome, .. } = steered;
        outcome.map(|outcome| Report { token, owners, outcome })
    };
    Ok(all.into_iter().filter_map(report).collect())
}

/// Bounds the send buffers of the connections that will be switched, and waits until they hold no more.
async fn drain(
    client: &Client,
    connections: &[Connection],
    switch: &Switch,
    drains: &mut Vec<Drain>,
) -> Result<()> {
    for connection in connections {
        if plan(connection, &switch.wanted).is_ok() && client.is_userspace(connection.token).await? {
            drains.extend(Drain::begin(connection)?);
        }
    }
    let began = Instant::now();
    while began.elapsed() < switch.wait && !drains.iter().all(Drain::is_low) {
        sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

async fn look(netns: &Netns) -> Result<HashMap<Token, Connection>> {
    let now = diag::connections_without_owners(netns).await?;
    Ok(now.into_iter().map(|connection| (connection.token, connection)).collect())
}

/// A connection on its way to what is wanted.
struct Steered {
    token: Token,
    owners: Vec<Owner>,
    wanted: Wanted,
    primary: Vec<Path>,
    /// The flags that were changed, as they were.
    before: HashMap<Path, bool>,
    /// When the first command had been given, and how long the first commands took.
    began: Option<(Instant, Duration)>,
    commanded: Instant,
    refused: Option<Error>,
    repeated: u32,
    /// What each subflow had carried when it was first seen, and when it was last seen.
    counters: HashMap<Path, [Counters; 2]>,
    first_data: Option<Duration>,
    /// Data has got through on a primary subflow.
    through: bool,
    /// When data was last seen to get through, on any other subflow and on any at all.
    last_data: Option<Duration>,
    moved: Instant,
    outcome: Option<Outcome>,
}

#[derive(Clone, Copy, PartialEq)]
struct Counters {
    sent: u64,
    acked: u64,
    received: u64,
}

impl Counters {
    fn of(subflow: &Subflow) -> Self {
        let tcp = &subflow.tcp;
        Counters { sent: tcp.bytes_sent, acked: tcp.bytes_acked, received: tcp.bytes_received }
    }

    /// Has anything got through since `before`?
    fn through_since(&self, before: &Counters) -> bool {
        self.acked > before.acked || self.received > before.received
    }
}

/// Nothing has been carried for so long, and two round trips: nothing is on its way.
const QUIET: Duration = Duration::from_millis(50);
/// So long no data moved at all: the program has none to send.
const IDLE: Duration = Duration::from_millis(200);
/// So long the peer may send on an old path, and two round trips, before it is told again. It drains its queue first.
const REPEAT: Duration = Duration::from_millis(100);

impl Steered {
    fn new(token: Token, owners: Vec<Owner>, wanted: Wanted) -> Self {
        let now = Instant::now();
        Steered {
            token,
            owners,
            wanted,
            primary: Vec::new(),
            before: HashMap::new(),
            began: None,
            commanded: now,
            refused: None,
            repeated: 0,
            counters: HashMap::new(),
            first_data: None,
            through: false,
            last_data: None,
            moved: now,
            outcome: None,
        }
    }

    /// Sees how the connection is `now`, and does what has to be done. `ended`: there is no more waiting.
    async fn follow(
        &mut self,
        client: &Client,
        now: Option<Connection>,
        wait: Duration,
        ended: bool,
    ) -> Result<()> {
        let Some(now) = now else {
            // What has carried data as wanted has been switched, however soon it ended.
            self.outcome = Some(if self.through { self.switched(false) } else { not(Reason::Closed) });
            return Ok(());
        };
        let over = ended || wait.is_zero() || self.began.is_some_and(|(began, _)| began.elapsed() >= wait);
        let plan = match plan(&now, &self.wanted) {
            Ok(plan) => plan,
            Err(reason) => {
                let joining = now.subflows.iter().any(|s| s.state == "SYN-SENT" || s.state == "SYN-RECV");
                let waits = !ended && self.commanded.elapsed() < wait;
                if joining && matches!(reason, Reason::NoSuchPath { .. }) && waits {
                    return Ok(());
                }
                self.outcome = Some(not(reason));
                return Ok(());
            }
        };
        let is_first = self.began.is_none();
        self.primary.clone_from(&plan.primary);
        if let (Wanted::Via(Via::Fastest), [fastest]) = (&self.wanted, plan.primary.as_slice()) {
            // Under load it will not stay the fastest.
            self.wanted = Wanted::Via(Via::Subflow(*fastest));
        }
        if !is_first {
            self.count(&now);
        }
        let others_moved = self.last_data.is_some_and(|last| self.elapsed() - last < QUIET);
        let round_trips = 2 * longest_round_trip(&now);
        let repeat = others_moved && self.commanded.elapsed() > REPEAT + round_trips;
        self.command(client, &plan, repeat).await?;
        if is_first {
            // Data that moved before does not count.
            self.moved = Instant::now();
            for subflow in &now.subflows {
                self.counters.insert(Path::of(subflow), [Counters::of(subflow); 2]);
            }
        }
        if self.outcome.is_some() {
            return Ok(());
        }

        let as_wanted = plan.flags.iter().all(|flag| flag.is == flag.wanted);
        let quiet = |since: Duration| since >= QUIET + round_trips;
        let others_quiet = quiet(self.elapsed() - self.last_data.unwrap_or_default());
        let outstanding = now.info.write_seq != now.info.snd_una;
        let idle = !outstanding && self.moved.elapsed() >= IDLE + round_trips;
        let settled = match self.wanted {
            Wanted::Both => true,
            Wanted::Via(_) => others_quiet && (self.through || idle),
        };
        self.outcome = if as_wanted && settled {
            Some(self.switched(false))
        } else if !over {
            None
        } else if let Some(error) = self.refused.take() {
            Some(not(Reason::Refused(error.to_string())))
        } else if wait.is_zero() {
            Some(self.switched(false))
        } else if self.through || idle {
            Some(self.switched(!others_quiet))
        } else {
            self.put_back(client, &now).await;
            let waited_ms = if ended { self.elapsed() } else { wait }.as_millis();
            Some(not(Reason::NothingThrough { paths: plan.primary, waited_ms }))
        };
        Ok(())
    }

    fn elapsed(&self) -> Duration {
        self.began.map_or(Duration::ZERO, |(began, _)| began.elapsed())
    }

    /// Sets the flags that differ from the plan, or with `all` every one.
    async fn command(&mut self, client: &Client, plan: &Plan, all: bool) -> Result<()> {
        let began = Instant::now();
        let mut given = false;
        for flag in plan.flags.iter().filter(|flag| all || flag.is != flag.wanted) {
            match self.set(client, flag.path, flag.wanted).await {
                Ok(()) => drop(self.before.entry(flag.path).or_insert(flag.is)),
                Err(error) if error.is_in_kernel_path_manager() => {
                    self.outcome = Some(not(Reason::InKernel));
                    return Ok(());
                }
                Err(error @ (Error::Capability { .. } | Error::Unsupported { .. })) => return Err(error),
                // The subflow has gone since; if not, the next look finds the flag as it was.
                Err(error) => self.refused = Some(error),
            }
            given = true;
        }
        if given {
            self.commanded = Instant::now();
        }
        if self.began.is_none() {
            self.began = Some((Instant::now(), began.elapsed()));
        } else {
            self.repeated += u32::from(all);
        }
        Ok(())
    }

    async fn set(&self, client: &Client, path: Path, backup: bool) -> Result<()> {
        let [local, remote] = [path.local, path.remote].map(|end| Address::new(end, None));
        client.set_backup(self.token, local, remote, backup).await
    }

    /// Gives the subflows the flags that they had, primary ones first.
    async fn put_back(&self, client: &Client, now: &Connection) {
        let mut before: Vec<_> = now
            .subflows
            .iter()
            .filter_map(|s| self.before.get_key_value(&Path::of(s)))
            .map(|(path, was)| (*path, *was))
            .collect();
        before.sort_by_key(|(_, was)| *was);
        for (path, was) in before {
            if let Err(error) = self.set(client, path, was).await {
                tracing::warn!(%error, "a flag is not put back");
            }
        }
    }

    /// Notes what has been carried since the last look.
    fn count(&mut self, now: &Connection) {
        let elapsed = self.elapsed();
        for subflow in &now.subflows {
            let path = Path::of(subflow);
            let counters = Counters::of(subflow);
            let [first, last] = self.counters.entry(path).or_insert([counters; 2]);
            let moves = counters.through_since(last);
            if moves {
                self.moved = Instant::now();
            }
            if self.primary.contains(&path) {
                self.through |= counters.through_since(first);
                if counters.sent > first.sent || counters.received > first.received {
                    self.first_data.get_or_insert(elapsed);
                }
            } else if moves {
                self.last_data = Some(elapsed);
            }
            *last = counters;
        }
    }

    fn switched(&self, draining: bool) -> Outcome {
        let ms = |time: Duration| (time.as_secs_f64() * 1e5).round() / 1e2;
        let changed = !self.before.is_empty();
        Outcome::Switched {
            primary: self.primary.clone(),
            set_us: self.began.filter(|_| changed).map(|(_, took)| took.as_micros() as u64),
            first_data_ms: self.first_data.filter(|_| changed).map(ms),
            last_data_ms: self.last_data.map(ms),
            repeated: self.repeated,
            draining,
        }
    }
}

fn not(reason: Reason) -> Outcome {
    Outcome::NotSteered { reason }
}

fn longest_round_trip(connection: &Connection) -> Duration {
    let longest = connection.subflows.iter().map(|s| s.tcp.rtt_us).max();
    Duration::from_micros(longest.unwrap_or(0).into())
}
