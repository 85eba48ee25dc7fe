//! `secondsite status`: what is protected, and how well.
//!
//! All numbers are control's; nothing is computed here but their words. Where it goes on, a terminal
//! is redrawn, anything else gets a block for every change, and `--json --follow` a document a line.

use super::args::StatusArgs;
use super::failure::{Exit, Failure};
use super::operator::Operator;
use super::units::{bytes, goal, rate, span};
use super::{Context, output};
use secondsite_control::api::{ServerStatus, Status, VolumePhase, VolumeStatus};
use secondsite_control::codes::State;
use std::time::{Duration, Instant};

/// How often it looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Progress alone is told this often where nothing can be drawn.
const PROGRESS_EVERY: Duration = Duration::from_secs(10);
/// Clears the screen and goes to its first line.
const CLEAR: &str = "\x1b[2J\x1b[H";

pub(super) fn run(context: &Context, args: &StatusArgs) -> Result<(), Failure> {
    let operator = Operator::open(context)?;
    let detail = args.server.is_some();
    let look = || match &args.server {
        Some(server) => operator.ask(|control| control.server_status(server)),
        None => operator.ask(|control| control.status()),
    };
    if args.watch || args.follow {
        return watch(context, look, detail);
    }
    let status = look()?;
    if context.json {
        output::document(&status);
    } else {
        show(context, &status, detail);
    }
    Ok(())
}

/// Looks until interrupted. Control may come and go meanwhile.
fn watch(
    context: &Context,
    look: impl Fn() -> Result<Status, Failure>,
    detail: bool,
) -> Result<(), Failure> {
    let draws = output::stdout_draws() && !context.json;
    let mut shown = Shown::default();
    loop {
        match look() {
            Ok(status) if context.json => output::document_line(&status),
            Ok(status) => {
                if draws {
                    output::data(CLEAR);
                }
                if draws || shown.is_due(&status, Instant::now()) {
                    show(context, &status, detail);
                }
            }
            Err(failure) if matches!(failure.exit, Exit::Unavailable | Exit::TryLater) => {
                if context.json {
                    output::document_line(&failure.json());
                } else if draws || shown.fails(&failure.message) {
                    output::talk(&format!("{failure}\n  it is tried again every second"));
                }
            }
            Err(failure) => return Err(failure),
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// What was printed last where nothing is redrawn.
#[derive(Default)]
struct Shown {
    states: Option<String>,
    percents: Vec<Option<u8>>,
    at: Option<Instant>,
}

impl Shown {
    /// A state, a reason or a warning is another; or progress was made and not told for a while.
    fn is_due(&mut self, status: &Status, now: Instant) -> bool {
        let row = |server: &ServerStatus| (server.name.clone(), server.state, server.code);
        let rows: Vec<_> = status.servers.iter().map(row).collect();
        let codes: Vec<_> = status.warnings.iter().map(|warning| warning.code).collect();
        let states = Some(format!("{rows:?} {codes:?}"));
        let percents: Vec<_> = status.servers.iter().map(|server| server.percent).collect();
        let long_ago = self.at.is_none_or(|at| now - at >= PROGRESS_EVERY);
        let due = states != self.states || (percents != self.percents && long_ago);
        if due {
            *self = Self { states, percents, at: Some(now) };
        }
        due
    }

    /// A failure is told once.
    fn fails(&mut self, message: &str) -> bool {
        let states = Some(message.to_owned());
        let new = states != self.states;
        self.states = states;
        new
    }
}

fn show(context: &Context, status: &Status, detail: bool) {
    if status.servers.is_empty() {
        output::talk(&format!("No server has joined yet.   {}", context.command("token")));
    } else {
        output::data(&table(&status.servers));
    }
    if detail {
        for server in &status.servers {
            output::data(&details(server));
        }
    }
    if let Some(line) = attention(context, &status.servers) {
        output::talk(&line);
    }
    for warning in &status.warnings {
        let explain = context.command(&format!("explain {}", warning.code));
        output::talk(&format!("{} -> {explain}", warning.text));
    }
}

/// How far back one can go, of what the policy promises.
fn history(server: &ServerStatus) -> String {
    match (server.history_seconds, server.keep_seconds) {
        (None, _) => "-".into(),
        (Some(_), None) => "newest".into(),
        (Some(there), Some(promised)) => {
            let promised = promised as f64;
            format!("{} of {}", span(there.min(promised)), span(promised))
        }
    }
}

fn table(servers: &[ServerStatus]) -> String {
    let row = |server: &ServerStatus| {
        let goal = goal(server.goal_seconds);
        let history = history(server);
        vec![server.name.clone(), state(server), loss(server), goal, history, to_target(server)]
    };
    let header = ["SERVER", "STATE", "LOSS IF IT DIED NOW", "GOAL", "HISTORY", "TO TARGET"];
    output::table(&header, servers.iter().map(row).collect())
}

/// The state with how far a first copy or compare is: `first copy 34 %, 12 min`.
pub(super) fn state(server: &ServerStatus) -> String {
    let words = match server.state {
        State::Behind => "BEHIND",
        State::Stopped => "STOPPED",
        State::Away => "AWAY",
        other => other.words(),
    };
    match (server.percent, server.left_seconds) {
        (None, _) => words.into(),
        (Some(100), _) => format!("{words} 100 %"),
        (Some(percent), Some(left)) => format!("{words} {percent} %, {}", span(left)),
        (Some(percent), None) => format!("{words} {percent} %, calculating"),
    }
}

pub(super) fn loss(server: &ServerStatus) -> String {
    match server.loss_seconds {
        None if server.volumes.is_empty() => "everything".into(),
        None => "no point yet".into(),
        Some(seconds) if server.backlog_bytes == 0 => format!("{} · nothing waits", span(seconds)),
        Some(seconds) => format!("{} · {}", span(seconds), bytes(server.backlog_bytes)),
    }
}

/// What is sent; nothing sent has a word that says why.
fn to_target(server: &ServerStatus) -> String {
    match (server.state, server.sending_bytes_per_second) {
        (State::Joined | State::Unprotected, _) => "off".into(),
        (_, None) => "-".into(),
        (_, Some(speed)) if speed < 1.0 && server.backlog_bytes == 0 => "idle".into(),
        (State::Protected, Some(speed)) if speed < 1.0 => "waits for a cut".into(),
        (_, Some(speed)) => rate(speed),
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
        Some((done, total)) if total > 0 => {
            format!("{name} {} %", u128::from(done.min(total)) * 100 / u128::from(total))
        }
        _ => name.into(),
    }
}

/// The line that names who needs a look, and what to type.
fn attention(context: &Context, servers: &[ServerStatus]) -> Option<String> {
    let names: Vec<&str> = servers
        .iter()
        .filter(|server| server.state.needs_attention())
        .map(|server| server.name.as_str())
        .collect();
    let command = match names.as_slice() {
        [] => return None,
        [one] => context.command(&format!("explain {one}")),
        _ => context.command("explain"),
    };
    let verb = if names.len() == 1 { "needs" } else { "need" };
    Some(format!("{} {verb} attention: {} -> {command}", names.len(), names.join(", ")))
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
