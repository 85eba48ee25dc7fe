//! A connection's bytes: a unix or TCP socket, in the clear or, once upgraded, within TLS.
//!
//! One thread reads, any thread sends; [`Stream::send`] keeps what each sends in one piece. With
//! TLS the session is locked only while bytes pass through it, never while a socket waits, so a
//! client that takes nothing does not keep its own requests from being read.

use nix::sys::socket::{setsockopt, sockopt};
use rustls::{ServerConfig, ServerConnection};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Ciphertext read in one go.
const CIPHERTEXT_BYTES: usize = 32 << 10;
/// Plaintext that is encrypted in one go.
const PLAINTEXT_BYTES: usize = 128 << 10;
/// Sent bytes that a TCP peer does not acknowledge in this time end the connection. A peer that is
/// there and takes nothing is waited for.
const UNACKNOWLEDGED_MILLIS_MAX: u32 = 60_000;
/// What the kernel may hold for one direction: fewer switches between client and server.
const SOCKET_BYTES: usize = 1 << 20;

/// The socket itself.
pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// Settings that make it fast, and notice when the peer is gone. Failure costs no more than that.
    pub fn tune(&self) {
        match self {
            Self::Tcp(socket) => {
                let _ = socket.set_nodelay(true);
                let _ = setsockopt(socket, sockopt::KeepAlive, &true);
                let _ = setsockopt(socket, sockopt::TcpUserTimeout, &UNACKNOWLEDGED_MILLIS_MAX);
            }
            Self::Unix(socket) => {
                let _ = setsockopt(socket, sockopt::SndBuf, &SOCKET_BYTES);
            }
        }
    }

    fn shut_down(&self) {
        // Not connected any more: all the better.
        let _ = match self {
            Self::Tcp(socket) => socket.shutdown(Shutdown::Both),
            Self::Unix(socket) => socket.shutdown(Shutdown::Both),
        };
    }

    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => {
                socket.set_read_timeout(timeout)?;
                socket.set_write_timeout(timeout)
            }
            Self::Unix(socket) => {
                socket.set_read_timeout(timeout)?;
                socket.set_write_timeout(timeout)
            }
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(socket) => (&*socket).read(buffer),
            Socket::Unix(socket) => (&*socket).read(buffer),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(socket) => (&*socket).write(buffer),
            Socket::Unix(socket) => (&*socket).write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket, and the TLS session over it once there is one.
pub struct Stream {
    socket: Socket,
    tls: OnceLock<Tls>,
    /// Held while something is sent; with TLS its ciphertext.
    sending: Mutex<Vec<u8>>,
    /// Until then the client must be through with its handshake.
    deadline: Mutex<Option<Instant>>,
}

struct Tls {
    session: Mutex<ServerConnection>,
    received: Mutex<Received>,
}

/// Ciphertext that the session has not taken yet.
struct Received {
    bytes: Box<[u8]>,
    begin: usize,
    end: usize,
}

impl Stream {
    /// In the clear.
    pub fn new(socket: Socket) -> Self {
        socket.tune();
        Self { socket, tls: OnceLock::new(), sending: Mutex::default(), deadline: Mutex::default() }
    }

    /// From now on within TLS; the handshake is done when this returns.
    pub fn upgrade(&self, config: Arc<ServerConfig>) -> io::Result<()> {
        let mut session = ServerConnection::new(config).map_err(io::Error::other)?;
        session.set_buffer_limit(None);
        let mut socket = Timely(self);
        while session.is_handshaking() {
            session.complete_io(&mut socket)?;
        }
        // Tickets, which go out with the last flight.
        while session.wants_write() {
            session.write_tls(&mut socket)?;
        }
        let bytes = vec![0; CIPHERTEXT_BYTES].into();
        let received = Mutex::new(Received { bytes, begin: 0, end: 0 });
        let tls = Tls { session: Mutex::new(session), received };
        self.tls.set(tls).map_err(|_| io::Error::other("TLS is there already"))
    }

    /// Reading and sending fail after this instant; `None`: they wait.
    pub fn set_deadline(&self, deadline: Option<Instant>) -> io::Result<()> {
        *lock(&self.deadline) = deadline;
        self.arm(deadline)
    }

    fn arm(&self, deadline: Option<Instant>) -> io::Result<()> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        match left {
            Some(Duration::ZERO) => Err(ErrorKind::TimedOut.into()),
            left => self.socket.set_timeout(left),
        }
    }

    /// Some bytes; 0 at the end.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = self.tls.get() else {
            return again(|| (&self.socket).read(buffer));
        };
        let mut received = lock(&tls.received);
        let Received { bytes, begin, end } = &mut *received;
        loop {
            let mut session = lock(&tls.session);
            match session.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                other => return other,
            }
            if begin < end {
                let mut rest = &bytes[*begin..*end];
                session.read_tls(&mut rest)?;
                *begin = *end - rest.len();
                session.process_new_packets().map_err(io::Error::other)?;
                continue;
            }
            drop(session);
            (*begin, *end) = (0, again(|| (&self.socket).read(bytes))?);
            if *end == 0 {
                return Ok(0);
            }
        }
    }

    /// Exactly as many; for the handshake, whose deadline each read keeps.
    pub fn read_exact(&self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            let deadline = *lock(&self.deadline);
            self.arm(deadline)?;
            match self.read(buffer)? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                count => buffer = &mut buffer[count..],
            }
        }
        Ok(())
    }

    /// Sends all of it, in one piece.
    pub fn send(&self, content: &[u8]) -> io::Result<()> {
        let mut ciphertext = lock(&self.sending);
        let Some(tls) = self.tls.get() else {
            return (&self.socket).write_all(content);
        };
        for part in content.chunks(PLAINTEXT_BYTES) {
            ciphertext.clear();
            let mut session = lock(&tls.session);
            session.writer().write_all(part)?;
            while session.wants_write() {
                session.write_tls(&mut *ciphertext)?;
            }
            drop(session);
            (&self.socket).write_all(&ciphertext)?;
        }
        Ok(())
    }

    /// Ends it for both sides and all threads: what waits for it returns.
    pub fn shut_down(&self) {
        self.socket.shut_down();
    }

    /// The same, after a last word where TLS wants one.
    pub fn close(&self) {
        if let Some(tls) = self.tls.get() {
            let mut last = Vec::new();
            let mut session = lock(&tls.session);
            session.send_close_notify();
            let _ = session.write_tls(&mut last);
            drop(session);
            let _ = (&self.socket).write_all(&last);
        }
        self.shut_down();
    }
}

/// The bare socket, each access within the stream's deadline.
struct Timely<'a>(&'a Stream);

impl Read for Timely<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.arm(*lock(&self.0.deadline))?;
        (&self.0.socket).read(buffer)
    }
}

impl Write for Timely<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.arm(*lock(&self.0.deadline))?;
        (&self.0.socket).write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn again(mut read: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match read() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// A thread that panicked ends its connection; there is nothing half done in these.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
