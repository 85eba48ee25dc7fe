//! One connection of one agent for one volume: hello, welcome, then frames until it ends.
//!
//! Independent of TLS: generic over the stream, and told who the peer is. Half-duplex; the source
//! leads. Whatever goes wrong ends the session with a refusal and leaves the volume as it was. A
//! session that is told to end (replaced, no longer allowed, shutting down) is woken by shutting
//! its socket down for reading, so that it can still say why.

use super::site::Site;
use super::view::READING_BYTES_MAX;
use super::volume::refuse;
use crate::pulse;
use crate::wire::{Connection, WireError};
use secondsite_format::FormatError;
use secondsite_format::frame::{Frame, FrameKind, RawHeader};
use secondsite_format::ids::{ServerId, VolumeId};
use secondsite_format::limits::FRAME_PAYLOAD_BYTES_MAX;
use secondsite_format::manifest::PUBLIC_KEY_BYTES;
use secondsite_format::message::{Hello, Message, Refusal, RefusalCode, Reply, Request};
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

    fn ended(&self) -> Option<Refusal> {
        self.ended.lock().expect("nothing panics here").clone()
    }
}

/// Why a session ends before its peer closes it.
enum End {
    Refuse(Refusal),
    Wire(WireError),
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> Self {
        Self::Refuse(refusal)
    }
}

