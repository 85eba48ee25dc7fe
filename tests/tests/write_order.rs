//! The oracle of a recovery point is the write order: one writer stamps its writes 1, 2, 3, …, each
//! only after the one before it was acknowledged. Wherever the agent dies, what the replica volume
//! holds then must be a prefix of them: up to some stamp every write, beyond it none.

use secondsite_tests::block::{LoopDevice, Mount};
use secondsite_tests::lab::{Daemon, Lab, SERVER, Side};
use secondsite_tests::load::{Aligned, Load};
use secondsite_tests::random::Random;
use secondsite_tests::{soak, wait_until};
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const VOLUME_BYTES: u64 = 256 << 20;
const BLOCK_BYTES: usize = 4096;
const PLACES: u64 = 2048;
const MAGIC: &[u8; 16] = b"ordered write :)";
const PATIENCE: Duration = Duration::from_secs(120);

/// Place of every stamp, in order: stamp n stands at index n.
type History = Arc<Mutex<Vec<u64>>>;
/// Makes the next write.
type Turn = Box<dyn FnMut() -> u64 + Send>;

#[test]
fn every_point_is_a_prefix_of_the_writes() {
    let mut random = Random::printed("write_order");
    let dir = tempfile::tempdir().expect("a folder");
    let device = LoopDevice::sparse(dir.path(), "source.img", VOLUME_BYTES);
    // Each stamp fills one block of the volume.
    device.format_ext4(&["-b", "4096"]);
    let mount = Mount::new(device.path(), &dir.path().join("mnt"), "defaults");
    let history = History::default();
    let turn = writer(&mount.path().join("ordered"), random.fork(), history.clone());

    let mut lab = Lab::new();
    lab.join();
    lab.protect(device.path(), &["--rpo", "3s"]).ok();
    lab.wait_for_epoch_after(0, PATIENCE);
    // Without a pause: a point that is not one instant shows only if writes go on while it is read.
    let load = Load::start(vec![turn]);

    let mut newest = 0;
    for round in 0..soak(8, 80) {
        let exact = exact_epoch(&lab).unwrap_or(0);
        let until = load.written() + random.below(4 << 20);
        wait_until("a later exact point", PATIENCE, || {
            let now = exact_epoch(&lab).unwrap_or(0);
            let done = now > exact && load.written() >= until;
            if done { Ok(()) } else { Err(format!("{now} after {exact}: {:?}", lab.points())) }
        });
        lab.kill(Daemon::Replicate);
        // Nothing new arrives: the replica volume comes to rest at the newest exact point.
        wait_until("the replica volume holds the newest exact point", PATIENCE, || {
            let (promoted, exact) = (lab.status()?.volumes[0].promoted_epoch, exact_epoch(&lab));
            if promoted == exact { Ok(()) } else { Err(format!("{promoted:?} of {exact:?}")) }
        });
        let replica = lab.status().expect("status").volumes[0].replica.clone().expect("a replica");
        let stamp = prefix(Path::new(&replica), &history.lock().expect("no panic"));
        eprintln!("round {round}: the replica volume ends at write {stamp}");
        assert!(stamp >= newest, "the replica volume went back from {newest} to {stamp}");
        newest = stamp;
        lab.start(Daemon::Replicate);
    }
    assert!(newest > 0, "no stamped write ever reached the replica volume");
    load.stop();
    drop(mount);
    lab.cli(Side::Site, &["unprotect", SERVER, "--yes"]).ok();
}

/// Epoch of the newest exact point.
fn exact_epoch(lab: &Lab) -> Option<u64> {
    let points = lab.points().points;
    let exact = points.iter().rev().find(|point| point.consistency != "fuzzy")?;
    exact.epochs.values().next().copied()
}

/// Stamped direct writes into a file whose blocks all exist already.
fn writer(path: &Path, mut random: Random, history: History) -> Turn {
    let file = OpenOptions::new().write(true).create(true).custom_flags(libc::O_DIRECT).open(path);
    let file = file.expect("a file for direct writes");
    let mut block = Box::new(Aligned([0; BLOCK_BYTES]));
    block.0[..16].copy_from_slice(MAGIC);
    for place in 0..PLACES {
        block.0[24..32].copy_from_slice(&place.to_le_bytes());
        file.write_all_at(&block.0, place * BLOCK_BYTES as u64).expect("write");
    }
    file.sync_all().expect("fsync");
    history.lock().expect("no panic").push(u64::MAX); // stamp 0: the blocks as they were made
    Box::new(move || {
        let place = random.below(PLACES);
        let stamp = {
            // Noted before it is issued: the replica may see it before we return.
            let mut history = history.lock().expect("no panic");
            history.push(place);
            history.len() as u64 - 1
        };
        block.0[16..24].copy_from_slice(&stamp.to_le_bytes());
        block.0[24..32].copy_from_slice(&place.to_le_bytes());
        file.write_all_at(&block.0, place * BLOCK_BYTES as u64).expect("write");
        BLOCK_BYTES as u64
    })
}

/// Scans the replica volume for stamped blocks; panics unless they are a prefix of `history`;
/// returns its last stamp.
fn prefix(replica: &Path, history: &[u64]) -> u64 {
    let mut found = vec![None; PLACES as usize];
    let mut file = File::open(replica).expect("the replica volume");
    let mut buffer = vec![0; 1 << 20];
    for _ in 0..VOLUME_BYTES / buffer.len() as u64 {
        file.read_exact(&mut buffer).expect("read the replica volume");
        for block in buffer.chunks(BLOCK_BYTES).filter(|block| block[..16] == *MAGIC) {
            let number = |at| u64::from_le_bytes(block[at..at + 8].try_into().expect("8 bytes"));
            found[number(24) as usize] = Some(number(16));
        }
    }
    let last = found.iter().max().copied().flatten().expect("a stamped block");
    let mut expected = vec![Some(0); PLACES as usize];
    for (stamp, place) in history.iter().enumerate().take(last as usize + 1).skip(1) {
        expected[*place as usize] = Some(stamp as u64);
    }
    let missing = expected.iter().zip(&found).filter(|(expected, found)| expected != found).count();
    assert_eq!(missing, 0, "up to write {last}, {missing} places lack their newest write");
    last
}
