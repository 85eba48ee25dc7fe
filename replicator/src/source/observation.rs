//! What the data plane shows of itself to metrics: snapshots and counters, taken without waiting.

use crate::source::volume::Status;
use prometheus_client::metrics::histogram::Histogram;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bounds of the histogram of freezes, seconds; none is longer than half a second but by trouble.
const FREEZE_SECONDS: [f64; 10] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0];

/// The data plane at one time.
#[derive(Debug, Clone)]
pub struct Observation {
    /// A row an assigned volume.
    pub volumes: Vec<VolumeObservation>,
    /// Freezes so far.
    pub freezes: Freezes,
    /// Memory for blocks on their way.
    pub memory_bytes: u64,
    /// Of it, what holds blocks now.
    pub memory_used_bytes: u64,
}

/// One volume.
#[derive(Debug, Clone)]
pub struct VolumeObservation {
    /// Its name.
    pub name: String,
    /// What people see.
    pub status: Status,
    /// Its size.
    pub size_bytes: u64,
    /// Bytes not yet committed at the target.
    pub backlog_bytes: u64,
    /// Bytes read from it.
    pub read_bytes: u64,
}

/// Freezes so far; clones count into one.
#[derive(Debug, Clone)]
pub struct Freezes {
    /// Of those that held until the cut was made.
    pub durations: Histogram,
    failures: Arc<AtomicU64>,
}

impl Default for Freezes {
    fn default() -> Self {
        Self { durations: Histogram::new(FREEZE_SECONDS), failures: Arc::default() }
    }
}

impl Freezes {
    /// Those that failed, or ended too early.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    pub(super) fn failed(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }
}
