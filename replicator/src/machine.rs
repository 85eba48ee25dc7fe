//! The identity of the machine that this process runs on, as one digest.
//!
//! An agent compares it with the digest that it was enrolled with: on a clone, a restored backup or
//! a replica machine it differs, and the agent stands still. BLAKE3 over, each with its name:
//! the DMI product UUID (root may read it; absent in containers), `/etc/machine-id`, and the WWN or
//! serial of the disk under `/`, if exactly one disk with such an identity lies there. Behind a
//! RAID or a volume group over several disks it is left out, since replacing one of them must not
//! make a new machine. What cannot be read counts as absent.

use std::collections::BTreeSet;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Domain of the digest; another recipe gets another text.
const CONTEXT: &str = "secondsite machine identity v1";
/// Layers of devices between `/` and its disk (partition, RAID, crypt, LV, …) that are followed.
const LAYERS_MAX: usize = 16;

/// Digest of this machine's identity.
pub fn digest() -> [u8; 32] {
    digest_below(Path::new("/"))
}

/// The digest as 64 hex digits.
pub fn hex(digest: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*digest).to_hex().to_string()
}

/// What [`hex`] made.
pub fn from_hex(text: &str) -> Option<[u8; 32]> {
    blake3::Hash::from_hex(text).ok().map(|hash| *hash.as_bytes())
}

fn digest_below(root: &Path) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    let parts = [
        ("dmi", read(&root.join("sys/class/dmi/id/product_uuid"))),
        ("machine-id", read(&root.join("etc/machine-id"))),
        ("disk", root_disk_identity(root)),
    ];
    for (name, value) in parts {
        let Some(value) = value else { continue };
        for field in [name, &value] {
            hasher.update(&(field.len() as u64).to_le_bytes());
            hasher.update(field.as_bytes());
        }
    }
    *hasher.finalize().as_bytes()
}

fn read(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?.trim().to_string();
    (!text.is_empty()).then_some(text)
}

/// WWN or serial of the one disk under `/`.
fn root_disk_identity(root: &Path) -> Option<String> {
    let (major, minor) = root_device(root)?;
    let start = root.join(format!("sys/dev/block/{major}:{minor}")).canonicalize().ok()?;
    let mut found = BTreeSet::new();
    let mut layer = vec![start];
    for _ in 0..LAYERS_MAX {
        let mut below = Vec::new();
        for device in layer {
            if device.join("partition").exists() {
                below.extend(device.parent().map(PathBuf::from));
                continue;
            }
            let slaves = slaves(&device);
            if slaves.is_empty() {
                found.insert(disk_identity(&device)?);
            }
            below.extend(slaves);
        }
        layer = below;
        if layer.is_empty() {
            break;
        }
    }
    // Several paths to one disk have one identity; several disks have several.
    if found.len() == 1 { found.pop_first() } else { None }
}

fn slaves(device: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(device.join("slaves")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.path().canonicalize().ok()).collect()
}

fn disk_identity(disk: &Path) -> Option<String> {
    ["wwid", "device/wwid", "serial", "device/serial"]
        .iter()
        .find_map(|name| read(&disk.join(name)))
}

/// Number of the device that `/` is mounted from. Some file systems (btrfs) show an anonymous
/// number; their source is a device node.
fn root_device(root: &Path) -> Option<(u64, u64)> {
    let mounts = std::fs::read_to_string(root.join("proc/self/mountinfo")).ok()?;
    // The last mount on `/` is the one that is seen.
    let line = mounts.lines().rfind(|line| line.split(' ').nth(4) == Some("/"))?;
    let (major, minor) = line.split(' ').nth(2)?.split_once(':')?;
    let number = (major.parse().ok()?, minor.parse().ok()?);
    if number.0 != 0 {
        return Some(number);
    }
    let source = line.split_once(" - ")?.1.split(' ').nth(1)?;
    let device = std::fs::metadata(root.join(source.strip_prefix('/')?)).ok()?.st_rdev();
    (device != 0).then(|| (nix::sys::stat::major(device), nix::sys::stat::minor(device)))
}

#[cfg(test)]
mod tests {
    use super::{digest, digest_below, from_hex, hex};
    use std::os::unix::fs::symlink;
    use std::path::Path;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// `/` on a logical volume over the given disks, each a partition of it.
    fn machine(root: &Path, disks: &[&str]) {
        write(root, "etc/machine-id", "3d12\n");
        write(root, "sys/class/dmi/id/product_uuid", "UUID-1\n");
        write(root, "proc/self/mountinfo", "1 0 252:0 / / rw - ext4 /dev/mapper/vg-root rw\n");
        let lv = root.join("sys/devices/virtual/block/dm-0");
        std::fs::create_dir_all(lv.join("slaves")).unwrap();
        std::fs::create_dir_all(root.join("sys/dev/block")).unwrap();
        symlink(&lv, root.join("sys/dev/block/252:0")).unwrap();
        for disk in disks {
            let dir = format!("sys/devices/pci/block/{disk}");
            write(root, &format!("{dir}/device/wwid"), &format!("wwn-{disk}"));
            write(root, &format!("{dir}/{disk}1/partition"), "1");
            symlink(root.join(format!("{dir}/{disk}1")), lv.join(format!("slaves/{disk}1")))
                .unwrap();
        }
    }

    #[test]
    fn one_disk_counts_and_several_do_not() {
        let dirs: Vec<_> = (0..5).map(|_| tempfile::tempdir().unwrap()).collect();
        machine(dirs[0].path(), &["sda"]);
        machine(dirs[1].path(), &["sdb"]);
        machine(dirs[2].path(), &["sda", "sdb"]);
        machine(dirs[3].path(), &["sda", "sdc"]);
        machine(dirs[4].path(), &["sda"]);
        let of = |i: usize| digest_below(dirs[i].path());
        assert_ne!(of(0), of(1), "another disk is another machine");
        assert_eq!(of(2), of(3), "a replaced member of a group is not");
        assert_eq!(of(0), of(4));
        write(dirs[4].path(), "sys/class/dmi/id/product_uuid", "UUID-2");
        assert_ne!(of(0), of(4), "another board is another machine");
    }

    #[test]
    fn the_digest_is_stable_and_survives_text() {
        assert_eq!(digest(), digest());
        assert_eq!(from_hex(&hex(&digest())), Some(digest()));
        assert_eq!(from_hex("12"), None);
    }
}
