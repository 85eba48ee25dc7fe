//! Where configuration, state and run-time files lie.
//!
//! With the default configuration folder these are the system's; with any other everything lies
//! below it, so that both sites and several servers can run side by side on one machine.

use crate::metrics::Sockets;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// The configuration folder unless `--config-dir` names another.
pub const DEFAULT_CONFIG_DIR: &str = "/etc/secondsite";
const DEFAULT_STATE_DIR: &str = "/var/lib/secondsite";
const DEFAULT_RUN_DIR: &str = "/run/secondsite";

/// All folders of one configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// Configuration files.
    pub config: PathBuf,
    /// What must outlive a reboot.
    pub state: PathBuf,
    /// Locks and sockets.
    pub run: PathBuf,
    /// Keys and certificates.
    pub pki: PathBuf,
}

impl Paths {
    /// The folders that belong to a configuration folder.
    pub fn of(config_dir: &Path) -> Self {
        // Symbolic links are resolved, so that two names of one folder share one lock.
        let config = config_dir
            .canonicalize()
            .or_else(|_| std::path::absolute(config_dir))
            .unwrap_or_else(|_| config_dir.to_path_buf());
        let system =
            config == Path::new(DEFAULT_CONFIG_DIR) || config_dir == Path::new(DEFAULT_CONFIG_DIR);
        let (state, run) = if system {
            (DEFAULT_STATE_DIR.into(), DEFAULT_RUN_DIR.into())
        } else {
            (config.join("state"), config.join("run"))
        };
        Self { pki: config.join("pki"), config, state, run }
    }

    /// Whether these are the system's.
    pub fn is_default(&self) -> bool {
        self.run == Path::new(DEFAULT_RUN_DIR)
    }

    /// The file of a role: `control.toml`, `target.toml`, `agent.toml`.
    pub fn file(&self, role: &str) -> PathBuf {
        self.config.join(format!("{role}.toml"))
    }

    /// Where opened recovery points are served over NBD.
    pub fn nbd(&self) -> PathBuf {
        self.run.join("nbd.sock")
    }

    /// Where a daemon answers the commands of this host.
    pub fn api(&self, role: &str) -> PathBuf {
        self.run.join(format!("{role}.sock"))
    }

    /// Where a daemon serves its metrics.
    pub fn metrics(&self, role: &str, tcp: Option<SocketAddr>) -> Sockets {
        Sockets { unix: self.run.join(format!("{role}.metrics")), tcp }
    }

    /// What to add to a command so that it uses this configuration; empty for the default.
    pub fn argument(&self) -> String {
        if self.is_default() {
            String::new()
        } else {
            format!(" --config-dir {}", self.config.display())
        }
    }
}
