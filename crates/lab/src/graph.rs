//! The picture of a scenario's network: nodes with their interfaces and addresses, links with their shapes.
//!
//! Nodes stand in columns by their distance from the first one, so that a link joins neighbouring columns or two
//! nodes of one column, and no line has to pass behind a node.

use std::collections::VecDeque;
use std::fmt::Write as _;

use crate::scenario::{Device, EndSpec, EndpointSpec, Scenario};

/// An SVG of the network.
pub fn svg(scenario: &Scenario) -> String {
    let columns = columns(scenario);
    let boxes = place(scenario, &columns);
    let width = boxes.iter().map(|b| b.x + b.width).fold(0.0, f64::max) + MARGIN + bulge(scenario, &columns);
    let height = boxes.iter().map(|b| b.y + b.height()).fold(HEADER, f64::max) + MARGIN;
    let width = width.max(2.0 * MARGIN + text_width(&scenario.title, 15.0));

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
         viewBox=\"0 0 {width:.0} {height:.0}\">\n{STYLE}\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    text(&mut svg, MARGIN, 34.0, "name", &scenario.name);
    text(&mut svg, MARGIN, 54.0, "faint", &scenario.title);
    for (name, spec) in &scenario.links {
        let ends = [&spec.a, &spec.b].map(|end| find(&boxes, end));
        draw_link(&mut svg, name, &spec.shape.to_string(), ends);
    }
    for node in &boxes {
        draw_node(&mut svg, node);
    }
    svg + "</svg>\n"
}

const MARGIN: f64 = 28.0;
const HEADER: f64 = 84.0;
/// Between columns, and between nodes of one column.
const GAP_X: f64 = 230.0;
const GAP_Y: f64 = 40.0;
/// Of a node: its name, then one line for each thing that it does with MPTCP.
const NAME_HEIGHT: f64 = 34.0;
const LINE: f64 = 16.0;
/// Of an interface: room for its name, its addresses and the gap to the next.
const PORT_HEIGHT: f64 = 42.0;

const STYLE: &str = "<style>\
     text { font-family: Helvetica, Arial, 'DejaVu Sans', sans-serif; font-size: 13px; fill: #222b36 } \
     .name { font-size: 17px; font-weight: bold } \
     .dev, .link { font-weight: bold } \
     .faint, .shape { fill: #6b7580 } \
     .right, .right-faint { text-anchor: end } .right-faint { fill: #6b7580 } \
     .link, .shape { text-anchor: middle } \
     .wire { fill: none; stroke: #0072b2; stroke-width: 2.5 } \
     .box { fill: #f5f8fb; stroke: #9fb0c0; stroke-width: 1.5 } \
     .port { fill: #0072b2 }\
     </style>\n";

/// A node's place.
struct Box<'s> {
    name: &'s str,
    notes: Vec<String>,
    /// Interfaces on the left edge, and on the right one.
    ports: [Vec<Port<'s>>; 2],
    x: f64,
    y: f64,
    width: f64,
}

struct Port<'s> {
    dev: &'s str,
    /// Addresses, each with the endpoint's flags if it is one.
    lines: Vec<String>,
    /// Below the node's upper edge.
    y: f64,
}

impl Port<'_> {
    fn height(&self) -> f64 {
        PORT_HEIGHT + LINE * self.lines.len() as f64
    }
}

impl Box<'_> {
    fn top(&self) -> f64 {
        NAME_HEIGHT + LINE * self.notes.len() as f64 + 8.0
    }

    fn height(&self) -> f64 {
        let side = |ports: &[Port<'_>]| ports.iter().map(Port::height).sum::<f64>();
        self.top() + side(&self.ports[0]).max(side(&self.ports[1])) + 4.0
    }
}

/// The column of each node: how many links lead there from the first node, or from the first of those that no link
/// joins to it.
fn columns(scenario: &Scenario) -> Vec<usize> {
    let index = |end: &EndSpec| scenario.nodes.get_index_of(&end.node);
    let links: Vec<_> = scenario.links.values().filter_map(|l| Some((index(&l.a)?, index(&l.b)?))).collect();
    let mut columns = vec![None; scenario.nodes.len()];
    for first in 0..columns.len() {
        if columns[first].is_some() {
            continue;
        }
        columns[first] = Some(0);
        let mut queue = VecDeque::from([(first, 0)]);
        while let Some((node, column)) = queue.pop_front() {
            for (a, b) in &links {
                let other = if *a == node { *b } else { *a };
                if (*a == node || *b == node) && columns[other].is_none() {
                    columns[other] = Some(column + 1);
                    queue.push_back((other, column + 1));
                }
            }
        }
    }
    columns.into_iter().map(Option::unwrap_or_default).collect()
}

