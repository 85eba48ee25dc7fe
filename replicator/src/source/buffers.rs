//! Page-aligned buffers of 1 MiB: the memory budget of blocks on their way.
//!
//! One arena, mapped once and registered with every ring; each index is either free in a pool or
//! owned by exactly one [`Buffer`], which goes home when dropped. Whoever has taken a buffer can
//! always finish with it without taking another, so waiting for one cannot deadlock.

use crate::pulse;
use crossbeam::channel::{Receiver, Sender, bounded};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use secondsite_format::limits::FRAME_PAYLOAD_BYTES_MAX;
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a buffer: the payload of the largest frame.
pub const BUFFER_BYTES: usize = FRAME_PAYLOAD_BYTES_MAX;
/// What a buffer costs of the budget: itself, and the frame made of it.
const BUFFER_COST_BYTES: u64 = 2 * BUFFER_BYTES as u64 + (BUFFER_BYTES as u64 >> 2);
/// Fewest and most buffers that are worth having.
const BUFFERS_MIN: u64 = 8;
const BUFFERS_MAX: u64 = 256;
/// Share of the buffers set aside for last passes, and the fewest of them.
const LAST_PASS_SHARE: usize = 2;

/// The mapped memory.
pub struct Arena {
    base: NonNull<c_void>,
    count: usize,
}

// SAFETY: the mapping is plain memory that stays until the arena is dropped; who may touch which
// part of it is decided by `Buffer`, of which there is one an index.
unsafe impl Send for Arena {}
// SAFETY: as above; `Arena` itself reads and writes nothing.
unsafe impl Sync for Arena {}

impl Arena {
    fn new(count: usize) -> std::io::Result<Self> {
        let bytes = NonZeroUsize::new(count * BUFFER_BYTES).expect("at least one buffer");
        // SAFETY: a fresh anonymous mapping overlaps nothing.
        let base = unsafe {
            mmap_anonymous(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE,
            )
        }?;
        Ok(Self { base, count })
    }

    fn start(&self, index: usize) -> *mut u8 {
        assert!(index < self.count, "buffer index");
        // SAFETY: the index was checked, so the result lies within the mapping.
        unsafe { self.base.as_ptr().cast::<u8>().add(index * BUFFER_BYTES) }
    }

    /// Every buffer as an address and a length, by index: what a ring registers.
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        (0..self.count)
            .map(|i| libc::iovec { iov_base: self.start(i).cast(), iov_len: BUFFER_BYTES })
            .collect()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: every `Buffer` holds an `Arc` of the arena, so none is left; the kernel holds
        // its own reference to pages that a ring registered.
        let _ = unsafe { munmap(self.base, self.count * BUFFER_BYTES) };
    }
}

/// Free buffers.
pub struct Pool {
    arena: Arc<Arena>,
    home: Sender<usize>,
    free: Receiver<usize>,
}

impl Pool {
    fn new(arena: &Arc<Arena>, indices: std::ops::Range<usize>) -> Self {
        let (home, free) = bounded(indices.len());
        for index in indices {
            home.send(index).expect("the channel holds all of them");
        }
        Self { arena: arena.clone(), home, free }
    }

    fn buffer(&self, index: usize) -> Buffer {
        Buffer { arena: self.arena.clone(), index, home: self.home.clone() }
    }

    /// A buffer, if one is free.
    pub fn try_take(&self) -> Option<Buffer> {
        self.free.try_recv().ok().map(|index| self.buffer(index))
    }

    /// A buffer, waiting for one at most this long.
    pub fn take(&self, patience: Duration) -> Option<Buffer> {
        let free = pulse::resting(patience, || self.free.recv_timeout(patience));
        free.ok().map(|index| self.buffer(index))
    }
}

/// A buffer with its one owner.
pub struct Buffer {
    arena: Arc<Arena>,
    index: usize,
    home: Sender<usize>,
}

impl Buffer {
    /// Its number in [`Arena::iovecs`].
    pub fn index(&self) -> usize {
        self.index
    }

    /// Its address, for the kernel.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.arena.start(self.index)
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: this is the only owner of the index, the memory is mapped and initialised (zero
        // pages), and the kernel writes to it only while a batch in flight owns the buffer.
        unsafe { std::slice::from_raw_parts(self.arena.start(self.index), BUFFER_BYTES) }
    }

    /// Its bytes, to change.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.arena.start(self.index), BUFFER_BYTES) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // Never full: the channel has a place for every index of the pool.
        let _ = self.home.try_send(self.index);
    }
}

/// All buffers of the daemon.
pub struct Memory {
    /// The mapping.
    pub arena: Arc<Arena>,
    /// For passes, copies and compares.
    pub bulk: Pool,
    /// For last passes, so that no other volume's traffic delays a cut.
    pub last: Pool,
    /// Buffers in `last`.
    pub last_count: usize,
}

impl Memory {
    /// Takes what a budget of `bytes` allows.
    pub fn new(bytes: u64) -> std::io::Result<Self> {
        let count = (bytes / BUFFER_COST_BYTES).clamp(BUFFERS_MIN, BUFFERS_MAX) as usize;
        let arena = Arc::new(Arena::new(count)?);
        let last_count = count / LAST_PASS_SHARE;
        let bulk = Pool::new(&arena, last_count..count);
        let last = Pool::new(&arena, 0..last_count);
        Ok(Self { arena, bulk, last, last_count })
    }

    /// What all buffers cost, bytes.
    pub fn bytes(&self) -> u64 {
        self.arena.count as u64 * BUFFER_COST_BYTES
    }

    /// What those cost that are not free now.
    pub fn used_bytes(&self) -> u64 {
        let free = self.bulk.free.len() + self.last.free.len();
        self.arena.count.saturating_sub(free) as u64 * BUFFER_COST_BYTES
    }
}
