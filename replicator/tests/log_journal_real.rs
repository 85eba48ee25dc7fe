//! The journal's own protocol, against a journal of the test's. The crate that speaks it knows only
//! one path, so this test has `/run` for itself, in a mount namespace. Needs root.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);

/// A daemon; killed when dropped.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The fields of one datagram: `NAME=value` lines, or a name, a length (u64) and that many bytes.
fn fields(mut bytes: &[u8]) -> BTreeMap<String, String> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let mut found = BTreeMap::new();
    while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
        let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
        if let Some(at) = line.iter().position(|byte| *byte == b'=') {
            found.insert(text(&line[..at]), text(&line[at + 1..]));
            bytes = rest;
        } else {
            let (length, rest) = rest.split_first_chunk().unwrap();
            let (value, rest) = rest.split_at(u64::from_le_bytes(*length) as usize);
            found.insert(text(line), text(value));
            bytes = rest.strip_prefix(b"\n").unwrap();
        }
    }
    found
}

fn secondsite(config: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_secondsite"));
    command.arg("--config-dir").arg(config).stdout(Stdio::null());
    command
}

#[test]
fn the_journal_gets_fields() {
    // This thread and the daemons that it starts see a /run of their own.
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("dr");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let made = secondsite(&config)
        .args(["setup", "--no-start", "--listen", &format!("127.0.0.1:{port}"), "--store"])
        .arg(dir.path().join("store"))
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(made.success());

    // No journal yet: said, where it was asked for by name.
    let without = secondsite(&config).args(["control", "--log-format", "journald"]).output();
    assert_eq!(without.unwrap().status.code(), Some(69));

    std::fs::create_dir_all("/run/systemd/journal").unwrap();
    let journal = UnixDatagram::bind("/run/systemd/journal/socket").unwrap();
    journal.set_read_timeout(Some(PATIENCE)).unwrap();
    // Under init stderr is a stream of the journal, and init says which.
    let stderr = std::fs::File::create(dir.path().join("stderr")).unwrap();
    let stat = stderr.metadata().unwrap();
    let started = secondsite(&config)
        .arg("control")
        .env("JOURNAL_STREAM", format!("{}:{}", stat.dev(), stat.ino()))
        .stderr(stderr)
        .spawn();
    let _daemon = Daemon(started.unwrap());
    let mut buffer = [0; 8192];
    let event = loop {
        let count = journal.recv(&mut buffer).expect("an event in time");
        let event = fields(&buffer[..count]);
        if event.get("MESSAGE").is_some_and(|message| message == "control listens") {
            break event;
        }
    };
    assert_eq!(event["SECONDSITE_ADDRESS"], format!("127.0.0.1:{port}"));
    assert_eq!(event["SYSLOG_IDENTIFIER"], "secondsite");
    assert_eq!(event["PRIORITY"], "5");
    let stderr = std::fs::read_to_string(dir.path().join("stderr")).unwrap();
    assert_eq!(stderr, "", "the same is not said twice");
}
