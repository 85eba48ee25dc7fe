//! Puts the real source over a world and the real target over its disks, and drives both from one
//! thread, step by step in seeded order.

use crate::network::SimDial;
use crate::remote::{KEY, MACHINE, Remote, SERVER, sign, volume_id};
use crate::world::{BLOCK, Killed, MemoryDisk, MemoryFreezer, MemoryTracker, World};
use secondsite::source::buffers::Memory;
use secondsite::source::coordinator::{Coordinator, Protected};
use secondsite::source::orders::Orders;
use secondsite::source::pipeline::Workers;
use secondsite::source::runs::Shape;
use secondsite::source::seams::{Env, Signer};
use secondsite::source::shipper::{Commons, Shipper};
use secondsite::source::volume::{Bell, Face, Status, Volume};
use secondsite_control::api::{Order, OrderKind, OrderResult, OrderState, VolumePhase};
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
    volumes: Vec<Arc<Volume>>,
    shippers: Vec<Shipper>,
    coordinator: Coordinator,
    orders: Arc<Mutex<Orders>>,
}

pub struct Rig {
    pub world: Arc<World>,
    pub remote: Arc<Remote>,
    pub give_ups: u64,
    pub kills: u64,
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

    fn build(seed: u64, count: usize, blocks: usize, freezable: bool, compare_only: bool) -> Self {
        let world = World::new(seed, count, blocks);
        let remote = Remote::new(&world);
        remote.start();
        for disk in &world.state().disks {
            disk.marks.set_compare_due(true);
        }
        let agent = Agent::start(&world, &remote, freezable, compare_only);
        Self {
            give_ups: 0,
            kills: 0,
            seed,
            freezable,
            compare_only,
            agent,
            number: 0,
            world,
            remote,
        }
    }

    /// The agent is killed and started again; marks go on.
    pub fn restart(&mut self) {
        self.kills += 1;
        self.note_give_ups();
        self.world.agent_begins();
        self.agent = Agent::start(&self.world, &self.remote, self.freezable, self.compare_only);
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
        self.agent.volumes.iter().map(|volume| volume.face.status())
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
        self.world.state().in_agent = true;
        self.world.no_proof();
        let agent = &mut self.agent;
        let step = catch_unwind(AssertUnwindSafe(|| match agent.shippers.get_mut(any) {
            Some(shipper) => shipper.step(),
            None => agent.coordinator.step(),
        }));
        self.world.state().in_agent = false;
        match step {
            Ok(wait) => wait,
            Err(payload) if payload.is::<Killed>() => {
                self.restart();
                Duration::ZERO
            }
            Err(payload) => resume_unwind(payload),
        }
    }

    /// A volume whose disk was lost is opened anew when the disk is back, as its thread does.
    fn reopen(&mut self) {
        let lost = self.agent.shippers.iter().any(Shipper::lost_disk);
        let back = !self.world.state().disks.iter().any(|disk| disk.gone);
        if lost && back {
            self.restart();
        }
    }

    fn check(&self) {
        self.remote.check();
        if self.compare_only {
            return;
        }
        for volume in 0..self.agent.volumes.len() {
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
        let count = self.agent.volumes.len();
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
        self.remote.restart();
    }

    /// No more writes, no more faults.
    pub fn calm(&mut self) {
        self.world.state().busy = 0;
        self.world.settle();
        self.remote.state().faults = Default::default();
        self.follow();
        self.note_give_ups();
    }

    pub fn order(&mut self, what: OrderKind) -> OrderState {
        self.number += 1;
        let order = Order { number: self.number, what };
        assert!(self.agent.orders.lock().unwrap().take(&order));
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
                for volume in 0..self.agent.volumes.len() {
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
            let blocks = state.disks[volume].data.chunks(BLOCK).zip(theirs.chunks(BLOCK));
            blocks.enumerate().filter(|(_, (a, b))| a != b).map(|(i, _)| i).collect()
        };
        (0..self.agent.volumes.len()).map(differing).collect()
    }

    pub fn check_equal(&self) {
        let differing = self.differing();
        assert!(differing.iter().all(Vec::is_empty), "seed {}: {differing:?}", self.seed);
    }

    /// What the target has to do is done.
    pub fn work_off(&self) {
        while self.remote.work() {}
        self.remote.check();
    }
}

impl Agent {
    fn start(
        world: &Arc<World>,
        remote: &Arc<Remote>,
        freezable: bool,
        compare_only: bool,
    ) -> Self {
        let env: Arc<dyn Env> = world.clone();
        let bell = Arc::new(Bell::default());
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
        let volume = |index: usize| {
            let (bytes, marks) = {
                let state = world.state();
                let disk = &state.disks[index];
                let fresh = || Arc::new(Marks::in_memory(disk.marks.blocks()));
                (disk.data.len() as u64, if compare_only { fresh() } else { disk.marks.clone() })
            };
            let face = Arc::new(Face::new(volume_id(index), format!("v{index}"), changed.clone()));
            face.update(|status| status.tracker = if compare_only { "compare" } else { "ebpf" });
            let tracker = MemoryTracker { world: world.clone(), marks, index, freezable };
            let disk = Box::new(MemoryDisk { world: world.clone(), index, queue: Vec::new() });
            let shape = Shape::new(bytes, BLOCK as u32, &[]);
            let path = format!("/dev/v{index}").into();
            let tracker = Arc::new(tracker);
            Arc::new(Volume::new(face, shape, tracker, compare_only, path, disk, bell.clone()))
        };
        let count = world.state().disks.len();
        let volumes: Vec<_> = (0..count).map(volume).collect();
        let shipper = |(volume, of): (usize, &Arc<Volume>)| {
            let dial = SimDial { remote: remote.clone(), volume };
            Shipper::new(of.clone(), commons.clone(), Box::new(dial))
        };
        let shippers = volumes.iter().enumerate().map(shipper).collect();
        let protected = Arc::new(Mutex::new(Protected {
            faces: volumes.iter().map(|volume| volume.face.clone()).collect(),
            volumes: volumes.clone(),
            goal: GOAL,
        }));
        let freezer = Box::new(MemoryFreezer(world.clone()));
        let coordinator =
            Coordinator::new(env, memory, freezer, protected, orders.clone(), changed);
        Self { volumes, shippers, coordinator, orders }
    }
}
