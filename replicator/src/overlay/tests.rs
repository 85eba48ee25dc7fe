//! The overlay against a plain vector: random operations, reopened at random moments.

use super::{Overlay, OverlayError};
use crate::nbd::{Device, Run, Zeroing};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

const OF: [u8; 32] = [7; 32];

/// A volume of bytes; a run of 64 KiB that is zero is a hole.
struct Fixed(Vec<u8>);

impl Device for Fixed {
    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.copy_from_slice(&self.0[offset as usize..][..buffer.len()]);
        Ok(())
    }

    fn extents(&self, offset: u64, bytes: u64, limit: usize) -> io::Result<Vec<Run>> {
        let range = &self.0[offset as usize..][..bytes as usize];
        let to_edge = (65536 - offset as usize % 65536).min(range.len());
        let (first, rest) = range.split_at(to_edge);
        let runs = std::iter::once(first).chain(rest.chunks(65536));
        let run =
            |run: &[u8]| Run { bytes: run.len() as u64, hole: run.iter().all(|byte| *byte == 0) };
        Ok(runs.take(limit).map(run).collect())
    }
}

/// One whose content takes a moment.
struct Far(Fixed);

impl Device for Far {
    fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        std::thread::sleep(Duration::from_micros(200));
        self.0.read_at(offset, buffer)
    }

    fn extents(&self, offset: u64, bytes: u64, limit: usize) -> io::Result<Vec<Run>> {
        self.0.extents(offset, bytes, limit)
    }
}

/// A volume of zeros, of any size.
struct Nothing(u64);

impl Device for Nothing {
    fn bytes(&self) -> u64 {
        self.0
    }

    fn read_at(&self, _offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        Ok(())
    }

    fn extents(&self, _offset: u64, bytes: u64, _limit: usize) -> io::Result<Vec<Run>> {
        Ok(vec![Run { bytes, hole: true }])
    }
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    /// A range of bytes; half of them begin and end with a block, some are long.
    fn range(&mut self, bytes: u64) -> (u64, u64) {
        let unit = [1, 512, 4096, 4096][self.below(4) as usize];
        let offset = self.below(bytes / unit) * unit;
        let most = if self.below(8) == 0 { bytes } else { 20_000 };
        let length = (1 + self.below(most / unit)) * unit;
        (offset, length.min(bytes - offset))
    }
}

fn open(folder: &Path, base: &Arc<dyn Device>) -> Overlay {
    Overlay::open(folder, base.clone(), &OF, u64::MAX).unwrap()
}

fn same(overlay: &Overlay, model: &[u8]) {
    let mut content = vec![0xaa; model.len()];
    overlay.read_at(0, &mut content).unwrap();
    let differs = content.iter().zip(model).position(|(a, b)| a != b);
    assert_eq!(differs, None, "the first byte that differs");
}

