//! A server in memory: disks, an application that writes to them at seeded moments and marks as the
//! tracker does, a clock that moves only when asked.

use secondsite::source::seams::{Batch, Disk, DiskError, Env, Freeze, Tracker};
use secondsite_tracker::ebpf::Audit;
use secondsite_tracker::marks::{BlockRun, Marks};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

pub const BLOCK: usize = 4096;

/// A small generator: the same seed, the same run.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

struct Write {
    run: BlockRun,
    fill: u8,
    landed: bool,
}

pub struct DiskState {
    pub data: Vec<u8>,
    pub marks: Arc<Marks>,
    writes: Vec<Write>,
    /// Writes that the tracker missed since its audit began anew.
    pub missed: u64,
    /// Blocks that fail to read.
    pub bad: BTreeSet<u64>,
    pub gone: bool,
    /// The image at the last good audit.
    pub proof: Vec<u8>,
}

pub struct State {
    pub rng: Rng,
    pub now: Duration,
    pub disks: Vec<DiskState>,
    /// Percent of the moments at which the application does something.
    pub busy: u64,
    /// Percent of its writes that the tracker misses.
    pub missing: u64,
    frozen: bool,
    pub freezes: u64,
}

/// The server.
pub struct World(Mutex<State>);

impl World {
    pub fn new(seed: u64, disks: usize, blocks: usize) -> Arc<Self> {
        let mut rng = Rng(seed);
        let disks = (0..disks)
            .map(|_| {
                let mut data = vec![0; blocks * BLOCK];
                for block in data.chunks_mut(BLOCK) {
                    if rng.chance(70) {
                        block.fill(rng.next() as u8);
                    }
                }
                DiskState {
                    proof: data.clone(),
                    data,
                    marks: Arc::new(Marks::in_memory(blocks as u64)),
                    writes: Vec::new(),
                    missed: 0,
                    bad: BTreeSet::new(),
                    gone: false,
                }
            })
            .collect();
        let now = Duration::from_secs(1000);
        Arc::new(Self(Mutex::new(State {
            rng,
            now,
            disks,
            busy: 0,
            missing: 0,
            frozen: false,
            freezes: 0,
        })))
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// A moment passes: the application may queue a write, one may reach the disk, one may
    /// complete.
    pub fn moment(&self) {
        let mut state = self.state();
        let busy = state.busy;
        if state.frozen || !state.rng.chance(busy) {
            return;
        }
        let State { rng, disks, missing, .. } = &mut *state;
        let count = disks.len() as u64;
        let disk = &mut disks[rng.below(count) as usize];
        match rng.below(3) {
            0 if disk.writes.len() < 4 => {
                let first = rng.below(disk.marks.blocks());
                // Mostly small; now and then more than fits one frame.
                let most = if rng.chance(5) { disk.marks.blocks() } else { 3 };
                let count = (1 + rng.below(most)).min(disk.marks.blocks() - first);
                let run = BlockRun { first, count };
                if rng.chance(*missing) {
                    disk.missed += 1;
                    let range = first as usize * BLOCK..(first + count) as usize * BLOCK;
                    disk.data[range].fill(rng.next() as u8);
                } else {
                    disk.marks.mark(run);
                    let fill = if rng.chance(20) { 0 } else { rng.next() as u8 };
                    disk.writes.push(Write { run, fill, landed: false });
                }
            }
            1 => {
                if let Some(write) = disk.writes.iter_mut().find(|write| !write.landed) {
                    write.landed = true;
                    let (first, end) = (write.run.first, write.run.first + write.run.count);
                    disk.data[first as usize * BLOCK..end as usize * BLOCK].fill(write.fill);
                }
            }
            _ => {
                if let Some(i) = disk.writes.iter().position(|write| write.landed) {
                    let write = disk.writes.remove(i);
                    disk.marks.mark(write.run);
                }
            }
        }
    }

    /// All that is in flight completes.
    pub fn settle(&self) {
        for disk in &mut self.state().disks {
            for write in std::mem::take(&mut disk.writes) {
                let (first, end) = (write.run.first, write.run.first + write.run.count);
                if !write.landed {
                    disk.data[first as usize * BLOCK..end as usize * BLOCK].fill(write.fill);
                }
                disk.marks.mark(write.run);
            }
        }
    }

    /// No update is lost: a block that differs from what is committed is marked, or on its way.
    pub fn check_nothing_lost(&self, disk: usize, committed: &[u8]) {
        let state = self.state();
        let disk = &state.disks[disk];
        if disk.missed > 0 || disk.marks.compare_due() {
            return;
        }
        // A write fills whole blocks with one byte: their beginning tells.
        for (i, (ours, theirs)) in disk.data.chunks(BLOCK).zip(committed.chunks(BLOCK)).enumerate()
        {
            let block = BlockRun { first: i as u64, count: 1 };
            let flying = disk.writes.iter().any(|write| {
                (write.run.first..write.run.first + write.run.count).contains(&(i as u64))
            });
            assert!(
                ours[..8] == theirs[..8] || flying || disk.marks.holds(block),
                "block {i} is lost"
            );
        }
    }
}

impl Env for World {
    fn now(&self) -> Duration {
        self.state().now
    }
    fn wall_ns(&self) -> u64 {
        self.state().now.as_nanos() as u64
    }
    fn random(&self) -> [u8; 16] {
        let mut state = self.state();
        let (a, b) = (state.rng.next(), state.rng.next());
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&a.to_le_bytes());
        bytes[8..].copy_from_slice(&b.to_le_bytes());
        bytes
    }
}

