//! The eBPF back end on real devices, compared byte for byte. Needs root.
//!
//! On some kernels completions are lost now and then before any program sees them; the audit then
//! says so. A gap is therefore printed and accepted here, a loss that the audit calls good never.

mod real;

use aya::maps::{Array, Map, MapData};
use real::{Copier, Loop, Pins, conclude, folder, write_randomly};
use secondsite_tracker::device::Device;
use secondsite_tracker::ebpf::{Audit, Ebpf, NewerPins, Options, Start};
use secondsite_tracker::marks::BlockRun;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

const DISK_BYTES: u64 = 64 << 20;
const WRITERS: u64 = 3;
const WRITE_TIME: Duration = Duration::from_secs(3);

fn attach(path: &Path, pins: &Pins) -> (Ebpf, Start) {
    let device = Device::open(path).unwrap();
    Ebpf::attach(&device, real::BLOCK as u32, &pins.0).unwrap()
}

/// Copies while random writers work, then compares. `busy`: they work when it attaches already.
fn follow(name: &str, volume: &Path, busy: bool) {
    let pins = Pins::new(name);
    let bytes = Device::open(volume).unwrap().size_bytes;
    let stop = AtomicBool::new(false);
    let fresh = || {
        let (ebpf, start) = attach(volume, &pins);
        assert_eq!(start, Start::Fresh);
        assert!(ebpf.marks().compare_due());
        ebpf
    };
    let quiet = (!busy).then(fresh);
    let (ebpf, mut copier, writes) = std::thread::scope(|scope| {
        let writers: Vec<_> = (1..=WRITERS)
            .map(|seed| {
                let stop = &stop;
                scope.spawn(move || write_randomly(volume, bytes, seed, &mut || stop.load(Relaxed)))
            })
            .collect();
        let ebpf = quiet.unwrap_or_else(fresh);
        let mut copier = Copier::new(volume, bytes);
        let start = Instant::now();
        while start.elapsed() < WRITE_TIME {
            copier.pass(&ebpf);
            ebpf.audit();
        }
        stop.store(true, Relaxed);
        let writes = writers.into_iter().map(|writer| writer.join().unwrap()).sum::<u64>();
        (ebpf, copier, writes)
    });
    assert!(writes > 100, "{name}: only {writes} writes");
    conclude(&format!("{name}, {writes} writes"), &ebpf, &mut copier);
    ebpf.detach().unwrap();
    assert!(!pins.0.exists());
}

#[test]
fn a_loop_device_is_followed() {
    let folder = folder();
    let disk = Loop::sized(folder.path(), DISK_BYTES);
    follow("loop", &disk.path, true);
}

/// A partition that starts at a sector that no block is aligned to. Made by ioctl: the kernel need
/// not know any kind of partition table.
fn with_partition(folder: &Path) -> Loop {
    let disk = Loop::sized(folder, DISK_BYTES);
    let sectors = (DISK_BYTES / 2 / 512).to_string();
    real::run("addpart", &[disk.path.to_str().unwrap(), "1", "2049", &sectors]);
    disk
}

#[test]
fn a_partition_is_followed_also_when_its_disk_is_written() {
    let folder = folder();
    let disk = with_partition(folder.path());
    let partition = format!("{}p1", disk.path.display());
    let device = Device::open(Path::new(&partition)).unwrap();
    assert_eq!(device.disk.2, disk.path);
    assert_eq!(device.disk_offset_bytes, 2049 * 512);
    assert_eq!(device.size_bytes, DISK_BYTES / 2);
    follow("partition", Path::new(&partition), false);

    let pins = Pins::new("beside");
    let (ebpf, _) = attach(Path::new(&partition), &pins);
    let whole = real::open_direct(&disk.path, true);
    let mut memory = real::Aligned::new(1 << 20);
    // Around the partition's start: its first block alone; beyond its end: nothing.
    whole.write_all_at(memory.slice(4096), 2048 * 512).unwrap();
    whole.write_all_at(memory.slice(4096), DISK_BYTES - 4096).unwrap();
    let mut runs = Vec::new();
    ebpf.marks().begin(1, [1; 16]);
    ebpf.marks().take(u64::MAX, &mut runs);
    assert_eq!(runs, [BlockRun { first: 0, count: 1 }]);
    ebpf.detach().unwrap();
}

