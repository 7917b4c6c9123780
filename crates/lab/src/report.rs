//! What a run leaves for people to look at: throughput per path over time as SVG, events as JSON.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use plotters::backend::SVGBackend;
use plotters::coord::Shift;
use plotters::drawing::DrawingAreaErrorKind;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde_json::{Value, json};

use crate::record::Record;
use crate::{Error, Result, Scenario};

/// Writes the pictures of network and throughput and the events of a run into `directory`, which it makes if need be:
/// `NAME.network.svg`, `NAME.svg` and `NAME.events.json`. A variant's colon becomes a hyphen. Returns the path of
/// the picture of throughput.
pub fn write(directory: &Path, scenario: &Scenario, record: &Record) -> Result<PathBuf> {
    let name = scenario.name.replace([':', '/'], "-");
    let picture = directory.join(format!("{name}.svg"));
    fs::create_dir_all(directory).map_err(|e| Error::io(format!("make {}", directory.display()), e))?;
    for (path, content) in [
        (directory.join(format!("{name}.network.svg")), crate::graph::svg(scenario)),
        (directory.join(format!("{name}.events.json")), format!("{:#}\n", events(scenario, record))),
        (picture.clone(), throughput_svg(scenario, record)),
    ] {
        fs::write(&path, content).map_err(|e| Error::io(format!("write {}", path.display()), e))?;
    }
    Ok(picture)
}

/// The events and steps of a run, each with milliseconds since its beginning.
pub fn events(scenario: &Scenario, record: &Record) -> Value {
    let ms = |at: Duration| (at.as_secs_f64() * 1e6).round() / 1e3;
    let events = record.events.iter().map(|seen| {
        let mut event = json!({ "at_ms": ms(seen.at), "node": seen.node });
        if let (Value::Object(event), Value::Object(fields)) = (&mut event, json!(seen.event)) {
            event.extend(fields.into_iter().filter(|(_, value)| !value.is_null()));
        }
        event
    });
    let steps = record
        .steps
        .iter()
        .map(|step| json!({ "name": step.name, "began_ms": ms(step.began), "ended_ms": step.ended.map(ms) }));
    json!({
        "scenario": scenario.name,
        "overrun": record.overrun,
        "events": events.collect::<Vec<_>>(),
        "steps": steps.collect::<Vec<_>>(),
    })
}

/// Throughput of each link over time, both directions together, with the beginnings of the steps.
pub fn throughput_svg(scenario: &Scenario, record: &Record) -> String {
    let mut svg = String::new();
    let title = format!("{}: {}", scenario.name, scenario.title);
    let chart = Chart::new(&title, scenario, record);
    let root = SVGBackend::with_string(&mut svg, (WIDTH, chart.height())).into_drawing_area();
    let drawn = chart.draw(&root).and_then(|()| root.present());
    drop(root);
    match drawn {
        Ok(()) => svg,
        // The backend writes to a file or to a string; only the former fails.
        Err(error) => unreachable!("an SVG in memory: {error}"),
    }
}

const WIDTH: u32 = 1000;
const PLOT_HEIGHT: u32 = 380;
const HEADER: u32 = 64;
/// One row of labels of marks.
const ROW: u32 = 17;
const FONT: &str = "Helvetica, Arial, DejaVu Sans, sans-serif";
const INK: RGBColor = RGBColor(0x22, 0x2b, 0x36);
const FAINT: RGBColor = RGBColor(0x6b, 0x75, 0x80);
const GRID: RGBColor = RGBColor(0xe6, 0xe9, 0xed);
/// Told apart by colour-blind people too (Okabe and Ito).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x56, 0xb4, 0xe9),
];

type Drawn<'a> = std::result::Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

struct Chart<'s> {
    title: &'s str,
    /// In the order in which the paths appear.
    series: Vec<Series<'s>>,
    marks: Vec<Placed<'s>>,
    seconds: f64,
    most: f64,
}

struct Series<'s> {
    path: &'s str,
    colour: RGBColor,
    /// Seconds, Mbit/s.
    points: Vec<(f64, f64)>,
}

