//! All volumes of a target: which there are, who may speak for them, what is promoted, what is
//! reported. Knows sessions, but neither sockets nor TLS.
//!
//! Invariants: a volume has at most one session, and a new one gets its seat only after the older
//! has left; nobody has a seat that the newest assignment does not allow. Lock order: assignment,
//! then volumes, then one entry's locks; none of them is held over I/O.

use super::ReplicaDevice;
use super::budget::{Budget, Grant};
use super::disk::Disk;
use super::entry::{Entry, Opened};
use super::jobs::{Job, Jobs};
use super::keeper::{Keeper, OpenError, VolumeSpec};
use super::observation::Refusals;
use super::recover::RecoverError;
use super::retention::RetentionClock;
use super::session::Peer;
use super::space::Space;
use super::state::{self, StateError};
use super::store::Store;
use super::tend::Holds;
use super::volume::{Verify, refuse, shrunk};
use crate::pulse;
use secondsite_control::api::{PointReport, TargetAssignment, TargetReport, TargetServer};
use secondsite_format::ids::{ServerId, VolumeId};
use secondsite_format::message::{Hello, Refusal, RefusalCode};
use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// What a site is made of.
pub struct SiteConfig {
    /// Where replicas and journals lie.
    pub store: Box<dyn Store>,
    /// Replica volumes on devices.
    pub devices: Vec<ReplicaDevice>,
    /// Space of the store that is never used, bytes.
    pub reserve_bytes: u64,
    /// Memory for frames on their way, bytes.
    pub memory_bytes: u64,
    /// Checks the signatures of manifests.
    pub verify: Verify,
    /// Tells how old points are.
    pub clock: Arc<RetentionClock>,
}

type Entries = BTreeMap<(ServerId, VolumeId), Arc<Entry>>;

/// See the module.
pub struct Site {
    config: SiteConfig,
    pub(super) budget: Budget,
    pub(super) space: Arc<Space>,
    pub(super) clock: Arc<RetentionClock>,
    pub(super) holds: Arc<Holds>,
    /// Counted for metrics.
    pub(super) refusals: Refusals,
    assignment: Mutex<Arc<TargetAssignment>>,
    entries: Mutex<Entries>,
    /// Servers whose promotion found no space, volumes that could not be opened: tried again.
    again: Mutex<Vec<Job>>,
    pub(super) jobs: Jobs,
    stopping: AtomicBool,
    changed: Box<dyn Fn() + Send + Sync>,
}

impl Site {
    /// Finds what is stored, and follows the assignment. Volumes are opened by [`Self::work`].
    pub fn new(
        config: SiteConfig,
        assignment: TargetAssignment,
        changed: Box<dyn Fn() + Send + Sync>,
    ) -> Self {
        let site = Self {
            budget: Budget::new(config.memory_bytes),
            refusals: Refusals::default(),
            space: Arc::new(Space::new(config.reserve_bytes)),
            clock: config.clock.clone(),
            holds: Arc::default(),
            config,
            assignment: Mutex::new(Arc::new(TargetAssignment { version: 0, servers: vec![] })),
            entries: Mutex::default(),
            again: Mutex::default(),
            jobs: Jobs::default(),
            stopping: AtomicBool::new(false),
            changed,
        };
        let stored = site.config.store.volumes();
        site.load_pins(&stored.iter().map(|(server, _)| *server).collect());
        for (server, volume) in stored {
            let entry = Arc::new(Entry::new(&site.config.store.path(server, volume)));
            site.entries().insert((server, volume), entry);
            site.jobs.add(Job::Open(server, volume));
        }
        site.assign(assignment);
        site
    }

