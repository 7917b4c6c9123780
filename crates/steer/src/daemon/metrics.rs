//! Counters, for Prometheus.

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::policy::{Action, Seen, State};

/// What the daemon has seen and done.
pub(super) struct Metrics {
    registry: Registry,
    pub(super) events: Counter,
    pub(super) overruns: Counter,
    pub(super) looks: Counter,
    pub(super) refused: Counter,
    actions: Family<ByAction, Counter>,
    reloads: Family<ByResult, Counter>,
    connections: Gauge,
    subflows: Family<ByUse, Gauge>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByAction {
    action: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByResult {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByUse {
    r#use: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("braid_pm");
        let counter = |registry: &mut Registry, name, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let events = counter(&mut registry, "events", "Path-manager events read");
        let overruns =
            counter(&mut registry, "overruns", "Times that events were lost and all was read anew");
        let looks = counter(&mut registry, "looks", "Looks at all connections");
        let refused = counter(&mut registry, "refused", "Actions that the kernel refused");
        let actions = Family::default();
        registry.register("actions", "Actions asked of the kernel, by kind", actions.clone());
        let reloads = Family::default();
        registry.register("reloads", "Reloads of the configuration", reloads.clone());
        let connections = Gauge::default();
        registry.register("connections", "Connections that are steered now", connections.clone());
        let subflows = Family::default();
        registry.register("subflows", "Their open subflows, by use", subflows.clone());
        Metrics { registry, events, overruns, looks, refused, actions, reloads, connections, subflows }
    }
}

impl Metrics {
    pub(super) fn saw(&self, seen: &[Seen]) {
        self.connections.set(seen.len() as i64);
        let open = || seen.iter().flat_map(|seen| &seen.subflows).filter(|s| s.state == State::Open);
        for (r#use, backup) in [("active", false), ("backup", true)] {
            let count = open().filter(|s| s.backup == backup).count();
            self.subflows.get_or_create(&ByUse { r#use }).set(count as i64);
        }
    }

    pub(super) fn acts(&self, action: &Action) {
        let action = match action {
            Action::Create { .. } => "create",
            Action::Destroy { .. } => "destroy",
            Action::Withdraw { .. } => "withdraw",
            Action::SetBackup { .. } => "set_backup",
            Action::Announce { .. } => "announce",
            Action::Ask { .. } => "ask",
        };
        self.actions.get_or_create(&ByAction { action }).inc();
    }

    pub(super) fn reloaded(&self, ok: bool) {
        let result = if ok { "ok" } else { "failed" };
        self.reloads.get_or_create(&ByResult { result }).inc();
    }

    pub(super) fn encode(&self) -> String {
        let mut buffer = String::new();
        text::encode(&mut buffer, &self.registry).expect("a String takes everything");
        buffer
    }
}
