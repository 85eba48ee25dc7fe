//! Comparing source and target by digests: by region, then by block where a region differs.
//!
//! A compare only marks. It is right because the tracker marks all along: a block that was equal
//! when it was read and is written later is live by then. Requests are bounded so that an answer
//! takes well under the session's timeouts, however slow the target's disk.

use crate::source::pipeline::is_zero;
use crate::source::runs::merge;
use crate::source::seams::LinkError;
use crate::source::ship::mark_all;
use crate::source::shipper::{Shipper, StepError, Work};
use crate::source::stream::read_in_order;
use secondsite_format::limits::{BLOCK_BYTES_MIN, DIGESTS_MAX};
use secondsite_format::message::{Reply, Request};
use secondsite_tracker::marks::BlockRun;

/// Bytes that one digest of the first look covers.
const REGION_BYTES: u64 = 4 << 20;
/// Bytes of one request, and of one step.
pub(super) const SPAN_BYTES: u64 = 64 << 20;

const _: () = assert!(REGION_BYTES / BLOCK_BYTES_MIN as u64 <= DIGESTS_MAX as u64);
const _: () = assert!(SPAN_BYTES.is_multiple_of(REGION_BYTES));

/// A compare under way.
#[derive(Debug, Clone)]
pub struct Compare {
    at: u64,
    end: u64,
}

impl Compare {
    /// Of everything below `end`, bytes.
    pub fn new(end: u64) -> Self {
        Self { at: 0, end }
    }

    /// Done and total, bytes.
    pub fn progress(&self) -> (u64, u64) {
        (self.at, self.end)
    }

    pub(super) fn next_span(&mut self) -> Option<(u64, u64)> {
        let offset = self.at;
        self.at = (self.at + SPAN_BYTES).min(self.end);
        (offset < self.at).then(|| (offset, self.at - offset))
    }
}

/// What a look at a span found.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// Blocks that differ, rising; without excluded ones.
    pub differing: Vec<BlockRun>,
    /// Blocks that could not be read.
    pub unreadable: Vec<BlockRun>,
    /// Bytes compared.
    pub compared_bytes: u64,
}

impl Shipper {
    /// One span of the compare that a doubt made necessary.
    pub(super) fn compare_step(&mut self) -> Result<(), StepError> {
        let Some(session) = &self.session else { return Ok(()) };
        let Work::Compare(compare) = &session.work else { return Ok(()) };
        let mut compare = compare.clone();
        let Some((offset, bytes)) = compare.next_span() else {
            self.compare_done();
            return Ok(());
        };
        self.compare_span(offset, bytes)?;
        self.volume.face.update(|status| status.progress = Some(compare.progress()));
        // Only now: a span that failed half-way is compared again after the reconnect.
        if let Some(session) = &mut self.session {
            session.work = Work::Compare(compare);
        }
        Ok(())
    }

    /// One span of a compare-only volume's compare; true when all of it is done.
    pub(super) fn compare_slice(&mut self) -> Result<bool, StepError> {
        let total = self.volume.shape.volume_bytes;
        let mut compare = self.compare.clone().unwrap_or_else(|| Compare::new(total));
        let Some((offset, bytes)) = compare.next_span() else {
            self.compare = None;
            self.volume.face.update(|status| status.progress = None);
            return Ok(true);
        };
        self.compare_span(offset, bytes)?;
        self.volume.face.update(|status| status.progress = Some(compare.progress()));
        self.compare = Some(compare);
        Ok(false)
    }

    fn compare_span(&mut self, offset: u64, bytes: u64) -> Result<(), StepError> {
        let look = self.look(offset, bytes)?;
        mark_all(self.volume.marks(), &look.differing);
        mark_all(self.volume.marks(), &look.unreadable);
        Ok(())
    }

