//! The status for Prometheus.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use exporter::Endpoint;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::abi::COUNTERS;
use crate::plane::Plane;
use crate::status::{Backend, Status, Table};
use crate::{Error, Result};

/// Serves the status of the balancer `name` at `http://ADDR/metrics`.
pub async fn serve(addr: SocketAddr, name: String, plane: Arc<Mutex<Plane>>) -> Result<Endpoint> {
    let scrape = move || {
        let plane = plane.lock().unwrap_or_else(PoisonError::into_inner);
        Status::read(&name, Some(std::process::id()), &plane.tables).map(encode)
    };
    let serving = Endpoint::serve(addr, scrape).await;
    serving.map_err(|e| Error::io(format!("serve metrics on {addr}"), e))
}

/// `status` in the OpenMetrics text format.
pub fn encode(status: Status) -> String {
    let mut registry = Registry::with_prefix("braid_lb");
    registry.register_collector(Box::new(Snapshot(status)));
    let mut buffer = String::new();
    text::encode(&mut buffer, &registry).expect("a String takes everything");
    buffer
}

#[derive(Debug)]
struct Snapshot(Status);

/// What is counted of each backend: name, help, value.
type OfBackend = (&'static str, &'static str, fn(&Backend) -> u64);
const OF_BACKEND: [OfBackend; 7] = [
    ("packets", "Packets sent to the backend", |b| b.packets),
    ("bytes", "Bytes of Ethernet frames sent to the backend", |b| b.bytes),
    ("connections", "Connections opened with MP_CAPABLE", |b| b.connections),
    ("plain_connections", "Connections opened without MP_CAPABLE", |b| b.plain),
    ("joins_by_token", "Joins sent to the backend that has the connection with their token", |b| {
        b.joins.token
    }),
    ("joins_by_port", "Joins to the port that the backend announces", |b| b.joins.port),
    ("joins_by_hash", "Joins sent where the ring says", |b| b.joins.hash),
];

/// Like [`OfBackend`], of what goes up and down.
type GaugeOfBackend = (&'static str, &'static str, fn(&Backend) -> i64);
const GAUGES_OF_BACKEND: [GaugeOfBackend; 3] = [
    ("backend_up", "Takes new connections", |b| i64::from(b.state == "up")),
    ("backend_draining", "Takes none because the file says so", |b| i64::from(b.state == "draining")),
    ("flows", "In the flow table", |b| b.flows as i64),
];

/// What is known of each table.
type OfTable = (&'static str, &'static str, fn(&Table) -> u64);
const OF_TABLE: [OfTable; 3] = [
    ("table_entries", "Entries of a table", |t| t.entries),
    ("table_size", "Room of a table", |t| t.size),
    ("table_pushed_out", "Entries that went because the table was full", |t| t.evicted),
];

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let backends = || {
            self.0.services.iter().flat_map(|service| {
                service.backends.iter().map(move |backend| {
                    ([("service", service.name.clone()), ("backend", backend.name.clone())], backend)
                })
            })
        };
        for (name, help, value) in OF_BACKEND {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, backend) in backends() {
                ConstCounter::new(value(backend)).encode(family.encode_family(&labels)?)?;
            }
        }
        for (name, help, value) in GAUGES_OF_BACKEND {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (labels, backend) in backends() {
                ConstGauge::new(value(backend)).encode(family.encode_family(&labels)?)?;
            }
        }
        for (name, help, value) in OF_TABLE {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for table in &self.0.tables {
                let gauge = ConstGauge::new(value(table) as i64);
                gauge.encode(family.encode_family(&[("table", table.name)])?)?;
            }
        }
        for ((name, help), (_, value)) in COUNTERS.iter().zip(&self.0.counters) {
            let counter = ConstCounter::new(*value);
            counter.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
        }
        Ok(())
    }
}
