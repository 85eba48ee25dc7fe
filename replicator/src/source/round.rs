//! One round: from the beginning of a cut to the commit of its point on all members.
//!
//! Volumes that are watched from beside: pre-copy passes until little is left, a barrier, then last
//! passes in a quiet moment, else under a freeze, else unproven. Volumes behind the filter: one
//! flip at that moment, and what they held then is collected after it. Without any of the former
//! that moment is at once. A state machine: each step looks at what the members finished and gives
//! them their next task; it never waits, except for reads while file systems are frozen.

use crate::source::budget::FreezeBudget;
use crate::source::buffers::{BUFFER_BYTES, Memory};
use crate::source::proof::{Doubt, last_pass, make_ready, prove, set_aside};
use crate::source::seams::{Batch, Cutter, Env, Freeze};
use crate::source::volume::{Bench, Outcome, Task, Verdict, Volume};
use secondsite_control::codes::Reason;
use secondsite_format::ids::{CutId, VolumeId};
use secondsite_format::manifest::{Consistency, CutMethod};
use secondsite_tracker::ebpf::Audit;
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

/// Pre-copy passes before the cut is made with what is left.
const PASSES_MAX: u32 = 8;
/// Last passes tried for a quiet moment, and the time between them.
const QUIET_ATTEMPTS: u32 = 5;
const QUIET_EVERY: Duration = Duration::from_millis(20);
/// A write-back that took longer forbids a freeze: freezing writes back too, and cannot be
/// interrupted.
const STALL_LIMIT: Duration = Duration::from_millis(300);
/// Write-backs tried until one is quick.
const SYNCS_MAX: u32 = 4;
/// The longest freeze asked for, how long a proof is tried within it, and how often.
const FREEZE_LIMIT: Duration = Duration::from_millis(500);
const FREEZE_PROOF: Duration = Duration::from_millis(150);
const FREEZE_ATTEMPTS: u32 = 16;
/// Tries of a flip, and the time between them: copies for the cut before may be under way.
const FLIPS_MAX: u32 = 20;
const FLIP_EVERY: Duration = Duration::from_millis(100);
/// A member without a session holds the others up no longer.
const AWAY_PATIENCE: Duration = Duration::from_secs(60);
/// How often a round looks at its members without being rung for.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What a round works with.
pub struct Tools<'a> {
    /// Clock and chance.
    pub env: &'a dyn Env,
    /// Buffers.
    pub memory: &'a Memory,
    /// Freezes.
    pub freezer: &'a mut dyn Freeze,
    /// Cuts volumes behind the filter.
    pub cutter: &'a mut dyn Cutter,
    /// How much it may.
    pub budget: &'a mut FreezeBudget,
    /// All protected volumes of the server.
    pub protected: &'a [VolumeId],
    /// How long a round may wait to be allowed a freeze.
    pub freeze_patience: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Compare,
    Pass,
    Barrier,
    Quiet(Duration),
    Wait(Duration),
    Sync,
    Flip(Duration),
    Collect,
    Ship,
}

/// What a round came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// Its id.
    pub cut_id: CutId,
    /// Proven, and everything could be read.
    pub exact: bool,
    /// Why it is fuzzy.
    pub why: String,
    /// Volumes that committed it; all of its members did.
    pub members: Vec<VolumeId>,
    /// A volume that the round began with is not among them.
    pub lacks_member: bool,
}

/// A round under way.
pub struct Round {
    cut_id: CutId,
    members: Vec<Arc<Volume>>,
    stage: Stage,
    passes: u32,
    attempts: u32,
    syncs: u32,
    /// The passes of now lead to a freeze.
    to_freeze: bool,
    why: String,
    exact: bool,
    /// A member left after the cut: the point is not whole.
    incomplete: bool,
    /// How many it began with, those aside that were unprotected meanwhile.
    begun_with: usize,
    /// What was proven, when and how: until what lies behind the filter is collected.
    made: Option<Made>,
    /// Tries of the flip.
    flips: u32,
    /// Buffers set aside for last passes.
    spare: Vec<Batch>,
    /// When it began.
    pub started: Duration,
}

/// A cut that was made.
#[derive(Clone, Copy)]
struct Made {
    method: CutMethod,
    exact: bool,
    time_ns: u64,
}

