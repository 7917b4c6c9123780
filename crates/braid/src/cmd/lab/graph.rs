//! `braid lab graph`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use lab::scenario::Shelf;

use crate::output;

/// Draw the network of a scenario as SVG
#[derive(Debug, clap::Args)]
pub struct Args {
    /// NAME, NAME:VARIANT, or the path of a .toml file
    #[arg(value_name = "SCENARIO")]
    scenario: String,
    /// Write to FILE instead of standard output
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub fn run(args: Args, shelf: &Shelf) -> Result<ExitCode> {
    let svg = lab::graph::svg(&shelf.load(&args.scenario)?);
    match args.output {
        Some(file) => std::fs::write(&file, svg).with_context(|| format!("write {}", file.display()))?,
        None => output::raw(svg.as_bytes())?,
    }
    Ok(ExitCode::SUCCESS)
}
