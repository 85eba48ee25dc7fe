//! A volume as coordinator and shipper share it: what it is, what it is doing, what it was told.
//!
//! The coordinator gives tasks and makes last passes; the shipper (the volume's own thread) does
//! the tasks, keeps the session and is the only one that commits or gives up.
//!
//! Lock order: `bench`, then `control`, then `status`. Every take from the live bitmap and every
//! giving up happens under `bench`: a take that overlapped a giving up could lose a bit.

use crate::pulse;
use crate::source::buffers::Buffer;
use crate::source::runs::Shape;
use crate::source::seams::{Batch, Disk, Tracker};
use secondsite_control::api::VolumePhase;
use secondsite_control::codes::Reason;
use secondsite_format::ids::{CutId, Epoch, VolumeId};
use secondsite_format::manifest::{Consistency, CutMethod};
use secondsite_tracker::marks::{BlockRun, Marks};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What the coordinator asks of a shipper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Task {
    /// Compare all of it (compare-only volumes): mark what differs.
    Compare,
    /// One pre-copy pass: what was held from a failed last pass, then what is live.
    Pass,
    /// Make sure that the target has staged all of it.
    Barrier,
    /// Write the mounted file systems back.
    Sync,
    /// The cut is made: send the last pass, sign, commit.
    Ship(Box<Verdict>),
    /// The volume was cut behind its filter: read and send what the cut holds.
    Collect,
    /// Give the epoch up.
    GiveUp(&'static str),
}

/// What the cut came to, for the manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Time of the cut by this machine's clock.
    pub cut_time_ns: u64,
    /// What was proven of this volume.
    pub consistency: Consistency,
    /// How.
    pub method: CutMethod,
    /// All volumes of the point, sorted.
    pub members: Vec<VolumeId>,
    /// Volumes that it lacks, sorted.
    pub lacking: Vec<VolumeId>,
}

/// How the last task ended.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Outcome {
    /// Not yet.
    #[default]
    Pending,
    /// Done.
    Done,
    /// The epoch is no more: why.
    Dropped(String),
}

/// What coordinator and shipper say to each other.
#[derive(Default)]
pub struct Control {
    /// Given and not finished.
    pub task: Option<Task>,
    /// How the last one ended.
    pub outcome: Outcome,
    /// The cut that this process began and that still stands.
    pub cut: Option<CutId>,
    /// Following, and nothing is unsettled: a cut may begin with this epoch.
    pub ready: Option<Epoch>,
    /// Since when there has been no session.
    pub away_since: Option<Duration>,
    /// What the slowest `Sync` of a file system took.
    pub synced: Duration,
    /// Commits seen.
    pub commits: u64,
    /// Whether the last manifest that was signed says "exact".
    pub exact: bool,
    /// When its cut was made; none once it is committed.
    pub signed_ns: Option<u64>,
    /// A doubt about the tracker, for people: a compare follows.
    pub doubt: Option<String>,
    /// A verify waits for further cuts.
    pub verify_waits: bool,
    /// A verify was ordered; how it went.
    pub verify: VerifyState,
}

/// A verify of this volume.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum VerifyState {
    /// None.
    #[default]
    Idle,
    /// Ordered and not begun.
    Ordered,
    /// Bytes done of bytes to do.
    Running(u64, u64),
    /// Compared bytes, differing bytes, the first differing ranges.
    Done(u64, u64, Vec<(u64, u64)>),
}

/// Disk and buffers of the cut; who holds it may take.
pub struct Bench {
    /// The volume's disk.
    pub disk: Box<dyn Disk>,
    /// The last pass number used in this epoch.
    pub pass: u32,
    /// Last passes read and not yet sent, with their pass number as tag.
    pub held: Vec<Batch>,
    /// What could not be read in this epoch.
    pub unreadable: Vec<(u64, u64)>,
    /// Scratch for takes.
    pub runs: Vec<BlockRun>,
}

