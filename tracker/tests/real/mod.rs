//! Real devices for the tests, and the writer and copier that work on them. Needs root.
#![allow(dead_code, reason = "each test program uses a part of it")]

use secondsite_tracker::ebpf::{Audit, Ebpf};
use secondsite_tracker::marks::BlockRun;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

pub const BLOCK: u64 = 4096;

/// Runs a command to its end; its output.
pub fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().expect(program);
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).trim().to_string()
}

/// A folder of this test alone.
pub fn folder() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("tracker-").tempdir_in("/tmp").unwrap()
}

/// A loop device over a file; detached when dropped.
pub struct Loop {
    pub path: PathBuf,
}

impl Loop {
    pub fn new(file: &Path) -> Self {
        let path = run("losetup", &["-P", "-f", "--show", file.to_str().unwrap()]);
        Self { path: path.into() }
    }

    pub fn sized(folder: &Path, bytes: u64) -> Self {
        let file = folder.join("disk");
        File::create(&file).unwrap().set_len(bytes).unwrap();
        Self::new(&file)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.path).status();
    }
}

/// Pins of one test; removed when dropped.
pub struct Pins(pub PathBuf);

impl Pins {
    pub fn new(name: &str) -> Self {
        Self(format!("/sys/fs/bpf/secondsite/test-{}/{name}", std::process::id()).into())
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = Ebpf::remove_pins(&self.0);
        let _ = std::fs::remove_dir(self.0.parent().unwrap());
        let _ = std::fs::remove_dir("/sys/fs/bpf/secondsite");
    }
}

/// Aligned memory for O_DIRECT.
pub struct Aligned(Vec<u8>, usize);

impl Aligned {
    pub fn new(bytes: usize) -> Self {
        let memory = vec![0; bytes + BLOCK as usize];
        let skip = memory.as_ptr().align_offset(BLOCK as usize);
        Self(memory, skip)
    }
    pub fn slice(&mut self, bytes: usize) -> &mut [u8] {
        &mut self.0[self.1..self.1 + bytes]
    }
}

pub fn open_direct(path: &Path, write: bool) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(write).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// BLKDISCARD, BLKZEROOUT: `_IO(0x12, 119)`, `_IO(0x12, 127)`.
pub const DISCARD: libc::Ioctl = 0x1277;
pub const ZERO_OUT: libc::Ioctl = 0x127f;

pub fn range_ioctl(device: &File, request: libc::Ioctl, start: u64, bytes: u64) {
    let range = [start, bytes];
    // SAFETY: both requests read two u64 from the pointer, valid during the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), request, range.as_ptr()) };
    assert_eq!(result, 0, "range ioctl: {}", std::io::Error::last_os_error());
}

/// Writes at random until `stop`: mostly single blocks, some runs, some discards and zeroes.
pub fn write_randomly(path: &Path, bytes: u64, seed: u64, stop: &mut dyn FnMut() -> bool) -> u64 {
    let device = open_direct(path, true);
    let (mut random, mut memory) = (Random(seed), Aligned::new(1 << 20));
    let (blocks, mut writes) = (bytes / BLOCK, 0);
    while !stop() {
        let first = random.below(blocks);
        let most = blocks - first;
        let op = random.below(1000);
        let count = if op < 900 { 1 } else { 1 + random.below(64.min(most)) };
        match op {
            0..2 => range_ioctl(&device, DISCARD, first * BLOCK, (count * 20).min(most) * BLOCK),
            2..4 => range_ioctl(&device, ZERO_OUT, first * BLOCK, (count * 20).min(most) * BLOCK),
            _ => {
                let data = memory.slice((count * BLOCK) as usize);
                data.chunks_mut(8).for_each(|word| word.fill(random.below(256) as u8));
                device.write_all_at(data, first * BLOCK).unwrap();
            }
        }
        writes += 1;
    }
    writes
}

/// A copy of the device, kept by what the tracker says.
pub struct Copier {
    device: File,
    memory: Aligned,
    pub copy: Vec<u8>,
    epoch: u64,
    pub taken: u64,
}

impl Copier {
    /// Copies all of it.
    pub fn new(path: &Path, bytes: u64) -> Self {
        let mut copier = Self {
            device: open_direct(path, false),
            memory: Aligned::new(1 << 20),
            copy: vec![0; bytes as usize],
            epoch: 0,
            taken: 0,
        };
        copier.read(BlockRun { first: 0, count: bytes / BLOCK });
        copier
    }

    fn read(&mut self, run: BlockRun) {
        let (mut at, end) = (run.first * BLOCK, (run.first + run.count) * BLOCK);
        let end = end.min(self.copy.len() as u64);
        while at < end {
            let length = (end - at).min(1 << 20) as usize;
            let buffer = self.memory.slice(length);
            self.device.read_exact_at(buffer, at).unwrap();
            self.copy[at as usize..][..length].copy_from_slice(buffer);
            at += length as u64;
        }
    }

    /// One epoch: takes, reads, forgets.
    pub fn pass(&mut self, ebpf: &Ebpf) -> u64 {
        let marks = ebpf.marks();
        self.epoch += 1;
        let id = u128::from(self.epoch).to_le_bytes();
        marks.begin(self.epoch, id);
        let mut runs = Vec::new();
        let taken = marks.take(u64::MAX, &mut runs);
        runs.into_iter().for_each(|run| self.read(run));
        assert!(marks.committed(id));
        self.taken += taken;
        taken
    }

    /// Blocks in which the device differs from the copy now.
    pub fn differing(&mut self) -> Vec<u64> {
        let kept = self.copy.clone();
        self.read(BlockRun { first: 0, count: kept.len() as u64 / BLOCK });
        let pairs = kept.chunks(BLOCK as usize).zip(self.copy.chunks(BLOCK as usize));
        pairs.enumerate().filter(|(_, (a, b))| a != b).map(|(at, _)| at as u64).collect()
    }
}

/// Asks until it is not busy.
pub fn settled_audit(ebpf: &Ebpf) -> Audit {
    let start = Instant::now();
    loop {
        match ebpf.audit() {
            Audit::Busy if start.elapsed() < Duration::from_secs(20) => std::thread::yield_now(),
            other => return other,
        }
    }
}

/// Ends a run: takes the rest, audits, compares. A loss must show as a gap; a gap is printed.
pub fn conclude(name: &str, ebpf: &Ebpf, copier: &mut Copier) -> Audit {
    while copier.pass(ebpf) > 0 {}
    let audit = settled_audit(ebpf);
    assert!(ebpf.marks().live_is_clear(), "{name}: writes after the last one");
    let differing = copier.differing();
    println!("{name}: {} blocks taken, {audit:?}, {} differ", copier.taken, differing.len());
    assert_ne!(audit, Audit::Busy, "{name}: nothing writes, and yet it is busy");
    if audit == Audit::Good {
        assert_eq!(differing, [0; 0], "{name}: silently lost");
    }
    audit
}
