//! What scripts rely on: exit codes, option places, documents on stdout. No root, no daemon.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn secondsite(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_secondsite")).args(arguments).output().unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("ended by itself")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn document(output: &Output) -> Value {
    let value: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stdout)));
    assert_eq!(value["schema_version"], 1);
    value
}

fn path(dir: &Path) -> &str {
    dir.to_str().unwrap()
}

#[test]
fn wrong_usage_exits_64() {
    let cases: &[&[&str]] = &[
        &[],
        &["no-such-command"],
        &["status", "--no-such-option"],
        &["setup"],
        &["join", "dr1:7443"],
        &["join", "dr1", "--token", "x"],
        &["join", "dr1:0", "--token", "x"],
        &["protect", "db1"],
        &["protect", "db1", "--volumes", "all", "--tracker", "magic"],
        &["protect", "db1", "--volumes", "all", "--block-size", "5000"],
        &["protect", "db1", "--volumes", "all", "--block-size", "2MiB"],
        &["protect", "db1", "--volumes", "all", "--rpo", "30"],
        &["protect", "db1", "--volumes", "all", "--rpo", "0s"],
        &["protect", "db1", "--volumes", "all", "--keep", "soon"],
        &["protect", "db1", "--volumes", "all,/dev/sda"],
        &["protect", "../etc", "--volumes", "all"],
        &["token", "--ttl", "2h"],
        &["token", "--role", "king"],
        &["points"],
        &["setup", "--store", "/x", "--listen", "7443"],
    ];
    for case in cases {
        let output = secondsite(case);
        assert_eq!(code(&output), 64, "{case:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{case:?}");
        assert!(!output.stderr.is_empty(), "{case:?}");
    }
}

#[test]
fn help_and_version_succeed_and_name_the_values() {
    for case in [&["--help"][..], &["--version"], &["protect", "--help"], &["help", "cut"]] {
        let output = secondsite(case);
        assert_eq!(code(&output), 0, "{case:?}");
        assert!(!output.stdout.is_empty(), "{case:?}");
    }
    let help = String::from_utf8(secondsite(&["protect", "--help"]).stdout).unwrap();
    for word in ["--tracker", "auto", "ebpf", "compare", "--config-dir", "--json", "--yes"] {
        assert!(help.contains(word), "{word}");
    }
}

#[test]
fn global_options_stand_before_or_after() {
    let dir = tempfile::tempdir().unwrap();
    let here = path(dir.path());
    let commands: &[&[&str]] = &[
        &["status"],
        &["points", "db1"],
        &["cut", "db1", "--wait"],
        &["verify", "db1"],
        &["unprotect", "db1"],
        &["token"],
        &["protect", "db1", "--volumes", "all", "--tracker", "ebpf"],
    ];
    for command in commands {
        let globals = ["--config-dir", here, "--json", "--yes"];
        let before = secondsite(&[&globals[..], command].concat());
        let after = secondsite(&[command, &globals[..]].concat());
        for output in [&before, &after] {
            assert_eq!(code(output), 78, "{command:?}: {}", stderr(output));
            let error = &document(output)["error"];
            assert_eq!(error["exit_code"], 78);
            assert!(error["message"].as_str().unwrap().contains("control.toml"), "{error}");
            assert!(!error["hint"].as_str().unwrap().is_empty());
        }
        assert_eq!(before.stdout, after.stdout, "{command:?}");
    }
}

#[test]
fn an_unknown_key_is_named_with_its_place_and_its_nearest() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write("control.toml", "# control\nlisen = '127.0.0.1:7443'\n");
    write("target.toml", "store = '/srv'\nlisten = '127.0.0.1:1'\nmemry = '1GiB'\n");
    write("agent.toml", "control = 'dr1:7443'\nname = 'db1'\nalow = []\n");
    for (command, expected) in [
        ("status", "control.toml:2: unknown key `lisen` (did you mean `listen`?)"),
        ("control", "control.toml:2: unknown key `lisen` (did you mean `listen`?)"),
        ("target", "target.toml:3: unknown key `memry` (did you mean `memory`?)"),
        ("replicate", "agent.toml:3: unknown key `alow` (did you mean `allow`?)"),
    ] {
        let output = secondsite(&[command, "--config-dir", path(dir.path())]);
        assert_eq!(code(&output), 78, "{command}");
        assert!(stderr(&output).contains(expected), "{command}: {}", stderr(&output));
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_daemon_without_a_configuration_says_what_to_type() {
    let dir = tempfile::tempdir().unwrap();
    for (daemon, hint) in [("control", "secondsite setup"), ("replicate", "secondsite join")] {
        let output = secondsite(&[daemon, "--config-dir", path(dir.path())]);
        assert_eq!(code(&output), 78, "{daemon}");
        assert!(stderr(&output).contains(hint), "{daemon}: {}", stderr(&output));
    }
}

#[test]
fn a_token_that_is_none_is_refused_before_anything_is_dialled() {
    let dir = tempfile::tempdir().unwrap();
    let output = secondsite(&[
        "join",
        "192.0.2.1:7443",
        "--token",
        "ss1_12",
        "--config-dir",
        path(dir.path()),
    ]);
    assert_eq!(code(&output), 77, "{}", stderr(&output));
    assert!(stderr(&output).contains("secondsite token"));
    assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none(), "nothing was written");
}

#[test]
fn the_inventory_that_join_would_report() {
    let dir = tempfile::tempdir().unwrap();
    let token = format!("ss1_{}", "0".repeat(96));
    let output = secondsite(&[
        "--json",
        "join",
        "dr1:7443",
        "--token",
        &token,
        "--name",
        "db1",
        "--dry-run",
        "--config-dir",
        path(dir.path()),
    ]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(document(&output)["inventory"].is_array());
}
