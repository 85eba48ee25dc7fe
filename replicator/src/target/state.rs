//! What a volume of the target remembers beside its journal: `state.json`, replaced as a whole.
//!
//! Invariants: it is durable before anything relies on it; a newer format is refused and left
//! untouched; what the replica holds is `base` when `promoting` is none, else something between
//! `promoting.from` and `promoting.to`, and only the journal makes it whole.

use super::disk::Disk;
use super::journal::Place;
use secondsite_format::ids::{CutId, Epoch, Generation, ServerId, SyncId, VolumeId};
use secondsite_format::manifest::{Consistency, CutMethod, SignedManifest};
use serde::{Deserialize, Serialize};
use std::io;

/// Its name in the volume's folder.
pub const FILE: &str = "state.json";
/// Newest format known.
pub const FORMAT: u32 = 3;
/// Largest file believed, bytes: the facts of one epoch with all its members, as text.
const FILE_BYTES_MAX: u64 = 256 << 10;

/// The file's content.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StateRecord {
    /// [`FORMAT`].
    pub format: u32,
    /// The server.
    pub server: ServerId,
    /// The volume.
    pub volume: VolumeId,
    /// How far the replica volume goes, bytes: the size at `base`, before that the first copy's.
    /// Epochs behind `base` may have made the volume larger.
    pub volume_bytes: u64,
    /// Unit of tracking, bytes.
    pub block_bytes: u32,
    /// The replica volume: `replica.img`, or the path of a device.
    pub replica: String,
    /// The line of epochs; made here.
    pub generation: Generation,
    /// The first copy.
    pub copy: CopyRecord,
    /// The epoch that was promoted last; none before the first.
    pub base: Option<EpochFacts>,
    /// Where the journal's first frame behind `base` is or will be.
    pub tail: Place,
    /// The replica is between these two.
    pub promoting: Option<Promoting>,
}

/// See [`secondsite_format::message::CopyState`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum CopyRecord {
    /// Nothing was ever copied.
    Empty,
    /// Durable up to the cursor.
    Copying {
        /// The first copy.
        sync: SyncId,
        /// Everything below is durable, bytes.
        cursor: u64,
    },
    /// Complete; epochs may follow.
    Copied {
        /// The first copy that did it, so that a repeated message is answered again.
        sync: SyncId,
    },
}

/// A promotion that has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promoting {
    /// The epoch that the replica was; 0 for the first copy.
    pub from: Epoch,
    /// The epoch that it becomes.
    pub to: Epoch,
}

/// What is remembered of a committed epoch's manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochFacts {
    /// Its number.
    pub epoch: Epoch,
    /// Its cut.
    pub cut_id: CutId,
    /// Size of the volume at the cut, bytes.
    pub volume_bytes: u64,
    /// Time of the cut by the agent's clock.
    pub time_ns: u64,
    /// What was proven.
    #[serde(with = "consistency")]
    pub consistency: Consistency,
    /// How the cut was made.
    #[serde(with = "method")]
    pub method: CutMethod,
    /// Points of this volume from this epoch on lost "exact"; 0 when none did.
    pub doubt_from: Epoch,
    /// Volumes of the point, sorted.
    pub members: Vec<VolumeId>,
    /// Protected volumes that the point lacks, sorted.
    pub lacking: Vec<VolumeId>,
    /// Byte ranges that could not be read.
    pub unreadable: Vec<(u64, u64)>,
    /// Chain digest of the manifest.
    #[serde(with = "hex32")]
    pub chain: [u8; 32],
    /// When it was committed by the retention clock (`super::retention`), seconds.
    #[serde(default, skip_serializing_if = "is_default")]
    pub stamp_s: u64,
    /// Thinning has merged it into a later epoch: it is no point any more.
    #[serde(default, skip_serializing_if = "is_default")]
    pub dropped: bool,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl EpochFacts {
    /// The facts of a manifest that was checked, committed at `stamp_s`.
    pub fn of(signed: &SignedManifest, stamp_s: u64) -> Self {
        let manifest = &signed.manifest;
        Self {
            epoch: manifest.epoch,
            cut_id: manifest.cut_id,
            volume_bytes: manifest.volume_bytes,
            time_ns: manifest.cut_time_ns,
            consistency: manifest.consistency,
            method: manifest.method,
            doubt_from: manifest.doubt_from,
            members: manifest.members.clone(),
            lacking: manifest.lacking.clone(),
            unreadable: manifest.unreadable.clone(),
            chain: signed.chain_digest(),
            stamp_s,
            dropped: false,
        }
    }
}

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A newer Secondsite wrote it.
    #[error(
        "written by a newer Secondsite (format {found}, this one reads up to {FORMAT}): install \
         the newer one again on the target; nothing was changed"
    )]
    Newer {
        /// Its format.
        found: u64,
    },
    /// It does not say which format it has.
    #[error("damaged: no format number")]
    NoFormat,
    /// It is not what was written.
    #[error("damaged: {0}")]
    Damaged(#[from] serde_json::Error),
}