fn place<'s>(scenario: &'s Scenario, columns: &[usize]) -> Vec<Box<'s>> {
    let mut boxes: Vec<Box<'_>> = scenario
        .nodes
        .iter()
        .enumerate()
        .map(|(n, (name, node))| {
            let mut ports = [Vec::new(), Vec::new()];
            for link in scenario.links.values() {
                for (end, other) in [(&link.a, &link.b), (&link.b, &link.a)] {
                    let other = scenario.nodes.get_index_of(&other.node).map_or(0, |n| columns[n]);
                    if end.node == *name {
                        let side = usize::from(other >= columns[n]);
                        ports[side].push(Port {
                            dev: &end.dev,
                            lines: addresses(end, &node.endpoints),
                            y: 0.0,
                        });
                    }
                }
            }
            let limits = node.limits.map(|l| {
                format!("limits: subflows {}, add_addr_accepted {}", l.subflows, l.add_addr_accepted)
            });
            let notes = limits.into_iter().chain(node.devices.iter().map(device)).collect();
            let mut node = Box { name, notes, ports, x: 0.0, y: 0.0, width: 0.0 };
            for side in 0..2 {
                let mut y = node.top();
                for port in &mut node.ports[side] {
                    port.y = y;
                    y += port.height();
                }
            }
            let widest = |ports: &[Port<'_>]| {
                let lines =
                    ports.iter().flat_map(|port| port.lines.iter().map(String::as_str).chain([port.dev]));
                lines.map(|line| text_width(line, 13.0)).fold(0.0, f64::max)
            };
            let head =
                node.notes.iter().map(|note| text_width(note, 13.0)).fold(text_width(name, 19.0), f64::max);
            node.width = (widest(&node.ports[0]) + widest(&node.ports[1]) + 64.0).max(head + 36.0).max(150.0);
            node
        })
        .collect();

    let count = columns.iter().max().map_or(0, |last| last + 1);
    let members = |column: usize| (0..boxes.len()).filter(move |n| columns[*n] == column).collect::<Vec<_>>();
    let members: Vec<Vec<usize>> = (0..count).map(members).collect();
    let tall = |boxes: &[Box<'_>], nodes: &[usize]| {
        nodes.iter().map(|n| boxes[*n].height()).sum::<f64>() + GAP_Y * (nodes.len() as f64 - 1.0)
    };
    let tallest = members.iter().map(|nodes| tall(&boxes, nodes)).fold(0.0, f64::max);
    let mut x = MARGIN;
    for nodes in &members {
        let widest = nodes.iter().map(|n| boxes[*n].width).fold(0.0, f64::max);
        let mut y = HEADER + (tallest - tall(&boxes, nodes)) / 2.0;
        for n in nodes {
            (boxes[*n].x, boxes[*n].y, boxes[*n].width) = (x, y, widest);
            y += boxes[*n].height() + GAP_Y;
        }
        x += widest + GAP_X;
    }
    boxes
}

/// `10.1.0.1/24`, `10.2.0.1/24 · signal`.
fn addresses(end: &EndSpec, endpoints: &[EndpointSpec]) -> Vec<String> {
    let line = |address: &ipnet::IpNet| {
        let endpoint = endpoints.iter().find(|endpoint| endpoint.ip == address.addr());
        let flags = endpoint.iter().flat_map(|e| &e.flags).map(|flag| format!(" · {flag:?}").to_lowercase());
        format!("{address}{}", flags.collect::<String>())
    };
    end.addresses.iter().map(line).collect()
}

/// `tap0: tap`, `br0: bridge eth1 tap0, 10.1.0.1/24`.
fn device((name, device): (&String, &Device)) -> String {
    let ports: String = device.ports.iter().map(|port| format!(" {port}")).collect();
    let addresses: String = device.addresses.iter().map(|address| format!(", {address}")).collect();
    format!("{name}: {}{ports}{addresses}", device.kind)
}

/// A link between two nodes of the last column needs room to the right of it.
fn bulge(scenario: &Scenario, columns: &[usize]) -> f64 {
    let last = columns.iter().max();
    let column = |end: &EndSpec| scenario.nodes.get_index_of(&end.node).and_then(|n| columns.get(n));
    let beside = |link: &crate::scenario::LinkSpec| column(&link.a) == last && column(&link.b) == last;
    if scenario.links.values().any(beside) { GAP_X * 0.8 } else { 0.0 }
}

