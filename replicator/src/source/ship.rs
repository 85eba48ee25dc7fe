//! Passes, barriers and commits: how an epoch reaches the target.
//!
//! A block is in exactly one of these while its epoch is under way: live; taken, with its frame in
//! the ledger; taken, with its bytes held in memory. Whatever ends a pass early marks live again
//! what it had taken and not recorded.

use crate::source::ledger::Ledger;
use crate::source::pipeline::Purpose;
use crate::source::runs::{merge, subtract};
use crate::source::seams::{Batch, LinkError};
use crate::source::shipper::{Session, Shipper, StepError};
use crate::source::stream::{encode, encode_batches};
use crate::source::volume::{Bench, Verdict};
use secondsite_control::codes::Reason;
use secondsite_format::frame::{Frame, FrameHeader, FrameKind};
use secondsite_format::ids::Epoch;
use secondsite_format::limits::UNREADABLE_MAX;
use secondsite_format::manifest::{Consistency, CutMethod, Manifest, SignedManifest};
use secondsite_format::message::{Message, Reply, Request};
use secondsite_tracker::marks::{BlockRun, Marks};

/// Blocks that one take moves at most; each take is a pass of its own, so that no block stands
/// twice in a pass.
const TAKE_BLOCKS_MAX: u64 = 1 << 16;
/// A barrier is asked for when this much was sent since the last.
const UNCONFIRMED_BYTES_MAX: u64 = 64 << 20;
/// Or this many frames: what the ledger remembers of them is bounded, too.
const UNCONFIRMED_FRAMES_MAX: u32 = 1024;

impl Shipper {
    /// One pre-copy pass: what a failed last pass holds, then what is live now.
    pub(super) fn pass(&mut self) -> Result<(), StepError> {
        self.begin_ledger();
        let volume = self.volume.clone();
        let mut bench = volume.bench();
        bench.disk.check()?;
        let held = std::mem::take(&mut bench.held);
        self.send_held(&mut bench, held)?;
        // What is written during the pass is the next pass's.
        let mut quota = volume.marks().live_count();
        while quota > 0 {
            let mut runs = Vec::new();
            let taken = volume.marks().take(TAKE_BLOCKS_MAX.min(quota), &mut runs);
            if taken == 0 {
                break;
            }
            quota = quota.saturating_sub(taken);
            bench.pass += 1;
            self.send_runs(&mut bench, &volume.shape.included(&runs), |_| {})?;
        }
        Ok(())
    }

    /// Reads and sends taken runs under the current pass; `read` sees each batch first.
    pub(super) fn send_runs(
        &mut self,
        bench: &mut Bench,
        runs: &[BlockRun],
        read: impl FnMut(&mut Batch),
    ) -> Result<(), StepError> {
        let volume = self.volume.clone();
        let commons = self.commons.clone();
        let mut recorded: Vec<BlockRun> = Vec::new();
        if let Some(verify) = &mut self.verify {
            verify.held(runs);
        }
        let Bench { disk, pass, unreadable, .. } = bench;
        let result =
            encode(disk.as_mut(), &commons, &volume, runs, Purpose::Epoch, read, |encoded| {
                let (session, ledger) = self.parts()?;
                if let Some((body, digest)) = encoded.body {
                    let frame = data_frame(session, ledger, *pass, encoded.offset, body);
                    // Recorded before it is sent: a frame that may have arrived has its number.
                    ledger.record(digest, frame.total_bytes(), encoded.runs.clone());
                    recorded.extend(encoded.runs);
                    note_unreadable(unreadable, encoded.unreadable);
                    session.link.send(&frame)?;
                    let bytes = frame.total_bytes();
                    volume.face.update(|status| status.sent_bytes += bytes);
                    let sent = ledger.sent();
                    if ledger.unconfirmed_bytes() > UNCONFIRMED_BYTES_MAX
                        || sent.sent - sent.confirmed > UNCONFIRMED_FRAMES_MAX
                    {
                        confirm(session, ledger)?;
                    }
                } else {
                    // Nothing of it could be read; its bits return before the manifest is signed.
                    recorded.extend(encoded.runs);
                    note_unreadable(unreadable, encoded.unreadable);
                }
                Ok(())
            });
        if result.is_err() {
            recorded.sort_unstable();
            mark_all(volume.marks(), &subtract(runs, &merge(recorded)));
        }
        result
    }

