//! Talking to control, JSON over mutual TLS, or to the target of this host, over its unix socket:
//! one typed call a route.
//!
//! A connection is kept for the next call. A call that fails says what failed, with the exit code
//! for a command and what to type; nothing is tried twice unless it was provably never sent.

use crate::api::{
    AgentPoll, AgentReport, EnrolReply, EnrolRequest, InventoryDevice, OrderKind, OrderReply,
    OrderState, Points, Problem, ProtectReply, ProtectRequest, RenewRequest, Servers, Status,
    TargetPoll, TargetReport, TokenReply, TokenRequest,
};
use crate::client_error::ClientError;
use crate::pki::{CONTROL_DNS_NAME, is_name};
use crate::recovery::{CloseReply, CloseRequest, KeepRequest, OpenRequest, OpenedPoint, Opens};
use crate::routes::WAIT_SECONDS_MAX;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

type Sender = SendRequest<Full<Bytes>>;
type Result<T> = std::result::Result<T, ClientError>;

/// For name, TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For an answer, beyond what the call asks control to wait.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest answer, bytes: all points of a server.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// How the other side is reached.
enum Line {
    Tls(TlsConnector),
    Unix(PathBuf),
}

/// A client of control, or of a target. Several calls at once take several connections.
pub struct Client {
    address: String,
    line: Line,
    idle: Mutex<Option<Sender>>,
}

impl Client {
    /// For control at `HOST:PORT`, with the settings of an [`crate::pki::Identity`] or, before there is
    /// one, of [`crate::pki::client_config_pinned`]. Connects with the first call.
    pub fn new(address: &str, config: Arc<ClientConfig>) -> Self {
        let line = Line::Tls(TlsConnector::from(config));
        Self { address: address.to_owned(), line, idle: Mutex::new(None) }
    }

    /// For the target of this host, on its unix socket.
    pub fn local(socket: &Path) -> Self {
        let (address, line) = (socket.display().to_string(), Line::Unix(socket.to_owned()));
        Self { address, line, idle: Mutex::new(None) }
    }

    /// Opens a recovery point.
    pub async fn open(&self, server: &str, request: &OpenRequest) -> Result<OpenedPoint> {
        self.post(&of_server(server, "open")?, request).await
    }

    /// What is open.
    pub async fn opens(&self) -> Result<Opens> {
        self.get("/api/v1/opens", 0).await
    }

    /// Closes recovery points.
    pub async fn close(&self, server: &str, request: &CloseRequest) -> Result<CloseReply> {
        self.post(&of_server(server, "close")?, request).await
    }

    /// Keeps a recovery point beyond its time, or no longer.
    pub async fn keep(&self, server: &str, request: &KeepRequest) -> Result<()> {
        self.post(&of_server(server, "keep")?, request).await
    }

    /// Gets the first certificate.
    pub async fn enrol(&self, request: &EnrolRequest) -> Result<EnrolReply> {
        self.post("/enrol", request).await
    }

    /// Gets the next certificate, with the present one.
    pub async fn renew(&self, request: &RenewRequest) -> Result<EnrolReply> {
        self.post("/api/v1/renew", request).await
    }

    /// Agent: says what it does. After it, control knows the final state of all orders in it.
    pub async fn agent_report(&self, report: &AgentReport) -> Result<()> {
        self.post("/api/v1/agent/report", report).await
    }

    /// Agent: says which devices there are now.
    pub async fn agent_inventory(&self, inventory: &[InventoryDevice]) -> Result<()> {
        self.post("/api/v1/agent/inventory", inventory).await
    }

    /// Agent: asks for what is newer than what it has.
    pub async fn agent_poll(&self, assignment: u64, order: u64, wait: u64) -> Result<AgentPoll> {
        let path =
            format!("/api/v1/agent/poll?assignment={assignment}&order={order}&wait_seconds={wait}");
        self.get(&path, wait).await
    }

    /// Target: says what it has.
    pub async fn target_report(&self, report: &TargetReport) -> Result<()> {
        self.post("/api/v1/target/report", report).await
    }

    /// Target: asks for a newer assignment.
    pub async fn target_poll(&self, assignment: u64, wait: u64) -> Result<TargetPoll> {
        let path = format!("/api/v1/target/poll?assignment={assignment}&wait_seconds={wait}");
        self.get(&path, wait).await
    }

    /// Makes a token.
    pub async fn token(&self, request: &TokenRequest) -> Result<TokenReply> {
        self.post("/api/v1/tokens", request).await
    }

    /// Status of all servers.
    pub async fn status(&self) -> Result<Status> {
        self.get("/api/v1/status", 0).await
    }

    /// Status of one server.
    pub async fn server_status(&self, server: &str) -> Result<Status> {
        self.get(&of_server(server, "status")?, 0).await
    }

    /// All servers with their devices.
    pub async fn servers(&self) -> Result<Servers> {
        self.get("/api/v1/servers", 0).await
    }

    /// Recovery points of a server.
    pub async fn points(&self, server: &str) -> Result<Points> {
        self.get(&of_server(server, "points")?, 0).await
    }

    /// Protects volumes of a server.
    pub async fn protect(&self, server: &str, request: &ProtectRequest) -> Result<ProtectReply> {
        self.post(&of_server(server, "protect")?, request).await
    }

