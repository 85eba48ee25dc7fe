//! What people and strangers do wrong: every refusal names the thing and the remedy, ends with the
//! exit code of its kind, and leaves the volumes as they were.

use secondsite_tests::block::{LoopDevice, Mount, assert_equal};
use secondsite_tests::faulty::slow_device;
use secondsite_tests::lab::{Daemon, Lab, SERVER, Side};
use secondsite_tests::random::Random;
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

const VOLUME_BYTES: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(90);

/// Exit codes of the conventions.
const USAGE: i32 = 64;
const UNAVAILABLE: i32 = 69;
const PERMISSION: i32 = 77;
const CONFIGURATION: i32 = 78;

#[test]
fn wrong_usage_is_told_apart() {
    let lab = Lab::new();
    for words in [&["no-such-command"][..], &["protect"], &["cut", "--no-such-option", "x"]] {
        lab.cli(Side::Site, words).refused(USAGE, &[]);
    }
    let answer = lab.cli(Side::Site, &["cut", "nobody", "--wait", "--yes"]);
    assert_ne!(answer.code, 0);
    assert!(answer.stderr.contains("nobody"), "{}", answer.stderr);
    // Before or after a command's own arguments.
    lab.cli(Side::Site, &["--json", "status"]).ok().json();
    lab.cli(Side::Site, &["status", "--json"]).ok().json();
}

#[test]
fn tokens_are_for_one_use() {
    let lab = Lab::new();
    let token = lab.token();
    // Behind the prefix stands the secret, at the end the authority's fingerprint.
    lab.try_join(&with_another_digit(&token, "ss1_".len()), SERVER).refused(PERMISSION, &["token"]);
    lab.try_join(&with_another_digit(&token, token.len() - 1), SERVER)
        .refused_somehow(&["authority"]);
    lab.try_join("nonsense", SERVER).refused_somehow(&["token"]);
    // The right one still works after a wrong one, once.
    lab.try_join(&token, SERVER).ok();
    std::fs::remove_dir_all(lab.config_dir(Side::Server)).expect("its folder");
    lab.try_join(&token, "db2").refused(PERMISSION, &["token", "secondsite token"]);
}

#[test]
fn volumes_that_cannot_be_protected_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let device = LoopDevice::sparse(dir.path(), "source.img", VOLUME_BYTES);
    let mut lab = Lab::new();
    lab.join();
    let unknown = dir.path().join("no-such-device");
    lab.protect(&unknown, &[]).refused_somehow(&["no-such-device"]);
    lab.protect(device.path(), &["--block-size", "3KiB"]).refused_somehow(&["block"]);
    lab.protect(device.path(), &["--dry-run"]).ok();
    assert!(lab.status().expect("status").volumes.is_empty(), "a dry run changed something");
    lab.protect(device.path(), &[]).ok();
    lab.protect(device.path(), &[]).refused_somehow(&[device.name(), "already"]);
    lab.wait_for_epoch_after(0, PATIENCE);
    lab.cli(Side::Site, &["unprotect", SERVER, "--yes"]).ok();
}

#[test]
fn a_device_that_does_not_answer_is_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let source = LoopDevice::sparse(dir.path(), "source.img", VOLUME_BYTES);
    let slow = slow_device(dir.path(), 1 << 20, Duration::ZERO);
    let mut lab = Lab::new();
    let token = lab.token();
    slow.set_stalled(true);
    let begun = Instant::now();
    lab.try_join(&token, SERVER).refused(UNAVAILABLE, &[slow.name(), "does not answer"]);
    assert!(begun.elapsed() < Duration::from_secs(40), "join hung for {:?}", begun.elapsed());
    slow.set_stalled(false);
    lab.try_join(&token, SERVER).ok();
    // Nor does it keep an agent from replicating another device, or from ending.
    lab.start(Daemon::Replicate);
    lab.protect(source.path(), &["--rpo", "3s"]).ok();
    let epoch = lab.wait_for_epoch_after(0, PATIENCE);
    slow.set_stalled(true);
    lab.stop(Daemon::Replicate);
    lab.start(Daemon::Replicate);
    let epoch = lab.wait_for_epoch_after(epoch, PATIENCE);
    lab.stop(Daemon::Replicate);
    assert!(epoch > 0);
    slow.set_stalled(false);
}

