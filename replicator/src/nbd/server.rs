//! The server: listens, knows the exports, leads each client through its handshake.
//!
//! One thread a listener, and one a client ([`connection`](super::connection)). Connections are
//! bounded; a handshake has a deadline. [`Server::stop`] ends all of it and removes its sockets.

use super::connection::{Connection, STACK_BYTES};
use super::negotiation::{
    Chosen, Exports, Negotiation, Next, OPTION_BYTES_MAX, OPTION_HEADER_BYTES,
};
use super::stream::{Socket, Stream};
use super::{CONNECTIONS_MAX, Device, NAME_BYTES_MAX, NEGOTIATION_SECONDS_MAX};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{Mode, fchmod};
use rustls::ServerConfig;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use tracing::{debug, warn};

/// [`Server::stop`] waits no longer for threads that a device holds.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Clients that wait to be accepted.
const BACKLOG: i32 = 64;
/// After a failed accept, such as for want of descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Why a server does not listen, or does not serve a device.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket cannot be made.
    #[error("listening on {at}: {cause}")]
    Listen {
        /// Path or address.
        at: String,
        /// The system's reason.
        cause: io::Error,
    },
    /// Another server answers on the path, or something lies there that is no socket.
    #[error("{0} is in use")]
    InUse(PathBuf),
    /// Another device has the name.
    #[error("an export named {0} is already served")]
    Name(String),
    /// The name is longer than [`NAME_BYTES_MAX`], or empty.
    #[error("an export's name has 1 to {NAME_BYTES_MAX} bytes")]
    NameLength,
    /// The server has stopped.
    #[error("the server has stopped")]
    Stopped,
}

/// Serves devices until it is stopped or dropped.
pub struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    tls: Option<Arc<ServerConfig>>,
    state: Mutex<State>,
    /// A thread has ended.
    ended: Condvar,
    stopping: AtomicBool,
    /// Becomes readable when the server stops.
    wake: EventFd,
}

#[derive(Default)]
struct State {
    exports: BTreeMap<String, Arc<dyn Device>>,
    default: Option<String>,
    connections: HashMap<u64, Link>,
    sockets: Vec<PathBuf>,
    threads: usize,
    next: u64,
}

/// A connection, as the server sees it.
struct Link {
    stream: Arc<Stream>,
    export: Option<String>,
}

