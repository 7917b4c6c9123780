//! The supervisor: a process beside the program that answers its stopped calls, and the watcher that tells when the
//! supervisor was killed.
//!
//! Both have a session of their own and take no signal but SIGKILL, so that neither Ctrl-C nor a service manager
//! that ends a whole group takes them from a program that is still shutting down. They hold nothing of the program's
//! but its standard error, and that only while the program itself runs.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use mptcp::sys::{process, seccomp};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, getpid, setsid};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{PidfdFlags, pidfd_open};

use crate::answer::{Answers, Rules};
use crate::{Error, Result};

/// Starts watcher and supervisor for the calling process. They wait for a listener over the returned connection, and
/// answer with the number of the supervisor's process, or with 0 where the kernel lacks `SECCOMP_ADDFD_FLAG_SEND`.
pub fn start(rules: Rules, note: fn(&dyn Display)) -> Result<UnixStream> {
    let pid = getpid();
    let main = open_process(pid).map_err(Error::system("open this process"))?;
    let (near, far) = UnixStream::pair().map_err(Error::system("make a socket pair"))?;
    // Two forks, and an end between them: a program that waits for its children must not find any.
    let between = process::fork_with(move || {
        u8::from(process::fork_with(move || exit_code(watch((pid, main), far, rules, note))).is_err())
    });
    let between = between.map_err(Error::system("start the supervisor"))?;
    match waitpid(between, None) {
        Ok(WaitStatus::Exited(_, 0)) => Ok(near),
        Ok(_) => Err(Error::Unsupported("the supervisor did not start")),
        Err(error) => Err(Error::system("start the supervisor")(error)),
    }
}

fn exit_code(result: io::Result<()>) -> u8 {
    u8::from(result.is_err())
}

/// The watcher's life: starts the supervisor, and says it if that was killed while the program still ran.
fn watch(
    (main_pid, main): (Pid, OwnedFd),
    far: UnixStream,
    rules: Rules,
    note: fn(&dyn Display),
) -> io::Result<()> {
    setsid()?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
    chdir("/")?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    drop(null);
    let (name, main_of_supervisor) = (rules.plan.name(), main.try_clone()?);
    let pid =
        process::fork_with(move || exit_code(supervise((main_pid, main_of_supervisor), far, rules, note)))?;
    let supervisor = open_process(pid)?;
    process::close_all_but(&[main.as_fd(), supervisor.as_fd()]);
    let program_has_ended = wait_for([&main, &supervisor])? == [true, false];
    if program_has_ended {
        close_stderr()?;
    }
    if let WaitStatus::Signaled(_, signal, _) = waitpid(pid, None)?
        && !program_has_ended
    {
        note(&format_args!(
            "the supervisor of {name} was killed ({signal}): new TCP sockets fail with ENOSYS, connections go on"
        ));
    }
    Ok(())
}

/// The supervisor's life: answers until no process is left to ask.
fn supervise(
    (main_pid, main): (Pid, OwnedFd),
    mut far: UnixStream,
    rules: Rules,
    note: fn(&dyn Display),
) -> io::Result<()> {
    let report_wanted = rules.plan.report.is_some();
    let report_to = rules.plan.report.as_ref().map(|report| report.file.as_fd());
    let keep: Vec<BorrowedFd<'_>> = [main.as_fd(), far.as_fd()].into_iter().chain(report_to).collect();
    process::close_all_but(&keep);
    drop(keep);
    let Some(listener) = receive_listener(&far)? else { return Ok(()) };
    if !can_answer(&listener)? {
        return far.write_all(&0i32.to_ne_bytes());
    }
    seccomp::wake_on_same_processor(&listener);
    let usr1 = SignalFd::with_flags(&Signal::SIGUSR1.into(), SfdFlags::SFD_CLOEXEC)?;
    let mut answers = Answers::new(rules, main_pid.as_raw())?;
    if report_wanted {
        note(&format_args!("for a report on the way: kill -USR1 {}", getpid()));
    }
    far.write_all(&getpid().as_raw().to_ne_bytes())?;
    drop(far);

    let mut main = Some(main);
    loop {
        let mut fds = vec![
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(usr1.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(main.iter().map(|main| PollFd::new(main.as_fd(), PollFlags::POLLIN)));
        poll(&mut fds, PollTimeout::NONE)?;
        let [calls, signal, program] =
            [0, 1, 2].map(|n| fds.get(n).and_then(PollFd::revents).unwrap_or(PollFlags::empty()));
        if calls.contains(PollFlags::POLLIN) {
            if let Some(call) = seccomp::receive(&listener)? {
                answers.answer(&listener, &call);
            }
        } else if calls.contains(PollFlags::POLLHUP) {
            answers.report();
            return Ok(());
        }
        if signal.contains(PollFlags::POLLIN) {
            usr1.read_signal()?;
            answers.report_now();
        }
        if program.contains(PollFlags::POLLIN) {
            main = None;
            answers.report();
            close_stderr()?;
        }
    }
}

/// The descriptor that the main process sends. `None`: it sent none, and has said why by itself.
fn receive_listener(far: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    recvmsg(far, &mut [IoSliceMut::new(&mut [0])], &mut message, RecvFlags::CMSG_CLOEXEC)?;
    Ok(message.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    }))
}

/// Does the kernel know `SECCOMP_ADDFD_FLAG_SEND`? Asked with a call that is not there: it looks at the flags first
/// (seccomp_notify_addfd()).
fn can_answer(listener: &OwnedFd) -> io::Result<bool> {
    match seccomp::answer_with(listener, 0, io::stdin(), true) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        result => result.map(|()| true),
    }
}

fn open_process(pid: Pid) -> io::Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid.as_raw()).ok_or(Errno::ESRCH)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Waits until one of two processes has ended, and says which have.
fn wait_for(processes: [&OwnedFd; 2]) -> io::Result<[bool; 2]> {
    let mut fds = processes.map(|process| PollFd::new(process.as_fd(), PollFlags::POLLIN));
    poll(&mut fds, PollTimeout::NONE)?;
    Ok(fds.map(|fd| fd.any().unwrap_or(false)))
}

/// Who reads a pipe that was the program's standard error waits for the last one who has it.
fn close_stderr() -> io::Result<()> {
    Ok(dup2_stderr(File::options().write(true).open("/dev/null")?)?)
}
