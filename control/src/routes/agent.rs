//! What agents send and ask.

use super::extract::{Agent, Document, Params};
use super::{Wait, enrol, view};
use crate::api::{AgentPoll, AgentReport, InventoryDevice, OrderResult, OrderState};
use crate::certificate::is_id;
use crate::deployment::Deployment;
use crate::problem::{Refused, Result, exit};
use crate::store::{orders, servers};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use std::sync::Arc;

/// `POST /api/v1/agent/report`. The answer says that every final state in it is kept.
pub(super) async fn report(
    State(deployment): State<Arc<Deployment>>,
    Agent(id): Agent,
    Document(report): Document<AgentReport>,
) -> Result<StatusCode> {
    let now = deployment.now();
    let ended: Vec<(u64, OrderState)> = report
        .orders
        .iter()
        .filter(|(_, state)| is_final(state))
        .map(|(number, state)| (*number, checked(state)))
        .collect();
    let save = deployment.reports().put_agent(&id, report.clone(), now);
    if save || !ended.is_empty() {
        let mut tx = deployment.store.begin().await?;
        if save {
            servers::save_report(&mut tx, &id, &report, now).await?;
        }
        for (number, state) in &ended {
            orders::end(&mut tx, &id, *number, state, now).await?;
        }
        tx.commit().await?;
    }
    if !ended.is_empty() {
        super::orders::keep_listed(&deployment).await?;
    }
    deployment.reported.raise();
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /api/v1/agent/inventory`: the devices that are there now.
pub(super) async fn inventory(
    State(deployment): State<Arc<Deployment>>,
    Agent(id): Agent,
    Document(inventory): Document<Vec<InventoryDevice>>,
) -> Result<StatusCode> {
    enrol::check_inventory(&inventory)?;
    let mut tx = deployment.store.begin().await?;
    servers::set_inventory(&mut tx, &id, &inventory).await?;
    servers::grow_volumes(&mut tx, &id, &inventory).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What an agent has already.
#[derive(Debug, Deserialize)]
pub(super) struct Have {
    #[serde(default)]
    assignment: u64,
    #[serde(default)]
    order: u64,
    #[serde(default)]
    wait_seconds: u64,
}

/// `GET /api/v1/agent/poll`.
pub(super) async fn poll(
    State(deployment): State<Arc<Deployment>>,
    Agent(id): Agent,
    Params(have): Params<Have>,
) -> Result<Json<AgentPoll>> {
    let mut wait = Wait::new(&deployment.assigned, have.wait_seconds);
    loop {
        let poll = newer(&deployment, &id, &have).await?;
        let found = poll.assignment.is_some() || !poll.orders.is_empty();
        if found || !wait.again().await {
            return Ok(Json(poll));
        }
    }
}

async fn newer(deployment: &Deployment, id: &str, have: &Have) -> Result<AgentPoll> {
    let mut tx = deployment.store.begin().await?;
    let server = servers::by_id(&mut tx, id).await?.filter(|server| !server.revoked);
    let server = server.ok_or_else(|| Refused::forbidden("this server was revoked"))?;
    let assignment = match server.assignment_version.cast_unsigned() > have.assignment {
        true => Some(view::agent_assignment(&mut tx, &server).await?),
        false => None,
    };
    let open = orders::open_above(&mut tx, id, have.order).await?;
    let orders = open.iter().map(|row| Ok(row.order()?)).collect::<Result<_>>()?;
    Ok(AgentPoll { assignment, orders })
}

fn is_final(state: &OrderState) -> bool {
    matches!(state, OrderState::Done { .. } | OrderState::Failed { .. })
}

/// What a point is called must be an id; anything else is the agent's mistake.
fn checked(state: &OrderState) -> OrderState {
    match state {
        OrderState::Done { result: OrderResult::Cut { point, .. } } if !is_id(point) => {
            OrderState::Failed {
                exit_code: exit::DATA,
                message: "the agent answered a cut with something that is no point".to_owned(),
            }
        }
        state => state.clone(),
    }
}