impl Server {
    /// A server without exports that does not listen yet. With `tls`, clients get nothing without it.
    pub fn new(tls: Option<Arc<ServerConfig>>) -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self {
            shared: Arc::new(Shared {
                tls,
                state: Mutex::default(),
                ended: Condvar::new(),
                stopping: AtomicBool::new(false),
                wake,
            }),
        })
    }

    /// Serves `device` under a name; the first one is also the default.
    pub fn add(&self, name: &str, device: Arc<dyn Device>) -> Result<(), ServerError> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(ServerError::NameLength);
        }
        let mut state = self.shared.lock();
        if self.shared.stopping.load(Ordering::Acquire) {
            return Err(ServerError::Stopped);
        }
        if state.exports.contains_key(name) {
            return Err(ServerError::Name(name.into()));
        }
        state.default.get_or_insert_with(|| name.into());
        state.exports.insert(name.into(), device);
        Ok(())
    }

    /// Serves it no longer; its connections end. Returns whether it was there. No thread
    /// uses the device any more once [`Self::connections`] of the name are 0.
    pub fn remove(&self, name: &str) -> bool {
        let mut state = self.shared.lock();
        let was = state.exports.remove(name).is_some();
        if state.default.as_deref() == Some(name) {
            state.default = None;
        }
        let its = |link: &&Link| link.export.as_deref() == Some(name);
        state.connections.values().filter(its).for_each(|link| link.stream.shut_down());
        was
    }

    /// Connections that use an export now.
    pub fn connections(&self, name: &str) -> usize {
        let state = self.shared.lock();
        state.connections.values().filter(|link| link.export.as_deref() == Some(name)).count()
    }

    /// Listens on a unix socket that only this user can open. One that nobody answers is replaced.
    pub fn listen_unix(&self, path: &Path) -> Result<(), ServerError> {
        let failed = |cause| ServerError::Listen { at: path.display().to_string(), cause };
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() || UnixStream::connect(path).is_ok() => {
                return Err(ServerError::InUse(path.into()));
            }
            Ok(_) => std::fs::remove_file(path).map_err(failed)?,
            Err(_) => {}
        }
        let listener = private_listener(path).map_err(failed)?;
        let mut state = self.shared.lock();
        if self.shared.stopping.load(Ordering::Acquire) {
            let _ = std::fs::remove_file(path);
            return Err(ServerError::Stopped);
        }
        // From here on a stop removes it.
        state.sockets.push(path.into());
        drop(state);
        let accept = |listener: &UnixListener| listener.accept().map(|(one, _)| Socket::Unix(one));
        self.listen(listener, accept).map_err(failed)
    }

    /// Listens on an address; returns the one that it got.
    pub fn listen_tcp(&self, address: SocketAddr) -> Result<SocketAddr, ServerError> {
        let failed = |cause| ServerError::Listen { at: address.to_string(), cause };
        let listener = TcpListener::bind(address).map_err(failed)?;
        let own = listener.local_addr().map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let accept = |listener: &TcpListener| listener.accept().map(|(one, _)| Socket::Tcp(one));
        self.listen(listener, accept).map_err(failed)?;
        Ok(own)
    }

    fn listen<L: AsFd + Send + 'static>(
        &self,
        listener: L,
        accept: fn(&L) -> io::Result<Socket>,
    ) -> io::Result<()> {
        self.shared.spawn("nbd-listener", move |shared| {
            while !shared.stopping.load(Ordering::Acquire) {
                let mut fds = [listener.as_fd(), shared.wake.as_fd()]
                    .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
                // Interrupted: one more round.
                let _ = poll(&mut fds, PollTimeout::NONE);
                match accept(&listener) {
                    Ok(socket) => shared.admit(socket),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    // Such as a client that has gone already, or no descriptor for now.
                    Err(error) => {
                        debug!(%error, "accepting an NBD client");
                        thread::sleep(ACCEPT_AGAIN);
                    }
                }
            }
        })
    }

    /// Ends all connections and listeners, and removes the sockets. Requests that a device still
    /// works on after some seconds are left to it; `false`: there are such.
    pub fn stop(&self) -> bool {
        let shared = &self.shared;
        shared.stopping.store(true, Ordering::Release);
        // Only ever full, which is as good.
        let _ = shared.wake.write(1);
        let mut state = shared.lock();
        for path in state.sockets.drain(..) {
            let _ = std::fs::remove_file(path);
        }
        state.exports.clear();
        state.connections.values().for_each(|link| link.stream.shut_down());
        let running = |state: &mut State| state.threads > 0;
        let (state, _) = shared
            .ended
            .wait_timeout_while(state, STOP_TIMEOUT, running)
            .unwrap_or_else(PoisonError::into_inner);
        state.threads == 0
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.stop() {
            warn!("an NBD device does not return; its requests are left to it");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread that [`Server::stop`] waits for.
    fn spawn(
        self: &Arc<Self>,
        name: &str,
        body: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> io::Result<()> {
        let counted = Counted::new(self.clone());
        let builder = thread::Builder::new().name(name.into()).stack_size(STACK_BYTES);
        builder.spawn(move || body(&counted.0)).map(drop)
    }

    /// Takes a client in, or closes its socket.
    fn admit(self: &Arc<Self>, socket: Socket) {
        let stream = Arc::new(Stream::new(socket));
        let mut state = self.lock();
        if state.connections.len() >= CONNECTIONS_MAX || self.stopping.load(Ordering::Acquire) {
            return;
        }
        let id = state.next;
        state.next += 1;
        state.connections.insert(id, Link { stream: stream.clone(), export: None });
        drop(state);
        let seat = Seat { shared: self.clone(), id };
        let spawned = self.spawn("nbd-client", move |shared| {
            let result = shared.serve(&seat, &stream);
            stream.close();
            if let Err(error) = result {
                debug!(%error, "an NBD client has gone");
            }
        });
        if let Err(error) = spawned {
            warn!(%error, "no thread for an NBD client");
        }
    }

    fn serve(&self, seat: &Seat, stream: &Arc<Stream>) -> io::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(NEGOTIATION_SECONDS_MAX);
        stream.set_deadline(Some(deadline))?;
        let Some(chosen) = self.negotiate(stream)? else { return Ok(()) };
        let Chosen { name, device, terms } = chosen;
        stream.set_deadline(None)?;
        let mut state = self.lock();
        // It may have been removed, or the server stopped, in between.
        match (state.exports.get(&name), self.stopping.load(Ordering::Acquire)) {
            (Some(now), false) if Arc::ptr_eq(now, &device) => {}
            _ => return Ok(()),
        }
        if let Some(link) = state.connections.get_mut(&seat.id) {
            link.export = Some(name);
        }
        drop(state);
        Connection::serve(stream.clone(), device, terms)
    }

    fn negotiate(&self, stream: &Stream) -> io::Result<Option<Chosen>> {
        let mut negotiation = Negotiation::new(self.tls.is_some());
        stream.send(&Negotiation::greeting())?;
        let mut flags = [0; 4];
        stream.read_exact(&mut flags)?;
        negotiation.client_flags(flags)?;
        let mut out = Vec::new();
        loop {
            let mut header = [0; OPTION_HEADER_BYTES];
            stream.read_exact(&mut header)?;
            let (option, bytes) = Negotiation::header(&header)?;
            out.clear();
            let next = if bytes > OPTION_BYTES_MAX {
                let mut left = bytes as usize;
                let mut part = [0; 4096];
                while left > 0 {
                    let take = left.min(part.len());
                    stream.read_exact(&mut part[..take])?;
                    left -= take;
                }
                negotiation.too_long(option, &mut out)
            } else {
                let mut data = vec![0; bytes as usize];
                stream.read_exact(&mut data)?;
                negotiation.option(option, &data, self, &mut out)
            };
            stream.send(&out)?;
            match (next, &self.tls) {
                (Next::StartTls, Some(config)) => {
                    stream.upgrade(config.clone())?;
                    negotiation.secured();
                }
                (Next::Option | Next::StartTls, _) => {}
                (Next::Transmit(chosen), _) => return Ok(Some(chosen)),
                (Next::End, _) => return Ok(None),
            }
        }
    }
}

impl Exports for Shared {
    fn names(&self) -> Vec<String> {
        self.lock().exports.keys().cloned().collect()
    }

    fn find(&self, name: &str) -> Option<(String, Arc<dyn Device>)> {
        let state = self.lock();
        let name = if name.is_empty() { state.default.as_deref()? } else { name };
        state.exports.get(name).map(|device| (name.to_owned(), device.clone()))
    }
}

/// A connection's place in the list; free when dropped.
struct Seat {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.lock().connections.remove(&self.id);
    }
}

/// Counts a thread from before it starts until it has ended, however it does.
struct Counted(Arc<Shared>);

impl Counted {
    fn new(shared: Arc<Shared>) -> Self {
        shared.lock().threads += 1;
        Self(shared)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.lock().threads -= 1;
        self.0.ended.notify_all();
    }
}

/// A listening socket with mode 0600 from its first moment: Linux takes it from the descriptor.
fn private_listener(path: &Path) -> io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    socket::bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&fd, Backlog::new(BACKLOG)?)?;
    Ok(fd.into())
}
