//! One request against a device: what it gives becomes replies.
//!
//! A read is answered in pieces that fit a thread's own buffer, straight from the device; only
//! where the protocol wants one piece (a simple reply, or "don't fragment") is memory taken for it.
//! An `Err` from here means that the connection is of no more use; a device's error is an answer.

use super::protocol::{
    Command, DATA_CHUNK_BYTES, ErrorNumber, Request, SIMPLE_BYTES, Terms, data_chunk, error_chunk,
    hole_chunk, simple, status_bytes, status_chunk,
};
use super::stream::Stream;
use super::{Device, Zeroing};
use std::io;
use std::time::{Duration, Instant};

/// Most data of a chunk, where a read may be answered in several: what stays in a processor's cache.
pub const PIECE_BYTES_MAX: usize = 256 << 10;
/// Runs in one answer to block status.
pub const STATUS_RUNS_MAX: usize = 4096;
/// A read of so many bytes asks first where holes are; below, zeros are sent as quickly.
const HOLE_READ_BYTES_MIN: u32 = 64 << 10;
/// Runs that a read asks for; what lies behind them is sent as data.
const READ_RUNS_MAX: usize = 64;
const REPLIES_BYTES: usize = PIECE_BYTES_MAX + (4 << 10);

// Every answer but a whole read fits the buffer.
const _: () = assert!(DATA_CHUNK_BYTES + PIECE_BYTES_MAX <= REPLIES_BYTES);
const _: () = assert!(status_bytes(STATUS_RUNS_MAX) <= REPLIES_BYTES);

/// Answers of one thread that are not sent yet.
pub struct Replies<'a> {
    stream: &'a Stream,
    buffer: Box<[u8]>,
    used: usize,
    /// How long sending has taken so far: the client's time, not the device's.
    sending: Duration,
}

impl<'a> Replies<'a> {
    /// None.
    pub fn new(stream: &'a Stream) -> Self {
        Self { stream, buffer: vec![0; REPLIES_BYTES].into(), used: 0, sending: Duration::ZERO }
    }

    /// Sends what there is.
    pub fn send(&mut self) -> io::Result<()> {
        if self.used == 0 {
            return Ok(());
        }
        let used = std::mem::take(&mut self.used);
        let start = Instant::now();
        let sent = self.stream.send(&self.buffer[..used]);
        self.sending += start.elapsed();
        sent
    }

    /// How long sending has taken so far.
    pub fn sending(&self) -> Duration {
        self.sending
    }

    /// Room for so many bytes; they count once they are [`Self::add_room`].
    fn room(&mut self, bytes: usize) -> io::Result<&mut [u8]> {
        if self.buffer.len() - self.used < bytes {
            self.send()?;
        }
        Ok(&mut self.buffer[self.used..self.used + bytes])
    }

    fn add_room(&mut self, bytes: usize) {
        self.used += bytes;
    }

    fn add(&mut self, reply: &[u8]) -> io::Result<()> {
        self.room(reply.len())?.copy_from_slice(reply);
        self.add_room(reply.len());
        Ok(())
    }

    /// Answers with an error.
    pub fn refuse(&mut self, cookie: u64, structured: bool, error: ErrorNumber) -> io::Result<()> {
        if structured {
            self.add(&error_chunk(cookie, error))
        } else {
            self.add(&simple(cookie, Some(error)))
        }
    }
}

/// Memory that the answer to a request takes besides a thread's buffer.
pub fn answer_bytes(request: &Request, terms: &Terms) -> usize {
    let whole = match request.command {
        Command::Read { one_chunk } => one_chunk || !terms.structured,
        _ => false,
    };
    if whole && request.bytes as usize > PIECE_BYTES_MAX { request.bytes as usize } else { 0 }
}

/// Serves one request; `payload` is a write's.
pub fn serve(
    device: &dyn Device,
    terms: &Terms,
    request: &Request,
    payload: &[u8],
    replies: &mut Replies<'_>,
) -> io::Result<()> {
    let &Request { command, fua, cookie, offset, bytes } = request;
    let durable =
        |done: io::Result<()>| if fua { done.and_then(|()| device.flush()) } else { done };
    let range = u64::from(bytes);
    let (done, fast) = match command {
        Command::Read { one_chunk } if one_chunk || !terms.structured => {
            return read_whole(device, terms, request, replies);
        }
        Command::Read { .. } => return read_pieces(device, request, replies),
        Command::BlockStatus { one } => return block_status(device, request, one, replies),
        Command::Flush => (device.flush(), false),
        // Page cache and device know better.
        Command::Cache | Command::Disconnect => (Ok(()), false),
        _ if bytes == 0 => (durable(Ok(())), false),
        Command::Write => (durable(device.write_at(offset, payload)), false),
        Command::Trim => (durable(device.trim(offset, range)), false),
        Command::WriteZeroes { no_hole, fast } => {
            (durable(device.zero(offset, range, Zeroing { no_hole, fast })), fast)
        }
    };
    replies.add(&simple(cookie, done.err().map(|error| ErrorNumber::of(&error, fast))))
}

