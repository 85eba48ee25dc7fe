//! The header beside the bitmaps: what must outlive the daemon, but not a reboot.
//!
//! 512 bytes, 64 words of 8 bytes, little-endian, in pinned memory. What changes together lies in
//! a pair of slots: the slot that does not count is written, then one store of the selector makes
//! it count (slot = lowest bit of the selector). A kill in between changes nothing. One writer at
//! a time; readers read the selector again and start over if it moved.
//!
//! | byte | holds |
//! |---|---|
//! | 0 | `SSMARK`, then a u16: version of layout and programs. Written last; 0 while not whole |
//! | 8 | blocks of the volume |
//! | 16 | 1 if source and target must be compared, else 0 |
//! | 24 | selector of the cut slots |
//! | 32 | selector of the audit slots; 0 while there is no baseline |
//! | 40 | sectors up to which the programs mark |
//! | 48 | extent: twice the sectors of the volume, plus the number (0 or 1) of the set of bitmaps that counts |
//! | 56 | the extent that the volume is growing to (see [`crate::grow`]); 0 if it is not |
//! | 64, 128 | cut slots 0 and 1: epoch, cut id (16 bytes), state (0 none, 1 stands, 2 given up, 3 committed), acknowledged epoch, its cut id (16 bytes), zero (8 bytes) |
//! | 192 | identity: device major in the upper and minor in the lower half, the same of its disk, diskseq, zero (8 bytes), boot id (16 bytes), block size (u32) and flags (u32; 1: marks at completion), start on the disk in bytes |
//! | 256, 384 | audit slots 0 and 1: the baseline, 16 words (see `ebpf::audit`) |

use crate::sync::Word;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Words of the header.
pub const HEADER_WORDS: usize = 64;
/// Version of the layout and of the programs that mark: another one is never adopted.
pub const VERSION: u16 = 3;
const NAME: u64 = u64::from_le_bytes(*b"SSMARK\0\0");
const VERSION_SHIFT: u32 = 48;
const MAGIC: u64 = NAME | (VERSION as u64) << VERSION_SHIFT;

const AT_MAGIC: usize = 0;
const AT_BLOCKS: usize = 1;
const AT_COMPARE_DUE: usize = 2;
const CUT: Slots<8> = Slots { selector: 3, first: 8 };
const AUDIT: Slots<AUDIT_WORDS> = Slots { selector: 4, first: 32 };
/// Read by the programs: `H_SECTORS` there.
const AT_BOUND: usize = 5;
const AT_EXTENT: usize = 6;
const AT_GROWING: usize = 7;
/// A selector grows by one a write: none of ours comes so far.
const SELECTOR_MAX: u64 = 1 << 62;
/// Place of the state in a cut slot.
const AT_STATE: usize = 3;
const AT_IDENTITY: usize = 24;

/// Words of the device's identity.
pub const IDENTITY_WORDS: usize = 8;
/// Words of the audit's baseline.
pub const AUDIT_WORDS: usize = 16;

const _: () = assert!(AUDIT.first + 2 * AUDIT_WORDS == HEADER_WORDS);
const _: () = assert!(CUT.first + 2 * 8 == AT_IDENTITY);
const _: () = assert!(AT_IDENTITY + IDENTITY_WORDS == AUDIT.first);

/// What became of the newest cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// There was none yet.
    None,
    /// It stands.
    Stands,
    /// It was given up.
    GivenUp,
    /// The target has committed it.
    Committed,
}

/// A cut slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutSlot {
    /// Number of its epoch.
    pub epoch: u64,
    /// Its id.
    pub cut_id: [u8; 16],
    /// What became of it.
    pub state: State,
    /// Newest acknowledged epoch and its cut id.
    pub acknowledged: (u64, [u8; 16]),
}

/// How far a volume goes, and which set of bitmaps is for that.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Sectors of 512 bytes.
    pub sectors: u64,
    /// 0 or 1.
    pub set: usize,
}

impl Extent {
    /// Blocks of so many sectors.
    pub fn blocks(self, block_bytes: u32) -> u64 {
        (self.sectors << 9).div_ceil(u64::from(block_bytes))
    }

    fn word(self) -> u64 {
        self.sectors << 1 | self.set as u64
    }

    fn of(word: u64) -> Self {
        Self { sectors: word >> 1, set: (word & 1) as usize }
    }
}

/// A view of the header's words.
pub struct Header<'a, W>(&'a [W]);

impl<'a, W: Word> Header<'a, W> {
    /// Over the words of the header.
    pub fn new(words: &'a [W]) -> Self {
        assert!(words.len() >= HEADER_WORDS, "header of {} words", words.len());
        Self(words)
    }

    /// Whether all of it, and all that belongs to it, was once completed.
    pub fn is_whole(&self) -> bool {
        self.0[AT_MAGIC].load(Acquire) == MAGIC
    }

    /// The version of a newer Secondsite, if one wrote this. Nothing but the first word may be
    /// believed then, and nothing may be changed.
    pub fn newer(&self) -> Option<u16> {
        newer(self.0[AT_MAGIC].load(Acquire))
    }

    /// Whether every field has a meaning. What is not sound was not written here: adopt nothing.
    pub fn is_sound(&self) -> bool {
        let counts = |slots: usize| self.0[slots].load(Acquire) <= SELECTOR_MAX;
        state_of(CUT.read(self.0)[AT_STATE]).is_some()
            && self.0[AT_COMPARE_DUE].load(Acquire) <= 1
            && counts(CUT.selector)
            && counts(AUDIT.selector)
    }

    /// Says so, or takes it back. Nothing may be adopted in between.
    pub fn set_whole(&self, whole: bool) {
        self.0[AT_MAGIC].store(if whole { MAGIC } else { 0 }, Release);
    }

