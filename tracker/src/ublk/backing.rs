//! The device that a filter writes to: held exclusively, opened for direct I/O, with its limits.
//!
//! The filter's own limits are the backing device's: what is said to be durable, discarded or zero
//! above is so below, and a file system finds the geometry that it would find without the filter.

use super::UblkError;
use super::abi::{
    ATTR_FUA, ATTR_READ_ONLY, ATTR_ROTATIONAL, ATTR_VOLATILE_CACHE, PARAM_BASIC, PARAM_DISCARD,
    ParamBasic, ParamDiscard, Params,
};
use super::memory::Mapping;
use crate::device::Device;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// What sizes are counted in, whatever the block size.
pub(super) const SECTOR_SHIFT: u32 = 9;

/// An opened device below a filter, or a reserve.
#[derive(Debug)]
pub struct Backing {
    device: Device,
    file: File,
    read_only: bool,
}

impl Backing {
    /// Opens it and holds it: nobody else mounts it, or opens it exclusively, from now on.
    pub fn open(path: &Path) -> Result<Self, UblkError> {
        let device = Device::open(path).map_err(|error| UblkError {
            what: error.what,
            subject: error.path,
            cause: error.cause,
            hint: "lsblk".into(),
            errno: 0,
        })?;
        let read_only =
            fs::read_to_string(device.sysfs().join("ro")).is_ok_and(|ro| ro.trim() == "1");
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_DIRECT | libc::O_EXCL | libc::O_CLOEXEC)
            .open(path)
            .map_err(|error| {
                let failed = UblkError::new("hold", path, &error);
                match error.raw_os_error() {
                    Some(libc::EBUSY) => failed.cause(format!("in use{}", holders(&device))),
                    _ => failed,
                }
            })?;
        Ok(Self { device, file, read_only })
    }

    /// Which device it is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Reads whole blocks into aligned memory.
    pub(super) fn read_exact(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    /// Writes the beginning of a mapping.
    pub(super) fn write_pages(&self, from: &Mapping, bytes: usize, offset: u64) -> io::Result<()> {
        self.write_part(from, 0, bytes, offset)
    }

    /// Writes a part of a mapping; whole blocks.
    pub(super) fn write_part(
        &self,
        from: &Mapping,
        at: usize,
        bytes: usize,
        offset: u64,
    ) -> io::Result<()> {
        self.file.write_all_at(from.piece(at, bytes), offset)
    }

    /// What was written, and is done, is durable then.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// How many hardware queues it has; none where that is not its own (device-mapper).
    pub(super) fn hardware_queues(&self) -> Option<u16> {
        let entries = fs::read_dir(self.device.disk_sysfs().join("mq")).ok()?;
        u16::try_from(entries.count()).ok().filter(|count| *count > 0)
    }

    /// The limits of a filter over it, whose buffers take this much.
    /// `discard_max`: what a discard, or a writing of zeroes, may be long at most, bytes.
    pub fn params(&self, buffer_bytes: u32, discard_max: u64) -> Params {
        let disk = self.device.disk_sysfs();
        let number = |name: &str| -> u64 {
            let text = fs::read_to_string(disk.join("queue").join(name));
            text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
        };
        let sectors = |name: &str| u32::try_from(number(name) >> SECTOR_SHIFT).unwrap_or(u32::MAX);
        let write_cache = fs::read_to_string(disk.join("queue/write_cache"));
        let volatile = write_cache.is_ok_and(|text| text.trim() == "write back");
        let attrs = [
            (self.read_only, ATTR_READ_ONLY),
            (number("rotational") == 1, ATTR_ROTATIONAL),
            (volatile, ATTR_VOLATILE_CACHE),
            // Also where the device has none: a write with FUA goes down as one, and the kernel
            // flushes after it there. Were it to flush after it up here, a write that is done but
            // not yet flushed would count as under way with a server that is gone, and the kernel
            // (6.12) would wait for it for ever before it lets another one take over.
            (volatile, ATTR_FUA),
        ];
        let logical =
            shift(u64::from(self.device.logical_block_bytes)).unwrap_or(SECTOR_SHIFT as u8);
        let physical = shift(number("physical_block_size")).unwrap_or(logical).max(logical);
        let io_min = shift(number("minimum_io_size")).unwrap_or(physical);
        let max_sectors = number("max_sectors_kb") << 1;
        let buffer_sectors = buffer_bytes >> SECTOR_SHIFT;
        let basic = ParamBasic {
            attrs: attrs.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit),
            logical_bs_shift: logical,
            physical_bs_shift: physical,
            // Only powers of two can be said. A device without a wish has its smallest good size.
            io_opt_shift: shift(number("optimal_io_size")).unwrap_or(io_min),
            io_min_shift: io_min,
            max_sectors: match u32::try_from(max_sectors) {
                Ok(0) | Err(_) => buffer_sectors,
                Ok(max_sectors) => max_sectors.min(buffer_sectors),
            },
            // The kernel splits at these; of a partition they would lie elsewhere.
            chunk_sectors: match u32::try_from(number("chunk_sectors")) {
                Ok(chunk) if chunk.is_power_of_two() && !self.device.is_partition() => chunk,
                _ => 0,
            },
            dev_sectors: self.device.size_bytes >> SECTOR_SHIFT,
            virt_boundary_mask: 0,
        };
        let most = u32::try_from(discard_max >> SECTOR_SHIFT).unwrap_or(u32::MAX);
        let discard = sectors("discard_max_bytes").min(most);
        let zeroes = sectors("write_zeroes_max_bytes").min(most);
        let granularity = u32::try_from(number("discard_granularity")).unwrap_or(0);
        let mut params = Params { types: PARAM_BASIC, basic, ..Default::default() };
        if !self.read_only && (discard > 0 || zeroes > 0) {
            params.types |= PARAM_DISCARD;
            params.discard = ParamDiscard {
                discard_alignment: u32::try_from(self.discard_alignment()).unwrap_or(0),
                discard_granularity: granularity.max(1 << logical),
                max_discard_sectors: discard,
                max_write_zeroes_sectors: zeroes,
                max_discard_segments: u16::from(discard > 0),
                reserved0: 0,
            };
        }
        params
    }

    fn discard_alignment(&self) -> u64 {
        let text = fs::read_to_string(self.device.sysfs().join("discard_alignment"));
        text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }
}

