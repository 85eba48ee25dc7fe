//! The memory that filter and agent share, one file a volume and one a group, in a tmpfs: it
//! outlives both processes, and no reboot.
//!
//! A volume's file, in words of 8 bytes, each part on a page of its own: the header (as in
//! [`crate::header`]); the gate's page, below; live bitmap 0 and its summary; live bitmap 1 and its
//! summary; the taken bitmap; a word a write in flight, 256 a lane (its first block in the lower 40
//! bits, its blocks above; all ones there: to the end of the volume); an entry a slot; the memory
//! slots, a block each.
//!
//! | word of the gate's page | holds |
//! |---|---|
//! | 0 | `SSGATE`, then a u16: version. Written last |
//! | 1 to 4 | bytes of the volume; bytes of a block; memory slots; slots in all (the rest lie on the reserve) |
//! | 5 | identity of the backing device: device number in the upper half, diskseq in the lower |
//! | 6 | whose turn it is: the flip, doubled, plus the layer that is live from it on |
//! | 7 | the flip all of whose earlier writes are done |
//! | 8 | the flip whose cut the filter has given up |
//! | 9 | why: 1 the area was full, 2 a block could not be preserved |
//! | 10 | the reserve: 0 none, 1 in use for preserved blocks, 2 also for a write-intent log, 3 it has failed |
//! | 11 | where the spill slots begin on it, bytes |
//! | 12 | the cut that the log knows of: lower half of its id |
//! | 13 | how often the agent has made marks that no write made |
//! | 14 | up to which of those the log has all marks |
//! | 64 + 8 a lane | sectors submitted, sectors completed |
//!
//! An entry is 0 while its slot is free, all ones while a copy into it is under way, else the
//! flip (lower 24 bits) in the upper 24 bits and the block in the lower 40. Only the filter fills
//! a slot, only the agent frees one, and the filter all of them before it flips.

use crate::bitmap::{Turn, leaf_words, summary_words};
use crate::filter::mapped::{Mapped, Whole};
use crate::filter::reserve::Part;
use crate::header::{HEADER_WORDS, Header};
use crate::marks::{BlockRun, FilterMemory, Marks, MarksMemory};
use crate::sync::Memory;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::{Arc, OnceLock};

/// Lanes (queues) of a volume at most.
pub const LANES_MAX: usize = 32;
/// Requests of a lane at most.
pub const DEPTH_MAX: usize = 256;

const PAGE_WORDS: usize = 512;
const GATE: usize = PAGE_WORDS;
const MAGIC: u64 = u64::from_le_bytes(*b"SSGATE\x02\0");
const GROUP_MAGIC: u64 = u64::from_le_bytes(*b"SSGROU\x01\0");
const AT_MAGIC: usize = 0;
const AT_BYTES: usize = 1;
const AT_BLOCK_BYTES: usize = 2;
const AT_MEMORY_SLOTS: usize = 3;
const AT_SLOTS: usize = 4;
const AT_IDENTITY: usize = 5;
const AT_TURN: usize = 6;
const AT_SETTLED: usize = 7;
const AT_FALLEN: usize = 8;
const AT_WHY: usize = 9;
const AT_RESERVE: usize = 10;
const AT_SPILL: usize = 11;
const AT_NOTED: usize = 12;
const AT_BESIDE: usize = 13;
const AT_BESIDE_NOTED: usize = 14;
const AT_LANES: usize = 64;
const LANE_WORDS: usize = 8;

const BLOCK_BITS: u32 = 40;
/// A write of so many blocks, or more, counts as one to the end of the volume.
const IN_FLIGHT_BLOCKS_MAX: u64 = (1 << 24) - 1;
const FREE: u64 = 0;
const UNDER_WAY: u64 = u64::MAX;
/// Flips in an entry are told apart by these many bits; older entries are freed before each flip.
const FLIP_MASK: u64 = (1 << 24) - 1;

const _: () = assert!(AT_LANES + LANES_MAX * LANE_WORDS <= PAGE_WORDS);
const _: () = assert!(HEADER_WORDS <= PAGE_WORDS);

/// The file of the group, in the folder of a filter.
pub fn group_path(dir: &Path) -> PathBuf {
    dir.join("group")
}

/// The file of a volume.
pub fn volume_path(dir: &Path, id: &str) -> PathBuf {
    dir.join("marks").join(id)
}