/// Where an end's wire begins, and does it leave to the right?
fn find(boxes: &[Box<'_>], end: &EndSpec) -> (f64, f64, bool) {
    let of_node = boxes.iter().filter(|node| node.name == end.node);
    let ports = of_node.flat_map(|node| {
        [false, true].into_iter().flat_map(move |right| {
            let x = if right { node.x + node.width } else { node.x };
            node.ports[usize::from(right)]
                .iter()
                .map(move |port| (port.dev, (x, node.y + port.y + 12.0, right)))
        })
    });
    ports.filter(|(dev, _)| *dev == end.dev).map(|(_, place)| place).next().unwrap_or_default()
}

fn draw_link(svg: &mut String, name: &str, shape: &str, [a, b]: [(f64, f64, bool); 2]) {
    let pull = |right: bool| if right { GAP_X / 2.0 } else { -GAP_X / 2.0 };
    let ((ax, ay, a_right), (bx, by, b_right)) = (a, b);
    let (ac, bc) = (ax + pull(a_right), bx + pull(b_right));
    let _ = writeln!(svg, "<path class=\"wire\" d=\"M {ax} {ay} C {ac} {ay}, {bc} {by}, {bx} {by}\"/>");
    for (x, y) in [(ax, ay), (bx, by)] {
        let _ = writeln!(svg, "<circle class=\"port\" cx=\"{x}\" cy=\"{y}\" r=\"5\"/>");
    }
    // The middle of the curve.
    let (x, y) = ((ax + 3.0 * ac + 3.0 * bc + bx) / 8.0, (ay + by) / 2.0);
    for (class, dy, words) in [("link", -9.0, name), ("shape", 19.0, shape)] {
        if !words.is_empty() {
            let half = text_width(words, 13.0) / 2.0;
            // A slanted line would run through the words.
            let _ = writeln!(
                svg,
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"17\" fill=\"#ffffff\" fill-opacity=\"0.85\"/>",
                x - half,
                y + dy - 13.0,
                2.0 * half
            );
            text(svg, x, y + dy, class, words);
        }
    }
}

fn draw_node(svg: &mut String, node: &Box<'_>) {
    let Box { x, y, width, .. } = *node;
    let height = node.height();
    let _ = writeln!(
        svg,
        "<rect class=\"box\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" rx=\"8\"/>"
    );
    text(svg, x + 16.0, y + 25.0, "name", node.name);
    for (n, note) in node.notes.iter().enumerate() {
        text(svg, x + 16.0, y + 42.0 + LINE * n as f64, "faint", note);
    }
    for (edge, ports, classes) in [
        (x + 16.0, &node.ports[0], ["dev", "faint"]),
        (x + width - 16.0, &node.ports[1], ["dev right", "right-faint"]),
    ] {
        for port in ports {
            text(svg, edge, y + port.y + 16.0, classes[0], port.dev);
            for (n, line) in port.lines.iter().enumerate() {
                text(svg, edge, y + port.y + 32.0 + LINE * n as f64, classes[1], line);
            }
        }
    }
    for port in &node.ports[0] {
        let _ = writeln!(svg, "<circle class=\"port\" cx=\"{x}\" cy=\"{}\" r=\"5\"/>", y + port.y + 12.0);
    }
    for port in &node.ports[1] {
        let _ = writeln!(
            svg,
            "<circle class=\"port\" cx=\"{}\" cy=\"{}\" r=\"5\"/>",
            x + width,
            y + port.y + 12.0
        );
    }
}

fn text(svg: &mut String, x: f64, y: f64, class: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\">{words}</text>");
}

/// No font is at hand, so this is a guess, on the wide side.
fn text_width(words: &str, size: f64) -> f64 {
    words.chars().count() as f64 * size * 0.6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenario(toml: &str) -> Scenario {
        Scenario::parse("net", "net.toml", toml, None).unwrap()
    }

    const CHAIN: &str = r#"
        title = "a < b"
        nodes = { client = {}, server = { endpoints = [{ ip = "10.0.1.2", flags = ["signal"] }] }, router = {} }
        [links.far]
        a = { node = "server", dev = "eth1", addresses = ["10.0.1.2/24"] }
        b = { node = "router", dev = "eth2", addresses = ["10.0.1.1/24"] }
        shape = { rate = "15mbit", delay = "60ms" }
        [links.near]
        a = { node = "client", dev = "eth0", addresses = ["10.0.0.2/24", "fd00::2/64"] }
        b = { node = "router", dev = "eth1", addresses = ["10.0.0.1/24"] }
    "#;

    #[test]
    fn nodes_stand_in_columns_by_their_distance_from_the_first() {
        assert_eq!(columns(&scenario(CHAIN)), [0, 2, 1]);
        let alone = "title = 't'\nnodes = { a = {}, b = {} }";
        assert_eq!(columns(&scenario(alone)), [0, 0]);
    }

    #[test]
    fn no_two_nodes_overlap_and_all_stand_within_the_picture() {
        for toml in [CHAIN, "title = 't'\nnodes = { a = {}, b = {}, c = {} }"] {
            let scenario = scenario(toml);
            let boxes = place(&scenario, &columns(&scenario));
            for (n, a) in boxes.iter().enumerate() {
                assert!(a.x >= 0.0 && a.y >= HEADER);
                for b in &boxes[n + 1..] {
                    let beside = a.x + a.width < b.x || b.x + b.width < a.x;
                    let above = a.y + a.height() < b.y || b.y + b.height() < a.y;
                    assert!(beside || above, "{} and {}", a.name, b.name);
                }
            }
        }
    }

    #[test]
    fn the_picture_names_everything_and_escapes_it() {
        let svg = svg(&scenario(CHAIN));
        for words in [
            "a &lt; b",
            "client",
            "eth2",
            "10.0.1.2/24 · signal",
            "fd00::2/64",
            "far",
            "15 Mbit/s, 60 ms",
            "near",
        ] {
            assert!(svg.contains(words), "{words}");
        }
        assert_eq!(svg.matches("class=\"wire\"").count(), 2);
        assert!(!svg.contains("NaN"));
    }
}
