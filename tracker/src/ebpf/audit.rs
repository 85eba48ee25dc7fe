//! Compares what the programs saw with what the kernel counted.
//!
//! Only differences count. For each copy of the programs: sectors that the kernel completed less
//! those it saw completing, sectors it saw queued less those completing, and how often it was
//! skipped or in doubt. The baseline holds them from a moment with nothing in flight; if one copy
//! has them again, it missed nothing since, and nothing is on its way. The instant of such a
//! reading is what a proof rests on: *first* the audit of every volume, *then* the scan of every
//! live bitmap. A write that was on its way while blocks were read is then still uncounted (busy)
//! or had been marked before it was counted, and the scan finds it. The other way round proves
//! nothing.
//!
//! A completion may have been missed for good: on some kernels no program runs on top of certain
//! threads, and nothing counts that. What was issued is remembered until it is seen to complete, so
//! with nothing in flight what is still remembered is what was missed: it is marked, then counted,
//! as the program would have done. Only what that does not make up for in full is a gap.
//!
//! Discards and zeroes of zram are held against what was queued only: its driver does not count
//! them.

use super::pins::{COPIES, COUNTERS, PROGRAMS_PER_COPY, SLOT_WORDS};
use super::{Audit, Ebpf, EbpfError};
use crate::header::AUDIT_WORDS;
use crate::marks::BlockRun;
use std::io;
use std::sync::PoisonError;
use std::sync::atomic::Ordering::{Acquire, SeqCst};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Readings that must agree before a difference is called a gap, and the pause between them: longer
/// than a completion can be preempted between the program and the kernel's own count.
const LOOKS: usize = 6;
const LOOK_PAUSE: Duration = Duration::from_millis(20);
/// How long writes may seem to wait, with nothing in flight and nothing moving, before it is a gap.
const STUCK: Duration = Duration::from_secs(10);
/// How long a quiet moment is waited for when a baseline is taken.
const BASELINE_WAIT: Duration = Duration::from_secs(2);
/// After so long without one, a request-based disk is measured while it works.
const BASELINE_BUSY_WAIT: Duration = Duration::from_millis(150);
const BASELINE_PAUSE: Duration = Duration::from_millis(3);

/// As in the BPF source: places of counters, and operations of the kernel.
const DONE: usize = 2;
const DONE_DISCARD: usize = 3;
const OP_DISCARD: u64 = 3;
const OP_WRITE_ZEROES: u64 = 9;
/// Words of one copy in the baseline.
const WORDS: usize = AUDIT_WORDS / COPIES;
/// Kernel's sectors less completed ones: writes, discards.
const KERNEL: [usize; 2] = [0, 1];
/// Queued sectors less completed ones: writes, discards.
const QUEUE: [usize; 2] = [2, 3];
const MISSES: usize = 4;
const OPAQUE: usize = 5;
const RANGES: usize = 6;
const STASH: usize = 7;
/// Stands for a queue difference that could not be known yet, since writes never paused.
const UNKNOWN: u64 = 1 << 63;

/// The differences of one copy.
type Offsets = [u64; WORDS];

/// A difference with nothing in flight, and since when.
pub(super) type Stuck = (Reading, Instant);

/// One bracketed reading: nothing completed while it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reading {
    copies: [Offsets; COPIES],
    /// Grows with every event; two equal readings mean that nothing moved between them.
    moved: u64,
    in_flight: u64,
}

/// What a reading says of the whole.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Good,
    /// Some completions are not accounted for now; a gap if that lasts.
    Missing(String),
    /// Writes wait somewhere; a gap if nothing moves for long.
    Waiting(String),
    /// Will not go away.
    Doubt(String),
}

impl Verdict {
    fn rank(&self) -> u8 {
        match self {
            Self::Good => 0,
            Self::Waiting(_) => 1,
            Self::Missing(_) => 2,
            Self::Doubt(_) => 3,
        }
    }
}

impl Ebpf {
    /// Compares once, bracketed; a difference is looked at again before it is called a gap. Good
    /// also says that no write was on its way: ask before the live bitmap is scanned for a proof,
    /// not after. Does not allocate, wait or write anything but the header's baseline unless
    /// something is wrong.
    pub fn audit(&self) -> Audit {
        match self.try_audit() {
            Ok(Audit::Busy) => Audit::Busy,
            // Looked at after the reading: a volume that still has its size had it at the instant
            // of the reading, too. One that has not is no gap: every write to the blocks that are
            // followed was marked, and a real gap shows again when it is attached anew.
            Ok(_) if self.has_another_size() => Audit::Resized,
            Ok(audit) => audit,
            Err(cause) => Audit::Gap(format!(
                "{}: the kernel's counters cannot be read (is the device gone?): {cause}",
                self.device.path.display()
            )),
        }
    }

