//! The disk below the target fails: with I/O errors, for want of space, by a power cut. The
//! application never notices, what was acknowledged stays, the status says what is wrong, and when
//! the disk is well again replication goes on where it was, without a full transfer.

use secondsite_control::api::ServerStatus;
use secondsite_control::codes::State;
use secondsite_tests::block::{LoopDevice, Mount, assert_equal};
use secondsite_tests::faulty::{Fault, FaultyStore};
use secondsite_tests::lab::{Daemon, Lab, SERVER, Side, epoch_of};
use secondsite_tests::load::Load;
use secondsite_tests::random::Random;
use secondsite_tests::{soak, wait_until};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

const VOLUME_BYTES: u64 = 224 << 20;
/// Room for a minute of epochs that wait for an exact one.
const STORE_BYTES: u64 = 3 << 30;
const SMALL_STORE_BYTES: u64 = 768 << 20;
/// Data that no one touches: a full transfer would send it again.
const STILL_BYTES: usize = 96 << 20;
/// What resending given-up epochs, metadata and digests may cost besides what was written.
const ALLOWANCE_BYTES: u64 = 32 << 20;
const GOAL_SECONDS: f64 = 3.0;
const PATIENCE: Duration = Duration::from_secs(120);
/// Keeps the load at a few MiB a second.
const PAUSE: Duration = Duration::from_millis(8);

/// What the agent says when an acknowledged epoch is not there any more.
const LOST: &str = "the target has less than it once acknowledged";

#[test]
fn errors_stop_the_volume_and_nothing_is_lost() {
    let mut random = Random::printed("target_faulty_disk, errors");
    let dir = tempfile::tempdir().expect("a folder");
    let mut app = Application::new(dir.path(), &mut random);
    let mut store = FaultyStore::new(dir.path(), STORE_BYTES, Fault::Errors);
    let mut lab = Lab::with_store(&store.path());
    app.protect(&mut lab, &mut random);

    for turn in 0..soak(1, 20) {
        app.writes_more(random.below(8 << 20));
        eprintln!("turn {turn}: writes fail");
        store.fail_writes(true);
        // Which of the two depends on whose write was the first: ours, or the file system's own.
        let status = stopped(&mut lab, &["Input/output error", "Read-only file system"]);
        app.writes_more(4 << 20);
        store.fail_writes(false);
        // Well again, but what the failed sync lost is not known: nothing goes on by itself.
        app.writes_more(4 << 20);
        let now = lab.status().expect("status");
        assert_eq!((now.state, epoch_of(&now)), (State::Stopped, epoch_of(&status)));
        lab.kill(Daemon::Target);
        store.restore();
        lab.start_target();
        lab.wait_for_epoch_after(epoch_of(&status), PATIENCE);
        assert!(!lab.has_said(Daemon::Replicate, LOST), "an acknowledged epoch was lost");
    }

    // What lies in the replica volume is not in the page cache after this.
    lab.stop(Daemon::Target);
    store.restore();
    lab.start_target();
    lab.wait("it is protected", PATIENCE, |status| status.state == State::Protected);
    store.fail_reads(true);
    // It reads all of the replica volume, and cannot end before that was read.
    let mut verify = lab.spawn_cli(&["verify", SERVER, "--yes"]);
    let status = stopped(&mut lab, &["Input/output error"]);
    app.writes_more(4 << 20);
    store.fail_reads(false);
    lab.kill(Daemon::Target);
    lab.start_target();
    lab.wait_for_epoch_after(epoch_of(&status), PATIENCE);
    wait_until("the verify goes on, and ends well", PATIENCE, || match verify.ended() {
        None => Err(verify.log()),
        Some(status) if status.success() => Ok(()),
        Some(status) => panic!("verify: {status}: {}", verify.log()),
    });
    app.end(&mut lab, || store.restore());
}