fn read_whole(
    device: &dyn Device,
    terms: &Terms,
    request: &Request,
    replies: &mut Replies<'_>,
) -> io::Result<()> {
    let &Request { cookie, offset, bytes, .. } = request;
    let mut whole = Vec::new();
    let head = if terms.structured { DATA_CHUNK_BYTES } else { SIMPLE_BYTES };
    let reply = if answer_bytes(request, terms) == 0 {
        replies.room(head + bytes as usize)?
    } else {
        replies.send()?;
        whole.resize(head + bytes as usize, 0);
        &mut whole[..]
    };
    if let Err(error) = device.read_at(offset, &mut reply[head..]) {
        return replies.refuse(cookie, terms.structured, ErrorNumber::of(&error, false));
    }
    if terms.structured {
        reply[..head].copy_from_slice(&data_chunk(cookie, offset, bytes, true));
    } else {
        reply[..head].copy_from_slice(&simple(cookie, None));
    }
    if whole.is_empty() {
        replies.add_room(head + bytes as usize);
        Ok(())
    } else {
        let start = Instant::now();
        let sent = replies.stream.send(&whole);
        replies.sending += start.elapsed();
        sent
    }
}

fn read_pieces(
    device: &dyn Device,
    request: &Request,
    replies: &mut Replies<'_>,
) -> io::Result<()> {
    let &Request { cookie, offset: mut at, bytes, .. } = request;
    let end = at + u64::from(bytes);
    // Without an answer all of it is data.
    let runs = if bytes >= HOLE_READ_BYTES_MIN {
        device.extents(at, u64::from(bytes), READ_RUNS_MAX).unwrap_or_default()
    } else {
        Vec::new()
    };
    let mut runs = runs.into_iter();
    while at < end {
        let left = end - at;
        let (mut run, hole) =
            runs.next().map_or((left, false), |run| (run.bytes.min(left), run.hole));
        if hole && run > 0 {
            replies.add(&hole_chunk(cookie, at, run as u32, run == left))?;
            at += run;
            continue;
        }
        while run > 0 {
            let piece = run.min(PIECE_BYTES_MAX as u64) as usize;
            let room = replies.room(DATA_CHUNK_BYTES + piece)?;
            let (head, data) = room.split_at_mut(DATA_CHUNK_BYTES);
            if let Err(error) = device.read_at(at, data) {
                return replies.refuse(cookie, true, ErrorNumber::of(&error, false));
            }
            let done = at + piece as u64 == end;
            head.copy_from_slice(&data_chunk(cookie, at, piece as u32, done));
            replies.add_room(DATA_CHUNK_BYTES + piece);
            at += piece as u64;
            run -= piece as u64;
        }
    }
    Ok(())
}

fn block_status(
    device: &dyn Device,
    request: &Request,
    one: bool,
    replies: &mut Replies<'_>,
) -> io::Result<()> {
    let &Request { cookie, offset, bytes, .. } = request;
    let limit = if one { 1 } else { STATUS_RUNS_MAX };
    let found = match device.extents(offset, u64::from(bytes), limit) {
        Ok(found) => found,
        Err(error) => return replies.refuse(cookie, true, ErrorNumber::of(&error, false)),
    };
    let mut left = bytes;
    let mut runs = Vec::with_capacity(found.len());
    for run in found.iter().take(limit) {
        let run_bytes = run.bytes.min(u64::from(left)) as u32;
        if run_bytes > 0 {
            runs.push((run_bytes, run.hole));
            left -= run_bytes;
        }
    }
    if runs.is_empty() {
        // Nothing known is data, and an answer.
        runs.push((bytes, false));
    }
    let room = status_bytes(runs.len());
    status_chunk(cookie, &runs, replies.room(room)?);
    replies.add_room(room);
    Ok(())
}
