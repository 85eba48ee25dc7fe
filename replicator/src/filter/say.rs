//! A line on stderr that never waits: whoever reads it may itself wait for a device that is served
//! here. What cannot be taken now is lost.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, AsRawFd};

/// Says one line.
pub(super) fn say(text: &str) {
    let stderr = std::io::stderr();
    let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut fds, PollTimeout::ZERO) != Ok(1) {
        return;
    }
    let line = format!("secondsite filter: {text}\n");
    // SAFETY: writes what `line` holds; a line fits where POLLOUT was said.
    unsafe { libc::write(stderr.as_raw_fd(), line.as_ptr().cast(), line.len()) };
}
