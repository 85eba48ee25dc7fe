//! Configuration: where everything lies, and the three files `control.toml`, `target.toml`,
//! `agent.toml` with the drop-ins `conf.d/*.toml`.
//!
//! A drop-in holds tables `[control]`, `[target]`, `[agent]` with the same keys; read in the order
//! of their names, a later value replaces an earlier one and lists grow. An unknown key is an error
//! that names file, line and the nearest known key; nothing starts on a half-understood file.

mod check;
mod document;
mod paths;
#[cfg(test)]
mod tests;

pub use check::{Checked, Effective, check};
pub use document::{ConfigError, Place};
pub use paths::{DEFAULT_CONFIG_DIR, Paths};

use crate::cli::units::{parse_bytes, parse_seconds};
use document::{Gathered, Schema, gather};
use serde::{Deserialize, Deserializer};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Space of the store that is never used, unless `reserve` says otherwise, bytes.
const RESERVE_BYTES: u64 = 1 << 30;
/// Memory of a target for frames on their way, unless `memory` says otherwise, bytes.
const TARGET_MEMORY_BYTES: u64 = 256 << 20;
/// Most that is written to a volume of an opened recovery point, unless `scratch` says otherwise,
/// bytes.
const SCRATCH_BYTES: u64 = 64 << 30;
/// Memory of an agent for blocks on their way, unless `memory` says otherwise, bytes.
const AGENT_MEMORY_BYTES: u64 = 64 << 20;
/// Least memory that either may be given: a few whole frames.
pub const MEMORY_BYTES_MIN: u64 = 16 << 20;
/// Threads that digest and compress on an agent, unless `workers` says otherwise.
const WORKERS: usize = 2;
/// Most of them.
pub const WORKERS_MAX: usize = 64;
/// Life of a certificate, unless `certificate_life` says otherwise; also the longest.
pub const CERTIFICATE_LIFE_MAX: Duration = Duration::from_secs(30 * 86400);

/// `control.toml`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlConfig {
    /// A loopback address that serves metrics besides the unix socket.
    pub metrics: Option<SocketAddr>,
    /// Where agents, targets, the CLI and browsers connect.
    pub listen: SocketAddr,
    /// Where control keeps its database; none: the state folder.
    pub store: Option<PathBuf>,
    /// Life of the certificates that it issues.
    pub certificate_life: Duration,
}

/// `target.toml`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetConfig {
    /// A loopback address that serves metrics besides the unix socket.
    pub metrics: Option<SocketAddr>,
    /// Where replicas and journals lie.
    pub store: PathBuf,
    /// Where agents connect.
    pub listen: SocketAddr,
    /// Control, `HOST:PORT`.
    pub control: String,
    /// Space of the store that is never used, bytes.
    pub reserve_bytes: u64,
    /// Memory for frames on their way, bytes.
    pub memory_bytes: u64,
    /// Most that is written to a volume of an opened recovery point, bytes.
    pub scratch_bytes: u64,
    /// Replica volumes on devices.
    pub devices: Vec<ReplicaDevice>,
}

/// `[[device]]` in `target.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ReplicaDevice {
    /// Name of the server.
    pub server: String,
    /// Name of the volume.
    pub volume: String,
    /// The device node.
    pub path: PathBuf,
}

/// `agent.toml`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentConfig {
    /// A loopback address that serves metrics besides the unix socket.
    pub metrics: Option<SocketAddr>,
    /// Control, `HOST:PORT`.
    pub control: String,
    /// Name of this server.
    pub name: String,
    /// Memory for blocks on their way, bytes.
    pub memory_bytes: u64,
    /// Threads that digest and compress.
    pub workers: usize,
    /// The only devices that may be protected; empty for all of the inventory.
    pub allow: Vec<PathBuf>,
}

impl ControlConfig {
    /// Reads `control.toml` and the drop-ins.
    pub fn load(paths: &Paths) -> Result<Self, ConfigError> {
        Self::of(gather::<ControlPart>(paths)?)
    }

    /// What the text of the role's own file alone says; `file` is how to call it.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        Self::of(document::own(file, text)?)
    }

    fn of(mut said: Gathered<ControlPart>) -> Result<Self, ConfigError> {
        let mut all = ControlPart::default();
        for part in std::mem::take(&mut said.parts) {
            all = ControlPart {
                metrics: part.metrics.over(all.metrics),
                listen: part.listen.or(all.listen),
                store: part.store.or(all.store),
                certificate_life: part.certificate_life.or(all.certificate_life),
            };
        }
        let life =
            all.certificate_life.map_or(CERTIFICATE_LIFE_MAX, |Seconds(s)| Duration::from_secs(s));
        if life.is_zero() || life > CERTIFICATE_LIFE_MAX {
            return Err(said.out_of_bounds("certificate_life", "more than 0, at most 30d"));
        }
        let listen = all.listen.ok_or_else(|| said.missing("listen"))?;
        let metrics = all.metrics.checked(&said)?;
        Ok(Self { metrics, listen, store: all.store, certificate_life: life })
    }
}

impl TargetConfig {
    /// Reads `target.toml` and the drop-ins.
    pub fn load(paths: &Paths) -> Result<Self, ConfigError> {
        Self::of(gather::<TargetPart>(paths)?)
    }

