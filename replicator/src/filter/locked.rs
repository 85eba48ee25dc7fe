//! A process that can serve a device behind which swap, its own program and the log may lie.

use super::say::say;
use crate::cli::failure::{Exit, Failure};
use nix::sys::mman::{MlockAllFlags, mlockall};
use std::io;

/// Of linux/prctl.h.
const PR_SET_IO_FLUSHER: i32 = 57;

/// To be called before the first thread: threads inherit it.
pub(super) fn process() -> Result<(), Failure> {
    let fails = |what: &str, error: io::Error| {
        Failure::new(Exit::Permission, format!("filter: {what}: {error}"))
            .hint("run as root, with CAP_IPC_LOCK and CAP_SYS_RESOURCE")
    };
    // SAFETY: no pointers. Memory that is asked for here never waits for I/O, and throttling of
    // dirty pages makes an exception of us.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        return Err(fails("IO_FLUSHER", io::Error::last_os_error()));
    }
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)
        .map_err(|error| fails("lock memory", error.into()))?;
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        // In a container without the right to; then init has to have said so.
        say(&format!("not spared when memory runs out: {error}"));
    }
    Ok(())
}
