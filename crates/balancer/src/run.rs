//! The daemon: configuration, verdicts and ways go into the maps, until a signal.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aya::maps::{IterableMap, MapData};
use exporter::Endpoint;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::abi::{
    Address, BACKEND_CONFIGURED, BACKEND_DRAINING, BACKEND_LIVE, BACKEND_PEER, BACKEND_TAKES, BACKEND_TUNNEL,
    Backend, MAX_BACKENDS, MAX_SERVICES, Name, RING_SIZE, SERVICE_FIXED, SERVICE_TOKEN, Service, ServiceKey,
};
use crate::config::{self, Config};
use crate::health::{self, Checker, Verdict};
use crate::lock::Lock;
use crate::metrics;
use crate::neighbour::{self, Way};
use crate::plane::{self, Hook, Plane};
use crate::rebuild::{self, Answer, Asker};
use crate::report::{Question, Secret};
use crate::{Error, Result, maglev};

/// How often ways are looked up, while one is unknown and when all are known.
const SOON: Duration = Duration::from_millis(200);
const LATER: Duration = Duration::from_secs(5);
/// How long a daemon may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs a balancer in this network namespace until SIGTERM or SIGINT.
///
/// `load` says what to do, now and again at each SIGHUP. `ready` is called when packets are balanced. A pinned
/// balancer's data plane goes on after the end, see [`down`].
pub async fn run(load: impl Fn() -> Result<Config>, ready: impl FnOnce(&Config)) -> Result<()> {
    let catch = |kind| signal(kind).map_err(|e| Error::io("catch signals", e));
    let mut hangup = catch(SignalKind::hangup())?;
    let (mut terminate, mut interrupt) = (catch(SignalKind::terminate())?, catch(SignalKind::interrupt())?);
    let config = load()?;
    plane::may_load()?;
    let lock = Lock::take(&config.name, config.pin)?;
    lock.claim(&config)?;
    let (verdicts, mut news) = mpsc::unbounded_channel();
    let (answers, mut told) = mpsc::unbounded_channel();
    let mut balancer = Balancer::new(config, verdicts, answers, lock)?;
    tokio::select! {
        started = balancer.start(&mut news, &mut told) => started?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    }
    ready(&balancer.config);
    notify(&[NotifyState::Ready]);
    loop {
        let next = if balancer.knows_all_ways() { LATER } else { SOON };
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => {
                let now = NotifyState::monotonic_usec_now().ok();
                notify(&[&[NotifyState::Reloading], now.as_slice()].concat());
                match async { balancer.reload(load()?).await }.await {
                    Ok(()) => tracing::info!("configuration reloaded"),
                    Err(error) => tracing::error!(%error, "configuration not reloaded, nothing changed"),
                }
                notify(&[NotifyState::Ready]);
            }
            Some(verdict) = news.recv() => balancer.hear(verdict)?,
            Some(answer) = told.recv() => balancer.rebuild(answer)?,
            () = tokio::time::sleep(next) => {
                balancer.attach();
                balancer.look().await?;
                balancer.apply()?;
            }
        }
    }
    notify(&[NotifyState::Stopping]);
    if balancer.config.pin {
        let name = &balancer.config.name;
        tracing::info!("connections go on being balanced; `braid lb down {name}` ends that");
    }
    Ok(())
}

