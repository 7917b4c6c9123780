//! Unit files in a directory of the test's own.

use super::*;

/// Directories of unit files, as `etc` and `lib` of a host.
struct Host {
    root: tempfile::TempDir,
    systemd: Systemd,
}

impl Host {
    fn new(files: &[(&str, &str)]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let search = ["etc", "lib"].map(|name| root.path().join(name)).to_vec();
        for (name, text) in files {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Host { root, systemd: Systemd { search, version: Some(257) } }
    }

    fn link(&self, name: &str, target: &str) {
        let target = if target.starts_with('/') { target.into() } else { self.root.path().join(target) };
        let path = self.root.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(target, path).unwrap();
    }

    fn drop_in(&self, unit: &str, options: &[&str]) -> Result<String> {
        let run: Vec<String> = ["/usr/bin/braid", "run"].iter().chain(options).map(|&w| w.into()).collect();
        drop_in(unit, &run, &self.systemd)
    }

    /// The drop-in without its comments.
    fn settings(&self, unit: &str, options: &[&str]) -> String {
        let text = self.drop_in(unit, options).unwrap();
        text.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect()
    }

    fn refusal(&self, unit: &str) -> String {
        self.drop_in(unit, &[]).unwrap_err().to_string().replace(&self.root.path().display().to_string(), "")
    }
}

/// A service with this line in its section.
fn service(line: &str) -> String {
    format!("[Unit]\nDescription=one\nExecStart=/bin/not-here\n\n[Service]\n{line}\n[Install]\nWantedBy=x\n")
}

#[test]
fn a_service_starts_its_program_under_braid_run() {
    let host = Host::new(&[(
        "lib/web.service",
        &service("Type=notify\nExecStart=/usr/bin/web -g 'daemon on;' %i $OPTIONS"),
    )]);
    let expected = "# /etc/systemd/system/web.service.d/zz-braid.conf
# Made by `braid run --service web.service`. Then: systemctl daemon-reload; systemctl restart web.service
[Service]
ExecStart=
ExecStart=/usr/bin/braid run -- /usr/bin/web -g 'daemon on;' %i $OPTIONS
";
    assert_eq!(host.drop_in("web", &[]).unwrap(), expected);
    assert_eq!(host.drop_in("web.service", &[]).unwrap(), expected);
    let with_options = host.settings("web", &["--only", "server", "--exclude", "a $b%c \"d\\"]);
    assert!(
        with_options.contains(r#"run --only server --exclude "a $$b%%c \"d\\" -- /usr/bin/web"#),
        "{with_options}"
    );
}

#[test]
fn what_stands_before_a_path_stays_before_braids() {
    for (written, expected) in [
        ("-/bin/a b", "-/usr/bin/braid run -- /bin/a b"),
        ("+:/bin/a", "+:/usr/bin/braid run -- /bin/a"),
        ("!!/bin/a", "!!/usr/bin/braid run -- /bin/a"),
        ("-@/bin/a \"an a\" b", "-/usr/bin/braid run --argv0 \"an a\" -- /bin/a b"),
        ("a b", "/usr/bin/braid run -- a b"),
        ("/bin/a \\\n  # a comment\n  b", "/usr/bin/braid run -- /bin/a b"),
        ("/bin/a ';' \\; \"b ; c\"", "/usr/bin/braid run -- /bin/a ';' \\; \"b ; c\""),
    ] {
        let host = Host::new(&[("lib/a.service", &service(&format!("ExecStart={written}")))]);
        assert_eq!(host.settings("a", &[]), format!("[Service]\nExecStart=\nExecStart={expected}\n"));
    }
    let host = Host::new(&[("lib/a.service", &service("ExecStart=-|a && b"))]);
    assert!(host.refusal("a").starts_with("a.service: ExecStart=-|a && b: a shell's line"));
}

#[test]
fn each_of_several_commands_is_started_under_braid_run() {
    let host = Host::new(&[(
        "lib/a.service",
        &service("ExecStart=/bin/no\nExecStart=\nExecStart=/bin/a ; -/bin/b c\nExecStart = /bin/d"),
    )]);
    let expected =
        ["/usr/bin/braid run -- /bin/a", "-/usr/bin/braid run -- /bin/b c", "/usr/bin/braid run -- /bin/d"]
            .map(|line| format!("ExecStart={line}\n"))
            .concat();
    assert_eq!(host.settings("a", &[]), format!("[Service]\nExecStart=\n{expected}"));
}

#[test]
fn units_and_drop_ins_are_found_as_systemd_finds_them() {
    let host = Host::new(&[
        ("lib/a.service", &service("ExecStart=/lib/a")),
        ("etc/a.service", &service("ExecStart=/etc/a")),
        ("lib/b-c-d.service", &service("ExecStart=/lib/b")),
        // By file name; a more specific directory of the same path first; ours is not looked at.
        ("etc/b-.service.d/20.conf", "[Service]\nExecStart=\nExecStart=/etc/b"),
        ("lib/b-c-d.service.d/10.conf", "[Service]\nExecStart=\nExecStart=/lib/10"),
        ("lib/b-c-d.service.d/20.conf", "[Service]\nExecStart=\nExecStart=/lib/20"),
        (
            "etc/b-c-d.service.d/zz-braid.conf",
            "[Service]\nExecStart=\nExecStart=/usr/bin/braid run -- /lib/b",
        ),
        ("etc/b-c-d.service.d/30.txt", "[Service]\nExecStart=/etc/text"),
        ("etc/service.d/05.conf", "[Service]\nExecStart=/etc/all"),
        ("lib/t@.service", &service("ExecStart=/lib/t %i")),
        ("etc/t@one.service.d/10.conf", "[Service]\nExecStart=/etc/t-one"),
    ]);
    host.link("etc/alias.service", "lib/t@.service");
    host.link("etc/other.service", "lib/a.service");
    host.link("etc/nowhere.service", "lib/not-there");
    let started = |unit: &str| {
        let settings = host.settings(unit, &[]);
        let lines = settings.lines().filter_map(|line| line.split_once(" -- "));
        lines.map(|(_, command)| command.to_string()).collect::<Vec<_>>().join(", ")
    };
    assert_eq!(started("a"), "/etc/a, /etc/all");
    assert_eq!(started("b-c-d"), "/etc/b");
    assert_eq!(started("t@one"), "/lib/t %i, /etc/all, /etc/t-one");
    assert_eq!(started("t@two"), "/lib/t %i, /etc/all");
    let text = host.drop_in("other", &[]).unwrap();
    assert!(text.starts_with("# /etc/systemd/system/a.service.d/zz-braid.conf\n"), "{text}");
    assert_eq!(host.refusal("nowhere"), "no unit nowhere.service in /etc, /lib");
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let host = Host::new(&[
        ("lib/empty.service", ""),
        ("lib/target-only.service", &service("Type=oneshot")),
        ("lib/unix.socket", "[Socket]\nListenStream=/run/x\n"),
        ("lib/both.socket", "[Socket]\nListenStream=/run/x\nListenStream=80\n"),
        ("lib/web.socket", "[Socket]\nListenStream=80\n"),
    ]);
    host.link("etc/off.service", "/dev/null");
    for (unit, refusal) in [
        ("nothing", "no unit nothing.service in /etc, /lib"),
        ("nothing@x.socket", "no unit nothing@x.socket in /etc, /lib"),
        ("a/b", "a/b: neither the name of a service nor of a socket unit"),
        ("", ": neither the name of a service nor of a socket unit"),
        ("boot.target", "boot.target: neither the name of a service nor of a socket unit"),
        ("off", "off.service is masked (/etc/off.service)"),
        ("empty", "empty.service is masked (/lib/empty.service)"),
        ("target-only", "target-only.service has no ExecStart="),
        ("unix.socket", "unix.socket has no ListenStream= with a TCP port"),
    ] {
        assert_eq!(host.refusal(unit), refusal);
    }
    assert!(host.refusal("both.socket").starts_with("both.socket has ListenStream=/run/x beside TCP ports"));
    let error =
        drop_in("web.socket", &["braid", "run", "--require"].map(String::from), &host.systemd).unwrap_err();
    assert!(matches!(error, Error::Options(_)), "{error}");
}

#[test]
fn a_socket_unit_is_for_systemd_itself_from_257_on() {
    let mut host = Host::new(&[("lib/web.socket", "[Socket]\nListenStream=80\nListenStream=[::1]:81\n")]);
    assert_eq!(host.settings("web.socket", &[]), "[Socket]\nSocketProtocol=mptcp\n");
    host.systemd.version = None;
    assert_eq!(host.settings("web.socket", &[]), "[Socket]\nSocketProtocol=mptcp\n");
    host.systemd.version = Some(256);
    assert!(host.refusal("web.socket").starts_with("web.socket: this host has systemd 256, "));
}

#[test]
fn a_filter_of_system_calls_lets_braids_pass_and_where_there_is_none_none_is_added() {
    let filter = |lines: &str| {
        Host::new(&[("lib/a.service", &service(&format!("ExecStart=/a\n{lines}")))]).settings("a", &[])
    };
    for lines in ["SystemCallFilter=@system-service", "SystemCallFilter=~@mount"] {
        let text = filter(lines);
        assert!(text.contains("\nSystemCallFilter=") && text.contains(" seccomp "), "{text}");
    }
    for lines in ["", "SystemCallFilter=@basic-io\nSystemCallFilter="] {
        assert!(!filter(lines).contains("SystemCallFilter"));
    }
}

#[test]
fn notes_tell_what_the_unit_makes_of_it() {
    let notes = |lines: &str| {
        let host = Host::new(&[
            ("lib/a.service", &service(&format!("ExecStart=/a\n{lines}"))),
            ("lib/b.socket", "[Socket]\nListenStream=80\n"),
            ("lib/unix.socket", "[Socket]\nListenStream=/run/a\n"),
        ]);
        host.drop_in("a", &[])
            .unwrap()
            .lines()
            .filter(|line| line.starts_with("# "))
            .skip(2)
            .collect::<Vec<_>>()
            .join("\n")
    };
    for (lines, note) in [
        ("User=web", "without CAP_SYS_ADMIN"),
        ("Type=forking", "cannot guess the main process"),
        ("CapabilityBoundingSet=CAP_NET_ADMIN CAP_CHOWN", "without CAP_SYS_ADMIN"),
        ("CapabilityBoundingSet=~CAP_SYS_ADMIN", "without CAP_SYS_ADMIN"),
        ("RootDirectory=/srv", "RootDirectory= is set"),
        ("Sockets=b.socket", "braid run --service b.socket"),
    ] {
        assert!(notes(lines).contains(note), "{lines}");
    }
    for lines in [
        "Type=notify\nKillMode=mixed",
        "User=web\nNoNewPrivileges=yes",
        "Type=forking\nPIDFile=/run/a",
        "User=",
        "CapabilityBoundingSet=CAP_SYS_ADMIN CAP_CHOWN",
        "Sockets=unix.socket",
    ] {
        assert_eq!(notes(lines), "", "{lines}");
    }
    let host = Host::new(&[("lib/a.service", &service("ExecStart=/a"))]);
    let text = drop_in("a", &["/home/me/braid".into(), "run".into()], &host.systemd).unwrap();
    assert!(text.contains("# /home/me/braid has to be where"), "{text}");
}
