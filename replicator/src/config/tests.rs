//! Configuration files, good and bad.

use super::{AgentConfig, ControlConfig, Paths, TargetConfig};
use std::path::Path;
use std::time::Duration;

fn dir(files: &[(&str, &str)]) -> (tempfile::TempDir, Paths) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("conf.d")).unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let paths = Paths::of(dir.path());
    (dir, paths)
}

#[test]
fn folders() {
    let paths = Paths::of(Path::new("/etc/secondsite"));
    assert_eq!(paths.state, Path::new("/var/lib/secondsite"));
    assert_eq!(paths.run, Path::new("/run/secondsite"));
    assert_eq!(paths.pki, Path::new("/etc/secondsite/pki"));
    let paths = Paths::of(Path::new("/tmp/other-site"));
    assert_eq!(paths.state, Path::new("/tmp/other-site/state"));
    assert_eq!(paths.argument(), " --config-dir /tmp/other-site");
}

#[test]
fn values_and_drop_ins() {
    let (_dir, paths) = dir(&[
        ("control.toml", "listen = '0.0.0.0:7443'\n"),
        (
            "target.toml",
            "store = '/srv'\nlisten = '[::]:7444'\ncontrol = 'dr1:7443'\nreserve = '2GiB'\n",
        ),
        ("agent.toml", "control = 'dr1:7443'\nname = 'db1'\nallow = ['/dev/sda']\n"),
        ("conf.d/20-b.toml", "[control]\ncertificate_life = '2d'\n[agent]\nallow = ['/dev/sdb']\n"),
        (
            "conf.d/10-a.toml",
            "[control]\ncertificate_life = '1d'\n[[target.device]]\nserver = 'db1'\nvolume = 'sda'\npath = '/dev/sdx'\n",
        ),
        ("conf.d/note.txt", "not read"),
    ]);
    let control = ControlConfig::load(&paths).unwrap();
    assert_eq!(control.certificate_life, Duration::from_secs(2 * 86400), "the later file counts");
    let target = TargetConfig::load(&paths).unwrap();
    assert_eq!(target.reserve_bytes, 2 << 30);
    assert_eq!(target.devices[0].path, Path::new("/dev/sdx"));
    let agent = AgentConfig::load(&paths).unwrap();
    assert_eq!(agent.allow, [Path::new("/dev/sda"), Path::new("/dev/sdb")]);
}

#[test]
fn what_is_wrong_is_named_with_its_place() {
    let error = |file: &str, text: &str| {
        let (dir, paths) = dir(&[("control.toml", "listen = '127.0.0.1:1'\n")]);
        std::fs::write(dir.path().join(file), text).unwrap();
        let result = if file == "target.toml" {
            TargetConfig::load(&paths).map(drop)
        } else {
            ControlConfig::load(&paths).map(drop)
        };
        result.unwrap_err().to_string().replace(&format!("{}/", paths.config.display()), "")
    };
    assert_eq!(
        error("control.toml", "# comment\nlisen = '0.0.0.0:7443'\n"),
        "control.toml:2: unknown key `lisen` (did you mean `listen`?)"
    );
    assert_eq!(error("control.toml", "\n\nzzz = 1\n"), "control.toml:3: unknown key `zzz`");
    assert_eq!(
        error("conf.d/x.toml", "[control]\nstor = '/x'\n"),
        "conf.d/x.toml:2: unknown key `stor` (did you mean `store`?)"
    );
    assert_eq!(
        error("conf.d/x.toml", "[contrl]\n"),
        "conf.d/x.toml:1: unknown key `contrl` (did you mean `control`?)"
    );
    assert_eq!(
        error("target.toml", "store = '/s'\n[[device]]\nserver = 'a'\nvolum = 'b'\n"),
        "target.toml:4: unknown key `volum` (did you mean `volume`?)"
    );
    assert_eq!(error("target.toml", "store = '/s'\n"), "target.toml: `listen` is missing");
    assert!(error("control.toml", "listen = '0.0.0.0'\n").starts_with("control.toml:1: "));
    assert!(
        error("control.toml", "listen = '1.1.1.1:1'\nlisten =\n").starts_with("control.toml:2: ")
    );
    let life = "listen = '1.1.1.1:1'\ncertificate_life = '31d'\n";
    assert_eq!(
        error("control.toml", life),
        "control.toml:2: `certificate_life` is out of bounds: more than 0, at most 30d"
    );
    assert_eq!(
        error("conf.d/x.toml", "[control]\ncertificate_life = '0s'\n"),
        "conf.d/x.toml:2: `certificate_life` is out of bounds: more than 0, at most 30d"
    );
}

