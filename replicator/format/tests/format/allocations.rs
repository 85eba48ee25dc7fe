//! The allocator of a test binary that remembers the largest single allocation of each thread: what
//! is read must not decide how much memory is taken for it. Also in `tests/tests/corpus.rs`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Watch;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes on to the system's allocator unchanged; the thread-local is a plain cell
// without a destructor, so that touching it never allocates.
unsafe impl GlobalAlloc for Watch {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(layout.size()));
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static WATCH: Watch = Watch;

/// Begins anew in this thread.
pub fn forget() {
    LARGEST.set(0);
}

/// The largest since, bytes.
pub fn largest() -> usize {
    LARGEST.get()
}
