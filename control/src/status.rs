//! State of a server in words and codes: a pure function of what is assigned, what agent and target
//! reported, and the time.
//!
//! Every state other than `protected` has a reason, and the reason says what to type. Loss is told
//! by the newest exact point that a target has listed, whatever an agent claims. Percentages are of
//! durable bytes; volumes that are through with their first copy count in full.

use crate::api::{
    AgentReport, PointReport, ServerStatus, TargetVolumeReport, VolumePhase, VolumeReport,
    VolumeStatus,
};
use crate::codes::{Reason, State};
use jiff::{SignedDuration, Timestamp};

/// An agent or target that was not heard for this long is away.
pub(crate) const AWAY_SECONDS: f64 = 15.0;

/// What is known of one server.
pub(crate) struct Known<'a> {
    pub(crate) name: &'a str,
    pub(crate) revoked: bool,
    pub(crate) goal_seconds: u64,
    /// How long the policy keeps points; none: the newest alone.
    pub(crate) keep_seconds: Option<u64>,
    pub(crate) certificate_ends: Timestamp,
    /// When it joined, was protected, unprotected or revoked last.
    pub(crate) decided: Option<Timestamp>,
    /// All volumes that were ever protected, with whether they are now.
    pub(crate) volumes: Vec<KnownVolume<'a>>,
    /// The agent's last report and when it came.
    pub(crate) agent: Option<(&'a AgentReport, Timestamp)>,
    /// The points of this server, oldest first.
    pub(crate) points: Vec<&'a PointReport>,
    /// Speeds of the last minute.
    pub(crate) speed: Speed,
}

/// Speeds of the last minute, bytes a second; none if too little is known.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Speed {
    /// Bytes to the target.
    pub(crate) sent: Option<f64>,
    /// Bytes copied or compared.
    pub(crate) done: Option<f64>,
}

/// One volume: what is assigned, what agent and target say.
pub(crate) struct KnownVolume<'a> {
    pub(crate) id: &'a str,
    pub(crate) name: &'a str,
    pub(crate) path: &'a str,
    pub(crate) size_bytes: u64,
    pub(crate) protected: bool,
    pub(crate) agent: Option<&'a VolumeReport>,
    /// Since when the agent reports this phase and code.
    pub(crate) since: Option<Timestamp>,
    pub(crate) target: Option<&'a TargetVolumeReport>,
}

impl KnownVolume<'_> {
    fn phase(&self) -> VolumePhase {
        self.agent.map_or(VolumePhase::Connecting, |agent| agent.phase)
    }

    /// Why it does not simply follow. Where the target has stopped, that is why.
    fn code(&self) -> Option<Reason> {
        let by_target = self.target.and_then(|target| target.error.as_ref());
        let by_agent = self.agent.and_then(|agent| {
            agent.code.or_else(|| (!agent.reason.is_empty()).then_some(Reason::Other))
        });
        by_target.map(|_| Reason::TargetStorage).or(by_agent)
    }
}

/// The state with its reason.
struct Told {
    state: State,
    code: Option<Reason>,
    reason: String,
    since: Option<Timestamp>,
}

fn told(state: State, code: Reason, reason: impl Into<String>) -> Told {
    Told { state, code: Some(code), reason: reason.into(), since: None }
}

impl Told {
    fn since(mut self, since: Option<Timestamp>) -> Self {
        self.since = since;
        self
    }
}

/// The whole row of a server.
pub(crate) fn server_status(known: &Known<'_>, now: Timestamp) -> ServerStatus {
    let loss_seconds = newest_exact(known).map(|point| {
        let loss_ns = now.as_nanosecond() - i128::from(point.time_ns);
        (loss_ns as f64 / 1e9).max(0.0)
    });
    let heard_seconds = known.agent.map(|(_, at)| seconds_since(at, now));
    let Told { state, code, reason, since } = state(known, loss_seconds, heard_seconds, now);
    let volumes: Vec<VolumeStatus> = known.volumes.iter().map(volume_status).collect();
    let progress = progress(known, state);
    // Of one that is silent there are only speeds of then.
    let speed = match heard_seconds {
        Some(heard) if heard <= AWAY_SECONDS => known.speed,
        _ => Speed::default(),
    };
    let left = |(done, all): (u64, u64)| {
        let speed = speed.done.filter(|speed| *speed > 0.0)?;
        Some((all - done) as f64 / speed)
    };
    ServerStatus {
        name: known.name.to_owned(),
        state,
        code,
        reason,
        since: since.map(|since| since.min(now).to_string()),
        loss_seconds,
        backlog_bytes: volumes.iter().map(|volume| volume.backlog_bytes).sum(),
        goal_seconds: known.goal_seconds,
        history_seconds: history(known),
        keep_seconds: known.keep_seconds,
        percent: progress.map(percent),
        left_seconds: progress.and_then(left),
        sending_bytes_per_second: speed.sent,
        heard_seconds,
        certificate_ends: known.certificate_ends.to_string(),
        volumes,
    }
}

