//! The text of a scenario file: variants laid over it, and the way from a key to its line and back.

use std::ops::Range;

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::{Error, Result};

/// A parsed file with one variant laid over it.
pub(super) struct Source<'t> {
    file: &'t str,
    text: &'t str,
    table: Spanned<DeTable<'t>>,
    variants: Vec<String>,
}

impl<'t> Source<'t> {
    /// Parses `text` and lays the lines under `[variants.VARIANT]` over the rest.
    pub(super) fn parse(file: &'t str, text: &'t str, variant: Option<&str>) -> Result<Self> {
        let table = DeTable::parse(text).map_err(|error| Error::Scenario {
            file: file.into(),
            line: line(text, error.span().map_or(0, |span| span.start)),
            key: String::new(),
            message: one_line(error.message()),
        })?;
        let mut source = Source { file, text, table, variants: Vec::new() };
        let Some(variants) = source.table.get_mut().remove("variants") else {
            return match variant {
                Some(variant) => Err(Error::unknown("variant", variant, [])),
                None => Ok(source),
            };
        };
        let span = variants.span();
        let DeValue::Table(mut variants) = variants.into_inner() else {
            return Err(source.error(span, "variants".into(), "is no table of variants"));
        };
        source.variants = variants.keys().map(|name| name.get_ref().to_string()).collect();
        if let Some(variant) = variant {
            let over = variants.remove(variant);
            let over = over.ok_or_else(|| {
                Error::unknown("variant", variant, source.variants.iter().map(String::as_str))
            })?;
            let span = over.span();
            let DeValue::Table(over) = over.into_inner() else {
                return Err(source.error(span, format!("variants.{variant}"), "is no table"));
            };
            lay_over(source.table.get_mut(), over);
        }
        Ok(source)
    }

    /// Names of all variants, in the order of the file.
    pub(super) fn variants(&self) -> &[String] {
        &self.variants
    }

    pub(super) fn decode<T: DeserializeOwned>(&self) -> Result<T> {
        T::deserialize(toml::Deserializer::from(self.table.clone())).map_err(|error| {
            let span = error.span().unwrap_or(0..0);
            let key = key_at(self.table.get_ref(), &span).unwrap_or_default();
            self.error(span, key, error.message())
        })
    }

    /// An error about the value at `path`; the line is that of the deepest part of it that exists.
    pub(super) fn error_at(&self, path: &[&str], message: impl Into<String>) -> Error {
        let mut span = self.table.span();
        let mut table = Some(self.table.get_ref());
        let mut array = None;
        for part in path {
            let value: Option<&Spanned<DeValue<'_>>> = match (table, array) {
                (Some(table), _) => table.get(*part),
                (None, Some(values)) => part.parse().ok().and_then(|index: usize| <[_]>::get(values, index)),
                _ => None,
            };
            let Some(value) = value else { break };
            span = value.span();
            table = value.get_ref().as_table();
            array = value.get_ref().as_array().map(|array| &**array);
        }
        self.error(span, path.join("."), &message.into())
    }

    fn error(&self, span: Range<usize>, key: String, message: &str) -> Error {
        Error::Scenario {
            file: self.file.into(),
            line: line(self.text, span.start),
            key,
            message: one_line(message),
        }
    }
}

/// Replaces values of `base` by those of `over`, table by table. An array is replaced as a whole.
fn lay_over<'t>(base: &mut DeTable<'t>, over: DeTable<'t>) {
    for (key, value) in over {
        match (base.get_mut(key.get_ref().as_ref()).map(Spanned::get_mut), value.get_ref()) {
            (Some(DeValue::Table(below)), DeValue::Table(_)) => {
                let DeValue::Table(above) = value.into_inner() else { unreachable!("matched above") };
                lay_over(below, above);
            }
            _ => {
                base.insert(key, value);
            }
        }
    }
}

/// The dotted key of the deepest value or key that `span` lies in.
fn key_at(table: &DeTable<'_>, span: &Range<usize>) -> Option<String> {
    let holds = |outer: Range<usize>| outer.contains(&span.start);
    table.iter().find_map(|(key, value)| {
        let name = key.get_ref();
        match below(value, span) {
            Some(rest) => Some(format!("{name}.{rest}")),
            None => (holds(key.span()) || holds(value.span())).then(|| name.to_string()),
        }
    })
}

fn below(value: &Spanned<DeValue<'_>>, span: &Range<usize>) -> Option<String> {
    match value.get_ref() {
        DeValue::Table(table) => key_at(table, span),
        DeValue::Array(array) => {
            array.iter().enumerate().find_map(|(index, value)| match below(value, span) {
                Some(rest) => Some(format!("{index}.{rest}")),
                None => value.span().contains(&span.start).then(|| index.to_string()),
            })
        }
        _ => None,
    }
}

fn line(text: &str, offset: usize) -> usize {
    text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1
}

fn one_line(message: &str) -> String {
    message.lines().map(str::trim).collect::<Vec<_>>().join("; ")
}
