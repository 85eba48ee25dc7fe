//! Reading a recovery point, or the newest committed state: the replica, overlaid with what runs
//! and journal hold beyond it.
//!
//! A view stays right while promotion and thinning go on beside it: promotion writes only bytes
//! that the view takes from the layers, because it never goes beyond a point that somebody reads
//! (`super::holds`), or beyond an epoch that the volume's only session has not committed itself.
//! Layers keep their files.

use super::disk::DiskFile;
use super::index::{FrameSpot, Origin, Piece};
use super::layers::{Layer, overlay};
use secondsite_format::extent::Content;
use secondsite_format::ids::Epoch;
use secondsite_format::limits;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;

/// Bytes of the replica read in one go.
const READ_BYTES: usize = 1 << 20;
/// Unpacked frames kept while digests are made, bytes: scattered extents of one frame are met one
/// after the other, and each layer has its own frame at hand.
const FRAMES_BYTES: usize = 8 << 20;
/// Most memory that making digests takes, bytes.
pub const READING_BYTES_MAX: usize = READ_BYTES + FRAMES_BYTES + (2 << 20);

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Unpacks frames, keeping those that were asked for last.
pub struct FrameReader {
    kept: HashMap<FrameSpot, (u64, Arc<Content>)>,
    bytes: usize,
    bytes_max: usize,
    asked: u64,
}

impl FrameReader {
    /// One that keeps so many bytes, and one frame more.
    pub fn new(bytes_max: usize) -> Self {
        Self { kept: HashMap::new(), bytes: 0, bytes_max, asked: 0 }
    }

    /// Whether a frame is at hand.
    pub fn has(&self, spot: FrameSpot) -> bool {
        self.kept.contains_key(&spot)
    }

    /// The content of a frame of a layer, its digest checked again.
    pub fn content(&mut self, layer: &Layer, spot: FrameSpot) -> io::Result<Arc<Content>> {
        self.asked += 1;
        if let Some((asked, content)) = self.kept.get_mut(&spot) {
            *asked = self.asked;
            return Ok(content.clone());
        }
        let frame = layer.frame(spot)?.read()?;
        // That it lies in its epoch's volume was checked when it was committed, or opened again.
        let content = Content::decode(&frame.body, limits::VOLUME_BYTES_MAX)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        let content = Arc::new(content);
        if self.bytes + content.memory_bytes() > self.bytes_max {
            self.forget_older_half();
        }
        self.bytes += content.memory_bytes();
        self.kept.insert(spot, (self.asked, content.clone()));
        Ok(content)
    }

    fn forget_older_half(&mut self) {
        let mut asked: Vec<u64> = self.kept.values().map(|(asked, _)| *asked).collect();
        let middle = asked.len() / 2;
        if middle > 0 {
            let middle = *asked.select_nth_unstable(middle).1;
            self.kept.retain(|_, (asked, _)| *asked >= middle);
        } else {
            self.kept.clear();
        }
        self.bytes = self.kept.values().map(|(_, content)| content.memory_bytes()).sum();
        if self.bytes > self.bytes_max {
            self.kept.clear();
            self.bytes = 0;
        }
    }

    /// The bytes of a piece that [`overlay`] took from `layers`; none if they are zero.
    pub fn piece<T>(
        &mut self,
        layers: &[Layer],
        piece: &Piece,
        with: impl FnOnce(Option<&[u8]>) -> io::Result<T>,
    ) -> io::Result<T> {
        match piece.origin {
            Origin::Zero => with(None),
            Origin::Payload { frame, at } => {
                let content = self.content(&layers[piece.of as usize], frame)?;
                let end = at as usize + (piece.end - piece.start) as usize;
                let bytes = content.payload().get(at as usize..end).ok_or_else(|| {
                    let what = "an index names bytes that its frame does not have";
                    io::Error::new(io::ErrorKind::InvalidData, what)
                })?;
                with(Some(bytes))
            }
        }
    }
}

/// A recovery point of a volume, or its newest committed state.
pub struct View {
    /// The replica volume.
    pub replica: Arc<dyn DiskFile>,
    /// What is newer, oldest first.
    pub layers: Vec<Layer>,
    /// Nothing newer than this is shown.
    pub upto: Epoch,
    /// How far the replica goes. Beyond it there is only what the layers hold; the rest is zero.
    pub replica_bytes: u64,
    /// Size of the volume at this point, bytes.
    pub volume_bytes: u64,
}

