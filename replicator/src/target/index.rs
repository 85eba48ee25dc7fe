//! Which bytes of the volume an epoch holds, and where they lie in the journal.
//!
//! Pure. Invariants: the pieces of an index are sorted and never overlap; within an epoch the
//! highest pass of a byte wins and within a pass the highest `seq`; between epochs the newer one
//! ([`super::layers`]). An index keeps its segments, so that one removed meanwhile stays readable.

use super::journal::{FramePlace, Segment};
use secondsite_format::extent::{Extent, ExtentKind};
use secondsite_format::ids::Epoch;
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

/// Which frame, without its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FrameSpot {
    /// Number of the segment.
    pub segment: u32,
    /// First byte of the frame in it.
    pub offset: u32,
    /// Header and body, bytes.
    pub bytes: u32,
}

impl FrameSpot {
    /// The spot of a frame.
    ///
    /// # Panics
    /// If it lies beyond 4 GiB of a segment, which ends long before.
    pub fn of(place: &FramePlace) -> Self {
        let fits = |number: u64| u32::try_from(number).expect("segments are short and not so many");
        Self { segment: fits(place.segment.number), offset: fits(place.offset), bytes: place.bytes }
    }
}

/// Where the bytes of a piece are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// They are zero.
    Zero,
    /// In the payload of a frame, from a byte on.
    Payload {
        /// The frame.
        frame: FrameSpot,
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

/// A run of bytes of the volume and where they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// Where its bytes are.
    pub origin: Origin,
    /// The epoch that holds them; after thinning the first kept one that shows them.
    pub epoch: Epoch,
    /// Which of the overlaid layers, from 0, oldest first.
    pub of: u32,
}

impl Piece {
    /// The part of it within a range, if any.
    pub fn within(&self, start: u64, end: u64) -> Option<Self> {
        let from = self.start.max(start);
        let to = self.end.min(end);
        (from < to).then(|| Self {
            start: from,
            end: to,
            origin: self.origin.advanced(from - self.start),
            ..*self
        })
    }
}

/// What one committed epoch holds.
#[derive(Debug, Default)]
pub struct EpochIndex {
    segments: Vec<Arc<Segment>>,
    pieces: Vec<Piece>,
}

impl EpochIndex {
    /// Sorts out the frames of an epoch, given by `seq`.
    pub fn build(epoch: Epoch, staged: &[StagedFrame]) -> Self {
        let mut order: Vec<usize> = (0..staged.len()).collect();
        // Stable: within a pass the order of `seq` stays, and what is put in later wins.
        order.sort_by_key(|&i| staged[i].pass);
        let mut map = Overlay::default();
        for i in order {
            let (mut at, frame) = (0, FrameSpot::of(&staged[i].place));
            for extent in &staged[i].extents {
                let origin = match extent.kind {
                    ExtentKind::Data => Origin::Payload { frame, at },
                    ExtentKind::Zero | ExtentKind::Discard => Origin::Zero,
                };
                if extent.kind == ExtentKind::Data {
                    at += extent.bytes as u32;
                }
                map.put(Piece { start: extent.offset, end: extent.end(), origin, epoch, of: 0 });
            }
        }
        let mut segments: Vec<Arc<Segment>> = Vec::new();
        for frame in staged {
            if !segments.iter().any(|known| known.number == frame.place.segment.number) {
                segments.push(frame.place.segment.clone());
            }
        }
        Self { segments, pieces: map.into_pieces().collect() }
    }

    /// The segments that its pieces lie in.
    pub fn segments(&self) -> &[Arc<Segment>] {
        &self.segments
    }

    /// How many pieces it has.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether the epoch changed nothing.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The pieces that touch a range, cut to it.
    pub fn slice(&self, start: u64, end: u64) -> impl Iterator<Item = Piece> {
        let first = self.pieces.partition_point(|piece| piece.end <= start);
        self.pieces[first..]
            .iter()
            .take_while(move |piece| piece.start < end)
            .filter_map(move |piece| piece.within(start, end))
    }

    /// Start of the first piece that ends behind `offset`.
    pub fn next_from(&self, offset: u64) -> Option<u64> {
        let first = self.pieces.partition_point(|piece| piece.end <= offset);
        self.pieces.get(first).map(|piece| piece.start.max(offset))
    }
}

/// Disjoint pieces by start; what is put in later wins.
#[derive(Default)]
pub struct Overlay {
    pieces: BTreeMap<u64, Piece>,
}

impl Overlay {
    /// The pieces, rising.
    pub fn into_pieces(self) -> impl Iterator<Item = Piece> {
        self.pieces.into_values()
    }

    /// Puts a piece over what is there.
    pub fn put(&mut self, fresh: Piece) {
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
