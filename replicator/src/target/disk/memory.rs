//! A disk in memory that crashes where it is told to: what was not synced is lost, kept, or torn
//! into sectors, as a seed decides. The same seed gives the same disk.
//!
//! Stricter than any file system: writes that were not synced survive in any combination, and so
//! do names. For tests and simulation; the daemon never makes one.

use super::{Disk, DiskFile, SegmentBytes};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

/// Short, so that a few frames make several segments.
const SEGMENT_BYTES: SegmentBytes = SegmentBytes { enough: 1 << 10, max: 2 << 10 };
const SECTOR_BYTES: usize = 512;
/// Free space unless told otherwise, bytes.
const FREE_BYTES: u64 = 1 << 40;

/// The disk; clones are the same disk.
#[derive(Clone)]
pub struct MemoryDisk {
    state: Arc<Mutex<State>>,
}

struct State {
    files: BTreeMap<u64, Content>,
    next_file: u64,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    name_changes: Vec<NameChange>,
    operations: u64,
    crash_at: Option<u64>,
    sync_fails: bool,
    sync_fails_at: Option<u64>,
    free_bytes: u64,
    writes_until_full: Option<u64>,
}

#[derive(Default)]
struct Content {
    bytes: Vec<u8>,
    durable: Vec<u8>,
    changes: Vec<Change>,
}

#[derive(Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Truncate(u64),
}

#[derive(Clone)]
enum NameChange {
    Add(String, u64),
    Remove(String),
}

impl Default for MemoryDisk {
    fn default() -> Self {
        Self::with(BTreeMap::new(), BTreeMap::new(), 0)
    }
}

impl MemoryDisk {
    fn with(files: BTreeMap<u64, Content>, names: BTreeMap<String, u64>, next_file: u64) -> Self {
        let state = State {
            files,
            next_file,
            durable_names: names.clone(),
            names,
            name_changes: Vec::new(),
            operations: 0,
            crash_at: None,
            sync_fails: false,
            sync_fails_at: None,
            free_bytes: FREE_BYTES,
            writes_until_full: None,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Changing operations so far.
    pub fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// The power goes just before changing operation number `operation` (from 0).
    pub fn crash_at(&self, operation: u64) {
        self.lock().crash_at = Some(operation);
    }

    /// Another process uses the disk, whose power did not go: what was written is there, durable
    /// or not.
    pub fn revive(&self) {
        self.lock().crash_at = None;
    }

    /// The first sync of a file from operation number `operation` on fails, as on Linux: what it
    /// should have made durable can still be read, but no later sync makes it durable.
    pub fn fail_sync_at(&self, operation: u64) {
        self.lock().sync_fails_at = Some(operation);
    }

    /// From now on every sync fails.
    pub fn fail_syncs(&self) {
        self.lock().sync_fails = true;
    }

    /// What [`Disk::free_bytes`] says.
    pub fn set_free_bytes(&self, bytes: u64) {
        self.lock().free_bytes = bytes;
    }

    /// After `count` more writes every write fails with "no space", having written its first half;
    /// `None` ends that.
    pub fn full_after(&self, count: Option<u64>) {
        self.lock().writes_until_full = count;
    }

    /// Changes one byte of a file, durably: damage.
    pub fn damage(&self, name: &str, offset: usize) {
        let mut state = self.lock();
        let file = state.names[name];
        let content = state.files.get_mut(&file).expect("a name has a file");
        content.bytes[offset] ^= 0x40;
        content.durable = content.bytes.clone();
        content.changes.clear();
    }

    /// The disk as it is found after a power cut now.
    pub fn after_crash(&self, seed: u64) -> Self {
        let state = self.lock();
        let mut random = Random(seed ^ 0x9e37_79b9_7f4a_7c15);
        let mut names = state.durable_names.clone();
        for change in &state.name_changes {
            if random.coin() {
                change_names(&mut names, change);
            }
        }
        let mut files = BTreeMap::new();
        for file in names.values() {
            let content = &state.files[file];
            let mut bytes = content.durable.clone();
            for change in &content.changes {
                survive(&mut bytes, change, &mut random);
            }
            let found = Content { durable: bytes.clone(), bytes, changes: Vec::new() };
            files.insert(*file, found);
        }
        let disk = Self::with(files, names, state.next_file);
        disk.lock().free_bytes = state.free_bytes;
        disk
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the disk")
    }

    fn change(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        if state.crash_at.is_some_and(|at| state.operations >= at) {
            return Err(io::Error::other("the power is gone"));
        }
        state.operations += 1;
        Ok(state)
    }
}

/// Applies a change that was never synced: all of it, none of it, or some of its sectors.
fn survive(bytes: &mut Vec<u8>, change: &Change, random: &mut Random) {
    match change {
        Change::Truncate(_) if random.coin() => apply(bytes, change),
        Change::Truncate(_) => {}
        Change::Write(offset, content) => match random.next() % 4 {
            0 => {}
            1 | 2 => apply(bytes, change),
            _ => {
                for (i, sector) in content.chunks(SECTOR_BYTES).enumerate() {
                    if random.coin() {
                        let at = offset + (i * SECTOR_BYTES) as u64;
                        apply(bytes, &Change::Write(at, sector.to_vec()));
                    }
                }
            }
        },
    }
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Truncate(to) => bytes.resize(*to as usize, 0),
        Change::Write(offset, content) => {
            let end = *offset as usize + content.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*offset as usize..end].copy_from_slice(content);
        }
    }
}

