//! Which device a path is, where it lies, and what the kernel counts for it.

use std::path::{Path, PathBuf};

/// A device that fails to be what is needed.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {what}: {cause}")]
pub struct DeviceError {
    /// The device node.
    pub path: PathBuf,
    /// The operation.
    pub what: &'static str,
    /// Why, with the remedy where there is one.
    pub cause: String,
}

/// One block device, opened read-only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// The node it was opened by.
    pub path: PathBuf,
    /// Its number.
    pub major: u32,
    /// See `major`.
    pub minor: u32,
    /// Its size, bytes.
    pub size_bytes: u64,
    /// Sequence number of the disk: another one means another disk under the same number.
    pub diskseq: u64,
    /// Boot id of the running kernel.
    pub boot_id: [u8; 16],
    /// The whole disk that it lies on (itself, if it is whole): number and node.
    pub disk: (u32, u32, PathBuf),
    /// Where it starts on that disk, bytes.
    pub disk_offset_bytes: u64,
    /// Logical block size, bytes.
    pub logical_block_bytes: u32,
}

impl Device {
    /// Looks the device up. Refuses what cannot be a volume (zoned, member of md or multipath, …)
    /// and names the device to choose instead.
    pub fn open(path: &Path) -> Result<Self, DeviceError> {
        let _ = path;
        todo!()
    }

    /// Requests now in flight on the whole disk, reads and writes, from the kernel's counters.
    pub fn in_flight(&self) -> Result<(u64, u64), DeviceError> {
        todo!()
    }

    /// A mounted file system that lies on the device or a part of it, straight or through device-mapper.
    pub fn mounts(&self) -> Result<Vec<Mount>, DeviceError> {
        todo!()
    }
}

/// A mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where.
    pub path: PathBuf,
    /// `ext4`, `xfs`, …
    pub kind: String,
    /// Whether the kernel can freeze it.
    pub freezable: bool,
}
