//! Frames over a byte stream: TLS in the daemons, anything that reads and writes elsewhere.
//!
//! One thread owns a connection and uses it half-duplex: the source leads, the target answers. A
//! frame's length is checked before memory is taken for its body; whatever is malformed ends the
//! connection.

use secondsite_format::frame::{Frame, HEADER_BYTES, RawHeader};
use secondsite_format::message::{Message, Refusal};
use secondsite_format::{FormatError, frame::FrameKind};
use std::io::{ErrorKind, Read, Write};

/// Why a connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The stream broke, was closed, or stayed silent beyond its timeout.
    #[error("connection: {0}")]
    Io(#[from] std::io::Error),
    /// The peer sent what cannot be read.
    #[error("malformed: {0}")]
    Format(#[from] FormatError),
    /// The peer said why it ends the connection.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// The peer answered something else than was asked for.
    #[error("the peer answered with a {found:?} frame where {expected} was due")]
    Unexpected {
        /// What came.
        found: FrameKind,
        /// What was due.
        expected: &'static str,
    },
}

/// A connection over `S`.
pub struct Connection<S> {
    stream: S,
    sent_bytes: u64,
}

impl<S: Read + Write> Connection<S> {
    /// Wraps a stream whose handshake is done (or happens on first use).
    pub fn new(stream: S) -> Self {
        Self { stream, sent_bytes: 0 }
    }

    /// The stream, for its timeouts and certificates.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// The stream, to end it.
    pub fn stream_mut(&mut self) -> &mut S {
        &mut self.stream
    }

    /// Bytes of frames sent so far, before TLS.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Sends a frame; it may stay in a buffer until [`Self::flush`] or a receive.
    pub fn send(&mut self, frame: &Frame) -> Result<(), WireError> {
        self.stream.write_all(frame.header_bytes())?;
        self.stream.write_all(&frame.body)?;
        self.sent_bytes += frame.total_bytes();
        Ok(())
    }

    /// Pushes out what is buffered.
    pub fn flush(&mut self) -> Result<(), WireError> {
        Ok(self.stream.flush()?)
    }

    /// Gives the stream back.
    pub fn into_stream(self) -> S {
        self.stream
    }

    /// Receives a frame, after pushing out what is buffered. `None`: the peer closed in between
    /// two frames.
    pub fn receive(&mut self) -> Result<Option<Frame>, WireError> {
        Ok(self.receive_admitted(|_| Ok(()))?.map(|(frame, ())| frame))
    }

    /// As [`Self::receive`], but asks `admit` before memory is taken for the body; it may refuse,
    /// or wait, and what it returns comes with the frame.
    pub fn receive_admitted<G>(
        &mut self,
        admit: impl FnOnce(&RawHeader) -> Result<G, WireError>,
    ) -> Result<Option<(Frame, G)>, WireError> {
        self.stream.flush()?;
        let mut header = [0; HEADER_BYTES];
        let mut have = 0;
        while have < HEADER_BYTES {
            match self.stream.read(&mut header[have..]) {
                Ok(0) if have == 0 => return Ok(None),
                Ok(0) => return Err(std::io::Error::from(ErrorKind::UnexpectedEof).into()),
                Ok(count) => have += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        let raw = RawHeader::parse(&header)?;
        let admitted = admit(&raw)?;
        let mut body = vec![0; raw.body_bytes()];
        self.stream.read_exact(&mut body)?;
        let frame = raw.with_body(body)?;
        if frame.header.kind == FrameKind::Refusal {
            return Err(WireError::Refused(Refusal::from_frame(&frame)?));
        }
        Ok(Some((frame, admitted)))
    }

    /// Sends a message.
    pub fn send_message<M: Message>(&mut self, message: &M) -> Result<(), WireError> {
        self.send(&message.to_frame())
    }

    /// Receives a message of one kind; anything else is an error.
    pub fn receive_message<M: Message>(&mut self, expected: &'static str) -> Result<M, WireError> {
        let frame =
            self.receive()?.ok_or_else(|| std::io::Error::from(ErrorKind::ConnectionAborted))?;
        if frame.header.kind != M::KIND {
            return Err(WireError::Unexpected { found: frame.header.kind, expected });
        }
        Ok(M::from_frame(&frame)?)
    }
}
