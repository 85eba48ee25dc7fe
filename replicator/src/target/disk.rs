//! The storage that a volume of the target lives on, behind two small traits, so that a simulator
//! runs the same code over a faulty disk ([`memory`]) that the daemon runs over files ([`Folder`]).
//!
//! Invariants: a write is durable after `sync` of its file, a name after `sync_names` of its
//! folder, and neither before. A file that was removed stays readable for who holds it open. What
//! is read may be younger than what is durable: only [`DiskFile::settle`] makes them the same.

pub mod memory;

use crate::pulse;
use nix::unistd::{Whence, lseek};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How long journal segments grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentBytes {
    /// A longer one ends at the next epoch.
    pub enough: u64,
    /// A longer one ends at the next frame.
    pub max: u64,
}

/// The folder of one volume. Names are relative, with at most one `/`.
pub trait Disk: Send + Sync {
    /// Names of the files in `folder` (`""` is the top), unsorted.
    fn list(&self, folder: &str) -> io::Result<Vec<String>>;
    /// A new file, or an existing one emptied.
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// An existing file.
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// Gives a file another name, replacing what had it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Takes a file's name away.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes creations, renames and removals in `folder` durable.
    fn sync_names(&self, folder: &str) -> io::Result<()>;
    /// Bytes that can still be written.
    fn free_bytes(&self) -> io::Result<u64>;
    /// What to call a file when talking to people.
    fn path(&self, name: &str) -> PathBuf;

    /// How long segments grow here: long enough that files and descriptors stay few, short enough
    /// that space comes back soon. A simulated disk has short ones.
    fn segment_bytes(&self) -> SegmentBytes {
        SegmentBytes { enough: 16 << 20, max: 256 << 20 }
    }

    /// The whole of a file of at most `bytes_max` as the medium has it, or none if there is no such
    /// file.
    fn read(&self, name: &str, bytes_max: u64) -> io::Result<Option<Vec<u8>>> {
        let file = match self.open(name) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        file.settle()?;
        let bytes = file.bytes()?;
        if bytes > bytes_max {
            return Err(io::Error::new(ErrorKind::InvalidData, "it is larger than it can be"));
        }
        let mut content = vec![0; bytes as usize];
        file.read_at(0, &mut content)?;
        Ok(Some(content))
    }

    /// Puts `content` in the place of a file of the top folder: after a crash it is wholly the old
    /// or wholly the new one, and the new one when this has returned.
    fn replace(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let fresh = format!("{name}.new");
        let file = self.create(&fresh)?;
        file.write_at(0, content)?;
        file.sync()?;
        self.rename(&fresh, name)?;
        self.sync_names("")
    }
}

/// An open file or block device. All verbs may be called from several threads.
pub trait DiskFile: Send + Sync {
    /// Fills `buffer`; running into the end is an error.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    /// Writes all of `content`.
    fn write_at(&self, offset: u64, content: &[u8]) -> io::Result<()>;
    /// Makes a range read as zero, giving back its space where that can be done.
    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()>;
    /// Begins to write a range to the medium, so that a later sync has little to do.
    fn write_behind(&self, _offset: u64, _bytes: u64) {}
    /// Makes what was written durable. After an error nobody knows what is: stop.
    fn sync(&self) -> io::Result<()>;
    /// Makes durable what was written, also by a process before this one, and makes reads see the
    /// medium instead of a cache: what is read after this does not go with the power. A cache
    /// still shows what a failed sync has lost.
    fn settle(&self) -> io::Result<()>;
    /// Cuts or extends (with zeros) to `bytes`.
    fn truncate(&self, bytes: u64) -> io::Result<()>;
    /// Its size, bytes.
    fn bytes(&self) -> io::Result<u64>;
    /// The first offset, from `offset` on, that may hold anything but zero; the size if none does.
    fn next_data(&self, offset: u64) -> io::Result<u64>;
    /// The first offset, from `offset` on, from where a hole may follow; the size if none does.
    fn next_hole(&self, _offset: u64) -> io::Result<u64> {
        self.bytes()
    }
}

/// A [`Disk`] in a folder of a file system.
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// Takes the folder, making it, its sub-folders `inner` and its parents below `store` where
    /// they are missing, durably.
    pub fn create(store: &Path, below: &str, inner: &[&str]) -> io::Result<Self> {
        let path = store.join(below);
        let mut made = store.to_path_buf();
        let parts = Path::new(below).components().map(|part| part.as_os_str());
        for part in parts {
            made.push(part);
            make_folder(&made)?;
        }
        for name in inner {
            make_folder(&path.join(name))?;
        }
        Ok(Self { path })
    }

    /// Takes a folder that exists.
    pub fn existing(path: PathBuf) -> Self {
        Self { path }
    }
}

fn make_folder(path: &Path) -> io::Result<()> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(()),
        made => made?,
    }
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

