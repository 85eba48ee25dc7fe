//! The second site as real processes: setup, control, token, join, status. No root, loopback only.

mod site_support;

use serde_json::Value;
use site_support::{Daemon, PATIENCE, Site};
use sqlx::Connection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

fn message(document: &Value) -> &str {
    document["error"]["message"].as_str().unwrap()
}

#[test]
fn from_setup_to_a_joined_server() {
    let (site, made) = Site::setup();
    let token = made["token"].as_str().unwrap();
    assert!(made["fingerprint"].as_str().unwrap().starts_with("SHA256:"));
    assert_eq!(made["page"], format!("https://{}", site.listen));
    let again = ["setup", "--store", "/tmp", "--listen", &site.listen];
    assert!(message(&site.ends("dr", &again, 78)).contains("set up already"));

    // Control is not there yet: said, with the address.
    assert!(message(&site.ends("dr", &["status"], 69)).contains(&site.listen));
    let mut control = Daemon::start(&site.config("dr"), "control");
    let status = site.ends("dr", &["status"], 0);
    assert_eq!(status["servers"].as_array().unwrap().len(), 0);

    // A second one with the same configuration is refused; what runs goes on.
    let second = site.run("dr", &["control"]);
    assert_eq!(second.status.code(), Some(75));
    assert!(String::from_utf8_lossy(&second.stderr).contains(&control.child.id().to_string()));

    // A token of another authority: nothing is sent to this control.
    let foreign = format!("{}{}", &token[..36], "0".repeat(64));
    let join = |config: &str, token: &str, name: &str, code| {
        site.ends(config, &["join", &site.listen, "--token", token, "--name", name], code)
    };
    join("db1", &foreign, "db1", 77);
    let joined = join("db1", token, "db1", 0);
    assert_eq!(joined["name"], "db1");
    assert_eq!(joined["fingerprint"], made["fingerprint"]);
    assert!(joined["inventory"].is_array());
    assert!(message(&join("db2", token, "db2", 77)).contains("used"));
    let next = site.ends("dr", &["token", "--ttl", "5min"], 0);
    let next = next["token"].as_str().unwrap();
    assert!(message(&join("db1", next, "db1", 78)).contains("joined already"));
    // A configuration that cannot be read is named before the token is spent, and left as it is.
    let agent_toml = site.config("db2").join("agent.toml");
    std::fs::create_dir_all(agent_toml.parent().unwrap()).unwrap();
    std::fs::write(&agent_toml, "memory = \n").unwrap();
    assert!(message(&join("db2", next, "db2", 78)).contains("agent.toml"));
    assert_eq!(std::fs::read_to_string(&agent_toml).unwrap(), "memory = \n");
    std::fs::write(&agent_toml, "memory = \"32 MiB\"\n").unwrap();
    join("db2", next, "db2", 0);
    assert!(std::fs::read_to_string(&agent_toml).unwrap().contains("32 MiB"));

    let status = site.ends("dr", &["status", "db1"], 0);
    let server = &status["servers"][0];
    assert_eq!((&server["name"], &server["state"]), (&"db1".into(), &"joined".into()));
    assert!(server["loss_seconds"].is_null());
    assert!(!server["reason"].as_str().unwrap().is_empty());
    assert_eq!(site.ends("dr", &["points", "db1"], 0)["points"].as_array().unwrap().len(), 0);
    site.ends("dr", &["status", "nobody"], 64);
    let wrong = ["protect", "db1", "--volumes", "/dev/no-such-device"];
    assert!(message(&site.ends("dr", &wrong, 64)).contains("/dev/no-such-device"));

    // Killed at any time it comes back; what it knew is still known.
    control.signal("KILL");
    control.child.wait().unwrap();
    let mut control = Daemon::start(&site.config("dr"), "control");
    assert_eq!(site.ends("dr", &["status"], 0)["servers"].as_array().unwrap().len(), 2);
    control.told("WATCHDOG=1");
    control.signal("TERM");
    control.told("STOPPING=1");
    assert!(control.child.wait().unwrap().success());
}