#[test]
fn a_check_finds_everything_that_is_wrong_at_once() {
    let (_dir, paths) = dir(&[
        ("control.toml", "lisen = '0.0.0.0:7443'\ncertificate_life = 'soon'\nstore = 7\n"),
        ("target.toml", "store = '/srv'\nlisten = '[::]:7444'\ncontrol = 'dr1'\nmemory = '1MiB'\n"),
        ("conf.d/10-a.toml", "[agent]\nallow = ['/dev/sda']\n[taget]\n[target]\nreserv = '1GiB'\n"),
        ("conf.d/20-b.toml", "[control\n"),
    ]);
    let checked = super::check(&paths);
    assert_eq!(checked.roles, ["control", "target"]);
    let here = format!("{}/", paths.config.display());
    let mut problems: Vec<String> =
        checked.problems.iter().map(|problem| problem.to_string().replace(&here, "")).collect();
    problems.sort();
    let starts = [
        "conf.d/10-a.toml: `agent` counts for nothing: there is no agent.toml",
        "conf.d/10-a.toml:3: unknown key `taget` (did you mean `target`?)",
        "conf.d/10-a.toml:5: unknown key `reserv` (did you mean `reserve`?)",
        "conf.d/20-b.toml:1: ",
        "control.toml:1: unknown key `lisen` (did you mean `listen`?)",
        "control.toml:2: ",
        "control.toml:3: ",
    ];
    assert_eq!(problems.len(), starts.len(), "{problems:#?}");
    for (problem, start) in problems.iter().zip(starts) {
        assert!(problem.starts_with(start), "{problem:?} is not {start:?}");
    }
    assert!(checked.values.is_empty());
}

#[test]
fn every_value_is_shown_with_its_place() {
    let (_dir, paths) = dir(&[
        ("control.toml", "listen = '0.0.0.0:7443'\n"),
        ("agent.toml", "control = 'dr1:7443'\nname = 'db1'\n"),
        ("conf.d/10-a.toml", "# more\n[agent]\nmemory = '1GiB'\nname = 'db2'\n"),
    ]);
    let checked = super::check(&paths);
    assert!(checked.problems.is_empty(), "{:?}", checked.problems);
    let shown: Vec<(&str, &str, &str, usize)> = checked
        .values
        .iter()
        .map(|one| {
            let line = one.place.as_ref().map_or(0, |place| place.line);
            (one.role, one.key, one.value.as_str(), line)
        })
        .collect();
    let state = paths.state.join("control").display().to_string();
    let expected = [
        ("control", "listen", "0.0.0.0:7443", 1),
        ("control", "store", state.as_str(), 0),
        ("control", "certificate_life", "30d", 0),
        ("control", "metrics", "", 0),
        ("agent", "control", "dr1:7443", 1),
        ("agent", "name", "db2", 4),
        ("agent", "memory", "1 GiB", 3),
        ("agent", "workers", "2", 0),
        ("agent", "allow", "", 0),
        ("agent", "metrics", "", 0),
    ];
    assert_eq!(shown, expected);
}

/// The samples that are delivered: sound as they are, and sound and complete with every line that
/// is commented out put in.
#[test]
fn the_samples_are_sound_and_complete() {
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/examples");
    for whole in [false, true] {
        let mut files = Vec::new();
        for name in ["control.toml", "target.toml", "agent.toml", "conf.d/10-local.toml"] {
            let text = std::fs::read_to_string(samples.join(name)).expect(name);
            let line = |line: &str| match line.strip_prefix("#") {
                Some(rest) if whole && !rest.starts_with(' ') => format!("{rest}\n"),
                _ => format!("{line}\n"),
            };
            files.push((name, text.lines().map(line).collect::<String>()));
        }
        let files: Vec<(&str, &str)> =
            files.iter().map(|(name, text)| (*name, text.as_str())).collect();
        let (_dir, paths) = dir(&files);
        let checked = super::check(&paths);
        assert!(checked.problems.is_empty(), "{:?}", checked.problems);
        assert_eq!(checked.roles, ["control", "target", "agent"]);
        if whole {
            let unset: Vec<_> = checked.values.iter().filter(|one| one.place.is_none()).collect();
            assert!(unset.is_empty(), "the samples do not show {unset:?}");
        }
    }
}