impl View {
    /// BLAKE3 of each piece of `piece_bytes` in `offset..offset + bytes`; zero where a piece reads
    /// as zero throughout. Holes are not read.
    pub fn digests(&self, offset: u64, bytes: u64, piece_bytes: u64) -> io::Result<Vec<[u8; 32]>> {
        let mut reader = FrameReader::new(FRAMES_BYTES);
        let mut buffer = vec![0; READ_BYTES.min(bytes as usize)];
        let end = offset + bytes;
        let mut digests = Vec::new();
        let mut at = offset;
        while at < end {
            let next = at.saturating_add(piece_bytes).min(end);
            let mut digest = PieceDigest::default();
            self.walk(at, next, &mut reader, &mut buffer, &mut |bytes, content| match content {
                Some(content) => digest.add(content),
                None => digest.zeros += bytes,
            })?;
            digests.push(digest.finish());
            at = next;
        }
        Ok(digests)
    }

    /// Fills `out` from `offset` on.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let mut reader = FrameReader::new(FRAMES_BYTES);
        let mut buffer = vec![0; READ_BYTES.min(out.len())];
        let mut at = 0;
        let end = offset + out.len() as u64;
        self.walk(offset, end, &mut reader, &mut buffer, &mut |bytes, content| {
            let part = &mut out[at..at + bytes as usize];
            match content {
                Some(content) => part.copy_from_slice(content),
                None => part.fill(0),
            }
            at += bytes as usize;
        })
    }

    /// Hands over every byte of a range in order; `None` where they are known to be zero.
    fn walk(
        &self,
        start: u64,
        end: u64,
        reader: &mut FrameReader,
        buffer: &mut [u8],
        to: &mut dyn FnMut(u64, Option<&[u8]>),
    ) -> io::Result<()> {
        let mut at = start;
        for piece in overlay(&self.layers, start, end, self.upto)? {
            self.walk_replica(at, piece.start, buffer, to)?;
            reader.piece(&self.layers, &piece, |content| {
                to(piece.end - piece.start, content);
                Ok(())
            })?;
            at = piece.end;
        }
        self.walk_replica(at, end, buffer, to)
    }

    fn walk_replica(
        &self,
        start: u64,
        end: u64,
        buffer: &mut [u8],
        to: &mut dyn FnMut(u64, Option<&[u8]>),
    ) -> io::Result<()> {
        let mut at = start;
        while at < end {
            let data = match at < self.replica_bytes {
                true => self.replica.next_data(at)?.min(end),
                false => end,
            };
            if data > at {
                to(data - at, None);
                at = data;
                continue;
            }
            let count = buffer.len().min((end.min(self.replica_bytes) - at) as usize);
            self.replica.read_at(at, &mut buffer[..count])?;
            to(count as u64, Some(&buffer[..count]));
            at += count as u64;
        }
        Ok(())
    }
}

/// A digest that hashes nothing as long as everything is zero.
#[derive(Default)]
struct PieceDigest {
    zeros: u64,
    hash: Option<blake3::Hasher>,
}

impl PieceDigest {
    fn add(&mut self, content: &[u8]) {
        for chunk in content.chunks(ZEROS.len()) {
            if chunk == &ZEROS[..chunk.len()] {
                self.zeros += chunk.len() as u64;
                continue;
            }
            let mut hash = self.hash.take().unwrap_or_default();
            self.add_zeros(&mut hash);
            hash.update(chunk);
            self.hash = Some(hash);
        }
    }

    fn add_zeros(&mut self, hash: &mut blake3::Hasher) {
        while self.zeros > 0 {
            let count = self.zeros.min(ZEROS.len() as u64);
            hash.update(&ZEROS[..count as usize]);
            self.zeros -= count;
        }
    }

    fn finish(mut self) -> [u8; 32] {
        let Some(mut hash) = self.hash.take() else { return [0; 32] };
        self.add_zeros(&mut hash);
        *hash.finalize().as_bytes()
    }
}
