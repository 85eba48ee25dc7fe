//! How a machine gets its certificate, how it gets the next one, and the tokens for the first.

use super::extract::{Anyone, Document, Operator};
use crate::api::{
    EnrolReply, EnrolRequest, InventoryDevice, RenewRequest, TokenReply, TokenRequest,
};
use crate::ca::Issued;
use crate::certificate::{Role, is_name, unhex};
use crate::deployment::Deployment;
use crate::ids;
use crate::problem::{Refused, Result, exit};
use crate::store::{access, audit, servers, targets};
use crate::token::{TOKEN_SECONDS_MAX, Token};
use crate::tokens;
use axum::Json;
use axum::extract::State;
use jiff::Timestamp;
use sqlx::sqlite::SqliteConnection;
use std::sync::Arc;

/// Devices of one server.
const DEVICES_MAX: usize = 4096;
/// Letters of a device's name or path.
const DEVICE_CHARS_MAX: usize = 255;

/// `POST /enrol`. The token is used up in the same transaction that records the certificate.
pub(super) async fn enrol(
    State(deployment): State<Arc<Deployment>>,
    Document(request): Document<EnrolRequest>,
) -> Result<Json<EnrolReply>> {
    check_request(&request)?;
    let now = deployment.now();
    let mut tx = deployment.store.begin().await?;
    let token = check_token(&mut tx, &request.token, now).await?;
    let known = takes_up(&mut tx, &request, now).await?;
    let id = known.clone().unwrap_or_else(ids::new);
    let role = Role::Agent(id.clone());
    let issued = sign(&deployment, &request.request_pem, &role, now)?;
    if !access::use_token(&mut tx, &token.sha256(), now).await? {
        return Err(no_good("the token was used already"));
    }
    match known {
        Some(_) => {
            servers::set_inventory(&mut tx, &id, &request.inventory).await?;
            servers::set_certificate_ends(&mut tx, &id, issued.info.not_after).await?;
        }
        None => {
            let ends = issued.info.not_after;
            let (name, machine) = (&request.name, &request.machine);
            servers::insert(&mut tx, &id, name, machine, &request.inventory, ends).await?;
            targets::changed(&mut tx).await?;
        }
    }
    access::insert_certificate(&mut tx, &issued.info).await?;
    audit(&mut tx, now, &role.to_string(), &format!("joined as {}", request.name)).await?;
    tx.commit().await?;
    deployment.assigned.raise();
    tracing::info!(server = id, name = request.name, "joined");
    Ok(reply(&deployment, id, request.name, issued))
}

/// `POST /api/v1/renew`: the same holder and role, a fresh key.
pub(super) async fn renew(
    State(deployment): State<Arc<Deployment>>,
    Anyone(role): Anyone,
    Document(request): Document<RenewRequest>,
) -> Result<Json<EnrolReply>> {
    let now = deployment.now();
    let issued = sign(&deployment, &request.request_pem, &role, now)?;
    let mut tx = deployment.store.begin().await?;
    let (id, name) = match &role {
        Role::Agent(id) => {
            let server = servers::by_id(&mut tx, id).await?;
            servers::set_certificate_ends(&mut tx, id, issued.info.not_after).await?;
            (id.clone(), server.map(|server| server.name).unwrap_or_default())
        }
        Role::Target(id) => {
            let target = targets::by_id(&mut tx, id).await?;
            (id.clone(), target.map(|target| target.name).unwrap_or_default())
        }
        Role::Operator(name) => (name.clone(), name.clone()),
        Role::Control => return Err(Refused::forbidden("control renews itself")),
    };
    access::insert_certificate(&mut tx, &issued.info).await?;
    audit(&mut tx, now, &role.to_string(), "renewed its certificate").await?;
    tx.commit().await?;
    Ok(reply(&deployment, id, name, issued))
}

