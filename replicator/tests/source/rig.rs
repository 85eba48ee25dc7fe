//! Puts the source's parts over a world and its targets, and drives them from one thread.

use crate::target::{FakeDial, FakeTarget};
use crate::world::{BLOCK, MemoryDisk, MemoryFreezer, MemoryTracker, World};
use secondsite::source::buffers::Memory;
use secondsite::source::coordinator::{Coordinator, Protected};
use secondsite::source::orders::Orders;
use secondsite::source::pipeline::Workers;
use secondsite::source::runs::Shape;
use secondsite::source::seams::{Env, Signer};
use secondsite::source::shipper::{Commons, Shipper};
use secondsite::source::volume::{Bell, Face, Status, Volume};
use secondsite_control::api::{Order, OrderKind, OrderResult, OrderState, VolumePhase};
use secondsite_format::ids::{ServerId, VolumeId};
use secondsite_tracker::marks::Marks;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Seeds of a test: `SECONDSITE_SEED` runs a single one, `SECONDSITE_LONG` ten times as many.
pub fn seeds(count: u64) -> Vec<u64> {
    let long = std::env::var("SECONDSITE_LONG").is_ok_and(|long| !long.is_empty());
    let count = if long { 10 * count } else { count };
    match std::env::var("SECONDSITE_SEED") {
        Ok(seed) => vec![seed.parse().expect("a number")],
        Err(_) => (0..count).collect(),
    }
}

struct NoSigner;
impl Signer for NoSigner {
    fn sign(&self, _bytes: &[u8]) -> Result<([u8; 65], [u8; 64]), String> {
        Ok(([4; 65], [5; 64]))
    }
}