/// From the oldest point that can be opened to the newest, seconds.
fn history(known: &Known<'_>) -> Option<f64> {
    let times = || known.points.iter().map(|point| point.time_ns);
    let (oldest, newest) = (times().min()?, times().max()?);
    Some((newest - oldest) as f64 / 1e9)
}

/// Done and total bytes of the first copy or compare that the state speaks of.
fn progress(known: &Known<'_>, state: State) -> Option<(u64, u64)> {
    let part = |volume: &KnownVolume<'_>| {
        let reported = volume.agent.and_then(|agent| agent.progress_bytes);
        let size = volume.size_bytes;
        match (state, volume.phase()) {
            (State::FirstCopy, VolumePhase::FirstCopy) => reported.or(Some((0, size))),
            // Through with it: it counts in full, so that the whole never falls.
            (State::FirstCopy, _) => Some((size, size)),
            (State::Comparing, VolumePhase::Comparing) => reported,
            _ => None,
        }
    };
    let parts = known.volumes.iter().filter(|volume| volume.protected).filter_map(part);
    let sum = parts.fold((0u64, 0u64), |(done, all), (d, a)| (done + d.min(a), all + a));
    (sum.1 > 0).then_some(sum)
}

/// Full only when all of it is done.
fn percent((done, all): (u64, u64)) -> u8 {
    (u128::from(done) * 100 / u128::from(all.max(1))).min(100) as u8
}

/// Bytes sent, and bytes copied or compared, of all volumes of a report: what speeds are made of.
pub(crate) fn counts(report: &AgentReport) -> (u64, u64) {
    let sent = report.volumes.iter().map(|volume| volume.sent_bytes).sum();
    let done = report.volumes.iter().filter_map(|volume| volume.progress_bytes);
    (sent, done.map(|(done, _)| done).sum())
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

fn says_all_is_well(code: Reason) -> bool {
    matches!(code, Reason::FilterMemoryOnly | Reason::FilterReserve)
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
) -> Told {
    let name = known.name;
    let decided = known.decided;
    if known.revoked {
        let reason = "its certificates were revoked; replica and points stay. To bring it back \
                      under another name: secondsite token, then on the server: secondsite join";
        return told(State::Stopped, Reason::CertificateRevoked, reason).since(decided);
    }
    if !known.volumes.iter().any(|volume| volume.protected) {
        let type_ = format!("secondsite protect {name} --volumes all");
        let told = match known.volumes.is_empty() {
            true => told(
                State::Joined,
                Reason::NothingProtected,
                format!("nothing is replicated yet. Type: {type_}"),
            ),
            false => told(
                State::Unprotected,
                Reason::ReplicationEnded,
                format!("replication was ended; replica and points stay. Type: {type_}"),
            ),
        };
        return told.since(decided);
    }
    let (Some((report, heard_at)), Some(heard)) = (known.agent, heard_seconds) else {
        let reason = "its agent has not reported yet; replication starts when it does. On the \
                      server: systemctl status secondsite-agent";
        return told(State::Waiting, Reason::AgentNotStarted, reason).since(decided);
    };
    if heard > AWAY_SECONDS {
        return away(known, heard, now).since(Some(heard_at));
    }
    if let Some(stopped) = &report.stopped {
        return told(State::Stopped, Reason::OtherMachine, stopped);
    }
    working(known, report, loss_seconds)
}

fn away(known: &Known<'_>, heard: f64, now: Timestamp) -> Told {
    let heard = duration(heard);
    if known.certificate_ends <= now {
        let reason = format!(
            "not heard for {heard}; its certificate ended {}. On the server: secondsite join, with \
             a new token and the same name",
            known.certificate_ends
        );
        return told(State::Away, Reason::CertificateEnded, reason);
    }
    let reason = format!(
        "not heard for {heard}; points that are there stay. On the server: systemctl status \
         secondsite-agent"
    );
    told(State::Away, Reason::AgentSilent, reason)
}

/// When the newest exact point became older than the goal.
fn behind_since(known: &Known<'_>) -> Option<Timestamp> {
    let point = crate::store::timestamp(i64::try_from(newest_exact(known)?.time_ns).ok()?);
    let goal = i64::try_from(known.goal_seconds).ok()?;
    point.checked_add(SignedDuration::from_secs(goal)).ok()
}

/// The code of the first volume that has one, and since when the first of them all is as it is.
fn first_of(volumes: &[&KnownVolume<'_>], fallback: Reason) -> (Reason, Option<Timestamp>) {
    let code = volumes.iter().find_map(|volume| volume.code()).unwrap_or(fallback);
    (code, volumes.iter().filter_map(|volume| volume.since).min())
}

/// The agent is there and does something.
fn working(known: &Known<'_>, report: &AgentReport, loss_seconds: Option<f64>) -> Told {
    let protected: Vec<_> = known.volumes.iter().filter(|volume| volume.protected).collect();
    let said = |volume: &&KnownVolume<'_>| {
        let at_target = volume.target.and_then(|target| target.error.as_ref());
        let by_agent = volume.agent.filter(|agent| agent.phase == VolumePhase::Stopped);
        at_target
            .map(|error| format!("{}: the target stopped it: {error}", volume.name))
            .or_else(|| by_agent.map(|agent| format!("{}: {}", volume.name, agent.reason)))
    };
    let stopped: Vec<_> =
        protected.iter().filter(|volume| said(volume).is_some()).copied().collect();
    if !stopped.is_empty() {
        let reasons: Vec<String> = stopped.iter().filter_map(said).collect();
        let (code, since) = first_of(&stopped, Reason::Other);
        return told(State::Stopped, code, reasons.join("; ")).since(since);
    }
    let in_phase = |phase| -> Vec<&KnownVolume<'_>> {
        protected.iter().filter(|volume| volume.phase() == phase).copied().collect()
    };
    let behind = loss_seconds.filter(|loss| *loss > known.goal_seconds as f64);
    let connecting = in_phase(VolumePhase::Connecting);
    if !connecting.is_empty() {
        let why = sentences(&connecting, "it has no session with the target yet");
        let (code, since) = first_of(&connecting, Reason::Connecting);
        return match behind {
            Some(loss) => {
                let reason = format!("newest exact point {} ago; {why}", duration(loss));
                told(State::Behind, code, reason).since(behind_since(known))
            }
            None => told(State::Waiting, code, why).since(since),
        };
    }
    let copying = in_phase(VolumePhase::FirstCopy);
    if !copying.is_empty() {
        let (code, since) = first_of(&copying, Reason::FirstCopyRunning);
        return told(State::FirstCopy, code, progress_text(&copying, "copied")).since(since);
    }
    let comparing = in_phase(VolumePhase::Comparing);
    if !comparing.is_empty() {
        let (code, since) = first_of(&comparing, Reason::MarksInDoubt);
        return told(State::Comparing, code, progress_text(&comparing, "compared")).since(since);
    }
    following(known, report, loss_seconds, &protected)
}

