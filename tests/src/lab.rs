//! Both sites of a deployment on this machine: the second site (control, target) and one server
//! (agent), each with its own configuration folder, driven through the command line only.

use crate::daemon::Child;
use crate::network::{Network, SITE_ADDRESS};
use crate::wait_until;
use nix::unistd::Pid;
use secondsite_control::api::{Point, Points, ServerStatus, Status, VolumeStatus};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tempfile::TempDir;

/// The name under which the lab's server joins.
pub const SERVER: &str = "db1";

/// A daemon of the deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Daemon {
    /// On the second site.
    Control,
    /// On the second site.
    Target,
    /// The agent, on the server.
    Replicate,
}

impl Daemon {
    fn word(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Target => "target",
            Self::Replicate => "replicate",
        }
    }
}

/// Which configuration folder, and which end of the network, a command uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The second site: an operator's shell there.
    Site,
    /// The protected server.
    Server,
}

/// What a command came to.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code.
    pub code: i32,
    /// Data.
    pub stdout: String,
    /// Talk.
    pub stderr: String,
}

impl Outcome {
    /// The JSON document on stdout.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|e| panic!("not one JSON document ({e}): {self:?}"))
    }

    /// Panics unless it ended with 0.
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "the command failed: {}{}", self.stdout, self.stderr);
        self
    }

    /// Panics unless it failed, and its talk has every one of `words`.
    pub fn refused_somehow(self, words: &[&str]) -> Self {
        assert_ne!(self.code, 0, "it was accepted: {}{}", self.stdout, self.stderr);
        let code = self.code;
        self.refused(code, words)
    }

    /// Panics unless it ended with `code` and its talk has every one of `words`.
    pub fn refused(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, code, "{}{}", self.stdout, self.stderr);
        for word in words {
            let found = self.stderr.to_lowercase().contains(&word.to_lowercase());
            assert!(found, "\"{word}\" is missing in: {}", self.stderr);
        }
        self
    }
}

/// The deployment. Everything in it goes when it is dropped.
pub struct Lab {
    daemons: BTreeMap<Daemon, Child>,
    network: Option<Network>,
    port: u16,
    dir: TempDir,
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

/// How long a daemon may take to answer.
const START_LIMIT: Duration = Duration::from_secs(30);

impl Lab {
    /// A second site on loopback, with control and target running; nothing has joined.
    pub fn new() -> Self {
        Self::with(None, None)
    }

    /// The same with the target's store in a folder of a test's own file system, nothing of which
    /// is held in reserve.
    pub fn with_store(store: &Path) -> Self {
        Self::with(None, Some(store))
    }

    /// The same with the two sides in network namespaces of their own.
    pub fn on_a_network() -> Self {
        Self::with(Some(Network::new()), None)
    }

    fn with(network: Option<Network>, own_store: Option<&Path>) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::Builder::new().prefix("secondsite-lab-").tempdir().expect("a folder");
        let port = free_port();
        let mut lab = Self { daemons: BTreeMap::new(), network, port, dir, _alone: alone };
        let store = own_store.map_or_else(|| lab.path("store"), Path::to_owned);
        let store = store.display().to_string();
        let listen = lab.address();
        let setup = ["setup", "--store", &store, "--listen", &listen, "--no-start", "--yes"];
        lab.cli(Side::Site, &setup).ok();
        if own_store.is_some() {
            lab.configure_target("reserve = '0MiB'\n");
        }
        lab.start(Daemon::Control);
        wait_until("control answers", START_LIMIT, || {
            let answer = lab.cli(Side::Site, &["status", "--json"]);
            if answer.code == 0 { Ok(()) } else { Err(answer.stderr) }
        });
        lab.start_target();
        lab
    }

    /// Appends to `target.toml`.
    pub fn configure_target(&self, text: &str) {
        let path = self.config_dir(Side::Site).join("target.toml");
        let mut file = OpenOptions::new().append(true).open(path).expect("target.toml");
        file.write_all(text.as_bytes()).expect("append");
    }

