//! `braid monitor`: path-manager events in the format of `ip mptcp monitor`.

use std::fmt::Display;
use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::Result;
use jiff::ZonedDateTime;
use mptcp::Token;
use mptcp::pm::{Event, EventKind, Events, Notice};
use serde::Serialize;
use serde_json::{Value, json};

use crate::cmd::{self, Place};
use crate::output;

/// Print path-manager events
///
/// Prints what `ip mptcp monitor` prints, each event at once, until it is interrupted. When events come faster
/// than they can be read the kernel drops some; a line OVERRUN stands in their place.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid monitor
  braid monitor -t --token 32ba31f2
  braid monitor --type sf_established,sf_closed
  braid monitor --json -n client | jq 'select(.error == 110)'
  braid monitor --pid 4711")]
pub struct Args {
    #[command(flatten)]
    place: Place,
    /// Only events of the connection with this token
    #[arg(long, value_name = "HEX")]
    token: Option<Token>,
    /// Only events of these types, by the names that are printed
    #[arg(long = "type", value_name = "TYPE,…", value_delimiter = ',')]
    types: Vec<EventKind>,
    /// Print the time before each event, on a line of its own as `ip -t` does
    #[arg(short, long)]
    timestamp: bool,
    /// Print the time before each event, in short as `ip -ts` does
    #[arg(long, conflicts_with = "timestamp")]
    tshort: bool,
    /// Print one JSON object a line
    #[arg(short, long)]
    json: bool,
}

/// Bytes for events that wait to be printed: a burst of some thousand connections fits, where the kernel allows.
const BUFFER: usize = 4 << 20;

pub fn run(args: Args) -> Result<ExitCode> {
    let netns = args.place.open()?;
    cmd::ensure_mptcp(&netns)?;
    cmd::block_on(async {
        let mut end = cmd::signalled(cmd::END)?;
        let mut events = Events::subscribe_with_buffer(&netns, BUFFER)?;
        tracing::debug!("subscribed");
        loop {
            tokio::select! {
                notice = events.next() => {
                    let notice = notice?;
                    if args.wants(&notice) {
                        output::line(args.print(&notice, &ZonedDateTime::now()))?;
                    }
                }
                () = &mut end => return Ok(ExitCode::SUCCESS),
            }
        }
    })
}

impl Args {
    /// An overrun passes every filter: what was lost may be what was asked for.
    fn wants(&self, notice: &Notice) -> bool {
        let Notice::Event(event) = notice else { return true };
        self.token.is_none_or(|token| event.token == Some(token))
            && (self.types.is_empty() || self.types.contains(&event.kind))
    }

    fn print(&self, notice: &Notice, now: &ZonedDateTime) -> String {
        if self.json {
            let time = (self.timestamp || self.tshort).then(|| now.timestamp());
            return json(notice, time.map(|time| format!("{time:.6}")));
        }
        // print_timestamp() of iproute2; microseconds are not padded in the long form.
        let time = if self.timestamp {
            let microseconds = now.subsec_nanosecond() / 1000;
            format!("Timestamp: {} {microseconds} usec\n", now.strftime("%a %b %e %H:%M:%S %Y"))
        } else if self.tshort {
            now.strftime("[%Y-%m-%dT%H:%M:%S.%6f] ").to_string()
        } else {
            String::new()
        };
        time + &text(notice)
    }
}

/// The line of `ip mptcp monitor`.
fn text(notice: &Notice) -> String {
    let event = match notice {
        Notice::Overrun => return format!("[{:>16}] events were lost", "OVERRUN"),
        Notice::Event(Event { kind: EventKind::Unknown(number), .. }) => {
            return format!("[UNKNOWN {number}]");
        }
        Notice::Event(event) => event,
    };
    let fields = fields(event).into_iter().map(|field| format!(" {}={}", field.iproute2, field.text));
    format!("[{:>16}]{}", event.kind.to_string(), fields.collect::<String>())
}

fn json(notice: &Notice, time: Option<String>) -> String {
    let mut object: Vec<_> = time.map(|time| ("timestamp", json!(time))).into_iter().collect();
    match notice {
        Notice::Overrun => object.push(("event", json!("OVERRUN"))),
        Notice::Event(event) => {
            object.push(("event", json!(event.kind.to_string())));
            object.extend(fields(event).into_iter().map(|field| (field.name, field.value)));
            object.extend(event.server_side.map(|server_side| ("server_side", json!(server_side))));
        }
    }
    output::json_object(&object)
}

/// A part of an event: how iproute2 names and writes it, and how JSON does.
struct Field {
    iproute2: &'static str,
    text: String,
    name: &'static str,
    value: Value,
}

fn field(iproute2: &'static str, name: &'static str, value: impl Display + Serialize) -> Field {
    Field { iproute2, text: value.to_string(), name, value: json!(value) }
}

