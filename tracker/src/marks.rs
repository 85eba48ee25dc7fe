//! Live bitmap, taken bitmap and the header that says which cut stands.

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
pub struct Marks {}

impl Marks {
    /// Marks in plain memory: for compare-only volumes and simulation.
    pub fn in_memory(blocks: u64) -> Self {
        let _ = blocks;
        todo!()
    }
    /// Number of blocks of the volume.
    pub fn blocks(&self) -> u64 {
        todo!()
    }
    /// The current cut.
    pub fn cut(&self) -> Cut {
        todo!()
    }
    /// Begins a cut. Panics unless the taken bitmap is clear in full and no other cut stands.
    pub fn begin(&self, epoch: u64, cut_id: [u8; 16]) {
        let _ = (epoch, cut_id);
        todo!()
    }
    /// One pass: moves live bits to taken (kill-safe), at most `blocks_max`, appends their runs in
    /// rising order to `out`. Returns the number of blocks taken.
    pub fn take(&self, blocks_max: u64, out: &mut Vec<BlockRun>) -> u64 {
        let _ = (blocks_max, out);
        todo!()
    }
    /// Marks blocks as written since the last cut.
    pub fn mark(&self, run: BlockRun) {
        let _ = run;
        todo!()
    }
    /// Gives the cut up: one store in the header, then taken is OR-ed back into live and cleared.
    /// May be repeated.
    pub fn give_up(&self) {
        todo!()
    }
    /// The target has committed this very cut: taken is cleared in full, the cut is remembered as
    /// acknowledged. False (and nothing done) if another cut stands or this one was given up.
    pub fn committed(&self, cut_id: [u8; 16]) -> bool {
        let _ = cut_id;
        todo!()
    }
    /// Newest acknowledged epoch and its cut id; zeros before.
    pub fn acknowledged(&self) -> (u64, [u8; 16]) {
        todo!()
    }
    /// Takes the target's word for what is durable (after a compare was ordered for the doubt).
    pub fn set_acknowledged(&self, epoch: u64, cut_id: [u8; 16]) {
        let _ = (epoch, cut_id);
        todo!()
    }
    /// Every leaf word of the live bitmap is zero. Scans leaves, never the summary.
    pub fn live_is_clear(&self) -> bool {
        todo!()
    }
    /// Blocks in the live bitmap.
    pub fn live_count(&self) -> u64 {
        todo!()
    }
    /// Blocks in the taken bitmap.
    pub fn taken_count(&self) -> u64 {
        todo!()
    }
    /// Whether any block of the run is live or taken.
    pub fn holds(&self, run: BlockRun) -> bool {
        let _ = run;
        todo!()
    }
    /// Whether the marks may be incomplete, so that source and target must be compared. True after
    /// a fresh start; survives the process.
    pub fn compare_due(&self) -> bool {
        todo!()
    }
    /// Sets or clears [`Self::compare_due`].
    pub fn set_compare_due(&self, due: bool) {
        let _ = due;
        todo!()
    }
}
