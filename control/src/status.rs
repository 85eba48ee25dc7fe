//! State of a server in words: a pure function of what is assigned, what agent and target reported,
//! and the time.
//!
//! Every state other than `protected` has a reason, and the reason says what to type. Loss is told
//! by the newest exact point that a target has listed, whatever an agent claims.

use crate::api::{
    AgentReport, PointReport, ServerStatus, TargetVolumeReport, VolumePhase, VolumeReport,
    VolumeStatus,
};
use jiff::Timestamp;

/// An agent or target that was not heard for this long is away.
pub(crate) const AWAY_SECONDS: f64 = 15.0;

/// What is known of one server.
pub(crate) struct Known<'a> {
    pub(crate) name: &'a str,
    pub(crate) revoked: bool,
    pub(crate) goal_seconds: u64,
    pub(crate) certificate_ends: Timestamp,
    /// All volumes that were ever protected, with whether they are now.
    pub(crate) volumes: Vec<KnownVolume<'a>>,
    /// The agent's last report and when it came.
    pub(crate) agent: Option<(&'a AgentReport, Timestamp)>,
    /// The points of this server, oldest first.
    pub(crate) points: Vec<&'a PointReport>,
}

/// One volume: what is assigned, what agent and target say.
pub(crate) struct KnownVolume<'a> {
    pub(crate) id: &'a str,
    pub(crate) name: &'a str,
    pub(crate) path: &'a str,
    pub(crate) size_bytes: u64,
    pub(crate) protected: bool,
    pub(crate) agent: Option<&'a VolumeReport>,
    pub(crate) target: Option<&'a TargetVolumeReport>,
}

/// The whole row of a server.
pub(crate) fn server_status(known: &Known<'_>, now: Timestamp) -> ServerStatus {
    let loss_seconds = newest_exact(known).map(|point| {
        let loss_ns = now.as_nanosecond() - i128::from(point.time_ns);
        (loss_ns as f64 / 1e9).max(0.0)
    });
    let heard_seconds = known.agent.map(|(_, at)| seconds_since(at, now));
    let (state, reason) = state(known, loss_seconds, heard_seconds, now);
    let volumes: Vec<VolumeStatus> = known.volumes.iter().map(volume_status).collect();
    ServerStatus {
        name: known.name.to_owned(),
        state: state.to_owned(),
        reason,
        loss_seconds,
        backlog_bytes: volumes.iter().map(|volume| volume.backlog_bytes).sum(),
        goal_seconds: known.goal_seconds,
        heard_seconds,
        certificate_ends: known.certificate_ends.to_string(),
        volumes,
    }
}

/// Seconds from then to now; never negative, whatever clocks do.
pub(crate) fn seconds_since(then: Timestamp, now: Timestamp) -> f64 {
    ((now.as_nanosecond() - then.as_nanosecond()) as f64 / 1e9).max(0.0)
}

/// A length of time for people.
pub(crate) fn duration(seconds: f64) -> String {
    match seconds as u64 {
        whole @ 0..120 => format!("{whole} s"),
        whole @ 120..7200 => format!("{} min", whole / 60),
        whole @ 7200..172_800 => format!("{} h", whole / 3600),
        whole => format!("{} d", whole / 86400),
    }
}

fn newest_exact<'a>(known: &Known<'a>) -> Option<&'a PointReport> {
    known.points.iter().rev().find(|point| point.consistency != "fuzzy").copied()
}

