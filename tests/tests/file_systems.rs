//! The main promises, attacked together: a server with ext4, XFS, btrfs and a raw volume under a
//! mixed load, while daemons of both sides die by `kill -9`, the target restarts, the link breaks
//! loudly and silently, and a machine vanishes with its connections half open.
//!
//! Wherever the agent dies, the replica volumes are one instant of all volumes: stamped writes are
//! a prefix over all three file systems, and each of them mounts and is clean. At the end of a round
//! every replica volume is its source, byte for byte. No fault costs a full transfer.

use secondsite_control::api::VolumeStatus;
use secondsite_tests::block::{LoopDevice, Mount, assert_equal, run};
use secondsite_tests::file_system::FileSystem;
use secondsite_tests::lab::{Daemon, Lab, SERVER, Side};
use secondsite_tests::load::Load;
use secondsite_tests::ordered::Ordered;
use secondsite_tests::random::Random;
use secondsite_tests::{soak, wait_until};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// XFS takes no less than 300 MiB.
const VOLUME_BYTES: u64 = 320 << 20;
const RAW_BYTES: u64 = 64 << 20;
/// Data of each file system that no one touches: a full transfer would send it again.
const STILL_BYTES: u64 = 96 << 20;
/// What resending given-up epochs, metadata and compares may cost a life of the agent besides what
/// was written: less than the still data of one file system.
const ALLOWANCE_BYTES: u64 = 64 << 20;
const PAUSE: Duration = Duration::from_millis(10);
const RAW_REST: Duration = Duration::from_millis(400);
const PATIENCE: Duration = Duration::from_secs(120);
/// The target lets go of a silent session after 60 s by itself.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(45);
/// Four busy volumes share the memory for last passes; with the default of 64 MiB each gets 1 MiB
/// for what is written until a freeze stands, and the points of this load would all be fuzzy.
const MEMORY: &str = "memory = \"256MiB\"";
/// How long an exact point is waited for without a lull.
const UNDER_LOAD: Duration = Duration::from_secs(10);
const FAULTS_A_ROUND: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// `kill -9`; of the agent: just after an exact point under load, which is then inspected.
    Kill(Daemon),
    /// SIGTERM of the target, and a new one.
    Restart,
    /// The link goes down and comes back.
    Unplug,
    /// Every packet is lost, then no more.
    Silence,
    /// The agent's machine vanishes; the next agent comes while the target holds the old sessions.
    Vanish,
}

const FAULTS: [Fault; 2 * FAULTS_A_ROUND] = [
    Fault::Kill(Daemon::Replicate),
    Fault::Kill(Daemon::Target),
    Fault::Kill(Daemon::Control),
    Fault::Kill(Daemon::Replicate),
    Fault::Restart,
    Fault::Unplug,
    Fault::Silence,
    Fault::Vanish,
];

