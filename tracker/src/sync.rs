//! The one atomic word that the bitmaps and the header are made of.
//!
//! The product uses `AtomicU64`; the model checker and the tests that kill at every step bring
//! words of their own. Nothing else in the crate may touch the shared memory.

use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;
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

/// What owns words: heap, or a mapping of pinned memory.
///
/// # Safety
/// The words are the same ones, and at the same place, as long as the owner lives, wherever the
/// owner itself is moved.
#[doc(hidden)]
pub unsafe trait Owner<W>: Send + Sync + 'static {
    fn words(&self) -> &[W];
}

// SAFETY: an element is added, removed or moved only through `&mut`, which nobody has any more.
unsafe impl<W: Send + Sync + 'static> Owner<W> for Vec<W> {
    fn words(&self) -> &[W] {
        self
    }
}

// SAFETY: what an `Arc` holds stays where it is.
unsafe impl<W: Send + Sync + 'static> Owner<W> for Arc<[W]> {
    fn words(&self) -> &[W] {
        self
    }
}

// SAFETY: borrowed for ever.
unsafe impl<W: Send + Sync> Owner<W> for &'static [W] {
    fn words(&self) -> &[W] {
        self
    }
}

/// Words with their owner. Where they are is asked once: marking is a matter of nanoseconds.
#[doc(hidden)]
pub struct Memory<W> {
    words: NonNull<[W]>,
    _owner: Box<dyn Send + Sync>,
}

// SAFETY: it gives out nothing but shared references to words, which are `Sync`.
unsafe impl<W: Send + Sync> Send for Memory<W> {}
// SAFETY: as above.
unsafe impl<W: Send + Sync> Sync for Memory<W> {}

impl<W> Memory<W> {
    /// Takes the owner in.
    pub fn new<O: Owner<W>>(owner: O) -> Self {
        let words = NonNull::from(owner.words());
        Self { words, _owner: Box::new(owner) }
    }
}

impl<W> Deref for Memory<W> {
    type Target = [W];
    fn deref(&self) -> &[W] {
        // SAFETY: the owner lives as long as `self`, and by its contract the words stay.
        unsafe { self.words.as_ref() }
    }
}

impl Word for AtomicU64 {
    #[inline]
    fn load(&self, order: Ordering) -> u64 {
        AtomicU64::load(self, order)
    }
    #[inline]
    fn store(&self, value: u64, order: Ordering) {
        AtomicU64::store(self, value, order)
    }
    #[inline]
    fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        AtomicU64::fetch_or(self, bits, order)
    }
    #[inline]
    fn fetch_and(&self, bits: u64, order: Ordering) -> u64 {
        AtomicU64::fetch_and(self, bits, order)
    }
    #[inline]
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
