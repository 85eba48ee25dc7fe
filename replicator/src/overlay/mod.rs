//! What is written to an opened recovery point: a copy-on-write overlay over a device that stays
//! as it is.
//!
//! Two sparse files in a folder of its own. `scratch` holds written blocks at their own offsets;
//! `scratch.map` says of each block whether it is as in the base, in `scratch`, or zero ([`map`]).
//!
//! Invariants: a block's data is in `scratch` before its state says so, whole, and the state is set
//! before the write is answered: a process killed at any instant loses nothing that it answered,
//! and [`Overlay::open`] goes on where it was. What was flushed also survives a power cut; a block
//! written since the last flush may then read as zero, with all of its 4 KiB.
//! `scratch` never holds more than the limit, and memory does not grow with the volume.
//! Who changes states holds the region's lock alone; who overwrites blocks that are in `scratch`
//! already shares it; readers take none, and see a block as it was before or after.

mod map;
#[cfg(test)]
mod tests;

use crate::nbd::{Device, Run, Zeroing};
use map::{BLOCK_BYTES, Map, REGION_BLOCKS, State};
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

const SCRATCH_FILE: &str = "scratch";
const MAP_FILE: &str = "scratch.map";
/// Regions share this many locks.
const STRIPES: usize = 64;
const REGION_BYTES: u64 = REGION_BLOCKS * BLOCK_BYTES;
/// Blocks whose states are looked at in one go where a whole range is described.
const EXTENTS_BLOCKS: u64 = 16 << 10;
/// Zeros are written in parts of this size where space is to be taken for them.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

/// Why an overlay is not opened.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The system refused.
    #[error("overlay {path}: {cause}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        cause: io::Error,
    },
    /// It was made for another volume or base.
    #[error("{0} belongs to another recovery point or volume, or is damaged")]
    Other(PathBuf),
    /// Another process has it open, or this one.
    #[error("{0} is in use")]
    InUse(PathBuf),
}

impl OverlayError {
    fn at(path: &Path) -> impl Fn(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |cause| Self::Io { path: path.clone(), cause }
    }
}

/// A device that reads as its base until it is written.
pub struct Overlay {
    base: Arc<dyn Device>,
    bytes: u64,
    map: Map,
    scratch: File,
    /// A region's blocks change their state only under its lock.
    stripes: [RwLock<()>; STRIPES],
    /// Blocks in `scratch`; relaxed, since nothing else is read by it.
    used_blocks: AtomicU64,
    blocks_max: u64,
    /// A sync has failed: what it should have saved may be gone, and no later one says so.
    lost: AtomicBool,
}

impl Overlay {
    /// Opens the overlay in `folder`, or makes one where there is none. `identity` stands for the
    /// content of `base`: over another one it is refused. At most `bytes_max` are kept in `scratch`.
    pub fn open(
        folder: &Path,
        base: Arc<dyn Device>,
        identity: &[u8; 32],
        bytes_max: u64,
    ) -> Result<Self, OverlayError> {
        let bytes = base.bytes();
        let (scratch_path, map_path) = (folder.join(SCRATCH_FILE), folder.join(MAP_FILE));
        let failed = OverlayError::at(&scratch_path);
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        let (map, scratch) = match Map::open(&map_path, bytes, identity)? {
            Some(map) => (map, options.open(&scratch_path).map_err(&failed)?),
            None => {
                options.create(true).truncate(true);
                let scratch = options.open(&scratch_path).map_err(&failed)?;
                scratch.set_len(bytes.next_multiple_of(BLOCK_BYTES)).map_err(&failed)?;
                scratch.sync_all().map_err(&failed)?;
                let map = Map::create(&map_path, bytes, identity)?;
                let names = File::open(folder).and_then(|folder| folder.sync_all());
                names.map_err(OverlayError::at(folder))?;
                (map, scratch)
            }
        };
        if scratch.metadata().map_err(&failed)?.len() != bytes.next_multiple_of(BLOCK_BYTES) {
            return Err(OverlayError::Other(scratch_path));
        }
        let used = map.count_scratch().map_err(OverlayError::at(&map_path))?;
        Ok(Self {
            base,
            bytes,
            map,
            scratch,
            stripes: [const { RwLock::new(()) }; STRIPES],
            used_blocks: AtomicU64::new(used),
            blocks_max: bytes_max / BLOCK_BYTES,
            lost: AtomicBool::new(false),
        })
    }