#[test]
fn reads_as_a_vector_would_whatever_is_done_to_it() {
    let long = std::env::var_os("SECONDSITE_LONG").is_some_and(|value| !value.is_empty());
    let seed = std::env::var("SECONDSITE_SEED").map_or_else(
        |_| std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64,
        |seed| seed.parse().unwrap(),
    );
    eprintln!("SECONDSITE_SEED={seed}");
    for round in 0..if long { 200 } else { 6 } {
        let random = &mut Random(seed.wrapping_add(round));
        let dir = tempfile::tempdir().unwrap();
        // Two regions and a bit, the last block a part of one.
        let bytes = (9 << 20) + [0, 512, 4095][random.below(3) as usize];
        let mut model: Vec<u8> = (0..bytes).map(|at| (at / 911 % 251) as u8).collect();
        for _ in 0..20 {
            let at = random.below(bytes / 65536) as usize * 65536;
            model[at..at + 65536].fill(0);
        }
        let base: Arc<dyn Device> = Arc::new(Fixed(model.clone()));
        let mut overlay = open(dir.path(), &base);
        for step in 0..400 {
            let (offset, length) = random.range(bytes);
            let part = &mut model[offset as usize..(offset + length) as usize];
            match random.below(10) {
                0..5 => {
                    let byte = random.below(255) as u8 + 1;
                    part.fill(byte);
                    overlay.write_at(offset, part).unwrap();
                }
                5 | 6 => {
                    let how = Zeroing { no_hole: random.below(2) == 0, fast: false };
                    overlay.zero(offset, length, how).unwrap();
                    part.fill(0);
                }
                7 => {
                    overlay.trim(offset, length).unwrap();
                    // What a trim leaves is open: whatever it is, it stays.
                    overlay.read_at(offset, part).unwrap();
                }
                8 => {
                    let mut read = vec![0; part.len()];
                    overlay.read_at(offset, &mut read).unwrap();
                    assert!(read == part, "round {round}, step {step}");
                }
                _ => {
                    // Nothing is flushed: it is as after a kill.
                    drop(overlay);
                    overlay = open(dir.path(), &base);
                }
            }
            if step % 50 == 0 {
                check_extents(&overlay, &model, random);
                same(&overlay, &model);
            }
        }
        overlay.flush().unwrap();
        same(&overlay, &model);
        // What it believes to use is what the file system says, whose own needs are a few blocks.
        let held = dir.path().join("scratch").metadata().unwrap().blocks() * 512;
        let used = open_after(overlay, dir.path(), &base).used_bytes();
        assert!((used..used + (64 << 10)).contains(&held), "{used} of {held}");
    }
}

fn open_after(overlay: Overlay, folder: &Path, base: &Arc<dyn Device>) -> Overlay {
    let used = overlay.used_bytes();
    drop(overlay);
    let overlay = open(folder, base);
    assert_eq!(overlay.used_bytes(), used);
    overlay
}

/// Runs cover the range, alternate, and what is a hole reads as zero.
fn check_extents(overlay: &Overlay, model: &[u8], random: &mut Random) {
    let (offset, length) = random.range(model.len() as u64);
    let limit = 1 + random.below(20) as usize;
    let runs = overlay.extents(offset, length, limit).unwrap();
    assert!(!runs.is_empty() && runs.len() <= limit);
    let mut at = offset;
    for run in &runs {
        assert!(run.bytes > 0);
        let part = &model[at as usize..(at + run.bytes) as usize];
        assert!(!run.hole || part.iter().all(|byte| *byte == 0), "a hole at {at}");
        at += run.bytes;
    }
    assert!(at == offset + length || at < offset + length && runs.len() == limit);
    assert!(runs.windows(2).all(|two| two[0].hole != two[1].hole));
}

#[test]
fn a_volume_of_a_tebibyte_opens_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let base: Arc<dyn Device> = Arc::new(Nothing(1 << 40));
    let overlay = open(dir.path(), &base);
    for gibibyte in 0..1024 {
        overlay.write_at(gibibyte << 30, b"here").unwrap();
    }
    drop(overlay);
    let start = Instant::now();
    let overlay = open(dir.path(), &base);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert_eq!(overlay.used_bytes(), 1024 * 4096);
    let mut four = [0; 4];
    overlay.read_at(1023 << 30, &mut four).unwrap();
    assert_eq!(&four, b"here");
    // All of it discarded, in requests as large as the protocol has them.
    for part in 0..512 {
        overlay.trim(part << 31, 1 << 31).unwrap();
    }
    assert_eq!(overlay.used_bytes(), 0);
    overlay.read_at(1023 << 30, &mut four).unwrap();
    assert_eq!(four, [0; 4]);
}