    /// Follows this assignment; sessions that it does not allow are ended at once.
    pub fn assign(&self, assignment: TargetAssignment) {
        let assignment = Arc::new(assignment);
        *self.lock_assignment() = assignment.clone();
        for server in assignment.servers.iter().filter(|server| server.active) {
            for spec in self.specs(server) {
                let key = (spec.server, spec.volume);
                let entry = {
                    let mut entries = self.entries();
                    let fresh = || Arc::new(Entry::new(&self.config.store.path(key.0, key.1)));
                    entries.entry(key).or_insert_with(fresh).clone()
                };
                if entry.set_spec(spec) {
                    self.jobs.add(Job::Open(key.0, key.1));
                }
            }
        }
        for ((server, _), entry) in self.all() {
            if let Some((handle, hello)) = entry.session()
                && let Err(refusal) = self.allowed(&hello, server)
            {
                handle.end(refusal);
            }
        }
        self.changed();
    }

    /// The volumes of a server whose ids can be read.
    fn specs(&self, server: &TargetServer) -> Vec<VolumeSpec> {
        let spec = |volume: &secondsite_control::api::TargetVolume| {
            let device = self
                .config
                .devices
                .iter()
                .find(|device| device.server == server.name && device.volume == volume.name);
            Some(VolumeSpec {
                server: server.id.parse().ok()?,
                volume: volume.id.parse().ok()?,
                volume_bytes: volume.size_bytes,
                block_bytes: volume.block_bytes,
                device: device.map(|device| device.path.clone()),
            })
        };
        server.volumes.iter().filter_map(spec).collect()
    }

    /// Checks a hello as far as the certificate and the assignment go.
    pub(super) fn greet(&self, hello: &Hello, peer: &Peer) -> Result<Arc<Entry>, Refusal> {
        let allowed = self.allowed(hello, peer.server);
        let entry = self.entries().get(&(peer.server, hello.volume)).cloned();
        if let (Err(refusal), Some(entry)) = (&allowed, &entry) {
            entry.note_refused(Some(refusal.message.clone()));
            self.changed();
        }
        allowed?;
        entry.ok_or_else(|| not_allowed("the volume is not known here yet"))
    }

    /// What the newest assignment says to a hello of this server's certificate.
    fn allowed(&self, hello: &Hello, certified: ServerId) -> Result<(), Refusal> {
        if hello.server != certified {
            return Err(not_allowed("the certificate is another server's"));
        }
        let assignment = self.lock_assignment().clone();
        let id = certified.to_string();
        let server = assignment.servers.iter().find(|server| server.id == id && server.active);
        let server = server.ok_or_else(|| {
            not_allowed("this server is not protected here, or its certificate was revoked")
        })?;
        if state::parse_hex32(&server.machine) != Some(hello.machine) {
            let message = format!(
                "a session came from another machine than the one that joined as {}: if the \
                 server moved to new hardware, join it again there; if not, somebody has its key",
                server.name
            );
            return Err(refuse(RefusalCode::OtherMachine, message));
        }
        let id = hello.volume.to_string();
        let volume = server.volumes.iter().find(|volume| volume.id == id);
        let volume =
            volume.ok_or_else(|| not_allowed("this volume of the server is not protected here"))?;
        let stored = self.entries().get(&(certified, hello.volume)).and_then(|e| e.size());
        let (bytes, block_bytes) = stored.unwrap_or((volume.size_bytes, volume.block_bytes));
        if hello.block_bytes != block_bytes {
            let message = format!(
                "volume {} has blocks of {} bytes, the target has blocks of {block_bytes}: \
                 unprotect it and protect it again",
                volume.name, hello.block_bytes
            );
            return Err(refuse(RefusalCode::Mismatch, message));
        }
        if hello.volume_bytes < bytes {
            return Err(shrunk(bytes, hello.volume_bytes));
        }
        Ok(())
    }

    /// Checks again what [`Self::greet`] checked: an assignment that came since the hello did not
    /// see this session yet.
    pub(super) fn still_allowed(&self, hello: &Hello, peer: &Peer) -> Result<(), Refusal> {
        self.allowed(hello, peer.server)?;
        if self.stopping() {
            return Err(refuse(RefusalCode::Stopping, "the target is shutting down"));
        }
        Ok(())
    }

