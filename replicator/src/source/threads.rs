//! Threads for coordinator and shippers, the system's clock, and the assignment's bookkeeping.
//!
//! A volume's thread opens the device, then steps its shipper; whatever fails is said in the report
//! and tried again. Ending leaves the pins; a volume that is no longer assigned takes them along.

use crate::pulse;
use crate::source::attach::{CountedFreezer, EbpfTracker, Places, attach, remove_pins};
use crate::source::buffers::Memory;
use crate::source::coordinator::{Coordinator, Protected};
use crate::source::filter::{FilterCutter, take_out};
use crate::source::link::{Hangup, TlsDial, Where};
use crate::source::orders::Orders;
use crate::source::pipeline::Workers;
use crate::source::seams::{Env, Signer};
use crate::source::shipper::{Commons, Shipper};
use crate::source::volume::{Bell, Face, Volume, lock};
use secondsite_control::api::{AgentAssignment, TrackerChoice, VolumeAssignment, VolumePhase};
use secondsite_format::ids::{ServerId, VolumeId};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The longest that a thread waits without looking around.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// A device that cannot be opened, or whose disk was lost, is looked at again this often.
const REOPEN_EVERY: Duration = Duration::from_secs(5);

/// The system's clock and random source.
pub struct SystemEnv {
    start: Instant,
}

impl SystemEnv {
    /// Its zero is now.
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Env for SystemEnv {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }
    fn wall_ns(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
    }
    fn random(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).expect("the kernel's random source");
        bytes
    }
}

/// Signs with whatever certificate is the agent's now.
struct IdentitySigner {
    place: Arc<Mutex<Where>>,
}

impl Signer for IdentitySigner {
    fn sign(&self, bytes: &[u8]) -> Result<([u8; 65], [u8; 64]), String> {
        let identity = lock(&self.place).identity.clone().ok_or("no certificate")?;
        let signature = identity.sign(bytes).map_err(|error| format!("{error:#}"))?;
        Ok((identity.public_key(), signature))
    }
}

/// How a volume's thread is to end.
#[derive(Default)]
struct Ending {
    end: AtomicBool,
    /// The volume is no longer assigned: its pins go too.
    remove: AtomicBool,
    bell: Bell,
    /// Shared with the dialler.
    hangup: Arc<Hangup>,
}

/// The thread of one assigned volume.
pub struct VolumeThread {
    assigned: VolumeAssignment,
    face: Arc<Face>,
    ending: Arc<Ending>,
    running: Arc<Mutex<Option<Arc<Volume>>>>,
    handle: Option<JoinHandle<()>>,
}

impl VolumeThread {
    /// Tells it to end.
    pub fn end(&self) {
        // Release pairs with the acquire in the thread: it sees `remove` as it was set before.
        self.ending.end.store(true, Ordering::Release);
        self.ending.hangup.end();
        self.ending.bell.ring();
        if let Some(volume) = lock(&self.running).as_ref() {
            volume.stop();
        }
    }

    /// Ends its session; it dials again.
    pub fn redial(&self) {
        self.ending.hangup.redial();
    }

    /// Size of the volume, as assigned.
    pub fn assigned_bytes(&self) -> u64 {
        self.assigned.size_bytes
    }

    /// Its handle, to wait for its end.
    pub fn into_handle(self) -> Option<JoinHandle<()>> {
        self.handle
    }
}

/// What the threads share.
pub struct Runner {
    pub(super) place: Arc<Mutex<Where>>,
    pub(super) machine: [u8; 32],
    pub(super) pin_dir: PathBuf,
    pub(super) filter_dir: PathBuf,
    pub(super) memory: Arc<Memory>,
    pub(super) workers: Arc<Workers>,
    pub(super) protected: Arc<Mutex<Protected>>,
    pub(super) orders: Arc<Mutex<Orders>>,
    pub(super) bell: Arc<Bell>,
    pub(super) changed: Arc<dyn Fn() + Send + Sync>,
    pub(super) clock: Arc<SystemEnv>,
    pub(super) stopping: AtomicBool,
}