    /// Takes the present as the new starting point of the audit, after a gap; the caller sets
    /// `compare_due` first and compares after. Waits for a quiet moment, at most some seconds. A
    /// request-based disk that never pauses is measured while it works, and its audit says `Busy`
    /// until a quiet moment came; a bio-based one that never pauses is an error: try again.
    pub fn rebase(&self) -> Result<(), EbpfError> {
        let fails = |cause: String| EbpfError {
            device: self.device.path.clone(),
            what: "take a starting point for the audit",
            cause,
            shrunk_from: None,
        };
        let start = Instant::now();
        let (mut last, mut best) = (None, None::<[Offsets; COPIES]>);
        while start.elapsed() < BASELINE_WAIT {
            if let Some(now) = self.read().map_err(|cause| fails(cause.to_string()))? {
                if now.in_flight == 0 && last == Some(now) {
                    // What completed unseen would else be counted later.
                    if self.settle_slots() {
                        last = None;
                        continue;
                    }
                    self.set_baseline(now.copies);
                    return Ok(());
                }
                let merged = best.map_or(now.copies, |best| most_complete(best, now.copies));
                best = Some(merged);
                last = Some(now);
            }
            let may_measure = start.elapsed() > BASELINE_BUSY_WAIT && !self.bio_based;
            if let (true, Some(mut offsets)) = (may_measure, best) {
                for copy in &mut offsets {
                    copy[QUEUE[0]] = UNKNOWN;
                    copy[QUEUE[1]] = UNKNOWN;
                }
                self.set_baseline(offsets);
                return Ok(());
            }
            sleep(BASELINE_PAUSE);
        }
        Err(fails("writes never paused: try again when there are fewer".into()))
    }

    fn has_another_size(&self) -> bool {
        // Unknown is no change: what cannot be read is a gap of its own.
        self.kernel.size_sectors().is_ok_and(|now| now != self.device.size_bytes >> 9)
    }

    fn try_audit(&self) -> io::Result<Audit> {
        if self.kernel.diskseq()? != self.device.diskseq {
            return Ok(Audit::Gap("another disk has its number now".into()));
        }
        // Bio-based drivers count, or not, by themselves: a difference says so.
        if !self.bio_based && !self.kernel.is_counting()? {
            return Ok(Audit::Gap(
                "the kernel does not count its writes: set queue/iostats to 1".into(),
            ));
        }
        let Some(baseline) = self.header().baseline() else {
            return Ok(Audit::Gap("there is no starting point yet: writes never paused".into()));
        };
        let mut last = None;
        for look in 0..LOOKS {
            let Some(now) = self.read()? else { return Ok(Audit::Busy) };
            let Some(verdict) = self.judge(&baseline, &now) else { return Ok(Audit::Busy) };
            match verdict {
                Verdict::Good => {
                    self.set_unequal(None);
                    self.renew(&baseline, &now);
                    return Ok(Audit::Good);
                }
                Verdict::Doubt(text) => return Ok(Audit::Gap(text)),
                _ if now.in_flight > 0 || last.is_some_and(|last| last != now) => {
                    self.set_unequal(None);
                    return Ok(Audit::Busy);
                }
                Verdict::Waiting(text) => return Ok(self.waits(now, text)),
                // Seen equal, with nothing in flight, a pause apart.
                Verdict::Missing(_) if last == Some(now) && self.settle_slots() => {
                    last = None;
                    continue;
                }
                Verdict::Missing(text) if look + 1 == LOOKS => return Ok(Audit::Gap(text)),
                Verdict::Missing(_) => last = Some(now),
            }
            sleep(LOOK_PAUSE);
        }
        Ok(Audit::Busy)
    }

