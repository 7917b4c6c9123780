//! Sizes, times and shares as scenario files write them: `"8MiB"`, `"90s"`, `"10%"`.

use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

/// Bytes: `B`, `kB`, `MB`, `GB` (powers of 1000), `KiB`, `MiB`, `GiB` (powers of 1024).
pub(super) fn bytes<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    let units = [
        ("b", 1.0),
        ("kb", 1e3),
        ("mb", 1e6),
        ("gb", 1e9),
        ("kib", 1024.0),
        ("mib", 1024.0 * 1024.0),
        ("gib", 1024.0 * 1024.0 * 1024.0),
    ];
    Ok(quantity(from, &units, "size", "8MiB")?.round() as u64)
}

pub(super) fn some_bytes<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    bytes(from).map(Some)
}

/// Time: `ms`, `s`, `min`.
pub(super) fn time<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let seconds = quantity(from, &[("ms", 1e-3), ("s", 1.0), ("min", 60.0)], "time", "90s")?;
    Duration::try_from_secs_f64(seconds).map_err(|_| D::Error::custom("a time beyond all measure"))
}

pub(super) fn some_time<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    time(from).map(Some)
}

/// A share of a whole, as a fraction: `"10%"` is 0.1.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Share(pub f64);

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        match quantity(from, &[("%", 0.01)], "share", "10%")? {
            share if share <= 1.0 => Ok(Share(share)),
            _ => Err(D::Error::custom("more than 100%")),
        }
    }
}

/// See [`crate::link::quantity`].
fn quantity<'de, D: Deserializer<'de>>(
    from: D,
    units: &[(&str, f64)],
    kind: &str,
    example: &str,
) -> Result<f64, D::Error> {
    let text = String::deserialize(from)?;
    crate::link::quantity(&text, units)
        .ok_or_else(|| D::Error::custom(format!("\"{text}\" is no {kind}: write it like \"{example}\"")))
}
