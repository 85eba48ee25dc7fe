//! `secondsite join`: makes this server known to control. Nothing is replicated yet.
//!
//! Everything that can fail here is tried before the token is used. The key is made here and stays.

use super::args::JoinArgs;
use super::failure::{Exit, Failure};
use super::services::{self, AGENT_SERVICE};
use super::{Context, operator, output, units};
use crate::config::Paths;
use crate::daemon::agent_side::{ASSIGNMENT, ENROLMENT, Enrolment, ORDERS};
use crate::daemon::state::StateDir;
use crate::{inventory, machine};
use secondsite_control::api::{EnrolRequest, InventoryDevice, SCHEMA_VERSION};
use secondsite_control::client::BlockingClient;
use secondsite_control::pki::{self, Identity, Role};
use secondsite_control::setup::AGENT;
use secondsite_control::token::Token;
use serde_json::json;
use std::io::Read;

/// Longest token that is read from stdin.
const TOKEN_BYTES_MAX: u64 = 4096;

pub(super) fn run(context: &Context, args: &JoinArgs) -> Result<(), Failure> {
    let paths = &context.paths;
    let token = token(&args.token)?;
    let name = args.name.clone().map_or_else(host_name, Ok)?;
    let devices = inventory::take(&[], &paths.run.join("filter")).map_err(|error| {
        let hint = match error {
            inventory::InventoryError::Stalled(_) => {
                "lsblk   (hangs until the device answers or is removed)"
            }
            _ => "apt install util-linux",
        };
        Failure::new(Exit::Unavailable, error.to_string()).hint(hint)
    })?;
    if args.dry_run {
        output::talk(&format!("Would join {} as {name} and report:", args.control));
        show(
            context,
            &json!({ "schema_version": SCHEMA_VERSION, "name": name, "dry_run": true }),
            &devices,
        );
        return Ok(());
    }
    may_join(context, &token)?;
    let config_table = read_config(paths)?;
    let state = StateDir::open(&paths.state, AGENT)?;
    // What a newer version wrote is not thrown away. Anything else that is wrong is replaced.
    for document in [ENROLMENT, ASSIGNMENT, ORDERS] {
        if let Err(failure) = state.read::<serde_json::Value>(document)
            && failure.exit == Exit::Config
        {
            return Err(failure);
        }
    }
    let machine = machine::hex(&machine::digest());
    let mut enrolment = Enrolment { machine: machine.clone(), offered: Vec::new() };
    enrolment.offer(&devices);
    let before = Identity::load(&paths.pki, AGENT).ok().map(|identity| identity.role);

    let failed = |error: anyhow::Error| Failure::new(Exit::Failed, format!("{error:#}"));
    let (key_pem, request_pem) = pki::new_request().map_err(failed)?;
    let request = EnrolRequest {
        token: token.to_string(),
        request_pem,
        name,
        machine,
        inventory: devices.clone(),
    };
    let config = pki::client_config_pinned(&token.authority()).map_err(failed)?;
    let client =
        BlockingClient::new(&args.control, config).map_err(|error| failed(error.into()))?;
    let reply =
        client.run(|client| client.enrol(&request)).map_err(|error| operator::failure(&error))?;

    // Another server than before: what was assigned to that one is not ours. It goes before the new
    // certificate is there, so that no start ever sees both.
    if before != Some(Role::Agent(reply.id.clone())) {
        for document in [ASSIGNMENT, ORDERS] {
            let path = state.path(document);
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                return Err(Failure::io("remove", &path, &error));
            }
        }
    }
    state.write(ENROLMENT, &enrolment)?;
    write_config(paths, config_table, &args.control, &reply.name)?;
    pki::install(&paths.pki, AGENT, &key_pem, &reply.certificate_pem, &reply.authority_pem)
        .map_err(|error| Failure::new(Exit::Io, format!("{error:#}")))?;

    let fingerprint = token.authority().to_string();
    if !context.json {
        output::data(&format!(
            "Joined as {}   (authority {fingerprint} matches the token)\n",
            reply.name
        ));
    }
    let document = json!({
        "schema_version": SCHEMA_VERSION,
        "name": reply.name,
        "id": reply.id,
        "fingerprint": fingerprint,
    });
    show(context, &document, &devices);
    services::start(context, args.no_start, &[AGENT_SERVICE]);
    output::talk(&format!(
        "Nothing is replicated yet.   On control's host: secondsite protect {} --volumes all",
        reply.name
    ));
    Ok(())
}

