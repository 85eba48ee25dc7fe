//! Thinning: neighbouring layers become one run, and what no kept point shows is left out.
//!
//! A kept point shows, of every byte, the newest version of its epoch or an older one. So between
//! two kept epochs only the newest version counts, and the run names the later of the two as its
//! epoch: no byte of what a kept point shows changes. Segments of which less than half is still
//! shown are written anew without the rest; that costs at most what it gives back.
//!
//! Idempotent after a crash at any instant: what was written has no name yet, or is whole.

use super::disk::Disk;
use super::index::{FrameSpot, Origin, Overlay, Piece};
use super::journal::{Place, SEGMENT_HEADER_BYTES};
use super::layers::{Layer, next_piece};
use super::run::{Run, SegmentUse, Writer};
use super::segments::{HISTORY, KEPT, Segment, Segments};
use super::state::EpochFacts;
use super::view::FrameReader;
use secondsite_format::extent::{Content, Extent, ExtentKind};
use secondsite_format::frame::{Frame, FrameHeader, FrameKind};
use secondsite_format::ids::{Epoch, Generation, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

/// Bytes of the volume whose pieces are sorted out at a time, unless they are too many.
const WINDOW_BYTES: u64 = 64 << 20;
/// A window is never shorter than this.
const WINDOW_BYTES_MIN: u64 = 1 << 20;
/// Pieces in memory at a time; a window with more is halved.
const WINDOW_PIECES: usize = 1 << 18;
/// Uncompressed bytes of a frame that thinning writes.
const FRAME_BYTES: usize = 256 << 10;
/// Unpacked frames kept while segments are written anew, bytes.
const READING_BYTES: usize = 32 << 20;

/// What is to become one run.
pub struct Merge<'a> {
    /// Neighbouring layers, oldest first.
    pub layers: &'a [Layer],
    /// The epoch before the first.
    pub from: Epoch,
    /// One past the commit frame of the last epoch.
    pub end: Place,
    /// Facts of all their epochs, rising.
    pub facts: Vec<Arc<EpochFacts>>,
    /// Epochs of the volume that points show, of which nothing may be lost.
    pub kept: &'a BTreeSet<Epoch>,
    /// The replica volume's epoch: up to it, it shows everything itself.
    pub base: Epoch,
    /// The volume.
    pub volume: VolumeId,
    /// Its generation.
    pub generation: Generation,
}

