//! Help, man pages and completions, all from the one definition of the flags.

use std::fs;

use crate::net::Net;

/// `TRYCMD=overwrite cargo test -p braid` writes the files anew.
#[test]
fn help_is_as_in_the_snapshots() {
    trycmd::TestCases::new().case("tests/snapshots/*.trycmd");
}

#[test]
fn every_command_has_a_man_page_with_its_flags_and_examples() {
    let dir = tempfile::tempdir().unwrap();
    Net::new().ok(&format!("braid man {}", dir.path().display()));
    for page in [
        "braid",
        "braid-echo-client",
        "braid-endpoint-add",
        "braid-limits",
        "braid-monitor",
        "braid-show",
        "braid-stats",
        "braid-subflow-create",
        "braid-address-remove",
        "braid-listen",
    ] {
        let text = fs::read_to_string(dir.path().join(format!("{page}.1"))).unwrap();
        assert!(text.contains(".SH SYNOPSIS"), "{page}");
    }
    let show = fs::read_to_string(dir.path().join("braid-show.1")).unwrap();
    assert!(show.contains(r"\-\-program") && show.contains("braid show \\-\\-program iperf3"), "{show}");
}

#[test]
fn each_shell_gets_a_completion_script_that_knows_the_flags() {
    let net = Net::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = net.ok(&format!("braid completion {shell}"));
        assert!(script.contains("monitor") && script.contains("program"), "{shell}");
    }
}
