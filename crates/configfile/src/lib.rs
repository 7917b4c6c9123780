//! Reads the daemons' TOML files: errors name file, line and key. And times, as every file and option writes them.

use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};

/// A setting that makes no sense, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {message}")]
pub struct Error {
    /// `proxy.toml:7`, `proxy.toml: service web`, or `command line`.
    pub place: String,
    /// Key and problem: `service[0].listen: port 0 …`.
    pub message: String,
}

impl Error {
    /// An error at `place`.
    pub fn new(place: impl Into<String>, message: impl Into<String>) -> Self {
        Error { place: place.into(), message: message.into() }
    }
}

/// Reads `text`, the content of `file`, which is for messages only.
pub fn decode<T: DeserializeOwned>(text: &str, file: &Path) -> Result<T, Error> {
    let wrong = |key: Option<String>, error: toml::de::Error| {
        let mut place = file.display().to_string();
        if let Some(span) = error.span() {
            let line = 1 + text[..span.start.min(text.len())].matches('\n').count();
            place = format!("{place}:{line}");
        }
        let message = error.message().replace('\n', ", ");
        match key.filter(|key| key != ".") {
            Some(key) => Error::new(place, format!("{key}: {message}")),
            None => Error::new(place, message),
        }
    };
    let document = toml::Deserializer::parse(text).map_err(|error| wrong(None, error))?;
    serde_path_to_error::deserialize(document).map_err(|error| {
        let key = error.path().to_string();
        wrong(Some(key), error.into_inner())
    })
}

/// A time: `5s`, `500ms`, `1h 30m`; zero is one, too.
pub fn time(text: &str) -> Result<Duration, String> {
    let signed: jiff::SignedDuration =
        text.parse().map_err(|_| format!("{text:?} is not a time (5s, 500ms, 1h 30m)"))?;
    Duration::try_from(signed).map_err(|_| format!("{text:?} is negative"))
}

/// A time above zero.
pub fn time_above_zero(text: &str) -> Result<Duration, String> {
    time(text)
        .and_then(|time| if time.is_zero() { Err(format!("{text:?} is not above zero")) } else { Ok(time) })
}

/// The same as a field, for `#[serde(deserialize_with)]`.
pub mod field {
    use super::*;

    /// [`time`](super::time()), where the key may be missing.
    pub fn time<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
        read(from, super::time).map(Some)
    }

    /// [`time_above_zero`](super::time_above_zero()).
    pub fn time_above_zero<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        read(from, super::time_above_zero)
    }

    fn read<'de, D: Deserializer<'de>>(
        from: D,
        parse: fn(&str) -> Result<Duration, String>,
    ) -> Result<Duration, D::Error> {
        parse(&String::deserialize(from)?).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        #[serde(deserialize_with = "field::time_above_zero")]
        patience: Duration,
        #[serde(default, deserialize_with = "field::time")]
        idle: Option<Duration>,
    }

    fn read(text: &str) -> Result<File, String> {
        decode(text, Path::new("a.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_is_read() {
        let file = read("patience = \"1m30s\"\nidle = \"0s\"").unwrap();
        assert_eq!((file.patience, file.idle), (Duration::from_secs(90), Some(Duration::ZERO)));
        assert_eq!(read("patience = \"500ms\"").unwrap().idle, None);
    }

    #[test]
    fn errors_name_file_line_and_key() {
        for (text, said) in [
            ("\npatience = \"soon\"", "a.toml:2: patience: \"soon\" is not a time (5s, 500ms, 1h 30m)"),
            ("patience = \"0s\"", "a.toml:1: patience: \"0s\" is not above zero"),
            ("patience = \"1s\"\nidle = \"-1s\"", "a.toml:2: idle: \"-1s\" is negative"),
            (
                "patience = \"1s\"\nidel = 1",
                "a.toml:2: idel: unknown field `idel`, expected `patience` or `idle`",
            ),
            ("idle = \"1s\"", "a.toml:1: missing field `patience`"),
            ("patience = ", "a.toml:1: string values must be quoted, expected literal string"),
        ] {
            assert_eq!(read(text).unwrap_err(), said);
        }
    }
}