/// A zram disk of our own: its bios never become requests.
struct Zram(String);

impl Drop for Zram {
    fn drop(&mut self) {
        let _ = std::fs::write(format!("/sys/block/zram{}/reset", self.0), "1");
        let _ = std::fs::write("/sys/class/zram-control/hot_remove", &self.0);
    }
}

#[test]
fn a_bio_based_device_is_followed() {
    let number = std::fs::read_to_string("/sys/class/zram-control/hot_add").unwrap();
    let zram = Zram(number.trim().into());
    let size = format!("/sys/block/zram{}/disksize", zram.0);
    std::fs::write(size, DISK_BYTES.to_string()).unwrap();
    follow("zram", Path::new(&format!("/dev/zram{}", zram.0)), false);
}

/// A device that is given, whole: the kernel lab has kinds of them that few machines have.
#[test]
#[ignore = "in the kernel lab: scripts/lab test"]
fn in_the_lab_a_given_device_is_followed() {
    let path = std::env::var("SECONDSITE_LAB_DEVICE").expect("SECONDSITE_LAB_DEVICE: its path");
    let path = Path::new(&path);
    // Only what has requests can be attached to while it never pauses.
    let name = path.file_name().unwrap().to_str().unwrap();
    follow(name, path, Path::new("/sys/class/block").join(name).join("mq").exists());
}

/// Names of the pins, and the words of the header.
fn pinned(dir: &Path) -> (Vec<String>, Vec<u64>) {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let header = header(dir);
    (names, (0..header.len()).map(|word| header.get(&word, 0).unwrap()).collect())
}

fn header(dir: &Path) -> Array<MapData, u64> {
    let map = MapData::from_pin(dir.join("header")).unwrap();
    Array::try_from(Map::from_map_data(map).unwrap()).unwrap()
}

/// What a newer version pinned is neither adopted nor removed, and goes on marking.
#[test]
fn newer_pins_are_left_alone() {
    let folder = folder();
    let disk = Loop::sized(folder.path(), DISK_BYTES);
    let pins = Pins::new("newer");
    let (ebpf, _) = attach(&disk.path, &pins);
    ebpf.marks().set_compare_due(false);
    drop(ebpf);
    let ours = u64::from_le_bytes(*b"SSMARK\x03\0");
    let newer = u64::from_le_bytes(*b"SSMARK\x04\0");
    assert_eq!(header(&pins.0).get(&0, 0).unwrap(), ours);
    header(&pins.0).set(0, newer, 0).unwrap();
    let before = pinned(&pins.0);
    let expected = [
        "bitmaps",
        "counters",
        "header",
        "link_bio0",
        "link_bio1",
        "link_issue",
        "link_queue0",
        "link_queue1",
        "link_request0",
        "link_request1",
        "link_requeue",
        "live0",
        "prog_bio0",
        "prog_bio1",
        "prog_issue",
        "prog_queue0",
        "prog_queue1",
        "prog_request0",
        "prog_request1",
        "prog_requeue",
        "slots",
        "summary0",
        "taken0",
    ];
    assert_eq!(before.0, expected, "the names of the pins are part of their layout");

    let device = Device::open(&disk.path).unwrap();
    let error = Ebpf::attach(&device, real::BLOCK as u32, &pins.0).err().unwrap().to_string();
    let remedy = format!("rm -r {}", pins.0.display());
    for part in ["newer Secondsite", "version 4", "up to 3", &remedy] {
        assert!(error.contains(part), "no {part:?} in: {error}");
    }
    let error = Ebpf::remove_pins(&pins.0).unwrap_err();
    let typed = error.get_ref().and_then(|error| error.downcast_ref::<NewerPins>()).unwrap();
    assert_eq!((typed.found, typed.known), (4, 3));
    assert_eq!(pinned(&pins.0), before, "newer pins were changed");

    // The newer version comes back and finds everything, also what was written meanwhile.
    header(&pins.0).set(0, ours, 0).unwrap();
    let whole = real::open_direct(&disk.path, true);
    whole.write_all_at(real::Aligned::new(4096).slice(4096), 8192).unwrap();
    let (ebpf, start) = attach(&disk.path, &pins);
    assert_eq!(start, Start::Adopted);
    assert!(!ebpf.marks().compare_due());
    assert!(ebpf.marks().holds(BlockRun { first: 2, count: 1 }));

    // A state that no version wrote is not adopted either.
    drop(ebpf);
    for slot in [8 + 3, 16 + 3] {
        header(&pins.0).set(slot, 4, 0).unwrap();
    }
    let (ebpf, start) = attach(&disk.path, &pins);
    assert_eq!(start, Start::Fresh);
    ebpf.detach().unwrap();
    // The remedy, as it is typed.
    let (ebpf, _) = attach(&disk.path, &pins);
    drop(ebpf);
    header(&pins.0).set(0, newer, 0).unwrap();
    real::run("rm", &["-r", pins.0.to_str().unwrap()]);
    assert!(!pins.0.exists());
}

