//! The main promise, attacked: daemons of both sides die by `kill -9` at random instants under a
//! mixed load on ext4, and at the end the replica volume is the source, byte for byte, without a
//! full transfer.

use secondsite_tests::block::{LoopDevice, Mount, assert_equal};
use secondsite_tests::lab::{Daemon, Lab, SERVER, Side};
use secondsite_tests::load::Load;
use secondsite_tests::random::Random;
use secondsite_tests::soak;
use std::fs::File;
use std::io::Write;
use std::time::Duration;

const VOLUME_BYTES: u64 = 768 << 20;
/// Data that no one touches: a full transfer would send it again.
const STILL_BYTES: usize = 256 << 20;
/// What resending a given-up epoch, metadata and digests may cost besides what was written.
const ALLOWANCE_BYTES: u64 = 96 << 20;
const GOAL: &str = "3s";
const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn the_replica_is_exact_after_kills() {
    let mut random = Random::printed("exact_after_kills");
    let dir = tempfile::tempdir().expect("a folder");
    let device = LoopDevice::sparse(dir.path(), "source.img", VOLUME_BYTES);
    device.format_ext4(&[]);
    let mount = Mount::new(device.path(), &dir.path().join("mnt"), "defaults");
    let mut still = vec![0; STILL_BYTES];
    random.fill(&mut still);
    // On the disk before anything is followed, or its writeback would count as changes.
    let mut file = File::create(mount.path().join("still")).expect("create");
    file.write_all(&still).and_then(|()| file.sync_all()).expect("write");
    drop((file, still));

    let mut lab = Lab::new();
    lab.join();
    lab.protect(device.path(), &["--rpo", GOAL]).ok();
    let mut epoch = lab.wait_for_epoch_after(0, PATIENCE);
    let load = Load::start(Load::mixed(mount.path(), &mut random, Duration::from_millis(2)));

    let mut life = Life::begins(&load);
    let mut compares = 0;
    for turn in 0..soak(8, 80) {
        // An instant that nobody chose: when the application has written some more.
        let written = load.written() + random.below(24 << 20);
        secondsite_tests::wait_until("the load goes on", PATIENCE, || {
            if load.written() >= written { Ok(()) } else { Err(load.written().to_string()) }
        });
        let all = [Daemon::Replicate, Daemon::Target, Daemon::Control];
        let daemon = all[random.below(3) as usize];
        if daemon == Daemon::Replicate {
            compares += life.ends(&mut lab, &load);
        }
        eprintln!("turn {turn}: kill -9 {daemon:?} at epoch {epoch}");
        lab.kill(daemon);
        lab.start(daemon);
        if daemon == Daemon::Replicate {
            life = Life::begins(&load);
        }
        epoch = lab.wait_for_epoch_after(epoch, PATIENCE);
    }
    lab.stop(Daemon::Target);
    lab.start(Daemon::Target);
    lab.wait_for_epoch_after(epoch, PATIENCE);

    let written = load.stop();
    mount.unmount();
    lab.cut();
    let replica = lab.wait_until_promoted(PATIENCE);
    // Nothing is kept, so by now a later one may have taken the place of the cut's own point.
    let points = lab.points().points;
    let newest = points.last().expect("a point is listed");
    assert_eq!(newest.consistency, "crash", "the final point is exact: {newest:?}");
    compares += life.ends_with(&lab, written);
    eprintln!("{} MiB written, {compares} compares for doubts", written >> 20);
    assert_equal(device.path(), &replica);
    lab.cli(Side::Site, &["unprotect", SERVER, "--yes"]).ok();
}

/// One life of the agent: what was written during it bounds what it may send.
struct Life {
    written_before: u64,
}

impl Life {
    fn begins(load: &Load) -> Self {
        Self { written_before: load.written() }
    }

    fn ends(&self, lab: &mut Lab, load: &Load) -> u64 {
        self.ends_with(lab, load.written())
    }

    fn ends_with(&self, lab: &Lab, written: u64) -> u64 {
        let status = lab.status().expect("control answers");
        let volume = &status.volumes[0];
        let written = written - self.written_before;
        eprintln!(
            "  a life of the agent: {} MiB written, {} MiB sent, epoch {}, {} compares",
            written >> 20,
            volume.sent_bytes >> 20,
            volume.epoch.unwrap_or(0),
            volume.compares
        );
        // The first life also made the first copy; it may send that once.
        let first_copy = if self.written_before == 0 { STILL_BYTES as u64 } else { 0 };
        // The load is counted when it returns; a block may travel in more than one epoch.
        let limit = first_copy + 2 * written + ALLOWANCE_BYTES;
        assert!(volume.sent_bytes < limit, "{} bytes sent, {limit} expected", volume.sent_bytes);
        volume.compares
    }
}
