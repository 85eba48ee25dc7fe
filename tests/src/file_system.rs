//! The file systems that a protected volume may carry: how one is made, and how a copy of a replica
//! volume is judged, by the kernel that replays its log and by the file system's own checker.

use crate::block::{LoopDevice, Mount, run};
use std::path::Path;
use std::process::Command;

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// By default, with a journal.
    Ext4,
    /// With its log.
    Xfs,
    /// Copy on write; a log tree for fsync.
    Btrfs,
}

impl FileSystem {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ext4, Self::Xfs, Self::Btrfs];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    /// How the source is mounted.
    pub fn options(self) -> &'static str {
        match self {
            Self::Ext4 | Self::Xfs => "defaults",
            // By itself btrfs discards in the background, also while it is frozen.
            Self::Btrfs => "nodiscard",
        }
    }

    /// Makes one with blocks of 4 KiB.
    pub fn make(self, device: &LoopDevice) {
        let path = device.path().to_str().expect("UTF-8");
        match self {
            Self::Ext4 => device.format_ext4(&["-b", "4096"]),
            Self::Xfs => drop(run("mkfs.xfs", &["-q", "-f", path])),
            Self::Btrfs => drop(run("mkfs.btrfs", &["-q", "-f", path])),
        }
    }

    /// Checks a crash image, in place: it must mount (which replays its log) and be clean then.
    /// The file system that it is an image of may be mounted meanwhile.
    pub fn check(self, image: &Path, mountpoint: &Path) {
        let device = LoopDevice::over(image, false);
        let path = device.path().to_str().expect("UTF-8");
        match self {
            Self::Ext4 => {
                Mount::new(device.path(), mountpoint, "defaults").unmount();
                judge("e2fsck", &["-f", "-n", path]);
            }
            Self::Xfs => {
                Mount::new(device.path(), mountpoint, "nouuid").unmount();
                judge("xfs_repair", &["-n", path]);
            }
            Self::Btrfs => {
                // Both before and after: what a crash leaves must be whole without the log, too.
                judge("btrfs", &["check", "--readonly", path]);
                if Path::new("/sys/fs/btrfs/features/temp_fsid").exists() {
                    Mount::new(device.path(), mountpoint, "defaults").unmount();
                    judge("btrfs", &["check", "--readonly", path]);
                } else {
                    eprintln!("  btrfs: before Linux 6.7 no copy can be mounted beside its source");
                }
            }
        }
    }
}

/// Runs a checker, which says with its exit code that nothing is wrong.
fn judge(checker: &str, arguments: &[&str]) {
    let output = Command::new(checker).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{checker}: {error}"));
    let talk = [output.stdout, output.stderr].concat();
    let status = output.status;
    assert!(status.success(), "{checker}: {status}\n{}", String::from_utf8_lossy(&talk));
}