#[test]
fn a_restart_adopts_what_went_on_marking() {
    let folder = folder();
    let disk = Loop::sized(folder.path(), DISK_BYTES);
    let pins = Pins::new("restart");
    // Killed: nothing of it is told to stop.
    let (first, start) = attach(&disk.path, &pins);
    assert_eq!(start, Start::Fresh);
    first.marks().set_compare_due(false);
    let mut copier = Copier::new(&disk.path, DISK_BYTES);
    copier.pass(&first);
    first.marks().begin(77, [7; 16]);
    drop(first);

    let mut writes = 0;
    write_randomly(&disk.path, DISK_BYTES, 5, &mut || {
        writes += 1;
        writes > 2000
    });
    let (second, start) = attach(&disk.path, &pins);
    assert_eq!(start, Start::Adopted);
    assert!(!second.marks().compare_due());
    assert_eq!(second.marks().cut().epoch, 77);
    assert!(second.marks().cut().stands);
    second.marks().give_up();
    conclude("restart", &second, &mut copier);
    assert!(copier.taken > 1000);
    drop(second);

    // Another block size, and then another disk under the same number: never adopted.
    let device = Device::open(&disk.path).unwrap();
    let (other, start) = Ebpf::attach(&device, 16384, &pins.0).unwrap();
    assert_eq!(start, Start::Fresh);
    drop(other);
    let path = disk.path.clone();
    let old = Ebpf::attach(&device, 16384, &pins.0).unwrap();
    assert_eq!(old.1, Start::Adopted);
    drop((disk, copier));
    let backing = folder.path().join("disk");
    real::run("losetup", &[path.to_str().unwrap(), backing.to_str().unwrap()]);
    let _again = Loop { path: path.clone() };
    assert!(matches!(old.0.audit(), Audit::Gap(_)), "another disk under the same number");
    drop(old);
    let device = Device::open(&path).unwrap();
    let (fresh, start) = Ebpf::attach(&device, 16384, &pins.0).unwrap();
    assert_eq!(start, Start::Fresh);
    assert!(fresh.marks().compare_due());
    // A set that is not whole is not adopted either.
    drop(fresh);
    std::fs::remove_file(pins.0.join("link_request1")).unwrap();
    assert_eq!(Ebpf::attach(&device, 16384, &pins.0).unwrap().1, Start::Fresh);
}

