//! The only place that writes to standard output and standard error.
#![allow(clippy::print_stderr)]

use std::fmt;
use std::io::{self, IsTerminal, Write};

/// Writes one line to standard output, at once: a reader at the other end of a pipe sees it without delay.
/// Colour stays only where the output is a terminal that wants it.
pub fn line(text: impl fmt::Display) -> Result<(), WriteError> {
    writeln!(anstream::stdout(), "{text}").map_err(WriteError)
}

/// Does a person read standard output?
pub fn is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Writes `bytes` as they are to standard output.
pub fn raw(bytes: &[u8]) -> Result<(), WriteError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(WriteError)
}

/// `fields` as a JSON object, in their order.
pub fn json_object(fields: &[(&str, serde_json::Value)]) -> String {
    let fields: Vec<_> = fields.iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
    format!("{{{}}}", fields.join(","))
}

/// Writes one line to standard error.
pub fn note(text: impl fmt::Display) {
    // Nobody is left to tell when standard error is closed.
    let _ = writeln!(io::stderr(), "{text}");
}

/// Standard output does not take what is written to it.
#[derive(Debug)]
pub struct WriteError(io::Error);

impl WriteError {
    /// Did the reader leave, as `head` does? Then it has all it wanted.
    pub fn reader_left(&self) -> bool {
        self.0.kind() == io::ErrorKind::BrokenPipe
    }
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "write to standard output: {}", self.0)
    }
}

impl std::error::Error for WriteError {}
