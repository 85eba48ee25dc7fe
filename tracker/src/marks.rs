//! Live bitmap, taken bitmap and the header that says which cut stands.
//!
//! Marking is lock-free and open to all; what changes the cut or takes goes one at a time. Every
//! step may be the last one of the process: the header decides, and [`Marks::open`] finishes what
//! it says was begun. A bit leaves the live bitmap only into taken, and leaves taken only back
//! into live or because the target has committed the very cut that took it.

use crate::bitmap::{Bitmaps, Turn, leaf_words, summary_words};
use crate::header::{CutSlot, HEADER_WORDS, Header, State};
use crate::sync::{Memory, Word};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};

/// A run of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockRun {
    /// Index of the first block.
    pub first: u64,
    /// Number of blocks; at least 1.
    pub count: u64,
}

/// What the header says of the current cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Number of its epoch; 0 before the first.
    pub epoch: u64,
    /// Its id; zero before the first.
    pub cut_id: [u8; 16],
    /// False once it was given up or committed.
    pub stands: bool,
}

/// The marks of one volume; shared with whatever marks (eBPF programs, this process).
pub struct Marks<W = AtomicU64> {
    bitmaps: Bitmaps<W>,
    header: Memory<W>,
    /// The next take scans leaves: a process before this one may have been killed between a
    /// summary bit and its leaves.
    leaves_first: AtomicBool,
    /// One taker and one writer of the header at a time.
    changing: Mutex<()>,
    /// Behind a filter: the flip whose cut the filter gave up (one word, which it stores).
    fallen: Option<Memory<W>>,
    /// The flip of the cut that stands; 0 until this process has heard of it.
    flip: AtomicU64,
    collected: AtomicBool,
}

/// What a filter's marks have besides: the other live bitmap, whose turn it is, and what fell.
#[doc(hidden)]
pub struct FilterMemory<W> {
    pub live: Memory<W>,
    pub summary: Memory<W>,
    pub turn: Turn<W>,
    pub fallen: Memory<W>,
}

/// The memory of one volume's marks.
#[doc(hidden)]
pub struct MarksMemory<W> {
    pub header: Memory<W>,
    pub live: Memory<W>,
    pub summary: Memory<W>,
    pub taken: Memory<W>,
}

impl Marks {
    /// Marks in plain memory: for compare-only volumes and simulation.
    pub fn in_memory(blocks: u64) -> Self {
        let words = |count: usize| -> Memory<AtomicU64> {
            Memory::new((0..count).map(|_| AtomicU64::new(0)).collect::<Vec<_>>())
        };
        let memory = MarksMemory {
            header: words(HEADER_WORDS),
            live: words(leaf_words(blocks)),
            summary: words(summary_words(blocks)),
            taken: words(leaf_words(blocks)),
        };
        Self::open(blocks, memory)
    }
}

impl<W: Word> Marks<W> {
    /// Marks over existing memory: all zero, or left behind by a process that was killed.
    #[doc(hidden)]
    pub fn open(blocks: u64, memory: MarksMemory<W>) -> Self {
        let marks = Self::view(blocks, memory, None);
        marks.header().set_blocks(blocks);
        marks.finish();
        marks
    }

    /// Marks behind a filter, over existing memory, as their agent opens them.
    #[doc(hidden)]
    pub fn open_filtered(blocks: u64, memory: MarksMemory<W>, filter: FilterMemory<W>) -> Self {
        let marks = Self::view(blocks, memory, Some(filter));
        marks.finish();
        marks
    }

    /// Over the same memory as another process that has them open, and changes the cut: this one
    /// only marks.
    #[doc(hidden)]
    pub fn view(blocks: u64, memory: MarksMemory<W>, filter: Option<FilterMemory<W>>) -> Self {
        let MarksMemory { header, live, summary, taken } = memory;
        let mut bitmaps = Bitmaps::new(blocks, live, summary, taken);
        let mut fallen = None;
        if let Some(filter) = filter {
            bitmaps = bitmaps.with_second(filter.live, filter.summary, filter.turn);
            fallen = Some(filter.fallen);
        }
        Self {
            bitmaps,
            header,
            leaves_first: AtomicBool::new(true),
            changing: Mutex::new(()),
            fallen,
            flip: AtomicU64::new(0),
            collected: AtomicBool::new(false),
        }
    }

    /// Number of blocks of the volume.
    pub fn blocks(&self) -> u64 {
        self.bitmaps.blocks()
    }

