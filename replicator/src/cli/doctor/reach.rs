//! Control and target, as this host reaches them. Every question is one that changes nothing.

use super::{Findings, Roles};
use crate::cli::Context;
use crate::cli::operator::dialled;
use crate::config::{AgentConfig, ControlConfig, TargetConfig};
use crate::daemon::agent_side::ASSIGNMENT;
use crate::daemon::lock;
use crate::daemon::state;
use crate::source::link::reach;
use secondsite_control::api::AgentAssignment;
use secondsite_control::client::BlockingClient;
use secondsite_control::client_error::ClientError;
use secondsite_control::pki::Identity;
use secondsite_control::run::CONTROL;
use secondsite_control::setup::{AGENT, OPERATOR, TARGET};

pub(super) fn check(context: &Context, roles: Roles, findings: &mut Findings) {
    daemons(context, roles, findings);
    let paths = &context.paths;
    if roles.control
        && let Ok(config) = ControlConfig::load(paths)
    {
        let address = dialled(config.listen).to_string();
        control(context, OPERATOR, &address, findings);
    }
    if roles.target
        && let Ok(config) = TargetConfig::load(paths)
    {
        control(context, TARGET, &config.control, findings);
    }
    if roles.agent
        && let Ok(config) = AgentConfig::load(paths)
    {
        control(context, AGENT, &config.control, findings);
        target(context, &config.control, findings);
    }
}

fn daemons(context: &Context, roles: Roles, findings: &mut Findings) {
    let all = [
        (roles.control, CONTROL, "control", "secondsite-control"),
        (roles.target, TARGET, "target", "secondsite-target"),
        (roles.agent, AGENT, "replicate", "secondsite-agent"),
    ];
    for (_, role, command, unit) in all.into_iter().filter(|(is, ..)| *is) {
        match lock::holder(&context.paths, role) {
            Ok(Some(pid)) => findings.ok("daemon", format!("{role} runs (process {pid})")),
            Ok(None) => {
                let start = match context.paths.is_default() {
                    true => format!("systemctl enable --now {unit}"),
                    false => context.command(command),
                };
                findings.warn("daemon", format!("{role} does not run"), start);
            }
            Err(error) => {
                findings.warn("daemon", format!("{role}: {error}"), "sudo secondsite doctor");
            }
        }
    }
}

fn control(context: &Context, who: &'static str, address: &str, findings: &mut Findings) {
    // Without a certificate there is a line about that already.
    let Ok(identity) = Identity::load(&context.paths.pki, who) else { return };
    let Ok(config) = identity.client_config() else { return };
    let client = match BlockingClient::new(address, config) {
        Ok(client) => client,
        Err(error) => return findings.fail("control", error.to_string(), "ulimit -n"),
    };
    // A poll that waits for nothing leaves no trace: only reports count as being heard.
    let asked: Result<(), ClientError> = match who {
        OPERATOR => client.run(|control| control.servers()).map(drop),
        TARGET => client.run(|control| control.target_poll(0, 0)).map(drop),
        _ => client.run(|control| control.agent_poll(0, 0, 0)).map(drop),
    };
    match asked {
        Ok(()) => findings.ok("control", format!("{address} answers the {who}")),
        Err(error) => {
            let hint = error.hint().to_string();
            let hint =
                if hint.is_empty() { "systemctl status secondsite-control".into() } else { hint };
            findings.fail("control", error.to_string(), hint);
        }
    }
}

/// The target that control named last, as this agent would dial it.
fn target(context: &Context, control: &str, findings: &mut Findings) {
    let assignment = state::peek::<AgentAssignment>(&context.paths.state, AGENT, ASSIGNMENT);
    let assignment = match assignment {
        Ok(Some(assignment)) => assignment,
        Ok(None) => {
            return findings.ok("target", "control has assigned nothing to this server yet");
        }
        Err(failure) => return findings.fail("target", failure.message, failure.hint),
    };
    let Some(address) = assignment.target else {
        let text = "control has named no target yet";
        return findings.warn("target", text, "secondsite status, on control's host");
    };
    let address = crate::daemon::agent_side::reachable(&address, control);
    let Ok(identity) = Identity::load(&context.paths.pki, AGENT) else { return };
    match reach(&address, &identity) {
        Ok(()) => findings.ok("target", format!("{address} answers")),
        Err(error) => findings.fail(
            "target",
            format!("{address}: {error}"),
            "on the second site: systemctl status secondsite-target; is the port open?",
        ),
    }
}
