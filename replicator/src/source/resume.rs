//! What a welcome means: which marks may be forgotten, what must be compared, where to go on.
//! Pure; the only place that decides it.
//!
//! Invariants: taken is forgotten only for the very cut that the target reports durable; whatever
//! the source does not recognise, and anything less than was acknowledged, is a doubt; a staged
//! part is resumed only under the cut that stands, by the process that read it.

use secondsite_format::ids::{CutId, Epoch, SyncId};
use secondsite_format::message::{CopyState, Welcome};
use secondsite_tracker::marks::Cut;

/// What the source knows when it is welcomed.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// The header's cut.
    pub cut: Cut,
    /// Newest acknowledged epoch.
    pub acknowledged: (Epoch, CutId),
    /// A compare is due already.
    pub compare_due: bool,
    /// The marks begin with this process and are only made by comparing.
    pub compare_only: bool,
    /// What this process holds in memory of the cut that stands.
    pub memory: Option<Sent>,
    /// Size of the volume, bytes.
    pub volume_bytes: u64,
}

/// How far the frames of a cut are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    /// The cut.
    pub cut_id: CutId,
    /// Frames that the target is known to have staged.
    pub confirmed: u32,
    /// Frames sent.
    pub sent: u32,
}

/// What to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The cut that stands is durable: forget what was taken for it.
    pub committed: bool,
    /// Set `compare_due`: why.
    pub doubt: Option<&'static str>,
    /// Take the target's number and cut id for acknowledged.
    pub take_number: bool,
    /// Give up the cut that stands: why.
    pub give_up: Option<&'static str>,
    /// Tell the target to drop this staged part.
    pub drop_staged: Option<CutId>,
    /// Go on inside the epoch from this frame.
    pub resume_from: Option<u32>,
    /// `compare_due` is void: everything will be copied.
    pub nothing_to_compare: bool,
    /// What then.
    pub next: Next,
}

/// What a session does first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// First copy.
    Copy {
        /// Under this id; none: a new one.
        sync: Option<SyncId>,
        /// From here, bytes.
        from: u64,
        /// Afterwards compare what lies below, bytes.
        compare_below: u64,
    },
    /// Compare all of it.
    Compare,
    /// Follow.
    Follow,
}

/// Reads a welcome.
pub fn plan(known: &Known, welcome: &Welcome) -> Plan {
    let (durable, durable_id) = welcome.durable;
    let (acknowledged, acknowledged_id) = known.acknowledged;
    let header_id = CutId(known.cut.cut_id);
    let mut plan = Plan {
        committed: false,
        doubt: None,
        take_number: false,
        give_up: None,
        drop_staged: None,
        resume_from: None,
        nothing_to_compare: false,
        next: Next::Follow,
    };
    let is_header = !header_id.is_none() && durable_id == header_id && durable.0 == known.cut.epoch;
    if is_header && known.cut.stands {
        plan.committed = true;
    } else if durable == acknowledged && durable_id == acknowledged_id {
        // Nothing new.
    } else if is_header {
        // It was given up here, and what it had taken is live again: the target's epoch holds
        // older bytes of those blocks, which the next epoch brings up to date. Only the number
        // counts.
        plan.take_number = true;
    } else {
        plan.doubt = Some(if durable < acknowledged {
            "the target has less than it once acknowledged"
        } else {
            "the target has an epoch that this agent does not know"
        });
        plan.take_number = true;
    }
    staged(known, welcome, &mut plan);
    let due = (known.compare_due || plan.doubt.is_some()) && !known.compare_only;
    plan.next = match welcome.copy {
        CopyState::Empty => {
            plan.nothing_to_compare = true;
            Next::Copy { sync: None, from: 0, compare_below: 0 }
        }
        CopyState::Copying { sync, cursor } => {
            let from = cursor.min(known.volume_bytes);
            Next::Copy { sync: Some(sync), from, compare_below: if due { from } else { 0 } }
        }
        CopyState::Copied if due => Next::Compare,
        CopyState::Copied => Next::Follow,
    };
    if plan.next != Next::Follow {
        // No epoch goes on beside a first copy or a compare.
        plan.resume_from = None;
        if known.cut.stands && !plan.committed && plan.give_up.is_none() {
            plan.give_up = Some("the volume is copied or compared first");
        }
        plan.drop_staged = welcome.staged.map(|(id, _)| id);
    }
    plan
}

fn staged(known: &Known, welcome: &Welcome, plan: &mut Plan) {
    let standing = known.cut.stands && !plan.committed;
    let memory = known.memory.filter(|m| standing && m.cut_id.0 == known.cut.cut_id);
    let next = match (welcome.staged, memory) {
        (Some((id, next)), Some(memory)) if id == memory.cut_id => next,
        (Some((id, _)), _) => {
            plan.drop_staged = Some(id);
            0
        }
        (None, _) => 0,
    };
    match memory {
        Some(memory) if (memory.confirmed..=memory.sent).contains(&next) => {
            plan.resume_from = Some(next);
        }
        Some(memory) => {
            plan.give_up = Some("the target lost what it had staged of the epoch");
            if welcome.staged.is_some_and(|(id, _)| id == memory.cut_id) {
                plan.drop_staged = Some(memory.cut_id);
            }
        }
        None if standing => {
            plan.give_up = Some("what was read for the epoch was in a process that has ended");
        }
        None => {}
    }
}