pub struct Rig {
    pub world: Arc<World>,
    pub targets: Vec<Arc<FakeTarget>>,
    pub give_ups: u64,
    seed: u64,
    freezable: bool,
    compare_only: bool,
    memory: Arc<Memory>,
    volumes: Vec<Arc<Volume>>,
    shippers: Vec<Shipper>,
    coordinator: Coordinator,
    orders: Arc<Mutex<Orders>>,
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
        println!("seed {seed}");
        let world = World::new(seed, count, blocks);
        let targets: Vec<_> = (0..count).map(|i| FakeTarget::new(&world, i)).collect();
        for disk in &world.state().disks {
            disk.marks.set_compare_due(true);
        }
        let memory = Arc::new(Memory::new(0).unwrap());
        let orders = Arc::new(Mutex::new(Orders::default()));
        let parts = Parts { world: &world, targets: &targets, freezable, compare_only };
        let (volumes, shippers, coordinator) = parts.start(&memory, &orders);
        Self {
            give_ups: 0,
            seed,
            freezable,
            compare_only,
            memory,
            volumes,
            shippers,
            coordinator,
            orders,
            number: 0,
            world,
            targets,
        }
    }

    /// The agent is killed and started again; marks go on.
    pub fn restart(&mut self) {
        self.note_give_ups();
        let Self { world, targets, freezable, compare_only, .. } = &*self;
        let parts = Parts { world, targets, freezable: *freezable, compare_only: *compare_only };
        (self.volumes, self.shippers, self.coordinator) = parts.start(&self.memory, &self.orders);
    }

    fn note_give_ups(&mut self) {
        self.give_ups += self.faces().map(|status| u64::from(status.give_ups)).sum::<u64>();
    }

    pub fn faces(&self) -> impl Iterator<Item = Status> {
        self.volumes.iter().map(|volume| volume.face.status())
    }

    /// One step of everybody, in seeded order; time moves on when nobody has anything to do.
    fn round(&mut self) {
        let mut wait = Duration::MAX;
        for _ in 0..self.shippers.len() + 1 {
            let any = self.world.state().rng.below(self.shippers.len() as u64 + 1) as usize;
            let step = match self.shippers.get_mut(any) {
                Some(shipper) => shipper.step(),
                None => self.coordinator.step(),
            };
            wait = wait.min(step);
            self.world.moment();
            for (i, target) in self.targets.iter().enumerate() {
                let phase = self.volumes[i].face.status().phase;
                if phase == VolumePhase::Following && !self.compare_only {
                    let target = target.state();
                    if !target.damaged {
                        self.world.check_nothing_lost(i, &target.image);
                    }
                }
            }
        }
        let random = self.world.state().rng.below(20);
        let step = wait.min(Duration::from_millis(500)) + Duration::from_millis(random);
        self.world.state().now += step;
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

    /// Until every volume follows.
    pub fn follow(&mut self) {
        for _ in 0..5000 {
            if self.faces().all(|status| status.phase == VolumePhase::Following) {
                return;
            }
            self.round();
        }
        panic!("seed {}: {:?}", self.seed, self.faces().collect::<Vec<_>>());
    }

    /// No more writes, no more faults.
    pub fn calm(&mut self) {
        self.world.state().busy = 0;
        self.world.settle();
        for target in &self.targets {
            let mut state = target.state();
            (state.breaks, state.forgets) = (0, 0);
        }
        self.follow();
        self.note_give_ups();
    }

    pub fn order(&mut self, what: OrderKind) -> OrderState {
        self.number += 1;
        assert!(self.orders.lock().unwrap().take(&Order { number: self.number, what }));
        for _ in 0..100_000 {
            self.round();
            let state = self.orders.lock().unwrap().states()[&self.number].clone();
            if !matches!(state, OrderState::Running { .. }) {
                return state;
            }
        }
        let state = self.orders.lock().unwrap().states();
        panic!("seed {}: order hangs: {state:?} {:?}", self.seed, self.faces().collect::<Vec<_>>());
    }

    pub fn cut(&mut self) -> (String, bool) {
        match self.order(OrderKind::Cut) {
            OrderState::Done { result: OrderResult::Cut { point, exact } } => {
                for target in &self.targets {
                    assert_eq!(target.state().durable.1.to_string(), point, "committed by all");
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

    pub fn check_equal(&self) {
        for (i, target) in self.targets.iter().enumerate() {
            let (state, target) = (self.world.state(), target.state());
            let blocks = state.disks[i].data.chunks(BLOCK).zip(target.image.chunks(BLOCK));
            let differing: Vec<_> =
                blocks.enumerate().filter(|(_, (a, b))| a != b).map(|(i, _)| i).collect();
            assert!(differing.is_empty(), "seed {}: volume {i}: {differing:?}", self.seed);
        }
    }
}

struct Parts<'a> {
    world: &'a Arc<World>,
    targets: &'a [Arc<FakeTarget>],
    freezable: bool,
    compare_only: bool,
}

impl Parts<'_> {
    fn start(
        &self,
        memory: &Arc<Memory>,
        orders: &Arc<Mutex<Orders>>,
    ) -> (Vec<Arc<Volume>>, Vec<Shipper>, Coordinator) {
        let env: Arc<dyn Env> = self.world.clone();
        let bell = Arc::new(Bell::default());
        let changed: Arc<dyn Fn() + Send + Sync> = Arc::new(|| {});
        let commons = Arc::new(Commons {
            env: env.clone(),
            memory: memory.clone(),
            workers: Arc::new(Workers::start(0).unwrap()),
            signer: Arc::new(NoSigner),
            server: ServerId([7; 16]),
            machine: [8; 32],
        });
        let volumes: Vec<_> =
            (0..self.targets.len()).map(|i| Arc::new(self.volume(i, &bell, &changed))).collect();
        let dial = |i: usize| Box::new(FakeDial(self.targets[i].clone()));
        let shippers = volumes.iter().enumerate();
        let shippers =
            shippers.map(|(i, volume)| Shipper::new(volume.clone(), commons.clone(), dial(i)));
        let shippers = shippers.collect();
        let protected = Arc::new(Mutex::new(Protected {
            faces: volumes.iter().map(|volume| volume.face.clone()).collect(),
            volumes: volumes.clone(),
            goal: Duration::from_secs(6),
        }));
        let freezer = Box::new(MemoryFreezer(self.world.clone()));
        let coordinator =
            Coordinator::new(env, memory.clone(), freezer, protected, orders.clone(), changed);
        (volumes, shippers, coordinator)
    }

    fn volume(&self, i: usize, bell: &Arc<Bell>, changed: &Arc<dyn Fn() + Send + Sync>) -> Volume {
        let (bytes, marks) = {
            let state = self.world.state();
            let disk = &state.disks[i];
            let blocks = disk.marks.blocks();
            let fresh = || Arc::new(Marks::in_memory(blocks));
            (disk.data.len() as u64, if self.compare_only { fresh() } else { disk.marks.clone() })
        };
        let face =
            Arc::new(Face::new(VolumeId([i as u8 + 1; 16]), format!("v{i}"), changed.clone()));
        face.update(|status| status.tracker = if self.compare_only { "compare" } else { "ebpf" });
        let world = self.world.clone();
        let tracker =
            MemoryTracker { world: world.clone(), marks, index: i, freezable: self.freezable };
        let disk = MemoryDisk { world, index: i, queue: Vec::new() };
        let shape = Shape::new(bytes, BLOCK as u32, &[]);
        let path = format!("/dev/v{i}").into();
        let disk = Box::new(disk);
        Volume::new(face, shape, Arc::new(tracker), self.compare_only, path, disk, bell.clone())
    }
}