/// What a volume's shared memory is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// Bytes of the volume.
    pub volume_bytes: u64,
    /// Bytes of a block: a power of two, at least 4096.
    pub block_bytes: u32,
    /// Blocks that are preserved in memory at most.
    pub memory_slots: u32,
    /// Further ones, on the reserve.
    pub spill_slots: u32,
    /// Of the backing device: another one under the same name is another volume.
    pub identity: u64,
}

impl Form {
    /// Blocks of the volume.
    pub fn blocks(&self) -> u64 {
        self.volume_bytes.div_ceil(u64::from(self.block_bytes))
    }

    /// Bytes that can be preserved.
    pub fn area_bytes(&self) -> u64 {
        self.slots() as u64 * u64::from(self.block_bytes)
    }

    fn slots(&self) -> usize {
        self.memory_slots as usize + self.spill_slots as usize
    }

    /// Where each part begins, in words, and where the last one ends.
    fn places(&self) -> [usize; 10] {
        let blocks = self.blocks();
        let area = self.memory_slots as usize * self.block_bytes as usize / 8;
        let (leaves, summary) = (leaf_words(blocks), summary_words(blocks));
        let mut places = [0; 10];
        let in_flight = LANES_MAX * DEPTH_MAX;
        let parts = [
            PAGE_WORDS,
            PAGE_WORDS,
            leaves,
            summary,
            leaves,
            summary,
            leaves,
            in_flight,
            self.slots(),
            area,
        ];
        let mut at = 0;
        for (place, words) in places.iter_mut().zip(parts) {
            *place = at;
            at += words.next_multiple_of(PAGE_WORDS);
        }
        places
    }

    fn words(&self) -> usize {
        let area = self.memory_slots as usize * self.block_bytes as usize / 8;
        self.places()[9] + area.next_multiple_of(PAGE_WORDS)
    }
}

/// Why shared memory cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {what}: {cause}", path.display())]
pub struct SharedError {
    /// The file.
    pub path: PathBuf,
    /// The operation.
    pub what: &'static str,
    /// Why.
    pub cause: io::Error,
}

/// The group of all volumes of a filter: how often it was cut.
pub struct Group(Whole);

impl Group {
    /// On the heap, for simulation.
    pub fn in_memory() -> Self {
        Self(Whole::Heap((0..PAGE_WORDS).map(|_| AtomicU64::new(0)).collect()))
    }

    /// Opens it, or makes it.
    pub fn open(path: &Path) -> Result<Self, SharedError> {
        let file = create(path, PAGE_WORDS)?;
        let whole = map(path, &file, PAGE_WORDS)?;
        let word = whole.part(0..1);
        if word[0].load(Acquire) != GROUP_MAGIC {
            whole.part(1..2)[0].store(0, Relaxed);
            word[0].store(GROUP_MAGIC, Release);
        }
        Ok(Self(whole))
    }

    /// How often it was flipped.
    pub fn flips(&self) -> u64 {
        self.word()[0].load(SeqCst)
    }

    pub(super) fn word(&self) -> Memory<AtomicU64> {
        self.0.part(1..2)
    }
}

/// The shared memory of one volume.
pub struct Shared {
    form: Form,
    marks: Arc<Marks>,
    gate: Memory<AtomicU64>,
    in_flight: Memory<AtomicU64>,
    entries: Memory<AtomicU64>,
    area: Memory<AtomicU64>,
    turn: Turn<AtomicU64>,
    opened: OnceLock<File>,
    /// The file that is mapped, if it is one: path, device and inode.
    file: Option<(PathBuf, u64, u64)>,
}

/// What a volume has of a reserve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReserveState {
    /// None: what is preserved and marked is in memory only.
    None,
    /// Blocks are preserved there when memory is full.
    Spill,
    /// Besides, marks outlive a reboot.
    Log,
    /// It has failed: from then on as if there were none.
    Failed,
}

/// What an entry of the area says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// Where its copy lies.
    pub slot: u32,
    /// The block whose content at the flip it holds.
    pub block: u64,
}

impl Shared {
    /// On the heap, for simulation: one that a dead process left behind, or a new one.
    pub fn in_memory(form: Form, group: &Group, agent: bool, words: &Arc<[AtomicU64]>) -> Self {
        let whole = Whole::Heap(words.clone());
        begin(&whole, &form);
        Self::over(form, group, agent, &whole)
    }

