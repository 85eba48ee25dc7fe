//! One volume of the target as a state machine: what may come next, and what there is.
//!
//! Pure: it decides before the journal is written ([`Volume::check_data`],
//! [`Volume::check_commit`]) and is told afterwards; opening a journal replays its frames through
//! the same checks. Invariants: epochs follow the base without gaps; one staged part at most, for
//! the epoch behind the newest durable one; what a check let through changes nothing until told;
//! along the line of epochs a volume never becomes smaller, and each has the size of its manifest.

use super::index::{EpochIndex, StagedFrame};
use super::journal::{FramePlace, Place};
use super::layers::Layer;
use super::run::Run;
use super::state::{CopyRecord, EpochFacts, Promoting, StateRecord};
use secondsite_format::extent::{Content, Extent};
use secondsite_format::frame::FrameHeader;
use secondsite_format::ids::{CutId, Epoch};
use secondsite_format::limits;
use secondsite_format::manifest::{EpochDigest, PUBLIC_KEY_BYTES, SIGNATURE_BYTES, SignedManifest};
use secondsite_format::message::{CopyState, PROTOCOL, Refusal, RefusalCode, Reply, Welcome};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Checks a signature: public key, bytes, signature.
pub type Verify = fn(&[u8; PUBLIC_KEY_BYTES], &[u8], &[u8; SIGNATURE_BYTES]) -> bool;

/// A refusal of this kind, for this reason.
pub fn refuse(code: RefusalCode, message: impl Into<String>) -> Refusal {
    Refusal { code, message: message.into() }
}

/// The refusal of a volume that has become smaller.
pub fn shrunk(before: u64, now: u64) -> Refusal {
    let message = format!(
        "the volume has {now} bytes, its newest recovery point {before}: a volume never becomes \
         smaller; replica and points stay as they are. Give the device at least {before} bytes \
         again, or end its replication with: secondsite unprotect"
    );
    refuse(RefusalCode::Mismatch, message)
}

/// A committed epoch that neither the replica nor a run holds yet.
#[derive(Debug, Clone)]
pub struct JournaledEpoch {
    /// Its manifest's facts.
    pub facts: Arc<EpochFacts>,
    /// Where its bytes lie.
    pub index: Arc<EpochIndex>,
    /// One past its commit frame.
    pub end: Place,
    /// Bytes of it in the journal.
    pub journal_bytes: u64,
    /// Bytes that promoting it writes at most.
    pub payload_bytes: u64,
}

/// The part of the next epoch that has arrived.
#[derive(Debug)]
struct Staged {
    cut_id: CutId,
    frames: Vec<StagedFrame>,
    digest: EpochDigest,
    journal_bytes: u64,
    payload_bytes: u64,
    /// One past the last byte of any extent.
    reaches: u64,
}

/// What to do with a data frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataStep {
    /// It is here already, the same bytes.
    Repeat,
    /// Append it; before that, drop what is staged of another cut.
    Append {
        /// Something of another cut is staged.
        drop_staged: bool,
    },
}

/// What to do with a commit frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommitStep {
    /// It is durable already: the same answer again.
    Repeat(Reply),
    /// Make it durable; before that, drop what is staged of another cut.
    Append {
        /// Something of another cut is staged.
        drop_staged: bool,
    },
}

/// See the module.
pub struct Volume {
    record: StateRecord,
    runs: Vec<Arc<Run>>,
    epochs: Vec<JournaledEpoch>,
    /// Of all epochs that are here, so that none comes twice.
    cuts: BTreeSet<CutId>,
    staged: Option<Staged>,
    stopped: Option<String>,
    /// The size that the session named; a smaller one than the durable size is never let in.
    named_bytes: u64,
}

impl Volume {
    /// From what `state.json` says; the journal's frames follow by [`Self::stage`] and
    /// [`Self::commit`].
    pub fn new(record: StateRecord) -> Self {
        let cuts = record.base.iter().map(|base| base.cut_id).collect();
        let (runs, epochs) = (Vec::new(), Vec::new());
        Self { record, runs, epochs, cuts, staged: None, stopped: None, named_bytes: 0 }
    }

