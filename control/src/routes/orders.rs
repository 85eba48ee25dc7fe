//! Orders from the command line to agents, and what came of them.
//!
//! A cut counts as done when the agent says so *and* a target has listed the point: only then does
//! `points` show it, or one after it. Between the two the order is held as running, for a bounded
//! time.

use super::extract::{Document, Operator, Params};
use super::{Wait, view};
use crate::api::{OrderKind, OrderReply, OrderResult, OrderState};
use crate::certificate::Role;
use crate::deployment::Deployment;
use crate::problem::{Refused, Result, exit};
use crate::status::seconds_since;
use crate::store::orders::OrderRow;
use crate::store::servers::VolumeState;
use crate::store::{audit, orders, servers};
use axum::Json;
use axum::extract::{Path, State};
use jiff::Timestamp;
use serde::Deserialize;
use std::sync::Arc;

/// Orders that a server may have waiting.
const OPEN_ORDERS_MAX: usize = 64;
/// So long after the agent's word a point may be missing from the target's list.
const LISTED_WITHIN_SECONDS: f64 = 30.0;
/// A target's report that comes so long after the agent's word was made after the commit.
const REPORT_TRAVEL_SECONDS: f64 = 2.0;

/// `POST /api/v1/servers/NAME/orders`. Recorded, also while the agent is away.
pub(super) async fn make(
    State(deployment): State<Arc<Deployment>>,
    Operator(operator): Operator,
    Path(name): Path<String>,
    Document(kind): Document<OrderKind>,
) -> Result<Json<OrderReply>> {
    let now = deployment.now();
    let mut tx = deployment.store.begin().await?;
    let server = view::server(&mut tx, &name).await?;
    let volumes = servers::volumes(&mut tx, &server.id).await?;
    if server.revoked || !volumes.iter().any(|volume| volume.state == VolumeState::Protected) {
        let message = format!("{name} has no protected volume");
        return Err(Refused::conflict(exit::CONFIGURATION, message)
            .hint(format!("secondsite protect {name} --volumes all")));
    }
    if orders::open_above(&mut tx, &server.id, 0).await?.len() >= OPEN_ORDERS_MAX {
        let message = format!("{OPEN_ORDERS_MAX} orders to {name} are waiting already");
        return Err(
            Refused::conflict(exit::LATER, message).hint(format!("secondsite status {name}"))
        );
    }
    let number = orders::insert(&mut tx, &server.id, kind, now).await?;
    let who = Role::Operator(operator).to_string();
    audit(&mut tx, now, &who, &format!("ordered {name}: {kind:?} (order {number})")).await?;
    tx.commit().await?;
    deployment.assigned.raise();
    Ok(Json(OrderReply { number }))
}

/// How long to wait for an order to be finished.
#[derive(Debug, Deserialize)]
pub(super) struct Patience {
    #[serde(default)]
    wait_seconds: u64,
}

/// `GET /api/v1/servers/NAME/orders/NUMBER`.
pub(super) async fn state(
    State(deployment): State<Arc<Deployment>>,
    Operator(_): Operator,
    Path((name, number)): Path<(String, String)>,
    Params(patience): Params<Patience>,
) -> Result<Json<OrderState>> {
    let number: u64 =
        number.parse().map_err(|_| Refused::usage("the number of an order is a number"))?;
    let mut wait = Wait::new(&deployment.reported, patience.wait_seconds);
    loop {
        let state = now_state(&deployment, &name, number).await?;
        let open = matches!(state, OrderState::Waiting | OrderState::Running { .. });
        if !open || !wait.again().await {
            return Ok(Json(state));
        }
    }
}

/// Keeps in mind which finished cuts a target has listed by now.
pub(super) async fn keep_listed(deployment: &Deployment) -> Result<()> {
    let mut tx = deployment.store.begin().await?;
    for row in orders::unlisted(&mut tx).await? {
        let listed = match point(&row)? {
            Some(point) => deployment.reports().listed(&row.server, &point),
            None => true,
        };
        if listed {
            orders::set_listed(&mut tx, &row.server, row.number).await?;
        }
    }
    Ok(tx.commit().await?)
}

/// The point of a finished cut.
fn point(row: &OrderRow) -> Result<Option<String>> {
    Ok(match row.ended()? {
        Some((OrderState::Done { result: OrderResult::Cut { point, .. } }, _)) => Some(point),
        _ => None,
    })
}

/// Whether the target has listed points of this server well after the agent said that its cut is
/// committed, at `ended`. A committed point leaves the list only for a later one, so that list
/// holds the cut's own point or one after it; a kill of either daemon may have come between the
/// two, and the report that had the point itself was then never made or never kept.
fn superseded(deployment: &Deployment, server: &str, ended: Timestamp) -> bool {
    deployment.reports().targets.values().any(|heard| {
        seconds_since(ended, heard.at) > REPORT_TRAVEL_SECONDS
            && heard.report.points.iter().any(|point| point.server == server)
    })
}

async fn now_state(deployment: &Deployment, name: &str, number: u64) -> Result<OrderState> {
    let mut tx = deployment.store.begin().await?;
    let server = view::server(&mut tx, name).await?;
    let row = orders::get(&mut tx, &server.id, number).await?;
    let row = row.ok_or_else(|| Refused::unknown(format!("{name} has no order {number}")))?;
    let Some((ended, at)) = row.ended()? else {
        let reports = deployment.reports();
        let reported = reports.agents.get(&server.id);
        let running = reported.and_then(|heard| heard.report.orders.get(&number));
        return Ok(match running {
            Some(state @ OrderState::Running { .. }) => state.clone(),
            _ => OrderState::Waiting,
        });
    };
    let Some(point) = point(&row)?.filter(|_| !row.listed) else { return Ok(ended) };
    if superseded(deployment, &server.id, at) {
        return Ok(ended);
    }
    if seconds_since(at, deployment.now()) < LISTED_WITHIN_SECONDS {
        let note = format!("point {point} is committed; the target is about to list it");
        return Ok(OrderState::Running { percent: 100, note });
    }
    Ok(OrderState::Failed {
        exit_code: exit::LATER,
        message: format!(
            "the agent of {name} says that point {point} is committed, but the target has not \
             listed it. Type: secondsite points {name}"
        ),
    })
}
