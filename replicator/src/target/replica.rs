//! Opening a replica volume: a sparse file beside the journal, or a block device of this host.
//!
//! Invariants: a device is held with `O_EXCL`, so that nothing can be mounted on it meanwhile; a
//! file is made only where none with content stands.

use super::disk::{Device, Disk, DiskFile};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Name of the sparse file in the volume's folder, and in `state.json` where a path would be.
pub const FILE: &str = "replica.img";

/// Why a replica volume cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// Mounted or held by something else.
    #[error(
        "{} is in use: it must not be mounted, nor be part of LVM or RAID, while it is a replica \
         volume; unmount it, or name another device in target.toml",
        .0.display()
    )]
    InUse(PathBuf),
    /// It cannot be opened.
    #[error("replica volume {}: {cause}; check [[device]] in target.toml", path.display())]
    Open {
        /// The file or device.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Smaller than the volume.
    #[error(
        "{} has {found_bytes} bytes, the volume {volume_bytes}: name a device of at least that \
         size in target.toml", path.display()
    )]
    TooSmall {
        /// The file or device.
        path: PathBuf,
        /// Its size.
        found_bytes: u64,
        /// The volume's.
        volume_bytes: u64,
    },
    /// A file with content stands where a new one would be made.
    #[error("{} has content, but no state.json beside it says whose: move it away", .0.display())]
    Foreign(PathBuf),
    /// `target.toml` names another one than before.
    #[error(
        "the replica volume was {before}, target.toml now says {now}: put that back, or, if it is \
         the same device under another name, change \"replica\" in state.json"
    )]
    Moved {
        /// What state.json says.
        before: String,
        /// What target.toml says.
        now: String,
    },
}

/// An open replica volume.
pub struct Replica {
    /// It.
    pub file: Arc<dyn DiskFile>,
    /// A sparse file of ours, not a device.
    pub is_file: bool,
    /// Absolute path.
    pub path: PathBuf,
}

impl Replica {
    /// Opens a device.
    pub fn device(path: &Path, volume_bytes: u64) -> Result<Self, ReplicaError> {
        let device = Device::open(path).map_err(|cause| match cause.raw_os_error() {
            Some(libc::EBUSY) => ReplicaError::InUse(path.to_owned()),
            _ => ReplicaError::Open { path: path.to_owned(), cause },
        })?;
        let opened = Self { file: Arc::new(device), is_file: false, path: path.to_owned() };
        opened.checked(volume_bytes)
    }

    /// Opens the file that was made before.
    pub fn file(disk: &dyn Disk, volume_bytes: u64) -> Result<Self, ReplicaError> {
        let path = disk.path(FILE);
        match disk.open(FILE) {
            Ok(file) => Self { file, is_file: true, path }.checked(volume_bytes),
            Err(cause) => Err(ReplicaError::Open { path, cause }),
        }
    }

    /// Makes the file, durably, reading as zero.
    pub fn new_file(disk: &dyn Disk, volume_bytes: u64) -> Result<Self, ReplicaError> {
        let path = disk.path(FILE);
        let open = |cause| ReplicaError::Open { path: disk.path(FILE), cause };
        match disk.open(FILE) {
            // Left by a crash before state.json was written, unless there is something in it.
            Ok(found) => {
                let bytes = found.bytes().map_err(open)?;
                if found.next_data(0).map_err(open)? < bytes {
                    return Err(ReplicaError::Foreign(path));
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(open(error)),
        }
        let make = || {
            let file = disk.create(FILE)?;
            file.truncate(volume_bytes)?;
            file.sync()?;
            disk.sync_names("")?;
            Ok(file)
        };
        Ok(Self { file: make().map_err(open)?, is_file: true, path })
    }

    fn checked(self, volume_bytes: u64) -> Result<Self, ReplicaError> {
        let found_bytes = match self.file.bytes() {
            Ok(bytes) => bytes,
            Err(cause) => return Err(ReplicaError::Open { path: self.path, cause }),
        };
        if found_bytes < volume_bytes {
            return Err(ReplicaError::TooSmall { path: self.path, found_bytes, volume_bytes });
        }
        Ok(self)
    }
}
