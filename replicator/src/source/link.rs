//! A session over TCP and TLS 1.3: connecting, greeting, timeouts.
//!
//! Blocking, half-duplex, owned by one shipper. [`Hangup`] ends it from another thread.

use crate::pulse;
use crate::source::seams::{Dial, Link, LinkError};
use crate::source::volume::lock;
use crate::wire::{Connection, WireError};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};
use secondsite_control::pki::{self, Identity, Role};
use secondsite_format::FormatError;
use secondsite_format::frame::{Frame, FrameKind};
use secondsite_format::message::{Hello, Message, Reply, Welcome};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The name that a target's certificate carries, whatever its address.
const TARGET_NAME: &str = "target.secondsite.internal";
/// How long one address may take to answer.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// How long an answer may take: the longest is a commit with its fsync.
const REPLY_LIMIT: Duration = Duration::from_secs(60);
/// How long a handshake that only asks may stand still.
const REACH_LIMIT: Duration = Duration::from_secs(5);
/// How long a send may stand still.
const SEND_LIMIT: Duration = Duration::from_secs(30);
/// How long the last message of a session may take to be handed to the kernel.
const GOODBYE_LIMIT: Duration = Duration::from_millis(100);
/// How long sent bytes may stay unacknowledged, milliseconds.
const USER_TIMEOUT_MS: u32 = 30_000;
/// When the kernel asks whether a silent peer lives, and how often, seconds.
const KEEPALIVE_SECONDS: u32 = 20;
const KEEPALIVE_EVERY_SECONDS: u32 = 5;

type Tls = StreamOwned<ClientConnection, TcpStream>;

/// Ends a session from outside; what was ended once stays ended.
#[derive(Default)]
pub struct Hangup {
    state: Mutex<(bool, Option<TcpStream>)>,
}