fn change_names(names: &mut BTreeMap<String, u64>, change: &NameChange) {
    match change {
        NameChange::Add(name, file) => {
            names.insert(name.clone(), *file);
        }
        NameChange::Remove(name) => {
            names.remove(name);
        }
    }
}

impl Disk for MemoryDisk {
    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let state = self.lock();
        let inside = |name: &String| match name.rsplit_once('/') {
            Some((of, rest)) => (of == folder).then(|| rest.to_owned()),
            None => folder.is_empty().then(|| name.clone()),
        };
        Ok(state.names.keys().filter_map(inside).collect())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.change()?;
        let file = state.next_file;
        state.next_file += 1;
        state.files.insert(file, Content::default());
        let change = NameChange::Add(name.to_owned(), file);
        change_names(&mut state.names, &change);
        state.name_changes.push(change);
        Ok(Arc::new(MemoryFile { disk: self.clone(), file }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        match self.lock().names.get(name) {
            Some(file) => Ok(Arc::new(MemoryFile { disk: self.clone(), file: *file })),
            None => Err(ErrorKind::NotFound.into()),
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.change()?;
        let file = *state.names.get(from).ok_or(ErrorKind::NotFound)?;
        for change in [NameChange::Add(to.to_owned(), file), NameChange::Remove(from.to_owned())] {
            change_names(&mut state.names, &change);
            state.name_changes.push(change);
        }
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.change()?;
        if !state.names.contains_key(name) {
            return Err(ErrorKind::NotFound.into());
        }
        let change = NameChange::Remove(name.to_owned());
        change_names(&mut state.names, &change);
        state.name_changes.push(change);
        Ok(())
    }

    fn sync_names(&self, folder: &str) -> io::Result<()> {
        let mut state = self.change()?;
        if state.sync_fails {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let of_folder = |change: &NameChange| {
            let (NameChange::Add(name, _) | NameChange::Remove(name)) = change;
            name.rsplit_once('/').map_or("", |(of, _)| of) == folder
        };
        let changes = std::mem::take(&mut state.name_changes);
        let (durable, kept): (Vec<_>, Vec<_>) = changes.into_iter().partition(of_folder);
        for change in &durable {
            change_names(&mut state.durable_names, change);
        }
        state.name_changes = kept;
        Ok(())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        Ok(self.lock().free_bytes)
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("/memory").join(name)
    }

    fn segment_bytes(&self) -> SegmentBytes {
        SEGMENT_BYTES
    }
}

struct MemoryFile {
    disk: MemoryDisk,
    file: u64,
}

impl MemoryFile {
    fn apply(&self, state: &mut State, change: Change) {
        let content = state.files.get_mut(&self.file).expect("files are never forgotten");
        apply(&mut content.bytes, &change);
        content.changes.push(change);
    }
}

impl DiskFile for MemoryFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let state = self.disk.lock();
        let bytes = &state.files[&self.file].bytes;
        let (start, end) = (offset as usize, offset as usize + buffer.len());
        buffer.copy_from_slice(bytes.get(start..end).ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        let mut state = self.disk.change()?;
        match &mut state.writes_until_full {
            Some(0) => {
                let half = content[..content.len() / 2].to_vec();
                self.apply(&mut state, Change::Write(offset, half));
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            Some(left) => *left -= 1,
            None => {}
        }
        self.apply(&mut state, Change::Write(offset, content.to_vec()));
        Ok(())
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let mut state = self.disk.change()?;
        self.apply(&mut state, Change::Write(offset, vec![0; bytes as usize]));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.change()?;
        if state.sync_fails {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let operations = state.operations;
        let fails = state.sync_fails_at.take_if(|at| operations > *at).is_some();
        let content = state.files.get_mut(&self.file).expect("files are never forgotten");
        let changes = std::mem::take(&mut content.changes);
        if fails {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        // Not simply all that can be read: a failed sync may have left some of it behind.
        changes.iter().for_each(|change| apply(&mut content.durable, change));
        Ok(())
    }

    fn settle(&self) -> io::Result<()> {
        self.sync()?;
        let mut state = self.disk.lock();
        let content = state.files.get_mut(&self.file).expect("files are never forgotten");
        content.bytes.clone_from(&content.durable);
        Ok(())
    }

    fn truncate(&self, bytes: u64) -> io::Result<()> {
        let mut state = self.disk.change()?;
        self.apply(&mut state, Change::Truncate(bytes));
        Ok(())
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.disk.lock().files[&self.file].bytes.len() as u64)
    }

    fn next_data(&self, offset: u64) -> io::Result<u64> {
        let state = self.disk.lock();
        let bytes = &state.files[&self.file].bytes;
        let found = bytes.iter().skip(offset as usize).position(|byte| *byte != 0);
        Ok(found.map_or(bytes.len() as u64, |at| offset + at as u64))
    }
}

/// xorshift64*: small, seeded, good enough to choose what survives.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    fn coin(&mut self) -> bool {
        self.next() & 1 == 0
    }
}
