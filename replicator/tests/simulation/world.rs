//! A server in memory: disks, an application that writes to them at seeded moments and marks as the
//! tracker does, a clock that moves only when asked; and the trace of all that happens.
//!
//! Every write has a stamp of its own in every sector, so that no two versions of a block are
//! alike. The agent's process may be killed at any moment: it unwinds, and only marks stay. A disk
//! may grow by any number of sectors; one that shrinks gets its size back with other content.

use crate::filtered::Filtered;
use crate::pinned::{Pinned, PinnedSets};
use secondsite::source::seams::{Batch, Disk, DiskError, Env, Freeze, Tracker};
use secondsite_tracker::ebpf::Audit;
use secondsite_tracker::filter::shared::{Group, Shared};
use secondsite_tracker::grow::grow;
use secondsite_tracker::header::Header;
use secondsite_tracker::marks::{BlockRun, Marks};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use xxhash_rust::xxh3::Xxh3;

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

/// How a process that is killed unwinds.
pub struct Killed;

pub struct Write {
    pub run: BlockRun,
    /// None writes zeros.
    stamp: Option<u64>,
    pub landed: bool,
    /// Behind a filter: its number there, and whether it waits to be let through.
    pub tag: u16,
    pub waits: bool,
}

impl Write {
    pub fn random(bytes: usize, rng: &mut Rng, stamp: &mut u64) -> Self {
        let blocks = bytes.div_ceil(BLOCK) as u64;
        let first = rng.below(blocks);
        // Mostly small; now and then more than fits one frame.
        let most = if rng.chance(5) { blocks } else { 3 };
        let count = (1 + rng.below(most)).min(blocks - first);
        *stamp += 1;
        let stamp = (!rng.chance(20)).then_some(*stamp);
        let run = BlockRun { first, count };
        Self { run, stamp, landed: false, tag: 0, waits: false }
    }

    pub fn land(&self, data: &mut [u8]) {
        for block in self.run.first..self.run.first + self.run.count {
            let start = block as usize * BLOCK;
            // The last block of a disk may be a short one.
            let end = (start + BLOCK).min(data.len());
            put(&mut data[start..end], block, self.stamp);
        }
    }
}

/// A block's content: zero, or a byte throughout with stamp and place in each sector.
fn put(data: &mut [u8], block: u64, stamp: Option<u64>) {
    let Some(stamp) = stamp else { return data.fill(0) };
    for (i, bytes) in data.chunks_mut(512).enumerate() {
        put_sector(bytes, block * 8 + i as u64, stamp);
    }
}

fn put_sector(bytes: &mut [u8], sector: u64, stamp: u64) {
    bytes.fill(stamp as u8 | 1);
    bytes[..8].copy_from_slice(&stamp.to_le_bytes());
    bytes[8..16].copy_from_slice(&sector.to_le_bytes());
}

/// What all volumes were at one instant.
pub type Instant = Vec<Arc<Vec<u8>>>;

pub struct DiskState {
    pub data: Vec<u8>,
    /// Bytes that it has left while it is smaller than it was.
    pub shrunk_to: Option<usize>,
    /// The agent has seen that.
    shrunk_seen: bool,
    /// Its size when it was protected.
    assigned: usize,
    /// As the agent's process has them.
    pub marks: Arc<Marks>,
    pub writes: Vec<Write>,
    /// What its writes go through, if there is one.
    pub filter: Option<Filtered>,
    /// Writes that the tracker missed since its audit began anew.
    pub missed: u64,
    /// Blocks that fail to read.
    pub bad: BTreeSet<u64>,
    pub gone: bool,
    pub pinned: Pinned,
    /// Behind a filter: what it held at its last flip.
    pub flipped: Option<Arc<Vec<u8>>>,
}

impl DiskState {
    /// Its size now, bytes.
    pub fn bytes(&self) -> usize {
        self.shrunk_to.unwrap_or(self.data.len())
    }
}

