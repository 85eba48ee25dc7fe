//! `secondsite doctor`: checks this host for all that is needed, and says what to type.
//!
//! It runs anywhere: on the second site, on a server, and before either is set up; what a host is
//! shows in the configuration files that it has. It never changes anything: it opens nothing for
//! writing, makes no folder, and every question that it asks is one that changes nothing. Every
//! question to another host is bounded in time.

mod host;
mod places;
mod reach;
mod server;

use super::failure::{Exit, Failure};
use super::{Context, output};
use secondsite_control::api::SCHEMA_VERSION;
use secondsite_control::run::CONTROL;
use secondsite_control::setup::{AGENT, TARGET};
use serde::Serialize;
use serde_json::json;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// As it should be.
    Ok,
    /// It works, but not as well as it could, or not for long.
    Warn,
    /// It does not work.
    Fail,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

/// One line. Whatever is not ok has a remedy.
#[derive(Debug, Clone, Serialize)]
struct Check {
    /// What was checked: a stable name.
    check: &'static str,
    level: Level,
    text: String,
    /// What to type or do; empty if it is ok.
    remedy: String,
}

/// All lines so far.
#[derive(Debug, Default)]
struct Findings {
    checks: Vec<Check>,
}

impl Findings {
    fn ok(&mut self, check: &'static str, text: impl Into<String>) {
        let (text, remedy) = (text.into(), String::new());
        self.checks.push(Check { check, level: Level::Ok, text, remedy });
    }

    fn warn(&mut self, check: &'static str, text: impl Into<String>, remedy: impl Into<String>) {
        let (text, remedy) = (text.into(), remedy.into());
        self.checks.push(Check { check, level: Level::Warn, text, remedy });
    }

    fn fail(&mut self, check: &'static str, text: impl Into<String>, remedy: impl Into<String>) {
        let (text, remedy) = (text.into(), remedy.into());
        self.checks.push(Check { check, level: Level::Fail, text, remedy });
    }

    fn count(&self, level: Level) -> usize {
        self.checks.iter().filter(|check| check.level == level).count()
    }
}

/// What this host is, by the configuration files that it has.
#[derive(Debug, Clone, Copy)]
struct Roles {
    control: bool,
    target: bool,
    agent: bool,
}

impl Roles {
    fn of(context: &Context) -> Self {
        let has = |role| context.paths.file(role).exists();
        Self { control: has(CONTROL), target: has(TARGET), agent: has(AGENT) }
    }

    /// Whether it could be a server to protect: it is one, or nothing yet.
    fn may_be_server(self) -> bool {
        self.agent || !(self.control || self.target)
    }

    fn words(self) -> String {
        let all = [(self.control, CONTROL), (self.target, TARGET), (self.agent, "agent")];
        let words: Vec<&str> = all.iter().filter(|(is, _)| *is).map(|(_, word)| *word).collect();
        match words.is_empty() {
            true => "neither set up nor joined yet".into(),
            false => words.join(", "),
        }
    }
}

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let roles = Roles::of(context);
    let mut findings = Findings::default();
    findings.ok("role", format!("this host is: {}", roles.words()));
    host::check(context, roles, &mut findings);
    places::check(context, roles, &mut findings);
    reach::check(context, roles, &mut findings);
    if roles.may_be_server() {
        server::check(context, &mut findings);
    }
    let (failed, warned) = (findings.count(Level::Fail), findings.count(Level::Warn));
    if context.json {
        output::document(&json!({
            "schema_version": SCHEMA_VERSION,
            "failed": failed,
            "warned": warned,
            "checks": findings.checks,
        }));
    } else {
        output::data(&text(&findings.checks));
    }
    if failed == 0 {
        return Ok(());
    }
    let what = format!("{failed} of {} checks fail", findings.checks.len());
    let first = findings.checks.into_iter().find(|check| check.level == Level::Fail);
    Err(Failure::new(Exit::Failed, what)
        .still("nothing was changed")
        .hint(first.map(|check| check.remedy).unwrap_or_default()))
}

fn text(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    for Check { check, level, text: said, remedy } in checks {
        text += &format!("  {:<4}  {check:<width$}  {said}\n", level.word());
        if !remedy.is_empty() {
            text += &format!("        {:<width$}  -> {remedy}\n", "");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{Findings, text};

    #[test]
    fn a_line_a_check_and_its_remedy_below() {
        let mut findings = Findings::default();
        findings.ok("kernel", "6.1.0");
        findings.warn("store-space", "1 GiB free", "df -h /srv");
        let expected = "  ok    kernel       6.1.0\n  warn  store-space  1 GiB free\n                     -> df -h /srv\n";
        assert_eq!(text(&findings.checks), expected);
    }
}
