//! Control messages of the data connection, in bincode: this is the only module that uses it.
//! Fixed-width integers, a limit on what it may allocate, and nothing left over.
//!
//! The source leads: it sends data frames without waiting, and requests that the target answers in
//! order. The target never asks.

use crate::bytes::Reader;
use crate::frame::{Frame, FrameHeader, FrameKind};
use crate::ids::{CutId, Epoch, Generation, ServerId, SyncId, VolumeId};
use crate::{FormatError, limits};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Version of the conversation; both sides must have the same.
pub const PROTOCOL: u32 = 1;

/// Source to target, first on a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL`] of the source.
    pub protocol: u32,
    /// The server; must be the one in the certificate.
    pub server: ServerId,
    /// Digest of what identifies the machine; must be the one enrolled.
    pub machine: [u8; 32],
    /// The volume.
    pub volume: VolumeId,
    /// Its size, bytes.
    pub volume_bytes: u64,
    /// Unit of tracking, bytes.
    pub block_bytes: u32,
    /// Generation that the source goes on with; 0 if it has none yet.
    pub generation: Generation,
    /// Newest epoch that the source saw acknowledged, with its cut id; 0 and none before.
    pub acknowledged: (Epoch, CutId),
}

/// What the target has of a volume's first copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CopyState {
    /// Nothing was ever copied.
    Empty,
    /// A first copy under this id is durable up to the cursor (bytes).
    Copying {
        /// The first copy.
        sync: SyncId,
        /// Everything below is durable, bytes.
        cursor: u64,
    },
    /// The whole volume was copied once; epochs may follow.
    Copied,
}

/// Target to source: every older session of this volume has ended, and this is what there is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// [`PROTOCOL`] of the target.
    pub protocol: u32,
    /// The generation to go on with.
    pub generation: Generation,
    /// State of the first copy.
    pub copy: CopyState,
    /// Newest durable epoch with its cut id; 0 and none before.
    pub durable: (Epoch, CutId),
    /// [`SignedManifest::chain_digest`](crate::manifest::SignedManifest::chain_digest) of that
    /// epoch; zero before.
    pub chain: [u8; 32],
    /// A staged part: its cut id and the next `seq` that it lacks.
    pub staged: Option<(CutId, u32)>,
    /// The replica volume read as zero before the first copy: zeros need not travel.
    pub reads_zero: bool,
}

/// What a source may ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Keeps the session alive. Answer: [`Reply::Alive`].
    Ping,
    /// How much of the epoch has arrived? Answer: [`Reply::Staged`].
    Barrier,
    /// Drop the staged part of this cut (the epoch was given up). Answer: [`Reply::Staged`].
    GiveUp {
        /// The cut given up.
        cut_id: CutId,
    },
    /// Begin or resume the first copy. Answer: [`Reply::CopiedTo`].
    CopyBegin {
        /// Its id.
        sync: SyncId,
    },
    /// Make what was copied below `upto` durable. Answer: [`Reply::CopiedTo`].
    CopyFlush {
        /// Everything below was sent, bytes.
        upto: u64,
    },
    /// The first copy is complete; make it durable and remember it. Answer: [`Reply::CopiedTo`].
    CopyDone {
        /// Its id.
        sync: SyncId,
    },
    /// BLAKE3 of pieces of the newest committed state of the volume. Answer: [`Reply::Digests`].
    /// At most [`limits::DIGESTS_MAX`] pieces; the last may be shorter.
    Digests {
        /// Start, bytes.
        offset: u64,
        /// Length, bytes.
        bytes: u64,
        /// Bytes a digest covers.
        piece_bytes: u64,
    },
}

