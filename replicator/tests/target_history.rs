//! Attacks kept history: epochs with random extents are committed, gathered into runs, merged and
//! thinned by random choices of what is kept, promoted as far as those allow; the power goes at
//! every access of that, also twice. Whatever is kept must read as it was when it was committed,
//! and the replica volume must equal its base.

mod target_support;

use secondsite::target::disk::Disk;
use secondsite::target::disk::memory::MemoryDisk;
use secondsite::target::keeper::Keeper;
use secondsite::target::layers::Layer;
use secondsite::target::promote::promote;
use secondsite::target::tend::merge;
use secondsite_format::ids::Epoch;
use secondsite_format::message::Refusal;
use std::collections::BTreeSet;
use target_support::{BLOCKS, KEY, Put, SYNC, Script, VOLUME_BYTES, open};

const EPOCHS: u64 = 14;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// What is done, made from a seed beforehand, so that a run after a crash does the same.
#[derive(Clone)]
enum Step {
    Epoch(Script),
    /// The epochs in memory become a run.
    Gather,
    /// So many runs from this one on become one.
    Merge(usize, usize),
    /// These epochs are no points any more.
    Drop(Vec<u64>),
    Promote,
}

fn steps(rng: &mut Rng) -> Vec<Step> {
    let mut steps = Vec::new();
    for epoch in 1..=EPOCHS {
        let mut frames = Vec::new();
        for _ in 0..rng.below(4) {
            let mut at = rng.below(4);
            let mut puts = Vec::new();
            while at < BLOCKS {
                let count = (1 + rng.below(3)).min(BLOCKS - at);
                puts.push(match rng.below(4) {
                    0 => Put::Zero(at, count),
                    1 => Put::Discard(at, count),
                    _ => Put::Fill(at, rng.next() as u8),
                });
                at += count + rng.below(6);
            }
            if !puts.is_empty() {
                frames.push((1 + rng.below(2) as u32, puts));
            }
        }
        steps.push(Step::Epoch(Script::new(epoch, frames)));
        for _ in 0..rng.below(3) {
            steps.push(match rng.below(5) {
                0 | 1 => Step::Gather,
                2 => Step::Merge(rng.below(4) as usize, 1 + rng.below(3) as usize),
                3 => Step::Drop((1..=epoch).filter(|_| rng.below(10) < 3).collect()),
                _ => Step::Promote,
            });
        }
    }
    steps
}

/// The volume after each epoch, from none on.
fn models(steps: &[Step]) -> Vec<Vec<u8>> {
    let mut models = vec![vec![0; VOLUME_BYTES as usize]];
    for step in steps {
        if let Step::Epoch(script) = step {
            let mut model = models.last().unwrap().clone();
            script.apply(&mut model);
            models.push(model);
        }
    }
    models
}

/// What the world knows: what was acknowledged, and which points nobody wants any more.
#[derive(Default, Clone)]
struct Known {
    acknowledged: u64,
    dropped: BTreeSet<u64>,
}

impl Known {
    /// What is kept: everything but the dropped, and the newest in any case.
    fn kept(&self, keeper: &Keeper) -> BTreeSet<Epoch> {
        let newest = keeper.volume().durable().map_or(Epoch(0), |facts| facts.epoch);
        let kept = (1..=newest.0).filter(|epoch| !self.dropped.contains(epoch)).map(Epoch);
        kept.chain([newest]).collect()
    }
}

