//! Journal, state and pins.

use super::wire::split;
use secondsite::daemon::agent_side::Enrolment;
use secondsite::daemon::orders::Ledger;
use secondsite::daemon::state as daemon_state;
use secondsite::target::disk::Disk;
use secondsite::target::disk::memory::MemoryDisk;
use secondsite::target::journal::{SEGMENT_HEADER_BYTES, Segment};
use secondsite::target::keeper::{Keeper, OpenError, VolumeSpec};
use secondsite::target::recover::RecoverError;
use secondsite::target::space::Space;
use secondsite::target::state::StateRecord;
use secondsite_control::api::{
    AgentAssignment, AgentPoll, AgentReport, InventoryDevice, TargetAssignment, TargetPoll,
    TargetReport,
};
use secondsite_format::frame::HEADER_BYTES;
use secondsite_format::ids::{ServerId, SyncId, VolumeId};
use secondsite_tracker::header::{self, HEADER_WORDS, Header};
use secondsite_tracker::marks::{Marks, MarksMemory};
use secondsite_tracker::sync::Memory;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

const SERVER: ServerId = ServerId([7; 16]);
const VOLUME: VolumeId = VolumeId([9; 16]);
const VOLUME_BYTES: u64 = 64 << 10;

fn open(disk: &MemoryDisk) -> Result<Keeper, OpenError> {
    let spec = VolumeSpec {
        server: SERVER,
        volume: VOLUME,
        volume_bytes: VOLUME_BYTES,
        block_bytes: 4096,
        device: None,
    };
    // Every signature counts as good: what lies behind the check is to be reached.
    Keeper::open(
        Arc::new(disk.clone()),
        Some(&spec),
        Arc::new(Space::new(0)),
        Arc::default(),
        |_, _, _| true,
    )
}

/// A volume whose first copy is complete.
fn copied() -> MemoryDisk {
    let disk = MemoryDisk::default();
    let keeper = open(&disk).expect("an empty disk takes a new volume");
    let sync = SyncId([3; 16]);
    keeper.copy_begin(sync).expect("a new volume takes a first copy");
    keeper.copy_done(sync).expect("and it may be empty");
    disk
}

/// The only segment of a journal. The first byte says whether its header and digests are made
/// right.
pub fn journal(bytes: &[u8]) {
    let Some((flags, bytes)) = bytes.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if flags & 1 == 0 {
        mend(&mut bytes);
    }
    let disk = copied();
    let name = Segment::name(1);
    let write = |disk: &MemoryDisk| -> std::io::Result<()> {
        let file = disk.create(&name)?;
        file.write_at(0, &bytes)?;
        file.sync()?;
        disk.sync_names(secondsite::target::journal::FOLDER)
    };
    write(&disk).expect("a disk in memory takes a file");
    match open(&disk) {
        Ok(keeper) => {
            let epoch = keeper.volume().durable().map(|facts| facts.epoch);
            drop(keeper);
            let again = open(&disk).expect("what was opened opens again");
            let found = again.volume().durable().map(|facts| facts.epoch);
            assert_eq!(found, epoch, "an epoch came or went");
        }
        Err(OpenError::Recover(RecoverError::Newer { .. } | RecoverError::Damaged { .. })) => {
            let found = disk.read(&name, u64::MAX).expect("it can be read");
            assert_eq!(found, Some(bytes), "a refused journal was changed");
        }
        Err(error) => panic!("a disk without faults: {error}"),
    }
}

/// Makes the header of the segment right, and the digests of all frames that follow each other.
fn mend(bytes: &mut Vec<u8>) {
    let start = SEGMENT_HEADER_BYTES as usize;
    if bytes.len() < start {
        bytes.resize(start, 0);
    }
    bytes[..start].copy_from_slice(&secondsite::target::journal::segment_header(VOLUME, 1));
    let mut at = start;
    while let Some((raw, frame)) = split(&bytes[at..]) {
        bytes[at..at + HEADER_BYTES].copy_from_slice(frame.header_bytes());
        at += HEADER_BYTES + raw.body_bytes();
    }
}

/// The target's `state.json`.
pub fn state(bytes: &[u8]) {
    if let Ok(record) = StateRecord::decode(bytes) {
        let again = StateRecord::decode(&record.encode()).expect("what was read can be written");
        assert_eq!(again, record);
    }
}

/// Which document (u8), then its JSON.
pub fn document(bytes: &[u8]) {
    let Some((kind, json)) = bytes.split_first() else { return };
    match kind % 9 {
        0 => kept::<AgentAssignment>(json),
        1 => kept::<Ledger>(json),
        2 => kept::<Enrolment>(json),
        3 => kept::<TargetAssignment>(json),
        4 => sent::<AgentPoll>(json),
        5 => sent::<TargetPoll>(json),
        6 => sent::<AgentReport>(json),
        7 => sent::<TargetReport>(json),
        _ => sent::<Vec<InventoryDevice>>(json),
    }
}

fn kept<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(json: &[u8]) {
    let path = Path::new("document.json");
    if let Ok(document) = daemon_state::decode::<T>(path, json) {
        let again: T = daemon_state::decode(path, &daemon_state::encode(&document))
            .expect("what was read can be written");
        assert_eq!(again, document);
    }
}

fn sent<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(json: &[u8]) {
    if let Ok(document) = serde_json::from_slice::<T>(json) {
        let encoded = serde_json::to_vec(&document).expect("what was read can be written");
        let again: T = serde_json::from_slice(&encoded).expect("and read again");
        assert_eq!(again, document);
    }
}

/// The pinned header: 512 bytes, as a process that was killed may leave them or not.
pub fn header(bytes: &[u8]) {
    const BLOCKS: u64 = 64;
    let Some((bytes, _)) = bytes.split_first_chunk::<{ HEADER_WORDS * 8 }>() else { return };
    let words: Vec<AtomicU64> = bytes
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")).into())
        .collect();
    let view = Header::new(&words);
    if let Some(found) = view.newer() {
        assert!(found > header::VERSION && !view.is_whole(), "whole and newer");
    }
    if !view.is_sound() {
        return;
    }
    let (cut, baseline, identity) = (view.cut(), view.baseline(), view.identity());
    view.set_cut(cut);
    view.set_identity(identity);
    if let Some(baseline) = baseline {
        view.set_baseline(baseline);
    }
    assert_eq!((view.cut(), view.baseline(), view.identity()), (cut, baseline, identity));
    let zeros = || Memory::new(vec![AtomicU64::new(0)]);
    let (live, summary, taken) = (zeros(), zeros(), zeros());
    let memory = MarksMemory { header: Memory::new(words), live, summary, taken };
    let marks = Marks::open(BLOCKS, memory);
    assert_eq!(marks.acknowledged(), cut.acknowledged);
    assert_eq!(marks.cut().cut_id, cut.cut_id);
}
