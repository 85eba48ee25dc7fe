//! One connection of one agent for one volume: a thread that drives a [`Conversation`] over a
//! stream, with its deadlines.
//!
//! Independent of TLS: generic over the stream, and told who the peer is. Half-duplex; the source
//! leads. Whatever goes wrong ends the session with a refusal and leaves the volume as it was. A
//! session that is told to end (replaced, no longer allowed, shutting down) is woken by shutting
//! its socket down for reading, so that it can still say why.

use super::conversation::{Conversation, Effect, End};
use super::site::Site;
use super::volume::refuse;
use crate::pulse;
use crate::wire::Connection;
use secondsite_format::frame::{FrameKind, RawHeader};
use secondsite_format::ids::ServerId;
use secondsite_format::manifest::PUBLIC_KEY_BYTES;
use secondsite_format::message::{Refusal, RefusalCode};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Handshake and hello must be through in this time.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(15);
/// A session on which nothing comes for so long is over; sources ping every 10 s.
pub const SILENCE_TIMEOUT: Duration = Duration::from_secs(60);
/// A frame whose header has come must be whole in this time, because it holds memory of the budget;
/// long enough for the largest frame over a line of 4 KiB a second.
pub const FRAME_TIMEOUT: Duration = Duration::from_secs(300);
/// An older session that has not left by itself in this time is cut off.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(500);
/// A newcomer waits no longer than this: the older one's thread is stuck in the storage.
const SEAT_TIMEOUT: Duration = Duration::from_secs(10);
/// After a refusal, what the peer still sends is taken in and thrown away for so long, because a
/// reset would take the refusal from it unread.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// The certificate's holder.
#[derive(Debug, Clone)]
pub struct Peer {
    /// The server whose agent it is.
    pub server: ServerId,
    /// The certificate's public key.
    pub key: [u8; PUBLIC_KEY_BYTES],
}

/// The socket below a stream, for other threads.
pub trait Line: Send + Sync {
    /// Ends one or both directions.
    fn shutdown(&self, how: Shutdown);
    /// How long a read may wait.
    fn set_read_timeout(&self, timeout: Duration);
}

impl Line for TcpStream {
    fn shutdown(&self, how: Shutdown) {
        // Fails only if the peer is gone already.
        let _ = TcpStream::shutdown(self, how);
    }
    fn set_read_timeout(&self, timeout: Duration) {
        let _ = TcpStream::set_read_timeout(self, Some(timeout));
    }
}

impl Line for UnixStream {
    fn shutdown(&self, how: Shutdown) {
        let _ = UnixStream::shutdown(self, how);
    }
    fn set_read_timeout(&self, timeout: Duration) {
        let _ = UnixStream::set_read_timeout(self, Some(timeout));
    }
}

/// A connection as other threads see it.
pub struct SessionHandle {
    line: Box<dyn Line>,
    begun: Instant,
    ended: Mutex<Option<Refusal>>,
    /// Milliseconds after `begun` at which the connection is cut; `u64::MAX`: never.
    deadline_millis: AtomicU64,
    greeted: std::sync::atomic::AtomicBool,
}

impl SessionHandle {
    /// A connection that has just been accepted.
    pub fn new(line: Box<dyn Line>) -> Arc<Self> {
        Arc::new(Self {
            line,
            begun: Instant::now(),
            ended: Mutex::new(None),
            deadline_millis: AtomicU64::new(HELLO_TIMEOUT.as_millis() as u64),
            greeted: false.into(),
        })
    }

    /// Tells the session to end, for this reason; it says so to its peer if it still can.
    pub fn end(&self, why: Refusal) {
        self.ended.lock().expect("nothing panics here").get_or_insert(why);
        self.line.shutdown(Shutdown::Read);
    }

    /// Cuts the connection.
    pub fn cut(&self) {
        self.line.shutdown(Shutdown::Both);
    }

    /// Cuts a connection whose deadline has passed.
    pub fn cut_if_late(&self) {
        // Relaxed: a deadline seen one tick late cuts one tick late.
        let deadline = self.deadline_millis.load(Ordering::Relaxed);
        if self.begun.elapsed().as_millis() as u64 >= deadline {
            self.cut();
        }
    }