    /// Starts the target and waits until it listens.
    pub fn start_target(&mut self) {
        self.start(Daemon::Target);
        if self.network.is_none() {
            let address = ("127.0.0.1", self.target_port());
            wait_until("the target listens", START_LIMIT, || {
                let end = std::net::TcpStream::connect(address);
                end.map(drop).map_err(|e| format!("{e}\n{}", self.logs()))
            });
        }
    }

    /// A path in the lab's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The configuration folder of a side.
    pub fn config_dir(&self, side: Side) -> PathBuf {
        self.path(match side {
            Side::Site => "site",
            Side::Server => "server",
        })
    }

    /// Control's address.
    pub fn address(&self) -> String {
        let host = if self.network.is_some() { SITE_ADDRESS } else { "127.0.0.1" };
        format!("{host}:{}", self.port)
    }

    /// The port on which agents reach the target.
    pub fn target_port(&self) -> u16 {
        self.port + 1
    }

    /// The link between the two sides.
    pub fn network(&self) -> &Network {
        self.network.as_ref().expect("a lab on a network")
    }

    fn command(&self, side: Side) -> Command {
        let binary = binary();
        let program = binary.to_str().expect("UTF-8");
        let mut command = match (&self.network, side) {
            (None, _) => Command::new(program),
            (Some(network), Side::Site) => network.on_site(program),
            (Some(network), Side::Server) => network.on_server(program),
        };
        command.arg("--config-dir").arg(self.config_dir(side));
        command
    }

    /// Runs a command to its end.
    pub fn cli(&self, side: Side, arguments: &[&str]) -> Outcome {
        let output = self.command(side).args(arguments).stdin(Stdio::null()).output();
        outcome(output.expect("the built binary runs"))
    }

    /// Starts a command of the operator at the second site that takes its time.
    pub fn spawn_cli(&self, arguments: &[&str]) -> Child {
        Child::spawn(arguments[0], self.command(Side::Site).args(arguments))
    }

    /// Starts a daemon; any earlier one of its kind must be gone.
    pub fn start(&mut self, daemon: Daemon) {
        self.start_with(daemon, &[]);
    }

    /// The same with more in its environment.
    pub fn start_with(&mut self, daemon: Daemon, environment: &[(&str, &OsStr)]) {
        let side = if daemon == Daemon::Replicate { Side::Server } else { Side::Site };
        let mut command = self.command(side);
        command.arg(daemon.word()).envs(environment.iter().copied());
        let child = Child::spawn(daemon.word(), &mut command);
        let before = self.daemons.insert(daemon, child);
        assert!(before.is_none(), "{daemon:?} already runs");
    }

    /// The process of a daemon.
    pub fn pid(&self, daemon: Daemon) -> Pid {
        self.daemons.get(&daemon).expect("it runs").pid()
    }

    /// `kill -9`.
    pub fn kill(&mut self, daemon: Daemon) {
        self.daemons.remove(&daemon).expect("it runs").kill();
    }

    /// SIGTERM; it must end cleanly.
    pub fn stop(&mut self, daemon: Daemon) {
        let child = self.daemons.remove(&daemon).expect("it runs");
        let status = child.terminate();
        assert!(status.success(), "{daemon:?} did not end cleanly on SIGTERM: {status}");
    }

    /// A fresh token for an agent.
    pub fn token(&self) -> String {
        let token = self.cli(Side::Site, &["token", "--json", "--yes"]).ok().json();
        token["token"].as_str().expect("a token").to_owned()
    }

    /// Tries to join with `token` as `name`.
    pub fn try_join(&self, token: &str, name: &str) -> Outcome {
        let address = self.address();
        self.cli(Side::Server, &["join", &address, "--token", token, "--name", name, "--yes"])
    }

    /// Joins as [`SERVER`] and starts the agent.
    pub fn join(&mut self) {
        self.join_with("");
    }

