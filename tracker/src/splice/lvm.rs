//! LVM's own lock on a volume group: while we hold it, LVM changes no table of the group, and while
//! LVM holds it, we change none. Nothing else of LVM is used.
//!
//! LVM locks `V_GROUP` in its locking directory with flock; it removes the file when it is done, so
//! that who waited must look whether the file is still the one of that name.

use crate::dm::Status;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// `locking_dir` as it comes.
const LOCKING_DIR: &str = "/run/lock/lvm";
/// How long LVM may take for what it does to the group.
const WAIT_MAX: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(20);

/// Held until it is dropped.
pub(super) struct GroupLock(#[expect(dead_code, reason = "its descriptor is the lock")] File);

/// Locks the group of an LVM volume; for others, or where LVM has no locks, there is nothing to do.
/// An error of the kind `WouldBlock`: LVM is at work.
pub(super) fn lock(status: &Status) -> io::Result<Option<GroupLock>> {
    let (uuid, name) = (status.uuid(), status.name());
    if !uuid.starts_with("LVM-") {
        return Ok(None);
    }
    let path = Path::new(LOCKING_DIR).join(format!("V_{}", group_of(&name)));
    let start = Instant::now();
    loop {
        let file = match OpenOptions::new().create(true).append(true).open(&path) {
            // No LVM has run here since the start of the machine.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        match file.try_lock() {
            Ok(()) if is_still(&file, &path) => return Ok(Some(GroupLock(file))),
            Ok(()) => continue,
            Err(fs::TryLockError::Error(error)) => return Err(error),
            Err(fs::TryLockError::WouldBlock) if start.elapsed() > WAIT_MAX => {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Err(fs::TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
        }
    }
}

fn is_still(file: &File, path: &Path) -> bool {
    let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    matches!((file.metadata(), fs::metadata(path)), (Ok(a), Ok(b)) if same(&a, &b))
}

/// `GROUP-VOLUME`, with every dash inside a name doubled.
pub(super) fn group_of(name: &str) -> String {
    let mut group = String::new();
    let mut letters = name.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == '-' && letters.next_if_eq(&'-').is_none() {
            break;
        }
        group.push(letter);
    }
    group
}

#[cfg(test)]
mod tests {
    use super::group_of;

    #[test]
    fn the_group_in_a_name() {
        for (name, group) in
            [("vg0-pg", "vg0"), ("vg--0-pg--data", "vg-0"), ("a----b-c", "a--b"), ("vg0", "vg0")]
        {
            assert_eq!(group_of(name), group);
        }
    }
}
