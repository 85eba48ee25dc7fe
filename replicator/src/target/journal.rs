//! The journal of one volume: append-only segments of frames as they came over the wire.
//!
//! Invariants:
//! - data frames of an epoch, then its commit frame; nothing follows before that commit is durable;
//! - the data is synced before the commit frame is written, so a commit frame found whole proves
//!   that what stands before it was durable once: damage there is damage, never a torn write;
//! - after a failed sync nothing here is believed any more: the owner stops the volume.
//!
//! Only [`super::keeper`] calls this. Layout in docs/formats.md.

pub use super::segments::Segment;
use super::segments::Segments;
use secondsite_format::frame::{Frame, HEADER_BYTES, RawHeader};
use secondsite_format::ids::VolumeId;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_128;

/// Folder of the segments.
pub const FOLDER: &str = "journal";
/// `"SSJ1"`.
const MAGIC: [u8; 4] = *b"SSJ1";
/// Newest version of the segment layout; a higher one is refused.
pub const VERSION: u16 = 1;
/// Bytes of a segment's header.
pub const SEGMENT_HEADER_BYTES: u64 = 512;

/// A place in the journal; frames of later epochs have higher ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// Number of the segment.
    pub segment: u64,
    /// Byte in it.
    pub offset: u64,
}

impl Place {
    /// Where the first frame of a new journal goes.
    pub const START: Self = Self { segment: 1, offset: SEGMENT_HEADER_BYTES };
}

/// Why a segment's header could not be checked.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// It could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A newer Secondsite wrote it.
    #[error("written by a newer Secondsite (version {found})")]
    Newer {
        /// Its version.
        found: u16,
    },
}

/// The header of a segment: magic, version (u16), reserved (u16), number (u64), volume (16), XXH3-128 of these 32 bytes (16),
/// zeros up to 512.
pub fn segment_header(volume: VolumeId, number: u64) -> [u8; SEGMENT_HEADER_BYTES as usize] {
    let mut header = [0; SEGMENT_HEADER_BYTES as usize];
    header[..4].copy_from_slice(&MAGIC);
    header[4..6].copy_from_slice(&VERSION.to_le_bytes());
    header[8..16].copy_from_slice(&number.to_le_bytes());
    header[16..32].copy_from_slice(&volume.0);
    let digest = xxh3_128(&header[..32]);
    header[32..48].copy_from_slice(&digest.to_le_bytes());
    header
}

/// Where a frame lies.
#[derive(Debug, Clone)]
pub struct FramePlace {
    /// The segment.
    pub segment: Arc<Segment>,
    /// First byte of its header.
    pub offset: u64,
    /// Header and body, bytes.
    pub bytes: u32,
}

impl FramePlace {
    /// Reads it back and checks its digest again.
    pub fn read(&self) -> io::Result<Frame> {
        let mut header = [0; HEADER_BYTES];
        let file = self.segment.file()?;
        file.read_at(self.offset, &mut header)?;
        let mut body = vec![0; self.bytes as usize - HEADER_BYTES];
        file.read_at(self.offset + HEADER_BYTES as u64, &mut body)?;
        let frame = RawHeader::parse(&header).and_then(|raw| raw.with_body(body));
        frame.map_err(|cause| {
            let name = Segment::name(self.segment.number);
            let what = format!("{name} is damaged at offset {}: {cause}", self.offset);
            io::Error::new(io::ErrorKind::InvalidData, what)
        })
    }
}

/// The end of the journal, where frames are appended.
pub struct Journal {
    segments: Arc<Segments>,
    volume: VolumeId,
    current: Option<Arc<Segment>>,
    end: Place,
    committed: Place,
    unsynced: Vec<Arc<Segment>>,
    names_unsynced: bool,
}

impl Journal {
    /// Goes on at `end`, behind the last commit; `current` is the segment of that number if it can
    /// take more, else a new one is begun there.
    pub fn new(
        segments: Arc<Segments>,
        volume: VolumeId,
        current: Option<Arc<Segment>>,
        end: Place,
    ) -> Self {
        let unsynced = Vec::new();
        Self { segments, volume, current, end, committed: end, unsynced, names_unsynced: false }
    }

    /// Appends a frame; it is not durable yet. After an error the frame is not there, and the
    /// journal is as before.
    pub fn append(&mut self, frame: &Frame) -> io::Result<FramePlace> {
        let segment = self.segment_for_append()?;
        let offset = self.end.offset;
        let file = segment.file()?;
        file.write_at(offset, frame.header_bytes())?;
        file.write_at(offset + HEADER_BYTES as u64, &frame.body)?;
        self.end.offset += frame.total_bytes();
        if self.unsynced.last().is_none_or(|last| last.number != segment.number) {
            self.unsynced.push(segment.clone());
        }
        Ok(FramePlace { segment, offset, bytes: frame.total_bytes() as u32 })
    }

    /// Makes the segment that a commit frame goes to. The next sync makes its header durable with
    /// the data, so that a commit frame found whole proves that too.
    pub fn begin_commit(&mut self) -> io::Result<()> {
        self.segment_for_append().map(drop)
    }

    fn segment_for_append(&mut self) -> io::Result<Arc<Segment>> {
        let enough = if self.end == self.committed {
            self.segments.disk().segment_bytes().enough // an epoch begins here
        } else {
            self.segments.disk().segment_bytes().max
        };
        let number = match &self.current {
            Some(segment) if self.end.offset <= enough => return Ok(segment.clone()),
            Some(segment) => segment.number + 1,
            None => self.end.segment,
        };
        let segment = self.segments.create(self.volume, number)?;
        if self.end == self.committed {
            self.committed = Place { segment: number, offset: SEGMENT_HEADER_BYTES };
        }
        self.end = Place { segment: number, offset: SEGMENT_HEADER_BYTES };
        self.current = Some(segment.clone());
        self.unsynced.push(segment.clone());
        self.names_unsynced = true;
        Ok(segment)
    }

    /// Makes everything appended durable.
    pub fn sync(&mut self) -> io::Result<()> {
        for segment in &self.unsynced {
            segment.file()?.sync()?;
        }
        self.unsynced.clear();
        if self.names_unsynced {
            self.segments.disk().sync_names(FOLDER)?;
            self.names_unsynced = false;
        }
        Ok(())
    }

    /// What was appended up to now is a committed epoch: its commit frame is durable. Returns
    /// where the next one begins.
    pub fn mark_committed(&mut self) -> Place {
        self.committed = self.end;
        self.committed
    }

    /// Takes back what was appended since the last commit. It was never acknowledged as durable,
    /// so nobody counts on it.
    pub fn drop_staged(&mut self) -> io::Result<()> {
        if self.end == self.committed {
            return Ok(());
        }
        for number in (self.committed.segment + 1..=self.end.segment).rev() {
            self.segments.remove(number)?;
            self.names_unsynced = true;
        }
        if self.current.as_ref().is_none_or(|current| current.number != self.committed.segment) {
            self.current = Some(self.segments.get(self.committed.segment));
        }
        let current = self.current.as_ref().expect("it was just set");
        current.file()?.truncate(self.committed.offset)?;
        self.unsynced = vec![current.clone()];
        self.end = self.committed;
        Ok(())
    }
}
