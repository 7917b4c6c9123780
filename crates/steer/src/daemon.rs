//! The path-manager daemon: sees, asks the policy, does what it says. One per network namespace.
//!
//! It keeps nothing that cannot be read anew: killed and started again, it goes on where it was. What it changed in
//! the namespace is written down (`changed.rs`) and put back at the end.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use exporter::Endpoint;
use mptcp::pm::{Address, Client, EndpointFlags, EventKind, Events, Notice};
use mptcp::{Netns, sysctl};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until, timeout};

use crate::policy::config::{Config, Mode};
use crate::policy::{Action, Event, Policy};
use crate::{Error, Result};

mod addresses;
mod changed;
mod control;
mod holder;
mod kernel;
mod look;
mod metrics;
mod scout;

pub use control::{Answer, ask};
pub use holder::hold;
use metrics::Metrics;

/// What the daemon is told beside the configuration.
pub struct Options {
    /// Where it works.
    pub netns: Netns,
    /// Where it keeps its control socket and notes; see [`directory`].
    pub directory: PathBuf,
    /// Bytes for events that wait to be read.
    pub event_buffer: usize,
    /// Leave everything that was set as it is at the end, and the holder with it.
    pub stay: bool,
    /// How to start the process that runs [`hold`]; `None`: nothing holds the subscription while no daemon runs.
    pub holder: Option<std::process::Command>,
}

/// The directory of the daemon in `netns`, below `run`.
pub fn directory(run: &std::path::Path, netns: &Netns) -> Result<PathBuf> {
    use std::os::fd::AsFd;
    let stat =
        nix::sys::stat::fstat(netns.as_fd()).map_err(|e| mptcp::Error::io("identify the namespace", e))?;
    Ok(run.join(format!("pm-{}", stat.st_ino)))
}

/// What a connection over the loopback interface may take, where a firewall may stand.
const LOOPBACK: Duration = Duration::from_secs(1);
/// Events that come one after the other are followed by one look.
const GATHER: Duration = Duration::from_millis(3);

/// Runs the daemon until SIGTERM or SIGINT. `load` reads the configuration, now and at each SIGHUP.
pub async fn run(options: Options, load: impl Fn() -> Result<Config>) -> Result<()> {
    let catch = |kind| signal(kind).map_err(|e| Error::from(mptcp::Error::io("catch signals", e)));
    let (mut hangup, mut terminate) = (catch(SignalKind::hangup())?, catch(SignalKind::terminate())?);
    let mut interrupt = catch(SignalKind::interrupt())?;
    let config = load()?;
    let mut control = control::Socket::bind(&options.directory).await?;
    let mut daemon = Daemon::start(options, config).await?;
    notify(&[NotifyState::Ready]);
    let result = loop {
        tokio::select! {
            _ = terminate.recv() => break Ok(()),
            _ = interrupt.recv() => break Ok(()),
            _ = hangup.recv() => {
                let now = NotifyState::monotonic_usec_now().ok();
                notify(&[&[NotifyState::Reloading], now.as_slice()].concat());
                if let Err(error) = daemon.reload(&load).await {
                    tracing::error!(%error, "configuration not reloaded, nothing changed");
                }
                notify(&[NotifyState::Ready]);
            }
            request = control.next() => match request.what() {
                control::What::Status => request.answer(daemon.status()),
                control::What::Reload => {
                    let result = daemon.reload(&load).await.map_err(|error| error.to_string());
                    request.answer(result.map(|()| "reloaded".into()));
                }
            },
            // What has begun comes to its end, whatever else happens: the policy takes it for done.
            due = daemon.next() => match due {
                Ok(due) => if let Err(error) = daemon.step(due).await { break Err(error) },
                Err(error) => break Err(error),
            },
        }
    };
    notify(&[NotifyState::Stopping]);
    daemon.stop().await;
    result
}

/// What the daemon waits for.
enum Due {
    Notice(Notice),
    Addresses,
    Look,
}

struct Daemon {
    options: Options,
    began: Instant,
    client: Client,
    events: Events,
    changes: addresses::Changes,
    looker: look::Looker,
    /// Made when it is first needed.
    scout: Option<scout::Scout>,
    policy: Policy,
    changed: changed::Changed,
    holder: holder::Holder,
    next_look: Instant,
    metrics: std::sync::Arc<Metrics>,
    endpoint: Option<Endpoint>,
}

