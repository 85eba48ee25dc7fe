//! The child that freezes, waits and thaws, and the socket over which it is told to.
//!
//! A child as in [`crate::locked`], which says what it may do.

use super::MOUNTS_MAX;
use crate::locked::{self, MESSAGE_BYTES, Message, answer, check, now};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)` of linux/fs.h.
const FIFREEZE: libc::Ioctl = 0xc004_5877u32 as libc::Ioctl;
const FITHAW: libc::Ioctl = 0xc004_5878u32 as libc::Ioctl;

/// Kinds of message.
const FREEZE: u64 = 1;
const THAW: u64 = 2;
const FROZEN: u64 = 4;
const FAILED: u64 = 5;
const THAWED: u64 = 6;

/// Room for the descriptors of one freeze.
const CONTROL_BYTES: usize = 64 + MOUNTS_MAX * size_of::<RawFd>();

#[repr(align(8))]
struct Control([u8; CONTROL_BYTES]);

/// What the parent orders.
pub(super) enum Order {
    /// Freeze the file systems of the descriptors sent along; thaw by itself after this time.
    Freeze(Duration),
    Thaw,
}

/// What the child answers.
pub(super) enum Answer {
    Frozen,
    Failed { index: usize, errno: i32 },
    Thawed { frozen: Duration, intact: bool },
}

/// Forks the child. Returns when it is locked in memory and waits.
pub(super) fn start() -> io::Result<(libc::pid_t, OwnedFd)> {
    locked::start(c"freezer", &[], child_main)
}

/// Thaws, if it is frozen.
pub(super) fn thaw(mount: &File) {
    thaw_fd(mount.as_raw_fd());
}

/// Sends an order. Allocates nothing.
pub(super) fn send(socket: &OwnedFd, order: Order, fds: &[RawFd]) -> io::Result<()> {
    let mut message: Message = match order {
        Order::Freeze(limit) => [FREEZE, limit.as_nanos() as u64, 0],
        Order::Thaw => [THAW, 0, 0],
    };
    let mut control = Control([0; CONTROL_BYTES]);
    let bytes = size_of_val(fds) as u32;
    let (mut part, mut header) = headers(&mut message, &mut control);
    header.msg_iov = &mut part;
    if fds.is_empty() {
        header.msg_controllen = 0;
    } else {
        // SAFETY: pure arithmetic on a length of at most MOUNTS_MAX descriptors.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(bytes) } as usize;
        // SAFETY: the control buffer has room for one header and MOUNTS_MAX descriptors, and
        // `open_each_once` lets no more pass; CMSG_FIRSTHDR points into it.
        unsafe {
            let first = libc::CMSG_FIRSTHDR(&header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(bytes) as usize;
            let data = libc::CMSG_DATA(first).cast::<RawFd>();
            std::ptr::copy_nonoverlapping(fds.as_ptr(), data, fds.len());
        }
    }
    // SAFETY: all that `header` points to lives until the call returns.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &header, libc::MSG_NOSIGNAL) };
    check(sent as i32).map(drop)
}

/// Waits for the child's answer. Allocates nothing. An error: the child is gone.
pub(super) fn receive(socket: &OwnedFd) -> io::Result<Answer> {
    match locked::receive(socket.as_raw_fd())? {
        [FROZEN, ..] => Ok(Answer::Frozen),
        [FAILED, index, errno] => Ok(Answer::Failed { index: index as usize, errno: errno as i32 }),
        [THAWED, nanos, intact] => {
            Ok(Answer::Thawed { frozen: Duration::from_nanos(nanos), intact: intact == 1 })
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The headers of a message; the caller links the one to the other once both have their place.
fn headers(message: &mut Message, control: &mut Control) -> (libc::iovec, libc::msghdr) {
    let part = libc::iovec { iov_base: message.as_mut_ptr().cast(), iov_len: MESSAGE_BYTES };
    // SAFETY: all zero is a valid, empty header.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = CONTROL_BYTES;
    (part, header)
}

// ---- below: in the child only. No allocation, no lock, no panic on a path that is taken. ----

/// What is frozen now.
struct Frozen {
    fds: [RawFd; MOUNTS_MAX],
    count: usize,
    since: u64,
    until: u64,
    /// Nothing of it was thawed by its time running out.
    intact: bool,
}

fn child_main(socket: RawFd) {
    let mut frozen = Frozen { fds: [-1; MOUNTS_MAX], count: 0, since: 0, until: 0, intact: false };
    let mut last = (0, false);
    loop {
        if !wait(socket, &frozen) {
            // Its time is over.
            last = (end(&mut frozen, false), false);
            continue;
        }
        let Some(message) = next(socket, &mut frozen) else {
            end(&mut frozen, false);
            return;
        };
        match message {
            [FREEZE, limit, _] => {
                let result = freeze_all(&mut frozen, limit);
                last = (0, false);
                answer(socket, result);
            }
            [THAW, ..] => {
                if frozen.count > 0 {
                    let intact = frozen.intact && now() <= frozen.until;
                    last.0 = end(&mut frozen, intact);
                    last.1 = frozen.intact;
                }
                answer(socket, [THAWED, last.0, u64::from(last.1)]);
            }
            _ => {}
        }
    }
}

/// Waits for an order or the parent's end; false when what is frozen must be thawed.
fn wait(socket: RawFd, frozen: &Frozen) -> bool {
    locked::wait(socket, (frozen.count > 0).then_some(frozen.until))
}

/// The next order, with its descriptors; None when the parent is gone.
fn next(socket: RawFd, frozen: &mut Frozen) -> Option<Message> {
    let mut message: Message = [0; 3];
    let mut control = Control([0; CONTROL_BYTES]);
    let (mut part, mut header) = headers(&mut message, &mut control);
    header.msg_iov = &mut part;
    // SAFETY: all that `header` points to lives here; the kernel fills in at most its lengths.
    let length = unsafe { libc::recvmsg(socket, &mut header, libc::MSG_CMSG_CLOEXEC) };
    if length as usize != MESSAGE_BYTES {
        return None;
    }
    // SAFETY: the kernel wrote the control buffer; the count is bounded by the array it goes to.
    unsafe {
        let first = libc::CMSG_FIRSTHDR(&header);
        if !first.is_null() && (*first).cmsg_type == libc::SCM_RIGHTS {
            let bytes = (*first).cmsg_len - libc::CMSG_LEN(0) as usize;
            let count = (bytes / size_of::<RawFd>()).min(MOUNTS_MAX);
            let data = libc::CMSG_DATA(first).cast::<RawFd>();
            std::ptr::copy_nonoverlapping(data, frozen.fds.as_mut_ptr(), count);
            frozen.count = count;
        }
    }
    Some(message)
}

fn freeze_all(frozen: &mut Frozen, limit: u64) -> Message {
    frozen.since = now();
    frozen.until = frozen.since + limit;
    frozen.intact = true;
    for index in 0..frozen.count {
        // SAFETY: a descriptor that came with the order; the argument is not used.
        let mut result = unsafe { libc::ioctl(frozen.fds[index], FIFREEZE, 0) };
        let done = index + usize::from(result == 0);
        // SAFETY: the thread's own errno.
        let mut errno = unsafe { *libc::__errno_location() };
        if result == 0 && now() > frozen.until {
            (result, errno) = (-1, libc::ETIMEDOUT);
        }
        if result == -1 {
            // What was frozen by somebody else (EBUSY) stays frozen.
            for fd in &frozen.fds[..done] {
                thaw_fd(*fd);
            }
            close_all(frozen);
            return [FAILED, index as u64, errno as u64];
        }
    }
    [FROZEN, 0, 0]
}

/// Thaws all; says how long it was frozen, and whether it was until now.
fn end(frozen: &mut Frozen, intact: bool) -> u64 {
    frozen.intact = intact;
    for fd in &frozen.fds[..frozen.count] {
        if !thaw_fd(*fd) {
            frozen.intact = false;
        }
    }
    let nanos = now() - frozen.since;
    close_all(frozen);
    nanos
}

fn close_all(frozen: &mut Frozen) {
    for fd in &frozen.fds[..frozen.count] {
        // SAFETY: came with an order, is used by nobody else and not again.
        unsafe { libc::close(*fd) };
    }
    frozen.count = 0;
}

fn thaw_fd(fd: RawFd) -> bool {
    // SAFETY: a descriptor that its owner keeps open; the argument is not used.
    unsafe { libc::ioctl(fd, FITHAW, 0) == 0 }
}
