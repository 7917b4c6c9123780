//! `braid lab list`.

use std::process::ExitCode;

use anyhow::Result;
use lab::home::Home;
use lab::scenario::Shelf;
use serde::Serialize;

use crate::output;

/// List the scenarios, and the labs that are up
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON document
    #[arg(short, long)]
    json: bool,
}

#[derive(Serialize)]
struct Entry {
    name: String,
    title: String,
}

pub fn run(args: Args, shelf: &Shelf) -> Result<ExitCode> {
    let running = Home::find()?.running()?;
    let mut scenarios = Vec::new();
    for name in shelf.names()? {
        let scenario = shelf.load(&name)?;
        for variant in &scenario.variants {
            let variant = shelf.load(&format!("{name}:{variant}"))?;
            scenarios.push(Entry { name: variant.name, title: variant.title });
        }
        scenarios.push(Entry { name: scenario.name, title: scenario.title });
    }
    scenarios.sort_by(|a, b| a.name.cmp(&b.name));
    if args.json {
        output::line(serde_json::json!({ "scenarios": scenarios, "running": running }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let width = scenarios.iter().map(|entry| entry.name.len()).max().unwrap_or(0);
    for Entry { name, title } in scenarios {
        output::line(format_args!("{name:width$}  {title}"))?;
    }
    for card in running {
        let nodes: Vec<_> = card.nodes.values().map(String::as_str).collect();
        output::line(format_args!(
            "up: {} ({}, pid {}): {}",
            card.name,
            card.scenario,
            card.pid,
            nodes.join(", ")
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
