//! `braid limits`: the grammar and the output of `ip mptcp limits`.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use mptcp::Netns;
use mptcp::pm::{Client, Limits};
use serde_json::json;

use crate::cmd::{self, Place};
use crate::output;

/// Show and set the path manager's limits
///
/// subflows: how many subflows a connection may have beside its first one, 0 to 8. add_addr_accepted: how many
/// addresses that the peer announces may be used, 0 to 8. Without a command the limits are shown.
#[derive(Debug, clap::Args)]
#[command(
    infer_subcommands = true,
    after_help = "\
Examples:
  braid limits
  braid limits set subflows 2 add_addr_accepted 2
  braid limits set subflows 4 -n client"
)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    place: Place,
    /// Print JSON, which iproute2 does not do here
    #[arg(short, long, global = true)]
    json: bool,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Set one limit or both: [subflows NR] [add_addr_accepted NR]
    #[command(aliases = ["s", "se"])]
    Set {
        /// Words as `ip mptcp limits` takes them
        #[arg(value_name = "WORD", required = true)]
        words: Vec<String>,
    },
    /// Show both limits
    Show,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let netns = args.place.open()?;
    match args.command.unwrap_or(Command::Show) {
        Command::Set { words } => set(&netns, &words),
        Command::Show => show(&netns, args.json),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn set(netns: &Netns, words: &[String]) -> Result<()> {
    let (subflows, add_addr_accepted) = parse(words)?;
    cmd::ensure_in_kernel_path_manager(netns)?;
    cmd::block_on(async {
        let client = Client::connect(netns).await?;
        let now = client.limits().await?;
        let limits = Limits {
            subflows: subflows.unwrap_or(now.subflows),
            add_addr_accepted: add_addr_accepted.unwrap_or(now.add_addr_accepted),
        };
        Ok(client.set_limits(limits).await?)
    })
}

fn show(netns: &Netns, json: bool) -> Result<()> {
    let limits = cmd::block_on(async { Ok(Client::connect(netns).await?.limits().await?) })?;
    let Limits { add_addr_accepted, subflows } = limits;
    Ok(if json {
        let fields = [("add_addr_accepted", json!(add_addr_accepted)), ("subflows", json!(subflows))];
        output::line(format_args!("[{}]", output::json_object(&fields)))
    } else {
        // The blank at the end is iproute2's.
        output::line(format_args!("add_addr_accepted {add_addr_accepted} subflows {subflows} "))
    }?)
}

/// The values that the words give to subflows and add_addr_accepted.
fn parse(words: &[String]) -> Result<(Option<u32>, Option<u32>)> {
    let (mut subflows, mut add_addr_accepted) = (None, None);
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let limit = if cmd::abbreviates(word, "subflows") {
            &mut subflows
        } else if cmd::abbreviates(word, "add_addr_accepted") {
            &mut add_addr_accepted
        } else {
            bail!("'{word}' is neither subflows nor add_addr_accepted")
        };
        *limit =
            Some(cmd::number(word, words.next().with_context(|| format!("{word}: a value is needed"))?)?);
    }
    Ok((subflows, add_addr_accepted))
}
