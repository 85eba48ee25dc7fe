//! One volume with its storage: does to journal, replica and `state.json` what [`Volume`] decides.
//!
//! Invariants:
//! - one session at a time calls the receiving verbs, one promoter at a time the promoting one;
//! - lock order: journal, then volume; the volume's lock is never held over I/O;
//! - `state.json` is written by the session until the first copy is complete, by the promoter
//!   after, so never by two at once;
//! - an error of a sync, and any error that leaves storage unknown, stops the volume.

use super::disk::Disk;
use super::journal::Journal;
use super::merge::Merge;
use super::recover::{self, RecoverError};
use super::replica::{self, Replica, ReplicaError};
use super::retention::RetentionClock;
use super::segments::{HISTORY, KEPT, Segments};
use super::space::Space;
use super::state::{CopyRecord, StateError, StateRecord};
use super::view::View;
use super::volume::{CommitStep, DataStep, Verify, Volume, refuse};
use crate::pulse;
use secondsite_format::extent::{Content, ExtentKind};
use secondsite_format::frame::Frame;
use secondsite_format::ids::{CutId, Epoch, ServerId, SyncId, VolumeId};
use secondsite_format::limits;
use secondsite_format::manifest::{PUBLIC_KEY_BYTES, SignedManifest};
use secondsite_format::message::{Refusal, RefusalCode, Reply, Welcome};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

/// What a volume is, as the assignment says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeSpec {
    /// The server.
    pub server: ServerId,
    /// The volume.
    pub volume: VolumeId,
    /// Its size, bytes.
    pub volume_bytes: u64,
    /// Unit of tracking, bytes.
    pub block_bytes: u32,
    /// Its replica volume, if that is a device.
    pub device: Option<PathBuf>,
}

/// Why a volume cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its `state.json`.
    #[error("state.json: {0}")]
    State(#[from] StateError),
    /// Its replica volume.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// Its journal.
    #[error(transparent)]
    Recover(#[from] RecoverError),
    /// Its folder.
    #[error("{operation}: {cause}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// Why it failed.
        cause: io::Error,
    },
    /// Nothing is there, and nothing says what it should be.
    #[error("nothing is stored, and the volume is not assigned")]
    Unknown,
}

/// What is said of a volume whose code panicked.
const BROKEN: &str = "an invariant of this volume broke (see the log): it is stopped; restart the \
                      target to have it checked and opened again";

/// See the module.
pub struct Keeper {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) replica: Replica,
    pub(super) space: Arc<Space>,
    pub(super) segments: Arc<Segments>,
    clock: Arc<RetentionClock>,
    volume: Mutex<Volume>,
    journal: Mutex<Journal>,
    verify: Verify,
}

impl Keeper {
    /// Opens what is stored, or begins a new volume as `spec` says.
    pub fn open(
        disk: Arc<dyn Disk>,
        spec: Option<&VolumeSpec>,
        space: Arc<Space>,
        clock: Arc<RetentionClock>,
        verify: Verify,
    ) -> Result<Self, OpenError> {
        let device = spec.and_then(|spec| spec.device.as_deref());
        let (record, replica) = match StateRecord::load(&*disk)? {
            Some(record) => {
                let replica = open_replica(&*disk, &record, device)?;
                let operation = "syncing the replica volume";
                replica.file.settle().map_err(|cause| OpenError::Io { operation, cause })?;
                (record, replica)
            }
            None => begin(&*disk, spec.ok_or(OpenError::Unknown)?)?,
        };
        let mut volume = Volume::new(record);
        let segments = Arc::new(Segments::new(disk.clone()));
        let journal = recover::recover(&segments, &mut volume, verify, &clock)?;
        if replica.is_file {
            space.promise(volume.epochs().iter().map(|epoch| epoch.payload_bytes).sum());
        }
        let (volume, journal) = (Mutex::new(volume), Mutex::new(journal));
        Ok(Self { disk, replica, space, segments, clock, volume, journal, verify })
    }

