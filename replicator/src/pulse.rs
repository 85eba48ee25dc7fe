//! The pulse of the loops that init's watchdog stands on.
//!
//! Each loop of a daemon joins with its thread and beats every time round. Before it waits for what
//! is outside this process (a disk, a peer, a lock that is held over either) it says so: a slow disk
//! or a dead network is no reason to be killed, and restarting would not help. What remains is a
//! thread that neither comes round nor waits outside: it hangs, and [`stuck`] names it.
//!
//! All loops of the process are in one list, since a process is one daemon. A thread that never
//! joined may call everything here; nothing happens then.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Waiting outside: no beat is due.
const NEVER: u64 = u64::MAX;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);
static ALL: Mutex<Vec<Arc<Pulse>>> = Mutex::new(Vec::new());

thread_local! {
    static OWN: RefCell<Option<Arc<Pulse>>> = const { RefCell::new(None) };
}

/// Of one loop.
#[derive(Debug)]
struct Pulse {
    name: String,
    /// When the next sign of life is due, milliseconds since [`START`]. All accesses are relaxed:
    /// nothing else is read by it, and one tick late is one tick late.
    due: AtomicU64,
}

/// A thread's membership; ends when dropped.
#[derive(Debug)]
pub struct Joined {
    pulse: Arc<Pulse>,
}

/// A loop that hangs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stuck {
    /// Its name.
    pub name: String,
    /// For how long.
    pub time: Duration,
}

/// This thread has a loop from now on.
pub fn join(name: impl Into<String>) -> Joined {
    let pulse = Arc::new(Pulse { name: name.into(), due: AtomicU64::new(now()) });
    all().push(Arc::clone(&pulse));
    OWN.set(Some(Arc::clone(&pulse)));
    Joined { pulse }
}

impl Joined {
    /// For a loop that goes round elsewhere and is watched from this thread.
    pub fn beat_again_in(&self, limit: Duration) {
        self.pulse.due.store(now() + limit.as_millis() as u64, Ordering::Relaxed);
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        all().retain(|other| !Arc::ptr_eq(other, &self.pulse));
        // The thread's own cell may be gone already; then nobody can beat in it either.
        let _ = OWN.try_with(|own| own.take());
    }
}

/// The loop has gone round.
pub fn beat() {
    set_due(now());
}

/// The loop has gone round, and will again within `limit`: for loops that wait in many places.
pub fn beat_again_in(limit: Duration) {
    set_due(now().saturating_add(limit.as_millis() as u64));
}

/// Waits in `wait`, which by itself ends after `limit`; hanging in it longer is hanging.
pub fn resting<T>(limit: Duration, wait: impl FnOnce() -> T) -> T {
    within(now().saturating_add(limit.as_millis() as u64), wait)
}

/// Waits for the outside, however long that takes.
pub fn outside<T>(wait: impl FnOnce() -> T) -> T {
    within(NEVER, wait)
}

fn within<T>(due: u64, wait: impl FnOnce() -> T) -> T {
    let before = OWN.with_borrow(|own| own.as_ref().map(|own| own.due.load(Ordering::Relaxed)));
    match before {
        // In a wait that is outside as a whole.
        Some(NEVER) | None => wait(),
        Some(_) => {
            set_due(due);
            let result = wait();
            beat();
            result
        }
    }
}

/// The loop that has been hanging for longest.
pub fn stuck() -> Option<Stuck> {
    let now = now();
    let all = all();
    let late =
        all.iter().map(|pulse| (now.saturating_sub(pulse.due.load(Ordering::Relaxed)), pulse));
    let (millis, pulse) = late.max_by_key(|(millis, _)| *millis)?;
    (millis > 0).then(|| Stuck { name: pulse.name.clone(), time: Duration::from_millis(millis) })
}

fn set_due(due: u64) {
    OWN.with_borrow(|own| {
        if let Some(own) = own {
            own.due.store(due, Ordering::Relaxed);
        }
    });
}

fn now() -> u64 {
    START.elapsed().as_millis() as u64
}

fn all() -> MutexGuard<'static, Vec<Arc<Pulse>>> {
    ALL.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::{beat, join, outside, resting, stuck};
    use std::sync::mpsc;
    use std::time::Duration;

    const LIMIT: Duration = Duration::from_millis(40);

    /// For how long the loop of this name has been hanging.
    fn late(name: &str) -> Duration {
        stuck().filter(|stuck| stuck.name == name).map_or(Duration::ZERO, |stuck| stuck.time)
    }

    /// Runs `body` in a thread that has joined; meanwhile looks at it from here after [`LIMIT`].
    fn seen_from_outside(name: &'static str, body: fn(&dyn Fn())) -> Duration {
        let (begun, has_begun) = mpsc::channel();
        let (end, may_end) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let _joined = join(name);
            body(&|| {
                begun.send(()).unwrap();
                may_end.recv().unwrap();
            });
        });
        has_begun.recv().unwrap();
        std::thread::sleep(LIMIT * 2);
        let late = late(name);
        end.send(()).unwrap();
        thread.join().unwrap();
        late
    }

    #[test]
    fn only_what_hangs_inside_is_stuck() {
        // One test, since all loops of the process are in one list.
        assert!(seen_from_outside("hangs", |hang| hang()) >= LIMIT);
        assert_eq!(seen_from_outside("waits", |hang| outside(hang)), Duration::ZERO);
        let nested: fn(&dyn Fn()) = |hang| {
            outside(|| {
                outside(|| ());
                resting(Duration::ZERO, || ());
                beat_never();
                hang();
            });
        };
        assert_eq!(seen_from_outside("waits in parts", nested), Duration::ZERO);
        let after: fn(&dyn Fn()) = |hang| {
            outside(|| ());
            hang();
        };
        assert!(seen_from_outside("hangs after a wait", after) >= LIMIT);
        assert_eq!(
            seen_from_outside("rests", |hang| resting(LIMIT * 20, hang)),
            Duration::ZERO,
            "a rest is no hanging before its end"
        );
        assert!(seen_from_outside("overslept", |hang| resting(LIMIT / 4, hang)) >= LIMIT);
        assert_eq!(late("hangs"), Duration::ZERO, "who has left is not missed");
    }

    /// A thread that never joined: nothing happens.
    fn beat_never() {
        std::thread::spawn(|| {
            beat();
            outside(|| ());
        })
        .join()
        .unwrap();
    }
}
