//! What a cut behind the filter holds: read, or copied from what the filter preserved.
//!
//! The agent reads a block from the disk, then takes it out of the cut layer. If it was still in
//! there, nothing had overwritten it, and what was read is its content at the cut. If not, the
//! filter has kept a copy, which follows under a later pass. Both leave the block free to be
//! overwritten, so what was taken can never be read again: if a frame of it is lost with its
//! session, the epoch is given up.

use crate::source::runs::Shape;
use crate::source::seams::Batch;
use crate::source::shipper::{Shipper, StepError};
use secondsite_tracker::filter::shared::{Kept, Shared};
use secondsite_tracker::marks::{BlockRun, Marks};
use std::sync::Arc;
use std::time::Duration;

/// How often it is looked whether the writes from before the flip are done.
const SETTLE_EVERY: Duration = Duration::from_millis(1);
/// Blocks collected in one step.
const STEP_BLOCKS: u64 = 1 << 14;
/// How long to wait for a buffer before looking whether to stop.
const BUFFER_PATIENCE: Duration = Duration::from_millis(200);

impl Shipper {
    /// A part of the cut; when to be called for more, none once the target has all of it.
    pub(super) fn collect(&mut self) -> Result<Option<Duration>, StepError> {
        let collected = self.collect_part();
        if let Err(StepError::Link(_)) = collected {
            self.give_up("the connection was lost while the cut was sent");
        }
        collected
    }

    fn collect_part(&mut self) -> Result<Option<Duration>, StepError> {
        self.begin_ledger();
        let volume = self.volume.clone();
        let (marks, flip) = (volume.marks(), volume.marks().flip());
        let shared = volume.tracker.filtered().cloned();
        let Some(shared) = shared else {
            return Err(StepError::GiveUp("its filter is gone".into()));
        };
        stands(&shared, marks, flip)?;
        if !shared.settled(flip) {
            return Ok(Some(SETTLE_EVERY));
        }
        let mut runs = Vec::new();
        marks.cut_runs(0, STEP_BLOCKS, &mut runs);
        let done = runs.is_empty() && marks.cut_is_clear();
        let mut bench = volume.bench();
        if !runs.is_empty() {
            bench.pass += 1;
            let included = volume.shape.included(&runs);
            leave_out(marks, &runs, &included);
            self.send_runs(&mut bench, &included, |batch| claim(marks, &volume.shape, batch))?;
        }
        // After the reads, and under a pass of their own: a copy outlives what was read meanwhile.
        let mut kept: Vec<Kept> = shared.kept(flip).collect();
        // The layer was clear before these were looked for: every copy had been published.
        let over = done && kept.is_empty();
        while !kept.is_empty() {
            bench.pass += 1;
            let batch = self.copies(&shared, &mut kept, u64::from(bench.pass))?;
            self.send_held(&mut bench, vec![batch])?;
        }
        drop(bench);
        stands(&shared, marks, flip)?;
        if !over {
            return Ok(Some(Duration::ZERO));
        }
        // Else a power cut after the commit would leave the target with a cut that nobody knows.
        if !shared.is_noted(marks.cut().cut_id) {
            return Ok(Some(SETTLE_EVERY));
        }
        marks.collected();
        self.barrier()?;
        Ok(None)
    }

    /// As many copies as a buffer holds; their slots are free then.
    fn copies(&self, shared: &Shared, kept: &mut Vec<Kept>, pass: u64) -> Result<Batch, StepError> {
        let pool = &self.commons.memory.bulk;
        let mut buffer = loop {
            if self.volume.stopping() {
                return Err(StepError::Stopping);
            }
            if let Some(buffer) = pool.take(BUFFER_PATIENCE) {
                break buffer;
            }
        };
        let block = self.volume.shape.block_bytes as usize;
        let mut pieces = Vec::new();
        let mut at = 0;
        kept.sort_unstable_by_key(|kept| std::cmp::Reverse(kept.block));
        while at + block <= buffer.bytes().len()
            && let Some(one) = kept.pop()
        {
            let piece = self.volume.shape.piece(one.block, at);
            shared.read(one, &mut buffer.bytes_mut()[at..at + piece.bytes]).map_err(|error| {
                // What is preserved there from now on could not be read either.
                shared.reserve_failed();
                StepError::GiveUp(format!("the reserve: {error}"))
            })?;
            shared.free(one);
            at += block;
            // The filter does not know what is left out.
            if !self.volume.shape.is_whole()
                && self.volume.shape.included(&[BlockRun { first: one.block, count: 1 }]).is_empty()
            {
                continue;
            }
            pieces.push(piece);
        }
        Ok(Batch { tag: pass, pieces, buffer, unreadable: Vec::new() })
    }
}

/// The header still says that the cut stands, and the filter that it has neither given it up nor
/// flipped again: then the layer would hold what came later.
fn stands(shared: &Arc<Shared>, marks: &Marks, flip: u64) -> Result<(), StepError> {
    if shared.flipped() != flip {
        return Err(StepError::GiveUp("the filter made another cut meanwhile".into()));
    }
    if flip == 0 || !marks.cut().stands {
        let why = shared.fallen(flip).unwrap_or("the cut no longer stands");
        return Err(StepError::GiveUp(why.into()));
    }
    Ok(())
}

/// Blocks that are in no epoch need not be read.
fn leave_out(marks: &Marks, runs: &[BlockRun], included: &[BlockRun]) {
    if runs != included {
        let excluded = crate::source::runs::subtract(runs, included);
        excluded.into_iter().for_each(|run| marks.cut_done(run, &mut Vec::new()));
    }
}

/// Takes what was read out of the cut layer, and what had been overwritten by then out of the
/// batch.
fn claim(marks: &Marks, shape: &Shape, batch: &mut Batch) {
    let pieces = std::mem::take(&mut batch.pieces);
    for piece in pieces {
        let mut good = Vec::new();
        marks.cut_done(shape.run(piece.offset, piece.bytes as u64), &mut good);
        batch.pieces.extend(good.into_iter().map(|run| shape.part(&piece, run)));
    }
}
