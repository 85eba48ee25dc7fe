//! How long to wait before the next attempt to connect. Pure; chance comes from the caller.

use std::time::Duration;

/// The first wait, and the longest.
const WAIT_MIN: Duration = Duration::from_millis(250);
const WAIT_MAX: Duration = Duration::from_secs(15);

/// Doubles from attempt to attempt, with jitter, so that a thousand agents do not return at once.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// A session was established.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// An attempt failed: half to all of the doubled wait.
    pub fn next(&mut self, random: &[u8; 16]) -> Duration {
        let whole = WAIT_MIN.saturating_mul(1 << self.failures.min(16)).min(WAIT_MAX);
        self.failures += 1;
        let half = whole / 2;
        half + half.mul_f64(f64::from(random[0]) / 255.0)
    }
}

#[cfg(test)]
mod tests {
    use super::{Backoff, WAIT_MAX};

    #[test]
    fn waits_grow_to_their_cap_and_spread() {
        let mut backoff = Backoff::default();
        let low: Vec<_> = (0..12).map(|_| backoff.next(&[0; 16])).collect();
        assert!(low.windows(2).all(|pair| pair[0] <= pair[1]));
        assert_eq!(low[11], WAIT_MAX / 2);
        assert_eq!(backoff.next(&[255; 16]), WAIT_MAX);
    }
}
