//! Attacks kept history: epochs with random extents are committed, gathered into runs, merged and
//! thinned by random choices of what is kept, promoted as far as those allow; the power goes at
//! every access of that, also twice. Whatever is kept must read as it was when it was committed,
//! and the replica volume must equal its base.

mod target_support;

use secondsite::target::disk::Disk;
use secondsite::target::disk::memory::MemoryDisk;
use secondsite::target::index::{FrameSpot, Origin, Piece};
use secondsite::target::journal::Place;
use secondsite::target::keeper::Keeper;
use secondsite::target::layers::Layer;
use secondsite::target::points::{VolumeEpochs, complete_points};
use secondsite::target::promote::promote;
use secondsite::target::run::{Run, Writer};
use secondsite::target::segments::Segments;
use secondsite::target::tend::merge;
use secondsite_format::ids::{Epoch, Generation};
use secondsite_format::message::Refusal;
use std::collections::BTreeSet;
use std::sync::Arc;
use target_support::{
    BLOCK, BLOCKS, KEY, Put, SYNC, Script, VOLUME, VOLUME_BYTES, commit_frame, open,
};

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
        // A read that begins in the middle finds what began before it.
        for (block, expected) in models[epoch as usize].chunks(BLOCK as usize).enumerate() {
            let mut found = vec![0; expected.len()];
            view.read(block as u64 * BLOCK, &mut found).unwrap();
            assert!(found == expected, "{when}: block {block} of point {epoch} reads otherwise");
        }
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

/// The last of [`overwritten`].
const LAST: u64 = 40;

/// Epochs in one run that overwrite each other, but for a block of the first.
fn overwritten(disk: &MemoryDisk) -> Vec<Vec<u8>> {
    let script = |epoch| {
        let mut puts = vec![Put::Fill(epoch % 3, epoch as u8), Put::Fill(5, 0x40 + epoch as u8)];
        puts.extend((epoch == 1).then_some(Put::Fill(9, 9)));
        Script::new(epoch, vec![(1, puts)])
    };
    let epochs = (1..=LAST).map(|epoch| Step::Epoch(script(epoch)));
    let steps: Vec<Step> = epochs.chain([Step::Gather]).collect();
    do_steps(disk, &steps, &mut Known::default(), None).unwrap();
    models(&steps)
}

#[test]
fn a_reader_keeps_what_thinning_takes_away() {
    let disk = MemoryDisk::default();
    let models = overwritten(&disk);
    let keeper = open(disk.clone()).unwrap();
    let view = keeper.view_at(Epoch(3)).unwrap().unwrap();
    let files = || disk.list("journal").unwrap().len() + disk.list("history").unwrap().len();
    let before = files();
    let layers = keeper.volume().layers();
    assert!(merge(&keeper, &layers, &[Epoch(LAST)].into(), &|| true).unwrap());
    drop(layers);
    assert!(keeper.view_at(Epoch(3)).unwrap().is_none(), "it is no point any more");
    let mut found = vec![0; VOLUME_BYTES as usize];
    view.read(0, &mut found).unwrap();
    assert!(found == models[3], "who had it open reads it still");
    drop(view);
    assert!(files() < before, "{before} files became {}", files());
}

#[test]
fn what_thinning_writes_anew_is_durable_before_the_old_goes() {
    let disk = MemoryDisk::default();
    let models = overwritten(&disk);
    let keeper = open(disk.clone()).unwrap();
    let layers = keeper.volume().layers();
    assert!(merge(&keeper, &layers, &[Epoch(LAST)].into(), &|| true).unwrap());
    let written = disk.list("history").unwrap().iter().any(|name| name.ends_with(".seg"));
    assert!(written, "the test needs a segment that is written anew");
    for seed in 0..20 {
        let keeper = open(disk.after_crash(seed)).unwrap();
        let mut found = vec![0; VOLUME_BYTES as usize];
        keeper.view_at(Epoch(LAST)).unwrap().unwrap().read(0, &mut found).unwrap();
        assert!(found == models[LAST as usize], "seed {seed}");
    }
}