#[test]
fn ranges_are_marked_whole_and_the_audit_sees_them() {
    let folder = folder();
    let disk = Loop::sized(folder.path(), DISK_BYTES);
    let pins = Pins::new("ranges");
    let (ebpf, _) = attach(&disk.path, &pins);
    let device = real::open_direct(&disk.path, true);
    real::range_ioctl(&device, real::DISCARD, 1 << 20, 30 << 20);
    real::range_ioctl(&device, real::ZERO_OUT, 40 << 20, 20 << 20);
    let (mut runs, block) = (Vec::new(), real::BLOCK);
    ebpf.marks().begin(1, [1; 16]);
    ebpf.marks().take(u64::MAX, &mut runs);
    let wanted = [(1u64 << 20, 30u64 << 20), (40 << 20, 20 << 20)];
    let wanted = wanted.map(|(at, size)| BlockRun { first: at / block, count: size / block });
    assert_eq!(runs, wanted);
    println!("ranges: {:?}", real::settled_audit(&ebpf));

    // The kernel stops counting: no proof is left.
    let name = disk.path.file_name().unwrap().to_str().unwrap();
    std::fs::write(format!("/sys/block/{name}/queue/iostats"), "0").unwrap();
    assert!(matches!(ebpf.audit(), Audit::Gap(text) if text.contains("iostats")));
    real::range_ioctl(&device, real::ZERO_OUT, 0, 1 << 20);
    std::fs::write(format!("/sys/block/{name}/queue/iostats"), "1").unwrap();
    assert!(matches!(real::settled_audit(&ebpf), Audit::Gap(_)), "uncounted writes");
    ebpf.rebase().unwrap();
    assert_eq!(real::settled_audit(&ebpf), Audit::Good);
}

/// Of a completion that no program saw, the request is remembered: it is marked and counted when it
/// is issued again, else when the audit finds it.
#[test]
fn a_completion_that_no_program_saw_is_made_up_for() {
    const SLOT: u32 = 5;
    const DONE: u32 = 2;
    let folder = folder();
    let disk = Loop::sized(folder.path(), DISK_BYTES);
    let pins = Pins::new("unseen");
    let (ebpf, _) = attach(&disk.path, &pins);
    assert_eq!(real::settled_audit(&ebpf), Audit::Good);
    let map = |name: &str| Map::from_map_data(MapData::from_pin(pins.0.join(name)).unwrap());
    let mut slots: Array<MapData, [u64; 4]> = Array::try_from(map("slots").unwrap()).unwrap();
    let mut counters: Array<MapData, u64> = Array::try_from(map("counters").unwrap()).unwrap();
    let mut unseen = |slot: u32, sector: u64, remembered: bool| {
        // As if its completion had reached no program: not counted, and still in its slot.
        for copy in [0, 16] {
            let done = counters.get(&(DONE + copy), 0).unwrap();
            counters.set(DONE + copy, done.wrapping_sub(16), 0).unwrap();
        }
        if remembered {
            slots.set(slot, [sector, 8192 | 1 << 32, 16, 16], 0).unwrap();
        }
    };
    let taken = |ebpf: &Ebpf| {
        let mut runs = Vec::new();
        ebpf.marks().take(u64::MAX, &mut runs);
        runs
    };
    ebpf.marks().begin(1, [1; 16]);

    unseen(SLOT, 80, true);
    assert_eq!(real::settled_audit(&ebpf), Audit::Good);
    assert_eq!(taken(&ebpf), [BlockRun { first: 10, count: 2 }], "marked by the audit");

    // All slots, so that the next write is issued in one of them, whichever it is.
    let device = real::open_direct(&disk.path, true);
    let depth = slots_of(&pins.0);
    (0..depth).for_each(|slot| unseen(slot, 160 + u64::from(slot) * 16, true));
    device.write_all_at(real::Aligned::new(4096).slice(4096), 0).unwrap();
    let marked = taken(&ebpf);
    assert_eq!(marked.len(), 2, "its own block, and what was remembered there: {marked:?}");
    assert_eq!(real::settled_audit(&ebpf), Audit::Good);
    assert_eq!(taken(&ebpf).iter().map(|run| run.count).sum::<u64>(), u64::from(depth - 1) * 2);

    unseen(SLOT, 80, false);
    assert!(matches!(real::settled_audit(&ebpf), Audit::Gap(_)), "not remembered: a gap");
    ebpf.detach().unwrap();
}

