//! The keeper: starts a server, and the next one when it is gone. Nothing else.
//!
//! A server is forked, never executed: what it needs is in memory already. A keeper's death leaves
//! the server alone; the next keeper (init starts it) ends what is left of the one before, by the
//! locks that those hold, and its own server takes the devices over. An upgrade is the same.

use super::{Places, client, locked, place, say::say, server};
use crate::cli::args::FilterArgs;
use crate::cli::failure::{Exit, Failure};
use crate::daemon::lock::Lock;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2};
use sd_notify::NotifyState;
use std::fs;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

/// A server that lived longer than this was well: the next one starts at once.
const WELL_AFTER: Duration = Duration::from_secs(1);
/// Pause before a start, when servers die at once again and again: the first, and the longest.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long a process of an earlier start may take to end by itself.
const END_PATIENCE: Duration = Duration::from_secs(5);
/// Then it is killed, and this is how long the kernel may take for that.
const KILL_PATIENCE: Duration = Duration::from_secs(60);
const LOCK_POLL: Duration = Duration::from_millis(2);

/// Runs until a signal ends it.
pub(super) fn run(places: &Places, args: &FilterArgs) -> Result<(), Failure> {
    locked::process()?;
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
        set.add(signal);
    }
    let signals = set
        .thread_block()
        .and_then(|()| SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK))
        .map_err(|error| Failure::new(Exit::Failed, format!("filter: signals: {error}")))?;
    // First the other keeper: it would start another server.
    let _lock = take_over(places, KEEPER)?;
    drop(take_over(places, SERVER)?);
    place::remove_other_programs(places);
    let socket = places.socket();
    let _ = fs::remove_file(&socket);
    let listener =
        client::listen(&socket).map_err(|error| Failure::io("listen on", &socket, &error))?;
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o600))
        .map_err(|error| Failure::io("close to others", &socket, &error))?;
    keep(places, args, &signals, &listener)
}

/// Names of the locks.
const KEEPER: &str = "keeper.lock";
pub(super) const SERVER: &str = "server.lock";

/// Ends whoever holds a lock of an earlier start, and takes it.
fn take_over(places: &Places, name: &str) -> Result<Lock, Failure> {
    let path = places.dir.join(name);
    let mut asked: Option<(i32, Instant)> = None;
    loop {
        if let Some(lock) = Lock::try_take(&path)? {
            return Ok(lock);
        }
        let Some(pid) = Lock::holder_of(&path)? else { continue };
        match asked {
            Some((asked_pid, at)) if asked_pid == pid => {
                if at.elapsed() > END_PATIENCE {
                    end(&path, pid, libc::SIGKILL)?;
                }
                if at.elapsed() > END_PATIENCE + KILL_PATIENCE {
                    return Err(Failure::new(
                        Exit::TryLater,
                        format!("filter: process {pid} of an earlier start cannot be ended"),
                    )
                    .hint(format!("cat /proc/{pid}/stack")));
                }
                std::thread::sleep(LOCK_POLL);
            }
            _ => {
                asked = Some((pid, Instant::now()));
                end(&path, pid, libc::SIGTERM)?;
            }
        }
    }
}

/// Signals the holder of a lock, and nobody else: the process is pinned first, and then asked
/// whether it still is the holder.
fn end(path: &std::path::Path, pid: i32, signal: i32) -> Result<(), Failure> {
    // SAFETY: no pointers; the answer is a descriptor of ours, or an error.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Ok(());
    }
    // SAFETY: it was just opened and belongs to nobody else.
    let _pinned = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    if Lock::holder_of(path)? == Some(pid) {
        // SAFETY: no pointers but a null one, as the call allows.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, 0, 0) };
    }
    Ok(())
}

