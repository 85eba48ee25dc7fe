//! A source played by hand against a volume of the target in a folder: frames and manifests without
//! a network. Signatures are not made and not checked; everything else is what the daemon runs.

use crate::data::{Kind, Random};
use anyhow::{Context, Result, anyhow};
use secondsite::target::disk::Folder;
use secondsite::target::journal;
use secondsite::target::keeper::{Keeper, VolumeSpec};
use secondsite::target::layers::Layer;
use secondsite::target::merge::tier;
use secondsite::target::segments::HISTORY;
use secondsite::target::space::Space;
use secondsite::target::tend::merge;
use secondsite_format::extent::{Content, Extent, ExtentKind};
use secondsite_format::frame::{Frame, FrameHeader, FrameKind};
use secondsite_format::ids::{CutId, Epoch, Generation, ServerId, SyncId, VolumeId};
use secondsite_format::manifest::{
    Consistency, CutMethod, EpochDigest, Manifest, PUBLIC_KEY_BYTES, SIGNATURE_BYTES,
    SignedManifest,
};
use secondsite_format::message::Refusal;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub const BLOCK_BYTES: u64 = 4096;
pub const VOLUME: VolumeId = VolumeId([2; 16]);
const SERVER: ServerId = ServerId([1; 16]);
const SYNC: SyncId = SyncId([3; 16]);
const KEY: [u8; PUBLIC_KEY_BYTES] = [4; PUBLIC_KEY_BYTES];
/// Payload of a frame, as the source fills it.
const FRAME_BYTES: u64 = 1 << 20;
/// When the target gathers the epochs in memory, and how many runs it leaves.
const EPOCHS_MAX: usize = 256;
const PIECES_MAX: usize = 1 << 17;
const JOURNAL_BYTES_MAX: u64 = 64 << 20;
const RUNS_MAX: usize = 12;

/// Opens the volume in `folder`, or begins one.
pub fn open(folder: &Path, volume_bytes: u64) -> Result<Keeper> {
    let disk = Folder::create(folder, "volume", &[journal::FOLDER, HISTORY])?;
    let spec = VolumeSpec {
        server: SERVER,
        volume: VOLUME,
        volume_bytes,
        block_bytes: BLOCK_BYTES as u32,
        device: None,
    };
    let space = Arc::new(Space::new(0));
    Ok(Keeper::open(Arc::new(disk), Some(&spec), space, Arc::default(), |_, _, _| true)?)
}

pub fn refused(refusal: Refusal) -> anyhow::Error {
    anyhow!("{refusal}")
}

/// An epoch as it arrives.
pub struct Arrival {
    data: Vec<Frame>,
    commit: Frame,
}

/// See the module.
pub struct Source {
    pub volume_bytes: u64,
    folder: PathBuf,
    epoch: u64,
    chain: [u8; 32],
}

impl Source {
    /// Begins a volume in `folder` of which all was copied; `fill` makes its first copy, or it
    /// is empty.
    pub fn begin(folder: &Path, volume_bytes: u64, fill: Option<Kind>) -> Result<(Self, Keeper)> {
        let keeper = open(folder, volume_bytes)?;
        keeper.copy_begin(SYNC).map_err(refused)?;
        if let Some(kind) = fill {
            let mut random = Random::seeded(7);
            for at in (0..volume_bytes).step_by(FRAME_BYTES as usize) {
                let content =
                    content(&[(at, FRAME_BYTES.min(volume_bytes - at))], kind, &mut random)?;
                let mut header = FrameHeader::message(FrameKind::SyncData);
                header.generation = Generation(1);
                header.offset = at;
                keeper.copy_data(&Frame::new(header, content.encode())).map_err(refused)?;
            }
            keeper.copy_flush(volume_bytes).map_err(refused)?;
        }
        keeper.copy_done(SYNC).map_err(refused)?;
        let source = Self { volume_bytes, folder: folder.into(), epoch: 0, chain: [0; 32] };
        Ok((source, keeper))
    }

    /// Where the volume lies.
    pub fn volume_folder(&self) -> PathBuf {
        self.folder.join("volume")
    }

