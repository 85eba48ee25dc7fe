//! The segment files of one volume, by number, opened when first read.
//!
//! Invariants: a segment that is no longer needed is taken out of here, and its file goes when the
//! last reader has let go of it; a crash in between leaves the file, and opening removes it.
//! Journal segments count from 1; those that thinning writes have [`KEPT`] set, and lie in another
//! folder.

use super::disk::{Disk, DiskFile};
use super::journal::{FOLDER, HeaderError, SEGMENT_HEADER_BYTES, VERSION, segment_header};
use secondsite_format::ids::VolumeId;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// Folder of runs, and of the segments that thinning writes.
pub const HISTORY: &str = "history";
/// Set in the numbers of segments that thinning wrote.
pub const KEPT: u64 = 1 << 31;

/// A segment.
pub struct Segment {
    /// Its number.
    pub number: u64,
    disk: Arc<dyn Disk>,
    file: OnceLock<Arc<dyn DiskFile>>,
    doomed: AtomicBool,
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Segment({})", self.number)
    }
}

impl Segment {
    /// Its name below the volume's folder.
    pub fn name(number: u64) -> String {
        match number & KEPT {
            0 => format!("{FOLDER}/{number:08}.seg"),
            _ => format!("{HISTORY}/{:08}.seg", number & !KEPT),
        }
    }

    /// The number in a file's name.
    pub fn number(file_name: &str) -> Option<u64> {
        let digits = file_name.strip_suffix(".seg")?;
        if digits.len() < 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        digits.parse().ok().filter(|number| *number < KEPT)
    }

    /// The file.
    pub fn file(&self) -> io::Result<&dyn DiskFile> {
        if let Some(file) = self.file.get() {
            return Ok(&**file);
        }
        let opened = self.disk.open(&Self::name(self.number))?;
        Ok(&**self.file.get_or_init(|| opened))
    }

    /// Whether the header is whole and of this volume; a newer version is an error.
    pub fn check_header(&self, volume: VolumeId) -> Result<bool, HeaderError> {
        let mut found = [0; SEGMENT_HEADER_BYTES as usize];
        let file = self.file()?;
        if file.bytes()? < SEGMENT_HEADER_BYTES {
            return Ok(false);
        }
        file.read_at(0, &mut found)?;
        let expected = segment_header(volume, self.number);
        let version = u16::from_le_bytes([found[4], found[5]]);
        if found[..4] == expected[..4] && version > VERSION {
            return Err(HeaderError::Newer { found: version });
        }
        Ok(found == expected)
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // Not while something else unwinds: the file stays until the volume is opened again.
        if *self.doomed.get_mut() && !std::thread::panicking() {
            remove(&*self.disk, &Self::name(self.number));
        }
    }
}

/// Takes a file's name away. What stays is removed when the volume is opened again.
pub(super) fn remove(disk: &dyn Disk, name: &str) {
    if let Err(error) = disk.remove(name) {
        tracing::warn!("removing {}: {error}", disk.path(name).display());
    }
}

/// See the module.
pub struct Segments {
    disk: Arc<dyn Disk>,
    known: Mutex<BTreeMap<u64, Arc<Segment>>>,
    /// The highest number of thinning so far: a number is never used twice, because a reader may
    /// still hold what had it.
    newest_kept: AtomicU64,
}

impl Segments {
    /// None is known yet.
    pub fn new(disk: Arc<dyn Disk>) -> Self {
        Self { disk, known: Mutex::default(), newest_kept: AtomicU64::new(KEPT) }
    }

    /// The disk they lie on.
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// A segment that exists; nothing is opened yet.
    pub fn get(&self, number: u64) -> Arc<Segment> {
        if number & KEPT != 0 {
            self.newest_kept.fetch_max(number, Ordering::Relaxed);
        }
        self.lock().entry(number).or_insert_with(|| self.fresh(number, OnceLock::new())).clone()
    }

    /// A new segment with its header; neither is durable yet.
    pub fn create(&self, volume: VolumeId, number: u64) -> io::Result<Arc<Segment>> {
        let file = self.disk.create(&Segment::name(number))?;
        file.write_at(0, &segment_header(volume, number))?;
        let segment = self.fresh(number, OnceLock::from(file));
        self.lock().insert(number, segment.clone());
        Ok(segment)
    }

    fn fresh(&self, number: u64, file: OnceLock<Arc<dyn DiskFile>>) -> Arc<Segment> {
        Arc::new(Segment { number, disk: self.disk.clone(), file, doomed: AtomicBool::new(false) })
    }

    /// Removes a segment at once: nobody can be reading it.
    pub fn remove(&self, number: u64) -> io::Result<()> {
        self.lock().remove(&number);
        self.disk.remove(&Segment::name(number))
    }

    /// Lets go of every segment that is not needed; each goes with its last reader.
    pub fn retain(&self, needed: impl Fn(u64) -> bool) {
        let unneeded: Vec<Arc<Segment>> = {
            let mut known = self.lock();
            let numbers: Vec<u64> = known.keys().copied().filter(|n| !needed(*n)).collect();
            numbers.iter().filter_map(|number| known.remove(number)).collect()
        };
        // Relaxed: whoever drops the last reference sees it through that reference's count.
        unneeded.iter().for_each(|segment| segment.doomed.store(true, Ordering::Relaxed));
    }

    /// A number for a segment of thinning that no segment has.
    pub fn next_kept(&self) -> u64 {
        self.newest_kept.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Segment>>> {
        self.known.lock().expect("nothing panics while it holds the segments")
    }
}
