//! Device-mapper devices, by the ioctls of `/dev/mapper/control` (linux/dm-ioctl.h).
//!
//! A device is named by its number; by its name only to be found. Tables are read and written as the
//! kernel has them, word for word: what is read can be loaded again. They may hold keys (crypt), so
//! the kernel is told to wipe its buffers, and ours wipe themselves. [`resume`] and [`status`] make
//! one system call, allocate nothing, and may be called where the device is suspended.

mod table;

pub use table::{Params, Table, Target};

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
pub(crate) use table::Buffer;

/// Where device-mapper is asked.
pub const CONTROL: &str = "/dev/mapper/control";
/// Longest name of a device, without the NUL.
pub const NAME_BYTES_MAX: usize = 127;
/// Room for a table at first, and at most.
const TABLE_BYTES: usize = 16 << 10;
const TABLE_BYTES_MAX: usize = 4 << 20;

/// Version of the interface that the structures here are of; the kernel's may be newer.
const VERSION: [u32; 3] = [4, 0, 0];

const DEV_CREATE: u32 = 3;
const DEV_REMOVE: u32 = 4;
const DEV_SUSPEND: u32 = 6;
const DEV_STATUS: u32 = 7;
const TABLE_LOAD: u32 = 9;
const TABLE_CLEAR: u32 = 10;
const TABLE_STATUS: u32 = 12;

/// Flags of linux/dm-ioctl.h.
const READONLY: u32 = 1 << 0;
pub(crate) const SUSPEND: u32 = 1 << 1;
const STATUS_TABLE: u32 = 1 << 4;
const INACTIVE_PRESENT: u32 = 1 << 6;
const BUFFER_FULL: u32 = 1 << 8;
/// Leave the file system above as it is: nothing is flushed, nothing is frozen.
pub(crate) const SKIP_LOCKFS: u32 = 1 << 10;
const SECURE_DATA: u32 = 1 << 15;

/// `struct dm_ioctl`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event: u32,
    padding: u32,
    dev: u64,
    name: [u8; NAME_BYTES_MAX + 1],
    uuid: [u8; 129],
    data: [u8; 7],
}
const HEADER_BYTES: usize = size_of::<Header>();
const _: () = assert!(HEADER_BYTES == 312 && HEADER_BYTES.is_multiple_of(8));
const _: () = assert!(align_of::<Header>() == 8);

/// `_IOWR(0xfd, command, struct dm_ioctl)`.
const fn request(command: u32) -> libc::Ioctl {
    (3 << 30 | (HEADER_BYTES as u32) << 16 | 0xfd << 8 | command) as libc::Ioctl
}
const _: () = assert!(request(DEV_SUSPEND) as u32 == 0xc138_fd06);

impl Header {
    fn new(dev: u64, flags: u32) -> Self {
        Self {
            version: VERSION,
            data_size: HEADER_BYTES as u32,
            data_start: HEADER_BYTES as u32,
            target_count: 0,
            open_count: 0,
            flags,
            event: 0,
            padding: 0,
            dev,
            name: [0; NAME_BYTES_MAX + 1],
            uuid: [0; 129],
            data: [0; 7],
        }
    }
}

/// An operation on a device that failed.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {device}: {source}")]
pub struct DmError {
    /// What was asked for.
    pub operation: &'static str,
    /// Of which device: its number or name.
    pub device: String,
    /// The kernel's answer.
    pub source: io::Error,
}

impl DmError {
    /// Whether there is no such device.
    pub fn is_gone(&self) -> bool {
        self.source.raw_os_error() == Some(libc::ENXIO)
    }

    /// Whether somebody has the device open, or holds it.
    pub fn is_busy(&self) -> bool {
        self.source.raw_os_error() == Some(libc::EBUSY)
    }
}

/// The number of a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Number {
    /// Its driver.
    pub major: u32,
    /// Which of that driver's.
    pub minor: u32,
}

impl Number {
    /// As device-mapper writes it (`huge_encode_dev`).
    pub(crate) fn encoded(self) -> u64 {
        let (major, minor) = (u64::from(self.major), u64::from(self.minor));
        (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
    }

    fn decoded(dev: u64) -> Self {
        let minor = (dev & 0xff) | ((dev >> 12) & 0xf_ff00);
        Self { major: ((dev >> 8) & 0xfff) as u32, minor: minor as u32 }
    }

    /// Its node, by the kernel's name for it: there whether udev runs or not.
    pub(crate) fn node(self) -> Option<PathBuf> {
        let sysfs = std::fs::canonicalize(crate::device::sysfs_of(self.major, self.minor)).ok()?;
        let name = sysfs.file_name()?.to_string_lossy().replace('!', "/");
        Some(Path::new("/dev").join(name))
    }
}

impl std::fmt::Display for Number {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}:{}", self.major, self.minor)
    }
}

