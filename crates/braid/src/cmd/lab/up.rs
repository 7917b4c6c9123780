//! `braid lab up`, `check` and `down`: labs that stay.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use lab::control;
use lab::home::Home;
use lab::scenario::Shelf;
use lab::{Lab, Options, privilege};

use super::progress::Display;
use super::run::braid;
use super::{END, verdict};
use crate::cmd::{FOUND_A_PROBLEM, block_on, signalled};
use crate::output;

/// Build the network of a scenario and start its programs, until `down`
///
/// As root, `ip netns` shows its nodes under their names; with --name X, as X-NODE. Otherwise they live in a user
/// namespace that `exec` and `shell` find.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// NAME, NAME:VARIANT, or the path of a .toml file
    scenario: String,
    /// Name of the lab [default: the scenario's], put in front of the names of its nodes
    #[arg(long, value_name = "NAME", value_parser = lab_name)]
    name: Option<String>,
}

/// Run and judge the scenario of a lab that is up
#[derive(Debug, clap::Args)]
pub struct Check {
    /// The lab, or its scenario; needed where several are up
    #[arg(value_name = "LAB")]
    lab: Option<String>,
    /// Print one JSON document
    #[arg(short, long)]
    json: bool,
}

/// End a lab and remove its network
#[derive(Debug, clap::Args)]
pub struct Down {
    /// The lab, or its scenario; needed where several are up
    #[arg(value_name = "LAB")]
    lab: Option<String>,
    /// All labs that are up
    #[arg(long, conflicts_with = "lab")]
    all: bool,
}

pub fn up(args: Args, shelf: &Shelf, scenarios: Option<PathBuf>) -> Result<ExitCode> {
    // What is wrong with the file is told here, by the process that people look at.
    shelf.load(&args.scenario)?;
    let mut holder = Command::new(std::env::current_exe().context("find this program's file")?);
    holder.args(["lab", "hold", &args.scenario]);
    holder.args(args.name.iter().flat_map(|name| ["--name", name]));
    if let Some(directory) = scenarios {
        holder.arg("--scenarios").arg(directory);
    }
    let started = holder.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut holder = started.context("start the lab's process")?;
    let mut answer = String::new();
    if let Some(stdout) = holder.stdout.take() {
        BufReader::new(stdout).read_line(&mut answer).context("wait for the lab's process")?;
    }
    match answer.trim().split_once(' ') {
        Some(("up", nodes)) => {
            output::line(nodes)?;
            Ok(ExitCode::SUCCESS)
        }
        Some((_, problem)) => bail!("{problem}"),
        None => bail!("the lab's process has died: {}", holder.wait()?),
    }
}

/// The process that a lab lives in while it is up. It says one line: `up` and the nodes, or `failed` and why.
pub fn hold(args: Args, shelf: &Shelf) -> Result<ExitCode> {
    let held = hold_until_asked(&args, shelf);
    if let Err(error) = &held {
        output::line(format_args!("failed {error:#}"))?;
    }
    held
}

fn hold_until_asked(args: &Args, shelf: &Shelf) -> Result<ExitCode> {
    let scenario = shelf.load(&args.scenario)?;
    let home = Home::find()?;
    // The terminal that it was started from may close.
    nix::unistd::setsid().context("leave the terminal")?;
    std::env::set_current_dir("/").context("leave the directory")?;
    privilege::enter()?;
    let options = Options {
        name: Some(args.name.clone().unwrap_or_else(|| scenario.name.replace(':', "-"))),
        plain_names: args.name.is_none(),
        home,
        braid: Some(braid()?),
    };
    block_on(async {
        let end = signalled(END)?;
        let live = async {
            let mut lab = Lab::build_with(&scenario, options).await?;
            let card = lab.card();
            let nodes: Vec<_> = card.nodes.iter().map(|(node, netns)| format!("{node} ({netns})")).collect();
            let line = format!("up lab {} is up: {}", card.name, nodes.join(", "));
            control::serve(&mut lab, || {
                if let Err(error) = output::line(&line) {
                    tracing::debug!(%error, "nobody waits for the lab");
                }
            })
            .await?;
            Ok(ExitCode::SUCCESS)
        };
        tokio::select! {
            ended = live => ended,
            () = end => Ok(ExitCode::SUCCESS),
        }
    })
}

pub fn check(args: Check) -> Result<ExitCode> {
    let card = Home::find()?.lab(args.lab.as_deref())?;
    let display = Display::new(&card.scenario);
    let verdict = control::check(&card, display.shows_rates(), |progress| display.show(progress))?;
    drop(display);
    if args.json {
        output::line(serde_json::to_string(&verdict)?)?;
    } else {
        verdict::print(&verdict)?;
    }
    Ok(if verdict.pass { ExitCode::SUCCESS } else { ExitCode::from(FOUND_A_PROBLEM) })
}

pub fn down(args: Down) -> Result<ExitCode> {
    let home = Home::find()?;
    let labs = if args.all { home.running()? } else { vec![home.lab(args.lab.as_deref())?] };
    for card in labs {
        control::down(&home, &card)?;
        output::line(format_args!("lab {} is gone", card.name))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Part of names of network namespaces and of a directory's name.
fn lab_name(name: &str) -> Result<String, String> {
    let fits = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    if name.is_empty() || name.len() > 64 || !fits || name == "lock" {
        return Err("a lab's name is up to 64 letters, digits, - and _".into());
    }
    Ok(name.into())
}
