//! Marks by which udev hides a device that a filter serves from; the rule is
//! packaging/udev/59-secondsite-filtered.rules.
//!
//! Never hide what is mounted by its own node: systemd takes a hidden device for one that is gone,
//! and unmounts it.

use crate::device::{Device, folders_in, number_of};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the rule looks.
pub const HIDDEN_DIR: &str = "/run/secondsite/filtered";

/// Hides the device and its partitions, from the next event on, and makes one. `dir` is
/// [`HIDDEN_DIR`], but for tests.
pub fn hide(device: &Device, dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    each(device, |number, sysfs| {
        fs::write(dir.join(number), b"")?;
        announce(sysfs)
    })
}

/// Shows them again.
pub fn show(device: &Device, dir: &Path) -> io::Result<()> {
    each(device, |number, sysfs| {
        match fs::remove_file(dir.join(number)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        announce(sysfs)
    })
}

fn each(device: &Device, mut act: impl FnMut(&str, &Path) -> io::Result<()>) -> io::Result<()> {
    let own = device.sysfs();
    let parts = folders_in(&own).into_iter().filter(|path| path.join("partition").exists());
    let all: Vec<PathBuf> = std::iter::once(own.clone()).chain(parts).collect();
    all.iter().try_for_each(|sysfs| {
        let (major, minor) = number_of(sysfs).ok_or(io::ErrorKind::NotFound)?;
        act(&format!("{major}:{minor}"), sysfs)
    })
}

/// udev looks at the device again.
fn announce(sysfs: &Path) -> io::Result<()> {
    fs::write(sysfs.join("uevent"), "change")
}
