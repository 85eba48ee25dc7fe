//! Reads a device with io_uring: O_DIRECT, registered buffers, bounded depth.
//!
//! A partition is read through its whole disk: the disk's page cache is another one than the
//! partition's, so reading does not write back what the file system holds dirty. Yields to the
//! application: low I/O priority, and one request at a time while others have requests in flight.
//! A request in flight owns its buffer until its completion was seen, also when dropped.

use crate::pulse;
use crate::source::buffers::Arena;
use crate::source::seams::{Batch, Disk, DiskError};
use io_uring::{IoUring, cqueue, opcode, types};
use secondsite_tracker::device::Device;
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Requests in flight: ordinary, and while the application's own are.
const DEPTH: usize = 32;
const DEPTH_BUSY: usize = 1;
/// How often the application's requests are counted.
const SAMPLE_EVERY: Duration = Duration::from_millis(20);
/// Best effort, lowest level: a class of its own would starve under a busy scheduler.
const PRIORITY_LOW: u16 = 2 << 13 | 7;
/// What the kernel splits our requests into, at worst: for telling ours from others'.
const SPLIT_BYTES: u64 = 128 << 10;

nix::ioctl_read!(block_size_bytes, 0x12, 114, u64);

struct Request {
    slot: usize,
    offset: u64,
    bytes: usize,
    at: usize,
}

struct Slot {
    batch: Batch,
    left: usize,
}

/// A device, read through a ring of its own.
pub struct RingDisk {
    device: Device,
    file: File,
    /// Where the volume starts on what is opened, bytes.
    base: u64,
    block_bytes: usize,
    /// Counts what was read, for metrics.
    read_bytes: Arc<AtomicU64>,
    ring: IoUring,
    registered: bool,
    /// Keeps the registered memory mapped for as long as the ring knows it.
    _arena: Arc<Arena>,
    slots: Vec<Option<Slot>>,
    flying: Vec<Option<Request>>,
    flying_bytes: u64,
    queue: VecDeque<Request>,
    done: VecDeque<Batch>,
    urgent: bool,
    depth: usize,
    sampled: Instant,
}

impl RingDisk {
    /// Opens the device for reading.
    pub fn open(
        device: Device,
        block_bytes: u32,
        arena: &Arc<Arena>,
        read_bytes: Arc<AtomicU64>,
    ) -> Result<Self, DiskError> {
        let path = if device.disk_offset_bytes > 0 { &device.disk.2 } else { &device.path };
        let system = |what, error: std::io::Error| DiskError::System {
            path: path.clone(),
            what,
            cause: error.to_string(),
        };
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
            .open(path)
            .map_err(|error| system("open for direct reading", error))?;
        let ring = IoUring::new(DEPTH as u32).map_err(|error| system("io_uring", error))?;
        // SAFETY: the arena's mapping stays as long as `_arena`, which is dropped with the ring.
        let registered = unsafe { ring.submitter().register_buffers(&arena.iovecs()) };
        if let Err(error) = &registered {
            // Only slower: the limit on locked memory, on kernels that count it.
            tracing::info!(device = %path.display(), %error, "buffers are not registered");
        }
        Ok(Self {
            base: device.disk_offset_bytes,
            read_bytes,
            file,
            block_bytes: block_bytes as usize,
            ring,
            registered: registered.is_ok(),
            _arena: arena.clone(),
            slots: Vec::new(),
            flying: (0..DEPTH).map(|_| None).collect(),
            flying_bytes: 0,
            queue: VecDeque::with_capacity(4096),
            done: VecDeque::with_capacity(64),
            urgent: false,
            depth: DEPTH,
            sampled: Instant::now(),
            device,
        })
    }

    fn gone(&self, cause: impl Into<String>) -> DiskError {
        DiskError::Gone { path: self.device.path.clone(), cause: cause.into() }
    }

    /// One request at a time while the application has some in flight.
    fn yield_to_others(&mut self) {
        if self.urgent {
            self.depth = DEPTH;
        } else if self.sampled.elapsed() >= SAMPLE_EVERY {
            self.sampled = Instant::now();
            let ours = self.flying_bytes.div_ceil(SPLIT_BYTES);
            let busy =
                self.device.in_flight().is_ok_and(|(reads, writes)| writes > 0 || reads > ours);
            self.depth = if busy { DEPTH_BUSY } else { DEPTH };
        }
    }

