//! Live and taken bitmap: one bit a block, and a summary of the live one.
//!
//! Anyone may mark at any time, also the kernel's programs; one taker at a time ([`crate::marks`]
//! sees to that). Whoever is killed between any two instructions leaves at worst a bit in both
//! bitmaps, which ships a block twice, or a leaf without its summary bit, which the next scan of
//! the leaves finds and repairs.
//!
//! Mark against take: the marker sets the leaf, then looks at the summary; the taker clears the
//! summary bit, then looks at the leaves; all four in one sequentially consistent order. So at
//! least one sees the other: the taker finds the leaf, or the marker finds the summary clear and
//! sets it again.
//!
//! A volume behind a filter has two live bitmaps that take turns: a flip makes the one that was live
//! the *cut layer*, which holds what an epoch consists of and gets no marks any more ([`Turn`]).
//!
//! Which groups of taken may hold bits is noted for this process alone: only its taker sets them.
//! It begins with all of them noted, whatever an earlier process left behind.

use crate::marks::BlockRun;
use crate::sync::{Memory, Word};
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, SeqCst};

/// Blocks in a leaf word.
const WORD_BITS: u64 = 64;
/// Leaf words that share one bit of the summary: a cache-friendly 512 bytes.
const GROUP_WORDS: u64 = 64;

/// Leaf words for so many blocks.
pub(crate) fn leaf_words(blocks: u64) -> usize {
    blocks.div_ceil(WORD_BITS).max(1) as usize
}

/// Summary words for so many blocks.
pub(crate) fn summary_words(blocks: u64) -> usize {
    (leaf_words(blocks) as u64).div_ceil(GROUP_WORDS * WORD_BITS) as usize
}

/// Groups of leaf words for so many blocks.
fn groups(blocks: u64) -> u64 {
    (leaf_words(blocks) as u64).div_ceil(GROUP_WORDS)
}

/// One live bitmap: a bit a block, and a summary bit a group of words.
struct Layer<W> {
    leaves: Memory<W>,
    summary: Memory<W>,
}

/// Which of two live bitmaps is live. The volume's word is the number of the flip that it waits
/// for or has had, doubled, plus the layer that is live from that flip on; the group's word is the
/// number of flips that there were. So one store of the group's word flips all that wait for it.
#[doc(hidden)]
pub struct Turn<W> {
    /// One word of the volume.
    pub volume: Memory<W>,
    /// One word of the group.
    pub group: Memory<W>,
}

impl<W: Word> Turn<W> {
    /// The layer that is live.
    #[inline]
    pub fn live(&self) -> usize {
        let waits = self.volume[0].load(Acquire);
        // SeqCst: a queue that sees the flip here has its marks in the new layer.
        let flips = self.group[0].load(SeqCst);
        let after = (waits & 1) as usize;
        if flips >= waits >> 1 { after } else { 1 - after }
    }

    /// The newest flip that this volume had; 0 if there was none, or while it waits for one.
    pub fn flipped(&self) -> u64 {
        let waits = self.volume[0].load(Acquire) >> 1;
        if self.group[0].load(SeqCst) >= waits { waits } else { 0 }
    }

    /// The volume flips with that flip of the group, which comes after all that there were.
    pub fn wait_for(&self, flip: u64) {
        let after = 1 - self.live() as u64;
        self.volume[0].store(flip << 1 | after, SeqCst);
    }

    /// It waits for no flip. One that it had, and that holds nothing any more, is forgotten.
    pub fn wait_no_more(&self) {
        self.volume[0].store(self.live() as u64, SeqCst);
    }
}

/// The bitmaps of a volume.
#[doc(hidden)]
pub struct Bitmaps<W> {
    blocks: u64,
    first: Layer<W>,
    /// The second layer, behind a filter.
    second: Option<(Layer<W>, Turn<W>)>,
    taken: Memory<W>,
    /// One a group of taken: false says that its leaves are zero. Relaxed: used by one at a time.
    noted: Box<[AtomicBool]>,
}

