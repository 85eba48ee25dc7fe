//! Where each block of an overlay's volume stands: two bits a block in a sparse file.
//!
//! The bits are read and written through the page cache, not kept in memory: a killed process loses
//! none that it wrote, a volume of any size takes no memory, and a full or failing file system is
//! an error of one request (with a mapped file it would be a signal that ends the process).
//! Who changes bits holds the lock of their region; readers need none.

use super::OverlayError;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Bytes of a block: what is copied on the first write to a part of it.
pub const BLOCK_BYTES: u64 = 4096;
/// Blocks of a region, which is locked as one: no byte of the file holds bits of two.
pub const REGION_BLOCKS: u64 = 1024;

const BLOCKS_IN_BYTE: u64 = 4;
const _: () = assert!(REGION_BLOCKS.is_multiple_of(BLOCKS_IN_BYTE));
/// The bits begin here.
const HEADER_BYTES: u64 = 4096;
const MAGIC: [u8; 8] = *b"2ndScrMp";
const VERSION: u32 = 1;
/// Read in one go where all bits are counted.
const COUNT_BYTES: usize = 64 << 10;

/// Where a block stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// As in the base.
    Base,
    /// In the scratch file.
    Scratch,
    /// It reads as zero.
    Zero,
}

/// The states of some blocks, as they were when read.
pub struct States {
    bytes: Vec<u8>,
    /// The first block of `bytes`.
    first: u64,
    range: Range<u64>,
}

impl States {
    /// Of a block in the range.
    pub fn get(&self, block: u64) -> State {
        let at = block - self.first;
        match self.bytes[(at / BLOCKS_IN_BYTE) as usize] >> (at % BLOCKS_IN_BYTE * 2) & 3 {
            0 => State::Base,
            1 => State::Scratch,
            // 3 is never written.
            _ => State::Zero,
        }
    }

    /// Blocks in this state.
    pub fn count(&self, state: State) -> u64 {
        self.range.clone().filter(|block| self.get(*block) == state).count() as u64
    }

    /// The longest runs of one state, in order.
    pub fn runs(&self) -> impl Iterator<Item = (Range<u64>, State)> {
        let mut at = self.range.start;
        std::iter::from_fn(move || {
            let start = at;
            let state = (start < self.range.end).then(|| self.get(start))?;
            while at < self.range.end && self.get(at) == state {
                at += 1;
            }
            Some((start..at, state))
        })
    }
}

/// The file.
pub struct Map {
    file: File,
}

impl Map {
    /// Makes one in which all blocks are as in the base; it gets its name when it is whole.
    pub fn create(path: &Path, bytes: u64, identity: &[u8; 32]) -> Result<Self, OverlayError> {
        let failed = OverlayError::at(path);
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(&new).map_err(&failed)?;
        lock(&file, path)?;
        let blocks = bytes.div_ceil(BLOCK_BYTES);
        file.set_len(HEADER_BYTES + blocks.div_ceil(BLOCKS_IN_BYTE)).map_err(&failed)?;
        file.write_all_at(&header(bytes, identity), 0).map_err(&failed)?;
        file.sync_all().map_err(&failed)?;
        std::fs::rename(&new, path).map_err(&failed)?;
        Ok(Self { file })
    }

    /// Opens one that was made for this volume and base; `None`: there is none.
    pub fn open(
        path: &Path,
        bytes: u64,
        identity: &[u8; 32],
    ) -> Result<Option<Self>, OverlayError> {
        let failed = OverlayError::at(path);
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        lock(&file, path)?;
        let mut found = [0; HEADER_USED];
        let blocks = bytes.div_ceil(BLOCK_BYTES);
        let length = file.metadata().map_err(&failed)?.len();
        let read = file.read_exact_at(&mut found, 0);
        if read.is_err()
            || found != header(bytes, identity)
            || length != HEADER_BYTES + blocks.div_ceil(BLOCKS_IN_BYTE)
        {
            return Err(OverlayError::Other(path.into()));
        }
        Ok(Some(Self { file }))
    }

    /// The states of a range of blocks.
    pub fn read(&self, range: Range<u64>) -> io::Result<States> {
        let first = range.start / BLOCKS_IN_BYTE * BLOCKS_IN_BYTE;
        let mut bytes = vec![0; (range.end - first).div_ceil(BLOCKS_IN_BYTE) as usize];
        self.file.read_exact_at(&mut bytes, HEADER_BYTES + first / BLOCKS_IN_BYTE)?;
        Ok(States { bytes, first, range })
    }

    /// Gives all of these blocks, which lie in one region whose lock the caller holds since they
    /// were read, another state.
    pub fn set(&self, mut states: States, state: State) -> io::Result<()> {
        let bits = match state {
            State::Base => 0,
            State::Scratch => 1,
            State::Zero => 2,
        };
        for block in states.range.clone() {
            let at = block - states.first;
            let byte = &mut states.bytes[(at / BLOCKS_IN_BYTE) as usize];
            let shift = at % BLOCKS_IN_BYTE * 2;
            *byte = *byte & !(3 << shift) | bits << shift;
        }
        self.file.write_all_at(&states.bytes, HEADER_BYTES + states.first / BLOCKS_IN_BYTE)
    }

    /// All blocks in the scratch file; holes of the map, where none is, are passed over.
    pub fn count_scratch(&self) -> io::Result<u64> {
        let end = self.file.metadata()?.len();
        let (mut at, mut count) = (HEADER_BYTES, 0);
        let mut buffer = vec![0; COUNT_BYTES];
        while at < end {
            at = match lseek(&self.file, at as i64, Whence::SeekData) {
                Ok(data) => data as u64,
                Err(Errno::ENXIO) => break,
                Err(error) => return Err(error.into()),
            };
            let part = &mut buffer[..COUNT_BYTES.min((end - at) as usize)];
            self.file.read_exact_at(part, at)?;
            count += part
                .iter()
                .map(|byte| u64::from((byte & !(byte >> 1) & 0x55).count_ones()))
                .sum::<u64>();
            at += part.len() as u64;
        }
        Ok(count)
    }

    /// What was set is durable when this returns.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

const HEADER_USED: usize = 56;

/// Magic, version, bytes of a block, bytes of the volume, identity of the base.
fn header(bytes: u64, identity: &[u8; 32]) -> [u8; HEADER_USED] {
    let mut header = [0; HEADER_USED];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&(BLOCK_BYTES as u32).to_le_bytes());
    header[16..24].copy_from_slice(&bytes.to_le_bytes());
    header[24..].copy_from_slice(identity);
    header
}

fn lock(file: &File, path: &Path) -> Result<(), OverlayError> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(std::fs::TryLockError::WouldBlock) => Err(OverlayError::InUse(path.into())),
        Err(std::fs::TryLockError::Error(error)) => Err(OverlayError::at(path)(error)),
    }
}
