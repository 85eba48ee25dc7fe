//! What the target's workers have to do: open volumes, look after servers' points.
//!
//! A job waits at most once and never runs twice at the same time; one added while it runs, runs
//! again afterwards. So the queue is bounded by the number of servers and volumes.

use crate::pulse;
use secondsite_format::ids::{ServerId, VolumeId};
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};

/// A thing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Job {
    /// Open a volume: check its journal, open its replica.
    Open(ServerId, VolumeId),
    /// Promote, gather and thin the volumes of a server as its points allow.
    Tend(ServerId),
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Job>,
    running: Vec<Job>,
    ended: bool,
}

/// The queue.
#[derive(Default)]
pub struct Jobs {
    state: Mutex<State>,
    changed: Condvar,
}

impl Jobs {
    /// Adds a job that is not waiting yet.
    pub fn add(&self, job: Job) {
        let mut state = self.lock();
        if !state.waiting.contains(&job) {
            state.waiting.push_back(job);
            self.changed.notify_all();
        }
    }

    /// Waits for a job; none when it is over. The caller says [`Self::done`].
    pub fn next(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if state.ended {
                return None;
            }
            if let Some(at) = state.waiting.iter().position(|job| !state.running.contains(job)) {
                let job = state.waiting.remove(at)?;
                state.running.push(job);
                return Some(job);
            }
            let wait = || self.changed.wait(state);
            state = pulse::outside(wait).expect("nothing panics while it holds the queue");
        }
    }

    /// A job from [`Self::next`] has run.
    pub fn done(&self, job: Job) {
        self.lock().running.retain(|other| *other != job);
        self.changed.notify_all();
    }

    /// Whether a job is waiting.
    pub fn any(&self) -> bool {
        !self.lock().waiting.is_empty()
    }

    /// No further job is handed out.
    pub fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the queue")
    }
}
