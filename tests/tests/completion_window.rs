//! A write that is still on its way when its block is taken and read must be marked again when it
//! completes. nbdkit's delay filter under the loop device widens that window to tens of
//! milliseconds: with marks at queue only, every run loses updates; with both, none does.

use secondsite_tests::block::COMPARE_BYTES;
use secondsite_tests::faulty::slow_device;
use secondsite_tests::load::{Aligned, Load};
use secondsite_tests::random::Random;
use secondsite_tracker::device::Device;
use secondsite_tracker::ebpf::{Audit, Ebpf, Options};
use secondsite_tracker::marks::{BlockRun, Marks};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const RUNS: u32 = 10;
const VOLUME_BYTES: u64 = 16 << 20;
const DELAY: Duration = Duration::from_millis(30);
/// Writes in flight; fewer than the connections that carry them.
const WRITERS: usize = 6;
/// Enough that some blocks are written last while a copy looks at them.
const WRITTEN_BYTES: u64 = 100 * COMPARE_BYTES as u64;

struct Run {
    differing_blocks: usize,
    gap: Option<String>,
}

#[test]
fn marks_at_queue_alone_lose_updates_in_every_run() {
    let mut random = Random::printed("completion_window, without completion marks");
    let runs: Vec<Run> = (0..RUNS).map(|_| follow(false, &mut random)).collect();
    let lossy = runs.iter().filter(|run| run.differing_blocks > 0).count();
    let blocks: Vec<usize> = runs.iter().map(|run| run.differing_blocks).collect();
    eprintln!("without completion marks: {lossy} of {RUNS} runs lost updates, blocks: {blocks:?}");
    assert_eq!(lossy, RUNS as usize, "the window was not widened: {blocks:?}");
}

#[test]
fn marks_at_queue_and_completion_lose_nothing() {
    let mut random = Random::printed("completion_window, with completion marks");
    let runs: Vec<Run> = (0..RUNS).map(|_| follow(true, &mut random)).collect();
    // The kernel may skip a program; the audit has to see it, and the answer to it is a compare.
    let gaps: Vec<&String> = runs.iter().filter_map(|run| run.gap.as_ref()).collect();
    eprintln!("with completion marks: {} of {RUNS} runs ended in a compare: {gaps:?}", gaps.len());
    for run in runs.iter().filter(|run| run.gap.is_none()) {
        assert_eq!(run.differing_blocks, 0, "an update was lost and the audit did not see it");
    }
    assert!(gaps.len() < RUNS as usize, "no run was free of doubt");
}

/// Follows a busy device by take and copy until its writers stop, then once more; says how many
/// blocks of the copy differ.
fn follow(completion_marks: bool, random: &mut Random) -> Run {
    let dir = tempfile::tempdir().expect("a folder");
    let slow = slow_device(dir.path(), VOLUME_BYTES, DELAY);
    let path = slow.path();
    let device = Device::open(path).expect("a device");
    let pins = Pins::new();
    let options = Options { completion_marks };
    let (tracker, _) = Ebpf::attach_with(&device, COMPARE_BYTES as u32, pins.path(), options)
        .expect("the tracker attaches");
    let reader = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path);
    let reader = reader.expect("the device");
    let mut copy = vec![0; VOLUME_BYTES as usize];
    read(&reader, BlockRun { first: 0, count: VOLUME_BYTES / COMPARE_BYTES as u64 }, &mut copy);

    let load = Load::raw(path, VOLUME_BYTES, WRITERS, random);
    let mut epoch = 0;
    while load.written() < WRITTEN_BYTES {
        take_and_copy(tracker.marks(), &mut epoch, &reader, &mut copy);
    }
    load.stop();
    while take_and_copy(tracker.marks(), &mut epoch, &reader, &mut copy) > 0 {}

    let gap = match tracker.audit() {
        Audit::Gap(why) => Some(why),
        Audit::Good | Audit::Busy | Audit::Resized => None,
    };
    let mut now = vec![0; VOLUME_BYTES as usize];
    read(&reader, BlockRun { first: 0, count: VOLUME_BYTES / COMPARE_BYTES as u64 }, &mut now);
    let blocks = now.chunks(COMPARE_BYTES).zip(copy.chunks(COMPARE_BYTES));
    let differing_blocks = blocks.filter(|(now, copy)| now != copy).count();
    tracker.detach().expect("the tracker detaches");
    Run { differing_blocks, gap }
}

fn take_and_copy(marks: &Marks, epoch: &mut u64, reader: &File, copy: &mut [u8]) -> u64 {
    *epoch += 1;
    let mut cut_id = [0xee; 16];
    cut_id[..8].copy_from_slice(&epoch.to_le_bytes());
    marks.begin(*epoch, cut_id);
    let mut runs = Vec::new();
    let taken = marks.take(u64::MAX, &mut runs);
    for run in runs {
        read(reader, run, copy);
    }
    assert!(marks.committed(cut_id), "our own cut stands");
    taken
}

fn read(reader: &File, run: BlockRun, copy: &mut [u8]) {
    let mut block = Box::new(Aligned([0; COMPARE_BYTES]));
    for index in run.first..run.first + run.count {
        let at = index as usize * COMPARE_BYTES;
        reader.read_exact_at(&mut block.0, at as u64).expect("read the device");
        copy[at..at + COMPARE_BYTES].copy_from_slice(&block.0);
    }
}

/// A folder for pins of our own, emptied when dropped.
struct Pins(PathBuf);

impl Pins {
    fn new() -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let own = format!("test-{}-{number}", std::process::id());
        Self(Path::new("/sys/fs/bpf/secondsite").join(own).join("window"))
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.0.parent().expect("its parent"));
    }
}
