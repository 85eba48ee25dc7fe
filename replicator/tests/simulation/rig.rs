//! Puts the real source over a world and the real target over its disks, and drives both from one
//! thread, step by step in seeded order.

use crate::filtered::{Filtered, MemoryCutter};
use crate::network::SimDial;
use crate::remote::{KEY, MACHINE, Remote, SERVER, sign, volume_id};
use crate::world::{BLOCK, DiskState, Killed, MemoryDisk, MemoryFreezer, MemoryTracker, World};
use secondsite::source::buffers::Memory;
use secondsite::source::coordinator::{Coordinator, Protected};
use secondsite::source::orders::Orders;
use secondsite::source::pipeline::Workers;
use secondsite::source::runs::Shape;
use secondsite::source::seams::{Env, Signer};
use secondsite::source::shipper::{Commons, Shipper};
use secondsite::source::volume::{Bell, Face, Status, Volume};
use secondsite_control::api::{Order, OrderKind, OrderResult, OrderState, VolumePhase};
use secondsite_control::codes::Reason;
use secondsite_format::manifest::Consistency;
use secondsite_tracker::marks::Marks;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The loss that is allowed.
pub const GOAL: Duration = Duration::from_secs(6);

struct TestSigner;
impl Signer for TestSigner {
    fn sign(&self, bytes: &[u8]) -> Result<([u8; 65], [u8; 64]), String> {
        Ok((KEY, sign(&KEY, bytes)))
    }
}

/// The agent's process.
struct Agent {
    faces: Vec<Arc<Face>>,
    /// What is attached; none while its disk is too small.
    shippers: Vec<Option<Shipper>>,
    coordinator: Coordinator,
    orders: Arc<Mutex<Orders>>,
    protected: Arc<Mutex<Protected>>,
    commons: Arc<Commons>,
    bell: Arc<Bell>,
}

pub struct Rig {
    pub world: Arc<World>,
    pub remote: Arc<Remote>,
    pub give_ups: u64,
    pub kills: u64,
    /// Percent of the times that a tracker grows at which the agent is killed soon.
    pub kills_growing: u64,
    pub grown: u64,
    pub shrunk: u64,
    seed: u64,
    freezable: bool,
    compare_only: bool,
    agent: Agent,
    number: u64,
}

impl Rig {
    pub fn new(seed: u64, volumes: usize, blocks: usize, freezable: bool) -> Self {
        Self::build(seed, volumes, blocks, freezable, false)
    }

    pub fn compare_only(seed: u64, volumes: usize, blocks: usize) -> Self {
        Self::build(seed, volumes, blocks, false, true)
    }

    /// Some volumes behind the filter, with room to preserve so many blocks.
    pub fn filtered(seed: u64, volumes: &[bool], blocks: usize, memory_slots: u32) -> Self {
        let mut rig = Self::build(seed, volumes.len(), blocks, true, false);
        for (index, filtered) in volumes.iter().enumerate().filter(|(_, filtered)| **filtered) {
            assert!(filtered);
            let state = &mut *rig.world.state();
            let bytes = state.disks[index].bytes();
            state.disks[index].filter = Some(Filtered::new(bytes, &state.group, memory_slots));
        }
        rig.restart();
        rig.kills = 0;
        rig
    }

    fn build(seed: u64, count: usize, blocks: usize, freezable: bool, compare_only: bool) -> Self {
        let world = World::new(seed, count, blocks);
        let remote = Remote::new(&world);
        remote.start();
        let agent = Agent::start(&world);
        let mut rig = Self {
            give_ups: 0,
            kills: 0,
            kills_growing: 0,
            grown: 0,
            shrunk: 0,
            seed,
            freezable,
            compare_only,
            agent,
            number: 0,
            world,
            remote,
        };
        (0..count).for_each(|index| rig.attach(index));
        rig
    }

    /// The agent's process runs this; false if it was killed, and another one began.
    fn living(&mut self, run: impl FnOnce(&mut Self)) -> bool {
        self.world.state().in_agent = true;
        let done = catch_unwind(AssertUnwindSafe(|| run(self)));
        self.world.state().in_agent = false;
        match done {
            Ok(()) => true,
            Err(payload) if payload.is::<Killed>() => {
                self.restart();
                false
            }
            Err(payload) => resume_unwind(payload),
        }
    }

