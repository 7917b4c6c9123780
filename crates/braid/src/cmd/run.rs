//! `braid run`: any program over MPTCP.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use launch::Role;
use launch::report::{Report, ReportTo};
use launch::service::{self, Systemd};

use crate::output;

/// Run any program with its TCP sockets made MPTCP
///
/// Static programs and those in Go too, with all their children, and without privileges: the program's TCP sockets
/// are replaced when they are made. Peers that don't speak MPTCP get TCP. The program takes the place of braid, so
/// that its exit code, signals and terminal are as without.
///
/// Exit code: the program's; 127: not found; 126: not executable; 2: not started for another reason.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "braid run [OPTIONS] <CMD>...\n       braid run [OPTIONS] --service <UNIT>",
    after_help = "\
Examples:
  braid run curl -O https://example.org/file
  braid run --report iperf3 -c server.example
  braid run --only server --port 80,443 -- nginx -g 'daemon off;'
  braid run --exclude ssh,git -- make -j 4 download
  braid run --require openvpn --config client.ovpn
  braid run --service nginx --only server     # prints a drop-in for systemd
  braid run --service web.socket              # for a socket unit, with systemd 257 and newer"
)]
pub struct Args {
    /// Only sockets that listen, or only those that connect
    #[arg(long, value_name = "ROLE")]
    only: Option<Only>,
    /// Only sockets that listen on these ports, or connect to them
    #[arg(long, value_name = "PORT", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..))]
    port: Vec<u16>,
    /// Leave the sockets of these programs alone: names of children, or of their files
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    exclude: Vec<String>,
    /// Run nothing where MPTCP is not available, and let no TCP socket take the place of an MPTCP one
    #[arg(long, conflicts_with_all = ["only", "port"])]
    require: bool,
    /// Let the sockets of these programs become TCP ones when they ask for an option that MPTCP refuses
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    compat: Vec<String>,
    /// Tell at the end and on SIGUSR1 what became of the sockets, on standard error or in FILE
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    report: Option<Option<PathBuf>>,
    /// Write the report as JSON
    #[arg(long, requires = "report")]
    json: bool,
    /// What the program is told to be its own name (`argv[0]`), instead of CMD
    #[arg(long, value_name = "NAME")]
    argv0: Option<OsString>,
    /// Run nothing: print the drop-in that makes systemd run UNIT so, with the options given here
    #[arg(long, value_name = "UNIT", conflicts_with_all = ["command", "argv0"])]
    service: Option<String>,
    /// Program and arguments
    #[arg(required_unless_present = "service", trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Only {
    Server,
    Client,
}

pub fn run(args: Args) -> Result<ExitCode> {
    if let Some(unit) = &args.service {
        output::raw(drop_in(&args, unit)?.as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    }
    let report = args.report.map(|file| report_to(file, args.json)).transpose()?;
    let mut words = args.command.into_iter();
    let plan = launch::Plan {
        program: words.next().unwrap_or_default(),
        own_name: args.argv0,
        arguments: words.collect(),
        require: args.require,
        exclude: args.exclude,
        only: args.only.map(|only| match only {
            Only::Server => Role::Server,
            Only::Client => Role::Client,
        }),
        ports: args.port,
        compat: args.compat,
        report,
    };
    let error = launch::run(&plan, |text| output::note(format_args!("braid: {text}")));
    output::note(format_args!("braid: {error}"));
    Ok(ExitCode::from(error.exit_code()))
}

/// The drop-in for `unit`, with the other options of the command line in it.
fn drop_in(args: &Args, unit: &str) -> Result<String> {
    let braid = std::env::current_exe().context("find braid's own file")?;
    let mut run = vec![braid.display().to_string(), "run".into()];
    let mut list = |option: &str, values: &[String]| {
        if !values.is_empty() {
            run.extend([option.into(), values.join(",")]);
        }
    };
    list("--only", &args.only.map(|only| format!("{only:?}").to_lowercase()).into_iter().collect::<Vec<_>>());
    list("--port", &args.port.iter().map(ToString::to_string).collect::<Vec<_>>());
    list("--exclude", &args.exclude);
    list("--compat", &args.compat);
    if args.require {
        run.push("--require".into());
    }
    match &args.report {
        // A service has another working directory.
        Some(Some(file)) => run.push(format!("--report={}", std::path::absolute(file)?.display())),
        Some(None) => run.push("--report".into()),
        None => {}
    }
    if args.json {
        run.push("--json".into());
    }
    Ok(service::drop_in(unit, &run, &Systemd::of_this_host())?)
}

fn report_to(file: Option<PathBuf>, json: bool) -> Result<ReportTo> {
    let anew = file.is_some();
    let file = match file {
        Some(path) => File::create(&path).with_context(|| format!("create {}", path.display()))?,
        None => io::stderr().as_fd().try_clone_to_owned().context("copy standard error")?.into(),
    };
    Ok(ReportTo { file: Arc::new(file), anew, render: if json { as_json } else { as_text } })
}

fn as_json(report: &Report) -> String {
    // Of names, numbers and addresses, all can be written.
    serde_json::to_string(report).map(|json| json + "\n").unwrap_or_default()
}

/// Most pairs of addresses in a text.
const MOST_PATHS: usize = 10;

fn as_text(report: &Report) -> String {
    let mut text = String::new();
    let mut line = |line: std::fmt::Arguments<'_>| text += &format!("braid: {line}\n");
    let connections = report.connections;
    line(format_args!("{}: {} sockets made MPTCP", report.program, report.mptcp_sockets));
    for (reason, count) in &report.tcp_sockets {
        line(format_args!("  {count} stayed TCP: {reason}"));
    }
    line(format_args!(
        "  {} connections used MPTCP, {} of them several subflows; {} fell back to TCP; {} were TCP",
        connections.mptcp, connections.multipath, connections.fallback, connections.tcp
    ));
    for path in report.paths.iter().take(MOST_PATHS) {
        line(format_args!(
            "  {} - {}: subflows of {} connections",
            path.local, path.remote, path.connections
        ));
    }
    if report.paths.len() > MOST_PATHS {
        line(format_args!("  and {} more pairs of addresses", report.paths.len() - MOST_PATHS));
    }
    for option in &report.refused_options {
        let launch::report::RefusedOption { option, program, count, made_tcp } = option;
        line(format_args!(
            "  {program} set {option} {count} times, which MPTCP refuses; {made_tcp} became TCP"
        ));
    }
    if !report.fallbacks.is_empty() {
        line(format_args!("  fallbacks in this network namespace meanwhile:"));
    }
    for counter in &report.fallbacks {
        line(format_args!("  {} {} ({})", counter.name, counter.value, counter.meaning));
    }
    text
}
