//! What the kernel itself counts for a disk and for the programs.
//!
//! All files are opened once: a disk that was recreated under the same number does not answer
//! through them, and a reading allocates nothing (it also runs while file systems are frozen).

use aya::programs::BtfTracePoint;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Longest answer of any of the files.
const ANSWER_BYTES_MAX: usize = 1024;
/// Places in `/sys/block/X/stat`.
const STAT_WRITE_SECTORS: usize = 6;
const STAT_DISCARD_SECTORS: usize = 13;

/// The open files.
pub(super) struct Counters {
    stat: File,
    in_flight: File,
    iostats: File,
    diskseq: File,
    size: File,
    programs: Vec<File>,
}

impl Counters {
    pub fn open(disk: &Path, volume: &Path, programs: &[BtfTracePoint]) -> io::Result<Self> {
        let fdinfo = |program: &BtfTracePoint| {
            let fd = program.fd().map_err(io::Error::other)?.as_fd().as_raw_fd();
            File::open(format!("/proc/self/fdinfo/{fd}"))
        };
        Ok(Self {
            stat: File::open(disk.join("stat"))?,
            in_flight: File::open(disk.join("inflight"))?,
            iostats: File::open(disk.join("queue/iostats"))?,
            diskseq: File::open(disk.join("diskseq"))?,
            size: File::open(volume.join("size"))?,
            programs: programs.iter().map(fdinfo).collect::<io::Result<_>>()?,
        })
    }

    /// Sectors written and discarded, as of completed requests.
    pub fn sectors(&self) -> io::Result<[u64; 2]> {
        read(&self.stat, |text| {
            let at = |place| text.split_ascii_whitespace().nth(place)?.parse().ok();
            Some([at(STAT_WRITE_SECTORS)?, at(STAT_DISCARD_SECTORS)?])
        })
    }

    /// Writes and discards in flight.
    pub fn writes_in_flight(&self) -> io::Result<u64> {
        read(&self.in_flight, |text| text.split_ascii_whitespace().nth(1)?.parse().ok())
    }

    /// Whether the kernel counts at all.
    pub fn is_counting(&self) -> io::Result<bool> {
        read(&self.iostats, |text| Some(text.trim() == "1"))
    }

    pub fn diskseq(&self) -> io::Result<u64> {
        read(&self.diskseq, |text| text.trim().parse().ok())
    }

    /// Size of the volume now, sectors.
    pub fn size_sectors(&self) -> io::Result<u64> {
        read(&self.size, |text| text.trim().parse().ok())
    }

    /// How often the kernel skipped each program because its own event interrupted it.
    pub fn recursion_misses(&self, program: usize) -> io::Result<u64> {
        read(&self.programs[program], |text| {
            let line = text.lines().find_map(|line| line.strip_prefix("recursion_misses:"))?;
            line.trim().parse().ok()
        })
    }
}

fn read<T>(file: &File, parse: impl FnOnce(&str) -> Option<T>) -> io::Result<T> {
    let mut answer = [0; ANSWER_BYTES_MAX];
    let length = file.read_at(&mut answer, 0)?;
    let text = std::str::from_utf8(&answer[..length]).ok();
    text.and_then(parse).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
