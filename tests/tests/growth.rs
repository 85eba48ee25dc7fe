//! Volumes that change while they are protected: one grows under load, also with `kill -9` of the
//! agent around it; another is added meanwhile; that one shrinks, stops, and comes back.

use secondsite_control::api::{ServerStatus, VolumePhase, VolumeStatus};
use secondsite_tests::block::{LoopDevice, Mount, assert_equal, run};
use secondsite_tests::lab::{Daemon, Lab, SERVER, Side};
use secondsite_tests::load::Load;
use secondsite_tests::random::Random;
use secondsite_tests::soak;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// XFS takes no less than 300 MiB.
const START_BYTES: u64 = 320 << 20;
const GROW_BYTES: u64 = 160 << 20;
/// Data that no one touches: a full transfer would send it again.
const STILL_BYTES: usize = 96 << 20;
/// What metadata, a resize, and epochs given up may cost besides what was written.
const ALLOWANCE_BYTES: u64 = 24 << 20;
const SECOND_BYTES: u64 = 48 << 20;
const PATIENCE: Duration = Duration::from_secs(90);

fn volume<'a>(status: &'a ServerStatus, device: &LoopDevice) -> &'a VolumeStatus {
    let found = status.volumes.iter().find(|volume| volume.path == device.path().to_str().unwrap());
    found.unwrap_or_else(|| panic!("{:?} is not protected: {status:?}", device.path()))
}

/// Until an epoch begun from now on is committed and promoted; the replica volume.
fn settled(lab: &mut Lab, device: &LoopDevice) -> PathBuf {
    let epoch = volume(&lab.status().expect("status"), device).epoch;
    let status = lab.wait("newer epochs are promoted", PATIENCE, |status| {
        let volume = volume(status, device);
        volume.promoted_epoch.map(|at| at.saturating_sub(1)) > epoch
    });
    volume(&status, device).replica.clone().expect("a replica volume").into()
}

fn length(replica: &Path) -> u64 {
    replica.metadata().expect("a replica file").len()
}