    fn pump(&mut self) -> Result<(), DiskError> {
        self.yield_to_others();
        loop {
            let flying = self.flying.iter().filter(|request| request.is_some()).count();
            if flying >= self.depth {
                break;
            }
            let Some(request) = self.queue.pop_front() else { break };
            let id = self.flying.iter().position(Option::is_none).expect("depth is its length");
            let fd = types::Fd(self.file.as_raw_fd());
            let slot = self.slots[request.slot].as_mut().expect("a request's batch is in its slot");
            let buffer = &mut slot.batch.buffer;
            // SAFETY: the piece lies within the buffer, as `submit` has checked.
            let to = unsafe { buffer.as_mut_ptr().add(request.at) };
            let (len, offset) = (request.bytes as u32, self.base + request.offset);
            let priority = if self.urgent { 0 } else { PRIORITY_LOW };
            let entry = if self.registered {
                opcode::ReadFixed::new(fd, to, len, buffer.index() as u16)
                    .offset(offset)
                    .ioprio(priority)
                    .build()
            } else {
                opcode::Read::new(fd, to, len).offset(offset).ioprio(priority).build()
            };
            self.flying_bytes += request.bytes as u64;
            self.flying[id] = Some(request);
            // SAFETY: the buffer is owned by the batch in its slot until the completion was seen,
            // also when this disk is dropped; the file stays open as long.
            unsafe { self.ring.submission().push(&entry.user_data(id as u64)) }
                .expect("the ring has room for the whole depth");
        }
        match self.ring.submit() {
            Ok(_) => Ok(()),
            Err(error) if again(&error) => Ok(()),
            Err(error) => Err(self.system("io_uring submit", &error)),
        }
    }

    fn system(&self, what: &'static str, error: &std::io::Error) -> DiskError {
        DiskError::System { path: self.device.path.clone(), what, cause: error.to_string() }
    }

    /// Waits for completions and sorts them.
    fn reap(&mut self) -> Result<(), DiskError> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if again(&error) => {}
            Err(error) => return Err(self.system("io_uring wait", &error)),
        }
        let mut failed = None;
        loop {
            let entry = self.ring.completion().next();
            let Some(entry) = entry else { break };
            if let Err(error) = self.completed(&entry) {
                failed = Some(error);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    fn completed(&mut self, entry: &cqueue::Entry) -> Result<(), DiskError> {
        let request = self.flying[entry.user_data() as usize].take().expect("it was in flight");
        self.flying_bytes -= request.bytes as u64;
        let read = entry.result().max(0).cast_unsigned();
        self.read_bytes.fetch_add(u64::from(read), Ordering::Relaxed);
        let index = request.slot;
        let mut result = Ok(());
        match usize::try_from(entry.result()) {
            Ok(bytes) if bytes == request.bytes => {}
            Ok(0) => result = Err(self.gone("it ends before its size")),
            Ok(bytes) => {
                // The rest of it, as a request of its own.
                let rest = Request {
                    slot: index,
                    offset: request.offset + bytes as u64,
                    bytes: request.bytes - bytes,
                    at: request.at + bytes,
                };
                self.queue.push_front(rest);
                return Ok(());
            }
            Err(_) if -entry.result() == libc::EINTR || -entry.result() == libc::EAGAIN => {
                self.queue.push_front(request);
                return Ok(());
            }
            Err(_) => match self.unreadable(&request, -entry.result()) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => result = Err(error),
            },
        }
        let slot = self.slots[index].as_mut().expect("a request's batch is in its slot");
        slot.left -= 1;
        if slot.left == 0 {
            let slot = self.slots[index].take().expect("as above");
            self.done.push_back(slot.batch);
        }
        result
    }

    /// A request failed: narrows it down to blocks (true: these were queued), or names the block.
    fn unreadable(&mut self, request: &Request, errno: i32) -> Result<bool, DiskError> {
        // Where the whole device is gone every block fails: that is another story.
        self.check_now()?;
        if errno == libc::ENODEV || errno == libc::ENXIO {
            return Err(self.gone(std::io::Error::from_raw_os_error(errno).to_string()));
        }
        let slot = self.slots[request.slot].as_mut().expect("a request's batch is in its slot");
        if request.bytes <= self.block_bytes {
            slot.batch.buffer.bytes_mut()[request.at..request.at + request.bytes].fill(0);
            let size = self.block_bytes as u64;
            let block = request.offset / size * size;
            let end = (block + size).min(self.device.size_bytes);
            slot.batch.unreadable.push((block, end - block));
            return Ok(false);
        }
        let blocks = request.bytes.div_ceil(self.block_bytes);
        slot.left += blocks - 1;
        for i in 0..blocks {
            let from = i * self.block_bytes;
            self.queue.push_back(Request {
                slot: request.slot,
                offset: request.offset + from as u64,
                bytes: self.block_bytes.min(request.bytes - from),
                at: request.at + from,
            });
        }
        Ok(true)
    }
}

