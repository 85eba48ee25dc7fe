//! The target of the simulation: the real site over disks in memory that fail at seeded moments,
//! and what must hold of it at every moment.
//!
//! - an epoch that was acknowledged is there, and no epoch ever becomes another;
//! - an exact epoch is its volume at the instant that was proven, with the size that it had then,
//!   as the target reads it back;
//! - outside of a promotion the replica volume is its base, byte for byte;
//! - damage is found and named, never served.

use crate::network::Wire;
use crate::world::{BLOCK, Killed, World};
use secondsite::target::disk::Disk;
use secondsite::target::disk::memory::{Access, Fault, MemoryDisk, Verb, Watch};
use secondsite::target::keeper::Keeper;
use secondsite::target::retention::RetentionClock;
use secondsite::target::session::Peer;
use secondsite::target::site::{Site, SiteConfig};
use secondsite::target::state::EpochFacts;
use secondsite::target::store::Store;
use secondsite::target::view::View;
use secondsite_control::api::{KeepPolicy, TargetAssignment, TargetServer, TargetVolume};
use secondsite_format::extent::Content;
use secondsite_format::frame::Frame;
use secondsite_format::ids::{CutId, ServerId, VolumeId};
use secondsite_format::limits::VOLUME_BYTES_MAX;
use secondsite_format::manifest::{Consistency, Manifest, SignedManifest};
use secondsite_format::message::{Message, Reply, Welcome};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub const SERVER: ServerId = ServerId([7; 16]);
pub const MACHINE: [u8; 32] = [8; 32];
pub const KEY: [u8; 65] = [4; 65];

pub fn volume_id(volume: usize) -> VolumeId {
    VolumeId([volume as u8 + 1; 16])
}

/// Stands in for ECDSA: a digest over key and bytes.
pub fn sign(key: &[u8; 65], bytes: &[u8]) -> [u8; 64] {
    let mut signature = [0; 64];
    blake3::Hasher::new().update(key).update(bytes).finalize_xof().fill(&mut signature);
    signature
}

fn verify(key: &[u8; 65], bytes: &[u8], signature: &[u8; 64]) -> bool {
    sign(key, bytes) == *signature
}

/// Older states that are kept.
const SNAPSHOTS_MAX: usize = 3;

/// What goes wrong at the second site and on the way there.
#[derive(Clone, Default)]
pub struct Faults {
    /// Percent of messages at which a connection breaks.
    pub breaks: u64,
    /// One of so many frames arrives with a bit changed (0: none).
    pub garbled: u64,
    /// One of so many accesses to a disk fails (0: none).
    pub errors: u64,
    /// One of so many writes finds no space.
    pub full: u64,
    /// One of so many journal accesses is corrupted or goes astray.
    pub rot: u64,
}

/// Disks that stay when the process goes.
#[derive(Clone)]
struct Disks {
    disks: Arc<Mutex<BTreeMap<VolumeId, MemoryDisk>>>,
    watch: Watch,
}

impl Store for Disks {
    fn volumes(&self) -> Vec<(ServerId, VolumeId)> {
        let disks = self.disks.lock().unwrap();
        let stored = disks.iter().filter(|(_, disk)| disk.open("state.json").is_ok());
        stored.map(|(volume, _)| (SERVER, *volume)).collect()
    }
    fn open(&self, _server: ServerId, volume: VolumeId) -> io::Result<Arc<dyn Disk>> {
        let mut disks = self.disks.lock().unwrap();
        Ok(Arc::new(disks.entry(volume).or_default().watched(self.watch.clone())))
    }
    fn of_server(&self, _server: ServerId) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(MemoryDisk::default()))
    }
    fn path(&self, _server: ServerId, volume: VolumeId) -> PathBuf {
        PathBuf::from("/memory").join(volume.to_string())
    }
    fn free_bytes(&self) -> io::Result<u64> {
        Ok(1 << 40)
    }
}

/// How much older points become every five seconds of the world, seconds.
const AGE_S: u64 = 900;

/// What was seen of a volume.
#[derive(Default)]
struct Seen {
    /// By epoch: its cut, and the digest of the volume with it.
    epochs: BTreeMap<u64, (CutId, Option<[u8; 32]>)>,
    /// Whether a digest was looked for in this incarnation, by newest epoch, base, promoting.
    checked: Option<(u64, u64, u64, bool)>,
    acknowledged: (u64, CutId),
    /// The newest committed state.
    image: Option<Arc<Vec<u8>>>,
    manifests: Vec<Manifest>,
    /// The journal was damaged: the volume may stop, and the source may have to compare.
    rotten: bool,
    /// An older state of its disk was put back, and no exact epoch came since.
    set_back: bool,
    /// The replica was damaged: only a verify can tell.
    tampered: bool,
    /// Blocks that the source sent since [`Remote::count_sent`].
    sent: Option<BTreeSet<u64>>,
}

