//! Reading the newest committed state of a volume: the replica, overlaid with what the journal
//! holds beyond it.
//!
//! A view stays right while promotion goes on beside it: promotion writes only bytes that the
//! view takes from the journal, and no epoch newer than the view's is promoted before the view's
//! session (the volume's only one) has asked and committed that epoch itself.

use super::disk::DiskFile;
use super::index::{EpochIndex, Origin, Piece, overlay};
use super::journal::FramePlace;
use secondsite_format::extent::Content;
use secondsite_format::limits;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

/// Bytes of the replica read in one go.
const READ_BYTES: usize = 1 << 20;
/// Unpacked frames kept while pieces are read in order of the volume: scattered extents of one
/// frame are met one after the other, and each overlaid epoch has its own frame at hand.
const FRAMES_KEPT: usize = 8;
/// Most memory that reading takes, bytes.
pub const READING_BYTES_MAX: usize = READ_BYTES + (FRAMES_KEPT + 1) * (1 << 20);

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Unpacks frames of the journal, keeping the last few.
#[derive(Default)]
pub struct FrameReader {
    kept: VecDeque<((u64, u64), Arc<Content>)>,
}

impl FrameReader {
    /// The content of a frame, its digest checked again.
    pub fn content(&mut self, place: &FramePlace) -> io::Result<Arc<Content>> {
        let key = (place.segment.number, place.offset);
        if let Some(at) = self.kept.iter().position(|(other, _)| *other == key) {
            let found = self.kept.remove(at).expect("it was just found");
            self.kept.push_front(found.clone());
            return Ok(found.1);
        }
        let frame = place.read()?;
        // That it lies in its epoch's volume was checked when it was committed, or opened again.
        let content = Content::decode(&frame.body, limits::VOLUME_BYTES_MAX)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        let content = Arc::new(content);
        self.kept.truncate(FRAMES_KEPT - 1);
        self.kept.push_front((key, content.clone()));
        Ok(content)
    }

    /// The bytes of a piece of one of `epochs`; none if they are zero.
    pub fn piece<T>(
        &mut self,
        epochs: &[Arc<EpochIndex>],
        piece: &Piece,
        with: impl FnOnce(Option<&[u8]>) -> io::Result<T>,
    ) -> io::Result<T> {
        match piece.origin {
            Origin::Zero => with(None),
            Origin::Payload { frame, at } => {
                let content = self.content(&epochs[piece.of as usize].frames[frame as usize])?;
                let end = at as usize + (piece.end - piece.start) as usize;
                with(Some(&content.payload()[at as usize..end]))
            }
        }
    }
}

/// The newest committed state of a volume.
pub struct View {
    /// The replica volume.
    pub replica: Arc<dyn DiskFile>,
    /// What is newer, oldest first.
    pub epochs: Vec<Arc<EpochIndex>>,
    /// How far the replica goes. Beyond it there is only what the epochs hold; the rest is zero.
    pub replica_bytes: u64,
}

impl View {
    /// BLAKE3 of each piece of `piece_bytes` in `offset..offset + bytes`; zero where a piece reads
    /// as zero throughout. Holes are not read.
    pub fn digests(&self, offset: u64, bytes: u64, piece_bytes: u64) -> io::Result<Vec<[u8; 32]>> {
        let mut reader = FrameReader::default();
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
        let mut reader = FrameReader::default();
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
        for piece in overlay(&self.epochs, start, end) {
            self.walk_replica(at, piece.start, buffer, to)?;
            reader.piece(&self.epochs, &piece, |content| {
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
