//! Applications: threads that write to a mounted file system or straight to a device until told to
//! stop.

use crate::random::Random;
use io_uring::{IoUring, opcode, types};
use nix::fcntl::FallocateFlags;
use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};
use std::fs::{File, OpenOptions};
use std::num::NonZero;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Makes the next write; returns the bytes it wrote.
pub type Turn = Box<dyn FnMut() -> u64 + Send>;

/// Running writers; [`Load::stop`] ends and joins them, and passes on their panics.
pub struct Load {
    stop: Arc<AtomicBool>,
    resting: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

/// Memory whose address O_DIRECT accepts.
#[repr(align(4096))]
pub struct Aligned<const N: usize>(pub [u8; N]);

const DIRECT_BYTES: usize = 4096;
/// Between two looks of a resting writer.
const LULL_POLL: Duration = Duration::from_millis(5);
/// Files that are rewritten in place, and their size.
const DIRECT_FILE_BYTES: u64 = 24 << 20;
/// Writes of one io_uring batch.
const RING_DEPTH: usize = 8;
/// Small files, and the most bytes of one.
const FILES: u64 = 40;
const FILE_BYTES: u64 = 256 << 10;
/// One of their operations writes as much as many of the direct ones.
const FILES_PAUSE: u32 = 8;

impl Load {
    /// Runs each over and over in a thread of its own.
    pub fn start(writers: Vec<Turn>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let resting = Arc::new(AtomicBool::new(false));
        let written = Arc::new(AtomicU64::new(0));
        let threads = writers
            .into_iter()
            .map(|mut turn| {
                let (stop, written, resting) = (stop.clone(), written.clone(), resting.clone());
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        if resting.load(Ordering::Relaxed) {
                            std::thread::sleep(LULL_POLL);
                            continue;
                        }
                        written.fetch_add(turn(), Ordering::Relaxed);
                    }
                })
            })
            .collect();
        Self { stop, resting, written, threads }
    }

    /// A mixed load on a file system: a thread of O_DIRECT writes into a preallocated file, one of
    /// io_uring writes into another, and one of all that a file system does besides ([`files`]).
    /// `pause` after each keeps the machine usable.
    pub fn mixed(dir: &Path, random: &mut Random, pause: Duration) -> Vec<Turn> {
        vec![
            direct(dir.join("direct"), random.fork(), pause),
            ring(dir.join("ring"), random.fork(), pause),
            files(dir.join("files"), random.fork(), pause),
        ]
    }

    /// Bursts of direct writes, discards and zeroing all over a device without a file system, with
    /// rests in between: it cannot be frozen, so its points are exact only when it is quiet.
    pub fn bursts(device: &Path, bytes: u64, random: &mut Random, rest: Duration) -> Turn {
        let file = direct_file(device);
        let mut random = random.fork();
        let mut block = Box::new(Aligned([0; DIRECT_BYTES]));
        Box::new(move || {
            std::thread::sleep(rest);
            let mut written = 0;
            for _ in 0..1 + random.below(12) {
                let blocks = 1 + random.below(64);
                let offset = random.below(bytes / DIRECT_BYTES as u64 - blocks);
                let range = [offset * DIRECT_BYTES as u64, blocks * DIRECT_BYTES as u64];
                written += match random.below(4) {
                    // SAFETY: the descriptor is open, and the kernel reads the two numbers only.
                    0 => unsafe { ioctl::blkdiscard(file.as_raw_fd(), &range) }.map(|_| 0),
                    // SAFETY: as above.
                    1 => unsafe { ioctl::blkzeroout(file.as_raw_fd(), &range) }.map(|_| range[1]),
                    _ => Ok(write_somewhere(&file, bytes, &mut random, &mut block)),
                }
                .expect("the device takes it");
            }
            written
        })
    }

    /// `depth` threads of O_DIRECT writes of one block each, all over a device.
    pub fn raw(device: &Path, bytes: u64, depth: usize, random: &mut Random) -> Self {
        let writer = |_| -> Turn {
            let file = direct_file(device);
            let mut random = random.fork();
            let mut block = Box::new(Aligned([0; DIRECT_BYTES]));
            Box::new(move || write_somewhere(&file, bytes, &mut random, &mut block))
        };
        Self::start((0..depth).map(writer).collect())
    }

    /// A lull: files stay open and unsynced, nobody writes; or the end of it.
    pub fn rest(&self, resting: bool) {
        self.resting.store(resting, Ordering::Relaxed);
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Ends the writers; returns the bytes they wrote.
    pub fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("a writer met an I/O error");
        }
        self.written()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn write_somewhere(
    file: &File,
    bytes: u64,
    random: &mut Random,
    block: &mut Aligned<DIRECT_BYTES>,
) -> u64 {
    // A fresh stamp in every word: no two writes are equal.
    random.fill(&mut block.0);
    let offset = random.below(bytes / DIRECT_BYTES as u64) * DIRECT_BYTES as u64;
    file.write_all_at(&block.0, offset).expect("write");
    DIRECT_BYTES as u64
}

/// A file of which every block exists, opened for direct writes.
fn preallocated(path: &Path) -> File {
    let plain = File::create(path).expect("create");
    nix::fcntl::posix_fallocate(&plain, 0, DIRECT_FILE_BYTES as i64).expect("preallocate");
    direct_file(path)
}