    /// Size of the newest durable state, bytes.
    pub fn durable_bytes(&self) -> u64 {
        self.durable().map_or(self.record.volume_bytes, |facts| facts.volume_bytes)
    }

    /// Size that the next epoch is to have, bytes: the session's.
    pub fn bytes(&self) -> u64 {
        self.named_bytes.max(self.durable_bytes())
    }

    /// A session names the volume's size.
    pub fn name_bytes(&mut self, bytes: u64) -> Result<(), Refusal> {
        let durable = self.durable_bytes();
        if bytes < durable {
            return Err(shrunk(durable, bytes));
        }
        self.named_bytes = bytes;
        Ok(())
    }

    /// What `state.json` holds.
    pub fn record(&self) -> &StateRecord {
        &self.record
    }

    /// `state.json` holds this now, durably.
    pub fn set_record(&mut self, record: StateRecord) {
        self.record = record;
    }

    /// The newest committed epochs, oldest first: those that no run holds.
    pub fn epochs(&self) -> &[JournaledEpoch] {
        &self.epochs
    }

    /// What history is on disk, oldest first.
    pub fn runs(&self) -> &[Arc<Run>] {
        &self.runs
    }

    /// The runs that an opened volume has.
    pub fn set_runs(&mut self, runs: Vec<Arc<Run>>) {
        self.cuts.extend(runs.iter().flat_map(|run| &run.facts).map(|facts| facts.cut_id));
        self.runs = runs;
    }

    /// `run` holds now what the runs from `from` on and the oldest epochs of the journal held.
    pub fn merged(&mut self, run: Arc<Run>) -> u64 {
        let place =
            self.runs.iter().position(|old| old.from >= run.from).unwrap_or(self.runs.len());
        let count = self.runs[place..].iter().take_while(|old| old.to <= run.to).count();
        let epochs = self.epochs.iter().take_while(|epoch| epoch.facts.epoch <= run.to).count();
        for old in self.runs.splice(place..place + count, [run.clone()]) {
            // One of the same epochs gave its name to the new one.
            if (old.from, old.to) != (run.from, run.to) {
                old.doom();
            }
        }
        self.epochs.drain(..epochs).map(|epoch| epoch.payload_bytes).sum()
    }

    /// Everything over the replica, oldest first.
    pub fn layers(&self) -> Vec<Layer> {
        let runs = self.runs.iter().cloned().map(Layer::Run);
        let epoch = |e: &JournaledEpoch| Layer::Epoch(e.facts.epoch, e.index.clone());
        runs.chain(self.epochs.iter().map(epoch)).collect()
    }

    /// The facts of all epochs that are here, rising: the base, the runs', the journal's.
    pub fn facts(&self) -> impl Iterator<Item = Arc<EpochFacts>> {
        let base = self.record.base.clone().map(Arc::new);
        let above = self.record.base.as_ref().map_or(Epoch(0), |base| base.epoch);
        let runs = self.runs.iter().flat_map(|run| &run.facts).cloned();
        let later = runs.chain(self.epochs.iter().map(|epoch| epoch.facts.clone()));
        base.into_iter().chain(later.filter(move |facts| facts.epoch > above))
    }

    /// The newest durable epoch's facts.
    pub fn durable(&self) -> Option<&EpochFacts> {
        let run = self.runs.last().map(|run| &**run.last());
        self.epochs.last().map(|epoch| &*epoch.facts).or(run).or(self.record.base.as_ref())
    }

    fn durable_epoch(&self) -> Epoch {
        self.durable().map_or(Epoch(0), |facts| facts.epoch)
    }

    fn chain(&self) -> [u8; 32] {
        self.durable().map_or([0; 32], |facts| facts.chain)
    }

    /// Why nothing more is done here, if so.
    pub fn stopped(&self) -> Option<&str> {
        self.stopped.as_deref()
    }

