//! Attacks durability: the power goes at every single I/O of a target's life (first copy, epochs,
//! a cut given up, promotions, opening again), and what was not synced is lost, kept or torn.
//! Whatever was acknowledged must be there, and replica with journal must equal the model. The same
//! for a target that dies first, by itself or over a failed sync, and is started again before the
//! power goes: what it tells the source then is acknowledged too.

mod target_support;

use secondsite::target::disk::Disk;
use secondsite::target::disk::memory::{Access, Fault, MemoryDisk, Verb};
use secondsite::target::keeper::Keeper;
use secondsite::target::promote::promote;
use secondsite_format::ids::{CutId, Epoch};
use secondsite_format::message::Refusal;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use target_support::{KEY, Put, SYNC, Script, VOLUME_BYTES, apply, content, open, sync_frame};

/// Different disks for the same crash.
const SEEDS: u64 = 6;

fn first_copy() -> Vec<Put> {
    vec![Put::Fill(0, 0x11), Put::Fill(1, 0x12), Put::Zero(2, 3), Put::Fill(15, 0x1f)]
}

fn scripts() -> Vec<Script> {
    vec![
        // Scattered blocks, then a second pass over some of them, then a range discarded.
        Script::new(
            1,
            vec![
                (1, vec![Put::Fill(1, 0x21), Put::Fill(3, 0x23), Put::Fill(9, 0x29)]),
                (2, vec![Put::Fill(3, 0x33), Put::Zero(9, 1)]),
                (1, vec![Put::Fill(3, 0x99)]), // of a lower pass: must lose
            ],
        ),
        Script::new(2, vec![]), // empty: only a commit record
        Script::new(
            3,
            vec![(1, vec![Put::Discard(0, 4), Put::Fill(7, 0x47)]), (1, vec![Put::Fill(2, 0x42)])],
        )
        .fuzzy(),
        Script::new(4, vec![(1, vec![Put::Fill(2, 0x52), Put::Fill(8, 0x58)])]),
        Script::new(5, vec![(1, vec![Put::Zero(4, 8), Put::Fill(14, 0x6e)])]),
    ]
}

/// The volume after the first copy and after each epoch.
fn models() -> Vec<Vec<u8>> {
    let mut model = vec![0; VOLUME_BYTES as usize];
    apply(&mut model, &content(&first_copy()));
    let mut models = vec![model.clone()];
    for script in scripts() {
        script.apply(&mut model);
        models.push(model.clone());
    }
    models
}

/// What the source knows when the power goes.
#[derive(Default, Clone, Copy)]
struct Known {
    copied: bool,
    acknowledged: u64,
}

/// The first copy, from wherever it stands.
fn copy(keeper: &Keeper) -> Result<(), Refusal> {
    if keeper.volume().copied() {
        return Ok(());
    }
    keeper.copy_begin(SYNC)?;
    let cursor = match keeper.welcome()?.copy {
        secondsite_format::message::CopyState::Copying { cursor, .. } => cursor,
        _ => unreachable!("it was just begun"),
    };
    let (low, high) = (&first_copy()[..2], &first_copy()[2..]);
    if cursor == 0 {
        keeper.copy_data(&sync_frame(low))?;
        keeper.copy_flush(2 * target_support::BLOCK)?;
    }
    keeper.copy_data(&sync_frame(high))?;
    keeper.copy_done(SYNC).map(drop)
}

/// One target's life from whatever is there already; `known` is kept up as answers come.
fn live(disk: &MemoryDisk, known: &mut Known) -> Result<(), String> {
    let keeper = open(disk.clone()).map_err(|error| error.to_string())?;
    let text = |refusal: Refusal| refusal.message;
    copy(&keeper).map_err(text)?;
    known.copied = true;
    for script in scripts() {
        let durable = keeper.volume().durable().map_or(0, |facts| facts.epoch.0);
        if script.epoch <= durable {
            continue;
        }
        if script.epoch == 4 {
            // A cut that is given up after a frame of it has arrived.
            let mut abandoned = Script::new(4, vec![(1, vec![Put::Fill(5, 0xee)])]);
            abandoned.cut_id = CutId([0xaa; 16]);
            keeper.data(&abandoned.data()[0]).map_err(text)?;
            keeper.give_up(abandoned.cut_id).map_err(text)?;
        }
        for frame in script.data() {
            keeper.data(&frame).map_err(text)?;
        }
        let previous = keeper.volume().durable().map_or([0; 32], |facts| facts.chain);
        keeper.commit(&script.commit(previous), &KEY).map_err(text)?;
        known.acknowledged = script.epoch;
        if script.epoch == 2 || script.epoch == 4 {
            promote(&keeper, Epoch(script.epoch), &|| true).map_err(text)?;
        }
    }
    Ok(())
}

fn read_all(keeper: &Keeper) -> Vec<u8> {
    let mut bytes = vec![0; VOLUME_BYTES as usize];
    keeper.view().unwrap().read(0, &mut bytes).unwrap();
    bytes
}

fn replica(disk: &MemoryDisk) -> Vec<u8> {
    disk.read("replica.img", VOLUME_BYTES).unwrap().unwrap()
}

