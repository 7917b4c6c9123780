//! A relay as a whole: its services, reload, drain, and the signals that ask for them.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;

use exporter::Endpoint;
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{Config, Listen, Service, Upstream};
use crate::listener::{self, Inherited};
use crate::metrics::{Metrics, ServiceMetrics};
use crate::transparent::Diversion;
use crate::{Error, Listener, Result};

/// Services at work. Dropping it aborts everything.
pub struct Relay {
    config: Config,
    listeners: Vec<Running>,
    inherited: Inherited,
    metrics: Arc<Metrics>,
    endpoint: Option<Endpoint>,
    sessions: TaskTracker,
    abort: CancellationToken,
}

/// The supervisor's side of a [`Listener`].
struct Running {
    listen: Listen,
    diversion: Option<Arc<Diversion>>,
    service: watch::Sender<(Arc<Service>, Arc<ServiceMetrics>)>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// Runs a relay until SIGTERM or SIGINT.
///
/// `load` says what to do, now and again at each SIGHUP. At SIGTERM the relay stops listening and waits for
/// its connections, up to the configured deadline; a second SIGTERM ends the wait.
pub async fn run(load: impl Fn() -> Result<Config>) -> Result<()> {
    let catch = |kind| signal(kind).map_err(|e| Error::system("catch signals", e));
    let mut hangup = catch(SignalKind::hangup())?;
    let mut terminate = Either(catch(SignalKind::terminate())?, catch(SignalKind::interrupt())?);
    let mut relay = Relay::start(load()?, Inherited::from_env()?).await?;
    notify(&[NotifyState::Ready]);
    loop {
        tokio::select! {
            () = terminate.recv() => break,
            _ = hangup.recv() => {
                let now = NotifyState::monotonic_usec_now().ok();
                notify(&[&[NotifyState::Reloading], now.as_slice()].concat());
                match async { relay.reload(load()?).await }.await {
                    Ok(()) => tracing::info!("configuration reloaded"),
                    Err(error) => tracing::error!(%error, "configuration not reloaded, nothing changed"),
                }
                notify(&[NotifyState::Ready]);
            }
        }
    }
    notify(&[NotifyState::Stopping]);
    relay.drain(terminate.recv()).await;
    Ok(())
}

impl Relay {
    /// Opens every listening socket and begins to serve. When one thing fails, nothing was begun.
    pub async fn start(config: Config, inherited: Inherited) -> Result<Self> {
        let mut relay = Relay {
            config: Config { services: Vec::new(), process: Default::default() },
            listeners: Vec::new(),
            inherited,
            metrics: Arc::default(),
            endpoint: None,
            sessions: TaskTracker::new(),
            abort: CancellationToken::new(),
        };
        relay.apply(config).await?;
        for addr in relay.inherited.unclaimed() {
            tracing::warn!(%addr, "no service listens on this passed socket");
        }
        Ok(relay)
    }

    /// Changes to `config`: services that are new begin, those that are gone stop listening, the others take
    /// their new settings for new connections. Connections live on under the settings they began with. After
    /// an error nothing has changed.
    pub async fn reload(&mut self, config: Config) -> Result<()> {
        let result = self.apply(config).await;
        self.metrics.reloaded(result.is_ok());
        result
    }

    /// The counters.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Connections that have not ended.
    pub fn connections(&self) -> usize {
        self.sessions.len()
    }

    /// Stops listening, and waits for the connections to end: until the configured deadline, or until
    /// `hurry` is ready. What has not ended then is reset.
    pub async fn drain(mut self, hurry: impl Future<Output = ()>) {
        let deadline = self.config.process.drain_or_default();
        for listener in self.listeners.drain(..) {
            listener.stop().await;
        }
        self.sessions.close();
        tracing::info!(connections = self.sessions.len(), ?deadline, "stopped listening");
        let cut = tokio::select! {
            () = self.sessions.wait() => None,
            () = hurry => Some("told to hurry"),
            () = tokio::time::sleep(deadline) => Some("deadline passed"),
        };
        if let Some(why) = cut {
            tracing::warn!(connections = self.sessions.len(), "{why}, resetting the rest");
            self.abort.cancel();
            self.sessions.wait().await;
        }
    }

