//! A second site in a temporary folder, and its daemons as real processes on loopback.

use serde_json::Value;
use std::cell::RefCell;
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take before the test fails.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub struct Site {
    pub dir: tempfile::TempDir,
    pub listen: String,
}

impl Site {
    pub fn config(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a command with one of the site's configurations.
    pub fn run(&self, config: &str, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_secondsite"))
            .args(arguments)
            .arg("--config-dir")
            .arg(self.config(config))
            .arg("--json")
            .output()
            .unwrap()
    }

    /// The document of a command that must end with this code.
    pub fn ends(&self, config: &str, arguments: &[&str], code: i32) -> Value {
        let output = self.run(config, arguments);
        let talk = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {talk}");
        let document: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {talk}"));
        assert_eq!(document["schema_version"], 1);
        document
    }

    /// A site whose control has a free port, set up and not started.
    pub fn setup() -> (Self, Value) {
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
pub struct Daemon {
    pub child: Child,
    notify: UnixDatagram,
    /// The newest STATUS that init was told; one comes with READY.
    status: RefCell<String>,
}

impl Daemon {
    pub fn start(config: &Path, role: &str) -> Self {
        Self::start_with(config, role, |_| {})
    }

    pub fn start_with(config: &Path, role: &str, change: impl FnOnce(&mut Command)) -> Self {
        let socket = config.join(format!("notify-{role}"));
        let _ = std::fs::remove_file(&socket);
        let notify = UnixDatagram::bind(&socket).unwrap();
        notify.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_secondsite"));
        command
            .arg(role)
            .arg("--config-dir")
            .arg(config)
            .env("NOTIFY_SOCKET", &socket)
            .env("WATCHDOG_USEC", "1000000")
            .stdout(Stdio::null());
        change(&mut command);
        let daemon = Self { child: command.spawn().unwrap(), notify, status: RefCell::default() };
        daemon.told("READY=1");
        daemon
    }

    /// Waits until init was told this.
    pub fn told(&self, what: &str) {
        self.hears(what, |line| line == what);
    }

    /// Waits until the newest status that init was told begins so.
    #[allow(dead_code, reason = "not every test file uses it")]
    pub fn says(&self, status: &str) {
        let start = format!("STATUS={status}");
        if !self.status.borrow().starts_with(&start) {
            self.hears(&start, |line| line.starts_with(&start));
        }
    }

    fn hears(&self, what: &str, is_it: impl Fn(&str) -> bool) {
        let mut buffer = [0; 1024];
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            let count = self.notify.recv(&mut buffer).expect("the daemon talks to init");
            let text = String::from_utf8_lossy(&buffer[..count]);
            if let Some(status) = text.lines().rfind(|line| line.starts_with("STATUS=")) {
                self.status.replace(status.into());
            }
            if text.lines().any(&is_it) {
                return;
            }
        }
        panic!("never said {what}");
    }

    #[allow(dead_code, reason = "not every test file uses it")]
    pub fn signal(&self, name: &str) {
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
