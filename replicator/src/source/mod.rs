//! The source: reads what changed, ships it, cuts epochs.

use secondsite_control::api::{AgentAssignment, AgentReport, Order};
use secondsite_control::pki::Identity;
use secondsite_tracker::freeze::Freezer;
use std::path::PathBuf;
use std::sync::Arc;

/// What an agent's data plane needs to know besides its assignment.
pub struct SourceConfig {
    /// Key and certificate; replaced by [`Source::set_identity`] on renewal.
    pub identity: Arc<Identity>,
    /// Digest of the machine's identity, as enrolled.
    pub machine: [u8; 32],
    /// Parent of the pin folders, one a volume: `/sys/fs/bpf/secondsite/ID`.
    pub pin_dir: PathBuf,
    /// Memory for blocks on their way, bytes.
    pub memory_bytes: u64,
    /// Threads that digest and compress.
    pub workers: usize,
    /// The freezer, started before any thread.
    pub freezer: Freezer,
}

/// The agent's data plane: threads that follow an assignment. All methods return at once.
pub struct Source {}

impl Source {
    /// Starts with nothing assigned. `changed` is called (from any thread) when the report changed.
    pub fn start(config: SourceConfig, changed: Box<dyn Fn() + Send + Sync>) -> Self {
        let _ = (config, changed);
        todo!()
    }
    /// Follows this assignment from now on; volumes that it no longer has are stopped, their pins removed.
    pub fn assign(&self, assignment: AgentAssignment) {
        let _ = assignment;
        todo!()
    }
    /// Takes an order; its state stands in the report until [`Self::forget_orders`].
    pub fn order(&self, order: Order) {
        let _ = order;
        todo!()
    }
    /// Control knows the final state of orders up to this number.
    pub fn forget_orders(&self, up_to: u64) {
        let _ = up_to;
        todo!()
    }
    /// What is going on.
    pub fn report(&self) -> AgentReport {
        todo!()
    }
    /// A renewed certificate.
    pub fn set_identity(&self, identity: Arc<Identity>) {
        let _ = identity;
        todo!()
    }
    /// Milliseconds since the data loop last went round: feeds the watchdog.
    pub fn idle_millis(&self) -> u64 {
        todo!()
    }
    /// Ends all threads; marking goes on in the kernel.
    pub fn stop(self) {
        todo!()
    }
}
