//! The shipper's session: dialling, and what the target's welcome means for what is under way here.

use crate::source::ledger::Ledger;
use crate::source::resume::{Known, Next, plan};
use crate::source::seams::Link;
use crate::source::shipper::{Session, Shipper, StepError, Work};
use crate::source::volume::{Outcome, Task};
use secondsite_format::ids::{CutId, Epoch};
use secondsite_format::message::{Hello, PROTOCOL, Welcome};
use std::time::Duration;

impl Shipper {
    pub(super) fn connect(&mut self) -> Result<Duration, StepError> {
        // A first copy that ended with its session, a task to give up: settled without a target.
        let task = self.volume.control().task.clone();
        if let Some(Task::GiveUp(why)) = task {
            self.give_up(why);
            return Ok(Duration::ZERO);
        }
        let now = self.commons.env.now();
        if now < self.dial_at {
            return Ok(self.dial_at - now);
        }
        self.volume.bench().disk.check()?;
        let hello = Hello {
            protocol: PROTOCOL,
            server: self.commons.server,
            machine: self.commons.machine,
            volume: self.volume.id(),
            volume_bytes: self.volume.shape.volume_bytes,
            block_bytes: self.volume.shape.block_bytes,
            generation: self.generation,
            acknowledged: self.acknowledged(),
        };
        let (link, welcome) = self.dial.dial(&hello)?;
        self.welcomed(link, &welcome)?;
        Ok(Duration::ZERO)
    }

    fn acknowledged(&self) -> (Epoch, CutId) {
        let (epoch, id) = self.volume.marks().acknowledged();
        (Epoch(epoch), CutId(id))
    }

    fn welcomed(&mut self, link: Box<dyn Link>, welcome: &Welcome) -> Result<(), StepError> {
        let marks = self.volume.tracker.marks().clone();
        if marks.is_open() && !marks.cut().stands {
            self.give_up("the filter gave it up while there was no session");
        }
        let cut = marks.cut();
        let begun = self.volume.control().cut;
        if let Some(cut_id) = begun
            && self.ledger.is_none()
        {
            self.ledger = Some(Ledger::new(Epoch(cut.epoch), cut_id));
        }
        let known = Known {
            cut,
            acknowledged: self.acknowledged(),
            compare_due: marks.compare_due(),
            compare_only: self.volume.compare_only,
            memory: self.ledger.as_ref().map(Ledger::sent),
            volume_bytes: self.volume.shape.volume_bytes,
        };
        let plan = plan(&known, welcome);
        tracing::debug!(volume = %self.volume.face.id, name = self.volume.face.name, ?known, ?welcome, ?plan, "welcomed");
        if plan.committed {
            self.committed(welcome.durable, welcome.chain);
            let shipping = matches!(self.volume.control().task, Some(Task::Ship(_)));
            if shipping {
                self.volume.finish(Outcome::Done);
            }
        }
        if let Some(why) = plan.doubt
            && !self.volume.compare_only
        {
            // The doubt is stored first: a crash in between must not leave the number without it.
            marks.set_compare_due(true);
            tracing::warn!(volume = %self.volume.face.name, "{why}: source and target are compared");
            self.doubt = why.into();
        }
        if plan.take_number {
            marks.set_acknowledged(welcome.durable.0.0, welcome.durable.1.0);
        }
        if self.durable != welcome.durable {
            // What was compared so far was compared with another state of the replica.
            self.compare = None;
        }
        self.durable = welcome.durable;
        self.chain = welcome.chain;
        self.generation = welcome.generation;
        if let Some(why) = plan.give_up {
            self.give_up(why);
        }
        self.session = Some(Session {
            link,
            generation: welcome.generation,
            reads_zero: welcome.reads_zero,
            work: Work::Follow,
            heard: self.commons.env.now(),
        });
        if let Some(cut_id) = plan.drop_staged {
            self.drop_staged(cut_id)?;
        }
        if let Some(next) = plan.resume_from
            && let Some(ledger) = &mut self.ledger
        {
            let lost = ledger.rewind(next);
            if !lost.is_empty() && marks.flip() != 0 {
                // They may have been overwritten since.
                let cut_id = ledger.cut_id();
                self.give_up("frames of what the cut held were lost with the connection");
                self.drop_staged(cut_id)?;
            } else {
                // These blocks are taken, but the frames that held them never arrived: a later
                // pass takes and reads them again, and a higher pass wins.
                let _bench = self.volume.bench();
                lost.into_iter().for_each(|run| marks.mark(run));
            }
        }
        if plan.nothing_to_compare {
            // Every block is read from now on, and the tracker marks what is written meanwhile.
            self.rebase();
            marks.set_compare_due(false);
        }
        self.volume.control().away_since = None;
        match plan.next {
            Next::Copy { sync, from, compare_below } => self.begin_copy(sync, from, compare_below),
            Next::Compare => self.begin_compare(),
            Next::Follow => {
                self.followed();
                Ok(())
            }
        }
    }
}
