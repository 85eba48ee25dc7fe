//! The two small locked processes that change a volume's table: one does it, one watches.
//!
//! The guard is forked at the start, before there are threads. For each change it forks the
//! swapper, which makes one system call: the kernel suspends, changes the table and resumes in it,
//! and undoes that when the swapper is killed while it waits for what is in flight. So between
//! suspend and resume there is no moment in which a death could leave the volume suspended, but one:
//! when the kernel does not take the new table after all. Then the swapper resumes; and should it
//! die there, or need longer than its time, the guard does: it ends the swapper, drops the loaded
//! table and resumes. A swapper whose guard dies is killed by the kernel; it holds the guard's end of
//! the socket too, so that its parent sees the end of both, and can then do the same as the guard.
//! Both are children as in [`crate::locked`]; nothing is opened, allocated or logged meanwhile.

use crate::dm;
use crate::locked::{self, Message, answer, now};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// Kinds of message.
const SWAP: u64 = 1;
const GO: u64 = 2;
const DONE: u64 = 4;
const LATE: u64 = 5;
const DIED: u64 = 6;

/// For tests: what the swapper does instead of its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Nothing else.
    None,
    /// Suspends, and stands still.
    StandStill,
}

/// How a change ended. Which table is live, the kernel has to be asked.
pub(super) enum Outcome {
    /// The kernel's answer, and how long the volume's I/O may have waited.
    Done { errno: i32, pause: Duration },
    /// Its time was over; it was undone.
    Late { pause: Duration },
    /// The swapper died.
    Died { pause: Duration },
}

/// Forks the guard. Returns when it is locked in memory and waits. `lock` stays open in it, and so
/// locked for as long as a change may be under way.
pub(super) fn start(control: RawFd, lock: RawFd, hook: Hook) -> io::Result<(libc::pid_t, OwnedFd)> {
    let keep = [control, lock];
    locked::start(c"splice-guard", &keep, move |socket| guard(socket, keep, hook))
}

/// Makes the loaded table live. Allocates nothing. An error: guard and swapper are gone.
pub(super) fn swap(socket: &OwnedFd, dev: u64, limit: Duration) -> io::Result<Outcome> {
    answer(socket.as_raw_fd(), [SWAP, dev, limit.as_nanos() as u64]);
    let message = locked::receive(socket.as_raw_fd())?;
    let pause = Duration::from_nanos(message[2]);
    match message {
        [DONE, errno, _] => Ok(Outcome::Done { errno: errno as i32, pause }),
        [LATE, ..] => Ok(Outcome::Late { pause }),
        [DIED, ..] => Ok(Outcome::Died { pause }),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// A volume that somebody of ours may have left suspended goes on, with the table that it has. The
/// loaded one is dropped first: a resume would make it live.
pub(super) fn settle(control: RawFd, dev: u64) {
    let _ = dm::clear(control, dev);
    if dm::status(control, dev).is_ok_and(|status| status.suspended) {
        let _ = dm::resume(control, dev);
    }
}

// ---- below: in the children only. ----

fn guard(socket: RawFd, keep: [RawFd; 2], hook: Hook) {
    // An error is the parent's end; a change that runs is brought to its end before it is seen.
    while let Ok([SWAP, dev, limit]) = locked::receive(socket) {
        let keep = [keep[0], keep[1], socket];
        answer(socket, guarded(keep, dev, limit, hook));
    }
}

fn guarded(keep: [RawFd; 3], dev: u64, limit: u64, hook: Hook) -> Message {
    let control = keep[0];
    let started = locked::start(c"splice", &keep, |socket| {
        swapper(socket, control, dev, hook);
    });
    let (pid, socket) = match started {
        Ok(started) => started,
        // Nothing was done yet, whether it could not be started or died before it was ready.
        Err(error) => {
            return error.raw_os_error().map_or([DIED, 0, 0], |errno| [DONE, errno as u64, 0]);
        }
    };
    let since = now();
    answer(socket.as_raw_fd(), [GO, 0, 0]);
    let in_time = locked::wait(socket.as_raw_fd(), Some(since + limit));
    let said = if in_time { locked::receive(socket.as_raw_fd()).ok() } else { None };
    if said.is_none() {
        // SAFETY: a child of this process that nobody has waited for: the number is still its own.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    locked::wait_for_end(pid);
    match said {
        Some(message @ [DONE, 0, _]) => message,
        other => {
            settle(control, dev);
            other.unwrap_or([if in_time { DIED } else { LATE }, 0, now() - since])
        }
    }
}

fn swapper(socket: RawFd, control: RawFd, dev: u64, hook: Hook) {
    // SAFETY: a system call on this process alone. Should the guard be dead already, the wait for
    // its word ends with an error.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let Ok([GO, ..]) = locked::receive(socket) else { return };
    if hook == Hook::StandStill {
        let _ = dm::suspend(control, dev);
        let _ = locked::receive(socket);
        return;
    }
    let since = now();
    let result = dm::resume(control, dev);
    let errno = match result {
        Ok(()) => 0,
        Err(error) => {
            settle(control, dev);
            error.raw_os_error().unwrap_or(libc::EIO)
        }
    };
    answer(socket, [DONE, errno as u64, now() - since]);
}