fn token(argument: &str) -> Result<Token, Failure> {
    let mut text = argument.to_string();
    if argument == "-" {
        text.clear();
        std::io::stdin().take(TOKEN_BYTES_MAX).read_to_string(&mut text).map_err(|error| {
            Failure::new(Exit::Io, format!("read the token from stdin: {error}"))
        })?;
    }
    text.trim().parse().map_err(|error| {
        Failure::new(Exit::Permission, format!("--token: {error}"))
            .hint("on control's host: secondsite token")
    })
}

/// The first label of the host name, if it can be a server's name.
fn host_name() -> Result<String, Failure> {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let label = host.trim().split('.').next().unwrap_or_default();
    if pki::is_name(label) {
        return Ok(label.to_string());
    }
    Err(Failure::new(Exit::Usage, format!("the host name {label:?} cannot be a server's name"))
        .hint("give one: --name NAME"))
}

/// A configuration belongs to one deployment and one server; a valid certificate is not thrown
/// away without a word.
fn may_join(context: &Context, token: &Token) -> Result<(), Failure> {
    let pki = &context.paths.pki;
    let authority = pki.join("ca.pem");
    if let Ok(pem) = std::fs::read_to_string(&authority) {
        let ours = pki::Fingerprint::of_pem(&pem).map_err(|error| {
            Failure::new(Exit::Config, format!("{}: {error:#}", authority.display()))
        })?;
        if ours != token.authority() {
            let what = format!(
                "{} belongs to authority {ours}, the token to {}",
                context.paths.config.display(),
                token.authority()
            );
            return Err(Failure::new(Exit::Config, what)
                .still("nothing was changed; the token is still good")
                .hint("join with another --config-dir, or move the old folder away"));
        }
    }
    let Ok(identity) = Identity::load(pki, AGENT) else { return Ok(()) };
    if identity.not_after() <= jiff::Timestamp::now() || context.yes {
        return Ok(());
    }
    let what = format!(
        "this server has joined already; its certificate is good until {}",
        identity.not_after()
    );
    Err(Failure::new(Exit::Config, what)
        .still("nothing was changed; the token is still good")
        .hint("give --yes to join anew with this token"))
}

/// What stands in `agent.toml`. Looked at before the token is spent.
fn read_config(paths: &Paths) -> Result<toml::Table, Failure> {
    let path = paths.file(AGENT);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(toml::Table::new()),
        Err(error) => return Err(Failure::io("read", &path, &error)),
    };
    text.parse().map_err(|error: toml::de::Error| {
        Failure::new(Exit::Config, format!("{}: {}", path.display(), error.to_string().trim_end()))
            .still("nothing was changed; the token is still good")
            .hint(format!("mend that line, or move {} away, then join again", path.display()))
    })
}

/// Writes `agent.toml` with control's address and the name; what else stands there stays.
fn write_config(
    paths: &Paths,
    mut table: toml::Table,
    control: &str,
    name: &str,
) -> Result<(), Failure> {
    table.insert("control".into(), control.into());
    table.insert("name".into(), name.into());
    super::setup::write_toml(&paths.file(AGENT), &table)
}

fn show(context: &Context, document: &serde_json::Value, devices: &[InventoryDevice]) {
    if context.json {
        let mut document = document.clone();
        document["inventory"] = json!(devices);
        output::document(&document);
        return;
    }
    // Partitions can be protected too, but whole volumes are what one chooses from.
    let rows = devices.iter().filter(|device| device.kind != "part").map(|device| {
        let trackers = match (device.trackers.first().map(String::as_str), device.refused.as_str())
        {
            (None, why) => format!("not: {why}"),
            (Some("ebpf"), _) => "ebpf: now, no reboot".into(),
            (Some(other), "") => other.to_string(),
            (Some(other), why) => format!("{other} ({why})"),
        };
        vec![device.name.clone(), units::bytes(device.size_bytes), device.used_by.clone(), trackers]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    output::data(&output::table(&["VOLUME", "SIZE", "USED BY", "CAN BE TRACKED BY"], rows));
}
