//! Several hundred recovery points of a device that is written all the time: old ones, new ones, one
//! with a name, and those that thinning has just left are opened over NBD by a client of the field,
//! and each must be byte for byte the device at its cut. The target is killed meanwhile, as a
//! process of its own; its retention clock counts 150 seconds for each.

use secondsite::target::retention::RetentionClock;
use secondsite_control::api::{KeepPolicy, TrackerChoice};
use secondsite_control::client::BlockingClient;
use secondsite_control::recovery::{self, CloseRequest, KeepRequest, OpenRequest, OpenedPoint};
use secondsite_tests::block::LoopDevice;
use secondsite_tests::load::Aligned;
use secondsite_tests::random::Random;
use secondsite_tests::site::{InProcess, make_identities, start_target, target_assignment};
use secondsite_tests::{soak, wait_until};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const VOLUME_BYTES: u64 = 64 << 20;
const BLOCK_BYTES: usize = 4096;
const BLOCKS: u64 = VOLUME_BYTES / BLOCK_BYTES as u64;
const SERVER: &str = "db1";
/// Seconds of the retention clock for each.
const RATE: u64 = 150;
/// All for an hour (24 s here), then one per 5 minutes (2 s) for another half (12 s).
const KEEP: KeepPolicy = KeepPolicy { fine_seconds: 90 * 60, coarse_seconds: 95 * 60 };
const PATIENCE: Duration = Duration::from_secs(60);
/// In the environment of the process that is the target: its folder, device and address.
const CHILD: &str = "SECONDSITE_TEST_TARGET";

/// The target's process: this executable, which runs only this.
#[test]
fn the_target_of_the_test() {
    let Ok(words) = std::env::var(CHILD) else { return };
    let [folder, device, listen] = words.split('|').collect::<Vec<_>>()[..] else { panic!() };
    let assignment = target_assignment(&[PathBuf::from(device)], Some(KEEP));
    let clock = Arc::new(RetentionClock::faster(RATE));
    let target = start_target(Path::new(folder), listen, assignment, clock);
    recovery::serve(&api(Path::new(folder)), target.recovery()).expect("its API");
    println!("serving");
    // The test kills it; without a test it ends too.
    let _ = std::io::stdin().read(&mut [0]);
}

fn api(folder: &Path) -> PathBuf {
    folder.join("api.sock")
}

struct Target {
    child: Child,
}