impl StateRecord {
    /// A volume that never received anything.
    pub fn fresh(
        (server, volume): (ServerId, VolumeId),
        volume_bytes: u64,
        block_bytes: u32,
        replica: String,
    ) -> Self {
        Self {
            format: FORMAT,
            server,
            volume,
            volume_bytes,
            block_bytes,
            replica,
            generation: Generation(1),
            copy: CopyRecord::Empty,
            base: None,
            tail: Place::START,
            promoting: None,
        }
    }

    /// Reads it, if there is one.
    pub fn load(disk: &dyn Disk) -> Result<Option<Self>, StateError> {
        // A process before this one may have ended between giving the file its name and making
        // that durable. What is acted on must not go with the power.
        disk.sync_names("")?;
        disk.read(FILE, FILE_BYTES_MAX)?.map(|bytes| Self::decode(&bytes)).transpose()
    }

    /// Reads the file's content. The format comes first: nothing else of a newer one is looked at.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let mut value: serde_json::Value = serde_json::from_slice(bytes)?;
        match value["format"].as_u64() {
            Some(found) if found > u64::from(FORMAT) => Err(StateError::Newer { found }),
            Some(found) if found == u64::from(FORMAT) => Ok(serde_json::from_value(value)?),
            Some(found @ (1 | 2)) => {
                // Format 1 knew no growth: its base has the volume's size. Format 2 knew no runs.
                let volume_bytes = value["volume_bytes"].clone();
                if let Some(base) = value["base"].as_object_mut().filter(|_| found == 1) {
                    base.insert("volume_bytes".into(), volume_bytes);
                }
                value["format"] = FORMAT.into();
                Ok(serde_json::from_value(value)?)
            }
            _ => Err(StateError::NoFormat),
        }
    }

    /// The file's content.
    pub fn encode(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec_pretty(self).expect("plain data has a JSON form");
        text.push(b'\n');
        text
    }

    /// Makes it durable.
    pub fn store(&self, disk: &dyn Disk) -> io::Result<()> {
        disk.replace(FILE, &self.encode())
    }
}

/// The word for a consistency in documents and reports.
pub fn consistency_word(consistency: Consistency) -> &'static str {
    match consistency {
        Consistency::Fuzzy => "fuzzy",
        Consistency::Crash => "crash",
        Consistency::Application => "application",
    }
}

macro_rules! as_word {
    ($name:ident, $type:ty, [$($variant:path => $word:literal),+]) => {
        mod $name {
            use super::*;
            use serde::{Deserializer, Serializer, de::Error};

            pub fn serialize<S: Serializer>(value: &$type, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(match value { $($variant => $word),+ })
            }

            pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<$type, D::Error> {
                match String::deserialize(d)?.as_str() {
                    $($word => Ok($variant),)+
                    other => Err(D::Error::unknown_variant(other, &[$($word),+])),
                }
            }
        }
    };
}

as_word!(consistency, Consistency, [
    Consistency::Fuzzy => "fuzzy",
    Consistency::Crash => "crash",
    Consistency::Application => "application"
]);
as_word!(method, CutMethod, [
    CutMethod::Compare => "compare",
    CutMethod::Quiet => "quiet",
    CutMethod::Freeze => "freeze",
    CutMethod::Hold => "hold",
    CutMethod::Unproven => "unproven"
]);

mod hex32 {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(bytes: &[u8; 32], s: S) -> Result<S::Ok, S::Error> {
        let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        s.serialize_str(&text)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(d)?;
        super::parse_hex32(&text).ok_or_else(|| D::Error::custom("not 64 hex digits"))
    }
}

/// 32 bytes from 64 hex digits.
pub fn parse_hex32(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; 32];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(bytes)
}