    /// Sends what failed last passes hold as ordinary frames of their passes.
    pub(super) fn send_held(
        &mut self,
        bench: &mut Bench,
        held: Vec<Batch>,
    ) -> Result<(), StepError> {
        let volume = self.volume.clone();
        let commons = self.commons.clone();
        // By batch, not by block: a block may stand in several, and each must be recorded.
        let mut missing: Vec<(u64, Vec<BlockRun>)> =
            held.iter().map(|batch| (batch.tag, runs_of(&volume.shape, batch).collect())).collect();
        let result = encode_batches(&commons.workers, &volume, held, |encoded| {
            let (session, ledger) = self.parts()?;
            note_unreadable(&mut bench.unreadable, encoded.unreadable);
            if let Some((body, digest)) = encoded.body {
                let pass = encoded.tag as u32;
                let frame = data_frame(session, ledger, pass, encoded.offset, body);
                ledger.record(digest, frame.total_bytes(), encoded.runs.clone());
                missing.retain(|(tag, runs)| (*tag, runs) != (encoded.tag, &encoded.runs));
                session.link.send(&frame)?;
            }
            Ok(())
        });
        if result.is_err() {
            missing.iter().for_each(|(_, runs)| mark_all(volume.marks(), runs));
        }
        result
    }

    fn parts(&mut self) -> Result<(&mut Session, &mut Ledger), StepError> {
        let (Some(session), Some(ledger)) = (&mut self.session, &mut self.ledger) else {
            return Err(LinkError::Nonsense("no session").into());
        };
        Ok((session, ledger))
    }

    /// Makes sure that everything sent so far is staged.
    pub(super) fn barrier(&mut self) -> Result<(), StepError> {
        self.begin_ledger();
        let (session, ledger) = self.parts()?;
        confirm(session, ledger)
    }

    /// The ledger of the cut that the coordinator began.
    pub(super) fn begin_ledger(&mut self) {
        let begun = self.volume.control().cut;
        if let Some(cut_id) = begun
            && self.ledger.as_ref().is_none_or(|ledger| ledger.cut_id() != cut_id)
        {
            self.ledger = Some(Ledger::new(Epoch(self.volume.marks().cut().epoch), cut_id));
        }
    }

    /// Sends the last pass, signs, commits.
    pub(super) fn ship(&mut self, verdict: &Verdict) -> Result<(), StepError> {
        self.begin_ledger();
        let volume = self.volume.clone();
        if self.ledger.as_ref().is_some_and(|ledger| ledger.commit.is_none()) {
            self.encode_last_pass()?;
            self.sign(verdict)?;
        }
        let (session, ledger) = self.parts()?;
        // After a reconnect the target has staged some of these: a repeat is sent only from the
        // first that it lacks, which `rewind` has confirmed.
        let from = ledger.sent().confirmed;
        for frame in ledger.kept_from(from) {
            session.link.send(frame)?;
        }
        let commit = ledger.commit.clone().ok_or(LinkError::Nonsense("nothing to commit"))?;
        let (epoch, cut_id) = (ledger.epoch(), ledger.cut_id());
        let sent = ledger.kept_from(from).map(Frame::total_bytes).sum::<u64>();
        volume.face.update(|status| status.sent_bytes += sent);
        match self.ask_frame(&commit)? {
            Reply::Committed { generation, epoch: e, cut_id: c, chain }
                if generation == commit.header.generation && e == epoch && c == cut_id =>
            {
                volume.face.update(|status| {
                    status.cut = match verdict.method {
                        CutMethod::Compare => "compare",
                        CutMethod::Quiet => "quiet",
                        CutMethod::Freeze => "freeze",
                        CutMethod::Hold => "hold",
                        CutMethod::Unproven => "unproven",
                    };
                });
                self.committed((epoch, cut_id), chain);
                self.followed();
                Ok(())
            }
            _ => Err(LinkError::Nonsense("another epoch was committed than the one sent").into()),
        }
    }

    /// Makes frames of the last pass and keeps them until the commit is acknowledged.
    fn encode_last_pass(&mut self) -> Result<(), StepError> {
        let volume = self.volume.clone();
        let commons = self.commons.clone();
        let mut bench = volume.bench();
        let held = std::mem::take(&mut bench.held);
        if let Some(verify) = &mut self.verify {
            held.iter().for_each(|batch| {
                verify.held(&runs_of(&volume.shape, batch).collect::<Vec<_>>());
            });
        }
        encode_batches(&commons.workers, &volume, held, |encoded| {
            let (session, ledger) = self.parts()?;
            note_unreadable(&mut bench.unreadable, encoded.unreadable);
            if let Some((body, digest)) = encoded.body {
                let pass = encoded.tag as u32;
                let frame = data_frame(session, ledger, pass, encoded.offset, body);
                ledger.keep(digest, frame);
            }
            Ok(())
        })
    }

