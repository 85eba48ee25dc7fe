//! Freezes file systems for the last pass of a cut, by a small locked child that thaws in any case.

use std::path::{Path, PathBuf};
use std::time::Duration;

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
pub struct Freezer {}

impl Freezer {
    /// Starts the child. `note_dir` (under /run) is where it notes what it is about to freeze; what
    /// stands there from an earlier process is thawed first.
    pub fn start(note_dir: &Path) -> Result<Self, FreezeError> {
        let _ = note_dir;
        todo!()
    }

    /// Freezes all of `mounts`, for at most `limit` (500 ms at most). All or nothing.
    pub fn freeze(&mut self, mounts: &[PathBuf], limit: Duration) -> Result<(), FreezeError> {
        let _ = (mounts, limit);
        todo!()
    }

    /// Thaws what [`Self::freeze`] froze. Returns how long it was frozen, and true only if all of
    /// it stayed frozen until this call.
    pub fn thaw(&mut self) -> Result<(Duration, bool), FreezeError> {
        todo!()
    }
}

/// Writes back the file system at `path`; returns how long that took.
pub fn sync_file_system(path: &Path) -> std::io::Result<Duration> {
    let _ = path;
    todo!()
}
