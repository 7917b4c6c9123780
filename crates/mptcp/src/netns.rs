//! Network namespaces: finding them, and doing things inside one from an async program.
//!
//! A thread belongs to one network namespace, and an async runtime moves tasks between threads. So nothing
//! here changes the namespace of a thread that somebody else may use: [`Netns::run`] makes a thread of its
//! own for each call, and [`Netns::enter_on_exec`] changes the child, not the caller. A socket stays in the namespace
//! where it was made, so that it suffices to make it inside and to use it anywhere:
//!
//! ```no_run
//! # async fn example() -> mptcp::Result<()> {
//! use mptcp::socket::{self, Options};
//!
//! let phone = mptcp::Netns::named("phone")?;
//! let listener = phone.run(|| socket::listen("[::]:8080".parse().unwrap(), &Options::default()))??;
//! let (stream, peer) = listener.accept().await.unwrap(); // in "phone", from any thread
//! # Ok(()) }
//! ```

use std::fmt;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use nix::sched::{CloneFlags, setns, unshare};
use tokio::runtime::Handle;

use crate::{Error, Result, sys};

/// Where `ip netns` keeps its namespaces.
pub const NETNS_DIR: &str = "/run/netns";

/// A network namespace, held open: it lives at least as long as this handle.
#[derive(Clone)]
pub struct Netns {
    file: Arc<File>,
    name: String,
}

impl Netns {
    /// The namespace of the calling thread.
    pub fn current() -> Result<Self> {
        Self::open("/proc/thread-self/ns/net".into(), "current".into())
    }

    /// The namespace that `ip netns` knows under `name`.
    pub fn named(name: &str) -> Result<Self> {
        Self::open(Path::new(NETNS_DIR).join(name), name.into())
    }

    /// The namespace bound to `path`.
    pub fn from_path(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let name = path.display().to_string();
        Self::open(path, name)
    }

    /// The namespace of the process `pid`. That of another user's process needs CAP_SYS_PTRACE (proc_ns_get_link()).
    pub fn of_pid(pid: u32) -> Result<Self> {
        match Self::open(format!("/proc/{pid}/ns/net").into(), format!("pid {pid}")) {
            Err(Error::Io { what, source }) if source.kind() == ErrorKind::PermissionDenied => {
                Err(Error::Capability { what, capability: "CAP_SYS_PTRACE" })
            }
            opened => opened,
        }
    }

    /// A new namespace without a name; it ends with its last handle, socket and process.
    /// Needs CAP_SYS_ADMIN.
    pub fn anonymous() -> Result<Self> {
        on_new_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|e| denied("create a network namespace", e))?;
            Self::open("/proc/thread-self/ns/net".into(), "anonymous".into())
        })
    }

    fn open(path: PathBuf, name: String) -> Result<Self> {
        let file = File::open(&path)
            .map_err(|e| Error::io(format!("open network namespace {} ({})", name, path.display()), e))?;
        Ok(Netns { file: Arc::new(file), name })
    }

    /// The name it was opened by, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `f` on a thread of its own that has entered the namespace, and waits for it. Entering needs
    /// CAP_SYS_ADMIN, except where the caller's thread is in this namespace already.
    ///
    /// The caller blocks meanwhile, so `f` should be short: make a socket, read a file, start a program.
    /// Where the caller is inside a tokio runtime, so is `f`: it may make tokio's sockets and spawn tasks.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        if self.is_current() {
            return Ok(f());
        }
        let runtime = Handle::try_current().ok();
        on_new_thread(|| {
            let _inside = runtime.as_ref().map(Handle::enter);
            #[expect(clippy::disallowed_methods, reason = "this thread is ours and ends with `f`")]
            setns(&*self.file, CloneFlags::CLONE_NEWNET)
                .map_err(|e| denied(format!("enter network namespace {}", self.name), e))?;
            Ok(f())
        })
    }

    /// Makes `command`'s process enter the namespace between fork and exec, which needs CAP_SYS_ADMIN, except where the
    /// caller's thread, which is to start it, is in this namespace already.
    pub fn enter_on_exec(&self, command: &mut Command) {
        if self.is_current() {
            return;
        }
        sys::setns_on_exec(command, Arc::clone(&self.file));
    }

    fn is_current(&self) -> bool {
        Self::current().is_ok_and(|current| current == *self)
    }
}

