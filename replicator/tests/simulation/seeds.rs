//! Seeds: each is one run, the same run every time.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

/// Seeds of a test: `SECONDSITE_SEED` runs a single one, `SECONDSITE_LONG` ten times as many,
/// `SECONDSITE_SEEDS` as many as it says.
pub fn seeds(count: u64) -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    if let Some(seed) = number("SECONDSITE_SEED") {
        return vec![seed];
    }
    let long = std::env::var("SECONDSITE_LONG").is_ok_and(|long| !long.is_empty());
    let count = number("SECONDSITE_SEEDS").unwrap_or(if long { 10 * count } else { count });
    (0..count).collect()
}

/// Runs every seed, on two threads, each seed on one of them; prints the seed that fails.
pub fn each(count: u64, run: impl Fn(u64) + Sync) {
    let seeds = seeds(count);
    let next = AtomicU64::new(0);
    let work = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed) as usize;
            let Some(seed) = seeds.get(at) else { return };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| run(*seed))) {
                eprintln!("seed {seed} failed: SECONDSITE_SEED={seed} repeats it");
                next.store(seeds.len() as u64, Ordering::Relaxed);
                resume_unwind(payload);
            }
        }
    };
    std::thread::scope(|scope| {
        let threads = [scope.spawn(work), scope.spawn(work)];
        for thread in threads {
            if let Err(payload) = thread.join() {
                resume_unwind(payload);
            }
        }
    });
}