/// What people see; outlives the shipper's attempts.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    /// What it is doing.
    pub phase: VolumePhase,
    /// Why it is not simply following.
    pub reason: String,
    /// The same as a code.
    pub code: Option<Reason>,
    /// `ebpf`, `compare`, `none`.
    pub tracker: &'static str,
    /// Why no better one.
    pub tracker_reason: String,
    /// The same as a code.
    pub tracker_code: Option<Reason>,
    /// How the last cut was made.
    pub cut: &'static str,
    /// Done and total bytes of a first copy or compare.
    pub progress: Option<(u64, u64)>,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Bytes read for the epoch and not committed.
    pub compares: u64,
    /// Why the last point was fuzzy; none if it was exact.
    pub fuzzy: Option<(Reason, String)>,
    /// Epochs given up in a row.
    pub give_ups: u32,
    /// And in all.
    pub give_ups_total: u64,
    /// Committed points that are exact, and that are not.
    pub points_exact: u64,
    /// See above.
    pub points_fuzzy: u64,
    /// When the newest committed point was cut, and the newest exact one; 0 before.
    pub newest_point_ns: u64,
    /// See above.
    pub newest_exact_ns: u64,
    /// Times the tracker was found to have missed writes.
    pub audit_gaps: u64,
}

impl Default for Status {
    fn default() -> Self {
        Self {
            phase: VolumePhase::Connecting,
            reason: String::new(),
            code: Some(Reason::Connecting),
            tracker: "none",
            tracker_reason: String::new(),
            tracker_code: None,
            cut: "none",
            progress: None,
            sent_bytes: 0,
            compares: 0,
            fuzzy: None,
            give_ups: 0,
            give_ups_total: 0,
            points_exact: 0,
            points_fuzzy: 0,
            newest_point_ns: 0,
            newest_exact_ns: 0,
            audit_gaps: 0,
        }
    }
}

/// Wakes whoever waits; a ring before the wait is not lost.
#[derive(Default)]
pub struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    /// Rings.
    pub fn ring(&self) {
        *lock(&self.rung) = true;
        self.changed.notify_all();
    }

    /// Waits for a ring, at most this long.
    pub fn wait(&self, limit: Duration) {
        let rung = lock(&self.rung);
        let wait = || self.changed.wait_timeout_while(rung, limit, |rung| !*rung);
        let (mut rung, _) = pulse::resting(limit, wait).unwrap_or_else(PoisonError::into_inner);
        *rung = false;
    }
}

/// Locks; a thread that panicked has left nothing half done that matters here, since marks live
/// elsewhere and are changed by single stores.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Status with its bell: what the report is made of.
pub struct Face {
    /// The volume's id.
    pub id: VolumeId,
    /// Its name.
    pub name: String,
    /// Bytes read from the volume.
    pub read_bytes: Arc<AtomicU64>,
    status: Mutex<Status>,
    changed: Arc<dyn Fn() + Send + Sync>,
}

impl Face {
    /// Makes one; `changed` is called when the status changed.
    pub fn new(id: VolumeId, name: String, changed: Arc<dyn Fn() + Send + Sync>) -> Self {
        Self { id, name, read_bytes: Arc::default(), status: Mutex::default(), changed }
    }

    /// The status now.
    pub fn status(&self) -> Status {
        lock(&self.status).clone()
    }

    /// Changes it.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        let mut status = lock(&self.status);
        let before = status.clone();
        change(&mut status);
        let differs = *status != before;
        drop(status);
        if differs {
            (self.changed)();
        }
    }

    /// A new phase with its reason.
    pub fn phase(&self, phase: VolumePhase, code: Reason, reason: impl Into<String>) {
        let reason = reason.into();
        self.update(|status| {
            status.phase = phase;
            status.code = Some(code);
            status.reason = reason;
        });
    }
}

/// A volume that is tracked and readable.
pub struct Volume {
    /// What people see.
    pub face: Arc<Face>,
    /// Size, blocks, exclusions.
    pub shape: Arc<Shape>,
    /// Follows its writes.
    pub tracker: Arc<dyn Tracker>,
    /// No tracker runs: marks are only made by comparing.
    pub compare_only: bool,
    /// The device node, for messages.
    pub path: PathBuf,
    /// Disk and last passes.
    bench: Mutex<Bench>,
    control: Mutex<Control>,
    /// Rung for the shipper.
    pub bell: Bell,
    /// Rung for the coordinator.
    pub coordinator: Arc<Bell>,
    stop: AtomicBool,
}