#[test]
fn volumes_grow_join_and_shrink() {
    let mut random = Random::printed("growth");
    let dir = tempfile::tempdir().expect("a folder");
    let device = LoopDevice::sparse(dir.path(), "source.img", START_BYTES);
    // XFS, since it grows online for any administrator; ext4 asks for CAP_SYS_RESOURCE, which not
    // every machine that runs these tests gives.
    run("mkfs.xfs", &["-q", device.path().to_str().expect("UTF-8")]);
    let mount = Mount::new(device.path(), &dir.path().join("mnt"), "defaults");
    let mut still = vec![0; STILL_BYTES];
    random.fill(&mut still);
    let mut file = File::create(mount.path().join("still")).expect("create");
    file.write_all(&still).and_then(|()| file.sync_all()).expect("write");
    drop(file);
    let second = LoopDevice::sparse(dir.path(), "second.img", SECOND_BYTES);
    let mut content = File::options().write(true).open(second.path()).expect("open");
    content.write_all(&still[..SECOND_BYTES as usize / 2]).expect("write");
    content.sync_all().expect("sync");
    drop(content);

    let mut lab = Lab::new();
    lab.join();
    lab.protect(device.path(), &["--rpo", "3s"]).ok();
    lab.wait_for_epoch_after(0, PATIENCE);
    let load = Load::start(Load::mixed(mount.path(), &mut random, Duration::from_millis(20)));
    settled(&mut lab, &device);

    // Without a kill: no compare, and what was there is not sent again.
    let begun = Instant::now();
    let before = volume(&lab.status().expect("status"), &device).clone();
    let written = load.written();
    let mut bytes = START_BYTES + GROW_BYTES;
    device.resize(bytes);
    run("xfs_growfs", &[mount.path().to_str().expect("UTF-8")]);
    lab.wait("the replica volume has grown", PATIENCE, |status| {
        length(Path::new(volume(status, &device).replica.as_ref().expect("a replica"))) == bytes
    });
    let after = volume(&lab.status().expect("status"), &device).clone();
    let (sent, written) = (after.sent_bytes - before.sent_bytes, load.written() - written);
    eprintln!(
        "grown in {:?}: {} KiB written, {} KiB sent, {} compares",
        begun.elapsed(),
        written >> 10,
        sent >> 10,
        after.compares - before.compares
    );
    assert_eq!(after.compares, before.compares, "no compare");
    assert!(sent < 2 * written + ALLOWANCE_BYTES, "{sent} bytes sent for {written} written");

    // A second volume: the first one goes on undisturbed.
    let before = volume(&lab.status().expect("status"), &device).clone();
    let written = load.written();
    lab.protect(second.path(), &["--rpo", "3s"]).ok();
    let mut lacked = false;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let points = lab.points().points;
        lacked |= points.iter().any(|point| point.lacking.iter().any(|name| name == second.name()));
        let status = lab.status().expect("status");
        if points.last().is_some_and(|point| point.lacking.is_empty())
            && volume(&status, &second).promoted_epoch.is_some()
        {
            break;
        }
        assert!(Instant::now() < deadline, "the second volume is not in: {status:#?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    let after = volume(&lab.status().expect("status"), &device).clone();
    let (sent, written) = (after.sent_bytes - before.sent_bytes, load.written() - written);
    eprintln!("second volume added; a point that said so was seen: {lacked}; first: {sent} sent");
    assert_eq!(after.compares, before.compares, "the first volume is not compared");
    assert!(sent < 2 * written + ALLOWANCE_BYTES, "nor sent again: {sent} for {written}");

    // With a kill at an instant that nobody chose.
    let mut compares = 0;
    for turn in 0..soak(2, 20) {
        bytes += 16 << 20;
        std::thread::sleep(Duration::from_millis(random.below(800)));
        let kill_first = random.below(3) == 0;
        if kill_first {
            lab.kill(Daemon::Replicate);
        }
        device.resize(bytes);
        run("xfs_growfs", &[mount.path().to_str().expect("UTF-8")]);
        if !kill_first {
            std::thread::sleep(Duration::from_millis(random.below(1500)));
            lab.kill(Daemon::Replicate);
        }
        lab.start(Daemon::Replicate);
        let status = lab.wait("the replica volume has grown", PATIENCE, |status| {
            let volume = volume(status, &device);
            volume.phase == VolumePhase::Following
                && length(Path::new(volume.replica.as_ref().expect("a replica"))) == bytes
        });
        let volume = volume(&status, &device);
        compares += volume.compares;
        eprintln!("turn {turn}: killed, {} KiB sent since", volume.sent_bytes >> 10);
        assert!(volume.sent_bytes < STILL_BYTES as u64, "no full transfer: {volume:?}");
    }
    eprintln!("{compares} compares after kills");

    load.stop();
    mount.unmount();
    lab.cut();
    let replica = settled(&mut lab, &device);
    assert_equal(device.path(), &replica);
    let second_replica = settled(&mut lab, &second);
    assert_equal(second.path(), &second_replica);

    // It shrinks: stopped with a reason, the replica stays, the other volume goes on.
    second.resize(SECOND_BYTES / 2);
    let status = lab.wait("the shrunk volume is stopped", PATIENCE, |status| {
        volume(status, &second).phase == VolumePhase::Stopped
    });
    let reason = &volume(&status, &second).reason;
    for word in ["shrunk", "points stay", "unprotect", &SECOND_BYTES.to_string()] {
        assert!(reason.contains(word), "\"{word}\" is missing in: {reason}");
    }
    settled(&mut lab, &device);
    assert_eq!(length(&second_replica), SECOND_BYTES);
    second.resize(SECOND_BYTES);
    lab.wait("it goes on by itself", PATIENCE, |status| {
        let volume = volume(status, &second);
        volume.phase == VolumePhase::Following && volume.compares > 0
    });
    lab.cut();
    settled(&mut lab, &second);
    assert_equal(second.path(), &second_replica);
    lab.cli(Side::Site, &["unprotect", SERVER, "--yes"]).ok();
}
