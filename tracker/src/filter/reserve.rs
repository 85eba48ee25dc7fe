//! What lies on a reserve: who owns which part, and in each part a volume's write-intent log, its
//! bitmap on disk and its spill area. Bytes only: no I/O.
//!
//! Everything is little-endian and comes in pages of 4096 bytes that end with a digest: XXH3-128 of
//! what comes before it, and of where the page lies, so that a page is good in its own place only.
//! The first two pages of the device are the superblock, twice: the one with the higher number that
//! is whole counts, and the other one is written next. The same holds for the two pages of a log.
//!
//! | superblock | holds |
//! |---|---|
//! | 0 | `SSRESERV` |
//! | 8 | version (u16, 1), zero (u16), parts (u32) |
//! | 16 | number, one more with each change |
//! | 24 | bytes of the device |
//! | 32 | the machine that owns it (32 bytes of text) |
//! | 64 | parts, 96 bytes each: id of the volume (64 bytes of text), start and length of the part in bytes, bytes of the volume, bytes of a block (u32), spill slots (u32) |
//!
//! | log | holds |
//! |---|---|
//! | 0 | `SSINTENT` |
//! | 8 | version (u16, 1), flags (u16: 1 void, all is compared; 2 a compare was due), regions (u32) |
//! | 16 | number, one more with each record |
//! | 24 | which device the volume is: a digest of what its hardware says |
//! | 32 | the cut: epoch, cut id (16), 1 if it stood, acknowledged epoch, its cut id (16) |
//! | 88 | active regions, 4 bytes each, rising |
//!
//! A part is: two pages of log; the bitmap on disk; from the next 4096 bytes on the spill slots. A
//! page of the bitmap has a bit a block for as many whole regions as fit into 4080 bytes.

use crate::filter::intent::{ACTIVE_MAX, REGION_BYTES};
use xxhash_rust::xxh3::Xxh3;

/// A page.
pub const PAGE_BYTES: usize = 4096;
/// What of it comes before its digest.
const BODY_BYTES: usize = PAGE_BYTES - 16;
/// Where the first part may begin.
pub const PARTS_START: u64 = 2 * PAGE_BYTES as u64;
/// Parts of a reserve at most.
pub const PARTS_MAX: usize = (BODY_BYTES - AT_PARTS) / PART_BYTES;
/// Spill of one part at least.
pub const SPILL_BYTES_MIN: u64 = 1 << 20;

const VERSION: u16 = 1;
const SUPER: &[u8; 8] = b"SSRESERV";
const LOG: &[u8; 8] = b"SSINTENT";
const AT_PARTS: usize = 64;
const PART_BYTES: usize = 96;
const ID_BYTES: usize = 64;
const OWNER_BYTES: usize = 32;
const AT_REGIONS: usize = 88;
const VOID: u16 = 1;
const COMPARE_DUE: u16 = 2;

const _: () = assert!(AT_REGIONS + 4 * ACTIVE_MAX <= BODY_BYTES);

/// Why a page is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// It never was one of these.
    #[error("it is none")]
    Foreign,
    /// A newer Secondsite wrote it.
    #[error("version {0} is newer than this program")]
    Newer(u16),
    /// Its digest, or a field, is wrong.
    #[error("it is damaged")]
    Damaged,
}

/// A volume's part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The volume.
    pub id: String,
    /// Where it begins, bytes.
    pub start: u64,
    /// Its length, bytes.
    pub bytes: u64,
    /// Size of the volume, bytes.
    pub volume_bytes: u64,
    /// Unit of tracking, bytes.
    pub block_bytes: u32,
    /// Blocks that are preserved here at most.
    pub spill_slots: u32,
}

/// The superblock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// One more with each change.
    pub number: u64,
    /// Of the device.
    pub bytes: u64,
    /// The machine that writes to it.
    pub owner: String,
    /// Who owns what; by start.
    pub parts: Vec<Part>,
}

/// Why there is no part for a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoPart {
    /// Nothing fits any more.
    #[error("it is full: the volume needs a part of {0} bytes at least")]
    Full(u64),
    /// Nothing would fit into a reserve of this size.
    #[error("it is too small: the volume needs {0} bytes at least")]
    TooSmall(u64),
}