impl PartialEq for Netns {
    fn eq(&self, other: &Self) -> bool {
        match (self.file.metadata(), other.file.metadata()) {
            (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
            _ => false,
        }
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl fmt::Debug for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Netns({})", self.name)
    }
}

fn on_new_thread<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let builder = std::thread::Builder::new().name("netns".into());
    std::thread::scope(|scope| {
        let thread = builder.spawn_scoped(scope, f).map_err(|e| Error::io("start a thread", e))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn denied(what: impl Into<String>, errno: nix::errno::Errno) -> Error {
    match errno {
        nix::errno::Errno::EPERM => Error::Capability { what: what.into(), capability: "CAP_SYS_ADMIN" },
        _ => Error::io(what, errno),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn no_thread_is_left_in_another_namespace() {
        let before = Netns::current().unwrap();
        let other = Netns::anonymous().unwrap();
        assert_ne!(other, before);
        let inside = other.run(|| (Netns::current().unwrap(), std::thread::current().id())).unwrap();
        assert_eq!(inside.0, other);
        assert_ne!(inside.1, std::thread::current().id());
        assert_eq!(Netns::current().unwrap(), before);
        // A joined thread may still be on its way out.
        let give_up = Instant::now() + Duration::from_secs(20);
        while threads().contains(&other) {
            assert!(Instant::now() < give_up, "a thread stayed");
            std::thread::yield_now();
        }
    }

    /// The namespaces of the threads of this process.
    fn threads() -> Vec<Netns> {
        let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        threads.filter_map(|thread| Netns::from_path(thread.path().join("ns/net")).ok()).collect()
    }

    #[test]
    fn a_nested_run_comes_back_to_where_it_was() {
        let (outer, inner) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
        outer
            .run(|| {
                assert_eq!(inner.run(|| Netns::current().unwrap()).unwrap(), inner);
                assert_eq!(Netns::current().unwrap(), outer);
            })
            .unwrap();
    }

    #[test]
    fn a_panic_inside_reaches_the_caller() {
        let other = Netns::anonymous().unwrap();
        let panicked = std::panic::catch_unwind(|| other.run(|| panic!("on purpose")));
        assert_eq!(*panicked.unwrap_err().downcast::<&str>().unwrap(), "on purpose");
    }

    #[test]
    fn a_command_starts_in_the_namespace_and_the_caller_stays() {
        let (before, other) = (Netns::current().unwrap(), Netns::anonymous().unwrap());
        let mut command = Command::new("readlink");
        other.enter_on_exec(command.arg("/proc/self/ns/net"));
        let printed = String::from_utf8(command.output().unwrap().stdout).unwrap();
        assert_eq!(printed.trim(), format!("net:[{}]", other.file.metadata().unwrap().ino()));
        assert_eq!(Netns::current().unwrap(), before);
    }

    #[test]
    fn a_namespace_is_found_by_the_pid_of_a_process_in_it() {
        let other = Netns::anonymous().unwrap();
        let mut command = Command::new("cat");
        other.enter_on_exec(command.stdin(std::process::Stdio::piped()));
        let mut process = command.spawn().unwrap(); // returns after exec, so in the namespace
        assert_eq!(Netns::of_pid(process.id()).unwrap(), other);
        drop(process.stdin.take());
        process.wait().unwrap();
    }

    #[test]
    fn an_absent_namespace_is_named() {
        let error = Netns::named("no-such-namespace").unwrap_err().to_string();
        assert_eq!(
            error,
            "open network namespace no-such-namespace (/run/netns/no-such-namespace): No such file or directory"
        );
    }

    #[tokio::test]
    async fn tokio_sockets_can_be_made_inside() {
        let other = Netns::anonymous().unwrap();
        let udp = other.run(|| {
            std::net::UdpSocket::bind("127.0.0.1:0").map(|udp| {
                udp.set_nonblocking(true).unwrap();
                tokio::net::UdpSocket::from_std(udp).unwrap()
            })
        });
        // `lo` is down there, and 127.0.0.1 with it: here it could be reached.
        let udp = udp.unwrap().unwrap();
        let error = udp.send_to(b"x", "127.0.0.1:9").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NetworkUnreachable);
    }
}
