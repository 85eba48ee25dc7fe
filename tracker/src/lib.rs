//! Follows every write to a block device; knows nothing of networks.
//!
//! [`marks`] holds the bitmaps and the cut that stands; [`ebpf`] marks from beside the write path;
//! [`grow`] follows a volume that becomes larger;
//! [`freeze`] holds file systems still for a cut; [`device`] says which device it is; [`splice`] puts
//! a filter under a device-mapper volume that is in use, and says whether anybody writes beside it.

#[doc(hidden)]
pub mod bitmap;
pub mod device;
pub mod dm;
pub mod ebpf;
pub mod filter;
pub mod freeze;
#[doc(hidden)]
pub mod grow;
#[doc(hidden)]
pub mod header;
mod locked;
pub mod marks;
pub mod splice;
#[doc(hidden)]
pub mod sync;
pub mod ublk;
