//! A disk in memory that crashes where it is told to: what was not synced is lost, kept, or torn
//! into sectors, as a seed decides. The same seed gives the same disk.
//!
//! Stricter than any file system: writes that were not synced survive in any combination, and so
//! do names. What a failed sync should have made durable is durable or not, as a seed decides, and
//! no later sync tries again, though reads see it all the while. A [`Watch`] sees every access,
//! and may make it fail, corrupt it, send it elsewhere or unwind. For tests and simulation; the daemon never makes one.

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

/// What is about to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Bytes are read.
    Read,
    /// Bytes are written, or zeroed.
    Write,
    /// A file is made durable.
    Sync,
    /// A file gets another length.
    Truncate,
    /// A name comes, changes or goes.
    Name,
    /// Names are made durable.
    SyncNames,
}

/// An access, before it happens. Nothing of the disk is locked meanwhile.
#[derive(Debug, Clone, Copy)]
pub struct Access<'a> {
    /// What.
    pub verb: Verb,
    /// Of which file or folder.
    pub name: &'a str,
    /// Where, bytes.
    pub offset: u64,
    /// How much.
    pub bytes: u64,
}

/// What becomes of an access instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this error number.
    Fails(i32),
    /// This byte of what is read or written (from its beginning, wrapped around) is another.
    Corrupts(u64),
    /// It goes to this offset.
    Strays(u64),
}

/// Sees every access.
pub type Watch = Arc<dyn Fn(&Access<'_>) -> Option<Fault> + Send + Sync>;

/// The disk; clones are the same disk.
#[derive(Clone)]
pub struct MemoryDisk {
    state: Arc<Mutex<State>>,
    watch: Option<Watch>,
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
            free_bytes: FREE_BYTES,
            writes_until_full: None,
        };
        Self { state: Arc::new(Mutex::new(state)), watch: None }
    }

    /// The same disk; what is done through this clone, and what it opens, is watched.
    pub fn watched(&self, watch: Watch) -> Self {
        Self { state: self.state.clone(), watch: Some(watch) }
    }

    /// Asks the watch.
    fn ask(&self, verb: Verb, name: &str, offset: u64, bytes: u64) -> io::Result<Option<Fault>> {
        let Some(watch) = &self.watch else { return Ok(None) };
        match watch(&Access { verb, name, offset, bytes }) {
            Some(Fault::Fails(error)) => Err(io::Error::from_raw_os_error(error)),
            fault => Ok(fault),
        }
    }

    /// Changing operations so far.
    pub fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// The power goes just before changing operation number `operation` (from 0).
    pub fn crash_at(&self, operation: u64) {
        self.lock().crash_at = Some(operation);
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
        let mut random = Random::new(seed);
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
        self.ask(Verb::Name, name, 0, 0)?;
        let mut state = self.change()?;
        let file = state.next_file;
        state.next_file += 1;
        state.files.insert(file, Content::default());
        let change = NameChange::Add(name.to_owned(), file);
        change_names(&mut state.names, &change);
        state.name_changes.push(change);
        Ok(Arc::new(MemoryFile { disk: self.clone(), file, name: name.to_owned() }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let (disk, name) = (self.clone(), name.to_owned());
        match self.lock().names.get(&name) {
            Some(file) => Ok(Arc::new(MemoryFile { disk, file: *file, name })),
            None => Err(ErrorKind::NotFound.into()),
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.ask(Verb::Name, from, 0, 0)?;
        let mut state = self.change()?;
        let file = *state.names.get(from).ok_or(ErrorKind::NotFound)?;
        for change in [NameChange::Add(to.to_owned(), file), NameChange::Remove(from.to_owned())] {
            change_names(&mut state.names, &change);
            state.name_changes.push(change);
        }
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.ask(Verb::Name, name, 0, 0)?;
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
        self.ask(Verb::SyncNames, folder, 0, 0)?;
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
    name: String,
}

impl MemoryFile {
    fn ask(&self, verb: Verb, offset: u64, bytes: u64) -> io::Result<Option<Fault>> {
        self.disk.ask(verb, &self.name, offset, bytes)
    }

    fn apply(&self, state: &mut State, change: Change) {
        let content = state.files.get_mut(&self.file).expect("files are never forgotten");
        apply(&mut content.bytes, &change);
        content.changes.push(change);
    }

    fn write(&self, mut offset: u64, mut content: Vec<u8>) -> io::Result<()> {
        match self.ask(Verb::Write, offset, content.len() as u64)? {
            Some(Fault::Corrupts(at)) if !content.is_empty() => {
                let at = at as usize % content.len();
                content[at] ^= 0x20;
            }
            Some(Fault::Strays(to)) => offset = to,
            _ => {}
        }
        let mut state = self.disk.change()?;
        match &mut state.writes_until_full {
            Some(0) => {
                content.truncate(content.len() / 2);
                self.apply(&mut state, Change::Write(offset, content));
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            Some(left) => *left -= 1,
            None => {}
        }
        self.apply(&mut state, Change::Write(offset, content));
        Ok(())
    }

    /// What was to be made durable is, or is not, and nobody tries again.
    fn lose(&self) {
        let mut state = self.disk.lock();
        let mut random = Random::new(state.operations);
        let content = state.files.get_mut(&self.file).expect("files are never forgotten");
        for change in std::mem::take(&mut content.changes) {
            survive(&mut content.durable, &change, &mut random);
        }
    }
}

impl DiskFile for MemoryFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let fault = self.ask(Verb::Read, offset, buffer.len() as u64)?;
        let state = self.disk.lock();
        let bytes = &state.files[&self.file].bytes;
        let from = if let Some(Fault::Strays(to)) = fault { to } else { offset };
        let (start, end) = (from as usize, from as usize + buffer.len());
        buffer.copy_from_slice(bytes.get(start..end).ok_or(ErrorKind::UnexpectedEof)?);
        if let (Some(Fault::Corrupts(at)), false) = (fault, buffer.is_empty()) {
            buffer[at as usize % buffer.len()] ^= 0x20;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        self.write(offset, content.to_vec())
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.write(offset, vec![0; bytes as usize])
    }

    fn sync(&self) -> io::Result<()> {
        self.ask(Verb::Sync, 0, 0).inspect_err(|_| self.lose())?;
        let mut state = self.disk.change()?;
        if state.sync_fails {
            drop(state);
            self.lose();
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let content = state.files.get_mut(&self.file).expect("files are never forgotten");
        for change in std::mem::take(&mut content.changes) {
            apply(&mut content.durable, &change);
        }
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
        self.ask(Verb::Truncate, bytes, 0)?;
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
    fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

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