    /// Nothing more is done here until the target is started again.
    pub fn stop(&mut self, why: String) {
        self.stopped.get_or_insert(why);
    }

    /// Bytes of the journal that are not promoted, with the staged part.
    pub fn journal_bytes(&self) -> u64 {
        let staged = self.staged.as_ref().map_or(0, |staged| staged.journal_bytes);
        let uses = self.runs.iter().flat_map(|run| &run.uses);
        let files: BTreeMap<u64, u64> = uses.map(|row| (row.number, row.file_bytes)).collect();
        let epochs: u64 = self.epochs.iter().map(|epoch| epoch.journal_bytes).sum();
        files.values().sum::<u64>() + epochs + staged
    }

    /// What a new session is told.
    pub fn welcome(&self, replica_is_file: bool) -> Welcome {
        let durable = self.durable();
        Welcome {
            protocol: PROTOCOL,
            generation: self.record.generation,
            copy: match self.record.copy {
                CopyRecord::Empty => CopyState::Empty,
                CopyRecord::Copying { sync, cursor } => CopyState::Copying { sync, cursor },
                CopyRecord::Copied { .. } => CopyState::Copied,
            },
            durable: durable.map_or((Epoch(0), CutId::NONE), |facts| (facts.epoch, facts.cut_id)),
            chain: self.chain(),
            staged: self.staged(),
            // A file reads as zero from the cursor on whenever a first copy begins or resumes
            // (see `Keeper::copy_begin`); of a device nobody knows what it held before.
            reads_zero: replica_is_file && !self.copied(),
        }
    }

    /// The first copy is complete.
    pub fn copied(&self) -> bool {
        matches!(self.record.copy, CopyRecord::Copied { .. })
    }

    /// The staged part's cut and the next `seq` it lacks.
    pub fn staged(&self) -> Option<(CutId, u32)> {
        self.staged.as_ref().map(|staged| (staged.cut_id, staged.digest.frames()))
    }

    /// Whether anything goes on here at all.
    pub fn check_running(&self) -> Result<(), Refusal> {
        match &self.stopped {
            Some(why) => Err(refuse(RefusalCode::Storage, why.clone())),
            None => Ok(()),
        }
    }

    /// What epoch and cut a frame may have.
    fn check_place(&self, header: &FrameHeader) -> Result<(), Refusal> {
        self.check_running()?;
        if !self.copied() {
            return Err(refuse(
                RefusalCode::OutOfOrder,
                "an epoch came before the first copy was complete",
            ));
        }
        let due = self.durable_epoch().next();
        if header.generation != self.record.generation || header.epoch != due {
            return Err(refuse(
                RefusalCode::OutOfOrder,
                format!(
                    "epoch {} of generation {} came where epoch {due} of generation {} is due",
                    header.epoch, header.generation, self.record.generation
                ),
            ));
        }
        if header.cut_id.is_none() || self.cuts.contains(&header.cut_id) {
            return Err(refuse(
                RefusalCode::OutOfOrder,
                format!("cut id {} of epoch {due} is none or was used before", header.cut_id),
            ));
        }
        Ok(())
    }

    /// What to do with a data frame whose content and its digest are these.
    pub fn check_data(
        &self,
        header: &FrameHeader,
        content: &Content,
        digest: &[u8; 32],
    ) -> Result<DataStep, Refusal> {
        self.check_place(header)?;
        if header.offset != content.extents().first().map_or(0, |extent| extent.offset) {
            return Err(refuse(
                RefusalCode::Malformed,
                "a frame's offset is not that of its first extent",
            ));
        }
        let staged = self.staged.as_ref().filter(|staged| staged.cut_id == header.cut_id);
        let next = staged.map_or(0, |staged| staged.digest.frames());
        if header.seq < next {
            let staged = staged.expect("next is above zero only with a staged part");
            let before = &staged.frames[header.seq as usize];
            return if before.digest == *digest && before.pass == header.pass {
                Ok(DataStep::Repeat)
            } else {
                Err(refuse(
                    RefusalCode::OutOfOrder,
                    format!(
                        "frame {} of epoch {} came twice and differs",
                        header.seq, header.epoch
                    ),
                ))
            };
        }
        if header.seq > next {
            return Err(refuse(
                RefusalCode::OutOfOrder,
                format!("frame {} of epoch {} came where {next} is due", header.seq, header.epoch),
            ));
        }
        Ok(DataStep::Append { drop_staged: staged.is_none() && self.staged.is_some() })
    }

