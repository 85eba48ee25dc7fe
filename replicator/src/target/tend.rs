//! Keeping the recovery points of a server: what is to stay is chosen, what may go is promoted or
//! thinned, what was gathered in memory becomes a run.
//!
//! Invariants: one of these jobs at a time a server; a point that somebody holds (reads, pinned) is
//! neither passed by promotion nor thinned away: [`Site::hold`] and the choice exclude each other.

use super::jobs::Job;
use super::keeper::Keeper;
use super::layers::Layer;
use super::merge::{Merge, tier};
use super::pins::{self, Pins};
use super::points::{CompletePoint, Plan, VolumeEpochs, complete_points, plan};
use super::promote::promote;
use super::run::Run;
use super::site::Site;
use super::state::EpochFacts;
use secondsite_control::api::{KeepPolicy, PointReport};
use secondsite_format::ids::{CutId, Epoch, ServerId, VolumeId};
use secondsite_format::message::{Refusal, RefusalCode};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

/// Runs a volume has at most before some are merged: a read looks into each.
const RUNS_MAX: usize = 12;
/// Epochs in memory before they become a run.
const EPOCHS_MAX: usize = 256;
/// Pieces in memory before they become a run: 48 bytes each.
const PIECES_MAX: usize = 1 << 17;
/// Seconds after which epochs in memory become a run, so that their age outlives the process.
const EPOCHS_AGE_S: u64 = 10 * 60;
/// How often points are chosen anew if nothing presses, seconds.
const EVERY_S: u64 = 10;

/// Who keeps which point.
#[derive(Default)]
struct State {
    held: BTreeMap<(ServerId, CutId), usize>,
    /// Points that stay beyond their time.
    pins: BTreeMap<ServerId, Pins>,
    /// Points that the job that is running does not keep.
    going: BTreeMap<ServerId, BTreeSet<CutId>>,
    /// When points were chosen last, by the retention clock.
    tended: BTreeMap<ServerId, u64>,
}

/// See [`Site::hold`].
#[derive(Default)]
pub struct Holds {
    state: Mutex<State>,
}

/// Why a point cannot be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotHeld {
    /// There is no such point, or it is being thinned away.
    Unknown,
}

/// Keeps a point as long as it lives.
pub struct Hold {
    holds: Arc<Holds>,
    key: (ServerId, CutId),
}

impl Holds {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the holds")
    }
}

/// The job of a server is over.
struct Done<'a> {
    holds: &'a Holds,
    server: ServerId,
}

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.holds.lock().going.remove(&self.server);
    }
}

impl State {
    fn is_going(&self, server: ServerId, cut: CutId) -> bool {
        self.going.get(&server).is_some_and(|going| going.contains(&cut))
    }

    fn held(&self, server: ServerId) -> BTreeSet<CutId> {
        let open = self.held.keys().filter(|(of, _)| *of == server).map(|(_, cut)| *cut);
        let pinned = self.pins.get(&server).into_iter().flat_map(|pins| pins.keys().copied());
        open.chain(pinned).collect()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.holds.lock();
        if let Some(count) = state.held.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                state.held.remove(&self.key);
            }
        }
    }
}

/// A volume of a server, open.
type Open = (VolumeId, Arc<Keeper>);

impl Site {
    /// Keeps a point from being promoted over or thinned away while the answer lives.
    pub fn hold(&self, server: ServerId, cut: CutId) -> Result<Hold, NotHeld> {
        let mut state = self.holds.lock();
        let (_, plan) = self.plan(server, &state);
        if !plan.points.contains(&cut) || state.is_going(server, cut) {
            return Err(NotHeld::Unknown);
        }
        *state.held.entry((server, cut)).or_default() += 1;
        Ok(Hold { holds: self.holds.clone(), key: (server, cut) })
    }

    /// Keeps a point that was kept before a restart; its volumes need not be open yet.
    pub fn hold_again(&self, server: ServerId, cut: CutId) -> Hold {
        *self.holds.lock().held.entry((server, cut)).or_default() += 1;
        Hold { holds: self.holds.clone(), key: (server, cut) }
    }

    /// The point of that name, if somebody keeps it.
    pub fn pinned(&self, server: ServerId, name: &str) -> Option<CutId> {
        let state = self.holds.lock();
        let its =
            |(cut, of): (&CutId, &Option<String>)| (of.as_deref() == Some(name)).then_some(*cut);
        state.pins.get(&server)?.iter().find_map(its)
    }

    /// Changes which points of a server stay beyond their time, durably.
    pub fn change_pins(
        &self,
        server: ServerId,
        change: impl FnOnce(&mut Pins) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut state = self.holds.lock();
        let before = state.pins.get(&server).cloned().unwrap_or_default();
        let mut pins = before;
        change(&mut pins)?;
        // A point that is being thinned away at this moment cannot be kept any more.
        let known = state.pins.get(&server);
        let mut fresh =
            pins.keys().filter(|cut| known.is_none_or(|known| !known.contains_key(cut)));
        if fresh.any(|cut| state.is_going(server, *cut)) {
            return Err("the point is just being thinned away".into());
        }
        let stored = self.server_disk(server).and_then(|disk| pins::store(&*disk, &pins));
        stored.map_err(|error| format!("writing {}: {error}", pins::FILE))?;
        state.pins.insert(server, pins);
        Ok(())
    }