impl Runner {
    /// Starts the coordinator's thread.
    pub(super) fn coordinate(self: Arc<Self>, freezer: CountedFreezer) -> JoinHandle<()> {
        let mut coordinator = Coordinator::new(
            self.clock.clone(),
            self.memory.clone(),
            Box::new(freezer),
            Box::new(FilterCutter { dir: self.filter_dir.clone(), client: None }),
            self.protected.clone(),
            self.orders.clone(),
            self.changed.clone(),
        );
        let run = move || {
            let _joined = pulse::join("the coordinator");
            while !self.stopping.load(Ordering::Acquire) {
                pulse::beat();
                let wait = coordinator.step();
                self.bell.wait(wait.min(WAIT_MAX));
            }
        };
        std::thread::Builder::new().name("coordinator".into()).spawn(run).expect("a thread")
    }

    pub(super) fn end(&self) {
        self.stopping.store(true, Ordering::Release);
        self.bell.ring();
    }

    /// Makes `threads` what the assignment says.
    pub(super) fn assign(
        self: &Arc<Self>,
        threads: &mut BTreeMap<String, VolumeThread>,
        assignment: AgentAssignment,
    ) {
        let AgentAssignment { server_id, target, goal_seconds, volumes, .. } = assignment;
        let moved = {
            let mut place = lock(&self.place);
            let moved = place.target != target;
            place.target = target;
            moved
        };
        let mut ended: BTreeMap<String, JoinHandle<()>> = BTreeMap::new();
        threads.retain(|id, thread| {
            let still = volumes.iter().find(|volume| volume.id == *id);
            // How far it goes says the device itself; a size that control has learned since is no
            // other volume.
            let same = |volume: &VolumeAssignment| {
                let size_bytes = thread.assigned.size_bytes;
                VolumeAssignment { size_bytes, ..volume.clone() } == thread.assigned
            };
            if still.is_some_and(same) {
                if moved {
                    thread.redial();
                }
                return true;
            }
            thread.ending.remove.store(still.is_none(), Ordering::Relaxed);
            thread.end();
            ended.extend(thread.handle.take().map(|handle| (id.clone(), handle)));
            false
        });
        self.remove_stray_pins(&volumes, &ended);
        let Ok(server) = server_id.parse::<ServerId>() else {
            tracing::error!(server_id, "the assignment has no valid server id");
            return;
        };
        for assigned in volumes {
            if threads.contains_key(&assigned.id) {
                continue;
            }
            let Ok(id) = assigned.id.parse::<VolumeId>() else {
                tracing::error!(id = assigned.id, "the assignment has an invalid volume id");
                continue;
            };
            let before = ended.remove(&assigned.id);
            let name = assigned.id.clone();
            threads.insert(name, self.clone().volume_thread(server, id, assigned, before));
        }
        {
            let mut protected = lock(&self.protected);
            protected.goal = Duration::from_secs(goal_seconds);
            protected.faces = threads.values().map(|thread| thread.face.clone()).collect();
            let here = |volume: &Arc<Volume>| {
                threads.values().any(|thread| Arc::ptr_eq(&thread.face, &volume.face))
            };
            protected.volumes.retain(here);
        }
        self.bell.ring();
        (self.changed)();
    }

    /// Pins of volumes that were unprotected while the daemon was down. What is about to end
    /// removes its own.
    fn remove_stray_pins(
        &self,
        volumes: &[VolumeAssignment],
        ending: &BTreeMap<String, JoinHandle<()>>,
    ) {
        let Ok(entries) = std::fs::read_dir(&self.pin_dir) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let known = volumes.iter().any(|volume| volume.id == name) || ending.contains_key(name);
            if !known && name.parse::<VolumeId>().is_ok() {
                remove_pins(&entry.path());
            }
        }
    }

    fn volume_thread(
        self: Arc<Self>,
        server: ServerId,
        id: VolumeId,
        assigned: VolumeAssignment,
        before: Option<JoinHandle<()>>,
    ) -> VolumeThread {
        let face = Arc::new(Face::new(id, assigned.name.clone(), self.changed.clone()));
        let ending = Arc::new(Ending::default());
        let running = Arc::new(Mutex::new(None));
        let thread = Thread {
            runner: self,
            server,
            assigned: assigned.clone(),
            face: face.clone(),
            ending: ending.clone(),
            running: running.clone(),
        };
        let run = move || {
            // The same device under the same pins: never two at once.
            if let Some(before) = before {
                let _ = before.join();
            }
            let _joined = pulse::join(format!("the shipper of {}", thread.assigned.name));
            thread.run();
        };
        let name = format!("ship {}", assigned.name);
        let handle = std::thread::Builder::new().name(name).spawn(run).expect("a thread");
        VolumeThread { assigned, face, ending, running, handle: Some(handle) }
    }
}

