//! The target's front: listens, shakes hands over TLS, and gives each connection a thread.
//!
//! Thread model: one blocking thread with a small stack per connection (docs/decisions/0001).
//! Invariants: connections, and those that have not said hello, are bounded; a handshake, a hello
//! and a frame have a deadline, which the listener's round enforces; nothing is believed of a peer
//! before TLS has checked its certificate.

use super::session::{self, HELLO_TIMEOUT, Peer, SessionHandle};
use super::site::Site;
use super::volume::refuse;
use crate::pulse;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use secondsite_control::pki::{self, Role};
use secondsite_format::message::RefusalCode;
use std::collections::HashMap;
use std::io::{self, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::thread;
use std::time::{Duration, Instant};

/// Most connections at once: a thousand agents with several volumes each.
pub const CONNECTIONS_MAX: usize = 8192;
/// Most connections that have not said hello; more are closed, and come again by their backoff.
pub const UNGREETED_MAX: usize = 512;
/// Stack of a session's thread.
pub const SESSION_STACK_BYTES: usize = 256 << 10;
/// Bytes read from a socket in one go; rustls alone would ask for 4 KiB.
const READ_BYTES: usize = 32 << 10;
/// A write that the peer does not take in this time ends the connection.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Sent bytes that are not acknowledged in this time end the connection.
const UNACKNOWLEDGED_MILLIS_MAX: u32 = 60_000;
/// The listener goes round at least so often.
const ROUND_MILLIS: u16 = 200;
/// What did not work for want of space or of a device is tried again so often.
const AGAIN_INTERVAL: Duration = Duration::from_secs(5);
/// Stopping waits no longer for sessions and workers.
const STOP_TIMEOUT: Duration = Duration::from_millis(800);

type Connections = HashMap<u64, Arc<SessionHandle>>;

/// The listener's state, shared with its threads.
pub struct Server {
    site: Arc<Site>,
    tls: RwLock<Arc<ServerConfig>>,
    connections: Mutex<Connections>,
    threads: Mutex<usize>,
    thread_ended: Condvar,
    handshake_failures: AtomicU64,
}

impl Server {
    /// Serves `site` with these TLS settings.
    pub fn new(site: Arc<Site>, tls: Arc<ServerConfig>) -> Arc<Self> {
        Arc::new(Self {
            site,
            tls: RwLock::new(tls),
            connections: Mutex::default(),
            threads: Mutex::default(),
            thread_ended: Condvar::new(),
            handshake_failures: AtomicU64::new(0),
        })
    }

    /// Settings for new connections.
    pub fn set_tls(&self, tls: Arc<ServerConfig>) {
        *self.tls.write().expect("nothing panics while it holds the settings") = tls;
    }

    /// Connections that showed no certificate of an agent of this deployment.
    pub fn handshake_failures(&self) -> u64 {
        self.handshake_failures.load(Ordering::Relaxed)
    }

    /// Starts a thread that [`Self::stop`] waits for.
    pub fn spawn(
        self: &Arc<Self>,
        name: &str,
        stack_bytes: Option<usize>,
        body: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> io::Result<()> {
        let mut builder = thread::Builder::new().name(name.into());
        if let Some(bytes) = stack_bytes {
            builder = builder.stack_size(bytes);
        }
        let counted = Counted::new(self.clone());
        builder.spawn(move || body(&counted.0)).map(drop)
    }

    /// Accepts connections until the site stops: the body of the listener's thread.
    pub fn listen(self: &Arc<Self>, listener: &TcpListener) {
        let _joined = pulse::join("the listener");
        let mut tried = Instant::now();
        let mut next = 0;
        while !self.site.stopping() {
            let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            // An interrupted or failed poll only makes this round a short one.
            let _ = poll(&mut fds, PollTimeout::from(ROUND_MILLIS));
            pulse::beat_again_in(Duration::from_millis(u64::from(ROUND_MILLIS)));
            for handle in self.lock_connections().values() {
                handle.cut_if_late();
            }
            if tried.elapsed() > AGAIN_INTERVAL {
                tried = Instant::now();
                self.site.try_again();
            }
            loop {
                match listener.accept() {
                    Ok((socket, _)) => {
                        next += 1;
                        self.admit(next, socket);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => {
                        // Out of descriptors, or a connection that ended in the queue.
                        tracing::warn!("accepting a connection: {error}");
                        thread::sleep(Duration::from_millis(u64::from(ROUND_MILLIS)));
                        break;
                    }
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, number: u64, socket: TcpStream) {
        let ready = prepare(&socket).and_then(|()| socket.try_clone());
        let handle = match ready {
            Ok(line) => SessionHandle::new(Box::new(line)),
            Err(error) => return tracing::warn!("a new connection: {error}"),
        };
        {
            let mut connections = self.lock_connections();
            let ungreeted = connections.values().filter(|handle| !handle.greeted()).count();
            if connections.len() >= CONNECTIONS_MAX || ungreeted >= UNGREETED_MAX {
                return tracing::warn!("too many connections: one was closed at once");
            }
            connections.insert(number, handle.clone());
        }
        let spawned = self.spawn("session", Some(SESSION_STACK_BYTES), move |server| {
            let _listed = Listed { server, number };
            server.serve(socket, &handle);
        });
        if let Err(error) = spawned {
            self.lock_connections().remove(&number);
            tracing::warn!("a thread for a new connection: {error}");
        }
    }

    fn serve(&self, socket: TcpStream, handle: &Arc<SessionHandle>) {
        let address = socket.peer_addr();
        let _joined = pulse::join("a session");
        match pulse::outside(|| self.handshake(socket)) {
            Ok((stream, peer)) => session::serve(&self.site, stream, handle, &peer),
            Err(error) => {
                self.handshake_failures.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(peer = ?address, "handshake failed: {error:#}");
            }
        }
    }

    fn handshake(&self, socket: TcpStream) -> anyhow::Result<(impl Read + Write + use<>, Peer)> {
        let tls = self.tls.read().expect("nothing panics while it holds the settings").clone();
        let mut connection = ServerConnection::new(tls)?;
        let mut socket = Buffered(BufReader::with_capacity(READ_BYTES, socket));
        while connection.is_handshaking() {
            connection.complete_io(&mut socket)?;
        }
        let certificates = connection.peer_certificates().unwrap_or_default();
        let (role, key) = pki::peer(certificates)?;
        let Role::Agent(id) = role else {
            anyhow::bail!("only agents speak to the data port, not {role:?}")
        };
        let server = id.parse().map_err(|error| anyhow::anyhow!("server id {id}: {error}"))?;
        Ok((StreamOwned::new(connection, socket), Peer { server, key }))
    }

    /// Ends the site, all connections and threads, within a second.
    pub fn stop(&self) {
        self.site.stop();
        for handle in self.lock_connections().values() {
            handle.end(refuse(RefusalCode::Stopping, "the target is shutting down"));
        }
        let wait = |timeout| {
            let threads = self.threads.lock().expect("nothing panics while it counts");
            let _ = self
                .thread_ended
                .wait_timeout_while(threads, timeout, |threads| *threads > 0)
                .expect("nothing panics while it counts");
        };
        wait(STOP_TIMEOUT / 2);
        for handle in self.lock_connections().values() {
            handle.cut();
        }
        wait(STOP_TIMEOUT / 2);
    }

    fn lock_connections(&self) -> std::sync::MutexGuard<'_, Connections> {
        self.connections.lock().expect("nothing panics while it holds the connections")
    }
}

fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(HELLO_TIMEOUT))?;
    socket.set_write_timeout(Some(WRITE_TIMEOUT))?;
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpUserTimeout, &UNACKNOWLEDGED_MILLIS_MAX)?;
    Ok(())
}

/// Reads through a buffer, writes straight through: TLS has a buffer of its own for that.
struct Buffered(BufReader<TcpStream>);

impl Read for Buffered {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Buffered {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.get_mut().write(bytes)
    }

    fn write_vectored(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.0.get_mut().write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.get_mut().flush()
    }
}

/// A thread that is counted as long as it lives, also if it panics.
struct Counted(Arc<Server>);

impl Counted {
    fn new(server: Arc<Server>) -> Self {
        *server.threads.lock().expect("nothing panics while it counts") += 1;
        Self(server)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        *self.0.threads.lock().expect("nothing panics while it counts") -= 1;
        self.0.thread_ended.notify_all();
    }
}

/// A connection that is listed as long as its thread lives.
struct Listed<'a> {
    server: &'a Server,
    number: u64,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.server.lock_connections().remove(&self.number);
        self.server.site.changed();
    }
}
