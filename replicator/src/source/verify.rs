//! Verify: compares without marking, and calls a block damaged only when nothing else explains the
//! difference.
//!
//! A block that differs is explained if a bitmap held it after it was read, or if an epoch since
//! carried it. A completion mark may come after the data, so what is unexplained is looked at
//! again after further cuts, with nothing in flight. A compare-only volume has no marks to explain
//! anything: no cut is made while it is verified, and what differs in every look counts.

use crate::source::compare::Compare;
use crate::source::runs::{merge, subtract};
use crate::source::shipper::{Shipper, StepError};
use crate::source::volume::VerifyState;
use secondsite_tracker::marks::BlockRun;

/// Looks at a differing block before it counts as damaged.
const LOOKS: u32 = 3;
/// Looks that found writes in flight do not count, but only so many times.
const LOOKS_BUSY_MAX: u32 = 5;
/// Differing ranges that the result names.
const RANGES_MAX: usize = 16;

/// A verify under way.
pub struct Verify {
    sweep: Compare,
    compared_bytes: u64,
    /// Blocks that differ unexplained, rising.
    suspects: Vec<BlockRun>,
    looks: u32,
    busy: u32,
    /// Commits when the last look ended.
    commits: u64,
}

impl Verify {
    fn new(volume_bytes: u64) -> Self {
        Self {
            sweep: Compare::new(volume_bytes),
            compared_bytes: 0,
            suspects: Vec::new(),
            looks: 0,
            busy: 0,
            commits: 0,
        }
    }

    /// An epoch carries these blocks: they are explained.
    pub(super) fn held(&mut self, runs: &[BlockRun]) {
        if !self.suspects.is_empty() {
            let mut runs = runs.to_vec();
            runs.sort_unstable();
            self.suspects = subtract(&self.suspects, &merge(runs));
        }
    }
}

impl Shipper {
    /// Does a piece of an ordered verify; false if there is nothing to do now.
    pub(super) fn verify_step(&mut self) -> Result<bool, StepError> {
        let total = self.volume.shape.volume_bytes;
        let commits = {
            let mut control = self.volume.control();
            match control.verify {
                VerifyState::Idle | VerifyState::Done(..) => return Ok(false),
                VerifyState::Ordered => {
                    control.verify = VerifyState::Running(0, total);
                    self.verify = Some(Verify::new(total));
                }
                VerifyState::Running(..) => {}
            }
            control.commits
        };
        let Some(mut verify) = self.verify.take() else {
            // Its looks were lost with a session: from the start.
            self.volume.control().verify = VerifyState::Ordered;
            return Ok(true);
        };
        let worked = self.verify_piece(&mut verify, commits);
        if !matches!(self.volume.control().verify, VerifyState::Done(..)) {
            self.verify = Some(verify);
        }
        worked
    }

    fn verify_piece(&mut self, verify: &mut Verify, commits: u64) -> Result<bool, StepError> {
        if let Some((offset, bytes)) = verify.sweep.next_span() {
            let look = self.look(offset, bytes)?;
            verify.compared_bytes += look.compared_bytes;
            verify.suspects.extend(self.unexplained(&look.differing));
            let (done, total) = verify.sweep.progress();
            verify.looks = 1;
            verify.commits = commits;
            self.volume.control().verify = VerifyState::Running(done, total);
            self.volume.coordinator.ring();
            return Ok(true);
        }
        if verify.suspects.is_empty() || verify.looks >= LOOKS {
            self.verified(verify);
            return Ok(true);
        }
        if commits == verify.commits && !self.volume.compare_only {
            let mut control = self.volume.control();
            let asked = std::mem::replace(&mut control.verify_waits, true);
            drop(control);
            if !asked {
                self.volume.coordinator.ring();
            }
            return Ok(false);
        }
        self.volume.control().verify_waits = false;
        self.look_again(verify)?;
        verify.commits = commits;
        Ok(true)
    }

    fn look_again(&mut self, verify: &mut Verify) -> Result<(), StepError> {
        let mut still = Vec::new();
        let mut sweep = Compare::new(self.volume.shape.volume_bytes);
        while let Some((offset, bytes)) = sweep.next_span() {
            let span = self.volume.shape.run(offset, bytes);
            let within = |run: &&BlockRun| {
                run.first < span.first + span.count && span.first < run.first + run.count
            };
            if verify.suspects.iter().any(|run| within(&run)) {
                let look = self.look(offset, bytes)?;
                still.extend(self.unexplained(&look.differing));
            }
        }
        // In both looks: `a` without (`a` without `b`).
        let gone = subtract(&verify.suspects, &merge(still));
        verify.suspects = subtract(&verify.suspects, &gone);
        if self.volume.tracker.writes_in_flight() && verify.busy < LOOKS_BUSY_MAX {
            verify.busy += 1;
        } else {
            verify.looks += 1;
        }
        Ok(())
    }

    /// Those that neither live nor taken holds. Asked after the block was read: a write that
    /// changed it before has set its queue mark by then, and only a commit (which this thread
    /// makes) could have cleared it since.
    fn unexplained(&self, differing: &[BlockRun]) -> Vec<BlockRun> {
        let marks = self.volume.marks();
        let blocks = differing.iter().flat_map(|run| run.first..run.first + run.count);
        let free = blocks
            .map(|first| BlockRun { first, count: 1 })
            .filter(|block| self.volume.compare_only || !marks.holds(*block));
        merge(free.collect())
    }

    fn verified(&mut self, verify: &mut Verify) {
        let shape = &self.volume.shape;
        let differing = shape.bytes(&verify.suspects);
        let ranges = verify.suspects.iter().take(RANGES_MAX).map(|run| shape.range(*run)).collect();
        let mut control = self.volume.control();
        control.verify_waits = false;
        control.verify = VerifyState::Done(verify.compared_bytes, differing, ranges);
        drop(control);
        self.volume.coordinator.ring();
    }
}