#[cfg(test)]
mod tests {
    use super::{CopyState, Cut, CutId, Epoch, Known, Next, Plan, Sent, SyncId, Welcome, plan};
    use secondsite_format::ids::Generation;

    const A: CutId = CutId([1; 16]);
    const B: CutId = CutId([2; 16]);

    fn known() -> Known {
        Known {
            cut: Cut { epoch: 5, cut_id: B.0, stands: true },
            acknowledged: (Epoch(4), A),
            compare_due: false,
            compare_only: false,
            memory: Some(Sent { cut_id: B, confirmed: 3, sent: 7 }),
            volume_bytes: 1 << 30,
        }
    }

    fn welcome(durable: (u64, CutId), staged: Option<(CutId, u32)>) -> Welcome {
        Welcome {
            protocol: 1,
            generation: Generation(1),
            copy: CopyState::Copied,
            durable: (Epoch(durable.0), durable.1),
            chain: [0; 32],
            staged,
            reads_zero: true,
        }
    }

    fn quiet() -> Plan {
        Plan {
            committed: false,
            doubt: None,
            take_number: false,
            give_up: None,
            drop_staged: None,
            resume_from: None,
            nothing_to_compare: false,
            next: Next::Follow,
        }
    }

    #[test]
    fn resumes_only_what_is_staged_under_the_standing_cut() {
        let at = |staged| plan(&known(), &welcome((4, A), staged));
        assert_eq!(at(Some((B, 5))), Plan { resume_from: Some(5), ..quiet() });
        assert_eq!(at(Some((B, 2))).drop_staged, Some(B));
        assert!(at(Some((B, 2))).give_up.is_some(), "less than confirmed");
        assert!(at(Some((B, 8))).give_up.is_some(), "more than was sent");
        assert!(at(None).give_up.is_some(), "lost");
        let unsent = Known { memory: Some(Sent { cut_id: B, confirmed: 0, sent: 7 }), ..known() };
        assert_eq!(plan(&unsent, &welcome((4, A), None)).resume_from, Some(0));
        let other = plan(&unsent, &welcome((4, A), Some((A, 9))));
        assert_eq!((other.drop_staged, other.resume_from), (Some(A), Some(0)));
    }

    #[test]
    fn another_process_cannot_resume() {
        let known = Known { memory: None, ..known() };
        let plan = plan(&known, &welcome((4, A), Some((B, 5))));
        assert!(plan.give_up.is_some());
        assert_eq!((plan.drop_staged, plan.resume_from), (Some(B), None));
    }

    #[test]
    fn forgets_taken_only_for_the_very_cut() {
        for memory in [None, known().memory] {
            let plan = plan(&Known { memory, ..known() }, &welcome((5, B), None));
            assert_eq!(plan, Plan { committed: true, ..quiet() });
        }
        // The same number under another id is somebody else's epoch.
        let foreign = plan(&known(), &welcome((5, CutId([9; 16])), None));
        assert!(!foreign.committed && foreign.doubt.is_some() && foreign.take_number);
        assert_eq!(foreign.next, Next::Compare);
    }

    #[test]
    fn an_id_given_up_only_takes_the_number() {
        let cut = Cut { stands: false, ..known().cut };
        let plan = plan(&Known { cut, memory: None, ..known() }, &welcome((5, B), None));
        assert_eq!(plan, Plan { take_number: true, ..quiet() });
    }

    #[test]
    fn less_than_acknowledged_is_a_doubt() {
        let lost = plan(&known(), &welcome((3, CutId([7; 16])), Some((B, 5))));
        assert!(lost.doubt.is_some() && lost.give_up.is_some());
        assert_eq!((lost.next, lost.resume_from, lost.drop_staged), (Next::Compare, None, Some(B)));
    }

    #[test]
    fn first_copies_start_resume_and_compare_what_is_in_doubt() {
        let none = Cut { epoch: 0, cut_id: [0; 16], stands: false };
        let fresh = Known {
            cut: none,
            acknowledged: (Epoch(0), CutId::NONE),
            memory: None,
            compare_due: true,
            ..known()
        };
        let empty = Welcome { copy: CopyState::Empty, ..welcome((0, CutId::NONE), None) };
        let begun = plan(&fresh, &empty);
        assert!(begun.nothing_to_compare && begun.doubt.is_none());
        assert_eq!(begun.next, Next::Copy { sync: None, from: 0, compare_below: 0 });
        let sync = SyncId([3; 16]);
        let half = Welcome { copy: CopyState::Copying { sync, cursor: 4096 }, ..empty };
        let next = |compare_below| Next::Copy { sync: Some(sync), from: 4096, compare_below };
        assert_eq!(plan(&fresh, &half).next, next(4096));
        assert_eq!(plan(&Known { compare_due: false, ..fresh }, &half).next, next(0));
        assert_eq!(plan(&Known { compare_only: true, ..fresh }, &half).next, next(0));
    }
}