/// A step's result.
pub enum Step {
    /// Call again after this long, or when rung.
    Wait(Duration),
    /// Over; none if no point came of it.
    Ended(Option<Point>),
}

impl Round {
    /// Begins a round; compare-only members are compared first.
    pub fn new(members: Vec<Arc<Volume>>, env: &dyn Env) -> Self {
        for volume in members.iter().filter(|volume| volume.compare_only) {
            volume.give(Task::Compare);
        }
        for volume in members.iter().filter(|volume| !volume.compare_only) {
            volume.control().outcome = Outcome::Done;
        }
        Self {
            cut_id: CutId(env.random()),
            begun_with: members.len(),
            members,
            stage: Stage::Compare,
            passes: 0,
            attempts: 0,
            syncs: 0,
            to_freeze: false,
            why: String::new(),
            exact: false,
            incomplete: false,
            made: None,
            flips: 0,
            spare: Vec::new(),
            started: env.now(),
        }
    }

    /// Whether this volume is a member.
    pub fn has(&self, id: VolumeId) -> bool {
        self.members.iter().any(|volume| volume.id() == id)
    }

    /// Its members.
    pub fn members(&self) -> &[Arc<Volume>] {
        &self.members
    }

    /// Goes on without a volume that is no longer protected.
    pub fn remove(&mut self, id: VolumeId) {
        if self.has(id) {
            self.incomplete |= self.stage == Stage::Ship;
            self.begun_with -= 1;
        }
        self.members.retain(|volume| volume.id() != id);
    }

    /// What it does, for people, with a percentage.
    pub fn note(&self) -> (u8, &'static str) {
        match self.stage {
            Stage::Compare => (5, "comparing volumes without a tracker"),
            Stage::Pass => (20, "sending what was written"),
            Stage::Barrier => (50, "waiting for the target"),
            Stage::Quiet(_) => (60, "waiting for a quiet moment"),
            Stage::Wait(_) => (65, "waiting until a freeze is allowed again"),
            Stage::Sync => (70, "writing file systems back before a freeze"),
            Stage::Flip(_) => (75, "waiting for the filter"),
            Stage::Collect => (80, "sending what the cut holds"),
            Stage::Ship => (85, "sending the last of it"),
        }
    }

    /// Goes on as far as it can.
    pub fn step(&mut self, tools: &mut Tools<'_>) -> Step {
        loop {
            self.shed(tools.env.now());
            if self.members.is_empty() {
                return Step::Ended(None);
            }
            let pending = |volume: &Arc<Volume>| volume.control().outcome == Outcome::Pending;
            if self.members.iter().any(pending) {
                return Step::Wait(LOOK_EVERY);
            }
            let now = tools.env.now();
            match self.stage {
                Stage::Compare => self.begin(),
                Stage::Pass => self.passed(tools),
                Stage::Barrier if self.to_freeze => self.freeze(tools),
                Stage::Barrier => {
                    self.attempts = 0;
                    self.stage = Stage::Quiet(now);
                }
                Stage::Quiet(at) | Stage::Wait(at) | Stage::Flip(at) if now < at => {
                    return Step::Wait(at - now);
                }
                Stage::Quiet(_) => self.quiet(tools),
                Stage::Wait(_) => self.give_all(Stage::Sync, Task::Sync),
                Stage::Sync => self.synced(tools),
                Stage::Flip(_) => self.flip_alone(tools),
                Stage::Collect => self.ship(tools),
                Stage::Ship => return Step::Ended(self.point()),
            }
        }
    }

    /// Lets go of members whose epoch is no more, and of those that keep the others waiting.
    fn shed(&mut self, now: Duration) {
        let shipping = self.stage == Stage::Ship;
        let away = |volume: &Arc<Volume>| {
            volume.control().away_since.is_some_and(|since| now > since + AWAY_PATIENCE)
        };
        let all_away = self.members.iter().all(away);
        let before = self.members.len();
        self.members.retain(|volume| {
            if matches!(volume.control().outcome, Outcome::Dropped(_)) {
                return false;
            }
            if !away(volume) || all_away {
                return true;
            }
            if !shipping {
                volume.give(Task::GiveUp("its session was away while others were cut"));
            }
            // When shipping it goes on by itself: its cut is made, and it is in memory.
            false
        });
        self.incomplete |= shipping && self.members.len() < before;
    }

    fn give_all(&mut self, stage: Stage, task: Task) {
        self.stage = stage;
        self.members.iter().for_each(|volume| volume.give(task.clone()));
    }

