//! `secondsite status`: what is protected, and how well.
//!
//! Rates and remaining times need two looks: they are shown with `--watch`, from the last minute.

use super::args::StatusArgs;
use super::failure::Failure;
use super::operator::Operator;
use super::units::{bytes, goal, rate, span};
use super::{Context, output};
use secondsite_control::api::{ServerStatus, Status, VolumePhase, VolumeStatus};
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// How often `--watch` looks.
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// How often `--watch` prints where it cannot draw.
const TALK_EVERY: Duration = Duration::from_secs(10);
/// Rates come from the last so many seconds.
const WINDOW: Duration = Duration::from_secs(60);
/// Clears the screen and goes to its first line.
const CLEAR: &str = "\x1b[2J\x1b[H";

pub(super) fn run(context: &Context, args: &StatusArgs) -> Result<(), Failure> {
    let operator = Operator::open(context)?;
    let fetch = || match &args.server {
        Some(server) => operator.ask(|control| control.server_status(server)),
        None => operator.ask(|control| control.status()),
    };
    let mut rates = Rates::default();
    let detail = args.server.is_some();
    if !args.watch {
        let status = fetch()?;
        if context.json {
            output::document(&status);
        } else {
            show(context, &status, detail, &rates);
        }
        return Ok(());
    }
    let draws = output::stdout_draws();
    let mut shown: Option<Instant> = None;
    loop {
        let status = fetch()?;
        rates.see(&status, Instant::now());
        if context.json {
            output::document_line(&status);
        } else if draws || shown.is_none_or(|at| at.elapsed() >= TALK_EVERY) {
            shown = Some(Instant::now());
            if draws {
                output::data(CLEAR);
            }
            show(context, &status, detail, &rates);
        }
        std::thread::sleep(WATCH_EVERY);
    }
}

fn show(context: &Context, status: &Status, detail: bool, rates: &Rates) {
    if status.servers.is_empty() {
        output::talk(&format!("No server has joined yet.   {}", context.command("token")));
    } else {
        output::data(&table(&status.servers, rates));
    }
    if detail {
        for server in &status.servers {
            output::data(&details(server));
        }
    } else {
        attention(context, &status.servers);
    }
    for warning in &status.warnings {
        output::talk(warning);
    }
}

fn table(servers: &[ServerStatus], rates: &Rates) -> String {
    let mut header = vec!["SERVER", "STATE", "LOSS IF IT DIED NOW", "GOAL"];
    if rates.known() {
        header.push("TO TARGET");
    }
    let rows = servers.iter().map(|server| {
        let mut row = vec![
            server.name.clone(),
            state(server, rates),
            loss(server),
            goal(server.goal_seconds),
        ];
        if rates.known() {
            row.push(rates.sent(&server.name).map_or("-".into(), rate));
        }
        row
    });
    output::table(&header, rows.collect())
}

/// The state with how far a first copy or compare is: `first copy 34 %, 12 min`.
fn state(server: &ServerStatus, rates: &Rates) -> String {
    let Some((done, total)) = progress(server) else {
        return match server.state.as_str() {
            "behind" => "BEHIND".into(),
            other => other.into(),
        };
    };
    let percent = percent(done, total);
    match rates.known().then(|| rates.left(&server.name, total - done)) {
        Some(Some(seconds)) => format!("{} {percent} %, {}", server.state, span(seconds)),
        Some(None) => format!("{} {percent} %, calculating", server.state),
        None => format!("{} {percent} %", server.state),
    }
}

/// Done and total bytes over all volumes, while a first copy or compare runs.
fn progress(server: &ServerStatus) -> Option<(u64, u64)> {
    if !matches!(server.state.as_str(), "first copy" | "comparing") {
        return None;
    }
    let parts = server.volumes.iter().filter_map(|volume| volume.progress_bytes);
    let (done, total) =
        parts.fold((0, 0), |(d, t), (done, total)| (d + done.min(total), t + total));
    (total > 0).then_some((done, total))
}

/// Full only when it is: one hundred percent means durable.
fn percent(done: u64, total: u64) -> u64 {
    if total == 0 { 0 } else { (u128::from(done) * 100 / u128::from(total)) as u64 }
}

fn loss(server: &ServerStatus) -> String {
    match server.loss_seconds {
        None if server.volumes.is_empty() => "-".into(),
        None => "no point yet".into(),
        Some(seconds) => format!("{} · {}", span(seconds), bytes(server.backlog_bytes)),
    }
}

