//! The bytes of wire and disk: frames, extents, epoch manifests, control messages.
//!
//! One codec serves both: the journal stores a frame as it came over the wire, so what was checked
//! once can be checked again with the same code. This crate does no I/O and knows no clock.
//!
//! Invariants:
//! - every length is checked against a named limit before memory is taken;
//! - bytes from a peer or a disk are one type ([`frame::RawHeader`]), checked ones another
//!   ([`extent::Content`], [`manifest::SignedManifest`]);
//! - little-endian throughout; layouts are described byte by byte in `docs/formats.md` and fixed by
//!   golden files.
#![forbid(unsafe_code)]

mod bytes;
pub mod extent;
pub mod frame;
pub mod ids;
pub mod limits;
pub mod manifest;
pub mod message;

/// Why bytes were refused. None of these is ever repaired or guessed around: the connection is
/// dropped, or the journal tail is cut, and the volume stays as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Fewer bytes than the layout needs.
    #[error("{what} is cut short: {have} of {need} bytes")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Bytes there are.
        have: u64,
        /// Bytes the layout asks for.
        need: u64,
    },
    /// The magic number is another one: not our bytes, or misaligned.
    #[error("not a Secondsite frame (magic {found:#010x})")]
    Magic {
        /// The four bytes found.
        found: u32,
    },
    /// Written by a newer Secondsite.
    #[error("{what} has version {found}, this Secondsite reads up to {known}: upgrade this side")]
    Newer {
        /// What carries the version.
        what: &'static str,
        /// The version found.
        found: u16,
        /// The newest version known here.
        known: u16,
    },
    /// The peer speaks another version of the conversation.
    #[error("the peer speaks protocol {found}, this side {known}: upgrade the older side")]
    Protocol {
        /// The peer's.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// An unknown kind of frame or extent.
    #[error("unknown {what} {found}")]
    Kind {
        /// What carries the kind.
        what: &'static str,
        /// The value found.
        found: u32,
    },
    /// A length above its limit.
    #[error("{what} of {found} exceeds the limit of {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The value found.
        found: u64,
        /// The named limit.
        limit: u64,
    },
    /// A digest does not match.
    #[error("digest of {what} does not match")]
    Digest {
        /// What was digested.
        what: &'static str,
    },
    /// The bytes are well formed one by one, but not together.
    #[error("{what}: {why}")]
    Inconsistent {
        /// What is inconsistent.
        what: &'static str,
        /// Why.
        why: &'static str,
    },
}
