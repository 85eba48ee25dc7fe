//! A reserve, opened: held exclusively, ours or made ours, and who owns which part of it.
//!
//! What somebody else may need is never written to: a device that is in use is not got, and one
//! that carries a signature, or belongs to another machine, is refused. Before a volume's part
//! stands in the superblock, nothing in it can be taken for a log.

use super::UblkError;
use super::backing::Backing;
use super::memory::Mapping;
use crate::filter::reserve::{PAGE_BYTES, PageError, Part, Superblock};
use std::io;
use std::path::Path;
use std::sync::Arc;

/// What is looked at for signatures: at the beginning, and at the end.
const HEAD_BYTES: usize = 260 << 10;
const TAIL_BYTES: usize = 128 << 10;

/// An opened reserve.
pub struct Reserve {
    backing: Arc<Backing>,
    superblock: Superblock,
}

impl Reserve {
    /// Opens it for this machine; makes it one if it carries nothing.
    pub fn open(path: &Path, owner: &str) -> Result<Self, UblkError> {
        let backing = Backing::open(path)?;
        let refused = |cause: String| refusal(path, cause);
        let fails = |error: io::Error| UblkError::new("read the reserve", path, &error);
        let bytes = backing.device().size_bytes;
        if backing.is_read_only() {
            return Err(refused("it is read-only".into()));
        }
        let pages = read(&backing, 0, 2 * PAGE_BYTES).map_err(fails)?;
        let superblock = match Superblock::decode(&pages, bytes) {
            Ok(found) if found.owner == owner => found,
            Ok(found) => {
                return Err(refused(format!("it is the reserve of machine {}", found.owner)));
            }
            Err(PageError::Foreign) => {
                if let Some(what) = signature(&backing).map_err(fails)? {
                    return Err(refused(format!("it carries {what}")));
                }
                Superblock::new(bytes, owner)
            }
            Err(error) => return Err(refused(format!("its superblock: {error}"))),
        };
        Ok(Self { backing: Arc::new(backing), superblock })
    }

    /// The device.
    pub fn backing(&self) -> &Arc<Backing> {
        &self.backing
    }

    /// The part of a volume, if it has one for this size.
    pub fn part(&self, id: &str, volume_bytes: u64, block_bytes: u32) -> Option<&Part> {
        self.superblock
            .part(id)
            .filter(|part| (part.volume_bytes, part.block_bytes) == (volume_bytes, block_bytes))
    }

    /// Gives a volume a part of its own, with nothing in it.
    pub fn give(
        &mut self,
        id: &str,
        volume_bytes: u64,
        block_bytes: u32,
    ) -> Result<Part, UblkError> {
        let path = self.backing.device().path.clone();
        let mut next = self.superblock.clone();
        next.parts.retain(|part| part.id != id);
        let part = next
            .give(id, volume_bytes, block_bytes)
            .map_err(|why| refusal(&path, why.to_string()))?;
        let fails = |error: io::Error| UblkError::new("write the reserve", &path, &error);
        let blank = Mapping::anonymous(2 * PAGE_BYTES).map_err(fails)?;
        self.backing.write_pages(&blank, 2 * PAGE_BYTES, part.start).map_err(fails)?;
        self.backing.flush().map_err(fails)?;
        self.change(next).map_err(fails)?;
        Ok(part)
    }

    /// Takes a volume's part back.
    pub fn take_back(&mut self, id: &str) -> io::Result<()> {
        if self.superblock.part(id).is_none() {
            return Ok(());
        }
        let mut next = self.superblock.clone();
        next.parts.retain(|part| part.id != id);
        self.change(next)
    }

    fn change(&mut self, mut next: Superblock) -> io::Result<()> {
        next.number += 1;
        let mut page = Mapping::anonymous(PAGE_BYTES)?;
        page.bytes_mut()[..PAGE_BYTES].copy_from_slice(&next.encode());
        let at = next.number % 2 * PAGE_BYTES as u64;
        self.backing.write_pages(&page, PAGE_BYTES, at)?;
        self.backing.flush()?;
        self.superblock = next;
        Ok(())
    }
}

fn refusal(path: &Path, cause: String) -> UblkError {
    UblkError {
        what: "use as reserve",
        subject: path.to_path_buf(),
        cause,
        hint: format!("wipefs --no-act {}", path.display()),
        errno: 0,
    }
}