    /// The words that [`Self::in_memory`] takes.
    pub fn heap(form: &Form) -> Arc<[AtomicU64]> {
        (0..form.words()).map(|_| AtomicU64::new(0)).collect()
    }

    /// As the filter opens it: adopts what is there if it was made for this very volume, with as
    /// many slots as it has; else makes it anew, with a compare due. True if it was adopted.
    pub fn create(path: &Path, form: Form, group: &Group) -> Result<(Self, bool), SharedError> {
        if let Some(found) = Self::find(path, form, group) {
            return Ok((found, true));
        }
        // The agent may still have the old one mapped: it keeps its own file.
        let _ = std::fs::remove_file(path);
        let whole = map(path, &create(path, form.words())?, form.words())?;
        begin(&whole, &form);
        Ok((Self::over(form, group, false, &whole), false))
    }

    /// What is there, if it was made for this very volume.
    pub fn find(path: &Path, form: Form, group: &Group) -> Option<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path).ok()?;
        let found = form_of(&map(path, &file, 2 * PAGE_WORDS).ok()?)?;
        let whole = map(path, &file, found.words()).ok()?;
        let slots =
            Form { memory_slots: found.memory_slots, spill_slots: found.spill_slots, ..form };
        let sound = Header::new(&whole.part(0..HEADER_WORDS)).is_sound();
        (found == slots && sound).then(|| Self::over(found, group, false, &whole))
    }

    /// As the agent opens it: what the filter made.
    pub fn open(path: &Path, group: &Group) -> Result<Self, SharedError> {
        let fails = |what, cause| SharedError { path: path.to_path_buf(), what, cause };
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|cause| fails("open", cause))?;
        let gate = map(path, &file, 2 * PAGE_WORDS)?;
        let form = form_of(&gate).ok_or_else(|| {
            fails("open", io::Error::new(io::ErrorKind::InvalidData, "another version made it"))
        })?;
        let whole = map(path, &file, form.words())?;
        if !Header::new(&whole.part(0..HEADER_WORDS)).is_sound() {
            return Err(fails("open", io::Error::from(io::ErrorKind::InvalidData)));
        }
        let made = file.metadata().map_err(|cause| fails("stat", cause))?;
        let file = Some((path.to_path_buf(), made.dev(), made.ino()));
        Ok(Self { file, ..Self::over(form, group, true, &whole) })
    }

    /// Whether this is the memory of the filter that runs: it makes another file when it has to
    /// begin anew.
    pub fn is_current(&self) -> bool {
        self.file.as_ref().is_none_or(|(path, device, inode)| {
            std::fs::metadata(path).is_ok_and(|now| (now.dev(), now.ino()) == (*device, *inode))
        })
    }

    /// The newest flip that this volume had; 0 if there was none.
    pub fn flipped(&self) -> u64 {
        self.turn.flipped()
    }

    fn over(form: Form, group: &Group, agent: bool, whole: &Whole) -> Self {
        let [header, gate, live0, sum0, live1, sum1, taken, in_flight, entries, area] =
            form.places();
        let (leaves, summary) = (leaf_words(form.blocks()), summary_words(form.blocks()));
        let part = |at: usize, words: usize| whole.part(at..at + words);
        let turn = || Turn { volume: part(gate + AT_TURN, 1), group: group.word() };
        let memory = MarksMemory {
            header: part(header, HEADER_WORDS),
            live: part(live0, leaves),
            summary: part(sum0, summary),
            taken: part(taken, leaves),
        };
        let second = FilterMemory {
            live: part(live1, leaves),
            summary: part(sum1, summary),
            turn: turn(),
            fallen: part(gate + AT_FALLEN, 1),
        };
        let marks = match agent {
            true => Marks::open_filtered(form.blocks(), memory, second),
            false => Marks::view(form.blocks(), memory, Some(second)),
        };
        Self {
            form,
            marks: Arc::new(marks),
            gate: part(gate, PAGE_WORDS),
            in_flight: part(in_flight, LANES_MAX * DEPTH_MAX),
            entries: part(entries, form.slots()),
            area: part(area, form.memory_slots as usize * form.block_bytes as usize / 8),
            turn: turn(),
            opened: OnceLock::new(),
            file: None,
        }
    }

    /// What it was made for.
    pub fn form(&self) -> &Form {
        &self.form
    }

    /// The marks.
    pub fn marks(&self) -> &Arc<Marks> {
        &self.marks
    }

    /// Where a memory slot lies: `block_bytes` bytes, aligned to a page.
    ///
    /// # Panics
    /// If it is no memory slot.
    pub fn slot(&self, slot: u32) -> *mut u8 {
        let words = self.form.block_bytes as usize / 8;
        self.area[slot as usize * words..][..words].as_ptr() as *mut u8
    }

    /// Where a slot lies on the reserve, in bytes from the beginning of the spill area; none if it
    /// is a memory slot.
    pub fn spill_offset(&self, slot: u32) -> Option<u64> {
        let spill = slot.checked_sub(self.form.memory_slots)?;
        Some(u64::from(spill) * u64::from(self.form.block_bytes))
    }

    /// Whether every write from before this flip is done: from then on the agent may read.
    pub fn settled(&self, flip: u64) -> bool {
        self.gate[AT_SETTLED].load(Acquire) >= flip
    }

    /// Why the filter gave up the cut of this flip, if it did.
    pub fn fallen(&self, flip: u64) -> Option<&'static str> {
        if self.gate[AT_FALLEN].load(SeqCst) != flip {
            return None;
        }
        Some(match self.gate[AT_WHY].load(Relaxed) {
            2 => "a block could not be preserved: the backing device, or the reserve, has errors",
            _ => "more was overwritten before it was shipped than the preserve area holds",
        })
    }

    /// Copies that were preserved for this flip.
    pub fn kept(&self, flip: u64) -> impl Iterator<Item = Kept> + '_ {
        self.entries.iter().enumerate().filter_map(move |(slot, entry)| {
            // Partner: the Release in `publish`; the copy is whole when its entry is seen.
            let entry = entry.load(Acquire);
            if entry == FREE || entry == UNDER_WAY || entry >> BLOCK_BITS != flip & FLIP_MASK {
                return None;
            }
            Some(Kept { slot: slot as u32, block: (entry & ((1 << BLOCK_BITS) - 1)) - 1 })
        })
    }

    /// Reads a copy, or the beginning of it.
    ///
    /// # Errors
    /// From the reserve, if the copy lies there.
    pub fn read(&self, kept: Kept, out: &mut [u8]) -> io::Result<()> {
        let Some(offset) = self.spill_offset(kept.slot) else {
            // SAFETY: a memory slot has a block's bytes (`out` has no more), and the filter writes
            // to it only while it is free.
            unsafe { self.slot(kept.slot).copy_to(out.as_mut_ptr(), self.within_block(out)) };
            return Ok(());
        };
        let Some(reserve) = self.opened.get() else {
            return Err(io::Error::other("it was never opened"));
        };
        // Its direct reads want whole, aligned blocks.
        let block = self.form.block_bytes as usize;
        let mut whole = vec![0; 2 * block];
        let skip = whole.as_ptr().align_offset(4096);
        reserve.read_exact_at(&mut whole[skip..skip + block], self.spill_start() + offset)?;
        out.copy_from_slice(&whole[skip..][..self.within_block(out)]);
        Ok(())
    }

    fn within_block(&self, out: &[u8]) -> usize {
        assert!(out.len() <= self.form.block_bytes as usize, "a copy is a block");
        out.len()
    }

    /// Where copies beyond memory lie: a device, opened for direct reads.
    pub fn set_reserve(&self, device: File) {
        let _ = self.opened.set(device);
    }

    /// What the volume has of a reserve.
    pub fn reserve(&self) -> ReserveState {
        match self.gate[AT_RESERVE].load(Acquire) {
            0 => ReserveState::None,
            1 => ReserveState::Spill,
            2 => ReserveState::Log,
            _ => ReserveState::Failed,
        }
    }

    /// The volume has this part of a reserve, with a log or without. Before the log is opened: a
    /// server that dies in between leaves a log that is missed, and not one that is forgotten.
    pub fn take_part(&self, part: &Part, with_log: bool) {
        self.gate[AT_SPILL].store(part.start + part.places().spill, Relaxed);
        self.gate[AT_RESERVE].store(if with_log { 2 } else { 1 }, SeqCst);
    }

    /// It has failed: no copy is put there any more, and a reboot means compare.
    pub fn reserve_failed(&self) {
        self.gate[AT_RESERVE].store(3, SeqCst);
    }

    /// Where the spill slots begin on the reserve, bytes.
    pub fn spill_start(&self) -> u64 {
        self.gate[AT_SPILL].load(Relaxed)
    }

    /// Whether a power cut after the commit of this cut would find it known: else the target would
    /// have an epoch that nobody here has heard of.
    pub fn is_noted(&self, cut_id: [u8; 16]) -> bool {
        self.reserve() != ReserveState::Log || self.gate[AT_NOTED].load(Acquire) == low(cut_id)
    }

    /// The agent has marked blocks that nobody wrote (a compare, a block that cannot be read). After
    /// the marks, and before it says that no compare is due.
    pub fn marked_beside(&self) {
        self.gate[AT_BESIDE].fetch_add(1, SeqCst);
    }

    /// The agent has what lay in this slot.
    pub fn free(&self, kept: Kept) {
        self.entries[kept.slot as usize].store(FREE, Release);
    }

    /// Sectors of writes and discards that were let through and completed, and that were let
    /// through at all; in this order, so that what the kernel counted in between lies between them.
    pub fn sectors(&self, between: impl FnOnce()) -> (u64, u64) {
        let sum = |at: usize| {
            let lanes = 0..LANES_MAX;
            lanes.map(|lane| self.gate[AT_LANES + lane * LANE_WORDS + at].load(SeqCst)).sum()
        };
        let completed = sum(1);
        between();
        (completed, sum(0))
    }

    // What follows is the gate's.

    pub(super) fn turn(&self) -> &Turn<AtomicU64> {
        &self.turn
    }

    pub(super) fn set_settled(&self, flip: u64) {
        self.gate[AT_SETTLED].store(flip, Release);
    }

    /// Before the first write is let through unpreserved.
    pub(super) fn fall(&self, flip: u64, why: u64) {
        self.gate[AT_WHY].store(why, Relaxed);
        self.gate[AT_FALLEN].store(flip, SeqCst);
    }

    pub(super) fn is_fallen(&self, flip: u64) -> bool {
        self.gate[AT_FALLEN].load(Relaxed) == flip
    }

    pub(super) fn count(&self, lane: usize, submitted: u64, completed: u64) {
        let lane = &self.gate[AT_LANES + lane * LANE_WORDS..];
        // One lane's words have one writer, who holds its lock.
        for (word, by) in [(&lane[0], submitted), (&lane[1], completed)] {
            if by > 0 {
                word.store(word.load(Relaxed) + by, SeqCst);
            }
        }
    }

    /// A write is in flight from here on; before it is submitted.
    pub(super) fn note(&self, lane: usize, tag: u16, run: BlockRun) {
        let blocks = run.count.min(IN_FLIGHT_BLOCKS_MAX);
        // Not 0: a write has a block.
        self.in_flight[lane * DEPTH_MAX + usize::from(tag)]
            .store(blocks << BLOCK_BITS | run.first, Relaxed);
    }

    /// It is done, and marked.
    pub(super) fn forget(&self, lane: usize, tag: u16) {
        self.in_flight[lane * DEPTH_MAX + usize::from(tag)].store(0, Release);
    }

    /// Marks what was in flight when a filter died. It is on the disk, or will be issued again, and
    /// somebody may have read it already.
    pub(super) fn mark_in_flight(&self) {
        for word in self.in_flight.iter() {
            let write = word.load(Acquire);
            if write != 0 {
                let first = write & ((1 << BLOCK_BITS) - 1);
                let count = match write >> BLOCK_BITS {
                    IN_FLIGHT_BLOCKS_MAX => u64::MAX,
                    blocks => blocks,
                };
                self.marks.mark(BlockRun { first, count });
                word.store(0, Relaxed);
            }
        }
    }

    pub(super) fn slots(&self) -> u32 {
        match self.reserve() {
            ReserveState::Spill | ReserveState::Log => self.form.slots() as u32,
            ReserveState::None | ReserveState::Failed => self.form.memory_slots,
        }
    }

    // What follows is for the log.

    pub(crate) fn set_noted(&self, cut_id: [u8; 16]) {
        self.gate[AT_NOTED].store(low(cut_id), Release);
    }

    /// Marks of the agent that the log does not have yet: up to which it would have them now.
    pub(crate) fn unnoted_marks(&self) -> Option<u64> {
        let made = self.gate[AT_BESIDE].load(SeqCst);
        (self.gate[AT_BESIDE_NOTED].load(SeqCst) != made).then_some(made)
    }

    pub(crate) fn set_noted_marks(&self, up_to: u64) {
        self.gate[AT_BESIDE_NOTED].store(up_to, SeqCst);
    }

    pub(super) fn is_free(&self, slot: u32) -> bool {
        self.entries[slot as usize].load(Acquire) == FREE
    }

    pub(super) fn take_slot(&self, slot: u32) {
        self.entries[slot as usize].store(UNDER_WAY, Relaxed);
    }

    pub(super) fn release(&self, slot: u32) {
        self.entries[slot as usize].store(FREE, Relaxed);
    }

    pub(super) fn publish(&self, slot: u32, flip: u64, block: u64) {
        debug_assert!(block < (1 << BLOCK_BITS) - 1);
        self.entries[slot as usize].store((flip & FLIP_MASK) << BLOCK_BITS | (block + 1), Release);
    }

    pub(super) fn free_all(&self) {
        self.entries.iter().for_each(|entry| entry.store(FREE, Release));
    }

    /// Copies that were under way when a filter died never end.
    pub(super) fn free_under_way(&self) {
        for entry in self.entries.iter() {
            let _ = entry.compare_exchange(UNDER_WAY, FREE, AcqRel, Relaxed);
        }
    }
}