impl Disk for Folder {
    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        pulse::outside(|| {
            let entries = std::fs::read_dir(self.path.join(folder))?;
            entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
        })
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        let file = pulse::outside(|| options.open(self.path.join(name)))?;
        Ok(Arc::new(PlainFile { file }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let path = self.path.join(name);
        let file = pulse::outside(|| OpenOptions::new().read(true).write(true).open(path))?;
        Ok(Arc::new(PlainFile { file }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        pulse::outside(|| std::fs::rename(self.path.join(from), self.path.join(to)))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        pulse::outside(|| std::fs::remove_file(self.path.join(name)))
    }

    fn sync_names(&self, folder: &str) -> io::Result<()> {
        pulse::outside(|| File::open(self.path.join(folder))?.sync_all())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        free_bytes(&self.path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

/// What an ordinary user may still write to the file system of `path`, bytes.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = pulse::outside(|| nix::sys::statvfs::statvfs(path))?;
    Ok(stat.blocks_available() * stat.fragment_size())
}

struct PlainFile {
    file: File,
}

impl PlainFile {
    fn seek(&self, offset: u64, what: Whence) -> io::Result<u64> {
        // The file position is used by nobody else: all other verbs name their offset.
        match pulse::outside(|| lseek(&self.file, offset as i64, what)) {
            Ok(found) => Ok(found as u64),
            Err(nix::errno::Errno::ENXIO) => self.bytes(),
            Err(error) => Err(error.into()),
        }
    }
}

impl DiskFile for PlainFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        pulse::outside(|| self.file.read_exact_at(buffer, offset))
    }

    fn write_at(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        pulse::outside(|| self.file.write_all_at(content, offset))
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        use nix::fcntl::{FallocateFlags, fallocate};
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match pulse::outside(|| fallocate(&self.file, flags, offset as i64, bytes as i64)) {
            Err(nix::errno::Errno::EOPNOTSUPP) => write_zeros(&self.file, offset, bytes),
            done => Ok(done?),
        }
    }

    fn write_behind(&self, offset: u64, bytes: u64) {
        write_behind(&self.file, offset, bytes);
    }

    fn sync(&self) -> io::Result<()> {
        pulse::outside(|| self.file.sync_data())
    }

    fn settle(&self) -> io::Result<()> {
        settle(&self.file)
    }

    fn truncate(&self, bytes: u64) -> io::Result<()> {
        pulse::outside(|| self.file.set_len(bytes))
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn next_data(&self, offset: u64) -> io::Result<u64> {
        self.seek(offset, Whence::SeekData)
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        self.seek(offset, Whence::SeekHole)
    }
}

/// Not waited for, and no error is lost: the next sync reports it.
fn write_behind(file: &File, offset: u64, bytes: u64) {
    let begin = libc::SYNC_FILE_RANGE_WRITE;
    // SAFETY: the descriptor is open, and the call takes no pointer.
    let begin =
        || unsafe { libc::sync_file_range(file.as_raw_fd(), offset as i64, bytes as i64, begin) };
    pulse::outside(begin);
}

fn settle(file: &File) -> io::Result<()> {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    file.sync_all()?;
    // Everything is clean now, so all of it can be forgotten.
    Ok(posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
}

/// A block device, held exclusively.
pub struct Device {
    file: File,
}

/// `BLKGETSIZE64`: `_IOR(0x12, 114, size_t)`, gives bytes.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// `BLKZEROOUT`: `_IO(0x12, 127)`, takes offset and length.
const BLKZEROOUT: libc::c_ulong = 0x127f;

impl Device {
    /// Opens a block device with `O_EXCL`: the kernel refuses while it is mounted or held.
    pub fn open(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::FileTypeExt;
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).custom_flags(libc::O_EXCL).open(path)?;
        if !file.metadata()?.file_type().is_block_device() {
            return Err(io::Error::new(ErrorKind::InvalidInput, "not a block device"));
        }
        Ok(Self { file })
    }
}

impl DiskFile for Device {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        pulse::outside(|| self.file.read_exact_at(buffer, offset))
    }

    fn write_at(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        pulse::outside(|| self.file.write_all_at(content, offset))
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let range = [offset, bytes];
        // SAFETY: the descriptor is open and BLKZEROOUT reads two u64 from the pointer given,
        // which outlives the call.
        let zero = || unsafe { libc::ioctl(self.file.as_raw_fd(), BLKZEROOUT, range.as_ptr()) };
        let done = pulse::outside(zero);
        if done == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            // Ranges that are no multiple of the device's sectors, or a device without it.
            error if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
                write_zeros(&self.file, offset, bytes)
            }
            error => Err(error),
        }
    }

    fn write_behind(&self, offset: u64, bytes: u64) {
        write_behind(&self.file, offset, bytes);
    }

    fn sync(&self) -> io::Result<()> {
        pulse::outside(|| self.file.sync_data())
    }

    fn settle(&self) -> io::Result<()> {
        settle(&self.file)
    }

    fn truncate(&self, _bytes: u64) -> io::Result<()> {
        Err(io::Error::new(ErrorKind::Unsupported, "a device cannot be truncated"))
    }

    fn bytes(&self) -> io::Result<u64> {
        let mut bytes = 0u64;
        // SAFETY: the descriptor is open and BLKGETSIZE64 writes one u64 to the pointer given.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(bytes)
    }

    fn next_data(&self, offset: u64) -> io::Result<u64> {
        Ok(offset)
    }
}

fn write_zeros(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    const CHUNK_BYTES: u64 = 1 << 20;
    let zeros = vec![0; bytes.min(CHUNK_BYTES) as usize];
    let mut done = 0;
    while done < bytes {
        let count = (bytes - done).min(CHUNK_BYTES);
        pulse::outside(|| file.write_all_at(&zeros[..count as usize], offset + done))?;
        done += count;
    }
    Ok(())
}