    /// Compares a span (region-aligned at its start) with the target's newest committed state.
    pub(super) fn look(&mut self, offset: u64, bytes: u64) -> Result<Look, StepError> {
        let volume = self.volume.clone();
        let commons = self.commons.clone();
        let wanted = volume.shape.included(&[volume.shape.run(offset, bytes)]);
        let mut found = Look { compared_bytes: volume.shape.bytes(&wanted), ..Look::default() };
        if wanted.is_empty() {
            return Ok(found);
        }
        let theirs = self.digests(offset, bytes, REGION_BYTES)?;
        let mut ours: Vec<PieceHash> = theirs.iter().map(|_| PieceHash::default()).collect();
        let mut doubtful = vec![false; theirs.len()];
        let run = [volume.shape.run(offset, bytes)];
        {
            let mut bench = volume.bench();
            let disk = bench.disk.as_mut();
            read_in_order(disk, &commons.memory.bulk, &volume, &run, |batch| {
                for piece in &batch.pieces {
                    let region = ((piece.offset - offset) / REGION_BYTES) as usize;
                    doubtful[region] |= !batch.unreadable.is_empty();
                    ours[region].update(&batch.buffer.bytes()[piece.at..piece.at + piece.bytes]);
                }
            })?;
        }
        for (i, theirs) in theirs.iter().enumerate() {
            if doubtful[i] || ours[i].finish() != *theirs {
                let start = offset + i as u64 * REGION_BYTES;
                let len = REGION_BYTES.min(offset + bytes - start);
                self.look_closer(start, len, &mut found)?;
            }
        }
        found.differing = volume.shape.included(&merge(std::mem::take(&mut found.differing)));
        found.unreadable = volume.shape.included(&merge(std::mem::take(&mut found.unreadable)));
        Ok(found)
    }

    /// Compares one region block by block.
    fn look_closer(&mut self, offset: u64, bytes: u64, found: &mut Look) -> Result<(), StepError> {
        let volume = self.volume.clone();
        let commons = self.commons.clone();
        let size = u64::from(volume.shape.block_bytes);
        let theirs = self.digests(offset, bytes, size)?;
        let run = [volume.shape.run(offset, bytes)];
        let mut bench = volume.bench();
        let disk = bench.disk.as_mut();
        read_in_order(disk, &commons.memory.bulk, &volume, &run, |batch| {
            for (bad, len) in &batch.unreadable {
                found.unreadable.push(volume.shape.run(*bad, *len));
            }
            for piece in &batch.pieces {
                let data = &batch.buffer.bytes()[piece.at..piece.at + piece.bytes];
                for (i, block) in data.chunks(size as usize).enumerate() {
                    let at = piece.offset + i as u64 * size;
                    let readable =
                        !batch.unreadable.iter().any(|(bad, len)| (*bad..bad + len).contains(&at));
                    if readable && digest(block) != theirs[((at - offset) / size) as usize] {
                        found.differing.push(BlockRun { first: at / size, count: 1 });
                    }
                }
            }
        })
    }

    fn digests(&mut self, offset: u64, bytes: u64, piece: u64) -> Result<Vec<[u8; 32]>, StepError> {
        let expected = bytes.div_ceil(piece) as usize;
        match self.ask(&Request::Digests { offset, bytes, piece_bytes: piece })? {
            Reply::Digests(digests) if digests.len() == expected => Ok(digests),
            _ => Err(LinkError::Nonsense("digests were asked for").into()),
        }
    }
}

/// BLAKE3 of a piece that comes in parts; all zero if the piece is.
#[derive(Default)]
struct PieceHash {
    hash: blake3::Hasher,
    /// Zero bytes seen before anything else.
    zeros: usize,
    begun: bool,
}

impl PieceHash {
    fn update(&mut self, bytes: &[u8]) {
        if !self.begun {
            if is_zero(bytes) {
                self.zeros += bytes.len();
                return;
            }
            self.begun = true;
            const ZEROS: [u8; 4096] = [0; 4096];
            let mut left = self.zeros;
            while left > 0 {
                let count = left.min(ZEROS.len());
                self.hash.update(&ZEROS[..count]);
                left -= count;
            }
        }
        self.hash.update(bytes);
    }

    fn finish(&self) -> [u8; 32] {
        if self.begun { *self.hash.finalize().as_bytes() } else { [0; 32] }
    }
}

fn digest(block: &[u8]) -> [u8; 32] {
    if is_zero(block) { [0; 32] } else { *blake3::hash(block).as_bytes() }
}
