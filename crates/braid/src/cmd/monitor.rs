//! `braid monitor`: path-manager events in the format of `ip mptcp monitor`.

use std::fmt::Display;
use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::Result;
use mptcp::pm::{Event, EventKind, Events, Notice};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

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
  braid monitor --json -n client | jq 'select(.event == \"SF_CLOSED\")'
  braid monitor --pid 4711")]
pub struct Args {
    #[command(flatten)]
    place: Place,
    /// Print one JSON object a line
    #[arg(short, long)]
    json: bool,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let netns = args.place.open()?;
    let format = if args.json { json } else { text };
    cmd::block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut events = Events::subscribe(&netns)?;
        tracing::debug!("subscribed");
        loop {
            tokio::select! {
                notice = events.next() => output::line(format(&notice?))?,
                _ = interrupt.recv() => return Ok(ExitCode::SUCCESS),
                _ = terminate.recv() => return Ok(ExitCode::SUCCESS),
            }
        }
    })
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

fn json(notice: &Notice) -> String {
    let mut object = Vec::new();
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
    use mptcp::{AddrId, Token};

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
            json(&notice),
            r#"{"event":"SF_CLOSED","token":"000000ab","remote_id":2,"local_id":1,"local_ip":"::1","remote_ip":"10.0.0.1","local_port":80,"backup":true,"error":110,"flags":31,"timeout":3,"ifindex":-1,"reset_reason":4,"reset_flags":0,"server_side":false}"#
        );
    }

    #[test]
    fn unknown_events_and_overruns_stand_in_the_stream() {
        let unknown = Notice::Event(event(EventKind::Unknown(77)));
        assert_eq!(text(&unknown), "[UNKNOWN 77]");
        assert!(json(&unknown).starts_with(r#"{"event":"UNKNOWN_77","token":"000000ab""#));
        assert_eq!(text(&Notice::Overrun), "[         OVERRUN] events were lost");
        assert_eq!(json(&Notice::Overrun), r#"{"event":"OVERRUN"}"#);
    }
}