/// Does them all, and looks at everything after each if `models` are given.
fn do_steps(
    disk: &MemoryDisk,
    steps: &[Step],
    known: &mut Known,
    models: Option<&[Vec<u8>]>,
) -> Result<(), String> {
    let text = |refusal: Refusal| refusal.message;
    let keeper = open(disk.clone()).map_err(|error| error.to_string())?;
    if !keeper.volume().copied() {
        keeper.copy_begin(SYNC).map_err(text)?;
        keeper.copy_done(SYNC).map_err(text)?;
    }
    // What was begun is finished first, as the target does it.
    promote(&keeper, Epoch(0), &|| true).map_err(text)?;
    for step in steps {
        let kept = known.kept(&keeper);
        match step {
            Step::Epoch(script) => {
                let (durable, previous) = {
                    let volume = keeper.volume();
                    let facts = volume.durable();
                    facts.map_or((0, [0; 32]), |facts| (facts.epoch.0, facts.chain))
                };
                if script.epoch <= durable {
                    continue;
                }
                for frame in script.data() {
                    keeper.data(&frame).map_err(text)?;
                }
                keeper.commit(&script.commit(previous), &KEY).map_err(text)?;
                known.acknowledged = script.epoch;
            }
            Step::Gather => {
                let mut layers = keeper.volume().layers();
                layers.retain(|layer| matches!(layer, Layer::Epoch(..)));
                merge(&keeper, &layers, &kept, &|| true).map_err(text)?;
            }
            Step::Merge(first, count) => {
                let runs = keeper.volume().runs().to_vec();
                let runs = runs.into_iter().skip(*first).take(*count).map(Layer::Run);
                merge(&keeper, &runs.collect::<Vec<_>>(), &kept, &|| true).map_err(text)?;
            }
            Step::Drop(epochs) => known.dropped.extend(epochs),
            Step::Promote => {
                let floor = kept.first().copied().unwrap_or(Epoch(0));
                promote(&keeper, floor, &|| true).map_err(text)?;
            }
        }
        if let Some(models) = models {
            check(&keeper, disk, models, known, "in between");
        }
    }
    Ok(())
}

/// Every kept epoch above the base can be opened and reads as it was; the replica is its base.
fn check(keeper: &Keeper, disk: &MemoryDisk, models: &[Vec<u8>], known: &Known, when: &str) {
    let newest = keeper.volume().durable().map_or(0, |facts| facts.epoch.0);
    assert!(newest >= known.acknowledged, "{when}: epoch {} is lost", known.acknowledged);
    let record = keeper.volume().record().clone();
    let base = record.base.as_ref().map_or(0, |base| base.epoch.0);
    let begun = record.promoting.map_or(base, |promoting| promoting.to.0);
    for epoch in begun.max(1)..=newest {
        let wanted = !known.dropped.contains(&epoch) || epoch == newest;
        let Some(view) = keeper.view_at(Epoch(epoch)).unwrap() else {
            assert!(!wanted, "{when}: point {epoch} is gone");
            continue;
        };
        let mut found = vec![0; view.volume_bytes as usize];
        view.read(0, &mut found).unwrap_or_else(|error| panic!("{when}: {epoch}: {error}"));
        // A dropped point may be there still; then it must be right, or be no point.
        let runs: Vec<_> =
            keeper.volume().runs().iter().map(|run| (run.from.0, run.to.0)).collect();
        assert!(
            found == models[epoch as usize],
            "{when}: point {epoch} of {newest} reads otherwise; base {base}, runs {runs:?}"
        );
    }
    if record.promoting.is_none() {
        let replica = disk.read("replica.img", VOLUME_BYTES).unwrap().unwrap();
        assert!(replica == models[base as usize], "{when}: the replica is not its base {base}");
    }
}

fn check_opened(disk: &MemoryDisk, models: &[Vec<u8>], known: &Known, when: &str) {
    let keeper = open(disk.clone()).unwrap_or_else(|error| panic!("{when}: {error}"));
    if keeper.volume().copied() {
        check(&keeper, disk, models, known, when);
    }
    // What a crash left behind is gone: every file is one that something needs.
    let needed = keeper.volume().needed_segments().len();
    let history = disk.list("history").unwrap();
    let runs = history.iter().filter(|name| name.ends_with(".run")).count();
    assert_eq!(runs, keeper.volume().runs().len(), "{when}: {history:?}");
    let kept = history.iter().filter(|name| name.ends_with(".seg")).count();
    assert!(kept <= needed && kept + runs == history.len(), "{when}: {history:?}");
}

fn seeds() -> std::ops::Range<u64> {
    match std::env::var("SECONDSITE_SEED") {
        Ok(seed) => {
            let seed = seed.parse().expect("SECONDSITE_SEED is a number");
            seed..seed + 1
        }
        Err(_) if std::env::var_os("SECONDSITE_LONG").is_some() => 0..2000,
        Err(_) => 0..60,
    }
}

