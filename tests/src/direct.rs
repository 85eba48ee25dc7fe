//! An application that reads and writes a block device directly, many requests at a time, and knows
//! what every block must hold: the last acknowledged write to it.
//!
//! Requests never overlap one another, so each block has one content at any instant. Every read is
//! compared, also those of the load itself; an I/O error is a failure like a wrong block.

use crate::random::Random;
use io_uring::{IoUring, opcode, types};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// The unit of what is written and checked.
const BLOCK: usize = 4096;
/// Requests under way.
const DEPTH: usize = 32;
/// Largest request, blocks.
const REQUEST_BLOCKS_MAX: u64 = 16;

#[repr(C, align(4096))]
struct Buffer([u8; BLOCK * REQUEST_BLOCKS_MAX as usize]);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Read,
    Write,
    Flush,
}

struct Flight {
    kind: Kind,
    first: usize,
    count: usize,
    since: Instant,
}

/// What a load did.
#[derive(Debug, Default, Clone, Copy)]
pub struct Done {
    /// Requests by kind.
    pub reads: u64,
    /// See `reads`.
    pub writes: u64,
    /// See `reads`.
    pub flushes: u64,
    /// The longest that one took.
    pub worst: Duration,
}

/// A device and what its blocks must hold.
pub struct Application {
    file: File,
    /// How often each block was written; 0: as it was found, which must be zeros.
    versions: Vec<u32>,
    random: Random,
}

impl Application {
    /// For a device that reads as zero everywhere.
    pub fn new(device: &Path, bytes: u64, random: Random) -> Self {
        Self { file: open(device), versions: vec![0; bytes as usize / BLOCK], random }
    }

    /// Reads and writes until `over`; panics on an error or a wrong block.
    pub fn run(&mut self, over: impl Fn() -> bool) -> Done {
        let mut ring = IoUring::new(DEPTH as u32).unwrap();
        let mut buffers: Vec<Box<Buffer>> =
            (0..DEPTH).map(|_| Box::new(Buffer([0; size_of::<Buffer>()]))).collect();
        let mut flights: Vec<Option<Flight>> = (0..DEPTH).map(|_| None).collect();
        let mut busy = vec![false; self.versions.len()];
        let mut done = Done::default();
        loop {
            let ending = over();
            for slot in 0..DEPTH {
                if flights[slot].is_none() && !ending {
                    let Some(flight) = self.choose(&mut busy) else { continue };
                    let fd = types::Fd(self.file.as_raw_fd());
                    let offset = (flight.first * BLOCK) as u64;
                    let bytes = flight.count * BLOCK;
                    let entry = match flight.kind {
                        Kind::Read => {
                            let to = buffers[slot].0.as_mut_ptr();
                            opcode::Read::new(fd, to, bytes as u32).offset(offset).build()
                        }
                        Kind::Write => {
                            for (at, chunk) in
                                buffers[slot].0[..bytes].chunks_mut(BLOCK).enumerate()
                            {
                                let block = flight.first + at;
                                content(block, self.versions[block] + 1, chunk);
                            }
                            let durable =
                                if self.random.below(8) == 0 { libc::RWF_DSYNC } else { 0 };
                            let from = buffers[slot].0.as_ptr();
                            opcode::Write::new(fd, from, bytes as u32)
                                .offset(offset)
                                .rw_flags(durable)
                                .build()
                        }
                        Kind::Flush => opcode::Fsync::new(fd).build(),
                    };
                    flights[slot] = Some(flight);
                    // SAFETY: the buffer is this slot's alone until its completion was seen.
                    unsafe { ring.submission().push(&entry.user_data(slot as u64)) }.unwrap();
                }
            }
            if flights.iter().all(Option::is_none) {
                return done;
            }
            ring.submit_and_wait(1).unwrap();
            let completed: Vec<_> =
                ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
            for (slot, result) in completed {
                let flight = flights[slot as usize].take().unwrap();
                let took = flight.since.elapsed();
                done.worst = done.worst.max(took);
                let range = flight.first..flight.first + flight.count;
                let expected = (flight.count * BLOCK) as i32;
                assert!(
                    result >= 0,
                    "{:?} of blocks {range:?} failed after {took:?}: {}",
                    flight.kind,
                    std::io::Error::from_raw_os_error(-result)
                );
                assert_eq!(result, expected, "{:?} of blocks {range:?} was short", flight.kind);
                let data = &buffers[slot as usize].0[..flight.count * BLOCK];
                match flight.kind {
                    Kind::Flush => done.flushes += 1,
                    Kind::Write => {
                        done.writes += 1;
                        range.clone().for_each(|block| self.versions[block] += 1);
                    }
                    Kind::Read => {
                        done.reads += 1;
                        self.compare(flight.first, data);
                    }
                }
                range.for_each(|block| busy[block] = false);
            }
        }
    }

    fn choose(&mut self, busy: &mut [bool]) -> Option<Flight> {
        let since = Instant::now();
        let kind = match self.random.below(32) {
            0 => return Some(Flight { kind: Kind::Flush, first: 0, count: 0, since }),
            1..8 => Kind::Read,
            _ => Kind::Write,
        };
        let first = self.random.below(busy.len() as u64) as usize;
        let count = 1 + self.random.below(REQUEST_BLOCKS_MAX) as usize;
        let count = count.min(busy.len() - first);
        if busy[first..first + count].contains(&true) {
            return None;
        }
        busy[first..first + count].fill(true);
        Some(Flight { kind, first, count, since })
    }

    fn compare(&self, first: usize, data: &[u8]) {
        let mut expected = [0; BLOCK];
        for (at, found) in data.chunks(BLOCK).enumerate() {
            let block = first + at;
            content(block, self.versions[block], &mut expected);
            assert!(found == expected, "block {block} is not its version {}", self.versions[block]);
        }
    }

    /// Every block, as this device has it.
    pub fn verify(&self, device: &Path) -> usize {
        let file = open(device);
        let mut buffer = Box::new(Buffer([0; size_of::<Buffer>()]));
        for first in (0..self.versions.len()).step_by(REQUEST_BLOCKS_MAX as usize) {
            let count = (self.versions.len() - first).min(REQUEST_BLOCKS_MAX as usize);
            let data = &mut buffer.0[..count * BLOCK];
            file.read_exact_at(data, (first * BLOCK) as u64).unwrap();
            self.compare(first, data);
        }
        self.versions.iter().filter(|version| **version > 0).count()
    }
}

fn open(device: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_DIRECT);
    options.open(device).unwrap_or_else(|error| panic!("open {}: {error}", device.display()))
}

/// What a block holds after its so many-th write.
fn content(block: usize, version: u32, to: &mut [u8]) {
    if version == 0 {
        return to.fill(0);
    }
    Random::seeded((block as u64) << 32 | u64::from(version)).fill(to);
}
