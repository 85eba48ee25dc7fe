//! The eBPF back end: marks at queue and at completion, pinned, audited against the kernel.
//!
//! The programs and their maps are pinned: they go on marking when this process is dead, until
//! [`Ebpf::detach`] or a reboot. One process a volume at a time (the caller sees to that). A pinned
//! set is adopted only if its header says that it was once whole and belongs to this very device;
//! anything else is removed, attached anew, and a compare is due, except what a newer version
//! pinned: that stays, and the volume is refused. Any doubt is a gap.

mod audit;
mod kernel;
mod mapping;
mod pins;

use crate::device::Device;
use crate::header::Header;
use crate::marks::Marks;
use aya::programs::BtfTracePoint;
use mapping::Mapping;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

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
    /// The device is smaller than it was: its bytes before. What is pinned stays, and a compare is
    /// due if the device gets its size back.
    pub shrunk_from: Option<u64>,
}

/// Pins that a newer Secondsite made. They go on marking and are left as they are.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} was pinned by a newer Secondsite (version {found}, this one reads up to {known}); it was \
     left as it is. Install the newer one again, or, to begin anew with this one and a compare, \
     type: rm -r {}", dir.display(), dir.display()
)]
pub struct NewerPins {
    /// The folder of the pins.
    pub dir: PathBuf,
    /// Their version.
    pub found: u16,
    /// The newest version known here.
    pub known: u16,
}

/// Result of comparing what the programs saw with what the kernel counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Audit {
    /// Equal, with the counters standing still while they were read and no write on its way.
    Good,
    /// Writes are on their way: neither proven nor doubted now.
    Busy,
    /// A doubt that does not go away: compare. The text is for people.
    Gap(String),
    /// The volume has another size than it was attached with, so that its state now is not that of
    /// the blocks that are followed. No doubt about these: attach again.
    Resized,
}

/// How the back end came up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Newly attached: nothing is known of earlier writes (`compare_due` is set).
    Fresh,
    /// Pinned programs of an earlier process went on marking all along.
    Adopted,
}

/// What tests leave out.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Without them updates are lost; the audit cannot tell, since the counts are kept.
    pub completion_marks: bool,
}

/// A tracked device.
pub struct Ebpf {
    device: Device,
    marks: Arc<Marks>,
    pin_dir: PathBuf,
    counters: Mapping,
    slots: Mapping,
    /// Kept open: their fdinfo says how often the kernel skipped them.
    _programs: Vec<BtfTracePoint>,
    kernel: kernel::Counters,
    block_bytes: u32,
    bio_based: bool,
    uncounted_zeroes: bool,
    /// Where the counters stood when they were last seen unequal with nothing in flight.
    unequal: Mutex<Option<audit::Stuck>>,
}

impl Ebpf {
    /// Whether this kernel can run it at all: BTF, bpf_loop, tracing programs. The error is for
    /// people.
    pub fn supported() -> Result<(), String> {
        static SUPPORTED: OnceLock<Result<(), String>> = OnceLock::new();
        SUPPORTED.get_or_init(pins::try_load).clone()
    }

    /// Adopts what is pinned under `pin_dir` if it belongs to this very device (number, diskseq,
    /// boot id, block size, program version), else removes it and attaches anew. If the device has
    /// grown since, what is pinned grows with it: the new part is marked, and nothing else happens.
    pub fn attach(
        device: &Device,
        block_bytes: u32,
        pin_dir: &Path,
    ) -> Result<(Self, Start), EbpfError> {
        Self::attach_with(device, block_bytes, pin_dir, Options { completion_marks: true })
    }