fn again(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

impl Disk for RingDisk {
    fn check(&mut self) -> Result<(), DiskError> {
        pulse::outside(|| self.check_now())
    }

    fn submit(&mut self, batch: Batch) -> Result<(), DiskError> {
        pulse::outside(|| self.submit_now(batch))
    }

    fn wait(&mut self) -> Result<Batch, DiskError> {
        pulse::outside(|| self.wait_now())
    }

    fn outstanding(&self) -> usize {
        self.done.len() + self.slots.iter().filter(|slot| slot.is_some()).count()
    }

    fn urgent(&mut self, urgent: bool) {
        self.urgent = urgent;
        self.depth = DEPTH;
    }

    fn drain(&mut self) {
        pulse::outside(|| self.drain_now());
    }
}

/// The verbs of [`Disk`], which waits for them outside.
impl RingDisk {
    fn check_now(&mut self) -> Result<(), DiskError> {
        let now = Device::open(&self.device.path).map_err(|error| self.gone(error.cause))?;
        let same = |device: &Device| (device.major, device.minor, device.diskseq);
        if same(&now) != same(&self.device) {
            return Err(self.gone("another disk has taken its place"));
        }
        let (path, before) = (self.device.path.clone(), self.device.size_bytes);
        match now.size_bytes.cmp(&before) {
            std::cmp::Ordering::Equal => {}
            std::cmp::Ordering::Less => {
                return Err(DiskError::Shrunk { path, before, now: now.size_bytes });
            }
            std::cmp::Ordering::Greater => {
                return Err(DiskError::Grown { path, before, now: now.size_bytes });
            }
        }
        // The file that is read, too: its node may be a new one for the same number.
        let mut bytes = 0;
        // SAFETY: the ioctl writes one u64 to the address given.
        unsafe { block_size_bytes(self.file.as_raw_fd(), &mut bytes) }
            .map_err(|error| self.gone(error.desc()))?;
        if bytes < self.base + self.device.size_bytes {
            return Err(self.gone("the disk that it lies on has shrunk"));
        }
        Ok(())
    }

    fn submit_now(&mut self, batch: Batch) -> Result<(), DiskError> {
        let slot = match self.slots.iter().position(Option::is_none) {
            Some(slot) => slot,
            None => {
                self.slots.push(None);
                self.slots.len() - 1
            }
        };
        for piece in &batch.pieces {
            assert!(piece.at + piece.bytes <= batch.buffer.bytes().len(), "a piece in its buffer");
            assert!(piece.offset + piece.bytes as u64 <= self.device.size_bytes, "in the volume");
            let (offset, bytes, at) = (piece.offset, piece.bytes, piece.at);
            self.queue.push_back(Request { slot, offset, bytes, at });
        }
        let left = batch.pieces.len();
        if left == 0 {
            self.done.push_back(batch);
            return Ok(());
        }
        self.slots[slot] = Some(Slot { batch, left });
        self.pump()
    }

    fn wait_now(&mut self) -> Result<Batch, DiskError> {
        assert!(self.outstanding() > 0, "there is something to wait for");
        loop {
            if let Some(batch) = self.done.pop_front() {
                return Ok(batch);
            }
            self.pump()?;
            self.reap()?;
        }
    }

    fn drain_now(&mut self) {
        self.queue.clear();
        while self.flying.iter().any(Option::is_some) {
            // A completion's own trouble no longer matters, but a ring that cannot be waited on
            // still owns the buffers: they stay where they are.
            if self.reap().is_err() && self.ring.submitter().submit_and_wait(1).is_err() {
                std::process::abort();
            }
            self.queue.clear();
        }
        self.slots.clear();
        self.done.clear();
    }
}

impl Drop for RingDisk {
    fn drop(&mut self) {
        self.drain();
    }
}
