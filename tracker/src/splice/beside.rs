//! Whether anybody writes beside the filter.
//!
//! Two ways lead past it. A volume's table may be replaced: [`Through`] looks whether it still leads
//! to the filter's device, all of it, and has done so ever since. Or somebody writes to the backing
//! device: [`Written`] counts what the kernel has completed there. Both are for a running filter:
//! everything is open, and nothing is allocated.

use super::SpliceError;
use crate::device::{Device, sysfs_of};
use crate::dm::{self, Control, Number, Status};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Where a volume leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lead {
    /// All of it through the filter's device, without a break since this was opened.
    Through,
    /// Another table has been live, whether or not it is now; the size is the same.
    Replaced,
    /// It has a new table, and is larger: its size, sectors.
    Grown(u64),
    /// There is no such device any more.
    Gone,
}

/// Looks where a volume leads.
pub struct Through {
    control: Control,
    volume: Status,
    sectors: u64,
    /// What its one target must say.
    params: String,
    /// `size` of the volume in sysfs.
    size: File,
    /// The kernel's link from the filter's device to the volume above it, and its inode.
    link: CString,
    inode: u64,
    buffer: dm::Buffer,
}

impl Through {
    /// Opens what [`Self::look`] needs. Says itself where the volume leads now: not through, if it
    /// is not spliced.
    pub fn open(volume: &Path, through: &Path) -> Result<Option<Self>, SpliceError> {
        let fails = |error: io::Error| SpliceError::io("look where it leads", volume, error);
        let (above, below) = (Device::open(volume)?, Device::open(through)?);
        let control = Control::open()?;
        let number = Number { major: above.major, minor: above.minor };
        let under = Number { major: below.major, minor: below.minor };
        let sectors = above.size_bytes / super::SECTOR_BYTES;
        let params = format!("{under} 0");
        let mut buffer = dm::small_buffer();
        let found = dm::is_linear(
            control.as_raw_fd(),
            number.encoded(),
            sectors,
            params.as_bytes(),
            &mut buffer,
        );
        let (is, status) = found.map_err(fails)?;
        let link = below.sysfs().join("holders").join(crate::device::name_of(&above.sysfs()));
        let link = CString::new(link.into_os_string().into_encoded_bytes())
            .map_err(|error| fails(error.into()))?;
        let (true, Some(inode)) = (is, inode_of(&link)) else { return Ok(None) };
        let size = File::open(sysfs_of(number.major, number.minor).join("size")).map_err(fails)?;
        Ok(Some(Self { control, volume: status, sectors, params, size, link, inode, buffer }))
    }

    /// Looks. Two system calls when all is well.
    ///
    /// The table alone would not do: one that was replaced and put back is the same. The kernel
    /// makes the link when a table of the volume begins to use the filter's device, and removes it
    /// with the last such table; an inode of sysfs is not used twice. So the same link means that
    /// every table since has led there, and the same table now that it leads there alone.
    pub fn look(&mut self) -> Lead {
        let (control, dev) = (self.control.as_raw_fd(), self.volume.number.encoded());
        let found =
            dm::is_linear(control, dev, self.sectors, self.params.as_bytes(), &mut self.buffer);
        match found {
            Err(_) => Lead::Gone,
            Ok((_, status)) if !status.is_same_device(&self.volume) => Lead::Gone,
            Ok((true, status))
                if status.event == self.volume.event
                    && inode_of(&self.link) == Some(self.inode) =>
            {
                Lead::Through
            }
            Ok(_) => match number_in(&self.size, 0) {
                Ok(sectors) if sectors > self.sectors => Lead::Grown(sectors),
                _ => Lead::Replaced,
            },
        }
    }

    /// Size of the volume when it was opened, sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }
}

/// Whether all of `volume` leads to `through` now.
pub fn leads_through(volume: &Path, through: &Path) -> bool {
    matches!(Through::open(volume, through), Ok(Some(_)))
}