    fn begin(&mut self) {
        let cut_id = self.cut_id;
        self.members.retain(|volume| volume.begin(cut_id));
        self.give_passes();
    }

    /// Volumes behind the filter need no passes, unless the epoch before was given up: then little
    /// must be left, so that what is preserved for this one fits.
    fn give_passes(&mut self) {
        self.stage = Stage::Pass;
        for volume in &self.members {
            if !volume.is_filtered() || volume.face.status().give_ups > 0 {
                volume.give(Task::Pass);
            } else {
                volume.control().outcome = Outcome::Done;
            }
        }
    }

    fn passed(&mut self, tools: &Tools<'_>) {
        self.passes += 1;
        // What is left of all of them fits twice into the buffers of the last passes.
        let share = tools.memory.last_count * BUFFER_BYTES / self.members.len().max(1);
        let small = (share / 2) as u64;
        let is_much = |volume: &Arc<Volume>| {
            let left = volume.marks().live_count() * u64::from(volume.shape.block_bytes);
            match volume.tracker.filtered() {
                None => left > small,
                Some(shared) => {
                    volume.face.status().give_ups > 0 && left > shared.form().area_bytes() / 2
                }
            }
        };
        if self.passes < PASSES_MAX && self.members.iter().any(is_much) {
            self.give_passes();
        } else if self.tracked().is_empty() && self.members.iter().any(|v| v.is_filtered()) {
            self.stage = Stage::Flip(tools.env.now());
        } else {
            self.give_all(Stage::Barrier, Task::Barrier);
        }
    }

    /// Those that are watched from beside.
    fn tracked(&self) -> Vec<Arc<Volume>> {
        let beside = |volume: &&Arc<Volume>| !volume.compare_only && !volume.is_filtered();
        self.members.iter().filter(beside).cloned().collect()
    }

    fn filtered(&self) -> Vec<Arc<Volume>> {
        self.members.iter().filter(|volume| volume.is_filtered()).cloned().collect()
    }

    /// All volumes of the point lie behind the filter: nothing else is needed.
    fn flip_alone(&mut self, tools: &mut Tools<'_>) {
        match flip(&self.filtered(), tools.cutter) {
            Ok(()) => self.cut(CutMethod::Hold, true, tools),
            Err(_) if self.flips < FLIPS_MAX => {
                self.flips += 1;
                self.stage = Stage::Flip(tools.env.now() + FLIP_EVERY);
            }
            Err(why) => {
                tracing::warn!(why, "the filter did not cut");
                for volume in self.filtered() {
                    volume.give(Task::GiveUp("the filter did not cut: see its log"));
                }
                self.members.retain(|volume| !volume.is_filtered());
            }
        }
    }

    /// A last pass in the hope that nothing is written meanwhile.
    fn quiet(&mut self, tools: &mut Tools<'_>) {
        let tracked = self.tracked();
        if tracked.is_empty() {
            return self.cut(CutMethod::Compare, false, tools);
        }
        let attempt = {
            let mut benches: Vec<_> = tracked.iter().map(|volume| volume.bench()).collect();
            self.make_ready(&tracked, &mut benches, tools.memory);
            attempt(&tracked, &mut benches, &mut self.spare)
                .and_then(|()| flip_beside(&self.filtered(), &tracked, &mut benches, tools.cutter))
        };
        self.attempts += 1;
        match attempt {
            Ok(()) => self.cut(CutMethod::Quiet, true, tools),
            Err(Failure::Flipped(why)) => {
                self.why = why;
                self.cut(CutMethod::Unproven, false, tools);
            }
            Err(failure) => {
                let busy = self.unproven(&tracked, failure);
                if busy && self.attempts >= QUIET_ATTEMPTS {
                    self.plan_freeze(tools);
                } else {
                    self.stage = Stage::Quiet(tools.env.now() + QUIET_EVERY);
                }
            }
        }
    }

