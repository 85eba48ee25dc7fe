//! What is left of the tracker when the agent's process goes, as pinned in the kernel: the header,
//! up to two sets of bitmaps, and the programs that mark in one of them all along.

use crate::world::{BLOCK, World};
use secondsite_tracker::bitmap::Bitmaps;
use secondsite_tracker::grow::{Extent, Sets};
use secondsite_tracker::header::{HEADER_WORDS, Header};
use secondsite_tracker::marks::{BlockRun, Marks, MarksMemory};
use secondsite_tracker::sync::Memory;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

type Words = Arc<[AtomicU64]>;

fn words(count: u64) -> Words {
    (0..count).map(|_| 0.into()).collect()
}

/// Live, summary, taken.
struct Set([Words; 3]);

impl Set {
    fn new(extent: Extent) -> Self {
        let leaves = extent.blocks(BLOCK as u32).div_ceil(64);
        Self([leaves, leaves.div_ceil(64 * 64), leaves].map(words))
    }

    fn memory(&self) -> [Memory<AtomicU64>; 3] {
        self.0.each_ref().map(|words| Memory::new(words.clone()))
    }
}

/// See the module.
pub struct Pinned {
    pub header: Words,
    sets: [Option<Set>; 2],
    /// What the programs mark in.
    marking: Bitmaps<AtomicU64>,
}

impl Pinned {
    /// Attached anew to a device of so many bytes.
    pub fn fresh(bytes: usize) -> Self {
        let extent = Extent { sectors: bytes as u64 / 512, set: 0 };
        let header = words(HEADER_WORDS as u64);
        let fields = Header::new(&header[..]);
        fields.set_bound(extent.sectors);
        fields.set_extent(extent);
        fields.set_compare_due(true);
        let set = Set::new(extent);
        let marking = bitmaps(extent, &set);
        Self { header, sets: [Some(set), None], marking }
    }

    /// How far the marks go, bytes.
    pub fn bytes(&self) -> usize {
        (Header::new(&self.header[..]).extent().sectors << 9) as usize
    }

    /// A program marks.
    pub fn mark(&self, run: BlockRun) {
        self.marking.mark(run);
    }

    /// What a process finds that opens them.
    pub fn open(&self) -> Arc<Marks> {
        let extent = Header::new(&self.header[..]).extent();
        Arc::new(Marks::open(extent.blocks(BLOCK as u32), self.memory(extent)))
    }

    fn set(&self, extent: Extent) -> &Set {
        self.sets[extent.set].as_ref().expect("the set is pinned")
    }

    fn memory(&self, extent: Extent) -> MarksMemory<AtomicU64> {
        let [live, summary, taken] = self.set(extent).memory();
        MarksMemory { header: Memory::new(self.header.clone()), live, summary, taken }
    }
}

fn bitmaps(extent: Extent, set: &Set) -> Bitmaps<AtomicU64> {
    let [live, summary, taken] = set.memory();
    Bitmaps::new(extent.blocks(BLOCK as u32), live, summary, taken)
}

/// The sets of one disk, as a process replaces them that may be killed in between.
pub struct PinnedSets<'a> {
    pub world: &'a World,
    pub index: usize,
}

impl PinnedSets<'_> {
    fn step(&self, change: impl FnOnce(&mut Pinned)) {
        self.world.moment();
        change(&mut self.world.state().disks[self.index].pinned);
        self.world.moment();
    }
}

impl Sets<AtomicU64> for PinnedSets<'_> {
    type Error = Infallible;
    fn make(&mut self, extent: Extent) -> Result<(), Infallible> {
        self.step(|pinned| pinned.sets[extent.set] = Some(Set::new(extent)));
        Ok(())
    }
    fn open(&self, extent: Extent) -> Result<MarksMemory<AtomicU64>, Infallible> {
        Ok(self.world.state().disks[self.index].pinned.memory(extent))
    }
    fn switch(&mut self, extent: Extent) -> Result<(), Infallible> {
        self.step(|pinned| pinned.marking = bitmaps(extent, pinned.set(extent)));
        Ok(())
    }
    fn remove(&mut self, set: usize) -> Result<(), Infallible> {
        let there = self.world.state().disks[self.index].pinned.sets[set].is_some();
        if there {
            self.step(|pinned| pinned.sets[set] = None);
        }
        Ok(())
    }
}