pub struct State {
    pub site: Option<Arc<Site>>,
    clock: Arc<RetentionClock>,
    store: Disks,
    /// Older states of all disks.
    snapshots: Vec<BTreeMap<VolumeId, MemoryDisk>>,
    pub wires: BTreeMap<u64, Wire>,
    pub next_wire: u64,
    seen: Vec<Seen>,
    pub faults: Faults,
    /// Accesses until the process is killed, or until the power goes (true).
    pub dies_in: Option<(u64, bool)>,
    up_at: Duration,
    incarnation: u64,
    /// Nothing is watched: the simulator itself is looking.
    looking: bool,
    retry_at: Duration,
    pub deaths: u64,
    pub stops: u64,
    pub set_backs: u64,
}

/// The target.
pub struct Remote {
    pub world: Arc<World>,
    volumes: usize,
    /// Sizes of the volumes when they were protected.
    assigned: Vec<usize>,
    /// Which points stay.
    keep: Mutex<Option<KeepPolicy>>,
    state: Mutex<State>,
}

impl Remote {
    pub fn new(world: &Arc<World>) -> Arc<Self> {
        let assigned: Vec<usize> = world.state().disks.iter().map(|disk| disk.data.len()).collect();
        let volumes = assigned.len();
        let keep = KeepPolicy { fine_seconds: 2 * 3600, coarse_seconds: 6 * 3600 };
        let keep = Mutex::new(world.chance(50).then_some(keep));
        Arc::new_cyclic(|me: &std::sync::Weak<Self>| {
            let me = me.clone();
            let watch: Watch = Arc::new(move |access: &Access<'_>| {
                me.upgrade().expect("the target is there").watch(access)
            });
            Self {
                world: world.clone(),
                volumes,
                assigned,
                keep,
                state: Mutex::new(State {
                    site: None,
                    clock: Arc::default(),
                    store: Disks { disks: Arc::default(), watch },
                    snapshots: Vec::new(),
                    wires: BTreeMap::new(),
                    next_wire: 0,
                    seen: (0..volumes).map(|_| Seen::default()).collect(),
                    faults: Faults::default(),
                    dies_in: None,
                    up_at: Duration::ZERO,
                    incarnation: 0,
                    looking: false,
                    retry_at: Duration::ZERO,
                    deaths: 0,
                    stops: 0,
                    set_backs: 0,
                }),
            }
        })
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        // Poisoned only while a run fails: its first panic is the one to read.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn peer(&self) -> Peer {
        Peer { server: SERVER, key: KEY }
    }

    fn assignment(&self) -> TargetAssignment {
        let volume = |i: usize| TargetVolume {
            id: volume_id(i).to_string(),
            name: format!("v{i}"),
            size_bytes: self.assigned[i] as u64,
            block_bytes: BLOCK as u32,
        };
        let server = TargetServer {
            id: SERVER.to_string(),
            name: "server".into(),
            machine: "08".repeat(32),
            keep: *self.keep.lock().unwrap(),
            active: true,
            volumes: (0..self.volumes).map(volume).collect(),
        };
        TargetAssignment { version: 1, servers: vec![server] }
    }

    /// An access to one of the disks is about to happen.
    fn watch(&self, access: &Access<'_>) -> Option<Fault> {
        let mut state = self.state();
        if state.looking {
            return None;
        }
        if let Some((left, _)) = &mut state.dies_in {
            if *left == 0 {
                drop(state);
                self.world.note("target dies", &[]);
                resume_unwind(Box::new(Killed));
            }
            *left -= 1;
        }
        let faults = state.faults.clone();
        drop(state);
        let hash = xxhash_rust::xxh3::xxh3_64(access.name.as_bytes());
        self.world.note("disk", &[access.verb as u64, hash, access.offset, access.bytes]);
        let one_of = |count: u64| count > 0 && self.world.below(count) == 0;
        let fault = if one_of(faults.errors) {
            Some(Fault::Fails(libc::EIO))
        } else if matches!(access.verb, Verb::Write | Verb::Name) && one_of(faults.full) {
            Some(Fault::Fails(libc::ENOSPC))
        } else if access.name.starts_with("journal/")
            && matches!(access.verb, Verb::Read | Verb::Write)
            && one_of(faults.rot)
        {
            let to = self.world.below(16) * 512;
            let wrong = if self.world.chance(50) { Fault::Strays(to) } else { Fault::Corrupts(to) };
            self.state().seen.iter_mut().for_each(|seen| seen.rotten = true);
            Some(wrong)
        } else {
            None
        };
        if fault.is_some() {
            self.world.note("disk fault", &[]);
        }
        fault
    }

    /// Starts the process.
    pub fn start(&self) {
        let store = self.state().store.clone();
        let config = SiteConfig {
            store: Box::new(store),
            devices: vec![],
            reserve_bytes: 0,
            memory_bytes: 4 << 20,
            verify,
            clock: Arc::default(),
        };
        let clock = Arc::new(RetentionClock::standing());
        let config = SiteConfig { clock: clock.clone(), ..config };
        self.world.note("target starts", &[]);
        let site = Arc::new(Site::new(config, self.assignment(), Box::new(|| {})));
        let mut state = self.state();
        state.site = Some(site);
        state.clock = clock;
        state.incarnation += 1;
    }

    /// The process is no more; if the power went, what was not synced is lost or torn.
    pub fn died(&self) {
        let (site, wires) = {
            let mut state = self.state();
            let wires = std::mem::take(&mut state.wires);
            let site = state.site.take();
            let planned = state.dies_in.take();
            let power = planned.is_some_and(|(_, power)| power);
            state.deaths += 1;
            let seed = self.world.state().rng.next();
            if planned.is_some() && !power && self.world.chance(60) {
                // What the next process finds is still in the cache, and goes with the power.
                state.dies_in = Some((self.world.below(80), true));
            }
            if power {
                let mut disks = state.store.disks.lock().unwrap();
                for (i, disk) in disks.values_mut().enumerate() {
                    *disk = disk.after_crash(seed.wrapping_add(i as u64));
                }
            }
            state.up_at = self.world.state().now + Duration::from_millis(seed % 8000);
            self.world.note("target down", &[power.into()]);
            (site, wires)
        };
        drop(wires);
        drop(site);
    }

    /// It dies, and does not come back for so long.
    pub fn stays_away(&self, time: Duration) {
        self.died();
        self.state().up_at = self.world.state().now + time;
    }

    /// Stops it and starts it again, as an operator does.
    pub fn restart(&self) {
        self.died();
        self.start();
    }

    /// Keeps the disks as they are now; the oldest of too many goes.
    pub fn snapshot(&self) {
        let mut state = self.state();
        if state.snapshots.len() == SNAPSHOTS_MAX {
            state.snapshots.remove(0);
        }
        let disks = self.copied(&state.store.disks.lock().unwrap());
        state.snapshots.push(disks);
    }

    fn copied(&self, disks: &BTreeMap<VolumeId, MemoryDisk>) -> BTreeMap<VolumeId, MemoryDisk> {
        let seed = self.world.state().rng.next();
        let copy = |(id, disk): (&VolumeId, &MemoryDisk)| (*id, disk.after_crash(seed));
        disks.iter().map(copy).collect()
    }

    /// Somebody stops the target and puts the disks back as they were at a snapshot. What was
    /// acknowledged since is gone; no promise about it is left but that the source finds out.
    pub fn set_back(&self) {
        let count = self.state().snapshots.len();
        if count == 0 {
            return;
        }
        let which = self.world.below(count as u64) as usize;
        self.world.note("set back", &[which as u64]);
        self.died();
        let mut state = self.state();
        state.set_backs += 1;
        let disks = self.copied(&state.snapshots[which]);
        *state.store.disks.lock().unwrap() = disks;
        for seen in &mut state.seen {
            seen.epochs.clear();
            (seen.acknowledged, seen.image, seen.checked) = ((0, CutId::NONE), None, None);
            seen.set_back = true;
        }
    }

    /// The operator looks: a process that is down comes up, one with a stopped volume is started
    /// again, now and then.
    pub fn tend(&self) {
        let now = self.world.state().now;
        let (down, up_at) = {
            let state = self.state();
            (state.site.is_none(), state.up_at)
        };
        if down {
            if now >= up_at {
                self.start();
            }
            return;
        }
        if self.stopped() && self.world.chance(5) {
            self.state().stops += 1;
            self.restart();
        }
        let mut state = self.state();
        if now >= state.retry_at {
            state.retry_at = now + Duration::from_secs(5);
            let site = state.site.clone();
            // Points grow old by leaps.
            state.clock.advance(AGE_S);
            drop(state);
            if let Some(site) = site {
                site.look_after(SERVER);
                site.try_again();
            }
        }
    }

    fn stopped(&self) -> bool {
        self.errors().iter().any(Option::is_some)
    }

    /// What the target says is wrong, by volume.
    pub fn errors(&self) -> Vec<Option<String>> {
        let Some(site) = self.state().site.clone() else { return vec![None; self.volumes] };
        let report = self.looking(|| site.report());
        let error = |i: usize| {
            let id = volume_id(i).to_string();
            report.volumes.iter().find(|row| row.id == id).and_then(|row| row.error.clone())
        };
        (0..self.volumes).map(error).collect()
    }

    /// One of the target's workers does something.
    pub fn work(&self) -> bool {
        let Some(site) = self.state().site.clone() else { return false };
        self.living(|| Ok(site.work_next())).is_some_and(|done| done.unwrap_or(false))
    }

    /// Something else goes on at the target while the source waits.
    pub fn aside(&self) {
        match self.world.below(8) {
            0 => drop(self.work()),
            1 => self.stale(),
            _ => {}
        }
    }

    /// The target's answer to a commit left it.
    pub fn acknowledged(&self, volume: usize, commit: &Frame, answer: &Frame) {
        let Ok(Reply::Committed { epoch, cut_id, .. }) = Reply::from_frame(answer) else {
            panic!("a commit is answered with something else")
        };
        let signed = SignedManifest::decode(&commit.body).expect("a manifest decodes");
        let mut state = self.state();
        let seen = &mut state.seen[volume];
        if seen.acknowledged != (epoch.0, cut_id) {
            seen.acknowledged = (epoch.0, cut_id);
            seen.set_back &= signed.manifest.consistency == Consistency::Fuzzy;
            seen.manifests.push(signed.manifest);
        }
        drop(state);
        self.check_volume(volume);
    }

    /// A welcome left the target: what it calls durable counts as acknowledged, for the source
    /// forgets its marks on the strength of that.
    pub fn welcomed(&self, volume: usize, answer: &Frame) {
        let (epoch, cut_id) = Welcome::from_frame(answer).expect("a welcome decodes").durable;
        let mut state = self.state();
        let seen = &mut state.seen[volume];
        if epoch.0 > seen.acknowledged.0 {
            seen.acknowledged = (epoch.0, cut_id);
        }
        drop(state);
        self.check_volume(volume);
    }

    fn looking<T>(&self, look: impl FnOnce() -> T) -> T {
        let before = std::mem::replace(&mut self.state().looking, true);
        let result = look();
        self.state().looking = before;
        result
    }

    pub fn keeper(&self, volume: usize) -> Option<Arc<Keeper>> {
        let site = self.state().site.clone()?;
        site.keeper(SERVER, volume_id(volume))
    }

    /// Everything that must hold of the target now.
    pub fn check(&self) {
        (0..self.volumes).for_each(|volume| self.check_volume(volume));
    }

    fn check_volume(&self, volume: usize) {
        if let Some(keeper) = self.keeper(volume) {
            self.looking(|| self.check_keeper(volume, &keeper));
        }
    }

    fn check_keeper(&self, volume: usize, keeper: &Keeper) {
        let (record, facts, copied) = {
            let held = keeper.volume();
            (held.record().clone(), held.facts().collect::<Vec<_>>(), held.copied())
        };
        let (base, promoting) = (record.base, record.promoting.is_some());
        let newest = facts.last().map_or((0, CutId::NONE), |facts| (facts.epoch.0, facts.cut_id));
        let mut state = self.state();
        let incarnation = state.incarnation;
        let seen = &mut state.seen[volume];
        let stamp =
            (incarnation, newest.0, base.as_ref().map_or(0, |base| base.epoch.0), promoting);
        if seen.checked == Some(stamp) || !copied {
            return;
        }
        seen.checked = Some(stamp);
        let lost = newest.0 < seen.acknowledged.0;
        assert!(!lost || seen.rotten, "epoch {} was acknowledged and is lost", seen.acknowledged.0);
        if lost {
            seen.acknowledged = newest;
        }
        if seen.rotten {
            seen.epochs.retain(|epoch, _| *epoch <= newest.0);
        }
        let rotten = seen.rotten;
        let tampered = seen.tampered;
        drop(state);
        let read = |view: &View| {
            let mut image = vec![0; view.volume_bytes as usize];
            match view.read(0, &mut image) {
                Ok(()) => Some(Arc::new(image)),
                Err(error) => {
                    assert!(rotten, "volume {volume} cannot be read: {error}");
                    None
                }
            }
        };
        // With nothing promoted and no epoch it is the first copy, which is of no instant.
        if let Some(image) = keeper.view().ok().and_then(|view| read(&view)) {
            self.state().seen[volume].image = Some(image);
        }
        for facts in &facts {
            let Ok(Some(view)) = keeper.view_at(facts.epoch) else { continue };
            if let Some(image) = read(&view).filter(|_| !tampered) {
                self.check_epoch(volume, facts, &image);
            }
        }
    }

    fn check_epoch(&self, volume: usize, facts: &EpochFacts, image: &[u8]) {
        let (epoch, digest) = (facts.epoch.0, *blake3::hash(image).as_bytes());
        let mut state = self.state();
        let known = state.seen[volume].epochs.entry(epoch).or_insert((facts.cut_id, None));
        assert_eq!(known.0, facts.cut_id, "volume {volume}: epoch {epoch} became another");
        if let Some(before) = known.1 {
            assert!(before == digest, "volume {volume}: epoch {epoch} reads otherwise than before");
            return;
        }
        known.1 = Some(digest);
        drop(state);
        self.world.note("epoch", &[volume as u64, epoch, digest[0].into()]);
        if facts.consistency == Consistency::Fuzzy {
            return;
        }
        let world = self.world.state();
        let instant = world.instants.get(&facts.cut_id.0).expect("an exact cut was proven");
        let (bytes, due) = (image.len(), instant[volume].len());
        assert_eq!(bytes, due, "volume {volume}: exact epoch {epoch} has another size");
        let blocks = image.chunks(BLOCK).zip(instant[volume].chunks(BLOCK)).enumerate();
        let wrong: Vec<_> = blocks.filter(|(_, (a, b))| a != b).map(|(i, _)| i).collect();
        assert!(wrong.is_empty(), "volume {volume}: exact epoch {epoch} is wrong in {wrong:?}");
    }

    /// The newest committed state of a volume; none before its first copy is complete.
    pub fn image(&self, volume: usize) -> Option<Arc<Vec<u8>>> {
        self.state().seen[volume].image.clone()
    }

    /// What differs from the target is not so because of damage, or of what the source cannot know.
    pub fn is_sound(&self, volume: usize) -> bool {
        let seen = &self.state().seen[volume];
        !seen.rotten && !seen.tampered && !seen.set_back
    }

    pub fn rotten(&self) -> bool {
        self.state().seen.iter().any(|seen| seen.rotten)
    }

    pub fn manifests(&self, volume: usize) -> Vec<Manifest> {
        self.state().seen[volume].manifests.clone()
    }

    pub fn acknowledged_cut(&self, volume: usize) -> CutId {
        self.state().seen[volume].acknowledged.1
    }

    /// Counts from now on which blocks the source sends.
    pub fn count_sent(&self) {
        self.state().seen.iter_mut().for_each(|seen| seen.sent = Some(BTreeSet::new()));
    }

    /// A frame left the source.
    pub fn note_sent(&self, volume: usize, frame: &Frame) {
        let mut state = self.state();
        let Some(sent) = &mut state.seen[volume].sent else { return };
        let content = Content::decode(&frame.body, VOLUME_BYTES_MAX).expect("content decodes");
        let blocks = content
            .extents()
            .iter()
            .flat_map(|extent| extent.offset / BLOCK as u64..extent.end().div_ceil(BLOCK as u64));
        sent.extend(blocks);
    }

    /// Blocks counted.
    pub fn sent(&self, volume: usize) -> BTreeSet<u64> {
        self.state().seen[volume].sent.clone().unwrap_or_default()
    }

    /// Changes a byte of the replica volume behind everybody's back.
    pub fn tamper(&self, volume: usize, offset: usize) {
        let mut state = self.state();
        state.seen[volume].tampered = true;
        let disk = state.store.disks.lock().unwrap()[&volume_id(volume)].clone();
        disk.damage("replica.img", offset);
    }

    /// From now on the replica volume is the newest point.
    pub fn keep_the_newest_alone(&self) {
        *self.keep.lock().unwrap() = None;
        let site = self.state().site.clone().expect("it runs");
        site.assign(self.assignment());
        site.look_after(SERVER);
    }

    /// The committed state as it is now, read anew.
    pub fn read(&self, volume: usize) -> Vec<u8> {
        let keeper = self.keeper(volume).expect("the volume is open");
        let mut image = vec![0; keeper.volume().durable_bytes() as usize];
        self.looking(|| keeper.view().unwrap().read(0, &mut image)).expect("it can be read");
        image
    }
}