    /// The same with `settings` added to agent.toml.
    pub fn join_with(&mut self, settings: &str) {
        self.try_join(&self.token(), SERVER).ok();
        let path = self.config_dir(Side::Server).join("agent.toml");
        let before = std::fs::read_to_string(&path).unwrap_or_default();
        std::fs::write(&path, format!("{settings}\n{before}")).expect("agent.toml");
        self.start(Daemon::Replicate);
    }

    /// Protects a device of the server.
    pub fn protect(&self, device: &Path, more: &[&str]) -> Outcome {
        self.protect_all(&[device], more)
    }

    /// Protects devices of the server.
    pub fn protect_all(&self, devices: &[&Path], more: &[&str]) -> Outcome {
        let devices: Vec<_> = devices.iter().map(|path| path.to_str().expect("UTF-8")).collect();
        let devices = devices.join(",");
        let mut words = vec!["protect", SERVER, "--volumes", &devices, "--yes"];
        if !more.contains(&"--keep") {
            // The newest point becomes the replica volume, where tests look at it.
            words.extend(["--keep", "none"]);
        }
        self.cli(Side::Site, &[&words, more].concat())
    }

    /// `status` of the server.
    pub fn status(&self) -> Result<ServerStatus, String> {
        let answer = self.cli(Side::Site, &["status", SERVER, "--json"]);
        if answer.code != 0 {
            return Err(answer.stderr);
        }
        let mut status: Status =
            serde_json::from_str(&answer.stdout).map_err(|e| format!("{e}: {}", answer.stdout))?;
        status.servers.pop().ok_or_else(|| "no server in the status".to_owned())
    }

    /// Waits until the server's status is as wanted; gives it back.
    pub fn wait(
        &mut self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&ServerStatus) -> bool,
    ) -> ServerStatus {
        let end = std::time::Instant::now() + limit;
        loop {
            let seen = self.status();
            match &seen {
                Ok(status) if wanted(status) => return status.clone(),
                _ => self.complain_of_ended_daemons(),
            }
            assert!(
                std::time::Instant::now() < end,
                "waited {limit:?} in vain until {what}; last seen: {seen:#?}"
            );
            std::thread::sleep(crate::POLL);
        }
    }

    fn complain_of_ended_daemons(&mut self) {
        for (daemon, child) in &mut self.daemons {
            if let Some(status) = child.ended() {
                panic!("{daemon:?} ended by itself: {status}\n{}", child.log());
            }
        }
    }

    /// Waits until every volume has committed an epoch after `epoch`; returns the highest.
    pub fn wait_for_epoch_after(&mut self, epoch: u64, limit: Duration) -> u64 {
        let what = format!("an epoch after {epoch} is committed on every volume");
        let epochs = |status: &ServerStatus| -> Vec<u64> {
            status.volumes.iter().map(|volume| volume.epoch.unwrap_or(0)).collect()
        };
        let status = self.wait(&what, limit, |status| {
            let epochs = epochs(status);
            !epochs.is_empty() && epochs.into_iter().all(|newest| newest > epoch)
        });
        epochs(&status).into_iter().max().expect("a volume")
    }

    /// Waits until the replica volumes hold what is now the newest exact point, or a later one;
    /// returns the first's path.
    pub fn wait_until_promoted(&mut self, limit: Duration) -> PathBuf {
        let point = self.newest_exact().expect("an exact point");
        let status = self.wait("all is promoted", limit, |status| {
            let holds = |volume: &VolumeStatus| {
                volume.promoted_epoch >= point.epochs.get(&volume.name).copied()
            };
            status.volumes.iter().all(holds)
        });
        replica_of(&status.volumes[0])
    }

    /// The newest exact point that lacks no volume.
    pub fn newest_exact(&self) -> Option<Point> {
        let mut points = self.points().points.into_iter().rev();
        points.find(|point| point.consistency != "fuzzy" && point.lacking.is_empty())
    }

    /// With the agent gone nothing new arrives: waits until the replica volumes have come to rest
    /// at the newest exact point.
    pub fn wait_until_at_rest(&mut self, limit: Duration) -> Point {
        assert!(!self.daemons.contains_key(&Daemon::Replicate), "the agent still runs");
        crate::wait_until("the replica volumes hold the newest exact point", limit, || {
            let (status, point) = (self.status()?, self.newest_exact());
            let holds = |point: &Point, volume: &VolumeStatus| {
                point.epochs.get(&volume.name).copied() == volume.promoted_epoch
            };
            match point {
                Some(point) if status.volumes.iter().all(|volume| holds(&point, volume)) => {
                    Ok(point)
                }
                other => Err(format!("{other:?} of {:?}", status.volumes)),
            }
        })
    }

    /// The replica volume of a device of the server.
    pub fn replica(&self, device: &Path) -> PathBuf {
        let status = self.status().expect("control answers");
        let volume = status.volumes.iter().find(|volume| Path::new(&volume.path) == device);
        replica_of(volume.unwrap_or_else(|| panic!("{} is not protected", device.display())))
    }

    /// `cut --wait`; returns the point's id.
    pub fn cut(&self) -> String {
        let answer = self.cli(Side::Site, &["cut", SERVER, "--wait", "--json", "--yes"]).ok();
        let point = &answer.json()["point"];
        let id = point.as_str().or_else(|| point["id"].as_str());
        id.unwrap_or_else(|| panic!("no point in {}", answer.stdout)).to_owned()
    }

    /// The recovery points.
    pub fn points(&self) -> Points {
        let answer = self.cli(Side::Site, &["points", SERVER, "--json"]).ok();
        serde_json::from_str(&answer.stdout).expect("the points document")
    }

    /// Whether a daemon that runs said this.
    pub fn has_said(&self, daemon: Daemon, words: &str) -> bool {
        self.daemons.get(&daemon).is_some_and(|child| child.whole_log().contains(words))
    }

    /// What the daemons said last.
    pub fn logs(&self) -> String {
        self.daemons.values().map(Child::log).collect::<Vec<_>>().join("\n")
    }
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.daemons.clear();
        // What is pinned in the kernel outlives the agent by design.
        if let Some(id) = server_id(&self.config_dir(Side::Server)) {
            let _ = std::fs::remove_dir_all(Path::new("/sys/fs/bpf/secondsite").join(id));
        }
    }
}