/// What runs in a volume's thread.
struct Thread {
    runner: Arc<Runner>,
    server: ServerId,
    assigned: VolumeAssignment,
    face: Arc<Face>,
    ending: Arc<Ending>,
    running: Arc<Mutex<Option<Arc<Volume>>>>,
}

impl Thread {
    fn run(&self) {
        let pins = self.runner.pin_dir.join(&self.assigned.id);
        let mut tracker = None;
        while !self.ended() {
            // What an earlier attempt opened is closed before it is opened anew.
            tracker = None;
            let (memory, bell) = (&self.runner.memory, &self.runner.bell);
            let places = Places { pins: &pins, filter: &self.runner.filter_dir };
            match pulse::outside(|| attach(&self.assigned, &places, &self.face, memory, bell)) {
                Ok((volume, ebpf)) => {
                    let volume = Arc::new(volume);
                    let grown = self.ship(&volume);
                    self.withdraw(&volume);
                    if !grown && !self.ended() {
                        // Its disk was lost: opened anew later, perhaps it is back.
                        self.ending.bell.wait(REOPEN_EVERY);
                    }
                    tracker = ebpf;
                }
                Err((code, reason)) => {
                    if self.face.status().reason != reason {
                        let (volume, name) = (&self.assigned.id, &self.assigned.name);
                        tracing::error!(volume, name, "stopped: {reason}");
                    }
                    self.face.phase(VolumePhase::Stopped, code, reason);
                    self.ending.bell.wait(REOPEN_EVERY);
                }
            }
        }
        if self.ending.remove.load(Ordering::Relaxed) {
            self.remove(tracker, &pins);
        }
    }

    fn ended(&self) -> bool {
        self.ending.end.load(Ordering::Acquire)
    }

    /// Ships until the thread is to end or the disk is lost; whether the volume has only grown.
    fn ship(&self, volume: &Arc<Volume>) -> bool {
        let commons = Commons {
            env: self.runner.clock.clone(),
            memory: self.runner.memory.clone(),
            workers: self.runner.workers.clone(),
            signer: Arc::new(IdentitySigner { place: self.runner.place.clone() }),
            server: self.server,
            machine: self.runner.machine,
        };
        let dial = TlsDial::new(self.runner.place.clone(), self.ending.hangup.clone());
        let mut shipper = Shipper::new(volume.clone(), Arc::new(commons), Box::new(dial));
        *lock(&self.running) = Some(volume.clone());
        lock(&self.runner.protected).volumes.push(volume.clone());
        self.runner.bell.ring();
        while !self.ended() && !shipper.lost_disk() {
            pulse::beat();
            let wait = shipper.step();
            if !wait.is_zero() {
                volume.bell.wait(wait.min(WAIT_MAX));
            }
        }
        shipper.grown()
    }

    /// Takes the volume from the coordinator.
    fn withdraw(&self, volume: &Arc<Volume>) {
        *lock(&self.running) = None;
        lock(&self.runner.protected).volumes.retain(|other| !Arc::ptr_eq(other, volume));
        volume.close();
        self.runner.bell.ring();
    }

    fn remove(&self, tracker: Option<Arc<EbpfTracker>>, pins: &std::path::Path) {
        if let Some(tracker) = tracker {
            tracker.detach();
        }
        remove_pins(pins);
        if matches!(self.assigned.tracker, TrackerChoice::Ublk | TrackerChoice::Auto) {
            take_out(&self.runner.filter_dir, &self.assigned.id);
        }
    }
}

/// Waits for threads, not longer than this in all.
pub fn join_within(limit: Duration, handles: impl Iterator<Item = JoinHandle<()>>) {
    let handles: Vec<_> = handles.collect();
    let (done, all) = crossbeam::channel::bounded::<()>(1);
    let waiter = move || {
        handles.into_iter().for_each(|handle| drop(handle.join()));
        drop(done);
    };
    if std::thread::Builder::new().name("stop".into()).spawn(waiter).is_ok() {
        let _ = all.recv_timeout(limit);
    }
}