impl Superblock {
    /// Of a new reserve.
    pub fn new(bytes: u64, owner: &str) -> Self {
        Self { number: 0, bytes, owner: owner.into(), parts: Vec::new() }
    }

    /// Its bytes; they go to page `number % 2`.
    ///
    /// # Panics
    /// If it has more parts, or longer names, than fit.
    pub fn encode(&self) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        page[..8].copy_from_slice(SUPER);
        put(&mut page, 8, VERSION.to_le_bytes());
        put(&mut page, 12, (self.parts.len() as u32).to_le_bytes());
        put(&mut page, 16, self.number.to_le_bytes());
        put(&mut page, 24, self.bytes.to_le_bytes());
        put_text(&mut page[32..AT_PARTS], &self.owner);
        assert!(self.parts.len() <= PARTS_MAX, "parts");
        for (part, at) in self.parts.iter().zip((AT_PARTS..).step_by(PART_BYTES)) {
            put_text(&mut page[at..at + ID_BYTES], &part.id);
            put(&mut page, at + 64, part.start.to_le_bytes());
            put(&mut page, at + 72, part.bytes.to_le_bytes());
            put(&mut page, at + 80, part.volume_bytes.to_le_bytes());
            put(&mut page, at + 88, part.block_bytes.to_le_bytes());
            put(&mut page, at + 92, part.spill_slots.to_le_bytes());
        }
        seal(&mut page, self.number % 2);
        page
    }

    /// Reads the pages that a reserve of this size begins with.
    pub fn decode(pages: &[u8], bytes: u64) -> Result<Self, PageError> {
        let both = [0, 1].map(|at| Self::page(&pages[at * PAGE_BYTES..][..PAGE_BYTES], at as u64));
        let newest = both.iter().flatten().max_by_key(|one| one.number);
        match newest {
            Some(found) if found.bytes == bytes => Ok(found.clone()),
            Some(_) => Err(PageError::Damaged),
            None => both
                .into_iter()
                .flat_map(Result::err)
                .max_by_key(|error| *error != PageError::Foreign)
                .map_or(Err(PageError::Foreign), Err),
        }
    }

    fn page(page: &[u8], place: u64) -> Result<Self, PageError> {
        open(page, SUPER, place)?;
        let parts = u32_at(page, 12) as usize;
        if parts > PARTS_MAX {
            return Err(PageError::Damaged);
        }
        let parts = (0..parts).map(|n| {
            let at = AT_PARTS + n * PART_BYTES;
            let part = Part {
                id: text_at(&page[at..at + ID_BYTES])?,
                start: u64_at(page, at + 64),
                bytes: u64_at(page, at + 72),
                volume_bytes: u64_at(page, at + 80),
                block_bytes: u32_at(page, at + 88),
                spill_slots: u32_at(page, at + 92),
            };
            let sound = (4096..=1 << 20).contains(&part.block_bytes)
                && part.block_bytes.is_power_of_two()
                && part.volume_bytes > 0
                && part.start >= PARTS_START
                && part.start.is_multiple_of(PAGE_BYTES as u64)
                && part.places().needs(part.spill_slots) <= part.bytes;
            sound.then_some(part).ok_or(PageError::Damaged)
        });
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        let (number, bytes) = (u64_at(page, 16), u64_at(page, 24));
        let mut end = PARTS_START;
        for part in &parts {
            if part.start < end || part.bytes > bytes || part.start > bytes - part.bytes {
                return Err(PageError::Damaged);
            }
            end = part.start + part.bytes;
        }
        Ok(Self { number, bytes, owner: text_at(&page[32..AT_PARTS])?, parts })
    }

    /// The part of a volume.
    pub fn part(&self, id: &str) -> Option<&Part> {
        self.parts.iter().find(|part| part.id == id)
    }

    /// Gives a volume a part: room for its log, and spill for a quarter of it, but for no more than
    /// half of the largest gap, so that others find room as well.
    pub fn give(&mut self, id: &str, volume_bytes: u64, block_bytes: u32) -> Result<Part, NoPart> {
        let mut part =
            Part { id: id.into(), start: 0, bytes: 0, volume_bytes, block_bytes, spill_slots: 0 };
        let block = u64::from(block_bytes);
        let places = part.places();
        let least = places.needs(SPILL_BYTES_MIN.div_ceil(block) as u32);
        if least > self.bytes.saturating_sub(PARTS_START) {
            return Err(NoPart::TooSmall(least + PARTS_START));
        }
        let (start, gap) = self.gap();
        if gap < least || self.parts.len() == PARTS_MAX {
            return Err(NoPart::Full(least));
        }
        let most = (gap / 2).max(least) - places.spill;
        part.spill_slots = (most / block).min(volume_bytes.div_ceil(block).div_ceil(4)) as u32;
        (part.start, part.bytes) = (start, places.needs(part.spill_slots));
        let at = self.parts.partition_point(|other| other.start < start);
        self.parts.insert(at, part.clone());
        Ok(part)
    }

    /// Start and length of the largest gap.
    fn gap(&self) -> (u64, u64) {
        let end = self.bytes / PAGE_BYTES as u64 * PAGE_BYTES as u64;
        let starts = self.parts.iter().map(|part| part.start).chain([end]);
        let ends = self.parts.iter().map(|part| part.start + part.bytes);
        let gaps = [PARTS_START].into_iter().chain(ends).zip(starts);
        gaps.map(|(from, to)| (from, to.saturating_sub(from))).max_by_key(|gap| gap.1).expect("one")
    }
}

