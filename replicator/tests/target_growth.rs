//! A volume grows: the commit of the first epoch of the new size makes it larger, and nothing else
//! does, wherever the power goes.

mod target_support;

use secondsite::target::disk::Disk;
use secondsite::target::disk::memory::MemoryDisk;
use secondsite::target::keeper::Keeper;
use secondsite::target::promote::promote;
use secondsite_format::frame::Frame;
use secondsite_format::ids::Epoch;
use secondsite_format::message::{CopyState, Refusal, RefusalCode, Reply};
use target_support::{
    BLOCK, BLOCKS, KEY, Put, SYNC, Script, VOLUME_BYTES, apply, commit_frame, content, open,
    sync_frame,
};

const SEEDS: u64 = 4;
/// Blocks of each epoch's volume.
const SIZES: [u64; 5] = [BLOCKS, BLOCKS, BLOCKS + 8, BLOCKS + 8, BLOCKS + 20];

fn script(epoch: u64) -> Script {
    let end = SIZES[epoch as usize] - 1;
    let puts = match epoch {
        1 => vec![Put::Fill(1, 0x21), Put::Fill(9, 0x29)],
        // All of the new part, as a source sends it.
        2 => vec![Put::Fill(3, 0x33), Put::Zero(BLOCKS, 7), Put::Fill(end, 0x3f)],
        3 => vec![Put::Fill(BLOCKS, 0x40)],
        _ => vec![Put::Zero(end - 11, 11), Put::Fill(end, 0x5f)],
    };
    Script::new(epoch, vec![(1, puts)])
}

fn bytes_of(epoch: u64) -> u64 {
    SIZES[epoch as usize] * BLOCK
}

fn commit(script: &Script, bytes: u64, previous: [u8; 32]) -> Frame {
    let mut manifest = script.manifest(previous);
    manifest.volume_bytes = bytes;
    commit_frame(manifest, &KEY)
}

/// The volume after each epoch, with its size then.
fn models() -> Vec<Vec<u8>> {
    let mut model = vec![0; VOLUME_BYTES as usize];
    apply(&mut model, &content(&[Put::Fill(0, 0x11), Put::Fill(15, 0x1f)]));
    let mut models = vec![model.clone()];
    for epoch in 1..SIZES.len() as u64 {
        model.resize(bytes_of(epoch) as usize, 0);
        script(epoch).apply(&mut model);
        models.push(model.clone());
    }
    models
}

fn live(disk: &MemoryDisk, acknowledged: &mut Option<u64>) -> Result<(), String> {
    let keeper = open(disk.clone()).map_err(|error| error.to_string())?;
    let text = |refusal: Refusal| refusal.message;
    if !keeper.volume().copied() {
        keeper.copy_begin(SYNC).map_err(text)?;
        keeper.copy_data(&sync_frame(&[Put::Fill(0, 0x11), Put::Fill(15, 0x1f)])).map_err(text)?;
        keeper.copy_done(SYNC).map_err(text)?;
    }
    acknowledged.get_or_insert(0);
    for epoch in 1..SIZES.len() as u64 {
        let durable = keeper.volume().durable().map_or(0, |facts| facts.epoch.0);
        if epoch <= durable {
            continue;
        }
        keeper.name_bytes(bytes_of(epoch)).map_err(text)?;
        let script = script(epoch);
        for frame in script.data() {
            keeper.data(&frame).map_err(text)?;
        }
        let previous = keeper.volume().durable().map_or([0; 32], |facts| facts.chain);
        keeper.commit(&commit(&script, bytes_of(epoch), previous), &KEY).map_err(text)?;
        *acknowledged = Some(epoch);
        if epoch == 3 {
            promote(&keeper, Epoch(3), &|| true).map_err(text)?;
        }
    }
    Ok(())
}

fn read_all(keeper: &Keeper) -> Vec<u8> {
    let mut bytes = vec![0; keeper.volume().durable_bytes() as usize];
    keeper.view().unwrap().read(0, &mut bytes).unwrap();
    bytes
}

fn replica(disk: &MemoryDisk) -> Vec<u8> {
    disk.read("replica.img", u64::MAX).unwrap().unwrap()
}

fn check(disk: &MemoryDisk, acknowledged: Option<u64>, when: &str) {
    let models = models();
    let keeper = open(disk.clone()).unwrap_or_else(|error| panic!("{when}: {error}"));
    assert!(keeper.volume().copied() || acknowledged.is_none(), "{when}: the first copy is lost");
    if !keeper.volume().copied() {
        return;
    }
    let durable = keeper.volume().durable().map_or(0, |facts| facts.epoch.0);
    assert!(durable >= acknowledged.unwrap_or(0), "{when}: epoch {acknowledged:?} is lost");
    assert!(read_all(&keeper) == models[durable as usize], "{when}: not epoch {durable}");
    // Each epoch that is kept knows how large the volume was.
    for epoch in keeper.volume().epochs() {
        assert_eq!(epoch.facts.volume_bytes, bytes_of(epoch.facts.epoch.0), "{when}");
    }
    promote(&keeper, Epoch(0), &|| true).unwrap();
    let base = keeper.volume().record().base.as_ref().map_or(0, |base| base.epoch.0);
    let found = replica(disk);
    // A first copy's file may be as long as what is promoted next; its volume is what was copied.
    assert!(found == models[base as usize], "{when}: replica is not its base {base}");
    promote(&keeper, Epoch(durable), &|| true).unwrap();
    assert!(replica(disk) == models[durable as usize], "{when}: replica is not {durable}");
    drop(keeper);
    let again = open(disk.clone()).unwrap();
    assert_eq!(again.volume().durable_bytes(), bytes_of(durable), "{when}");
    assert!(read_all(&again) == models[durable as usize], "{when}: lost by opening again");
}

