//! The data plane as the control plane sees it: programs, maps and interfaces.
//!
//! A pinned plane outlives its process: maps and links are files in a directory of a BPF file system, and a
//! successor takes them over without a packet in between. One that is not pinned is held by file descriptors
//! alone, so that the kernel removes it with the process, however that ends.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use aya::maps::{Array, ArrayOfMaps, HashMap as BpfHash, Map, MapData, MapInfo, PerCpuArray};
use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::xdp::XdpLink;
use aya::programs::{
    LinkOrder, Program, ProgramError, ProgramInfo, SchedClassifier, TcAttachType, TestRunResult, XdpMode,
};
use aya::{Ebpf, EbpfLoader, TestRun as _, TestRunOptions};
use nix::net::if_::if_nametoindex;
use rustix::thread::{CapabilitySet, capabilities};

use crate::abi::{
    Address, Backend, COUNTERS, Flow, Name, RING_SIZE, Service, ServiceKey, TokenKey, TokenSlots, Traffic,
    Tuple,
};
use crate::config::Tables;
use crate::{Error, Result};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb.bpf.o"));
static XDP_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-xdp.bpf.o"));
/// For tests: the option parser alone.
#[doc(hidden)]
pub static INSPECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/inspect.bpf.o"));
/// For benches: a source and a sink of packets.
#[doc(hidden)]
pub static FLOOD: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/flood.bpf.o"));

/// Maps whose size the configuration says.
const SIZED: [&str; 3] = ["flows", "fresh", "tokens"];

const MAPS: [&str; 11] = [
    "services",
    "backends",
    "backend_names",
    "service_names",
    "rings",
    "flows",
    "fresh",
    "tokens",
    "fragments",
    "traffic",
    "counters",
];

/// Where the kernel hands a packet to the balancer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// TC ingress: on every interface.
    Tc,
    /// XDP in the network card's driver, before the kernel has made a socket buffer of the frame. Not every driver can.
    Xdp,
}

/// The programs, loaded, and the interfaces that they are attached to.
pub struct Plane {
    hook: Hook,
    ebpf: Ebpf,
    /// The maps.
    pub tables: Maps,
    pins: Option<PathBuf>,
    /// By interface: its number when the program was attached, and the link.
    links: HashMap<String, (u32, Held)>,
    made: Option<Made>,
}

/// What keeps a program attached.
#[allow(dead_code)] // held, not read
enum Held {
    Pinned(PinnedLink),
    Own(FdLink),
}

/// The maps, typed.
#[allow(missing_docs)] // `bpf/maps.h` says it
pub struct Maps {
    pub services: BpfHash<MapData, ServiceKey, Service>,
    pub backends: Array<MapData, Backend>,
    pub backend_names: Array<MapData, Name>,
    pub service_names: Array<MapData, Name>,
    pub rings: ArrayOfMaps<MapData, Array<MapData, u32>>,
    pub flows: BpfHash<MapData, Tuple, Flow>,
    pub fresh: BpfHash<MapData, Tuple, Flow>,
    pub tokens: BpfHash<MapData, TokenKey, TokenSlots>,
    pub traffic: PerCpuArray<MapData, Traffic>,
    pub counters: PerCpuArray<MapData, u64>,
}

