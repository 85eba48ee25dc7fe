//! Whether anybody writes to the backing device beside its filter.
//!
//! The kernel counts the sectors written and discarded on the device; the filter counts what it let
//! through. What the kernel has more than that, somebody else wrote. The difference of the two when
//! the filter began is the baseline, kept in the shared header: it outlives the agent.

use crate::device::Device;
use crate::ebpf::Audit;
use crate::filter::shared::Shared;
use crate::header::AUDIT_WORDS;
use crate::splice::beside::Written;
use std::io;

/// The kernel's counters of the backing device.
pub struct Beside(Written);

impl Beside {
    /// Opens them.
    pub fn open(backing: &Device) -> io::Result<Self> {
        Ok(Self(Written::since_boot(backing)?))
    }

    /// Looks. A gap: something wrote beside the filter since the baseline.
    pub fn audit(&self, shared: &Shared) -> Audit {
        let Some([baseline, ..]) = shared.marks().header().baseline() else {
            return Audit::Gap("it is not known what was written before the filter".into());
        };
        // In this order: what is in flight is in the last number, whenever the kernel counts it.
        let mut kernel = Err(io::ErrorKind::Other.into());
        let (_, submitted) = shared.sectors(|| kernel = self.0.sectors());
        match kernel {
            Err(error) => Audit::Gap(format!("the kernel's counters: {error}")),
            Ok(kernel) => match kernel.wrapping_sub(baseline).wrapping_sub(submitted).cast_signed()
            {
                ..=0 => Audit::Good,
                sectors => {
                    Audit::Gap(format!("{sectors} sectors were written beside the filter"))
                }
            },
        }
    }

    /// Takes the present as the baseline. What is in flight was let through and is counted later:
    /// it only makes the baseline larger than need be, by as much as could go unnoticed once.
    pub fn rebase(&self, shared: &Shared) -> Result<(), String> {
        let mut kernel = Err(io::ErrorKind::Other.into());
        let (completed, _) = shared.sectors(|| kernel = self.0.sectors());
        let kernel = kernel.map_err(|error| format!("the kernel's counters: {error}"))?;
        let mut words = [0; AUDIT_WORDS];
        words[0] = kernel.wrapping_sub(completed);
        shared.marks().header().set_baseline(words);
        Ok(())
    }
}
