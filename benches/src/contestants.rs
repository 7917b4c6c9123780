//! Who takes part, as data: how each is started on either side, and what its processes use.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab::Lab;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use socket2::Protocol;

/// A way from the source to the sink.
pub struct Contestant {
    pub name: &'static str,
    pub way: Way,
}

pub enum Way {
    /// The source, on a host, connects to the sink on the server.
    Direct { from: &'static str, protocol: Protocol, to: &'static str },
    /// Through a client and a server proxy. In command and configuration, `{in}` and `{out}` are the protocols,
    /// `{port}` is where to listen and `{to}` where to connect to.
    Chain { command: &'static str, config: &'static str },
    /// The same with a program that starts a process for each connection.
    Forks { command: &'static str },
}

const HAPROXY: &str = "mptcpize run haproxy -f {config}";
const NGINX: &str = "mptcpize run nginx -e stderr -c {config}";

/// The tuned ones have larger buffers, splice where they can, and pass on a closed half as the others do by
/// default (nginx does not: it hangs up on both sides). Limits of connections are out of the way.
pub const CONTESTANTS: [Contestant; 10] = [
    Contestant {
        name: "direct MPTCP",
        way: Way::Direct { from: "client", protocol: Protocol::MPTCP, to: "10.123.200.2:5201" },
    },
    Contestant {
        name: "direct TCP",
        way: Way::Direct { from: "client", protocol: Protocol::TCP, to: "10.123.200.2:5201" },
    },
    // What a chain adds at either end, apart from the proxy's own work.
    Contestant {
        name: "loopback TCP",
        way: Way::Direct { from: "server", protocol: Protocol::TCP, to: "127.0.0.1:5201" },
    },
    Contestant {
        name: "braid",
        way: Way::Chain { command: "{braid} proxy --listen {in}://:{port} --to {out}://{to}", config: "" },
    },
    Contestant {
        name: "haproxy",
        way: Way::Chain {
            command: HAPROXY,
            config: "
global
    maxconn 6000
defaults
    mode tcp
    timeout connect 10s
    timeout client 10m
    timeout server 10m
listen relay
    bind :{port}
    server next {to}
",
        },
    },
    Contestant {
        name: "haproxy, tuned",
        way: Way::Chain {
            command: HAPROXY,
            config: "
global
    maxconn 6000
    tune.bufsize 262144
    tune.pipesize 1048576
defaults
    mode tcp
    option splice-auto
    timeout connect 10s
    timeout client 10m
    timeout server 10m
listen relay
    bind :{port}
    server next {to}
",
        },
    },
    Contestant {
        name: "nginx",
        way: Way::Chain {
            command: NGINX,
            config: "
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
user root;
daemon off;
pid {dir}/nginx.pid;
error_log stderr crit;
events { worker_connections 12000; }
stream { server { listen {port} backlog=4096; proxy_pass {to}; } }
",
        },
    },
    Contestant {
        name: "nginx, tuned",
        way: Way::Chain {
            command: NGINX,
            config: "
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
user root;
daemon off;
worker_processes auto;
pid {dir}/nginx.pid;
error_log stderr crit;
events { worker_connections 12000; }
stream { server { listen {port} backlog=4096; proxy_pass {to}; proxy_buffer_size 256k; proxy_half_close on; } }
",
        },
    },
    Contestant {
        name: "socat",
        way: Way::Forks {
            command: "mptcpize run socat TCP-LISTEN:{port},fork,reuseaddr,backlog=4096 TCP:{to}",
        },
    },
    Contestant {
        name: "socat, tuned",
        way: Way::Forks {
            command: "mptcpize run socat -b 1048576 TCP-LISTEN:{port},fork,reuseaddr,backlog=4096 TCP:{to}",
        },
    },
];

/// A running proxy with all its processes; dropping it ends them.
pub struct Proxy {
    child: Child,
    /// Configuration, pid file, messages.
    directory: tempfile::TempDir,
}

impl Proxy {
    /// Starts one side of a chain; returns when it listens.
    pub fn start(
        lab: &Lab,
        node: &str,
        [listen, dial]: [&str; 2],
        (port, to): (u16, &str),
        (command, config): (&str, &str),
        braid: &Path,
    ) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("config");
        let fill = |template: &str| {
            [
                ("{in}", listen),
                ("{out}", dial),
                ("{port}", &port.to_string()),
                ("{to}", to),
                ("{dir}", &directory.path().display().to_string()),
                ("{config}", &file.display().to_string()),
                ("{braid}", &braid.display().to_string()),
            ]
            .iter()
            .fold(template.to_string(), |text, (name, value)| text.replace(name, value))
        };
        fs::write(&file, fill(config))?;
        let words = fill(command);
        let mut words = words.split(' ');
        let program = words.next().unwrap_or_default();
        let mut command = lab.command(node, program)?;
        command.args(words).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(fs::File::create(directory.path().join("stderr"))?);
        let child = command.spawn().with_context(|| format!("start {program}"))?;
        let mut proxy = Proxy { child, directory };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !proxy.listens_on(port) {
            if let Some(status) = proxy.child.try_wait()? {
                let words = fs::read_to_string(proxy.directory.path().join("stderr"))?;
                bail!("{program} ended early, {status}: {}", words.trim());
            }
            if Instant::now() > deadline {
                bail!("{program} does not listen on port {port}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(proxy)
    }

    fn listens_on(&self, port: u16) -> bool {
        const LISTEN: &str = "0A";
        ["tcp", "tcp6"].iter().any(|table| {
            let path = format!("/proc/{}/net/{table}", self.child.id());
            fs::read_to_string(path).unwrap_or_default().lines().any(|line| {
                let mut words = line.split_whitespace().skip(1);
                let local = words.next().unwrap_or_default();
                local.ends_with(&format!(":{port:04X}")) && words.nth(1) == Some(LISTEN)
            })
        })
    }

    /// CPU seconds, user and system, of all its processes so far, those that have ended included.
    pub fn cpu(&self) -> f64 {
        let ticks: u64 = self
            .processes()
            .iter()
            .map(|stat| stat[11..15].iter().map(|field| field.parse::<u64>().unwrap_or(0)).sum::<u64>())
            .sum();
        ticks as f64 / TICKS_PER_SECOND
    }

    /// Memory of all its processes in bytes, shared pages divided by their users (PSS).
    pub fn memory(&self) -> u64 {
        let pss = |pid: &str| {
            let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
            let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let pid = |stat: &Vec<String>| stat.last().and_then(|pid| pss(pid));
        self.processes().iter().filter_map(pid).sum::<u64>() * 1024
    }

    /// The fields of `/proc/PID/stat` behind the name, and the pid at last, of each process of the group.
    fn processes(&self) -> Vec<Vec<String>> {
        let group = self.child.id().to_string();
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let stat = |entry: fs::DirEntry| {
            let text = fs::read_to_string(entry.path().join("stat")).ok()?;
            let (pid, rest) = (text.split(' ').next()?, text.rsplit_once(") ")?.1);
            let fields: Vec<String> = rest.split(' ').chain([pid]).map(String::from).collect();
            (fields.get(2) == Some(&group)).then_some(fields)
        };
        entries.filter_map(stat).collect()
    }
}

/// `USER_HZ`, the same on all architectures that Linux runs on today but alpha.
const TICKS_PER_SECOND: f64 = 100.0;

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}
