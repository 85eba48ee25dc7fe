//! Recovery points of one server, derived from what its volumes have; which of them stay, and how
//! far to promote.
//!
//! Pure. A point is complete when every member volume of its manifests still has that cut, as its
//! base or in its journal. Order is by epoch, never by wall time (only points that share no volume
//! fall back to it).

use super::retention::{self, Candidate};
use super::state::{EpochFacts, consistency_word};
use secondsite_control::api::{KeepPolicy, PointReport};
use secondsite_format::ids::{CutId, Epoch, Generation, ServerId, VolumeId};
use secondsite_format::manifest::{Consistency, CutMethod};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What one volume has: its base, if any, and the epochs of its journal, rising.
#[derive(Debug, Clone)]
pub struct VolumeEpochs {
    /// The volume.
    pub volume: VolumeId,
    /// Its generation.
    pub generation: Generation,
    /// Rising.
    pub epochs: Vec<Arc<EpochFacts>>,
}

/// A complete recovery point.
#[derive(Debug, Clone)]
pub struct CompletePoint {
    /// The cut.
    pub cut_id: CutId,
    /// Its time, by the agent's clock.
    pub time_ns: u64,
    /// When it was committed by the retention clock, seconds.
    pub stamp_s: u64,
    generation: Generation,
    members: BTreeMap<VolumeId, Arc<EpochFacts>>,
    consistency: Consistency,
    doubted: bool,
}

/// All complete points, oldest first.
pub fn complete_points(volumes: &[VolumeEpochs]) -> Vec<CompletePoint> {
    let mut cuts: BTreeMap<CutId, CompletePoint> = BTreeMap::new();
    for volume in volumes {
        let mut doubt_from = Epoch(u64::MAX);
        for facts in volume.epochs.iter().rev() {
            // What manifests behind this one say; its own doubt is about those before it.
            let doubted = doubt_from <= facts.epoch;
            if facts.doubt_from != Epoch(0) {
                doubt_from = doubt_from.min(facts.doubt_from);
            }
            if facts.dropped {
                continue;
            }
            let point = cuts.entry(facts.cut_id).or_insert_with(|| CompletePoint {
                cut_id: facts.cut_id,
                time_ns: facts.time_ns,
                stamp_s: facts.stamp_s,
                generation: volume.generation,
                members: BTreeMap::new(),
                consistency: facts.consistency,
                doubted,
            });
            point.time_ns = point.time_ns.max(facts.time_ns);
            point.stamp_s = point.stamp_s.max(facts.stamp_s);
            point.consistency = point.consistency.min(facts.consistency);
            point.doubted |= doubted;
            point.members.insert(volume.volume, facts.clone());
        }
    }
    cuts.retain(|_, point| point.is_complete());
    in_order(cuts)
}

impl CompletePoint {
    /// The epoch of each volume of it.
    pub fn epochs(&self) -> impl Iterator<Item = (VolumeId, Epoch)> {
        self.members.iter().map(|(volume, facts)| (*volume, facts.epoch))
    }

    /// All manifests name the same members, and each of them is here.
    fn is_complete(&self) -> bool {
        self.members.values().all(|facts| facts.members.iter().eq(self.members.keys()))
    }

    /// Exact: proven, and not doubted since.
    pub fn is_exact(&self) -> bool {
        !self.doubted && self.consistency != Consistency::Fuzzy
    }

    /// May become the replica: exact, or fuzzy only because a volume is compare-only, which never
    /// gives anything better.
    fn may_be_promoted(&self) -> bool {
        let good = |facts: &Arc<EpochFacts>| {
            facts.consistency != Consistency::Fuzzy || facts.method == CutMethod::Compare
        };
        !self.doubted && self.members.values().all(good)
    }

    fn reason(&self) -> String {
        if self.is_exact() {
            return String::new();
        }
        let fuzzy = || self.members.values().filter(|f| f.consistency == Consistency::Fuzzy);
        let unreadable: Vec<String> = fuzzy()
            .flat_map(|facts| &facts.unreadable)
            .map(|(offset, bytes)| format!("{bytes} bytes at {offset}"))
            .collect();
        if !unreadable.is_empty() {
            format!("could not be read on the server: {}", unreadable.join(", "))
        } else if fuzzy().any(|facts| facts.method == CutMethod::Compare) {
            "made by comparing alone: no tracker follows the volume".into()
        } else if self.doubted {
            "a later check of the tracker found a gap that may reach back to it".into()
        } else {
            "writes went on while it was cut".into()
        }
    }

    /// As it is reported.
    pub fn report(&self, server: ServerId) -> PointReport {
        let lacking: BTreeSet<&VolumeId> =
            self.members.values().flat_map(|facts| &facts.lacking).collect();
        let consistency = if self.is_exact() { self.consistency } else { Consistency::Fuzzy };
        let epoch =
            |(volume, facts): (&VolumeId, &Arc<EpochFacts>)| (volume.to_string(), facts.epoch.0);
        PointReport {
            server: server.to_string(),
            id: self.cut_id.to_string(),
            time_ns: self.time_ns,
            generation: self.generation.0,
            epochs: self.members.iter().map(epoch).collect(),
            consistency: consistency_word(consistency).into(),
            lacking: lacking.into_iter().map(VolumeId::to_string).collect(),
            reason: self.reason(),
        }
    }
}