    /// As [`Self::attach`].
    #[doc(hidden)]
    pub fn attach_with(
        device: &Device,
        block_bytes: u32,
        pin_dir: &Path,
        options: Options,
    ) -> Result<(Self, Start), EbpfError> {
        let fails =
            |what, cause| EbpfError { device: device.path.clone(), what, cause, shrunk_from: None };
        if !block_bytes.is_power_of_two() || block_bytes < device.logical_block_bytes {
            let cause = format!("{block_bytes} bytes is not a power of two of at least a sector");
            return Err(fails("choose a block size", cause));
        }
        let plan = pins::Plan::new(device, block_bytes, options)
            .map_err(|cause| fails("see how its writes complete", cause))?;
        pins::ensure_bpffs(pin_dir).map_err(|cause| fails("mount the BPF file system", cause))?;
        if let Some(newer) = pins::newer(pin_dir) {
            return Err(fails("adopt its marks", newer.to_string()));
        }
        match pins::open(&plan, pin_dir) {
            Ok(pinned) => {
                let adopted = Self::over(device, &plan, pin_dir, pinned)?;
                return Ok((adopted, Start::Adopted));
            }
            Err(pins::NotAdopted::Unfit(_)) => {}
            Err(pins::NotAdopted::Shrunk(bytes)) => {
                let cause = format!("it has shrunk from {bytes} to {} bytes", device.size_bytes);
                return Err(EbpfError { shrunk_from: Some(bytes), ..fails("adopt", cause) });
            }
            Err(pins::NotAdopted::Grow(cause)) => return Err(fails("grow with it", cause)),
        }
        let attached = pins::remove(pin_dir)
            .map_err(|cause| cause.to_string())
            .and_then(|()| pins::create(&plan, pin_dir))
            .and_then(|()| pins::open(&plan, pin_dir).map_err(|cause| cause.to_string()));
        let fresh = attached
            .map_err(|cause| fails("attach", cause))
            .and_then(|pinned| Self::over(device, &plan, pin_dir, pinned))
            .inspect_err(|_| {
                // Half of it would cost every write something and help nobody.
                let _ = pins::remove(pin_dir);
            })?;
        // Without a baseline the audit reports a gap until `rebase` finds a quiet moment.
        let _ = fresh.rebase();
        Ok((fresh, Start::Fresh))
    }

    fn over(
        device: &Device,
        plan: &pins::Plan,
        pin_dir: &Path,
        pinned: pins::Pinned,
    ) -> Result<Self, EbpfError> {
        let (disk, volume) = (device.disk_sysfs(), device.sysfs());
        let kernel = kernel::Counters::open(&disk, &volume, &pinned.programs).map_err(|cause| {
            EbpfError {
                device: device.path.clone(),
                what: "open the kernel's counters",
                cause: cause.to_string(),
                shrunk_from: None,
            }
        })?;
        Ok(Self {
            device: device.clone(),
            marks: Arc::new(Marks::open(plan.blocks(), pinned.memory)),
            pin_dir: pin_dir.to_path_buf(),
            counters: pinned.counters,
            slots: pinned.slots,
            _programs: pinned.programs,
            kernel,
            block_bytes: plan.block_bytes,
            bio_based: plan.bio_based,
            uncounted_zeroes: plan.uncounted_zeroes,
            unequal: Mutex::new(None),
        })
    }

    /// The marks.
    pub fn marks(&self) -> &Arc<Marks> {
        &self.marks
    }

    /// Detaches the programs and removes the pins.
    pub fn detach(self) -> Result<(), EbpfError> {
        let fails = |cause: std::io::Error| EbpfError {
            device: self.device.path.clone(),
            what: "detach",
            cause: cause.to_string(),
            shrunk_from: None,
        };
        pins::remove(&self.pin_dir).map_err(fails)
    }

    /// Removes pins of a volume whose device may be gone; [`NewerPins`] stay, and are the error.
    pub fn remove_pins(pin_dir: &Path) -> std::io::Result<()> {
        pins::remove(pin_dir)
    }

    fn header(&self) -> Header<'_, std::sync::atomic::AtomicU64> {
        self.marks.header()
    }
}
