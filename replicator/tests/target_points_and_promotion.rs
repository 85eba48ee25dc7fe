//! Attacks the common point of several volumes: cuts that are incomplete, fuzzy, doubted later,
//! compare-only, or whose members disagree must neither be promoted nor listed as what they are
//! not, and no volume may be promoted beyond the newest complete point.

use secondsite::target::points::{VolumeEpochs, complete_points, plan};
use secondsite::target::state::EpochFacts;
use secondsite_control::api::PointReport;
use secondsite_format::ids::{CutId, Epoch, Generation, ServerId, VolumeId};
use secondsite_format::manifest::{Consistency, CutMethod};
use std::collections::BTreeSet;
use std::sync::Arc;

const A: VolumeId = VolumeId([1; 16]);
const B: VolumeId = VolumeId([2; 16]);

/// An exact epoch of a cut of A and B.
fn exact(epoch: u64, cut: u8) -> EpochFacts {
    EpochFacts {
        epoch: Epoch(epoch),
        cut_id: CutId([cut; 16]),
        volume_bytes: 1 << 20,
        time_ns: 0, // says nothing: order must come from the epochs
        consistency: Consistency::Crash,
        method: CutMethod::Freeze,
        doubt_from: Epoch(0),
        members: vec![A, B],
        lacking: vec![],
        unreadable: vec![],
        chain: [0; 32],
        stamp_s: 0,
        dropped: false,
    }
}

fn fuzzy(epoch: u64, cut: u8, method: CutMethod) -> EpochFacts {
    EpochFacts { consistency: Consistency::Fuzzy, method, ..exact(epoch, cut) }
}

fn of(volume: VolumeId, epochs: Vec<EpochFacts>) -> VolumeEpochs {
    let epochs = epochs.into_iter().map(Arc::new).collect();
    VolumeEpochs { volume, generation: Generation(1), epochs }
}

fn listed(volumes: &[VolumeEpochs]) -> Vec<PointReport> {
    let points = complete_points(volumes);
    points.iter().map(|point| point.report(ServerId([7; 16]))).collect()
}

fn promoted(volumes: &[VolumeEpochs]) -> (u64, u64) {
    let wanted = plan(&complete_points(volumes), volumes, None, &BTreeSet::new(), 0).floor;
    let epoch = |volume| wanted.get(&volume).map_or(0, |epoch: &Epoch| epoch.0);
    (epoch(A), epoch(B))
}

#[test]
fn a_cut_that_one_volume_has_not_committed_is_no_point() {
    let volumes = [of(A, vec![exact(4, 1), exact(5, 2)]), of(B, vec![exact(9, 1)])];
    assert_eq!(promoted(&volumes), (4, 9));
    assert_eq!(listed(&volumes).len(), 1);
    assert_eq!(promoted(&[of(A, vec![exact(4, 1)])]), (0, 0));
}

#[test]
fn fuzzy_epochs_wait_for_the_next_exact_point() {
    let unproven = |epoch, cut| fuzzy(epoch, cut, CutMethod::Unproven);
    let mut a = vec![exact(1, 1), unproven(2, 2)];
    let mut b = vec![exact(1, 1), exact(2, 2)]; // one fuzzy member makes the point fuzzy
    assert_eq!(promoted(&[of(A, a.clone()), of(B, b.clone())]), (1, 1));
    let points = listed(&[of(A, a.clone()), of(B, b.clone())]);
    assert_eq!(points[1].consistency, "fuzzy");
    assert_eq!(points[1].reason, "writes went on while it was cut");
    a.push(exact(3, 3));
    b.push(exact(3, 3));
    assert_eq!(promoted(&[of(A, a), of(B, b)]), (3, 3));
}

#[test]
fn compare_only_volumes_are_promoted_and_labelled() {
    let compared = || fuzzy(2, 2, CutMethod::Compare);
    let volumes = [of(A, vec![exact(1, 1), compared()]), of(B, vec![exact(1, 1), exact(2, 2)])];
    assert_eq!(promoted(&volumes), (2, 2));
    assert_eq!(listed(&volumes)[1].consistency, "fuzzy");
    let unproven = fuzzy(2, 2, CutMethod::Unproven);
    let volumes = [of(A, vec![exact(1, 1), compared()]), of(B, vec![exact(1, 1), unproven])];
    assert_eq!(promoted(&volumes), (1, 1), "compare-only excuses only itself");
}

#[test]
fn a_doubt_takes_exact_from_the_epochs_before_it_and_not_from_its_own() {
    let doubting = EpochFacts { doubt_from: Epoch(2), ..exact(4, 4) };
    let a = vec![exact(1, 1), exact(2, 2), exact(3, 3), doubting];
    let b = (1..=4).map(|n| exact(n, n as u8)).collect();
    let points = listed(&[of(A, a), of(B, b)]);
    let kinds: Vec<&str> = points.iter().map(|point| point.consistency.as_str()).collect();
    assert_eq!(kinds, ["crash", "fuzzy", "fuzzy", "crash"]);
    assert!(points[1].reason.contains("later check"), "{}", points[1].reason);
}

#[test]
fn members_that_disagree_make_no_point() {
    let alone = EpochFacts { members: vec![B], ..exact(1, 1) };
    assert!(listed(&[of(A, vec![exact(1, 1)]), of(B, vec![alone])]).is_empty());
}

#[test]
fn a_point_that_lacks_a_volume_says_so() {
    let without = EpochFacts { members: vec![A], lacking: vec![B], ..exact(2, 2) };
    let volumes = [of(A, vec![exact(1, 1), without]), of(B, vec![exact(1, 1)])];
    assert_eq!(promoted(&volumes), (2, 1));
    assert_eq!(listed(&volumes)[1].lacking, [B.to_string()]);
}

#[test]
fn order_is_by_epoch_and_not_by_the_agents_clock() {
    let at = |epoch, cut, time_ns| EpochFacts { time_ns, ..exact(epoch, cut) };
    // The clock was set back between the cuts.
    let epochs = || vec![at(1, 9, 300), at(2, 5, 200), at(3, 7, 100)];
    let points = listed(&[of(A, epochs()), of(B, epochs())]);
    let order: Vec<u64> = points.iter().map(|point| point.epochs[&A.to_string()]).collect();
    assert_eq!(order, [1, 2, 3]);
}
