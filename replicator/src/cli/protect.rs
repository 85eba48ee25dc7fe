//! `secondsite protect` and `unprotect`: what is replicated.
//!
//! Both return when control has recorded the order; the agent may be away. Only `--wait` waits.

use super::args::{ProtectArgs, UnprotectArgs};
use super::failure::{Exit, Failure};
use super::operator::Operator;
use super::output::Progress;
use super::{Context, output, units};
use secondsite_control::api::{ProtectReply, ProtectRequest, SCHEMA_VERSION};
use secondsite_control::codes::{Reason, State};
use serde_json::json;
use std::fmt::Write;
use std::io::{BufRead, IsTerminal};
use std::time::Duration;

/// How often `--wait` looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

pub(super) fn protect(context: &Context, args: &ProtectArgs) -> Result<(), Failure> {
    if args.volumes.len() > 1 && args.volumes.iter().any(|volume| volume == "all") {
        return Err(Failure::new(Exit::Usage, "--volumes takes either `all` or device paths"));
    }
    let operator = Operator::open(context)?;
    let request = ProtectRequest {
        volumes: args.volumes.clone(),
        goal_seconds: args.rpo,
        keep: args.keep.clone(),
        tracker: args.tracker.into(),
        reserve: args.reserve.clone(),
        block_bytes: args.block_size,
        include_swap: args.include_swap,
        dry_run: args.dry_run,
    };
    let reply = operator.ask(|control| control.protect(&args.server, &request))?;
    if context.json {
        output::document(&json!({
            "schema_version": SCHEMA_VERSION,
            "server": reply.server,
            "dry_run": args.dry_run,
            "volumes": reply.volumes,
            "left_out": reply.left_out,
        }));
    } else {
        output::data(&plan(&reply, args.dry_run));
        if let Some(reserve) = &args.reserve {
            output::data(&format!("  reserve: {reserve}   what it holds is overwritten\n"));
        }
    }
    if args.wait {
        return wait(context, &operator, &args.server);
    }
    if args.dry_run {
        let undo = context.command(&format!("unprotect {}", args.server));
        output::talk(&format!(
            "Run without --dry-run to start. Undo at any time: {undo}   (data on {} stays as it is)",
            args.server
        ));
    } else {
        let watch = context.command(&format!("status {} --watch", args.server));
        output::talk(&format!(
            "Recorded. The first copy begins when the agent hears of it.   {watch}"
        ));
    }
    Ok(())
}

/// Waits until the server is protected. Interrupted, replication goes on all the same.
fn wait(context: &Context, operator: &Operator, server: &str) -> Result<(), Failure> {
    let mut progress = Progress::new(server);
    let explain = context.command(&format!("explain {server}"));
    let result = loop {
        let asked = operator.ask(|control| control.server_status(server));
        let status = match asked {
            // Control may be restarted meanwhile.
            Err(failure) if failure.exit == Exit::Unavailable => {
                progress.at(0, &failure.message);
                std::thread::sleep(LOOK_EVERY);
                continue;
            }
            other => other?,
        };
        let Some(row) = status.servers.first() else { continue };
        let failed = |exit, what: String| {
            Failure::new(exit, what)
                .still("what was recorded stays; it goes on by itself where it can")
                .hint(explain.clone())
        };
        match row.state {
            State::Protected => break Ok(()),
            State::Stopped => {
                break Err(failed(Exit::Failed, format!("{server} is stopped: {}", row.reason)));
            }
            State::Unprotected | State::Joined => {
                break Err(failed(Exit::Failed, format!("{server} was unprotected meanwhile")));
            }
            // Points of what is only compared are never exact: this is all that there will be.
            State::Behind
                if row.loss_seconds.is_none()
                    && matches!(row.code, Some(Reason::CompareAsked | Reason::CompareNoEbpf)) =>
            {
                output::talk(&format!("{server}: {}   {explain}", row.reason));
                break Ok(());
            }
            _ => {}
        }
        progress.begin(format!("{server} {}", row.state.words()));
        let left = match (row.percent, row.left_seconds) {
            (Some(_), Some(seconds)) => format!("{} left", units::span(seconds)),
            (Some(_), None) => "calculating".into(),
            (None, _) => row.reason.clone(),
        };
        progress.at(row.percent.unwrap_or(0), &left);
        std::thread::sleep(LOOK_EVERY);
    };
    progress.finish();
    if result.is_ok() {
        output::talk(&format!(
            "{server} has its first recovery point.   {}",
            context.command(&format!("points {server}"))
        ));
    }
    result
}

fn plan(reply: &ProtectReply, dry_run: bool) -> String {
    let verb = if dry_run { "Plan for" } else { "Protecting" };
    let mut text = format!("{verb} {}\n", reply.server);
    let rows = reply.volumes.iter().map(|volume| {
        vec![
            format!("  {}", volume.name),
            volume.path.clone(),
            units::bytes(volume.size_bytes),
            volume.tracker.clone(),
            units::bytes(u64::from(volume.block_bytes)),
        ]
    });
    text += &output::table(&["  VOLUME", "PATH", "SIZE", "TRACKER", "BLOCK"], rows.collect());
    for device in &reply.left_out {
        let _ = writeln!(text, "  left out: {device}");
    }
    for volume in &reply.volumes {
        for (part, bytes) in &volume.skipped_swap {
            let size = units::bytes(*bytes);
            let _ =
                writeln!(text, "  swap is skipped: {part} ({size})   change with --include-swap");
        }
    }
    text
}

pub(super) fn unprotect(context: &Context, args: &UnprotectArgs) -> Result<(), Failure> {
    let server = &args.server;
    let operator = Operator::open(context)?;
    let status = operator.ask(|control| control.server_status(server))?;
    let volumes: Vec<String> = status
        .servers
        .iter()
        .flat_map(|server| server.volumes.iter().map(|volume| volume.name.clone()))
        .collect();
    if !args.dry_run {
        // Nothing is destroyed, so only a person is asked.
        if !context.yes && !context.json && std::io::stdin().is_terminal() {
            ask(&format!(
                "Stop replicating {server} ({})? Replica and points stay.",
                volumes.join(", ")
            ))?;
        }
        operator.ask(|control| control.unprotect(server))?;
    }
    if context.json {
        output::document(&json!({
            "schema_version": SCHEMA_VERSION,
            "server": server,
            "dry_run": args.dry_run,
            "volumes": volumes,
        }));
        return Ok(());
    }
    let verb = if args.dry_run { "Would stop replicating" } else { "No longer replicated:" };
    output::data(&format!("{verb} {server}: {}\n", volumes.join(", ")));
    output::talk("Replica and points stay; the agent removes its marks.");
    Ok(())
}

fn ask(question: &str) -> Result<(), Failure> {
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer);
    match read.map(|_| answer.trim().to_lowercase()) {
        Ok(answer) if answer == "y" || answer == "yes" => Ok(()),
        _ => Err(Failure::new(Exit::Failed, "not confirmed; nothing was changed")
            .hint("answer y, or give --yes")),
    }
}
