//! What the source stands on: clock, disk, tracker, freezer, link, signer. All as traits, so that
//! the whole cycle runs in the daemon and in a simulator alike.
//!
//! Nothing above this module makes a system call; nothing below it decides anything.

use crate::source::buffers::Buffer;
use secondsite_control::codes::Reason;
use secondsite_format::frame::Frame;
use secondsite_format::ids::VolumeId;
use secondsite_format::manifest::{PUBLIC_KEY_BYTES, SIGNATURE_BYTES};
use secondsite_format::message::{Hello, Refusal, Reply, Welcome};
use secondsite_tracker::ebpf::Audit;
use secondsite_tracker::filter::shared::Shared;
use secondsite_tracker::marks::Marks;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Clock and chance.
pub trait Env: Send + Sync {
    /// Time since some fixed instant; never goes back.
    fn now(&self) -> Duration;
    /// Nanoseconds since 1970 UTC: a label, never an order.
    fn wall_ns(&self) -> u64;
    /// Sixteen random bytes.
    fn random(&self) -> [u8; 16];
}

/// A run of bytes to read, and where in the buffer it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where it starts on the volume, bytes.
    pub offset: u64,
    /// How long it is, bytes.
    pub bytes: usize,
    /// Where it starts in the buffer, bytes.
    pub at: usize,
}

/// Pieces that are read into one buffer.
pub struct Batch {
    /// The caller's number for it.
    pub tag: u64,
    /// What is read, rising.
    pub pieces: Vec<Piece>,
    /// Where it lands.
    pub buffer: Buffer,
    /// Ranges (offset, bytes) that could not be read, whole blocks.
    pub unreadable: Vec<(u64, u64)>,
}

/// Why a volume cannot be read at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// The device is no longer there, or no longer the one it was.
    #[error("{path} is gone ({cause}): attach the same disk again, or unprotect it")]
    Gone {
        /// The device node.
        path: PathBuf,
        /// What was seen.
        cause: String,
    },
    /// It is larger than it was when it was opened: it has to be opened anew, and all is well.
    #[error("{path} has grown from {before} to {now} bytes; the new part is taken in")]
    Grown {
        /// The device node.
        path: PathBuf,
        /// Bytes when it was opened.
        before: u64,
        /// Bytes now.
        now: u64,
    },
    /// It is smaller than it was.
    #[error(
        "{path} has shrunk from {before} to {now} bytes, and a volume never becomes smaller: it is stopped; its replica and its recovery points stay as they are. Give the device at least {before} bytes again, and replication goes on by itself after a compare; or end it with: secondsite unprotect"
    )]
    Shrunk {
        /// The device node.
        path: PathBuf,
        /// Bytes before.
        before: u64,
        /// Bytes now.
        now: u64,
    },
    /// The system refuses an operation.
    #[error("{path}: {what}: {cause}")]
    System {
        /// The device node.
        path: PathBuf,
        /// The operation.
        what: &'static str,
        /// Its error.
        cause: String,
    },
}

impl DiskError {
    /// Its code for people.
    pub fn code(&self) -> Reason {
        match self {
            Self::Gone { .. } => Reason::DeviceGone,
            Self::Grown { .. } => Reason::DeviceGrown,
            Self::Shrunk { .. } => Reason::DeviceShrunk,
            Self::System { .. } => Reason::DeviceUnreadable,
        }
    }
}

/// The volume, for reading. Batches complete in any order; an unreadable block is no error.
pub trait Disk: Send {
    /// Whether the device is still the one that was opened.
    fn check(&mut self) -> Result<(), DiskError>;
    /// Queues a batch.
    fn submit(&mut self, batch: Batch) -> Result<(), DiskError>;
    /// Waits for one of the batches queued.
    ///
    /// # Panics
    /// If none is queued.
    fn wait(&mut self) -> Result<Batch, DiskError>;
    /// Batches queued and not yet returned.
    fn outstanding(&self) -> usize;
    /// Reads with full depth and priority (in the last pass of a cut), or yields again.
    fn urgent(&mut self, urgent: bool);

    /// Waits for all that is queued and drops it.
    fn drain(&mut self) {
        while self.outstanding() > 0 && self.wait().is_ok() {}
    }
}

/// What follows the writes of a volume.
pub trait Tracker: Send + Sync {
    /// Its marks.
    fn marks(&self) -> &Arc<Marks>;
    /// Whether every write was seen.
    fn audit(&self) -> Audit;
    /// Takes the present as the start of the audit.
    fn rebase(&self) -> Result<(), String>;
    /// Mounted file systems on the volume that can be frozen.
    fn mounts(&self) -> Vec<PathBuf>;
    /// Writes a file system back; how long that took.
    fn sync(&self, mount: &Path) -> Result<Duration, String>;
    /// Whether writes to the device are in flight now (true when that cannot be told).
    fn writes_in_flight(&self) -> bool;
    /// Whether what it has in memory survives a power cut, for people.
    fn keeps(&self) -> Option<(Reason, String)> {
        None
    }
    /// What it shares with the filter that the writes go through, if there is one.
    fn filtered(&self) -> Option<&Arc<Shared>> {
        None
    }
}

/// Cuts volumes behind the filter.
pub trait Cutter: Send {
    /// Cuts these at one instant; the number of the flip, or why not.
    fn cut(&mut self, volumes: &[VolumeId]) -> Result<u64, String>;
}

/// Holds file systems still.
pub trait Freeze: Send {
    /// Freezes all of them or none, for at most `limit`.
    fn freeze(&mut self, mounts: &[PathBuf], limit: Duration) -> Result<(), String>;
    /// Thaws them; how long they were frozen, and whether all were until now.
    fn thaw(&mut self) -> Result<(Duration, bool), String>;
}

/// Why there is no session, or none any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The connection broke or could not be made.
    #[error("{0}")]
    Lost(String),
    /// The target said why not.
    #[error("the target refuses: {}", .0.message)]
    Refused(Refusal),
    /// The target answered what was not asked.
    #[error("the target's answer makes no sense: {0}")]
    Nonsense(&'static str),
}

/// A session with the target.
pub trait Link: Send {
    /// Sends a frame that is not answered.
    fn send(&mut self, frame: &Frame) -> Result<(), LinkError>;
    /// Sends a frame and waits for its answer.
    fn ask(&mut self, frame: &Frame) -> Result<Reply, LinkError>;
}

/// Makes sessions.
pub trait Dial: Send {
    /// Connects and greets.
    fn dial(&mut self, hello: &Hello) -> Result<(Box<dyn Link>, Welcome), LinkError>;
}

/// Signs manifests with the key of the agent's certificate.
pub trait Signer: Send + Sync {
    /// Public key and signature of the bytes, with one and the same key.
    fn sign(&self, bytes: &[u8])
    -> Result<([u8; PUBLIC_KEY_BYTES], [u8; SIGNATURE_BYTES]), String>;
}