fn details(server: &ServerStatus) -> String {
    let rows = server.volumes.iter().map(|volume| {
        let number = |value: Option<u64>| value.map_or("-".into(), |value| value.to_string());
        vec![
            volume.name.clone(),
            bytes(volume.size_bytes),
            phase(volume),
            volume.tracker.clone(),
            volume.cut.clone(),
            bytes(volume.backlog_bytes),
            number(volume.epoch),
            number(volume.promoted_epoch),
            volume.replica.clone().unwrap_or_else(|| "-".into()),
        ]
    });
    let header =
        ["VOLUME", "SIZE", "DOES", "TRACKER", "CUT", "BACKLOG", "EPOCH", "PROMOTED", "REPLICA"];
    let mut text = String::new();
    if !server.volumes.is_empty() {
        text += &format!("\n{}", output::table(&header, rows.collect()));
    }
    if !server.reason.is_empty() {
        text += &format!("\n{}: {}\n", server.name, server.reason);
    }
    for volume in &server.volumes {
        for reason in [&volume.reason, &volume.tracker_reason] {
            if !reason.is_empty() {
                text += &format!("{}: {reason}\n", volume.name);
            }
        }
    }
    if !server.certificate_ends.is_empty() {
        text += &format!("Its certificate ends {}; it renews itself.\n", server.certificate_ends);
    }
    text
}

fn phase(volume: &VolumeStatus) -> String {
    let name = match volume.phase {
        VolumePhase::Connecting => "connecting",
        VolumePhase::FirstCopy => "first copy",
        VolumePhase::Comparing => "comparing",
        VolumePhase::Following => "following",
        VolumePhase::Stopped => "STOPPED",
    };
    match volume.progress_bytes {
        Some((done, total)) => format!("{name} {} %", percent(done.min(total), total)),
        None => name.into(),
    }
}

fn attention(context: &Context, servers: &[ServerStatus]) {
    let calm = ["protected", "first copy", "comparing", "joined", "unprotected"];
    let bad: Vec<&ServerStatus> =
        servers.iter().filter(|server| !calm.contains(&server.state.as_str())).collect();
    for server in bad.iter().filter(|server| !server.reason.is_empty()) {
        output::talk(&format!("{}: {}", server.name, server.reason));
    }
    if let Some(first) = bad.first() {
        let names: Vec<&str> = bad.iter().map(|server| server.name.as_str()).collect();
        let command = context.command(&format!("status {}", first.name));
        let verb = if bad.len() == 1 { "needs" } else { "need" };
        output::talk(&format!("{} {verb} attention: {} -> {command}", bad.len(), names.join(", ")));
    }
}

/// What was seen of each server within [`WINDOW`].
#[derive(Default)]
struct Rates {
    seen: HashMap<String, VecDeque<Sample>>,
}

struct Sample {
    at: Instant,
    sent: u64,
    done: u64,
}

impl Rates {
    fn see(&mut self, status: &Status, at: Instant) {
        for server in &status.servers {
            let samples = self.seen.entry(server.name.clone()).or_default();
            let sent = server.volumes.iter().map(|volume| volume.sent_bytes).sum();
            let done = progress(server).map_or(0, |(done, _)| done);
            // A restarted agent counts anew, another phase too.
            if samples.back().is_some_and(|last| last.sent > sent || last.done > done) {
                samples.clear();
            }
            samples.push_back(Sample { at, sent, done });
            while samples.front().is_some_and(|first| at - first.at > WINDOW) {
                samples.pop_front();
            }
        }
    }

    /// Whether anything was seen twice.
    fn known(&self) -> bool {
        self.seen.values().any(|samples| samples.len() > 1)
    }

    /// Bytes a second to the target.
    fn sent(&self, server: &str) -> Option<f64> {
        self.slope(server, |sample| sample.sent)
    }

    /// Seconds until so many bytes more are done.
    fn left(&self, server: &str, bytes: u64) -> Option<f64> {
        let speed = self.slope(server, |sample| sample.done)?;
        (speed > 0.0).then(|| bytes as f64 / speed)
    }

    fn slope(&self, server: &str, of: impl Fn(&Sample) -> u64) -> Option<f64> {
        let samples = self.seen.get(server)?;
        let (first, last) = (samples.front()?, samples.back()?);
        let seconds = (last.at - first.at).as_secs_f64();
        (seconds > 0.0).then(|| (of(last) - of(first)) as f64 / seconds)
    }
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
