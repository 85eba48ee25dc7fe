//! `secondsite token`: a one-time token for a machine that is to join.

use super::args::{TokenArgs, TokenRole};
use super::failure::Failure;
use super::operator::Operator;
use super::{Context, output, units};
use secondsite_control::api::{SCHEMA_VERSION, TokenRequest};
use serde_json::json;

pub(super) fn run(context: &Context, args: &TokenArgs) -> Result<(), Failure> {
    let role = match args.role {
        TokenRole::Agent => "agent",
        TokenRole::Target => "target",
        TokenRole::Relay => "relay",
    };
    let operator = Operator::open(context)?;
    let request = TokenRequest { role: role.into(), ttl_seconds: args.ttl };
    let reply = operator.ask(|control| control.token(&request))?;
    if context.json {
        output::document(&json!({
            "schema_version": SCHEMA_VERSION,
            "token": reply.token,
            "fingerprint": reply.fingerprint,
            "ttl_seconds": reply.ttl_seconds,
        }));
        return Ok(());
    }
    output::data(&format!("{}\n", reply.token));
    output::talk(&format!("Authority {}", reply.fingerprint));
    output::talk(&format!(
        "Good for {} and one {role}. On the machine that is to join:\n  secondsite join {} --token -",
        units::goal(reply.ttl_seconds),
        operator.address(),
    ));
    Ok(())
}