/// Everything that must hold on a disk found after a crash.
fn check(disk: &MemoryDisk, known: Known, when: &str) {
    let models = models();
    let keeper = open(disk.clone()).unwrap_or_else(|error| panic!("{when}: {error}"));
    assert!(keeper.volume().copied() || !known.copied, "{when}: the first copy is lost");
    if !keeper.volume().copied() {
        // It goes on at the cursor, and what is below that was durable.
        copy(&keeper).unwrap();
        return assert!(read_all(&keeper) == models[0], "{when}: the first copy has a hole");
    }
    let durable = keeper.volume().durable().map_or(0, |facts| facts.epoch.0);
    assert!(durable >= known.acknowledged, "{when}: epoch {} is lost", known.acknowledged);
    let found = read_all(&keeper);
    assert!(found == models[durable as usize], "{when}: not epoch {durable}");
    // What was interrupted is finished though nobody asks for it, and the replica is its base.
    promote(&keeper, Epoch(0), &|| true).unwrap();
    let base = keeper.volume().record().base.as_ref().map_or(0, |base| base.epoch.0);
    assert!(replica(disk) == models[base as usize], "{when}: replica is not its base {base}");
    // Promotion gives the same, and may be repeated.
    promote(&keeper, Epoch(durable), &|| true).unwrap();
    assert!(replica(disk) == models[durable as usize], "{when}: replica is not {durable}");
    assert_eq!(keeper.volume().record().promoting, None, "{when}");
    assert!(!promote(&keeper, Epoch(durable), &|| true).unwrap(), "{when}: promoted twice");
    drop(keeper);
    let again = open(disk.clone()).unwrap();
    assert!(read_all(&again) == models[durable as usize], "{when}: lost by opening again");
}

#[test]
fn a_whole_life_without_a_crash_equals_the_model() {
    let disk = MemoryDisk::default();
    let mut known = Known::default();
    live(&disk, &mut known).unwrap();
    assert_eq!(known.acknowledged, 5);
    check(&disk, known, "at the end");
}

#[test]
fn a_crash_at_every_operation_loses_nothing_acknowledged() {
    let disk = MemoryDisk::default();
    live(&disk, &mut Known::default()).unwrap();
    let operations = disk.operations();
    for at in 0..operations {
        let disk = MemoryDisk::default();
        disk.crash_at(at);
        let mut known = Known::default();
        assert!(live(&disk, &mut known).is_err(), "operation {at} was never done");
        for seed in 0..SEEDS {
            let found = disk.after_crash(at * SEEDS + seed);
            check(&found, known, &format!("crash at {at} of {operations}, seed {seed}"));
        }
    }
}

#[test]
fn a_second_crash_while_recovering_loses_nothing_acknowledged() {
    let disk = MemoryDisk::default();
    live(&disk, &mut Known::default()).unwrap();
    for at in (0..disk.operations()).step_by(3) {
        let disk = MemoryDisk::default();
        disk.crash_at(at);
        let mut known = Known::default();
        live(&disk, &mut known).unwrap_err();
        for again in 0.. {
            let found = disk.after_crash(at);
            found.crash_at(again);
            let mut later = known;
            let finished = live(&found, &mut later).is_ok();
            let when = format!("crash at {at}, then at {again}");
            check(&found.after_crash(again), later, &when);
            if finished {
                break;
            }
        }
    }
}

#[test]
fn what_a_start_finds_stays_when_the_power_goes() {
    // The process ends at every access; what it wrote is in the cache still. The next one opens
    // that, and tells the source what is durable; then the power goes.
    for at in 0.. {
        let disk = MemoryDisk::default();
        let left = AtomicU64::new(at);
        let watch = move |_: &Access<'_>| {
            if left.fetch_sub(1, Ordering::Relaxed) == 0 {
                resume_unwind(Box::new("killed"));
            }
            None
        };
        let watched = disk.watched(Arc::new(watch));
        let mut known = Known::default();
        let ended = catch_unwind(AssertUnwindSafe(|| live(&watched, &mut known))).is_err();
        let keeper = open(disk.clone()).unwrap();
        let found = keeper.volume().durable().map_or(0, |facts| facts.epoch.0);
        let told = Known { copied: keeper.volume().copied(), acknowledged: found };
        for seed in 0..SEEDS {
            let when = format!("killed at {at}, then without power, seed {seed}");
            check(&disk.after_crash(at * SEEDS + seed), told, &when);
        }
        if !ended {
            break;
        }
    }
}

/// What a target that is started now tells the source.
fn told(disk: &MemoryDisk, known: &mut Known, when: &str) {
    let keeper = open(disk.clone()).unwrap_or_else(|error| panic!("{when}: {error}"));
    let welcome = keeper.welcome().unwrap();
    known.copied |= welcome.copy == secondsite_format::message::CopyState::Copied;
    assert!(welcome.durable.0.0 >= known.acknowledged, "{when}: it forgot what was acknowledged");
    known.acknowledged = welcome.durable.0.0;
}

#[test]
fn what_a_failed_sync_left_in_memory_is_not_believed_after_a_restart() {
    let disk = MemoryDisk::default();
    live(&disk, &mut Known::default()).unwrap();
    for at in 0..disk.operations() {
        let disk = MemoryDisk::default();
        let (left, failed) = (AtomicU64::new(at), AtomicBool::new(false));
        let watch = move |access: &Access<'_>| {
            let reads = access.verb == Verb::Read;
            if reads
                || left
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
                    .is_ok()
            {
                return None;
            }
            let fails = access.verb == Verb::Sync && !failed.swap(true, Ordering::Relaxed);
            fails.then_some(Fault::Fails(libc::EIO))
        };
        let mut known = Known::default();
        if live(&disk.watched(Arc::new(watch)), &mut known).is_ok() {
            continue; // no sync from there on
        }
        let when = format!("a sync failed at {at} or later");
        told(&disk, &mut known, &when);
        for seed in 0..SEEDS {
            let found = disk.after_crash(at * SEEDS + seed);
            check(&found, known, &format!("{when}, restarted, power cut, seed {seed}"));
        }
        // And it goes on from there, to the end.
        live(&disk, &mut known).unwrap_or_else(|error| panic!("{when}: {error}"));
        check(&disk.after_crash(at), known, &when);
    }
}
