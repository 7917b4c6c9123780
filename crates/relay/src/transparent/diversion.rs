//! Puts the rules of a transparent service into the kernel and takes them away, however this process ends.
//!
//! The table belongs to a helper, `nft -i`, which reads its commands from a pipe of ours. When the pipe closes,
//! because the [`Diversion`] is dropped or because this process is gone, the helper removes policy routing and
//! ends, and with it the kernel removes the table (flag `owner`, Linux 5.12 and newer; `nft_rcv_nl_event`). That
//! holds even if the helper is killed too; then only policy routing is left, which without the table applies to
//! no packet, and which the next start removes.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mptcp::{Error, Result};
use rustix::thread::{CapabilitySet, capabilities, configure_capability_in_ambient_set, set_capabilities};

use super::rules::{FAMILIES, mark, port_of_rule, table};
use super::{Capture, Rules};

/// How long a helper of a process that has just died may take to clean up.
const PATIENCE: Duration = Duration::from_secs(5);

/// The installed rules of one transparent service; dropping it removes them, and blocks until they are gone.
#[derive(Debug)]
pub struct Diversion {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rules: Rules,
    helper: Helper,
}

#[derive(Debug)]
struct Helper {
    process: Child,
    /// Open as long as the rules stand.
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Diversion {
    /// Installs `rules`, and removes what a dead process has left. The listener must be there already: so no
    /// connection is diverted to nobody, and no other live process has the same port.
    ///
    /// Needs CAP_NET_ADMIN, nft(8) and ip(8).
    pub fn install(rules: Rules) -> Result<Self> {
        wait_for_predecessor(&rules)?;
        remove_leftovers(&rules)?;
        let mut helper = Helper::start(&rules)?;
        let installed = helper.submit(&rules, true);
        let routing = rules.routing();
        // From here on whatever fails is undone by the drop.
        let diversion = Diversion { state: Mutex::new(State { rules, helper }) };
        installed?;
        for command in routing {
            run("ip", &command)?;
        }
        Ok(diversion)
    }

    /// Changes what is diverted, in one step. After an error the old rules stand.
    pub fn replace(&self, capture: &Capture) -> Result<()> {
        let mut state = self.state();
        let rules = state.rules.clone().with(capture);
        if rules != state.rules {
            state.helper.submit(&rules, true)?;
            state.rules = rules;
        }
        Ok(())
    }

    /// Diverts no new connection any more, while those that are diverted already go on.
    pub fn release(&self) -> Result<()> {
        let State { rules, helper } = &mut *self.state();
        helper.submit(rules, false)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Diversion {
    fn drop(&mut self) {
        let State { rules, helper } = &mut *self.state();
        helper.commands = None;
        if let Err(error) = helper.process.wait() {
            tracing::warn!(%error, table = rules.table(), "rules perhaps not removed");
        }
    }
}

impl Helper {
    /// Ignores the signals that end this process, so that it outlives us and cleans up.
    fn start(rules: &Rules) -> Result<Self> {
        let undo: String = rules.undo_routing().iter().map(|command| format!("ip {command}; ")).collect();
        let script =
            format!("trap '' HUP INT QUIT TERM; exec 2>&1; {{ cat; {{ {undo}:; }} >/dev/null; }} | nft -i");
        let mut process = start(
            Command::new("sh").arg("-c").arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()),
            Command::spawn,
        )?;
        let (commands, answers) = (process.stdin.take(), process.stdout.take());
        let answers = BufReader::new(answers.expect("piped above"));
        Ok(Helper { process, commands, answers })
    }

    fn submit(&mut self, rules: &Rules, divert: bool) -> Result<()> {
        // In interactive mode a line is a transaction.
        let lines = rules.nft(true, divert);
        let line: Vec<&str> =
            lines.lines().map(|line| line.split(" #").next().unwrap_or(line).trim()).collect();
        let what = || format!("add table inet {}", rules.table());
        let answer = self.ask(&line.join(";")).map_err(|e| Error::io(what(), e))?;
        match answer.lines().find_map(|line| line.split_once("Error: ")) {
            Some((_, problem)) => Err(refused(what(), problem)),
            None => Ok(()),
        }
    }

    /// Sends a command; returns what nft prints for it.
    fn ask(&mut self, command: &str) -> io::Result<String> {
        // nft does not say when it is done, so a question with a known answer follows.
        const END: &str = "meta expression";
        if let Some(commands) = &mut self.commands {
            // A broken pipe shows below, with what the helper said before it ended.
            let _ = write!(commands, "{command}\ndescribe meta mark\n");
        }
        let mut answer = String::new();
        let mut line = String::new();
        while self.answers.read_line(&mut line)? > 0 {
            if line.contains(END) {
                return Ok(answer);
            }
            answer.push_str(&line);
            line.clear();
        }
        Err(io::Error::other(format!("nft (package nftables) does not run: {}", answer.trim())))
    }
}

/// The rules of a process that was killed a moment ago are about to go; with them goes policy routing that is
/// the same as ours.
fn wait_for_predecessor(rules: &Rules) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while nft_table(rules.port())?.is_some_and(|text| text.contains("flags owner")) {
        if Instant::now() >= deadline {
            let held = io::Error::other("another process holds it");
            return Err(Error::io(format!("add table inet {}", rules.table()), held));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Removes our table if nobody owns it (somebody loaded printed rules), and policy routing whose table is gone.
fn remove_leftovers(rules: &Rules) -> Result<()> {
    if nft_table(rules.port())?.is_some() {
        run("nft", &format!("delete table inet {}", rules.table()))?;
    }
    for family in &FAMILIES {
        // Without IPv6 there are no rules to show.
        let shown = run("ip", &format!("{} rule show", family.ip_flag)).unwrap_or_default();
        for line in shown.lines() {
            let Some(port) = port_of_rule(line) else { continue };
            if port != rules.port() && nft_table(port)?.is_some() {
                continue;
            }
            tracing::info!(port, rule = line, "removing what a dead process left");
            let mark = mark(port);
            run("ip", &format!("{} rule del fwmark {mark:#x} lookup {mark}", family.ip_flag))?;
            // The route may be gone already.
            let _ = run("ip", &format!("{} route del local default dev lo table {mark}", family.ip_flag));
        }
    }
    Ok(())
}

/// The table of the service on `port`, if there is one.
fn nft_table(port: u16) -> Result<Option<String>> {
    match run("nft", &format!("list table inet {}", table(port))) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.to_string().contains("No such file or directory") => Ok(None),
        Err(error) => Err(error),
    }
}

/// Runs a program and returns what it prints.
fn run(program: &str, arguments: &str) -> Result<String> {
    let mut command = Command::new(program);
    let output = start(command.args(arguments.split(' ')), Command::output)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let answer = String::from_utf8_lossy(&output.stderr);
    let line = answer.lines().next().unwrap_or("failed and did not say why");
    let line = line.trim_start_matches("Error: ").trim_start_matches("RTNETLINK answers: ");
    Err(refused(format!("{program} {arguments}"), line))
}

/// Starts a program that may do what we may. Capabilities of our file (setcap) are not inherited, unless they are
/// in the ambient set, which is the thread's own.
fn start<T: Send>(command: &mut Command, how: fn(&mut Command) -> io::Result<T>) -> Result<T> {
    let inherit = || -> rustix::io::Result<()> {
        let mut sets = capabilities(None)?;
        sets.inheritable |= CapabilitySet::NET_ADMIN;
        set_capabilities(None, sets)?;
        configure_capability_in_ambient_set(CapabilitySet::NET_ADMIN, true)
    };
    // These tools are where an ordinary user's PATH does not look.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).env("LC_ALL", "C");
    let started = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                // Without the capability the program fails, and its words say it better.
                let _ = inherit();
                how(command)
            })
            .join()
    });
    let started = started.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    started.map_err(|error| {
        let program = command.get_program().display();
        match error.kind() {
            io::ErrorKind::NotFound => {
                Error::io(format!("run {program}"), io::Error::other("is not installed"))
            }
            _ => Error::io(format!("run {program}"), error),
        }
    })
}

fn refused(what: String, answer: &str) -> Error {
    match answer.contains("Operation not permitted") {
        true => Error::Capability { what, capability: "CAP_NET_ADMIN" },
        false => Error::io(what, io::Error::other(answer)),
    }
}
