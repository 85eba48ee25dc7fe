//! Which bytes of the volume an epoch holds, and where they lie in the journal.
//!
//! Pure. Invariants: the pieces of an index are sorted and never overlap; within an epoch the
//! highest pass of a byte wins and within a pass the highest `seq`; between epochs the newer one.
//! A piece keeps its segment open, so a segment removed meanwhile stays readable for its readers.

use super::journal::FramePlace;
use secondsite_format::extent::{Extent, ExtentKind};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A data frame of an epoch that is not committed yet.
#[derive(Debug, Clone)]
pub struct StagedFrame {
    /// Where it lies.
    pub place: FramePlace,
    /// Its pass.
    pub pass: u32,
    /// What it holds.
    pub extents: Vec<Extent>,
    /// Digest of its content; tells an identical repeat.
    pub digest: [u8; 32],
}

/// Where the bytes of a piece are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// They are zero.
    Zero,
    /// In the payload of a frame, from a byte on.
    Payload {
        /// Number of the frame in [`EpochIndex::frames`].
        frame: u32,
        /// Byte of the uncompressed payload.
        at: u32,
    },
}

impl Origin {
    fn advanced(self, by: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Payload { frame, at } => Self::Payload { frame, at: at + by as u32 },
        }
    }
}

/// A run of bytes of the volume and where they are; `of` tells the epoch in an overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// Where its bytes are.
    pub origin: Origin,
    /// Which of the overlaid epochs, from 0, oldest first.
    pub of: u32,
}

impl Piece {
    /// The part of it within a range, if any.
    fn within(&self, start: u64, end: u64) -> Option<Self> {
        let from = self.start.max(start);
        let to = self.end.min(end);
        (from < to).then(|| Self {
            start: from,
            end: to,
            origin: self.origin.advanced(from - self.start),
            of: self.of,
        })
    }
}

/// What one committed epoch holds.
#[derive(Debug, Default)]
pub struct EpochIndex {
    /// Its frames, by `seq`.
    pub frames: Vec<FramePlace>,
    pieces: Vec<Piece>,
}

impl EpochIndex {
    /// Sorts out the frames of an epoch, given by `seq`.
    pub fn build(staged: &[StagedFrame]) -> Self {
        let mut order: Vec<usize> = (0..staged.len()).collect();
        // Stable: within a pass the order of `seq` stays, and what is put in later wins.
        order.sort_by_key(|&i| staged[i].pass);
        let mut map = Overlay::default();
        for i in order {
            let mut at = 0;
            for extent in &staged[i].extents {
                let origin = match extent.kind {
                    ExtentKind::Data => Origin::Payload { frame: i as u32, at },
                    ExtentKind::Zero | ExtentKind::Discard => Origin::Zero,
                };
                if extent.kind == ExtentKind::Data {
                    at += extent.bytes as u32;
                }
                map.put(Piece { start: extent.offset, end: extent.end(), origin, of: 0 });
            }
        }
        let frames = staged.iter().map(|frame| frame.place.clone()).collect();
        Self { frames, pieces: map.pieces.into_values().collect() }
    }

    /// The pieces that touch a range, cut to it.
    fn slice(&self, start: u64, end: u64) -> impl Iterator<Item = Piece> {
        let first = self.pieces.partition_point(|piece| piece.end <= start);
        self.pieces[first..]
            .iter()
            .take_while(move |piece| piece.start < end)
            .filter_map(move |piece| piece.within(start, end))
    }

    /// Start of the first piece that ends behind `offset`.
    fn next_from(&self, offset: u64) -> Option<u64> {
        let first = self.pieces.partition_point(|piece| piece.end <= offset);
        self.pieces.get(first).map(|piece| piece.start.max(offset))
    }
}

/// Start of the next piece of any of `epochs`, from `offset` on.
pub fn next_piece(epochs: &[Arc<EpochIndex>], offset: u64) -> Option<u64> {
    epochs.iter().filter_map(|epoch| epoch.next_from(offset)).min()
}

/// The newest version of every byte in `start..end` that one of `epochs` (oldest first) holds, in
/// rising order.
pub fn overlay(epochs: &[Arc<EpochIndex>], start: u64, end: u64) -> Vec<Piece> {
    let mut map = Overlay::default();
    for (of, epoch) in epochs.iter().enumerate() {
        for piece in epoch.slice(start, end) {
            map.put(Piece { of: of as u32, ..piece });
        }
    }
    map.pieces.into_values().collect()
}

/// Disjoint pieces by start; what is put in later wins.
#[derive(Default)]
struct Overlay {
    pieces: BTreeMap<u64, Piece>,
}

impl Overlay {
    fn put(&mut self, fresh: Piece) {
        if let Some((_, before)) = self.pieces.range(..fresh.start).next_back() {
            let before = *before;
            if before.end > fresh.start {
                self.pieces.insert(before.start, Piece { end: fresh.start, ..before });
                if let Some(rest) = before.within(fresh.end, before.end) {
                    self.pieces.insert(rest.start, rest);
                }
            }
        }
        let covered: Vec<u64> =
            self.pieces.range(fresh.start..fresh.end).map(|(start, _)| *start).collect();
        for start in covered {
            let old = self.pieces.remove(&start).expect("it was just listed");
            if let Some(rest) = old.within(fresh.end, old.end) {
                self.pieces.insert(rest.start, rest);
            }
        }
        self.pieces.insert(fresh.start, fresh);
    }
}
