//! `braid run` for a service: the drop-in by which systemd starts a unit's program under it, or makes the sockets of a
//! socket unit MPTCP ones itself.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

mod unit;

use unit::Unit;

/// No drop-in for a unit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It is not the name of a service or a socket.
    #[error("{0}: neither the name of a service nor of a socket unit")]
    NoName(String),
    /// There is no such unit.
    #[error("no unit {unit} in {}", list(searched))]
    NotFound {
        /// Its name.
        unit: String,
        /// Where it could be.
        searched: Vec<PathBuf>,
    },
    /// The unit is masked.
    #[error("{unit} is masked ({})", path.display())]
    Masked {
        /// Its name.
        unit: String,
        /// The empty file.
        path: PathBuf,
    },
    /// A file of the unit cannot be read.
    #[error("{}: {}", path.display(), crate::error::describe(source))]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The service starts no program.
    #[error("{0} has no ExecStart=")]
    NoCommand(String),
    /// The program cannot be told from the rest of the line.
    #[error("{unit}: ExecStart={line}: a shell's line; put `braid run` into it by hand")]
    ShellLine {
        /// Its name.
        unit: String,
        /// The line.
        line: String,
    },
    /// The socket unit is not about TCP.
    #[error("{0} has no ListenStream= with a TCP port")]
    NoPort(String),
    /// `SocketProtocol=` would go for other sockets, too.
    #[error(
        "{unit} has ListenStream={other} beside TCP ports, and SocketProtocol=mptcp would keep that from being made: \
         give the ports a socket unit of their own"
    )]
    OtherSockets {
        /// Its name.
        unit: String,
        /// What is no TCP port.
        other: String,
    },
    /// This host's systemd makes TCP sockets only.
    #[error(
        "{unit}: this host has systemd {version}, and its sockets are MPTCP from 257 on (SocketProtocol=mptcp); \
         before, `braid mptcpify` can make them so, or the service without its socket unit"
    )]
    TooOld {
        /// Its name.
        unit: String,
        /// Of systemd.
        version: u32,
    },
    /// Options of `braid run` cannot come true.
    #[error("{0}: systemd makes its sockets, and no other option can be given")]
    Options(String),
}

/// Result of [`drop_in`].
pub type Result<T> = std::result::Result<T, Error>;

/// A host's systemd.
#[derive(Clone, Debug)]
pub struct Systemd {
    /// Directories of unit files; earlier ones go first.
    pub search: Vec<PathBuf>,
    /// Its version, if it can be told.
    pub version: Option<u32>,
}

impl Systemd {
    /// Of this host, running or not: the directories that systemd.unit(5) names for system units, or those of
    /// `$SYSTEMD_UNIT_PATH`.
    pub fn of_this_host() -> Self {
        let search = match std::env::var_os("SYSTEMD_UNIT_PATH") {
            // An empty one stands for the usual ones.
            Some(path) => std::env::split_paths(&path)
                .flat_map(|dir| match dir.as_os_str().is_empty() {
                    true => SEARCH.map(PathBuf::from).to_vec(),
                    false => vec![dir],
                })
                .collect(),
            None => SEARCH.map(PathBuf::from).to_vec(),
        };
        let version = Command::new("systemctl").arg("--version").output().ok().and_then(|output| {
            String::from_utf8_lossy(&output.stdout).split_whitespace().nth(1)?.parse().ok()
        });
        Systemd { search, version }
    }
}

const SEARCH: [&str; 13] = [
    "/etc/systemd/system.control",
    "/run/systemd/system.control",
    "/run/systemd/transient",
    "/run/systemd/generator.early",
    "/etc/systemd/system",
    "/etc/systemd/system.attached",
    "/run/systemd/system",
    "/run/systemd/system.attached",
    "/run/systemd/generator",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
    "/run/systemd/generator.late",
];

/// Name of the drop-in's file: behind those of others, since the last `ExecStart=` counts.
pub const FILE: &str = "zz-braid.conf";