#[test]
fn a_full_store_only_makes_the_loss_grow() {
    let mut random = Random::printed("target_faulty_disk, full");
    let dir = tempfile::tempdir().expect("a folder");
    let mut app = Application::new(dir.path(), &mut random);
    let device = LoopDevice::sparse(dir.path(), "store.img", SMALL_STORE_BYTES);
    device.format_ext4(&["-m", "0"]);
    let store = Mount::new(device.path(), &dir.path().join("store"), "defaults");
    let mut lab = Lab::with_store(store.path());
    app.protect(&mut lab, &mut random);

    for turn in 0..soak(1, 20) {
        app.writes_more(random.below(8 << 20));
        eprintln!("turn {turn}: the store fills");
        let filler = fill(store.path());
        let status = lab.wait("the loss grows for want of space", PATIENCE, |status| {
            let said = format!("{status:?}").to_lowercase();
            let grown = status.loss_seconds.is_some_and(|loss| loss > 2.0 * GOAL_SECONDS);
            grown && said.contains("no space") && said.contains("make room")
        });
        assert_eq!(status.state, State::Behind, "{status:?}");
        app.writes_more(8 << 20);
        std::fs::remove_file(filler).expect("remove the filler");
        lab.wait_for_epoch_after(epoch_of(&status), PATIENCE);
        lab.wait("it is protected", PATIENCE, |status| status.state == State::Protected);
    }
    app.end(&mut lab, || {});
}

#[test]
fn a_power_cut_of_the_target_loses_nothing_acknowledged() {
    let mut random = Random::printed("target_faulty_disk, power cuts");
    let dir = tempfile::tempdir().expect("a folder");
    let mut app = Application::new(dir.path(), &mut random);
    let mut store = FaultyStore::new(dir.path(), STORE_BYTES, Fault::PowerCut);
    let mut lab = Lab::with_store(&store.path());
    app.protect(&mut lab, &mut random);

    for turn in 0..soak(4, 60) {
        let epoch = epoch_of(&lab.status().expect("status"));
        app.writes_more(random.below(6 << 20));
        let again = random.below(3) == 0;
        if again {
            // A target that dies before the power goes must not vouch for what only it wrote.
            lab.kill(Daemon::Target);
            lab.start_target();
            lab.wait("it is back", PATIENCE, |status| status.volumes[0].reason.is_empty());
        }
        if random.below(2) == 0 {
            // The instant at which an epoch was just acknowledged.
            lab.wait_for_epoch_after(epoch, PATIENCE);
        }
        let alone = turn % 2 == 0;
        let (listed, record) = listed(&lab);
        eprintln!("turn {turn}: power cut, points up to {listed} listed, agent too: {alone}");
        if random.below(2) == 0 {
            store.cut_power();
            lab.kill(Daemon::Target);
        } else {
            lab.kill(Daemon::Target);
            store.cut_power();
        }
        if alone {
            lab.kill(Daemon::Replicate);
        }
        store.restore();
        lab.start_target();
        if alone {
            // With nobody to send it again, the point can only come from the disk.
            wait_until("the listed point is in the replica volume", PATIENCE, || {
                let base = base_epoch(&record);
                if base >= listed { Ok(()) } else { Err(format!("{base} of {listed}")) }
            });
            lab.start(Daemon::Replicate);
            app.agent_began();
        }
        // Listed only by a target that the agent has spoken to since.
        lab.cut();
        assert!(!lab.has_said(Daemon::Replicate, LOST), "an acknowledged epoch was lost");
    }
    // The replica volume as it is on the medium, not as the page cache has it.
    app.end(&mut lab, || {
        store.cut_power();
        store.restore();
    });
}

/// A protected volume and what writes to it. (Fields are dropped in this order.)
struct Application {
    load: Option<Load>,
    mount: Option<Mount>,
    device: LoopDevice,
    /// Bytes written when the agent that runs was started.
    written_before: Option<u64>,
}

impl Application {
    fn new(dir: &Path, random: &mut Random) -> Self {
        let device = LoopDevice::sparse(dir, "source.img", VOLUME_BYTES);
        device.format_ext4(&[]);
        let mount = Mount::new(device.path(), &dir.join("mnt"), "defaults");
        let mut still = vec![0; STILL_BYTES];
        random.fill(&mut still);
        // On the disk before anything is followed, or its writeback would count as changes.
        let mut file = File::create(mount.path().join("still")).expect("create");
        file.write_all(&still).and_then(|()| file.sync_all()).expect("write");
        Self { load: None, mount: Some(mount), device, written_before: None }
    }