impl Daemon {
    async fn start(mut options: Options, config: Config) -> Result<Self> {
        let netns = options.netns.clone();
        let client = Client::connect(&netns).await?;
        // Subscribed before the first look: nothing happens unseen between the two.
        let events = Events::subscribe_with_buffer(&netns, options.event_buffer)?;
        let changes = addresses::Changes::subscribe(&netns)?;
        let changed = changed::Changed::open(&netns, &options.directory.join("changed.json"))?;
        let mut holder = holder::Holder::of(&options.directory)?;
        if let Some(command) = options.holder.take()
            && let Err(error) = holder.ensure(&netns, command)
        {
            holder.end();
            return Err(error);
        }
        let mut daemon = Daemon {
            began: Instant::now(),
            client,
            events,
            changes,
            looker: look::Looker::default(),
            scout: None,
            policy: Policy::new(config.clone()),
            changed,
            holder,
            next_look: Instant::now(),
            metrics: std::sync::Arc::default(),
            endpoint: None,
            options,
        };
        let begun = daemon.begin(&config).await;
        if let Err(error) = begun {
            daemon.stop().await;
            return Err(error);
        }
        let mode = config.mode;
        tracing::info!(
            netns = netns.name(),
            ?mode,
            connections = daemon.policy.connections().count(),
            "path manager runs"
        );
        Ok(daemon)
    }

    async fn begin(&mut self, config: &Config) -> Result<()> {
        self.set_metrics(config).await?;
        self.take_over(config)?;
        self.bound_send_buffers(config)?;
        self.addresses().await?;
        self.look().await
    }

    /// Makes new connections those of the wanted path manager.
    fn take_over(&mut self, config: &Config) -> Result<()> {
        let (kind, number) = match config.mode {
            Mode::Daemon => ("userspace", "1"),
            Mode::Kernel => ("kernel", "0"),
        };
        // Linux 6.15 and newer; before, the number.
        match sysctl::get(&self.options.netns, "net.mptcp.path_manager") {
            Ok(_) => self.changed.sysctl("net.mptcp.path_manager", kind),
            Err(_) => self.changed.sysctl("net.mptcp.pm_type", number),
        }
    }

    fn bound_send_buffers(&mut self, config: &Config) -> Result<()> {
        let key = "net.ipv4.tcp_wmem";
        self.changed.sysctl_back(key)?;
        let Some(most) = config.send_buffer else { return Ok(()) };
        // Least, first and greatest size.
        let sizes = sysctl::get(&self.options.netns, key)?;
        let sizes = sizes.split_whitespace().filter_map(|size| size.parse::<u32>().ok());
        let sizes: Vec<String> = sizes.map(|size| size.min(most).to_string()).collect();
        self.changed.sysctl(key, &sizes.join(" "))
    }

    async fn set_metrics(&mut self, config: &Config) -> Result<()> {
        if self.endpoint.as_ref().map(|endpoint| endpoint.asked) != config.metrics {
            self.endpoint = match config.metrics {
                Some(addr) => {
                    let metrics = self.metrics.clone();
                    let serving = Endpoint::serve(addr, move || Ok::<_, Infallible>(metrics.encode())).await;
                    Some(serving.map_err(|e| mptcp::Error::io(format!("serve metrics on {addr}"), e))?)
                }
                None => None,
            };
        }
        Ok(())
    }

    /// Waits for what comes next. Cancel safe.
    async fn next(&mut self) -> Result<Due> {
        tokio::select! {
            notice = self.events.next() => Ok(Due::Notice(notice?)),
            changed = self.changes.next() => changed.map(|()| Due::Addresses),
            () = sleep_until(self.next_look) => Ok(Due::Look),
        }
    }

    /// Does what `due` asks for.
    async fn step(&mut self, due: Due) -> Result<()> {
        match due {
            Due::Notice(notice) => {
                match notice {
                    Notice::Event(event) => {
                        self.metrics.events.inc();
                        let answer = self.scout.as_ref().and_then(|scout| scout.answer(&event));
                        let answer = answer.map(|(local, remote)| Event::Answered { local, remote });
                        if let Some(told) = answer.or_else(|| told(&event)) {
                            self.tell(told);
                        }
                    }
                    Notice::Overrun => {
                        self.metrics.overruns.inc();
                        tracing::warn!("events were lost: looking at everything anew");
                    }
                }
                self.next_look = self.next_look.min(Instant::now() + GATHER);
            }
            Due::Addresses => {
                self.addresses().await?;
                self.next_look = Instant::now();
            }
            Due::Look => self.look().await?,
        }
        Ok(())
    }

    async fn addresses(&mut self) -> Result<()> {
        let addresses = addresses::list(&self.options.netns)?;
        if self.policy.config().mode == Mode::Kernel {
            kernel::align(&self.client, &mut self.changed, self.policy.config(), &addresses).await?;
        }
        self.tell(Event::Addresses(addresses));
        Ok(())
    }

    async fn look(&mut self) -> Result<()> {
        self.metrics.looks.inc();
        let began = Instant::now();
        let with_owners = !self.policy.config().rule.is_empty();
        let seen = match self.policy.config().mode {
            Mode::Daemon => self.looker.look(&self.options.netns, &self.client, with_owners).await?,
            Mode::Kernel => Vec::new(),
        };
        self.metrics.saw(&seen);
        let now = self.began.elapsed();
        for action in self.policy.on_event(now, Event::Connections(seen)) {
            self.act(action).await;
        }
        let pause = self.policy.pause(self.began.elapsed(), began.elapsed());
        self.next_look = Instant::now() + pause;
        Ok(())
    }