fn replica_of(volume: &VolumeStatus) -> PathBuf {
    volume.replica.clone().expect("a replica volume").into()
}

/// Newest committed epoch of the first volume; 0 before.
pub fn epoch_of(status: &ServerStatus) -> u64 {
    status.volumes.first().and_then(|volume| volume.epoch).unwrap_or(0)
}

/// The agent's id, from the assignment that it keeps on disk.
fn server_id(dir: &Path) -> Option<String> {
    for entry in std::fs::read_dir(dir).ok()?.flatten() {
        let path = entry.path();
        let found = if path.is_dir() {
            server_id(&path)
        } else if path.extension().is_some_and(|e| e == "json") {
            let document: Option<Value> =
                std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
            document.and_then(|d| {
                let id = d.pointer("/content/server_id").or_else(|| d.get("server_id"))?;
                Some(id.as_str()?.to_owned())
            })
        } else {
            None
        };
        if found.as_ref().is_some_and(|id| id.len() == 32) {
            return found;
        }
    }
    None
}

/// `target/release/secondsite`, two folders above the test's own binary.
fn binary() -> PathBuf {
    let own = std::env::current_exe().expect("our own path");
    let binary = own.parent().and_then(Path::parent).expect("deps/").join("secondsite");
    assert!(binary.exists(), "{}: build it first: cargo build --release", binary.display());
    binary
}

fn outcome(output: Output) -> Outcome {
    Outcome {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A free port whose successor is free too, below the range of outgoing connections.
fn free_port() -> u16 {
    let mut random = crate::random::Random::seeded(u64::from(std::process::id()));
    loop {
        let port = 20_000 + random.below(10_000) as u16;
        let free = |port| TcpListener::bind(("127.0.0.1", port)).is_ok();
        if free(port) && free(port + 1) {
            return port;
        }
    }
}