    /// Signs the manifest.
    fn sign(&mut self, verdict: &Verdict) -> Result<(), StepError> {
        let volume = self.volume.clone();
        let chain = self.chain;
        let commons = self.commons.clone();
        let (session, ledger) = self.parts()?;
        let cut = volume.marks().cut();
        if !cut.stands || cut.cut_id != ledger.cut_id().0 {
            return Err(StepError::GiveUp(
                "the cut no longer stood when it was to be signed".into(),
            ));
        }
        let unreadable = volume.bench().unreadable.clone();
        for (offset, bytes) in &unreadable {
            // Before anything is signed, so that no crash after the commit can lose these bits:
            // the epoch lacks them, and the next one tries again.
            volume.marks().mark(volume.shape.run(*offset, *bytes));
        }
        let (frames, content) = ledger.totals();
        if let Some((offset, bytes)) = unreadable.first() {
            let (count, path) = (unreadable.len(), volume.path.display());
            volume.face.update(|status| {
                let why = format!(
                    "{path}: {count} range(s) cannot be read, the first at byte {offset} ({bytes} bytes): points lack them and are fuzzy; they are tried again with every epoch, check the disk"
                );
                status.fuzzy = Some((Reason::BlocksUnreadable, why));
            });
        }
        let exact = unreadable.is_empty() && verdict.consistency != Consistency::Fuzzy;
        {
            let mut control = volume.control();
            control.exact = exact;
            control.signed_ns = Some(verdict.cut_time_ns);
        }
        let manifest = Manifest {
            server: commons.server,
            volume: volume.id(),
            volume_bytes: volume.shape.volume_bytes,
            generation: session.generation,
            epoch: ledger.epoch(),
            cut_id: ledger.cut_id(),
            cut_time_ns: verdict.cut_time_ns,
            consistency: if exact { verdict.consistency } else { Consistency::Fuzzy },
            method: verdict.method,
            previous: chain,
            frames,
            content,
            // Every exact point rests on an audit at its own cut, over all writes until then; a
            // gap found later concerns writes after it. So none ever loses "exact".
            doubt_from: Epoch(0),
            members: verdict.members.clone(),
            lacking: verdict.lacking.clone(),
            unreadable,
        };
        let bytes = manifest.encode();
        let (public_key, signature) = commons.signer.sign(&bytes).map_err(|error| {
            StepError::GiveUp(format!("the manifest cannot be signed: {error}"))
        })?;
        let signed = SignedManifest { manifest, signed_bytes: bytes, signature, public_key };
        let header = FrameHeader {
            kind: FrameKind::Commit,
            generation: session.generation,
            epoch: ledger.epoch(),
            cut_id: ledger.cut_id(),
            pass: 0,
            seq: frames,
            offset: 0,
        };
        ledger.commit = Some(Frame::new(header, signed.encode()));
        Ok(())
    }
}

/// Asks how much is staged; anything but all of it ends the session, and the reconnect sorts it out.
fn confirm(session: &mut Session, ledger: &mut Ledger) -> Result<(), StepError> {
    let sent = ledger.sent();
    let staged = match session.link.ask(&Request::Barrier.to_frame())? {
        Reply::Staged(Some((cut_id, next))) if cut_id == sent.cut_id => next,
        Reply::Staged(None) => 0,
        _ => return Err(LinkError::Nonsense("the barrier names another cut").into()),
    };
    if staged != sent.sent {
        return Err(LinkError::Nonsense("the target lacks frames that were sent").into());
    }
    ledger.confirm(staged);
    Ok(())
}

fn data_frame(session: &Session, ledger: &Ledger, pass: u32, offset: u64, body: Vec<u8>) -> Frame {
    let header = FrameHeader {
        kind: FrameKind::Data,
        generation: session.generation,
        epoch: ledger.epoch(),
        cut_id: ledger.cut_id(),
        pass,
        seq: ledger.next_seq(),
        offset,
    };
    Frame::new(header, body)
}

/// The blocks that a batch stands for.
pub(super) fn runs_of<'a>(
    shape: &'a crate::source::runs::Shape,
    batch: &'a Batch,
) -> impl Iterator<Item = BlockRun> + 'a {
    batch.pieces.iter().map(|piece| shape.run(piece.offset, piece.bytes as u64))
}

pub(super) fn mark_all(marks: &Marks, runs: &[BlockRun]) {
    runs.iter().for_each(|run| marks.mark(*run));
}

/// Adds ranges, joined; when there are too many, the last one covers what remains.
pub(super) fn note_unreadable(all: &mut Vec<(u64, u64)>, new: Vec<(u64, u64)>) {
    all.extend(new);
    all.sort_unstable();
    all.dedup_by(|next, last| {
        let joins = next.0 <= last.0 + last.1;
        if joins {
            last.1 = last.1.max(next.0 + next.1 - last.0);
        }
        joins
    });
    if all.len() > UNREADABLE_MAX {
        let end = all.last().map_or(0, |range| range.0 + range.1);
        all.truncate(UNREADABLE_MAX);
        if let Some(last) = all.last_mut() {
            last.1 = end - last.0;
        }
    }
}
