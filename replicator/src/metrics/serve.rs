//! Serves metrics over HTTP: `GET /metrics` on a unix socket, and on a loopback port if asked for.
//!
//! Bounds: one connection at a time, a request of at most 8 KiB, 5 s in all. A scraper that is slow
//! keeps only other scrapers waiting.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Longest request that is read, bytes.
const REQUEST_BYTES_MAX: usize = 8 << 10;
/// A request must have come, and its answer be taken, in this time each.
const PATIENCE: Duration = Duration::from_secs(5);
/// After a failed accept, before the next.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Owner and group may ask.
const SOCKET_MODE: u32 = 0o660;
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where metrics are served.
#[derive(Debug, Clone)]
pub struct Sockets {
    /// The unix socket.
    pub unix: PathBuf,
    /// A loopback address besides.
    pub tcp: Option<SocketAddr>,
}

/// Makes the text of one answer; an error is for people.
pub type Render = dyn Fn() -> Result<String, String> + Send + Sync;

/// Starts to serve. What cannot be served is said and left out: a scrape that fails is no reason
/// to stop replicating.
pub fn serve(
    sockets: &Sockets,
    render: impl Fn() -> Result<String, String> + Send + Sync + 'static,
) {
    let render: Arc<Render> = Arc::new(render);
    let path = &sockets.unix;
    let unix = bind(path).and_then(|listener| {
        let accept = move || listener.accept().map(|(stream, _)| stream);
        start(accept, UnixStream::set_read_timeout, UnixStream::set_write_timeout, &render)
    });
    if let Err(error) = unix {
        tracing::warn!("no metrics on {}: {error}", path.display());
    }
    let Some(address) = sockets.tcp else { return };
    let tcp = TcpListener::bind(address).and_then(|listener| {
        let accept = move || listener.accept().map(|(stream, _)| stream);
        start(accept, TcpStream::set_read_timeout, TcpStream::set_write_timeout, &render)
    });
    if let Err(error) = tcp {
        tracing::warn!("no metrics on {address}: {error}");
    }
}

/// Only one daemon of a role runs in a folder (its lock says so): a socket that is there is one
/// that an earlier process left.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE))?;
    Ok(listener)
}

type SetTimeout<S> = fn(&S, Option<Duration>) -> io::Result<()>;

fn start<S: Read + Write + 'static>(
    accept: impl Fn() -> io::Result<S> + Send + 'static,
    set_read: SetTimeout<S>,
    set_write: SetTimeout<S>,
    render: &Arc<Render>,
) -> io::Result<()> {
    let render = render.clone();
    let body = move || {
        loop {
            let answered = accept().inspect_err(|_| thread::sleep(ACCEPT_PAUSE));
            let answered = answered.and_then(|mut stream| {
                set_write(&stream, Some(PATIENCE))?;
                let request = head(&mut stream, set_read)?;
                stream.write_all(&answer(&request, &*render))
            });
            if let Err(error) = answered {
                tracing::debug!("metrics: {error}");
            }
        }
    };
    thread::Builder::new().name("metrics".into()).spawn(body).map(drop)
}

/// The first line of a request, when all of its head has come.
fn head<S: Read>(stream: &mut S, set_read: SetTimeout<S>) -> io::Result<String> {
    let end = Instant::now() + PATIENCE;
    let mut bytes = Vec::new();
    let mut part = [0; 1024];
    while !bytes.windows(4).any(|four| four == b"\r\n\r\n") {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || bytes.len() >= REQUEST_BYTES_MAX {
            return Err(ErrorKind::InvalidData.into());
        }
        set_read(stream, Some(left))?;
        match stream.read(&mut part)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => bytes.extend_from_slice(&part[..count]),
        }
    }
    let line = bytes.split(|byte| *byte == b'\r').next().unwrap_or_default();
    Ok(String::from_utf8_lossy(line).into_owned())
}

fn answer(request: &str, render: &Render) -> Vec<u8> {
    let mut words = request.split(' ');
    let path = |target: &str| target.split('?').next() == Some("/metrics");
    let (status, kind, body) = match (words.next(), words.next()) {
        (Some("GET"), Some(target)) if path(target) => match render() {
            Ok(text) => ("200 OK", CONTENT_TYPE, text),
            Err(error) => ("503 Service Unavailable", "text/plain", format!("{error}\n")),
        },
        (Some("GET"), _) => ("404 Not Found", "text/plain", "there is only /metrics\n".into()),
        _ => ("405 Method Not Allowed", "text/plain", "there is only GET\n".into()),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    [head.into_bytes(), body.into_bytes()].concat()
}