    /// Blocks of the volume.
    pub fn blocks(&self) -> u64 {
        self.0[AT_BLOCKS].load(Relaxed)
    }

    /// Sets the blocks of the volume.
    pub fn set_blocks(&self, blocks: u64) {
        self.0[AT_BLOCKS].store(blocks, Relaxed);
    }

    /// The programs mark up to here.
    pub fn set_bound(&self, sectors: u64) {
        self.0[AT_BOUND].store(sectors, Release);
    }

    /// What counts.
    pub fn extent(&self) -> Extent {
        Extent::of(self.0[AT_EXTENT].load(Acquire))
    }

    /// Makes it count.
    pub fn set_extent(&self, extent: Extent) {
        self.0[AT_EXTENT].store(extent.word(), Release);
    }

    /// What will count, while the volume grows.
    pub fn growing(&self) -> Option<Extent> {
        match self.0[AT_GROWING].load(Acquire) {
            0 => None,
            word => Some(Extent::of(word)),
        }
    }

    /// Says what will count.
    pub fn set_growing(&self, to: Option<Extent>) {
        self.0[AT_GROWING].store(to.map_or(0, Extent::word), Release);
    }

    /// Whether source and target must be compared.
    pub fn compare_due(&self) -> bool {
        self.0[AT_COMPARE_DUE].load(Acquire) != 0
    }

    /// Sets or clears that.
    pub fn set_compare_due(&self, due: bool) {
        self.0[AT_COMPARE_DUE].store(u64::from(due), Release);
    }

    /// Another number with each change of the cut.
    pub fn cut_selector(&self) -> u64 {
        self.0[CUT.selector].load(Acquire)
    }

    /// The cut slot that counts. Panics on a state that [`Self::is_sound`] would have refused.
    pub fn cut(&self) -> CutSlot {
        let [epoch, id_low, id_high, state, acknowledged, ack_low, ack_high, _] = CUT.read(self.0);
        CutSlot {
            epoch,
            cut_id: id_of(id_low, id_high),
            state: state_of(state)
                .unwrap_or_else(|| panic!("header: unknown state {state} of the cut")),
            acknowledged: (acknowledged, id_of(ack_low, ack_high)),
        }
    }

    /// Makes another slot count.
    pub fn set_cut(&self, cut: CutSlot) {
        let state = match cut.state {
            State::None => 0,
            State::Stands => 1,
            State::GivenUp => 2,
            State::Committed => 3,
        };
        let (id_low, id_high) = halves(cut.cut_id);
        let (ack_low, ack_high) = halves(cut.acknowledged.1);
        let words = [cut.epoch, id_low, id_high, state, cut.acknowledged.0, ack_low, ack_high, 0];
        CUT.write(self.0, words);
    }

    /// The device's identity.
    pub fn identity(&self) -> [u64; IDENTITY_WORDS] {
        std::array::from_fn(|at| self.0[AT_IDENTITY + at].load(Relaxed))
    }

    /// Sets the device's identity.
    pub fn set_identity(&self, identity: [u64; IDENTITY_WORDS]) {
        for (at, word) in identity.into_iter().enumerate() {
            self.0[AT_IDENTITY + at].store(word, Relaxed);
        }
    }

    /// The audit's baseline, once there is one.
    pub fn baseline(&self) -> Option<[u64; AUDIT_WORDS]> {
        match self.0[AUDIT.selector].load(Acquire) {
            0 => None,
            _ => Some(AUDIT.read(self.0)),
        }
    }

    /// Makes another baseline count.
    pub fn set_baseline(&self, words: [u64; AUDIT_WORDS]) {
        AUDIT.write(self.0, words);
    }
}

/// A pair of slots of N words and the selector that says which counts.
struct Slots<const N: usize> {
    selector: usize,
    first: usize,
}

impl<const N: usize> Slots<N> {
    fn read<W: Word>(&self, words: &[W]) -> [u64; N] {
        loop {
            // Partner: the Release store in `write`; the slot is whole when its selector is seen.
            let selector = words[self.selector].load(Acquire);
            let slot = std::array::from_fn(|at| words[self.at(selector, at)].load(Relaxed));
            // Partner: the Release fence in `write`: a word of a later write to this slot is seen
            // only together with the selector that had moved before.
            W::fence(Acquire);
            if words[self.selector].load(Relaxed) == selector {
                return slot;
            }
        }
    }

    fn write<W: Word>(&self, words: &[W], slot: [u64; N]) {
        let next = words[self.selector].load(Relaxed) + 1;
        W::fence(Release);
        for (at, word) in slot.into_iter().enumerate() {
            words[self.at(next, at)].store(word, Relaxed);
        }
        words[self.selector].store(next, Release);
    }

    fn at(&self, selector: u64, word: usize) -> usize {
        self.first + (selector & 1) as usize * N + word
    }
}

/// The version in the first word, if it is a newer one.
pub fn newer(first: u64) -> Option<u16> {
    let version = (first >> VERSION_SHIFT) as u16;
    (first & ((1 << VERSION_SHIFT) - 1) == NAME && version > VERSION).then_some(version)
}

fn state_of(word: u64) -> Option<State> {
    Some(match word {
        0 => State::None,
        1 => State::Stands,
        2 => State::GivenUp,
        3 => State::Committed,
        _ => return None,
    })
}

fn halves(id: [u8; 16]) -> (u64, u64) {
    let id = u128::from_le_bytes(id);
    (id as u64, (id >> 64) as u64)
}

fn id_of(low: u64, high: u64) -> [u8; 16] {
    (u128::from(low) | u128::from(high) << 64).to_le_bytes()
}
