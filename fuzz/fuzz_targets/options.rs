//! The option parser: whatever the bytes, it comes to an end, and what it read is the same after it was written.
//! `crates/wire/src/option/tests.rs` replays the corpus.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wire::option::{Mptcp, Unwritable, read, read_header};

fuzz_target!(|bytes: &[u8]| {
    let _ = read_header(bytes).count();
    for option in read(bytes).flatten() {
        match option.to_bytes() {
            Ok(written) => assert_eq!(Mptcp::parse(&written), Ok(option)),
            Err(error) => assert!(matches!(error, Unwritable::TooLong(_)), "{option:?}: {error}"),
        }
    }
});