    fn protect(&mut self, lab: &mut Lab, random: &mut Random) {
        lab.join();
        let goal = format!("{GOAL_SECONDS}s");
        lab.protect(self.device.path(), &["--rpo", &goal]).ok();
        lab.wait_for_epoch_after(0, PATIENCE);
        let dir = self.mount.as_ref().expect("it is mounted").path();
        self.load = Some(Load::start(Load::mixed(dir, random, PAUSE)));
    }

    fn load(&self) -> &Load {
        self.load.as_ref().expect("the load runs")
    }

    /// Waits until it has written that much; an I/O error ends its threads, and this in vain.
    fn writes_more(&self, bytes: u64) {
        let until = self.load().written() + bytes;
        wait_until("the application goes on", PATIENCE, || {
            let written = self.load().written();
            if written >= until { Ok(()) } else { Err(written.to_string()) }
        });
    }

    /// A fresh agent counts what it sends from nothing.
    fn agent_began(&mut self) {
        self.written_before = Some(self.load().written());
    }

    /// Stops the load; the last point must be the volume, byte for byte, and what was sent far
    /// less than another copy.
    fn end(mut self, lab: &mut Lab, before_comparing: impl FnOnce()) {
        let written = self.load.take().expect("the load runs").stop();
        self.mount.take().expect("it is mounted").unmount();
        lab.cut();
        let replica = lab.wait_until_promoted(PATIENCE);
        let status = lab.status().expect("status");
        let volume = &status.volumes[0];
        let first_copy = if self.written_before.is_none() { STILL_BYTES as u64 } else { 0 };
        let written = written - self.written_before.unwrap_or(0);
        eprintln!(
            "{} MiB written, {} MiB sent, {} compares",
            written >> 20,
            volume.sent_bytes >> 20,
            volume.compares
        );
        let limit = first_copy + 2 * written + ALLOWANCE_BYTES;
        assert!(volume.sent_bytes < limit, "{} bytes sent, {limit} expected", volume.sent_bytes);
        lab.stop(Daemon::Target);
        before_comparing();
        assert_equal(self.device.path(), &replica);
        lab.start_target();
        lab.cli(Side::Site, &["unprotect", SERVER, "--yes"]).ok();
    }
}

/// Waits until the server is shown as stopped at the target for one of these causes, with the
/// remedy.
fn stopped(lab: &mut Lab, causes: &[&str]) -> ServerStatus {
    lab.wait("the status says that and why it is stopped", PATIENCE, |status| {
        let always = ["the target stopped it", "repair the storage, then restart"];
        status.state == State::Stopped
            && always.iter().all(|words| status.reason.contains(words))
            && causes.iter().any(|cause| status.reason.contains(cause))
    })
}

/// Takes all the space of a file system; returns the file that has it.
fn fill(dir: &Path) -> PathBuf {
    let path = dir.join("filler");
    let mut file = OpenOptions::new().create(true).append(true).open(&path).expect("it");
    let mut piece = vec![0x5a; 4 << 20];
    while !piece.is_empty() {
        match file.write_all(&piece) {
            Ok(()) => {}
            Err(_) => piece.truncate(piece.len() / 2),
        }
    }
    let _ = file.sync_all();
    path
}

/// Epoch of the newest exact point that control lists, and the volume's `state.json`.
fn listed(lab: &Lab) -> (u64, PathBuf) {
    // None is listed for the moment between a target's start and its first look at the journal.
    let epoch = wait_until("an exact point is listed", PATIENCE, || {
        let points = lab.points().points;
        let exact = points.iter().rev().find(|point| point.consistency != "fuzzy");
        exact.and_then(|point| point.epochs.values().next().copied()).ok_or(format!("{points:?}"))
    });
    let replica = lab.status().expect("status").volumes[0].replica.clone().expect("a replica");
    (epoch, Path::new(&replica).with_file_name("state.json"))
}

/// The epoch that the replica volume is.
fn base_epoch(record: &Path) -> u64 {
    let text = std::fs::read(record).expect("state.json");
    let record: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    record["base"]["epoch"].as_u64().unwrap_or(0)
}
