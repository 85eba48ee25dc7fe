//! `secondsite explain`: what a state or a reason means, since when, what still works, and what to
//! type.
//!
//! What the codes mean stands in one table beside the API; a code alone is explained without asking
//! control.

use super::args::ExplainArgs;
use super::failure::{Exit, Failure};
use super::operator::Operator;
use super::units::span;
use super::{Context, output, status};
use jiff::Timestamp;
use secondsite_control::api::{SCHEMA_VERSION, ServerStatus, VolumePhase, VolumeStatus, Warning};
use secondsite_control::codes::{Explanation, Reason, State};
use serde::Serialize;
use serde_json::json;
use std::fmt::Write;

/// Width at which sentences are broken.
const WIDTH: usize = 100;
/// Width of the words in front.
const MARGIN: usize = 7;

pub(super) fn run(context: &Context, args: &ExplainArgs) -> Result<(), Failure> {
    if args.list {
        list(context);
        return Ok(());
    }
    if let (Some(what), None) = (&args.what, &args.volume)
        && let Some(entry) = Entry::of_code(what)
    {
        return print(context, &[entry]);
    }
    let operator = Operator::open(context)?;
    let now = Timestamp::now();
    let entries = match &args.what {
        None => {
            let status = operator.ask(|control| control.status())?;
            let bad = status.servers.iter().filter(|server| server.state.needs_attention());
            let servers = bad.flat_map(|server| of_server(server, now));
            servers.chain(status.warnings.iter().map(of_warning)).collect()
        }
        Some(name) => {
            let status = operator.ask(|control| control.server_status(name)).map_err(
                |failure| match failure.exit {
                    Exit::Usage => failure.hint(context.command("explain --list")),
                    _ => failure,
                },
            )?;
            let mut entries = Vec::new();
            for server in &status.servers {
                match &args.volume {
                    None => entries.extend(of_server(server, now)),
                    Some(name) => entries.extend(one_volume(context, server, name, now)?),
                }
            }
            entries
        }
    };
    if entries.is_empty() && !context.json {
        output::talk("Nothing needs attention.");
        return Ok(());
    }
    print(context, &entries)
}

/// One explained thing.
#[derive(Debug, Serialize)]
struct Entry {
    /// Server, volume, or nothing for a code by itself.
    subject: String,
    /// In words: `BEHIND`, `target-full`.
    words: String,
    code: &'static str,
    since: Option<String>,
    since_seconds: Option<f64>,
    /// What is said of this very case.
    detail: String,
    means: &'static str,
    safe: &'static str,
    remedy: Vec<Typed>,
}

/// One thing to type, with the names filled in.
#[derive(Debug, Serialize)]
struct Typed {
    note: String,
    command: String,
}

