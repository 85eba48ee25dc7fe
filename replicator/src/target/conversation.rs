//! What a session says and hears, without its stream: frames in, answers out.
//!
//! A state machine: it never waits and reads no clock; the daemon's thread ([`super::session`])
//! and the simulator drive the same one. It leads from a hello over the wait for the volume's seat
//! to frames that are received one after the other; whatever goes wrong is an [`End`], after which
//! it is to be dropped, which gives up the seat.

use super::budget::Grant;
use super::entry::{Entry, Seat, Ticket};
use super::session::{Peer, SessionHandle};
use super::site::Site;
use super::view::READING_BYTES_MAX;
use super::volume::refuse;
use crate::wire::WireError;
use secondsite_format::FormatError;
use secondsite_format::frame::{Frame, FrameKind, RawHeader};
use secondsite_format::ids::VolumeId;
use secondsite_format::limits::FRAME_PAYLOAD_BYTES_MAX;
use secondsite_format::message::{Hello, Message, Refusal, RefusalCode, Reply, Request};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Why a session ends before its peer closes it.
#[derive(Debug)]
pub enum End {
    /// It is to be told.
    Refuse(Refusal),
    /// The connection is of no more use.
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

/// What comes of a frame.
#[derive(Debug)]
pub enum Effect {
    /// The next frame may come.
    Next,
    /// This goes to the peer, then the next frame may come.
    Answer(Frame),
    /// An older session was told to leave: ask [`Conversation::seat`] again when it has.
    Wait,
}

enum State {
    Silent,
    Waiting { entry: Arc<Entry>, hello: Hello, ticket: Ticket },
    Seated { entry: Arc<Entry>, seat: Seat, hello: Hello, copying: bool },
}

/// See the module.
pub struct Conversation {
    site: Arc<Site>,
    handle: Arc<SessionHandle>,
    peer: Peer,
    state: State,
}

impl Conversation {
    /// Begins one with a peer whose certificate was checked.
    pub fn new(site: Arc<Site>, handle: Arc<SessionHandle>, peer: Peer) -> Self {
        Self { site, handle, peer, state: State::Silent }
    }

    /// Memory that a frame takes until it is done with: its body, and what it unpacks to. Before
    /// the hello only a hello is let in.
    pub fn admit(&self, raw: &RawHeader) -> Result<u64, WireError> {
        let unpacked = match (&self.state, raw.kind()) {
            (State::Silent, FrameKind::Hello) => return Ok(0),
            (State::Silent, found) => {
                return Err(WireError::Unexpected { found, expected: "hello" });
            }
            (_, FrameKind::Data | FrameKind::SyncData) => FRAME_PAYLOAD_BYTES_MAX,
            _ => 0,
        };
        Ok((raw.body_bytes() + unpacked) as u64)
    }

    /// Takes a frame; `grant` is the memory that it was admitted with.
    pub fn frame(&mut self, frame: &Frame, grant: Option<Grant<'_>>) -> Result<Effect, End> {
        let result = match self.state {
            State::Silent => self.hello(frame),
            State::Waiting { .. } => {
                let (found, expected) = (frame.header.kind, "nothing before the welcome");
                Err(WireError::Unexpected { found, expected }.into())
            }
            State::Seated { .. } => self.receive(frame, grant),
        };
        result.inspect_err(|end| self.note(end))
    }

    fn hello(&mut self, frame: &Frame) -> Result<Effect, End> {
        let hello = Hello::from_frame(frame).map_err(WireError::from)?;
        let entry = self.site.greet(&hello, &self.peer)?;
        let ticket = entry.ask_seat().inspect_err(|refusal| {
            entry.note_refused(Some(refusal.message.clone()));
            self.site.changed();
        })?;
        self.state = State::Waiting { entry, hello, ticket };
        self.take_seat()
    }

    /// The seat, if the older session has left by now.
    pub fn seat(&mut self) -> Result<Effect, End> {
        self.take_seat().inspect_err(|end| self.note(end))
    }

    fn take_seat(&mut self) -> Result<Effect, End> {
        let State::Waiting { entry, hello, ticket } = &self.state else { return Ok(Effect::Next) };
        let Some(seat) = entry.seat(*ticket, &self.handle, hello)? else {
            return Ok(Effect::Wait);
        };
        self.site.still_allowed(hello, &self.peer)?;
        seat.keeper.name_bytes(hello.volume_bytes)?;
        let welcome = seat.keeper.welcome()?;
        entry.note_refused(None);
        let (entry, hello) = (entry.clone(), hello.clone());
        self.state = State::Seated { entry, seat, hello, copying: false };
        self.handle.set_greeted();
        self.site.changed();
        Ok(Effect::Answer(welcome.to_frame()))
    }

