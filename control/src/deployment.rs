//! The deployment: everything that the routes share, and the signals that long polls wait for.
//!
//! The store holds what must not be forgotten; reports, which come every second, live in memory
//! and are saved now and then. Two signals: what somebody is to do has changed, what somebody
//! reported has changed. The lock on the reports is never held over a wait.

use crate::api::{AgentReport, TargetReport, VolumePhase};
use crate::ca::Authority;
use crate::clock::Clock;
use crate::codes::Reason;
use crate::status::{self, Speed};
use crate::store::{self, Store, servers, targets};
use jiff::Timestamp;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::watch;

/// Reports are saved this often at most.
const SAVE_EVERY_SECONDS: i64 = 60;
/// Ids of points that are remembered a server, after a target listed them.
const SEEN_POINTS_MAX: usize = 256;

/// Speeds come from the last so many seconds.
const SPEED_SECONDS: f64 = 60.0;

/// A report and when it came.
#[derive(Debug, Clone)]
pub(crate) struct Heard<R> {
    pub(crate) report: R,
    pub(crate) at: Timestamp,
    saved: Option<Timestamp>,
}

/// What was reported last.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    /// By server id.
    pub(crate) agents: HashMap<String, Heard<AgentReport>>,
    /// By target id.
    pub(crate) targets: HashMap<String, Heard<TargetReport>>,
    /// Points that a target listed, by server id, oldest first. A point may leave the list again
    /// before anybody asks for it.
    seen: HashMap<String, VecDeque<String>>,
    /// Since when a volume is in its phase for its reason, by volume id.
    phases: HashMap<String, (VolumePhase, Option<Reason>, Timestamp)>,
    /// What was counted within the last minute, by server id, oldest first.
    counts: HashMap<String, VecDeque<Count>>,
}

/// What an agent had counted at a time.
#[derive(Debug, Clone, Copy)]
struct Count {
    at: Timestamp,
    sent: u64,
    done: u64,
}

impl Reports {
    /// Keeps a report; true if it is to be saved now.
    fn put<R>(into: &mut HashMap<String, Heard<R>>, id: &str, report: R, now: Timestamp) -> bool {
        let saved = into.get(id).and_then(|heard| heard.saved);
        let due = saved
            .is_none_or(|saved| (now.as_second() - saved.as_second()).abs() >= SAVE_EVERY_SECONDS);
        let saved = if due { Some(now) } else { saved };
        into.insert(id.to_owned(), Heard { report, at: now, saved });
        due
    }

    /// Keeps an agent's report; true if it is to be saved now.
    pub(crate) fn put_agent(&mut self, id: &str, report: AgentReport, now: Timestamp) -> bool {
        for volume in &report.volumes {
            let before = self.phases.get(&volume.id);
            if before.is_none_or(|(phase, code, _)| (*phase, *code) != (volume.phase, volume.code))
            {
                self.phases.insert(volume.id.clone(), (volume.phase, volume.code, now));
            }
        }
        self.count(id, &report, now);
        Self::put(&mut self.agents, id, report, now)
    }

    fn count(&mut self, id: &str, report: &AgentReport, now: Timestamp) {
        let (sent, done) = status::counts(report);
        let counts = self.counts.entry(id.to_owned()).or_default();
        // A restarted agent counts anew, another phase too; a clock may be set back.
        if counts.back().is_some_and(|last| last.sent > sent || last.done > done || last.at > now) {
            counts.clear();
        }
        counts.push_back(Count { at: now, sent, done });
        while counts
            .front()
            .is_some_and(|first| status::seconds_since(first.at, now) > SPEED_SECONDS)
        {
            counts.pop_front();
        }
    }

    /// Speeds of a server's agent within the last minute.
    pub(crate) fn speed(&self, server: &str) -> Speed {
        let ends = self.counts.get(server).and_then(|all| Some((*all.front()?, *all.back()?)));
        let Some((first, last)) = ends else { return Speed::default() };
        let seconds = status::seconds_since(first.at, last.at);
        let per_second = |bytes: u64| (seconds > 0.0).then(|| bytes as f64 / seconds);
        Speed { sent: per_second(last.sent - first.sent), done: per_second(last.done - first.done) }
    }

    /// Since when a volume is as its agent says.
    pub(crate) fn phase_since(&self, volume: &str) -> Option<Timestamp> {
        self.phases.get(volume).map(|(_, _, since)| *since)
    }

    /// Keeps a target's report; true if it is to be saved now.
    pub(crate) fn put_target(&mut self, id: &str, report: TargetReport, now: Timestamp) -> bool {
        for point in &report.points {
            let seen = self.seen.entry(point.server.clone()).or_default();
            if !seen.contains(&point.id) {
                seen.push_back(point.id.clone());
                if seen.len() > SEEN_POINTS_MAX {
                    seen.pop_front();
                }
            }
        }
        Self::put(&mut self.targets, id, report, now)
    }

    /// Whether a target has listed this point.
    pub(crate) fn listed(&self, server: &str, point: &str) -> bool {
        self.seen.get(server).is_some_and(|seen| seen.iter().any(|id| id == point))
    }
}

/// Wakes those who wait for a change of one kind.
#[derive(Debug)]
pub(crate) struct Signal(watch::Sender<u64>);

impl Signal {
    fn new() -> Self {
        Self(watch::Sender::new(0))
    }

    /// Something changed.
    pub(crate) fn raise(&self) {
        self.0.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Changes from now on.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }
}

/// All that the routes share.
pub(crate) struct Deployment {
    pub(crate) store: Store,
    pub(crate) authority: Authority,
    pub(crate) clock: Arc<dyn Clock>,
    /// What somebody is to do changed: assignments, orders.
    pub(crate) assigned: Signal,
    /// What somebody reported changed: states of orders.
    pub(crate) reported: Signal,
    reports: Mutex<Reports>,
}

impl Deployment {
    /// With the reports that were saved last.
    pub(crate) async fn new(
        store: Store,
        authority: Authority,
        clock: Arc<dyn Clock>,
    ) -> store::Result<Arc<Self>> {
        let mut reports = Reports::default();
        let mut tx = store.begin().await?;
        for server in servers::all(&mut tx).await? {
            if let (Some(report), Some(heard)) = (server.report()?, server.heard_ns) {
                reports.put_agent(&server.id, report, store::timestamp(heard));
            }
        }
        for target in targets::all(&mut tx).await? {
            if let (Some(report), Some(heard)) = (target.report()?, target.heard_ns) {
                reports.put_target(&target.id, report, store::timestamp(heard));
            }
        }
        tx.commit().await?;
        Ok(Arc::new(Self {
            store,
            authority,
            clock,
            assigned: Signal::new(),
            reported: Signal::new(),
            reports: Mutex::new(reports),
        }))
    }

    /// The reports; not to be held over a wait.
    pub(crate) fn reports(&self) -> MutexGuard<'_, Reports> {
        self.reports.lock().expect("no holder of the reports panics")
    }

    /// Now.
    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }
}
