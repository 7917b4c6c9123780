//! `braid stats`: the kernel's counters about MPTCP, and what they mean.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use mptcp::Netns;
use mptcp::counters::{self, Counter, Group};
use serde::Serialize;
use tokio::time;

use crate::cmd::{self, Place};
use crate::output;

/// Show the kernel's MPTCP counters and what they mean
///
/// The counters are those of nstat(8), of one network namespace since it began, in groups: connections established,
/// fallbacks and why, joins refused and why, resets, … Behind each stands what it means when it rises. Those that
/// are zero are left out.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid stats
  braid stats --watch
  braid stats -n server --all
  braid stats --json | jq '.[] | select(.group == \"refused\" and .value > 0)'")]
pub struct Args {
    #[command(flatten)]
    place: Place,
    /// Show also the counters that are zero
    #[arg(short, long)]
    all: bool,
    /// Go on and show what changed, every so many seconds
    #[arg(short, long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = cmd::seconds)]
    watch: Option<Duration>,
    /// Print JSON: an array of all counters; with --watch one more a line for each change
    #[arg(short, long)]
    json: bool,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let netns = args.place.open()?;
    let now = counters::read(&netns)?;
    let rows = now.iter().map(Row::from).filter(|row| args.json || args.all || row.counter.value > 0);
    let rows: Vec<_> = rows.collect();
    if rows.is_empty() {
        output::note("all counters are zero");
    }
    args.print(&rows)?;
    if let Some(every) = args.watch {
        cmd::block_on(args.watch(&netns, every, now))?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Args {
    async fn watch(&self, netns: &Netns, every: Duration, mut before: Vec<Counter>) -> Result<()> {
        let mut end = cmd::signalled(cmd::END)?;
        loop {
            tokio::select! {
                () = time::sleep(every) => {}
                () = &mut end => return Ok(()),
            }
            let now = counters::read(netns)?;
            let changed = changes(&before, &now);
            if !changed.is_empty() {
                if !self.json {
                    output::line("")?;
                }
                self.print(&changed)?;
            }
            before = now;
        }
    }

    fn print(&self, rows: &[Row<'_>]) -> Result<()> {
        if self.json {
            output::line(serde_json::to_string(rows)?)?;
        } else {
            for line in table(rows) {
                output::line(line)?;
            }
        }
        Ok(())
    }
}

/// A counter as it is shown.
#[derive(Debug, Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    counter: &'a Counter,
    /// Since the last time.
    #[serde(skip_serializing_if = "Option::is_none")]
    change: Option<i64>,
}

impl<'a> From<&'a Counter> for Row<'a> {
    fn from(counter: &'a Counter) -> Self {
        Row { counter, change: None }
    }
}

/// The counters that changed. A kernel shows the same ones every time.
fn changes<'a>(before: &[Counter], now: &'a [Counter]) -> Vec<Row<'a>> {
    let both = before.iter().zip(now).filter(|(before, now)| before.value != now.value);
    both.map(|(before, now)| Row {
        counter: now,
        change: Some(now.value.wrapping_sub(before.value).cast_signed()),
    })
    .collect()
}

/// A heading for each group, and a line for each of its counters, in columns.
fn table(rows: &[Row<'_>]) -> Vec<String> {
    let value = |row: &Row<'_>| match row.change {
        Some(change) => format!("{change:+} to {}", row.counter.value),
        None => row.counter.value.to_string(),
    };
    let values = rows.iter().map(|row| value(row).len()).max().unwrap_or(0);
    let names = rows.iter().map(|row| row.counter.name.len()).max().unwrap_or(0);
    let mut lines = Vec::new();
    for group in rows.chunk_by(|a, b| a.counter.group == b.counter.group) {
        lines.extend(group.first().map(|row| format!("{BOLD}{}{BOLD:#}", heading(row.counter.group))));
        lines.extend(group.iter().map(|row| {
            let Counter { name, meaning, .. } = row.counter;
            format!("{:>values$}  {name:names$}  {DIM}{meaning}{DIM:#}", value(row)).trim_end().into()
        }));
    }
    lines
}

const BOLD: anstyle::Style = anstyle::Style::new().bold();
const DIM: anstyle::Style = anstyle::Style::new().dimmed();

fn heading(group: Group) -> &'static str {
    match group {
        Group::Established => "Connections",
        Group::Fallback => "Fallbacks to TCP",
        Group::Joined => "Subflows joined",
        Group::Refused => "Joins refused or failed",
        Group::Address => "Addresses and subflows by the path managers",
        Group::Reset => "Resets",
        Group::Stale => "Stale subflows",
        Group::Data => "Data over several subflows",
        Group::Tcp => "TCP (subflows and other connections)",
        Group::Other => "Counters that this program does not know",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counter(name: &str, group: Group, value: u64) -> Counter {
        Counter {
            name: name.into(),
            group,
            value,
            meaning: if group == Group::Other { "" } else { "as it says" },
        }
    }

    #[test]
    fn changes_are_shown_up_and_down_and_in_their_groups() {
        let before = [
            counter("Now", Group::Established, 12),
            counter("Opened", Group::Established, 12),
            counter("Same", Group::Reset, 5),
            counter("New", Group::Other, 0),
        ];
        let after = [11, 13, 5, 1].into_iter().zip(&before);
        let after: Vec<_> = after.map(|(value, counter)| Counter { value, ..counter.clone() }).collect();
        let text: Vec<_> = table(&changes(&before, &after))
            .iter()
            .map(|line| anstream::adapter::strip_str(line).to_string().trim_end().to_string())
            .collect();
        assert_eq!(
            text,
            [
                "Connections",
                "-1 to 11  Now     as it says",
                "+1 to 13  Opened  as it says",
                "Counters that this program does not know",
                " +1 to 1  New",
            ]
        );
    }
}