/// The exponent of a power of two.
fn shift(bytes: u64) -> Option<u8> {
    bytes.is_power_of_two().then(|| bytes.trailing_zeros() as u8).filter(|shift| *shift > 0)
}

/// Who has it, as far as that is cheap to say.
fn holders(device: &Device) -> String {
    if let Some(mount) = device.mounts().ok().and_then(|mounts| mounts.into_iter().next()) {
        return format!(": mounted on {}", mount.path.display());
    }
    let mut folders = vec![device.sysfs()];
    for entry in fs::read_dir(device.sysfs()).into_iter().flatten().flatten() {
        if entry.path().join("partition").exists() {
            folders.push(entry.path());
        }
    }
    for folder in &folders {
        let holder = fs::read_dir(folder.join("holders")).into_iter().flatten().flatten().next();
        if let Some(holder) = holder {
            let name = fs::read_to_string(holder.path().join("dm/name")).unwrap_or_default();
            return match name.trim() {
                "" => format!(" by /dev/{}", holder.file_name().to_string_lossy()),
                name => format!(" by /dev/mapper/{name}"),
            };
        }
    }
    let path = fs::canonicalize(&device.path).unwrap_or_else(|_| device.path.clone());
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let is_swap = swaps
        .lines()
        .any(|line| line.split_whitespace().next().is_some_and(|swap| path == Path::new(swap)));
    if is_swap { " as swap".into() } else { " by another process".into() }
}