#[test]
fn the_limit_is_a_full_disk_to_who_writes_beyond_it_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let base: Arc<dyn Device> = Arc::new(Fixed(vec![3; 1 << 20]));
    let overlay = Overlay::open(dir.path(), base.clone(), &OF, 8 * 4096).unwrap();
    overlay.write_at(100, &[1; 7 * 4096]).unwrap();
    let full = overlay.write_at(64 << 10, &[2; 4096]).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    // What is there is written again, also when only a part of it is.
    overlay.write_at(0, &[4; 8 * 4096]).unwrap();
    let mut after = [0; 4096];
    overlay.read_at(64 << 10, &mut after).unwrap();
    assert_eq!(after, [3; 4096], "as in the base");
    overlay.trim(0, 4096).unwrap();
    overlay.write_at(64 << 10, &[2; 4096]).unwrap();
    // Zeros need no room, but for a part of a block.
    overlay.zero(128 << 10, 64 << 10, Zeroing::default()).unwrap();
    let full = overlay.zero((256 << 10) + 512, 512, Zeroing::default()).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(overlay.used_bytes(), 8 * 4096);
}

#[test]
fn opens_over_its_own_base_once_and_is_thrown_away() {
    let dir = tempfile::tempdir().unwrap();
    let base: Arc<dyn Device> = Arc::new(Nothing(1 << 20));
    let again = |base: &Arc<dyn Device>, of: &[u8; 32]| {
        Overlay::open(dir.path(), base.clone(), of, u64::MAX).map(drop)
    };
    let overlay = open(dir.path(), &base);
    assert!(matches!(again(&base, &OF), Err(OverlayError::InUse(_))));
    overlay.write_at(0, b"here").unwrap();
    drop(overlay);
    assert!(matches!(again(&base, &[8; 32]), Err(OverlayError::Other(_))));
    let larger: Arc<dyn Device> = Arc::new(Nothing(2 << 20));
    assert!(matches!(again(&larger, &OF), Err(OverlayError::Other(_))));
    Overlay::remove(dir.path()).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let overlay = open(dir.path(), &base);
    let mut four = [1; 4];
    overlay.read_at(0, &mut four).unwrap();
    assert_eq!((four, overlay.used_bytes()), ([0; 4], 0));
}

#[test]
fn parts_of_one_block_from_many_threads_are_all_there() {
    let dir = tempfile::tempdir().unwrap();
    let base: Arc<dyn Device> = Arc::new(Far(Fixed(vec![9; 1 << 20])));
    let overlay = open(dir.path(), &base);
    let together = Barrier::new(8);
    std::thread::scope(|scope| {
        for thread in 0..8u8 {
            let (overlay, together) = (&overlay, &together);
            scope.spawn(move || {
                for block in 0..256 {
                    together.wait();
                    let offset = block * 4096 + u64::from(thread) * 512;
                    overlay.write_at(offset, &[thread; 512]).unwrap();
                }
            });
        }
    });
    let model: Vec<u8> = (0..1 << 20).map(|at| (at / 512 % 8) as u8).collect();
    same(&overlay, &model);
}

#[test]
fn its_map_is_as_documented() {
    let dir = tempfile::tempdir().unwrap();
    let base: Arc<dyn Device> = Arc::new(Nothing(10 * 4096 + 1));
    let overlay = open(dir.path(), &base);
    overlay.write_at(4096, &[1; 4096]).unwrap();
    overlay.zero(5 * 4096, 2 * 4096, Zeroing::default()).unwrap();
    overlay.write_at(10 * 4096, &[1]).unwrap();
    let found = std::fs::read(dir.path().join("scratch.map")).unwrap();
    let mut header = b"2ndScrMp".to_vec();
    header.extend([1, 0, 0, 0, 0, 0x10, 0, 0, 1, 0xa0, 0, 0, 0, 0, 0, 0]);
    header.extend(OF);
    assert_eq!(found[..56], header);
    assert!(found[56..4096].iter().all(|byte| *byte == 0));
    assert_eq!(found[4096..], [0b0000_0100, 0b0010_1000, 0b0001_0000]);
}