    fn tell(&mut self, event: Event) {
        let actions = self.policy.on_event(self.began.elapsed(), event);
        debug_assert!(actions.is_empty(), "only a look leads to actions");
    }

    /// Does what the policy says. What the kernel refuses is told to the policy, which asks again when it is time.
    async fn act(&mut self, action: Action) {
        self.metrics.acts(&action);
        tracing::debug!(?action, "does");
        let Err(error) = self.request(&action).await else { return };
        self.metrics.refused.inc();
        tracing::debug!(%error, "refused");
        self.tell(Event::Refused(action));
    }

    async fn request(&mut self, action: &Action) -> mptcp::Result<()> {
        let end = |addr| Address::new(addr, None);
        match *action {
            Action::Create { token, local, id, ifindex, remote, backup } => {
                let flags = if backup { EndpointFlags::BACKUP } else { EndpointFlags::empty() };
                let local = Address { ip: local, id: Some(id), port: 0, ifindex };
                self.client.create_subflow(token, local, end(remote), flags).await
            }
            Action::Destroy { token, local, remote } => {
                self.client.destroy_subflow(token, end(local), end(remote)).await
            }
            Action::SetBackup { token, local, remote, backup } => {
                self.client.set_backup(token, end(local), end(remote), backup).await
            }
            Action::Announce { token, ip, id } => {
                self.client.announce(token, Address { ip, id: Some(id), port: 0, ifindex: 0 }).await
            }
            Action::Ask { local, ifindex, remote } => self.ask(local, ifindex, remote).await,
            // Of an address that only the peer has used the kernel knows no id.
            Action::Withdraw { token, id } => self.client.remove(token, id).await,
        }
    }

    async fn ask(&mut self, local: IpAddr, ifindex: u32, remote: SocketAddr) -> mptcp::Result<()> {
        let mut scout = match self.scout.take() {
            Some(scout) => scout,
            None => {
                let scout = timeout(LOOPBACK, scout::Scout::new(&self.options.netns)).await;
                let too_late = |_| mptcp::Error::io("connect to ourselves", io::ErrorKind::TimedOut);
                scout.map_err(too_late)??
            }
        };
        let asked = scout.ask(&self.options.netns, &self.client, local, ifindex, remote).await;
        // One that no longer works is made anew the next time.
        self.scout = asked.is_ok().then_some(scout);
        asked
    }

    async fn reload(&mut self, load: impl Fn() -> Result<Config>) -> Result<()> {
        let result = async {
            let config = load()?;
            self.set_metrics(&config).await?;
            self.take_over(&config)?;
            self.bound_send_buffers(&config)?;
            self.tell(Event::Configured(config));
            self.addresses().await
        };
        let result = result.await;
        self.metrics.reloaded(result.is_ok());
        // Rules may ask for owners, which nobody did before.
        self.looker = look::Looker::default();
        self.next_look = Instant::now();
        result.inspect(|()| tracing::info!("configuration reloaded"))
    }

    fn status(&self) -> Answer {
        let connections: Vec<_> = self
            .policy
            .connections()
            .map(|seen| {
                let rule = self.policy.config().rule(&seen.identity, seen.local, seen.remote);
                let subflows = seen.subflows.iter().filter(|s| s.state == crate::policy::State::Open);
                serde_json::json!({
                    "token": seen.token,
                    "peer": seen.remote,
                    "policy": rule.policy,
                    "subflows": subflows.clone().count(),
                    "active": subflows.filter(|s| !s.backup).count(),
                })
            })
            .collect();
        Ok(serde_json::json!({ "pid": std::process::id(), "mode": self.policy.config().mode, "connections": connections }).to_string())
    }

    async fn stop(self) {
        if self.options.stay {
            return;
        }
        self.holder.end();
        self.changed.restore(&self.client).await;
    }
}

/// What an event says beyond that it is time for a look.
fn told(event: &mptcp::pm::Event) -> Option<Event> {
    let token = event.token?;
    let id = event.remote_id;
    match event.kind {
        EventKind::Announced => Some(Event::Announced {
            token,
            id: id?,
            ip: event.remote_ip?,
            port: event.remote_port.filter(|port| *port != 0),
        }),
        EventKind::Removed => Some(Event::Removed { token, id: id? }),
        _ => None,
    }
}

/// Tells the service manager, if there is one.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "service manager not notified");
    }
}

/// Two nodes of which one has the userspace path manager.
#[cfg(test)]
async fn one_link() -> lab::Lab {
    const NETWORK: &str = r#"
        title = "one link"
        [nodes.here]
        sysctls = { "net.mptcp.pm_type" = 1 }
        [nodes.there]
        [links.wire]
        a = { node = "here", dev = "eth0", addresses = ["10.0.1.1/24", "fd00::1/64"] }
        b = { node = "there", dev = "eth0", addresses = ["10.0.1.2/24", "fd00::2/64"] }
    "#;
    let scenario = lab::Scenario::parse("net", "net.toml", NETWORK, None).unwrap();
    lab::Lab::build(&scenario).await.unwrap()
}
