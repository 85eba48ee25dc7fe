//! The child that freezes, waits and thaws, and the socket over which it is told to.
//!
//! The child is forked and never executes anything else: between fork and exit it only makes
//! system calls, on memory that is locked, with all signals blocked. It holds no descriptor of its
//! parent but its end of the socket, whose end of file is the parent's death.

use super::MOUNTS_MAX;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)` of linux/fs.h.
const FIFREEZE: libc::Ioctl = 0xc004_5877u32 as libc::Ioctl;
const FITHAW: libc::Ioctl = 0xc004_5878u32 as libc::Ioctl;

/// A message: kind, then two numbers.
type Message = [u64; 3];
const MESSAGE_BYTES: usize = size_of::<Message>();
const FREEZE: u64 = 1;
const THAW: u64 = 2;
const READY: u64 = 3;
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
    let mut ends = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: `ends` has room for the two descriptors.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) })?;
    // SAFETY: both were just made and belong to nobody else.
    let [ours, theirs] = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
    // SAFETY: the child runs `child_main` only, which makes system calls and never returns.
    match check(unsafe { libc::fork() })? {
        0 => child_main(theirs.as_raw_fd()),
        pid => {
            drop(theirs);
            match receive_message(&ours)? {
                [READY, 0, _] => Ok((pid, ours)),
                [_, errno, _] => Err(io::Error::from_raw_os_error(errno as i32)),
            }
        }
    }
}

/// Waits until the child is gone.
pub(super) fn wait_for_end(pid: libc::pid_t) {
    loop {
        // SAFETY: waits for a child of this process, which nobody else waits for; no status wanted.
        let done = unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
        if done != -1 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return;
        }
    }
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
    match receive_message(socket)? {
        [FROZEN, ..] => Ok(Answer::Frozen),
        [FAILED, index, errno] => Ok(Answer::Failed { index: index as usize, errno: errno as i32 }),
        [THAWED, nanos, intact] => {
            Ok(Answer::Thawed { frozen: Duration::from_nanos(nanos), intact: intact == 1 })
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn receive_message(socket: &OwnedFd) -> io::Result<Message> {
    let mut message: Message = [0; 3];
    loop {
        // SAFETY: `message` is valid for MESSAGE_BYTES, and any bytes are a message.
        let length = unsafe {
            libc::recv(socket.as_raw_fd(), message.as_mut_ptr().cast(), MESSAGE_BYTES, 0)
        };
        match length {
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            -1 => return Err(io::Error::last_os_error()),
            length if length as usize == MESSAGE_BYTES => return Ok(message),
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

fn check(result: i32) -> io::Result<i32> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
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

fn child_main(socket: RawFd) -> ! {
    let errno = prepare(socket);
    answer(socket, [READY, errno as u64, 0]);
    if errno != 0 {
        exit();
    }
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
            exit();
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

/// Locks the child in memory and cuts what ties it to its parent.
fn prepare(socket: RawFd) -> i32 {
    // SAFETY: system calls on this process alone; `signals` is filled before it is used; no
    // descriptor that is closed here is used by the child.
    unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut signals);
        libc::sigprocmask(libc::SIG_BLOCK, &signals, std::ptr::null_mut());
        // A terminal's or a supervisor's signal to the group is not for it.
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, c"freezer".as_ptr());
        // Another child's parent end among them would hide the parent's death from that child.
        let socket = socket as libc::c_uint;
        if socket > 3 {
            libc::syscall(libc::SYS_close_range, 3, socket - 1, 0);
        }
        libc::syscall(libc::SYS_close_range, socket + 1, libc::c_uint::MAX, 0);
        if libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) == -1 {
            return *libc::__errno_location();
        }
    }
    0
}

/// Waits for an order or the parent's end; false when what is frozen must be thawed.
fn wait(socket: RawFd, frozen: &Frozen) -> bool {
    let mut poll = libc::pollfd { fd: socket, events: libc::POLLIN, revents: 0 };
    loop {
        let left = match frozen.count {
            0 => -1,
            // Rounded up: never a thaw before its time.
            _ => frozen.until.saturating_sub(now()).div_ceil(1_000_000) as i32,
        };
        // SAFETY: one entry, valid during the call.
        match unsafe { libc::poll(&mut poll, 1, left) } {
            0 => return false,
            1 => return true,
            _ => {}
        }
    }
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

fn answer(socket: RawFd, message: Message) {
    // SAFETY: `message` lives during the call. If the parent is gone, the next wait says so.
    unsafe { libc::send(socket, message.as_ptr().cast(), MESSAGE_BYTES, libc::MSG_NOSIGNAL) };
}

fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid; this clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn exit() -> ! {
    // SAFETY: ends the child without running anything of the parent's.
    unsafe { libc::_exit(0) }
}