    /// Waits for the older session to leave, at most so long: for threads.
    pub fn wait_seat(&self, limit: Duration) {
        if let State::Waiting { entry, ticket, .. } = &self.state {
            entry.wait_seat(*ticket, limit);
        }
    }

    fn receive(&mut self, frame: &Frame, grant: Option<Grant<'_>>) -> Result<Effect, End> {
        let State::Seated { entry, seat, hello, copying } = &mut self.state else {
            return Ok(Effect::Next);
        };
        let counts = &entry.counts;
        counts.received_bytes.fetch_add(frame.total_bytes(), Ordering::Relaxed);
        let keeper = &seat.keeper;
        let reply = match frame.header.kind {
            FrameKind::Data => {
                keeper.data(frame)?;
                return Ok(Effect::Next);
            }
            FrameKind::SyncData if *copying => {
                keeper.copy_data(frame)?;
                return Ok(Effect::Next);
            }
            FrameKind::SyncData => {
                let message = "first copy data before the first copy was begun";
                return Err(refuse(RefusalCode::OutOfOrder, message).into());
            }
            FrameKind::Commit => {
                let reply = keeper.commit(frame, &self.peer.key)?;
                counts.commits.fetch_add(1, Ordering::Relaxed);
                self.site.committed(hello.server);
                reply
            }
            FrameKind::Request => {
                // Digests ask for memory of their own; who waits must hold none.
                drop(grant);
                match Request::from_frame(frame).map_err(WireError::from)? {
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
                        self.site.changed();
                        reply
                    }
                    Request::Digests { offset, bytes, piece_bytes } => {
                        let _grant = self.site.budget(READING_BYTES_MAX as u64);
                        keeper.digests(offset, bytes, piece_bytes)?
                    }
                }
            }
            found => {
                let expected = "data, a commit or a request";
                return Err(WireError::Unexpected { found, expected }.into());
            }
        };
        Ok(Effect::Answer(reply.to_frame()))
    }

    /// The stream broke; the volume's report may have to say why.
    pub fn broken(&self, error: WireError) -> End {
        let end = End::Wire(error);
        self.note(&end);
        end
    }

    /// Nothing more comes: the peer closed, or this session was told to end.
    pub fn closed(&self) -> Result<(), End> {
        match self.handle.ended() {
            None => Ok(()),
            Some(told) => {
                let end = End::Refuse(told);
                self.note(&end);
                Err(end)
            }
        }
    }

    /// Says in the volume's report why its session ended.
    fn note(&self, end: &End) {
        let (State::Waiting { entry, .. } | State::Seated { entry, .. }) = &self.state else {
            return;
        };
        let ended = self.handle.ended();
        let message = match (&ended, end) {
            (Some(refusal), _) if refusal.code == RefusalCode::Replaced => return,
            (Some(refusal), _) | (None, End::Refuse(refusal)) => refusal.message.clone(),
            (None, End::Wire(WireError::Io(_) | WireError::Refused(_))) => return,
            (None, End::Wire(WireError::Format(error))) => unread(error).message,
            (None, End::Wire(error)) => error.to_string(),
        };
        entry.note_refused(Some(message));
        self.site.changed();
    }

    /// What the peer is told at the end, if anything.
    pub fn refusal(&self, end: End) -> Option<Refusal> {
        if let Some(told) = self.handle.ended() {
            return Some(told);
        }
        match end {
            End::Refuse(refusal) => Some(refusal),
            End::Wire(WireError::Format(error)) => Some(unread(&error)),
            End::Wire(error @ WireError::Unexpected { .. }) => {
                Some(refuse(RefusalCode::Malformed, error.to_string()))
            }
            End::Wire(error @ (WireError::Io(_) | WireError::Refused(_))) => {
                let volume = self.volume().map(tracing::field::display);
                tracing::info!(server = %self.peer.server, volume, "session ended: {error}");
                None
            }
        }
    }

    /// The volume that the peer greeted for, once it may.
    pub fn volume(&self) -> Option<VolumeId> {
        match &self.state {
            State::Silent => None,
            State::Waiting { hello, .. } | State::Seated { hello, .. } => Some(hello.volume),
        }
    }
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
