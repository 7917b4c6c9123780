//! Which system calls the supervisor hears of, as a seccomp filter: classic BPF, generated from a table.
//!
//! A filter sees the registers of a call, not the memory behind them. It compares what the kernel will use: 32 bits of
//! an `int` argument, and of a socket's type the part below the flags.

use std::mem::offset_of;

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW,
    SECCOMP_RET_USER_NOTIF, seccomp_data,
};
use mptcp::sys::seccomp::Instruction;

use crate::options::SocketOption;

/// `AUDIT_ARCH_*` of the system calls of this processor's own programs. 32-bit programs on a 64-bit kernel have
/// another one, and x32 programs numbers of their own: neither is stopped.
const ARCH: u32 = if cfg!(target_arch = "x86_64") {
    0xc000_003e
} else if cfg!(target_arch = "aarch64") {
    0xc000_00b7
} else if cfg!(target_arch = "riscv64") {
    0xc000_00f3
} else {
    panic!("the filter does not know this architecture's AUDIT_ARCH")
};

/// `AUDIT_ARCH_I386`: the 32-bit programs that an x86-64 kernel runs.
pub const I386: u32 = 0x4000_0003;

/// Of these, the two system calls for sockets; the second has its arguments in memory, and is for other calls, too.
pub const I386_SOCKET: libc::c_long = 359;
/// See [`I386_SOCKET`].
pub const I386_SOCKETCALL: libc::c_long = 102;

/// The part of socket(2)'s second argument that is the type (`SOCK_TYPE_MASK`).
const TYPE: u32 = 0xf;

/// A system call that stops for the supervisor, if all conditions hold.
pub struct Trap {
    /// Number of the system call.
    pub call: libc::c_long,
    /// On its arguments.
    pub conditions: Vec<Condition>,
}

/// Argument number `argument`, masked, is one of `values`.
pub struct Condition {
    argument: usize,
    mask: u32,
    values: Vec<u32>,
}

impl Condition {
    fn new(argument: usize, values: &[i32]) -> Self {
        Condition { argument, mask: u32::MAX, values: values.iter().map(|&value| value as u32).collect() }
    }
}

/// Calls that make a TCP socket.
pub fn socket() -> Trap {
    socket_by(libc::SYS_socket)
}

/// Calls of 32-bit programs that make a TCP socket, or any.
pub fn sockets_of_32_bit() -> [Trap; 2] {
    const SYS_SOCKET: i32 = 1;
    [
        socket_by(I386_SOCKET),
        Trap { call: I386_SOCKETCALL, conditions: vec![Condition::new(0, &[SYS_SOCKET])] },
    ]
}

/// Does socket(2) with these arguments make a TCP socket?
pub fn is_tcp([family, kind, protocol]: [u32; 3]) -> bool {
    [libc::AF_INET, libc::AF_INET6].contains(&(family as i32))
        && (kind & TYPE) as i32 == libc::SOCK_STREAM
        && [0, libc::IPPROTO_TCP].contains(&(protocol as i32))
}

fn socket_by(call: libc::c_long) -> Trap {
    Trap {
        call,
        conditions: vec![
            Condition::new(0, &[libc::AF_INET, libc::AF_INET6]),
            Condition { mask: TYPE, ..Condition::new(1, &[libc::SOCK_STREAM]) },
            Condition::new(2, &[0, libc::IPPROTO_TCP]),
        ],
    }
}

/// Each of these calls.
pub fn every(call: libc::c_long) -> Trap {
    Trap { call, conditions: Vec::new() }
}

/// Calls that set one of `options`, which are of one level.
pub fn setsockopt(options: &[SocketOption]) -> Trap {
    let levels: Vec<i32> = options.iter().map(|option| option.level).take(1).collect();
    let numbers: Vec<i32> = options.iter().map(|option| option.number).collect();
    Trap {
        call: libc::SYS_setsockopt,
        conditions: vec![Condition::new(1, &levels), Condition::new(2, &numbers)],
    }
}

/// The filter that stops at `traps`, for 32-bit programs at `traps_32_bit`, and lets everything else pass.
pub fn assemble(traps: &[Trap], traps_32_bit: &[Trap]) -> Vec<Instruction> {
    let arch = offset_of!(seccomp_data, arch);
    let mut filter = match traps_32_bit {
        [] => Vec::new(),
        traps => test(arch, u32::MAX, &[I386], traps.iter().flat_map(block).collect()),
    };
    filter.extend([load(arch), jump_if_equal(ARCH, 1, 0), ret(SECCOMP_RET_ALLOW)]);
    filter.extend(traps.iter().flat_map(block));
    filter.push(ret(SECCOMP_RET_ALLOW));
    filter
}

/// Stops at `trap`, goes on behind the block otherwise.
fn block(trap: &Trap) -> Vec<Instruction> {
    let mut block = vec![ret(SECCOMP_RET_USER_NOTIF)];
    for condition in trap.conditions.iter().rev() {
        // Of each argument the low half; all architectures above are little-endian.
        let offset = offset_of!(seccomp_data, args) + condition.argument * size_of::<u64>();
        block = test(offset, condition.mask, &condition.values, block);
    }
    test(offset_of!(seccomp_data, nr), u32::MAX, &[trap.call as u32], block)
}