    /// The current cut.
    pub fn cut(&self) -> Cut {
        let cut = self.header().cut();
        let stands = cut.state == State::Stands && !self.has_fallen();
        Cut { epoch: cut.epoch, cut_id: cut.cut_id, stands }
    }

    /// Whether the filter has given up the cut that flipped, and lets writes through unpreserved.
    fn has_fallen(&self) -> bool {
        let flip = self.flip.load(Relaxed);
        let fallen = |word: &Memory<W>| word[0].load(Ordering::SeqCst) == flip;
        flip != 0 && !self.collected.load(Relaxed) && self.fallen.as_ref().is_some_and(fallen)
    }

    /// The cut was made, or begun, and not settled: it stands, or the filter gave it up and nobody
    /// has followed yet.
    pub fn is_open(&self) -> bool {
        self.header().cut().state == State::Stands
    }

    /// All of what the cut holds was read, and it stood then: nothing can fall any more.
    pub fn collected(&self) {
        self.collected.store(true, Relaxed);
    }

    /// The cut that stands was made, with this flip of the filter's group.
    pub fn flipped(&self, flip: u64) {
        self.flip.store(flip, Relaxed);
    }

    /// The flip of the cut that stands, as this process knows it; 0 before it.
    pub fn flip(&self) -> u64 {
        self.flip.load(Relaxed)
    }

    /// Runs of the cut layer from a block on, of at most `blocks_max` blocks; where to go on.
    pub fn cut_runs(&self, from: u64, blocks_max: u64, out: &mut Vec<BlockRun>) -> u64 {
        self.bitmaps.cut_runs(from, blocks_max, out)
    }

    /// The content of these blocks at the flip was read. Appends those for which that is so: of
    /// the others the filter has kept a copy meanwhile, and what was read may be newer.
    pub fn cut_done(&self, run: BlockRun, out: &mut Vec<BlockRun>) {
        self.bitmaps.cut_done(run, out);
    }

    /// Whether a block of the run is in the cut layer.
    #[inline]
    pub(crate) fn cut_holds(&self, run: BlockRun) -> bool {
        self.bitmaps.cut_holds(run)
    }

    /// As a mistake would: as if it had come before the flip.
    pub(crate) fn mark_cut(&self, run: BlockRun) {
        self.bitmaps.mark_cut(run);
    }

    /// The filter has published copies of these blocks.
    pub(crate) fn cut_forget(&self, run: BlockRun) {
        self.bitmaps.cut_forget(run);
    }

    /// Whether every block of the cut layer is done. Scans leaves.
    pub fn cut_is_clear(&self) -> bool {
        self.bitmaps.cut_is_clear()
    }

    /// Begins a cut. Panics unless the taken bitmap is clear in full and no other cut stands.
    pub fn begin(&self, epoch: u64, cut_id: [u8; 16]) {
        let _one = self.one_at_a_time();
        let cut = self.header().cut();
        assert!(cut.state != State::Stands, "begin: the cut of epoch {} stands", cut.epoch);
        if !self.bitmaps.cut_is_clear() {
            // A flip that nobody follows: its answer was lost, and the filter made it later.
            self.bitmaps.restore();
        }
        assert!(self.bitmaps.taken_is_clear(), "begin: the taken bitmap is not clear");
        self.flip.store(0, Relaxed);
        self.collected.store(false, Relaxed);
        self.header().set_cut(CutSlot { epoch, cut_id, state: State::Stands, ..cut });
    }

    /// One pass: moves live bits to taken (kill-safe), at most `blocks_max`, appends their runs in
    /// rising order to `out`. Returns the number of blocks taken; none if no cut stands. Only
    /// after it returned may the caller read the disk.
    pub fn take(&self, blocks_max: u64, out: &mut Vec<BlockRun>) -> u64 {
        let _one = self.one_at_a_time();
        // Under the lock: a cut given up by another thread gets nothing more into its taken bitmap.
        if self.header().cut().state != State::Stands {
            return 0;
        }
        let leaves = self.leaves_first.load(Relaxed);
        let taken = self.bitmaps.take(blocks_max, leaves, out);
        if leaves && taken < blocks_max {
            self.leaves_first.store(false, Relaxed);
        }
        taken
    }

    /// Marks blocks as written since the last cut.
    #[inline]
    pub fn mark(&self, run: BlockRun) {
        self.bitmaps.mark(run);
    }

