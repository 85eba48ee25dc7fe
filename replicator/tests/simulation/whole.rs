//! Whole runs from a seed: everything goes wrong that the seed says, then nothing any more, and
//! the second site has to be right all along and whole at the end.

use crate::rig::{GOAL, Rig};
use crate::seeds::each;
use crate::world::Rng;
use secondsite_format::manifest::Consistency;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What the runs came to, so that the test can insist that all of it was reached.
#[derive(Default)]
pub struct Totals {
    exact: AtomicU64,
    fuzzy: AtomicU64,
    give_ups: AtomicU64,
    compares: AtomicU64,
    kills: AtomicU64,
    deaths: AtomicU64,
    stops: AtomicU64,
    damaged: AtomicU64,
    grown: AtomicU64,
    shrunk: AtomicU64,
    set_backs: AtomicU64,
}

/// What a seed does.
struct Plan {
    rng: Rng,
    /// Its own for what follows, so that seeds without it are as they were before it was thought of.
    rarer: Rng,
    grows: u64,
    shrinks: u64,
    set_backs: u64,
    garbled: u64,
    volumes: usize,
    blocks: usize,
    freezable: bool,
    busy: u64,
    breaks: u64,
    errors: u64,
    full: u64,
    rot: u64,
    kills: u64,
    deaths: u64,
    reboots: u64,
    missing: u64,
    bad: u64,
    gone: u64,
}

impl Plan {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x5eed);
        let some = |rng: &mut Rng, percent: u64, values: &[u64]| {
            let value = values[rng.below(values.len() as u64) as usize];
            if rng.chance(percent) { value } else { 0 }
        };
        let mut rarer = Rng(seed ^ 0x517e5);
        Self {
            grows: some(&mut rarer, 40, &[1, 4]),
            shrinks: some(&mut rarer, 15, &[2]),
            set_backs: some(&mut rarer, 20, &[2, 5]),
            garbled: some(&mut rarer, 15, &[30, 200]),
            rarer,
            volumes: 1 + rng.below(3) as usize,
            blocks: if rng.chance(5) { 600 } else { 16 + rng.below(100) as usize },
            freezable: rng.chance(75),
            busy: [0, 10, 30, 60][rng.below(4) as usize],
            breaks: some(&mut rng, 60, &[2, 5, 12]),
            errors: some(&mut rng, 25, &[300, 1500]),
            full: some(&mut rng, 20, &[40, 300]),
            rot: some(&mut rng, 12, &[100, 400]),
            kills: some(&mut rng, 40, &[1, 4]),
            deaths: some(&mut rng, 50, &[2, 5]),
            reboots: some(&mut rng, 15, &[1]),
            missing: some(&mut rng, 20, &[10]),
            bad: some(&mut rng, 15, &[2]),
            gone: some(&mut rng, 10, &[1]),
            rng,
        }
    }

    /// What goes wrong before a round.
    fn act(&mut self, rig: &mut Rig) {
        let rng = &mut self.rng;
        if rng.chance(self.kills) {
            rig.world.state().kill_in = Some(rng.below(60));
        }
        if rng.chance(self.deaths) {
            rig.remote.state().dies_in = Some((rng.below(80), rng.chance(60)));
        }
        if rng.below(100) < self.reboots && rng.chance(30) {
            rig.reboot();
        }
        if rng.chance(self.bad) {
            let mut state = rig.world.state();
            let disk = rng.below(self.volumes as u64) as usize;
            if rng.chance(50) {
                state.disks[disk].bad.insert(rng.below(self.blocks as u64));
            } else {
                state.disks[disk].bad.clear();
            }
        }
        if rng.chance(self.gone) {
            let disk = rng.below(self.volumes as u64) as usize;
            let gone = rng.chance(30);
            rig.world.state().disks[disk].gone = gone;
        }
        let full = if rng.chance(50) { self.full } else { 0 };
        if rng.chance(5) {
            rig.remote.state().faults.full = full;
        }
        self.resize(rig);
        if self.rarer.chance(self.set_backs) {
            if self.rarer.chance(60) {
                rig.remote.snapshot();
            } else {
                rig.remote.set_back();
            }
        }
    }

    /// A disk grows, shrinks, or has its size back.
    fn resize(&mut self, rig: &mut Rig) {
        let rng = &mut self.rarer;
        let index = rng.below(self.volumes as u64) as usize;
        let shrunk = rig.world.state().disks[index].shrunk_to.is_some();
        if shrunk && rng.chance(15) {
            rig.world.unshrink(index);
        } else if !shrunk && rng.chance(self.shrinks) {
            rig.shrunk += 1;
            rig.world.shrink(index);
        } else if !shrunk && rng.chance(self.grows) {
            rig.grown += 1;
            let sectors = growth(rng);
            rig.world.grow(index, sectors);
        }
    }
}

/// By how many sectors a disk grows: mostly a few blocks, and seldom whole ones.
fn growth(rng: &mut Rng) -> u64 {
    let most = if rng.chance(10) { 1200 } else { 60 };
    1 + rng.below(most)
}