impl Merge<'_> {
    /// The epoch under which a version goes on: the first kept one that shows it, at most the
    /// run's last. None if no point above the base shows it.
    fn slot(&self, epoch: Epoch) -> Option<Epoch> {
        let to = self.to();
        let kept = self.kept.range(epoch..).next().copied().unwrap_or(to).min(to);
        (kept > self.base).then_some(kept)
    }

    fn to(&self) -> Epoch {
        self.facts.last().expect("a merge has an epoch").epoch
    }

    /// Facts that stay: of kept epochs, and of the last. What a dropped manifest said of those
    /// before it, the next one says.
    fn remaining(&self) -> Vec<Arc<EpochFacts>> {
        let mut remaining = Vec::new();
        let mut doubt_from = Epoch(0);
        let doubt = |a: Epoch, b: Epoch| match (a, b) {
            (Epoch(0), b) => b,
            (a, Epoch(0)) => a,
            (a, b) => a.min(b),
        };
        for facts in &self.facts {
            doubt_from = doubt(doubt_from, facts.doubt_from);
            let kept = self.kept.contains(&facts.epoch);
            if !kept && facts.epoch != self.to() {
                continue;
            }
            let dropped = facts.dropped || !kept;
            remaining.push(Arc::new(EpochFacts { doubt_from, dropped, ..(**facts).clone() }));
            doubt_from = Epoch(0);
        }
        remaining
    }

    /// Shows what remains of each window, by slot, then start. False if told to end.
    fn windows(
        &self,
        going: &dyn Fn() -> bool,
        mut each: impl FnMut(Vec<Piece>) -> io::Result<()>,
    ) -> io::Result<bool> {
        let upto = self.to();
        let (mut at, mut bytes) = (0, WINDOW_BYTES);
        let mut found = Vec::new();
        while let Some(start) = next_piece(self.layers, at, upto)? {
            if !going() {
                return Ok(false);
            }
            let end = (start / bytes + 1) * bytes;
            found.clear();
            for (of, layer) in self.layers.iter().enumerate() {
                let first = found.len();
                layer.pieces(start, end, upto, &mut found)?;
                found[first..].iter_mut().for_each(|piece| piece.of = of as u32);
            }
            if found.len() > WINDOW_PIECES && bytes > WINDOW_BYTES_MIN {
                bytes /= 2;
                continue;
            }
            let mut slots: BTreeMap<Epoch, Overlay> = BTreeMap::new();
            for piece in &found {
                if let Some(slot) = self.slot(piece.epoch) {
                    slots.entry(slot).or_default().put(Piece { epoch: slot, ..*piece });
                }
            }
            each(slots.into_values().flat_map(Overlay::into_pieces).collect())?;
            at = end;
            bytes = WINDOW_BYTES;
        }
        Ok(true)
    }

    /// Writes the run, durably, and opens it; none if told to end. The layers may go then.
    pub fn run(&self, segments: &Segments, going: &dyn Fn() -> bool) -> io::Result<Option<Run>> {
        let disk = segments.disk();
        let mut live: BTreeMap<u64, u64> = BTreeMap::new();
        let counted = self.windows(going, |pieces| {
            for piece in pieces {
                if let Origin::Payload { frame, .. } = piece.origin {
                    *live.entry(frame.segment.into()).or_default() += piece.end - piece.start;
                }
            }
            Ok(())
        })?;
        if !counted {
            return Ok(None);
        }
        let first = self.first_bytes(&live);
        // The segment that the journal goes on in stays as it is.
        let anew: BTreeSet<u64> = live
            .iter()
            .filter(|(number, bytes)| {
                (*number & KEPT != 0 || **number < self.end.segment) && *bytes * 2 < first[number]
            })
            .map(|(number, _)| *number)
            .collect();
        let mut writer = Writer::new(disk.clone(), self.volume, self.from, self.to())?;
        let mut rewriter = Rewriter::new(self, segments);
        let written = self.windows(going, |pieces| {
            let mut pieces = rewriter.window(pieces, &anew)?;
            pieces.sort_by_key(|piece| (piece.start, piece.epoch));
            pieces.iter().try_for_each(|piece| writer.add(piece))
        })?;
        let fresh = rewriter.finish()?;
        if !written {
            return Ok(None);
        }
        let mut uses = Vec::new();
        for (number, live_bytes) in live.into_iter().filter(|(number, _)| !anew.contains(number)) {
            let file_bytes = segments.get(number).file()?.bytes()?;
            uses.push(SegmentUse { number, first_bytes: first[&number], live_bytes, file_bytes });
        }
        uses.extend(fresh);
        writer.finish(self.end, &self.remaining(), &uses)?;
        Run::open(segments, self.volume, self.from, self.to()).map(Some)
    }

    /// What each segment held for the layers at first; an epoch shows what it shows now.
    fn first_bytes(&self, live: &BTreeMap<u64, u64>) -> BTreeMap<u64, u64> {
        let mut first: BTreeMap<u64, u64> = live.keys().map(|number| (*number, 0)).collect();
        for layer in self.layers {
            match layer {
                Layer::Run(run) => {
                    for row in &run.uses {
                        *first.entry(row.number).or_default() += row.first_bytes;
                    }
                }
                Layer::Epoch(_, index) => {
                    for piece in index.slice(0, u64::MAX) {
                        if let Origin::Payload { frame, .. } = piece.origin {
                            *first.entry(frame.segment.into()).or_default() +=
                                piece.end - piece.start;
                        }
                    }
                }
            }
        }
        first
    }
}

/// Writes pieces of some segments into new ones.
struct Rewriter<'a> {
    merge: &'a Merge<'a>,
    segments: &'a Segments,
    reader: FrameReader,
    current: Option<(Arc<Segment>, u64)>,
    fresh: Vec<(Arc<Segment>, u64)>,
    extents: Vec<Extent>,
    payload: Vec<u8>,
    waiting: Vec<Piece>,
    shown_bytes: u64,
}

impl<'a> Rewriter<'a> {
    fn new(merge: &'a Merge<'a>, segments: &'a Segments) -> Self {
        Self {
            merge,
            segments,
            reader: FrameReader::new(READING_BYTES),
            current: None,
            fresh: Vec::new(),
            extents: Vec::new(),
            payload: Vec::new(),
            waiting: Vec::new(),
            shown_bytes: 0,
        }
    }