/// The first of these that applies; each with its reason.
fn state(
    known: &Known<'_>,
    loss_seconds: Option<f64>,
    heard_seconds: Option<f64>,
    now: Timestamp,
) -> (&'static str, String) {
    let name = known.name;
    if known.revoked {
        let reason = "its certificates were revoked; replica and points stay. To bring it back \
                      under another name: secondsite token, then on the server: secondsite join";
        return ("stopped", reason.to_owned());
    }
    if !known.volumes.iter().any(|volume| volume.protected) {
        let type_ = format!("secondsite protect {name} --volumes all");
        return match known.volumes.is_empty() {
            true => ("joined", format!("nothing is replicated yet. Type: {type_}")),
            false => (
                "unprotected",
                format!("replication was ended; replica and points stay. Type: {type_}"),
            ),
        };
    }
    let (Some((report, _)), Some(heard)) = (known.agent, heard_seconds) else {
        let reason = "its agent has not reported yet; replication starts when it does. On the \
                      server: systemctl status secondsite-agent";
        return ("waiting", reason.to_owned());
    };
    if heard > AWAY_SECONDS {
        return ("away", away(known, heard, now));
    }
    if let Some(stopped) = &report.stopped {
        return ("stopped", stopped.clone());
    }
    working(known, report, loss_seconds)
}

fn away(known: &Known<'_>, heard: f64, now: Timestamp) -> String {
    let heard = duration(heard);
    if known.certificate_ends <= now {
        return format!(
            "not heard for {heard}; its certificate ended {}. On the server: secondsite join, with \
             a new token and the same name",
            known.certificate_ends
        );
    }
    format!(
        "not heard for {heard}; points that are there stay. On the server: systemctl status \
         secondsite-agent"
    )
}

/// The agent is there and does something.
fn working(
    known: &Known<'_>,
    report: &AgentReport,
    loss_seconds: Option<f64>,
) -> (&'static str, String) {
    let protected: Vec<_> = known.volumes.iter().filter(|volume| volume.protected).collect();
    let stopped = protected.iter().filter_map(|volume| {
        let at_target = volume.target.and_then(|target| target.error.as_ref());
        let by_agent = volume.agent.filter(|agent| agent.phase == VolumePhase::Stopped);
        at_target
            .map(|error| format!("{}: the target stopped it: {error}", volume.name))
            .or_else(|| by_agent.map(|agent| format!("{}: {}", volume.name, agent.reason)))
    });
    let stopped: Vec<String> = stopped.collect();
    if !stopped.is_empty() {
        return ("stopped", stopped.join("; "));
    }
    let in_phase = |phase| -> Vec<&&KnownVolume<'_>> {
        let phase_of = |volume: &KnownVolume<'_>| {
            volume.agent.map_or(VolumePhase::Connecting, |agent| agent.phase)
        };
        protected.iter().filter(|volume| phase_of(volume) == phase).collect()
    };
    let behind = loss_seconds.filter(|loss| *loss > known.goal_seconds as f64);
    let connecting = in_phase(VolumePhase::Connecting);
    if !connecting.is_empty() {
        let why = sentences(&connecting, "it has no session with the target yet");
        return match behind {
            Some(loss) => ("behind", format!("newest exact point {} ago; {why}", duration(loss))),
            None => ("waiting", why),
        };
    }
    let copying = in_phase(VolumePhase::FirstCopy);
    if !copying.is_empty() {
        return ("first copy", progress(&copying, "copied"));
    }
    let comparing = in_phase(VolumePhase::Comparing);
    if !comparing.is_empty() {
        return ("comparing", progress(&comparing, "compared"));
    }
    following(known, report, loss_seconds, &protected)
}

