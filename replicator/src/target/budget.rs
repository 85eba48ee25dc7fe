//! One memory budget for all frames on their way through the target.
//!
//! A session asks before it takes memory for a body, holds what it got until the frame is in the
//! journal, and holds no lock while it waits. A request above the whole budget is granted when
//! nothing else is held, so that a small budget slows down but never blocks for good.

use crate::pulse;
use std::sync::{Condvar, Mutex};

/// See the module.
pub struct Budget {
    bytes_max: u64,
    held: Mutex<u64>,
    released: Condvar,
}

/// Memory granted; given back when dropped.
pub struct Grant<'a> {
    budget: &'a Budget,
    bytes: u64,
}

impl Budget {
    /// `bytes_max` in all.
    pub fn new(bytes_max: u64) -> Self {
        Self { bytes_max, held: Mutex::new(0), released: Condvar::new() }
    }

    /// All of it and what is held, bytes.
    pub fn state(&self) -> (u64, u64) {
        let held = self.held.lock().expect("nothing panics while it holds the budget");
        (self.bytes_max, *held)
    }

    /// Waits for `bytes`.
    pub fn take(&self, bytes: u64) -> Grant<'_> {
        let held = self.held.lock().expect("nothing panics while it holds the budget");
        let room = |held: &mut u64| *held > 0 && *held + bytes > self.bytes_max;
        // Others hold it until their peers or the disk are done.
        let mut held = pulse::outside(|| self.released.wait_while(held, room))
            .expect("nothing panics while it holds the budget");
        *held += bytes;
        Grant { budget: self, bytes }
    }
}

impl Drop for Grant<'_> {
    fn drop(&mut self) {
        let mut held = self.budget.held.lock().expect("nothing panics while it holds the budget");
        *held -= self.bytes;
        self.budget.released.notify_all();
    }
}
