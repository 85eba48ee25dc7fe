//! Every `secondsite …` command in the documentation, and every one that an explanation names, is
//! one that the command line takes. Nothing is run.

use clap::Parser;
use secondsite::cli::args::Cli;
use secondsite_control::codes::{Reason, State};
use std::path::{Path, PathBuf};

/// What stands for a value in documentation, and a value that may stand there.
const PLACEHOLDERS: &[(&str, &str)] = &[
    ("ADDR:PORT", "dr1:7443"),
    ("HOST:PORT", "dr1:7443"),
    ("NEW-NAME", "db2"),
    ("ss1_…", "ss1_x"),
];

/// Splits at blanks; a comment, or a gap of two blanks, ends the command.
fn words(command: &str) -> Vec<String> {
    let command = command.split(" #").next().unwrap_or_default();
    let command = command.split("  ").next().unwrap_or_default();
    let mut text = command.trim().to_string();
    for (placeholder, value) in PLACEHOLDERS {
        text = text.replace(placeholder, value);
    }
    text.split_whitespace().map(|word| word.trim_matches(['\'', '"']).to_string()).collect()
}

/// Whether the command line takes it. Help and version count.
fn parses(command: &str) -> Result<(), String> {
    use clap::error::ErrorKind::{DisplayHelp, DisplayVersion};
    match Cli::try_parse_from(words(command)) {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.kind(), DisplayHelp | DisplayVersion) => Ok(()),
        Err(error) => Err(format!("{command}\n{error}")),
    }
}

/// Commands in fenced blocks (at the start of a line) and between backquotes. In a sentence a
/// command may be named without its arguments, as in `secondsite check`.
fn commands(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if fenced {
            found.push(line.trim().to_string());
        } else {
            let spans = line.split('`').skip(1).step_by(2).map(str::to_string);
            found.extend(spans.filter(|span| !is_name(span)));
        }
    }
    // A drawing is no command.
    let drawn = |letter: char| ('\u{2500}'..'\u{2600}').contains(&letter);
    found.retain(|command| command.starts_with("secondsite ") && !command.contains(drawn));
    found
}

/// The program and one of its subcommands, without anything else.
fn is_name(span: &str) -> bool {
    use clap::CommandFactory;
    let known = |name| Cli::command().find_subcommand(name).is_some();
    matches!(words(span).as_slice(), [_, name] if known(name))
}

fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut all = vec![root.join("README.md")];
    let mut folders = vec![root.join("docs")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|kind| kind == "md" || kind == "toml") {
                all.push(path);
            }
        }
    }
    all
}

#[test]
fn documented_commands_are_true() {
    let mut count = 0;
    for path in documents() {
        for command in commands(&std::fs::read_to_string(&path).unwrap()) {
            // The general form in a sentence: `secondsite help COMMAND`.
            let command = command.replace("COMMAND", "status").replace("CODE", "backlog");
            if let Err(error) = parses(&command) {
                panic!("{}: {error}", path.display());
            }
            count += 1;
        }
    }
    assert!(count > 40, "only {count} commands were found");
}

#[test]
fn what_an_explanation_says_to_type_is_true() {
    let states = State::ALL.iter().map(|state| (state.code(), state.explanation()));
    let reasons = Reason::ALL.iter().map(|reason| (reason.code(), reason.explanation()));
    for (code, what) in states.chain(reasons) {
        let mut ours = 0;
        for step in what.remedy {
            if step.command.starts_with("secondsite ") {
                parses(&step.command.replace("{server}", "db1"))
                    .unwrap_or_else(|error| panic!("{code}: {error}"));
                ours += 1;
            }
        }
        assert!(ours > 0 || what.remedy[0].command.starts_with("systemctl "), "{code}");
    }
}

#[test]
fn a_command_that_does_not_exist_is_seen() {
    let text = "Type `secondsite explode db1` or\n```\nsecondsite status --wach   # now\n```\n";
    let found = commands(text);
    assert_eq!(found.len(), 2);
    assert!(found.iter().all(|command| parses(command).is_err()));
}
