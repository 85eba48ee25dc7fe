//! What operators see.

use super::extract::Operator;
use super::view;
use crate::api::{Point, Points, SCHEMA_VERSION, ServerEntry, Servers, Status};
use crate::deployment::Deployment;
use crate::problem::Result;
use crate::store::servers;
use axum::Json;
use axum::extract::{Path, State};
use jiff::Timestamp;
use std::collections::HashMap;
use std::sync::Arc;

/// `GET /api/v1/status`.
pub(super) async fn status(
    State(deployment): State<Arc<Deployment>>,
    Operator(_): Operator,
) -> Result<Json<Status>> {
    Ok(Json(view::status(&deployment, None).await?))
}

/// `GET /api/v1/servers/NAME/status`.
pub(super) async fn server_status(
    State(deployment): State<Arc<Deployment>>,
    Operator(_): Operator,
    Path(name): Path<String>,
) -> Result<Json<Status>> {
    Ok(Json(view::status(&deployment, Some(&name)).await?))
}

/// `GET /api/v1/servers`.
pub(super) async fn servers(
    State(deployment): State<Arc<Deployment>>,
    Operator(_): Operator,
) -> Result<Json<Servers>> {
    let mut tx = deployment.store.begin().await?;
    let rows = servers::all(&mut tx).await?;
    let entries = rows.iter().map(|server| {
        Ok(ServerEntry {
            id: server.id.clone(),
            name: server.name.clone(),
            revoked: server.revoked,
            inventory: server.inventory()?,
        })
    });
    let servers = entries.collect::<Result<_>>()?;
    Ok(Json(Servers { schema_version: SCHEMA_VERSION, servers }))
}

/// `GET /api/v1/servers/NAME/points`.
pub(super) async fn points(
    State(deployment): State<Arc<Deployment>>,
    Operator(_): Operator,
    Path(name): Path<String>,
) -> Result<Json<Points>> {
    let mut tx = deployment.store.begin().await?;
    let server = view::server(&mut tx, &name).await?;
    let volumes = servers::volumes(&mut tx, &server.id).await?;
    drop(tx);
    let names: HashMap<&str, &str> =
        volumes.iter().map(|volume| (volume.id.as_str(), volume.name.as_str())).collect();
    // One that is retired has no name any more; its id says at least which folder it is.
    let name_of = |id: &str| names.get(id).map_or(id, |name| name).to_owned();
    let reports = deployment.reports();
    let listed = reports.targets.values().flat_map(|heard| &heard.report.points);
    let points = listed
        .filter(|point| point.server == server.id)
        .map(|point| Point {
            id: point.id.clone(),
            time: Timestamp::from_nanosecond(i128::from(point.time_ns))
                .unwrap_or(Timestamp::MAX)
                .to_string(),
            generation: point.generation,
            epochs: point.epochs.iter().map(|(id, epoch)| (name_of(id), *epoch)).collect(),
            consistency: point.consistency.clone(),
            lacking: point.lacking.iter().map(|id| name_of(id)).collect(),
            reason: point.reason.clone(),
            kept: point.kept,
            name: point.name.clone(),
        })
        .collect();
    Ok(Json(Points { schema_version: SCHEMA_VERSION, points }))
}
