//! `braid lab run`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use lab::home::Home;
use lab::judge::Verdict;
use lab::record::Record;
use lab::scenario::Shelf;
use lab::{Lab, Options, Scenario, privilege};

use super::progress::Display;
use super::{END, verdict};
use crate::cmd::{FOUND_A_PROBLEM, block_on, signalled};
use crate::output;

/// Build the networks of scenarios, run what happens in them, judge it, and remove them
///
/// Ends with 0 if all was as expected, 1 if not, 2 if a network could not be built or a scenario is no good.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid lab run simple
  braid lab run handover:blackhole --report pictures
  braid lab run ./network.toml --repeat 10 --json")]
pub struct Args {
    /// NAME, NAME:VARIANT, or the path of a .toml file
    #[arg(required = true, value_name = "SCENARIO")]
    scenarios: Vec<String>,
    /// Run all of them N times
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Write pictures of network and throughput (SVG) and the events (JSON) into DIR
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Print one JSON document for each run
    #[arg(short, long)]
    json: bool,
}

pub fn run(args: Args, shelf: &Shelf) -> Result<ExitCode> {
    let scenarios: Vec<Scenario> =
        args.scenarios.iter().map(|name| shelf.load(name)).collect::<Result<_, _>>()?;
    if let Some(directory) = &args.report {
        std::fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    }
    let home = Home::find()?;
    privilege::enter()?;
    block_on(async {
        let end = signalled(END)?;
        tokio::select! {
            code = run_all(&args, &scenarios, &home) => code,
            () = end => bail!("interrupted; the network has been removed"),
        }
    })
}

async fn run_all(args: &Args, scenarios: &[Scenario], home: &Home) -> Result<ExitCode> {
    let total = args.repeat as usize * scenarios.len();
    let mut passed = 0;
    for round in 1..=args.repeat {
        for scenario in scenarios {
            let began = Instant::now();
            let (verdict, record) = run_one(scenario, home).await.with_context(|| scenario.name.clone())?;
            passed += usize::from(verdict.pass);
            if args.json {
                output::line(serde_json::to_string(&verdict)?)?;
            } else if args.repeat == 1 || !verdict.pass {
                verdict::print(&verdict)?;
            } else {
                let seconds = began.elapsed().as_secs_f64();
                let word = verdict::word(true);
                output::line(format_args!(
                    "{} {round}/{}: {word} in {seconds:.1} s",
                    scenario.name, args.repeat
                ))?;
            }
            if let Some(directory) = &args.report {
                let picture = lab::report::write(directory, scenario, &record)?;
                if !args.json {
                    output::line(format_args!("report: {}", picture.display()))?;
                }
            }
        }
    }
    if total > 1 && !args.json {
        output::line(format_args!("{passed} of {total} passed"))?;
    }
    Ok(if passed == total { ExitCode::SUCCESS } else { ExitCode::from(FOUND_A_PROBLEM) })
}

async fn run_one(scenario: &Scenario, home: &Home) -> Result<(Verdict, Record)> {
    let display = Display::new(&scenario.name);
    let options = Options { name: None, plain_names: false, home: home.clone(), braid: Some(braid()?) };
    let mut lab = Lab::build_with(scenario, options).await?;
    Ok(lab::run::run(&mut lab, display.shows_rates(), &|progress| display.show(progress)).await?)
}

/// This program, for the nodes of labs; `BRAID_PROGRAM` names another one.
pub fn braid() -> Result<PathBuf> {
    match std::env::var_os("BRAID_PROGRAM") {
        Some(path) => Ok(path.into()),
        None => std::env::current_exe().context("find this program's file"),
    }
}