/// Reads aligned bytes.
pub(super) fn read(backing: &Backing, offset: u64, bytes: usize) -> io::Result<Vec<u8>> {
    let mut mapping = Mapping::anonymous(bytes.next_multiple_of(PAGE_BYTES))?;
    backing.read_exact(&mut mapping.bytes_mut()[..bytes], offset)?;
    Ok(mapping.bytes_mut()[..bytes].to_vec())
}

/// What a device carries that may be needed.
fn signature(backing: &Backing) -> io::Result<Option<String>> {
    let bytes = backing.device().size_bytes / PAGE_BYTES as u64 * PAGE_BYTES as u64;
    let head = read(backing, 0, HEAD_BYTES.min(bytes as usize))?;
    let start = bytes.saturating_sub(TAIL_BYTES as u64);
    let tail = read(backing, start, (bytes - start) as usize)?;
    Ok(known(&head, &tail).map(str::to_string))
}

/// What a device that begins and ends so carries.
fn known(head: &[u8], tail: &[u8]) -> Option<&'static str> {
    let md = [0xfc, 0x4e, 0x2b, 0xa9];
    let zfs = [0x0c, 0xb1, 0xba, 0];
    let at_head: [(usize, &[u8], &str); 21] = [
        (0, b"XFSB", "XFS"),
        (1080, &[0x53, 0xef], "an ext file system"),
        (0x10040, b"_BHRfS_M", "Btrfs"),
        (0x10034, b"ReIsEr", "ReiserFS"),
        (1024, &[0x10, 0x20, 0xf5, 0xf2], "F2FS"),
        (32769, b"CD001", "ISO 9660"),
        (0, b"hsqs", "SquashFS"),
        (3, b"NTFS", "NTFS"),
        (4086, b"SWAPSPACE2", "swap"),
        (4086, b"SWAP-SPACE", "swap"),
        (0, b"LUKS\xba\xbe", "LUKS"),
        (0, b"LABELONE", "an LVM physical volume"),
        (512, b"LABELONE", "an LVM physical volume"),
        (1024, b"LABELONE", "an LVM physical volume"),
        (1536, b"LABELONE", "an LVM physical volume"),
        (512, b"EFI PART", "a partition table"),
        (4096, b"EFI PART", "a partition table"),
        (510, &[0x55, 0xaa], "a boot sector or partition table"),
        (0, &md, "a member of md"),
        (4096, &md, "a member of md"),
        (4120, &[0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca], "a part of bcache"),
    ];
    let holds = |bytes: &[u8], at: usize, what: &[u8]| bytes.get(at..at + what.len()) == Some(what);
    if let Some((.., what)) = at_head.iter().find(|(at, bytes, _)| holds(head, *at, bytes)) {
        return Some(what);
    }
    if (128 << 10..HEAD_BYTES).step_by(1024).any(|at| holds(head, at, &zfs)) {
        return Some("ZFS");
    }
    // Of md 0.90 and 1.0, and the second copy of a partition table.
    (0..tail.len()).step_by(512).find_map(|at| match () {
        () if holds(tail, at, &md) => Some("a member of md"),
        () if holds(tail, at, b"EFI PART") => Some("a partition table"),
        () => None,
    })
}

#[cfg(test)]
mod tests {
    use super::known;

    #[test]
    fn what_others_may_need_is_known() {
        let blank = (vec![0; 260 << 10], vec![0; 128 << 10]);
        assert_eq!(known(&blank.0, &blank.1), None);
        for (at, bytes) in
            [(1080, &[0x53u8, 0xef][..]), (0, b"XFSB"), (512, b"LABELONE"), (510, &[0x55, 0xaa])]
        {
            let mut head = blank.0.clone();
            head[at..at + bytes.len()].copy_from_slice(bytes);
            assert!(known(&head, &blank.1).is_some(), "{at}");
            // A device that ends before it.
            assert_eq!(known(&head[..at + 1], &blank.1), None, "{at}");
        }
        let mut tail = blank.1.clone();
        tail[(128 << 10) - 512..][..8].copy_from_slice(b"EFI PART");
        assert_eq!(known(&blank.0, &tail), Some("a partition table"));
    }
}