/// Oldest first: a point comes only after every point that holds an earlier epoch of one of its
/// volumes; of those that may come, the one with the earliest time.
fn in_order(mut cuts: BTreeMap<CutId, CompletePoint>) -> Vec<CompletePoint> {
    let mut lines: BTreeMap<VolumeId, Vec<(Epoch, CutId)>> = BTreeMap::new();
    for point in cuts.values() {
        for (volume, facts) in &point.members {
            lines.entry(*volume).or_default().push((facts.epoch, point.cut_id));
        }
    }
    let mut waits: BTreeMap<CutId, usize> = cuts.keys().map(|cut| (*cut, 0)).collect();
    let mut followers: BTreeMap<CutId, Vec<CutId>> = BTreeMap::new();
    for line in lines.values_mut() {
        line.sort_unstable();
        for pair in line.windows(2) {
            followers.entry(pair[0].1).or_default().push(pair[1].1);
            *waits.get_mut(&pair[1].1).expect("every cut waits") += 1;
        }
    }
    let mut ready: BTreeSet<(u64, CutId)> = waits
        .iter()
        .filter(|(_, count)| **count == 0)
        .map(|(cut, _)| (cuts[cut].time_ns, *cut))
        .collect();
    let mut ordered = Vec::with_capacity(cuts.len());
    while let Some((_, cut)) = ready.pop_first() {
        for follower in followers.remove(&cut).unwrap_or_default() {
            let count = waits.get_mut(&follower).expect("every cut waits");
            *count -= 1;
            if *count == 0 {
                ready.insert((cuts[&follower].time_ns, follower));
            }
        }
        ordered.extend(cuts.remove(&cut));
    }
    // Manifests that order two points both ways are of an agent that lies about its own volumes;
    // they stay listed, by id.
    ordered.extend(cuts.into_values());
    ordered
}

/// What is to become of a server's recovery points.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The points that stay.
    pub points: BTreeSet<CutId>,
    /// Of each volume, the epochs that must go on being shown.
    pub kept: BTreeMap<VolumeId, BTreeSet<Epoch>>,
    /// How far each volume is to be promoted: never beyond a point that stays.
    pub floor: BTreeMap<VolumeId, Epoch>,
}

/// Chooses among `points`, all complete ones of a server, oldest first. Without a policy only the
/// newest that may become the replica stays, and what is newer. Points of `held` stay in any case.
pub fn plan(
    points: &[CompletePoint],
    volumes: &[VolumeEpochs],
    policy: Option<&KeepPolicy>,
    held: &BTreeSet<CutId>,
    now_s: u64,
) -> Plan {
    let held = |point: &CompletePoint| held.contains(&point.cut_id);
    let keep = match policy {
        Some(policy) => {
            let candidate = |point: &CompletePoint| Candidate {
                stamp_s: point.stamp_s,
                rank: point.is_exact().into(),
                held: held(point),
            };
            let candidates: Vec<Candidate> = points.iter().map(candidate).collect();
            retention::kept(&candidates, policy, now_s)
        }
        None => {
            let newest = points.iter().rposition(CompletePoint::may_be_promoted).unwrap_or(0);
            points.iter().enumerate().map(|(i, point)| i >= newest || held(point)).collect()
        }
    };
    let mut plan = Plan::default();
    let oldest = keep.iter().position(|kept| *kept).map_or(0, |oldest| oldest + 1);
    let floor = points[..oldest].iter().rposition(CompletePoint::may_be_promoted);
    for point in points[..floor.map_or(0, |at| at + 1)].iter().filter(|p| p.may_be_promoted()) {
        for (volume, epoch) in point.epochs() {
            let to = plan.floor.entry(volume).or_default();
            *to = epoch.max(*to);
        }
    }
    for (volume, epoch) in &plan.floor {
        plan.kept.entry(*volume).or_default().insert(*epoch);
    }
    for (point, _) in points.iter().zip(&keep).filter(|(_, kept)| **kept) {
        plan.points.insert(point.cut_id);
        for (volume, epoch) in point.epochs() {
            plan.kept.entry(volume).or_default().insert(epoch);
        }
    }
    // What is newer than a volume's newest point may yet become one.
    for volume in volumes {
        let kept = plan.kept.entry(volume.volume).or_default();
        let of = |point: &CompletePoint| point.members.get(&volume.volume).map(|f| f.epoch);
        let newest = points.iter().filter_map(of).max().unwrap_or(Epoch(0));
        kept.extend(volume.epochs.iter().map(|facts| facts.epoch).filter(|e| *e > newest));
    }
    plan
}