    /// The best that any copy says. None: not to be known before a quiet moment.
    fn judge(&self, baseline: &[u64; AUDIT_WORDS], now: &Reading) -> Option<Verdict> {
        let was = |copy: usize| -> &Offsets { baseline.as_chunks().0.get(copy).expect("a copy") };
        let says = |copy: usize| compare(was(copy), &now.copies[copy]);
        // What any copy saw of these is a fact, whatever the others saw.
        let saw = |copy: &usize| {
            [OPAQUE, RANGES].iter().any(|at| was(*copy)[*at] != now.copies[*copy][*at])
        };
        if let Some(copy) = (0..COPIES).find(saw) {
            return Some(says(copy));
        }
        let best = (0..COPIES).map(says).min_by_key(Verdict::rank).expect("there are copies");
        let unknown = was(0)[QUEUE[0]] == UNKNOWN;
        (best != Verdict::Good || !unknown || self.settle(now)).then_some(best)
    }

    /// With nothing in flight, twice: what was queued has completed.
    fn settle(&self, now: &Reading) -> bool {
        if now.in_flight > 0 {
            return false;
        }
        sleep(BASELINE_PAUSE);
        self.read().is_ok_and(|again| again == Some(*now))
    }

    /// Marks and counts what was issued and not seen to complete: as settle() of the programs, which
    /// may be at it, too; who takes it out of the slot counts it. If a request of now is taken for
    /// one that was missed, more is seen completing than the kernel counts: a gap in the end. False
    /// if there was none.
    fn settle_slots(&self) -> bool {
        let mut settled = false;
        let per_block = u64::from(self.block_bytes >> 9);
        let blocks = self.marks.blocks();
        let first_sector = self.device.disk_offset_bytes >> 9;
        for slot in self.slots.chunks_exact(SLOT_WORDS) {
            for (copy, left) in slot[2..].iter().enumerate() {
                let sectors = left.load(Acquire);
                if sectors == 0 {
                    continue;
                }
                let (sector, shape) = (slot[0].load(Acquire), slot[1].load(Acquire));
                let (bytes, op) = (shape & u64::from(u32::MAX), shape >> 32);
                // The order of the programs: out of the slot, marked, counted.
                if left.compare_exchange(sectors, 0, SeqCst, Acquire).is_err() {
                    continue;
                }
                let end = (sector + bytes.div_ceil(512)).saturating_sub(first_sector);
                let first = sector.saturating_sub(first_sector) / per_block;
                let end = end.div_ceil(per_block).min(blocks);
                if first < end {
                    self.marks.mark(BlockRun { first, count: end - first });
                }
                let done = if op == OP_DISCARD || (self.uncounted_zeroes && op == OP_WRITE_ZEROES) {
                    DONE_DISCARD
                } else {
                    DONE
                };
                self.counters[copy * COUNTERS + done].fetch_add(sectors, SeqCst);
                settled = true;
            }
        }
        settled
    }

    /// A copy that was skipped missed events, but another one proved that all is well up to now:
    /// from here on both count again.
    fn renew(&self, baseline: &[u64; AUDIT_WORDS], now: &Reading) {
        if now.copies.as_flattened() != baseline {
            self.set_baseline(now.copies);
        }
    }

    fn waits(&self, now: Reading, text: String) -> Audit {
        let mut unequal = self.unequal.lock().unwrap_or_else(PoisonError::into_inner);
        match *unequal {
            Some((then, since)) if then == now => {
                if since.elapsed() > STUCK {
                    Audit::Gap(text)
                } else {
                    Audit::Busy
                }
            }
            _ => {
                *unequal = Some((now, Instant::now()));
                Audit::Busy
            }
        }
    }

    fn set_unequal(&self, stuck: Option<Stuck>) {
        *self.unequal.lock().unwrap_or_else(PoisonError::into_inner) = stuck;
    }

    fn set_baseline(&self, copies: [Offsets; COPIES]) {
        let words = copies.as_flattened().try_into().expect("its length");
        self.header().set_baseline(words);
    }