#[test]
fn whatever_is_kept_reads_as_it_was() {
    for seed in seeds() {
        let steps = steps(&mut Rng(seed));
        let disk = MemoryDisk::default();
        let mut known = Known::default();
        let models = models(&steps);
        do_steps(&disk, &steps, &mut known, Some(&models))
            .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        check_opened(&disk, &models, &known, &format!("seed {seed}, opened again"));
        assert!(known.acknowledged == EPOCHS);
    }
}

#[test]
fn a_crash_at_every_access_loses_no_kept_point() {
    for seed in seeds().take(if std::env::var_os("SECONDSITE_LONG").is_some() { 60 } else { 4 }) {
        let steps = steps(&mut Rng(seed));
        let disk = MemoryDisk::default();
        let models = models(&steps);
        do_steps(&disk, &steps, &mut Known::default(), None).unwrap();
        for at in 0..disk.operations() {
            let disk = MemoryDisk::default();
            disk.crash_at(at);
            let mut known = Known::default();
            do_steps(&disk, &steps, &mut known, None).expect_err("the disk is dead");
            for tear in 0..2 {
                let when = format!("seed {seed}: crash at {at}, tear {tear}");
                let found = disk.after_crash(at * 2 + tear);
                check_opened(&found, &models, &known, &when);
                // It goes on from there to the end, with another crash on the way.
                found.crash_at(at % 97);
                let mut later = known.clone();
                let _ = do_steps(&found, &steps, &mut later, None);
                check_opened(
                    &found.after_crash(at),
                    &models,
                    &later,
                    &format!("{when}, and again"),
                );
            }
        }
    }
}

#[test]
fn a_reader_keeps_what_thinning_takes_away() {
    let disk = MemoryDisk::default();
    let keeper = open(disk.clone()).unwrap();
    keeper.copy_begin(SYNC).unwrap();
    keeper.copy_done(SYNC).unwrap();
    let mut known = Known::default();
    let mut steps: Vec<Step> = Vec::new();
    for epoch in 1..=6 {
        let puts = vec![Put::Fill(epoch % 3, epoch as u8), Put::Fill(5, 0x40 + epoch as u8)];
        steps.push(Step::Epoch(Script::new(epoch, vec![(1, puts)])));
    }
    drop(keeper);
    do_steps(&disk, &steps, &mut known, None).unwrap();
    let keeper = open(disk.clone()).unwrap();
    let models = models(&steps);
    let view = keeper.view_at(Epoch(3)).unwrap().unwrap();
    let everything = |keeper: &Keeper| keeper.volume().layers();
    let kept: BTreeSet<Epoch> = [Epoch(6)].into();
    let before = disk.list("journal").unwrap().len() + disk.list("history").unwrap().len();
    assert!(merge(&keeper, &everything(&keeper), &kept, &|| true).unwrap());
    assert!(keeper.view_at(Epoch(3)).unwrap().is_none(), "it is no point any more");
    let mut found = vec![0; VOLUME_BYTES as usize];
    view.read(0, &mut found).unwrap();
    assert!(found == models[3], "who had it open reads it still");
    drop(view);
    let after = disk.list("journal").unwrap().len() + disk.list("history").unwrap().len();
    assert!(after < before, "{before} files became {after}");
}

/// Epochs go on being committed while it is chosen what stays.
#[test]
fn what_is_committed_after_the_choice_stays() {
    let disk = MemoryDisk::default();
    let fill = |epoch| Script::new(epoch, vec![(1, vec![Put::Fill(3, epoch as u8)])]);
    let steps: Vec<Step> = (1..=6).map(|epoch| Step::Epoch(fill(epoch))).collect();
    do_steps(&disk, &steps, &mut Known::default(), None).unwrap();
    let keeper = open(disk.clone()).unwrap();
    let models = models(&steps);
    // Chosen when 3 was the newest; 4 to 6 came before the layers were taken.
    let kept: BTreeSet<Epoch> = [Epoch(3)].into();
    let layers = keeper.volume().layers();
    assert!(merge(&keeper, &layers, &kept, &|| true).unwrap());
    for epoch in 1..=6 {
        let view = keeper.view_at(Epoch(epoch)).unwrap();
        assert_eq!(view.is_some(), epoch >= 3, "point {epoch}");
        if let Some(view) = view {
            let mut found = vec![0; VOLUME_BYTES as usize];
            view.read(0, &mut found).unwrap();
            assert!(found == models[epoch as usize], "point {epoch} reads otherwise");
        }
    }
}
