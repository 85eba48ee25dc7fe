//! Files that are there whole, and durable, or not at all.

use anyhow::Context;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Mode of a file that only its owner may read.
pub(crate) const SECRET_MODE: u32 = 0o600;
/// Mode of a file that anybody may read.
pub(crate) const PUBLIC_MODE: u32 = 0o644;
/// Mode of a folder with keys or a store in it.
const DIR_MODE: u32 = 0o700;

/// Makes a folder that only its owner may enter, with those above it; one that is there stays.
pub(crate) fn create_dir(dir: &Path) -> anyhow::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(DIR_MODE)
        .create(dir)
        .with_context(|| format!("create {}", dir.display()))
}

/// Writes a file whole: beside, fsync, rename, fsync of the folder.
pub(crate) fn write(path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    stage(path, bytes, mode)?;
    publish(path)
}

/// Where a file lies until it is published.
pub(crate) fn staged(path: &Path) -> PathBuf {
    path.with_added_extension("new")
}

/// Writes a file durably beside its place.
pub(crate) fn stage(path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    let staged = staged(path);
    let write = || -> std::io::Result<()> {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&staged)?;
        // One that a crash left may have another mode.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        sync_folder(&staged)
    };
    write().with_context(|| format!("write {}", staged.display()))
}

/// Moves a staged file into its place, durably.
pub(crate) fn publish(path: &Path) -> anyhow::Result<()> {
    fs::rename(staged(path), path)
        .and_then(|()| sync_folder(path))
        .with_context(|| format!("write {}", path.display()))
}

fn sync_folder(path: &Path) -> std::io::Result<()> {
    let folder = path.parent().expect("a file has a folder");
    File::open(folder)?.sync_all()
}
