//! The source: reads what changed, ships it, cuts epochs.
//!
//! Threads: one coordinator ([`coordinator`]: rounds, orders, freezes), one shipper a volume
//! ([`shipper`]: session, reads, first copy, compare, commit), and a shared pool of workers
//! ([`pipeline`]: zeros, digests, compression). Coordinator and shippers work in steps over the
//! traits of [`seams`]; this module only gives them threads and keeps the assignment.

mod attach;
mod backoff;
pub mod budget;
pub mod buffers;
mod collect;
mod compare;
pub mod coordinator;
mod copy;
mod failure;
mod filter;
mod ledger;
pub mod link;
mod observation;
pub mod orders;
pub mod pipeline;
mod proof;
mod reader;
pub mod resume;
pub mod round;
pub mod runs;
pub mod seams;
mod session;
mod ship;
pub mod shipper;
mod stream;
mod threads;
mod verify;
pub mod volume;

pub use crate::source::observation::{Observation, VolumeObservation};

use crate::source::attach::CountedFreezer;
use crate::source::buffers::Memory;
use crate::source::coordinator::Protected;
use crate::source::link::Where;
use crate::source::observation::Freezes;
use crate::source::orders::Orders;
use crate::source::pipeline::Workers;
use crate::source::threads::{Runner, VolumeThread};
use crate::source::volume::{Bell, Status, lock};
use secondsite_control::api::{AgentAssignment, AgentReport, Order, VolumeReport};
use secondsite_control::pki::Identity;
use secondsite_tracker::freeze::Freezer;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What an agent's data plane needs to know besides its assignment.
pub struct SourceConfig {
    /// Key and certificate; replaced by [`Source::set_identity`] on renewal.
    pub identity: Arc<Identity>,
    /// Digest of the machine's identity, as enrolled.
    pub machine: [u8; 32],
    /// Parent of the pin folders, one a volume: `/sys/fs/bpf/secondsite/ID`.
    pub pin_dir: PathBuf,
    /// The folder of the filter, if one runs.
    pub filter_dir: PathBuf,
    /// Memory for blocks on their way, bytes.
    pub memory_bytes: u64,
    /// Threads that digest and compress.
    pub workers: usize,
    /// The freezer, started before any thread.
    pub freezer: Freezer,
}

/// How long [`Source::stop`] waits for threads; what they hold open until they end does no harm.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// The agent's data plane: threads that follow an assignment. All methods return at once.
pub struct Source {
    runner: Arc<Runner>,
    coordinator: Option<std::thread::JoinHandle<()>>,
    volumes: Mutex<BTreeMap<String, VolumeThread>>,
    freezes: Freezes,
}

impl Source {
    /// Starts with nothing assigned. `changed` is called (from any thread) when the report changed.
    ///
    /// # Panics
    /// If the system gives neither memory nor threads: the daemon cannot do anything then.
    pub fn start(config: SourceConfig, changed: Box<dyn Fn() + Send + Sync>) -> Self {
        let memory = Memory::new(config.memory_bytes).expect("memory for buffers");
        let workers = Workers::start(config.workers.max(1)).expect("worker threads");
        let runner = Arc::new(Runner {
            place: Arc::new(Mutex::new(Where { target: None, identity: Some(config.identity) })),
            machine: config.machine,
            pin_dir: config.pin_dir,
            filter_dir: config.filter_dir,
            memory: Arc::new(memory),
            workers: Arc::new(workers),
            protected: Arc::new(Mutex::new(Protected::default())),
            orders: Arc::new(Mutex::new(Orders::default())),
            bell: Arc::new(Bell::default()),
            changed: Arc::from(changed),
            clock: Arc::new(threads::SystemEnv::new()),
            stopping: false.into(),
        });
        let freezes = Freezes::default();
        let freezer = CountedFreezer { freezer: config.freezer, freezes: freezes.clone() };
        let coordinator = Some(runner.clone().coordinate(freezer));
        Self { runner, coordinator, volumes: Mutex::default(), freezes }
    }

    /// Follows this assignment from now on; volumes that it no longer has are stopped, their pins removed.
    pub fn assign(&self, assignment: AgentAssignment) {
        self.runner.assign(&mut lock(&self.volumes), assignment);
    }

    /// Takes an order; its state stands in the report until [`Self::forget_orders`].
    pub fn order(&self, order: Order) {
        if lock(&self.runner.orders).take(&order) {
            self.runner.bell.ring();
            (self.runner.changed)();
        }
    }

    /// Control knows the final state of orders up to this number.
    pub fn forget_orders(&self, up_to: u64) {
        lock(&self.runner.orders).forget(up_to);
    }

    /// What is going on.
    pub fn report(&self) -> AgentReport {
        let protected = lock(&self.runner.protected);
        let volumes = protected.faces.iter().map(|face| {
            let running = protected.volumes.iter().find(|volume| volume.id() == face.id);
            report(face.id.to_string(), face.status(), running.map_or(0, |v| v.backlog_bytes()))
        });
        AgentReport {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            volumes: volumes.collect(),
            orders: lock(&self.runner.orders).states(),
            stopped: None,
        }
    }

    /// What metrics show.
    pub fn observe(&self) -> Observation {
        let sizes: BTreeMap<String, u64> = lock(&self.volumes)
            .iter()
            .map(|(id, thread)| (id.clone(), thread.assigned_bytes()))
            .collect();
        let protected = lock(&self.runner.protected);
        let volumes = protected.faces.iter().map(|face| {
            let running = protected.volumes.iter().find(|volume| volume.id() == face.id);
            VolumeObservation {
                name: face.name.clone(),
                status: face.status(),
                size_bytes: sizes.get(&face.id.to_string()).copied().unwrap_or(0),
                backlog_bytes: running.map_or(0, |volume| volume.backlog_bytes()),
                read_bytes: face.read_bytes.load(Ordering::Relaxed),
            }
        });
        let memory = &self.runner.memory;
        Observation {
            volumes: volumes.collect(),
            freezes: self.freezes.clone(),
            memory_bytes: memory.bytes(),
            memory_used_bytes: memory.used_bytes(),
        }
    }

    /// A renewed certificate. Sessions begin anew with it: the target takes an epoch only from the
    /// key of its own session.
    pub fn set_identity(&self, identity: Arc<Identity>) {
        lock(&self.runner.place).identity = Some(identity);
        lock(&self.volumes).values().for_each(VolumeThread::redial);
    }

    /// Ends all threads; marking goes on in the kernel.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.runner.end();
        let volumes = std::mem::take(&mut *lock(&self.volumes));
        volumes.values().for_each(VolumeThread::end);
        let handles = volumes.into_values().filter_map(VolumeThread::into_handle);
        threads::join_within(STOP_LIMIT, handles.chain(self.coordinator.take()));
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.end();
    }
}

fn report(id: String, status: Status, backlog_bytes: u64) -> VolumeReport {
    VolumeReport {
        id,
        phase: status.phase,
        reason: status.reason,
        code: status.code,
        tracker: status.tracker.into(),
        tracker_reason: status.tracker_reason,
        tracker_code: status.tracker_code,
        cut: status.cut.into(),
        progress_bytes: status.progress,
        backlog_bytes,
        sent_bytes: status.sent_bytes,
        compares: status.compares,
    }
}
