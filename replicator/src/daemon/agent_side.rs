//! The agent's side of the link to control: assignments, orders, reports.
//!
//! Invariants: an assignment is durable before it is followed; only devices that this agent itself
//! offered, and that its allow list admits, are ever opened; on another machine than the enrolled
//! one nothing is followed and nothing renewed.

use super::control_link::{LinkError, POLL_SECONDS, Side, lock};
use super::orders::Orders;
use super::state::StateDir;
use crate::cli::failure::Failure;
use crate::inventory;
use crate::source::{self, Source};
use secondsite_control::api::{
    AgentAssignment, AgentReport, InventoryDevice, VolumeAssignment, VolumePhase, VolumeReport,
};
use secondsite_control::client::Client;
use secondsite_control::codes::Reason;
use secondsite_control::pki::Identity;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Document: the last assignment.
pub const ASSIGNMENT: &str = "assignment";
/// Document: [`super::orders::Ledger`].
pub const ORDERS: &str = "orders";
/// Document: [`Enrolment`].
pub const ENROLMENT: &str = "enrolment";

/// What the agent was enrolled with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolment {
    /// Digest of the machine, 64 hex digits.
    pub machine: String,
    /// The device nodes that were offered.
    pub offered: Vec<String>,
}

impl Enrolment {
    /// Remembers that these devices were offered.
    pub fn offer(&mut self, devices: &[InventoryDevice]) {
        for device in devices {
            if !self.offered.contains(&device.path) {
                self.offered.push(device.path.clone());
            }
        }
    }
}

/// The agent as control sees it.
pub struct AgentSide {
    source: Option<Source>,
    /// Why nothing runs at all.
    stopped: Option<String>,
    state: StateDir,
    allow: Vec<PathBuf>,
    filter_dir: PathBuf,
    /// Control as this agent dials it.
    control: String,
    inner: Mutex<Inner>,
}

struct Inner {
    version: u64,
    orders: Orders,
    refused: Vec<VolumeReport>,
    enrolment: Enrolment,
    /// The inventory that control has from this process.
    inventory: Option<Vec<InventoryDevice>>,
}

impl AgentSide {
    /// Goes on with the last assignment, if there is one. Without a source nothing is followed, for
    /// the reason `stopped`.
    pub fn new(
        source: Result<Source, String>,
        state: StateDir,
        enrolment: Enrolment,
        allow: Vec<PathBuf>,
        filter_dir: PathBuf,
        control: String,
    ) -> Result<Self, Failure> {
        let orders = Orders::new(state.read(ORDERS)?.unwrap_or_default());
        let assignment: Option<AgentAssignment> = state.read(ASSIGNMENT)?;
        let (source, stopped) = match source {
            Ok(source) => (Some(source), None),
            Err(why) => (None, Some(why)),
        };
        let inner = Mutex::new(Inner {
            version: 0,
            orders,
            refused: Vec::new(),
            enrolment,
            inventory: None,
        });
        let side = Self { source, stopped, state, allow, filter_dir, control, inner };
        if let Some(assignment) = assignment {
            side.follow(assignment);
        }
        Ok(side)
    }

    /// The source, to be stopped when nothing else uses this any more.
    pub fn into_source(self) -> Option<Source> {
        self.source
    }

    /// One line for init.
    pub fn status(&self) -> String {
        let report = self.current();
        if let Some(why) = report.stopped {
            return format!("stopped: {why}");
        }
        let phases = [
            (VolumePhase::Following, "following"),
            (VolumePhase::FirstCopy, "in first copy"),
            (VolumePhase::Comparing, "comparing"),
            (VolumePhase::Connecting, "connecting"),
            (VolumePhase::Stopped, "stopped"),
        ];
        let count = |phase| report.volumes.iter().filter(|volume| volume.phase == phase).count();
        let parts: Vec<String> = phases
            .iter()
            .map(|(phase, word)| (count(*phase), word))
            .filter(|(count, _)| *count > 0)
            .map(|(count, word)| format!("{count} {word}"))
            .collect();
        if parts.is_empty() { "no volume is protected".into() } else { parts.join(", ") }
    }

    /// What metrics show of the data plane, and how many volumes are refused.
    pub fn observe(&self) -> (Option<source::Observation>, usize) {
        (self.source.as_ref().map(Source::observe), lock(&self.inner).refused.len())
    }

    fn current(&self) -> AgentReport {
        let mut report = match &self.source {
            Some(source) => source.report(),
            None => AgentReport {
                agent_version: env!("CARGO_PKG_VERSION").into(),
                volumes: Vec::new(),
                orders: Default::default(),
                stopped: None,
            },
        };
        report.stopped = report.stopped.or_else(|| self.stopped.clone());
        report.volumes.extend(lock(&self.inner).refused.iter().cloned());
        report
    }

    fn follow(&self, mut assignment: AgentAssignment) {
        let mut guard = lock(&self.inner);
        let inner = &mut *guard;
        inner.version = assignment.version;
        inner.refused.clear();
        assignment.volumes.retain(|volume| match refusal(volume, &inner.enrolment, &self.allow) {
            None => true,
            Some((code, why)) => {
                let (id, name, path) = (&volume.id, &volume.name, &volume.path);
                tracing::error!(volume = id, name, path, "{why}");
                inner.refused.push(refused_volume(volume, code, why));
                false
            }
        });
        drop(guard);
        assignment.target = assignment.target.map(|target| reachable(&target, &self.control));
        if let Some(source) = &self.source {
            source.assign(assignment);
        }
    }
}