/// A mark, with the row of its label, 0 the lowest.
struct Placed<'s> {
    at: f64,
    label: &'s str,
    row: u32,
    /// The label stands to the left of its line.
    left: bool,
}

impl<'s> Chart<'s> {
    fn new(title: &'s str, scenario: &Scenario, record: &'s Record) -> Self {
        let marks: Vec<_> = record.steps.iter().map(|step| (step.began, step.name.as_str())).collect();
        let times = record.samples.iter().map(|sample| sample.at).chain(marks.iter().map(|(at, _)| *at));
        let seconds = times.max().unwrap_or_default().as_secs_f64().max(0.1);
        let window = Duration::from_secs_f64(seconds / 100.0).max(Duration::from_millis(200));
        let drawn =
            |(_, path): &(usize, &String)| scenario.picture.is_empty() || scenario.picture.contains(path);
        let links = record.links.iter().enumerate().filter(drawn);
        let series = links.zip(COLOURS.into_iter().cycle()).map(|((n, path), colour)| {
            let carried = record.samples.iter().map(|sample| (sample.at, sample.bytes[n].iter().sum()));
            Series { path, colour, points: throughput(&carried.collect::<Vec<_>>(), window) }
        });
        let series: Vec<_> = series.collect();
        let most = series.iter().flat_map(|s| &s.points).map(|(_, mbit)| *mbit).fold(0.0, f64::max);
        Chart { title, series, marks: place(&marks, seconds), seconds, most: (most * 1.08).max(0.1) }
    }

    fn rows(&self) -> u32 {
        self.marks.iter().map(|mark| mark.row + 1).max().unwrap_or(0)
    }

    fn height(&self) -> u32 {
        HEADER + self.rows() * ROW + PLOT_HEIGHT
    }

    fn draw<'a>(&self, root: &DrawingArea<SVGBackend<'a>, Shift>) -> Drawn<'a> {
        root.fill(&WHITE)?;
        root.draw(&Text::new(
            self.title,
            (24, 20),
            (FONT, 19).into_font().style(FontStyle::Bold).color(&INK),
        ))?;
        self.draw_legend(root)?;

        let top = HEADER + self.rows() * ROW;
        let mut chart = ChartBuilder::on(root)
            .margin_top(top)
            .margin_right(RIGHT)
            .margin_left(14)
            .margin_bottom(10)
            .x_label_area_size(44)
            .y_label_area_size(LEFT - 14)
            .build_cartesian_2d(0.0..self.seconds, 0.0..self.most)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(FAINT)
            .label_style(text(13, FAINT))
            .axis_desc_style(text(13, FAINT))
            .x_desc("seconds")
            .y_desc("Mbit/s")
            .x_labels(11)
            .y_labels(6)
            .x_label_formatter(&|x| short(*x))
            .y_label_formatter(&|y| short(*y))
            .draw()?;

        for mark in &self.marks {
            let dash = (0..).map(|n| f64::from(n) * self.most / 60.0).take_while(|y| *y < self.most);
            chart.draw_series(dash.map(|y| {
                let end = (y + self.most / 110.0).min(self.most);
                PathElement::new([(mark.at, y), (mark.at, end)], FAINT)
            }))?;
            let (x, y) = chart.backend_coord(&(mark.at, self.most));
            let label = y - 6 - (mark.row * ROW) as i32;
            root.draw(&PathElement::new([(x, y), (x, label - 8)], FAINT))?;
            let (shift, side) = if mark.left { (-5, HPos::Right) } else { (5, HPos::Left) };
            let style = text(13, INK).pos(Pos::new(side, VPos::Center));
            root.draw(&Text::new(mark.label, (x + shift, label - 4), style))?;
        }
        for Series { colour, points, .. } in &self.series {
            let area = [(0.0, 0.0)].into_iter().chain(points.iter().copied());
            let end = points.last().map(|(x, _)| (*x, 0.0));
            chart.draw_series([Polygon::new(area.chain(end).collect::<Vec<_>>(), colour.mix(0.10))])?;
            chart.draw_series([PathElement::new(points.clone(), colour.stroke_width(2))])?;
        }
        Ok(())
    }

    /// One line below the title.
    fn draw_legend<'a>(&self, root: &DrawingArea<SVGBackend<'a>, Shift>) -> Drawn<'a> {
        let mut x = 24;
        for Series { path, colour, .. } in &self.series {
            root.draw(&PathElement::new([(x, 52), (x + 22, 52)], colour.stroke_width(3)))?;
            let style = text(14, INK).pos(Pos::new(HPos::Left, VPos::Center));
            root.draw(&Text::new(*path, (x + 29, 52), style))?;
            x += 29 + width_of(path, 14) + 26;
        }
        Ok(())
    }
}