/// What an event has, in iproute2's order.
fn fields(event: &Event) -> Vec<Field> {
    let by_family = |v4, v6| move |ip: &IpAddr| if ip.is_ipv4() { v4 } else { v6 };
    let (saddr, daddr) = (by_family("saddr4", "saddr6"), by_family("daddr4", "daddr6"));
    let fields = [
        event.token.map(|token| field("token", "token", token)),
        event.remote_id.map(|id| field("remid", "remote_id", id)),
        event.local_id.map(|id| field("locid", "local_id", id)),
        event.local_ip.map(|ip| field(saddr(&ip), "local_ip", ip)),
        event.remote_ip.map(|ip| field(daddr(&ip), "remote_ip", ip)),
        event.local_port.map(|port| field("sport", "local_port", port)),
        event.remote_port.map(|port| field("dport", "remote_port", port)),
        event.backup.map(|set| Field { text: u8::from(set).to_string(), ..field("backup", "backup", set) }),
        event.error.map(|errno| field("error", "error", errno)),
        event.flags.map(|flags| Field { text: format!("{flags:x}"), ..field("flags", "flags", flags) }),
        event.timeout.map(|timeout| field("timeout", "timeout", timeout)),
        event.ifindex.map(|ifindex| field("ifindex", "ifindex", ifindex)),
        event.reset_reason.map(|reason| field("reset_reason", "reset_reason", reason)),
        event
            .reset_flags
            .map(|flags| Field { text: format!("{flags:#x}"), ..field("reset_flags", "reset_flags", flags) }),
    ];
    fields.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;
    use mptcp::AddrId;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn event(kind: EventKind) -> Event {
        Event {
            kind,
            token: Some(Token(0xab)),
            local_id: Some(AddrId(1)),
            remote_id: Some(AddrId(2)),
            local_ip: Some("::1".parse().unwrap()),
            remote_ip: Some("10.0.0.1".parse().unwrap()),
            local_port: Some(80),
            remote_port: None,
            backup: Some(true),
            error: Some(110),
            flags: Some(0x1f),
            timeout: Some(3),
            ifindex: Some(-1),
            reset_reason: Some(4),
            reset_flags: Some(0),
            server_side: Some(false),
        }
    }

    #[test]
    fn every_field_is_printed_in_iproute2s_order() {
        let notice = Notice::Event(event(EventKind::SubflowClosed));
        assert_eq!(
            text(&notice),
            "[       SF_CLOSED] token=000000ab remid=2 locid=1 saddr6=::1 daddr4=10.0.0.1 sport=80 backup=1 \
             error=110 flags=1f timeout=3 ifindex=-1 reset_reason=4 reset_flags=0x0"
        );
        assert_eq!(
            json(&notice, None),
            r#"{"event":"SF_CLOSED","token":"000000ab","remote_id":2,"local_id":1,"local_ip":"::1","remote_ip":"10.0.0.1","local_port":80,"backup":true,"error":110,"flags":31,"timeout":3,"ifindex":-1,"reset_reason":4,"reset_flags":0,"server_side":false}"#
        );
    }

    #[test]
    fn unknown_events_and_overruns_stand_in_the_stream() {
        let unknown = Notice::Event(event(EventKind::Unknown(77)));
        assert_eq!(text(&unknown), "[UNKNOWN 77]");
        assert!(json(&unknown, None).starts_with(r#"{"event":"UNKNOWN_77","token":"000000ab""#));
        assert_eq!(text(&Notice::Overrun), "[         OVERRUN] events were lost");
        assert_eq!(json(&Notice::Overrun, None), r#"{"event":"OVERRUN"}"#);
    }

    #[test]
    fn the_time_is_written_as_iproute2_writes_it() {
        let time: ZonedDateTime = "2026-03-05T07:08:09.000042+01:00[+01:00]".parse().unwrap();
        let print = |options: &str| {
            let line = format!("monitor {options}");
            Line::parse_from(line.split_whitespace()).args.print(&Notice::Overrun, &time)
        };
        assert_eq!(
            print("-t"),
            "Timestamp: Thu Mar  5 07:08:09 2026 42 usec\n[         OVERRUN] events were lost"
        );
        assert_eq!(print("--tshort"), "[2026-03-05T07:08:09.000042] [         OVERRUN] events were lost");
        for time in ["-t", "--tshort"] {
            assert_eq!(
                print(&format!("--json {time}")),
                r#"{"timestamp":"2026-03-05T06:08:09.000042Z","event":"OVERRUN"}"#
            );
        }
    }

    #[test]
    fn filters_let_an_overrun_pass() {
        let wants = |options: &str, notice: &Notice| {
            Line::parse_from(format!("monitor {options}").split_whitespace()).args.wants(notice)
        };
        let closed = Notice::Event(event(EventKind::SubflowClosed));
        assert!(wants("--token ab", &closed) && !wants("--token ac", &closed));
        assert!(wants("--type created,sf_closed", &closed) && !wants("--type CREATED", &closed));
        assert!(!wants("--token ab --type closed", &closed));
        assert!(wants("--token ac --type closed", &Notice::Overrun));
    }
}
