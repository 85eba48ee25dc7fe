//! The target's side of the link to control: assignments and reports.

use super::control_link::{LinkError, POLL_SECONDS, Side};
use super::state::StateDir;
use crate::target::{Observation, Target};
use secondsite_control::api::TargetAssignment;
use secondsite_control::client::Client;
use secondsite_control::pki::Identity;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Document: the last assignment.
pub const ASSIGNMENT: &str = "assignment";

/// The target as control sees it.
pub struct TargetSide {
    target: Target,
    state: StateDir,
    /// Only the link's thread writes it, and only it decides by it.
    version: AtomicU64,
}

impl TargetSide {
    /// A target that was started with the assignment of this version.
    pub fn new(target: Target, state: StateDir, version: u64) -> Self {
        Self { target, state, version: AtomicU64::new(version) }
    }

    /// The target, to be stopped when nothing else uses this any more.
    pub fn into_target(self) -> Target {
        self.target
    }

    /// What metrics show of the data plane.
    pub fn observe(&self) -> Observation {
        self.target.observe()
    }

    /// One line for init.
    pub fn status(&self) -> String {
        let (volumes, connected, stopped) = self.target.counts();
        let mut text = format!("{connected} of {volumes} volumes connected");
        if stopped > 0 {
            text += &format!(", {stopped} stopped");
        }
        text
    }
}

impl Side for TargetSide {
    const ROLE: &'static str = "target";

    async fn poll(&self, client: &Client) -> Result<(), LinkError> {
        let version = self.version.load(Ordering::Relaxed);
        let poll = client.target_poll(version, POLL_SECONDS).await?;
        if let Some(assignment) = poll.assignment {
            let (version, servers) = (assignment.version, assignment.servers.len());
            tracing::info!(version, servers, "new assignment");
            self.state.write::<TargetAssignment>(ASSIGNMENT, &assignment)?;
            self.version.store(assignment.version, Ordering::Relaxed);
            self.target.assign(assignment);
        }
        Ok(())
    }

    async fn report(&self, client: &Client) -> Result<(), LinkError> {
        let report = self.target.report();
        Ok(client.target_report(&report).await?)
    }

    async fn tend(&self, _client: &Client) -> Result<(), LinkError> {
        Ok(())
    }

    fn renews(&self) -> bool {
        true
    }

    fn set_identity(&self, identity: Arc<Identity>) {
        self.target.set_identity(identity);
    }
}
