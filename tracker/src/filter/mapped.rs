//! A file in memory, mapped by filter and agent alike.

use crate::sync::{Memory, Owner};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// A whole file, mapped shared.
pub(super) struct Mapped {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping is owned, stays where it is, and is only reached through atomics.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps the first words of a file that is at least as long. Nobody may make it shorter.
    pub fn new(file: &File, words: usize) -> io::Result<Self> {
        let bytes = words * size_of::<AtomicU64>();
        if file.metadata()?.len() < bytes as u64 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "shorter than it should be"));
        }
        // SAFETY: a new mapping at a place of the kernel's choice; it touches no existing memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
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

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: made by `new` with this length; every part of it holds an `Arc` of it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.words * size_of::<AtomicU64>()) };
    }
}

/// Some words of a mapping, or of the heap.
pub(super) enum Part {
    Mapped(Arc<Mapped>, Range<usize>),
    Heap(Arc<[AtomicU64]>, Range<usize>),
}

// SAFETY: neither a mapping nor what an `Arc` holds moves while it lives.
unsafe impl Owner<AtomicU64> for Part {
    fn words(&self) -> &[AtomicU64] {
        match self {
            Self::Mapped(all, range) => {
                assert!(range.start <= range.end && range.end <= all.words);
                // SAFETY: within the mapping, which lives as long as this part.
                unsafe {
                    std::slice::from_raw_parts(all.start.as_ptr().add(range.start), range.len())
                }
            }
            Self::Heap(all, range) => &all[range.clone()],
        }
    }
}

/// What parts are taken from.
#[derive(Clone)]
pub(super) enum Whole {
    Mapped(Arc<Mapped>),
    Heap(Arc<[AtomicU64]>),
}

impl Whole {
    pub fn part(&self, range: Range<usize>) -> Memory<AtomicU64> {
        Memory::new(match self {
            Self::Mapped(all) => Part::Mapped(all.clone(), range),
            Self::Heap(all) => Part::Heap(all.clone(), range),
        })
    }
}
