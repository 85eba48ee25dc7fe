//! The one port: accepts, shakes hands, and hands each connection with its certificate to the
//! routes.
//!
//! Bounds: connections in all, connections of strangers, time for a handshake, time for a request's
//! head. A stranger can exhaust only the strangers' share.

use crate::observed::{Observed, ROUND};
use crate::pki;
use crate::routes::Peer;
use axum::Router;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tower::ServiceExt;

/// Connections that showed a certificate of this deployment.
const KNOWN_CONNECTIONS_MAX: usize = 8192;
/// Connections that have not, or not yet.
const STRANGE_CONNECTIONS_MAX: usize = 512;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// For the head of a request, and for the next one on an idle connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
const HEADERS_MAX: usize = 64;
const BUFFER_BYTES_MAX: usize = 64 << 10;
/// After a failed accept (no file descriptor left), before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Settings of new connections; replaced when control renews its certificate.
pub(crate) type TlsSettings = watch::Receiver<Arc<rustls::ServerConfig>>;

/// Serves until `shutdown`; then ends every connection.
pub(crate) async fn serve(
    listener: TcpListener,
    settings: TlsSettings,
    router: Router,
    observed: Arc<Observed>,
    shutdown: impl Future<Output = ()>,
) {
    let strangers = Arc::new(Semaphore::new(STRANGE_CONNECTIONS_MAX));
    let known = Arc::new(Semaphore::new(KNOWN_CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    tokio::pin!(shutdown);
    let mut rounds = tokio::time::interval(ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        observed.round();
        let accept = async {
            let permit = strangers.clone().acquire_owned().await.expect("never closed");
            (listener.accept().await, permit)
        };
        let (accepted, permit) = tokio::select! {
            () = &mut shutdown => return,
            _ = rounds.tick() => continue,
            accepted = accept => accepted,
        };
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((stream, address)) => {
                let acceptor = TlsAcceptor::from(settings.borrow().clone());
                let known = known.clone();
                let answer = Answer { router: router.clone(), observed: observed.clone() };
                connections.spawn(async move {
                    if let Err(error) = connection(stream, acceptor, answer, permit, known).await {
                        log(address, &error);
                    }
                });
            }
            Err(error) => {
                tracing::warn!("accept: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Answers requests, and counts the answers.
#[derive(Clone)]
struct Answer {
    router: Router,
    observed: Arc<Observed>,
}

async fn connection(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    answer: Answer,
    mut permit: OwnedSemaphorePermit,
    known: Arc<Semaphore>,
) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await??;
    let peer = peer(&stream)?;
    if peer.0.is_some() {
        permit = known.try_acquire_owned()?;
    }
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        let Answer { router, observed } = answer.clone();
        async move {
            let response = router.oneshot(request).await?;
            observed.answered(response.status().as_u16());
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_headers(HEADERS_MAX)
        .max_buf_size(BUFFER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .await?;
    drop(permit);
    Ok(())
}

/// TLS has checked the chain; what stands in the certificate must be readable too.
fn peer(stream: &TlsStream<TcpStream>) -> anyhow::Result<Peer> {
    let chain = stream.get_ref().1.peer_certificates();
    Ok(Peer(chain.map(pki::peer_info).transpose()?.map(Arc::new)))
}

/// Foreign and expired certificates show up here.
fn log(address: SocketAddr, error: &anyhow::Error) {
    tracing::debug!("connection from {address}: {error:#}");
}