#[test]
fn a_mounted_target_device_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let source = LoopDevice::sparse(dir.path(), "source.img", VOLUME_BYTES);
    let used = LoopDevice::sparse(dir.path(), "used.img", VOLUME_BYTES);
    used.format_ext4(&[]);
    let mount = Mount::new(used.path(), &dir.path().join("mnt"), "defaults");
    std::fs::write(mount.path().join("precious"), "data").expect("write");
    let mut lab = Lab::new();
    lab.stop(Daemon::Target);
    let file = lab.config_dir(Side::Site).join("target.toml");
    let mut file = OpenOptions::new().append(true).open(file).expect("target.toml");
    let (name, path) = (source.name(), used.path().display());
    let device =
        format!("\n[[device]]\nserver = \"{SERVER}\"\nvolume = \"{name}\"\npath = \"{path}\"\n");
    file.write_all(device.as_bytes()).expect("append");
    lab.start(Daemon::Target);
    lab.join();
    lab.protect(source.path(), &[]).ok();
    let path = used.path().display().to_string();
    let status = lab
        .wait("the refusal is shown", PATIENCE, |status| format!("{status:?}").contains("mounted"));
    assert!(format!("{status:?}").contains(&path), "the device is not named: {status:?}");
    assert_eq!(std::fs::read(mount.path().join("precious")).expect("read"), b"data");
    lab.cli(Side::Site, &["unprotect", SERVER, "--yes"]).ok();
    drop(lab);
    mount.unmount();
}

#[test]
fn an_unknown_configuration_key_is_named() {
    let mut lab = Lab::new();
    lab.stop(Daemon::Target);
    let path = lab.config_dir(Side::Site).join("target.toml");
    let before = std::fs::read_to_string(&path).expect("target.toml");
    std::fs::write(&path, format!("{before}\nlistne = \"127.0.0.1:1\"\n")).expect("write");
    let words = ["target.toml", "listne", "listen"];
    lab.cli(Side::Site, &["target"]).refused(CONFIGURATION, &words);
    std::fs::write(&path, before).expect("write");
    lab.start(Daemon::Target);
}

#[test]
fn strangers_at_the_ports_harm_nothing() {
    let mut random = Random::printed("strangers");
    let dir = tempfile::tempdir().expect("a folder");
    let device = LoopDevice::sparse(dir.path(), "source.img", VOLUME_BYTES);
    let mut lab = Lab::new();
    lab.join();
    lab.protect(device.path(), &["--rpo", "3s"]).ok();
    let mut epoch = lab.wait_for_epoch_after(0, PATIENCE);

    let control_port = lab.target_port() - 1;
    for turn in 0..30 {
        for port in [lab.target_port(), control_port] {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
            stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
            let mut bytes = vec![0; random.below(4000) as usize];
            random.fill(&mut bytes);
            if turn % 3 == 0 {
                // The start of a TLS record that announces more than follows.
                let start = [0x16, 3, 1, 0x40, 0];
                bytes.splice(..0, start);
            }
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            // Dropped by the other side: an end or a reset, and never an endless wait.
            let mut rest = Vec::new();
            let end = stream.read_to_end(&mut rest);
            let timed_out = end.is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock);
            assert!(!timed_out, "the connection was held open");
        }
    }

    OpenOptions::new()
        .write(true)
        .open(device.path())
        .and_then(|mut d| {
            d.write_all(&[0xab; 1 << 20])?;
            d.sync_all()
        })
        .expect("write to the source");
    epoch = lab.wait_for_epoch_after(epoch, PATIENCE);
    assert!(epoch > 0);
    lab.cut();
    let replica = lab.wait_until_promoted(PATIENCE);
    assert_equal(device.path(), &replica);
    lab.cli(Side::Site, &["unprotect", SERVER, "--yes"]).ok();
}

fn with_another_digit(token: &str, at: usize) -> String {
    let digit = if token.as_bytes()[at] == b'0' { "1" } else { "0" };
    format!("{}{digit}{}", &token[..at], &token[at + 1..])
}