fn inode_of(link: &CString) -> Option<u64> {
    // SAFETY: all zero is a valid `stat`.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: a string with its NUL, and room for the answer.
    let result = unsafe { libc::lstat(link.as_ptr(), &mut stat) };
    (result == 0).then_some(stat.st_ino)
}

/// What the kernel's counter says beside our own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// What was written may all be ours.
    Fine,
    /// At least so many sectors are not.
    Beside(u64),
    /// The kernel has counted so many fewer than we completed: it does not count (`queue/iostats`),
    /// or this is another device. Proves nothing.
    Uncounted(u64),
}

/// The kernel's counter of sectors written and discarded on a device, since it was opened here.
pub struct Written {
    stat: File,
    before: u64,
}

/// Columns of `stat` in sysfs.
const WRITTEN_SECTORS: usize = 6;
const DISCARDED_SECTORS: usize = 13;

impl Written {
    /// Begins to count. The filter has submitted nothing yet, and nothing is in flight.
    pub fn open(backing: &Device) -> io::Result<Self> {
        let stat = File::open(backing.sysfs().join("stat"))?;
        let mut written = Self { stat, before: 0 };
        written.before = written.sectors()?;
        Ok(written)
    }

    /// Counts from the boot of the machine on.
    pub fn since_boot(backing: &Device) -> io::Result<Self> {
        Ok(Self { stat: File::open(backing.sysfs().join("stat"))?, before: 0 })
    }

    /// Sectors completed since then.
    pub fn sectors(&self) -> io::Result<u64> {
        let total = number_in(&self.stat, WRITTEN_SECTORS)?
            .checked_add(number_in(&self.stat, DISCARDED_SECTORS)?);
        total
            .and_then(|total| total.checked_sub(self.before))
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Compares with what the filter knows: the sectors of which it has seen the completion before
    /// this call, and those that it has submitted, asked after the kernel. What is in flight lies
    /// between the two, whenever the kernel counts it.
    pub fn beside(
        &self,
        own_completed_before: u64,
        own_submitted_after: impl FnOnce() -> u64,
    ) -> io::Result<Verdict> {
        let kernel = self.sectors()?;
        Ok(judge(own_completed_before, kernel, own_submitted_after()))
    }
}

fn judge(completed_before: u64, kernel: u64, submitted_after: u64) -> Verdict {
    if kernel > submitted_after {
        Verdict::Beside(kernel - submitted_after)
    } else if kernel < completed_before {
        Verdict::Uncounted(completed_before - kernel)
    } else {
        Verdict::Fine
    }
}

/// The number in this column of a line in sysfs. Allocates nothing.
fn number_in(file: &File, column: usize) -> io::Result<u64> {
    let mut line = [0; 512];
    let length = file.read_at(&mut line, 0)?;
    nth_number(&line[..length], column).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn nth_number(line: &[u8], column: usize) -> Option<u64> {
    let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    std::str::from_utf8(words.nth(column)?).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{DISCARDED_SECTORS, Verdict, WRITTEN_SECTORS, judge, nth_number};

    #[test]
    fn what_is_in_flight_is_nobody_elses() {
        assert_eq!(judge(8, 8, 8), Verdict::Fine);
        assert_eq!(judge(8, 8, 24), Verdict::Fine);
        assert_eq!(judge(8, 24, 24), Verdict::Fine);
        assert_eq!(judge(8, 25, 24), Verdict::Beside(1));
        assert_eq!(judge(8, 7, 24), Verdict::Uncounted(1));
        assert_eq!(judge(0, 0, 0), Verdict::Fine);
    }

    #[test]
    fn columns_of_the_kernel() {
        let stat = b"     105        0     4936       40       17        3      136        8        0       36       49        1        2     1000        4        0        0\n";
        assert_eq!(nth_number(stat, WRITTEN_SECTORS), Some(136));
        assert_eq!(nth_number(stat, DISCARDED_SECTORS), Some(1000));
        assert_eq!(nth_number(stat, 17), None);
        assert_eq!(nth_number(b"65536\n", 0), Some(65536));
        assert_eq!(nth_number(b"", 0), None);
    }
}