    /// Ends the replication of a server; replica and points stay.
    pub async fn unprotect(&self, server: &str) -> Result<()> {
        self.post(&of_server(server, "unprotect")?, &()).await
    }

    /// Revokes the certificates of a server.
    pub async fn revoke(&self, server: &str) -> Result<()> {
        self.post(&of_server(server, "revoke")?, &()).await
    }

    /// Orders something from a server's agent.
    pub async fn order(&self, server: &str, kind: OrderKind) -> Result<OrderReply> {
        self.post(&of_server(server, "orders")?, &kind).await
    }

    /// State of an order; waits up to `wait` seconds (60 at most) for it to be finished.
    pub async fn order_state(&self, server: &str, number: u64, wait: u64) -> Result<OrderState> {
        let path = of_server(server, &format!("orders/{number}?wait_seconds={wait}"))?;
        self.get(&path, wait).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str, wait: u64) -> Result<T> {
        let wait = Duration::from_secs(wait.min(WAIT_SECONDS_MAX));
        self.call(Method::GET, path, Bytes::new(), wait).await
    }

    async fn post<B: Serialize + ?Sized, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T> {
        let body = serde_json::to_vec(body).expect("what is sent can be written as JSON");
        self.call(Method::POST, path, body.into(), Duration::ZERO).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        wait: Duration,
    ) -> Result<T> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", CONTROL_DNS_NAME)
            .header("content-type", "application/json")
            .body(Full::new(body))
            .expect("the parts of a request are checked");
        let exchange = async {
            let (response, sender) = self.send(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
                .collect()
                .await
                .map_err(|error| self.unreachable(error))?;
            *self.idle.lock().expect("no holder panics") = Some(sender);
            Ok((status, body.to_bytes()))
        };
        let (status, body) = tokio::time::timeout(ANSWER_TIMEOUT + wait, exchange)
            .await
            .map_err(|_| self.unreachable("no answer in time"))??;
        self.answer(status, &body)
    }

    /// Over the kept connection if there is one; over a new one if that turns out to be closed.
    async fn send(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<(Response<hyper::body::Incoming>, Sender)> {
        let mut request = request;
        let kept = self.idle.lock().expect("no holder panics").take();
        if let Some(mut sender) = kept.filter(|sender| !sender.is_closed()) {
            match sender.try_send_request(request).await {
                Ok(response) => return Ok((response, sender)),
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(self.unreachable(error.into_error())),
                },
            }
        }
        let mut sender = self.connect().await?;
        let response =
            sender.send_request(request).await.map_err(|error| self.unreachable(error))?;
        Ok((response, sender))
    }

    async fn connect(&self) -> Result<Sender> {
        let connector = match &self.line {
            Line::Tls(connector) => connector,
            Line::Unix(path) => {
                let stream = tokio::net::UnixStream::connect(path).await;
                return self.shake_hands(stream.map_err(|error| self.unreachable(error))?).await;
            }
        };
        let connect = async {
            let stream = TcpStream::connect(&self.address).await?;
            stream.set_nodelay(true)?;
            let name = ServerName::try_from(CONTROL_DNS_NAME).expect("a DNS name");
            connector.connect(name, stream).await
        };
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, connect)
            .await
            .map_err(|_| self.unreachable("no connection in time"))?
            .map_err(|error| self.unreachable(error))?;
        self.shake_hands(stream).await
    }

    async fn shake_hands<S>(&self, stream: S) -> Result<Sender>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.unreachable(error))?;
        tokio::spawn(async move {
            // What goes wrong, the call that uses it learns.
            let _ = connection.await;
        });
        Ok(sender)
    }

    fn answer<T: DeserializeOwned>(&self, status: StatusCode, body: &[u8]) -> Result<T> {
        let malformed = |error| ClientError::malformed(&self.address, status, error);
        if status.is_success() {
            let body = if body.is_empty() { b"null" } else { body };
            return serde_json::from_slice(body).map_err(malformed);
        }
        let problem: Problem = serde_json::from_slice(body).map_err(malformed)?;
        Err(ClientError::Refused(problem))
    }

    fn unreachable(
        &self,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> ClientError {
        ClientError::connection(&self.address, cause.into())
    }
}

/// A [`Client`] for code that is not asynchronous.
pub struct BlockingClient {
    runtime: tokio::runtime::Runtime,
    client: Client,
}

impl BlockingClient {
    /// See [`Client::new`].
    pub fn new(address: &str, config: Arc<ClientConfig>) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { runtime, client: Client::new(address, config) })
    }

    /// See [`Client::local`].
    pub fn local(socket: &Path) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { runtime, client: Client::local(socket) })
    }

    /// Makes one call: `client.run(|c| c.status())`. Not from inside an asynchronous runtime.
    pub fn run<'a, F: Future>(&'a self, call: impl FnOnce(&'a Client) -> F) -> F::Output {
        self.runtime.block_on(call(&self.client))
    }
}

/// The path of something of a server; a name that cannot be one is not sent.
fn of_server(server: &str, what: &str) -> Result<String> {
    match is_name(server) {
        true => Ok(format!("/api/v1/servers/{server}/{what}")),
        false => Err(ClientError::Refused(Problem {
            exit_code: crate::problem::exit::USAGE,
            message: format!("{server:?} cannot be the name of a server"),
            hint: "secondsite status".to_owned(),
        })),
    }
}
