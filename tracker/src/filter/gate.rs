//! What every write of a filtered volume passes: one gate a volume, one lane a queue.
//!
//! **The cut.** A write is let through under the lock of its lane: its mark, and its place among
//! the writes in flight, are made there. A cut takes the locks of all lanes of all its volumes and
//! flips with one store: every write was let through either before it, or after it. An application
//! that was told of a write (or that read it) before it issued another one cannot have the second
//! before the flip and the first after it. So what is before the flip is a prefix of the write
//! order, over all volumes, and nothing has to be held; a lane waits at most for that store. There
//! is no half of a flip that a kill could leave behind.
//!
//! **The epoch** is what the cut layer held at the flip, once the writes from before it are done.
//! A write that comes later and meets a block of the cut layer has it preserved first
//! ([`super::keeper`]). It waits for copies, which wait for nothing, and for writes from before the
//! flip, which wait for nothing.
//!
//! **Marks.** Before a write is submitted, and again when it is done: a pass between the two may
//! have taken the first one, and read what was there before. Both are idempotent, as is preserving:
//! a write that a dead filter had submitted may be issued once more.

use crate::filter::keeper::{Keeper, Verdict};
use crate::filter::shared::{DEPTH_MAX, Group, LANES_MAX, Shared};
use crate::marks::BlockRun;
use std::ops::Range;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};

/// Lanes of all volumes of a group at most.
pub const GROUP_LANES_MAX: usize = 512;

/// Copies of one volume under way at once.
pub const COPIES_MAX: usize = 128;

/// Whether a write may be submitted now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It is marked: submit it.
    Go,
    /// Ask again when its lane is woken.
    Wait,
}

/// A copy that must be made before a write goes down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preserve {
    /// Where on the backing device, bytes.
    pub offset: u64,
    /// How many bytes.
    pub bytes: u32,
    /// The first slot that it goes to; the others follow.
    pub slot: u32,
    pub(super) flip: u64,
    pub(super) run: BlockRun,
}

/// Lanes with requests that are to be tried again: bit n is lane n.
pub type Wake = u64;

/// Known mistakes, for the tests that must notice them.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bug {
    /// After a flip the first writes of every second volume count as if they had come before it.
    FlipApart,
    /// A block with an earlier write in flight is read, or preserved, at once.
    ReadInFlight,
    /// Nothing is preserved.
    NoPreserve,
    /// No mark when a write is done.
    NoSecondMark,
    /// Writes in flight at the flip are not marked for it.
    NoMarkAtFlip,
    /// Nor those in flight when a filter died.
    ForgetInFlight,
}

impl Bug {
    /// By its name.
    pub fn named(name: &str) -> Option<Self> {
        let all = [
            Self::FlipApart,
            Self::ReadInFlight,
            Self::NoPreserve,
            Self::NoSecondMark,
            Self::NoMarkAtFlip,
            Self::ForgetInFlight,
        ];
        all.into_iter().find(|bug| format!("{bug:?}") == name)
    }
}

/// A write in flight.
#[derive(Clone, Copy)]
struct InFlight {
    run: BlockRun,
    sectors: u64,
    /// The newest flip when it was let through.
    flip: u64,
}

struct Lane {
    in_flight: Vec<Option<InFlight>>,
}

/// The gate of one volume.
pub struct Gate {
    shared: Arc<Shared>,
    lanes: Vec<Mutex<Lane>>,
    keeper: Mutex<Keeper>,
    bug: Option<Bug>,
    /// With [`Bug::FlipApart`]: writes that are yet to be taken for older ones.
    late: AtomicU32,
}

/// Writes that [`Bug::FlipApart`] takes for older ones.
const LATE: u32 = 40;

/// Why there is no cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotCut {
    /// What an earlier cut holds is not settled.
    #[error("what the cut before holds is neither committed nor given up")]
    Unsettled,
    /// Copies for an earlier cut are under way: soon.
    #[error("copies for the cut before are still under way")]
    Busy,
}

