//! Extents: the body of [`FrameKind::Data`](crate::frame::FrameKind) and `SyncData` frames.
//!
//! Layout: count of extents (u32), codec (u32: 0 raw, 1 lz4 block), payload bytes uncompressed
//! (u32), reserved (u32); then 16 bytes an extent: offset in bytes (u64), length in bytes with the
//! kind in the two highest bits (u64; 0 data, 1 zero, 2 discard); then the payload: the data
//! extents' bytes in table order, compressed together.
//!
//! Extents of one frame never overlap and stand in rising order of offset.

use crate::bytes::Reader;
use crate::{FormatError, limits};

/// Bytes of one row of the extent table.
pub const EXTENT_BYTES: usize = 16;
const TABLE_HEADER_BYTES: usize = 16;
const KIND_SHIFT: u32 = 62;
const LENGTH_MASK: u64 = (1 << KIND_SHIFT) - 1;

/// What happens to the bytes of an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// They become the payload's bytes.
    Data,
    /// They become zero.
    Zero,
    /// They were discarded: they read as zero here, and space may be given back.
    Discard,
}

/// A run of bytes of the volume, a multiple of 512 at both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Where it starts, bytes.
    pub offset: u64,
    /// How long it is, bytes; at least 512; data at most [`limits::FRAME_PAYLOAD_BYTES_MAX`].
    pub bytes: u64,
    /// What happens to it.
    pub kind: ExtentKind,
}

impl Extent {
    /// One past its last byte.
    pub fn end(&self) -> u64 {
        self.offset + self.bytes
    }
}

/// The extents of a frame with their payload, uncompressed and checked: rising, not overlapping,
/// within the volume, and the payload is exactly what the data extents need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    extents: Vec<Extent>,
    payload: Vec<u8>,
}

impl Content {
    /// Puts extents and payload together, checked as if they came from a peer.
    pub fn new(extents: Vec<Extent>, payload: Vec<u8>) -> Result<Self, FormatError> {
        check(&extents, payload.len(), u64::MAX)?;
        Ok(Self { extents, payload })
    }

    /// The extents, rising.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The bytes of all data extents, in order.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// What it takes in memory, about, bytes.
    pub fn memory_bytes(&self) -> usize {
        self.payload.len() + self.extents.len() * size_of::<Extent>()
    }

    /// Each extent with its bytes (empty for zero and discard).
    pub fn parts(&self) -> impl Iterator<Item = (Extent, &[u8])> {
        let mut rest = self.payload.as_slice();
        self.extents.iter().map(move |extent| {
            let count = if extent.kind == ExtentKind::Data { extent.bytes as usize } else { 0 };
            let (head, tail) = rest.split_at(count);
            rest = tail;
            (*extent, head)
        })
    }

