//! `scripts/install` into a tree of its own: what is there, that init, shells and man take it, that
//! units are as closed as they claim, and that uninstalling removes ours and keeps yours.

use secondsite::config::{AgentConfig, ControlConfig, Paths, TargetConfig};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const CONFIG: &str = "etc/secondsite/conf.d/10-local.toml";
/// Units, and the exposure that `systemd-analyze security` may give them.
const UNITS: [(&str, f64); 3] = [("agent", 4.0), ("control", 2.0), ("target", 2.0)];
const COMMANDS: [&str; 16] = [
    "setup",
    "control",
    "target",
    "replicate",
    "token",
    "join",
    "protect",
    "unprotect",
    "status",
    "points",
    "cut",
    "verify",
    "explain",
    "check",
    "doctor",
    "config",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output();
    output.unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// Everything it said; it must succeed.
fn said(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8(text).unwrap();
    assert!(output.status.success(), "{text}");
    text
}

fn install(dest: &Path, arguments: &[&str]) -> String {
    let binary = Path::new(env!("CARGO_BIN_EXE_secondsite"));
    let target = binary.parent().and_then(Path::parent).unwrap();
    let output = Command::new(root().join("scripts/install"))
        .args(arguments)
        .env("DESTDIR", dest)
        .env("CARGO_TARGET_DIR", target)
        .output()
        .unwrap();
    said(&output)
}

/// Every file and folder below, with its mode.
fn tree(dir: &Path) -> BTreeMap<String, u32> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            if metadata.is_dir() {
                folders.push(path.clone());
            }
            let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
            found.insert(name, metadata.permissions().mode() & 0o7777);
        }
    }
    found
}

fn installed() -> tempfile::TempDir {
    let dest = tempfile::tempdir().unwrap();
    install(dest.path(), &["--built"]);
    dest
}

#[test]
fn everything_is_there_and_uninstalling_keeps_what_is_yours() {
    let dest = installed();
    let found = tree(dest.path());
    let mut wanted: Vec<(String, u32)> = [
        ("usr/bin/secondsite", 0o755),
        ("usr/lib/sysusers.d/secondsite.conf", 0o644),
        ("usr/lib/tmpfiles.d/secondsite.conf", 0o644),
        ("usr/lib/udev/rules.d/59-secondsite-filtered.rules", 0o644),
        ("usr/lib/udev/rules.d/59-secondsite-replicas.rules", 0o644),
        ("usr/share/bash-completion/completions/secondsite", 0o644),
        ("usr/share/zsh/vendor-completions/_secondsite", 0o644),
        ("usr/share/fish/vendor_completions.d/secondsite.fish", 0o644),
        ("usr/share/man/man1/secondsite.1", 0o644),
        ("usr/share/doc/secondsite/install.md", 0o644),
        (CONFIG, 0o644),
        ("etc/secondsite/pki", 0o700),
        ("var/lib/secondsite", 0o711),
        ("var/lib/secondsite/agent", 0o700),
        ("var/lib/secondsite/control", 0o700),
        ("var/lib/secondsite/target", 0o700),
    ]
    .map(|(path, mode)| (path.to_owned(), mode))
    .into();
    wanted.extend(
        UNITS.map(|(unit, _)| (format!("usr/lib/systemd/system/secondsite-{unit}.service"), 0o644)),
    );
    wanted.extend(COMMANDS.map(|name| (format!("usr/share/man/man1/secondsite-{name}.1"), 0o644)));
    for (path, mode) in wanted {
        assert_eq!(found.get(&path), Some(&mode), "{path}");
    }

    // Again, over a configuration that somebody edited.
    let config = dest.path().join(CONFIG);
    let edited = format!("{}\n# mine\n", std::fs::read_to_string(&config).unwrap());
    std::fs::write(&config, &edited).unwrap();
    let state = dest.path().join("var/lib/secondsite/agent/assignment.json");
    std::fs::write(&state, "{}").unwrap();
    assert!(install(dest.path(), &["--built"]).contains("was edited"));
    assert_eq!(std::fs::read_to_string(&config).unwrap(), edited);

    install(dest.path(), &["--uninstall"]);
    assert_eq!(std::fs::read_to_string(&config).unwrap(), edited);
    assert_eq!(std::fs::read_to_string(&state).unwrap(), "{}");
    let left: Vec<String> =
        tree(dest.path()).into_keys().filter(|path| dest.path().join(path).is_file()).collect();
    assert_eq!(left, [CONFIG, "var/lib/secondsite/agent/assignment.json"]);
}

