//! The verdict: what was expected, beside what was seen.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use indexmap::IndexMap;
use mptcp::pm::EventKind;
use serde::{Deserialize, Serialize};

use crate::capture::{self, Segment};
use crate::record::{Connection, Record, Sample};
use crate::scenario::{
    CarriedExpected, Counts, EventsExpected, Expectation, FlowsExpected, HandoverExpected, Pair,
    ResumedExpected, SameExpected, Scenario, ShareExpected, StallExpected, Step, SubflowsExpected,
    WhichFlows,
};
use crate::step::Outcome;

/// What came of a scenario.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Verdict {
    /// `NAME` or `NAME:VARIANT`.
    pub scenario: String,
    /// Was everything as expected?
    pub pass: bool,
    /// One row for each thing that was expected.
    pub rows: Vec<Row>,
    /// Of a failure: what the scenario's processes printed last, by name.
    pub last_lines: IndexMap<String, Vec<String>>,
    /// For how long steps ran programs, in seconds: what is carried below was carried in that time.
    pub program_seconds: f64,
    /// What each link carried.
    pub paths: Vec<LinkCarried>,
    /// What each pair of addresses carried, all its subflows together.
    pub subflows: Vec<SubflowCarried>,
}

/// One thing that was expected.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Row {
    pub name: String,
    pub expected: String,
    pub seen: String,
    pub pass: bool,
}

/// What a link carried while steps ran programs, in bytes of Ethernet frames.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LinkCarried {
    /// The link's name.
    pub link: String,
    /// The node at end a.
    pub a: String,
    /// The node at end b.
    pub b: String,
    /// From end a to end b.
    pub a_to_b_bytes: u64,
    /// From end b to end a.
    pub b_to_a_bytes: u64,
    /// Both directions, the mean over [`Verdict::program_seconds`].
    pub bits_per_second: f64,
}

/// What the subflows between two addresses carried while steps ran programs, payload with retransmissions.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SubflowCarried {
    /// The node that opened the connections.
    pub node: String,
    /// `10.0.0.2 -> 10.0.0.1:4321`
    pub subflow: String,
    /// Bytes sent by the node.
    pub sent: u64,
    /// Bytes received by the node.
    pub received: u64,
    /// Both directions, the mean over [`Verdict::program_seconds`].
    pub bits_per_second: f64,
}

/// Have all events come that the scenario expects, or that can still come?
pub(crate) fn has_settled(scenario: &Scenario, record: &Record) -> bool {
    let expected = scenario.expect.values().all(|expectation| match expectation {
        Expectation::Events(expected) => judge_events(expected, record).1,
        _ => true,
    });
    expected || record.open().is_empty()
}

/// Judges what was recorded in a lab whose programs worked in the directory `work`.
pub(crate) fn judge(scenario: &Scenario, record: &Record, outcome: &Outcome, work: &Path) -> Verdict {
    let mut rows = Vec::new();
    let mut row = |name: &str, expected: String, (seen, pass): (String, bool)| {
        rows.push(Row { name: name.into(), expected, seen, pass });
    };
    for (name, exit, end) in &outcome.exits {
        let seen = match end {
            Ok(code) => format!("exit code {code}"),
            Err(problem) => problem.clone(),
        };
        row(name, format!("exit code {exit}"), (seen, end.is_ok()));
    }
    if let Some((step, problem)) = &outcome.failure {
        row(step, "done".into(), (problem.clone(), false));
    }
    if record.overrun {
        row("recording", "all events".into(), ("some were lost: the socket's buffer overran".into(), false));
    }
    for (name, expectation) in &scenario.expect {
        let (expected, seen) = match expectation {
            Expectation::Events(expected) => (describe_events(expected), judge_events(expected, record)),
            Expectation::Subflows(expected) => {
                (describe_subflows(expected), judge_subflows(expected, record))
            }
            Expectation::Flows(expected) => (describe_flows(expected), judge_flows(expected, record)),
            Expectation::Command(expected) => {
                let unasked = ("not asked".into(), false);
                (expected.expected.clone(), outcome.answers.get(name).cloned().unwrap_or(unasked))
            }
            Expectation::Share(expected) => (describe_share(expected), judge_share(expected, record)),
            Expectation::Same(expected) => {
                (format!("equal SHA-256 of {}", expected.files.join(", ")), judge_same(expected, work))
            }
            Expectation::Stall(expected) => {
                (describe_stall(expected), judge_stall(expected, record, outcome))
            }
            Expectation::Resumed(expected) => (describe_resumed(expected), judge_resumed(expected, record)),
            Expectation::Carried(expected) => (
                format!("data only on {}", list(&expected.only)),
                seen_or(judge_carried(expected, record, work)),
            ),
            Expectation::Handover(expected) => {
                (format!("data move to {}", expected.to), seen_or(judge_handover(expected, record, work)))
            }
        };
        row(name, expected, seen);
    }
    let spans = spans_of_programs(scenario, record);
    let program_seconds = spans.iter().map(|[begin, end]| (end.at - begin.at).as_secs_f64()).sum();
    Verdict {
        scenario: scenario.name.clone(),
        pass: rows.iter().all(|row| row.pass),
        rows,
        last_lines: IndexMap::new(),
        program_seconds,
        paths: links_carried(scenario, record, &spans, program_seconds),
        subflows: subflows_carried(record, &spans, program_seconds),
    }
}

