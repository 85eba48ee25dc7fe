//! Frames: a header of 80 bytes and a body. What travels, and what the journal holds.
//!
//! The digest (XXH3-128 over the header with a zeroed digest, then the body) guards against
//! damage, not against forgery: TLS and the signed manifest do that.

use crate::bytes::Reader;
use crate::ids::{CutId, Epoch, Generation};
use crate::{FormatError, limits};
use xxhash_rust::xxh3::Xxh3;

/// `"SSF1"`, little-endian.
pub const MAGIC: u32 = u32::from_le_bytes(*b"SSF1");
/// The newest version of the frame layout; a higher one is refused.
pub const VERSION: u16 = 1;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 80;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameKind {
    /// Source to target, first on a connection: [`crate::message::Hello`].
    Hello = 1,
    /// Target to source: [`crate::message::Welcome`].
    Welcome = 2,
    /// Extents of an epoch ([`crate::extent`]); journaled as it came.
    Data = 3,
    /// Extents of the first copy; written straight into the replica volume.
    SyncData = 4,
    /// The signed manifest that commits an epoch ([`crate::manifest`]); journaled as it came.
    Commit = 5,
    /// Source to target: [`crate::message::Request`].
    Request = 6,
    /// Target to source: [`crate::message::Reply`].
    Reply = 7,
    /// Either way, last on a connection: [`crate::message::Refusal`].
    Refusal = 8,
}

impl FrameKind {
    fn from_byte(byte: u8) -> Result<Self, FormatError> {
        Ok(match byte {
            1 => Self::Hello,
            2 => Self::Welcome,
            3 => Self::Data,
            4 => Self::SyncData,
            5 => Self::Commit,
            6 => Self::Request,
            7 => Self::Reply,
            8 => Self::Refusal,
            found => return Err(FormatError::Kind { what: "frame kind", found: found.into() }),
        })
    }

    /// Largest body that a frame of this kind may have, bytes.
    pub const fn body_bytes_max(self) -> usize {
        match self {
            Self::Data | Self::SyncData => limits::FRAME_BODY_BYTES_MAX,
            Self::Commit => limits::MANIFEST_BYTES_MAX,
            Self::Hello | Self::Welcome | Self::Request | Self::Reply | Self::Refusal => {
                limits::MESSAGE_BYTES_MAX
            }
        }
    }
}

/// The fields of a header, digest and length aside. `epoch`, `cut_id`, `pass` and `seq` are zero
/// where a kind has no use for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the body is.
    pub kind: FrameKind,
    /// The volume's generation.
    pub generation: Generation,
    /// The epoch that the frame belongs to.
    pub epoch: Epoch,
    /// The cut that the frame belongs to.
    pub cut_id: CutId,
    /// Pre-copy pass, from 1; in an epoch the highest pass of a block wins, and within a pass the
    /// higher `seq`.
    pub pass: u32,
    /// Place of the frame in its epoch (or first copy), from 0 without gaps.
    pub seq: u32,
    /// Byte offset on the volume of the first extent; 0 for an empty body.
    pub offset: u64,
}

impl FrameHeader {
    /// A header for a control message: everything but the kind is zero.
    pub fn message(kind: FrameKind) -> Self {
        Self {
            kind,
            generation: Generation(0),
            epoch: Epoch(0),
            cut_id: CutId::NONE,
            pass: 0,
            seq: 0,
            offset: 0,
        }
    }

