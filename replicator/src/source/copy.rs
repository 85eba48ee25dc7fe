//! The first copy: straight into the replica volume, from the target's cursor.
//!
//! What is written meanwhile is marked by the tracker and travels as epoch 1. The cursor is the
//! target's, after an fsync; the source only proposes it, when everything below was sent.

use crate::source::compare::Compare;
use crate::source::pipeline::Purpose;
use crate::source::seams::LinkError;
use crate::source::ship::mark_all;
use crate::source::shipper::{Shipper, StepError, Work};
use crate::source::stream::encode;
use secondsite_control::api::VolumePhase;
use secondsite_control::codes::Reason;
use secondsite_format::frame::{Frame, FrameHeader, FrameKind};
use secondsite_format::ids::{CutId, Epoch, SyncId};
use secondsite_format::message::{Reply, Request};
use std::time::Duration;

/// Bytes that are read and sent in one step.
const STEP_BYTES: u64 = 64 << 20;
/// The target makes durable what was sent after so long, or so many bytes: what a broken connection
/// costs at most.
const FLUSH_EVERY: Duration = Duration::from_secs(2);
const FLUSH_EVERY_BYTES: u64 = 512 << 20;

/// A first copy under way.
pub struct Copy {
    sync: SyncId,
    /// Sent up to here.
    sent: u64,
    /// Asked to be durable up to here, and when.
    at: u64,
    flushed: Duration,
    seq: u32,
    compare_below: u64,
}

impl Shipper {
    pub(super) fn begin_copy(
        &mut self,
        sync: Option<SyncId>,
        from: u64,
        compare_below: u64,
    ) -> Result<(), StepError> {
        self.volume.control().ready = None;
        self.compare = None;
        if compare_below > 0 {
            // The audit begins anew before anything is read under the doubt.
            self.rebase();
        }
        let sync = sync.unwrap_or_else(|| SyncId(self.commons.env.random()));
        let at = copied_to(self.ask(&Request::CopyBegin { sync })?)?;
        if at > from {
            return Err(LinkError::Nonsense("a first copy begins beyond its cursor").into());
        }
        if let Some(session) = &mut self.session {
            let flushed = self.commons.env.now();
            session.work = Work::Copy(Copy { sync, sent: at, at, flushed, seq: 0, compare_below });
        }
        self.copy_progress(at);
        Ok(())
    }

    fn copy_progress(&self, at: u64) {
        let total = self.volume.shape.volume_bytes;
        self.volume.face.update(|status| {
            status.phase = VolumePhase::FirstCopy;
            status.progress = Some((at, total));
            status.code = Some(Reason::FirstCopyRunning);
            status.reason =
                "the first copy is on its way; there is a recovery point when it is complete"
                    .into();
        });
    }

    pub(super) fn copy_step(&mut self) -> Result<(), StepError> {
        let volume = self.volume.clone();
        let commons = self.commons.clone();
        let total = volume.shape.volume_bytes;
        let Some(session) = &mut self.session else { return Ok(()) };
        let Work::Copy(copy) = &mut session.work else { return Ok(()) };
        let (sync, from, compare_below) = (copy.sync, copy.sent, copy.compare_below);
        if from >= total {
            if copied_to(self.ask(&Request::CopyDone { sync })?)? != total {
                return Err(LinkError::Nonsense("a first copy ended elsewhere").into());
            }
            if compare_below > 0 {
                self.compare = Some(Compare::new(compare_below));
            }
            self.followed();
            return Ok(());
        }
        let upto = (from + STEP_BYTES).min(total);
        let runs = volume.shape.copied(from, upto - from);
        let purpose = Purpose::FirstCopy { skip_zeros: session.reads_zero };
        let generation = session.generation;
        let link = &mut session.link;
        let mut bench = volume.bench();
        encode(
            bench.disk.as_mut(),
            &commons,
            &volume,
            &runs,
            purpose,
            |_| {},
            |encoded| {
                for (offset, bytes) in &encoded.unreadable {
                    // Left out here, tried again as part of epoch 1.
                    mark_all(volume.marks(), &[volume.shape.run(*offset, *bytes)]);
                    if let Some(shared) = volume.tracker.filtered() {
                        shared.marked_beside();
                    }
                }
                if let Some((body, _)) = encoded.body {
                    let header = FrameHeader {
                        kind: FrameKind::SyncData,
                        generation,
                        epoch: Epoch(0),
                        cut_id: CutId::NONE,
                        pass: 0,
                        seq: copy.seq,
                        offset: encoded.offset,
                    };
                    copy.seq += 1;
                    let frame = Frame::new(header, body);
                    link.send(&frame)?;
                    volume.face.update(|status| status.sent_bytes += frame.total_bytes());
                }
                Ok(())
            },
        )?;
        drop(bench);
        copy.sent = upto;
        let now = commons.env.now();
        if upto == total || now >= copy.flushed + FLUSH_EVERY || upto >= copy.at + FLUSH_EVERY_BYTES
        {
            (copy.at, copy.flushed) = (upto, now);
            if copied_to(self.ask(&Request::CopyFlush { upto })?)? != upto {
                return Err(LinkError::Nonsense("a first copy is durable elsewhere").into());
            }
        }
        self.copy_progress(upto);
        Ok(())
    }
}

fn copied_to(reply: Reply) -> Result<u64, StepError> {
    match reply {
        Reply::CopiedTo(at) => Ok(at),
        _ => Err(LinkError::Nonsense("a first copy was answered with something else").into()),
    }
}