    /// BLAKE3 over table and uncompressed payload; what manifests are built from. Independent of
    /// the codec, so that a relay may recompress.
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = blake3::Hasher::new();
        hash.update(&(self.extents.len() as u64).to_le_bytes());
        for extent in &self.extents {
            hash.update(&row(extent));
        }
        hash.update(&self.payload);
        *hash.finalize().as_bytes()
    }

    /// The frame body; lz4 where that is smaller.
    pub fn encode(&self) -> Vec<u8> {
        let table_bytes = TABLE_HEADER_BYTES + self.extents.len() * EXTENT_BYTES;
        let compressed_bytes_max = lz4_flex::block::get_maximum_output_size(self.payload.len());
        let mut body = vec![0; table_bytes + compressed_bytes_max];
        body[0..4].copy_from_slice(&(self.extents.len() as u32).to_le_bytes());
        body[8..12].copy_from_slice(&(self.payload.len() as u32).to_le_bytes());
        for (i, extent) in self.extents.iter().enumerate() {
            let at = TABLE_HEADER_BYTES + i * EXTENT_BYTES;
            body[at..at + EXTENT_BYTES].copy_from_slice(&row(extent));
        }
        let compressed = lz4_flex::block::compress_into(&self.payload, &mut body[table_bytes..]);
        match compressed {
            Ok(count) if count < self.payload.len() => {
                body[4..8].copy_from_slice(&1u32.to_le_bytes());
                body.truncate(table_bytes + count);
            }
            _ => {
                body.truncate(table_bytes);
                body.extend_from_slice(&self.payload);
            }
        }
        body
    }

    /// Reads a frame body for a volume of `volume_bytes`. Memory is taken only for what the
    /// checked table says, at most [`limits::FRAME_PAYLOAD_BYTES_MAX`]; a surplus is an error.
    pub fn decode(body: &[u8], volume_bytes: u64) -> Result<Self, FormatError> {
        let mut r = Reader::new("extent table", body);
        let count = r.count("extent count", limits::FRAME_EXTENTS_MAX)?;
        let codec = r.u32()?;
        let payload_bytes = r.count("frame payload", limits::FRAME_PAYLOAD_BYTES_MAX)?;
        if r.u32()? != 0 {
            return Err(FormatError::Inconsistent { what: "extent table", why: "reserved bytes" });
        }
        let mut table = Reader::new("extent table", r.take(count * EXTENT_BYTES)?);
        let mut extents = Vec::with_capacity(count);
        for _ in 0..count {
            let offset = table.u64()?;
            let word = table.u64()?;
            let kind = match word >> KIND_SHIFT {
                0 => ExtentKind::Data,
                1 => ExtentKind::Zero,
                2 => ExtentKind::Discard,
                found => {
                    return Err(FormatError::Kind { what: "extent kind", found: found as u32 });
                }
            };
            extents.push(Extent { offset, bytes: word & LENGTH_MASK, kind });
        }
        check(&extents, payload_bytes, volume_bytes)?;
        let packed = r.rest();
        let payload = match codec {
            0 => packed.to_vec(),
            1 => {
                let mut payload = vec![0; payload_bytes];
                let count =
                    lz4_flex::block::decompress_into(packed, &mut payload).map_err(|_| {
                        FormatError::Inconsistent {
                            what: "frame payload",
                            why: "lz4 cannot read it",
                        }
                    })?;
                payload.truncate(count);
                payload
            }
            found => return Err(FormatError::Kind { what: "codec", found }),
        };
        if payload.len() != payload_bytes {
            return Err(FormatError::Inconsistent {
                what: "frame payload",
                why: "its length is not the one stated",
            });
        }
        Ok(Self { extents, payload })
    }
}

fn row(extent: &Extent) -> [u8; EXTENT_BYTES] {
    let kind: u64 = match extent.kind {
        ExtentKind::Data => 0,
        ExtentKind::Zero => 1,
        ExtentKind::Discard => 2,
    };
    let mut row = [0; EXTENT_BYTES];
    row[..8].copy_from_slice(&extent.offset.to_le_bytes());
    row[8..].copy_from_slice(&(extent.bytes | kind << KIND_SHIFT).to_le_bytes());
    row
}

fn check(extents: &[Extent], payload_bytes: usize, volume_bytes: u64) -> Result<(), FormatError> {
    let wrong = |why| Err(FormatError::Inconsistent { what: "extent table", why });
    if extents.len() > limits::FRAME_EXTENTS_MAX {
        return wrong("too many extents");
    }
    if payload_bytes > limits::FRAME_PAYLOAD_BYTES_MAX {
        return wrong("payload too large");
    }
    let mut free_from = 0;
    let mut data_bytes = 0u64;
    for extent in extents {
        if extent.bytes == 0 || extent.bytes % 512 != 0 || extent.offset % 512 != 0 {
            return wrong("an extent is not whole sectors");
        }
        if extent.offset < free_from {
            return wrong("extents overlap or are out of order");
        }
        free_from = match extent.offset.checked_add(extent.bytes) {
            Some(end) if end <= volume_bytes && extent.bytes <= LENGTH_MASK => end,
            _ => return wrong("an extent reaches beyond the volume"),
        };
        if extent.kind == ExtentKind::Data {
            data_bytes += extent.bytes;
        }
    }
    if data_bytes != payload_bytes as u64 {
        return wrong("its data extents do not add up to the payload");
    }
    Ok(())
}
