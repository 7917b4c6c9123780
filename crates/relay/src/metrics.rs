//! Counters, for Prometheus.

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::{End, Leg};

/// The counters of all services, by service name. They live as long as the process: a service that a reload
/// removes keeps its last values.
pub struct Metrics {
    registry: Registry,
    accepted: Family<ByService, Counter>,
    active: Family<ByService, Gauge>,
    bytes: Family<ByDirection, Counter>,
    ended: Family<ByEnd, Counter>,
    fallbacks: Family<ByLeg, Counter>,
    accept_errors: Family<ByService, Counter>,
    reloads: Family<ByResult, Counter>,
}

/// The counters of one service.
pub struct ServiceMetrics {
    /// Connections accepted.
    pub accepted: Counter,
    /// Connections now.
    pub active: Gauge,
    /// Bytes from clients delivered to servers.
    pub to_server: Counter,
    /// Bytes from servers delivered to clients.
    pub to_client: Counter,
    /// Failed calls of `accept`.
    pub accept_errors: Counter,
    service: String,
    ended: Family<ByEnd, Counter>,
    fallbacks: Family<ByLeg, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByService {
    service: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByDirection {
    service: String,
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByEnd {
    service: String,
    reason: &'static str,
    fault: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByLeg {
    service: String,
    leg: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByResult {
    result: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("braid_proxy");
        let accepted = Family::default();
        registry.register("connections", "Connections accepted", accepted.clone());
        let active = Family::default();
        registry.register("connections_active", "Connections now", active.clone());
        let bytes = Family::default();
        registry.register_with_unit("relayed", "Bytes delivered", Unit::Bytes, bytes.clone());
        let ended = Family::default();
        registry.register("ended", "Connections ended, by reason and by whose fault it was", ended.clone());
        let fallbacks = Family::default();
        registry.register("fallbacks", "Legs that asked for MPTCP and got TCP", fallbacks.clone());
        let accept_errors = Family::default();
        registry.register("accept_errors", "Failed calls of accept", accept_errors.clone());
        let reloads = Family::default();
        registry.register("reloads", "Reloads of the configuration", reloads.clone());
        Metrics { registry, accepted, active, bytes, ended, fallbacks, accept_errors, reloads }
    }
}

impl Metrics {
    /// The counters of `service`, from zero or from where an earlier service of this name left them.
    pub fn service(&self, service: &str) -> ServiceMetrics {
        let by_service = ByService { service: service.into() };
        let bytes =
            |direction| self.bytes.get_or_create_owned(&ByDirection { service: service.into(), direction });
        for leg in [Leg::Client, Leg::Server] {
            // An alert on a counter needs its zero.
            drop(self.fallbacks.get_or_create(&ByLeg { service: service.into(), leg: leg.to_string() }));
        }
        ServiceMetrics {
            accepted: self.accepted.get_or_create_owned(&by_service),
            active: self.active.get_or_create_owned(&by_service),
            to_server: bytes("to_server"),
            to_client: bytes("to_client"),
            accept_errors: self.accept_errors.get_or_create_owned(&by_service),
            service: service.into(),
            ended: self.ended.clone(),
            fallbacks: self.fallbacks.clone(),
        }
    }

    /// Counts a reload.
    pub fn reloaded(&self, ok: bool) {
        let result = if ok { "ok" } else { "failed" };
        self.reloads.get_or_create(&ByResult { result }).inc();
    }

    /// All counters in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut buffer = String::new();
        text::encode(&mut buffer, &self.registry).expect("a String takes everything");
        buffer
    }
}

impl ServiceMetrics {
    /// Counts an ended connection.
    pub fn ended(&self, end: &End) {
        let labels =
            ByEnd { service: self.service.clone(), reason: end.reason(), fault: end.fault().to_string() };
        self.ended.get_or_create(&labels).inc();
    }

    /// Counts a leg that asked for MPTCP and got TCP.
    pub fn fell_back(&self, leg: Leg) {
        self.fallbacks.get_or_create(&ByLeg { service: self.service.clone(), leg: leg.to_string() }).inc();
    }
}
