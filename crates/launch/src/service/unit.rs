//! A unit as systemd would load it: its file, found in the order of systemd.unit(5), and the drop-ins.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{Error, FILE, Result};

/// A service or socket unit.
#[derive(Debug)]
pub struct Unit {
    /// Its own name; that which was asked for may be an alias.
    pub name: String,
    /// Section, key and value, in the order of reading.
    settings: Vec<(String, String, String)>,
}

impl Unit {
    /// The unit called `name`; without a suffix, a service.
    pub fn load(name: &str, search: &[PathBuf]) -> Result<Self> {
        let asked = match name.rsplit_once('.') {
            Some((_, "service" | "socket")) => name.to_string(),
            _ => format!("{name}.service"),
        };
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || ":_.\\-@".contains(c);
        let is_other_kind = name.rsplit_once('.').is_some_and(|(_, suffix)| OTHER_KINDS.contains(&suffix));
        if !name.chars().all(is_allowed) || name.is_empty() || name.starts_with('.') || is_other_kind {
            return Err(Error::NoName(name.into()));
        }
        let path = find(&asked, search)
            .or_else(|| find(&template(&asked)?, search))
            .ok_or_else(|| Error::NotFound { unit: asked.clone(), searched: search.to_vec() })?;
        let own = own_name(&asked, &path, search);
        let mut unit = Unit { name: own, settings: Vec::new() };
        if path.metadata().is_ok_and(|file| !file.is_file() || file.len() == 0) {
            return Err(Error::Masked { unit: unit.name, path });
        }
        unit.read(&path)?;
        for file in drop_ins(&[&unit.name, &asked], search)? {
            unit.read(&file)?;
        }
        Ok(unit)
    }

    /// The values of a setting that is a list: an empty one takes back those before.
    pub fn all(&self, section: &str, key: &str) -> Vec<String> {
        let mut values = Vec::new();
        for value in self.values(section, key) {
            if value.is_empty() {
                values.clear();
            } else {
                values.push(value.into());
            }
        }
        values
    }

    /// The value of a setting, if it has one that is not empty.
    pub fn last(&self, section: &str, key: &str) -> Option<&str> {
        self.values(section, key).last().filter(|value| !value.is_empty())
    }

    fn values(&self, section: &str, key: &str) -> impl Iterator<Item = &str> {
        self.settings
            .iter()
            .filter(move |(s, k, _)| s == section && k == key)
            .map(|(_, _, value)| value.as_str())
    }

    /// Adds what `path` sets. Lines that are none, systemd ignores.
    fn read(&mut self, path: &Path) -> Result<()> {
        let bytes = fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
        let text = String::from_utf8_lossy(&bytes);
        let (mut section, mut line) = (String::new(), String::new());
        // An empty line ends one that a backslash at the end of the file leaves open.
        for part in text.lines().chain([""]) {
            // Comments may stand in the middle of a value, too.
            if part.trim_start().starts_with(['#', ';']) {
                continue;
            }
            if let Some(part) = part.strip_suffix('\\') {
                line += part;
                line.push(' ');
                continue;
            }
            line += part;
            let whole = std::mem::take(&mut line);
            let whole = whole.trim();
            if let Some(name) = whole.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                section = name.into();
            } else if let Some((key, value)) = whole.split_once('=') {
                self.settings.push((section.clone(), key.trim_end().into(), value.trim_start().into()));
            }
        }
        Ok(())
    }
}

/// Suffixes of the units that start no program and make no socket.
const OTHER_KINDS: [&str; 9] =
    ["target", "timer", "mount", "automount", "swap", "path", "slice", "scope", "device"];

/// The first file called `name`. A link that leads nowhere is none.
fn find(name: &str, search: &[PathBuf]) -> Option<PathBuf> {
    search.iter().map(|directory| directory.join(name)).find(|path| path.exists())
}

/// Of `name@instance.service`, `name@.service`.
fn template(name: &str) -> Option<String> {
    let (stem, suffix) = name.rsplit_once('.')?;
    let (prefix, instance) = stem.split_once('@')?;
    (!instance.is_empty()).then(|| format!("{prefix}@.{suffix}"))
}

/// A link from one unit's name to another's in the directories of units is an alias; one that leads elsewhere is the
/// unit's own file.
fn own_name(asked: &str, path: &Path, search: &[PathBuf]) -> String {
    let is_searched = |directory: &Path| {
        search.iter().any(|searched| searched.canonicalize().is_ok_and(|searched| searched == directory))
    };
    let own = path.canonicalize().ok().filter(|target| target.parent().is_some_and(is_searched));
    let own = own.and_then(|target| target.file_name()?.to_str().map(String::from));
    match own {
        Some(own) if template(asked).as_deref() == Some(&own) => asked.into(),
        Some(own) => match (own.split_once("@."), asked.split_once('@')) {
            // An alias of a template, for this instance.
            (Some((prefix, _)), Some((_, instance))) => format!("{prefix}@{instance}"),
            _ => own,
        },
        None => asked.into(),
    }
}

/// The drop-ins of a unit with these names, but ours, in the order in which they are read: by file name. Of files with
/// the same name counts that in the directory that comes first.
fn drop_ins(names: &[&str], search: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = BTreeMap::new();
    let mut directories = Vec::new();
    for name in names {
        for directory in search {
            directories.extend(names_of_drop_ins(name).map(|name| directory.join(format!("{name}.d"))));
        }
    }
    let kind = names.first().and_then(|name| name.rsplit_once('.')).map_or("service", |(_, suffix)| suffix);
    directories.extend(search.iter().map(|directory| directory.join(format!("{kind}.d"))));
    for directory in directories {
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) => continue,
            Err(source) => return Err(Error::Read { path: directory, source }),
        };
        for entry in entries.flatten() {
            let is_one = entry.path().extension().is_some_and(|extension| extension == "conf");
            if is_one && entry.file_name() != FILE {
                files.entry(entry.file_name()).or_insert(entry.path());
            }
        }
    }
    Ok(files.into_values().collect())
}

/// Those that have drop-ins for `a-b@c.service`: itself, `a-.service`, and `a-b@.service`.
fn names_of_drop_ins(name: &str) -> impl Iterator<Item = String> {
    let (stem, suffix) = name.rsplit_once('.').unwrap_or((name, "service"));
    let prefix = stem.split_once('@').map_or(stem, |(prefix, _)| prefix);
    let shorter = prefix.char_indices().rev().filter(|(at, c)| *c == '-' && *at + 1 < prefix.len());
    let shorter = shorter.map(move |(at, _)| format!("{}.{suffix}", &prefix[..=at]));
    [name.to_string()].into_iter().chain(shorter).chain(template(name))
}
