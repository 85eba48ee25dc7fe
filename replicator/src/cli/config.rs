//! `secondsite config check`: every configuration file and drop-in, and what counts in the end.

use super::args::ConfigCheckArgs;
use super::failure::{Exit, Failure};
use super::{Context, output};
use crate::config::{self, ConfigError, Effective};
use secondsite_control::api::SCHEMA_VERSION;
use serde_json::json;

pub(super) fn check(context: &Context, args: &ConfigCheckArgs) -> Result<(), Failure> {
    let checked = config::check(&context.paths);
    if checked.roles.is_empty() && checked.problems.is_empty() {
        let file = context.paths.file("control");
        let cause = "there is no control.toml, target.toml or agent.toml".into();
        return Err(ConfigError::Read { file, cause, absent: true }.into());
    }
    if context.json {
        let problems: Vec<String> = checked.problems.iter().map(ToString::to_string).collect();
        let values: Vec<_> = checked.values.iter().map(document).collect();
        output::document(&json!({
            "schema_version": SCHEMA_VERSION,
            "roles": checked.roles,
            "problems": problems,
            "values": values,
        }));
    } else {
        if args.show {
            output::data(&table(&checked.values));
        }
        for problem in &checked.problems {
            output::talk(&problem.to_string());
        }
    }
    let Some(first) = checked.problems.into_iter().next() else {
        if !context.json && !args.show {
            let (roles, dir) = (checked.roles.join(", "), context.paths.config.display());
            output::data(&format!("{dir} is sound: {roles}\n"));
        }
        return Ok(());
    };
    let hint = Failure::from(first).hint;
    let what = format!("the configuration in {} cannot be used", context.paths.config.display());
    let failure = Failure::new(Exit::Config, what)
        .still("daemons that run go on with what they read when they started");
    Err(if hint.is_empty() {
        failure.hint(context.command("config check") + ", after a change")
    } else {
        failure.hint(hint)
    })
}

fn from(value: &Effective) -> String {
    match &value.place {
        Some(place) => format!("{}:{}", place.file.display(), place.line),
        None => "default".into(),
    }
}

fn document(value: &Effective) -> serde_json::Value {
    let place = value.place.as_ref();
    json!({
        "role": value.role,
        "key": value.key,
        "value": value.value,
        "file": place.map(|place| &place.file),
        "line": place.map(|place| place.line),
    })
}

fn table(values: &[Effective]) -> String {
    let row = |value: &Effective| {
        let shown = if value.value.is_empty() { "(none)" } else { &value.value };
        let key = format!("{}.{}", value.role, value.key);
        vec![key, shown.to_string(), from(value)]
    };
    output::table(&["KEY", "VALUE", "FROM"], values.iter().map(row).collect())
}
