//! bpf(2), as far as aya has no calls for it: programs that change what functions of the kernel return; maps read in batches.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Kernel's `enum bpf_cmd`, `bpf_map_type`, `bpf_prog_type`, `bpf_attach_type`.
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const OBJ_GET: libc::c_int = 7;
const LINK_DETACH: libc::c_int = 34;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const RAW_TRACEPOINT_OPEN: libc::c_int = 17;
const MAP_LOOKUP_BATCH: libc::c_int = 24;
const HASH: u32 = 1;
const CGROUP_ARRAY: u32 = 8;
const LRU_HASH: u32 = 9;
const TRACING: u32 = 26;
const MODIFY_RETURN: u32 = 26;

/// One instruction: opcode, registers (destination in the low half), offset and immediate value, as the kernel's
/// `struct bpf_insn` has them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Instruction {
    pub opcode: u8,
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

/// Loads `program`, which is to stand before the kernel function that has the number `function` in the kernel's BTF
/// (`BPF_MODIFY_RETURN`): where it returns something else than 0, the function is not called, and has returned that.
///
/// Needs CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN. EPERM also where the kernel is locked down; EINVAL where the
/// function may not be changed.
pub fn load_before(function: u32, program: &[Instruction]) -> io::Result<OwnedFd> {
    /// `union bpf_attr` for BPF_PROG_LOAD, up to what is needed here.
    #[repr(C)]
    struct Attributes {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
        prog_name: [u8; 16],
        prog_ifindex: u32,
        expected_attach_type: u32,
        prog_btf_fd: u32,
        func_info_rec_size: u32,
        func_info: u64,
        func_info_cnt: u32,
        line_info_rec_size: u32,
        line_info: u64,
        line_info_cnt: u32,
        attach_btf_id: u32,
    }
    let mut attributes = Attributes {
        prog_type: TRACING,
        insn_cnt: u32::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        insns: program.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: *b"braid_mptcpify\0\0",
        prog_ifindex: 0,
        expected_attach_type: MODIFY_RETURN,
        prog_btf_fd: 0,
        func_info_rec_size: 0,
        func_info: 0,
        func_info_cnt: 0,
        line_info_rec_size: 0,
        line_info: 0,
        line_info_cnt: 0,
        attach_btf_id: function,
    };
    // SAFETY: the kernel reads `insn_cnt` instructions and the license, a C string; both outlive the call.
    let fd = unsafe { bpf(PROG_LOAD, &mut attributes) }?;
    // SAFETY: the kernel has just given us this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Puts a program of [`load_before`] in its place, for as long as the descriptor is open.
pub fn attach(program: impl AsFd) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        name: u64,
        prog_fd: i32,
        padding: u32,
    }
    // Without a name: where the program was loaded for.
    let mut attributes = Attributes { name: 0, prog_fd: program.as_fd().as_raw_fd(), padding: 0 };
    // SAFETY: no pointer is in it.
    let fd = unsafe { bpf(RAW_TRACEPOINT_OPEN, &mut attributes) }?;
    // SAFETY: the kernel has just given us this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A map that holds one control group, its directory, for `bpf_current_task_under_cgroup()`.
pub fn cgroup_map(directory: impl AsFd) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
    }
    #[repr(C)]
    struct Update {
        map_fd: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let mut create = Create { map_type: CGROUP_ARRAY, key_size: 4, value_size: 4, max_entries: 1 };
    // SAFETY: no pointer is in it.
    let fd = unsafe { bpf(MAP_CREATE, &mut create) }?;
    // SAFETY: the kernel has just given us this descriptor, nobody else owns it.
    let map = unsafe { OwnedFd::from_raw_fd(fd) };
    let (key, value) = (0u32, directory.as_fd().as_raw_fd());
    let mut update = Update {
        map_fd: map.as_raw_fd() as u32,
        padding: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    // SAFETY: the kernel reads `key_size` and `value_size` bytes, four each, which outlive the call.
    unsafe { bpf(MAP_UPDATE_ELEM, &mut update) }?;
    Ok(map)
}

/// Detaches the program of the link that is pinned at `path`, before the call returns: when only its file is removed, the
/// kernel does that some time later.
pub fn detach_pinned_link(path: &Path) -> io::Result<()> {
    #[repr(C)]
    struct Get {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut get = Get { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the kernel reads the path, a C string, which outlives the call.
    let fd = unsafe { bpf(OBJ_GET, &mut get) }?;
    // SAFETY: the kernel has just given us this descriptor, nobody else owns it.
    let link = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut number = link.as_raw_fd();
    // SAFETY: no pointer is in it.
    unsafe { bpf(LINK_DETACH, &mut number) }.map(drop)
}

/// Calls `each` with key and value of every entry of a hash map, LRU or not, thousands for each call of the kernel. An
/// entry that comes or goes meanwhile may be among them.
pub fn entries(map: impl AsFd, mut each: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
    /// The beginning of the kernel's `struct bpf_map_info`.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        map_type: u32,
        id: u32,
        key_size: u32,
        value_size: u32,
    }
    #[repr(C)]
    struct GetInfo {
        fd: u32,
        size: u32,
        info: u64,
    }
    #[repr(C)]
    struct Lookup {
        in_batch: u64,
        out_batch: u64,
        keys: u64,
        values: u64,
        count: u32,
        map_fd: u32,
        elem_flags: u64,
        flags: u64,
    }
    let fd = map.as_fd().as_raw_fd() as u32;
    let mut info = Info::default();
    let mut get = GetInfo { fd, size: size_of::<Info>() as u32, info: &raw mut info as u64 };
    // SAFETY: the kernel writes `size` bytes at most, integers, to `info`, which outlives the call.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut get) }?;
    // Of others a value may be another for each processor, or more than bytes.
    if ![HASH, LRU_HASH].contains(&info.map_type) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let (key_size, value_size) = (info.key_size as usize, info.value_size as usize);
    let mut most = 4096;
    // Where to go on: a number of a bucket.
    let (mut from, mut to) = (None, 0u32);
    loop {
        let (mut keys, mut values) = (vec![0u8; most * key_size], vec![0u8; most * value_size]);
        let mut lookup = Lookup {
            in_batch: from.as_ref().map_or(0, |from| std::ptr::from_ref::<u32>(from) as u64),
            out_batch: &raw mut to as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: most as u32,
            map_fd: fd,
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the kernel reads four bytes from `from`, and writes four to `to` and `count` keys and values, of the
        // sizes that it has just told for this map, at most. All of them outlive the call.
        let result = unsafe { bpf(MAP_LOOKUP_BATCH, &mut lookup) };
        let last = match result.as_ref().map_err(io::Error::raw_os_error) {
            Ok(_) => false,
            Err(Some(libc::ENOENT)) => true,
            // A bucket has more entries.
            Err(Some(libc::ENOSPC)) => {
                most *= 2;
                continue;
            }
            Err(_) => return result.map(drop),
        };
        let found = lookup.count as usize;
        for (key, value) in keys.chunks(key_size).zip(values.chunks(value_size)).take(found) {
            each(key, value);
        }
        if last {
            return Ok(());
        }
        from = Some(to);
    }
}

/// bpf(2).
///
/// # Safety
/// `T` begins as `union bpf_attr` does for `command`, and its pointers are good for what `command` does with them.
unsafe fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: the kernel reads and writes as many bytes as we say; for the rest see above.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}
