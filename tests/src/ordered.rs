//! The write order as an oracle: one writer stamps its blocks 1, 2, 3, … all over several volumes,
//! each only after the one before it was acknowledged. What the replica volumes hold at a recovery
//! point must be a prefix of them: up to some stamp every write, beyond it none, on all volumes.

use crate::load::{Aligned, Turn};
use crate::random::Random;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

/// A stamp fills a block of the file system, 4 KiB.
const BLOCK_BYTES: usize = 4096;
/// Blocks of one file.
const PLACES: u64 = 256;
/// Between two writes: short beside a last pass, or a point that is not one instant would not show.
const PAUSE: std::time::Duration = std::time::Duration::from_micros(500);
const MAGIC: &[u8; 16] = b"ordered write :)";

/// The files and what was written into them.
pub struct Ordered {
    files: Vec<PathBuf>,
    /// Place of every stamp, in order: stamp n stands at index n.
    history: Arc<Mutex<Vec<u64>>>,
}

impl Ordered {
    /// Makes a file of stamp 0 in each of `folders`, its blocks where they stay.
    pub fn new(folders: &[&Path]) -> Self {
        let files: Vec<PathBuf> = folders.iter().map(|folder| folder.join("ordered")).collect();
        let mut block = blank();
        for (number, path) in files.iter().enumerate() {
            File::create(path).expect("create");
            // On btrfs it is then written in place; the others do not know it, and do so anyway.
            let _ = Command::new("chattr").arg("+C").arg(path).output();
            let file = direct(path);
            for place in 0..PLACES {
                let all = number as u64 * PLACES + place;
                block.0[24..32].copy_from_slice(&all.to_le_bytes());
                file.write_all_at(&block.0, place * BLOCK_BYTES as u64).expect("write");
            }
            file.sync_all().expect("fsync");
        }
        Self { files, history: Arc::new(Mutex::new(vec![u64::MAX])) }
    }

    /// Goes on with the stamped writes; one writer at a time.
    pub fn writer(&self, random: &mut Random) -> Turn {
        let files: Vec<File> = self.files.iter().map(|path| direct(path)).collect();
        let (history, mut random, mut block) = (self.history.clone(), random.fork(), blank());
        Box::new(move || {
            std::thread::sleep(PAUSE);
            let all = random.below(files.len() as u64 * PLACES);
            let stamp = {
                // Noted before it is issued: the replica may see it before we return.
                let mut history = history.lock().expect("no panic");
                history.push(all);
                history.len() as u64 - 1
            };
            block.0[16..24].copy_from_slice(&stamp.to_le_bytes());
            block.0[24..32].copy_from_slice(&all.to_le_bytes());
            let offset = all % PLACES * BLOCK_BYTES as u64;
            files[(all / PLACES) as usize].write_all_at(&block.0, offset).expect("write");
            BLOCK_BYTES as u64
        })
    }

    /// Scans the images of all volumes for stamped blocks; panics unless they are a prefix of what
    /// was written; returns the last stamp.
    pub fn check(&self, images: &[PathBuf]) -> u64 {
        assert_eq!(images.len(), self.files.len(), "an image a volume");
        let mut found = vec![None; images.len() * PLACES as usize];
        let mut buffer = vec![0; 1 << 20];
        for image in images {
            let mut file = File::open(image).expect("the image");
            loop {
                let count = file.read(&mut buffer).expect("read the image");
                for block in buffer[..count].chunks(BLOCK_BYTES).filter(|b| b.starts_with(MAGIC)) {
                    let number =
                        |at| u64::from_le_bytes(block[at..at + 8].try_into().expect("8 bytes"));
                    found[number(24) as usize] = Some(number(16));
                }
                if count == 0 {
                    break;
                }
            }
        }
        let history = self.history.lock().expect("no panic");
        let last = found.iter().max().copied().flatten().expect("a stamped block");
        let mut expected = vec![Some(0); found.len()];
        for (stamp, all) in history.iter().enumerate().take(last as usize + 1).skip(1) {
            expected[*all as usize] = Some(stamp as u64);
        }
        let lost =
            expected.iter().zip(&found).filter(|(expected, found)| expected != found).count();
        assert_eq!(lost, 0, "up to write {last}, {lost} places lack their newest write");
        last
    }
}

fn blank() -> Box<Aligned<BLOCK_BYTES>> {
    let mut block = Box::new(Aligned([0; BLOCK_BYTES]));
    block.0[..16].copy_from_slice(MAGIC);
    block
}

fn direct(path: &Path) -> File {
    let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path);
    file.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
