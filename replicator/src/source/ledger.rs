//! The frames of the epoch being shipped: which were sent, which the target is known to have, and
//! what to do about the rest after a reconnect. Pure, bounded by the barriers.

use crate::source::resume::Sent;
use secondsite_format::frame::Frame;
use secondsite_format::ids::{CutId, Epoch};
use secondsite_format::manifest::EpochDigest;
use secondsite_tracker::marks::BlockRun;
use std::collections::VecDeque;

/// A frame that was sent and is not known to be staged.
struct Unconfirmed {
    digest: [u8; 32],
    bytes: u64,
    runs: Vec<BlockRun>,
}

/// One epoch's frames.
pub struct Ledger {
    cut_id: CutId,
    epoch: Epoch,
    /// Over all confirmed frames.
    digest: EpochDigest,
    unconfirmed: VecDeque<Unconfirmed>,
    unconfirmed_bytes: u64,
    /// Frames of the last pass by `seq`: in memory until the epoch is committed, because what
    /// they hold can never be read again.
    kept: Vec<Frame>,
    /// The commit frame, once signed: sent again as it is.
    pub commit: Option<Frame>,
}

impl Ledger {
    /// Begins with nothing sent.
    pub fn new(epoch: Epoch, cut_id: CutId) -> Self {
        Self {
            cut_id,
            epoch,
            digest: EpochDigest::default(),
            unconfirmed: VecDeque::new(),
            unconfirmed_bytes: 0,
            kept: Vec::new(),
            commit: None,
        }
    }

    /// The cut.
    pub fn cut_id(&self) -> CutId {
        self.cut_id
    }

    /// The epoch's number.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// How far it is.
    pub fn sent(&self) -> Sent {
        Sent { cut_id: self.cut_id, confirmed: self.digest.frames(), sent: self.next_seq() }
    }

    /// The next frame's `seq`.
    pub fn next_seq(&self) -> u32 {
        self.digest.frames() + self.unconfirmed.len() as u32
    }

    /// Bytes sent and not known to be staged.
    pub fn unconfirmed_bytes(&self) -> u64 {
        self.unconfirmed_bytes
    }

    /// Records a pre-copy frame as sent under [`Self::next_seq`].
    pub fn record(&mut self, digest: [u8; 32], bytes: u64, runs: Vec<BlockRun>) {
        self.unconfirmed.push_back(Unconfirmed { digest, bytes, runs });
        self.unconfirmed_bytes += bytes;
    }

    /// Records a frame of the last pass, which is kept.
    pub fn keep(&mut self, digest: [u8; 32], frame: Frame) {
        debug_assert_eq!(frame.header.seq, self.next_seq());
        self.kept.push(frame);
        self.record(digest, 0, Vec::new());
    }

    /// The target has staged everything below `next`.
    pub fn confirm(&mut self, next: u32) {
        while self.digest.frames() < next {
            let Some(frame) = self.unconfirmed.pop_front() else { break };
            self.digest.add(&frame.digest);
            self.unconfirmed_bytes -= frame.bytes;
        }
    }

    /// After a reconnect the target has everything below `next` and lacks the rest: returns the
    /// blocks of pre-copy frames that are lost and must be marked live again. Kept frames stay
    /// recorded; [`Self::kept_from`] sends them again.
    pub fn rewind(&mut self, next: u32) -> Vec<BlockRun> {
        self.confirm(next);
        let kept_from = self.kept.first().map_or(u32::MAX, |frame| frame.header.seq);
        if next >= kept_from {
            return Vec::new();
        }
        debug_assert!(self.kept.is_empty(), "a last pass follows a barrier");
        self.unconfirmed_bytes = 0;
        self.unconfirmed.drain(..).flat_map(|frame| frame.runs).collect()
    }

    /// Kept frames from `seq` on.
    pub fn kept_from(&self, seq: u32) -> impl Iterator<Item = &Frame> {
        self.kept.iter().filter(move |frame| frame.header.seq >= seq)
    }

    /// Number of frames and digest over all of them, for the manifest.
    pub fn totals(&self) -> (u32, [u8; 32]) {
        let mut digest = self.digest.clone();
        self.unconfirmed.iter().for_each(|frame| digest.add(&frame.digest));
        (digest.frames(), digest.finish())
    }
}
