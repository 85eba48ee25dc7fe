//! Which writes a cut waits for, and which blocks are being preserved for it: one a volume.
//!
//! A block of the cut layer is in one of these states, and moves down the list:
//! - an earlier write is in flight on it: neither read nor preserved before that has ended;
//! - untouched: the agent may read it; a write that wants it has it preserved first;
//! - being preserved: its copy is on its way into a slot; who wants it waits. The agent may read
//!   it at the same time, since it is not yet overwritten;
//! - out of the cut layer: read by the agent, or preserved in a slot that says so. It may be
//!   overwritten.

use crate::filter::gate::{COPIES_MAX, Preserve};
use crate::filter::shared::Shared;
use crate::marks::BlockRun;

/// Bytes of one copy at most.
const COPY_BYTES_MAX: u64 = 256 << 10;

/// Blocks of the cut layer looked at together.
const SCAN_BLOCKS: u64 = 64;

/// Why the epoch was given up.
pub(super) const FULL: u64 = 1;
pub(super) const FAILED: u64 = 2;

/// One volume's state between a flip and its commit, as far as the filter is concerned.
pub(super) struct Keeper {
    /// Writes that were let through before the flip and are not done.
    old: Vec<BlockRun>,
    copies: Vec<Preserve>,
    /// Lanes with requests that wait.
    waiting: u64,
    /// Where the search for a free slot begins.
    next_slot: u32,
    /// Nothing is allocated after the start.
    scratch: Vec<BlockRun>,
}

/// What a write may do.
pub(super) enum Verdict {
    Go,
    Wait,
}

impl Keeper {
    pub fn new(writes_max: usize) -> Self {
        Self {
            old: Vec::with_capacity(writes_max),
            copies: Vec::with_capacity(COPIES_MAX),
            waiting: 0,
            next_slot: 0,
            scratch: Vec::with_capacity(SCAN_BLOCKS as usize),
        }
    }

    /// A flip: these writes came before it.
    pub fn begin(&mut self, old: impl Iterator<Item = BlockRun>) {
        self.old.clear();
        self.old.extend(old);
    }

    pub fn is_settled(&self) -> bool {
        self.old.is_empty()
    }

    pub fn is_idle(&self) -> bool {
        self.copies.is_empty()
    }

    /// A write from before the flip is done. Its lanes are to be woken.
    pub fn old_done(&mut self, run: BlockRun) -> u64 {
        if let Some(at) = self.old.iter().position(|old| *old == run) {
            self.old.swap_remove(at);
        }
        std::mem::take(&mut self.waiting)
    }

    /// A write of these blocks would go down now. Adds the copies that its lane must make first.
    pub fn want(
        &mut self,
        shared: &Shared,
        flip: u64,
        run: BlockRun,
        lane: usize,
        out: &mut Vec<Preserve>,
    ) -> Verdict {
        if self.is_more_than_fits(shared, run) {
            shared.fall(flip, FULL);
            return Verdict::Go;
        }
        let end = run.first + run.count;
        let (mut wait, mut from) = (false, run.first);
        while from < end {
            let mut held = std::mem::take(&mut self.scratch);
            held.clear();
            from = shared.marks().cut_runs(from, SCAN_BLOCKS, &mut held);
            for part in held.iter().filter_map(|part| clip(*part, end)) {
                wait = true;
                if !self.preserve(shared, flip, part, out) {
                    self.scratch = held;
                    shared.fall(flip, FULL);
                    return Verdict::Go;
                }
            }
            self.scratch = held;
        }
        if !wait {
            return Verdict::Go;
        }
        self.waiting |= 1 << lane;
        Verdict::Wait
    }