    /// The pieces of a window, those of the segments `anew` in their new places.
    fn window(&mut self, pieces: Vec<Piece>, anew: &BTreeSet<u64>) -> io::Result<Vec<Piece>> {
        let mut placed = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let Origin::Payload { frame, .. } = piece.origin else {
                placed.push(piece);
                continue;
            };
            if !anew.contains(&frame.segment.into()) {
                placed.push(piece);
                continue;
            }
            let bytes = (piece.end - piece.start) as usize;
            // Extents of a frame rise and never overlap; another slot begins again.
            let fits = self.extents.last().is_none_or(|last| last.end() <= piece.start);
            if !fits || self.payload.len() + bytes > FRAME_BYTES {
                self.end_frame(&mut placed)?;
            }
            let extent =
                Extent { offset: piece.start, bytes: bytes as u64, kind: ExtentKind::Data };
            let payload = &mut self.payload;
            self.reader.piece(self.merge.layers, &piece, |content| {
                payload.extend_from_slice(content.expect("a piece with a payload has bytes"));
                Ok(())
            })?;
            self.extents.push(extent);
            self.waiting.push(piece);
        }
        self.end_frame(&mut placed)?;
        Ok(placed)
    }

    fn end_frame(&mut self, placed: &mut Vec<Piece>) -> io::Result<()> {
        let Some(first) = self.extents.first() else { return Ok(()) };
        let mut header = FrameHeader::message(FrameKind::Data);
        header.generation = self.merge.generation;
        header.epoch = self.waiting[0].epoch;
        header.offset = first.offset;
        let payload = std::mem::take(&mut self.payload);
        let bytes = payload.len() as u64;
        let content = Content::new(std::mem::take(&mut self.extents), payload)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        let frame = Frame::new(header, content.encode());
        let max = self.segments.disk().segment_bytes().max;
        if self.current.as_ref().is_none_or(|(_, end)| *end > max) {
            self.end_segment()?;
            let number = self.segments.next_kept();
            let segment = self.segments.create(self.merge.volume, number)?;
            self.current = Some((segment, SEGMENT_HEADER_BYTES));
        }
        let (segment, end) = self.current.as_mut().expect("it was just made");
        let file = segment.file()?;
        file.write_at(*end, frame.header_bytes())?;
        file.write_at(*end + frame.header_bytes().len() as u64, &frame.body)?;
        let spot = FrameSpot {
            segment: segment.number as u32,
            offset: u32::try_from(*end).expect("segments are short"),
            bytes: frame.total_bytes() as u32,
        };
        *end += frame.total_bytes();
        self.shown_bytes += bytes;
        let mut at = 0;
        for piece in self.waiting.drain(..) {
            placed.push(Piece { origin: Origin::Payload { frame: spot, at }, ..piece });
            at += (piece.end - piece.start) as u32;
        }
        Ok(())
    }

    fn end_segment(&mut self) -> io::Result<()> {
        if let Some((segment, _)) = self.current.take() {
            segment.file()?.sync()?;
            self.fresh.push((segment, std::mem::take(&mut self.shown_bytes)));
        }
        Ok(())
    }

    /// Makes the new segments durable.
    fn finish(mut self) -> io::Result<Vec<SegmentUse>> {
        self.end_segment()?;
        if !self.fresh.is_empty() {
            self.segments.disk().sync_names(HISTORY)?;
        }
        let used = |(segment, bytes): &(Arc<Segment>, u64)| {
            Ok(SegmentUse {
                number: segment.number,
                first_bytes: *bytes,
                live_bytes: *bytes,
                file_bytes: segment.file()?.bytes()?,
            })
        };
        self.fresh.iter().map(used).collect()
    }
}

/// Which neighbouring runs to merge so that a read looks into few, given the pieces of each: the
/// four that are smallest together, once there are more than `most`.
pub fn tier(pieces: &[u64], most: usize) -> Option<std::ops::Range<usize>> {
    const TOGETHER: usize = 4;
    if pieces.len() <= most.max(TOGETHER) {
        return None;
    }
    let sums = pieces.windows(TOGETHER).map(|few| few.iter().sum::<u64>());
    let (at, _) = sums.enumerate().min_by_key(|(_, sum)| *sum)?;
    Some(at..at + TOGETHER)
}

/// Takes away what a merge that was interrupted left: files without a name that counts.
pub fn clean(disk: &dyn Disk) -> io::Result<()> {
    for file in disk.list(HISTORY)? {
        if file.ends_with(".new") {
            disk.remove(&format!("{HISTORY}/{file}"))?;
        }
    }
    Ok(())
}