/// What the kernel says of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Its number.
    pub number: Number,
    /// How many events its targets have raised.
    pub event: u32,
    /// Its I/O waits.
    pub suspended: bool,
    /// It takes no writes.
    pub read_only: bool,
    /// A table is loaded that is not live yet.
    pub has_loaded_table: bool,
    /// How many have it open, mounts and devices above it included.
    pub open_count: i32,
    name: [u8; NAME_BYTES_MAX + 1],
    uuid: [u8; 129],
}

impl Status {
    fn of(header: &Header) -> Self {
        Self {
            number: Number::decoded(header.dev),
            event: header.event,
            suspended: header.flags & SUSPEND != 0,
            read_only: header.flags & READONLY != 0,
            has_loaded_table: header.flags & INACTIVE_PRESENT != 0,
            open_count: header.open_count,
            name: header.name,
            uuid: header.uuid,
        }
    }

    /// Its name.
    pub fn name(&self) -> String {
        String::from_utf8_lossy(until_nul(&self.name)).into_owned()
    }

    /// Its UUID: any text that its maker chose, or none.
    pub fn uuid(&self) -> String {
        String::from_utf8_lossy(until_nul(&self.uuid)).into_owned()
    }

    /// Whether both are the same device, whatever its table; numbers are given again.
    pub(crate) fn is_same_device(&self, other: &Self) -> bool {
        // A device without a UUID is known by its name.
        let without = self.uuid[0] == 0;
        self.number == other.number
            && self.uuid == other.uuid
            && (!without || self.name == other.name)
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// The way to device-mapper.
#[derive(Debug)]
pub struct Control(File);

impl Control {
    /// Opens it; fails where the kernel has no device-mapper.
    pub fn open() -> Result<Self, DmError> {
        let file = OpenOptions::new().read(true).write(true).open(CONTROL);
        file.map(Self).map_err(|source| DmError {
            operation: "open",
            device: CONTROL.into(),
            source,
        })
    }

    pub(crate) fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// The device of this number.
    pub fn status(&self, number: Number) -> Result<Status, DmError> {
        status(self.as_raw_fd(), number.encoded()).map_err(fails("look at", number))
    }

    /// The device of this name, if there is one.
    pub fn find(&self, name: &str) -> Result<Option<Status>, DmError> {
        let fails = fails("look for", name);
        let mut header = Header::new(0, 0);
        if !put(&mut header.name, name) {
            return Err(fails(io::ErrorKind::InvalidInput.into()));
        }
        match call(self.as_raw_fd(), DEV_STATUS, &mut header) {
            Ok(()) => Ok(Some(Status::of(&header))),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            Err(error) => Err(fails(error)),
        }
    }

    /// The live table of a device.
    pub fn table(&self, number: Number) -> Result<Table, DmError> {
        let fails = fails("read the table of", number);
        let mut bytes = TABLE_BYTES;
        loop {
            let mut buffer = Buffer::zeroed(HEADER_BYTES + bytes);
            let answer = read_table(self.as_raw_fd(), number.encoded(), &mut buffer);
            let header = answer.map_err(&fails)?;
            if header.flags & BUFFER_FULL == 0 {
                let data = &buffer.bytes()[HEADER_BYTES..];
                let targets = table::parse(data, header.target_count)
                    .ok_or_else(|| fails(io::Error::other("the kernel's answer makes no sense")))?;
                return Ok(Table { targets, status: Status::of(&header) });
            }
            bytes *= 4;
            if bytes > TABLE_BYTES_MAX {
                return Err(fails(io::ErrorKind::FileTooLarge.into()));
            }
        }
    }

    /// Makes a device without a table.
    pub fn create(&self, name: &str, uuid: &str) -> Result<Status, DmError> {
        let fails = fails("make", name);
        let mut header = Header::new(0, 0);
        if !put(&mut header.name, name) || !put(&mut header.uuid, uuid) {
            return Err(fails(io::ErrorKind::InvalidInput.into()));
        }
        call(self.as_raw_fd(), DEV_CREATE, &mut header).map_err(fails)?;
        Ok(Status::of(&header))
    }

    /// Loads a table beside the live one. The next [`resume`] makes it live.
    pub fn load(&self, number: Number, targets: &[Target]) -> Result<(), DmError> {
        let mut buffer = table::write(HEADER_BYTES, targets);
        let mut header = Header::new(number.encoded(), SECURE_DATA);
        header.data_size = buffer.bytes().len() as u32;
        header.target_count = targets.len() as u32;
        call_with(self.as_raw_fd(), TABLE_LOAD, &header, &mut buffer)
            .map(drop)
            .map_err(fails("load a table for", number))
    }

    /// Drops what is loaded and not live.
    pub fn clear(&self, number: Number) -> Result<(), DmError> {
        clear(self.as_raw_fd(), number.encoded())
            .map_err(fails("clear the loaded table of", number))
    }

    /// Makes the loaded table live, if there is one, and lets the I/O go on.
    pub fn resume(&self, number: Number) -> Result<(), DmError> {
        resume(self.as_raw_fd(), number.encoded()).map_err(fails("resume", number))
    }

    /// Removes a device that nobody has open.
    pub fn remove(&self, number: Number) -> Result<(), DmError> {
        let mut header = Header::new(number.encoded(), 0);
        call(self.as_raw_fd(), DEV_REMOVE, &mut header).map_err(fails("remove", number))
    }
}

/// Makes the loaded table live, if there is one: in this one call the kernel holds new I/O back,
/// waits for what is in flight, changes the table and lets all go on. A signal that arrives while it
/// waits undoes all of it (EINTR). Without a loaded table it only resumes.
pub(crate) fn resume(control: RawFd, dev: u64) -> io::Result<()> {
    call(control, DEV_SUSPEND, &mut Header::new(dev, SKIP_LOCKFS))
}

/// Suspends.
pub(crate) fn suspend(control: RawFd, dev: u64) -> io::Result<()> {
    call(control, DEV_SUSPEND, &mut Header::new(dev, SUSPEND | SKIP_LOCKFS))
}

pub(crate) fn clear(control: RawFd, dev: u64) -> io::Result<()> {
    call(control, TABLE_CLEAR, &mut Header::new(dev, 0))
}

pub(crate) fn status(control: RawFd, dev: u64) -> io::Result<Status> {
    let mut header = Header::new(dev, 0);
    call(control, DEV_STATUS, &mut header)?;
    Ok(Status::of(&header))
}

/// Whether the live table of a device is exactly this one target, as its line `params` says it; with
/// the status that came along. Allocates nothing: `buffer` need not have room for a longer table.
pub(crate) fn is_linear(
    control: RawFd,
    dev: u64,
    sectors: u64,
    params: &[u8],
    buffer: &mut Buffer,
) -> io::Result<(bool, Status)> {
    let header = read_table(control, dev, buffer)?;
    let data = &buffer.bytes()[HEADER_BYTES..];
    let full = header.flags & BUFFER_FULL != 0;
    let is = !full && header.target_count == 1 && table::is_linear(data, sectors, params);
    Ok((is, Status::of(&header)))
}

/// Room for the table of [`is_linear`].
pub(crate) fn small_buffer() -> Buffer {
    Buffer::zeroed(HEADER_BYTES + 1024)
}

fn read_table(control: RawFd, dev: u64, buffer: &mut Buffer) -> io::Result<Header> {
    let mut header = Header::new(dev, STATUS_TABLE | SECURE_DATA);
    header.data_size = buffer.bytes().len() as u32;
    call_with(control, TABLE_STATUS, &header, buffer)
}

/// A call with data behind the header, in a buffer of `header.data_size` bytes.
fn call_with(
    control: RawFd,
    command: u32,
    header: &Header,
    buffer: &mut Buffer,
) -> io::Result<Header> {
    assert!(
        buffer.bytes().len() >= HEADER_BYTES && header.data_size as usize == buffer.bytes().len()
    );
    let at = buffer.as_mut_ptr().cast::<Header>();
    // SAFETY: the buffer is aligned to 8 bytes and has room for a header, of which any bytes are one;
    // the kernel reads and writes at most the `data_size` bytes that the buffer has.
    unsafe {
        at.write(*header);
        let result = libc::ioctl(control, request(command), at);
        if result == -1 { Err(io::Error::last_os_error()) } else { Ok(at.read()) }
    }
}

fn call(control: RawFd, command: u32, header: &mut Header) -> io::Result<()> {
    // SAFETY: without data the kernel reads and writes the header alone, which `data_size` says.
    let result = unsafe { libc::ioctl(control, request(command), header as *mut Header) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Copies a text with its NUL; false when it has no room, or one inside.
fn put(field: &mut [u8], text: &str) -> bool {
    let fits = text.len() < field.len() && !text.as_bytes().contains(&0);
    if fits {
        field[..text.len()].copy_from_slice(text.as_bytes());
    }
    fits
}

fn fails(operation: &'static str, device: impl ToString) -> impl Fn(io::Error) -> DmError {
    let device = device.to_string();
    move |source| DmError { operation, device: device.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::{Number, put};

    #[test]
    fn numbers_are_written_as_the_kernel_does() {
        for (major, minor, dev) in
            [(8, 16, 0x810), (253, 0, 0xfd00), (259, 300, 0x11_032c), (253, 0xf_ffff, 0xfff0_fdff)]
        {
            let number = Number { major, minor };
            assert_eq!((number.encoded(), Number::decoded(dev)), (dev, number), "{number}");
        }
    }

    #[test]
    fn a_text_without_room_is_refused() {
        assert!(put(&mut [0; 4], "abc"));
        assert!(!put(&mut [0; 4], "abcd"));
        assert!(!put(&mut [0; 9], "a\0b"));
    }
}
