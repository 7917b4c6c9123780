//! A verdict for people: a table of what was expected and what was seen, and what each link and subflow carried.

use anstyle::{AnsiColor, Style};
use anyhow::Result;
use lab::judge::Verdict;

use crate::output;

const GOOD: Style = AnsiColor::Green.on_default().bold();
const BAD: Style = AnsiColor::Red.on_default().bold();
const BOLD: Style = Style::new().bold();

/// Prints `verdict`.
pub fn print(verdict: &Verdict) -> Result<()> {
    output::line(format_args!("{BOLD}{}{BOLD:#}: {}", verdict.scenario, word(verdict.pass)))?;
    let rows = verdict.rows.iter().map(|row| {
        let [expected, seen] = [&row.expected, &row.seen].map(|text| fold(text));
        (
            if row.pass { format!("{GOOD}✓{GOOD:#}") } else { format!("{BAD}✗{BAD:#}") },
            &row.name,
            expected,
            seen,
        )
    });
    let rows: Vec<_> = rows.collect();
    let name_width = rows.iter().map(|(_, name, ..)| name.len()).max().unwrap_or(0);
    let wide = |cell: &Vec<String>| cell.iter().map(|line| line.chars().count()).max().unwrap_or(0);
    let expected_width =
        rows.iter().map(|(_, _, expected, _)| wide(expected)).max().unwrap_or(0).max("expected".len());
    output::line(format_args!("    {:name_width$}  {:expected_width$}  seen", "", "expected"))?;
    for (mark, name, expected, seen) in rows {
        for line in 0..expected.len().max(seen.len()) {
            let cell = |lines: &[String]| lines.get(line).cloned().unwrap_or_default();
            let (mark, name) = if line == 0 { (mark.as_str(), name.as_str()) } else { (" ", "") };
            let text =
                format!("  {mark} {name:name_width$}  {:expected_width$}  {}", cell(&expected), cell(&seen));
            output::line(text.trim_end())?;
        }
    }
    for (process, lines) in &verdict.last_lines {
        for line in lines {
            output::line(format_args!("    {process} printed: {line}"))?;
        }
    }
    if verdict.program_seconds > 0.0 {
        print_carried(verdict)?;
    }
    Ok(())
}

fn print_carried(verdict: &Verdict) -> Result<()> {
    let links = verdict.paths.iter().map(|link| {
        let name = format!("link {}, {} -> {}", link.link, link.a, link.b);
        (name, [link.a_to_b_bytes, link.b_to_a_bytes], link.bits_per_second)
    });
    let subflows = verdict.subflows.iter().map(|subflow| {
        let name = format!("{} {}", subflow.node, subflow.subflow);
        (name, [subflow.sent, subflow.received], subflow.bits_per_second)
    });
    let carried: Vec<_> = links.chain(subflows).collect();
    let heading = format!("carried in {:.1} s of programs", verdict.program_seconds);
    let names = carried.iter().map(|(name, ..)| name.chars().count());
    let width = names.chain([heading.len()]).max().unwrap_or(0);
    output::line(format_args!("    {heading:width$}  {:>11}  {:>11}  {:>12}", "there", "back", "mean"))?;
    for (name, [there, back], rate) in carried {
        output::line(format_args!(
            "    {name:width$}  {:>8.1} MB  {:>8.1} MB  {:>5.1} Mbit/s",
            there as f64 / 1e6,
            back as f64 / 1e6,
            rate / 1e6,
        ))?;
    }
    Ok(())
}

/// `pass` or `FAIL`, in its colour.
pub fn word(pass: bool) -> String {
    if pass { format!("{GOOD}pass{GOOD:#}") } else { format!("{BAD}FAIL{BAD:#}") }
}

/// Breaks a list into lines of a width that leaves two of them room beside each other.
fn fold(text: &str) -> Vec<String> {
    const WIDTH: usize = 48;
    let mut lines: Vec<String> = Vec::new();
    for part in text.split_inclusive(", ") {
        match lines.last_mut() {
            Some(line) if line.chars().count() + part.trim_end().chars().count() <= WIDTH => {
                line.push_str(part)
            }
            _ => lines.push(part.into()),
        }
    }
    lines.iter().map(|line| line.trim_end().to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::fold;

    #[test]
    fn a_long_list_is_folded_between_its_parts() {
        let pairs = "10.123.200.3 -> 10.123.200.2:4444, 10.123.201.3 -> 10.123.201.2:4444";
        assert_eq!(fold(pairs), ["10.123.200.3 -> 10.123.200.2:4444,", "10.123.201.3 -> 10.123.201.2:4444"]);
        assert_eq!(fold("exit code 0"), ["exit code 0"]);
    }
}
