//! What a link does to the frames that cross it, and how scenario files write it: `rate = "30mbit"`.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Deserializer};

/// Rate, delay, jitter, loss and queue of a link, the same in both directions. Nothing given: as fast as
/// the machine.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Shape {
    /// Bits per second, counted on Ethernet frames (header included, preamble and checksum not).
    /// In files: `"30mbit"`, units `bit`, `kbit`, `mbit`, `gbit` (powers of 1000). More than 0.
    #[serde(deserialize_with = "rate")]
    pub rate: Option<u64>,
    /// One-way delay. In files: `"20ms"`, units `us`, `ms`, `s`. At most a minute.
    #[serde(deserialize_with = "duration")]
    pub delay: Option<Duration>,
    /// Each frame's delay is drawn evenly from `delay` ± `jitter`; frames stay in order. At most `delay`.
    #[serde(deserialize_with = "duration")]
    pub jitter: Option<Duration>,
    /// The share of frames that get lost, 0 to 1, each frame independently. In files: `"1%"`.
    #[serde(deserialize_with = "loss")]
    pub loss: Option<f64>,
    /// How long a frame may wait for the frames before it; one that would wait longer is dropped. Needs `rate`.
    /// In files: `"100ms"`. See [`Shape::queue_or_default`].
    #[serde(deserialize_with = "duration")]
    pub queue: Option<Duration>,
}

impl Shape {
    /// The queue's length as time: `queue`, else the greatest of 50 ms, the link's round trip (so that one bulk TCP
    /// connection can fill the link) and the time that ten full frames take (so that an initial window fits).
    pub fn queue_or_default(&self) -> Duration {
        self.queue.unwrap_or_else(|| {
            let round_trip = 2 * self.delay.unwrap_or_default();
            let ten_frames =
                self.rate.map(|rate| transmission_time(10 * FULL_FRAME, rate)).unwrap_or_default();
            Duration::from_millis(50).max(round_trip).max(ten_frames)
        })
    }

    /// This shape with the fields that `change` gives replaced.
    pub fn changed_by(&self, change: &Shape) -> Shape {
        Shape {
            rate: change.rate.or(self.rate),
            delay: change.delay.or(self.delay),
            jitter: change.jitter.or(self.jitter),
            loss: change.loss.or(self.loss),
            queue: change.queue.or(self.queue),
        }
    }

    /// Refuses what no link can do: `jitter 5ms exceeds delay 2ms`.
    pub fn check(&self) -> Result<(), String> {
        let jitter = self.jitter.unwrap_or_default();
        let delay = self.delay.unwrap_or_default();
        if self.rate == Some(0) {
            return Err("rate 0: to stop all traffic, take the link down or black-hole it".into());
        }
        if jitter > delay {
            return Err(format!("jitter {jitter:?} exceeds delay {delay:?}"));
        }
        if let Some(long) = [delay, self.queue.unwrap_or_default()].into_iter().find(|d| *d > LONGEST) {
            return Err(format!("{long:?} is more than {LONGEST:?}"));
        }
        if self.loss.is_some_and(|loss| !(0.0..=1.0).contains(&loss)) {
            return Err(format!("loss {} is not between 0 and 1", self.loss.unwrap_or_default()));
        }
        if self.queue.is_some() && self.rate.is_none() {
            return Err("a queue without a rate: nothing ever waits there".into());
        }
        Ok(())
    }

    /// Does it need more than a rate?
    pub(super) fn is_more_than_rate(&self) -> bool {
        self.delay.is_some() || self.jitter.is_some() || self.loss.is_some()
    }
}

/// `30 Mbit/s, 20 ms ± 2 ms, 1 % loss`; empty for a plain link.
impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if let Some(rate) = self.rate {
            let (value, unit) = match rate {
                1_000_000_000.. => (rate as f64 / 1e9, "Gbit/s"),
                1_000_000.. => (rate as f64 / 1e6, "Mbit/s"),
                1_000.. => (rate as f64 / 1e3, "kbit/s"),
                _ => (rate as f64, "bit/s"),
            };
            parts.push(format!("{value} {unit}"));
        }
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        match (self.delay, self.jitter) {
            (Some(delay), Some(jitter)) => parts.push(format!("{} ms ± {} ms", ms(delay), ms(jitter))),
            (Some(delay), None) => parts.push(format!("{} ms", ms(delay))),
            _ => {}
        }
        if let Some(loss) = self.loss {
            parts.push(format!("{} % loss", loss * 100.0));
        }
        if let Some(queue) = self.queue {
            parts.push(format!("{} ms queue", ms(queue)));
        }
        f.write_str(&parts.join(", "))
    }
}

/// Reads a rate field, `"30mbit"`, as bits per second; for `#[serde(deserialize_with)]`.
pub fn rate<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(from)?;
    let units = [("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3), ("bit", 1.0)];
    match quantity(&text, &units) {
        Some(bits) if (1.0..=1e12).contains(&bits) => Ok(Some(bits.round() as u64)),
        _ => Err(serde::de::Error::custom(format!(
            "\"{text}\" is no rate: write a number above 0 and bit, kbit, mbit or gbit, like \"30mbit\""
        ))),
    }
}

/// Reads a time field, `"20ms"`; for `#[serde(deserialize_with)]`.
pub fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(from)?;
    let units = [("us", 1e3), ("ms", 1e6), ("s", 1e9)];
    match quantity(&text, &units) {
        Some(ns) if ns <= LONGEST.as_nanos() as f64 => Ok(Some(Duration::from_nanos(ns.round() as u64))),
        _ => Err(serde::de::Error::custom(format!(
            "\"{text}\" is no time: write a number and us, ms or s, at most {LONGEST:?}, like \"20ms\""
        ))),
    }
}