/// What a target answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To a ping.
    Alive,
    /// The staged part and the next `seq` it lacks; none if nothing is staged.
    Staged(Option<(CutId, u32)>),
    /// Everything of the first copy below this is durable, bytes.
    CopiedTo(u64),
    /// Digests in order of offset; all zero where the piece reads as zero throughout.
    Digests(Vec<[u8; 32]>),
    /// The epoch is durable; sent in answer to a commit frame.
    Committed {
        /// Its generation.
        generation: Generation,
        /// Its number.
        epoch: Epoch,
        /// Its cut.
        cut_id: CutId,
        /// Chain digest of its manifest.
        chain: [u8; 32],
    },
}

/// Why a session ends. `retry` tells the source whether coming back by itself can help.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// What kind of reason.
    pub code: RefusalCode,
    /// For people: what failed, where, why, and the remedy.
    pub message: String,
}

/// The kinds of [`Refusal`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalCode {
    /// The two sides speak different versions.
    Protocol,
    /// This certificate may not do that, or the volume is not assigned to it (yet).
    NotAllowed,
    /// The session comes from another machine than the one enrolled.
    OtherMachine,
    /// Volume size or block size is not what the target has.
    Mismatch,
    /// The epoch does not follow the newest durable one.
    OutOfOrder,
    /// Malformed bytes.
    Malformed,
    /// A manifest's signature, chain or digest is wrong.
    Unproven,
    /// The target has no space.
    NoSpace,
    /// The target cannot read or write its storage; the volume is stopped there.
    Storage,
    /// A newer session of the same volume took over.
    Replaced,
    /// The target is shutting down.
    Stopping,
}

impl RefusalCode {
    /// Whether coming back later, unchanged, can help.
    pub fn retry(self) -> bool {
        matches!(
            self,
            Self::NotAllowed
                | Self::Malformed
                | Self::NoSpace
                | Self::Storage
                | Self::Replaced
                | Self::Stopping
                | Self::OutOfOrder
                | Self::Unproven
        )
    }
}

/// A message that travels as the body of a frame of its own kind.
pub trait Message: Serialize + DeserializeOwned {
    /// The frame kind.
    const KIND: FrameKind;
    /// Whether it begins with the protocol's number. Of another protocol nothing else is read.
    const GREETS: bool = false;

    /// The message as a frame.
    ///
    /// # Panics
    /// If it exceeds [`limits::MESSAGE_BYTES_MAX`]: the sender's bug.
    fn to_frame(&self) -> Frame {
        let body = bincode::serde::encode_to_vec(self, config()).expect("a message encodes");
        Frame::new(FrameHeader::message(Self::KIND), body)
    }

    /// Reads the message from a frame of its kind.
    fn from_frame(frame: &Frame) -> Result<Self, FormatError> {
        if frame.header.kind != Self::KIND {
            return Err(FormatError::Kind {
                what: "frame kind (another was expected)",
                found: frame.header.kind as u32,
            });
        }
        if Self::GREETS {
            let found = Reader::new("greeting", &frame.body).u32()?;
            if found != PROTOCOL {
                return Err(FormatError::Protocol { found, known: PROTOCOL });
            }
        }
        let (message, consumed) =
            bincode::serde::decode_from_slice(&frame.body, config()).map_err(|_| {
                FormatError::Inconsistent { what: "message", why: "it cannot be decoded" }
            })?;
        if consumed != frame.body.len() {
            return Err(FormatError::Inconsistent { what: "message", why: "bytes after its end" });
        }
        Ok(message)
    }
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard()
        .with_little_endian()
        .with_fixed_int_encoding()
        .with_limit::<{ limits::MESSAGE_BYTES_MAX }>()
}

impl Message for Hello {
    const KIND: FrameKind = FrameKind::Hello;
    const GREETS: bool = true;
}
impl Message for Welcome {
    const KIND: FrameKind = FrameKind::Welcome;
    const GREETS: bool = true;
}
impl Message for Request {
    const KIND: FrameKind = FrameKind::Request;
}
impl Message for Reply {
    const KIND: FrameKind = FrameKind::Reply;
}
impl Message for Refusal {
    const KIND: FrameKind = FrameKind::Refusal;
}