pub struct State {
    pub rng: Rng,
    pub now: Duration,
    pub disks: Vec<DiskState>,
    /// Percent of the moments at which the application does something.
    pub busy: u64,
    /// Percent of its writes that the tracker misses.
    pub missing: u64,
    /// It also writes below the file systems, where no freeze holds it.
    pub raw: bool,
    frozen: bool,
    pub freezes: u64,
    stamp: u64,
    /// The agent's process is running its code now.
    pub in_agent: bool,
    /// Moments of the agent's own until it is killed.
    pub kill_in: Option<u64>,
    /// By cut: the instant at which the last attempt to prove it began.
    pub instants: BTreeMap<[u8; 16], Instant>,
    /// Of all disks behind the filter.
    pub group: Group,
    /// The member whose audit came last in the proof that is going on.
    proving: Option<usize>,
    trace: Xxh3,
    loud: bool,
}

impl State {
    /// What all disks hold now; those behind the filter, what they held when they were cut.
    pub fn instant(&self) -> Instant {
        let held = |disk: &DiskState| match &disk.flipped {
            Some(flipped) => flipped.clone(),
            None => Arc::new(disk.data.clone()),
        };
        self.disks.iter().map(held).collect()
    }
}

/// The server.
pub struct World(Mutex<State>);

