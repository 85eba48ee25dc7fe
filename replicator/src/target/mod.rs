//! The target: receives, journals, commits, promotes.

use secondsite_control::api::{TargetAssignment, TargetReport};
use secondsite_control::pki::Identity;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// A replica volume that is a block device of this host (`[[device]]` in target.toml).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaDevice {
    /// Name of the server.
    pub server: String,
    /// Name of the volume.
    pub volume: String,
    /// The device node.
    pub path: PathBuf,
}

/// What a target needs to know besides its assignment.
pub struct TargetConfig {
    /// Key and certificate.
    pub identity: Arc<Identity>,
    /// Where replicas and journals lie.
    pub store: PathBuf,
    /// Where agents connect.
    pub listen: SocketAddr,
    /// Replica volumes on devices; all others are sparse files in the store.
    pub devices: Vec<ReplicaDevice>,
    /// Space of the store that is never used, bytes.
    pub reserve_bytes: u64,
    /// Memory for frames on their way over all sessions, bytes.
    pub memory_bytes: u64,
}

/// The target's data plane. All methods return at once.
pub struct Target {}

impl Target {
    /// Listens, and recovers what the assignment names. `changed` is called (from any thread) when
    /// the report changed.
    pub fn start(
        config: TargetConfig,
        assignment: TargetAssignment,
        changed: Box<dyn Fn() + Send + Sync>,
    ) -> anyhow::Result<Self> {
        let _ = (config, assignment, changed);
        todo!()
    }
    /// Follows this assignment from now on; sessions it no longer allows end.
    pub fn assign(&self, assignment: TargetAssignment) {
        let _ = assignment;
        todo!()
    }
    /// What is there.
    pub fn report(&self) -> TargetReport {
        todo!()
    }
    /// A renewed certificate, for new sessions.
    pub fn set_identity(&self, identity: Arc<Identity>) {
        let _ = identity;
        todo!()
    }
    /// Milliseconds since the data loop last went round: feeds the watchdog.
    pub fn idle_millis(&self) -> u64 {
        todo!()
    }
    /// Ends all sessions and threads.
    pub fn stop(self) {
        todo!()
    }
}