/// Without anything to judge by there is a problem.
fn seen_or(judged: Result<(String, bool), String>) -> (String, bool) {
    judged.unwrap_or_else(|problem| (problem, false))
}

fn describe_events(expected: &EventsExpected) -> String {
    let counts = |counts: &Counts, before: &str| {
        counts.iter().map(|(kind, count)| format!("{} {before}{count}", kind.0)).collect::<Vec<_>>()
    };
    [counts(&expected.count, ""), counts(&expected.at_least, "≥ ")].concat().join(", ")
}

fn judge_events(expected: &EventsExpected, record: &Record) -> (String, bool) {
    let count = |kind: EventKind| match &expected.during {
        None => {
            record.events.iter().filter(|seen| seen.node == expected.node && seen.event.kind == kind).count()
        }
        Some(step) => record
            .connections(&expected.node, Some(step))
            .iter()
            .map(|Connection { token, .. }| {
                record.events_of(&expected.node, *token).filter(|event| event.kind == kind).count()
            })
            .sum(),
    } as u64;
    let exact = expected.count.iter().map(|(kind, wanted)| (kind, count(kind.0), count(kind.0) == *wanted));
    let least =
        expected.at_least.iter().map(|(kind, wanted)| (kind, count(kind.0), count(kind.0) >= *wanted));
    let seen: Vec<_> = exact.chain(least).collect();
    let text = seen.iter().map(|(kind, count, _)| format!("{} {count}", kind.0)).collect::<Vec<_>>();
    (text.join(", "), seen.iter().all(|(.., fits)| *fits))
}

fn describe_subflows(expected: &SubflowsExpected) -> String {
    list(&expected.pairs)
}

