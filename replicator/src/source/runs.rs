//! Arithmetic of runs: what is excluded, what is left over, how runs are packed into buffers.
//! Pure.

use crate::source::buffers::BUFFER_BYTES;
use crate::source::seams::Piece;
use secondsite_tracker::marks::BlockRun;

/// How much of an excluded range the first copy ships, once: a swap header with its label.
pub const EXCLUDED_HEAD_BYTES: u64 = 64 << 10;

/// The size of a volume and of its blocks, and what of it is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Size of the volume, bytes.
    pub volume_bytes: u64,
    /// Unit of tracking, bytes.
    pub block_bytes: u32,
    /// Blocks that lie wholly in an excluded range: rising, apart from each other.
    excluded: Vec<BlockRun>,
}

impl Shape {
    /// `excluded` are byte ranges (offset, length), in any order.
    pub fn new(volume_bytes: u64, block_bytes: u32, excluded: &[(u64, u64)]) -> Self {
        let size = u64::from(block_bytes);
        let mut runs: Vec<BlockRun> = excluded
            .iter()
            .filter_map(|&(offset, bytes)| {
                let end = offset.saturating_add(bytes).min(volume_bytes);
                let first = offset.div_ceil(size);
                // The last block of the volume may be shorter than a block.
                let last = if end == volume_bytes { end.div_ceil(size) } else { end / size };
                (last > first).then(|| BlockRun { first, count: last - first })
            })
            .collect();
        runs.sort_unstable();
        Self { volume_bytes, block_bytes, excluded: merge(runs) }
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        self.volume_bytes.div_ceil(u64::from(self.block_bytes))
    }

    /// Whether nothing is left out.
    pub fn is_whole(&self) -> bool {
        self.excluded.is_empty()
    }

    /// Bytes of a run, clipped to the volume: (offset, length).
    pub fn range(&self, run: BlockRun) -> (u64, u64) {
        let size = u64::from(self.block_bytes);
        let offset = run.first * size;
        (offset, (run.count * size).min(self.volume_bytes.saturating_sub(offset)))
    }

    /// Bytes of all runs.
    pub fn bytes(&self, runs: &[BlockRun]) -> u64 {
        runs.iter().map(|run| self.range(*run).1).sum()
    }

    /// The blocks that a byte range touches.
    pub fn run(&self, offset: u64, bytes: u64) -> BlockRun {
        let size = u64::from(self.block_bytes);
        let first = offset / size;
        BlockRun { first, count: (offset + bytes).div_ceil(size) - first }
    }

    /// A block as a piece that lies at `at` in its buffer.
    pub fn piece(&self, block: u64, at: usize) -> Piece {
        let (offset, bytes) = self.range(BlockRun { first: block, count: 1 });
        Piece { offset, bytes: bytes as usize, at }
    }

    /// The part of a piece that these blocks of it are.
    pub fn part(&self, piece: &Piece, run: BlockRun) -> Piece {
        let (offset, bytes) = self.range(run);
        let skipped = (offset - piece.offset) as usize;
        let bytes = (bytes as usize).min(piece.bytes - skipped);
        Piece { offset, bytes, at: piece.at + skipped }
    }

    /// `runs` (rising) without what is excluded.
    pub fn included(&self, runs: &[BlockRun]) -> Vec<BlockRun> {
        subtract(runs, &self.excluded)
    }

    /// What the first copy ships of a byte range: all but the excluded blocks, of which only the
    /// first [`EXCLUDED_HEAD_BYTES`] of each range.
    pub fn copied(&self, offset: u64, bytes: u64) -> Vec<BlockRun> {
        let head = EXCLUDED_HEAD_BYTES.div_ceil(u64::from(self.block_bytes));
        let tails: Vec<BlockRun> = self
            .excluded
            .iter()
            .filter(|run| run.count > head)
            .map(|run| BlockRun { first: run.first + head, count: run.count - head })
            .collect();
        subtract(&[self.run(offset, bytes)], &tails)
    }
}

/// Joins neighbours and overlaps of sorted runs.
pub fn merge(runs: Vec<BlockRun>) -> Vec<BlockRun> {
    let mut out: Vec<BlockRun> = Vec::with_capacity(runs.len());
    for run in runs {
        match out.last_mut() {
            Some(last) if run.first <= last.first + last.count => {
                last.count = last.count.max(run.first + run.count - last.first);
            }
            _ => out.push(run),
        }
    }
    out
}