/// From the left edge of the picture to the plot, and from the plot to the right edge.
const LEFT: u32 = 74;
const RIGHT: u32 = 24;

fn text(size: u32, colour: RGBColor) -> TextStyle<'static> {
    (FONT, size).into_font().color(&colour)
}

/// No font is at hand, so this is a guess, on the wide side.
fn width_of(text: &str, size: u32) -> i32 {
    (text.chars().count() as f64 * f64::from(size) * 0.58) as i32
}

/// At most two decimals.
fn short(value: f64) -> String {
    let value = (value * 100.0).round() / 100.0;
    format!("{value}")
}

/// (seconds, Mbit/s): at each sample the mean over the `window` before it. Samples are (time, bytes so far).
fn throughput(samples: &[(Duration, u64)], window: Duration) -> Vec<(f64, f64)> {
    let mut from = 0;
    let mut points = Vec::new();
    for (n, (at, bytes)) in samples.iter().enumerate() {
        while from + 1 < n && at.saturating_sub(samples[from + 1].0) >= window {
            from += 1;
        }
        let time = at.saturating_sub(samples[from].0).as_secs_f64();
        let bits = bytes.saturating_sub(samples[from].1) as f64 * 8.0;
        points.push((at.as_secs_f64(), if time > 0.0 { bits / 1e6 / time } else { 0.0 }));
    }
    points
}

/// Gives each label the lowest row in which it touches no other label and no other mark's line crosses it.
fn place<'m>(marks: &[(Duration, &'m str)], seconds: f64) -> Vec<Placed<'m>> {
    let plot = f64::from(WIDTH - LEFT - RIGHT);
    let pixel = |at: f64| (at / seconds * plot) as i32;
    // Where the labels of each row are: from, to.
    let mut taken: BTreeMap<u32, Vec<(i32, i32)>> = BTreeMap::new();
    let mut placed = Vec::new();
    // From the right, so that lines of later marks, which end at lower rows, don't cross labels of earlier ones.
    for (at, label) in marks.iter().rev() {
        let at = at.as_secs_f64();
        let (x, width) = (pixel(at), width_of(label, 13) + 10);
        let left = x + width > plot as i32 + RIGHT as i32;
        let span = if left { (x - width, x) } else { (x, x + width) };
        let free = |row: &u32| {
            taken.get(row).is_none_or(|spans| spans.iter().all(|(from, to)| span.1 < *from || *to < span.0))
        };
        let row = (0..).find(free).unwrap_or_default();
        taken.entry(row).or_default().push(span);
        placed.push(Placed { at, label, row, left });
    }
    placed.reverse();
    placed
}

#[cfg(test)]
mod tests {
    use mptcp::Token;
    use mptcp::pm::{Event, EventKind};

    use super::*;
    use crate::record::{Sample, Seen, StepTimes};

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn scenario() -> Scenario {
        Scenario::parse("hand:over", "net.toml", "title = 'Hand<over'\nnodes = { a = {} }", None).unwrap()
    }

    fn record() -> Record {
        let sample = |at, wifi, lte| Sample { at: ms(at), bytes: vec![[wifi, 0], [0, lte]] };
        let step = |name: &str, began, ended| StepTimes {
            name: name.into(),
            began: ms(began),
            ended,
            events: (0, None),
            bytes: (Vec::new(), None),
        };
        Record {
            links: vec!["wifi".into(), "l<e".into()],
            samples: vec![sample(0, 0, 0), sample(500, 90_000, 1000)],
            steps: vec![step("wifi & all down", 250, Some(ms(300))), step("never ends", 400, None)],
            ..Record::default()
        }
    }

