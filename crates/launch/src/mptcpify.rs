//! Every TCP socket of a host, or of a control group, made Multipath TCP: a BPF program stands before the kernel's
//! `update_socket_protocol()`, which socket(2) asks for the protocol and which is there for this (Linux 6.6 and newer).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya_obj::btf::{Btf, BtfError, BtfKind};
use libc::{
    AF_INET, AF_INET6, BPF_ALU, BPF_AND, BPF_IMM, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_LDX, BPF_MEM, BPF_X,
    IPPROTO_MPTCP, IPPROTO_TCP, SOCK_STREAM,
};
use mptcp::sys::bpf::{self, Instruction};
use rustix::thread::{CapabilitySet, capabilities};

/// Why TCP sockets stay what they are.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The caller may not load such programs.
    #[error(
        "load a BPF program: needs CAP_BPF and CAP_PERFMON (root); `braid run PROGRAM` needs no privilege"
    )]
    Capability,
    /// The kernel does not describe itself.
    #[error(
        "read {BTF}: {0}: this kernel has no BTF (CONFIG_DEBUG_INFO_BTF); `braid run PROGRAM` needs none"
    )]
    NoBtf(String),
    /// The function is not there.
    #[error(
        "this kernel has no {HOOK}() for BPF to change (Linux 6.6 and newer); `braid run PROGRAM` does without"
    )]
    NoHook,
    /// The kernel lets nobody do this.
    #[error(
        "{what}: {source}: this kernel lets nobody change what its functions return (locked down, perhaps); \
         `braid run PROGRAM` does without"
    )]
    Refused {
        /// Operation.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The directory is none of a control group.
    #[error("{} is no control group of version 2", .0.display())]
    NoCgroup(PathBuf),
    /// The control group cannot be looked at.
    #[error("control group {}: {source}", path.display())]
    Cgroup {
        /// Its directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// As long as this lives, new TCP sockets are MPTCP ones. The kernel ends it with the process at the latest.
#[derive(Debug)]
pub struct Mptcpify {
    _link: OwnedFd,
}

impl Mptcpify {
    /// For every program of the host, in all network namespaces, or for those in the control group (version 2) with the
    /// directory `cgroup` and in groups below it. Sockets that exist already stay what they are.
    pub fn start(cgroup: Option<&Path>) -> Result<Self, Error> {
        if !may_load() {
            return Err(Error::Capability);
        }
        let group = cgroup.map(|path| {
            let map = File::open(path).and_then(bpf::cgroup_map);
            map.map_err(|source| match source.raw_os_error() {
                // No directory of a control group.
                Some(libc::EBADF) => Error::NoCgroup(path.into()),
                // Root of a user namespace is not the host's.
                Some(libc::EPERM) => Error::Capability,
                _ => Error::Cgroup { path: path.into(), source: plain(source) },
            })
        });
        let group = group.transpose()?;
        let function = function()?;
        let program = program(group.as_ref().map(AsRawFd::as_raw_fd));
        let refused = |what| move |source| Error::Refused { what, source: plain(source) };
        let program = bpf::load_before(function, &program).map_err(refused("load the BPF program"))?;
        let link = bpf::attach(program).map_err(refused("attach the BPF program"))?;
        Ok(Mptcpify { _link: link })
    }
}

const HOOK: &str = "update_socket_protocol";
const BTF: &str = "/sys/kernel/btf/vmlinux";

fn may_load() -> bool {
    let both = CapabilitySet::BPF | CapabilitySet::PERFMON;
    capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(both) || sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

/// The number of the kernel function in the kernel's own description.
fn function() -> Result<u32, Error> {
    let btf = Btf::from_sys_fs().map_err(|error| match error {
        BtfError::FileError { error, .. } => Error::NoBtf(plain(error).to_string()),
        other => Error::NoBtf(other.to_string()),
    })?;
    btf.id_by_type_name_kind(HOOK, BtfKind::Func).map_err(|_| Error::NoHook)
}

/// Without Rust's `(os error N)`.
fn plain(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::new(error.kind(), nix::errno::Errno::from_raw(code).desc()),
        None => error,
    }
}

const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R6: u8 = 6;
const R7: u8 = 7;

// Of `include/uapi/linux/bpf.h`, what libc has not.
const BPF_DW: u32 = 0x18;
const BPF_MOV: u32 = 0xb0;
const BPF_CALL: u32 = 0x80;
const BPF_EXIT: u32 = 0x90;
const BPF_JNE: u32 = 0x50;
const BPF_JMP32: u32 = 0x06;
const BPF_ALU64: u32 = 0x07;
/// In the source register of a load: the value is the descriptor of a map.
const PSEUDO_MAP_FD: u8 = 1;
/// The helper `bpf_current_task_under_cgroup()`.
const CURRENT_TASK_UNDER_CGROUP: i32 = 37;
/// The part of socket(2)'s second argument that is the type (`SOCK_TYPE_MASK`).
const TYPE: i32 = 0xf;

/// `family`, `type` and `protocol` are where the context pointer, in R1, leads: eight bytes each. What this returns,
/// `update_socket_protocol()` has returned, except for 0: then that itself runs, and returns `protocol`, 0.
fn program(cgroup: Option<i32>) -> Vec<Instruction> {
    let argument = |to, number: i16| op(BPF_LDX | BPF_MEM | BPF_DW, to, R6, number * 8, 0);
    let mov = |to, from| op(BPF_ALU64 | BPF_MOV | BPF_X, to, from, 0, 0);
    let set = |to, value| op(BPF_ALU64 | BPF_MOV | BPF_K, to, 0, 0, value);
    // Comparisons of 32 bits: the upper half of an int argument may hold anything.
    let skip_if_equal = |register, value, count| op(BPF_JMP32 | BPF_JEQ | BPF_K, register, 0, count, value);
    let or_keep = |register, value| op(BPF_JMP32 | BPF_JNE | BPF_K, register, 0, KEEP, value);
    let exit = op(BPF_JMP | BPF_EXIT, 0, 0, 0, 0);

    let mut program = vec![mov(R6, R1), argument(R7, 2)];
    if let Some(map) = cgroup {
        program.extend([
            op(BPF_LD | BPF_DW | BPF_IMM, R1, PSEUDO_MAP_FD, 0, map),
            op(0, 0, 0, 0, 0), // the upper half of the value
            set(R2, 0),
            op(BPF_JMP | BPF_CALL, 0, 0, 0, CURRENT_TASK_UNDER_CGROUP),
            or_keep(R0, 1),
        ]);
    }
    program.extend([
        argument(R1, 0),
        skip_if_equal(R1, AF_INET, 1),
        or_keep(R1, AF_INET6),
        argument(R1, 1),
        op(BPF_ALU | BPF_AND | BPF_K, R1, 0, 0, TYPE),
        or_keep(R1, SOCK_STREAM),
        skip_if_equal(R7, 0, 1),
        or_keep(R7, IPPROTO_TCP),
        set(R0, IPPROTO_MPTCP),
        exit,
    ]);
    let keep = program.len();
    program.extend([op(BPF_ALU | BPF_MOV | BPF_X, R0, R7, 0, 0), exit]);
    for (at, instruction) in program.iter_mut().enumerate() {
        if instruction.offset == KEEP {
            instruction.offset = (keep - at - 1) as i16;
        }
    }
    program
}

/// Stands for the way to the end, where the protocol stays what it was, until that is known.
const KEEP: i16 = i16::MAX;

fn op(opcode: u32, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { opcode: opcode as u8, registers: to | from << 4, offset, immediate }
}

#[cfg(test)]
mod tests {
    use super::*;

    // What the program does, only a kernel that takes it can show: see the tests of `braid mptcpify`.
    #[test]
    fn jumps_lead_to_the_end_where_the_protocol_stays() {
        for program in [program(None), program(Some(7))] {
            let keep = program.len() - 2;
            for (at, instruction) in program.iter().enumerate() {
                if u32::from(instruction.opcode) == BPF_JMP32 | BPF_JNE | BPF_K {
                    assert_eq!(at + 1 + instruction.offset as usize, keep);
                }
            }
        }
        assert_eq!(
            program(Some(7))[2],
            Instruction { opcode: 0x18, registers: 0x11, offset: 0, immediate: 7 }
        );
    }
}
