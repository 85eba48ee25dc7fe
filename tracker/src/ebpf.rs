//! The eBPF back end: marks at queue and at completion, pinned, audited against the kernel.

use crate::device::Device;
use crate::marks::Marks;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why the back end cannot run.
#[derive(Debug, thiserror::Error)]
#[error("eBPF on {device}: {what}: {cause}")]
pub struct EbpfError {
    /// The device.
    pub device: PathBuf,
    /// The operation.
    pub what: &'static str,
    /// Why, with the remedy.
    pub cause: String,
}

/// Result of comparing what the programs saw with what the kernel counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Audit {
    /// Equal, with the counters standing still while they were read.
    Good,
    /// Writes are completing: neither proven nor doubted now.
    Busy,
    /// A doubt that does not go away: compare. The text is for people.
    Gap(String),
}

/// How the back end came up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Newly attached: nothing is known of earlier writes (`compare_due` is set).
    Fresh,
    /// Pinned programs of an earlier process went on marking all along.
    Adopted,
}

/// A tracked device.
pub struct Ebpf {}

impl Ebpf {
    /// Whether this kernel can run it at all: BTF, bpf_loop, tracing programs. The error is for
    /// people.
    pub fn supported() -> Result<(), String> {
        todo!()
    }

    /// Adopts what is pinned under `pin_dir` if it belongs to this very device (number, diskseq,
    /// size, boot id, block size, program version), else removes it and attaches anew.
    pub fn attach(
        device: &Device,
        block_bytes: u32,
        pin_dir: &Path,
    ) -> Result<(Self, Start), EbpfError> {
        let _ = (device, block_bytes, pin_dir);
        todo!()
    }

    /// The marks.
    pub fn marks(&self) -> &Arc<Marks> {
        todo!()
    }

    /// Compares once, bracketed; a difference is looked at again before it is called a gap.
    pub fn audit(&self) -> Audit {
        todo!()
    }

    /// Takes the present as the new starting point of the audit, after a gap; the caller sets
    /// `compare_due` first and compares after.
    pub fn rebase(&self) -> Result<(), EbpfError> {
        todo!()
    }

    /// Detaches the programs and removes the pins.
    pub fn detach(self) -> Result<(), EbpfError> {
        todo!()
    }

    /// Removes pins of a volume whose device may be gone.
    pub fn remove_pins(pin_dir: &Path) -> std::io::Result<()> {
        let _ = pin_dir;
        todo!()
    }
}
