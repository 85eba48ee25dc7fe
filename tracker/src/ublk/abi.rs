//! The kernel's interface to ublk (linux/ublk_cmd.h): layouts, command numbers, flags.
//!
//! Only what is used here. Every layout is what a 6.5 kernel takes; newer ones accept it, because
//! each says its own length.

#![allow(missing_docs, reason = "the names are the kernel's")]

/// `struct ublksrv_ctrl_cmd`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ControlCommand {
    pub dev_id: u32,
    pub queue_id: u16,
    pub len: u16,
    pub addr: u64,
    pub data: u64,
    pub dev_path_len: u16,
    pub pad: u16,
    pub reserved: u32,
}
const _: () = assert!(size_of::<ControlCommand>() == 32);

/// `struct ublksrv_ctrl_dev_info`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct DeviceInfo {
    pub nr_hw_queues: u16,
    pub queue_depth: u16,
    pub state: u16,
    pub pad0: u16,
    pub max_io_buf_bytes: u32,
    pub dev_id: u32,
    pub ublksrv_pid: i32,
    pub pad1: u32,
    pub flags: u64,
    pub ublksrv_flags: u64,
    pub owner_uid: u32,
    pub owner_gid: u32,
    pub reserved1: u64,
    pub reserved2: u64,
}
const _: () = assert!(size_of::<DeviceInfo>() == 64);

/// `struct ublksrv_io_desc`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct IoDescriptor {
    pub op_flags: u32,
    pub nr_sectors: u32,
    pub start_sector: u64,
    pub addr: u64,
}
const _: () = assert!(size_of::<IoDescriptor>() == 24);

/// `struct ublksrv_io_cmd`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct IoCommand {
    pub q_id: u16,
    pub tag: u16,
    pub result: i32,
    pub addr: u64,
}
const _: () = assert!(size_of::<IoCommand>() == 16);

impl IoCommand {
    /// As it lies in an entry of the ring.
    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&self.q_id.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.tag.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.result.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.addr.to_ne_bytes());
        bytes
    }
}

impl ControlCommand {
    /// As it lies in an entry of the ring.
    pub fn bytes(&self) -> [u8; 80] {
        let mut bytes = [0; 80];
        bytes[..4].copy_from_slice(&self.dev_id.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.queue_id.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.len.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.addr.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.data.to_ne_bytes());
        bytes[24..26].copy_from_slice(&self.dev_path_len.to_ne_bytes());
        bytes
    }
}

/// `struct ublk_params`, as far as it was in 6.5 without zones.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Params {
    pub len: u32,
    pub types: u32,
    pub basic: ParamBasic,
    pub discard: ParamDiscard,
    pub devt: ParamDevt,
}
const _: () = assert!(size_of::<Params>() == 80);

/// `struct ublk_param_basic`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ParamBasic {
    pub attrs: u32,
    pub logical_bs_shift: u8,
    pub physical_bs_shift: u8,
    pub io_opt_shift: u8,
    pub io_min_shift: u8,
    pub max_sectors: u32,
    pub chunk_sectors: u32,
    pub dev_sectors: u64,
    pub virt_boundary_mask: u64,
}
const _: () = assert!(size_of::<ParamBasic>() == 32);

/// `struct ublk_param_discard`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ParamDiscard {
    pub discard_alignment: u32,
    pub discard_granularity: u32,
    pub max_discard_sectors: u32,
    pub max_write_zeroes_sectors: u32,
    pub max_discard_segments: u16,
    pub reserved0: u16,
}
const _: () = assert!(size_of::<ParamDiscard>() == 20);

/// `struct ublk_param_devt`: only ever read.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ParamDevt {
    pub char_major: u32,
    pub char_minor: u32,
    pub disk_major: u32,
    pub disk_minor: u32,
}

pub const PARAM_BASIC: u32 = 1 << 0;
pub const PARAM_DISCARD: u32 = 1 << 1;

pub const ATTR_READ_ONLY: u32 = 1 << 0;
pub const ATTR_ROTATIONAL: u32 = 1 << 1;
pub const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
pub const ATTR_FUA: u32 = 1 << 3;

const fn encoded(direction: u32, number: u32, bytes: usize) -> u32 {
    direction << 30 | (bytes as u32) << 16 | (b'u' as u32) << 8 | number
}
const fn reads(number: u32) -> u32 {
    encoded(2, number, size_of::<ControlCommand>())
}
const fn changes(number: u32) -> u32 {
    encoded(3, number, size_of::<ControlCommand>())
}

pub const ADD_DEV: u32 = changes(0x04);
pub const DEL_DEV: u32 = changes(0x05);
pub const START_DEV: u32 = changes(0x06);
pub const STOP_DEV: u32 = changes(0x07);
pub const SET_PARAMS: u32 = changes(0x08);
pub const GET_PARAMS: u32 = reads(0x09);
pub const START_USER_RECOVERY: u32 = changes(0x10);
pub const END_USER_RECOVERY: u32 = changes(0x11);
pub const GET_DEV_INFO2: u32 = reads(0x12);
pub const GET_FEATURES: u32 = reads(0x13);
// As they stand in the kernel's own headers.
const _: () = assert!(ADD_DEV == 0xc020_7504 && GET_FEATURES == 0x8020_7513);

pub const FETCH_REQ: u32 = encoded(3, 0x20, size_of::<IoCommand>());
pub const COMMIT_AND_FETCH_REQ: u32 = encoded(3, 0x21, size_of::<IoCommand>());
const _: () = assert!(FETCH_REQ == 0xc010_7520);

/// A fetch that comes back with this will never bring a request again.
pub const RES_ABORT: i32 = -libc::ENODEV;

/// Queues lie this many descriptors apart in the mapping of the character device.
pub const QUEUE_DEPTH_MAX: usize = 4096;

pub const F_SUPPORT_ZERO_COPY: u64 = 1 << 0;
pub const F_USER_RECOVERY: u64 = 1 << 3;
pub const F_USER_RECOVERY_REISSUE: u64 = 1 << 4;
pub const F_CMD_IOCTL_ENCODE: u64 = 1 << 6;
pub const F_AUTO_BUF_REG: u64 = 1 << 11;
pub const F_BUF_REG_OFF_DAEMON: u64 = 1 << 14;

pub const STATE_DEAD: u16 = 0;
pub const STATE_LIVE: u16 = 1;
pub const STATE_QUIESCED: u16 = 2;

pub const OP_READ: u32 = 0;
pub const OP_WRITE: u32 = 1;
pub const OP_FLUSH: u32 = 2;
pub const OP_DISCARD: u32 = 3;
pub const OP_WRITE_ZEROES: u32 = 5;

pub const IO_FUA: u32 = 1 << 13;
pub const IO_NOUNMAP: u32 = 1 << 15;
