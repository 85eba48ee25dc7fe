//! The network between the source and the target's conversations: bytes arrive in order within a
//! connection, or not at all; connections break at seeded moments, with the answer or without, and
//! what was on its way in an old one may still arrive when a new one is up. A frame may arrive with
//! a bit of it changed, as if no TLS were below.

use crate::remote::Remote;
use crate::world::Killed;
use secondsite::source::seams::{Dial, Link, LinkError};
use secondsite::target::conversation::{Conversation, Effect, End};
use secondsite::target::session::{Line, SessionHandle};
use secondsite::wire::WireError;
use secondsite_format::FormatError;
use secondsite_format::frame::{Frame, FrameKind, HEADER_BYTES, RawHeader};
use secondsite_format::message::{Hello, Message, Refusal, Reply, Welcome};
use std::collections::VecDeque;
use std::net::Shutdown;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The target's end of a connection.
pub struct Wire {
    pub volume: usize,
    conversation: Option<Conversation>,
    /// Sent and not arrived.
    flying: VecDeque<Frame>,
    told: Arc<AtomicBool>,
    /// What the target said when it ended it.
    farewell: Option<Refusal>,
    /// Nobody is at the source's end any more.
    pub orphan: bool,
}

struct Told(Arc<AtomicBool>);

impl Line for Told {
    fn shutdown(&self, _how: Shutdown) {
        self.0.store(true, Ordering::Relaxed);
    }
    fn set_read_timeout(&self, _timeout: Duration) {}
}

impl Remote {
    /// A connection for a volume; none while the target is down.
    fn connect(&self, volume: usize) -> Option<u64> {
        let mut state = self.state();
        let site = state.site.clone()?;
        let told = Arc::new(AtomicBool::new(false));
        let handle = SessionHandle::new(Box::new(Told(told.clone())));
        let conversation = Some(Conversation::new(site, handle, self.peer()));
        state.next_wire += 1;
        let number = state.next_wire;
        let flying = VecDeque::new();
        let wire = Wire { volume, conversation, flying, told, farewell: None, orphan: false };
        state.wires.insert(number, wire);
        Some(number)
    }

    /// Puts a frame on its way; false if the connection is no more.
    fn send(&self, number: u64, frame: &Frame) -> bool {
        let mut state = self.state();
        let Some(wire) = state.wires.get_mut(&number) else { return false };
        wire.flying.push_back(frame.clone());
        wire.conversation.is_some()
    }

    /// The next frame arrives. What the target answers to it, if anything.
    fn arrive(&self, number: u64) -> Option<Frame> {
        let (frame, mut conversation, volume) = {
            let mut state = self.state();
            let wire = state.wires.get_mut(&number)?;
            let frame = wire.flying.pop_front()?;
            (frame, wire.conversation.take()?, wire.volume)
        };
        let header = frame.header;
        let values = [number, header.kind as u64, header.epoch.0, header.seq.into()];
        self.world.note("arrives", &values);
        let site = self.state().site.clone()?;
        let result = self.living(|| {
            let (header, body) = self.garbled(&frame);
            let format = |error: FormatError| WireError::from(error);
            let raw = RawHeader::parse(&header).map_err(format);
            let raw = raw.map_err(|error| conversation.broken(error))?;
            let admitted = conversation.admit(&raw).map_err(|error| conversation.broken(error))?;
            let frame = raw.with_body(body).map_err(format);
            let frame = frame.map_err(|error| conversation.broken(error))?;
            let grant = site.budget(admitted);
            let mut effect = conversation.frame(&frame, Some(grant))?;
            while matches!(effect, Effect::Wait) {
                self.others_leave(number);
                effect = conversation.seat()?;
            }
            Ok(effect)
        })?;
        match result {
            Ok(effect) => {
                if let Some(wire) = self.state().wires.get_mut(&number) {
                    wire.conversation = Some(conversation);
                }
                let Effect::Answer(answer) = effect else { return None };
                match header.kind {
                    FrameKind::Commit => self.acknowledged(volume, &frame, &answer),
                    FrameKind::Hello => self.welcomed(volume, &answer),
                    _ => {}
                }
                Some(answer)
            }
            Err(end) => {
                let farewell = conversation.refusal(end);
                self.world.note("session refused", &[number, farewell.is_some().into()]);
                drop(conversation);
                if let Some(wire) = self.state().wires.get_mut(&number) {
                    wire.farewell = farewell;
                }
                None
            }
        }
    }