    /// Gives the cut up: one store in the header, then taken is OR-ed back into live and cleared.
    /// May be repeated.
    pub fn give_up(&self) {
        let _one = self.one_at_a_time();
        let cut = self.header().cut();
        if cut.state == State::Stands {
            self.header().set_cut(CutSlot { state: State::GivenUp, ..cut });
        }
        self.finish();
    }

    /// The target has committed this very cut: taken is cleared in full, the cut is remembered as
    /// acknowledged. False (and nothing done) if another cut stands or this one was given up.
    pub fn committed(&self, cut_id: [u8; 16]) -> bool {
        let _one = self.one_at_a_time();
        let cut = self.header().cut();
        if cut.cut_id != cut_id || !matches!(cut.state, State::Stands | State::Committed) {
            return false;
        }
        if cut.state == State::Stands {
            // Acknowledges an epoch: the caller has the target's word that it is durable under
            // this cut id. The same store ends the cut, so that nothing more is taken for it and
            // the bits in taken, which that epoch holds, can only be cleared from here on.
            let acknowledged = (cut.epoch, cut_id);
            self.header().set_cut(CutSlot { state: State::Committed, acknowledged, ..cut });
        }
        self.finish();
        true
    }

    /// Newest acknowledged epoch and its cut id; zeros before.
    pub fn acknowledged(&self) -> (u64, [u8; 16]) {
        self.header().cut().acknowledged
    }

    /// Takes the target's word for what is durable (after a compare was ordered for the doubt).
    pub fn set_acknowledged(&self, epoch: u64, cut_id: [u8; 16]) {
        let _one = self.one_at_a_time();
        let cut = self.header().cut();
        self.header().set_cut(CutSlot { acknowledged: (epoch, cut_id), ..cut });
    }

    /// Every leaf word of the live bitmap is zero. Scans leaves, never the summary.
    pub fn live_is_clear(&self) -> bool {
        self.bitmaps.live_is_clear()
    }

    /// Blocks in the live bitmap; one that is being marked right now may be missed.
    pub fn live_count(&self) -> u64 {
        self.bitmaps.live_count(self.leaves_first.load(Relaxed))
    }

    /// Blocks in the taken bitmap.
    pub fn taken_count(&self) -> u64 {
        self.bitmaps.taken_count()
    }

    /// Whether any block of the run is live or taken.
    pub fn holds(&self, run: BlockRun) -> bool {
        // Not while bits move from taken back to live: they could be missed in both.
        let _one = self.one_at_a_time();
        self.bitmaps.holds(run)
    }

    /// Words of what is live, taken, or in the cut layer, from a word on: what a start after this
    /// moment would have to know. Another process may change the cut meanwhile.
    pub(crate) fn words(&self, first: usize, out: &mut [u8]) {
        loop {
            // Within one state of the cut bits move one way: from live to taken and out of there
            // while it stands, back to live while it does not.
            let before = self.header().cut_selector();
            for (index, word) in out.chunks_exact_mut(8).enumerate() {
                word.copy_from_slice(&self.bitmaps.word(first + index).to_le_bytes());
            }
            W::fence(Ordering::SeqCst);
            if self.header().cut_selector() == before {
                return;
            }
        }
    }

    /// Whether the marks may be incomplete, so that source and target must be compared. True after
    /// a fresh start; survives the process.
    pub fn compare_due(&self) -> bool {
        self.header().compare_due()
    }

    /// Sets or clears [`Self::compare_due`].
    pub fn set_compare_due(&self, due: bool) {
        self.header().set_compare_due(due);
    }

    /// Ends what the header says was begun: a kill may have come at any step of it.
    fn finish(&self) {
        match self.header().cut().state {
            // Taken blocks that the caller still has to ship, or give up.
            State::Stands => {}
            State::None | State::GivenUp => self.bitmaps.restore(),
            // Clears taken bits: the header says that the target has committed the cut that took
            // them, and nothing was taken after that was written.
            State::Committed => self.bitmaps.clear_taken(),
        }
    }

    pub(crate) fn bitmaps(&self) -> &Bitmaps<W> {
        &self.bitmaps
    }

    pub(crate) fn header(&self) -> Header<'_, W> {
        Header::new(&self.header)
    }

    fn one_at_a_time(&self) -> MutexGuard<'_, ()> {
        // A panic elsewhere leaves nothing half done that the header does not say.
        self.changing.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
