//! What a balancer does: services, backends, connections, joins, drops; read from its maps.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use aya::maps::{IterableMap, MapData};
use serde::{Serialize, Serializer};

use crate::abi::{
    BACKEND_CONFIGURED, BACKEND_DRAINING, BACKEND_LIVE, BACKEND_TAKES, COUNTERS, MAX_BACKENDS, MAX_SERVICES,
    SERVICE_FIXED, SERVICE_TOKEN, Traffic,
};
use crate::lock::Lock;
use crate::plane::Maps;
use crate::{Error, Result};

/// All that a balancer tells.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The balancer's name.
    pub name: String,
    /// The process id of its program, where that runs.
    pub program: Option<u32>,
    /// By name.
    pub services: Vec<Service>,
    /// The tables, and how full they are.
    pub tables: Vec<Table>,
    /// What belongs to no backend: see [`COUNTERS`].
    #[serde(serialize_with = "as_map")]
    pub counters: Vec<(&'static str, u64)>,
}

/// One service.
#[derive(Clone, Debug, Serialize)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Its addresses, those of the port scheme with the backend whose they are.
    pub addresses: Vec<String>,
    /// Do joins go by token?
    pub by_token: bool,
    /// By name.
    pub backends: Vec<Backend>,
}

/// One backend.
#[derive(Clone, Debug, Serialize)]
pub struct Backend {
    /// Its name.
    pub name: String,
    /// `up`, `draining` or `down` (no new connections; its own go on), `unknown` (no way to it).
    pub state: &'static str,
    /// In the flow table.
    pub flows: u64,
    /// What it was sent: packets and bytes.
    pub packets: u64,
    /// Of Ethernet frames.
    pub bytes: u64,
    /// Connections opened with MP_CAPABLE.
    pub connections: u64,
    /// Connections opened without.
    pub plain: u64,
    /// Joins, by what sent them here.
    pub joins: Joins,
}

/// Joins of a backend.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Joins {
    /// By their token.
    pub token: u64,
    /// By the port that the backend announces.
    pub port: u64,
    /// By the ring.
    pub hash: u64,
}

/// One table of the data plane.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    /// Its name.
    pub name: &'static str,
    /// Entries now.
    pub entries: u64,
    /// Entries that it has room for.
    pub size: u64,
    /// Entries that went because it was full.
    pub evicted: u64,
}

impl Status {
    /// Of the balancer `name` that is pinned under `pins`.
    pub fn pinned(pins: &Path, name: &str) -> Result<Self> {
        let directory = pins.join(name);
        if !directory.join("services").exists() {
            return Err(Error::Balancer {
                name: name.into(),
                message: format!("there is none of this name under {} (or pin = false)", pins.display()),
            });
        }
        Self::read(name, Lock::holder(name), &Maps::pinned(&directory)?)
    }