    /// Reads all counters; None if they moved meanwhile.
    fn read(&self) -> io::Result<Option<Reading>> {
        let before = self.seen();
        let kernel = self.kernel.sectors()?;
        let in_flight = self.kernel.writes_in_flight()?;
        if self.seen() != before {
            return Ok(None);
        }
        let mut copies = [[0; WORDS]; COPIES];
        for (copy, offsets) in copies.iter_mut().enumerate() {
            let [queued, queued_discard, done, done_discard, failed, failed_discard, doubts @ ..] =
                &before[copy];
            let ended = [done.wrapping_add(*failed), done_discard.wrapping_add(*failed_discard)];
            let counted = if self.uncounted_zeroes { *done_discard } else { kernel[1] };
            offsets[KERNEL[0]] = kernel[0].wrapping_sub(*done);
            offsets[KERNEL[1]] = counted.wrapping_sub(*done_discard);
            offsets[QUEUE[0]] = queued.wrapping_sub(ended[0]);
            offsets[QUEUE[1]] = queued_discard.wrapping_sub(ended[1]);
            offsets[OPAQUE..=STASH].copy_from_slice(&doubts[..3]);
            for program in 0..PROGRAMS_PER_COPY {
                let misses = self.kernel.recursion_misses(copy * PROGRAMS_PER_COPY + program)?;
                offsets[MISSES] = offsets[MISSES].wrapping_add(misses);
            }
        }
        let moved = before
            .as_flattened()
            .iter()
            .fold(kernel[0].wrapping_add(kernel[1]), |sum, n| sum.wrapping_add(*n));
        Ok(Some(Reading { copies, moved, in_flight }))
    }

    fn seen(&self) -> [[u64; COUNTERS]; COPIES] {
        std::array::from_fn(|copy| {
            // Partner: the programs' full barrier between a mark and its count. A count that is
            // seen here lets a later scan see the mark.
            std::array::from_fn(|at| self.counters[copy * COUNTERS + at].load(Acquire))
        })
    }
}

/// What the differences of one copy say, against those of the baseline.
fn compare(was: &Offsets, now: &Offsets) -> Verdict {
    let grew = |at: usize| now[at].wrapping_sub(was[at]) as i64;
    let doubts = [
        (OPAQUE, "passthrough writes (SG_IO, NVMe) whose place is unknown"),
        (RANGES, "discards of more ranges than can be followed"),
        (STASH, "writes whose place could not be remembered"),
        (MISSES, "events skipped by the kernel (recursion)"),
    ];
    for (at, text) in doubts {
        if grew(at) != 0 {
            return Verdict::Doubt(format!("{} {text}", grew(at)));
        }
    }
    let kernel = KERNEL.map(grew);
    let queue = QUEUE.map(|at| if was[at] == UNKNOWN { 0 } else { grew(at) });
    if let Some(sectors) = kernel.into_iter().find(|sectors| *sectors > 0) {
        Verdict::Missing(format!("{sectors} sectors completed that the programs did not see"))
    } else if let Some(sectors) = queue.into_iter().find(|sectors| *sectors < 0) {
        Verdict::Missing(format!("{} sectors were not seen when they were queued", -sectors))
    } else if kernel != [0; 2] {
        Verdict::Waiting("more sectors were seen completing than the kernel counts".into())
    } else if queue != [0; 2] {
        Verdict::Waiting(format!("{} queued sectors never completed", queue[0] + queue[1]))
    } else {
        Verdict::Good
    }
}

/// Of two readings of a working disk, the kernel's count in full: the program sees a completion
/// first, so the kernel can only be behind.
fn most_complete(a: [Offsets; COPIES], b: [Offsets; COPIES]) -> [Offsets; COPIES] {
    let mut most = b;
    for (copy, offsets) in most.iter_mut().enumerate() {
        for at in KERNEL {
            if a[copy][at].wrapping_sub(offsets[at]) as i64 > 0 {
                offsets[at] = a[copy][at];
            }
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use super::{KERNEL, MISSES, Offsets, QUEUE, Verdict, WORDS, compare};

    fn differs(at: usize, by: i64) -> Verdict {
        let was: Offsets = [7; WORDS];
        let mut now = was;
        now[at] = now[at].wrapping_add_signed(by);
        compare(&was, &now)
    }

    #[test]
    fn only_equal_is_good() {
        assert_eq!(differs(0, 0), Verdict::Good);
        assert!(matches!(differs(KERNEL[0], 8), Verdict::Missing(_)));
        assert!(matches!(differs(KERNEL[1], 8), Verdict::Missing(_)));
        assert!(matches!(differs(KERNEL[0], -8), Verdict::Waiting(_)));
        assert!(matches!(differs(QUEUE[0], 8), Verdict::Waiting(_)));
        assert!(matches!(differs(QUEUE[1], -8), Verdict::Missing(_)));
        for doubt in MISSES..WORDS {
            assert!(matches!(differs(doubt, 1), Verdict::Doubt(_)));
        }
    }
}
