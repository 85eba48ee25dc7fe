//! `secondsite check`: one server for Nagios and its kin: one line, performance data, exit code 0
//! (ok), 1 (warning), 2 (critical) or 3 (unknown).

use super::args::CheckArgs;
use super::failure::Failure;
use super::operator::Operator;
use super::{Context, output, status};
use secondsite_control::api::{SCHEMA_VERSION, ServerStatus, Status};
use secondsite_control::codes::{Reason, State};
use serde_json::json;
use std::process::ExitCode;

/// Unless `--critical` says otherwise, a loss of so many goals is critical.
const CRITICAL_GOALS: f64 = 2.0;

/// What Nagios makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Ok = 0,
    Warning = 1,
    Critical = 2,
    Unknown = 3,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Warning => "WARNING",
            Self::Critical => "CRITICAL",
            Self::Unknown => "UNKNOWN",
        }
    }
}

/// How this command ends when its arguments or its question to control were no good.
pub(super) const UNKNOWN: u8 = Verdict::Unknown as u8;

pub(super) fn run(context: &Context, args: &CheckArgs) -> ExitCode {
    let asked = Operator::open(context)
        .and_then(|operator| operator.ask(|control| control.server_status(&args.server)));
    let (verdict, text, data, code) = match &asked {
        Ok(status) => match status.servers.first() {
            Some(server) => judge(server, status, args),
            None => (Verdict::Unknown, format!("no server {}", args.server), String::new(), None),
        },
        Err(failure) => (Verdict::Unknown, one_line(failure), String::new(), None),
    };
    if context.json {
        output::document(&json!({
            "schema_version": SCHEMA_VERSION,
            "server": args.server,
            "verdict": verdict.word(),
            "exit_code": verdict as u8,
            "text": text,
            "code": code,
            "status": asked.ok().and_then(|status| status.servers.into_iter().next()),
        }));
    } else {
        let data = if data.is_empty() { data } else { format!(" | {data}") };
        output::data(&format!("SECONDSITE {} - {text}{data}\n", verdict.word()));
    }
    ExitCode::from(verdict as u8)
}

/// A bar would end the text and begin the data.
fn plain(text: &str) -> String {
    text.replace(['\n', '\r'], " ").replace('|', "/")
}

fn one_line(failure: &Failure) -> String {
    let hint = if failure.hint.is_empty() { "" } else { "; try: " };
    plain(&format!("{}{hint}{}", failure.message, failure.hint))
}

fn judge(
    server: &ServerStatus,
    status: &Status,
    args: &CheckArgs,
) -> (Verdict, String, String, Option<Reason>) {
    let goal = server.goal_seconds as f64;
    let warning = args.warning.map_or(goal, |seconds| seconds as f64);
    let critical = args.critical.map_or(goal * CRITICAL_GOALS, |seconds| seconds as f64);
    let by_loss = match server.loss_seconds {
        Some(loss) if loss > critical => Verdict::Critical,
        Some(loss) if loss > warning => Verdict::Warning,
        Some(_) => Verdict::Ok,
        // Nothing to go back to.
        None => Verdict::Critical,
    };
    let by_state = match server.state {
        State::Protected => Verdict::Ok,
        State::Behind | State::Comparing | State::Waiting | State::Away => Verdict::Warning,
        // There cannot be a point yet, and it is on its way.
        State::FirstCopy => Verdict::Warning,
        State::Joined | State::Unprotected | State::Stopped => Verdict::Critical,
        State::Other => Verdict::Unknown,
    };
    let coming = matches!(server.state, State::FirstCopy | State::Waiting | State::Comparing)
        && server.loss_seconds.is_none();
    let mut verdict = if coming { by_state } else { by_state.max(by_loss) };
    let mut text = format!("{}: {}", server.name, status::state(server));
    text += &format!(", loss if it died now {}", status::loss(server));
    if !server.reason.is_empty() {
        text += &format!("; {}", server.reason);
    }
    let about_target = |code| matches!(code, Reason::TargetSilent | Reason::TargetNotStarted);
    let mut code = server.code;
    if let Some(warned) = status.warnings.iter().find(|warned| about_target(warned.code)) {
        verdict = verdict.max(Verdict::Warning);
        text += &format!("; {}", warned.text);
        code = code.or(Some(warned.code));
    }
    let mut data = Vec::new();
    if let Some(loss) = server.loss_seconds {
        data.push(format!("loss={loss:.1}s;{warning:.0};{critical:.0};0"));
    }
    data.push(format!("backlog={}B;;;0", server.backlog_bytes));
    if let Some(speed) = server.sending_bytes_per_second {
        data.push(format!("sending={speed:.0}B;;;0"));
    }
    if let Some(percent) = server.percent {
        data.push(format!("progress={percent}%;;;0;100"));
    }
    (verdict, plain(&text), data.join(" "), code)
}

#[cfg(test)]
mod tests {
    use super::{Verdict, judge};
    use crate::cli::args::CheckArgs;
    use secondsite_control::api::{ServerStatus, Status};
    use serde_json::json;

    fn verdict(state: &str, loss: Option<f64>, warning: Option<u64>) -> (Verdict, String) {
        let server: ServerStatus = serde_json::from_value(json!({
            "name": "db1", "state": state, "reason": "a | b", "loss_seconds": loss,
            "backlog_bytes": 4096, "goal_seconds": 30, "heard_seconds": 1.0,
            "certificate_ends": "", "volumes": [],
        }))
        .unwrap();
        let status = Status { schema_version: 1, servers: Vec::new(), warnings: Vec::new() };
        let args = CheckArgs { server: "db1".into(), warning, critical: None };
        let (verdict, text, data, _) = judge(&server, &status, &args);
        assert!(!text.contains('|') && data.contains("backlog=4096B;;;0"), "{text} {data}");
        (verdict, data)
    }

    #[test]
    fn states_and_loss_become_verdicts() {
        use Verdict::{Critical, Ok, Unknown, Warning};
        let (fine, data) = verdict("protected", Some(4.2), None);
        assert_eq!(fine, Ok);
        assert!(data.starts_with("loss=4.2s;30;60;0 "), "{data}");
        for (state, loss, expected) in [
            ("behind", Some(31.0), Warning),
            ("behind", Some(61.0), Critical),
            ("behind", None, Critical),
            ("first-copy", None, Warning),
            ("comparing", Some(61.0), Critical),
            ("waiting", None, Warning),
            ("away", Some(20.0), Warning),
            ("away", Some(90.0), Critical),
            ("stopped", Some(1.0), Critical),
            ("joined", None, Critical),
            ("unprotected", Some(1.0), Critical),
            ("of-tomorrow", Some(1.0), Unknown),
        ] {
            assert_eq!(verdict(state, loss, None).0, expected, "{state} {loss:?}");
        }
        assert_eq!(verdict("protected", Some(4.2), Some(3)).0, Warning);
    }
}
