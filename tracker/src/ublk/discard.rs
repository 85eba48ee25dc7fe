//! Discards of one queue. Older kernels take them only as an ioctl that waits, so a thread of its
//! own gives them, one after the other; the queue goes on meanwhile.
//!
//! The thread shares the descriptors of the process: while one of its discards is on its way the
//! character device stays open, and nobody takes the device over.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

/// `_IO(0x12, 119)` of linux/fs.h.
const BLKDISCARD: libc::Ioctl = 0x1277;
/// What the thread needs, which is little; all of it is locked in memory.
pub(super) const STACK_BYTES: usize = 128 << 10;

/// A discard that was asked for.
struct Wanted {
    tag: u16,
    range: [u64; 2],
}

struct State {
    wanted: VecDeque<Wanted>,
    /// Tags and results that the queue has not fetched.
    done: Vec<(u16, i32)>,
    over: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The thread, and what is asked of it.
pub(super) struct Discards {
    shared: Arc<Shared>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Discards {
    /// Starts the thread for the device behind `backing`; it calls `wake` after each discard.
    pub fn start(backing: RawFd, depth: u16, wake: impl Fn() + Send + 'static) -> io::Result<Self> {
        let state = State {
            wanted: VecDeque::with_capacity(depth.into()),
            done: Vec::with_capacity(depth.into()),
            over: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let theirs = shared.clone();
        let thread = thread::Builder::new()
            .name("discard".into())
            .stack_size(STACK_BYTES)
            .spawn(move || work(backing, &theirs, wake))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Asks for one. A tag asks again only after its result was fetched, so there is room.
    pub fn ask(&self, tag: u16, offset: u64, bytes: u64) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.wanted.push_back(Wanted { tag, range: [offset, bytes] });
        self.shared.changed.notify_one();
    }

    /// One that is done: its tag, and 0 or what the kernel said.
    pub fn fetch(&self) -> Option<(u16, i32)> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).done.pop()
    }
}

impl Drop for Discards {
    fn drop(&mut self) {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).over = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // It ends by itself, and cannot panic.
            let _ = thread.join();
        }
    }
}

fn work(backing: RawFd, shared: &Shared, wake: impl Fn()) {
    let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let Some(wanted) = state.wanted.pop_front() else {
            if state.over {
                return;
            }
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(state);
        // SAFETY: the descriptor belongs to the backing device, which outlives the queue and with
        // it this thread; the range is two numbers, as the call wants them.
        let answer = unsafe { libc::ioctl(backing, BLKDISCARD, wanted.range.as_ptr()) };
        let result = match answer {
            0 => 0,
            _ => -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
        };
        state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.done.push((wanted.tag, result));
        drop(state);
        wake();
        state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
    }
}