    /// The agent opens a disk and its tracker, which has grown perhaps, and puts a volume together.
    fn attach(&mut self, index: usize) {
        let (world, remote, agent) = (&self.world, &self.remote, &mut self.agent);
        let face = agent.faces[index].clone();
        let grows = {
            let state = world.state();
            state.disks[index].bytes() > state.disks[index].pinned.bytes()
        };
        if grows && world.chance(self.kills_growing) {
            world.state().kill_in = Some(world.below(20));
        }
        let bytes = match world.attach(index) {
            Ok(bytes) => bytes,
            Err(before) => {
                let reason = format!("it had {before} bytes");
                return face.phase(VolumePhase::Stopped, Reason::DeviceShrunk, reason);
            }
        };
        let marks = world.state().disks[index].marks.clone();
        let fresh = || Arc::new(Marks::in_memory(marks.blocks()));
        let marks = if self.compare_only { fresh() } else { marks };
        let tracker = if self.compare_only { "compare" } else { "ebpf" };
        face.update(|status| status.tracker = tracker);
        let freezable = self.freezable;
        let filtered = {
            let state = world.state();
            let filter = state.disks[index].filter.as_ref();
            filter.map(|filter| filter.open(&state.group))
        };
        let marks = filtered.as_ref().map_or(marks, |shared| shared.marks().clone());
        if filtered.is_some() {
            world.state().disks[index].marks = marks.clone();
        }
        let world_of = world.clone();
        let tracker =
            Arc::new(MemoryTracker { world: world_of, marks, index, freezable, filtered });
        let disk = MemoryDisk { world: world.clone(), index, bytes, queue: Vec::new() };
        let shape = Shape::new(bytes as u64, BLOCK as u32, &[]);
        let path = format!("/dev/v{index}").into();
        let bell = agent.bell.clone();
        let disk = Box::new(disk);
        let volume = Volume::new(face, shape, tracker, self.compare_only, path, disk, bell);
        let volume = Arc::new(volume);
        let dial = SimDial { remote: remote.clone(), volume: index };
        let shipper = Shipper::new(volume.clone(), agent.commons.clone(), Box::new(dial));
        agent.shippers[index] = Some(shipper);
        agent.protected.lock().unwrap().volumes.push(volume);
    }

    /// The agent is killed and started again; marks go on.
    pub fn restart(&mut self) {
        self.kills += 1;
        self.note_give_ups();
        self.world.agent_begins();
        self.agent = Agent::start(&self.world);
        let count = self.agent.faces.len();
        // Killed at it, the next process attaches all of them.
        self.living(|rig| (0..count).for_each(|index| rig.attach(index)));
    }

    /// The whole server is booted anew.
    pub fn reboot(&mut self) {
        self.world.note("reboot", &[]);
        self.world.reboot();
        self.restart();
    }

    fn note_give_ups(&mut self) {
        self.give_ups += self.faces().map(|status| u64::from(status.give_ups)).sum::<u64>();
    }

    pub fn faces(&self) -> impl Iterator<Item = Status> {
        self.agent.faces.iter().map(|face| face.status())
    }

    /// One step of everybody, in seeded order; time moves on when nobody has anything to do.
    pub fn round(&mut self) {
        let mut wait = Duration::MAX;
        let shippers = self.agent.shippers.len() as u64;
        for _ in 0..shippers + 3 {
            let any = self.world.below(shippers + 3);
            self.world.note("step", &[any]);
            if any <= shippers {
                wait = wait.min(self.agent_step(any as usize));
            } else if any == shippers + 1 {
                if self.remote.work() {
                    wait = Duration::ZERO;
                }
            } else {
                self.remote.stale();
            }
            self.world.moment();
            self.check();
        }
        self.remote.tend();
        self.reopen();
        let random = self.world.below(20);
        let step = wait.min(Duration::from_millis(500)) + Duration::from_millis(random);
        self.world.state().now += step;
    }

    fn agent_step(&mut self, any: usize) -> Duration {
        self.world.no_proof();
        let mut wait = Duration::ZERO;
        self.living(|rig| {
            wait = match rig.agent.shippers.get_mut(any) {
                Some(Some(shipper)) => shipper.step(),
                Some(None) => Duration::MAX,
                None => rig.agent.coordinator.step(),
            };
        });
        wait
    }

    /// A volume whose disk was lost, or has another size, is opened anew, as its thread does: at
    /// once if it has grown, else soon after the disk is back.
    fn reopen(&mut self) {
        for index in 0..self.agent.shippers.len() {
            let (gone, shrunk) = {
                let state = self.world.state();
                (state.disks[index].gone, state.disks[index].shrunk_to.is_some())
            };
            let due = match &self.agent.shippers[index] {
                Some(shipper) if !shipper.lost_disk() => false,
                Some(shipper) => shipper.grown() || (!gone && self.world.chance(50)),
                None => !shrunk,
            };
            if due && !self.living(|rig| rig.open_anew(index)) {
                return;
            }
        }
    }