    /// The 80 bytes of the header for `body`, digest included.
    ///
    /// # Panics
    /// If the body is longer than its kind allows: the encoder's bug, never the peer's.
    pub fn encode(&self, body: &[u8]) -> [u8; HEADER_BYTES] {
        assert!(body.len() <= self.kind.body_bytes_max(), "frame body exceeds its limit");
        let mut header = [0; HEADER_BYTES];
        header[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        header[4..6].copy_from_slice(&VERSION.to_le_bytes());
        header[6] = self.kind as u8;
        header[8..12].copy_from_slice(&(body.len() as u32).to_le_bytes());
        header[12..16].copy_from_slice(&self.pass.to_le_bytes());
        header[16..24].copy_from_slice(&self.generation.0.to_le_bytes());
        header[24..32].copy_from_slice(&self.epoch.0.to_le_bytes());
        header[32..48].copy_from_slice(&self.cut_id.0);
        header[48..56].copy_from_slice(&self.offset.to_le_bytes());
        header[56..60].copy_from_slice(&self.seq.to_le_bytes());
        let digest = digest(&header, body);
        header[64..80].copy_from_slice(&digest);
        header
    }
}

/// XXH3-128 of a header (its digest field counted as zero) and its body.
fn digest(header: &[u8; HEADER_BYTES], body: &[u8]) -> [u8; 16] {
    let mut hash = Xxh3::new();
    hash.update(&header[..64]);
    hash.update(body);
    hash.digest128().to_le_bytes()
}

/// A header whose magic, version, kind and length were checked; its digest is not yet.
#[derive(Debug, Clone)]
pub struct RawHeader {
    fields: FrameHeader,
    body_bytes: usize,
    bytes: [u8; HEADER_BYTES],
}

impl RawHeader {
    /// Checks what can be checked before any memory is taken for the body.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FormatError> {
        let mut r = Reader::new("frame header", bytes);
        let magic = r.u32()?;
        if magic != MAGIC {
            return Err(FormatError::Magic { found: magic });
        }
        r.version("frame", VERSION)?;
        let [kind, flags] = r.array()?;
        let kind = FrameKind::from_byte(kind)?;
        if flags != 0 {
            return Err(FormatError::Kind { what: "frame flags", found: flags.into() });
        }
        let body_bytes = r.count("frame body", kind.body_bytes_max())?;
        let pass = r.u32()?;
        let generation = Generation(r.u64()?);
        let epoch = Epoch(r.u64()?);
        let cut_id = CutId(r.array()?);
        let offset = r.u64()?;
        let seq = r.u32()?;
        if r.u32()? != 0 {
            return Err(FormatError::Inconsistent { what: "frame header", why: "reserved bytes" });
        }
        let fields = FrameHeader { kind, generation, epoch, cut_id, pass, seq, offset };
        Ok(Self { fields, body_bytes, bytes: *bytes })
    }

    /// Bytes of the body that follows.
    pub fn body_bytes(&self) -> usize {
        self.body_bytes
    }

    /// The kind, as far as an undigested header can be believed.
    pub fn kind(&self) -> FrameKind {
        self.fields.kind
    }

    /// Joins the body; checks length and digest.
    pub fn with_body(self, body: Vec<u8>) -> Result<Frame, FormatError> {
        if body.len() != self.body_bytes {
            return Err(FormatError::Truncated {
                what: "frame body",
                have: body.len() as u64,
                need: self.body_bytes as u64,
            });
        }
        if digest(&self.bytes, &body) != self.bytes[64..80] {
            return Err(FormatError::Digest { what: "frame" });
        }
        Ok(Frame { header: self.fields, header_bytes: self.bytes, body })
    }
}

/// A frame whose digest was checked. Its content is still the peer's word: see
/// [`crate::extent::Content::decode`] and [`crate::manifest::SignedManifest::decode`].
#[derive(Debug, Clone)]
pub struct Frame {
    /// The header's fields.
    pub header: FrameHeader,
    header_bytes: [u8; HEADER_BYTES],
    /// The body as it travelled.
    pub body: Vec<u8>,
}

impl Frame {
    /// Makes a frame to send.
    pub fn new(header: FrameHeader, body: Vec<u8>) -> Self {
        let header_bytes = header.encode(&body);
        Self { header, header_bytes, body }
    }

    /// The header as it travels and is journaled.
    pub fn header_bytes(&self) -> &[u8; HEADER_BYTES] {
        &self.header_bytes
    }

    /// Header and body, bytes.
    pub fn total_bytes(&self) -> u64 {
        (HEADER_BYTES + self.body.len()) as u64
    }
}