impl Plane {
    /// Loads the programs. With `pins`, takes over the maps that are pinned there already, and pins those that are not.
    /// Needs CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN, in the first user namespace.
    pub fn load(hook: Hook, tables: &Tables, pins: Option<&Path>) -> Result<Self> {
        may_load()?;
        let object = if hook == Hook::Xdp { XDP_OBJECT } else { OBJECT };
        let mut loader = EbpfLoader::new();
        loader
            .map_max_entries("flows", tables.flows)
            .map_max_entries("fresh", tables.fresh)
            .map_max_entries("tokens", tables.tokens);
        let mut made = None;
        if let Some(pins) = pins {
            made = Some(Made::directory(pins)?);
            if pins.join("services").exists() {
                adopt(pins, object)?;
            }
            for map in MAPS {
                loader.map_pin_path(map, pins.join(map));
            }
        }
        let failed = |error: aya::EbpfError| Error::bpf("load the BPF programs", error);
        let mut ebpf = loader.load(object).map_err(failed)?;
        let tables = match pins {
            Some(pins) => Maps::pinned(pins)?,
            None => Maps::of(|name| {
                ebpf.take_map(name).ok_or_else(|| Error::Bpf {
                    what: format!("open map {name}"),
                    says: "the object has none".into(),
                })
            })?,
        };
        for (_, program) in ebpf.programs_mut() {
            let loaded = match program {
                Program::Xdp(program) => program.load(),
                other => <&mut SchedClassifier>::try_from(other).and_then(SchedClassifier::load),
            };
            loaded.map_err(|error| Error::bpf("load the BPF programs", error))?;
        }
        Ok(Plane { hook, ebpf, tables, pins: pins.map(Into::into), links: HashMap::new(), made })
    }

    /// From now on what is pinned stays. Before, dropping the plane removes what it has pinned, unless a
    /// predecessor had pinned it.
    pub fn keep(&mut self) {
        if let Some(made) = &mut self.made {
            made.0 = None;
        }
    }

