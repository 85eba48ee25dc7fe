//! A recovery point of a volume as a device that only reads.
//!
//! Bounds: what stands where is sorted out by windows of 1 MiB, of which the newest are kept, and
//! so are unpacked frames; both have a limit that neither the volume's size nor the number of
//! points changes. What small reads have unpacked goes to [`Unpacked`], if there is one. Damage is
//! an error of the read that meets it, never other bytes.

use super::index::{Origin, Piece};
use super::layers::overlay;
use super::unpacked::Unpacked;
use super::view::{FrameReader, View};
use crate::nbd::{Device, Run};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

const WINDOW_BYTES: u64 = 1 << 20;
/// Pieces of all kept windows: 48 bytes each.
const WINDOWS_PIECES: usize = 1 << 19;
/// Counted for a window besides its pieces.
const WINDOW_PIECES: usize = 4;
/// Kept frames are spread over this many caches, each with a lock of its own.
const SHARDS: usize = 8;
/// Unpacked frames kept in each, bytes.
const SHARD_BYTES: usize = 8 << 20;

/// A longer read makes use of much of what it unpacks, which is then read by nobody again soon.
const SMALL_BYTES: usize = 64 << 10;

/// See the module.
pub struct PointDevice {
    view: View,
    windows: Mutex<Windows>,
    shards: [Mutex<FrameReader>; SHARDS],
    unpacked: Option<Unpacked>,
}

#[derive(Default)]
struct Windows {
    /// By number: when it was asked for last, and its pieces.
    kept: HashMap<u64, (u64, Arc<[Piece]>)>,
    asked: u64,
    pieces: usize,
}

impl Windows {
    fn keep(&mut self, number: u64, pieces: &Arc<[Piece]>) {
        let weight = |pieces: &Arc<[Piece]>| pieces.len() + WINDOW_PIECES;
        if self.pieces + weight(pieces) > WINDOWS_PIECES {
            // The older half goes.
            let mut asked: Vec<u64> = self.kept.values().map(|(asked, _)| *asked).collect();
            let middle = asked.len() / 2;
            let middle = asked.select_nth_unstable(middle).1;
            let middle = *middle;
            self.kept.retain(|_, (asked, _)| *asked > middle);
            self.pieces = self.kept.values().map(|(_, pieces)| weight(pieces)).sum();
        }
        self.asked += 1;
        if self.kept.insert(number, (self.asked, pieces.clone())).is_none() {
            self.pieces += weight(pieces);
        }
    }
}

impl PointDevice {
    /// Shows a view.
    pub fn new(view: View) -> Self {
        let shard = || Mutex::new(FrameReader::new(SHARD_BYTES));
        let shards = std::array::from_fn(|_| shard());
        Self { view, windows: Mutex::default(), shards, unpacked: None }
    }

    /// Shows a view, with a place for what small reads unpack.
    pub fn with_unpacked(view: View, unpacked: Unpacked) -> Self {
        Self { unpacked: Some(unpacked), ..Self::new(view) }
    }

    fn windows(&self) -> MutexGuard<'_, Windows> {
        self.windows.lock().expect("nothing panics while it holds the windows")
    }

    /// The pieces of a window.
    fn window(&self, number: u64) -> io::Result<Arc<[Piece]>> {
        {
            let mut windows = self.windows();
            windows.asked += 1;
            let now = windows.asked;
            if let Some((asked, pieces)) = windows.kept.get_mut(&number) {
                *asked = now;
                return Ok(pieces.clone());
            }
        }
        let start = number * WINDOW_BYTES;
        let pieces: Arc<[Piece]> =
            overlay(&self.view.layers, start, start + WINDOW_BYTES, self.view.upto)?.into();
        self.windows().keep(number, &pieces);
        Ok(pieces)
    }

    /// Shows what covers `start..end`, in order: a piece, or none where the replica shows.
    fn walk(
        &self,
        start: u64,
        end: u64,
        mut show: impl FnMut(u64, u64, Option<&Piece>) -> io::Result<bool>,
    ) -> io::Result<()> {
        let mut at = start;
        while at < end {
            let number = at / WINDOW_BYTES;
            let window_end = end.min((number + 1) * WINDOW_BYTES);
            let window = self.window(number)?;
            let first = window.partition_point(|piece| piece.end <= at);
            for piece in window[first..].iter().take_while(|piece| piece.start < window_end) {
                if piece.start > at && !show(at, piece.start, None)? {
                    return Ok(());
                }
                let (from, to) = (piece.start.max(at), piece.end.min(window_end));
                let part = piece.within(from, to).expect("it touches the range");
                if !show(from, to, Some(&part))? {
                    return Ok(());
                }
                at = to;
            }
            if at < window_end && !show(at, window_end, None)? {
                return Ok(());
            }
            at = window_end;
        }
        Ok(())
    }
}

impl Device for PointDevice {
    fn bytes(&self) -> u64 {
        self.view.volume_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let small = buffer.len() <= SMALL_BYTES;
        let end = offset + buffer.len() as u64;
        self.walk(offset, end, |from, to, piece| {
            let part = &mut buffer[(from - offset) as usize..(to - offset) as usize];
            let Some(piece) = piece else {
                let held = to.min(self.view.replica_bytes).saturating_sub(from) as usize;
                let (held, beyond) = part.split_at_mut(held);
                beyond.fill(0);
                if !held.is_empty() {
                    self.view.replica.read_at(from, held)?;
                }
                return Ok(true);
            };
            let Origin::Payload { frame, at } = piece.origin else {
                part.fill(0);
                return Ok(true);
            };
            if let Some(unpacked) = &self.unpacked
                && unpacked.read(frame, at, part)?
            {
                return Ok(true);
            }
            let shard = &self.shards[(frame.offset / 4096 + frame.segment) as usize % SHARDS];
            let mut reader = shard.lock().expect("nothing panics in a frame reader");
            let keep = small && !reader.has(frame);
            reader.piece(&self.view.layers, piece, |content| {
                part.copy_from_slice(content.expect("a piece with a payload has bytes"));
                Ok(())
            })?;
            if let (true, Some(unpacked)) = (keep, &self.unpacked) {
                let content = reader.content(&self.view.layers[piece.of as usize], frame)?;
                drop(reader);
                unpacked.keep(frame, content.payload());
            }
            Ok(true)
        })
    }

    fn extents(&self, offset: u64, bytes: u64, limit: usize) -> io::Result<Vec<Run>> {
        let mut runs: Vec<Run> = Vec::new();
        let add = |runs: &mut Vec<Run>, bytes: u64, hole: bool| match runs.last_mut() {
            Some(last) if last.hole == hole => last.bytes += bytes,
            _ => runs.push(Run { bytes, hole }),
        };
        self.walk(offset, offset + bytes, |from, to, piece| {
            if let Some(piece) = piece {
                add(&mut runs, to - from, piece.origin == Origin::Zero);
                return Ok(runs.len() <= limit);
            }
            let mut at = from;
            while at < to {
                let data = match at < self.view.replica_bytes {
                    true => self.view.replica.next_data(at)?.min(to),
                    false => to,
                };
                if data > at {
                    add(&mut runs, data - at, true);
                    at = data;
                    continue;
                }
                let hole = self.view.replica.next_hole(at)?.min(to).max(at + 1);
                add(&mut runs, hole - at, false);
                at = hole;
            }
            Ok(runs.len() <= limit)
        })?;
        runs.truncate(limit.max(1));
        Ok(runs)
    }
}
