//! The second site as real processes: setup, control, token, join, status. No root, loopback only.

use serde_json::Value;
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take before the test fails.
const PATIENCE: Duration = Duration::from_secs(30);

struct Site {
    dir: tempfile::TempDir,
    listen: String,
}

impl Site {
    fn config(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a command with one of the site's configurations.
    fn run(&self, config: &str, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_secondsite"))
            .args(arguments)
            .arg("--config-dir")
            .arg(self.config(config))
            .arg("--json")
            .output()
            .unwrap()
    }

    /// The document of a command that must end with this code.
    fn ends(&self, config: &str, arguments: &[&str], code: i32) -> Value {
        let output = self.run(config, arguments);
        let talk = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {talk}");
        let document: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {talk}"));
        assert_eq!(document["schema_version"], 1);
        document
    }

    /// A site whose control has a free port, set up and not started.
    fn setup() -> (Self, Value) {
        let mut dir = tempfile::tempdir().unwrap();
        // Control's port and the next one must both be free; another process may take either.
        for _ in 0..20 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let site = Self { dir, listen: format!("127.0.0.1:{port}") };
            let store = site.config("store");
            let arguments = [
                "setup",
                "--no-start",
                "--store",
                store.to_str().unwrap(),
                "--listen",
                &site.listen,
            ];
            if site
                .run("dr", &["setup", "--dry-run", "--store", "/tmp", "--listen", &site.listen])
                .status
                .success()
            {
                let made = site.ends("dr", &arguments, 0);
                return (site, made);
            }
            dir = site.dir;
        }
        panic!("no two neighbouring ports are free");
    }
}

/// A daemon, started as init would and ready; killed when dropped.
struct Daemon {
    child: Child,
    notify: UnixDatagram,
}

impl Daemon {
    fn start(config: &Path, role: &str) -> Self {
        let socket = config.join(format!("notify-{role}"));
        let _ = std::fs::remove_file(&socket);
        let notify = UnixDatagram::bind(&socket).unwrap();
        notify.set_read_timeout(Some(PATIENCE)).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_secondsite"))
            .arg(role)
            .arg("--config-dir")
            .arg(config)
            .env("NOTIFY_SOCKET", &socket)
            .env("WATCHDOG_USEC", "1000000")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let daemon = Self { child, notify };
        daemon.told("READY=1");
        daemon
    }

    /// Waits until init was told this.
    fn told(&self, what: &str) {
        let mut buffer = [0; 1024];
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            let count = self.notify.recv(&mut buffer).expect("the daemon talks to init");
            let text = String::from_utf8_lossy(&buffer[..count]);
            if text.lines().any(|line| line == what) {
                return;
            }
        }
        panic!("never said {what}");
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

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
    join("db2", next, "db2", 0);

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