impl Target {
    fn start(folder: &Path, device: &Path, listen: &str) -> Self {
        let words = format!("{}|{}|{listen}", folder.display(), device.display());
        let mut child = Command::new(std::env::current_exe().expect("this executable"))
            .args(["--exact", "the_target_of_the_test", "--nocapture"])
            .env(CHILD, words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a target");
        let lines = BufReader::new(child.stdout.take().expect("it is piped"));
        let serving = lines.lines().map_while(Result::ok).any(|line| line.contains("serving"));
        assert!(serving, "the target ended before it served");
        Self { child }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the device holds: the stamp of every block, 0 for zeros.
type Model = Arc<Vec<u32>>;

fn fill(block: u64, stamp: u32, content: &mut [u8]) {
    content.fill(0);
    if stamp == 0 {
        return;
    }
    // Half of it compresses.
    for (i, word) in content[..BLOCK_BYTES / 2].chunks_exact_mut(8).enumerate() {
        let mixed = (u64::from(stamp) << 32 | block).wrapping_mul(0x9e37_79b9_7f4a_7c15 + i as u64);
        word.copy_from_slice(&mixed.to_le_bytes());
    }
}

struct Writer {
    file: std::fs::File,
    block: Box<Aligned<BLOCK_BYTES>>,
    model: Vec<u32>,
    stamp: u32,
}

impl Writer {
    /// Runs of blocks, some hot, some zeroed.
    fn burst(&mut self, random: &mut Random) {
        for _ in 0..1 + random.below(12) {
            let hot = random.below(3) > 0;
            let first = if hot { random.below(512) } else { random.below(BLOCKS - 32) };
            self.stamp += 1;
            let stamp = if random.below(8) == 0 { 0 } else { self.stamp };
            for block in first..first + 1 + random.below(24) {
                fill(block, stamp, &mut self.block.0);
                let written = self.file.write_all_at(&self.block.0, block * BLOCK_BYTES as u64);
                written.expect("the application sees no error");
                self.model[block as usize] = stamp;
            }
        }
    }
}

struct Points {
    folder: PathBuf,
    models: BTreeMap<String, Model>,
    client: BlockingClient,
    checked: Cell<u32>,
}

impl Points {
    fn listed(&self) -> Vec<String> {
        let points = wait_until("the target answers", PATIENCE, || {
            let found = self.client.run(|target| target.points(SERVER));
            let found = found.map_err(|error| error.to_string())?;
            // After a start it checks its journal first.
            if found.points.is_empty() { Err("no point yet".into()) } else { Ok(found.points) }
        });
        points.into_iter().map(|point| point.id).collect()
    }

    fn open(&self, point: &str) -> Result<OpenedPoint, String> {
        let request = OpenRequest { point: Some(point.into()), ..OpenRequest::default() };
        self.client.run(|target| target.open(SERVER, &request)).map_err(|error| error.to_string())
    }

    fn close(&self, point: &str) {
        let request = CloseRequest { point: Some(point.into()) };
        self.client.run(|target| target.close(SERVER, &request)).expect("closed");
    }

    /// Reads all of an opened point, and compares.
    fn check(&self, opened: &OpenedPoint, why: &str) {
        let model = self.models.get(&opened.point);
        let model = model.unwrap_or_else(|| panic!("{} was never cut", opened.point));
        let image = self.folder.join("read.img");
        let copied = Command::new("nbdcopy").arg(&opened.volumes[0].uri).arg(&image).output();
        let copied = copied.expect("nbdcopy");
        let talk = String::from_utf8_lossy(&copied.stderr);
        assert!(copied.status.success(), "{why} point {}: {talk}", opened.point);
        let content = std::fs::read(&image).expect("what was read");
        assert_eq!(content.len() as u64, VOLUME_BYTES);
        let mut expected = vec![0; BLOCK_BYTES];
        for (block, found) in content.chunks(BLOCK_BYTES).enumerate() {
            fill(block as u64, model[block], &mut expected);
            assert!(
                found == expected,
                "{why} point {}: block {block} is not the one of its cut (stamp {})",
                opened.point,
                model[block]
            );
        }
        std::fs::remove_file(&image).expect("removed");
        self.checked.set(self.checked.get() + 1);
    }

    fn open_and_check(&self, point: &str, why: &str) {
        // One whose order failed when the target died may have been committed nevertheless.
        if !self.models.contains_key(point) {
            return;
        }
        // A point may be thinned away between the list and this; then it is no point any more.
        match self.open(point) {
            Ok(opened) => {
                self.check(&opened, why);
                self.close(&opened.point);
            }
            Err(error) => assert!(!self.listed().contains(&point.to_owned()), "{why}: {error}"),
        }
    }
}

#[test]
fn every_kept_point_is_the_device_at_its_cut() {
    let mut random = Random::printed("recovery_points");
    let dir = tempfile::tempdir().expect("a folder");
    let folder = dir.path();
    let device = LoopDevice::sparse(folder, "source.img", VOLUME_BYTES);
    make_identities(folder);
    let listen = {
        let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
        free.local_addr().expect("its address")
    };
    let start = || Target::start(folder, device.path(), &listen.to_string());
    let mut target = start();
    let devices = [device.path().to_path_buf()];
    let mut site = InProcess::start_towards(folder, &devices, TrackerChoice::Ebpf, listen);
    site.follow();
    let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(device.path());
    let mut writer = Writer {
        file: file.expect("the device"),
        block: Box::new(Aligned([0; BLOCK_BYTES])),
        model: vec![0; BLOCKS as usize],
        stamp: 0,
    };
    let client = BlockingClient::local(&api(folder)).expect("a client");
    let mut points = Points {
        folder: folder.to_owned(),
        models: BTreeMap::new(),
        client,
        checked: Cell::new(0),
    };

    let span = Duration::from_secs(u64::from(soak(75, 900)));
    let begun = Instant::now();
    let (mut made, mut cuts, mut kills, mut most, mut least) = (0u32, 0, 0, 0, usize::MAX);
    let mut named = None;
    let mut held: Option<OpenedPoint> = None;
    while begun.elapsed() < span {
        writer.burst(&mut random);
        // Nothing is written while it is cut: the point is the device as it is now.
        cuts += 1;
        if let Ok((point, true)) = site.cut_point() {
            points.models.insert(point, Arc::new(writer.model.clone()));
            made += 1;
        }
        if made.is_multiple_of(12) {
            let listed = points.listed();
            (most, least) = (most.max(listed.len()), least.min(listed.len()));
            let any = random.below(listed.len() as u64) as usize;
            match random.below(4) {
                0 => points.open_and_check(&listed[0], "the oldest"),
                1 => points.open_and_check(&listed[listed.len() - 1], "the newest"),
                _ => points.open_and_check(&listed[any], "some"),
            }
        }
        if made == 40 && named.is_none() {
            let listed = points.listed();
            let known = listed.iter().rfind(|point| points.models.contains_key(*point));
            let point = known.expect("a point").clone();
            let name = Some("before-the-upgrade".to_owned());
            let request = KeepRequest { point: point.clone(), name, release: false };
            points.client.run(|target| target.keep(SERVER, &request)).expect("kept");
            named = Some(point);
        }
        // One stays open, over thinning, promotion and the target's death.
        if made == 60 && held.is_none() {
            let listed = points.listed();
            let known = listed.iter().rfind(|point| points.models.contains_key(*point));
            held = known.and_then(|point| points.open(point).ok());
        }
        if random.below(130) == 0 {
            drop(target);
            target = start();
            kills += 1;
            if let Some(opened) = &held {
                wait_until("what was open is served again", PATIENCE, || {
                    let opens = points.client.run(|target| target.opens());
                    let opens = opens.map_err(|error| error.to_string())?;
                    let again = opens.points.iter().any(|point| point.point == opened.point);
                    if again { Ok(()) } else { Err(format!("{opens:?}")) }
                });
                points.check(opened, "held over a restart");
            }
        }
    }
    let listed = points.listed();
    let gone = points.models.keys().filter(|point| !listed.contains(point)).count();
    let (now, checked) = (listed.len(), points.checked.get());
    eprintln!(
        "{made} exact points made, {cuts} cuts, from {least} to {most} at a time, {now} now, {gone} gone, {kills} kills, {checked} opened and compared"
    );
    assert!(most >= 200, "only {most} points were kept at a time");
    assert!(gone > 0, "nothing was thinned");
    let opened = points.open("before-the-upgrade").expect("a named point stays");
    assert_eq!(Some(&opened.point), named.as_ref());
    points.check(&opened, "the named");
    for point in listed.iter().step_by((listed.len() / 30).max(1)) {
        points.open_and_check(point, "at the end");
    }
    if let Some(opened) = &held {
        points.check(opened, "held to the end");
    }
    let _ = std::io::stderr().flush();
}