    fn open_anew(&mut self, index: usize) {
        if let Some(shipper) = self.agent.shippers[index].take() {
            let mut protected = self.agent.protected.lock().unwrap();
            let id = volume_id(index);
            let at = protected.volumes.iter().position(|volume| volume.id() == id);
            let volume = protected.volumes.swap_remove(at.expect("it is protected"));
            drop(protected);
            drop(shipper);
            volume.close();
        }
        self.attach(index);
    }

    fn check(&self) {
        self.remote.check();
        if self.compare_only {
            return;
        }
        for volume in 0..self.agent.faces.len() {
            if let Some(image) = self.remote.image(volume)
                && self.remote.is_sound(volume)
            {
                self.world.check_nothing_lost(volume, &image);
            }
        }
    }

    pub fn run(&mut self, rounds: usize) {
        (0..rounds).for_each(|_| self.round());
    }

    pub fn run_for(&mut self, time: Duration) {
        let end = self.world.now() + time;
        while self.world.now() < end {
            self.round();
        }
    }

    /// Whether every volume follows.
    pub fn follows(&self) -> bool {
        self.faces().all(|status| status.phase == VolumePhase::Following)
    }

    /// Until every volume follows.
    pub fn follow(&mut self) {
        for _ in 0..5000 {
            if self.follows() {
                return;
            }
            self.round();
        }
        panic!("seed {}: {:?}", self.seed, self.faces().collect::<Vec<_>>());
    }

    /// Until there is a point of all volumes, exact, whose cut was made after now; how long that
    /// took, or none if it takes longer than `limit`.
    pub fn exact_point(&mut self, limit: Duration) -> Option<Duration> {
        let begun = self.world.now();
        let count = self.agent.faces.len();
        while self.world.now() < begun + limit {
            let exact = (0..count).all(|volume| {
                self.remote.manifests(volume).last().is_some_and(|manifest| {
                    manifest.consistency == Consistency::Crash
                        && manifest.members.len() == count
                        && u128::from(manifest.cut_time_ns) >= begun.as_nanos()
                })
            });
            if exact {
                return Some(self.world.now() - begun);
            }
            self.round();
        }
        None
    }

    /// No more faults: what is down comes up, what was stopped is started again.
    pub fn heal(&mut self) {
        {
            let mut state = self.remote.state();
            (state.faults, state.dies_in) = (Default::default(), None);
        }
        {
            let mut state = self.world.state();
            (state.missing, state.kill_in, state.raw) = (0, None, false);
            for disk in &mut state.disks {
                disk.bad.clear();
                disk.gone = false;
            }
        }
        for index in 0..self.agent.faces.len() {
            if self.world.state().disks[index].shrunk_to.is_some() {
                self.world.unshrink(index);
            }
        }
        self.remote.restart();
    }

    /// No more writes, no more faults.
    pub fn calm(&mut self) {
        (self.world.state().busy, self.world.state().kill_in) = (0, None);
        self.world.settle();
        self.remote.state().faults = Default::default();
        self.follow();
        self.note_give_ups();
    }

    /// The coordinator alone: how long until it has more to do.
    pub fn coordinate(&mut self) -> Duration {
        self.agent_step(self.agent.shippers.len())
    }

    pub fn take(&mut self, what: OrderKind) {
        self.number += 1;
        let order = Order { number: self.number, what };
        assert!(self.agent.orders.lock().unwrap().take(&order));
    }

    pub fn order(&mut self, what: OrderKind) -> OrderState {
        self.take(what);
        for _ in 0..100_000 {
            self.round();
            let state = self.agent.orders.lock().unwrap().states()[&self.number].clone();
            if !matches!(state, OrderState::Running { .. }) {
                return state;
            }
        }
        let state = self.agent.orders.lock().unwrap().states();
        panic!("seed {}: order hangs: {state:?} {:?}", self.seed, self.faces().collect::<Vec<_>>());
    }

    pub fn cut(&mut self) -> (String, bool) {
        match self.order(OrderKind::Cut) {
            OrderState::Done { result: OrderResult::Cut { point, exact } } => {
                for volume in 0..self.agent.faces.len() {
                    let committed = self.remote.acknowledged_cut(volume).to_string();
                    assert_eq!(committed, point, "committed by all");
                }
                (point, exact)
            }
            other => panic!("seed {}: {other:?}", self.seed),
        }
    }

