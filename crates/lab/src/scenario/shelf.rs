//! Where scenarios are found by name: a directory, or what the program was built with.

use std::path::{Path, PathBuf};

use super::Scenario;
use crate::{Error, Result};

/// The scenarios in one place.
#[derive(Clone, Debug)]
pub enum Shelf {
    /// The `.toml` files of a directory.
    Directory(PathBuf),
    /// Those that were in `scenarios/` when this crate was built.
    BuiltIn,
}

// `BUILT_IN`: name and text of each, made by build.rs.
include!(concat!(env!("OUT_DIR"), "/built_in.rs"));

impl Shelf {
    /// `directory` if given, else `./scenarios` where there is one, else the built-in ones.
    pub fn find(directory: Option<PathBuf>) -> Self {
        let here = Path::new("scenarios");
        match directory {
            Some(directory) => Shelf::Directory(directory),
            None if here.is_dir() => Shelf::Directory(here.into()),
            None => Shelf::BuiltIn,
        }
    }

    /// The names of its scenarios, sorted.
    pub fn names(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = match self {
            Shelf::Directory(directory) => std::fs::read_dir(directory)
                .map_err(|error| Error::io(format!("read directory {}", directory.display()), error))?
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
                .filter_map(|path| Some(path.file_stem()?.to_string_lossy().into_owned()))
                .collect(),
            Shelf::BuiltIn => BUILT_IN.iter().map(|(name, _)| (*name).into()).collect(),
        };
        names.sort();
        Ok(names)
    }

    /// Reads the scenario `NAME`, `NAME:VARIANT`, `PATH.toml` or `PATH.toml:VARIANT`.
    pub fn load(&self, wanted: &str) -> Result<Scenario> {
        let (name, variant) = match wanted.rsplit_once(':') {
            Some((name, variant)) => (name, Some(variant)),
            None => (wanted, None),
        };
        if name.ends_with(".toml") {
            return Scenario::load(Path::new(name), variant);
        }
        let names = self.names()?;
        if !names.iter().any(|known| known == name) {
            return Err(Error::unknown("scenario", name, names.iter().map(String::as_str)));
        }
        match self {
            Shelf::Directory(directory) => Scenario::load(&directory.join(format!("{name}.toml")), variant),
            Shelf::BuiltIn => {
                let (_, text) = BUILT_IN.iter().find(|(known, _)| *known == name).unwrap_or(&("", ""));
                Scenario::parse(name, &format!("{name}.toml (built in)"), text, variant)
            }
        }
    }
}
