//! A child that holds something still, and so may depend on nothing that could be held with it.
//!
//! It is forked and never executes anything else: between fork and exit it only makes system calls,
//! on memory that is locked, with all signals blocked. It has no descriptor of its parent but its
//! end of the socket and those that are named; end of file there is its parent's death. What runs
//! in it allocates nothing, takes no lock, and panics on no path that is taken.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A message: kind, then two numbers.
pub(crate) type Message = [u64; 3];
pub(crate) const MESSAGE_BYTES: usize = size_of::<Message>();
/// The child's first: it is locked, or why not (an errno).
const READY: u64 = 3;

/// Most descriptors that a child keeps, its socket not counted.
const KEEP_MAX: usize = 3;

/// Forks a child that runs `main` with its end of the socket, then exits. Returns when it is locked
/// in memory. Allocates nothing.
pub(crate) fn start(
    name: &CStr,
    keep: &[RawFd],
    main: impl FnOnce(RawFd),
) -> io::Result<(libc::pid_t, OwnedFd)> {
    let mut ends = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: `ends` has room for the two descriptors.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) })?;
    // SAFETY: both were just made and belong to nobody else.
    let [ours, theirs] = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
    // SAFETY: the child makes system calls only, and never returns.
    match check(unsafe { libc::fork() })? {
        0 => {
            let socket = theirs.as_raw_fd();
            let errno = prepare(name, socket, keep);
            answer(socket, [READY, errno as u64, 0]);
            if errno == 0 {
                main(socket);
            }
            exit()
        }
        pid => {
            drop(theirs);
            match receive(ours.as_raw_fd()) {
                Ok([READY, 0, _]) => Ok((pid, ours)),
                other => {
                    wait_for_end(pid);
                    Err(other.map_or_else(
                        |error| error,
                        |message| io::Error::from_raw_os_error(message[1] as i32),
                    ))
                }
            }
        }
    }
}

/// Waits until the child is gone.
pub(crate) fn wait_for_end(pid: libc::pid_t) {
    loop {
        // SAFETY: waits for a child of this process, which nobody else waits for; no status wanted.
        let done = unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
        if done != -1 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return;
        }
    }
}

/// Waits for the next message. Allocates nothing. An error: the other end is gone.
pub(crate) fn receive(socket: RawFd) -> io::Result<Message> {
    let mut message: Message = [0; 3];
    loop {
        // SAFETY: `message` is valid for MESSAGE_BYTES, and any bytes are a message.
        let length = unsafe { libc::recv(socket, message.as_mut_ptr().cast(), MESSAGE_BYTES, 0) };
        match length {
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            -1 => return Err(io::Error::last_os_error()),
            length if length as usize == MESSAGE_BYTES => return Ok(message),
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

pub(crate) fn check(result: i32) -> io::Result<i32> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Sends to the other end. If that is gone, the next wait says so.
pub(crate) fn answer(socket: RawFd, message: Message) {
    // SAFETY: `message` lives during the call.
    unsafe { libc::send(socket, message.as_ptr().cast(), MESSAGE_BYTES, libc::MSG_NOSIGNAL) };
}

/// Waits until the socket has something, or its other end is closed; false when it is `until`.
pub(crate) fn wait(socket: RawFd, until: Option<u64>) -> bool {
    let mut poll = libc::pollfd { fd: socket, events: libc::POLLIN, revents: 0 };
    loop {
        // Rounded up: never before its time.
        let left = until.map_or(-1, |until| until.saturating_sub(now()).div_ceil(1_000_000) as i32);
        // SAFETY: one entry, valid during the call.
        match unsafe { libc::poll(&mut poll, 1, left) } {
            0 => return false,
            1 => return true,
            _ => {}
        }
    }
}

/// Nanoseconds of the monotonic clock.
pub(crate) fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid; this clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Locks the child in memory and cuts what ties it to its parent.
fn prepare(name: &CStr, socket: RawFd, keep: &[RawFd]) -> i32 {
    let mut kept = [socket; KEEP_MAX + 1];
    kept[..keep.len()].copy_from_slice(keep);
    kept.sort_unstable();
    // SAFETY: system calls on this process alone; `signals` is filled before it is used; no
    // descriptor that is closed here is used by the child.
    unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut signals);
        libc::sigprocmask(libc::SIG_BLOCK, &signals, std::ptr::null_mut());
        // A terminal's or a supervisor's signal to the group is not for it.
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        // Another child's parent end among them would hide the parent's death from that child.
        let mut first = 3;
        for fd in kept {
            if fd > first {
                libc::syscall(libc::SYS_close_range, first, fd - 1, 0);
            }
            first = first.max(fd + 1);
        }
        libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0);
        if libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) == -1 {
            return *libc::__errno_location();
        }
    }
    0
}

fn exit() -> ! {
    // SAFETY: ends the child without running anything of the parent's.
    unsafe { libc::_exit(0) }
}