/// What control writes to stderr with this format, from its start to SIGTERM.
fn log_of(site: &Site, format: &str) -> String {
    let file = site.config("log");
    let daemon = Daemon::start_with(&site.config("dr"), "control", |command| {
        command
            .env("SECONDSITE_LOG_FORMAT", format)
            .env("SECONDSITE_LOG", "info,secondsite_control=debug");
        command.env("JOURNAL_STREAM", "1:1").stderr(std::fs::File::create(&file).unwrap());
    });
    site.ends("dr", &["status"], 0);
    daemon.signal("TERM");
    daemon.told("STOPPING=1");
    let mut daemon = daemon;
    assert!(daemon.child.wait().unwrap().success());
    std::fs::read_to_string(file).unwrap()
}

#[test]
fn logs_are_lines_of_text_or_objects() {
    let (site, _) = Site::setup();
    let log = log_of(&site, "json");
    let mut seen = Vec::new();
    for line in log.lines() {
        let event: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        let time = event["timestamp"].as_str().unwrap();
        assert!(time.parse::<jiff::Timestamp>().is_ok() && time.ends_with('Z'), "{line}");
        for key in ["level", "target", "message"] {
            assert!(event[key].is_string(), "no {key}: {line}");
        }
        seen.push(event);
    }
    let listens = seen.iter().find(|event| event["message"] == "control listens").unwrap();
    assert_eq!(listens["address"], site.listen.as_str());
    assert_eq!(listens["level"], "INFO");

    // A JOURNAL_STREAM that is not this stderr: text, with times.
    let log = log_of(&site, "auto");
    let line = log.lines().find(|line| line.contains("control listens")).unwrap();
    assert!(line.split(' ').next().unwrap().parse::<jiff::Timestamp>().is_ok(), "{line}");
    let wrong = site.run("dr", &["control", "--log-format", "xml"]);
    assert_eq!(wrong.status.code(), Some(64));
}

/// All files below a folder with their bytes.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        // The index of SQLite's log holds nothing that outlives its readers.
        } else if !path.display().to_string().ends_with("-shm") {
            found.insert(path.clone(), std::fs::read(&path).unwrap());
        }
    }
    found
}

