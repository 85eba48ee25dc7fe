//! The signed manifest that commits an epoch: what is in it, which cut it belongs to, and whether
//! it is exact.
//!
//! Each manifest holds the BLAKE3 of the one before it (bytes and signature), so that nobody
//! between agent and target can drop, reorder or alter one. The signature is ECDSA P-256 with
//! SHA-256 (FIPS 186-4, fixed 64-byte form) by the key of the agent's certificate; signing and
//! checking are the caller's, this module only lays out the bytes.

use crate::bytes::Reader;
use crate::ids::{CutId, Epoch, Generation, ServerId, VolumeId};
use crate::{FormatError, limits};

/// Newest version of the manifest layout.
pub const VERSION: u16 = 1;
/// Bytes of an ECDSA P-256 signature in fixed form.
pub const SIGNATURE_BYTES: usize = 64;
/// Bytes of an uncompressed P-256 public key.
pub const PUBLIC_KEY_BYTES: usize = 65;

/// How much a recovery point can be trusted to be the volume at one instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Consistency {
    /// Not proven to be one instant.
    Fuzzy = 0,
    /// Exact: what a power cut at that instant would have left.
    Crash = 1,
    /// Exact, after the application's own hooks.
    Application = 2,
}

/// Where a manifest's epoch came from; display only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CutMethod {
    /// By compare alone: no tracker ran.
    Compare = 0,
    /// eBPF, in a moment without writes.
    Quiet = 1,
    /// eBPF, under a freeze of the file systems.
    Freeze = 2,
    /// ublk, by holding acknowledgements.
    Hold = 3,
    /// eBPF, but neither quiet nor freeze could be proven.
    Unproven = 4,
}

/// One epoch of one volume, as its agent vouches for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The server.
    pub server: ServerId,
    /// The volume.
    pub volume: VolumeId,
    /// Size of the volume at the cut, bytes.
    pub volume_bytes: u64,
    /// The line of epochs.
    pub generation: Generation,
    /// Its number.
    pub epoch: Epoch,
    /// The cut; the same for all volumes of the point.
    pub cut_id: CutId,
    /// Time of the cut by the agent's clock, nanoseconds since 1970 UTC. A label, never an order.
    pub cut_time_ns: u64,
    /// What was proven.
    pub consistency: Consistency,
    /// How the cut was made.
    pub method: CutMethod,
    /// BLAKE3 of the previous manifest of this volume (signed bytes and signature); zero for the
    /// first.
    pub previous: [u8; 32],
    /// Number of data frames; their `seq` is 0..frames.
    pub frames: u32,
    /// BLAKE3 over the frames' [`content digests`](crate::extent::Content::digest) in order of
    /// `seq`.
    pub content: [u8; 32],
    /// Points of this volume from this epoch on lost "exact"; 0 when none did.
    pub doubt_from: Epoch,
    /// All volumes of the recovery point, this one included, sorted.
    pub members: Vec<VolumeId>,
    /// Protected volumes of the server that the point lacks (in first copy or compare), sorted.
    pub lacking: Vec<VolumeId>,
    /// Byte ranges (offset, length) that could not be read; a point with any is fuzzy.
    pub unreadable: Vec<(u64, u64)>,
}

