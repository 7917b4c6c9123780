//! `braid endpoint`: the grammar and the output of `ip mptcp endpoint`.

use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use mptcp::pm::{Client, Endpoint, EndpointFlags};
use mptcp::{AddrId, Netns};
use serde_json::{Value, json};

use crate::cmd::{self, Interfaces, Place};
use crate::output;

/// Show and set the path manager's endpoints
///
/// The grammar and the output are those of `ip mptcp endpoint`: words in any order, keywords may be
/// abbreviated. Without a command the endpoints are shown.
#[derive(Debug, clap::Args)]
#[command(
    infer_subcommands = true,
    after_help = "\
Examples:
  braid endpoint
  braid endpoint add 10.0.1.2 dev eth1 subflow
  braid endpoint add 192.0.2.7 signal port 8443
  braid endpoint change id 2 backup
  braid endpoint delete id 2"
)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    place: Place,
    /// Print JSON, as `ip -j` does
    #[arg(short, long, global = true)]
    json: bool,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Add an endpoint: ADDRESS [dev NAME] [id ID] [port NR] [signal|subflow|laminar|backup|fullmesh]...
    ///
    /// signal: announce the address to the peer. subflow: open subflows from it. laminar: open subflows from
    /// it to addresses that the peer announced. backup: use its subflows only when no other works. fullmesh:
    /// open subflows from it to every address of the peer. A port needs signal.
    Add(Words),
    /// Delete an endpoint: id ID [ADDRESS]
    ///
    /// Id 0 is the connections' own address, and needs ADDRESS.
    Delete(Words),
    /// Change an endpoint and its subflows: (id ID | ADDRESS [port NR]) [no]backup|[no]fullmesh...
    ///
    /// Both flags are set as given: one that is not named is cleared.
    Change(Words),
    /// Show all endpoints, or one: [id ID]
    Show(Words),
    /// Delete all endpoints
    Flush,
}

#[derive(Debug, Default, clap::Args)]
struct Words {
    /// Words as `ip mptcp endpoint` takes them
    #[arg(value_name = "WORD")]
    words: Vec<String>,
}

/// In the order in which they are printed.
const FLAGS: [(&str, EndpointFlags); 6] = [
    ("signal", EndpointFlags::SIGNAL),
    ("subflow", EndpointFlags::SUBFLOW),
    ("laminar", EndpointFlags::LAMINAR),
    ("backup", EndpointFlags::BACKUP),
    ("fullmesh", EndpointFlags::FULLMESH),
    ("implicit", EndpointFlags::IMPLICIT),
];