impl<W: Word> Bitmaps<W> {
    /// Bitmaps over existing memory, whatever it holds.
    pub fn new(blocks: u64, live: Memory<W>, summary: Memory<W>, taken: Memory<W>) -> Self {
        assert!(live.len() >= leaf_words(blocks) && taken.len() >= leaf_words(blocks));
        assert!(summary.len() >= summary_words(blocks));
        let noted = (0..groups(blocks)).map(|_| AtomicBool::new(true)).collect();
        Self { blocks, first: Layer { leaves: live, summary }, second: None, taken, noted }
    }

    /// The same with a second layer.
    pub fn with_second(mut self, live: Memory<W>, summary: Memory<W>, turn: Turn<W>) -> Self {
        assert!(live.len() >= leaf_words(self.blocks));
        assert!(summary.len() >= summary_words(self.blocks));
        self.second = Some((Layer { leaves: live, summary }, turn));
        self
    }

    #[inline]
    fn live(&self) -> &Layer<W> {
        match &self.second {
            Some((second, turn)) if turn.live() == 1 => second,
            _ => &self.first,
        }
    }

    /// The layer that the newest flip left behind.
    #[inline]
    fn cut(&self) -> Option<&Layer<W>> {
        let (second, turn) = self.second.as_ref()?;
        Some(if turn.live() == 1 { &self.first } else { second })
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Sets the bits of the run in the live bitmap. What goes beyond the volume is no block of it.
    #[inline]
    pub fn mark(&self, run: BlockRun) {
        let Some((second, turn)) = &self.second else { return self.first.mark(run, self.blocks) };
        loop {
            let live = turn.live();
            (if live == 1 { second } else { &self.first }).mark(run, self.blocks);
            // Flipped meanwhile: what is marked in the cut layer is perhaps seen there, perhaps
            // not; in the live one it is kept.
            if turn.live() == live {
                return;
            }
        }
    }

    /// Moves at most `blocks_max` live bits to taken and appends their runs in rising order.
    /// `leaves` scans every leaf instead of trusting the summary.
    pub fn take(&self, blocks_max: u64, leaves: bool, out: &mut Vec<BlockRun>) -> u64 {
        let mut left = blocks_max;
        let live = self.live();
        let groups = groups(self.blocks);
        for word in 0..groups.div_ceil(WORD_BITS) {
            let mut bits = match leaves {
                true => u64::MAX,
                // Partner: the fetch_or in `mark_word`. A bit that comes later is a later mark.
                false => live.summary[word as usize].load(Acquire),
            };
            while bits != 0 && left > 0 {
                let group = word * WORD_BITS + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                if group >= groups {
                    break;
                }
                left -= self.take_group(live, group, left, out);
            }
            if left == 0 {
                break;
            }
        }
        blocks_max - left
    }

    fn take_group(
        &self,
        layer: &Layer<W>,
        group: u64,
        blocks_max: u64,
        out: &mut Vec<BlockRun>,
    ) -> u64 {
        let first = (group * GROUP_WORDS) as usize;
        let (summary, bit) = summary_of(first);
        // Cleared before the leaves are looked at: see the module's header. Killed right after
        // this, leaves stay under a cleared bit until the next process scans leaves.
        // SeqCst, as the looks below: partners are the leaf and the look in `mark_word`.
        layer.summary[summary].fetch_and(!bit, SeqCst);
        let mut left = blocks_max;
        let leaves = self.leaves_of(group);
        let (live, taken) = (&layer.leaves[leaves.clone()], &self.taken[leaves]);
        for (i, (live, taken)) in live.iter().zip(taken).enumerate() {
            let word = live.load(SeqCst);
            if word == 0 {
                continue;
            }
            self.noted[group as usize].store(true, Relaxed);
            let mask = lowest_bits(word, left);
            if mask != 0 {
                // Clears a bit: it is in taken first, so a kill between the two leaves it in both;
                // exactly the bits put there are cleared, so a mark of another block stays. A mark
                // of the same block that falls between loses nothing: its data reached the disk
                // before the mark, the mark comes before this clear (Acquire), and the caller
                // reads the disk only after it.
                taken.fetch_or(mask, AcqRel);
                live.fetch_and(!mask, AcqRel);
                append_runs(first + i, mask, out);
                left -= u64::from(mask.count_ones());
            }
            if mask != word {
                layer.summary[summary].fetch_or(bit, AcqRel);
                break;
            }
        }
        blocks_max - left
    }

    fn leaves_of(&self, group: u64) -> Range<usize> {
        let first = (group * GROUP_WORDS) as usize;
        first..(first + GROUP_WORDS as usize).min(leaf_words(self.blocks))
    }

    /// Groups of taken that may hold bits.
    fn noted(&self) -> impl Iterator<Item = u64> {
        let noted = self.noted.iter().enumerate();
        noted.filter(|(_, noted)| noted.load(Relaxed)).map(|(group, _)| group as u64)
    }

    /// Puts every bit of the taken bitmap and of the cut layer back into live, then clears it. May
    /// be repeated.
    pub fn restore(&self) {
        let live = self.live();
        for group in self.noted() {
            let leaves = self.leaves_of(group);
            for (index, taken) in leaves.clone().zip(&self.taken[leaves]) {
                move_word(live, index, taken);
            }
            self.noted[group as usize].store(false, Relaxed);
        }
        if let Some(cut) = self.cut() {
            for (index, word) in cut.leaves[..leaf_words(self.blocks)].iter().enumerate() {
                move_word(live, index, word);
            }
            cut.summary.iter().for_each(|word| word.store(0, Relaxed));
        }
    }

    /// Clears the taken bitmap in full. Only for a cut that the target has committed. What is still
    /// in the cut layer then (nothing should be) was in no frame of it, and is live again.
    pub fn clear_taken(&self) {
        for group in self.noted() {
            for word in &self.taken[self.leaves_of(group)] {
                if word.load(Relaxed) != 0 {
                    word.store(0, Relaxed);
                }
            }
            self.noted[group as usize].store(false, Relaxed);
        }
        self.restore();
    }

    /// Sets every bit that is live in `old`, which is no larger and which nobody marks any more.
    pub fn absorb(&self, old: &Self) {
        let live = self.live();
        for (index, word) in old.live().leaves[..leaf_words(old.blocks)].iter().enumerate() {
            let word = word.load(Acquire);
            if word != 0 {
                live.mark_word(index, word);
            }
        }
    }

    /// Whether no leaf of the live bitmap is set. Repairs the summary of one that is, so that the
    /// next take finds it.
    pub fn live_is_clear(&self) -> bool {
        // Partner: the caller has read the disk, or the counters; those loads stay before these.
        W::fence(SeqCst);
        self.live().is_clear(self.blocks)
    }

    /// Whether no leaf of the taken bitmap is set, whatever is noted, nor one of the cut layer: the
    /// last check before a cut names them its own.
    pub fn taken_is_clear(&self) -> bool {
        self.taken[..leaf_words(self.blocks)].iter().all(|word| word.load(Acquire) == 0)
            && self.cut_is_clear()
    }

    /// Whether no leaf of the cut layer is set.
    pub fn cut_is_clear(&self) -> bool {
        W::fence(SeqCst);
        self.cut().is_none_or(|cut| cut.is_clear(self.blocks))
    }

    /// Appends runs of the cut layer, from a block on, in rising order, of at most `blocks_max`
    /// blocks in all; returns where to go on. They stay as they are.
    pub fn cut_runs(&self, from: u64, blocks_max: u64, out: &mut Vec<BlockRun>) -> u64 {
        let Some(cut) = self.cut() else { return self.blocks };
        let (mut left, mut next) = (blocks_max, from);
        while next < self.blocks {
            let index = (next / WORD_BITS) as usize;
            let (summary, bit) = summary_of(index);
            if cut.summary[summary].load(Acquire) & bit == 0 {
                let group_blocks = GROUP_WORDS * WORD_BITS;
                next = (next / group_blocks + 1) * group_blocks;
                continue;
            }
            let word = cut.leaves[index].load(Acquire) & u64::MAX << (next % WORD_BITS);
            let mask = lowest_bits(word, left);
            append_runs(index, mask, out);
            left -= u64::from(mask.count_ones());
            if mask != word || left == 0 {
                return (index as u64 + 1) * WORD_BITS - u64::from(mask.leading_zeros());
            }
            next = (index as u64 + 1) * WORD_BITS;
        }
        self.blocks
    }

    /// Whether a block of the run is in the cut layer.
    #[inline]
    pub fn cut_holds(&self, run: BlockRun) -> bool {
        let Some(cut) = self.cut() else { return false };
        words_of(run, self.blocks).any(|(index, mask)| cut.leaves[index].load(Acquire) & mask != 0)
    }

    /// Moves the run from the cut layer to taken: its content at the flip was read. Appends those
    /// that were still in it.
    pub fn cut_done(&self, run: BlockRun, out: &mut Vec<BlockRun>) {
        let Some(cut) = self.cut() else { return };
        for (index, mask) in words_of(run, self.blocks) {
            self.noted[index / GROUP_WORDS as usize].store(true, Relaxed);
            // Clears bits of the cut: nobody marks here any more, and the caller holds what was
            // read before this (AcqRel). They are in taken first, for what was read may be lost
            // yet. Whoever sees a bit cleared may overwrite the block.
            self.taken[index].fetch_or(cut.leaves[index].load(Acquire) & mask, AcqRel);
            append_runs(index, cut.leaves[index].fetch_and(!mask, AcqRel) & mask, out);
        }
    }

    /// Marks in the cut layer. Nobody does so but a mistake that tests make.
    pub fn mark_cut(&self, run: BlockRun) {
        if let Some(cut) = self.cut() {
            cut.mark(run, self.blocks);
        }
    }

    /// Takes the run out of the cut layer: copies of it were published, and what replaces it has
    /// been marked, so that a giving up need not look for it.
    pub fn cut_forget(&self, run: BlockRun) {
        let Some(cut) = self.cut() else { return };
        for (index, mask) in words_of(run, self.blocks) {
            cut.leaves[index].fetch_and(!mask, AcqRel);
        }
    }

    /// Bits in live. Without `leaves` a bit that is being marked right now may be missed.
    pub fn live_count(&self, leaves: bool) -> u64 {
        self.count_of(self.live(), leaves)
    }

    fn count_of(&self, layer: &Layer<W>, leaves: bool) -> u64 {
        let bit = |group| {
            let (word, bit) = summary_of((group * GROUP_WORDS) as usize);
            leaves || layer.summary[word].load(Relaxed) & bit != 0
        };
        let marked = (0..groups(self.blocks)).filter(|group| bit(*group));
        marked.map(|group| count(&layer.leaves[self.leaves_of(group)])).sum()
    }

    /// Bits in taken and in the cut layer.
    pub fn taken_count(&self) -> u64 {
        let taken: u64 = self.noted().map(|group| count(&self.taken[self.leaves_of(group)])).sum();
        taken + self.cut().map_or(0, |cut| self.count_of(cut, false))
    }

    /// One word of all three: what is live, taken, or in the cut layer. Bits may move between them
    /// meanwhile, but only one way; that way is looked along twice.
    pub fn word(&self, index: usize) -> u64 {
        let Some(taken) = self.taken.get(index) else { return 0 };
        let live = || {
            let second =
                self.second.as_ref().map_or(0, |(layer, _)| layer.leaves[index].load(SeqCst));
            self.first.leaves[index].load(SeqCst) | second
        };
        live() | taken.load(SeqCst) | live()
    }

    /// Whether a block of the run is live, taken or in the cut layer.
    pub fn holds(&self, run: BlockRun) -> bool {
        let layers = self.second.as_ref().map(|(second, _)| second);
        let layers: [Option<&Layer<W>>; 2] = [Some(&self.first), layers];
        // Live before taken: a bit that moves in between is seen in one of them.
        words_of(run, self.blocks).any(|(index, mask)| {
            let live = |layer: &Layer<W>| layer.leaves[index].load(Acquire) & mask != 0;
            layers.into_iter().flatten().any(live) || self.taken[index].load(Acquire) & mask != 0
        })
    }
}

impl<W: Word> Layer<W> {
    #[inline]
    fn mark(&self, run: BlockRun, blocks: u64) {
        if run.count == 1 && run.first < blocks {
            let index = (run.first / WORD_BITS) as usize;
            return self.mark_word(index, 1 << (run.first % WORD_BITS));
        }
        for (index, mask) in words_of(run, blocks) {
            self.mark_word(index, mask);
        }
    }

