//! A filter's place under device-mapper volumes that are in use. Runs in the kernel lab
//! (tests/lab/splice.sh): as root, with device-mapper, LVM, and two disks to overwrite.
//!
//! The filter is a device that maps one to one: here only its place is tested.

mod real;

use real::{Aligned, BLOCK, Random, folder, open_direct, run};
use secondsite_tracker::device::Device;
use secondsite_tracker::dm::{Control, Number, Params, Target};
use secondsite_tracker::splice::{
    Below, Change, Hook, Lead, PAUSE_MAX, Refusal, SpliceError, Splicer, Through, Verdict, Written,
    describe, leads_through,
};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Set in the helper: its note's folder, then the volume.
const HELPER: &str = "TRACKER_SPLICE_HELPER";
const SECTORS: u64 = 32768;
/// Longer than anything here takes.
const SOON: Duration = Duration::from_secs(20);
const ID: &str = "t1";

fn disk(serial: &str) -> String {
    let link = format!("/dev/disk/by-id/virtio-{serial}");
    std::fs::canonicalize(link).unwrap().to_str().unwrap().into()
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < SOON, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
    start.elapsed()
}

/// A device of device-mapper; removed when dropped.
struct Dm {
    number: Number,
}

impl Dm {
    /// Lines of the table: start, length, kind, and what that wants to know.
    fn new(name: &str, table: &str) -> Self {
        let made = Self { number: control().create(name, "").unwrap().number };
        made.replace(table);
        made
    }

    fn volume() -> Self {
        let a = number("a");
        let half = SECTORS / 2;
        // The second piece begins before the first and at an odd sector.
        Self::new("v", &format!("0 {half} linear {a} 100001\n{half} {half} linear {a} 2049"))
    }

    fn path(&self) -> PathBuf {
        format!("/dev/dm-{}", self.number.minor).into()
    }

    fn is_suspended(&self) -> bool {
        control().status(self.number).unwrap().suspended
    }

    fn targets(&self) -> Vec<Target> {
        control().table(self.number).unwrap().targets
    }

    fn replace(&self, table: &str) {
        self.load(table);
        control().resume(self.number).unwrap();
    }

    fn load(&self, table: &str) {
        let targets: Vec<_> = table.lines().map(target).collect();
        control().load(self.number, &targets).unwrap();
    }

    /// As it was, and nothing half done.
    fn has_exactly(&self, targets: &[Target]) -> bool {
        let status = control().status(self.number).unwrap();
        self.targets() == targets && !status.suspended && !status.has_loaded_table
    }
}

