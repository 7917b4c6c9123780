//! A program before it runs: where it is, and what of it decides whether its sockets can be reached.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};

use crate::{Error, Result};

/// The file that execvp(3) would take for `program`.
pub fn find(program: &OsStr, search: Option<&OsStr>) -> Result<PathBuf> {
    let path = Path::new(program);
    if program.as_encoded_bytes().contains(&b'/') {
        return executable(path).map(|()| path.into()).map_err(|reason| refused(program, path, reason));
    }
    let mut refusal = Error::NotFound { program: program.display().to_string() };
    for directory in std::env::split_paths(search.unwrap_or(OsStr::new("/bin:/usr/bin"))) {
        let path = directory.join(program);
        match executable(&path) {
            Ok(()) if !program.is_empty() => return Ok(path),
            // In a directory that may not be searched, nobody knows that there is a program.
            Err(reason) if reason.raw_os_error() == Some(libc::EACCES) && path.exists() => {
                refusal = refused(program, &path, reason);
            }
            _ => {}
        }
    }
    Err(refusal)
}

/// An answer of the kernel to the attempt to run `program`, the file `path`.
pub fn refused(program: &OsStr, path: &Path, reason: io::Error) -> Error {
    match reason.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => Error::NotFound { program: program.display().to_string() },
        _ => Error::NotExecutable { path: path.into(), reason },
    }
}

fn executable(path: &Path) -> io::Result<()> {
    let kind = path.metadata()?.file_type();
    if kind.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    if kind.is_socket() || kind.is_fifo() {
        return Err(io::Error::from_raw_os_error(libc::EACCES));
    }
    Ok(access(path, AccessFlags::X_OK)?)
}

/// Is it machine code, not a script?
pub fn is_elf(path: &Path) -> bool {
    elf_class(path).is_some()
}

/// Is it a program for 32-bit processors? Those have system calls of their own, which the filter lets pass.
pub fn is_32_bit(path: &Path) -> bool {
    const ELFCLASS32: u8 = 1;
    elf_class(path) == Some(ELFCLASS32)
}

fn elf_class(path: &Path) -> Option<u8> {
    let mut start = [0; 5];
    File::open(path).and_then(|mut file| file.read_exact(&mut start)).ok()?;
    let class = start.strip_prefix(b"\x7fELF")?;
    class.first().copied()
}

/// Does it run with another user's or group's rights? File capabilities are not looked at.
pub fn is_setuid(path: &Path) -> bool {
    path.metadata().is_ok_and(|file| file.mode() & (libc::S_ISUID | libc::S_ISGID) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_as_the_shell_finds_them() {
        let path = Some(OsStr::new("/nonexistent:/etc:/usr/bin:/bin"));
        let found = |name: &str| find(name.as_ref(), path);
        assert!(found("env").unwrap().ends_with("bin/env"));
        assert_eq!(found("/bin/sh").unwrap(), Path::new("/bin/sh"));
        for (name, code) in [("", 127), ("no-such-program", 127), ("/bin/sh/x", 127), ("passwd", 0)] {
            assert_eq!(found(name).map_or_else(|e| e.exit_code(), |_| 0), code, "{name}");
        }
        for (name, message) in [
            ("/etc", "/etc: Is a directory"),
            ("/etc/passwd", "/etc/passwd: Permission denied"),
            ("fstab", "/etc/fstab: Permission denied"),
        ] {
            let error = found(name).unwrap_err();
            assert_eq!((error.exit_code(), error.to_string().as_str()), (126, message));
        }
    }
}
