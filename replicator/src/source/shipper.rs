//! The shipper: one a volume, on its own thread. Keeps the session, copies, compares, verifies,
//! and does the coordinator's tasks.
//!
//! It works in steps: each does a bounded piece of work and says when it wants to be called again,
//! so that a simulator can drive it. It alone commits and gives up.

use crate::source::backoff::Backoff;
use crate::source::buffers::Memory;
use crate::source::compare::Compare;
use crate::source::copy::Copy;
use crate::source::ledger::Ledger;
use crate::source::pipeline::Workers;
use crate::source::seams::{Dial, DiskError, Env, Link, LinkError, Signer};
use crate::source::verify::Verify;
use crate::source::volume::{Outcome, Task, Volume};
use secondsite_control::api::VolumePhase;
use secondsite_control::codes::Reason;
use secondsite_format::ids::{CutId, Epoch, Generation, ServerId};
use secondsite_format::message::{Message, Reply, Request};
use std::sync::Arc;
use std::time::Duration;

/// An idle session shows that it lives this often.
pub const PING_EVERY: Duration = Duration::from_secs(10);
/// A refusal that coming back cannot help is tried again this often.
pub const REFUSED_EVERY: Duration = Duration::from_secs(60);
/// Epochs given up in a row that raise an alarm.
const GIVE_UPS_ALARM: u32 = 2;

/// Why a step ended early.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The session is over.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The volume cannot be read.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The shipper was told to end.
    #[error("stopping")]
    Stopping,
    /// The epoch cannot be finished.
    #[error("{0}")]
    GiveUp(String),
}

/// What all shippers of a daemon share.
pub struct Commons {
    /// Clock and chance.
    pub env: Arc<dyn Env>,
    /// Buffers.
    pub memory: Arc<Memory>,
    /// Threads that digest and compress.
    pub workers: Arc<Workers>,
    /// Signs manifests.
    pub signer: Arc<dyn Signer>,
    /// This server.
    pub server: ServerId,
    /// Digest of the machine's identity.
    pub machine: [u8; 32],
}

/// What a session is at.
pub(super) enum Work {
    Copy(Copy),
    Compare(Compare),
    Follow,
}

/// An established session.
pub(super) struct Session {
    pub link: Box<dyn Link>,
    pub generation: Generation,
    pub reads_zero: bool,
    pub work: Work,
    pub heard: Duration,
}

/// The shipper of one volume.
pub struct Shipper {
    pub(super) volume: Arc<Volume>,
    pub(super) commons: Arc<Commons>,
    pub(super) dial: Box<dyn Dial>,
    pub(super) backoff: Backoff,
    pub(super) dial_at: Duration,
    pub(super) session: Option<Session>,
    /// Of the cut that stands, if this process began it.
    pub(super) ledger: Option<Ledger>,
    pub(super) generation: Generation,
    pub(super) durable: (Epoch, CutId),
    pub(super) chain: [u8; 32],
    /// A compare interrupted by the loss of its session.
    pub(super) compare: Option<Compare>,
    pub(super) verify: Option<Verify>,
    /// Why the compare is made, for people.
    pub(super) doubt: String,
    /// The doubt was counted in the report.
    pub(super) counted: bool,
    pub(super) lost_disk: bool,
    pub(super) grown: bool,
}

impl Shipper {
    /// Makes one; nothing is connected yet.
    pub fn new(volume: Arc<Volume>, commons: Arc<Commons>, dial: Box<dyn Dial>) -> Self {
        let acknowledged = volume.marks().acknowledged();
        let now = commons.env.now();
        volume.control().away_since = Some(now);
        Self {
            volume,
            dial,
            backoff: Backoff::default(),
            dial_at: now,
            session: None,
            ledger: None,
            generation: Generation(0),
            durable: (Epoch(acknowledged.0), CutId(acknowledged.1)),
            chain: [0; 32],
            compare: None,
            verify: None,
            doubt: String::new(),
            counted: false,
            lost_disk: false,
            grown: false,
            commons,
        }
    }

    /// Does the next piece of work; returns how long there is nothing more to do.
    pub fn step(&mut self) -> Duration {
        let result = if self.volume.stopping() { Err(StepError::Stopping) } else { self.work() };
        match result {
            Ok(wait) => wait,
            Err(error) => self.failed(error),
        }
    }

    /// The volume cannot be read any more: it must be opened anew.
    pub fn lost_disk(&self) -> bool {
        self.lost_disk
    }