    /// A data frame that [`Self::check_data`] let through was appended there.
    pub fn stage(
        &mut self,
        header: &FrameHeader,
        content: &Content,
        digest: [u8; 32],
        place: FramePlace,
    ) {
        let staged = self.staged.get_or_insert_with(|| Staged {
            cut_id: header.cut_id,
            frames: Vec::new(),
            digest: EpochDigest::default(),
            journal_bytes: 0,
            payload_bytes: 0,
            reaches: 0,
        });
        staged.digest.add(&digest);
        staged.reaches = content.extents().last().map_or(0, Extent::end).max(staged.reaches);
        staged.journal_bytes += u64::from(place.bytes);
        staged.payload_bytes += content.payload().len() as u64;
        let extents = content.extents().to_vec();
        staged.frames.push(StagedFrame { place, pass: header.pass, extents, digest });
    }

    /// The staged part is gone; returns the bytes that promoting it would have written.
    pub fn drop_staged(&mut self) -> u64 {
        self.staged.take().map_or(0, |staged| staged.payload_bytes)
    }

    /// What to do with a commit frame; `signer` is the key of the session's certificate, or none
    /// when the journal is opened again (the key may have been renewed since).
    pub fn check_commit(
        &self,
        header: &FrameHeader,
        signed: &SignedManifest,
        signer: Option<&[u8; PUBLIC_KEY_BYTES]>,
        verify: Verify,
    ) -> Result<CommitStep, Refusal> {
        self.check_running()?;
        let manifest = &signed.manifest;
        let unproven = |what: &str| {
            let message = format!("manifest of epoch {}: {what}", manifest.epoch);
            Err(refuse(RefusalCode::Unproven, message))
        };
        if (header.generation, header.epoch, header.cut_id)
            != (manifest.generation, manifest.epoch, manifest.cut_id)
        {
            return unproven("it belongs to another epoch than its frame says");
        }
        if (manifest.server, manifest.volume) != (self.record.server, self.record.volume) {
            return unproven("it belongs to another volume");
        }
        if signer.is_some_and(|key| *key != signed.public_key) {
            return unproven("it is not signed with the key of the session's certificate");
        }
        if !verify(&signed.public_key, &signed.signed_bytes, &signed.signature) {
            return unproven("its signature is wrong");
        }
        if let Some(durable) = self.durable()
            && (durable.epoch, durable.cut_id) == (manifest.epoch, manifest.cut_id)
            && manifest.generation == self.record.generation
        {
            return Ok(CommitStep::Repeat(self.committed_reply()));
        }
        self.check_place(header)?;
        // The growth of a volume is durable by this commit and by nothing else. What a journal
        // holds was checked against its session when it came.
        let fits = match signer {
            Some(_) => manifest.volume_bytes == self.bytes(),
            None => manifest.volume_bytes >= self.durable_bytes(),
        };
        if !fits || manifest.volume_bytes > limits::VOLUME_BYTES_MAX {
            return unproven("the volume has another size");
        }
        if manifest.previous != self.chain() {
            return unproven("it does not continue the chain of manifests");
        }
        let staged = self.staged.as_ref().filter(|staged| staged.cut_id == manifest.cut_id);
        let digest = staged.map_or_else(EpochDigest::default, |staged| staged.digest.clone());
        if digest.frames() != manifest.frames {
            return unproven(&format!(
                "it counts {} frames, {} are here",
                manifest.frames,
                digest.frames()
            ));
        }
        if digest.finish() != manifest.content {
            return unproven("the frames' digest is another");
        }
        if staged.is_some_and(|staged| staged.reaches > manifest.volume_bytes) {
            return unproven("a frame reaches beyond the volume");
        }
        Ok(CommitStep::Append { drop_staged: staged.is_none() && self.staged.is_some() })
    }

