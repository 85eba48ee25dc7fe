//! The source's own promises over a real target: freezes within their budget, compares after missed
//! writes, verify, unreadable blocks, vanished disks, volumes without a tracker.

use crate::rig::Rig;
use crate::seeds::seeds;
use crate::world::BLOCK;
use secondsite_control::api::{OrderKind, OrderResult, OrderState, VolumePhase};
use secondsite_format::manifest::{Consistency, CutMethod};
use std::time::Duration;

#[test]
fn a_busy_volume_is_exact_under_a_freeze_within_the_budget() {
    let mut rig = Rig::new(5, 2, 64, true);
    rig.follow();
    rig.world.state().busy = 70;
    let begun = rig.world.state().now;
    rig.run_for(Duration::from_secs(120));
    let methods: Vec<_> = rig.remote.manifests(0).iter().map(|m| m.method).collect();
    assert!(methods.contains(&CutMethod::Freeze));
    let freezes = rig.world.state().freezes;
    let now = rig.world.state().now;
    // Each took 10 ms: at most one a second.
    assert!(freezes > 5 && freezes <= (now - begun).as_secs() + 1, "{freezes} freezes");
}

#[test]
fn missed_writes_become_a_compare_and_nothing_is_lost() {
    for seed in seeds(30) {
        let mut rig = Rig::new(seed, 2, 80, true);
        rig.follow();
        {
            let mut state = rig.world.state();
            (state.busy, state.missing) = (40, 10);
        }
        rig.run(300);
        rig.calm();
        rig.world.state().missing = 0;
        rig.cut();
        rig.check_equal();
        let compares: u64 = rig.faces().map(|status| status.compares).sum();
        assert!(compares >= 3, "two at the start are void, missed writes are not: {compares}");
    }
}

#[test]
fn verify_finds_damage_and_nothing_else() {
    for seed in seeds(20) {
        let mut rig = Rig::new(seed, 2, 300, true);
        rig.follow();
        rig.world.state().busy = 30;
        rig.run(50);
        assert_eq!(rig.verify(), [0, 0], "a busy volume is not damaged, seed {seed}");
        rig.calm();
        rig.cut();
        rig.work_off();
        rig.remote.keep_the_newest_alone();
        rig.work_off();
        rig.remote.tamper(1, 7 * BLOCK + 5);
        assert_eq!(rig.verify(), [0, BLOCK as u64], "seed {seed}");
    }
}

#[test]
fn a_verify_ends_when_the_target_stays_away() {
    let mut rig = Rig::new(7, 1, 64, true);
    rig.follow();
    rig.remote.stays_away(Duration::from_secs(600));
    let begun = rig.world.state().now;
    let state = rig.order(OrderKind::Verify);
    let OrderState::Failed { exit_code: 75, message } = state else { panic!("{state:?}") };
    assert!(message.contains("no session with the target for 4 min"), "{message}");
    assert!(rig.world.state().now < begun + Duration::from_secs(300));
    rig.run_for(Duration::from_secs(600));
    assert_eq!(rig.verify(), [0]);
}

/// The clock goes on while the coordinator works: a round that it has just begun must not wait
/// until the coordinator would have looked anyway.
#[test]
fn an_ordered_cut_begins_at_once() {
    let mut rig = Rig::new(9, 1, 64, true);
    rig.follow();
    rig.cut();
    rig.world.state().now += Duration::from_millis(10);
    assert!(rig.coordinate() > Duration::from_millis(100), "nothing is going on");
    rig.take(OrderKind::Cut);
    assert_eq!(rig.coordinate(), Duration::ZERO);
}

#[test]
fn an_unreadable_block_makes_points_fuzzy_until_it_can_be_read() {
    let mut rig = Rig::new(3, 1, 64, true);
    rig.follow();
    {
        let mut state = rig.world.state();
        state.disks[0].bad.insert(9);
        state.disks[0].data[9 * BLOCK..11 * BLOCK].fill(77);
        let run = secondsite_tracker::marks::BlockRun { first: 9, count: 2 };
        state.disks[0].marks.mark(run);
    }
    let state = rig.order(OrderKind::Cut);
    let OrderState::Failed { exit_code: 75, message } = state else { panic!("{state:?}") };
    assert!(message.contains("cannot be read"), "{message}");
    let manifest = rig.remote.manifests(0).last().unwrap().clone();
    assert_eq!(manifest.consistency, Consistency::Fuzzy);
    assert_eq!(manifest.unreadable, [(9 * BLOCK as u64, BLOCK as u64)]);
    assert_eq!(rig.remote.read(0)[10 * BLOCK], 77, "everything else goes on");
    rig.world.state().disks[0].bad.clear();
    assert!(rig.cut().1);
    rig.check_equal();
}

#[test]
fn a_compare_only_volume_has_fuzzy_points_of_its_own() {
    let mut rig = Rig::compare_only(11, 2, 90);
    rig.follow();
    for disk in rig.world.state().disks.iter_mut() {
        disk.data[3 * BLOCK..5 * BLOCK].fill(42);
    }
    let OrderState::Done { result: OrderResult::Cut { exact, .. } } = rig.order(OrderKind::Cut)
    else {
        panic!("a cut order is done")
    };
    assert!(!exact);
    rig.check_equal();
    let manifest = rig.remote.manifests(1).last().unwrap().clone();
    assert_eq!((manifest.method, manifest.consistency), (CutMethod::Compare, Consistency::Fuzzy));
    assert_eq!(manifest.members.len(), 2, "an order takes all volumes together");
    rig.run_for(Duration::from_secs(300));
    let alone = rig.remote.manifests(0).last().unwrap().clone();
    assert_eq!(alone.members.len(), 1);
    assert_eq!(alone.frames, 0, "nothing differs, nothing travels");
    rig.work_off();
    rig.remote.tamper(0, 0);
    assert_eq!(rig.verify(), [BLOCK as u64, 0]);
}

#[test]
fn a_device_that_vanishes_stops_its_volume_and_no_other() {
    let mut rig = Rig::new(2, 2, 50, true);
    rig.follow();
    rig.world.state().disks[0].gone = true;
    rig.run_for(Duration::from_secs(30));
    let faces: Vec<_> = rig.faces().collect();
    assert_eq!(faces[0].phase, VolumePhase::Stopped);
    assert!(faces[0].reason.contains("gone"), "{}", faces[0].reason);
    assert_eq!(faces[1].phase, VolumePhase::Following);
    let before = rig.remote.manifests(1).len();
    rig.run_for(Duration::from_secs(60));
    let manifests = rig.remote.manifests(1);
    assert!(manifests.len() > before);
    assert_eq!(manifests.last().unwrap().lacking.len(), 1, "the point says what it lacks");
}
