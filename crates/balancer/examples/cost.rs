//! What the data plane costs: instructions that the verifier went through, and nanoseconds per packet by
//! BPF_PROG_TEST_RUN, by what the packet is. Needs root of the machine.
//!
//!     cargo run --release -p balancer --example cost
#![allow(clippy::print_stdout, reason = "the table is what it is for")]

use std::error::Error;
use std::net::{IpAddr, Ipv4Addr};

use aya::TestRunOptions;
use balancer::abi::{
    BACKEND_LIVE, BACKEND_TAKES, Backend, RING_SIZE, SERVICE_FIXED, SERVICE_TOKEN, Service, ServiceKey,
};
use balancer::config::Tables;
use balancer::plane::{Hook, Plane};

const ROUNDS: u32 = 5;
const PACKETS: u32 = 500_000;

const VIP: Ipv4Addr = Ipv4Addr::new(10, 83, 0, 1);
const SYN: u8 = 2;
const ACK: u8 = 16;
/// MP_CAPABLE version 1 of a SYN; of the third ACK; MP_JOIN with a token that nobody has.
const CAPABLE: [u8; 4] = [30, 4, 1, 1];
const KEYS: [u8; 20] = [30, 20, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2];
const JOIN: [u8; 12] = [30, 12, 0x10, 1, 9, 9, 9, 9, 7, 7, 7, 7];

fn main() -> Result<(), Box<dyn Error>> {
    for (hook, names) in [(Hook::Tc, ["balance", "unwrap"].as_slice()), (Hook::Xdp, &["balance"])] {
        let mut plane = Plane::load(hook, &Tables::default(), None)?;
        println!("{hook:?}");
        for name in names {
            let verified = plane.info(name)?.verified_instruction_count().unwrap_or(0);
            println!("  {name}: {verified} verified instructions");
        }
        measure(&mut plane)?;
    }
    Ok(())
}

fn measure(plane: &mut Plane) -> Result<(), Box<dyn Error>> {
    let here = IpAddr::from(VIP).into();
    let mac = [2, 0, 0, 0, 0, 1];
    let flags = BACKEND_LIVE | BACKEND_TAKES;
    let backend = Backend {
        to_mac: mac,
        from_mac: mac,
        ifindex: 1,
        flags,
        outer_source: here,
        outer_destination: here,
    };
    plane.tables.backends.set(1, backend, 0)?;
    for (port, flags) in [(80u16, SERVICE_TOKEN), (8081, SERVICE_FIXED)] {
        let key = ServiceKey { address: here, port: port.to_be(), unused: 0 };
        plane.tables.services.insert(key, Service { id: 0, flags, backend: 1 }, 0)?;
    }
    plane.tables.set_ring(0, &[1; RING_SIZE as usize])?;

    // A flow that has sent its SYN and its keys, and one whose SYN is known alone.
    once(plane, &packet(1, 80, SYN, &CAPABLE))?;
    once(plane, &packet(1, 80, ACK, &KEYS))?;
    let cases = [
        ("not for a service", packet(1, 81, ACK, &[])),
        ("of an established flow", packet(1, 80, ACK, &[])),
        ("to an announced port", packet(1, 8081, ACK, &[])),
        ("SYN of a connection", packet(2, 80, SYN, &CAPABLE)),
        ("SYN of a join, token unknown", packet(3, 80, SYN, &JOIN)),
        ("of a flow that nobody knows", packet(4, 80, ACK, &[])),
    ];
    println!("ns per packet: least, median, greatest of {ROUNDS} rounds of {PACKETS}");
    let mut seen = vec![Vec::new(); cases.len()];
    for _ in 0..ROUNDS {
        for ((_, packet), seen) in cases.iter().zip(&mut seen) {
            seen.push(run(plane, packet, PACKETS)?);
        }
    }
    for ((name, _), mut seen) in cases.iter().zip(seen) {
        seen.sort_unstable();
        println!("  {name}: {} {} {}", seen[0], seen[seen.len() / 2], seen[seen.len() - 1]);
    }
    Ok(())
}

fn once(plane: &mut Plane, packet: &[u8]) -> Result<(), Box<dyn Error>> {
    run(plane, packet, 1).map(drop)
}

/// Nanoseconds per packet.
fn run(plane: &mut Plane, packet: &[u8], repeat: u32) -> Result<u128, Box<dyn Error>> {
    let options = TestRunOptions { data_in: Some(packet), repeat, ..Default::default() };
    Ok(plane.test_run("balance", options)?.duration.as_nanos())
}

fn packet(from: u16, to: u16, flags: u8, options: &[u8]) -> Vec<u8> {
    let [words, length] = [(20 + options.len()) / 4, 40 + options.len()];
    let mut bytes = vec![2, 0, 0, 0, 0, 0xee, 2, 0, 0, 0, 0, 0xdd, 8, 0];
    bytes.extend([0x45, 0, 0, length as u8, 0, 0, 0, 0, 64, 6, 0, 0, 10, 81, 0, 10]);
    bytes.extend(VIP.octets());
    bytes.extend([from.to_be_bytes(), to.to_be_bytes()].concat());
    bytes.extend([0; 8]);
    bytes.extend([(words << 4) as u8, flags, 0xff, 0xff, 0, 0, 0, 0]);
    bytes.extend(options);
    bytes
}
