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

/// The two bitmaps of a volume.
#[doc(hidden)]
pub struct Bitmaps<W> {
    blocks: u64,
    live: Memory<W>,
    summary: Memory<W>,
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
        Self { blocks, live, summary, taken, noted }
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Sets the bits of the run in the live bitmap. What goes beyond the volume is no block of it.
    #[inline]
    pub fn mark(&self, run: BlockRun) {
        if run.count == 1 && run.first < self.blocks {
            let index = (run.first / WORD_BITS) as usize;
            return self.mark_word(index, 1 << (run.first % WORD_BITS));
        }
        for (index, mask) in words_of(run, self.blocks) {
            self.mark_word(index, mask);
        }
    }

    #[inline]
    fn mark_word(&self, index: usize, mask: u64) {
        // Always a read-modify-write, also where the bit is set already: it orders the data that
        // was written before it against the taker's clear and read (Release here, Acquire there).
        // A plain look could see the bit just before the taker clears it, and the write be lost.
        // SeqCst, as the look below: partners are the clear and the looks in `take_group`.
        self.live[index].fetch_or(mask, SeqCst);
        let (word, bit) = summary_of(index);
        // Looking first is allowed here: if the bit is still seen set, the taker's clear comes
        // later in the one order, and its look at the leaves sees the leaf that was set above.
        if self.summary[word].load(SeqCst) & bit == 0 {
            self.summary[word].fetch_or(bit, AcqRel);
        }
    }

    /// Moves at most `blocks_max` live bits to taken and appends their runs in rising order.
    /// `leaves` scans every leaf instead of trusting the summary.
    pub fn take(&self, blocks_max: u64, leaves: bool, out: &mut Vec<BlockRun>) -> u64 {
        let mut left = blocks_max;
        let groups = groups(self.blocks);
        for word in 0..groups.div_ceil(WORD_BITS) {
            let mut bits = match leaves {
                true => u64::MAX,
                // Partner: the fetch_or in `mark_word`. A bit that comes later is a later mark.
                false => self.summary[word as usize].load(Acquire),
            };
            while bits != 0 && left > 0 {
                let group = word * WORD_BITS + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                if group >= groups {
                    break;
                }
                left -= self.take_group(group, left, out);
            }
            if left == 0 {
                break;
            }
        }
        blocks_max - left
    }

    fn take_group(&self, group: u64, blocks_max: u64, out: &mut Vec<BlockRun>) -> u64 {
        let first = (group * GROUP_WORDS) as usize;
        let (summary, bit) = summary_of(first);
        // Cleared before the leaves are looked at: see the module's header. Killed right after
        // this, leaves stay under a cleared bit until the next process scans leaves.
        // SeqCst, as the looks below: partners are the leaf and the look in `mark_word`.
        self.summary[summary].fetch_and(!bit, SeqCst);
        let mut left = blocks_max;
        let leaves = self.leaves_of(group);
        let (live, taken) = (&self.live[leaves.clone()], &self.taken[leaves]);
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
                self.summary[summary].fetch_or(bit, AcqRel);
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

    /// Puts every taken bit back into live, then clears it. May be repeated.
    pub fn restore(&self) {
        for group in self.noted() {
            let leaves = self.leaves_of(group);
            for (index, taken) in leaves.clone().zip(&self.taken[leaves]) {
                let word = taken.load(Relaxed);
                if word != 0 {
                    // Clears taken bits: they are live first, so that a kill between leaves them
                    // in both.
                    self.mark_word(index, word);
                    taken.fetch_and(!word, AcqRel);
                }
            }
            self.noted[group as usize].store(false, Relaxed);
        }
    }

    /// Clears the taken bitmap in full. Only for a cut that the target has committed.
    pub fn clear_taken(&self) {
        for group in self.noted() {
            for word in &self.taken[self.leaves_of(group)] {
                if word.load(Relaxed) != 0 {
                    word.store(0, Relaxed);
                }
            }
            self.noted[group as usize].store(false, Relaxed);
        }
    }

    /// Sets every bit that is live in `old`, which is no larger and which nobody marks any more.
    pub fn absorb(&self, old: &Self) {
        for (index, word) in old.live[..leaf_words(old.blocks)].iter().enumerate() {
            let word = word.load(Acquire);
            if word != 0 {
                self.mark_word(index, word);
            }
        }
    }

    /// Whether no leaf of the live bitmap is set. Repairs the summary of one that is, so that the
    /// next take finds it.
    pub fn live_is_clear(&self) -> bool {
        // Partner: the caller has read the disk, or the counters; those loads stay before these.
        W::fence(SeqCst);
        let mut leaves = self.live[..leaf_words(self.blocks)].iter();
        match leaves.position(|leaf| leaf.load(Acquire) != 0) {
            None => true,
            Some(index) => {
                let (word, bit) = summary_of(index);
                self.summary[word].fetch_or(bit, AcqRel);
                false
            }
        }
    }

    /// Whether no leaf of the taken bitmap is set, whatever is noted: the last check before a cut
    /// names them its own.
    pub fn taken_is_clear(&self) -> bool {
        self.taken[..leaf_words(self.blocks)].iter().all(|word| word.load(Acquire) == 0)
    }

    /// Bits in live. Without `leaves` a bit that is being marked right now may be missed.
    pub fn live_count(&self, leaves: bool) -> u64 {
        let bit = |group| {
            let (word, bit) = summary_of((group * GROUP_WORDS) as usize);
            leaves || self.summary[word].load(Relaxed) & bit != 0
        };
        let marked = (0..groups(self.blocks)).filter(|group| bit(*group));
        marked.map(|group| count(&self.live[self.leaves_of(group)])).sum()
    }

    /// Bits in taken.
    pub fn taken_count(&self) -> u64 {
        self.noted().map(|group| count(&self.taken[self.leaves_of(group)])).sum()
    }

    /// Whether a block of the run is live or taken.
    pub fn holds(&self, run: BlockRun) -> bool {
        // Live before taken: a bit that moves in between is seen in one of them.
        words_of(run, self.blocks).any(|(index, mask)| {
            (self.live[index].load(Acquire) | self.taken[index].load(Acquire)) & mask != 0
        })
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
