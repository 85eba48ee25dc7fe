//! A run: the index on disk of neighbouring epochs, `history/FROM-TO.run`. The bytes themselves
//! stay in the segments that it lists.
//!
//! Invariants: a run is written whole, made durable, and only then gets its name; it never changes
//! after that. Memory holds one fence a page of 4 KiB, never the pages. Nothing of a run is
//! believed whose digest is wrong; what is wrong is an error of the reader, never other bytes.
//! Layout in docs/formats.md.
//!
//! Pages are read, not mapped: a sector that cannot be read under a mapping ends the process.

use super::disk::{Disk, DiskFile};
use super::index::{FrameSpot, Origin, Piece};
use super::journal::{Place, Segment};
use super::segments::{HISTORY, Segments, remove};
use super::state::EpochFacts;
use secondsite_format::ids::{Epoch, VolumeId};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128};

/// `"SSR1"`.
const MAGIC: [u8; 4] = *b"SSR1";
/// Newest version of the layout; a higher one is refused.
pub const VERSION: u16 = 1;
const PAGE_BYTES: usize = 4096;
const PAGE_HEADER_BYTES: usize = 16;
/// Bytes of the index that a piece takes.
pub const PIECE_BYTES: usize = 32;
const PAGE_PIECES: usize = (PAGE_BYTES - PAGE_HEADER_BYTES) / PIECE_BYTES;
const FENCE_BYTES: usize = 16;
const SEGMENT_ROW_BYTES: usize = 32;
/// In the place of a position in a frame: the bytes are zero.
const ZERO: u32 = u32::MAX;
const SECTOR_BYTES: u64 = 512;
/// What a piece can name: 40 bits of sectors.
const VOLUME_BYTES_MAX: u64 = SECTOR_BYTES << 40;
/// Pages are gathered to writes of this size, bytes.
const WRITE_BYTES: usize = 1 << 20;
/// Largest table believed when a run is opened, bytes.
const TABLE_BYTES_MAX: u64 = 1 << 30;

/// Pieces of similar length stand together, so that few can reach into a range from before it:
/// class `c` holds those of at most `4096 << 2c` bytes.
fn class_of(bytes: u64) -> u32 {
    (0..).find(|class| bytes <= class_bytes_max(*class)).expect("a length has a class")
}

fn class_bytes_max(class: u32) -> u64 {
    4096u64.checked_shl(2 * class).filter(|bytes| *bytes >= 4096).unwrap_or(u64::MAX)
}

/// What a segment holds for a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentUse {
    /// Its number.
    pub number: u64,
    /// Uncompressed bytes of it that the run's first form showed.
    pub first_bytes: u64,
    /// Uncompressed bytes of it that the run shows now.
    pub live_bytes: u64,
    /// Size of the file when the run was written, bytes.
    pub file_bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Fence {
    start: u64,
    class: u32,
    page: u32,
}

/// An open run.
pub struct Run {
    disk: Arc<dyn Disk>,
    file: Arc<dyn DiskFile>,
    /// The epoch before its first.
    pub from: Epoch,
    /// Its last epoch.
    pub to: Epoch,
    /// One past the commit frame of its last epoch.
    pub end: Place,
    /// Facts of its epochs that are still points, rising, and of its last.
    pub facts: Vec<Arc<EpochFacts>>,
    /// Pieces in it.
    pub pieces: u64,
    /// Its segments, as [`Self::segments`].
    pub uses: Vec<SegmentUse>,
    segments: Vec<Arc<Segment>>,
    fences: Vec<Fence>,
    /// The fences of each class that has any.
    classes: Vec<Range<usize>>,
    doomed: AtomicBool,
}

/// The name of a run below the volume's folder.
pub fn name(from: Epoch, to: Epoch) -> String {
    format!("{HISTORY}/{:016x}-{:016x}.run", from.0, to.0)
}

/// The epochs in a file's name.
pub fn range(file_name: &str) -> Option<(Epoch, Epoch)> {
    let (from, to) = file_name.strip_suffix(".run")?.split_once('-')?;
    let number = |text: &str| match text.len() {
        16 => u64::from_str_radix(text, 16).ok().map(Epoch),
        _ => None,
    };
    Some((number(from)?, number(to)?))
}

