//! What lies over the replica volume: runs of epochs on disk, then the newest epochs in memory,
//! oldest first. Whatever reads a recovery point, promotes or thins goes through here.
//!
//! Invariant: of the layers' pieces that a point shows (those of its epoch or an older one), the
//! newest of every byte wins.

use super::index::{EpochIndex, FrameSpot, Overlay, Piece};
use super::journal::{FramePlace, Segment};
use super::run::Run;
use secondsite_format::ids::Epoch;
use std::io;
use std::sync::Arc;

/// One of them.
#[derive(Clone)]
pub enum Layer {
    /// A run of epochs.
    Run(Arc<Run>),
    /// An epoch.
    Epoch(Epoch, Arc<EpochIndex>),
}

impl Layer {
    /// Adds the pieces that touch a range and are of `upto` or older, cut to the range, older
    /// epochs first.
    pub fn pieces(&self, start: u64, end: u64, upto: Epoch, to: &mut Vec<Piece>) -> io::Result<()> {
        match self {
            Self::Epoch(epoch, _) if *epoch > upto => Ok(()),
            Self::Epoch(_, index) => {
                to.extend(index.slice(start, end));
                Ok(())
            }
            Self::Run(run) => run.pieces(start, end, upto, to),
        }
    }

    /// Start of the next piece of `upto` or older, from `offset` on.
    pub fn next_from(&self, offset: u64, upto: Epoch) -> io::Result<Option<u64>> {
        match self {
            Self::Epoch(epoch, _) if *epoch > upto => Ok(None),
            Self::Epoch(_, index) => Ok(index.next_from(offset)),
            Self::Run(run) => run.next_from(offset, upto),
        }
    }

    /// The segments that its pieces lie in.
    pub fn segments(&self) -> &[Arc<Segment>] {
        match self {
            Self::Run(run) => run.segments(),
            Self::Epoch(_, index) => index.segments(),
        }
    }

    /// A frame of it.
    pub fn frame(&self, spot: FrameSpot) -> io::Result<FramePlace> {
        let number = u64::from(spot.segment);
        let found = self.segments().iter().find(|segment| segment.number == number);
        let segment = found.ok_or_else(|| {
            let what = format!("{} holds data, and is not listed", Segment::name(number));
            io::Error::new(io::ErrorKind::InvalidData, what)
        })?;
        let offset = u64::from(spot.offset);
        Ok(FramePlace { segment: segment.clone(), offset, bytes: spot.bytes })
    }
}

/// Start of the next piece of any layer that is of `upto` or older, from `offset` on.
pub fn next_piece(layers: &[Layer], offset: u64, upto: Epoch) -> io::Result<Option<u64>> {
    let mut next = None;
    for layer in layers {
        let found = layer.next_from(offset, upto)?;
        next = match (next, found) {
            (Some(a), Some(b)) => Some(u64::min(a, b)),
            (a, b) => a.or(b),
        };
    }
    Ok(next)
}

/// What the layers show of `start..end` at `upto`, in rising order; what no piece covers is the
/// replica volume's.
pub fn overlay(layers: &[Layer], start: u64, end: u64, upto: Epoch) -> io::Result<Vec<Piece>> {
    let mut map = Overlay::default();
    let mut found = Vec::new();
    for (of, layer) in layers.iter().enumerate() {
        found.clear();
        layer.pieces(start, end, upto, &mut found)?;
        found.iter().for_each(|piece| map.put(Piece { of: of as u32, ..*piece }));
    }
    Ok(map.into_pieces().collect())
}