    /// Differing bytes by volume.
    pub fn verify(&mut self) -> Vec<u64> {
        match self.order(OrderKind::Verify) {
            OrderState::Done { result: OrderResult::Verify { volumes } } => {
                volumes.iter().map(|row| row.differing_bytes).collect()
            }
            other => panic!("seed {}: {other:?}", self.seed),
        }
    }

    /// Blocks in which source and target differ, by volume.
    pub fn differing(&self) -> Vec<Vec<usize>> {
        let differing = |volume: usize| {
            let theirs = self.remote.read(volume);
            let state = self.world.state();
            assert_eq!(state.disks[volume].data.len(), theirs.len(), "seed {}", self.seed);
            let blocks = state.disks[volume].data.chunks(BLOCK).zip(theirs.chunks(BLOCK));
            blocks.enumerate().filter(|(_, (a, b))| a != b).map(|(i, _)| i).collect()
        };
        (0..self.agent.faces.len()).map(differing).collect()
    }

    pub fn check_equal(&self) {
        let differing = self.differing();
        assert!(differing.iter().all(Vec::is_empty), "seed {}: {differing:?}", self.seed);
    }

    /// Disks grow while nothing else happens, but that the agent may be killed at it: what is sent
    /// then is the new part, and nothing is compared.
    pub fn grow_at_rest(&mut self, sectors: &[u64]) {
        self.remote.count_sent();
        let kills = self.kills;
        let compares = |rig: &Self| rig.faces().map(|status| status.compares).sum::<u64>();
        let before = compares(self);
        let mut new_part = Vec::new();
        for (index, sectors) in sectors.iter().enumerate() {
            let first = self.world.state().disks[index].data.len() / BLOCK;
            self.world.grow(index, *sectors);
            let end = self.world.state().disks[index].data.len().div_ceil(BLOCK);
            new_part.push(if *sectors > 0 { first as u64..end as u64 } else { 0..0 });
        }
        let behind = |disk: &DiskState| disk.pinned.bytes() < disk.data.len();
        while self.world.state().disks.iter().any(behind) {
            self.round();
        }
        self.calm();
        let (point, is_exact) = self.cut();
        assert!(is_exact, "quiet and connected: exact, {point}");
        self.check_equal();
        for (volume, new_part) in new_part.into_iter().enumerate() {
            let sent: Vec<u64> = self.remote.sent(volume).into_iter().collect();
            assert_eq!(sent, new_part.collect::<Vec<_>>(), "seed {}: {volume}", self.seed);
        }
        let due = if self.kills == kills { before } else { 0 };
        assert_eq!(compares(self), due, "seed {}: nothing is to be compared", self.seed);
    }

    /// What the target has to do is done.
    pub fn work_off(&self) {
        while self.remote.work() {}
        self.remote.check();
    }
}

impl Agent {
    /// A process that has attached nothing yet.
    fn start(world: &Arc<World>) -> Self {
        let env: Arc<dyn Env> = world.clone();
        let changed: Arc<dyn Fn() + Send + Sync> = Arc::new(|| {});
        let memory = Arc::new(Memory::new(0).unwrap());
        let orders = Arc::new(Mutex::new(Orders::default()));
        let commons = Arc::new(Commons {
            env: env.clone(),
            memory: memory.clone(),
            workers: Arc::new(Workers::start(0).unwrap()),
            signer: Arc::new(TestSigner),
            server: SERVER,
            machine: MACHINE,
        });
        let count = world.state().disks.len();
        let face = |i| Arc::new(Face::new(volume_id(i), format!("v{i}"), changed.clone()));
        let faces: Vec<_> = (0..count).map(face).collect();
        let volumes = Vec::new();
        let protected =
            Arc::new(Mutex::new(Protected { faces: faces.clone(), volumes, goal: GOAL }));
        let freezer = Box::new(MemoryFreezer(world.clone()));
        let cutter = Box::new(MemoryCutter(world.clone()));
        let (given, taken) = (protected.clone(), orders.clone());
        let coordinator = Coordinator::new(env, memory, freezer, cutter, given, taken, changed);
        let shippers = (0..count).map(|_| None).collect();
        let bell = Arc::new(Bell::default());
        Self { faces, shippers, coordinator, orders, protected, commons, bell }
    }
}
