//! What operators change: protect, unprotect, revoke. Each is one transaction, audited.

use super::extract::{Document, Operator};
use super::view;
use crate::api::{OrderState, ProtectReply, ProtectRequest};
use crate::certificate::Role;
use crate::deployment::Deployment;
use crate::ids;
use crate::plan::{self, Chosen, Taken};
use crate::problem::{Refused, Result, exit};
use crate::store::servers::{Server, Volume, VolumeState};
use crate::store::{access, audit, orders, servers, targets};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use jiff::Timestamp;
use sqlx::sqlite::SqliteConnection;
use std::sync::Arc;

/// `POST /api/v1/servers/NAME/protect`.
pub(super) async fn protect(
    State(deployment): State<Arc<Deployment>>,
    Operator(operator): Operator,
    Path(name): Path<String>,
    Document(request): Document<ProtectRequest>,
) -> Result<Json<ProtectReply>> {
    let mut tx = deployment.store.begin().await?;
    let server = view::server(&mut tx, &name).await?;
    refuse_revoked(&server)?;
    if targets::all(&mut tx).await?.is_empty() {
        return Err(Refused::conflict(exit::CONFIGURATION, "this deployment has no target")
            .hint("secondsite setup"));
    }
    let known = servers::volumes(&mut tx, &server.id).await?;
    let taken: Vec<Taken> = known
        .iter()
        .filter(|volume| volume.state == VolumeState::Protected)
        .map(|volume| Taken {
            name: volume.name.clone(),
            path: volume.path.clone(),
            reserve: volume.reserve.clone(),
        })
        .collect();
    let mut plan = plan::plan(&name, &server.inventory()?, &taken, &request)?;
    let request = ProtectRequest { reserve: plan.reserve.clone(), ..request };
    for chosen in &mut plan.chosen {
        let volume = take_up(&mut tx, &server, &known, chosen, &request).await?;
        servers::put_volume(&mut tx, &volume).await?;
    }
    let volumes: Vec<_> = plan.chosen.into_iter().map(|chosen| chosen.planned).collect();
    if !request.dry_run {
        servers::set_goal(&mut tx, &server.id, request.goal_seconds).await?;
        servers::set_keep(&mut tx, &server.id, &request.keep).await?;
        servers::changed(&mut tx, &server.id).await?;
        let names: Vec<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
        let what = format!("protected {name}: {}", names.join(", "));
        audit(&mut tx, deployment.now(), &Role::Operator(operator).to_string(), &what).await?;
        tx.commit().await?;
        deployment.assigned.raise();
    }
    Ok(Json(ProtectReply { server: name, volumes, left_out: plan.left_out }))
}

/// `POST /api/v1/servers/NAME/unprotect`. Replica and points stay.
pub(super) async fn unprotect(
    State(deployment): State<Arc<Deployment>>,
    Operator(operator): Operator,
    Path(name): Path<String>,
) -> Result<StatusCode> {
    let mut tx = deployment.store.begin().await?;
    let server = view::server(&mut tx, &name).await?;
    let mut any = false;
    for volume in servers::volumes(&mut tx, &server.id).await? {
        if volume.state == VolumeState::Protected {
            servers::set_volume_state(&mut tx, &volume.id, VolumeState::Unprotected).await?;
            any = true;
        }
    }
    if !any {
        let message = format!("{name} has no protected volume");
        return Err(Refused::conflict(exit::CONFIGURATION, message)
            .hint(format!("secondsite status {name}")));
    }
    give_up_orders(&mut tx, &server, "was unprotected", deployment.now()).await?;
    finish(&deployment, tx, &server, &operator, "unprotected").await
}

/// `POST /api/v1/servers/NAME/revoke`. Its certificates are good for nothing from now on; control
/// refuses them at once, targets with their next assignment.
pub(super) async fn revoke(
    State(deployment): State<Arc<Deployment>>,
    Operator(operator): Operator,
    Path(name): Path<String>,
) -> Result<StatusCode> {
    let mut tx = deployment.store.begin().await?;
    let server = view::server(&mut tx, &name).await?;
    refuse_revoked(&server)?;
    servers::revoke(&mut tx, &server.id).await?;
    access::revoke_certificates(&mut tx, &Role::Agent(server.id.clone()).to_string()).await?;
    give_up_orders(&mut tx, &server, "was revoked", deployment.now()).await?;
    finish(&deployment, tx, &server, &operator, "revoked").await
}

fn refuse_revoked(server: &Server) -> Result<()> {
    match server.revoked {
        true => Err(Refused::conflict(
            exit::PERMISSION,
            format!("the certificates of {} were revoked", server.name),
        )
        .hint("join again under another name: secondsite token")),
        false => Ok(()),
    }
}

/// The volume that a device becomes: the one that it was before, if replica and device still fit
/// (a replica grows with its device, but never shrinks).
async fn take_up(
    db: &mut SqliteConnection,
    server: &Server,
    known: &[Volume],
    chosen: &mut Chosen,
    request: &ProtectRequest,
) -> Result<Volume> {
    let device = &chosen.device;
    let before = known.iter().find(|volume| volume.name == device.name);
    let id = match before {
        Some(volume) if volume.size_bytes() <= device.size_bytes => {
            let replica = volume.block_bytes();
            if request.block_bytes.is_some_and(|wished| wished != replica) {
                let message =
                    format!("the replica of {} has a block size of {replica} bytes", device.path);
                return Err(Refused::conflict(exit::USAGE, message)
                    .hint(format!("--block-size {}KiB, or leave it out", replica >> 10)));
            }
            chosen.planned.block_bytes = replica;
            volume.id.clone()
        }
        Some(volume) => {
            servers::set_volume_state(db, &volume.id, VolumeState::Retired).await?;
            ids::new()
        }
        None => ids::new(),
    };
    let (block_bytes, excluded) = (chosen.planned.block_bytes, &chosen.excluded);
    let reserve = request.reserve.clone();
    Ok(Volume::protected(id, &server.id, device, request.tracker, block_bytes, excluded, reserve)?)
}

async fn give_up_orders(
    db: &mut SqliteConnection,
    server: &Server,
    why: &str,
    now: Timestamp,
) -> Result<()> {
    let state = OrderState::Failed {
        exit_code: exit::FAILED,
        message: format!("{} {why} before the order was done", server.name),
    };
    for order in orders::open_above(db, &server.id, 0).await? {
        orders::end(db, &server.id, order.number.cast_unsigned(), &state, now).await?;
    }
    Ok(())
}

async fn finish(
    deployment: &Deployment,
    mut tx: sqlx::Transaction<'static, sqlx::Sqlite>,
    server: &Server,
    operator: &str,
    done: &str,
) -> Result<StatusCode> {
    servers::changed(&mut tx, &server.id).await?;
    let who = Role::Operator(operator.to_owned()).to_string();
    audit(&mut tx, deployment.now(), &who, &format!("{done} {}", server.name)).await?;
    tx.commit().await?;
    deployment.assigned.raise();
    deployment.reported.raise();
    Ok(StatusCode::NO_CONTENT)
}