    /// What the servers of the store keep beyond its time; until it is read nothing is thinned.
    pub(super) fn load_pins(&self, servers: &BTreeSet<ServerId>) {
        for server in servers {
            let loaded = self.server_disk(*server).and_then(|disk| pins::load(&*disk));
            match loaded {
                Ok(pins) => drop(self.holds.lock().pins.insert(*server, pins)),
                Err(error) => {
                    tracing::error!(%server, "{}: {error}; nothing is thinned", pins::FILE)
                }
            }
        }
    }

    /// A server whose first volume is new keeps nothing yet.
    pub(super) fn know_server(&self, server: ServerId) {
        if !self.holds.lock().pins.contains_key(&server) {
            self.load_pins(&[server].into());
        }
    }

    /// A job for a server's points.
    pub fn look_after(&self, server: ServerId) {
        self.holds.lock().tended.remove(&server);
        self.jobs.add(Job::Tend(server));
    }

    /// The points of a server as they are reported, oldest first.
    pub fn point_reports(&self, server: ServerId) -> Vec<PointReport> {
        let points = self.points(server);
        let state = self.holds.lock();
        let pins = state.pins.get(&server);
        let report = |point: CompletePoint| {
            let pin = pins.and_then(|pins| pins.get(&point.cut_id));
            let name = pin.cloned().flatten();
            PointReport { kept: pin.is_some(), name, ..point.report(server) }
        };
        points.into_iter().map(report).collect()
    }

    /// The points of a server that stay, oldest first.
    pub fn points(&self, server: ServerId) -> Vec<CompletePoint> {
        let (points, plan) = self.plan(server, &self.holds.lock());
        points.into_iter().filter(|point| plan.points.contains(&point.cut_id)).collect()
    }

    fn plan(&self, server: ServerId, state: &State) -> (Vec<CompletePoint>, Plan) {
        let volumes = epochs_of(&self.keepers(server));
        let points = complete_points(&volumes);
        let policy = self.policy(server);
        let held = state.held(server);
        let plan = plan(&points, &volumes, policy.as_ref(), &held, self.clock.now_s());
        (points, plan)
    }

    /// What the assignment says of a server's points; of one that it does not name all stay.
    fn policy(&self, server: ServerId) -> Option<KeepPolicy> {
        let id = server.to_string();
        match self.assignment().servers.iter().find(|server| server.id == id) {
            Some(server) => server.keep,
            None => Some(KeepPolicy { fine_seconds: u64::MAX, coarse_seconds: u64::MAX }),
        }
    }

    fn is_assigned(&self, server: ServerId) -> bool {
        let id = server.to_string();
        self.assignment().servers.iter().any(|server| server.id == id)
    }

    /// Promotes, gathers and thins the volumes of a server as its points allow.
    pub(super) fn tend(&self, server: ServerId) {
        let keepers = self.keepers(server);
        let plan = {
            let mut state = self.holds.lock();
            // What is kept beyond its time could not be read, or nobody says what to keep at all:
            // an assignment that is lost must not cost a point.
            if !state.pins.contains_key(&server) || !self.is_assigned(server) {
                return;
            }
            let now_s = self.clock.now_s();
            let tended = state.tended.get(&server);
            let due = tended.is_none_or(|at| now_s >= at + EVERY_S)
                || self.policy(server).is_none()
                || keepers.iter().any(|(_, keeper)| self.is_full(keeper));
            if !due {
                return;
            }
            state.tended.insert(server, now_s);
            let (points, plan) = self.plan(server, &state);
            let going = points.iter().map(|point| point.cut_id);
            let going = going.filter(|cut| !plan.points.contains(cut)).collect();
            state.going.insert(server, going);
            plan
        };
        // Also if an invariant breaks: who wants to hold a point must not wait for ever.
        let _done = Done { holds: &self.holds, server };
        for (volume, keeper) in &keepers {
            self.tend_volume(server, (*volume, keeper), &plan);
        }
    }

    fn tend_volume(&self, server: ServerId, (volume, keeper): (VolumeId, &Keeper), plan: &Plan) {
        // A promotion that was interrupted goes on even if no point asks for it now.
        let floor = plan.floor.get(&volume).copied().unwrap_or(Epoch(0));
        let again = |what: &str, refusal: &Refusal| {
            tracing::error!(%server, %volume, "{what}: {refusal}");
            if refusal.code == RefusalCode::NoSpace {
                self.again_later(server);
            }
        };
        match promote(keeper, floor, &|| !self.stopping()) {
            Ok(true) => {
                tracing::debug!(%server, %volume, epoch = floor.0, "epoch promoted");
                if let Some(entry) = self.entry(server, volume) {
                    entry.counts.promotions.fetch_add(1, Ordering::Relaxed);
                }
                self.changed();
            }
            Ok(false) if keeper.volume().record().promoting.is_some() => return, // told to end
            Ok(false) => {}
            // What was begun must be finished before anything is thinned: the replica is between
            // two epochs, and the layers make it whole.
            Err(refusal) => return again("promoting", &refusal),
        }
        let empty = BTreeSet::new();
        let kept = plan.kept.get(&volume).unwrap_or(&empty);
        while let Some(layers) = self.next_merge(keeper, kept) {
            match merge(keeper, &layers, kept, &|| !self.stopping()) {
                Ok(true) => tracing::debug!(%server, %volume, layers = layers.len(), "thinned"),
                Ok(false) => return,
                Err(refusal) => return again("thinning", &refusal),
            }
        }
    }

