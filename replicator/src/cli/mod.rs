//! The command line: what scripts and people rely on.
//!
//! Each command is a function of its own module that prints its result and returns; everything that
//! goes wrong is a [`failure::Failure`], which only [`main`] prints. Commands use nothing but the
//! public API of control, or the same of the target of this host.

pub mod args;
mod check;
mod config;
mod doctor;
mod explain;
pub mod failure;
mod generate;
mod join;
mod operator;
mod orders;
pub mod output;
mod points;
mod protect;
mod recovery;
mod services;
mod setup;
mod status;
mod token;
pub mod units;

use crate::config::{ConfigError, Paths};
use crate::daemon;
use args::{Cli, Command, ConfigAction, Global};
use clap::Parser;
use clap::error::ErrorKind;
use failure::{Exit, Failure};
use std::process::ExitCode;

/// What every command is given besides its own arguments.
pub struct Context {
    /// Where configuration, state and sockets lie.
    pub paths: Paths,
    /// One document on stdout instead of text.
    pub json: bool,
    /// Questions are answered with yes.
    pub yes: bool,
}

impl Context {
    fn new(global: &Global) -> Self {
        Self { paths: Paths::of(&global.config_dir), json: global.json, yes: global.yes }
    }

    /// A command of ours that uses this configuration, for hints.
    pub fn command(&self, rest: &str) -> String {
        format!("secondsite {rest}{}", self.paths.argument())
    }
}

/// Parses the arguments, runs the command, prints what went wrong.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let context = Context::new(&cli.global);
    if let Command::Check(args) = &cli.command {
        return check::run(&context, args);
    }
    match run(&context, cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::talk(&failure.to_string());
            if context.json && !output::document_printed() {
                output::document(&failure.json());
            }
            ExitCode::from(failure.exit as u8)
        }
    }
}

fn run(context: &Context, command: Command) -> Result<(), Failure> {
    match command {
        Command::Setup(args) => setup::run(context, &args),
        Command::Control(log) => daemon::control::run(&context.paths, log.log_format),
        Command::Target(log) => daemon::target::run(&context.paths, log.log_format),
        Command::Replicate(log) => daemon::replicate::run(&context.paths, log.log_format),
        Command::Filter(args) => crate::filter::run(context, &args),
        Command::Token(args) => token::run(context, &args),
        Command::Join(args) => join::run(context, &args),
        Command::Protect(args) => protect::protect(context, &args),
        Command::Unprotect(args) => protect::unprotect(context, &args),
        Command::Status(args) => status::run(context, &args),
        Command::Points(args) => points::run(context, &args.server),
        Command::Open(args) => recovery::open(context, &args),
        Command::Close(args) => recovery::close(context, &args),
        Command::Keep(args) => recovery::keep(context, &args),
        Command::Export(args) => recovery::export(context, &args),
        Command::Cut(args) => orders::cut(context, &args),
        Command::Verify(args) => orders::verify(context, &args.server),
        Command::Generate(args) => generate::run(&args),
        Command::Explain(args) => explain::run(context, &args),
        Command::Doctor => doctor::run(context),
        Command::Config(args) => match args.action {
            ConfigAction::Check(args) => config::check(context, &args),
        },
        Command::Check(_) => unreachable!("it ends by its own exit codes"),
    }
}

/// Help and version go to stdout and succeed; everything else is wrong usage.
fn usage(error: &clap::Error) -> ExitCode {
    // A closed stream is no reason for another exit code.
    let _ = error.print();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
        _ if is_check(std::env::args().skip(1)) => ExitCode::from(check::UNKNOWN),
        _ => ExitCode::from(Exit::Usage as u8),
    }
}

/// Whether the command was to be `check`: Nagios knows only its four codes.
fn is_check(arguments: impl Iterator<Item = String>) -> bool {
    let mut before = String::new();
    for argument in arguments {
        if !argument.starts_with('-') && before != "--config-dir" {
            return argument == "check";
        }
        before = argument;
    }
    false
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let failure = Self::new(Exit::Config, error.to_string());
        match error {
            ConfigError::Read { absent: true, .. } => failure.hint(
                "secondsite setup --store DIR (second site) or secondsite join ADDR:PORT --token T \
                 (server to protect), or name another folder with --config-dir",
            ),
            ConfigError::UnknownKey { nearest: Some(key), file, .. } => {
                failure.hint(format!("write `{key}` in {}", file.display()))
            }
            _ => failure,
        }
    }
}
