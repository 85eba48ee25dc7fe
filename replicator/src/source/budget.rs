//! How much of the time file systems may be frozen. Pure.

use std::time::Duration;

/// A freeze of 200 ms allows the next one 20 s later: 1 % of the time.
const SHARE: u32 = 100;

/// Says when the next freeze is allowed.
#[derive(Debug, Default)]
pub struct FreezeBudget {
    allowed_at: Duration,
}

impl FreezeBudget {
    /// How long from `now` no freeze is allowed.
    pub fn wait(&self, now: Duration) -> Duration {
        self.allowed_at.saturating_sub(now)
    }

    /// A freeze that ended at `now` took this long.
    pub fn spent(&mut self, now: Duration, took: Duration) {
        self.allowed_at = now + took * (SHARE - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::{Duration, FreezeBudget};

    #[test]
    fn a_freeze_of_200_ms_allows_one_in_20_s() {
        let mut budget = FreezeBudget::default();
        assert_eq!(budget.wait(Duration::ZERO), Duration::ZERO);
        let (start, took) = (Duration::from_secs(100), Duration::from_millis(200));
        budget.spent(start + took, took);
        assert_eq!(budget.wait(start), Duration::from_secs(20));
    }
}
