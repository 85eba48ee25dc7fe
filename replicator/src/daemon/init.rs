//! What a daemon and init say to each other: readiness, status, watchdog, signals.
//!
//! Without init (no NOTIFY_SOCKET) all of this does nothing. The watchdog is fed only while every
//! loop of the daemon goes round or waits for the outside ([`crate::pulse`]).

use crate::cli::failure::{Exit, Failure};
use crate::pulse;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use sd_notify::NotifyState;
use std::os::fd::AsFd;
use std::time::Duration;

/// How often the status line and the watchdog are looked after.
const TICK: Duration = Duration::from_secs(1);
/// Without a watchdog, what hangs for so long is at least said.
const HANG: Duration = Duration::from_secs(60);

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

/// Says that the daemon works, then feeds status and watchdog until a signal ends it. `goes_on` is
/// false when it has ended by itself, `status` one line for people: it must not wait for a disk.
pub fn serve_until_signal(
    signals: &Signals,
    goes_on: impl Fn() -> bool,
    status: impl Fn() -> String,
) {
    let watchdog = sd_notify::watchdog_enabled();
    let limit = watchdog.map_or(HANG, |limit| limit / 2);
    let mut shown = status();
    let mut said = None;
    notify(&[NotifyState::Ready, NotifyState::Status(&shown)]);
    while !signals.wait(watchdog.map_or(TICK, |limit| (limit / 4).min(TICK))) {
        if !goes_on() {
            break;
        }
        let stuck = pulse::stuck().filter(|stuck| stuck.time >= limit).map(|stuck| stuck.name);
        if said != stuck {
            match &stuck {
                Some(name) => tracing::error!("{name} hangs: the watchdog is fed no longer"),
                None => tracing::info!("nothing hangs any more"),
            }
            said.clone_from(&stuck);
        }
        if stuck.is_none() && watchdog.is_some() {
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