/// `from` without `what`; both rising, `what` without overlaps.
pub fn subtract(from: &[BlockRun], what: &[BlockRun]) -> Vec<BlockRun> {
    let mut out = Vec::with_capacity(from.len());
    let mut holes = what.iter().peekable();
    for run in from {
        let (mut at, end) = (run.first, run.first + run.count);
        while at < end {
            while holes.next_if(|hole| hole.first + hole.count <= at).is_some() {}
            let (hole_first, hole_end) = match holes.peek() {
                Some(hole) if hole.first < end => (hole.first, hole.first + hole.count),
                _ => (end, end),
            };
            if hole_first > at {
                out.push(BlockRun { first: at, count: hole_first - at });
            }
            at = hole_end.max(at);
        }
    }
    out
}

/// Packs runs into buffers: each is filled as far as it goes, so that scattered blocks travel
/// together and long runs in pieces of 1 MiB.
pub struct Packer<'a> {
    shape: &'a Shape,
    runs: &'a [BlockRun],
    /// Bytes of the first run that are packed already.
    done: u64,
}

impl<'a> Packer<'a> {
    /// Packs rising runs that do not overlap.
    pub fn new(shape: &'a Shape, runs: &'a [BlockRun]) -> Self {
        Self { shape, runs, done: 0 }
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Fills one buffer: its pieces are put into `pieces`, which is cleared first.
    pub fn fill(&mut self, pieces: &mut Vec<Piece>) {
        pieces.clear();
        let mut at = 0;
        while let Some((run, rest)) = self.runs.split_first() {
            let (offset, bytes) = self.shape.range(*run);
            let take = (bytes - self.done).min((BUFFER_BYTES - at) as u64);
            if take > 0 {
                pieces.push(Piece { offset: offset + self.done, bytes: take as usize, at });
            }
            at += take as usize;
            self.done += take;
            if self.done < bytes {
                return;
            }
            self.runs = rest;
            self.done = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BlockRun, Packer, Shape, subtract};
    use proptest::collection::vec;
    use proptest::prelude::{any, prop_assert_eq, proptest};
    use std::collections::BTreeSet;

    fn runs(bits: &[bool]) -> Vec<BlockRun> {
        let ones = bits.iter().enumerate().filter(|(_, bit)| **bit);
        super::merge(ones.map(|(i, _)| BlockRun { first: i as u64, count: 1 }).collect())
    }

    fn set(runs: &[BlockRun]) -> BTreeSet<u64> {
        runs.iter().flat_map(|run| run.first..run.first + run.count).collect()
    }

    proptest! {
        #[test]
        fn subtracting_is_what_sets_do(a in vec(any::<bool>(), 80), b in vec(any::<bool>(), 80)) {
            let (a, b) = (runs(&a), runs(&b));
            prop_assert_eq!(set(&subtract(&a, &b)), &set(&a) - &set(&b));
        }

        #[test]
        fn packing_keeps_every_byte_once(bits in vec(any::<bool>(), 900), tail in 1u64..9) {
            let runs = runs(&bits);
            let shape = Shape::new(899 * 4096 + tail * 512, 4096, &[]);
            let mut packer = Packer::new(&shape, &runs);
            let (mut pieces, mut bytes, mut end) = (Vec::new(), 0, 0);
            while !packer.is_empty() {
                packer.fill(&mut pieces);
                let mut at = 0;
                for piece in &pieces {
                    assert!(piece.offset >= end && piece.at == at);
                    end = piece.offset + piece.bytes as u64;
                    at += piece.bytes;
                    bytes += piece.bytes as u64;
                }
                assert!(at <= super::BUFFER_BYTES && (packer.is_empty() || at == super::BUFFER_BYTES));
            }
            prop_assert_eq!(bytes, shape.bytes(&runs));
        }
    }

    #[test]
    fn excluded_ranges_shrink_to_whole_blocks_and_keep_their_head_in_the_first_copy() {
        let shape = Shape::new(1 << 20, 4096, &[(100 << 10, 200 << 10), (1000 << 10, 24 << 10)]);
        let all = [BlockRun { first: 0, count: 256 }];
        let kept = [BlockRun { first: 0, count: 25 }, BlockRun { first: 75, count: 175 }];
        assert_eq!(shape.included(&all), kept);
        let copied = [BlockRun { first: 0, count: 41 }, BlockRun { first: 75, count: 181 }];
        assert_eq!(shape.copied(0, 1 << 20), copied);
    }
}