    /// The commit frame that [`Self::check_commit`] let through is durable; it ends at `end`.
    pub fn commit(&mut self, signed: &SignedManifest, frame_bytes: u64, end: Place, stamp_s: u64) {
        let staged = self.staged.take();
        let frames = staged.as_ref().map_or(&[][..], |staged| &staged.frames);
        let epoch = JournaledEpoch {
            facts: Arc::new(EpochFacts::of(signed, stamp_s)),
            index: Arc::new(EpochIndex::build(signed.manifest.epoch, frames)),
            end,
            journal_bytes: staged.as_ref().map_or(0, |staged| staged.journal_bytes) + frame_bytes,
            payload_bytes: staged.as_ref().map_or(0, |staged| staged.payload_bytes),
        };
        self.cuts.insert(epoch.facts.cut_id);
        self.epochs.push(epoch);
    }

    /// The answer to the newest commit.
    ///
    /// # Panics
    /// If nothing was committed yet.
    pub fn committed_reply(&self) -> Reply {
        let facts = self.durable().expect("asked only after a commit");
        Reply::Committed {
            generation: self.record.generation,
            epoch: facts.epoch,
            cut_id: facts.cut_id,
            chain: facts.chain,
        }
    }

    /// What promoting up to `wanted` takes: the state to store first, and the facts of the epoch
    /// that the replica will be. A promotion that was interrupted goes at least as far as it wanted
    /// to, because the replica may already hold bytes of all of its epochs. None if there is
    /// nothing to promote.
    pub fn plan_promotion(&self, wanted: Epoch) -> Option<(StateRecord, Arc<EpochFacts>)> {
        let to = self.record.promoting.map_or(wanted, |begun| begun.to.max(wanted));
        let from = self.record.base.as_ref().map_or(Epoch(0), |base| base.epoch);
        let last = self.facts().take_while(|facts| facts.epoch <= to).last()?;
        if last.epoch <= from {
            return None;
        }
        let promoting = Some(Promoting { from, to: last.epoch });
        Some((StateRecord { promoting, ..self.record.clone() }, last))
    }

    /// Where what lies behind an epoch begins in the journal, or in the newest run that holds it.
    pub fn end_of(&self, epoch: Epoch) -> Place {
        let run = self.runs.iter().find(|run| run.to >= epoch).map(|run| run.end);
        let journaled = self.epochs.iter().find(|journaled| journaled.facts.epoch == epoch);
        run.or(journaled.map(|journaled| journaled.end)).unwrap_or(self.record.tail)
    }

    /// `record` is durable and its base is in the replica; what the replica holds goes. Returns the
    /// bytes that the promotion of the journal's epochs was reckoned with.
    pub fn promoted(&mut self, record: StateRecord) -> u64 {
        let base = record.base.as_ref().map_or(Epoch(0), |base| base.epoch);
        let count = self.epochs.iter().take_while(|epoch| epoch.facts.epoch <= base).count();
        let runs = self.runs.iter().take_while(|run| run.to <= base).count();
        self.runs.drain(..runs).for_each(|run| run.doom());
        self.record = record;
        self.epochs.drain(..count).map(|epoch| epoch.payload_bytes).sum()
    }

    /// Segments that something here still reads or goes on in.
    pub fn needed_segments(&self) -> BTreeSet<u64> {
        let runs = self.runs.iter().flat_map(|run| run.uses.iter().map(|row| row.number));
        let epochs = self.epochs.iter().flat_map(|epoch| epoch.index.segments());
        runs.chain(epochs.map(|segment| segment.number)).collect()
    }

    /// Where the journal's first frame behind everything promoted or in a run is.
    pub fn tail(&self) -> Place {
        self.runs.last().map_or(self.record.tail, |run| run.end)
    }
}
