//! The server's end of the socket: a few connections, a line a message, answered in order.

use super::client::{MESSAGE_BYTES_MAX, receive, send};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{SockFlag, accept4, setsockopt, sockopt};
use nix::sys::time::TimeVal;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// Connections at a time; the next ones wait.
const CONNECTIONS_MAX: usize = 16;

/// Why listening has come to an end.
pub(super) enum Heard {
    /// A signal to end.
    Signal,
    /// A change that needs another server.
    Change,
    /// The time was over.
    Nothing,
}

/// Who listens and answers.
pub(super) struct Speaker<'a> {
    listener: &'a OwnedFd,
    connections: Vec<OwnedFd>,
    buffer: Box<[u8; MESSAGE_BYTES_MAX]>,
}

impl<'a> Speaker<'a> {
    /// Takes connections from this socket.
    pub fn new(listener: &'a OwnedFd) -> Self {
        let connections = Vec::with_capacity(CONNECTIONS_MAX);
        Self { listener, connections, buffer: Box::new([0; MESSAGE_BYTES_MAX]) }
    }

    /// Answers until something else is to be done.
    pub fn listen(
        &mut self,
        signals: &SignalFd,
        wait: Option<Duration>,
        mut answer: impl FnMut(&str) -> (Vec<String>, bool),
    ) -> Heard {
        loop {
            let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
            fds.extend(
                self.connections.iter().map(|one| PollFd::new(one.as_fd(), PollFlags::POLLIN)),
            );
            if self.connections.len() < CONNECTIONS_MAX {
                fds.push(PollFd::new(self.listener.as_fd(), PollFlags::POLLIN));
            }
            let limit = wait.and_then(|wait| PollTimeout::try_from(wait).ok());
            match poll(&mut fds, limit.unwrap_or(PollTimeout::NONE)) {
                Ok(0) => return Heard::Nothing,
                // EINTR, or no memory for a moment.
                Err(_) => continue,
                Ok(_) => {}
            }
            let seen: Vec<bool> =
                fds.iter().map(|fd| fd.revents().is_some_and(|seen| !seen.is_empty())).collect();
            drop(fds);
            if seen[0] && matches!(signals.read_signal(), Ok(Some(_))) {
                return Heard::Signal;
            }
            let before = self.connections.len();
            let mut change = false;
            for index in (0..before).rev() {
                if !seen[1 + index] {
                    continue;
                }
                let goes_on = match receive(&self.connections[index], &mut self.buffer[..]) {
                    Ok(Some(line)) => {
                        let (lines, changes) = answer(line);
                        change |= changes;
                        lines.iter().all(|line| send(&self.connections[index], line).is_ok())
                    }
                    _ => false,
                };
                if !goes_on {
                    self.connections.swap_remove(index);
                }
            }
            if change {
                return Heard::Change;
            }
            if seen.get(1 + before) == Some(&true) {
                let flags = SockFlag::SOCK_CLOEXEC;
                if let Ok(fd) = accept4(self.listener.as_raw_fd(), flags) {
                    // SAFETY: it was just accepted and belongs to nobody else.
                    let connection = unsafe { OwnedFd::from_raw_fd(fd) };
                    // Who does not read what it asked for loses the connection, not we our time.
                    let limit = TimeVal::new(1, 0);
                    if setsockopt(&connection, sockopt::SendTimeout, &limit).is_ok() {
                        self.connections.push(connection);
                    }
                }
            }
        }
    }
}