/// First version with `SocketProtocol=mptcp`.
const SOCKET_PROTOCOL: u32 = 257;

/// What the filters of a service must let pass beyond what any program does, for `braid run` (`man systemd.exec`,
/// SystemCallFilter=).
const CALLS: &str = "chdir clone close_range fchown getdents64 ioctl pidfd_getfd pidfd_open poll pread64 recvmsg seccomp \
                     sendmsg setsid signalfd4 socketpair wait4";

/// The drop-in for `unit`, a service or a socket, as text; its first line names its place. `run` is the command to put
/// before the program: braid's path, `run` and its options. A drop-in that is there already is left out of account.
///
/// # Errors
/// As [`Error`] has them. Lines that systemd would ignore are ignored.
pub fn drop_in(unit: &str, run: &[String], systemd: &Systemd) -> Result<String> {
    let unit = Unit::load(unit, &systemd.search)?;
    let name = &unit.name;
    let mut text = format!(
        "# /etc/systemd/system/{name}.d/{FILE}\n\
         # Made by `braid run --service {name}`. Then: systemctl daemon-reload; systemctl restart {name}\n"
    );
    if name.ends_with(".socket") {
        check_socket(&unit, run, systemd.version)?;
        text += "[Socket]\nSocketProtocol=mptcp\n";
        return Ok(text);
    }
    for note in notes(&unit, run.first().map_or("", String::as_str), &systemd.search)? {
        let _ = writeln!(text, "# {note}");
    }
    text += "[Service]\nExecStart=\n";
    let lines = unit.all("Service", "ExecStart");
    if lines.is_empty() {
        return Err(Error::NoCommand(unit.name));
    }
    let run: Vec<String> = run.iter().map(|word| quote(word)).collect();
    for command in lines.iter().flat_map(|line| commands(line)) {
        let _ = writeln!(text, "ExecStart={}", under(&run, &command, name)?);
    }
    // It adds to a list of allowed calls, and takes away from one of forbidden calls.
    if !unit.all("Service", "SystemCallFilter").is_empty() {
        let _ = writeln!(text, "SystemCallFilter={CALLS}");
    }
    Ok(text)
}

fn check_socket(unit: &Unit, run: &[String], version: Option<u32>) -> Result<()> {
    let name = || unit.name.clone();
    if run.len() > 2 {
        return Err(Error::Options(name()));
    }
    let (ports, other) = streams(unit);
    match (version, ports.as_slice(), other.as_slice()) {
        (_, [], _) => Err(Error::NoPort(name())),
        (_, _, [other, ..]) => Err(Error::OtherSockets { unit: name(), other: other.clone() }),
        (Some(version), ..) if version < SOCKET_PROTOCOL => Err(Error::TooOld { unit: name(), version }),
        _ => Ok(()),
    }
}

/// TCP ports that a socket unit listens on, and other addresses for which systemd would ask for MPTCP, too: a path, an
/// abstract name, a port of a vsock.
fn streams(unit: &Unit) -> (Vec<String>, Vec<String>) {
    let all = ["ListenStream", "ListenSequentialPacket"].map(|key| unit.all("Socket", key)).concat();
    all.into_iter()
        .partition(|address| !(address.starts_with(['/', '@', '%']) || address.starts_with("vsock:")))
}