    #[test]
    fn throughput_is_the_mean_over_the_window() {
        let samples: Vec<_> = (0..=10).map(|n| (ms(n * 100), n.min(5) * 125_000)).collect();
        let points = throughput(&samples, ms(200));
        let mbit: Vec<_> = points.iter().map(|(_, mbit)| mbit.round()).collect();
        // 125 kB in 100 ms are 10 Mbit/s; half of the window after the sixth sample has nothing.
        assert_eq!(mbit, [0., 10., 10., 10., 10., 10., 5., 0., 0., 0., 0.]);
        assert_eq!(points[10].0, 1.0);
    }

    #[test]
    fn labels_that_would_touch_get_rows_of_their_own() {
        let marks = [
            (ms(1000), "one that is long"),
            (ms(1010), "two that is long"),
            (ms(5000), "three"),
            (ms(9990), "four"),
        ];
        let placed = place(&marks, 10.0);
        let rows: Vec<_> = placed.iter().map(|mark| mark.row).collect();
        assert_eq!(rows, [1, 0, 0, 0]);
        let left: Vec<_> = placed.iter().map(|mark| mark.left).collect();
        assert_eq!(left, [false, false, false, true]);
    }

    #[test]
    fn the_picture_names_links_and_steps_and_escapes_them() {
        let svg = throughput_svg(&scenario(), &record());
        for text in ["Hand&lt;over", "wifi &amp; all down", "l&lt;e", "Mbit/s", "seconds"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(svg.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn the_picture_has_only_the_links_that_the_scenario_names() {
        let svg = throughput_svg(&Scenario { picture: vec!["wifi".into()], ..scenario() }, &record());
        assert!(svg.contains(">\nwifi") && !svg.contains("l&lt;e"), "{svg}");
    }

    #[test]
    fn nothing_recorded_is_still_a_picture() {
        assert!(throughput_svg(&scenario(), &Record::default()).contains("hand:over"));
    }

    #[test]
    fn events_have_time_and_node_and_only_the_fields_that_came() {
        let event = Event {
            kind: EventKind::Created,
            token: Some(Token(0xab)),
            local_id: None,
            remote_id: None,
            local_ip: Some("10.0.0.1".parse().unwrap()),
            remote_ip: None,
            local_port: None,
            remote_port: None,
            backup: None,
            error: None,
            flags: None,
            timeout: None,
            ifindex: None,
            reset_reason: None,
            reset_flags: None,
            server_side: Some(false),
        };
        let seen = Seen { at: Duration::from_micros(1500), node: "phone".into(), event };
        assert_eq!(
            events(&scenario(), &Record { events: vec![seen], ..record() }),
            json!({
                "scenario": "hand:over",
                "overrun": false,
                "events": [{
                    "at_ms": 1.5, "node": "phone", "event": "CREATED", "token": "000000ab",
                    "local_ip": "10.0.0.1", "server_side": false,
                }],
                "steps": [
                    { "name": "wifi & all down", "began_ms": 250.0, "ended_ms": 300.0 },
                    { "name": "never ends", "began_ms": 400.0, "ended_ms": null },
                ],
            })
        );
    }

    #[test]
    fn three_files_are_written_and_a_directory_that_cannot_be_is_named() {
        let directory = std::env::temp_dir().join(format!("braid-report-{}", std::process::id()));
        let picture = write(&directory.join("deep"), &scenario(), &record()).unwrap();
        assert_eq!(picture, directory.join("deep/hand-over.svg"));
        for file in ["hand-over.svg", "hand-over.network.svg"] {
            assert!(fs::read_to_string(directory.join("deep").join(file)).unwrap().starts_with("<svg"));
        }
        let json = fs::read(directory.join("deep/hand-over.events.json")).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&json).unwrap(), events(&scenario(), &record()));
        let error = write(&picture, &scenario(), &record()).unwrap_err().to_string();
        assert!(error.contains("hand-over.svg"), "{error}");
        fs::remove_dir_all(directory).unwrap();
    }
}
