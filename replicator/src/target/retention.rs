//! Which recovery points of a server are kept.
//!
//! Pure. Ages are told by a clock of the target's own that counts the time for which it has run:
//! no wall clock that jumps and no agent can make a point old. While the target is down no point
//! ages.
//!
//! Invariant: a point that is kept at one time was kept at every time before, unless its rank
//! rose; so a choice made a while ago never drops what a newer one keeps.

use secondsite_control::api::KeepPolicy;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Counts the seconds for which the target has run, over restarts.
#[derive(Debug)]
pub struct RetentionClock {
    /// Seconds counted before `since`.
    before_s: AtomicU64,
    since: Option<Instant>,
    /// Seconds that are counted for each.
    rate: u64,
}

impl Default for RetentionClock {
    fn default() -> Self {
        Self::faster(1)
    }
}

impl RetentionClock {
    /// One that stands still unless it is moved, for simulation.
    pub fn standing() -> Self {
        Self { before_s: AtomicU64::new(0), since: None, rate: 1 }
    }

    /// One that counts so many seconds for each, for tests.
    pub fn faster(rate: u64) -> Self {
        Self { before_s: AtomicU64::new(0), since: Some(Instant::now()), rate }
    }

    /// Goes on from what a run before this one had counted.
    pub fn resume(&self, newest_s: u64) {
        // Relaxed: nothing else is published by it.
        self.before_s.fetch_max(newest_s.saturating_sub(self.running_s()), Ordering::Relaxed);
    }

    /// Moves a standing one.
    pub fn advance(&self, seconds: u64) {
        self.before_s.fetch_add(seconds, Ordering::Relaxed);
    }

    /// Seconds counted so far.
    pub fn now_s(&self) -> u64 {
        self.before_s.load(Ordering::Relaxed) + self.running_s()
    }

    fn running_s(&self) -> u64 {
        self.since.map_or(0, |since| {
            (since.elapsed().as_millis() as u64).saturating_mul(self.rate) / 1000
        })
    }
}

/// One point per so long, up to the first span.
const FINE_EVERY_S: u64 = 5 * 60;
/// One point per so long, up to the second span.
const COARSE_EVERY_S: u64 = 60 * 60;
/// Every point for so long.
const ALL_S: u64 = 60 * 60;

/// A point, as far as this choice goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// When it was committed, by the retention clock, seconds.
    pub stamp_s: u64,
    /// The higher one of a span stays: booted before exact before fuzzy.
    pub rank: u8,
    /// Pinned, named or open: it stays.
    pub held: bool,
}

/// Which of `points`, oldest first, are kept at `now_s`. The newest always is, and so is the newest
/// of the highest rank among exact ones (rank above 0).
pub fn kept(points: &[Candidate], policy: &KeepPolicy, now_s: u64) -> Vec<bool> {
    let mut keep: Vec<bool> = points.iter().map(|point| point.held).collect();
    // (which of the tiers, number of its span) and the best point of it so far.
    let mut best: Option<((u8, u64), usize)> = None;
    for (i, point) in points.iter().enumerate() {
        let age = now_s.saturating_sub(point.stamp_s);
        let span = if age <= ALL_S.min(policy.fine_seconds) {
            keep[i] = true;
            continue;
        } else if age <= policy.fine_seconds {
            (1, point.stamp_s / FINE_EVERY_S)
        } else if age <= policy.coarse_seconds {
            (2, point.stamp_s / COARSE_EVERY_S)
        } else {
            continue;
        };
        match &mut best {
            Some((known, at)) if *known == span => {
                // The earliest of the highest rank: a later one of the same changes nothing.
                if point.rank > points[*at].rank {
                    *at = i;
                }
            }
            _ => {
                if let Some((_, at)) = best.replace((span, i)) {
                    keep[at] = true;
                }
            }
        }
    }
    if let Some((_, at)) = best {
        keep[at] = true;
    }
    if let Some(newest) = keep.last_mut() {
        *newest = true;
    }
    if let Some(exact) = points.iter().rposition(|point| point.rank > 0) {
        keep[exact] = true;
    }
    keep
}