    /// First everything that can fail, then the change.
    async fn apply(&mut self, config: Config) -> Result<()> {
        // All at once, so that a resolver that does not answer delays us once.
        let checks: Vec<_> = config.services.iter().map(|s| tokio::spawn(check_name(s.clone()))).collect();
        for check in checks {
            check.await.expect("no check panics or is aborted")?;
        }
        let endpoint = match config.process.metrics {
            Some(addr) if self.config.process.metrics != Some(addr) => {
                let metrics = Arc::clone(&self.metrics);
                let serving = Endpoint::serve(addr, move || Ok::<_, Infallible>(metrics.encode())).await;
                Some(serving.map_err(|e| Error::system(format!("serve metrics on {addr}"), e))?)
            }
            _ => None,
        };
        let mut begun = Vec::new();
        for service in &config.services {
            match self.listeners.iter().find(|running| running.listen == service.listen) {
                None => {
                    let socket = listener::bind(service, &mut self.inherited)?;
                    let diversion = listener::divert(service, &socket).await?;
                    begun.push((service.listen, socket, diversion));
                }
                Some(running) if running.diversion.is_some() != service.transparent.is_some() => {
                    let message = "transparent: switching it on or off takes a restart or another port";
                    return Err(configfile::Error::new(format!("service {}", service.name), message).into());
                }
                Some(_) => {}
            }
        }

        if config.process.metrics != self.config.process.metrics {
            self.endpoint = endpoint;
        }
        let stays = |running: &Running| config.services.iter().any(|s| s.listen == running.listen);
        let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut self.listeners).into_iter().partition(stays);
        self.listeners = kept;
        for running in gone {
            tracing::info!(listen = %running.listen, "stopped listening");
            running.stop().await;
        }
        for service in &config.services {
            let metrics = Arc::new(self.metrics.service(&service.name));
            let current = (Arc::new(service.clone()), metrics);
            match self.listeners.iter().find(|running| running.listen == service.listen) {
                Some(running) => {
                    running.redivert(service);
                    running.service.send_replace(current);
                }
                None => {
                    let index = begun.iter().position(|(listen, ..)| *listen == service.listen);
                    let (listen, socket, diversion) = begun.swap_remove(index.expect("bound above"));
                    tracing::info!(service = service.name, %listen, "listening");
                    self.listeners.push(self.begin(listen, socket, diversion, current));
                }
            }
        }
        self.config = config;
        Ok(())
    }

    fn begin(
        &self,
        listen: Listen,
        socket: tokio::net::TcpListener,
        diversion: Option<Arc<Diversion>>,
        current: (Arc<Service>, Arc<ServiceMetrics>),
    ) -> Running {
        let (service, receiver) = watch::channel(current);
        let stop = self.abort.child_token();
        let listener = Listener {
            socket,
            diversion: diversion.clone(),
            service: receiver,
            stop: stop.clone(),
            abort: self.abort.clone(),
            sessions: self.sessions.clone(),
        };
        Running { listen, diversion, service, stop, task: tokio::spawn(listener.run()) }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.abort.cancel();
    }
}

impl Running {
    /// Changes which connections are diverted.
    fn redivert(&self, service: &Service) {
        if let (Some(diversion), Some(capture)) = (&self.diversion, &service.transparent)
            && let Err(error) = diversion.replace(capture)
        {
            tracing::error!(%error, service = service.name, "connections are still diverted as before");
        }
    }

    /// Returns when the socket is closed.
    async fn stop(self) {
        self.stop.cancel();
        if let Err(error) = self.task.await {
            tracing::error!(%error, listen = %self.listen, "listener ended badly");
        }
    }
}

/// A server whose name does not resolve is a mistake in the configuration more often than a fault of DNS.
async fn check_name(service: Service) -> Result<()> {
    let Upstream::Fixed(target) = service.upstream else { return Ok(()) };
    if service.lazy_dns {
        return Ok(());
    }
    let lookup = tokio::net::lookup_host((target.host.as_str(), target.port));
    let answer = match tokio::time::timeout(service.connect_timeout, lookup).await {
        Ok(Ok(_)) => return Ok(()),
        Ok(Err(answer)) => answer,
        Err(elapsed) => elapsed.into(),
    };
    Err(Error::Resolve { service: service.name, host: target.host, answer })
}

/// Tells the service manager, if there is one.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "service manager not notified");
    }
}

/// Either of two signals.
struct Either(Signal, Signal);

impl Either {
    async fn recv(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}
