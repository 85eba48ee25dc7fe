//! Volumes behind a filter, alone and beside others: whatever breaks, their points are what the
//! volumes were at one instant, and no freeze is needed for it.

use crate::rig::Rig;
use crate::seeds::each;
use crate::world::Rng;
use secondsite_format::manifest::{Consistency, CutMethod};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

#[derive(Default)]
struct Totals {
    exact: AtomicU64,
    fuzzy: AtomicU64,
    give_ups: AtomicU64,
    kills: AtomicU64,
}

fn run(seed: u64, totals: &Totals) {
    let mut rng = Rng(seed ^ 0xf117e4);
    let mut volumes: Vec<bool> = (0..=rng.below(3)).map(|_| rng.chance(60)).collect();
    volumes[0] = true;
    let blocks = 16 + rng.below(100) as usize;
    let slots = [3, 12, 200][rng.below(3) as usize];
    let mut rig = Rig::filtered(seed, &volumes, blocks, slots);
    rig.world.state().busy = [10, 40, 80][rng.below(3) as usize];
    {
        let mut state = rig.remote.state();
        let breaks = [0, 0, 3, 8][rng.below(4) as usize];
        state.faults = crate::remote::Faults { breaks, ..Default::default() };
    }
    let (kills, deaths) = ([0, 0, 3][rng.below(3) as usize], [0, 3][rng.below(2) as usize]);
    for _ in 0..100 + rng.below(100) {
        if rng.chance(kills) {
            rig.world.state().kill_in = Some(rng.below(60));
        }
        if rng.chance(deaths) {
            rig.remote.state().dies_in = Some((rng.below(80), rng.chance(60)));
        }
        if kills > 0 && rng.below(400) == 0 {
            rig.reboot();
        }
        rig.round();
    }
    rig.heal();
    // Still written to, if all lie behind the filter.
    if volumes.contains(&false) {
        rig.world.state().busy = 0;
        rig.world.settle();
    }
    let point = rig.exact_point(Duration::from_secs(120));
    assert!(point.is_some(), "no exact point: {:#?}", rig.faces().collect::<Vec<_>>());
    rig.calm();
    let (point, is_exact) = rig.cut();
    assert!(is_exact, "quiet and connected: exact, {point}");
    rig.check_equal();
    rig.work_off();
    rig.remote.restart();
    rig.work_off();
    rig.check_equal();
    for (volume, filtered) in volumes.iter().enumerate() {
        for manifest in rig.remote.manifests(volume) {
            let exact = manifest.consistency == Consistency::Crash;
            assert_eq!(manifest.method == CutMethod::Hold, *filtered, "{manifest:?}");
            assert!(exact || volumes.contains(&false), "behind the filter: exact, {manifest:?}");
            let count = if exact { &totals.exact } else { &totals.fuzzy };
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
    totals.give_ups.fetch_add(rig.give_ups, Ordering::Relaxed);
    totals.kills.fetch_add(rig.kills, Ordering::Relaxed);
}

#[test]
fn points_behind_the_filter_are_right_whatever_breaks() {
    let totals = Totals::default();
    each(150, |seed| run(seed, &totals));
    let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
    println!(
        "exact {}, fuzzy {}, given up {}, agents killed {}",
        of(&totals.exact),
        of(&totals.fuzzy),
        of(&totals.give_ups),
        of(&totals.kills)
    );
    if std::env::var_os("SECONDSITE_SEED").is_none() {
        assert!(of(&totals.exact) > 500 && of(&totals.give_ups) > 50 && of(&totals.kills) > 50);
    }
}
