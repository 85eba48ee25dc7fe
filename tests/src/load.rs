//! Applications: threads that write to a mounted file system or straight to a device until told to
//! stop.

use crate::random::Random;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Running writers; [`Load::stop`] ends and joins them, and passes on their panics.
pub struct Load {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

/// Memory whose address O_DIRECT accepts.
#[repr(align(4096))]
pub struct Aligned<const N: usize>(pub [u8; N]);

const DIRECT_BYTES: usize = 4096;
/// Files that are rewritten in place, and their size.
const DIRECT_FILE_BYTES: u64 = 32 << 20;

impl Load {
    /// Runs each function over and over in a thread of its own; it returns the bytes it wrote.
    pub fn start(writers: Vec<Box<dyn FnMut() -> u64 + Send>>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let written = Arc::new(AtomicU64::new(0));
        let threads = writers
            .into_iter()
            .map(|mut turn| {
                let (stop, written) = (stop.clone(), written.clone());
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        written.fetch_add(turn(), Ordering::Relaxed);
                    }
                })
            })
            .collect();
        Self { stop, written, threads }
    }

    /// A mixed load on a file system: two threads of O_DIRECT writes into preallocated files, one
    /// of buffered files that are synced, renamed and removed. `pause` after each write keeps the
    /// machine usable.
    pub fn mixed(dir: &Path, random: &mut Random, pause: Duration) -> Self {
        Self::start(vec![
            direct(dir.join("direct-0"), random.fork(), pause),
            direct(dir.join("direct-1"), random.fork(), pause),
            files(dir.join("files"), random.fork(), pause),
        ])
    }

    /// `depth` threads of O_DIRECT writes of one block each, all over a device.
    pub fn raw(device: &Path, bytes: u64, depth: usize, random: &mut Random) -> Self {
        let open = || OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(device);
        let writer = |_| -> Box<dyn FnMut() -> u64 + Send> {
            let file = open().expect("the device");
            let mut random = random.fork();
            let mut block = Box::new(Aligned([0; DIRECT_BYTES]));
            Box::new(move || write_somewhere(&file, bytes, &mut random, &mut block))
        };
        Self::start((0..depth).map(writer).collect())
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

fn direct(path: PathBuf, mut random: Random, pause: Duration) -> Box<dyn FnMut() -> u64 + Send> {
    let plain = File::create(&path).expect("create");
    nix::fcntl::posix_fallocate(&plain, 0, DIRECT_FILE_BYTES as i64).expect("preallocate");
    let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(&path);
    let file = file.expect("open for direct writes");
    let mut block = Box::new(Aligned([0; DIRECT_BYTES]));
    Box::new(move || {
        std::thread::sleep(pause);
        write_somewhere(&file, DIRECT_FILE_BYTES, &mut random, &mut block)
    })
}

fn files(dir: PathBuf, mut random: Random, pause: Duration) -> Box<dyn FnMut() -> u64 + Send> {
    std::fs::create_dir_all(&dir).expect("a folder");
    Box::new(move || {
        std::thread::sleep(pause);
        let path = dir.join(format!("file-{}", random.below(50)));
        match random.below(8) {
            0 => {
                let _ = std::fs::remove_file(&path);
                0
            }
            1 => {
                let _ = std::fs::rename(&path, dir.join(format!("file-{}", random.below(50))));
                0
            }
            turn => {
                let mut bytes = vec![0; 1 + random.below(256 << 10) as usize];
                random.fill(&mut bytes);
                let mut file = File::create(&path).expect("create");
                file.write_all(&bytes).expect("write");
                if turn == 2 {
                    file.sync_all().expect("fsync");
                }
                bytes.len() as u64
            }
        }
    })
}