#[test]
fn a_first_copy_goes_on_with_the_block_across_the_end_that_it_had_reached() {
    let keeper = open(MemoryDisk::default()).unwrap();
    keeper.name_bytes(VOLUME_BYTES + 1536).unwrap();
    keeper.copy_begin(SYNC).unwrap();
    let done = keeper.copy_flush(VOLUME_BYTES + 1536).unwrap();
    assert_eq!(done, Reply::CopiedTo(VOLUME_BYTES + 1536));
    keeper.name_bytes(VOLUME_BYTES + 2 * BLOCK).unwrap();
    assert_eq!(keeper.copy_begin(SYNC).unwrap(), Reply::CopiedTo(VOLUME_BYTES));
    keeper.copy_data(&sync_frame(&[Put::Fill(BLOCKS, 0x77)])).unwrap();
}

#[test]
fn a_crash_at_every_operation_leaves_the_old_size_or_the_new_one() {
    let disk = MemoryDisk::default();
    let mut acknowledged = None;
    live(&disk, &mut acknowledged).unwrap();
    assert_eq!(acknowledged, Some(4));
    let operations = disk.operations();
    check(&disk, acknowledged, "without a crash");
    for at in 0..operations {
        let disk = MemoryDisk::default();
        disk.crash_at(at);
        let mut acknowledged = None;
        assert!(live(&disk, &mut acknowledged).is_err(), "operation {at} was never done");
        for seed in 0..SEEDS {
            let found = disk.after_crash(at * SEEDS + seed);
            check(&found, acknowledged, &format!("crash at {at}, seed {seed}"));
            // It goes on from there.
            live(&found, &mut acknowledged.clone()).unwrap();
            check(&found, Some(4), &format!("crash at {at}, seed {seed}, and on"));
        }
    }
}

#[test]
fn the_size_is_the_manifests_and_never_falls() {
    let disk = MemoryDisk::default();
    live(&disk, &mut None).unwrap();
    let keeper = open(disk).unwrap();
    let durable = bytes_of(4);
    assert_eq!(keeper.name_bytes(durable - 512).unwrap_err().code, RefusalCode::Mismatch);
    assert_eq!(keeper.name_bytes(durable + 100).unwrap_err().code, RefusalCode::Mismatch);
    // Named, and not committed: still the old one.
    keeper.name_bytes(durable + 4 * BLOCK).unwrap();
    assert_eq!(keeper.volume().durable_bytes(), durable);
    let next = Script::new(5, vec![(1, vec![Put::Fill(SIZES[4] + 1, 0x77)])]);
    keeper.data(&next.data()[0]).unwrap();
    let previous = keeper.volume().durable().unwrap().chain;
    let commit = |bytes| keeper.commit(&commit(&next, bytes, previous), &KEY);
    for wrong in [durable - BLOCK, durable, durable + 8 * BLOCK] {
        assert_eq!(commit(wrong).unwrap_err().code, RefusalCode::Unproven, "{wrong}");
    }
    let Reply::Committed { epoch, .. } = commit(durable + 4 * BLOCK).unwrap() else {
        panic!("it is committed")
    };
    assert_eq!((epoch, keeper.volume().durable_bytes()), (Epoch(5), durable + 4 * BLOCK));
    // Beyond the old size there is what was sent, and zero; digests reach as far as was named.
    let mut tail = vec![1; 4 * BLOCK as usize];
    keeper.view().unwrap().read(durable, &mut tail).unwrap();
    assert!(tail[..BLOCK as usize].iter().all(|byte| *byte == 0));
    assert_eq!(tail[BLOCK as usize], 0x77);
    assert!(keeper.digests(durable, 4 * BLOCK, BLOCK).is_ok());
    assert!(keeper.digests(durable, 5 * BLOCK, BLOCK).is_err());
}

#[test]
fn a_first_copy_goes_on_over_a_volume_that_has_grown() {
    let disk = MemoryDisk::default();
    let keeper = open(disk.clone()).unwrap();
    keeper.copy_begin(SYNC).unwrap();
    keeper.copy_data(&sync_frame(&[Put::Fill(0, 0x11)])).unwrap();
    keeper.copy_flush(BLOCK).unwrap();
    drop(keeper);
    let keeper = open(disk.clone()).unwrap();
    keeper.name_bytes(VOLUME_BYTES + 2 * BLOCK).unwrap();
    let copy = keeper.welcome().unwrap().copy;
    assert_eq!(copy, CopyState::Copying { sync: SYNC, cursor: BLOCK }, "from where it was");
    keeper.copy_begin(SYNC).unwrap();
    keeper.copy_data(&sync_frame(&[Put::Fill(BLOCKS + 1, 0x12)])).unwrap();
    keeper.copy_flush(VOLUME_BYTES + 2 * BLOCK).unwrap();
    assert_eq!(keeper.copy_done(SYNC).unwrap(), Reply::CopiedTo(VOLUME_BYTES + 2 * BLOCK));
    let image = replica(&disk);
    assert_eq!(image.len() as u64, VOLUME_BYTES + 2 * BLOCK);
    assert_eq!((image[0], image[(BLOCKS + 1) as usize * BLOCK as usize]), (0x11, 0x12));
}
