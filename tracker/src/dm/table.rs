//! Tables of device-mapper: their bytes in both directions. Pure.
//!
//! A target is a specification of 40 bytes and its parameters, a text that ends with a NUL. `next`
//! counts from the start of all when the kernel writes, and from the target's own start when it
//! reads; that is how linux/dm-ioctl.h has it.

use super::{Number, Status};
use std::fmt;
use std::sync::atomic::{Ordering, compiler_fence};

/// `struct dm_target_spec`: start, length, status, next, type.
const SPEC_BYTES: usize = 40;
const KIND_BYTES: usize = 16;
const KIND_AT: usize = SPEC_BYTES - KIND_BYTES;

/// A device's live table, and what the kernel said along with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// What the sectors lead to, in order.
    pub targets: Vec<Target>,
    /// The device.
    pub status: Status,
}

impl Table {
    /// Size of the device, sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.targets.last().map_or(0, |last| last.start_sectors.saturating_add(last.sectors))
    }

    /// A number for this very mapping (FNV-1a): two tables with different ones differ.
    pub fn hash(&self) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        let mut add = |bytes: &[u8]| {
            for byte in bytes {
                hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
            }
        };
        for target in &self.targets {
            add(&target.start_sectors.to_le_bytes());
            add(&target.sectors.to_le_bytes());
            add(target.kind.as_bytes());
            add(&[0]);
            add(target.params.as_str().as_bytes());
            add(&[0]);
        }
        hash
    }

    /// The device that all of it leads to, from its first sector on, if there is such a one.
    pub fn leads_to(&self) -> Option<Number> {
        let [target] = self.targets.as_slice() else { return None };
        match target.linear()? {
            (number, 0) if target.start_sectors == 0 => Some(number),
            _ => None,
        }
    }
}

/// One line of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Where it begins, sectors of 512 bytes.
    pub start_sectors: u64,
    /// Its length, likewise.
    pub sectors: u64,
    /// `linear`, `crypt`, …
    pub kind: String,
    /// What that kind wants to know.
    pub params: Params,
}

impl Target {
    /// A table of one line: all of a device, one to one.
    pub fn linear_over(number: Number, sectors: u64) -> Self {
        let params = Params::new(format!("{number} 0"));
        Self { start_sectors: 0, sectors, kind: "linear".into(), params }
    }

    /// Device and first sector of a linear target.
    pub fn linear(&self) -> Option<(Number, u64)> {
        let (device, offset) = self.params.as_str().split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let number = Number { major: major.parse().ok()?, minor: minor.parse().ok()? };
        (self.kind == "linear").then_some((number, offset.parse().ok()?))
    }
}

/// The parameters of a target. May hold a key: wiped when dropped, never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Params(String);

impl Params {
    /// Takes the text over.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text, keys and all.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Params {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "({} bytes)", self.0.len())
    }
}

impl Drop for Params {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.0).into_bytes();
        wipe(&mut bytes);
    }
}

/// Memory for one call: aligned for its structures, wiped when dropped.
pub(crate) struct Buffer(Vec<u64>);

impl Buffer {
    pub(super) fn zeroed(bytes: usize) -> Self {
        Self(vec![0; bytes.div_ceil(8)])
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: the words are initialized, and bytes need no alignment.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * 8) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; any bytes are words.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * 8) }
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut u64 {
        self.0.as_mut_ptr()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        wipe(self.bytes_mut());
    }
}

fn wipe(bytes: &mut [u8]) {
    for byte in bytes {
        // SAFETY: a reference is valid for a write. Volatile: it may not be left out as never read.
        unsafe { std::ptr::write_volatile(byte, 0) };
    }
    compiler_fence(Ordering::SeqCst);
}