    #[inline]
    fn mark_word(&self, index: usize, mask: u64) {
        // Always a read-modify-write, also where the bit is set already: it orders the data that
        // was written before it against the taker's clear and read (Release here, Acquire there).
        // A plain look could see the bit just before the taker clears it, and the write be lost.
        // SeqCst, as the look below: partners are the clear and the looks in `take_group`.
        self.leaves[index].fetch_or(mask, SeqCst);
        let (word, bit) = summary_of(index);
        // Looking first is allowed here: if the bit is still seen set, the taker's clear comes
        // later in the one order, and its look at the leaves sees the leaf that was set above.
        if self.summary[word].load(SeqCst) & bit == 0 {
            self.summary[word].fetch_or(bit, AcqRel);
        }
    }

    fn is_clear(&self, blocks: u64) -> bool {
        let mut leaves = self.leaves[..leaf_words(blocks)].iter();
        match leaves.position(|leaf| leaf.load(Acquire) != 0) {
            None => true,
            Some(index) => {
                let (word, bit) = summary_of(index);
                self.summary[word].fetch_or(bit, AcqRel);
                false
            }
        }
    }
}

/// Moves a word's bits to the live layer.
fn move_word<W: Word>(live: &Layer<W>, index: usize, from: &W) {
    let word = from.load(Relaxed);
    if word != 0 {
        // Clears bits: they are live first, so that a kill between leaves them in both.
        live.mark_word(index, word);
        from.fetch_and(!word, AcqRel);
    }
}

fn count<W: Word>(words: &[W]) -> u64 {
    words.iter().map(|word| u64::from(word.load(Relaxed).count_ones())).sum()
}

/// Summary word and bit that stand for a leaf word.
fn summary_of(leaf: usize) -> (usize, u64) {
    let group = leaf as u64 / GROUP_WORDS;
    ((group / WORD_BITS) as usize, 1 << (group % WORD_BITS))
}

/// Leaf words and masks of a run, cut off at the end of the volume.
fn words_of(run: BlockRun, blocks: u64) -> impl Iterator<Item = (usize, u64)> {
    let end = run.first.saturating_add(run.count).min(blocks);
    let mut next = run.first;
    std::iter::from_fn(move || {
        if next >= end {
            return None;
        }
        let low = next % WORD_BITS;
        let bits = (WORD_BITS - low).min(end - next);
        let index = (next / WORD_BITS) as usize;
        next += bits;
        Some((index, (u64::MAX >> (WORD_BITS - bits)) << low))
    })
}

/// The lowest `bits_max` set bits of the word.
fn lowest_bits(word: u64, bits_max: u64) -> u64 {
    if u64::from(word.count_ones()) <= bits_max {
        return word;
    }
    let mut rest = word;
    for _ in 0..bits_max {
        rest &= rest - 1;
    }
    word & !rest
}

fn append_runs(index: usize, mut mask: u64, out: &mut Vec<BlockRun>) {
    while mask != 0 {
        let low = u64::from(mask.trailing_zeros());
        let count = u64::from((mask >> low).trailing_ones());
        let first = index as u64 * WORD_BITS + low;
        match out.last_mut() {
            Some(last) if last.first + last.count == first => last.count += count,
            _ => out.push(BlockRun { first, count }),
        }
        mask &= !((u64::MAX >> (WORD_BITS - count)) << low);
    }
}