impl Manifest {
    /// The bytes that are signed.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(256 + 16 * (self.members.len() + self.lacking.len()));
        out.extend_from_slice(b"SSM1");
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.push(self.consistency as u8);
        out.push(self.method as u8);
        out.extend_from_slice(&self.server.0);
        out.extend_from_slice(&self.volume.0);
        out.extend_from_slice(&self.volume_bytes.to_le_bytes());
        out.extend_from_slice(&self.generation.0.to_le_bytes());
        out.extend_from_slice(&self.epoch.0.to_le_bytes());
        out.extend_from_slice(&self.cut_id.0);
        out.extend_from_slice(&self.cut_time_ns.to_le_bytes());
        out.extend_from_slice(&self.previous);
        out.extend_from_slice(&self.content);
        out.extend_from_slice(&self.doubt_from.0.to_le_bytes());
        out.extend_from_slice(&self.frames.to_le_bytes());
        for count in [self.members.len(), self.lacking.len(), self.unreadable.len()] {
            out.extend_from_slice(&(count as u32).to_le_bytes());
        }
        for id in self.members.iter().chain(&self.lacking) {
            out.extend_from_slice(&id.0);
        }
        for (offset, bytes) in &self.unreadable {
            out.extend_from_slice(&offset.to_le_bytes());
            out.extend_from_slice(&bytes.to_le_bytes());
        }
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let wrong = |why| Err(FormatError::Inconsistent { what: "manifest", why });
        let mut r = Reader::new("manifest", bytes);
        if r.array::<4>()? != *b"SSM1" {
            return wrong("not a manifest");
        }
        r.version("manifest", VERSION)?;
        let [consistency, method] = r.array()?;
        let consistency = match consistency {
            0 => Consistency::Fuzzy,
            1 => Consistency::Crash,
            2 => Consistency::Application,
            found => return Err(FormatError::Kind { what: "consistency", found: found.into() }),
        };
        let method = match method {
            0 => CutMethod::Compare,
            1 => CutMethod::Quiet,
            2 => CutMethod::Freeze,
            3 => CutMethod::Hold,
            4 => CutMethod::Unproven,
            found => return Err(FormatError::Kind { what: "cut method", found: found.into() }),
        };
        let server = ServerId(r.array()?);
        let volume = VolumeId(r.array()?);
        let volume_bytes = r.u64()?;
        let generation = Generation(r.u64()?);
        let epoch = Epoch(r.u64()?);
        let cut_id = CutId(r.array()?);
        let cut_time_ns = r.u64()?;
        let previous = r.array()?;
        let content = r.array()?;
        let doubt_from = Epoch(r.u64()?);
        let frames = r.u32()?;
        let member_count = r.count("members", limits::MEMBERS_MAX)?;
        let lacking_count = r.count("lacking volumes", limits::MEMBERS_MAX)?;
        let unreadable_count = r.count("unreadable ranges", limits::UNREADABLE_MAX)?;
        let mut ids = |count: usize| -> Result<Vec<VolumeId>, FormatError> {
            (0..count).map(|_| r.array().map(VolumeId)).collect()
        };
        let members = ids(member_count)?;
        let lacking = ids(lacking_count)?;
        let unreadable = (0..unreadable_count)
            .map(|_| Ok((r.u64()?, r.u64()?)))
            .collect::<Result<Vec<_>, FormatError>>()?;
        r.end()?;
        let rising = |ids: &[VolumeId]| ids.windows(2).all(|pair| pair[0] < pair[1]);
        if !rising(&members) || !rising(&lacking) {
            return wrong("volumes are not sorted");
        }
        if members.binary_search(&volume).is_err() {
            return wrong("its own volume is not among the members");
        }
        if consistency != Consistency::Fuzzy && !unreadable.is_empty() {
            return wrong("exact, yet with unreadable ranges");
        }
        if epoch.0 == 0 || generation.0 == 0 || cut_id.is_none() {
            return wrong("no epoch, generation or cut id");
        }
        Ok(Self {
            server,
            volume,
            volume_bytes,
            generation,
            epoch,
            cut_id,
            cut_time_ns,
            consistency,
            method,
            previous,
            frames,
            content,
            doubt_from,
            members,
            lacking,
            unreadable,
        })
    }
}

/// A manifest with its signature and the signer's public key: the body of a commit frame. Layout:
/// public key (65), reserved (7), signature (64), manifest (the rest).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedManifest {
    /// The parsed manifest. Believe it only after checking `signature` over `signed_bytes`.
    pub manifest: Manifest,
    /// What was signed.
    pub signed_bytes: Vec<u8>,
    /// ECDSA P-256 / SHA-256, fixed form.
    pub signature: [u8; SIGNATURE_BYTES],
    /// The key it claims to be signed with, an uncompressed point.
    pub public_key: [u8; PUBLIC_KEY_BYTES],
}

const PREFIX_BYTES: usize = 72 + SIGNATURE_BYTES;

impl SignedManifest {
    /// Signs `manifest` with `sign`, which returns the fixed-form signature of the bytes given.
    pub fn sign<E>(
        manifest: Manifest,
        public_key: [u8; PUBLIC_KEY_BYTES],
        sign: impl FnOnce(&[u8]) -> Result<[u8; SIGNATURE_BYTES], E>,
    ) -> Result<Self, E> {
        let signed_bytes = manifest.encode();
        let signature = sign(&signed_bytes)?;
        Ok(Self { manifest, signed_bytes, signature, public_key })
    }

    /// The body of the commit frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(PREFIX_BYTES + self.signed_bytes.len());
        out.extend_from_slice(&self.public_key);
        out.extend_from_slice(&[0; 7]);
        out.extend_from_slice(&self.signature);
        out.extend_from_slice(&self.signed_bytes);
        out
    }

    /// Reads the body of a commit frame; the signature is the caller's to check.
    pub fn decode(body: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::new("signed manifest", body);
        let public_key = r.array()?;
        if r.array()? != [0; 7] {
            return Err(FormatError::Inconsistent {
                what: "signed manifest",
                why: "reserved bytes",
            });
        }
        let signature = r.array()?;
        let signed_bytes = r.rest().to_vec();
        Ok(Self { manifest: Manifest::decode(&signed_bytes)?, signed_bytes, signature, public_key })
    }

    /// What the next manifest holds as `previous`.
    pub fn chain_digest(&self) -> [u8; 32] {
        let mut hash = blake3::Hasher::new();
        hash.update(&self.signed_bytes);
        hash.update(&self.signature);
        *hash.finalize().as_bytes()
    }
}

/// Builds [`Manifest::content`]: give it every frame's content digest in order of `seq`.
#[derive(Debug, Clone, Default)]
pub struct EpochDigest {
    hash: blake3::Hasher,
    frames: u32,
}

impl EpochDigest {
    /// Adds the next frame.
    pub fn add(&mut self, content_digest: &[u8; 32]) {
        self.hash.update(content_digest);
        self.frames += 1;
    }

    /// Frames added so far.
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// The digest over all frames added.
    pub fn finish(&self) -> [u8; 32] {
        *self.hash.finalize().as_bytes()
    }
}