    /// Runs code of the target's process. None if it died of that.
    pub fn living<T>(&self, run: impl FnOnce() -> Result<T, End>) -> Option<Result<T, End>> {
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(result) => Some(result),
            Err(payload) if payload.is::<Killed>() => {
                self.died();
                None
            }
            Err(payload) => resume_unwind(payload),
        }
    }

    /// Sessions that were told to end do so; of what was on its way to them some still arrives.
    fn others_leave(&self, newcomer: u64) {
        let told = |state: &crate::remote::State| {
            let mut wires = state.wires.iter();
            wires
                .find(|(number, wire)| {
                    **number != newcomer
                        && wire.conversation.is_some()
                        && wire.told.load(Ordering::Relaxed)
                })
                .map(|(number, wire)| (*number, wire.flying.len()))
        };
        while let Some((number, flying)) = { told(&self.state()) } {
            let late = self.world.below(flying as u64 + 1);
            (0..late).for_each(|_| drop(self.arrive(number)));
            self.hang_up(number);
        }
    }

    /// The target's end closes.
    fn hang_up(&self, number: u64) {
        let taken = {
            let mut state = self.state();
            state.wires.get_mut(&number).and_then(|wire| wire.conversation.take())
        };
        let Some(conversation) = taken else { return };
        self.world.note("session ends", &[number]);
        let farewell = conversation.closed().err().and_then(|end| conversation.refusal(end));
        drop(conversation);
        if let Some(wire) = self.state().wires.get_mut(&number) {
            wire.farewell = farewell;
        }
    }

    /// Something happens to a connection that nobody is at any more.
    pub fn stale(&self) {
        let orphans: Vec<(u64, bool)> = {
            let state = self.state();
            let orphans = state.wires.iter().filter(|(_, wire)| wire.orphan);
            orphans.map(|(number, wire)| (*number, wire.flying.is_empty())).collect()
        };
        if orphans.is_empty() {
            return;
        }
        let (number, silent) = orphans[self.world.below(orphans.len() as u64) as usize];
        if silent || self.world.chance(20) {
            if self.world.chance(20) {
                self.hang_up(number);
                self.state().wires.remove(&number);
            }
        } else {
            self.arrive(number);
        }
    }

    /// The connection breaks: some of what is on its way arrives now, and the rest never or late.
    fn breaks(&self, number: u64) {
        let flying = self.state().wires.get(&number).map_or(0, |wire| wire.flying.len());
        let now = self.world.below(flying as u64 + 1);
        self.world.note("breaks", &[number, now]);
        (0..now).for_each(|_| drop(self.arrive(number)));
        self.abandon(number);
    }

    /// The source's end is gone.
    fn abandon(&self, number: u64) {
        if self.world.chance(50) {
            self.hang_up(number);
            self.state().wires.remove(&number);
        } else if let Some(wire) = self.state().wires.get_mut(&number) {
            wire.orphan = true;
        }
    }

    /// What of a frame arrives.
    fn garbled(&self, frame: &Frame) -> ([u8; HEADER_BYTES], Vec<u8>) {
        let (mut header, mut body) = (*frame.header_bytes(), frame.body.clone());
        let one_of = self.state().faults.garbled;
        if one_of > 0 && self.world.below(one_of) == 0 {
            let bit = self.world.below(8 * frame.total_bytes());
            self.world.note("garbled", &[bit]);
            let at = bit as usize / 8;
            match header.get_mut(at) {
                Some(byte) => *byte ^= 1 << (bit % 8),
                None => body[at - HEADER_BYTES] ^= 1 << (bit % 8),
            }
        }
        (header, body)
    }

    fn faulty(&self) -> bool {
        let percent = self.state().faults.breaks;
        self.world.chance(percent)
    }
}