/// Ends the balancer `name` that is pinned under `pins`, its daemon included, and removes all that it made.
pub fn down(pins: &Path, name: &str) -> Result<()> {
    let directory = pins.join(name);
    if !directory.exists() {
        let message = format!("there is none of this name under {}", pins.display());
        return Err(Error::Balancer { name: name.into(), message });
    }
    let give_up = Instant::now() + PATIENCE;
    let lock = loop {
        match Lock::take(name, true) {
            Ok(lock) => break lock,
            Err(Error::Balancer { message, .. }) if Instant::now() >= give_up => {
                return Err(Error::Balancer {
                    name: name.into(),
                    message: format!("{message} and does not end"),
                });
            }
            Err(Error::Balancer { .. }) => {
                if let Some(pid) = Lock::holder(name) {
                    // Gone meanwhile: then the lock is free.
                    let _ = kill(Pid::from_raw(pid as i32), Signal::SIGTERM);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error),
        }
    };
    plane::remove(&directory)?;
    drop(lock);
    Ok(())
}

/// A balancer at work.
struct Balancer {
    config: Config,
    plane: Arc<Mutex<Plane>>,
    numbers: Numbers,
    verdicts: mpsc::UnboundedSender<Verdict>,
    checkers: HashMap<String, Checker>,
    up: HashMap<String, bool>,
    secret: Option<Secret>,
    answers: mpsc::UnboundedSender<Answer>,
    askers: HashMap<String, Asker>,
    /// Backends whose agent has told, or failed to.
    asked: HashSet<String>,
    ways: HashMap<IpAddr, Way>,
    rings: HashMap<u32, Vec<u32>>,
    endpoint: Option<Endpoint>,
    /// Why an interface of the file has no program.
    detached: Option<String>,
    // The last: other fields are dropped before it.
    lock: Lock,
}

/// The numbers of services and backends in the maps, by name. A number once given stays with its name, so that flows
/// never change hands because the file did.
#[derive(Clone, Debug, Default)]
struct Numbers {
    services: HashMap<String, u32>,
    backends: HashMap<String, u32>,
}

impl Balancer {
    fn new(
        config: Config,
        verdicts: mpsc::UnboundedSender<Verdict>,
        answers: mpsc::UnboundedSender<Answer>,
        lock: Lock,
    ) -> Result<Self> {
        let secret = config.secret()?;
        let hook = if config.xdp { Hook::Xdp } else { Hook::Tc };
        let plane = Plane::load(hook, &config.tables, config.pin_directory().as_deref())?;
        for (name, there, wanted) in sizes(&plane, &config)? {
            if there != wanted {
                let down = format!("braid lb down {}", config.name);
                tracing::warn!(
                    "table {name} keeps its {there} entries; `{down}` first would give it {wanted}"
                );
            }
        }
        let numbers = Numbers::read(&plane)?.with(&config)?;
        // A predecessor's verdicts hold until there are new ones.
        let mut up = HashMap::new();
        for (name, number) in &numbers.backends {
            let backend = plane.tables.backends.get(number, 0).map_err(|e| Error::bpf("read backends", e))?;
            if backend.flags & BACKEND_CONFIGURED != 0 {
                up.insert(name.clone(), backend.flags & BACKEND_TAKES != 0);
            }
        }
        Ok(Balancer {
            config,
            plane: Arc::new(Mutex::new(plane)),
            numbers,
            verdicts,
            checkers: HashMap::new(),
            up,
            secret,
            answers,
            askers: HashMap::new(),
            asked: HashSet::new(),
            ways: HashMap::new(),
            rings: HashMap::new(),
            endpoint: None,
            detached: None,
            lock,
        })
    }

    /// Waits for the first verdict on each backend and for what its agent tells, writes the maps, and attaches the
    /// programs. A flow that were balanced before its backend has told it could go to another.
    async fn start(
        &mut self,
        news: &mut mpsc::UnboundedReceiver<Verdict>,
        told: &mut mpsc::UnboundedReceiver<Answer>,
    ) -> Result<()> {
        if let Some(addr) = self.config.metrics {
            let plane = Arc::clone(&self.plane);
            self.endpoint = Some(metrics::serve(addr, self.config.name.clone(), plane).await?);
        }
        self.check();
        let deadline = tokio::time::Instant::now()
            + health::patience(self.config.services.iter().map(|service| &service.check));
        while self.checkers.keys().any(|backend| !self.up.contains_key(backend)) || !self.knows_all_ways() {
            tokio::select! {
                Some(verdict) = news.recv() => self.take(verdict),
                Some(answer) = told.recv() => self.rebuild(answer)?,
                () = tokio::time::sleep(SOON / 10) => self.look().await?,
                () = tokio::time::sleep_until(deadline) => break,
            }
        }
        // Each asker says within a limited time that it has failed, if it has.
        while self.askers.keys().any(|backend| !self.asked.contains(backend)) {
            let Some(answer) = told.recv().await else { break };
            self.rebuild(answer)?;
        }
        self.apply()?;
        let mut plane = self.plane();
        plane.attach(&self.config.interfaces)?;
        plane.keep();
        Ok(())
    }

    /// Interfaces go and come back. What is wrong with one is told when it changes.
    fn attach(&mut self) {
        let problem = self.plane().attach(&self.config.interfaces).err().map(|error| error.to_string());
        if problem != self.detached {
            match &problem {
                Some(problem) => tracing::warn!(problem, "an interface is not balanced"),
                None => tracing::info!("all interfaces are balanced again"),
            }
            self.detached = problem;
        }
    }

    fn plane(&self) -> MutexGuard<'_, Plane> {
        self.plane.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes to `config`. After an error nothing has changed.
    async fn reload(&mut self, config: Config) -> Result<()> {
        let fixed =
            |config: &Config| (config.name.clone(), config.pin_directory(), config.tables, config.xdp);
        if fixed(&config) != fixed(&self.config) {
            let message = "name, pin, pins, tables and xdp: changing them takes a new start";
            return Err(configfile::Error::new("reload", message).into());
        }
        // First everything that can fail.
        let secret = config.secret()?;
        let numbers = self.numbers.with(&config)?;
        let endpoint = match config.metrics {
            Some(addr) if self.config.metrics != Some(addr) => {
                Some(metrics::serve(addr, config.name.clone(), Arc::clone(&self.plane)).await?)
            }
            _ => None,
        };
        self.lock.claim(&config)?;
        let attached = self.plane().attach(&config.interfaces);
        if let Err(error) = attached {
            self.lock.claim(&self.config)?;
            self.plane().attach(&self.config.interfaces)?;
            return Err(error);
        }
        if config.metrics != self.config.metrics {
            self.endpoint = endpoint;
        }
        self.numbers = numbers;
        self.secret = secret;
        self.config = config;
        self.check();
        self.look().await?;
        self.apply()
    }

    /// Starts and ends checks and questions as the configuration says.
    fn check(&mut self) {
        let mut checks = HashMap::new();
        let mut questions = HashMap::new();
        for service in &self.config.services {
            let addresses: Vec<_> =
                service.addresses.iter().map(|a| SocketAddr::new(*a, service.port.get())).collect();
            for backend in &service.backends {
                let name = full_name(service, backend);
                if let (Some(agents), Some(secret)) = (&self.config.agents, &self.secret) {
                    let question = Question {
                        agent: SocketAddr::new(backend.address, agents.port.get()),
                        addresses: addresses.clone(),
                        most: self.config.tables.flows,
                        secret: secret.clone(),
                    };
                    questions.insert(name.clone(), question);
                }
                let port = service.check.port.unwrap_or(service.port).get();
                checks.insert(name, (SocketAddr::new(backend.address, port), service.check.clone()));
            }
        }
        self.checkers.retain(|name, checker| {
            checks.get(name).is_some_and(|(target, check)| checker.same(*target, check))
        });
        self.askers.retain(|name, asker| questions.get(name).is_some_and(|question| asker.same(question)));
        self.up.retain(|name, _| checks.contains_key(name));
        for (name, (target, check)) in checks {
            if !self.checkers.contains_key(&name) {
                let checker = Checker::start(name.clone(), target, check, self.verdicts.clone());
                self.checkers.insert(name, checker);
            }
        }
        for (name, question) in questions {
            if !self.askers.contains_key(&name) {
                let asker = Asker::start(name.clone(), question, self.answers.clone());
                self.askers.insert(name, asker);
            }
        }
    }

    fn take(&mut self, verdict: Verdict) {
        let Verdict { backend, up, reason } = verdict;
        // A verdict may still come from a checker that has just ended.
        if !self.checkers.contains_key(&backend) || self.up.insert(backend.clone(), up) == Some(up) {
            return;
        }
        match up {
            true => tracing::info!(backend, "up"),
            false => tracing::warn!(backend, reason, "down: takes no new connections"),
        }
        if let Some(asker) = self.askers.get(&backend).filter(|_| up && self.asked.contains(&backend)) {
            asker.again();
        }
    }

    /// Takes what a backend's agent has told into the tables.
    fn rebuild(&mut self, answer: Answer) -> Result<()> {
        let Answer { backend, flows } = answer;
        // An answer may still come from an asker that has just ended.
        if !self.askers.contains_key(&backend) {
            return Ok(());
        }
        self.asked.insert(backend.clone());
        let flows = match flows {
            Ok(flows) => flows,
            Err(error) => {
                tracing::warn!(backend, %error, "its connections are not told");
                return Ok(());
            }
        };
        let service = self.config.services.iter().find(|service| {
            service.backends.iter().any(|candidate| full_name(service, candidate) == backend)
        });
        let Some(service) = service else { return Ok(()) };
        let (id, number) = (self.numbers.services[&service.name], self.numbers.backends[&backend]);
        let maps = &mut self.plane().tables;
        let [new_flows, new_tokens] = rebuild::write(maps, id, service.by_token(), number, &flows)?;
        tracing::info!(backend, told = flows.len(), new_flows, new_tokens, "its connections are told");
        Ok(())
    }

    fn hear(&mut self, verdict: Verdict) -> Result<()> {
        self.take(verdict);
        self.apply()
    }

    fn addresses(&self) -> Vec<IpAddr> {
        let backends = self.config.services.iter().flat_map(|service| &service.backends);
        let mut addresses: Vec<_> = backends.map(|backend| backend.address).collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }

    fn knows_all_ways(&self) -> bool {
        self.addresses().iter().all(|address| self.ways.contains_key(address))
    }

    /// Looks up the ways to all backends. One that is lost for now stays as it was.
    async fn look(&mut self) -> Result<()> {
        let addresses = self.addresses();
        let looked = tokio::task::spawn_blocking(move || neighbour::ways(&addresses)).await;
        match looked.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())) {
            Ok(ways) => self.ways.extend(ways),
            Err(error) => tracing::warn!(%error, "ways to the backends stay as they are"),
        }
        Ok(())
    }

    /// Writes what is into the maps: first what backends gain, then what leads to them, then what they lose. So what a
    /// backend's entry says holds already.
    fn apply(&mut self) -> Result<()> {
        let numbers = self.numbers.with(&self.config)?;
        let plane = Arc::clone(&self.plane);
        let mut plane = plane.lock().unwrap_or_else(PoisonError::into_inner);
        let maps = &mut plane.tables;
        let failed = |error: aya::maps::MapError| Error::bpf("write the balancer's maps", error);

        let mut services = HashMap::new();
        let mut entries = Vec::new();
        for service in &self.config.services {
            let id = numbers.services[&service.name];
            maps.service_names.set(id, Name::new(&service.name), 0).map_err(failed)?;
            let mut shares = Vec::new();
            let mut on_ring = Vec::new();
            for backend in &service.backends {
                let name = full_name(service, backend);
                let number = numbers.backends[&name];
                let before = maps.backends.get(&number, 0).map_err(failed)?;
                let up = self.up.get(&name).copied().unwrap_or(false);
                let now = entry(backend, self.ways.get(&backend.address), up, &before);
                if now != before {
                    let both = now.flags & !BACKEND_DRAINING | before.flags & !BACKEND_PEER;
                    maps.backend_names.set(number, Name::new(&name), 0).map_err(failed)?;
                    maps.backends.set(number, Backend { flags: both, ..now }, 0).map_err(failed)?;
                    entries.push((number, now));
                }
                let takes = now.flags & (BACKEND_LIVE | BACKEND_TAKES) == BACKEND_LIVE | BACKEND_TAKES;
                shares.push((backend.name.as_str(), if takes { backend.weight } else { 0 }));
                on_ring.push(number);
                if let Some(port) = backend.join_port {
                    let fixed = Service { id, flags: SERVICE_FIXED, backend: number };
                    services.extend(service.addresses.iter().map(|a| (key(*a, port.get()), fixed)));
                }
            }
            let ring = maglev::ring(RING_SIZE, &shares).into_iter().map(|index| on_ring[index]);
            let ring: Vec<u32> = ring.collect();
            if self.rings.get(&id) != Some(&ring) {
                maps.set_ring(id, &ring)?;
                self.rings.insert(id, ring);
            }
            let flags = if service.by_token() { SERVICE_TOKEN } else { 0 };
            let own = Service { id, flags, backend: 0 };
            services.extend(service.addresses.iter().map(|a| (key(*a, service.port.get()), own)));
        }
        for (key, service) in &services {
            if maps.services.get(key, 0).ok() != Some(*service) {
                maps.services.insert(key, service, 0).map_err(failed)?;
            }
        }

        for (number, now) in entries {
            maps.backends.set(number, now, 0).map_err(failed)?;
        }
        let there: Vec<ServiceKey> = maps.services.keys().collect::<Result<_, _>>().map_err(failed)?;
        for key in there.iter().filter(|key| !services.contains_key(*key)) {
            maps.services.remove(key).map_err(failed)?;
        }
        let configured: Vec<String> = self
            .config
            .services
            .iter()
            .flat_map(|service| service.backends.iter().map(|backend| full_name(service, backend)))
            .collect();
        for (name, number) in &numbers.backends {
            if !configured.contains(name) {
                let before = maps.backends.get(number, 0).map_err(failed)?;
                maps.backends.set(*number, Backend { flags: 0, ..before }, 0).map_err(failed)?;
            }
        }
        drop(plane);
        self.numbers = numbers;
        Ok(())
    }
}

