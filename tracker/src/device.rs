//! Which device a path is, where it lies, and what the kernel counts for it.
//!
//! Reads sysfs and /proc only; never opens a device for writing. Refuses what cannot be a volume
//! because writes reach the disk by a way that the tracker does not see, and names the device to
//! choose instead.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

mod mounts;

pub use mounts::Mount;
#[doc(hidden)]
pub use mounts::{Line as MountLine, parse as parse_mount_line};

/// Unit of sizes and starts in sysfs, whatever the device's block size.
const SECTOR_BYTES: u64 = 512;
/// Device-mapper holders on holders: deeper stacks are a loop in sysfs.
const STACK_DEPTH_MAX: usize = 16;

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
        let fails = |what| move |cause: io::Error| error(path, what, cause.to_string());
        let meta = fs::metadata(path).map_err(fails("look up"))?;
        if !meta.file_type().is_block_device() {
            return Err(error(path, "look up", "not a block device".into()));
        }
        let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
        // Resolved: the parent of a partition's folder is its disk's.
        let sysfs = fs::canonicalize(sysfs_of(major, minor)).map_err(fails("find in sysfs"))?;
        let is_partition = sysfs.join("partition").exists();
        let disk_sysfs = match (is_partition, sysfs.parent()) {
            (true, Some(parent)) => parent.to_path_buf(),
            _ => sysfs.clone(),
        };
        refuse(path, &sysfs, &disk_sysfs)?;
        let number = |name: &str, of: &Path| -> Result<u64, DeviceError> {
            let text = fs::read_to_string(of.join(name)).map_err(fails("read sysfs"))?;
            text.trim().parse().map_err(|_| error(path, "read sysfs", format!("{name}: {text:?}")))
        };
        let size_bytes = number("size", &sysfs)? * SECTOR_BYTES;
        if size_bytes == 0 {
            return Err(error(
                path,
                "look up",
                "the device is empty: no medium, no backing".into(),
            ));
        }
        let disk_number = number_of(&disk_sysfs)
            .ok_or_else(|| error(path, "read sysfs", "its disk has no number".into()))?;
        Ok(Self {
            path: path.to_path_buf(),
            major,
            minor,
            size_bytes,
            diskseq: number("diskseq", &disk_sysfs)?,
            boot_id: boot_id().map_err(fails("read the boot id"))?,
            disk: (disk_number.0, disk_number.1, node_of(&disk_sysfs)),
            disk_offset_bytes: if is_partition {
                number("start", &sysfs)? * SECTOR_BYTES
            } else {
                0
            },
            logical_block_bytes: number("queue/logical_block_size", &disk_sysfs)? as u32,
        })
    }

    /// Whether it is a partition of its disk.
    pub fn is_partition(&self) -> bool {
        (self.major, self.minor) != (self.disk.0, self.disk.1)
    }

    /// Numbers and kernel names of all that it lies on: itself, its disk, and what is below those
    /// by device-mapper or md.
    pub fn lies_on(&self) -> BTreeMap<(u32, u32), String> {
        let mut below = BTreeMap::new();
        add_with_slaves(&self.sysfs(), &mut below, 0);
        add_with_slaves(&self.disk_sysfs(), &mut below, 0);
        below
    }

    /// A digest of what the hardware, or who made it, says of the device, its place and its size:
    /// the same after a reboot, whatever its node is called then. None if nothing tells it from
    /// others.
    pub fn hardware(&self) -> Option<u64> {
        let disk = self.disk_sysfs();
        let names = [
            "wwid",
            "device/wwid",
            "serial",
            "device/serial",
            "uuid",
            "dm/uuid",
            "md/uuid",
            "loop/backing_file",
        ];
        let mut said = String::new();
        for name in names {
            let text = fs::read_to_string(disk.join(name)).unwrap_or_default();
            if !text.trim().is_empty() {
                said += &format!("{name} {}\n", text.trim());
            }
        }
        if said.is_empty() {
            return None;
        }
        said += &format!("{} {}", self.disk_offset_bytes, self.size_bytes);
        Some(xxhash_rust::xxh3::xxh3_64(said.as_bytes()))
    }

    /// Its own folder in sysfs.
    pub(crate) fn sysfs(&self) -> PathBuf {
        sysfs_of(self.major, self.minor)
    }

    /// The folder of its whole disk in sysfs.
    pub(crate) fn disk_sysfs(&self) -> PathBuf {
        sysfs_of(self.disk.0, self.disk.1)
    }

    /// Whether it is a volume of device-mapper.
    pub fn is_mapped(&self) -> bool {
        self.sysfs().join("dm").is_dir()
    }

    /// Requests now in flight on the whole disk, reads and writes, from the kernel's counters.
    pub fn in_flight(&self) -> Result<(u64, u64), DeviceError> {
        let text = fs::read_to_string(self.disk_sysfs().join("inflight"))
            .map_err(|cause| error(&self.path, "read what is in flight", cause.to_string()))?;
        let mut counts = text.split_whitespace().map_while(|word| word.parse().ok());
        match (counts.next(), counts.next()) {
            (Some(reads), Some(writes)) => Ok((reads, writes)),
            _ => Err(error(&self.path, "read what is in flight", format!("{text:?}"))),
        }
    }

    /// The mounted file systems that lie on the device or a part of it, straight or through
    /// device-mapper; each once, however often it is mounted. Mounts of other namespaces are not
    /// seen.
    pub fn mounts(&self) -> Result<Vec<Mount>, DeviceError> {
        mounts::on(&self.stack())
            .map_err(|cause| error(&self.path, "list mounts", cause.to_string()))
    }

    /// The swap areas in use that lie on the device, as [`Self::mounts`].
    pub fn swaps(&self) -> Result<Vec<PathBuf>, DeviceError> {
        mounts::swaps_on(&self.stack())
            .map_err(|cause| error(&self.path, "list swap areas", cause.to_string()))
    }

    /// The numbers of the device, of its parts, and of all that lies on them.
    fn stack(&self) -> BTreeSet<(u32, u32)> {
        let mut stack = BTreeSet::new();
        let own = sysfs_of(self.major, self.minor);
        add_with_holders(&own, &mut stack, 0);
        for part in partitions_of(&own) {
            add_with_holders(&part, &mut stack, 0);
        }
        stack
    }
}