    /// It must be opened anew because it has grown: at once.
    pub fn grown(&self) -> bool {
        self.grown
    }

    fn work(&mut self) -> Result<Duration, StepError> {
        let Some(session) = &self.session else { return self.connect() };
        match session.work {
            Work::Copy(_) => self.copy_step()?,
            Work::Compare(_) => self.compare_step()?,
            Work::Follow => return self.follow(),
        }
        Ok(Duration::ZERO)
    }

    fn follow(&mut self) -> Result<Duration, StepError> {
        let task = self.volume.control().task.clone();
        if let Some(task) = task {
            return self.task(task);
        }
        if self.volume.marks().compare_due() && !self.volume.compare_only {
            self.begin_compare()?;
            return Ok(Duration::ZERO);
        }
        if self.verify_step()? {
            return Ok(Duration::ZERO);
        }
        let now = self.commons.env.now();
        let due = self.session.as_ref().map_or(now, |s| s.heard + PING_EVERY);
        if now < due {
            return Ok(due - now);
        }
        self.volume.bench().disk.check()?;
        match self.ask(&Request::Ping)? {
            Reply::Alive => Ok(PING_EVERY),
            _ => Err(LinkError::Nonsense("a ping was not answered as such").into()),
        }
    }

    /// Does it, or a part of it; when to be called again.
    fn task(&mut self, task: Task) -> Result<Duration, StepError> {
        // A cut that was given up meanwhile has no tasks any more.
        if self.volume.control().cut.is_none() && task != Task::Compare {
            self.volume.finish(Outcome::Dropped("the epoch was given up".into()));
            return Ok(Duration::ZERO);
        }
        match task {
            Task::Compare => {
                if !self.compare_slice()? {
                    return Ok(Duration::ZERO);
                }
            }
            Task::Pass => self.pass()?,
            Task::Barrier => self.barrier()?,
            Task::Sync => self.sync(),
            Task::Collect => {
                if let Some(wait) = self.collect()? {
                    return Ok(wait);
                }
            }
            Task::Ship(verdict) => self.ship(&verdict)?,
            Task::GiveUp(why) => return Err(StepError::GiveUp(why.into())),
        }
        self.volume.finish(Outcome::Done);
        Ok(Duration::ZERO)
    }

    fn sync(&self) {
        let tracker = &self.volume.tracker;
        let mounts = tracker.mounts();
        let took = mounts.iter().map(|mount| {
            // One that cannot be written back cannot be frozen either.
            tracker.sync(mount).unwrap_or(Duration::MAX)
        });
        let slowest = took.max().unwrap_or_default();
        self.volume.control().synced = slowest;
    }

    /// Nothing stands between this volume and cuts.
    pub(super) fn followed(&mut self) {
        if let Some(session) = &mut self.session {
            session.work = Work::Follow;
        }
        self.volume.face.update(|status| {
            status.phase = VolumePhase::Following;
            status.progress = None;
            let why = if status.give_ups >= GIVE_UPS_ALARM {
                let reason = format!(
                    "{} epochs in a row could not be finished: see the agent's log, and check the network and the target's space",
                    status.give_ups
                );
                Some((Reason::EpochsGivenUp, reason))
            } else {
                status.fuzzy.clone()
            };
            (status.code, status.reason) = why.map_or_else(Default::default, |(code, reason)| (Some(code), reason));
        });
        self.settle();
    }

    /// Says that a cut may begin, if the one before is settled.
    pub(super) fn settle(&self) {
        let marks = self.volume.marks();
        let mut control = self.volume.control();
        let compare_first = marks.compare_due() && !self.volume.compare_only;
        if !marks.cut().stands && !compare_first {
            debug_assert_eq!(marks.taken_count(), 0, "a settled cut holds nothing");
            control.ready = Some(self.durable.0.next());
            drop(control);
            self.volume.coordinator.ring();
        }
    }

