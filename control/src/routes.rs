//! The routes of `/api/v1`: each names the role it wants by its extractor.
//!
//! A route without one is for anybody: only the page and `/enrol`, which wants a token instead.
//! Handlers translate; what is decided stands in `plan` and `status`.

mod agent;
mod enrol;
mod extract;
mod operator;
mod orders;
mod page;
mod protect;
mod target;
mod view;

pub(crate) use extract::Peer;
pub(crate) use view::snapshot;

use crate::deployment::{Deployment, Signal};
use crate::problem::Refused;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::routing::{get, post};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Largest body of a request, bytes.
const BODY_BYTES_MAX: usize = 1 << 20;
/// A target lists all its points in one report.
const TARGET_REPORT_BYTES_MAX: usize = 16 << 20;
/// Longest wait of a long poll.
pub(crate) const WAIT_SECONDS_MAX: u64 = 60;
/// A waiting poll looks again this often, for what only time changes.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Everything that control answers.
pub(crate) fn router(deployment: Arc<Deployment>) -> Router {
    let target_report = post(target::report).layer(DefaultBodyLimit::max(TARGET_REPORT_BYTES_MAX));
    Router::new()
        .route("/", get(page::page))
        .route("/enrol", post(enrol::enrol))
        .route("/api/v1/renew", post(enrol::renew))
        .route("/api/v1/agent/report", post(agent::report))
        .route("/api/v1/agent/inventory", post(agent::inventory))
        .route("/api/v1/agent/poll", get(agent::poll))
        .route("/api/v1/target/poll", get(target::poll))
        .route("/api/v1/tokens", post(enrol::token))
        .route("/api/v1/status", get(operator::status))
        .route("/api/v1/servers", get(operator::servers))
        .route("/api/v1/servers/{name}/status", get(operator::server_status))
        .route("/api/v1/servers/{name}/points", get(operator::points))
        .route("/api/v1/servers/{name}/protect", post(protect::protect))
        .route("/api/v1/servers/{name}/unprotect", post(protect::unprotect))
        .route("/api/v1/servers/{name}/revoke", post(protect::revoke))
        .route("/api/v1/servers/{name}/orders", post(orders::make))
        .route("/api/v1/servers/{name}/orders/{number}", get(orders::state))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .route("/api/v1/target/report", target_report)
        .fallback(async || Refused::unknown("control has no such page"))
        .method_not_allowed_fallback(async || {
            let status = StatusCode::METHOD_NOT_ALLOWED;
            Refused::new(status, crate::problem::exit::USAGE, "not by this method")
        })
        .with_state(deployment)
}

/// The wait of a long poll: ask, then sleep until something changes, then ask again.
struct Wait {
    end: Instant,
    changes: watch::Receiver<u64>,
}

impl Wait {
    /// Begins before the first question, so that no change after it is missed.
    fn new(signal: &Signal, seconds: u64) -> Self {
        let end = Instant::now() + Duration::from_secs(seconds.min(WAIT_SECONDS_MAX));
        Self { end, changes: signal.watch() }
    }

    /// Sleeps until it is worth asking again; false if the wait is over.
    async fn again(&mut self) -> bool {
        let now = Instant::now();
        if now >= self.end {
            return false;
        }
        let look_again = self.end.min(now + LOOK_AGAIN);
        tokio::select! {
            changed = self.changes.changed() => changed.is_ok(),
            () = tokio::time::sleep_until(look_again) => true,
        }
    }
}