/// `then` if the masked word at `offset` is one of `values`, else on behind it.
fn test(offset: usize, mask: u32, values: &[u32], then: Vec<Instruction>) -> Vec<Instruction> {
    let mut code = vec![load(offset)];
    if mask != u32::MAX {
        code.push(instruction(BPF_ALU | BPF_AND | BPF_K, mask));
    }
    for (&value, others) in values.iter().zip((0..values.len()).rev()) {
        code.push(jump_if_equal(value, others, if others == 0 { then.len() } else { 0 }));
    }
    code.extend(then);
    code
}

fn load(offset: usize) -> Instruction {
    instruction(BPF_LD | BPF_W | BPF_ABS, offset as u32)
}

fn ret(action: u32) -> Instruction {
    instruction(BPF_RET | BPF_K, action)
}

/// Skips `yes` or `no` instructions, at most 255.
fn jump_if_equal(value: u32, yes: usize, no: usize) -> Instruction {
    let [jt, jf] = [yes, no].map(|skip| u8::try_from(skip).expect("the table of traps makes short blocks"));
    Instruction { jt, jf, ..instruction(BPF_JMP | BPF_JEQ | BPF_K, value) }
}

fn instruction(code: u32, k: u32) -> Instruction {
    Instruction { code: code as u16, jt: 0, jf: 0, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    const X32: i32 = 0x4000_0000;

    /// What the kernel's interpreter does with the few instructions that are used.
    fn stops(filter: &[Instruction], arch: u32, nr: i32, args: [u64; 6]) -> bool {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let Instruction { code, jt, jf, k } = filter[at];
            at += 1;
            match u32::from(code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => {
                    accumulator = match k as usize {
                        0 => nr as u32,
                        4 => arch,
                        offset => {
                            assert_eq!((offset - 16) % 8, 0);
                            args[(offset - 16) / 8] as u32
                        }
                    }
                }
                code if code == BPF_ALU | BPF_AND | BPF_K => accumulator &= k,
                code if code == BPF_JMP | BPF_JEQ | BPF_K => {
                    at += usize::from(if accumulator == k { jt } else { jf });
                }
                code if code == BPF_RET | BPF_K => return k == SECCOMP_RET_USER_NOTIF,
                code => panic!("instruction {code:#x}"),
            }
        }
    }

    #[test]
    fn tcp_sockets_stop_and_nothing_else_does() {
        let filter = assemble(&[socket()], &[]);
        let nr = libc::SYS_socket as i32;
        let call = |domain: i32, kind: i32, protocol: i32| {
            [domain as u64, kind as u64, protocol as u64, u64::MAX, u64::MAX, u64::MAX]
        };
        for domain in [libc::AF_INET, libc::AF_INET6] {
            for flags in [0, libc::SOCK_CLOEXEC, libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC] {
                for protocol in [0, libc::IPPROTO_TCP] {
                    let args = call(domain, libc::SOCK_STREAM | flags, protocol);
                    assert!(stops(&filter, ARCH, nr, args), "{args:?}");
                    assert!(!stops(&filter, I386, nr, args));
                    assert!(!stops(&filter, ARCH, nr | X32, args));
                    assert!(!stops(&filter, ARCH, libc::SYS_connect as i32, args));
                    // The kernel looks at the low half of a register only.
                    assert!(stops(&filter, ARCH, nr, args.map(|arg| arg | 1 << 32)));
                }
            }
        }
        for (domain, kind, protocol) in [
            (libc::AF_UNIX, libc::SOCK_STREAM, 0),
            (libc::AF_INET, libc::SOCK_DGRAM, 0),
            (libc::AF_INET, libc::SOCK_SEQPACKET, 0),
            (libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_TCP),
            (libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_SCTP),
            (libc::AF_INET, libc::SOCK_STREAM, 262),
            (libc::AF_NETLINK, libc::SOCK_STREAM, 0),
        ] {
            assert!(!stops(&filter, ARCH, nr, call(domain, kind, protocol)), "{domain} {kind} {protocol}");
        }
    }

    #[test]
    fn each_trap_is_tested_for_on_its_own() {
        let trap = |call, values: &[i32]| Trap { call, conditions: vec![Condition::new(1, values)] };
        let filter = assemble(
            &[trap(1, &[5]), trap(2, &[6, 7, 8]), trap(1, &[9]), Trap { call: 3, conditions: vec![] }],
            &[],
        );
        let stopped = |nr: i32| {
            (0..12).filter(|&value| stops(&filter, ARCH, nr, [0, value, 0, 0, 0, 0])).collect::<Vec<_>>()
        };
        assert_eq!(stopped(1), [5, 9]);
        assert_eq!(stopped(2), [6, 7, 8]);
        assert_eq!(stopped(3).len(), 12);
        assert_eq!(stopped(4), [0; 0]);
    }

    #[test]
    fn calls_of_32_bit_programs_stop_where_that_is_wanted() {
        let filter = assemble(&[socket()], &sockets_of_32_bit());
        let tcp = [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0];
        for (arch, call, args, expected) in [
            (ARCH, libc::SYS_socket, tcp, true),
            (ARCH, I386_SOCKET, tcp, false),
            (ARCH, I386_SOCKETCALL, [1; 6], false),
            (I386, libc::SYS_socket, tcp, false),
            (I386, I386_SOCKET, tcp, true),
            (I386, I386_SOCKET, [libc::AF_UNIX as u64; 6], false),
            (I386, I386_SOCKETCALL, [1; 6], true),
            (I386, I386_SOCKETCALL, [3; 6], false),
        ] {
            assert_eq!(stops(&filter, arch, call as i32, args), expected, "{arch:x} {call} {args:?}");
        }
    }
}