fn damaged(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl Run {
    /// Opens one: its header, tables and facts are read and checked, its pages are not.
    pub fn open(segments: &Segments, volume: VolumeId, from: Epoch, to: Epoch) -> io::Result<Self> {
        let disk = segments.disk().clone();
        let file_name = name(from, to);
        let file = disk.open(&file_name)?;
        let wrong = |what: &str| damaged(format!("{file_name}: {what}"));
        let mut header = vec![0; PAGE_BYTES];
        if file.bytes()? < PAGE_BYTES as u64 {
            return Err(wrong("cut short"));
        }
        file.read_at(0, &mut header)?;
        let (u64_at, u32_at) = (|at: usize| u64_of(&header, at), |at: usize| u32_of(&header, at));
        if header[..4] != MAGIC {
            return Err(wrong("not a run"));
        }
        let version = u16::from_le_bytes([header[4], header[5]]);
        if version > VERSION {
            return Err(wrong(&format!(
                "written by a newer Secondsite (version {version}, this one reads up to \
                 {VERSION}): install the newer one again on the target"
            )));
        }
        if header[PAGE_BYTES - 16..] != xxh3_128(&header[..PAGE_BYTES - 16]).to_le_bytes() {
            return Err(wrong("its header is damaged"));
        }
        if header[16..32] != volume.0 || (u64_at(32), u64_at(40)) != (from.0, to.0) {
            return Err(wrong("it belongs elsewhere"));
        }
        let pages = u64_at(64);
        let (fences, uses, facts_bytes) = (u32_at(80) as usize, u32_at(84) as usize, u64_at(88));
        let bytes = (fences * FENCE_BYTES + uses * SEGMENT_ROW_BYTES) as u64 + facts_bytes;
        if bytes > TABLE_BYTES_MAX {
            return Err(wrong("its tables are larger than they can be"));
        }
        let mut tables = vec![0; bytes as usize];
        file.read_at((1 + pages) * PAGE_BYTES as u64, &mut tables)?;
        if header[96..112] != xxh3_128(&tables).to_le_bytes() {
            return Err(wrong("its tables are damaged"));
        }
        let (fence_bytes, rest) = tables.split_at(fences * FENCE_BYTES);
        let (use_bytes, fact_bytes) = rest.split_at(uses * SEGMENT_ROW_BYTES);
        let fence = |row: &[u8]| Fence {
            start: u64_of(row, 0),
            class: u32_of(row, 8),
            page: u32_of(row, 12),
        };
        let segment_use = |row: &[u8]| SegmentUse {
            number: u64_of(row, 0),
            first_bytes: u64_of(row, 8),
            live_bytes: u64_of(row, 16),
            file_bytes: u64_of(row, 24),
        };
        let facts: Vec<EpochFacts> = serde_json::from_slice(fact_bytes)
            .map_err(|error| wrong(&format!("its facts: {error}")))?;
        if facts.last().is_none_or(|last| last.epoch != to) {
            return Err(wrong("it lacks the facts of its last epoch"));
        }
        let fences: Vec<Fence> = fence_bytes.chunks_exact(FENCE_BYTES).map(fence).collect();
        let mut classes: Vec<Range<usize>> = Vec::new();
        for class in fences.chunk_by(|a, b| a.class == b.class) {
            let at = classes.last().map_or(0, |before| before.end);
            classes.push(at..at + class.len());
        }
        let uses: Vec<SegmentUse> =
            use_bytes.chunks_exact(SEGMENT_ROW_BYTES).map(segment_use).collect();
        Ok(Self {
            file,
            from,
            to,
            end: Place { segment: u64_at(48), offset: u64_at(56) },
            facts: facts.into_iter().map(Arc::new).collect(),
            pieces: u64_at(72),
            segments: uses.iter().map(|row| segments.get(row.number)).collect(),
            uses,
            fences,
            classes,
            doomed: AtomicBool::new(false),
            disk,
        })
    }

    /// The segments that its pieces lie in.
    pub fn segments(&self) -> &[Arc<Segment>] {
        &self.segments
    }

    /// Facts of its last epoch.
    pub fn last(&self) -> &Arc<EpochFacts> {
        self.facts.last().expect("opening checked it")
    }

    /// It is superseded: its file goes with its last reader.
    pub fn doom(&self) {
        // Relaxed: whoever drops the last reference sees it through that reference's count.
        self.doomed.store(true, Ordering::Relaxed);
    }

    /// See [`super::layers::Layer::pieces`].
    pub fn pieces(&self, start: u64, end: u64, upto: Epoch, to: &mut Vec<Piece>) -> io::Result<()> {
        let first = to.len();
        for class in &self.classes {
            self.scan(&self.fences[class.clone()], start, end, |piece| {
                if piece.epoch <= upto {
                    to.extend(piece.within(start, end));
                }
                false
            })?;
        }
        to[first..].sort_by_key(|piece| piece.epoch);
        Ok(())
    }

    /// See [`super::layers::Layer::next_from`].
    pub fn next_from(&self, offset: u64, upto: Epoch) -> io::Result<Option<u64>> {
        let mut next: Option<u64> = None;
        for fences in self.fences.chunk_by(|a, b| a.class == b.class) {
            let until = next.unwrap_or(u64::MAX);
            self.scan(fences, offset, until, |piece| {
                let found = piece.end > offset && piece.epoch <= upto;
                if found {
                    next = Some(piece.start.max(offset));
                }
                found // starts only rise from here
            })?;
        }
        Ok(next)
    }

    /// Shows the pieces of a class that may touch `start..end`, by start, until told to stop.
    fn scan(
        &self,
        fences: &[Fence],
        start: u64,
        end: u64,
        mut stop: impl FnMut(&Piece) -> bool,
    ) -> io::Result<()> {
        let Some(class) = fences.first().map(|fence| fence.class) else { return Ok(()) };
        let reaches_from = start.saturating_sub(class_bytes_max(class) - 1);
        // The page before the first fence that is not below: equal starts may begin in it.
        let first = fences.partition_point(|fence| fence.start < reaches_from).saturating_sub(1);
        let mut page = [0; PAGE_BYTES];
        for fence in fences[first..].iter().take_while(|fence| fence.start < end) {
            for row in self.page(fence, &mut page)?.chunks_exact(PIECE_BYTES) {
                let piece = decode(row);
                if piece.start >= end {
                    return Ok(());
                }
                if piece.end > start && stop(&piece) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn page<'a>(&self, fence: &Fence, page: &'a mut [u8; PAGE_BYTES]) -> io::Result<&'a [u8]> {
        self.file.read_at((1 + u64::from(fence.page)) * PAGE_BYTES as u64, page)?;
        let digest = xxh3_64_with_seed(&page[8..], u64::from(fence.page));
        let count = u32_of(page, 12) as usize;
        if u64_of(page, 0) != digest || u32_of(page, 8) != fence.class || count > PAGE_PIECES {
            let name = name(self.from, self.to);
            return Err(damaged(format!("{name}: page {} is damaged", fence.page)));
        }
        Ok(&page[PAGE_HEADER_BYTES..][..count * PIECE_BYTES])
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if *self.doomed.get_mut() && !std::thread::panicking() {
            remove(&*self.disk, &name(self.from, self.to));
        }
    }
}

/// Writes a run: pieces by rising start (and epoch), then [`Writer::finish`].
pub struct Writer {
    disk: Arc<dyn Disk>,
    file: Arc<dyn DiskFile>,
    volume: VolumeId,
    range: (Epoch, Epoch),
    open: Vec<Vec<u8>>,
    fences: Vec<Fence>,
    gathered: Vec<u8>,
    written: u64,
    pieces: u64,
}

impl Writer {
    /// Begins one, under a name that no reader takes for a run.
    pub fn new(disk: Arc<dyn Disk>, volume: VolumeId, from: Epoch, to: Epoch) -> io::Result<Self> {
        let file = disk.create(&format!("{}.new", name(from, to)))?;
        Ok(Self {
            disk,
            file,
            volume,
            range: (from, to),
            open: Vec::new(),
            fences: Vec::new(),
            gathered: Vec::new(),
            written: PAGE_BYTES as u64,
            pieces: 0,
        })
    }

    /// Adds a piece.
    pub fn add(&mut self, piece: &Piece) -> io::Result<()> {
        if piece.end > VOLUME_BYTES_MAX {
            return Err(damaged("a volume of more than 512 TiB keeps no history"));
        }
        let class = class_of(piece.end - piece.start);
        while self.open.len() <= class as usize {
            self.open.push(Vec::with_capacity(PAGE_PIECES * PIECE_BYTES));
        }
        self.open[class as usize].extend_from_slice(&encode(piece));
        self.pieces += 1;
        if self.open[class as usize].len() == PAGE_PIECES * PIECE_BYTES {
            self.end_page(class)?;
        }
        Ok(())
    }

    fn end_page(&mut self, class: u32) -> io::Result<()> {
        let rows = std::mem::take(&mut self.open[class as usize]);
        let number = (self.written as usize + self.gathered.len()) / PAGE_BYTES - 1;
        let mut page = [0; PAGE_BYTES];
        page[8..12].copy_from_slice(&class.to_le_bytes());
        page[12..16].copy_from_slice(&((rows.len() / PIECE_BYTES) as u32).to_le_bytes());
        page[PAGE_HEADER_BYTES..][..rows.len()].copy_from_slice(&rows);
        let digest = xxh3_64_with_seed(&page[8..], number as u64);
        page[..8].copy_from_slice(&digest.to_le_bytes());
        self.fences.push(Fence {
            start: decode(&rows[..PIECE_BYTES]).start,
            class,
            page: number as u32,
        });
        self.gathered.extend_from_slice(&page);
        if self.gathered.len() >= WRITE_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_at(self.written, &self.gathered)?;
        self.written += self.gathered.len() as u64;
        self.gathered.clear();
        Ok(())
    }

    /// Makes it durable under its name, in the place of a run of the same epochs.
    pub fn finish(
        mut self,
        end: Place,
        facts: &[Arc<EpochFacts>],
        uses: &[SegmentUse],
    ) -> io::Result<()> {
        for class in 0..self.open.len() as u32 {
            if !self.open[class as usize].is_empty() {
                self.end_page(class)?;
            }
        }
        self.flush()?;
        self.fences.sort_by_key(|fence| (fence.class, fence.start, fence.page));
        let mut tables = Vec::new();
        for fence in &self.fences {
            tables.extend_from_slice(&fence.start.to_le_bytes());
            tables.extend_from_slice(&fence.class.to_le_bytes());
            tables.extend_from_slice(&fence.page.to_le_bytes());
        }
        for row in uses {
            for number in [row.number, row.first_bytes, row.live_bytes, row.file_bytes] {
                tables.extend_from_slice(&number.to_le_bytes());
            }
        }
        let facts: Vec<&EpochFacts> = facts.iter().map(|facts| &**facts).collect();
        let text = serde_json::to_vec(&facts).expect("plain data has a JSON form");
        tables.extend_from_slice(&text);
        self.file.write_at(self.written, &tables)?;
        let pages = self.written / PAGE_BYTES as u64 - 1;
        let mut header = vec![0; PAGE_BYTES];
        header[..4].copy_from_slice(&MAGIC);
        header[4..6].copy_from_slice(&VERSION.to_le_bytes());
        header[16..32].copy_from_slice(&self.volume.0);
        let (from, to) = self.range;
        for (at, number) in [
            (32, from.0),
            (40, to.0),
            (48, end.segment),
            (56, end.offset),
            (64, pages),
            (72, self.pieces),
            (88, text.len() as u64),
        ] {
            header[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        header[80..84].copy_from_slice(&(self.fences.len() as u32).to_le_bytes());
        header[84..88].copy_from_slice(&(uses.len() as u32).to_le_bytes());
        header[96..112].copy_from_slice(&xxh3_128(&tables).to_le_bytes());
        let digest = xxh3_128(&header[..PAGE_BYTES - 16]);
        header[PAGE_BYTES - 16..].copy_from_slice(&digest.to_le_bytes());
        self.file.write_at(0, &header)?;
        self.file.sync()?;
        let name = name(from, to);
        self.disk.rename(&format!("{name}.new"), &name)?;
        self.disk.sync_names(HISTORY)
    }
}

fn encode(piece: &Piece) -> [u8; PIECE_BYTES] {
    let (frame, at) = match piece.origin {
        Origin::Zero => (FrameSpot { segment: 0, offset: 0, bytes: 0 }, ZERO),
        Origin::Payload { frame, at } => (frame, at),
    };
    let sectors = (piece.end - piece.start) / SECTOR_BYTES;
    let mut row = [0; PIECE_BYTES];
    // Start in sectors leaves room for 40 bits of it, and for 40 bits of length.
    let (start, place) = (piece.start / SECTOR_BYTES, u64::from(frame.segment));
    row[..5].copy_from_slice(&start.to_le_bytes()[..5]);
    row[5..10].copy_from_slice(&sectors.to_le_bytes()[..5]);
    row[10..16].copy_from_slice(&piece.epoch.0.to_le_bytes()[..6]);
    row[16..20].copy_from_slice(&place.to_le_bytes()[..4]);
    row[20..24].copy_from_slice(&frame.offset.to_le_bytes());
    row[24..28].copy_from_slice(&frame.bytes.to_le_bytes());
    row[28..].copy_from_slice(&at.to_le_bytes());
    row
}

fn decode(row: &[u8]) -> Piece {
    let number = |at: usize, count: usize| {
        let mut bytes = [0; 8];
        bytes[..count].copy_from_slice(&row[at..at + count]);
        u64::from_le_bytes(bytes)
    };
    let start = number(0, 5) * SECTOR_BYTES;
    let frame =
        FrameSpot { segment: u32_of(row, 16), offset: u32_of(row, 20), bytes: u32_of(row, 24) };
    let origin = match u32_of(row, 28) {
        ZERO => Origin::Zero,
        at => Origin::Payload { frame, at },
    };
    let end = start + number(5, 5) * SECTOR_BYTES;
    Piece { start, end, origin, epoch: Epoch(number(10, 6)), of: 0 }
}

fn u64_of(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn u32_of(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}