impl Drop for Dm {
    fn drop(&mut self) {
        let _ = control().clear(self.number);
        let _ = control().resume(self.number);
        let start = Instant::now();
        while control().remove(self.number).is_err_and(|error| error.is_busy()) {
            if start.elapsed() > SOON {
                assert!(std::thread::panicking(), "{} is still in use", self.path().display());
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn control() -> Control {
    Control::open().unwrap()
}

fn number(serial: &str) -> Number {
    let device = Device::open(Path::new(&disk(serial))).unwrap();
    Number { major: device.major, minor: device.minor }
}

fn target(line: &str) -> Target {
    let mut words = line.splitn(4, ' ');
    let mut word = || words.next().unwrap_or_default();
    let (start, sectors) = (word().parse().unwrap(), word().parse().unwrap());
    let (kind, params) = (word().into(), Params::new(word().into()));
    Target { start_sectors: start, sectors, kind, params }
}

/// In the filter's place.
fn front(below: &Below) -> Dm {
    Dm::new("secondsite-front", &format!("0 {} linear {} 0", below.sectors, below.number))
}

fn made(change: Result<Change, SpliceError>) -> Duration {
    match change.unwrap() {
        Change::Made(pause) => pause,
        Change::Already => panic!("it was so already"),
    }
}

fn refused(error: Result<impl std::fmt::Debug, SpliceError>) -> Refusal {
    let error = error.unwrap_err();
    println!("-- {error}");
    error.refusal().unwrap_or_else(|| panic!("{error}")).clone()
}

/// Threads that write blocks of their own and read them back, until told to stop.
struct Load {
    stop: AtomicBool,
    writes: AtomicU64,
    longest_nanos: AtomicU64,
}

impl Load {
    const THREADS: u64 = 4;

    /// Runs `work` while the threads write; each block is verified, through `path` and at the end.
    fn during(path: &Path, blocks: u64, seed: u64, work: impl FnOnce(&Self)) -> Self {
        let load = Self {
            stop: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            longest_nanos: AtomicU64::new(0),
        };
        std::thread::scope(|scope| {
            for thread in 0..Self::THREADS {
                let load = &load;
                scope.spawn(move || load.write(path, thread, blocks, seed));
            }
            // A failure in there must end the threads too.
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&load)));
            load.stop.store(true, Ordering::Relaxed);
            result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
        load
    }

    fn write(&self, path: &Path, thread: u64, blocks: u64, seed: u64) {
        let (device, mut memory) = (open_direct(path, true), Aligned::new(BLOCK as usize));
        let mut random = Random(seed ^ (thread + 1));
        let own = blocks / Self::THREADS;
        let mut versions = vec![0u64; own as usize];
        let data = memory.slice(BLOCK as usize);
        let mut verify = |index: u64, version: u64| {
            let block = thread * own + index;
            device.read_exact_at(data, block * BLOCK).unwrap();
            let words = data.chunks(16).map(|pair| {
                let word = |at: usize| u64::from_le_bytes(pair[at..at + 8].try_into().unwrap());
                (word(0), word(8))
            });
            for found in words {
                assert_eq!(found, (block, version), "block {block}, written {version} times");
            }
        };
        let mut memory = Aligned::new(BLOCK as usize);
        while !self.stop.load(Ordering::Relaxed) {
            let index = random.below(own);
            let (block, version) = (thread * own + index, versions[index as usize] + 1);
            let data = memory.slice(BLOCK as usize);
            for pair in data.chunks_mut(16) {
                pair[..8].copy_from_slice(&block.to_le_bytes());
                pair[8..].copy_from_slice(&version.to_le_bytes());
            }
            let start = Instant::now();
            device.write_all_at(data, block * BLOCK).unwrap();
            self.longest_nanos.fetch_max(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
            self.writes.fetch_add(1, Ordering::Relaxed);
            versions[index as usize] = version;
            let again = random.below(own);
            if versions[again as usize] > 0 {
                verify(again, versions[again as usize]);
            }
        }
        for (index, version) in versions.iter().enumerate().filter(|(_, version)| **version > 0) {
            verify(index as u64, *version);
        }
    }

    /// Waits until some more was written.
    fn more(&self) {
        let start = self.writes.load(Ordering::Relaxed);
        until("writes", || self.writes.load(Ordering::Relaxed) >= start + 30);
    }

    fn longest(&self) -> Duration {
        Duration::from_nanos(self.longest_nanos.load(Ordering::Relaxed))
    }
}

fn rounds(short: u32) -> u32 {
    if std::env::var_os("SECONDSITE_LONG").is_some() { short * 10 } else { short }
}

fn seed() -> u64 {
    let given = std::env::var("SECONDSITE_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| u64::from(std::process::id()) * 7919);
    println!("seed {seed}");
    seed
}

/// In, and out, and in; returns the longest pause of the volume.
fn in_and_out(splicer: &mut Splicer, volume: &Dm, rounds: u32, between: impl Fn()) -> Duration {
    let (path, mut longest) = (volume.path(), Duration::ZERO);
    let table = volume.targets();
    let mut filter = None;
    for round in 1..=rounds {
        let below = splicer.prepare(&path, ID).unwrap();
        let front = filter.take().unwrap_or_else(|| front(&below));
        let pause = made(splicer.insert(&path, ID, &front.path(), PAUSE_MAX));
        assert!(leads_through(&path, &front.path()));
        longest = longest.max(pause);
        between();
        let pause = made(splicer.take_out(&path, ID, PAUSE_MAX));
        assert!(!leads_through(&path, &front.path()));
        longest = longest.max(pause);
        if round % 5 == 0 || round == rounds {
            drop(front);
            splicer.remove_below(ID).unwrap();
        } else {
            filter = Some(front);
        }
        assert!(volume.has_exactly(&table));
        between();
    }
    longest
}

#[test]
#[ignore = "needs the kernel lab: scripts/lab test splice"]
fn in_the_lab_in_and_out_under_a_writer() {
    let folder = folder();
    let mut splicer = Splicer::start(folder.path()).unwrap();
    let (a, b) = (number("a"), number("b"));
    let key = "07".repeat(32);
    let tables = [
        ("two pieces", 20, Dm::volume as fn() -> Dm, String::new()),
        ("striped", 2, Dm::volume, format!("0 {SECTORS} striped 2 32 {a} 0 {b} 2049")),
        ("encrypted", 2, Dm::volume, format!("0 {SECTORS} crypt aes-xts-plain64 {key} 0 {a} 2048")),
    ];
    for (what, count, volume, table) in tables {
        let volume = if table.is_empty() { volume() } else { Dm::new("v", &table) };
        let path = volume.path();
        let (mut pause, count) = (Duration::ZERO, rounds(count));
        let load = Load::during(&path, SECTORS / 8, seed(), |load| {
            pause = in_and_out(&mut splicer, &volume, count, || load.more());
        });
        println!(
            "-- {what}: {count} times in and out, {} writes verified, 0 errors; longest pause {} ms, \
             longest write {} ms",
            load.writes.load(Ordering::Relaxed),
            pause.as_millis(),
            load.longest().as_millis()
        );
    }
}

#[test]
#[ignore = "needs the kernel lab: scripts/lab test splice"]
fn in_the_lab_a_mounted_file_system_stays_whole() {
    let folder = folder();
    let mut splicer = Splicer::start(&folder.path().join("note")).unwrap();
    let volume = Dm::volume();
    let (node, mount) = (volume.path(), folder.path().join("mount"));
    std::fs::create_dir(&mount).unwrap();
    run("mkfs.ext4", &["-q", node.to_str().unwrap()]);
    run("mount", &[node.to_str().unwrap(), mount.to_str().unwrap()]);
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let content = |number: u64| number.to_le_bytes().repeat(1000 + number as usize % 1000);
    let pause = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for number in 0.. {
                let path = mount.join(format!("{}", number % 200));
                let mut file = File::create(path).unwrap();
                file.write_all(&content(number)).unwrap();
                if number % 4 == 0 {
                    file.sync_all().unwrap();
                }
                written.store(number + 1, Ordering::Relaxed);
                if stop.load(Ordering::Relaxed) {
                    return number;
                }
            }
            unreachable!()
        });
        let more = || {
            let start = written.load(Ordering::Relaxed);
            until("files", || written.load(Ordering::Relaxed) >= start + 5);
        };
        let pause = in_and_out(&mut splicer, &volume, rounds(20), more);
        // Unmounted, and mounted again, while the filter is under it.
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        pause
    });
    let last = written.load(Ordering::Relaxed) - 1;
    run("umount", &[mount.to_str().unwrap()]);
    run("fsck.ext4", &["-fn", node.to_str().unwrap()]);
    run("mount", &[node.to_str().unwrap(), mount.to_str().unwrap()]);
    for number in last.saturating_sub(199)..=last {
        let found = std::fs::read(mount.join(format!("{}", number % 200))).unwrap();
        assert!(found == content(number), "file {number}");
    }
    run("umount", &[mount.to_str().unwrap()]);
    println!(
        "-- ext4: {} times in and out, {last} files; longest pause {} ms",
        rounds(20),
        pause.as_millis()
    );
}

#[test]
#[ignore = "needs the kernel lab: scripts/lab test splice"]
fn in_the_lab_each_step_may_be_repeated() {
    let folder = folder();
    let mut splicer = Splicer::start(folder.path()).unwrap();
    let volume = Dm::volume();
    let path = volume.path();
    assert_eq!(refused(splicer.take_out(&path, ID, PAUSE_MAX)), Refusal::NotPrepared);
    let below = splicer.prepare(&path, ID).unwrap();
    assert_eq!(splicer.prepare(&path, ID).unwrap(), below);
    assert_eq!((below.sectors, below.through), (SECTORS, None));
    assert_eq!(describe(&below.node).unwrap().targets, describe(&path).unwrap().targets);
    assert_eq!(describe(&below.node).unwrap().hash(), describe(&path).unwrap().hash());

    let front = front(&below);
    made(splicer.insert(&path, ID, &front.path(), PAUSE_MAX));
    assert_eq!(splicer.insert(&path, ID, &front.path(), PAUSE_MAX).unwrap(), Change::Already);
    assert_eq!(splicer.prepare(&path, ID).unwrap().through, Some(front.number));
    assert_ne!(describe(&below.node).unwrap().hash(), describe(&path).unwrap().hash());
    // Under another name it would be a second one.
    assert!(matches!(refused(splicer.prepare(&path, "t2")), Refusal::AlreadyThrough(_)));
    // A process that was started later finds it as well.
    let mut other = Splicer::start(&folder.path().join("other")).unwrap();
    assert_eq!(other.prepare(&path, ID).unwrap().through, Some(front.number));
    // But never beside another that lives.
    let error = Splicer::start(folder.path()).map(drop).unwrap_err();
    assert!(error.to_string().contains("another process"), "{error}");

    made(other.take_out(&path, ID, PAUSE_MAX));
    assert_eq!(splicer.take_out(&path, ID, PAUSE_MAX).unwrap(), Change::Already);
    drop(front);
    splicer.remove_below(ID).unwrap();
    splicer.remove_below(ID).unwrap();
}

#[test]
#[ignore = "needs the kernel lab: scripts/lab test splice"]
fn in_the_lab_what_cannot_be_spliced_is_refused() {
    let folder = folder();
    let mut splicer = Splicer::start(&folder.path().join("note")).unwrap();
    let (a, b) = (number("a"), number("b"));
    let kinds = [
        ("snapshot-origin", format!("0 {SECTORS} snapshot-origin {a}")),
        ("snapshot", format!("0 {SECTORS} snapshot {a} {b} N 8")),
        ("era", format!("0 {SECTORS} era {b} {a} 128")),
        ("raid", format!("0 {SECTORS} raid raid1 3 0 region_size 1024 2 - {a} - {b}")),
        ("multipath", format!("0 {SECTORS} multipath 0 0 1 1 round-robin 0 1 1 {a} 1000")),
    ];
    for (kind, table) in &kinds {
        // A store of another kind is none.
        real::range_ioctl(&open_direct(Path::new(&disk("b")), true), real::ZERO_OUT, 0, 1 << 20);
        let volume = Dm::new("v", table);
        let before = volume.targets();
        match refused(splicer.prepare(&volume.path(), ID)) {
            Refusal::SharedState { kind: found, .. } => assert_eq!(&found, kind),
            other => panic!("{kind}: {other}"),
        }
        assert!(volume.has_exactly(&before));
    }
    assert_eq!(refused(splicer.prepare(Path::new(&disk("a")), ID)), Refusal::NotDeviceMapper);

    let volume = Dm::volume();
    let path = volume.path();
    assert!(matches!(refused(splicer.prepare(&path, "a/b")), Refusal::Name(_)));
    volume.load(&format!("0 {SECTORS} error"));
    assert_eq!(refused(splicer.prepare(&path, ID)), Refusal::BeingChanged);
    control().clear(volume.number).unwrap();
    run("dmsetup", &["suspend", "v"]);
    assert_eq!(refused(splicer.prepare(&path, ID)), Refusal::BeingChanged);
    control().resume(volume.number).unwrap();

    let node = path.to_str().unwrap();
    run("mkswap", &[node]);
    run("swapon", &[node]);
    assert!(matches!(refused(splicer.prepare(&path, ID)), Refusal::Swap(_)));
    run("swapoff", &[node]);

    // The root file system: of a process that is locked up in it.
    let root = folder.path().join("root");
    std::fs::create_dir(&root).unwrap();
    run("mkfs.ext4", &["-q", "-F", node]);
    run("mount", &[node, root.to_str().unwrap()]);
    for place in ["proc", "sys", "dev", "run"] {
        std::fs::create_dir(root.join(place)).unwrap();
        run("mount", &["--rbind", &format!("/{place}"), root.join(place).to_str().unwrap()]);
    }
    let mut helper = Helper::start(&folder.path().join("helper"), &path, "chroot");
    let answer = helper.ask(root.to_str().unwrap());
    assert!(answer.contains("root file system"), "{answer}");
    drop(helper);
    run("umount", &["-R", "-l", root.to_str().unwrap()]);

    assert!(Control::open().unwrap().find("secondsite-t1-below").unwrap().is_none());
    let below = splicer.prepare(&path, ID).unwrap();
    // In the filter's place: too small, too large, with larger blocks, on the volume itself.
    let sizes = [(below.sectors - 8, below.number), (below.sectors, volume.number)];
    for (sectors, over) in sizes {
        let front = Dm::new("secondsite-front", &format!("0 {sectors} linear {over} 0"));
        let refusal = refused(splicer.insert(&path, ID, &front.path(), PAUSE_MAX));
        assert!(matches!(refusal, Refusal::Size { .. } | Refusal::Circle(_)));
    }
    let larger = front(&below);
    let longer = format!("0 {0} linear {1} 0\n{0} 8 zero", below.sectors, below.number);
    larger.replace(&longer);
    let refusal = refused(splicer.insert(&path, ID, &larger.path(), PAUSE_MAX));
    assert!(matches!(refusal, Refusal::Size { .. }), "{refusal}");
    drop(larger);
    assert!(!volume.is_suspended());
    splicer.remove_below(ID).unwrap();
}

#[test]
#[ignore = "needs the kernel lab: scripts/lab test splice"]
fn in_the_lab_another_table_is_noticed() {
    let folder = folder();
    let mut splicer = Splicer::start(folder.path()).unwrap();
    let volume = Dm::volume();
    let path = volume.path();
    let a = number("a");
    let below = splicer.prepare(&path, ID).unwrap();
    let filter = front(&below);
    assert!(Through::open(&path, &filter.path()).unwrap().is_none(), "not spliced yet");
    made(splicer.insert(&path, ID, &filter.path(), PAUSE_MAX));
    let mut through = Through::open(&path, &filter.path()).unwrap().unwrap();
    let ours = format!("0 {SECTORS} linear {} 0", filter.number);
    let looks = 1000;
    let start = Instant::now();
    for _ in 0..looks {
        assert_eq!(through.look(), Lead::Through);
    }
    println!("-- a look takes {} us", start.elapsed().as_micros() / looks);
    // The same table once more, suspended, resumed: all the time through the filter.
    volume.replace(&ours);
    run("dmsetup", &["suspend", "v"]);
    control().resume(volume.number).unwrap();
    assert_eq!(through.look(), Lead::Through);

    volume.replace(&format!("0 {SECTORS} linear {a} 100001"));
    assert_eq!(through.look(), Lead::Replaced);
    // Put back, it leads through again; what was written in between was not seen.
    volume.replace(&ours);
    assert_eq!(through.look(), Lead::Replaced, "put back is not the same");
    let mut through = Through::open(&path, &filter.path()).unwrap().unwrap();
    assert_eq!(through.look(), Lead::Through);
    // Part of it.
    volume.replace(&format!(
        "0 {} linear {} 0\n{} 8 zero",
        SECTORS - 8,
        filter.number,
        SECTORS - 8
    ));
    assert_eq!(through.look(), Lead::Replaced);
    volume.replace(&format!("{ours}\n{SECTORS} 8 zero"));
    assert_eq!(through.look(), Lead::Grown(SECTORS + 8));
    assert_eq!(refused(splicer.take_out(&path, ID, PAUSE_MAX)), Refusal::Replaced);
    volume.replace(&ours);
    made(splicer.take_out(&path, ID, PAUSE_MAX));
    drop(volume);
    assert_eq!(through.look(), Lead::Gone);
    // Another device by the same name and number is none of ours.
    let another = Dm::new("v2", &ours);
    assert_eq!(another.path(), path);
    assert_eq!(through.look(), Lead::Gone);
    drop((another, filter));
    splicer.remove_below(ID).unwrap();
}

#[test]
#[ignore = "needs the kernel lab: scripts/lab test splice"]
fn in_the_lab_writes_beside_the_filter_are_counted() {
    let folder = folder();
    let mut splicer = Splicer::start(folder.path()).unwrap();
    let volume = Dm::volume();
    let path = volume.path();
    let below = splicer.prepare(&path, ID).unwrap();
    let filter = front(&below);
    let written = Written::open(&Device::open(&below.node).unwrap()).unwrap();
    made(splicer.insert(&path, ID, &filter.path(), PAUSE_MAX));
    let mut memory = Aligned::new(1 << 16);
    let data = memory.slice(1 << 16);
    let ours = open_direct(&path, true);
    ours.write_all_at(data, 0).unwrap();
    ours.sync_all().unwrap();
    assert_eq!(written.beside(128, || 128).unwrap(), Verdict::Fine);
    // More is under way.
    assert_eq!(written.beside(100, || 200).unwrap(), Verdict::Fine);
    real::range_ioctl(&ours, real::DISCARD, 0, 1 << 16);
    assert_eq!(written.beside(256, || 256).unwrap(), Verdict::Fine);
    real::range_ioctl(&ours, real::ZERO_OUT, 0, 1 << 16);
    assert_eq!(written.beside(384, || 384).unwrap(), Verdict::Fine);
    open_direct(&below.node, true).write_all_at(&data[..4096], 8192).unwrap();
    assert_eq!(written.beside(384, || 384).unwrap(), Verdict::Beside(8));
    assert_eq!(written.beside(500, || 600).unwrap(), Verdict::Uncounted(108));
    drop(ours);
    made(splicer.take_out(&path, ID, PAUSE_MAX));
    drop(filter);
    splicer.remove_below(ID).unwrap();
}

/// What is in flight does not end in time.
#[test]
#[ignore = "needs the kernel lab: scripts/lab test splice"]
fn in_the_lab_a_slow_disk_is_not_waited_for() {
    let folder = folder();
    let mut splicer = Splicer::start(folder.path()).unwrap();
    let slow = Dm::new("slow", &format!("0 {SECTORS} delay {0} 0 0 {0} 0 2000", number("a")));
    let volume = Dm::new("v", &format!("0 {SECTORS} linear {} 0", slow.number));
    let path = volume.path();
    let old = volume.targets();
    let below = splicer.prepare(&path, ID).unwrap();
    let filter = front(&below);
    let device = Device::open(&path).unwrap();
    let in_flight = || device.in_flight().unwrap().1 > 0;
    let start = Instant::now();
    let writer = write_in_background(&path);
    until("in flight", in_flight);
    let limit = Duration::from_millis(300);
    let since = Instant::now();
    let error = splicer.insert(&path, ID, &filter.path(), limit).unwrap_err();
    println!("-- {error}");
    assert!(error.to_string().contains("longer than 300 ms"), "{error}");
    // Reads go on although the write is still there.
    open_direct(&path, false).read_exact_at(Aligned::new(4096).slice(4096), 8192).unwrap();
    let held = since.elapsed();
    assert!(start.elapsed() < Duration::from_millis(1900), "the write is over: proves nothing");
    assert!(held >= limit, "{held:?}");
    assert!(volume.has_exactly(&old));
    writer.join().unwrap();

    // The guard dies meanwhile: what waits may not change the table later on.
    let mut helper = Helper::start(&folder.path().join("helper"), &path, "as-it-is");
    let guard = helper.children().0;
    let writer = write_in_background(&path);
    until("in flight", in_flight);
    helper.order(&format!("1000 {}", filter.path().display()));
    until("the swapper", || child_of(&guard).is_some_and(|swapper| waits_in_kernel(&swapper)));
    run("kill", &["-9", &guard]);
    let answer = helper.answer();
    assert!(answer.contains("died"), "{answer}");
    assert!(!writer.is_finished(), "the write is over: proves nothing");
    assert!(volume.has_exactly(&old));
    writer.join().unwrap();
    assert!(volume.has_exactly(&old));

    made(splicer.insert(&path, ID, &filter.path(), limit));
    made(splicer.take_out(&path, ID, limit));
    drop((volume, filter));
    splicer.remove_below(ID).unwrap();
    drop(slow);
    println!("-- a slow disk: undone {} ms after the start", held.as_millis());
}

/// The process that splices, so that it can be killed: obeys lines on stdin.
struct Helper {
    process: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Helper {
    fn start(note: &Path, volume: &Path, mode: &str) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "helper", "--nocapture", "--ignored"])
            .env(HELPER, format!("{} {} {mode}", note.display(), volume.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap());
        let mut helper = Self { process, answers };
        assert_eq!(helper.answer(), "ready");
        helper
    }