    /// Whether the epochs in memory are to become a run now.
    fn is_full(&self, keeper: &Keeper) -> bool {
        let volume = keeper.volume();
        let epochs = volume.epochs();
        let bytes: u64 = epochs.iter().map(|epoch| epoch.journal_bytes).sum();
        let pieces: usize = epochs.iter().map(|epoch| epoch.index.len()).sum();
        let old = epochs.first().is_some_and(|oldest| {
            self.clock.now_s().saturating_sub(oldest.facts.stamp_s) >= EPOCHS_AGE_S
        });
        bytes >= 4 * keeper.disk.segment_bytes().enough
            || pieces >= PIECES_MAX
            || epochs.len() >= EPOCHS_MAX
            || (old && epochs.len() > 1)
    }

    /// The neighbouring layers that are to become one next, if any.
    fn next_merge(&self, keeper: &Keeper, kept: &BTreeSet<Epoch>) -> Option<Vec<Layer>> {
        if self.is_full(keeper) {
            let mut layers = keeper.volume().layers();
            layers.retain(|layer| matches!(layer, Layer::Epoch(..)));
            return Some(layers);
        }
        let runs = keeper.volume().runs().to_vec();
        // Half of its points are none any more: what only they show goes.
        let thinned = runs.iter().find(|run| {
            let gone = dropped(run, kept);
            gone > 0 && gone * 2 >= run.facts.len()
        });
        if let Some(run) = thinned {
            return Some(vec![Layer::Run(run.clone())]);
        }
        let pieces: Vec<u64> = runs.iter().map(|run| run.pieces).collect();
        tier(&pieces, RUNS_MAX).map(|range| runs[range].iter().cloned().map(Layer::Run).collect())
    }
}

/// Points of a run that nobody keeps, and that a merge would take out.
fn dropped(run: &Run, kept: &BTreeSet<Epoch>) -> usize {
    // What came after the choice stays, as in `merge`.
    let upto = kept.last().copied().unwrap_or(Epoch(0));
    let gone = |facts: &&Arc<EpochFacts>| {
        !facts.dropped && facts.epoch <= upto && !kept.contains(&facts.epoch)
    };
    run.facts.iter().filter(gone).count()
}

/// Makes one run of neighbouring `layers`: the newest in memory, or runs. What is newer than all of
/// `kept` came after the choice, and stays too. Whether it was done.
pub fn merge(
    keeper: &Keeper,
    layers: &[Layer],
    kept: &BTreeSet<Epoch>,
    going: &dyn Fn() -> bool,
) -> Result<bool, Refusal> {
    let of = |layer: &Layer| match layer {
        Layer::Run(run) => (run.from, run.to),
        Layer::Epoch(epoch, _) => (Epoch(epoch.0 - 1), *epoch),
    };
    let (Some((from, _)), Some((_, to))) = (layers.first().map(of), layers.last().map(of)) else {
        return Ok(false);
    };
    let (facts, end, base, ids) = {
        let volume = keeper.volume();
        let record = volume.record();
        let runs = volume.runs().iter().flat_map(|run| &run.facts).cloned();
        let facts = runs.chain(volume.epochs().iter().map(|epoch| epoch.facts.clone()));
        let facts = facts.filter(|facts| facts.epoch > from && facts.epoch <= to).collect();
        let base = record.base.as_ref().map_or(Epoch(0), |base| base.epoch);
        (facts, volume.end_of(to), base, (record.volume, record.generation))
    };
    let (volume, generation) = ids;
    let chosen_upto = kept.last().copied().unwrap_or(Epoch(0));
    let facts: Vec<Arc<EpochFacts>> = facts;
    let later = facts.iter().map(|facts| facts.epoch).filter(|epoch| *epoch > chosen_upto);
    let kept = &kept.iter().copied().chain(later).collect();
    let merge = Merge { layers, from, end, facts, kept, base, volume, generation };
    let done = keeper.merge(&merge, going)?;
    keeper.let_go();
    Ok(done)
}

pub(super) fn epochs_of(keepers: &[Open]) -> Vec<VolumeEpochs> {
    let of = |(volume, keeper): &Open| {
        let held = keeper.volume();
        VolumeEpochs {
            volume: *volume,
            generation: held.record().generation,
            epochs: held.facts().collect(),
        }
    };
    keepers.iter().map(of).collect()
}