impl Hangup {
    /// Ends the session and refuses every later one.
    pub fn end(&self) {
        let mut state = lock(&self.state);
        state.0 = true;
        if let Some(stream) = &state.1 {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Ends the session that there is; the next one goes where the new address says.
    pub fn redial(&self) {
        if let Some(stream) = &lock(&self.state).1 {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn hold(&self, stream: &TcpStream) -> std::io::Result<()> {
        let mut state = lock(&self.state);
        if state.0 {
            return Err(std::io::Error::from(std::io::ErrorKind::Interrupted));
        }
        state.1 = Some(stream.try_clone()?);
        Ok(())
    }
}

/// What dialling needs and what may change while the daemon runs.
#[derive(Default)]
pub struct Where {
    /// The target, `HOST:PORT`.
    pub target: Option<String>,
    /// Our key and certificate.
    pub identity: Option<Arc<Identity>>,
}

/// Dials the target.
pub struct TlsDial {
    place: Arc<Mutex<Where>>,
    hangup: Arc<Hangup>,
}

impl TlsDial {
    /// Dials what `place` says at that time.
    pub fn new(place: Arc<Mutex<Where>>, hangup: Arc<Hangup>) -> Self {
        Self { place, hangup }
    }
}

impl Dial for TlsDial {
    fn dial(&mut self, hello: &Hello) -> Result<(Box<dyn Link>, Welcome), LinkError> {
        pulse::outside(|| self.greet(hello))
    }
}

impl TlsDial {
    fn greet(&self, hello: &Hello) -> Result<(Box<dyn Link>, Welcome), LinkError> {
        let (target, identity) = {
            let place = lock(&self.place);
            (place.target.clone(), place.identity.clone())
        };
        let target = target.ok_or_else(|| {
            LinkError::Lost("control has named no target yet: has one been set up?".into())
        })?;
        let identity = identity.ok_or_else(|| LinkError::Lost("no certificate".into()))?;
        let named = |error: &dyn std::fmt::Display| LinkError::Lost(format!("{target}: {error}"));
        let stream = connect(&target).map_err(|error| named(&error))?;
        self.hangup.hold(&stream).map_err(|error| named(&error))?;
        let tls = handshake(stream, &identity).map_err(|error| named(&error))?;
        let mut link = TlsLink { connection: Connection::new(tls) };
        link.connection.send_message(hello)?;
        let welcome: Welcome =
            link.connection.receive_message("welcome").map_err(|error| match error {
                WireError::Format(FormatError::Protocol { found, known }) => {
                    LinkError::Lost(format!(
                        "{target} speaks protocol {found}, this agent {known}: upgrade the older \
                         side"
                    ))
                }
                error => error.into(),
            })?;
        Ok((Box::new(link), welcome))
    }
}

fn connect(target: &str) -> std::io::Result<TcpStream> {
    let mut last = std::io::Error::other("the name has no address");
    for address in target.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT_LIMIT) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(REPLY_LIMIT))?;
                stream.set_write_timeout(Some(SEND_LIMIT))?;
                setsockopt(&stream, sockopt::TcpUserTimeout, &USER_TIMEOUT_MS)?;
                setsockopt(&stream, sockopt::KeepAlive, &true)?;
                setsockopt(&stream, sockopt::TcpKeepIdle, &KEEPALIVE_SECONDS)?;
                setsockopt(&stream, sockopt::TcpKeepInterval, &KEEPALIVE_EVERY_SECONDS)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn handshake(mut stream: TcpStream, identity: &Identity) -> anyhow::Result<Tls> {
    let name = ServerName::try_from(TARGET_NAME)?;
    let mut tls = ClientConnection::new(identity.client_config()?, name)?;
    while tls.is_handshaking() {
        tls.complete_io(&mut stream)?;
    }
    let certificates = tls.peer_certificates().unwrap_or_default();
    match pki::peer(certificates)?.0 {
        Role::Target(_) => Ok(StreamOwned::new(tls, stream)),
        other => anyhow::bail!("the peer is no target, its certificate says {other:?}"),
    }
}

/// Connects to a target as an agent would and says nothing: whether it is there and believes us.
pub fn reach(target: &str, identity: &Identity) -> Result<(), String> {
    let stream = connect(target).map_err(|error| error.to_string())?;
    let tls = stream
        .set_read_timeout(Some(REACH_LIMIT))
        .map_err(anyhow::Error::from)
        .and_then(|()| handshake(stream, identity));
    tls.map(drop).map_err(|error| format!("{error:#}"))
}

struct TlsLink {
    connection: Connection<Tls>,
}

impl Link for TlsLink {
    fn send(&mut self, frame: &Frame) -> Result<(), LinkError> {
        pulse::outside(|| self.connection.send(frame).map_err(|error| self.explain(error)))
    }

    fn ask(&mut self, frame: &Frame) -> Result<Reply, LinkError> {
        pulse::outside(|| self.converse(frame))
    }
}

impl TlsLink {
    fn converse(&mut self, frame: &Frame) -> Result<Reply, LinkError> {
        self.connection.send(frame).map_err(|error| self.explain(error))?;
        match self.connection.receive()? {
            Some(frame) if frame.header.kind == FrameKind::Reply => {
                Reply::from_frame(&frame).map_err(|error| LinkError::Lost(error.to_string()))
            }
            Some(_) => Err(LinkError::Nonsense("an answer was due")),
            None => Err(LinkError::Lost("the target closed the connection".into())),
        }
    }

    /// A target that refuses closes while we still send: what it said last may be there to read.
    fn explain(&mut self, error: WireError) -> LinkError {
        if matches!(error, WireError::Io(_)) {
            let _ = self.connection.stream().sock.set_read_timeout(Some(Duration::from_secs(1)));
            if let Err(WireError::Refused(refusal)) = self.connection.receive() {
                return LinkError::Refused(refusal);
            }
        }
        error.into()
    }
}

impl Drop for TlsLink {
    /// Says goodbye, so that the target can tell an end from a broken line; nobody waits for it.
    fn drop(&mut self) {
        let stream = self.connection.stream_mut();
        let _ = stream.sock.set_write_timeout(Some(GOODBYE_LIMIT));
        stream.conn.send_close_notify();
        let _ = stream.conn.write_tls(&mut stream.sock);
    }
}

impl From<WireError> for LinkError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Refused(refusal) => Self::Refused(refusal),
            other => Self::Lost(other.to_string()),
        }
    }
}
