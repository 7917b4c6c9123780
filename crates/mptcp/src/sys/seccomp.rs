//! System calls that another process answers: seccomp(2) filters with user notification, seccomp_unotify(2).

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// One instruction of a filter: classic BPF over `struct seccomp_data`.
pub type Instruction = libc::sock_filter;

/// Puts `filter` before every system call of the calling thread, and of what it starts from now on; nobody can take
/// it away again. The descriptor is where the calls arrive for which the filter says `SECCOMP_RET_USER_NOTIF`; once
/// its last copy is closed, those calls fail with ENOSYS.
///
/// Fails with EACCES for a caller that has neither CAP_SYS_ADMIN nor `no_new_privs`, with EBUSY where an earlier
/// filter has a listener already, with EINVAL before Linux 5.0.
pub fn install(filter: &[Instruction]) -> io::Result<OwnedFd> {
    // Without the first, kernels before 5.16 make the program slower against Spectre; the filter guards no secret.
    let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW | libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
    // A signal that comes while the answer is on its way must not take the call back (Linux 5.19 and newer).
    match set_filter(flags | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, filter) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => set_filter(flags, filter),
        result => result,
    }
}

fn set_filter(flags: libc::c_ulong, filter: &[Instruction]) -> io::Result<OwnedFd> {
    let length = u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len: length, filter: filter.as_ptr().cast_mut() };
    // SAFETY: `program` describes `filter`, which outlives the call; the kernel copies it and writes to neither.
    let fd =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A system call that waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Names this call in answers. It becomes invalid when the caller dies.
    pub id: u64,
    /// The calling thread, in the pid namespace of the one who asks; 0 if it cannot be seen from there.
    pub tid: i32,
    /// `AUDIT_ARCH_*`.
    pub arch: u32,
    /// Number of the system call.
    pub number: i32,
    /// Its arguments; a pointer is one of the caller.
    pub args: [u64; 6],
}

/// The next call. `None`: its caller is gone already.
pub fn receive(listener: impl AsFd) -> io::Result<Option<Call>> {
    // The kernel writes its own `struct seccomp_notif`, which may grow; it has grown never so far.
    let mut buffer = [0u64; 64];
    // SAFETY: `buffer` is aligned for and larger than any `struct seccomp_notif` the kernel may write, zeroed as it
    // asks, and outlives the call.
    let result = unsafe {
        libc::ioctl(listener.as_fd().as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV as _, buffer.as_mut_ptr())
    };
    if result < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ENOENT) { Ok(None) } else { Err(error) };
    }
    const { assert!(size_of::<libc::seccomp_notif>() <= 64 * size_of::<u64>()) };
    // SAFETY: the kernel has filled in a `struct seccomp_notif`, plain integers, of which `buffer` has the alignment.
    let notification = unsafe { buffer.as_ptr().cast::<libc::seccomp_notif>().read() };
    Ok(Some(Call {
        id: notification.id,
        tid: notification.pid as i32,
        arch: notification.data.arch,
        number: notification.data.nr,
        args: notification.data.args,
    }))
}

/// Does the caller of call `id` still wait? What was read of `/proc/PID` before a yes was read of the caller, and not
/// of one that got its number later.
pub fn is_waiting(listener: impl AsFd, id: u64) -> bool {
    // SAFETY: the kernel reads one u64, which outlives the call.
    let result = unsafe {
        libc::ioctl(listener.as_fd().as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID as _, &raw const id)
    };
    result == 0
}

/// Lets the kernel do call `id` as if there were no filter.
pub fn let_pass(listener: impl AsFd, id: u64) -> io::Result<()> {
    answer(
        listener,
        libc::seccomp_notif_resp {
            id,
            val: 0,
            error: 0,
            flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        },
    )
}

/// Makes call `id` fail with `errno`.
pub fn refuse(listener: impl AsFd, id: u64, errno: i32) -> io::Result<()> {
    answer(listener, libc::seccomp_notif_resp { id, val: 0, error: -errno, flags: 0 })
}

fn answer(listener: impl AsFd, response: libc::seccomp_notif_resp) -> io::Result<()> {
    // SAFETY: the kernel reads one `struct seccomp_notif_resp`, which outlives the call, and writes nothing else.
    let result = unsafe {
        libc::ioctl(listener.as_fd().as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND as _, &raw const response)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Answers call `id` with a new descriptor of its caller for `file`, both in one step: no descriptor is left with a
/// caller that died or was interrupted before the answer (`SECCOMP_ADDFD_FLAG_SEND`, Linux 5.14 and newer, else
/// EINVAL). ENOENT: the caller does not wait any more. EMFILE: it has no room, and still waits for an answer.
pub fn answer_with(listener: impl AsFd, id: u64, file: impl AsFd, close_on_exec: bool) -> io::Result<()> {
    let fd = libc::seccomp_notif_addfd {
        id,
        flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
        srcfd: file.as_fd().as_raw_fd() as u32,
        newfd: 0,
        newfd_flags: if close_on_exec { libc::O_CLOEXEC as u32 } else { 0 },
    };
    add(listener, fd)
}

/// Puts `file` in the place of descriptor `fd` of the caller of `id`, in one step as dup2(2) does. The call still waits
/// for its answer.
pub fn put_in_place(
    listener: impl AsFd,
    id: u64,
    file: impl AsFd,
    fd: i32,
    close_on_exec: bool,
) -> io::Result<()> {
    let fd = libc::seccomp_notif_addfd {
        id,
        flags: libc::SECCOMP_ADDFD_FLAG_SETFD as u32,
        srcfd: file.as_fd().as_raw_fd() as u32,
        newfd: fd as u32,
        newfd_flags: if close_on_exec { libc::O_CLOEXEC as u32 } else { 0 },
    };
    add(listener, fd)
}

fn add(listener: impl AsFd, fd: libc::seccomp_notif_addfd) -> io::Result<()> {
    // SAFETY: the kernel reads one `struct seccomp_notif_addfd`, which outlives the call, and writes nothing.
    let result = unsafe {
        libc::ioctl(listener.as_fd().as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ADDFD as _, &raw const fd)
    };
    // The number of the descriptor is the caller's affair.
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Asks the kernel to run the one who answers on the processor of the one who asks, which saves a wake-up of another
/// processor each way (Linux 6.6 and newer; elsewhere nothing happens).
pub fn wake_on_same_processor(listener: impl AsFd) {
    const SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP: libc::c_ulong = 1;
    // SAFETY: this ioctl takes its argument as a number.
    unsafe {
        libc::ioctl(
            listener.as_fd().as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS as _,
            SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP,
        );
    }
}
