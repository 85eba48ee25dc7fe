//! Freezes file systems for the last pass of a cut, by a small locked child that thaws in any case.
//!
//! The child thaws when it is told to, when its time is over, and when this process is gone; this
//! process thaws when the child is gone; the next start thaws what both left behind, by a note
//! that was written before anything was frozen. Only what we froze is thawed. Between
//! [`Freezer::freeze`] and [`Freezer::thaw`] nothing here allocates, logs or writes: it could wait
//! for the very file system that is frozen. Nor may the caller.

mod child;

use child::{Answer, Order};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest time that anything stays frozen.
pub const FROZEN_MAX: Duration = Duration::from_millis(500);
/// Most file systems in one freeze.
pub const MOUNTS_MAX: usize = 128;
/// Name of the note.
const NOTE: &str = "frozen";

/// Why nothing is frozen.
#[derive(Debug, thiserror::Error)]
#[error("freeze {path}: {cause}")]
pub struct FreezeError {
    /// The mount point.
    pub path: PathBuf,
    /// Why.
    pub cause: String,
}

/// The child. Start it before the process has threads.
pub struct Freezer {
    note: PathBuf,
    /// Closed first, which ends the child.
    socket: Option<OwnedFd>,
    watch: Arc<Watch>,
    watcher: Option<JoinHandle<()>>,
    /// When the newest freeze was ordered.
    since: Instant,
}

/// What the thread that waits for the child's end shares.
#[derive(Default)]
struct Watch {
    state: Mutex<Watched>,
}

#[derive(Default)]
struct Watched {
    child_is_gone: bool,
    /// What may be frozen now; opened before it was.
    mounts: Vec<File>,
}

