//! What control shows of itself to its own process: that it goes round, what it has answered, and
//! a snapshot for metrics.
//!
//! Counters only rise; all accesses are relaxed, since nothing else is read by them.

use crate::codes::State;
use crate::deployment::Deployment;
use crate::routes;
use jiff::Timestamp;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, Weak};
use std::time::Duration;

/// The loop that accepts connections goes round at least so often.
pub const ROUND: Duration = Duration::from_secs(1);
/// Classes of answers: from 1xx to 5xx.
const CLASSES: usize = 5;

/// See the module.
#[derive(Default)]
pub struct Observed {
    rounds: AtomicU64,
    answers: [AtomicU64; CLASSES],
    deployment: OnceLock<Weak<Deployment>>,
}

/// The deployment at one time.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// A row a server.
    pub servers: Vec<ServerRow>,
    /// Name of a target, and when it reported last.
    pub targets: Vec<(String, Option<Timestamp>)>,
    /// Role and name of every holder of a certificate that is not revoked, and when its newest
    /// certificate ends.
    pub certificates: Vec<(String, String, Timestamp)>,
}

/// One server.
#[derive(Debug, Clone)]
pub struct ServerRow {
    /// Its name.
    pub name: String,
    /// As [`crate::api::ServerStatus::state`].
    pub state: State,
    /// The goal, seconds.
    pub goal_seconds: u64,
    /// Bytes not yet committed at the target.
    pub backlog_bytes: u64,
    /// Time of the newest exact point, nanoseconds since 1970.
    pub newest_exact_ns: Option<u64>,
    /// When its agent reported last.
    pub heard: Option<Timestamp>,
}

impl Observed {
    /// How often the loop that accepts connections has gone round.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// Answers so far by class: `1xx` to `5xx`.
    pub fn answers(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        (1..).zip(self.answers.iter().map(|count| count.load(Ordering::Relaxed)))
    }

    /// The deployment now; an error is for people.
    pub async fn snapshot(&self) -> Result<Snapshot, String> {
        let deployment = self.deployment.get().and_then(Weak::upgrade);
        let deployment = deployment.ok_or("control is starting or stopping")?;
        routes::snapshot(&deployment).await.map_err(|refused| refused.message().to_owned())
    }

    pub(crate) fn serves(&self, deployment: Weak<Deployment>) {
        // One Observed a run; a second run of the same would show the first.
        let _ = self.deployment.set(deployment);
    }

    pub(crate) fn round(&self) {
        self.rounds.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn answered(&self, status: u16) {
        let class = usize::from(status / 100).clamp(1, CLASSES) - 1;
        self.answers[class].fetch_add(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for Observed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Observed").field("rounds", &self.rounds).finish_non_exhaustive()
    }
}