impl Gate {
    /// Over what is shared. [`Self::take_over`] comes before the first write.
    ///
    /// # Panics
    /// If there are more lanes than [`LANES_MAX`], or more tags than [`DEPTH_MAX`].
    pub fn new(shared: Arc<Shared>, lanes: usize, depth: usize) -> Self {
        Self::with_bug(shared, lanes, depth, None)
    }

    /// As [`Self::new`].
    #[doc(hidden)]
    pub fn with_bug(shared: Arc<Shared>, lanes: usize, depth: usize, bug: Option<Bug>) -> Self {
        assert!(lanes <= LANES_MAX && depth <= DEPTH_MAX);
        let lane = || Mutex::new(Lane { in_flight: vec![None; depth] });
        Self {
            lanes: (0..lanes).map(|_| lane()).collect(),
            keeper: Mutex::new(Keeper::new(lanes * depth)),
            shared,
            bug,
            late: AtomicU32::new(0),
        }
    }

    /// Takes over what a filter that died may have left: nothing that it had submitted is on its
    /// way any more, and what was not acknowledged will be issued again.
    pub fn take_over(&self) {
        let shared = &self.shared;
        shared.free_under_way();
        if self.bug != Some(Bug::ForgetInFlight) {
            shared.mark_in_flight();
        }
        // A flip that it had made ready for was not made, and the next of that number may be
        // without this volume.
        match shared.turn().flipped() {
            0 => shared.turn().wait_no_more(),
            flip => shared.set_settled(flip),
        }
    }

    /// Where a memory slot lies.
    pub fn slot(&self, slot: u32) -> *mut u8 {
        self.shared.slot(slot)
    }

    /// Slots from here on lie on the reserve.
    pub fn memory_slots(&self) -> u32 {
        self.shared.form().memory_slots
    }

    /// Where a slot beyond memory lies on the reserve, bytes.
    pub fn spill_offset(&self, slot: u32) -> u64 {
        let offset = self.shared.spill_offset(slot).expect("a slot beyond memory");
        self.shared.spill_start() + offset
    }

    /// The shared memory.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// A write, discard or write-zeroes of these bytes arrived, or is tried again. `out` gets
    /// copies that this lane makes now, whatever the answer; [`Self::preserved`] follows each.
    pub fn admit(
        &self,
        lane: usize,
        tag: u16,
        bytes: Range<u64>,
        out: &mut Vec<Preserve>,
    ) -> Admission {
        let run = self.run(&bytes);
        let marks = self.shared.marks();
        let mut in_lane = lock(&self.lanes[lane]);
        let flip = self.shared.turn().flipped();
        // Also if it has to wait: a block that was preserved is in no bitmap but by this mark.
        marks.mark(run);
        if self.bug == Some(Bug::FlipApart) && self.late.load(Relaxed) > 0 {
            self.late.fetch_sub(1, Relaxed);
            marks.mark_cut(run);
        } else if flip != 0
            && self.bug != Some(Bug::NoPreserve)
            && marks.cut_holds(run)
            && !self.shared.is_fallen(flip)
        {
            let verdict = lock(&self.keeper).want(&self.shared, flip, run, lane, out);
            if let Verdict::Wait = verdict {
                return Admission::Wait;
            }
        }
        let sectors = (bytes.end - bytes.start) >> 9;
        self.shared.note(lane, tag, run);
        self.shared.count(lane, sectors, 0);
        in_lane.in_flight[usize::from(tag)] = Some(InFlight { run, sectors, flip });
        Admission::Go
    }