/// `POST /api/v1/tokens`.
pub(super) async fn token(
    State(deployment): State<Arc<Deployment>>,
    Operator(operator): Operator,
    Document(request): Document<TokenRequest>,
) -> Result<Json<TokenReply>> {
    let TokenRequest { role, ttl_seconds } = request;
    if !["agent", "target", "relay"].contains(&role.as_str()) {
        let message = format!("a token for the role {role:?}: it must be agent, target or relay");
        return Err(Refused::usage(message).hint("--role agent"));
    }
    if !(1..=TOKEN_SECONDS_MAX).contains(&ttl_seconds) {
        return Err(Refused::usage("a token lives from 1 s to 1 h").hint("--ttl 1h"));
    }
    let mut tx = deployment.store.begin().await?;
    let who = Role::Operator(operator).to_string();
    let token = tokens::make(&deployment, &mut tx, &who, &role, ttl_seconds).await?;
    tx.commit().await?;
    Ok(Json(token))
}

/// Whether an inventory may be kept: names and paths that cannot be taken for something else.
pub(super) fn check_inventory(inventory: &[InventoryDevice]) -> Result<()> {
    let allowed = |text: &str| {
        let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"._+:@=#/-".contains(&byte);
        !text.is_empty()
            && text.len() <= DEVICE_CHARS_MAX
            && text.bytes().all(letter)
            && text.split('/').all(|part| part != "..")
    };
    if inventory.len() > DEVICES_MAX {
        return Err(Refused::usage(format!("an inventory has at most {DEVICES_MAX} devices")));
    }
    for device in inventory {
        if !allowed(&device.name) || !allowed(&device.path) || !device.path.starts_with("/dev/") {
            let message = format!("a device {:?} at {:?}", device.name, device.path);
            return Err(Refused::usage(format!("{message}: not a name and path of a device")));
        }
    }
    Ok(())
}

fn check_request(request: &EnrolRequest) -> Result<()> {
    if !is_name(&request.name) {
        let message = format!("{:?} cannot be the name of a server", request.name);
        return Err(Refused::usage(message)
            .hint("--name with 1 to 64 letters, digits, points, hyphens or underscores"));
    }
    if unhex::<32>(&request.machine).is_none() {
        return Err(Refused::usage("the machine's identity is not 64 hex digits"));
    }
    check_inventory(&request.inventory)
}

async fn check_token(db: &mut SqliteConnection, text: &str, now: Timestamp) -> Result<Token> {
    let token: Token = text.parse().map_err(|_| no_good("the token is none of this deployment"))?;
    let Some(row) = access::token(db, &token.sha256()).await? else {
        return Err(no_good("the token is none of this deployment"));
    };
    if row.used_s.is_some() {
        return Err(no_good("the token was used already"));
    }
    if row.ends_s <= now.as_second() {
        return Err(no_good("the token has expired"));
    }
    if row.role != "agent" {
        return Err(no_good(&format!("the token is for the role {}, not for an agent", row.role)));
    }
    Ok(token)
}

fn no_good(message: &str) -> Refused {
    Refused::forbidden(message).hint("make another on control's host: secondsite token")
}

/// The server that is taken up again, by id: the same machine with the same name, whose certificate
/// ended while it was away. Never after a revocation: whoever holds the revoked certificate would
/// have the same identity.
async fn takes_up(
    db: &mut SqliteConnection,
    request: &EnrolRequest,
    now: Timestamp,
) -> Result<Option<String>> {
    let Some(server) = servers::by_name(db, &request.name).await? else { return Ok(None) };
    let ended = server.certificate_ends_s <= now.as_second();
    let same = server.machine.eq_ignore_ascii_case(&request.machine);
    if ended && same && !server.revoked {
        return Ok(Some(server.id));
    }
    let message =
        format!("a server named {} has joined already; the token is still good", request.name);
    Err(Refused::conflict(exit::USAGE, message).hint("choose another name: --name NAME"))
}

fn sign(deployment: &Deployment, request_pem: &str, role: &Role, now: Timestamp) -> Result<Issued> {
    deployment
        .authority
        .sign(request_pem, role, &[], now)
        .map_err(|error| Refused::usage(format!("{error:#}")))
}

fn reply(deployment: &Deployment, id: String, name: String, issued: Issued) -> Json<EnrolReply> {
    Json(EnrolReply {
        id,
        name,
        certificate_pem: issued.certificate_pem,
        authority_pem: deployment.authority.certificate_pem().to_owned(),
    })
}
