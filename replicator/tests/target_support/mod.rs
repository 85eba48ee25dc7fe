//! A source played by hand: frames, manifests and a model of the volume, for the target's tests.

#![allow(dead_code)] // every test file uses its own part

use secondsite::target::disk::Disk;
use secondsite::target::keeper::{Keeper, VolumeSpec};
use secondsite::target::space::Space;
use secondsite_format::extent::{Content, Extent, ExtentKind};
use secondsite_format::frame::{Frame, FrameHeader, FrameKind};
use secondsite_format::ids::{CutId, Epoch, Generation, ServerId, SyncId, VolumeId};
use secondsite_format::manifest::{
    Consistency, CutMethod, EpochDigest, Manifest, PUBLIC_KEY_BYTES, SIGNATURE_BYTES,
    SignedManifest,
};
use std::sync::Arc;

pub const BLOCK: u64 = 4096;
pub const BLOCKS: u64 = 16;
pub const VOLUME_BYTES: u64 = BLOCK * BLOCKS;
pub const SERVER: ServerId = ServerId([7; 16]);
pub const VOLUME: VolumeId = VolumeId([9; 16]);
pub const KEY: [u8; PUBLIC_KEY_BYTES] = [4; PUBLIC_KEY_BYTES];
pub const SYNC: SyncId = SyncId([3; 16]);

/// Stands in for ECDSA: a digest over key and bytes. The real one has its own test.
pub fn verify(key: &[u8; 65], bytes: &[u8], signature: &[u8; SIGNATURE_BYTES]) -> bool {
    sign(key, bytes) == *signature
}

fn sign(key: &[u8; 65], bytes: &[u8]) -> [u8; SIGNATURE_BYTES] {
    let mut signature = [0; SIGNATURE_BYTES];
    let mut hash = blake3::Hasher::new();
    hash.update(key).update(bytes);
    hash.finalize_xof().fill(&mut signature);
    signature
}

pub fn spec() -> VolumeSpec {
    VolumeSpec {
        server: SERVER,
        volume: VOLUME,
        volume_bytes: VOLUME_BYTES,
        block_bytes: BLOCK as u32,
        device: None,
    }
}

pub fn open(disk: impl Disk + 'static) -> Result<Keeper, secondsite::target::keeper::OpenError> {
    Keeper::open(Arc::new(disk), Some(&spec()), Arc::new(Space::new(0)), Arc::default(), verify)
}

/// What a block becomes.
#[derive(Clone, Copy)]
pub enum Put {
    Fill(u64, u8),
    Zero(u64, u64),
    Discard(u64, u64),
}

pub fn content(puts: &[Put]) -> Content {
    let mut payload = Vec::new();
    let extents = puts
        .iter()
        .map(|put| match *put {
            Put::Fill(block, byte) => {
                // Not one value throughout, so that a shifted block shows.
                payload.extend((0..BLOCK).map(|i| byte ^ (i / 512) as u8));
                Extent { offset: block * BLOCK, bytes: BLOCK, kind: ExtentKind::Data }
            }
            Put::Zero(block, count) => {
                Extent { offset: block * BLOCK, bytes: count * BLOCK, kind: ExtentKind::Zero }
            }
            Put::Discard(block, count) => {
                Extent { offset: block * BLOCK, bytes: count * BLOCK, kind: ExtentKind::Discard }
            }
        })
        .collect();
    Content::new(extents, payload).expect("a test's content is well formed")
}

pub fn apply(model: &mut [u8], content: &Content) {
    for (extent, bytes) in content.parts() {
        let part = &mut model[extent.offset as usize..extent.end() as usize];
        match extent.kind {
            ExtentKind::Data => part.copy_from_slice(bytes),
            ExtentKind::Zero | ExtentKind::Discard => part.fill(0),
        }
    }
}

pub fn sync_frame(puts: &[Put]) -> Frame {
    let content = content(puts);
    let mut header = FrameHeader::message(FrameKind::SyncData);
    header.generation = Generation(1);
    header.offset = content.extents()[0].offset;
    Frame::new(header, content.encode())
}

/// An epoch as a source makes it.
#[derive(Clone)]
pub struct Script {
    pub epoch: u64,
    pub cut_id: CutId,
    /// (pass, what it puts), by `seq`.
    pub frames: Vec<(u32, Vec<Put>)>,
    pub consistency: Consistency,
    pub method: CutMethod,
    pub members: Vec<VolumeId>,
    pub volume: VolumeId,
}

impl Script {
    pub fn new(epoch: u64, frames: Vec<(u32, Vec<Put>)>) -> Self {
        Self {
            epoch,
            cut_id: CutId([epoch as u8; 16]),
            frames,
            consistency: Consistency::Crash,
            method: CutMethod::Quiet,
            members: vec![VOLUME],
            volume: VOLUME,
        }
    }

    pub fn fuzzy(mut self) -> Self {
        self.consistency = Consistency::Fuzzy;
        self.method = CutMethod::Unproven;
        self
    }

    pub fn data(&self) -> Vec<Frame> {
        let frame = |(seq, (pass, puts)): (usize, &(u32, Vec<Put>))| {
            let content = content(puts);
            let header = FrameHeader {
                kind: FrameKind::Data,
                generation: Generation(1),
                epoch: Epoch(self.epoch),
                cut_id: self.cut_id,
                pass: *pass,
                seq: seq as u32,
                offset: content.extents()[0].offset,
            };
            Frame::new(header, content.encode())
        };
        self.frames.iter().enumerate().map(frame).collect()
    }

    pub fn manifest(&self, previous: [u8; 32]) -> Manifest {
        let mut digest = EpochDigest::default();
        self.frames.iter().for_each(|(_, puts)| digest.add(&content(puts).digest()));
        Manifest {
            server: SERVER,
            volume: self.volume,
            volume_bytes: VOLUME_BYTES,
            generation: Generation(1),
            epoch: Epoch(self.epoch),
            cut_id: self.cut_id,
            cut_time_ns: self.epoch,
            consistency: self.consistency,
            method: self.method,
            previous,
            frames: self.frames.len() as u32,
            content: digest.finish(),
            doubt_from: Epoch(0),
            members: self.members.clone(),
            lacking: vec![],
            unreadable: vec![],
        }
    }

    pub fn commit(&self, previous: [u8; 32]) -> Frame {
        commit_frame(self.manifest(previous), &KEY)
    }

    /// The model after it: passes in order, later frames of a pass over earlier ones.
    pub fn apply(&self, model: &mut [u8]) {
        let mut order: Vec<&(u32, Vec<Put>)> = self.frames.iter().collect();
        order.sort_by_key(|(pass, _)| *pass);
        order.iter().for_each(|(_, puts)| apply(model, &content(puts)));
    }
}

pub fn commit_frame(manifest: Manifest, key: &[u8; 65]) -> Frame {
    let mut header = FrameHeader::message(FrameKind::Commit);
    header.generation = manifest.generation;
    header.epoch = manifest.epoch;
    header.cut_id = manifest.cut_id;
    let signed = SignedManifest::sign(manifest, *key, |bytes| Ok::<_, ()>(sign(key, bytes)));
    Frame::new(header, signed.expect("this signer never fails").encode())
}

/// What the next manifest holds as `previous`.
pub fn chain_of(commit: &Frame) -> [u8; 32] {
    SignedManifest::decode(&commit.body).expect("a test's manifest is well formed").chain_digest()
}