#[test]
fn the_configuration_is_taken_as_it_is_and_with_every_line_in_force() {
    let text = std::fs::read_to_string(root().join("packaging/conf.d/10-local.toml")).unwrap();
    let in_force = |line: &str| match line.strip_prefix('#') {
        Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '[') => {
            rest.to_owned()
        }
        _ => line.to_owned(),
    };
    let all: Vec<String> = text.lines().map(in_force).collect();
    for drop_in in [text, all.join("\n")] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("conf.d")).unwrap();
        for (name, text) in [
            ("conf.d/10-local.toml", drop_in.as_str()),
            ("control.toml", "listen = '127.0.0.1:1'"),
            ("target.toml", "store = '/s'\nlisten = '127.0.0.1:2'\ncontrol = 'dr1:1'"),
            ("agent.toml", "control = 'dr1:1'\nname = 'db1'"),
        ] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let paths = Paths::of(dir.path());
        ControlConfig::load(&paths).unwrap();
        TargetConfig::load(&paths).unwrap();
        AgentConfig::load(&paths).unwrap();
    }
}

#[test]
fn init_takes_the_units_and_finds_them_closed() {
    let dir = tempfile::tempdir().unwrap();
    for (unit, exposure_max) in UNITS {
        let name = format!("secondsite-{unit}.service");
        let text = std::fs::read_to_string(root().join("packaging/systemd").join(&name)).unwrap();
        let user = if unit == "agent" { "root".to_owned() } else { format!("secondsite-{unit}") };
        for line in [&format!("User={user}"), "Group=secondsite", "Type=notify", "KillMode=mixed"] {
            assert!(text.lines().any(|found| found == line), "{unit} has no {line}");
        }
        let binary = env!("CARGO_BIN_EXE_secondsite");
        let path = dir.path().join(&name);
        let text = text.replace("@PREFIX@/bin/secondsite", binary).replace("@PREFIX@", "/usr");
        std::fs::write(&path, text).unwrap();
        let path = path.to_str().unwrap();
        let verified = said(&run("systemd-analyze", &["verify", "--man=no", path]));
        // It also reads the units of this host; only what it says of ours counts.
        let ours: Vec<&str> = verified.lines().filter(|line| line.contains(&name)).collect();
        assert!(ours.is_empty(), "{ours:?}");
        let security =
            said(&run("systemd-analyze", &["security", "--offline=true", "--no-pager", path]));
        let level = security.lines().find_map(|line| {
            let (_, level) = line.split_once("exposure level for ")?.1.split_once(": ")?;
            level.split(' ').next()?.parse::<f64>().ok()
        });
        let level = level.unwrap_or_else(|| panic!("no level in {security}"));
        println!("{unit}: exposure {level}");
        assert!(level <= exposure_max, "{unit}: {level} is above {exposure_max}\n{security}");
    }
}

#[test]
fn shells_take_the_completions_and_man_the_pages() {
    let dest = installed();
    let path = |name: &str| dest.path().join("usr/share").join(name).to_str().unwrap().to_owned();
    let bash = path("bash-completion/completions/secondsite");
    said(&run("bash", &["-n", &bash]));
    // What a Tab after "secondsite st" gives.
    let ask = format!(
        "source {bash}; complete -p secondsite; COMP_WORDS=(secondsite st); COMP_CWORD=1; \
         _secondsite secondsite st secondsite; echo \"${{COMPREPLY[*]}}\""
    );
    let answer = said(&run("bash", &["-c", &ask]));
    assert!(answer.contains("_secondsite"), "{answer}");
    assert!(answer.lines().any(|line| line == "status"), "{answer}");
    for (shell, file) in [
        ("zsh", path("zsh/vendor-completions/_secondsite")),
        ("fish", path("fish/vendor_completions.d/secondsite.fish")),
    ] {
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.contains("unprotect"), "{file}");
        // Checked by the shell itself where there is one.
        if Command::new(shell).arg("--version").output().is_ok() {
            said(&run(shell, &["-n", &file]));
        }
    }
    let pages = ["".to_owned()].into_iter().chain(COMMANDS.map(|name| format!("-{name}")));
    for page in pages {
        let file = path(&format!("man/man1/secondsite{page}.1"));
        let output = run("groff", &["-ww", "-mandoc", "-Tutf8", "-P-cbou", &file]);
        let warnings = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && warnings.is_empty(), "{file}: {warnings}");
        let text = String::from_utf8(output.stdout).unwrap();
        let mut sections = vec!["NAME", "SYNOPSIS", "OPTIONS", "EXIT STATUS", "FILES"];
        sections.push(if page.is_empty() { "COMMANDS" } else { "EXAMPLES" });
        for section in sections {
            assert!(text.lines().any(|line| line == section), "{file} has no {section}:\n{text}");
        }
    }
}
