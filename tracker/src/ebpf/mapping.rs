//! The memory of a BPF array, mapped: shared with the programs, and outliving the process.

use crate::sync::Owner;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// A mapped array of 8-byte values.
pub(super) struct Mapping {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping is owned, stays where it is, and is only reached through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps an array that was made with BPF_F_MMAPABLE and has this many values of 8 bytes.
    pub fn new(array: BorrowedFd<'_>, words: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at a place of the kernel's choice; it touches no existing memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                words * size_of::<AtomicU64>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                array.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { start, words })
    }
}

impl Deref for Mapping {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `new` mapped this many words, page-aligned and readable; the kernel maps an array
        // only in its full size and never shrinks it. The programs change them by atomics as well.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

// SAFETY: a mapping stays where it is until it is dropped.
unsafe impl Owner<AtomicU64> for Mapping {
    fn words(&self) -> &[AtomicU64] {
        self
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `new` with this length; no reference into it outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.words * size_of::<AtomicU64>()) };
    }
}
