//! What the target's data plane shows of itself to metrics.

use super::entry::Entry;
use super::site::Site;
use super::state::EpochFacts;
use secondsite_format::ids::{ServerId, VolumeId};
use secondsite_format::message::RefusalCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Codes of refusals and their words.
const CODES: [(RefusalCode, &str); 11] = [
    (RefusalCode::Protocol, "protocol"),
    (RefusalCode::NotAllowed, "not_allowed"),
    (RefusalCode::OtherMachine, "other_machine"),
    (RefusalCode::Mismatch, "mismatch"),
    (RefusalCode::OutOfOrder, "out_of_order"),
    (RefusalCode::Malformed, "malformed"),
    (RefusalCode::Unproven, "unproven"),
    (RefusalCode::NoSpace, "no_space"),
    (RefusalCode::Storage, "storage"),
    (RefusalCode::Replaced, "replaced"),
    (RefusalCode::Stopping, "stopping"),
];

/// The data plane at one time.
#[derive(Debug, Clone)]
pub struct Observation {
    /// A row a volume of the store.
    pub volumes: Vec<VolumeObservation>,
    /// Free space of the store; none if it cannot be asked.
    pub free_bytes: Option<u64>,
    /// Of it, what is never used.
    pub reserve_bytes: u64,
    /// Of it, what promotion may still write.
    pub promised_bytes: u64,
    /// Memory for frames on their way.
    pub memory_bytes: u64,
    /// Of it, what holds frames now.
    pub memory_used_bytes: u64,
    /// Refusals by code.
    pub refusals: Vec<(&'static str, u64)>,
    /// Connections that showed no certificate of an agent.
    pub handshake_failures: u64,
}

/// One volume.
#[derive(Debug, Clone)]
pub struct VolumeObservation {
    /// Its server's name; its id if no assignment names it.
    pub server: String,
    /// Its name; its id if no assignment names it.
    pub volume: String,
    /// Whether an agent is connected.
    pub connected: bool,
    /// Whether it cannot go on here.
    pub stopped: bool,
    /// Whether the first copy is complete.
    pub copied: bool,
    /// Bytes of the journal.
    pub journal_bytes: u64,
    /// When the newest committed point was cut, nanoseconds since 1970.
    pub committed_ns: Option<u64>,
    /// When the point was cut that the replica volume equals.
    pub replica_ns: Option<u64>,
    /// Epochs committed since the start.
    pub commits: u64,
    /// Promotions since the start.
    pub promotions: u64,
    /// Bytes received since the start.
    pub received_bytes: u64,
}

/// Counts refusals by code.
#[derive(Debug, Default)]
pub struct Refusals([AtomicU64; CODES.len()]);

impl Refusals {
    pub(super) fn count(&self, code: RefusalCode) {
        if let Some(index) = CODES.iter().position(|(known, _)| *known == code) {
            self.0[index].fetch_add(1, Ordering::Relaxed);
        }
    }

    fn all(&self) -> Vec<(&'static str, u64)> {
        let counts = self.0.iter().map(|count| count.load(Ordering::Relaxed));
        CODES.iter().map(|(_, word)| *word).zip(counts).collect()
    }
}

impl Site {
    /// What metrics show.
    pub fn observe(&self, handshake_failures: u64) -> Observation {
        let (reserve_bytes, promised_bytes) = self.space.state();
        let (memory_bytes, memory_used_bytes) = self.budget.state();
        Observation {
            volumes: self.observe_volumes(),
            free_bytes: self.free_bytes(),
            reserve_bytes,
            promised_bytes,
            memory_bytes,
            memory_used_bytes,
            refusals: self.refusals.all(),
            handshake_failures,
        }
    }

    fn observe_volumes(&self) -> Vec<VolumeObservation> {
        let assignment = self.assignment();
        let time = |facts: &EpochFacts| facts.time_ns;
        let row = |((server, volume), entry): ((ServerId, VolumeId), Arc<Entry>)| {
            let report = entry.report(volume);
            let known = assignment.servers.iter().find(|known| known.id == format!("{server}"));
            let named = known.and_then(|known| known.volumes.iter().find(|v| v.id == report.id));
            let times = entry.keeper().map(|keeper| {
                let held = keeper.volume();
                (held.durable().map(time), held.record().base.as_ref().map(time))
            });
            let (committed_ns, replica_ns) = times.unwrap_or_default();
            let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
            VolumeObservation {
                server: known.map_or_else(|| server.to_string(), |known| known.name.clone()),
                volume: named.map_or_else(|| report.id.clone(), |named| named.name.clone()),
                connected: report.connected,
                stopped: report.error.is_some(),
                copied: report.copied,
                journal_bytes: report.journal_bytes,
                committed_ns,
                replica_ns,
                commits: count(&entry.counts.commits),
                promotions: count(&entry.counts.promotions),
                received_bytes: count(&entry.counts.received_bytes),
            }
        };
        self.all().into_iter().map(row).collect()
    }
}
