//! Where the tracker will decide on each write; until then all of them go.

use std::ops::Range;

#[derive(Default)]
pub struct Gate;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    Go,
    Wait,
}

#[derive(Debug, Clone, Copy)]
pub struct Preserve {
    pub offset: u64,
    pub bytes: u32,
    pub slot: u32,
}

pub type Wake = u64;

impl Gate {
    pub fn admit(
        &self,
        _lane: usize,
        _tag: u16,
        _bytes: Range<u64>,
        _out: &mut Vec<Preserve>,
    ) -> Admission {
        Admission::Go
    }
    pub fn preserved(&self, _copy: &Preserve, _ok: bool) -> Wake {
        0
    }
    pub fn completed(&self, _lane: usize, _tag: u16, _ok: bool) -> Wake {
        0
    }
    pub fn slot(&self, _slot: u32) -> *mut u8 {
        std::ptr::null_mut()
    }
    pub fn memory_slots(&self) -> u32 {
        0
    }
    pub fn spill_offset(&self, _slot: u32) -> u64 {
        0
    }
}
