//! What a target answers on its own host, also with control dead: its recovery points, opened and
//! closed. JSON over a unix socket that only root can open, the same routes and words as control's.

use crate::api::{Points, Problem};
use crate::problem::exit;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path;
use std::sync::Arc;

/// `POST /api/v1/servers/NAME/open`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenRequest {
    /// The newest exact point of this time (RFC 3339) or before; none: the newest exact one.
    #[serde(default)]
    pub at: Option<String>,
    /// This point, by id or name.
    #[serde(default)]
    pub point: Option<String>,
    /// Only this volume.
    #[serde(default)]
    pub volume: Option<String>,
}

/// An opened point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenedPoint {
    /// Name of the server.
    pub server: String,
    /// The point's id.
    pub point: String,
    /// Time of the cut, RFC 3339 UTC.
    pub time: String,
    /// `application`, `crash` or `fuzzy`.
    pub consistency: String,
    /// A row a volume.
    pub volumes: Vec<OpenedVolume>,
}

/// A volume of an opened point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenedVolume {
    /// The volume's name.
    pub name: String,
    /// Where an NBD client finds it.
    pub uri: String,
    /// The point's id.
    pub point: String,
    /// Its size, bytes.
    pub size_bytes: u64,
    /// Bytes written to it since it was opened, in the scratch area.
    pub scratch_bytes: u64,
    /// Clients that use it now.
    pub clients: usize,
}

/// `GET /api/v1/opens`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opens {
    /// [`crate::api::SCHEMA_VERSION`].
    pub schema_version: u32,
    /// All points that are open, by server, then time.
    pub points: Vec<OpenedPoint>,
}

/// `POST /api/v1/servers/NAME/close`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloseRequest {
    /// This point; none: all of the server.
    #[serde(default)]
    pub point: Option<String>,
}

/// What was closed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloseReply {
    /// Ids of the points.
    pub closed: Vec<String>,
}

/// `POST /api/v1/servers/NAME/keep`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepRequest {
    /// The point, by id or name.
    pub point: String,
    /// What to call it; none: it keeps its name, or has none.
    #[serde(default)]
    pub name: Option<String>,
    /// It is no longer kept beyond its time.
    #[serde(default)]
    pub release: bool,
}

/// What a target can do with its recovery points. Errors are for people.
pub trait Recovery: Send + Sync + 'static {
    /// The points of a server, oldest first.
    fn points(&self, server: &str) -> Result<Points, Problem>;
    /// Serves a point.
    fn open(&self, server: &str, request: &OpenRequest) -> Result<OpenedPoint, Problem>;
    /// What is served.
    fn opens(&self) -> Opens;
    /// Serves a point no longer; what was written to it is gone.
    fn close(&self, server: &str, request: &CloseRequest) -> Result<CloseReply, Problem>;
    /// Keeps a point beyond its time.
    fn keep(&self, server: &str, request: &KeepRequest) -> Result<(), Problem>;
}

struct Answer(Problem);

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let status = match self.0.exit_code {
            exit::USAGE => StatusCode::BAD_REQUEST,
            exit::UNAVAILABLE => StatusCode::NOT_FOUND,
            _ => StatusCode::CONFLICT,
        };
        (status, Json(self.0)).into_response()
    }
}

type Target = State<Arc<dyn Recovery>>;

/// Runs what may wait for a disk.
async fn blocking<T: Serialize + Send + 'static>(
    target: Arc<dyn Recovery>,
    call: impl FnOnce(&dyn Recovery) -> Result<T, Problem> + Send + 'static,
) -> Response {
    let done = tokio::task::spawn_blocking(move || call(&*target)).await;
    match done {
        Ok(Ok(answer)) => Json(answer).into_response(),
        Ok(Err(problem)) => Answer(problem).into_response(),
        Err(_) => Answer(Problem {
            exit_code: exit::FAILED,
            message: "an invariant of the target broke; see its log".into(),
            hint: String::new(),
        })
        .into_response(),
    }
}

async fn points(State(target): Target, Path(name): Path<String>) -> Response {
    blocking(target, move |target| target.points(&name)).await
}

async fn open(
    State(target): Target,
    Path(name): Path<String>,
    Json(request): Json<OpenRequest>,
) -> Response {
    blocking(target, move |target| target.open(&name, &request)).await
}

async fn opens(State(target): Target) -> Response {
    blocking(target, |target| Ok(target.opens())).await
}

async fn close(
    State(target): Target,
    Path(name): Path<String>,
    Json(request): Json<CloseRequest>,
) -> Response {
    blocking(target, move |target| target.close(&name, &request)).await
}

async fn keep(
    State(target): Target,
    Path(name): Path<String>,
    Json(request): Json<KeepRequest>,
) -> Response {
    blocking(target, move |target| target.keep(&name, &request)).await
}

/// Answers on a unix socket, from a thread of its own, until the process ends. A socket that is
/// there is one that an earlier process left: the caller holds the target's lock.
pub fn serve(path: &path::Path, target: Arc<dyn Recovery>) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = {
        let _inside = runtime.enter();
        tokio::net::UnixListener::bind(path)?
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let router = Router::new()
        .route("/api/v1/servers/{name}/points", get(points))
        .route("/api/v1/servers/{name}/open", post(open))
        .route("/api/v1/servers/{name}/close", post(close))
        .route("/api/v1/servers/{name}/keep", post(keep))
        .route("/api/v1/opens", get(opens))
        .with_state(target);
    std::thread::Builder::new().name("api".into()).spawn(move || {
        if let Err(error) = runtime.block_on(async { axum::serve(listener, router).await }) {
            tracing::error!("the target's API: {error}");
        }
    })?;
    Ok(())
}