/// What the administrator has to know of this unit.
fn notes(unit: &Unit, braid: &str, search: &[PathBuf]) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    let is_set = |key| unit.last("Service", key).is_some();
    let mut sockets: Vec<String> = unit.all("Service", "Sockets");
    sockets.push(unit.name.replace(".service", ".socket"));
    for socket in sockets.iter().flat_map(|names| names.split_whitespace()) {
        match Unit::load(socket, search) {
            Ok(unit) if streams(&unit).0.is_empty() => {}
            Ok(_) => notes.push(format!(
                "Where {socket} is in use, systemd makes the listening sockets: see `braid run --service {socket}`."
            )),
            Err(Error::NotFound { .. } | Error::Masked { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let lacks_sys_admin = |set: &str| set.starts_with('~') == set.contains("CAP_SYS_ADMIN");
    let gives_up_rights = ["User", "DynamicUser"].into_iter().any(is_set)
        || unit.last("Service", "CapabilityBoundingSet").is_some_and(lacks_sys_admin);
    if gives_up_rights && unit.last("Service", "NoNewPrivileges").is_none() {
        notes.push(
            "As it runs without CAP_SYS_ADMIN, setuid programs that it starts get no rights of their owner's."
                .into(),
        );
    }
    if unit.last("Service", "Type") == Some("forking") && !is_set("PIDFile") {
        notes.push(
            "Type=forking without PIDFile=: systemd cannot guess the main process beside braid's; better let the program \
             stay in the foreground, with Type=exec or notify."
                .into(),
        );
    }
    for key in ["RootDirectory", "RootImage"].into_iter().filter(|key| is_set(key)) {
        notes.push(format!("{key}= is set: {braid} has to be in there."));
    }
    if !["/usr/", "/opt/", "/bin/", "/nix/"].iter().any(|place| braid.starts_with(place)) {
        notes.push(format!(
            "{braid} has to be where the service's user and sandbox can run it; better below /usr."
        ));
    }
    Ok(notes)
}

/// The commands of a value of `ExecStart=`: a semicolon by itself is between them.
fn commands(line: &str) -> Vec<Vec<&str>> {
    words(line).split(|word| *word == ";").filter(|words| !words.is_empty()).map(<[&str]>::to_vec).collect()
}

/// The words of `line` as they are written, with quotes and escapes.
fn words(line: &str) -> Vec<&str> {
    let (mut words, mut start, mut quote) = (Vec::new(), None, None);
    let mut characters = line.char_indices();
    while let Some((at, character)) = characters.next() {
        if quote.is_none() && character.is_whitespace() {
            words.extend(start.take().map(|start: usize| &line[start..at]));
            continue;
        }
        start = start.or(Some(at));
        match character {
            '\\' => drop(characters.next()),
            '"' | '\'' if quote == Some(character) => quote = None,
            '"' | '\'' if quote.is_none() => quote = Some(character),
            _ => {}
        }
    }
    words.extend(start.map(|start| &line[start..]));
    words
}

/// `command` with `run` before it. What stands before the path (systemd.service(5), "special executable prefixes")
/// stays there; but `@`, after which the program is told another name than its own, becomes an option.
fn under(run: &[String], command: &[&str], unit: &str) -> Result<String> {
    let [first, arguments @ ..] = command else { return Ok(String::new()) };
    let program = first.trim_start_matches(['-', '@', ':', '+', '!', '|']);
    let prefix = &first[..first.len() - program.len()];
    if prefix.contains('|') {
        return Err(Error::ShellLine { unit: unit.into(), line: command.join(" ") });
    }
    let (own_name, arguments) = match arguments {
        [name, arguments @ ..] if prefix.contains('@') => (vec!["--argv0", name], arguments),
        _ => (vec![], arguments),
    };
    let run: Vec<&str> = run.iter().map(String::as_str).collect();
    let words = [&run, own_name.as_slice(), &["--", program], arguments].concat();
    Ok(format!("{}{}", prefix.replace('@', ""), words.join(" ")))
}

/// `word` so that systemd reads it as it is.
fn quote(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:,=@".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.into();
    }
    let escaped = word.replace('\\', r"\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    format!("\"{escaped}\"")
}

fn list(directories: &[PathBuf]) -> String {
    let there = directories.iter().filter(|directory| Path::is_dir(directory));
    let names: Vec<_> = there.map(|directory| directory.display().to_string()).collect();
    if names.is_empty() { "any directory of systemd".into() } else { names.join(", ") }
}

#[cfg(test)]
mod tests;
