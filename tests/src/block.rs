//! Block devices made for a test: loop devices over sparse files, mounts, and the byte-for-byte
//! comparison.

use crate::wait_until;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Runs a command that must succeed; returns its trimmed output.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A loop device; detached when dropped.
pub struct LoopDevice {
    path: PathBuf,
    file: PathBuf,
}

impl LoopDevice {
    /// Over a new sparse file of `bytes` in `dir`.
    pub fn sparse(dir: &Path, name: &str, bytes: u64) -> Self {
        let file = dir.join(name);
        File::create(&file).and_then(|file| file.set_len(bytes)).expect("a sparse file");
        Self::over(&file, false)
    }

    /// Over an existing file.
    pub fn over(file: &Path, direct: bool) -> Self {
        let name = file.to_str().expect("UTF-8");
        let direct = if direct { "--direct-io=on" } else { "--direct-io=off" };
        let path = run("losetup", &["--find", "--show", direct, name]).into();
        Self { path, file: file.to_owned() }
    }

    /// Makes file and device so long, while they are in use.
    pub fn resize(&self, bytes: u64) {
        let file = std::fs::OpenOptions::new().write(true).open(&self.file).expect("its file");
        file.set_len(bytes).expect("another length");
        run("losetup", &["--set-capacity", self.path.to_str().expect("UTF-8")]);
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `loopN`: the volume's name.
    pub fn name(&self) -> &str {
        self.path.file_name().and_then(|name| name.to_str()).expect("/dev/loopN")
    }

    /// Makes an ext4 on it; by default a small one has blocks of 1 KiB.
    pub fn format_ext4(&self, options: &[&str]) {
        let device = self.path.to_str().expect("UTF-8");
        run("mkfs.ext4", &[options, &["-q", "-F", device]].concat());
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

/// A mounted file system; unmounted when dropped.
pub struct Mount {
    device: PathBuf,
    path: PathBuf,
}

impl Mount {
    /// Mounts `device` on a new folder.
    pub fn new(device: &Path, path: &Path, options: &str) -> Self {
        std::fs::create_dir_all(path).expect("a mount point");
        let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
        run("mount", &["-o", options, &text(device), &text(path)]);
        Self { device: device.to_owned(), path: path.to_owned() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Unmounts, everywhere: afterwards the file system has written all that it ever will. The agent
    /// holds a mount for the moment of a freeze or sync, and another mount namespace may have a copy
    /// of it: both are waited for.
    pub fn unmount(self) {
        wait_until("it is unmounted", Duration::from_secs(10), || {
            let output = Command::new("umount").arg(&self.path).output().expect("umount runs");
            let talk = || String::from_utf8_lossy(&output.stderr).into_owned();
            output.status.success().then_some(()).ok_or_else(talk)
        });
        wait_until("no other namespace has it mounted", Duration::from_secs(60), || {
            let alone = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&self.device);
            alone.map(drop).map_err(|error| format!("{}: {error}", self.device.display()))
        });
        std::mem::forget(self);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.path).status();
    }
}

/// Block size of [`differences`], bytes.
pub const COMPARE_BYTES: usize = 4096;

/// Compares two files or devices; returns the offsets of blocks that differ. A different length is
/// a panic.
pub fn differences(left: &Path, right: &Path) -> Vec<u64> {
    let (mut left, left_bytes) = open(left);
    let (mut right, right_bytes) = open(right);
    assert_eq!(left_bytes, right_bytes, "the two sides have different sizes");
    let mut offsets = Vec::new();
    let mut buffers = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < left_bytes {
        let count = (left_bytes - at).min(buffers.0.len() as u64) as usize;
        let (a, b) = (&mut buffers.0[..count], &mut buffers.1[..count]);
        left.read_exact(a).expect("read the left side");
        right.read_exact(b).expect("read the right side");
        for i in (0..count).step_by(COMPARE_BYTES) {
            let end = (i + COMPARE_BYTES).min(count);
            if a[i..end] != b[i..end] {
                offsets.push(at + i as u64);
            }
        }
        at += count as u64;
    }
    offsets
}

/// Panics unless both are the same, byte for byte.
pub fn assert_equal(left: &Path, right: &Path) {
    let differing = differences(left, right);
    assert!(
        differing.is_empty(),
        "{} and {} differ in {} blocks of {COMPARE_BYTES}, the first at {:?}",
        left.display(),
        right.display(),
        differing.len(),
        &differing[..differing.len().min(8)]
    );
}

mod ioctl {
    // <linux/fs.h>: flushes and drops the page cache of a block device.
    nix::ioctl_none!(blkflsbuf, 0x12, 97);
}

/// Opens a file or device for reading, with nothing of it in the page cache; also its size, bytes.
pub(crate) fn open(path: &Path) -> (File, u64) {
    use std::io::{Seek, SeekFrom};
    use std::os::unix::fs::FileTypeExt;
    let mut file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    if file.metadata().expect("metadata").file_type().is_block_device() {
        // SAFETY: the descriptor is open, and BLKFLSBUF takes no argument.
        unsafe { ioctl::blkflsbuf(file.as_raw_fd()) }.expect("BLKFLSBUF");
    }
    let bytes = file.seek(SeekFrom::End(0)).expect("its size");
    file.rewind().expect("rewind");
    (file, bytes)
}
