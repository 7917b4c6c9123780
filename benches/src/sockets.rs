//! What a socket costs to make and close: alone, under mptcpize, under `braid run`.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Protocol, Socket, Type};

/// What goes before the program that makes the sockets, and the protocol that they must have then.
pub const WAYS: [(&str, &[&str], Protocol); 3] = [
    ("alone", &[], Protocol::TCP),
    ("mptcpize run", &["mptcpize", "run"], Protocol::MPTCP),
    ("braid run", &["{braid}", "run"], Protocol::MPTCP),
];

/// Sockets of one measurement.
const COUNT: usize = 10_000;

/// Microseconds per socket, measured in a process of its own.
pub fn measure(prefix: &[&str], protocol: Protocol, braid: &Path) -> Result<f64> {
    let this = std::env::current_exe()?;
    let mut words =
        prefix.iter().map(|&word| if word == "{braid}" { braid.as_os_str() } else { word.as_ref() });
    let mut command = match words.next() {
        Some(program) => Command::new(program),
        None => Command::new(&this),
    };
    command.args(words);
    if !prefix.is_empty() {
        command.arg(&this);
    }
    let output = command.args(["--make-sockets", &i32::from(protocol).to_string()]).output()?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    text.trim().parse().with_context(|| format!("{command:?} printed {text}"))
}

/// Makes and closes sockets for TCP, which have to come out as ones of `protocol`; returns microseconds per socket.
pub fn make(protocol: i32) -> Result<f64> {
    let socket = || Socket::new(Domain::IPV4, Type::STREAM, None);
    let got = socket()?.protocol()?.map(i32::from);
    ensure!(got == Some(protocol), "sockets have protocol {got:?}, not {protocol}");
    let start = Instant::now();
    for _ in 0..COUNT {
        drop(socket()?);
    }
    Ok(start.elapsed().as_secs_f64() * 1e6 / COUNT as f64)
}