/// Where things lie in a part, bytes from its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    /// The bitmap.
    pub bitmap: u64,
    /// Its pages.
    pub pages: u64,
    /// The spill slots.
    pub spill: u64,
    /// Regions that a page of the bitmap is for.
    pub page_regions: u64,
    block_bytes: u64,
}

impl Places {
    fn needs(&self, spill_slots: u32) -> u64 {
        let all = self.spill + u64::from(spill_slots) * self.block_bytes;
        all.next_multiple_of(PAGE_BYTES as u64)
    }
}

impl Part {
    /// Where things lie.
    pub fn places(&self) -> Places {
        let block_bytes = u64::from(self.block_bytes);
        let page_regions = (BODY_BYTES as u64 * 8) / (REGION_BYTES / block_bytes);
        let pages = self.volume_bytes.div_ceil(REGION_BYTES).div_ceil(page_regions);
        let bitmap = 2 * PAGE_BYTES as u64;
        let spill = bitmap + pages * PAGE_BYTES as u64;
        Places { bitmap, pages, spill, page_regions, block_bytes }
    }
}

/// The cut that a log knows of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NotedCut {
    /// Its epoch and id.
    pub cut: (u64, [u8; 16]),
    /// It stood.
    pub stood: bool,
    /// The newest acknowledged one.
    pub acknowledged: (u64, [u8; 16]),
}

/// A record of the write-intent log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    /// One more with each; it goes to page `number % 2`.
    pub number: u64,
    /// Nothing in here is to be believed but this.
    pub void: bool,
    /// Source and target were to be compared.
    pub compare_due: bool,
    /// Which device it is.
    pub identity: u64,
    /// The cut.
    pub cut: NotedCut,
    /// Active regions, rising.
    pub regions: Vec<u32>,
}

impl Record {
    /// Its bytes, into `page`. Allocates nothing.
    pub fn encode(&self, page: &mut [u8]) {
        page.fill(0);
        page[..8].copy_from_slice(LOG);
        let flags =
            if self.void { VOID } else { 0 } | if self.compare_due { COMPARE_DUE } else { 0 };
        put(page, 8, VERSION.to_le_bytes());
        put(page, 10, flags.to_le_bytes());
        put(page, 12, (self.regions.len() as u32).to_le_bytes());
        put(page, 16, self.number.to_le_bytes());
        put(page, 24, self.identity.to_le_bytes());
        put(page, 32, self.cut.cut.0.to_le_bytes());
        put(page, 40, self.cut.cut.1);
        put(page, 56, u64::from(self.cut.stood).to_le_bytes());
        put(page, 64, self.cut.acknowledged.0.to_le_bytes());
        put(page, 72, self.cut.acknowledged.1);
        for (region, at) in self.regions.iter().zip((AT_REGIONS..).step_by(4)) {
            put(page, at, region.to_le_bytes());
        }
        seal(page, self.number % 2);
    }