#[test]
fn three_file_systems_survive_every_fault() {
    let mut random = Random::printed("file_systems");
    let dir = tempfile::tempdir().expect("a folder");
    let sparse = |name: &str, bytes| LoopDevice::sparse(dir.path(), name, bytes);
    let raw = sparse("raw.img", RAW_BYTES);
    let devices = FileSystem::ALL.map(|kind| sparse(&format!("{}.img", kind.name()), VOLUME_BYTES));
    for (kind, device) in FileSystem::ALL.iter().zip(&devices) {
        kind.make(device);
    }
    let mount_all = || -> Vec<Mount> {
        let mount = |(kind, device): (&FileSystem, &LoopDevice)| {
            Mount::new(device.path(), &dir.path().join(kind.name()), kind.options())
        };
        FileSystem::ALL.iter().zip(&devices).map(mount).collect()
    };
    let mut mounts = mount_all();
    for mount in &mounts {
        let mut still = vec![0; STILL_BYTES as usize];
        random.fill(&mut still);
        // On the disk before anything is followed, or its writeback would count as changes.
        let mut file = File::create(mount.path().join("still")).expect("create");
        file.write_all(&still).and_then(|()| file.sync_all()).expect("write");
    }
    let folders: Vec<_> = mounts.iter().map(Mount::path).collect();
    let ordered = Ordered::new(&folders);

    let mut ring = Ring {
        lab: Lab::on_a_network(),
        ordered,
        compares: 0,
        stamp: 0,
        points: 0,
        dir: dir.path(),
    };
    ring.lab.join_with(MEMORY);
    let mut all: Vec<&Path> = devices.iter().map(LoopDevice::path).collect();
    all.push(raw.path());
    ring.lab.protect_all(&all, &["--rpo", "3s"]).ok();
    ring.lab.wait_for_epoch_after(0, PATIENCE);
    let mut life = Life { load_before: 0, first_copy: 3 * STILL_BYTES + (3 << 22) + (16 << 20) };
    let mut written = 0;

    let mut faults = Vec::new();
    for round in 0..soak(2, 20) {
        let mut turns = vec![ring.ordered.writer(&mut random)];
        for mount in &mounts {
            turns.extend(Load::mixed(mount.path(), &mut random, PAUSE));
        }
        turns.push(Load::bursts(raw.path(), RAW_BYTES, &mut random, RAW_REST));
        let load = Load::start(turns);
        for _ in 0..FAULTS_A_ROUND {
            if faults.is_empty() {
                faults = shuffled(&mut random);
            }
            let fault = faults.pop().expect("a fault");
            let begun = Instant::now();
            let new_life = ring.suffer(fault, &load, &mut random, &devices, &life, written);
            if let Some(first) = new_life {
                life = first;
            }
            eprintln!("round {round}: {fault:?} took {:?}", begun.elapsed());
        }
        written += load.stop();
        mounts.into_iter().for_each(Mount::unmount);
        ring.lab.cut();
        ring.lab.wait_until_promoted(PATIENCE);
        // Nothing is kept, so by now a later one may have taken the place of the cut's own point.
        let newest = ring.lab.points().points.pop().expect("a point is listed");
        assert_eq!(newest.consistency, "crash", "the final point is exact: {newest:?}");
        for path in &all {
            assert_equal(path, &ring.lab.replica(path));
        }
        mounts = mount_all();
    }
    ring.compares += life.ends(&ring.lab, written);
    eprintln!(
        "{} MiB written, {} points under load inspected, {} compares for doubts",
        written >> 20,
        ring.points,
        ring.compares
    );
    assert!(ring.points > 0, "no point under load was inspected");
    ring.lab.cli(Side::Site, &["unprotect", SERVER, "--yes"]).ok();
}

fn shuffled(random: &mut Random) -> Vec<Fault> {
    let mut left = FAULTS.to_vec();
    let mut faults = Vec::new();
    while !left.is_empty() {
        faults.push(left.swap_remove(random.below(left.len() as u64) as usize));
    }
    faults
}

struct Ring<'a> {
    lab: Lab,
    ordered: Ordered,
    /// Compares for doubts, of all agents.
    compares: u64,
    /// The newest stamp that a replica was seen to hold.
    stamp: u64,
    /// Points under load that were inspected.
    points: u32,
    dir: &'a Path,
}

