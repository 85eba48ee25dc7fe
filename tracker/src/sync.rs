//! The one atomic word that the bitmaps and the header are made of.
//!
//! The product uses `AtomicU64`; the model checker and the tests that kill at every step bring
//! words of their own. Nothing else in the crate may touch the shared memory.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};

/// An atomic 64-bit word of shared memory.
#[doc(hidden)]
pub trait Word: Send + Sync {
    fn load(&self, order: Ordering) -> u64;
    fn store(&self, value: u64, order: Ordering);
    fn fetch_or(&self, bits: u64, order: Ordering) -> u64;
    fn fetch_and(&self, bits: u64, order: Ordering) -> u64;
    fn fence(order: Ordering);
}

/// Words that live as long as the box: heap, or a mapping of pinned memory.
#[doc(hidden)]
pub type Memory<W> = Box<dyn Deref<Target = [W]> + Send + Sync>;

impl Word for AtomicU64 {
    fn load(&self, order: Ordering) -> u64 {
        AtomicU64::load(self, order)
    }
    fn store(&self, value: u64, order: Ordering) {
        AtomicU64::store(self, value, order)
    }
    fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        AtomicU64::fetch_or(self, bits, order)
    }
    fn fetch_and(&self, bits: u64, order: Ordering) -> u64 {
        AtomicU64::fetch_and(self, bits, order)
    }
    fn fence(order: Ordering) {
        std::sync::atomic::fence(order)
    }
}

/// Loom takes sequentially consistent accesses for acquire and release, and knows only such fences:
/// a fence beside the access says the same.
#[cfg(feature = "loom")]
impl Word for loom::sync::atomic::AtomicU64 {
    fn load(&self, order: Ordering) -> u64 {
        fence_if(order);
        loom::sync::atomic::AtomicU64::load(self, order)
    }
    fn store(&self, value: u64, order: Ordering) {
        loom::sync::atomic::AtomicU64::store(self, value, order)
    }
    fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        let before = loom::sync::atomic::AtomicU64::fetch_or(self, bits, order);
        fence_if(order);
        before
    }
    fn fetch_and(&self, bits: u64, order: Ordering) -> u64 {
        let before = loom::sync::atomic::AtomicU64::fetch_and(self, bits, order);
        fence_if(order);
        before
    }
    fn fence(order: Ordering) {
        loom::sync::atomic::fence(order)
    }
}

#[cfg(feature = "loom")]
fn fence_if(order: Ordering) {
    if order == Ordering::SeqCst {
        loom::sync::atomic::fence(order);
    }
}