/// What the kernel answered; None if it makes no sense.
pub(super) fn parse(data: &[u8], count: u32) -> Option<Vec<Target>> {
    let (mut at, mut end_sectors) = (0, 0);
    let mut targets = Vec::new();
    for _ in 0..count {
        let (spec, params) = target_at(data, at)?;
        let kind = std::str::from_utf8(super::until_nul(&spec[KIND_AT..])).ok()?;
        let target = Target {
            start_sectors: u64::from_le_bytes(spec[..8].try_into().ok()?),
            sectors: u64::from_le_bytes(spec[8..16].try_into().ok()?),
            kind: kind.into(),
            params: Params(std::str::from_utf8(params).ok()?.into()),
        };
        if target.start_sectors != end_sectors {
            return None;
        }
        end_sectors = target.start_sectors.checked_add(target.sectors)?;
        at = u32::from_le_bytes(spec[20..24].try_into().ok()?) as usize;
        targets.push(target);
    }
    Some(targets)
}

/// Specification and parameters of the target that begins there.
fn target_at(data: &[u8], at: usize) -> Option<(&[u8], &[u8])> {
    let (spec, rest) = data.get(at..)?.split_at_checked(SPEC_BYTES)?;
    Some((spec, &rest[..rest.iter().position(|byte| *byte == 0)?]))
}

/// Whether the answer's first target is linear over `sectors` with these parameters.
pub(super) fn is_linear(data: &[u8], sectors: u64, params: &[u8]) -> bool {
    target_at(data, 0).is_some_and(|(spec, found)| {
        spec[..8] == 0u64.to_le_bytes()
            && spec[8..16] == sectors.to_le_bytes()
            && super::until_nul(&spec[KIND_AT..]) == b"linear"
            && found == params
    })
}

/// What the kernel is to load, behind room for a header.
pub(super) fn write(header_bytes: usize, targets: &[Target]) -> Buffer {
    let length = |target: &Target| SPEC_BYTES + (target.params.0.len() + 1).next_multiple_of(8);
    let mut buffer = Buffer::zeroed(header_bytes + targets.iter().map(length).sum::<usize>());
    let mut rest = &mut buffer.bytes_mut()[header_bytes..];
    for target in targets {
        let (own, others) = rest.split_at_mut(length(target));
        let kind = target.kind.as_bytes();
        own[..8].copy_from_slice(&target.start_sectors.to_le_bytes());
        own[8..16].copy_from_slice(&target.sectors.to_le_bytes());
        own[20..24].copy_from_slice(&(length(target) as u32).to_le_bytes());
        own[KIND_AT..][..kind.len()].copy_from_slice(kind);
        own[SPEC_BYTES..][..target.params.0.len()].copy_from_slice(target.params.0.as_bytes());
        rest = others;
    }
    buffer
}

#[cfg(test)]
mod tests {
    use super::{Number, Params, SPEC_BYTES, Table, Target, is_linear, parse, write};
    use proptest::prelude::{Strategy, any, prop, proptest};

    fn target(start_sectors: u64, sectors: u64, kind: &str, params: &str) -> Target {
        Target { start_sectors, sectors, kind: kind.into(), params: Params::new(params.into()) }
    }

    /// The kernel counts `next` from the start of all, we from the target's own.
    fn as_the_kernel_writes(targets: &[Target]) -> Vec<u8> {
        let mut bytes = write(0, targets).bytes().to_vec();
        let mut at = 0;
        for _ in targets {
            let next = &mut bytes[at + 20..at + 24];
            let end = at + u32::from_le_bytes((&*next).try_into().unwrap()) as usize;
            next.copy_from_slice(&(end as u32).to_le_bytes());
            at = end;
        }
        bytes
    }