    /// Begins copies of these blocks of the cut layer, as far as nothing stands in the way. False
    /// if there is no room.
    fn preserve(
        &mut self,
        shared: &Shared,
        flip: u64,
        part: BlockRun,
        out: &mut Vec<Preserve>,
    ) -> bool {
        let block = u64::from(shared.form().block_bytes);
        let (mut next, end) = (part.first, part.first + part.count);
        while next < end && self.copies.len() < COPIES_MAX {
            let free = |block: u64| {
                let one = BlockRun { first: block, count: 1 };
                !self.old.iter().any(|old| overlap(*old, one))
                    && !self.copies.iter().any(|copy| overlap(copy.run, one))
            };
            if !free(next) {
                next += 1;
                continue;
            }
            let most = (COPY_BYTES_MAX / block).max(1).min(end - next);
            let count = (next..next + most).take_while(|block| free(*block)).count();
            let Some((slot, count)) = self.slots(shared, count as u32) else { return false };
            let run = BlockRun { first: next, count: u64::from(count) };
            let offset = next * block;
            let bytes = (run.count * block).min(shared.form().volume_bytes - offset) as u32;
            let copy = Preserve { offset, bytes, slot, flip, run };
            self.copies.push(copy);
            out.push(copy);
            next += run.count;
        }
        true
    }

    /// A copy has ended. Lanes to be woken.
    pub fn preserved(&mut self, shared: &Shared, copy: &Preserve, ok: bool, flip: u64) -> u64 {
        self.copies.retain(|other| other.slot != copy.slot);
        let slots = (copy.slot..).zip(copy.run.first..copy.run.first + copy.run.count);
        // A cut that is over, or given up, has no use for it; and its layer may be live by now.
        let useful = ok && copy.flip == flip && !shared.is_fallen(flip);
        for (slot, block) in slots {
            // One that the agent has read meanwhile may have been overwritten while it was copied;
            // one that is in the cut layer even now was not.
            let held = shared.marks().cut_holds(BlockRun { first: block, count: 1 });
            if useful && held {
                shared.publish(slot, flip, block);
            } else {
                shared.release(slot);
            }
        }
        if useful {
            // Out of the cut layer: its copies were published before, and the writes that wait for
            // it are submitted after.
            shared.marks().cut_forget(copy.run);
        } else if !ok && copy.flip == flip && shared.marks().cut_holds(copy.run) {
            shared.fall(flip, FAILED);
        }
        std::mem::take(&mut self.waiting)
    }

    /// Free slots that follow each other, as many as there are up to `count`; reserved.
    fn slots(&mut self, shared: &Shared, count: u32) -> Option<(u32, u32)> {
        let (memory, all) = (shared.form().memory_slots, shared.slots());
        let search = |from: u32, to: u32| (from..to).find(|slot| shared.is_free(*slot));
        let next = self.next_slot;
        let first = search(next.min(memory), memory)
            .or_else(|| search(0, next.min(memory)))
            .or_else(|| search(memory, all))?;
        // Not from memory into the reserve: a copy lies in one of them.
        let limit = if first < memory { memory } else { all };
        let mut found = 0;
        while found < count && first + found < limit && shared.is_free(first + found) {
            shared.take_slot(first + found);
            found += 1;
        }
        self.next_slot = first + found;
        Some((first, found))
    }

    /// A discard may cover more than could ever be preserved: not worth beginning.
    fn is_more_than_fits(&mut self, shared: &Shared, run: BlockRun) -> bool {
        if run.count <= u64::from(shared.slots()) {
            return false;
        }
        let (mut held, mut from, end) = (0, run.first, run.first + run.count);
        while from < end {
            self.scratch.clear();
            from = shared.marks().cut_runs(from, SCAN_BLOCKS, &mut self.scratch);
            held += self
                .scratch
                .iter()
                .filter_map(|part| clip(*part, end))
                .map(|p| p.count)
                .sum::<u64>();
        }
        held > u64::from(shared.slots())
    }
}

/// What of it lies before `end`.
fn clip(run: BlockRun, end: u64) -> Option<BlockRun> {
    let count = run.count.min(end.saturating_sub(run.first));
    (count > 0).then_some(BlockRun { count, ..run })
}

fn overlap(a: BlockRun, b: BlockRun) -> bool {
    a.first < b.first + b.count && b.first < a.first + a.count
}