/// Servers, one after the other.
fn keep(
    places: &Places,
    args: &FilterArgs,
    signals: &SignalFd,
    listener: &OwnedFd,
) -> Result<(), Failure> {
    let mut pause = Duration::ZERO;
    let mut ready_once = false;
    loop {
        let started = Instant::now();
        let (server, ready) = start(places, args, listener)?;
        let mut ready = Some(ready);
        let status = loop {
            let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
            if let Some(ready) = &ready {
                fds.push(PollFd::new(ready.as_fd(), PollFlags::POLLIN));
            }
            // EINTR: looked at again.
            let _ = poll(&mut fds, PollTimeout::NONE);
            if fds.get(1).and_then(PollFd::revents).is_some_and(|seen| !seen.is_empty()) {
                let said = ready.take().is_some_and(|ready| says_ready(&ready));
                if said && !ready_once {
                    ready_once = true;
                    // Nobody listens where init is another one.
                    let _ = sd_notify::notify(&[NotifyState::Ready]);
                }
            }
            let mut ending = false;
            while let Ok(Some(signal)) = signals.read_signal() {
                ending |= signal.ssi_signo != Signal::SIGCHLD as u32;
            }
            if ending {
                end_server(server);
                return Ok(());
            }
            match waitpid(server, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => {}
                Ok(status) => break status,
                Err(error) => {
                    return Err(Failure::new(Exit::Failed, format!("filter: wait: {error}")));
                }
            }
        };
        match status {
            WaitStatus::Exited(_, 0) => pause = Duration::ZERO,
            // Nothing that another start would change, and nobody waits for it.
            WaitStatus::Exited(_, code) if !ready_once && code == Exit::Config as i32 => {
                return Err(Failure::new(Exit::Config, "filter: the server cannot start"));
            }
            status => {
                say(&format!("the server ended: {status:?}; it is started again"));
                pause = match started.elapsed() {
                    lived if lived >= WELL_AFTER => Duration::ZERO,
                    _ if pause.is_zero() => PAUSE_MIN,
                    _ => (pause * 2).min(PAUSE_MAX),
                };
            }
        }
        if rest(signals, pause) {
            return Ok(());
        }
    }
}

/// Waits for `pause`; true if a signal says that it is over.
fn rest(signals: &SignalFd, pause: Duration) -> bool {
    let end = Instant::now() + pause;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO));
        while let Ok(Some(signal)) = signals.read_signal() {
            if signal.ssi_signo != Signal::SIGCHLD as u32 {
                return true;
            }
        }
    }
}

fn end_server(server: Pid) {
    let _ = kill(server, Signal::SIGTERM);
    let end = Instant::now() + END_PATIENCE;
    while Instant::now() < end {
        if !matches!(waitpid(server, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive)) {
            return;
        }
        std::thread::sleep(LOCK_POLL);
    }
    let _ = kill(server, Signal::SIGKILL);
    let _ = waitpid(server, None);
}

fn says_ready(ready: &OwnedFd) -> bool {
    let mut byte = [0];
    matches!(nix::unistd::read(ready, &mut byte), Ok(1))
}

/// Forks a server; what it says when it serves comes from the pipe.
fn start(
    places: &Places,
    args: &FilterArgs,
    listener: &OwnedFd,
) -> Result<(Pid, OwnedFd), Failure> {
    let fails =
        |error: Errno| Failure::new(Exit::Failed, format!("filter: start a server: {error}"));
    let (ready, say_ready) = pipe2(OFlag::O_CLOEXEC).map_err(fails)?;
    // SAFETY: this process has one thread, so the child may do whatever this one may.
    match unsafe { fork() }.map_err(fails)? {
        ForkResult::Parent { child } => Ok((child, ready)),
        ForkResult::Child => {
            drop(ready);
            let code = match server::run(places, args, listener, say_ready) {
                Ok(()) => 0,
                Err(failure) => {
                    say(&failure.to_string());
                    failure.exit as i32
                }
            };
            // SAFETY: ends the process; its threads and rings end with it, nothing is to be
            // written back.
            unsafe { libc::_exit(code) }
        }
    }
}

/// The lock of a server, which its keeper has freed; the process before may still be going.
pub(super) fn server_lock(places: &Places) -> Result<Lock, Failure> {
    let path = places.dir.join(SERVER);
    let end = Instant::now() + KILL_PATIENCE;
    loop {
        if let Some(lock) = Lock::try_take(&path)? {
            return Ok(lock);
        }
        if Instant::now() >= end {
            return Err(Failure::new(Exit::TryLater, "filter: another server does not end"));
        }
        std::thread::sleep(LOCK_POLL);
    }
}
