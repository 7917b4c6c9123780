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
fn help_on_a_command_is_what_its_flag_prints_and_topics_are_pages() {
    let net = Net::new();
    for command in ["", "show", "endpoint add", "lab run", "proxy"] {
        assert_eq!(net.ok(&format!("braid help {command}")), net.ok(&format!("braid {command} --help")));
    }
    for (topic, example) in [
        ("paths", "braid endpoint add"),
        ("fallback", "braid stats"),
        ("namespaces", "braid show -n"),
        ("privileges", "setcap"),
    ] {
        assert!(net.ok("braid help").contains(&format!("\n  {topic} ")), "{topic}");
        assert!(net.ok(&format!("braid help {topic}")).contains(&format!("    {example} ")), "{topic}");
    }
}

/// Every `braid …` line of the topics is one that the program takes.
#[test]
fn the_examples_of_the_topics_are_well_formed() {
    let net = Net::new();
    for topic in ["paths", "fallback", "namespaces", "privileges"] {
        for line in net.ok(&format!("braid help {topic}")).lines() {
            let Some(example) = line.strip_prefix("    braid ") else { continue };
            let example = example.split_once(" #").map_or(example, |(command, _)| command).trim();
            // `--help` as the last word: parsed, and nothing done.
            let output = net.output(&format!("braid {example} --help"));
            assert!(output.status.success(), "{topic}: {example}: {output:?}");
        }
    }
}

#[test]
fn each_shell_gets_a_completion_script_that_knows_the_flags() {
    let net = Net::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = net.ok(&format!("braid completion {shell}"));
        assert!(script.contains("monitor") && script.contains("program"), "{shell}");
    }
}