fn slots_of(dir: &Path) -> u32 {
    MapData::from_pin(dir.join("slots")).unwrap().info().unwrap().max_entries()
}

/// A disk in a file of a file system that can be frozen: its writes then stay in flight.
struct Stalling {
    upper: Option<Loop>,
    mount: std::path::PathBuf,
    _lower: Loop,
}

impl Stalling {
    fn new(folder: &Path) -> Self {
        let lower = Loop::sized(folder, DISK_BYTES);
        let mount = folder.join("mount");
        std::fs::create_dir(&mount).unwrap();
        real::run("mkfs.ext4", &["-q", lower.path.to_str().unwrap()]);
        real::run("mount", &[lower.path.to_str().unwrap(), mount.to_str().unwrap()]);
        let mut stalling = Self { upper: None, mount, _lower: lower };
        stalling.upper = Some(Loop::sized(&stalling.mount, 1 << 20));
        stalling
    }

    fn fsfreeze(&self, option: &str) {
        real::run("fsfreeze", &[option, self.mount.to_str().unwrap()]);
    }
}

impl Drop for Stalling {
    fn drop(&mut self) {
        let run = |program: &str, option: &str| {
            let _ = std::process::Command::new(program).arg(option).arg(&self.mount).output();
        };
        run("fsfreeze", "-u");
        drop(self.upper.take());
        // The loop device lets go of its file a moment later.
        run("umount", "-l");
    }
}

/// A block is taken and read while a write to it is in flight. Whether its mark at completion is
/// there decides over the update; that it was in flight must not be called exact.
#[test]
fn a_write_in_flight_is_marked_again_when_it_completes() {
    for completion_marks in [true, false] {
        let folder = folder();
        let disk = Stalling::new(folder.path());
        let path = disk.upper.as_ref().unwrap().path.clone();
        let pins = Pins::new("in-flight");
        let device = Device::open(&path).unwrap();
        let options = Options { completion_marks };
        let ebpf = Ebpf::attach_with(&device, real::BLOCK as u32, &pins.0, options).unwrap().0;
        let mut copier = Copier::new(&path, 1 << 20);

        disk.fsfreeze("-f");
        let writer = std::thread::spawn(move || {
            let mut memory = real::Aligned::new(4096);
            memory.slice(4096).fill(0xab);
            real::open_direct(&path, true).write_all_at(memory.slice(4096), 5 * 4096).unwrap();
        });
        let start = Instant::now();
        while device.in_flight().unwrap().1 == 0 {
            assert!(start.elapsed() < WRITE_TIME, "the write was never queued");
            std::thread::yield_now();
        }
        // Taken, but not read: the loop device would make the read wait behind the write. The copy
        // has what it would find, the old data.
        let (marks, mut runs) = (ebpf.marks(), Vec::new());
        marks.begin(1, [1; 16]);
        assert_eq!(marks.take(u64::MAX, &mut runs), 1);
        assert!(marks.committed([1; 16]));
        // Nothing is marked now: only the audit knows better.
        assert!(ebpf.marks().live_is_clear());
        assert_eq!(ebpf.audit(), Audit::Busy);
        disk.fsfreeze("-u");
        writer.join().unwrap();

        let audit = real::settled_audit(&ebpf);
        let marked = !ebpf.marks().live_is_clear();
        println!("in flight: completion marks {completion_marks}, marked {marked}, {audit:?}");
        if audit == Audit::Good {
            assert_eq!(marked, completion_marks);
            copier.pass(&ebpf);
            assert_eq!(copier.differing().len(), usize::from(!completion_marks));
        }
        drop(copier);
        ebpf.detach().unwrap();
    }
}