pub fn run(args: Args) -> Result<ExitCode> {
    let netns = args.place.open()?;
    match args.command.unwrap_or_else(|| Command::Show(Words::default())) {
        Command::Add(Words { words }) => add(&netns, &Request::parse(&words)?),
        Command::Delete(Words { words }) => delete(&netns, &Request::parse(&words)?),
        Command::Change(Words { words }) => change(&netns, &Request::parse(&words)?),
        Command::Show(Words { words }) => show(&netns, &Request::parse(&words)?, args.json),
        Command::Flush => request(&netns, async |client| client.flush_endpoints().await),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn add(netns: &Netns, wanted: &Request) -> Result<()> {
    let ip = wanted.ip.context("add: an address is needed")?;
    wanted.refuse_id_0()?;
    ensure!(wanted.port == 0 || wanted.flags.contains(EndpointFlags::SIGNAL), "port: needs the flag signal");
    ensure!(
        !wanted.flags.contains(EndpointFlags::SIGNAL | EndpointFlags::FULLMESH),
        "fullmesh: cannot be combined with signal"
    );
    let endpoint = Endpoint {
        ip,
        id: wanted.id,
        flags: wanted.flags,
        port: wanted.port,
        ifindex: wanted.ifindex(netns)?,
    };
    cmd::ensure_in_kernel_path_manager(netns)?;
    request(netns, async |client| client.add_endpoint(&endpoint).await)
}

fn delete(netns: &Netns, wanted: &Request) -> Result<()> {
    let id = wanted.id.context("delete: an id is needed")?;
    match (id, wanted.ip) {
        (AddrId(0), None) => bail!("id 0: an address is needed"),
        (AddrId(1..), Some(ip)) => bail!("{ip}: an address goes with id 0 only"),
        _ => request(netns, async |client| client.delete_endpoint(id, wanted.ip).await),
    }
}

fn change(netns: &Netns, wanted: &Request) -> Result<()> {
    wanted.refuse_id_0()?;
    ensure!(wanted.id.is_some() || wanted.ip.is_some(), "change: an address or an id is needed");
    ensure!(wanted.id.is_none() || wanted.port == 0, "port: cannot be used with id");
    ensure!(
        (EndpointFlags::BACKUP | EndpointFlags::FULLMESH).contains(wanted.flags),
        "change: only backup and fullmesh can be changed"
    );
    cmd::ensure_in_kernel_path_manager(netns)?;
    request(netns, async |client| {
        let mut endpoint = match (wanted.ip, wanted.id) {
            // The kernel prefers the address where both are given (mptcp_pm_nl_set_flags()).
            (None, Some(id)) => client.endpoint(id).await?,
            (Some(ip), _) => Endpoint { port: wanted.port, ..Endpoint::new(ip, wanted.flags) },
            (None, None) => return Ok(()),
        };
        endpoint.flags = wanted.flags;
        client.change_endpoint(&endpoint).await
    })
}

fn show(netns: &Netns, wanted: &Request, json: bool) -> Result<()> {
    wanted.refuse_id_0()?;
    ensure!(*wanted == Request { id: wanted.id, ..Request::default() }, "show: takes only id ID");
    let endpoints = cmd::block_on(async {
        let client = Client::connect(netns).await?;
        Ok(match wanted.id {
            Some(id) => vec![client.endpoint(id).await?],
            None => client.endpoints().await?,
        })
    })?;
    let interfaces = Interfaces::of(netns)?;
    let endpoints = endpoints.iter().map(|endpoint| fields(endpoint, &interfaces));
    if json {
        let objects: Vec<_> = endpoints.map(|fields| output::json_object(&fields)).collect();
        output::line(format_args!("[{}]", objects.join(",")))?;
    } else {
        for fields in endpoints {
            output::line(text(&fields))?;
        }
    }
    Ok(())
}

fn request(netns: &Netns, ask: impl AsyncFnOnce(&Client) -> mptcp::Result<()>) -> Result<()> {
    cmd::block_on(async { Ok(ask(&Client::connect(netns).await?).await?) })
}

/// What the words ask for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Request {
    pub ip: Option<IpAddr>,
    pub id: Option<AddrId>,
    pub port: u16,
    pub dev: Option<String>,
    pub flags: EndpointFlags,
}

impl Request {
    pub fn parse(words: &[String]) -> Result<Self> {
        let mut words = words.iter();
        let request = Self::take(&mut words)?;
        match words.next() {
            Some(word) => bail!("'{word}' is no address, no flag and none of id, dev, port"),
            None => Ok(request),
        }
    }

    /// Takes the words up to the first that is not one of an endpoint.
    pub fn take(words: &mut std::slice::Iter<'_, String>) -> Result<Self> {
        let mut request = Request::default();
        loop {
            let mut rest = words.clone();
            let Some(word) = rest.next() else { return Ok(request) };
            let mut value = || rest.next().with_context(|| format!("{word}: a value is needed"));
            if let Some((_, flag)) = FLAGS.iter().find(|(name, _)| name == word) {
                request.flags |= *flag;
            } else if ["nobackup", "nofullmesh"].contains(&word.as_str()) {
                // The kernel clears what is not set.
            } else if cmd::abbreviates(word, "id") {
                request.id = Some(AddrId(cmd::number(word, value()?)?));
            } else if cmd::abbreviates(word, "dev") {
                request.dev = Some(value()?.clone());
            } else if cmd::abbreviates(word, "port") {
                request.port = cmd::number(word, value()?)?;
            } else if let Ok(ip) = word.parse() {
                request.ip = Some(ip);
            } else {
                return Ok(request);
            }
            *words = rest;
        }
    }

    /// The index of the interface in `netns`; 0 where none is named.
    pub fn ifindex(&self, netns: &Netns) -> Result<u32> {
        let Some(dev) = &self.dev else { return Ok(0) };
        netns
            .run(|| nix::net::if_::if_nametoindex(dev.as_str()))?
            .map_err(std::io::Error::from)
            .with_context(|| format!("dev {dev}"))
    }

    fn refuse_id_0(&self) -> Result<()> {
        ensure!(self.id != Some(AddrId(0)), "id: must be from 1 to 255");
        Ok(())
    }
}

/// What is shown of an endpoint, in iproute2's order.
fn fields(endpoint: &Endpoint, interfaces: &Interfaces) -> Vec<(&'static str, Value)> {
    let mut fields = vec![("address", json!(endpoint.ip))];
    if endpoint.port != 0 {
        fields.push(("port", json!(endpoint.port)));
    }
    if let Some(id) = endpoint.id {
        fields.push(("id", json!(id)));
    }
    let known = FLAGS.iter().filter(|(_, flag)| endpoint.flags.contains(*flag));
    fields.extend(known.map(|(name, _)| (*name, json!(true))));
    let unknown = endpoint.flags.difference(EndpointFlags::all()).bits();
    if unknown != 0 {
        fields.push(("rawflags", json!(format!("{unknown:02x}"))));
    }
    if let Some(name) = interfaces.name(endpoint.ifindex) {
        fields.push(("dev", json!(name)));
    }
    fields
}

/// As iproute2 prints it, the blank at the end included.
fn text(fields: &[(&str, Value)]) -> String {
    let words = fields.iter().map(|(name, value)| match value {
        Value::Bool(_) => format!("{name} "),
        Value::String(text) if *name == "address" => format!("{text} "),
        Value::String(text) => format!("{name} {text} "),
        value => format!("{name} {value} "),
    });
    words.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Request> {
        let words: Vec<String> = words.split_whitespace().map(String::from).collect();
        Request::parse(&words)
    }

    #[test]
    fn words_come_in_any_order_and_abbreviated() {
        let one = parse("10.0.0.1 dev eth0 id 0x10 port 010 signal backup").unwrap();
        let other = parse("backup p 8 signal i 16 d eth0 10.0.0.1 nofullmesh").unwrap();
        assert_eq!(one, other);
        assert_eq!(one.flags, EndpointFlags::SIGNAL | EndpointFlags::BACKUP);
        assert_eq!((one.id, one.port), (Some(AddrId(16)), 8));
    }

    #[test]
    fn bad_words_are_named() {
        for (words, named) in [
            ("10.0.0.1 sig", "'sig'"),
            ("10.0.0", "'10.0.0'"),
            ("id", "id: a value"),
            ("id 256", "256"),
            ("port -1", "-1"),
            ("dev", "dev: a value"),
        ] {
            let error = parse(words).unwrap_err().to_string();
            assert!(error.contains(named), "{words}: {error}");
        }
    }

    #[test]
    fn flags_of_later_kernels_are_shown_raw() {
        let flags = EndpointFlags::SIGNAL | EndpointFlags::from_bits_retain(0x80);
        let endpoint = Endpoint { id: Some(AddrId(3)), ..Endpoint::new("::1".parse().unwrap(), flags) };
        assert_eq!(text(&fields(&endpoint, &Interfaces::default())), "::1 id 3 signal rawflags 80 ");
    }
}