    /// Of the balancer with these maps, whose program is process `program`.
    pub fn read(name: &str, program: Option<u32>, maps: &Maps) -> Result<Self> {
        let failed = |error: aya::maps::MapError| Error::bpf("read the balancer's maps", error);
        let mut flows = vec![0u64; MAX_BACKENDS as usize];
        let mut entries = 0;
        walk("flows", maps.flows.map(), |flow| {
            entries += 1;
            let backend = flow.first_chunk().map_or(0, |backend| u32::from_ne_bytes(*backend));
            if let Some(count) = flows.get_mut(backend as usize) {
                *count += 1;
            }
        })?;
        let mut addresses: Vec<(u32, u32, SocketAddr, u32)> = Vec::new();
        for entry in maps.services.iter() {
            let (key, service) = entry.map_err(failed)?;
            let address = SocketAddr::new(IpAddr::from(key.address), u16::from_be(key.port));
            addresses.push((service.id, service.flags, address, service.backend));
        }
        addresses.sort_by_key(|(id, flags, address, _)| (*id, *flags & SERVICE_FIXED, *address));

        let mut backends = Vec::new();
        for id in 1..MAX_BACKENDS {
            let name = maps.backend_names.get(&id, 0).map_err(failed)?.to_string();
            let backend = maps.backends.get(&id, 0).map_err(failed)?;
            let state = match backend.flags {
                flags if flags & BACKEND_CONFIGURED == 0 => continue,
                flags if flags & BACKEND_LIVE == 0 => "unknown",
                flags if flags & BACKEND_DRAINING != 0 => "draining",
                flags if flags & BACKEND_TAKES == 0 => "down",
                _ => "up",
            };
            backends.push((name, self::backend(state, flows[id as usize], maps.traffic(id)?)));
        }

        let mut services = Vec::new();
        for id in 0..MAX_SERVICES {
            let own: Vec<_> = addresses.iter().filter(|(service, ..)| *service == id).collect();
            if own.is_empty() {
                continue;
            }
            let name = name_of(maps, id)?;
            let prefix = format!("{name}/");
            let describe = |(_, flags, address, backend): &&(u32, u32, SocketAddr, u32)| match flags
                & SERVICE_FIXED
                != 0
            {
                false => address.to_string(),
                true => {
                    let backend = maps.backend_names.get(backend, 0);
                    let backend = backend.map(|name| name.to_string()).unwrap_or_default();
                    format!("{address} = {}", backend.trim_start_matches(&prefix))
                }
            };
            services.push(Service {
                addresses: own.iter().map(describe).collect(),
                by_token: own.iter().any(|(_, flags, ..)| flags & SERVICE_TOKEN != 0),
                backends: backends
                    .iter()
                    .filter_map(|(full, backend)| {
                        let short = full.strip_prefix(&prefix)?;
                        Some(Backend { name: short.into(), ..backend.clone() })
                    })
                    .collect(),
                name,
            });
        }

        let counters = maps.counters()?;
        let counter =
            |name: &str| COUNTERS.iter().position(|(known, _)| *known == name).map_or(0, |at| counters[at]);
        let size = |map: &MapData| map.info().map(|info| u64::from(info.max_entries())).map_err(failed);
        let [mut tokens, mut fresh] = [0, 0];
        walk("tokens", maps.tokens.map(), |_| tokens += 1)?;
        walk("fresh", maps.fresh.map(), |_| fresh += 1)?;
        let evicted = |added: u64, present: u64| added.saturating_sub(present);
        Ok(Status {
            name: name.into(),
            program,
            services,
            tables: vec![
                Table {
                    name: "flows",
                    entries,
                    size: size(maps.flows.map())?,
                    evicted: evicted(
                        (counter("flows_added") + counter("flows_told"))
                            .saturating_sub(counter("flows_removed")),
                        entries,
                    ),
                },
                Table {
                    name: "tokens",
                    entries: tokens,
                    size: size(maps.tokens.map())?,
                    evicted: evicted(counter("tokens_added") + counter("tokens_told"), tokens),
                },
                Table {
                    name: "fresh",
                    entries: fresh,
                    size: size(maps.fresh.map())?,
                    evicted: evicted(counter("fresh_added").saturating_sub(counter("fresh_removed")), fresh),
                },
            ],
            counters: COUNTERS.iter().map(|(name, _)| *name).zip(counters).collect(),
        })
    }
}

/// Calls `each` with every value of a table. There may be millions.
fn walk(table: &str, map: &MapData, mut each: impl FnMut(&[u8])) -> Result<()> {
    let walked = mptcp::sys::bpf::entries(map.fd(), |_, value| each(value));
    walked.map_err(|error| Error::bpf(format!("read table {table}"), error))
}

fn as_map<S: Serializer>(counters: &[(&'static str, u64)], to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(counters.iter().copied())
}

fn name_of(maps: &Maps, service: u32) -> Result<String> {
    let name = maps.service_names.get(&service, 0);
    Ok(name.map_err(|error| Error::bpf("read the balancer's maps", error))?.to_string())
}

fn backend(state: &'static str, flows: u64, traffic: Traffic) -> Backend {
    Backend {
        name: String::new(),
        state,
        flows,
        packets: traffic.packets,
        bytes: traffic.bytes,
        connections: traffic.connections,
        plain: traffic.plain,
        joins: Joins {
            token: traffic.joins_by_token,
            port: traffic.joins_by_port,
            hash: traffic.joins_by_hash,
        },
    }
}