fn list(pairs: &[Pair]) -> String {
    pairs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn judge_subflows(expected: &SubflowsExpected, record: &Record) -> (String, bool) {
    let connections = record.connections(&expected.node, expected.during.as_deref());
    let fits = |Connection { subflows, .. }: &Connection| {
        let wanted = expected.pairs.iter().all(|pair| subflows.iter().any(|(a, b)| pair.matches(*a, *b)));
        wanted && subflows.iter().all(|(a, b)| expected.pairs.iter().any(|pair| pair.matches(*a, *b)))
    };
    match connections.iter().find(|connection| !fits(connection)) {
        None if connections.is_empty() => ("no connection".into(), false),
        None => (format!("these, in {}", plural(connections.len(), "connection")), true),
        Some(odd) if odd.subflows.is_empty() => ("a connection that is not MPTCP".into(), false),
        Some(odd) => {
            let pairs: Vec<_> = odd.subflows.iter().map(|(a, b)| format!("{} -> {b}", a.ip())).collect();
            (pairs.join(", "), false)
        }
    }
}

fn describe_flows(expected: &FlowsExpected) -> String {
    let which = match expected.which {
        WhichFlows::All => "all",
        WhichFlows::First => "the first",
        WhichFlows::Added => "added ones",
    };
    let join = |list: Vec<String>, word: &str| list.join(&format!(" {word} "));
    let from = expected.from.iter().map(ToString::to_string).collect::<Vec<_>>();
    let to = expected.to.iter().map(ToString::to_string).collect::<Vec<_>>();
    let mut words = vec![which.to_string()];
    if !from.is_empty() {
        words.push(format!("from {}", join(from, "and")));
    }
    if !to.is_empty() {
        words.push(format!("to {}", join(to, if expected.every { "and" } else { "or" })));
    }
    if expected.same {
        words.push("(the same for all of a connection)".into());
    }
    words.join(" ")
}

fn judge_flows(expected: &FlowsExpected, record: &Record) -> (String, bool) {
    let connections = record.connections(&expected.node, expected.during.as_deref());
    let meant = |connection: &Connection| -> Vec<(SocketAddr, SocketAddr)> {
        let flows = &connection.subflows;
        match expected.which {
            WhichFlows::All => flows.clone(),
            WhichFlows::First => flows.iter().take(1).copied().collect(),
            WhichFlows::Added => flows.iter().skip(1).copied().collect(),
        }
    };
    let flows: Vec<Vec<_>> = connections.iter().map(meant).collect();
    if flows.is_empty() {
        return ("no connection".into(), false);
    }
    let fits = |flows: &Vec<(SocketAddr, SocketAddr)>| {
        let to = expected.to.is_empty() || flows.iter().all(|(_, to)| expected.to.contains(to));
        let same = !expected.same || flows.windows(2).all(|pair| pair[0].1 == pair[1].1);
        let from = expected.from.iter().all(|ip| flows.iter().any(|(from, _)| from.ip() == *ip));
        !flows.is_empty() && to && same && from
    };
    if let Some(odd) = flows.iter().find(|flows| !fits(flows)) {
        let pairs: Vec<_> = odd.iter().map(|(from, to)| format!("{} -> {to}", from.ip())).collect();
        let pairs = if pairs.is_empty() { "none".into() } else { pairs.join(", ") };
        return (format!("a connection with {pairs}"), false);
    }
    // How many connections used which ends.
    let mut ends = BTreeMap::<String, usize>::new();
    for flows in &flows {
        let of_one: BTreeSet<_> = flows.iter().map(|(from, to)| format!("{} -> {to}", from.ip())).collect();
        for end in of_one {
            *ends.entry(end).or_default() += 1;
        }
    }
    let unused = |to: &&SocketAddr| !flows.iter().flatten().any(|(_, seen)| seen == *to);
    if let Some(unused) = expected.to.iter().find(unused).filter(|_| expected.every) {
        return (format!("none to {unused}, in {}", plural(connections.len(), "connection")), false);
    }
    let seen: Vec<_> = ends.iter().map(|(end, count)| format!("{end} ({count})")).collect();
    (seen.join(", "), true)
}

fn describe_share(expected: &ShareExpected) -> String {
    let shares = expected.at_least.iter().map(|(link, share)| format!("{link} ≥ {}", percent(share.0)));
    shares.collect::<Vec<_>>().join(", ")
}

fn judge_share(expected: &ShareExpected, record: &Record) -> (String, bool) {
    let bytes = |link: &str| -> Option<u64> {
        let step = record.step(&expected.during)?;
        let at = record.links.iter().position(|name| name == link)?;
        let [before, after] =
            [step.bytes.0.get(at)?, step.bytes.1.as_ref()?.get(at)?].map(|both| both[0] + both[1]);
        Some(after - before)
    };
    let carried: Option<Vec<_>> =
        expected.at_least.iter().map(|(link, share)| Some((link, share.0, bytes(link)?))).collect();
    let Some(carried) = carried else { return ("the step did not come to its end".into(), false) };
    let total: u64 = carried.iter().map(|(.., bytes)| bytes).sum();
    if total == 0 {
        return ("nothing was carried".into(), false);
    }
    let share = |bytes: u64| bytes as f64 / total as f64;
    let seen = carried.iter().map(|(link, _, bytes)| format!("{link} {}", percent(share(*bytes))));
    (seen.collect::<Vec<_>>().join(", "), carried.iter().all(|(_, least, bytes)| share(*bytes) >= *least))
}

fn judge_same(expected: &SameExpected, work: &Path) -> (String, bool) {
    let output =
        std::process::Command::new("sha256sum").arg("--").args(&expected.files).current_dir(work).output();
    let output = match output {
        Ok(output) if output.status.success() => output,
        Ok(output) => return (String::from_utf8_lossy(&output.stderr).trim().into(), false),
        Err(error) => return (format!("start sha256sum: {error}"), false),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let sums: Vec<&str> = text.lines().filter_map(|line| line.get(..12)).collect();
    let whole: Vec<&str> = text.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let pass = whole.len() == expected.files.len() && whole.windows(2).all(|pair| pair[0] == pair[1]);
    let seen = match sums.first() {
        Some(sum) if pass => format!("{sum}…, {} bytes", size(work, &expected.files[0])),
        _ => {
            let each = expected.files.iter().zip(&sums);
            each.map(|(file, sum)| format!("{file} {sum}… ({} bytes)", size(work, file)))
                .collect::<Vec<_>>()
                .join(", ")
        }
    };
    (seen, pass)
}

fn size(work: &Path, file: &str) -> u64 {
    std::fs::metadata(work.join(file)).map_or(0, |metadata| metadata.len())
}

fn describe_stall(expected: &StallExpected) -> String {
    let most = expected.at_most.map(|most| format!("≤ {} ms", most.as_millis()));
    let of = expected.at_most_of.as_ref();
    let of = of.map(|of| format!("≤ {} of {}'s", percent(of.share.0), of.step));
    let bounds: Vec<String> = most.into_iter().chain(of).collect();
    let bounds = if bounds.is_empty() { "any".into() } else { bounds.join(", ") };
    expected.during.as_ref().map_or(bounds.clone(), |during| format!("{bounds} during {during}"))
}

fn judge_stall(expected: &StallExpected, record: &Record, outcome: &Outcome) -> (String, bool) {
    let (seen, text) = match stall(&expected.step, expected, record, outcome) {
        Ok(stall) => stall,
        Err(problem) => return (problem, false),
    };
    let fits = expected.at_most.is_none_or(|most| seen <= most);
    let Some(of) = &expected.at_most_of else { return (text, fits) };
    match stall(&of.step, expected, record, outcome) {
        Ok((other, _)) => {
            let share = seen.as_secs_f64() / other.as_secs_f64();
            let of_other = format!("{text}: {} of {} ms", percent(share), other.as_millis());
            (of_other, fits && share <= of.share.0)
        }
        Err(problem) => (problem, false),
    }
}

/// How long the transfer of `step` stood still, and that in words.
fn stall(
    step: &str,
    expected: &StallExpected,
    record: &Record,
    outcome: &Outcome,
) -> Result<(Duration, String), String> {
    let arrival = outcome.arrivals.get(step).filter(|arrival| arrival.bytes > 0);
    let arrival = arrival.ok_or_else(|| format!("nothing of {step} arrived"))?;
    let Some(during) = &expected.during else {
        return Ok((arrival.stall, format!("{} ms without a byte", arrival.stall.as_millis())));
    };
    let time = record.step(during).and_then(|step| Some((step.began, step.ended?)));
    let (began, ended) = time.ok_or("the step did not come to its end")?;
    // Of each gap, what lies in that time.
    let gaps = arrival.gaps.iter().map(|(from, to)| (*to).min(ended).saturating_sub((*from).max(began)));
    let gaps: Vec<Duration> = gaps.filter(|gap| !gap.is_zero()).collect();
    let all: Duration = gaps.iter().sum();
    let each: Vec<_> = gaps.iter().map(|gap| gap.as_millis().to_string()).collect();
    let text = match each.as_slice() {
        [] | [_] => format!("{} ms without a byte", all.as_millis()),
        each => format!("{} ms without a byte ({})", all.as_millis(), each.join(" + ")),
    };
    Ok((all, text))
}

/// So many bytes on a link are data.
const DATA: u64 = 64 * 1024;

fn describe_resumed(expected: &ResumedExpected) -> String {
    let after = format!("{} carries data after {}", expected.link, expected.after);
    expected.at_most.map_or(after.clone(), |most| format!("{after} in ≤ {} ms", most.as_millis()))
}

fn judge_resumed(expected: &ResumedExpected, record: &Record) -> (String, bool) {
    let ended = record.step(&expected.after).and_then(|step| Some((step.ended?, step.bytes.1.as_ref()?)));
    let at = record.links.iter().position(|name| *name == expected.link);
    let (Some((ended, before)), Some(at)) = (ended, at) else {
        return ("the step did not come to its end".into(), false);
    };
    let sum = |bytes: &[[u64; 2]]| bytes.get(at).map_or(0, |both| both[0] + both[1]);
    let carries = |sample: &&Sample| sample.at > ended && sum(&sample.bytes) >= sum(before) + DATA;
    match record.samples.iter().find(carries) {
        // The link's bytes are looked at ten times a second.
        Some(sample) => {
            let took = sample.at - ended;
            (format!("after {} ms", took.as_millis()), expected.at_most.is_none_or(|most| took <= most))
        }
        None => ("not again".into(), expected.at_most.is_none()),
    }
}

fn judge_carried(expected: &CarriedExpected, record: &Record, work: &Path) -> Result<(String, bool), String> {
    let (segments, time) = captured(&expected.capture, &expected.during, record, work)?;
    // Bytes that the expected subflows carried there and back.
    let mut carried = vec![[0, 0]; expected.only.len()];
    let mut others = IndexMap::<String, u64>::new();
    for segment in segments.iter().filter(|s| s.payload > 0 && time.contains(&s.at)) {
        let Segment { from, to, payload, .. } = *segment;
        match expected.only.iter().position(|pair| pair.joins(from, to)) {
            Some(at) => carried[at][usize::from(!expected.only[at].matches(from, to))] += payload,
            None => *others.entry(format!("{from} -> {to}")).or_default() += payload,
        }
    }
    let pass = others.is_empty() && carried.iter().all(|[there, back]| there + back > 0);
    let kb = |bytes: u64| format!("{} kB", bytes.div_ceil(1000));
    let wanted = carried.iter().map(|[there, back]| format!("{} there, {} back", kb(*there), kb(*back)));
    let seen = wanted.chain(others.iter().map(|(subflow, bytes)| format!("{} on {subflow}", kb(*bytes))));
    Ok((seen.collect::<Vec<_>>().join(", "), pass))
}

fn judge_handover(
    expected: &HandoverExpected,
    record: &Record,
    work: &Path,
) -> Result<(String, bool), String> {
    let (segments, time) = captured(&expected.capture, &expected.during, record, work)?;
    let is_data =
        |pair: &Pair, segment: &&Segment| segment.payload > 0 && pair.joins(segment.from, segment.to);
    let told = segments.iter().position(|s| s.priority && time.contains(&s.at)).ok_or("no MP_PRIO")?;
    let (before, after) = segments.split_at(told);
    let ms = |segment: &Segment| segment.at.saturating_sub(segments[told].at).as_secs_f64() * 1e3;
    if !before.iter().rfind(|s| s.payload > 0).is_some_and(|s| is_data(&expected.from, &s)) {
        return Err("data were not on the old path before".into());
    }
    // A program that had nothing to send just then sends later.
    let first = after.iter().find(|s| is_data(&expected.to, s)).ok_or("no data on the new path")?;
    let last = after.iter().rfind(|s| is_data(&expected.from, s) && time.contains(&s.at));
    let last =
        last.map_or("none on the old one".into(), |s| format!("last on the old one after {:.1} ms", ms(s)));
    Ok((format!("from MP_PRIO on: first data there after {:.1} ms, {last}", ms(first)), true))
}

/// What a capture has, and the time in it in which a step ran.
fn captured(
    capture: &str,
    during: &str,
    record: &Record,
    work: &Path,
) -> Result<(Vec<Segment>, RangeInclusive<Duration>), String> {
    let step = record.step(during).and_then(|step| Some((step.began, step.ended?)));
    let (began, ended) = step.ok_or("the step did not come to its end")?;
    let segments = capture::read(&work.join(capture)).map_err(|error| error.to_string())?;
    Ok((segments, record.began + began..=record.began + ended))
}

/// A moment, and what the links had carried by then.
#[derive(Clone, Copy)]
struct Moment<'r> {
    at: Duration,
    link_bytes: &'r [[u64; 2]],
}

/// Begin and end of the times in which steps ran programs; of programs side by side it is one.
fn spans_of_programs<'r>(scenario: &Scenario, record: &'r Record) -> Vec<[Moment<'r>; 2]> {
    let mut spans: Vec<[Moment<'_>; 2]> = Vec::new();
    for step in &record.steps {
        let (Some(Step::Run(_)), Some(ended), Some(bytes)) =
            (scenario.steps.get(&step.name), step.ended, &step.bytes.1)
        else {
            continue;
        };
        let begin = Moment { at: step.began, link_bytes: &step.bytes.0 };
        let end = Moment { at: ended, link_bytes: bytes };
        match spans.last_mut().filter(|[_, last]| begin.at <= last.at) {
            Some([_, last]) if last.at < end.at => *last = end,
            Some(_) => {}
            None => spans.push([begin, end]),
        }
    }
    spans
}

fn links_carried(
    scenario: &Scenario,
    record: &Record,
    spans: &[[Moment<'_>; 2]],
    seconds: f64,
) -> Vec<LinkCarried> {
    let link = |(at, name): (usize, &String)| {
        let spec = scenario.links.get(name)?;
        let carried = |way: usize| {
            spans.iter().map(|[a, b]| b.link_bytes[at][way] - a.link_bytes[at][way]).sum::<u64>()
        };
        let [a_to_b_bytes, b_to_a_bytes] = [carried(0), carried(1)];
        let bits_per_second = rate(a_to_b_bytes + b_to_a_bytes, seconds);
        let [a, b] = [&spec.a, &spec.b].map(|end| end.node.clone());
        Some(LinkCarried { link: name.clone(), a, b, a_to_b_bytes, b_to_a_bytes, bits_per_second })
    };
    record.links.iter().enumerate().filter_map(link).collect()
}

fn subflows_carried(record: &Record, spans: &[[Moment<'_>; 2]], seconds: f64) -> Vec<SubflowCarried> {
    let mut pairs = BTreeMap::<(&str, String), [u64; 2]>::new();
    for (key, looks) in &record.subflows {
        // What a node says to itself takes no path.
        if key.remote.ip().is_loopback() {
            continue;
        }
        let until = |moment: Moment<'_>| {
            looks.iter().rfind(|look| look.at <= moment.at).map_or([0; 2], |look| look.bytes)
        };
        let sum = pairs.entry((&key.node, format!("{} -> {}", key.local.ip(), key.remote))).or_default();
        for [begin, end] in spans {
            let (before, after) = (until(*begin), until(*end));
            *sum = std::array::from_fn(|way| sum[way] + after[way].saturating_sub(before[way]));
        }
    }
    let row = |((node, subflow), [sent, received]): ((&str, String), [u64; 2])| SubflowCarried {
        node: node.into(),
        subflow,
        sent,
        received,
        bits_per_second: rate(sent + received, seconds),
    };
    pairs.into_iter().map(row).collect()
}

fn rate(bytes: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { bytes as f64 * 8.0 / seconds } else { 0.0 }
}

fn percent(share: f64) -> String {
    format!("{:.0}%", share * 100.0)
}

fn plural(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests;