    /// Throws away what lies in `folder`; one that is open goes on without names, until it is dropped.
    pub fn remove(folder: &Path) -> io::Result<()> {
        // The map first: without it the other is nothing.
        for name in [MAP_FILE, SCRATCH_FILE] {
            match std::fs::remove_file(folder.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Bytes in `scratch`.
    pub fn used_bytes(&self) -> u64 {
        self.used_blocks.load(Ordering::Relaxed) * BLOCK_BYTES
    }

    fn stripe(&self, offset: u64) -> &RwLock<()> {
        &self.stripes[(offset / REGION_BYTES) as usize % STRIPES]
    }

    /// The end of a block, within the volume.
    fn end_of(&self, block: u64) -> u64 {
        ((block + 1) * BLOCK_BYTES).min(self.bytes)
    }

    /// The blocks that lie in the range as a whole.
    fn whole_blocks(&self, range: &Range<u64>) -> Range<u64> {
        let start = range.start.div_ceil(BLOCK_BYTES);
        let end = if range.end == self.bytes {
            self.bytes.div_ceil(BLOCK_BYTES)
        } else {
            range.end / BLOCK_BYTES
        };
        start..end.max(start)
    }

    /// Writes a range within one region.
    fn write_part(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let range = offset..offset + data.len() as u64;
        let blocks = blocks_of(&range);
        let stripe = self.stripe(offset);
        {
            let _shared = stripe.read().unwrap_or_else(PoisonError::into_inner);
            let states = self.map.read(blocks.clone())?;
            if blocks.clone().all(|block| states.get(block) == State::Scratch) {
                return self.scratch.write_all_at(data, offset);
            }
        }
        let _alone = stripe.write().unwrap_or_else(PoisonError::into_inner);
        let states = self.map.read(blocks.clone())?;
        let new = blocks.end - blocks.start - states.count(State::Scratch);
        self.reserve(new)?;
        let done = (|| {
            // What the write leaves of its first and last block comes from where it was.
            for block in [blocks.start, blocks.end - 1] {
                let whole = block * BLOCK_BYTES >= range.start && self.end_of(block) <= range.end;
                if !whole && states.get(block) != State::Scratch {
                    self.fill(block, states.get(block))?;
                }
                if blocks.end - blocks.start == 1 {
                    break;
                }
            }
            self.scratch.write_all_at(data, offset)?;
            if new > 0 { self.map.set(states, State::Scratch) } else { Ok(()) }
        })();
        if done.is_err() {
            // Whatever was written, nothing says that it counts.
            self.used_blocks.fetch_sub(new, Ordering::Relaxed);
        }
        done
    }

    /// Puts a block's content into `scratch`; its state does not change.
    fn fill(&self, block: u64, state: State) -> io::Result<()> {
        let mut content = [0; BLOCK_BYTES as usize];
        let start = block * BLOCK_BYTES;
        let content = &mut content[..(self.end_of(block) - start) as usize];
        if state == State::Base {
            self.base.read_at(start, content)?;
        }
        self.scratch.write_all_at(content, start)
    }

    fn reserve(&self, blocks: u64) -> io::Result<()> {
        let within =
            |used| Some(used + blocks).filter(|used| *used <= self.blocks_max || blocks == 0);
        let relaxed = Ordering::Relaxed;
        match self.used_blocks.fetch_update(relaxed, relaxed, within) {
            Ok(_) => Ok(()),
            Err(_) => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }

    /// Makes whole blocks within one region zero, and gives their space back.
    fn zero_part(&self, blocks: Range<u64>) -> io::Result<()> {
        let offset = blocks.start * BLOCK_BYTES;
        let bytes = (blocks.end - blocks.start) * BLOCK_BYTES;
        let _alone = self.stripe(offset).write().unwrap_or_else(PoisonError::into_inner);
        let states = self.map.read(blocks.clone())?;
        if states.count(State::Zero) == blocks.end - blocks.start {
            return Ok(());
        }
        let freed = states.count(State::Scratch);
        self.map.set(states, State::Zero)?;
        self.used_blocks.fetch_sub(freed, Ordering::Relaxed);
        if freed > 0 {
            let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&self.scratch, punch, offset as i64, bytes as i64)?;
        }
        Ok(())
    }

    fn zero_blocks(&self, blocks: Range<u64>) -> io::Result<()> {
        parts(blocks, REGION_BLOCKS).try_for_each(|part| self.zero_part(part))
    }

    /// Makes less than a block zero.
    fn zero_piece(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let states = self.map.read(blocks_of(&range))?;
        if states.count(State::Zero) == blocks_of(&range).count() as u64 {
            return Ok(());
        }
        self.write_at(range.start, &ZEROS[..(range.end - range.start) as usize])
    }
}

impl Device for Overlay {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let range = offset..offset + buffer.len() as u64;
        if range.is_empty() {
            return Ok(());
        }
        let states = self.map.read(blocks_of(&range))?;
        for (blocks, state) in states.runs() {
            let run = bytes_of(&blocks, &range);
            let part = &mut buffer[(run.start - offset) as usize..(run.end - offset) as usize];
            match state {
                State::Base => self.base.read_at(run.start, part)?,
                State::Scratch => self.scratch.read_exact_at(part, run.start)?,
                State::Zero => part.fill(0),
            }
        }
        Ok(())
    }

    fn extents(&self, offset: u64, bytes: u64, limit: usize) -> io::Result<Vec<Run>> {
        let range = offset..offset + bytes;
        let mut runs = Runs { runs: Vec::new(), limit };
        for part in parts(blocks_of(&range), EXTENTS_BLOCKS) {
            for (blocks, state) in self.map.read(part)?.runs() {
                let run = bytes_of(&blocks, &range);
                let whole = run.end - run.start;
                let goes_on = match state {
                    State::Scratch => runs.add(whole, false),
                    State::Zero => runs.add(whole, true),
                    State::Base => runs.add_base(&*self.base, run)?,
                };
                if !goes_on {
                    return Ok(runs.runs);
                }
            }
        }
        Ok(runs.runs)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        parts(offset..offset + data.len() as u64, REGION_BYTES).try_for_each(|part| {
            let data = &data[(part.start - offset) as usize..(part.end - offset) as usize];
            self.write_part(part.start, data)
        })
    }

    fn zero(&self, offset: u64, bytes: u64, how: Zeroing) -> io::Result<()> {
        let range = offset..offset + bytes;
        if how.no_hole && how.fast {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        if how.no_hole {
            return parts(range, ZEROS.len() as u64).try_for_each(|part| {
                self.write_at(part.start, &ZEROS[..(part.end - part.start) as usize])
            });
        }
        let whole = self.whole_blocks(&range);
        if whole.is_empty() {
            return self.zero_piece(range);
        }
        self.zero_piece(range.start..whole.start * BLOCK_BYTES)?;
        self.zero_blocks(whole.clone())?;
        self.zero_piece((whole.end * BLOCK_BYTES).min(range.end)..range.end)
    }

    fn trim(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.zero_blocks(self.whole_blocks(&(offset..offset + bytes)))
    }

    fn flush(&self) -> io::Result<()> {
        if self.lost.load(Ordering::Acquire) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        // In this order: no state without its data.
        let done = self.scratch.sync_data().and_then(|()| self.map.sync());
        if done.is_err() {
            self.lost.store(true, Ordering::Release);
        }
        done
    }
}

/// Runs so far, neighbours of one kind as one.
struct Runs {
    runs: Vec<Run>,
    limit: usize,
}

impl Runs {
    /// Adds one; `false`: there is no room.
    fn add(&mut self, bytes: u64, hole: bool) -> bool {
        let full = self.runs.len() == self.limit;
        match self.runs.last_mut() {
            Some(last) if last.hole == hole => last.bytes += bytes,
            _ if full => return false,
            _ => self.runs.push(Run { bytes, hole }),
        }
        true
    }

    /// Adds what the base has in a range.
    fn add_base(&mut self, base: &dyn Device, mut range: Range<u64>) -> io::Result<bool> {
        while !range.is_empty() {
            // One more than there is room for: the first may belong to the last that there is.
            let room = self.limit - self.runs.len() + 1;
            let found = base.extents(range.start, range.end - range.start, room)?;
            let before = range.start;
            for run in found {
                let bytes = run.bytes.min(range.end - range.start);
                if bytes > 0 && !self.add(bytes, run.hole) {
                    return Ok(false);
                }
                range.start += bytes;
            }
            if range.start == before {
                // A base that knows nothing has data.
                return Ok(self.add(range.end - range.start, false));
            }
        }
        Ok(true)
    }
}

/// The blocks that a range of bytes touches.
fn blocks_of(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)
}

/// The bytes of blocks, as far as they lie in the range.
fn bytes_of(blocks: &Range<u64>, range: &Range<u64>) -> Range<u64> {
    (blocks.start * BLOCK_BYTES).max(range.start)..(blocks.end * BLOCK_BYTES).min(range.end)
}

/// Cuts a range where multiples of `size` lie in it.
fn parts(range: Range<u64>, size: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let start = at;
        at = (start / size * size + size).min(range.end);
        (start < range.end).then_some(start..at)
    })
}
