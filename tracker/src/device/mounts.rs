//! Mounted file systems by the numbers of the devices that they lie on.

use super::{folders_in, name_of, sysfs_of};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// File systems on block devices that implement FIFREEZE.
const FREEZABLE: [&str; 12] = [
    "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "gfs2", "jfs", "nilfs2", "ocfs2",
    "reiserfs", "xfs",
];

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

/// One line of mountinfo.
#[doc(hidden)]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub number: (u32, u32),
    pub path: PathBuf,
    pub kind: String,
    pub source: PathBuf,
}

/// What is mounted from the devices of these numbers.
pub(super) fn on(numbers: &BTreeSet<(u32, u32)>) -> io::Result<Vec<Mount>> {
    let text = fs::read("/proc/self/mountinfo")?;
    let mut seen = BTreeSet::new();
    let mut mounts = Vec::new();
    for line in text.split(|byte| *byte == b'\n').filter_map(parse) {
        // Of the same file system mounted again, or hidden below another mount, one is enough.
        let (is_on, same) = match line.kind.as_str() {
            "btrfs" => btrfs(&line, numbers),
            _ => (numbers.contains(&line.number), format!("{:?}", line.number)),
        };
        // Asked only of ours: a dead network mount would never answer.
        let is_visible = || {
            line.kind == "btrfs"
                || fs::metadata(&line.path).is_ok_and(|meta| number(meta.dev()) == line.number)
        };
        if is_on && is_visible() && seen.insert(same) {
            let freezable = FREEZABLE.contains(&line.kind.as_str());
            mounts.push(Mount { path: line.path, kind: line.kind, freezable });
        }
    }
    Ok(mounts)
}

/// The areas of /proc/swaps that are devices of these numbers, or files on them.
pub(super) fn swaps_on(numbers: &BTreeSet<(u32, u32)>) -> io::Result<Vec<PathBuf>> {
    let text = fs::read("/proc/swaps")?;
    let lines = text.split(|byte| *byte == b'\n').skip(1);
    let paths = lines.filter_map(|line| line.split(u8::is_ascii_whitespace).next()).map(unescape);
    let is_on = |path: &PathBuf| {
        let found = fs::metadata(path).map(|meta| match meta.rdev() {
            0 => number(meta.dev()),
            rdev => number(rdev),
        });
        found.is_ok_and(|number| numbers.contains(&number))
    };
    Ok(paths.filter(is_on).collect())
}

fn number(dev: u64) -> (u32, u32) {
    (libc::major(dev), libc::minor(dev))
}

/// btrfs shows anonymous numbers, one for each subvolume: go by its devices. Returns whether one
/// of them is meant, and what is the same for all mounts of the file system.
fn btrfs(line: &Line, numbers: &BTreeSet<(u32, u32)>) -> (bool, String) {
    let Ok(meta) = fs::metadata(&line.source) else { return (false, String::new()) };
    let source = number(meta.rdev());
    let name = name_of(&sysfs_of(source.0, source.1));
    let ours: Vec<String> =
        numbers.iter().map(|number| name_of(&sysfs_of(number.0, number.1))).collect();
    for fs in folders_in(Path::new("/sys/fs/btrfs")) {
        let devices: Vec<String> = folders_in(&fs.join("devices"))
            .iter()
            .filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
            .collect();
        if devices.contains(&name) {
            let is_on = devices.iter().any(|device| ours.contains(device));
            return (is_on, fs.to_string_lossy().into_owned());
        }
    }
    (numbers.contains(&source), name)
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`: the fields before the dash vary in number.
#[doc(hidden)]
pub fn parse(line: &[u8]) -> Option<Line> {
    let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let dash = words.iter().position(|word| *word == b"-")?;
    let number = std::str::from_utf8(words.get(2)?).ok()?;
    let (major, minor) = number.split_once(':')?;
    Some(Line {
        number: (major.parse().ok()?, minor.parse().ok()?),
        path: unescape(words.get(4)?),
        kind: String::from_utf8_lossy(words.get(dash + 1)?).into_owned(),
        source: unescape(words.get(dash + 2)?),
    })
}

/// The kernel writes space, tab, newline and backslash as `\ooo`.
fn unescape(word: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((first, after)) = rest.split_first() {
        let octal = (*first == b'\\').then(|| after.get(..3)).flatten();
        let code = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::parse;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn a_line_with_escapes_and_optional_fields() {
        let line = b"36 35 98:17 / /mnt/a\\040b\\134 rw shared:1 master:2 - ext4 /dev/sd\\011x rw";
        let line = parse(line).unwrap();
        assert_eq!(line.number, (98, 17));
        assert_eq!(line.path.as_os_str().as_bytes(), b"/mnt/a b\\");
        assert_eq!(line.source.as_os_str().as_bytes(), b"/dev/sd\tx");
        assert_eq!(line.kind, "ext4");
    }
}