impl Ring<'_> {
    /// One fault at an instant that nobody chose, and back to where epochs are committed again.
    /// Returns the new life if the agent had to begin one.
    fn suffer(
        &mut self,
        fault: Fault,
        load: &Load,
        random: &mut Random,
        devices: &[LoopDevice],
        life: &Life,
        written: u64,
    ) -> Option<Life> {
        if fault == Fault::Kill(Daemon::Replicate) {
            self.wait_for_a_newer_exact_point(load);
        }
        more(load, random.below(2 << 20));
        let mut new_life = None;
        let mut limit = PATIENCE;
        let port = self.lab.target_port();
        match fault {
            Fault::Kill(Daemon::Replicate) => {
                self.compares += life.ends(&self.lab, written + load.written());
                self.lab.kill(Daemon::Replicate);
                let point = self.lab.wait_until_at_rest(PATIENCE);
                eprintln!("  at rest at {} ({})", point.id, point.time);
                self.inspect(devices);
                new_life = Some(Life { load_before: written + load.written(), first_copy: 0 });
                self.lab.start(Daemon::Replicate);
            }
            Fault::Kill(daemon) => {
                self.lab.kill(daemon);
                self.lab.start(daemon);
            }
            Fault::Restart => {
                self.lab.stop(Daemon::Target);
                self.lab.start(Daemon::Target);
            }
            Fault::Unplug => {
                self.lab.network().set_up(false);
                // The application never notices.
                more(load, (1 << 20) + random.below(2 << 20));
                self.lab.network().set_up(true);
            }
            Fault::Silence => {
                self.lab.network().set_silent(true);
                more(load, (1 << 20) + random.below(2 << 20));
                self.lab.network().set_silent(false);
            }
            Fault::Vanish => {
                self.compares += life.ends(&self.lab, written + load.written());
                self.lab.network().set_silent(true);
                self.lab.kill(Daemon::Replicate);
                let old = self.lab.network().connections(port);
                assert!(old.len() > devices.len(), "a session a volume: {old:?}");
                self.lab.network().bury(&old);
                self.lab.network().set_silent(false);
                new_life = Some(Life { load_before: written + load.written(), first_copy: 0 });
                self.lab.start(Daemon::Replicate);
                limit = TAKE_OVER_LIMIT;
                let since = self.lab.status().expect("control answers");
                let since = since.volumes.iter().filter_map(|volume| volume.epoch).max();
                self.lab.wait_for_epoch_after(since.unwrap_or(0), limit);
                let now = self.lab.network().connections(port);
                let still: Vec<_> = now.iter().filter(|port| old.contains(port)).collect();
                assert!(
                    still.is_empty(),
                    "the target holds sessions of a machine that is gone: {still:?}"
                );
            }
        }
        let since = self.lab.wait("control answers", PATIENCE, |_| true);
        let since = since.volumes.iter().filter_map(|volume| volume.epoch).max();
        self.lab.wait_for_epoch_after(since.unwrap_or(0), limit);
        new_life
    }

    /// Under load, if one comes: a freeze may take 1 % of the time, and a doubt about the marks of
    /// one volume makes the point lack it. Else in a lull, with files open and unsynced.
    fn wait_for_a_newer_exact_point(&mut self, load: &Load) {
        let before = self.lab.newest_exact();
        let (begun, mut lull) = (Instant::now(), false);
        wait_until("a newer exact point", PATIENCE, || {
            let now = self.lab.newest_exact();
            if now.is_some() && now != before {
                return Ok(());
            }
            if begun.elapsed() > UNDER_LOAD {
                lull = true;
                load.rest(true);
            }
            let status = self.lab.status()?;
            Err(format!("{:?}", status.volumes.iter().map(|v| &v.reason).collect::<Vec<_>>()))
        });
        load.rest(false);
        eprintln!("  an exact point after {:?}, in a lull: {lull}", begun.elapsed());
    }

    /// The replica volumes as they are, while the load goes on: copied, looked at, mounted, checked.
    fn inspect(&mut self, devices: &[LoopDevice]) {
        let replicas: Vec<PathBuf> =
            devices.iter().map(|device| self.lab.replica(device.path())).collect();
        let stamp = self.ordered.check(&replicas);
        eprintln!("  the replica volumes end at write {stamp}");
        assert!(stamp > self.stamp, "the replica volumes did not advance from {}", self.stamp);
        self.stamp = stamp;
        for (kind, replica) in FileSystem::ALL.iter().zip(&replicas) {
            let copy = self.dir.join("copy.img");
            let words = [
                "--sparse=always",
                replica.to_str().expect("UTF-8"),
                copy.to_str().expect("UTF-8"),
            ];
            run("cp", &words);
            kind.check(&copy, &self.dir.join("copy"));
        }
        self.points += 1;
    }
}

/// Waits until the application has written so much more.
fn more(load: &Load, bytes: u64) {
    let until = load.written() + bytes;
    wait_until("the load goes on", PATIENCE, || {
        if load.written() >= until { Ok(()) } else { Err(load.written().to_string()) }
    });
}

/// One life of the agent: what was written during it bounds what it may send.
struct Life {
    load_before: u64,
    /// The first one also made the first copy.
    first_copy: u64,
}

impl Life {
    /// Checks what was sent; returns the compares for doubts.
    fn ends(&self, lab: &Lab, written: u64) -> u64 {
        let status = lab.status().expect("control answers");
        let sum = |of: fn(&VolumeStatus) -> u64| status.volumes.iter().map(of).sum::<u64>();
        let (sent, compares) = (sum(|volume| volume.sent_bytes), sum(|volume| volume.compares));
        let written = written - self.load_before;
        eprintln!(
            "  a life of the agent: {} MiB written, {} MiB sent, {compares} compares",
            written >> 20,
            sent >> 20
        );
        // The load is counted when it returns; a block may travel in more than one epoch.
        let limit = self.first_copy + 2 * written + ALLOWANCE_BYTES;
        assert!(sent < limit, "{sent} bytes sent, {limit} expected");
        compares
    }
}
