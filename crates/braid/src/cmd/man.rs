//! `braid man`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::output;

/// Print the man page of braid, or write those of all commands into a directory
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid man | man -l -
  braid man /usr/local/share/man/man1")]
pub struct Args {
    /// Write braid.1, braid-echo.1, … there
    dir: Option<PathBuf>,
}

pub fn run(args: Args, command: clap::Command) -> Result<ExitCode> {
    match args.dir {
        Some(dir) => {
            write_all(command, &dir).with_context(|| format!("write man pages into {}", dir.display()))?;
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command).render(&mut page)?;
            output::raw(&page)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn write_all(command: clap::Command, dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    clap_mangen::generate_to(command, dir)?;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"braid")) {
            let page = fs::read_to_string(&path)?;
            // What stands behind the options is EXTRA to clap_mangen; man-pages(7) knows EXAMPLES.
            fs::write(&path, page.replace(".SH EXTRA\nExamples:\n", ".SH EXAMPLES\n"))?;
        }
    }
    Ok(())
}