/// Dials the target for a volume.
pub struct SimDial {
    pub remote: Arc<Remote>,
    pub volume: usize,
}

fn lost(why: &str) -> LinkError {
    LinkError::Lost(why.into())
}

impl Dial for SimDial {
    fn dial(&mut self, hello: &Hello) -> Result<(Box<dyn Link>, Welcome), LinkError> {
        let remote = &self.remote;
        remote.world.moment();
        let number = remote.connect(self.volume).ok_or_else(|| lost("refused"))?;
        let mut link = SimLink { remote: remote.clone(), volume: self.volume, number, dead: false };
        let answer = link.ask_frame(&hello.to_frame())?;
        let welcome = Welcome::from_frame(&answer).map_err(|_| LinkError::Nonsense("welcome"))?;
        Ok((Box::new(link), welcome))
    }
}

struct SimLink {
    remote: Arc<Remote>,
    volume: usize,
    number: u64,
    dead: bool,
}

impl SimLink {
    fn broken(&mut self) -> LinkError {
        self.dead = true;
        self.remote.breaks(self.number);
        lost("broken")
    }

    /// The target has ended it: what it said may be read, or is lost with the connection.
    fn ended(&mut self) -> LinkError {
        self.dead = true;
        let wire = self.remote.state().wires.remove(&self.number);
        match wire.and_then(|wire| wire.farewell) {
            Some(refusal) if !self.remote.faulty() => LinkError::Refused(refusal),
            _ => lost("closed"),
        }
    }

    fn ask_frame(&mut self, frame: &Frame) -> Result<Frame, LinkError> {
        assert!(!self.dead, "nothing is sent on a broken connection");
        let remote = self.remote.clone();
        remote.world.moment();
        if !remote.send(self.number, frame) {
            return Err(self.ended());
        }
        if remote.faulty() {
            return Err(self.broken());
        }
        let mut answer = None;
        loop {
            remote.aside();
            remote.world.moment();
            let left = remote.state().wires.get(&self.number).map_or(0, |wire| wire.flying.len());
            if left == 0 {
                break;
            }
            answer = remote.arrive(self.number);
            let open = |wire: &Wire| wire.conversation.is_some();
            if !remote.state().wires.get(&self.number).is_some_and(open) {
                return Err(self.ended());
            }
        }
        let delay = remote.world.below(30);
        remote.world.state().now += Duration::from_millis(delay);
        // It arrived, but the answer does not.
        if remote.faulty() {
            return Err(self.broken());
        }
        let answer = answer.ok_or_else(|| lost("the target died"))?;
        let (header, body) = remote.garbled(&answer);
        let received = RawHeader::parse(&header).and_then(|raw| raw.with_body(body));
        received.map_err(|_| self.broken())
    }
}

impl Link for SimLink {
    fn send(&mut self, frame: &Frame) -> Result<(), LinkError> {
        assert!(!self.dead, "nothing is sent on a broken connection");
        self.remote.note_sent(self.volume, frame);
        self.remote.world.moment();
        let open = self.remote.send(self.number, frame);
        if self.remote.faulty() {
            return Err(self.broken());
        }
        if !open && self.remote.world.chance(50) {
            return Err(self.ended());
        }
        // Some of it arrives at once.
        if self.remote.world.chance(30) {
            self.remote.arrive(self.number);
        }
        Ok(())
    }

    fn ask(&mut self, frame: &Frame) -> Result<Reply, LinkError> {
        let answer = self.ask_frame(frame)?;
        assert_eq!(answer.header.kind, FrameKind::Reply, "the answer to a request");
        Ok(Reply::from_frame(&answer).expect("a reply decodes"))
    }
}

impl Drop for SimLink {
    fn drop(&mut self) {
        if !self.dead {
            self.remote.abandon(self.number);
        }
    }
}