impl Side for AgentSide {
    const ROLE: &'static str = "agent";

    async fn poll(&self, client: &Client) -> Result<(), LinkError> {
        let (version, seen) = {
            let inner = lock(&self.inner);
            (inner.version, inner.orders.seen())
        };
        let poll = client.agent_poll(version, seen, POLL_SECONDS).await?;
        if let Some(assignment) = poll.assignment {
            let (version, volumes) = (assignment.version, assignment.volumes.len());
            tracing::info!(version, volumes, "new assignment");
            self.state.write(ASSIGNMENT, &assignment)?;
            self.follow(assignment);
        }
        for order in poll.orders {
            let new = lock(&self.inner).orders.receive(order);
            // Where nothing runs, orders wait at control.
            if let (Some(order), Some(source)) = (new, &self.source) {
                tracing::info!(order = order.number, what = ?order.what, "new order");
                source.order(order);
            }
        }
        Ok(())
    }

    async fn report(&self, client: &Client) -> Result<(), LinkError> {
        let mut report = self.current();
        let ledger = {
            let mut inner = lock(&self.inner);
            inner.orders.fold(&mut report).then(|| inner.orders.ledger().clone())
        };
        if let Some(ledger) = ledger {
            self.state.write(ORDERS, &ledger)?;
        }
        client.agent_report(&report).await?;
        let delivered = {
            let mut inner = lock(&self.inner);
            let up_to = inner.orders.delivered(&report.orders);
            up_to.map(|up_to| (up_to, inner.orders.ledger().clone()))
        };
        if let Some((up_to, ledger)) = delivered {
            self.state.write(ORDERS, &ledger)?;
            if let Some(source) = &self.source {
                source.forget_orders(up_to);
            }
        }
        Ok(())
    }

    /// Offers devices that came since. An offer is durable before control hears it, since control's
    /// choice is checked against it.
    async fn tend(&self, client: &Client) -> Result<(), LinkError> {
        if self.source.is_none() {
            return Ok(());
        }
        let (allow, filter) = (self.allow.clone(), self.filter_dir.clone());
        // lsblk and the devices themselves may be slow: not on the thread of the other loops.
        let devices =
            match tokio::task::spawn_blocking(move || inventory::take(&allow, &filter)).await {
                Ok(devices) => devices?,
                Err(_) => return Ok(()),
            };
        let enrolment = {
            let mut inner = lock(&self.inner);
            if inner.inventory.as_ref() == Some(&devices) {
                return Ok(());
            }
            let before = inner.enrolment.offered.len();
            inner.enrolment.offer(&devices);
            (inner.enrolment.offered.len() > before).then(|| inner.enrolment.clone())
        };
        if let Some(enrolment) = enrolment {
            self.state.write(ENROLMENT, &enrolment)?;
        }
        client.agent_inventory(&devices).await?;
        lock(&self.inner).inventory = Some(devices);
        Ok(())
    }

    fn renews(&self) -> bool {
        self.source.is_some()
    }

    fn set_identity(&self, identity: Arc<Identity>) {
        if let Some(source) = &self.source {
            source.set_identity(identity);
        }
    }
}

/// Why a volume that control chose is not opened.
fn refusal(
    volume: &VolumeAssignment,
    enrolment: &Enrolment,
    allow: &[PathBuf],
) -> Option<(Reason, &'static str)> {
    if !enrolment.offered.contains(&volume.path) {
        let why = "this agent never offered this device; it is not opened";
        return Some((Reason::DeviceNotOffered, why));
    }
    // It is written to: as careful as with a volume.
    if let Some(reserve) = &volume.reserve
        && !(enrolment.offered.contains(reserve) && inventory::allows(allow, Path::new(reserve)))
    {
        let why = "its reserve was never offered by this agent, or is not in the `allow` list of \
                   agent.toml; neither is opened";
        return Some((Reason::DeviceNotAllowed, why));
    }
    (!inventory::allows(allow, Path::new(&volume.path))).then_some((
        Reason::DeviceNotAllowed,
        "not in the `allow` list of agent.toml; it is not opened",
    ))
}

fn refused_volume(volume: &VolumeAssignment, code: Reason, reason: &str) -> VolumeReport {
    VolumeReport {
        id: volume.id.clone(),
        phase: VolumePhase::Stopped,
        reason: reason.into(),
        code: Some(code),
        tracker: "none".into(),
        tracker_reason: String::new(),
        tracker_code: None,
        cut: "none".into(),
        progress_bytes: None,
        backlog_bytes: 0,
        sent_bytes: 0,
        compares: 0,
    }
}

/// A target that listens on every address of control's host is dialled where control is.
pub fn reachable(target: &str, control: &str) -> String {
    let unspecified = ["0.0.0.0:", "[::]:"].iter().find_map(|any| target.strip_prefix(any));
    match (unspecified, control.rsplit_once(':')) {
        (Some(port), Some((host, _))) => format!("{host}:{port}"),
        _ => target.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::reachable;

    #[test]
    fn a_target_on_every_address_is_dialled_where_control_is() {
        assert_eq!(reachable("0.0.0.0:7444", "dr1:7443"), "dr1:7444");
        assert_eq!(reachable("[::]:7444", "[2001:db8::1]:7443"), "[2001:db8::1]:7444");
        assert_eq!(reachable("10.0.0.9:7444", "dr1:7443"), "10.0.0.9:7444");
    }
}