    /// What the text of the role's own file alone says; `file` is how to call it.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        Self::of(document::own(file, text)?)
    }

    fn of(mut said: Gathered<TargetPart>) -> Result<Self, ConfigError> {
        let mut all = TargetPart::default();
        for part in std::mem::take(&mut said.parts) {
            let mut device = all.device;
            device.extend(part.device);
            all = TargetPart {
                metrics: part.metrics.over(all.metrics),
                store: part.store.or(all.store),
                listen: part.listen.or(all.listen),
                control: part.control.or(all.control),
                reserve: part.reserve.or(all.reserve),
                scratch: part.scratch.or(all.scratch),
                memory: part.memory.or(all.memory),
                device,
            };
        }
        let missing = |key| said.missing(key);
        let memory_bytes = all.memory.map_or(TARGET_MEMORY_BYTES, |Size(bytes)| bytes);
        if memory_bytes < MEMORY_BYTES_MIN {
            return Err(said.out_of_bounds("memory", "at least 16MiB"));
        }
        Ok(Self {
            metrics: all.metrics.checked(&said)?,
            store: all.store.ok_or_else(|| missing("store"))?,
            listen: all.listen.ok_or_else(|| missing("listen"))?,
            control: all.control.ok_or_else(|| missing("control"))?,
            reserve_bytes: all.reserve.map_or(RESERVE_BYTES, |Size(bytes)| bytes),
            scratch_bytes: all.scratch.map_or(SCRATCH_BYTES, |Size(bytes)| bytes),
            memory_bytes,
            devices: all.device,
        })
    }
}

impl AgentConfig {
    /// Reads `agent.toml` and the drop-ins.
    pub fn load(paths: &Paths) -> Result<Self, ConfigError> {
        Self::of(gather::<AgentPart>(paths)?)
    }

    /// What the text of the role's own file alone says; `file` is how to call it.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        Self::of(document::own(file, text)?)
    }

    fn of(mut said: Gathered<AgentPart>) -> Result<Self, ConfigError> {
        let mut all = AgentPart::default();
        for part in std::mem::take(&mut said.parts) {
            let mut allow = all.allow;
            allow.extend(part.allow);
            all = AgentPart {
                metrics: part.metrics.over(all.metrics),
                control: part.control.or(all.control),
                name: part.name.or(all.name),
                memory: part.memory.or(all.memory),
                workers: part.workers.or(all.workers),
                allow,
            };
        }
        let missing = |key| said.missing(key);
        let memory_bytes = all.memory.map_or(AGENT_MEMORY_BYTES, |Size(bytes)| bytes);
        if memory_bytes < MEMORY_BYTES_MIN {
            return Err(said.out_of_bounds("memory", "at least 16MiB"));
        }
        let workers = all.workers.unwrap_or(WORKERS);
        if !(1..=WORKERS_MAX).contains(&workers) {
            return Err(said.out_of_bounds("workers", "1 to 64"));
        }
        Ok(Self {
            metrics: all.metrics.checked(&said)?,
            control: all.control.ok_or_else(|| missing("control"))?,
            name: all.name.ok_or_else(|| missing("name"))?,
            memory_bytes,
            workers,
            allow: all.allow,
        })
    }
}

/// The table `metrics` of every role.
const METRICS: (&str, &[&str]) = ("metrics", &["listen"]);

/// What one file says of metrics.
#[derive(Default, Deserialize)]
#[serde(default)]
struct MetricsPart {
    listen: Option<SocketAddr>,
}

impl MetricsPart {
    fn over(self, before: Self) -> Self {
        Self { listen: self.listen.or(before.listen) }
    }

    /// Only this host may ask: metrics tell names, and have no password.
    fn checked<S>(&self, said: &Gathered<S>) -> Result<Option<SocketAddr>, ConfigError> {
        match self.listen {
            Some(address) if !address.ip().is_loopback() => Err(said.out_of_bounds(
                "metrics",
                "`listen` is a loopback address, such as 127.0.0.1:9743",
            )),
            listen => Ok(listen),
        }
    }
}

/// What one file says of control.
#[derive(Default, Deserialize)]
#[serde(default)]
struct ControlPart {
    metrics: MetricsPart,
    listen: Option<SocketAddr>,
    store: Option<PathBuf>,
    certificate_life: Option<Seconds>,
}

/// What one file says of the target.
#[derive(Default, Deserialize)]
#[serde(default)]
struct TargetPart {
    metrics: MetricsPart,
    store: Option<PathBuf>,
    listen: Option<SocketAddr>,
    control: Option<String>,
    reserve: Option<Size>,
    scratch: Option<Size>,
    memory: Option<Size>,
    device: Vec<ReplicaDevice>,
}

/// What one file says of the agent.
#[derive(Default, Deserialize)]
#[serde(default)]
struct AgentPart {
    metrics: MetricsPart,
    control: Option<String>,
    name: Option<String>,
    memory: Option<Size>,
    workers: Option<usize>,
    allow: Vec<PathBuf>,
}

impl Schema for ControlPart {
    const ROLE: &'static str = "control";
    const KEYS: &'static [&'static str] = &["listen", "store", "certificate_life", "metrics"];
    const TABLES: &'static [(&'static str, &'static [&'static str])] = &[METRICS];
}

impl Schema for TargetPart {
    const ROLE: &'static str = "target";
    const KEYS: &'static [&'static str] =
        &["store", "listen", "control", "reserve", "memory", "scratch", "device", "metrics"];
    const TABLES: &'static [(&'static str, &'static [&'static str])] =
        &[("device", &["server", "volume", "path"]), METRICS];
}

impl Schema for AgentPart {
    const ROLE: &'static str = "agent";
    const KEYS: &'static [&'static str] =
        &["control", "name", "memory", "workers", "allow", "metrics"];
    const TABLES: &'static [(&'static str, &'static [&'static str])] = &[];
}

/// A size as people type it.
struct Size(u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_bytes(&text).map(Self).map_err(serde::de::Error::custom)
    }
}

/// A span of time as people type it.
struct Seconds(u64);

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_seconds(&text).map(Self).map_err(serde::de::Error::custom)
    }
}