impl World {
    pub fn new(seed: u64, disks: usize, blocks: usize) -> Arc<Self> {
        let mut rng = Rng(seed);
        let disks = (0..disks)
            .map(|_| {
                let mut data = vec![0; blocks * BLOCK];
                for (i, block) in data.chunks_mut(BLOCK).enumerate() {
                    if rng.chance(70) {
                        put(block, i as u64, Some(rng.next() | 1 << 63));
                    }
                }
                let pinned = Pinned::fresh(data.len());
                DiskState {
                    assigned: data.len(),
                    shrunk_to: None,
                    shrunk_seen: false,
                    data,
                    marks: pinned.open(),
                    pinned,
                    writes: Vec::new(),
                    filter: None,
                    flipped: None,
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
            raw: false,
            frozen: false,
            freezes: 0,
            stamp: 0,
            in_agent: false,
            kill_in: None,
            instants: BTreeMap::new(),
            group: Group::in_memory(),
            proving: None,
            trace: Xxh3::new(),
            loud: std::env::var_os("SECONDSITE_TRACE").is_some(),
        })))
    }

    /// Notes an event in the trace.
    pub fn note(&self, what: &str, values: &[u64]) {
        let mut state = self.state();
        let now = state.now.as_nanos() as u64;
        if state.loud {
            eprintln!("{now:>16} {what} {values:x?}");
        }
        state.trace.update(what.as_bytes());
        state.trace.update(&now.to_le_bytes());
        values.iter().for_each(|value| state.trace.update(&value.to_le_bytes()));
    }

    pub fn below(&self, end: u64) -> u64 {
        self.state().rng.below(end)
    }

    pub fn chance(&self, percent: u64) -> bool {
        self.state().rng.chance(percent)
    }

    /// Digest of all events so far.
    pub fn trace(&self) -> u64 {
        self.state().trace.digest()
    }

    /// The agent's process begins: whoever froze has thawed.
    pub fn agent_begins(&self) {
        let mut state = self.state();
        (state.frozen, state.in_agent, state.kill_in) = (false, false, None);
    }

    /// The agent attaches itself to a disk: it finds what is pinned, and makes it grow with the
    /// disk. Bytes of the volume, or those that it had when it was larger.
    pub fn attach(&self, index: usize) -> Result<usize, usize> {
        let (header, bytes, assigned) = {
            let state = self.state();
            let disk = &state.disks[index];
            (disk.pinned.header.clone(), disk.bytes(), disk.assigned)
        };
        self.note("attach", &[index as u64, bytes as u64]);
        let mut sets = PinnedSets { world: self, index };
        let Ok(extent) = grow(&mut sets, &header, BLOCK as u32, bytes as u64 / 512);
        let marked = (extent.sectors << 9) as usize;
        if marked > bytes {
            Header::new(&header[..]).set_compare_due(true);
        }
        let before = marked.max(assigned);
        let state = &mut *self.state();
        let disk = &mut state.disks[index];
        if before > bytes {
            disk.shrunk_seen = true;
            return Err(before);
        }
        disk.marks = match &disk.filter {
            Some(filter) => filter.open(&state.group).marks().clone(),
            None => disk.pinned.open(),
        };
        Ok(bytes)
    }

    /// A disk grows by so many sectors, with content that nobody was seen to write.
    pub fn grow(&self, index: usize, sectors: u64) {
        self.note("grows", &[index as u64, sectors]);
        let mut state = self.state();
        let State { disks, rng, .. } = &mut *state;
        let data = &mut disks[index].data;
        for _ in 0..sectors {
            let at = data.len();
            data.resize(at + 512, 0);
            if rng.chance(70) {
                put_sector(&mut data[at..], at as u64 / 512, rng.next() | 1 << 63);
            }
        }
    }

    /// A disk loses what lies behind so many bytes, which are fewer than it was protected with.
    pub fn shrink(&self, index: usize) {
        let mut state = self.state();
        let State { disks, rng, .. } = &mut *state;
        let disk = &mut disks[index];
        let sectors = rng.below(disk.assigned as u64 / 512 - 1) + 1;
        disk.shrunk_to = Some(sectors as usize * 512);
        drop(state);
        self.note("shrinks", &[index as u64, sectors]);
    }

    /// It gets its size back. If anybody has seen it without, something else lies there now.
    pub fn unshrink(&self, index: usize) {
        self.note("has its size back", &[index as u64]);
        let mut state = self.state();
        let State { disks, rng, .. } = &mut *state;
        let disk = &mut disks[index];
        let seen = std::mem::take(&mut disk.shrunk_seen);
        let Some(from) = disk.shrunk_to.take().filter(|_| seen) else { return };
        let stamp = rng.next() | 1 << 63;
        for (sector, bytes) in (from as u64 / 512..).zip(disk.data[from..].chunks_mut(512)) {
            put_sector(bytes, sector, stamp);
        }
    }

    /// The server is booted anew: the marks are gone, and writes on their way landed or not.
    pub fn reboot(&self) {
        let mut state = self.state();
        let State { disks, rng, group, .. } = &mut *state;
        for disk in disks {
            if let Some(filter) = &disk.filter {
                disk.filter = Some(filter.anew(group));
            }
            for write in std::mem::take(&mut disk.writes) {
                if !write.landed && !write.waits && rng.chance(50) {
                    write.land(&mut disk.data);
                }
            }
            disk.missed = 0;
            disk.pinned = Pinned::fresh(disk.bytes());
            disk.marks = match &disk.filter {
                Some(filter) => filter.open(group).marks().clone(),
                None => disk.pinned.open(),
            };
        }
    }

    /// What is proven from here on is proven of another instant.
    pub fn no_proof(&self) {
        self.state().proving = None;
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A moment passes: the application may queue a write, one may reach the disk, one may
    /// complete; and the agent may be killed.
    pub fn moment(&self) {
        let mut state = self.state();
        if state.in_agent
            && let Some(left) = &mut state.kill_in
        {
            if *left == 0 {
                drop(state);
                self.note("agent killed", &[]);
                resume_unwind(Box::new(Killed));
            }
            *left -= 1;
        }
        let busy = state.busy;
        if (state.frozen && !state.raw) || !state.rng.chance(busy) {
            return;
        }
        let State { rng, disks, missing, stamp, .. } = &mut *state;
        let count = disks.len() as u64;
        let disk = &mut disks[rng.below(count) as usize];
        if disk.filter.is_some() {
            return Filtered::moment(disk, rng, stamp);
        }
        match rng.below(3) {
            0 if disk.writes.len() < 4 => {
                let write = Write::random(disk.bytes(), rng, stamp);
                let run = write.run;
                if rng.chance(*missing) {
                    disk.missed += 1;
                    write.land(&mut disk.data);
                } else {
                    disk.pinned.mark(run);
                    disk.writes.push(write);
                }
            }
            1 => {
                if let Some(write) = disk.writes.iter_mut().find(|write| !write.landed) {
                    write.landed = true;
                    write.land(&mut disk.data);
                }
            }
            _ => {
                if let Some(i) = disk.writes.iter().position(|write| write.landed) {
                    let write = disk.writes.remove(i);
                    disk.pinned.mark(write.run);
                }
            }
        }
    }

    /// All that is in flight completes.
    pub fn settle(&self) {
        for disk in &mut self.state().disks {
            if disk.filter.is_some() {
                Filtered::settle(disk);
                continue;
            }
            for write in std::mem::take(&mut disk.writes) {
                if !write.landed {
                    write.land(&mut disk.data);
                }
                disk.pinned.mark(write.run);
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
        // What it has grown by is marked as soon as the agent has seen it, and zero at the target.
        let seen = disk.bytes().min(disk.pinned.bytes());
        for (i, ours) in disk.data[..seen].chunks(BLOCK).enumerate() {
            let theirs = committed.get(i * BLOCK..i * BLOCK + 16).unwrap_or(&[0; 16]);
            let block = BlockRun { first: i as u64, count: 1 };
            let flying = disk.writes.iter().any(|write| {
                (write.run.first..write.run.first + write.run.count).contains(&(i as u64))
            });
            // Stamp and place stand in front; the rest of a block follows from them.
            let equal = ours[..16] == *theirs;
            assert!(equal || flying || disk.marks.holds(block), "block {i} is lost");
        }
    }
}

impl Env for World {
    fn now(&self) -> Duration {
        // As a real clock: no two looks see the same time.
        let mut state = self.state();
        state.now += Duration::from_nanos(1);
        state.now
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
    /// Its size when it was opened.
    pub bytes: usize,
    pub queue: Vec<Batch>,
}

impl MemoryDisk {
    fn present(&self) -> Result<(), DiskError> {
        if self.world.state().disks[self.index].gone {
            return Err(DiskError::Gone { path: "/dev/mem".into(), cause: "pulled".into() });
        }
        Ok(())
    }
}

impl Disk for MemoryDisk {
    fn check(&mut self) -> Result<(), DiskError> {
        self.present()?;
        let now = self.world.state().disks[self.index].bytes() as u64;
        let (path, before) = ("/dev/mem".into(), self.bytes as u64);
        match now.cmp(&before) {
            Ordering::Less => {
                self.world.state().disks[self.index].shrunk_seen = true;
                Err(DiskError::Shrunk { path, before, now })
            }
            Ordering::Greater => Err(DiskError::Grown { path, before, now }),
            Ordering::Equal => Ok(()),
        }
    }
    fn submit(&mut self, batch: Batch) -> Result<(), DiskError> {
        self.present()?;
        self.queue.push(batch);
        Ok(())
    }
    fn wait(&mut self) -> Result<Batch, DiskError> {
        self.present()?;
        let any = self.world.state().rng.below(self.queue.len() as u64) as usize;
        let mut batch = self.queue.swap_remove(any);
        for piece in &batch.pieces {
            // Block by block, and time passes in between.
            for at in (0..piece.bytes).step_by(BLOCK) {
                self.world.moment();
                let state = self.world.state();
                let disk = &state.disks[self.index];
                let (from, len) = (piece.offset as usize + at, BLOCK.min(piece.bytes - at));
                if disk.bad.contains(&((from / BLOCK) as u64)) || from + len > disk.bytes() {
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
    pub filtered: Option<Arc<Shared>>,
}

impl Tracker for MemoryTracker {
    fn marks(&self) -> &Arc<Marks> {
        &self.marks
    }
    fn filtered(&self) -> Option<&Arc<Shared>> {
        self.filtered.as_ref()
    }
    fn audit(&self) -> Audit {
        self.world.moment();
        if self.filtered.is_some() {
            return Audit::Good;
        }
        let audit = {
            let mut state = self.world.state();
            let cut = state.disks[self.index].marks.cut().cut_id;
            if state.proving.is_none_or(|last| self.index <= last) {
                let instant = state.instant();
                state.instants.insert(cut, instant);
            }
            state.proving = Some(self.index);
            let disk = &state.disks[self.index];
            if !disk.writes.is_empty() {
                Audit::Busy
            } else if disk.bytes() != disk.pinned.bytes() {
                Audit::Resized
            } else if disk.missed > 0 {
                Audit::Gap(format!("{} writes", disk.missed))
            } else {
                Audit::Good
            }
        };
        self.world.moment();
        audit
    }
    fn rebase(&self) -> Result<(), String> {
        self.world.moment();
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
        self.0.moment();
        self.0.settle();
        let mut state = self.0.state();
        state.frozen = true;
        state.freezes += 1;
        Ok(())
    }
    fn thaw(&mut self) -> Result<(Duration, bool), String> {
        self.0.moment();
        let mut state = self.0.state();
        state.proving = None;
        state.frozen = false;
        state.now += Duration::from_millis(10);
        Ok((Duration::from_millis(10), true))
    }
}