    /// The volume, for a moment: never hold it over I/O.
    pub fn volume(&self) -> MutexGuard<'_, Volume> {
        self.volume.lock().unwrap_or_else(|poisoned| {
            let mut volume = poisoned.into_inner();
            volume.stop(BROKEN.into());
            volume
        })
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        // Who holds it may be writing.
        pulse::outside(|| self.journal.lock()).unwrap_or_else(|poisoned| {
            self.volume().stop(BROKEN.into());
            poisoned.into_inner()
        })
    }

    /// Stops the volume: its storage cannot be trusted until it is opened again.
    pub(super) fn stop(&self, operation: &str, path: &Path, error: &io::Error) -> Refusal {
        let message = format!(
            "{operation} {}: {error}; the volume is stopped here: repair the storage, then \
             restart the target",
            path.display()
        );
        let (server, volume) = {
            let mut held = self.volume();
            held.stop(message.clone());
            (held.record().server, held.record().volume)
        };
        tracing::error!(%server, %volume, "{message}");
        refuse(RefusalCode::Storage, message)
    }

    /// No space is no doubt about the storage; everything else is.
    pub(super) fn failed(&self, operation: &str, path: &Path, error: &io::Error) -> Refusal {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => {
                let message = format!("{operation} {}: {error}; make room there", path.display());
                refuse(RefusalCode::NoSpace, message)
            }
            _ => self.stop(operation, path, error),
        }
    }

    /// A session names the volume's size, which may have grown. Nothing durable changes by it once
    /// the first copy is complete: the next commit makes it the volume's size.
    pub fn name_bytes(&self, bytes: u64) -> Result<(), Refusal> {
        let record = self.volume().record().clone();
        self.volume().check_running()?;
        if !bytes.is_multiple_of(512) || bytes > limits::VOLUME_BYTES_MAX {
            let message = format!("no volume has {bytes} bytes");
            return Err(refuse(RefusalCode::Mismatch, message));
        }
        if !self.replica.is_file {
            self.check_room(bytes)?;
        }
        self.volume().name_bytes(bytes)?;
        if self.volume().copied() || bytes == record.volume_bytes {
            return Ok(());
        }
        // No point knows the old size: the first copy goes on over all of it. The file first: one
        // that is longer than its record does no harm.
        self.grow_replica(bytes)?;
        self.sync_replica()?;
        // A copy that had come to the old end goes on with the block that lies across it: the
        // source reads whole blocks, and what is below the cursor is not touched again.
        let across = record.volume_bytes % u64::from(record.block_bytes);
        let copy = match record.copy {
            CopyRecord::Copying { sync, cursor } if cursor == record.volume_bytes => {
                CopyRecord::Copying { sync, cursor: cursor - across }
            }
            copy => copy,
        };
        self.store(StateRecord { volume_bytes: bytes, copy, ..record })
    }

    /// Whether a device is large enough for the volume.
    pub(super) fn check_room(&self, bytes: u64) -> Result<(), Refusal> {
        let path = &self.replica.path;
        let found = self.replica.file.bytes();
        let found = found.map_err(|error| self.stop("asking the size of", path, &error))?;
        if found >= bytes {
            return Ok(());
        }
        let message = format!(
            "the volume has grown to {bytes} bytes, its replica volume {} has {found}: make that \
             device at least as large (LVM: lvextend --size {bytes}b {0}), and replication goes on \
             by itself; what is committed stays",
            path.display()
        );
        Err(refuse(RefusalCode::Mismatch, message))
    }

    /// Makes a replica file at least so long; it reads as zero there.
    pub(super) fn grow_replica(&self, bytes: u64) -> Result<(), Refusal> {
        if !self.replica.is_file {
            return self.check_room(bytes);
        }
        let grow = || match self.replica.file.bytes()? {
            now if now >= bytes => Ok(()),
            _ => self.replica.file.truncate(bytes),
        };
        grow().map_err(|error| self.failed("growing", &self.replica.path, &error))
    }

    /// What a new session is told.
    pub fn welcome(&self) -> Result<Welcome, Refusal> {
        let volume = self.volume();
        volume.check_running()?;
        Ok(volume.welcome(self.replica.is_file))
    }

    /// Receives a data frame of an epoch.
    pub fn data(&self, frame: &Frame) -> Result<(), Refusal> {
        let content = self.decode(frame)?;
        let digest = content.digest();
        let mut journal = self.journal();
        let step = self.volume().check_data(&frame.header, &content, &digest)?;
        let DataStep::Append { drop_staged } = step else { return Ok(()) };
        if drop_staged {
            self.drop_staged(&mut journal)?;
        }
        let promised = if self.replica.is_file { content.payload().len() as u64 } else { 0 };
        self.space.take(&*self.disk, frame.total_bytes(), promised)?;
        let place = journal.append(frame).map_err(|error| {
            self.space.give_back(promised);
            self.failed("writing the journal in", &self.disk.path(""), &error)
        })?;
        self.volume().stage(&frame.header, &content, digest, place);
        Ok(())
    }

    /// Receives a commit frame; when this returns, the epoch is durable.
    pub fn commit(&self, frame: &Frame, signer: &[u8; PUBLIC_KEY_BYTES]) -> Result<Reply, Refusal> {
        let signed = SignedManifest::decode(&frame.body).map_err(malformed)?;
        let mut journal = self.journal();
        let step = self.volume().check_commit(&frame.header, &signed, Some(signer), self.verify)?;
        let drop_staged = match step {
            CommitStep::Repeat(reply) => return Ok(reply),
            CommitStep::Append { drop_staged } => drop_staged,
        };
        if drop_staged {
            self.drop_staged(&mut journal)?;
        }
        self.space.take(&*self.disk, frame.total_bytes(), 0)?;
        let path = self.disk.path("");
        let unwritten = |error| self.failed("writing the journal in", &path, &error);
        let unsynced = |error| self.stop("syncing the journal in", &path, &error);
        // The data first: a commit frame on disk proves that what it commits was durable.
        journal.begin_commit().map_err(unwritten)?;
        journal.sync().map_err(unsynced)?;
        journal.append(frame).map_err(unwritten)?;
        journal.sync().map_err(unsynced)?;
        // Frames, digest, chain and signature were checked, and all of it is durable: from here on
        // the epoch may be acknowledged, and the source may forget its taken bitmap.
        let end = journal.mark_committed();
        let mut volume = self.volume();
        volume.commit(&signed, frame.total_bytes(), end, self.clock.now_s());
        let reply = volume.committed_reply();
        drop(volume);
        let facts = &signed.manifest;
        tracing::debug!(server = %facts.server, volume = %facts.volume, epoch = facts.epoch.0,
            cut = %facts.cut_id, "epoch committed");
        Ok(reply)
    }

    fn drop_staged(&self, journal: &mut Journal) -> Result<(), Refusal> {
        journal
            .drop_staged()
            .map_err(|error| self.stop("truncating the journal in", &self.disk.path(""), &error))?;
        let promised = self.volume().drop_staged();
        if self.replica.is_file {
            self.space.give_back(promised);
        }
        Ok(())
    }

    /// The source gave up a cut: its staged part goes.
    pub fn give_up(&self, cut_id: CutId) -> Result<Reply, Refusal> {
        let mut journal = self.journal();
        let staged = self.volume().staged();
        self.volume().check_running()?;
        if staged.is_some_and(|(staged, _)| staged == cut_id) {
            self.drop_staged(&mut journal)?;
        }
        Ok(self.staged())
    }

    /// What of the next epoch has arrived.
    pub fn staged(&self) -> Reply {
        Reply::Staged(self.volume().staged())
    }

    /// Begins the first copy, or resumes it under the same id.
    pub fn copy_begin(&self, sync: SyncId) -> Result<Reply, Refusal> {
        let record = self.record_before_copied()?;
        let cursor = match record.copy {
            CopyRecord::Copying { sync: known, cursor } if known == sync => cursor,
            _ => 0,
        };
        let volume_bytes = record.volume_bytes;
        // The cursor first: what lies beyond it is void, also if the power goes in between.
        self.store(StateRecord { copy: CopyRecord::Copying { sync, cursor }, ..record })?;
        // A file is made to read as zero from there on, so that zeros need not travel
        // (`Welcome::reads_zero`).
        if self.replica.is_file && cursor < volume_bytes {
            let zeroed = self.replica.file.zero(cursor, volume_bytes - cursor);
            zeroed.map_err(|error| self.stop("zeroing", &self.replica.path, &error))?;
        }
        Ok(Reply::CopiedTo(cursor))
    }

    /// Receives a frame of the first copy, straight into the replica volume.
    pub fn copy_data(&self, frame: &Frame) -> Result<(), Refusal> {
        let record = self.record_before_copied()?;
        let CopyRecord::Copying { cursor, .. } = record.copy else {
            return Err(refuse(RefusalCode::OutOfOrder, "no first copy was begun"));
        };
        if frame.header.generation != record.generation {
            return Err(refuse(RefusalCode::OutOfOrder, "a first copy of another generation"));
        }
        let content = self.decode(frame)?;
        // What is durable below the cursor was counted as done, and is not touched again.
        if content.extents().first().is_some_and(|extent| extent.offset < cursor) {
            return Err(refuse(RefusalCode::OutOfOrder, "a copied range came again"));
        }
        if self.replica.is_file {
            self.space.take(&*self.disk, content.payload().len() as u64, 0)?;
        }
        for (extent, bytes) in content.parts() {
            let file = &self.replica.file;
            let written = match extent.kind {
                ExtentKind::Data => file.write_at(extent.offset, bytes),
                ExtentKind::Zero | ExtentKind::Discard => file.zero(extent.offset, extent.bytes),
            };
            written.map_err(|error| self.failed("writing", &self.replica.path, &error))?;
        }
        if let (Some(first), Some(last)) = (content.extents().first(), content.extents().last()) {
            self.replica.file.write_behind(first.offset, last.end() - first.offset);
        }
        Ok(())
    }

    /// Makes the first copy durable up to `upto`.
    pub fn copy_flush(&self, upto: u64) -> Result<Reply, Refusal> {
        let record = self.record_before_copied()?;
        match record.copy {
            CopyRecord::Copying { sync, cursor }
                if (cursor..=record.volume_bytes).contains(&upto) =>
            {
                self.sync_replica()?;
                let copy = CopyRecord::Copying { sync, cursor: upto };
                self.store(StateRecord { copy, ..record })?;
                Ok(Reply::CopiedTo(upto))
            }
            _ => Err(refuse(RefusalCode::OutOfOrder, "no first copy can be durable up to there")),
        }
    }

    /// The first copy is complete.
    pub fn copy_done(&self, sync: SyncId) -> Result<Reply, Refusal> {
        let record = self.volume().record().clone();
        let volume_bytes = record.volume_bytes;
        self.volume().check_running()?;
        match record.copy {
            CopyRecord::Copied { sync: known } if known == sync => {}
            CopyRecord::Copying { sync: known, .. } if known == sync => {
                self.sync_replica()?;
                self.store(StateRecord { copy: CopyRecord::Copied { sync }, ..record })?;
            }
            _ => return Err(refuse(RefusalCode::OutOfOrder, "another first copy is going on")),
        }
        Ok(Reply::CopiedTo(volume_bytes))
    }

    /// Digests of the newest committed state.
    pub fn digests(&self, offset: u64, bytes: u64, piece_bytes: u64) -> Result<Reply, Refusal> {
        // Up to the size that the session named: what lies beyond the durable one reads as zero.
        let volume_bytes = self.volume().bytes();
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= volume_bytes);
        if !inside || piece_bytes == 0 || bytes.div_ceil(piece_bytes) > limits::DIGESTS_MAX as u64 {
            return Err(refuse(RefusalCode::Malformed, "digests of an impossible range"));
        }
        let view = self.view()?;
        let digests = view
            .digests(offset, bytes, piece_bytes)
            .map_err(|error| self.stop("reading", &self.disk.path(""), &error))?;
        Ok(Reply::Digests(digests))
    }

    /// The newest committed state; good as long as no session commits more.
    pub fn view(&self) -> Result<View, Refusal> {
        let volume = self.volume();
        volume.check_running()?;
        Ok(View {
            replica: self.replica.file.clone(),
            layers: volume.layers(),
            upto: volume.durable().map_or(Epoch(0), |facts| facts.epoch),
            replica_bytes: volume.record().volume_bytes,
            volume_bytes: volume.durable_bytes(),
        })
    }

    /// The volume as it was at an epoch; good as long as nothing beyond that epoch is promoted and
    /// the epoch is kept. None if it is not here.
    pub fn view_at(&self, epoch: Epoch) -> Result<Option<View>, Refusal> {
        let view = self.view()?;
        let volume = self.volume();
        let begun = volume.record().promoting.map_or(Epoch(0), |promoting| promoting.to);
        let facts = volume.facts().find(|facts| facts.epoch == epoch && !facts.dropped);
        let facts = facts.filter(|_| epoch >= begun);
        Ok(facts.map(|facts| View { upto: epoch, volume_bytes: facts.volume_bytes, ..view }))
    }

    /// Makes a run of `layers`, which are neighbours and the oldest or the newest but the journal's
    /// last; see [`Merge`]. Whether it was done.
    pub(super) fn merge(
        &self,
        merge: &Merge<'_>,
        going: &dyn Fn() -> bool,
    ) -> Result<bool, Refusal> {
        let path = self.disk.path(HISTORY);
        let run = merge
            .run(&self.segments, going)
            .map_err(|error| self.failed("thinning in", &path, &error))?;
        let Some(run) = run else { return Ok(false) };
        let promised = self.volume().merged(Arc::new(run));
        if self.replica.is_file {
            self.space.give_back(promised);
        }
        Ok(true)
    }

    /// Lets go of the segments that nothing here reads any more.
    ///
    /// What goes is in no run and in no epoch in memory, and lies before the tail: what it held is
    /// in a synced replica under a durable base, or in a run that was durable before the volume had
    /// it, so neither this process nor the next one looks for it. What the session writes
    /// meanwhile lies behind the tail. Attacked by `target_history`.
    pub(super) fn let_go(&self) {
        let (needed, tail) = {
            let volume = self.volume();
            (volume.needed_segments(), volume.tail().segment)
        };
        self.segments
            .retain(|number| needed.contains(&number) || (number & KEPT == 0 && number >= tail));
    }

    fn decode(&self, frame: &Frame) -> Result<Content, Refusal> {
        Content::decode(&frame.body, self.volume().bytes()).map_err(malformed)
    }

    fn record_before_copied(&self) -> Result<StateRecord, Refusal> {
        let volume = self.volume();
        volume.check_running()?;
        if volume.copied() {
            return Err(refuse(
                RefusalCode::OutOfOrder,
                "the first copy is complete; the replica volume is never copied over",
            ));
        }
        Ok(volume.record().clone())
    }

    pub(super) fn sync_replica(&self) -> Result<(), Refusal> {
        let synced = self.replica.file.sync();
        synced.map_err(|error| self.stop("syncing", &self.replica.path, &error))
    }

    fn store(&self, record: StateRecord) -> Result<(), Refusal> {
        self.store_durably(&record)?;
        self.volume().set_record(record);
        Ok(())
    }

    /// Writes `state.json`; the caller installs it in the volume.
    pub(super) fn store_durably(&self, record: &StateRecord) -> Result<(), Refusal> {
        let path = self.disk.path(super::state::FILE);
        record.store(&*self.disk).map_err(|error| self.failed("writing", &path, &error))
    }
}