impl Entry {
    fn new(
        subject: &str,
        server: &str,
        (code, words): (&'static str, String),
        detail: &str,
        what: Explanation,
    ) -> Self {
        let fill = |text: &str| text.replace("{server}", server);
        let typed = |step: &secondsite_control::codes::Step| Typed {
            note: fill(step.note),
            command: fill(step.command),
        };
        Self {
            subject: subject.into(),
            words,
            code,
            since: None,
            since_seconds: None,
            detail: detail.into(),
            means: what.means,
            safe: what.safe,
            remedy: what.remedy.iter().map(typed).collect(),
        }
    }

    fn since(mut self, since: Option<&str>, now: Timestamp) -> Self {
        self.since = since.map(str::to_owned);
        let then = since.and_then(|since| since.parse::<Timestamp>().ok());
        self.since_seconds = then.map(|then| now.duration_since(then).as_secs_f64().max(0.0));
        self
    }

    /// A code by itself, without a server to name.
    fn of_code(code: &str) -> Option<Self> {
        let state = State::of(code).map(|state| (state.code(), state.explanation()));
        let reason = || Reason::of(code).map(|reason| (reason.code(), reason.explanation()));
        let (code, what) = state.or_else(reason)?;
        Some(Self::new("", "SERVER", (code, code.into()), "", what))
    }

    fn of_reason(subject: &str, server: &str, reason: Reason, detail: &str) -> Self {
        let words = (reason.code(), reason.code().into());
        Self::new(subject, server, words, detail, reason.explanation())
    }

    fn text(&self) -> String {
        let mut text = String::new();
        if !self.subject.is_empty() {
            let _ = write!(text, "{}: ", self.subject);
        }
        text += &self.words;
        if let Some(since) = &self.since {
            let _ = write!(text, " since {since}");
        }
        if let Some(seconds) = self.since_seconds {
            let _ = write!(text, " ({})", span(seconds));
        }
        text += "\n";
        for (word, sentences) in
            [("now", self.detail.as_str()), ("means", self.means), ("safe", self.safe)]
        {
            if !sentences.is_empty() {
                text += &paragraph(word, sentences);
            }
        }
        for (at, step) in self.remedy.iter().enumerate() {
            let word = if at == 0 { "type" } else { "" };
            let _ = writeln!(text, "  {word:MARGIN$}{}:   {}", step.note, step.command);
        }
        text
    }
}

/// The server, then each of its volumes that says something of its own.
fn of_server(server: &ServerStatus, now: Timestamp) -> Vec<Entry> {
    let what = server.code.map_or(server.state.explanation(), Reason::explanation);
    let (code, state) = (server.state.code(), status::state(server));
    let words = server.code.map_or(state.clone(), |code| format!("{state}, {code}"));
    let code = server.code.map_or(code, Reason::code);
    let mut detail = server.reason.clone();
    if server.loss_seconds.is_some() {
        let stop = if detail.is_empty() || detail.ends_with('.') { "" } else { "." };
        let gap = if detail.is_empty() { "" } else { " " };
        let _ = write!(detail, "{stop}{gap}Loss if it died now: {}.", status::loss(server));
    }
    let first = Entry::new(&server.name, &server.name, (code, words), &detail, what);
    let mut entries = vec![first.since(server.since.as_deref(), now)];
    for volume in &server.volumes {
        let others = of_volume(server, volume, now);
        entries.extend(others.into_iter().filter(|entry| entry.code != code));
    }
    entries
}

fn of_volume(server: &ServerStatus, volume: &VolumeStatus, now: Timestamp) -> Vec<Entry> {
    let subject = format!("{} {}", server.name, volume.name);
    let said = [(volume.code, &volume.reason), (volume.tracker_code, &volume.tracker_reason)];
    said.into_iter()
        .filter_map(|(code, text)| {
            let code = code.or((!text.is_empty()).then_some(Reason::Other))?;
            let entry = Entry::of_reason(&subject, &server.name, code, text);
            Some(entry.since(volume.since.as_deref(), now))
        })
        .collect()
}

/// A volume by name or path; one that simply follows is said to.
fn one_volume(
    context: &Context,
    server: &ServerStatus,
    name: &str,
    now: Timestamp,
) -> Result<Vec<Entry>, Failure> {
    let found = server.volumes.iter().find(|volume| volume.name == name || volume.path == name);
    let Some(volume) = found else {
        let names: Vec<&str> = server.volumes.iter().map(|volume| volume.name.as_str()).collect();
        let what = format!("{} has no volume {name:?}; it has: {}", server.name, names.join(", "));
        let hint = context.command(&format!("status {}", server.name));
        return Err(Failure::new(Exit::Usage, what).hint(hint));
    };
    let entries = of_volume(server, volume, now);
    if !entries.is_empty() || volume.phase != VolumePhase::Following {
        return Ok(entries);
    }
    let subject = format!("{} {}", server.name, volume.name);
    let detail = format!(
        "Its changes are followed by {}; the last cut was made by {}; {} wait to be committed.",
        volume.tracker,
        volume.cut,
        super::units::bytes(volume.backlog_bytes)
    );
    let words = (State::Protected.code(), "following".into());
    let entry = Entry::new(&subject, &server.name, words, &detail, State::Protected.explanation());
    Ok(vec![entry.since(volume.since.as_deref(), now)])
}

fn of_warning(warning: &Warning) -> Entry {
    Entry::of_reason("", "SERVER", warning.code, &warning.text)
}

fn print(context: &Context, entries: &[Entry]) -> Result<(), Failure> {
    if context.json {
        output::document(&json!({ "schema_version": SCHEMA_VERSION, "explained": entries }));
    } else {
        let texts: Vec<String> = entries.iter().map(Entry::text).collect();
        output::data(&texts.join("\n"));
    }
    Ok(())
}

fn list(context: &Context) {
    let states = State::ALL.iter().map(|state| ("state", state.code(), state.explanation()));
    let reasons = Reason::ALL.iter().map(|reason| ("reason", reason.code(), reason.explanation()));
    let all: Vec<_> = states.chain(reasons).collect();
    if context.json {
        let row = |(kind, code, what): &(&str, &str, Explanation)| {
            json!({
                "kind": kind,
                "code": code,
                "means": what.means,
                "safe": what.safe,
                "remedy": what.remedy,
            })
        };
        let codes: Vec<_> = all.iter().map(row).collect();
        output::document(&json!({ "schema_version": SCHEMA_VERSION, "codes": codes }));
        return;
    }
    let row = |(kind, code, what): &(&str, &str, Explanation)| {
        vec![kind.to_string(), code.to_string(), first_sentence(what.means).to_string()]
    };
    output::data(&output::table(&["KIND", "CODE", "MEANS"], all.iter().map(row).collect()));
}

fn first_sentence(text: &str) -> &str {
    text.split_once(". ").map_or(text, |(first, _)| first).trim_end_matches('.')
}

/// A word in front, and sentences beside it, broken at blanks.
fn paragraph(word: &str, sentences: &str) -> String {
    let mut text = format!("  {word:MARGIN$}");
    let mut column = 0;
    for part in sentences.split_whitespace() {
        let width = part.chars().count();
        if column > 0 && column + 1 + width > WIDTH - MARGIN {
            let _ = write!(text, "\n  {:MARGIN$}", "");
            column = 0;
        }
        if column > 0 {
            text.push(' ');
            column += 1;
        }
        text += part;
        column += width;
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::{Entry, of_server};
    use jiff::Timestamp;
    use secondsite_control::codes::{Reason, State};
    use serde_json::json;

    #[test]
    fn a_server_that_is_behind() {
        let server = serde_json::from_value(json!({
            "name": "app3", "state": "behind", "code": "target-full",
            "reason": "newest exact point 7 min ago; sda: no space left at /srv/secondsite",
            "since": "2026-11-21T10:36:32Z", "loss_seconds": 450.0, "backlog_bytes": 4096,
            "goal_seconds": 30, "heard_seconds": 1.0, "certificate_ends": "", "volumes": [],
        }));
        let now: Timestamp = "2026-11-21T10:43:32Z".parse().unwrap();
        let entries = of_server(&server.unwrap(), now);
        let expected = "\
app3: BEHIND, target-full since 2026-11-21T10:36:32Z (7 min)
  now    newest exact point 7 min ago; sda: no space left at /srv/secondsite. Loss if it died now: 7
         min · 4 KiB.
  means  The target's store has no room for more: what promotion may still write is kept free, and the
         reserve of target.toml.
  safe   Points that are there stay, and can still be promoted. Writes are marked and follow when
         there is room; nothing is lost while the server lives.
  type   on the second site: how much is free:   df -h /srv/secondsite
         make room, or grow the file system; it goes on by itself. Check with:   secondsite doctor
";
        assert_eq!(entries.iter().map(Entry::text).collect::<String>(), expected);
    }

    #[test]
    fn every_code_explains_itself_with_something_to_type() {
        let states = State::ALL.iter().map(|state| state.code());
        for code in states.chain(Reason::ALL.iter().map(|reason| reason.code())) {
            let text = Entry::of_code(code).expect(code).text();
            for word in ["\n  means  ", "\n  safe   ", "\n  type   "] {
                assert!(text.contains(word), "{code}: {text}");
            }
            assert!(!text.contains('{'), "{code}: a name was not filled in: {text}");
        }
        assert!(Entry::of_code("db1").is_none());
    }
}