fn error(path: &Path, what: &'static str, cause: String) -> DeviceError {
    DeviceError { path: path.to_path_buf(), what, cause }
}

/// The folder of a device in sysfs.
pub(crate) fn sysfs_of(major: u32, minor: u32) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

fn boot_id() -> io::Result<[u8; 16]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.trim().chars().filter(|letter| *letter != '-').collect();
    match u128::from_str_radix(&digits, 16) {
        Ok(id) if digits.len() == 32 => Ok(id.to_be_bytes()),
        _ => Err(io::Error::other(format!("boot id {text:?}"))),
    }
}

pub(crate) fn number_of(sysfs: &Path) -> Option<(u32, u32)> {
    let text = fs::read_to_string(sysfs.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

pub(crate) fn name_of(sysfs: &Path) -> String {
    let name = fs::canonicalize(sysfs).unwrap_or_else(|_| sysfs.to_path_buf());
    name.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The device node: sysfs writes '/' in a name as '!'.
fn node_of(sysfs: &Path) -> PathBuf {
    Path::new("/dev").join(name_of(sysfs).replace('!', "/"))
}

pub(crate) fn folders_in(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn partitions_of(sysfs: &Path) -> Vec<PathBuf> {
    let parts = folders_in(sysfs).into_iter();
    parts.filter(|path| path.join("partition").exists()).collect()
}

fn add_with_holders(sysfs: &Path, numbers: &mut BTreeSet<(u32, u32)>, depth: usize) {
    numbers.extend(number_of(sysfs));
    if depth < STACK_DEPTH_MAX {
        for holder in folders_in(&sysfs.join("holders")) {
            add_with_holders(&holder, numbers, depth + 1);
        }
    }
}

fn add_with_slaves(sysfs: &Path, found: &mut BTreeMap<(u32, u32), String>, depth: usize) {
    // Resolved: the folder above a partition's is its disk's.
    let Ok(sysfs) = fs::canonicalize(sysfs) else { return };
    if let Some(number) = number_of(&sysfs) {
        found.insert(number, name_of(&sysfs));
    }
    if depth == STACK_DEPTH_MAX {
        return;
    }
    if let (true, Some(disk)) = (sysfs.join("partition").exists(), sysfs.parent()) {
        add_with_slaves(disk, found, depth + 1);
    }
    for slave in folders_in(&sysfs.join("slaves")) {
        add_with_slaves(&slave, found, depth + 1);
    }
}

/// Refuses a device whose writes come, or end, by a way that is not followed.
fn refuse(path: &Path, sysfs: &Path, disk: &Path) -> Result<(), DeviceError> {
    let zoned = fs::read_to_string(disk.join("queue/zoned")).unwrap_or_else(|_| "none".into());
    if zoned.trim() != "none" {
        let cause = format!("zoned disks ({}) cannot be volumes", zoned.trim());
        return Err(error(path, "choose as volume", cause));
    }
    let mut parts = vec![sysfs.to_path_buf()];
    parts.extend(partitions_of(sysfs));
    for part in &parts {
        if part.join("bcache").exists() && folders_in(&part.join("holders")).is_empty() {
            return Err(error(path, "choose as volume", "it is a cache of bcache".into()));
        }
        refuse_holders(path, part, 0)?;
    }
    Ok(())
}

fn refuse_holders(path: &Path, sysfs: &Path, depth: usize) -> Result<(), DeviceError> {
    if depth == STACK_DEPTH_MAX {
        return Ok(());
    }
    for holder in folders_in(&sysfs.join("holders")) {
        let text = |name| fs::read_to_string(holder.join(name)).unwrap_or_default();
        let (uuid, name) = (text("dm/uuid"), text("dm/name"));
        let kind = match name_of(&holder) {
            _ if uuid.starts_with("mpath-") => "multipath",
            // LVM's names for the slow device under a writecache and for the cache itself.
            _ if name.trim().ends_with("_wcorig") => "dm-writecache",
            _ if name.trim().ends_with("_cvol") => "a dm cache",
            _ if holder.join("md").exists() => "md",
            of if of.starts_with("bcache") => "bcache",
            _ => {
                refuse_holders(path, &holder, depth + 1)?;
                continue;
            }
        };
        // The top of the stack: the device that lies on the holder, if one does.
        let above = folders_in(&holder.join("holders")).into_iter().next();
        let top = match (kind, above) {
            ("dm-writecache" | "a dm cache", Some(above)) => above,
            _ => holder.clone(),
        };
        let name = fs::read_to_string(top.join("dm/name")).unwrap_or_default();
        let top = match name.trim() {
            "" => node_of(&top),
            name => Path::new("/dev/mapper").join(name),
        };
        let cause = format!("it is a member of {kind}; choose {} instead", top.display());
        return Err(error(path, "choose as volume", cause));
    }
    Ok(())
}