    /// The next epoch, whose frames hold these.
    pub fn epoch(&mut self, contents: &[Content]) -> Result<Arrival> {
        self.epoch += 1;
        let mut cut = [0; 16];
        cut[..8].copy_from_slice(&self.epoch.to_le_bytes());
        let mut header = FrameHeader::message(FrameKind::Data);
        header.generation = Generation(1);
        header.epoch = Epoch(self.epoch);
        header.cut_id = CutId(cut);
        header.pass = 1;
        let mut digest = EpochDigest::default();
        let mut data = Vec::new();
        for (seq, content) in contents.iter().enumerate() {
            digest.add(&content.digest());
            let offset = content.extents().first().context("a frame has an extent")?.offset;
            let header = FrameHeader { seq: seq as u32, offset, ..header };
            data.push(Frame::new(header, content.encode()));
        }
        let manifest = Manifest {
            server: SERVER,
            volume: VOLUME,
            volume_bytes: self.volume_bytes,
            generation: Generation(1),
            epoch: Epoch(self.epoch),
            cut_id: CutId(cut),
            cut_time_ns: self.epoch * 1_000_000_000,
            consistency: Consistency::Crash,
            method: CutMethod::Quiet,
            previous: self.chain,
            frames: contents.len() as u32,
            content: digest.finish(),
            doubt_from: Epoch(0),
            members: vec![VOLUME],
            lacking: vec![],
            unreadable: vec![],
        };
        let unsigned = |_: &[u8]| Ok::<_, std::convert::Infallible>([0; SIGNATURE_BYTES]);
        let signed = SignedManifest::sign(manifest, KEY, unsigned).context("a manifest")?;
        let mut header = FrameHeader::message(FrameKind::Commit);
        header.generation = Generation(1);
        header.epoch = Epoch(self.epoch);
        header.cut_id = CutId(cut);
        let commit = Frame::new(header, signed.encode());
        self.chain = SignedManifest::decode(&commit.body)?.chain_digest();
        Ok(Arrival { data, commit })
    }
}

/// Receives an epoch; it is durable then.
pub fn receive(keeper: &Keeper, arrival: &Arrival) -> Result<()> {
    for frame in &arrival.data {
        keeper.data(frame).map_err(refused)?;
    }
    keeper.commit(&arrival.commit, &KEY).map_err(refused)?;
    Ok(())
}

/// A frame's content at these ranges, rising.
pub fn content(ranges: &[(u64, u64)], kind: Kind, random: &mut Random) -> Result<Content> {
    let extent = |&(offset, bytes)| Extent { offset, bytes, kind: ExtentKind::Data };
    let mut payload = vec![0; ranges.iter().map(|(_, bytes)| *bytes as usize).sum()];
    random.fill(kind, &mut payload);
    Ok(Content::new(ranges.iter().map(extent).collect(), payload)?)
}

/// Frames that write blocks, rising, as the source packs them.
pub fn blocks(numbers: &[u64], kind: Kind, random: &mut Random) -> Result<Vec<Content>> {
    let frames = numbers.chunks((FRAME_BYTES / BLOCK_BYTES) as usize);
    let frames = frames.map(|numbers| {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for number in numbers {
            match ranges.last_mut() {
                Some((offset, bytes)) if *offset + *bytes == number * BLOCK_BYTES => {
                    *bytes += BLOCK_BYTES;
                }
                _ => ranges.push((number * BLOCK_BYTES, BLOCK_BYTES)),
            }
        }
        content(&ranges, kind, random)
    });
    frames.collect()
}

/// Does what the target does beside receiving: gathers what is in memory once it is enough, keeps
/// the runs few. With `all`, what is in memory becomes a run in any case.
pub fn gather(keeper: &Keeper, kept: &BTreeSet<Epoch>, all: bool) -> Result<()> {
    let (epochs, pieces, bytes) = {
        let volume = keeper.volume();
        let epochs = volume.epochs();
        let pieces: usize = epochs.iter().map(|epoch| epoch.index.len()).sum();
        (epochs.len(), pieces, epochs.iter().map(|epoch| epoch.journal_bytes).sum::<u64>())
    };
    let full = epochs >= EPOCHS_MAX || pieces >= PIECES_MAX || bytes >= JOURNAL_BYTES_MAX;
    if epochs > 0 && (full || all) {
        let mut layers = keeper.volume().layers();
        layers.retain(|layer| matches!(layer, Layer::Epoch(..)));
        merge(keeper, &layers, kept, &|| true).map_err(refused)?;
    }
    loop {
        let runs = keeper.volume().runs().to_vec();
        let pieces: Vec<u64> = runs.iter().map(|run| run.pieces).collect();
        let Some(range) = tier(&pieces, RUNS_MAX) else { return Ok(()) };
        let layers: Vec<Layer> = runs[range].iter().cloned().map(Layer::Run).collect();
        merge(keeper, &layers, kept, &|| true).map_err(refused)?;
    }
}

/// Epochs from one up to this one.
pub fn epochs(to: u64) -> BTreeSet<Epoch> {
    (1..=to).map(Epoch).collect()
}

/// Takes the files of a volume out of the page cache, as far as they are on the medium.
pub fn evict(volume: &Path) -> Result<()> {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    for folder in [volume.to_path_buf(), volume.join(journal::FOLDER), volume.join(HISTORY)] {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_file() {
                let file = std::fs::File::open(&path)?;
                posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
            }
        }
    }
    Ok(())
}

/// Space that the files of a volume take besides its replica, bytes.
pub fn history_bytes(volume: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0;
    for folder in [volume.join(journal::FOLDER), volume.join(HISTORY)] {
        for entry in std::fs::read_dir(&folder)? {
            bytes += entry?.metadata()?.blocks() * 512;
        }
    }
    Ok(bytes)
}