impl Watch {
    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Freezer {
    /// Starts the child. `note_dir` (under /run) is where it notes what it is about to freeze; what
    /// stands there from an earlier process is thawed first.
    pub fn start(note_dir: &Path) -> Result<Self, FreezeError> {
        let fails = |cause: io::Error| error(note_dir, cause.to_string());
        fs::create_dir_all(note_dir).map_err(fails)?;
        let note = note_dir.join(NOTE);
        thaw_noted(&note).map_err(fails)?;
        let (pid, socket) = child::start().map_err(fails)?;
        let watch = Arc::new(Watch::default());
        let watcher = std::thread::Builder::new().name("freeze-watch".into()).spawn({
            let watch = watch.clone();
            move || {
                crate::locked::wait_for_end(pid);
                let mut watched = watch.lock();
                watched.child_is_gone = true;
                // Nobody else keeps its time now.
                watched.mounts.iter().for_each(child::thaw);
            }
        });
        let watcher = Some(watcher.map_err(fails)?);
        Ok(Self { note, socket: Some(socket), watch, watcher, since: Instant::now() })
    }

    /// Freezes all of `mounts`, for at most `limit` (500 ms at most). All or nothing.
    pub fn freeze(&mut self, mounts: &[PathBuf], limit: Duration) -> Result<(), FreezeError> {
        let (paths, files) = open_each_once(mounts)?;
        let first = paths.first().cloned().unwrap_or_default();
        let fails = |cause: &str| error(&first, cause.into());
        let Some(socket) = &self.socket else { return Err(fails("the freezer is stopped")) };
        {
            let mut watched = self.watch.lock();
            if watched.child_is_gone {
                return Err(fails("the freezing process is gone; restart this one"));
            }
            if !watched.mounts.is_empty() {
                return Err(fails("something is frozen already: thaw it first"));
            }
            write_note(&self.note, &paths, &files).map_err(|cause| {
                error(&self.note, format!("note what is to be frozen: {cause}"))
            })?;
            watched.mounts = files;
        }
        let fds: Vec<i32> = self.watch.lock().mounts.iter().map(AsRawFd::as_raw_fd).collect();
        // From here on nothing may allocate, until the answer says that nothing is frozen.
        self.since = Instant::now();
        let sent = child::send(socket, Order::Freeze(limit.min(FROZEN_MAX)), &fds);
        match sent.and_then(|()| child::receive(socket)) {
            Ok(Answer::Frozen) => Ok(()),
            Ok(Answer::Failed { index, errno }) => {
                self.forget();
                let path = paths.get(index).unwrap_or(&first);
                Err(error(path, io::Error::from_raw_os_error(errno).to_string()))
            }
            Ok(Answer::Thawed { .. }) | Err(_) => {
                self.watch.lock().mounts.iter().for_each(child::thaw);
                self.forget();
                Err(fails("the freezing process is gone; what it froze is thawed"))
            }
        }
    }

    /// Thaws what [`Self::freeze`] froze. Returns how long it was frozen, and true only if all of
    /// it stayed frozen until this call.
    pub fn thaw(&mut self) -> Result<(Duration, bool), FreezeError> {
        let socket = self.socket.as_ref().ok_or(io::ErrorKind::NotConnected);
        let answer = socket.map_err(io::Error::from).and_then(|socket| {
            child::send(socket, Order::Thaw, &[])?;
            child::receive(socket)
        });
        let result = match answer {
            Ok(Answer::Thawed { frozen, intact }) => Ok((frozen, intact)),
            Ok(_) | Err(_) => {
                // The child is gone; its watcher thaws as well, which does no harm.
                self.watch.lock().mounts.iter().for_each(child::thaw);
                Ok((self.since.elapsed(), false))
            }
        };
        self.forget();
        result
    }

    /// Nothing is frozen any more.
    fn forget(&mut self) {
        self.watch.lock().mounts.clear();
        // A note that stays is thawed in vain at the next start.
        let _ = fs::remove_file(&self.note);
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        // The child sees the end of its socket, thaws and exits; its watcher ends with it.
        drop(self.socket.take());
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
        if !self.watch.lock().mounts.is_empty() {
            self.forget();
        }
    }
}

/// Writes back the file system at `path`; returns how long that took.
pub fn sync_file_system(path: &Path) -> io::Result<Duration> {
    let file = File::open(path)?;
    let start = Instant::now();
    nix::unistd::syncfs(&file)?;
    Ok(start.elapsed())
}

fn error(path: &Path, cause: String) -> FreezeError {
    FreezeError { path: path.to_path_buf(), cause }
}

/// A file system that is mounted at several places is frozen once.
fn open_each_once(mounts: &[PathBuf]) -> Result<(Vec<PathBuf>, Vec<File>), FreezeError> {
    let (mut numbers, mut paths, mut files) = (Vec::new(), Vec::new(), Vec::new());
    for path in mounts {
        let file = File::open(path).map_err(|cause| error(path, cause.to_string()))?;
        let number = file.metadata().map_err(|cause| error(path, cause.to_string()))?.dev();
        if !numbers.contains(&number) {
            numbers.push(number);
            paths.push(path.clone());
            files.push(file);
        }
    }
    match files.len() {
        1..=MOUNTS_MAX => Ok((paths, files)),
        0 => Err(error(Path::new("-"), "no file system is named".into())),
        many => Err(error(&paths[0], format!("{many} file systems; at most {MOUNTS_MAX}"))),
    }
}

/// The note: for each file system its number, a blank, its path, a NUL.
fn write_note(note: &Path, paths: &[PathBuf], files: &[File]) -> io::Result<()> {
    let mut bytes = Vec::new();
    for (path, file) in paths.iter().zip(files) {
        bytes.extend_from_slice(format!("{} ", file.metadata()?.dev()).as_bytes());
        bytes.extend_from_slice(path.as_os_str().as_bytes());
        bytes.push(0);
    }
    fs::write(note, bytes)
}

/// Thaws what an earlier process noted and did not come to thaw.
fn thaw_noted(note: &Path) -> io::Result<()> {
    let bytes = match fs::read(note) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for line in bytes.split(|byte| *byte == 0) {
        let Some(blank) = line.iter().position(|byte| *byte == b' ') else { continue };
        let path = PathBuf::from(std::ffi::OsString::from_vec(line[blank + 1..].to_vec()));
        let Ok(file) = File::open(&path) else { continue };
        // Another file system may be mounted there by now, and frozen by somebody else.
        if file.metadata().is_ok_and(|meta| meta.dev().to_string().as_bytes() == &line[..blank]) {
            child::thaw(&file);
        }
    }
    fs::remove_file(note)
}