    fn make_ready(
        &mut self,
        tracked: &[Arc<Volume>],
        benches: &mut [MutexGuard<'_, Bench>],
        memory: &Memory,
    ) {
        set_aside(&mut self.spare, memory);
        for (volume, bench) in tracked.iter().zip(benches) {
            make_ready(volume, bench, memory);
        }
    }

    /// Notes why; a member whose tracker or disk fails leaves. True if it was only busy.
    fn unproven(&mut self, tracked: &[Arc<Volume>], failure: Failure) -> bool {
        match failure {
            Failure::Doubt(Doubt::Busy(i)) => {
                self.why = format!("{} was written to during the cut", tracked[i].path.display());
                true
            }
            Failure::Doubt(Doubt::Full(i)) => {
                self.why = format!(
                    "more was written to {} during the cut than the memory set aside holds (`memory` in agent.toml)",
                    tracked[i].path.display()
                );
                true
            }
            Failure::Doubt(Doubt::Gap(i, why)) => {
                // Stored before anything else: whatever ends this process, the compare is due.
                tracked[i].marks().set_compare_due(true);
                tracked[i].face.update(|status| status.audit_gaps += 1);
                tracked[i].control().doubt = Some(format!("the tracker missed writes ({why})"));
                tracked[i].give(Task::GiveUp("the tracker missed writes"));
                self.members.retain(|volume| volume.id() != tracked[i].id());
                false
            }
            Failure::Doubt(Doubt::Fallen(i)) => {
                tracked[i].give(Task::GiveUp("the cut no longer stood"));
                self.members.retain(|volume| volume.id() != tracked[i].id());
                false
            }
            Failure::Flipped(_) => unreachable!("handled where the cut is made"),
            Failure::Doubt(Doubt::Resized(i)) | Failure::Disk(i) => {
                // The shipper looks at the disk itself before it goes on, and says what is wrong.
                tracked[i].give(Task::GiveUp("the volume cannot be read, or has another size"));
                self.members.retain(|volume| volume.id() != tracked[i].id());
                false
            }
        }
    }

    fn mounts(&self) -> Vec<PathBuf> {
        let mut mounts: Vec<PathBuf> =
            self.tracked().iter().flat_map(|volume| volume.tracker.mounts()).collect();
        mounts.sort();
        mounts.dedup();
        mounts
    }

    fn plan_freeze(&mut self, tools: &mut Tools<'_>) {
        let now = tools.env.now();
        let wait = tools.budget.wait(now);
        if self.mounts().is_empty() {
            self.why +=
                ", and no file system on it can be frozen: points are exact when it is quiet";
            self.cut(CutMethod::Unproven, false, tools);
        } else if wait > tools.freeze_patience {
            self.why += &format!(", and the next freeze is allowed in {} s", wait.as_secs() + 1);
            self.cut(CutMethod::Unproven, false, tools);
        } else {
            self.stage = Stage::Wait(now + wait);
        }
    }

    /// File systems were written back: freeze next, if that was quick.
    fn synced(&mut self, tools: &mut Tools<'_>) {
        self.syncs += 1;
        let slowest = self.members.iter().map(|volume| volume.control().synced).max();
        let slowest = slowest.unwrap_or_default();
        if slowest < STALL_LIMIT {
            self.to_freeze = true;
            // One more pass: what the write-back brought.
            self.passes = PASSES_MAX;
            self.give_all(Stage::Pass, Task::Pass);
        } else if self.syncs < SYNCS_MAX {
            self.give_all(Stage::Sync, Task::Sync);
        } else {
            self.why += &format!(
                ", and writing its file systems back took {} ms: freezing them would stall the application",
                slowest.as_millis().min(u128::from(u32::MAX))
            );
            self.cut(CutMethod::Unproven, false, tools);
        }
    }

    /// Freeze, last pass, proof, thaw. Between freeze and thaw nothing is logged, and everything
    /// of size is allocated before.
    fn freeze(&mut self, tools: &mut Tools<'_>) {
        let tracked = self.tracked();
        let (mounts, filtered) = (self.mounts(), self.filtered());
        let mut result = Err(Failure::Doubt(Doubt::Busy(0)));
        let mut trouble = None;
        {
            let mut benches: Vec<_> = tracked.iter().map(|volume| volume.bench()).collect();
            self.make_ready(&tracked, &mut benches, tools.memory);
            let begun = tools.env.now();
            match tools.freezer.freeze(&mounts, FREEZE_LIMIT) {
                Err(error) => trouble = Some(error),
                Ok(()) => {
                    for _ in 0..FREEZE_ATTEMPTS {
                        result = attempt(&tracked, &mut benches, &mut self.spare).and_then(|()| {
                            flip_beside(&filtered, &tracked, &mut benches, tools.cutter)
                        });
                        let busy = matches!(result, Err(Failure::Doubt(Doubt::Busy(_))));
                        if !busy || tools.env.now() > begun + FREEZE_PROOF {
                            break;
                        }
                    }
                    match tools.freezer.thaw() {
                        Ok((took, whole)) => {
                            tools.budget.spent(tools.env.now(), took);
                            if !whole {
                                trouble = Some("it was thawed before the cut was made".into());
                            }
                        }
                        Err(error) => trouble = Some(error),
                    }
                }
            }
            if trouble.is_some() {
                // Something is amiss: as careful as after the longest freeze.
                tools.budget.spent(tools.env.now(), FREEZE_LIMIT);
            }
        }
        match (result, trouble) {
            (Ok(()), None) => self.cut(CutMethod::Freeze, true, tools),
            (_, Some(trouble)) => {
                self.why += &format!(", and the freeze failed: {trouble}");
                self.cut(CutMethod::Unproven, false, tools);
            }
            (Err(Failure::Flipped(why)), None) => {
                self.why = why;
                self.cut(CutMethod::Unproven, false, tools);
            }
            (Err(failure), None) => {
                let busy = matches!(failure, Failure::Doubt(Doubt::Busy(_)));
                if self.unproven(&tracked, failure) {
                    if busy {
                        self.why += " although its file systems were frozen: something else writes";
                    }
                    self.cut(CutMethod::Unproven, false, tools);
                } else {
                    // Without the member that failed: once more.
                    self.stage = Stage::Quiet(tools.env.now());
                    self.attempts = 0;
                    self.to_freeze = false;
                }
            }
        }
    }

    /// The cut is made. What lies behind the filter is collected first.
    fn cut(&mut self, method: CutMethod, exact: bool, tools: &mut Tools<'_>) {
        self.spare.clear();
        let filtered = self.filtered();
        let mut exact = exact;
        if filtered.iter().any(|volume| volume.marks().flip() == 0) {
            // The point is fuzzy, so there was no moment to flip at: now is as good.
            if let Err(why) = flip(&filtered, tools.cutter) {
                tracing::warn!(why, "the filter did not cut");
                let lost = |volume: &Arc<Volume>| volume.is_filtered();
                self.members.iter().filter(|v| lost(v)).for_each(|volume| {
                    volume.give(Task::GiveUp("the filter did not cut: see its log"));
                });
                self.members.retain(|volume| !lost(volume));
            }
        }
        for volume in self.filtered() {
            if let Some((code, text)) = volume.tracker.keeps() {
                volume.face.update(|status| {
                    (status.tracker_code, status.tracker_reason) = (Some(code), text);
                });
            }
            if let Audit::Gap(why) = volume.tracker.audit() {
                volume.marks().set_compare_due(true);
                volume.face.update(|status| status.audit_gaps += 1);
                volume.control().doubt = Some(why);
                volume.give(Task::GiveUp("something wrote beside the filter"));
                self.members.retain(|member| !Arc::ptr_eq(member, &volume));
                exact &= !self.members.is_empty();
            }
        }
        self.made = Some(Made { method, exact, time_ns: tools.env.wall_ns() });
        self.stage = Stage::Collect;
        for volume in self.filtered() {
            volume.give(Task::Collect);
        }
    }

    /// Everything is read: everybody sends the rest, signs and commits.
    fn ship(&mut self, tools: &Tools<'_>) {
        let Some(Made { method, exact, time_ns: cut_time_ns }) = self.made else { return };
        // After the last read of any: only members whose header still says that the cut stands.
        let cut_id = self.cut_id;
        self.members.retain(|volume| {
            let cut = volume.marks().cut();
            cut.stands && cut.cut_id == cut_id.0
        });
        let mut members: Vec<VolumeId> = self.members.iter().map(|volume| volume.id()).collect();
        members.sort_unstable();
        let mut lacking: Vec<VolumeId> = tools.protected.to_vec();
        lacking.retain(|id| members.binary_search(id).is_err());
        lacking.sort_unstable();
        self.exact = exact;
        for volume in &self.members {
            let (method, exact) = match (volume.compare_only, volume.is_filtered()) {
                (true, _) => (CutMethod::Compare, false),
                (false, true) => (CutMethod::Hold, exact),
                (false, false) => (method, exact),
            };
            let consistency = if exact { Consistency::Crash } else { Consistency::Fuzzy };
            let fuzzy = match (volume.compare_only, exact) {
                (true, _) | (_, true) => None,
                _ => {
                    Some((Reason::LastPointFuzzy, format!("the last point is fuzzy: {}", self.why)))
                }
            };
            volume.face.update(|status| status.fuzzy = fuzzy);
            volume.give(Task::Ship(Box::new(Verdict {
                cut_time_ns,
                consistency,
                method,
                members: members.clone(),
                lacking: lacking.clone(),
            })));
        }
        self.stage = Stage::Ship;
    }

    fn point(&self) -> Option<Point> {
        if self.incomplete {
            return None;
        }
        let followed = || self.members.iter().filter(|volume| !volume.compare_only);
        let read = followed().all(|volume| volume.control().exact);
        let why = match (self.exact, read) {
            (true, false) => "some blocks cannot be read".into(),
            _ => self.why.clone(),
        };
        Some(Point {
            cut_id: self.cut_id,
            exact: self.exact && read && followed().next().is_some(),
            why,
            members: self.members.iter().map(|volume| volume.id()).collect(),
            lacks_member: self.members.len() < self.begun_with,
        })
    }
}

enum Failure {
    Doubt(Doubt),
    Disk(usize),
    /// Those behind the filter were cut, and the others were not quiet then: why.
    Flipped(String),
}

/// Cuts these behind the filter.
fn flip(filtered: &[Arc<Volume>], cutter: &mut dyn Cutter) -> Result<(), String> {
    let ids: Vec<VolumeId> = filtered.iter().map(|volume| volume.id()).collect();
    let flip = cutter.cut(&ids)?;
    // Seen in the memory that is mapped here: else it is not the filter's any more.
    let here = |volume: &Arc<Volume>| {
        volume.tracker.filtered().is_some_and(|shared| shared.flipped() == flip)
    };
    if !filtered.iter().all(here) {
        return Err("the filter has begun anew".into());
    }
    filtered.iter().for_each(|volume| volume.marks().flipped(flip));
    Ok(())
}

/// The others were just proven: cuts those behind the filter, and proves the others once more, so
/// that all are cut at one instant.
fn flip_beside(
    filtered: &[Arc<Volume>],
    tracked: &[Arc<Volume>],
    benches: &mut [MutexGuard<'_, Bench>],
    cutter: &mut dyn Cutter,
) -> Result<(), Failure> {
    if filtered.is_empty() {
        return Ok(());
    }
    if filtered.iter().any(|volume| volume.marks().flip() != 0) {
        let why = "the volumes behind the filter had been cut before the others were quiet";
        return Err(Failure::Flipped(why.into()));
    }
    flip(filtered, cutter).map_err(Failure::Flipped)?;
    let mut members: Vec<(&Volume, &mut Bench)> = tracked
        .iter()
        .map(|volume| volume.as_ref())
        .zip(benches.iter_mut().map(|bench| &mut **bench))
        .collect();
    match prove(&mut members) {
        Ok(()) => Ok(()),
        Err(Doubt::Busy(i)) => Err(Failure::Flipped(format!(
            "{} was written to while the volumes behind the filter were cut",
            tracked[i].path.display()
        ))),
        Err(doubt) => Err(Failure::Doubt(doubt)),
    }
}

fn attempt(
    volumes: &[Arc<Volume>],
    benches: &mut [MutexGuard<'_, Bench>],
    spare: &mut Vec<Batch>,
) -> Result<(), Failure> {
    // One that is being closed may be opened anew any moment: its marks are no longer ours to take.
    if let Some(i) = volumes.iter().position(|volume| volume.stopping()) {
        return Err(Failure::Disk(i));
    }
    for (i, (volume, bench)) in volumes.iter().zip(benches.iter_mut()).enumerate() {
        last_pass(volume, bench, spare).map_err(|_| Failure::Disk(i))?;
        if spare.is_empty() && !volume.marks().live_is_clear() {
            return Err(Failure::Doubt(Doubt::Full(i)));
        }
    }
    let mut members: Vec<(&Volume, &mut Bench)> = volumes
        .iter()
        .map(|volume| volume.as_ref())
        .zip(benches.iter_mut().map(|bench| &mut **bench))
        .collect();
    prove(&mut members).map_err(Failure::Doubt)
}