fn malformed(error: secondsite_format::FormatError) -> Refusal {
    refuse(RefusalCode::Malformed, error.to_string())
}

fn open_replica(
    disk: &dyn Disk,
    record: &StateRecord,
    device: Option<&Path>,
) -> Result<Replica, ReplicaError> {
    let before = Path::new(&record.replica);
    match device {
        Some(device) if device != before => Err(ReplicaError::Moved {
            before: record.replica.clone(),
            now: device.display().to_string(),
        }),
        _ if record.replica == replica::FILE => Replica::file(disk, record.volume_bytes),
        _ => Replica::device(before, record.volume_bytes),
    }
}

fn begin(disk: &dyn Disk, spec: &VolumeSpec) -> Result<(StateRecord, Replica), OpenError> {
    let (replica, name) = match &spec.device {
        Some(path) => (Replica::device(path, spec.volume_bytes)?, path.display().to_string()),
        None => (Replica::new_file(disk, spec.volume_bytes)?, replica::FILE.to_owned()),
    };
    let ids = (spec.server, spec.volume);
    let record = StateRecord::fresh(ids, spec.volume_bytes, spec.block_bytes, name);
    record.store(disk).map_err(|cause| OpenError::Io { operation: "writing state.json", cause })?;
    Ok((record, replica))
}