    /// Balances what comes in on these interfaces of the calling thread's network namespace, and on no others. A
    /// program that a predecessor attached is replaced in one moment. An interface that has gone and come back gets the
    /// program again. After an error those that can be attached to are.
    pub fn attach(&mut self, interfaces: &[String]) -> Result<()> {
        let mut attached = Ok(());
        for interface in interfaces {
            if let Err(error) = self.attach_again(interface, "balance") {
                attached = attached.and(Err(error));
            }
        }
        attached?;
        self.links.retain(|interface, _| interfaces.contains(interface));
        let Some(pins) = &self.pins else { return Ok(()) };
        for (interface, path) in pinned_links(pins)? {
            if !interfaces.contains(&interface) {
                remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// On a backend: takes tunnelled packets from `peers` out of their outer header, on these interfaces.
    pub fn attach_unwrap(&mut self, interfaces: &[String], peers: &[std::net::IpAddr]) -> Result<()> {
        let map = self.ebpf.take_map("tunnel_peers").ok_or_else(|| Error::Bpf {
            what: "open map tunnel_peers".into(),
            says: "the object has none".into(),
        })?;
        let mut allowed: BpfHash<MapData, Address, u32> =
            BpfHash::try_from(map).map_err(|error| Error::bpf("open map tunnel_peers", error))?;
        for peer in peers {
            let address = Address::from(*peer);
            allowed
                .insert(address, 1, 0)
                .map_err(|error| Error::bpf(format!("allow tunnels from {peer}"), error))?;
        }
        interfaces.iter().try_for_each(|interface| self.attach_again(interface, "unwrap"))
    }

    /// Unless it is there already.
    fn attach_again(&mut self, interface: &str, program: &str) -> Result<()> {
        let number = if_nametoindex(interface)
            .map_err(|error| Error::io(format!("attach to interface {interface}"), error))?;
        if self.links.get(interface).is_none_or(|(before, _)| *before != number) {
            let held = self.attach_to(interface, program)?;
            self.links.insert(interface.into(), (number, held));
        }
        Ok(())
    }

    fn attach_to(&mut self, interface: &str, program: &str) -> Result<Held> {
        let mut what = format!("attach to interface {interface}");
        if self.hook == Hook::Xdp {
            what += " as XDP (not every driver does that, nor with every setting; without xdp any interface does)";
        }
        let failed = |error: ProgramError| Error::bpf(what.clone(), error);
        let no_link = |error: LinkError| Error::bpf(what.clone(), error);
        let pin = self.pins.as_ref().map(|pins| pins.join(format!("{LINK}{interface}")));
        // Kept until the end, so that a predecessor's program works until ours does.
        let mut _old = None;
        if let Some(pin) = &pin
            && let Ok(old) = PinnedLink::from_pin(pin)
        {
            // Where it fails, the predecessor had another hook, or the interface that the link belonged to is gone and one of
            // its name has come.
            if self.take_over(program, old.into()) {
                return PinnedLink::from_pin(pin).map(Held::Pinned).map_err(no_link);
            }
            _old = PinnedLink::from_pin(pin).ok();
            remove_file(pin)?;
        }
        let link: FdLink = match self.program(program)? {
            Program::Xdp(program) => {
                let id = program.attach(interface, XdpMode::Driver).map_err(failed)?;
                program.take_link(id).map_err(failed)?.try_into().map_err(no_link)?
            }
            other => {
                let program: &mut SchedClassifier = other.try_into().map_err(failed)?;
                let order = TcAttachOptions::TcxOrder(LinkOrder::default());
                let id =
                    program.attach_with_options(interface, TcAttachType::Ingress, order).map_err(failed)?;
                program.take_link(id).map_err(failed)?.try_into().map_err(no_link)?
            }
        };
        match pin {
            None => Ok(Held::Own(link)),
            Some(pin) => link.pin(pin).map(Held::Pinned).map_err(|error| Error::bpf(what, error)),
        }
    }

    /// Replaces the program of a link in one moment, if the link is of its kind.
    fn take_over(&mut self, program: &str, link: FdLink) -> bool {
        match self.ebpf.program_mut(program) {
            Some(Program::Xdp(program)) => {
                XdpLink::try_from(link).is_ok_and(|link| program.attach_to_link(link).is_ok())
            }
            Some(Program::SchedClassifier(program)) => {
                SchedClassifierLink::try_from(link).is_ok_and(|link| program.attach_to_link(link).is_ok())
            }
            _ => false,
        }
    }

    fn program(&mut self, name: &str) -> Result<&mut Program> {
        let missing =
            || Error::Bpf { what: format!("find BPF program {name}"), says: "the object has none".into() };
        self.ebpf.program_mut(name).ok_or_else(missing)
    }

    /// One packet, or the same many times, through the program `name`, without a network.
    #[doc(hidden)]
    pub fn test_run(&mut self, name: &str, options: TestRunOptions<'_>) -> Result<TestRunResult> {
        let failed = |error: ProgramError| Error::bpf(format!("test BPF program {name}"), error);
        match self.program(name)? {
            Program::Xdp(program) => program.test_run(options).map_err(failed),
            other => {
                let program: &SchedClassifier = (&*other).try_into().map_err(failed)?;
                program.test_run(options).map_err(failed)
            }
        }
    }

    /// What the kernel says about the program `name`.
    #[doc(hidden)]
    pub fn info(&mut self, name: &str) -> Result<ProgramInfo> {
        self.program(name)?.info().map_err(|error| Error::bpf(format!("look at BPF program {name}"), error))
    }
}

const LINK: &str = "link-";

impl Maps {
    /// Those of a pinned plane.
    pub fn pinned(pins: &Path) -> Result<Self> {
        Self::of(|name| open_pinned(pins, name))
    }

    fn of(mut open: impl FnMut(&str) -> Result<Map>) -> Result<Self> {
        fn typed<T: TryFrom<Map, Error = aya::maps::MapError>>(
            name: &str,
            open: &mut impl FnMut(&str) -> Result<Map>,
        ) -> Result<T> {
            T::try_from(open(name)?).map_err(|error| Error::Bpf {
                what: format!("open map {name}"),
                says: format!("made by another version of braid, which `braid lb down` ends ({error})"),
            })
        }
        let open = &mut open;
        Ok(Maps {
            services: typed("services", open)?,
            backends: typed("backends", open)?,
            backend_names: typed("backend_names", open)?,
            service_names: typed("service_names", open)?,
            rings: typed("rings", open)?,
            flows: typed("flows", open)?,
            fresh: typed("fresh", open)?,
            tokens: typed("tokens", open)?,
            traffic: typed("traffic", open)?,
            counters: typed("counters", open)?,
        })
    }

    /// Gives the service with number `id` another ring, in one moment. Empty: nobody takes connections.
    pub fn set_ring(&mut self, id: u32, ring: &[u32]) -> Result<()> {
        let failed = |error: aya::maps::MapError| Error::bpf(format!("set the ring of service {id}"), error);
        let mut next: Array<MapData, u32> = Array::create(RING_SIZE, 0).map_err(failed)?;
        for (place, backend) in (0..).zip(ring) {
            next.set(place, *backend, 0).map_err(failed)?;
        }
        self.rings.set(id, &next, 0).map_err(failed)
    }

    /// The counters that belong to no backend, summed up over all processors, as [`COUNTERS`] orders them.
    pub fn counters(&self) -> Result<[u64; COUNTERS.len()]> {
        let mut sums = [0; COUNTERS.len()];
        // Another version's map may be shorter.
        for (index, sum) in (0..self.counters.len()).zip(&mut sums) {
            let values = self.counters.get(&index, 0).map_err(|error| Error::bpf("read counters", error))?;
            *sum = values.iter().sum();
        }
        Ok(sums)
    }

    /// What the backend with number `id` was sent, summed up over all processors.
    pub fn traffic(&self, id: u32) -> Result<Traffic> {
        let values = self.traffic.get(&id, 0).map_err(|error| Error::bpf("read counters", error))?;
        let sum = |field: fn(&Traffic) -> u64| values.iter().map(field).sum();
        Ok(Traffic {
            packets: sum(|t| t.packets),
            bytes: sum(|t| t.bytes),
            connections: sum(|t| t.connections),
            plain: sum(|t| t.plain),
            joins_by_token: sum(|t| t.joins_by_token),
            joins_by_port: sum(|t| t.joins_by_port),
            joins_by_hash: sum(|t| t.joins_by_hash),
        })
    }
}

fn open_pinned(pins: &Path, name: &str) -> Result<Map> {
    let failed =
        |error: aya::maps::MapError| Error::bpf(format!("open map {}", pins.join(name).display()), error);
    Map::from_map_data(MapData::from_pin(pins.join(name)).map_err(failed)?).map_err(failed)
}

/// Makes what a predecessor has pinned fit the programs of `object`, which may be those of a later version, or says what
/// does not.
fn adopt(pins: &Path, object: &[u8]) -> Result<()> {
    let object =
        aya_obj::Object::parse(object).map_err(|error| Error::bpf("read the BPF programs", error))?;
    for name in MAPS {
        let path = pins.join(name);
        let Some(wanted) = object.maps.get(name) else { continue };
        if !path.exists() {
            tracing::warn!("table {name} begins empty: the version of braid that ran here before had none");
            continue;
        }
        let failed = |error: aya::maps::MapError| Error::bpf(format!("open map {}", path.display()), error);
        let there = MapInfo::from_pin(&path).map_err(failed)?;
        // One of another size would be written beyond its end.
        let alike = (there.key_size(), there.value_size()) == (wanted.key_size(), wanted.value_size());
        let has_room = SIZED.contains(&name) || there.max_entries() >= wanted.max_entries();
        match (name, alike, has_room) {
            (_, true, true) => {}
            ("counters", true, false) => lengthen_counters(pins, wanted.max_entries())?,
            _ => {
                let balancer = pins.file_name().unwrap_or_default().to_string_lossy();
                return Err(Error::Bpf {
                    what: format!("take over map {}", path.display()),
                    says: format!(
                        "another version of braid has made it, and the kernel goes on balancing by it. `braid lb down \
                         {balancer}` removes it with all flows and tokens: a start after that knows only those that \
                         backends' agents tell"
                    ),
                });
            }
        }
    }
    Ok(())
}

/// Puts a map with this many counters in the place of a shorter one, which the programs of a predecessor have until
/// they are replaced.
fn lengthen_counters(pins: &Path, length: u32) -> Result<()> {
    let failed = |error: aya::maps::MapError| Error::bpf("lengthen the balancer's counters", error);
    let before = PerCpuArray::<_, u64>::try_from(open_pinned(pins, "counters")?).map_err(failed)?;
    let mut after: PerCpuArray<MapData, u64> = PerCpuArray::create(length, 0).map_err(failed)?;
    for index in 0..before.len() {
        after.set(index, before.get(&index, 0).map_err(failed)?, 0).map_err(failed)?;
    }
    let (there, next) = (pins.join("counters"), pins.join("counters-next"));
    remove_file(&next)?;
    after.pin(&next).map_err(|error| Error::bpf(format!("pin {}", next.display()), error))?;
    std::fs::rename(&next, &there).map_err(|error| Error::io(format!("replace {}", there.display()), error))
}

/// Interfaces with a pinned link, and the link's file.
fn pinned_links(pins: &Path) -> Result<Vec<(String, PathBuf)>> {
    let entries =
        std::fs::read_dir(pins).map_err(|error| Error::io(format!("read {}", pins.display()), error))?;
    let link = |path: PathBuf| {
        let interface = path.file_name()?.to_str()?.strip_prefix(LINK)?.to_string();
        Some((interface, path))
    };
    Ok(entries.flatten().filter_map(|entry| link(entry.path())).collect())
}

/// Is there a plane pinned in `pins` that gets packets?
pub fn is_attached(pins: &Path) -> bool {
    pinned_links(pins).is_ok_and(|links| !links.is_empty())
}

/// Removes the plane that is pinned in `pins`, also another version's: links first, so that no packet sees half of it.
pub fn remove(pins: &Path) -> Result<()> {
    for (_, path) in pinned_links(pins)? {
        // Where its interface is gone, so is what there was to detach.
        if let Err(error) = mptcp::sys::bpf::detach_pinned_link(&path) {
            tracing::debug!(%error, path = %path.display(), "not detached");
        }
        remove_file(&path)?;
    }
    let rest =
        std::fs::read_dir(pins).map_err(|error| Error::io(format!("read {}", pins.display()), error))?;
    for map in rest.flatten() {
        remove_file(&map.path())?;
    }
    std::fs::remove_dir(pins).map_err(|error| Error::io(format!("remove {}", pins.display()), error))
}

fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("remove {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

/// Names the capabilities that loading and attaching the programs need, where one is missing.
pub fn may_load() -> Result<()> {
    let needed = CapabilitySet::BPF | CapabilitySet::PERFMON | CapabilitySet::NET_ADMIN;
    let has = capabilities(None).map_err(|e| Error::io("read our capabilities", e))?.effective;
    // Which the first two were split off from.
    let implied = match has.contains(CapabilitySet::SYS_ADMIN) {
        true => CapabilitySet::BPF | CapabilitySet::PERFMON,
        false => CapabilitySet::empty(),
    };
    match (has | implied).contains(needed) {
        true => Ok(()),
        false => Err(Error::capability("load the BPF programs")),
    }
}

/// The directory of pins, which goes again where it was new and loading failed.
struct Made(Option<PathBuf>);

impl Made {
    fn directory(pins: &Path) -> Result<Self> {
        let new = !pins.exists();
        std::fs::create_dir_all(pins).map_err(|error| not_bpf(pins, error.to_string()))?;
        let made = Made(new.then(|| pins.into()));
        let kind = nix::sys::statfs::statfs(pins)
            .map_err(|error| Error::io(format!("look at {}", pins.display()), error))?;
        if kind.filesystem_type() != nix::sys::statfs::BPF_FS_MAGIC {
            return Err(not_bpf(pins, "not on a BPF file system".into()));
        }
        Ok(made)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if let Some(pins) = &self.0
            && let Err(error) = remove(pins)
        {
            tracing::debug!(%error, "pins not removed");
        }
    }
}

fn not_bpf(pins: &Path, says: String) -> Error {
    Error::Bpf {
        what: format!("pin the maps in {}", pins.display()),
        says: format!("{says} (mount -t bpf bpf /sys/fs/bpf; or pin = false)"),
    }
}

#[cfg(test)]
mod tests {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    use super::*;
    use crate::abi::FLOW_SYN_SEEN;

    const TABLES: Tables = Tables { flows: 2048, fresh: 1024, tokens: 1024 };

    /// Runs `test` with a directory for pins, in a mount namespace with a BPF file system that goes with it.
    fn with_pins(test: impl FnOnce(&Path) + Send) {
        let map = std::fs::read_to_string("/proc/self/uid_map").unwrap();
        if may_load().is_err() || !map.split_whitespace().eq(["0", "0", "4294967295"]) {
            // Not println, which the test harness keeps to itself.
            let why = b"skipped: only root of the machine loads BPF programs, not root of a user namespace\n";
            std::io::Write::write_all(&mut std::io::stderr(), why).unwrap();
            return;
        }
        let private = || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            let directory = tempfile::tempdir().unwrap();
            mount(none, directory.path(), Some("bpf"), MsFlags::empty(), none).unwrap();
            test(&directory.path().join("old"));
            nix::mount::umount(directory.path()).unwrap();
        };
        std::thread::scope(|scope| scope.spawn(private).join().unwrap());
    }

    fn flow(port: u16) -> (Tuple, Flow) {
        let client = Address([7; 16]);
        let tuple = Tuple { source: client, destination: client, source_port: port, destination_port: 80 };
        (tuple, Flow { backend: 3, seen: 1, flags: FLOW_SYN_SEEN, tick: 0, sequence: 0 })
    }

    /// A pinned plane with flows, as its program leaves it behind.
    fn old(pins: &Path) {
        let mut plane = Plane::load(Hook::Tc, &TABLES, Some(pins)).unwrap();
        plane.keep();
        for port in 0..100 {
            let (tuple, flow) = flow(port);
            plane.tables.flows.insert(tuple, flow, 0).unwrap();
        }
    }

    #[test]
    fn a_version_that_counts_more_goes_on_with_the_flows_and_counts_of_the_one_before() {
        with_pins(|pins| {
            old(pins);
            std::fs::remove_file(pins.join("counters")).unwrap();
            let mut fewer: PerCpuArray<MapData, u64> = PerCpuArray::create(3, 0).unwrap();
            for index in 0..3 {
                let mut values = fewer.get(&index, 0).unwrap().to_vec();
                values[0] = u64::from(index) + 40;
                fewer.set(index, aya::maps::PerCpuValues::try_from(values).unwrap(), 0).unwrap();
            }
            fewer.pin(pins.join("counters")).unwrap();
            // Its status is told before the new one starts, too.
            let before = Maps::pinned(pins).unwrap().counters().unwrap();
            assert_eq!(before[..4], [40, 41, 42, 0]);

            let mut plane = Plane::load(Hook::Tc, &TABLES, Some(pins)).unwrap();
            assert_eq!(plane.tables.counters().unwrap()[..4], [40, 41, 42, 0]);
            let last = COUNTERS.len() as u32 - 1;
            let values = plane.tables.counters.get(&last, 0).unwrap();
            plane.tables.counters.set(last, values, 0).unwrap();
            assert_eq!(plane.tables.flows.keys().count(), 100);
            assert_eq!(plane.tables.flows.get(&flow(5).0, 0).unwrap(), flow(5).1);
            drop(plane);
            remove(pins).unwrap();
        });
    }

    #[test]
    fn a_table_of_another_layout_is_refused_with_what_its_end_costs_and_stays() {
        with_pins(|pins| {
            old(pins);
            std::fs::remove_file(pins.join("flows")).unwrap();
            let other: BpfHash<MapData, Tuple, [u8; 24]> = BpfHash::create(2048, 0).unwrap();
            other.pin(pins.join("flows")).unwrap();
            let Err(error) = Plane::load(Hook::Tc, &TABLES, Some(pins)) else { panic!("loaded") };
            let error = error.to_string();
            assert!(error.contains("old/flows: another version of braid has made it"), "{error}");
            assert!(error.contains("`braid lb down old` removes it with all flows and tokens"), "{error}");
            assert!(MAPS.iter().all(|map| pins.join(map).exists()));
            // Also with what this version does not know.
            std::fs::rename(pins.join("tokens"), pins.join("from-the-future")).unwrap();
            remove(pins).unwrap();
            assert!(!pins.exists());
        });
    }
}