#[test]
fn a_doubt_outlives_the_point_that_told_it() {
    let disk = MemoryDisk::default();
    let keeper = open(disk.clone()).unwrap();
    keeper.copy_begin(SYNC).unwrap();
    keeper.copy_done(SYNC).unwrap();
    for epoch in 1..=4 {
        let script = Script::new(epoch, vec![]);
        let previous = keeper.volume().durable().map_or([0; 32], |facts| facts.chain);
        let mut manifest = script.manifest(previous);
        if epoch == 3 {
            manifest.doubt_from = Epoch(2);
        }
        keeper.commit(&commit_frame(manifest, &KEY), &KEY).unwrap();
    }
    let layers = keeper.volume().layers();
    let kept: BTreeSet<Epoch> = [1, 2, 4].map(Epoch).into();
    assert!(merge(&keeper, &layers, &kept, &|| true).unwrap());
    let epochs = keeper.volume().facts().collect();
    let volume = VolumeEpochs { volume: VOLUME, generation: Generation(1), epochs };
    let exact: Vec<bool> = complete_points(&[volume]).iter().map(|p| p.is_exact()).collect();
    assert_eq!(exact, [true, false, true]);
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

/// A run of thousands of pieces, from a sector to a gigabyte, against a plain list of them.
#[test]
fn a_lookup_finds_every_piece_that_touches_a_range() {
    let disk = MemoryDisk::default();
    overwritten(&disk);
    let facts = open(disk.clone()).unwrap().volume().runs()[0].facts.clone();
    let segments = Segments::new(Arc::new(disk.clone()));
    let mut rng = Rng(1);
    let mut pieces = Vec::new();
    for epoch in 1..=LAST {
        let mut at = rng.below(64) * 512;
        for i in 0..200 {
            let bytes = 512 << (rng.below(8) + if i % 50 == 0 { 14 } else { 0 });
            let frame = FrameSpot { segment: 1, offset: i * 100, bytes: 100 };
            let origin = Origin::Payload { frame, at: epoch as u32 };
            pieces.push(Piece { start: at, end: at + bytes, origin, epoch: Epoch(epoch), of: 0 });
            at += bytes + rng.below(1 << 5) * 512;
        }
    }
    pieces.sort_by_key(|piece| (piece.start, piece.epoch));
    let end = Place { segment: 1, offset: 512 };
    let mut writer = Writer::new(Arc::new(disk.clone()), VOLUME, Epoch(0), Epoch(LAST)).unwrap();
    pieces.iter().for_each(|piece| writer.add(piece).unwrap());
    writer.finish(end, &facts, &[]).unwrap();
    let run = Run::open(&segments, VOLUME, Epoch(0), Epoch(LAST)).unwrap();
    assert_eq!(run.pieces, pieces.len() as u64);
    for _ in 0..3000 {
        // Near where one begins, so that what begins before it reaches in.
        let near = pieces[rng.below(pieces.len() as u64) as usize].start;
        let (start, upto) = (near + 512 * rng.below(32), Epoch(rng.below(LAST + 2)));
        let most = 1 << rng.below(22);
        let end = start + 512 * (1 + rng.below(most));
        let touches = |piece: &&Piece| piece.end > start && piece.epoch <= upto;
        let mut expected: Vec<Piece> =
            pieces.iter().filter(touches).filter_map(|piece| piece.within(start, end)).collect();
        expected.sort_by_key(|piece| (piece.epoch, piece.start));
        let mut found = Vec::new();
        run.pieces(start, end, upto, &mut found).unwrap();
        found.sort_by_key(|piece| (piece.epoch, piece.start));
        assert!(found == expected, "{start}..{end} at {upto}");
        let next = pieces.iter().filter(touches).map(|piece| piece.start.max(start)).min();
        assert_eq!(run.next_from(start, upto).unwrap(), next, "from {start} at {upto}");
    }
}