    /// Whether a hello was accepted.
    pub fn greeted(&self) -> bool {
        self.greeted.load(Ordering::Relaxed)
    }

    fn due_in(&self, timeout: Option<Duration>) {
        let at = timeout.map_or(u64::MAX, |t| (self.begun.elapsed() + t).as_millis() as u64);
        self.deadline_millis.store(at, Ordering::Relaxed);
    }

    /// A hello was accepted.
    pub(super) fn set_greeted(&self) {
        self.greeted.store(true, Ordering::Relaxed);
    }

    /// Why it was told to end.
    pub fn ended(&self) -> Option<Refusal> {
        self.ended.lock().expect("nothing panics here").clone()
    }
}

/// Serves a connection to its end. `stream` is authenticated: `peer` is who it is.
pub fn serve<S: Read + Write>(
    site: &Arc<Site>,
    stream: S,
    handle: &Arc<SessionHandle>,
    peer: &Peer,
) {
    handle.line.set_read_timeout(SILENCE_TIMEOUT);
    let mut connection = Connection::new(stream);
    let (refusal, volume) = {
        let mut conversation = Conversation::new(site.clone(), handle.clone(), peer.clone());
        let ended = converse(site, &mut connection, handle, &mut conversation);
        (ended.err().and_then(|end| conversation.refusal(end)), conversation.volume())
    }; // here the volume's seat is free
    if let Some(refusal) = refusal {
        let volume = volume.map(tracing::field::display);
        tracing::warn!(server = %peer.server, volume, "session ended: {refusal}");
        site.refusals.count(refusal.code);
        pulse::outside(|| say_and_drain(connection, handle, &refusal));
    }
}

fn say_and_drain<S: Read + Write>(
    mut connection: Connection<S>,
    handle: &SessionHandle,
    refusal: &Refusal,
) {
    handle.due_in(Some(DRAIN_TIMEOUT));
    handle.line.set_read_timeout(DRAIN_TIMEOUT);
    // Best effort: the peer may be gone.
    if connection.send_message(refusal).and_then(|()| connection.flush()).is_err() {
        return;
    }
    handle.line.shutdown(Shutdown::Write);
    let mut stream = connection.into_stream();
    let mut scratch = [0; 8 << 10];
    let begun = Instant::now();
    while begun.elapsed() < DRAIN_TIMEOUT && stream.read(&mut scratch).is_ok_and(|n| n > 0) {}
}

fn converse<S: Read + Write>(
    site: &Site,
    connection: &mut Connection<S>,
    handle: &SessionHandle,
    conversation: &mut Conversation,
) -> Result<(), End> {
    loop {
        let admit = |raw: &RawHeader| {
            let bytes = conversation.admit(raw)?;
            if bytes == 0 {
                return Ok(None); // a hello: its deadline goes on
            }
            let grant = site.budget(bytes);
            handle.due_in(Some(FRAME_TIMEOUT));
            Ok(Some(grant))
        };
        let received = pulse::outside(|| connection.receive_admitted(admit));
        let received = received.map_err(|error| conversation.broken(error))?;
        let Some((frame, grant)) = received else { return conversation.closed() };
        if grant.is_some() {
            handle.due_in(None);
        }
        let mut effect = conversation.frame(&frame, grant)?;
        let begun = Instant::now();
        while matches!(effect, Effect::Wait) {
            if begun.elapsed() > SEAT_TIMEOUT {
                let message = "an older session of the volume still waits for the storage here";
                return Err(refuse(RefusalCode::Storage, message).into());
            }
            conversation.wait_seat(LEAVE_TIMEOUT);
            effect = conversation.seat()?;
        }
        if frame.header.kind == FrameKind::Hello {
            handle.due_in(None);
        }
        if let Effect::Answer(answer) = effect {
            let sent = pulse::outside(|| connection.send(&answer));
            sent.map_err(|error| conversation.broken(error))?;
        }
    }
}