/// One of its disks, for reading.
pub struct MemoryDisk {
    pub world: Arc<World>,
    pub index: usize,
    pub queue: Vec<Batch>,
}

impl Disk for MemoryDisk {
    fn check(&mut self) -> Result<(), DiskError> {
        if self.world.state().disks[self.index].gone {
            return Err(DiskError::Gone { path: "/dev/mem".into(), cause: "pulled".into() });
        }
        Ok(())
    }
    fn submit(&mut self, batch: Batch) -> Result<(), DiskError> {
        self.check()?;
        self.queue.push(batch);
        Ok(())
    }
    fn wait(&mut self) -> Result<Batch, DiskError> {
        let any = self.world.state().rng.below(self.queue.len() as u64) as usize;
        let mut batch = self.queue.swap_remove(any);
        for piece in &batch.pieces {
            // Block by block, and time passes in between.
            for at in (0..piece.bytes).step_by(BLOCK) {
                self.world.moment();
                let state = self.world.state();
                let disk = &state.disks[self.index];
                let (from, len) = (piece.offset as usize + at, BLOCK.min(piece.bytes - at));
                if disk.bad.contains(&((from / BLOCK) as u64)) {
                    batch.unreadable.push((from as u64, len as u64));
                }
                batch.buffer.bytes_mut()[piece.at + at..piece.at + at + len]
                    .copy_from_slice(&disk.data[from..from + len]);
            }
        }
        Ok(batch)
    }
    fn outstanding(&self) -> usize {
        self.queue.len()
    }
    fn urgent(&mut self, _urgent: bool) {}
}

/// Its tracker.
pub struct MemoryTracker {
    pub world: Arc<World>,
    pub marks: Arc<Marks>,
    pub index: usize,
    pub freezable: bool,
}

impl Tracker for MemoryTracker {
    fn marks(&self) -> &Arc<Marks> {
        &self.marks
    }
    fn audit(&self) -> Audit {
        self.world.moment();
        let audit = {
            let mut state = self.world.state();
            let disk = &mut state.disks[self.index];
            if !disk.writes.is_empty() {
                Audit::Busy
            } else if disk.missed > 0 {
                Audit::Gap(format!("{} writes", disk.missed))
            } else {
                disk.proof = disk.data.clone();
                Audit::Good
            }
        };
        self.world.moment();
        audit
    }
    fn rebase(&self) -> Result<(), String> {
        self.world.state().disks[self.index].missed = 0;
        Ok(())
    }
    fn mounts(&self) -> Vec<PathBuf> {
        if self.freezable { vec!["/mnt".into()] } else { Vec::new() }
    }
    fn sync(&self, _mount: &Path) -> Result<Duration, String> {
        Ok(Duration::from_millis(20))
    }
    fn writes_in_flight(&self) -> bool {
        !self.world.state().disks[self.index].writes.is_empty()
    }
}

/// Its freezer.
pub struct MemoryFreezer(pub Arc<World>);

impl Freeze for MemoryFreezer {
    fn freeze(&mut self, _mounts: &[PathBuf], _limit: Duration) -> Result<(), String> {
        self.0.settle();
        let mut state = self.0.state();
        state.frozen = true;
        state.freezes += 1;
        Ok(())
    }
    fn thaw(&mut self) -> Result<(Duration, bool), String> {
        let mut state = self.0.state();
        state.frozen = false;
        state.now += Duration::from_millis(10);
        Ok((Duration::from_millis(10), true))
    }
}