impl From<WireError> for End {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

/// Serves a connection to its end. `stream` is authenticated: `peer` is who it is.
pub fn serve<S: Read + Write>(site: &Site, stream: S, handle: &Arc<SessionHandle>, peer: &Peer) {
    handle.line.set_read_timeout(SILENCE_TIMEOUT);
    let mut connection = Connection::new(stream);
    let mut volume = None;
    let Err(end) = converse(site, &mut connection, handle, peer, &mut volume) else { return };
    let (server, volume) = (peer.server, volume.map(tracing::field::display));
    let refusal = match (handle.ended(), end) {
        (Some(told), _) => told,
        (None, End::Refuse(refusal)) => refusal,
        (None, End::Wire(WireError::Format(error))) => unread(&error),
        (None, End::Wire(error @ WireError::Unexpected { .. })) => {
            refuse(RefusalCode::Malformed, error.to_string())
        }
        (None, End::Wire(error @ (WireError::Io(_) | WireError::Refused(_)))) => {
            tracing::info!(%server, volume, "session ended: {error}");
            return;
        }
    };
    tracing::warn!(%server, volume, "session ended: {refusal}");
    site.refusals.count(refusal.code);
    pulse::outside(|| say_and_drain(connection, handle, &refusal));
}

/// What a peer is told whose bytes could not be read.
fn unread(error: &FormatError) -> Refusal {
    match error {
        FormatError::Protocol { found, known } => refuse(
            RefusalCode::Protocol,
            format!(
                "the source speaks protocol {found}, this target {known}: upgrade the older side"
            ),
        ),
        FormatError::Newer { what, found, known } => refuse(
            RefusalCode::Protocol,
            format!(
                "the source sends {what} version {found}, this target reads up to {known}: \
                 upgrade the target"
            ),
        ),
        _ => refuse(RefusalCode::Malformed, error.to_string()),
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
    handle: &Arc<SessionHandle>,
    peer: &Peer,
    volume: &mut Option<VolumeId>,
) -> Result<(), End> {
    let first = pulse::outside(|| {
        connection.receive_admitted(|raw| match raw.kind() {
            FrameKind::Hello => Ok(()),
            found => Err(WireError::Unexpected { found, expected: "hello" }),
        })
    })?;
    let Some((frame, ())) = first else { return Ok(()) };
    let hello = Hello::from_frame(&frame).map_err(WireError::from)?;
    *volume = Some(hello.volume);
    let entry = site.greet(&hello, peer)?;
    let told = |end: &End| {
        let ended = handle.ended();
        let message = match (&ended, end) {
            (Some(refusal), _) if refusal.code == RefusalCode::Replaced => return,
            (Some(refusal), _) | (None, End::Refuse(refusal)) => refusal.message.clone(),
            (None, End::Wire(WireError::Io(_) | WireError::Refused(_))) => return,
            (None, End::Wire(WireError::Format(error))) => unread(error).message,
            (None, End::Wire(error)) => error.to_string(),
        };
        entry.note_refused(Some(message));
        site.changed();
    };
    let mut conversation = || -> Result<(), End> {
        let seat = site.seat(&entry, handle, &hello, peer)?;
        seat.keeper.name_bytes(hello.volume_bytes)?;
        let welcome = seat.keeper.welcome()?;
        handle.greeted.store(true, Ordering::Relaxed);
        handle.due_in(None);
        entry.note_refused(None);
        site.changed();
        pulse::outside(|| connection.send_message(&welcome))?;
        let mut copying = false;
        loop {
            let admit = |raw: &RawHeader| {
                // Until the frame is done with: its body, and what it unpacks to.
                let unpacked = match raw.kind() {
                    FrameKind::Data | FrameKind::SyncData => FRAME_PAYLOAD_BYTES_MAX,
                    _ => 0,
                };
                let grant = site.budget.take((raw.body_bytes() + unpacked) as u64);
                handle.due_in(Some(FRAME_TIMEOUT));
                Ok(grant)
            };
            let received = pulse::outside(|| connection.receive_admitted(admit))?;
            handle.due_in(None);
            let Some((frame, grant)) = received else {
                // Either the peer closed, or this session was told to end.
                return handle.ended().map_or(Ok(()), |told| Err(told.into()));
            };
            entry.counts.received_bytes.fetch_add(frame.total_bytes(), Ordering::Relaxed);
            match frame.header.kind {
                FrameKind::Data => seat.keeper.data(&frame)?,
                FrameKind::SyncData if copying => seat.keeper.copy_data(&frame)?,
                FrameKind::SyncData => {
                    let message = "first copy data before the first copy was begun";
                    return Err(refuse(RefusalCode::OutOfOrder, message).into());
                }
                FrameKind::Commit => {
                    let reply = seat.keeper.commit(&frame, &peer.key)?;
                    pulse::outside(|| connection.send_message(&reply))?;
                    entry.counts.commits.fetch_add(1, Ordering::Relaxed);
                    site.committed(hello.server);
                }
                FrameKind::Request => {
                    // Digests ask for memory of their own; who waits must hold none.
                    drop(grant);
                    let reply = answer(site, &seat.keeper, &frame, &mut copying)?;
                    pulse::outside(|| connection.send_message(&reply))?;
                }
                found => {
                    let expected = "data, a commit or a request";
                    return Err(WireError::Unexpected { found, expected }.into());
                }
            }
        }
    };
    conversation().inspect_err(told)
}

fn answer(
    site: &Site,
    keeper: &super::keeper::Keeper,
    frame: &Frame,
    copying: &mut bool,
) -> Result<Reply, End> {
    Ok(match Request::from_frame(frame).map_err(WireError::from)? {
        Request::Ping => Reply::Alive,
        Request::Barrier => keeper.staged(),
        Request::GiveUp { cut_id } => keeper.give_up(cut_id)?,
        Request::CopyBegin { sync } => {
            let reply = keeper.copy_begin(sync)?;
            *copying = true;
            reply
        }
        Request::CopyFlush { upto } => keeper.copy_flush(upto)?,
        Request::CopyDone { sync } => {
            let reply = keeper.copy_done(sync)?;
            *copying = false;
            site.changed();
            reply
        }
        Request::Digests { offset, bytes, piece_bytes } => {
            let _grant = site.budget.take(READING_BYTES_MAX as u64);
            keeper.digests(offset, bytes, piece_bytes)?
        }
    })
}