fn low(cut_id: [u8; 16]) -> u64 {
    u128::from_le_bytes(cut_id) as u64
}

fn begin(whole: &Whole, form: &Form) {
    if form_of(whole) == Some(*form) {
        return;
    }
    let (header, gate) = (whole.part(0..HEADER_WORDS), whole.part(GATE..GATE + PAGE_WORDS));
    let header = Header::new(&header);
    header.set_blocks(form.blocks());
    // Nothing is known of writes before this.
    header.set_compare_due(true);
    header.set_whole(true);
    for (at, word) in [
        (AT_BYTES, form.volume_bytes),
        (AT_BLOCK_BYTES, u64::from(form.block_bytes)),
        (AT_MEMORY_SLOTS, u64::from(form.memory_slots)),
        (AT_SLOTS, form.slots() as u64),
        (AT_IDENTITY, form.identity),
    ] {
        gate[at].store(word, Relaxed);
    }
    gate[AT_MAGIC].store(MAGIC, Release);
}

/// What the memory was made for; none if it was never completed, or by another version.
fn form_of(whole: &Whole) -> Option<Form> {
    let gate = whole.part(GATE..GATE + PAGE_WORDS);
    let word = |at: usize| gate[at].load(Relaxed);
    let memory_slots = u32::try_from(word(AT_MEMORY_SLOTS)).ok()?;
    (gate[AT_MAGIC].load(Acquire) == MAGIC).then_some(())?;
    Some(Form {
        volume_bytes: word(AT_BYTES),
        block_bytes: u32::try_from(word(AT_BLOCK_BYTES)).ok()?,
        memory_slots,
        spill_slots: u32::try_from(word(AT_SLOTS).checked_sub(u64::from(memory_slots))?).ok()?,
        identity: word(AT_IDENTITY),
    })
}

fn create(path: &Path, words: usize) -> Result<File, SharedError> {
    let fails = |what, cause| SharedError { path: path.to_path_buf(), what, cause };
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(path).map_err(|cause| fails("create", cause))?;
    // All of it now: a full tmpfs must not be found out by a write to a bitmap.
    // SAFETY: the file is open; no memory is involved.
    let error = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, (words * 8) as i64) };
    match error {
        0 => Ok(file),
        error => Err(fails("allocate", io::Error::from_raw_os_error(error))),
    }
}

fn map(path: &Path, file: &File, words: usize) -> Result<Whole, SharedError> {
    let mapped = Mapped::new(file, words).map_err(|cause| SharedError {
        path: path.to_path_buf(),
        what: "map",
        cause,
    })?;
    Ok(Whole::Mapped(Arc::new(mapped)))
}