    /// The record that counts, of the two pages of a log.
    pub fn decode(pages: &[u8]) -> Result<Self, PageError> {
        let both = [0, 1].map(|at| Self::page(&pages[at * PAGE_BYTES..][..PAGE_BYTES], at as u64));
        match both {
            [Ok(one), Ok(other)] => Ok(if one.number > other.number { one } else { other }),
            // Its partner was torn by a power cut, and counted for nothing yet.
            [Ok(one), Err(PageError::Damaged | PageError::Foreign)]
            | [Err(PageError::Damaged | PageError::Foreign), Ok(one)] => Ok(one),
            [Err(error), _] | [_, Err(error)] => Err(error),
        }
    }

    fn page(page: &[u8], place: u64) -> Result<Self, PageError> {
        open(page, LOG, place)?;
        let flags = u16_at(page, 10);
        let count = u32_at(page, 12) as usize;
        if count > ACTIVE_MAX || flags & !(VOID | COMPARE_DUE) != 0 {
            return Err(PageError::Damaged);
        }
        Ok(Self {
            number: u64_at(page, 16),
            void: flags & VOID != 0,
            compare_due: flags & COMPARE_DUE != 0,
            identity: u64_at(page, 24),
            cut: NotedCut {
                cut: (u64_at(page, 32), array_at(page, 40)),
                stood: u64_at(page, 56) != 0,
                acknowledged: (u64_at(page, 64), array_at(page, 72)),
            },
            regions: (0..count).map(|n| u32_at(page, AT_REGIONS + 4 * n)).collect(),
        })
    }
}

/// Seals a page of the bitmap: its bits fill the body.
pub fn seal_bits(page: &mut [u8], number: u64) {
    seal(page, number);
}

/// Whether a page of the bitmap is whole.
pub fn bits_are_whole(page: &[u8], number: u64) -> bool {
    digest(page, number) == page[BODY_BYTES..PAGE_BYTES]
}

fn digest(page: &[u8], place: u64) -> [u8; 16] {
    let mut hash = Xxh3::new();
    hash.update(&page[..BODY_BYTES]);
    hash.update(&place.to_le_bytes());
    hash.digest128().to_le_bytes()
}

fn seal(page: &mut [u8], place: u64) {
    let digest = digest(page, place);
    page[BODY_BYTES..PAGE_BYTES].copy_from_slice(&digest);
}

fn open(page: &[u8], magic: &[u8; 8], place: u64) -> Result<(), PageError> {
    if page[..8] != *magic {
        return Err(PageError::Foreign);
    }
    match u16_at(page, 8) {
        VERSION => {}
        0 => return Err(PageError::Damaged),
        newer => return Err(PageError::Newer(newer)),
    }
    (digest(page, place) == page[BODY_BYTES..PAGE_BYTES]).then_some(()).ok_or(PageError::Damaged)
}

fn put<const N: usize>(page: &mut [u8], at: usize, bytes: [u8; N]) {
    page[at..at + N].copy_from_slice(&bytes);
}

fn put_text(to: &mut [u8], text: &str) {
    to[..text.len()].copy_from_slice(text.as_bytes());
}

fn text_at(bytes: &[u8]) -> Result<String, PageError> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let text = std::str::from_utf8(&bytes[..end]).map_err(|_| PageError::Damaged)?;
    Ok(text.into())
}

fn array_at<const N: usize>(page: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|n| page[at + n])
}
fn u16_at(page: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(page, at))
}
fn u32_at(page: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(page, at))
}
fn u64_at(page: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(page, at))
}

/// The most of an owner's name that is kept.
pub fn owner_text(machine: &str) -> String {
    machine.trim().chars().filter(char::is_ascii_graphic).take(OWNER_BYTES).collect()
}
