//! Help, man pages and completions, all from the one definition of the flags.

use std::fs;

use crate::net::{Net, braid_variables};

/// `TRYCMD=overwrite cargo test -p braid` writes the files anew.
#[test]
fn help_is_as_in_the_snapshots() {
    let cases = trycmd::TestCases::new();
    // Help shows what a variable of the environment is set to.
    for name in braid_variables() {
        cases.env(name.to_string_lossy(), "");
    }
    cases.case("tests/snapshots/*.trycmd");
}

/// The commands that `braid --help` lists.
fn commands(net: &Net) -> Vec<String> {
    let help = net.ok("braid --help");
    let (_, listed) = help.split_once("Commands:\n").unwrap();
    let names = listed.lines().map_while(|line| line.split_whitespace().next());
    let names: Vec<_> = names.map(String::from).collect();
    assert!(names.len() > 10, "{names:?}");
    names
}

#[test]
fn the_help_of_every_command_is_in_a_snapshot() {
    let files = fs::read_dir("tests/snapshots").unwrap();
    let snapshots: String = files.map(|file| fs::read_to_string(file.unwrap().path()).unwrap()).collect();
    for command in commands(&Net::new()) {
        assert!(snapshots.contains(&format!("\n$ braid {command} --help\n")), "{command}");
    }
}

#[test]
fn the_help_of_every_command_has_examples() {
    let net = Net::new();
    for command in commands(&net).iter().filter(|command| *command != "help") {
        let help = net.ok(&format!("braid {command} --help"));
        assert!(help.contains(&format!("\nExamples:\n  braid {command}")), "{command}: {help}");
    }
}

#[test]
fn every_command_has_a_man_page_with_its_flags_and_examples() {
    let (dir, net) = (tempfile::tempdir().unwrap(), Net::new());
    net.ok(&format!("braid man {}", dir.path().display()));
    let names = commands(&net).into_iter().map(|command| format!("-{command}"));
    for name in names.chain(["", "-echo-client", "-endpoint-add", "-lab-run"].map(String::from)) {
        let text = fs::read_to_string(dir.path().join(format!("braid{name}.1"))).unwrap();
        assert!(text.contains(".SH SYNOPSIS"), "braid{name}");
    }
    let show = fs::read_to_string(dir.path().join("braid-show.1")).unwrap();
    assert!(show.contains(".SH EXAMPLES\n"), "{show}");
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
        for command in commands(&net) {
            assert!(script.contains(&command), "{shell}: {command}");
        }
        assert!(script.contains("tshort"), "{shell}");
    }
}
