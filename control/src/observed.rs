//! What control shows of itself to its own process: that it goes round, and what it has answered.
//!
//! Counters only rise; all accesses are relaxed, since nothing else is read by them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The loop that accepts connections goes round at least so often.
pub const ROUND: Duration = Duration::from_secs(1);
/// Classes of answers: from 1xx to 5xx.
const CLASSES: usize = 5;

/// See the module.
#[derive(Debug, Default)]
pub struct Observed {
    rounds: AtomicU64,
    answers: [AtomicU64; CLASSES],
}

impl Observed {
    /// How often the loop that accepts connections has gone round.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// Answers so far by class: `1xx` to `5xx`.
    pub fn answers(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        (1..).zip(self.answers.iter().map(|count| count.load(Ordering::Relaxed)))
    }

    pub(crate) fn round(&self) {
        self.rounds.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn answered(&self, status: u16) {
        let class = usize::from(status / 100).clamp(1, CLASSES) - 1;
        self.answers[class].fetch_add(1, Ordering::Relaxed);
    }
}
