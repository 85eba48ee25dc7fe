//! Mapped memory: buffers of our own, and the descriptors that the kernel writes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// A mapping; unmapped when dropped.
pub(super) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it is plain memory, and who may touch which part is settled by those who hold it.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Memory of our own, all of it there: nothing is allocated when it is touched.
    pub fn anonymous(bytes: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        Self::map(bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    }

    /// What a device shows of itself; read only.
    pub fn of_device(file: &File, offset: u64, bytes: usize) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        Self::map(bytes, libc::PROT_READ, flags, file.as_raw_fd(), offset as i64)
    }

    fn map(bytes: usize, protection: i32, flags: i32, fd: i32, offset: i64) -> io::Result<Self> {
        // SAFETY: a new mapping where the kernel has room; nothing of ours is replaced.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, offset) };
        match NonNull::new(start.cast::<u8>()) {
            Some(pointer) if start != libc::MAP_FAILED => Ok(Self { start: pointer, bytes }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Where it starts.
    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// All of it, where it is memory of our own that nobody else was told of.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: exactly what was mapped, borrowed from its only owner.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }

    /// A piece of it, to be read.
    pub fn piece(&self, offset: usize, bytes: usize) -> &[u8] {
        assert!(offset + bytes <= self.bytes, "within the mapping");
        // SAFETY: within the mapping, as was just checked; who writes to it borrows it.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(offset), bytes) }
    }

    /// The address of a piece of it.
    pub fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.bytes, "within the mapping");
        // SAFETY: within the mapping, as was just checked.
        unsafe { self.start.as_ptr().add(offset) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped, and who used it is gone: it is dropped last.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}
