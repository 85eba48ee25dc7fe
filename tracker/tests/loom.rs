//! Model checks of marking against taking: every interleaving that the memory model allows.

#![cfg(feature = "loom")]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use secondsite_tracker::bitmap::Bitmaps;
use secondsite_tracker::marks::BlockRun;
use secondsite_tracker::sync::Memory;

const BLOCK: u64 = 3;

fn bitmaps() -> Bitmaps<AtomicU64> {
    let word = || -> Memory<AtomicU64> { Memory::new(vec![AtomicU64::new(0)]) };
    Bitmaps::new(64, word(), word(), word())
}

fn run(first: u64) -> BlockRun {
    BlockRun { first, count: 1 }
}

/// Takes as a pass does: what it holds afterwards is what a read after the take sees.
fn pass(bitmaps: &Bitmaps<AtomicU64>, disk: &AtomicU64, copy: &mut u64) {
    let mut out = Vec::new();
    bitmaps.take(u64::MAX, false, &mut out);
    if out.iter().any(|taken| (taken.first..taken.first + taken.count).contains(&BLOCK)) {
        *copy = disk.load(Relaxed);
    }
}

#[test]
fn a_write_that_was_marked_is_taken_and_its_data_read() {
    loom::model(|| {
        let shared = Arc::new((bitmaps(), AtomicU64::new(0)));
        let writer = loom::thread::spawn({
            let shared = shared.clone();
            move || {
                for data in 1..=2 {
                    shared.1.store(data, Relaxed);
                    shared.0.mark(run(BLOCK));
                }
            }
        });
        let mut copy = 0;
        pass(&shared.0, &shared.1, &mut copy);
        pass(&shared.0, &shared.1, &mut copy);
        writer.join().unwrap();
        // By the summary alone: no bit may stay behind under a cleared one.
        pass(&shared.0, &shared.1, &mut copy);
        assert_eq!(copy, 2, "a write was lost");
        assert!(shared.0.live_is_clear(), "a leaf stayed under a cleared summary bit");
    });
}

#[test]
fn marks_of_neighbours_and_a_bounded_take_lose_nothing() {
    loom::model(|| {
        let shared = Arc::new(bitmaps());
        shared.mark(run(9));
        let writers = [1, 2].map(|block| {
            let shared = shared.clone();
            loom::thread::spawn(move || shared.mark(run(block)))
        });
        let mut out = Vec::new();
        let mut taken = shared.take(1, false, &mut out);
        for writer in writers {
            writer.join().unwrap();
        }
        taken += shared.take(u64::MAX, false, &mut out);
        assert_eq!(taken, 3);
        assert!(shared.live_is_clear());
        assert_eq!(shared.taken_count(), 3);
    });
}
