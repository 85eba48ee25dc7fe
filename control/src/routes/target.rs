//! What targets send and ask.

use super::extract::{Document, Params, Target};
use super::{Wait, view};
use crate::api::{TargetAssignment, TargetPoll, TargetReport};
use crate::deployment::Deployment;
use crate::problem::{Refused, Result};
use crate::store::targets;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use std::sync::Arc;

/// `POST /api/v1/target/report`.
pub(super) async fn report(
    State(deployment): State<Arc<Deployment>>,
    Target(id): Target,
    Document(report): Document<TargetReport>,
) -> Result<StatusCode> {
    let now = deployment.now();
    let save = deployment.reports().put_target(&id, report.clone(), now);
    if save {
        let mut tx = deployment.store.begin().await?;
        targets::save_report(&mut tx, &id, &report, now).await?;
        tx.commit().await?;
    }
    super::orders::keep_listed(&deployment).await?;
    deployment.reported.raise();
    Ok(StatusCode::NO_CONTENT)
}

/// What a target has already.
#[derive(Debug, Deserialize)]
pub(super) struct Have {
    #[serde(default)]
    assignment: u64,
    #[serde(default)]
    wait_seconds: u64,
}

/// `GET /api/v1/target/poll`.
pub(super) async fn poll(
    State(deployment): State<Arc<Deployment>>,
    Target(id): Target,
    Params(have): Params<Have>,
) -> Result<Json<TargetPoll>> {
    let mut wait = Wait::new(&deployment.assigned, have.wait_seconds);
    loop {
        let assignment = newer(&deployment, &id, have.assignment).await?;
        if assignment.is_some() || !wait.again().await {
            return Ok(Json(TargetPoll { assignment }));
        }
    }
}

async fn newer(deployment: &Deployment, id: &str, have: u64) -> Result<Option<TargetAssignment>> {
    let mut tx = deployment.store.begin().await?;
    let target = targets::by_id(&mut tx, id).await?;
    let target = target.ok_or_else(|| Refused::forbidden("this target is unknown"))?;
    match target.assignment_version.cast_unsigned() > have {
        true => Ok(Some(view::target_assignment(&mut tx, &target).await?)),
        false => Ok(None),
    }
}
