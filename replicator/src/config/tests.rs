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
        "control.toml: `certificate_life` is out of bounds: more than 0, at most 30d"
    );
}