    #[test]
    fn a_table_has_these_bytes() {
        let bytes = write(0, &[target(0, 8, "linear", "8:16 2048"), target(8, 16, "zero", "")]);
        let mut wanted = vec![0u8; 40 + 16 + 40 + 8];
        (wanted[8], wanted[20], wanted[56], wanted[64], wanted[76]) = (8, 56, 8, 16, 48);
        wanted[24..30].copy_from_slice(b"linear");
        wanted[40..49].copy_from_slice(b"8:16 2048");
        wanted[80..84].copy_from_slice(b"zero");
        assert_eq!(bytes.bytes(), wanted);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let targets = [target(0, 8, "linear", "8:16 2048"), target(8, 16, "zero", "")];
        let bytes = as_the_kernel_writes(&targets);
        assert_eq!(parse(&bytes, 2).unwrap(), targets);
        assert_eq!(parse(&bytes, 3), None, "more than there are");
        assert_eq!(parse(&bytes[..bytes.len() - 8], 2), None, "cut short");
        let mut gap = bytes.clone();
        gap[56] = 9;
        assert_eq!(parse(&gap, 2), None, "a gap between two targets");
        let mut unended = bytes;
        unended[SPEC_BYTES..].fill(b'x');
        assert_eq!(parse(&unended, 1), None, "no end of the parameters");
    }

    #[test]
    fn only_exactly_the_same_is_linear() {
        let bytes = |kind, start, length, params| {
            as_the_kernel_writes(&[target(start, length, kind, params)])
        };
        let is = |data: &[u8]| is_linear(data, 64, b"259:3 0");
        assert!(is(&bytes("linear", 0, 64, "259:3 0")));
        assert!(!is(&bytes("linear", 0, 65, "259:3 0")));
        assert!(!is(&bytes("linear", 0, 64, "259:3 8")));
        assert!(!is(&bytes("linear", 0, 64, "259:30 0")));
        assert!(!is(&bytes("delay", 0, 64, "259:3 0")));
        assert!(!is(&[]));
    }

    #[test]
    fn where_a_linear_target_leads() {
        let over = Number { major: 259, minor: 3 };
        let same = Target::linear_over(over, 64);
        assert_eq!(same, target(0, 64, "linear", "259:3 0"));
        assert_eq!(same.linear(), Some((over, 0)));
        assert_eq!(target(0, 64, "linear", "259:3 8").linear(), Some((over, 8)));
        for (kind, params) in [("delay", "259:3 0"), ("linear", "sda 0"), ("linear", "259:3")] {
            assert_eq!(target(0, 64, kind, params).linear(), None);
        }
    }

    #[test]
    fn a_key_is_not_printed() {
        let printed = format!("{:?}", target(0, 8, "crypt", "aes-xts-plain64 c0ffee 0 8:16 0"));
        assert!(printed.contains("crypt") && !printed.contains("c0ffee"), "{printed}");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(lines in prop::collection::vec(
            (1u64..1 << 40, "[a-z-]{1,15}", "[ -~]{0,200}"), 0..20))
        {
            let mut start = 0;
            let mut targets = Vec::new();
            for (sectors, kind, params) in lines {
                targets.push(target(start, sectors, &kind, &params));
                start += sectors;
            }
            let bytes = as_the_kernel_writes(&targets);
            assert_eq!(parse(&bytes, targets.len() as u32).unwrap(), targets);
        }

        #[test]
        fn any_bytes_are_survived(data in prop::collection::vec(any::<u8>(), 0..400)
            .prop_map(|mut data| { data.iter_mut().for_each(|b| *b %= 48); data }), count in 0u32..5)
        {
            let _ = parse(&data, count);
            let _ = is_linear(&data, 1, b"");
        }
    }

    #[test]
    fn tables_that_differ_have_different_hashes() {
        let control = |targets| Table {
            targets,
            status: super::super::Status::of(&super::super::Header::new(0, 0)),
        };
        let hash = |kind, params| control(vec![target(0, 8, kind, params)]).hash();
        assert_eq!(hash("linear", "8:16 0"), hash("linear", "8:16 0"));
        assert_ne!(hash("linear", "8:16 0"), hash("linear", "8:16 8"));
        assert_ne!(hash("linear", "8:16 0"), hash("linear8", ":16 0"));
    }
}
