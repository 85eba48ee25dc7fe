//! What a daemon and init say to each other: readiness, status, watchdog, signals.
//!
//! Without init (no NOTIFY_SOCKET) all of this does nothing. The watchdog is fed only while the
//! data loop goes round.

use crate::cli::failure::{Exit, Failure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use sd_notify::NotifyState;
use std::os::fd::AsFd;
use std::time::Duration;

/// How often the status line and the watchdog are looked after.
const TICK: Duration = Duration::from_secs(1);

/// SIGTERM and SIGINT as something to wait for. Make it before the first thread: threads inherit
/// the blocked signals.
pub struct Signals {
    fd: SignalFd,
}

impl Signals {
    /// Blocks the two signals in this thread and those it will start.
    pub fn block() -> Result<Self, Failure> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        let fd = set.thread_block().and_then(|()| {
            SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        });
        fd.map(|fd| Self { fd })
            .map_err(|error| Failure::new(Exit::Failed, format!("signals: {error}")))
    }

    /// Whether one came within `timeout`.
    fn wait(&self, timeout: Duration) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::NONE);
        // EINTR is a tick that came early.
        let _ = poll(&mut fds, timeout);
        matches!(self.fd.read_signal(), Ok(Some(_)))
    }
}

/// Says that the daemon works, then feeds status and watchdog until a signal ends it. `idle` is the
/// time since the data loop last went round (none: it ended by itself), `status` one line for people.
pub fn serve_until_signal(
    signals: &Signals,
    idle: impl Fn() -> Option<Duration>,
    status: impl Fn() -> String,
) {
    let watchdog = sd_notify::watchdog_enabled();
    let mut shown = status();
    notify(&[NotifyState::Ready, NotifyState::Status(&shown)]);
    while !signals.wait(watchdog.map_or(TICK, |limit| (limit / 4).min(TICK))) {
        let Some(idle) = idle() else { break };
        if watchdog.is_some_and(|limit| idle < limit / 2) {
            notify(&[NotifyState::Watchdog]);
        }
        let now = status();
        if now != shown {
            notify(&[NotifyState::Status(&now)]);
            shown = now;
        }
    }
    notify(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
    tracing::info!("stopping");
}

fn notify(states: &[NotifyState<'_>]) {
    // Nobody listens, or init is gone: the daemon goes on all the same.
    let _ = sd_notify::notify(states);
}