fn direct_file(path: &Path) -> File {
    let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path);
    file.unwrap_or_else(|error| panic!("{} for direct writes: {error}", path.display()))
}

fn direct(path: PathBuf, mut random: Random, pause: Duration) -> Turn {
    let file = preallocated(&path);
    let mut block = Box::new(Aligned([0; DIRECT_BYTES]));
    Box::new(move || {
        std::thread::sleep(pause);
        write_somewhere(&file, DIRECT_FILE_BYTES, &mut random, &mut block)
    })
}

/// Batches of writes that are in flight together.
fn ring(path: PathBuf, mut random: Random, pause: Duration) -> Turn {
    let file = preallocated(&path);
    let mut ring = IoUring::new(RING_DEPTH as u32).expect("io_uring");
    let mut blocks: Vec<_> =
        (0..RING_DEPTH).map(|_| Box::new(Aligned([0; DIRECT_BYTES]))).collect();
    Box::new(move || {
        std::thread::sleep(pause * RING_DEPTH as u32);
        for block in &mut blocks {
            random.fill(&mut block.0);
            let offset = random.below(DIRECT_FILE_BYTES / DIRECT_BYTES as u64);
            let write = opcode::Write::new(
                types::Fd(file.as_raw_fd()),
                block.0.as_ptr(),
                DIRECT_BYTES as u32,
            );
            let write = write.offset(offset * DIRECT_BYTES as u64).build();
            // SAFETY: file and blocks live until all completions are taken below, and no block is
            // touched before.
            unsafe { ring.submission().push(&write) }.expect("room for a batch");
        }
        ring.submit_and_wait(RING_DEPTH).expect("io_uring writes");
        for done in ring.completion() {
            assert_eq!(done.result(), DIRECT_BYTES as i32, "an io_uring write failed");
        }
        (RING_DEPTH * DIRECT_BYTES) as u64
    })
}

/// Small files: written through the page cache and mapped, synced, renamed, removed, cut, punched,
/// zeroed; and now and then the file system discards what is free.
fn files(dir: PathBuf, mut random: Random, pause: Duration) -> Turn {
    std::fs::create_dir_all(&dir).expect("a folder");
    let fallocate = |file: &File, flags, offset, bytes| {
        nix::fcntl::fallocate(file, flags, offset as i64, bytes as i64).expect("fallocate");
    };
    Box::new(move || {
        std::thread::sleep(pause * FILES_PAUSE);
        let name = |random: &mut Random| dir.join(format!("file-{}", random.below(FILES)));
        let path = name(&mut random);
        let open =
            || OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let offset = random.below(FILE_BYTES);
        let bytes = 1 + random.below(FILE_BYTES - offset);
        match random.below(16) {
            0 => {
                let _ = std::fs::remove_file(&path);
                0
            }
            1 => {
                let _ = std::fs::rename(&path, name(&mut random));
                0
            }
            2 => {
                open().and_then(|file| file.set_len(offset)).expect("truncate");
                0
            }
            3 => {
                let flags =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(&open().expect("open"), flags, offset, bytes);
                0
            }
            4 => {
                fallocate(
                    &open().expect("open"),
                    FallocateFlags::FALLOC_FL_ZERO_RANGE,
                    offset,
                    bytes,
                );
                bytes
            }
            5 => {
                let file = open().expect("open");
                file.set_len(FILE_BYTES).expect("grow");
                write_mapped(&file, offset as usize, bytes as usize, &mut random)
            }
            6 if random.below(8) == 0 => {
                let folder = File::open(&dir).expect("the folder");
                let mut all = ioctl::TrimRange { start: 0, len: u64::MAX, minlen: 0 };
                // SAFETY: the descriptor is open, and the argument is the structure of FITRIM.
                unsafe { ioctl::fitrim(folder.as_raw_fd(), &mut all) }.expect("FITRIM");
                0
            }
            turn => {
                let mut content = vec![0; bytes as usize];
                random.fill(&mut content);
                let file = open().expect("open");
                file.write_all_at(&content, offset).expect("write");
                if turn < 10 {
                    file.sync_all().expect("fsync");
                }
                bytes
            }
        }
    })
}

/// Writes through a shared mapping, and syncs it.
fn write_mapped(file: &File, offset: usize, bytes: usize, random: &mut Random) -> u64 {
    let length = NonZero::new(FILE_BYTES as usize).expect("not zero");
    let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: the whole file is mapped, nobody else cuts it short (one thread owns the folder), and
    // the mapping goes before the slice could be used again.
    unsafe {
        let map = mmap(None, length, rights, MapFlags::MAP_SHARED, file, 0).expect("mmap");
        let all = std::slice::from_raw_parts_mut(map.cast::<u8>().as_ptr(), length.get());
        random.fill(&mut all[offset..offset + bytes]);
        msync(map, length.get(), MsFlags::MS_SYNC).expect("msync");
        munmap(map, length.get()).expect("munmap");
    }
    bytes as u64
}

mod ioctl {
    // <linux/fs.h>
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_write_ptr_bad!(blkzeroout, nix::request_code_none!(0x12, 127), [u64; 2]);
    #[repr(C)]
    pub struct TrimRange {
        pub start: u64,
        pub len: u64,
        pub minlen: u64,
    }
    nix::ioctl_readwrite!(fitrim, b'X', 121, TrimRange);
}