    fn order(&mut self, line: &str) {
        writeln!(self.process.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// The answer after "=".
    fn answer(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "the helper ended");
            if let Some((_, answer)) = line.split_once('=') {
                return answer.trim().into();
            }
        }
    }

    fn ask(&mut self, line: &str) -> String {
        self.order(line);
        self.answer()
    }

    /// Guard and swapper.
    fn children(&self) -> (String, Option<String>) {
        let guard = child_of(&self.process.id().to_string()).expect("no guard");
        let swapper = child_of(&guard);
        (guard, swapper)
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// It is in its system call on device-mapper, not reading from its socket.
fn waits_in_kernel(pid: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/wchan")).is_ok_and(|at| at.contains("dm_"))
        || std::fs::read_to_string(format!("/proc/{pid}/syscall"))
            .is_ok_and(|call| call.starts_with(&format!("{} ", libc::SYS_ioctl)))
}

/// A process has at most one child here; any of its threads may have forked it.
fn child_of(pid: &str) -> Option<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let children = tasks.map(|task| {
        std::fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default()
    });
    children.collect::<String>().split_whitespace().next().map(String::from)
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Not a test: the process that splices.
#[test]
#[ignore = "started by the other tests"]
fn helper() {
    let Ok(order) = std::env::var(HELPER) else { return };
    let [note, volume, mode] = order.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let (note, volume) = (Path::new(note), Path::new(volume));
    let hook = if mode == "stand-still" { Hook::StandStill } else { Hook::None };
    let mut splicer = Splicer::start_with(note, hook).unwrap();
    println!("=ready");
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let said = if mode == "chroot" {
            std::os::unix::fs::chroot(&line).unwrap();
            std::env::set_current_dir("/").unwrap();
            // Its device nodes are the host's, in their place.
            splicer.prepare(volume, ID).map(|_| "prepared".to_string())
        } else {
            let (limit, through) = line.split_once(' ').unwrap();
            let limit = Duration::from_millis(limit.parse().unwrap());
            splicer
                .insert(volume, ID, Path::new(through), limit)
                .map(|change| format!("{change:?}"))
        };
        println!("={}", said.unwrap_or_else(|error| error.to_string()));
    }
}

/// A write that is held back, and how long.
fn write_in_background(path: &Path) -> std::thread::JoinHandle<Duration> {
    let path = path.to_path_buf();
    std::thread::spawn(move || {
        let start = Instant::now();
        let mut memory = Aligned::new(4096);
        open_direct(&path, true).write_all_at(memory.slice(4096), 0).unwrap();
        start.elapsed()
    })
}

#[test]
#[ignore = "needs the kernel lab: scripts/lab test splice"]
fn in_the_lab_nobodys_death_leaves_it_suspended() {
    let folder = folder();
    let note = folder.path().join("note");
    let mut splicer = Splicer::start(&folder.path().join("own")).unwrap();
    let volume = Dm::volume();
    let path = volume.path();
    let old = volume.targets();
    let below = splicer.prepare(&path, ID).unwrap();
    let filter = front(&below);
    let limit = 700;
    let order = format!("{limit} {}", filter.path().display());

    // The swapper dies between suspend and resume; nothing happens to it; its guard dies.
    for who in ["swapper", "nobody", "guard"] {
        let mut helper = Helper::start(&note, &path, "stand-still");
        let start = Instant::now();
        helper.order(&order);
        until("suspended", || volume.is_suspended());
        assert!(note.join("suspended").exists(), "nothing is noted");
        let write = write_in_background(&path);
        let (guard, swapper) = helper.children();
        let killed = Instant::now();
        match who {
            "swapper" => run("kill", &["-9", &swapper.unwrap()]),
            "guard" => run("kill", &["-9", &guard]),
            _ => String::new(),
        };
        until("resumed", || !volume.is_suspended());
        let (since_kill, total) = (killed.elapsed(), start.elapsed());
        write.join().unwrap();
        let answer = helper.answer();
        println!("-- {who} killed: resumed after {} ms; {answer}", since_kill.as_millis());
        if who == "nobody" {
            assert!(total >= Duration::from_millis(limit), "{total:?}");
            assert!(answer.contains("longer than"), "{answer}");
        } else {
            assert!(since_kill < Duration::from_millis(limit), "only by its time: {since_kill:?}");
            assert!(answer.contains("died"), "{answer}");
        }
        assert!(volume.has_exactly(&old));
        assert!(!note.join("suspended").exists());
        if who == "guard" {
            assert!(helper.ask(&order).contains("died"));
        }
    }

    // All of them at once: the guard is stopped first, so that it cannot act.
    let mut helper = Helper::start(&note, &path, "stand-still");
    helper.order(&order);
    until("suspended", || volume.is_suspended());
    let write = write_in_background(&path);
    let (guard, _) = helper.children();
    run("kill", &["-STOP", &guard]);
    helper.kill();
    run("kill", &["-9", &guard]);
    std::thread::sleep(Duration::from_millis(limit + 300));
    assert!(volume.is_suspended() && !write.is_finished(), "somebody has resumed it");
    let next = Splicer::start(&note).unwrap();
    assert_eq!(next.resumed(), ["v"]);
    write.join().unwrap();
    assert!(volume.has_exactly(&old));
    assert!(!note.join("suspended").exists());

    // A note of another device by that name is not obeyed.
    std::fs::write(note.join("suspended"), format!("{}\0LVM-x\0v\0", volume.number)).unwrap();
    run("dmsetup", &["suspend", "v"]);
    drop(next);
    let next = Splicer::start(&note).unwrap();
    assert!(next.resumed().is_empty() && volume.is_suspended());
    control().resume(volume.number).unwrap();

    drop((volume, filter));
    splicer.remove_below(ID).unwrap();
}

/// A swapper that dies while it waits for what is in flight: the kernel undoes it by itself.
#[test]
#[ignore = "needs the kernel lab: scripts/lab test splice"]
fn in_the_lab_a_swapper_killed_at_any_moment_changes_all_or_nothing() {
    let folder = folder();
    let note = folder.path().join("note");
    let mut splicer = Splicer::start(&folder.path().join("own")).unwrap();
    // Slow enough for the kill to come while it waits.
    let slow = Dm::new("slow", &format!("0 {SECTORS} delay {0} 0 0 {0} 0 20", number("a")));
    let volume = Dm::new("v", &format!("0 {SECTORS} linear {} 0", slow.number));
    let path = volume.path();
    let old = volume.targets();
    let below = splicer.prepare(&path, ID).unwrap();
    let filter = front(&below);
    let new = [Target::linear_over(filter.number, SECTORS)];
    let (mut done, mut undone) = (0, 0);
    let mut helper = Helper::start(&note, &path, "as-it-is");
    let guard = helper.children().0;
    let order = format!("1000 {}", filter.path().display());
    let seed = seed();
    let mut random = Random(seed);
    Load::during(&path, SECTORS / 8, seed, |load| {
        for _ in 0..rounds(15) {
            let wait = Duration::from_micros(random.below(120_000));
            helper.order(&order);
            let swapper = std::iter::repeat_with(|| child_of(&guard)).find_map(|child| child);
            std::thread::sleep(wait);
            // SAFETY: a signal to a process that this test has started; there are no others.
            unsafe { libc::kill(swapper.unwrap().parse().unwrap(), libc::SIGKILL) };
            let answer = helper.answer();
            assert!(!note.join("suspended").exists());
            if answer.starts_with("Made") {
                assert!(volume.has_exactly(&new));
                made(splicer.take_out(&path, ID, PAUSE_MAX));
                done += 1;
            } else {
                assert!(answer.contains("died"), "{answer}");
                undone += 1;
            }
            assert!(volume.has_exactly(&old));
        }
        load.more();
    });
    println!("-- killed at random: {done} changes made, {undone} undone, every block as written");
    drop((volume, filter, helper));
    splicer.remove_below(ID).unwrap();
    drop(slow);
}

/// LVM's own commands, on a volume that leads through the filter.
#[test]
#[ignore = "needs the kernel lab: scripts/lab test splice"]
fn in_the_lab_what_lvm_does_is_noticed() {
    let folder = folder();
    let mut splicer = Splicer::start(&folder.path().join("note")).unwrap();
    let disk = disk("b");
    let settings = "activation { udev_sync = 0 udev_rules = 0 monitoring = 0 }\n\
        global { use_lvmpolld = 0 event_activation = 0 }\n\
        devices { use_devicesfile = 0 obtain_device_list_from_udev = 0\n\
        scan = \"/dev\" external_device_info_source = \"none\" }\n";
    std::fs::write(folder.path().join("lvm.conf"), settings).unwrap();
    let lvm = |args: &str| {
        let out = Command::new("lvm")
            .args(args.split(' '))
            .env("LVM_SYSTEM_DIR", folder.path())
            .env("LVM_SUPPRESS_FD_WARNINGS", "1")
            .output()
            .unwrap();
        assert!(out.status.success(), "lvm {args}: {}", String::from_utf8_lossy(&out.stderr));
    };
    lvm(&format!("pvcreate -q -ff -y {disk}"));
    lvm(&format!("vgcreate -q vg-0 {disk}"));
    lvm("lvcreate -q -y -Zn -Wn -L 16M -n pg vg-0");
    let path = Path::new("/dev/mapper/vg--0-pg");

    let splice = |splicer: &mut Splicer| {
        let below = splicer.prepare(path, ID).unwrap();
        let filter = front(&below);
        made(splicer.insert(path, ID, &filter.path(), PAUSE_MAX));
        let through = Through::open(path, &filter.path()).unwrap().unwrap();
        (filter, through)
    };
    let (filter, mut through) = splice(&mut splicer);
    // What only looks changes nothing.
    lvm("vgs -q");
    lvm("lvs -q -a");
    lvm("vgchange -q -ay vg-0");
    assert_eq!(through.look(), Lead::Through);
    lvm("lvchange -q --refresh vg-0/pg");
    assert_eq!(through.look(), Lead::Replaced, "lvchange --refresh");
    made(splicer.insert(path, ID, &filter.path(), PAUSE_MAX));
    assert_eq!(through.look(), Lead::Replaced, "spliced again is not the same");
    let mut through = Through::open(path, &filter.path()).unwrap().unwrap();
    assert_eq!(through.look(), Lead::Through);

    // It grows: by LVM to its disks, then by us through the filter, under a writer.
    lvm("lvextend -q -L 32M vg-0/pg");
    let sectors = 32 << 11;
    assert_eq!(through.look(), Lead::Grown(sectors), "lvextend");
    assert_eq!(refused(splicer.prepare(path, ID)), Refusal::Replaced);
    assert_eq!(refused(splicer.insert(path, ID, &filter.path(), PAUSE_MAX)), Refusal::Replaced);
    let mut again = None;
    Load::during(path, sectors / 8, seed(), |load| {
        load.more();
        let below = splicer.regrow(path, ID, PAUSE_MAX).unwrap();
        assert_eq!((below.sectors, below.through), (sectors, None));
        let larger =
            Dm::new("secondsite-larger", &format!("0 {sectors} linear {} 0", below.number));
        made(splicer.insert(path, ID, &larger.path(), PAUSE_MAX));
        assert_eq!(Through::open(path, &larger.path()).unwrap().unwrap().look(), Lead::Through);
        assert_eq!(splicer.regrow(path, ID, PAUSE_MAX).unwrap().through, Some(larger.number));
        load.more();
        again = Some(larger);
    });
    drop(filter);

    // A snapshot makes it an origin: no way through the filter, and no splice.
    let larger = again.unwrap();
    let mut through = Through::open(path, &larger.path()).unwrap().unwrap();
    lvm("lvcreate -q -y -s -L 8M -n snap vg-0/pg");
    assert_eq!(through.look(), Lead::Replaced, "lvcreate -s");
    let refusal = refused(splicer.regrow(path, ID, PAUSE_MAX));
    assert!(matches!(refusal, Refusal::SharedState { .. }), "{refusal}");
    lvm("lvremove -q -y vg-0/snap");
    assert_eq!(through.look(), Lead::Replaced, "the snapshot is gone again");
    made(splicer.insert(path, ID, &larger.path(), PAUSE_MAX));

    // While LVM has its lock, nothing is changed.
    let lock = File::options().append(true).create(true).open("/run/lock/lvm/V_vg-0").unwrap();
    lock.lock().unwrap();
    let refusal = refused(splicer.take_out(path, ID, PAUSE_MAX));
    assert_eq!(refusal, Refusal::GroupLocked("vg-0".into()));
    drop(lock);

    made(splicer.take_out(path, ID, PAUSE_MAX));
    let mut through = Through::open(path, &larger.path()).unwrap();
    assert!(through.as_mut().is_none_or(|through| through.look() != Lead::Through));
    drop(larger);
    splicer.remove_below(ID).unwrap();
    lvm("lvremove -q -y vg-0/pg");
    lvm("vgremove -q vg-0");
}
