//! Where labs keep their files, and which labs are running.
//!
//! Each lab has a directory `HOME/NAME` with `lab.json` (for those who look for it), `lock` (locked as
//! long as the lab or its janitor lives), `bin` (first in the PATH of its programs), `work` (their working directory)
//! and `control` (the socket of a lab that stays up).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::mounts::Mounts;
use crate::{Error, Result, privilege};

/// The directory of all labs of one user.
#[derive(Clone, Debug)]
pub struct Home(PathBuf);

/// What others need to know about a running lab: `lab.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Card {
    /// The lab's name.
    pub name: String,
    /// The scenario's name, with its variant.
    pub scenario: String,
    /// The process that the lab lives in.
    pub pid: u32,
    /// Nodes, and the names of their network namespaces.
    pub nodes: BTreeMap<String, String>,
    /// Nodes with private directories, and where their mount namespaces are, see [`Card::enter_mounts_on_exec`].
    #[serde(default)]
    pub mounts: BTreeMap<String, PathBuf>,
    /// The lab's directory.
    pub directory: PathBuf,
}

impl Home {
    /// `BRAID_LABS` if it is set, else `/run/braid` for root; for others `$XDG_RUNTIME_DIR/braid`, else
    /// `/tmp/braid-UID`. Call it before [`privilege::enter`], which changes who is who.
    pub fn find() -> Result<Self> {
        let uid = nix::unistd::geteuid();
        let home = match (std::env::var_os("BRAID_LABS"), std::env::var_os("XDG_RUNTIME_DIR")) {
            (Some(home), _) => PathBuf::from(home),
            _ if privilege::has() => PathBuf::from("/run/braid"),
            (_, Some(runtime)) => PathBuf::from(runtime).join("braid"),
            _ => PathBuf::from(format!("/tmp/braid-{uid}")),
        };
        let what = || format!("make directory {}", home.display());
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&home).map_err(|e| Error::io(what(), e))?;
        // Anybody can make a directory in /tmp.
        let owner = fs::symlink_metadata(&home).map_err(|error| Error::io(what(), error))?;
        if !owner.is_dir() || owner.uid() != uid.as_raw() {
            return Err(Error::program(what(), "it belongs to somebody else"));
        }
        Ok(Home(home))
    }

    /// The running labs, by name.
    pub fn running(&self) -> Result<Vec<Card>> {
        let what = || format!("read directory {}", self.0.display());
        let mut cards: Vec<Card> = fs::read_dir(&self.0)
            .map_err(|error| Error::io(what(), error))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| is_locked(path))
            .filter_map(|path| serde_json::from_slice(&fs::read(path.join("lab.json")).ok()?).ok())
            .collect();
        cards.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(cards)
    }

    /// The running lab `name`, or the only one of the scenario `name`; without a name the only one that stays up.
    pub fn lab(&self, name: Option<&str>) -> Result<Card> {
        let mut running = self.running()?;
        if let Some(name) = name {
            let own = running.iter().position(|card| card.name == name.replace(':', "-"));
            let of_scenario = |card: &&Card| card.scenario.split(':').next() == Some(name);
            let at = own.or_else(|| match running.iter().filter(of_scenario).count() {
                1 => running.iter().position(|card| of_scenario(&card)),
                _ => None,
            });
            let names = running.iter().map(|card| card.name.as_str());
            return match at {
                Some(at) => Ok(running.swap_remove(at)),
                None => Err(Error::unknown("running lab", name, names)),
            };
        }
        running.retain(|card| card.control().exists());
        match (running.pop(), running.is_empty()) {
            (Some(only), true) => Ok(only),
            (None, _) => {
                Err(Error::program("find the running lab", "there is none; `braid lab up NAME` makes one"))
            }
            (Some(last), false) => {
                running.push(last);
                let names: Vec<_> = running.iter().map(|card| card.name.as_str()).collect();
                Err(Error::program(
                    "find the running lab",
                    format!("there are several, name one of them: {}", names.join(", ")),
                ))
            }
        }
    }

    /// Makes the directory of the lab `name` and locks it.
    pub(crate) fn claim(&self, name: &str) -> Result<(PathBuf, File)> {
        let directory = self.0.join(name);
        let what = || format!("make directory {}", directory.display());
        // Looking whether a directory is stale, removing it and making it anew is one thing.
        let everything = File::create(self.0.join("lock")).map_err(|error| Error::io(what(), error))?;
        everything.lock().map_err(|error| Error::io(what(), error))?;
        if is_locked(&directory) {
            return Err(Error::program(format!("make lab {name}"), "there is one of that name; use --name"));
        }
        if directory.exists() {
            fs::remove_dir_all(&directory).map_err(|error| Error::io(what(), error))?;
        }
        for part in ["", "bin", "work"] {
            fs::create_dir(directory.join(part)).map_err(|error| Error::io(what(), error))?;
        }
        let lock = File::create(directory.join("lock")).map_err(|error| Error::io(what(), error))?;
        lock.lock().map_err(|error| Error::io(what(), error))?;
        Ok((directory, lock))
    }
}

impl Card {
    /// The name of `node`'s network namespace.
    pub fn namespace(&self, node: &str) -> Result<&str> {
        self.nodes
            .get(node)
            .map(String::as_str)
            .ok_or_else(|| Error::unknown("node", node, self.nodes.keys().map(String::as_str)))
    }

    /// Makes `command`'s process see `node`'s private directories, if it has some. It will work in `directory`.
    pub fn enter_mounts_on_exec(&self, node: &str, command: &mut Command, directory: &Path) -> Result<()> {
        self.mounts.get(node).map_or(Ok(()), |path| Mounts::open(path)?.enter_on_exec(command, directory))
    }

    /// The working directory of its programs.
    pub fn work(&self) -> PathBuf {
        self.directory.join("work")
    }

    /// PATH for its programs: its own directory first.
    pub fn path(&self) -> OsString {
        let mut path = self.directory.join("bin").into_os_string();
        let usual = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
        path.push(":");
        path.push(usual);
        path
    }

    /// Where `program` is for its programs: found by [`Card::path`], unless it is a path itself.
    pub fn program(&self, program: &str) -> Result<PathBuf> {
        if program.contains('/') {
            return Ok(program.into());
        }
        std::env::split_paths(&self.path())
            .map(|directory| directory.join(program))
            .find(|file| file.is_file())
            .ok_or_else(|| Error::unknown("program", program, []))
    }

    /// The socket on which a lab that stays up takes orders.
    pub fn control(&self) -> PathBuf {
        self.directory.join("control")
    }

    pub(crate) fn write(&self) -> Result<()> {
        let what = || format!("write {}/lab.json", self.directory.display());
        let text = serde_json::to_vec_pretty(self).map_err(|error| Error::io(what(), error))?;
        // Whoever reads it sees all of it or none.
        let new = self.directory.join("lab.json.new");
        fs::write(&new, text)
            .and_then(|()| fs::rename(&new, self.directory.join("lab.json")))
            .map_err(|error| Error::io(what(), error))
    }
}

fn is_locked(directory: &Path) -> bool {
    let Ok(lock) = File::open(directory.join("lock")) else { return false };
    matches!(lock.try_lock(), Err(TryLockError::WouldBlock))
}