    /// An epoch of this server was committed.
    pub(super) fn committed(&self, server: ServerId) {
        self.jobs.add(Job::Tend(server));
        self.changed();
    }

    /// The report changed.
    pub(super) fn changed(&self) {
        (self.changed)();
    }

    /// Does jobs until [`Self::stop`]: the body of a worker thread.
    pub fn work(&self) {
        let _joined = pulse::join("a promotion worker");
        while let Some(job) = self.jobs.next() {
            // A broken invariant costs the job, not the worker that serves all other volumes.
            if std::panic::catch_unwind(AssertUnwindSafe(|| self.run(job))).is_err() {
                tracing::error!("{job:?} broke an invariant; see the message above");
            }
            self.jobs.done(job);
            self.changed();
        }
    }

    /// Does all jobs that are waiting.
    pub fn work_now(&self) {
        while self.work_next() {}
    }

    /// Does the next job, if one is waiting: a step of [`Self::work`] for who has no threads.
    pub fn work_next(&self) -> bool {
        if !self.jobs.any() {
            return false;
        }
        let Some(job) = self.jobs.next() else { return false };
        self.run(job);
        self.jobs.done(job);
        true
    }

    /// Memory for a frame on its way; waits for it.
    pub fn budget(&self, bytes: u64) -> Grant<'_> {
        self.budget.take(bytes)
    }

    /// A volume's keeper, once it is open.
    pub fn keeper(&self, server: ServerId, volume: VolumeId) -> Option<Arc<Keeper>> {
        self.entries().get(&(server, volume))?.keeper()
    }

    fn run(&self, job: Job) {
        match job {
            Job::Open(server, volume) => self.open(server, volume),
            Job::Tend(server) => self.tend(server),
        }
    }

    /// What did not work for want of space or because a device was in use is tried again.
    pub fn try_again(&self) {
        for job in std::mem::take(&mut *self.again()) {
            self.jobs.add(job);
        }
    }

    fn open(&self, server: ServerId, volume: VolumeId) {
        let Some(entry) = self.entries().get(&(server, volume)).cloned() else { return };
        if entry.keeper().is_some() {
            return;
        }
        let spec = entry.spec();
        let opened = pulse::outside(|| self.config.store.open(server, volume))
            .map_err(|cause| OpenError::Io { operation: "making its folder", cause })
            .and_then(|disk| {
                let (space, clock) = (self.space.clone(), self.clock.clone());
                Keeper::open(disk, spec.as_ref(), space, clock, self.config.verify)
            });
        match opened {
            Ok(keeper) => {
                entry.set_opened(Opened::Open(Arc::new(keeper)));
                self.know_server(server);
                self.jobs.add(Job::Tend(server));
            }
            Err(error) => {
                let message =
                    format!("{}: {error}", self.config.store.path(server, volume).display());
                if may_pass(&error) {
                    self.again().push(Job::Open(server, volume));
                }
                if entry.set_opened(Opened::Failed(message.clone())) {
                    tracing::error!(%server, %volume, "a volume cannot be opened: {message}");
                }
            }
        }
    }

    /// A server whose job found no space is looked after again later.
    pub(super) fn again_later(&self, server: ServerId) {
        self.again().push(Job::Tend(server));
    }

    /// The folder of a server.
    pub(super) fn server_disk(&self, server: ServerId) -> std::io::Result<Arc<dyn Disk>> {
        self.config.store.of_server(server)
    }

    /// A volume.
    pub(super) fn entry(&self, server: ServerId, volume: VolumeId) -> Option<Arc<Entry>> {
        self.entries().get(&(server, volume)).cloned()
    }

    pub(super) fn keepers(&self, of: ServerId) -> Vec<(VolumeId, Arc<Keeper>)> {
        let all = self.all().into_iter().filter(|((server, _), _)| *server == of);
        all.filter_map(|((_, volume), entry)| Some((volume, entry.keeper()?))).collect()
    }

    /// What is there.
    pub fn report(&self) -> TargetReport {
        let all = self.all();
        let mut servers: Vec<ServerId> = all.iter().map(|((server, _), _)| *server).collect();
        servers.dedup();
        let points = servers.into_iter().flat_map(|server| for_control(self.point_reports(server)));
        TargetReport {
            target_version: env!("CARGO_PKG_VERSION").into(),
            volumes: all.iter().map(|((_, volume), entry)| entry.report(*volume)).collect(),
            points: points.collect(),
            // A store that cannot be asked has nothing to give.
            free_bytes: self.free_bytes().unwrap_or(0),
        }
    }

    /// How many volumes there are, have an agent, cannot go on here. Asks no disk.
    pub fn counts(&self) -> (usize, usize, usize) {
        let all: Vec<_> =
            self.all().iter().map(|((_, volume), entry)| entry.report(*volume)).collect();
        let connected = all.iter().filter(|volume| volume.connected).count();
        (all.len(), connected, all.iter().filter(|volume| volume.error.is_some()).count())
    }

    /// Ends sessions and workers.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.jobs.end();
        for (_, entry) in self.all() {
            if let Some((handle, _)) = entry.session() {
                handle.end(refuse(RefusalCode::Stopping, "the target is shutting down"));
            }
        }
    }

    pub(super) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Space of the store that nothing is promised, bytes.
    pub(super) fn spare_bytes(&self) -> u64 {
        let (reserve, promised) = self.space.state();
        self.free_bytes().unwrap_or(0).saturating_sub(reserve + promised)
    }

    /// Free space of the store, if it can be asked.
    pub(super) fn free_bytes(&self) -> Option<u64> {
        self.config.store.free_bytes().ok()
    }

    /// The newest assignment.
    pub(super) fn assignment(&self) -> Arc<TargetAssignment> {
        self.lock_assignment().clone()
    }

    pub(super) fn all(&self) -> Vec<((ServerId, VolumeId), Arc<Entry>)> {
        self.entries().iter().map(|(key, entry)| (*key, entry.clone())).collect()
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().expect("nothing panics while it holds the volumes")
    }

    fn lock_assignment(&self) -> MutexGuard<'_, Arc<TargetAssignment>> {
        self.assignment.lock().expect("nothing panics while it holds the assignment")
    }

    fn again(&self) -> MutexGuard<'_, Vec<Job>> {
        self.again.lock().expect("nothing panics while it holds the list")
    }
}

/// A device may be given free, a full store emptied, a disk repaired; damage stays damage.
fn may_pass(error: &OpenError) -> bool {
    match error {
        OpenError::Replica(_) | OpenError::Io { .. } => true,
        OpenError::State(error) => matches!(error, StateError::Io(_)),
        OpenError::Recover(error) => matches!(error, RecoverError::Io(_)),
        OpenError::Unknown => false,
    }
}

fn not_allowed(message: &str) -> Refusal {
    refuse(RefusalCode::NotAllowed, message)
}

/// Most points of a server in a report to control: it comes with every commit.
const REPORTED_POINTS_MAX: usize = 1000;

/// All points, or of very many the newest half of the room and some of the others, evenly. Who asks
/// the target itself sees all.
fn for_control(points: Vec<PointReport>) -> Vec<PointReport> {
    if points.len() <= REPORTED_POINTS_MAX {
        return points;
    }
    let newest = points.len() - REPORTED_POINTS_MAX / 2;
    let step = newest.div_ceil(REPORTED_POINTS_MAX / 2);
    let reported = |(i, _): &(usize, PointReport)| *i >= newest || i % step == 0;
    points.into_iter().enumerate().filter(reported).map(|(_, point)| point).collect()
}
