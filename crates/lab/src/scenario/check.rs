//! What a decoded scenario may still get wrong: names that lead nowhere, names used twice, commands without a program.

use std::collections::HashSet;
use std::net::IpAddr;

use super::{DeviceKind, Expectation, Scenario, Step};
use crate::Result;
use crate::link::check_name;

/// Checks `scenario`; `refuse` makes the error for the value at a path of keys.
pub(super) fn check(scenario: &Scenario, refuse: impl Fn(&[&str], String) -> Result<()>) -> Result<()> {
    Check { scenario, refuse }.all()
}

struct Check<'s, R> {
    scenario: &'s Scenario,
    refuse: R,
}

impl<R: Fn(&[&str], String) -> Result<()>> Check<'_, R> {
    fn all(&self) -> Result<()> {
        let scenario = self.scenario;
        if scenario.nodes.is_empty() {
            return self.refuse(&["nodes"], "there is no node");
        }
        for name in scenario.nodes.keys() {
            // Part of a namespace's name, which is a file's name.
            if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_') {
                self.refuse(&["nodes", name], "a node's name is letters, digits, - and _")?;
            }
        }
        for link in &scenario.picture {
            self.link(&["picture"], link)?;
        }
        self.links()?;
        self.nodes()?;
        self.files()?;
        self.processes()?;
        self.steps()?;
        self.expectations()
    }

    fn links(&self) -> Result<()> {
        let mut taken = HashSet::new();
        for (name, link) in &self.scenario.links {
            for (key, end) in [("a", &link.a), ("b", &link.b)] {
                self.node(&["links", name, key, "node"], &end.node)?;
                let dev = &end.dev;
                self.new_interface(&["links", name, key, "dev"], &mut taken, &end.node, dev)?;
            }
            if let Err(reason) = link.shape.check() {
                self.refuse(&["links", name, "shape"], reason)?;
            }
        }
        for (node, spec) in &self.scenario.nodes {
            let mut in_bridges = HashSet::new();
            for (name, device) in &spec.devices {
                let path = ["nodes", node, "devices", name];
                self.new_interface(&path, &mut taken, node, name)?;
                if device.kind != DeviceKind::Bridge && !device.ports.is_empty() {
                    self.refuse(&path, format!("a {} has no ports", device.kind))?;
                }
                for port in &device.ports {
                    let path = ["nodes", node, "devices", name, "ports"];
                    if !taken.contains(&(node, port)) {
                        self.refuse(&path, format!("{node} has no interface {port} before {name}"))?;
                    }
                    if port == name || !in_bridges.insert(port) {
                        self.refuse(&path, format!("{port} cannot be in two bridges, or in itself"))?;
                    }
                }
            }
        }
        Ok(())
    }

    fn new_interface<'n>(
        &self,
        path: &[&str],
        taken: &mut HashSet<(&'n String, &'n String)>,
        node: &'n String,
        dev: &'n String,
    ) -> Result<()> {
        if let Err(reason) = check_name(dev) {
            self.refuse(path, reason)?;
        }
        if dev == "lo" || !taken.insert((node, dev)) {
            self.refuse(path, format!("{node} has an interface {dev} already"))?;
        }
        Ok(())
    }

    fn nodes(&self) -> Result<()> {
        for (name, node) in &self.scenario.nodes {
            if let Some(limits) = node.limits {
                for (key, value) in
                    [("subflows", limits.subflows), ("add_addr_accepted", limits.add_addr_accepted)]
                {
                    if value > 8 {
                        self.refuse(&["nodes", name, "limits", key], format!("{value} is more than 8"))?;
                    }
                }
            }
            let mut seen = HashSet::new();
            for (index, endpoint) in node.endpoints.iter().enumerate() {
                let path = ["nodes", name, "endpoints", &index.to_string()];
                self.dev(&path, name, endpoint.dev.as_deref())?;
                if !self
                    .scenario
                    .interfaces(name)
                    .any(|(_, addresses)| addresses.iter().any(|net| net.addr() == endpoint.ip))
                {
                    self.refuse(&path, format!("{} is no address of {name}", endpoint.ip))?;
                }
                if !seen.insert((endpoint.ip, endpoint.port)) {
                    self.refuse(&path, format!("{} is an endpoint already", endpoint.ip))?;
                }
            }
            for (index, route) in node.routes.iter().enumerate() {
                let path = ["nodes", name, "routes", &index.to_string()];
                self.dev(&path, name, route.dev.as_deref())?;
                for hop in &route.nexthops {
                    self.dev(&path, name, hop.dev.as_deref())?;
                    self.family(&path, route.to.addr(), Some(hop.via))?;
                    if hop.weight.is_some_and(|weight| weight.get() > 256) {
                        self.refuse(&path, "a weight is 1 to 256")?;
                    }
                }
                self.family(&path, route.to.addr(), route.via)?;
                self.family(&path, route.to.addr(), route.src)?;
                let direct = route.via.is_some() || route.dev.is_some();
                if direct != route.nexthops.is_empty() {
                    self.refuse(&path, "needs either via or dev, or else nexthops")?;
                }
            }
            for directory in &node.private {
                if !directory.is_absolute() || directory.parent().is_none() {
                    let reason = format!("{} is no absolute path below /", directory.display());
                    self.refuse(&["nodes", name, "private"], reason)?;
                }
            }
        }
        Ok(())
    }

    fn files(&self) -> Result<()> {
        for (name, file) in &self.scenario.files {
            self.file_name(&["files", name], name)?;
            if file.size.is_some() == file.text.is_some() {
                self.refuse(&["files", name], "needs either size or text")?;
            }
        }
        Ok(())
    }

    fn processes(&self) -> Result<()> {
        for (name, process) in &self.scenario.processes {
            self.node(&["processes", name, "node"], &process.node)?;
            self.command(&["processes", name, "command"], &process.command)?;
        }
        Ok(())
    }

    fn steps(&self) -> Result<()> {
        let scenario = self.scenario;
        let mut background = HashSet::new();
        for (name, step) in &scenario.steps {
            match step {
                Step::Run(run) => {
                    self.node(&["steps", name, "run", "node"], &run.node)?;
                    self.command(&["steps", name, "run", "command"], &run.command)?;
                    if let Some(file) = &run.save {
                        self.file_name(&["steps", name, "run", "save"], file)?;
                    }
                    if run.background {
                        background.insert(name.as_str());
                    }
                }
                Step::Link(change) => {
                    let path = ["steps", name, "link"];
                    self.link(&["steps", name, "link", "link"], &change.link)?;
                    if change.state.is_none() && change.shape.is_none() {
                        self.refuse(&path, "changes nothing: give state or shape")?;
                    }
                }
                Step::Wait(wait) => {
                    let path = ["steps", name, "wait"];
                    if let Some(step) = &wait.step
                        && !background.contains(step.as_str())
                    {
                        let reason = format!("{step} is no earlier step that runs in the background");
                        self.refuse(&["steps", name, "wait", "step"], reason)?;
                    }
                    if let Some(node) = &wait.node {
                        self.node(&["steps", name, "wait", "node"], node)?;
                    }
                    if wait.node.is_some() == (wait.events.is_empty() && wait.command.is_empty()) {
                        self.refuse(&path, "node and events or command belong together")?;
                    }
                    if !wait.events.is_empty() && !wait.command.is_empty() {
                        self.refuse(&path, "waits for two things: events and a command")?;
                    }
                    if wait.bytes.is_some() && !wait.step.as_deref().is_some_and(|step| self.saves(step)) {
                        self.refuse(&path, "bytes needs a step whose program's output is saved")?;
                    }
                    if wait.step.is_some() && wait.node.is_some() {
                        self.refuse(&path, "waits for two things: a step and a node")?;
                    }
                    if wait.step.is_none() && wait.node.is_none() && wait.time.is_none() {
                        self.refuse(&path, "waits for nothing: give step, node or time")?;
                    }
                }
                Step::Start(start) => self.process(&["steps", name, "start", "process"], &start.process)?,
                Step::Stop(stop) => self.process(&["steps", name, "stop", "process"], &stop.process)?,
            }
        }
        Ok(())
    }

    fn expectations(&self) -> Result<()> {
        for (name, expectation) in &self.scenario.expect {
            match expectation {
                Expectation::Events(events) => {
                    self.node(&["expect", name, "events", "node"], &events.node)?;
                    self.step(&["expect", name, "events", "during"], events.during.as_deref())?;
                    if events.count.is_empty() && events.at_least.is_empty() {
                        self.refuse(&["expect", name, "events"], "expects nothing: give count or at_least")?;
                    }
                }
                Expectation::Subflows(subflows) => {
                    self.node(&["expect", name, "subflows", "node"], &subflows.node)?;
                    self.step(&["expect", name, "subflows", "during"], subflows.during.as_deref())?;
                    if subflows.pairs.is_empty() {
                        self.refuse(
                            &["expect", name, "subflows", "pairs"],
                            "a connection has at least one subflow",
                        )?;
                    }
                }
                Expectation::Flows(flows) => {
                    self.node(&["expect", name, "flows", "node"], &flows.node)?;
                    self.step(&["expect", name, "flows", "during"], flows.during.as_deref())?;
                    if flows.to.is_empty() && (flows.every || flows.same || flows.from.is_empty()) {
                        self.refuse(&["expect", name, "flows"], "expects nothing: give to or from")?;
                    }
                }
                Expectation::Command(asked) => {
                    self.node(&["expect", name, "command", "node"], &asked.node)?;
                    self.command(&["expect", name, "command", "command"], &asked.command)?;
                }
                Expectation::Share(share) => {
                    self.step(&["expect", name, "share", "during"], Some(&share.during))?;
                    for link in share.at_least.keys() {
                        self.link(&["expect", name, "share", "at_least", link], link)?;
                    }
                    if share.at_least.len() < 2 {
                        self.refuse(
                            &["expect", name, "share", "at_least"],
                            "sharing takes two links at least",
                        )?;
                    }
                }
                Expectation::Same(same) => {
                    let path = ["expect", name, "same", "files"];
                    if same.files.len() < 2 {
                        self.refuse(&path, "needs two files at least")?;
                    }
                    same.files.iter().try_for_each(|file| self.file_name(&path, file))?;
                }
                Expectation::Carried(carried) => {
                    self.file_name(&["expect", name, "carried", "capture"], &carried.capture)?;
                    self.step(&["expect", name, "carried", "during"], Some(&carried.during))?;
                    if carried.only.is_empty() {
                        let path = ["expect", name, "carried", "only"];
                        self.refuse(&path, "data are carried by one subflow at least")?;
                    }
                }
                Expectation::Handover(handover) => {
                    self.file_name(&["expect", name, "handover", "capture"], &handover.capture)?;
                    self.step(&["expect", name, "handover", "during"], Some(&handover.during))?;
                }
                Expectation::Stall(stall) => {
                    self.step(&["expect", name, "stall", "during"], stall.during.as_deref())?;
                    let path = ["expect", name, "stall", "step"];
                    self.step(&path, Some(&stall.step))?;
                    if !self.saves(&stall.step) {
                        self.refuse(&path, format!("{} has no save, so nothing is measured", stall.step))?;
                    }
                    if let Some(other) = &stall.at_most_of {
                        let path = ["expect", name, "stall", "at_most_of"];
                        self.step(&path, Some(&other.step))?;
                        if !self.saves(&other.step) {
                            let reason = format!("{} has no save, so nothing is measured", other.step);
                            self.refuse(&path, reason)?;
                        }
                    }
                }
                Expectation::Resumed(resumed) => {
                    self.link(&["expect", name, "resumed", "link"], &resumed.link)?;
                    self.step(&["expect", name, "resumed", "after"], Some(&resumed.after))?;
                }
            }
        }
        Ok(())
    }

    fn saves(&self, step: &str) -> bool {
        matches!(self.scenario.steps.get(step), Some(Step::Run(run)) if run.save.is_some())
    }

    fn node(&self, path: &[&str], name: &str) -> Result<()> {
        self.known(path, "node", name, self.scenario.nodes.keys())
    }

    fn link(&self, path: &[&str], name: &str) -> Result<()> {
        self.known(path, "link", name, self.scenario.links.keys())
    }

    fn process(&self, path: &[&str], name: &str) -> Result<()> {
        self.known(path, "process", name, self.scenario.processes.keys())
    }

    fn step(&self, path: &[&str], name: Option<&str>) -> Result<()> {
        name.map_or(Ok(()), |name| self.known(path, "step", name, self.scenario.steps.keys()))
    }

    fn dev(&self, path: &[&str], node: &str, dev: Option<&str>) -> Result<()> {
        let devs: Vec<_> = self.scenario.interfaces(node).map(|(dev, _)| dev).collect();
        dev.map_or(Ok(()), |dev| self.known(path, &format!("interface of {node}"), dev, devs.iter().copied()))
    }

    fn known<'n>(
        &self,
        path: &[&str],
        kind: &str,
        name: &str,
        mut names: impl Iterator<Item = &'n String> + Clone,
    ) -> Result<()> {
        if names.clone().any(|known| known == name) {
            return Ok(());
        }
        let first = names.next().cloned().unwrap_or_default();
        let all = names.fold(first, |all, name| format!("{all}, {name}"));
        self.refuse(path, format!("no {kind} named {name} (there is: {all})"))
    }

    fn family(&self, path: &[&str], to: IpAddr, other: Option<IpAddr>) -> Result<()> {
        match other {
            Some(other) if other.is_ipv4() != to.is_ipv4() => {
                self.refuse(path, format!("{other} and {to} are not of one address family"))
            }
            _ => Ok(()),
        }
    }

    fn command(&self, path: &[&str], command: &[String]) -> Result<()> {
        match command.first() {
            Some(program) if !program.is_empty() => Ok(()),
            _ => self.refuse(path, "names no program"),
        }
    }

    fn file_name(&self, path: &[&str], name: &str) -> Result<()> {
        if name.is_empty() || name.starts_with('.') || name.contains('/') {
            return self.refuse(path, format!("\"{name}\" is no plain file name"));
        }
        Ok(())
    }

    fn refuse(&self, path: &[&str], message: impl Into<String>) -> Result<()> {
        (self.refuse)(path, message.into())
    }
}