/// What a newer version wrote ends the daemon that would read it with 78, says what was found, what
/// is known and what to do, and is the same afterwards.
#[test]
fn what_a_newer_version_wrote_is_named_and_left_alone() {
    let (site, made) = Site::setup();
    let dr = site.config("dr");
    let store = site.config("store").display().to_string();
    let port: u16 = site.listen.rsplit_once(':').unwrap().1.parse().unwrap();
    let control_toml = std::fs::read_to_string(dr.join("control.toml")).unwrap();
    assert_eq!(control_toml, format!("listen = \"{}\"\n", site.listen));
    let target_toml = format!(
        "control = \"{}\"\nlisten = \"127.0.0.1:{}\"\nstore = \"{store}\"\n",
        site.listen,
        port + 1
    );
    assert_eq!(std::fs::read_to_string(dr.join("target.toml")).unwrap(), target_toml);

    // The agent's documents.
    let mut control = Daemon::start(&dr, "control");
    let token = made["token"].as_str().unwrap();
    site.ends("db1", &["join", &site.listen, "--token", token, "--name", "db1"], 0);
    let db1 = site.config("db1");
    let agent_toml = format!("control = \"{}\"\nname = \"db1\"\n", site.listen);
    assert_eq!(std::fs::read_to_string(db1.join("agent.toml")).unwrap(), agent_toml);
    let refuses = |config: &str, arguments: &[&str], file: &Path, found: &str| {
        let before = files(file.parent().unwrap());
        let document = site.ends(config, arguments, 78);
        let error = &document["error"];
        let said = format!("{} {}", message(&document), error["hint"].as_str().unwrap());
        let name = file.display().to_string();
        for part in [name.as_str(), "newer Secondsite", found, "up to ", "install the newer"] {
            assert!(said.contains(part), "{arguments:?}: no {part:?} in: {said}");
        }
        assert!(files(file.parent().unwrap()) == before, "{arguments:?} changed {name}");
    };
    let newer = |file: &Path| {
        let now = "{\"content\":{\"unknown\":true},\"format\":2}\n";
        std::fs::write(file, now).unwrap();
    };
    let enrolment = db1.join("state/agent/enrolment.json");
    newer(&enrolment);
    refuses("db1", &["replicate"], &enrolment, "format 2");
    let next = site.ends("dr", &["token"], 0);
    let next = next["token"].as_str().unwrap().to_string();
    let again = ["join", &site.listen, "--token", &next, "--name", "db1", "--yes"];
    refuses("db1", &again, &enrolment, "format 2");

    // The target's: the whole of it, or one volume among others.
    let assignment = dr.join("state/target/assignment.json");
    std::fs::create_dir_all(assignment.parent().unwrap()).unwrap();
    newer(&assignment);
    refuses("dr", &["target"], &assignment, "format 2");
    let id = |digit: &str| digit.repeat(32);
    let volume = |digit: &str| serde_json::json!({ "id": id(digit), "name": digit, "size_bytes": 1 << 20, "block_bytes": 4096 });
    let server = serde_json::json!({
        "id": id("a"), "name": "db1", "machine": "5a".repeat(32), "active": true,
        "volumes": [volume("1"), volume("2")],
    });
    let content = serde_json::json!({ "version": 1_000_000, "servers": [server] });
    let document = serde_json::json!({ "format": 1, "content": content });
    std::fs::write(&assignment, document.to_string()).unwrap();
    let volumes = site.config("store/servers").join(id("a"));
    std::fs::create_dir_all(volumes.join(id("1")).join("journal")).unwrap();
    let state = volumes.join(id("1")).join("state.json");
    std::fs::write(&state, "{\"format\": 3, \"unknown\": true}\n").unwrap();
    std::fs::write(volumes.join(id("1")).join("journal/00000001.seg"), "newer too").unwrap();
    std::fs::write(volumes.join(id("1")).join("replica.img"), [7; 4096]).unwrap();
    let before = files(&volumes.join(id("1")));
    let target = Daemon::start(&dr, "target");
    target.says("0 of 2 volumes connected, 1 stopped");
    assert!(files(&volumes.join(id("1"))) == before, "the target changed what it could not read");
    let until = Instant::now() + PATIENCE;
    while !volumes.join(id("2")).join("state.json").exists() {
        assert!(Instant::now() < until, "the other volume does not go on");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(target);

    // Control's database, with its log not written back: control was killed.
    control.signal("KILL");
    control.child.wait().unwrap();
    let database = dr.join("state/control/control.db");
    future_migration(&database);
    refuses("dr", &["control"], &database, "migration 9999");
    refuses("dr", &["setup", "--store", &store], &database, "migration 9999");
}

/// Records a migration that this version does not know, in the write-ahead log alone.
fn future_migration(database: &Path) {
    let log = database.with_file_name("control.db-wal");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (bytes, log_bytes) = runtime.block_on(async {
        let options = SqliteConnectOptions::new().filename(database);
        let mut db = SqliteConnection::connect_with(&options).await.unwrap();
        let insert = "INSERT INTO _sqlx_migrations
            (version, description, success, checksum, execution_time)
            VALUES (9999, 'later', TRUE, x'00', 0)";
        sqlx::query(insert).execute(&mut db).await.unwrap();
        // Closing writes the log back; what a kill would leave is copied before.
        let left = (std::fs::read(database).unwrap(), std::fs::read(&log).unwrap());
        db.close().await.unwrap();
        left
    });
    assert!(!log_bytes.is_empty(), "the test needs a log that was not written back");
    std::fs::write(database, bytes).unwrap();
    std::fs::write(log, log_bytes).unwrap();
}