    /// A write that was let through is done, with whatever result: before it is acknowledged.
    pub fn completed(&self, lane: usize, tag: u16) -> Wake {
        let mut in_lane = lock(&self.lanes[lane]);
        let Some(write) = in_lane.in_flight[usize::from(tag)].take() else { return 0 };
        if self.bug != Some(Bug::NoSecondMark) {
            self.shared.marks().mark(write.run);
        }
        self.shared.forget(lane, tag);
        self.shared.count(lane, 0, write.sectors);
        let flip = self.shared.turn().flipped();
        if write.flip == flip {
            return 0;
        }
        let mut keeper = lock(&self.keeper);
        let wake = keeper.old_done(write.run);
        if flip != 0 && keeper.is_settled() {
            self.shared.set_settled(flip);
        }
        wake
    }

    /// A copy has ended: all of it lies in its slots, or not.
    pub fn preserved(&self, copy: &Preserve, ok: bool) -> Wake {
        // Under the lock of the keeper, as is the flip: the layer cannot change its role meanwhile.
        let mut keeper = lock(&self.keeper);
        keeper.preserved(&self.shared, copy, ok, self.shared.turn().flipped())
    }

    /// Makes ready for the next flip. Nothing is held yet.
    fn prepare(&self, group: &Group) -> Result<(), NotCut> {
        let keeper = lock(&self.keeper);
        if !self.shared.marks().cut_is_clear() {
            return Err(NotCut::Unsettled);
        }
        if !keeper.is_idle() {
            return Err(NotCut::Busy);
        }
        self.shared.free_all();
        self.shared.turn().wait_for(group.flips() + 1);
        Ok(())
    }

    /// Cuts these volumes: one store under the locks of all lanes. Returns the number of the flip.
    /// One caller at a time.
    ///
    /// # Panics
    /// If they have more than [`GROUP_LANES_MAX`] lanes.
    pub fn cut<'a>(
        group: &Group,
        gates: impl Iterator<Item = &'a Gate> + Clone,
    ) -> Result<u64, NotCut> {
        for (ready, gate) in gates.clone().enumerate() {
            if let Err(why) = gate.prepare(group) {
                gates.take(ready).for_each(|gate| gate.shared.turn().wait_no_more());
                return Err(why);
            }
        }
        Ok(Self::flip(group, gates))
    }

    fn flip<'a>(group: &Group, gates: impl Iterator<Item = &'a Gate> + Clone) -> u64 {
        let flip = group.flips() + 1;
        let mut lanes: [Option<MutexGuard<'_, Lane>>; GROUP_LANES_MAX] = [const { None }; _];
        let all = gates.clone().flat_map(|gate| &gate.lanes);
        let mut places = lanes.iter_mut();
        for lane in all {
            *places.next().expect("a place a lane") = Some(lock(lane));
        }
        // Lock order: lanes, then keepers.
        let mut held = lanes.iter().flatten();
        for gate in gates.clone() {
            let mut keeper = lock(&gate.keeper);
            let writes = held.by_ref().take(gate.lanes.len());
            let writes = writes.flat_map(|lane| lane.in_flight.iter().flatten());
            let old = writes.map(|write| write.run).inspect(|run| {
                // A pass may have taken its first mark, and read what was there before it; its
                // second one comes after the flip. Somebody may have read it, and gone on.
                if gate.bug != Some(Bug::NoMarkAtFlip) {
                    gate.shared.marks().mark(*run);
                }
            });
            keeper.begin(old.filter(|_| gate.bug != Some(Bug::ReadInFlight)));
        }
        group.word()[0].store(flip, SeqCst);
        for (number, gate) in gates.enumerate() {
            if gate.bug == Some(Bug::FlipApart) && number % 2 == 1 {
                gate.late.store(LATE, Relaxed);
            }
            if lock(&gate.keeper).is_settled() {
                gate.shared.set_settled(flip);
            }
        }
        flip
    }

    fn run(&self, bytes: &Range<u64>) -> BlockRun {
        let block = u64::from(self.shared.form().block_bytes);
        let first = bytes.start / block;
        BlockRun { first, count: bytes.end.div_ceil(block).max(first + 1) - first }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic ends the filter, and the next one begins with what is shared.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
