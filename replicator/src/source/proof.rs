//! The last pass of a cut, read wholly into memory, and the proof that the point is exact.
//!
//! Runs in the coordinator's thread, perhaps while file systems are frozen: it reads, and does
//! nothing else; what it needs was allocated before. Who calls it holds every member's bench.

use crate::source::buffers::{BUFFER_BYTES, Memory};
use crate::source::runs::Packer;
use crate::source::seams::{Batch, DiskError};
use crate::source::ship::{mark_all, note_unreadable};
use crate::source::volume::{Bench, Volume, reserve};
use secondsite_format::limits::{BLOCK_BYTES_MIN, UNREADABLE_MAX};
use secondsite_tracker::ebpf::Audit;

/// Most pieces of one buffer, and most runs of one take of a last pass.
const PIECES_MAX: usize = BUFFER_BYTES / BLOCK_BYTES_MIN as usize;
/// Live blocks of excluded ranges that a proof clears away.
const EXCLUDED_TAKE_MAX: u64 = 1 << 14;

/// Why a cut is not proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Doubt {
    /// Writes came, or are in flight; by member.
    Busy(usize),
    /// More is live than the buffers set aside have room for; by member.
    Full(usize),
    /// The tracker missed writes; by member, with the audit's words.
    Gap(usize, String),
    /// The cut of this member no longer stands.
    Fallen(usize),
    /// This member has another size than the one that is followed: its blocks alone are no state
    /// of it.
    Resized(usize),
}

/// Sets aside whatever is free for the last passes of a round's members, which share it: what one
/// of them writes during a cut says nothing of the others.
pub fn set_aside(spare: &mut Vec<Batch>, memory: &Memory) {
    while let Some(buffer) = memory.last.try_take() {
        spare.push(reserve(buffer, PIECES_MAX));
    }
}

/// Allocates what a last pass of this volume needs besides.
pub fn make_ready(volume: &Volume, bench: &mut Bench, memory: &Memory) {
    let blocks = memory.last_count * BUFFER_BYTES / volume.shape.block_bytes as usize;
    bench.held.reserve(memory.last_count);
    bench.runs.reserve(blocks);
    bench.unreadable.reserve(UNREADABLE_MAX);
}

/// Takes what is live, as far as the buffers set aside go, and reads it into them.
pub fn last_pass(
    volume: &Volume,
    bench: &mut Bench,
    spare: &mut Vec<Batch>,
) -> Result<(), DiskError> {
    let Bench { disk, pass, held, unreadable, runs } = bench;
    let marks = volume.marks();
    let room = (spare.len() * BUFFER_BYTES) as u64 / u64::from(volume.shape.block_bytes);
    runs.clear();
    // Under the bench, and only while the cut stands: a giving up cannot come in between.
    if room == 0 || !marks.cut().stands || marks.take(room, runs) == 0 {
        return Ok(());
    }
    *pass += 1;
    if !volume.shape.is_whole() {
        *runs = volume.shape.included(runs);
    }
    let mut packer = Packer::new(&volume.shape, runs);
    disk.urgent(true);
    let mut result = Ok(());
    while result.is_ok()
        && !packer.is_empty()
        && let Some(mut batch) = spare.pop()
    {
        batch.tag = u64::from(*pass);
        packer.fill(&mut batch.pieces);
        batch.unreadable.clear();
        result = disk.submit(batch);
    }
    while result.is_ok() && disk.outstanding() > 0 {
        match disk.wait() {
            Ok(batch) => {
                if !batch.unreadable.is_empty() {
                    note_unreadable(unreadable, batch.unreadable.clone());
                }
                held.push(batch);
            }
            Err(error) => result = Err(error),
        }
    }
    if result.is_err() {
        disk.drain();
        // Taken and not read: the caller gives the epoch up, which would do; this keeps the rule
        // that a block is never only taken.
        mark_all(marks, runs);
    }
    disk.urgent(false);
    result
}

/// Proves, after the last read of any member, that all of them were read as they were at one
/// instant.
///
/// The instant is the first audit. A good audit says that every write completed by then was seen,
/// and that none is in flight: so each has left its completion mark. Every live word is found zero
/// after that: so no block was written since it was read, and none was submitted between the
/// audits of two members, for a write marks when it is queued.
pub fn prove(members: &mut [(&Volume, &mut Bench)]) -> Result<(), Doubt> {
    for (i, (volume, bench)) in members.iter_mut().enumerate() {
        if !volume.marks().cut().stands {
            return Err(Doubt::Fallen(i));
        }
        if !is_clear(volume, bench) {
            return Err(Doubt::Busy(i));
        }
    }
    for (i, (volume, _)) in members.iter().enumerate() {
        match volume.tracker.audit() {
            Audit::Good => {}
            Audit::Busy => return Err(Doubt::Busy(i)),
            Audit::Resized => return Err(Doubt::Resized(i)),
            Audit::Gap(why) => return Err(Doubt::Gap(i, why)),
        }
    }
    match members.iter_mut().position(|(volume, bench)| !is_clear(volume, bench)) {
        Some(i) => Err(Doubt::Busy(i)),
        None => Ok(()),
    }
}

/// Whether nothing but excluded blocks is live.
fn is_clear(volume: &Volume, bench: &mut Bench) -> bool {
    let marks = volume.marks();
    if marks.live_is_clear() {
        return true;
    }
    if volume.shape.is_whole() {
        return false;
    }
    bench.runs.clear();
    marks.take(EXCLUDED_TAKE_MAX, &mut bench.runs);
    let written = volume.shape.included(&bench.runs);
    // Taken without being read: live again before anything else happens, so a later pass reads
    // them. Excluded blocks may be forgotten, they are in no epoch.
    mark_all(marks, &written);
    written.is_empty() && marks.live_is_clear()
}