/// All volumes are followed: inside the goal, or why not.
fn following(
    known: &Known<'_>,
    report: &AgentReport,
    loss_seconds: Option<f64>,
    protected: &[&KnownVolume<'_>],
) -> (&'static str, String) {
    let explain = |fallback: &str| {
        let said: Vec<String> = protected
            .iter()
            .filter_map(|volume| {
                let agent = volume.agent?;
                let said =
                    if agent.reason.is_empty() { &agent.tracker_reason } else { &agent.reason };
                (!said.is_empty()).then(|| format!("{}: {said}", volume.name))
            })
            .collect();
        if said.is_empty() { fallback.to_owned() } else { said.join("; ") }
    };
    let Some(loss) = loss_seconds else {
        return match known.points.last() {
            Some(fuzzy) => (
                "behind",
                format!("no point is exact yet (the newest: {}); {}", fuzzy.reason, explain("")),
            ),
            None => {
                ("waiting", format!("no point yet; {}", explain("the first one is on its way")))
            }
        };
    };
    let lacking: Vec<&str> = newest_exact(known)
        .into_iter()
        .flat_map(|point| &point.lacking)
        .filter_map(|id| protected.iter().find(|volume| volume.id == id))
        .map(|volume| volume.name)
        .collect();
    if loss > known.goal_seconds as f64 {
        let backlog: u64 = report.volumes.iter().map(|volume| volume.backlog_bytes).sum();
        let fallback = format!("{backlog} bytes wait to be sent");
        let reason = format!(
            "newest exact point {} ago, the goal is {}; nothing is lost while {} lives. {}",
            duration(loss),
            duration(known.goal_seconds as f64),
            known.name,
            explain(&fallback)
        );
        return ("behind", reason);
    }
    match lacking.is_empty() {
        true => ("protected", String::new()),
        false => (
            "waiting",
            format!("the newest exact point lacks {}; the next has it", lacking.join(", ")),
        ),
    }
}

fn sentences(volumes: &[&&KnownVolume<'_>], fallback: &str) -> String {
    let said = volumes.iter().map(|volume| {
        let reason = volume.agent.map_or("", |agent| agent.reason.as_str());
        let refused = volume.target.and_then(|target| target.refused.as_deref());
        let said = refused.unwrap_or(if reason.is_empty() { fallback } else { reason });
        format!("{}: {said}", volume.name)
    });
    said.collect::<Vec<_>>().join("; ")
}

fn progress(volumes: &[&&KnownVolume<'_>], done: &str) -> String {
    let said = volumes.iter().map(|volume| {
        let agent = volume.agent.expect("it reported its phase");
        let percent = match agent.progress_bytes {
            Some((done_bytes, all)) if all > 0 => {
                let percent = u128::from(done_bytes) * 100 / u128::from(all);
                format!("{} % {done}", percent.min(100))
            }
            _ => format!("being {done}"),
        };
        match agent.reason.is_empty() {
            true => format!("{}: {percent}", volume.name),
            false => format!("{}: {percent}, {}", volume.name, agent.reason),
        }
    });
    said.collect::<Vec<_>>().join("; ")
}

fn volume_status(volume: &KnownVolume<'_>) -> VolumeStatus {
    let none = || "none".to_owned();
    let target = volume.target;
    let target_said =
        target.and_then(|target| target.error.clone().or_else(|| target.refused.clone()));
    let ended = "replication was ended; replica and points stay";
    let mut status = VolumeStatus {
        name: volume.name.to_owned(),
        path: volume.path.to_owned(),
        size_bytes: volume.size_bytes,
        phase: if volume.protected { VolumePhase::Connecting } else { VolumePhase::Stopped },
        reason: if volume.protected { String::new() } else { ended.to_owned() },
        tracker: none(),
        tracker_reason: String::new(),
        cut: none(),
        progress_bytes: None,
        backlog_bytes: 0,
        sent_bytes: 0,
        compares: 0,
        epoch: target.and_then(|target| target.epoch),
        promoted_epoch: target.and_then(|target| target.promoted_epoch),
        replica: target.map(|target| target.replica.clone()),
    };
    if let Some(agent) = volume.agent.filter(|_| volume.protected) {
        status.phase = agent.phase;
        status.reason = agent.reason.clone();
        status.tracker = agent.tracker.clone();
        status.tracker_reason = agent.tracker_reason.clone();
        status.cut = agent.cut.clone();
        status.progress_bytes = agent.progress_bytes;
        status.backlog_bytes = agent.backlog_bytes;
        status.sent_bytes = agent.sent_bytes;
        status.compares = agent.compares;
    }
    if let Some(said) = target_said.filter(|_| volume.protected) {
        let before = std::mem::take(&mut status.reason);
        let both = [before, format!("the target says: {said}")];
        status.reason =
            both.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ");
    }
    status
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