/// One run; the digest of all that happened in it.
pub fn run(seed: u64, totals: &Totals) -> u64 {
    let mut plan = Plan::new(seed);
    let mut rig = Rig::new(seed, plan.volumes, plan.blocks, plan.freezable);
    {
        let mut state = rig.world.state();
        (state.busy, state.missing) = (plan.busy, plan.missing);
        state.raw = plan.rng.chance(10);
    }
    rig.kills_growing = if plan.kills > 0 { 50 } else { 0 };
    {
        let mut state = rig.remote.state();
        let (breaks, errors, rot) = (plan.breaks, plan.errors, plan.rot);
        let garbled = plan.garbled;
        state.faults = crate::remote::Faults { breaks, garbled, errors, full: 0, rot };
    }
    for _ in 0..60 + plan.rng.below(140) {
        plan.act(&mut rig);
        rig.round();
    }
    rig.heal();
    rig.world.state().busy = 0;
    rig.world.settle();
    let mut ended = false;
    if rig.exact_point(10 * fault_free(plan.volumes)).is_none() {
        // Only damage may stop a volume for good, and then it has said so.
        // A target that was just started may not have looked again; the source knows what it said.
        let faces: Vec<_> = rig.faces().collect();
        let said = faces.iter().map(|status| status.reason.clone());
        let named = rig.remote.errors().into_iter().flatten().chain(said).any(|error| {
            error.contains("damaged") || error.contains("is missing") || error.contains("cut short")
        });
        assert!(rig.remote.rotten() && named, "no exact point in time: {faces:#?}");
        totals.damaged.fetch_add(1, Ordering::Relaxed);
        ended = true;
    }
    if !ended {
        rig.calm();
        let (point, is_exact) = rig.cut();
        assert!(is_exact, "quiet and connected: exact, {point}");
        rig.check_equal();
        rig.work_off();
        rig.remote.restart();
        rig.work_off();
        rig.check_equal();
        let mut rests = || if plan.rarer.chance(30) { growth(&mut plan.rarer) } else { 0 };
        let sectors: Vec<u64> = (0..plan.volumes).map(|_| rests()).collect();
        if sectors.iter().any(|sectors| *sectors > 0) {
            rig.grow_at_rest(&sectors);
            rig.work_off();
            rig.check_equal();
        }
    }
    for volume in 0..plan.volumes {
        let manifests = rig.remote.manifests(volume);
        let exact = manifests.iter().filter(|m| m.consistency == Consistency::Crash).count() as u64;
        totals.exact.fetch_add(exact, Ordering::Relaxed);
        totals.fuzzy.fetch_add(manifests.len() as u64 - exact, Ordering::Relaxed);
    }
    let add = |to: &AtomicU64, count: u64| to.fetch_add(count, Ordering::Relaxed);
    add(&totals.give_ups, rig.give_ups);
    add(&totals.kills, rig.kills);
    add(&totals.compares, rig.faces().map(|status| status.compares).sum());
    add(&totals.deaths, rig.remote.state().deaths);
    add(&totals.stops, rig.remote.state().stops);
    add(&totals.grown, rig.grown);
    add(&totals.shrunk, rig.shrunk);
    add(&totals.set_backs, rig.remote.state().set_backs);
    rig.world.trace()
}

/// How long the first exact point of so many volumes takes when nothing goes wrong, or the goal if
/// that is longer.
fn fault_free(volumes: usize) -> Duration {
    static KNOWN: [OnceLock<Duration>; 4] = [const { OnceLock::new() }; 4];
    *KNOWN[volumes].get_or_init(|| {
        let mut rig = Rig::new(1, volumes, 64, true);
        rig.exact_point(Duration::from_secs(60)).expect("nothing goes wrong").max(GOAL)
    })
}

#[test]
fn the_second_site_is_right_whatever_breaks() {
    let totals = Totals::default();
    let begun = std::time::Instant::now();
    each(1000, |seed| {
        run(seed, &totals);
    });
    let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
    println!(
        "exact {}, fuzzy {}, given up {}, compares {}, agents killed {}, target deaths {}, \
         stopped volumes {}, ended by damage {}, grown {}, shrunk {}, target set back {}, {:?}",
        of(&totals.exact),
        of(&totals.fuzzy),
        of(&totals.give_ups),
        of(&totals.compares),
        of(&totals.kills),
        of(&totals.deaths),
        of(&totals.stops),
        of(&totals.damaged),
        of(&totals.grown),
        of(&totals.shrunk),
        of(&totals.set_backs),
        begun.elapsed()
    );
    if std::env::var_os("SECONDSITE_SEED").is_none()
        && std::env::var_os("SECONDSITE_SEEDS").is_none()
    {
        let all = [&totals.give_ups, &totals.compares, &totals.kills, &totals.deaths];
        let all = all.into_iter().chain([&totals.grown, &totals.shrunk, &totals.set_backs]);
        assert!({ all }.all(|count| of(count) > 100), "the seeds reach all of it");
        assert!(of(&totals.exact) > 2000 && of(&totals.fuzzy) > 300, "and make points");
        assert!(of(&totals.stops) > 10 && of(&totals.damaged) > 3, "and damage");
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    each(12, |seed| {
        let totals = Totals::default();
        assert_eq!(run(seed, &totals), run(seed, &totals), "seed {seed} is not one run");
    });
}
