//! Copies that a queue makes before a write may overwrite what a cut still needs.
//!
//! Each is read from the backing device straight into its slots of the shared area, or, where the
//! slots lie on the reserve, through a bounce buffer. Nothing is allocated after the start; the
//! copies beyond those under way wait in order.

use super::memory::Mapping;
use crate::filter::gate::{Gate, Preserve, Wake};
use io_uring::{opcode, squeue, types};
use std::collections::VecDeque;
use std::io;

/// Copies under way at once, for a queue.
pub(super) const COPIES: usize = 32;
/// Of these, through the reserve.
const BOUNCES: usize = 4;
/// What one of those moves at a time.
const BOUNCE_BYTES: usize = 256 << 10;

enum Step {
    Read,
    /// Into a bounce buffer, or out of it.
    BounceRead(usize),
    BounceWrite(usize),
}

struct Copy {
    what: Preserve,
    /// Bytes of it that are in the area.
    done: u32,
    /// Bytes of the piece in the bounce buffer, and how many of them are written.
    piece: u32,
    written: u32,
    step: Step,
}

/// The copies of one queue.
pub(super) struct Copies {
    waiting: VecDeque<Preserve>,
    under_way: [Option<Copy>; COPIES],
    bounces: Option<Mapping>,
    free_bounces: Vec<usize>,
    backing: types::Fixed,
    reserve: types::Fixed,
}

impl Copies {
    /// Room for as many as `waiting_max` that wait.
    pub fn new(
        waiting_max: usize,
        backing: types::Fixed,
        reserve: types::Fixed,
        has_reserve: bool,
    ) -> io::Result<Self> {
        let bounces =
            if has_reserve { Some(Mapping::anonymous(BOUNCES * BOUNCE_BYTES)?) } else { None };
        Ok(Self {
            waiting: VecDeque::with_capacity(waiting_max),
            under_way: [const { None }; COPIES],
            bounces,
            free_bounces: (0..BOUNCES).collect(),
            backing,
            reserve,
        })
    }

    /// One more to make.
    pub fn add(&mut self, what: Preserve) {
        self.waiting.push_back(what);
    }

    /// The next one that can begin: its place, and what to submit.
    pub fn begin(&mut self, gate: &Gate) -> Option<(usize, squeue::Entry)> {
        let what = *self.waiting.front()?;
        let index = self.under_way.iter().position(Option::is_none)?;
        let step = if what.slot < gate.memory_slots() {
            Step::Read
        } else {
            Step::BounceRead(self.free_bounces.pop()?)
        };
        self.waiting.pop_front();
        self.under_way[index] = Some(Copy { what, done: 0, piece: 0, written: 0, step });
        Some((index, self.entry(index, gate)))
    }

    fn entry(&mut self, index: usize, gate: &Gate) -> squeue::Entry {
        let copy = self.under_way[index].as_mut().expect("under way");
        let (left, from) = (copy.what.bytes - copy.done, copy.what.offset + u64::from(copy.done));
        match copy.step {
            Step::Read => {
                // SAFETY: the slots of this copy are contiguous and hold all its bytes; they are
                // this copy's alone until it is reported.
                let to = unsafe { gate.slot(copy.what.slot).add(copy.done as usize) };
                opcode::Read::new(self.backing, to, left).offset(from).build()
            }
            Step::BounceRead(bounce) => {
                let bounces = self.bounces.as_ref().expect("spilled slots mean a reserve");
                let bytes = left.min(BOUNCE_BYTES as u32) - copy.piece;
                let to = bounces.at(bounce * BOUNCE_BYTES + copy.piece as usize);
                opcode::Read::new(self.backing, to, bytes)
                    .offset(from + u64::from(copy.piece))
                    .build()
            }
            Step::BounceWrite(bounce) => {
                let bounces = self.bounces.as_ref().expect("spilled slots mean a reserve");
                let at = u64::from(copy.done) + u64::from(copy.written);
                let data = bounces.at(bounce * BOUNCE_BYTES + copy.written as usize);
                opcode::Write::new(self.reserve, data, copy.piece - copy.written)
                    .offset(gate.spill_offset(copy.what.slot) + at)
                    .build()
            }
        }
    }

    /// A step of it has ended with `result`: what to submit next, or, when it is over, whom that
    /// wakes.
    pub fn went_on(
        &mut self,
        index: usize,
        result: i32,
        gate: &Gate,
    ) -> Result<squeue::Entry, Wake> {
        let copy = self.under_way[index].as_mut().expect("under way");
        let bytes = match result {
            1.. => result.unsigned_abs(),
            _ if result == -libc::EINTR || result == -libc::EAGAIN => 0,
            // An error, or the end of the device where there must be more.
            _ => {
                if let Step::BounceWrite(_) = copy.step {
                    gate.shared().reserve_failed();
                }
                return Err(self.end(index, false, gate));
            }
        };
        let total = copy.what.bytes;
        match copy.step {
            Step::Read => copy.done += bytes,
            Step::BounceRead(bounce) => {
                copy.piece += bytes;
                if copy.piece == (total - copy.done).min(BOUNCE_BYTES as u32) {
                    copy.step = Step::BounceWrite(bounce);
                }
            }
            Step::BounceWrite(bounce) => {
                copy.written += bytes;
                if copy.written == copy.piece {
                    copy.done += copy.piece;
                    (copy.piece, copy.written) = (0, 0);
                    copy.step = Step::BounceRead(bounce);
                }
            }
        }
        if copy.done == total {
            Err(self.end(index, true, gate))
        } else {
            Ok(self.entry(index, gate))
        }
    }

    fn end(&mut self, index: usize, ok: bool, gate: &Gate) -> Wake {
        let copy = self.under_way[index].take().expect("under way");
        if let Step::BounceRead(bounce) | Step::BounceWrite(bounce) = copy.step {
            self.free_bounces.push(bounce);
        }
        gate.preserved(&copy.what, ok)
    }
}