/// Reads a loss field, `"1%"`, as a fraction; for `#[serde(deserialize_with)]`.
pub fn loss<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
    let text = String::deserialize(from)?;
    match quantity(&text, &[("%", 0.01)]) {
        Some(fraction) if fraction <= 1.0 => Ok(Some(fraction)),
        _ => Err(serde::de::Error::custom(format!(
            "\"{text}\" is no loss: write a number from 0 to 100 and %, like \"1%\""
        ))),
    }
}

/// How long `bytes` take at `rate` bits per second.
pub(super) fn transmission_time(bytes: u64, rate: u64) -> Duration {
    Duration::from_nanos((u128::from(bytes) * 8 * 1_000_000_000 / u128::from(rate)) as u64)
}

/// An Ethernet frame at the MTU of 1500 bytes.
pub(super) const FULL_FRAME: u64 = 1514;

const LONGEST: Duration = Duration::from_secs(60);

/// `"1.5mbit"` with `("mbit", 1e6)` is 1.5e6. Digits with at most one point, one of `units`, in any case.
pub(crate) fn quantity(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let text = text.trim().to_ascii_lowercase();
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit() && c != '.')?);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim_start())?;
    number.parse::<f64>().ok().map(|n| n * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(toml: &str) -> Result<Shape, String> {
        toml::from_str::<Shape>(toml).map_err(|e| e.to_string())
    }

    #[test]
    fn a_shape_is_read_as_scenario_files_write_it() {
        let shape =
            parse("rate = '1.5Mbit'\ndelay = '20ms'\njitter = '500us'\nloss = '0.5%'\nqueue = '0.1 s'");
        let expected = Shape {
            rate: Some(1_500_000),
            delay: Some(Duration::from_millis(20)),
            jitter: Some(Duration::from_micros(500)),
            loss: Some(0.005),
            queue: Some(Duration::from_millis(100)),
        };
        assert_eq!(shape.unwrap(), expected);
        assert_eq!(parse("").unwrap(), Shape::default());
    }

    #[test]
    fn what_is_no_quantity_is_refused_with_the_text_and_an_example() {
        for (toml, says) in [
            ("rate = '30'", "\"30\" is no rate"),
            ("rate = '0mbit'", "like \"30mbit\""),
            ("rate = '-3mbit'", "no rate"),
            ("rate = 'mbit'", "no rate"),
            ("rate = '3mbits'", "no rate"),
            ("rate = '9999999gbit'", "no rate"),
            ("rate = 30", "invalid type"),
            ("delay = '20'", "like \"20ms\""),
            ("delay = '61s'", "at most 60s"),
            ("delay = '1.2.3ms'", "no time"),
            ("delay = 'infs'", "no time"),
            ("loss = '101%'", "like \"1%\""),
            ("loss = '0.1'", "no loss"),
            ("speed = '1mbit'", "unknown field `speed`"),
        ] {
            let error = parse(toml).unwrap_err();
            assert!(error.contains(says), "{toml}: {error}");
        }
    }

    #[test]
    fn what_no_link_can_do_is_refused() {
        let ms = |n| Some(Duration::from_millis(n));
        let plain = Shape::default();
        for shape in [
            Shape { rate: Some(0), ..plain },
            Shape { jitter: ms(1), ..plain },
            Shape { delay: ms(1), jitter: ms(2), ..plain },
            Shape { delay: ms(60_001), ..plain },
            Shape { loss: Some(1.1), ..plain },
            Shape { loss: Some(f64::NAN), ..plain },
            Shape { queue: ms(1), ..plain },
        ] {
            assert!(shape.check().is_err(), "{shape:?}");
        }
        Shape { rate: Some(1), delay: ms(2), jitter: ms(2), loss: Some(1.0), queue: ms(0) }.check().unwrap();
    }

    #[test]
    fn a_change_replaces_only_the_fields_it_gives() {
        let shape = Shape { rate: Some(5), delay: Some(Duration::ZERO), ..Shape::default() };
        let change = Shape { rate: Some(7), loss: Some(0.5), ..Shape::default() };
        let expected = Shape { rate: Some(7), loss: Some(0.5), ..shape.clone() };
        assert_eq!(shape.changed_by(&change), expected);
    }

    #[test]
    fn the_queue_holds_a_round_trip_or_ten_frames() {
        let shape =
            |rate, ms| Shape { rate: Some(rate), delay: Some(Duration::from_millis(ms)), ..Shape::default() };
        assert_eq!(shape(30_000_000, 20).queue_or_default(), Duration::from_millis(50));
        assert_eq!(shape(30_000_000, 60).queue_or_default(), Duration::from_millis(120));
        assert_eq!(shape(15_140, 60).queue_or_default(), Duration::from_secs(8));
    }

    #[test]
    fn a_shape_reads_well() {
        let shape = parse("rate = '30mbit'\ndelay = '20ms'\njitter = '2ms'\nloss = '1%'").unwrap();
        assert_eq!(shape.to_string(), "30 Mbit/s, 20 ms ± 2 ms, 1 % loss");
        assert_eq!(Shape::default().to_string(), "");
    }
}