/// Tables that the file gives a size: name, size in the kernel, size in the file. A predecessor's stay as they are.
fn sizes(plane: &Plane, config: &Config) -> Result<[(&'static str, u32, u32); 3]> {
    let size = |map: &MapData| {
        let info = map.info().map_err(|error| Error::bpf("read the balancer's maps", error))?;
        Ok::<_, Error>(info.max_entries())
    };
    let (maps, wanted) = (&plane.tables, &config.tables);
    Ok([
        ("flows", size(maps.flows.map())?, wanted.flows),
        ("fresh", size(maps.fresh.map())?, wanted.fresh),
        ("tokens", size(maps.tokens.map())?, wanted.tokens),
    ])
}

fn full_name(service: &config::Service, backend: &config::Backend) -> String {
    format!("{}/{}", service.name, backend.name)
}

fn key(address: IpAddr, port: u16) -> ServiceKey {
    ServiceKey { address: Address::from(address), port: port.to_be(), unused: 0 }
}

/// A backend's entry. Without a way to it, it keeps the one that it had.
fn entry(backend: &config::Backend, way: Option<&Way>, up: bool, before: &Backend) -> Backend {
    let mut flags = BACKEND_CONFIGURED;
    let mut set = |flag: u32, on: bool| flags |= if on { flag } else { 0 };
    set(BACKEND_LIVE, way.is_some() || before.flags & BACKEND_LIVE != 0);
    set(BACKEND_TAKES, up && !backend.drain);
    set(BACKEND_TUNNEL, backend.tunnel);
    set(BACKEND_DRAINING, backend.drain);
    set(BACKEND_PEER, way.map_or(before.flags & BACKEND_PEER != 0, |way| way.peer));
    match way {
        None => Backend { flags, ..*before },
        Some(way) => Backend {
            to_mac: way.to,
            from_mac: way.from,
            ifindex: way.ifindex,
            flags,
            outer_source: way.source.into(),
            outer_destination: backend.address.into(),
        },
    }
}

impl Numbers {
    /// Those that a predecessor has given.
    fn read(plane: &Plane) -> Result<Self> {
        let failed = |error: aya::maps::MapError| Error::bpf("read the balancer's maps", error);
        let mut numbers = Numbers::default();
        for id in 0..MAX_SERVICES {
            let name = plane.tables.service_names.get(&id, 0).map_err(failed)?.to_string();
            if !name.is_empty() {
                numbers.services.insert(name, id);
            }
        }
        for id in 1..MAX_BACKENDS {
            let name = plane.tables.backend_names.get(&id, 0).map_err(failed)?.to_string();
            if !name.is_empty() {
                numbers.backends.insert(name, id);
            }
        }
        Ok(numbers)
    }

    /// Also one for everything in `config`.
    fn with(&self, config: &Config) -> Result<Self> {
        let mut numbers = self.clone();
        for service in &config.services {
            give(&mut numbers.services, service.name.clone(), 0..MAX_SERVICES, &config.name)?;
            for backend in &service.backends {
                give(&mut numbers.backends, full_name(service, backend), 1..MAX_BACKENDS, &config.name)?;
            }
        }
        Ok(numbers)
    }
}

fn give(
    numbers: &mut HashMap<String, u32>,
    name: String,
    mut of: std::ops::Range<u32>,
    balancer: &str,
) -> Result<()> {
    if numbers.contains_key(&name) {
        return Ok(());
    }
    let taken: HashSet<u32> = numbers.values().copied().collect();
    match of.find(|number| !taken.contains(number)) {
        Some(number) => {
            numbers.insert(name, number);
            Ok(())
        }
        None => Err(Error::Balancer {
            name: balancer.into(),
            message: format!(
                "no number left for {name}: too many names have come and gone; `braid lb down` first"
            ),
        }),
    }
}

/// Tells the service manager, if there is one.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "service manager not notified");
    }
}
