//! Words of a process that is killed before any of its steps, chosen by the test; what it wrote
//! stays. Beside each step somebody else may do something.

use secondsite_tracker::sync::Word;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

thread_local! {
    /// Steps that this "process" may still take.
    static STEPS_LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    static BESIDE: RefCell<Option<Rc<dyn Fn()>>> = const { RefCell::new(None) };
}

struct Killed;

/// One step of the process.
pub fn step() {
    let left = STEPS_LEFT.get();
    if left == 0 {
        resume_unwind(Box::new(Killed));
    }
    STEPS_LEFT.set(left - 1);
    let beside = BESIDE.with_borrow(Clone::clone);
    beside.inspect(|beside| beside());
}

/// What happens beside each step from now on.
pub fn beside(what: Option<Rc<dyn Fn()>>) {
    BESIDE.set(what);
}

/// Runs a process that is killed after so many steps. Whether it came to its end before.
pub fn dies_after(steps: u64, run: impl FnOnce()) -> bool {
    STEPS_LEFT.set(steps);
    let end = catch_unwind(AssertUnwindSafe(run));
    STEPS_LEFT.set(u64::MAX);
    match end {
        Ok(()) => true,
        Err(cause) if cause.is::<Killed>() => false,
        Err(cause) => resume_unwind(cause),
    }
}

/// A word of the process, each access of which is a step.
pub struct Mortal(pub AtomicU64);

impl Word for Mortal {
    fn load(&self, order: Ordering) -> u64 {
        step();
        self.0.load(order)
    }
    fn store(&self, value: u64, order: Ordering) {
        step();
        self.0.store(value, order)
    }
    fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        step();
        self.0.fetch_or(bits, order)
    }
    fn fetch_and(&self, bits: u64, order: Ordering) -> u64 {
        step();
        self.0.fetch_and(bits, order)
    }
    fn fence(_: Ordering) {}
}

/// So many of them, zero.
pub fn words(count: usize) -> std::sync::Arc<[Mortal]> {
    (0..count).map(|_| Mortal(0.into())).collect()
}