impl Volume {
    /// Puts it together.
    pub fn new(
        face: Arc<Face>,
        shape: Shape,
        tracker: Arc<dyn Tracker>,
        compare_only: bool,
        path: PathBuf,
        disk: Box<dyn Disk>,
        coordinator: Arc<Bell>,
    ) -> Self {
        assert_eq!(shape.blocks(), tracker.marks().blocks(), "marks fit the volume");
        Self {
            face,
            shape: Arc::new(shape),
            tracker,
            compare_only,
            path,
            bench: Mutex::new(Bench {
                disk,
                pass: 0,
                held: Vec::new(),
                unreadable: Vec::new(),
                runs: Vec::new(),
            }),
            control: Mutex::default(),
            bell: Bell::default(),
            coordinator,
            stop: AtomicBool::new(false),
        }
    }

    /// Its id.
    pub fn id(&self) -> VolumeId {
        self.face.id
    }

    /// Its marks.
    pub fn marks(&self) -> &Marks {
        self.tracker.marks()
    }

    /// Whether its writes go through the filter, so that a cut needs no quiet and no freeze.
    pub fn is_filtered(&self) -> bool {
        self.tracker.filtered().is_some()
    }

    /// Disk and last passes. Who holds it may be reading the disk.
    pub fn bench(&self) -> MutexGuard<'_, Bench> {
        pulse::outside(|| lock(&self.bench))
    }

    /// The conversation between coordinator and shipper.
    pub fn control(&self) -> MutexGuard<'_, Control> {
        lock(&self.control)
    }

    /// Begins a cut, if the volume is ready for one.
    pub fn begin(&self, cut_id: CutId) -> bool {
        let mut bench = self.bench();
        let mut control = self.control();
        if self.stopping() {
            return false;
        }
        let Some(epoch) = control.ready.take() else { return false };
        // `ready` is set only when the session has settled what became of the cut before, and
        // when that one neither stands nor holds a taken bit.
        self.marks().begin(epoch.0, cut_id.0);
        control.cut = Some(cut_id);
        control.outcome = Outcome::Pending;
        bench.pass = 0;
        bench.held.clear();
        bench.unreadable.clear();
        drop(control);
        drop(bench);
        true
    }

    /// Gives a task to the shipper.
    pub fn give(&self, task: Task) {
        let mut control = self.control();
        control.outcome = Outcome::Pending;
        control.task = Some(task);
        drop(control);
        self.bell.ring();
    }

    /// The shipper has finished its task.
    ///
    /// # Panics
    /// If it has none: finished twice, it could be the next one that is called done.
    pub fn finish(&self, outcome: Outcome) {
        let mut control = self.control();
        assert!(control.task.take().is_some(), "a task is finished once");
        control.outcome = outcome;
        drop(control);
        self.coordinator.ring();
    }

    /// Bytes not committed: written and not taken, taken and not committed, or still to be copied.
    pub fn backlog_bytes(&self) -> u64 {
        let marks = self.marks();
        let blocks = marks.live_count() + marks.taken_count();
        let dirty = (blocks * u64::from(self.shape.block_bytes)).min(self.shape.volume_bytes);
        let status = self.face.status();
        let copying = match (status.phase, status.progress) {
            (VolumePhase::FirstCopy, Some((done, total))) => total.saturating_sub(done),
            _ => 0,
        };
        (dirty + copying).min(self.shape.volume_bytes)
    }

    /// Tells the shipper to end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.bell.ring();
    }

    /// After the shipper has ended: from now on nobody takes from these marks or begins a cut on
    /// them, so that the volume may be opened anew. Both happen under the bench, and look at `stop`
    /// there.
    pub fn close(&self) {
        self.stop();
        drop(lock(&self.bench));
    }

    /// Whether the shipper is to end. Acquire pairs with the release in [`Self::stop`]; nothing
    /// else hangs on it.
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// An empty place for a last pass, allocated before anything is frozen.
pub fn reserve(buffer: Buffer, pieces_max: usize) -> Batch {
    Batch { tag: 0, pieces: Vec::with_capacity(pieces_max), buffer, unreadable: Vec::new() }
}