/// All volumes are followed: inside the goal, or why not.
fn following(
    known: &Known<'_>,
    report: &AgentReport,
    loss_seconds: Option<f64>,
    protected: &[&KnownVolume<'_>],
) -> Told {
    let explain = |fallback: &str| {
        let said: Vec<String> = protected
            .iter()
            .filter_map(|volume| {
                let agent = volume.agent?;
                let tracker = match agent.tracker_code {
                    Some(code) if says_all_is_well(code) => "",
                    _ => agent.tracker_reason.as_str(),
                };
                let said = if agent.reason.is_empty() { tracker } else { &agent.reason };
                (!said.is_empty()).then(|| format!("{}: {said}", volume.name))
            })
            .collect();
        if said.is_empty() { fallback.to_owned() } else { said.join("; ") }
    };
    let code = |fallback| {
        let tracker = |volume: &&KnownVolume<'_>| {
            let code = volume.agent.and_then(|agent| agent.tracker_code);
            code.filter(|code| !says_all_is_well(*code))
        };
        let first = protected.iter().find_map(|volume| volume.code());
        first.or_else(|| protected.iter().find_map(tracker)).unwrap_or(fallback)
    };
    let since = protected.iter().filter_map(|volume| volume.since).max();
    let Some(loss) = loss_seconds else {
        return match known.points.last() {
            Some(fuzzy) => {
                let reason = format!(
                    "no point is exact yet (the newest: {}); {}",
                    fuzzy.reason,
                    explain("")
                );
                told(State::Behind, code(Reason::NoExactPoint), reason)
            }
            None => {
                let reason = format!("no point yet; {}", explain("the first one is on its way"));
                told(State::Waiting, code(Reason::FirstPointDue), reason)
            }
        }
        .since(since);
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
        return told(State::Behind, code(Reason::Backlog), reason).since(behind_since(known));
    }
    match lacking.is_empty() {
        true => Told { state: State::Protected, code: None, reason: String::new(), since },
        false => told(
            State::Waiting,
            Reason::PointLacksVolume,
            format!("the newest exact point lacks {}; the next has it", lacking.join(", ")),
        )
        .since(since),
    }
}

fn sentences(volumes: &[&KnownVolume<'_>], fallback: &str) -> String {
    let said = volumes.iter().map(|volume| {
        let reason = volume.agent.map_or("", |agent| agent.reason.as_str());
        let refused = volume.target.and_then(|target| target.refused.as_deref());
        let said = refused.unwrap_or(if reason.is_empty() { fallback } else { reason });
        format!("{}: {said}", volume.name)
    });
    said.collect::<Vec<_>>().join("; ")
}

fn progress_text(volumes: &[&KnownVolume<'_>], done: &str) -> String {
    let said = volumes.iter().map(|volume| {
        let agent = volume.agent.expect("it reported its phase");
        let percent = match agent.progress_bytes {
            Some(progress) if progress.1 > 0 => format!("{} % {done}", percent(progress)),
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
        code: Some(if volume.protected { Reason::Connecting } else { Reason::ReplicationEnded }),
        since: None,
        tracker: none(),
        tracker_reason: String::new(),
        tracker_code: None,
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
        status.code = volume.code();
        status.since = volume.since.map(|since| since.to_string());
        status.tracker = agent.tracker.clone();
        status.tracker_reason = agent.tracker_reason.clone();
        status.tracker_code = agent.tracker_code;
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