    /// The target has committed the cut that stands.
    pub(super) fn committed(&mut self, durable: (Epoch, CutId), chain: [u8; 32]) {
        // The target's durable epoch carries the id of the very cut that stands, and its manifest
        // was signed only after every taken block was in a frame of it (what could not be read
        // was marked live again before the signature). So nothing taken is needed any more.
        let known = self.volume.marks().committed(durable.1.0);
        debug_assert!(known, "only the standing cut is committed");
        self.durable = durable;
        self.chain = chain;
        self.ledger = None;
        let (signed, exact) = {
            let mut control = self.volume.control();
            control.cut = None;
            control.commits += 1;
            (control.signed_ns.take(), control.exact)
        };
        self.volume.face.update(|status| {
            status.give_ups = 0;
            // One that an earlier process signed is not ours to describe.
            let Some(signed_ns) = signed else { return };
            status.newest_point_ns = signed_ns;
            if exact {
                status.points_exact += 1;
                status.newest_exact_ns = signed_ns;
            } else {
                status.points_fuzzy += 1;
            }
        });
    }

    /// Gives up the epoch: what it had taken is live again, and a later cut takes all of it.
    pub(super) fn give_up(&mut self, why: &str) {
        let (face, cut) = (&self.volume.face, self.volume.marks().cut());
        tracing::warn!(volume = %face.id, name = face.name, epoch = cut.epoch,
            cut = %CutId(cut.cut_id), why, "epoch given up");
        {
            let mut bench = self.volume.bench();
            self.volume.marks().give_up();
            bench.held.clear();
        }
        self.ledger = None;
        let mut control = self.volume.control();
        control.cut = None;
        control.task = None;
        control.outcome = Outcome::Dropped(why.into());
        control.signed_ns = None;
        drop(control);
        self.volume.face.update(|status| {
            status.give_ups += 1;
            status.give_ups_total += 1;
        });
        self.volume.coordinator.ring();
    }

    pub(super) fn drop_staged(&mut self, cut_id: CutId) -> Result<(), StepError> {
        match self.ask(&Request::GiveUp { cut_id })? {
            Reply::Staged(None) => Ok(()),
            _ => Err(LinkError::Nonsense("a staged part that was given up is still there").into()),
        }
    }

    /// Takes the present as the start of the audit; a doubt is on record, and everything is read
    /// after this.
    pub(super) fn rebase(&self) {
        if let Err(error) = self.volume.tracker.rebase() {
            let face = &self.volume.face;
            tracing::warn!(volume = %face.id, name = face.name, error, "audit cannot start anew");
        }
    }

    pub(super) fn begin_compare(&mut self) -> Result<(), StepError> {
        if self.volume.marks().cut().stands {
            let cut_id = CutId(self.volume.marks().cut().cut_id);
            self.give_up("the volume is compared first");
            self.drop_staged(cut_id)?;
        }
        self.volume.control().ready = None;
        if !self.counted {
            self.counted = true;
            self.volume.face.update(|status| status.compares += 1);
        }
        let total = self.volume.shape.volume_bytes;
        let compare = match self.compare.take() {
            Some(compare) => compare,
            None => {
                self.rebase();
                Compare::new(total)
            }
        };
        if let Some(doubt) = self.volume.control().doubt.take() {
            self.doubt = doubt;
        }
        if self.doubt.is_empty() {
            self.doubt =
                "writes may have gone unseen (a reboot, or a newly attached tracker)".into();
        }
        self.volume.face.update(|status| {
            status.phase = VolumePhase::Comparing;
            status.progress = Some(compare.progress());
            status.code = Some(Reason::MarksInDoubt);
            status.reason =
                format!("{}; source and target are compared, only differences travel", self.doubt);
        });
        if let Some(session) = &mut self.session {
            session.work = Work::Compare(compare);
        }
        Ok(())
    }

    /// All of it was compared: back to following.
    pub(super) fn compare_done(&mut self) {
        // Every block was read since the audit began anew, those that differed are live, and the
        // tracker has marked every write since: live and taken now hold all that the target lacks.
        if let Some(shared) = self.volume.tracker.filtered() {
            shared.marked_beside();
        }
        self.volume.marks().set_compare_due(false);
        self.doubt.clear();
        self.counted = false;
        self.followed();
    }

    /// Asks the target.
    pub(super) fn ask(&mut self, request: &Request) -> Result<Reply, StepError> {
        self.ask_frame(&request.to_frame())
    }

    /// Sends a frame and waits for its answer.
    pub(super) fn ask_frame(
        &mut self,
        frame: &secondsite_format::frame::Frame,
    ) -> Result<Reply, StepError> {
        let session = self.session.as_mut().ok_or(LinkError::Nonsense("no session"))?;
        let reply = session.link.ask(frame)?;
        session.heard = self.commons.env.now();
        self.backoff.reset();
        self.volume.face.update(|status| status.sent_bytes += frame.total_bytes());
        Ok(reply)
    }
}
